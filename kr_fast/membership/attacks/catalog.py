"""Every standard attack by name: what it needs, what it assumes, and how it is called on an audit's data."""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d, one_hot

from kr_fast.membership.attacks import learned, released
from kr_fast.membership.attacks import scores as attacks
from kr_fast.membership.inputs.data import AuditData, ShadowSignals, TargetSignals
from kr_fast.runtime.errors import fail

# Below this many shadows on a side one variance for all examples attacks better than one each (Carlini et al., fig. 9).
PER_EXAMPLE_FROM = 64
TRAINED_TARGETS = 4  # shadows that an attack with a training for each target is calibrated on
MOST_CLASSES = 100  # one-hot classes among features; above it the class is one number
POOLED = 8  # pixels on a side of images as features

Run = Callable[[AuditData, ShadowSignals, TargetSignals | None], Tensor]


@dataclasses.dataclass(frozen=True)
class Attack:
    """One entry of the catalogue.

    ``run(data, shadows, target)`` gives scores ``[1, N]`` of a target or, without one, ``[K, N]`` of the first K
    shadows, each left out in turn. ``needs`` are names of :data:`NEEDS`. An attack on ``released`` images has no model.
    """

    name: str
    title: str
    assumes: str
    needs: tuple[str, ...]
    run: Run
    released: bool = False
    calibrated: bool = True  # shadows attacked leave-one-out give its thresholds


def sides(keep: Tensor) -> int:
    """Shadows on the smaller side of the median example."""
    return int(torch.minimum(keep.sum(0), (~keep).sum(0)).median())


def auto_variance(keep: Tensor) -> str:
    """The variance that "lira" and "lira_offline" take."""
    return "per_example" if sides(keep) >= PER_EXAMPLE_FROM else "fixed"


NEEDS: dict[str, tuple[Callable[[AuditData, ShadowSignals | None, TargetSignals | None], bool], str]] = {
    "shadows": (lambda d, s, t: s is not None, "shadow models (keep, and their logits or signals)"),
    "in": (lambda d, s, t: bool(s.keep.any()), "shadows that held some of the examples"),
    "labels": (lambda d, s, t: d.labels is not None, "labels"),
    "population": (
        lambda d, s, t: all(each is None or each.population is not None for each in (s, t)),
        "a population of further non-members (population=...)",
    ),
    "entropy": (lambda d, s, t: _has("entropy", s, t), "logits, or the signal entropy"),
    "modified_entropy": (lambda d, s, t: _has("modified_entropy", s, t), "logits, or the signal modified_entropy"),
    "correct": (lambda d, s, t: _has("correct", s, t), "logits, or the signal correct"),
    "synthetic": (lambda d, s, t: bool(d.synthetic) and d.images is not None, "images and a synthetic set"),
    "reference": (lambda d, s, t: d.reference is not None, "reference images that are no members (reference=...)"),
}


def _has(signal: str, shadows: ShadowSignals, target: TargetSignals | None) -> bool:
    return signal in shadows.signals and (target is None or signal in target.signals)


def lacking(attack: Attack, data: AuditData, shadows: ShadowSignals | None, target: TargetSignals | None) -> str | None:
    """The first thing that the attack needs and was not given, or None."""
    for need in attack.needs:
        test, words = NEEDS[need]
        if not test(data, shadows, target):
            return words
    return None


def refuse(name: str, missing: str) -> NoReturn:
    """Refuse an attack that was asked for and lacks something."""
    fail("audit", "attacks", f"be possible with what was given: {name} needs {missing}", name)


def check_given(attacks: Iterable[str], given: Mapping[str, bool]) -> None:
    """Refuse attacks that need what is not given, before anything is computed.

    Args:
        given: name in :data:`NEEDS`, or "members" -> whether it is there; what is not named is.
    """
    for name in attacks:
        for need in CATALOG[name].needs:
            if not given.get(need, True):
                refuse(name, NEEDS[need][1])
        if CATALOG[name].released and not given.get("members", True):
            refuse(name, "members")


def _lira(data, shadows, target, *, variant: str, variance: str = "auto") -> Tensor:
    variance = auto_variance(shadows.keep) if variance == "auto" else variance
    phi = None if target is None else target.signals["phi"][:, :, None]
    options: dict[str, Any] = {"variant": variant, "variance": variance, "target": phi}
    return attacks.lira(shadows.signals["phi"], shadows.keep, **options, partner=_partner(shadows, target))


def _partner(shadows: ShadowSignals, target: TargetSignals | None) -> Tensor | None:
    return shadows.partner if target is None else None


def _carlini(data, shadows, target, *, variant: str, fix_variance: bool) -> Tensor:
    phi = None if target is None else target.signals["phi"][:, :, None]
    options: dict[str, Any] = {"variant": variant, "fix_variance": fix_variance, "target": phi}
    return attacks.lira_carlini2021(shadows.signals["phi"], shadows.keep, **options)


