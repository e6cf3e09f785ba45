"""ModelArray over the styles of networks: numbers against float64, bits whatever stands beside, refusals."""

import functools
import logging
import re

import numpy as np
import pytest
import torch
from small_networks import NETWORKS, exact_logits, images_of, models_of
from torch import nn

from kr_fast.data import to_float
from kr_fast.ensemble import ModelArray, Query
from kr_fast.ensemble.inference import parallel
from kr_fast.models import classifier
from kr_fast.ops.membership.membership_signals import membership_signals
from kr_fast.runtime import memory
from kr_fast.runtime.errors import UserError

TRACED = [name for name in NETWORKS if name != "branching"]


@pytest.mark.parametrize("name", NETWORKS)
def test_logits_and_phi_are_those_of_float64(name):
    models, images = models_of(name), images_of()
    want, labels = exact_logits(models, images), torch.arange(20) % 5
    array = ModelArray(models)
    assert float((array(images).double() - want).abs().max()) <= 2e-5 * (1 + float(want.abs().max()))
    phi = array.signals(images, labels)["phi"][0].T.double()
    expected = torch.stack([membership_signals(z, labels)["phi"].double() for z in want])
    assert float((phi - expected).abs().max()) <= 1e-4


@pytest.mark.parametrize("name", TRACED)
def test_bfloat16_is_closer_than_a_loop_in_it(name):
    models, images = models_of(name), images_of()
    want, labels = exact_logits(models, images), torch.arange(20) % 5
    array = ModelArray(models, dtype=torch.bfloat16)
    phi = array.signals(images, labels)["phi"][0].T.double()
    expected = torch.stack([membership_signals(z, labels)["phi"].double() for z in want])
    with torch.no_grad():
        loop = torch.stack([model.bfloat16()(to_float(images).bfloat16()) for model in models]).double()
    torchs = torch.stack([membership_signals(z, labels)["phi"].double() for z in loop])
    assert float((phi - expected).square().mean()) <= float((torchs - expected).square().mean())


@pytest.mark.parametrize("name", NETWORKS)
def test_bits_do_not_follow_company(name):
    models, images, labels = models_of(name, 3), images_of(50), torch.arange(50) % 5
    chunk = 16  # 50 is three chunks and a tail
    plain = ModelArray(models, chunk=chunk).signals(images, labels, augment="flip")["phi"]
    order = torch.randperm(50, generator=torch.Generator().manual_seed(2))
    mixed = ModelArray(models, chunk=chunk).signals(images[order], labels[order], augment="flip")["phi"]
    assert torch.equal(mixed, plain[:, order])
    alone = ModelArray([models[2]], chunk=chunk).signals(images[:7], labels[:7], augment="flip")["phi"]
    assert torch.equal(alone[:, :, 0], plain[:, :7, 2])


def test_torchs_default_dtype_is_not_the_logits():
    models, images, labels = models_of("torchvision", 2), images_of(9), torch.arange(9) % 5
    expected = ModelArray(models)(images)
    phi = ModelArray(models).signals(images, labels)["phi"]
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        got, signals = ModelArray(models)(images), ModelArray(models).signals(images, labels)["phi"]
    finally:
        torch.set_default_dtype(before)
    assert torch.equal(got, expected)
    assert torch.equal(signals, phi)


# 1: other layouts in torch; 3 and 13: sizes that are no multiple of a vector, and a rest; 64: more images than
# there are.
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", TRACED)
def test_bits_do_not_follow_the_chunk(name, dtype):
    models, images = models_of(name, 2), images_of(18)
    first, *others = [ModelArray(models, chunk=chunk, dtype=dtype)(images) for chunk in (16, 1, 3, 13, 64)]
    for result in others:
        assert torch.equal(result, first)


def test_bits_do_not_follow_company_in_bfloat16():
    models, images = models_of("resnet8", 3), images_of(50)
    plain = ModelArray(models, dtype=torch.bfloat16, chunk=16)(images)
    order = torch.randperm(50, generator=torch.Generator().manual_seed(2))
    assert torch.equal(ModelArray(models[::-1], dtype=torch.bfloat16, chunk=16)(images[order]), plain[:, order].flip(0))


def test_bits_do_not_follow_threads():
    models, images, before = models_of("resnet8", 3), images_of(50), torch.get_num_threads()
    try:
        result = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            result.append(ModelArray(models, chunk=16)(images))
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    assert torch.equal(result[0], result[1])
    assert torch.equal(result[0], result[2])


