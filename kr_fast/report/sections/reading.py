"""What the figures mean, in a line each, and how far the attacks got: the AUC of each model beside chance."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from kr_fast.report import sentences
from kr_fast.report.render import Block, Chart, Row
from kr_fast.report.sections.cards import track
from kr_fast.report.tables import interval, number

Audit = Mapping[str, Any]
Terms = Sequence[tuple[str, str]]


def blocks(audit: Audit, labels: Mapping[str, str] | None, first: Terms = ()) -> Iterator[Block]:
    """The chart and the terms; ``first``: terms that stand before."""
    yield "heading", "What these figures mean"
    if rows := list(_rows(audit, labels)):
        ticks = [(track(0.5, [0.5, 0.5]).chance, "0.5: a coin toss"), (100.0, "1: certain")]
        yield "chart", Chart("How well attacks tell members from non-members (AUC)", rows, ticks)
    yield "terms", [*first, *_terms(audit)]


def _terms(audit: Audit) -> Iterator[tuple[str, str]]:
    setting = audit["setting"]
    yield "Member", "A record that the model was trained on. A non-member is one that it was not trained on."
    yield "AUC", "How often an attack scores a member above a non-member: 0.5 is a coin toss, 1 is certainty."
    yield "[low, high]", f"Holds the true figure in {sentences.percent_of_level(setting['level'])} of cases."
    if any(attack.startswith("lira") for attack in setting["attacks"]):
        yield "LiRA", "An attack that compares a model's answer to a record with those of shadow models."
    if setting["shadow_sets"]:
        alike = not setting["targets"] or any(sentences.own_shadows(audit, name) for name in setting["targets"])
        how = "in the same way" if alike else "by another training than the model under attack,"
        yield "Shadow model", f"Made {how} on another half of the data, with the record or without it."
    if audit.get("records"):
        rate = sentences.percent_of_level(next(iter(audit["records"].values()))["rate"])
        words = "Models trained on this one record answer it more surely than others do, beyond chance"
        yield "Record found", f"{words} (false discovery rate {rate})."
    yield "Controls", "An overfitted model that an attack must find, and sets in which there is nothing to find."


def _rows(audit: Audit, labels: Mapping[str, str] | None) -> Iterator[Row]:
    """Each target after the mean of the models that were made as it was; means of no target come first."""
    names = sentences.names(audit)
    owners = {sentences.own_shadows(audit, name): name for name in reversed(names)}
    for shadows in audit["leave_one_out"]:
        if shadows not in owners:
            yield from _mean(audit, shadows, labels, owned=False)
    for name in names:
        own = sentences.own_shadows(audit, name)
        if own is not None and owners[own] == name:
            yield from _mean(audit, own, labels)
        facts = audit["setting"]["targets"][name]
        for attack in audit[name] if facts["kind"] == "released" else (facts["primary"],):
            row, words = audit[name][attack], sentences.title(audit, attack)
            words += "" if facts["kind"] == "released" or facts["control"] else ", this model"
            pair = sentences.deciding(row)
            yield _row(sentences.target_title(audit, name, labels), words, row["auc"], pair, facts["control"])
    if canaries := audit.get("canaries"):
        row = canaries["teacher"]
        yield _row("the mislabelled canaries", "in twins of the Teacher", row["auc"], row["auc_ci"], True)
    if calibrated := audit.get("released_calibrated"):
        for name, words in (("all_periods", "images of all periods"), ("last_period", "released images")):
            row = calibrated[name]["offline"]
            yield _row(f"the {words}", "nearest, calibrated by other pipelines", row["auc"], row["auc_ci"])
    if row := audit.get("generator"):
        yield _row("the generator's weights", "denoising errors; not released", row["auc"], row["auc_ci"])


def _mean(audit: Audit, shadows: str, labels: Mapping[str, str] | None, owned: bool = True) -> Iterator[Row]:
    """``owned``: whether a target was made as these shadows were."""
    each = audit["leave_one_out"].get(shadows)
    if not each:
        return
    attack = sentences.primary_of(audit, shadows)
    row, words = each[attack], sentences.title(audit, attack)
    if row["auc"]["interval"] is not None:
        label = sentences.shadows_title(audit, shadows, labels)
        label = label if owned or label == shadows else f"the shadows of {label}"
        yield _row(label, f"{words}, mean of {row['targets']} made alike", row["auc"]["mean"], row["auc"]["interval"])


def _row(label: str, words: str, auc: float, pair: list[float], control: bool = False) -> Row:
    above = pair[0] > 0.5
    # Of the control it is good news to be found.
    state = ("good" if above else "bad") if control else ("bad" if above else "plain")
    text = f"{number(auc)} {interval(pair)}"
    if label.startswith("the "):  # a title of this package; the name that a user gave stays as it is
        label = f"{label[4].upper()}{label[5:]}"
    return Row(label, words, state, text, track(auc, pair))
