"""The least leak that an attack would have seen: leaks of known size, planted into the shadows' own answers.

An attack that finds nothing says something only if it would have found a leak. How small a one depends on the shadows,
on the records and on how the models' answers scatter, so it is measured on these: membership is drawn anew, and the
answers to the drawn members are raised, in the model under attack and in its shadows alike, as by a training that leaks
so much.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from kr_fast.ensemble.shadows import keep_matrix
from kr_fast.membership.attacks.catalog import METHODS, Attack, Subject
from kr_fast.membership.inputs.data import AuditData, ShadowSignals, TargetSignals
from kr_fast.membership.statistics.curve import roc
from kr_fast.membership.statistics.intervals import normal_quantile
from kr_fast.runtime import seeds

LEAST_SHADOWS = 6  # of which two are the target and what makes the rest even
DRAWS, NEEDED = 20, 16  # models under attack, and in how many of them a leak has to be found: a power of 0.8
SIZES = tuple(round(0.52 + 0.02 * step, 2) for step in range(23))  # AUCs, to 0.96
OF_PHI = tuple(METHODS[name].function for name in ("lira", "rmia", "base", "attack_r", "loss"))  # and quick


def least_leak(data: AuditData, shadows: ShadowSignals, attack: Attack, *, level: float, seed: int) -> dict | None:
    """The smallest of :data:`SIZES` that ``attack`` finds in :data:`NEEDED` of :data:`DRAWS` models with such a leak.

    Of phi (mean over queries) the difference of the two sides of each record is taken out, so that nothing is left of
    the true membership but the scatter ``s`` of a record's answers. For each draw one shadow is the target, and the
    others, less one where that makes them even, its shadows. Each record is a member of half of these, and as many are
    members of the target as in the audit, all by chance. Phi of members is raised by ``sqrt(2) s z``, ``z`` the normal
    quantile of the size. So the size is the AUC of an attacker who knows what each record's answers are with and
    without it, if they are normal. A leak is found if the interval of the attack's AUC lies above 0.5.

    Args:
        data: as of the audit; shadows: one of its sets.
        attack: one that reads phi and trains nothing, else None is returned.
        level: of the interval; seed: of all draws.
    Returns: {"attack", "draws", "power", "auc": the size, None where the largest is not found}; None where the attack
        cannot be run so, with fewer than 6 shadows, for phi that is infinite or does not scatter, and of records in
        groups, which are no independent ones.
    """
    models, count = shadows.keep.shape
    phi = shadows.signals["phi"].double().mean(0)
    held = shadows.population_keep is not None and "population" in attack.needs  # by some of the shadows
    if attack.function not in OF_PHI or models < LEAST_SHADOWS or data.groups is not None or held:
        return None
    if not phi.isfinite().all() or attack.missing(Subject(data, shadows)):
        return None
    answers, scatter = _without_membership(phi, shadows.keep.T)
    if not scatter.any():
        return None
    order = answers.mean(1).argsort()  # so that where a record stands does not show
    answers, scatter = answers[order], scatter[order]
    members = count // 2 if data.members is None else int(data.members.sum())
    population = None if shadows.population is None else shadows.population.double().mean(0, keepdim=True)
    draws = []
    for draw in range(DRAWS):
        generator, target = seeds.generator(seed, "planted", draw), draw % models
        others = torch.randperm(models, generator=generator)
        others = others[others != target][: 2 * ((models - 1) // 2)]
        keep = keep_matrix(len(others), count, seeds.derive(seed, "planted", draw))
        inside = torch.zeros(count, dtype=torch.bool)
        inside[torch.randperm(count, generator=generator)[:members]] = True
        draws.append((target, others, keep, inside))

    def found(size: float, target: int, others: Tensor, keep: Tensor, inside: Tensor) -> bool:
        raised = 2**0.5 * normal_quantile(size) * scatter
        signals = {"phi": (answers[:, others] + raised[:, None] * keep.T)[None]}
        z = None if population is None else population[:, :, others]
        own = TargetSignals(
            {"phi": (answers[:, target] + raised * inside)[None]}, None if z is None else population[:, :, target]
        )
        scores = attack.run(Subject(data, ShadowSignals(keep, signals, z), own))[0]
        return roc(scores, inside).auc_interval(level)[0] > 0.5

    def seen(size: float) -> bool:
        hits = 0
        for done, draw in enumerate(draws, 1):
            hits += found(size, *draw)
            if hits == NEEDED or done - hits > DRAWS - NEEDED:
                break
        return hits == NEEDED

    first, last = 0, 0  # from below, as of many records a small leak is found, and each try takes long
    while last < len(SIZES) and not seen(SIZES[last]):
        first, last = last + 1, 2 * last + 1
    last = min(last, len(SIZES))
    while first < last:
        middle = (first + last) // 2
        first, last = (first, middle) if seen(SIZES[middle]) else (middle + 1, last)
    least = SIZES[first] if first < len(SIZES) else None
    return {"attack": attack.name, "draws": DRAWS, "power": NEEDED / DRAWS, "auc": least}


def least_leaks(
    data: AuditData, facts: Mapping[str, Any], attacks: Mapping[str, Attack], level: float, seed: int
) -> dict[str, dict[str, Any]]:
    """Set of shadows -> :func:`least_leak` of the attack named beforehand on the target that they were made for."""
    found = {}
    for name, target in data.targets.items():
        if target.control or target.kind != "full" or target.shadows in found or not data.shadows:
            continue
        attack, shadows = attacks[facts[name]["primary"]], data.shadows[target.shadows]
        row = least_leak(data, shadows, attack, level=level, seed=seeds.derive(seed, "planted"))
        found |= {} if row is None else {target.shadows: row}
    return found


def _without_membership(phi: Tensor, held: Tensor) -> tuple[Tensor, Tensor]:
    """(phi without the difference of both sides, with the scatter that is given too): ``[N, M]`` and ``[N]``.

    The scatter has the degrees of freedom that two means leave.
    """
    residual = phi.clone()
    for side in (held, ~held):
        mean = (phi * side).sum(1) / side.sum(1).clamp_min(1)
        residual -= mean[:, None] * side
    models = phi.shape[1]
    residual *= (models / (models - 2)) ** 0.5
    return phi.mean(1, keepdim=True) + residual, residual.square().mean(1).sqrt()
