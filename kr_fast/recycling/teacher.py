"""Stage 2, Teacher: a classifier trained on real images, its epoch chosen on validation. Runs on rank 0."""

from pathlib import Path
from typing import Any

import torch
from torch import nn

from kr_fast.data import to_float
from kr_fast.ensemble import TrainConfig, accuracy, fit
from kr_fast.ensemble.loading import factory, load_weights
from kr_fast.recycling.context import Context
from kr_fast.runtime import files, seeds
from kr_fast.runtime.errors import UserError, fail


def recipe(context: Context) -> TrainConfig:
    """How the Teacher, and every shadow of it, is trained."""
    c = context.config
    return TrainConfig(
        epochs=c.teacher_epochs,
        batch_size=c.teacher_batch_size,
        learning_rate=c.teacher_learning_rate,
        weight_decay=c.teacher_weight_decay,
        augment=context.real_augment,
    )


def run(context: Context) -> dict[str, Any]:
    """Train (or take) the Teacher, save it, return its curves and validation accuracy."""
    c = context.config
    if c.teacher:
        model = build(context)
        curves: dict[str, list] = {}
        best = None
    else:
        model = context.seeded(c.teacher_arch, c.teacher_width, "teacher")
        history = fit(
            model,
            context.data.train,
            recipe(context),
            seed=seeds.derive(c.seed, "teacher"),
            val=context.data.val,
            state_path=context.folder.state / "teacher.pt",
            description="teacher",
        )
        curves = {
            "epoch": list(range(1, c.teacher_epochs + 1)),
            "train_loss": history.train_loss,
            "val_accuracy": history.val_accuracy,
        }
        best = history.best_epoch + 1
    files.save_tensors(context.folder.teacher, model.state_dict(), metadata(context, c.teacher or c.teacher_arch))
    return {
        "val_accuracy": accuracy(model, context.data.val),
        "best_epoch": best,
        "curves": curves,
        "parameters": sum(p.numel() for p in model.parameters()),
    }


def metadata(context: Context, name: str) -> dict[str, str]:
    """What a reader of the weights file needs to use it."""
    return {
        "architecture": name,
        "num_classes": str(context.data.num_classes),
        "in_channels": str(context.data.image_shape[2]),
        "input": "float NCHW, x / 127.5 - 1",
    }


def build(context: Context) -> nn.Module:
    """The Teacher's module with the user's weights where they were given, checked against the data."""
    c = context.config
    height, width, channels = context.data.image_shape
    if not c.teacher:
        return context.network(c.teacher_arch, c.teacher_width).to(context.runtime.device)
    if ":" in c.teacher and not Path(c.teacher).exists():
        offered = {"num_classes": context.data.num_classes, "in_channels": channels}
        model = factory("run", "teacher", c.teacher, **offered)()
        if not isinstance(model, nn.Module):
            fail("run", "teacher", "name a factory that returns a torch module", f"{c.teacher} -> {type(model)}")
    else:
        path = Path(c.teacher)
        if not path.exists():
            raise FileNotFoundError(f"run: teacher must be pkg.mod:factory or a file, got {c.teacher}")
        model = context.network(c.teacher_arch, c.teacher_width)
        load_weights(model, path, "run: teacher")
    model = model.to(context.runtime.device).eval()
    rule = f"return [N, {context.data.num_classes}] logits for {height} x {width} x {channels} images"
    try:
        with torch.inference_mode():
            logits = model(to_float(context.data.val.images[:2].to(context.runtime.device)))
    except RuntimeError as error:
        raise UserError(f"run: teacher must {rule}, got the error {str(error).splitlines()[0]}") from error
    if logits.ndim != 2 or logits.shape[1] != context.data.num_classes:
        fail("run", "teacher", rule, list(logits.shape))
    return model


def load(context: Context) -> nn.Module:
    """The finished Teacher, in eval mode, without gradients."""
    model = build(context)
    model.load_state_dict(files.load_tensors(context.folder.teacher))
    return model.to(context.runtime.device).eval().requires_grad_(False)
