"""The four figures that a reader sees first, each with the keys that lead to it in the JSON."""

from collections.abc import Callable, Mapping
from typing import Any

from kr_fast.report import audit_tables, sentences
from kr_fast.report.render import Block, Card, Cited, Track
from kr_fast.report.tables import number, percent

LOW, HIGH = 0.4, 1.0  # ends of the axis of an AUC
Values = Mapping[str, Any]


class Figures:
    """Figures of a dictionary as text, which remembers the keys that led to each."""

    def __init__(self, values: Values):
        self.values = values
        self.cited: list[Cited] = []

    def __call__(self, *path: str | int, form: Callable[[Any], str] = number) -> str:
        value: Any = self.values
        for key in path:
            value = value[key]
        self.cited.append((form(value), path))
        return self.cited[-1][0]


def of_run(summary: Values, best: str) -> Block:
    """Accuracy of Student and Teacher, and of the Student what :func:`of_target` says.

    Args:
        summary: the dictionary of metrics.json; best: the audit of the Student that counts.
    """
    figures = Figures(summary)
    lines = [
        f"Student, on {figures('dataset', 'test', form=_count)} test images. The Teacher, which saw the real images: "
        f"{figures('teacher', 'test_accuracy', form=percent)}"
    ]
    value = figures("student", "test_accuracy", form=percent)
    first = Card("Accuracy of the Student", "plain", value, "", lines, figures.cited)
    if not summary.get("audit"):
        rest = [Card(title, "unknown", "not measured", "", ["No audit was run."], []) for title in TITLES]
        return "cards", [first, *rest]
    return "cards", [first, *of_target(summary, ("audit",), best, sentences.OF_RUN)]


def of_audit(audit: Values, labels: Mapping[str, str] | None) -> Block:
    """Accuracy of the first target, and what :func:`of_target` says of it; without one, of the shadows."""
    models = [name for name in sentences.names(audit, ("full", "transfer")) if not _facts(audit, name)["control"]]
    name = next(iter([*models, *sentences.names(audit, ("released",))]), None)
    figures = Figures(audit)
    if models and _facts(audit, name).get("accuracy") is not None:
        value = figures("setting", "targets", name, "accuracy", form=percent)
        lines = [f"Of {sentences.target_title(audit, name, labels)}, on examples that played no part in its training"]
        first = Card("Accuracy", "plain", value, "", lines, figures.cited)
    else:
        first = Card("Accuracy", "unknown", "not given", "", ["The audit was not told it."], [])
    return "cards", [first, *of_target(audit, (), name, labels)]


TITLES = ("Leakage (AUC)", "Records found", "Controls")


def of_target(values: Values, start: tuple[str, ...], name: str | None, labels: Mapping[str, str] | None) -> list[Card]:
    """AUC of the attack on the target that was named beforehand, single records found, controls.

    Args:
        start: keys that lead to the audit in ``values``; name: of the target, or None for the first set of shadows.
    """
    audit = values
    for key in start:
        audit = audit[key]
    leakage = _of_shadows if name is None else _of_model
    figures = [Figures(values) for _ in TITLES]
    arguments = [(*each, audit, start, labels) for each in zip(TITLES, figures, strict=True)]
    return [leakage(*arguments[0], name), _records(*arguments[1], name), _controls(*arguments[2])]


def _facts(audit: Values, name: str) -> Values:
    return audit["setting"]["targets"][name]


def _of_model(title: str, figures: Figures, audit: Values, start: tuple, labels: Any, name: str) -> Card:
    facts = _facts(audit, name)
    attack, own = facts["primary"], sentences.own_shadows(audit, name)
    row, words = audit[name][attack], sentences.title(audit, attack)
    value = figures(*start, name, attack, "auc")
    pair = _pair(figures, *start, name, attack, "auc_ci")
    lines = [f"{_capital(words)} on {sentences.target_title(audit, name, labels)}: {_outcome(row['auc_ci'])}."]
    mean = audit["leave_one_out"].get(own, {}).get(attack)
    if mean is not None and mean["auc"]["interval"] is not None:
        path = (*start, "leave_one_out", own, attack)
        lines.append(
            f"On average over {figures(*path, 'targets')} models made alike: {figures(*path, 'auc', 'mean')} "
            f"{_pair(figures, *path, 'auc', 'interval')}"
        )
    state = _state(audit, row["auc_ci"])
    return Card(title, state, value, pair, lines, figures.cited, track(row["auc"], row["auc_ci"]))


