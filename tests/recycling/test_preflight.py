"""Everything that would fail later fails before the first stage, in one line that names the option."""

import dataclasses
import math

import cli_cases
import numpy as np
import pytest
import torch
import yaml
from toy_runs import new_context as context

from kr_fast.cli import main
from kr_fast.data import Split
from kr_fast.models import classifier
from kr_fast.recycling import preflight
from kr_fast.recycling.commands import COMMANDS
from kr_fast.recycling.config import RecycleConfig
from kr_fast.recycling.preflight import checks, memory_and_disk, networks, time_estimate
from kr_fast.recycling.presets import preset
from kr_fast.recycling.stages import dataset, teacher
from kr_fast.runtime.errors import UserError
from kr_fast.runtime.storage import files
from kr_fast.runtime.text import duration

pytestmark = pytest.mark.usefixtures("released_run")


def npz(path, counts=(20, 10, 10), classes=2, side=8, channels=1, inside=False):
    """Images of noise, brighter by class; ``inside``: every validation image is a training image."""
    draw, result = np.random.default_rng(0), {}
    for which, count in zip(("train", "val", "test"), counts, strict=True):
        labels = np.arange(count) % classes
        noise = draw.integers(0, 90, (count, side, side, channels))
        result[f"{which}_images"] = (noise + 40 * labels[:, None, None, None]).astype(np.uint8)
        result[f"{which}_labels"] = labels
    if inside:
        result |= {f"val_{what}": result[f"train_{what}"][: counts[1]] for what in ("images", "labels")}
    np.savez(path, **result)
    return path


BAD = {
    "levels": (["--generator-widths", *["8"] * 5], "generator_widths must be at most 4 widths for images of 8 x 8"),
    "one value a channel": (
        ["--generator-widths", "8", "8", "8", "1", "--micro-batch", "1"],
        "generator_widths must make a UNet for images of 8 x 8 in batches of 1 (generator_batch_size, micro_batch)",
    ),
    "teacher_shift": (["--teacher-shift", "8"], "teacher_shift must be below the shorter side of the images, 8, got 8"),
    "student_shift": (["--student-shift", "30"], "student_shift must be below the shorter side of the images, 8"),
    "images": (["--images", "1e12"], "images must be in [1, 1000000000], got 1000000000000"),
    "student_arch": (["--student-arch", "resnet9"], "student_arch must be one of resnet8, resnet14"),
    "temperature": (["--temperature", "inf"], "temperature must be in [0.01, 1000], got inf"),
    "rotate": (["--teacher-rotate", "nan"], "teacher_rotate must be in [0, 180], got nan"),
    "weight_decay": (["--teacher-weight-decay", "-1"], "teacher_weight_decay must be in [0, 1], got -1.0"),
    "guidance": (["--guidance-scale", "-3"], "guidance_scale must be in [0, 100], got -3.0"),
    "disk": (
        ["--generator-widths", "1024", "1024", "--generator-steps", "4000000", "--checkpoints", "1000000"],
        "checkpoints must be smaller, as files take",
    ),
    "width": (
        ["--student-width", "4096", "--student-shadows", "10000", "--num-shadows", "10000"],
        "num_shadows must be smaller, as stage audit needs",
    ),
}


def test_validation_images_of_one_class_have_no_auc(tmp_path):
    run = context(tmp_path, data=npz(tmp_path / "set.npz"), teacher_choose="auc")
    one = dataclasses.replace(run.data, val=Split(run.data.val.images, torch.zeros_like(run.data.val.labels)))
    with pytest.raises(UserError, match="run: teacher_choose must be accuracy where all validation images are of one"):
        checks.splits(dataclasses.replace(run, data=one))


@pytest.mark.parametrize("name", BAD)
def test_bad_options_are_refused_before_anything_is_written(tmp_path, capsys, name):
    flags, words = BAD[name]
    source = npz(tmp_path / "set.npz")
    for dry in ([], ["--dry-run"]):
        arguments = ["run", "--quiet", "--preset", "toy", "--data", source, "--out", tmp_path / "run", *flags, *dry]
        assert f"run: {words}" in cli_cases.refused(capsys, *arguments)
    assert [path.name for path in tmp_path.iterdir()] == ["set.npz"]


