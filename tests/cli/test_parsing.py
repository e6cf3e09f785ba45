"""Habits of a command line: no abbreviations, near names suggested, YAML as people write it, one line an error."""

import dataclasses
import os
import re
import subprocess
import sys

import pytest
from cli_cases import refused
from hypothesis import given, settings
from hypothesis import strategies as st

from kr_fast.cli import main, options
from kr_fast.data.readers.columns import USUAL
from kr_fast.membership.audit.config import AuditConfig
from kr_fast.recycling.config import RecycleConfig
from kr_fast.recycling.presets import PRESETS
from kr_fast.runtime import progress
from kr_fast.runtime.errors import UserError


@pytest.fixture
def config(monkeypatch):
    """``config(*arguments)``: what ``kr-fast run`` would have started with."""
    result = []

    class Stop(Exception):
        pass

    def recycle(config):
        result.append(config)
        raise UserError("stopped")

    monkeypatch.setattr("kr_fast.recycling.pipeline.recycle", recycle)

    def run(*arguments):
        assert main(["run", *map(str, arguments)]) == 2
        return result.pop()

    return run


def stopped(capsys, *arguments):
    """(exit code, stdout, stderr) of a command that argparse ends."""
    with pytest.raises(SystemExit) as stop:
        main([*map(str, arguments)])
    shown = capsys.readouterr()
    return stop.value.code, shown.out, shown.err


def test_options_of_several_things_may_be_given_several_times(config):
    """Of sources and trackers none is dropped unnoticed; of widths the last ones count."""
    given = config("--generator", "a", "--generator", "b", "c", "--log-with", "wandb", "--log-with", "mlflow")
    assert (given.generator, given.log_with) == (("a", "b", "c"), ("wandb", "mlflow"))
    assert config("--generator-widths", 8, 8, "--generator-widths", 16).generator_widths == (16,)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("run", "--epoch", "4"), "kr-fast run: --epoch is not an option of this command (did you mean --teacher-epo"),
        (("run", "--student-epoch", "4"), "(did you mean --student-epochs"),
        (("run", "--epoch=4"), "--epoch is not an option of this command"),
        (("run", "--temprature", "4"), "(did you mean --temperature?)"),
        (("run", "--preset", "toy", "digits"), "digits is not an option of this command"),
        (("run", "--zzzz"), "--zzzz is not an option of this command; kr-fast run --help lists the options"),
        (("run", "--images", "many"), "kr-fast run: --images: invalid int value: 'many'"),
        (("run", "--images", "1.5"), "invalid int value"),
        (("run", "--images", "1e400"), "invalid int value"),
        (("run", "--images"), "--images: expected one argument"),
        (("audit", "--member", "train"), "(did you mean --members or --non-members or --random-members?)"),
        (("synthesize", "--guidance", "2"), "(did you mean --guidance-scale?)"),
        (("bench", "synthesis", "--step", "2"), "(did you mean --steps?)"),
        (("info", "--jason"), "(did you mean --json?)"),
        (("rum",), "invalid choice: 'rum'"),
        (("run", "--SEED", "1"), "--SEED is not an option of this command (did you mean --seed?)"),
        (("run", "--teacher_flip"), "(did you mean --teacher-flip?)"),
        (("run", "--teacher-flip", "true"), "true is not an option of this command (--teacher-flip takes no value)"),
        (("run", "--teacher-flip=true"), "--teacher-flip/--no-teacher-flip: takes no value, got 'true'"),
        (("--quiet", "run", "--zzzz"), "kr-fast run: --zzzz is not an option"),
        (("--zzzz", "run"), "--zzzz is not an option of this command"),
    ],
)
def test_what_is_no_option_is_one_line_with_a_suggestion(capsys, tmp_path, monkeypatch, arguments, words):
    monkeypatch.chdir(tmp_path)
    code, out, err = stopped(capsys, *arguments)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert words in err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("command", [(), ("run",), ("audit",), ("synthesize",)])
def test_a_bare_command_prints_its_help_and_starts_nothing(capsys, tmp_path, monkeypatch, command):
    monkeypatch.chdir(tmp_path)
    code, out, _ = stopped(capsys, *command)
    assert code == 2
    assert out.startswith(f"usage: {' '.join(('kr-fast', *command))} [")
    assert not list(tmp_path.iterdir())


def test_help_has_groups_choices_and_every_option(capsys):
    for command, config in (("run", RecycleConfig), ("audit", AuditConfig)):
        code, out, _ = stopped(capsys, command, "--help")
        assert code == 0
        for title in (*config.GROUPS.values(), "what is shown"):
            assert f"\n{title}:\n" in out
        for field in dataclasses.fields(config):
            if field.name == "command":  # which every command sets by itself
                continue
            assert f"--{field.name.replace('_', '-')} " in out or f"--{field.name.replace('_', '-')}," in out
            for choice in field.metadata.get("choices") or ():
                assert choice in out
        assert set(config.GROUPS) <= {field.name for field in dataclasses.fields(config)}