def _of_shadows(title: str, figures: Figures, audit: Values, start: tuple, labels: Any, name: None) -> Card:
    own = next((each for each, rows in audit["leave_one_out"].items() if rows), None)
    if own is None:
        return Card(title, "unknown", "not measured", "", ["No model was attacked."], [])
    attack = sentences.primary_of(audit, own)
    path, row = (*start, "leave_one_out", own, attack, "auc"), audit["leave_one_out"][own][attack]
    value, pair = figures(*path, "mean"), ""
    if row["auc"]["interval"] is not None:
        pair = _pair(figures, *path, "interval")
    ends = row["auc"]["interval"] or [row["auc"]["mean"]] * 2
    count = figures(*path[:-1], "targets")
    maker = sentences.maker(audit, own, labels)
    lines = [f"{_capital(sentences.title(audit, attack))}, mean of {count} models {maker}: {_outcome(ends)}."]
    return Card(title, _state(audit, ends), value, pair, lines, figures.cited, track(row["auc"]["mean"], ends))


def _records(title: str, figures: Figures, audit: Values, start: tuple, labels: Any, name: str | None) -> Card:
    own = sentences.own_shadows(audit, name) if name is not None else None
    sets = [each for each in audit.get("records", {}) if audit["records"][each]["tested"]]
    if not sets:
        lines = ["Too few shadow models to test single records."]
        return Card(title, "unknown", "not tested", "", lines, [])
    first, lines = own if own in sets else sets[0], []
    for each in (first, *(other for other in sets if other != first)):
        count, tested = (figures(*start, "records", each, key, form=_count) for key in ("found", "tested"))
        maker = sentences.maker(audit, each, labels)
        lines.append(f"Of {tested}, by models {maker}" if each == first else f"{_capital(maker)}: {count} of {tested}")
    row = audit["records"][first]
    if row["least_advantage"] is None:
        together = "They are found together: so" if row["found"] else "So"
        lines.insert(1, f"{together} few models cannot find one record alone.")
    known = row["least_advantage"] is not None
    state = "bad" if row["found"] else "good" if known else "unknown"
    return Card(title, state, figures.cited[0][0], "", lines, figures.cited)


def _controls(title: str, figures: Figures, audit: Values, start: tuple, labels: Any) -> Card:
    control, canaries = audit["setting"]["control"], audit.get("canaries")
    lines, states = [], []
    if canaries:
        path = (*start, "canaries", "teacher")
        auc = f"AUC {figures(*path, 'auc')} {_pair(figures, *path, 'auc_ci')}"
        words = "are found" if canaries["power"] else "are no better found than other records"
        lines.append(f"Mislabelled canaries {words} ({auc}).")
        states.append("good" if canaries["power"] else "unknown")
    elif control is None:
        lines.append("No overfitted model was attacked: whether the attacks have power is not shown.")
        states.append("unknown")
    elif not control["found"]:
        lines.append("An overfitted model is not found: the attacks have no power here.")
        states.append("bad")
    else:
        name, attack = control["name"], _facts(audit, control["name"])["primary"]
        auc = figures(*start, name, attack, "auc")
        auc = f"AUC {auc} {_pair(figures, *start, name, attack, 'auc_ci')}"
        only = "" if control["by_primary"] else ", but not by the attack named beforehand"
        lines.append(f"An overfitted model is found{only} ({auc}).")
        states.append("good" if control["by_primary"] else "unknown")
    rows = audit_tables.negative_rows(audit, labels)
    failed = [words for words, row in rows if not row["passed"]]
    if not rows:
        lines.append("Nothing was attacked in which there is nothing to find.")
        states.append("unknown")
    elif failed:
        lines.append(f"Something is found where there is nothing to find: {'; '.join(failed)}.")
        states.append("bad")
    else:
        lines.append("Nothing is found where there is nothing to find.")
        states.append("good")
    state = next(each for each in ("bad", "unknown", "good") if each in states)
    return Card(
        title, state, {"bad": "failed", "unknown": "in part", "good": "passed"}[state], "", lines, figures.cited
    )


def track(value: float, pair: list[float]) -> Track:
    """Where an AUC and its interval lie between :data:`LOW` and :data:`HIGH`; what is beyond lies at the end."""
    ends = (100 * (min(max(each, LOW), HIGH) - LOW) / (HIGH - LOW) for each in (pair[0], value, pair[1], 0.5))
    return Track(*(round(each, 2) for each in ends))


def _pair(figures: Figures, *path: str | int) -> str:
    return f"[{figures(*path, 0)}, {figures(*path, 1)}]"


def _state(audit: Values, pair: list[float]) -> str:
    """A low AUC is good news only where the attacks are known to have power."""
    if pair[0] > 0.5:
        return "bad"
    control, canaries = audit["setting"]["control"], audit.get("canaries")
    power = canaries["power"] if canaries else control is not None and control["found"]
    return "good" if pair[1] >= 0.5 and power else "unknown"


def _outcome(pair: list[float]) -> str:
    if pair[0] > 0.5:
        return "above chance"
    return "not seen above chance" if pair[1] >= 0.5 else "below chance, which points to a shift between the two sets"


def _count(value: int) -> str:
    return f"{value:,}"


def _capital(words: str) -> str:
    return f"{words[0].upper()}{words[1:]}"
