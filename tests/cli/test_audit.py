"""``kr-fast audit``: models and saved signals to a report; continued, not repeated; bad input is one line, code 2."""

import functools
import json

import cli_cases
import numpy as np
import pytest
import torch
import yaml
from audit_cases import data, logits_of
from torch import nn

from kr_fast.cli import main
from kr_fast.data import Split, load, load_uncut
from kr_fast.ensemble import TrainConfig, fit
from kr_fast.membership import save_npz
from kr_fast.membership.audit import loading
from kr_fast.membership.audit.config import AuditConfig
from kr_fast.membership.audit.examples import read_examples
from kr_fast.runtime.storage import files, manifest

FACTORY = """
from torch import nn
def make(num_classes, in_channels):
    return nn.Sequential(nn.Flatten(), nn.Linear(64 * in_channels, 32), nn.ReLU(), nn.Linear(32, num_classes))
def wide(num_classes):
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, num_classes))
def wrong(): return nn.Sequential(nn.Flatten(), nn.Linear(64, 9))
def other(): return nn.Sequential(nn.Flatten(), nn.Linear(32, 3))
def soft(num_classes): return nn.Sequential(nn.Flatten(), nn.Linear(64, num_classes), nn.Softmax(1))
def number(): return 3
"""
RECIPE = [
    "--num-shadows",
    "4",
    "--epochs",
    "12",
    "--batch-size",
    "16",
    "--learning-rate",
    "0.05",
    "--weight-decay",
    "0",
]


