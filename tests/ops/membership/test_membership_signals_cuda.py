"""The CUDA kernels of membership_signals against float64: on the CPU (support/cuda_host), and on a GPU if there is one.

Class counts by regime: 2, 3, 10, 32 a thread a row, by tiles of 128 rows; 33, 64, 100, 200, 500, 1000 lanes of a warp,
by the number of lanes and of elements each; 1025, 3000, 5000, 16384 a block; 16385, 20001 a block that sweeps. Odd
counts are read element by element, the others by 8 or 16 bytes.
"""

import math

import pytest
import torch
from cuda_on_host import in_use, machine

from kr_fast.backends import registry
from kr_fast.ops.membership.membership_signals import SIGNALS, membership_signals

CLASSES = [2, 3, 10, 32, 33, 64, 100, 200, 500, 1000, 1025, 3000, 5000, 16384, 16385, 20001]
TYPES = [torch.float32, torch.bfloat16, torch.float16]
TOLERANCE = {"phi": 2e-6, "loss": 2e-6, "entropy": 4e-6, "modified_entropy": 4e-6, "confidence": 1e-6, "correct": 0}


def make(rows, classes, device="cpu", dtype=torch.float32, scale=4.0):
    g = torch.Generator().manual_seed(classes)
    logits = (scale * torch.randn(rows, classes, generator=g)).to(dtype)
    labels = torch.randint(0, classes, (rows,), generator=g)
    labels[::2] = logits[::2].float().argmax(1)  # answers that are right, and sure
    return logits.to(device), labels.to(device)


def compare(logits, labels):
    found = membership_signals(logits, labels, SIGNALS)
    with registry.forced("reference"):
        wanted = membership_signals(logits.double(), labels, SIGNALS)
    for name, tolerance in TOLERANCE.items():
        assert found[name].device == logits.device
        torch.testing.assert_close(
            found[name], wanted[name], rtol=tolerance, atol=tolerance, msg=lambda text, name=name: f"{name} {text}"
        )


@pytest.mark.sanitize
@pytest.mark.parametrize("classes", CLASSES)
def test_values_of_all_kinds_of_rows(cuda_device, classes):
    compare(*make(130 if classes <= 32 else 7, classes, cuda_device))  # 130: a second tile


@pytest.mark.parametrize("classes", [10, 11, 100, 104, 1000, 1032, 16392])
@pytest.mark.parametrize("dtype", TYPES[1:], ids=str)
def test_half_precision_is_read_exactly(cuda_device, dtype, classes):
    compare(*make(9, classes, cuda_device, dtype))


@pytest.mark.parametrize("classes", [3, 140, 2000, 17000])
def test_classes_that_are_ruled_out_and_equal_ones(cuda_device, classes):
    inf, last = math.inf, classes - 1
    logits = torch.full((6, classes), -inf)
    logits[:3, :3] = torch.tensor([[2.0, -inf, -inf], [-inf, 1.0, 0.0], [1.0, 0.5, -inf]])
    logits[3:] = 0.0
    logits[3, [1, last]] = 4.0  # the first of equal ones is the answer
    logits[4, last], logits[5, last] = 90.0, -90.0  # p = 1 in float32, and the smallest p
    labels = torch.tensor([0, 0, 0, last, last, last])
    compare(logits.to(cuda_device), labels.to(cuda_device))
    found = membership_signals(logits.to(cuda_device), labels.to(cuda_device), SIGNALS)
    assert found["phi"][:3].tolist() == [inf, -inf, 0.5]
    assert found["correct"].tolist() == [1, 0, 1, 0, 1, 0]
    assert found["phi"][4] == pytest.approx(90 - math.log(classes - 1), rel=1e-6)


def test_rows_apart_addresses_and_what_is_wanted(cuda_device):
    """Rows of a wider tensor, at an address and a stride that forbid wide reads; classes that are not the fast axis."""
    for classes in (10, 100, 3000):
        logits, labels = make(5, classes, cuda_device)
        wide = torch.empty(5, classes + 3, device=cuda_device)
        for first in (0, 1):
            view = wide[:, first : first + classes]
            view.copy_(logits)
            compare(view, labels)
        compare(logits.T.contiguous().T, labels)
        whole = membership_signals(logits, labels, SIGNALS)
        for name in SIGNALS:
            assert torch.equal(membership_signals(logits, labels, (name,))[name], whole[name])
    empty = membership_signals(torch.empty(0, 5, device=cuda_device), torch.empty(0, device=cuda_device).long())
    assert empty["phi"].shape == (0,)
    logits, labels = make(6, 10, cuda_device)
    assert membership_signals(logits.view(2, 3, 10), labels.view(2, 3))["phi"].shape == (2, 3)


@pytest.mark.sanitize
@pytest.mark.parametrize("classes", [10, 100, 1025, 16385])
def test_order_and_strides_do_not_matter(host_cuda, classes):
    """Few blocks, so that each takes several rows; threads from the last to the first: a missing barrier would show."""
    logits, labels = make(300 if classes == 10 else 9, classes)
    with in_use(host_cuda):
        wanted = membership_signals(logits, labels, SIGNALS)
        with machine(host_cuda, descending=True, most_blocks=2):
            found = membership_signals(logits, labels, SIGNALS)
    for name in SIGNALS:
        assert torch.equal(found[name], wanted[name]), name


@pytest.mark.gpu
def test_more_than_two_to_the_31_elements():
    """Offsets of rows beyond 32 bits: the last rows against a call of their own."""
    rows, classes = 2**31 // 1000 + 200, 1000
    logits = torch.randn(rows, classes, device="cuda", dtype=torch.float16)
    labels = torch.randint(0, classes, (rows,), device="cuda")
    with registry.forced("cuda"):
        whole = membership_signals(logits, labels, SIGNALS)
        part = membership_signals(logits[-300:].clone(), labels[-300:], SIGNALS)
    for name in SIGNALS:
        assert torch.equal(whole[name][-300:], part[name])
