"""Membership scores, higher for members, from signals of target and shadow models.

Every attack takes the shadows' signals ``[A, N, M]`` and ``keep [M, N]``, and scores the M models leave-one-out
(``target=None``: float64 ``[M, N]``) or models outside (``target [A, N, K]``: ``[K, N]``). From phi the log-likelihood
is ``ln p_y = -ln(1 + exp(-phi))``, which does not saturate. Tensors, numpy arrays and lists are taken; ``keep`` may be
of 0 and 1.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import softplus

from kr_fast.membership.inputs.answers import as_numbers
from kr_fast.membership.inputs.shadow_sets import ShadowStatistics, by_model, population_of, taken
from kr_fast.membership.statistics import balanced
from kr_fast.ops.membership import lira as ops_lira
from kr_fast.ops.membership.attack_r import attack_r as ops_attack_r
from kr_fast.ops.membership.best_threshold import best_threshold
from kr_fast.ops.membership.rmia import rmia as ops_rmia
from kr_fast.runtime.errors import fail
from kr_fast.runtime.inputs import as_labels, as_mask, as_tensor, described
from kr_fast.runtime.log import logger

NO_EVIDENCE = 0.0
BOUND = 1e6  # what an infinite signal counts as, where a number is needed


def lira(
    phi: Tensor,
    keep: Tensor,
    *,
    variant: str = "online",
    variance: str = "per_example",
    target: Tensor | None = None,
    partner: Tensor | None = None,
) -> Tensor:
    """Likelihood-ratio attack: scores of every target, float64 ``[M, N]`` (or ``[K, N]`` for outside targets).

    Online: ``ln N(phi; mu_in, s_in) - ln N(phi; mu_out, s_out)``; offline: ``(phi - mu_out) / s_out``, which ranks as
    the one-sided test of the paper does and does not saturate. Averaged over the A queries. ``mu`` is the median of
    the shadows that held (did not hold) the example, as in the authors' code. A pair without enough shadows scores 0
    and is counted in a log line.

    Variances, all of population form:

    - "per_example": of the same shadows. The paper's choice from 64 shadows on.
    - "fixed": one for all examples, pooled over the distances from each example's own median (better below about 64
      shadows).
    - "fixed_raw": one for all examples, of all values on a side together, spread between examples included: the paper's
      text for few shadows.
    - "shrinkage": posterior of an inverse-gamma prior in which the "fixed" variance counts as 8 shadows; Student-t
      densities, wider by ``1 + 1/n`` for the uncertain centre. No switch between few and many shadows.

    The reference code's own fixed variance (that of members for both sides) is :func:`lira_carlini2021`.

    Args:
        phi: ``[A, N, M]`` float, from :func:`kr_fast.ops.membership.membership_signals.membership_signals`.
        keep: ``[M, N]`` bool, True where the example was in the model's training set.
        variant: "online" or "offline".
        variance: see above.
        target: ``[A, N, K]`` signals of models outside ``phi``; None scores each of the M models leave-one-out.
        partner: int64 ``[M, N]`` of :func:`kr_fast.membership.partners`: beside each model that is scored a shadow of
            the other side is left out, so that scores which know nothing have an AUC of 0.5; None: the model only.
    Raises: TypeError or ValueError naming the argument.
    Source: Carlini et al., "Membership Inference Attacks From First Principles", S&P 2022, algorithm 1.
    """
    phi, keep = as_numbers("lira", "phi", phi), as_mask("lira", "keep", keep, 2)
    target = None if target is None else as_numbers("lira", "target", target)
    if partner is None:
        scores, num_unscored = ops_lira.lira(phi, keep, variant=variant, variance=variance, target=target)
    else:
        ops_lira.check_arguments(phi, keep, variant, variance, target)
        partner = _partner_of("lira", keep, partner, target)
        scores, num_unscored = balanced.lira(phi, keep, partner, variant=variant, variance=variance)
    if num_unscored:
        logger.warning("lira: %d (target, example) pairs have too few shadows on a side and score 0", num_unscored)
    return scores


def lira_carlini2021(
    phi: Tensor, keep: Tensor, *, variant: str = "online", fix_variance: bool = False, target: Tensor | None = None
) -> Tensor:
    """The published code's scores with its quirks, to the bit, for comparison with tables made by it.

    Shadows beyond the smallest count over all examples are dropped in model order. The fixed variance is that of all
    values kept, spread between examples included; online it is that of the members and serves *both* sides. Offline is
    the two-sided density ``-ln N(phi; mu_out, s_out)``, which also takes very low values for members. Same operations
    in the same order as there, on float64 ``[model, example, query]``; slow, target by target. That code also ran
    networks on batch statistics: ``bn="batch"`` of :class:`kr_fast.ModelArray`, and took the TPR where ``fpr < 0.001``:
    ``rule="<"`` of :meth:`kr_fast.membership.Curve.tpr_at`.

    Args:
        phi, keep, variant, target: as of :func:`lira`.
        fix_variance: one standard deviation for all examples.
    Returns: float64 ``[M or K, N]`` on the CPU.
    Raises: TypeError or ValueError naming the argument; where an example has no shadow on a side.
    Source: the ``plot.py`` published with Carlini et al., S&P 2022.
    """
    from scipy.stats import norm

    where = "lira_carlini2021"
    phi, keep, target = taken(where, phi, keep, target)
    if variant not in ops_lira.VARIANTS:
        fail(where, "variant", f"be one of {', '.join(ops_lira.VARIANTS)}", variant)
    scores, held = phi.double().permute(2, 1, 0).cpu().numpy(), keep.cpu().numpy()
    seen = scores if target is None else target.double().permute(2, 1, 0).cpu().numpy()
    rows = []
    for k, x in enumerate(seen):
        others = np.arange(len(held)) != k if target is None else np.full(len(held), True)

        def side(mask: np.ndarray, others=others) -> np.ndarray:
            """``[N, count, A]``: the first shadows under the mask, as many as every example has."""
            least = int(mask.sum(0).min())
            if least == 0:
                fail(where, "keep", "leave every example a shadow on each side", 0)
            first = np.argsort(~mask, axis=0, kind="stable")[:least]
            chosen = scores[others][first, np.arange(mask.shape[1])]
            return np.ascontiguousarray(chosen.transpose(1, 0, 2))

        def log_density(values: np.ndarray, spread: np.ndarray, x=x) -> np.ndarray:
            return norm.logpdf(x, np.median(values, 1), spread + 1e-30)

        out = side(~held[others])
        inside = side(held[others]) if variant == "online" else out
        spread_in = np.std(inside) if fix_variance else np.std(inside, 1)
        spread_out = spread_in if fix_variance else np.std(out, 1)
        score = -log_density(out, spread_out)
        if variant == "online":
            score = log_density(inside, spread_in) + score
        rows.append(score.mean(1))
    return torch.from_numpy(np.stack(rows))


def query_mean(signal: Tensor) -> Tensor:
    """Mean over the first axis, in float64; infinities stay what they are, but where both are met."""
    mean = signal.double().mean(0)
    both = mean.isnan()
    return torch.where(both, signal.double().clamp(-BOUND, BOUND).mean(0), mean) if bool(both.any()) else mean


def log_likelihood(phi: Tensor) -> Tensor:
    """``ln p_y`` from phi, in float64."""
    return -softplus(-phi.double())


def rmia(
    phi: Tensor,
    keep: Tensor,
    population: Tensor,
    *,
    gamma: float = 1.0,
    offline_a: float | None = None,
    predicate: str = "ratio",
    target: Tensor | None = None,
    target_population: Tensor | None = None,
    partner: Tensor | None = None,
) -> Tensor:
    """Robust membership inference: the share of population examples z that x dominates, ties broken by ln of its ratio.

    ``Pr(x) = (mean_in p + mean_out p) / 2`` online; offline, from shadows that did not hold x,
    ``Pr(x) = ((1 + a) mean_out p + 1 - a) / 2``. Several queries vote.

    Args:
        phi: ``[A, N, M]`` shadows' signals; keep: ``[M, N]``; target: ``[A, N, K]`` or None (leave-one-out).
        population: ``[A, Z, M]`` shadows' signals of examples that no model was trained on.
        gamma: > 0, how clearly x has to dominate.
        offline_a: ``a`` in [0, 1] of the offline form, None for online.
        predicate: when x dominates z, see :func:`kr_fast.membership.rmia`.
        target_population: ``[A, Z, K]`` of the outside targets.
        partner: as of :func:`lira`.
    Returns: float64: count of z plus a tie breaker in (0, 1).
    Raises: UserError naming the argument.
    Source: Zarifzadeh, Liu and Shokri, "Low-Cost High-Power Membership Inference Attacks", ICML 2024.
    """
    phi, keep, target = taken("rmia", phi, keep, target)
    if offline_a is not None and not 0 <= offline_a <= 1:
        fail("rmia", "offline_a", "be in [0, 1]", offline_a)
    population = population_of("rmia", "population", population, len(phi), phi.shape[2])
    if (target is None) != (target_population is None):
        given = "nothing" if target_population is None else described(target_population)
        fail("rmia", "target_population", "be given with target, and only with it", given)
    if target is not None:
        sizes = (len(phi), target.shape[2], population.shape[1])
        target_population = population_of("rmia", "target_population", target_population, *sizes)
    partner = _partner_of("rmia", keep, partner, target)
    p_target = None if target is None else log_likelihood(target).exp()
    data = ShadowStatistics(log_likelihood(phi).exp(), keep, p_target, partner)
    p_z = log_likelihood(population).exp()
    total_z, models, size = p_z.sum(2), p_z.shape[2], p_z.shape[1]
    own_z = by_model(p_z if target is None else log_likelihood(target_population).exp())
    rows = []
    for k in range(data.targets):
        mean_in, mean_out = data.means(k)
        if offline_a is None:
            alone = torch.nan_to_num(mean_in, 0) + torch.nan_to_num(mean_out, 0)
            prior = torch.where(data.lacks(k)[None], alone, (mean_in + mean_out) / 2)
        else:
            prior = ((1 + offline_a) * mean_out + 1 - offline_a) / 2
        mean_z = (total_z - own_z[k]) / (models - 1) if target is None else total_z / models
        if offline_a is not None:
            mean_z = ((1 + offline_a) * mean_z + 1 - offline_a) / 2
        tiny = torch.finfo(torch.float64).tiny
        ratio_x = (data.value(k) / prior.clamp_min(tiny)).nan_to_num(nan=1.0)
        ratio_z = own_z[k] / mean_z.clamp_min(tiny)
        single = len(phi) == 1
        fraction, log_ratio = ops_rmia(
            ratio_x[0] if single else ratio_x,
            ratio_z[0] if single else ratio_z,
            gamma=gamma,
            predicate=predicate,
        )
        rows.append(_with_tie_breaker((fraction * size).round(), log_ratio))
    return torch.stack(rows)


def base(
    phi: Tensor,
    keep: Tensor,
    *,
    variant: str = "online",
    target: Tensor | None = None,
    partner: Tensor | None = None,
) -> Tensor:
    """``ln p_target - ln mean_shadows p``: the loss with the example's difficulty taken off, averaged over queries.

    Online takes all shadows, offline those that did not hold the example. Its ranking is that of RMIA with infinitely
    many population examples.

    Args: ``phi``, ``keep``, ``variant``, ``target`` and ``partner`` as of :func:`lira`.
    Returns: float64 ``[K, N]``. Raises: UserError naming the argument.
    Source: Lassila et al., "Practical Bayes-Optimal Membership Inference Attacks", NeurIPS
    2025.
    """
    phi, keep, target = taken("base", phi, keep, target)
    if variant not in ops_lira.VARIANTS:
        fail("base", "variant", f"be one of {', '.join(ops_lira.VARIANTS)}", variant)
    partner = _partner_of("base", keep, partner, target)
    log_p = log_likelihood(phi)
    data = ShadowStatistics(log_p.exp(), keep, None if target is None else log_likelihood(target).exp(), partner)
    rows = []
    for k in range(data.targets):
        mean = data.mean_all(k) if variant == "online" else data.means(k)[1]
        own = log_p[:, :, k] if target is None else log_likelihood(target[:, :, k])
        score = own - mean.clamp_min(torch.finfo(torch.float64).tiny).log()
        rows.append(score.nan_to_num(nan=NO_EVIDENCE).mean(0))
    return torch.stack(rows)


def attack_r(phi: Tensor, keep: Tensor, *, target: Tensor | None = None, partner: Tensor | None = None) -> Tensor:
    """Attack-R: on how many shadows that did not hold the example its loss is no smaller; ties by the distance.

    Averaged over queries.

    Args: ``phi``, ``keep``, ``target`` and ``partner`` as of :func:`lira`.
    Returns: float64 ``[K, N]``, in [0, 1] but for the tie breaker, which is below 1e-6.
    Source: Ye et al., "Enhanced Membership Inference Attacks Against Machine Learning Models", CCS 2022.
    """
    phi, keep, target = taken("attack_r", phi, keep, target)
    x = query_mean(phi if target is None else target).T
    partner = _partner_of("attack_r", keep, partner, target)
    share = ops_attack_r(phi, keep, target=target) if partner is None else balanced.attack_r(phi, keep, partner)
    return share + 1e-6 * torch.sigmoid(x / 8)


def attack_p(target: Tensor, population: Tensor) -> Tensor:
    """Attack-P: the share of population examples whose phi is no larger: the loss on a scale of p-values.

    Args:
        target: ``[A, N, K]``; population: ``[A, Z, K]``, the same models on examples that are no members.
    Returns: float64 ``[K, N]``. Ranks as the loss does. Source: Ye et al., CCS 2022.
    Raises: UserError naming the argument.
    """
    target = as_numbers("attack_p", "target", target)
    if target.ndim != 3 or bool(torch.isnan(target).any()):
        fail("attack_p", "target", "be float [A, N, K] without NaN", described(target))
    population = population_of("attack_p", "population", population, len(target), target.shape[2])
    ordered = population.double().permute(0, 2, 1).contiguous().sort(2).values
    at_most = torch.searchsorted(ordered, target.double().permute(0, 2, 1).contiguous(), right=True)
    return (at_most.double() / population.shape[1]).mean(0)


def threshold_per_class(signal: Tensor, keep: Tensor, labels: Tensor, *, target: Tensor | None = None) -> Tensor:
    """A signal (higher for members) minus the threshold of the example's class, which the shadows choose.

    The threshold of a class is the one of best balanced accuracy on all shadows (but the target); 0 or more means
    member. Averaged over queries. Pass phi, confidence, or entropies with their sign turned.
    Source: Song and Mittal, "Systematic Evaluation of Privacy Risks of Machine Learning Models", USENIX Security 2021.

    Args:
        signal: ``[A, N, M]``; keep: ``[M, N]``; labels: integers ``[N]``; target: ``[A, N, K]`` or None.
    """
    signal, keep, target = taken("threshold_per_class", signal, keep, target)
    labels = as_labels("threshold_per_class", "labels", labels, signal.shape[1])
    # A distance from an infinite threshold is no number.
    values = query_mean(signal).clamp(-BOUND, BOUND)
    seen = values if target is None else query_mean(target).clamp(-BOUND, BOUND)
    rows, held = torch.empty(seen.shape[1], len(labels), dtype=torch.float64), keep.T
    for label in labels.unique():
        at = (labels == label).nonzero()[:, 0]
        cut = best_threshold(values[at], held[at], leave_out=target is None)
        for k in cut.isnan().nonzero()[:, 0].tolist():  # members alone, or others alone: nothing to choose by
            others = torch.arange(keep.shape[0]) != (k if target is None else -1)
            cut[k] = values[at][:, others].median()
        rows[:, at] = (seen[at] - cut).T
    return rows


def label_only(correct: Tensor, keep: Tensor, *, target: Tensor | None = None, partner: Tensor | None = None) -> Tensor:
    """How many of the A queries (augmentations) are classified right, beyond what shadows without the example manage.

    Args:
        correct: ``[A, N, M]`` of 0 and 1, the signal "correct"; keep, target, partner as elsewhere.
    Source: Choquette-Choo et al., "Label-Only Membership Inference Attacks", ICML 2021.
    """
    correct, keep, target = taken("label_only", correct, keep, target)
    partner = _partner_of("label_only", keep, partner, target)
    data = ShadowStatistics(correct.double(), keep, None if target is None else target.double(), partner)
    rows = [(data.value(k) - data.means(k)[1]).nan_to_num(nan=NO_EVIDENCE).mean(0) for k in range(data.targets)]
    return torch.stack(rows)


def _partner_of(where: str, keep: Tensor, partner: Any, target: Tensor | None) -> Tensor | None:
    """The partners as a tensor that fits ``keep``; None without any."""
    if partner is None:
        return None
    partner = as_tensor(where, "partner", partner)
    if target is not None:
        fail(where, "partner", "be left out where target is given: nothing is left out then", list(partner.shape))
    balanced.check_partners(where, keep, partner)
    return partner


def _with_tie_breaker(count: Tensor, value: Tensor) -> Tensor:
    """Integer counts in their order, equal ones in the order of ``value``: its rank moves them by less than 1."""
    _, rank = value.unique(return_inverse=True)
    return count + rank.double() / (len(value) + 1)
