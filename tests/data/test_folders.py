"""Which files of a tree are images of which class, against a walk of all files; and what is said of the rest."""

import json
import os
import tempfile
from pathlib import Path

import pytest
from data_cases import read_or_refused
from hypothesis import given, settings
from hypothesis import strategies as st

from kr_fast.data import folders
from kr_fast.runtime.errors import UserError

SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp", ".ppm", ".pgm"}
HIDDEN = ("__MACOSX", "@eaDir", "$RECYCLE.BIN", "System Volume Information", "lost+found")


def write(root, *paths):
    """Empty files; a path that ends in / is an empty folder."""
    for path in paths:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        if path.endswith("/"):
            (root / path).mkdir(exist_ok=True)
        else:
            (root / path).touch()
    return root


def actual(root):
    """split -> [(class, path below the split)], and the note."""
    parts, names, note, _ = folders.find(root)
    listed = {
        which: [
            (name, "/".join(file.relative_to(root).parts))
            for name, files in zip(names, each, strict=True)
            for file in files
        ]
        for which, each in parts.items()
    }
    return listed, "".join(note)


def visible(parts):
    return not any(part.startswith(".") or part in HIDDEN for part in parts)


name = st.sampled_from(
    ["a", "b", "cat", "Dog", "x y", "é", ".git", ".ipynb_checkpoints", "__MACOSX", "train", "test", "val", "Thumbs.db"]
)
stem = st.sampled_from(["0", "1", "10", "im", "._im", ".DS_Store", "scan.1.2.840"])
suffix = st.sampled_from([".png", ".PNG", ".Jpg", ".jpeg", ".tif", ".webp", ".txt", ".gif", ".npy", "", ".113619"])
path = st.lists(name, max_size=4).flatmap(lambda parents: st.tuples(st.just(parents), stem, suffix))


whole = st.sampled_from([(), ("a/1.png", "b/1.png"), ("train/a/1.png", "train/b/1.png", "test/a/2.png")])


