"""Shadow models trained many at once: the models that ``fit`` makes, whatever stands beside them; kills, refusals."""

import dataclasses
import errno
import functools
import logging
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from kr_fast.data import Augment
from kr_fast.ensemble import TrainConfig, train_shadows
from kr_fast.ensemble.training import trainer
from kr_fast.ensemble.training.workers import Job
from kr_fast.models import classifier
from kr_fast.runtime import memory
from kr_fast.runtime.errors import UserError
from kr_fast.runtime.storage import files

CONFIG = TrainConfig(epochs=4, batch_size=8, learning_rate=0.05, augment=Augment(shift=1, flip=True))
resnet = functools.partial(classifier, "resnet8", num_classes=3, in_channels=1, width=4)


def make_small():
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 64, 3)
    )


def with_dropout():
    return nn.Sequential(make_small()[:4], nn.Dropout(0.3), nn.Linear(4 * 64, 3))


pytestmark = pytest.mark.usefixtures("one_thread")


def data(count=61, side=8, channels=1):
    generator = torch.Generator().manual_seed(1)
    images = torch.randint(0, 256, (count, side, side, channels), generator=generator, dtype=torch.uint8)
    return images, torch.randint(0, 3, (count,), generator=generator)


def shadows(make=make_small, *, num_models=4, config=CONFIG, count=61, **options):
    return train_shadows(make, *data(count), num_models=num_models, config=config, seed=9, **options)


def states(result):
    return [model.state_dict() for model in result.array.models]


def same(first, second):
    pairs = zip(first, second, strict=True)
    return all(all(torch.equal(a[name], b[name]) for name in a) and list(a) == list(b) for a, b in pairs)


def one_line(caplog, words):
    lines = [record.getMessage() for record in caplog.records if "one after the other" in record.getMessage()]
    return len(lines) == 1 and words in lines[0]


AUGMENTS = [Augment(), Augment(shift=1, flip=True), Augment(1, True, 10, 0.1)]


