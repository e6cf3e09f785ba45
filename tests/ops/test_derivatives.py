"""No derivative is wrong in silence: of every op it is right, against finite differences in float64, or an error."""

import re
from collections.abc import Callable

import pytest
import torch
from op_calls import CASES, DIFFERENTIABLE, INDICES, NEVER, ONCE, ROW, STATISTICS, VALUES, P, T, Y, inputs, randn
from torch import nn
from torch.autograd import forward_ad, gradcheck, gradgradcheck
from torch.autograd.gradcheck import GradcheckError

from kr_fast.backends import registry
from kr_fast.ops.batched.model_sgd import model_sgd
from kr_fast.ops.distillation.distillation_loss import (
    distillation_loss,
    distillation_loss_and_grad,
    distillation_loss_topk,
    soft_cross_entropy,
)
from kr_fast.ops.distillation.distillation_metrics import distillation_metrics
from kr_fast.ops.distillation.dkd_loss import dkd_loss
from kr_fast.ops.nn.winograd_pack import winograd_pack
from kr_fast.ops.sampling.solver_step import SolverOutput, SolverRow, solver_step
from kr_fast.ops.sampling.solver_step_at import DeviceTable, solver_step_at

pytestmark = pytest.mark.filterwarnings("ignore")
DETACHED = {
    "distillation_loss_and_grad": lambda z: distillation_loss_and_grad(z, T)[0],
    "distillation_metrics": lambda z: distillation_metrics(z, T + 0).kl,
}
NOT_FLOATING = {"philox_normal", "pack_uint8", "encode_png", "bootstrap_auc"}  # bytes or counts, or made of integers
IN_PLACE = {"solver_step_out", "solver_step_at", "model_sgd", "optimizer_step"}
PACKED = {"winograd_pack"}  # made once of weights and detached
OURS = "no derivative|no backward|not require|must be None where|not be a dual|must not be under torch"


class Module(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, *values):
        return self.function(*values)


def test_every_op_is_tried():
    names = {name.split("::")[1] for name in torch._C._dispatch_get_all_op_names() if name.startswith("kr_fast::")}
    tried = {name.split(",")[0] for name in CASES} | DETACHED.keys() | NOT_FLOATING | IN_PLACE | PACKED
    halves = {"winograd_conv2d_grad_input", "distillation_loss_forward", "qkv_attention_forward"}
    halves |= {"group_norm_silu_forward"}
    halves |= {f"{name.split(',')[0]}_backward" for name in (*ONCE, "distillation_loss")}
    assert names | set(registry.ops()) <= tried | halves


def refused(call: Callable) -> str | None:
    """The message of an error of ours; None if the call returns."""
    try:
        call()
    except GradcheckError:
        raise
    except (RuntimeError, ValueError) as error:
        if not re.search(OURS, str(error)):
            raise
        return str(error)
    return None


@pytest.mark.parametrize("name", CASES)
def test_backward_is_right_or_refused(name):
    found = refused(lambda: gradcheck(CASES[name][0], inputs(name)))
    assert (found is None) == (name not in NEVER)


@pytest.mark.parametrize("name", CASES)
def test_second_derivatives_are_right_or_refused(name):
    function, values = CASES[name][0], inputs(name)
    assert (refused(lambda: gradgradcheck(function, values)) is None) == (name in DIFFERENTIABLE)
    if name in NEVER:
        return

    def penalty():  # of a root, whose upstream gradient requires none
        first = torch.autograd.grad(function(*values).sum(), values, create_graph=True)
        sum(each.square().sum() for each in first).backward()

    assert (refused(penalty) is None) == (name in DIFFERENTIABLE)


@pytest.mark.parametrize("name", CASES)
def test_forward_mode_is_refused(name):
    function = CASES[name][0]
    for which in range(len(inputs(name))):
        values = inputs(name, grad=False)
        with forward_ad.dual_level():
            values[which] = forward_ad.make_dual(values[which], torch.ones_like(values[which]))
            with pytest.raises(RuntimeError, match="must not be a dual tensor"):
                function(*values)
    with forward_ad.dual_level():  # what is not dual is computed as ever
        function(*inputs(name, grad=False))


