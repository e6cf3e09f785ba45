"""The default rules of the verdict: each a figure, its limit, whether it is kept, and a sentence that says so."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from kr_fast.data.printable import counted
from kr_fast.membership.verdict.limits import Limits
from kr_fast.membership.verdict.paths import FEW_SHADOWS, Audit, figures, largest_seen, own_set
from kr_fast.report.sections import released
from kr_fast.report.sentences import (
    failed_controls,
    maker,
    percent_of_level,
    primary_of,
    target_title,
    title,
)
from kr_fast.report.tables import interval, number

LEAST_LEAK = 0.65  # AUC of a planted leak that has to be found


@dataclasses.dataclass(frozen=True)
class Rule:
    """A figure that must not be above a limit.

    Args:
        path: of the figure; value: None where it was not computed.
        passed: None where the figure decides nothing, such as one that is missing or a lower bound.
        words: one sentence for people.
        shown: the figure does not only exceed the limit, it shows what the limit is about: leakage, or lost accuracy.
        chance: largest probability of ``shown`` where there is none, by the level of the interval or of the test.
        source: "default", or "asked" for one of ``fail_above``.
    """

    path: str
    limit: float
    value: float | None
    passed: bool | None
    words: str
    shown: bool = False
    chance: float = 0.0
    source: str = "default"

    def to_dict(self) -> dict[str, Any]:
        """Plain values for the JSON."""
        keys = ("path", "limit", "value", "passed", "source", "words")
        return {key: getattr(self, key) for key in keys}


def default_rules(
    audit: Audit, limits: Limits, names: Sequence[str], bounds: Mapping[str, str] | None = None
) -> Iterator[Rule]:
    """The rules on the targets (or sets of shadows) ``names``, and on the controls.

    Args:
        bounds: target -> why what was measured bounds its leakage from below only, as a sentence.
    """
    values = figures(audit)
    if limits.controls:
        yield _negative_controls(audit, values)
        yield _positive_control(audit, values)
    if (audit.get("canaries") or {}).get("student"):
        yield _of_canaries(audit["canaries"]["student"])
    for name in names:
        yield from _of_model(audit, limits, name)
        if audit["setting"]["targets"].get(name, {}).get("kind") == "released":
            yield from _of_images(audit, values, name)
        else:
            yield from _of_recipe(audit, limits, name)
            yield _of_records(audit, limits, name)
            yield _of_shadows(audit, values, name, (bounds or {}).get(name))
            if limits.controls:
                yield from _of_planted(audit, values, name)
        if audit.get("by_group"):
            yield from _by_group(audit, limits, name)


def _capitals(text: str) -> str:
    return text[:1].upper() + text[1:]


def _label(audit: Audit, name: str) -> str:
    """What sentences call a target, or the models of a set of shadows without one."""
    return target_title(audit, name) if name in audit["setting"]["targets"] else f"models {maker(audit, name)}"


def _of_model(audit: Audit, limits: Limits, name: str) -> Iterator[Rule]:
    """The attack that was named beforehand, and the others, on the very model."""
    path, label = f"{name}.auc_high", _label(audit, name)
    if name not in audit["setting"]["targets"]:
        words = f"No model was attacked itself, only {label} were, each from the others."
        yield Rule(path, limits.auc, None, None, words)
        return
    level, primary = audit["setting"]["level"], audit["setting"]["targets"][name]["primary"]
    row = audit[name][primary]
    yield _auc(path, limits.auc, level, title(audit, primary), f" on {label}", row["auc"], row["auc_ci"])
    others = {
        attack: (each["auc_ci_corrected"], each["auc"]) for attack, each in audit[name].items() if attack != primary
    }
    if others:
        yield _others(audit, f"{name}.others_auc_high", limits.auc, f" on {label}", others)


def _of_images(audit: Audit, values: Mapping[str, float], name: str) -> Iterator[Rule]:
    """The tests of released images, where they could be run."""
    path, level = f"{name}.nearer", audit["setting"]["level"]
    if path in values:
        sentence = released.words(audit["released_tests"][name], level)
        kept = values[path] <= level
        yield Rule(path, level, values[path], kept, sentence, not kept, 1 - level)


def _of_recipe(audit: Audit, limits: Limits, name: str) -> Iterator[Rule]:
    """The same over the models that were made as the target was, each attacked from the others."""
    own = own_set(audit, name)
    each = audit["leave_one_out"].get(own)
    if not each:
        return
    level, primary = audit["setting"]["level"], primary_of(audit, own)
    row, where = each[primary]["auc"], f", averaged over {each[primary]['targets']} models {maker(audit, own)},"
    path = f"{name}.recipe_auc_high"
    yield _auc(path, limits.auc, level, title(audit, primary), where, row["mean"], row["interval"])
    others = {
        attack: (other["auc"]["interval_corrected"], other["auc"]["mean"])
        for attack, other in each.items()
        if attack != primary
    }
    if others:
        yield _others(audit, f"{name}.recipe_others_auc_high", limits.auc, where, others)


def _auc(
    path: str, limit: float, level: float, attack: str, where: str, auc: float, pair: Sequence[float] | None
) -> Rule:
    """An AUC leaks where its interval lies above 0.5 and ends above the limit."""
    attack, chance = _capitals(attack), (1 - level) / 2
    if pair is None or pair[1] - pair[0] < 1e-6:
        words = f"{attack}{where} gives all the same score, or each time the same AUC, and shows nothing either way."
        return Rule(path, limit, None, None, words)
    low, high = pair
    text = f"AUC {number(auc)}, {percent_of_level(level)} interval {interval(pair, limits=(0.5, limit))}"
    if high > limit and low > 0.5:
        words = f"{attack}{where} tells members from non-members better than chance: {text}, limit {limit:g}."
        return Rule(path, limit, high, False, words, True, chance)
    if high > limit:
        words = (
            f"{attack}{where} is not seen above chance, but the interval is too wide for the limit of {limit:g} "
            f"({text}): more examples, or more models, narrow it."
        )
        return Rule(path, limit, high, False, words, chance=chance)
    if high < 0.5:
        words = (
            f"{attack}{where} ranks members below non-members, which points to a shift between the two sides and "
            f"decides nothing ({text})."
        )
        return Rule(path, limit, high, None, words, chance=chance)
    seen = "is above chance and within" if low > 0.5 else "is not seen above chance and ends within"
    return Rule(path, limit, high, True, f"{attack}{where} {seen} the limit of {limit:g} ({text}).", chance=chance)


def _others(
    audit: Audit, path: str, limit: float, where: str, rows: Mapping[str, tuple[Sequence[float] | None, float]]
) -> Rule:
    """The attacks that were not named beforehand share one error; they matter where one is seen above chance."""
    value, chance = largest_seen(pair for pair, _ in rows.values()), (1 - audit["setting"]["level"]) / 2
    if value <= limit:
        some = "stays within" if value > 0.5 else "is seen above chance: within"
        subject = "Every other attack" if value > 0.5 else "No other attack"
        return Rule(path, limit, value, True, f"{subject}{where} {some} the limit of {limit:g}.", chance=chance)
    over = [
        f"{title(audit, attack)} (AUC {number(auc)} {interval(pair)})"
        for attack, (pair, auc) in rows.items()
        if largest_seen([pair]) > limit
    ]
    words = f"Other attacks{where} tell members from non-members, limit {limit:g}: {', '.join(over)}."
    return Rule(path, limit, value, False, words, True, chance)


def _of_records(audit: Audit, limits: Limits, name: str) -> Rule:
    """Single records: found, not found, or not to be found by so few shadows."""
    path, limit = f"{name}.records", limits.records
    own = own_set(audit, name)
    row = audit.get("records", {}).get(own)
    if row is None or not row["tested"]:
        label, why = _label(audit, name), "no shadows were made as it was"
        if row is not None:
            why = "none has 4 shadows on each side"
        return Rule(path, limit, None, None, f"Single records were not tested for {label}: {why}.")
    found, rate = row["found"], percent_of_level(row["rate"])
    value = f"{found:,} of {row['tested']:,} records {'is' if found == 1 else 'are'} found"
    where = f"by the models {maker(audit, own)}, at a false discovery rate of {rate}"
    if found > limit:
        words = f"{value} {where}, limit {limit}{_although(audit, own)}."
        return Rule(path, limit, found, False, words, True, row["rate"])
    if row["least_advantage"] is None:
        words = f"{value} {where}, but so few models cannot find one that stands alone, however exposed it is."
        return Rule(path, limit, found, None, words, chance=row["rate"])
    if row["untested"]:
        words = f"{value} {where}, but {row['untested']:,} more, with fewer than 4 shadows on a side, were not tested."
        return Rule(path, limit, found, None, words, chance=row["rate"])
    words = (
        f"{value} {where}, limit {limit}: one that stands alone would be with probability {row['power']:g} from an "
        f"advantage of {number(row['least_advantage'], 2)} on."
    )
    return Rule(path, limit, found, True, words, chance=row["rate"])


def _by_group(audit: Audit, limits: Limits, name: str) -> Iterator[Rule]:
    """The attack that was named beforehand with groups as units, and single groups."""
    counted, level, own = audit["by_group"], audit["setting"]["level"], own_set(audit, name)
    if row := counted["targets"].get(name):
        path, where = f"by_group.targets.{name}.auc_ci.1", f" on {_label(audit, name)}, counted by group,"
        yield _auc(path, limits.auc, level, title(audit, row["attack"]), where, row["auc"], row["auc_ci"])
    if row := counted["recipes"].get(own):
        path, attack = f"by_group.recipes.{own}.auc.interval.1", title(audit, primary_of(audit, own))
        where = f", counted by group and averaged over {row['targets']} models {maker(audit, own)},"
        yield _auc(path, limits.auc, level, attack, where, row["auc"]["mean"], row["auc"]["interval"])
    if (row := counted["records"].get(own)) and row["tested"]:
        found, path = row["found"], f"by_group.records.{own}.found"
        is_found = "is" if found == 1 else "are"
        words = (
            f"{found:,} of {row['tested']:,} groups {is_found} found as a whole by the models {maker(audit, own)}, "
            f"at a false discovery rate of {percent_of_level(row['rate'])}, limit {limits.records}."
        )
        unknown = row["least_advantage"] is None or row["untested"]
        passed = None if unknown and found <= limits.records else found <= limits.records
        yield Rule(path, limits.records, found, passed, words, found > limits.records, row["rate"])


def _although(audit: Audit, shadows: str) -> str:
    """That all records together show nothing, where single ones do."""
    if not audit["leave_one_out"].get(shadows):
        return ""
    row = audit["leave_one_out"][shadows][primary_of(audit, shadows)]["auc"]
    if row["interval"] is None or row["interval"][0] > 0.5:
        return ""
    words = f"AUC {number(row['mean'])} {interval(row['interval'])}"
    return f", although members as a whole are not told from non-members ({words})"


def _of_shadows(audit: Audit, values: Mapping[str, float], name: str, bound: str | None) -> Rule:
    """Whether there were shadows that were made as the target was, and enough of them."""
    path, label, facts = f"{name}.shadows_missing", _label(audit, name), audit["setting"]["targets"].get(name)
    value = values.get(path)
    if facts is not None and facts["shadows"] is None:
        words = f"{_capitals(label)} was attacked without shadow models, by weak attacks only."
        return Rule(path, 0, None, None, words)
    if value is None:
        words = f"{_capitals(label)} had no shadows that were made as it was: its figures bound its leakage from below."
        return Rule(path, 0, None, None, words)
    side = audit["setting"]["shadow_sets"][own_set(audit, name)]["on_the_smaller_side"]
    if value > 0:
        some = counted(side, "shadow")
        words = f"A record has {some} on a side: with fewer than {FEW_SHADOWS} a low AUC shows little."
        return Rule(path, 0, value, False, words)
    if bound:
        return Rule(path, 0, value, None, bound)
    return Rule(path, 0, value, True, f"A record has {side} shadows on a side, made as {label} was.")


def _of_planted(audit: Audit, values: Mapping[str, float], name: str) -> Iterator[Rule]:
    """Whether a leak would have been seen: the least one, planted into the shadows' answers, that is found."""
    row, path = (audit["setting"].get("least_leak") or {}).get(own_set(audit, name)), f"{name}.least_leak"
    if row is None:
        return
    of, limit = f"leaks that were planted into the answers of models {maker(audit, own_set(audit, name))}", LEAST_LEAK
    value, attack = values.get(path), title(audit, row["attack"])
    if value is None:
        words = f"Of {of}, {attack} finds none with probability {row['power']:g}: more models or records do."
        yield Rule(path, limit, None, None, words)
        return
    kept, only = value <= limit, "" if value <= limit else "only "
    rest = "" if kept else ": more models, or more records, show smaller ones"
    words = (
        f"Of {of}, {attack} finds {only}those from AUC {number(value, 2)} on with probability {row['power']:g}, limit "
        f"{limit:g}{rest}."
    )
    yield Rule(path, limit, value, kept, words)