@pytest.mark.parametrize(("augment", "mixup"), [(AUGMENTS[0], 0.0), (AUGMENTS[1], 0.4), (AUGMENTS[2], 0.0)], ids=str)
def test_as_one_after_the_other(augment, mixup):
    """61 examples: halves of 26 to 37, so three steps an epoch for two models and four for the others."""
    config = TrainConfig(epochs=4, batch_size=8, learning_rate=0.05, label_smoothing=0.1, mixup=mixup, augment=augment)
    alone, together = shadows(resnet, config=config), shadows(resnet, config=config, batched=True)
    assert torch.equal(alone.keep, together.keep)
    assert sorted({int(each) // 8 for each in alone.keep.sum(1)}) == [3, 4]
    start = resnet().state_dict()
    for a, b in zip(states(alone), states(together), strict=True):
        for name in a:
            # 12 to 16 steps from numbers of order 1 agree to 3e-7, every sum being taken in another order; one ReLU
            # that a rounding sends to the other side of its bend costs 5e-5.
            torch.testing.assert_close(
                b[name], a[name], rtol=1e-4, atol=2e-4, msg=lambda text, name=name: f"{name}: {text}"
            )
        assert float((a["stem.0.weight"] - start["stem.0.weight"]).abs().max()) > 0.01  # it did learn
    assert all(not model.training for model in together.array.models)


def test_a_model_is_the_same_whatever_it_is_trained_with():
    config = dataclasses.replace(CONFIG, epochs=2)
    whole = states(shadows(resnet, num_models=6, config=config, batched=True))
    for size in (1, 2, 5):
        assert same(states(shadows(resnet, num_models=6, config=config, batched=size)), whole)


def test_frozen_weights_stay():
    """A whitening layer, say: it is no part of the optimizer, and each model keeps its own."""

    def make():
        model = make_small()
        model[0].requires_grad_(False)
        return model

    alone, together = states(shadows(make)), states(shadows(make, batched=True))
    for a, b in zip(alone, together, strict=True):
        assert torch.equal(a["0.weight"], b["0.weight"])
        for name in a:
            torch.testing.assert_close(b[name], a[name], rtol=1e-4, atol=2e-4)
    assert not torch.equal(together[0]["0.weight"], together[1]["0.weight"])


def test_fallback_trains_the_same_models_and_says_so(caplog):
    with caplog.at_level(logging.WARNING, "kr_fast"):
        result = shadows(with_dropout, batched=True)
    assert one_line(caplog, "draws random numbers")
    assert same(states(result), states(shadows(with_dropout)))


def test_halves_of_less_than_a_batch(caplog):
    with caplog.at_level(logging.WARNING, "kr_fast"):
        result = shadows(count=14, batched=True)
    assert one_line(caplog, "fewer examples than a batch of 8")
    assert same(states(result), states(shadows(count=14)))


class Killed(Exception):
    pass


@pytest.mark.parametrize("size", [4, 1, 3])
def test_resumes_after_a_kill_with_other_groups(tmp_path, monkeypatch, size):
    whole = states(shadows(resnet, num_models=4, batched=True))
    monkeypatch.setattr(files, "save_state", save_and_die(files.save_state))
    with pytest.raises(Killed):
        shadows(resnet, num_models=4, batched=2, out=tmp_path, save_every=3)
    assert [path.name[:13] for path in tmp_path.glob("training*")] == ["training-000-"]
    monkeypatch.undo()
    epochs = []
    monkeypatch.setattr(trainer.GroupTrainer, "epoch", counted(trainer.GroupTrainer.epoch, epochs))
    result = shadows(resnet, num_models=4, batched=size, out=tmp_path, save_every=3)
    assert same(states(result), whole)
    assert [model for epoch, model in sorted(epochs) if epoch < 3] == [2, 3] * 3  # the first two had three epochs
    assert not list(tmp_path.glob("*training*"))
    epochs.clear()
    again = shadows(resnet, num_models=4, batched=True, out=tmp_path)  # everything is there
    assert same(states(again), whole)
    assert not epochs


def test_models_that_wait_are_kept_through_kills_in_groups_of_other_sizes(tmp_path, monkeypatch):
    (tmp_path / "training-notes.pt").touch()  # none of ours
    whole, epochs, save = states(shadows(resnet, num_models=4, batched=True)), [], files.save_state
    monkeypatch.setattr(trainer.GroupTrainer, "epoch", counted(trainer.GroupTrainer.epoch, epochs))
    monkeypatch.setattr(files, "save_state", save_and_die(files.save_state))
    for size in (4, 2, 2):  # all four after the first epoch, then two after the second and the third
        with pytest.raises(Killed):
            shadows(resnet, num_models=4, batched=size, out=tmp_path, save_every=1)
    monkeypatch.setattr(files, "save_state", save)
    assert same(states(shadows(resnet, num_models=4, batched=3, out=tmp_path, save_every=1)), whole)
    assert sorted(epochs) == [(epoch, model) for epoch in range(CONFIG.epochs) for model in range(4)]
    assert [path.name for path in tmp_path.glob("training*")] == ["training-notes.pt"]


def save_and_die(save):
    def die(*arguments):
        save(*arguments)
        raise Killed

    return die


def counted(epoch, calls):
    def count(group, number):
        calls.extend((number, index) for index in group.indices)
        epoch(group, number)

    return count


def test_models_of_finished_groups_are_kept(tmp_path, monkeypatch):
    save, calls = files.save_tensors, []

    def fill_up(path, *rest):
        calls.append(path.name)
        if len(calls) == 3:
            raise OSError(errno.ENOSPC, "No space left on device")
        save(path, *rest)

    monkeypatch.setattr(files, "save_tensors", fill_up)
    with pytest.raises(OSError, match="No space left"):
        shadows(batched=2, out=tmp_path)
    assert sorted(path.name for path in tmp_path.glob("*model*")) == ["model-000.safetensors", "model-001.safetensors"]
    monkeypatch.undo()
    assert same(states(shadows(batched=2, out=tmp_path)), states(shadows(batched=True)))


def test_a_full_disk_while_a_state_is_saved(tmp_path, monkeypatch):
    def full(path, data):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(files, "write_bytes", full)
    with pytest.raises(OSError, match="No space left"):
        shadows(batched=True, out=tmp_path, save_every=1)


def test_a_loss_that_is_not_finite_names_the_model():
    calls = []

    def make():
        model = make_small()
        calls.append(1)
        if len(calls) == 6:  # two that are compared, one for the trace, one for the memory, then model 0 and this one
            model[0].bias.data[0] = float("inf")
        return model

    with pytest.raises(UserError, match="train_shadows: models must share one architecture|weights must be finite"):
        shadows(make, batched=True)
    fast = TrainConfig(epochs=2, batch_size=8, learning_rate=1e30)
    with pytest.raises(UserError, match="train_shadows: loss must be finite, got nan for model 0 in epoch 0"):
        shadows(config=fast, batched=True)
    with pytest.raises(UserError, match="^train_shadows: loss must be finite, got nan for model 0 in epoch 0$"):
        shadows(config=fast)


def test_models_of_different_architecture():
    widths = iter([4, 4, 4, 4, 4, 5, 4, 4])

    def make():
        width = next(widths)
        return nn.Sequential(nn.Conv2d(1, width, 3), nn.ReLU(), nn.Flatten(), nn.Linear(36 * width, 3))

    with pytest.raises(
        UserError, match=r"train_shadows: models must share one architecture, got 0.weight \[4, 1, 3, 3\]"
    ):
        shadows(make, batched=True)


def test_models_train_one_after_the_other_in_bfloat16(tmp_path):
    """Weights near those of float32, the same in each process, and recorded as another recipe's."""
    exact, result = shadows(num_models=2), shadows(num_models=2, out=tmp_path, precision="bfloat16")
    assert files.read_json(tmp_path / "shadows.json")["precision"] == "bfloat16"
    assert not same(states(exact), states(result))
    for a, b in zip(states(exact), states(result), strict=True):
        for name, value in a.items():
            assert b[name].dtype == value.dtype
            assert float((b[name].double() - value.double()).norm() / value.double().norm().clamp(min=1)) < 0.05, name
    job = pickle.loads(pickle.dumps(Job(make_small, *data(), result.keep, CONFIG, 9, None, "bfloat16")))  # to a worker
    assert same([job.train(1, torch.device("cpu")).state_dict()], states(result)[1:])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"batched": 0}, "batched must be None, True, False or an integer above 0, got 0"),
        ({"batched": -2}, "batched must be"),
        ({"batched": 2.0}, "batched must be"),
        ({"save_every": 0}, "save_every must be an integer, at least 1, got 0"),
        ({"precision": "float16"}, "precision must be 'float32' or 'bfloat16'"),
        (
            {"precision": "bfloat16", "batched": True},
            "precision must be 'float32' where models are trained at once on a cpu",
        ),
    ],
)
def test_options(options, words):
    with pytest.raises(UserError, match=f"train_shadows: {words}"):
        shadows(**options)


