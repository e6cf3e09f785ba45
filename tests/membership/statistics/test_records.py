"""The risk of each record: an oracle of all rearrangements, null data, a planted record, and the table of an audit."""

import csv
import io
import itertools
import json

import numpy as np
import pytest
import torch
from audit_cases import data, simulated

from kr_fast.membership import Choices, audit_signals, from_logits, load_npz, record_risk, save_npz
from kr_fast.membership.audit.record_table import COLUMNS, OTHERS
from kr_fast.membership.statistics.intervals import benjamini_hochberg, holm, holm_of_array
from kr_fast.membership.statistics.records import by_label, least_advantage, summary
from kr_fast.runtime.errors import UserError


def halves(models, count, generator):
    return torch.rand(models, count, generator=generator).argsort(0).argsort(0) < models // 2


def test_p_is_the_share_of_all_rearrangements():
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(9, 40, generator=generator).mul(2).round().div(2)  # with ties
    keep = torch.rand(9, 40, generator=generator) < 0.5  # 4 to 5 and 5 to 4 are tested, other splits are not
    risk = record_risk(scores, keep)
    assert risk.tested.tolist() == [int(held) in (4, 5) for held in keep.sum(0)]
    for n in risk.tested.nonzero()[0][:12]:
        x, held = scores[:, n].double().numpy(), keep[:, n].numpy()

        def pairs(inside, x=x):
            """Pairs above, by the definition; ties count against a finding."""
            outside = [i for i in range(9) if i not in inside]
            return [float(x[i]) - float(x[j]) for i in inside for j in outside]

        own = pairs(held.nonzero()[0].tolist())
        assert risk.advantage[n] == pytest.approx((sum(v > 0 for v in own) - sum(v < 0 for v in own)) / len(own))
        # Without ties U has one distribution, which is that of nine different numbers.
        distinct = np.arange(9.0)
        ways = [
            sum(v > 0 for v in pairs(chosen, distinct)) for chosen in itertools.combinations(range(9), int(held.sum()))
        ]
        assert risk.p[n] == pytest.approx(np.mean([u >= sum(v > 0 for v in own) for u in ways]), rel=1e-12)
        assert risk.interval[n, 0] <= risk.advantage[n] <= risk.interval[n, 1]


def test_p_of_many_shadows_is_close_to_the_exact_one():
    """130 x 130 pairs take the normal curve: against scipy's exact distribution, far into the tail."""
    from scipy.stats import mannwhitneyu

    generator = torch.Generator().manual_seed(1)
    keep = halves(260, 8, generator)
    scores = torch.randn(260, 8, generator=generator, dtype=torch.float64) + keep * torch.linspace(0, 0.6, 8)
    risk = record_risk(scores, keep)
    for n in range(8):
        exact = mannwhitneyu(scores[keep[:, n], n], scores[~keep[:, n], n], alternative="greater", method="exact")
        assert risk.p[n] == pytest.approx(exact.pvalue, rel=0.1 if exact.pvalue > 1e-5 else 0.4)


def test_corrections_for_several():
    assert benjamini_hochberg(np.array([0.01, np.nan, 0.04, 0.03, 0.5])) == pytest.approx(
        [0.04, np.nan, 0.16 / 3, 0.16 / 3, 0.5], nan_ok=True
    )
    p = [0.03, None, 0.01, 0.6]
    assert [None if np.isnan(v) else v for v in holm_of_array(np.array(p, dtype=float))] == holm(p)
    assert benjamini_hochberg(np.array([])).tolist() == []


def test_null_data_finds_nothing_and_a_planted_record_is_found():
    """1,000 audits without leakage: any record found in at most 10 % + 2 %. One record of 1,000 shifted by 3 sigma."""
    generator = torch.Generator().manual_seed(2)
    keep = halves(16, 50_000, generator)
    p = record_risk(torch.randn(16, 50_000, generator=generator), keep).p.reshape(1000, 50)
    assert sum(bool((benjamini_hochberg(row) <= 0.1).any()) for row in p) <= 120
    keep = halves(64, 40_000, generator)
    scores = torch.randn(64, 40_000, generator=generator)
    scores[:, ::1000] += 3 * keep[:, ::1000]
    p = record_risk(scores, keep).p.reshape(40, 1000)
    assert sum(benjamini_hochberg(row)[0] <= 0.1 for row in p) >= 38


def test_the_smallest_effect_is_what_simulation_finds():
    from scipy.special import ndtri

    advantage = least_advantage(32, 32, 1000, rate=0.1, power=0.8)
    generator = torch.Generator().manual_seed(3)
    keep = halves(64, 4000, generator)
    shift = float(ndtri((advantage + 1) / 2)) * 2**0.5
    risk = record_risk(torch.randn(64, 4000, generator=generator) + shift * keep, keep)
    assert (risk.p <= 0.1 / 1000).mean() == pytest.approx(0.8, abs=0.04)
    # Of 8 models the surest record has p = 1 / 70: among 8 records it cannot be found at 10 %, alone among 6 it can.
    assert least_advantage(4, 4, 8) is None
    assert least_advantage(4, 4, 6) is not None


