"""The CUDA kernels of LiRA against the reference: on the CPU (support/cuda_host), and on a GPU where there is one.

Models: 6 and 9 (sides of even and odd counts, one of them empty for some examples); 31, 32, 33 around a warp's lanes;
70 three steps of a warp. More outside targets than one launch takes: 1,030.
"""

import pytest
import torch
from cuda_on_host import in_use, machine

from kr_fast.backends import registry
from kr_fast.ops.membership.lira import VARIANCES, VARIANTS, lira

KINDS = [(variant, variance) for variant in VARIANTS for variance in VARIANCES]


def make(queries, examples, models, kind="distinct"):
    g = torch.Generator().manual_seed(models)
    keep = torch.rand(models, examples, generator=g).argsort(0).argsort(0) < models // 2
    phi = 2 * torch.randn(queries, examples, models, generator=g) + 3 * keep.T + 5
    if kind == "unbalanced":
        keep = torch.rand(models, examples, generator=g) < 0.4
        keep[:, 0], keep[:, 1], keep[0, 0] = True, False, False
    if kind == "ties":
        phi = torch.randint(-1, 2, phi.shape, generator=g).float() / 4  # zeros, and both signs
    if kind == "outlier":
        phi[:, ::2, 3] = 9e5  # what is left without it must not be rounding noise
    return phi, keep


def compare(device, phi, keep, **options):
    with registry.forced("reference"):
        wanted = lira(phi, keep, **options)
    options = {key: value.to(device) if isinstance(value, torch.Tensor) else value for key, value in options.items()}
    found = lira(phi.to(device), keep.to(device), **options)
    assert found[0].device == phi.to(device).device
    usual = wanted[0].abs() < 1e20  # all equal on a side: the deviation is the 1e-30 that is added
    torch.testing.assert_close(found[0].cpu()[usual], wanted[0][usual], rtol=1e-9, atol=1e-9)
    assert bool((found[0].cpu()[~usual].sign() == wanted[0][~usual].sign()).all())
    assert found[1] == wanted[1]


@pytest.mark.sanitize
@pytest.mark.parametrize(("variant", "variance"), KINDS)
@pytest.mark.parametrize("kind", ["distinct", "unbalanced", "ties", "outlier"])
def test_all_kinds_of_shadows(cuda_device, variant, variance, kind):
    for models in (6, 9):
        compare(cuda_device, *make(2, 11, models, kind), variant=variant, variance=variance)


@pytest.mark.parametrize("models", [31, 32, 33, 70])
@pytest.mark.parametrize("variance", VARIANCES)
def test_steps_of_a_warp(cuda_device, models, variance):
    compare(cuda_device, *make(1, 3, models), variance=variance)


@pytest.mark.sanitize
@pytest.mark.parametrize(("variant", "variance"), KINDS)
def test_outside_targets_of_all_kinds_of_variance(cuda_device, variant, variance):
    for targets in (3, 1030):
        target = torch.randn(2, 3, targets, generator=torch.Generator().manual_seed(targets)) + 6
        compare(cuda_device, *make(2, 3, 8), variant=variant, variance=variance, target=target)


@pytest.mark.sanitize
@pytest.mark.parametrize("variance", ["per_example", "shrinkage"])
def test_order_and_strides_do_not_matter(host_cuda, variance):
    """Few blocks, so that each takes several examples; lanes and blocks from the last to the first."""
    phi, keep = make(2, 15, 12)
    with in_use(host_cuda):
        wanted = lira(phi, keep, variance="per_example")
        with machine(host_cuda, descending=True, most_blocks=4):
            assert torch.equal(lira(phi, keep, variance="per_example")[0], wanted[0])
        wanted = lira(phi, keep, variance=variance)
        with machine(host_cuda, descending=True):
            assert torch.equal(lira(phi, keep, variance=variance)[0], wanted[0])


def test_too_many_models_are_refused(host_cuda):
    phi, keep = make(1, 2, 1025)
    with in_use(host_cuda), pytest.raises(RuntimeError, match="at most 1024 models, got 1025"):
        lira(phi, keep)


@pytest.mark.gpu
def test_without_a_kernel_for_the_gpu_the_cpu_computes():
    phi, keep = make(1, 4, 1025)
    found, _ = lira(phi.cuda(), keep.cuda())
    assert found.is_cuda
    assert torch.equal(found.cpu(), lira(phi, keep)[0])
