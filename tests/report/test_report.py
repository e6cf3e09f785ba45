"""The report from plain values: intervals, honest words, missing parts, names from outside, strict JSON."""

import io
import json

import numpy as np
import pytest
from PIL import Image
from report_cases import arrays, attack, summary, whole_audit
from scipy import stats

from kr_fast import report
from kr_fast.report import audit_document, audit_tables, plots, run_audit, sentences, tables
from kr_fast.report.sections import quality


def test_both_documents_are_written(tmp_path):
    html, markdown = report.write(tmp_path, summary(), arrays())
    text = html.read_text()
    assert "<script" not in text
    assert "&lt;script&gt;" in text
    assert "<b>set" not in text
    for words in (
        "97.00 %",
        "95.00 %",
        "0.600 [0.570, 0.630]",
        "gap of 2.00 points",
        "few shadows",
        "not differential",
        "How the images were read: pixels are 8-bit; not read: 3 files.",
    ):
        assert words in text, words
        assert words in markdown.read_text(), words
    assert "tells members from non-members better than chance on the Teacher itself (AUC 0.600" in text
    words = "is not seen to tell members from non-members better than chance on the Student with shadows of the Teacher"
    assert f"{words}&#39;s training (transfer)" in text
    assert "mean AUC" in text
    assert "so that scores without information have an AUC of 0.5" in text
    assert "only 3 false positives: no point claim" in text
    figures = sorted(path.name for path in (tmp_path / "figures").iterdir())
    assert figures == ["curves.png", "images.png", "roc.png", "stages.png"]
    for name in figures:
        image = Image.open(tmp_path / "figures" / name)
        assert image.width >= 600
        assert np.asarray(image).std() > 5  # something is drawn


def test_real_images_are_shown_where_asked_for_only(tmp_path):
    html, markdown = report.write(tmp_path / "shown", summary(), arrays())
    assert "shows real images of the private data" in html.read_text()
    assert "> **This page shows real images" in markdown.read_text()
    html, markdown = report.write(tmp_path / "not", summary(), {**arrays(), "real_grid": None})
    for text in (html.read_text(), markdown.read_text()):
        assert "real images of the private data" not in text
        assert "Real training images" not in text
        assert "Synthetic images, one row for each class" in text
    beside, alone = (Image.open(tmp_path / name / "figures" / "images.png") for name in ("shown", "not"))
    assert alone.width < 0.6 * beside.width


def test_paths_are_shown_without_their_folders():
    config = {"data": "/home/a b/x.npz", "checkpoint": ["t=/w/t.pt@nets:make", "../s.pt"], "seed": 3, "out": "~/r/q"}
    assert report.without_folders(config) == {
        "data": "x.npz",
        "checkpoint": ["t=t.pt@nets:make", "s.pt"],
        "seed": 3,
        "out": "q",
    }
    assert report.without_folders({"members": "/a/m.npy,b/n.npy", "none": ""}) == {"members": "m.npy,n.npy", "none": ""}


def test_words_from_outside_stay_words_in_markdown(tmp_path):
    hostile = "x\n```\n<img src=a onerror=b>\n# Title\n````` [a](javascript:b) ![c](http://d) `e`"
    actual = summary(command=hostile, title=hostile, notes=[hostile])
    actual["dataset"]["name"] = hostile
    html, markdown = report.write(tmp_path, actual, arrays())
    assert "<img src=a" not in html.read_text()
    lines = markdown.read_text().splitlines()
    fences = [at for at, line in enumerate(lines) if line.strip("`") == "" and len(line) >= 6]
    inside = [False] * len(lines)
    for start, stop in zip(fences[::2], fences[1::2], strict=True):
        inside[start : stop + 1] = [True] * (stop + 1 - start)
    outside = [line for line, within in zip(lines, inside, strict=True) if not within]
    assert [line for line, within in zip(lines, inside, strict=True) if within][1:-1] == hostile.splitlines()
    assert not any(
        "<img" in line or "](javascript" in line or "](http" in line or "```" in line.replace("\\`", "")
        for line in outside
        if line != "```"
    )
    assert sum(line.startswith("# ") for line in outside) == 1


