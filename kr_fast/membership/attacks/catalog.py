"""Every standard attack: what it needs, what it assumes, and how it is called on an audit's data.

:data:`METHODS` has one entry per method. :data:`CATALOG` gives names to those settings of their parameters that are run
in practice, as "lira_offline" to LiRA with ``variant="offline"``.
"""

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d, one_hot

from kr_fast.membership.attacks import learned, released
from kr_fast.membership.attacks import scores as attacks
from kr_fast.membership.inputs.data import AuditData, ShadowSignals, TargetSignals
from kr_fast.runtime.errors import fail
from kr_fast.runtime.storage.image_rows import batches

# Below this many shadows on a side one variance for all examples attacks better than one each (Carlini et al., fig. 9).
PER_EXAMPLE_FROM = 64
TRAINED_TARGETS = 4  # shadows that an attack with a training for each target is calibrated on
MOST_CLASSES = 100  # one-hot classes among features; above it the class is one number
POOLED = 8  # pixels on a side of images as features
SHADOWS = "shadow models trained like the target on data like its own, about half of them with the example"
OUTSIDE = "shadow models trained like the target, none of them with the example"


@dataclasses.dataclass(frozen=True)
class Subject:
    """What an attack is run on: a target and its shadows; shadows, each left out in turn; or released images."""

    data: AuditData
    shadows: ShadowSignals | None = None
    target: TargetSignals | None = None
    synthetic: Tensor | None = None

    def all(self, signal: str = "phi") -> Tensor:
        """``[A, N, M]`` of the shadows."""
        return self.shadows.signals[signal]

    def own(self, signal: str = "phi") -> Tensor | None:
        """``[A, N, 1]`` of the target; None where each shadow is one."""
        return None if self.target is None else self.target.signals[signal][:, :, None]

    def given(self, signal: str = "phi") -> tuple[Tensor, Tensor]:
        """(signal, keep) of the shadows: what every attack on shadows takes first."""
        return self.all(signal), self.shadows.keep

    def left_out(self, signal: str = "phi") -> dict[str, Tensor | None]:
        """The arguments target and partner of an attack: one of them is None."""
        return {"target": self.own(signal), "partner": self.shadows.partner if self.target is None else None}

    def has(self, signal: str) -> bool:
        """Whether shadows and target have the signal."""
        return signal in self.shadows.signals and (self.target is None or signal in self.target.signals)


# Name -> (whether the subject has it, what it is).
NEEDS: dict[str, tuple[Callable[[Subject], bool], str]] = {
    "shadows": (lambda s: s.shadows is not None, "shadow models (keep, and their logits or signals)"),
    "in": (lambda s: bool(s.shadows.keep.any()), "shadows that held some of the examples"),
    "labels": (lambda s: s.data.labels is not None, "labels"),
    "population": (
        lambda s: all(each is None or each.population is not None for each in (s.shadows, s.target)),
        "a population of further non-members (population=...)",
    ),
    "entropy": (lambda s: s.has("entropy"), "logits, or the signal entropy"),
    "modified_entropy": (lambda s: s.has("modified_entropy"), "logits, or the signal modified_entropy"),
    "correct": (lambda s: s.has("correct"), "logits, or the signal correct"),
    "synthetic": (lambda s: bool(s.data.synthetic) and s.data.images is not None, "images and a synthetic set"),
    "reference": (lambda s: s.data.reference is not None, "reference images that are no members (reference=...)"),
}