def test_images_that_fill_the_memory(tmp_path):
    """A period of 1e9 images of 224 x 224 x 3 is 150 TB; batches of a million are too large as well."""
    alone = {"side": 224, "channels": 3, "student_shadows": 0}  # as many shadow Students at a time as threads
    with pytest.raises(UserError, match=r"run: images must be smaller, as stage gkd needs 150.\d TB of memory, most"):
        preflight.check(context(tmp_path, (4, 2, 2), **alone, images=10**9))
    with pytest.raises(UserError, match=r"run: micro_batch must be smaller, as stage (tuning|gkd) needs .* TB"):
        preflight.check(context(tmp_path, (4, 2, 2), side=224, channels=3, micro_batch=10**6))
    with pytest.raises(UserError, match=r"run: generator_batch_size must be smaller, as stage generator needs .* TB"):
        preflight.check(context(tmp_path, (4, 2, 2), side=224, channels=3, generator_batch_size=10**6))


def test_processes_share_a_batch_evenly(tmp_path):
    given = context(tmp_path, generator_batch_size=32)
    three = dataclasses.replace(given, runtime=dataclasses.replace(given.runtime, world_size=3))
    with pytest.raises(UserError, match="run: generator_batch_size must be a multiple of 3 processes, got 32"):
        checks.options(three)


def test_halves_of_very_few_images(tmp_path):
    """Of five images and four shadows some seeds leave a shadow less than two."""
    result = []
    for seed in range(12):
        try:
            checks.splits(context(tmp_path, (4, 2, 1), seed=seed))
        except UserError as error:
            result.append(str(error))
    assert 0 < len(result) < 12
    assert result[0].startswith("run: num_shadows must leave each shadow model two of the 5 training and test images")


@pytest.mark.parametrize(
    ("widths", "side", "batch", "fits"),
    [((1,), 8, 1, True), ((8, 3, 12, 1), 8, 1, False), ((8, 3, 12, 1), 8, 2, True), ((3, 8), 9, 3, True)],
)
def test_what_is_taken_makes_a_step(tmp_path, widths, side, batch, fits):
    """What passes makes a step of the generator and a call of the sampler; what does not has no such step."""
    made = context(tmp_path, side=side, generator_widths=widths, generator_batch_size=batch, micro_batch=batch)
    if fits:
        assert networks.sizes(made).generator.parameters > 0
        assert time_estimate.denoising(made)(batch) == time_estimate.STEPS * batch
        assert time_estimate.sampling(made)(batch) == 2 * batch
        return
    with pytest.raises(UserError, match="run: generator_widths must make a UNet"):
        networks.sizes(made)
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        time_estimate.denoising(made)(batch)


def test_sizes_are_those_of_real_passes(tmp_path):
    """Bytes saved for the backward and of the largest output, counted in a real pass of the same network."""
    made = context(tmp_path, student_arch="resnet14", student_width=5)
    model, saved, outputs = made.network("resnet14", 5), {}, []
    own = {value.data_ptr() for value in (*model.parameters(), *model.buffers())}

    def keep(value):
        if value.data_ptr() not in own:
            saved[value.untyped_storage().data_ptr()] = value.untyped_storage().nbytes()
        return value

    for part in model.modules():
        if not list(part.children()):
            part.register_forward_hook(lambda _, __, y: outputs.append(y.nbytes))
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda value: value):
        model(torch.zeros(64, 1, 8, 8))
    result = networks.sizes(made).student
    assert result.parameters == sum(value.numel() for value in model.parameters())
    assert result.state == sum(value.nbytes for value in model.state_dict().values())
    assert result.saved == pytest.approx(sum(saved.values()) / 64, rel=0.05)  # beside statistics of each batch
    assert result.widest == max(outputs) / 64


def factories(tmp_path, monkeypatch):
    """Teachers for ``--teacher given:...``; in images of :func:`npz` the mean of the pixels tells the class."""
    (tmp_path / "given.py").write_text(
        "import torch\n"
        "class Bright(torch.nn.Module):\n"
        "    def __init__(self, sign=1., end=None, bad=None):\n"
        "        super().__init__()\n"
        "        self.scale = torch.nn.Parameter(torch.tensor([-sign, sign]))\n"
        "        self.end = end or torch.nn.Identity()\n"
        "        if bad: self.scale.data[0] = bad\n"
        "    def forward(self, x):\n"
        "        return self.end(20 * (x.mean((1, 2, 3)) + .49)[:, None] * self.scale)\n"
        "def good(): return Bright()\n"
        "def swapped(): return Bright(-1.)\n"
        "def blind(): return Bright(1e-30, torch.nn.Linear(2, 2))\n"
        "def softmaxed(): return Bright(1., torch.nn.Softmax(1))\n"
        "def broken(): return Bright(1., None, float('nan'))\n"
    )
    monkeypatch.syspath_prepend(tmp_path)


