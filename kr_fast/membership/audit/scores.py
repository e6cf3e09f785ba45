"""Which attacks an audit can run, and the scores that they give: of targets, and of shadows left out in turn."""

import dataclasses
from collections.abc import Collection

from torch import Tensor

from kr_fast.membership.attacks.catalog import CATALOG, DEFAULT, Attack, Subject, offline_form, refuse
from kr_fast.membership.audit.choices import Choices
from kr_fast.membership.inputs.data import AuditData
from kr_fast.membership.statistics.balanced import partners
from kr_fast.runtime.errors import UserError, fail
from kr_fast.runtime.progress import bar


def choose(data: AuditData, choices: Choices) -> tuple[list[Attack], dict[str, str]]:
    """The attacks to run, and name -> what those of the default set need that cannot be run."""
    chosen, skipped = [], {}
    for name in dict.fromkeys(DEFAULT if choices.attacks is None else choices.attacks):
        attack = CATALOG[name].configured(**choices.rmia)
        missing = missing_of(attack, data)
        if missing is None and attack.released and data.members is None:
            missing = "members"
        if missing is None:
            chosen.append(attack)
        elif choices.attacks is not None:
            refuse(name, missing)
        else:
            skipped[name] = missing
    if not chosen:
        fail("audit", "attacks", "hold at least one name", list(choices.attacks or ()))
    return chosen, skipped


def named_for(data: AuditData, name: str, primary: str, run: Collection[str]) -> str:
    """The attack that is named beforehand for a target or released set, among those that are run on it.

    For the positive control it is the offline form, where that is run. An overfitted model is not made as the shadows
    were: it is surer of every record than they are, and to an attack that expects of members what shadows answer that
    held the record, this says nothing of members. What is not expected of any shadow without the record still does.
    """
    target = data.targets.get(name)
    asked = offline_form(primary) if target is not None and target.control else primary
    return next(attack for attack in (asked, primary, *run) if attack in run)


def missing_of(attack: Attack, data: AuditData) -> str | None:
    """The first thing that the attack needs of any target and was not given, or None; without targets, of any set."""
    subjects = [Subject(data, data.shadows_of(each), each) for each in data.targets.values()]
    subjects = subjects or [Subject(data, each) for each in data.shadows.values()]
    return next(filter(None, map(attack.missing, [Subject(data)] if attack.released else subjects)), None)


def leave_one_out(
    data: AuditData, chosen: list[Attack], asked: bool, seed: int
) -> tuple[dict[str, dict[str, tuple[Tensor, Tensor]]], dict[str, dict[str, str]]]:
    """Set -> attack -> (scores, keep) of shadows attacked leave-one-out; and set -> attack -> why it was not.

    All sets have the partners that follow from ``seed``, their keep and the answers of the first set, so that sets
    which pair (Teachers and their Students) stay pairs.
    """
    used = {target.shadows for target in data.targets.values() if not target.control} or set(data.shadows)
    used = set(data.shadows) if asked else used
    results: dict[str, dict[str, tuple[Tensor, Tensor]]] = {}
    skipped: dict[str, dict[str, str]] = {}
    answers = next((each.signals["phi"] for each in data.shadows.values()), None)
    with bar(len(used) * len(chosen), "shadows against each other", "attack") as progress:
        for name in data.shadows:
            if name not in used:
                continue
            results[name], shadows = {}, data.shadows[name]
            shadows = dataclasses.replace(shadows, partner=partners(shadows.keep, seed, answers))
            subject, mixed = Subject(data, shadows), shadows.keep.any(1) & ~shadows.keep.all(1)
            for attack in chosen:
                progress.update()
                # A population that the shadows were trained on holds members of the one that is left out.
                why = attack.missing(subject)
                if "population" in attack.needs and shadows.population_keep is not None:
                    why = "the shadows were trained on some of the population"
                elif why is None and not bool(mixed.any()):
                    why = "no shadow has members and non-members"
                if why is not None:
                    skipped.setdefault(name, {})[attack.name] = why
                    continue
                try:
                    rows = run_attack(attack, subject)
                except UserError as error:  # too few shadows to leave one out: no thresholds from them
                    if asked:
                        raise
                    skipped.setdefault(name, {})[attack.name] = str(error)
                    continue
                usable = mixed[: len(rows)]
                if bool(usable.any()):
                    results[name][attack.name] = (rows[usable], shadows.keep[: len(rows)][usable])
                else:
                    skipped.setdefault(name, {})[attack.name] = "no shadow attacked has members and non-members"
    return results, skipped


def run_attack(attack: Attack, subject: Subject) -> Tensor:
    """Scores ``[K, N]``; what an attack refuses (too few shadows, say) the user can correct."""
    try:
        return attack.run(subject)
    except ValueError as error:
        raise UserError(str(error)) from error


def scores_of(data: AuditData, chosen: list[Attack]) -> dict[str, dict[str, Tensor]]:
    """Name of a target or released set -> attack -> float64 ``[N]``."""
    scores: dict[str, dict[str, Tensor]] = {}
    on_models = [attack for attack in chosen if not attack.released]
    on_images = [attack for attack in chosen if attack.released]
    total = len(data.targets) * len(on_models) + len(data.synthetic) * len(on_images)
    with bar(total, "attacks", "attack") as progress:
        for name, target in data.targets.items():
            for attack in on_models:
                row = run_attack(attack, Subject(data, data.shadows_of(target), target))[0]
                scores.setdefault(name, {})[attack.name] = row.double()
                progress.update()
        for name, images in data.synthetic.items():
            for attack in on_images:
                scores.setdefault(name, {})[attack.name] = attack.run(Subject(data, synthetic=images)).double()
                progress.update()
    return scores
