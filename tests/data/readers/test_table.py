"""A folder with a table of its classes: the ways in which people name files, and those in which it can be wrong."""

import csv
import json
import unicodedata

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
from PIL import Image

from kr_fast import data
from kr_fast.runtime.errors import UserError

ODD = ("plain.png", "two words.png", "line\nbreak.png", "quo\"te's.png", "Größe.png", "图像.png", "a,b;c.png")


def write_images(root, names, seed=0):
    """An image of 8 px for each name, of random pixels; returns name -> pixels."""
    draw, result = np.random.default_rng(seed), {}
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        result[name] = draw.integers(0, 256, (8, 8), dtype=np.uint8)
        Image.fromarray(result[name]).save(root / name)
    return result


def write_table(path, header, rows, delimiter=","):
    with open(path, "w", newline="", encoding="utf-8") as file:
        csv.writer(file, delimiter=delimiter).writerows([header, *rows])
    return path


def read(root, table, **options):
    return data.load_uncut(root, options=data.ReadOptions(table=str(table), **options))


def test_table_of_odd_names_in_every_format(tmp_path):
    """Rows in their order, with labels as names; the same from csv, semicolons, tsv and parquet."""
    root = tmp_path / "set"
    pixels = write_images(root, ODD)
    labels = ["mole", "nevus"] * 3 + ["mole"]
    rows = list(zip(ODD, labels, strict=True))
    tables = [write_table(tmp_path / "a.csv", ("image", "label"), rows)]
    tables.append(write_table(tmp_path / "b.csv", ("image", "label"), rows, ";"))
    tables.append(write_table(tmp_path / "c.tsv", ("image", "label"), rows, "\t"))
    (tmp_path / "bom.csv").write_bytes(b"\xef\xbb\xbf" + tables[0].read_bytes())
    pyarrow.parquet.write_table(pyarrow.table({"image": ODD, "label": labels}), tmp_path / "d.parquet")
    for table in (*tables, tmp_path / "bom.csv", tmp_path / "d.parquet"):
        name, classes, splits = read(root, table)
        assert (name, classes, list(splits)) == ("set", ("mole", "nevus"), ["all"])
        assert splits["all"].labels.tolist() == [0, 1] * 3 + [0]
        assert np.array_equal(splits["all"].images[..., 0], np.stack([pixels[each] for each in ODD]))


def test_files_as_tables_name_them(tmp_path):
    """A path below the folder, beside the table, of another machine; a bare name; without a suffix; decomposed."""
    root = tmp_path / "set" / "images"
    pixels = write_images(root, ("p1/a.png", "p2/b.png", "c.png", "Größe.png"))
    for written in (
        ("p1/a.png", "p2/b.png", "c.png", "Größe.png"),
        ("images/p1/a.png", "./images/p2/b.png", "images/c.png", "images/Größe.png"),
        (
            "/mnt/x/images/p1/a.png",
            "C:\\images\\p2\\b.png",
            str(root / "c.png"),
            unicodedata.normalize("NFD", "Größe.png"),
        ),
        ("a.png", "b", " c ", "Größe"),
    ):
        table = write_table(tmp_path / "set" / "t.csv", ("id", "dx"), [(each, i % 2) for i, each in enumerate(written)])
        _, _, splits = read(root, table, image_column="id", label_column="dx")
        assert np.array_equal(splits["all"].images[..., 0], np.stack(list(pixels.values())))


