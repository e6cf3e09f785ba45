"""Each operation of the file system fails once: one line with the file; the same call goes on to the same bytes."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

SUPPORT = Path(__file__).resolve().parents[1] / "support" / "faults"


def test_every_failing_operation_is_told_and_can_be_repeated(tmp_path):
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None or not sys.platform.startswith("linux"):
        pytest.skip("needs a C compiler on Linux")
    library = tmp_path / "faults.so"
    subprocess.run([compiler, "-shared", "-fPIC", "-o", library, SUPPORT / "faults.c", "-ldl"], check=True)
    environment = {
        **os.environ,
        "LD_PRELOAD": str(library),
        "PYTHONPATH": os.pathsep.join(["", str(SUPPORT), *sys.path]),
    }
    command = [sys.executable, str(SUPPORT / "failing_operations.py"), str(tmp_path / "jobs")]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr
    for name, result in json.loads(done.stdout).items():
        assert result["wrong"] == [], name
        assert result["tried"] >= sum(result["seen"].values()) - 2, result
        assert all(count > 0 or kind == "link" for kind, count in result["seen"].items()), result
