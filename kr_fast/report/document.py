"""The report as a document: the same sections once as HTML and once as Markdown."""

import base64
import html
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from kr_fast.report import tables
from kr_fast.runtime import files

STYLE = """
:root { color-scheme: light dark; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
table { border-collapse: collapse; margin: 1rem 0; font-variant-numeric: tabular-nums; }
th, td { border-bottom: 1px solid #8886; padding: .3rem .8rem .3rem 0; text-align: left; vertical-align: top; }
img { max-width: 100%; background: #fff; border-radius: 4px; }
pre { overflow-x: auto; padding: .8rem; background: #8882; border-radius: 4px; font-size: 13px; }
.note { border-left: 4px solid #D55E00; padding-left: 1rem; }
@media print { body { max-width: none; } details > * { display: block; } }
"""
# (kind, content): "heading", "text", "note" (list), "table", "figure" (name), "code", "missing".
Block = tuple[str, Any]


def blocks(summary: dict[str, Any], figures: dict[str, tuple[bytes, str]]) -> Iterator[Block]:
    """The sections of the report, in the order in which a reader wants them."""
    yield "text", tables.verdict(summary)
    yield "table", tables.headline(summary)
    yield "text", "Intervals are 95 %: Wilson for accuracies, DeLong for AUC. CAS: Classification Accuracy Score."
    yield "heading", "What these figures do not say"
    yield "note", tables.caveats(summary)
    yield "heading", "Real and synthetic images"
    yield _figure("images", figures)
    yield "heading", "Membership attacks"
    if summary.get("audit"):
        setting = summary["audit"]["setting"]
        yield (
            "text",
            f"{setting['members']} members (training split) and {setting['non_members']} non-members (test split); "
            f"{setting['num_shadows']} shadow models of the Teacher's recipe, each on a random half of all of them; "
            f"queries: {setting['augment']}; LiRA variance: {setting['lira_variance']}.",
        )
        yield "table", tables.low_fpr(summary)
        yield (
            "text",
            "TPR is taken at the largest realised FPR that is at most the stated one. Its interval covers the TPR at "
            "the threshold whose true FPR is the stated one; below 10 false positives only the interval is quoted.",
        )
        yield _figure("roc", figures)
    else:
        yield "missing", "No audit was run."
    yield "heading", "Training"
    yield _figure("curves", figures)
    for title, key in (("Checkpoint Optimisation", "checkpoints"), ("Tuning", "tuning")):
        yield "heading", title
        if summary.get(key):
            yield "text", "Accuracy of a short Student on real validation images."
            yield "table", tables.trials(summary[key])
        else:
            yield "missing", f"{title} was not run."
    yield "heading", "Time"
    if summary.get("stages"):
        yield "table", tables.stages(summary)
        yield _figure("stages", figures)
    yield "heading", "What was run"
    data = summary["dataset"]
    yield (
        "text",
        f"Data: {data['name']}, {data['num_classes']} classes, {data['train']} / {data['val']} / {data['test']} images "
        f"for training / validation / test, {data['height']} x {data['width']} x {data['channels']}. "
        f"Seed {summary['seed']}.",
    )
    yield "code", summary["command"]
    yield "table", [["package", "version"], *([key, value] for key, value in summary["versions"].items())]
    yield "code", json.dumps(summary["config"], indent=1)


def _figure(name: str, figures: dict[str, tuple[bytes, str]]) -> Block:
    return ("figure", name) if name in figures else ("missing", f"No data for the figure: {name}.")


def write_html(out: Path, summary: dict[str, Any], figures: dict[str, tuple[bytes, str]]) -> Path:
    """Write ``report.html``: one file, no script, nothing loaded from elsewhere."""
    title = html.escape(summary["title"])
    parts = [
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{title}</title>',
        f'<meta name="viewport" content="width=device-width"><style>{STYLE}</style></head><body><h1>{title}</h1>',
    ]
    for kind, content in blocks(summary, figures):
        if kind == "heading":
            parts.append(f"<h2>{html.escape(content)}</h2>")
        elif kind == "table":
            parts.append(_html_table(content))
        elif kind == "figure":
            image, text = figures[content]
            data = base64.b64encode(image).decode()
            parts.append(f'<p><img alt="{html.escape(text)}" src="data:image/png;base64,{data}"></p>')
        elif kind == "code":
            parts.append(f"<pre>{html.escape(content)}</pre>")
        elif kind == "note":
            parts.append(f'<ul class="note">{"".join(f"<li>{html.escape(line)}</li>" for line in content)}</ul>')
        else:
            parts.append(f"<p>{html.escape(content)}</p>")
    path = out / "report.html"
    files.write_text(path, "\n".join([*parts, "</body></html>"]))
    return path


def _html_table(rows: list[list[str]]) -> str:
    head = "".join(f'<th scope="col">{html.escape(str(cell))}</th>' for cell in rows[0])
    body = "".join(f"<tr>{''.join(f'<td>{html.escape(str(cell))}</td>' for cell in row)}</tr>" for row in rows[1:])
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def write_markdown(out: Path, summary: dict[str, Any], figures: dict[str, tuple[bytes, str]]) -> Path:
    """Write ``report.md`` and its figures under ``figures/``."""
    lines = [f"# {_plain(summary['title'])}", ""]
    for name, (image, _) in figures.items():
        files.write_bytes(out / "figures" / f"{name}.png", image)
    for kind, content in blocks(summary, figures):
        if kind == "heading":
            lines.append(f"## {_plain(content)}")
        elif kind == "table":
            lines.append(tables.markdown_table([[_plain(str(cell)) for cell in row] for row in content]))
        elif kind == "figure":
            lines.append(f"![{figures[content][1]}](figures/{content}.png)")
        elif kind == "code":
            lines.append(f"```\n{content}\n```")
        elif kind == "note":
            lines.append("\n".join(f"- {_plain(line)}" for line in content))
        else:
            lines.append(_plain(content))
        lines.append("")
    path = out / "report.md"
    files.write_text(path, os.linesep.join(lines))
    return path


def _plain(text: str) -> str:
    """Class and file names come from outside: no tags in Markdown either."""
    return text.replace("<", "&lt;")
