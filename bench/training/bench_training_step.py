"""A whole training step (forward, backward, clipping, optimizer) with this package's kernels against torch's.

``eager`` is torch in either layout, ``compile`` is torch.compile of the network in channels_last; with ``bf16`` under
autocast, where the processor multiplies bfloat16 (meant for AMX). Everyone takes the same steps from the same weights
on the same batch; before the clock starts the gradients of the first step are compared.
"""

import copy

import pytest
import torch
import torch.nn.functional as F

import kr_fast
from kr_fast.models import classifier, unet
from kr_fast.training import SGD, AdamW

LAST = torch.channels_last
PROVIDERS = ("kr_fast", "kr_fast_bf16", "eager_nchw", "eager_nhwc", "eager_nhwc_bf16", "compile", "compile_bf16")


def resnet14(size):
    return classifier("resnet14", num_classes=10, in_channels=1, width=16, image_size=size), (64, 1, size, size)


def resnet18():
    """torchvision's, with the 3x3 stem of small images."""
    model = pytest.importorskip("torchvision").models.resnet18(num_classes=10)
    model.conv1, model.maxpool = torch.nn.Conv2d(3, 64, 3, 1, 1, bias=False), torch.nn.Identity()
    return model, (64, 3, 32, 32)


CASES = {
    "resnet14 28 px": lambda: resnet14(28),
    "resnet14 8 px": lambda: resnet14(8),
    "resnet18 32 px": resnet18,
    "unet 32-64-64 28 px": lambda: (unet(28, 28, 1, 10, widths=(32, 64, 64)), (64, 1, 28, 28)),
    "unet 32-64 8 px": lambda: (unet(8, 8, 1, 10, widths=(32, 64)), (128, 1, 8, 8)),
}


class Step:
    """Steps of one provider."""

    def __init__(self, model, shape, provider):
        draw = torch.Generator().manual_seed(0)
        self.x, self.target = (torch.randn(shape, generator=draw) for _ in range(2))
        self.labels, self.time = torch.arange(shape[0]) % 10, torch.rand(shape[0], generator=draw) * 1000
        self.diffusion = type(model).__module__.startswith("diffusers.")
        self.model, self.autocast = model.train(), provider.endswith("_bf16")
        if provider != "eager_nchw":
            model.to(memory_format=LAST)
            self.x = self.x.contiguous(memory_format=LAST)
        ours = provider.startswith("kr_fast")
        if ours:
            kr_fast.optimize(model, training=True)
        if provider.startswith("compile"):
            torch._dynamo.reset()
            self.model = torch.compile(model, dynamic=False)
        if self.diffusion:
            options = {"max_grad_norm": 1.0} if ours else {"fused": True}
            self.optimizer = (AdamW if ours else torch.optim.AdamW)(model.parameters(), lr=1e-4, **options)
        else:
            options = {} if ours else {"fused": True}
            kind = SGD if ours else torch.optim.SGD
            self.optimizer = kind(model.parameters(), lr=1e-3, momentum=0.9, nesterov=True, **options)
        self.clips = self.diffusion and not ours

    def loss(self):
        with torch.autocast("cpu", torch.bfloat16, enabled=self.autocast):
            if self.diffusion:
                return F.mse_loss(self.model(self.x, self.time, class_labels=self.labels).sample, self.target)
            return F.cross_entropy(self.model(self.x), self.labels)

    def __call__(self):
        self.optimizer.zero_grad()
        self.loss().backward()
        if self.clips:
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()

    def gradients(self):
        self.optimizer.zero_grad()
        self.loss().backward()
        return torch.cat([parameter.grad.flatten() for parameter in self.model.parameters()])


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("case", CASES)
def test_training_step(benchmark, threads, case, provider):
    if provider.endswith("_bf16") and not torch.cpu._is_avx512_bf16_supported():
        pytest.skip("needs a processor that multiplies bfloat16")
    benchmark.group = f"training step {case} {threads} threads"
    torch.manual_seed(0)
    model, shape = CASES[case]()
    want = Step(copy.deepcopy(model), shape, "eager_nchw").gradients()
    run = Step(model, shape, provider)
    error = float((run.gradients() - want).norm() / want.norm())
    # Roundings that move activations over the corner of a ReLU: torch's two layouts differ by as much.
    assert error < (0.3 if run.autocast else 1e-4 if run.diffusion else 0.02), error
    benchmark.extra_info.update(error=error)
    benchmark.pedantic(run, rounds=8 if "28 px" in case else 30, warmup_rounds=2)
