"""The training loop, ModelArray and shadow models: determinism, resume, balance, refusals."""

import functools
import importlib
import math
import os
import sys
import types

import pytest
import torch
from torch import nn

from kr_fast.data import Augment, Split
from kr_fast.ensemble import ModelArray, TrainConfig, train_shadows
from kr_fast.ensemble.shadows import keep_matrix
from kr_fast.ensemble.training.evaluation import accuracy
from kr_fast.ensemble.training.recipe import fit, fit_for, make_optimizer
from kr_fast.ensemble.training.workers import Job, train
from kr_fast.models import classifier
from kr_fast.runtime.errors import UserError
from kr_fast.runtime.storage import files

CONFIG = TrainConfig(epochs=4, batch_size=8, learning_rate=0.05, augment=Augment(shift=1, flip=True))


def make_model(width=4, dropout=0.3):
    layers = [nn.Conv2d(1, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(), nn.Flatten()]
    return nn.Sequential(*layers, nn.Dropout(dropout), nn.Linear(width * 64, 3))


def seeded(**options):
    torch.manual_seed(0)
    return make_model(**options)


def data(count=40):
    generator = torch.Generator().manual_seed(1)
    images = torch.randint(0, 256, (count, 8, 8, 1), generator=generator, dtype=torch.uint8)
    return Split(images, torch.randint(0, 3, (count,), generator=generator))


def same(first, second):
    pairs = zip(first.state_dict().items(), second.state_dict().items(), strict=True)
    return all(a == b and torch.equal(x, y) for (a, x), (b, y) in pairs)


def test_fit_is_a_function_of_the_seed():
    models = [seeded() for _ in range(3)]
    for model, seed, noise in zip(models, (5, 5, 6), (1, 2, 3), strict=True):
        torch.manual_seed(noise)  # the global generator plays no part, not even in dropout
        fit(model, data(), CONFIG, seed=seed)
    assert same(models[0], models[1])
    assert not same(models[0], models[2])


def test_fit_leaves_the_global_generator_alone():
    model, state = make_model(), torch.get_rng_state()
    fit(model, data(), CONFIG, seed=1)
    assert torch.equal(torch.get_rng_state(), state)
    assert not model.training


class Killed(Exception):
    pass


def test_fit_resumes_to_the_same_bits(tmp_path, monkeypatch):
    whole, cut = seeded(), seeded()
    history = fit(whole, data(), CONFIG, seed=5, val=data(20))
    path, save = tmp_path / "state.pt", files.save_state

    def save_and_die(where, state):
        save(where, state)
        if state["epoch"] == 2:
            raise Killed

    monkeypatch.setattr(files, "save_state", save_and_die)
    with pytest.raises(Killed):
        fit(cut, data(), CONFIG, seed=5, val=data(20), state_path=path, save_every=1)
    monkeypatch.undo()
    other = seeded(width=4)
    resumed = fit(other, data(), CONFIG, seed=5, val=data(20), state_path=path, save_every=1)
    assert same(whole, other)
    assert resumed == history
    assert not path.exists()


def test_fit_keeps_the_best_epoch_and_not_the_last():
    model, val = seeded(dropout=0.0), data(30)
    history = fit(model, data(), CONFIG, seed=1, val=val)
    best = max(history.val_accuracy)
    assert history.val_accuracy[history.best_epoch] == best
    assert best not in history.val_accuracy[history.best_epoch + 1 :]  # the latest of equals
    assert accuracy(model, val) == best
    assert len(history.train_loss) == len(history.val_accuracy) == CONFIG.epochs


def test_fit_learns_and_refuses_a_loss_that_is_not_finite():
    split = data()
    easy = Split(split.images.clone(), split.labels)
    easy.images[:] = (split.labels * 100).view(-1, 1, 1, 1).to(torch.uint8)
    history = fit(seeded(dropout=0.0), easy, TrainConfig(epochs=15, batch_size=8, learning_rate=0.05), seed=0)
    assert history.train_loss[-1] < 0.3 * history.train_loss[0]
    broken = seeded()
    broken[0].weight.data[0, 0, 0, 0] = torch.inf
    with pytest.raises(ValueError, match="fit: loss must be finite"):
        fit(broken, split, CONFIG, seed=0)


@pytest.mark.parametrize("models", [2, 4, 16])
def test_every_example_is_in_exactly_half_of_the_models(models):
    keep = keep_matrix(models, 501, 3)
    assert keep.dtype == torch.bool
    assert keep.sum(0).tolist() == [models // 2] * 501
    assert bool(((keep.float().mean(1) - 0.5).abs() < 0.1).all())  # 4.5 sigma
    assert torch.equal(keep, keep_matrix(models, 501, 3))
    assert not torch.equal(keep, keep_matrix(models, 501, 4))


def test_groups_are_whole_in_every_half():
    """Texts and numbers alike, in any order."""
    numbers = torch.arange(40).repeat(3)[torch.randperm(120, generator=torch.Generator().manual_seed(0))]
    keep = keep_matrix(4, 120, 3, numbers)
    for number in range(40):
        mine = keep[:, numbers == number]
        assert torch.equal(mine, mine[:, :1].expand(-1, 3))
    assert keep.sum(0).tolist() == [2] * 120
    assert torch.equal(keep, keep_matrix(4, 40, 3)[:, numbers])
    assert torch.equal(keep, keep_matrix(4, 120, 3, [f"{number:02}" for number in numbers]))


def test_shadows_of_other_groups_are_refused(tmp_path):
    split = data(40)
    options = {"num_models": 2, "config": CONFIG, "seed": 9, "out": tmp_path}
    made = train_shadows(make_model, split.images, split.labels, groups=torch.arange(40) // 4, **options)
    assert torch.equal(made.keep, made.keep[:, torch.arange(40) // 4 * 4])
    again = train_shadows(make_model, split.images, split.labels, groups=[f"p{k // 4}" for k in range(40)], **options)
    assert torch.equal(again.keep, made.keep)
    with pytest.raises(UserError, match="^train_shadows: groups must equal"):
        train_shadows(make_model, split.images, split.labels, **options)
    with pytest.raises(UserError, match=r"^train_shadows: groups must be texts or integers \[40\]"):
        train_shadows(make_model, split.images, split.labels, groups=[1], **options)


@pytest.mark.parametrize("models", [0, 1, 3])
def test_an_odd_number_of_models_cannot_be_balanced(models):
    with pytest.raises(ValueError, match="num_models must be even and at least 2"):
        keep_matrix(models, 10, 0)


def shadows(out=None, num_models=4, config=CONFIG, seed=9, make=make_model, count=40):
    split = data(count)
    return train_shadows(make, split.images, split.labels, num_models=num_models, config=config, seed=seed, out=out)


def test_shadows_resume_after_a_kill(tmp_path, monkeypatch):
    whole = shadows()
    calls = []

    def fit_two(*arguments, **options):
        if len(calls) == 2:
            raise Killed
        calls.append(1)
        return fit_for(*arguments, **options)

    monkeypatch.setattr("kr_fast.ensemble.training.workers.fit_for", fit_two)
    with pytest.raises(Killed):
        shadows(tmp_path)
    assert sorted(path.name for path in tmp_path.glob("model*")) == ["model-000.safetensors", "model-001.safetensors"]
    calls.clear()
    result = shadows(tmp_path)
    assert len(calls) == 2  # the finished ones were not trained again
    assert all(same(a, b) for a, b in zip(whole.array.models, result.array.models, strict=True))
    assert torch.equal(whole.keep, result.keep)
    assert not list(tmp_path.glob(".*tmp"))


def test_a_shadow_is_a_function_of_its_seed_and_half_alone():
    split, together = data(), shadows()
    for index in (3, 1):  # trained apart, and in another order
        job = Job(make_model, split.images, split.labels, together.keep, CONFIG, 9, None)
        assert same(job.train(index, torch.device("cpu")), together.array.models[index])


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"seed": 10}, "seed must equal 9"),
        ({"num_models": 6}, "num_models must equal 4"),
        ({"count": 30}, "data must equal"),
        ({"config": TrainConfig(epochs=5, batch_size=8)}, "epochs must equal 4"),
        ({"make": lambda: make_model(width=5)}, "architecture must equal"),
    ],
)
def test_shadows_of_another_configuration_are_refused(tmp_path, changed, words):
    shadows(tmp_path)
    with pytest.raises(ValueError, match=f"train_shadows: {words}"):
        shadows(tmp_path, **changed)


def array(count=3):
    models = []
    for seed in range(count):
        torch.manual_seed(seed)
        models.append(make_model())
    return ModelArray(models)


def test_signals_are_those_of_each_model_alone():
    split, models = data(), array()
    logits = models(split.images)
    assert logits.shape == (3, 40, 3)
    result = models.signals(split.images, split.labels, augment="flip", want=("phi", "correct"))
    assert result["phi"].shape == (2, 40, 3)
    flipped = models(split.images.flip(2))
    for a, values in enumerate((logits, flipped)):
        for m in range(3):
            z = values[m].double()
            label = z.gather(1, split.labels[:, None])
            rivals = z.scatter(1, split.labels[:, None], -torch.inf).logsumexp(1)
            assert torch.allclose(result["phi"][a, :, m].double(), label[:, 0] - rivals, atol=1e-5)
            assert torch.equal(result["correct"][a, :, m].bool(), z.argmax(1) == split.labels)


def test_shift_queries_replicate_the_border():
    split, models = data(6), array(1)
    result = models.signals(split.images, split.labels, augment="shift")["phi"]
    assert result.shape == (5, 6, 1)
    moved = torch.cat([split.images[:, :1], split.images[:, :-1]], 1)  # one pixel down
    assert torch.allclose(result[1], models.signals(moved, split.labels)["phi"][0], atol=1e-6)


def test_company_does_not_change_a_model():
    split, models = data(), array()
    order = [2, 0, 1]
    mixed = ModelArray([models.models[m] for m in order])
    plain = models.signals(split.images, split.labels)["phi"]
    assert torch.equal(mixed.signals(split.images, split.labels)["phi"], plain[:, :, order])


def test_models_that_cannot_be_one_array():
    with pytest.raises(ValueError, match=r"models must share one architecture, got 0.weight \[4, 1, 3, 3\] and \[5"):
        ModelArray([make_model(), make_model(width=5)])
    with pytest.raises(ValueError, match="models must share one architecture"):
        ModelArray([make_model(), nn.Sequential(nn.Flatten(), nn.Linear(64, 3))])
    with pytest.raises(ValueError, match="models must hold at least one"):
        ModelArray([])
    broken = make_model()
    broken[5].bias.data[0] = torch.nan
    with pytest.raises(ValueError, match=r"weights must be finite, got 5.bias of model 1"):
        ModelArray([make_model(), broken])


def test_images_and_labels_that_do_not_fit():
    split, models = data(), array(1)
    with pytest.raises(ValueError, match="images must be uint8"):
        models(split.images.float())
    with pytest.raises(ValueError, match="augment must be one of none, flip, shift"):
        models.signals(split.images, split.labels, augment="rotate")
    with pytest.raises(ValueError, match=r"labels must lie in \[0, 3\)"):
        models.signals(split.images, split.labels + 3)
    with pytest.raises(ValueError, match="labels must"):
        models.signals(split.images, split.labels[:-1])


make_resnet = functools.partial(classifier, "resnet8", num_classes=3, in_channels=1, width=4)


def small(workers, out, config=CONFIG, make=make_resnet):
    split = data(40)
    options = {"num_models": 4, "config": config, "seed": 9, "out": out, "workers": workers}
    return train_shadows(make, split.images, split.labels, **options)


def test_workers_train_the_same_models(tmp_path):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as in a worker: the last bits follow the number of threads
    try:
        one, two = small(1, tmp_path / "one"), small(2, tmp_path / "two")
    finally:
        torch.set_num_threads(threads)
    assert all(same(a, b) for a, b in zip(one.array.models, two.array.models, strict=True))
    again = small(3, tmp_path / "two")  # everything is there: nothing is started
    assert all(same(a, b) for a, b in zip(one.array.models, again.array.models, strict=True))


def test_error_in_a_worker_is_the_callers(tmp_path, monkeypatch):
    (tmp_path / "noisy.py").write_text(
        "from torch.nn import Flatten, Linear, Sequential\n"
        "def make():\n    print('{}')\n    return Sequential(Flatten(), Linear(64, 3))\n"  # no answer of the worker
    )
    monkeypatch.syspath_prepend(tmp_path)
    config = TrainConfig(epochs=2, batch_size=8, learning_rate=1e30)
    with pytest.raises(UserError, match=r"^train_shadows: loss must be finite, got \S+ for model \d in epoch \d$"):
        small(2, tmp_path / "out", config, importlib.import_module("noisy").make)


def test_a_network_that_workers_cannot_import(tmp_path):
    """A function of a notebook can be sent by its name, which means nothing to another process."""
    ghost = types.ModuleType("no_such_file")
    exec("def make():\n    pass", ghost.__dict__)
    sys.modules["no_such_file"] = ghost
    try:
        with pytest.raises(UserError, match="make_model must be importable by name .* got ModuleNotFoundError: No mod"):
            train(Job(ghost.make, *[torch.zeros(1)] * 3, CONFIG, 0, tmp_path), [0], 1, lambda: None)
    finally:
        del sys.modules["no_such_file"]


def test_worker_that_dies_is_reported(tmp_path, monkeypatch):
    (tmp_path / "fatal.py").write_text(
        f"import os, torch\nparent = os.getpid() == {os.getpid()}\n"
        "from torch.nn import Flatten, Linear, Sequential\n"
        "def make():\n    return Sequential(Flatten(), Linear(64, 3)) if parent else os._exit(7)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    words = r"^train_shadows: every worker must run to the end, got code 7 from that of model \d$"
    with pytest.raises(UserError, match=words):
        small(2, tmp_path / "out", make=importlib.import_module("fatal").make)


def test_workers_need_a_folder_and_a_name(tmp_path):
    with pytest.raises(UserError, match="train_shadows: workers must be 1, or more on a CPU with out given, got 2"):
        small(2, None)
    with pytest.raises(UserError, match="train_shadows: workers must be 1, or more on a CPU with out given, got 0"):
        small(0, tmp_path)
    with pytest.raises(UserError, match="train_shadows: make_model must be importable by name"):
        small(2, tmp_path, make=lambda: make_model())
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("steps", range(1, 12))
def test_schedule_of_few_steps(steps):
    """The one-cycle rate by its definition: a cosine up in a fifth of the steps, and one down to a 4e-6th of it."""
    model = torch.nn.Linear(1, 1)
    optimizer, schedule = make_optimizer(model, TrainConfig(learning_rate=0.5), steps)
    total, peak = max(steps, 2), 0.2 * max(steps, 2) - 1  # step of the highest rate
    for step in range(steps):
        low, high, share = 0.5 / 25, 0.5, step / peak if peak > 0 else 1.0
        if step > peak:
            low, high, share = 0.5, 0.5 / 25e4, (step - peak) / (total - 1 - peak)
        expected = high + (low - high) * (1 + math.cos(math.pi * share)) / 2
        assert optimizer.param_groups[0]["lr"] == pytest.approx(expected, rel=1e-6)
        optimizer.step()
        schedule.step()
