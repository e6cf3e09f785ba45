"""Every op in what others run around it: torch's compiler, autocast, DDP, FSDP2, CUDA graphs and exported programs.

How ``torch.export`` traces is in test_derivatives.py, and what one op alone does in its own file.
"""

import importlib
import pkgutil
import runpy
import subprocess
import sys
from pathlib import Path

import op_calls
import pytest
import torch
from op_calls import CASES, NEVER, STATISTICS, inputs

import kr_fast
import kr_fast.ops
from kr_fast.backends import registry
from kr_fast.ops.batched.model_sgd import model_sgd
from kr_fast.ops.sampling.solver_step import SolverOutput, SolverRow, solver_step
from kr_fast.ops.sampling.solver_step_at import DeviceTable, solver_step_at
from kr_fast.runtime.cuda_graph import capture

IN_GRAPHS = sorted(CASES.keys() - STATISTICS)  # of what is in the dispatcher
# Of each op one case that learns and one that does not: more of them cost seconds of a C++ compiler.
IN_ONE_GRAPH = list({(name.split(",")[0], name in NEVER): name for name in reversed(IN_GRAPHS)}.values())
TABLE = DeviceTable.build([SolverRow(sample=0.5, model=0.25)], [()], "cpu")


def float32(name):
    """The inputs of a case: images in channels_last, and with a gradient where the op has one."""
    values = [each.float() for each in inputs(name, grad=False)]
    images = [each.ndim == 4 and len(each) <= 2 and each.shape[2:] != (3, 3) for each in values]
    values = [op_calls.last(each) if image else each for each, image in zip(values, images, strict=True)]
    return [each.requires_grad_(name not in NEVER) for each in values]


def without_derivative(z, image, weight):
    """The ops whose inputs are no floating-point numbers, that write into their arguments, or that keep no gradient."""
    loss, grad = kr_fast.distillation_loss_and_grad(z, 2 * z)
    metrics = kr_fast.distillation_metrics(z, 2 * z)
    stepped = torch.zeros_like(image)
    solver_step(image, image, SolverRow(sample=0.5, model=0.25), out=SolverOutput(sample=stepped))
    samples, kept = TABLE.ring_buffers(image.shape)
    samples = samples + image
    solver_step_at(TABLE, torch.zeros(1, dtype=torch.int64), samples, kept, image)
    trained, velocity, ones = weight.flatten() + 0, torch.zeros(weight.numel()), torch.ones(1)
    model_sgd(trained, velocity, weight.flatten(), ones, 0.5 * ones, [weight.numel()], [0.0])
    noise = kr_fast.philox_normal(torch.arange(3), (2, 3), seed=4)
    pixels = kr_fast.pack_uint8(image)
    png, packed = kr_fast.encode_png(pixels), kr_fast.winograd_pack(weight)
    return [loss, grad, metrics.kl, stepped, samples, trained, velocity, noise, pixels, png, packed]


# The package first, as sorted imports have it; then the ops, each of which would load those that its file imports.
OPENS = """
import kr_fast, sys, torch
inputs, expected = torch.load(sys.argv[1] + ".pt")
assert torch.equal(torch.export.load(sys.argv[1]).module()(*inputs), expected)
for name in sys.argv[2:]:
    assert getattr(torch.ops.kr_fast, name).default
assert not hasattr(torch.ops.kr_fast, "no_such_op")
"""


class Distils(torch.nn.Module):
    def forward(self, z, target):
        return kr_fast.distillation_loss(z, target)


def test_an_exported_program_opens_where_only_the_package_was_imported(tmp_path):
    """torch finds no op that is not registered, and ours are not before they are first used."""
    for module in pkgutil.walk_packages(kr_fast.ops.__path__, "kr_fast.ops."):
        importlib.import_module(module.name)
    schemas = [schema.name.partition("::") for schema in torch._C._jit_get_all_schemas()]
    names = sorted({name for library, _, name in schemas if library == "kr_fast"}, reverse=True)
    assert len(names) > 40
    inputs = torch.randn(2, 3), torch.randn(2, 3)
    torch.save((inputs, Distils()(*inputs)), f"{tmp_path / 'loss.pt2'}.pt")
    torch.export.save(torch.export.export(Distils(), inputs), tmp_path / "loss.pt2")
    subprocess.run([sys.executable, "-c", OPENS, str(tmp_path / "loss.pt2"), *names], check=True)