@pytest.mark.parametrize("name", sorted(CASES.keys() - STATISTICS))
def test_backward_after_export_is_right_or_refused(name):
    values = inputs(name)
    with torch.no_grad():
        exported = torch.export.export(Module(CASES[name][0]), tuple(inputs(name, grad=False))).module()
    found = refused(lambda: gradcheck(exported, values))
    assert (found is None) == (name not in NEVER)
    if name in DIFFERENTIABLE:
        assert gradgradcheck(exported, values)
    elif found is None:
        assert refused(lambda: gradgradcheck(exported, values))
    with forward_ad.dual_level():
        first, *rest = inputs(name, grad=False)
        assert "dual" in refused(lambda: exported(forward_ad.make_dual(first, torch.ones_like(first)), *rest))


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("transform", ["grad", "jacrev", "jvp", "hessian"])
def test_transforms_are_refused(name, transform):
    function, values = CASES[name][0], tuple(inputs(name, grad=False))
    with pytest.raises((RuntimeError, ValueError), match=f"{OURS}|inside vmap"):
        if transform == "jvp":
            torch.func.jvp(function, values, values)
        else:
            getattr(torch.func, transform)(lambda *values: function(*values).sum())(*values)


@pytest.mark.parametrize("name", CASES)
def test_vmap_is_right_or_refused(name):
    function, values = CASES[name][0], inputs(name, grad=False)
    batched = [torch.stack([each, 2 * each]) for each in values]
    try:
        found = torch.func.vmap(function)(*batched)
    except RuntimeError:
        return
    torch.testing.assert_close(found, torch.stack([function(*values), function(*[2 * each for each in values])]))


@pytest.mark.parametrize("name", sorted(DIFFERENTIABLE))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])  # the C++ kernels
def test_hessian_of_a_root_loss(name, dtype):
    function, z = CASES[name][0], inputs(name, grad=False)[0].to(dtype)
    exact = torch.autograd.functional.hessian(lambda z: function(z).sum(), z.double())
    for vectorize in (False, True):
        found = torch.autograd.functional.hessian(lambda z: function(z).sum(), z, vectorize=vectorize)
        torch.testing.assert_close(
            found.double(), exact, rtol=0, atol=4 * torch.finfo(dtype).eps * exact.abs().max().item()
        )
    jacobians = [torch.autograd.functional.jacobian(function, z, vectorize=vectorize) for vectorize in (False, True)]
    torch.testing.assert_close(*jacobians)
    # By differentiating backward in an upstream gradient of 0.
    tangent = torch.autograd.functional.jvp(function, z, torch.arange(12, dtype=dtype).view(3, 4))[1]
    products = jacobians[0].double() * torch.arange(12).view(3, 4)
    atol = 20 * torch.finfo(dtype).eps * products.abs().sum().item()
    torch.testing.assert_close(tangent.double(), products.sum((-2, -1)), rtol=0, atol=atol)


def test_rows_that_do_not_count_have_no_second_derivative():
    z = randn(3, 4)
    z[1] = float("nan")
    for options in (
        {"sample_weight": torch.tensor([1.0, 0, 1])},
        {"labels": torch.tensor([0, -100, 1]), "hard_weight": 0.5},
    ):
        found = torch.autograd.functional.hessian(lambda z, options=options: distillation_loss(z, T, **options), z)
        kept = {name: value[[0, 2]] if isinstance(value, torch.Tensor) else value for name, value in options.items()}
        wanted = torch.autograd.functional.hessian(
            lambda z, kept=kept: distillation_loss(z, T[[0, 2]], **kept), z[[0, 2]]
        )
        assert found[1].abs().max() == 0
        torch.testing.assert_close(found[[0, 2]][:, :, [0, 2]], wanted)


@pytest.mark.parametrize("name", sorted(DETACHED))
def test_what_is_without_autograd_by_its_documentation(name):
    z = randn(3, 4).requires_grad_()
    assert not DETACHED[name](z).requires_grad
    exported = torch.export.export(Module(DETACHED[name]), (z.detach(),)).module()
    torch.testing.assert_close(exported(z.detach()), DETACHED[name](z))
    with pytest.raises(RuntimeError, match="does not require grad|no derivative"):
        exported(z).sum().backward()
    with forward_ad.dual_level(), pytest.raises(RuntimeError, match="must not be a dual tensor"):
        DETACHED[name](forward_ad.make_dual(z.detach(), z.detach()))


