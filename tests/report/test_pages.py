"""The pages as a browser shows them, and each number that a reader sees first against the JSON."""

import dataclasses
import html
import io
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from audit_cases import COUNT, data
from PIL import Image
from report_cases import attack, summary, whole_audit

from kr_fast import report
from kr_fast.membership import Choices, TargetSignals, audit_signals
from kr_fast.report import audit_document, document, render
from kr_fast.report.sections import reading, verdict
from kr_fast.report.sections.cards import of_audit
from kr_fast.report.sentences import OF_RUN

NAME = "<b id=outside>\"&'"  # of a class, a group, a target and a data set
LIKE_AN_INTERVAL = f"[{60 * 'x'}, {60 * '9'} %] {60 * '9'} % p = {60 * '9'} {60 * '9'}e-9"  # but as wide as a window
VERDICT = {
    "decision": "do not share",
    "reasons": [
        "LiRA online tells members from non-members on the Student: 0.570 [0.540, 0.600], above 0.55.",
        "3 of 1,000 single records are found by models made as the Student was.",
    ],
    "chance": 0.05,
    "rules": [
        {
            "path": "student_full.auc_high",
            "limit": 0.55,
            "value": 0.6,
            "passed": False,
            "source": "default",
            "words": "The upper end of the interval of the AUC of the Student is at most 0.55",
        }
    ],
}


def risk(found):
    """As of an audit's records."""
    row = {"rate": 0.1, "power": 0.8, "records": 1000, "tested": 1000, "untested": 0, "found": found, "found_holm": 1}
    row |= {"largest_advantage": 0.97, "shadows": [8, 8], "least_advantage": None, "groups": None}
    label = {"label": NAME, "records": 500, "tested": 500, "found": found, "mean_advantage": 0.012}
    return row | {"classes": {"rows": [label | {"interval": [-0.02, 0.044], "largest": 0.97}]}}


def run_summary():
    """A run with everything that its page can hold, names from outside in it."""
    audit = whole_audit()
    audit["records"] = {"teacher": risk(176), "student_full": risk(3)}
    sides = {side: {"auc": 0.493, "interval": [0.45, 0.536], "passed": True} for side in ("members", "non_members")}
    blind = {"auc": 0.512, "interval": [0.47, 0.554], "passed": True}
    audit["setting"]["negative_controls"] = {"blind": blind, "targets": {"teacher": sides, "student_full": sides}}
    values = summary(audit=audit, verdict=VERDICT, title=f"Knowledge Recycling on {NAME}")
    values["dataset"] |= {"name": f"{NAME} {LIKE_AN_INTERVAL}", "class_names": [NAME, "$\\frac{$"]}
    return values


def audit_values():
    """An audit by the command line: two targets, groups with names from outside."""
    whole = data()
    phi = data(1, 0.0).targets["target"].signals["phi"]
    other = TargetSignals({"phi": phi}, kind="transfer", title="the Student")
    groups = np.where(np.arange(COUNT) % 2, NAME, "other")
    targets = {NAME: dataclasses.replace(whole.targets["target"], accuracy=0.75), "student_full": other}
    whole = dataclasses.replace(whole, targets=targets, labels=torch.arange(COUNT) % 3, groups=groups)
    values = audit_signals(whole, Choices(attacks=("lira", "loss"), targets="shadows")).to_dict()
    details = {"command": "kr-fast audit", "versions": {"torch": "2"}, "config": {"data": 20 * NAME}}
    return values | {"exposed": {}, "show_records": False, "show_real_images": False, "details": details}


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """Name -> (text of the page, values of the JSON). The figures are blank: those of others are tested elsewhere."""
    out = tmp_path_factory.mktemp("pages")
    blank = io.BytesIO()
    Image.new("RGB", (946, 528), "white").save(blank, "PNG")
    figure = (blank.getvalue(), f"of {NAME}")
    run, audit = run_summary(), audit_values()
    names = [*(f"{kind} {name}" for kind in ("roc", "scores") for name in (NAME, "student_full")), "intervals"]
    path = document.write_html(out, run, dict.fromkeys(("images", "roc", "curves", "stages"), figure))
    blocks = audit_document.blocks(audit, dict.fromkeys(names, (*figure, blank.getvalue())))
    other = render.write_html(out / "audit.html", f"Membership audit on {NAME}", blocks, dict.fromkeys(names, figure))
    return {"run": (path.read_text(), report.metrics(run)), "audit": (other.read_text(), audit)}


