"""Images on both sides: how many, and whether they were attacked."""

from collections.abc import Iterator
from typing import Any

from kr_fast.report.render import Block


def blocks(audit: dict[str, Any]) -> Iterator[Block]:
    """One sentence on the near-duplicates among members and non-members; nothing where they were not looked for."""
    found = audit["setting"].get("duplicates")
    if found:
        yield "heading", "Near-duplicates on both sides"
        yield "text", words(found)


def words(found: dict[str, Any]) -> str:
    """How many members and non-members have a near-duplicate on the other side, by which rule."""
    near, exact = found["near"], found["exact"]
    rule = (
        f"a root mean square difference of at most {found['threshold']:.1f} grey levels, a quarter of the median "
        "distance between neighbours on one side"
    )
    if not near["members"]:
        return f"No member is a near-duplicate of a non-member ({rule})."
    left = "They were left out of this audit." if found["left_out"] else "They were attacked like all others."
    return (
        f"{near['members']:,} members and {near['non_members']:,} non-members are near-duplicates of an image on the "
        f"other side ({rule}); {exact['members']:,} and {exact['non_members']:,} of them are the same byte for byte. "
        f"{left}"
    )
