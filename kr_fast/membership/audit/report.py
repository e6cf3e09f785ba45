"""Attacks on given signals, and what is reported of them."""

import dataclasses
import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from kr_fast.membership.attacks.by_group import by_group, group_risk
from kr_fast.membership.attacks.catalog import CATALOG, auto_variance, sides
from kr_fast.membership.attacks.negative_controls import negative_controls
from kr_fast.membership.attacks.planted import least_leaks
from kr_fast.membership.attacks.released_tests import ReleasedTests, compare_released
from kr_fast.membership.audit.choices import Choices
from kr_fast.membership.audit.figures import exposed, of_attack
from kr_fast.membership.audit.files import write
from kr_fast.membership.audit.notes import called, notes_of, of_control, warnings_of
from kr_fast.membership.audit.recipe import of_target, recipes
from kr_fast.membership.audit.record_table import RecordTable, record_tables
from kr_fast.membership.audit.scores import choose, leave_one_out, named_for, scores_of
from kr_fast.membership.inputs.data import AuditData, ShadowSignals
from kr_fast.membership.inputs.duplicates import apart, warnings_of_duplicates
from kr_fast.membership.statistics.auc_intervals import delong_variances, t_interval
from kr_fast.membership.statistics.curve import Curve, roc
from kr_fast.membership.statistics.epsilon import check_fair_coins, epsilon_one_run
from kr_fast.membership.statistics.groups import Groups
from kr_fast.membership.statistics.intervals import holm
from kr_fast.membership.statistics.records import RecordRisk
from kr_fast.membership.verdict.decision import verdict_of
from kr_fast.membership.verdict.limits import Limits
from kr_fast.report.sentences import failed_controls
from kr_fast.runtime import seeds
from kr_fast.runtime.errors import fail
from kr_fast.runtime.inputs import described
from kr_fast.runtime.log import logger
from kr_fast.runtime.storage import files

LEAST_SHADOWS = 4  # of which each is attacked from the others, for the figures of the recipe
MOST_EXPOSED = 16


