"""The audit end to end on models small enough to memorise in a second, and its refusals."""

import dataclasses
import json

import pytest
import torch
from audit_cases import audit, left_out
from torch import nn

import kr_fast
from kr_fast.data import Augment, Split
from kr_fast.ensemble import ModelArray, Shadows, TrainConfig, train_shadows
from kr_fast.ensemble.training.recipe import fit
from kr_fast.membership import CATALOG, Auxiliary, Choices, ShadowSignals, Target, lira, overfitted
from kr_fast.runtime.errors import UserError

COUNT = 160
CONFIG = TrainConfig(epochs=25, batch_size=16, learning_rate=0.05, weight_decay=0.0, augment=Augment())


def make_model():
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 4))


def make_data(count=COUNT, seed=0):
    """Classes overlap widely, so that only memory tells a member."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, 4, (count,), generator=generator)
    means = 96 + 16 * labels.view(-1, 1, 1, 1)
    noise = 60 * torch.randn(count, 8, 8, 1, generator=generator)
    return (means + noise).clamp(0, 255).to(torch.uint8), labels


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    """Networks of this size lose time to a second thread, and much of it where the machine is busy."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def scene():
    """(images, labels, members, overfitted target, target that saw none of the pool, 16 shadows)."""
    images, labels = make_data()
    members = torch.arange(COUNT) % 2 == 0
    torch.manual_seed(0)
    target, stranger = make_model(), make_model()
    fit(target, Split(images[members], labels[members]), CONFIG, seed=1)
    fit(stranger, Split(*make_data(seed=5)), CONFIG, seed=2)
    shadows = train_shadows(make_model, images, labels, num_models=16, config=CONFIG, seed=3)
    return images, labels, members, target, stranger, shadows


def test_memory_is_found_and_its_absence_too(scene):
    images, labels, members, target, stranger, shadows = scene
    report = kr_fast.audit({"target": target, "stranger": stranger}, shadows, images, labels, members)
    auc = {name: {attack: curve.auc for attack, curve in curves.items()} for name, curves in report.curves.items()}
    assert auc["target"]["lira"] > auc["target"]["lira_offline"] > 0.6
    assert auc["target"]["lira"] > auc["target"]["loss"] > 0.6
    for curve in report.curves["stranger"].values():
        low, high = curve.auc_interval(0.999)
        assert low <= 0.5 <= high
    assert report.warnings == ()
    assert (report.num_shadows, report.members, report.non_members, report.variance) == (16, 80, 80, "fixed")


def test_a_control_that_no_attack_finds_is_reported(scene):
    images, labels, members, _, stranger, shadows = scene
    few = Shadows(ModelArray(shadows.array.models[:4]), shadows.keep[:4])
    report = audit(stranger, few, images, labels, torch.roll(members, 1), attacks=("loss", "lira_offline"))
    assert any("there is no positive control" in line for line in report.warnings)
    assert any("only 1 shadow on a side" in line for line in report.warnings)


def test_positive_control(scene, tmp_path):
    """An overfitted model is found; one that memorised nothing of the pool shows that the audit has no power."""
    images, labels, members, _, stranger, shadows = scene
    options = {"like": CONFIG, "seed": 4, "path": tmp_path / "control.safetensors", "description": None}
    control = overfitted(make_model, images, labels, members, **options)
    seen = control(kr_fast.data.to_float(images[members])).argmax(1)
    assert float((seen == labels[members]).float().mean()) > 0.95  # members overlap widely: this is memory
    again = overfitted(make_model, images, labels, members, **options)
    assert all(torch.equal(a, b) for a, b in zip(control.state_dict().values(), again.state_dict().values()))  # noqa: B905
    other = dataclasses.replace(CONFIG, batch_size=CONFIG.batch_size + 1)
    for words, changes in (
        ("data must equal", {"images": 255 - images}),
        ("data must equal", {"labels": labels.flip(0)}),
        ("members must equal", {"members": ~members}),
        ("seed must equal 4 of the control in .*, got 5", {"seed": 5}),
        (f"batch_size must equal {CONFIG.batch_size} of", {"like": other}),
        ("architecture must equal .*weight", {"make_model": lambda: nn.Sequential(nn.Flatten(), nn.Linear(64, 5))}),
    ):
        given = {"make_model": make_model, "images": images, "labels": labels, "members": members, **options}
        with pytest.raises(ValueError, match=f"overfitted: {words}"):
            overfitted(**{**given, **changes})
    (tmp_path / "control.json").unlink()
    with pytest.raises(ValueError, match="overfitted: path must have control.json beside it"):
        overfitted(make_model, images, labels, members, **options)
    report = kr_fast.audit({"student": stranger}, shadows, images, labels, members, control=control)
    assert report.setting["control"]["found"]
    assert report.setting["control"]["by_primary"]
    assert report.setting["targets"]["control"]["control"]
    assert report.warnings == ()
    report = kr_fast.audit({"student": stranger}, shadows, images, labels, members, control=stranger)
    assert not report.setting["control"]["found"]
    assert any("positive control, an overfitted model: this audit has no power" in line for line in report.warnings)
    with pytest.raises(ValueError, match="target must not be named control"):
        kr_fast.audit({"control": stranger}, shadows, images, labels, members, control=control)


