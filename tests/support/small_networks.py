"""Networks in the styles that ModelArray must take, written from their papers, and the loop over them that a user would
write. Tests take them small, benchmarks at their own widths."""

import copy
import functools

import torch
import torch.nn.functional as F
from torch import nn

from kr_fast.data import to_float
from kr_fast.models import classifier


class BasicBlock(nn.Module):
    """torchvision's residual block: in-place ReLU, a strided 1x1 shortcut."""

    def __init__(self, inputs, outputs, stride=1):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.downsample = None
        if stride != 1 or inputs != outputs:
            self.downsample = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x):
        identity = x if self.downsample is None else self.downsample(x)
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += identity
        return self.relu(out)


class TorchvisionResNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, 16, 7, 2, 3, bias=False), nn.BatchNorm2d(16), nn.ReLU(inplace=True), nn.MaxPool2d(3, 2, 1)
        )
        self.layers = nn.Sequential(BasicBlock(16, 16), BasicBlock(16, 32, 2), BasicBlock(32, 32))
        self.avgpool, self.fc = nn.AdaptiveAvgPool2d((1, 1)), nn.Linear(32, 5)

    def forward(self, x):
        return self.fc(torch.flatten(self.avgpool(self.layers(self.stem(x))), 1))


class WideBlock(nn.Module):
    """Pre-activation: BatchNorm stands before the convolution, and where the shape changes also before the shortcut."""

    def __init__(self, inputs, outputs, stride):
        super().__init__()
        self.bn1, self.bn2 = nn.BatchNorm2d(inputs), nn.BatchNorm2d(outputs)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.shortcut = nn.Conv2d(inputs, outputs, 1, stride, bias=False) if inputs != outputs else None
        self.dropout = nn.Dropout(0.3)

    def forward(self, x):
        out = F.relu(self.bn1(x), inplace=True)
        shortcut = x if self.shortcut is None else self.shortcut(out)
        out = self.dropout(F.relu(self.bn2(self.conv1(out))))
        return torch.add(shortcut, self.conv2(out))


class WideResNet(nn.Module):
    def __init__(self, widths=(32, 64), depths=(2, 1), classes=5):
        super().__init__()
        self.conv = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        self.blocks = stages(WideBlock, 16, widths, depths)
        self.bn, self.head = nn.BatchNorm2d(widths[-1]), nn.Linear(widths[-1], classes)

    def forward(self, x):
        x = F.relu(self.bn(self.blocks(self.conv(x))))
        return self.head(F.adaptive_avg_pool2d(x, 1).view(x.size(0), -1))


def stages(block, inputs, widths, depths):
    """``depths`` blocks of ``widths``; the first of every stage but the first halves the sides."""
    blocks = []
    for stage, (width, depth) in enumerate(zip(widths, depths, strict=True)):
        for index in range(depth):
            blocks.append(block(inputs, width, 2 if stage and not index else 1))
            inputs = width
    return nn.Sequential(*blocks)


class Airbench(nn.Module):
    """BatchNorm without weight behind max pooling, GELU, a scaled head."""

    def __init__(self, widths=(32, 48), classes=5):
        super().__init__()
        layers, inputs = [nn.Conv2d(3, 24, 2), nn.GELU()], 24
        for width in widths:
            layers += [nn.Conv2d(inputs, width, 3, padding="same", bias=False), nn.MaxPool2d(2)]
            layers += [nn.BatchNorm2d(width, affine=False), nn.GELU()]
            layers += [nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.GELU()]
            inputs = width
        side = (31 >> len(widths)) // 3
        self.trunk = nn.Sequential(*layers, nn.MaxPool2d(3))
        self.head = nn.Linear(inputs * side**2, classes, bias=False)

    def forward(self, x):
        return self.head(self.trunk(x).flatten(1)) * 0.2


