"""philox_normal on every backend: published vectors, float64, the bits of the scalar C++; the normal distribution."""

import math

import numpy as np
import pytest
import torch
from backends import instruction_set, on_backends
from cuda_on_host import same_bits
from scipy import stats

import kr_fast
from kr_fast.backends import registry
from kr_fast.ops.sampling import reference

# Ids that differ in the low word, cross into the high word and reach the largest id there is.
IDS = torch.tensor([0, 1, 2, 2**31, 2**32 - 1, 2**32, 2**40 + 7, 2**63 - 1])
# 1, 3: less than a counter; 4: one counter; 30: part of an AVX2 vector; 64: digits; 75: no whole number of counters,
# several images a Triton program; 500 and 516: a block of 512 from below and above; 3072: 32x32x3, several programs;
# 16388: the first work item of one image and one counter of the second.
SIZES = [1, 3, 4, 5, 30, 31, 32, 33, 63, 64, 65, 75, 127, 500, 512, 516, 1023, 1024, 1025, 3072, 16384, 16388]
SEEDS = [(0, 0), (2**63 - 1, 2**32 - 1), (0x123456789ABCDEF, 5)]  # and streams


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [
        ((0, 0, 0, 0), 0, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((0xFFFFFFFF,) * 4, 2**64 - 1, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            0x299F31D0A4093822,
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_words_are_those_published_with_random123(counter, key, words):
    found = reference.philox_words(tuple(torch.tensor([c]) for c in counter), key)
    assert tuple(int(w) for w in found) == words


@on_backends("philox_normal")
def test_first_normals_follow_from_the_published_words(backend):
    w = (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)  # counter 0, key 0
    expected = []
    for radius_word, angle_word in (w[:2], w[2:]):
        radius, turn = math.sqrt(-2 * math.log((radius_word + 0.5) / 2**32)), 2 * math.pi * angle_word / 2**32
        expected += [radius * math.cos(turn), radius * math.sin(turn)]
    got = kr_fast.philox_normal(torch.tensor([0]).to(backend.device), (4,), seed=0)[0]
    torch.testing.assert_close(got.double().cpu(), torch.tensor(expected, dtype=torch.float64), rtol=1e-6, atol=1e-6)


@on_backends("philox_normal")
@pytest.mark.parametrize("numel", SIZES)
def test_against_float64(backend, numel):
    if backend.id == "triton-interpreter" and numel > 3072:
        pytest.skip("3072 has several programs an image already")
    for seed, stream in SEEDS:
        got = kr_fast.philox_normal(IDS.to(backend.device), (numel,), seed=seed, stream=stream).cpu()
        expected = reference.philox_normal(IDS, numel, seed=seed, stream=stream)
        padded = torch.nn.functional.pad(expected, (0, numel % 2), value=1.0)
        radius = padded.unflatten(1, (-1, 2)).norm(dim=2).repeat_interleave(2, 1)[:, :numel]
        # A few roundings of the result, and that of u = exp(-r^2 / 2) to 24 bits, 2^-25, which moves r by 2^-25 / r.
        assert ((got.double() - expected).abs() <= 4e-7 * radius + 2**-24 / radius).all()
        if backend.name != "reference":
            with registry.forced("cpu"), instruction_set("scalar"):
                assert same_bits(got, kr_fast.philox_normal(IDS, (numel,), seed=seed, stream=stream))


@on_backends("philox_normal")
@pytest.mark.parametrize("batch", [0, 1, 37, 300])
def test_any_number_of_images(backend, batch):
    """None; one; a last program with few images; more than a program's."""
    ids = torch.arange(batch).to(backend.device) * (2**31 + 3)
    got = kr_fast.philox_normal(ids, (6,), seed=1)
    parts = [kr_fast.philox_normal(part, (6,), seed=1) for part in ids.split(29)]
    assert torch.equal(got, torch.cat(parts) if parts else got)
    assert kr_fast.philox_normal(ids, (0,), seed=1).shape == (batch, 0)


@on_backends("philox_normal", "cpu")
def test_bits_do_not_depend_on_batch_order_threads_or_length(backend, by_threads):
    ids = torch.randperm(500, generator=torch.Generator().manual_seed(0))
    whole, *others = by_threads(lambda: kr_fast.philox_normal(ids, (3, 9, 9), seed=3))
    assert all(torch.equal(whole, each) for each in others)
    order = torch.argsort(ids)
    assert torch.equal(whole[order], kr_fast.philox_normal(ids[order], (3, 9, 9), seed=3))
    assert torch.equal(whole[17:18], kr_fast.philox_normal(ids[17:18], (3, 9, 9), seed=3))
    longer = kr_fast.philox_normal(ids, (20000,), seed=3)  # more than one work item an image
    assert torch.equal(longer[:, :243], whole.flatten(1))


def test_every_argument_counts():
    base = {"ids": torch.tensor([5]), "seed": 1, "stream": 2}
    changes = [{"ids": torch.tensor([6])}, {"ids": torch.tensor([5 + 2**32])}, {"seed": 2}, {"seed": 1 + 2**32}]
    one = kr_fast.philox_normal(**base, shape=(64,))
    for change in [*changes, {"stream": 3}]:
        other = kr_fast.philox_normal(**{**base, **change}, shape=(64,))
        assert (one == other).sum() == 0, change


def test_distribution():
    z = kr_fast.philox_normal(torch.arange(2000), (1000,), seed=11).double()
    n = z.numel()
    # Six standard errors of each moment: one false alarm in 5e8, and the draw is fixed anyway.
    assert abs(z.mean()) < 6 / math.sqrt(n)
    assert abs(z.var() - 1) < 6 * math.sqrt(2 / n)
    assert abs((z**3).mean()) < 6 * math.sqrt(15 / n)
    assert abs((z**4).mean() - 3) < 6 * math.sqrt(96 / n)
    assert stats.kstest(z.flatten().numpy(), "norm").pvalue > 1e-4
    assert 4.5 < z.abs().max() < 6.77  # the tail is there, and ends where 2^-33 puts it
    assert abs(torch.corrcoef(z[:, :8].T) - torch.eye(8)).max() < 6 / math.sqrt(2000)  # elements
    assert abs(torch.corrcoef(z[:8]) - torch.eye(8)).max() < 6 / math.sqrt(1000)  # ids
    streams = torch.stack([kr_fast.philox_normal(torch.tensor([4]), (4000,), seed=11, stream=s)[0] for s in range(8)])
    assert abs(torch.corrcoef(streams) - torch.eye(8)).max() < 6 / math.sqrt(4000)


def test_shapes_and_dtypes():
    ids = torch.arange(3)
    assert kr_fast.philox_normal(ids, (2, 5), seed=0).shape == (3, 2, 5)
    assert kr_fast.philox_normal(ids[:0], (2, 5), seed=0).shape == (0, 2, 5)
    assert kr_fast.philox_normal(ids, (0, 5), seed=0).shape == (3, 0, 5)
    assert kr_fast.philox_normal(ids, (), seed=0).shape == (3,)
    every_other = torch.arange(6)[::2]
    assert torch.equal(
        kr_fast.philox_normal(every_other, (7,), seed=0), kr_fast.philox_normal(every_other.clone(), (7,), seed=0)
    )
    full = kr_fast.philox_normal(ids, (9,), seed=0)
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        assert torch.equal(kr_fast.philox_normal(ids, (9,), seed=0, dtype=dtype), full.to(dtype))


def test_integers_of_numpy_and_ids_of_any_integer_dtype():
    expected = kr_fast.philox_normal(torch.arange(3), (4,), seed=3, stream=1)
    for seed, stream, shape in ((np.int64(3), np.uint8(1), 4), (np.uint64(3), np.int16(1), (np.int32(4),))):
        for dtype in (torch.int64, torch.int32, torch.uint8):
            found = kr_fast.philox_normal(torch.arange(3, dtype=dtype), shape, seed=seed, stream=stream)
            assert torch.equal(found, expected)


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"ids": [1]}, TypeError, "ids must be a tensor"),
        ({"ids": torch.zeros(2)}, TypeError, "ids must be int64 or another integer dtype, got float32"),
        ({"ids": torch.zeros(2, 2, dtype=torch.int64)}, ValueError, "ids must have 1 dimensions"),
        ({"ids": torch.tensor([3, -1])}, ValueError, "ids must be at least 0, got -1"),
        ({"ids": torch.tensor([3, -1], dtype=torch.int16)}, ValueError, "ids must be at least 0, got -1"),
        ({"shape": 4.0}, TypeError, "shape must be an int or a sequence of ints, got 4.0"),
        ({"shape": (4.0,)}, TypeError, r"shape must hold ints, got \(4.0,\)"),
        ({"seed": np.int64(-1)}, ValueError, "seed must be in"),
        ({"seed": -1}, ValueError, r"seed must be in \[0, 9223372036854775808\), got -1"),
        ({"seed": 1.0}, TypeError, "seed must be an int"),
        ({"seed": True}, TypeError, "seed must be an int"),
        ({"stream": 2**32}, ValueError, r"stream must be in \[0, 4294967296\)"),
        ({"dtype": torch.int32}, TypeError, "dtype must be a floating point dtype"),
        ({"shape": (3, -1)}, ValueError, "shape must hold sizes >= 0"),
        ({"shape": (2**17, 2**17)}, ValueError, r"shape must hold fewer than 2\^34 elements"),
    ],
)
def test_bad_arguments_are_named(change, error, text):
    with pytest.raises(error, match="philox_normal: " + text):
        kr_fast.philox_normal(**{"ids": torch.arange(2), "shape": (4,), "seed": 0, **change})


def test_opcheck_and_compile():
    torch.library.opcheck(torch.ops.kr_fast.philox_normal, (torch.arange(3), 8, 7, 1))
    compiled = torch.compile(
        lambda ids: kr_fast.philox_normal(ids, (2, 3), seed=4) * 2, fullgraph=True, backend="eager"
    )
    assert torch.equal(compiled(IDS), kr_fast.philox_normal(IDS, (2, 3), seed=4) * 2)