def test_splits_and_groups_of_a_table(tmp_path):
    names = [f"{index}.png" for index in range(12)]
    pixels = write_images(tmp_path / "set", names)
    rows = [(n, i % 2, ("train", "Test", "valid")[i // 2 % 3], f"P{9 - i // 2}") for i, n in enumerate(names)]
    table = write_table(tmp_path / "t.csv", ("file_name", "label", "split", "patient"), rows)
    options = data.ReadOptions(table=str(table), group_column="patient")
    actual = data.load(tmp_path / "set", options=options)
    for which, places, groups in (
        ("train", (0, 1, 6, 7), (5, 5, 2, 2)),
        ("test", (2, 3, 8, 9), (4, 4, 1, 1)),
        ("val", (4, 5, 10, 11), (3, 3, 0, 0)),
    ):
        split = getattr(actual, which)
        assert np.array_equal(split.images[..., 0], np.stack([pixels[names[at]] for at in places]))
        assert split.labels.tolist() == [at % 2 for at in places]
        assert split.groups.tolist() == list(groups)
    assert "images of 6 groups" in actual.notes
    assert not any("P9" in note or ".png" in note for note in actual.notes)
    assert data.load(tmp_path / "set", options=data.ReadOptions(table=str(table))).train.groups is None


@pytest.mark.parametrize(
    ("labels", "names", "numbers"),
    [
        (["10", "9", "2", "10"], ("2", "9", "10"), [2, 1, 0, 2]),
        (["1.0", "0.0", "1", "0"], ("0", "1"), [1, 0, 1, 0]),
        (["007", "7", "07", "7"], ("007", "07", "7"), [0, 2, 1, 2]),
        (["a|b", "c", "a|b", "d"], ("a|b", "c", "d"), [0, 1, 0, 2]),
        (["True", "False", "True", "True"], ("False", "True"), [1, 0, 1, 1]),
    ],
)
def test_labels_are_names(tmp_path, labels, names, numbers):
    write_images(tmp_path / "set", [f"{each}.png" for each in "abcd"])
    table = write_table(tmp_path / "t.csv", ("image", "label"), zip("abcd", labels, strict=True))
    _, actual, splits = read(tmp_path / "set", table)
    assert (actual, splits["all"].labels.tolist()) == (names, numbers)


FOUR = [(f"{each}.png", index % 2, "train" if index < 2 else "test", index) for index, each in enumerate("abcd")]


@pytest.mark.parametrize(
    ("rows", "options", "words"),
    [
        (
            [*FOUR, ("no.png", 0, "train", 5)],
            {},
            "table must have an image in .*set for each row, got 1 row of 5 without: no.png; --skip",
        ),
        (FOUR[:3], {}, "table must have a row for each image of the folder, got 1 image of 4 without: d.png; --skip"),
        ([*FOUR, ("b", 1, "train", 5)], {}, r"table must name each image once .*, got 1 row: b again"),
        (
            [("x/" + name, *rest) for name, *rest in FOUR[:1]] + FOUR[1:],
            {"image_column": "patient"},
            "table must name images of the folder, got 0, 1, 2 and 1 more where .*set holds 4 images such as a.png",
        ),
        (
            [(*row[:1], 2 if row[0] == "d.png" else row[1], *row[2:]) for row in FOUR],
            {},
            r"every class must have a training image, got none of 2 \(1 in test: move some",
        ),
        (
            [(*row[:3], row[3] // 3) for row in FOUR],
            {"group_column": "patient"},
            r"group_column patient of t.csv must have each group in one split, got 1 group: 0 in train and test \(move",
        ),
        (
            [(*row[:3], "") for row in FOUR],
            {"group_column": "patient"},
            "group_column .* nothing in 4 rows .rows 1, 2, 3 and 1",
        ),
        (
            [(row[0], "a|b" if row[1] else "a", *row[2:]) for row in FOUR],
            {},
            r"label_column label of t.csv must hold one label an image .* a\|b",
        ),
        ([(row[0], "", *row[2:]) for row in FOUR], {}, "label_column label of t.csv must hold a class in every row"),
        (
            [FOUR[0], (FOUR[1][0], "", *FOUR[1][2:]), *FOUR[2:]],
            {},
            r"label_column .* got nothing in 1 row \(row 2 below the header\)",
        ),
        ([(row[0], row[1] + 0.5, *row[2:]) for row in FOUR], {}, "label_column .* must hold classes, got 0.5 .cut"),
        ([(*row[:2], "fold1", row[3]) for row in FOUR], {}, "split_column .* train, val or test .*, got fold1 in 4"),
        ([(*row[:2], "test", row[3]) for row in FOUR], {}, "split_column .* must hold train in some row, got test"),
        (FOUR, {"label_column": "dx"}, r"label_column must be a column of t.csv \(image, .*\), got 'dx'"),
        (FOUR, {"label_column": "image"}, "table must have a column of its own for each of .*, got image"),
        ([], {}, "table must hold at least one row, got none in "),
        ([*FOUR, ("e.png", 1)], {}, "table must have 4 values in every line, as its first has, got 2 in line 6 of "),
    ],
)
def test_bad_tables(tmp_path, rows, options, words):
    write_images(tmp_path / "set", [f"{each}.png" for each in "abcd"])
    table = write_table(tmp_path / "t.csv", ("image", "label", "split", "patient"), rows)
    with pytest.raises(UserError, match=f"^data: {words}") as error:
        data.load(tmp_path / "set", options=data.ReadOptions(table=str(table), **options))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("t.csv", b"a,b\n\xff,1\n", "table must be text in UTF-8, got .*iconv -f LATIN1 "),
        ("t.csv", "a,b\nc,1\n".encode("utf-16"), "table must be text in UTF-8, got .*iconv -f UTF-16 "),
        ("t.csv", b"", "table must name each column once, in its first line, got an empty line in "),
        ("t.csv", b"a,a\n1,2\n", "table must name each column once, in its first line, got a, a in"),
        ("t.csv", b'a,b\n"1,2\n', "table must be a readable .csv file, got .*, line 2"),
        ("t.csv", b"file_id,grade\na,1\n", "image_column must be given where .*got columns file_id"),
        ("t.parquet", b"PAR1", "table must be a readable parquet file, got "),
        ("t.xlsx", b"PK", "table must be a .csv, .tsv, .tab, .jsonl, .parquet file, got .*t.xlsx"),
    ],
)
def test_damaged_tables(tmp_path, name, content, words):
    write_images(tmp_path / "set", ["a.png"])
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=f"^data: {words}"):
        read(tmp_path / "set", tmp_path / name)


def test_parquet_tables_with_columns_of_one_name_and_late_dates(tmp_path):
    write_images(tmp_path / "set", ["a.png"])
    table = pyarrow.table({"image": ["a.png"], "label": ["a"]})
    late = pyarrow.array([1 << 50], pyarrow.timestamp("ms"))
    for column, values, words in (
        ("label", ["b"], "table must name each column once, got image, label, label in .*t.parquet"),
        ("when", late, "table must be a readable parquet file, got .*t.parquet .*out of range"),
    ):
        pyarrow.parquet.write_table(table.append_column(column, [values]), tmp_path / "t.parquet")
        with pytest.raises(UserError, match=f"^data: {words}"):
            read(tmp_path / "set", tmp_path / "t.parquet")


def test_rows_and_images_that_are_left_out_are_counted(tmp_path):
    write_images(tmp_path / "set", [f"{each}.png" for each in "abcdefg"])
    (tmp_path / "set" / "c.png").write_bytes(b"no image")
    rows = [(each, index % 2) for index, each in enumerate("abcdef")] + [("gone", 0), ("lost", 1)]
    table = write_table(tmp_path / "t.csv", ("image", "label"), rows)
    options = data.ReadOptions(table=str(table), skip_unreadable=True)
    content = data.read(tmp_path / "set", options=options).content
    assert content.parts["all"].labels.tolist() == [0, 1, 1, 0, 1]
    assert content.notes[1:] == [
        "left out as unreadable: 1 image",
        "left out: 2 rows without an image",
        "left out: 1 image without a row",
    ]


def test_ambiguous_and_missing(tmp_path):
    write_images(tmp_path / "set", ["x/a.png", "y/a.png"])
    table = write_table(tmp_path / "t.csv", ("image", "label"), [("a.png", 0), ("y/a.png", 1)])
    with pytest.raises(
        UserError, match=r"table must name each image by a path that only one has, got a.png \(x/a.png, y"
    ):
        read(tmp_path / "set", table)
    with pytest.raises(FileNotFoundError, match="table must be a .csv file, got .*none.csv, which is not there"):
        read(tmp_path / "set", tmp_path / "none.csv")


def test_table_of_class_folders_is_the_folder(tmp_path):
    names = [f"{each}/{index}.png" for each in ("cat", "dog") for index in range(8)]
    write_images(tmp_path / "set", names)
    table = write_table(tmp_path / "set" / "t.csv", ("image", "label"), [(name, name[:3]) for name in names])
    folder = data.load(tmp_path / "set")
    actual = data.load(tmp_path / "set", options=data.ReadOptions(table=str(table)))
    assert actual.fingerprint == folder.fingerprint
    assert torch.equal(actual.val.images, folder.val.images)
    assert actual.class_names == folder.class_names
    assert actual.notes[:1] == ("uint8 pixels in [0, 255]",)
    assert not any("not read" in note for note in actual.notes)


@pytest.mark.parametrize("suffix", ["csv", "jsonl", "parquet"])
def test_metadata_of_an_image_folder(suffix, tmp_path, caplog):
    """As ImageFolder of Hugging Face reads it: one file beside the images, or one in each split, without --table."""
    caplog.set_level("INFO", "kr_fast")

    def write(folder, names, labels):
        folder.mkdir(parents=True, exist_ok=True)
        file, values = folder / f"metadata.{suffix}", {"file_name": names, "label": labels}
        if suffix == "csv":
            write_table(file, tuple(values), list(zip(names, labels, strict=True)))
        elif suffix == "jsonl":
            rows = ({"file_name": name, "label": label} for name, label in zip(names, labels, strict=True))
            file.write_text("\n".join(map(json.dumps, rows)) + "\n")
        else:
            pyarrow.parquet.write_table(pyarrow.table(values), file)

    pixels = write_images(tmp_path / "one", ("b.png", "sub/a.png", "c.png"))
    write(tmp_path / "one", list(pixels), ["nevus", "mole", "nevus"])
    name, classes, splits = data.load_uncut(tmp_path / "one")
    assert (name, classes, list(splits)) == ("one", ("mole", "nevus"), ["all"])
    assert splits["all"].labels.tolist() == [1, 0, 1]
    assert np.array_equal(splits["all"].images[..., 0], np.stack(list(pixels.values())))
    for at, split in enumerate(("train", "test")):
        pixels = write_images(tmp_path / "two" / split, ("b.png", "a.png"), seed=at)
        write(tmp_path / "two" / split, list(pixels), [7, 3])
    _, classes, splits = data.load_uncut(tmp_path / "two")
    assert (classes, list(splits)) == (("3", "7"), ["train", "test"])
    assert splits["test"].labels.tolist() == [1, 0]
    assert np.array_equal(splits["test"].images[..., 0], np.stack(list(pixels.values())))
    assert "4 images of 2 classes" in caplog.text
    assert "not read" not in caplog.text


def test_folders_are_the_classes_where_metadata_have_none(tmp_path):
    write_images(tmp_path / "set", ("x/a.png", "y/b.png"))
    write_table(tmp_path / "set" / "metadata.csv", ("file_name", "text"), [("x/a.png", "one"), ("y/b.png", "two")])
    assert data.load_uncut(tmp_path / "set")[1] == ("x", "y")


def test_tables_of_json_lines_are_refused_by_line(tmp_path):
    write_images(tmp_path / "set", ("a.png", "b.png"))
    (table := tmp_path / "t.jsonl").write_text('{"image": "a.png", "label": 0}\n{"image": "b.png"}\n')
    with pytest.raises(UserError, match="hold the keys image, label in each line, got line 2 of"):
        read(tmp_path / "set", table)
    table.write_text('{"image": "a.png", "label": 0}\n{"image": \n')
    with pytest.raises(UserError, match="hold JSON in each line, got line 2 of"):
        read(tmp_path / "set", table)


def test_lists_in_place_of_a_split_or_a_group(tmp_path):
    write_images(tmp_path / "set", ("a.png", "b.png"))
    (table := tmp_path / "t.jsonl").write_text(
        "".join(
            f'{{"image": "{name}.png", "label": 0, "split": ["train"], "part": "train", "site": [1]}}\n'
            for name in "ab"
        )
    )
    for options, words in (
        ({}, r"split_column split of t.jsonl must hold train, val or test in every row, got \['train'\] in 2 rows"),
        (
            {"split_column": "part", "group_column": "site"},
            r"group_column site .* must hold one group an image, got a l",
        ),
    ):
        with pytest.raises(UserError, match=words):
            data.load(tmp_path / "set", options=data.ReadOptions(table=str(table), **options))


def test_numbers_of_more_digits_than_python_reads_are_names(tmp_path):
    write_images(tmp_path / "set", ("a.png", "b.png"))
    table = write_table(tmp_path / "t.csv", ("image", "label"), [("a.png", "1" + 5000 * "0"), ("b.png", "2")])
    assert data.load_uncut(tmp_path / "set", options=data.ReadOptions(table=str(table)))[2]["all"].labels.tolist() == [
        0,
        1,
    ]
