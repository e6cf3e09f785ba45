"""Figures of the JSON by their path: which there are before anything is run, and their values afterwards.

A path is the keys of ``audit.json`` (of a run: of ``metrics.json``, whose ``audit.`` may be left out) with points in
between, the elements of a list by number: ``target.lira.auc_ci.1``. What is asked for most has a short one.
"""

import dataclasses
import difflib
import itertools
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from kr_fast.membership.audit.notes import FEW_SHADOWS
from kr_fast.membership.statistics.curve import FPRS
from kr_fast.membership.verdict.limits import gates
from kr_fast.report.sentences import own_shadows, primary_of
from kr_fast.runtime.errors import fail

Audit = Mapping[str, Any]
NEAREST = 3


def own_set(audit: Audit, name: str) -> str | None:
    """The shadows that were made as the target ``name`` was; of a set of shadows without a target, itself."""
    return own_shadows(audit, name) if name in audit["setting"]["targets"] else name


def largest_seen(pairs: Iterable[Sequence[float] | None]) -> float:
    """The largest upper end of the intervals of AUCs that lie above 0.5; 0.5 if none does."""
    return max((pair[1] for pair in pairs if pair is not None and pair[0] > 0.5), default=0.5)


def _others(audit: Audit, name: str) -> float | None:
    rows = [row for row in audit.get(name, {}).values() if row["role"] != "primary"]
    return largest_seen(row["auc_ci_corrected"] for row in rows) if rows else None


def _recipe_others(audit: Audit, name: str) -> float | None:
    rows = audit["leave_one_out"].get(own_set(audit, name), {}).values()
    rows = [row["auc"] for row in rows if row["role"] != "primary"]
    return largest_seen(row["interval_corrected"] for row in rows) if rows else None


def _shadows_missing(audit: Audit, name: str) -> float | None:
    facts = audit["setting"]["shadow_sets"].get(own_set(audit, name))
    return None if facts is None else max(0, FEW_SHADOWS - facts["on_the_smaller_side"])


def _records(audit: Audit, name: str) -> float | None:
    facts = audit["records"].get(own_set(audit, name))
    return facts["found"] if facts and facts["tested"] else None  # of none that was tested none could be found


def _least_leak(audit: Audit, name: str) -> float | None:
    row = (audit["setting"].get("least_leak") or {}).get(own_set(audit, name))
    return None if row is None else row["auc"]


def _nearer(audit: Audit, name: str) -> float | None:
    row = (audit.get("released_tests") or {}).get(name)
    return None if row is None else 1 - row["p"]


def _controls_failed(audit: Audit) -> int | None:
    controls = audit["setting"]["negative_controls"]
    if controls is None:
        return None
    rows = [controls["blind"], *(row for sides in controls["targets"].values() for row in sides.values())]
    rows = [row for row in rows if row is not None]
    return sum(not row["passed"] for row in rows) if rows else None


def _controls_missed(audit: Audit) -> int | None:
    if audit.get("canaries"):  # which an attack with any power detects, as it may not an overfitted model
        return int(not audit["canaries"]["power"])
    control = audit["setting"]["control"]
    return None if control is None else int(not control["by_primary"])


def _accuracy_gap(metrics: Mapping[str, Any]) -> float | None:
    return None if metrics["cas_gap"] is None else 100 * metrics["cas_gap"]


def _auc_gap(metrics: Mapping[str, Any]) -> float | None:
    of_auc = (metrics.get("student_minus_teacher") or {}).get("auc")
    return None if of_auc is None else -of_auc["difference"]


