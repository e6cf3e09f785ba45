"""Nothing of a real image, of its file or of where it lay is in what may leave."""

import hashlib
import io
import zipfile

import numpy as np
import pytest
from PIL import Image

import kr_fast
from kr_fast.recycling.config import RecycleConfig
from kr_fast.recycling.exporting.job import export_run
from kr_fast.recycling.presets import preset

pytestmark = [pytest.mark.pipeline, pytest.mark.usefixtures("no_progress", "released_run", "one_thread")]

NAME = b"Gundula"  # in every file name, and in a folder above
QUICK = {"num_shadows": 0, "generator_steps": 4, "checkpoints": 1, "periods": 1, "teacher_epochs": 1}
QUICK |= {"tune_noise_scale": (), "tune_guidance_scale": (), "tune_confidence": ()}


@pytest.fixture(scope="module")
def scans(tmp_path_factory):
    """A folder of images by class."""
    folder, draw = tmp_path_factory.mktemp("private") / NAME.decode() / "scans", np.random.default_rng(0)
    for at in range(60):
        path = folder / ("kidney", "liver")[at % 2] / f"Patient {NAME.decode()} {at:04d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(draw.integers(0, 256, (8, 8), dtype=np.uint8)).save(path)
    return folder


def contents(folder):
    """(file, its bytes), of an archive those of every member, unpacked."""
    for path in (path for path in folder.rglob("*") if path.is_file()):
        yield path, path.read_bytes()
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                yield from ((path / name, archive.read(name)) for name in archive.namelist())


def test_no_image_and_no_name_leaves(scans, tmp_path):
    run = tmp_path / "run"
    kr_fast.recycle(RecycleConfig(**{**preset("toy"), **QUICK, "data": str(scans), "out": str(run)}))
    folders = [run / "release"]
    for format in ("parquet", "webdataset", "npz"):
        folders.append(tmp_path / format)
        export_run(run, folders[-1], format=format)
    real = [path.read_bytes() for path in scans.rglob("*.png")]
    real += [np.asarray(Image.open(io.BytesIO(data))).tobytes() for data in real]
    parts = [part for data in real[60:] for part in (data[:8], data[-8:])] + real[:60]  # of each image two rows
    matches = []
    for folder in folders:
        for path, data in contents(folder):
            matches += [(path, "name")] if NAME in data else []
            matches += [(path, "pixels") for part in parts if part in data]
    assert matches == []
    images = np.load(tmp_path / "npz" / "synthetic" / "train.npz")["images"]
    pixels = {hashlib.sha256(image.tobytes()).digest() for image in images}
    assert pixels.isdisjoint(hashlib.sha256(data).digest() for data in real[60:])
    # The search finds what is there: names of classes, and a synthetic image in each format.
    assert all(any(b"kidney" in data for _, data in contents(folder / "student")) for folder in folders)
    for folder in folders[:1] + folders[3:]:
        assert any(images[0].tobytes() in data for _, data in contents(folder / "synthetic"))
    for folder in folders[1:3]:
        assert any(images[0, -1].tobytes() in data for _, data in contents(folder / "synthetic"))
