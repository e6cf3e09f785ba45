"""Edges of the CUDA kernels of distillation_loss, its passes, and what must not be seen of the device.

Class counts: one of each regime, see distillation_cases.py.
"""

import math

import pytest
import torch
from cuda_on_host import machine, same_bits
from distillation_cases import DTYPES, EVERYTHING, GRAD_TOLERANCE, check, close, draw, oracle

from kr_fast.backends import registry
from kr_fast.backends.calls import ClassesCall
from kr_fast.ops.distillation.distillation_loss import distillation_loss, distillation_loss_and_grad


@pytest.mark.sanitize
@pytest.mark.parametrize("classes", [10, 32, 33, 50, 100, 256, 1000, 1028, 16386])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("offset", [0, 1, 2, 4])  # in elements: accesses of 16, 8 and fewer bytes
@pytest.mark.parametrize("gap", [0, 1, 8])  # between rows
def test_row_strides_and_misaligned_bases(cuda_device, classes, dtype, offset, gap):
    z, t, y = draw(classes, dtype, rows=3)
    wide = torch.full((2, 4 * (classes + gap) + 8), math.nan, dtype=dtype).to(cuda_device)
    views = []
    for buffer, values in zip(wide, (z, t), strict=True):
        view = buffer[offset:].as_strided((3, classes), (classes + gap, 1))
        views.append(view.copy_(values))
    leaf, exact = views[0].detach().requires_grad_(), z.double().requires_grad_()
    loss = distillation_loss(leaf, views[1], y.to(cuda_device), temperature=2.0, hard_weight=0.5)
    wanted = oracle(exact, t, y, T=2.0, hard=0.5)
    loss.backward()
    wanted.backward()
    close(loss, wanted, 1e-6)
    close(leaf.grad, exact.grad, GRAD_TOLERANCE[dtype])


@pytest.mark.parametrize("rows", [0, 1, 7, 257])
@pytest.mark.parametrize("classes", [10, 100, 130])
def test_any_number_of_rows(cuda_device, rows, classes):
    z, t, y = draw(classes, rows=rows)
    if rows:
        return check(cuda_device, z, t, y, **EVERYTHING)
    z = z.to(cuda_device).requires_grad_()
    for reduction in ("mean", "sum", "none"):
        loss = distillation_loss(z, t.to(cuda_device), y.to(cuda_device), reduction=reduction)
        assert loss.sum().item() == 0
        assert torch.autograd.grad(loss.sum(), z)[0].shape == (0, classes)


def test_half_precision_gradient_survives_a_loss_scale(cuda_device):
    """GradScaler's 65536 is folded in before the gradient is rounded: nothing is flushed to zero."""
    z, t = torch.randn(1024, 100).half(), torch.randn(1024, 100).half()
    exact, leaf = z.double().requires_grad_(), z.to(cuda_device).requires_grad_()
    (distillation_loss(leaf, t.to(cuda_device), temperature=4.0) * 65536).backward()
    (oracle(exact, t, T=4.0) * 65536).backward()
    assert (leaf.grad == 0).float().mean() < 1e-3
    close(leaf.grad, exact.grad, 1e-3)


@pytest.mark.parametrize("label", [-1, 10, 2**40])
def test_a_label_outside_poisons_the_loss(cuda_device, label):
    z, t, y = draw(10, rows=3)
    y[1] = label
    rows = distillation_loss(z.to(cuda_device), t.to(cuda_device), y.to(cuda_device), hard_weight=1.0, reduction="none")
    assert rows.isnan().tolist() == [False, True, False]
    assert not distillation_loss(
        z.to(cuda_device), t.to(cuda_device), y.to(cuda_device)
    ).isnan()  # labels only say what counts


@pytest.mark.parametrize("classes", [10, 100, 1000, 1025, 16385])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_loss_and_gradient_in_one_pass(cuda_device, classes, dtype, reduction):
    z, t, y = (x.to(cuda_device) for x in draw(classes, dtype))
    weight = torch.rand(len(z)).to(cuda_device)
    for labels, more in ((None, {}), (y, {"hard_weight": 0.5, "sample_weight": weight})):
        more |= {"temperature": 4.0, "reduction": reduction}
        leaf = z.clone().requires_grad_()
        rows = distillation_loss(leaf, t, labels, **{**more, "reduction": "none"})
        total = 1.0
        if reduction == "mean":
            total = weight.sum() if labels is not None else len(z)
        (rows.sum() / total).backward()
        loss, grad = distillation_loss_and_grad(z, t, labels, **more)
        assert grad.dtype == dtype
        close(loss, rows.sum().cpu().double() / total, 1e-6)
        close(grad, leaf.grad.cpu().double(), {torch.float32: 1e-6}.get(dtype, GRAD_TOLERANCE[dtype]))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("labels", [False, True])
