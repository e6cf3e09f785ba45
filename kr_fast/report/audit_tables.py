"""The numbers of an audit as tables and plain words, from the dictionary of ``audit.json``."""

from collections.abc import Callable, Mapping
from typing import Any

from kr_fast.report import sentences
from kr_fast.report.sentences import maker, names, percent_of_level, target_title, title, verdict
from kr_fast.report.tables import interval, number, p_value, percent, rounded_down, tpr

__all__ = ["names", "percent_of_level", "title", "verdict"]

Audit = dict[str, Any]
FEW = 10  # false positives
RECIPES = (
    "What the recipe leaks: each shadow is attacked from the others, and with it one of the other side of each "
    "example is left out, so that scores without information have an AUC of 0.5. Mean over these models, its interval "
    "over other models and other records, and the standard deviation of models. The figures of one model move with its "
    "seed and its processor."
)


def caveats(audit: Audit) -> list[str]:
    """What the figures do not say."""
    setting = audit["setting"]
    lines = [f"Warning: {line}." for line in setting["warnings"]]
    lines += [
        "What is measured here is empirical. It is not differential privacy and carries no guarantee: it says how far "
        "the attacks named below got, and a stronger attack may get further.",
        "Each target has one primary attack, which was named beforehand. The other attacks are exploratory: their "
        "corrected intervals and their epsilon bounds share one error, so the largest of them may be looked at.",
        "A lower bound of epsilon is read off one trained model. It takes the examples of that model as independent, "
        "which they are not quite, and 0 means that this attack found nothing, not that there is privacy.",
    ]
    return [*lines, *(f"{note[0].upper()}{note[1:]}." for note in setting["notes"])]


def intervals(audit: Audit) -> str:
    """Of what kind the intervals of an AUC are."""
    if audit.get("by_group"):
        return "score intervals, or those over whole groups of images where these are wider,"
    return "score intervals"


def headline(audit: Audit, labels: Mapping[str, str] | None = None) -> list[list[str]]:
    """The recipes' primary attacks, averaged over models; one row a target; every attack on released images."""
    rows = [["under attack", "attack", "AUC", "TPR at 1 % FPR", "epsilon at least", "accuracy over privacy"]]
    setting = audit["setting"]
    for name in audit["leave_one_out"]:
        attack = sentences.primary_of(audit, name)
        row = audit["leave_one_out"][name][attack]
        words = f"mean of {row['targets']} models {maker(audit, name, labels)}"
        rows.append([words, title(audit, attack), averaged(row["auc"]), mean_tpr(row["tpr_at_fpr"]["0.01"]), "", ""])
    for name in names(audit):
        facts = setting["targets"][name]
        for attack in audit[name] if facts["kind"] == "released" else (facts["primary"],):
            row = audit[name][attack]
            rows.append(
                [
                    target_title(audit, name, labels),
                    title(audit, attack),
                    f"{number(row['auc'])} {interval(sentences.deciding(row))}",
                    tpr(row["tpr_at_fpr"]["0.01"]),
                    rounded_down(row["epsilon"]["clopper_pearson"]),
                    number(row["aop"]) if "aop" in row else "",
                ]
            )
    return rows if any(row[5] for row in rows[1:]) else [row[:5] for row in rows]


def averaged(value: dict[str, Any]) -> str:
    """``0.560 [0.551, 0.569]``: a mean over models and its interval."""
    if value["mean"] is None:
        return f"fewer than {FEW} false positives"
    return f"{number(value['mean'])} {interval(value['interval'])}".rstrip()


def mean_tpr(value: dict[str, Any]) -> str:
    """``5.60 % [5.51, 5.69] %``: a mean TPR and its interval, as :func:`kr_fast.report.tables.tpr` has that of one."""
    if value["mean"] is None:
        return averaged(value)
    ends = "" if value["interval"] is None else f" [{', '.join(f'{100 * end:.2f}' for end in value['interval'])}] %"
    return f"{percent(value['mean'])}{ends}"