@dataclasses.dataclass(frozen=True, repr=False)
class AuditReport:
    """What was found, and everything that must be said beside it.

    ``curves[target][attack]``, ``scores[target][attack]`` (float64 ``[N]``) and ``figures[target][attack]`` (plain
    values) are of each target, the positive control and each released synthetic set. ``records[shadows]`` is the risk
    of each record under the recipe of a set of shadows. ``setting`` says what was run. ``parts`` holds the plain
    figures of what was measured beside these attacks, by the key that each has in the JSON. ``released[name]`` holds
    the distances of each record to a released set, ``group_risks[shadows]`` the risk of each group.
    """

    curves: dict[str, dict[str, Curve]]
    scores: dict[str, dict[str, Tensor]]
    figures: dict[str, dict[str, dict[str, Any]]]
    comparison: dict[str, dict[str, dict[str, Any]]]
    leave_one_out: dict[str, dict[str, dict[str, Any]]]
    records: dict[str, RecordTable]
    setting: dict[str, Any]
    warnings: tuple[str, ...]
    data: AuditData
    limits: Limits = Limits()  # noqa: RUF009 (it is frozen)
    parts: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    released: Mapping[str, ReleasedTests] = dataclasses.field(default_factory=dict)
    group_risks: Mapping[str, RecordRisk] = dataclasses.field(default_factory=dict)

    def __repr__(self) -> str:
        rows = [
            f"{name}: {facts['primary']} {self.curves[name][facts['primary']]!r}"
            for name, facts in self.setting["targets"].items()
        ]
        return f"AuditReport({'; '.join(rows) or 'every shadow as a target'}; {self.num_shadows} shadows)"

    def _repr_html_(self) -> str:
        """What a notebook shows: the verdict, the first table of the page, and the warnings."""
        from kr_fast.report import audit_tables, render
        from kr_fast.report.sections import verdict

        values = self.to_dict()
        words, warnings = audit_tables.verdict(values), [f"Warning: {line}." for line in self.warnings]
        table = [("table", audit_tables.headline(values))] if self.curves else []
        return render.fragment([("note", verdict.lines(self.verdict)), *table, ("text", words), ("note", warnings)])

    @functools.cached_property
    def verdict(self) -> dict[str, Any]:
        """Share, do not share or not decided: {"decision", "reasons", "chance", "rules"}: docs/audit/verdict.md."""
        return verdict_of(self._plain(), self.limits)

    @property
    def num_shadows(self) -> int:
        """Shadows of the first set."""
        return self.setting["num_shadows"]

    @property
    def members(self) -> int:
        """Number of members."""
        return self.setting["members"]

    @property
    def non_members(self) -> int:
        """Number of non-members."""
        return self.setting["non_members"]

    @property
    def augment(self) -> str:
        """The queries."""
        return self.setting["augment"]

    @property
    def variance(self) -> str:
        """What "lira" and "lira_offline" took."""
        return self.setting["lira_variance"]

    def to_dict(self) -> dict[str, Any]:
        """Strict JSON: {"verdict", target: {attack: figures}, "comparison", "leave_one_out", "records", "setting"}.

        Beside them stand the parts. Figures are auc, auc_ci, auc_ci_corrected, tpr_at_fpr, balanced_accuracy,
        advantage, role, epsilon, operating_points, and aop where the accuracy was given (docs/audit/report.md). It goes
        into files that may leave, so the operating points have no threshold here: that is the score of one record.
        """
        return {"verdict": self.verdict, **self._plain()}

    def _plain(self) -> dict[str, Any]:
        """:meth:`to_dict` without the verdict."""
        rest = {"comparison": self.comparison, "leave_one_out": self.leave_one_out}
        rest |= {"records": {name: table.figures for name, table in self.records.items()}, "setting": self.setting}
        rest |= self.parts
        figures = {name: {a: _without_threshold(row) for a, row in each.items()} for name, each in self.figures.items()}
        return files.strict({**figures, **rest})

    def write(
        self,
        out: str | Path,
        details: Mapping[str, Any] | None = None,
        *,
        show_real_images: bool = False,
        show_records: bool = False,
    ) -> Path:
        """Write the files of an audit into ``out``; returns the path of the page.

        ``release/audit.html`` (self-contained) and ``release/audit.json`` hold figures; ``private/audit.npz`` the
        scores of every record, ``private/exposed.json`` the most exposed ones, ``private/records.csv`` the
        risk of each record, ``private/closest_pairs.json`` the members nearest to released images; ``README.txt`` says
        so.

        Args:
            details: title, command, versions, config: printed as they are.
            show_real_images: show the images of the most exposed members, and of those nearest to released images,
                where the data hold images.
            show_records: name these members, by index, class and score, in the page.

        A page that shows either says so in a banner, and lies in ``private/``.
        """
        return write(self, Path(out), dict(details or {}), show_real_images, show_records)

    def exposed(self, count: int = MOST_EXPOSED) -> dict[str, list[dict[str, Any]]]:
        """Target -> its most exposed members by its primary attack: index, position, score, non_members_above, label.

        ``index`` is that of the larger set where the pool is part of one; ``position`` is the row in this pool.
        """
        members = {}
        for name, scores in self.scores.items():
            attack = self.setting["targets"][name]["primary"]
            rows = exposed(scores[attack], self.data.members, count)
            members[name] = [row | self._named(row["position"]) for row in rows]
        return members

    def closest_pairs(self, count: int = MOST_EXPOSED) -> dict[str, list[dict[str, Any]]]:
        """Released set -> the members that a released image comes closest to: index, position, label, ratio, ...

        ``synthetic`` is the number of that released image, ``distance`` the root mean square difference of the two, and
        ``ratio`` its distance as a share of that image's distance to the nearest of half of the held-out images.
        """
        return {
            name: [row | self._named(row["position"]) for row in tests.closest(self.data.members, count)]
            for name, tests in self.released.items()
        }

    def _named(self, at: int) -> dict[str, int | None]:
        """What a row of the pool is in the user's data."""
        index, labels = self.data.index, self.data.labels
        return {
            "index": at if index is None else int(index[at]),
            "label": None if labels is None else int(labels[at]),
        }

    def arrays(self) -> dict[str, np.ndarray]:
        """What ``audit.npz`` holds: members, labels, index, keep, and scores, tp, fp and thresholds of every attack."""
        arrays = {}
        for name in ("members", "labels", "index"):
            value = getattr(self.data, name)
            if value is not None:
                arrays[name] = value.numpy()
        sets = self.data.shadows
        arrays |= {"keep" if len(sets) == 1 else f"keep/{name}": each.keep.numpy() for name, each in sets.items()}
        for name, curves in self.curves.items():
            for attack, curve in curves.items():
                arrays |= {f"{name}/{attack}/{key}": getattr(curve, key) for key in ("tp", "fp", "thresholds")}
                arrays[f"{name}/{attack}/scores"] = self.scores[name][attack].numpy()
        return arrays


