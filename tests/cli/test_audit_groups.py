"""``kr-fast audit --group-column``: halves of whole patients, and membership counted by patient."""

import csv
import json

import numpy as np
import torch
from PIL import Image
from torch import nn

from kr_fast.cli import main
from kr_fast.data import ReadOptions, load

FACTORY = "from torch import nn\n\n\ndef make():\n    return nn.Sequential(nn.Flatten(), nn.Linear(64, 2))\n"


def test_patients_are_the_units(tmp_path, monkeypatch):
    """40 patients of 3 images; 8 shadows of a linear model, which is enough for figures of every kind."""
    draw = np.random.default_rng(0)
    (tmp_path / "images").mkdir()
    (tmp_path / "net_of_patients.py").write_text(FACTORY)
    lines = ["file,dx,patient"]
    for index in range(120):
        pixels = draw.integers(0, 256, (8, 8), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "images" / f"{index}.png")
        lines.append(f"{index}.png,{index % 2},Doe-{index // 3}")
    (tmp_path / "labels.csv").write_text("\n".join(lines) + "\n")
    torch.manual_seed(0)
    torch.save(nn.Sequential(nn.Flatten(), nn.Linear(64, 2)).state_dict(), tmp_path / "net.pt")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    table = ["--table", "labels.csv", "--label-column", "dx", "--group-column", "patient"]
    options = ["--members", "train", "--non-members", "test", "--cut", "3", "--no-control", "--epochs", "2"]
    options += ["--num-shadows", "8", "--attacks", "lira", "loss", "--out", "out"]
    given = ["--model", "net_of_patients:make", "--checkpoint", "net.pt", "--data", "images"]
    assert main(["audit", *given, *table, *options]) == 0
    cut = load("images", seed=3, options=ReadOptions(table="labels.csv", label_column="dx", group_column="patient"))
    groups = torch.cat([cut.train.groups, cut.test.groups])
    keep = np.load("out/private/shadows/keep.npy")
    for number in groups.unique():
        mine = keep[:, (groups == number).numpy()]
        assert (mine == mine[:, :1]).all()
    assert (keep.sum(0) == 4).all()
    audit = json.loads((tmp_path / "out" / "release" / "audit.json").read_text())
    counted = audit["by_group"]
    sides = [len(split.groups.unique()) for split in (cut.train, cut.test)]
    assert [counted["members"], counted["non_members"], counted["mixed"]] == [*sides, 0]
    assert counted["records"]["shadows"]["tested"] == sum(sides)
    assert counted["recipes"]["shadows"]["targets"] == 8
    assert audit["records"]["shadows"]["groups"] == {"count": sum(sides), "with_found": 0, "rows": []}
    with open("out/private/groups.csv") as file:
        assert len(list(csv.DictReader(file))) == sum(sides)
    for path in (tmp_path / "out").rglob("*"):
        assert path.is_dir() or b"Doe-" not in path.read_bytes(), path
