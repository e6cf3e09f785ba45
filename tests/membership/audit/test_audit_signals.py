"""The audit of given signals and logits: no model is asked. Numbers against the functions that the audit is made of."""

import dataclasses
import json

import pytest
import torch
from audit_cases import CLASSES, COUNT, MODELS, averages, data, left_out, logits_of, simulated

from kr_fast.membership import (
    AuditData,
    Choices,
    ShadowSignals,
    TargetSignals,
    across_targets,
    attack_p,
    audit_signals,
    base,
    delong_test,
    epsilon_clopper_pearson,
    epsilon_one_run,
    from_logits,
    lira,
    lira_carlini2021,
    nearest_synthetic,
    operating_point,
    rmia_attack,
    roc,
    shadow_threshold,
    threshold_per_class,
)
from kr_fast.membership.attacks.catalog import CATALOG, Subject, impute_held
from kr_fast.membership.statistics.intervals import holm


def test_figures_are_those_of_the_functions():
    whole = data()
    shadows, phi = whole.shadows["shadows"], whole.shadows["shadows"].signals["phi"]
    report = audit_signals(whole, Choices(attacks=("lira", "base", "loss"), random_members=True, delta=1e-4))
    own = whole.targets["target"].signals["phi"][:, :, None]
    given = {"phi": phi, "keep": shadows.keep}
    lone = {"partner": left_out(shadows), **given}
    expected = {
        "lira": (lira(**given, variance="fixed", target=own)[0], lira(**lone, variance="fixed")),
        "base": (base(**given, target=own)[0], base(**lone)),
        "loss": (own[0, :, 0].double(), phi[0].T.double()),
    }
    for attack, (scores, lone) in expected.items():
        curve, row = roc(scores, whole.members), report.figures["target"][attack]
        assert torch.equal(report.scores["target"][attack], scores)
        assert row["auc"] == curve.auc
        assert row["auc_ci"] == list(curve.auc_interval(0.95))
        assert row["advantage"] == curve.advantage
        # The primary attack has the whole error, the two others half of it each.
        level = 0.95 if attack == "lira" else 0.975
        assert row["role"] == ("primary" if attack == "lira" else "exploratory")
        assert row["auc_ci_corrected"] == list(curve.auc_interval(level))
        bound = epsilon_clopper_pearson(scores, whole.members, delta=1e-4, level=level)
        assert row["epsilon"]["clopper_pearson"] == bound
        assert row["epsilon"]["one_run"] == epsilon_one_run(scores, whole.members, delta=1e-4, level=level)
        for fpr in (0.1, 0.01):
            threshold = shadow_threshold(lone, shadows.keep, fpr)
            assert row["operating_points"][str(fpr)] == operating_point(curve, threshold)
    assert report.figures["target"]["lira"]["auc"] > report.figures["target"]["loss"]["auc"] > 0.5


def test_rmia_and_class_thresholds_are_those_of_the_functions():
    whole = data()
    generator = torch.Generator().manual_seed(5)
    labels = torch.randint(0, CLASSES, (COUNT,), generator=generator)
    z = torch.randn(1, 200, MODELS + 1, generator=generator)
    shadows = dataclasses.replace(whole.shadows["shadows"], population=z[:, :, :MODELS])
    target = dataclasses.replace(whole.targets["target"], population=z[:, :, MODELS])
    whole = dataclasses.replace(whole, shadows={"shadows": shadows}, targets={"target": target}, labels=labels)
    report = audit_signals(whole, Choices(attacks=("rmia", "rmia_offline", "confidence"), targets="shadows"))
    phi, own = shadows.signals["phi"], target.signals["phi"][:, :, None]
    outside = {"target": own, "target_population": target.population[:, :, None]}
    expected = rmia_attack(phi, shadows.keep, shadows.population, **outside)[0]
    assert torch.equal(report.scores["target"]["rmia"], expected)
    expected = rmia_attack(phi, shadows.keep, shadows.population, offline_a=0.33, **outside)[0]
    assert torch.equal(report.scores["target"]["rmia_offline"], expected)
    expected = threshold_per_class(phi, shadows.keep, labels, target=own)[0]
    assert torch.equal(report.scores["target"]["confidence"], expected)
    lone = threshold_per_class(phi, shadows.keep, labels)
    assert averages(report.leave_one_out["shadows"]["confidence"]) == across_targets(lone, shadows.keep)


