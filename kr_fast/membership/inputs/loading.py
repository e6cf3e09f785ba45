"""Audit data as an ``.npz`` of logits or signals: what :func:`save_npz` writes, or anybody else."""

import contextlib
import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kr_fast.membership.inputs.answers import SIGNALS, read_logits
from kr_fast.membership.inputs.data import PROBABILITIES, UNNAMED, AuditData, ShadowSignals, TargetSignals
from kr_fast.membership.inputs.pool import pool_of
from kr_fast.runtime.array_files import open_npz
from kr_fast.runtime.errors import UserError, fail
from kr_fast.runtime.inputs import as_groups, as_labels, as_mask
from kr_fast.runtime.storage import files

ABOUT = "about"
ABOUT_TARGET = ("kind", "shared", "accuracy", "control", "title", "recipe")
OF_SHADOWS = re.compile(rf"(population/)?({'|'.join(SIGNALS)}|logits|answers|keep)$")
PLAIN = ("keep", "labels", "members", "non_members", "images", "reference", "groups", "logits", *SIGNALS)


def save_npz(path: str | Path, data: AuditData) -> None:
    """Write ``data`` (of at most one set of shadows) as the ``.npz`` that :func:`load_npz` reads back, all in order.

    Args: ``path`` of the file, which appears whole or not at all. Raises: UserError for data that no such file holds.
    """
    if len(data.shadows) > 1:
        fail("save_npz", "data", "hold one set of shadows", len(data.shadows))
    arrays: dict[str, Tensor | None] = {"labels": data.labels, "members": data.members}
    arrays |= {"images": data.images, "reference": data.reference}
    for shadows in data.shadows.values():
        arrays |= {"keep": shadows.keep, **shadows.signals, "answers": shadows.answers}
        arrays |= {"population/phi": shadows.population, "population/keep": shadows.population_keep}
    arrays |= {f"synthetic/{name}": images for name, images in data.synthetic.items()}
    for name, target in data.targets.items():
        arrays |= {f"target/{name}/{signal}": value for signal, value in target.signals.items()}
        arrays |= {f"target/{name}/answers": target.answers, f"target/{name}/population/phi": target.population}
    content = {key: value.numpy() for key, value in arrays.items() if value is not None}
    targets = {name: {key: getattr(each, key) for key in ABOUT_TARGET} for name, each in data.targets.items()}
    about = {"shadows": next(iter(data.shadows), UNNAMED)}
    about |= {"augment": data.augment, "notes": list(data.notes), "targets": targets}
    if data.groups is not None:
        content["groups"] = data.groups
    content[ABOUT] = np.array(json.dumps(about))
    with files.atomic_path(path) as temporary, open(temporary, "wb") as file:
        np.savez_compressed(file, **content)


def load_npz(path: str | Path, *, probabilities: bool = False) -> AuditData:
    """Read an ``.npz`` of precomputed logits or signals; nothing in it is run.

    Keys (docs/audit/signals.md has them as a table): ``keep`` ``[M, N]``, bool or 0 and 1; ``logits`` ``[M, N, C]`` or
    ``[M, N, A, C]``, or signals ``phi``, ``entropy``, ... ``[A, N, M]`` or ``[N, M]``; ``labels`` ``[N]``; for each
    target ``target/NAME/logits`` ``[N, C]`` or ``[N, A, C]``, or ``target/NAME/phi`` ``[A, N]`` or ``[N]``; ``members``
    (a mask or indices), ``non_members``; ``population/logits`` with ``population/labels``, or ``population/phi``, and
    the same under ``target/NAME/``; ``groups`` ``[N]``, texts or integers; ``images``, ``reference``,
    ``synthetic/NAME``. Without a target every shadow is one; a target without shadows (no ``keep``) can be attacked by
    what needs none.

    ``about`` is a string, JSON, in which :func:`save_npz` keeps what is no array: ``{"shadows": name of the set,
    "augment": ..., "notes": [...], "targets": {NAME: {"kind", "shared", "accuracy", "control"}}}``, targets in order;
    each part may be missing. Without it targets stand in the order of the file; the first one is "full", the others
    are "transfer", and none is a control.

    Args:
        path: of the file.
        probabilities: the logits are probabilities, and their logarithm is taken (see
            :func:`kr_fast.membership.from_logits` for what is lost).
    Raises: UserError naming the file and the key; FileNotFoundError.
    """
    with open_npz(path, "audit", "signals") as archive:
        with naming(path):
            _known(archive.keys)
        arrays = {key: archive.read(key) for key in archive.keys}
    with naming(path):
        return _data(arrays, probabilities)


