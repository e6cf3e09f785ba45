"""How much memory can still be allocated, and what becomes of memory that is freed."""

import contextlib
import ctypes
import functools
import os
from collections.abc import Iterator
from pathlib import Path

import torch

CGROUPS = Path("/sys/fs/cgroup")

# Of glibc's malloc.h. Blocks above the size still go back at once; it is the most that glibc sets by itself.
_TRIM_THRESHOLD, _MMAP_THRESHOLD, _LARGEST_KEPT = -1, -3, 32 << 20


def free_memory(device: torch.device | str = "cpu") -> int:
    """Bytes that can still be allocated on ``device``: on a CPU no more than a container or batch system allows."""
    device = torch.device(device)
    if device.type == "cuda":  # needs a GPU
        return torch.cuda.mem_get_info(device)[0]
    free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    with contextlib.suppress(OSError, ValueError):
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                free = int(line.split()[1]) * 1024
    with contextlib.suppress(OSError):
        for folder in control_groups(Path("/proc/self/cgroup").read_text(), CGROUPS):
            free = min(free, available_in(folder, free))
    return free


def control_groups(text: str, root: Path) -> Iterator[Path]:
    """Folders of this process's memory groups and of those above it: every limit on the way counts."""
    for line in text.splitlines():
        number, controllers, path = line.split(":", 2)
        if number != "0" and "memory" not in controllers.split(","):
            continue
        top = root if number == "0" else root / "memory"
        own = top / path.strip("/")
        yield from (each for each in (own, *own.parents) if each == top or top in each.parents)


def available_in(folder: Path, most: int) -> int:
    """Bytes below the limit of one group, in version 2 or 1 of control groups; files in its cache can be given back."""
    for limit, used, cache in (
        ("memory.max", "memory.current", "inactive_file"),
        ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    ):
        with contextlib.suppress(OSError, ValueError):  # "max" is no number: there is no limit
            left = int((folder / limit).read_text()) - int((folder / used).read_text())
            stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
            return max(0, left + int(stat.get(cache, 0)))
    return most


@functools.cache
def keep_freed_memory() -> bool:
    """Let this process keep up to 2 GiB of what it frees, for its next allocations; whether that was set.

    A training step allocates the same activations again and again. By default glibc returns blocks of this size to the
    system when they are freed and takes them again, cleared, page by page: an eighth to a fifth of the time of a step.
    Nothing is set where the user has set malloc's thresholds, nor for other C libraries.
    """
    if any(name.startswith("MALLOC_") for name in os.environ) or "glibc.malloc" in os.environ.get("GLIBC_TUNABLES", ""):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    return bool(mallopt(_MMAP_THRESHOLD, _LARGEST_KEPT)) and bool(mallopt(_TRIM_THRESHOLD, 2**31 - 1))


def return_freed_memory() -> None:
    """Give the system back what :func:`keep_freed_memory` lets this process keep, where what follows is another work.

    A stage of a run does not use the blocks of the one before, and its worker processes cannot.
    """
    if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):
        trim(0)