def test_packed_weights_are_detached():
    assert not winograd_pack(randn(4, 4, 3, 3).requires_grad_()).requires_grad


def test_a_weight_that_learns_is_refused():
    with pytest.raises(ValueError, match="sample_weight must not require a gradient"):
        distillation_loss(T, T, sample_weight=torch.ones(3, requires_grad=True))


def in_place(name: str, value: torch.Tensor) -> None:
    """``value`` is read and ``out`` written into."""
    out = torch.zeros_like(value)
    if name == "model_sgd":
        model_sgd(out.view(-1), torch.zeros(8), value.view(-1), torch.ones(1), torch.zeros(1), [8], [0.0])
    elif name == "solver_step_out":
        solver_step(out, value, ROW, ids=torch.arange(2), out=SolverOutput(sample=out))
    else:
        table = DeviceTable.build([ROW], [()], "cpu")
        samples, kept = table.ring_buffers(value.shape)
        solver_step_at(table, torch.zeros(1, dtype=torch.int64), samples, kept, value, ids=torch.arange(2))


@pytest.mark.parametrize("name", sorted(IN_PLACE))
def test_what_writes_into_its_arguments(name):
    value = torch.randn(2, 1, 2, 2)
    in_place(name, value)
    with pytest.raises((RuntimeError, ValueError), match="no derivative|not require grad"):
        in_place(name, value.clone().requires_grad_())
    with forward_ad.dual_level(), pytest.raises(RuntimeError, match="must not be a dual tensor"):
        in_place(name, forward_ad.make_dual(value, value))


def test_a_backward_notices_what_was_written():
    x, out = torch.randn(1, 1, 2, 2), torch.zeros(1, 1, 2, 2)
    squared = out.requires_grad_(False) * torch.ones(1, requires_grad=True)
    solver_step(x, x, SolverRow(sample=1.0), out=SolverOutput(sample=out))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        squared.sum().backward()


@pytest.mark.parametrize("name", CASES)
def test_inputs_of_inference_mode(name):
    """Teachers are run under ``torch.inference_mode``; of what learns, the other inputs may come from there."""
    function, values = CASES[name][0], inputs(name)
    with torch.inference_mode():
        frozen = [each.detach().clone() for each in values]
        wanted = function(*frozen)
    torch.testing.assert_close(function(*frozen), wanted)
    if name in NEVER:
        return
    for which, value in enumerate(values):
        given = [*frozen]
        given[which] = value
        (found,) = torch.autograd.grad(function(*given).sum(), value)
        torch.testing.assert_close(found, torch.autograd.grad(function(*values).sum(), value)[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16])  # in one pass, the reference, in two
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_a_teacher_of_inference_mode(dtype, reduction):
    with torch.inference_mode():
        frozen = [each.clone() for each in (T, Y, torch.rand(3), P, VALUES, INDICES)]
    grads = []
    for t, y, w, p, values, indices in (frozen, [each.clone() for each in frozen]):
        z = inputs("dkd_loss", grad=False)[0].to(dtype).requires_grad_()
        options = {"labels": y, "sample_weight": w, "reduction": reduction, "hard_weight": 0.5}
        total = distillation_loss(z, t, **options).sum() + dkd_loss(z, t, **options).sum()
        total = total + distillation_loss_topk(z, values, indices, **options).sum() + soft_cross_entropy(z, p)
        total = total + distillation_loss(z, t, standardize=True)
        grads.append(torch.autograd.grad(total, z)[0])
    assert torch.equal(*grads)


def test_jit_trace_is_refused_in_words():
    with pytest.raises(RuntimeError, match=r"must not be under torch.jit.trace; use torch.export or torch.compile"):
        torch.jit.trace(lambda z: distillation_loss(z, T), T)
    with pytest.raises(RuntimeError, match=r"solver_step: the call must not be under torch.jit.trace"):
        x = torch.randn(1, 1, 2, 2)
        torch.jit.trace(lambda x: solver_step(x, x, SolverRow(sample=1.0)), x)
    traced = torch.jit.trace(DETACHED["distillation_metrics"], 3 * T)
    torch.testing.assert_close(traced(2 * T), DETACHED["distillation_metrics"](2 * T))
