"""What a user decides of an audit: its choices, what is known of a target, and the data that the attacker has."""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from kr_fast.ensemble import ModelArray, Query
from kr_fast.membership.attacks.catalog import CATALOG, DEFAULT
from kr_fast.membership.inputs.answers import check_accuracy
from kr_fast.membership.inputs.data import check_kind
from kr_fast.membership.verdict.limits import Limits
from kr_fast.membership.verdict.paths import Names, check_paths
from kr_fast.ops.membership.rmia import PREDICATES
from kr_fast.runtime.errors import fail
from kr_fast.runtime.options import check, option

TARGETS = ("given", "shadows")
# Option of RMIA -> the attacks that read it.
RMIA = {"rmia_gamma": ("rmia", "rmia_offline"), "rmia_predicate": ("rmia", "rmia_offline")}
RMIA["rmia_offline_a"] = ("rmia_offline",)


@dataclasses.dataclass(frozen=True)
class Choices:
    """What is fixed before a score is seen. ``Choices(attacks=("lira", "rmia"), level=0.9)``

    Args:
        attacks: names of :data:`kr_fast.membership.CATALOG`; None for all of ``DEFAULT`` that what is given allows.
        primary: the attack whose figures are the result; the others are exploratory, and their corrected intervals
            share one error. None for "lira", or the first attack where it is not run.
        targets: "given", or "shadows". The shadows that targets are attacked with are attacked from each other in any
            case, if there are four (``leave_one_out``: what the recipe leaks); "shadows" takes the other sets too, and
            attacks that give no thresholds, and refuses what it cannot do.
        augment: the queries of models, see :meth:`kr_fast.ModelArray.signals`; saved signals have queries of their own.
        level: coverage of every interval, at least one half: 0.05 is an error, which would call all above chance.
        delta: of the epsilon lower bounds.
        priors: shares of members in the population for the positive predictive value.
        random_members: every example under attack, member or not, became one by a fair coin of its own, thrown after
            the examples were chosen: then the one-run bound applies.
        rmia_gamma: of RMIA, how clearly an example has to dominate one of the population; above 0.
        rmia_offline_a: ``a`` of RMIA's offline form, in [0, 1].
        rmia_predicate: when an example dominates another one, see :func:`kr_fast.membership.rmia`.
        leave_out_duplicates: members and non-members that are near-duplicates of each other are not attacked, see
            :func:`kr_fast.membership.duplicates_across`; they are counted in any case.
        seed: of splits and ties.
        limits: of the verdict, see :class:`kr_fast.membership.Limits`.
    Raises: UserError naming the field.
    """

    attacks: Sequence[str] | None = None
    primary: str | None = None
    targets: str = option("given", "what is attacked", choices=TARGETS)
    augment: str | Sequence[Query] = option("none", "queries of the attacks: none, flip, shift or lira")
    level: float = option(0.95, "coverage of the intervals", least=0.5, below=1)
    delta: float = option(1e-5, "of the lower bounds of epsilon", above=0, below=1)
    priors: tuple[float, ...] = option(
        (0.5, 0.1, 0.01), "shares of members for the positive predictive value", above=0, below=1
    )
    random_members: bool = option(False, "each example became a member by a fair coin: the one-run bound applies")
    rmia_gamma: float = option(
        1.0, "of RMIA: how clearly an example has to dominate one of the population", above=0, most=1000
    )
    rmia_offline_a: float = option(0.33, "of rmia_offline: its scale a", least=0, most=1)
    rmia_predicate: str = option("ratio", "of RMIA: when one dominates another", choices=PREDICATES)
    leave_out_duplicates: bool = option(
        False, "attack no image that has a near-duplicate on the other side, among members or non-members"
    )
    seed: int = option(0, "of splits and ties", least=0)
    limits: Limits = Limits()  # noqa: RUF009 (it is frozen)

    def __post_init__(self):
        if isinstance(self.attacks, str):
            fail("audit", "attacks", "be a list of names", repr(self.attacks))
        for name in self.attacks or ():
            if name not in CATALOG:
                fail("audit", "attacks", f"hold names among {', '.join(CATALOG)}", name)
        names = DEFAULT if self.attacks is None else tuple(self.attacks)
        if not names:
            fail("audit", "attacks", "hold at least one name", list(names))
        if self.primary is not None and self.primary not in names:
            fail("audit", "primary", f"be one of the attacks, {', '.join(names)}", self.primary)
        if self.targets not in TARGETS:
            fail("audit", "targets", f"be {' or '.join(TARGETS)}", self.targets)
        check(self, "audit")
        if self.leave_out_duplicates and self.random_members:
            rule = "be left out with random_members: what remains would not have become members by coins of its own"
            fail("audit", "leave_out_duplicates", rule, True)
        for field, readers in RMIA.items():
            value = getattr(self, field)
            if value != getattr(Choices, field) and not set(readers) & set(names):
                fail("audit", field, f"be left out without {' or '.join(readers)}, where it does nothing", value)

    def check_paths(self, targets: Iterable[str], sets: Iterable[str]) -> None:
        """Refuse limits on figures that an audit of these targets and sets of shadows cannot have, by their paths."""
        attacks = DEFAULT if self.attacks is None else self.attacks
        check_paths("audit", self.limits.fail_above, Names(tuple(targets), tuple(sets), tuple(attacks), self.priors))

    @property
    def rmia(self) -> dict[str, Any]:
        """gamma, offline_a and predicate."""
        return {"gamma": self.rmia_gamma, "offline_a": self.rmia_offline_a, "predicate": self.rmia_predicate}