def test_workers_compute_with_one_thread_each():
    before, result = torch.get_num_threads(), []
    try:
        torch.set_num_threads(2)
        work = lambda: result.append((torch.zeros(100_000).add_(1), torch.get_num_threads())[1])  # noqa: E731
        parallel.run([()] * 4, work, 2, lambda: None)
        assert result == [1] * 4
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("name", TRACED)
def test_structure_is_traced(name, caplog):
    with caplog.at_level(logging.WARNING, "kr_fast"):
        array = ModelArray(models_of(name))
        array(images_of(2))
    assert not caplog.records
    (program,) = array.runners.values()
    modules = {type(array.models[0].get_submodule(n.target)) for n in program.nodes if n.op == "call_module"}
    if name in ("resnet8", "torchvision"):
        bound = [layer for layer in program.layers.values() if layer.kind != "activation"]
        assert len(bound) == sum(isinstance(m, (nn.Conv2d, nn.Linear)) for m in array.models[0].modules())
        assert sum(layer.add for layer in program.layers.values()) == 3
        assert all(layer.in_place != layer.winograd for layer in program.layers.values() if layer.add)
        assert nn.ReLU not in modules
    if name != "normed":
        assert not [
            n for n in program.nodes if n.op == "call_module" and n.target.endswith("bn1") and n not in program.layers
        ]


def test_what_cannot_be_traced_says_so_once(caplog):
    array = ModelArray(models_of("branching"))
    with caplog.at_level(logging.WARNING, "kr_fast"):
        array(images_of(4))
        array(images_of(4))
    assert [r.getMessage() for r in caplog.records if "one by one" in r.getMessage()]
    assert len(caplog.records) == 1


def test_trace_that_goes_another_way_is_noticed(caplog):
    class Counting(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.head, self.calls = nn.Conv2d(3, 4, 3), nn.Linear(4, 5), 0

        def forward(self, x):
            self.calls += 1  # a trace sees one call, and its sign
            x = self.conv(x)
            return self.head(torch.where(x > 0, x, x * (1 if self.calls == 2 else 3)).mean((2, 3)))

    with caplog.at_level(logging.WARNING, "kr_fast"):
        ModelArray([Counting()])(images_of(2))
    assert "its trace does not give its answers" in caplog.text


def test_batch_statistics_are_those_of_the_chunk():
    models, images, labels = models_of("resnet8"), images_of(20), torch.arange(20) % 5
    result = ModelArray(models, bn="batch", chunk=12)(images)
    state = {k: v.clone() for k, v in models[0].state_dict().items()}
    for m, model in enumerate(models):
        model.double().train()
        with torch.no_grad():
            want = torch.cat([model(part) for part in to_float(images).double().split(12)])
        model.float().eval()
        assert torch.allclose(result[m].double(), want, atol=1e-4)
    fresh = models_of("resnet8")
    ModelArray(fresh, bn="batch").signals(images, labels)
    assert all(torch.equal(v, fresh[0].state_dict()[k]) for k, v in state.items())


def test_state_dicts_are_models():
    models, images = models_of("resnet8"), images_of(5)
    states = [model.state_dict() for model in models]
    assert torch.equal(ModelArray(states, NETWORKS["resnet8"])(images), ModelArray(models)(images))
    with pytest.raises(UserError, match="make_model must be given for models that are state dicts"):
        ModelArray(states)
    other = functools.partial(classifier, "resnet8", num_classes=6, in_channels=3)
    with pytest.raises(UserError, match=r"head.weight \[5, 64\] and \[6, 64\] in 0 and 1"):
        ModelArray([states[0], other().state_dict()], NETWORKS["resnet8"])


def test_the_first_difference_is_named():
    a, b = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()), nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU())
    with pytest.raises(
        UserError, match=r"one architecture, got 0 Conv2d\(3, 4, .* and Conv2d\(.*padding=\(1, 1\)\) in 0"
    ):
        ModelArray([a, b])
    with pytest.raises(UserError, match=r"got 1 ReLU\(\) and GELU\(.*\) in 0 and 1"):
        ModelArray([a, nn.Sequential(nn.Conv2d(3, 4, 3), nn.GELU())])
    first, second = models_of("resnet8")
    second.stages[1].stride = 1
    with pytest.raises(UserError, match="got stages.1 with stride 2 and 1 in 0 and 1"):
        ModelArray([first, second])


