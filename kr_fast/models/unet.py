"""diffusers' class-conditional ``UNet2DModel`` in the sizes of this package."""

from collections.abc import Sequence
from typing import Any

# Attention at 16 px and below; above it costs more time than it gains quality.
ATTENTION_UP_TO = 16


def padded_size(side: int, levels: int) -> int:
    """The side rounded up to what ``levels`` resolutions can halve."""
    factor = 1 << (levels - 1)
    return -(-side // factor) * factor


def most_levels(height: int, width: int) -> int:
    """How many resolutions a UNet for images of ``height`` x ``width`` can have.

    Padding by reflection must stay below each side.
    """
    levels = 1
    while all(padded_size(side, levels + 1) - side < side for side in (height, width)):
        levels += 1
    return levels


def unet(
    height: int,
    width: int,
    channels: int,
    num_classes: int,
    *,
    widths: Sequence[int],
    layers: int = 1,
    dropout: float = 0.0,
) -> Any:
    """A ``UNet2DModel`` of ``len(widths)`` resolutions for images padded to :func:`padded_size`.

    It has ``num_classes + 1`` class embeddings; the last is the null class of classifier-free guidance.

    Args:
        height, width, channels: of the images.
        num_classes: of the images, without the null class.
        widths: channels at each resolution.
        layers: residual blocks at each resolution.
        dropout: of what the second convolution of a residual block reads.
    """
    from diffusers import UNet2DModel

    size = (padded_size(height, len(widths)), padded_size(width, len(widths)))
    # A single resolution has no down-sampling; each further one halves the side.
    attends = [max(size) >> level <= ATTENTION_UP_TO and level > 0 for level in range(len(widths))]
    # The middle attends too, at the last width. diffusers makes no head where there are fewer channels than a head has.
    narrowest = min([widths[-1], *(width for width, attend in zip(widths, attends, strict=True) if attend)])
    return UNet2DModel(
        sample_size=size,
        in_channels=channels,
        out_channels=channels,
        layers_per_block=layers,
        dropout=dropout,
        block_out_channels=tuple(widths),
        down_block_types=tuple("AttnDownBlock2D" if a else "DownBlock2D" for a in attends),
        up_block_types=tuple("AttnUpBlock2D" if a else "UpBlock2D" for a in reversed(attends)),
        num_class_embeds=num_classes + 1,
        norm_num_groups=next(g for g in (8, 4, 2, 1) if all(w % g == 0 for w in widths)),
        attention_head_dim=min(16 if widths[-1] % 16 == 0 else 8, narrowest),
    )
