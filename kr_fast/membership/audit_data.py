"""What an audit reads: the signals of shadows and targets on one pool of examples, wherever they come from."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kr_fast.ops.membership_signals import membership_signals
from kr_fast.runtime.errors import fail
from kr_fast.runtime.inputs import looks_like_probabilities
from kr_fast.runtime.reprs import ShortRepr

SIGNALS = ("phi", "entropy", "modified_entropy", "correct")
RESERVED = ("setting", "comparison", "leave_one_out", "exposed", "details")
PROBABILITIES = "logits were read from probabilities: those that had underflowed to 0 count as ruled out"
ANSWERS = 3  # largest log-probabilities that the shadow network reads, beside the signals


@dataclasses.dataclass(frozen=True, repr=False)
class ShadowSignals(ShortRepr):
    """One set of M shadows on the pool of N examples.

    Args:
        keep: bool ``[M, N]``, True where example n was in shadow m's training set.
        signals: name -> float ``[A, N, M]``; "phi" always, further ones of
            :func:`kr_fast.ops.membership_signals.membership_signals`, each over queries of its own.
        population: phi ``[A, Z, M]`` of examples that are not in the pool, or None.
        population_keep: bool ``[M, Z]`` where the shadows were trained on some of the population; None: on none of it.
        answers: float ``[N, M, T]``, largest log-probabilities from high to low, for the shadow network.
    """

    keep: Tensor
    signals: Mapping[str, Tensor]
    population: Tensor | None = None
    population_keep: Tensor | None = None
    answers: Tensor | None = None

    def __post_init__(self):
        _check_signals("shadows", self.signals, 3)
        count, models = self.signals["phi"].shape[1:]
        if self.keep.dtype != torch.bool:
            fail("audit", "keep", "be bool", self.keep.dtype)
        if tuple(self.keep.shape) != (models, count):
            fail("audit", "keep", f"have shape [M, N] = [{models}, {count}]", list(self.keep.shape))
        if models < 2:
            fail("audit", "shadows", "be at least 2", models)
        if self.population is not None:
            shape = (len(self.signals["phi"]), self.population.shape[1] if self.population.ndim == 3 else 0, models)
            if self.population.shape != shape or shape[1] == 0:
                rule = f"be phi of shape [{shape[0]}, Z, {models}] with Z > 0"
                fail("audit", "population of the shadows", rule, list(self.population.shape))
            _refuse_nan("population of the shadows", self.population)


@dataclasses.dataclass(frozen=True, repr=False)
class TargetSignals(ShortRepr):
    """One model under attack.

    Args:
        signals: name -> float ``[A, N]``; "phi" always.
        population: phi ``[A, Z]``.
        answers: ``[N, T]``.
        shadows: name of its :class:`ShadowSignals`.
        kind: "full" if these shadows were made as the target was, "transfer" if they were not (a Student attacked with
            shadows of its Teacher's training: a lower bound on what it gives away).
        shared: what full shadow pipelines share with the target's own ("the generator"), "" for nothing.
        accuracy: on examples that played no part, for the accuracy over privacy; or None.
        control: it is the positive control.
    """

    signals: Mapping[str, Tensor]
    population: Tensor | None = None
    answers: Tensor | None = None
    shadows: str = "shadows"
    kind: str = "full"
    shared: str = ""
    accuracy: float | None = None
    control: bool = False

    def __post_init__(self):
        _check_signals("target", self.signals, 2)
        if self.kind not in ("full", "transfer"):
            fail("audit", "kind", "be full or transfer", self.kind)


@dataclasses.dataclass(frozen=True, repr=False)
class AuditData(ShortRepr):
    """Everything that :func:`kr_fast.membership.audit_signals` reads; no model is needed.

    Args:
        shadows: name -> shadows; all on the same pool.
        targets: name -> target; may be empty where every shadow is a target.
        members: bool ``[N]``, the members of all targets; None without targets.
        labels: int64 ``[N]``, or None (attacks that need a class are then not possible).
        images: uint8 ``[N, H, W, C]``, or None; for attacks on images and for the report.
        synthetic: name -> released synthetic images, uint8 ``[S, H, W, C]``.
        reference: real images that are neither members nor in the pool, uint8 ``[R, H, W, C]``.
        augment: what the queries were, in words.
        notes: what a reader has to know about the signals, as sentences.
        index: int64 ``[N]``, number of each example where the pool is part of a larger set; None: its position.
    """

    shadows: Mapping[str, ShadowSignals]
    targets: Mapping[str, TargetSignals]
    members: Tensor | None
    labels: Tensor | None = None
    images: Tensor | None = None
    synthetic: Mapping[str, Tensor] = dataclasses.field(default_factory=dict)
    reference: Tensor | None = None
    augment: str = "none"
    notes: tuple[str, ...] = ()
    index: Tensor | None = None

    def __post_init__(self):
        if not self.shadows:
            fail("audit", "shadows", "hold at least one set", 0)
        first = next(iter(self.shadows.values()))
        for name, shadows in self.shadows.items():
            if shadows.keep.shape[1] != self.count:
                rule = f"be on one pool of {self.count} examples"
                fail("audit", "shadows", rule, f"{shadows.keep.shape[1]} in {name}")
        if not self.targets and self.members is not None:
            fail("audit", "target", "hold at least one model", 0)
        check_names(self.targets, self.synthetic)
        for name, target in self.targets.items():
            if target.shadows not in self.shadows:
                fail("audit", f"shadows of {name}", f"be one of {', '.join(self.shadows)}", target.shadows)
            _check_fits(name, target, self.shadows[target.shadows])
        if self.targets:
            check_members(self.members, first.keep.shape[1])
        if self.labels is not None and (self.labels.shape != (self.count,) or self.labels.dtype != torch.int64):
            got = f"{self.labels.dtype} {list(self.labels.shape)}"
            fail("audit", "labels", f"be int64 [{self.count}]", got)
        if self.images is not None and len(self.images) != self.count:
            fail("audit", "images", f"be those of the {self.count} examples", list(self.images.shape))
        shape = None
        given = {"images": self.images, "reference": self.reference}
        for name, value in (given | {f"synthetic {n}": v for n, v in self.synthetic.items()}).items():
            if value is not None:
                shape = check_images(name, value, shape)
        if self.index is not None and (self.index.shape != (self.count,) or self.index.dtype != torch.int64):
            fail("audit", "index", f"be int64 [{self.count}]", f"{self.index.dtype} {list(self.index.shape)}")

    @property
    def count(self) -> int:
        """Examples of the pool."""
        return next(iter(self.shadows.values())).keep.shape[1]


def from_logits(
    logits: Tensor,
    keep: Tensor,
    labels: Tensor,
    *,
    target: Mapping[str, Tensor] | Tensor | None = None,
    members: Any = None,
    non_members: Any = None,
    population: tuple[Tensor, Mapping[str, Tensor] | Tensor | None, Tensor] | None = None,
    probabilities: bool = False,
    images: Tensor | None = None,
) -> AuditData:
    """An audit's data from saved logits.

    Args:
        logits: float ``[M, N, C]``, or ``[M, N, A, C]`` with queries, of the shadows.
        keep: bool ``[M, N]``.
        labels: int64 ``[N]``.
        target: ``[N, C]`` or ``[N, A, C]``, or name -> such; None where every shadow is a target.
        members, non_members: see :func:`pool_of`.
        population: (logits of the shadows ``[M, Z, (A,) C]``, of the target as above, labels ``[Z]``).
        probabilities: the numbers are probabilities of all classes, and their logarithm is taken. What underflowed to
            0 is lost: in float32 phi above about 103 reads as certainty, in float16 above about 17.
    Raises: TypeError or ValueError naming the argument.
    """
    targets = {} if target is None else {"target": target} if isinstance(target, Tensor) else dict(target)
    _check_lengths(logits, keep, labels, targets, images)
    mask, index = (None, None) if not targets else pool_of(members, non_members, len(labels))
    if index is not None:
        logits, keep, labels = logits[:, index], keep[:, index], labels[index]
        targets = {name: value[index] for name, value in targets.items()}
        images = None if images is None else images[index]
    signals, answers = read_logits(logits, labels, "logits of the shadows", probabilities)
    z_shadows, z_targets = None, {}
    if population is not None:
        z_logits, given, z_labels = population
        z_shadows = read_logits(z_logits, z_labels, "population of the shadows", probabilities)[0]["phi"]
        given = {"target": given} if isinstance(given, Tensor) else dict(given or {})
        for name, value in given.items():
            found = read_logits(value[None], z_labels, f"population of {name}", probabilities)[0]
            z_targets[name] = found["phi"][:, :, 0]
    attacked = {}
    for position, (name, value) in enumerate(targets.items()):
        found, best = read_logits(value[None], labels, f"logits of {name}", probabilities)
        attacked[name] = TargetSignals(
            {key: values[:, :, 0] for key, values in found.items()},
            z_targets.get(name),
            best[:, 0],
            kind="transfer" if position else "full",
        )
    notes = (PROBABILITIES,) if probabilities else ()
    shadows = {"shadows": ShadowSignals(keep, signals, z_shadows, None, answers)}
    return AuditData(shadows, attacked, mask, labels, images, augment="as given", notes=notes, index=index)


def _check_lengths(logits: Tensor, keep: Tensor, labels: Tensor, targets: Mapping[str, Tensor], images: Any) -> None:
    """One N everywhere: an array that is too long would lose its excess unnoticed where the pool is a part."""
    if logits.ndim not in (3, 4):
        fail("audit", "logits of the shadows", "be float [M, N, (A,) C]", f"{logits.dtype} {list(logits.shape)}")
    models, count = logits.shape[:2]
    if tuple(keep.shape) != (models, count):
        fail("audit", "keep", f"have shape [M, N] = [{models}, {count}]", list(keep.shape))
    if labels.dtype != torch.int64 or labels.shape != (count,):
        fail("audit", "labels", f"be int64 [{count}]", f"{labels.dtype} {list(labels.shape)}")
    for name, value in targets.items():
        if len(value) != count:
            rule = f"be float [M, {count}, (A,) C]"
            fail("audit", f"logits of {name}", rule, f"{value.dtype} {[1, *value.shape]}")
    if images is not None and len(images) != count:
        fail("audit", "images", f"be those of the {count} examples", list(images.shape))


def check_names(targets: Mapping[str, Any], synthetic: Mapping[str, Any]) -> None:
    """Names that have no other meaning in the files of the report, and differ."""
    for what, names, taken in (("target", targets, (*RESERVED, *synthetic)), ("synthetic", synthetic, RESERVED)):
        for name in names:
            if name in taken:
                fail("audit", what, f"have names other than {', '.join(taken)}", name)


def check_images(name: str, images: Any, shape: tuple[int, ...] | None) -> tuple[int, ...]:
    """uint8 ``[n, H, W, C]``, of the shape given where there is one; returns (H, W, C)."""
    if not isinstance(images, Tensor):
        fail("audit", name, "be a uint8 tensor [n, H, W, C]", type(images).__name__)
    right = images.ndim == 4 and 0 not in images.shape and (shape is None or tuple(images.shape[1:]) == shape)
    if images.dtype != torch.uint8 or not right:
        axes = "H, W, C" if shape is None else ", ".join(map(str, shape))
        fail("audit", name, f"be uint8 [n, {axes}]", f"{images.dtype} {list(images.shape)}")
    return tuple(images.shape[1:])


def read_logits(
    logits: Tensor, labels: Tensor, what: str, probabilities: bool = False
) -> tuple[dict[str, Tensor], Tensor]:
    """(signals ``[A, N, M]``, answers ``[N, M, T]``) of logits ``[M, N, C]`` or ``[M, N, A, C]``."""
    if logits.ndim == 3:
        logits = logits[:, :, None]
    if logits.ndim != 4 or not logits.dtype.is_floating_point or logits.shape[1] != len(labels):
        fail("audit", what, f"be float [M, {len(labels)}, (A,) C]", f"{logits.dtype} {list(logits.shape)}")
    classes = logits.shape[3]
    if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < classes:
        fail("audit", "labels", f"lie in [0, {classes})", [int(labels.min()), int(labels.max())])
    _refuse_nan(what, logits)
    signals: dict[str, list[Tensor]] = {name: [] for name in SIGNALS}
    answers = []
    for values in logits:  # [N, A, C]
        if not probabilities:
            refuse_probabilities(values[:64].flatten(0, 1), what)
        values = values.double().log() if probabilities else values
        if bool(torch.isnan(values).any()):
            fail("audit", what, "be probabilities, at least 0", float(logits.min()))
        found = membership_signals(values, labels[:, None].expand(values.shape[:2]).contiguous(), SIGNALS)
        for name in SIGNALS:
            signals[name].append(found[name].T)
        answers.append(values[:, 0].float().log_softmax(1).topk(min(ANSWERS, classes), 1).values)
    return {name: torch.stack(rows, 2) for name, rows in signals.items()}, torch.stack(answers, 1)


def refuse_probabilities(rows: Tensor, what: str, rule: str | None = None) -> None:
    """Refuse rows that are >= 0 and sum to 1: phi would saturate and the attacks be blind to the surest examples."""
    if looks_like_probabilities(rows):
        mend = "be logits, from before the softmax (probabilities=True takes the logarithm where nothing else is left)"
        fail("audit", what, rule or mend, "rows that are >= 0 and sum to 1")


def pool_of(members: Any, non_members: Any, count: int) -> tuple[Tensor, Tensor | None]:
    """(bool mask over the pool, indices of the pool in all ``count`` examples or None for all of them).

    ``members`` and ``non_members`` are bool ``[N]`` or indices; without ``non_members`` all others are non-members,
    with them an example that is in neither is left out.
    """
    inside = _mask("members", members, count)
    if non_members is None:
        check_members(inside, count)
        return inside, None
    outside = _mask("non_members", non_members, count)
    both = (inside & outside).nonzero()[:, 0]
    if len(both):
        fail("audit", "members and non_members", "be disjoint", f"{len(both)} examples in both, {int(both[0])} first")
    index = (inside | outside).nonzero()[:, 0]
    check_members(inside[index], len(index))
    return inside[index], None if len(index) == count else index


def check_members(members: Any, count: int) -> None:
    """bool ``[N]`` with both kinds."""
    if not isinstance(members, Tensor) or members.dtype != torch.bool or tuple(members.shape) != (count,):
        got = f"{members.dtype} {list(members.shape)}" if isinstance(members, Tensor) else members
        fail("audit", "members", f"be bool [{count}]", got)
    inside = int(members.sum())
    if not 0 < inside < count:
        fail("audit", "members", "hold members and non-members", f"{inside} of {count} members")


def _mask(name: str, value: Any, count: int) -> Tensor:
    if value is None:
        fail("audit", name, f"be bool [{count}] or indices", None)
    value = torch.as_tensor(np.asarray(value)) if not isinstance(value, Tensor) else value
    rule = f"be bool [{count}], or indices in [0, {count}) without repetition"
    if value.dtype == torch.bool:
        if tuple(value.shape) != (count,):
            fail("audit", name, rule, f"{value.dtype} {list(value.shape)}")
        return value
    if value.ndim != 1 or value.dtype.is_floating_point or value.dtype.is_complex:
        fail("audit", name, rule, f"{value.dtype} {list(value.shape)}")
    value = value.long()
    if len(value) and not 0 <= int(value.min()) <= int(value.max()) < count:
        fail("audit", name, rule, f"indices from {int(value.min())} to {int(value.max())}")
    if len(value.unique()) != len(value):
        fail("audit", name, rule, f"{len(value)} indices, {len(value.unique())} of them distinct")
    found = torch.zeros(count, dtype=torch.bool)
    found[value] = True
    return found


def _check_signals(what: str, signals: Mapping[str, Tensor], ndim: int) -> None:
    if "phi" not in signals:
        fail("audit", f"signals of the {what}", "hold phi", ", ".join(signals) or "nothing")
    for name, value in signals.items():
        if value.ndim != ndim or not value.dtype.is_floating_point or 0 in value.shape:
            axes = "[A, N, M]" if ndim == 3 else "[A, N]"
            fail("audit", f"{name} of the {what}", f"be float {axes}", f"{value.dtype} {list(value.shape)}")
        if value.shape[1] != signals["phi"].shape[1]:
            rule = f"be of the {signals['phi'].shape[1]} examples of phi"
            fail("audit", f"{name} of the {what}", rule, list(value.shape))
        _refuse_nan(f"{name} of the {what}", value)


def _check_fits(name: str, target: TargetSignals, shadows: ShadowSignals) -> None:
    for signal, value in target.signals.items():
        if signal in shadows.signals and value.shape != shadows.signals[signal].shape[:2]:
            rule = f"have shape {list(shadows.signals[signal].shape[:2])}, as its shadows"
            fail("audit", f"{signal} of {name}", rule, list(value.shape))
    if target.population is not None:
        if shadows.population is None or target.population.shape != shadows.population.shape[:2]:
            wanted = "not be given" if shadows.population is None else f"be {list(shadows.population.shape[:2])}"
            fail("audit", f"population of {name}", f"{wanted}, as of its shadows", list(target.population.shape))
        _refuse_nan(f"population of {name}", target.population)


def _refuse_nan(what: str, value: Tensor) -> None:
    bad = int(torch.isnan(value).sum())
    if bad:
        fail("audit", what, "not hold NaN", f"{bad} NaN")
