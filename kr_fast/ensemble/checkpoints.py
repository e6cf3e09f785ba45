"""Weights from a file that somebody else wrote: read by content, never by running code, and matched name by name.

Training code saves weights under a key (``state_dict``, ``model``), and wrappers put a prefix before every name
(``module.`` of DistributedDataParallel, ``_orig_mod.`` of torch.compile, ``_module.`` of Opacus, ``model.`` of
Lightning). Where one such place, and no other, holds exactly the tensors of the network, it is taken and one log line
says so. Everything else is refused, for a network with other weights answers too.
"""

import re
import zipfile
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from kr_fast.ensemble.networks import an, error_text, plain
from kr_fast.runtime.array_files import other_format, regular_file
from kr_fast.runtime.errors import UserError, first_line
from kr_fast.runtime.inputs import described
from kr_fast.runtime.log import logger

COUNTER = "num_batches_tracked"  # of BatchNorm, which files from before torch 0.4.1 lack; no answer depends on it
DEPTH = 2  # wrappers around each other
HINT = "torch.save(model.state_dict(), FILE) writes tensors alone"


def load_weights(model: nn.Module, path: Path, where: str) -> None:
    """Load a state dict whose names, shapes and kinds of numbers are exactly the network's, and that is finite.

    Args:
        model: with :class:`kr_fast.ensemble.LogitsOf` around it, the network inside is loaded.
        where: begins the errors, ``audit: checkpoint target``.
    Raises: UserError naming the file and the first tensor that does not fit; FileNotFoundError.
    """
    model, path = plain(model), Path(path)
    content, expected = read(path, where), model.state_dict()
    if not isinstance(content, Mapping):
        raise UserError(f"{where} must hold a state dict, got {an(type(content).__name__)} in {path} ({HINT})")
    candidate = _candidate(content, expected, path, where)
    state = {name: candidate.tensors.get(candidate.prefix + name, value) for name, value in expected.items()}
    for name, value in state.items():
        if not isinstance(value, Tensor) or not value.is_floating_point():
            continue
        cast = value.to(expected[name].dtype)
        if not bool(torch.isfinite(cast.double()).all()):  # there is no isfinite of 8-bit floats
            made = "" if cast.dtype == value.dtype else f" as {described(cast).split()[0]}"
            raise UserError(f"{where} must hold finite weights, got NaN or inf{made} in {name} of {path}")
    try:
        model.load_state_dict(state)
    except Exception as error:  # hooks of the user's own
        raise UserError(f"{where} must fit the network, got the error {error_text(error)} for {path}") from error
    if said := candidate.said():
        logger.info("%s: weights found %s, in %s", where, said, path)


