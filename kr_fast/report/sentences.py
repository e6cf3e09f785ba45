"""The result of an audit in sentences built from its numbers, for the report of a run and the page of an audit.

``audit`` is the dictionary of ``audit.json``. Figures of the recipe stand first, averaged over models that were made
alike: those of one model change with its seed and its processor.
"""

import itertools
from collections.abc import Mapping
from typing import Any

from kr_fast.report.tables import interval, number, stated

Audit = dict[str, Any]
# What a run calls its targets; elsewhere they are called as the user named them.
OF_RUN = {
    "teacher": "the Teacher",
    "student": "the Student with shadows of the Teacher's training (transfer)",
    "student_full": "the Student",
    "released": "the released images",
}

CALIBRATED = "nearest synthetic image, calibrated by other pipelines"
NOTHING = "gives every example the same score and shows nothing either way"


def title(audit: Audit, attack: str) -> str:
    """The attack's name for people."""
    return audit["setting"]["attacks"].get(attack, {}).get("title", attack)


def percent_of_level(level: float) -> str:
    """ "95 %"."""
    return f"{100 * level:g} %"


def names(audit: Audit, kinds: tuple[str, ...] = ("full", "transfer", "released")) -> list[str]:
    """Targets of these kinds, the positive control last."""
    targets = audit["setting"]["targets"]
    chosen = [name for name, facts in targets.items() if facts["kind"] in kinds]
    return sorted(chosen, key=lambda name: bool(targets[name]["control"]))


def deciding(row: Mapping[str, Any]) -> list[float]:
    """The interval by which an attack is above chance: that of an exploratory one shares its error with the others."""
    return row["auc_ci"] if row["role"] == "primary" else row["auc_ci_corrected"]


def above(row: Mapping[str, Any]) -> bool:
    """An attack is above chance if its interval is."""
    return deciding(row)[0] > 0.5


def outcome(pair: list[float]) -> str:
    """What an interval of an AUC says."""
    if pair[0] > 0.5:
        return "tells members from non-members better than chance"
    if pair[1] < 0.5:
        return "ranks members below non-members, which points to a shift between the two sets,"
    if pair[1] - pair[0] < 1e-6:
        return NOTHING
    return "is not seen to tell members from non-members better than chance"


def verdict(audit: Audit, labels: Mapping[str, str] | None = None) -> str:
    """The result of an audit in one paragraph of plain words.

    Args:
        labels: name of a target -> what it is called, where that is another word.
    """
    labels = labels or {}
    parts = [part(audit, labels) for part in (_negative_controls, _recipes, _models, _tests)]
    parts.append([of_images(audit, name, labels) for name in names(audit, ("released",))])
    return " ".join(filter(None, [*itertools.chain(*parts), of_control(audit)]))


def maker(audit: Audit, shadows: str, labels: Mapping[str, str] | None = None) -> str:
    """ "made as the Teacher was": how the models of a set of shadows were made."""
    for name in audit["setting"]["targets"]:
        if own_shadows(audit, name) == shadows:
            return f"made as {target_title(audit, name, labels)} was"
    if len(audit["setting"]["shadow_sets"]) == 1:
        return "made as the shadows were"
    return f"made as the shadows of {shadows_title(audit, shadows, labels)} were"


def own_shadows(audit: Audit, name: str) -> str | None:
    """The shadows that were made as the target was, or None."""
    facts = audit["setting"]["targets"][name]
    return facts.get("shadows") if facts["kind"] == "full" and not facts["control"] else None


def shadows_title(audit: Audit, shadows: str, labels: Mapping[str, str] | None = None) -> str:
    """The title of the target that these shadows were made for; where it has none, their own name."""
    targets = audit["setting"]["targets"]
    names = [name for name in targets if shadows in (own_shadows(audit, name), name)]
    titles = (target_title(audit, name, labels) for name in names)
    return next((words for name, words in zip(names, titles, strict=True) if words != name), shadows)


