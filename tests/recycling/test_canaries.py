"""Twins with canaries in a run: what they are trained on, that they go on, what is reported, what is refused."""

import dataclasses
import shutil

import numpy as np
import pytest
import torch
import yaml
from toy_runs import context_of, metrics, toy
from toy_runs import new_context as context

from kr_fast.data import Split, to_float
from kr_fast.ensemble import fit, load_shadows
from kr_fast.membership import attack_canaries
from kr_fast.recycling.config import RecycleConfig
from kr_fast.recycling.preflight import checks, memory_and_disk, networks, time_estimate
from kr_fast.recycling.stages import canaries, teacher
from kr_fast.report.sections import canaries as section
from kr_fast.runtime import seeds
from kr_fast.runtime.errors import UserError
from kr_fast.runtime.storage import files


@pytest.mark.parametrize(
    ("words", "options"),
    [
        ("be 0, or even and at least 10, got 11", {"audit_canaries": 11}),
        ("be 0, or even and at least 10, got 8", {"audit_canaries": 8}),
        (r"be 0 without an audit \(num_shadows 0\), got 10", {"audit_canaries": 10, "num_shadows": 0}),
        (
            "be 0 with teacher, a given one, which cannot be trained again, got 10",
            {"audit_canaries": 10, "teacher": "t"},
        ),
    ],
)
def test_bad_options_are_refused(words, options):
    with pytest.raises(UserError, match=f"run: audit_canaries must {words}"):
        RecycleConfig(**options)


def test_too_many_for_the_data_are_refused(tmp_path):
    with pytest.raises(
        UserError, match="run: audit_canaries must be at most 11, a tenth of 119 training images, got 12"
    ):
        checks.options(context(tmp_path, (119, 10, 10), audit_canaries=12))
    words = "run: audit_canaries must be 0 where 6, a tenth of 68 training images, are fewer than 10, got 10"
    with pytest.raises(UserError, match=words):
        checks.options(context(tmp_path, (68, 10, 10), audit_canaries=10))
    with pytest.raises(UserError, match="run: audit_canaries must be 0 where there is no other class"):
        checks.options(context(tmp_path, (119, 10, 10), classes=1, audit_canaries=10))


def test_time_memory_and_disk_are_counted(tmp_path):
    """Seconds where every rate is 1, by hand: twins see all training images but half of the canaries."""
    one = time_estimate.Rates(*[1.0] * len(dataclasses.fields(time_estimate.Rates)))
    options = {"teacher_epochs": 5, "teacher_batch_size": 8, "images": 40, "periods": 3, "student_epochs": 2}
    made = context(tmp_path, (100, 9, 10), **options, student_batch_size=16, audit_canaries=10, student_shadows=0)
    threads = min(torch.get_num_threads(), 4)
    turns, start = 4 // threads, time_estimate.WORKER if threads > 1 else 0
    seconds = time_estimate.stages(made, one)
    assert seconds["canaries"] == start + turns * 5 * (11 * 8 + 9)
    assert seconds["canary_students"] == 0
    both = dataclasses.replace(made, config=dataclasses.replace(made.config, student_shadows=4))
    assert time_estimate.stages(both, one)["canary_students"] == start + turns * 3 * (2 * 32 + 9)
    assert time_estimate.costs(both, one)[0].twins == turns
    assert "canaries" in time_estimate.costs(both, one)[1]
    sizes = networks.sizes(both)
    disk = memory_and_disk.stages(memory_and_disk.disk_needs(both, sizes))
    assert disk["canaries"] == 4 * sizes.teacher.state
    assert disk["canary_students"] == 4 * sizes.student.state
    assert {"canaries", "canary_students"} <= memory_and_disk.stages(memory_and_disk.memory_needs(both, sizes)).keys()


