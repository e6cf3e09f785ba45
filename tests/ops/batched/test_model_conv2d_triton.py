"""The Triton kernels of model_conv2d: numbers in Triton's interpreter.

The cases are those of tests/support/batched_cases.py, with the regime beside each.
"""

import dataclasses
import os

import pytest
import torch
from batched_cases import ACTIVATIONS, CONV_CASES, ConvCase, conv_inputs, exact_conv

from kr_fast.backends import registry
from kr_fast.backends.arguments import View
from kr_fast.ops.batched.model_conv2d import model_conv2d

interpreted = os.environ.get("TRITON_INTERPRET") == "1"
interpreter = [
    pytest.mark.interpreter,
    pytest.mark.skipif(not interpreted, reason="needs TRITON_INTERPRET=1"),
]
# One unit of the dtype, and float32's sums of up to 576 products of order 1.
UNITS = {torch.float32: 2**-21, torch.bfloat16: 2**-8, torch.float16: 2**-11}


def triton(*inputs, **options):
    with registry.forced("triton"):
        return model_conv2d(*inputs, **options)


class TestInterpreter:
    pytestmark = interpreter

    @pytest.mark.parametrize("dtype", UNITS, ids=str)
    @pytest.mark.parametrize("case", CONV_CASES, ids=str)
    def test_against_float64(self, case, dtype):
        inputs = conv_inputs(case, dtype)
        got = triton(*inputs, **case.options())
        assert got.dtype == dtype
        torch.testing.assert_close(got.double(), exact_conv(inputs, case), rtol=1.01 * UNITS[dtype], atol=1e-5)

    @pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
    @pytest.mark.parametrize("groups", [1, 8])
    def test_activations(self, activation, groups):
        case = ConvCase(channels=8, outputs=8, groups=groups, residual=True)
        inputs = conv_inputs(case, torch.float32)
        for scale in (1e-3, 1, 30):  # about 0, where quotients lose digits; and far away
            scaled = [each * scale for each in inputs]
            scaled[1] = inputs[1]
            want = exact_conv(scaled, case, activation=activation)
            got = triton(*scaled, **case.options(), activation=activation)
            torch.testing.assert_close(got.double(), want, rtol=2e-6, atol=1e-6 * scale)

    def test_nan_goes_through(self):
        case = ConvCase(channels=8, outputs=8)
        x, weight, bias, _ = conv_inputs(case, torch.float32)
        bias[0, 0] = float("nan")
        for activation in ACTIVATIONS:
            got = triton(x, weight, bias, activation=activation)
            assert got[0, ..., 0].isnan().all()
            assert got.isnan().sum() == got[0, ..., 0].numel()

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
    @pytest.mark.parametrize("kernel", [1, 3])
    @pytest.mark.parametrize("groups", [1, 3])
    def test_views_read_bytes(self, dtype, kernel, groups):
        generator = torch.Generator().manual_seed(0)
        images = torch.randint(0, 256, (1, 3, 9, 8, 3), generator=generator, dtype=torch.uint8)
        rows = torch.tensor([1, 1, 0, 5, 8], dtype=torch.int32)
        columns = torch.tensor([7, 6, 5, 4, 3, 2, 2], dtype=torch.int32)
        view = View(rows, columns, torch.tensor([0.01, 0.02, 0.03]), torch.tensor([-1.0, 2.0, 0.5]))
        weight = torch.randn(3, 6, kernel, kernel, 3 // groups, generator=generator).to(dtype)
        options = {"padding": kernel // 2, "stride": (2, 1), "groups": groups}
        with registry.forced("reference"):
            want = model_conv2d(images, weight, view=view, **options)
        torch.testing.assert_close(triton(images, weight, view=view, **options), want, rtol=UNITS[dtype], atol=1e-5)

    @pytest.mark.parametrize("case", [CONV_CASES[1], CONV_CASES[4], CONV_CASES[11]], ids=str)
    def test_bits_do_not_follow_company(self, case):
        """Images and models in another order and number, and every tile shape: other tiles, other neighbours."""
        case = dataclasses.replace(case, models=3, images=5)
        x, weight, bias, residual = conv_inputs(case, torch.float16)
        want = triton(x, weight, bias, residual, **case.options())
        order = torch.tensor([2, 0])
        mine = None if residual is None else residual[order][:, 1:4].contiguous()
        few = x[:, 1:4].contiguous() if case.shared else x[order][:, 1:4].contiguous()
        got = triton(few, weight[order], bias[order], mine, **case.options())
        assert torch.equal(got, want[order][:, 1:4])
        for config in (1, 2):
            assert torch.equal(triton(x, weight, bias, residual, **case.options(), config=config), want)

    def test_no_images(self):
        assert triton(torch.zeros(2, 0, 6, 6, 5), torch.zeros(2, 4, 3, 3, 5)).shape == (2, 0, 4, 4, 4)

    def test_other_groups_are_refused(self):
        with pytest.raises(RuntimeError, match="groups must be 1 or the input's channels"):
            triton(torch.zeros(1, 1, 4, 4, 4), torch.zeros(1, 4, 3, 3, 2), groups=2)
