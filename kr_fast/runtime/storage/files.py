"""Files that are either complete or absent: write to a temporary name, fsync, rename."""

import contextlib
import hashlib
import io
import json
import math
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from kr_fast.runtime.errors import UserError, first_line

_OURS = re.compile(r"\..+\.(?P<node>[^.]*)\.(?P<pid>\d+)\.kr_fast\.tmp")
_writing: set[Path] = set()  # temporary files and folders of this process that are in use


@contextlib.contextmanager
def named(path: str | Path, temporary: str | Path | None = None) -> Iterator[None]:
    """System errors name ``path``: those of write and fsync name no file, others name ``temporary``."""
    try:
        yield
    except OSError as error:
        name = "" if error.filename is None else os.fspath(error.filename)
        if isinstance(name, str) and error.errno is not None and (not name or (temporary and str(temporary) in name)):
            final = name.replace(str(temporary), str(path)) if name else str(path)
            raise OSError(error.errno, error.strerror or os.strerror(error.errno), final) from error
        raise


@contextlib.contextmanager
def _temporary(path: Path) -> Iterator[Path]:
    """A name beside ``path`` that no other process uses; :func:`remove_leftovers` skips it while it is in use."""
    # Machines that share a folder may have equal process ids.
    temporary = path.with_name(f".{path.name}.{_node()}.{os.getpid()}.kr_fast.tmp")
    with named(path, temporary):
        _writing.add(temporary)
        try:
            yield temporary
        finally:
            _writing.discard(temporary)


@contextlib.contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """Yields a temporary path in the same folder; on success it is synced to disk and renamed to ``path``.

    On any error (a full disk too) the temporary file is removed and ``path`` keeps what it had.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with _temporary(path) as temporary:
        try:
            yield temporary
            sync(temporary)
            os.replace(temporary, path)
            sync(path.parent)
        finally:
            temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def atomic_folder(path: str | Path) -> Iterator[Path]:
    """Like :func:`atomic_path`, for a folder that must not exist yet or is empty: all its files appear or none does."""
    path = Path(os.path.realpath(path))  # a link cannot be replaced by a folder, and "." has no name
    with _temporary(path) as temporary:
        temporary.mkdir(parents=True)
        try:
            yield temporary
            for part in (*temporary.rglob("*"), temporary):
                sync(part)
            os.replace(temporary, path)
            sync(path.parent)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


@contextlib.contextmanager
def scratch_folder(path: str | Path) -> Iterator[Path]:
    """A name beside ``path`` for a folder of this process, removed at the end, as those that killed ones have left."""
    with _temporary(Path(path)) as temporary:
        remove_leftovers(temporary.parent)
        try:
            yield temporary
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def _node() -> str:
    return os.uname().nodename.split(".")[0]


def is_temporary(path: Path) -> bool:
    """Whether ``path`` has the name of a temporary file of this package."""
    return _OURS.fullmatch(path.name) is not None


def remove_leftovers(*folders: Path) -> None:
    """Delete temporary files of this package directly in ``folders`` whose writers on this machine have ended."""
    for folder in folders:
        for path in folder.glob(".*.kr_fast.tmp"):
            name = _OURS.fullmatch(path.name)
            if name is None or name["node"] != _node() or path in _writing:
                continue
            if int(name["pid"]) != os.getpid() and _alive(int(name["pid"])):
                continue
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):  # another user's process; a number that no process has
        return True
    return True


def sync(path: Path) -> None:
    """Wait until the file or folder is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        with named(path):
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_bytes(path: str | Path, data: bytes | memoryview) -> None:
    """Atomically write ``data``."""
    with atomic_path(path) as temporary:
        temporary.write_bytes(data)


