"""The verdict on a run: may its Student be shared? Computed anew from the figures whenever the limits change."""

from typing import Any

from kr_fast.membership.verdict.decision import asked_rules, decide
from kr_fast.membership.verdict.limits import gates, limits_of
from kr_fast.membership.verdict.paths import figures
from kr_fast.membership.verdict.rules import Rule, default_rules
from kr_fast.recycling.config import RecycleConfig
from kr_fast.report.run_audit import FULL, TRANSFER
from kr_fast.report.sections.quality import by_groups
from kr_fast.report.tables import number, percent, wilson

SHARED = (
    "The shadow Students learned from images of this run's own generator, so what the Student leaks through these "
    "images is not measured: --audit-generator retrained does."
)
GIVEN = (
    "The shadow Students learned from images of the generator that was given, so what the Student leaks through these "
    "images, if that generator was trained on members, is not measured."
)
ABOUT = "the Student alone, not about the released images, the generator or the Teacher"
LEVEL = 0.95  # of the interval of the difference of accuracies


def of_run(config: RecycleConfig, metrics: dict[str, Any]) -> dict[str, Any]:
    """The verdict, as :func:`kr_fast.membership.verdict.decision.decide` gives it, with what it is "about".

    It is about the Student by shadow Students that were made as it was. Without those, and where they share the
    generator that was trained on all members, its leakage is only bounded from below.

    Args:
        metrics: the dictionary of ``metrics.json``.
    """
    audit, limits = metrics["audit"], limits_of(config)
    if audit is None:
        words = "No membership attack was run, so nothing is known of what the Student leaks."
        rules = [Rule(f"{FULL}.auc_high", limits.auc, None, None, words)]
    else:
        bounds = {}
        if config.audit_generator == "shared":
            bounds[FULL] = GIVEN if config.generator else SHARED
        rules = list(default_rules(audit, limits, [FULL if FULL in audit else TRANSFER], bounds))
    rules.append(_accuracy(metrics, config.verdict_gap))
    return {**decide([*rules, *asked_rules(gates("run", config.fail_above), figures(audit, metrics))]), "about": ABOUT}


def _accuracy(metrics: dict[str, Any], limit: float) -> Rule:
    """The Student's accuracy below the Teacher's. It does not say how good either is: both may always name one class.

    Lost accuracy is shown where the lower end of the difference's interval is above the limit (Newcombe, Statistics in
    Medicine 17 (1998) 873-890, method 10, for two samples: too wide for one, on which both are right more often). Of
    images in groups it is that of ``student_minus_teacher``, by whole groups.
    """
    teacher, student = (metrics[name]["test_accuracy"] for name in ("teacher", "student"))
    gap, count, path = 100 * (teacher - student), metrics["dataset"]["test"], "accuracy_gap"
    low = gap - 100 * ((teacher - wilson(teacher, count)[0]) ** 2 + (wilson(student, count)[1] - student) ** 2) ** 0.5
    if by_groups(metrics["teacher"]):
        low = -100 * metrics["student_minus_teacher"]["accuracy"]["interval"][1]
    text = f"its test accuracy is {percent(student)}, the Teacher's {percent(teacher)}"
    if gap <= limit:
        words = f"The Student loses no more than the limit of {limit:g} points: {text}."
        return Rule(path, limit, gap, True, words, chance=(1 - LEVEL) / 2)
    words = f"The Student loses too much to be of use, which says nothing of leakage: {text}, limit {limit:g} points."
    if low <= limit:
        words = (
            f"Whether the Student is of use is not known: {text}, {number(gap, 1)} points below, which on {count} "
            f"images is not told from the limit of {limit:g}."
        )
    return Rule(path, limit, gap, False, words, low > limit, (1 - LEVEL) / 2)
