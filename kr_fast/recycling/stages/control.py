"""The positive control of the audit: a model of the Teacher's architecture that has memorised the members.

On a CPU it trains beside the shadow Students, as one model does not fill two cores; elsewhere in the audit.
"""

import torch
from torch import nn

from kr_fast.membership import overfitted
from kr_fast.recycling.context import Context
from kr_fast.recycling.stages import shadows, teacher
from kr_fast.runtime import seeds


def train(context: Context, device: torch.device, description: str | None = None) -> nn.Module:
    """Train the control and save it, or load it if that was done."""
    c = context.config
    images, labels, members = shadows.pool(context)
    return overfitted(
        context.make_network(c.teacher_arch, c.teacher_width),
        images,
        labels,
        members,
        like=teacher.recipe(context),
        seed=seeds.derive(c.seed, "control"),
        device=device,
        path=context.folder.control,
        precision=context.precision.classifiers,
        description=description,
    )
