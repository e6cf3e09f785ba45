"""A run on images that are mapped from disk copies neither the set nor half of it: rows are gathered by batches."""

import dataclasses
import pickle

import numpy as np
import pytest
import torch
from PIL import Image

from kr_fast import data
from kr_fast.data import distances, memory_map, near_pairs
from kr_fast.data.readers import decoding
from kr_fast.membership.attacks import control
from kr_fast.membership.audit.config import AuditConfig
from kr_fast.membership.audit.examples import read_examples
from kr_fast.recycling.config import RecycleConfig
from kr_fast.recycling.pipeline import dry_run, recycle
from kr_fast.recycling.presets import preset
from kr_fast.runtime.storage import image_rows
from kr_fast.runtime.storage.files import is_temporary
from kr_fast.runtime.storage.image_rows import ImageRows

COUNT, SIDE = 400, 8
MOST = 128  # images that may be gathered at a time: the largest batch of the run, and less than a half of its pool
LIMITS = (
    (image_rows, "BATCH_BYTES"),
    (distances, "TILE_BYTES"),
    (distances, "MOST_VALUES"),
    (near_pairs, "MOST_BYTES"),
    (distances, "PIXELS"),
)


@pytest.fixture
def source(tmp_path, monkeypatch):
    """A folder of two classes, mapped however small, whose images are too many for one batch of any stage."""
    draw = np.random.default_rng(0)
    for at in range(COUNT):
        (folder := tmp_path / "set" / "ab"[at % 2]).mkdir(parents=True, exist_ok=True)
        pixels = draw.integers(0, 128, (SIDE, SIDE, 3), dtype=np.uint8) + 127 * (at % 2)
        Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{at:03}.png")
    monkeypatch.setattr(decoding, "LARGE", 0)
    monkeypatch.setattr(distances, "MOST_FLOATS", 0)
    monkeypatch.setattr(control, "LEAST_EPOCHS", 1)
    for module, name in LIMITS:
        monkeypatch.setattr(module, name, 64 * 3 * SIDE * SIDE)
    return tmp_path / "set"


@pytest.fixture
def gathered(monkeypatch):
    """How many rows were gathered at a time, of one that counts; a whole set is refused."""
    counts, gather = [], ImageRows.__getitem__

    def counted(self, which):
        images = gather(self, which)
        if images.ndim > 1:
            counts.append(len(images))
            assert len(images) <= MOST, f"{len(images)} rows are gathered at a time"
        return images

    monkeypatch.setattr(ImageRows, "__getitem__", counted)
    return counts


def test_no_stage_copies_a_mapped_set(tmp_path, source, gathered, one_thread):
    # One thread, so that no stage starts processes, which would not count rows nor know the sizes set here.
    options = {**preset("toy"), "out": str(tmp_path / "run"), "data": str(source), "val_fraction": 0.25}
    options |= {"audit_generator": "retrained", "audit_control": True, "audit_generator_weights": True}
    options |= {"audit_canaries": 10, "show_real_images": True, "audit_page": True, "few_steps": 1}
    options |= {"few_step_training": 2, "generator_steps": 4, "periods": 1, "images": 64, "teacher_epochs": 1}
    result = recycle(RecycleConfig(**options))
    assert result.report.exists()
    assert max(gathered) > 32


def test_a_dry_run_maps_its_set_and_leaves_nothing(tmp_path, source, gathered, monkeypatch):
    made, convert = [], memory_map.convert
    monkeypatch.setattr(memory_map, "convert", lambda folder, parts: made.append(folder) or convert(folder, parts))
    options = {"out": str(tmp_path / "run"), "data": str(source)}
    options["student_batch_size"] = 32  # images of several steps are gathered at a time
    text = dry_run(RecycleConfig(**{**preset("toy"), **options}))
    assert f"images of {SIDE} x {SIDE} x 3" in text
    assert len(made) == 1
    assert made[0].parent == tmp_path
    assert is_temporary(made[0])  # named by the process: other dry runs have folders of their own
    assert [path.name for path in tmp_path.iterdir()] == ["set"]


def test_an_audit_maps_its_set(tmp_path, source, gathered):
    options = {"cut": 0, "model": "resnet8", "checkpoint": ("none.pt",), "out": str(tmp_path / "audit")}
    examples = read_examples(AuditConfig(data=str(source), **options))
    assert (tmp_path / "audit.private-images" / "train.u8").exists()
    assert isinstance(examples.images, ImageRows)
    assert len(examples.images) + len(examples.population[0]) == COUNT


def test_a_mapped_set_goes_to_other_processes_by_its_path(tmp_path, source):
    loaded = data.read(str(source)).dataset(folder=tmp_path / "map")
    half = loaded.train.rows(torch.arange(len(loaded.train)) % 2 == 0)
    sent = pickle.dumps(dataclasses.replace(loaded, train=half))
    assert len(sent) < COUNT * 100  # an index, a label, a digest
    assert torch.equal(pickle.loads(sent).train.images[:], half.images[:])
