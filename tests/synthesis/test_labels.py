"""LabelPlan: exact class counts as a pure function of the id."""

import json

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
        (lambda: LabelPlan.balanced(0), "num_classes must be at least 1, got 0"),
        (lambda: LabelPlan.counts([]), "counts must hold numbers >= 0"),
        (lambda: LabelPlan.counts([0, 0]), "counts must hold numbers >= 0 that do not sum to 0"),
        (lambda: LabelPlan.counts([1, -1]), "counts must hold numbers >= 0"),
        (lambda: LabelPlan.explicit(torch.zeros(2)), r"labels must be a non-empty int64 \[N\] tensor"),
        (lambda: LabelPlan.explicit(torch.tensor([0, -1])), r"labels must be a non-empty int64 \[N\] tensor"),
        (lambda: LabelPlan.balanced(2).labels(torch.tensor([0, -3])), r"ids must lie in \[0, 2\^63\), got \[-3, 0\]"),
        (lambda: LabelPlan.balanced(2, 5).labels(torch.tensor([5])), r"ids must lie in \[0, 5\), got \[5, 5\]"),
    ],
)
def test_bad_arguments_are_named(make, text):
    with pytest.raises(UserError, match="LabelPlan: " + text):
        make()
