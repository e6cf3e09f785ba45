"""Audit data from files: an ``.npz`` of logits or signals, the tree of the LiRA code, arrays of Privacy Meter."""

import json
import re
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kr_fast.membership.audit_data import (
    PROBABILITIES,
    SIGNALS,
    AuditData,
    ShadowSignals,
    TargetSignals,
    pool_of,
    read_logits,
)
from kr_fast.runtime import files
from kr_fast.runtime.errors import UserError, fail

ABOUT = "about"
ABOUT_TARGET = ("kind", "shared", "accuracy", "control")
PLAIN = ("keep", "labels", "members", "non_members", "images", "reference", "logits", *SIGNALS)


def save_npz(path: str | Path, data: AuditData) -> None:
    """Write ``data`` (of one set of shadows) as the ``.npz`` that :func:`load_npz` reads back, whole and in order."""
    if len(data.shadows) != 1:
        fail("save_npz", "data", "hold one set of shadows", len(data.shadows))
    if (bad := next((name for name in data.targets if "/" in name), None)) is not None:
        fail("save_npz", "target", "have a name without /", bad)
    label, shadows = next(iter(data.shadows.items()))
    arrays: dict[str, Tensor | None] = {"keep": shadows.keep, "labels": data.labels, "members": data.members}
    arrays |= {**shadows.signals, "answers": shadows.answers, "images": data.images, "reference": data.reference}
    arrays |= {"population/phi": shadows.population, "population/keep": shadows.population_keep}
    arrays |= {f"synthetic/{name}": images for name, images in data.synthetic.items()}
    for name, target in data.targets.items():
        arrays |= {f"target/{name}/{signal}": value for signal, value in target.signals.items()}
        arrays |= {f"target/{name}/answers": target.answers, f"target/{name}/population/phi": target.population}
    found = {key: value.numpy() for key, value in arrays.items() if value is not None}
    targets = {name: {key: getattr(each, key) for key in ABOUT_TARGET} for name, each in data.targets.items()}
    about = {"shadows": label, "augment": data.augment, "notes": list(data.notes), "targets": targets}
    found[ABOUT] = np.array(json.dumps(about))
    with files.atomic_path(path) as temporary, open(temporary, "wb") as file:
        np.savez_compressed(file, **found)


def load_npz(path: str | Path, *, probabilities: bool = False) -> AuditData:
    """Read an ``.npz`` of precomputed logits or signals; nothing in it is run.

    Keys (docs/audit.md has them as a table): ``keep`` bool ``[M, N]``; ``logits`` ``[M, N, C]`` or ``[M, N, A, C]``, or
    signals ``phi``, ``entropy``, ... ``[A, N, M]`` or ``[N, M]``; ``labels`` ``[N]``; for each target
    ``target/NAME/logits`` ``[N, C]`` or ``[N, A, C]``, or ``target/NAME/phi`` ``[A, N]`` or ``[N]``; ``members`` (bool
    or indices), ``non_members``; ``population/logits`` with ``population/labels``, or ``population/phi``, and the same
    under ``target/NAME/``; ``images``, ``reference``, ``synthetic/NAME``. Without a target every shadow is one.

    ``about`` is a string, JSON, in which :func:`save_npz` keeps what is no array: ``{"shadows": name of the set,
    "augment": ..., "notes": [...], "targets": {NAME: {"kind", "shared", "accuracy", "control"}}}``, targets in order;
    each part may be missing. Without it targets stand in the order of the file; the first one is "full", the others
    are "transfer", and none is a control.

    Args:
        probabilities: the logits are probabilities, and their logarithm is taken (see
            :func:`kr_fast.membership.from_logits` for what is lost).
    Raises: UserError naming the file and the key; FileNotFoundError.
    """
    try:
        archive = np.load(path, allow_pickle=False)
        if isinstance(archive, np.ndarray):
            fail("audit", "signals", "be an .npz file", f"{path}, an .npy file")
        with archive:
            arrays = {key: archive[key] for key in archive.files}
    except (FileNotFoundError, UserError):
        raise
    except (OSError, ValueError, EOFError, zlib.error, zipfile.BadZipFile) as error:
        raise UserError(f"audit: signals must be a readable .npz file, got {path} ({type(error).__name__})") from error
    about = _about(arrays.pop(ABOUT, None), path)
    given = {key: _tensor(key, value) for key, value in arrays.items()}
    if "keep" not in given:
        fail("audit", "signals", "hold the key keep", f"{path} with {', '.join(given) or 'nothing'}")
    _known(given, path)
    _check_lengths(given)
    count, labels = given["keep"].shape[1], given.get("labels")
    names = list(dict.fromkeys(key.split("/")[1] for key in given if key.startswith("target/")))
    facts = about.get("targets") or {name: {"kind": "transfer" if at else "full"} for at, name in enumerate(names)}
    if sorted(facts) != sorted(names):
        fail("audit", ABOUT, f"describe the targets of the file, {', '.join(names) or 'none'}", ", ".join(facts))
    label = about.get("shadows", "shadows")
    mask, index = (None, None) if not names else pool_of(given.get("members"), given.get("non_members"), count)
    at = slice(None) if index is None else index
    signals, answers = _side(given, "", labels, at, probabilities)
    z_labels = given.get("population/labels")
    z_signals = _population(given, "", z_labels, probabilities)
    z_keep = given.get("population/keep")
    targets = {}
    for name, more in facts.items():
        prefix = f"target/{name}/"
        own, best = _side(given, prefix, labels, at, probabilities)
        phi = _population(given, prefix, z_labels, probabilities)
        targets[name] = TargetSignals(own, phi, best, shadows=label, **more)
    synthetic = {key.split("/", 1)[1]: value for key, value in given.items() if key.startswith("synthetic/")}
    return AuditData(
        {label: ShadowSignals(given["keep"][:, at], signals, z_signals, z_keep, answers)},
        targets,
        mask,
        None if labels is None else labels[at],
        None if "images" not in given else given["images"][at],
        synthetic,
        given.get("reference"),
        augment=about.get("augment", "as given"),
        notes=(*about.get("notes", ()), *((PROBABILITIES,) if probabilities else ())),
        index=index,
    )


