"""The job of ``kr-fast synthesize``: its options, and the sampler and the labels that they describe."""

import dataclasses
from typing import Any

import torch

from kr_fast.runtime import state
from kr_fast.runtime.array_files import read_npy
from kr_fast.runtime.errors import UserError, fail
from kr_fast.runtime.inputs import as_labels
from kr_fast.runtime.options import LARGEST, check, option
from kr_fast.synthesis.labels import LabelPlan
from kr_fast.synthesis.loading import Model, load_model, make_scheduler
from kr_fast.synthesis.sampler import Sampler


@dataclasses.dataclass(frozen=True)
class SynthesizeConfig:
    """Configuration of ``kr-fast synthesize``."""

    model: str = option("", "folder of kr-fast run, or of a diffusers pipeline, UNet2DModel or DiTTransformer2DModel")
    out: str = option("synthetic", "folder of the data set; the same command continues one that was stopped")
    count: int = option(10000, "images of the whole data set; 0 for as many as an .npy of labels has", least=0)
    first_id: int = option(0, "id of the first image", least=0)
    format: str = option("npy", "of the shards", choices=("npy", "npz", "webdataset", "parquet"))
    shard_size: int = option(16384, "ids in a shard", least=1)
    labels: str = option(
        "", "balanced, counts:N,N,... or an .npy file of integers; empty: as in the run, else balanced"
    )
    num_classes: int = option(
        0,
        "classes of a UNet2DModel; guidance needs it, for the last class embedding may be the null class or a class; "
        "0: as the run or the DiT says, else all class embeddings",
        least=0,
    )
    seed: int = option(0, "of all noise", least=0)
    checkpoint: int = option(0, "step of the run's checkpoint; 0 for its few-step one, else the chosen one", least=0)
    scheduler: str = option("", "a scheduler class of diffusers in place of the model's own")
    num_inference_steps: int = option(0, "solver steps; 0 for those that the run tuned, else 20", least=0, most=10000)
    guidance_scale: float = option(
        0.0, "classifier-free guidance, 1 is none; 0 for what the run tuned, else 1", least=0, most=100
    )
    noise_scale: float = option(0.0, "initial-noise scale sigma; 0 for what the run tuned, else 1", least=0, most=100)
    quality: str = option("fused", "of the solver and the network", choices=("exact", "fused", "fast"))
    dtype: str = option("float32", "of the network", choices=("float32", "bfloat16", "float16"))
    micro_batch: int = option(
        256, "images in one network call; part of what the images depend on", least=1, most=1_000_000
    )
    verify: bool = option(False, "check finished shards by their SHA-256 and make damaged ones again")
    quality_run: str = option(
        "",
        "folder of a run, by whose Teacher and real test images the set is measured (classes in the same order): "
        "quality.json holds FID, KID, precision, recall, density and coverage, all and by class",
    )
    allow_download: bool = option(False, "take a model that is not a folder from the Hugging Face hub")

    def __post_init__(self):
        check(self, "synthesize")
        if self.first_id + self.count > LARGEST:
            fail("synthesize", "first_id", f"be at most {LARGEST} less count, {self.count}", self.first_id)


@dataclasses.dataclass(frozen=True)
class TrainedGenerator:
    """The generator of a finished run.

    ``step``: of its checkpoint; ``crop``: height and width of the images; ``class_counts``: of the training set;
    ``label_plan``: "train" or "balanced"; ``sampling``: num_inference_steps, guidance_scale, noise_scale and
    guidance_interval; ``few_step``: it was made for this sampling and takes no other.
    """

    network: Any
    scheduler: Any
    step: int
    crop: tuple[int, int]
    class_counts: tuple[int, ...]
    label_plan: str
    sampling: dict[str, Any]
    few_step: bool = False


def prepare(
    config: SynthesizeConfig, trained: TrainedGenerator | None = None
) -> tuple[Sampler, LabelPlan, dict[str, Any]]:
    """The sampler, the label plan, and the options with every choice that was left to the model.

    Args:
        trained: the generator, where ``config.model`` is the folder of a run; otherwise the model is loaded.
    Raises: UserError naming the option.
    """
    device, dtype = state.current().device, getattr(torch, config.dtype)
    used = dataclasses.asdict(config)
    if trained is None:
        sampling: dict[str, Any] = {"num_inference_steps": 20, "guidance_scale": 1.0, "noise_scale": 1.0}
        crop, counts, labels = None, [], config.labels or "balanced"
        options = {"scheduler": config.scheduler, "allow_download": config.allow_download}
        model = load_model(config.model, device=device, dtype=dtype, **options)
    else:
        sampling, crop, counts = trained.sampling, trained.crop, list(trained.class_counts)
        labels = config.labels or ("balanced" if trained.label_plan == "balanced" else "train")
        scheduler = make_scheduler(config.scheduler, trained.scheduler, config.model)
        if trained.few_step:
            _check_few_step(config, trained)
        # The method of diffusers' models warns of the parts that stay float32, also where there are none.
        model = Model(torch.nn.Module.to(trained.network, dtype), scheduler)
        used["checkpoint"] = trained.step
    sampling = {name: getattr(config, name, None) or value for name, value in sampling.items()}
    if counts and config.num_classes not in (0, len(counts)):
        fail("synthesize", "num_classes", f"be {len(counts)}, as the run says, or 0", config.num_classes)
    classes = len(counts) or model.classes(config.num_classes, sampling["guidance_scale"] != 1)
    used |= {name: value for name, value in sampling.items() if name in used} | {
        "labels": labels,
        "scheduler": type(model.scheduler).__name__,
        "num_classes": classes,
    }
    sampler = Sampler(
        model.network,
        model.scheduler,
        seed=config.seed,
        micro_batch=config.micro_batch,
        crop=crop,
        vae=model.vae,
        quality=config.quality,
        num_classes=classes if counts or config.num_classes else None,
        **sampling,
    )
    plan = LabelPlan.counts(counts) if labels == "train" and counts else label_plan(labels, classes)
    if plan.num_classes > classes:
        fail("synthesize", "labels", f"be below the model's {classes} classes", plan.num_classes - 1)
    return sampler, plan, used


def _check_few_step(config: SynthesizeConfig, trained: TrainedGenerator) -> None:
    """Refuse another sampling than the one that the generator was made for."""
    own = {**trained.sampling, "scheduler": type(trained.scheduler).__name__}
    for name, value in own.items():
        if (given := getattr(config, name, None)) and given != value:
            rule = f"be {value} or left out for a few-step generator (with checkpoint {trained.step} it may be another)"
            fail("synthesize", name, rule, given)


def label_plan(labels: str, classes: int) -> LabelPlan:
    """The labels that the option ``labels`` describes: balanced, counts:N,N,... or an ``.npy`` file."""
    if labels == "balanced":
        return LabelPlan.balanced(classes)
    kind, _, rest = labels.partition(":")
    if kind == "counts":
        try:
            counts = [int(each) for each in rest.split(",")]
        except ValueError as error:
            raise UserError(f"synthesize: labels must be counts:N,N,..., got {labels}") from error
        return LabelPlan.counts(counts)
    if not labels.endswith(".npy"):
        fail("synthesize", "labels", "be balanced, counts:N,N,... or an .npy file", labels)
    return LabelPlan.explicit(as_labels("synthesize", "labels", read_npy(labels, "synthesize", "labels")))
