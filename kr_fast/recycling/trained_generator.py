"""The generator of a finished run: the chosen checkpoint and how images are sampled from it."""

from pathlib import Path
from typing import Any

import torch

from kr_fast.recycling.stages.generation import generator
from kr_fast.recycling.stages.generation.generator_loss import make_scheduler
from kr_fast.runtime.errors import UserError, fail
from kr_fast.runtime.storage import files, manifest
from kr_fast.runtime.storage.journal import Journal
from kr_fast.runtime.storage.layout import Folder
from kr_fast.synthesis.job import TrainedGenerator

SAMPLING = ("num_inference_steps", "guidance_scale", "noise_scale", "guidance_interval")
USED = (*SAMPLING, "few_steps", "label_plan", "solver")  # a run of an earlier version may lack others
OTHER_DATA = (
    "{} is of a run on other images, or other splits of them: it may have been trained on validation and test images "
    "of this run"
)


def is_run(folder: Path) -> bool:
    """Whether ``folder`` is that of a run."""
    return Folder(folder).config.exists() and Folder(folder).journal.exists()


def refuse_seeds(folder: Path, asked: tuple[str, str]) -> None:
    """Refuse the folder of several seeds, in which each has a run; ``asked``: command and option that named it."""
    runs = sorted(each.parent.name for each in folder.glob("seed-*/journal.json"))
    if runs and not is_run(folder):
        got = f"{folder}, which holds the runs {', '.join(runs[:3])}{', ...' if runs[3:] else ''}"
        fail(*asked, "be the folder of one run", got)


def data_of(run: Path) -> dict[str, Any]:
    """What the stage ``data`` of a run recorded of the images that its generator was trained on."""
    if (data := Journal(run).done("data")) is None:
        raise UserError(f"run: generator must be a run whose journal.json records its data, got {run}")
    return data


def open_generator(
    run: Path,
    device: torch.device,
    step: int = 0,
    asked: tuple[str, str] = ("synthesize", "model"),
    few_step: bool = True,
) -> TrainedGenerator:
    """The generator of a run's folder, of checkpoint ``step``; 0 for that of few steps, the chosen or the latest one.

    Args:
        asked: command and option that the folder was given by, for errors.
        few_step: whether that of few steps may be taken, which is sampled in one way alone.
    """
    folder = Folder(run).check(*asked)
    journal, config = Journal(run), manifest.read_config(folder.config)
    for key in USED:
        if key not in config:
            raise UserError(f"{asked[0]}: {folder.config} must hold the options of a run, got no {key}")
    trained = journal.done("generator")
    if trained is not None and "given" in trained:
        fail(*asked, "be a run that trained its generator", f"{run}, whose generator was given")
    if trained is None:
        fail(*asked, "be a run whose generator is trained", run)
    steps, tuned = trained["checkpoints"], (journal.done("tuning") or {}).get("sampling", {})
    best = journal.done("checkpoints") or {"chosen": steps[-1]}
    chosen = step or best["chosen"]
    if chosen not in steps:
        fail(asked[0], "checkpoint", f"be one of {', '.join(map(str, steps))}", chosen)
    few = config["few_steps"] if few_step and not step and journal.done("few_step") is not None else 0
    length = best.get("ema_length", 0.0) if chosen == best["chosen"] else 0.0
    path = folder.few_step if few else folder.generator(chosen, length)
    journal.check("few_step" if few else "generator", asked[0], path)
    facts = files.read_json(path / "objective.json", dict)
    if "image_shape" not in facts:
        fail(*asked, "be a run of this version of kr-fast, which notes the shape of images", run)
    sampling = {name: tuned.get(name, config[name]) for name in SAMPLING}
    solver = tuned.get("solver", config["solver"])
    if few:  # guidance and noise scale are in the network
        sampling, solver = {"num_inference_steps": few, "guidance_scale": 1.0, "noise_scale": 1.0}, "euler"
    network, _, objective = generator.load(path, device)
    return TrainedGenerator(
        network,
        make_scheduler(objective, solver),
        chosen,
        crop=tuple(facts["image_shape"][:2]),
        class_counts=tuple(facts["class_counts"]),
        label_plan=config["label_plan"],
        sampling=sampling,
        few_step=bool(few),
    )
