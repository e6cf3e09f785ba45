"""End to end on scikit-learn's digits with 16 shadows: attacks in the published order, chance where there is none."""

import pytest
import torch
from torch import nn

import kr_fast
from kr_fast.data import Augment, Split, load_uncut
from kr_fast.ensemble import TrainConfig, fit, train_shadows
from kr_fast.membership import Choices

INSIDE = 300  # members of the target; as many non-members, and as many others for the model that never saw the pool
POOL = 2 * INSIDE
WRONG = 0.2  # share of labels drawn at random: only memory fits them, and clean digits leave little to memorise
CONFIG = TrainConfig(epochs=60, batch_size=32, learning_rate=0.05, weight_decay=0.0, augment=Augment())


def make_model():
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))


@pytest.fixture(scope="module")
def report():
    """Target (fitted to the last member), stranger (trained outside the pool), every shadow as target."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    whole = load_uncut("digits")[2]["all"]
    generator = torch.Generator().manual_seed(0)
    order = torch.randperm(len(whole), generator=generator)
    images, labels = whole.images[order], whole.labels[order]
    wrong = torch.rand(len(whole), generator=generator) < WRONG
    labels[wrong] = torch.randint(0, 10, (int(wrong.sum()),), generator=generator)
    members = torch.arange(POOL) < INSIDE
    torch.manual_seed(0)
    target, stranger = make_model(), make_model()
    fit(target, Split(images[:INSIDE], labels[:INSIDE]), CONFIG, seed=1)
    fit(stranger, Split(images[POOL : POOL + INSIDE], labels[POOL : POOL + INSIDE]), CONFIG, seed=2)
    shadows = train_shadows(make_model, images[:POOL], labels[:POOL], num_models=16, config=CONFIG, seed=3)
    yield kr_fast.audit(
        {"target": target, "stranger": stranger},
        shadows,
        images[:POOL],
        labels[:POOL],
        members,
        choices=Choices(targets="shadows", attacks=("lira", "lira_offline", "loss")),
    )
    torch.set_num_threads(before)


def test_online_above_offline_above_the_global_threshold(report):
    """On one overfitted target, and on the mean of 16 (0.79, 0.74, 0.66 with a standard deviation of 0.01 to 0.03)."""
    auc = {name: curve.auc for name, curve in report.curves["target"].items()}
    assert auc["lira"] > auc["lira_offline"] > auc["loss"]
    result = report.leave_one_out["shadows"]
    assert result["lira"]["targets"] == 16
    online, offline, loss = (result[name]["auc"] for name in ("lira", "lira_offline", "loss"))
    assert online["mean"] > offline["mean"] + 0.02
    assert offline["mean"] > loss["mean"] + 0.03
    assert loss["mean"] > 0.55
    low = {name: result[name]["tpr_at_fpr"]["0.1"]["mean"] for name in result}  # 1 % rests on too few
    assert low["lira"] > low["loss"]


def test_the_overfitted_target_is_found(report):
    for name in ("lira", "lira_offline"):
        assert report.figures["target"][name]["auc_ci_corrected"][0] > 0.5
    test = kr_fast.membership.delong_test(
        report.scores["target"]["lira"], report.scores["target"]["loss"], report.data.members
    )
    assert test["p"] < 0.01


def test_a_target_that_never_saw_the_points_is_at_chance(report):
    for name, curve in report.curves["stranger"].items():
        low, high = curve.auc_interval(0.999)
        assert low <= 0.5 <= high, name
        assert report.figures["stranger"][name]["epsilon"]["clopper_pearson"] == 0
    assert report.comparison["stranger"]["lira"]["p"] < 1e-3
