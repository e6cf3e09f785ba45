"""Averages of any length from two that are kept: against all weights in float64, and in a training."""

import numpy as np
import pytest
import torch
from toy_runs import new_context

from kr_fast.recycling.stages.generation import generator
from kr_fast.recycling.stages.generation.posthoc_ema import PosthocEMA
from kr_fast.runtime.storage import files
from kr_fast.training.ema_profiles import power_of

STEPS = 96  # 24 snapshots four steps apart
WEIGHTS = "unet/diffusion_pytorch_model.safetensors"


def trained(folder, stop=None, state=None, first=0):
    """(the averages, the weights after each step): a walk that begins far from where it ends, and one that rests."""
    draw = torch.Generator().manual_seed(0)
    walk = torch.randn(STEPS, 5, 3, generator=draw, dtype=torch.float64).cumsum(0)
    parameters = [torch.zeros(5, 3), torch.full((2,), 0.25)]
    averages = PosthocEMA(parameters, STEPS, folder)
    if state is not None:
        averages.load_state_dict(state)
    for step in range(first, stop or STEPS):
        parameters[0].copy_(walk[step])
        averages.step()
        averages.save(step + 1, [50])
    return averages, walk


@pytest.mark.parametrize(("length", "step"), [(0.05, 96), (0.1, 50), (0.04, 96), (0.08, 96), (0.15, 96), (0.18, 50)])
def test_averages_are_those_of_all_weights(tmp_path, length, step):
    """Kept lengths to float32, others as far as their profiles are met; an average of another length is far from it."""
    averages, walk = trained(tmp_path)

    def expected(length):
        edges = (np.arange(step + 1) / step) ** (power_of(length) + 1)
        return torch.tensordot(torch.from_numpy(np.diff(edges)), walk[:step], 1)

    moving, resting = averages.average(length, step)
    distance = float((moving - expected(length)).norm() / walk[:step].std())
    assert distance < (1e-5 if length in (0.05, 0.1) else 0.05)
    assert float((moving - expected(1.3 * length)).norm() / walk[:step].std()) > 0.1
    assert torch.allclose(resting, torch.full((2,), 0.25), atol=1e-6)


def test_a_continued_training_has_the_same_averages(tmp_path):
    whole, _ = trained(tmp_path / "whole")
    part, _ = trained(tmp_path / "part", stop=40)
    files.save_state(tmp_path / "state.pt", part.state_dict())
    on, _ = trained(tmp_path / "part", state=files.load_state(tmp_path / "state.pt"), first=40)
    for length, step in ((0.15, 50), (0.15, 96)):
        assert all(map(torch.equal, whole.average(length, step), on.average(length, step)))
    on.remove()
    on.remove()
    assert not (tmp_path / "part").exists()


def test_a_generator_leaves_a_checkpoint_of_each_length(tmp_path, monkeypatch):
    """That of a length that is kept is the average of a training whose own has this length, after a kill too."""
    run = new_context(tmp_path, (40, 10, 10))

    def train(name, **options):
        folder = lambda step, length=0.0: tmp_path / name / f"{step}-{length:g}"  # noqa: E731
        state = tmp_path / f"{name}.pt"
        return generator.train(run, run.data.train, [6, 12], folder, seed=0, state_path=state, **options)

    lengths = {12: (0.1, 0.15)}
    train("whole", lengths=lengths)
    assert not (tmp_path / "whole.ema").exists()
    assert sorted(path.name for path in (tmp_path / "whole").iterdir()) == ["12-0", "12-0.1", "12-0.15", "6-0"]
    train("own", ema_length=0.1)
    expected = files.load_tensors(tmp_path / "own" / "12-0" / WEIGHTS)
    for name, value in files.load_tensors(tmp_path / "whole" / "12-0.1" / WEIGHTS).items():
        assert torch.allclose(value, expected[name], atol=1e-6), name

    save = files.save_state

    def save_and_stop(path, state):
        save(path, state)
        raise KeyboardInterrupt

    monkeypatch.setattr(files, "save_state", save_and_stop)
    with pytest.raises(KeyboardInterrupt):
        train("stopped", lengths=lengths)
    monkeypatch.undo()
    train("stopped", lengths=lengths)
    for name in ("12-0", "12-0.1", "12-0.15"):
        assert (tmp_path / "stopped" / name / WEIGHTS).read_bytes() == (
            tmp_path / "whole" / name / WEIGHTS
        ).read_bytes()
