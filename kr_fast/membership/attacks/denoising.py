"""The attack on a diffusion model's weights: how well it takes noise off an image that it may have been trained on."""

import numbers
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from kr_fast.membership.attacks.blind import image_features, ridge
from kr_fast.membership.attacks.scores import lira
from kr_fast.membership.inputs.answers import as_numbers
from kr_fast.ops.sampling.philox_normal import philox_normal
from kr_fast.runtime import seeds
from kr_fast.runtime.errors import fail
from kr_fast.runtime.inputs import as_images, as_integer, as_labels, as_mask, as_tensor, described
from kr_fast.runtime.progress import bar
from kr_fast.runtime.storage.image_rows import ImageRows, Images

OBJECTIVES = ("flow", "epsilon", "v_prediction")
LEVELS, DRAWS = (0.1, 0.2, 0.3), 4
FLOW_STEPS = 1000  # training timesteps of diffusers' flow-matching schedulers
FOLDS = 5

Weights = tuple[float, float]  # of image and noise


def denoising_errors(
    network: Callable[..., Any],
    images: Images,
    labels: Tensor | None,
    *,
    objective: str,
    prepare: Callable[[Tensor], Tensor] | None = None,
    alphas_cumprod: Tensor | None = None,
    levels: Sequence[float] = LEVELS,
    draws: int = DRAWS,
    seed: int = 0,
    micro_batch: int = 256,
    description: str | None = None,
) -> Tensor:
    """Mean squared error of a diffusion network on each image by noise level: low where it was trained on the image.

    ``e_s(x) = mean over draws and elements of (network(z, t, class_labels=y) - target)^2``. The noise ``n`` is
    :func:`kr_fast.philox_normal` of (seed, row, level and draw), the same for every network. With

    - "flow": ``z = (1 - s) x + s n``, ``target = n - x``, ``t = 1000 s``;
    - "epsilon": ``z = sqrt(a) x + sqrt(1 - a) n``, ``target = n``, ``t = floor(s T)``, ``a = alphas_cumprod[t]``;
    - "v_prediction": z, t and a likewise, ``target = sqrt(a) n - sqrt(1 - a) x``.

    All images of a call have one t, so that a network which went through :func:`kr_fast.optimize` computes its
    conditioning once a class. Squares are taken in float32 and averaged in float64.

    Args:
        network: called as ``network(z, t, class_labels=y)`` without gradients; its result, or the ``sample`` of that,
            has the shape of z. A module is in evaluation mode meanwhile.
        images: float ``[N, C, H, W]`` as the network was trained on them: scaled, padded, or latents.
        prepare: makes such of a batch of ``images``, which may then be of any kind; None where they are.
        labels: integers ``[N]``, or None for a network without classes.
        objective: "flow", "epsilon" or "v_prediction".
        alphas_cumprod: ``[T]`` of the scheduler that the network was trained with, for epsilon and v_prediction.
        levels: s in (0, 1), which share of the training's timesteps lies below.
        draws: of noise, at each level.
        seed: of the noise, in [0, 2^63).
        micro_batch: images in a call; it changes the errors by rounding only.
        description: of a progress bar, None for none.
    Returns: float64 ``[N, levels]``, on the CPU.
    Raises: UserError naming the argument.
    Source: the objectives: Liu et al., ICLR 2023; Ho et al., NeurIPS 2020; Salimans and Ho, ICLR 2022. Their loss as a
        membership signal: Carlini et al., "Extracting Training Data from Diffusion Models", USENIX Security 2023;
        Matsumoto, Miura and Yanai, "Membership Inference Attacks against Diffusion Models", 2023.
    """
    where = "denoising_errors"
    if not callable(network):
        fail(where, "network", "be a module or a function", described(network))
    if objective not in OBJECTIVES:
        fail(where, "objective", f"be one of {', '.join(OBJECTIVES)}", repr(objective))
    images = images if isinstance(images, ImageRows) else as_tensor(where, "images", images)
    some = images if prepare is None or len(images) == 0 else prepare(images[:1])
    if some.ndim != 4 or 0 in some.shape or not some.dtype.is_floating_point:
        fail(where, "images", "be float [N, C, H, W] as the network was trained on them", described(some))
    if not bool(torch.isfinite(some).all()):
        fail(where, "images", "be finite", "NaN or inf")
    classes = getattr(getattr(network, "config", None), "num_class_embeds", None)
    labels = None if labels is None else as_labels(where, "labels", labels, len(images), classes)
    draws, micro_batch = as_integer(where, "draws", draws, 1), as_integer(where, "micro_batch", micro_batch, 1)
    seed = as_integer(where, "seed", seed, 0, 2**63 - 1)
    rows = _levels(where, objective, alphas_cumprod, levels)
    first = next(iter(network.parameters()), None) if isinstance(network, nn.Module) else None
    device, dtype = (images.device, torch.float32) if first is None else (first.device, first.dtype)
    ids, starts = torch.arange(len(images), device=device), range(0, len(images), micro_batch)
    total = torch.zeros(len(images), len(rows), dtype=torch.float64, device=device)
    training = getattr(network, "training", False)
    if training:
        network.eval()
    try:
        with torch.no_grad(), bar(len(rows) * draws * len(starts), description, "call") as progress:
            for k, (t, of_input, of_target) in enumerate(rows):
                time = torch.tensor(t, device=device)
                for stream in range(k * draws, (k + 1) * draws):
                    for start in starts:
                        at = slice(start, start + micro_batch)
                        x = images[at] if prepare is None else prepare(images[at])
                        x = x.to(device, torch.float32)
                        noise = philox_normal(ids[at], x.shape[1:], seed=seed, stream=stream)
                        z = (of_input[0] * x + of_input[1] * noise).to(dtype)
                        y = None if labels is None else labels[at].to(device)
                        out = _call(where, network, z.contiguous(memory_format=torch.channels_last), time, y)
                        gap = out.float() - (of_target[0] * x + of_target[1] * noise)
                        total[at, k] += gap.square().flatten(1).double().mean(1)
                        progress.update()
    finally:
        if training:
            network.train()
    if not bool(torch.isfinite(total).all()):
        fail(where, "network", "return finite values", "NaN or inf")
    return (total / draws).cpu()