def audit_signals(data: AuditData, choices: Choices = Choices()) -> AuditReport:  # noqa: B008 (it is frozen)
    """The audit of given signals: attacks, exact curves, and figures with intervals. No model is asked.

    Args:
        data: see :class:`kr_fast.membership.AuditData`.
        choices: see :class:`kr_fast.membership.Choices`; the queries are those of the data.
    Raises: UserError naming the argument, or the attack that lacks something.
    """
    if not isinstance(data, AuditData):
        fail("audit_signals", "data", "be an AuditData (of load_npz, from_logits, ...)", described(data))
    if not isinstance(choices, Choices):
        fail("audit_signals", "choices", "be of type Choices", described(choices))
    level, seed = choices.level, choices.seed
    choices.check_paths((*data.targets, *data.synthetic), data.shadows)
    data, duplicates = apart(data, choices.leave_out_duplicates)
    if choices.random_members and data.members is not None:
        check_fair_coins("audit", data.members)
    if not data.targets and choices.targets == "given":
        fail("audit", "target", "hold at least one model", 0)
    if not data.shadows and choices.targets == "shadows":
        fail("audit", "every shadow", "be attacked where there are shadows", "none")
    chosen, skipped = choose(data, choices)
    named, primary = [attack.name for attack in chosen], choices.primary
    if primary is None:
        primary = "lira" if "lira" in named else named[0]
    elif primary not in named:
        fail("audit", "primary", f"be one of the attacks, {', '.join(named)}", primary)
    asked = choices.targets == "shadows"
    alone = [attack for attack in chosen if attack.calibrated or (asked and not attack.released)]
    lone, not_alone = leave_one_out(data, alone, asked, seeds.derive(seed, "leave one out"))
    if not data.targets and not any(lone.values()) and not data.synthetic:
        why = "; ".join(f"{a}: {text}" for each in not_alone.values() for a, text in each.items())
        fail("audit", "attacks", "give at least one figure", why or "nothing")
    scores = scores_of(data, chosen)
    curves = {n: {a: roc(value, data.members) for a, value in each.items()} for n, each in scores.items()}
    facts = {name: _facts(data, name, named_for(data, name, primary, each)) for name, each in scores.items()}
    figures = _figures(data, choices, scores, curves, lone, facts)
    enough = {name: each for name, each in lone.items() if asked or len(data.shadows[name].keep) >= LEAST_SHADOWS}
    groups = None if data.groups is None else Groups.of(data.groups)
    loo = recipes(enough, primary, level, groups)
    records = record_tables(data, scores, facts, level, seeds.derive(seed, "records"))
    control = of_control(data, figures)
    negative = None
    if data.members is not None:
        primaries = {
            name: scores[name][facts[name]["primary"]] for name, each in data.targets.items() if not each.control
        }
        options = {"level": level, "seed": seeds.derive(seed, "negative controls")}
        negative = negative_controls(data.images, data.members, primaries, groups=data.groups, **options)
    warnings = (*failed_controls(negative, called(data)), *warnings_of_duplicates(duplicates))
    warnings += warnings_of(data, figures, facts, control, level)
    first_set = next(iter(data.shadows.values()), None)
    setting = {
        "num_shadows": 0 if first_set is None else len(first_set.keep),
        "members": None if data.members is None else int(data.members.sum()),
        "non_members": None if data.members is None else int((~data.members).sum()),
        "augment": data.augment,
        "lira_variance": None if first_set is None else auto_variance(first_set.keep),
        "primary": primary,
        "level": level,
        "delta": choices.delta,
        "priors": list(choices.priors),
        "random_members": choices.random_members,
        "rmia": choices.rmia,
        "targets": facts,
        "shadow_sets": {name: _shadow_facts(each) for name, each in data.shadows.items()},
        "control": control,
        "least_leak": least_leaks(data, facts, {attack.name: attack for attack in chosen}, level, seed),
        "negative_controls": negative,
        "duplicates": duplicates,
        "attacks": {a.name: {"title": a.title, "assumes": a.assumes} for a in chosen},
        "skipped": skipped,
        "leave_one_out_skipped": not_alone,
        "notes": notes_of(data, choices.random_members),
        "warnings": list(warnings),
    }
    for line in warnings:
        logger.warning("audit: %s", line)
    comparison = _comparison(data, scores, primary, level)
    made, tests = compare_released(data, level=level, seed=seeds.derive(seed, "released tests"))
    parts, risks = {"released_tests": made} if made else {}, {}
    if data.groups is not None:
        risks = group_risk(data, level=level)
        parts["by_group"] = by_group(data, scores, facts, enough, risks, primary, level)
    rest = (choices.limits, parts, tests, risks)
    return AuditReport(curves, scores, figures, comparison, loo, records, setting, warnings, data, *rest)