def test_workers_and_groups_exclude_each_other(tmp_path):
    with pytest.raises(UserError, match="train_shadows: workers must be 1 where models are trained at once, got 2"):
        shadows(batched=True, workers=2, out=tmp_path)


def test_a_group_that_does_not_fit(monkeypatch):
    job = Job(make_small, *data(), torch.ones(2, 61, dtype=torch.bool), CONFIG, 0, None)
    each = trainer.memory_of_model(job, trainer.graph_of(job), torch.float32)
    monkeypatch.setattr(memory, "free_memory", lambda device: int((2.5 * each + 61 * 64) / trainer.SHARE))
    with pytest.raises(UserError, match="train_shadows: batched must be at most 2 for the 0 MiB that are free, got 3"):
        shadows(batched=3)
    assert same(states(shadows(batched=True)), states(shadows(batched=2)))
    monkeypatch.setattr(memory, "free_memory", lambda device: int((0.5 * each + 61 * 64) / trainer.SHARE))
    with pytest.raises(UserError, match="train_shadows: batch_size must be at most about 4 for the 0 MiB"):
        shadows(batched=True)


def test_the_estimate_of_memory_is_what_a_group_takes():
    """Bytes that autograd keeps of a step, counted, for one more model."""
    make = functools.partial(classifier, "resnet8", num_classes=3, in_channels=3)
    config = TrainConfig(epochs=1, batch_size=8)
    job = Job(make, *data(20, 32, 3), torch.ones(2, 20, dtype=torch.bool), config, 0, None)
    graph = trainer.graph_of(job)
    group = trainer.GroupTrainer(job, [0], trainer.Setup(graph, torch.float32, torch.device("cpu")))
    kept = {}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    group.begin(group.draw(0))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        group.step()
    assert 1 < trainer.memory_of_model(job, graph, torch.float32) / sum(kept.values()) < 2


def test_another_precision_is_another_recipe(tmp_path):
    shadows(batched=True, out=tmp_path)
    record = files.read_json(tmp_path / "shadows.json")
    assert record["precision"] == "float32"
    files.write_json(tmp_path / "shadows.json", {**record, "precision": "bfloat16"})
    with pytest.raises(UserError, match="train_shadows: precision must equal 'bfloat16' of the shadows"):
        shadows(batched=True, out=tmp_path)
    record.pop("precision")  # of an older version
    files.write_json(tmp_path / "shadows.json", record)
    shadows(batched=True, out=tmp_path)


@pytest.mark.pipeline
def test_two_processes_share_the_models(tmp_path):
    """Each trains a block of its own half of the models; the files are those of one process."""
    script = str(Path(__file__).resolve().parents[2] / "support" / "toy_shadows.py")
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    environment = {**os.environ, "KR_FAST_PROGRESS": "0", "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    for folder, how in (("one", []), ("two", launcher)):
        command = [sys.executable, *how, script, str(tmp_path / folder)]
        done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("models 4") == (2 if how else 1)
    one, two = ({path.name: files.sha256(path) for path in (tmp_path / x).iterdir()} for x in ("one", "two"))
    assert one == two
    assert len(one) == 6  # four models, keep.npy and shadows.json