def test_every_attack_runs_on_models(scene):
    """All of the catalogue on an overfitted target: the ones that look at members from near find it."""
    images, labels, members, target, stranger, shadows = scene
    report = kr_fast.audit(
        {"target": Target(target, accuracy=0.6), "stranger": stranger},
        shadows,
        images,
        labels,
        members,
        choices=Choices(attacks=list(CATALOG), augment="flip"),
        auxiliary=Auxiliary(population=make_data(60, seed=9), synthetic=images[members][::2].flip(0)),
    )
    released = {name for name, attack in CATALOG.items() if attack.released}
    assert set(report.figures["target"]) == set(report.figures["stranger"]) == set(CATALOG) - released
    assert set(report.figures["synthetic"]) == released
    for name in CATALOG:  # a sign turned in any entry ends below
        assert report.curves["synthetic" if name in released else "target"][name].auc > 0.5, name
    for name in (*report.figures["synthetic"], "shadow_network", "label_only", "rmia", "base", "attack_r"):
        where = "synthetic" if name in released else "target"
        assert report.curves[where][name].auc_interval()[0] > 0.5, name
    for name, curve in report.curves["stranger"].items():
        low, high = curve.auc_interval(0.9999)  # of 27 intervals none may miss by chance
        assert low <= 0.5 <= high, name
    row = report.figures["target"]["lira"]
    assert row["aop"] == kr_fast.membership.aop(0.6, row["auc"])
    assert "aop" not in report.figures["stranger"]["lira"]
    test = report.comparison["stranger"]["lira"]
    assert test["difference"] == pytest.approx(row["auc"] - report.figures["stranger"]["lira"]["auc"])
    assert test["p"] < 1e-6
    assert report.setting["targets"]["stranger"]["kind"] == "transfer"
    assert any("stranger is attacked with shadows that were not made as it was" in n for n in report.setting["notes"])


def test_full_shadows_and_what_they_share(scene):
    images, labels, members, target, stranger, shadows = scene
    few = Shadows(ModelArray(shadows.array.models[:8]), shadows.keep[:8])
    targets = {
        "teacher": target,
        "student": Target(stranger, shared="the generator", title="the Student"),
        "other": stranger,
    }
    sets = {"teacher": shadows, "student": few}
    report = audit(targets, sets, images, labels, members, attacks=("lira", "loss"))
    facts = report.setting["targets"]
    assert [facts[name]["kind"] for name in ("teacher", "student", "other")] == ["full", "full", "transfer"]
    assert [facts[name]["title"] for name in ("teacher", "student", "other")] == ["", "the Student", ""]
    assert [facts[name]["shadows"] for name in ("teacher", "student", "other")] == ["teacher", "student", "teacher"]
    assert "the shadow pipelines of the Student share the generator with its own" in report.setting["notes"]
    assert not torch.equal(report.scores["student"]["lira"], report.scores["other"]["lira"])
    assert report.setting["shadow_sets"]["student"]["models"] == 8


