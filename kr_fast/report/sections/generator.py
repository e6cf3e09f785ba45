"""The generator: what it memorised, and what handing it over would leak, by the attack on its weights."""

from collections.abc import Iterator, Mapping
from typing import Any

from kr_fast.report.render import Block
from kr_fast.report.sentences import outcome
from kr_fast.report.tables import interval, number, tpr


def blocks(audit: Mapping[str, Any]) -> Iterator[Block]:
    """The section, where the generator's weights were attacked; nothing elsewhere.

    Args:
        audit: the dictionary of ``audit.json``; its ``generator`` holds the figures of
            :mod:`kr_fast.recycling.stages.generation.generator_attack`.
    """
    if not (figures := audit.get("generator")):
        return
    yield "heading", "The generator's weights"
    yield "text", result(audit)
    yield "table", table(figures)
    yield "text", explanation(figures)


def result(audit: Mapping[str, Any]) -> str:
    """What handing over the generator would cost, in plain words."""
    figures, level = audit["generator"], f"{100 * audit['setting']['level']:g} %"
    pairs = f"names the member in {100 * figures['auc']:.0f} of 100 pairs of a member and a non-member, 50 being chance"
    words = (
        "The generator is not shared: it lies in private/, and only images that it drew are released. Anyone "
        f"given its weights could attack them directly. That attack {outcome(figures['auc_ci'])} (AUC "
        f"{number(figures['auc'])}, {level} interval {interval(figures['auc_ci'])}; it {pairs})"
    )
    if figures["auc_ci"][0] > 0.5:
        words += ": handing over the generator would leak who was in the training set."
    else:
        words += (
            ". No generator that is known to leak was attacked beside it, so this does not show that handing it over "
            "would be safe."
        )
    if recipe := figures.get("recipe"):
        row = recipe["auc"]
        mean = f"{number(row['mean'])} {interval(row['interval'])}".rstrip()
        words += (
            f" On average over {recipe['targets']} generators made as it was, each attacked from the others, the AUC "
            f"is {mean}."
        )
    blind = (audit["setting"].get("negative_controls") or {}).get("blind")
    if blind and not blind["passed"]:
        words += " The images alone tell the two sides apart, so much of this may be that difference and no leakage."
    return words


def table(figures: dict[str, Any]) -> list[list[str]]:
    """The attack named beforehand, then the exploratory ones."""
    rates = list(figures["tpr_at_fpr"])
    rows = [["noise levels", "role", "AUC", *(f"TPR at {100 * float(rate):g} % FPR" for rate in rates)]]
    tprs = [tpr(figures["tpr_at_fpr"][rate]) for rate in rates]
    auc = f"{number(figures['auc'])} {interval(figures['auc_ci'])}"
    rows.append([f"all {len(figures['levels'])}", "named beforehand", auc, *tprs])
    others = [(f"{row['level']:g} alone", row) for row in figures["by_level"]]
    for words, row in (*others, ("all, difficulty not taken off", figures["uncalibrated"])):
        auc = f"{number(row['auc'])} {interval(row['auc_ci_corrected'])}"
        rows.append([words, row["role"], auc, *[""] * len(rates)])
    return rows


def explanation(figures: dict[str, Any]) -> str:
    """How the scores were made, and what was attacked."""
    levels = ", ".join(f"{level:g}" for level in figures["levels"])
    return (
        f"The checkpoint of step {figures['checkpoint']}, {figures['members']} members and {figures['non_members']} "
        f"non-members. Noise is added to each image at levels {levels} (0: the image, 1: noise only), "
        f"{figures['draws']} times each, and the network takes it off; a smaller error speaks for a member. "
        f"{calibration(figures)} The exploratory rows share one error (Bonferroni)."
    )


def calibration(figures: dict[str, Any]) -> str:
    """How the difficulty of each image was taken off."""
    if figures["calibration"] == "retrained":
        return (
            f"Each error is compared with those of {figures['generators']} generators of the same recipe, about half "
            "of which were trained on the image (LiRA)."
        )
    pixels = "what its pixels predict by a regression on other images is taken off"
    words = f"Some images are easier than others: {pixels}."
    if figures["calibration"] == "early checkpoint":
        words = (
            "Some images are easier than others: of each error that of the same training's checkpoint of step "
            f"{figures['early']} is taken off, and of the difference {pixels}."
        )
    return f"{words} An attacker who trains generators of the same recipe gets further (--audit-generator retrained)."


def memorised(summary: Mapping[str, Any]) -> Iterator[Block]:
    """The section on memorisation during training; nothing for a run of a version that did not measure it.

    Args:
        summary: the run's; its ``memorisation`` holds the figures of
            :mod:`kr_fast.recycling.stages.generation.memorisation`.
    """
    if not (figures := summary.get("memorisation")):
        return
    yield "heading", "What the generator memorised"
    yield "text", memorisation(figures)
    yield "table", by_checkpoint(figures)


def memorisation(figures: Mapping[str, Any]) -> str:
    """How it was measured, and what the last checkpoint shows."""
    last, count = figures["rows"][-1], figures["compared"]
    shown = "are" if last["interval"][0] > 0.5 else "are not"
    text = (
        f"{figures['images']} images of each checkpoint, by the sampling before tuning: the share that is nearer to "
        f"the nearest of {count} training images than to that of {count} validation images, 0.5 being chance, with a "
        f"95 % interval, and the ratio of the median distances. Images of the last one {shown} seen to be nearer to "
        "training images. A few copies among many images are not seen in this, nor much where there are few validation "
        "images."
    )
    if figures["limit"] < 1 and figures["rows"][-1]["share"] > figures["limit"]:
        text += f" Training ended there, above the limit of {figures['limit']:g}; checkpoints above it are not used."
    return text


def by_checkpoint(figures: Mapping[str, Any]) -> list[list[str]]:
    """A row for each checkpoint."""
    rows = [["step", "share nearer to training", "95 % interval", "ratio of medians"]]
    for row in figures["rows"]:
        rows.append([str(row["step"]), number(row["share"]), interval(row["interval"]), number(row["ratio"])])
    return rows