def write_new(path: str | Path, data: bytes) -> bool:
    """Atomically write ``data`` unless the file is there already; returns whether it was written."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with _temporary(path) as temporary:
        try:
            temporary.write_bytes(data)
            sync(temporary)
            try:
                os.link(temporary, path)  # a rename would replace what another process wrote in the meantime
            except FileExistsError:
                return False
            except OSError:  # a file system without links
                if path.exists():
                    return False
                os.replace(temporary, path)
            sync(path.parent)
        finally:
            temporary.unlink(missing_ok=True)
    return True


def write_text(path: str | Path, text: str) -> None:
    """Atomically write ``text`` as UTF-8."""
    write_bytes(path, text.encode())


def write_json(path: str | Path, value: Any) -> None:
    """Atomically write strict JSON (NaN is an error: write null instead)."""
    write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def strict(value: Any) -> Any:
    """The value with None for NaN and infinities, for which JSON has no number, and strings for keys."""
    if isinstance(value, dict):
        return {str(key): strict(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [strict(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read_json(path: str | Path, kind: type = object) -> Any:
    """The value of a JSON file, of type ``kind``. Raises: UserError naming the file; FileNotFoundError."""
    try:
        with named(path):
            value = json.loads(Path(path).read_text())
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} must hold JSON, got a damaged file ({first_line(error)})") from error
    if not isinstance(value, kind):
        raise UserError(f"{path} must hold a JSON {kind.__name__}, got a {type(value).__name__}")
    return value


def save_tensors(path: str | Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Atomically write a safetensors file: the same bytes for the same tensors and metadata."""
    from safetensors.torch import save

    separate, storages = {}, set()
    for name, value in tensors.items():
        value = value.detach().cpu().contiguous()
        storage = value.untyped_storage().data_ptr()
        separate[name] = value.clone() if storage in storages else value  # the format refuses weights that are tied
        storages.add(storage)
    data = save(separate)  # save_file hides a full disk in its own error
    if metadata:  # the library writes it in a random order
        end = 8 + int.from_bytes(data[:8], "little")
        header = json.dumps({"__metadata__": dict(sorted(metadata.items())), **json.loads(data[8:end])}).encode()
        header += b" " * (-len(header) % 8)
        data = len(header).to_bytes(8, "little") + header + data[end:]
    write_bytes(path, data)


def load_tensors(path: str | Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file, on the CPU. Raises: UserError naming the file; FileNotFoundError."""
    from safetensors.torch import load

    data = _read(path)
    try:
        return load(data)
    except Exception as error:  # the library has errors of its own for each kind of damage
        raise UserError(f"{path} must hold tensors, got a damaged file ({first_line(error)})") from error


def _read(path: str | Path) -> bytes:
    with named(path):
        return Path(path).read_bytes()


def save_state(path: str | Path, state: Any) -> None:
    """Atomically write a training state (nested dicts of tensors and numbers) that :func:`load_state` reads.

    The file is that of ``torch.save`` and, behind it, its SHA-256.
    """
    import torch

    buffer = io.BytesIO()  # torch.save to a path hides a full disk in its own error
    torch.save(state, buffer)
    buffer.write(hashlib.sha256(buffer.getbuffer()).digest())
    write_bytes(path, buffer.getbuffer())


def load_state(path: str | Path | None) -> Any | None:
    """What :func:`save_state` wrote, or None where there is no such file. Never runs code from the file.

    Raises: UserError naming the file where it is damaged.
    """
    import torch

    if path is None or not Path(path).exists():
        return None
    data, size = _read(path), hashlib.sha256().digest_size
    if hashlib.sha256(data[:-size]).digest() != data[-size:]:
        raise UserError(f"{path} {_POSITION}, got a damaged file")
    return torch.load(io.BytesIO(data[:-size]), weights_only=True)


_POSITION = "must hold where this training stood (remove it to begin anew)"


@contextlib.contextmanager
def continuing(path: str | Path | None) -> Iterator[Any | None]:
    """:func:`load_state`; where what was read does not fit its use in the body, a UserError names the file."""
    state = load_state(path)
    try:
        yield state
    except (KeyError, TypeError, ValueError, IndexError, AttributeError, RuntimeError) as error:
        if state is None:
            raise
        raise UserError(f"{path} {_POSITION}, got that of another one ({first_line(error)})") from error


def save_array(path: str | Path, array: Any) -> None:
    """Atomically write one ``.npy`` array."""
    import numpy as np

    array = np.asarray(array, order="C")
    with atomic_path(path) as temporary, open(temporary, "wb") as file:
        # np.save's own writing of the data answers a full disk with "n requested and m written", without errno.
        np.lib.format.write_array_header_1_0(file, np.lib.format.header_data_from_array_1_0(array))
        file.write(array.reshape(-1).view(np.uint8))


def save_arrays(path: str | Path, arrays: Mapping[str, Any]) -> None:
    """Atomically write a compressed ``.npz``."""
    import numpy as np

    with atomic_path(path) as temporary, open(temporary, "wb") as file:
        np.savez_compressed(file, **arrays)


def sha256(path: str | Path) -> str:
    """Hexadecimal SHA-256 of a file's bytes."""
    digest = hashlib.sha256()
    with named(path), open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