def test_indices_and_a_split_off_population(scene):
    images, labels, members, target, _, shadows = scene
    whole = audit(target, shadows, images, labels, members, attacks=("lira", "rmia"), population=0.25)
    assert (whole.members, whole.non_members) == (80, 60)
    inside, outside = members.nonzero()[:, 0], (~members).nonzero()[:50, 0]
    pool = (inside.tolist(), outside.numpy())
    part = audit(target, shadows, images, labels, pool[0], non_members=pool[1], attacks=("loss",))
    assert (part.members, part.non_members) == (80, 50)
    loss = nn.functional.cross_entropy(ModelArray([target])(images)[0].double(), labels, reduction="none")
    expected = -loss[torch.cat([inside, outside]).sort().values]
    assert torch.equal(part.scores["target"]["loss"].argsort(), expected.argsort())


def test_a_split_off_population_is_of_whole_groups(scene):
    """20 groups of 4 members, and as many of non-members."""
    images, labels, members, target, _, shadows = scene
    groups = torch.arange(COUNT) // 8 * 2 + torch.arange(COUNT) % 2
    options = {"population": 0.25, "attacks": ("loss",)}
    report = audit(target, shadows, images, labels, members, groups=groups, **options)
    assert (report.members, report.non_members) == (80, 60)
    assert groups[report.data.index].unique(return_counts=True)[1].tolist() == [4] * 35
    whole = torch.where(members, groups, 99)  # all non-members are of one group
    with pytest.raises(UserError, match="^audit: population must leave some groups of non-members"):
        audit(target, shadows, images, labels, members, groups=whole, **options)


def test_exposed_members_have_their_own_numbers(scene, tmp_path):
    """Where examples are left out, or split off, a member is named by its number among the images given."""
    images, labels, members, target, _, shadows = scene
    inside, outside = members.nonzero()[20:, 0], (~members).nonzero()[30:, 0]
    options = {"non_members": outside, "attacks": ("loss",), "population": 0.2}
    report = audit(target, shadows, images, labels, inside, **options)
    assert len(report.data.index) == 60 + 40
    rows = report.exposed(60)["target"]
    assert sorted(row["index"] for row in rows) == inside.tolist()
    assert all(row["label"] == labels[row["index"]] for row in rows)
    loss = nn.functional.cross_entropy(ModelArray([target])(images)[0].double(), labels, reduction="none")
    assert [row["score"] for row in rows] == sorted((row["score"] for row in rows), reverse=True)
    assert rows[-1]["index"] == int(inside[loss[inside].argmax()])
    assert report.arrays()["index"].tolist() == report.data.index.tolist()
    assert torch.equal(report.data.images, images[report.data.index])
    assert report.write(tmp_path, show_records=True) == tmp_path / "private" / "audit.html"
    assert not (tmp_path / "release" / "audit.html").exists()
    result = json.loads((tmp_path / "private" / "exposed.json").read_text())
    assert [row["index"] for row in result["target"]] == [row["index"] for row in rows[:16]]


def test_a_target_that_was_made_elsewhere(scene):
    images, labels, members, target, _, shadows = scene
    other = Target(target, kind="transfer")
    report = kr_fast.audit(other, shadows, images, labels, members, choices=Choices(attacks=("loss",)))
    assert report.to_dict()["setting"]["targets"]["target"]["kind"] == "transfer"
    assert any("a lower bound on what it leaks" in note for note in report.setting["notes"])


