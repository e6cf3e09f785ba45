"""The four figures that a reader sees first, each with the keys that lead to it in the JSON."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from kr_fast.report import audit_tables, sentences
from kr_fast.report.render import Block, Card, Cited, Track
from kr_fast.report.tables import number, percent

LOW, HIGH = 0.4, 1.0  # ends of the axis of an AUC
TITLES = ("Leakage (AUC)", "Records found", "Controls")
Values = Mapping[str, Any]
Labels = Mapping[str, str] | None


class Citations:
    """Figures of a dictionary as text, which remember the keys that lead to each."""

    def __init__(self, values: Values, *start: str):
        self.values, self.start = values, start
        self.cited: list[Cited] = []

    def __call__(self, *keys: str | int, form: Callable[[Any], str] = number) -> str:
        path, value = (*self.start, *keys), self.values
        for key in path:
            value = value[key]
        self.cited.append((form(value), path))
        return self.cited[-1][0]

    def pair(self, *keys: str | int) -> str:
        """An interval."""
        return f"[{self(*keys, 0)}, {self(*keys, 1)}]"


@dataclasses.dataclass(frozen=True)
class Source:
    """An audit at the end of some keys in the values of a JSON file."""

    values: Values
    start: tuple[str, ...]
    labels: Labels

    @property
    def audit(self) -> Values:
        audit = self.values
        for key in self.start:
            audit = audit[key]
        return audit

    def citations(self) -> Citations:
        return Citations(self.values, *self.start)


def of_run(summary: Values, best: str, decided: Values | None) -> Block:
    """Accuracy of Student and Teacher, and leakage, records and controls of the Student.

    Args:
        summary: the dictionary of metrics.json; best: the audit of the Student that counts; decided: the verdict.
    """
    cite = Citations(summary)
    which = "was given" if summary["config"].get("teacher") else "saw the real images"
    lines = [
        f"Student, on {cite('dataset', 'test', form=_count)} test images. The Teacher, which {which}: "
        f"{cite('teacher', 'test_accuracy', form=percent)}"
    ]
    if summary["student"].get("test_auc") is not None:
        aucs = (f"{cite(model, 'test_auc')} {cite.pair(model, 'test_auc_ci')}" for model in ("student", "teacher"))
        lines.append("Test AUC: {}. The Teacher: {}".format(*aucs))
    value = cite("student", "test_accuracy", form=percent)
    rules = {} if decided is None else {rule["path"]: rule["passed"] for rule in decided["rules"]}
    state = "bad" if rules.get("accuracy_gap") is False else "plain"
    first = Card("Accuracy of the Student", state, value, "", lines, cite.cited)
    if not summary.get("audit"):
        rest = [Card(title, "unknown", "not measured", "", ["No audit was run."], []) for title in TITLES]
    else:
        rest = _audited(Source(summary, ("audit",), sentences.OF_RUN), best, decided)
    return "cards", [first, *rest]


def of_audit(audit: Values, labels: Labels, decided: Values | None) -> Block:
    """Accuracy, leakage and records of the first target that the verdict is about, of the first one without a verdict,
    of the models of the shadows without a target; and controls."""
    models = [name for name in sentences.names(audit, ("full", "transfer")) if not _facts(audit, name)["control"]]
    rules = [] if decided is None else [rule["path"] for rule in decided["rules"] if rule["source"] == "default"]
    about = [name for name in models if any(path.startswith(f"{name}.") for path in rules)]
    name = next(iter([*about, *models, *sentences.names(audit, ("released",))]), None)
    cite = Citations(audit)
    if models and _facts(audit, name).get("accuracy") is not None:
        value = cite("setting", "targets", name, "accuracy", form=percent)
        lines = [f"Of {sentences.target_title(audit, name, labels)}, on examples that played no part in its training"]
        first = Card("Accuracy", "plain", value, "", lines, cite.cited)
    else:
        first = Card("Accuracy", "unknown", "not given", "", ["The audit was not told it."], [])
    return "cards", [first, *_audited(Source(audit, (), labels), name, decided)]


def _audited(source: Source, name: str | None, decided: Values | None) -> list[Card]:
    cards = [_shadows(source) if name is None else _model(source, name), _records(source, name), _controls(source)]
    if decided is not None and decided["decision"] == "share":  # what was seen lies within the limits
        cards = [card._replace(state="unknown") if card.state == "bad" else card for card in cards]
    return cards


def _facts(audit: Values, name: str) -> Values:
    return audit["setting"]["targets"][name]


def _model(source: Source, name: str) -> Card:
    """The attack on a target that was named beforehand, and its mean over the models that were made as it was."""
    audit, cite = source.audit, source.citations()
    attack, own = _facts(audit, name)["primary"], sentences.own_shadows(audit, name)
    row, words = audit[name][attack], sentences.title(audit, attack)
    value, pair = cite(name, attack, "auc"), cite.pair(name, attack, "auc_ci")
    called = sentences.target_title(audit, name, source.labels)
    lines = [f"{_capital(words)} on {called}: {_outcome(row['auc_ci'])}."]
    mean = audit["leave_one_out"].get(own, {}).get(attack)
    if mean is not None and mean["auc"]["interval"] is not None:
        path = ("leave_one_out", own, attack)
        average = f"{cite(*path, 'auc', 'mean')} {cite.pair(*path, 'auc', 'interval')}"
        lines.append(f"On average over {cite(*path, 'targets')} models made alike: {average}")
    state = _state(audit, row["auc_ci"])
    return Card(TITLES[0], state, value, pair, lines, cite.cited, track(row["auc"], row["auc_ci"]))


def _shadows(source: Source) -> Card:
    """Likewise without a target: the mean over the first set of shadows."""
    audit, cite = source.audit, source.citations()
    own = next((each for each, rows in audit["leave_one_out"].items() if rows), None)
    if own is None:
        return Card(TITLES[0], "unknown", "not measured", "", ["No model was attacked."], [])
    attack = sentences.primary_of(audit, own)
    path, auc = ("leave_one_out", own, attack), audit["leave_one_out"][own][attack]["auc"]
    value, pair = cite(*path, "auc", "mean"), "" if auc["interval"] is None else cite.pair(*path, "auc", "interval")
    ends = auc["interval"] or [auc["mean"]] * 2
    models = f"{cite(*path, 'targets')} models {sentences.maker(audit, own, source.labels)}"
    lines = [f"{_capital(sentences.title(audit, attack))}, mean of {models}: {_outcome(ends)}."]
    return Card(TITLES[0], _state(audit, ends), value, pair, lines, cite.cited, track(auc["mean"], ends))


def _records(source: Source, name: str | None) -> Card:
    """Single records that are found by the models that were made as the target was, and by the others."""
    audit, cite = source.audit, source.citations()
    sets = [each for each, row in audit.get("records", {}).items() if row["tested"]]
    if not sets:
        return Card(TITLES[1], "unknown", "not tested", "", ["Too few shadow models to test single records."], [])
    own = None if name is None else sentences.own_shadows(audit, name)
    first = own if own in sets else sets[0]
    row, value = audit["records"][first], cite("records", first, "found", form=_count)
    tested = cite("records", first, "tested", form=_count)
    lines = [f"Of {tested}, by models {sentences.maker(audit, first, source.labels)}"]
    if row["least_advantage"] is None:
        together = "They are found together: so" if row["found"] else "So"
        lines.append(f"{together} few models cannot find one record alone.")
    if row["untested"]:
        lines.append(f"Not tested, for too few of them on a side: {cite('records', first, 'untested', form=_count)}")
    for other in sets:
        if other != first:
            maker = _capital(sentences.maker(audit, other, source.labels))
            found, tested = (cite("records", other, key, form=_count) for key in ("found", "tested"))
            lines.append(f"{maker}: {found} of {tested}")
    unknown = row["least_advantage"] is None or row["untested"]
    state = "bad" if row["found"] else "unknown" if unknown else "good"
    return Card(TITLES[1], state, value, "", lines, cite.cited)


def _controls(source: Source) -> Card:
    """What has to be found, and what must not be."""
    audit, cite, states, lines = source.audit, source.citations(), [], []
    control, canaries = audit["setting"]["control"], audit.get("canaries")
    if canaries:
        auc = f"AUC {cite('canaries', 'teacher', 'auc')} {cite.pair('canaries', 'teacher', 'auc_ci')}"
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
        path = (control["name"], _facts(audit, control["name"])["primary"])
        auc = f"AUC {cite(*path, 'auc')} {cite.pair(*path, 'auc_ci')}"
        only = "" if control["by_primary"] else ", but not by the attack named beforehand for it"
        lines.append(f"An overfitted model is found{only} ({auc}).")
        states.append("good" if control["by_primary"] else "unknown")
    rows = audit_tables.negative_rows(audit, source.labels)
    failed = [words for words, row in rows if not row["passed"]]
    if failed:
        lines.append(f"Something is found where there is nothing to find: {'; '.join(failed)}.")
        states.append("bad")
    elif rows:
        lines.append("Nothing is found where there is nothing to find.")
        states.append("good")
    else:
        lines.append("Nothing was attacked in which there is nothing to find.")
        states.append("unknown")
    state = next(each for each in ("bad", "unknown", "good") if each in states)
    words = {"bad": "failed", "unknown": "in part", "good": "passed"}[state]
    return Card(TITLES[2], state, words, "", lines, cite.cited)


def track(value: float, pair: list[float]) -> Track:
    """Where an AUC and its interval lie between :data:`LOW` and :data:`HIGH`; what is beyond lies at the end."""
    ends = (100 * (min(max(each, LOW), HIGH) - LOW) / (HIGH - LOW) for each in (pair[0], value, pair[1], 0.5))
    return Track(*(round(each, 2) for each in ends))


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
