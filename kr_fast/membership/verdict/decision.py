"""The verdict itself: share, do not share, or not decided, with the reasons."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from kr_fast.membership.verdict.limits import Gate, Limits, gates
from kr_fast.membership.verdict.paths import Audit, figures
from kr_fast.membership.verdict.rules import Rule, default_rules

SHARE, NOT, OPEN = "share", "do not share", "not decided"
CONTROLS = "negative_controls_failed"
GATE = 3  # exit code of a command where a rule of fail_above is not kept


def verdict_of(audit: Audit, limits: Limits) -> dict[str, Any]:
    """The verdict on every target of an audit, or on its shadows where it has none.

    Args:
        audit: the dictionary of ``audit.json``.
    Returns: as :func:`decide`.
    """
    setting = audit["setting"]
    targets = [name for name, facts in setting["targets"].items() if not facts["control"]]
    rules = default_rules(audit, limits, targets or list(audit["leave_one_out"]))
    return decide([*rules, *asked_rules(gates("audit", limits.fail_above), figures(audit))])


def decide(rules: Sequence[Rule]) -> dict[str, Any]:
    """What follows from the rules.

    - A failed negative control decides nothing, whatever else there is: *not decided*.
    - Otherwise *do not share* where a rule shows leakage, or lost accuracy, beyond its limit.
    - *Share* where every rule was passed; all else is *not decided*: a figure that is missing or bounds from below, no
      power, an interval that is too wide.

    Returns: {"decision", "reasons" (sentences: those that decide first), "chance" (largest probability of *do not
        share* where nothing leaks: the sum over rules, Bonferroni), "rules": [{"path", "limit", "value", "passed",
        "source", "words"}]}.
    """
    control = [rule for rule in rules if rule.path == CONTROLS and rule.passed is False]
    shown = [rule for rule in rules if rule.shown]
    rest = [rule for rule in rules if rule.passed is not True and rule not in (*control, *shown)]
    decision = OPEN if control else NOT if shown else OPEN if rest or not rules else SHARE
    reasons = rules if decision == SHARE else [*control, *shown, *rest]
    return {
        "decision": decision,
        "reasons": [rule.words for rule in reasons],
        "chance": round(min(1.0, sum(rule.chance for rule in rules)), 6),
        "rules": [rule.to_dict() for rule in rules],
    }


def asked_rules(asked: Iterable[Gate], values: Mapping[str, float]) -> list[Rule]:
    """The rules of ``fail_above``. A figure that was not computed fails its rule."""
    rules = []
    for path, limit in asked:
        value = values.get(path, values.get(path.removeprefix("audit.")))
        if value is None:
            words = f"{path} was not computed, and a limit of {limit:g} is asked for."
        else:
            words = f"{path} is {value:.6g}, {'above' if value > limit else 'within'} the limit of {limit:g} asked for."
        rules.append(Rule(path, limit, value, value is not None and value <= limit, words, source="asked"))
    return rules


def fails(verdict: Mapping[str, Any]) -> bool:
    """Whether a rule of ``fail_above`` is not kept: then a command ends with the exit code :data:`GATE`."""
    return any(rule["source"] == "asked" and rule["passed"] is not True for rule in verdict["rules"])