@contextlib.contextmanager
def naming(path: Any) -> Iterator[None]:
    """Errors about what a file or folder holds end with its name."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{error} in {path}") from error


def _data(arrays: dict[str, np.ndarray], probabilities: bool) -> AuditData:
    about, groups = _about(arrays.pop(ABOUT, None)), arrays.pop("groups", None)
    given = {key: _tensor(key, value) for key, value in arrays.items()}
    names = list(dict.fromkeys(key.split("/")[1] for key in given if key.startswith("target/")))
    if "keep" not in given and (not names or any(map(OF_SHADOWS.match, given))):
        rule = "hold the key keep (or a target alone, for attacks that need no shadow)"
        fail("audit", "signals", rule, ", ".join(given) or "nothing")
    count = _examples(given)
    groups = None if groups is None else as_groups("audit", "groups", groups, count)
    labels = None if "labels" not in given else as_labels("audit", "labels", given["labels"])
    kinds = ["full", *("transfer" if "keep" in given else "full" for _ in names[1:])]
    facts = about.get("targets") or {name: {"kind": kind} for name, kind in zip(names, kinds, strict=False)}
    if sorted(facts) != sorted(names):
        fail("audit", ABOUT, f"describe the targets of the file, {', '.join(names) or 'none'}", ", ".join(facts))
    label = about.get("shadows", UNNAMED)
    mask, index = (None, None) if not names else pool_of(given.get("members"), given.get("non_members"), count)
    at = slice(None) if index is None else index
    if groups is not None and index is not None:
        groups = groups[index.numpy()]
    z_labels, shadows, targets = given.get("population/labels"), {}, {}
    if "keep" in given:
        signals, answers = _side(given, "", labels, at, probabilities)
        z_signals = _population(given, "", z_labels, probabilities)
        z_keep = given.get("population/keep")
        shadows[label] = ShadowSignals(given["keep"][:, at], signals, z_signals, z_keep, answers)
    for name, more in facts.items():
        prefix = f"target/{name}/"
        own, best = _side(given, prefix, labels, at, probabilities)
        phi = _population(given, prefix, z_labels, probabilities)
        targets[name] = TargetSignals(own, phi, best, shadows=label, **more)
    synthetic = {key.split("/", 1)[1]: value for key, value in given.items() if key.startswith("synthetic/")}
    return AuditData(
        shadows,
        targets,
        mask,
        None if labels is None else labels[at],
        None if "images" not in given else given["images"][at],
        synthetic,
        given.get("reference"),
        augment=about.get("augment", "as given"),
        notes=(*about.get("notes", ()), *((PROBABILITIES,) if probabilities else ())),
        index=index,
        groups=groups,
    )


def _about(value: np.ndarray | None) -> dict[str, Any]:
    """What ``about`` says, checked but for what :class:`TargetSignals` checks."""
    if value is None:
        return {}
    try:
        content = json.loads(str(value[()])) if value.ndim == 0 and value.dtype.kind == "U" else None
    except (ValueError, RecursionError):
        content = None
    types = {"shadows": str, "augment": str, "notes": list, "targets": dict}
    rule = f"be JSON with {', '.join(types)} (load_npz), targets with {', '.join(ABOUT_TARGET)}"
    if not isinstance(content, dict):
        fail("audit", ABOUT, rule, "none")
    for key, each in content.items():
        if not isinstance(each, types.get(key, ())) or (key == "notes" and not all(isinstance(n, str) for n in each)):
            fail("audit", ABOUT, rule, f"{key} {each!r:.80}")
    for name, each in content.get("targets", {}).items():
        if not isinstance(each, dict) or set(each) - set(ABOUT_TARGET):
            fail("audit", ABOUT, rule, f"{name} {each!r:.80}")
    return content


def _examples(given: dict[str, Tensor]) -> int:
    """N. Every array of the pool has it; checked here, for the pool is then cut out of them."""
    count, first = None, "keep"
    if "keep" in given:
        given["keep"] = as_mask("audit", "keep", given["keep"], 2)
        count = given["keep"].shape[1]
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
        size = value.shape[axis] if 0 <= axis < value.ndim else None
        if size is None or size != (count := size if count is None else count):
            rule = "have an axis of examples" if count is None else f"be of the {count} examples of {first}"
            fail("audit", key, rule, list(value.shape))
        first = first if "keep" in given or first != "keep" else key
    return count


def _tensor(key: str, value: np.ndarray) -> Tensor:
    if value.dtype.kind not in "biuf":
        fail("audit", key, "hold numbers", value.dtype)
    return torch.from_numpy(np.require(value, requirements=["C", "W"]))


def _known(keys: Iterable[str]) -> None:
    pattern = re.compile(
        rf"({'|'.join(PLAIN)}|{ABOUT}|answers|synthetic/.+|population/(labels|keep)"
        rf"|(target/[^/]+/)?(population/)?({'|'.join(SIGNALS)}|logits|answers))$"
    )
    for key in keys:
        if not pattern.match(key):
            fail("audit", "signals", "hold known keys only (docs/audit/signals.md)", key)


def _side(given: dict[str, Tensor], prefix: str, labels: Tensor | None, at: Any, probabilities: bool):
    """(signals, answers or None) of the shadows, or of the target that ``prefix`` names: with or without an axis M."""
    target = bool(prefix)
    if (logits := given.get(f"{prefix}logits")) is not None:
        if labels is None:
            fail("audit", "signals", "hold labels beside logits", "none")
        logits = logits[None] if target else logits
        signals, answers = read_logits(logits[:, at], labels[at], f"{prefix}logits", probabilities)
        return ({n: v[:, :, 0] for n, v in signals.items()}, answers[:, 0]) if target else (signals, answers)
    signals = {}
    for name in SIGNALS:
        if (value := given.get(f"{prefix}{name}")) is not None:
            signals[name] = (value[None] if value.ndim == (1 if target else 2) else value)[:, at].float()
    answers = given.get(f"{prefix}answers")
    return signals, None if answers is None else answers[at]


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
