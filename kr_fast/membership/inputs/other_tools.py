"""Audit data as other tools leave them: the tree of the LiRA code, the arrays of Privacy Meter."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kr_fast.membership.inputs.answers import read_logits, refuse_nan
from kr_fast.membership.inputs.data import UNNAMED, AuditData, ShadowSignals, TargetSignals
from kr_fast.membership.inputs.loading import naming
from kr_fast.runtime.array_files import read_npy
from kr_fast.runtime.errors import fail
from kr_fast.runtime.inputs import as_labels, as_mask


def load_lira_tree(folder: str | Path, *, targets: Sequence[str] = (), step: str | None = None) -> AuditData:
    """Read the tree of the LiRA code: ``experiment-*/{keep.npy, logits/NNNNNNNNNN.npy, scores/NNNNNNNNNN.npy}``.

    Each experiment is a shadow, or a target if it is named. Logits ``[N, 1, A, C]`` are read with ``y_train.npy`` in
    the folder itself; without them scores ``[N, A]``, which are phi, but flat above 103.6 (their exp was taken in
    float32).

    Args:
        targets: names of the folders of experiments under attack; none: every one is attacked from the others.
        step: stem of the files of logits and scores; None for the last one that all experiments have.
    Raises: UserError naming the file; FileNotFoundError.
    """
    folder = Path(folder)
    experiments = sorted(
        (path for path in folder.glob("experiment*") if (path / "keep.npy").exists()),
        key=lambda path: [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", path.name)],
    )
    if not experiments:
        _refuse_numbered(folder)
        raise FileNotFoundError(f"audit: LiRA tree must hold experiment-*/keep.npy, got {folder}")
    names = [path.name for path in experiments]
    unknown = [name for name in targets if name not in names]
    if unknown:
        fail("audit", "targets of the LiRA tree", f"be among {names[0]} to {names[-1]}", unknown[0])
    labels = folder / "y_train.npy"
    kind = "logits" if labels.exists() and all((path / "logits").is_dir() for path in experiments) else "scores"
    steps = set.intersection(*({file.stem for file in (path / kind).glob("*.npy")} for path in experiments))
    if not steps or (step is not None and step not in steps):
        rule = f"have a file of {kind} in common" if step is None else f"all have {kind}/{step}.npy"
        fail("audit", "experiments of the LiRA tree", rule, ", ".join(sorted(steps)) or "none")
    step = step or max(steps, key=lambda stem: (int(stem) if stem.isdecimal() else -1, stem))
    keeps = [_mask(path / "keep.npy", 1) for path in experiments]
    for path, each in zip(experiments, keeps, strict=True):
        if each.shape != keeps[0].shape:
            fail("audit", str(path / "keep.npy"), f"have shape {list(keeps[0].shape)} as the first", list(each.shape))
    keep = torch.stack(keeps)
    y = None
    if labels.exists():
        y = as_labels("audit", str(labels), _array(labels))
        if len(y) != keep.shape[1]:
            fail("audit", str(labels), f"hold the {keep.shape[1]} labels of keep.npy", f"{len(y)} labels")
    signals: dict[str, list[Tensor]] = {}
    answers, shape = [], None
    for path in experiments:
        file = path / kind / f"{step}.npy"
        value = torch.from_numpy(_array(file))
        if value.ndim == 0 or value.shape != (shape := shape or value.shape):
            rule = f"have shape [{keep.shape[1]}, ...], and that of the first experiment"
            fail("audit", str(file), rule, list(value.shape))
        if kind == "scores":
            if value.ndim == 1:
                value = value[:, None]
            if value.ndim != 2 or len(value) != keep.shape[1]:
                fail("audit", str(file), f"have shape [{keep.shape[1]}, A]", list(value.shape))
            refuse_nan(str(file), value)
            signals.setdefault("phi", []).append(value.float().T)
            continue
        if value.ndim == 4 and value.shape[1] == 1:
            value = value[:, 0]
        each, best = read_logits(value[None], y, str(file))
        for name, rows in each.items():
            signals.setdefault(name, []).append(rows[:, :, 0])
        answers.append(best[:, 0])
    stacked = {name: torch.stack(rows, 2) for name, rows in signals.items()}
    notes = _not_read(folder, experiments, kind, labels.exists())
    best = torch.stack(answers, 1) if answers else None
    with naming(folder):
        return _leave_out(keep, stacked, names, targets, answers=best, labels=y, notes=notes)


def _not_read(folder: Path, experiments: Sequence[Path], kind: str, labelled: bool) -> tuple[str, ...]:
    """What of the tree was not read, in numbers."""
    notes = []
    if kind == "scores":
        without = sum(not (path / "logits").is_dir() for path in experiments)
        why = f", as {without} of {len(experiments)} experiments have no logits" if labelled else ""
        notes.append(f"phi was read from scores, which are flat above 103.6{why}")
    if unread := sum(path.is_dir() for path in folder.glob("experiment*")) - len(experiments):
        notes.append(f"{unread} folder{'s' * (unread > 1)} of experiments without keep.npy: not read")
    return tuple(notes)


def _refuse_numbered(folder: Path) -> None:
    """A tree of another re-implementation holds other arrays, which nobody has to guess here."""
    folders = sorted(path.parent.name for path in folder.glob("*/keep.npy"))
    if folders:
        rule = (
            "hold experiment-*/keep.npy (of other trees stack the arrays for --signals: keep [M, N], "
            "logits [M, N, A, C], labels [N], see docs/audit/signals.md)"
        )
        fail("audit", "LiRA tree", rule, f"{len(folders)} folders such as {folders[0]}/ in {folder}")


def load_privacy_meter(
    folder: str | Path, *, target: int | None = 0, signal: str = "probability", name: str = "rmia"
) -> AuditData:
    """Read arrays as Privacy Meter 2 leaves them: ``memberships.npy`` and ``signals/NAME_signals.npy``.

    ``memberships``: ``[M, N]``, bool or 0 and 1; signals ``[N, M]``, and ``signals/NAME_signals_pop.npy`` ``[Z, M]`` of
    a population where it exists. They are the softmax probability of the true class, from which
    ``phi = ln p - ln(1 - p)``: a probability that rounded to 1 says only that phi was above 17.3 (float32) or 37.4
    (float64), so the surest examples are tied. From losses ``phi = -ln(e^loss - 1)``.

    Args:
        folder: that has ``memberships.npy``.
        target: index of the model under attack; None attacks every model from the others.
        signal: "probability" or "loss": what the arrays hold.
        name: first part of the files' names.
    Raises: UserError naming the file; FileNotFoundError.
    """
    folder = Path(folder)
    if signal not in ("probability", "loss"):
        fail("audit", "signal", "be probability or loss", signal)
    keep = _mask(folder / "memberships.npy", 2)
    models = len(keep)
    if target is not None and not 0 <= target < models:
        fail("audit", "target", f"be a model in [0, {models})", target)
    phi, saturated = _phi(folder / "signals" / f"{name}_signals.npy", signal, models)
    population, file = None, folder / "signals" / f"{name}_signals_pop.npy"
    if file.exists():
        population = _phi(file, signal, models)[0]
    notes = (f"signals were read as {signal}: {saturated} of {phi.numel()} had saturated, and are tied",)
    targets = () if target is None else (str(target),)
    names = [str(index) for index in range(models)]
    with naming(folder):
        return _leave_out(keep, {"phi": phi}, names, targets, population=population, notes=notes)


def _phi(file: Path, signal: str, models: int) -> tuple[Tensor, int]:
    """(phi ``[1, N, M]``, how many had saturated)."""
    values = _array(file)
    if values.ndim != 2 or values.shape[1] != models or values.dtype.kind != "f" or values.size == 0:
        fail("audit", str(file), f"be float [N, {models}]", f"{values.dtype} {list(values.shape)}")
    least = float(np.finfo(values.dtype).eps) / 4  # half of the step below 1: what rounds to 1 is at most that far off
    x = values.astype(np.float64)
    if not np.isfinite(x).all() or x.min() < 0 or (signal == "probability" and x.max() > 1):
        rule = "lie in [0, 1]" if signal == "probability" else "be finite and at least 0"
        fail("audit", str(file), rule, f"[{x.min()}, {x.max()}]")
    if signal == "probability":
        saturated = int((x == 1).sum())
        phi = np.log(np.maximum(x, np.finfo(np.float64).tiny)) - np.log(np.maximum(1 - x, least))
    else:
        saturated = int((x == 0).sum())
        x = np.maximum(x, least)
        phi = -x - np.log(-np.expm1(-x)) + 0.0
    return torch.from_numpy(phi).float()[None], saturated


def _leave_out(
    keep: Tensor,
    signals: dict[str, Tensor],
    names: list[str],
    targets: Sequence[str],
    *,
    answers: Tensor | None = None,
    population: Tensor | None = None,
    **facts: Any,
) -> AuditData:
    """The models named in ``targets`` as targets, each with members of its own, so one only; the rest as shadows."""
    if len(targets) > 1:
        fail("audit", "targets", "be one model: each has members of its own (none: all of them)", ", ".join(targets))
    inside = torch.tensor([name not in targets for name in names])
    z = None if population is None else population[:, :, inside]
    best = None if answers is None else answers[:, inside]
    shadows = ShadowSignals(keep[inside], {n: v[:, :, inside] for n, v in signals.items()}, z, answers=best)
    attacked, members = {}, None
    for at in (~inside).nonzero()[:, 0].tolist():
        attacked[f"model {names[at]}" if names[at].isdigit() else names[at]] = TargetSignals(
            {n: v[:, :, at] for n, v in signals.items()},
            None if population is None else population[:, :, at],
            None if answers is None else answers[:, at],
        )
        members = keep[at]
    return AuditData({UNNAMED: shadows}, attacked, members, augment="as given", **facts)


def _mask(file: Path, ndim: int) -> Tensor:
    return as_mask("audit", str(file), _array(file), ndim)


def _array(file: Path) -> np.ndarray:
    values = read_npy(file, "audit", file.name)
    if values.dtype.kind not in "biuf":
        fail("audit", str(file), "hold numbers", values.dtype)
    return values
