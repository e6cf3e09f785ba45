"""Blocks of a report as one self-contained HTML page (by the templates in ``templates/``), and as Markdown.

A block is (kind, content):

==========  =======================================================================================================
banner      text above everything that says what must not leave
verdict     :class:`Verdict`
cards       list of :class:`Card`
chart       :class:`Chart`
terms       list of (term, what it means)
heading     text
text        text; so is any other kind, such as ``missing``
note        list of texts
table       rows of cells, the first the header
figure      name of one of the figures
code        text, printed as it is
details     :class:`Details`: a title and the blocks that are folded under it
==========  =======================================================================================================
"""

import base64
import functools
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from kr_fast.report import tables
from kr_fast.runtime.storage import files

SHORT = 32  # letters of a cell that is not broken, so that a narrow page scrolls: a number with its interval
# Never broken over lines, with what closes after it: an interval with the number before it, a percentage, a p. Names
# from outside may look like them: what is not broken is short.
END = r"(?:[+-]?[\d.,]{1,12}(?:e[+-]?\d{1,3})?|-?inf|\?)"
UNBROKEN = re.compile(
    rf"(?:(?:[+-]?(?<!\d)\d[\d.,]{{0,11}}(?: %)? )?\[{END}, {END}\](?: %)?"
    rf"|(?<!\d)\d[\d.,]{{0,11}} %|(?:p (?:=|&lt;) )?(?<!\d)\d[\d.]{{0,5}}e-\d{{1,3}}|p = [\d.]{{1,9}})[).,;:]{{0,3}}"
)
Block = tuple[str, Any]
# Name -> (PNG, alternative text), or (PNG, alternative text, PNG for dark pages).
Figures = dict[str, tuple]
# A figure of a card, as it is written, and the keys that lead to it in the JSON.
Cited = tuple[str, tuple[str | int, ...]]


class Verdict(NamedTuple):
    """``state``: good, bad, unknown or plain; ``decision``: "" where there is none, but the reasons are shown."""

    state: str
    decision: str
    reasons: Sequence[str]
    chance: str = ""


class Track(NamedTuple):
    """A value and its interval on an axis, all in percent of the axis."""

    low: float
    value: float
    high: float
    chance: float


class Card(NamedTuple):
    """One figure that a reader sees first. ``cited`` holds every number of its text."""

    title: str
    state: str
    value: str
    interval: str
    lines: Sequence[str]
    cited: Sequence[Cited]
    track: Track | None = None


class Row(NamedTuple):
    """One row of a chart."""

    label: str
    words: str
    state: str
    text: str
    track: Track


class Chart(NamedTuple):
    """Values with their intervals beside each other. ``ticks``: (percent of the axis, words)."""

    title: str
    rows: Sequence[Row]
    ticks: Sequence[tuple[float, str]]


class Details(NamedTuple):
    """Blocks that a page folds under a title; open in print."""

    title: str
    blocks: Sequence[Block]


def figure(name: str, figures: Figures) -> Block:
    """The figure, or a note that there are no data for it."""
    return ("figure", name) if name in figures else ("missing", f"No data for the figure: {name}.")


def folded(blocks: Iterable[Block]) -> Iterator[Block]:
    """Each heading with what follows it as details; blocks before the first heading as they are."""
    title, inside = None, []
    for block in (*blocks, ("heading", None)):
        if block[0] != "heading":
            inside.append(block)
            continue
        if title is None:
            yield from inside
        else:
            yield "details", Details(title, inside)
        title, inside = block[1], []


def write_html(path: Path, title: str, blocks: Iterable[Block], figures: Figures) -> Path:
    """Write one file: no script, nothing loaded from elsewhere."""
    files.write_text(path, _rendered("page.html", title=title, blocks=list(blocks), figures=figures))
    return path


def fragment(blocks: Iterable[Block], figures: Figures | None = None) -> str:
    """The blocks without a page around them, as a notebook shows them."""
    return _rendered("fragment.html", blocks=list(blocks), figures=figures or {}).strip()