def read(path: Path, where: str) -> Any:
    """What a ``.safetensors`` or ``.pt`` file holds, on the CPU; which of them it is, its content says.

    Raises: UserError naming the file and why it cannot be read; FileNotFoundError.
    """
    from safetensors.torch import load_file

    regular_file(path, where)
    try:
        with open(path, "rb") as file:
            start = file.read(512)
            if start[5:9] == b"\0\0\0{":  # behind the size of its header, 8 bytes, little end first
                return load_file(path)
            if (why := _other_format(start, path)) is not None:
                raise UserError(why)
            file.seek(0)  # not by the path, from whose ending torch would tell the format
            return torch.load(file, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # each library has errors of its own for a file that is not one of its files
        why = _why(error)
        raise UserError(f"{where} must be a readable .safetensors or .pt state dict, got {path} ({why})") from error


def _why(error: Exception) -> str:
    text = str(error)
    if named := re.search(r"nsupported (?:global: )?GLOBAL (\S+)", text):
        return f"it holds an object of {named[1]}, and only tensors are read; {HINT}"
    if "central directory" in text:
        return "it is damaged or cut short"
    if text.startswith("Weights only load failed"):  # the advice behind it is to load unsafely
        return "it is damaged, or another kind of file"
    return first_line(error).split(". ")[0]


def _other_format(start: bytes, path: Path) -> str | None:
    """What a file is that starts so, if it is no file of torch."""
    if start.lstrip().startswith(b"{") and (b"weight_map" in start or path.name.endswith(".index.json")):
        return "it is the index of weights in several files; save them as one"
    if not start.startswith(b"\x80") and (why := other_format(start)):  # a pickle, as torch before 1.6 wrote
        return why
    if start.startswith(b"PK\x03\x04") and zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
        if any(name.endswith("/constants.pkl") for name in names):
            return f"it is a TorchScript program; {HINT}"
        if not any(name.rpartition("/")[2] == "data.pkl" for name in names):
            return "it is an .npz file" if any(name.endswith(".npy") for name in names) else "it is a .zip file"
    if not start.startswith((b"PK", b"\x80")) and b"ustar" not in start:
        return "it starts as neither"
    return None


class _Candidate(NamedTuple):
    """A mapping in a file whose names are the network's behind ``prefix``."""

    keys: tuple[str, ...]
    prefix: str
    tensors: Mapping[str, Any]

    def said(self) -> str:
        """Where it is, in words; nothing where the file itself is the state dict."""
        under = f"under {'.'.join(self.keys)}" if self.keys else ""
        removed = f"with the prefix {self.prefix}" if self.prefix else ""
        return " ".join(filter(None, (under, removed)))


def _candidate(content: Mapping, expected: Mapping[str, Any], path: Path, where: str) -> _Candidate:
    """The one place whose tensors are the network's."""
    mappings = {id(each): (keys, each) for keys, each in reversed(list(_mappings(content)))}  # one under two keys once
    candidates = [_Candidate(keys, _prefix(each, expected), each) for keys, each in reversed(mappings.values())]
    named = [candidate for candidate in candidates if _differences(candidate, expected) == ([], [])]
    right = [candidate for candidate in named if _misfit(candidate, expected) is None]
    if len(right) > 1:
        both = " and ".join(each.said() or "at the top" for each in right)
        hint = 'torch.save(torch.load(FILE, weights_only=True)["NAME"], OTHER) writes one of them'
        raise UserError(f"{where} must hold one set of weights, got {len(right)} that fit in {path}: {both} ({hint})")
    if right:
        return right[0]
    if named:
        raise UserError(f"{where} must hold {_misfit(named[0], expected)} in {path}")
    candidate = max(candidates, key=lambda each: _shared(each, expected))
    if not _shared(candidate, expected):
        keys = ", ".join(str(key) for key in list(content)[:5]) + (", ..." if len(content) > 5 else "")
        first = next(iter(expected), "no tensor")
        raise UserError(f"{where} must hold the network's tensors ({first}, ...), got {keys or 'nothing'} in {path}")
    missing, unexpected = _differences(candidate, expected)
    parts = {"missing": missing, "unexpected": unexpected}.items()
    got = [f"{len(names)} {what} ({names[0]} first)" for what, names in parts if names]
    at = f" {candidate.said()}" if candidate.said() else ""
    raise UserError(f"{where} must hold the network's {len(expected)} tensors, got {' and '.join(got)}{at} in {path}")


def _mappings(content: Mapping, keys: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Mapping]]:
    """(keys that lead there, mapping) of ``content`` and of the mappings in it."""
    yield keys, content
    if len(keys) < DEPTH:
        for key, value in content.items():
            if isinstance(key, str) and isinstance(value, Mapping):
                yield from _mappings(value, (*keys, key))


def _prefix(tensors: Mapping, expected: Mapping[str, Any]) -> str:
    """What stands before most of the network's names; never a position in a Sequential, which holds more than it."""
    votes: Counter[str] = Counter({"": 0})
    for name in tensors:
        parts = name.split(".") if isinstance(name, str) else []
        for cut in range(len(parts)):
            if cut and parts[cut - 1].isdigit():
                break
            if ".".join(parts[cut:]) in expected:
                votes["".join(f"{part}." for part in parts[:cut])] += 1
    return votes.most_common(1)[0][0]


def _shared(candidate: _Candidate, expected: Mapping[str, Any]) -> int:
    return sum(candidate.prefix + name in candidate.tensors for name in expected)


def _differences(candidate: _Candidate, expected: Mapping[str, Any]) -> tuple[list[str], list[str]]:
    """(names of the network that are missing, names in the file that the network has not)."""
    missing = [n for n in expected if candidate.prefix + n not in candidate.tensors and n.rpartition(".")[2] != COUNTER]
    names = {candidate.prefix + name for name in expected}
    return missing, [str(name) for name in candidate.tensors if name not in names]


def _misfit(candidate: _Candidate, expected: Mapping[str, Any]) -> str | None:
    """The first tensor of another shape or kind of numbers: ``NAME of shape ..., got ...``."""
    for name, value in expected.items():
        given = candidate.tensors.get(candidate.prefix + name, value)
        if not isinstance(value, Tensor):
            continue
        if not isinstance(given, Tensor):
            return f"{name} of shape {list(value.shape)}, got {an(described(given))}"
        if given.shape != value.shape:
            return f"{name} of shape {list(value.shape)}, got {list(given.shape)}"
        if given.is_meta or given.layout != torch.strided or given.is_quantized:
            return f"{name} as plain numbers, got a tensor that is meta, sparse or quantized"
        if _kind(given) != _kind(value) and name.rpartition(".")[2] != COUNTER:
            return f"{name} of {_kind(value)} numbers, got {described(given)}"
    return None


def _kind(tensor: Tensor) -> str:
    if tensor.is_complex():
        return "complex"
    return "floating" if tensor.is_floating_point() else "true or false" if tensor.dtype == torch.bool else "whole"
