"""The class-conditional sampler: a trained network, a scheduler and image ids in, uint8 images out."""

import contextlib
import dataclasses
import hashlib
import math
import numbers
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from kr_fast.backends import codes
from kr_fast.ops.sampling.pack_uint8 import pack_uint8
from kr_fast.runtime.errors import UserError, fail
from kr_fast.runtime.inputs import as_integer, as_labels
from kr_fast.runtime.log import logger
from kr_fast.runtime.memory import free_memory
from kr_fast.runtime.reprs import ShortRepr
from kr_fast.runtime.version import __version__
from kr_fast.synthesis.graphed import GraphTrajectory
from kr_fast.synthesis.labels import LabelPlan
from kr_fast.synthesis.latents import Decoder
from kr_fast.synthesis.networks import Network, adapt, check_size, weights_digest
from kr_fast.synthesis.probe import MOST_STEPS, NotLinearError, Runner
from kr_fast.synthesis.steptable import StepTable
from kr_fast.synthesis.trajectory import NonFiniteError, OwnTrajectory, Settings, TableTrajectory, check_interval

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
    neighbours, their order or their number: same micro-batch, versions and device type -> same bytes for every id. (On
    a CPU what torch's own kernels compute, of a network that is not optimized, may round otherwise by another number of
    threads.)
    On a GPU a step is captured once as a CUDA graph and replayed; the host looks at nothing before the last one.

    Args:
        unet: a network called as ``unet(x, timestep, class_labels=labels)`` (diffusers' ``UNet2DModel``, or any
            callable with its signature), diffusers' ``DiTTransformer2DModel``, or a
            :class:`kr_fast.synthesis.Network`, such as ``PromptNetwork`` for networks that read text.
        scheduler: a diffusers scheduler, compiled by :class:`StepTable`. One that is not linear runs by its own
            ``step()``, which one line of the log says.
        num_inference_steps: solver steps.
        seed: of all noise, in [0, 2^63).
        guidance_scale: classifier-free guidance ``u + g (c - u)`` (Ho and Salimans, 2022, eq. 6); None or 1 for none.
        num_classes: classes that the network was trained on; labels lie below. Guidance needs it for a ``UNet2DModel``
            or a callable, whose null class is the label ``num_classes``, the last of its class embeddings: a network
            with ten of them may have ten classes and no null class. None for a DiT, a ``PromptNetwork``, which say it.
        guidance_interval: (first, last) share of the steps in which guidance applies, step k of n at k / n; the others
            cost half (Kynkäänniemi et al., "Applying Guidance in a Limited Interval", 2024).
        noise_scale: standard deviation of the initial noise; above 1 it is the Expansion Trick, for more diversity
            (Lampis, Lomurno and Matteucci, "Bridging the Gap", BMVC 2023).
        micro_batch: images in one network call (twice as many with guidance).
        image_shape: (channels, height, width) of the network's output; from ``unet.config`` by default.
        crop: (height, width) cut from the top left of the output, for networks trained on padded images.
        eta: DDIM's or TCD's share of noise; None for the scheduler's default.
        vae: diffusers' ``AutoencoderKL`` that turns the last sample into images, see :class:`.latents.Decoder`.
        quality: ``"exact"``: the scheduler's own ``step()`` on the network as it is: the bits of the same loop written
            with diffusers, with this noise. ``"fused"``: the step table; float32 solver, at least 60 dB PSNR against
            ``"exact"`` for the same network. ``"fast"``: as ``"fused"`` with the network under bfloat16 autocast; no
            bound is promised.
    Raises: UserError naming the argument, and for a scheduler whose step cannot be used.
    """

    def __init__(
        self,
        unet: Any,
        scheduler: Any,
        num_inference_steps: int,
        *,
        seed: int,
        guidance_scale: float | None = None,
        num_classes: int | None = None,
        guidance_interval: tuple[float, float] = (0.0, 1.0),
        noise_scale: float = 1.0,
        micro_batch: int = 256,
        image_shape: tuple[int, int, int] | None = None,
        crop: tuple[int, int] | None = None,
        eta: float | None = None,
        vae: Any = None,
        quality: str = "fused",
    ):
        micro_batch = as_integer("Sampler", "micro_batch", micro_batch, 1)
        seed = as_integer("Sampler", "seed", seed, 0, 2**63 - 1)
        steps = as_integer("Sampler", "num_inference_steps", num_inference_steps, 1, MOST_STEPS)
        if not _real(noise_scale) or not 0 < noise_scale < math.inf:
            fail("Sampler", "noise_scale", "be above 0 and finite", noise_scale)
        if guidance_scale is not None and not (_real(guidance_scale) and math.isfinite(guidance_scale)):
            fail("Sampler", "guidance_scale", "be finite or None", guidance_scale)
        pair = isinstance(guidance_interval, Sequence) and len(guidance_interval) == 2
        if not (pair and all(map(_real, guidance_interval)) and 0 <= guidance_interval[0] < guidance_interval[1] <= 1):
            fail("Sampler", "guidance_interval", "be two rising numbers in [0, 1]", guidance_interval)
        if quality not in QUALITIES:
            fail("Sampler", "quality", f"be one of {', '.join(QUALITIES)}", quality)
        self.unet, self.vae, self.quality = unet, vae, quality
        self.network = adapt(unet)
        self.seed, self.noise_scale, self.micro_batch = seed, float(noise_scale), micro_batch
        self.crop = None if crop is None else _sizes("crop", crop, 2)
        self.guidance_scale = None if guidance_scale in (None, 1, 1.0) else float(guidance_scale)
        self.guidance_interval = (float(guidance_interval[0]), float(guidance_interval[1]))
        self.num_classes = num_classes if num_classes is None else as_integer("Sampler", "num_classes", num_classes, 1)
        self.null_class = self._null_class()
        shape = image_shape or self.network.shape
        if shape is None:
            fail("Sampler", "image_shape", "be given for a network without config.sample_size", None)
        self.image_shape = _sizes("image_shape", shape, 3)
        check_size(unet, *self.image_shape[1:])
        self.device, self.dtype = self.network.device, self.network.dtype
        self._decoder = None if vae is None else Decoder(vae, self.image_shape[0])
        self.output_shape = self._output_shape()
        self._runner = Runner(scheduler, steps, eta)
        self.table = self._compile(scheduler, steps, eta)
        if self.guidance_scale is not None:
            calls = len(self._runner.fresh().timesteps if self.table is None else self.table)
            check_interval("Sampler", "guidance_interval", self.guidance_interval, calls)
        settings = Settings(
            self.image_shape, seed, self.noise_scale, self.guidance_scale, self.guidance_interval, self.null_class
        )
        if self.table is not None and self.dtype not in codes.DTYPES:  # as solver steps read and write them
            rule = "be float32, bfloat16 or float16 (of others quality exact takes those that it runs in)"
            fail("Sampler", "unet", rule, str(self.dtype).removeprefix("torch."))
        if self.table is None:
            self.trajectory = OwnTrajectory(self.network, settings, self._runner)
        elif self.device.type == "cuda":  # needs a GPU
            self.trajectory = GraphTrajectory(self.network, settings, self.table, micro_batch)
        else:
            self.trajectory = TableTrajectory(self.network, settings, self.table)

    def _null_class(self) -> int | None:
        """The label of guidance's unconditional half; None without guidance."""
        classes, stated = self.network.embeddings, self.num_classes
        if classes and stated is not None and stated > classes:
            fail("Sampler", "num_classes", f"be at most the network's {classes} class embeddings", stated)
        if self.guidance_scale is None:
            return None
        says_so = type(self.network) is not Network
        callable_alone = not says_so and getattr(self.unet, "config", None) is None
        if not classes and not (callable_alone and stated):
            rule = "have class embeddings (the last is the null class) for guidance"
            fail("Sampler", "unet", rule, "none (for a callable num_classes says it)" if callable_alone else classes)
        null = classes - 1 if classes else stated
        if classes and stated == classes:
            rule = f"have a null class beside its {stated} classes for guidance"
            fail("Sampler", "unet", rule, f"{classes} class embeddings")
        last = f"the last of the network's {classes} class embeddings"
        if stated is None and not says_so:
            fail("Sampler", "num_classes", f"be given for guidance: {null} if {last} is the null class", None)
        if stated not in (None, null):
            fail("Sampler", "num_classes", f"be {null} for guidance, whose null class is {last}", stated)
        return null

    def _compile(self, scheduler: Any, steps: int, eta: float | None) -> StepTable | None:
        if self.quality == "exact":
            self._runner.try_out()
            return None
        try:
            return StepTable.compile(scheduler, steps, eta=eta)
        except NotLinearError as error:
            self._runner.try_out()  # a scheduler that fails by itself would have the network blamed
            logger.warning("Sampler: the scheduler runs by its own slower step(): %s", error)
            return None

    def _output_shape(self) -> tuple[int, int, int]:
        """(channels, height, width) of the images."""
        channels, height, width = self.image_shape
        if self._decoder is not None:
            factor = self._decoder.factor
            channels, height, width = self._decoder.channels, height * factor, width * factor
        if self.crop is not None:
            if not all(0 < c <= s for c, s in zip(self.crop, (height, width), strict=True)):
                fail("Sampler", "crop", f"lie inside the {(height, width)} image", self.crop)
            height, width = self.crop
        return channels, height, width

    def __call__(self, ids: Tensor, labels: Tensor) -> Tensor:
        """The images of ``ids`` with ``labels``, integers ``[B]`` each: uint8 ``[B, H, W, C]`` on the sampler's device.

        Raises: UserError for negative or repeated ids, a label outside the network's classes, an error of the network
            or an output of another shape, or non-finite output (naming the step and the ids).
        """
        ids, labels = self._checked(ids, labels)
        if len(ids) == 0:
            channels, height, width = self.output_shape
            return torch.empty(0, height, width, channels, dtype=torch.uint8, device=self.device)
        # Joined outside inference mode, so that the caller gets a tensor like any other.
        return torch.cat(self._parts(ids.to(self.device), labels.to(self.device)))

    def preflight(self, ids: Tensor, labels: Tensor) -> None:
        """One call of the network (and of the autoencoder) for the first of ``ids``, before anything is written.

        Raises: UserError for what :meth:`__call__` would refuse in its first step.
        """
        ids, labels = (each[:1].to(self.device) for each in self._checked(ids, labels))
        # The sample, its successor, the network's input and output are the least that a batch takes.
        needed, free = 16 * self.micro_batch * math.prod(self.image_shape), free_memory()
        if self.device.type == "cpu" and needed > free:
            rule = f"fit the {free / 2**30:.1f} GiB of free memory, of which it takes at least {needed / 2**30:.1f}"
            fail("Sampler", "micro_batch", rule, self.micro_batch)
        with self._ready():
            trajectory = self.trajectory
            x = trajectory.start(ids, 1.0)
            guided = self.guidance_scale is not None
            inputs = x.to(self.dtype).repeat(1 + guided, 1, 1, 1).contiguous(memory_format=torch.channels_last)
            t = torch.tensor(self._runner.fresh().timesteps[0].item(), device=self.device)
            out = trajectory.outputs(inputs, t, trajectory.labels(labels), guided)
            if not all(bool(each.isfinite().all()) for each in out if each is not None):
                raise _not_finite(ids, 0)
            if self._decoder is not None:
                self._decoder(x)

    @contextlib.contextmanager
    def _ready(self) -> Iterator[None]:
        """Networks in evaluation mode, in the precision of ``quality``."""
        with contextlib.ExitStack() as stack:
            stack.enter_context(torch.inference_mode())
            for module in (self.network.model, self.vae):
                modes = {each: each.training for each in module.modules()} if isinstance(module, nn.Module) else {}
                if any(modes.values()):
                    stack.callback(_set_modes, modes)
                    module.eval()
            fast, kind = self.quality == "fast", self.device.type
            if fast or torch.is_autocast_enabled(kind):  # the caller's is no part of what images depend on
                # Without its cache of weights, which a captured graph could not read again.
                stack.enter_context(torch.autocast(kind, torch.bfloat16, enabled=fast, cache_enabled=False))
            yield

    def _parts(self, ids: Tensor, labels: Tensor) -> list[Tensor]:
        with self._ready():
            return [self._images(*batch)[:count] for *batch, count in self._batches(ids, labels)]

    def _batches(self, ids: Tensor, labels: Tensor) -> Iterator[tuple[Tensor, Tensor, int]]:
        """Batches of ``micro_batch`` images, and how many of each are no copies."""
        for start in range(0, len(ids), self.micro_batch):
            fill = torch.arange(start, start + self.micro_batch, device=self.device).clamp_(max=len(ids) - 1)
            yield ids[fill], labels[fill], min(self.micro_batch, len(ids) - start)

    def trajectories(self, ids: Tensor, labels: Tensor, *, every: int = 1) -> Tensor:
        """The samples before every ``every``-th step and after the last: float32 ``[steps / every + 1, B, C, H, W]``.

        They begin with the noise and end with the images before they are decoded, cropped and packed.

        Raises: as :meth:`__call__`; UserError for a scheduler without table, ``every`` that does not divide the steps.
        """
        if self.table is None:
            rule = "be one that compiles to a step table, and quality not exact, for trajectories"
            fail("Sampler", "scheduler", rule, type(self._runner.scheduler).__name__)
        ids, labels = self._checked(ids, labels)
        if every < 1 or len(self.table) % every:
            fail("Sampler", "every", f"divide the {len(self.table)} steps", every)
        if len(ids) == 0:
            return torch.empty(len(self.table) // every + 1, 0, *self.image_shape, device=self.device)
        advance = TableTrajectory(self.network, self.trajectory.settings, self.table)
        parts = []
        with self._ready():
            for *batch, count in self._batches(ids.to(self.device), labels.to(self.device)):
                samples: list[Tensor] = []
                keep = lambda step, x, samples=samples: step % every or samples.append(x.clone())  # noqa: E731
                last, finite = advance(*batch, visit=keep)
                if not bool(finite.all()):
                    self._explain(*batch, ~finite)
                parts.append(torch.stack([*samples, last])[:, :count])
        return torch.cat(parts, 1)  # outside inference mode: a tensor like any other

    def stream(self, plan: LabelPlan, ids: Iterable[int] | Tensor) -> Iterator[Batch]:
        """Batches of at most ``micro_batch`` images, in the order of ``ids``, labelled by ``plan``."""
        if isinstance(ids, range):
            ids = torch.arange(len(ids)) * ids.step + ids.start  # its stop may be 2^63
        elif not isinstance(ids, Tensor | np.ndarray):
            ids = list(ids) or torch.empty(0, dtype=torch.int64)
        ids = as_labels("Sampler", "ids", ids)
        _check_unique(ids)
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
            "null_class": self.null_class,
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
        x, finite = self.trajectory(ids, labels)
        if not bool(finite.all()):
            self._explain(ids, labels, ~finite)
        if self._decoder is not None:
            x = self._decoder(x)
        if self.crop is not None:
            x = x[:, :, : self.crop[0], : self.crop[1]]
        return pack_uint8(x)

    def _explain(self, ids: Tensor, labels: Tensor, bad: Tensor) -> None:
        """Run the failed batch once more, looking at each step, to name the first one that failed."""
        step: int | str = "the last"
        try:
            self.trajectory(ids, labels, watch=True)
        except NonFiniteError as error:
            step = error.step
        raise _not_finite(ids[bad], step)

    def checked_labels(self, labels: Tensor) -> Tensor:
        """Integers ``[B]`` as int64. Raises: UserError for what is no class of the network, as the null class."""
        high = self.null_class or self.num_classes or self.network.embeddings
        return as_labels("Sampler", "labels", labels, classes=high)

    def _checked(self, ids: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        ids, labels = as_labels("Sampler", "ids", ids), self.checked_labels(labels)
        if len(ids) != len(labels):
            fail("Sampler", "labels", f"have one entry for each of the {len(ids)} ids", len(labels))
        _check_unique(ids)
        return ids, labels


def _set_modes(modes: dict[nn.Module, bool]) -> None:
    """Of modules, outer ones first."""
    for module, mode in modes.items():
        if module.training != mode:
            module.train(mode)


def _check_unique(ids: Tensor) -> None:
    if len(ids.unique()) != len(ids):
        fail("Sampler", "ids", "not repeat", f"{len(ids) - len(ids.unique())} repeated")


def _not_finite(ids: Tensor, step: int | str) -> UserError:
    where = f"ids in [{int(ids.min())}, {int(ids.max())}]"
    return UserError(f"Sampler: unet must return finite values, got NaN or inf for {where}, first at step {step}")


def _real(value: Any) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def _sizes(name: str, values: Any, count: int) -> tuple[int, ...]:
    """``count`` sizes of at least 1."""
    if not isinstance(values, Sequence) or len(values) != count:
        fail("Sampler", name, f"be {count} integers", values)
    return tuple(as_integer("Sampler", name, value, 1) for value in values)
