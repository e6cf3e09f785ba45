"""An ``.npz`` of signals as others write or damage it: read to the same figures, or one error with the file's name."""

import json
import os
import struct
import warnings
import zipfile

import numpy as np
import pytest
import torch
from audit_cases import MODELS, data, logits_of
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kr_fast.membership import (
    Choices,
    TargetSignals,
    audit_signals,
    from_logits,
    load_lira_tree,
    load_npz,
    load_privacy_meter,
    save_npz,
)
from kr_fast.runtime.errors import UserError

ORDERS = settings(deadline=None, max_examples=12, suppress_health_check=[HealthCheck.function_scoped_fixture])


def arrays():
    logits, keep, labels, members = (value.numpy() for value in logits_of())
    return {"keep": keep, "labels": labels, "members": members, "logits": logits[:-1], "target/t/logits": logits[-1]}


def taken(call):
    """(what the call returns, None), or (None, the text of its refusal)."""
    try:
        return call(), None
    except UserError as error:
        return None, str(error)


@ORDERS
@given(
    floats=st.sampled_from(["<f4", ">f4", "<f8", ">f8", "g", "<f2", ">f2"]),
    integers=st.sampled_from(["<i8", ">i8", "u1", ">u2", "<u8", "i1"]),
    mask=st.sampled_from(["?", "u1", ">i4", "<f4"]),
    column=st.booleans(),
    fortran=st.booleans(),
    compressed=st.booleans(),
)
def test_any_dtype_byte_order_and_layout(tmp_path, floats, integers, mask, column, fortran, compressed):
    given_ = arrays()
    expected = from_logits(
        *(torch.from_numpy(given_[name]) for name in ("logits", "keep", "labels")),
        target={"t": given_["target/t/logits"]},
        members=given_["members"],
    )
    for name in given_:
        kind = {"b": mask, "i": integers, "f": floats}[given_[name].dtype.kind]
        given_[name] = np.asarray(given_[name].astype(kind), order="F" if fortran else "C")
    if column:
        given_ |= {name: given_[name][:, None] for name in ("labels", "members")}
    (np.savez_compressed if compressed else np.savez)(tmp_path / "a.npz", **given_)
    result = load_npz(tmp_path / "a.npz")
    assert torch.equal(result.shadows["shadows"].keep, expected.shadows["shadows"].keep)
    assert torch.equal(result.members, expected.members)
    assert torch.equal(result.labels, expected.labels)
    room = 0.05 if "2" in floats else 1e-5
    a, b = ((each.targets["t"], each.shadows["shadows"]) for each in (result, expected))
    for one, other in zip(a, b, strict=True):
        assert torch.allclose(one.signals["phi"], other.signals["phi"], atol=room)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)
FACTS = st.dictionaries(st.sampled_from(["kind", "shared", "accuracy", "control", "sort"]), JSON, max_size=4)
ABOUT = st.dictionaries(
    st.sampled_from(["shadows", "augment", "notes", "targets", "more"]),
    JSON | st.dictionaries(st.sampled_from(["t", "u"]), FACTS | JSON, max_size=2),
    max_size=4,
)


@settings(ORDERS, max_examples=60)
@given(about=ABOUT | JSON)
def test_about_of_any_json(tmp_path, about):
    """Read, to values of the types that it must have, or refused by name."""
    np.savez(tmp_path / "a.npz", **arrays(), about=np.array(json.dumps(about)))
    result, error = taken(lambda: load_npz(tmp_path / "a.npz"))
    if result is None:
        assert error.startswith("audit: ")
        assert error.endswith(f" in {tmp_path / 'a.npz'}")
        return
    target = result.targets["t"]
    assert target.accuracy is None or (type(target.accuracy) is float and 0 <= target.accuracy <= 1)
    assert target.kind in ("full", "transfer")
    assert (type(target.shared), type(target.control), type(result.augment)) == (str, bool, str)
    assert all(isinstance(note, str) for note in result.notes)


@pytest.mark.parametrize("accuracy", ["NaN", "99.5", "-0.01", '"NaN"', '"0.5"', "true", "[0.5]", "1e999"])
def test_an_accuracy_that_is_none_is_refused(tmp_path, accuracy):
    about = np.array('{"targets": {"t": {"accuracy": ' + accuracy + "}}}")
    np.savez(tmp_path / "a.npz", **arrays(), about=about)
    with pytest.raises(UserError, match=r"audit: accuracy must be in \[0, 1\], got .* in .*a.npz"):
        load_npz(tmp_path / "a.npz")


@settings(ORDERS, max_examples=25)
@given(
    places=st.lists(st.tuples(st.floats(0, 1), st.integers(1, 255)), min_size=1, max_size=6), cut=st.floats(0.2, 1.5)
)
def test_damaged_bytes_are_one_error(tmp_path, places, cut):
    path = tmp_path / "a.npz"
    np.savez_compressed(path, **arrays())
    content = bytearray(path.read_bytes())
    for place, change in places:
        content[int(place * (len(content) - 1))] ^= change
    path.write_bytes(content[: int(cut * len(content))])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        result, error = taken(lambda: load_npz(path))
    assert result is not None or str(path) in error


