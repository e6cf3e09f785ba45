"""``kr-fast bench``: what it measures and writes, what it compares, and its refusals."""

import concurrent.futures
import importlib
import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from kr_fast.benchmarks import cases, results
from kr_fast.benchmarks.case import Case, Unavailable, Work, measure
from kr_fast.benchmarks.cases import loss
from kr_fast.benchmarks.config import BenchConfig
from kr_fast.benchmarks.throughput import measure as measure_synthesis
from kr_fast.cli import main
from kr_fast.cli.bench import throughput
from kr_fast.runtime.errors import UserError

ROOT = Path(__file__).resolve().parents[2]


def test_commit_is_marked_by_changes_of_code_alone(tmp_path):
    assert results.commit(tmp_path) is None
    rows, code = tmp_path / "bench" / "results" / "rows.json", tmp_path / "code.py"
    rows.parent.mkdir(parents=True)
    rows.write_text("[]")
    code.write_text("")
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b"]
    for command in (["init", "-q"], ["add", "."], ["commit", "-q", "-m", "Begin"]):
        subprocess.run([*git, *command], check=True)
    clean = results.commit(tmp_path)
    assert re.fullmatch("[0-9a-f]{7,}", clean)
    rows.write_text("[1]")  # as the row before this one did
    assert results.commit(tmp_path) == clean
    code.write_text("x = 1")
    assert results.commit(tmp_path) == f"{clean}-dirty"


@pytest.mark.pipeline
def test_synthesis(tmp_path, capsys):
    options = {"model": "digits", "batch": 8, "images": 12, "steps": 2, "repeats": 1, "threads": 1, "format": "none"}
    arguments = [text for name, value in options.items() for text in (f"--{name}", str(value))]
    assert main(["bench", "synthesis", *arguments, "--providers", "loop", "kr_fast", "--out", str(tmp_path)]) == 0
    result = json.loads((tmp_path / "synthesis.json").read_text())
    assert result["case"]["images"] == 12
    assert result["evaluations"] == 2
    assert list(result["providers"]) == ["loop", "kr_fast"]
    assert result["machine"]["threads"] == result["case"]["threads"] == 1
    for each in result["providers"].values():
        assert each["psnr"] is None or each["psnr"] >= 60  # of the fused tier's contract
        assert each["images_per_second"] >= each["images_per_second_median"] > 0
        assert each["evaluations_per_second"] == pytest.approx(2 * each["images_per_second"])
        assert each["peak_bytes"] > 2**20
        assert each["share_of_matrix_peak"] > 0
    assert (tmp_path / "synthesis.png").read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out
    assert "NFE images/s" in printed
    assert throughput(result) in printed


def test_a_baseline_that_does_not_run_keeps_the_others(monkeypatch):
    class Pool(concurrent.futures.ThreadPoolExecutor):
        def __init__(self, workers, mp_context):
            super().__init__(workers)

        def submit(self, run, case, provider, repeats):
            return super().submit(self.run, provider)

        def run(self, provider):
            if provider in fails:
                raise RuntimeError(f"no compiler for {provider}\nat length")
            sampled = dict.fromkeys(("images_per_second", "evaluations_per_second", "share_of_matrix_peak"), 1.0)
            return sampled | {"peak_bytes": 2**20, "psnr": None}

    monkeypatch.setattr(concurrent.futures, "ProcessPoolExecutor", Pool)
    case, fails = BenchConfig().case(), ["compile"]
    result = measure_synthesis(case, ("loop", "compile", "kr_fast"), 1, lambda name: None)
    assert list(result["providers"]) == ["loop", "kr_fast"]
    assert result["skipped"] == {"compile": "RuntimeError: no compiler for compile"}
    assert "not measured: RuntimeError: no compiler for compile" in throughput(result)
    with pytest.raises(UserError, match="bench: providers must name one that runs here, got compile: RuntimeError"):
        measure_synthesis(case, ("compile",), 1, lambda name: None)
    fails = ["kr_fast"]
    with pytest.raises(RuntimeError, match="no compiler for kr_fast"):
        measure_synthesis(case, ("loop", "kr_fast"), 1, lambda name: None)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--model", "huge"], "bench: model must be one of digits, unet28, unet32, got huge"),
        (
            ["--providers", "tensorrt"],
            "bench: providers must be one of documented, loop, compile, kr_fast, got tensorrt",
        ),
        (["--steps", "0"], "bench: steps must be in [1, 10000], got 0"),
        (["--device", "tpu"], "bench: device must be one of auto, cpu, cuda, got tpu"),
        (
            ["--scheduler", "FastScheduler"],
            "bench: scheduler must be the name of a diffusers scheduler, got FastScheduler",
        ),
    ],
)
def test_bad_options(tmp_path, capsys, arguments, text):
    assert main(["bench", "synthesis", *arguments, "--out", str(tmp_path / "out")]) == 2
    assert text in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_cases_of_a_kind(tmp_path, capsys):
    arguments = ["bench", "loss", "--device", "cpu", "--cases", "4096x10 ", "--only", "eager", "--repeats", "2"]
    assert main([*arguments, "--out", str(tmp_path)]) == 0
    result = json.loads((tmp_path / "loss.json").read_text())
    (case,) = result["cases"]
    assert list(case["providers"]) == ["kr_fast", "eager"]
    for row in case["providers"].values():
        assert row["error"] < 1e-5
        assert row["gb_per_s"] == pytest.approx(3 * 4 * 4096 * 10 / row["seconds"] / 1e9)
        assert 0 < row["fastest"] <= row["seconds"]
    assert case["providers"]["eager"]["ratio"] == pytest.approx(
        case["providers"]["eager"]["seconds"] / case["providers"]["kr_fast"]["seconds"]
    )
    assert result["machine"]["versions"]["torch"].startswith(torch.__version__.partition("+")[0])
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert results.table(result) in capsys.readouterr().out