def _call(where: str, network: Callable[..., Any], z: Tensor, time: Tensor, labels: Tensor | None) -> Tensor:
    out = network(z, time, class_labels=labels)
    out = getattr(out, "sample", out)
    if not isinstance(out, Tensor) or out.shape != z.shape:
        rule = f"return {list(z.shape)}, the shape of its input"
        fail(where, "network", rule, list(out.shape) if isinstance(out, Tensor) else type(out).__name__)
    return out


def _levels(
    where: str, objective: str, alphas: Any, levels: Sequence[float]
) -> list[tuple[float | int, Weights, Weights]]:
    """(t, weights in the network's input, weights in its target) of each level."""
    for level in levels:
        if isinstance(level, bool) or not isinstance(level, numbers.Real) or not 0 < level < 1:
            fail(where, "levels", "lie between 0 and 1", level)
    if not len(levels):
        fail(where, "levels", "hold at least one level", list(levels))
    if objective == "flow":
        if alphas is not None:
            fail(where, "alphas_cumprod", "be None for flow", described(alphas))
        return [(FLOW_STEPS * float(s), (1 - float(s), float(s)), (-1.0, 1.0)) for s in levels]
    if alphas is None:
        fail(where, "alphas_cumprod", f"be given for {objective}", None)
    alphas, rows = as_tensor(where, "alphas_cumprod", alphas).detach().double(), []
    if alphas.ndim != 1 or not len(alphas) or not bool(((alphas >= 0) & (alphas <= 1)).all()):
        fail(where, "alphas_cumprod", "be numbers [T] in [0, 1]", described(alphas))
    for level in levels:
        t = int(level * len(alphas))
        kept, spread = float(alphas[t]) ** 0.5, (1 - float(alphas[t])) ** 0.5
        rows.append((t, (kept, spread), (0.0, 1.0) if objective == "epsilon" else (-spread, kept)))
    return rows


