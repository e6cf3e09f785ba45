"""bench/reproduce.py: rows of a finished run, what is done, and the page that is written from them."""

import importlib
import json
import sys
from pathlib import Path

import pytest
from toy_runs import metrics

ROOT = Path(__file__).resolve().parents[3]
pytestmark = pytest.mark.skipif(not (ROOT / "bench").exists(), reason="needs the source tree")
FACTS = {"processor": "a kind", "threads": 2, "torch": "2.13.0", "commit": "abc", "date": "2026-11-28"}


@pytest.fixture(scope="module")
def script():
    """The modules (reproduce, results_page), which lie in a folder that is no package."""
    sys.path.insert(0, str(ROOT / "bench"))
    try:
        yield importlib.import_module("reproduce"), importlib.import_module("results_page")
    finally:
        sys.path.remove(str(ROOT / "bench"))


def test_the_page_is_what_the_script_writes(script):
    reproduce, results_page = script
    rows = reproduce.read_rows()
    assert (ROOT / "docs" / "measured" / "results.md").read_text() == results_page.page(rows)
    home = str(Path.home())
    assert not any(word in json.dumps(rows) for word in ("/tmp", "/work", home if home != "/" else "/root"))


@pytest.mark.pipeline
def test_rows_hold_the_figures_of_the_run(script, finished, audited):
    reproduce, _ = script
    result, facts = metrics(finished[0]), dict(FACTS)
    ablation = [{"labels": "class", "regenerated": new, "test_accuracy": 0.5 + new / 4} for new in (False, True)]
    result["ablation"] = [*ablation, {"labels": "soft", "regenerated": False, "test_accuracy": 0.625, "leakage": {}}]
    leakage = {"lira": {"mean": 0.53, "interval": [0.5, 0.56]}, "lira_offline": {"mean": 0.54, "interval": None}}
    result["ablation"][0]["not_attacked"], result["ablation"][2]["leakage"] = "the labels are those of all", leakage
    run = reproduce.Run("digits", "default", 0)
    rows = {row["variant"]: row for row in reproduce.rows_of(run, result, facts)}
    assert list(rows) == ["teacher", "gkd", "hard-fixed", "hard-regenerated", "soft-fixed"]
    gkd, of_all = rows["gkd"], result["audit"]["leave_one_out"]["student_full"]
    assert gkd["accuracy"] == result["student"]["test_accuracy"]
    assert gkd["cas_gap"] == result["cas_gap"]
    assert gkd["lira_auc"] == of_all["lira"]["auc"]["mean"]
    assert gkd["lira_auc_ci"] == of_all["lira"]["auc"]["interval"]
    assert gkd["rmia_auc"] == of_all["rmia"]["auc"]["mean"]
    assert gkd["released_auc"] == result["audit"]["released"]["nearest_synthetic"]["auc"]
    assert gkd["records"] is gkd["canary_auc"] is None
    assert gkd["why"]["records"] == "too few shadows to find a single record"
    assert gkd["why"]["canary_auc"] == "no canaries"
    teacher = rows["teacher"]
    assert teacher["lira_auc"] == result["audit"]["leave_one_out"]["teacher"]["lira"]["auc"]["mean"]
    assert (teacher["cas_gap"], teacher["why"]["cas_gap"]) == (None, "a Teacher has none")
    for name, accuracy in (("hard-fixed", 0.5), ("hard-regenerated", 0.75), ("soft-fixed", 0.625)):
        assert rows[name]["accuracy"] == accuracy
        assert rows[name]["cas_gap"] == result["teacher"]["test_accuracy"] - accuracy
    assert rows["hard-fixed"]["why"]["lira_auc"] == "the labels are those of all"
    soft = rows["soft-fixed"]
    assert (soft["lira_auc"], soft["lira_auc_ci"], soft["lira_offline_auc"]) == (0.53, [0.5, 0.56], 0.54)
    assert not {"lira_auc", "lira_offline_auc"} & soft["why"].keys()
    assert soft["why"]["rmia_auc"] == soft["why"]["records"] == reproduce.NO_SHADOWS
    for row in rows.values():
        assert {name for name, value in row.items() if value is None} <= row["why"].keys()
        assert row["options"] == "--preset digits --audit-canaries 40 --ablation --seed 0"
    calibrated = metrics(audited[0])
    (row,) = reproduce.rows_of(reproduce.Run("digits", "sizes-256", 0), calibrated, facts)
    assert row["released_auc"] == calibrated["audit"]["released_calibrated"]["last_period"]["offline"]["auc"]


