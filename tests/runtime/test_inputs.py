"""Tensors, numpy arrays and lists mean the same wherever a caller may give them."""

import dataclasses
import json
import math
import pathlib
import re

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
        (
            np.zeros((2, 8, 8, 1), np.int64),
            "got int64 [2, 8, 8, 1] (pixels in [0, 255] are made uint8 by x.to(torch.ui",
        ),
        (np.zeros((2, 8, 8, 1), int).tolist(), "got int64 [2, 8, 8, 1] (pixels in [0, 255] are"),
        (torch.zeros(2, 8, 8, 1, dtype=torch.bool), "got bool [2, 8, 8, 1] (pixels"),
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


@dataclasses.dataclass(frozen=True)
class Config:
    rate: float = options.option(0.1, "", above=0)
    share: float = options.option(0.1, "", least=0, below=1)
    steps: tuple[int, ...] = options.option((1,), "", above=0, most=1000)
    free: float = options.option(0.0, "")
    count: int = options.option(0, "")
    name: str = options.option("", "")
    flag: bool = options.option(False, "")
    kind: str = options.option("a", "", choices=("a", "b"))


INSIDE = {
    "rate": lambda value: value > 0,
    "share": lambda value: 0 <= value < 1,
    "steps": lambda value: 0 < value <= 1000,
    "free": lambda value: True,
    "count": lambda value: abs(value) < 2**63,
}
ODD = st.one_of(
    st.floats(),
    st.integers(),
    st.sampled_from([math.nan, math.inf, -math.inf, -1, 0, 1, 2**63, 10**400, -(10**5000), True, None, "1"]),
)


@settings(max_examples=300, deadline=None)
@given(name=st.sampled_from(list(INSIDE)), value=ODD, numpy=st.booleans())
def test_numbers_are_of_their_type_in_their_range_and_finite(name, value, numpy):
    """numpy's numbers are taken for what they are; what is taken can be written as JSON."""
    if numpy and isinstance(value, float):
        with np.errstate(over="ignore"):
            value = np.float32(value)
    if numpy and type(value) is int and abs(value) < 2**63:
        value = np.int64(value)
    config = Config(**{name: [1, value] if name == "steps" else value})
    value = value.item() if isinstance(value, np.generic) else value
    real, whole = type(value) in (int, float), type(value) is int
    kind = int if name in ("steps", "count") else float
    largest = 2**1024 - 2**970  # what rounds to a float64
    if (whole if kind is int else real) and abs(value) < largest and INSIDE[name](value):
        options.check(config, "op")
        result = getattr(config, name)
        assert result == ((1, value) if name == "steps" else kind(value))
        assert type(result[1] if name == "steps" else result) is kind
        json.dumps(dataclasses.asdict(config))
    else:
        with pytest.raises(UserError, match=rf"^op: {name} must be .*, got .*$"):
            options.check(config, "op")


def test_other_types():
    config = Config(name=pathlib.Path("a/b"), flag=np.True_, steps=np.array([2, 3]))
    options.check(config, "op")
    assert (config.name, config.flag, config.steps) == ("a/b", True, (2, 3))
    for bad, words in (
        ({"name": 3}, "op: name must be of type str, got 3"),
        ({"flag": 1}, "op: flag must be of type bool, got 1"),
        ({"rate": [0.1]}, "op: rate must be of type float, got [0.1]"),
        ({"steps": 3}, "op: steps must be a list, got 3"),
        ({"rate": np.ones(2)}, "op: rate must be of type float, got float64 [2]"),
    ):
        with pytest.raises(UserError, match=f"^{re.escape(words)}$"):
            options.check(Config(**bad), "op")


def test_choices_and_rules():
    with pytest.raises(UserError, match="op: kind must be one of a, b, got c"):
        options.check(Config(kind="c"), "op")
    with pytest.raises(UserError, match=r"op: share must be in \[0, 1\), got 1"):
        options.check(Config(share=1), "op")


def test_tensors_without_numbers_are_named():
    for value, words in (
        (torch.zeros(3, dtype=torch.int64, device="meta"), r"int64 \[3\] \(on the meta device\)"),
        (torch.ones(3, dtype=torch.int64).to_sparse(), r"int64 \[3\] \(sparse_coo\)"),
    ):
        for function in (inputs.as_tensor, inputs.as_labels, inputs.as_images):
            with pytest.raises(UserError, match=f"^op: x must be a dense tensor with data, got {words}$"):
                function("op", "x", value)


def test_home_folder_and_fields_that_are_configurations(monkeypatch):
    monkeypatch.setenv("HOME", "/home/x")
    config = Config(name="~/runs")
    options.check(config, "op")
    assert config.name == "/home/x/runs"
    assert options.converted("op", "inner", config, Config) is config
    with pytest.raises(UserError, match="^op: inner must be of type Config, got None$"):
        options.converted("op", "inner", None, Config)


def test_the_first_line_of_an_error_without_text():
    class Mute(Exception):
        def __str__(self):
            raise RuntimeError

    assert first_line(AssertionError()) == "AssertionError"
    assert first_line(Mute()) == "Mute"
    assert first_line(ValueError("\n  one\ntwo")) == "one"
    with pytest.raises(UserError, match="^op: x must be y, got z$"):
        fail("op", "x", "be y", "z")
