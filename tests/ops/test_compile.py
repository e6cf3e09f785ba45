"""Triton kernels compiled for GPUs that are not there: no register spills, wide loads, the instructions meant."""

import re

import pytest
import triton_compile
from triton_compile import inexact_instructions, spilled_bytes, widest_load

from kr_fast.ops.membership.membership_signals import SIGNALS

pytest.importorskip("triton")
pytestmark = pytest.mark.compile
DTYPES = ("fp32", "bf16", "fp16")


@pytest.fixture(params=[80, 90, 100])
def capability(request):
    return request.param


@pytest.fixture
def build(capability, tmp_path, monkeypatch):
    """``triton_compile.build`` for each capability; of the result no more bytes are spilled than said."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))

    def built(function, *arguments, spills=0, **options):
        result = triton_compile.build(function, *arguments, capability=capability, **options)
        assert spilled_bytes(result) <= spills, (function, arguments, options)
        return result

    return built


# ---------------------------------------------------------------- distillation

LOSS_POINTERS = {
    "forward_kernel": ("input", "target", "indices", "labels", "weight", "row_loss", "row_weight", "stats"),
    "backward_kernel": ("upstream", "input", "target", "indices", "labels", "weight", "stats", "scale", "grad"),
}
LOSS_INTEGERS = ("n", "input_stride", "target_stride", "upstream_stride", "ignore_index")


@pytest.mark.parametrize("name", LOSS_POINTERS)
@pytest.mark.parametrize(
    ("classes", "dtype", "topk", "divergence"),
    [
        (10, "fp32", False, 0),
        (100, "fp32", False, 0),
        (1000, "bf16", False, 0),
        (1000, "fp32", False, 0),
        (4096, "bf16", False, 0),
        (128_256, "bf16", False, 0),  # vocabularies are walked in the same blocks, so they must not spill either
        (128_256, "fp32", False, 0),
        (50_257, "bf16", False, 0),  # odd rows
        (128_256, "bf16", False, 2),
        (1000, "bf16", True, 0),
        (1000, "bf16", False, 2),
    ],
)
def test_distillation_loss(build, name, classes, dtype, topk, divergence):
    from kr_fast.kernels.distillation import distillation_loss as kernels

    rows, block, warps = kernels.tile(classes)
    constants = {
        "C": classes, "ROWS": rows, "BLOCK": block, "ALIGN": kernels.alignment(classes), "HAS_LABELS": True,
        "HAS_WEIGHT": False, "DIVERGENCE": divergence, "SOFT": True, "HARD": True, "weight": None,
    }  # fmt: skip
    constants |= {"KIND": 1, "K": 5, "SMOOTH": True} if topk else {"KIND": 0, "K": 0, "SMOOTH": False, "indices": None}
    function = getattr(kernels, name)
    signature = dict.fromkeys(function.arg_names, "fp32") | dict.fromkeys(LOSS_POINTERS[name], "*fp32")
    signature |= dict.fromkeys(LOSS_INTEGERS, "i32") | dict.fromkeys(("input", "target", "grad"), f"*{dtype}")
    signature |= {"labels": "*i64", "indices": "*i64"}
    aligned = ("input_stride", "target_stride") if classes % 16 == 0 else ()
    built = build(function, signature, constants, warps=warps, aligned=aligned)
    if classes >= 100 and classes % 2 == 0 and not topk and divergence == 0:
        assert widest_load(built) == 16


def test_reduction_of_the_loss(build):
    from kr_fast.kernels.distillation import distillation_loss as kernels

    signature = dict.fromkeys(("row_loss", "row_weight", "loss", "scale"), "*fp32") | {"n": "i32"}
    build(kernels.reduce_kernel, signature, {"MEAN": True, "BLOCK": kernels.REDUCE_BLOCK}, warps=8)


BY_CLASSES = [(10, "fp32"), (100, "fp32"), (1000, "fp32"), (1000, "bf16"), (2048, "bf16"), (128_256, "bf16")]


@pytest.mark.parametrize(("classes", "dtype"), [*BY_CLASSES, (4096, "bf16")])
def test_distillation_metrics(build, classes, dtype):
    from kr_fast.kernels.distillation import distillation_metrics as kernels

    rows, block, warps = kernels.tile(classes)
    signature = {"input": f"*{dtype}", "target": f"*{dtype}", "labels": "*i64", "temperature": "fp32", "n": "i32"}
    signature["ignore_index"] = "i32"
    signature |= dict.fromkeys(("kl", "teacher_confidence", "teacher_entropy", "cross_entropy"), "*fp32")
    signature |= dict.fromkeys(("agreement", "student_correct", "teacher_correct"), "*i1")
    signature |= dict.fromkeys(("input_stride", "target_stride"), "i32")
    constants = {"C": classes, "ROWS": rows, "BLOCK": block, "HAS_LABELS": True, "ALIGN": kernels.alignment(classes)}
    aligned = ("input_stride", "target_stride") if classes % 16 == 0 else ()
    built = build(kernels.metrics_kernel, signature, constants, warps=warps, aligned=aligned)
    if classes >= 100:
        assert widest_load(built) == 16


# ---------------------------------------------------------------- membership


@pytest.mark.parametrize(("classes", "dtype"), BY_CLASSES)
def test_membership_signals(build, classes, dtype):
    from kr_fast.kernels.membership import membership_signals as kernels

    rows, block, warps = kernels.tile(classes)
    signature = {"logits": f"*{dtype}", "labels": "*i64", "n": "i32", "stride": "i32"} | dict.fromkeys(SIGNALS, "*fp32")
    requested = dict.fromkeys(("PHI", "LOSS", "ENTROPY", "MODIFIED", "CONFIDENCE", "CORRECT"), True)
    constants = {"C": classes, "ROWS": rows, "BLOCK": block, "ALIGN": kernels.alignment(classes), **requested}
    aligned = ("stride",) if classes % 16 == 0 else ()
    built = build(kernels.signals_kernel, signature, constants, warps=warps, aligned=aligned)
    if classes >= 100:
        assert widest_load(built) == 16


# ---------------------------------------------------------------- sampling: exactly rounded arithmetic
#
# Equal bits on a GPU follow from equal operations: none is approximate, none flushes subnormals, none is fused that is
# not written as a fused multiply-add, so the interpreter's bits are the GPU's.


@pytest.mark.parametrize("numel", [64, 75, 3072])
def test_philox_normal(build, numel):
    from kr_fast.kernels.sampling import philox_normal as kernels

    signature = dict.fromkeys(("batch", "numel", "blocks"), "i32") | dict.fromkeys(("seed", "stream"), "i64")
    signature |= {"ids": "*i64", "out": "*fp32"}
    options = {"warps": kernels.WARPS, "aligned": ("numel",) if numel % 16 == 0 else (), "fusion": False}
    built = build(kernels.normals, signature, kernels.tile(256, numel), **options)
    ptx = built.asm["ptx"]
    assert inexact_instructions(built) == set()
    # A pair of normals takes 12 fused multiply-adds and a square root for its radius, 7 for its angle. Blackwell's
    # instructions do two of them at once.
    fused = len(re.findall(r"\bfma\.rn\.f32\s", ptx)) + 2 * len(re.findall(r"\bfma\.rn\.f32x2\s", ptx))
    assert fused == 19 * len(re.findall(r"\bsqrt\.rn\.f32\s", ptx)) > 0
    assert ("st.global.v4" in ptx) == (numel % 16 == 0)


@pytest.mark.parametrize(
    ("name", "last", "dtype", "absent"),
    [
        ("clip", False, "fp32", "uncond ids limits h0 h1 h2 h3 kept input image"),
        ("guided clip, bf16 network", True, "bf16", "ids limits h0 h1 h2 h3 kept image"),
        ("everything", True, "fp16", ""),
    ],
)
def test_solver_step(build, name, last, dtype, absent):
    from kr_fast.kernels.sampling import solver_step as kernels

    signature = dict.fromkeys(kernels.step.arg_names, "fp32") | {"ids": "*i64", "image": "*u8"}
    signature |= dict.fromkeys(("x", "limits", "h0", "h1", "h2", "h3", "y", "kept"), "*fp32")
    signature |= dict.fromkeys(("cond", "uncond", "input"), f"*{dtype}")
    signature |= dict.fromkeys(("batch", "numel", "pixels", "blocks"), "i32") | dict.fromkeys(("seed", "stream"), "i64")
    constants = dict.fromkeys(absent.split()) | kernels.tile(256, 3072)
    constants |= {"CHANNELS": 3, "LAST": last, "CLEAN": True, "NOISY": name == "everything", "COPIES": 2}
    options = {"warps": kernels.WARPS, "aligned": ("numel", "pixels"), "fusion": False}
    built = build(kernels.step, signature, constants, **options)
    assert inexact_instructions(built) == set()
    assert widest_load(built) == 16


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("dtype", DTYPES)
def test_pack_uint8(build, channels, dtype):
    from kr_fast.kernels.sampling import pack_uint8 as kernels

    signature = {"x": f"*{dtype}", "out": "*u8", "total": "i32", "pixels": "i32"}
    constants = {"CHANNELS": channels, "BLOCK": kernels.BLOCK}
    options = {"warps": kernels.WARPS, "aligned": ("total", "pixels"), "fusion": False}
    built = build(kernels.pack, signature, constants, **options)
    assert inexact_instructions(built) == set()
    if channels == 1:
        assert "st.global.v2.b32" in built.asm["ptx"] or "st.global.b32" in built.asm["ptx"]


# ---------------------------------------------------------------- batched

POINTERS = ("weight", "x", "residual", "y", "grad", "passed", "out")
VECTORS = ("mean", "var", "means", "squares", "plain", "centred", "grad_weight", "grad_bias")
NUMBERS = ("images", "height", "width", "in_height", "in_width", "out_height", "out_width", "class_height")
NUMBERS += ("class_width", "tiles", "rows", "span", "parts")


def batched(dtype: str) -> dict[str, str]:
    """Types of the arguments of the family's kernels."""
    signature = dict.fromkeys(POINTERS, f"*{dtype}") | dict.fromkeys((*VECTORS, "bias"), "*fp32")
    return signature | dict.fromkeys(NUMBERS, "i32") | {"eps": "fp32"}


