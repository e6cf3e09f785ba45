"""Structs that the compiled modules take by the names of their fields."""

import pytest
import torch

from kr_fast.backends import native, structs
from kr_fast.backends.arguments import GroupNorm, SolverOutput, SolverRow, SolverStep

pytest.importorskip("kr_fast._cpu", reason="kr_fast._cpu is not built")


X = torch.randn(1, 4, 2, 2).contiguous(memory_format=torch.channels_last)
Y = torch.zeros_like(X)


def norm():
    return structs.group_norm(GroupNorm(X, None, None, None, None, 2, 1e-5, True), Y)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"groups": None}, "'NoneType' object cannot be interpreted as an integer"),
        ({"pixel": 1}, "GroupNorm has no field pixel"),
        ({"eps": "1"}, "must be real number, not str"),
    ],
)
def test_a_wrong_field_is_named(change, text):
    with pytest.raises(TypeError, match=text):
        native.cpu.group_norm_silu(norm() | change, 1)


@pytest.mark.parametrize("name", norm())
def test_every_field_is_needed(name):
    fields = norm()
    del fields[name]
    with pytest.raises(TypeError, match=f"GroupNorm needs {name}$"):
        native.cpu.group_norm_silu(fields, 1)


def test_fields_in_any_order():
    native.cpu.group_norm_silu(norm(), 1)
    expected = Y.clone()
    Y.zero_()
    native.cpu.group_norm_silu(dict(reversed(norm().items())), 1)
    assert torch.equal(Y, expected)


@pytest.mark.parametrize("count", [10, 16])
def test_a_row_of_another_length_is_refused(count):
    x, out = torch.zeros(1, 4), SolverOutput(torch.zeros(1, 4))
    step = SolverStep(x, x, None, None, None, [], SolverRow(), 1.0, 0, 0, 1, out)
    fields = structs.solver_step(step, channels_last=False) | {"row": [0.0] * count}
    with pytest.raises(TypeError, match="row must hold 11 to 15 numbers"):
        native.cpu.solver_step(fields, 1)
