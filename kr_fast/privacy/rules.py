"""Which layers have a rule."""

from torch import nn

from kr_fast.privacy.layers import Conv2d, Embedding, Layer, Linear
from kr_fast.privacy.norms import GroupNorm, LayerNorm

RULES: dict[type[nn.Module], type[Layer]] = {
    nn.Conv2d: Conv2d,
    nn.Linear: Linear,
    nn.Embedding: Embedding,
    nn.GroupNorm: GroupNorm,
    nn.LayerNorm: LayerNorm,
}
