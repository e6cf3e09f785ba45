"""A page says no more than its figures: which models a mean is of, and what holds of one kind of run only."""

import pytest
from report_cases import attack, summary, whole_audit

from kr_fast.report import document, metrics, render, run_audit, seeds_document
from kr_fast.report.exported import data_card, guaranteed, model_card
from kr_fast.report.sections import ablation, calibrated, canaries, quality, reading
from kr_fast.report.sentences import OF_RUN, verdict


def page(values):
    return render.markdown("x", document.blocks(values, {}))


def card(values):
    """As of release/student/README.md, which is made of metrics.json."""
    config = {"student_arch": "resnet8", "student_width": 4, "labels": "soft", "periods": 3, "images": 128}
    config |= {"temperature": 4.0, "loss": "kl", "student_epochs": 1, "num_shadows": 4}
    return model_card.text(metrics({**values, "config": values["config"] | config}), {})


def unlike(**config):
    """A run whose Teacher was not made as any shadow: a given one, or a private one."""
    audit = whole_audit()
    for name in ("teacher", "student_full"):
        audit["setting"]["targets"][name]["kind"] = "transfer"
    return summary(audit=audit, config={"seed": 0, "audit_generator": "shared", "teacher": "", **config})


@pytest.mark.parametrize("given", [True, False])
def test_shadows_of_another_training_stand_for_no_model_of_the_run(given):
    values = unlike(teacher="mine.pt" if given else "")
    if not given:
        spent = {"spent": [], "epsilon": 2.0, "delta": 1e-5, "neighbouring": "x"}
        values["guarantee"] = {"private": True, "not_private": None, **spent}
        for name in values["audit"]["setting"]["targets"]:
            for row in values["audit"][name].values():
                row["epsilon"] = dict.fromkeys(("clopper_pearson", "one_run", "gaussian"), 0.1)
                row["epsilon"] |= {"delta": 1e-5, "level": 0.95}
    rows = run_audit.headline(values)
    assert not any("made alike" in row[0] for row in rows)
    assert rows[0][3] == "Student, shadow Students (shared generator)"
    assert any("made alike" in row[0] for row in run_audit.headline(summary()))
    (chart,) = (content for kind, content in reading.blocks(values["audit"], OF_RUN) if kind == "chart")
    assert [row.label for row in chart.rows if "made alike" in row.words] == [
        "Shadows of the Teacher", "Shadows of the Student",
    ]  # fmt: skip
    text = page(values)
    assert "trained by the Teacher's recipe" not in text
    assert ("by this package's recipe, as that of the Teacher" if given else "without the private Teacher's") in text
    assert "so this is a transfer attack too" in text
    assert "full audit" not in text
    assert "Made by another training than the model under attack, on another half of the data" in text
    assert "Made in the same way on another half of the data" in page(summary())
    assert ("The Teacher that was given to a run on" in text) == given
    assert ("A Teacher trained on 900 real images" in text) != given
    assert "by the Teacher's recipe on a random half" in page(summary())


def test_means_of_more_and_of_fewer_models_are_told_apart():
    values = summary()
    values["audit"]["leave_one_out"]["student_full"]["lira"]["targets"] = 12
    titles = [row[0] for row in run_audit.headline(values)]
    assert "LiRA online AUC, mean of 16 and 12 made alike" in titles
    assert "loss threshold AUC, mean of 16 made alike" in titles


@pytest.mark.parametrize(
    ("labels", "words", "path"),
    [
        ("soft", "the Teacher's soft labels", "the Teacher's soft labels"),
        ("top1", "the Teacher's top classes", "the Teacher's top classes"),
        ("class", "their class labels", "the Teacher's filter of the images"),
    ],
)
def test_what_the_student_learned_is_said_alike_everywhere(labels, words, path):
    text = page(summary(config={"seed": 0, "audit_generator": "shared", "labels": labels}))
    assert f"was trained on synthetic images and {words}, on no private image" in text
    assert f"saw only synthetic images and {words}" in text
    assert f"bounds from below what leaks through {path}, and says nothing" in text
    assert ("soft labels" in text) == (labels == "soft")
    assert ("learned from the shadow Teacher of the same half" in text) == (labels != "class")
    spent = {"epsilon": 2.0, "delta": 1e-5, "neighbouring": "x", "class_counts": "public"}
    values = summary(config={"student_arch": "resnet14", "labels": labels})
    values |= {"guarantee": {"private": True, **spent}, "student": {"parameters": 9}}
    card = render.markdown("x", guaranteed.student(values, {}, ""))
    assert f"A resnet14 of 9 weights, trained on synthetic images and {words}. Generator and Teacher were" in card
    twins = {**attack(0.6, 0.55, 0.65), "own": attack(0.5, 0.45, 0.55)}
    assert "soft labels" not in canaries.verdict({"power": True, "teacher": twins, "student": twins})


def test_without_shadow_students_none_are_spoken_of():
    values = summary(audit=whole_audit(full=False), aop={"teacher": 0.67, "student": 0.91})
    assert "shadow Student learned" not in page(values)
    assert "shadow Student learned" in page(summary())


def test_without_an_audit_no_attack_is_spoken_of():
    text = page(summary(audit=None, aop=None))
    assert "No attack was run, so nothing is known of what leaks" in text
    assert "attacks named above" not in text
    assert "attacks named above" in page(summary())
    assert "attacks' AUC" not in text + card(summary(audit=None, aop=None))


