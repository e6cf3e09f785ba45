"""The attack on the generator's weights: what handing it over would leak, though a run keeps it in ``private/``.

How well it takes noise off an image (:func:`kr_fast.membership.denoising_errors`) tells whether it was trained on it,
once the difficulty of the image is taken off (:func:`kr_fast.membership.denoising_attack`): by generators retrained on
halves of the pool where the run has them, else by an early checkpoint of the same training and by the pixels.

Attacked is the checkpoint of many steps, also where images are drawn from one of few. That one is made from images of
it alone, so it can leak no more, and it takes noise off at its own few levels only.
"""

import functools
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kr_fast.membership import Choices, across_targets, denoising_attack, denoising_errors, lira, partners, roc
from kr_fast.membership.attacks.denoising import DRAWS, LEVELS, shadow_phi
from kr_fast.membership.audit.figures import describe
from kr_fast.recycling.context import Context
from kr_fast.recycling.stages import shadows
from kr_fast.recycling.stages.generation import generator
from kr_fast.recycling.stages.generation.generator_loss import padded
from kr_fast.recycling.stages.generation.sampling import tuned_sampling
from kr_fast.runtime import seeds
from kr_fast.runtime.storage import files
from kr_fast.synthesis.optimized.optimize import optimize

MOST = 2000  # members, and as many non-members, that are attacked: a bound on the time
LEVEL = Choices.level  # of the intervals, as in the rest of the audit


def attacked(context: Context) -> Tensor:
    """Indices of the pool, in order: all of it, or as many of each side as :data:`MOST`, drawn by chance."""
    members, parts = shadows.pool(context)[2], []
    for name, side in (("members", members), ("non_members", ~members)):
        index = side.nonzero()[:, 0]
        order = torch.randperm(len(index), generator=seeds.generator(context.config.seed, "generator attack", name))
        parts.append(index[order[:MOST]])
    return torch.cat(parts).sort().values


def network_calls(context: Context) -> int:
    """Images that a network takes noise off for the errors of one checkpoint."""
    train, test = (min(len(split), MOST) for split in (context.data.train, context.data.test))
    return (train + test) * len(LEVELS) * DRAWS


def errors_of(context: Context, checkpoint: Path, description: str | None = None) -> Tensor:
    """float64 ``[n, levels]`` of the :func:`attacked` images, with the same noise for each checkpoint."""
    network, scheduler, objective = generator.load(checkpoint, context.runtime.device)
    optimize(network)
    at, (images, labels, _) = attacked(context), shadows.pool(context)
    return denoising_errors(
        network,
        images.rows(at),
        labels[at],
        prepare=functools.partial(padded, levels=len(context.config.generator_widths)),
        objective=objective,
        alphas_cumprod=None if objective == "flow" else scheduler.alphas_cumprod,
        seed=seeds.derive(context.config.seed, "denoising noise"),
        micro_batch=context.config.micro_batch,
        description=description,
    )


def shadow_file(context: Context, index: int) -> Path:
    """The errors of the generator that shadow Student ``index`` learned from."""
    return context.folder.shadow_students / f"denoising-{index:03d}.npy"


def keep_errors(context: Context, index: int, checkpoint: Path) -> None:
    """Write :func:`shadow_file`, unless it is there."""
    if not (path := shadow_file(context, index)).exists():
        files.save_array(path, errors_of(context, checkpoint).numpy())


def run(context: Context, index: Tensor) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """(figures, what is known of each record), of the checkpoint that images were drawn from.

    Args:
        index: of the pool, the examples that the audit did not leave out.
    """
    c, at, (images, _, members) = context.config, attacked(context), shadows.pool(context)
    kept = torch.isin(at, index)
    at, sampling = at[kept], tuned_sampling(context)
    chosen = sampling.checkpoint
    members = members[at]
    errors = errors_of(context, sampling.folder(context), "generator's weights")[kept]
    arrays, figures, calibration = {"index": at, "members": members, "errors": errors}, {}, {}
    if c.retrains_generators:
        rows = [np.load(shadow_file(context, index)) for index in range(c.num_students)]
        of_shadows, keep = torch.from_numpy(np.stack(rows))[:, kept], shadows.keep(context)[: c.num_students, at]
        figures = {"calibration": "retrained", "generators": len(rows), "recipe": _recipe(c.seed, of_shadows, keep)}
        calibration = {"shadows": of_shadows, "keep": keep}
    else:
        trained = context.result("generator")
        step = min([*trained.get("early", []), *trained["checkpoints"]])
        if step < chosen:
            arrays["early"] = errors_of(context, context.folder.generator(step), "early generator")[kept]
            figures, calibration = {"calibration": "early checkpoint", "early": step}, {"early": arrays["early"]}
        else:
            figures = {"calibration": "image"}
        calibration |= {"images": images.rows(at), "seed": seeds.derive(c.seed, "generator attack")}
    arrays["scores"] = scores = denoising_attack(errors, **calibration)
    sliced = {"shadows": 2, "early": 1}  # axis of the levels
    by_level = []
    for k, level in enumerate(LEVELS):
        one = {n: v.narrow(sliced[n], k, 1) if n in sliced else v for n, v in calibration.items()}
        by_level.append({"level": level, **_exploratory(denoising_attack(errors[:, k : k + 1], **one), members)})
    figures |= {
        "checkpoint": chosen,
        "levels": list(LEVELS),
        "draws": DRAWS,
        "members": int(members.sum()),
        "non_members": int((~members).sum()),
        **describe(roc(scores, members), LEVEL),
        "by_level": by_level,
        "uncalibrated": _exploratory(denoising_attack(errors), members),
    }
    return figures, {name: value.numpy() for name, value in arrays.items()}


def _exploratory(scores: Tensor, members: Tensor) -> dict[str, Any]:
    """An AUC beside the one named beforehand: each level, and no calibration, share one error (Bonferroni)."""
    curve = roc(scores, members)
    corrected = 1 - (1 - LEVEL) / (len(LEVELS) + 1)
    return {"auc": curve.auc, "auc_ci_corrected": list(curve.auc_interval(corrected)), "role": "exploratory"}


def _recipe(seed: int, errors: Tensor, keep: Tensor) -> dict[str, Any]:
    """The mean AUC over the retrained generators, each attacked from the others."""
    phi, _ = shadow_phi(errors, keep)
    partner = partners(keep, seeds.derive(seed, "generator attack", "partners"), phi)
    figures = across_targets(lira(phi, keep, variance="fixed", partner=partner), keep, level=LEVEL)
    return {"targets": figures["targets"], "auc": figures["auc"]}
