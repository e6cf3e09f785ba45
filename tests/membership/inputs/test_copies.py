"""A model among its own shadows, a shadow twice, an image on both sides: found, and no false alarm."""

import copy
import dataclasses

import numpy as np
import pytest
import torch
from audit_cases import COUNT, MODELS, data, logits_of
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import kr_fast
from kr_fast.ensemble import ModelArray, Shadows
from kr_fast.membership import AuditData, Choices, ShadowSignals, TargetSignals, audit_signals, from_logits, load_npz
from kr_fast.membership.inputs.copies import images_on_both_sides


@settings(deadline=None, max_examples=8)
@given(index=st.integers(0, MODELS - 1), queries=st.sampled_from([None, 2]), part=st.booleans())
def test_a_target_among_its_shadows_is_refused(index, queries, part):
    logits, keep, labels, members = logits_of(queries=queries)
    options = {"members": [0, 2, 4], "non_members": [1, 3, 5, 7]} if part else {"members": members}
    words = (
        f"audit: target t must not be among its shadows .leave that shadow out., got shadow {index}, with equal answers"
    )
    with pytest.raises(ValueError, match=words):
        from_logits(logits[:MODELS], keep, labels, target={"t": logits[index]}, **options)
    others = torch.arange(MODELS) != index
    from_logits(logits[:MODELS][others], keep[others], labels, target={"t": logits[index]}, **options)
    nearly = logits[index].clone()
    nearly[(0, 0) if queries is None else (0, 0, 0)] += 3.0
    from_logits(logits[:MODELS], keep, labels, target={"t": nearly}, **options)


def test_a_file_with_the_target_among_its_shadows_names_itself(tmp_path):
    logits, keep, labels, members = logits_of()
    arrays = {"keep": keep.numpy(), "labels": labels.numpy(), "members": members.numpy(), "logits": logits[:-1].numpy()}
    np.savez(tmp_path / "s.npz", **arrays, **{"target/t/logits": logits[4].numpy()})
    with pytest.raises(ValueError, match=r"target t must not be among its shadows .*, got shadow 4, .* in .*s.npz"):
        load_npz(tmp_path / "s.npz")


def test_shadows_that_are_one_model_are_refused():
    """With other rows of keep that cannot be; with the same row a shadow would be attacked with itself."""
    logits, keep, labels, _ = logits_of()
    twice = logits[:MODELS].clone()
    twice[7] = twice[2]
    for rows in (keep, keep.clone().index_copy_(0, torch.tensor([7]), keep[2:3])):
        with pytest.raises(ValueError, match="shadows must be models that differ, got equal answers of 2 and 7"):
            from_logits(twice, rows, labels)


def test_answers_that_agree_by_chance_are_no_copies():
    """Constant answers, and saturated ones of two values."""
    keep = torch.arange(4)[:, None] % 2 == torch.arange(20) % 2
    for phi in (torch.zeros(1, 20, 4), torch.where(torch.arange(20)[:, None] < 18, torch.inf, -17.0).repeat(1, 1, 4)):
        target = TargetSignals({"phi": phi[:, :, 0]})
        AuditData({"shadows": ShadowSignals(keep, {"phi": phi})}, {"t": target}, torch.arange(20) < 9)


def make():
    return nn.Sequential(nn.Flatten(), nn.Linear(16, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))


class Wrapped(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.net = inner

    def forward(self, x):
        return self.net(x)


@pytest.fixture
def models():
    torch.manual_seed(0)
    return [make().eval() for _ in range(5)]


def pool():
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (24, 4, 4, 1), generator=generator, dtype=torch.uint8)
    return images, torch.arange(24) % 3, torch.arange(24) % 2 == 0


def test_models_with_equal_weights_are_refused_before_they_are_asked(models):
    images, labels, members = pool()
    keep = (torch.arange(4)[:, None] + torch.arange(24)) % 2 == 0
    shadows = Shadows(ModelArray(models[:4]), keep)
    for target in (models[2], copy.deepcopy(models[2]), Wrapped(models[2])):  # under other names too
        with pytest.raises(
            ValueError, match="target student must not be among its shadows .* got shadow 2, equal weights"
        ):
            kr_fast.audit({"student": target}, shadows, images, labels, members)
    with pytest.raises(ValueError, match="target control must not be among its shadows .* got shadow 1"):
        kr_fast.audit(models[4], shadows, images, labels, members, control=models[1])
    double = Shadows(ModelArray([*models[:3], copy.deepcopy(models[1])]), keep)
    with pytest.raises(ValueError, match="shadows must be models that differ, got equal weights of 1 and 3"):
        kr_fast.audit(models[4], double, images, labels, members)
    other = copy.deepcopy(models[2])
    other[4].bias.data[0] += 1e-3  # all but one number in common
    report = kr_fast.audit(other, shadows, images, labels, members, choices=Choices(attacks=("loss",)))
    assert report.num_shadows == 4


