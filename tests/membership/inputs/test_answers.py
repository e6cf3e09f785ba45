"""Logits are told from what is often saved in their place: probabilities of any rounding, and hard labels."""

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from kr_fast.membership import from_logits
from kr_fast.membership.inputs.answers import refuse_probabilities
from kr_fast.runtime.logits import not_logits

SHAPES = {"seed": st.integers(0, 10_000), "classes": st.sampled_from([2, 3, 10, 100, 1000]), "rows": st.integers(8, 80)}


def logits_of(seed, classes, rows, scale=3.0, offset=0.0):
    return offset + scale * torch.randn(rows, classes, generator=torch.Generator().manual_seed(seed)).double()


@settings(deadline=None, max_examples=60)
@given(
    **SHAPES,
    scale=st.sampled_from([0.01, 1.0, 3.0, 30.0]),
    form=st.sampled_from(
        ["float64", "float32", "float16", "bfloat16", 1, 2, 3, 4, "2 as float16", "one-hot", "percent"]
    ),
)
def test_probabilities_of_any_rounding_are_refused(seed, classes, rows, scale, form):
    p = logits_of(seed, classes, rows, scale).softmax(1)
    if form == "one-hot":
        p = torch.nn.functional.one_hot(p.argmax(1), classes).float()
    elif isinstance(form, int):
        p = torch.round(p, decimals=form)
    elif form == "percent":
        p = (100 * p).float() if seed % 2 else torch.round(100 * p, decimals=2)
    elif form == "2 as float16":
        p = torch.round(p, decimals=2).half().float()
    else:
        p = p.to(getattr(torch, form))
    if (p != 0).any(1).float().mean() < 0.5:  # most rows rounded to 0 in every class: nothing is left to tell
        return
    if form == "percent" and bool((p <= 1 + 2**-8).all()):  # or near 1 per cent, as sigmoids may be
        return
    with pytest.raises(ValueError, match=r"audit: x must be logits, from before the softmax .* got rows"):
        refuse_probabilities(p, "x")


@example(seed=0, classes=100, rows=8, scale=1e-3, offset=0.7, form="sigmoid")  # a hundred ones, which sum to 100
@example(seed=0, classes=100, rows=8, scale=0.1, offset=0.7, form="sigmoid")  # and a hundred numbers just below 1
@settings(deadline=None, max_examples=100)
@given(
    **SHAPES,
    scale=st.sampled_from([1e-3, 0.1, 1.0, 30.0]),
    offset=st.sampled_from([-5.0, 0.0, 0.7, 5.0]),
    form=st.sampled_from(
        ["float64", "float32", "float16", "bfloat16", "rounded", "relu", "sigmoid", "log", "ruled out"]
    ),
)
def test_logits_are_not_refused(seed, classes, rows, scale, offset, form):
    """Of any scale and rounding, cut at 0, of one sigmoid for each class, normalised (log-probabilities), with -inf."""
    z = logits_of(seed, classes, rows, scale, offset)
    if form == "rounded":
        z = torch.round(z, decimals=2)
    elif form == "relu":
        z = z.relu()
    elif form == "sigmoid":
        z = (3 * z / scale).sigmoid()
    elif form == "log":
        z = z.log_softmax(1).float()
    elif form == "ruled out":
        z[:, ::3] = -torch.inf
        z[:, :2] = torch.randn(rows, 2, generator=torch.Generator().manual_seed(seed)).double()
    else:
        z = z.to(getattr(torch, form))
    refuse_probabilities(z, "x")


def test_log_probabilities_give_the_signals_of_their_logits():
    z, keep, labels, members = cases()
    expected = from_logits(z[:6], keep, labels, target=z[6], members=members)
    result = from_logits(z[:6].log_softmax(2), keep, labels, target=z[6].log_softmax(1), members=members)
    for name in ("phi", "entropy", "modified_entropy", "correct"):
        for part in (expected, result):
            assert part.shadows["shadows"].signals[name].shape == (1, 40, 6)
        a, b = (part.targets["target"].signals[name] for part in (expected, result))
        assert torch.allclose(a, b, atol=1e-4), name


def cases(seed=0, count=40, classes=4):
    generator = torch.Generator().manual_seed(seed)
    z = 3 * torch.randn(7, count, classes, generator=generator)
    keep = torch.rand(6, count, generator=generator).argsort(0) < 3
    return z, keep, torch.randint(0, classes, (count,), generator=generator), torch.arange(count) % 2 == 0


def test_hard_labels_are_refused_whatever_their_two_values():
    z = cases()[0][0]
    hard = torch.nn.functional.one_hot(z.argmax(1), 4).double()
    for low, high in ((0, 1), (-1, 1), (-10.0, 10.0), (0.2, 0.7)):
        assert "hard labels" in not_logits(low + (high - low) * hard) or (low, high) == (0, 1)
    sorted_by_class = 2.5 * torch.nn.functional.one_hot(torch.arange(400) // 100, 4).double()
    with pytest.raises(ValueError, match="got rows of hard labels"):
        refuse_probabilities(sorted_by_class, "x")
    for constant in (torch.zeros(30, 4), torch.tensor([[1.0, 0, 0]]).repeat(30, 1) * 0.3, torch.empty(0, 4)):
        refuse_probabilities(constant, "x")  # of an untrained network


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            lambda z: z[:, :, :1],
            r"have a logit for each class on the last axis, got one \(one logit z for two classes is",
        ),
        (lambda z: z[:, :, 0], r"be float \[M, 40, \(A,\) C\], got float32 \[6, 40\] \(one logit z for two classes is"),
        (lambda z: z[:0], r"be float \[M, 40, \(A,\) C\], got float32 \[0, 40, 1, 4\]"),
        (lambda z: z.masked_fill(z > 5, torch.inf), r"not hold \+inf \(a number that overflowed"),
        (lambda z: z.masked_fill(z > 5, torch.nan), "not hold NaN"),
        (
            lambda z: z.masked_fill(torch.arange(40)[:, None] == 3, -torch.inf),
            "leave each example a possible class, got 1",
        ),
        (lambda z: z + 1j, "hold real numbers"),
        (lambda z: "logits", "be a tensor, a numpy array or a list of numbers, got str"),
    ],
)
def test_what_is_no_logits(change, words):
    z, keep, labels, _ = cases()
    changed = change(z[:6])
    with pytest.raises(ValueError, match=f"audit: logits of the shadows must {words}"):
        from_logits(changed, keep[: len(changed)] if isinstance(changed, torch.Tensor) else keep, labels)


def test_labels_of_any_integer_dtype_and_shape():
    z, keep, labels, members = cases()
    expected = from_logits(z[:6], keep, labels, target=z[6], members=members).targets["target"].signals["phi"]
    for dtype in (np.uint8, np.int8, np.int32, np.uint16, ">i8", np.uint64):
        for shape in ((40,), (40, 1)):
            given_ = labels.numpy().astype(dtype).reshape(shape)
            result = from_logits(
                z[:6].numpy(), keep.numpy().astype(np.uint8), given_, target=z[6].tolist(), members=members
            )
            assert torch.allclose(result.targets["target"].signals["phi"], expected, atol=1e-5)
            assert result.labels.tolist() == labels.tolist()


def test_logits_with_a_graph_are_taken():
    z, keep, labels, members = cases()
    weight = torch.ones((), requires_grad=True)
    result = from_logits(weight * z[:6], keep, labels, target=weight * z[6], members=members)
    assert not result.targets["target"].signals["phi"].requires_grad
