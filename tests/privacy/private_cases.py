"""Small networks of every layer that has a rule, and the definition of a clipped sum, in float64 record by record."""

import copy

import torch
from torch import nn

from kr_fast.models import classifier


class Tokens(nn.Module):
    """An embedding, a linear layer that is called twice, layer norms: rows of indices -> logits."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(7, 6, padding_idx=0)
        self.twice = nn.Linear(6, 6)
        self.norm = nn.LayerNorm(6)
        self.head = nn.Linear(6, 3)

    def forward(self, x):
        y = self.table(x)
        y = self.norm(y + torch.tanh(self.twice(torch.tanh(self.twice(y)))))
        return self.head(y.mean(1))


class Images(nn.Module):
    """Convolutions of other strides, groups, dilations and paddings, with and without bias."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(2, 12, 3, padding="same"),
            nn.GroupNorm(3, 12),
            nn.ReLU(inplace=True),
            nn.Conv2d(12, 16, 3, padding=1, bias=False),  # by Winograd's algorithm where there is one
            nn.SiLU(),
            nn.Conv2d(16, 8, (2, 3), stride=2, padding=(0, 1), groups=4),
            nn.GroupNorm(8, 8),
            nn.Conv2d(8, 24, 3, dilation=2, padding=2),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(24, 3),
        )

    def forward(self, x):
        return self.layers(x)


def network(name, seed=0):
    """(model, inputs of 6 rows, labels)."""
    torch.manual_seed(seed)
    labels = torch.randint(0, 3, (6,))
    if name == "tokens":
        return Tokens(), torch.randint(0, 7, (6, 5)), labels
    if name == "resnet":
        return classifier("resnet8-gn", num_classes=3, in_channels=1, width=4), torch.randn(6, 1, 9, 9), labels
    return Images(), torch.randn(6, 2, 9, 9), labels


def losses(model, x, labels):
    return nn.functional.cross_entropy(model(x), labels, reduction="none")


def gradients(model, of_record, records):
    """Float64 gradients ``[records, parameters]`` of ``of_record(twin, record)``, one record after the other."""
    twin = copy.deepcopy(model).double()
    trained = [p for p in twin.parameters() if p.requires_grad]
    rows = []
    for record in range(records):
        found = torch.autograd.grad(of_record(twin, record), trained)
        rows.append(torch.cat([each.flatten() for each in found]))
    return torch.stack(rows)


def clipped(rows, clipping, bound):
    """The sum of ``rows``, clipped."""
    norms = rows.norm(dim=1)
    factors = (bound / norms).clamp(max=1) if clipping == "flat" else bound / (norms + 0.01)
    return factors @ rows


def error(found, expected):
    """Relative, of the whole sum."""
    return float((found.double() - expected).norm() / expected.norm())
