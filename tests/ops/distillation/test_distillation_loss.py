"""distillation_loss against a float64 oracle on every backend: values and gradients apart, and edges of the numbers."""

import math

import pytest
import torch
import torch.nn.functional as F
from backends import on_backends
from distillation_cases import CASES, DTYPES, FEW, GRAD_TOLERANCE, TILES, check, close, draw, on_both, oracle

import kr_fast
from kr_fast.ops.distillation.distillation_loss import distillation_loss

everywhere = on_backends("distillation_loss")
KERNELS = ("cpu", "cuda", "triton")  # whose errors are compared with the reference's in float64


def run(backend, case):
    kind = case.options.get("kind", "logits")
    z, t, y = draw(case.classes, case.dtype, torch.float32 if kind != "logits" else case.target_dtype, kind)
    y[1] = -100
    weight = torch.linspace(0.5, 1.5, len(z))
    interpreted = backend.id == "triton-interpreter"  # which cuts off where a GPU rounds to nearest, an ulp of bfloat16
    for reduction in ("mean", "none") if interpreted else ("mean", "sum", "none"):
        more = {"weight": weight, "reduction": reduction} if case.options else {"reduction": reduction}
        check(backend.device, z, t, y, tolerance=case.tolerance * (2 if interpreted else 1), **more, **case.options)


@everywhere
@pytest.mark.parametrize("case", CASES, ids=str)
def test_values_and_gradients(backend, case):
    run(backend, case)


@on_backends("distillation_loss", "cpu", "cuda")
@pytest.mark.parametrize("case", TILES, ids=str)
def test_half_precision_in_every_tile(backend, case):
    run(backend, case)


@on_backends("distillation_loss", *KERNELS)
@pytest.mark.parametrize("classes", FEW)
@pytest.mark.parametrize("hard", [0.0, 0.5])
def test_dkd(backend, classes, hard):
    z, t, y = draw(classes, rows=7)
    y[1] = -100
    z[2, y[2]] += 30
    agrees(backend, lambda z, d: kr_fast.dkd_loss(z, t.to(d), y.to(d), temperature=4.0, hard_weight=hard), z, 3e-6)


@on_backends("distillation_loss", *KERNELS)
@pytest.mark.parametrize("classes", [5, *FEW[2:]])
@pytest.mark.parametrize("tail", ["smooth", "renorm"])
def test_top_k(backend, classes, tail):
    z, t, y = draw(classes, rows=5)
    values, indices = t.softmax(1).topk(4)
    options = {"tail": tail, "temperature": 2.0, "hard_weight": 0.5}

    def loss(z, d):
        return kr_fast.distillation_loss_topk(z, values.to(d), indices.to(d), y.to(d), **options)

    agrees(backend, loss, z)


@on_backends("distillation_loss", *KERNELS)
@pytest.mark.parametrize("classes", [5, *FEW[2:]])
def test_soft_cross_entropy(backend, classes):
    z, t, _ = draw(classes, rows=5, kind="probs")
    t[0] = F.one_hot(torch.tensor(1), classes)
    agrees(backend, lambda z, d: kr_fast.soft_cross_entropy(z, t.to(d), temperature=2.0), z)


def agrees(backend, loss, z, tolerance=GRAD_TOLERANCE[torch.float32]):
    found = on_both(backend.device, loss, z)
    torch.testing.assert_close(found[0][0], found[1][0], rtol=3e-6, atol=0)
    close(found[0][1], found[1][1], tolerance)


def by_torch(z, t):
    return 16 * F.kl_div(F.log_softmax(z / 4, 1), F.softmax(t / 4, 1), reduction="batchmean")


def errors(loss, z, t, device):
    """Relative errors of value and gradient against float64 at the same logits."""
    leaf, exact = z.to(device).detach().requires_grad_(), z.double().requires_grad_()
    found, expected = loss(leaf, t.to(device)), by_torch(exact, t.double())
    found.backward()
    expected.backward()
    off = torch.linalg.norm(leaf.grad.cpu().double() - exact.grad) / torch.linalg.norm(exact.grad)
    return (abs(found.detach().cpu().double() - expected) / expected).item(), off.item()


@on_backends("distillation_loss", "cpu", "cuda")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("classes", [10, 100, 1000])
@pytest.mark.parametrize("noise", [1.0, 0.1, 0.01])
def test_no_further_off_than_torch(backend, dtype, classes, noise):
    torch.manual_seed(classes)
    t = torch.randn(256, classes).mul(2)
    z, t = (t + noise * torch.randn_like(t)).to(dtype), t.to(dtype)
    ours = errors(lambda z, t: distillation_loss(z, t, temperature=4.0), z, t, backend.device)
    theirs = errors(by_torch, z, t, "cpu")
    # Rounding of the result itself is granted: one in 2^23 of the value; of the gradient that of its dtype.
    assert ours[0] <= theirs[0] + 3e-7
    assert ours[1] <= 1.1 * theirs[1] + 3e-7


