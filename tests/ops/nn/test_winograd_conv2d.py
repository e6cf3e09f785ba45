"""winograd_conv2d: values against float64, epilogue, edges, bits, special values, arguments."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import kr_fast
from kr_fast.backends import registry
from kr_fast.backends.cpu.nn import WINOGRAD_TILES, winograd_batch_size
from kr_fast.ops.nn.reference import transforms

LAST = torch.channels_last
# N, inputs, outputs, H, W by regime: one pixel; one whole tile; sides of 4 k + 1, 2, 3 and a last tile of each; inputs
# of less than a vector, of one group of 16 and of a part of a second; outputs of a part of a block of 16, of a whole
# one, of blocks of 32 and of more than are transformed back together (64); tiles fewer than a product has rows, as
# many as a block has (42), and more.
CASES = [
    (1, 1, 1, 1, 1),
    (1, 3, 16, 4, 4),
    (2, 16, 5, 5, 6),
    (1, 17, 33, 7, 9),
    (3, 40, 64, 8, 8),
    (1, 8, 70, 12, 3),
    (1, 16, 130, 24, 28),
    (1, 5, 16, 25, 29),
    (43, 33, 16, 3, 2),
]
ACTIVATIONS = {None: lambda y: y, "relu": torch.relu, "gelu": F.gelu, "silu": F.silu}


def draw(case, dtype=torch.float32):
    n, inputs, outputs, height, width = case
    generator = torch.Generator().manual_seed(sum(case))
    x = torch.randn(n, inputs, height, width, generator=generator, dtype=torch.float64)
    weight = torch.randn(outputs, inputs, 3, 3, generator=generator, dtype=torch.float64) / (9 * inputs) ** 0.5
    return x.to(dtype).contiguous(memory_format=LAST), weight.to(dtype)


def vector(outputs, seed):
    return torch.randn(outputs, generator=torch.Generator().manual_seed(seed))


def exact(x, weight, scale=None, bias=None, residual=None, activation=None, pool=False):
    y = F.conv2d(x.double(), weight.double(), padding=1)
    y = F.max_pool2d(y, 2) if pool else y
    y = y if scale is None else y * scale.double()[:, None, None]
    y = y if bias is None else y + bias.double()[:, None, None]
    y = y if residual is None else y + residual.double()
    return ACTIVATIONS[activation](y)


def run(x, weight, **options):
    return kr_fast.winograd_conv2d(x, kr_fast.winograd_pack(weight, dtype=x.dtype), len(weight), **options)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_against_float64(isa, case):
    x, weight = draw(case)
    before = x.clone()
    got, want = run(x, weight), exact(x, weight)
    assert got.is_contiguous(memory_format=LAST)
    assert got.dtype == torch.float32
    # Outputs of variance 1: ten times the error of float32 sums of the definition, 1e-6 at most here.
    torch.testing.assert_close(got.double(), want, rtol=0, atol=1e-5)
    assert torch.equal(x, before)


def test_error_beside_the_definition():
    """Root mean square error at most seven times that of torch's own convolution."""
    for channels in (16, 64, 256):
        x, weight = draw((2, channels, channels, 16, 16))
        x = x.relu()
        want = exact(x, weight)
        ours = (run(x, weight) - want).square().mean().sqrt()
        torchs = (F.conv2d(x, weight, padding=1) - want).square().mean().sqrt()
        assert ours < 7 * torchs + 1e-8, (channels, ours, torchs)
        assert ours < 1e-6


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("pool", [False, True])
@pytest.mark.parametrize("case", [(2, 16, 20, 9, 6), (1, 3, 16, 8, 8), (1, 20, 70, 2, 3)], ids=str)
def test_epilogue(isa, case, activation, pool):
    x, weight = draw(case)
    shape = exact(x, weight, pool=pool).shape
    residual = torch.randn(shape, generator=torch.Generator().manual_seed(1)).contiguous(memory_format=LAST)
    scale, bias = vector(case[2], 2), vector(case[2], 3)  # of both signs: the scale stands behind the maximum
    options = {"activation": activation, "pool": pool}
    for more in ({}, {"bias": bias}, {"scale": scale, "bias": bias}, {"scale": scale, "residual": residual}):
        torch.testing.assert_close(
            run(x, weight, **options, **more).double(), exact(x, weight, **options, **more), rtol=0, atol=2e-5
        )


