"""Sets that are mapped from disk: the bytes that memory has, and conversions that were stopped, damaged or changed."""

import fcntl
import gc
import json
import os
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from kr_fast import data
from kr_fast.data import memory_map
from kr_fast.data.readers import decoding
from kr_fast.runtime.errors import UserError
from kr_fast.runtime.storage.layout import Folder

SIZE = 8
COUNT = 40  # of each class; blocks hold 5 images, so that the splits end inside and at the end of a block


@pytest.fixture
def source(tmp_path, monkeypatch):
    """A folder of two classes of several sizes, mapped however small."""
    monkeypatch.setattr(decoding, "LARGE", 0)
    monkeypatch.setattr(memory_map, "BLOCK", 5 * SIZE * SIZE * 3)
    draw = np.random.default_rng(0)
    for name in ("a", "b"):
        (tmp_path / "set" / name).mkdir(parents=True)
        for index in range(COUNT):
            shape = (12 + index % 3, 16, 3) if index % 2 else (10, 10, 3)
            pixels = draw.integers(0, 256, shape, dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "set" / name / f"{index:02}.png")
    return tmp_path / "set"


OPTIONS = {"image_size": SIZE, "resize": "crop"}


def load(source, folder, **options):
    return data.read(source, options=data.ReadOptions(**OPTIONS, **options)).dataset(seed=1, folder=folder)


def same(first, second):
    return all(
        torch.equal(getattr(getattr(first, which), name)[:], getattr(getattr(second, which), name)[:])
        for which in ("train", "val", "test")
        for name in ("images", "labels")
    )


def decodings(caplog):
    """How many images were decoded in the last conversion."""
    return int(re.findall(r"; (\d+) of them were decoded now", caplog.text)[-1])


def test_maps_hold_what_memory_holds(source, tmp_path, monkeypatch, caplog):
    mapped = load(source, tmp_path / "map")
    assert same(mapped, load(source, None))
    monkeypatch.setattr(decoding, "LARGE", 1 << 30)
    expected = load(source, None)
    assert same(mapped, expected)
    assert mapped.notes == expected.notes
    assert mapped.fingerprint == expected.fingerprint
    assert not mapped.train.images[:].numpy().flags.owndata
    sizes = {which: os.path.getsize(tmp_path / "map" / f"{which}.u8") for which in ("train", "val", "test")}
    assert sum(sizes.values()) == 2 * COUNT * SIZE * SIZE * 3
    said = (tmp_path / "map" / "manifest.json").read_text()
    assert ".png" not in said
    assert "must not leave" in (tmp_path / "map" / "README.txt").read_text()
    mapped.train.images[:1].zero_()  # stays in this process
    assert same(load(source, tmp_path / "map"), expected)