def test_help_and_written_file_begin_with_what_most_users_set(capsys):
    """Both have the order of ``in_groups``; every option tells its default."""
    assert len(RecycleConfig.FIRST) == 10
    for command, config in (("run", RecycleConfig()), ("audit", AuditConfig(signals="x"))):
        _, out, _ = stopped(capsys, command, "--help")
        options_of = out[out.index("--config FILE") : out.index("what is shown:")]
        flags = re.findall(r"^  --([a-z-]+)", options_of, re.MULTILINE)
        names = [flag.replace("-", "_") for flag in flags]
        assert names[: len(getattr(config, "FIRST", ()))] == list(getattr(config, "FIRST", ()))
        written = [name for name in config.record() if name != "command"]
        assert written == [name for name in names if name != "out"]
        assert options_of.count("default:") == len(names) == len(written) + 1


def test_help_names_every_preset_and_every_usual_column(capsys):
    _, out, _ = stopped(capsys, "run", "--help")
    of_flag = dict(re.findall(r"^  --([a-z-]+) (.*?)(?=^  --|^\S)", out, re.MULTILINE | re.DOTALL))
    for flag, names in {"preset": tuple(PRESETS), **USUAL}.items():
        words = set(re.findall(r"\w+", of_flag[flag.replace("_", "-")]))
        assert words >= set(names), flag
    for command, left_out in (("distil", ("guaranteed",)), ("generator", ("guaranteed", "private", "accurate"))):
        _, out, _ = stopped(capsys, command, "--help")
        words = out.partition("--preset PRESET")[2].partition("--dry-run")[0]
        assert not set(left_out) & set(re.findall(r"\w+", words)), command


def test_yaml_as_people_write_it(tmp_path, config):
    path = tmp_path / "c.yaml"
    path.write_text(
        "preset: toy\nteacher-learning-rate: 1e-3\nteacher_weight_decay: 5E-4\nimages: 1e3\nseed: '7'\n"
        "temperature: 3\ntune-noise-scale: [1e-1, 2]\nteacher-flip: yes\n"
    )
    result = config("--config", path, "--images", "2e2")
    assert (result.teacher_learning_rate, result.teacher_weight_decay, result.temperature) == (1e-3, 5e-4, 3.0)
    assert (result.images, result.seed, result.tune_noise_scale, result.teacher_flip) == (200, 7, (0.1, 2.0), True)
    assert result.teacher_arch == "resnet8"
    assert config("--config", path, "--preset", "digits").teacher_arch == "resnet14"
    path.write_text("# nothing yet\n")
    assert config("--config", path) == RecycleConfig()
    path.write_text("<<: {seed: 3, images: 4.0}\nseed: 1.0e+1\nout: ~/runs\n")
    result = config("-v", "--config", path)
    assert (result.seed, result.images, result.out) == (10, 4, os.path.expanduser("~/runs"))
    assert config("--seed", 1, "--out=~/runs").out == os.path.expanduser("~/runs")


def test_what_is_shown_may_be_said_before_the_command(capsys, monkeypatch):
    said = []
    monkeypatch.setattr(progress, "quiet", said.append)
    assert main(["--quiet", "--debug", "info"]) == 0
    assert main(["info", "--quiet"]) == 0
    assert said == [True, True]
    capsys.readouterr()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("temprature: 3", "run: config must hold known keys only, got temprature (did you mean temperature?)"),
        (
            "epochs: 3",
            "got epochs (did you mean teacher_epochs or tune_student_epochs or trial_epochs or student_epochs?)",
        ),
        ("preset: huge", "preset must be one of digits, small, private, accurate, guaranteed, toy, or several"),
        ("preset: [toy]", "preset must be one of digits, small, private, accurate, guaranteed, toy, or several"),
        ("seed: 1\nseed: 2", "the key seed stands twice"),
        ("teacher-flip: true\nteacher_flip: false", "hold each key once, with dashes or underscores"),
        ("seed: 1e-3", "run: seed must be of type int, got '1e-3'"),
        ("seed:", "run: seed must be of type int, got None"),
        ("images: 1e400", "run: images must be of type int, got '1e400'"),
        ("temperature: .nan", "run: temperature must be in [0.01, 1000], got nan"),
        ("temperature: .inf", "run: temperature must be in [0.01, 1000], got inf"),
        ("temperature: {a: 1}", "run: temperature must be of type float, got {'a': 1}"),
        ("1: 2", "run: config must hold known keys only, got 1"),
        ("? [1, 2]\n: 3", "run: config must be a YAML file"),
        ("a: &a [*a]", "run: config must hold known keys only, got a"),
        ("!!python/object/apply:os.system ['true']", "run: config must be a YAML file"),
        ("audit: !!bool perhaps", "run: config must be a YAML file"),
        ("seed: !!int ''", "run: config must be a YAML file"),
        ("seed: !!timestamp 3", "run: config must be a YAML file"),
    ],
)
def test_bad_yaml_is_one_line(tmp_path, capsys, text, words):
    (tmp_path / "c.yaml").write_text(text)
    assert words in refused(capsys, "run", "--out", tmp_path / "run", "--config", tmp_path / "c.yaml")
    assert not (tmp_path / "run").exists()


