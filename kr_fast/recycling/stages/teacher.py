"""The Teacher: a classifier trained on real images, its epoch chosen on validation. Runs on rank 0.

With epsilon there is no such choice, and every rank trains (:mod:`kr_fast.recycling.dp.training`).
"""

from typing import Any

from torch import Tensor, nn

from kr_fast.data import Split, to_float
from kr_fast.ensemble import TrainConfig, accuracy, fit, recipe_of
from kr_fast.ensemble.checkpoints import load_weights
from kr_fast.ensemble.loading import FACTORY, model_factory
from kr_fast.ensemble.networks import ask, check_saved, made, plain
from kr_fast.recycling.context import Context
from kr_fast.recycling.dp import teacher as dp_teacher
from kr_fast.recycling.stages.given_teacher import given_teacher
from kr_fast.runtime import seeds
from kr_fast.runtime.errors import fail
from kr_fast.runtime.log import logger
from kr_fast.runtime.storage import files

ASKED = 64  # images on which a given Teacher is evaluated before anything begins


def recipe(context: Context) -> TrainConfig:
    """How the Teacher, and every shadow of it, is trained."""
    return context.config.recipe("teacher")


def made_by(context: Context) -> dict[str, Any]:
    """What a Teacher that was trained here, and every shadow of it, is made by."""
    return recipe_of(context.network(context.config.teacher_arch, context.config.teacher_width), recipe(context))


def run(context: Context) -> dict[str, Any]:
    """Train (or take) the Teacher, save it, return its curves and validation accuracy."""
    c = context.config
    curves: dict[str, list] = {}
    best = None
    if c.teacher:
        model = build(context)
    elif c.epsilon:
        model, curves = dp_teacher.train(context)
    else:
        model = context.seeded(c.teacher_arch, c.teacher_width, "teacher")
        history = fit(
            model,
            context.data.train,
            recipe(context),
            seed=seeds.derive(c.seed, "teacher"),
            val=context.data.val,
            state_path=context.folder.state / "teacher.pt",
            choose=c.teacher_choose,
            precision=context.precision.classifiers,
            description="teacher",
        )
        curves = {
            "epoch": list(range(1, c.teacher_epochs + 1)),
            "train_loss": history.train_loss,
            "val_accuracy": history.val_accuracy,
            "val_loss": history.val_loss,
            **({"val_auc": history.val_auc} if history.val_auc else {}),
        }
        best = history.best_epoch + 1
    if not context.runtime.is_main:
        return {}
    val_accuracy = accuracy(model, context.data.val)
    note = chance(val_accuracy, context.data.val)
    if note and not c.teacher:  # of a given one it was logged at the start
        logger.warning("run: %s", note)
    state = plain(model).state_dict()
    files.save_tensors(context.folder.teacher, state, metadata(context, c.teacher or c.teacher_arch))
    return {
        "val_accuracy": val_accuracy,
        "best_epoch": best,
        "notes": [note] if note else [],
        "curves": curves,
        "parameters": sum(p.numel() for p in model.parameters()),
    }


def chance(val_accuracy: float, val: Split) -> str | None:
    """A note if a Teacher's accuracy on ``val`` is not clearly above that of naming the largest class."""
    share = int(val.labels.bincount().max()) / len(val)
    if val_accuracy > share + 1.64 * (share * (1 - share) / len(val)) ** 0.5:  # one-sided 5 % of the binomial, normal
        return None
    return (
        f"the Teacher is right about {val_accuracy:.3f} of {len(val)} validation images, not clearly more than one "
        f"that always names the largest class ({share:.3f})"
    )


def metadata(context: Context, name: str) -> dict[str, str]:
    """What a reader of the weights file needs to use it."""
    return {
        "architecture": name,
        "num_classes": str(context.data.num_classes),
        "in_channels": str(context.data.image_shape[2]),
        "input": "float NCHW, x / 127.5 - 1",
    }


def build(context: Context) -> nn.Module:
    """The Teacher's module, with the user's weights if given, evaluated once on some images of the data.

    Raises: UserError for any failure of the user's factory or network, with its message, and for probabilities.
    """
    c, data, device = context.config, context.data, context.runtime.device
    if not c.teacher:
        return context.network(c.teacher_arch, c.teacher_width).to(device)
    x = to_float(data.val.images[:ASKED])
    own = given_teacher(c.teacher, c.teacher_arch, c.teacher_width)
    if own.data is not None and (names := own.data["class_names"]) != list(data.class_names):
        fail("run", "teacher", f"be a run with the classes {', '.join(data.class_names)}", ", ".join(names))
    if own.factory:
        model = from_factory("run", own.factory, x, data.num_classes, data.image_shape)
    else:
        model = context.network(own.arch, own.width)
    if own.weights is not None:
        load_weights(model, own.weights, "run: teacher")
    model = model.to(device).eval()
    check_saved("run", "teacher", plain(model))
    ask("run", "teacher", model, x.to(device), data.num_classes)
    return model


def from_factory(where: str, factory: str, x: Tensor, num_classes: int, image_shape: tuple[int, int, int]) -> nn.Module:
    """The network of a user's ``pkg.mod:factory``; ``x``: images as it is asked on."""
    shape = {"num_classes": num_classes, "image_shape": image_shape}
    return made(where, "teacher", model_factory(where, "teacher", factory, **shape, sample=x), FACTORY)


def load(context: Context) -> nn.Module:
    """The finished Teacher, in eval mode, without gradients."""
    model = build(context)
    load_weights(model, context.folder.teacher, "run: teacher")
    return model.to(context.runtime.device).eval().requires_grad_(False)