def test_a_run_in_the_present_folder_has_its_map_beside_it(tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert Folder(".").mapped_images == tmp_path / "here.private-images"


def test_16_bits_are_mapped_by_the_window_of_the_whole_set(source, tmp_path, monkeypatch):
    """And they are the bytes of an array of 16 bits, whose white is given."""
    draw = np.random.default_rng(1)
    for file in source.rglob("*.png"):
        Image.fromarray(draw.integers(0, 4000, (11, 9)).astype(np.uint16)).save(file)
    mapped = load(source, tmp_path / "map")
    assert same(mapped, load(source, None))
    assert "windowed to [" in mapped.notes[0]
    for file in source.rglob("*.png"):
        Image.fromarray(draw.integers(0, 65536, (11, 9)).astype(np.uint16)).save(file)
    arrays = [np.stack([np.asarray(Image.open(file)) for file in sorted((source / name).iterdir())]) for name in "ab"]
    np.savez(tmp_path / "set.npz", images=np.concatenate(arrays), labels=np.repeat([0, 1], COUNT))
    assert same(load(source, tmp_path / "map"), load(tmp_path / "set.npz", None))


def test_only_what_is_missing_damaged_or_changed_is_decoded_again(source, tmp_path, caplog):
    folder = tmp_path / "map"
    with caplog.at_level("INFO", "kr_fast"):
        expected = load(source, folder)
        assert decodings(caplog) == 2 * COUNT
        load(source, folder)
        assert decodings(caplog) == 0
        manifest = json.loads((folder / "manifest.json").read_text())
        stopped = manifest | {"val": manifest["val"][:1], "test": []}  # as if it had been stopped in val
        (folder / "manifest.json").write_text(json.dumps(stopped))
        (folder / "test.u8").unlink()
        assert same(load(source, folder), expected)
        assert decodings(caplog) == len(expected.test) + len(expected.val) - 5
        with open(folder / "train.u8", "r+b") as file:
            for image in (7, 17):  # with a block between them that stays
                file.seek(SIZE * SIZE * 3 * image)
                file.write(b"\0\1\2")
        assert same(load(source, folder), expected)
        assert decodings(caplog) == 10
        Image.new("RGB", (SIZE, SIZE), (1, 2, 3)).save(source / "a" / "00.png")
        changed = load(source, folder)
        assert decodings(caplog) <= 5
    assert not same(changed, expected)
    assert same(changed, load(source, None))


def test_files_that_cannot_be_read_are_refused_or_left_out_of_a_map(source, tmp_path, caplog):
    """Their pixels are cut off: the headers are whole."""
    for name in ("a/03.png", "b/20.png"):
        content = (source / name).read_bytes()
        (source / name).write_bytes(content[:-60])
    with pytest.raises(UserError, match="^data: image must be readable, got .*(03|20).png"):
        load(source, tmp_path / "map")
    for _ in range(2):
        mapped = load(source, tmp_path / "map", skip_unreadable=True)
        assert sum(map(len, (mapped.train, mapped.val, mapped.test))) == 2 * COUNT - 2
        assert same(mapped, load(source, None, skip_unreadable=True))
        assert "left out as unreadable: 2 images" in mapped.notes
    assert caplog.text.count("03.png is left out") == 4
    with pytest.raises(UserError, match="^data: image must be readable, got .*(03|20).png"):
        load(source, tmp_path / "map")


def test_what_another_process_has_mapped_is_not_rewritten(source, tmp_path):
    """A command with other images fails before it changes a byte under a run that is at work."""
    folder = tmp_path / "map"
    mapped = load(source, folder)
    before = {path: path.read_bytes() for path in folder.iterdir()}
    with open(folder / ".lock", "r+b") as other:  # another open file is in the way as one of another process is
        with pytest.raises(BlockingIOError):
            fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
        fcntl.flock(other, fcntl.LOCK_SH | fcntl.LOCK_NB)
        assert same(load(source, folder), mapped)
        Image.new("RGB", (SIZE, SIZE), (1, 2, 3)).save(source / "a" / "00.png")
        with pytest.raises(
            UserError, match="^data: images must be those that another process has mapped from .*map, un"
        ):
            load(source, folder)
        assert {path: path.read_bytes() for path in folder.iterdir()} == before
        del mapped
        gc.collect()
        fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
        with pytest.raises(UserError, match="^data: images must be converted by one command at a time"):
            load(source, folder)
    assert same(load(source, folder), load(source, None))


def test_maps_that_cannot_be_made(source, tmp_path, monkeypatch):
    (tmp_path / "map").mkdir()
    (tmp_path / "map" / "manifest.json").write_text('{"train": [1]}')
    with pytest.raises(UserError, match="manifest.json must hold blocks of images, got something else; remove its fol"):
        load(source, tmp_path / "map")
    monkeypatch.setattr(memory_map.shutil, "disk_usage", lambda path: SimpleNamespace(free=9))
    with pytest.raises(UserError, match="^data: images, in 8 bit and one size, must fit the disk, got 0 MiB where 0"):
        load(source, tmp_path / "other")
