"""Shadows attacked leave-one-out with both sides of each example equally large, so that knowing nothing gives 0.5.

Where each example is in the same number of shadows (half of them, as `train_shadows` has it), a member that is left out
has one shadow fewer that held the example, a non-member one fewer that did not: the score then tells them apart by the
noise of its two centres alone. Online LiRA has an AUC of 0.41 at 4 shadows, 0.46 at 8 and 0.485 at 16 where phi knows
nothing. So with each target one shadow of the other side is left out as well, its *partner*: both sides have lost one,
whichever the target was on. Where membership of each shadow is a coin of its own nothing of this happens, and none is.
In between, as for 8 of 16 shadows that were balanced together, it is left out as often as it takes.
"""

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from kr_fast.membership.inputs.answers import as_numbers
from kr_fast.ops._library import without_backward
from kr_fast.ops.sampling.philox_normal import philox_normal
from kr_fast.runtime import seeds
from kr_fast.runtime.errors import fail
from kr_fast.runtime.inputs import as_mask

CHUNK = 1 << 18  # entries of phi at a time
ROUNDED = 1e-9  # of a sum of squares: what is smaller after a subtraction is summed anew
STEPS = 256  # of the spread of signals, by which examples are told apart
PRIOR = 8  # shadows that the pooled variance counts as under "shrinkage", as in the kernel


def partners(keep: Tensor, seed: int = 0, phi: Tensor | None = None) -> Tensor:
    """For each (target, example) a shadow of the other side, int64 ``[M, N]``; -1 where none is to be left out.

    The shadows of both sides are put in a random order, the same wherever an example stands, and paired: with as many
    on each side two shadows are each other's partners. So target and partner are exchangeable, and of a shadow that is
    scored for an example and knows nothing of it, nothing tells on which side it was.

    -1 where a side has no shadow, and everywhere if the number of shadows that hold an example varies as if each had
    been drawn by itself: then the other shadows say nothing of the target, and to leave one out by its side would make
    them. Where it varies less, but varies, as where some of the shadows of a balanced keep are taken, -1 for as many
    targets as :func:`_rates` says.

    Args:
        keep: bool ``[M, N]``.
        seed: of the orders.
        phi: float ``[A, N, M]``, any signals of these examples, by which they are told apart, so that each has an order
            of its own; they count in steps of 1/256 of their spread, so that rounding, as of another processor, changes
            few orders. None: all that the same shadows held have the same. With 8 shadows and fewer that is too few
            orders where a shadow is surer of all examples than another: then the mean AUC of scores that know nothing
            is further from 0.5 than its interval says.
    Raises: UserError for another ``keep``, and for signals of other examples.
    """
    keep = as_mask("partners", "keep", keep, 2)
    if 0 in keep.shape:
        fail("partners", "keep", "be [M, N], none of them 0", list(keep.shape))
    phi = None if phi is None else as_numbers("partners", "phi", phi)
    if phi is not None and (phi.ndim != 3 or 0 in phi.shape or phi.shape[1] != keep.shape[1]):
        fail("partners", "phi", f"have shape [A, {keep.shape[1]}, M]", list(phi.shape))
    held = keep.T
    inside, models = held.sum(1, keepdim=True), held.shape[1]
    rates = _rates(inside[:, 0].numpy(), models)
    if rates is None:
        return torch.full(keep.shape, -1)
    outside, index = models - inside, torch.arange(models)[None]
    # The order follows from who held the example and its answers, not from where it stands.
    weights = torch.randint(1 << 62, (models,), generator=seeds.generator(seed, "partners"))
    patterns = (held * weights).sum(1)
    if phi is not None:  # whole numbers, whose sums do not depend on how they are added up
        values = phi[0].cpu().double().clamp(-1e6, 1e6)
        spread = float((values - values.median()).abs().median())
        steps = (values / max(spread / STEPS, 1e-9)).round().long()
        weights = torch.randint(1 << 62, (steps.shape[1],), generator=seeds.generator(seed, "partners", "examples"))
        patterns += (steps * (2 * weights + 1)).sum(1)
    patterns &= (1 << 62) - 1
    keys = philox_normal(patterns, (models,), seed=seeds.derive(seed, "partners")).double()
    order = torch.where(held, 1e3, -1e3).add(keys).argsort(1)  # first those that did not hold the example
    of_out, of_in = outside + index % inside.clamp_min(1), (index - outside) % outside.clamp_min(1)
    other = torch.where(index < outside, of_out, of_in).clamp_max(models - 1)
    partner = torch.empty_like(order).scatter_(1, order, order.gather(1, other))
    left_out = (inside > 0) & (outside > 0)
    if (rates < 1).any():
        coins = philox_normal(patterns, (models,), seed=seeds.derive(seed, "partners"), stream=1)
        cells = 2 * inside.numpy() + held.numpy()
        left_out = left_out & torch.from_numpy(_first(cells, coins.double().numpy()) < rates[cells])
    return torch.where(left_out, partner, -1).T.contiguous()