def attacks(audit: Audit, target: str) -> list[list[str]]:
    """One row per attack: AUC, corrected interval, balanced accuracy, advantage, epsilon."""
    one_run = any(row["epsilon"]["one_run"] is not None for row in audit[target].values())
    bounds = {"clopper_pearson": "any threshold", "gaussian": "if Gaussian"} | (
        {"one_run": "one run"} if one_run else {}
    )
    rows = [["attack", "role", "AUC", "corrected", "balanced accuracy", "advantage"]]
    rows[0] += [f"epsilon ({words})" for words in bounds.values()]
    for attack, row in audit[target].items():
        auc = f"{number(row['auc'])} {interval(row['auc_ci'])}"
        cells = [title(audit, attack), row["role"], auc, interval(row["auc_ci_corrected"])]
        cells += [number(row["balanced_accuracy"]), number(row["advantage"])]
        rows.append([*cells, *(rounded_down(row["epsilon"][name]) for name in bounds)])
    return rows


def low_fpr(audit: Audit, target: str) -> list[list[str]]:
    """TPR at low false-positive rates, with the false positives that each rests on."""
    rates = list(next(iter(audit[target].values()))["tpr_at_fpr"])
    rows = [["attack", *(f"TPR at {100 * float(rate):g} % FPR" for rate in rates)]]
    for attack, row in audit[target].items():
        rows.append([title(audit, attack), *(tpr(row["tpr_at_fpr"][rate]) for rate in rates)])
    return rows


def operating_points(audit: Audit, target: str) -> list[list[str]]:
    """The target at thresholds that the shadows chose: what an attacker would get."""
    priors = audit["setting"]["priors"]
    shares = (f"PPV if {100 * prior:g} % are members" for prior in priors)
    rows = [["attack", "FPR aimed at", "FPR", "TPR", *shares]]
    for attack, row in audit[target].items():
        for rate, point in (row["operating_points"] or {}).items():
            cells = [
                f"{100 * float(rate):g} %",
                f"{percent(point['fpr'])} ({point['false_positives']})",
                f"{percent(point['tpr'])} {_range(point['tpr_interval'])} %",
            ]
            for prior in priors:
                ppv = point["ppv"][str(prior)]
                # As for a TPR: below ten false positives the FPR, and what follows from it, is an interval only.
                share = "" if point["false_positives"] < FEW else f"{percent(ppv['ppv'])} "
                cells.append("nothing flagged" if ppv["ppv"] is None else f"{share}{_range(ppv['interval'])} %")
            rows.append([title(audit, attack), *cells])
    return rows


def _range(pair: list[float | None]) -> str:
    low, high = ("?" if value is None else f"{100 * value:.1f}" for value in pair)
    return f"[{low}, {high}]"


def comparison(audit: Audit, other: str) -> list[list[str]]:
    """Paired tests of the first target against another one, by themselves and corrected for being several."""
    rows = [["attack", "role", "difference of AUC", "interval", "p (two-sided)", "corrected interval", "corrected p"]]
    for attack, row in audit["comparison"][other].items():
        p, corrected = (p_value(row[key]) for key in ("p", "p_corrected"))
        cells = [f"{row['difference']:+.3f}", interval(row["interval"]), p, interval(row["interval_corrected"])]
        rows.append([title(audit, attack), row["role"], *cells, corrected])
    return rows


def leave_one_out(audit: Audit, name: str) -> list[list[str]]:
    """Mean over shadows as targets, its interval and the standard deviation of models."""
    each = audit["leave_one_out"][name]
    rates = list(next(iter(each.values()))["tpr_at_fpr"]) if each else []
    rows = [["attack", "role", "targets", "AUC", "corrected", "balanced accuracy"]]
    rows[0] += [f"TPR at {100 * float(rate):g} % FPR" for rate in rates]
    for attack, row in each.items():
        cells = [_spread(row["auc"]), interval(row["auc"]["interval_corrected"]), _spread(row["balanced_accuracy"])]
        cells += [_spread(row["tpr_at_fpr"][rate], mean_tpr) for rate in rates]
        rows.append([title(audit, attack), row["role"], str(row["targets"]), *cells])
    return rows