def _of_canaries(row: Mapping[str, Any]) -> Rule:
    """Canaries in twins of the Student: what an average over ordinary records does not show of unusual ones.

    They rule *share* out and are no leak of a record that is there, so they do not say *do not share*.
    """
    path, low = "canaries.student.auc_ci.0", row["auc_ci"][0]
    text = f"AUC {number(row['auc'])} {interval(row['auc_ci'])}"
    if low <= 0.5:
        words = f"Mislabelled canaries are not seen to be found in twins of the Student ({text})."
        return Rule(path, 0.5, low, True, words)
    words = (
        f"Mislabelled canaries, which stand for the records that a training memorises most, are found in twins of the "
        f"Student ({text}): what is unusual in a record, such as a wrong label, passes into it."
    )
    return Rule(path, 0.5, low, False, words)


def _negative_controls(audit: Audit, values: Mapping[str, float]) -> Rule:
    path = "negative_controls_failed"
    value = values.get(path)
    if value is None:
        return Rule(path, 0, None, None, "No negative control could be run.")
    if not value:
        return Rule(path, 0, value, True, "Every negative control passed.")
    called = {name: target_title(audit, name) for name in audit["setting"]["targets"]}
    clauses = failed_controls(audit["setting"]["negative_controls"], called)
    return Rule(path, 0, value, False, f"A negative control failed: {'; '.join(clauses)}.")