def _rates(inside: np.ndarray, models: int) -> np.ndarray | None:
    """How often a partner is left out, at ``2 K + side`` of examples in K shadows (side 1: with targets that hold it).

    Of P(K) examples, ``K P(K)`` targets hold one and ``(M - K) P(K)`` do not; u(K) and v(K) of them keep the partner,
    the others lose it. With s the mean share of shadows in, what is left tells nothing of the target if each number of
    shadows in and out comes from both kinds of targets in the ratio of s to 1 - s:

        ``(1 - s) u(K + 1) = s v(K)`` and ``(1 - s) (K P(K) - u(K)) = s ((M - K) P(K) - v(K))``, so
        ``(1 - s) u(K + 1) = (1 - s) u(K) + P(K) (M s - K)``, from u(0) = 0.

    If all examples are in as many shadows each partner is left out, if K is a binomial's none: then None is returned,
    and where K varies more.
    """
    share, count = np.bincount(inside, minlength=models + 1).astype(np.float64), np.arange(models + 1)
    if not (inner := share[1:-1].sum()):
        return None
    # Examples in none of the shadows, or in all of them: no more than coins make; the rest was not drawn.
    s = share[1:-1] @ count[1:-1] / (models * inner)
    share[0] = min(share[0], share[1] * (1 - s) / (models * s))
    share[-1] = min(share[-1], share[-2] * s / (models * (1 - s)))
    s = share @ count / (models * share.sum())
    gain = share * (models * s - count)
    spread = share @ (count - models * s) ** 2 / (share.sum() * models * s * (1 - s))  # 1 of coins
    if spread >= max(0.25, 1 - 2 * (2 / len(inside)) ** 0.5):  # two standard errors below
        return None
    before = np.concatenate([[0.0], gain.cumsum()[:-1]])
    rates = np.ones((models + 1, 2))
    for side, kept, targets in ((0, (before + gain) / s, models - count), (1, before / (1 - s), count)):
        some = share * targets > 0
        rates[some, side] = 1 - kept[some] / (share * targets)[some]
    return np.where(rates > 1 - 1e-9, 1.0, rates.clip(0, 1)).ravel()


def _first(cells: np.ndarray, coins: np.ndarray) -> np.ndarray:
    """Which share of the entries of the same cell comes before each one (half of equals) in the order of ``coins``."""
    from scipy.special import ndtr

    values, at, counts = np.unique(cells + ndtr(coins), return_inverse=True, return_counts=True)
    cell = np.floor(values).astype(np.int64)
    before = np.concatenate([[0], counts.cumsum()])
    first = before[np.searchsorted(cell, cell)]
    return (((before[:-1] + before[1:]) / 2 - first) / np.bincount(cell, counts)[cell])[at.reshape(cells.shape)]