@pytest.mark.parametrize("provider", ["kr_fast", "eager", "optimized", "opacus_hooks", "opacus_ghost"])
def test_private_steps_are_checked_against_a_loop(provider):
    case = cases.of("privacy", "cpu")[0]
    try:
        assert case.prepared(provider).error < 1e-5
    except Unavailable as reason:
        pytest.skip(str(reason))


def test_a_ratio_that_has_fallen_exits_with_3(tmp_path, capsys):
    arguments = ["bench", "audit", "--device", "cpu", "--cases", "roc N=50000 ties", "--repeats", "1"]
    assert main([*arguments, "--out", str(tmp_path)]) == 0
    file = tmp_path / "audit.json"
    old = json.loads(file.read_text())
    row = old["cases"][0]["providers"]["scikit-learn"]
    ratio = row["ratio"]
    for factor, status in ((1e-3, 0), (1e3, 3)):
        row["ratio"] = ratio * factor
        file.write_text(json.dumps(old))
        capsys.readouterr()
        assert main([*arguments, "--out", str(tmp_path / "new"), "--compare", str(tmp_path)]) == status
        assert ("x  fallen" in capsys.readouterr().out) == (status == 3)


def test_ratios_within_the_margin_have_not_fallen():
    old, new = (
        {"cases": [{"case": "a", "providers": {"kr_fast": {"ratio": 1.0}, "eager": {"ratio": ratio}}}]}
        for ratio in (2.0, 1.81)
    )
    assert not results.compare(old, new, 0.1)[1]
    assert results.compare(old, new, 0.09)[1]
    # A faster kernel of our own by name is no baseline that has fallen.
    rows = old["cases"][0]["providers"], new["cases"][0]["providers"]
    for providers, ratio in zip(rows, (2.0, 1.0), strict=True):
        providers |= {"kr_fast triton": {"ratio": ratio}, "optimized": {"ratio": ratio}}
    assert not results.compare(old, new, 0.1)[1]
    with pytest.raises(UserError, match="bench: compare must have a case and a baseline in common"):
        results.compare(old, {"cases": [{"case": "b", "providers": {"eager": {"ratio": 2.0}}}]}, 0.1)


def test_ratios_of_synthesis_are_of_images_per_second():
    case = {"model": "unet28", "scheduler": "DDIM", "steps": 10, "batch": 64, "device": "cpu"}
    providers = {"loop": {"images_per_second": 20.0}, "kr_fast": {"images_per_second": 50.0}}
    found = results.ratios({"kind": "synthesis", "case": case, "providers": providers})
    assert found == {("unet28, DDIM 10 steps, batch 64, cpu", "loop"): 2.5}
    guided = results.ratios({"kind": "synthesis", "case": case | {"guidance_scale": 2.0}, "providers": providers})
    assert list(guided) == [("unet28, DDIM 10 steps, batch 64, cpu, guidance 2", "loop")]


def test_what_is_no_like_comparison_is_said():
    def result(machine, *names):
        return {"machine": machine, "cases": [{"case": "a", "providers": {name: {"ratio": 2.0} for name in names}}]}

    one = {"processor": "p", "gpu": "H100", "threads": 8}
    lines, fallen = results.compare(result(one, "eager", "vmap"), result(one, "eager", "compiled", "liger"), 0.1)
    assert not fallen
    assert lines[2:] == ["1 earlier ratios were not measured now", "2 ratios have no earlier one"]
    other = {"processor": "p", "gpu": "A100", "threads": 4}
    lines, _ = results.compare(result(one, "eager"), result(other, "eager"), 0.1)
    assert lines[2:] == ["measured on another GPU: H100, now A100", "measured with other threads: 8, now 4"]