def member(path, name, data):
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr(f"{name}.npy", data)


def test_headers_that_claim_too_much_pipes_and_foreign_members(tmp_path):
    path = tmp_path / "a.npz"
    header = str({"descr": "<f8", "fortran_order": False, "shape": (10**9, 12)}).encode().ljust(117) + b"\n"
    claim = b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header
    np.savez(path, **{name: value for name, value in arrays().items() if name != "logits"})
    member(path, "logits", claim)
    with pytest.raises(UserError, match=r"signals must hold a readable array logits, got .*a.npz \(its header claims"):
        load_npz(path)
    for name, value, words in (
        ("class_names", np.array(["a", None]), "signals must hold known keys only .*, got class_names in .*a.npz"),
        ("images", np.array([{}]), "signals must hold a readable array images, got .*a.npz"),
        ("images", np.zeros(80, dtype=[("a", "i4")]), "signals must hold a readable array images, got .*a.npz"),
        ("images", np.array(["a"] * 80), "images must hold numbers, got <U1 in .*a.npz"),
        ("images", np.zeros((80, 4, 4)), r"images must be uint8 \[N, H, W, C\], got float64 .* in .*a.npz"),
        ("answers", np.zeros((80, MODELS)), "signals must"),
    ):
        np.savez(path, **{**arrays(), name: value})
        if name == "answers":
            load_npz(path)  # logits have answers of their own
            continue
        with pytest.raises(UserError, match=words):
            load_npz(path)
    os.mkfifo(tmp_path / "pipe.npz")
    with pytest.raises(UserError, match="signals must be a regular file, got .*pipe.npz"):
        load_npz(tmp_path / "pipe.npz")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"members": np.ones(80, dtype=bool)}, "members must hold members and non-members, got 80 of 80 members"),
        ({"labels": np.full(80, 9)}, r"labels must lie in \[0, 5\), got \[9, 9\]"),
        ({"labels": np.full(80, -1)}, "labels must be at least 0"),
        ({"labels": np.zeros((1, 80), int)}, "labels must be of the 80 examples of keep"),
        ({"logits": np.full((12, 80, 5), np.inf, np.float32)}, r"logits must not hold \+inf"),
        ({"logits": np.zeros((12, 80, 1))}, r"logits must have a logit for each class .* \[0, z\]\)"),
        ({"logits": np.zeros((12, 80))}, r"logits must be float \[M, 80, \(A,\) C\], .* \(one logit z for two classes"),
        ({"target/t/logits": np.zeros(80)}, r"target/t/logits must be float .* \(one logit z for two classes"),
        ({"logits": np.zeros((0, 80, 5)), "keep": np.zeros((0, 80))}, "logits must be float"),
        ({"logits": np.zeros((1, 80, 5)), "keep": np.zeros((1, 80))}, "shadows must be at least 2, got 1"),
        ({"keep": np.full((12, 80), 2)}, "keep must be bool, or hold 0 and 1 only"),
        ({"keep": None}, "signals must hold the key keep"),
        ({"population/logits": np.zeros((12, 9, 5))}, "signals must hold population/labels beside population/logits"),
        ({"population/phi": np.zeros((1, 9, 11))}, r"population of the shadows must be phi of shape \[1, Z, 12\]"),
        ({"population/keep": np.zeros((12, 9))}, r"keep of the population must have shape \[M, Z\] = \[12, 0\]"),
        ({"synthetic/setting": np.zeros((3, 2, 2, 1), np.uint8)}, "synthetic must have names other than"),
        ({"target/setting/phi": np.zeros(80)}, "target must have names other than"),
        ({"target/u/correct": np.zeros(80)}, "signals of the target must hold phi, got correct"),
    ],
)
def test_what_a_file_holds_is_named_with_it(tmp_path, change, words):
    np.savez(tmp_path / "a.npz", **{k: v for k, v in {**arrays(), **change}.items() if v is not None})
    with pytest.raises(UserError, match=f"audit: {words}.* in .*a.npz$"):
        audit_signals(load_npz(tmp_path / "a.npz"))


