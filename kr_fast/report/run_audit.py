"""The audit of a run in tables and plain words: Teacher and Student side by side, each by what it was attacked with.

All functions read the run's summary; its ``audit`` is the dictionary of ``audit.json``.
"""

from typing import Any

from kr_fast.report import audit_tables, sentences
from kr_fast.report.sections import quality
from kr_fast.report.tables import interval, number, percent, stated, tpr

Summary = dict[str, Any]
HEADLINE = ("lira", "lira_offline", "loss")
LABELS = {"soft": "the Teacher's soft labels", "top1": "the Teacher's top classes", "class": "their class labels"}
TEACHER, TRANSFER, FULL, RELEASED, CONTROL = "teacher", "student", "student_full", "released", "control"


def models(summary: Summary, *, images: bool = True) -> dict[str, str]:
    """Name in the audit -> title, of Teacher and Student by each set of shadows that attacked it.

    ``images``: also name the images that a model was trained on.
    """
    audit = summary.get("audit")
    student = "Student, transfer" if audit else "Student" + " (synthetic images)" * images
    seen = " (given)" if summary["config"].get("teacher") else " (real images)"
    titles = {TEACHER: "Teacher" + seen * images, TRANSFER: student}
    if audit and FULL in audit:
        kind = "full" if sentences.own_shadows(audit, FULL) else "shadow Students"
        titles[FULL] = f"Student, {kind} ({summary['config']['audit_generator']} generator)"
    return titles


def terms(summary: Summary) -> list[tuple[str, str]]:
    """What Teacher and Student are in this run."""
    config = summary["config"]
    given = "The model that was given to the run, and that the Student learned from."
    student = f"The model that was trained on synthetic images and {LABELS[config.get('labels', 'soft')]}"
    return [
        ("Teacher", given if config.get("teacher") else "The model that was trained on the private images."),
        ("Student", f"{student}." if config.get("generator") else f"{student}, on no private image."),
    ]


def strongest(summary: Summary) -> str:
    """The audit of the Student that counts: by shadows made as it was, where there are any."""
    return FULL if FULL in (summary.get("audit") or {}) else TRANSFER


def headline(summary: Summary) -> list[list[str]]:
    """Accuracy, AUC of the first attacks and AOP of each model, and the difference with its paired test."""
    audit, titles, best = summary.get("audit"), models(summary), strongest(summary)
    rows = [["", *titles.values(), f"Teacher - {titles[best]}" if len(titles) > 2 else "Teacher - Student"]]
    tested = [summary["teacher" if name == TEACHER else "student"] for name in titles]
    cells = [quality.accuracy(each, summary["dataset"]["test"]) for each in tested]
    rows.append(["test accuracy (Student: CAS)", *cells, f"{number(100 * summary['cas_gap'], 2)} points"])
    rows += quality.rows(summary, list(titles))
    for attack in HEADLINE if audit else ():
        rows += of_attack(audit, list(titles), best, attack)
    if summary.get("aop"):
        aop = summary["aop"]
        cells = [number(aop[name]) for name in titles]
        rows.append(["AOP = accuracy / (2 max(AUC, 0.5))^2", *cells, number(aop[TEACHER] - aop[best])])
    return rows


def of_attack(audit: dict[str, Any], names: list[str], best: str, attack: str) -> list[list[str]]:
    """The attack's AUC averaged over models made alike, where it is known, and on the very models under attack."""
    rows, words = [], audit_tables.title(audit, attack)
    # Of a given or private Teacher no shadow was made as it was.
    own = {name: sentences.own_shadows(audit, name) for name in names}
    recipes = {name: audit["leave_one_out"].get(own[name], {}).get(attack) for name in names}
    if any(recipes.values()):
        count = " and ".join(dict.fromkeys(str(row["targets"]) for row in recipes.values() if row))
        cells = [audit_tables.averaged(row["auc"]) if row else "" for row in recipes.values()]
        gap = recipes[best] and recipes[best]["difference"]
        rows.append(
            [f"{words} AUC, mean of {count} made alike", *cells, _gap(gap, recipes[best]["role"]) if gap else ""]
        )
    if attack in audit[TEACHER]:
        cells = [auc(audit[name][attack]) for name in names]
        rows.append([f"{words} AUC, this one", *cells, difference(audit, best, attack)])
    return rows


def auc(row: dict[str, Any]) -> str:
    """``0.560 [0.531, 0.589]``."""
    return f"{number(row['auc'])} {interval(row['auc_ci'])}"


def difference(audit: dict[str, Any], other: str, attack: str) -> str:
    """Teacher's AUC minus that of another target on the same examples: interval and p of the paired test.

    Those of an exploratory attack are corrected for being several.
    """
    row = audit["comparison"][other][attack]
    return _gap(row, row["role"])


def _gap(row: dict[str, Any], role: str | None) -> str:
    corrected = " (corrected)" if role == "exploratory" else ""
    return f"{row['difference']:+.3f} {interval(row['interval_corrected'])}, {stated(row['p_corrected'])}{corrected}"


