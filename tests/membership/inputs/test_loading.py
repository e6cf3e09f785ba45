"""Signals from files: round trips, the trees of other tools as their code writes them, and damaged files."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from audit_cases import CLASSES, MODELS, data, logits_of

from kr_fast.membership import (
    Choices,
    TargetSignals,
    audit_signals,
    from_logits,
    load_lira_tree,
    load_npz,
    load_privacy_meter,
    save_npz,
)


def same(a, b):
    """Two AuditData hold the same tensors."""
    for left, right in (
        (a, b),
        *((a.targets[n], b.targets[n]) for n in a.targets),
        *zip(a.shadows.values(), b.shadows.values(), strict=True),
    ):
        for field in dataclasses.fields(left):
            x, y = getattr(left, field.name), getattr(right, field.name)
            if isinstance(x, torch.Tensor):
                assert torch.equal(x, y), field.name
            elif isinstance(x, dict) and x and isinstance(next(iter(x.values())), torch.Tensor):
                assert x.keys() == y.keys()
                assert all(torch.equal(x[key], y[key]) for key in x), field.name
            elif left is not a or field.name not in ("shadows", "targets"):
                assert x == y, field.name
    assert list(a.targets) == list(b.targets)
    assert list(a.shadows) == list(b.shadows)


def whole():
    """Everything that an .npz can hold."""
    logits, keep, labels, members = logits_of()
    z = torch.randn(MODELS + 1, 30, CLASSES, generator=torch.Generator().manual_seed(1))
    zy = torch.arange(30) % CLASSES
    images = torch.arange(80 * 16).reshape(80, 4, 4, 1).to(torch.uint8)
    result = from_logits(
        logits[:MODELS],
        keep,
        labels,
        target={"a": logits[MODELS], "b": logits[MODELS] / 2},
        members=members,
        population=(z[:MODELS], {"a": z[MODELS], "b": z[MODELS]}, zy),
        images=images,
    )
    return dataclasses.replace(result, synthetic={"set": images[:9]}, reference=images[9:20])


def test_npz_round_trip(tmp_path):
    before = whole()
    save_npz(tmp_path / "audit.npz", before)
    after = load_npz(tmp_path / "audit.npz")
    same(before, after)
    attacks = ("lira", "rmia", "entropy", "shadow_network", "nearest_synthetic")
    first, second = (audit_signals(each, Choices(attacks=attacks)) for each in (before, after))
    for name, scores in first.scores.items():
        for attack, value in scores.items():
            assert torch.equal(value, second.scores[name][attack]), (name, attack)


def test_npz_keeps_what_is_said_of_targets(tmp_path):
    """Order, kinds, the control, accuracies and notes; a file of somebody else has an order, and may say the rest."""
    logits, keep, labels, members = logits_of()
    phi = {
        name: from_logits(logits[:MODELS], keep, labels, target=logits[MODELS] * scale, members=members)
        for name, scale in (("teacher", 1.0), ("student", 0.5), ("control", 2.0))
    }
    facts = {
        "teacher": {"kind": "full", "accuracy": 0.75},
        "student": {"kind": "transfer", "shared": "the generator", "title": "the Student"},
        "control": {"kind": "full", "control": True},
    }
    before = dataclasses.replace(
        phi["teacher"],
        shadows={"halves": phi["teacher"].shadows["shadows"]},
        targets={
            name: TargetSignals(phi[name].targets["target"].signals, shadows="halves", **each)
            for name, each in facts.items()
        },
        augment="flip",
        notes=("one", "two"),
    )
    save_npz(tmp_path / "a.npz", before)
    after = load_npz(tmp_path / "a.npz")
    same(before, after)
    assert list(after.targets) == ["teacher", "student", "control"]
    assert (
        audit_signals(after, Choices(attacks=("lira",))).to_dict()
        == audit_signals(before, Choices(attacks=("lira",))).to_dict()
    )
    with np.load(tmp_path / "a.npz") as archive:
        arrays = dict(archive)
    about = json.loads(str(arrays.pop("about")))
    np.savez(tmp_path / "b.npz", **arrays)
    foreign = load_npz(tmp_path / "b.npz")
    assert [(name, each.kind, each.control) for name, each in foreign.targets.items()] == [
        ("teacher", "full", False),
        ("student", "transfer", False),
        ("control", "transfer", False),
    ]
    assert (foreign.augment, foreign.notes) == ("as given", ())
    for bad, words in (
        (np.array("no"), "about must be JSON with shadows, augment, notes, targets"),
        (np.zeros(2), "about must be JSON"),
        (np.array(json.dumps({"targets": {"teacher": {}}})), "about must describe the targets of the file, teacher, s"),
        (np.array(json.dumps({"targets": {"teacher": {"sort": 1}}})), "about must be JSON .* got teacher"),
        (np.array(json.dumps({"notes": 3})), "about must be JSON .* got notes 3"),
        (np.array(json.dumps(about).replace("transfer", "half")), "kind must be full or transfer, got half"),
    ):
        np.savez(tmp_path / "c.npz", **arrays, about=bad)
        with pytest.raises(ValueError, match=words):
            load_npz(tmp_path / "c.npz")
    for name in ("a/b", "..", "", "a\n", 3):
        with pytest.raises(ValueError, match="audit: target must have names that can be printed, without / and"):
            dataclasses.replace(before, targets={name: before.targets["teacher"]})


@pytest.mark.parametrize("queries", [None, 3])
def test_npz_of_logits(tmp_path, queries):
    """Plain arrays as somebody else would save them, with index lists; nothing of torch is needed to make them."""
    logits, keep, labels, members = logits_of(queries=queries)
    np.savez(
        tmp_path / "l.npz",
        keep=keep.numpy(),
        labels=labels.numpy().astype(np.int32),
        logits=logits[:MODELS].numpy(),
        members=members.nonzero()[:, 0].numpy(),
        non_members=np.arange(1, 41, 2),
        **{"target/model/logits": logits[MODELS].numpy()},
    )
    result = load_npz(tmp_path / "l.npz")
    expected = from_logits(
        logits[:MODELS],
        keep,
        labels,
        target={"model": logits[MODELS]},
        members=members,
        non_members=np.arange(1, 41, 2),
    )
    same(expected, result)
    assert result.count == 60


def test_npz_of_two_dimensional_signals_without_a_target(tmp_path):
    given = data()
    shadows = given.shadows["shadows"]
    np.savez(tmp_path / "p.npz", keep=shadows.keep.numpy(), phi=shadows.signals["phi"][0].numpy())
    result = load_npz(tmp_path / "p.npz")
    assert torch.equal(result.shadows["shadows"].signals["phi"], shadows.signals["phi"])
    assert result.targets == {}
    report = audit_signals(result, Choices(attacks=("lira",), targets="shadows"))
    assert report.leave_one_out["shadows"]["lira"]["auc"]["mean"] > 0.6


def lira_tree(folder, queries=2, what=("logits", "scores")):
    """As train.py, inference.py and score.py of the LiRA code leave it; scores by the formula of score.py."""
    logits, keep, labels, _ = logits_of(queries=queries)
    np.save(folder / "y_train.npy", labels.numpy())
    for m in range(MODELS):
        path = folder / f"experiment-{m}_{MODELS}"
        for name in what:
            (path / name).mkdir(parents=True)
        np.save(path / "keep.npy", keep[m].numpy())
        z = logits[m][:, None].numpy()  # [N, 1, A, C]
        p = np.exp(z - z.max(3, keepdims=True)).astype(np.float64)
        p /= p.sum(3, keepdims=True)
        right = p[np.arange(80), :, :, labels.numpy()].copy()
        p[np.arange(80), :, :, labels.numpy()] = 0
        score = np.log(right.mean(1) + 1e-45) - np.log(p.sum(3).mean(1) + 1e-45)
        for step in ("0000000050", "0000000100"):
            if "logits" in what:
                np.save(path / "logits" / f"{step}.npy", z if step.endswith("100") else 0 * z)
            if "scores" in what:
                np.save(path / "scores" / f"{step}.npy", score)
    return logits, keep, labels


def test_lira_tree(tmp_path):
    logits, keep, labels = lira_tree(tmp_path)
    result = load_lira_tree(tmp_path)
    assert torch.equal(result.shadows["shadows"].keep, keep)  # experiment-10 comes after experiment-9
    expected = from_logits(logits[:MODELS], keep, labels).shadows["shadows"]
    same_signals = {n: torch.equal(v, expected.signals[n]) for n, v in result.shadows["shadows"].signals.items()}
    assert all(same_signals.values())
    assert len(same_signals) == 4
    held_out = load_lira_tree(tmp_path, targets=["experiment-11_12"])
    assert torch.equal(held_out.members, keep[11])
    assert torch.equal(held_out.targets["experiment-11_12"].signals["phi"], expected.signals["phi"][:, :, 11])
    assert torch.equal(held_out.shadows["shadows"].keep, keep[:11])
    # Scores alone: phi to the rounding of exp in float32.
    (tmp_path / "scores").mkdir()
    lira_tree(tmp_path / "scores", what=("scores",))
    scores = load_lira_tree(tmp_path / "scores")
    assert torch.allclose(scores.shadows["shadows"].signals["phi"], expected.signals["phi"], atol=1e-4)
    assert any("flat above 103.6" in note for note in scores.notes)
    audit_signals(scores, Choices(attacks=("lira",), targets="shadows"))


def test_what_of_a_lira_tree_is_not_read_is_told(tmp_path):
    lira_tree(tmp_path, what=("logits", "scores"))
    (tmp_path / "experiment-5_12" / "keep.npy").unlink()
    result = load_lira_tree(tmp_path)
    assert len(result.shadows["shadows"].keep) == MODELS - 1
    assert result.notes == ("1 folder of experiments without keep.npy: not read",)
    for file in (tmp_path / "experiment-4_12" / "logits").glob("*.npy"):
        file.unlink()
    (tmp_path / "experiment-4_12" / "logits").rmdir()
    assert load_lira_tree(tmp_path).notes[0].endswith(f", as 1 of {MODELS - 1} experiments have no logits")


def test_the_last_step_of_a_lira_tree_is_the_largest_number(tmp_path):
    lira_tree(tmp_path)
    expected = load_lira_tree(tmp_path, step="0000000100").shadows["shadows"].signals["phi"]
    for path in tmp_path.glob("experiment-*/logits"):
        (path / "0000000050.npy").rename(path / "50.npy")
        (path / "0000000100.npy").rename(path / "100.npy")
    assert torch.equal(load_lira_tree(tmp_path).shadows["shadows"].signals["phi"], expected)


@pytest.mark.parametrize("what", [("logits",), ("scores",)])
@pytest.mark.parametrize("count", [79, 100])
def test_labels_of_another_length_are_refused(tmp_path, what, count):
    """Labels of more examples than keep has may be those of others: the first are not taken unasked."""
    _, _, labels = lira_tree(tmp_path, what=what)
    np.save(tmp_path / "y_train.npy", labels.repeat(2)[:count].numpy())
    with pytest.raises(ValueError, match=rf"y_train.npy must hold the 80 labels of keep.npy, got {count} labels"):
        load_lira_tree(tmp_path)


def test_privacy_meter(tmp_path):
    given = data()
    phi = given.shadows["shadows"].signals["phi"][0].double()
    phi[0, 0] = 30.0  # rounds to probability 1
    p = torch.sigmoid(phi)
    (tmp_path / "signals").mkdir()
    np.save(tmp_path / "memberships.npy", given.shadows["shadows"].keep.numpy())
    np.save(tmp_path / "signals" / "rmia_signals.npy", p.float().numpy())
    np.save(tmp_path / "signals" / "rmia_signals_pop.npy", p[:50].float().numpy())
    result = load_privacy_meter(tmp_path)
    assert torch.equal(result.members, given.shadows["shadows"].keep[0])
    rest = result.shadows["shadows"].signals["phi"][0]
    near = phi[:, 1:].abs() < 7  # float32 holds 1 - p to 6e-8, so phi to 6e-8 / (1 - p)
    assert torch.allclose(rest[near].double(), phi[:, 1:][near], atol=1e-4)
    assert result.targets["model 0"].signals["phi"][0, 0] == pytest.approx(17.33, abs=0.01)
    assert any("1 of 7200 had saturated" in note for note in result.notes)
    assert result.shadows["shadows"].population.shape == (1, 50, MODELS - 1)
    assert set(audit_signals(result, Choices(attacks=("lira", "rmia"))).figures["model 0"]) == {"lira", "rmia"}
    loss = torch.nn.functional.softplus(-phi)
    np.save(tmp_path / "signals" / "loss_signals.npy", loss.numpy())
    result = load_privacy_meter(tmp_path, target=None, signal="loss", name="loss")
    assert torch.allclose(result.shadows["shadows"].signals["phi"][0].double(), phi, rtol=1e-5, atol=1e-5)
    assert result.targets == {}


def test_damaged_files_are_refused(tmp_path):
    logits, keep, labels, members = logits_of()
    good = {
        "keep": keep,
        "labels": labels,
        "logits": logits[:MODELS],
        "members": members,
        "target/t/logits": logits[-1],
    }

    def refused(words, **changes):
        arrays = {key: value for key, value in {**good, **changes}.items() if value is not None}
        np.savez(tmp_path / "x.npz", **{key: np.asarray(value) for key, value in arrays.items()})
        with pytest.raises(ValueError, match=words):
            audit_signals(load_npz(tmp_path / "x.npz"))

    refused("signals must hold the key keep", keep=None)
    refused("keep must be bool, or hold 0 and 1 only, got int64 .* with 2 in .*x.npz", keep=2 * keep.long())
    refused(r"keep must have shape \[M, N\] = \[12, 80\], got \[11, 80\]", keep=keep[:11])
    # A pool that leaves examples out cuts all arrays: one that is too long must not pass for another's rows.
    pool = {"members": np.arange(20), "non_members": np.arange(30, 50)}
    longer = torch.cat([logits, logits[:, :7]], 1)
    refused(r"labels must be of the 80 examples of keep, got \[87\]", labels=torch.cat([labels, labels[:7]]), **pool)
    refused("logits must be of the 80 examples of keep", logits=longer[:MODELS], **pool)
    refused("target/t/logits must be of the 80", **{"target/t/logits": longer[-1]}, **pool)
    refused("images must be of the 80", images=np.zeros((87, 2, 2, 1), np.uint8), **pool)
    refused("target/t/phi must be of the 80", **{"target/t/phi": np.zeros((1, 87), np.float32)}, **pool)
    refused("phi must be of the 80", logits=None, phi=np.zeros((1, 87, MODELS), np.float32), **pool)
    refused("target/t/answers must be of the 80", **{"target/t/answers": np.zeros((87, 3), np.float32)}, **pool)
    refused(r"keep must have shape \[M, N\], got \[80\]", keep=keep[0])
    refused(r"keep must have shape \[M, N\], got \[\]", keep=np.array(True))
    refused("signals must hold labels beside logits", labels=None)
    refused("labels must be integers", labels=labels.float())
    refused("signals must hold known keys only .*, got logit in", logit=logits)
    refused("logits must be logits, from before the softmax", logits=logits[:MODELS].softmax(-1))
    refused("logits must not hold NaN", logits=torch.full_like(logits[:MODELS], torch.nan))
    refused("target/t/logits must be logits", **{"target/t/logits": logits[-1].softmax(-1)})
    refused("members must be bool", members=None)
    refused("labels must hold numbers", labels=np.array(["a"] * 80))
    (tmp_path / "x.npz").write_bytes(b"no")
    with pytest.raises(ValueError, match=r"signals must be a readable .npz file, got .*x.npz"):
        load_npz(tmp_path / "x.npz")
    with open(tmp_path / "x.npz", "wb") as file:
        np.save(file, keep.numpy())
    with pytest.raises(ValueError, match=r"signals must be a readable .npz file, got .*x.npz \(it is an .npy file\)"):
        load_npz(tmp_path / "x.npz")
    with pytest.raises(FileNotFoundError):
        load_npz(tmp_path / "absent.npz")
    with pytest.raises(FileNotFoundError, match="LiRA tree must hold experiment-"):
        load_lira_tree(tmp_path)
    (tmp_path / "tree").mkdir()
    lira_tree(tmp_path / "tree")
    with pytest.raises(ValueError, match="targets of the LiRA tree must be among experiment-0_12 to experiment-11_12"):
        load_lira_tree(tmp_path / "tree", targets=["experiment-12_12"])
    with pytest.raises(ValueError, match="targets must be one model"):
        load_lira_tree(tmp_path / "tree", targets=["experiment-0_12", "experiment-1_12"])
    np.save(tmp_path / "tree" / "experiment-3_12" / "keep.npy", keep[3].numpy() / 2)
    with pytest.raises(ValueError, match="experiment-3_12/keep.npy must be bool, or hold 0 and 1 only, got float64"):
        load_lira_tree(tmp_path / "tree")
    np.save(tmp_path / "tree" / "experiment-3_12" / "keep.npy", np.array(True))
    with pytest.raises(ValueError, match=r"experiment-3_12/keep.npy must have shape \[N\], got \[\]"):
        load_lira_tree(tmp_path / "tree")
    np.save(tmp_path / "tree" / "experiment-3_12" / "keep.npy", keep[3, :9].numpy())
    with pytest.raises(ValueError, match=r"experiment-3_12/keep.npy must have shape \[80\] as the first, got \[9\]"):
        load_lira_tree(tmp_path / "tree")
    (tmp_path / "signals").mkdir()
    np.save(tmp_path / "memberships.npy", keep[0].numpy())
    with pytest.raises(ValueError, match=r"memberships.npy must have shape \[M, N\], got \[80\]"):
        load_privacy_meter(tmp_path)
    np.save(tmp_path / "memberships.npy", keep.numpy())
    np.save(tmp_path / "signals" / "rmia_signals.npy", np.full((80, MODELS), 1.5, np.float32))
    with pytest.raises(ValueError, match=r"rmia_signals.npy must lie in \[0, 1\]"):
        load_privacy_meter(tmp_path)
    with pytest.raises(ValueError, match=r"target must be a model in \[0, 12\), got 12"):
        load_privacy_meter(tmp_path, target=12)
    two = dataclasses.replace(data(), targets={"t": TargetSignals({"phi": torch.zeros(1, 600)})})
    with pytest.raises(ValueError, match="data must hold one set of shadows, got 2"):
        save_npz(tmp_path / "y.npz", dataclasses.replace(two, shadows={**two.shadows, "more": two.shadows["shadows"]}))
