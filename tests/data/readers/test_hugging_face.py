"""Data sets of the package ``datasets``, as it writes them itself, and every way in which one can be wrong."""

import io
import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
from data_cases import arrays, write_npz
from PIL import Image

from kr_fast import data
from kr_fast.data.readers import arrow_files
from kr_fast.runtime.errors import UserError

WRITE = """
import sys
import datasets, numpy
from PIL import Image
datasets.disable_progress_bars()
root, names = sys.argv[1], ["cat", "dog", "eel", "fox"]
held = numpy.load(root + "/set.npz")
image = {"image": datasets.Image(), "label": datasets.ClassLabel(names=names), "age": datasets.Value("int64")}
array = {"image": datasets.Array3D((8, 8, 1), "uint8"), "label": datasets.Value("string")}
array["site"] = datasets.Value("int64")
def made(which, features):
    pixels, labels = held[which + "_images"], held[which + "_labels"][:, 0].tolist()
    if features is image:
        columns = {"image": [Image.fromarray(each[..., 0]) for each in pixels], "label": labels, "age": labels}
    else:
        groups = [row // 2 + 100 * len(which) for row in range(len(labels))]
        columns = {"image": [each.tolist() for each in pixels], "label": [names[each] for each in labels]}
        columns["site"] = groups
    return datasets.Dataset.from_dict(columns, features=datasets.Features(features))
splits = {"train": "train", "validation": "val", "test": "test"}
images = datasets.DatasetDict({name: made(which, image) for name, which in splits.items()})
images.save_to_disk(root + "/saved", num_shards={"train": 3, "validation": 1, "test": 2})
images["train"].save_to_disk(root + "/one")
datasets.DatasetDict({name: made(which, array) for name, which in splits.items()}).save_to_disk(root + "/arrays")
for name, each in images.items():
    each.to_parquet(root + f"/parquet/data/{name}-00000-of-00001.parquet", batch_size=7)
    each.to_parquet(root + f"/folders/{name}/0000.parquet")
"""


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The folder in which the package ``datasets``, in a process of its own, wrote the set of ``set.npz``."""
    root = tmp_path_factory.mktemp("datasets")
    write_npz(root / "set.npz")
    environment = os.environ | {"HF_HOME": str(root / "cache"), "HF_DATASETS_OFFLINE": "1"}
    (root / "parquet/data").mkdir(parents=True)
    for which in ("train", "validation", "test"):
        (root / "folders" / which).mkdir(parents=True)
    subprocess.run([sys.executable, "-c", WRITE, root], check=True, env=environment)
    return root


@pytest.mark.parametrize("name", ["saved", "arrays", "parquet", "folders"])
def test_every_form_is_the_same_set(made, name):
    expected, actual = data.load(made / "set.npz"), data.load(made / name)
    assert actual.fingerprint == expected.fingerprint
    assert actual.class_names == ("cat", "dog", "eel", "fox")
    assert torch.equal(actual.val.images, expected.val.images)
    assert actual.notes[0] == "uint8 pixels in [0, 255]"


def test_a_set_without_splits_and_one_file(made):
    held = arrays()
    for path in (made / "one", made / "parquet/data/train-00000-of-00001.parquet"):
        name, classes, splits = data.load_uncut(path)
        assert (name, classes[0], list(splits)) == (path.stem, "cat", ["all"])
        assert np.array_equal(splits["all"].images, held["train_images"])
        assert splits["all"].labels.tolist() == held["train_labels"][:, 0].tolist()


def test_groups_and_other_columns(made):
    actual = data.load(made / "arrays", options=data.ReadOptions(group_column="site"))
    assert actual.train.groups.tolist() == [row // 2 + 16 for row in range(40)]  # after 6 of val, 10 of test
    ages = data.load(made / "saved", options=data.ReadOptions(label_column="age"))
    assert ages.class_names == tuple("0123")
    assert torch.equal(ages.train.labels, data.load(made / "saved").train.labels)


def write_parquet(path, columns, features=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    table = pyarrow.table(columns)
    if features:
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    pyarrow.parquet.write_table(table, path, row_group_size=2)
    return path


def png(value, size=8):
    file = io.BytesIO()
    Image.new("L", (size, size), value).save(file, "PNG")
    return file.getvalue()


FOUR = {"image": [png(value) for value in (0, 60, 120, 255)], "label": ["a", "b", "a", "b"]}


def test_plain_parquet_of_bytes_paths_and_splits(tmp_path):
    """As pandas writes it: bytes or names of files, labels as text, a column of splits, a dictionary."""
    for row, content in enumerate(FOUR["image"]):
        (tmp_path / f"{row}.png").write_bytes(content)
    columns = FOUR | {"split": ["train", "train", "test", "test"]}
    named = columns | {"image": [f"{row}.png" for row in range(4)]}
    both = columns | {"image": [{"bytes": None, "path": f"{row}.png"} for row in range(4)]}
    coded = {key: pyarrow.array(named[key]).dictionary_encode() for key in ("image", "label")}
    large = {"image": pyarrow.array(named["image"], pyarrow.large_string())}  # as polars writes text
    image = pyarrow.struct([("path", pyarrow.string()), ("bytes", pyarrow.binary())])
    turned = {"image": pyarrow.array([{"bytes": each} for each in FOUR["image"]], image)}
    for each in (columns, named, both, *(columns | other for other in (coded, large, turned))):
        _, classes, splits = data.load_uncut(write_parquet(tmp_path / "x.parquet", each))
        assert (classes, list(splits)) == (("a", "b"), ["train", "test"])
        assert splits["train"].images[:, 0, 0, 0].tolist() == [0, 60]
        assert splits["test"].images[:, 0, 0, 0].tolist() == [120, 255]


def test_columns_of_one_name_and_dates_beyond_python(tmp_path):
    table = pyarrow.table(FOUR).append_column("x", [list("wxyz")])
    late = pyarrow.array([0, 1 << 50, 0, 1], pyarrow.timestamp("ms"))
    path = tmp_path / "x.parquet"
    pyarrow.parquet.write_table(table.append_column("x", [late]), path)
    assert data.load_uncut(path)[1] == ("a", "b")  # neither is used
    for column, named in (("image", FOUR["image"]), ("label", FOUR["label"])):
        pyarrow.parquet.write_table(table.append_column(column, [named]), path)
        with pytest.raises(
            UserError, match=f"^data: {column}_column must be a column that is there once, got {column} in"
        ):
            data.load_uncut(path)
    with pytest.raises(UserError, match="readable parquet files, got .*x.parquet .*out of range"):
        data.load_uncut(write_parquet(path, FOUR | {"label": late}))


def test_a_row_group_of_more_than_2_gib_is_read_in_its_chunks(tmp_path, monkeypatch):
    """A GiB of zeros, of which no page is touched, three times; and a set whose groups come in chunks."""
    offsets = pyarrow.py_buffer(np.array([0, 1 << 30], np.int32))
    part = pyarrow.Array.from_buffers(pyarrow.binary(), 1, [None, offsets, pyarrow.py_buffer(np.zeros(1 << 30, "u1"))])
    assert len(arrow_files.combined(pyarrow.chunked_array([part, part, part]))) == 3
    monkeypatch.setattr(arrow_files, "combined", lambda values: pyarrow.chunked_array([values[:3], values[3:]]))
    for image in (FOUR["image"], [[[each] * 8] * 8 for each in (0, 60, 120, 255)]):
        _, _, splits = data.load_uncut(write_parquet(tmp_path / "x.parquet", FOUR | {"image": image}))
        assert splits["all"].images[:, 0, 0, 0].tolist() == [0, 60, 120, 255]


LABELS = {"image": {"_type": "Image"}, "label": {"_type": "ClassLabel", "names": ["x", "y"]}}


@pytest.mark.parametrize(
    ("files", "features", "words"),
    [
        (
            {"a": FOUR | {"image": [*FOUR["image"][:3], b"no"]}},
            None,
            "image must be readable, got a.parquet, row 3 .it holds",
        ),
        (
            {"a": FOUR | {"image": [*FOUR["image"][:3], None]}},
            None,
            "image must be readable, got a.parquet, row 3 .the row",
        ),
        (
            {"a": FOUR | {"image": [*FOUR["image"][:3], png(3, 9)]}},
            None,
            "every image must have one size .*a.parquet, row 3",
        ),
        (
            {"a": FOUR | {"label": [["a"], ["b"], ["a", "b"], ["a"]]}},
            None,
            "label_column label must hold one label an image",
        ),
        (
            {"a": FOUR | {"label": [0, 1, -1, 1]}},
            LABELS,
            "label_column label must hold a class in every row, got nothing in 1",
        ),
        (
            {"a": FOUR | {"label": [0, 1, 2, 1]}},
            LABELS,
            r"label_column label must hold integers in \[0, 2\), .*, got 2",
        ),
        ({"a": {"text": ["x"], "label": [0]}}, None, "image_column must be given where .*, got columns text, label"),
        (
            {"a": FOUR | {"image": [[1, 2], [1], [2], [3]]}},
            None,
            "column image must hold encoded images, or arrays of one",
        ),
        ({"a": FOUR | {"image": [0.5, 1.0, 2.0, 3.0]}}, None, r"column image must have shape .*, got \[4\]"),
        (
            {"train": FOUR, "other": FOUR},
            None,
            "source must have a split in the name of every file, or of none, got other",
        ),
        ({"test": FOUR, "val": FOUR}, None, "source must hold a train split, got test, val in "),
        (
            {"c1/train": FOUR, "c2/train": FOUR},
            None,
            "source must hold the files of a split in one folder.* got c1, c2 .give",
        ),
        (
            {"train": FOUR, "test": FOUR | {"x": [1] * 4}},
            None,
            "source must have the same columns and classes in every file",
        ),
        ({"train-test": FOUR}, None, "source must have one split in the name of a file, got train-test.parquet"),
    ],
)
def test_bad_parquet(tmp_path, files, features, words):
    for name, columns in files.items():
        write_parquet(tmp_path / "set" / f"{name}.parquet", columns, features)
    with pytest.raises(UserError, match=f"^data: {words}") as error:
        data.load(tmp_path / "set")
    assert "\n" not in str(error.value)


def test_damaged_and_foreign_folders(made, tmp_path):
    def refused(path, words, **options):
        with pytest.raises(UserError, match=f"^data: {words}") as error:
            data.load(path, options=data.ReadOptions(**options))
        assert "\n" not in str(error.value)

    saved = tmp_path / "saved"
    shutil.copytree(made / "saved", saved)
    shard = next((saved / "train").glob("*.arrow"))
    whole = shard.read_bytes()
    shard.write_bytes(whole[:100])
    refused(saved, "source must hold readable arrow files, got .*data-00000")
    shard.write_bytes(b"")
    refused(saved, "source must hold readable arrow files, got .*data-00000")
    shard.unlink()
    refused(saved, "source must hold the files that state.json names, got .* without data-00000")
    (saved / "train/state.json").write_text("[]")
    refused(saved, "source must hold readable JSON of save_to_disk, got .*state.json")
    (saved / "dataset_dict.json").write_text('{"splits": ["train", "dev"]}')
    refused(saved, "source must name its splits train, validation and test, each once, got train, dev")
    refused(made / "saved", "split_column must be left out for a source whose files are splits", split_column="x")
    refused(made / "saved", "label_column must be a column of data-.* .image, label, age., got 'dx'", label_column="dx")
    (tmp_path / "x.parquet").write_bytes(b"PAR1PAR1")
    refused(tmp_path / "x.parquet", "source must hold readable parquet files, got .*x.parquet")
    (tmp_path / "x.parquet").write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    refused(tmp_path / "x.parquet", "source must hold readable parquet files, got .*Git LFS pointer")
    for name, words in (
        ("a.tfrecord-0-of-1", "TFRecord files"),
        ("b.mds", "shards of Mosaic"),
        ("c.nii.gz", "NIfTI"),
        ("d.zip", "archives"),
    ):
        (tmp_path / name[0]).mkdir()
        (tmp_path / name[0] / name).touch()
        refused(tmp_path / name[0], f"source must hold images as class/image.png, parquet .*, a folder of {words}")
