"""What an audit measured beside the attacks on each target: on its own page and on that of a run."""

from collections.abc import Iterator, Mapping
from typing import Any

from kr_fast.report.render import Block
from kr_fast.report.sections import canaries, controls, records


def blocks(audit: Mapping[str, Any], labels: Mapping[str, str] | None) -> Iterator[Block]:
    """Each heading starts a part that the page folds."""
    yield from records.blocks(audit, labels)
    yield from controls.blocks(audit, labels)
    yield from canaries.blocks(audit)