SIZES = {"narrow": (400, 800), "wide": (1280, 720)}
# What a page says of itself to the page around it: sent as text, since the frame is of another origin.
MEASURE = """<script>
const all = selector => [...document.querySelectorAll(selector)];
const box = selector => document.querySelector(selector).getBoundingClientRect();
const rows = node => new Set([...node.getClientRects()].map(each => Math.round(each.top))).size;
const shown = document.body.cloneNode(true);
shown.querySelectorAll("script, style, pre").forEach(each => each.remove());
const texts = [], walk = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
while (walk.nextNode()) texts.push(walk.currentNode);
const folded = all("details > .inside").map(each => each.checkVisibility({contentVisibilityAuto: true}));
all("details").forEach(each => each.open = true);  // whatever follows holds with all of them open
parent.postMessage({
  name: NAME,
  result: {
    width: [document.documentElement.scrollWidth, document.documentElement.clientWidth, innerWidth],
    verdict: [box(".verdict").bottom, innerHeight],
    cards: all(".card").map(each => Math.round(each.getBoundingClientRect().top)),
    broken: all(".unbroken").filter(each => rows(each) > 1).map(each => each.textContent),
    loose: texts.filter(each => /\\[[-\\d.]+, [-\\d.]+\\]|\\d %|\\de-\\d/.test(each.data.replaceAll("9".repeat(60), ""))
      && !each.parentNode.closest(".unbroken, pre")).map(each => each.data),
    images: all("img").map(each => [each.alt, each.naturalWidth]),
    outside: all("[src], [href], [srcset], link, iframe, object, embed").filter(each =>
      !(each.src || each.srcset || each.href || "").startsWith("data:image/png;base64,")).map(each => each.outerHTML),
    scripts: document.scripts.length - 1,
    tags: all("#outside").length,
    folded,
    background: getComputedStyle(document.body).backgroundColor,
    text: shown.textContent,
  }
}, "*");
</script>"""
AROUND = """<!doctype html><pre id="results"></pre><script>
const results = {};
addEventListener("message", event => {
  results[event.data.name] = event.data.result;
  document.getElementById("results").textContent = JSON.stringify(results);
});
</script>"""