def test_wrappers_are_their_functions():
    """Options and signs of the thin entries of the catalogue."""
    z = torch.randn(1, 50, MODELS + 1, generator=torch.Generator().manual_seed(5))
    whole, labels = data(), torch.arange(COUNT) % CLASSES
    phi, own = whole.shadows["shadows"].signals["phi"], whole.targets["target"].signals["phi"]
    extra = {"entropy": -phi, "modified_entropy": -2 * phi}
    seen = {"entropy": -own, "modified_entropy": -2 * own}
    shadows = dataclasses.replace(whole.shadows["shadows"], signals={"phi": phi, **extra}, population=z[:, :, :MODELS])
    target = TargetSignals({"phi": own, **seen}, z[:, :, MODELS])
    whole, keep = dataclasses.replace(whole, labels=labels), shadows.keep
    outside = {"target": own[:, :, None]}
    expected = {"attack_p": attack_p(own[:, :, None], z[:, :, MODELS:])}
    for name, value in (("entropy", phi), ("modified_entropy", 2 * phi)):  # members have low entropies
        expected[name] = threshold_per_class(value, keep, labels, target=-seen[name][:, :, None])
    for variant, lira_name, base_name in (("online", "lira", "base"), ("offline", "lira_offline", "base_offline")):
        expected[base_name] = base(phi, keep, variant=variant, **outside)
        for variance in ("per_example", "fixed", "fixed_raw", "shrinkage"):
            expected[f"{lira_name}_{variance}"] = lira(phi, keep, variant=variant, variance=variance, **outside)
        for end, fixed in (("", False), ("_fixed", True)):
            scores = lira_carlini2021(phi, keep, variant=variant, fix_variance=fixed, **outside)
            expected[f"lira_carlini2021_{variant}{end}"] = scores
    for name, scores in expected.items():
        assert torch.equal(CATALOG[name].run(Subject(whole, shadows, target)), scores), name


@pytest.mark.parametrize(("side", "step"), [(64, 1), (65, 2)])  # 4,096 values; 4,225, and of 1,025 images 513
def test_wide_images_meet_some_of_the_further_non_members(side, step):
    draw = torch.Generator().manual_seed(6)
    shape = (side, side, 1)
    reference, own, made = (
        torch.randint(0, 256, (count, *shape), generator=draw, dtype=torch.uint8) for count in (1025, COUNT, 3)
    )
    whole = dataclasses.replace(data(), images=own, reference=reference, synthetic={"made": made})
    expected = nearest_synthetic(own, made, reference=reference[::step])
    assert torch.equal(CATALOG["nearest_synthetic"].run(Subject(whole, synthetic=made)), expected)


def test_leave_one_out_says_what_it_left_out(tmp_path):
    whole = dataclasses.replace(data(), targets={}, members=None)
    report = audit_signals(whole, Choices(attacks=("lira_carlini2021_online",), targets="shadows"))
    shadows = whole.shadows["shadows"]
    expected = across_targets(lira_carlini2021(shadows.signals["phi"], shadows.keep), shadows.keep)
    assert {name: averages(row) for name, row in report.leave_one_out["shadows"].items()} == {
        "lira_carlini2021_online": expected
    }
    assert report.write(tmp_path).exists()
    given = audit_signals(data(), Choices(attacks=("lira_carlini2021_online",)))
    assert given.figures["target"]["lira_carlini2021_online"]["operating_points"] is None
    z = shadows.signals["phi"][:, :50]
    inside = dataclasses.replace(shadows, population=z, population_keep=shadows.keep[:, :50])
    whole = dataclasses.replace(whole, shadows={"shadows": inside})
    why = "the shadows were trained on some of the population"
    with pytest.raises(ValueError, match=f"attacks must give at least one figure, got rmia: {why}"):
        audit_signals(whole, Choices(attacks=("rmia",), targets="shadows"))
    report = audit_signals(whole, Choices(attacks=("rmia", "loss"), targets="shadows"))
    assert report.setting["leave_one_out_skipped"] == {"shadows": {"rmia": why}}


