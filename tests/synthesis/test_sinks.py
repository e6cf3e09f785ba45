"""Each format is read back by the tools that it is made for, and its bytes depend on the images alone."""

import io
import json
import tarfile
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image

from kr_fast.runtime.errors import UserError
from kr_fast.runtime.storage import files
from kr_fast.synthesis.output import sinks
from kr_fast.synthesis.output.sinks import FORMATS, Output, make_sink

# 6x8x1: a PNG of less than a block of a tar; 32x32x3: several batches of PNG pieces; 5x3x4: alpha.
SHAPES = [(6, 8, 1), (32, 32, 3), (5, 3, 4)]


def data(shape, count=70, first=123, classes=12):
    random = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (count, *shape), dtype=torch.uint8, generator=random)
    return torch.arange(first, first + count), torch.randint(0, classes, (count,), generator=random), images


def write(folder, format, ids, labels, images, parts, classes=12):
    """A shard written in ``parts`` batches; returns its paths."""
    if format == "parquet":
        pytest.importorskip("pyarrow")
    sink = make_sink(format)
    folder.mkdir(exist_ok=True)
    paths = [folder / f"shard{suffix}" for suffix in sink.suffixes]
    outputs = [Output(path) for path in paths]
    writer = sink.writer(outputs, len(ids), tuple(images.shape[1:]), classes)
    for part in torch.arange(len(ids)).chunk(parts):
        writer.write(ids[part], labels[part], images[part])
    writer.close()
    for output, path in zip(outputs, paths, strict=True):
        output.close()
        assert output.sha256() == files.sha256(path)
        assert output.size == path.stat().st_size
    return paths


def decoded(png, shape):
    return np.asarray(Image.open(io.BytesIO(png))).reshape(shape)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_npy(tmp_path, shape):
    ids, labels, images = data(shape)
    result = [np.load(path, mmap_mode="r") for path in write(tmp_path, "npy", ids, labels, images, 3)]
    for array, tensor in zip(result, (images, labels, ids), strict=True):
        assert array.dtype == tensor.numpy().dtype
        assert np.array_equal(array, tensor.numpy())


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_npz(tmp_path, shape):
    ids, labels, images = data(shape)
    (path,) = write(tmp_path, "npz", ids, labels, images, 3)
    with np.load(path) as result:
        assert result.files == ["arr_0", "arr_1", "ids"]
        for name, tensor in (("arr_0", images), ("arr_1", labels), ("ids", ids)):
            assert result[name].dtype == tensor.numpy().dtype
            assert np.array_equal(result[name], tensor.numpy())
    assert zipfile.ZipFile(path).testzip() is None


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_tar_is_that_of_tarfile(tmp_path, shape):
    ids, labels, images = data(shape)
    (path,) = write(tmp_path, "webdataset", ids, labels, images, 3)
    with tarfile.open(path) as tar:
        result = {member.name: tar.extractfile(member).read() for member in tar}
    assert list(result)[:3] == ["000000000123.png", "000000000123.cls", "000000000124.png"]
    for i, label, image in zip(ids.tolist(), labels.tolist(), images.numpy(), strict=True):
        assert int(result[f"{i:012d}.cls"]) == label
        assert np.array_equal(decoded(result[f"{i:012d}.png"], shape), image)
    again = tmp_path / "again.tar"
    with tarfile.open(again, "w", format=tarfile.USTAR_FORMAT) as tar:
        for name, content in result.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    assert again.read_bytes() == path.read_bytes()


