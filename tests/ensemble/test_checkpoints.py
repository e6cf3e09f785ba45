"""Files of weights: read by content, matched exactly, and said where they were found."""

import argparse
import collections
import logging
import os
import pickle

import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from kr_fast.ensemble import LogitsOf
from kr_fast.ensemble.checkpoints import load_weights
from kr_fast.runtime.errors import UserError

WHERE = "audit: checkpoint target"


def net(blocks=2):
    """Blocks that are asked in a loop: a deeper file fits every name of a shallower network."""
    return nn.ModuleDict({"blocks": nn.ModuleList(nn.Linear(3, 3) for _ in range(blocks)), "norm": nn.BatchNorm1d(3)})


def same(first, second):
    other = second.state_dict()
    return all(torch.equal(value, other[name]) for name, value in first.state_dict().items())


def refused(tmp_path, result, model=None, name="w.pt"):
    """The error of a file that is, or holds, ``found``, behind the words before it."""
    path = tmp_path / name
    if isinstance(result, bytes):
        path.write_bytes(result)
    else:
        torch.save(result, path)
    model = model or net()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(UserError) as caught:
        load_weights(model, path, WHERE)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    text = str(caught.value)
    assert "\n" not in text
    assert text.startswith(f"{WHERE} must ")
    return text.replace(str(path), "FILE").removeprefix(f"{WHERE} must ")


def test_a_deeper_network_is_another(tmp_path):
    words = refused(tmp_path, net(3).state_dict())
    assert words == "hold the network's 9 tensors, got 2 unexpected (blocks.2.weight first) in FILE"
    words = refused(tmp_path, net(1).state_dict())
    assert words == "hold the network's 9 tensors, got 2 missing (blocks.1.weight first) in FILE"
    state = net().state_dict()
    del state["blocks.0.bias"]
    words = refused(tmp_path, {"state_dict": {f"module.{k}": v for k, v in state.items()} | {"epoch": 3}})
    assert (
        "got 1 missing (blocks.0.bias first) and 1 unexpected (epoch first) under state_dict with the prefix" in words
    )


PREFIXES = ("", "module.", "_orig_mod.", "_module.", "model.", "module._orig_mod.", "net.encoder.")
KEYS = ((), ("state_dict",), ("model",), ("model_state_dict",), ("net",), ("state", "model"))


@settings(max_examples=40, deadline=None)
@given(st.sampled_from(PREFIXES), st.sampled_from(KEYS), st.booleans(), st.booleans())
def test_one_wrapper_and_one_prefix_are_taken(tmp_path_factory, prefix, keys, safe, wrapped):
    path, saved, loaded = tmp_path_factory.getbasetemp() / "wrapped.bin", net(), net()
    result = {prefix + name: value for name, value in saved.state_dict().items()}
    if safe and not keys:
        safetensors.torch.save_file(result, path)
    else:
        for key in reversed(keys):
            optimizer = {"state": {0: {"momentum": torch.zeros(3, 3)}}, "param_groups": [{"lr": 0.1}]}
            result = {"epoch": 3, key: result, "optimizer": optimizer}
        torch.save(result, path)
    load_weights(LogitsOf(loaded) if wrapped else loaded, path, WHERE)
    assert same(saved, loaded)


def test_what_was_done_is_said(tmp_path, caplog):
    torch.save({"state_dict": {f"module.{k}": v for k, v in net().state_dict().items()}}, tmp_path / "w.pt")
    torch.save(net().state_dict(), tmp_path / "plain.pt")
    with caplog.at_level(logging.INFO, "kr_fast"):
        load_weights(net(), tmp_path / "w.pt", WHERE)
        load_weights(net(), tmp_path / "plain.pt", WHERE)
    said = [record.getMessage() for record in caplog.records]
    assert said == [f"{WHERE}: weights found under state_dict with the prefix module., in {tmp_path / 'w.pt'}"]