def test_backward_of_the_gradient_that_is_there_already(cuda_device, dtype, labels):
    """An upstream gradient of 1, of 3, and a second backward."""
    z, t, y = draw(100, dtype)
    for factor in (1.0, 3.0):
        check(cuda_device, z, t, y if labels else None, T=2.0, upstream=torch.tensor(factor, dtype=torch.float64))
    leaf = z.to(cuda_device).requires_grad_()
    loss = distillation_loss(leaf, t.to(cuda_device))
    first = torch.autograd.grad(loss, leaf, retain_graph=True)[0]
    assert torch.equal(first, torch.autograd.grad(loss, leaf)[0])


def test_gradient_in_one_pass_where_there_is_much_to_read(cuda_device, monkeypatch):
    """With labels the sum of weights is then taken beforehand."""
    monkeypatch.setattr("kr_fast.ops.distillation.autograd.LAUNCH_ELEMENTS", 1)
    for classes in (10, 100):
        z, t, y = draw(classes)
        y[::3] = -100
        check(cuda_device, z, t, y, weight=torch.rand(len(z)), **EVERYTHING)


@pytest.mark.sanitize
@pytest.mark.parametrize("classes", [10, 100, 1000, 1025, 16385])
def test_same_bits_in_every_order_and_run(cuda_device, classes, host_cuda):
    """A missing barrier, or a sum in the order of arrival, would show; as would a counter that is not left at 0."""
    z, t, y = (x.to(cuda_device) for x in draw(classes, rows=300 if classes < 1000 else 9))
    found = []
    for descending in (False, True, False):
        with machine(host_cuda, descending=descending):
            leaf = z.clone().requires_grad_()
            loss = distillation_loss(leaf, t, y, temperature=2.0, hard_weight=0.5)
            loss.backward()
            found.append((loss.detach(), leaf.grad, *distillation_loss_and_grad(z, t, y)))
    assert all(same_bits(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True))
    with machine(host_cuda, most_blocks=2):
        loss = distillation_loss(z, t, y, temperature=2.0, hard_weight=0.5)
    torch.testing.assert_close(loss, found[0][0], rtol=1e-6, atol=0)


def test_order_of_backends():
    assert registry.preference("distillation_loss", "cuda") == ("cuda", "triton", "reference")
    assert registry.preference("distillation_loss", "cpu") == ("cpu", "reference")


@pytest.mark.gpu
@pytest.mark.parametrize("classes", [10, 100, 1000, 32_000, 128_256])
def test_nothing_waits_for_the_device_and_graphs_replay(classes):
    if registry.refusal("distillation_loss", "cuda", ClassesCall("cuda", torch.float32)):
        pytest.skip("needs an NVIDIA GPU and kr_fast._cuda")
    z, t, y = (x.cuda() for x in draw(classes, rows=64))
    options = {"temperature": 4.0, "hard_weight": 0.5}
    with registry.forced("cuda"):
        wanted = distillation_loss_and_grad(z, t, y, **options)
        leaf = z.clone().requires_grad_()
        torch.cuda.set_sync_debug_mode("error")
        try:
            distillation_loss_and_grad(z, t, y, **options)
            distillation_loss(leaf, t, y, **options).backward()
            distillation_loss(leaf, t).backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        graph = torch.cuda.CUDAGraph()
        held = torch.zeros_like(z)
        with torch.cuda.graph(graph):
            found = distillation_loss_and_grad(held, t, y, **options)
        for _ in range(3):  # also finds a counter that a replay does not leave at 0
            held.copy_(z)
            graph.replay()
            assert all(same_bits(a, b) for a, b in zip(found, wanted, strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize(("rows", "classes"), [(2**28 + 3, 10), (2**21 + 5, 1030), (17_000, 128_256)])
def test_more_than_2_to_the_31_elements(rows, classes):
    if torch.cuda.mem_get_info()[0] < 20 * rows * classes // 10 * 4:
        pytest.skip("needs a GPU with more memory")
    z = torch.randn(rows, classes, device="cuda", dtype=torch.bfloat16)
    t = z.roll(1, 1)
    with registry.forced("cuda"):
        loss, grad = distillation_loss_and_grad(z, t, reduction="sum")
        tail = distillation_loss_and_grad(z[-5:].clone(), t[-5:].clone(), reduction="sum")[1]
    assert torch.isfinite(loss)
    assert torch.equal(grad[-5:], tail)