@pytest.fixture(scope="module")
def twins(finished, tmp_path_factory):
    """The toy run, whose audit is still to come, with twins whose training was cut off twice."""
    out = tmp_path_factory.mktemp("canaries") / "run"
    shutil.copytree(finished[0], out)
    values = yaml.safe_load((out / "config.yaml").read_text())
    (out / "config.yaml").write_text(yaml.safe_dump({**values, "audit_canaries": 20}))
    journal = files.read_json(out / "journal.json", dict)
    files.write_json(out / "journal.json", {key: journal[key] for key in journal if key not in ("audit", "report")})
    run, threads, save = context_of(out), torch.get_num_threads(), files.save_tensors
    torch.set_num_threads(1)
    try:
        for stage, folder in (
            (canaries.run_teachers, run.folder.twin_teachers),
            (canaries.run_students, run.folder.twin_students),
        ):
            with pytest.MonkeyPatch.context() as patch, pytest.raises(OSError, match="full"):
                patch.setattr(files, "save_tensors", lambda *a: full(save, *a))
                stage(run)
            assert [path.name for path in folder.glob("*.safetensors")] == ["model-000.safetensors"]
            before = (folder / "model-000.safetensors").stat().st_mtime_ns
            stage(run)
            assert (folder / "model-000.safetensors").stat().st_mtime_ns == before
    finally:
        torch.set_num_threads(threads)
    return run


def full(save, path, tensors):
    if path.name == "model-001.safetensors":
        raise OSError("the disk is full")
    save(path, tensors)


@pytest.mark.pipeline
def test_a_twin_is_trained_as_the_teacher_with_its_canaries(twins):
    """By hand: all training images, canaries by their coin and with their wrong label, the epoch by validation."""
    drawn, train, labels = canaries.drawn(twins), twins.data.train, twins.data.train.labels.clone()
    assert bool((drawn.labels != labels[drawn.index]).all())
    assert torch.equal(drawn.keep, torch.from_numpy(np.load(twins.folder.twin_teachers / "keep.npy")))
    labels[drawn.index] = drawn.labels
    left_out = set(drawn.index[~drawn.keep[2]].tolist())
    inside = [n for n in range(len(train)) if n not in left_out]
    assert len(inside) == len(train) - 10
    model, c = twins.seeded(twins.config.teacher_arch, twins.config.teacher_width, "twin teacher", 2), twins.config
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as the fixture; sums are taken in the same order
    try:
        options = {"seed": seeds.derive(c.seed, "twin teacher", 2), "val": twins.data.val}
        fit(model, Split(train.images[inside], labels[inside]), teacher.recipe(twins), **options)
    finally:
        torch.set_num_threads(threads)
    saved = files.load_tensors(twins.folder.twin_teachers / "model-002.safetensors")
    for name, value in model.state_dict().items():
        assert torch.equal(saved[name], value), name


@pytest.mark.pipeline
def test_figures_are_those_of_the_twins_own_answers(twins):
    """phi by its definition from logits in float64; the run that goes on reports them in JSON, page and screen."""
    done = toy(twins.out, "--audit-canaries", "20")
    audit = metrics(twins.out)["audit"]
    found, drawn, c = audit["canaries"], canaries.drawn(twins), twins.config
    x = to_float(twins.data.train.images[drawn.index]).double()
    for name, folder in (("teacher", twins.folder.twin_teachers), ("student", twins.folder.twin_students)):
        loaded = load_shadows(twins.make_network(c.teacher_arch, c.teacher_width), folder)
        phi = []
        for model in loaded.array.models:
            logits = model.double()(x).detach()
            own = logits.gather(1, drawn.labels[:, None])
            others = logits.scatter(1, drawn.labels[:, None], -torch.inf).logsumexp(1)
            phi.append(own[:, 0] - others)
        seed = seeds.derive(c.seed, "attack on canaries")
        expected = attack_canaries(torch.stack(phi, 1)[None], drawn.keep, seed=seed)
        assert found[name]["auc"] == pytest.approx(expected["auc"], abs=0.011)  # one pair of 100 that rounding swaps
        target = {"teacher": "teacher", "student": "student_full"}[name]
        assert found[name]["own"]["auc"] == audit[target]["lira"]["auc"]
        assert f"canaries of the {name.capitalize()}" in done.stdout
    assert found["count"] == 20
    assert found["teacher"]["models"] == found["student"]["models"] == 4
    assert found["power"] is (found["teacher"]["auc_ci"][0] > max(audit["teacher"]["lira"]["auc_ci"][1], 0.5))
    assert found["power"] or any("no proof" in line for line in audit["setting"]["warnings"])
    text = (twins.out / "release" / "report.md").read_text()
    assert "## Mislabelled canaries" in text
    assert section.verdict(found) in text
    assert section.explanation(found) in text
    assert {"canaries", "canary_students"} <= metrics(twins.out)["stages"].keys()
    assert [path.name for path in twins.folder.state.iterdir()] == ["trials.json"]
