"""The class-conditional sampler: a trained network, a step table and image ids in, uint8 images out."""

import dataclasses
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from kr_fast.ops.pack_uint8 import pack_uint8
from kr_fast.ops.philox_normal import philox_normal
from kr_fast.ops.solver_step import solver_step
from kr_fast.runtime.errors import UserError, fail
from kr_fast.synthesis.labels import LabelPlan
from kr_fast.synthesis.steptable import StepTable


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
        eta: DDIM's noise share.
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
        eta: float = 0.0,
    ):
        if micro_batch < 1:
            fail("Sampler", "micro_batch", "be at least 1", micro_batch)
        if not noise_scale > 0:
            fail("Sampler", "noise_scale", "be above 0", noise_scale)
        if not 0 <= seed < 2**63:
            fail("Sampler", "seed", "be in [0, 2^63)", seed)
        self.unet = unet
        self.table = StepTable.compile(scheduler, num_inference_steps, eta=eta)
        self.seed, self.noise_scale, self.micro_batch, self.crop = seed, float(noise_scale), micro_batch, crop
        self.guidance_scale = None if guidance_scale in (None, 1, 1.0) else float(guidance_scale)
        self.image_shape = image_shape or _image_shape(unet)
        embeddings = getattr(getattr(unet, "config", None), "num_class_embeds", None)
        self._embeddings = embeddings
        if self.guidance_scale is not None and not embeddings:
            fail("Sampler", "unet", "have class embeddings (the last is the null class) for guidance", embeddings)
        first = next(iter(unet.parameters()), None) if isinstance(unet, torch.nn.Module) else None
        self.device = torch.device("cpu") if first is None else first.device
        self.dtype = torch.float32 if first is None else first.dtype

    @torch.inference_mode()
    def __call__(self, ids: Tensor, labels: Tensor) -> Tensor:
        """The images of ``ids`` with ``labels``: int64 ``[B]`` each -> uint8 ``[B, H, W, C]`` on the sampler's device.

        Raises: UserError for negative or repeated ids, a label outside the network's classes, an output of another
            shape, or non-finite output (naming the step and the ids).
        """
        self._check(ids, labels)
        ids, labels = ids.to(self.device), labels.to(self.device)
        training = getattr(self.unet, "training", False)
        if training:
            self.unet.eval()
        try:
            parts = []
            for start in range(0, len(ids), self.micro_batch):
                count = min(self.micro_batch, len(ids) - start)
                fill = torch.arange(start, start + self.micro_batch, device=self.device).clamp_(max=len(ids) - 1)
                parts.append(self._pack(self._trajectory(ids[fill], labels[fill]), ids[fill])[:count])
        finally:
            if training:
                self.unet.train()
        height, width = self.crop or self.image_shape[1:]
        empty = torch.empty(0, height, width, self.image_shape[0], dtype=torch.uint8, device=self.device)
        return torch.cat(parts) if parts else empty

    def stream(self, plan: LabelPlan, ids: Iterable[int] | Tensor) -> Iterator[Batch]:
        """Batches of at most ``micro_batch`` images, in the order of ``ids``, labelled by ``plan``."""
        if not isinstance(ids, Tensor):
            ids = torch.tensor(list(ids), dtype=torch.int64)
        for part in ids.split(self.micro_batch):
            labels = plan.labels(part)
            yield Batch(part, labels, self(part, labels))

    def _trajectory(self, ids: Tensor, labels: Tensor, watch: bool = False) -> Tensor:
        x = philox_normal(ids, self.image_shape, seed=self.seed).mul_(self.noise_scale * self.table.init_noise_sigma)
        if self.guidance_scale is not None:
            labels = torch.cat([labels, torch.full_like(labels, self._embeddings - 1)])
        table = self.table
        for step, (row, scale, t) in enumerate(zip(table.rows, table.input_scales, table.timesteps, strict=True)):
            inputs = (x if scale == 1.0 else x * scale).to(self.dtype)
            if self.guidance_scale is None:
                cond, uncond = self._network(inputs, t, labels), None
            else:
                cond, uncond = self._network(torch.cat([inputs, inputs]), t, labels).chunk(2)
            x = solver_step(
                x, cond, row, uncond_output=uncond, guidance_scale=self.guidance_scale or 1.0,
                ids=ids, seed=self.seed, stream=1 + step,
            )  # fmt: skip
            if watch and not bool(torch.isfinite(x).all()):
                raise _NonFinite(step)
        return x

    def _network(self, x: Tensor, t: float, labels: Tensor) -> Tensor:
        out = self.unet(x.contiguous(memory_format=torch.channels_last), t, class_labels=labels)
        out = getattr(out, "sample", out)
        if out.shape != x.shape:
            fail("Sampler", "unet", f"return {list(x.shape)}, the shape of its input", list(out.shape))
        return out.float()

    def _pack(self, x: Tensor, ids: Tensor) -> Tensor:
        if not bool(torch.isfinite(x).all()):
            bad = ids[~torch.isfinite(x).flatten(1).all(1)]
            self._explain(bad)
        if self.crop is not None:
            x = x[:, :, : self.crop[0], : self.crop[1]]
        return pack_uint8(x)

    def _explain(self, bad: Tensor) -> None:
        """Run the failed ids once more, looking at each step, to name the first one that failed."""
        fill = torch.arange(self.micro_batch, device=bad.device).clamp_(max=len(bad) - 1)
        step: int | str = "unknown"
        try:
            self._trajectory(bad[fill], torch.zeros_like(bad[fill]), watch=True)
        except _NonFinite as found:
            step = found.step
        ids = f"[{int(bad.min())}, {int(bad.max())}]"
        raise UserError(
            f"Sampler: unet must return finite values, got NaN or inf for ids in {ids}, first at step {step}"
        )

    def _check(self, ids: Tensor, labels: Tensor) -> None:
        for name, value in (("ids", ids), ("labels", labels)):
            if value.ndim != 1 or value.dtype != torch.int64:
                fail("Sampler", name, "be int64 [B]", f"{value.dtype} {list(value.shape)}")
        if len(ids) != len(labels):
            fail("Sampler", "labels", f"have one entry for each of the {len(ids)} ids", len(labels))
        if len(ids) == 0:
            return
        if ids.min() < 0:
            fail("Sampler", "ids", "be >= 0", int(ids.min()))
        if len(ids.unique()) != len(ids):
            fail("Sampler", "ids", "not repeat", f"{len(ids) - len(ids.unique())} repeated")
        if labels.min() < 0 or (self._embeddings and labels.max() >= self._embeddings):
            high = self._embeddings or "2^63"
            fail("Sampler", "labels", f"lie in [0, {high})", f"[{int(labels.min())}, {int(labels.max())}]")


class _NonFinite(Exception):
    def __init__(self, step: int):
        self.step = step


def _image_shape(unet: Any) -> tuple[int, int, int]:
    config = getattr(unet, "config", None)
    if config is None or getattr(config, "sample_size", None) is None:
        fail("Sampler", "image_shape", "be given for a network without config.sample_size", None)
    size = config.sample_size
    height, width = (size, size) if isinstance(size, int) else size
    return config.in_channels, height, width