def _rmia(data, shadows, target, *, gamma: float, offline_a: float | None, predicate: str) -> Tensor:
    population = shadows.population
    if offline_a is not None and shadows.population_keep is not None:
        population = _as_if_out(population, shadows.population_keep)
    options: dict[str, Any] = {"gamma": gamma, "offline_a": offline_a, "predicate": predicate}
    options["partner"] = _partner(shadows, target)
    if target is not None:
        options |= {"target": target.signals["phi"][:, :, None], "target_population": target.population[:, :, None]}
    return attacks.rmia(shadows.signals["phi"], shadows.keep, population, **options)


def _as_if_out(phi: Tensor, keep: Tensor) -> Tensor:
    """phi whose entries of shadows that held z give the mean probability of those that did not, so that means agree."""
    p, out = torch.sigmoid(phi.double()), (~keep.T).double()
    mean = ((p * out).sum(2) / out.sum(1).clamp_min(1)).clamp(1e-300, 1 - 1e-16)
    return torch.where(keep.T, torch.logit(mean)[:, :, None], phi.double())


def _base(data, shadows, target, *, variant: str) -> Tensor:
    phi = None if target is None else target.signals["phi"][:, :, None]
    options: dict[str, Any] = {"variant": variant, "target": phi, "partner": _partner(shadows, target)}
    return attacks.base(shadows.signals["phi"], shadows.keep, **options)


def _attack_r(data, shadows, target) -> Tensor:
    phi = None if target is None else target.signals["phi"][:, :, None]
    scores = attacks.attack_r(shadows.signals["phi"], shadows.keep, target=phi, partner=_partner(shadows, target))
    scores[:, shadows.keep.all(0)] = 0.5  # no shadow without the example: no evidence
    return scores


def _attack_p(data, shadows, target) -> Tensor:
    if target is None:
        return attacks.attack_p(shadows.signals["phi"], shadows.population)
    return attacks.attack_p(target.signals["phi"][:, :, None], target.population[:, :, None])


def _loss(data, shadows, target) -> Tensor:
    # phi ranks as the negative loss does, and does not saturate.
    if target is None:
        return attacks.query_mean(shadows.signals["phi"]).T
    return attacks.query_mean(target.signals["phi"])[None]


def _per_class(data, shadows, target, *, signal: str, sign: float) -> Tensor:
    values = sign * shadows.signals[signal]
    if target is not None:
        own = sign * target.signals[signal][:, :, None]
        return attacks.threshold_per_class(values, shadows.keep, data.labels, target=own)
    return attacks.threshold_per_class(values, shadows.keep, data.labels)


def _label_only(data, shadows, target) -> Tensor:
    own = None if target is None else target.signals["correct"][:, :, None]
    partner = _partner(shadows, target)
    return attacks.label_only(shadows.signals["correct"], shadows.keep, target=own, partner=partner)


def _classes(labels: Tensor) -> Tensor:
    count = int(labels.max()) + 1
    return one_hot(labels, count).float() if count <= MOST_CLASSES else labels[:, None].float()


def _shadow_network(data, shadows, target) -> Tensor:
    # Bounded, for the features are standardised: phi of +-1e6 would leave nothing of the others' spread.
    names = [name for name in shadows.signals if target is None or name in target.signals]
    classes = _classes(data.labels)

    def rows(signals, answers, models: int) -> Tensor:
        parts = [signals[name].float().mean(0).clamp(-50, 50)[:, :, None] for name in names]
        if answers is not None:
            parts.append(answers.float().clamp_min(-50))
        return torch.cat([*parts, classes[:, None].expand(-1, models, -1)], 2)

    both = shadows.answers is not None and (target is None or target.answers is not None)
    features = rows(shadows.signals, shadows.answers if both else None, len(shadows.keep))
    if target is None:
        wanted = tuple(range(min(len(shadows.keep), TRAINED_TARGETS)))
        return learned.shadow_network(features, shadows.keep, targets=wanted, partner=shadows.partner)
    seen = {name: value[:, :, None] for name, value in target.signals.items()}
    own = rows(seen, target.answers[:, None] if both else None, 1)
    return learned.shadow_network(features, shadows.keep, target=own)


def _quantile(data, shadows, target) -> Tensor:
    features = [_classes(data.labels)]
    if data.images is not None:
        x = data.images.permute(0, 3, 1, 2).float() / 255
        size = (min(POOLED, x.shape[2]), min(POOLED, x.shape[3]))
        features.append(torch.cat([adaptive_avg_pool2d(part, size).flatten(1) for part in x.split(4096)]))
    phi = None if target is None else target.signals["phi"][:, :, None].clamp(-1e6, 1e6)
    seen = shadows.signals["phi"].clamp(-1e6, 1e6)
    return learned.quantile_regression(seen, shadows.keep, torch.cat(features, 1), target=phi)


