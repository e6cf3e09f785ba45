"""The verdict: the decision, a sentence for each reason, and the rules behind it."""

from collections.abc import Iterator, Mapping
from typing import Any

from kr_fast.report.render import Block, Verdict
from kr_fast.report.tables import number, private_to

STATES = {"share": "good", "do not share": "bad", "not decided": "unknown"}
PASSED = {True: "yes", False: "NO", None: "decides nothing"}


def block(verdict: Mapping[str, Any] | None, sentences: str) -> Block:
    """The verdict of the JSON; of a file that has none, the result in ``sentences``."""
    if verdict is None:
        return "verdict", Verdict("plain", "", [sentences])
    decision = verdict["decision"]
    return "verdict", Verdict(
        STATES[decision], f"{decision[0].upper()}{decision[1:]}", verdict["reasons"], scope(verdict)
    )


def lines(verdict: Mapping[str, Any], guarantee: Mapping[str, Any] | None = None) -> list[str]:
    """The lines with which a screen begins; ``guarantee``: the entry of that name in a run's metrics, if there is."""
    last = " ".join(filter(None, (scope(verdict), kind(guarantee))))
    return [f"verdict: {verdict['decision']}", *verdict["reasons"], last]


def kind(guarantee: Mapping[str, Any] | None) -> str:
    """That the figures are empirical, and what is guaranteed beside them."""
    if guarantee is None:
        return "What is measured is empirical and no guarantee, as differential privacy would be."
    if not guarantee["private"]:
        return f"What is measured is empirical, and nothing is guaranteed: {guarantee['not_private']}."
    return (
        f"What is measured is empirical. By the ledger, what is released is {private_to(guarantee)}, which "
        "holds against every attack."
    )


def scope(verdict: Mapping[str, Any]) -> str:
    """What the verdict is about, where it is not about all targets, and how often it errs where nothing leaks."""
    sentences = [f"The verdict is about {verdict['about']}."] if verdict.get("about") else []
    if verdict.get("chance") is not None:
        rate = f"{100 * verdict['chance']:.3g} %"
        sentences.append(f"Where nothing leaks, chance alone gives “do not share” in at most {rate} of audits.")
    return " ".join(sentences)


def rules(verdict: Mapping[str, Any] | None) -> Iterator[Block]:
    """Each rule with its limit and its figure."""
    if verdict is None or not verdict["rules"]:
        return
    yield "heading", "Rules of the verdict"
    rows = [["rule", "limit", "figure", "kept", "from"]]
    for rule in verdict["rules"]:
        value = "not computed" if rule["value"] is None else number(rule["value"], limits=(rule["limit"],))
        cells = [number(rule["limit"]), value]
        rows.append([rule["words"], *cells, PASSED[rule["passed"]], rule["source"]])
    yield "table", rows
