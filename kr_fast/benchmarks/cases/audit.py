"""Attacks and their statistics against what public audit tools run.

``numpy``: LiRA by its authors' algorithm, target by target, over 4 of the targets. ``outer product``: RMIA's
comparisons in torch, over a share of the examples. ``scikit-learn``: AUC and TPRs from one ROC, without an interval,
which ours has.
``eager`` and ``compiled``: all six signals in torch. Where a provider does a part of the work, its time is
scaled to all of it.
"""

import functools

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from kr_fast.benchmarks.case import Case, Work, attempt, compiled
from kr_fast.membership import roc
from kr_fast.ops.membership.lira import lira
from kr_fast.ops.membership.membership_signals import SIGNALS, membership_signals
from kr_fast.ops.membership.rmia import rmia

EXAMPLES, MODELS, QUERIES, SAMPLED = 10_000, 128, 2, 4
COUNT, POPULATION = 50_000, 25_000
# 10 and 100: rows across lanes; 1000: row by row.
SIGNAL_SHAPES = [(100_000, 10), (100_000, 100), (20_000, 1000)]
RATES = (0.1, 0.01, 0.001, 0.0001)


def shadow_signals() -> tuple[Tensor, Tensor]:
    """phi ``[A, N, M]`` and keep ``[M, N]`` of shadow models that leak."""
    generator = torch.Generator().manual_seed(0)
    keep = torch.rand(MODELS, EXAMPLES, generator=generator).argsort(0).argsort(0) < MODELS // 2
    return torch.randn(QUERIES, EXAMPLES, MODELS, generator=generator) + 2 * keep.T + 5, keep


def numpy_targets(phi: Tensor, keep: Tensor, targets: range) -> np.ndarray:
    """Online, per-example variance, as in the published plot.py: lists by example, medians, scipy's densities.

    All shadows are used, where that code drops those beyond the least count; with NaN in the gaps that would be slower.
    """
    from scipy.stats import norm

    scores, kept = phi.permute(2, 1, 0).double().numpy(), keep.numpy()
    rows = []
    for k in targets:
        others = np.arange(MODELS) != k
        shadows, held = scores[others], kept[others]
        ratio = np.zeros((EXAMPLES, QUERIES))
        for sign, mask in ((1, held), (-1, ~held)):
            by_count: dict[int, list[int]] = {}
            for n in range(EXAMPLES):
                by_count.setdefault(int(mask[:, n].sum()), []).append(n)
            density = np.empty((EXAMPLES, QUERIES))
            for group in by_count.values():
                part = np.array([shadows[mask[:, n], n, :] for n in group])
                density[group] = norm.logpdf(scores[k][group], np.median(part, 1), np.std(part, 1) + 1e-30)
            ratio = ratio + sign * density
        rows.append(ratio.mean(1))
    return np.stack(rows)


def lira_work(provider: str, device: str) -> Work:
    """All targets, each from the others."""
    phi, keep = shadow_signals()
    on_device = phi.to(device), keep.to(device)
    scores = lira(*on_device)[0][:SAMPLED].cpu().numpy()
    targets = range(1 if provider == "kr_fast" else SAMPLED)
    expected = numpy_targets(phi, keep, targets)
    error = float(np.abs(scores[: len(targets)] - expected).max() / np.abs(expected).max())
    if provider == "kr_fast":
        return Work(lambda: lira(*on_device), error)
    return Work(lambda: numpy_targets(phi, keep, targets), 0.0, share=SAMPLED / MODELS)


def ratios(queries: int) -> tuple[Tensor, Tensor]:
    """Likelihood ratios of examples and population, ``[A, n]``, or ``[n]`` for no queries."""
    generator = torch.Generator().manual_seed(0)
    shape = (queries,) if queries else ()
    x, z = (torch.randn(*shape, n, generator=generator).exp() for n in (COUNT, POPULATION))
    return x, z


def outer(x: Tensor, z: Tensor, rows: int) -> Tensor:
    """How many of the population each of the first ``rows`` examples is above."""
    if x.ndim == 1:
        return (x[:rows, None] / z[None] >= 1).sum(1)
    votes = torch.zeros(rows, z.shape[1], dtype=torch.int8)
    for a in range(len(x)):
        votes += x[a, :rows, None] / z[a, None] >= 1
    return (2 * votes > len(x)).sum(1)


def rmia_work(provider: str, queries: int, rows: int) -> Work:
    """Counts of all examples, or of a part of them by the outer product."""
    x, z = ratios(queries)
    if provider == "kr_fast":
        counts = (rmia(x, z)[0][:rows] * POPULATION).round().long()
        return Work(lambda: rmia(x, z), float((counts - outer(x, z, rows)).abs().max()))
    return Work(lambda: outer(x, z, rows), 0.0, share=rows / COUNT)