def words(**changes):
    actual = summary(**changes)
    return run_audit.verdict(actual) + " " + " ".join(run_audit.caveats(actual))


def test_words_follow_the_audits_that_were_run():
    text = words()
    # The recipes first, averaged over models; then the very models.
    assert (
        "On average over 16 models made as the Teacher was, each attacked from the others, LiRA online tells members "
        "from non-members better than chance (AUC 0.580, 95 % interval [0.565, 0.595] over models and records). "
        "On average over 16 models made as the Student was"
    ) in text
    assert (
        "Models made as the Student was leak less than models made as the Teacher was (difference of AUC +0.060 "
        "[0.020, 0.100], p = 0.001)."
    ) in text
    assert "better than chance on the Student itself (AUC 0.570" in text
    assert text.index("On average over 16 models") < text.index("itself")
    # Of Teacher and Student in full, and not by transfer, which has p = 0.004.
    assert "The Teacher itself and the Student itself are not told apart by it (paired test, p = 0.2)" in text
    assert "12 shadow Students learn from images of this run's own generator" in text
    assert "is found (AUC by LiRA online 0.800 [0.780, 0.820], loss threshold 0.700" in text
    # 0.50 to 0.56 by itself, 0.49 to 0.57 with its share of the error.
    assert "No attack on the released images is seen above chance (nearest synthetic image)" in text
    assert "Released images are the 1024 of the last period" in text
    retrained = words(config={"audit_generator": "retrained"})
    assert "a generator of their own each" in retrained
    assert "this run's own generator" not in retrained
    bare = words(audit=whole_audit(full=False, control=False, released=False, recipes=False))
    assert "shadows of the Teacher's training only (a transfer attack)" in bare
    assert "(transfer) itself leaks less than the Teacher itself (paired test, p = 0.004)" in bare
    assert "synthetic images were not attacked" in bare
    assert "There was no positive control" in bare
    assert "shadow Students" not in bare
    assert "On average" not in bare


def test_shadows_of_a_teacher_that_was_given_have_titles():
    """None of the targets was made as they were: they are called by whom they were made for."""
    audit = whole_audit()
    for name in ("teacher", "student_full"):
        audit["setting"]["targets"][name]["kind"] = "transfer"
    text = words(audit=audit)
    assert "On average over 16 models made as the shadows of the Student were" in text
    assert "student_full" not in text


def test_report_and_audit_say_the_same():
    """One paragraph in both pages, and of released images the same attacks."""
    audit = whole_audit()
    audit["released"]["generated_density"] = attack(0.56, 0.53, 0.59)
    audit["setting"]["attacks"]["generated_density"] = {"title": "density of the released images", "assumes": ""}
    audit["setting"] |= {"skipped": {}, "leave_one_out_skipped": {}, "notes": [], "delta": 1e-5, "priors": [0.5]}
    whole = {**audit, "details": {"labels": sentences.OF_RUN}, "exposed": {}}
    actual = {"show_real_images": False, "show_records": False, **whole}
    (verdict,) = next(content for kind, content in audit_document.blocks(actual, {}) if kind == "verdict").reasons
    assert run_audit.verdict(summary(audit=audit)).endswith(verdict)
    assert "by themselves leak membership (attacks above chance: density of the released images)." in verdict
    listed = [row[0] for row in run_audit.released(summary(audit=audit))[1:]]
    assert listed == ["nearest synthetic image", "density of the released images"]
    for each in audit.values():
        for row in each.values():
            if isinstance(row, dict) and "auc_ci" in row:
                row["epsilon"] = {"clopper_pearson": 0.0}
    head = audit_tables.headline(actual, sentences.OF_RUN)
    assert [row[1] for row in head if row[0] == "the released images"] == listed
    assert head[1][:3] == ["mean of 16 models made as the Teacher was", "LiRA online", "0.580 [0.565, 0.595]"]


