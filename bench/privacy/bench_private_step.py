"""A private step against plain ones of the same network and against Opacus, one thread.

``plain`` is torch in channels_last, ``optimized`` by ``kr_fast.optimize(training=True)``; Opacus with hooks, and its
ghost mode where it runs. All in one run, so that ratios of its medians hold. ``peak_mib`` is what a step of 256 images
holds at most of torch's memory besides weights and inputs.
"""

import copy

import pytest
import torch
import torch.nn.functional as F

import kr_fast
from kr_fast.models import classifier, unet
from kr_fast.privacy import make_private

BATCH, SIDE, CLASSES = 64, 28, 10
NETWORKS = {
    "resnet14-gn": lambda: classifier("resnet14-gn", num_classes=CLASSES, in_channels=1, image_size=SIDE),
    "unet 32 64 64": lambda: unet(SIDE, SIDE, 1, CLASSES, widths=(32, 64, 64)),
}


class Step:
    """A training step on ``count`` images."""

    def __init__(self, network, count):
        torch.manual_seed(0)
        self.model = NETWORKS[network]().to(memory_format=torch.channels_last)
        self.x = torch.randn(count, 1, SIDE, SIDE).contiguous(memory_format=torch.channels_last)
        self.labels, self.time = torch.arange(count) % CLASSES, torch.rand(count) * 1000
        self.diffusion = network.startswith("unet")
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.0)
        self.network = self.model

    def losses(self):
        if not self.diffusion:
            return F.cross_entropy(self.network(self.x), self.labels, reduction="none")
        found = self.network(self.x, self.time, class_labels=self.labels).sample
        return (found - self.x).square().mean((1, 2, 3))


class Plain(Step):
    def __call__(self):
        self.optimizer.zero_grad()
        self.losses().mean().backward()
        self.optimizer.step()


class Optimized(Plain):
    def __init__(self, *arguments):
        super().__init__(*arguments)
        kr_fast.optimize(self.model, training=True)


class Private(Step):
    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.private = make_private(self.model, self.optimizer, noise_multiplier=1.0, expected_batch_size=len(self.x))

    def __call__(self):
        self.private.backward(self.losses())
        self.private.step()

    def sums(self):
        self.private.backward(self.losses())
        return self.private.state_dict()["sums"]


class Hooks(Step):
    def __init__(self, *arguments):
        super().__init__(*arguments)
        opacus = pytest.importorskip("opacus")
        self.network = opacus.GradSampleModule(self.model)
        options = {"noise_multiplier": 1.0, "max_grad_norm": 1.0, "expected_batch_size": len(self.x)}
        self.optimizer = opacus.optimizers.DPOptimizer(self.optimizer, **options)

    def __call__(self):
        self.optimizer.zero_grad()
        self.losses().mean().backward()
        self.optimizer.step()


class Ghost(Step):
    def __init__(self, *arguments):
        super().__init__(*arguments)
        opacus = pytest.importorskip("opacus")
        from opacus.utils.fast_gradient_clipping_utils import DPTensorFastGradientClipping

        self.network = opacus.GradSampleModuleFastGradientClipping(
            self.model, max_grad_norm=1.0, use_ghost_clipping=True
        )
        options = {"noise_multiplier": 1.0, "max_grad_norm": 1.0, "expected_batch_size": len(self.x)}
        self.optimizer = opacus.optimizers.DPOptimizerFastGradientClipping(self.optimizer, **options)
        self.loss = DPTensorFastGradientClipping

    def __call__(self):
        self.optimizer.zero_grad()
        self.loss(self.network, self.optimizer, self.losses(), "mean").backward()
        self.optimizer.step()


PROVIDERS = {"plain": Plain, "optimized": Optimized, "kr_fast": Private, "opacus_hooks": Hooks, "opacus_ghost": Ghost}


def peak_mib(run):
    """Most that is allocated at a time by torch in a call, besides what was there before."""
    with torch.profiler.profile(profile_memory=True) as profile:
        run()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    now = most = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return most / 2**20


def clipped_of_a_loop(network, count):
    """The clipped sum in float64, record by record."""
    step = Step(network, count)
    model = copy.deepcopy(step.model).double()
    step.network, step.x = model, step.x.double()
    total, losses = 0, step.losses()
    for loss in losses:
        row = torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()), retain_graph=True)])
        total = total + row * min(1.0, 1 / float(row.norm()))
    return total


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("network", NETWORKS)
def test_private_step(benchmark, network, provider, one_thread):
    benchmark.group = f"private step, {network}, batch {BATCH}, 1 thread"
    if provider == "kr_fast":
        found, expected = Private(network, 4).sums().double(), clipped_of_a_loop(network, 4)
        error = float((found - expected).norm() / expected.norm())
        assert error < 1e-4
        benchmark.extra_info["error"] = error
    run = PROVIDERS[provider](network, BATCH)
    benchmark.pedantic(run, rounds=8, warmup_rounds=2)
    large = PROVIDERS[provider](network, 4 * BATCH)
    large()
    benchmark.extra_info["peak_mib"] = round(peak_mib(large), 1)
