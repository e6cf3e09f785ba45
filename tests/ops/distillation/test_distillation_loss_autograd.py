"""distillation_loss with autograd and torch.compile: one pass or two, loss scaling, in-place changes, any shape."""

import pytest
import torch
import torch.nn.functional as F
from backends import on_backends
from distillation_cases import (
    DTYPES,
    EVERYTHING,
    GRAD_TOLERANCE,
    Case,
    check,
    close,
    draw,
    each_kernel,
    on,
    oracle,
)
from hypothesis import given, settings
from hypothesis import strategies as st

import kr_fast
from kr_fast.backends import registry
from kr_fast.backends.arguments import LossOptions
from kr_fast.ops.distillation.distillation_loss import distillation_loss, distillation_loss_and_grad


@on_backends("distillation_loss", "cpu", "cuda", "triton-gpu")
def test_half_precision_gradient_survives_a_loss_scale(backend):
    """GradScaler's 65536 is folded in before the gradient is rounded: nothing is flushed to zero."""
    torch.manual_seed(3)
    z, t = torch.randn(1024, 100).half(), torch.randn(1024, 100).half()
    exact, leaf = z.double().requires_grad_(), z.to(backend.device).requires_grad_()
    (distillation_loss(leaf, t.to(backend.device), temperature=4.0) * 65536).backward()
    (oracle(exact, t, T=4.0) * 65536).backward()
    assert (leaf.grad == 0).float().mean() < 1e-3
    close(leaf.grad, exact.grad, 1e-3)


def test_grad_scaler_and_autocast_train():
    """Mixed precision as pipelines write it: half-precision logits under autocast, the loss scaled, then unscaled."""
    torch.manual_seed(6)
    layer, x, t = torch.nn.Linear(8, 10), torch.randn(64, 8), torch.randn(64, 10)
    exact = F.linear(x.double(), weight := layer.weight.detach().double().requires_grad_(), layer.bias.double())
    oracle(exact, t, T=4.0).backward()
    for dtype, tolerance in ((torch.bfloat16, 2e-2), (torch.float16, 3e-3)):
        layer.zero_grad()
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16)
        with torch.autocast("cpu", dtype=dtype):
            logits = layer(x)
            assert logits.dtype == dtype
            loss = distillation_loss(logits, t, temperature=4.0)
        assert loss.dtype == torch.float32
        optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        close(layer.weight.grad, weight.grad, tolerance)


FLOAT64 = Case(12, "torch's own", ("reference",), torch.float64)
NOT_INTERPRETED = ("reference", "cpu", "cuda", "triton-gpu")


@on_backends(
    "distillation_loss",
    *NOT_INTERPRETED,
    cases=[each for dtype in DTYPES for each in each_kernel(dtype=dtype)] + [FLOAT64],
)
def test_loss_and_gradient_in_one_pass(backend, case):
    """The same as by row and by autograd; and autograd of the mean of no labels, whose gradient comes with the loss:
    for upstream gradients of 1, of 3, and a second time."""
    z, t, y = case.draw()
    check(backend.device, z, t, T=2.0, upstream=torch.tensor(1.0, dtype=torch.float64), tolerance=case.tolerance)
    check(backend.device, z, t, y, T=2.0, upstream=torch.tensor(3.0, dtype=torch.float64), tolerance=case.tolerance)
    z, t, y, weight = on(backend.device, z, t, y, torch.rand(len(z)))
    leaf = z.clone().requires_grad_()
    loss = distillation_loss(leaf, t)
    first = torch.autograd.grad(loss, leaf, retain_graph=True)[0]
    assert torch.equal(first, torch.autograd.grad(loss, leaf)[0])
    for labels, more in ((None, {}), (y, {"hard_weight": 0.5, "sample_weight": weight})):
        for reduction in ("mean", "sum"):
            rows = distillation_loss(leaf, t, labels, temperature=4.0, reduction="none", **more)
            total = 1.0 if reduction == "sum" else len(z) if labels is None else weight.to(rows).sum()
            expected = rows.sum() / total
            loss, grad = distillation_loss_and_grad(leaf, t, labels, temperature=4.0, reduction=reduction, **more)
            assert not loss.requires_grad
            assert not grad.requires_grad
            assert grad.dtype == case.dtype
            close(loss, expected, 1e-6)
            close(grad, torch.autograd.grad(expected, leaf)[0], case.tolerance)


