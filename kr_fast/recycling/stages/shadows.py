"""Shadow Teachers: models of the Teacher's recipe, each on a random half of training and test split together.

Halves are of whole groups (patients, sites) where the data have such.

The pool is the training split (members) and the test split (non-members). The validation split is left out: choices
were made on it, so it is neither. Shadows are shared out over the ranks.
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from kr_fast.ensemble import Shadows, load_shadows, train_shadows
from kr_fast.ensemble.training.workers import Trains, train
from kr_fast.recycling.context import Context
from kr_fast.recycling.stages import teacher
from kr_fast.runtime import seeds
from kr_fast.runtime.progress import bar
from kr_fast.runtime.storage import files
from kr_fast.runtime.storage.image_rows import ImageRows


def pool(context: Context) -> tuple[ImageRows, Tensor, Tensor]:
    """(images, labels, members) of the audit, on the CPU."""
    train, test = context.data.train, context.data.test
    images, labels = ImageRows(train.images, test.images), torch.cat([train.labels, test.labels])
    return images, labels, torch.arange(len(labels)) < len(train)


def groups(context: Context) -> Tensor | None:
    """int64 ``[N]``: the groups of the pool's images, or None where the data have none."""
    train, test = context.data.train.groups, context.data.test.groups
    return None if train is None or test is None else torch.cat([train, test])


def workers(context: Context) -> int:
    """How many models to train at a time: a small network does not gain from a second thread."""
    return torch.get_num_threads() if context.runtime.device.type == "cpu" else 1


def run(context: Context) -> dict[str, Any]:
    """Train what is missing of the shadow Teachers, on every rank."""
    c = context.config
    if c.num_shadows:
        images, labels, _ = pool(context)
        make_model = context.make_network(c.teacher_arch, c.teacher_width)
        options = {"num_models": c.num_shadows, "config": teacher.recipe(context), "workers": workers(context)}
        options |= {"seed": seeds.derive(c.seed, "shadows"), "out": context.folder.shadows, "groups": groups(context)}
        if context.runtime.device.type == "cpu":  # a GPU trains them at once, in what it is fastest in
            options["precision"] = context.precision.classifiers
        train_shadows(make_model, images, labels, **options)
    return {"models": c.num_shadows}


def keep(context: Context) -> Tensor:
    """bool ``[M, N]``: which examples of the pool each shadow Teacher was trained on."""
    return torch.from_numpy(np.load(context.folder.shadows / "keep.npy"))


def file(folder: Path, index: int) -> Path:
    """The file of model ``index`` in a folder of shadows."""
    return folder / f"model-{index:03d}.safetensors"


def missing(context: Context, folder: Path, count: int) -> list[int]:
    """Which of ``count`` models this rank has still to train: its share of them, but for those whose file is there."""
    return [index for index in context.runtime.shard(count) if not file(folder, index).exists()]


def train_missing(context: Context, job: Trains, indices: list[int], share: int, words: str) -> None:
    """Train ``indices``, on a CPU over processes of one thread each; returns on every rank when all have done so.

    Args:
        share: how many models are this rank's, those included that were there; words: of its progress bar.
    """
    at_a_time = workers(context)
    with bar(share, words if share else None, "model", share - len(indices)) as progress:
        if at_a_time > 1 and indices:
            train(job, indices, at_a_time, progress.update, "run", "context")
        else:
            for index in indices:
                job.train(index, context.runtime.device)
                progress.update()
    context.runtime.barrier()


def load_one(context: Context, folder: Path, index: int) -> nn.Module:
    """Model ``index`` of the Teacher's architecture in a folder of shadows, in eval mode, without gradients."""
    model = context.network(context.config.teacher_arch, context.config.teacher_width)
    model.load_state_dict(files.load_tensors(file(folder, index)))
    return model.to(context.runtime.device).eval().requires_grad_(False)


def load(context: Context) -> Shadows:
    """All shadow Teachers."""
    make_model = context.make_network(context.config.teacher_arch, context.config.teacher_width)
    return load_shadows(make_model, context.folder.shadows, device=context.runtime.device)
