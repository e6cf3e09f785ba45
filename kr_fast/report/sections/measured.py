"""What an audit measured beside the attacks on each target: on its own page and on that of a run."""

from collections.abc import Iterator, Mapping
from typing import Any

from kr_fast.report.render import Block, Figures
from kr_fast.report.sections import calibrated, canaries, controls, duplicates, generator, records, released


def blocks(audit: Mapping[str, Any], labels: Mapping[str, str] | None, figures: Figures) -> Iterator[Block]:
    """Each heading starts a part that the page folds."""
    yield from records.blocks(audit, labels)
    yield from controls.blocks(audit, labels)
    yield from duplicates.blocks(audit)
    yield from canaries.blocks(audit)
    yield from released.blocks(audit, figures, labels)
    yield from calibrated.blocks(audit)
    yield from generator.blocks(audit)