def test_bad_choices_are_refused_before_a_model_is_asked(scene):
    images, labels, members, _, _, shadows = scene

    class Silent(nn.Module):
        def forward(self, x):
            raise AssertionError("asked")

    z = make_data(20, seed=9)
    for words, options in (
        ("primary must be one of the attacks, loss", {"attacks": ("loss",), "primary": "lira"}),
        ("attacks must hold names among", {"attacks": ("shokri",)}),
        ("targets must be given or shadows", {"targets": "all"}),
        ("level must be in", {"level": 1.0}),
        ("priors must be in", {"priors": (0.0,)}),
        ("population must be a share", {"population": 0.001}),
        ("population must be .images, labels. or a share in .0, 1., got 3 values", {"population": (*z, z[1])}),
        ("images of the population must be uint8 .N, 8, 8, 1.", {"population": (z[0].float(), z[1])}),
        ("images of the population must be uint8 .N, 8, 8, 1.", {"population": (z[0][:, :4], z[1])}),
        ("labels of the population must be integers .20.", {"population": (z[0], z[1][:-1])}),
        ("population must be further examples", {"population": (images[~members], labels[~members])}),
        ("synthetic must have names other than .*, got details", {"synthetic": {"details": images}}),
        ("synthetic synthetic must be uint8", {"synthetic": images / 255}),
        ("reference must be uint8", {"reference": images[:, :4]}),
        (
            "population must be .images, labels. with random_members: a share takes from the non-members only, got 0.2",
            {"population": 0.2, "random_members": True},
        ),
        (
            "audit: members must be about half of the examples: each included by a fair coin, got 80 of 100",
            {"random_members": True, "non_members": (~members).nonzero()[:20, 0]},
        ),
        ("rmia needs a population of further non-members", {"attacks": ("lira", "rmia")}),
        ("attack_p needs a population", {"attacks": ("attack_p",)}),
        ("rmia needs a population", {"primary": "rmia"}),
        ("nearest_synthetic needs images and a synthetic set", {"attacks": ("nearest_synthetic",)}),
        ("generated_density needs reference", {"attacks": ("generated_density",), "synthetic": images[:4]}),
        ("lira needs shadows that held some", {"attacks": ("lira",), "members": [0, 1], "non_members": [2, 3]}),
    ):
        keep = shadows.keep.clone()
        keep[:, :4] = False
        given = {"members": members, **options}
        with pytest.raises(ValueError, match=words):
            audit(Silent(), Shadows(shadows.array, keep), images, labels, **given)
    with pytest.raises(ValueError, match="nearest_synthetic needs members"):
        silent = Shadows(ModelArray([Silent()] * len(keep)), keep)
        options = {"targets": "shadows", "attacks": ("loss", "nearest_synthetic"), "synthetic": images[:4]}
        audit(None, silent, images, labels, **options)
    z = torch.cat([z[0], images[:3]]), torch.cat([z[1], labels[:3]])
    report = audit(make_model(), shadows, images, labels, members, attacks=("loss",), population=z)
    assert any(note.startswith("3 images of the population are among those") for note in report.setting["notes"])


def test_signals_continue_in_their_folder(scene, tmp_path):
    images, labels, members, target, _, shadows = scene
    options = {"attacks": ("lira", "loss"), "path": tmp_path}
    first = audit(target, shadows, images, labels, members, **options)
    assert (tmp_path / "shadows" / "phi.npy").exists()
    again = audit(target, shadows, images, labels, members, **options)
    assert torch.equal(first.scores["target"]["lira"], again.scores["target"]["lira"])


def test_report_is_strict_json(scene):
    images, labels, members, target, _, shadows = scene
    result = json.loads(json.dumps(kr_fast.audit(target, shadows, images, labels, members).to_dict(), allow_nan=False))
    row = result["target"]["lira"]
    assert set(row) >= {"auc", "auc_ci", "tpr_at_fpr", "balanced_accuracy", "advantage", "epsilon", "role"}
    assert row["auc_ci"][0] < row["auc"] <= row["auc_ci"][1]
    assert set(row["tpr_at_fpr"]) == {"0.1", "0.01", "0.001", "0.0001"}
    assert not row["tpr_at_fpr"]["0.001"]["point_claim"]  # 80 non-members cannot carry it
    assert row["tpr_at_fpr"]["0.001"]["tpr"] is None
    assert result["setting"]["num_shadows"] == 16


def test_scores_are_those_of_the_attack(scene):
    images, labels, members, target, _, shadows = scene
    report = kr_fast.audit(target, shadows, images, labels, members, choices=Choices(augment="flip"))
    phi = shadows.array.signals(images, labels, augment="flip")["phi"]
    seen = ModelArray([target]).signals(images, labels, augment="flip")["phi"]
    for attack, variant in (("lira", "online"), ("lira_offline", "offline")):
        expected = lira(phi, shadows.keep, variant=variant, variance="fixed", target=seen)[0]
        assert torch.equal(report.scores["target"][attack], expected)
    assert torch.equal(report.scores["target"]["loss"], seen[:, :, 0].double().mean(0))


