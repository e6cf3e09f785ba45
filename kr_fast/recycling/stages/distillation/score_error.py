"""How far chance moves a Student's score on validation."""

from collections.abc import Sequence

from kr_fast.recycling.budget import planner
from kr_fast.recycling.context import Context


def score_error(context: Context, value: float) -> float:
    """Standard error of a score on validation (option ``student_choose``).

    Of an AUC its bound ``sqrt(AUC (1 - AUC) / n)``, n images of the rarest class (Birnbaum and Klose, 1957).
    """
    count = len(context.data.val)
    if context.config.student_choose == "auc":
        sizes: Sequence[int] = context.data.val.labels.bincount().tolist()
        count = min(min(size, count - size) for size in sizes if size)
    return planner.standard_error(value, max(count, 1))