def test_webdataset_reads_it(tmp_path):
    webdataset = pytest.importorskip("webdataset")
    ids, labels, images = data((32, 32, 3))
    (path,) = write(tmp_path, "webdataset", ids, labels, images, 1)
    samples = list(
        webdataset.WebDataset(str(path), shardshuffle=False).decode("rgb8").to_tuple("__key__", "png", "cls")
    )
    assert [int(key) for key, _, _ in samples] == ids.tolist()
    assert [label for _, _, label in samples] == labels.tolist()
    assert np.array_equal(np.stack([image for _, image, _ in samples]), images.numpy())


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_parquet(tmp_path, shape):
    parquet = pytest.importorskip("pyarrow.parquet")
    ids, labels, images = data(shape)
    (path,) = write(tmp_path, "parquet", ids, labels, images, 3)
    table = parquet.read_table(path)
    features = json.loads(table.schema.metadata[b"huggingface"])["info"]["features"]
    assert features["image"] == {"_type": "Image"}
    assert features["label"] == {"names": [str(c) for c in range(12)], "_type": "ClassLabel"}
    assert table["id"].to_pylist() == ids.tolist()
    assert table["label"].to_pylist() == labels.tolist()
    for cell, image in zip(table["image"].to_pylist(), images.numpy(), strict=True):
        assert cell["path"] is None
        assert np.array_equal(decoded(cell["bytes"], shape), image)


def test_datasets_reads_it(tmp_path):
    datasets = pytest.importorskip("datasets")
    ids, labels, images = data((8, 8, 3))
    (path,) = write(tmp_path / "a", "parquet", ids, labels, images, 2)
    result = datasets.load_dataset("parquet", data_files=str(path), split="train", cache_dir=str(tmp_path / "cache"))
    assert result.features["label"].num_classes == 12
    assert result["id"][:] == ids.tolist()
    assert np.array_equal(np.asarray(result[3]["image"]), images[3].numpy())


def test_parquet_of_batches_beyond_32_bit_offsets(tmp_path, monkeypatch):
    parquet = pytest.importorskip("pyarrow.parquet")
    ids, labels, images = data((32, 32, 3))
    monkeypatch.setattr(sinks, "OFFSETS", 20 * sinks.png_size(32, 32, 3) - 1)
    (path,) = write(tmp_path, "parquet", ids, labels, images, 2)
    with parquet.ParquetFile(path) as file:
        groups = [file.metadata.row_group(group).num_rows for group in range(file.metadata.num_row_groups)]
    assert groups == [19, 16, 19, 16]
    for each, image in zip(parquet.read_table(path)["image"].to_pylist(), images.numpy(), strict=True):
        assert np.array_equal(decoded(each["bytes"], (32, 32, 3)), image)


@pytest.mark.parametrize("format", [name for name in FORMATS if name != "parquet"])
def test_bytes_do_not_depend_on_batches_or_time(tmp_path, format, monkeypatch):
    """Row groups of parquet are batches, whose size is in the manifest; all other formats are one stream."""
    first = write(tmp_path / "a", format, *data((32, 32, 3)), 1)
    monkeypatch.setattr("time.time", lambda: 2e9)
    second = write(tmp_path / "b", format, *data((32, 32, 3)), 9)
    assert [path.read_bytes() for path in first] == [path.read_bytes() for path in second]


def test_one_class_and_a_thousand(tmp_path):
    ids, labels, images = data((4, 4, 3), classes=1000)
    (path,) = write(tmp_path, "webdataset", ids, labels, images, 2, classes=1000)
    with tarfile.open(path) as tar:
        result = [int(tar.extractfile(m).read()) for m in tar if m.name.endswith(".cls")]
    assert result == labels.tolist()
    (path,) = write(tmp_path, "webdataset", ids, labels * 0, images, 2, classes=1)
    with tarfile.open(path) as tar:
        assert {tar.extractfile(m).read() for m in tar if m.name.endswith(".cls")} == {b"0"}


def test_errors(tmp_path, monkeypatch):
    with pytest.raises(
        UserError, match="synthesize: format must be one of npy, npz, webdataset, parquet, device, got zarr"
    ):
        make_sink("zarr")
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    with pytest.raises(UserError, match="format parquet must have pyarrow installed, got none; pip install"):
        make_sink("parquet")
