"""The private Teacher: DP-SGD by the Teacher's recipe. Its weights are the average over the last steps; none is chosen.

A step has as many images as ``teacher_batch_size`` on average, and there are as many steps as ``teacher_epochs`` passes
over the training images take. The learning rate is divided by a noise multiplier above 1: what the noise of all steps
adds to the weights is in proportion to both.
"""

from typing import Any

import torch
from torch import Tensor, nn

from kr_fast.data import augmented
from kr_fast.recycling.context import Context
from kr_fast.recycling.dp import ledger, spending, training
from kr_fast.recycling.stages.generation.generator import rate_factor
from kr_fast.training import SGD, PowerEMA


def train(context: Context) -> tuple[nn.Module, dict[str, Any]]:
    """(the Teacher in eval mode, its curve of losses)."""
    c, split, spent = context.config, context.data.train, spending.of(context, "teacher")
    recipe, device = c.recipe("teacher"), context.runtime.device
    network = context.seeded(c.teacher_arch, c.teacher_width, "teacher")
    groups = [
        {"params": [p for p in network.parameters() if p.ndim > 1], "weight_decay": recipe.weight_decay},
        {"params": [p for p in network.parameters() if p.ndim <= 1], "weight_decay": 0.0},
    ]
    optimizer = SGD(groups, lr=recipe.learning_rate, momentum=0.9, nesterov=True)
    images, labels = split.images.to(device), split.labels.to(device)
    size = tuple(images.shape[1:3])

    def losses(indices: Tensor, random: torch.Generator) -> Tensor:
        index = indices.to(device)
        x = augmented(images, index, recipe.augment.draw(len(index), size, random).to(device))
        options = {"label_smoothing": recipe.label_smoothing, "reduction": "none"}
        return nn.functional.cross_entropy(network(x).float(), labels[index], **options)

    average, learning_rate = PowerEMA(list(network.parameters())), recipe.learning_rate / max(spent.noise_multiplier, 1)
    book = ledger.opened(context) if context.runtime.is_main else None
    if book is not None and spending.counts_are_read(c):
        book.finish(spending.COUNTS)  # their stage is recorded: to draw others would be a choice between two
    done = training.train(
        c,
        "teacher",
        network,
        optimizer,
        losses,
        spent,
        book,
        records=len(split),
        state_path=context.folder.state / "teacher.pt",
        rate=lambda step: learning_rate * rate_factor(step, spent.steps),
        ema=average,
    )
    training.settle(average)
    return network, done["curves"]
