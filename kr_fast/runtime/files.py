"""Files that are either whole or absent: write to a temporary name, fsync, rename."""

import contextlib
import hashlib
import io
import json
import math
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from kr_fast.runtime.errors import UserError, first_line


@contextlib.contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """Yields a temporary path in the same folder; on success it is synced to disk and renamed to ``path``.

    On any error (a full disk too) the temporary file is removed and ``path`` keeps what it had.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(_temporary(path.name))
    try:
        yield temporary
        sync(temporary)
        os.replace(temporary, path)
        sync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def atomic_folder(path: str | Path) -> Iterator[Path]:
    """Like :func:`atomic_path`, for a folder that must not exist yet: it appears with all its files or not at all."""
    path = Path(path)
    temporary = path.with_name(_temporary(path.name))
    temporary.mkdir(parents=True)
    try:
        yield temporary
        for part in (*temporary.rglob("*"), temporary):
            sync(part)
        os.replace(temporary, path)
        sync(path.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _node() -> str:
    return os.uname().nodename.split(".")[0]


def _temporary(name: str) -> str:
    # Machines that share a folder may have equal process ids.
    return f".{name}.{_node()}.{os.getpid()}.tmp"


def remove_dead(folder: Path) -> None:
    """Delete temporary files in ``folder`` whose writers ran on this machine and no longer live."""
    for path in folder.glob(f".*.{_node()}.*.tmp"):
        pid = path.name.split(".")[-2]
        if pid.isdigit() and not _alive(int(pid)):
            path.unlink(missing_ok=True)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:  # it is another user's
        return True
    return True


def remove_leftovers(folder: Path) -> None:
    """Delete what writers that were killed left under ``folder``; nobody else may be writing there."""
    for path in folder.rglob(".*.tmp"):
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Wait until the file or folder is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
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
    temporary = path.with_name(_temporary(path.name))
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
        found = json.loads(Path(path).read_text())
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} must hold JSON, got a damaged file ({first_line(error)})") from error
    if not isinstance(found, kind):
        raise UserError(f"{path} must hold a JSON {kind.__name__}, got a {type(found).__name__}")
    return found


def save_tensors(path: str | Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Atomically write a safetensors file."""
    from safetensors.torch import save

    whole, held = {}, set()
    for name, value in tensors.items():
        value = value.detach().cpu().contiguous()
        memory = value.untyped_storage().data_ptr()
        whole[name] = value.clone() if memory in held else value  # the format refuses weights that are tied
        held.add(memory)
    write_bytes(path, save(whole, metadata=dict(metadata or {})))  # save_file hides a full disk in its own error


def load_tensors(path: str | Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file, on the CPU."""
    from safetensors.torch import load_file

    return load_file(path)


def save_state(path: str | Path, state: Any) -> None:
    """Atomically write a training state (nested dicts of tensors and numbers) that :func:`load_state` reads."""
    import torch

    buffer = io.BytesIO()  # torch.save to a path hides a full disk in its own error
    torch.save(state, buffer)
    write_bytes(path, buffer.getbuffer())


def load_state(path: str | Path) -> Any | None:
    """What :func:`save_state` wrote, or None where there is no such file. Never runs code from the file."""
    import torch

    return torch.load(path, weights_only=True) if Path(path).exists() else None


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
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
