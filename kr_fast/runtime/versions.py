"""Versions and processor, on which a result depends, for reports, benchmarks and ``kr-fast info``."""

import importlib.metadata
import platform
from pathlib import Path

from kr_fast.runtime.version import __version__


def versions(*packages: str) -> dict[str, str]:
    """Of this package, Python and the packages named; "not installed" where one is not."""
    installed = {"kr_fast": __version__, "python": platform.python_version()}
    for name in packages:
        try:
            installed[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            installed[name] = "not installed"
    return installed


def processor() -> str:
    """The processor's name, or its architecture where the system tells no name."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, "") or platform.machine()
