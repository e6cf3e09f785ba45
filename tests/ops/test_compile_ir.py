"""What the first pass of Triton's compiler takes and makes, in a tenth of the time of a compilation.

Integers of 1 become constants of the compilation, which have no methods: one image, images of one pixel, one record.
"""

import importlib
import re

import pytest
import torch
from triton_compile import read

from kr_fast.backends.arguments import BatchNorm, BatchNormGradient, ConvOptions, GroupNormGradient, Sgd
from kr_fast.backends.privacy_arguments import ConvGradients, GroupNormGradients

pytestmark = pytest.mark.compile

FLOATS = (
    "eps low high temperature alpha beta soft hard smoothing guidance x0_sample x0_model clip c_sample c_model c_x0 "
    "c_noise next_input keep0 keep1 keep2 c0 c1 c2 c3"
)
ONES = (
    "n input_stride target_stride upstream_stride ignore_index stride total numel batch blocks pixels x_channels "
    "skip_channels shift_stride images height width in_height in_width out_height out_width class_height class_width "
    "tiles rows span parts x_row x_pixel x_channel grad_row grad_pixel grad_channel"
)
TYPES = dict.fromkeys(FLOATS.split(), "fp32") | dict.fromkeys(("seed", "stream"), "i64")
TYPES |= dict.fromkeys(("labels", "indices", "ids", "table"), "*i64") | {"image": "*u8"}
FLAGS = (
    "HAS_SKIP HAS_SHIFT HAS_WEIGHT HAS_BIAS HAS_LABELS SILU RELU BIAS WHOLE SOFT HARD MEAN CLEAN NOISY PHI LOSS "
    "ENTROPY MODIFIED CONFIDENCE CORRECT"
)
SHAPES = "C OUT KH KW SH SW DH DW SIZE SPAN GROUPS ALL P PACKED ROWS ALIGN US IS VS JS K"
ZEROS = "PH PW A B U0 I0 NU V0 J0 NV KIND DIVERGENCE"
CONSTANTS = dict.fromkeys((*ONES.split(), *SHAPES.split()), 1) | dict.fromkeys(FLAGS.split(), True)
CONSTANTS |= dict.fromkeys(ZEROS.split(), 0)
CONSTANTS |= dict.fromkeys(("INTERPRET", "ROUND", "SHARED", "SMOOTH", "LAST"), False) | {"COPIES": 2, "CHANNELS": 3}
CONSTANTS |= {"BM": 16, "BN": 16, "BK": 16, "BC": 16, "BLOCK": 16, "STAGES": 2, "PRECISION": "ieee", "ACT": "relu"}
TILED = {"C": 4, "BLOCK": 4}  # rows of logits in registers
SWEPT = {"C": 64, "BLOCK": 4}  # and not
PIXELS = {"P": 16}  # of a tile of rows of channels
VIEW = dict.fromkeys(("rows", "columns", "scale", "shift"))  # none
KERNELS = [
    *[("distillation.distillation_loss", name, TILED | {"K": 0, "DIVERGENCE": divergence})
      for name in ("forward_kernel", "backward_kernel") for divergence in (0, 2)],
    *[("distillation.distillation_loss", name, TILED | {"KIND": 1}) for name in ("forward_kernel", "backward_kernel")],
    ("distillation.distillation_loss", "reduce_kernel", {}),
    *[("distillation.distillation_metrics", "metrics_kernel", each) for each in (TILED, SWEPT)],
    *[("membership.membership_signals", "signals_kernel", each) for each in (TILED, SWEPT)],
    ("sampling.philox_normal", "normals", {}),
    ("sampling.pack_uint8", "pack", {}),
    ("sampling.solver_step", "step", {}),
    ("nn.group_norm_silu", "norm_kernel", {}),
    ("nn.group_norm_silu_backward", "gradient_kernel", {}),
    *[("privacy.group_norm_grad_norms", "channel_sums", dict.fromkeys(absent))
      for absent in (["norms"], ["weight_samples", "bias_samples"])],
    *[("privacy.conv2d_grad_norms", "weight_gradients", dict.fromkeys(absent))
      for absent in (["norms"], ["samples", "bias_samples"])],
    ("batched.model_conv2d", "dense", VIEW | {"models": 1}),
    ("batched.model_conv2d", "depthwise", VIEW),
    *[("batched.model_conv2d_backward", name, {}) for name in ("input_gradient", "weight_gradient", "add_parts")],
    *[("batched.model_batch_norm", name, PIXELS)
      for name in ("moments", "merge_moments", "normalize", "sums", "merge_sums", "input_gradient")],
]  # fmt: skip