def _about(value: np.ndarray | None, path: Any) -> dict[str, Any]:
    """What ``about`` says, checked."""
    if value is None:
        return {}
    try:
        found = json.loads(str(value[()])) if value.ndim == 0 and value.dtype.kind == "U" else None
    except ValueError:
        found = None
    types = {"shadows": str, "augment": str, "notes": list, "targets": dict}
    rule = f"be JSON with {', '.join(types)} (load_npz), targets with {', '.join(ABOUT_TARGET)}"
    if not isinstance(found, dict):
        fail("audit", ABOUT, rule, f"none in {path}")
    for key, each in found.items():
        if not isinstance(each, types.get(key, ())):
            fail("audit", ABOUT, rule, f"{key} {each!r} in {path}")
    for name, each in found.get("targets", {}).items():
        if not isinstance(each, dict) or set(each) - set(ABOUT_TARGET):
            fail("audit", ABOUT, rule, f"{name} {each!r} in {path}")
    return found


def _check_lengths(given: dict[str, Tensor]) -> None:
    """Every array of the pool has the N of ``keep``; checked here, for the pool is then cut out of them."""
    keep = given["keep"]
    if keep.ndim != 2:
        fail("audit", "keep", "have shape [M, N]", list(keep.shape))
    count = keep.shape[1]
    for key, value in given.items():
        last, target = key.rpartition("/")[2], key.startswith("target/")
        if key in ("keep", "members", "non_members", "reference") or "population/" in key or "synthetic/" in key:
            continue
        if last in ("labels", "images", "answers"):
            axis = 0
        elif last == "logits":
            axis = 0 if target else 1
        else:
            axis = value.ndim - (1 if target else 2)
        if not 0 <= axis < value.ndim or value.shape[axis] != count:
            fail("audit", key, f"be of the {count} examples of keep", list(value.shape))


def _tensor(key: str, value: np.ndarray) -> Tensor:
    if value.dtype.kind not in "biuf":
        fail("audit", key, "hold numbers", value.dtype)
    if key.rpartition("/")[2] == "labels":
        if value.dtype.kind not in "iu":
            fail("audit", key, "be integers", value.dtype)
        value = value.astype(np.int64)
    return torch.from_numpy(np.asarray(value, order="C"))


def _known(given: dict[str, Tensor], path: Any) -> None:
    pattern = re.compile(
        rf"({'|'.join(PLAIN)}|answers|synthetic/.+|(target/[^/]+/)?(population/)?({'|'.join(SIGNALS)}|logits|answers)"
        r"|population/(labels|keep))$"
    )
    for key in given:
        if not pattern.match(key):
            fail("audit", "signals", "hold known keys only (docs/audit.md)", f"{key} in {path}")


