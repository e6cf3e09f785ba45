"""Blocks of a report (headings, texts, tables, figures) as one self-contained HTML page, and as Markdown."""

import base64
import html
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from kr_fast.report import tables
from kr_fast.runtime.storage import files

STYLE = """
:root { color-scheme: light dark; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 64rem; margin: 2rem auto; padding: 0 1rem; }
table { border-collapse: collapse; margin: 1rem 0; font-size: 14px; font-variant-numeric: tabular-nums; }
th, td { border-bottom: 1px solid #8886; padding: .3rem .7rem .3rem 0; text-align: left; vertical-align: top; }
th, td.short { white-space: nowrap; }
td.long { min-width: 22rem; }
img { max-width: 100%; background: #fff; border-radius: 4px; }
.table { overflow-x: auto; }
picture img { background: none; }
pre { overflow-x: auto; padding: .8rem; background: #8882; border-radius: 4px; font-size: 13px; }
.banner { border: 3px solid #D55E00; border-radius: 4px; padding: .6rem 1rem; font-weight: 600; }
.note { border-left: 4px solid #D55E00; padding-left: 1.6rem; }
@media print { body { max-width: none; } details > * { display: block; } }
"""
SHORT = 48  # letters of a cell that is not broken, so that a narrow page scrolls: two numbers with their intervals
# (kind, content): "banner", "heading", "text", "note" (list), "table", "figure" (name), "code", "missing".
Block = tuple[str, Any]
# Name -> (PNG, alternative text), or (PNG, alternative text, PNG for dark pages).
Figures = dict[str, tuple]


def figure(name: str, figures: Figures) -> Block:
    """The figure, or a note that there are no data for it."""
    return ("figure", name) if name in figures else ("missing", f"No data for the figure: {name}.")


def write_html(path: Path, title: str, blocks: Iterable[Block], figures: Figures) -> Path:
    """Write one file: no script, nothing loaded from elsewhere."""
    title = html.escape(title)
    head = [
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{title}</title>',
        f'<meta name="viewport" content="width=device-width"><style>{STYLE}</style></head><body><h1>{title}</h1>',
    ]
    files.write_text(path, "\n".join([*head, fragment(blocks, figures), "</body></html>"]))
    return path


def fragment(blocks: Iterable[Block], figures: Figures | None = None) -> str:
    """The blocks without a page around them, as a notebook shows them."""
    parts = []
    for kind, content in blocks:
        if kind == "heading":
            parts.append(f"<h2>{html.escape(content)}</h2>")
        elif kind == "table":
            parts.append(_html_table(content))
        elif kind == "figure":
            parts.append(f"<p>{_html_image(*figures[content])}</p>")
        elif kind == "banner":
            parts.append(f'<p class="banner" role="alert">{html.escape(content)}</p>')
        elif kind == "code":
            parts.append(f"<pre>{html.escape(content)}</pre>")
        elif kind == "note":
            parts.append(f'<ul class="note">{"".join(f"<li>{html.escape(line)}</li>" for line in content)}</ul>')
        else:
            parts.append(f"<p>{html.escape(content)}</p>")
    return "\n".join(parts)


def _html_image(image: bytes, text: str, dark: bytes | None = None) -> str:
    light = f'<img alt="{html.escape(text)}" src="{_data(image)}">'
    if dark is None:
        return light
    return f'<picture><source media="(prefers-color-scheme: dark)" srcset="{_data(dark)}">{light}</picture>'


def _data(image: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(image).decode()}"


def _html_table(rows: list[list[str]]) -> str:
    head = "".join(f'<th scope="col">{html.escape(str(cell))}</th>' for cell in rows[0])
    body = "".join(f"<tr>{''.join(map(_html_cell, row))}</tr>" for row in rows[1:])
    return f'<div class="table"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _html_cell(cell: str) -> str:
    text = str(cell)
    return f'<td class="{"short" if len(text) <= SHORT else "long"}">{html.escape(text)}</td>'


def write_markdown(path: Path, title: str, blocks: Iterable[Block], figures: Figures) -> Path:
    """Write the text, and its figures under ``figures/`` beside it."""
    lines = [f"# {_plain(title)}", ""]
    for name, (image, *_) in figures.items():
        files.write_bytes(path.parent / "figures" / f"{name}.png", image)
    for kind, content in blocks:
        if kind == "heading":
            lines.append(f"## {_plain(content)}")
        elif kind == "table":
            lines.append(tables.markdown_table([[_plain(str(cell)) for cell in row] for row in content]))
        elif kind == "figure":
            lines.append(f"![{figures[content][1]}](figures/{content}.png)")
        elif kind == "banner":
            lines.append(f"> **{_plain(content)}**")
        elif kind == "code":
            longest = max(map(len, re.findall("`+", content)), default=0)
            fence = "`" * max(3, longest + 1)  # longer than any in the text
            lines.append(f"{fence}\n{content}\n{fence}")
        elif kind == "note":
            lines.append("\n".join(f"- {_plain(line)}" for line in content))
        else:
            lines.append(_plain(content))
        lines.append("")
    files.write_text(path, os.linesep.join(lines))
    return path


def _plain(text: str) -> str:
    """Escaped text: class and file names of others must not start a tag, link, image, code or paragraph."""
    line = " ".join(text.split()) if "\n" in text or "\r" in text else text
    return line.replace("<", "&lt;").replace("`", "\\`").replace("](", "]\\(")
