"""Membership signals, attacks and ROC in plain torch: the definitions."""

import torch
from torch import Tensor

from kr_fast.backends.codes import LIRA_PRIOR
from kr_fast.backends.registry import kernel, never
from kr_fast.ops.sampling.reference import philox_words


@kernel("membership_signals", "reference", refuses=never)
def membership_signals(logits: Tensor, labels: Tensor, want: tuple[str, ...]) -> list[Tensor]:
    """Float64 statistics of each row, in the order of ``want``."""
    z = logits.double()
    z_y = z.gather(1, labels[:, None])
    others = z.scatter(1, labels[:, None], float("-inf"))
    phi = z_y[:, 0] - others.logsumexp(1)
    log_p = z.log_softmax(1)
    p = log_p.exp()
    # ln(1 - p_j): only the largest class can have p_j > 1/2; there from the others, so that it keeps its digits.
    top = z.argmax(1, keepdim=True)
    rest = torch.log1p(-p.clamp_max(0.5))
    rest = rest.scatter(1, top, log_p.scatter(1, top, float("-inf")).logsumexp(1, keepdim=True))
    at_label = torch.zeros_like(z, dtype=torch.bool).scatter(1, labels[:, None], True)
    loss = torch.nn.functional.softplus(-phi)
    modified = (1 - p.gather(1, labels[:, None])[:, 0]) * loss - torch.where(at_label | (p == 0), 0, p * rest).sum(1)
    signals = {
        "phi": phi,
        "loss": loss,
        "entropy": -torch.where(p == 0, 0, p * log_p).sum(1),
        "modified_entropy": modified,
        "confidence": (-loss).exp(),
        "correct": (z.argmax(1) == labels).double(),
    }
    return [signals[name] for name in want]