@dataclasses.dataclass(frozen=True)
class Attack:
    """One method with its parameters.

    Args:
        label: the title, with parameters in braces.
        assumption: of the attacker's knowledge; "{shadows}" says which shadow models the variant needs.
        requires: names of :data:`NEEDS`, beside those that follow from the parameters.
        function: of a subject and the parameters; scores ``[1, N]`` of a target or, without one, ``[K, N]`` of the
            first K shadows, each left out in turn; ``[N]`` on ``released`` images.
    """

    name: str
    label: str
    assumption: str
    requires: tuple[str, ...]
    function: Callable[..., Tensor]
    parameters: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    released: bool = False

    @property
    def online(self) -> bool:
        """Whether it reads shadows that held the example beside those that did not."""
        return self.parameters.get("variant") == "online"

    @property
    def title(self) -> str:
        """For a reader."""
        return self.label.format(**self.parameters)

    @property
    def assumes(self) -> str:
        """What the attacker has."""
        return self.assumption.format(shadows=SHADOWS if self.online else OUTSIDE)

    @property
    def needs(self) -> tuple[str, ...]:
        """Names of :data:`NEEDS`, in the order in which they are looked for."""
        needs = (self.requires[0], "in", *self.requires[1:]) if self.online else self.requires
        signal = self.parameters.get("signal")
        return (*needs, signal) if signal in NEEDS else needs

    @property
    def calibrated(self) -> bool:
        """Whether shadows attacked leave-one-out give its thresholds; the published code would take too long."""
        return not self.released and "carlini2021" not in self.parameters.get("variance", "")

    def run(self, subject: Subject) -> Tensor:
        """The scores."""
        return self.function(subject, **self.parameters)

    def configured(self, **parameters: Any) -> "Attack":
        """The attack with other values of those parameters that it has."""
        changed = {key: parameters.get(key, value) for key, value in self.parameters.items()}
        return dataclasses.replace(self, parameters=changed)

    def missing(self, subject: Subject) -> str | None:
        """The first thing that the attack needs and was not given, or None."""
        return next((words for has, words in map(NEEDS.get, self.needs) if not has(subject)), None)


def sides(keep: Tensor) -> int:
    """Shadows on the smaller side of the median example."""
    return int(torch.minimum(keep.sum(0), (~keep).sum(0)).median())


def auto_variance(keep: Tensor) -> str:
    """The variance that "lira" and "lira_offline" take."""
    return "per_example" if sides(keep) >= PER_EXAMPLE_FROM else "fixed"


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


def _lira(subject: Subject, *, variant: str = "online", variance: str = "auto") -> Tensor:
    """``variance``: one of :func:`kr_fast.membership.lira`, "auto", or "carlini2021" and "carlini2021_fixed": the
    published code with its quirks, see :func:`kr_fast.membership.lira_carlini2021`."""
    if variance.startswith("carlini2021"):
        options = {"variant": variant, "fix_variance": variance.endswith("fixed"), "target": subject.own()}
        return attacks.lira_carlini2021(*subject.given(), **options)
    variance = auto_variance(subject.shadows.keep) if variance == "auto" else variance
    return attacks.lira(*subject.given(), variant=variant, variance=variance, **subject.left_out())


def _rmia(subject: Subject, *, variant: str, gamma: float, predicate: str, offline_a: float) -> Tensor:
    shadows, target, population = subject.shadows, subject.target, subject.shadows.population
    if variant == "offline" and shadows.population_keep is not None:
        population = impute_held(population, shadows.population_keep)
    scale = offline_a if variant == "offline" else None
    options = {"gamma": gamma, "offline_a": scale, "predicate": predicate, **subject.left_out()}
    if target is not None:
        options["target_population"] = target.population[:, :, None]
    return attacks.rmia(*subject.given(), population, **options)


def impute_held(phi: Tensor, keep: Tensor) -> Tensor:
    """phi whose entries of shadows that held z give the mean probability of those that did not, so that means agree."""
    p, out = torch.sigmoid(phi.double()), (~keep.T).double()
    mean = ((p * out).sum(2) / out.sum(1).clamp_min(1)).clamp(1e-300, 1 - 1e-16)
    return torch.where(keep.T, torch.logit(mean)[:, :, None], phi.double())


def _base(subject: Subject, *, variant: str) -> Tensor:
    return attacks.base(*subject.given(), variant=variant, **subject.left_out())


def _attack_r(subject: Subject) -> Tensor:
    scores = attacks.attack_r(*subject.given(), **subject.left_out())
    scores[:, subject.shadows.keep.all(0)] = 0.5  # no shadow without the example: no evidence
    return scores