def test_a_given_teacher_is_asked_before_anything_begins(tmp_path, capsys, monkeypatch):
    factories(tmp_path, monkeypatch)
    source = npz(tmp_path / "set.npz", (20, 40, 10))
    start = ["run", "--quiet", "--preset", "toy", "--data", source, "--out", tmp_path / "run", "--teacher"]
    for name, words in {
        "swapped": "run: teacher must be no worse than guessing, which is right about 0.500 of the validation images, "
        "got 0.000 (are its classes in the order 0, 1?)",
        "softmaxed": "run: teacher must return logits (remove its softmax)",
        "broken": "that are finite, got NaN or inf, which its scale holds",
    }.items():
        assert words in cli_cases.refused(capsys, *start, f"given:{name}")
    state_dict = classifier("resnet8", num_classes=2, in_channels=1, width=4, image_size=8).state_dict()
    state_dict["head.bias"] += math.inf
    files.save_tensors(tmp_path / "teacher.safetensors", state_dict)
    words = cli_cases.refused(capsys, *start, tmp_path / "teacher.safetensors")
    assert "run: teacher must" in words
    assert "finite" in words
    assert not (tmp_path / "run").exists()


def test_a_teacher_at_chance_is_told():
    """Beside the largest class: 30 of 50 images; one-sided 5 % of the binomial is 36 of 50 and more."""
    val = Split(torch.zeros(50, 8, 8, 1, dtype=torch.uint8), (torch.arange(50) < 30).long())
    assert teacher.chance(37 / 50, val) is None
    assert teacher.chance(0.70, val) == (
        "the Teacher is right about 0.700 of 50 validation images, not clearly more than one that always names the "
        "largest class (0.600)"
    )


def test_notes_say_what_does_not_stop_a_run(tmp_path, monkeypatch):
    factories(tmp_path, monkeypatch)
    given = context(tmp_path, (20, 9, 4), classes=2, teacher="given:blind")
    train, val = given.data.train, given.data.val
    part = Split(torch.cat([val.images[:5], train.images[:4]]), val.labels)
    lacking = Split(given.data.test.images, torch.ones(4, dtype=torch.int64))
    shared = dataclasses.replace(given, data=dataclasses.replace(given.data, val=part, test=lacking))
    assert len(dataset.population(shared)) == 5
    notes = preflight.check(shared)
    assert notes[:2] == [
        "the test split lacks 1 of 2 classes (0)",
        "4 validation images, which are training or test images too, are left out of the population",
    ]
    assert "validation images, not clearly more than one that always names the largest class (0.556); it is" in notes[2]
    whole = Split(train.images[:9], train.labels[:9])
    whole = dataclasses.replace(given, data=dataclasses.replace(given.data, val=whole))
    words = "every validation image is a training or test image too: the run chooses by them, and its audit has no pop"
    assert checks.splits(whole)[0].startswith(words)
    good = context(tmp_path, (70, 30, 10), teacher_batch_size=71)
    assert checks.splits(good) == ["teacher_batch_size is 71: each step takes all 70 images"]