def test_chunks_that_do_not_fit_are_refused_with_the_size_that_would(monkeypatch):
    array = ModelArray(models_of("resnet8"), chunk=64)
    array(images_of(64))
    monkeypatch.setattr(memory, "free_memory", lambda device: 8 << 20)
    with pytest.raises(UserError, match=r"chunk must be at most \d+ for the 8 MiB that are free, got 64"):
        array(images_of(640))


def test_results_that_do_not_fit_are_refused(monkeypatch):
    array, images, labels = ModelArray(models_of("resnet8")), images_of(3000), torch.zeros(3000, dtype=torch.int64)
    monkeypatch.setattr(memory, "free_memory", lambda device: 100_000)
    with pytest.raises(UserError, match=r"images must number at most 2500 for their logits to fit in .* got 3000"):
        array(images)
    with pytest.raises(UserError, match="path must be given for 0 MiB of signals with 0 MiB free, got None"):
        array.signals(images, labels, augment="lira")


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["stages.1.conv2.weight", "stem.1.running_var"])
def test_weights_that_are_not_finite(name, bad):
    models = models_of("resnet8", 3)
    models[2].state_dict()[name].view(-1)[-1] = bad
    words = f"ModelArray: weights must be finite, got {name} of model 2 with NaN or inf"
    with pytest.raises(UserError, match=re.escape(words)):
        ModelArray(models)


def test_another_class_count_names_the_head():
    other = classifier("resnet8", num_classes=6, in_channels=3)
    with pytest.raises(UserError, match=r"one architecture, got head.weight \[5, 64\] and \[6, 64\] in 0 and 1"):
        ModelArray([*models_of("resnet8", 1), other])


def test_images_and_labels_of_another_dtype_or_shape():
    array, labels = ModelArray(models_of("resnet8")), torch.zeros(4, dtype=torch.int64)
    for bad in (images_of(4).float(), images_of(4)[0], images_of(4).to(torch.int16)):
        with pytest.raises(UserError, match=r"ModelArray: images must be uint8 \[N, H, W, C\], got"):
            array.signals(bad, labels)
    for wrong in (labels.float(), labels[:3], labels[None]):
        with pytest.raises(UserError, match=r"ModelArray: labels must be integers \[4\], got"):
            array.signals(images_of(4), wrong)
    with pytest.raises(UserError, match=r"labels must lie in \[0, 5\), got \[-1, 0\]"):
        array.signals(images_of(4), torch.tensor([0, 0, -1, 0]))


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"dtype": torch.int8}, "dtype must be float32"),
        ({"bn": "train"}, "bn must be 'eval' or 'batch', got train"),
        ({"chunk": 0}, "chunk must be an integer above 0"),
    ],
)
def test_bad_options(changed, words):
    with pytest.raises(UserError, match=words):
        ModelArray(models_of("resnet8"), **changed)


def test_images_of_another_size_or_channels():
    array, labels = ModelArray(models_of("airbench")), torch.arange(2)
    for bad in (images_of(2, 48), images_of(2)[..., :1]):
        with pytest.raises(UserError, match=r"models must return \[N, C\] logits for .* images, got the error"):
            array.signals(bad, labels)
    with pytest.raises(UserError, match=r"labels must lie in \[0, 5\), got \[0, 5\]"):
        array.signals(images_of(2), torch.tensor([0, 5]))
    with pytest.raises(UserError, match=r"models must return \[N, C\] logits for .* images, got \[2, 4, 30, 30"):
        ModelArray([nn.Conv2d(3, 4, 3)])(images_of(2))


def test_numpy_images_and_integers_of_any_dtype():
    array, images, labels = ModelArray(models_of("resnet8")), images_of(6), torch.arange(6) % 5
    expected = array.signals(images, labels)["phi"]
    for result in (labels.numpy(), labels.int(), labels[:, None].to(torch.uint8), labels.tolist()):
        assert torch.equal(array.signals(images.numpy(), result)["phi"], expected)
    assert torch.equal(array(images.numpy()), array(images))


