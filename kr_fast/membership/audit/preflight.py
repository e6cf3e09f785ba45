"""Attacks tried on random signals before shadows are trained: what cannot be run with this keep matrix is told then."""

from typing import Any

import torch
from torch import Tensor

from kr_fast.membership.attacks.catalog import Subject
from kr_fast.membership.audit.choices import Choices
from kr_fast.membership.audit.scores import choose, run_attack
from kr_fast.membership.inputs.answers import ANSWERS, SIGNALS
from kr_fast.membership.inputs.data import UNNAMED, AuditData, ShadowSignals, TargetSignals
from kr_fast.runtime import seeds
from kr_fast.runtime.errors import fail
from kr_fast.runtime.storage.image_rows import Images, batches

EXAMPLES = 64  # of members and of non-members


def random_data(keep: Tensor, members: Tensor, labels: Tensor, images: Images, population: Any) -> AuditData:
    """The audit's data of a part of the examples, with random numbers for signals.

    Args:
        keep: ``[M, N]``; members: bool ``[N]``; labels: ``[N]``; images: ``[N, H, W, C]``.
        population: None, (images, labels), or a share of the non-members, which were not kept out of the shadows.
    """
    generator = seeds.generator(0, "preflight")
    at, apart, z_keep = _part(keep, members), None, None
    if isinstance(population, float):
        outside = at[~members[at]]
        taken = outside[: max(1, round(population * len(outside)))]
        apart, z_keep = len(taken), keep[:, taken]
        at = at[~torch.isin(at, taken)] if len(taken) < len(outside) else at
    elif population is not None:
        apart = min(EXAMPLES, len(population[0]))

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    def signals(*shape: int) -> dict[str, Tensor]:
        return {name: draw(*shape).sigmoid() if name == "correct" else draw(*shape) for name in SIGNALS}

    count, models = len(at), len(keep)
    z_phi, z_own = (None, None) if apart is None else (draw(1, apart, models), draw(1, apart))
    shadows = ShadowSignals(keep[:, at], signals(1, count, models), z_phi, z_keep, draw(count, models, ANSWERS))
    target = TargetSignals(signals(1, count), z_own, draw(count, ANSWERS))
    reference = None if population is None else images[at] if z_keep is not None else population[0]
    return AuditData({UNNAMED: shadows}, {"target": target}, members[at], labels[at], images[at], reference=reference)


def _part(keep: Tensor, members: Tensor) -> Tensor:
    """Indices of some members and non-members, the examples with most and fewest shadows on a side among them."""
    held = keep.sum(0)
    parts = [side.nonzero()[:, 0] for side in (members, ~members)]
    parts = [part[:: -(-len(part) // EXAMPLES)] for part in parts]
    return torch.cat([*parts, torch.stack([held.argmax(), held.argmin()])]).unique()


def check_attacks(data: AuditData, choices: Choices) -> None:
    """Run the attacks that an audit of such data would run. Raises: UserError of the first that cannot be."""
    chosen, _ = choose(data, choices)
    if choices.primary is not None and choices.primary not in (names := [attack.name for attack in chosen]):
        fail("audit", "primary", f"be one of the attacks, {', '.join(names)}", choices.primary)
    shadows, target = next(iter(data.shadows.values())), next(iter(data.targets.values()))
    of_target, of_shadows = Subject(data, shadows, target), Subject(data, shadows)
    for attack in chosen:
        if attack.released:
            if attack.name == "generated_density":
                _check_spread(data)
            continue
        run_attack(attack, of_target)
        alone = attack.missing(of_shadows) is None
        inside = "population" in attack.needs and shadows.population_keep is not None
        if choices.targets == "shadows" and alone and not inside:
            run_attack(attack, of_shadows)


def _check_spread(data: AuditData) -> None:
    """A density needs images that differ."""
    first, sets = data.reference[:1], (data.reference, *data.synthetic.values())
    if all(bool((part == first).all()) for images in sets for part in batches(images)):
        fail("audit", "synthetic", "differ between images", "identical images")