@dataclasses.dataclass(frozen=True, repr=False)
class Target:
    """A classifier under attack, and what is known of it.

    Args:
        model: a torch module, or a :class:`kr_fast.ModelArray` of one, which carries an input normalisation of its own.
        kind: "full" where its shadows were made as it was, "transfer" where they were not: then the audit gives a lower
            bound on what it leaks. None: see :func:`kr_fast.audit`.
        shared: what its full shadow pipelines share with its own ("the generator").
        accuracy: in [0, 1], on examples that played no part, for the accuracy over privacy.
        title: what sentences call it ("the Student"); "" for its name.
        recipe: what it was made by, :func:`kr_fast.ensemble.recipe_of`; with shadows that were made by another recipe
            the target is "transfer", whatever ``kind`` says. None where it is not known.
    Raises: UserError naming the field.
    """

    model: nn.Module | ModelArray
    kind: str | None = None
    shared: str = ""
    accuracy: float | None = None
    title: str = ""
    recipe: Mapping[str, Any] | None = None

    def __post_init__(self):
        if self.kind is not None:
            check_kind("kind", self.kind)
        for name in ("shared", "title"):
            if not isinstance(getattr(self, name), str):
                fail("audit", f"{name} of a target", "be of type str", repr(getattr(self, name)))
        if self.recipe is not None and not isinstance(self.recipe, Mapping):
            fail("audit", "recipe of a target", "be a recipe (of recipe_of), or None", repr(self.recipe))
        if self.accuracy is not None:
            object.__setattr__(self, "accuracy", check_accuracy("accuracy", self.accuracy))


@dataclasses.dataclass(frozen=True, repr=False)
class Auxiliary:
    """Data that the attacker has beside shadow models. Tensors, arrays and lists are taken.

    Args:
        population: (images, labels) of further non-members that no shadow was trained on, for RMIA and Attack-P; or a
            share in (0, 1) of the non-members, which are then not attacked.
        synthetic: released synthetic images, uint8 ``[S, H, W, C]``, or name -> such: attacked by themselves.
        reference: real images uint8 ``[R, H, W, C]`` that are no members and not in the pool, for the attacks on
            synthetic images; None for those of ``population``.
    """

    population: tuple[Tensor, Tensor] | float | None = None
    synthetic: Tensor | Mapping[str, Tensor] | None = None
    reference: Tensor | None = None