def recipes(audit: Audit, name: str) -> list[list[str]]:
    """Differences of the first recipe's mean AUC and that of another; nothing for the first, or without pairs."""
    rows = [
        ["attack", "role", "difference of mean AUC", "interval", "p (two-sided)", "corrected interval", "corrected p"]
    ]
    for attack, row in audit["leave_one_out"][name].items():
        if gap := row["difference"]:
            alone, corrected = (p_value(gap[key]) for key in ("p", "p_corrected"))
            ends = interval(gap["interval"]), alone, interval(gap["interval_corrected"]), corrected
            rows.append([title(audit, attack), row["role"], f"{gap['difference']:+.3f}", *ends])
    return rows if len(rows) > 1 else []


def negative_rows(audit: Audit, labels: Mapping[str, str] | None = None) -> list[tuple[str, dict[str, Any]]]:
    """What each negative control sets against each other, and its figures; nothing without members."""
    controls = audit["setting"].get("negative_controls")
    if controls is None:
        return []
    named = [("members against the others by the images alone", controls["blind"])]
    for name, sides in controls["targets"].items():
        called = target_title(audit, name, labels)
        named += [
            (f"half of the {side.replace('_', '-')} against the other, {called}", row) for side, row in sides.items()
        ]
    return [(words, row) for words, row in named if row is not None]


def negative_controls(audit: Audit, labels: Mapping[str, str] | None = None) -> list[list[str]]:
    """Attacks that must not succeed, and whether they did; nothing without members."""
    rows = [["control", "AUC", "passed"]]
    for words, row in negative_rows(audit, labels):
        rows.append([words, f"{number(row['auc'])} {interval(row['interval'])}", "yes" if row["passed"] else "NO"])
    return rows if len(rows) > 1 else []


def records_title(audit: Audit, name: str, labels: Mapping[str, str] | None = None) -> str:
    """Heading of the section on single records."""
    return f"Single records, by models {maker(audit, name, labels)}"


def records_words(audit: Audit, name: str) -> str:
    """How many records are found, how few could have been, and how that was tested."""
    row = audit["records"][name]
    if not row["tested"]:
        return f"None of {row['records']:,} records has the 4 shadows on each side that a test of it takes."
    inside, outside = row["shadows"]
    words = (
        f"{row['found']:,} of {row['tested']:,} records are found at a false discovery rate of {percent(row['rate'])} "
        f"(Benjamini-Hochberg), {row['found_holm']:,} if not one may be found falsely (Holm). Each record is tested by "
        f"itself: {inside} models that were trained on it against {outside} that were not, by the exact rank test of "
        "their answers to it. Its advantage is how much more often the first answer more surely than the second, less "
        "the reverse: 0 is no trace, 1 is certainty; the largest here is "
        f"{number(row['largest_advantage'], 2)}. "
    )
    if row["least_advantage"] is None:
        words += "So few models cannot find one record alone, however exposed it is: train more shadows. "
    else:
        words += (
            f"With so many models, one exposed record is found with probability {row['power']:g} from an advantage of "
            f"{number(row['least_advantage'], 2)} on. "
        )
    if row["untested"]:
        words += f"{row['untested']:,} records have fewer than 4 shadows on a side and were not tested. "
    return words.strip()


def records(audit: Audit, name: str) -> list[list[list[str]]]:
    """Tables of the risk by class and by group, those that there are."""
    row, found = audit["records"][name], []
    head = ["records", "tested", "found", "mean advantage", "largest"]
    for kind, each in (("class", row["classes"]), ("group", row["groups"])):
        if each and each["rows"]:
            found.append([[kind, *head], *(_risk(at) for at in each["rows"])])
    return found


