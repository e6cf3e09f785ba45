"""LabelPlan: exact class counts as a pure function of the id."""

import json

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kr_fast.runtime.errors import UserError
from kr_fast.synthesis import LabelPlan


def test_balanced():
    plan = LabelPlan.balanced(3)
    assert plan.num_classes == 3
    assert plan.labels(torch.tensor([0, 1, 2, 3, 10, 2**62])).tolist() == [0, 1, 2, 0, 1, 2**62 % 3]
    assert LabelPlan.balanced(10, 1000).labels(torch.arange(1000)).bincount().tolist() == [100] * 10


@given(st.lists(st.integers(0, 30), min_size=1, max_size=6).filter(lambda c: sum(c) > 0), st.integers(1, 3))
def test_counts_are_exact_in_every_period_and_spread(counts, periods):
    plan, total = LabelPlan.counts(counts), sum(counts)
    labels = plan.labels(torch.arange(periods * total))
    assert labels.dtype == torch.int64
    for period in labels.split(total):
        assert period.bincount(minlength=len(counts)).tolist() == counts
    for c, n in enumerate(counts):
        seen = (labels[:total] == c).cumsum(0).double()
        even = torch.arange(1, total + 1) * n / total
        assert (seen - even).abs().max() <= len(counts)


def test_explicit():
    plan = LabelPlan.explicit(torch.tensor([4, 0, 4]))
    assert (plan.num_classes, plan.count) == (5, 3)
    assert plan.labels(torch.tensor([2, 1])).tolist() == [4, 0]


def test_labels_depend_on_the_id_only():
    plan = LabelPlan.counts([5, 1, 2])
    ids = torch.randperm(64, generator=torch.Generator().manual_seed(0))
    assert torch.equal(plan.labels(ids), plan.labels(torch.arange(64))[ids])
    assert plan.labels(ids[:0]).shape == (0,)


def test_description_tells_plans_apart():
    """Plain values, equal for plans that label alike, however they were made."""
    plans = [LabelPlan.balanced(3), LabelPlan.balanced(3, 9), LabelPlan.balanced(4), LabelPlan.counts([1, 2, 1])]
    plans += [LabelPlan.explicit(torch.tensor([0, 1, 2])), LabelPlan.explicit(torch.tensor([0, 2, 1]))]
    described = [json.dumps(plan.describe()) for plan in plans]
    assert len(set(described)) == len(plans)
    assert LabelPlan.counts([1, 1, 1]).describe() == LabelPlan.balanced(3).describe()
    assert LabelPlan.balanced(3).describe()["period"] == 3


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: LabelPlan.balanced(0), "num_classes must be an integer, at least 1 and at most 1000000, got 0"),
        (lambda: LabelPlan.counts([]), r"counts must be integers \[N\], got list of 0"),
        (lambda: LabelPlan.counts([0, 0]), "counts must hold numbers >= 0 that do not sum to 0"),
        (lambda: LabelPlan.counts([1, -1]), "counts must be at least 0"),
        (lambda: LabelPlan.counts([10**9, 1]), "counts must hold numbers >= 0 that do not sum to 0 or more than"),
        (lambda: LabelPlan.counts([0.5, 0.5]), r"counts must be integers \[N\], got list of 2"),
        (lambda: LabelPlan.explicit(torch.zeros(2)), r"labels must be integers \[N\], got float32 \[2\]"),
        (lambda: LabelPlan.explicit(torch.tensor([0, -1])), r"labels must lie in \[0, 1000000\), got \[-1, 0\]"),
        (lambda: LabelPlan.explicit(np.zeros(0, np.int64)), r"labels must hold at least one label, got int64 \[0\]"),
        (lambda: LabelPlan.explicit(None), "labels must be a tensor, a numpy array or a list of numbers, got None"),
        (lambda: LabelPlan(torch.tensor([0, 2]), 2), r"pattern must lie in \[0, 2\), got \[0, 2\]"),
        (lambda: LabelPlan.balanced(2, 0), "count must be an integer, at least 1, got 0"),
        (lambda: LabelPlan.balanced(2, 1.5), "count must be an integer, at least 1, got 1.5"),
        (lambda: LabelPlan.balanced(True), "num_classes must be an integer"),
        (lambda: LabelPlan.balanced(10**12), "num_classes must be an integer"),
        (lambda: LabelPlan.balanced(2).labels(torch.zeros(3)), r"ids must be integers \[N\], got float32 \[3\]"),
        (lambda: LabelPlan.balanced(2).labels(torch.tensor([0, -3])), r"ids must be at least 0, got \[-3, 0\]"),
        (lambda: LabelPlan.balanced(2, 5).labels(torch.tensor([5])), r"ids must lie in \[0, 5\), got \[5, 5\]"),
    ],
)
def test_bad_arguments_are_named(make, text):
    with pytest.raises(UserError, match="LabelPlan: " + text):
        make()


@given(st.sampled_from(["u1", "i2", "i4", "u4", ">i8", "i8"]), st.booleans())
def test_numpy_and_lists_are_tensors(dtype, column):
    values = np.array([2, 0, 1, 1], dtype)
    labels = values[:, None] if column else values
    expected = LabelPlan.explicit(torch.tensor([2, 0, 1, 1]))
    for result in (labels, labels.tolist()):
        assert LabelPlan.explicit(result).describe() == expected.describe()
    assert LabelPlan.counts(values).describe() == LabelPlan.counts([2, 0, 1, 1]).describe()
    plan = LabelPlan.balanced(np.int64(3), np.int32(9))
    assert plan.describe() == LabelPlan.balanced(3, 9).describe()
    assert type(plan.num_classes) is type(plan.count) is int
    assert plan.labels(values).tolist() == [2, 0, 1, 1]
    assert plan.labels(range(3, 6)).tolist() == [0, 1, 2]