def nearest(images: Tensor, synthetic: Tensor, reference: Tensor | None) -> Tensor:
    """``[N]``: see :func:`kr_fast.membership.nearest_synthetic`."""
    return released.nearest_synthetic(images, synthetic, reference=reference)


def density(images: Tensor, synthetic: Tensor, reference: Tensor | None) -> Tensor:
    """``[N]``: see :func:`kr_fast.membership.generated_density`."""
    return released.generated_density(images, synthetic, reference)


def entries(*, gamma: float = 1.0, offline_a: float = 0.33, predicate: str = "ratio") -> dict[str, Attack]:
    """The catalogue by name, with RMIA's options."""
    shadows = "shadow models trained like the target on data like its own, about half of them with the example"
    outside = "shadow models trained like the target, none of them with the example"
    per_class = "shadow models, which give each class its threshold"
    found = [
        Attack("lira", "LiRA online", shadows, ("shadows", "in"), functools.partial(_lira, variant="online")),
        Attack("lira_offline", "LiRA offline", outside, ("shadows",), functools.partial(_lira, variant="offline")),
    ]
    for variance in ("per_example", "fixed", "fixed_raw", "shrinkage"):
        words = variance.replace("_", " ")
        for variant, start, needs in (("online", "lira", ("shadows", "in")), ("offline", "lira_offline", ("shadows",))):
            run = functools.partial(_lira, variant=variant, variance=variance)
            assumes = shadows if variant == "online" else outside
            found.append(Attack(f"{start}_{variance}", f"LiRA {variant}, {words} variance", assumes, needs, run))
    for variant in ("online", "offline"):
        for fixed in (False, True):
            run = functools.partial(_carlini, variant=variant, fix_variance=fixed)
            name = f"lira_carlini2021_{variant}" + ("_fixed" if fixed else "")
            title = f"LiRA {variant}{', fixed variance' if fixed else ''}, as the code of 2021"
            assumes, needs = (shadows, ("shadows", "in")) if variant == "online" else (outside, ("shadows",))
            found.append(Attack(name, title, assumes, needs, run, calibrated=False))
    rmia = functools.partial(_rmia, gamma=gamma, offline_a=None, predicate=predicate)
    offline = functools.partial(_rmia, gamma=gamma, offline_a=offline_a, predicate=predicate)
    scale = f"RMIA offline (a = {offline_a:g})"
    found += [
        Attack("rmia", "RMIA", f"{shadows}; further non-members", ("shadows", "in", "population"), rmia),
        Attack("rmia_offline", scale, f"{outside}; further non-members", ("shadows", "population"), offline),
        Attack("base", "BASE", shadows, ("shadows", "in"), functools.partial(_base, variant="online")),
        Attack("base_offline", "BASE offline", outside, ("shadows",), functools.partial(_base, variant="offline")),
        Attack("attack_r", "Attack-R", outside, ("shadows",), _attack_r),
        Attack("attack_p", "Attack-P", "further non-members, no shadow model", ("population",), _attack_p),
        Attack("loss", "loss threshold", "nothing but the answer of the target", (), _loss),
        Attack(
            "confidence", "confidence by class", per_class, ("shadows", "in", "labels"),
            functools.partial(_per_class, signal="phi", sign=1.0),
        ),
        Attack(
            "entropy", "entropy by class", per_class, ("shadows", "in", "labels", "entropy"),
            functools.partial(_per_class, signal="entropy", sign=-1.0),
        ),
        Attack(
            "modified_entropy", "modified entropy by class", per_class, ("shadows", "in", "labels", "modified_entropy"),
            functools.partial(_per_class, signal="modified_entropy", sign=-1.0),
        ),
        Attack("shadow_network", "Shokri's attack network", shadows, ("shadows", "in", "labels"), _shadow_network),
        Attack("quantile_regression", "quantile regression", outside, ("shadows", "labels"), _quantile),
        Attack(
            "label_only", "label only (augmentations)", f"labels alone from the target; {outside}",
            ("shadows", "correct"), _label_only,
        ),
        Attack(
            "nearest_synthetic", "nearest synthetic image",
            "the released images, and further non-members where there are some; no model", ("synthetic",), nearest,
            released=True, calibrated=False,
        ),
        Attack(
            "generated_density", "density of the released images", "the released images and further non-members",
            ("synthetic", "reference"), density, released=True, calibrated=False,
        ),
    ]  # fmt: skip
    return {attack.name: attack for attack in found}


CATALOG = entries()
# What is run unless something else is asked for: one of each idea that needs no training of its own.
DEFAULT = (
    "lira", "lira_offline", "rmia", "base", "attack_r", "loss", "modified_entropy", "nearest_synthetic",
    "generated_density",
)  # fmt: skip