def test_a_control_that_is_not_found_takes_the_audits_power():
    audit = whole_audit()
    audit["setting"]["control"] |= {"found": False, "by": [], "by_primary": False}
    assert "positive control, an overfitted model, was not found, so this audit has no power" in words(audit=audit)
    audit["setting"]["control"] |= {"found": True, "by": ["loss"]}
    assert "is found, but not by the attack named beforehand for it (AUC by loss threshold 0.700" in words(audit=audit)


def test_tables_stand_the_audits_side_by_side():
    actual = summary()
    head = run_audit.headline(actual)
    assert head[0][1:] == [
        "Teacher (real images)",
        "Student, transfer",
        "Student, full (shared generator)",
        "Teacher - Student, full (shared generator)",
    ]
    assert head[2][1:] == ["0.9900 [0.9800, 1.0000]", *["0.9800 [0.9700, 0.9900]"] * 2, "+0.0100 [-0.0040, 0.0200]"]
    assert head[5] == [
        "LiRA online AUC, mean of 16 made alike",
        "0.580 [0.565, 0.595]",
        "",
        "0.520 [0.505, 0.535]",
        "+0.060 [0.020, 0.100], p = 0.001",
    ]
    assert head[6][1:] == [
        "0.600 [0.570, 0.630]",
        "0.510 [0.480, 0.540]",
        "0.570 [0.540, 0.600]",
        "+0.030 [-0.010, 0.070], p = 0.2",
    ]
    assert head[-1][1:] == ["0.670", "0.910", "0.800", "-0.130"]
    assert [row[1] for row in run_audit.what_was_run(actual)[1:]] == [
        "full",
        "transfer",
        "full",
        "control",
        "released images",
    ]
    assert run_audit.what_was_run(actual)[3][2:] == ["12 shadow Students, 6 on a side of an example", "the generator"]
    assert run_audit.every_attack(actual)[1][-1] == "0.800 [0.780, 0.820]"
    rows = run_audit.recipes(actual)
    assert rows[3] == [
        "16 models made as the Student was",
        "LiRA online",
        "primary",
        "0.520 [0.505, 0.535]",
        "0.012",
        "+0.060 [0.020, 0.100], p = 0.001",
    ]
    assert rows[4][-1] == "+0.030 [-0.020, 0.080], p = 0.04 (corrected)"
    transfer = summary(audit=whole_audit(full=False, recipes=False), aop={"teacher": 0.67, "student": 0.91})
    assert run_audit.headline(transfer)[5][-1] == "+0.090 [0.050, 0.130], p = 0.004"
    assert run_audit.headline(transfer)[6][-1] == "+0.050 [0.000, 0.100], p = 0.06 (corrected)"


def test_a_result_shows_itself_in_a_notebook(tmp_path):
    from kr_fast.recycling.pipeline import Result

    verdict = {"decision": "share", "reasons": ["Nothing leaks."], "chance": 0.2, "rules": []}
    result = Result(report.metrics(summary(verdict=verdict)), tmp_path, tmp_path / "report.html")
    assert repr(result) == f"Result(test accuracy: teacher 0.9700, student 0.9500; report: {tmp_path / 'report.html'})"
    assert "0.600 [0.570, 0.630]" in result._repr_html_()
    assert result._repr_html_().startswith('<ul class="note"><li>verdict: share</li><li>Nothing leaks.</li>')
    assert "<script" not in result._repr_html_()


def test_what_is_missing_is_said(tmp_path):
    bare = summary(audit=None, aop=None, checkpoints=[], tuning=[], stages={})
    _, markdown = report.write(tmp_path, bare, arrays() | {"roc": {}})
    text = markdown.read_text()
    for words in (
        "No audit was run",
        "Checkpoint Optimisation was not run",
        "Tuning was not run",
        "No membership attack",
    ):
        assert words in text


def test_own_teacher_has_no_curve(tmp_path):
    given = arrays()
    given["curves"]["teacher"] = {}
    html, _ = report.write(tmp_path, summary(), given)
    assert "Training" in html.read_text()