@pytest.mark.pipeline
def test_runs_under_epsilon_tell_of_their_own_models(script, finished):
    """Their shadows were trained without noise, so what these leak is no figure of the run."""
    reproduce, _ = script
    result = metrics(finished[0])
    student, teacher = reproduce.rows_of(reproduce.Run("pneumoniamnist", "epsilon-8", 0), result, dict(FACTS))
    for row, target in ((student, "student_full"), (teacher, "teacher")):
        own = result["audit"][target]
        assert row["lira_auc"] == own["lira"]["auc"]
        assert row["lira_auc_ci"] == own["lira"]["auc_ci"]
        assert row["lira_offline_auc"] == own["lira_offline"]["auc"]
        assert row["rmia_auc"] == own["rmia"]["auc"]


def test_runs_under_epsilon_have_no_canaries_and_a_teacher_of_their_own(script, tmp_path, monkeypatch):
    reproduce, _ = script
    run, commands = reproduce.Run("pneumoniamnist", "epsilon-8", 0), []
    assert run.options == "--preset small --num-shadows 8 --epsilon 8 --seed 0"
    assert run.names == ["epsilon-8", "epsilon-8-teacher"]
    assert run._replace(seed=1).options == "--preset small --num-shadows 0 --epsilon 8 --seed 1"

    def command(flags, **_):
        commands.append(flags)
        folder = reproduce.folder_of(run, tmp_path) / "private"  # figures of real images are not released there
        folder.mkdir(parents=True)
        (folder / "metrics.json").write_text('{"a": 1}')

    monkeypatch.setattr(reproduce.subprocess, "run", command)
    (tmp_path / "pneumoniamnist.npz").touch()
    assert reproduce.make(run, tmp_path, tmp_path) == {"a": 1}
    assert len(commands) == 1


def row(dataset, variant, seed, **values):
    figures = ("accuracy", "auc", "cas_gap", "lira_auc", "lira_offline_auc", "rmia_auc", "tpr_at_1", "records")
    figures += ("canary_auc", "released_auc", "without_duplicates")
    return {"dataset": dataset, "variant": variant, "seed": seed, **dict.fromkeys(figures), **FACTS, **values}


def test_the_page_means_over_seeds(script):
    _, results_page = script
    rows = [row("digits", "gkd", k, accuracy=0.96 + 0.01 * k, cas_gap=0.01, seconds=60.0, records=k) for k in range(3)]
    rows += [row("digits", "sizes-256", 0, accuracy=0.9, seconds=120.0)]
    rows[1] |= {"lira_auc": 0.525, "records": None}
    rows[2]["without_duplicates"] = {"images": 500, "accuracy": 0.955, "auc": 0.99}
    text = results_page.page(rows)
    assert "| Student: soft labels, regenerated (GKD) | 1 | 500 | 95.5 % | 0.990 |" in text
    cells = "| 3 | 97.0 % ± 1.0 % |  | 1.00 ± 0.00 | 0.525 (of 1) |  |  |  | 2 (of 2) |  |  |"
    cells = f"| Student: soft labels, regenerated (GKD) {cells}"
    assert cells in text
    assert "| 256 | 1 | 90.0 % |" in text
    assert "Seeds 0, 1, 2; a kind, 2 threads, torch 2.13.0; 1.0 to 1.0 minutes a run; commit abc; 2026-11-28." in text
    assert results_page.NONE not in text
    assert results_page.NONE in results_page.page([])


