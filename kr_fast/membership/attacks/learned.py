"""Attacks that learn from shadows: Shokri's attack network, quantile regression. By scikit-learn."""

import numpy as np
import torch
from torch import Tensor

from kr_fast.membership.inputs.answers import as_numbers
from kr_fast.membership.inputs.shadow_sets import taken
from kr_fast.runtime.errors import fail

THREADED_FROM = 1_000_000  # features of all rows: below it threads wait for each other longer than they compute
MOST_ROWS = 50_000  # of training data for an attack model: more changes little and costs minutes


def shadow_network(
    features: Tensor,
    keep: Tensor,
    *,
    target: Tensor | None = None,
    targets: tuple[int, ...] | None = None,
    partner: Tensor | None = None,
    seed: int = 0,
) -> Tensor:
    """Shokri's attack: a network learns from the shadows what a member's answer looks like, and judges the target's.

    Args:
        features: ``[N, M, F]`` of each (example, shadow): sorted log-probabilities, entropy, one-hot label, ...
        keep: ``[M, N]`` bool.
        target: ``[N, K, F]`` of outside models; None attacks shadows, each with a network that never saw it.
        targets: which shadows when ``target`` is None; each costs a training. None means all.
        partner: int64 ``[M, N]``, left out of the training with each target: see :func:`kr_fast.membership.partners`.
        seed: of the network's initialisation and of the rows it learns from.
    Returns: float64 ``[K, N]``, log-odds of membership. Raises: UserError naming the argument.
    Source: Shokri et al., "Membership Inference Attacks Against Machine Learning Models", S&P 2017.
    """
    from sklearn.neural_network import MLPClassifier
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    features = as_numbers("shadow_network", "features", features)
    if features.ndim != 3 or 0 in features.shape:
        fail("shadow_network", "features", "have shape [N, M, F]", list(features.shape))
    if target is not None:
        target = as_numbers("shadow_network", "target", target)
        if target.ndim != 3 or target.shape[::2] != features.shape[::2]:
            rule = f"have shape [{len(features)}, K, {features.shape[2]}]"
            fail("shadow_network", "target", rule, list(target.shape))
    keep = taken("shadow_network", features[None, :, :, 0], keep, None)[1]
    for name, value in (("features", features), ("target", target)):
        if value is not None and not bool(torch.isfinite(value).all()):
            fail("shadow_network", name, "be finite", "NaN or inf")

    def fit(models: Tensor, without: Tensor | None = None):
        rows, held = features[:, models].flatten(0, 1), keep[models].T.flatten().numpy()
        if without is not None:
            there = (models[None] != without[:, None]).flatten()
            rows, held = rows[there], held[there.numpy()]
        rows = rows.double().numpy()
        rng = np.random.default_rng(seed)
        chosen = rng.permutation(len(rows))[:MOST_ROWS]
        if not 0 < held[chosen].sum() < len(chosen):
            fail("shadow_network", "keep", "hold members and non-members", f"{int(held.sum())} of {len(held)}")
        network = MLPClassifier((64,), max_iter=60, early_stopping=True, random_state=seed)
        return make_pipeline(StandardScaler(), network).fit(rows[chosen], held[chosen])

    def predict(model, rows: Tensor) -> Tensor:
        p = model.predict_proba(rows.double().numpy())[:, 1].clip(1e-12, 1 - 1e-12)
        return torch.from_numpy(np.log(p) - np.log1p(-p))

    models = torch.arange(keep.shape[0])
    if target is not None:
        network = fit(models)
        return torch.stack([predict(network, target[:, k]) for k in range(target.shape[1])])
    scored = range(len(models)) if targets is None else targets
    without = [None] * len(models) if partner is None else partner
    return torch.stack([predict(fit(models[models != k], without[k]), features[:, k]) for k in scored])


def quantile_regression(
    phi: Tensor, keep: Tensor, features: Tensor, *, level: float = 0.9, target: Tensor | None = None, seed: int = 0
) -> Tensor:
    """How far phi lies above what is expected of such an example when it is no member, in units of that spread.

    Gradient-boosted quantile regressions of phi on the features of the example, fitted on shadows that did not hold it:
    ``(phi - q_50(x)) / (q_level(x) - q_50(x))``. An example is predicted by a regression that was not fitted on it (two
    folds).

    Args:
        phi: ``[A, N, M]``; keep: ``[M, N]``; target: ``[A, N, K]``, or None to score the shadows (their own phi is then
            among some 1/M of the training rows of the *other* fold only).
        features: float ``[N, F]`` of the examples: pixels, an embedding, one-hot labels.
        level: upper quantile, in (0.5, 1).
        seed: of the folds and the regressions.
    Returns: float64 ``[M or K, N]``. Raises: UserError naming the argument.
    Source: Bertran et al., "Scalable Membership Inference Attacks via Quantile Regression", NeurIPS 2023.
    """
    from sklearn.ensemble import HistGradientBoostingRegressor
    from threadpoolctl import threadpool_limits

    phi, keep, target = taken("quantile_regression", phi, keep, target)
    features = as_numbers("quantile_regression", "features", features)
    if features.ndim != 2 or len(features) != phi.shape[1]:
        fail("quantile_regression", "features", f"have shape [{phi.shape[1]}, F]", list(features.shape))
    if not 0.5 < level < 1:
        fail("quantile_regression", "level", "be in (0.5, 1)", level)
    values = phi.double().mean(0).numpy()  # [N, M]
    inputs, out = features.double().numpy(), ~keep.T.numpy()
    rng = np.random.default_rng(seed)
    fold = rng.permutation(len(inputs)) % 2
    quantiles = {q: np.empty(len(inputs)) for q in (0.5, level)}
    for side in (0, 1):
        examples, models = np.nonzero(out & (fold != side)[:, None])
        if len(examples) == 0:
            fail("quantile_regression", "keep", "leave non-members in both folds", 0)
        chosen = rng.permutation(len(examples))[:MOST_ROWS]
        rows, responses = inputs[examples[chosen]], values[examples[chosen], models[chosen]]
        with threadpool_limits(1 if rows.size < THREADED_FROM else None, user_api="openmp"):
            for q in quantiles:
                model = HistGradientBoostingRegressor(loss="quantile", quantile=q, max_iter=60, random_state=seed)
                quantiles[q][fold == side] = model.fit(rows, responses).predict(inputs[fold == side])
    middle, spread = quantiles[0.5], quantiles[level] - quantiles[0.5]
    spread = np.maximum(spread, 1e-3 * max(float(values.std()), 1e-12))
    seen = values.T if target is None else target.double().mean(0).numpy().T
    return torch.from_numpy((seen - middle) / spread)