def test_dry_run_prints_and_writes_nothing(tmp_path, capsys):
    """Standard output is a YAML file that --config takes, and means the same run."""
    source = npz(tmp_path / "set.npz")
    flags = ["--preset", "toy", "--data", source, "--out", tmp_path / "run", "--teacher-epochs", "3"]
    flags += ["--student-choose", "auc"]
    assert main(["run", *map(str, flags), "--dry-run", "--quiet"]) == 0
    text = capsys.readouterr().out
    assert [path.name for path in tmp_path.iterdir()] == ["set.npz"]
    result = yaml.safe_load(text)
    options = {"data": source, "out": tmp_path / "run", "teacher_epochs": 3, "student_choose": "auc"}
    expected = RecycleConfig(**{**preset("toy"), **options})
    assert RecycleConfig(**result) == expected
    for words in (
        "data: set, images of 8 x 8 x 1: 20 train, 10 val, 10 test; 2 classes",
        "data: uint8 pixels in [0, 129]",
        "Teacher: resnet8 of width 4, 5,006 parameters",
        "generator: UNet2DModel of widths 8 8, ",
        "note: teacher_batch_size is 64: each step takes all 20 images",
        "Estimate.",
    ):
        assert f"# {words}" in text
    rows = [line[2:].split("  ") for line in text.splitlines()[-13:]]
    names = [next(filter(None, row)).strip() for row in rows]
    stages = "teacher generator checkpoints tuning gkd student shadows shadow_students audit report"
    assert names == ["stage", *stages.split(), "in all", "free"]


def test_time_is_counted_step_by_step(tmp_path):
    """Seconds of the stages where every rate is 1, against counts by hand."""
    one = time_estimate.Rates(*[1.0] * len(dataclasses.fields(time_estimate.Rates)))
    options = yaml.safe_load("""{
        teacher_epochs: 5, teacher_batch_size: 8, generator_steps: 6, generator_batch_size: 32, checkpoints: 3,
        micro_batch: 16, num_inference_steps: 2, guidance_scale: 1.0, tune_noise_scale: [1.0, 1.1],
        tune_guidance_scale: [1.5], tune_num_inference_steps: [4], tune_confidence: [], trial_images: 20,
        trial_periods: 2, trial_epochs: 3, images: 40, periods: 3, student_epochs: 2, student_batch_size: 16,
        num_shadows: 4, student_shadows: -1, audit_control: true}""")
    made = context(tmp_path, (20, 9, 10), **options)
    trial = 2 * (3 * 16 + 9)  # a short Student: periods x (epochs x one whole batch of 16 out of 20 + validation)
    result = time_estimate.stages(made, one)
    assert result["teacher"] == 5 * 16 + 5 * 9
    assert result["generator"] == 6 * 32 + 3 * (1 + 256 * 2)  # of each checkpoint 256 images are drawn
    assert result["checkpoints"] == 3 * (
        1 + 2 * 32 * 2 + trial
    )  # two micro-batches of 16 for 20 images, two steps each
    assert result["tuning"] == 3 * (1 + trial) + 2 * 32 * 2 + 2 * 32 * 2 * 2 + 2 * 32 * 4
    drawn = 3 * 48 * (2 + 4 * 2) / 2  # two steps as configured, four guided ones at most
    assert result["gkd"] == drawn + 3 * (2 * 32 + 9)
    turns = 4 // min(torch.get_num_threads(), 4)
    workers = time_estimate.WORKER if torch.get_num_threads() > 1 else 0
    assert result["shadows"] == workers + turns * 5 * 8  # half of 30 images is one batch of 8
    assert result["shadow_students"] == workers + turns * 3 * (2 * 32 + 9)  # their images are the Student's
    control = 60 * 16 / torch.get_num_threads()  # one of the models of the worker processes
    assert result["audit"] == time_estimate.ATTACKS + (4 + 4 + 3) * 30 + control


@pytest.mark.parametrize(
    ("command", "timed"),
    [
        ("generator", {"setup", "sampled", "generator"}),
        ("run", {field.name for field in dataclasses.fields(time_estimate.Rates)}),
    ],
)
def test_only_steps_of_the_command_are_timed(tmp_path, command, timed):
    made = context(tmp_path, num_shadows=4, student_shadows=4, audit_control=True)
    made = dataclasses.replace(made, config=COMMANDS[command].of(made.config) if command != "run" else made.config)
    rates = dataclasses.asdict(time_estimate.measure(made))
    assert {name for name, value in rates.items() if value} == timed


def test_amounts_and_durations():
    amounts = [memory_and_disk.amount(each) for each in (0, 999, 12_345, 3.2e6, 1e9, 7e16)]
    assert amounts == ["0 B", "999 B", "12.3 kB", "3.2 MB", "1.0 GB", "70000.0 TB"]
    assert [duration(each) for each in (0.25, 119, 121, 7200, 200_000)] == [
        "0.2 s",
        "119.0 s",
        "2.0 min",
        "2.0 h",
        "2.3 days",
    ]