def test_tprs_of_few_false_positives_are_no_mean():
    """400 non-members carry 10 % (40 false positives) and not 1 % (4)."""
    keep = torch.arange(800).expand(3, -1) % 2 == 0
    scores = torch.randn(3, 800, generator=torch.Generator().manual_seed(1)).double()
    result = across_targets(scores, keep)["tpr_at_fpr"]
    assert result["0.01"] == {"mean": None, "sd": None, "each": [None] * 3, "interval": None}
    assert result["0.1"]["each"] == [roc(row, held).tpr_at(0.1)["tpr"] for row, held in zip(scores, keep, strict=True)]


def test_shadows_left_out_are_targets_outside():
    """A shadow among its own shadows scores as one that was taken out of them."""
    whole, z = data(labels=torch.arange(COUNT) % CLASSES), torch.randn(1, 50, MODELS)
    shadows = dataclasses.replace(whole.shadows["shadows"], population=z)
    phi = shadows.signals["phi"]
    for name in ("rmia", "rmia_offline", "attack_r", "base", "lira_shrinkage", "loss", "confidence"):
        every = CATALOG[name].run(Subject(whole, shadows))
        assert every.shape == (MODELS, COUNT)
        for k in (0, 7):
            others = torch.arange(MODELS) != k
            rest = ShadowSignals(shadows.keep[others], {"phi": phi[:, :, others]}, z[:, :, others])
            result = CATALOG[name].run(Subject(whole, rest, TargetSignals({"phi": phi[:, :, k]}, z[:, :, k])))[0]
            assert torch.allclose(result, every[k], rtol=1e-9, atol=1e-9), name


def test_population_inside_the_shadows():
    """Offline RMIA takes the mean over shadows that did not hold z; phi is changed so that the mean of all is that."""
    generator = torch.Generator().manual_seed(3)
    phi = 3 * torch.randn(2, 40, 6, generator=generator)
    keep = torch.rand(6, 40, generator=generator).argsort(0) < 3
    result = torch.sigmoid(impute_held(phi, keep)).mean(2)
    p = torch.sigmoid(phi.double())
    expected = torch.stack([p[:, n, ~keep[:, n]].mean(1) for n in range(40)], 1)
    assert torch.allclose(result, expected, rtol=1e-12, atol=0)
    whole = data()
    shadows = ShadowSignals(
        whole.shadows["shadows"].keep[:, 100:],
        {"phi": whole.shadows["shadows"].signals["phi"][:, 100:]},
        whole.shadows["shadows"].signals["phi"][:, :100],
        whole.shadows["shadows"].keep[:, :100],
    )
    seen = whole.targets["target"].signals["phi"]
    target = TargetSignals({"phi": seen[:, 100:]}, seen[:, :100])
    whole = AuditData({"shadows": shadows}, {"target": target}, whole.members[100:])
    report = audit_signals(whole, Choices(attacks=("rmia", "rmia_offline", "attack_p", "loss"), targets="shadows"))
    assert set(report.leave_one_out["shadows"]) == {"loss"}  # z may be a member of the shadow that is left out
    assert report.figures["target"]["rmia"]["operating_points"] is None
    assert report.setting["shadow_sets"]["shadows"]["population_in_shadows"]


def test_defaults_are_what_the_signals_allow():
    report = audit_signals(data())
    assert set(report.figures["target"]) == {"lira", "lira_offline", "base", "attack_r", "loss"}
    skipped = report.setting["skipped"]
    assert skipped["rmia"] == "a population of further non-members (population=...)"
    assert skipped["modified_entropy"] == "labels"
    assert skipped["nearest_synthetic"] == "images and a synthetic set"
    out = data()
    keep = torch.zeros_like(out.shadows["shadows"].keep)
    shadows = dataclasses.replace(out.shadows["shadows"], keep=keep)
    report = audit_signals(dataclasses.replace(out, shadows={"shadows": shadows}))
    assert report.setting["primary"] == "lira_offline"  # no shadow held an example: online attacks are not possible
    assert report.setting["skipped"]["lira"] == "shadows that held some of the examples"


