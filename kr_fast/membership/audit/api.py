"""The audit: attack target models with one set of shadow statistics and report what leaks, with intervals."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from kr_fast.data import shared_images
from kr_fast.ensemble import ModelArray, Shadows
from kr_fast.ensemble.made_by import difference
from kr_fast.membership.attacks.catalog import check_given
from kr_fast.membership.audit.choices import Auxiliary, Choices, Target
from kr_fast.membership.audit.query import Inputs, query
from kr_fast.membership.audit.report import AuditReport, audit_signals
from kr_fast.membership.inputs.answers import check_answers
from kr_fast.membership.inputs.copies import refuse_equal_weights
from kr_fast.membership.inputs.data import EQUAL, UNNAMED, check_images, check_name, check_names
from kr_fast.membership.inputs.pool import pool_of
from kr_fast.membership.statistics.epsilon import check_fair_coins
from kr_fast.membership.statistics.groups import Groups
from kr_fast.runtime import seeds
from kr_fast.runtime.errors import fail
from kr_fast.runtime.inputs import as_groups, as_labels, as_mask, described
from kr_fast.runtime.log import logger
from kr_fast.runtime.storage.image_rows import Images, rows_of

CONTROL = "control"
Model = nn.Module | ModelArray


def audit(
    target: Model | Target | Mapping[str, Model | Target] | None,
    shadows: Shadows | Mapping[str, Shadows],
    images: Images,
    labels: Tensor,
    members: Any = None,
    *,
    non_members: Any = None,
    control: Model | None = None,
    groups: Any = None,
    auxiliary: Auxiliary = Auxiliary(),  # noqa: B008 (it is frozen)
    choices: Choices = Choices(),  # noqa: B008
    path: str | Path | None = None,
) -> AuditReport:
    """Attack one or several target models with the same shadow statistics.

    Images, labels and masks may be tensors, numpy arrays or lists.

    Args:
        target: a classifier, or name -> classifier, each by itself or as a :class:`Target` that says what is known of
            it; None with ``Choices(targets="shadows")``.
        shadows: of :func:`kr_fast.train_shadows` on halves of exactly these images; or name -> shadows, where each
            target of that name is attacked with shadows made as it was made ("full") and every other target with the
            first set ("transfer"). With one set the first target is "full" and the others "transfer": for a model that
            was not made as the shadows were, a lower bound on what it leaks.
        images: uint8 ``[N, H, W, C]``, the pool; labels: integers ``[N]`` or ``[N, 1]``.
        members: bool ``[N]`` (or 0 and 1), True for the examples that the targets' training used, or their indices.
        non_members: likewise; None for all others. Examples in neither are left out.
        control: a positive control, see :func:`kr_fast.membership.overfitted`.
        groups: ``[N]`` texts or integers, what each image belongs to (a patient, a site): the risk of records is then
            also told by group, and membership is also counted by group, see
            :mod:`kr_fast.membership.attacks.by_group`; ``train_shadows`` should be given the same groups.
        auxiliary: a population, released synthetic images: see :class:`kr_fast.membership.Auxiliary`.
        choices: attacks, queries, levels, seed: see :class:`kr_fast.membership.Choices`.
        path: folder for the signals; a call that was interrupted continues there.
    Raises: UserError naming the argument; so is a target (or control) that is among its shadows, and shadows that are
        one model.
    """
    inputs = checked(target, shadows, images, labels, members, non_members, control, groups, auxiliary, choices)
    return audit_signals(query(inputs, choices, None if path is None else Path(path)), choices)


def checked(
    target: Any,
    shadows: Any,
    images: Any,
    labels: Any,
    members: Any,
    non_members: Any,
    control: Any,
    groups: Any,
    auxiliary: Auxiliary,
    choices: Choices,
) -> Inputs:
    """The arguments of :func:`audit`, each as what it should be; whatever does not fit is refused, models last."""
    for name, value, kind in (("auxiliary", auxiliary, Auxiliary), ("choices", choices, Choices)):
        if not isinstance(value, kind):
            fail("audit", name, f"be of type {kind.__name__}", described(value))
    images = check_images("images", images, None)
    count, shape = len(images), tuple(images.shape[1:])
    synthetic = {} if auxiliary.synthetic is None else {"synthetic": auxiliary.synthetic}
    synthetic = dict(auxiliary.synthetic) if isinstance(auxiliary.synthetic, Mapping) else synthetic
    synthetic = {name: check_images(f"synthetic {name}", value, shape) for name, value in synthetic.items()}
    reference = None if auxiliary.reference is None else check_images("reference", auxiliary.reference, shape)
    labels = as_labels("audit", "labels", labels, count)
    groups = None if groups is None else as_groups("audit", "groups", groups, count)
    targets = _targets(target, control)
    check_names(targets, synthetic)
    models = _models(targets)
    if not models and (choices.targets != "shadows" or target is not None):
        fail("audit", "target", "hold at least one model", 0)
    sets = _sets(shadows, count)
    if choices.random_members and isinstance(auxiliary.population, float):
        rule = "be (images, labels) with random_members: a share takes from the non-members only"
        fail("audit", "population", rule, auxiliary.population)
    mask, index = (None, None) if not models else pool_of(members, non_members, count)
    if choices.random_members and mask is not None:
        check_fair_coins("audit", mask)
    choices.check_paths((*targets, *synthetic), sets)
    first = next(iter(sets))
    set_of = {name: name if name in sets else first for name in models}
    for name, each in sets.items():
        refuse_equal_weights({n: m.models[0] for n, m in models.items() if set_of[n] == name}, each.array.models)
    if index is not None:
        images, labels = rows_of(images, index), labels[index]
        groups = None if groups is None else groups[index.numpy()]
        sets = {name: dataclasses.replace(each, keep=each.keep[:, index]) for name, each in sets.items()}
    given = {
        "in": all(bool(sets[name].keep.any()) for name in set(set_of.values()) or sets),
        "population": auxiliary.population is not None,
        "synthetic": bool(synthetic),
        "reference": reference is not None or auxiliary.population is not None,
        "members": bool(models),
    }
    check_given((*(choices.attacks or ()), *filter(None, (choices.primary,))), given)
    population = _population(auxiliary.population, mask, choices.seed, images, groups)
    asked = {f"target {name}": model for name, model in models.items()}
    asked |= {f"shadow 0 of {name}": ModelArray(each.array.models[:1]) for name, each in sets.items()}
    for name, model in asked.items():
        check_answers(model(images[:64])[0], name)
    full = set(models) & set(sets) if isinstance(shadows, Mapping) else set(list(models)[:1])
    full |= {CONTROL} if control is not None else set()
    facts = {
        name: {
            "shadows": set_of[name],
            "kind": each.kind or ("full" if name in full else "transfer"),
            "shared": each.shared,
            "accuracy": each.accuracy,
            "control": name == CONTROL and control is not None,
            "title": each.title,
            "recipe": _recipe(each, sets[set_of[name]]),
        }
        for name, each in targets.items()
    }
    for name, row in facts.items():
        if row["kind"] == "full" and row["recipe"] not in ("", EQUAL):
            logger.warning("audit: %s was made by another recipe than its shadows: %s", name, row["recipe"])
            row["kind"] = "transfer"
    index = torch.arange(count) if index is None else index
    return Inputs(models, facts, sets, images, labels, mask, index, population, synthetic, reference, groups)


def _recipe(target: Target, shadows: Shadows) -> str:
    """How the recipe of a target differs from that of its shadows; :data:`EQUAL`, or "" where one is not known."""
    if target.recipe is None or shadows.recipe is None:
        return ""
    return difference(target.recipe, shadows.recipe) or EQUAL


def _targets(target: Any, control: Any) -> dict[str, Target]:
    """Name -> target, the control last."""
    if not isinstance(target, nn.Module | ModelArray | Target | Mapping | None):
        fail("audit", "target", "be a classifier, or name -> classifier", described(target))
    targets = {"target": target} if isinstance(target, nn.Module | ModelArray | Target) else dict(target or {})
    if control is not None:
        if CONTROL in targets:
            fail("audit", "target", f"not be named {CONTROL} where a control is given", CONTROL)
        targets[CONTROL] = control
    return {name: each if isinstance(each, Target) else Target(each) for name, each in targets.items()}


def _models(targets: Mapping[str, Target]) -> dict[str, ModelArray]:
    """Name -> array of one model."""
    for name, each in targets.items():
        if not isinstance(each.model, nn.Module | ModelArray):
            fail("audit", f"target {name}", "be a torch module or a ModelArray", described(each.model))
    models = {
        name: each.model if isinstance(each.model, ModelArray) else ModelArray([each.model])
        for name, each in targets.items()
    }
    for name, model in models.items():
        if len(model) != 1:
            fail("audit", f"target {name}", "be one model", len(model))
    return models


def _sets(shadows: Any, count: int) -> dict[str, Shadows]:
    """Name -> shadows of ``count`` examples."""
    sets = {UNNAMED: shadows} if isinstance(shadows, Shadows) else shadows
    if not isinstance(sets, Mapping) or not all(isinstance(each, Shadows) for each in sets.values()):
        fail("audit", "shadows", "be Shadows (of train_shadows), or name -> such", described(shadows))
    if not sets:
        fail("audit", "shadows", "hold at least one set", 0)
    for name in sets:
        check_name("shadows", name)
    sets = {n: dataclasses.replace(each, keep=as_mask("audit", "keep", each.keep, 2)) for n, each in sets.items()}
    for name, each in sets.items():
        if each.keep.shape != (len(each.array), count):
            got = f"{list(each.keep.shape)} in {name}" if len(sets) > 1 else list(each.keep.shape)
            fail("audit", "shadows", f"have keep [{len(each.array)}, {count}]", got)
    return sets


def _population(population: Any, mask: Tensor | None, seed: int, pool: Images, groups: np.ndarray | None) -> Any:
    """None, (images, labels), or the indices of the non-members that are split off, of whole groups where there are."""
    if population is None:
        return None
    if isinstance(population, tuple | list):
        if len(population) != 2:
            fail("audit", "population", "be (images, labels) or a share in (0, 1)", f"{len(population)} values")
        images = check_images("images of the population", population[0], tuple(pool.shape[1:]))
        labels = as_labels("audit", "labels of the population", population[1], len(images))
        check_further(images, pool)
        return images, labels
    if isinstance(population, bool) or not isinstance(population, float) or not 0 < population < 1:
        got = population if isinstance(population, int | float | str) else described(population)
        fail("audit", "population", "be (images, labels) or a share in (0, 1)", got)
    if mask is None:
        fail("audit", "population", "be (images, labels) where there is no target with members", population)
    outside = (~mask).nonzero()[:, 0]
    taken = round(population * len(outside))
    if not 0 < taken < len(outside):
        fail("audit", "population", f"be a share that leaves some of {len(outside)} non-members", population)
    draw = seeds.generator(seed, "population")
    if groups is None:
        order = torch.randperm(len(outside), generator=draw)
        return outside[order[:taken]].sort().values
    at = Groups.of(groups[outside.numpy()])
    order = torch.randperm(len(at.names), generator=draw)
    before = at.sizes[order].cumsum(0)
    chosen = order[: max(1, int((before <= taken).sum()))]
    if len(chosen) == len(at.names):
        rule = "leave some groups of non-members to be attacked"
        fail("audit", "population", rule, f"{population} of {len(at.names)}")
    return outside[torch.isin(at.at, chosen)]


def check_further(images: Images, pool: Images) -> None:
    """Refuse a population that is under attack itself, every image of it."""
    if bool(shared_images(images, pool).all()):
        rule = "be further examples, not among the images under attack (a share splits some of those off)"
        fail("audit", "population", rule, f"{len(images)} of {len(images)} that are")
