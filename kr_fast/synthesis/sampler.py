"""The class-conditional sampler: a trained network, a step table and image ids in, uint8 images out."""

import dataclasses
import hashlib
import math
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from kr_fast import __version__
from kr_fast.ops.pack_uint8 import pack_uint8
from kr_fast.ops.philox_normal import philox_normal
from kr_fast.ops.solver_step import SolverOutput, solver_step
from kr_fast.runtime.errors import UserError, fail
from kr_fast.synthesis.labels import LabelPlan
from kr_fast.synthesis.steptable import History, StepTable


@dataclasses.dataclass(frozen=True)
class Batch:
    """``ids``, ``labels``: int64 ``[B]``; ``images``: uint8 ``[B, H, W, C]``."""

    ids: Tensor
    labels: Tensor
    images: Tensor


class Sampler:
    """Images as a function of (network, step table, seed, id, label) and of nothing else.

    Every batch runs at the same size, ``micro_batch``, its tail filled with copies, so an image does not depend on its
    neighbours, their order or their number: same micro-batch, versions and device type -> same bytes for every id.

    Args:
        unet: a network called as ``unet(x, timestep, class_labels=labels)`` (diffusers' ``UNet2DModel``).
        scheduler: a diffusers scheduler, compiled by :class:`StepTable`.
        num_inference_steps: solver steps.
        seed: of all noise, in [0, 2^63).
        guidance_scale: classifier-free guidance ``u + g (c - u)``; None or 1 for none. The null class is the last of
            the network's class embeddings (Ho and Salimans, 2022, eq. 6).
        noise_scale: standard deviation of the initial noise; above 1 it is the Expansion Trick, for more diversity
            (Lampis, Lomurno and Matteucci, "Bridging the Gap", BMVC 2023).
        micro_batch: images in one network call (twice as many with guidance).
        image_shape: (channels, height, width) of the network's output; from ``unet.config`` by default.
        crop: (height, width) cut from the top left of the output, for networks trained on padded images.
        eta: DDIM's or TCD's share of noise; None for the scheduler's default.
    """

    def __init__(
        self,
        unet: Any,
        scheduler: Any,
        num_inference_steps: int,
        *,
        seed: int,
        guidance_scale: float | None = None,
        noise_scale: float = 1.0,
        micro_batch: int = 256,
        image_shape: tuple[int, int, int] | None = None,
        crop: tuple[int, int] | None = None,
        eta: float | None = None,
    ):
        if micro_batch < 1:
            fail("Sampler", "micro_batch", "be at least 1", micro_batch)
        if not 0 < noise_scale < math.inf:
            fail("Sampler", "noise_scale", "be above 0 and finite", noise_scale)
        if guidance_scale is not None and not math.isfinite(guidance_scale):
            fail("Sampler", "guidance_scale", "be finite or None", guidance_scale)
        if not 0 <= seed < 2**63:
            fail("Sampler", "seed", "be in [0, 2^63)", seed)
        self.unet = unet
        self.table = StepTable.compile(scheduler, num_inference_steps, eta=eta)
        self.seed, self.noise_scale, self.micro_batch, self.crop = seed, float(noise_scale), micro_batch, crop
        self.guidance_scale = None if guidance_scale in (None, 1, 1.0) else float(guidance_scale)
        self.image_shape = image_shape or _image_shape(unet)
        if crop is not None and not all(0 < c <= s for c, s in zip(crop, self.image_shape[1:], strict=True)):
            fail("Sampler", "crop", f"lie inside the {self.image_shape[1:]} image", crop)
        config = getattr(unet, "config", None)
        embeddings = getattr(config, "num_class_embeds", None)
        self._embeddings = embeddings
        # diffusers refuses labels for a network without class embeddings; of other callables nothing is known.
        self._takes_labels = config is None or embeddings or getattr(config, "class_embed_type", None) is not None
        if self.guidance_scale is not None and not embeddings:
            fail("Sampler", "unet", "have class embeddings (the last is the null class) for guidance", embeddings)
        first = next(iter(unet.parameters()), None) if isinstance(unet, torch.nn.Module) else None
        self.device = torch.device("cpu") if first is None else first.device
        self.dtype = torch.float32 if first is None else first.dtype
        # A tensor, because diffusers' networks cut a Python float down to an integer.
        self._timesteps = torch.tensor(self.table.timesteps, device=self.device)

    def __call__(self, ids: Tensor, labels: Tensor) -> Tensor:
        """The images of ``ids`` with ``labels``: int64 ``[B]`` each -> uint8 ``[B, H, W, C]`` on the sampler's device.

        Raises: UserError for negative or repeated ids, a label outside the network's classes, an output of another
            shape, or non-finite output (naming the step and the ids).
        """
        self._check(ids, labels)
        height, width = self.crop or self.image_shape[1:]
        if len(ids) == 0:
            return torch.empty(0, height, width, self.image_shape[0], dtype=torch.uint8, device=self.device)
        # Joined outside inference mode, so that the caller gets a tensor like any other.
        return torch.cat(self._parts(ids.to(self.device), labels.to(self.device)))

    @torch.inference_mode()
    def _parts(self, ids: Tensor, labels: Tensor) -> list[Tensor]:
        training = getattr(self.unet, "training", False)
        if training:
            self.unet.eval()
        try:
            parts = []
            for start in range(0, len(ids), self.micro_batch):
                count = min(self.micro_batch, len(ids) - start)
                fill = torch.arange(start, start + self.micro_batch, device=self.device).clamp_(max=len(ids) - 1)
                parts.append(self._images(ids[fill], labels[fill])[:count])
        finally:
            if training:
                self.unet.train()
        return parts

    def stream(self, plan: LabelPlan, ids: Iterable[int] | Tensor) -> Iterator[Batch]:
        """Batches of at most ``micro_batch`` images, in the order of ``ids``, labelled by ``plan``."""
        if isinstance(ids, range):
            ids = torch.arange(ids.start, ids.stop, ids.step)
        elif not isinstance(ids, Tensor):
            ids = torch.tensor(list(ids), dtype=torch.int64)
        self._check_ids(ids)
        for part in ids.split(self.micro_batch) if len(ids) else ():
            labels = plan.labels(part)
            yield Batch(part, labels, self(part, labels))

    def describe(self) -> dict[str, Any]:
        """All that the images depend on besides their ids and labels, as plain values: what a manifest holds."""
        return {
            "scheduler": self.table.name,
            "steps": len(self.table),
            "step_table": self.table.digest(),
            "network": weights_digest(self.unet),
            "seed": self.seed,
            "guidance_scale": self.guidance_scale,
            "noise_scale": self.noise_scale,
            "micro_batch": self.micro_batch,
            "image_shape": list(self.image_shape),
            "crop": None if self.crop is None else list(self.crop),
            "dtype": str(self.dtype).removeprefix("torch."),
            "device": self.device.type,
            "torch": torch.__version__,
            "kr_fast": __version__,
        }

    def _trajectory(self, ids: Tensor, labels: Tensor, watch: bool = False) -> tuple[Tensor, Tensor]:
        """The last sample, and by image whether all that the network returned on the way was finite."""
        x = philox_normal(ids, self.image_shape, seed=self.seed).mul_(self.noise_scale * self.table.init_noise_sigma)
        copies = 1 if self.guidance_scale is None else 2
        if copies == 2:
            labels = torch.cat([labels, torch.full_like(labels, self._embeddings - 1)])
        inputs = (x * self.table.input_scales[0]).to(self.dtype).repeat(copies, 1, 1, 1)
        inputs = inputs.contiguous(memory_format=torch.channels_last)
        finite = torch.ones(len(ids), dtype=torch.bool, device=self.device)
        history = History(self.table)
        for step, (row, t) in enumerate(zip(self.table.rows, self._timesteps, strict=True)):
            outputs = self._network(inputs, t, labels)
            cond, uncond = (outputs, None) if copies == 1 else outputs.chunk(2)
            # Looked at here and not only in the last sample: the clamp of the clean image turns inf into 1. A sum of
            # one image is finite if its values are, in float32 and at any size that a network returns in practice.
            sums = (cond if uncond is None else cond + uncond).flatten(1).sum(1, dtype=torch.float32)
            finite &= sums.isfinite()
            if watch and not bool(finite.all()):
                raise _NonFinite(step)
            into = SolverOutput(
                sample=torch.empty_like(x) if history.reads(step, "sample") else x,
                kept=None if row.keep is None else torch.empty_like(x),
                input=None if step + 1 == len(self.table) else inputs,
            )
            solver_step(
                x, cond, row, uncond_output=uncond, guidance_scale=self.guidance_scale or 1.0,
                history=history.read(step), ids=ids, seed=self.seed, stream=1 + step, copies=copies, out=into,
            )  # fmt: skip
            history.write(step, x, into.kept)
            x = into.sample
        return x, finite & x.flatten(1).sum(1).isfinite()

    def _network(self, x: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        out = self.unet(x, t, class_labels=labels if self._takes_labels else None)
        out = getattr(out, "sample", out)
        if out.shape != x.shape:
            fail("Sampler", "unet", f"return {list(x.shape)}, the shape of its input", list(out.shape))
        if out.untyped_storage().data_ptr() == x.untyped_storage().data_ptr():
            return out.clone()  # its input is overwritten by the next one while this is read
        return out

    def _images(self, ids: Tensor, labels: Tensor) -> Tensor:
        x, finite = self._trajectory(ids, labels)
        if not bool(finite.all()):
            self._explain(ids, labels, ~finite)
        if self.crop is not None:
            x = x[:, :, : self.crop[0], : self.crop[1]]
        return pack_uint8(x)

    def _explain(self, ids: Tensor, labels: Tensor, bad: Tensor) -> None:
        """Run the failed batch once more, looking at each step, to name the first one that failed."""
        where = f"ids in [{int(ids[bad].min())}, {int(ids[bad].max())}]"
        step: int | str = "the last"
        try:
            self._trajectory(ids, labels, watch=True)
        except _NonFinite as found:
            step = found.step
        raise UserError(f"Sampler: unet must return finite values, got NaN or inf for {where}, first at step {step}")

    def _check(self, ids: Tensor, labels: Tensor) -> None:
        for name, value in (("ids", ids), ("labels", labels)):
            if value.ndim != 1 or value.dtype != torch.int64:
                fail("Sampler", name, "be int64 [B]", f"{value.dtype} {list(value.shape)}")
        if len(ids) != len(labels):
            fail("Sampler", "labels", f"have one entry for each of the {len(ids)} ids", len(labels))
        if len(ids) == 0:
            return
        self._check_ids(ids)
        if labels.min() < 0 or (self._embeddings and labels.max() >= self._embeddings):
            high = self._embeddings or "2^63"
            fail("Sampler", "labels", f"lie in [0, {high})", f"[{int(labels.min())}, {int(labels.max())}]")

    @staticmethod
    def _check_ids(ids: Tensor) -> None:
        if len(ids) and ids.min() < 0:
            fail("Sampler", "ids", "be >= 0", int(ids.min()))
        if len(ids.unique()) != len(ids):
            fail("Sampler", "ids", "not repeat", f"{len(ids) - len(ids.unique())} repeated")


class _NonFinite(Exception):
    def __init__(self, step: int):
        self.step = step


def weights_digest(network: Any) -> str:
    """SHA-256 of a module's parameters and buffers with their names; of another callable, its qualified name."""
    if not isinstance(network, torch.nn.Module):
        return f"{type(network).__module__}.{getattr(network, '__qualname__', type(network).__qualname__)}"
    digest = hashlib.sha256()
    for name, value in network.state_dict().items():
        digest.update(f"{name} {value.dtype} {list(value.shape)}\n".encode())
        digest.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def _image_shape(unet: Any) -> tuple[int, int, int]:
    config = getattr(unet, "config", None)
    if config is None or getattr(config, "sample_size", None) is None:
        fail("Sampler", "image_shape", "be given for a network without config.sample_size", None)
    size = config.sample_size
    height, width = (size, size) if isinstance(size, int) else size
    return config.in_channels, height, width