@pytest.mark.parametrize("dtype", DTYPES[:2])
@pytest.mark.parametrize("channels", [16, 64, 80])
def test_model_batch_norm(build, dtype, channels):
    from kr_fast.kernels.batched import model_batch_norm as kernels

    _, tile, warps = kernels.shape(65536, channels)
    constants = {"C": channels, "RELU": True, "ROUND": False, **tile}
    for name in ("moments", "merge_moments", "normalize", "sums", "merge_sums", "input_gradient"):
        signature = batched(dtype) | {"weight": "*fp32"}
        build(getattr(kernels, name), signature, constants, warps=1 if "merge" in name else warps)
    # The sign before the ReLU from x, as in batch_norm_act: on 8.0 and 10.0 in float32 two registers too many.
    for name in ("sums", "input_gradient"):
        build(getattr(kernels, name), signature, constants | {"y": None, "passed": None}, warps=warps, spills=8)


def test_model_sgd(build):
    from kr_fast.kernels.batched import model_sgd as kernels

    signature = dict.fromkeys(("weight", "velocity", "grad", "rate", "momentum", "decays"), "*fp32") | {"table": "*i64"}
    build(kernels.step, signature, {"BLOCK": kernels.BLOCK})


CONV = {  # C, O, kernel, shared by models, view
    "stem": (3, 16, 3, 64, True),
    "shared": (3, 64, 3, 16, False),
    "c16": (16, 16, 3, 0, False),
    "c32": (32, 32, 3, 0, False),
    "c64": (64, 64, 3, 0, False),
    "c24": (24, 64, 3, 0, False),
    "c256": (256, 256, 3, 0, False),
    "linear": (64, 10, 1, 0, False),
}
CONV_BUILDS = [
    *[("fp16", 90, layer) for layer in CONV],
    *[("fp16", capability, layer) for capability in (80, 100) for layer in ("stem", "c16", "c64", "c256")],
    *[("fp32", 90, layer) for layer in ("c16", "c64", "linear")],
    ("fp32", 80, "stem"),
    ("fp32", 100, "c64"),
]
PER_BLOCK = 99 * 1024  # bytes of shared memory that the smallest of these GPUs (8.6, 8.9) has for a block
VIEW = {"rows": "*i32", "columns": "*i32", "scale": "*fp32", "shift": "*fp32"}  # of uint8 images


