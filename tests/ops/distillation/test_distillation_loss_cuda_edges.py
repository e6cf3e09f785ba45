"""Edges of the CUDA kernels of distillation_loss, its passes, and what must not be seen of the device.

Class counts: one of each regime, see test_distillation_loss_cuda.py.
"""

import math

import pytest
import torch
import torch.nn.functional as F
from cuda_on_host import machine, same_bits
from distillation_cases import DTYPES, EVERYTHING, GRAD_TOLERANCE, check, close, draw, oracle

from kr_fast.backends import registry
from kr_fast.backends.calls import ClassesCall
from kr_fast.ops.distillation.distillation_loss import distillation_loss, distillation_loss_and_grad


@pytest.mark.parametrize("classes", [10, 100, 1000, 1025, 16385])
def test_rows_of_no_weight(cuda_device, classes):
    """Ignored, of weight 0, all of them; whatever they hold, and under an infinite upstream gradient."""
    z, t, y = draw(classes, rows=6)
    weight = torch.tensor([1.0, 1, 0, 2, 1, 0.5])
    y[4] = -100
    z[2], z[4], t[4] = math.inf, math.nan, math.nan
    z = z.to(cuda_device).requires_grad_()
    t, y, weight = t.to(cuda_device), y.to(cuda_device), weight.to(cuda_device)
    keep = [0, 1, 3, 5]
    loss = distillation_loss(z, t, y, hard_weight=1.0, sample_weight=weight)
    wanted = oracle(z.detach().cpu()[keep].double(), t.cpu()[keep], y.cpu()[keep], hard=1.0, weight=weight.cpu()[keep])
    close(loss, wanted, 1e-6)
    grad = torch.autograd.grad(loss, z)[0]
    assert grad[[2, 4]].abs().max() == 0
    assert torch.isfinite(grad).all()
    rows = distillation_loss(z, t, y, sample_weight=weight, reduction="none")
    upstream = torch.tensor([1.0, 1, math.inf, 1, math.nan, 1]).to(cuda_device)
    assert torch.autograd.grad(rows, z, upstream)[0][[2, 4]].abs().max() == 0
    for nothing in (
        distillation_loss(z, t, y, sample_weight=torch.zeros(6).to(cuda_device)),
        distillation_loss(z, t, torch.full_like(y, -100), hard_weight=1.0),
    ):
        assert nothing.item() == 0
        assert torch.autograd.grad(nothing, z)[0].abs().max() == 0


@pytest.mark.parametrize("classes", [5, 40, 200, 1030, 16390])
def test_zero_probabilities_and_infinite_logits(cuda_device, classes):
    z, t, _ = draw(classes, rows=4)
    t[0, 1] = -math.inf  # teacher rules a class out: contributes q only
    z[1, 2] = t[1, 2] = -math.inf  # both rule it out: nothing
    z[2, 0] = -math.inf  # the student rules out what the teacher does not: infinite
    rows = distillation_loss(z.to(cuda_device), t.to(cuda_device), reduction="none")
    assert rows[2].item() == math.inf
    keep = [0, 1, 3]
    exact = z[keep].double().requires_grad_()
    q, p = exact.softmax(1), t[keep].double().softmax(1)
    wanted = torch.where(p > 0, p * (p.log() - torch.where(p > 0, q, 1).log()), 0).sum(1)
    close(rows[keep], wanted, 1e-6)
    leaf = z[keep].to(cuda_device).requires_grad_()
    grad = torch.autograd.grad(distillation_loss(leaf, t[keep].to(cuda_device), reduction="sum"), leaf)[0]
    close(grad, (q - p).detach(), 2e-6)
    one_hot = F.one_hot(torch.tensor([1, 0, 3]), classes).float()
    loss = distillation_loss(leaf, one_hot.to(cuda_device), target_type="probs", reduction="none")
    close(loss, -q.log()[range(3), [1, 0, 3]], 1e-6)
    first_tile = z[3:].clone()  # nothing but -inf where the sums begin
    first_tile[:, : classes - 2] = -math.inf
    exact = first_tile[:, -2:].double().log_softmax(1)
    log_p = F.pad(t[3:, -2:].log_softmax(1), (classes - 2, 0), value=-math.inf)
    loss = distillation_loss(first_tile.to(cuda_device), log_p.to(cuda_device), target_type="log_probs")
    close(loss, (log_p[:, -2:].double().exp() * (log_p[:, -2:].double() - exact)).sum(), 2e-6)


@pytest.mark.parametrize("classes", [10, 100, 1000, 1025, 16385])
def test_equal_logits_give_exactly_zero_and_nan_comes_through(cuda_device, classes):
    z, _, y = draw(classes, rows=3)
    z = (z * 3).to(cuda_device).requires_grad_()
    loss = distillation_loss(z, z.detach().clone(), temperature=3.0)
    assert loss.item() == 0
    assert torch.autograd.grad(loss, z)[0].abs().max() == 0
    for value in (math.nan, math.inf):
        bad = z.detach().clone()
        bad[1, classes - 1] = value
        assert not math.isfinite(distillation_loss(bad, z.detach()).item())
        assert not math.isfinite(distillation_loss(z.detach(), bad).item())
        assert not math.isfinite(
            distillation_loss(bad, bad, y.to(cuda_device), soft_weight=0.0, hard_weight=1.0).item()
        )


@pytest.mark.parametrize("classes", [10, 100, 1000, 1025, 16385])
def test_offsets_do_not_matter(cuda_device, classes):
    z, t, _ = draw(classes)
    z, t = ((x * 256).round() / 256 for x in (z, t))  # so that adding 10^4 is exact
    plain = distillation_loss(z.to(cuda_device), t.to(cuda_device)).item()
    for offset in (1e4, -1e4):
        moved = distillation_loss((z + offset).to(cuda_device), (t - offset).to(cuda_device)).item()
        assert abs(moved - plain) <= 1e-6 * plain


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
