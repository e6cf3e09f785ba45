"""Versions: one function for every report, which does not fail where a package is missing."""

import platform

import torch

import kr_fast
from kr_fast.runtime.versions import versions


def test_versions():
    result = versions("torch", "no-such-package")
    assert result == {
        "kr_fast": kr_fast.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "no-such-package": "not installed",
    }