def primary_of(audit: Audit, shadows: str) -> str:
    """The attack on a recipe that was named beforehand, or the first one that was run."""
    each = audit["leave_one_out"][shadows]
    return next((attack for attack, row in each.items() if row["role"] == "primary"), next(iter(each)))


def target_title(audit: Audit, name: str, labels: Mapping[str, str] | None = None) -> str:
    """What sentences call a target."""
    if audit["setting"]["targets"][name]["control"]:
        return "the positive control"
    return audit["setting"]["targets"][name].get("title") or (labels or {}).get(name, name)


def _recipes(audit: Audit, labels: Mapping[str, str]) -> list[str]:
    level, sentences = percent_of_level(audit["setting"]["level"]), []
    for name, each in audit["leave_one_out"].items():
        attack = primary_of(audit, name)
        row, models = each[attack]["auc"], f"{each[attack]['targets']} models {maker(audit, name, labels)}"
        words = title(audit, attack)
        start = f"On average over {models}, each attacked from the others, {words}"
        if row["interval"] is None:
            words = NOTHING if row["mean"] == 0.5 else "gives the same in each of them"
            sentences.append(f"{start} {words} (AUC {number(row['mean'])}).")
        else:
            sentences.append(
                f"{start} {outcome(row['interval'])} (AUC {number(row['mean'])}, {level} interval "
                f"{interval(row['interval'])} over models and records)."
            )
        if gap := each[attack]["difference"]:
            first, second = (maker(audit, which, labels) for which in (gap["first"], name))
            pairs = [audit["leave_one_out"][which][attack]["auc"]["interval"] for which in (gap["first"], name)]
            compared = _compared(audit, gap, f"models {second}", f"models {first}", pairs, several=True)
            sentences.append(
                f"{compared} (difference of AUC {gap['difference']:+.3f} {interval(gap['interval'])}, "
                f"{stated(gap['p'])})."
            )
    return sentences


def _compared(
    audit: Audit, row: dict[str, Any], second: str, first: str, pairs: list[list[float] | None], several: bool = False
) -> str:
    """What a paired test says, at the level of the intervals; ``pairs``: those of the first AUC and of the second."""
    if row["p"] is None:
        return f"{second[0].upper()}{second[1:]} and {first} cannot be compared: their difference has no variance"
    if row["p"] >= 1 - audit["setting"]["level"]:
        return f"{first[0].upper()}{first[1:]} and {second} are not told apart by it"
    is_less = row["difference"] > 0
    larger = pairs[0 if is_less else 1]
    if larger is not None and larger[0] <= 0.5:  # below chance nothing leaks, so neither leaks less
        verb, word = "have" if several else "has", "lower" if is_less else "higher"
        return f"{second[0].upper()}{second[1:]} {verb} a {word} AUC than {first}, and neither is seen above chance"
    verb, word = "leak" if several else "leaks", "less" if is_less else "more"
    return f"{second[0].upper()}{second[1:]} {verb} {word} than {first}"


def _negative_controls(audit: Audit, labels: Mapping[str, str]) -> list[str]:
    """Where a negative control failed that stands first: the figures after it decide nothing by themselves."""
    controls = audit["setting"]["negative_controls"]
    called = {name: target_title(audit, name, labels) for name in audit["setting"]["targets"]}
    failed = failed_controls(controls, called)
    return [f"A negative control failed, so what follows is not decided: {'; '.join(failed)}."] if failed else []


def failed_controls(controls: dict[str, Any] | None, called: Mapping[str, str]) -> list[str]:
    """What has to be said of negative controls that did not pass, as clauses; ``called``: target -> its title."""
    if controls is None:
        return []
    clauses, blind = [], controls["blind"]
    if blind and not blind["passed"]:
        clauses.append(
            "an attack that sees no model tells members from the others by the images alone (AUC "
            f"{number(blind['auc'])}): the two sides differ by themselves, and so much of any attack's AUC may be that "
            "difference and no leakage"
        )
    for name, sides in controls["targets"].items():
        clauses += [
            f"the attack on {called[name]} tells one half of the {side.replace('_', '-')} from the other (AUC "
            f"{number(row['auc'])}), which chance does rarely"
            for side, row in sides.items()
            if row and not row["passed"]
        ]
    return clauses