# Short name -> what it is, and where it lies or how it is computed. {target}: the name before the point; {primary}: its
# attack that was named beforehand; {set}: the shadows that were made as it was; {recipe}: the same attack on those.
SHORT: dict[str, tuple[str, str | Callable[[Audit, str], float | None]]] = {
    "auc": ("AUC of the attack named beforehand", "{target}.{primary}.auc"),
    "auc_low": ("lower end of its interval", "{target}.{primary}.auc_ci.0"),
    "auc_high": ("upper end of its interval", "{target}.{primary}.auc_ci.1"),
    "others_auc_high": ("largest upper end of the other attacks that are seen above chance, 0.5 if none is", _others),
    "recipe_auc": ("mean AUC over the models made as it was", "leave_one_out.{set}.{recipe}.auc.mean"),
    "recipe_auc_low": ("lower end of its interval", "leave_one_out.{set}.{recipe}.auc.interval.0"),
    "recipe_auc_high": ("upper end of its interval", "leave_one_out.{set}.{recipe}.auc.interval.1"),
    "recipe_others_auc_high": ("as others_auc_high, over the models made as it was", _recipe_others),
    "tpr_0.1": ("TPR at 10 % FPR", "{target}.{primary}.tpr_at_fpr.0.1.tpr"),
    "tpr_0.1_high": ("upper end of its interval", "{target}.{primary}.tpr_at_fpr.0.1.interval.1"),
    "tpr_0.01": ("TPR at 1 % FPR", "{target}.{primary}.tpr_at_fpr.0.01.tpr"),
    "tpr_0.01_high": ("upper end of its interval", "{target}.{primary}.tpr_at_fpr.0.01.interval.1"),
    "tpr_0.001": ("TPR at 0.1 % FPR", "{target}.{primary}.tpr_at_fpr.0.001.tpr"),
    "tpr_0.001_high": ("upper end of its interval", "{target}.{primary}.tpr_at_fpr.0.001.interval.1"),
    "epsilon": ("lower bound of epsilon", "{target}.{primary}.epsilon.clopper_pearson"),
    "advantage": ("largest TPR less FPR", "{target}.{primary}.advantage"),
    "records": ("single records found", _records),
    "largest_advantage": ("advantage of the most exposed record", "records.{set}.largest_advantage"),
    "nearer": ("of released images: 1 - p, corrected, of the tests that they are nearer to members", _nearer),
    "least_leak": ("AUC of the least planted leak that the attack named beforehand finds", _least_leak),
    "shadows_missing": (f"how many of {FEW_SHADOWS} own shadows on a side of a record are missing", _shadows_missing),
}
# Short paths that are of no target.
OF_AUDIT = {
    "negative_controls_failed": ("negative controls that did not pass", _controls_failed),
    "positive_controls_missed": (
        "positive controls that the attack named beforehand for them does not detect",
        _controls_missed,
    ),
}
OF_RUN = {
    "accuracy_gap": ("points of test accuracy by which the Student is below the Teacher", _accuracy_gap),
    "auc_gap": ("test AUC by which the Student is below the Teacher", _auc_gap),
}

