"""Steps whose forward is computed in less than float32: what is summed is what was clipped, in float32."""

import pytest
import torch
from private_cases import clipped, error, gradients, losses, network
from torch import nn

from kr_fast.backends import exact
from kr_fast.backends.privacy_arguments import ConvGradients, LinearGradients
from kr_fast.ops.privacy import reference
from kr_fast.privacy import make_private

RECORDS = 65  # of one direction: in bfloat16 their sum has steps of half a record
LAYERS = {
    "linear": (lambda: nn.Linear(40, 30), (40,)),
    "positions": (lambda: nn.Linear(60, 60), (4, 60)),  # fewer values in x and dy than parameters
    "winograd": (lambda: nn.Conv2d(16, 24, 3, padding=1), (16, 4, 4)),
    "strided": (lambda: nn.Conv2d(16, 24, 3, padding=1, stride=2), (16, 4, 4)),
    "bias": (lambda: nn.Conv2d(2, 8, 3), (2, 4, 4)),
}


def private_of(model):
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    return make_private(model, optimizer, noise_multiplier=0.0, expected_batch_size=1.0)


@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("name", LAYERS)
def test_sensitivity_under_autocast(name, inside):
    """One record moves the sum by the bound at most, with the backward inside of autocast or behind it."""
    torch.manual_seed(0)
    make, shape = LAYERS[name]
    model, x = make(), torch.randn(1, *shape).expand(RECORDS, *shape).contiguous()
    if name == "bias":
        model.weight.requires_grad_(False)
    private = private_of(model)
    fresh, sums = private.state_dict(), []
    for present in (torch.ones(RECORDS, dtype=torch.bool), torch.arange(RECORDS) > 0):
        private.load_state_dict(fresh)
        with torch.autocast("cpu", torch.bfloat16):
            loss = 3 * model(x).float().flatten(1).sum(1)
            if inside:
                private.backward(loss, present=present)
        if not inside:
            private.backward(loss, present=present)
        sums.append(private.state_dict()["sums"].double())
    assert float((sums[0] - sums[1]).norm()) == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize("name", ["tokens", "images"])
def test_sums_under_autocast(name):
    """Near those of float64: layers read bfloat16 and float32 in turn."""
    model, x, labels = network(name)
    exactly = x.double() if x.is_floating_point() else x
    rows = gradients(model, lambda twin, b: losses(twin, exactly[b : b + 1], labels[b : b + 1])[0], 6)
    private = private_of(model)
    with torch.autocast("cpu", torch.bfloat16):
        of_rows = losses(model, x, labels)
    private.backward(of_rows)
    assert error(private.state_dict()["sums"], clipped(rows, "flat", 1.0)) < 0.05


def test_autocast_around_the_whole_loop_reads_new_weights():
    model, x, labels = network("images")
    private = private_of(model)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        for _ in range(2):
            with torch.enable_grad():
                private.backward(losses(model, x, labels))
            private.step()
        inside = model(x)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        assert torch.equal(model(x), inside)


@pytest.mark.parametrize("op", ["linear", "conv2d"])
def test_references_multiply_in_float32_whatever_is_allowed(op, monkeypatch):
    """On a GPU torch may take TF32 for float32: a norm that is too small would let a record pass the bound."""
    seen, einsum = [], torch.einsum

    def noted(*arguments):
        seen.extend(getattr(where, name) == value for where, name, value in exact._settings())
        return einsum(*arguments)

    monkeypatch.setattr(torch, "einsum", noted)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        if op == "linear":
            reference.linear_grad_norms(LinearGradients(torch.randn(3, 2, 4), torch.randn(3, 2, 5), False, 1))
        else:
            call = torch.randn(3, 2, 4, 4), torch.randn(3, 5, 4, 4)
            pairs = (3, 3), (1, 1), (1, 1), (1, 1)
            reference.conv2d_grad_norms(ConvGradients(*call, *pairs, 1, True, 1))
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)
    assert seen
    assert all(seen)


def test_products_of_float32_are_not_rounded():
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        with exact.float32_products():
            for where, name, value in exact._settings():
                assert getattr(where, name) == value
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)