@pytest.mark.parametrize(("module", "name", "more"), KERNELS, ids=lambda each: each if isinstance(each, str) else "")
def test_integers_of_1_compile(module, name, more):
    pytest.importorskip("triton")
    function = getattr(importlib.import_module(f"kr_fast.kernels.{module}"), name)
    read(function, dict.fromkeys(function.arg_names, "*fp32") | TYPES, CONSTANTS | more)


@pytest.mark.parametrize("models", [2**6, 2**16])
def test_weights_beyond_2_to_31_have_wide_offsets(models):
    """Of models that share their input a program's columns are filters of any of them: 2^15 numbers a model here."""
    pytest.importorskip("triton")
    from kr_fast.kernels.batched.model_conv2d import dense

    constants = CONSTANTS | VIEW | {"models": models, "SHARED": True, "OUT": 64, "C": 512}
    text = read(dense, dict.fromkeys(dense.arg_names, "*fp32") | TYPES, constants)
    assert bool(re.search(r"arith\.muli .*tensor<1x16xi64>", text)) == (models == 2**16)


def test_every_launch_says_whether_products_are_fused_with_sums(monkeypatch):
    """Triton 3.9 warns where it is left open, and 3.10 will not fuse there."""
    triton = pytest.importorskip("triton")
    from kr_fast.kernels.batched import model_batch_norm, model_conv2d, model_conv2d_backward, model_sgd
    from kr_fast.kernels.nn import group_norm_silu_backward
    from kr_fast.kernels.privacy import conv2d_grad_norms, group_norm_grad_norms

    said = {}

    def record(function, *arguments, grid, warmup, **options):
        said[function.fn.__module__.split(".")[-1], function.fn.__name__] = options.get("enable_fp_fusion")

    monkeypatch.setattr(triton.JITFunction, "run", record)
    x, weight, rates = torch.ones(1, 2, 4, 4, 4), torch.ones(1, 4, 1, 1, 4), torch.ones(1)
    vectors, images = [torch.ones(1, 4)] * 2, torch.ones(2, 4, 4, 4)
    model_conv2d.model_conv2d(x, weight, None, None, None, ConvOptions())
    model_conv2d.model_conv2d(x, weight[..., :1], None, None, None, ConvOptions(groups=4))
    model_conv2d_backward.model_conv2d_backward(x, x, weight, ConvOptions(), (True, True, True))
    model_batch_norm.forward(BatchNorm(x, None, None, None, True, 1e-5))
    model_batch_norm.backward(BatchNormGradient(x, x, x, None, *vectors, True, False, 1e-5))
    model_sgd.model_sgd(Sgd(*[rates] * 5, (1,), (0.0,)), *model_sgd.layout(1, (1,), (0.0,), torch.device("cpu")))
    group_norm_silu_backward.backward(
        GroupNormGradient(images, images, None, None, None, None, *[torch.ones(2, 2)] * 2, 2, True)
    )
    pairs = [(1, 1), (1, 1), (0, 0), (1, 1)]
    conv2d_grad_norms.conv2d_grad_norms(ConvGradients(images, images, *pairs, 1, True, 1))
    group_norm_grad_norms.group_norm_grad_norms(GroupNormGradients(images, images, 2, 1e-5, 1))
    assert len(said) == 15
    assert set(said.values()) == {True}
