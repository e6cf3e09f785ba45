"""Memorisation during training: the statistic against its definition, and the training that it ends."""

import math

import pytest
import torch
from toy_runs import new_context

from kr_fast.recycling.stages.generation import generator, generator_rounds
from kr_fast.recycling.stages.generation.memorisation import MemorisationMonitor, nearer
from kr_fast.report.sections import generator as section
from kr_fast.runtime.errors import UserError
from kr_fast.runtime.storage import files


def pictures(count, seed, side=4):
    draw = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, side, side, 1), generator=draw, dtype=torch.uint8)


def test_share_is_the_mean_over_all_choices_of_as_many_training_images():
    """Counted by hand for 9 training and 4 held-out images, whose distances are all different."""
    synthetic, train, held_out = pictures(7, 0), pictures(9, 1), pictures(4, 2)
    result = nearer(synthetic, train, held_out, 0)
    shares, distances = [], []
    for image in synthetic.double():
        to_train, to_held_out = ((image - others.double()).square().sum((1, 2, 3)) for others in (train, held_out))
        sets = torch.combinations(torch.arange(9), 4)
        shares.append(float((to_train[sets].min(1).values < to_held_out.min()).double().mean()))
        distances.append(float(to_held_out.min()))
    assert result["share"] == pytest.approx(math.fsum(shares) / 7, abs=1e-12)
    low, high = result["interval"]
    assert low < result["share"] < high
    assert 0.5 < result["ratio"] < 2


def test_copies_of_training_images_are_seen_and_others_are_not():
    """64 images, of which 48 are training images with one grey level changed; then 64 of the same kind as all."""
    train, held_out, synthetic = pictures(100, 1), pictures(50, 2), pictures(64, 3)
    fair = nearer(synthetic, train, held_out, 0)
    assert fair["interval"][0] <= 0.5 <= fair["interval"][1]
    copied = synthetic.clone()
    copied[:48] = train[:48]
    copied[:, 0, 0] ^= 1
    result = nearer(copied, train, held_out, 0)
    # A copy is nearer to the training images where its own is among the half that is compared.
    assert result["share"] == pytest.approx(0.75 * 0.5 + 0.5 * (0.75 * 0.5 + 0.25), abs=0.12)
    assert result["interval"][0] > 0.5
    assert nearer(train[:64], train[:50], held_out, 0)["share"] > 0.85


def test_interval_covers_a_half_where_nothing_was_memorised():
    """Of 40 sets of references that are exchangeable at most 6 are missed (P < 0.01 at 5 %)."""
    missed = 0
    for seed in range(40):
        result = nearer(pictures(64, 3 * seed), pictures(60, 3 * seed + 1), pictures(20, 3 * seed + 2), seed)
        missed += not result["interval"][0] <= 0.5 <= result["interval"][1]
    assert missed <= 6


def test_equal_images_and_more_held_out_than_training_images():
    """Every synthetic image lies in both sets: chance decides, and the ratio has no meaning."""
    both = pictures(30, 0)
    result = nearer(both, both, both, 0)
    assert 0.2 < result["share"] < 0.8
    assert result["ratio"] is None
    assert 0 <= nearer(pictures(5, 1), pictures(6, 2), pictures(40, 3), 0)["share"] <= 1


def prepared(tmp_path, name, **options):
    context = new_context(tmp_path / name, counts=(40, 20, 10), **options)
    context.folder.make()
    return context


def test_training_ends_at_the_limit(tmp_path):
    """A limit of chance, which the random images of these checkpoints are above or below by chance."""
    context = prepared(tmp_path, "whole")
    whole = generator_rounds.run(context)
    rows = whole["memorisation"]["rows"]
    assert [row["step"] for row in rows] == whole["checkpoints"] == [9, 12]
    assert whole["memorisation"]["compared"] == 20
    shares = [row["share"] for row in rows]
    limit = 0.5
    context = prepared(tmp_path, "limited", generator_stop_above=limit)
    result = generator_rounds.run(context)
    above = next((at for at, share in enumerate(shares) if share > limit), None)
    seen = rows if above is None else rows[: above + 1]
    assert result["memorisation"]["rows"] == seen
    assert result["checkpoints"] == ([row["step"] for row in seen if row["share"] <= limit] or [9])
    assert bool(result["notes"]) == (above == 0)
    text = section.memorisation(result["memorisation"])
    assert ("Training ended there" in text) == (above is not None)


def test_training_that_was_told_to_end_is_not_resumed(tmp_path):
    context = prepared(tmp_path, "run")
    steps, calls = [4, 8, 12], []

    def after(step):
        calls.append(step)
        return step == 8

    options = {"seed": 0, "state_path": context.folder.state / "generator.pt", "single_process": True, "after": after}
    for expected in ([4, 8], [4, 8, 8]):
        result = generator.train(
            context, context.data.train, steps, context.folder.generator, keep_state=True, **options
        )
        assert result["checkpoints"] == [4, 8]
        assert calls == expected
    assert not context.folder.generator(12).exists()


def test_a_checkpoint_is_measured_once(tmp_path):
    """The figure of a checkpoint that was measured before a stop is taken over, unless its weights are others."""
    context = prepared(tmp_path, "run")
    generator_rounds.run(context)
    first = MemorisationMonitor(context)
    first(12)
    record = files.read_json(first.path)
    record["12"]["share"] = 0.123
    files.write_json(first.path, record)
    again = MemorisationMonitor(context)
    again(12)
    assert again.rows[12]["share"] == 0.123
    path = context.folder.generator(12) / "objective.json"
    path.write_text(path.read_text() + " ")
    other = MemorisationMonitor(context)
    other(12)
    assert other.rows[12] == first.rows[12]


def test_a_limit_needs_a_training_of_known_length(tmp_path):
    for options in ({"budget": "1h"}, {"generator": "images"}):
        with pytest.raises(UserError, match="generator_stop_above must be 1 with"):
            new_context(tmp_path, generator_stop_above=0.6, **options)