@pytest.mark.parametrize("form", ["logits", "phi", "from_logits", "population"])
def test_a_target_alone(tmp_path, form):
    """Its answers, labels and members, as published files hold them: the attacks that need no shadow."""
    given_ = arrays()
    alone = {name: given_[name] for name in ("labels", "members", "target/t/logits")}
    both = {"target": given_["target/t/logits"], "members": given_["members"]}
    expected = audit_signals(from_logits(given_["logits"], given_["keep"], given_["labels"], **both))
    if form == "phi":
        phi = from_logits(None, None, alone["labels"], target=alone.pop("target/t/logits"), members=alone["members"])
        alone |= {"target/t/phi": phi.targets["target"].signals["phi"].numpy()}
        alone.pop("labels")
    if form == "from_logits":
        result = from_logits(
            None, None, alone["labels"], target={"t": alone["target/t/logits"]}, members=alone["members"]
        )
        save_npz(tmp_path / "a.npz", result)
    else:
        z = {"target/t/population/logits": given_["logits"][0, :30], "population/labels": given_["labels"][:30]}
        np.savez(tmp_path / "a.npz", **alone, **(z if form == "population" else {}))
    attacks = ("loss", "attack_p") if form == "population" else None
    report = audit_signals(load_npz(tmp_path / "a.npz"), Choices(attacks=attacks))
    assert set(report.figures["t"]) == set(attacks or ("loss",))
    assert torch.equal(report.scores["t"]["loss"], expected.scores["target"]["loss"])
    assert report.figures["t"]["loss"]["auc_ci"] == expected.figures["target"]["loss"]["auc_ci"]
    setting = report.setting
    assert (setting["primary"], setting["num_shadows"], setting["targets"]["t"]["shadows"]) == ("loss", 0, None)
    if not attacks:
        assert setting["skipped"]["lira"] == "shadow models (keep, and their logits or signals)"
        with pytest.raises(UserError, match="lira needs shadow models"):
            audit_signals(load_npz(tmp_path / "a.npz"), Choices(attacks=("lira",)))
        with pytest.raises(UserError, match="every shadow must be attacked where there are shadows"):
            audit_signals(load_npz(tmp_path / "a.npz"), Choices(targets="shadows"))
    if form == "logits":
        assert "attacks that need no shadow" in report.write(tmp_path / "out").read_text()
    again = tmp_path / "again.npz"
    save_npz(again, report.data)
    assert load_npz(again).shadows == {}


def test_targets_alone_are_compared(tmp_path):
    given_ = arrays()
    more = {"target/u/logits": given_["logits"][0]}
    alone = {name: given_[name] for name in ("labels", "members", "target/t/logits")}
    np.savez(tmp_path / "a.npz", **alone, **more)
    report = audit_signals(load_npz(tmp_path / "a.npz"))
    assert report.comparison["u"]["loss"]["first"] == "t"
    assert report.setting["notes"] == []


def test_a_tree_of_numbered_folders_says_what_to_do(tmp_path):
    """As a re-implementation of the LiRA code leaves its models: 0/keep.npy, 0/logits.npy."""
    for name in "01":
        (tmp_path / name).mkdir()
        np.save(tmp_path / name / "keep.npy", np.ones(4, bool))
        np.save(tmp_path / name / "logits.npy", np.zeros((4, 1, 3)))
    words = r"LiRA tree must hold experiment-\*/keep.npy .of other trees stack the arrays for --signals: keep .M, N.,"
    with pytest.raises(UserError, match=rf"{words} .*, got 2 folders such as 0/ in {tmp_path}"):
        load_lira_tree(tmp_path)


def test_arrays_of_privacy_meter(tmp_path):
    keep = data().shadows["shadows"].keep
    (tmp_path / "signals").mkdir()
    p = torch.rand(600, MODELS, generator=torch.Generator().manual_seed(0)).numpy()
    np.save(tmp_path / "memberships.npy", keep.numpy().astype(np.int64))
    np.save(tmp_path / "signals" / "rmia_signals.npy", p.astype(">f8"))
    result = load_privacy_meter(tmp_path)
    assert torch.equal(result.shadows["shadows"].keep, keep[1:])
    assert torch.equal(result.members, keep[0])
    for bad, words in (
        ((p > 0.5).astype(int), r"rmia_signals.npy must be float \[N, 12\], got int64"),
        (p[:0], "rmia_signals.npy must be float"),
        (p[:5], r"keep must have shape \[M, N\] = \[11, 5\], got \[11, 600\] in"),
        (p + np.nan, r"rmia_signals.npy must lie in \[0, 1\]"),
    ):
        np.save(tmp_path / "signals" / "rmia_signals.npy", bad)
        with pytest.raises(UserError, match=words):
            load_privacy_meter(tmp_path)


def test_accuracies_of_targets():
    phi = {"phi": torch.randn(1, 5)}
    for value in (0, 1, 0.25, np.float32(0.25), torch.tensor(0.25), None):
        assert TargetSignals(phi, accuracy=value).accuracy in (0.0, 1.0, 0.25, None)
    for value in (float("nan"), 1.01, -1e-9, "0.5", True, [0.5], np.array([0.5]), 1j, float("inf")):
        with pytest.raises(UserError, match=r"audit: accuracy must be in \[0, 1\], got"):
            TargetSignals(phi, accuracy=value)