def _positive_control(audit: Audit, values: Mapping[str, float]) -> Rule:
    path = "positive_controls_missed"
    value, control, canaries = values.get(path), audit["setting"]["control"], audit.get("canaries")
    if canaries:
        row = canaries["teacher"]
        text = f"AUC {number(row['auc'])} {interval(row['auc_ci'])}, own members {interval(row['own']['auc_ci'])}"
        which = "are found above" if not value else "are not found above"
        rest = "" if not value else ": no proof that these attacks have power"
        words = f"Mislabelled canaries in twins of the Teacher {which} its own members{rest} ({text})."
        return Rule(path, 0, value, not value, words)
    if value is None:
        words = "There was no positive control: whether these attacks have power is not known."
        return Rule(path, 0, None, None, words)
    named = audit["setting"]["targets"][control["name"]]["primary"]
    if not value:
        row = audit[control["name"]][named]
        text = f"{title(audit, named)} (AUC {number(row['auc'])} {interval(row['auc_ci'])})"
        words = f"The positive control, an overfitted model, is detected by {text}, named beforehand for it."
        return Rule(path, 0, value, True, words)
    by = f"only by {', '.join(title(audit, each) for each in control['by'])}" if control["by"] else "by no attack"
    missed = f"{title(audit, named)}, named beforehand for it, misses it"
    words = f"The positive control, an overfitted model, is detected {by}: {missed}."
    return Rule(path, 0, value, False, words)