@settings(deadline=None, max_examples=60)
@given(start=whole, paths=st.lists(path, min_size=1, max_size=12))
def test_any_tree_is_read_whole_or_refused(start, paths):
    """Every visible image of a class folder is found, in the order of class and name; or one line says why not."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder) / "set"
        root.mkdir()
        write(root, *start)
        for parents, stem_, suffix_ in paths:
            at = root.joinpath(*parents, stem_ + suffix_)
            if not any(parent.is_file() for parent in at.parents) and not at.exists():
                write(root, str(at.relative_to(root)))
        every = [Path(base, file).relative_to(root) for base, _, files in os.walk(root) for file in files]
        images = [file for file in every if visible(file.parts) and file.suffix.lower() in SUFFIXES]
        result = read_or_refused(lambda: folders.find(root))
        if result is None:
            return
        parts, names, notes, _ = result
        assert list(names) == sorted(names)
        assert all(map(visible, [(each,) for each in names]))
        splits = list(parts) != ["all"]
        expected = sorted(file.parts for file in images if len(file.parts) > (2 if splits else 1))
        read = [file.relative_to(root).parts for which in sorted(parts) for files in parts[which] for file in files]
        if splits:
            expected = [file for file in expected if file[0] in parts]
        assert sorted(read) == expected
        for which, each in parts.items():
            base = root / which if splits else root
            for label, files in enumerate(each):
                assert all(file.relative_to(base).parts[0] == names[label] for file in files)
                assert files == sorted(files, key=lambda file: file.parts)
        assert bool(notes) == (len(read) < len(every))


def test_layouts():
    """What every peer reads, and each name of a split."""
    with tempfile.TemporaryDirectory() as folder:
        root = write(Path(folder) / "nested", "a/1.png", "a/batch2/0.PNG", "b/patient/x.tif", "b/0.bmp")
        assert actual(root) == (
            {"all": [("a", "a/1.png"), ("a", "a/batch2/0.PNG"), ("b", "b/0.bmp"), ("b", "b/patient/x.tif")]},
            "",
        )
        for names in (("train", "valid", "test"), ("Train", "Val", "Test"), ("training", "VALIDATION", "testing")):
            root = Path(folder) / names[0] / names[1]
            write(root, *(f"{which}/{each}/0.png" for which in names for each in "ab"))
            listed, note = actual(root)
            assert list(listed) == ["train", "val", "test"]
            assert [entry[1].split("/")[0] for each in listed.values() for entry in each] == [
                n for n in names for _ in "ab"
            ]
            assert note == ""
        assert list(actual(write(Path(folder) / "imagenet", "train/a/0.png", "train/b/0.png", "val/b/1.png"))[0]) == [
            "train",
            "val",
        ]
        vehicles = write(Path(folder) / "vehicles", "train/0.png", "bus/0.png", "car/0.png")
        assert [name for name, _ in actual(vehicles)[0]["all"]] == ["bus", "car", "train"]


def test_what_is_not_read_is_counted_without_names(tmp_path):
    names = "a/0.png a/._0.png a/.DS_Store a/Thumbs.db b/0.png b/1.2.840.113619 b/notes.txt b/more.txt"
    names += " .ipynb_checkpoints/0.png __MACOSX/a/0.png loose.png"
    write(tmp_path, *names.split(), "a/patient Smith.smith")
    listed, note = actual(tmp_path)
    assert [path for _, path in listed["all"]] == ["a/0.png", "b/0.png"]
    assert note == (
        "not read: 5 files (.txt, .db, .smith, other), 2 hidden folders, 2 hidden files, "
        "1 image outside the class folders"
    )
    splits = write(tmp_path / "s", "train/a/0.png", "train/b/0.png", "test/a/0.png", "test/0.png", "raw/Miller/0.png")
    assert actual(splits)[1] == "not read: 1 folder beside the splits, 1 image outside the class folders"


def test_what_kr_fast_wrote_is_no_class(tmp_path):
    """As after --data imgs --out imgs/run; at any depth, and where a folder holds nothing else."""
    write(tmp_path, "a/0.png", "b/0.png", "run/config.yaml", "run/.lock", "run/figures/x.png", "a/audit/config.yaml")
    write(tmp_path, "a/audit/journal.json", "a/audit/y.png", "runs/one/config.yaml", "runs/one/.lock")
    (tmp_path / "made").mkdir()
    (tmp_path / "made" / "manifest.json").write_text(json.dumps({"first_id": 0, "shard_size": 8, "sampler": {}}))
    write(tmp_path, "made/0.png")
    listed, note = actual(tmp_path)
    assert [path for _, path in listed["all"]] == ["a/0.png", "b/0.png"]
    assert note == "not read: 4 folders written by kr-fast"
    (tmp_path / "made" / "manifest.json").write_text("[]")
    assert [path for _, path in actual(tmp_path)[0]["all"]][-1] == "made/0.png"
    with pytest.raises(UserError, match="data: source must hold images as class/image.png, got .*run, which kr-fast"):
        folders.find(tmp_path / "run")


@pytest.mark.parametrize(
    ("paths", "words"),
    [
        (["a/0.png", "b/0.gif", "b/1.gif"], r"every class must have a training .*, got none of b \(it holds 2 .gif\)"),
        (["a/0.png", "b/", "c/0.png"], "every class must have a training image, got none of b .it is empty: remove"),
        (["a/0.png", "b/.DS_Store"], "every class must have a training image, got none of b .it is empty"),
        (["a/0.gif", "b/0.txt"], r"hold images as class/image.png \(.png, .*\), got none in .*holds 1 .gif, 1 .txt"),
        (["0.png", "1.png", "labels.csv"], r"one folder of images for each .*, got 2 images and no folder in .*1 .csv"),
        (["set/a/0.png", "set/b/0.png"], "number of classes must be 2 to 1000, got 1, set .give .*set if the classes"),
        (["train/0.png", "test/1.png"], "one folder of images for each class, got 1 image and no folder in .*train"),
        (["val/a/0.png", "test/a/1.png"], "source must hold a folder train beside test, val, got"),
        (["train/a/0.png", "Train/a/0.png", "test/a/0.png"], "hold one folder of the train split, got Train, train"),
        (["cat/train/0.png", "cat/test/0.png", "dog/train/0.png"], "have its splits above its classes, .*got cat with"),
        (["xray/train/a/0.png", "xray/test/a/0.png"], r"got xray with test, train \(give .*/xray\)"),
        (["train/a/0.png", "train/b/0.png", "test/0.png"], r"in .*test \(remove it, and test is cut from the training"),
        (["train_set/a/0.png", "train_set/b/0.png", "test_set/a/0.png"], "name .* splits .*, got test_set, train_set"),
        (["seg_train/x/a/0.png", "seg_test/x/a/0.png", "seg_pred/0.png"], "name .* splits .*, got seg_test, seg_train"),
        (["TrainingData/a/0.png", "imgs-val/a/0.png"], "name .* splits .*, got TrainingData, imgs-val"),
        (["train/a/0.png", "train/b/0.png", "unlabelled/0.png"], "the folders of splits .* alone, or classes alone"),
        (
            ["train/a/0.png", "train/b/0.png", "test/c/0.png"],
            "test class folders must be among those of .*, got c .move some",
        ),
        (["train/a/0.png", "train/b/0.png", "test/a/"], r"hold images as class/image.png .*, got none in .*test"),
        (["a\nb/0.png", "c/0.png"], r"class folders must have names that can be printed, in UTF-8, got a\\nb"),
        (["/".join("a" * 70) + "/0.png", "b/0.png"], "source must have folders at most 64 deep"),
        ([f"{index}/0.png" for index in range(1001)], "number of classes must be 2 to 1000, got 1001 folders"),
    ],
)
def test_trees_that_are_refused(tmp_path, paths, words):
    with pytest.raises(UserError, match=f"^data: .*{words}") as error:
        folders.find(write(tmp_path, *paths))
    assert "\n" not in str(error.value)


def test_links(tmp_path):
    """To other folders they are followed; in circles they are not."""
    outside = write(tmp_path / "outside", "0.png", "1.png")
    root = write(tmp_path / "set", "a/0.png")
    (root / "b").symlink_to(outside)
    (root / "a" / "up").symlink_to(root)
    (root / "a" / "self").symlink_to("self")
    listed, note = actual(root)
    assert [path for _, path in listed["all"]] == ["a/0.png", "b/0.png", "b/1.png"]
    assert note == "not read: 1 file (other), 1 link to folders that are read already"


def test_one_folder_at_two_places_is_of_one_class_or_refused(tmp_path):
    """Whichever of the two is the link, and whichever name comes first."""
    root = write(tmp_path / "classes", "a/0.png", "b/old/1.png", "c/2.png")
    (root / "b" / "latest").symlink_to(root / "b" / "old")
    assert actual(root)[1] == "not read: 1 link to folders that are read already"
    (root / "a" / "more").symlink_to(root / "c")
    with pytest.raises(UserError, match="source must hold each folder once, got c, which is a/more"):
        folders.find(root)
    (root / "a" / "more").unlink()
    for name in ("aa", "d"):
        (root / name).symlink_to(root / "c")
        with pytest.raises(UserError, match=f"source must hold each folder once, got {name}, which is c"):
            folders.find(root)
        (root / name).unlink()
    root = write(tmp_path / "splits", "train/a/0.png", "train/b/0.png", "test/a/1.png")
    (root / "all").symlink_to(root / "train")
    (root / "val").symlink_to(root / "test")
    with pytest.raises(UserError, match="source must hold each folder once, got val, which is test"):
        folders.find(root)
    (root / "val").unlink()
    assert list(actual(root)[0]) == ["train", "test"]
    root = write(tmp_path / "linked", "raw/a/0.png", "raw/b/0.png", "train/", "test/a/1.png")
    (root / "train" / "a").symlink_to(root / "raw" / "a")
    (root / "train" / "b").symlink_to(root / "raw" / "b")
    assert [path for _, path in actual(root)[0]["train"]] == ["train/a/0.png", "train/b/0.png"]


def test_folds_and_masks_that_are_taken_for_images_of_a_class_are_told(tmp_path):
    for name, paths, told in (
        ("folds", ["f1/a/0.png", "f1/b/0.png", "f2/a/0.png", "f2/b/0.png"], True),
        ("masks", ["a/images/0.png", "a/masks/0.png", "b/images/0.png", "b/masks/0.png"], True),
        ("patients", ["a/p1/0.png", "a/p2/0.png", "b/p3/0.png", "b/p4/0.png"], False),
        ("shots", ["a/img/0.png", "b/img/0.png"], False),
        ("flat", ["a/0.png", "a/x/0.png", "a/y/0.png", "b/x/0.png", "b/y/0.png"], False),
    ):
        warnings = folders.find(write(tmp_path / name, *paths))[3]
        assert bool(warnings) == told
        assert all("2 names" in each and "masks" in each for each in warnings)


def test_names_that_are_not_utf8(tmp_path):
    root = write(tmp_path, "a/0.png", "b/0.png")
    os.close(os.open(os.fsencode(root) + b"/a/\xff.png", os.O_CREAT))
    assert len(actual(root)[0]["all"]) == 3
    os.mkdir(os.fsencode(root) + b"/\xff")
    with pytest.raises(UserError, match=r"class folders must have names that can be printed, in UTF-8, got \\udcff"):
        folders.find(root)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_unreadable_folder(tmp_path):
    root = write(tmp_path, "a/0.png", "b/0.png")
    (root / "b").chmod(0)
    with pytest.raises(UserError, match=r"^data: source must be a readable folder, got .*b \(Permission denied\)"):
        folders.find(root)
    (root / "b").chmod(0o700)