def denoising_attack(
    errors: Tensor,
    *,
    shadows: Tensor | None = None,
    keep: Tensor | None = None,
    early: Tensor | None = None,
    images: Images | None = None,
    seed: int = 0,
) -> Tensor:
    """Membership scores from :func:`denoising_errors`, with the difficulty of each record taken off.

    A plain image is easy to denoise whether or not it was trained on. What is taken off depends on what there is:

    - ``shadows``, networks of which some were trained on the record: the likelihood ratio of ``phi = -ln e`` by
      :func:`kr_fast.membership.lira` in its "fixed" variance, each level a query, divided by the standard deviation of
      that level's phi about the means of each record's shadows.
    - ``early``, an early checkpoint of the same training: ``-mean over levels of (ln e - ln early)``, what the rest of
      the training brought for this record.
    - ``images``: what a ridge regression on features of the pixels (those of :func:`kr_fast.membership.blind`) predicts
      of that from other records, in five folds. It knows nothing of membership.

    Without any of them: ``-mean ln e``.

    Args:
        errors: ``[N, L]``; shadows: ``[M, N, L]`` with keep: bool ``[M, N]``; early: ``[N, L]``, all of the same noise.
        images: uint8 ``[N, H, W, C]``, with or without ``early``.
        seed: of the folds.
    Returns: float64 ``[N]``, higher for members.
    Raises: UserError naming the argument.
    Source: likelihood ratios on the loss of diffusion models: Carlini et al. 2023 as above; the difference of losses:
        Watson et al., "On the Importance of Difficulty Calibration in Membership Inference Attacks", ICLR 2022; a
        regression of the error on the image: Tang et al., "Membership Inference Attacks on Diffusion Models via
        Quantile Regression", ICML 2024.
    """
    where = "denoising_attack"
    phi = -_logarithm(where, "errors", errors, None)
    if shadows is not None:
        for name, value in (("early", early), ("images", images)):
            if value is not None:
                fail(where, name, "be left out with shadows", described(value))
        if keep is None:
            fail(where, "keep", "be given with shadows", None)
        queries, scale = shadow_phi(shadows, keep)
        if (queries.shape[1], queries.shape[0]) != phi.shape:
            fail(where, "shadows", f"have shape [M, {len(phi)}, {phi.shape[1]}]", described(shadows))
        return lira(queries, keep, variance="fixed", target=phi.T[:, :, None] / scale)[0]
    if keep is not None:
        fail(where, "keep", "be left out without shadows", described(keep))
    if early is not None:
        phi = phi + _logarithm(where, "early", early, phi.shape)
    scores = phi.mean(1)
    if images is None:
        return scores
    images = as_images(where, "images", images)
    if len(images) != len(scores):
        fail(where, "images", f"be those of {len(scores)} records", described(images))
    if len(scores) < 2 * FOLDS:
        fail(where, "images", f"be at least {2 * FOLDS}, for regressions in {FOLDS} folds", len(images))
    return scores - _predicted(scores, images.cpu(), seed)


def _logarithm(where: str, name: str, errors: Any, shape: tuple[int, ...] | None) -> Tensor:
    values = as_numbers(where, name, errors).cpu().double()
    if (values.ndim != 2 or 0 in values.shape) if shape is None else values.shape != shape:
        fail(where, name, f"have shape {'[N, L]' if shape is None else list(shape)}", list(values.shape))
    if not bool((values.isfinite() & (values >= 0)).all()):
        fail(where, name, "be finite and at least 0", f"{described(values)} with others")
    return values.clamp_min(torch.finfo(torch.float64).tiny).log()


def shadow_phi(shadows: Tensor, keep: Tensor) -> tuple[Tensor, Tensor]:
    """(``phi = -ln e / scale`` float64 ``[L, N, M]``, scale ``[L, 1, 1]``): what LiRA reads of shadow networks.

    The scale of a level is the root mean square distance of ``-ln e`` from the mean of the record's shadows of the same
    side, over records and shadows: without it the level that varies most would decide alone.

    Args:
        shadows: ``[M, N, L]`` of :func:`denoising_errors`; keep: bool ``[M, N]``.
    Raises: UserError naming the argument.
    """
    where = "denoising_attack"
    keep, values = as_mask(where, "keep", keep, 2).cpu(), as_numbers(where, "shadows", shadows).cpu()
    if values.ndim != 3 or values.shape[:2] != keep.shape:
        fail(where, "shadows", f"have shape [{', '.join(map(str, keep.shape))}, L], as keep", list(values.shape))
    phi = -_logarithm(where, "shadows", values.flatten(0, 1), None).view(values.shape).permute(2, 1, 0)
    gap = torch.zeros_like(phi)
    for side in (keep.T, ~keep.T):
        mean = torch.where(side, phi, 0.0).sum(2, keepdim=True) / side.sum(1)[None, :, None].clamp_min(1)
        gap = torch.where(side, phi - mean, gap)
    scale = gap.square().mean((1, 2), keepdim=True).sqrt()
    scale = torch.where(scale > 0, scale, 1.0)
    return phi / scale, scale


def _predicted(scores: Tensor, images: Images, seed: int) -> Tensor:
    """What the other folds' regression on the pixels says of each score."""
    fold = torch.randperm(len(scores), generator=seeds.generator(seed, "denoising attack")) % FOLDS
    features, values, predicted = image_features(images), scores.numpy(), np.empty(len(scores))
    for k in range(FOLDS):
        mine = (fold == k).numpy()
        predicted[mine] = values[~mine].mean() + ridge(features[~mine], values[~mine], features[mine])
    return torch.from_numpy(predicted)