@pytest.fixture(scope="module")
def shown(pages, tmp_path_factory):
    """Page and size -> what the browser measured; one start of it for all. "print" and "dark" take those rules."""
    names = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
    browser = next(filter(None, map(shutil.which, names)), None)
    if browser is None:
        pytest.skip(f"no browser: none of {', '.join(names)} is on PATH")
    out, frames = tmp_path_factory.mktemp("shown"), []
    for name, (text, _) in pages.items():
        rules = {"print": "@media print", "dark": "@media (prefers-color-scheme: dark)"}
        copies = dict.fromkeys(SIZES, text) | {kind: text.replace(rule, "@media all") for kind, rule in rules.items()}
        for size, copy in copies.items():
            assert copy == text or size in rules
            width, height = SIZES.get(size, (794, 1123))  # A4 at 96 dots an inch
            copy = re.sub("<meta http-equiv.*?>", "", copy)  # which lets no script run
            copy = copy.replace("</body>", MEASURE.replace("NAME", json.dumps(f"{name} {size}")) + "</body>")
            frames.append(
                f'<iframe width="{width}" height="{height}" frameborder="0" srcdoc="{html.escape(copy)}"></iframe>'
            )
    (out / "around.html").write_text("\n".join([AROUND, *frames]))
    command = [browser, "--headless=new", "--no-sandbox", "--disable-gpu", f"--user-data-dir={out / 'profile'}"]
    command += ["--window-size=1600,1200", "--virtual-time-budget=5000", "--dump-dom", f"file://{out / 'around.html'}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    results = re.search('<pre id="results">(.*?)</pre>', done.stdout, re.DOTALL)
    assert results, done.stderr[-2000:]
    measured = json.loads(html.unescape(results[1]))
    assert len(measured) == len(frames)
    return measured


@pytest.mark.parametrize("name", ["run", "audit"])
def test_no_page_is_wider_than_its_window(shown, name):
    for size in (*SIZES, "print", "dark"):
        width, inside, _ = shown[f"{name} {size}"]["width"]
        assert width <= inside, size
    assert [shown[f"{name} {size}"]["width"][2] for size in SIZES] == [400, 1280]


def test_the_verdict_lies_above_the_fold(shown):
    for size in SIZES:
        bottom, height = shown[f"run {size}"]["verdict"]
        assert bottom <= height
    tops = {size: sorted(set(shown[f"run {size}"]["cards"])) for size in SIZES}
    assert len(tops["wide"]) == 1  # four beside each other
    assert len(tops["narrow"]) == 2


@pytest.mark.parametrize("name", ["run", "audit"])
def test_no_interval_is_broken_over_lines(shown, name):
    for size in (*SIZES, "print"):
        assert shown[f"{name} {size}"]["broken"] == []
        assert shown[f"{name} {size}"]["loose"] == []


@pytest.mark.parametrize("name", ["run", "audit"])
def test_a_page_loads_nothing_and_runs_nothing(shown, pages, name):
    page = shown[f"{name} narrow"]
    assert page["scripts"] == 0
    assert page["outside"] == []
    assert page["images"]
    assert all(text and width == 946 for text, width in page["images"])
    assert not re.search(r"https?:|url\(|@import", pages[name][0])
    assert "default-src 'none'; img-src data:;" in pages[name][0]


@pytest.mark.parametrize("name", ["run", "audit"])
def test_names_from_outside_are_text(shown, name):
    page = shown[f"{name} wide"]
    assert page["tags"] == 0
    assert NAME in page["text"]


@pytest.mark.parametrize("name", ["run", "audit"])
def test_keys_of_targets_stay_in_the_json(shown, pages, name):
    assert "student_full" in json.dumps(pages[name][1])
    assert not re.search(r"student_full|\bgkd\b", shown[f"{name} wide"]["text"])
    assert "Student" in shown[f"{name} wide"]["text"]


@pytest.mark.parametrize("name", ["run", "audit"])
def test_details_are_folded_and_open_in_print(shown, name):
    assert len(shown[f"{name} wide"]["folded"]) >= 6
    assert not any(shown[f"{name} wide"]["folded"])
    assert all(shown[f"{name} print"]["folded"])
    assert shown[f"{name} dark"]["background"] != shown[f"{name} wide"]["background"]


class Sections(HTMLParser):
    """The text of each section of a page, by its class."""

    def __init__(self, text):
        super().__init__()
        self.inside, self.texts = False, []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        if tag == "section":
            self.inside = True
            self.texts.append([dict(attributes)["class"].split()[0], ""])

    def handle_endtag(self, tag):
        self.handle_data(" ")
        self.inside = self.inside and tag != "section"

    def handle_data(self, text):
        if self.inside:
            self.texts[-1][1] += text

    def of(self, name):
        return [" ".join(text.split()) for kind, text in self.texts if kind == name]


def at(values, path):
    for key in path:
        values = values[key]
    return values


NUMBER = re.compile(r"-?\d+(?:,\d{3})*(?:\.\d+)?(?: %)?")


@pytest.mark.parametrize("name", ["run", "audit"])
def test_each_number_of_a_card_is_that_of_a_key_in_the_json(pages, name):
    text, values = pages[name]
    if name == "run":
        blocks = document.blocks(run_summary(), {})
    else:
        blocks = audit_document.blocks(values, {})
    (cards,) = (content for kind, content in blocks if kind == "cards")
    written = Sections(text).of("card")
    assert len(written) == len(cards) == 4
    for shown, card in zip(written, cards, strict=True):
        cited = []
        for number, path in card.cited:
            value = at(values, path)
            # As a count, as a share of 1 in percent, or to three digits: nothing else is written there.
            assert number in (f"{value:,}", f"{100 * value:.2f} %", f"{value:.3f}"), path
            cited += NUMBER.findall(number)
        assert set(NUMBER.findall(shown)) == set(cited)
    assert sum(len(card.cited) for card in cards) >= 10


def test_the_cards_are_of_the_student(pages):
    _, values = pages["run"]
    accuracy, leakage, records, controls = Sections(pages["run"][0]).of("card")
    auc = values["audit"]["student_full"]["lira"]["auc"]
    assert accuracy.startswith("Accuracy of the Student 95.00 % Student, on 500 test images.")
    assert "The Teacher, which saw the real images: 97.00 %" in accuracy
    assert leakage.startswith(f"Leakage (AUC) {auc:.3f} [0.540, 0.600]")
    assert records.startswith("Records found 3 Of 1,000, by models made as the Student was")
    assert "So few models cannot find one record alone" in records.replace("so few", "So few")
    assert "Made as the Teacher was: 176 of 1,000" in records
    assert controls.startswith("Controls passed An overfitted model is found (AUC 0.800 [0.780, 0.820]).")


def test_the_cards_of_an_audit_are_of_the_target_that_the_verdict_is_about():
    audit = run_summary()["audit"] | {"details": {}, "show_real_images": False, "show_records": False}
    for decided, expected in ((None, "teacher"), (VERDICT, "student_full")):
        _, leakage, *_ = of_audit(audit, None, decided)[1]
        assert leakage.value == f"{audit[expected]['lira']['auc']:.3f}"
    assert audit["teacher"]["lira"]["auc"] != audit["student_full"]["lira"]["auc"]


def test_the_verdict_is_that_of_the_json(pages):
    (words,) = Sections(pages["audit"][0]).of("verdict")
    assert words.startswith(f"Verdict {pages['audit'][1]['verdict']['decision'].capitalize()} ")
    (words,) = Sections(pages["run"][0]).of("verdict")
    assert pages["run"][1]["verdict"] == VERDICT
    reasons = " ".join(VERDICT["reasons"])
    assert words == f"Verdict Do not share {reasons} {verdict.scope(VERDICT)}"
    assert f"in at most {100 * VERDICT['chance']:g} % of audits" in words
    assert VERDICT["rules"][0]["words"] in pages["run"][0]


def test_without_a_verdict_the_page_begins_with_the_sentences(pages):
    """A file of an older version: the result in one paragraph, as it was."""
    older = {key: value for key, value in pages["audit"][1].items() if key != "verdict"}
    blocks = [block for block in audit_document.blocks(older, {}) if block[0] == "verdict"]
    (words,) = Sections(render.fragment(blocks)).of("verdict")
    assert "Verdict" not in words
    assert words.startswith("On average over 12 models")


@pytest.mark.parametrize(
    ("change", "state", "words"),
    [
        ({"control": None}, "unknown", "No overfitted model was attacked"),
        ({"control": {"name": "control", "found": False, "by": [], "by_primary": False}}, "bad", "no power here"),
        ({"control": {"name": "control", "found": True, "by": ["loss"], "by_primary": False}}, "unknown", "but not by"),
    ],
)
def test_controls_that_do_not_prove_power_are_told(change, state, words):
    values = run_summary()
    values["audit"]["setting"] |= change
    *_, leakage, _, card = next(content for kind, content in document.blocks(values, {}) if kind == "cards")
    assert (card.state, leakage.state) == (state, "bad")
    assert words in card.lines[0]
    values["audit"]["setting"]["negative_controls"]["blind"]["passed"] = False
    card = next(content for kind, content in document.blocks(values, {}) if kind == "cards")[3]
    assert card.state == "bad"
    assert "members against the others by the images alone" in card.lines[1]


def test_the_chart_holds_each_auc_beside_chance():
    """Of models the mean first; what has to be found is good news; places are percent of the axis from 0.4 to 1."""
    audit = run_summary()["audit"]
    audit["canaries"] = {"power": True, "teacher": attack(0.9, 0.85, 0.94)}
    audit["generator"] = attack(0.51, 0.48, 0.54)
    (chart,) = (content for kind, content in reading.blocks(audit, OF_RUN) if kind == "chart")
    assert [(row.label, row.text, row.state) for row in chart.rows] == [
        ("Teacher", "0.580 [0.565, 0.595]", "bad"),
        ("Teacher", "0.600 [0.570, 0.630]", "bad"),
        ("Student with shadows of the Teacher's training (transfer)", "0.510 [0.480, 0.540]", "plain"),
        ("Student", "0.520 [0.505, 0.535]", "bad"),
        ("Student", "0.570 [0.540, 0.600]", "bad"),
        ("Released images", "0.530 [0.490, 0.570]", "plain"),  # corrected, as of an exploratory attack
        ("Positive control", "0.800 [0.780, 0.820]", "good"),
        ("Mislabelled canaries", "0.900 [0.850, 0.940]", "good"),
        ("Generator's weights", "0.510 [0.480, 0.540]", "plain"),
    ]
    assert chart.rows[1].track == pytest.approx((28.33, 33.33, 38.33, 16.67))


def test_what_the_limits_allow_is_no_alarm():
    """An AUC above chance and records that are found, where the verdict is to share; a gap that is not allowed is."""
    values = run_summary()
    for decision, states in (("do not share", {"bad"}), ("share", {"unknown"})):
        values["verdict"] = {**VERDICT, "decision": decision}
        _, leakage, records, _ = next(content for kind, content in document.blocks(values, {}) if kind == "cards")
        assert {leakage.state, records.state} == states
    for passed, state in ((True, "plain"), (False, "bad")):
        values["verdict"] = {**VERDICT, "rules": [{**VERDICT["rules"][0], "path": "accuracy_gap", "passed": passed}]}
        accuracy = next(content for kind, content in document.blocks(values, {}) if kind == "cards")[0]
        assert accuracy.state == state


def test_text_can_be_read_on_every_ground():
    """A contrast of 4.5 at least (WCAG 2.2, 1.4.3), in both themes, of each text colour on each ground."""
    style = (Path(render.__file__).parent / "templates" / "style.css").read_text()
    themes = re.findall(r":root \{(.*?)\}", style, re.DOTALL)
    assert len(themes) == 2
    for theme in themes:
        colours = dict(re.findall(r"--([\w-]+): (#\w{6})", theme))
        for ground in ("page", "surface", "good-tint", "bad-tint", "unknown-tint"):
            for ink in ("text", "quiet"):
                assert contrast(colours[ink], colours[ground]) >= 4.5, (ink, ground)
        for state in ("good", "bad", "unknown"):
            assert contrast(colours[state], colours[f"{state}-tint"]) >= 4.5, state


def contrast(first, second):
    light = []
    for colour in (first, second):
        parts = (int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5))
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        light.append(0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2] + 0.05)
    return max(light) / min(light)
