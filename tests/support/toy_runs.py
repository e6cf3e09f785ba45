"""Runs of the toy preset in processes of their own, as a user starts them."""

import json
import os
import subprocess
import sys
from pathlib import Path

WHOLE_AUDIT = ["--audit-generator", "retrained", "--audit-control", "--audit-page"]
QUIET = {"KR_FAST_PROGRESS": "0", "OMP_NUM_THREADS": "1"}


def toy(out: Path, *flags: str, before: str = "", check: int | None = 0, env: dict[str, str] | None = None):
    """``kr-fast run --preset toy --out out``; ``before`` is Python that runs first, to break something on purpose."""
    code = f"import sys\n{before}\nfrom kr_fast.cli import main\nsys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-c", code, "run", "--preset", "toy", "--out", str(out), *flags]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **QUIET, **(env or {})})
    if check is not None:
        assert done.returncode == check, done.stderr
    return done


def metrics(out: Path) -> dict:
    return json.loads((out / "release" / "metrics.json").read_text())


def without_seconds(result: dict) -> dict:
    return {key: value for key, value in result.items() if key != "stages"}
