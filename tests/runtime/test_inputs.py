"""Tensors, numpy arrays and lists mean the same wherever a caller may give them."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kr_fast.runtime import inputs, options
from kr_fast.runtime.errors import UserError, fail, first_line

INTEGERS = ("u1", "u2", "u4", "u8", "i1", "i2", "i4", "i8", ">i8", ">u2")


@pytest.mark.parametrize("dtype", INTEGERS)
@pytest.mark.parametrize("column", [False, True])
def test_labels_of_every_integer_dtype(dtype, column):
    values = np.array([3, 0, 1], dtype=dtype)
    given_ = values[:, None] if column else values
    torch.testing.assert_close(inputs.as_labels("op", "labels", given_, 3, 4), torch.tensor([3, 0, 1]))
    assert inputs.as_labels("op", "labels", [3, 0, 1]).dtype == torch.int64


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (np.array([0.0, 1.0]), "be integers [2], got float64 [2]"),
        (torch.tensor([True, False]), "be integers [2], got bool [2]"),
        ([0, 1, 2], "be integers [2], got list of 3"),
        (torch.tensor([0, -1]), "lie in [0, 3), got [-1, 0]"),
        (torch.tensor([0, 3]), "lie in [0, 3), got [0, 3]"),
        (torch.zeros(2, 2, dtype=torch.int64), "be integers [2], got int64 [2, 2]"),
        (None, "be a tensor, a numpy array or a list of numbers, got NoneType"),
        ("ab", "be a tensor, a numpy array or a list of numbers, got str"),
        (np.array(["a", "b"]), "be a tensor, a numpy array or a list of numbers, got <U1 [2]"),
        ([[1], [1, 2]], "be a tensor, a numpy array or a list of numbers, got list of 2"),
    ],
)
def test_other_labels_are_named(value, words):
    with pytest.raises(UserError) as caught:
        inputs.as_labels("op", "labels", value, 2, 3)
    assert str(caught.value) == f"op: labels must {words}"


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (torch.zeros(2, 1, 8, 8), r"got float32 [2, 1, 8, 8] (pixels in [0, 1] are made uint8 by"),
        (torch.zeros(2, 3, 8, 8, dtype=torch.uint8), "got uint8 [2, 3, 8, 8] (x.permute(0, 2, 3, 1) makes"),
        (torch.zeros(2, 8, 8, dtype=torch.uint8), "got uint8 [2, 8, 8] (x[..., None] adds the channel)"),
        (np.zeros((2, 8, 8, 1), np.int64), "got int64 [2, 8, 8, 1]"),
        (torch.zeros(2, 8, 0, 1, dtype=torch.uint8), "got uint8 [2, 8, 0, 1]"),
    ],
)
def test_other_images_are_named_with_the_mend(value, words):
    with pytest.raises(UserError) as caught:
        inputs.as_images("op", "images", value)
    assert str(caught.value).startswith("op: images must be uint8 [N, H, W, C], " + words)
    good = np.arange(2 * 8 * 8, dtype=np.uint8).reshape(2, 8, 8, 1)[:, ::-1]  # a view with a negative stride
    np.testing.assert_array_equal(inputs.as_images("op", "images", good, (8, 8, 1)).numpy(), good)
    with pytest.raises(UserError, match=r"be uint8 \[N, 8, 8, 3\], got uint8 \[2, 8, 8, 1\]"):
        inputs.as_images("op", "images", good, (8, 8, 3))


@dataclasses.dataclass
class Config:
    rate: float = options.option(0.1, "", above=0)
    share: float = options.option(0.1, "", least=0, below=1)
    steps: tuple = options.option((1,), "", above=0)
    free: float = options.option(0.0, "")
    kind: str = options.option("a", "", choices=("a", "b"))


ODD = st.one_of(st.floats(), st.integers(), st.sampled_from([math.nan, math.inf, -math.inf, -1, 0, 1, 2**63, 10**400]))


@settings(max_examples=200, deadline=None)
@given(name=st.sampled_from(["rate", "share", "free", "steps"]), value=ODD)
def test_numbers_are_in_their_range_and_finite(name, value):
    inside = {
        "rate": lambda: value > 0, "share": lambda: 0 <= value < 1, "steps": lambda: value > 0, "free": lambda: True,
    }[name]()  # fmt: skip
    finite = isinstance(value, int) or math.isfinite(value)
    fits = not isinstance(value, int) or abs(value) < 2**63
    config = Config(**{name: (1, value) if name == "steps" else value})
    if inside and finite and fits:
        options.check(config, "op")
    else:
        with pytest.raises(UserError, match=rf"op: {name} must be (above 0|in \[0, 1\)|finite|at most [0-9]+), got .*"):
            options.check(config, "op")


def test_choices_and_rules():
    with pytest.raises(UserError, match="op: kind must be one of a, b, got c"):
        options.check(Config(kind="c"), "op")
    with pytest.raises(UserError, match=r"op: share must be in \[0, 1\), got 1"):
        options.check(Config(share=1), "op")


def test_the_first_line_of_an_error_without_text():
    assert first_line(AssertionError()) == "AssertionError"
    assert first_line(ValueError("\n  one\ntwo")) == "one"
    with pytest.raises(UserError, match="^op: x must be y, got z$"):
        fail("op", "x", "be y", "z")