def test_the_page_means_gaps_over_data_sets(script):
    _, results_page = script
    rows = [row("digits", "gkd", seed, cas_gap=gap) for seed, gap in enumerate((0.01, 0.02, 0.03))]
    rows += [row("retinamnist", "gkd", seed, cas_gap=gap) for seed, gap in enumerate((-0.01, 0.01))]
    rows += [row("digits", "private", 0, cas_gap=0.1), row("digits", "teacher", 0)]
    head, *lines = results_page.gaps(rows)
    assert head == ["", "scikit-learn's digits", "RetinaMNIST", "mean"]
    error = (0.01**2 / 3 + 2 * 0.01**2 / 2) ** 0.5 / 2  # variances of the means of 3 and 2 seeds, of a mean of two sets
    gkd = ["Student: soft labels, regenerated (GKD)", "2.00 (3)", "0.00 (2)", f"1.00 ± {100 * error:.2f}"]
    assert lines == [gkd]  # private lacks a data set, a Teacher has no gap
    one = results_page.gaps([*rows, row("retinamnist", "private", 0, cas_gap=0.0)])[-1]
    assert one[1:] == ["10.00 (1)", "0.00 (1)", "5.00"]


def test_what_is_done_is_kept(script, tmp_path, capsys, monkeypatch):
    reproduce, _ = script
    path, made = tmp_path / "rows.json", []
    run = reproduce.Run("digits", "private", 0)

    def make(each, folder, work):
        made.append(str(each))
        return {}

    monkeypatch.setattr(reproduce, "make", make)
    monkeypatch.setattr(
        reproduce,
        "rows_of",
        lambda each, values, facts: [
            row(each.dataset, name, each.seed, seconds=1.0, options=each.options) for name in each.names
        ],
    )
    for _ in range(2):
        assert reproduce.main(["--only", "digits/private/[01]", "--rows", str(path)]) == 0
    assert made == ["digits/private/0", "digits/private/1"]
    assert len(json.loads(path.read_text())) == 4
    assert reproduce.main(["--list", "--only", "digits/private/*", "--rows", str(path)]) == 0
    assert [line.split()[1] for line in capsys.readouterr().out.splitlines()[-3:]] == ["done", "done", "-"]
    rows = [{**each, "options": "--preset digits"} for each in reproduce.read_rows(path)]
    assert reproduce.state(run, rows) == "done with other options"
    reproduce.save(rows, path)
    assert reproduce.main(["--only", "digits/private/0", "--rows", str(path)]) == 0
    assert made[2:] == ["digits/private/0"]
    assert reproduce.state(run, reproduce.read_rows(path)) == "done"
    assert len(reproduce.read_rows(path)) == 4
    reproduce.save([each for each in reproduce.read_rows(path) if each["variant"] != "private-teacher"], path)
    assert reproduce.state(run, reproduce.read_rows(path)) == "done without private-teacher"
    assert reproduce.main(["--only", "digits/private/0", "--rows", str(path)]) == 0
    assert made[3:] == ["digits/private/0"]
    with pytest.raises(SystemExit):
        reproduce.main(["--only", "mnist/*"])


def test_a_private_run_of_medmnist_takes_the_generator_of_the_default_run(script, tmp_path, monkeypatch):
    reproduce, _ = script
    (tmp_path / "breastmnist.npz").touch()
    run, commands = reproduce.Run("breastmnist", "private", 1), []

    def command(words, **options):
        commands.append(words)
        release = Path(words[words.index("--out") + 1]) / "release"
        release.mkdir(parents=True)
        (release / "metrics.json").write_text("{}")

    monkeypatch.setattr(reproduce.subprocess, "run", command)
    accurate = run._replace(variant="accurate")
    for each in (accurate, run._replace(variant="default"), run, reproduce.Run("digits", "private", 0)):
        reproduce.make(each, tmp_path, tmp_path)
    alone, default, private, digits = commands
    assert "--generator" not in alone  # it trains what the run that is not there would have trained
    assert private[private.index("--generator") + 1] == default[default.index("--out") + 1]
    assert "--num-shadows 0" in " ".join(private)  # only seed 0 is audited
    assert "--generator" not in digits


def test_every_command_is_accepted(script):
    """Options that this version does not have would end the table after hours."""
    from kr_fast.cli import options, parser
    from kr_fast.recycling.config import RecycleConfig
    from kr_fast.recycling.presets import implied, preset

    reproduce, _ = script
    seen = parser.Parser(prog="kr-fast")
    seen.add_argument("--preset")
    options.add_flags(seen, RecycleConfig)
    for run in reproduce.runs():
        arguments = seen.parse_args(run.options.split())
        config = options.config_from(arguments, RecycleConfig, "run", preset, implied=implied)
        assert config.seed == run.seed