def shadows_made(summary: Summary) -> str:
    """How the shadow models of this run were trained."""
    config, made = summary["config"], "by the Teacher's recipe"
    if summary.get("guarantee"):
        made = "without the private Teacher's noise"
    elif config.get("teacher"):
        made = "by this package's recipe, as that of the Teacher, which was given, is not known,"
    words = f"Every shadow Teacher was trained {made} on a random half of all of them"
    if FULL in summary["audit"]:
        labels = "the same class labels as the Student" if config.get("labels") == "class" else ""
        words += f"; a shadow Student learned {labels or 'from the shadow Teacher of the same half'}"
    return f"{words}."


def named_for_control(audit: dict[str, Any]) -> str:
    """Which attack was named beforehand for the positive control, where that is another one; else nothing."""
    targets = audit["setting"]["targets"]
    if CONTROL not in audit or (primary := targets[CONTROL]["primary"]) == targets[TEACHER]["primary"]:
        return ""
    return f"For the positive control {audit_tables.title(audit, primary)} was. "


def what_was_run(summary: Summary) -> list[list[str]]:
    """Which audit each target had: shadows, how they were made, what they share with it."""
    audit = summary["audit"]
    setting, rows = audit["setting"], [["target", "audit", "attacked with", "shared with its own training"]]
    named = {**models(summary), RELEASED: "released images", CONTROL: "positive control"}
    for name, facts in setting["targets"].items():
        if facts["kind"] == "released":
            which = "all periods" if summary["config"].get("fixed_images") else "the last period"
            rows.append([named[name], "released images", f"{facts['images']} images of {which}", ""])
            continue
        shadows = setting["shadow_sets"][facts["shadows"]]
        kind = "shadow Students" if facts["shadows"] == FULL else "shadow Teachers"
        least = shadows["on_the_smaller_side"]
        audited = ("control" if facts["control"] else facts["kind"]) + audit_tables.making(facts, shadows)
        cells = [f"{shadows['models']} {kind}, {least} on a side of an example", facts["shared"]]
        rows.append([named.get(name, name), audited, *cells])
    return rows


def recipes(summary: Summary) -> list[list[str]]:
    """Mean AUC of every attack over models made alike, with its interval and the spread of models."""
    audit = summary["audit"]
    sets, rows = audit["leave_one_out"], []
    for name, each in sets.items():
        for attack, row in each.items():
            gap = row["difference"]
            cells = [f"{row['targets']} models {sentences.maker(audit, name, sentences.OF_RUN)}"]
            cells += [audit_tables.title(audit, attack), row["role"], audit_tables.averaged(row["auc"])]
            rows.append([*cells, number(row["auc"]["sd"]), _gap(gap, row["role"]) if gap else ""])
    return [["recipe", "attack", "role", "mean AUC", "standard deviation", "first recipe - this one"], *rows]


def intervals(summary: Summary) -> str:
    """Of what kind the intervals of :func:`headline` are."""
    words = f"Intervals are 95 %: {quality.intervals(summary)}"
    if audit := summary.get("audit"):
        words += f", {audit_tables.intervals(audit)} of attacks' AUC, paired ones of differences of AUC"
    return f"{words}."


def every_attack(summary: Summary) -> list[list[str]]:
    """AUC of every attack on every model and on the control."""
    audit, named = summary["audit"], models(summary)
    if CONTROL in audit:
        named[CONTROL] = "positive control"
    rows = [["attack", "role", *named.values()]]
    for attack, row in audit[TEACHER].items():
        cells = [auc(audit[name][attack]) for name in named]
        rows.append([audit_tables.title(audit, attack), row["role"], *cells])
    return rows


def released(summary: Summary) -> list[list[str]]:
    """Attacks on the released images."""
    rows = [["attack", "role", "AUC", "corrected", "TPR at 1 % FPR"]]
    for attack, row in summary["audit"][RELEASED].items():
        cells = [row["role"], auc(row), interval(row["auc_ci_corrected"]), tpr(row["tpr_at_fpr"]["0.01"])]
        rows.append([audit_tables.title(summary["audit"], attack), *cells])
    return rows


def low_fpr(summary: Summary) -> list[list[str]]:
    """TPR at low FPR, with the false-positive count that each rests on."""
    audit, titles = summary["audit"], models(summary)
    rows = [["attack", "at FPR", *(f"TPR: {title}" for title in titles.values())]]
    for attack in HEADLINE:
        if attack not in audit[TEACHER]:
            continue
        for rate in audit[TEACHER][attack]["tpr_at_fpr"]:
            cells = [tpr(audit[name][attack]["tpr_at_fpr"][rate]) for name in titles]
            rows.append([audit_tables.title(audit, attack), f"{100 * float(rate):g} %", *cells])
    return rows


def verdict(summary: Summary) -> str:
    """The result in one paragraph of plain words, built from the numbers."""
    teacher, student = (summary[name]["test_accuracy"] for name in ("teacher", "student"))
    data, audit = summary["dataset"], summary.get("audit")
    who = f"A Teacher trained on {data['train']} real images of {data['name']}"
    if summary["config"].get("teacher"):
        who = f"The Teacher that was given to a run on {data['name']}"
    text = (
        f"{who} classifies {percent(teacher)} of {data['test']} real test images correctly. A Student that saw only "
        "synthetic images and "
        f"{LABELS[summary['config'].get('labels', 'soft')]} classifies {percent(student)}: a gap of "
        f"{100 * summary['cas_gap']:.2f} points."
    )
    if not audit:
        return text + " No membership attack was run."
    return f"{text} {sentences.verdict(audit, sentences.OF_RUN)}"


