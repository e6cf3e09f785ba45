"""What has to be said beside an audit's figures: its power, its weaknesses and what it assumes."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from kr_fast.data.printable import counted
from kr_fast.membership.attacks.catalog import CATALOG, Attack, offline_form, sides
from kr_fast.membership.inputs.copies import images_on_both_sides, population_under_attack, shadow_but_for_rounding
from kr_fast.membership.inputs.data import EQUAL, UNNAMED, AuditData
from kr_fast.membership.statistics.auc_intervals import chance_range

FEW_SHADOWS = 8  # on a side
FEW_EXAMPLES = 30  # members, or non-members
SIZE_RATIO_WARNING = 1.1  # ratio of training set sizes above which there is a note
AT_CHANCE = "nothing was learned, or rows and labels are in different orders, and a low AUC shows little"


def called(data: AuditData) -> dict[str, str]:
    """Name of a target, a released set or a set of shadows -> what sentences call it."""
    attacked = {name: target for name, target in data.targets.items() if not target.control}
    titles = {name: target.title or name for name, target in attacked.items()}
    titles |= dict.fromkeys(data.targets.keys() - attacked.keys(), "the positive control")
    for name in data.synthetic:
        titles[name] = "the released images" + (f" {name}" if len(data.synthetic) > 1 else "")
    for name, target in attacked.items():
        if target.kind == "full" and data.shadows:
            titles.setdefault(target.shadows, titles[name])
    return {name: titles.get(name, name) for name in (*data.shadows, *titles)}


def few_examples(members: int, non_members: int, level: float = 0.95) -> list[str]:
    """What can be said at all with fewer than :data:`FEW_EXAMPLES` on a side, from the counts; nothing with more."""
    warnings = []
    low, high = chance_range(members, non_members, level)
    chance = f"an AUC between {low:.2f} and {high:.2f} is what chance gives with so few, in {100 * level:g} % of cases"
    if members < FEW_EXAMPLES:
        warnings.append(
            f"{members} member{'s' * (members > 1)}: {chance}; one of them is {100 / members:.3g} % of the TPR, so a "
            "smaller one cannot be seen at any FPR"
        )
    if non_members < FEW_EXAMPLES:
        warnings.append(
            f"{non_members} non-member{'s' * (non_members > 1)}: {chance}; one of them is {100 / non_members:.3g} % of "
            "the FPR, so nothing can be seen below it, and no TPR is claimed where fewer than 10 are flagged"
        )
    return warnings


def of_control(data: AuditData, figures: Mapping) -> dict[str, Any] | None:
    """Whether the attacks find the positive control: the one named beforehand for it, and the others, whose errors are
    shared out."""
    for name, target in data.targets.items():
        if target.control:
            primary = next(a for a, each in figures[name].items() if each["role"] == "primary")
            ends = {a: each["auc_ci" if a == primary else "auc_ci_corrected"] for a, each in figures[name].items()}
            finders = [attack for attack, pair in ends.items() if pair[0] > 0.5]
            return {"name": name, "found": bool(finders), "by": finders, "by_primary": primary in finders}
    return None


def warnings_of(
    data: AuditData, figures: Mapping, facts: Mapping, control: dict | None, level: float
) -> tuple[str, ...]:
    """What makes these figures weak."""
    titles = called(data)
    warnings = [*filter(None, (images_on_both_sides(data.images, data.members),))]
    if data.members is not None:
        inside = int(data.members.sum())
        warnings += few_examples(inside, data.count - inside, level)
    for name, shadows in data.shadows.items():
        which, least = "" if list(data.shadows) == [UNNAMED] else f" of {titles[name]}", sides(shadows.keep)
        if least < FEW_SHADOWS:
            some = counted(least, "shadow")
            warnings.append(f"only {some}{which} on a side: LiRA is weak with so few, a low AUC shows little")
        one_sided = (
            (shadows.keep.all(0), "every", "LiRA, BASE offline and label only score them 0, Attack-R 0.5"),
            ((~shadows.keep).all(0), "no", "LiRA online scores them 0"),
        )
        for mask, words, neutral in one_sided:
            if bool(mask.any()):
                warnings.append(
                    f"{int(mask.sum())} of {data.count} examples are in {words} shadow{which}: {neutral}, no evidence; "
                    "the other attacks rank them by the shadows that there are"
                )
        if count := _at_chance(shadows.signals.get("correct"), data.labels):
            warnings.append(f"{count} of {len(shadows.keep)} shadows{which} answer no better than chance: {AT_CHANCE}")
        both = 0 if shadows.population is None else population_under_attack(shadows.signals["phi"], shadows.population)
        # Of data sets that repeat some images the audit of models says as much by the images.
        if both and (data.images is None or both == shadows.population.shape[1]):
            warnings.append(
                f"every shadow{which} answers {both} of the population's {shadows.population.shape[1]} examples as it "
                "does examples under attack: a population has to be further non-members"
            )
    for name, target in data.targets.items():
        if not target.control and _at_chance(_of_one(target.signals.get("correct")), data.labels):
            warnings.append(f"{titles[name]} answers no better than chance: {AT_CHANCE}")
        shadows = data.shadows_of(target)
        if shadows and (at := shadow_but_for_rounding(target.signals["phi"], shadows.signals["phi"])) is not None:
            warnings.append(
                f"{titles[name]} answers as shadow {at} does but for rounding: if it is that model, leave that shadow "
                "out"
            )
    for name, each in figures.items():
        flat = [attack for attack, row in each.items() if row["auc_ci"][1] - row["auc_ci"][0] < 1e-6]
        if flat:
            words = ", ".join(CATALOG[attack].title for attack in flat)
            warnings.append(f"{words} gave every example of {titles[name]} the same score: no evidence either way")
    attacked = [name for name in figures if name in data.targets and not facts[name]["control"]]
    if control is not None and not control["found"]:
        warnings.append("no attack finds the positive control, an overfitted model: this audit has no power")
    elif control is not None and not control["by_primary"]:
        words = ", ".join(CATALOG[attack].title for attack in control["by"])
        named = CATALOG[facts[control["name"]]["primary"]]
        warnings.append(f"{named.title} does not find the positive control, only {words} does{_hint(named)}")
    elif control is None and attacked:
        first = figures[attacked[0]]
        if all(each["auc_ci_corrected"][0] <= 0.5 for each in first.values()):
            warnings.append(
                f"no attack finds {titles[attacked[0]]} and there is no positive control: whether this audit has power "
                "is not known"
            )
    return tuple(warnings)


def _hint(named: Attack) -> str:
    """What to do where an attack is misled by a control that is not made as the shadows were."""
    return f": name {offline_form(named.name)} too, which it does not mislead" if named.online else ""


def notes_of(data: AuditData, random_members: bool) -> list[str]:
    """What the figures assume, beside what the data say of themselves."""
    notes, titles = list(data.notes), called(data)
    if random_members and data.members is not None:
        notes.append(
            f"the one-run bounds take each of these {data.count} examples to have become a member by a fair coin of "
            "its own: what was left out, a population too, has to have been chosen before the coins were thrown"
        )
    for name, target in data.targets.items():
        if target.kind == "transfer" and data.shadows:
            kind = "transfer" if target.recipe in ("", EQUAL) else f"transfer: {target.recipe}"
            words = f"is attacked with shadows that were not made as it was ({kind}): a lower bound on what it leaks"
            notes.append(f"{titles[name]} {words}")
        elif target.shared:
            notes.append(f"the shadow pipelines of {titles[name]} share {target.shared} with its own")
    if data.members is not None:
        inside = int(data.members.sum())
        for name, shadows in data.shadows.items():
            each = float(shadows.keep.sum(1).double().mean())
            if each and not 1 / SIZE_RATIO_WARNING < inside / each < SIZE_RATIO_WARNING:
                notes.append(
                    f"each shadow of {titles[name]} was trained on {each:.0f} of these examples on average, the "
                    f"targets on {inside}: they imitate them less well, and thresholds from shadows fit them less well"
                )
    return notes


def _of_one(correct: Tensor | None) -> Tensor | None:
    return None if correct is None else correct[:, :, None]


def _at_chance(correct: Tensor | None, labels: Tensor | None) -> int:
    """How many models (``correct [A, N, M]``) have a mean recall of the classes within two deviations of chance."""
    classes = [] if labels is None else labels.unique()
    if correct is None or len(classes) < 2:
        return 0
    recall = sum(correct[0, labels == label].double().mean(0) for label in classes) / len(classes)
    chance, inverse = 1 / len(classes), sum(1 / int((labels == label).sum()) for label in classes)
    deviation = (chance * (1 - chance) * inverse) ** 0.5 / len(classes)
    return int((recall <= chance + 2 * deviation).sum())