def test_what_is_wrong_or_missing_is_not_measured(monkeypatch):
    monkeypatch.setattr("kr_fast.benchmarks.case.seconds_of", lambda work, count, device: 0.001 * count)

    def missing():
        raise Unavailable("needs a package")

    def work(error, share=1.0):
        return lambda: Work(lambda: sum(range(1000)), error, share)

    providers = {"kr_fast": work(0.0), "quarter": work(0.0, 0.25), "wrong": work(0.5), "missing": missing}
    row = measure(Case("sums", providers, 0.1), 3)
    assert list(row["providers"]) == ["kr_fast", "quarter"]
    assert row["providers"]["quarter"]["ratio"] == pytest.approx(4)  # one run of it is a quarter
    assert row["skipped"] == {"wrong": "its result is wrong by 0.5, where 0.1 is allowed", "missing": "needs a package"}

    def large():
        raise torch.OutOfMemoryError("CUDA out of memory.")

    providers = {"kr_fast": work(0.0), "prepared": large, "run": lambda: Work(large, 0.0)}
    row = measure(Case("sums", providers, 0.1), 1)
    assert list(row["providers"]) == ["kr_fast"]
    assert row["skipped"] == dict.fromkeys(("prepared", "run"), "needs more memory than the GPU has left")
    with pytest.raises(UserError, match="bench: kr_fast on sums must be within 0.1 of its reference, got nan"):
        measure(Case("sums", {"kr_fast": work(float("nan"))}, 0.1), 1)


def test_the_route_of_another_library_is_the_same_loss():
    """What liger is handed, with torch's divergence in its place, on any machine."""
    student, teacher, labels = torch.randn(32, 10), torch.randn(32, 10), torch.randint(0, 10, (32,))
    kl_div = torch.nn.KLDivLoss(reduction="batchmean")
    torch.testing.assert_close(loss.routed(student, teacher, labels, kl_div), loss.fused(student, teacher, labels))


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_names_of_cases_are_distinct(device):
    names = [
        case.name for kind in ("loss", "training", "privacy", "models", "audit") for case in cases.of(kind, device)
    ]
    assert len(set(names)) == len(names) > 0


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["loss", "--cases", "nothing"], "bench: cases must be part of the name of a case of loss on cpu, got nothing"),
        (
            ["loss", "--only", "eager", "vmap"],
            "bench: only must name baselines of these cases (compiled, eager, kr_fast), got vmap",
        ),
        (["loss", "--compare", "none.json"], "bench: compare must be loss.json of an earlier run or a folder"),
        (["loss", "--repeats", "0"], "bench: repeats must be in [1, 1000000], got 0"),
        (["all", "--margin", "2"], "bench: margin must be in [0, 1], got 2"),
    ],
)
def test_bad_options_of_cases(tmp_path, capsys, arguments, text):
    assert main(["bench", *arguments, "--device", "cpu", "--out", str(tmp_path / "out")]) == 2
    assert text in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_folder_that_cannot_be_written_is_refused_first(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("kr_fast.benchmarks.case.measure", lambda *arguments: pytest.fail("measured"))
    monkeypatch.setattr("kr_fast.benchmarks.throughput.measure", lambda *arguments: pytest.fail("measured"))
    (tmp_path / "file").touch()
    for kind in ("loss", "synthesis"):
        assert main(["bench", kind, "--device", "cpu", "--out", str(tmp_path / "file")]) == 2
        assert "File exists" in capsys.readouterr().err


@pytest.mark.skipif(not (ROOT / "bench").exists(), reason="needs the source tree")
def test_summary_is_of_one_call_and_of_the_whole_work(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "bench"))
    summarize = importlib.import_module("summarize")
    facts = {"kr_fast": (0.02, {"calls": 10}), "numpy": (0.5, {"share": 0.25})}
    entries = [
        {"group": "lira", "params": {"provider": name}, "stats": {"median": seconds}, "extra_info": extra}
        for name, (seconds, extra) in facts.items()
    ]
    (tmp_path / "result.json").write_text(json.dumps({"benchmarks": entries}))
    assert summarize.rows(tmp_path / "result.json") == ["| lira | kr_fast 2 ms | numpy 2e+03 ms (1000.00x) |"]


@pytest.mark.skipif(not (ROOT / "bench").exists(), reason="needs the source tree")
def test_the_page_of_results_is_written_from_them(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "bench"))
    measurements_page = importlib.import_module("measurements_page")
    assert measurements_page.page() == (ROOT / "docs" / "measured" / "bench.md").read_text()
    text = (ROOT / "README.md").read_text()
    assert measurements_page.with_table(text, measurements_page.readme()) == text
    folder = tmp_path / "machine"
    shutil.copytree(next(measurements_page.RESULTS.glob("*/loss.json")).parent, folder)
    result = json.loads((folder / "loss.json").read_text())
    row = result["cases"][0]["providers"]["eager"]
    row["ratio"] = 123.0
    (folder / "loss.json").write_text(json.dumps(result))
    assert "| 123.00x |" in measurements_page.page(tmp_path)