EMPIRICAL = (
    "The protection measured here is empirical. It is not differential privacy and carries no guarantee: it says how "
    "far the attacks named above got, and a stronger attack may get further."
)
UNMEASURED = (
    "No attack was run, so nothing is known of what leaks, and nothing is guaranteed: the training was not "
    "differentially private."
)
OUTSIDE = (
    "Student, synthetic images, cards and ledger in release/ have a guarantee of differential privacy (ledger.json). "
    "Nothing else has: the figures of this page were computed from real images without noise, test accuracy among "
    "them. They are no part of the release, and to publish them, or to choose among runs by them, is not covered."
)
CHOSEN = (
    "Every choice of this run (epoch, checkpoint, sampling) was made on the validation split, which is private data "
    "too; the test split was read once, at the end."
)
UNCHOSEN = (
    "No choice was made on real images: the Teacher is the average of its last steps, checkpoint and period are the "
    "last, sampling is as configured. Validation and test figures were computed for this page alone."
)


def more_time(summary: Summary) -> str:
    """What a larger budget would have helped, by what was still improving when its share of the time ended."""
    budget = summary["budget"]
    names = {"generator": "the generator", "gkd": "the Student"}
    improving = " and ".join(names[stage] for stage in budget["still_improving"])
    if improving:
        text = f"More time would have helped {improving}: the same command with a larger --budget continues."
    else:
        text = "Neither generator nor Student was still improving when it ended: more time would have helped little."
    return " ".join([text, *(f"{note[0].upper()}{note[1:]}." for note in budget["notes"])])


def caveats(summary: Summary) -> list[str]:
    """What the figures do not say, by what was run."""
    lines = [f"Note: {note}." for note in summary.get("notes") or ()]
    audit, private = summary.get("audit"), (summary.get("guarantee") or {}).get("private")
    lines.append(OUTSIDE if private else EMPIRICAL if audit else UNMEASURED)
    if audit:
        lines += [_of_student(summary), _of_images(summary)]
        if CONTROL not in audit and not audit.get("canaries"):
            lines.append("There was no positive control: whether these attacks have power here is not shown.")
    lines.append(UNCHOSEN if summary.get("guarantee") else CHOSEN)
    return lines


def _of_student(summary: Summary) -> str:
    known = "Distillation alone is known to give only limited privacy (Jagielski et al., NeurIPS 2023)."
    if strongest(summary) == TRANSFER:
        return (
            "The Student was attacked with shadows of the Teacher's training only (a transfer attack), a lower bound "
            f"on what it leaks. {known}"
        )
    count, config = summary["audit"]["setting"]["shadow_sets"][FULL]["models"], summary["config"]
    labels = config.get("labels", "soft")
    path = "the Teacher's filter of the images" if labels == "class" else LABELS[labels]
    if not sentences.own_shadows(summary["audit"], FULL):
        known = f"Their Teachers were not made as the Student's was, so this is a transfer attack too. {known}"
    if config.get("generator"):
        return (
            f"The {count} shadow Students learn from images of the generator that the run was given, which the "
            "attacker is given too. If it was trained on members, no shadow shows what a member's part in it gives "
            f"away: their attack then bounds from below what leaks through {path}. {known}"
        )
    if config["audit_generator"] == "shared":
        return (
            f"The {count} shadow Students learn from images of this run's own generator. The attacker is thereby given "
            "the generator, and since it was trained on all members, no shadow shows what a member's part in it gives "
            f"away: their attack bounds from below what leaks through {path}, and says nothing of what leaks through "
            f"the images. {known}"
        )
    return (
        f"The {count} shadow Students had a generator of their own each, trained on the half that their Teacher was "
        "trained on; they share with the Student the sampling that was tuned for it, and the validation split. "
        f"{known}"
    )


def _of_images(summary: Summary) -> str:
    audit, rest = summary["audit"], "Whoever is given the generator can attack it directly, and more images leak more."
    calibrated, weights = audit.get("released_calibrated"), "The generator's weights were not attacked."
    if audit.get("generator"):
        weights = "The attack on the generator's weights stands by itself, as the run does not release them."
    how = "attacked by those of other pipelines alone" if calibrated else "not attacked"
    if RELEASED not in audit:
        if not calibrated and not audit.get("generator"):
            return f"The generator and the synthetic images were not attacked. {rest}"
        return f"The synthetic images were {how}. {weights} {rest}"
    images = f"Released images are the {audit['setting']['targets'][RELEASED]['images']} of "
    if summary["config"].get("fixed_images"):
        images += "all periods, which lie in synthetic/."
    else:
        images += f"the last period, which lie in synthetic/; those of earlier periods were {how}."
    return f"{images} {weights} {rest}"