def _figures(
    data: AuditData, choices: Choices, scores: Mapping, curves: Mapping, lone: Mapping, facts: Mapping
) -> dict[str, dict[str, dict[str, Any]]]:
    """Target -> attack -> figures."""

    @functools.cache
    def calibration(shadows: str, attack: str) -> Curve | None:
        """Of all shadows of a set, each attacked leave-one-out."""
        pair = lone.get(shadows, {}).get(attack) if CATALOG[attack].calibrated else None
        return None if pair is None else roc(pair[0].flatten(), pair[1].flatten())

    figures: dict[str, dict[str, dict[str, Any]]] = {}
    groups = None if data.groups is None else Groups.of(data.groups)
    for name, each in curves.items():
        target, rows = data.targets.get(name), {}
        for attack, curve in each.items():
            rows[attack] = row = of_attack(
                curve,
                choices,
                role="primary" if attack == facts[name]["primary"] else "exploratory",
                family=len(each) - 1,
                accuracy=None if target is None else target.accuracy,
                calibration=None if target is None else calibration(target.shadows, attack),
            )
            if groups is not None and len(curve.thresholds) > 1:
                estimate = of_target(curve, scores[name][attack], data.members, groups)
                for key, each_level in (("auc_ci", choices.level), ("auc_ci_corrected", row["epsilon"]["level"])):
                    pair = estimate.interval(each_level)  # images of a group are no independent ones
                    row[key] = row[key] if pair is None else [min(row[key][0], pair[0]), max(row[key][1], pair[1])]
            if choices.random_members:
                options = {"delta": choices.delta, "level": row["epsilon"]["level"], "seed": choices.seed}
                row["epsilon"]["one_run"] = epsilon_one_run(scores[name][attack], data.members, **options)
        figures[name] = rows
    return figures


def _without_threshold(row: dict[str, Any]) -> dict[str, Any]:
    points = row["operating_points"] or {}
    safe = {fpr: {key: value for key, value in each.items() if key != "threshold"} for fpr, each in points.items()}
    return {**row, "operating_points": safe or None}


def _facts(data: AuditData, name: str, primary: str) -> dict[str, Any]:
    if name in data.synthetic:
        count = len(data.synthetic[name])
        return {"kind": "released", "images": count, "primary": primary, "control": False}
    target = data.targets[name]
    return {
        "kind": target.kind,
        "shadows": target.shadows if data.shadows else None,
        "shared": target.shared,
        "accuracy": target.accuracy,
        "primary": primary,
        "control": target.control,
        "title": target.title,
        "recipe": target.recipe or "unknown",
        "training_size": int(data.members.sum()),
    }


def _shadow_facts(shadows: ShadowSignals) -> dict[str, Any]:
    keep = shadows.keep
    return {
        "models": len(keep),
        "training_size": float(keep.sum(1).double().mean()),
        "on_the_smaller_side": sides(keep),
        "examples_in_every_shadow": int(keep.all(0).sum()),
        "examples_in_no_shadow": int((~keep).all(0).sum()),
        "lira_variance": auto_variance(keep),
        "population": None if shadows.population is None else shadows.population.shape[1],
        "population_in_shadows": shadows.population_keep is not None,
    }


def _comparison(data: AuditData, scores: Mapping, primary: str, level: float) -> dict[str, dict[str, dict[str, Any]]]:
    """Paired tests of the first target's AUC against that of each other one, attack by attack.

    The primary attack was named beforehand. The others of a pair share one error: Holm's p, Bonferroni's intervals.
    """
    first, *rest = [name for name, target in data.targets.items() if not target.control] or [None]
    groups = None if data.groups is None else Groups.of(data.groups)
    tests: dict[str, dict[str, dict[str, Any]]] = {}
    for other in rest:
        shared = 1 - (1 - level) / max(len(scores[other]) - 1, 1)
        rows = {}
        for attack, value in scores[other].items():
            gap = delong_variances(scores[first][attack], value, data.members)
            if data.groups is not None:
                pair = (scores[first][attack], value)
                one, two = (of_target(roc(each, data.members), each, data.members, groups) for each in pair)
                gap = ((one - two).mean, *(one - two).variances())
            test, role = t_interval(*gap, level), "primary" if attack == primary else "exploratory"
            wide = test if role == "primary" else t_interval(*gap, shared)
            corrected = {"interval_corrected": wide["interval"], "p_corrected": test["p"]}
            rows[attack] = {"first": first, "role": role, "difference": gap[0], **test, **corrected}
        exploratory = [row for row in rows.values() if row["role"] == "exploratory"]
        for row, p in zip(exploratory, holm([row["p"] for row in exploratory]), strict=True):
            row["p_corrected"] = p
        tests[other] = rows
    return tests