PAIR = "interval.0,interval.1"
ATTACK = (
    "{auc,auc_ci.0,auc_ci.1,auc_ci_corrected.0,auc_ci_corrected.1,balanced_accuracy,advantage,aop}",
    f"tpr_at_fpr.{{fpr}}.{{tpr,fpr,false_positives,{PAIR}}}",
    "epsilon.{delta,level,clopper_pearson,gaussian_mu,gaussian,one_run}",
    "operating_points.{point}.{tpr,tpr_interval.0,tpr_interval.1,fpr,fpr_interval.0,fpr_interval.1,false_positives}",
    f"operating_points.{{point}}.ppv.{{prior}}.{{ppv,{PAIR}}}",
)
TEST = f"difference,z,p,p_corrected,targets,{PAIR},interval_corrected.0,interval_corrected.1"
RECIPE = (
    "targets",
    f"auc.{{mean,sd,each.#,{PAIR},interval_corrected.0,interval_corrected.1}}",
    "balanced_accuracy.{mean,sd,each.#}",
    f"tpr_at_fpr.{{fpr}}.{{mean,sd,each.#,{PAIR}}}",
    f"difference.{{{TEST}}}",
)
AUDIT = (
    *(f"{{target}}.{{attack}}.{each}" for each in ATTACK),
    f"comparison.{{target}}.{{attack}}.{{{TEST}}}",
    *(f"leave_one_out.{{set}}.{{attack}}.{each}" for each in RECIPE),
    "records.{set}.{rate,power,records,tested,untested,found,share,found_holm,largest_advantage,smallest_p}",
    "records.{set}.{shadows.0,shadows.1,least_advantage}",
    "records.{set}.{classes,groups}.{count,with_found}",
    f"records.{{set}}.{{classes,groups}}.rows.#.{{records,tested,found,mean_advantage,largest,{PAIR}}}",
    "setting.{num_shadows,members,non_members,level,delta,priors.#,rmia.gamma,rmia.offline_a}",
    "setting.targets.{target}.{accuracy,images,training_size}",
    "setting.shadow_sets.{set}.{models,on_the_smaller_side,examples_in_every_shadow,examples_in_no_shadow,population}",
    "setting.shadow_sets.{set}.training_size",
    "setting.least_leak.{set}.{auc,power,draws}",
    "setting.duplicates.{exact.members,exact.non_members,near.members,near.non_members,threshold,spacing}",
    f"setting.negative_controls.blind.{{auc,{PAIR}}}",
    f"setting.negative_controls.targets.{{target}}.{{members,non_members}}.{{auc,{PAIR}}}",
)
AUDIT += tuple(
    f"released_tests.{{target}}.{{pixels,features}}.{each}"
    for each in (
        "{members,held_out,synthetic,matched}",
        f"nearer.{{auc,{PAIR},p,p_corrected}}",
        "{dcr,nndr}.{members,held_out}.{median,low}",
        "dcr.{share,expected,p,p_corrected}",
        f"medoids.{{clusters,auc,{PAIR},p,p_corrected,radius,coverage,hits.members,hits.held_out}}",
        "memorised.{count,expected,rank,p,p_corrected,copies.members,copies.held_out}",
    )
)
AUDIT += ("released_tests.{target}.p",)
AUDIT += (
    "by_group.{groups,images_in_largest,members,non_members,mixed}",
    "by_group.targets.{target}.{auc,auc_ci.0,auc_ci.1,balanced_accuracy,advantage}",
    f"by_group.targets.{{target}}.tpr_at_fpr.{{0.1,0.01}}.{{tpr,fpr,false_positives,{PAIR}}}",
    f"by_group.recipes.{{set}}.{{targets,auc.mean,auc.sd,auc.each.#,auc.{PAIR.replace(',', ',auc.')}}}",
    "by_group.records.{set}.{rate,power,records,tested,untested,found,share,found_holm,largest_advantage,smallest_p}",
    "by_group.records.{set}.{shadows.0,shadows.1,least_advantage}",
)
# Of a run: in metrics.json, beside the audit or in it.
RUN = (
    "canaries.{count,level}",
    "canaries.{teacher,student}.{models,sd,auc,auc_ci.0,auc_ci.1,own.auc,own.auc_ci.0,own.auc_ci.1}",
    f"canaries.{{teacher,student}}.tpr_at_fpr.{{0.1,0.01}}.{{tpr,fpr,false_positives,{PAIR}}}",
    "generator.{checkpoint,early,generators,draws,levels.#,members,non_members,balanced_accuracy,advantage}",
    "generator.{auc,auc_ci.0,auc_ci.1,uncalibrated.auc,uncalibrated.auc_ci_corrected.0,uncalibrated.auc_ci_corrected.1}",
    f"generator.tpr_at_fpr.{{fpr}}.{{tpr,fpr,false_positives,{PAIR}}}",
    "generator.by_level.#.{level,auc,auc_ci_corrected.0,auc_ci_corrected.1}",
    f"generator.recipe.{{targets,auc.mean,auc.sd,auc.each.#,auc.{PAIR.replace(',', ',auc.')}}}",
    "{teacher,student}.{val_accuracy,parameters,test_accuracy,test_auc,test_balanced_accuracy,test_ece,test_kappa}",
    "{teacher,student}.{test_accuracy_ci,test_auc_ci,test_balanced_accuracy_ci,test_ece_ci,test_kappa_ci}.{0,1}",
    "{teacher,student}.{test_recall.#,test_precision.#,test_class_auc.#,test_class_ece.#,test_absent_classes.#}",
    "{teacher,student}.{test_recall_ci,test_precision_ci,test_class_auc_ci,test_class_ece_ci}.#.{0,1}",
    "{teacher,student}.{test_confusion.#.#,test_confusion_ci.#.#.0,test_confusion_ci.#.#.1}",
    "{teacher,student}.test_without_duplicates.{images,accuracy,auc}",
    "{teacher,student}.{test_groups.groups,test_groups.rows.#.images}",
    "{teacher,student}.test_groups.rows.#.{accuracy,auc,balanced_accuracy,ece,kappa}",
    "{teacher,student}.test_groups.rows.#.{accuracy_ci,auc_ci,balanced_accuracy_ci,ece_ci,kappa_ci}.{0,1}",
    f"student_minus_teacher.{{accuracy,auc,balanced_accuracy,ece,kappa}}.{{difference,{PAIR}}}",
    "synthetic.{images,test_images,features}",
    "synthetic.{kid,real.kid}.{mean,sd,subsets,subset_size,all,all_ci.0,all_ci.1}",
    *(
        f"synthetic.{whose}{{fid,kid,precision,recall,density,coverage}}{end}"
        for whose in ("", "real.", "classes.#.", "classes.#.real.")
        for end in ("", "_ci.0", "_ci.1")
    ),
    "synthetic.classes.#.{images,test_images}",
    "released_calibrated.{pipelines,level}",
    *(
        f"released_calibrated.{{all_periods,last_period}}.{{offline,online,uncalibrated}}.{each}"
        for each in (
            "{auc,auc_ci.0,auc_ci.1,auc_ci_corrected.0,auc_ci_corrected.1,balanced_accuracy,advantage}",
            f"tpr_at_fpr.{{fpr}}.{{tpr,fpr,false_positives,{PAIR}}}",
            f"recipe.{{targets,auc.mean,auc.sd,auc.each.#,auc.{PAIR.replace(',', ',auc.')}}}",
        )
    ),
    "{cas_gap,seed}",
    "aop.{target}",
    "stages.{stage}",
    "throughput.{generator,synthesis,distillation,hidden}",
    "dataset.{num_classes,train,val,test,height,width,channels}",
    "dataset.duplicates.{threshold,spacing,dropped.val,dropped.test}",
    "dataset.duplicates.{exact,near}.{train,val,test,val_train,test_train,test_val}",
    "ablation.#.{val_accuracy,test_accuracy,test_auc}",
    f"ablation.#.leakage.{{attack}}.{{mean,sd,{PAIR}}}",
    f"memorisation.rows.#.{{step,share,ratio,{PAIR}}}",
    "memorisation.{images,compared,limit}",
    "few_step.{steps,val_accuracy,val_auc,images_per_second,speedup}",
    "few_step.many_step.{num_inference_steps,network_calls,val_accuracy,val_auc,images_per_second}",
    "checkpoints.#.{step,ema_length,round,length,seconds,val_accuracy,val_auc}",
    "tuning.#.{num_inference_steps,guidance_scale,sigma,confidence,images,passes,val_accuracy,val_auc}",
    "tuning.#.{guidance_interval.0,guidance_interval.1,round,length,repeat,seconds}",
    "tuning_decision.{best,usual,noise,repeats}",
    "budget.seconds",
    "budget.planned.{stage}",
)


