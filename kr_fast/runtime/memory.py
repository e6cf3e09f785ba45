"""How much memory can still be allocated."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

import torch

CGROUPS = Path("/sys/fs/cgroup")


def free_memory(device: torch.device | str = "cpu") -> int:
    """Bytes that can still be allocated on ``device``: on a CPU no more than a container or batch system allows."""
    device = torch.device(device)
    if device.type == "cuda":
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