class OfTwo(nn.Module):
    """Right for two images, which is as many as a network is tried on."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(64, 5)

    def forward(self, x):
        z = self.head(x.flatten(1))
        return z if len(x) == 2 else (z, z)


def test_network_that_changes_its_answer():
    array = ModelArray([OfTwo()], chunk=3)
    with pytest.raises(UserError, match=r"models must return \[N, 5\] logits for 8 x 8 x 1 images, got a tuple of 2"):
        array(torch.zeros(5, 8, 8, 1, dtype=torch.uint8))


def test_queries_are_index_arithmetic():
    models, images, labels = models_of("resnet8"), images_of(6), torch.arange(6) % 5
    array = ModelArray(models)
    padded = torch.nn.functional.pad(images.permute(0, 3, 1, 2).float(), [1] * 4, mode="reflect").permute(0, 2, 3, 1)
    result = array.signals(images, labels, augment="lira")["phi"]
    assert result.shape == (18, 6, 2)
    for a, (flip, dx, dy) in enumerate((f, x, y) for f in (0, 1) for x in range(3) for y in range(3)):
        source = padded.flip(2) if flip else padded
        view = source[:, dx : dx + 32, dy : dy + 32].to(torch.uint8)
        assert torch.equal(array.signals(view, labels)["phi"][0], result[a])
    cut = array.signals(images, labels, augment=[Query(size=(28, 24), down=-1, right=2)])["phi"]
    assert torch.equal(cut, array.signals(images[:, 3:31, 2:26].contiguous(), labels)["phi"])
    with pytest.raises(UserError, match="augment must hold queries of one size"):
        array.signals(images, labels, augment=[Query(), Query(size=(8, 8))])
    with pytest.raises(UserError, match="size must lie within the images' 32 x 32"):
        array.signals(images, labels, augment=[Query(size=(33, 8))])
    with pytest.raises(UserError, match="border must be one of"):
        Query(border="zeros")
    for options, words in (
        ({"down": 1.5}, "down must be an integer, got 1.5"),
        ({"right": None}, "right must be an integer, got None"),
        ({"size": 8}, r"size must be \(height, width\) or None, got 8"),
        ({"size": (8, 8.0)}, "size must be an integer, at least 1, got 8.0"),
        ({"size": "ab"}, r"size must be \(height, width\) or None, got 'ab'"),
    ):
        with pytest.raises(UserError, match=f"Query: {words}"):
            Query(**options)
    assert Query(down=np.int64(1), size=[np.int32(8), 8]) == Query(down=1, size=(8, 8))
    for augment in (3, None, [], ["flip"]):
        with pytest.raises(
            UserError, match="ModelArray: augment must be one of none, flip, shift, lira, or a sequence"
        ):
            array.signals(images, labels, augment=augment)


def test_shifts_and_flips_are_those_of_float64():
    """Down is along rows, right along columns, the flip comes first, and edge pixels repeat."""
    models, images, labels = models_of("resnet8", 1), images_of(6), torch.arange(6) % 5
    x = to_float(images).double()
    padded = torch.nn.functional.pad(x, [2] * 4, mode="replicate")
    result = ModelArray(models).signals(images, labels, augment="shift")["phi"]
    own = [Query(flip=True, down=2, right=-1), Query(flip=True)]
    result = torch.cat([result, ModelArray(models).signals(images, labels, augment=own)["phi"]])
    moves = [(0, 0), (1, 0), (-1, 0), (0, 1), (0, -1)]
    views = [padded[:, :, 2 - down : 34 - down, 2 - right : 34 - right] for down, right in moves]
    mirrored = padded.flip(3)
    views += [mirrored[:, :, 0:32, 3:35], mirrored[:, :, 2:34, 2:34]]
    models[0].double()
    with torch.no_grad():
        expected = torch.stack([membership_signals(models[0](view), labels)["phi"] for view in views])
    assert float((result[..., 0].double() - expected).abs().max()) <= 1e-4


def test_normalize():
    models, images = models_of("resnet8"), images_of(5)
    result = ModelArray(models, normalize=((0.5, 0.5, 0.5), 0.5))(images)
    assert torch.allclose(result, ModelArray(models)(images), atol=1e-5)


def test_no_images():
    array = ModelArray(models_of("resnet8"))
    assert array(images_of(0)).shape == (2, 0, 5)
    assert array.signals(images_of(0), torch.empty(0, dtype=torch.int64))["phi"].shape == (1, 0, 2)