def _attack_p(subject: Subject) -> Tensor:
    if subject.target is None:
        return attacks.attack_p(subject.all(), subject.shadows.population)
    return attacks.attack_p(subject.own(), subject.target.population[:, :, None])


def _loss(subject: Subject) -> Tensor:
    # phi ranks as the negative loss does, and does not saturate.
    values = attacks.query_mean(subject.all() if subject.target is None else subject.own())
    return values.clamp(-attacks.BOUND, attacks.BOUND).T  # no threshold is above infinity


def _threshold_per_class(subject: Subject, *, signal: str) -> Tensor:
    sign, own = 1.0 if signal == "phi" else -1.0, subject.own(signal)
    target = None if own is None else sign * own
    signals, keep = subject.given(signal)
    return attacks.threshold_per_class(sign * signals, keep, subject.data.labels, target=target)


def _label_only(subject: Subject) -> Tensor:
    return attacks.label_only(*subject.given("correct"), **subject.left_out("correct"))


def _classes(labels: Tensor) -> Tensor:
    count = int(labels.max()) + 1
    return one_hot(labels, count).float() if count <= MOST_CLASSES else labels[:, None].float()


def _shadow_network(subject: Subject) -> Tensor:
    # Bounded, for the features are standardised: phi of +-1e6 would leave nothing of the others' spread.
    shadows, target, classes = subject.shadows, subject.target, _classes(subject.data.labels)
    names = [name for name in shadows.signals if subject.has(name)]

    def rows(signals: Callable[[str], Tensor], answers: Tensor | None, models: int) -> Tensor:
        parts = [signals(name).float().mean(0).clamp(-50, 50)[:, :, None] for name in names]
        if answers is not None:
            parts.append(answers.float().clamp_min(-50))
        return torch.cat([*parts, classes[:, None].expand(-1, models, -1)], 2)

    both = shadows.answers is not None and (target is None or target.answers is not None)
    features = rows(subject.all, shadows.answers if both else None, len(shadows.keep))
    if target is None:
        targets = tuple(range(min(len(shadows.keep), TRAINED_TARGETS)))
        return learned.shadow_network(features, shadows.keep, targets=targets, partner=shadows.partner)
    own = rows(subject.own, target.answers[:, None] if both else None, 1)
    return learned.shadow_network(features, shadows.keep, target=own)


def _quantile_regression(subject: Subject) -> Tensor:
    features, images = [_classes(subject.data.labels)], subject.data.images
    if images is not None:
        size = tuple(min(POOLED, side) for side in images.shape[1:3])
        parts = (part.permute(0, 3, 1, 2).float() / 255 for part in batches(images, 4096))
        features.append(torch.cat([adaptive_avg_pool2d(part, size).flatten(1) for part in parts]))
    (phi, keep), own = subject.given(), subject.own()
    target = None if own is None else own.clamp(-1e6, 1e6)
    return learned.quantile_regression(phi.clamp(-1e6, 1e6), keep, torch.cat(features, 1), target=target)