# One thread: shadows are then trained here and not in workers, which take seconds to start.
pytestmark = pytest.mark.usefixtures("no_progress", "released_run", "one_thread")


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A folder with data.npz (90 / 30 / 60 images whose classes overlap), mynet.py and weights of an overfitted net."""
    folder = tmp_path_factory.mktemp("world")
    (folder / "mynet.py").write_text(FACTORY)
    generator = np.random.default_rng(0)
    arrays = {}
    for which, count in (("train", 90), ("val", 30), ("test", 60)):
        labels = generator.integers(0, 3, count)
        pixels = 90 + 20 * labels[:, None, None] + 60 * generator.standard_normal((count, 8, 8))
        arrays |= {f"{which}_images": pixels.clip(0, 255).astype(np.uint8), f"{which}_labels": labels}
    np.savez(folder / "data.npz", **arrays)
    splits = load_uncut(folder / "data.npz")[2]
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 3))
    recipe = TrainConfig(epochs=30, batch_size=16, learning_rate=0.05, weight_decay=0.0)
    fit(model, Split(splits["train"].images, splits["train"].labels), recipe, seed=0)
    torch.save(model.state_dict(), folder / "net.pt")
    torch.manual_seed(1)
    torch.save(
        nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, 3)).state_dict(), folder / "wide.pt"
    )
    torch.save(nn.Sequential(nn.Flatten(), nn.Linear(64, 3)).state_dict(), folder / "soft.pt")
    np.save(folder / "synthetic.npy", arrays["train_images"][:40])
    return folder


def base(world, *more):
    start = ["--model", "mynet:make", "--checkpoint", world / "net.pt", "--data", world / "data.npz"]
    return ["audit", *map(str, [*start, *RECIPE, *more])]


refused = functools.partial(cli_cases.refused, aside="saves")


def test_classifier_to_report_and_again(world, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(world)
    out = tmp_path / "audit"
    models = ["--checkpoint", f"teacher={world / 'net.pt'}", f"student={world / 'wide.pt'}@mynet:wide"]
    flags = ["--synthetic", world / "synthetic.npy", "--augment", "flip", "--every-shadow"]
    command = base(world, "--out", out, *flags, *models)
    assert main(command) == 0
    shown = capsys.readouterr().out
    assert "lira *" in shown
    assert f"report: {out / 'release' / 'audit.html'}" in shown
    result = json.loads((out / "release" / "audit.json").read_text())
    setting = result["setting"]
    assert (setting["members"], setting["non_members"]) == (90, 60)
    assert setting["shadow_sets"]["shadows"]["population"] == 30  # the validation split
    assert setting["shadow_sets"]["shadows"]["models"] == 4
    assert [facts["kind"] for facts in setting["targets"].values()] == ["full", "transfer", "full", "released"]
    assert list(setting["targets"]) == ["teacher", "student", "control", "synthetic"]
    assert result["teacher"]["lira"]["auc_ci"][0] > 0.5  # overfitted
    assert result["synthetic"]["nearest_synthetic"]["auc_ci"][0] > 0.5  # copies
    assert result["released_tests"]["synthetic"]["pixels"]["memorised"]["copies"] == {"members": 40, "held_out": 0}
    assert setting["control"]["found"]
    assert 0 < result["teacher"]["rmia"]["aop"] < 1
    assert result["leave_one_out"]["shadows"]["loss"]["targets"] == 4
    assert result["details"]["config"]["augment"] == "flip"
    with np.load(out / "private" / "audit.npz") as arrays:  # numbers in the data, whose validation split is left out
        assert arrays["index"].tolist() == [*range(90), *range(120, 180)]
    assert yaml.safe_load((out / "config.yaml").read_text())["epochs"] == 12
    # A run that lost its last steps goes on: what is there is not trained again, and the figures are the same.
    before = (out / "private" / "shadows" / "model-000.safetensors").stat().st_mtime_ns
    for name in (
        "release/audit.json",
        "release/audit.html",
        "private/shadows/model-003.safetensors",
        "private/control.safetensors",
    ):
        (out / name).unlink()
    manifest.release()
    assert main(command) == 0
    assert json.loads((out / "release" / "audit.json").read_text()) == result
    assert (out / "private" / "shadows" / "model-000.safetensors").stat().st_mtime_ns == before
    # A shadow that is another one than it was is named.
    shadow = out / "private" / "shadows" / "model-001.safetensors"
    kept = shadow.read_bytes()
    shadow.write_bytes(bytes(len(kept)))
    capsys.readouterr()
    assert f"{shadow} must be as the stage shadows left it, got other bytes" in refused(capsys, *command, aside="data:")
    shadow.write_bytes(kept)
    # The printed command is a configuration of the same audit; another one is refused.
    manifest.release()
    capsys.readouterr()
    line = refused(capsys, *command, "--level", "0.9")
    assert "audit: level must equal 0.95 of the run in" in line


def test_members_from_files_and_given_shadows(world, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(world)
    mask = np.zeros(180, dtype=bool)
    mask[:90] = True
    np.save(tmp_path / "mask.npy", mask.astype(np.uint8))
    np.savetxt(tmp_path / "members.txt", np.arange(90), fmt="%d")
    np.savetxt(tmp_path / "others.txt", np.arange(120, 180), fmt="%d")
    flags = ["--no-control", "--attacks", "lira", "loss"]
    pool = ["--members", tmp_path / "members.txt", "--non-members", tmp_path / "others.txt"]
    one = base(world, "--out", tmp_path / "a", *flags, *pool)
    assert main(one) == 0
    manifest.release()
    # The folder of shadows is that of these 150 examples; here they are named by splits.
    two = base(world, "--out", tmp_path / "b", *flags, "--shadows", tmp_path / "a" / "private" / "shadows")
    assert main(two) == 0
    manifest.release()
    first, second = (json.loads((tmp_path / name / "release" / "audit.json").read_text()) for name in "ab")
    assert first["setting"]["targets"]["target"]["kind"] == "full"
    assert second["setting"]["targets"]["target"]["kind"] == "transfer"  # nothing says how these shadows were made
    assert first["target"] == second["target"]
    assert all(each["setting"]["targets"]["target"]["recipe"] == "equal" for each in (first, second))
    assert (first["setting"]["members"], first["setting"]["non_members"]) == (90, 60)
    three = base(world, "--out", tmp_path / "c", *flags, "--members", tmp_path / "mask.npy", "--population", "0.5")
    assert main(three) == 0
    result = json.loads((tmp_path / "c" / "release" / "audit.json").read_text())["setting"]
    assert (result["members"], result["non_members"]) == (90, 45)
    assert result["shadow_sets"]["shadows"]["population_in_shadows"]
    manifest.release()
    capsys.readouterr()
    other = base(world, "--out", tmp_path / "d", "--shadows", tmp_path / "a" / "private" / "shadows")
    line = refused(capsys, *other, "--non-members", "val", "--population", "none")
    assert "audit: shadows must be of these 120 examples" in line
    assert "got keep.npy of 150" in line
    (tmp_path / "e").mkdir()
    with np.load(world / "data.npz") as archive:
        np.savez(tmp_path / "e" / "data.npz", **{**archive, "train_images": 255 - archive["train_images"]})
    line = refused(capsys, *other, "--data", tmp_path / "e" / "data.npz")
    assert "audit: shadows must be of these examples" in line
    assert not (tmp_path / "d").exists()


def test_saved_signals(tmp_path, capsys):
    save_npz(tmp_path / "s.npz", data())
    assert main(["audit", "--signals", str(tmp_path / "s.npz"), "--out", str(tmp_path / "a")]) == 0
    assert "lira *" in capsys.readouterr().out
    assert (tmp_path / "a" / "release" / "audit.html").exists()
    manifest.release()
    logits, keep, labels, members = logits_of()
    p = logits.double().softmax(-1).numpy()
    arrays = {"keep": keep.numpy(), "labels": labels.numpy(), "members": members.numpy(), "logits": p[:-1]}
    np.savez(tmp_path / "p.npz", **arrays, **{"target/t/logits": p[-1]})
    line = refused(capsys, "audit", "--signals", tmp_path / "p.npz", "--out", tmp_path / "b")
    assert "logits must be logits, from before the softmax" in line
    assert not (tmp_path / "b").exists()
    command = [
        "audit",
        "--signals",
        tmp_path / "p.npz",
        "--out",
        tmp_path / "b",
        "--probabilities",
        "--attacks",
        "lira",
    ]
    assert main([*map(str, command)]) == 0
    manifest.release()
    tree = tmp_path / "tree"
    for m in range(12):
        (tree / f"experiment-{m}_12" / "scores").mkdir(parents=True)
        np.save(tree / f"experiment-{m}_12" / "keep.npy", keep[m].numpy())
        np.save(tree / f"experiment-{m}_12" / "scores" / "0000000100.npy", logits[m, :, :2].numpy())
    command = ["audit", "--lira-tree", str(tree), "--out", str(tmp_path / "c"), "--attacks", "lira", "loss"]
    capsys.readouterr()
    assert main(command) == 0
    assert "mean of 12 shadows" in capsys.readouterr().out
    manifest.release()
    assert main([*command[:-5], "--out", str(tmp_path / "d"), "--target", "experiment-0_12", "--attacks", "lira"]) == 0
    manifest.release()
    (tmp_path / "pm" / "signals").mkdir(parents=True)
    np.save(tmp_path / "pm" / "memberships.npy", keep.numpy())
    np.save(tmp_path / "pm" / "signals" / "rmia_signals.npy", p[:12, :, 0].T)
    command = ["audit", "--privacy-meter", str(tmp_path / "pm"), "--target", "0", "--attacks", "lira", "base"]
    assert main([*command, "--out", str(tmp_path / "e")]) == 0
    assert "had saturated" in (tmp_path / "e" / "release" / "audit.html").read_text()


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--model", ""], "audit: model must be given (or signals, lira_tree or privacy_meter), got nothing"),
        (["--signals", "x.npz"], "audit: input must be models (model, checkpoint, data) or one of signals, lira_tree"),
        (
            ["--model", "vgg"],
            "audit: model must be pkg.mod:factory or one of resnet8, resnet14, resnet20, resnet32, resnet8-gn",
        ),
        (["--model", "no.such:net"], "audit: model must name an importable pkg.mod:factory, got no.such:net"),
        (["--model", "mynet:number"], "audit: model must name a factory that returns a torch module"),
        (
            ["--model", "mynet:wrong"],
            "audit: checkpoint target must hold the network's 2 tensors, got 2 unexpected (3.weight",
        ),
        (["--model", "mynet:soft", "--checkpoint", "soft.pt"], "audit: model must return logits (remove its softmax)"),
        (["--checkpoint", "absent.pt"], "audit: checkpoint must be a file, got absent.pt"),
        (["--checkpoint", "data.npz"], "audit: checkpoint target must be a readable .safetensors or .pt state dict"),
        (["--checkpoint", "a=net.pt", "a=net.pt"], "audit: checkpoint must have names that differ, and none control"),
        (
            ["--data", "absent.npz"],
            "data: source must be digits, a .npz, .parquet or .tar file, or a folder of images, got absent.npz",
        ),
        (["--members", "all"], "audit: members must be among the splits of the data, train, val, test, or a file, got"),
        (["--members", "mynet.py"], "audit: members must be splits of the data, or an .npy, .txt or .csv file, got"),
        (["--members", "absent.npy"], "absent.npy"),
        (["--members", "bad.txt"], "audit: members must be a file of indices or a mask, got bad.txt"),
        (["--members", "far.txt"], "audit: members must be bool [180], or indices in [0, 180) without repetition, got"),
        (
            ["--non-members", "train"],
            "audit: members and non_members must be disjoint, got 90 examples in both, 0 first",
        ),
        (["--population", "test"], "audit: population must share no example with members and non-members, got test"),
        (["--population", "much"], "audit: population must be splits, a share in (0, 1), none or auto, got much"),
        (["--population", "1.5"], "audit: population must be splits, a share in (0, 1), none or auto, got 1.5"),
        (["--population", "0.001"], "audit: population must be a share that leaves some of 60 non-members, got 0.001"),
        (
            ["--non-members", "val.txt"],
            "audit: members and non_members must share no example with the population, which is val unless",
        ),
        (["--members", "zip.npy"], "audit: members must be a readable .npy file, got zip.npy (it is an .npz file)"),
        (["--members", "empty.npy"], "audit: members must be a readable .npy file, got empty.npy (the file is empty)"),
        (["--level", "95"], "audit: level must be in [0.5, 1), got 95.0"),
        (["--delta", "0"], "audit: delta must be in (0, 1), got 0.0"),
        (["--priors", "0"], "audit: priors must be in (0, 1), got 0.0"),
        (["--primary", "nope"], "audit: primary must be one of the attacks, lira, lira_offline, rmia,"),
        (["--attacks", "lira", "--primary", "loss"], "audit: primary must be one of the attacks, lira, got loss"),
        (
            ["--random-members", "--population", "0.2"],
            "audit: population must be splits or none with random_members: a share takes from the non-members only,",
        ),
        (
            ["--random-members", "--members", "val", "--non-members", "train,test"],
            "audit: members must be about half of the examples: each included by a fair coin, got 30 of 180",
        ),
        (
            ["--attacks", "rmia", "--population", "none"],
            "audit: attacks must be possible with what was given: rmia needs a population of further non-members",
        ),
        (
            ["--attacks", "nearest_synthetic"],
            "audit: attacks must be possible with what was given: nearest_synthetic needs images and a synthetic set",
        ),
        (
            ["--checkpoint", "setting=net.pt"],
            "audit: checkpoint must have names without / and other than setting, comparison, leave_one_out,",
        ),
        (["--checkpoint", "a/b=net.pt"], "audit: checkpoint must have names without /"),
        (["--kind", "half"], "audit: kind must be one of auto, full, transfer, got half"),
        (["--signal", "loss"], "audit: signal must be left out with models, where it does nothing, got loss"),
        (["--cut", "0", "--test-fraction", "2"], "audit: test_fraction must be in (0, 1), got 2.0"),
        (["--attacks", "magic"], "audit: attacks must hold names among lira, lira_offline"),
        (["--num-shadows", "5"], "audit: num_shadows must be even and at least 4, got 5"),
        (["--augment", "spin"], "audit: augment must be one of none, flip, shift, lira, got spin"),
        (["--mean", "0.5"], "audit: mean and std must be given together"),
        (["--synthetic", "data.npz"], "audit: synthetic must"),
        (["--shadows", "absent"], "load_shadows: folder must hold keep.npy and model-000.safetensors ..., got absent"),
        (["--epochs", "0"], "audit: epochs must be in [1, 1000000], got 0"),
        (["--config", "absent.yaml"], "absent.yaml"),
    ],
)
def test_bad_choices_leave_nothing(world, tmp_path, capsys, monkeypatch, flags, words):
    monkeypatch.chdir(world)
    (world / "bad.txt").write_text("one\ntwo\n")
    (world / "far.txt").write_text("3\n999\n")
    np.savetxt(world / "val.txt", np.arange(90, 120), fmt="%d")
    with open(world / "zip.npy", "wb") as file:
        np.savez(file, np.arange(90))
    (world / "empty.npy").write_bytes(b"")
    assert words in refused(capsys, *base(world, "--out", tmp_path / "x", *flags))
    assert not (tmp_path / "x").exists()


def test_options_that_do_nothing_with_saved_signals_are_refused(tmp_path, capsys):
    save_npz(tmp_path / "s.npz", data())
    out = tmp_path / "x"
    for flags, words in (
        (["--augment", "flip"], "audit: augment must be left out with signals, where it does nothing, got flip"),
        (["--no-control"], "audit: control must be left out with signals, where it does nothing, got False"),
        (["--members", "val"], "audit: members must be left out with signals"),
        (["--target", "0"], "audit: target must be left out with signals"),
        (
            ["--mean", "0.5", "--std", "0.5"],
            "audit: mean must be left out with signals, where it does nothing, got 0.5",
        ),
        (["--attacks", "rmia"], "audit: attacks must be possible with what was given: rmia needs a population"),
    ):
        assert words in refused(capsys, "audit", "--signals", tmp_path / "s.npz", "--out", out, *flags)
    line = refused(capsys, "audit", "--lira-tree", tmp_path, "--out", out, "--probabilities")
    assert "audit: probabilities must be left out with lira_tree" in line
    assert not out.exists()


def pool(world, **options):
    """(members, size) of the pool that the options choose."""
    given = {"model": "mynet:make", "checkpoint": (str(world / "net.pt"),), "data": str(world / "data.npz")}
    examples = read_examples(AuditConfig(**{**given, **options}))
    return examples.members, len(examples.index), examples.splits


@pytest.mark.parametrize(
    ("options", "transfer"),
    [
        ({}, False),
        ({"kind": "transfer"}, True),
        ({"checkpoint": ("a=wide.pt@mynet:wide", "b=net.pt")}, True),
        ({"checkpoint": ("b=net.pt", "a=wide.pt@mynet:wide")}, False),
        ({"checkpoint": ("b=net.pt@mynet:make",), "kind": "full"}, False),
        ({"shadows": "given"}, True),
        ({"shadows": "given", "kind": "full"}, False),
        ({"shadows": "given", "kind": "full", "checkpoint": ("a=wide.pt@mynet:wide",)}, None),
    ],
)
def test_kind_of_the_first_target(world, monkeypatch, options, transfer):
    monkeypatch.chdir(world)
    monkeypatch.syspath_prepend(str(world))
    if not (world / "given").exists():
        (world / "given").mkdir()
        np.save(world / "given" / "keep.npy", np.arange(300).reshape(2, 150) % 2 == 0)
        for index in range(2):
            weights = {key: v + 1 + index for key, v in torch.load(world / "net.pt", weights_only=True).items()}
            files.save_tensors(world / "given" / f"model-{index:03d}.safetensors", weights)
    given = {"model": "mynet:make", "checkpoint": ("net.pt",), "data": "data.npz", **options}
    if transfer is None:
        with pytest.raises(ValueError, match="kind must be transfer where a is not of the shadows' architecture"):
            loading.load(AuditConfig(**given))
    else:
        assert next(iter(loading.load(AuditConfig(**given)).targets.values())).kind == (
            "transfer" if transfer else None
        )


def test_masks_of_numbers_and_the_cut_of_a_run(world, tmp_path, monkeypatch):
    monkeypatch.chdir(world)
    monkeypatch.syspath_prepend(str(world))
    mask = np.arange(180) % 3 == 0
    np.savetxt(tmp_path / "mask.txt", mask, fmt="%d")
    np.save(tmp_path / "mask.npy", mask.astype(np.int64))
    for name in ("mask.txt", "mask.npy"):
        members, size, _ = pool(world, members=str(tmp_path / name))
        assert size == 180
        assert np.array_equal(members.numpy(), mask), name
    (tmp_path / "two.txt").write_text("0\n1\n")  # indices
    assert pool(world, members=str(tmp_path / "two.txt"))[0].nonzero()[:, 0].tolist() == [0, 1]
    with np.load(world / "data.npz") as archive:
        np.savez(tmp_path / "cut.npz", **{key: value for key, value in archive.items() if not key.startswith("val")})
    for share in (0.15, 0.4):
        splits = pool(world, data=str(tmp_path / "cut.npz"), cut=3, val_fraction=share)[2]
        expected = load(tmp_path / "cut.npz", seed=3, val_fraction=share)
        sizes = [end - start for start, end in splits.values()]
        assert sizes == [len(expected.train), len(expected.val), len(expected.test)]
