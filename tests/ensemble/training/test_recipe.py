"""What a recipe makes of a batch and an epoch: mixup, and the epoch that is kept."""

import pytest
import torch
from torch import nn

from kr_fast.data import Augment, Split
from kr_fast.ensemble import TrainConfig, fit, score
from kr_fast.ensemble.training.evaluation import scores
from kr_fast.ensemble.training.recipe import epoch_draws, mixed, mixed_loss
from kr_fast.runtime.errors import UserError

pytestmark = pytest.mark.usefixtures("one_thread")


def digits(count=96):
    draw = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 3, (count,), generator=draw)
    images = torch.randint(0, 160, (count, 6, 6, 1), generator=draw) + 45 * labels[:, None, None, None]
    return Split(images.to(torch.uint8), labels)


def network(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Flatten(), nn.Linear(36, 16), nn.ReLU(), nn.Linear(16, 3))


def test_a_batch_is_mixed_with_itself_in_reverse():
    """Images of two models and the loss of their logits, against the definition with mixed one-hot labels."""
    draw = torch.Generator().manual_seed(1)
    x, share = torch.randn(2, 5, 1, 3, 3, generator=draw), torch.rand(2, 5, generator=draw)
    logits, labels = torch.randn(2, 5, 4, generator=draw), torch.randint(0, 4, (2, 5), generator=draw)
    one_hot = torch.eye(4, dtype=torch.float64)[labels] * 0.9 + 0.1 / 4
    losses = torch.empty(2, 5, dtype=torch.float64)
    for m in range(2):
        for i in range(5):
            s = share[m, i].double()
            target = s * one_hot[m, i] + (1 - s) * one_hot[m, 4 - i]
            losses[m, i] = -(target * logits[m, i].double().log_softmax(0)).sum()
            image = s * x[m, i].double() + (1 - s) * x[m, 4 - i].double()
            torch.testing.assert_close(mixed(x, share)[m, i].double(), image, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(mixed_loss(logits, labels, share, 0.1).double(), losses, rtol=1e-6, atol=1e-6)
    assert mixed(x, None) is x


def test_shares_are_of_the_beta_distribution_one_for_a_batch():
    """Beta(0.4, 0.4): mean 0.5 and variance 1 / (4 * 1.8); the mean of 4,000 shares errs by 0.006."""
    config = TrainConfig(batch_size=4, mixup=0.4)
    shares = epoch_draws(config, 16_000, (6, 6), 3, 0)[2].view(-1, 4)
    assert bool((shares == shares[:, :1]).all())
    assert abs(float(shares[:, 0].mean()) - 0.5) < 0.03
    assert abs(float(shares[:, 0].var()) - 1 / 7.2) < 0.01
    assert not torch.equal(shares, epoch_draws(config, 16_000, (6, 6), 3, 1)[2].view(-1, 4))
    plain = epoch_draws(TrainConfig(batch_size=4), 16_000, (6, 6), 3, 0)
    assert plain[2] is None
    assert torch.equal(plain[0], epoch_draws(config, 16_000, (6, 6), 3, 0)[0])


def test_the_epoch_is_kept_that_is_best_by_what_was_asked_for():
    """A network that learns few images by heart grows surer than it is right: its loss is least early."""
    draw = torch.Generator().manual_seed(5)
    train, val = digits(24), digits(96)
    val = Split(val.images, torch.where(torch.rand(96, generator=draw) < 0.4, (val.labels + 1) % 3, val.labels))
    config, kept = TrainConfig(epochs=30, batch_size=8, learning_rate=0.3, weight_decay=0.0, augment=Augment()), {}
    for choose in ("accuracy", "loss", "auc"):
        model = network()
        history = fit(model, train, config, seed=0, val=val, choose=choose)
        assert bool(history.val_auc) == (choose == "auc")
        curve = torch.tensor(getattr(history, f"val_{choose}"), dtype=torch.float64)
        best = curve.min() if choose == "loss" else curve.max()
        assert history.best_epoch == int((curve == best).nonzero()[-1])
        of_val = scores(model, val, choose)
        assert of_val.accuracy == history.val_accuracy[history.best_epoch]
        assert of_val.loss == pytest.approx(history.val_loss[history.best_epoch], rel=1e-6)
        assert of_val.value == pytest.approx(float(-best if choose == "loss" else best), rel=1e-6)
        assert score(model, val, choose) == of_val.value
        kept[choose] = history.best_epoch
    assert kept["loss"] not in (kept["accuracy"], kept["auc"])
    with pytest.raises(UserError, match="fit: choose must be one of accuracy, loss, auc, got 'recall'"):
        fit(network(), train, config, seed=0, val=val, choose="recall")
    alike = Split(val.images, torch.zeros_like(val.labels))
    with pytest.raises(UserError, match="fit: val must hold at least two classes to choose by auc, got 1"):
        fit(network(), train, config, seed=0, val=alike, choose="auc")
    with pytest.raises(UserError, match="score: by must be one of accuracy, loss, auc, got 'recall'"):
        score(network(), val, "recall")


def test_the_loss_is_the_mean_cross_entropy():
    model, split = network(), digits()
    x = split.images.permute(0, 3, 1, 2).double() / 127.5 - 1
    expected = nn.functional.cross_entropy(model.double()(x), split.labels)
    model.float()
    assert scores(model, split, batch_size=10).loss == pytest.approx(float(expected.detach()), rel=1e-6)