def test_activations_over_their_range(isa):
    """A filter that copies: y = act(x) from -60 to 60, and far beyond where exp ends."""
    values = torch.cat([torch.linspace(-60, 60, 4001), torch.tensor([-1e4, -200.0, 200.0, 1e4, 0.0])])
    bias = torch.cat([values, values.new_zeros(-len(values) % 32)])
    x, weight = torch.zeros(1, 1, 1, 1), torch.zeros(len(bias), 1, 3, 3)
    for name, function in ACTIVATIONS.items():
        got = run(x, weight, bias=bias, activation=name).flatten()
        # exp(60) of a rounded argument: 60 last places
        torch.testing.assert_close(
            got.double(), function(bias.double()), rtol=2e-6, atol=1e-8 if name == "gelu" else 1e-30
        )


@pytest.mark.parametrize("case", CASES, ids=str)
def test_bits_do_not_depend_on_threads_or_neighbours(isa, case):
    _, inputs, outputs, height, width = case
    x, weight = draw((45, inputs, outputs, height, width))
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        want = run(x, weight)
        torch.set_num_threads(3)
        assert torch.equal(run(x, weight), want)
    finally:
        torch.set_num_threads(before)
    for chosen in ([7], [44, 0, 7]):
        part = x[chosen].contiguous(memory_format=LAST)
        assert torch.equal(run(part, weight), want[chosen])


def test_misaligned_memory(isa):
    x, weight = draw((2, 16, 20, 8, 8))
    want = run(x, weight)
    memory = torch.empty(x.numel() + 1)[1:].view(2, 8, 8, 16).permute(0, 3, 1, 2)
    memory.copy_(x)
    assert memory.data_ptr() % 64
    assert torch.equal(run(memory, weight), want)


def test_nan_and_inf_stay_within_their_tiles(isa):
    """Tiles of 6x6 pixels, 4 apart: what is not finite reaches the pixels of the tiles that read it, and no others."""
    x, weight = draw((2, 16, 20, 16, 16))
    want = run(x, weight)
    x[0, 3, 1, 1] = float("nan")
    x[0, 5, 9, 9] = float("inf")
    got = run(x, weight)
    assert torch.equal(got[1], want[1])
    assert torch.equal(got[0, :, 12:, 12:], want[0, :, 12:, 12:])
    assert got[0, :, 0:3, 0:3].isnan().all()
    assert not got[0, :, 8:11, 8:11].isfinite().any()
    for activation in ("relu", "gelu", "silu"):
        assert run(x, weight, activation=activation)[0, :, 0:3, 0:3].isnan().all()
    assert run(x, weight, pool=True)[0, :, 0, 0].isnan().all()


def test_empty_batch_and_nothing_left_by_the_pooling():
    x, weight = draw((3, 4, 5, 4, 4))
    assert run(x[:0], weight).shape == (0, 5, 4, 4)
    x, weight = draw((3, 4, 5, 1, 4))
    assert run(x, weight, pool=True).shape == (3, 5, 0, 2)


def test_reference_in_float64():
    x, weight = draw((2, 18, 35, 9, 6), torch.float64)
    options = {"scale": vector(35, 1).double(), "bias": vector(35, 2).double(), "activation": "gelu", "pool": True}
    with registry.forced("reference"):
        got = run(x, weight, **options)
    torch.testing.assert_close(got, exact(x, weight, **options), rtol=0, atol=1e-13)


