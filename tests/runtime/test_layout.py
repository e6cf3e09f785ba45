"""Two folders by who may have what is in them, and a text that says so of every entry."""

from pathlib import Path

import pytest

from kr_fast.runtime.errors import UserError
from kr_fast.runtime.storage import layout, manifest


@pytest.mark.parametrize("guaranteed", [False, True])
def test_text_lists_every_path_that_the_folder_names(tmp_path, guaranteed):
    layout.Folder(tmp_path / "run", not guaranteed).make()  # of a run by other options that never began
    folder = layout.Folder(tmp_path / "run", guaranteed).make()
    text = (tmp_path / "run" / "README.txt").read_text()
    named = [each for each in vars(folder).values() if isinstance(each, Path)]
    for path in [*named, folder.generator(3), *([folder.privacy_ledger, folder.set_card] if guaranteed else [])]:
        if not path.is_relative_to(folder.out):
            assert f"  ../*{path.suffix}/: " in text, path
            continue
        inside = path.relative_to(folder.out).parts
        if inside and inside[0] in (layout.RELEASE, layout.PRIVATE):
            head, names = f"{inside[0]}/:", inside[1:2]
        else:
            head, names = "Beside them", inside
        part = text[text.index(head) :]
        for name in names:
            assert f"  {name}:" in part or f"  {name}/:" in part, path
    assert max(map(len, text.splitlines())) <= 120


def test_release_holds_nothing_that_was_trained_on_real_images():
    private = {"teacher.safetensors", "generator/", "shadows/", "audit.npz"}
    assert not private & layout.ENTRIES[layout.RELEASE].keys()
    assert not (private | set(layout.REPORTS)) & layout.GUARANTEED[layout.RELEASE].keys()


def test_text_of_a_user_stays(tmp_path):
    (tmp_path / "README.txt").write_text("mine")
    layout.Folder(tmp_path).make()
    assert (tmp_path / "README.txt").read_text() == "mine"


def test_older_folder_is_refused_in_one_line(tmp_path):
    (tmp_path / "config.yaml").write_text("seed: 0\n")
    (tmp_path / "teacher.safetensors").write_text("x")
    with pytest.raises(UserError, match=r"run: out must hold release/ and private/ \(an older kr-fast wrote another"):
        manifest.open_run(tmp_path, {"seed": 0})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.yaml", "teacher.safetensors"]


def test_a_start_that_was_killed_before_its_configuration_can_be_repeated(tmp_path):
    layout.Folder(tmp_path).make()
    (tmp_path / ".lock").touch()
    manifest.open_run(tmp_path, {"seed": 0})
    manifest.release()
    (tmp_path / "config.yaml").unlink()
    (tmp_path / "private" / "notes").write_text("mine")
    with pytest.raises(UserError, match="out must be empty or hold a run"):
        manifest.open_run(tmp_path, {"seed": 0})