def test_examples_in_every_or_no_shadow_are_counted_and_neutral():
    whole = data()
    keep = whole.shadows["shadows"].keep.clone()
    keep[:, :7], keep[:, 7:10] = True, False
    shadows = dataclasses.replace(whole.shadows["shadows"], keep=keep)
    report = audit_signals(
        dataclasses.replace(whole, shadows={"shadows": shadows}), Choices(attacks=("lira", "base", "attack_r"))
    )
    facts = report.setting["shadow_sets"]["shadows"]
    assert (facts["examples_in_every_shadow"], facts["examples_in_no_shadow"]) == (7, 3)
    assert any("7 of 600 examples are in every shadow" in line for line in report.warnings)
    assert any("3 of 600 examples are in no shadow" in line for line in report.warnings)
    assert report.scores["target"]["lira"][:10].abs().max() == 0
    assert (report.scores["target"]["attack_r"][:7] == 0.5).all()


def test_shadows_of_another_size_are_said():
    whole = data()
    assert not any("trained on" in note for note in audit_signals(whole, Choices(attacks=("loss",))).setting["notes"])
    few = whole.members & (torch.arange(COUNT) < COUNT // 2)
    report = audit_signals(dataclasses.replace(whole, members=few), Choices(attacks=("loss",)))
    words = f"was trained on 300 of these examples on average, the targets on {int(few.sum())}"
    assert any(words in note for note in report.setting["notes"])


def test_leave_one_out_and_comparison():
    whole = data()
    other = TargetSignals({"phi": simulated(1, 0.0)[1]}, kind="transfer")
    whole = dataclasses.replace(whole, targets={**whole.targets, "other": other})
    report = audit_signals(whole, Choices(attacks=("lira", "loss"), targets="shadows"))
    shadows = whole.shadows["shadows"]
    lone = lira(shadows.signals["phi"], shadows.keep, variance="fixed", partner=left_out(shadows))
    assert averages(report.leave_one_out["shadows"]["lira"]) == across_targets(lone, shadows.keep)
    expected = delong_test(report.scores["target"]["lira"], report.scores["other"]["lira"], whole.members)
    row = {"first": "target", "role": "primary", **expected, "p_corrected": expected["p"]}
    assert report.comparison["other"]["lira"] == {**row, "interval_corrected": expected["interval"]}


def test_comparisons_of_exploratory_attacks_share_one_error():
    whole = data()
    other = TargetSignals({"phi": simulated(1, 1.0)[1]}, kind="transfer")
    whole = dataclasses.replace(whole, targets={**whole.targets, "other": other})
    report = audit_signals(whole, Choices(attacks=("loss", "lira", "base", "attack_r"), primary="base", level=0.9))
    rows = report.comparison["other"]
    assert [name for name, row in rows.items() if row["role"] == "primary"] == ["base"]
    assert rows["base"]["p_corrected"] == rows["base"]["p"]
    rest = [row for row in rows.values() if row["role"] == "exploratory"]
    assert [row["p_corrected"] for row in rest] == holm([row["p"] for row in rest]) != [row["p"] for row in rest]
    for attack in ("loss", "lira", "attack_r"):  # a third of the error each
        pair = (report.scores[name][attack] for name in ("target", "other"))
        assert rows[attack]["interval_corrected"] == delong_test(*pair, whole.members, 1 - 0.1 / 3)["interval"]


def test_exposed_members_are_the_highest():
    whole = data(labels=torch.zeros(COUNT, dtype=torch.int64))
    report = audit_signals(whole, Choices(attacks=("lira",)))
    scores = report.scores["target"]["lira"]
    rows = report.exposed(5)["target"]
    best = scores[whole.members].sort(descending=True).values[:5]
    assert [row["score"] for row in rows] == best.tolist()
    for row in rows:
        assert whole.members[row["index"]]
        assert row["non_members_above"] == int((scores[~whole.members] >= row["score"]).sum())


def test_infinite_signals_are_ordered_and_strict_json():
    """phi of +inf is certainty (the other classes are ruled out): above all finite ones, and no number in JSON."""
    whole = data()
    seen = whole.targets["target"].signals["phi"].clone()
    seen[0, whole.members.nonzero()[:3, 0]] = torch.inf
    whole = dataclasses.replace(whole, targets={"target": TargetSignals({"phi": seen})})
    report = audit_signals(whole, Choices(attacks=("loss", "lira", "base", "attack_r")))
    assert (report.scores["target"]["loss"][whole.members][:3] == 1e6).all()  # a threshold can lie above it
    json.dumps(report.to_dict(), allow_nan=False)


def test_infinite_signals_of_several_queries_have_scores():
    """Certainty in one query and its opposite in the other, in shadows and target: ordered, and no NaN."""
    whole = data(labels=torch.arange(COUNT) % CLASSES)
    shadows, seen = whole.shadows["shadows"], whole.targets["target"].signals["phi"]
    phi, own = shadows.signals["phi"].repeat(2, 1, 1), seen.repeat(2, 1)
    phi[0, ::3], own[0, ::3] = torch.inf, torch.inf
    phi[1, ::6], own[1, ::6] = -torch.inf, -torch.inf
    phi[0, 1::3, :4] = torch.inf
    whole = dataclasses.replace(
        whole,
        shadows={"shadows": dataclasses.replace(shadows, signals={"phi": phi})},
        targets={"target": TargetSignals({"phi": own})},
    )
    attacks = ("loss", "confidence", "lira", "base", "attack_r")
    report = audit_signals(whole, Choices(attacks=attacks, targets="shadows"))
    loss = report.scores["target"]["loss"]
    assert (loss[3::6] == 1e6).all()
    assert (loss[::6] == 0).all()
    assert torch.equal(loss[1::3], own[:, 1::3].double().mean(0))
    for scores in report.scores["target"].values():
        assert not scores.isnan().any()


@pytest.mark.parametrize("queries", [None, 3])
def test_from_logits(queries):
    logits, keep, labels, members = logits_of(queries=queries)
    result = from_logits(logits[:MODELS], keep, labels, target=logits[MODELS], members=members)
    z = logits.double().reshape(MODELS + 1, 80, -1, CLASSES)
    at = labels.view(1, 80, 1, 1).expand(MODELS + 1, -1, z.shape[2], 1)
    own, others = z.gather(3, at)[..., 0], z.scatter(3, at, -torch.inf).logsumexp(3)
    phi = (own - others).permute(2, 1, 0)
    assert torch.allclose(result.shadows["shadows"].signals["phi"].double(), phi[:, :, :MODELS], atol=1e-5)
    assert torch.allclose(result.targets["target"].signals["phi"].double(), phi[:, :, MODELS], atol=1e-5)
    # Probabilities instead: refused, and with the opt-in the same phi where they have not saturated.
    p = logits.double().softmax(-1)
    with pytest.raises(ValueError, match=r"logits of the shadows must be logits, from before the softmax"):
        from_logits(p[:MODELS], keep, labels, target=logits[MODELS], members=members)
    with pytest.raises(ValueError, match=r"logits of target must be logits, from before the softmax"):
        from_logits(logits[:MODELS], keep, labels, target=p[MODELS], members=members)
    given = from_logits(p[:MODELS], keep, labels, target=p[MODELS], members=members, probabilities=True)
    assert torch.allclose(given.targets["target"].signals["phi"].double(), phi[:, :, MODELS], atol=1e-5)
    assert any("probabilities" in note for note in given.notes)
    part = from_logits(
        logits[:MODELS], keep, labels, target=logits[MODELS], members=[0, 2, 4], non_members=list(range(1, 41, 2))
    )
    assert (part.count, int(part.members.sum())) == (23, 3)
    report = audit_signals(
        result, Choices(attacks=("lira", "entropy", "modified_entropy", "label_only", "shadow_network"))
    )
    assert len(report.figures["target"]) == 5


def test_bad_input():
    logits, keep, labels, members = logits_of()
    good = {"logits": logits[:MODELS], "keep": keep, "labels": labels, "target": logits[MODELS], "members": members}

    def refused(words, **changes):
        options = good | changes
        with pytest.raises((ValueError, TypeError), match=words):
            audit_signals(
                from_logits(options.pop("logits"), options.pop("keep"), options.pop("labels"), **options),
                Choices(attacks=("lira",)),
            )

    broken = logits.clone()
    broken[2, 5, 1] = torch.nan
    refused("logits of the shadows must not hold NaN, got 1 NaN", logits=broken[:MODELS])
    refused("logits of target must not hold NaN", target=broken[2])
    refused("keep must be bool, or hold 0 and 1 only, got int64 .* with -1", keep=-keep.long())
    refused(r"keep must have shape \[M, N\] = \[12, 80\], got \[80, 12\]", keep=keep.T)
    refused(r"labels must lie in \[0, 5\), got \[0, 9\]", labels=labels.clone().index_fill_(0, torch.tensor([3]), 9))
    refused("shadows must be at least 2, got 1", logits=logits[:1], keep=keep[:1])
    both = torch.zeros(2, 80, dtype=torch.bool)
    both[0] = True
    refused("keep must give some example 2 shadows out of it for fixed variance, got 1", logits=logits[:2], keep=both)
    refused("members must hold members and non-members", members=torch.zeros(80, dtype=torch.bool))
    refused(
        "members and non_members must be disjoint, got 1 examples in both, 4 first", members=[4], non_members=[4, 5]
    )
    refused(r"keep must have shape .* got \[12, 79\]", keep=keep[:, :79], members=[4], non_members=[5])
    long = torch.cat([labels, labels[:20]])
    refused(r"labels must be integers \[80\], got int64 \[100\]", labels=long, members=[4], non_members=[5])
    refused("logits of target must be float", target=logits[MODELS].repeat(2, 1), members=[4], non_members=[5])
    refused("images must be those of the 80 examples", images=torch.zeros(81, 4, 4, 1, dtype=torch.uint8))
    refused(r"logits of target must be float \[80, \(A,\) C\]", target=logits[MODELS, :70])
    whole = data()
    for words, make in (
        ("signals of the target must hold phi", lambda: TargetSignals({})),
        ("phi of the target must not hold NaN", lambda: TargetSignals({"phi": torch.full((1, 4), torch.nan)})),
        ("kind must be full or transfer, got part", lambda: TargetSignals({"phi": torch.zeros(1, 4)}, kind="part")),
        ("phi of t must have shape", lambda: data(targets={"t": TargetSignals({"phi": torch.zeros(2, COUNT)})})),
        ("target must have names other than setting", lambda: data(targets={"setting": whole.targets["target"]})),
        ("target must have names other than", lambda: data(targets={"exposed": whole.targets["target"]})),
        ("synthetic must have names other than", lambda: data(synthetic={"setting": torch.zeros(1, 4, 4, 1)})),
        ("synthetic s must be uint8", lambda: data(synthetic={"s": torch.zeros(1, 4, 4, 1)})),
        ("images must be uint8", lambda: data(images=torch.zeros(COUNT, 4, 4, 1))),
        ("index must be integers", lambda: data(index=torch.arange(3))),
        ("shadows and targets must be at least one set, or one model", lambda: AuditData({}, {}, None)),
        ("labels must be integers", lambda: data(labels=torch.zeros(3, dtype=torch.int64))),
        ("members must be bool", lambda: data(members=None)),
    ):
        with pytest.raises(ValueError, match=words):
            make()
    with pytest.raises(ValueError, match="target must hold at least one model"):
        audit_signals(dataclasses.replace(whole, targets={}, members=None))