def test_two_sets_of_weights_are_a_question(tmp_path):
    words = refused(tmp_path, {"model": net().state_dict(), "model_ema": net().state_dict(), "epoch": 1})
    assert words.startswith("hold one set of weights, got 2 that fit in FILE: under model and under model_ema (torch.")
    both = {f"{name}.{key}": value for name in ("model", "ema") for key, value in net().state_dict().items()}
    assert "9 unexpected (ema.blocks.0.weight first) with the prefix model." in refused(tmp_path, both)
    state = net().state_dict()  # one set under two keys is one, and so is one beside another of other shapes
    torch.save({"model": state, "best": state, "teacher": net(3).state_dict()}, tmp_path / "w.pt")
    load_weights(result := net(), tmp_path / "w.pt", WHERE)
    assert torch.equal(result.state_dict()["blocks.0.weight"], state["blocks.0.weight"])


def test_a_position_in_a_sequential_is_no_prefix(tmp_path):
    """What stands before it may change every answer."""
    saved = nn.Sequential(nn.Flatten(), nn.Linear(3, 2)).state_dict()
    words = refused(tmp_path, saved, nn.Linear(3, 2))
    assert words == "hold the network's tensors (weight, ...), got 1.weight, 1.bias in FILE"


def test_tensors_that_do_not_fit(tmp_path):
    def changed(name, value):
        return {"model": net().state_dict() | {name: value}}

    weight = "blocks.0.weight"
    assert refused(tmp_path, changed(weight, torch.zeros(4, 3))).startswith(
        f"hold {weight} of shape [3, 3], got [4, 3]"
    )
    assert refused(tmp_path, changed(weight, 3.0)).startswith(f"hold {weight} of shape [3, 3], got a float")
    assert "of floating numbers, got int64 [3, 3]" in refused(tmp_path, changed(weight, torch.ones(3, 3).long()))
    assert "of floating numbers, got complex64" in refused(tmp_path, changed(weight, torch.ones(3, 3) * 1j))
    assert "meta, sparse or quantized" in refused(tmp_path, changed(weight, torch.ones(3, 3).to_sparse()))
    for bad in (torch.nan, torch.inf):
        words = refused(tmp_path, changed("blocks.1.bias", torch.full((3,), bad)))
        assert words == "hold finite weights, got NaN or inf in blocks.1.bias of FILE"
    assert refused(tmp_path, [1]) == (
        "hold a state dict, got a list in FILE (torch.save(model.state_dict(), FILE) writes tensors alone)"
    )
    words = refused(tmp_path, {"epoch": 1, "optimizer": {"state": {}}, "args": None})
    assert words == "hold the network's tensors (blocks.0.weight, ...), got epoch, optimizer, args in FILE"
    assert refused(tmp_path, {}) == "hold the network's tensors (blocks.0.weight, ...), got nothing in FILE"


def test_weights_are_finite_in_the_type_of_the_network(tmp_path):
    """Numbers of any floating type are taken as the network holds them; what is too large for it would be inf."""
    for dtype in (torch.float8_e4m3fn, torch.float8_e5m2, torch.bfloat16, torch.float64):
        state = {
            key: value.to(dtype) if value.is_floating_point() else value for key, value in net().state_dict().items()
        }
        torch.save(state, tmp_path / "w.pt")
        load_weights(result := net(), tmp_path / "w.pt", WHERE)
        assert torch.equal(result.state_dict()["blocks.0.weight"], state["blocks.0.weight"].float())
    state["norm.running_var"][1] = 1e300
    assert refused(tmp_path, state) == "hold finite weights, got NaN or inf as float32 in norm.running_var of FILE"
    state = net().state_dict()
    state["blocks.1.bias"][0] = 7e4
    words = refused(tmp_path, state, net().half())
    assert words == "hold finite weights, got NaN or inf as float16 in blocks.1.bias of FILE"


def test_what_makes_no_difference_is_taken(tmp_path):
    saved = net()
    state = {name: value.half() if value.is_floating_point() else value for name, value in saved.state_dict().items()}
    del state["norm.num_batches_tracked"]
    torch.save(state, tmp_path / "half.pt")
    load_weights(result := net(), tmp_path / "half.pt", WHERE)
    assert torch.equal(result["blocks"][0].weight, saved["blocks"][0].weight.half().float())
    torch.save(saved.state_dict() | {"norm.num_batches_tracked": torch.tensor(2.5)}, tmp_path / "mean.pt")
    load_weights(net(), tmp_path / "mean.pt", WHERE)