def scores(ties: bool) -> tuple[Tensor, Tensor]:
    """Scores of an attack, and who is a member."""
    generator = torch.Generator().manual_seed(0)
    members = torch.rand(COUNT, generator=generator) < 0.5
    drawn = torch.randn(COUNT, dtype=torch.float64, generator=generator) + 0.5 * members
    return (drawn * 100).round() if ties else drawn, members


def curve(values: Tensor, members: Tensor) -> tuple[float, list[float], object]:
    """AUC, TPR and the AUC's interval."""
    found = roc(values, members)
    return found.auc, [found.tpr_at(fpr)["tpr"] for fpr in RATES], found.auc_interval()


def sklearns(values: np.ndarray, members: np.ndarray) -> tuple[float, list[float]]:
    """AUC and TPR."""
    from sklearn.metrics import auc, roc_curve

    fpr, tpr, _ = roc_curve(members, values, drop_intermediate=False)  # roc_auc_score would sort once more
    return auc(fpr, tpr), [tpr[np.searchsorted(fpr, at, side="right") - 1] for at in RATES]


def roc_work(provider: str, ties: bool) -> Work:
    """The same scores for both."""
    values, members = scores(ties)
    plain = values.numpy(), members.numpy()
    if provider != "kr_fast":
        return Work(lambda: sklearns(*plain), 0.0)
    (auc, rates, _), (other_auc, others) = curve(values, members), sklearns(*plain)
    error = max(abs(auc - other_auc), *(abs(a - b) for a, b in zip(rates, others, strict=True)))
    return Work(lambda: curve(values, members), float(error))


def eager_signals(logits: Tensor, labels: Tensor) -> list[Tensor]:
    """What a script would write, with the care for digits where p is near 1 that the definition asks for."""
    at, log_p = labels[:, None], logits.log_softmax(1)
    p = log_p.exp()
    phi = logits.gather(1, at)[:, 0] - logits.scatter(1, at, float("-inf")).logsumexp(1)
    loss, first = F.softplus(-phi), logits.argmax(1, keepdim=True)
    rest = torch.log1p(-p.clamp_max(0.5))
    rest = rest.scatter(1, first, log_p.scatter(1, first, float("-inf")).logsumexp(1, keepdim=True))
    others = (p * rest).scatter(1, at, 0.0).sum(1)
    modified = (1 - p.gather(1, at)[:, 0]) * loss - others
    return [phi, loss, -(p * log_p).sum(1), modified, (-loss).exp(), (first == at)[:, 0].to(logits.dtype)]


def signals_work(provider: str, shape: tuple[int, int], device: str) -> Work:
    """All six signals of the same logits."""
    torch.manual_seed(0)
    logits, labels = (3 * torch.randn(shape)).to(device), torch.randint(0, shape[1], shape[:1]).to(device)
    if provider == "kr_fast":
        call = lambda *tensors: list(membership_signals(*tensors, SIGNALS).values())  # noqa: E731
    else:
        call = eager_signals if provider == "eager" else compiled(eager_signals)
    found = attempt(lambda: call(logits, labels)) if provider == "compiled" else call(logits, labels)
    error = 0.0
    for value, exact in zip(found, eager_signals(logits.double(), labels), strict=True):
        error = max(error, float(((value.double() - exact).abs() / (exact.abs() + 10)).max()))
    return Work(lambda: call(logits, labels), error)


def cases(device: str) -> list[Case]:
    """Attacks, statistics and signals."""
    found = []
    for shape in SIGNAL_SHAPES:
        providers = {
            name: functools.partial(signals_work, name, shape, device) for name in ("kr_fast", "eager", "compiled")
        }
        moved = 4 * shape[0] * (shape[1] + len(SIGNALS)) + 8 * shape[0]
        found.append(Case(f"membership_signals {shape[0]}x{shape[1]} {device}", providers, 1e-4, moved, device))
    named = f"lira N={EXAMPLES} M={MODELS} A={QUERIES} {device}"
    providers = {name: functools.partial(lira_work, name, device) for name in ("kr_fast", "numpy")}
    found.append(Case(named, providers, 1e-9, device=device))
    if device != "cpu":
        return found
    for queries, rows in ((0, 2000), (2, 2000), (18, 500)):
        providers = {name: functools.partial(rmia_work, name, queries, rows) for name in ("kr_fast", "outer product")}
        found.append(Case(f"rmia N={COUNT} Z={POPULATION} A={max(queries, 1)}", providers, 0.0))
    for ties in (False, True):
        providers = {name: functools.partial(roc_work, name, ties) for name in ("kr_fast", "scikit-learn")}
        found.append(Case(f"roc N={COUNT} {'ties' if ties else 'distinct'}", providers, 1e-12))
    return found
