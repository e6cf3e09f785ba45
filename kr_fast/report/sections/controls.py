"""Attacks that have to succeed, and attacks that must not."""

from collections.abc import Iterator, Mapping
from typing import Any

from kr_fast.report import audit_tables, sentences
from kr_fast.report.render import Block


def blocks(audit: Mapping[str, Any], labels: Mapping[str, str] | None) -> Iterator[Block]:
    """The positive controls in words, the negative ones as a table."""
    yield "heading", "Controls"
    if audit["setting"]["control"] is not None:
        yield "text", sentences.of_control(audit)
    elif not audit.get("canaries"):
        yield "text", "There was no positive control: whether these attacks have power is not shown."
    yield from (("text", words) for words in sentences.of_planted(audit, labels))
    if rows := audit_tables.negative_controls(audit, labels):
        yield (
            "text",
            "Attacks that must not succeed. Where one does, the two sides differ without any leakage. Halves are drawn "
            "by rank of the scores, the same for all models, so figures of halves are equal where no scores tie.",
        )
        yield "table", rows
