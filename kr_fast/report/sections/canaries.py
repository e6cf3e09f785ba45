"""Mislabelled canaries: whether an attack of known power finds what a training has memorised."""

from collections.abc import Iterator
from typing import Any

from kr_fast.report.render import Block
from kr_fast.report.tables import interval, number, tpr

NAMES = {"teacher": "the Teacher", "student": "the Student"}


def blocks(audit: dict[str, Any]) -> Iterator[Block]:
    """The section, of an audit that was run with canaries; nothing without.

    Args:
        audit: the dictionary of ``audit.json``; its ``canaries`` are those of
            :func:`kr_fast.recycling.stages.canaries.attack`.
    """
    found = audit.get("canaries")
    if not found:
        return
    yield "heading", "Mislabelled canaries"
    yield "text", explanation(found)
    yield "table", table(found)
    yield "text", verdict(found)


def explanation(found: dict[str, Any]) -> str:
    """What canaries are, and in which models they were."""
    models = " and ".join(f"{found[key]['models']} twins of {name}" for key, name in NAMES.items() if found[key])
    return (
        f"{found['count']} training images got a wrong label (canaries) in {models}, which were made as the models "
        "under attack were; a coin decided for each twin and canary whether the twin was trained on it. Nothing but "
        "having memorised it makes a model answer a wrong label, so an attack that has power finds canaries: the AUC "
        "here is of the same attack, each twin attacked from the others. No model under attack and no other shadow saw "
        "a wrong label."
    )


def table(found: dict[str, Any]) -> list[list[str]]:
    """AUC and TPR on canaries beside the AUC on the model's own members."""
    rates = list(found["teacher"]["tpr_at_fpr"])
    rows = [["recipe", "AUC on canaries", *(f"TPR at {100 * float(rate):g} % FPR" for rate in rates)]]
    rows[0].append("AUC on its own members")
    for key, name in NAMES.items():
        if row := found[key]:
            own = f"{number(row['own']['auc'])} {interval(row['own']['auc_ci'])}"
            tprs = [tpr(row["tpr_at_fpr"][rate]) for rate in rates]
            rows.append([name, f"{number(row['auc'])} {interval(row['auc_ci'])}", *tprs, own])
    return rows


def verdict(found: dict[str, Any]) -> str:
    """Whether the canaries prove that the attack has power, and what reaches the Student."""
    teacher, student = found["teacher"], found["student"]
    on, own = (f"{number(row['auc'])} {interval(row['auc_ci'])}" for row in (teacher, teacher["own"]))
    if found["power"]:
        words = (
            f"The interval on canaries lies above that on the Teacher's own members ({on} against {own}): the attack "
            "finds what this training memorises, so a low AUC on ordinary records is no weakness of the attack."
        )
    else:
        words = (
            f"The interval on canaries does not lie above that on the Teacher's own members ({on} against {own}): this "
            "is no proof that the attack has power. Longer training, more canaries or more shadows may give one."
        )
    if student:
        words += (
            f" In the twins of the Student canaries have an AUC of {number(student['auc'])} "
            f"{interval(student['auc_ci'])}, by way of the Teacher alone, as no generator saw a wrong label: "
        )
        words += (
            "what a Teacher memorised of an unusual record can be found in a Student that never saw a real image, "
            "whatever its AUC on ordinary records."
            if student["auc_ci"][0] > 0.5
            else "a wrong label that a Teacher memorised is not seen in its Student."
        )
    return words
