"""The class-conditional sampler: a trained network, a scheduler and image ids in, uint8 images out."""

import contextlib
import dataclasses
import hashlib
import math
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from kr_fast import __version__
from kr_fast.ops.pack_uint8 import pack_uint8
from kr_fast.runtime.errors import UserError, fail
from kr_fast.runtime.log import logger
from kr_fast.runtime.reprs import ShortRepr
from kr_fast.synthesis.graphed import GraphTrajectory
from kr_fast.synthesis.labels import LabelPlan
from kr_fast.synthesis.networks import adapt, weights_digest
from kr_fast.synthesis.probe import NotLinearError, Runner
from kr_fast.synthesis.steptable import StepTable
from kr_fast.synthesis.trajectory import NonFiniteError, OwnTrajectory, Settings, TableTrajectory

QUALITIES = ("exact", "fused", "fast")


@dataclasses.dataclass(frozen=True, repr=False)
class Batch(ShortRepr):
    """``ids``, ``labels``: int64 ``[B]``; ``images``: uint8 ``[B, H, W, C]``."""

    ids: Tensor
    labels: Tensor
    images: Tensor


class Sampler:
    """Images as a function of (network, scheduler, seed, id, label) and of nothing else.

    Every batch runs at the same size, ``micro_batch``, its tail filled with copies, so an image does not depend on its
    neighbours, their order or their number: same micro-batch, versions and device type -> same bytes for every id.
    On a GPU a step is captured once as a CUDA graph and replayed; the host looks at nothing before the last one.

    Args:
        unet: a network called as ``unet(x, timestep, class_labels=labels)`` (diffusers' ``UNet2DModel``, or any
            callable with its signature), diffusers' ``DiTTransformer2DModel``, or a
            :class:`kr_fast.synthesis.Network`, such as ``PromptNetwork`` for networks that read text.
        scheduler: a diffusers scheduler, compiled by :class:`StepTable`. One that is not linear runs by its own
            ``step()``, which one line of the log says.
        num_inference_steps: solver steps.
        seed: of all noise, in [0, 2^63).
        guidance_scale: classifier-free guidance ``u + g (c - u)``; None or 1 for none. The null class is the last of
            the network's class embeddings (Ho and Salimans, 2022, eq. 6).
        guidance_interval: (first, last) share of the steps in which guidance applies; the others cost half
            (Kynkäänniemi et al., "Applying Guidance in a Limited Interval", 2024).
        noise_scale: standard deviation of the initial noise; above 1 it is the Expansion Trick, for more diversity
            (Lampis, Lomurno and Matteucci, "Bridging the Gap", BMVC 2023).
        micro_batch: images in one network call (twice as many with guidance).
        image_shape: (channels, height, width) of the network's output; from ``unet.config`` by default.
        crop: (height, width) cut from the top left of the output, for networks trained on padded images.
        eta: DDIM's or TCD's share of noise; None for the scheduler's default.
        vae: diffusers' ``AutoencoderKL`` that turns the last sample, divided by its ``scaling_factor``, into images.
        quality: ``"exact"``: the scheduler's own ``step()`` on the network as it is: the bits of the same loop written
            with diffusers, with this noise. ``"fused"``: the step table; float32 solver, at least 60 dB PSNR against
            ``"exact"`` for the same network. ``"fast"``: as ``"fused"`` with the network under bfloat16 autocast; no
            bound is promised.
    """

    def __init__(
        self,
        unet: Any,
        scheduler: Any,
        num_inference_steps: int,
        *,
        seed: int,
        guidance_scale: float | None = None,
        guidance_interval: tuple[float, float] = (0.0, 1.0),
        noise_scale: float = 1.0,
        micro_batch: int = 256,
        image_shape: tuple[int, int, int] | None = None,
        crop: tuple[int, int] | None = None,
        eta: float | None = None,
        vae: Any = None,
        quality: str = "fused",
    ):
        if micro_batch < 1:
            fail("Sampler", "micro_batch", "be at least 1", micro_batch)
        if not 0 < noise_scale < math.inf:
            fail("Sampler", "noise_scale", "be above 0 and finite", noise_scale)
        if guidance_scale is not None and not math.isfinite(guidance_scale):
            fail("Sampler", "guidance_scale", "be finite or None", guidance_scale)
        if not 0 <= guidance_interval[0] < guidance_interval[1] <= 1:
            fail("Sampler", "guidance_interval", "be two rising numbers in [0, 1]", guidance_interval)
        if not 0 <= seed < 2**63:
            fail("Sampler", "seed", "be in [0, 2^63)", seed)
        if quality not in QUALITIES:
            fail("Sampler", "quality", f"be one of {', '.join(QUALITIES)}", quality)
        self.unet, self.vae, self.quality = unet, vae, quality
        self.network = adapt(unet)
        self.seed, self.noise_scale, self.micro_batch, self.crop = seed, float(noise_scale), micro_batch, crop
        self.guidance_scale = None if guidance_scale in (None, 1, 1.0) else float(guidance_scale)
        self.guidance_interval = (float(guidance_interval[0]), float(guidance_interval[1]))
        if self.guidance_scale is not None and not self.network.embeddings:
            rule = "have class embeddings (the last is the null class) for guidance"
            fail("Sampler", "unet", rule, self.network.embeddings)
        self.image_shape = image_shape or self.network.shape
        if self.image_shape is None:
            fail("Sampler", "image_shape", "be given for a network without config.sample_size", None)
        self.device, self.dtype = self.network.device, self.network.dtype
        self._runner = Runner(scheduler, num_inference_steps, eta)
        self.table = self._compile(scheduler, num_inference_steps, eta)
        settings = Settings(
            tuple(self.image_shape), seed, self.noise_scale, self.guidance_scale, self.guidance_interval
        )
        if self.table is None:
            self._trajectory = OwnTrajectory(self.network, settings, self._runner)
        elif self.device.type == "cuda":
            self._trajectory = GraphTrajectory(self.network, settings, self.table, micro_batch)
        else:
            self._trajectory = TableTrajectory(self.network, settings, self.table)
        self.output_shape = self._output_shape()

    def _compile(self, scheduler: Any, steps: int, eta: float | None) -> StepTable | None:
        if self.quality == "exact":
            return None
        try:
            return StepTable.compile(scheduler, steps, eta=eta)
        except NotLinearError as error:
            logger.warning("Sampler: the scheduler runs by its own slower step(): %s", error)
            return None

    def _output_shape(self) -> tuple[int, int, int]:
        """(channels, height, width) of the images."""
        channels, height, width = self.image_shape
        if self.vae is not None:
            factor = 2 ** (len(self.vae.config.block_out_channels) - 1)
            channels, height, width = self.vae.config.out_channels, height * factor, width * factor
        if self.crop is not None:
            if not all(0 < c <= s for c, s in zip(self.crop, (height, width), strict=True)):
                fail("Sampler", "crop", f"lie inside the {(height, width)} image", self.crop)
            height, width = self.crop
        return channels, height, width

    def __call__(self, ids: Tensor, labels: Tensor) -> Tensor:
        """The images of ``ids`` with ``labels``: int64 ``[B]`` each -> uint8 ``[B, H, W, C]`` on the sampler's device.

        Raises: UserError for negative or repeated ids, a label outside the network's classes, an output of another
            shape, or non-finite output (naming the step and the ids).
        """
        self._check(ids, labels)
        if len(ids) == 0:
            channels, height, width = self.output_shape
            return torch.empty(0, height, width, channels, dtype=torch.uint8, device=self.device)
        # Joined outside inference mode, so that the caller gets a tensor like any other.
        return torch.cat(self._parts(ids.to(self.device), labels.to(self.device)))

    @torch.inference_mode()
    def _parts(self, ids: Tensor, labels: Tensor) -> list[Tensor]:
        with contextlib.ExitStack() as stack:
            for module in (self.network.model, self.vae):
                if isinstance(module, nn.Module) and module.training:
                    stack.callback(module.train)
                    module.eval()
            if self.quality == "fast":
                # Without its cache of weights, which a captured graph could not read again.
                stack.enter_context(torch.autocast(self.device.type, torch.bfloat16, cache_enabled=False))
            parts = []
            for start in range(0, len(ids), self.micro_batch):
                count = min(self.micro_batch, len(ids) - start)
                fill = torch.arange(start, start + self.micro_batch, device=self.device).clamp_(max=len(ids) - 1)
                parts.append(self._images(ids[fill], labels[fill])[:count])
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
        scheduler = self._runner.scheduler
        own = hashlib.sha256(repr((sorted(scheduler.config.items()), self._runner.arguments)).encode()).hexdigest()
        return {
            "scheduler": type(scheduler).__name__,
            "steps": self._runner.steps,
            "step_table": own if self.table is None else self.table.digest(),
            "network": self.network.digest(),
            "vae": None if self.vae is None else weights_digest(self.vae),
            "optimized": self.network.optimized,
            "quality": self.quality,
            "seed": self.seed,
            "guidance_scale": self.guidance_scale,
            "guidance_interval": list(self.guidance_interval),
            "noise_scale": self.noise_scale,
            "micro_batch": self.micro_batch,
            "image_shape": list(self.image_shape),
            "crop": None if self.crop is None else list(self.crop),
            "dtype": str(self.dtype).removeprefix("torch."),
            "device": self.device.type,
            "torch": torch.__version__,
            "kr_fast": __version__,
        }

    def _images(self, ids: Tensor, labels: Tensor) -> Tensor:
        x, finite = self._trajectory(ids, labels)
        if not bool(finite.all()):
            self._explain(ids, labels, ~finite)
        if self.vae is not None:
            x = self.vae.decode((x / self.vae.config.scaling_factor).to(self.vae.dtype)).sample.float()
        if self.crop is not None:
            x = x[:, :, : self.crop[0], : self.crop[1]]
        return pack_uint8(x)

    def _explain(self, ids: Tensor, labels: Tensor, bad: Tensor) -> None:
        """Run the failed batch once more, looking at each step, to name the first one that failed."""
        where = f"ids in [{int(ids[bad].min())}, {int(ids[bad].max())}]"
        step: int | str = "the last"
        try:
            self._trajectory(ids, labels, watch=True)
        except NonFiniteError as found:
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
        embeddings = self.network.embeddings
        if labels.min() < 0 or (embeddings and labels.max() >= embeddings):
            high = embeddings or "2^63"
            fail("Sampler", "labels", f"lie in [0, {high})", f"[{int(labels.min())}, {int(labels.max())}]")

    @staticmethod
    def _check_ids(ids: Tensor) -> None:
        if len(ids) and ids.min() < 0:
            fail("Sampler", "ids", "be >= 0", int(ids.min()))
        if len(ids.unique()) != len(ids):
            fail("Sampler", "ids", "not repeat", f"{len(ids) - len(ids.unique())} repeated")
