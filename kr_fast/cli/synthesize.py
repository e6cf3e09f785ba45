"""``kr-fast synthesize``: a labelled data set from a trained generator."""

import argparse
import dataclasses
from pathlib import Path
from typing import Any

from kr_fast.cli import options
from kr_fast.runtime.errors import UserError, fail
from kr_fast.runtime.options import LARGEST, check, option


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
    checkpoint: int = option(0, "step of the run's checkpoint; 0 for the chosen one", least=0)
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
    allow_download: bool = option(False, "take a model that is not a folder from the Hugging Face hub")

    def __post_init__(self):
        check(self, "synthesize")
        if self.first_id + self.count > LARGEST:
            fail("synthesize", "first_id", f"be at most {LARGEST} less count, {self.count}", self.first_id)


def add(subparsers: argparse._SubParsersAction) -> None:
    """Register the subcommand."""
    parser = subparsers.add_parser(
        "synthesize",
        help="write a labelled data set from a generator, on any number of processes",
        description="Write a labelled data set. The same command continues one that was stopped; several processes "
        "(accelerate launch -m kr_fast synthesize ...) share the work.",
    )
    options.add_flags(parser, SynthesizeConfig)
    parser.set_defaults(run=run, needs_arguments=True)


def run(arguments: argparse.Namespace) -> int:
    """Load the model, write the data set, print what was done."""
    import yaml

    from kr_fast.runtime import state
    from kr_fast.runtime.storage import files
    from kr_fast.synthesis import synthesize

    flags = options.given(arguments, SynthesizeConfig)
    file = options.read_yaml(arguments.config, "synthesize")
    config = options.build(SynthesizeConfig, file, flags, where="synthesize")
    sampler, plan, used = prepare(config)
    count = config.count or plan.count
    if count is None:
        fail("synthesize", "count", "be above 0 for labels without an end", config.count)
    done = synthesize(
        sampler,
        plan,
        config.out,
        ids=range(config.first_id, config.first_id + count),
        format=config.format,
        shard_size=config.shard_size,
        verify=config.verify,
    )
    if state.current().is_main:
        files.write_text(done.out / "config.yaml", yaml.safe_dump(used | {"count": count}, sort_keys=False))
        rate = f", {done.written} here at {done.written / done.seconds:.0f} images/s" if done.written else ""
        print(f"{done.out}: {done.images} images in {done.shards} shards{rate}")
    return 0


def prepare(config: SynthesizeConfig) -> tuple[Any, Any, dict[str, Any]]:
    """The sampler, the label plan, and the configuration with every choice that was left to the model."""
    import torch

    from kr_fast.recycling import trained_generator
    from kr_fast.runtime import state
    from kr_fast.synthesis import LabelPlan, Sampler
    from kr_fast.synthesis.loading import Model, load_model, make_scheduler

    device, dtype = state.current().device, getattr(torch, config.dtype)
    sampling: dict[str, Any] = {"num_inference_steps": 20, "guidance_scale": 1.0, "noise_scale": 1.0}
    crop = counts = None
    used = dataclasses.asdict(config)
    if config.model and trained_generator.is_run(Path(config.model)):
        found = trained_generator.open_generator(Path(config.model), device, config.checkpoint)
        scheduler = make_scheduler(config.scheduler, found.scheduler, config.model)
        model = Model(found.network if dtype == torch.float32 else found.network.to(dtype), scheduler)
        sampling, crop, used["checkpoint"] = found.sampling, found.crop, found.step
        counts = list(found.class_counts)
        labels = config.labels or ("balanced" if found.label_plan == "balanced" else "train")
    else:
        model = load_model(
            config.model,
            scheduler=config.scheduler,
            device=device,
            dtype=dtype,
            allow_download=config.allow_download,
        )
        labels = config.labels or "balanced"
    sampling = {name: getattr(config, name) or value for name, value in sampling.items()}
    guided = sampling["guidance_scale"] != 1
    if counts and config.num_classes not in (0, len(counts)):
        fail("synthesize", "num_classes", f"be {len(counts)}, as the run says, or 0", config.num_classes)
    classes = len(counts) if counts else model.classes(config.num_classes, guided)
    used |= sampling | {"labels": labels, "scheduler": type(model.scheduler).__name__, "num_classes": classes}
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
    plan = LabelPlan.counts(counts) if labels == "train" and counts else _plan(labels, classes)
    if plan.num_classes > classes:
        fail("synthesize", "labels", f"be below the model's {classes} classes", plan.num_classes - 1)
    return sampler, plan, used


def _plan(labels: str, classes: int) -> Any:
    """The label plan of ``--labels``."""
    from kr_fast.runtime.array_files import read_npy
    from kr_fast.runtime.inputs import as_labels
    from kr_fast.synthesis import LabelPlan

    if labels == "balanced":
        return LabelPlan.balanced(classes)
    kind, _, rest = labels.partition(":")
    if kind == "counts":
        try:
            return LabelPlan.counts([int(each) for each in rest.split(",")])
        except ValueError as error:
            if isinstance(error, UserError):
                raise
            raise UserError(f"synthesize: labels must be counts:N,N,..., got {labels}") from error
    if not labels.endswith(".npy"):
        fail("synthesize", "labels", "be balanced, counts:N,N,... or an .npy file", labels)
    return LabelPlan.explicit(as_labels("synthesize", "labels", read_npy(labels, "synthesize", "labels")))