def _side(given: dict[str, Tensor], prefix: str, labels: Tensor | None, at: Any, probabilities: bool):
    """(signals, answers or None) of the shadows, or of the target that ``prefix`` names: with or without an axis M."""
    target = bool(prefix)
    if (logits := given.get(f"{prefix}logits")) is not None:
        if labels is None:
            fail("audit", "signals", "hold labels beside logits", "none")
        logits = logits[None] if target else logits
        found, answers = read_logits(logits[:, at], labels[at], f"{prefix}logits", probabilities)
        return ({n: v[:, :, 0] for n, v in found.items()}, answers[:, 0]) if target else (found, answers)
    found = {}
    for name in SIGNALS:
        if (value := given.get(f"{prefix}{name}")) is not None:
            found[name] = (value[None] if value.ndim == (1 if target else 2) else value)[:, at].float()
    answers = given.get(f"{prefix}answers")
    return found, None if answers is None else answers[at]


def _population(given: dict, prefix: str, labels: Tensor | None, probabilities: bool) -> Tensor | None:
    """phi of the population: ``[A, Z, M]``, of a target ``[A, Z]``."""
    key, target = f"{prefix}population/", bool(prefix)
    if f"{key}logits" in given:
        if labels is None:
            fail("audit", "signals", "hold population/labels beside population/logits", "none")
        logits = given[f"{key}logits"][None] if target else given[f"{key}logits"]
        phi = read_logits(logits, labels, f"{key}logits", probabilities)[0]["phi"]
        return phi[:, :, 0] if target else phi
    value = given.get(f"{key}phi")
    return None if value is None else (value[None] if value.ndim == (1 if target else 2) else value).float()


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
    found = sorted(
        (path for path in folder.glob("experiment*") if (path / "keep.npy").exists()),
        key=lambda path: [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", path.name)],
    )
    if not found:
        raise FileNotFoundError(f"audit: LiRA tree must hold experiment-*/keep.npy, got {folder}")
    unknown = [name for name in targets if name not in {path.name for path in found}]
    if unknown:
        fail("audit", "targets of the LiRA tree", f"be among {found[0].name} to {found[-1].name}", unknown[0])
    labels = folder / "y_train.npy"
    kind = "logits" if labels.exists() and all((path / "logits").is_dir() for path in found) else "scores"
    steps = set.intersection(*({file.stem for file in (path / kind).glob("*.npy")} for path in found))
    if not steps or (step is not None and step not in steps):
        rule = f"have a file of {kind} in common" if step is None else f"all have {kind}/{step}.npy"
        fail("audit", "experiments of the LiRA tree", rule, ", ".join(sorted(steps)) or "none")
    step = step or max(steps)
    keeps = [_keep(path / "keep.npy", 1) for path in found]
    for path, each in zip(found, keeps, strict=True):
        if each.shape != keeps[0].shape:
            fail("audit", str(path / "keep.npy"), f"have shape {list(keeps[0].shape)} as the first", list(each.shape))
    keep = torch.stack(keeps)
    y = None
    if labels.exists():
        y = torch.from_numpy(_array(labels).reshape(-1).astype(np.int64))
        if len(y) != keep.shape[1]:
            fail("audit", str(labels), f"hold the {keep.shape[1]} labels of keep.npy", f"{len(y)} labels")
    signals: dict[str, list[Tensor]] = {}
    answers = []
    for path in found:
        file = path / kind / f"{step}.npy"
        value = torch.from_numpy(_array(file))
        if kind == "scores":
            if value.ndim == 1:
                value = value[:, None]
            if value.ndim != 2 or len(value) != keep.shape[1]:
                fail("audit", str(file), f"have shape [{keep.shape[1]}, A]", list(value.shape))
            signals.setdefault("phi", []).append(value.float().T)
            continue
        if value.ndim == 4 and value.shape[1] == 1:
            value = value[:, 0]
        each, best = read_logits(value[None], y, str(file))
        for name, rows in each.items():
            signals.setdefault(name, []).append(rows[:, :, 0])
        answers.append(best[:, 0])
    stacked = {name: torch.stack(rows, 2) for name, rows in signals.items()}
    notes = () if kind == "logits" else ("phi was read from scores, which are flat above 103.6",)
    names = [path.name for path in found]
    return _leave_out(keep, stacked, torch.stack(answers, 1) if answers else None, names, targets, y, None, notes)


def load_privacy_meter(
    folder: str | Path, *, target: int | None = 0, signal: str = "probability", name: str = "rmia"
) -> AuditData:
    """Read arrays as Privacy Meter 2 leaves them: ``memberships.npy`` and ``signals/NAME_signals.npy``.

    ``memberships``: bool ``[M, N]``; signals ``[N, M]``, and ``signals/NAME_signals_pop.npy`` ``[Z, M]`` of a
    population where it exists. They are the softmax probability of the true class, from which
    ``phi = ln p - ln(1 - p)``: a probability that rounded to 1 says only that phi was above 17.3 (float32) or 37.4
    (float64), so the surest examples are tied. From losses ``phi = -ln(e^loss - 1)``.

    Args:
        target: index of the model under attack; None attacks every model from the others.
        signal: "probability" or "loss": what the arrays hold.
        name: first part of the files' names.
    Raises: UserError naming the file; FileNotFoundError.
    """
    folder = Path(folder)
    if signal not in ("probability", "loss"):
        fail("audit", "signal", "be probability or loss", signal)
    keep = _keep(folder / "memberships.npy", 2)
    models = len(keep)
    if target is not None and not 0 <= target < models:
        fail("audit", "target", f"be a model in [0, {models})", target)
    phi, saturated = _phi(folder / "signals" / f"{name}_signals.npy", signal, models)
    population, file = None, folder / "signals" / f"{name}_signals_pop.npy"
    if file.exists():
        population = _phi(file, signal, models)[0]
    notes = (f"signals were read as {signal}: {saturated} of {phi.numel()} had saturated, and are tied",)
    wanted = () if target is None else (str(target),)
    names = [str(index) for index in range(models)]
    return _leave_out(keep, {"phi": phi}, None, names, wanted, None, population, notes)


def _phi(file: Path, signal: str, models: int) -> tuple[Tensor, int]:
    """(phi ``[1, N, M]``, how many had saturated)."""
    values = _array(file)
    if values.ndim != 2 or values.shape[1] != models:
        fail("audit", str(file), f"have shape [N, {models}]", list(values.shape))
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
    keep: Tensor, signals: dict, answers: Tensor | None, names: list[str], targets: Sequence[str],
    labels: Tensor | None, population: Tensor | None, notes: tuple[str, ...],
) -> AuditData:  # fmt: skip
    """The models named in ``targets`` as targets, each with members of its own, so one only; the rest as shadows."""
    if len(targets) > 1:
        fail("audit", "targets", "be one model: each has members of its own (none: all of them)", ", ".join(targets))
    inside = torch.tensor([name not in targets for name in names])
    shadows = ShadowSignals(
        keep[inside], {n: v[:, :, inside] for n, v in signals.items()},
        None if population is None else population[:, :, inside], None,
        None if answers is None else answers[:, inside],
    )  # fmt: skip
    attacked, members = {}, None
    for at in (~inside).nonzero()[:, 0].tolist():
        attacked[f"model {names[at]}" if names[at].isdigit() else names[at]] = TargetSignals(
            {n: v[:, :, at] for n, v in signals.items()},
            None if population is None else population[:, :, at],
            None if answers is None else answers[:, at],
        )
        members = keep[at]
    return AuditData({"shadows": shadows}, attacked, members, labels, augment="as given", notes=notes)


def _keep(file: Path, ndim: int) -> Tensor:
    value = _array(file)
    if value.dtype != np.bool_:
        fail("audit", str(file), "be bool", value.dtype)
    if value.ndim != ndim:
        fail("audit", str(file), f"have shape {'[N]' if ndim == 1 else '[M, N]'}", list(value.shape))
    return torch.from_numpy(value)


def _array(file: Path) -> np.ndarray:
    try:
        value = np.load(file, allow_pickle=False)
    except FileNotFoundError:
        raise
    except (OSError, ValueError, EOFError) as error:
        raise UserError(f"audit: {file} must be a readable .npy file, got {type(error).__name__}") from error
    if not isinstance(value, np.ndarray):
        fail("audit", str(file), "be an .npy file", "an .npz file")
    return value
