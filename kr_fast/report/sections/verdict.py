"""The verdict: the decision, a sentence for each reason, and the rules behind it."""

from collections.abc import Iterator, Mapping
from typing import Any

from kr_fast.report.render import Block, Verdict
from kr_fast.report.tables import number

STATES = {"share": "good", "do not share": "bad", "not decided": "unknown"}
PASSED = {True: "yes", False: "NO", None: "decides nothing"}


def block(verdict: Mapping[str, Any] | None, sentences: str) -> Block:
    """The verdict of the JSON; of a file that has none, the result in ``sentences``."""
    if verdict is None:
        return "verdict", Verdict("plain", "", [sentences])
    decision = verdict["decision"]
    return "verdict", Verdict(
        STATES[decision], f"{decision[0].upper()}{decision[1:]}", verdict["reasons"], chance(verdict)
    )


def lines(verdict: Mapping[str, Any]) -> list[str]:
    """The lines with which a screen begins."""
    last = "What is measured is empirical and no guarantee, as differential privacy would be."
    return [f"verdict: {verdict['decision']}", *verdict["reasons"], " ".join(filter(None, (chance(verdict), last)))]


def chance(verdict: Mapping[str, Any]) -> str:
    """How often the verdict is "do not share" where nothing leaks."""
    if verdict.get("chance") is None:
        return ""
    return (
        f"Where nothing leaks, chance alone gives “do not share” in at most {100 * verdict['chance']:.3g} % of audits."
    )


def rules(verdict: Mapping[str, Any] | None) -> Iterator[Block]:
    """Each rule with its limit and its figure."""
    if verdict is None or not verdict["rules"]:
        return
    yield "heading", "Rules of the verdict"
    rows = [["rule", "limit", "figure", "kept", "from"]]
    for rule in verdict["rules"]:
        cells = [number(rule["limit"]), "not computed" if rule["value"] is None else number(rule["value"])]
        rows.append([rule["words"], *cells, PASSED[rule["passed"]], rule["source"]])
    yield "table", rows
