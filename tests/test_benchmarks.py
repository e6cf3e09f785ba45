"""Every benchmark can be collected: those that only a GPU runs, too."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.skipif(not (ROOT / "bench").exists(), reason="needs the source tree")
def test_every_benchmark_is_collected():
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider"]
    files = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "bench").rglob("bench_*.py"))
    done = subprocess.run([*command, *files], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:]
    assert [name for name in files if f"{name}::" not in done.stdout] == []
