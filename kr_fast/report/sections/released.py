"""The tests of released images: are members nearer to them than held-out images, which are the non-members?"""

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from kr_fast.report import audit_plots
from kr_fast.report.render import Block, Figures
from kr_fast.report.tables import interval, number, p_value, percent, stated

Audit = dict[str, Any]
SPACES = ("pixels", "features")
LIMITS = (
    "A small p says that the released images are nearer to members than chance allows. A large one says little: "
    "releases that pass tests of distances can leak to membership attacks all the same (Yao et al., 2025)."
)
FEATURES = (
    "Features are those of a shadow model, what its last layer reads. The features of a model that was trained on the "
    "members would tell them from others whatever was released."
)


def blocks(audit: Audit, figures: Figures, labels: Mapping[str, str] | None = None) -> Iterator[Block]:
    """For each released set: the result, the tests, the distances, and the closest pairs if they may be shown."""
    for name, row in (audit.get("released_tests") or {}).items():
        label = (labels or {}).get(name, name)
        yield "heading", f"Tests of {label}" if label.startswith("the ") else f"Tests of released images: {label}"
        yield "text", words(row, audit["setting"]["level"])
        yield "table", tests(row)
        yield "text", LIMITS + (f" {FEATURES}" if row["features"] else "")
        yield "table", distances(row)
        yield "text", explained(row)
        shown, pairs = f"closest {name}", (audit.get("closest_pairs") or {}).get(name)
        if pairs and (shown in figures or audit.get("show_records")):
            yield (
                "text",
                "The members that released images come closest to, beside how far the nearest held-out image is:",
            )
            if shown in figures:
                yield "figure", shown
            if audit.get("show_records"):
                yield "table", closest(pairs)


def words(row: dict[str, Any], level: float) -> str:
    """The result of all tests of one set in plain words."""
    pixels, groups = row["pixels"], "Of each group of images one was drawn. " if row.get("by_group") else ""
    start = (
        f"{groups}Beside {pixels['held_out']:,} held-out images, which are non-members, the {pixels['members']:,} "
        "members are"
    )
    seen = "" if row["p"] < 1 - level else "not seen to be "
    end = f"nearer to the {pixels['synthetic']:,} released images (smallest corrected {stated(row['p'])})."
    copies = pixels["memorised"]["copies"]
    if copies and any(copies.values()):
        end += (
            f" {copies['members']:,} released images are members, pixel for pixel, and {copies['held_out']:,} are "
            "held-out images."
        )
    return f"{start} {seen}{end}"


def tests(row: dict[str, Any]) -> list[list[str]]:
    """One row for each test and space: the result, what chance gives, p by itself and corrected for all of them."""
    table = [["test", "distances in", "result", "by chance", "p", "corrected p"]]
    for space, each in _spaces(row):
        memorised, dcr = each["memorised"], each["dcr"]
        cells = {
            "nearer": (
                "a member is nearer to the released images than a held-out image",
                _auc(each["nearer"]),
                "0.500",
            ),
            "dcr": ("closest record of a released image is a member", percent(dcr["share"]), percent(dcr["expected"])),
            "medoids": (
                f"a member is nearer to the {each['medoids']['clusters']} cluster medoids",
                _auc(each["medoids"]),
                "0.500",
            ),
            "memorised": (
                "members that a released image comes closer to than to held-out images",
                f"{memorised['count']:,}",
                f"at most {number(memorised['expected'], 1)}",
            ),
        }
        for test, (title, result, chance) in cells.items():
            table.append([title, space, result, chance, *(p_value(each[test][key]) for key in ("p", "p_corrected"))])
    return table


def distances(row: dict[str, Any]) -> list[list[str]]:
    """Distance to the closest record, its ratio to the second closest, medoids with a record nearby."""
    table = [["of equally many records", "distances in", "members", "held-out images"]]
    for space, each in _spaces(row):
        digits = 1 if space == "pixels" else 3
        for title, values, places in (
            ("distance to the closest record (DCR)", each["dcr"], digits),
            ("nearest neighbour distance ratio (NNDR)", each["nndr"], 3),
        ):
            for key, word in (("median", "median"), ("low", "5th percentile")):
                cells = (number(values[side][key], places) for side in ("members", "held_out"))
                table.append([f"{title}, {word}", space, *cells])
        hits = each["medoids"]["hits"]
        table.append(["medoids with a record nearby", space, percent(hits["members"]), percent(hits["held_out"])])
    return table


def explained(row: dict[str, Any]) -> str:
    """How the rows of the tables are to be read."""
    pixels = row["pixels"]
    return (
        "Distances are root mean square differences: grey levels of pixels, units of features. For what depends on how "
        f"many records there are, {pixels['matched']:,} were drawn on each side. Nearby is within the radius that "
        f"holds 5 % of the held-out images, and {percent(pixels['medoids']['coverage'])} of the members in pixels. A "
        "member counts as closer than held-out images if a released image comes closer to it, measured by that image's "
        "distance to the nearest of one half of the held-out images, than any does to 99 % of the other half."
    )


def closest(pairs: list[dict[str, Any]]) -> list[list[str]]:
    """The members that a released image comes closest to."""
    table = [["index", "class", "released image", "distance", "share of the distance to a held-out image"]]
    for row in pairs:
        label = "" if row["label"] is None else str(row["label"])
        cells = (number(row["distance"], 1), number(row["ratio"], 2))
        table.append([str(row["index"]), label, str(row["synthetic"]), *cells])
    return table


def figures(audit: Audit, images: np.ndarray, synthetic: Mapping[str, np.ndarray]) -> dict[str, tuple]:
    """Released set -> the closest pairs as pictures, each member to the right of the released image."""
    drawn = {}
    for name, pairs in (audit.get("closest_pairs") or {}).items():
        if not pairs or name not in synthetic:
            continue
        shown, captions = [], []
        for row in pairs:
            shown += [synthetic[name][row["synthetic"]], images[row["position"]]]
            member = f"#{row['index']}" if audit["show_records"] else "member"
            captions += ["released", f"{member} · {row['ratio']:.2f}"]
        light, dark = audit_plots.in_both_themes(audit_plots.gallery, np.stack(shown), captions)
        drawn[f"closest {name}"] = (light, f"Released images of {name} beside the members nearest to them", dark)
    return drawn


def _spaces(row: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    return [(space, row[space]) for space in SPACES if row[space]]


def _auc(row: dict[str, Any]) -> str:
    return f"{number(row['auc'])} {interval(row['interval'])}"