@on_backends("distillation_loss", "cuda")
@pytest.mark.parametrize("classes", [10, 100])
def test_gradient_with_the_loss_where_there_is_much_to_read(backend, classes, monkeypatch):
    """With labels the sum of weights is then taken beforehand."""
    monkeypatch.setattr("kr_fast.ops.distillation.autograd.LAUNCH_ELEMENTS", 1)
    z, t, y = draw(classes)
    y[::3] = -100
    check(backend.device, z, t, y, weight=torch.rand(len(z)), **EVERYTHING)


def test_logits_changed_in_place_are_noticed():
    z, t = torch.randn(5, 7, requires_grad=True), torch.randn(5, 7)
    logits = z * 2
    loss = distillation_loss(logits, t)
    logits.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_gradients_accumulate_and_are_not_shared():
    z, t = torch.randn(5, 7, requires_grad=True), torch.randn(5, 7)
    distillation_loss(z, t).backward()
    first, kept = z.grad, z.grad.clone()
    loss = distillation_loss(z, t)
    loss.backward(retain_graph=True)
    loss.backward()
    assert z.grad is first
    torch.testing.assert_close(z.grad, 3 * kept)


def test_transforms_are_refused():
    z, t = torch.randn(5, 7, requires_grad=True), torch.randn(5, 7)
    with pytest.raises(RuntimeError, match="distillation_loss: the call must not be under torch.func"):
        torch.func.vmap(lambda z: distillation_loss(z, t))(torch.randn(2, 5, 7))
    with pytest.raises(RuntimeError, match="must not be under torch.func"):
        torch.func.grad(lambda z: distillation_loss(z, t))(z.detach())


@on_backends("distillation_loss")
def test_mixed_dtypes_strides_and_inputs_unchanged(backend):
    torch.manual_seed(4)
    wide = torch.randn(9, 80).to(backend.device)
    z, t = wide[:, 3:43], torch.randn(40, 9).to(backend.device, torch.bfloat16).T  # row stride 80; column-major
    before = wide.clone(), t.clone()
    check(backend.device, z, t, torch.randint(0, 40, (9,)), T=2.0, hard=0.5, tolerance=3e-6)
    assert torch.equal(wide, before[0])
    assert torch.equal(t, before[1])


def test_result_does_not_depend_on_threads(isa):
    z, t = torch.randn(5000, 10), torch.randn(5000, 10)
    threads = torch.get_num_threads()
    found = []
    for count in (1, 2):
        torch.set_num_threads(count)
        found.append(distillation_loss(z, t))
    torch.set_num_threads(threads)
    assert torch.equal(*found)


def test_standardize_against_its_definition():
    torch.manual_seed(5)
    z, t = torch.randn(6, 20, dtype=torch.float64, requires_grad=True), torch.randn(6, 20, dtype=torch.float64) * 9

    def norm(x):
        return (x - x.mean(1, keepdim=True)) / (x.std(1, keepdim=True) + 1e-7)

    found = distillation_loss(z, t, temperature=2.0, standardize=True)
    wanted = oracle(norm(z), norm(t), T=2.0)
    torch.testing.assert_close(found, wanted)
    torch.testing.assert_close(torch.autograd.grad(found, z)[0], torch.autograd.grad(wanted, z)[0])
    constant = torch.full((2, 5), 3.0, requires_grad=True)
    distillation_loss(constant, torch.randn(2, 5), standardize=True).backward()
    assert torch.isfinite(constant.grad).all()


def test_standardize_of_rows_that_do_not_count():
    """They may hold anything: neither the loss nor a gradient is NaN by them."""
    torch.manual_seed(8)
    z, t, y = torch.randn(6, 20), torch.randn(6, 20), torch.randint(0, 20, (6,))
    weight, keep = torch.tensor([1.0, 0, 2, 1, 1, 1]), [0, 2, 3, 5]
    y[4] = -100
    z[1], t[1], z[4], t[4] = float("nan"), float("inf"), float("-inf"), float("nan")
    options = {"temperature": 2.0, "standardize": True}
    for loss in (
        lambda *tensors, **more: distillation_loss(*tensors, hard_weight=0.5, **options, **more),
        lambda *tensors, **more: kr_fast.dkd_loss(*tensors, hard_weight=0.5, **options, **more),
    ):
        leaf, kept = z.clone().requires_grad_(), z[keep].clone().requires_grad_()
        found, wanted = loss(leaf, t, y, sample_weight=weight), loss(kept, t[keep], y[keep], sample_weight=weight[keep])
        torch.testing.assert_close(found, wanted)
        found.backward(), wanted.backward()
        torch.testing.assert_close(leaf.grad[keep], kept.grad)
        assert leaf.grad[[1, 4]].abs().max() == 0