def _centre_and_spread(values: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(count, median, population standard deviation) over the last axis of the values under the mask."""
    count = mask.sum(-1)
    inside = values.masked_fill(~mask, float("nan"))
    median = inside.nanquantile(0.5, dim=-1)
    mean = inside.nanmean(-1, keepdim=True)
    return count, median, (inside - mean).square().nanmean(-1).sqrt()


def _log_student(x: Tensor, count: Tensor, median: Tensor, scale: Tensor) -> Tensor:
    return (
        torch.distributions.StudentT(LIRA_PRIOR + count.double(), validate_args=False).log_prob((x - median) / scale)
        - scale.log()
    )


@kernel("lira", "reference", refuses=never)
def lira(phi: Tensor, keep: Tensor, target: Tensor | None, online: bool, variance: str) -> tuple[Tensor, int]:
    """(scores [targets, N], pairs that lack shadows): target by target, each against the other models."""
    phi = phi.double()
    models = phi.shape[2]
    rows, num_unscored = [], 0
    for k in range(models if target is None else target.shape[2]):
        others = torch.arange(models) != k if target is None else torch.ones(models, dtype=torch.bool)
        value = phi[:, :, k] if target is None else target[:, :, k].double()
        shadows, members = phi[:, :, others], keep[others].bool().T.expand(phi.shape[0], -1, -1)
        sides = []
        for mask in (members, ~members):
            count, median, spread = _centre_and_spread(shadows, mask)
            residual = (shadows - median[:, :, None]).square().masked_fill(~mask, 0).nan_to_num()
            within = residual.sum() / mask.sum().clamp_min(1)
            if variance == "fixed":
                spread = within.sqrt().expand_as(median)
            if variance == "fixed_raw":
                spread = shadows[mask].std(correction=0).nan_to_num().expand_as(median)
            if variance == "shrinkage":  # the pooled variance counts as so many shadows
                total, weight = LIRA_PRIOR * within + residual.sum(-1), LIRA_PRIOR + count.double()
                spread = (total / weight * (1 + 1 / count.double())).sqrt()
            sides.append((count, median, spread + 1e-30))
        (count_in, mean_in, std_in), (count_out, mean_out, std_out) = sides
        score = (value - mean_out) / std_out
        if online:
            z_in = (value - mean_in) / std_in
            score = (score.square() - z_in.square()) / 2 + std_out.log() - std_in.log()
            if variance == "shrinkage":
                sides = ((value, *side) for side in sides)
                score = -torch.stack([_log_student(*side) for side in sides]).diff(dim=0)[0]
        least = 2 if variance == "per_example" else 1
        few = (count_out < least) | (online & (count_in < least))
        num_unscored += int(few[0].sum())
        rows.append(torch.where(few, 0.0, score).mean(0))
    return torch.stack(rows), num_unscored


@kernel("roc", "reference", refuses=never)
def roc(scores: Tensor, members: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(thresholds, tp, fp) at each distinct score, from high to low."""
    thresholds = scores.unique().flip(0)
    at_or_above = scores[None, :] >= thresholds[:, None]
    inside = members.bool()
    return thresholds, (at_or_above & inside).sum(1), (at_or_above & ~inside).sum(1)


@kernel("bootstrap_auc", "reference", refuses=never)
def bootstrap_auc(inside: Tensor, outside: Tensor, limits: Tensor, replicates: int, seed: int) -> tuple[Tensor, Tensor]:
    """Replicate by replicate: draw items, count those of each distinct score, walk the ROC."""
    aucs, hits = [], []
    for replicate in range(replicates):
        sides = []
        for side, counts in enumerate((inside, outside)):
            total = int(counts.sum())
            counter = (
                torch.arange((total + 3) // 4),
                *(torch.full(((total + 3) // 4,), c) for c in (side, replicate, 0)),
            )
            words = torch.stack(philox_words(counter, seed), 1).flatten()[:total]
            group = torch.repeat_interleave(torch.arange(len(counts)), counts)[words * total >> 32]
            sides.append(torch.bincount(group, minlength=len(counts)))
        tp, fp = (side.cumsum(0) for side in sides)
        twice = int((sides[1] * (2 * tp - sides[0])).sum())
        aucs.append(twice / (2 * int(tp[-1]) * int(fp[-1])))
        hits.append([int(tp[fp <= limit].max()) if bool((fp <= limit).any()) else 0 for limit in limits])
    return torch.tensor(aucs, dtype=torch.float64), torch.tensor(hits, dtype=torch.int64).view(replicates, len(limits))


@kernel("rmia", "reference", refuses=never)
def rmia(p_x: Tensor, p_z: Tensor, gamma: float, predicate: str) -> Tensor:
    """How many z a strict majority of the queries finds dominated, x by x."""

    def dominates(x: Tensor) -> Tensor:
        if predicate == "reciprocal":
            return x * (1 / z) > gamma
        return x / z >= gamma if predicate == "ratio" else x / z > gamma

    x, z = p_x.view(-1, p_x.shape[-1]), p_z.view(-1, p_z.shape[-1])
    votes = [dominates(x[:, n, None]).sum(0) for n in range(x.shape[1])]
    return torch.tensor([int((2 * vote > len(x)).sum()) for vote in votes], dtype=torch.int64, device=p_x.device)


@kernel("attack_r", "reference", refuses=never)
def attack_r(phi: Tensor, keep: Tensor, target: Tensor | None) -> Tensor:
    """Target by target: the share of the models without the example that are at most the target's."""
    rows = []
    for k in range(phi.shape[2] if target is None else target.shape[2]):
        out = ~keep.T
        if target is None:
            out = out & (torch.arange(phi.shape[2]) != k)
        x = (phi if target is None else target)[:, :, k, None]
        rows.append((((phi <= x) & out).sum(2) / out.sum(1).clamp_min(1)).double().mean(0))
    return torch.stack(rows) if rows else torch.empty(0, phi.shape[1], dtype=torch.float64)


@kernel("best_threshold", "reference", refuses=never)
def best_threshold(values: Tensor, members: Tensor, leave_out: bool) -> Tensor:
    """Target by target: every distinct value of the others is tried."""
    cuts = []
    for k in range(values.shape[1] if leave_out else 1):
        others = torch.arange(values.shape[1]) != (k if leave_out else -1)
        value, member = values[:, others].flatten() + 0.0, members[:, others].flatten()
        if not 0 < int(member.sum()) < len(member):
            cuts.append(float("nan"))
            continue
        thresholds, tp, fp = roc(value, member)
        gain = tp.double() / int(member.sum()) - fp.double() / int((~member).sum())
        cuts.append(float(thresholds[int((gain == gain.max()).nonzero()[0])]))
    return torch.tensor(cuts, dtype=torch.float64)
