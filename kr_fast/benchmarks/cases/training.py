"""A whole training step (forward, backward, clipping, optimizer) with this package's kernels against torch's.

``eager`` is torch in either layout, ``compile`` is torch.compile of the network in channels_last; with ``bf16`` under
autocast, where the processor multiplies bfloat16 (meant for AMX). Everyone takes the same steps from the same weights
on the same batch; the error is that of the gradients of the first step against torch's.
"""

import copy
import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kr_fast.benchmarks.case import Case, Unavailable, Work, attempt, compiled, needs_bfloat16, relative_error
from kr_fast.models import classifier, unet
from kr_fast.synthesis.optimized.optimize import optimize
from kr_fast.training import SGD, AdamW

PROVIDERS = ("kr_fast", "kr_fast_bf16", "eager_nchw", "eager_nhwc", "eager_nhwc_bf16", "compile", "compile_bf16")
Made = tuple[nn.Module, tuple[int, ...]]


def resnet14(size: int) -> Made:
    """The Student of ``--preset small`` on ``size`` px."""
    return classifier("resnet14", num_classes=10, in_channels=1, width=16, image_size=size), (64, 1, size, size)


def resnet18() -> Made:
    """torchvision's, with the 3x3 stem of small images."""
    try:
        from torchvision.models import resnet18 as make
    except Exception as error:  # one built for another torch fails while it registers its operators
        raise Unavailable("needs a torchvision that imports") from error
    model = make(num_classes=10)
    model.conv1, model.maxpool = nn.Conv2d(3, 64, 3, 1, 1, bias=False), nn.Identity()
    return model, (64, 3, 32, 32)


NETWORKS: dict[str, Callable[[], Made]] = {
    "resnet14 28 px": lambda: resnet14(28),
    "resnet14 8 px": lambda: resnet14(8),
    "resnet18 32 px": resnet18,
    "unet 32-64-64 28 px": lambda: (unet(28, 28, 1, 10, widths=(32, 64, 64)), (64, 1, 28, 28)),
    "unet 32-64 8 px": lambda: (unet(8, 8, 1, 10, widths=(32, 64)), (128, 1, 8, 8)),
}


class Step:
    """Steps of one provider."""

    def __init__(self, model: nn.Module, shape: tuple[int, ...], provider: str):
        draw = torch.Generator().manual_seed(0)
        self.x, self.target = (torch.randn(shape, generator=draw) for _ in range(2))
        self.labels, self.time = torch.arange(shape[0]) % 10, torch.rand(shape[0], generator=draw) * 1000
        self.diffusion = type(model).__module__.startswith("diffusers.")
        self.model, self.autocast = model.train(), provider.endswith("_bf16")
        if provider != "eager_nchw":
            model.to(memory_format=torch.channels_last)
            self.x = self.x.contiguous(memory_format=torch.channels_last)
        ours = provider.startswith("kr_fast")
        if ours:
            optimize(model, training=True)
        if provider.startswith("compile"):
            self.model = compiled(model)
        options = {} if ours else {"fused": True}
        if self.diffusion:
            clipping = {"max_grad_norm": 1.0} if ours else {}
            self.optimizer = (AdamW if ours else torch.optim.AdamW)(model.parameters(), lr=1e-4, **options, **clipping)
        else:
            kind = SGD if ours else torch.optim.SGD
            self.optimizer = kind(model.parameters(), lr=1e-3, momentum=0.9, nesterov=True, **options)
        self.clips = self.diffusion and not ours

    def loss(self) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=self.autocast):
            if self.diffusion:
                return F.mse_loss(self.model(self.x, self.time, class_labels=self.labels).sample, self.target)
            return F.cross_entropy(self.model(self.x), self.labels)

    def __call__(self) -> None:
        self.optimizer.zero_grad()
        self.loss().backward()
        if self.clips:
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()

    def gradients(self) -> Tensor:
        self.optimizer.zero_grad()
        self.loss().backward()
        return torch.cat([parameter.grad.flatten() for parameter in self.model.parameters()])


def work(network: str, provider: str) -> Work:
    """The same weights for all providers."""
    if provider.endswith("_bf16"):
        needs_bfloat16()
    torch.manual_seed(0)
    model, shape = NETWORKS[network]()
    want = Step(copy.deepcopy(model), shape, "eager_nchw").gradients()
    run = Step(model, shape, provider)
    gradients = attempt(run.gradients) if provider.startswith("compile") else run.gradients()
    return Work(run, relative_error(gradients, want))


def cases(device: str) -> list[Case]:
    """By network; a CPU's alone."""
    found = []
    for network in NETWORKS if device == "cpu" else ():
        providers = {name: functools.partial(work, network, name) for name in PROVIDERS}
        # Roundings that move activations over the corner of a ReLU: torch's two layouts differ by as much.
        exact = 1e-4 if network.startswith("unet") else 0.02
        allowed = {name: 0.3 if name.endswith("_bf16") else exact for name in PROVIDERS}
        found.append(Case(f"training step, {network}", providers, allowed))
    return found