class SqueezeExcite(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.reduce, self.expand = nn.Conv2d(channels, 4, 1), nn.Conv2d(4, channels, 1)

    def forward(self, x):
        return x * torch.sigmoid(self.expand(F.silu(self.reduce(x.mean((2, 3), keepdim=True)))))


class InvertedResidual(nn.Module):
    """MobileNet/EfficientNet: expand, depthwise, squeeze and excite, project, sum without activation."""

    def __init__(self, inputs, outputs, stride, kernel, act):
        super().__init__()
        wide, depthwise = 4 * inputs, {"padding": kernel // 2, "groups": 4 * inputs, "bias": False}
        layers = [nn.Conv2d(inputs, wide, 1, bias=False), nn.BatchNorm2d(wide), act()]
        layers += [nn.Conv2d(wide, wide, kernel, stride, **depthwise), nn.BatchNorm2d(wide), act()]
        layers += [SqueezeExcite(wide), nn.Conv2d(wide, outputs, 1, bias=False), nn.BatchNorm2d(outputs)]
        self.body = nn.Sequential(*layers)
        self.residual = stride == 1 and inputs == outputs

    def forward(self, x):
        return x + self.body(x) if self.residual else self.body(x)


def efficientnet():
    layers = [nn.Conv2d(3, 16, 3, 2, 1, bias=False), nn.BatchNorm2d(16), nn.Hardswish()]
    layers += [InvertedResidual(16, 16, 1, 3, nn.SiLU), InvertedResidual(16, 24, 2, 5, nn.SiLU)]
    layers += [InvertedResidual(24, 24, 1, 3, nn.ReLU6), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.2)]
    return nn.Sequential(*layers, nn.Linear(24, 16), nn.BatchNorm1d(16), nn.LeakyReLU(0.1), nn.Linear(16, 5))


def normed():
    """GroupNorm and LayerNorm, which depend on the image and cannot be folded."""
    layers = [nn.Conv2d(3, 16, 3, padding=1), nn.GroupNorm(4, 16), nn.SiLU(), nn.Conv2d(16, 8, 3, 2, 1), nn.Tanh()]
    return nn.Sequential(*layers, nn.Flatten(2), nn.LayerNorm(256), nn.Flatten(), nn.Linear(8 * 256, 5))


class Branching(nn.Module):
    """A forward that asks for numbers: torch.fx cannot trace it."""

    def __init__(self):
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 8, 3), nn.Linear(8, 5)

    def forward(self, x):
        x = self.conv(x)
        if bool(torch.isfinite(x).all()):
            x = x * 2
        return self.head(x.mean((2, 3)))


NETWORKS = {
    "resnet8": functools.partial(classifier, "resnet8", num_classes=5, in_channels=3),
    "torchvision": TorchvisionResNet,
    "wide": WideResNet,
    "airbench": Airbench,
    "efficientnet": efficientnet,
    "normed": normed,
    "branching": Branching,
}


def models_of(make, count=2):
    """Models of seeds 0, 1, ... in eval mode, by a function or a name among NETWORKS, whose BatchNorms do something."""
    models = []
    for seed in range(count):
        torch.manual_seed(seed)
        model = NETWORKS[make]() if isinstance(make, str) else make()
        with torch.no_grad():
            for part in model.modules():
                if isinstance(part, nn.modules.batchnorm._BatchNorm):
                    part.running_mean.normal_(0, 0.3)
                    part.running_var.uniform_(0.3, 2)
                    if part.weight is not None:
                        part.weight.uniform_(0.5, 1.5)[0] *= -1
                        part.bias.normal_(0, 0.2)
        models.append(model.eval())
    return models


def images_of(count=20, size=32):
    return torch.randint(0, 256, (count, size, size, 3), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)


@torch.no_grad()
def exact_logits(models, images, dtype=torch.float64):
    """By copies of the models in ``dtype``, on images that lie as torch makes them."""
    copies = [copy.deepcopy(model).to(dtype) for model in models]
    return torch.stack([model(to_float(images).contiguous().to(dtype)) for model in copies]).double()
