"""The guarantee of a private run beside what its audit measured: epsilon from above, by the ledger, and from below."""

from collections.abc import Iterator, Mapping
from typing import Any

from kr_fast.report import audit_tables, run_audit
from kr_fast.report.render import Block
from kr_fast.report.tables import lower_bounds, private_to, rounded_down, rounded_up

SHIFTED = (
    "a negative control failed: members and the others differ by themselves, so the bounds may show that difference "
    "and nothing of the training"
)
BOUNDS = {"clopper_pearson": "any threshold", "one_run": "one run", "gaussian": "if Gaussian"}


def contradiction(summary: Mapping[str, Any]) -> str | None:
    """What is wrong where an attack proves more than the ledger allows; None where none does."""
    if not summary.get("guarantee") or not summary.get("audit"):
        return None
    bounds = lower_bounds(summary["guarantee"], summary["audit"])
    named = {**run_audit.models(dict(summary)), run_audit.RELEASED: "released images"}
    found = [
        f"{named.get(each['target'], each['target'])} by {audit_tables.title(summary['audit'], each['attack'])}"
        for each in bounds
        if each["above"]
    ]
    if not found:
        return None
    start = f"An attack proves a larger epsilon than the ledger allows ({', '.join(found)})"
    if _shifted(summary["audit"]):
        return f"{start}, but {SHIFTED}. Whether the training was as the ledger has it is not decided."
    compared = [each for each in bounds if each["above"] is not None]
    chance = sum((1 - each["level"]) * (1 + (each["one_run"] is not None)) for each in compared)
    groups = ""
    if summary["audit"].get("by_group"):
        groups = " (in more where images are in groups, as the bounds take them as independent)"
    return (
        f"{start}. By chance that happens in at most {100 * min(chance, 1.0):.3g} % of audits{groups}: take it that "
        "the training was not as the ledger has it, and release nothing."
    )


def blocks(summary: Mapping[str, Any]) -> Iterator[Block]:
    """The section of a run with a ledger; nothing without.

    Args:
        summary: of the run; its ``guarantee`` is that of :meth:`kr_fast.privacy.Ledger.summary`.
    """
    guarantee, audit = summary.get("guarantee"), summary.get("audit")
    if not guarantee:
        return
    yield "heading", "The guarantee beside the measurement"
    if not guarantee["private"]:
        yield "text", f"Not private: {guarantee['not_private']}. Nothing is guaranteed."
        return
    yield (
        "text",
        f"By the ledger, what is released is {private_to(guarantee)} (neighbouring sets: {guarantee['neighbouring']}): "
        "no attack can do better, whatever it knows. Lower bounds are what the attacks of this audit proved, each "
        "at most the true epsilon in 95 % of audits; far below the ledger's, as a guarantee is for the worst record "
        "and attack, and so few records can show little of it.",
    )
    if audit and _shifted(audit):
        yield "text", f"{SHIFTED[0].upper()}{SHIFTED[1:]}."
    yield "table", _table(summary)
    if audit and any(each["above"] is None for each in lower_bounds(guarantee, audit)):
        yield "text", "The bounds are at a smaller delta than the ledger's epsilon, so the two cannot be compared."


def _shifted(audit: Mapping[str, Any]) -> bool:
    return any(not row["passed"] for _, row in audit_tables.negative_rows(audit))


def _table(summary: Mapping[str, Any]) -> list[list[str]]:
    guarantee, audit = summary["guarantee"], summary.get("audit")
    rows = [["", "epsilon at most", *(f"at least ({words})" for words in BOUNDS.values())]]
    blank = [""] * len(BOUNDS)
    rows.append(["everything released, by the ledger", rounded_up(guarantee["epsilon"]), *blank])
    for each in guarantee["spent"]:
        rows.append([f"{each['for']} alone, by the ledger", rounded_up(each["epsilon_alone"]), *blank])
    named = {**run_audit.models(dict(summary)), run_audit.RELEASED: "released images"}
    for each in lower_bounds(guarantee, audit) if audit else ():
        cells = ["" if each[bound] is None else rounded_down(each[bound]) for bound in BOUNDS]
        title = audit_tables.title(audit, each["attack"])
        rows.append([f"{named.get(each['target'], each['target'])}, by {title}", "", *cells])
    return rows
