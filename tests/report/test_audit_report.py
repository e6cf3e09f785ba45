"""The page of an audit: self-contained, the figures as in the JSON, honest words, names from outside, missing parts."""

import dataclasses
import html
import io
import json
import re

import numpy as np
import pytest
import torch
from audit_cases import COUNT, MODELS, data
from PIL import Image

from kr_fast.membership import Choices, TargetSignals, audit_signals
from kr_fast.report import audit_plots, audit_tables


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """(report, folder, text of the page)."""
    out = tmp_path_factory.mktemp("page")
    whole = data()
    other = TargetSignals({"phi": data(1, 0.0).targets["target"].signals["phi"]}, kind="transfer")
    images = torch.arange(COUNT * 64).reshape(COUNT, 8, 8, 1).to(torch.uint8)
    targets = {"<b>t<b>": whole.targets["target"], "other": other}
    whole = dataclasses.replace(whole, targets=targets, images=images, labels=torch.arange(COUNT) % 3)
    report = audit_signals(whole, Choices(attacks=("lira", "loss"), targets="shadows"))
    path = report.write(out, DETAILS)
    return report, out, path.read_text()


DETAILS = {"title": "Audit of <i>x</i>", "command": "kr-fast audit", "versions": {"torch": "2"}}


def test_page_is_one_safe_file(page):
    _, out, text = page
    result = {str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()}
    release = {"release/audit.html", "release/audit.json"}
    private = {f"private/{name}" for name in ("audit.npz", "exposed.json", "records.csv")}
    assert result == {"README.txt", *release, *private}
    assert "<script" not in text
    assert "http:" not in text
    assert "https:" not in text
    assert "<b>t" not in text
    assert "<i>x" not in text
    assert "Audit of &lt;i&gt;x&lt;/i&gt;" in text
    sources = re.findall(r'(?:src|srcset)="([^"]{0,30})', text)
    assert sources
    assert all(source.startswith("data:image/png;base64,") for source in sources)
    assert len(re.findall(r'media="\(prefers-color-scheme: dark', text)) == len(sources) / 2


def test_page_says_what_was_found(page):
    report, _, text = page
    row = report.figures["<b>t<b>"]["lira"]
    low, high = row["auc_ci"]
    for words in (
        f"{row['auc']:.3f} [{low:.3f}, {high:.3f}]",
        "LiRA online tells members from non-members better than chance on &lt;b&gt;t",
        "is not seen to tell members from non-members better than chance on other",
        "It is not differential privacy",
        "exploratory",
        "no point claim",
        "a lower bound on what it leaks",
        "&lt;b&gt;t&lt;b&gt; against other",
        ">corrected p</th>",
        "Every shadow as a target",
        "transfer: shadows of another training",
        "Thresholds that never saw this target",
        f"On average over {MODELS} models made as &lt;b&gt;t&lt;b&gt; was, each attacked from the others, LiRA online",
        "over models and records",
    ):
        assert words in text, words


def test_files_hold_the_figures_and_scores(page):
    report, out, _ = page
    result = json.loads((out / "release" / "audit.json").read_text())
    assert result["<b>t<b>"]["lira"]["auc"] == report.figures["<b>t<b>"]["lira"]["auc"]
    assert result["details"]["title"] == "Audit of <i>x</i>"
    assert "exposed" not in result
    exposed = json.loads((out / "private" / "exposed.json").read_text())
    assert len(exposed["other"]) == 16
    with np.load(out / "private" / "audit.npz") as archive:
        scores, members = archive["<b>t<b>/lira/scores"], archive["members"]
        assert np.array_equal(scores, report.scores["<b>t<b>"]["lira"].numpy())
        assert archive["keep"].shape == (MODELS, COUNT)
        assert archive["<b>t<b>/lira/tp"][-1] == members.sum()


def permuted(report, order):
    """The report of the same examples in another order."""
    whole = report.data
    shadows = whole.shadows["shadows"]
    return audit_signals(
        dataclasses.replace(
            whole,
            shadows={
                "shadows": dataclasses.replace(
                    shadows, keep=shadows.keep[:, order], signals={"phi": shadows.signals["phi"][:, order]}
                )
            },
            targets={
                name: dataclasses.replace(target, signals={"phi": target.signals["phi"][:, order]})
                for name, target in whole.targets.items()
            },
            members=whole.members[order],
            labels=whole.labels[order],
            images=whole.images[order],
        ),
        Choices(attacks=("lira", "loss"), targets="shadows"),
    )


