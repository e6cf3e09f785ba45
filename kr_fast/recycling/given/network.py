"""A network that was trained elsewhere: the folder of a run, or one in diffusers' format."""

import dataclasses
import hashlib
from pathlib import Path
from typing import Any

import torch

from kr_fast.models import padded_size
from kr_fast.recycling import trained_generator
from kr_fast.recycling.drawing import Drawing, KeptSets
from kr_fast.recycling.given.interface import ASKED, DataFacts
from kr_fast.recycling.stages.generation.sampling import Sampling
from kr_fast.runtime import seeds
from kr_fast.runtime.errors import fail
from kr_fast.runtime.storage import files
from kr_fast.synthesis import LabelPlan, Sampler
from kr_fast.synthesis.loading import Model, load_model
from kr_fast.synthesis.networks import weights_digest
from kr_fast.synthesis.optimized import unets
from kr_fast.synthesis.optimized.optimize import optimize

MARKS = ("model_index.json", "config.json", "unet", "transformer")  # one of them is in a folder of diffusers
TRIED = 2  # images that are drawn before anything begins
SHORTEST = Sampling(0, num_inference_steps=2, guidance_scale=1.0, noise_scale=1.0, confidence=0.0)


def is_network(path: Path) -> bool:
    """Whether ``path`` is the folder of a run, or of a model of diffusers."""
    return path.is_dir() and (trained_generator.is_run(path) or any((path / name).exists() for name in MARKS))


@dataclasses.dataclass(frozen=True)
class NetworkSource:
    """A class-conditional network with its scheduler, optimized for inference where it can be.

    ``classes``: those of the data; ``guided``: whether it has a null class after them.
    """

    model: Model
    classes: int
    crop: tuple[int, int] | None
    micro_batch: int
    guided: bool
    kind: str = "a network"
    notes: tuple[str, ...] = ()

    @classmethod
    def load(
        cls,
        path: Path,
        facts: DataFacts,
        device: torch.device,
        micro_batch: int,
    ) -> "NetworkSource":
        """Read and check the network, and draw :data:`TRIED` images."""
        if trained_generator.is_run(path):
            generator = trained_generator.open_generator(path, device, asked=ASKED, few_step=False)
            names = trained_generator.data_of(path)["class_names"]
            if names != list(facts.class_names):  # a label would stand for another class
                fail(*ASKED, f"be a run with the classes {', '.join(facts.class_names)}", ", ".join(names))
            model, shape = Model(generator.network, generator.scheduler), generator.crop
        else:
            model = load_model(str(path), device=device, dtype=torch.float32, asked=ASKED)
            # A checkpoint of a run has it beside the network; its images were padded.
            objective = path / "objective.json"
            shape = files.read_json(objective, dict).get("image_shape") if objective.exists() else None
        classes = len(facts.class_names)
        guided = _has_null_class(model.network, classes)
        crop = _crop(model, shape, facts.image_shape)
        _optimize(model.network)
        source = cls(model, classes, crop, micro_batch, guided)
        sampler = source._sampler(SHORTEST, 0)
        channels, height, width = sampler.output_shape
        if (height, width, channels) != facts.image_shape:
            rule = f"draw images of the data's {_words(facts.image_shape)}"
            fail(*ASKED, rule, _words((height, width, channels)))
        sampler(torch.arange(TRIED), torch.tensor([0, classes - 1]))
        return source

    @property
    def parameters(self) -> int:
        """Of the network."""
        return sum(value.numel() for value in self.model.network.parameters())

    def digest(self) -> str:
        """Of weights and configurations."""
        parts = [self.model.network, *([] if self.model.vae is None else [self.model.vae])]
        scheduler = {key: value for key, value in self.model.scheduler.config.items() if not key.startswith("_")}
        named = [type(self.model.scheduler).__name__, repr(sorted(scheduler.items())), *map(weights_digest, parts)]
        return hashlib.sha256("\n".join(named).encode()).hexdigest()

    def draw(self, sampling: Sampling, plan: LabelPlan, images: int, seed: int, kept: KeptSets | None) -> Drawing:
        """As from a generator of the run."""
        return Drawing(self._sampler(sampling, seeds.derive(seed, "sampling")), plan, images, kept)

    def _sampler(self, sampling: Sampling, seed: int) -> Sampler:
        return Sampler(
            self.model.network,
            self.model.scheduler,
            sampling.num_inference_steps,
            seed=seed,
            guidance_scale=sampling.guidance_scale,
            num_classes=self.classes,
            guidance_interval=sampling.guidance_interval,
            noise_scale=sampling.noise_scale,
            micro_batch=self.micro_batch,
            crop=self.crop,
            vae=self.model.vae,
        )


def _has_null_class(network: Any, classes: int) -> bool:
    """Whether the last class embedding is that of the null class. Raises: UserError for other numbers of classes."""
    known = getattr(network.config, "num_embeds_ada_norm", None)  # of a DiT, which has a null class beside them
    embeddings = known or getattr(network.config, "num_class_embeds", None)
    if not embeddings:
        fail(*ASKED, f"be conditional on the data's {classes} classes", "a network without class embeddings")
    if embeddings != classes and (known or embeddings != classes + 1):
        also = "" if known else f", or {classes + 1} with a null class behind them"
        fail(*ASKED, f"have the data's {classes} classes{also}", embeddings)
    return bool(known) or embeddings == classes + 1


def _crop(model: Model, shape: Any, image_shape: tuple[int, int, int]) -> tuple[int, int] | None:
    """What is cut from images that were padded in training, as those of a run are; None for nothing."""
    size = getattr(model.network.config, "sample_size", None)
    sizes = (size, size) if isinstance(size, int) else size
    if shape is None or model.vae is not None or sizes is None or tuple(shape[:2]) != image_shape[:2]:
        return None
    levels = len(getattr(model.network.config, "block_out_channels", [0]))
    padded = tuple(padded_size(side, levels) for side in image_shape[:2])
    return image_shape[:2] if tuple(sizes) == padded else None


def _optimize(network: Any) -> None:
    """Optimize a network whose blocks are known; another stays as it is."""
    if type(network).__name__ != "UNet2DModel" or unets.refusal(network) is None:
        optimize(network)


def _words(shape: tuple[int, int, int]) -> str:
    height, width, channels = shape
    return f"{height} x {width} px in {channels} channel{'s' if channels > 1 else ''}"