@dataclasses.dataclass(frozen=True)
class Names:
    """What the parts of paths may be called in one audit; ``stages``: of a run, whose JSON is ``metrics.json``."""

    targets: Sequence[str]
    sets: Sequence[str]
    attacks: Sequence[str]
    priors: Sequence[float]
    stages: Sequence[str] = ()


def known(names: Names) -> Iterator[str]:
    """Every path of such an audit, the short ones first; # is the number of an element of a list of any length."""
    named = list(dict.fromkeys((*names.targets, *names.sets)))
    yield from (f"{name}.{short}" for name in named for short in SHORT)
    yield from OF_AUDIT
    options = {"target": names.targets, "set": names.sets, "attack": names.attacks, "stage": names.stages}
    options |= {"fpr": tuple(map(str, FPRS)), "point": ("0.1", "0.01", "0.001"), "prior": [*map(str, names.priors)]}
    for pattern in AUDIT:
        yield from _expanded(pattern, options)
    if names.stages:
        yield from OF_RUN
        for pattern in RUN:
            yield from _expanded(pattern, options)


def _expanded(pattern: str, names: Mapping[str, Sequence[str]]) -> Iterator[str]:
    """ "a.{set}.{b,c}" with each of the names of ``set``, and each of the words between commas."""
    parts = re.split(r"[{}]", pattern)
    choices = [[part] if at % 2 == 0 else names.get(part, part.split(",")) for at, part in enumerate(parts)]
    return map("".join, itertools.product(*choices))


