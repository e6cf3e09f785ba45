"""The same thing on both sides: a model among its own shadows, an image among members and non-members."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from kr_fast.data import shared_images
from kr_fast.runtime.errors import fail
from kr_fast.runtime.storage.image_rows import Images, rows_of

SAMPLE = 64  # examples by which models are told apart before all examples are
SOME = 1024  # examples by which answers that were rounded are told
ROUNDED = 0.05  # of the distance between two shadows: as near are answers of one model, stored in another dtype
LEAST_VALUES = 3  # distinct values of models that count as one: constant or saturated answers agree by chance
HINT = "leave that shadow out"


def refuse_equal_shadows(phi: Tensor) -> None:
    """Refuse two shadows whose phi (``[A, N, M]``) is the same to the bit on every example: they are one model.

    With two rows of keep one of them is wrong; with equal rows a shadow is attacked with itself among its shadows.
    """
    at = _equal(phi, phi)
    if at is not None:
        rule = "be models that differ"
        fail("audit", "shadows", rule, f"equal answers of {at[0]} and {at[1]} on every example (one file, copied?)")


def refuse_shadow_as_target(name: str, target: Tensor, shadows: Tensor) -> None:
    """Refuse a target whose phi (``[A, N]``) is that of one of its shadows (``[A, N, M]``) on every example."""
    if target.shape == shadows.shape[:2] and (at := _equal(target[:, :, None], shadows, same=False)) is not None:
        got = f"shadow {at[1]}, with equal answers on every example"
        fail("audit", f"target {name}", f"not be among its shadows ({HINT})", got)


def shadow_but_for_rounding(target: Tensor, shadows: Tensor) -> int | None:
    """The shadow (phi ``[A, N, M]``) that answers as the target (``[A, N]``) does but for rounding, or None."""
    if target.shape != shadows.shape[:2]:
        return None
    at = torch.arange(0, shadows.shape[1], -(-shadows.shape[1] // SOME))
    own, others = (values[:, at].double().clamp(-50, 50) for values in (target[:, :, None], shadows))
    gaps = (own - others).abs().mean((0, 1))
    apart = float((others - others.roll(1, 2)).abs().mean())
    nearest = int(gaps.argmin())
    return nearest if float(gaps[nearest]) < ROUNDED * apart else None


def population_under_attack(phi: Tensor, population: Tensor) -> int:
    """How many of a population (``[A, Z, M]``) every shadow answers as it does some example of the pool."""
    first, second = ((values[0].double() + 0.0).numpy() for values in (phi, population))
    known = {row.tobytes() for row in first}
    return sum(row.tobytes() in known and len(set(row.tolist())) >= LEAST_VALUES for row in second)


def refuse_equal_weights(targets: dict[str, nn.Module], shadows: Sequence[nn.Module]) -> None:
    """The same of models, whose parameters are compared in order; a model without parameters is none of them."""
    known: dict[tuple, list[int]] = {}
    for index, model in enumerate(shadows):
        key = _key(model)
        if key is None:
            continue
        for other in known.setdefault(key, []):
            if _same_weights(model, shadows[other]):
                got = f"equal weights of {other} and {index} (one file, copied?)"
                fail("audit", "shadows", "be models that differ", got)
        known[key].append(index)
    for name, model in targets.items():
        for index in known.get(_key(model), ()):
            if _same_weights(model, shadows[index]):
                fail("audit", f"target {name}", f"not be among its shadows ({HINT})", f"shadow {index}, equal weights")


def images_on_both_sides(images: Images | None, members: Tensor | None) -> str | None:
    """What a reader has to know where members and non-members share images, or None."""
    if images is None or members is None:
        return None
    inside, outside = rows_of(images, members), rows_of(images, ~members)
    first = int(shared_images(inside, outside).sum())
    if not first:
        return None
    second = int(shared_images(outside, inside).sum())
    return (
        f"{first} of {len(inside)} members and {second} of {len(outside)} non-members are the same images, byte for "
        "byte: such a non-member was trained on, which pulls every figure towards chance"
    )


def _equal(first: Tensor, second: Tensor, same: bool = True) -> tuple[int, int] | None:
    """The first pair of models (last axis) with equal values; ``same``: both are one array, whose pairs are i < j."""
    count = first.shape[1]
    at = torch.arange(0, count, -(-count // SAMPLE))
    rows = [(values[:, at].double() + 0.0).permute(2, 0, 1).flatten(1).numpy() for values in (first, second)]
    known: dict[bytes, list[int]] = {}
    if not same:
        for i, row in enumerate(rows[0]):
            known.setdefault(row.tobytes(), []).append(i)
    for j, row in enumerate(rows[1]):
        for i in known.get(row.tobytes(), ()):
            if torch.equal(first[:, :, i], second[:, :, j]) and len(second[:, :, j].unique()) >= LEAST_VALUES:
                return i, j
        if same:
            known.setdefault(row.tobytes(), []).append(j)
    return None


def _key(model: nn.Module) -> tuple | None:
    """What models with equal weights have in common, cheaply."""
    parameters = list(model.parameters())
    ends = (each.detach().cpu().flatten().view(torch.uint8) for each in parameters[:: len(parameters) - 1 or 1])
    return (len(parameters), *(each.numpy().tobytes() for each in ends)) if parameters else None


def _same_weights(first: nn.Module, second: nn.Module) -> bool:
    pairs = list(zip(first.parameters(), second.parameters(), strict=True))
    return all(a.shape == b.shape and a.dtype == b.dtype and torch.equal(a.cpu(), b.cpu()) for a, b in pairs)