def test_a_page_tells_nothing_of_single_records(page, tmp_path):
    """Neither the page nor the JSON depends on which record stands where."""
    report, out, text = page
    other = permuted(report, torch.arange(COUNT).flip(0))
    assert other.write(tmp_path / "other", DETAILS).read_text() == text
    numbers = [
        json.loads((folder / "release" / "audit.json").read_text(), parse_float=lambda text: f"{float(text):.9g}")
        for folder in (out, tmp_path / "other")
    ]
    assert numbers[0] == numbers[1]  # to what the order of a sum leaves
    assert 'role="alert"' not in text


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"show_records": True}, "shows single records of the private data"),
        ({"show_real_images": True}, "shows real images of the private data"),
        ({"show_records": True, "show_real_images": True}, "shows real images and single records of"),
    ],
)
def test_a_page_that_shows_records_or_images_says_so(page, tmp_path, options, words):
    """One target and one attack: each figure of a page takes longer to draw than all else."""
    whole = page[0].data
    one = dataclasses.replace(whole, targets={"other": whole.targets["other"]})
    path = audit_signals(one, Choices(attacks=("loss",))).write(tmp_path, DETAILS, **options)
    text = path.read_text()
    assert path == tmp_path / "private" / "audit.html"
    assert not (tmp_path / "release" / "audit.html").exists()
    assert text.count('role="alert"') == 1
    assert words in text
    assert (">index</th>" in text) == ("show_records" in options)
    assert ("The most exposed members of other" in text) == ("show_real_images" in options)
    assert "The most exposed members, by the primary attack" in text


def test_only_the_shadows_as_targets(tmp_path):
    whole = dataclasses.replace(data(), targets={}, members=None)
    text = audit_signals(whole, Choices(attacks=("lira",), targets="shadows")).write(tmp_path).read_text()
    assert "Every shadow as a target" in text
    assert "<img" not in text


def test_attacks_that_no_shadow_was_left_out_for_are_named(page, tmp_path):
    """Two shadows on a side of every example: without one of them there is no variance of each example."""
    words = "no shadow was attacked from the others"
    assert words not in page[2]
    whole = data()
    shadows = whole.shadows["shadows"]
    few = dataclasses.replace(shadows, keep=shadows.keep[:4], signals={"phi": shadows.signals["phi"][:, :, :4]})
    keep = torch.tensor([True, False])[(torch.arange(4)[:, None] + torch.arange(COUNT)) % 2]
    whole = dataclasses.replace(
        whole,
        shadows={"<few>": dataclasses.replace(few, keep=keep)},
        targets={"t": dataclasses.replace(whole.targets["target"], shadows="<few>")},
    )
    report = audit_signals(whole, Choices(attacks=("lira_per_example", "loss")))
    why = report.setting["leave_one_out_skipped"]["<few>"]["lira_per_example"]
    text = report.write(tmp_path).read_text()
    assert words in text
    for cell in ("&lt;few&gt;", "LiRA online, per example variance", html.escape(why)):
        assert f">{cell}</td>" in text, cell


def test_silent_control_is_said_first():
    whole, nothing = data(), data(1, 0.0).targets["target"].signals["phi"]
    control = TargetSignals({"phi": nothing}, control=True)
    result = audit_signals(
        dataclasses.replace(whole, targets={**whole.targets, "control": control}), Choices(attacks=("lira", "loss"))
    ).to_dict()
    assert "was not found, so this audit has no power" in audit_tables.verdict(result)
    assert any("this audit has no power" in line for line in audit_tables.caveats(result))
    assert audit_tables.names(result)[-1] == "control"


def test_ppv_without_enough_false_positives_is_an_interval(page):
    result = page[0].to_dict()
    for row in audit_tables.operating_points(result, "<b>t<b>")[1:]:
        false_positives = int(re.search(r"\((\d+)\)", row[2])[1])
        assert (" [" in row[4]) == (false_positives >= 10)
        assert "[" in row[4]


@pytest.mark.parametrize("scores", [np.zeros(40), np.r_[np.full(20, np.inf), np.zeros(20)], np.linspace(-1, 1, 40)])
def test_histogram_of_any_scores(scores):
    image = Image.open(io.BytesIO(audit_plots.histogram(scores, np.arange(40) % 2 == 0, "score")))
    assert image.size[0] > 500