def check_paths(where: str, fail_above: Sequence[str], names: Names) -> None:
    """Refuse the first path that no figure of such an audit has, and name the nearest ones."""
    if not (asked := gates(where, fail_above)):
        return
    paths = list(known(names))
    there = set(paths)
    elements = re.compile("|".join(re.escape(each).replace(r"\#", r"\d+") for each in paths if "#" in each))
    for gate in asked:
        path = gate.path.removeprefix("audit.") if names.stages else gate.path
        if path in there or elements.fullmatch(path):
            continue
        near = difflib.get_close_matches(path, paths, NEAREST)
        hint = f" (nearest: {', '.join(near)})" if near else ""
        fail(where, "fail_above", "name figures of the JSON (docs/audit/verdict.md)", f"{gate.path}{hint}")


def figures(audit: Audit | None, metrics: Mapping[str, Any] | None = None) -> dict[str, float]:
    """Path -> value of every number that was computed; of a run with those of ``metrics.json`` beside the audit."""
    values: dict[str, float] = {}
    if metrics is not None:
        values |= dict(_flat({key: each for key, each in metrics.items() if key not in ("audit", "verdict")}))
        values |= {name: value for name, (_, of) in OF_RUN.items() if (value := of(metrics)) is not None}
    if audit is None:
        return values
    values |= dict(_flat({key: each for key, each in audit.items() if key not in ("details", "verdict")}))
    values |= {name: value for name, (_, of) in OF_AUDIT.items() if (value := of(audit)) is not None}
    for name in dict.fromkeys((*audit["setting"]["targets"], *audit["setting"]["shadow_sets"])):
        for short, (_, of) in SHORT.items():
            value = values.get(_path(audit, name, of)) if isinstance(of, str) else of(audit, name)
            if value is not None:
                values[f"{name}.{short}"] = value
    return values


def _path(audit: Audit, name: str, pattern: str) -> str:
    """The path that a short one of the target stands for."""
    own = own_set(audit, name) or ""  # which no set is called
    facts = audit["setting"]["targets"].get(name, {})
    recipe = primary_of(audit, own) if own in audit["leave_one_out"] else ""
    return pattern.format(target=name, primary=facts.get("primary", ""), set=own, recipe=recipe)


def _flat(value: Any, path: str = "") -> Iterator[tuple[str, float]]:
    if isinstance(value, Mapping | list | tuple):
        items = value.items() if isinstance(value, Mapping) else enumerate(value)
        for key, each in items:
            yield from _flat(each, f"{path}.{key}" if path else str(key))
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield path, value
