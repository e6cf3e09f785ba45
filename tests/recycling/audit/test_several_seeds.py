"""Several seeds by one command: runs as any other, data read once, and the spread of their figures."""

import json

import numpy as np
import pytest
from scipy import stats
from toy_runs import without_seconds

from kr_fast import data
from kr_fast.cli import main
from kr_fast.data import Dataset, read
from kr_fast.recycling import pipeline, several_seeds
from kr_fast.recycling.config import RecycleConfig
from kr_fast.recycling.pipeline import recycle
from kr_fast.recycling.presets import preset
from kr_fast.recycling.several_seeds import recycle_seeds, spread, summarize
from kr_fast.report import seeds_document

pytestmark = pytest.mark.pipeline
SHORT = {**preset("toy"), "num_shadows": 0, "generator_steps": 4, "tune_noise_scale": (), "tune_confidence": ()}
SHORT |= {"tune_guidance_scale": (), "periods": 1}


@pytest.fixture(scope="module")
def npz(tmp_path_factory):
    """A set with splits of its own, so that nothing of it depends on the seed."""
    draw, arrays = np.random.default_rng(0), {}
    for which, count in (("train", 60), ("val", 20), ("test", 20)):
        arrays[f"{which}_images"] = draw.integers(0, 256, (count, 8, 8), dtype=np.uint8)
        arrays[f"{which}_labels"] = np.arange(count) % 2
    path = tmp_path_factory.mktemp("data") / "set.npz"
    np.savez(path, **arrays)
    return str(path)


def test_each_seed_is_a_run_and_the_data_are_read_once(tmp_path, npz, monkeypatch):
    reads, seen = [], []
    for module in (pipeline, several_seeds):
        monkeypatch.setattr(module, "read", lambda *args, **options: reads.append(read(*args, **options)) or reads[-1])
    config = RecycleConfig(**{**SHORT, "data": npz, "out": str(tmp_path / "runs"), "seed": 3})
    done = recycle_seeds(config, 2, lambda seed, result: seen.append((seed, result.out.name)))
    assert seen == [(3, "seed-3"), (4, "seed-4")]
    assert len(reads) == 1
    assert reads[0].dataset(seed=3) is reads[0].dataset(seed=4)  # with its fingerprint
    alone = recycle(RecycleConfig(**{**SHORT, "data": npz, "out": str(tmp_path / "alone"), "seed": 4}))
    assert without_seconds(done.results[1].metrics) == without_seconds(alone.metrics)
    summary = json.loads((tmp_path / "runs" / "release" / "summary.json").read_text())
    assert summary == done.summary
    assert summary["seeds"] == [3, 4]
    assert not summary["cut_by_seed"]
    rows = {row["path"]: row for row in summary["rows"]}
    values = [result.metrics["student"]["test_accuracy"] for result in done.results]
    assert rows["student.test_accuracy"]["values"] == values
    assert rows["cas_gap"]["mean"] == pytest.approx(np.mean([r.metrics["cas_gap"] for r in done.results]))
    assert not any(path.startswith("leave_one_out") for path in rows)  # without an audit
    text = (tmp_path / "runs" / "release" / "summary.md").read_text()
    assert "test accuracy, Student (CAS), %" in text
    assert str(tmp_path) not in text + json.dumps(summary)
    written = {path: path.stat().st_mtime_ns for path in (tmp_path / "runs").rglob("metrics.json")}
    again = recycle_seeds(config, 2)
    assert again.summary == done.summary
    assert {path: path.stat().st_mtime_ns for path in written} == written


def test_the_interval_is_students(tmp_path):
    values = [0.91, 0.93, 0.98]
    row = spread(values)
    expected = stats.ttest_1samp(values, 0).confidence_interval(0.95)
    assert row["interval"] == pytest.approx([expected.low, expected.high])
    assert row["sd"] == pytest.approx(np.std(values, ddof=1))
    assert spread([0.5]) == {"values": [0.5], "mean": 0.5, "sd": None, "interval": None}


def test_the_page_of_runs_with_an_audit(finished):
    result = json.loads((finished[0] / "release" / "metrics.json").read_text())
    summary = summarize([result, {**result, "seed": 1}], cut_by_seed=True)
    rows = {row["path"]: row for row in summary["rows"]}
    for name in ("teacher", "student_full"):
        assert rows[f"leave_one_out.{name}.rmia.auc.mean"]["mean"] == pytest.approx(
            result["audit"]["leave_one_out"][name]["rmia"]["auc"]["mean"]
        )
    table = seeds_document.table(summary)
    assert all(len(row) == len(table[0]) for row in table)
    gap = next(row for row in table if row[0] == "CAS gap, points")
    assert gap[1] == gap[4] == f"{100 * result['cas_gap']:.2f}"
    assert "each seed has other training" in seeds_document.explanation(summary)


def test_what_is_refused(tmp_path, npz, capsys, finished):
    single = "run: out must hold no run of a single seed where seeds is given"
    for flags, words in (
        (
            ["--seeds", "1", "--out", str(tmp_path / "run")],
            "run: seeds must be an integer, at least 2 and at most 1000",
        ),
        (["--seeds", "2", "--out", str(finished[0])], single),
    ):
        for dry in ([], ["--dry-run"]):
            assert main(["run", "--preset", "toy", "--data", npz, *flags, *dry]) == 2
            assert words in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
    assert main(["run", "--preset", "toy", "--data", npz, "--seeds", "2", "--dry-run"]) == 0
    assert "# 2 runs such as this one, with seeds from 0 on" in capsys.readouterr().out


def test_sources_with_and_without_splits(npz):
    digits, whole = data.read("digits"), data.read(npz)
    assert not digits.has_splits
    assert whole.has_splits
    one, two = digits.dataset(seed=0), digits.dataset(seed=1)
    assert one.fingerprint != two.fingerprint
    assert one.fingerprint == data.load("digits").fingerprint
    assert isinstance(whole.dataset(), Dataset)
    assert whole.dataset().fingerprint == data.load(npz, seed=5).fingerprint