def test_gradcheck_in_float64():
    z, t = torch.randn(4, 6, dtype=torch.float64, requires_grad=True), torch.randn(4, 6, dtype=torch.float64)
    y = torch.tensor([0, 5, -100, 2])
    for reduction in ("mean", "none"):
        assert torch.autograd.gradcheck(
            lambda z, r=reduction: distillation_loss(
                z, t, y, temperature=3.0, hard_weight=0.4, label_smoothing=0.2, reduction=r
            ),
            z,
        )


def test_opcheck_and_full_graph_compile():
    z, t, y = torch.randn(5, 10), torch.randn(5, 10), torch.randint(0, 10, (5,))
    options = LossOptions(temperature=2.0, hard_weight=0.5)
    torch.library.opcheck(torch.ops.kr_fast.distillation_loss_forward.default, (z, t, None, y, None, *options))
    _, stats, scale = torch.ops.kr_fast.distillation_loss_forward(z, t, None, y, None, *options)
    arguments = (torch.ones(()), z, t, None, y, None, stats, scale, *options)
    torch.library.opcheck(torch.ops.kr_fast.distillation_loss_backward.default, arguments)

    def step(z):
        return distillation_loss(2 * z, t, y, temperature=2.0, hard_weight=0.5)

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    grads = []
    for function in (step, compiled):
        leaf = z.clone().requires_grad_()
        function(leaf).backward()
        grads.append(leaf.grad)
    torch.testing.assert_close(grads[1], grads[0])


@settings(max_examples=80, deadline=None)
@given(
    rows=st.integers(1, 70),
    classes=st.one_of(st.integers(2, 140), st.integers(141, 1100)),
    dtypes=st.tuples(*[st.sampled_from(DTYPES)] * 2),
    options=st.fixed_dictionaries({
        "T": st.floats(0.5, 20),
        "soft": st.sampled_from([0.0, 0.7, 1.0]),
        "hard": st.sampled_from([0.0, 0.6]),
        "smoothing": st.sampled_from([0.0, 0.2]),
        "reduction": st.sampled_from(["mean", "sum", "none"]),
    }),
    weighted=st.booleans(),
    ignored=st.booleans(),
    gap=st.integers(0, 3),
    seed=st.integers(0, 2**31),
)  # fmt: skip
def test_any_shape_and_flags(rows, classes, dtypes, options, weighted, ignored, gap, seed):
    torch.manual_seed(seed)
    z = torch.randn(rows, classes + gap).to(dtypes[0])[:, gap:]
    t = torch.randn(rows, classes).to(dtypes[1])
    y = torch.randint(0, classes, (rows,))
    if ignored:
        y[1:][torch.rand(rows - 1) < 0.3] = -100  # one is left: the mean over none is 0 here and NaN for torch
    weight = torch.rand(rows) + 0.1 if weighted else None
    # Where q comes near the target, p - q cancels: its error is one of q, which is at most 1 in a row.
    share = (torch.ones(rows) if weight is None else weight) * (y != -100)
    share = share / share.sum() if options["reduction"] == "mean" else share
    slack = 2**-21 * (options["soft"] * options["T"] + options["hard"]) * float(share.norm())
    check("cpu", z, t, y, weight=weight, tolerance=max(GRAD_TOLERANCE[dtypes[0]], 1e-5), slack=slack, **options)


def test_a_mask_as_weight_and_labels_of_32_bits():
    torch.manual_seed(7)
    z, t, y = torch.randn(9, 12), torch.randn(9, 12), torch.randint(0, 12, (9,))
    keep = torch.arange(9) % 2 == 0
    found = distillation_loss(z, t, y.int(), hard_weight=0.5, sample_weight=keep)
    close(found, oracle(z[keep].double(), t[keep], y[keep], hard=0.5), 1e-6)


def test_module_and_reference_agree():
    z, t, y = torch.randn(6, 10), torch.randn(6, 10), torch.randint(0, 10, (6,))
    module = kr_fast.DistillationLoss(temperature=4.0, hard_weight=0.5)
    ours = module(z, t, y)
    with registry.forced("reference"):
        torch.testing.assert_close(module(z, t, y), ours)
    assert "temperature=4.0" in repr(module)