def _models(audit: Audit, labels: Mapping[str, str]) -> list[str]:
    setting, sentences = audit["setting"], []
    level, itself = percent_of_level(setting["level"]), " itself" if audit["leave_one_out"] else ""
    for name in names(audit, ("full", "transfer")):
        facts = setting["targets"][name]
        if facts["control"]:
            continue
        row, words = audit[name][facts["primary"]], title(audit, facts["primary"])
        sentences.append(
            f"{words[0].upper()}{words[1:]} {outcome(row['auc_ci'])} on {target_title(audit, name, labels)}{itself} "
            f"(AUC {number(row['auc'])}, {level} interval {interval(row['auc_ci'])})."
        )
    return sentences


def _tests(audit: Audit, labels: Mapping[str, str]) -> list[str]:
    """The first target and each other one, those by shadows made as it was where there are any."""
    targets, sentences = audit["setting"]["targets"], []
    others = [name for name in audit["comparison"] if targets[name]["kind"] == "full"] or list(audit["comparison"])
    for name in others:
        for attack, row in audit["comparison"][name].items():
            if row["role"] != "primary":
                continue
            first, second = (target_title(audit, which, labels) for which in (row["first"], name))
            pairs = [audit[which][attack]["auc_ci"] for which in (row["first"], name)]
            words = _compared(audit, row, f"{second} itself", f"{first} itself", pairs)
            sentences.append(f"{words} (paired test, {stated(row['p'])}).")
    return sentences


def of_images(audit: Audit, name: str, labels: Mapping[str, str] | None = None) -> str:
    """The result of the attacks on released images."""
    label = (labels or {}).get(name, f"the released images {name}")
    rows = {title(audit, attack): row for attack, row in audit[name].items()}
    if calibrated := audit.get("released_calibrated"):  # of a run, which has one released set
        rows[CALIBRATED] = calibrated["last_period"]["offline"]
    attacks = [words for words, row in rows.items() if above(row)]
    if attacks:
        return (
            f"{label[0].upper()}{label[1:]} by themselves leak membership (attacks above chance: {', '.join(attacks)})."
        )
    return f"No attack on {label} is seen above chance ({', '.join(rows)})."


def of_control(audit: Audit) -> str:
    """Whether the attacks detect the positive control; an empty text without one."""
    control = audit["setting"]["control"]
    if control is None:
        return ""
    start = "The positive control, an overfitted model,"
    if not control["found"]:
        return f"{start} was not found, so this audit has no power: read nothing into it."
    rows = audit[control["name"]]
    by = ", ".join(
        f"{title(audit, attack)} {number(rows[attack]['auc'])} {interval(rows[attack]['auc_ci'])}"
        for attack in control["by"]
    )
    only = "" if control["by_primary"] else ", but not by the attack named beforehand for it"
    return f"{start} is found{only} (AUC by {by})."


def of_planted(audit: Audit, labels: Mapping[str, str] | None = None) -> list[str]:
    """How small a leak the attack named beforehand would have found, by each set of shadows."""
    sentences = []
    for name, row in (audit["setting"].get("least_leak") or {}).items():
        size = f"such leaks from AUC {number(row['auc'], 2)} on" if row["auc"] else "no such leak"
        sentences.append(
            "Leaks of known size were planted into the answers of the models "
            f"{maker(audit, name, labels)}, for members drawn by chance: with probability {row['power']:g} "
            f"{title(audit, row['attack'])} finds {size} (the AUC of an attacker who knows how each record is answered "
            "with and without it)."
        )
    return sentences
