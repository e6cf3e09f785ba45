"""Arrays from foreign files: every dtype and byte order comes back, damage is one line, nothing is taken first."""

import io
import os
import zipfile

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from kr_fast.runtime import array_files
from kr_fast.runtime.errors import UserError

DTYPES = st.one_of(
    hnp.integer_dtypes(endianness="?"),
    hnp.unsigned_integer_dtypes(endianness="?"),
    hnp.floating_dtypes(endianness="?"),
    hnp.boolean_dtypes(),
    hnp.unicode_string_dtypes(max_len=4),
)


@settings(max_examples=60, deadline=None)
@given(
    values=DTYPES.flatmap(lambda d: hnp.arrays(d, hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=5))),
    fortran=st.booleans(),
    compressed=st.booleans(),
)
def test_what_numpy_wrote_is_read(tmp_path_factory, values, fortran, compressed):
    path = tmp_path_factory.mktemp("npz") / "a.npz"
    values = np.asarray(values, order="F" if fortran else "C")
    (np.savez_compressed if compressed else np.savez)(path, x=values, other=np.arange(3))
    np.save(path.with_suffix(".npy"), values)
    with array_files.open_npz(path, "data") as archive:
        assert archive.keys == ["x", "other"]
        result = archive.read("x")
    for each in (result, array_files.read_npy(path.with_suffix(".npy"), "data", "source")):
        assert each.dtype.isnative
        assert each.shape == values.shape
        wide = values.dtype.kind == "f" and values.dtype.itemsize > 8
        np.testing.assert_array_equal(each, values.astype(np.float64) if wide else values)


@settings(max_examples=60, deadline=None)
@given(at=st.integers(0, 2000), new=st.integers(0, 255), cut=st.integers(1, 2000), compressed=st.booleans())
def test_damage_is_one_line_or_found_by_the_check_sum(tmp_path_factory, at, new, cut, compressed):
    values = np.arange(64, dtype=np.float32)
    for name, save in (("a.npz", np.savez_compressed if compressed else np.savez), ("a.npy", None)):
        path = tmp_path_factory.mktemp("damage") / name
        save(path, x=values) if save else np.save(path, values)
        whole = path.read_bytes()
        flipped = whole[: at % len(whole)] + bytes([new]) + whole[at % len(whole) + 1 :]
        for data in (flipped, whole[: -(cut % len(whole) or 1)]):
            path.write_bytes(data)
            error = None
            try:
                if save:
                    with array_files.open_npz(path, "data") as archive:
                        np.testing.assert_array_equal(archive.read("x"), values)
                else:
                    array_files.read_npy(path, "data", "source")  # has no check sum: numbers may differ
            except UserError as caught:
                error = str(caught)
            assert error is None or (str(path) in error and "\n" not in error)


def header(shape, dtype="<f4"):
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(file, {"shape": shape, "fortran_order": False, "descr": dtype})
    return file.getvalue()


def test_sizes_are_known_before_memory_is_taken(tmp_path, monkeypatch):
    """A header that claims 95 GB, a member that expands to 3 GB and is not asked for, and one that does not fit."""
    path = tmp_path / "a.npz"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("claims.npy", header((25_000_000_000,)) + bytes(64))
        archive.writestr("bomb.npy", header((1 << 22,), "|u1") + bytes(1 << 22))
        archive.writestr("x.npy", header((2,)) + bytes(8))
        archive.writestr("overflow.npy", header((2**62, 2**62)) + bytes(8))
        archive.writestr("below.npy", header((-2, -2)) + bytes(64))
    monkeypatch.setattr(array_files, "free_memory", lambda: 1 << 20)
    with array_files.open_npz(path, "data") as archive:
        assert archive.read("x").tolist() == [0, 0]
        for key, words in (
            ("claims", "its header claims 100000000000 bytes and the file holds 64"),
            ("bomb", "it needs 4 MiB of memory and 1 MiB are free"),
            ("overflow", "its header claims"),
            ("below", "its header claims"),
        ):
            with pytest.raises(UserError, match=f"data: source must hold a readable array {key}.*{words}"):
                archive.read(key)


def test_files_that_are_no_arrays(tmp_path):
    for name, data, words in (
        ("empty.npz", b"", "the file is empty"),
        ("text.npz", b"hello", "it is no .zip file"),
        ("cut.npz", b"PK\x03\x04" + bytes(40), "it is damaged or cut short"),
        ("lfs.npz", b"version https://git-lfs.example/spec/v1\nsize 3\n", "it is a Git LFS pointer"),
        ("page.npz", b"\n<!DOCTYPE html>", "it is a web page"),
        ("pickle.npz", b"\x80\x04K\x01.", "it is a pickle, which is not read"),
        ("gzip.npy", b"\x1f\x8b\x08\x00", "it is compressed by gzip"),
        ("array.npz", header((1,)) + bytes(4), "it is an .npy file"),
        ("empty.npy", b"", "the file is empty"),
        ("text.npy", b"hello", "does not start as one"),
        ("zip.npy", b"PK\x03\x04", "it is an .npz file"),
    ):
        path = tmp_path / name
        path.write_bytes(data)
        with pytest.raises(UserError, match=f"data: source must be a readable .np[yz] file, got .*{words}"):
            if path.suffix == ".npz":
                with array_files.open_npz(path, "data"):
                    pass
            else:
                array_files.read_npy(path, "data", "source")
    for name, read in (("torch.npz", array_files.open_npz), ("torch.npy", array_files.read_npy)):
        torch.save({"x": torch.zeros(2)}, tmp_path / name)
        with pytest.raises(UserError, match="it is a file of torch.save; numpy.save"):
            opened = read(tmp_path / name, "data", "source")
            opened.__enter__()
    np.savez(tmp_path / "objects.npz", x=np.array([{}], dtype=object), good=np.arange(2))
    with array_files.open_npz(tmp_path / "objects.npz", "data") as archive:
        assert archive.read("good").tolist() == [0, 1]
        with pytest.raises(UserError, match="Python objects.*astype"):
            archive.read("x")
    with (
        pytest.raises(FileNotFoundError, match="which is not there"),
        array_files.open_npz(tmp_path / "no.npz", "data"),
    ):
        pass


def test_an_encrypted_member_and_a_pipe(tmp_path):
    path = tmp_path / "a.npz"
    np.savez(path, x=np.arange(2))
    data = bytearray(path.read_bytes())
    for start in (b"PK\x03\x04", b"PK\x01\x02"):
        data[data.index(start) + (6 if start.endswith(b"\x04") else 8)] |= 1
    path.write_bytes(data)
    with array_files.open_npz(path, "data") as archive, pytest.raises(UserError, match="encrypted"):
        archive.read("x")
    os.mkfifo(tmp_path / "pipe.npz")
    for call in (
        lambda: array_files.open_npz(tmp_path / "pipe.npz", "data").__enter__(),
        lambda: array_files.read_npy(tmp_path / "pipe.npz", "data", "source"),
        lambda: array_files.read_npy(tmp_path, "data", "source"),
    ):
        with pytest.raises(UserError, match="data: source must be a regular file, got"):
            call()
