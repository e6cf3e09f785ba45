"""The audit: attack target models with one set of shadow statistics and report what was found, with intervals."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kr_fast.data import shared_images
from kr_fast.ensemble import ModelArray, Query, Shadows
from kr_fast.ensemble.inference.queries import as_queries
from kr_fast.membership.attacks.catalog import CATALOG, DEFAULT, check_asked, check_given
from kr_fast.membership.audit.data import (
    AuditData,
    ShadowSignals,
    TargetSignals,
    check_images,
    check_kind,
    check_name,
    check_names,
)
from kr_fast.membership.audit.figures import Choices
from kr_fast.membership.audit.pool import pool_of
from kr_fast.membership.audit.report import AuditReport, audit_signals
from kr_fast.membership.inputs.answers import ANSWERS, SIGNALS, as_user_error, check_accuracy, check_answers
from kr_fast.membership.inputs.copies import refuse_equal_weights
from kr_fast.membership.statistics.epsilon import check_fair_coins
from kr_fast.runtime import seeds
from kr_fast.runtime.errors import fail
from kr_fast.runtime.inputs import as_labels, as_mask, described

CONTROL = "control"
LABEL_ONLY = "lira"  # queries of "label_only" where the audit itself makes one


def audit(
    target: nn.Module | ModelArray | Mapping[str, nn.Module | ModelArray] | None,
    shadows: Shadows | Mapping[str, Shadows],
    images: Tensor,
    labels: Tensor,
    members: Any = None,
    *,
    non_members: Any = None,
    attacks: Sequence[str] | None = None,
    primary: str | None = None,
    targets: str = "given",
    control: nn.Module | ModelArray | None = None,
    population: tuple[Tensor, Tensor] | float | None = None,
    synthetic: Tensor | Mapping[str, Tensor] | None = None,
    reference: Tensor | None = None,
    augment: str | Sequence[Query] = "none",
    accuracies: Mapping[str, float] | None = None,
    shared: Mapping[str, str] | None = None,
    kinds: Mapping[str, str] | None = None,
    level: float = 0.95,
    delta: float = 1e-5,
    priors: Sequence[float] = (0.5, 0.1, 0.01),
    random_members: bool = False,
    rmia_gamma: float = 1.0,
    rmia_offline_a: float = 0.33,
    rmia_predicate: str = "ratio",
    seed: int = 0,
    path: str | Path | None = None,
) -> AuditReport:
    """Attack one or several target models with the same shadow statistics.

    Images, labels and masks may be tensors, numpy arrays or lists.

    Args:
        target: a classifier, or name -> classifier; None with ``targets="shadows"``. A :class:`kr_fast.ModelArray` of
            one model carries an input normalisation of its own.
        shadows: of :func:`kr_fast.train_shadows` on halves of exactly these images; or name -> shadows, where each
            target of that name is attacked with shadows made as it was made ("full") and every other target with the
            first set ("transfer"). With one set the first target is "full" and the others "transfer": for a model that
            was not made as the shadows were, a lower bound on what it gives away.
        images: uint8 ``[N, H, W, C]``, the pool; labels: integers ``[N]`` or ``[N, 1]``.
        members: bool ``[N]`` (or 0 and 1), True for the examples that the targets' training used, or their indices.
        non_members: likewise; None for all others. Examples in neither are left out.
        attacks: names of :data:`kr_fast.membership.CATALOG`; None for all of ``DEFAULT`` that what is given allows.
        primary: the attack whose figures are the result; the others are exploratory, and their corrected intervals
            share one error. None for "lira", or the first attack where it is not run.
        targets: "given", or "shadows". The shadows that targets are attacked with are attacked from each other in any
            case, if there are four (``leave_one_out``: what the recipe gives away); "shadows" takes the other sets too,
            and attacks that give no thresholds, and refuses what it cannot do.
        control: a positive control, see :func:`kr_fast.membership.overfitted`.
        population: (images, labels) of further non-members that no shadow was trained on, for RMIA and Attack-P; or a
            share in (0, 1) of the non-members, which are then not attacked.
        synthetic: released synthetic images, uint8 ``[S, H, W, C]``, or name -> such: attacked by themselves.
        reference: real images uint8 ``[R, H, W, C]`` that are no members and not in the pool, for the attacks on
            synthetic images; None for those of ``population``.
        augment: the queries, see :meth:`kr_fast.ModelArray.signals`.
        accuracies: name of a target -> its accuracy on examples that played no part, for the accuracy over privacy.
        shared: name of a target -> what its full shadow pipelines share with its own ("the generator").
        kinds: name of a target -> "full" or "transfer", where it is not as said under ``shadows``: a model that was
            made elsewhere is "transfer" even to the only set.
        level, delta, priors, random_members, rmia_gamma, rmia_offline_a, rmia_predicate, seed: see
            :class:`kr_fast.membership.audit.figures.Choices`.
        path: folder for the signals; a call that was interrupted continues there.
    Raises: UserError naming the argument; so is a target (or control) that is among its shadows, and shadows that are
        one model.
    """
    choices = Choices(level, delta, priors, random_members, seed, rmia_gamma, rmia_offline_a, rmia_predicate)
    check_asked(attacks, primary, targets, choices)
    images = check_images("images", images, None)
    count, shape = len(images), tuple(images.shape[1:])
    sampled = {} if synthetic is None else {"synthetic": synthetic}
    sampled = dict(synthetic) if isinstance(synthetic, Mapping) else sampled
    sampled = {name: check_images(f"synthetic {name}", value, shape) for name, value in sampled.items()}
    reference = None if reference is None else check_images("reference", reference, shape)
    labels = as_labels("audit", "labels", labels, count)
    if not isinstance(target, nn.Module | ModelArray | Mapping | None):
        fail("audit", "target", "be a classifier, or name -> classifier", described(target))
    models = {"target": target} if isinstance(target, nn.Module | ModelArray) else dict(target or {})
    if control is not None:
        if CONTROL in models:
            fail("audit", "target", f"not be named {CONTROL} where a control is given", CONTROL)
        models[CONTROL] = control
    check_names(models, sampled)
    for name, model in models.items():
        if not isinstance(model, nn.Module | ModelArray):
            fail("audit", f"target {name}", "be a torch module or a ModelArray", described(model))
    for what, named in (("kinds", kinds), ("accuracies", accuracies), ("shared", shared)):
        for name in named or {}:
            if name not in models:
                fail("audit", what, f"hold names among {', '.join(models) or 'no target'}", name)
    for name in kinds or {}:
        check_kind(f"kinds of {name}", kinds[name])
    accuracies = {name: check_accuracy(f"accuracies of {name}", value) for name, value in (accuracies or {}).items()}
    models = {name: model if isinstance(model, ModelArray) else ModelArray([model]) for name, model in models.items()}
    for name, model in models.items():
        if len(model) != 1:
            fail("audit", f"target {name}", "be one model", len(model))
    if not models and (targets != "shadows" or target is not None):
        fail("audit", "target", "hold at least one model", 0)
    sets = {"shadows": shadows} if isinstance(shadows, Shadows) else shadows
    if not isinstance(sets, Mapping) or not all(isinstance(each, Shadows) for each in sets.values()):
        fail("audit", "shadows", "be Shadows (of train_shadows), or name -> such", described(shadows))
    if not sets:
        fail("audit", "shadows", "hold at least one set", 0)
    for name in sets:
        check_name("shadows", name)
    sets = {name: Shadows(each.array, as_mask("audit", "keep", each.keep, 2)) for name, each in sets.items()}
    for name, each in sets.items():
        if each.keep.shape != (len(each.array), count):
            got = f"{list(each.keep.shape)} in {name}" if len(sets) > 1 else list(each.keep.shape)
            fail("audit", "shadows", f"have keep [{len(each.array)}, {count}]", got)
    if random_members and isinstance(population, float):
        rule = "be (images, labels) with random_members: a share takes from the non-members only"
        fail("audit", "population", rule, population)
    mask, index = (None, None) if not models else pool_of(members, non_members, count)
    if random_members and mask is not None:
        check_fair_coins("audit", mask)
    first = next(iter(sets))
    for name, each in sets.items():
        mine = {n: array.models[0] for n, array in models.items() if name == (n if n in sets else first)}
        refuse_equal_weights(mine, each.array.models)
    used = {name if name in sets else first for name in models} or set(sets)
    at = slice(None) if index is None else index
    given = {
        "in": all(bool(sets[name].keep[:, at].any()) for name in used),
        "population": population is not None,
        "synthetic": bool(sampled),
        "reference": reference is not None or population is not None,
        "members": bool(models),
    }
    check_given((*(attacks or ()), *filter(None, (primary,))), given)
    z = _population(population, mask, seed, images if index is None else images[index])
    gather = _Gather(images if index is None else images[index], labels if index is None else labels[index],
                     _wanted(attacks), augment, None if path is None else Path(path))  # fmt: skip
    asked = {f"target {name}": model for name, model in models.items()}
    asked |= {f"shadow 0 of {name}": ModelArray(each.array.models[:1]) for name, each in sets.items()}
    for name, model in asked.items():
        check_answers(model(images[:64])[0], name)
    shadow_signals = {
        name: gather.shadows(name, each if index is None else Shadows(each.array, each.keep[:, index]), z)
        for name, each in sets.items()
    }
    own = {name for name in models if name in sets} if not isinstance(shadows, Shadows) else set(list(models)[:1])
    kind = {name: "full" if name in own or name == CONTROL else "transfer" for name in models} | dict(kinds or {})
    target_signals = {}
    for name, model in models.items():
        target_signals[name] = gather.target(
            name, model, z,
            shadows=name if name in sets else first,
            kind=kind[name],
            shared=(shared or {}).get(name, ""),
            accuracy=accuracies.get(name),
            control=name == CONTROL,
        )  # fmt: skip
    rest = slice(None) if not isinstance(z, Tensor) else _others(z, len(gather.labels))
    if reference is None and population is not None:
        reference = gather.images[z] if isinstance(z, Tensor) else z[0]
    data = AuditData(
        shadow_signals,
        target_signals,
        None if mask is None else mask[rest],
        gather.labels[rest],
        gather.images[rest],
        sampled,
        reference,
        augment if isinstance(augment, str) else f"{len(augment)} given",
        _overlap(z, gather.images),
        (torch.arange(count) if index is None else index)[rest],
    )
    return audit_signals(
        data, attacks=attacks, primary=primary, targets=targets, **dataclasses.asdict(choices)
    )  # fmt: skip


def _wanted(attacks: Sequence[str] | None) -> set[str]:
    """Needs of the attacks that are asked for, and the names of those with inputs of their own."""
    names = DEFAULT if attacks is None else attacks
    return {need for name in names if name in CATALOG for need in (*CATALOG[name].needs, name)}


def _population(population: Any, mask: Tensor | None, seed: int, pool: Tensor) -> Any:
    """None, (images, labels), or the indices of the non-members that are split off."""
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
    order = torch.randperm(len(outside), generator=seeds.generator(seed, "population"))
    return outside[order[:taken]].sort().values


def check_further(images: Tensor, pool: Tensor) -> None:
    """Refuse a population that is under attack itself, every image of it."""
    if bool(shared_images(images, pool).all()):
        rule = "be further examples, not among the images under attack (a share splits some of those off)"
        fail("audit", "population", rule, f"{len(images)} of {len(images)} that are")


def _overlap(population: Any, pool: Tensor) -> tuple[str, ...]:
    """Data sets repeat images, so some overlap is said and not refused."""
    both = int(shared_images(population[0], pool).sum()) if isinstance(population, tuple) else 0
    words = f"{both} images of the population are among those under attack too: some may be members"
    return (words,) if both else ()


def _others(index: Tensor, count: int) -> Tensor:
    left = torch.ones(count, dtype=torch.bool)
    left[index] = False
    return left.nonzero()[:, 0]


class _Gather:
    """Signals of models on one pool; those of the population are split off, or computed on its own images."""

    def __init__(self, images: Tensor, labels: Tensor, wanted: set[str], augment: Any, path: Path | None):
        self.images, self.labels, self.augment, self.path = images, labels, augment, path
        network = "shadow_network" in wanted
        self.want = tuple(name for name in SIGNALS if name == "phi" or name in wanted or network)
        self.answers = network
        queries = len(as_queries(augment, *images.shape[1:3]))
        self.more_queries = "label_only" in wanted and queries == 1
        self.needs_population = bool(wanted & {"population"})

    def signals(self, array: ModelArray, name: str) -> dict[str, Tensor]:
        """name -> ``[A, N, M]``."""
        found = self._ask(array, name, f"signals of {name}", self.augment, self.want)
        if self.more_queries:
            words = f"label-only queries of {name}"
            found |= self._ask(array, f"{name}-label-only", words, LABEL_ONLY, ("correct",))
        return found

    def _ask(self, array: ModelArray, place: str, words: str, augment: Any, want: tuple, z: Any = None) -> dict:
        images, labels = (self.images, self.labels) if z is None else z
        path = None if self.path is None else self.path / place
        with as_user_error(words):
            return dict(array.signals(images, labels, augment=augment, want=want, path=path, description=words))

    def of_population(self, array: ModelArray, z: tuple[Tensor, Tensor], name: str) -> Tensor:
        """phi ``[A, Z, M]``."""
        words = f"population of {name}"
        return self._ask(array, f"{name}-population", words, self.augment, ("phi",), z)["phi"]

    def best(self, array: ModelArray) -> Tensor | None:
        """Largest log-probabilities ``[N, M, T]``, model by model: logits of all at once could fill the memory."""
        if not self.answers:
            return None
        rows = []
        for model in array.models:
            logits = ModelArray([model], normalize=array.normalize)(self.images)[0].float().cpu()
            rows.append(logits.log_softmax(1).topk(min(ANSWERS, logits.shape[1]), 1).values)
        return torch.stack(rows, 1)

    def shadows(self, name: str, shadows: Shadows, z: Any) -> ShadowSignals:
        name = f"shadows-{name}" if name != "shadows" else name
        found, answers = self.signals(shadows.array, name), self.best(shadows.array)
        if not isinstance(z, Tensor):
            population = self.of_population(shadows.array, z, name) if z is not None and self.needs_population else None
            return ShadowSignals(shadows.keep, found, population, None, answers)
        rest = _others(z, len(self.labels))
        return ShadowSignals(
            shadows.keep[:, rest], {n: v[:, rest] for n, v in found.items()}, found["phi"][:, z], shadows.keep[:, z],
            None if answers is None else answers[rest],
        )  # fmt: skip

    def target(self, name: str, array: ModelArray, z: Any, **facts: Any) -> TargetSignals:
        name = f"target-{name}"
        found, answers = self.signals(array, name), self.best(array)
        found = {n: v[:, :, 0] for n, v in found.items()}
        answers = None if answers is None else answers[:, 0]
        if not isinstance(z, Tensor):
            given = z is not None and self.needs_population
            population = self.of_population(array, z, name)[:, :, 0] if given else None
            return TargetSignals(found, population, answers, **facts)
        rest = _others(z, len(self.labels))
        return TargetSignals(
            {n: v[:, rest] for n, v in found.items()}, found["phi"][:, z],
            None if answers is None else answers[rest], **facts,
        )  # fmt: skip