def _risk(row: dict[str, Any]) -> list[str]:
    cells = [str(row["label"]), f"{row['records']:,}", f"{row['tested']:,}", f"{row['found']:,}"]
    if row["mean_advantage"] is None:
        return [*cells, "", ""]
    ends = "" if row["interval"] is None else f" {interval(row['interval'])}"
    return [*cells, f"{number(row['mean_advantage'])}{ends}", number(row["largest"], 2)]


def leave_one_out_skipped(audit: Audit, labels: Mapping[str, str] | None = None) -> list[list[str]]:
    """Attacks by which the shadows were not attacked from each other, and why; nothing where there are none."""
    rows = [
        [sentences.shadows_title(audit, name, labels), title(audit, attack), why]
        for name, each in audit["setting"]["leave_one_out_skipped"].items()
        for attack, why in each.items()
    ]
    return [["shadows", "attack", "why"], *rows] if rows else []


def _spread(value: dict[str, Any], mean: Callable[[dict[str, Any]], str] = averaged) -> str:
    """With the standard deviation of models; ``mean`` writes what stands before it."""
    form = percent if mean is mean_tpr else number
    spread = "" if value["mean"] is None or value["sd"] is None else f" ± {form(value['sd'])}"
    return mean({"interval": None, **value}) + spread


def exposed(audit: Audit, target: str) -> list[list[str]]:
    """The members that stand out most."""
    rows = [["index", "class", "score", "non-members that score as high"]]
    total = audit["setting"]["non_members"]
    for row in audit["exposed"][target]:
        shown = "" if row["label"] is None else str(row["label"])
        rows.append([str(row["index"]), shown, number(row["score"]), f"{row['non_members_above']} of {total}"])
    return rows


def targets(audit: Audit, labels: Mapping[str, str] | None = None) -> list[list[str]]:
    """What each target was attacked with."""
    rows = [["target", "how", "shadows", "on the smaller side", "shared with the target's own making"]]
    setting = audit["setting"]
    how = {
        "full": "full: shadows made as the target was",
        "transfer": "transfer: shadows of another training",
    }
    for name, facts in setting["targets"].items():
        if facts["kind"] == "released":
            words = f"the {facts['images']:,} released images themselves"
            rows.append([target_title(audit, name, labels), words, "", "", ""])
            continue
        if facts["shadows"] is None:
            rows.append([target_title(audit, name, labels), "attacks that need no shadow", "0", "", ""])
            continue
        shadows = setting["shadow_sets"][facts["shadows"]]
        words = "positive control: overfitted on the members" if facts["control"] else how[facts["kind"]]
        words += making(facts, shadows)
        shared = facts["shared"] or ("nothing" if facts["kind"] == "full" and not facts["control"] else "")
        rows.append(
            [
                target_title(audit, name, labels),
                words,
                str(shadows["models"]),
                str(shadows["on_the_smaller_side"]),
                shared,
            ]
        )
    return rows


def making(facts: dict[str, Any], shadows: dict[str, Any]) -> str:
    """How far a target and its shadows were made alike: recipes, and sizes of their training sets; "" if not known."""
    if "training_size" not in facts:  # a file of an older version
        return ""
    words = "" if facts["control"] else f"; recipe: {facts['recipe']}"
    own, others = facts["training_size"], shadows["training_size"]
    return f"{words}; trained on {own:,} of these examples, a shadow on {others:,.0f}"


def rmia(audit: Audit) -> str:
    """What RMIA was run with, or nothing without it."""
    run, chosen = audit["setting"]["attacks"], audit["setting"]["rmia"]
    if not {"rmia", "rmia_offline"} & set(run):
        return ""
    scale = f", offline a = {chosen['offline_a']:g}" if "rmia_offline" in run else ""
    return f"RMIA: gamma = {chosen['gamma']:g}{scale}, predicate {chosen['predicate']}."


def assumptions(audit: Audit) -> list[list[str]]:
    """What each attack assumes the attacker to have."""
    rows = [["attack", "name in the JSON", "the attacker has"]]
    for name, attack in audit["setting"]["attacks"].items():
        rows.append([attack["title"], name, attack["assumes"]])
    return rows