def test_of_a_given_teacher_it_is_not_said_what_it_was_trained_on():
    config = {"labels": "soft", "temperature": 4.0}
    assert "The Teacher was trained on the private images" in data_card.answers(config, "soft_label")
    text = data_card.answers({**config, "teacher": "net.pt"}, "soft_label")
    assert "The Teacher was given to the run, and no attack was run on its answers" in text
    assert "private images" not in text
    text = page(summary(config={"seed": 0, "audit_generator": "shared", "teacher": "net.pt"}))
    assert "| Teacher (given) |" in text
    assert "Where the Teacher, which was given, was trained on the training images, their column" in text
    assert "Teacher (real images)" not in text


def test_a_card_tells_the_notes_of_its_run():
    assert "Note: few shadows." in page(summary())
    assert "Note: few shadows." in card(summary())


def test_attacks_on_images_are_judged_alike_everywhere():
    """Above chance by itself, and not with its share of the error: then neither sentence, table nor chart say so."""
    audit = whole_audit()
    audit["released"]["nearest_synthetic"] = attack(0.53, 0.505, 0.555, role="exploratory")
    assert "No attack on the released images is seen above chance" in verdict(audit, OF_RUN)
    (chart,) = (content for kind, content in reading.blocks(audit, OF_RUN) if kind == "chart")
    (row,) = (row for row in chart.rows if row.label == "Released images")
    assert (row.state, row.text) == ("plain", "0.530 [0.495, 0.565]")
    head, row = run_audit.released(summary(audit=audit))
    assert head[1:4] == ["role", "AUC", "corrected"]
    assert row[1:4] == ["exploratory", "0.530 [0.505, 0.555]", "[0.495, 0.565]"]


def test_released_images_are_those_of_the_periods_that_there_were():
    rows = run_audit.what_was_run(summary())
    assert rows[-1][2] == "1024 images of the last period"
    rows = run_audit.what_was_run(summary(config={"seed": 0, "audit_generator": "shared", "fixed_images": True}))
    assert rows[-1][2] == "1024 images of all periods"
    figures = {"pipelines": 4, "all_periods": {"auc": 0.5}, "last_period": {"auc": 0.6}}
    assert "bound what more images would leak" in calibrated.explanation(figures)
    assert "Every period had the same images." in calibrated.explanation({**figures, "all_periods": {"auc": 0.6}})


def test_images_that_other_pipelines_calibrate_are_no_images_that_were_not_attacked():
    """Neither in the caveats nor in the card that goes with them, also where this attack alone is above chance."""
    values, row = summary(), attack(0.6, 0.55, 0.65)
    assert "those of earlier periods were not attacked" in page(values)
    for released in (True, False):
        audit = whole_audit(released=released)
        by = dict.fromkeys(("offline", "online", "uncalibrated"), row)
        audit["released_calibrated"] = {"pipelines": 4, "level": 0.95, "all_periods": by, "last_period": by}
        values = summary(audit=audit)
        which = "those of earlier periods" if released else "The synthetic images"
        assert f"{which} were attacked by those of other pipelines alone." in " ".join(run_audit.caveats(values))
        text = data_card.leaks(values)
        assert "better than chance (AUC 0.600, 95 % interval [0.550, 0.650])" in text
        assert "No attack" not in text
        assert "not attacked" not in text
        assert ("calibrated by other pipelines)." in text) == released
        audit["generator"] = None
        assert "The generator's weights were not attacked." in " ".join(run_audit.caveats(values))


def test_the_attack_named_for_the_control_is_told():
    audit = whole_audit()
    assert run_audit.named_for_control(audit) == ""
    audit["setting"]["targets"]["control"]["primary"] = "loss"
    assert "For the positive control loss threshold was." in page(summary(audit=audit))
    assert run_audit.named_for_control(whole_audit(control=False)) == ""


def test_intervals_over_groups_are_called_so():
    values = summary()
    assert "score intervals of attacks' AUC" in page(values)
    counted = {"groups": 60, "mixed": 0, "records": {}, "targets": {}, "recipes": {}}
    values["audit"]["by_group"] = counted
    for text in (page(values), card(values)):
        assert "or those over whole groups of images where these are wider, of attacks' AUC" in text
    row = {"labels": "soft", "regenerated": True, "of_run": True}
    row |= {"val_accuracy": 0.9, "test_accuracy": 0.8, "test_auc": 0.95}
    sizes = {"val": 100, "test": 500}
    assert ablation.table([row], sizes)[1][2:4] == ["90.00 % [82.6, 94.5]", "80.00 % [76.3, 83.3]"]
    assert ablation.table([row], sizes, by_groups=True)[1][2:4] == ["90.00 %", "80.00 %"]
    for model in ("teacher", "student"):  # none of them large enough to be told by itself
        values[model] |= {"test_groups": {"groups": 40, "resampled": True, "rows": []}, "test_accuracy_ci": [0.9, 1.0]}
    blocks = list(quality.blocks(values))
    text = blocks[blocks.index(("heading", "Groups of the test images")) + 1][1]
    assert text.endswith("each with all of its images.")


def test_the_interval_of_a_mean_is_not_called_one_of_another_seed():
    text = seeds_document.explanation({"cut_by_seed": False})
    assert "where the mean over all seeds may be" in text
    assert "another seed may be from it the standard deviation says" in text


def test_a_gap_of_accuracies_is_one_of_points():
    assert run_audit.headline(summary())[1][-1] == "2.00 points"


def test_notes_on_the_time_are_sentences():
    budget = {"still_improving": [], "notes": ["the Student's cycle of 1 period took 3 s and not 5 s"]}
    assert run_audit.more_time({"budget": budget}).endswith(". The Student's cycle of 1 period took 3 s and not 5 s.")