def _nearest_synthetic(subject: Subject) -> Tensor:
    reference = subject.data.reference
    if reference is not None and reference.shape[1:].numel() > released.WIDEST:
        reference = reference[:: -(-len(reference) // released.SAMPLE)]
    return released.nearest_synthetic(subject.data.images, subject.synthetic, reference=reference)


def _generated_density(subject: Subject) -> Tensor:
    return released.generated_density(subject.data.images, subject.synthetic, subject.data.reference)


ONLINE = {"variant": "online"}
OF_LIRA = {**ONLINE, "variance": "auto"}
OF_RMIA = {**ONLINE, "gamma": 1.0, "predicate": "ratio", "offline_a": 0.33}
PER_CLASS = "shadow models, which give each class its threshold"
LABELS = f"labels alone from the target; {OUTSIDE}"
NEAREST = "the released images, and further non-members where there are some; no model"
DENSITY = "the released images and further non-members"
IN_LABELS = ("shadows", "in", "labels")
_METHODS = (
    Attack("lira", "LiRA {variant}", "{shadows}", ("shadows",), _lira, OF_LIRA),
    Attack("rmia", "RMIA", "{shadows}; further non-members", ("shadows", "population"), _rmia, OF_RMIA),
    Attack("base", "BASE", "{shadows}", ("shadows",), _base, ONLINE),
    Attack("attack_r", "Attack-R", OUTSIDE, ("shadows",), _attack_r),
    Attack("attack_p", "Attack-P", "further non-members, no shadow model", ("population",), _attack_p),
    Attack("loss", "loss threshold", "nothing but the answer of the target", (), _loss),
    Attack("threshold_per_class", "{signal} by class", PER_CLASS, IN_LABELS, _threshold_per_class, {"signal": "phi"}),
    Attack("shadow_network", "Shokri's attack network", SHADOWS, IN_LABELS, _shadow_network),
    Attack("quantile_regression", "quantile regression", OUTSIDE, ("shadows", "labels"), _quantile_regression),
    Attack("label_only", "label only (augmentations)", LABELS, ("shadows", "correct"), _label_only),
    Attack("nearest_synthetic", "nearest synthetic image", NEAREST, ("synthetic",), _nearest_synthetic, released=True),
    Attack(
        "generated_density",
        "density of the released images",
        DENSITY,
        ("synthetic", "reference"),
        _generated_density,
        released=True,
    ),
)
METHODS = {method.name: method for method in _METHODS}


def _setting(method: str, name: str = "", label: str = "", **parameters: Any) -> Attack:
    """A method by the name of its parameters' values."""
    attack = METHODS[method]
    parameters = {**attack.parameters, **parameters}
    return dataclasses.replace(attack, name=name or method, label=label or attack.label, parameters=parameters)


def _settings() -> Iterator[Attack]:
    """What can be asked for by name."""
    variants = {"online": "lira", "offline": "lira_offline"}
    for variance in ("auto", "per_example", "fixed", "fixed_raw", "shrinkage"):
        end = "" if variance == "auto" else f"_{variance}"
        label = "LiRA {variant}" + f", {variance.replace('_', ' ')} variance" * bool(end)
        for variant, name in variants.items():
            yield _setting("lira", f"{name}{end}", label, variant=variant, variance=variance)
    for variant in variants:
        for end, words in (("", ""), ("_fixed", ", fixed variance")):
            name, label = f"lira_carlini2021_{variant}{end}", f"LiRA {variant}{words}, as the code of 2021"
            yield _setting("lira", name, label, variant=variant, variance=f"carlini2021{end}")
    yield _setting("rmia")
    yield _setting("rmia", "rmia_offline", "RMIA offline (a = {offline_a:g})", variant="offline")
    yield _setting("base")
    yield _setting("base", "base_offline", "BASE offline", variant="offline")
    yield from (METHODS[name] for name in ("attack_r", "attack_p", "loss"))
    yield _setting("threshold_per_class", "confidence", "confidence by class")
    yield _setting("threshold_per_class", "entropy", signal="entropy")
    yield _setting("threshold_per_class", "modified_entropy", "modified entropy by class", signal="modified_entropy")
    yield from (METHODS[name] for name in ("shadow_network", "quantile_regression", "label_only"))
    yield from (METHODS[name] for name in ("nearest_synthetic", "generated_density"))


CATALOG = {attack.name: attack for attack in _settings()}


def offline_form(name: str) -> str:
    """The attack that does as ``name`` with shadows without the example alone; itself where there is none."""
    attack = CATALOG[name]
    changed = {**attack.parameters, "variant": "offline"}
    forms = (each.name for each in CATALOG.values() if each.function is attack.function and each.parameters == changed)
    return next(forms, name) if attack.online else name


# What is run unless something else is asked for: one of each idea that needs no training of its own.
DEFAULT = ("lira", "lira_offline", "rmia", "base", "attack_r", "loss", "modified_entropy", "nearest_synthetic")
DEFAULT += ("generated_density",)