@pytest.mark.parametrize("classes", [2, 100])
@pytest.mark.parametrize("channels", [1, 3])
def test_grid_of_images(classes, channels):
    grid = np.random.default_rng(0).integers(0, 256, (classes, 8, 28, 28, channels), dtype=np.uint8)
    names = [f"class {index}" for index in range(classes)]
    for real in (None, grid):
        assert max(Image.open(io.BytesIO(plots.grid(grid, names, real))).size) < 3000


@pytest.mark.parametrize(("share", "count"), [(0.0, 10), (0.97, 500), (1.0, 40)])
def test_wilson_is_scipys(share, count):
    expected = stats.binomtest(round(share * count), count).proportion_ci(0.95, "wilson")
    assert tables.wilson(share, count) == pytest.approx((expected.low, expected.high), abs=1e-6)


def test_metrics_are_strict_json():
    actual = tables.metrics(summary(cas_gap=float("nan"), aop={"teacher": float("inf"), "student": 1.0}))
    assert actual["cas_gap"] is None
    assert actual["aop"] == {"teacher": None, "student": 1.0}
    json.dumps(actual, allow_nan=False)
    assert actual["audit"]["student"]["lira"]["auc"] == 0.51


def test_tables_escape_their_separator():
    assert tables.markdown_table([["a|b", "c"], ["d\ne", 1]]) == "| a\\|b | c |\n|---|---|\n| d e | 1 |"


def test_a_comparison_says_no_more_than_its_interval():
    # p = 0.004 is above the error of an interval at 99.9 %, which holds 0.
    audit = whole_audit(full=False, control=False, released=False, recipes=False)
    audit["setting"]["level"] = 0.999
    assert "are not told apart by it (paired test, p = 0.004)" in sentences.verdict(audit, sentences.OF_RUN)
    # Below chance there is no leakage to compare.
    audit["setting"]["level"] = 0.95
    audit["teacher"]["lira"], audit["student"]["lira"] = attack(0.49, 0.46, 0.52), attack(0.40, 0.37, 0.43)
    text = sentences.verdict(audit, sentences.OF_RUN)
    assert "itself has a lower AUC than the Teacher itself, and neither is seen above chance (paired" in text
    assert "leaks less" not in text
    audit["comparison"]["student"]["lira"]["difference"] *= -1
    assert "itself has a higher AUC" in sentences.verdict(audit, sentences.OF_RUN)


def test_the_command_names_no_folder_above_its_own(tmp_path):
    out = tmp_path / "Dr. A" / "x y"
    assert report.repeated("run", out / "config.yaml") == "kr-fast run --config 'x y/config.yaml' --out 'x y'"


