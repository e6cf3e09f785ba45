"""Members as everybody writes them: masks and indices, of any dtype, in arrays, lists and files."""

import codecs

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kr_fast.membership.inputs.pool import chosen, pool_of, read_members
from kr_fast.runtime.inputs import as_mask

DTYPES = ["bool", "u1", "i1", "<i2", ">i4", "<u8", ">u2", "<f4", ">f8", "<f2"]


@settings(deadline=None, max_examples=60)
@given(mask=st.lists(st.booleans(), min_size=3, max_size=40), dtype=st.sampled_from(DTYPES), column=st.booleans())
def test_a_mask_and_its_indices_are_one_pool(mask, dtype, column):
    """bool, or 0 and 1 of any dtype; [N] or [N, 1]; array, list or tensor; and the indices of the True ones."""
    expected = torch.tensor(mask)
    array = np.array(mask, dtype=dtype).reshape((-1, 1) if column else (-1,))
    for value in (array, array.tolist(), expected, expected.long(), expected.bfloat16()):
        assert torch.equal(chosen("members", value, len(mask)), expected)
        assert torch.equal(as_mask("audit", "keep", value, 1), expected)
    if dtype != "bool":
        index = np.flatnonzero(mask).astype(dtype)[::-1]
        assert torch.equal(chosen("members", index, len(mask)), expected) or len(index) == len(mask)
    rows = np.array([mask, [not each for each in mask]], dtype=dtype)
    assert torch.equal(as_mask("audit", "keep", rows, 2), torch.stack([expected, ~expected]))


def test_of_two_examples_0_and_1_are_a_mask():
    assert pool_of([1, 0], None, 2)[0].tolist() == [True, False]


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ([0, 1, 1] * 4, r"must be bool \[10\], or indices .*, got a mask of 12 examples"),
        (range(1, 11), r"indices from 1 to 10 \(they start at 0\)"),
        ([-1, 3], "indices from -1 to 3"),
        ([2, 2, 3], "3 indices, 2 of them distinct"),
        ([0.5, 3.0], r"got list of 2 with \[0.5\]"),
        ([float("nan")], r"with \[nan\]"),
        ([float("inf")], "with inf"),
        ([1e300], "indices from"),
        (np.ones((10, 2)), r"got float64 \[10, 2\]"),
        (torch.zeros(9, dtype=torch.bool), r"got bool \[9\]"),
        (torch.zeros(10, dtype=torch.complex64), r"got complex64 \[10\]"),
        ("train", "members must be a tensor, a numpy array or a list of numbers, got str"),
        ({1, 2}, "members must be a tensor, a numpy array or a list of numbers, got set"),
        (None, "members must be bool .10. or indices, got None"),
        ([], "members must hold members and non-members, got 0 of 10 members"),
        ([[1], [2, 3]], "members must be a tensor, a numpy array or a list of numbers"),
    ],
)
def test_what_is_no_members(value, words):
    with pytest.raises(ValueError, match=words):
        pool_of(list(value) if isinstance(value, range) else value, None, 10)


def test_what_is_no_mask():
    for value, words in (
        (np.array([[0, 2]]), r"keep must be bool, or hold 0 and 1 only, got int64 \[1, 2\] with 2"),
        (np.array([[0.0, np.nan]]), "with nan"),
        (np.array([0, 1]), r"keep must have shape \[M, N\], got \[2\]"),
        (np.array([["a"]]), "must be a tensor, a numpy array or a list of numbers"),
    ):
        with pytest.raises(ValueError, match=words):
            as_mask("audit", "keep", value, 2)


TEXTS = {
    "plain.txt": b"3\n5\n8\n",
    "one line.txt": b"3 5 8",
    "commas.csv": b"3, 5, 8\n",
    "floats.txt": b"3.0\n5.000000000000000000e+00\n8.\n",
    "windows.txt": b"3\r\n5\r\n8\r\n",
    "mark.txt": codecs.BOM_UTF8 + b"3\n5\n8",
    "utf16.txt": "3\n5\n8\n".encode("utf-16"),
    "title.csv": b"\n# by hand\nindex of a member\n3\n5\n8\n\n",
    "quoted.CSV": b'"members"\n"3"\n"5"\n"8"\n',
    "semicolon.csv": b"index;\n3;\n5;\n8;\n",
}


@pytest.mark.parametrize("name", TEXTS)
def test_text_files(tmp_path, name):
    (tmp_path / name).write_bytes(TEXTS[name])
    assert read_members(tmp_path / name, "members").tolist() == [3, 5, 8]


def test_masks_in_text_files(tmp_path):
    for text in ("True\nFalse\nTrue\n", "1\n0\n1\n", "1.0\n0.0\n1.0\n", "member\ntrue\nfalse\ntrue\n"):
        (tmp_path / "m.csv").write_text(text)
        assert chosen("members", read_members(tmp_path / "m.csv", "members"), 3).tolist() == [True, False, True]


@pytest.mark.parametrize("dtype", DTYPES[1:])
def test_arrays_of_indices(tmp_path, dtype):
    for shape in ((3,), (3, 1), (1, 3)):
        np.save(tmp_path / "m.npy", np.array([3, 5, 8]).astype(dtype).reshape(shape))
        mask = chosen("members", read_members(tmp_path / "m.npy", "members"), 10)
        assert mask.nonzero()[:, 0].tolist() == [3, 5, 8]


@pytest.mark.parametrize(
    ("name", "data", "words"),
    [
        ("a.txt", b"3\nfive\n", r"must be a file of indices or a mask, got .*a.txt \(line 2: 'five'\)"),
        ("a.txt", b"3\n1.5\n", r"a.txt \(line 2: '1.5'\)"),
        ("a.txt", b"nan\n", r"a.txt \(line 1: 'nan'\)"),
        ("a.txt", b"1e999\n", r"a.txt \(line 1: '1e999'\)"),
        ("a.csv", b"one\ntwo\n3\n", r"a.csv \(line 2: 'two'\)"),
        ("a.csv", b",index\n0,3\n1,5\n", r"must be a file of one column, .* got 2 columns in .*a.csv"),
        ("a.txt", b"", "got .*a.txt without numbers"),
        ("a.txt", b"\xff\xfe\x00", "must be a readable text file, got .*a.txt"),
        ("a.txt", b"\x89PNG\r\n", "must be a readable text file, got .*a.txt"),
        ("a.npy", b"", r"must be a readable .npy file, got .*a.npy \(the file is empty\)"),
        ("a.npy", b"3\n5\n", r"must be a readable .npy file, got .*a.npy \(it does not start as one\)"),
    ],
)
def test_what_is_no_file_of_members(tmp_path, name, data, words):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(ValueError, match=f"audit: members {words}|audit: members must be .*{words}"):
        read_members(tmp_path / name, "members")