def _rendered(template: str, **values: Any) -> str:
    return _environment().get_template(template).render(**values)


@functools.cache
def _environment() -> Any:
    import jinja2

    loader = jinja2.PackageLoader("kr_fast.report")
    options = {"autoescape": True, "undefined": jinja2.StrictUndefined, "trim_blocks": True, "lstrip_blocks": True}
    environment = jinja2.Environment(loader=loader, **options)
    environment.globals["short"] = SHORT
    environment.filters |= {"unbroken": _unbroken, "data_url": _data_url}
    return environment


def _unbroken(value: Any) -> Any:
    """The text escaped, each interval and percentage in it marked as one that is not broken over lines."""
    import markupsafe

    text = str(markupsafe.escape(str(value)))
    return markupsafe.Markup(UNBROKEN.sub(r'<span class="unbroken">\g<0></span>', text))


def _data_url(image: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(image).decode()}"


def write_markdown(path: Path, title: str, blocks: Iterable[Block], figures: Figures) -> Path:
    """Write the text, and its figures under ``figures/`` beside it."""
    for name, (image, *_) in figures.items():
        files.write_bytes(path.parent / "figures" / f"{name}.png", image)
    files.write_text(path, markdown(title, blocks, figures))
    return path


def markdown(title: str, blocks: Iterable[Block], figures: Figures | None = None) -> str:
    """The blocks as the text of a page; figures are links to ``figures/``."""
    return os.linesep.join([f"# {_plain(title)}", "", *_markdown(blocks, figures or {}, "##")])


def _markdown(blocks: Iterable[Block], figures: Figures, mark: str) -> Iterator[str]:
    for kind, content in blocks:
        if kind == "heading":
            yield f"{mark} {_plain(content)}"
        elif kind == "table":
            yield tables.markdown_table([[_plain(str(cell)) for cell in row] for row in content])
        elif kind == "figure":
            yield f"![{figures[content][1]}](figures/{content}.png)"
        elif kind == "banner":
            yield f"> **{_plain(content)}**"
        elif kind == "code":
            longest = max(map(len, re.findall("`+", content)), default=0)
            fence = "`" * max(3, longest + 1)  # longer than any in the text
            yield f"{fence}\n{content}\n{fence}"
        elif kind == "note":
            yield _bullets(content)
        elif kind == "verdict":
            yield from (f"**Verdict: {_plain(content.decision)}**", "") if content.decision else ()
            yield _bullets(content.reasons) if len(content.reasons) > 1 else _plain(content.reasons[0])
            yield from ("", _plain(content.chance)) if content.chance else ()
        elif kind == "cards":
            rows = [[card.title, f"{card.value} {card.interval}".rstrip(), " ".join(card.lines)] for card in content]
            yield tables.markdown_table([["", "", ""], *([_plain(cell) for cell in row] for row in rows)])
        elif kind == "chart":
            rows = [[row.label, row.words, row.text] for row in content.rows]
            yield tables.markdown_table([[content.title, "", ""], *([_plain(cell) for cell in row] for row in rows)])
        elif kind == "terms":
            yield "\n".join(f"- **{_plain(term)}**: {_plain(words)}" for term, words in content)
        elif kind == "details":
            yield f"{mark} {_plain(content.title)}"
            yield ""
            yield from _markdown(content.blocks, figures, f"{mark}#")
            continue
        else:
            yield _plain(content)
        yield ""


def _bullets(lines: Iterable[str]) -> str:
    return "\n".join(f"- {_plain(line)}" for line in lines)


def _plain(text: str) -> str:
    """Escaped text: class and file names of others must not start a tag, link, image, code or paragraph."""
    line = " ".join(text.split()) if "\n" in text or "\r" in text else text
    return line.replace("<", "&lt;").replace("`", "\\`").replace("](", "]\\(")