def test_quality_of_models_and_images_is_told_in_the_report():
    """Classes without test images by name; nothing of what was not measured."""
    content = list(quality.blocks(summary()))
    assert [each for kind, each in content if kind == "heading"] == [
        "Classes of the test images",
        "Test images without near-duplicates in training",
        "Quality of the synthetic images",
    ]
    texts, tables = ([each for kind, each in content if kind == name] for name in ("text", "table"))
    assert texts[0].endswith("Without test images, and in no mean: b|c.")
    assert tables[0][0] == ["class", "model", "sensitivity (recall)", "precision", "AUC", "calibration error"]
    cells = ["50.00 % [45.0, 55.1]", "100.00 % [100.0, 100.0]", "0.980 [0.970, 0.990]", "0.040 [0.030, 0.060]"]
    assert tables[0][2] == ["<i>a", "Student", *cells]
    assert tables[0][3] == ["b|c", "Teacher", "not measured", "0.00 % [0.0, 0.0]", "not measured", "not measured"]
    assert tables[1] == [["", "<i>a", "b|c"], ["<i>a", "250 [45, 55]", "250 [45, 55]"], ["b|c", "0", "0"]]
    assert texts[3].startswith("10 of 500 test images have a near-duplicate")
    assert "On the other 490: Teacher 96.00 %, AUC 0.890; Student 96.00 %, AUC 0.880." in texts[3]
    assert tables[3][1] == ["FID (Frechet distance)", "2.500", "2.500"]
    assert tables[3][2][1:] == ["0.1200 [0.1000, 0.1400]", "0.0100 [-0.0100, 0.0300]"]
    assert tables[3][-1] == ["coverage", "0.500 [0.400, 0.600]", "0.500 [0.400, 0.600]"]
    assert tables[4][0][3:5] == ["FID", "KID"]
    assert tables[4][1][:5] == ["<i>a", "100 against 500", "synthetic", "2.500", "0.1200 [0.1000, 0.1400]"]
    assert tables[4][3] == ["b|c", "28 against 0", "", *["too few images"] * 6]
    earlier = summary()["synthetic"]
    for figures in (earlier, earlier["real"]):
        figures["kid"] = {key: figures["kid"][key] for key in ("mean", "sd", "subsets", "subset_size")}
        del figures["classes"], figures["fid"]
    assert quality.set_table(earlier)[1][1:] == ["0.1200 (sd 0.0300)", "0.0100 (sd 0.0300)"]
    bare = {"test_accuracy": 0.9}
    assert list(quality.blocks(summary(teacher=bare, student=bare, synthetic=None))) == []
    assert quality.rows(summary(teacher=bare, student=bare), ["teacher", "student"]) == []
    names = ("test_accuracy", "test_recall", "test_absent_classes", "test_without_duplicates")
    older = {name: summary()["teacher"][name] for name in names}  # of a run of an earlier version
    table = list(quality.blocks(summary(teacher=older, student=older)))[2][1]
    assert table[:2] == [["class", "model", "sensitivity (recall)"], ["<i>a", "Teacher", "50.00 %"]]


def test_groups_are_told_by_size_alone():
    content = summary()
    row = {"images": 30, "accuracy": 0.9, "accuracy_ci": [0.8, 1.0], "auc": None, "auc_ci": None}
    for model in ("teacher", "student"):
        content[model]["test_groups"] = {"groups": 12, "resampled": True, "rows": [row]}
    blocks = list(quality.blocks(content))
    at = blocks.index(("heading", "Groups of the test images"))
    assert "12 groups drawn anew, each with all of its images" in blocks[at + 1][1]
    content["teacher"]["test_accuracy_ci"] = [0.9, 0.991]
    assert quality.accuracy(content["teacher"], 500) == "97.00 % [90.0, 99.1]"
    assert quality.accuracy(summary()["teacher"], 500) == "97.00 % [95.1, 98.2]"  # Wilson
    assert "Of so few they are too narrow." in blocks[at + 1][1]
    title = "test AUC (mean over classes, each against the rest)"
    cells = ["0.900 [0.800, 1.000]", "not measured"]
    assert blocks[at + 2][1] == [
        ["test images", "model", "accuracy", title],
        ["30", "Teacher", *cells],
        ["30", "Student", *cells],
    ]
    for model in ("teacher", "student"):
        content[model]["test_groups"] = {"groups": 1, "resampled": False, "rows": []}
    blocks = list(quality.blocks(content))
    assert "intervals are over images" in blocks[at + 1][1]
    assert blocks[at + 2][0] == "heading"


def test_kappa_of_grades_is_told_beside_the_other_figures():
    """None of the Student's: then there is no difference."""
    grades = summary()
    grades["teacher"] |= {"test_kappa": 0.8, "test_kappa_ci": [0.7, 0.85]}
    grades["student"] |= {"test_kappa": 0.75, "test_kappa_ci": [0.65, 0.8]}
    grades["student_minus_teacher"]["kappa"] = {"difference": -0.05, "interval": [-0.1, 0.01]}
    title, *cells = quality.rows(grades, ["teacher", "student"])[-1]
    assert title == "quadratic weighted kappa of the grades"
    assert cells == ["0.8000 [0.7000, 0.8500]", "0.7500 [0.6500, 0.8000]", "+0.0500 [-0.0100, 0.1000]"]
    grades["student"] |= {"test_kappa": None, "test_kappa_ci": None}
    del grades["student_minus_teacher"]["kappa"]
    assert quality.rows(grades, ["teacher", "student"])[-1][2:] == ["not measured", ""]