def test_every_shadow_is_a_target(scene):
    """Leave-one-out over the shadows: each is attackable from the others."""
    images, labels, _, _, _, shadows = scene
    report = kr_fast.audit(None, shadows, images, labels, choices=Choices(attacks=("lira", "loss"), targets="shadows"))
    result = report.leave_one_out["shadows"]["lira"]
    phi = shadows.array.signals(images, labels)["phi"]
    partner = left_out(ShadowSignals(shadows.keep, {"phi": phi}))
    scores = lira(phi, shadows.keep, variance="fixed", partner=partner)
    aucs = [kr_fast.membership.roc(row, keep).auc for row, keep in zip(scores, shadows.keep, strict=True)]
    assert result["auc"]["each"] == aucs
    assert min(aucs) > 0.6
    assert result["auc"]["sd"] > 0
    assert report.figures == {}


def test_examples_without_shadows_are_logged(scene, caplog):
    images, labels, _, _, _, shadows = scene
    phi = shadows.array.signals(images, labels)["phi"]
    keep = shadows.keep.clone()
    keep[:, 0] = True
    with caplog.at_level("WARNING", logger="kr_fast"):
        lira(phi, keep, variance="fixed")
    assert "16 (target, example) pairs have too few shadows" in caplog.text


class Softmax(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner(x).softmax(1)


def test_bad_input(scene):
    images, labels, members, target, _, shadows = scene

    def refused(words, target=target, shadows=shadows, images=images, labels=labels, members=members, **options):
        with pytest.raises((ValueError, TypeError), match=words):
            audit(target, shadows, images, labels, members, **options)

    refused(r"target target must return logits \(remove its softmax\)", target=Softmax(target))
    soft = Shadows(ModelArray([Softmax(model) for model in shadows.array.models]), shadows.keep)
    refused("shadow 0 of shadows must return logits", shadows=soft)
    refused("attacks must hold names among lira, lira_offline, .*, got shokri", attacks=("shokri",))
    refused(r"rmia needs a population of further non-members \(population=...\), got rmia", attacks=("rmia",))
    refused("attacks must hold at least one name", attacks=())
    refused("primary must be one of the attacks, loss, got lira", attacks=("loss",), primary="lira")
    refused("targets must be given or shadows, got all", targets="all")
    refused("level must be in", level=1.0)
    refused("population must be a share that leaves some of 80 non-members", population=0.001)
    refused("population must be .images, labels. or a share", population=1.0)
    refused("be one model, got 16", target=shadows.array)
    refused(
        r"members must be bool \[160\], or indices in \[0, 160\) without repetition, got 161",
        members=torch.arange(161) % 160,
    )
    refused("members must be bool .*, got indices from 0 to 160", members=[0, 160])
    refused("members must be bool .*, got float32 .* with .0.5", members=members / 2)
    refused("members must be bool .* or indices, got None", members=None)
    refused(
        "members and non_members must be disjoint, got 2 examples in both, 3", members=[1, 3, 5], non_members=[3, 5]
    )
    refused(r"members must be bool \[160\]", members=members[:-1])
    refused("members must hold members and non-members, got 160 of 160", members=torch.ones(COUNT, dtype=torch.bool))
    refused("members must hold members and non-members, got 0 of 160", members=torch.zeros(COUNT, dtype=torch.bool))
    refused(r"labels must be integers \[160\]", labels=labels[:-1])
    refused(r"labels must lie in \[0, 4\)", labels=labels + 1)
    refused(r"shadows must have keep \[16, 160\]", shadows=Shadows(shadows.array, shadows.keep.T))
    refused("keep must be bool", shadows=Shadows(shadows.array, shadows.keep / 2))
    two = Shadows(ModelArray(shadows.array.models[:2]), torch.stack([members, ~members]))
    refused("keep must give some example 2 shadows out", shadows=two)
    refused("target must hold at least one model", target={})
    broken = make_model()
    broken[1].weight.data *= 1e38
    broken[3].weight.data *= 1e38
    refused("logits of target target must not hold NaN", target=broken)