def test_all_in_one_compiled_graph():
    """By inductor, values and gradients: one graph costs a hundredth of one for each op."""
    leaves = {name: float32(name) for name in IN_ONE_GRAPH}
    plain = torch.randn(3, 4), torch.randn(2, 3, 4, 4), torch.randn(4, 3, 3, 3)

    def everything(leaves, plain):
        return [CASES[name][0](*leaves[name]) for name in IN_ONE_GRAPH], without_derivative(*plain)

    compiled = torch.compile(everything, fullgraph=True, dynamic=False)
    results = []
    for function in (everything, compiled):
        outputs, others = function(leaves, plain)
        learns = [(out, leaves[name]) for name, out in zip(IN_ONE_GRAPH, outputs, strict=True) if name not in NEVER]
        inner = [leaf for _, each in learns for leaf in each]
        grads = torch.autograd.grad([out for out, _ in learns], inner, [torch.ones_like(out) for out, _ in learns])
        results.append([*(out.detach() for out in outputs), *others, *grads])
    for eager, found in zip(*results, strict=True):
        torch.testing.assert_close(found, eager)
        assert found.stride() == eager.stride()


@pytest.mark.parametrize("backend", [None, "reference"])
@pytest.mark.parametrize("name", IN_GRAPHS)
def test_autocast_changes_nothing(name, backend):
    """An op computes in the precision of its arguments, forward and backward."""
    function, results = CASES[name][0], []
    for enabled in (False, True):
        values = float32(name)
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled), registry.forced(backend):
            out = function(*values)
            assert out.dtype == torch.float32
            results.append([out, *([] if name in NEVER else torch.autograd.grad(out.sum(), values))])
    for plain, under_autocast in zip(*results, strict=True):
        assert torch.equal(under_autocast, plain)


# Of layers under autocast, whose outputs are bfloat16 beside weights in float32; all others take float32 alone.
TAKES_BFLOAT16 = {"distillation_loss", "distillation_loss_topk", "soft_cross_entropy", "dkd_loss", "qkv_attention"}
TAKES_BFLOAT16 |= {"batch_norm_act", "group_norm_silu", "membership_signals", "solver_step"}
TAKES_BFLOAT16 |= {f"conv2d_grad_{what}" for what in ("norms", "samples")}
TAKES_BFLOAT16 |= {f"linear_grad_{what}" for what in ("norms", "samples")}
TAKES_BFLOAT16 |= {f"{layer}_grad_norms" for layer in ("embedding", "group_norm", "layer_norm")}
TAKES_BFLOAT16 |= {f"{layer}_grad_samples" for layer in ("group_norm", "layer_norm")}


@pytest.mark.parametrize("name", [name for name in IN_GRAPHS if "model_" not in name])
def test_activations_of_autocast(name):
    """They are taken, or refused in words."""
    op, values = name.split(",")[0], float32(name)
    activations = [0]
    if op in ("batch_norm_act", "group_norm_silu"):
        activations = [n for n, each in enumerate(values) if each.ndim == 4]  # with the residual, the skip connection
    elif op == "solver_step":
        activations = range(1, len(values))  # what the network predicts
    for n in activations:
        values[n] = values[n].detach().bfloat16().requires_grad_(name not in NEVER)
    if op not in TAKES_BFLOAT16:
        with pytest.raises((TypeError, ValueError), match="bfloat16"):
            CASES[name][0](*values)
        return
    exact = CASES[name][0](*(each.float() for each in values))
    torch.testing.assert_close(CASES[name][0](*values).float(), exact, rtol=2**-6, atol=2**-6)


def test_distributed_training(tmp_path):
    """Every op that trains, and the optimizer, under DDP and FSDP2 with and without autocast: see two_ranks.py."""
    script = Path(__file__).with_name("two_ranks.py")
    command = [sys.executable, str(script)]
    ranks = [subprocess.Popen([*command, str(r), str(tmp_path)], stderr=subprocess.PIPE, text=True) for r in range(2)]
    errors = [rank.communicate()[1] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], "\n".join(errors)


GRAPHED = [name for name in IN_GRAPHS if any(registry.has(name.split(",")[0], b) for b in ("cuda", "triton"))]


@pytest.mark.gpu
@pytest.mark.parametrize("name", GRAPHED)
def test_a_captured_graph_repeats(name):
    """Forward and backward in one CUDA graph, replayed on other inputs, are what eager calls give."""
    with torch.device("cuda"):
        function = runpy.run_path(op_calls.__file__)["CASES"][name][0]
        values = [each.cuda().requires_grad_(name not in NEVER) for each in float32(name)]
        results = []

        def run():
            out = function(*values)
            results[:] = [out, *([] if name in NEVER else torch.autograd.grad(out.sum(), values))]

        graph = capture(run)
        held = list(results)
        with torch.no_grad():
            for each in values:
                each.mul_(0.5)
        run()
        graph.replay()
        for found, eager in zip(held, results, strict=True):
            torch.testing.assert_close(found, eager)
