"""``--generator``: what it names, which options apply to it, and the stage that takes the place of the training.

- a network: the folder of a run, or what ``kr-fast synthesize --model`` reads in diffusers' format
  (:mod:`kr_fast.recycling.given.network`);
- ready images: a folder ``class/image.png``, or an ``.npz`` of images and labels
  (:mod:`kr_fast.recycling.given.images`);
- a function ``pkg.mod:name`` of labels that returns images (:mod:`kr_fast.recycling.given.function`);
- several of them, each of which draws its part of a period (:mod:`kr_fast.recycling.given.several`).
"""

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from kr_fast.data import Dataset
from kr_fast.recycling import trained_generator
from kr_fast.recycling.config import RecycleConfig
from kr_fast.recycling.context import Context
from kr_fast.recycling.given.function import FunctionSource
from kr_fast.recycling.given.images import ImageSource
from kr_fast.recycling.given.interface import ASKED, DataFacts, Source
from kr_fast.recycling.given.network import NetworkSource, is_network
from kr_fast.recycling.given.several import SeveralSources
from kr_fast.recycling.search_options import WHOLE
from kr_fast.recycling.stages.generation.sampling import Sampling
from kr_fast.runtime.errors import fail
from kr_fast.runtime.storage import files

STEP = 0  # of the one checkpoint that a given generator counts as
RECORD = "given.json"
# Options that only a network which takes off noise has, and what they are without one.
OF_NETWORKS: dict[str, Any] = {
    "num_inference_steps": 1,
    "guidance_scale": 1.0,
    "guidance_interval": WHOLE,
    "noise_scale": 1.0,
    "tune_num_inference_steps": (),
    "tune_guidance_scale": (),
    "tune_guidance_interval": (),
    "tune_noise_scale": (),
}
# What no given generator has: checkpoints to choose from, an attack on its training.
OFF: dict[str, Any] = {"checkpoints": 1, "audit_generator_weights": False}


def opened(config: RecycleConfig, data: Dataset, device: torch.device) -> Source:
    """The given generator, checked against the data. Raises: UserError naming the option."""
    facts = DataFacts(data.class_names, data.image_shape, tuple(data.train.labels.unique().tolist()))
    return _opened(config.generator, facts, device, config.micro_batch)


@functools.lru_cache(maxsize=1)  # several stages open it, and reading may take long
def _opened(names: tuple[str, ...], facts: DataFacts, device: torch.device, micro_batch: int) -> Source:
    sources = tuple(_source(name, facts, device, micro_batch) for name in names)
    return sources[0] if len(sources) == 1 else SeveralSources(sources)


def _source(name: str, facts: DataFacts, device: torch.device, micro_batch: int) -> Source:
    path = Path(name).expanduser()
    if ":" in name and not path.exists():
        return FunctionSource.load(name, facts, device, micro_batch)
    if not path.exists():
        rule = "be the folder of a run or of a diffusers model, a folder or .npz of images, or pkg.mod:function"
        raise FileNotFoundError(f"run: generator must {rule}, got {name}, which is not there")
    trained_generator.refuse_seeds(path, ASKED)
    if is_network(path):
        return NetworkSource.load(path, facts, device, micro_batch)
    return ImageSource.load(path, facts, device)


def applied(config: RecycleConfig, data: Dataset, device: torch.device) -> RecycleConfig:
    """``config`` without what does not apply to the given generator: nothing is tuned that changes nothing."""
    if not config.generator:
        return config
    _opened.cache_clear()  # the files may be others than before
    source, changes = opened(config, data, device), dict(OFF)
    if source.guided is None:
        changes |= OF_NETWORKS
    elif not source.guided:
        if config.guidance_scale != 1:
            rule = "be 1 with a generator that has no null class beside those of the data"
            fail("run", "guidance_scale", rule, config.guidance_scale)
        changes |= {"tune_guidance_scale": (), "tune_guidance_interval": ()}
    return dataclasses.replace(config, **changes)


def check(context: Context) -> list[str]:
    """Draw a few images before anything is written; returns the notes. Raises: UserError as the generator fails."""
    c = context.config
    source, record = opened(c, context.data, context.runtime.device), context.folder.generators / RECORD
    if context.journal.done("generator") is not None and record.exists():
        context.journal.check("generator", "run", record.parent)
        before, now = files.read_json(record)["sha256"], source.digest()
        if before != now:
            rule = f"be the one that the run in {context.out} was started with (SHA-256 {before[:12]})"
            fail(*ASKED, rule, f"another one in {', '.join(c.generator)} ({now[:12]})")
    off = "its weights are not attacked, and no shadow Student has a generator of its own"
    notes = [f"the generator was given, {source.kind}, which the run does not train: {off}", *source.notes]
    runs = [path for path in (Path(name).expanduser() for name in c.generator) if trained_generator.is_run(path)]
    if any(trained_generator.data_of(path)["sha256"] != context.data.fingerprint for path in runs):
        notes.append(trained_generator.OTHER_DATA.format("the generator"))
    if isinstance(source, ImageSource | SeveralSources):
        notes += source.shortage(context.label_plan(), c.images)
    if source.guided is None:
        notes.append(
            "it draws its images by itself: solver, steps, guidance and noise scale are neither used nor tuned"
        )
    return notes


def run(context: Context) -> dict[str, Any]:
    """The stage ``generator``: nothing is trained, and what is given is noted by its digest."""
    source = opened(context.config, context.data, context.runtime.device)
    if context.runtime.is_main:
        record = {"kind": source.kind, "sha256": source.digest()}
        files.write_json(context.folder.generators / RECORD, record)  # which later stages are made from
    context.runtime.barrier()
    curves: dict[str, list] = {"step": [], "loss": []}
    return {"checkpoints": [STEP], "early": [], "given": source.kind, "parameters": source.parameters, "curves": curves}


def work(context: Context) -> Callable[[int], int]:
    """``run(count)``: what drawing ``count`` images takes in network calls of that many, which it returns."""
    source = opened(context.config, context.data, context.runtime.device)
    steps = 1 if source.guided is None else 2
    sampling, plan = Sampling(STEP, steps, 1.0, 1.0, 0.0), context.label_plan()

    def drawn(count: int) -> int:
        source.draw(sampling, plan, count, 0, None)(0)
        return steps * count

    return drawn
