"""What an audit reads: the signals of shadows and targets on one pool of examples, wherever they come from."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np
from torch import Tensor

from kr_fast.membership.inputs.answers import as_numbers, check_accuracy, read_logits, refuse_nan
from kr_fast.membership.inputs.copies import refuse_equal_shadows, refuse_shadow_as_target
from kr_fast.membership.inputs.pool import check_members, pool_of
from kr_fast.runtime.errors import fail
from kr_fast.runtime.inputs import as_groups, as_images, as_labels, as_mask, as_tensor, described
from kr_fast.runtime.reprs import ShortRepr
from kr_fast.runtime.storage.image_rows import Images

KINDS = ("full", "transfer")
UNNAMED = "shadows"  # what an audit calls a set of shadows that is given by itself
EQUAL = "equal"  # the recipes of a target and of its shadows
RESERVED = ("setting", "comparison", "leave_one_out", "records", "exposed", "details")
RESERVED += ("canaries", "generator", "released_tests", "closest_pairs", "verdict", "by_group")
PROBABILITIES = "logits were read from probabilities: those that had underflowed to 0 count as ruled out"


@dataclasses.dataclass(frozen=True, repr=False)
class ShadowSignals(ShortRepr):
    """One set of M shadows on the pool of N examples. Tensors, arrays and lists are taken, and held on the CPU.

    Args:
        keep: bool ``[M, N]`` (or 0 and 1), True where example n was in shadow m's training set.
        signals: name -> float ``[A, N, M]``; "phi" always, further ones of
            :func:`kr_fast.ops.membership.membership_signals.membership_signals`, each over queries of its own.
        population: phi ``[A, Z, M]`` of examples that are not in the pool, or None.
        population_keep: bool ``[M, Z]`` where the shadows were trained on some of the population; None: on none of it.
        answers: float ``[N, M, T]``, largest log-probabilities from high to low, for the shadow network.
        partner: int64 ``[M, N]`` of :func:`kr_fast.membership.partners`, left out with each shadow that is attacked.
    Raises: UserError naming the argument, and for two shadows that are one model.
    """

    keep: Tensor
    signals: Mapping[str, Tensor]
    population: Tensor | None = None
    population_keep: Tensor | None = None
    answers: Tensor | None = None
    partner: Tensor | None = None

    def __post_init__(self):
        _set(
            self,
            signals=_checked_signals("shadows", self.signals, 3),
            keep=as_mask("audit", "keep", self.keep, 2).cpu(),
        )
        queries, count, models = self.signals["phi"].shape
        if tuple(self.keep.shape) != (models, count):
            fail("audit", "keep", f"have shape [M, N] = [{models}, {count}]", list(self.keep.shape))
        if models < 2:
            fail("audit", "shadows", "be at least 2", models)
        if self.population is not None:
            _set(self, population=_floats("population of the shadows", self.population))
            shape = (queries, self.population.shape[1] if self.population.ndim == 3 else 0, models)
            if self.population.shape != shape or shape[1] == 0:
                rule = f"be phi of shape [{shape[0]}, Z, {models}] with Z > 0"
                fail("audit", "population of the shadows", rule, list(self.population.shape))
        if self.population_keep is not None:
            size = 0 if self.population is None else self.population.shape[1]
            _set(self, population_keep=as_mask("audit", "keep of the population", self.population_keep, 2).cpu())
            if self.population_keep.shape != (models, size):
                rule = f"have shape [M, Z] = [{models}, {size}]"
                fail("audit", "keep of the population", rule, list(self.population_keep.shape))
        if self.answers is not None:
            _set(self, answers=_answers("answers of the shadows", self.answers, (count, models)))
        refuse_equal_shadows(self.signals["phi"])


@dataclasses.dataclass(frozen=True, repr=False)
class TargetSignals(ShortRepr):
    """One model under attack. Tensors, arrays and lists are taken, and held on the CPU.

    Args:
        signals: name -> float ``[A, N]``; "phi" always.
        population: phi ``[A, Z]``.
        answers: ``[N, T]``.
        shadows: name of its :class:`ShadowSignals`; without any it has no meaning.
        kind: "full" if these shadows were made as the target was, "transfer" if they were not (a Student attacked with
            shadows of its Teacher's training: a lower bound on what it leaks).
        shared: what full shadow pipelines share with the target's own ("the generator"), "" for nothing.
        accuracy: in [0, 1], on examples that played no part, for the accuracy over privacy; or None.
        control: it is the positive control.
        title: what sentences call it ("the Student"), "" for its name.
        recipe: "equal" to that of its shadows, in which value it differs, or "" where that is not known.
    Raises: UserError naming the argument.
    """

    signals: Mapping[str, Tensor]
    population: Tensor | None = None
    answers: Tensor | None = None
    shadows: str = UNNAMED
    kind: str = "full"
    shared: str = ""
    accuracy: float | None = None
    control: bool = False
    title: str = ""
    recipe: str = ""

    def __post_init__(self):
        _set(self, signals=_checked_signals("target", self.signals, 2))
        queries, count = self.signals["phi"].shape
        if self.population is not None:
            _set(self, population=_floats("population of the target", self.population))
            if self.population.ndim != 2 or len(self.population) != queries or self.population.shape[1] == 0:
                rule = f"be phi of shape [{queries}, Z] with Z > 0"
                fail("audit", "population of the target", rule, list(self.population.shape))
        if self.answers is not None:
            _set(self, answers=_answers("answers of the target", self.answers, (count,)))
        check_kind("kind", self.kind)
        for name, kind in (("shadows", str), ("shared", str), ("control", bool), ("title", str), ("recipe", str)):
            if not isinstance(getattr(self, name), kind):
                fail("audit", f"{name} of a target", f"be of type {kind.__name__}", repr(getattr(self, name)))
        if self.accuracy is not None:
            _set(self, accuracy=check_accuracy("accuracy", self.accuracy))


@dataclasses.dataclass(frozen=True, repr=False)
class AuditData(ShortRepr):
    """Everything that :func:`kr_fast.membership.audit_signals` reads; no model is needed.

    Tensors, arrays and lists are taken, and held on the CPU.

    Args:
        shadows: name -> shadows; all on the same pool. Without any, attacks that need no shadow are possible.
        targets: name -> target; may be empty where every shadow is a target.
        members: bool ``[N]`` (or 0 and 1), the members of all targets; None without targets.
        labels: integers ``[N]`` or ``[N, 1]``, or None (attacks that need a class are then not possible).
        images: uint8 ``[N, H, W, C]``, or None; for attacks on images and for the report.
        synthetic: name -> released synthetic images, uint8 ``[S, H, W, C]``.
        reference: real images that are neither members nor in the pool, uint8 ``[R, H, W, C]``.
        augment: what the queries were, in words.
        notes: what a reader has to know about the signals, as sentences.
        index: int64 ``[N]``, number of each example where the pool is part of a larger set; None: its position.
        groups: ``[N]`` texts or integers, what each example belongs to (a patient, a site), or None: the risk of
            records is then also told by group, its intervals take the examples of a group together, and membership is
            also counted by group, see :mod:`kr_fast.membership.attacks.by_group`.
        features: float ``[N, F]`` of the pool by a model that does not know its members (a shadow), or None; with those
            of the released images the tests on these are made in their space too.
        synthetic_features: name -> float ``[S, F]``.
    Raises: UserError naming the argument, and for a target that is one of its shadows.
    """

    shadows: Mapping[str, ShadowSignals]
    targets: Mapping[str, TargetSignals]
    members: Tensor | None
    labels: Tensor | None = None
    images: Images | None = None
    synthetic: Mapping[str, Tensor] = dataclasses.field(default_factory=dict)
    reference: Images | None = None
    augment: str = "none"
    notes: tuple[str, ...] = ()
    index: Tensor | None = None
    groups: np.ndarray | None = None
    features: Tensor | None = None
    synthetic_features: Mapping[str, Tensor] = dataclasses.field(default_factory=dict)

    def __post_init__(self):
        if not self.shadows and not self.targets:
            fail("audit", "shadows and targets", "be at least one set, or one model", "none")
        for name, shadows in self.shadows.items():
            check_name("shadows", name)
            if shadows.keep.shape[1] != self.count:
                rule = f"be on one pool of {self.count} examples"
                fail("audit", "shadows", rule, f"{shadows.keep.shape[1]} in {name}")
        if not self.targets and self.members is not None:
            fail("audit", "target", "hold at least one model", 0)
        check_names(self.targets, self.synthetic)
        for name, target in self.targets.items():
            if self.shadows and target.shadows not in self.shadows:
                fail("audit", f"shadows of {name}", f"be one of {', '.join(self.shadows)}", target.shadows)
            self._check_fits(name, target)
        if self.targets:
            _set(self, members=check_members(self.members, self.count).cpu())
        if self.labels is not None:
            _set(self, labels=as_labels("audit", "labels", self.labels, self.count).cpu())
        shape, given = None, {}
        parts = {"images": self.images, "reference": self.reference}
        for name, value in (parts | {f"synthetic {n}": v for n, v in self.synthetic.items()}).items():
            if value is not None:
                given[name] = check_images(name, value, shape).cpu()
                shape = tuple(given[name].shape[1:])
        if "images" in given and len(given["images"]) != self.count:
            fail("audit", "images", f"be those of the {self.count} examples", described(given["images"]))
        _set(self, images=given.pop("images", None), reference=given.pop("reference", None))
        _set(self, synthetic={name.removeprefix("synthetic "): value for name, value in given.items()})
        if self.index is not None:
            _set(self, index=as_labels("audit", "index", self.index, self.count).cpu())
        if self.groups is not None:
            _set(self, groups=as_groups("audit", "groups", self.groups, self.count))
        if self.features is not None and (self.features.ndim != 2 or len(self.features) != self.count):
            fail("audit", "features", f"have shape [{self.count}, F]", described(self.features))

    @property
    def count(self) -> int:
        """Examples of the pool."""
        if self.shadows:
            return next(iter(self.shadows.values())).keep.shape[1]
        return next(iter(self.targets.values())).signals["phi"].shape[1]

    def shadows_of(self, target: TargetSignals) -> ShadowSignals | None:
        """The shadows that ``target`` is attacked with, or None where there are none."""
        return self.shadows.get(target.shadows)

    def _check_fits(self, name: str, target: TargetSignals) -> None:
        shadows = self.shadows_of(target)
        if shadows is None:
            if target.signals["phi"].shape[1] != self.count:
                fail("audit", f"phi of {name}", f"be of {self.count} examples", target.signals["phi"].shape[1])
            return
        for signal, value in target.signals.items():
            if signal in shadows.signals and value.shape != shadows.signals[signal].shape[:2]:
                rule = f"have shape {list(shadows.signals[signal].shape[:2])}, as its shadows"
                fail("audit", f"{signal} of {name}", rule, list(value.shape))
        own, others = target.population, shadows.population
        if own is not None and (others is None or own.shape != others.shape[:2]):
            rule = "not be given" if others is None else f"be {list(others.shape[:2])}"
            fail("audit", f"population of {name}", f"{rule}, as of its shadows", list(own.shape))
        own, others = target.answers, shadows.answers
        if own is not None and others is not None and own.shape[1] != others.shape[2]:
            rule = f"be the {others.shape[2]} largest, as of its shadows"
            fail("audit", f"answers of {name}", rule, own.shape[1])
        refuse_shadow_as_target(name, target.signals["phi"], shadows.signals["phi"])


def from_logits(
    logits: Tensor | None,
    keep: Tensor | None,
    labels: Tensor,
    *,
    target: Mapping[str, Tensor] | Tensor | None = None,
    members: Any = None,
    non_members: Any = None,
    population: tuple[Tensor | None, Mapping[str, Tensor] | Tensor | None, Tensor] | None = None,
    probabilities: bool = False,
    images: Tensor | None = None,
    groups: Any = None,
) -> AuditData:
    """An audit's data from saved logits: tensors, numpy arrays or lists.

    Args:
        logits: float ``[M, N, C]``, or ``[M, N, A, C]`` with queries, of the shadows; None, and no ``keep``, without
            shadows: what needs none (the attack "loss") is then possible.
        keep: bool ``[M, N]``, or 0 and 1.
        labels: integers ``[N]`` or ``[N, 1]``.
        target: ``[N, C]`` or ``[N, A, C]``, or name -> such; None where every shadow is a target.
        members, non_members: see :func:`kr_fast.membership.inputs.pool.pool_of`.
        population: (logits of the shadows ``[M, Z, (A,) C]`` or None without any, of the target as above, labels
            ``[Z]``).
        images, groups: of the ``N`` examples, see :class:`AuditData`.
        probabilities: the numbers are probabilities of all classes, and their logarithm is taken. What underflowed to
            0 is lost: in float32 phi above about 103 reads as certainty, in float16 above about 17.
    Raises: UserError naming the argument, and for probabilities and hard labels where logits are asked for.
    """
    given = {} if target is None else dict(target) if isinstance(target, Mapping) else {"target": target}
    targets = {name: as_numbers("audit", f"logits of {name}", value) for name, value in given.items()}
    labels = as_labels("audit", "labels", labels)
    if (logits is None) != (keep is None):
        fail("audit", "logits and keep", "be given together", "one of them")
    if logits is not None:
        logits, keep = as_numbers("audit", "logits of the shadows", logits), as_mask("audit", "keep", keep, 2)
    images = None if images is None else as_tensor("audit", "images", images)
    labels = _check_lengths(logits, keep, labels, targets, images)
    groups = None if groups is None else as_groups("audit", "groups", groups, len(labels))
    mask, index = (None, None) if not targets else pool_of(members, non_members, len(labels))
    if index is not None:
        labels, targets = labels[index], {name: value[index] for name, value in targets.items()}
        logits, keep = (None, None) if logits is None else (logits[:, index], keep[:, index])
        images = None if images is None else images[index]
        groups = None if groups is None else groups[index.numpy()]
    z_logits, z_targets, z_labels = (None, None, None) if population is None else _population(population)
    shadows, z_found = {}, {}
    if logits is not None:
        signals, answers = read_logits(logits, labels, "logits of the shadows", probabilities)
        z_phi = None
        if z_logits is not None:
            z_phi = read_logits(z_logits, z_labels, "population of the shadows", probabilities)[0]["phi"]
        shadows[UNNAMED] = ShadowSignals(keep, signals, z_phi, None, answers)
    for name, value in (z_targets or {}).items():
        value = as_numbers("audit", f"population of {name}", value)[None]
        z_found[name] = read_logits(value, z_labels, f"population of {name}", probabilities)[0]["phi"][:, :, 0]
    attacked = {}
    for position, (name, value) in enumerate(targets.items()):
        own, best = read_logits(value[None], labels, f"logits of {name}", probabilities)
        attacked[name] = TargetSignals(
            {key: values[:, :, 0] for key, values in own.items()},
            z_found.get(name),
            best[:, 0],
            kind="transfer" if position and shadows else "full",
        )
    notes = (PROBABILITIES,) if probabilities else ()
    return AuditData(
        shadows, attacked, mask, labels, images, augment="as given", notes=notes, index=index, groups=groups
    )


def _population(given: Any) -> tuple[Any, dict[str, Any], Any]:
    """(logits of the shadows, name -> logits of a target, labels)."""
    if not isinstance(given, tuple | list) or len(given) != 3:
        rule = "be (logits of the shadows, of the target, labels)"
        fail(
            "audit", "population", rule, f"{len(given)} values" if isinstance(given, tuple | list) else described(given)
        )
    shadows, target, labels = given
    named = {} if target is None else dict(target) if isinstance(target, Mapping) else {"target": target}
    return shadows, named, labels


def _check_lengths(logits: Any, keep: Any, labels: Tensor, targets: Mapping[str, Tensor], images: Any) -> Tensor:
    """One N everywhere: an array that is too long would lose its excess unnoticed where the pool is a part."""
    count = len(labels)
    if logits is not None and logits.ndim in (3, 4):  # other shapes are read_logits' to refuse
        models, count = logits.shape[:2]
        if tuple(keep.shape) != (models, count):
            fail("audit", "keep", f"have shape [M, N] = [{models}, {count}]", list(keep.shape))
    labels = as_labels("audit", "labels", labels, count)
    for name, value in targets.items():
        if value.ndim == 0 or len(value) != count:
            fail("audit", f"logits of {name}", f"be float [{count}, (A,) C]", described(value))
    if images is not None and len(images) != count:
        fail("audit", "images", f"be those of the {count} examples", list(images.shape))
    return labels


def check_names(targets: Mapping[str, Any], synthetic: Mapping[str, Any]) -> None:
    """Names that have no other meaning in the files of the report, and differ; they are parts of paths there."""
    for what, names, taken in (("target", targets, (*RESERVED, *synthetic)), ("synthetic", synthetic, RESERVED)):
        for name in names:
            check_name(what, name)
            if name in taken:
                fail("audit", what, f"have names other than {', '.join(taken)}", name)


def check_name(what: str, name: Any) -> None:
    """Refuse what cannot be one part of a path."""
    if not isinstance(name, str) or not name.strip(". ") or any(c in "/\\" or not c.isprintable() for c in name):
        fail("audit", what, "have names that can be printed, without / and \\", repr(name))


def check_kind(name: str, kind: Any) -> None:
    """How shadows were made."""
    if kind not in KINDS:
        fail("audit", name, "be full or transfer", kind)


def check_images(name: str, images: Any, shape: tuple[int, ...] | None) -> Images:
    """uint8 ``[n, H, W, C]`` with n > 0, of the shape (H, W, C) given where there is one."""
    tensor = as_images("audit", name, images, shape)
    if len(tensor) == 0:
        fail("audit", name, "hold at least one image", 0)
    return tensor


def _set(data: Any, **values: Any) -> None:
    """Fields of a frozen dataclass, while it is made."""
    for name, value in values.items():
        object.__setattr__(data, name, value)


def _floats(what: str, value: Any) -> Tensor:
    """Numbers without NaN, on the CPU."""
    tensor = as_numbers("audit", what, value).cpu()
    refuse_nan(what, tensor)
    return tensor


def _answers(what: str, value: Any, shape: tuple[int, ...]) -> Tensor:
    answers = _floats(what, value)
    if answers.ndim != len(shape) + 1 or answers.shape[:-1] != shape or answers.shape[-1] == 0:
        fail("audit", what, f"have shape [{', '.join(map(str, shape))}, T]", list(answers.shape))
    return answers


def _checked_signals(what: str, signals: Any, ndim: int) -> dict[str, Tensor]:
    """The signals as tensors, with phi among them."""
    if not isinstance(signals, Mapping) or "phi" not in signals:
        got = ", ".join(map(str, signals)) or "nothing" if isinstance(signals, Mapping) else described(signals)
        fail("audit", f"signals of the {what}", "hold phi", got)
    tensors = {name: _floats(f"{name} of the {what}", value) for name, value in signals.items()}
    for name, value in tensors.items():
        if value.ndim != ndim or 0 in value.shape:
            axes = "[A, N, M]" if ndim == 3 else "[A, N]"
            fail("audit", f"{name} of the {what}", f"be float {axes}", f"{value.dtype} {list(value.shape)}")
        if value.shape[1] != tensors["phi"].shape[1] or value.shape[2:] != tensors["phi"].shape[2:]:
            rule = f"be of the {tensors['phi'].shape[1]} examples of phi"
            fail("audit", f"{name} of the {what}", rule, list(value.shape))
        if name == "correct" and not bool(((value >= 0) & (value <= 1)).all()):
            fail("audit", f"{name} of the {what}", "lie in [0, 1]", [float(value.min()), float(value.max())])
    return tensors
