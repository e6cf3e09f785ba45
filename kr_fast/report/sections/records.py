"""The risk of single records: how many are found, and by class and group."""

from collections.abc import Iterator, Mapping
from typing import Any

from kr_fast.report import audit_tables
from kr_fast.report.render import Block


def blocks(audit: Mapping[str, Any], labels: Mapping[str, str] | None) -> Iterator[Block]:
    """One heading for each set of shadows."""
    for name in audit.get("records", {}):
        yield "heading", audit_tables.records_title(audit, name, labels)
        yield "text", audit_tables.records_words(audit, name)
        for rows in audit_tables.records(audit, name):
            yield "table", rows