def test_objects_are_named_and_never_loaded(tmp_path):
    class Ran:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "ran"),)

    for value, name in (
        (argparse.Namespace(lr=1), "argparse.Namespace"),
        (np.float64(1), "numpy._core.multiarray.scalar"),
        (collections.defaultdict(list), "collections.defaultdict"),
        (nn.Linear(1, 1), "torch.nn.modules.linear.Linear"),
        (Ran(), "posix.mkdir"),
    ):
        words = refused(tmp_path, {"state_dict": net().state_dict(), "more": value})
        assert words.startswith("be a readable .safetensors or .pt state dict, got FILE (it holds an object of ")
        assert f"of {name.split('.')[0]}" in words
        assert words.endswith("and only tensors are read; torch.save(model.state_dict(), FILE) writes tensors alone)")
    assert not (tmp_path / "ran").exists()


def test_formats_are_told_by_content(tmp_path):
    saved = net()
    safetensors.torch.save_file(saved.state_dict(), tmp_path / "s.pt")
    torch.save(saved.state_dict(), tmp_path / "t.safetensors")
    torch.save(saved.state_dict(), tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    for name in ("s.pt", "t.safetensors", "old.pt"):
        load_weights(result := net(), tmp_path / name, WHERE)
        assert same(result, saved)
    scripted = tmp_path / "script.pt"
    torch.jit.script(nn.Linear(1, 1)).save(scripted)
    np.savez(tmp_path / "n.npz", a=np.zeros(2))
    whole, safe = ((tmp_path / name).read_bytes() for name in ("t.safetensors", "s.pt"))
    for content, why in {
        b"": "the file is empty",
        b"version https://git-lfs.example/spec/v1\nsize 3\n": "it is a Git LFS pointer and not the file itself",
        b"<!DOCTYPE html><title>404</title>": "it is a web page",
        b'{"metadata": {}, "weight_map": {}}': "it is the index of weights in several files; save them as one",
        b'{"abcd":{}}': "it is JSON",
        b"\x89HDF\r\n\x1a\n1": "it is an HDF5 file, as Keras writes",
        b"\x93NUMPY\x01\x00": "it is an .npy file",
        (tmp_path / "n.npz").read_bytes(): "it is an .npz file",
        b"\x1f\x8b\x08": "it is compressed by gzip",
        b"no weights": "it starts as neither",
        scripted.read_bytes(): "it is a TorchScript program; torch.save(",
        whole[: len(whole) // 2]: "it is damaged or cut short",
        safe[:-5]: "Error while deserializing",
        pickle.dumps({"w": np.zeros(3)}): "it is damaged, or another kind of file",
        b"\x80\x02": "",
    }.items():
        words = refused(tmp_path, content)
        assert words.startswith(f"be a readable .safetensors or .pt state dict, got FILE ({why}")
        assert "weights_only" not in words


def test_paths_that_are_no_files(tmp_path):
    os.mkfifo(tmp_path / "pipe.pt")
    for path in (tmp_path, tmp_path / "pipe.pt"):
        with pytest.raises(UserError, match="audit: checkpoint target must be a regular file, got"):
            load_weights(net(), path, WHERE)
    with pytest.raises(FileNotFoundError, match="audit: checkpoint target must be a file, got"):
        load_weights(net(), tmp_path / "absent.pt", WHERE)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_damage_is_one_line_or_the_same_weights(tmp_path_factory, data):
    path, saved = tmp_path_factory.getbasetemp() / "damaged.pt", net()
    if data.draw(st.booleans()):
        safetensors.torch.save_file(saved.state_dict(), path)
    else:
        torch.save(saved.state_dict(), path)
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(content[: data.draw(st.sampled_from([len(content), len(content) // 2, 9]))])
    words = ""
    try:
        load_weights(net(), path, WHERE)
    except UserError as error:
        words = str(error)
    assert "\n" not in words
