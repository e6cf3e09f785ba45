"""The private generator: DP-SGD on diffusers' ``UNet2DModel``.

The gradient of a record is that of its mean loss over ``dp_multiplicity`` noise levels, averaged before it is clipped:
that costs no privacy, and varies less. The last checkpoint is the generator; no other is made.

Source: Dockhorn et al., "Differentially Private Diffusion Models", TMLR 2023, section 3.2 (noise multiplicity).
"""

from typing import Any

import torch
from torch import Tensor

from kr_fast.models import unet
from kr_fast.ops.sampling.philox_normal import philox_normal
from kr_fast.recycling.context import Context
from kr_fast.recycling.dp import ledger, spending, training
from kr_fast.recycling.stages.generation import generator
from kr_fast.recycling.stages.generation.generator_loss import noised, padded
from kr_fast.runtime import seeds
from kr_fast.training import EMA, AdamW


def train(context: Context) -> dict[str, Any]:
    """Train the generator on every rank and save it on rank 0; returns what the stage ``generator`` does."""
    c, split, device = context.config, context.data.train, context.runtime.device
    book = ledger.opened(context) if context.runtime.is_main else None
    if book is not None:
        (context.folder.state / "teacher.pt").unlink(missing_ok=True)  # its stage is recorded
    spent, count = spending.of(context, "generator"), c.dp_multiplicity
    height, width, channels = context.data.image_shape
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seeds.derive(c.seed, "weights", "generator"))
        options = {"widths": c.generator_widths, "layers": c.generator_layers, "dropout": c.generator_dropout}
        network = unet(height, width, channels, context.data.num_classes, **options)
    network = network.to(device, memory_format=torch.channels_last)
    optimizer = AdamW(network.parameters(), lr=c.generator_learning_rate, weight_decay=1e-4)
    average = EMA(list(network.parameters()), c.generator_ema)
    images, labels = split.images.to(device), split.labels.to(device)

    def losses(indices: Tensor, random: torch.Generator) -> Tensor:
        index, rows = indices.to(device).repeat_interleave(count), len(indices) * count
        level, dropped, mirrored = torch.rand(3, rows, generator=random).to(device)
        x = padded(images[index], len(c.generator_widths), mirrored < 0.5 if c.generator_flip else None)
        y = labels[index].masked_fill(dropped < c.label_dropout, context.data.num_classes)
        seed = int(torch.randint(2**62, (), generator=random))
        noise = philox_normal(torch.arange(rows, device=device), x.shape[1:], seed=seed)
        noisy, time, target = noised(c, x, noise, level)
        prediction = network(noisy, time, class_labels=y).sample.float()
        return (prediction - target).square().mean((1, 2, 3))

    done = training.train(
        c,
        "generator",
        network,
        optimizer,
        losses,
        spent,
        book,
        records=len(split),
        state_path=context.folder.state / "generator.pt",
        multiplicity=count,
        rate=lambda step: c.generator_learning_rate * generator.rate_factor(step, c.generator_steps),
        ema=average,
    )
    if book is not None:
        generator.save(context, network, average, context.folder.generator(c.generator_steps), labels)
    parameters = sum(p.numel() for p in network.parameters())
    return {"checkpoints": [c.generator_steps], "early": [], "notes": [], "parameters": parameters, **done}