def test_by_label_takes_clusters_whole():
    generator = torch.Generator().manual_seed(4)
    keep = halves(16, 200, generator)
    scores = torch.randn(16, 200, generator=generator) + 2.5 * keep * (torch.arange(200) % 2)
    risk, labels = record_risk(scores, keep), np.arange(200) % 2
    even, odd = by_label(risk, labels)
    assert (even["label"], odd["label"], even["records"]) == ("0", "1", 100)
    assert odd["mean_advantage"] == pytest.approx(risk.advantage[1::2].mean())
    assert odd["interval"][0] > even["interval"][1]
    assert odd["found"] == int(risk.found()[1::2].sum()) > even["found"]
    # Records of a cluster that are equal are as one record.
    twice = by_label(
        record_risk(scores.repeat(1, 4), keep.repeat(1, 4)), np.tile(labels, 4), np.tile(np.arange(200), 4)
    )
    for wide, narrow in zip(twice, (even, odd), strict=True):
        size = narrow["interval"][1] - narrow["interval"][0]
        assert wide["interval"][1] - wide["interval"][0] == pytest.approx(size, rel=0.2)
    single = by_label(risk, labels, labels)
    assert [row["interval"] for row in single] == [None, None]


def test_the_table_of_an_audit(tmp_path):
    whole = data(effect=3.0)
    groups = [f"patient {n // 3}" for n in range(600)]
    groups[500:] = ["site b"] * 100
    labels = torch.arange(600) % 4
    labels[:2] = 9  # a class of two records, whose figures would be theirs
    report = audit_signals(data(effect=3.0, groups=groups, labels=labels), Choices(attacks=("lira",)))
    table = report.records["shadows"]
    phi, _, keep, _ = simulated(effect=3.0)
    expected = record_risk(phi[0].T, keep)
    assert np.array_equal(table.risk.p, expected.p, equal_nan=True)
    rows = table.rows()
    assert tuple(rows[0]) == COLUMNS
    assert rows[0]["p"] == float(np.nanmin(expected.p))
    assert rows[0]["score"] == float(report.scores["target"]["lira"][rows[0]["index"]])
    figures = report.to_dict()["records"]["shadows"]
    assert figures["found"] == int(expected.found().sum()) > 0
    assert figures["tested"] + figures["untested"] == 600
    assert [row["label"] for row in figures["groups"]["rows"]] == [OTHERS, "site b"]
    assert figures["groups"]["count"] == 168
    assert [row["label"] for row in figures["classes"]["rows"]] == ["0", "1", "2", "3", OTHERS]
    page = report.write(tmp_path).read_text()
    assert f"{figures['found']:,} of {figures['tested']:,} records are found" in page
    assert "patient 3" not in page
    written = list(csv.DictReader(io.StringIO((tmp_path / "private" / "records.csv").read_text())))
    assert [row["index"] for row in written] == [str(row["index"]) for row in rows]
    assert written[-1]["group"].startswith(("patient", "site"))
    assert "patient" not in json.dumps(figures)
    assert audit_signals(whole, Choices(attacks=("lira",))).to_dict()["records"]["shadows"]["groups"] is None


def test_too_few_shadows_are_counted_and_said(tmp_path):
    generator = torch.Generator().manual_seed(5)
    logits, keep = torch.randn(6, 20, 3, generator=generator), halves(6, 20, generator)
    labels = torch.arange(20) % 3
    report = audit_signals(from_logits(logits, keep, labels), Choices(targets="shadows", attacks=("lira",)))
    figures = report.to_dict()["records"]["shadows"]
    assert (figures["tested"], figures["untested"], figures["largest_advantage"]) == (0, 20, None)
    assert "None of 20 records has the 4 shadows on each side" in report.write(tmp_path).read_text()
    assert (
        summary(record_risk(torch.randn(8, 20, generator=generator), halves(8, 20, generator)))["least_advantage"]
        is None
    )


def test_groups_are_kept_in_a_file_and_checked(tmp_path):
    whole = data(groups=np.arange(600) // 6)
    save_npz(tmp_path / "signals.npz", whole)
    assert np.array_equal(load_npz(tmp_path / "signals.npz").groups, whole.groups)
    for groups in (["a"] * 599, [1.5] * 600, [["a", "b"]] * 600, ["a", 1] * 300):
        with pytest.raises(UserError, match=r"^audit: groups must be texts or integers \[600\], got "):
            data(groups=np.array(groups, dtype=object) if len(groups) == 600 and groups[1] == 1 else groups)
