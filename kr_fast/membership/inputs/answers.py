"""What models answered: logits of any source, as signals. Probabilities and hard labels are told from logits here."""

import contextlib
import numbers
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kr_fast.ops.membership.membership_signals import membership_signals
from kr_fast.runtime.errors import UserError, fail, first_line
from kr_fast.runtime.inputs import as_labels, as_tensor, described
from kr_fast.runtime.logits import not_logits

SIGNALS = ("phi", "entropy", "modified_entropy", "correct")
ANSWERS = 3  # largest log-probabilities that the shadow network reads, beside the signals
FIRST = 64  # rows that are looked at before all of them are
LOGITS = "be logits, from before the softmax (probabilities=True takes the logarithm where nothing else is left)"
ONE_LOGIT = "one logit z for two classes is given as the two logits [0, z]"


def as_numbers(where: str, name: str, value: Any) -> Tensor:
    """A float tensor as it is, without its graph; integers, arrays and lists as one. Raises: UserError."""
    tensor = as_tensor(where, name, value).detach()
    if tensor.dtype.is_complex:
        fail(where, name, "hold real numbers", described(value))
    return tensor if tensor.dtype.is_floating_point else tensor.double()


def check_accuracy(name: str, value: Any, where: str = "audit") -> float:
    """A share of right answers, in [0, 1]."""
    if isinstance(value, Tensor | np.ndarray) and value.ndim == 0:
        value = value.item()
    if isinstance(value, bool) or not isinstance(value, numbers.Real) or not 0 <= value <= 1:
        fail(where, name, "be in [0, 1]", repr(value))
    return float(value)


@contextlib.contextmanager
def as_user_error(what: str) -> Iterator[None]:
    """What an op refuses of a model's answers as an error that the user can correct."""
    try:
        yield
    except UserError:
        raise
    except (ValueError, TypeError) as error:
        raise UserError(f"audit: {what}: {first_line(error)}") from error


def read_logits(logits: Any, labels: Any, what: str, probabilities: bool = False) -> tuple[dict[str, Tensor], Tensor]:
    """(signals ``[A, N, M]``, answers ``[N, M, T]``) of logits ``[M, N, C]`` or ``[M, N, A, C]``.

    Args:
        what: the name of the logits in errors.
        probabilities: their logarithm is taken.
    Raises: UserError for another shape, NaN, +inf, rows of -inf only, probabilities and hard labels.
    """
    logits, labels = as_numbers("audit", what, logits), as_labels("audit", "labels", labels)
    if logits.ndim == 3:
        logits = logits[:, :, None]
    if logits.ndim != 4 or logits.shape[1] != len(labels) or 0 in logits.shape:
        hint = f" ({ONE_LOGIT})" if logits.ndim == 2 else ""
        fail("audit", what, f"be float [M, {len(labels)}, (A,) C]", f"{described(logits)}{hint}")
    labels, classes = labels.to(logits.device), logits.shape[3]
    if classes == 1:
        fail("audit", what, "have a logit for each class on the last axis", f"one ({ONE_LOGIT})")
    if not 0 <= int(labels.min()) <= int(labels.max()) < classes:
        fail("audit", "labels", f"lie in [0, {classes})", [int(labels.min()), int(labels.max())])
    signals: dict[str, list[Tensor]] = {name: [] for name in SIGNALS}
    answers = []
    for values in logits:  # [N, A, C]
        if probabilities:
            _refuse_no_logits(values, what)
            if bool((values < 0).any()):
                fail("audit", what, "be probabilities, at least 0", float(values.min()))
            values = values.double().log()
        else:
            refuse_probabilities(values.flatten(0, 1), what)
        _refuse_no_logits(values, what)
        # The op has names of its own for what was checked here.
        computed = membership_signals(
            values, labels[:, None].expand(values.shape[:2]).contiguous(), SIGNALS, validate_args=False
        )
        for name in SIGNALS:
            signals[name].append(computed[name].T.cpu())
        best = values[:, 0] - values[:, 0].amax(1, keepdim=True)  # in its own dtype: float64 may exceed float32
        answers.append(best.float().log_softmax(1).topk(min(ANSWERS, classes), 1).values.cpu())
    return {name: torch.stack(rows, 2) for name, rows in signals.items()}, torch.stack(answers, 1)


def _refuse_no_logits(values: Tensor, what: str) -> None:
    """NaN, +inf, and rows without a class that is possible."""
    if bool(torch.isfinite(values.amax(-1)).all()):
        return
    refuse_nan(what, values)
    if count := int(torch.isposinf(values).sum()):
        fail("audit", what, "not hold +inf (a number that overflowed: save float32)", f"{count} +inf")
    fail("audit", what, "leave each example a possible class", f"{int((values.amax(-1) == -torch.inf).sum())} without")


def refuse_nan(what: str, values: Tensor) -> None:
    """Refuse NaN, with their number."""
    if bad := int(torch.isnan(values).sum()):
        fail("audit", what, "not hold NaN", f"{bad} NaN")


def check_answers(rows: Tensor, what: str) -> None:
    """Refuse what a model answered some images with, ``[n, C]``, where it is no logits."""
    _refuse_no_logits(rows, f"logits of {what}")
    refuse_probabilities(rows, what, "return logits (remove its softmax)")


def refuse_probabilities(rows: Tensor, what: str, rule: str | None = None) -> None:
    """Refuse ``rows`` ``[n, C]`` that are no logits but :func:`not_logits`: the attacks would be blind to the surest.

    Args:
        what: the argument, for the error.
        rule: what is asked for instead.
    """
    # A few rows tell real logits; they are taken from everywhere, for examples may be sorted by class.
    if len(rows) and not_logits(rows[:: -(-len(rows) // FIRST)]) and (reason := not_logits(rows)):
        fail("audit", what, rule or LOGITS, reason)