def test_a_target_of_another_set_may_be_one_of_these_shadows(models):
    images, labels, members = pool()
    keep = (torch.arange(2)[:, None] + torch.arange(24)) % 2 == 0
    sets = {"a": Shadows(ModelArray(models[:2]), keep), "b": Shadows(ModelArray(models[2:4]), keep)}
    report = kr_fast.audit({"b": models[0]}, sets, images, labels, members, choices=Choices(attacks=("loss",)))
    assert report.setting["targets"]["b"]["shadows"] == "b"


def images_of(count, seed=0):
    return torch.randint(0, 256, (count, 3, 4, 1), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


@settings(deadline=None, max_examples=25)
@given(copies=st.lists(st.tuples(st.integers(0, 9), st.integers(10, 23)), max_size=6))
def test_images_on_both_sides_are_counted(copies):
    images, members = images_of(24), torch.arange(24) < 10
    for source, place in copies:
        images[place] = images[source]
    inside, outside = ({row.numpy().tobytes() for row in images[side]} for side in (members, ~members))
    counts = [
        sum(row.numpy().tobytes() in other for row in images[side])
        for side, other in ((members, outside), (~members, inside))
    ]
    result = images_on_both_sides(images, members)
    if not copies:
        assert result is None
    else:
        assert result.startswith(f"{counts[0]} of 10 members and {counts[1]} of 14 non-members are the same images")


def test_images_on_both_sides_are_told_in_the_report():
    images = images_of(COUNT)
    whole = data(images=images)
    assert not any("same images" in line for line in audit_signals(whole, Choices(attacks=("loss",))).warnings)
    inside, outside = whole.members.nonzero()[:3, 0], (~whole.members).nonzero()[:3, 0]
    images[outside] = images[inside]
    images[inside[1]] = images[inside[0]]  # twice among the members: nothing to say of
    report = audit_signals(dataclasses.replace(whole, images=images), Choices(attacks=("loss",)))
    line = next(line for line in report.setting["warnings"] if "same images" in line)
    assert line.startswith(f"3 of {int(whole.members.sum())} members and 2 of")


def warned(given, words, **options):
    return [line for line in audit_signals(given, Choices(**options)).warnings if words in line]


def test_a_target_that_is_a_shadow_but_for_rounding_is_told():
    logits, keep, labels, members = logits_of()
    shadows, words = logits[:MODELS].double(), "does but for rounding"
    for rounded in (shadows[4].half(), shadows[4].bfloat16(), shadows[4] + 1e-4 * shadows[5], shadows[4] * 0.999):
        result = from_logits(shadows, keep, labels, target={"t": rounded}, members=keep[4])
        assert "shadow 4" in warned(result, words, attacks=["loss"])[0]
    own = from_logits(shadows, keep, labels, target={"t": logits[MODELS]}, members=members)
    assert not warned(own, words, attacks=["loss"])
    # Of a target that is near to all shadows, as models are that were fine-tuned by little, nothing is said.
    near = shadows[0] + 0.01 * shadows
    target = shadows[0] + 0.01 * logits[MODELS]
    assert not warned(from_logits(near, keep, labels, target=target, members=members), words, attacks=["loss"])


def test_a_population_that_is_under_attack_itself_is_told():
    logits, keep, labels, members = logits_of()
    shadows, own, words = logits[:MODELS], logits[MODELS], "has to be further non-members"

    def said(at):
        given = (shadows[:, at], own[at], labels[at])
        return warned(from_logits(shadows, keep, labels, target=own, members=members, population=given), words)

    assert "answers 40 of the population's 40 examples" in said(members)[0]
    further = torch.randn(MODELS + 1, 20, logits.shape[2], generator=torch.Generator().manual_seed(3))
    z = further[:MODELS], further[MODELS], labels[:20]
    assert not warned(from_logits(shadows, keep, labels, target=own, members=members, population=z), words)
