"""Runs of the toy preset in processes of their own, as a user starts them."""

import json
import os
import subprocess
import sys
from pathlib import Path

import torch
import yaml

from kr_fast import data
from kr_fast.data import Dataset, Split
from kr_fast.recycling.config import RecycleConfig
from kr_fast.recycling.context import Context
from kr_fast.recycling.presets import preset
from kr_fast.runtime import state
from kr_fast.runtime.storage.journal import Journal

WHOLE_AUDIT = ["--audit-generator", "retrained", "--audit-control", "--audit-page"]
WHOLE_AUDIT += ["--audit-generator-weights", "--ablation", "--student-width", "6"]
WHOLE_AUDIT += ["--few-steps", "2", "--few-step-training", "6"]
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
    kept = {key: value for key, value in result.items() if key not in ("stages", "throughput")}
    return kept | ({"few_step": _accuracies(kept["few_step"])} if "few_step" in kept else {})


def _accuracies(few_step: dict) -> list[float]:
    return [few_step["val_accuracy"], few_step["many_step"]["val_accuracy"]]


def context_of(out: Path) -> Context:
    """What the stages of a finished run were given."""
    values = yaml.safe_load((out / "config.yaml").read_text())
    values = {key: tuple(value) if isinstance(value, list) else value for key, value in values.items()}
    c = RecycleConfig(out=str(out), **values)
    loaded = data.load(c.data, seed=c.seed, val_fraction=c.val_fraction, test_fraction=c.test_fraction)
    return Context(c, out, state.current(), loaded, Journal(out))


def new_context(tmp_path, counts=(20, 10, 10), classes=2, side=8, channels=1, **options):
    """A run of the toy preset that has not begun."""
    draw = torch.Generator().manual_seed(0)
    splits = [
        Split(
            torch.randint(0, 256, (count, side, side, channels), generator=draw, dtype=torch.uint8),
            torch.arange(count) % classes,
        )
        for count in counts
    ]
    config = RecycleConfig(**{**preset("toy"), "out": str(tmp_path / "run"), **options})
    data = Dataset("made", tuple(map(str, range(classes))), *splits)
    return Context(config, tmp_path / "run", state.current(), data, Journal(tmp_path / "run"))