def test_a_config_that_is_no_file(tmp_path, capsys):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path, tmp_path / "pipe"):
        assert "run: config must be a regular file" in refused(capsys, "run", "--config", path)
    (tmp_path / "latin").write_bytes(b"seed: \xff")
    assert "run: config must be a YAML file" in refused(capsys, "run", "--config", tmp_path / "latin")


TEXT = b"data: digits\nseed: 3\ngenerator_widths: [32, 64]\nlabels: soft\nnum-shadows: 4\nteacher_mixup: 0.5\n"
TOKENS = [
    b"!!int ",
    b"!!float ''",
    b"!!omap [a]",
    b"!!set {a}",
    b"<<: [*a]\n",
    b"&a ",
    b"*a",
    b"? [1]\n: 2\n",
    b"1:20:3",
]
TOKENS += [b"2001-02-30", b"~", b"---\n", b"|\n", b"%YAML 9\n---\n", b"\t", b"\0", b"\xed\xa0\x80", b'"\\x', b"{", b""]


@settings(max_examples=150, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 120), st.integers(0, 9), st.sampled_from(TOKENS)), min_size=1, max_size=3))
def test_any_file_is_a_configuration_or_one_line(tmp_path_factory, steps):
    content, path = bytearray(TEXT), tmp_path_factory.getbasetemp() / "any.yaml"
    for at, count, token in steps:
        at = content.find(b" ", at % len(TEXT)) + 1  # where a value begins, mostly
        content[at : at + count] = token
    path.write_bytes(content)
    text = "run: "
    try:
        options.build(RecycleConfig, options.read_yaml(str(path), "run"), where="run")
    except UserError as error:
        text = str(error)
    assert text.startswith("run: ")
    assert "\n" not in text


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=6),
    lambda each: st.lists(each, max_size=3) | st.dictionaries(st.text(max_size=3), each, max_size=2),
    max_leaves=4,
)


@settings(max_examples=200, deadline=None)
@given(st.sampled_from([field.name for field in dataclasses.fields(RecycleConfig)]), VALUES)
def test_any_value_of_any_key_is_taken_or_refused_by_name(name, value):
    try:
        config = options.build(RecycleConfig, {name: value}, where="run")
    except UserError as error:
        text = str(error)
    else:
        text = f"run: {type(getattr(config, name)).__name__}"
    assert text.startswith("run: ")


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (UserError("run: a must be b,\n got c"), 2, "kr-fast: run: a must be b, got c\n"),
        (OSError(28, "No space left on device", "x.npy"), 2, "No space left on device: 'x.npy'"),
        (MemoryError(), 2, "kr-fast: there is not enough memory (MemoryError)"),
        (KeyError("x"), 1, "kr-fast: unexpected error, KeyError: 'x' (--debug shows where)"),
        (AssertionError(), 1, "kr-fast: unexpected error, AssertionError: AssertionError"),
        (
            ValueError("KR_FAST_CPU_ISA must be one of scalar on this machine, got x"),
            2,
            "kr-fast: KR_FAST_CPU_ISA must",
        ),
        (KeyboardInterrupt(), 130, "kr-fast: interrupted\n"),
    ],
)
@pytest.mark.parametrize("debug", [False, True])
def test_errors_are_one_line_and_a_traceback_if_asked_for(capsys, monkeypatch, error, code, words, debug):
    def fails(arguments):
        raise error

    monkeypatch.setattr("kr_fast.cli.info.run", fails)
    assert main(["info", *["--debug"][: int(debug)]]) == code
    shown = capsys.readouterr().err
    assert words in shown
    assert ("Traceback" in shown) == (debug and code != 130)
    assert debug or shown.count("\n") == 1


@pytest.mark.parametrize(
    ("command", "run", "words"),
    [
        (["run", "--preset", "toy"], "run.run", "kr-fast: interrupted; the same command continues where it stopped\n"),
        (["bench", "loss"], "bench.run_cases", "kr-fast: interrupted\n"),
    ],
)
def test_an_interrupted_command_says_whether_it_continues(capsys, monkeypatch, command, run, words):
    def interrupted(arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(f"kr_fast.cli.{run}", interrupted)
    assert main(command) == 130
    assert capsys.readouterr().err == words


def test_output_that_nobody_reads_ends_quietly():
    """The reader is gone before anything is written, so that the first write fails."""
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-m", "kr_fast", "info"]
    with os.fdopen(write, "w") as out:
        done = subprocess.run(command, stdout=out, stderr=subprocess.PIPE, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_bars_are_shown_on_terminals_only(capsys, monkeypatch):
    monkeypatch.delenv("KR_FAST_PROGRESS", raising=False)

    def shown():
        with progress.bar(3, "part") as bar:
            bar.update(3)
        return "part" in capsys.readouterr().err

    assert not shown()  # a file, or pytest's capture
    monkeypatch.setenv("KR_FAST_PROGRESS", "1")
    assert shown()
    progress.quiet(True)
    assert not shown()
    progress.quiet(False)
    monkeypatch.setenv("KR_FAST_PROGRESS", "0")
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    assert not shown()
    monkeypatch.delenv("KR_FAST_PROGRESS")
    assert shown()
