"""A private training step against plain ones of the same network and against Opacus, which keeps per-sample gradients.

``eager`` is torch in channels_last, ``optimized`` by ``kr_fast.optimize(training=True)``: steps without privacy. Opacus
with hooks, and its ghost mode. The error is that of the sum of four records' gradients, clipped where the step is
private, against a loop over the records in float64.
"""

import copy
import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kr_fast.benchmarks.case import Case, Unavailable, Work, relative_error
from kr_fast.models import classifier, unet
from kr_fast.privacy import make_private
from kr_fast.synthesis.optimized.optimize import optimize

BATCH, CHECKED, SIDE, CLASSES = 64, 4, 28, 10
NETWORKS = {
    "resnet14-gn 28 px": lambda: classifier("resnet14-gn", num_classes=CLASSES, in_channels=1, image_size=SIDE),
    "unet 32-64-64 28 px": lambda: unet(SIDE, SIDE, 1, CLASSES, widths=(32, 64, 64)),
}


class Plain:
    """A training step on ``count`` images, without privacy."""

    private = False

    def __init__(self, network: str, count: int):
        torch.manual_seed(0)
        self.model = NETWORKS[network]().to(memory_format=torch.channels_last)
        self.x = torch.randn(count, 1, SIDE, SIDE).contiguous(memory_format=torch.channels_last)
        self.labels, self.time = torch.arange(count) % CLASSES, torch.rand(count) * 1000
        self.diffusion = network.startswith("unet")
        self.optimizer: Any = torch.optim.SGD(self.model.parameters(), lr=0.0)
        self.network: Any = self.model
        self.prepare()

    def prepare(self) -> None:
        """What the provider makes of model and optimizer."""

    def losses(self) -> Tensor:
        """One of each image."""
        if not self.diffusion:
            return F.cross_entropy(self.network(self.x), self.labels, reduction="none")
        found = self.network(self.x, self.time, class_labels=self.labels).sample
        return (found - self.x).square().mean((1, 2, 3))

    def __call__(self) -> None:
        self.optimizer.zero_grad()
        self.backward()
        self.optimizer.step()

    def backward(self) -> None:
        self.losses().mean().backward()

    def sums(self) -> Tensor:
        """The sum of the images' gradients, clipped to norm 1 in a private step."""
        self.backward()
        return torch.cat([p.grad.flatten() for p in self.model.parameters()]) * len(self.x)

    def exact(self) -> Tensor:
        """The same in float64, image by image."""
        self.network, self.x = copy.deepcopy(self.model).double(), self.x.double()
        parameters, total = list(self.network.parameters()), torch.zeros((), dtype=torch.float64)
        for loss in self.losses():
            row = torch.cat([g.flatten() for g in torch.autograd.grad(loss, parameters, retain_graph=True)])
            total = total + row * (min(1.0, 1 / float(row.norm())) if self.private else 1.0)
        return total


class Optimized(Plain):
    def prepare(self) -> None:
        optimize(self.model, training=True)


class Private(Plain):
    private = True

    def prepare(self) -> None:
        options = {"noise_multiplier": 1.0, "expected_batch_size": len(self.x)}
        self.step = make_private(self.model, self.optimizer, **options)

    def __call__(self) -> None:
        self.step.backward(self.losses())
        self.step.step()

    def sums(self) -> Tensor:
        self.step.backward(self.losses())
        return self.step.state_dict()["sums"]


class Hooks(Plain):
    """In NCHW, also behind attention: in channels_last the gradients of Opacus 1.6.0's convolutions are wrong."""

    private = True

    def prepare(self) -> None:
        try:
            import opacus
        except Exception as error:  # one for another torch fails in many ways
            raise Unavailable("needs opacus") from error
        self.model.to(memory_format=torch.contiguous_format)
        self.x = torch.empty(self.x.shape).copy_(self.x)  # of one channel both layouts are "contiguous"
        for module in self.model.modules():
            if isinstance(module, torch.nn.Conv2d):
                module.register_forward_pre_hook(lambda _, inputs: (inputs[0].contiguous(),))
        self.wrap(opacus, {"noise_multiplier": 1.0, "max_grad_norm": 1.0, "expected_batch_size": len(self.x)})

    def wrap(self, opacus: Any, options: dict[str, Any]) -> None:
        self.network = opacus.GradSampleModule(self.model)
        self.optimizer = opacus.optimizers.DPOptimizer(self.optimizer, **options)

    def sums(self) -> Tensor:
        self.backward()
        self.optimizer.clip_and_accumulate()
        return torch.cat([p.summed_grad.flatten() for p in self.model.parameters()])


class Ghost(Hooks):
    def wrap(self, opacus: Any, options: dict[str, Any]) -> None:
        wrapper = opacus.GradSampleModuleFastGradientClipping
        self.network = wrapper(self.model, max_grad_norm=1.0, use_ghost_clipping=True)
        self.optimizer = opacus.optimizers.DPOptimizerFastGradientClipping(self.optimizer, **options)

    def backward(self) -> None:
        from opacus.utils.fast_gradient_clipping_utils import DPTensorFastGradientClipping

        DPTensorFastGradientClipping(self.network, self.optimizer, self.losses(), "mean").backward()

    def sums(self) -> Tensor:
        self.backward()
        return torch.cat([p.grad.flatten() for p in self.model.parameters()])


PROVIDERS: dict[str, type[Plain]] = {
    "kr_fast": Private,
    "eager": Plain,
    "optimized": Optimized,
    "opacus_hooks": Hooks,
    "opacus_ghost": Ghost,
}


def work(network: str, provider: str) -> Work:
    """Of one provider, its sum found right."""
    checked = PROVIDERS[provider](network, CHECKED)
    reference = Plain(network, CHECKED)
    reference.private = checked.private
    return Work(PROVIDERS[provider](network, BATCH), relative_error(checked.sums(), reference.exact()))


def cases(device: str) -> list[Case]:
    """By network; a CPU's alone."""
    if device != "cpu":
        return []
    return [
        Case(f"private step, {network}", {name: functools.partial(work, network, name) for name in PROVIDERS}, 1e-4)
        for network in NETWORKS
    ]