def conv_arguments(dtype, channels, outputs, kernel, shared, view):
    signature = batched(dtype) | VIEW | {"low": "fp32", "high": "fp32"} | ({"x": "*u8"} if view else {})
    constants = {"C": channels, "OUT": outputs, "KH": kernel, "KW": kernel, "SH": 1, "SW": 1, "DH": 1, "DW": 1}
    constants |= {"PH": kernel // 2, "PW": kernel // 2, "SHARED": bool(shared), "ACT": "relu", "INTERPRET": False}
    constants |= {"residual": None} if shared else {}
    return signature, constants | ({} if view else dict.fromkeys(VIEW))


@pytest.mark.parametrize(("dtype", "capability", "layer"), CONV_BUILDS)
def test_model_conv2d(build, capability, layer, dtype):
    from kr_fast.kernels.batched import model_conv2d as kernels

    channels, outputs, kernel, shared, _ = CONV[layer]
    signature, constants = conv_arguments(dtype, *CONV[layer])
    constants |= {"models": shared or 1, "PRECISION": "ieee" if dtype == "fp32" else "tf32"}
    size = 4 if dtype == "fp32" else 2
    for shape in kernels.tiles(channels, (outputs, kernel, kernel), size, bool(shared), shared or 1):
        built = build(kernels.dense, signature, constants | shape, spills=32 if layer == "linear" else 0)
        assert built.metadata.shared <= PER_BLOCK, shape
        text = built.asm["ptx"]
        if dtype == "fp16":
            assert {80: "mma.sync", 90: "wgmma", 100: "tcgen05"}[capability] in text, shape
            if channels % 8 == 0:
                wide = re.search(r"cp\.async\.ca\.shared\.global \[[^]]*\], \[[^]]*\], 0x10", text)
                assert wide or kernel == 1, shape  # 16 bytes at a time, through L1
        else:
            assert "tf32" not in text


@pytest.mark.parametrize(("channels", "kernel"), [(96, 3), (96, 5), (10, 1)])
def test_depthwise_model_conv2d(build, channels, kernel):
    from kr_fast.kernels.batched import model_conv2d as kernels

    signature, constants = conv_arguments("fp16", channels, channels, kernel, 0, False)
    build(kernels.depthwise, signature, constants | kernels.depthwise_tile(channels))


BACKWARD = {  # C, O, kernel, stride: ResNet-20's, and wider
    "stem": (3, 16, 3, 1),
    "c16": (16, 16, 3, 1),
    "down": (32, 64, 3, 2),
    "shortcut": (16, 32, 1, 2),
    "c64": (64, 64, 3, 1),
    "c256": (256, 256, 3, 1),
}


@pytest.mark.parametrize("layer", BACKWARD)
@pytest.mark.parametrize("dtype", DTYPES[:2])
def test_model_conv2d_backward(build, layer, dtype):
    from kr_fast.kernels.batched import model_conv2d_backward as kernels

    channels, outputs, kernel, stride = BACKWARD[layer]
    size = 4 if dtype == "fp32" else 2
    layer = {"C": channels, "OUT": outputs, "KH": kernel, "KW": kernel, "SH": stride, "SW": stride, "INTERPRET": False}
    layer |= {"PRECISION": "ieee" if dtype == "fp32" else "tf32"}

    def check(function, signature, constants):
        built = build(function, signature, layer | constants)
        assert built.metadata.shared <= PER_BLOCK
        if dtype == "fp32":
            assert "tf32" not in built.asm["ptx"]
        elif constants.get("NU", 1):
            assert "mma" in built.asm["ptx"]

    shape = kernels.input_tile(channels, outputs, size)
    for a, _, first, step, origin, back, places in kernels.classes(32, kernel, stride, kernel // 2, 1):
        constants = {"A": a, "B": a, "U0": first, "V0": first, "US": step, "VS": step, "I0": origin, "J0": origin}
        constants |= {"IS": back, "JS": back, "NU": places, "NV": places, "ROUND": False}
        check(kernels.input_gradient, batched(dtype), constants | shape)
    shape = kernels.weight_tile(kernel * kernel * channels + 1, outputs, size)
    constants = {"PH": kernel // 2, "PW": kernel // 2, "DH": 1, "DW": 1, "BIAS": True}
    check(kernels.weight_gradient, batched(dtype) | {"out": "*fp32"}, constants | shape)


# ---------------------------------------------------------------- privacy

STEPS = [f"{tensor}_{what}" for tensor in ("x", "grad") for what in ("row", "pixel", "channel")]
# Layout -> what is known of the steps: one is 1, and those of wide layers are multiples of 16.
LAYOUTS = {"NHWC": ({"x_channel": 1, "grad_channel": 1}, ("x_row", "x_pixel", "grad_row", "grad_pixel"))}
LAYOUTS["NCHW"] = ({"x_pixel": 1, "grad_pixel": 1}, ())


def per_record(dtype: str) -> dict[str, str]:
    """Types of the arguments of the family's kernels."""
    signature = dict.fromkeys(("x", "grad"), f"*{dtype}") | {"eps": "fp32"}
    signature |= dict.fromkeys(("norms", "samples", "bias_samples", "weight_samples"), "*fp32")
    return signature | dict.fromkeys((*STEPS, "rows", "pixels", *NUMBERS), "i32")


GRADIENTS = {  # C, O, filter, stride, groups that a tile takes, layout; the outputs that are absent
    "c64": ((64, 64, 3, 1, 1, "NHWC"), ("samples", "bias_samples")),
    "NCHW, gradients": ((64, 64, 3, 1, 1, "NCHW"), ("norms",)),
    "stem": ((3, 16, 3, 1, 1, "NHWC"), ("norms",)),
    "down": ((32, 64, 3, 2, 1, "NCHW"), ("samples", "bias_samples")),
    "depthwise": ((16, 16, 3, 1, 16, "NHWC"), ("samples", "bias_samples")),
    "tokens": ((64, 192, 1, 1, 1, "NHWC"), ("samples", "bias_samples")),
}
GRADIENT_BUILDS = [("fp32", 90, layer) for layer in GRADIENTS]
GRADIENT_BUILDS += [("bf16", 90, layer) for layer in ("c64", "NCHW, gradients")]
GRADIENT_BUILDS += [("fp32", each, layer) for each in (80, 100) for layer in ("NCHW, gradients", "down")]
GRADIENT_BUILDS += [("bf16", each, "c64") for each in (80, 100)]


@pytest.mark.parametrize(("dtype", "capability", "layer"), GRADIENT_BUILDS)
def test_conv2d_grad_norms(build, capability, layer, dtype):
    from kr_fast.kernels.privacy import conv2d_grad_norms as kernels

    (channels, outputs, kernel, stride, together, layout), absent = GRADIENTS[layer]
    steps, wide = LAYOUTS[layout]
    constants = {"C": channels, "OUT": outputs, "GROUPS": 1, "PACKED": together, "KH": kernel, "KW": kernel}
    constants |= {"SH": stride, "SW": stride, "PH": kernel // 2, "PW": kernel // 2, "DH": 1, "DW": 1, "BIAS": True}
    size = 4 if dtype == "fp32" else 2
    constants |= {"INTERPRET": False, "PRECISION": "ieee" if size == 4 else "tf32", **dict.fromkeys(absent), **steps}
    shape = kernels.tile(kernel * kernel * channels + 1, outputs, size)
    aligned = wide if channels % 16 == 0 else ()
    built = build(kernels.weight_gradients, per_record(dtype), constants | shape, aligned=aligned)
    assert built.metadata.shared <= PER_BLOCK
    if dtype == "fp32":
        assert "tf32" not in built.asm["ptx"]
    else:
        assert {80: "mma.sync", 90: "wgmma", 100: "tcgen05"}[capability] in built.asm["ptx"]


@pytest.mark.parametrize(("pixels", "size", "groups"), [(784, 8, 4), (49, 2, 32), (784, 64, 1), (1, 24, 8)], ids=str)
def test_group_norm_grad_norms(build, capability, pixels, size, groups):
    from kr_fast.kernels.privacy import group_norm_grad_norms as kernels

    layout = "NCHW" if size == 64 else "NHWC"
    steps, wide = LAYOUTS[layout]
    for dtype, absent in (("fp32", ("weight_samples", "bias_samples")), ("bf16", ("norms",))):
        shape, warps = kernels.tile(pixels, size, groups, 4 if dtype == "fp32" else 2)
        constants = shape | steps | {"SIZE": size, "ALL": groups, "num_warps": warps, **dict.fromkeys(absent)}
        built = build(kernels.channel_sums, per_record(dtype), constants, aligned=wide)
        if (pixels, size) == (784, 8):
            assert widest_load(built) == 16
