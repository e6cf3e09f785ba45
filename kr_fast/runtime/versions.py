"""Versions of what a result depends on, for reports and ``kr-fast info``."""

import importlib.metadata
import platform

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
