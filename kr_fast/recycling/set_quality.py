"""How good a set of generated images is, by the Teacher and the real images of a run: ``kr-fast synthesize``."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from kr_fast.data import Split
from kr_fast.recycling import pipeline
from kr_fast.recycling.config import RecycleConfig
from kr_fast.recycling.context import Context
from kr_fast.recycling.stages import teacher
from kr_fast.recycling.stages.distillation import quality
from kr_fast.recycling.trained_generator import is_run
from kr_fast.runtime import seeds
from kr_fast.runtime.errors import fail
from kr_fast.runtime.progress import bar
from kr_fast.runtime.storage import manifest
from kr_fast.runtime.storage.journal import Journal
from kr_fast.runtime.storage.layout import Folder
from kr_fast.synthesis import LabelPlan, Sampler

ASKED = ("synthesize", "quality_run")


@dataclasses.dataclass(frozen=True)
class SetQuality:
    """The Teacher and the data of a run, by which the images of ``sampler`` and ``plan`` are measured."""

    context: Context
    teacher_model: nn.Module
    sampler: Sampler
    plan: LabelPlan
    ids: range

    def figures(self) -> dict[str, Any]:
        """As ``synthetic`` in the run's ``metrics.json``, of at most as many images as the run has for training.

        They are drawn again, as an image is a function of its id, whatever the format of the set.
        """
        count = min(len(self.ids), len(self.context.data.train), quality.MOST)
        rng = np.random.default_rng(seeds.derive(self.context.config.seed, "quality of a set"))
        ids = torch.from_numpy(rng.choice(len(self.ids), count, replace=False, shuffle=False)).sort().values
        ids += self.ids.start
        labels, images = self.plan.labels(ids), []
        with bar(count, "quality", "image") as progress:
            for part in zip(*(each.split(self.sampler.micro_batch) for each in (ids, labels)), strict=True):
                images.append(self.sampler(*part).cpu())
                progress.update(len(part[0]))
        result = quality.compare(self.context, self.teacher_model, Split(torch.cat(images), labels.cpu()))
        return {"class_names": list(self.context.data.class_names), **result}


def opened(run: str, sampler: Sampler, plan: LabelPlan, ids: range) -> SetQuality:
    """The Teacher and the images of the run, checked against the set that is to be made.

    Raises: UserError naming the option, before anything is written.
    """
    context = _context(Path(run))
    model = teacher.load(context)
    names, shape = context.data.class_names, context.data.image_shape
    if plan.num_classes > len(names):
        fail(*ASKED, f"be a run of at least {plan.num_classes} classes, as the set", f"{run}, of {len(names)}")
    first = torch.tensor([ids.start])
    own = tuple(sampler(first, plan.labels(first)).shape[1:])
    if own != shape:
        fail(*ASKED, f"be a run of images {list(own)}, as those of the set", f"{run}, of {list(shape)}")
    if min(len(ids), len(context.data.train), len(context.data.test)) < quality.LEAST:
        sizes = f"{len(ids)}, {len(context.data.train)} and {len(context.data.test)}"
        fail(*ASKED, f"leave {quality.LEAST} images of the set, for training and for the test", sizes)
    if quality.features_of(context, model, context.data.test.images[:1]) is None:
        fail(*ASKED, "be a run whose Teacher ends in a linear layer, which reads the features", run)
    return SetQuality(context, model, sampler, plan, ids)


def _context(run: Path) -> Context:
    if not is_run(run):
        fail(*ASKED, "be the folder of a run", run)
    folder, journal = Folder(run).check(*ASKED), Journal(run)
    if journal.done("teacher") is None:
        fail(*ASKED, "be a run whose Teacher is trained", run)
    journal.check("teacher", ASKED[0], folder.teacher)
    values, options = manifest.read_config(folder.config), RecycleConfig().record()
    if values.keys() != options.keys():
        name = sorted(values.keys() ^ options.keys())[0]
        fail(*ASKED, "be a run of this version of kr-fast", f"{run}, {'with' if name in values else 'without'} {name}")
    if values["data"] == pipeline.IN_MEMORY:
        fail(*ASKED, "be a run whose images can be read again", f"{run}, of images in memory")
    values = {key: tuple(value) if isinstance(value, list) else value for key, value in values.items()}
    mapped = folder.mapped_images if folder.mapped_images.exists() else None
    return pipeline.load_context(RecycleConfig(out=str(run), **values), mapped=mapped)