@on_backends("distillation_loss", "cpu")
@pytest.mark.parametrize("classes", [32_000, 128_256, 256_000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_vocabularies(backend, classes, dtype):
    torch.manual_seed(1)
    t = torch.randn(3, classes).mul(3)
    z, t = (t + torch.randn_like(t)).to(dtype), t.to(dtype)
    value, grad = errors(lambda z, t: distillation_loss(z, t, temperature=4.0), z, t, backend.device)
    assert value <= 1e-6
    assert grad <= {torch.float32: 3e-6, torch.bfloat16: 4e-3}[dtype]


@on_backends("distillation_loss", *KERNELS)
@pytest.mark.parametrize("classes", [10, 1000])
def test_small_divergences_are_exact_and_never_negative(backend, classes):
    """KL of 3e-4 to 1e-9, where p (ln p - ln q) loses its digits: relative error 5e-7 and below."""
    torch.manual_seed(2)
    t = torch.randn(256, classes)
    for noise, tolerance in ((2.4e-2, 5e-7), (1e-3, 1e-5)):
        z = t + noise * torch.randn(256, classes)
        rows = distillation_loss(z.to(backend.device), t.to(backend.device), reduction="none")
        assert (rows >= 0).all()
        close(rows.mean(), oracle(z.double(), t), tolerance)


@everywhere
@pytest.mark.parametrize("classes", [10, 100, 1000, 1025, 16385])
def test_rows_of_no_weight(backend, classes):
    """Ignored, of weight 0, all of them; whatever they hold, and under an infinite upstream gradient."""
    z, t, y = draw(classes, rows=6)
    weight = torch.tensor([1.0, 1, 0, 2, 1, 0.5])
    y[4] = -100
    z[2], z[4], t[4] = math.inf, math.nan, math.nan
    z = z.to(backend.device).requires_grad_()
    t, y, weight = t.to(backend.device), y.to(backend.device), weight.to(backend.device)
    keep = [0, 1, 3, 5]
    loss = distillation_loss(z, t, y, hard_weight=1.0, sample_weight=weight)
    expected = oracle(
        z.detach().cpu()[keep].double(), t.cpu()[keep], y.cpu()[keep], hard=1.0, weight=weight.cpu()[keep]
    )
    close(loss, expected, 1e-6)
    grad = torch.autograd.grad(loss, z)[0]
    assert grad[[2, 4]].abs().max() == 0
    assert torch.isfinite(grad).all()
    rows = distillation_loss(z, t, y, sample_weight=weight, reduction="none")
    upstream = torch.tensor([1.0, 1, math.inf, 1, math.nan, 1]).to(backend.device)
    assert torch.autograd.grad(rows, z, upstream)[0][[2, 4]].abs().max() == 0
    for nothing in (
        distillation_loss(z, t, y, sample_weight=torch.zeros(6).to(backend.device)),
        distillation_loss(z, t, torch.full_like(y, -100), hard_weight=1.0),
    ):
        assert nothing.item() == 0
        assert torch.autograd.grad(nothing, z)[0].abs().max() == 0


@everywhere
@pytest.mark.parametrize("classes", [5, 40, 200, 1030, 16390])
def test_zero_probabilities_and_infinite_logits(backend, classes):
    z, t, _ = draw(classes, rows=4)
    t[0, 1] = -math.inf  # teacher rules a class out: contributes q only
    z[1, 2] = t[1, 2] = -math.inf  # both rule it out: nothing
    z[2, 0] = -math.inf  # the student rules out what the teacher does not: infinite
    rows = distillation_loss(z.to(backend.device), t.to(backend.device), reduction="none")
    assert rows[2].item() == math.inf
    keep = [0, 1, 3]
    exact = z[keep].double().requires_grad_()
    q, p = exact.softmax(1), t[keep].double().softmax(1)
    expected = torch.where(p > 0, p * (p.log() - torch.where(p > 0, q, 1).log()), 0).sum(1)
    close(rows[keep], expected, 1e-6)
    leaf = z[keep].to(backend.device).requires_grad_()
    grad = torch.autograd.grad(distillation_loss(leaf, t[keep].to(backend.device), reduction="sum"), leaf)[0]
    close(grad, (q - p).detach(), 2e-6)
    one_hot = F.one_hot(torch.tensor([1, 0, 3]), classes).float()
    loss = distillation_loss(leaf, one_hot.to(backend.device), target_type="probs", reduction="none")
    close(loss, -q.log()[range(3), [1, 0, 3]], 1e-6)
    first_tile = z[3:].clone()  # nothing but -inf where the sums begin
    first_tile[:, : classes - 2] = -math.inf
    exact = first_tile[:, -2:].double().log_softmax(1)
    log_p = F.pad(t[3:, -2:].log_softmax(1), (classes - 2, 0), value=-math.inf)
    loss = distillation_loss(first_tile.to(backend.device), log_p.to(backend.device), target_type="log_probs")
    close(loss, (log_p[:, -2:].double().exp() * (log_p[:, -2:].double() - exact)).sum(), 2e-6)


@everywhere
@pytest.mark.parametrize("classes", [10, 100, 1000, 1025, 16385])
def test_equal_logits_give_exactly_zero_and_nan_comes_through(backend, classes):
    z, _, y = draw(classes, rows=3)
    z = (z * 3).to(backend.device).requires_grad_()
    loss = distillation_loss(z, z.detach().clone(), temperature=3.0)
    assert loss.item() == 0
    assert torch.autograd.grad(loss, z)[0].abs().max() == 0
    for value in (math.nan, math.inf):
        bad = z.detach().clone()
        bad[1, classes - 1] = value
        assert not math.isfinite(distillation_loss(bad, z.detach()).item())
        assert not math.isfinite(distillation_loss(z.detach(), bad).item())
        hard = distillation_loss(bad, bad, y.to(backend.device), soft_weight=0.0, hard_weight=1.0)
        assert not math.isfinite(hard.item())


@everywhere
@pytest.mark.parametrize("classes", [10, 100, 1000, 1025, 16385])
def test_offsets_do_not_matter(backend, classes):
    z, t, _ = draw(classes)
    z, t = ((x * 256).round() / 256 for x in (z, t))  # so that adding 10^4 is exact
    plain = distillation_loss(z.to(backend.device), t.to(backend.device)).item()
    for offset in (1e4, -1e4):
        moved = distillation_loss((z + offset).to(backend.device), (t - offset).to(backend.device)).item()
        assert abs(moved - plain) <= 1e-6 * plain
