"""The risk of single records: how many are found, and by class and group; and membership counted by group."""

from collections.abc import Iterator, Mapping
from typing import Any

from kr_fast.report import audit_tables
from kr_fast.report.render import Block
from kr_fast.report.sentences import maker, primary_of, target_title, title
from kr_fast.report.tables import interval, number, percent, tpr


def blocks(audit: Mapping[str, Any], labels: Mapping[str, str] | None) -> Iterator[Block]:
    """One heading for each set of shadows."""
    for name in audit.get("records", {}):
        yield "heading", audit_tables.records_title(audit, name, labels)
        yield "text", audit_tables.records_words(audit, name)
        for rows in audit_tables.records(audit, name):
            yield "table", rows
    if audit.get("by_group"):
        yield "heading", "Membership counted by group"
        yield "text", words(audit, labels)
        if rows := table(audit, labels):
            yield "table", rows


def words(audit: Mapping[str, Any], labels: Mapping[str, str] | None = None) -> str:
    """What the units are, and how many of them are found."""
    counted = audit["by_group"]
    text = (
        f"The images are of {counted['groups']:,} groups, such as patients or sites. Images of one "
        "group are alike: intervals of AUCs over images take whole groups as units, and here a group counts once, with "
        "the mean score of its images."
    )
    if counted["mixed"]:
        text += f" {counted['mixed']:,} groups with members and non-members are left out."
    for name, row in counted["records"].items():
        if row["tested"]:
            text += (
                f" By the models {maker(audit, name, labels)}, {row['found']:,} of {row['tested']:,} groups are found "
                f"at a false discovery rate of {percent(row['rate'])}; the largest advantage is "
                f"{number(row['largest_advantage'], 2)}."
            )
    if not counted["records"] and audit["setting"]["shadow_sets"]:
        text += " Single groups were not tested: shadows were trained on parts of groups."
    return text


def table(audit: Mapping[str, Any], labels: Mapping[str, str] | None = None) -> list[list[str]]:
    """The attack named beforehand on each target, and the mean over the models of each recipe."""
    rows = [["on", "attack", "member groups", "other groups", "AUC", "TPR at 10 % FPR"]]
    counted = audit["by_group"]
    for name, row in counted["targets"].items():
        sizes = [f"{counted[side]:,}" for side in ("members", "non_members")]
        auc = f"{number(row['auc'])} {interval(row['auc_ci'])}"
        rows.append(
            [target_title(audit, name, labels), title(audit, row["attack"]), *sizes, auc, tpr(row["tpr_at_fpr"]["0.1"])]
        )
    for name, row in counted["recipes"].items():
        auc = f"{number(row['auc']['mean'])} {interval(row['auc']['interval'])}"
        on = f"{row['targets']} models {maker(audit, name, labels)}"
        rows.append([on, title(audit, primary_of(audit, name)), "", "", auc, ""])
    return rows if len(rows) > 1 else []