def check_partners(where: str, keep: Tensor, partner: Tensor) -> None:
    """int64 ``[M, N]``, of the other side or -1."""
    if partner.dtype != torch.int64 or partner.shape != keep.shape:
        fail(where, "partner", f"be int64 {list(keep.shape)}", f"{partner.dtype} {list(partner.shape)}")
    if partner.numel() and not -1 <= int(partner.min()) <= int(partner.max()) < len(keep):
        fail(where, "partner", f"lie in [-1, {len(keep)})", [int(partner.min()), int(partner.max())])
    if bool(((keep.gather(0, partner.clamp_min(0)) == keep) & (partner >= 0)).any()):
        fail(where, "partner", "be of the other side than the target, or -1", "one of the same side")


class Side:
    """The shadows of one side without those that are left out with each target: statistics ``[A, n, M]`` of the rest.

    Args:
        values: float64 ``[A, n, M]``; held: bool ``[n, M]``, the side.
        lost: int64 ``[n, M]``, which of them is left out with each target; -1 for none.
    """

    def __init__(self, values: Tensor, held: Tensor, lost: Tensor):
        self.values, self.held = values, held
        self.loses, self.lost = lost >= 0, lost.clamp_min(0).expand_as(values)
        self.left = held.sum(1, keepdim=True) - self.loses.long()  # [n, M]
        self.ordered, order = values.masked_fill(~held, torch.inf).sort(2)
        rank = order.argsort(2).gather(2, self.lost)
        self.rank = torch.where(self.loses, rank, values.shape[2])

    def at(self, index: Tensor) -> Tensor:
        """The order statistic at ``index`` (from 0) of what is left."""
        index = index.clamp_min(0).expand_as(self.rank)
        return self.ordered.gather(2, (index + (index >= self.rank)).clamp_max(self.values.shape[2] - 1))

    def moments(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(median, mean, population variance, sum of squares about the median); any number where nothing is left."""
        median = (self.at((self.left - 1) // 2) + self.at(self.left // 2)) / 2
        median = torch.where(self.left > 0, median, 0.0)
        middle = (self.held.sum(1, keepdim=True) // 2).clamp_max(self.values.shape[2] - 1)
        centre = self.ordered.gather(2, middle.expand(*self.values.shape[:2], 1))
        distance = torch.where(self.held, self.values - centre, 0.0)
        own, count = torch.where(self.loses, distance.gather(2, self.lost), 0.0), self.left.clamp_min(1)
        square = distance.square()
        whole = square.sum(2, keepdim=True)
        total, squares = distance.sum(2, keepdim=True) - own, whole - own.square()
        mean = total / count
        variance, shift = squares / count - mean.square(), median - centre
        residual = squares - 2 * shift * total + count * shift.square()
        lost = (torch.minimum(variance * count, residual) <= ROUNDED * whole) & (self.left > 0) & (whole > 0)
        a, n, m = lost.nonzero(as_tuple=True)
        left = self.held[n].clone()
        left[torch.arange(len(n)), self.lost[a, n, m]] &= ~self.loses[n, m]
        rest, size = torch.where(left, self.values[a, n], 0.0), self.left[n, m][:, None].double()
        centres = (rest.sum(1, keepdim=True) / size, median[a, n, m][:, None])
        about = [torch.where(left, rest - middle, 0.0).square().sum(1) for middle in centres]
        variance[a, n, m], residual[a, n, m] = about[0] / size[:, 0], about[1]
        return median, torch.where(self.left > 0, mean + centre, 0.0), variance.clamp_min(0), residual.clamp_min(0)


def sides(phi: Tensor, keep: Tensor, partner: Tensor) -> Iterator[tuple[slice, Tensor, Side, Side]]:
    """(examples, phi ``[A, n, M]``, side in, side out), some examples at a time."""
    queries, count, models = phi.shape
    step = max(1, CHUNK // max(1, queries * models))
    own = torch.arange(models)
    for first in range(0, count, step):
        at = slice(first, min(first + step, count))
        held, other, values = keep[:, at].T, partner[:, at].T, phi[:, at].double()
        yield (
            at,
            values,
            Side(values, held, torch.where(held, own, other)),
            Side(values, ~held, torch.where(held, other, own)),
        )


def lira(phi: Tensor, keep: Tensor, partner: Tensor, *, variant: str, variance: str) -> tuple[Tensor, int]:
    """:func:`kr_fast.membership.lira` of every shadow with its partner left out: (float64 ``[M, N]``, pairs that lack).

    The definition is that of the op's reference; one sort for each (query, example) serves all targets. phi is taken as
    float32 and bounded as there.
    """
    values = phi.detach().float().clamp(-1e6, 1e6)
    online, raw, pooled = variant == "online", variance == "fixed_raw", None
    if variance != "per_example":
        pooled = _pooled(values, keep, partner, raw)
    scores, num_unscored, least = torch.empty(keep.shape, dtype=torch.float64), 0, 2 if variance == "per_example" else 1
    for at, x, *both in sides(values, keep, partner):
        terms = []
        for k, side in enumerate(both):
            median, _, spread, residual = side.moments()
            count = side.left.double()
            if variance == "shrinkage":
                spread = (PRIOR * pooled[k] + residual) * (count + 1) / ((PRIOR + count) * count.clamp_min(1))
            elif variance != "per_example":
                spread = pooled[k].expand_as(median)
            spread = spread.sqrt() + 1e-30
            terms.append(((x - median) / spread, spread, count))
        (z_in, wide_in, count_in), (z_out, wide_out, count_out) = terms
        score = z_out
        if online:
            score = (z_out.square() - z_in.square()) / 2
            if variance == "shrinkage":
                score = _log_student(z_in, count_in) - _log_student(z_out, count_out)
            score = score + (wide_out / wide_in).log()
        few = (both[1].left < least) | (online & (both[0].left < least))
        num_unscored += int(few.sum())
        scores[:, at] = torch.where(few, 0.0, score).mean(0).T
    return without_backward("lira", scores, phi), num_unscored


def _pooled(phi: Tensor, keep: Tensor, partner: Tensor, raw: bool) -> tuple[Tensor, Tensor]:
    """Variances ``[M]`` pooled over examples and queries, of the side in and the side out of each target."""
    totals = torch.zeros(2, 4, keep.shape[0], dtype=torch.float64)  # count, residual, sum, square
    for _, _, *both in sides(phi, keep, partner):
        for k, side in enumerate(both):
            median, mean, spread, residual = side.moments()
            count = side.left.clamp_min(0).double().expand_as(median)
            some = count > 0
            parts = (count, torch.where(some, residual, 0.0), count * mean, count * (spread + mean.square()))
            totals[k] += torch.stack([part.sum((0, 1)) for part in parts])
    count = totals[:, 0].clamp_min(1)
    return tuple(totals[:, 3] / count - (totals[:, 2] / count).square() if raw else totals[:, 1] / count)


def _log_student(z: Tensor, count: Tensor) -> Tensor:
    freedom = PRIOR + count.clamp_min(0)
    constant = torch.lgamma((freedom + 1) / 2) - torch.lgamma(freedom / 2) - freedom.log() / 2
    return constant - (freedom + 1) / 2 * torch.log1p(z.square() / freedom)


def attack_r(phi: Tensor, keep: Tensor, partner: Tensor) -> Tensor:
    """The share of shadows without the example (target and partner left out) whose phi is at most the target's."""
    scores = torch.empty(keep.shape, dtype=torch.float64)
    for at, x, _, out in sides(phi.detach(), keep, partner):
        at_most = torch.searchsorted(out.ordered, x.contiguous(), right=True)
        at_most = torch.minimum(at_most, out.held.sum(1, keepdim=True))  # infinity fills the other side's part
        at_most -= (out.loses & (x.gather(2, out.lost) <= x)).long()
        share = at_most.double() / out.left.clamp_min(1)
        scores[:, at] = torch.where(out.left > 0, share, 0.0).mean(0).T
    return without_backward("attack_r", scores, phi)