def test_transforms_are_the_minimal_filtering():
    """A^T [(G g) . (B^T d)] is the correlation of 6 numbers with 3, exactly for whole numbers in float64."""
    into, weights, back = transforms()
    d, g = torch.arange(6, dtype=torch.float64) - 2, torch.tensor([2.0, -3.0, 5.0], dtype=torch.float64)
    want = torch.stack([(d[i : i + 3] * g).sum() for i in range(4)])
    torch.testing.assert_close(back @ ((weights @ g) * (into @ d)), want, rtol=0, atol=1e-13)


@given(
    n=st.integers(1, 3),
    inputs=st.integers(1, 35),
    outputs=st.integers(1, 70),
    height=st.integers(1, 13),
    width=st.integers(1, 13),
    activation=st.sampled_from(list(ACTIVATIONS)),
    pool=st.booleans(),
)
@settings(max_examples=60, deadline=None)
def test_any_shape(n, inputs, outputs, height, width, activation, pool):
    x, weight = draw((n, inputs, outputs, height, width))
    bias = vector(outputs, 4)
    got = run(x, weight, bias=bias, activation=activation, pool=pool)
    if pool and min(height, width) < 2:
        assert got.numel() == 0
        return
    want = exact(x, weight, bias=bias, activation=activation, pool=pool)
    torch.testing.assert_close(got.double(), want, rtol=0, atol=2e-5)


def test_opcheck():
    x, weight = draw((2, 16, 20, 6, 6))
    arguments = (x, kr_fast.winograd_pack(weight), 20, None, vector(20, 5), None, "relu", True)
    torch.library.opcheck(torch.ops.kr_fast.winograd_conv2d, arguments)


BAD = {
    "x must be a tensor": {"x": 3},
    "x must be float32 or float64": {"x": torch.zeros(1, 16, 4, 4, dtype=torch.float16)},
    "x must have 4 dimensions": {"x": torch.zeros(16, 4, 4)},
    "x must be channels_last": {"x": torch.zeros(1, 16, 4, 4)},
    "outputs must be in": {"outputs": 0},
    "outputs must be an int": {"outputs": 2.0},
    "weight must be contiguous": {"outputs": 33},
    "weight must be float32": {"weight": torch.zeros(36, 1, 16, 32, dtype=torch.float64)},
    "scale must be contiguous": {"scale": torch.zeros(19)},
    "bias must be float32": {"bias": torch.zeros(20, dtype=torch.float64)},
    "bias must be contiguous": {"bias": torch.zeros(40)[::2]},
    "residual must be \\[1, 20, 4, 4\\]": {"residual": torch.zeros(1, 20, 2, 2)},
    "residual must be channels_last": {"residual": torch.zeros(1, 20, 4, 4)},
    "activation must be None, 'relu'": {"activation": "tanh"},
    "pool must be a bool": {"pool": 2},
    "bias must not require grad": {"bias": torch.zeros(20, requires_grad=True)},
}


@pytest.mark.parametrize("message", BAD)
def test_bad_arguments(message):
    arguments = {
        "x": torch.zeros(1, 16, 4, 4).contiguous(memory_format=LAST),
        "weight": torch.zeros(36, 1, 16, 32),
        "outputs": 20,
        **BAD[message],
    }
    with pytest.raises((TypeError, ValueError), match=f"winograd_conv2d: {message}.*, got"):
        kr_fast.winograd_conv2d(**arguments)


@pytest.mark.parametrize("count", [1, 3, 14, 15, 16, 32, 50, 64, 128])
def test_batch_sizes_fill_blocks_of_tiles(count):
    block, found = WINOGRAD_TILES, winograd_batch_size(count, 100_000)
    assert count / 2 <= found <= 1.5 * count
    if 2 * count > block:
        assert found % block == 0
    elif 3 * count > block:
        assert 2 * found == block  # images of two tiles and more
    else:
        assert found == count


@pytest.mark.parametrize(("images", "found"), [(512, 64), (504, 84), (2048, 84), (1, 64), (84, 84), (65, 84)])
def test_batch_sizes_do_not_waste_a_last_batch(images, found):
    """64 images a batch or 84, of which 512 fill 8 or 6.1."""
    assert WINOGRAD_TILES == 42
    assert winograd_batch_size(64, images) == found
