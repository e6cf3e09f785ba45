"""Pages that are written when the site is built: the API from docstrings, the options of the commands from the parser.

Lists in these documents are indented by two spaces, as GitHub reads them; Python-Markdown wants four.
"""

import argparse
import importlib
import inspect
import posixpath
import re
import textwrap
from collections.abc import Iterator
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

# Page of the API -> its package, in the order of the navigation.
PACKAGES = {
    "recycling": "kr_fast.recycling",
    "synthesis": "kr_fast.synthesis",
    "ops": "kr_fast.ops",
    "training": "kr_fast.training",
    "membership": "kr_fast.membership",
    "ensemble": "kr_fast.ensemble",
    "data": "kr_fast.data",
    "privacy": "kr_fast.privacy",
    "models": "kr_fast.models",
    "metrics": "kr_fast.metrics",
}
COMMANDS = ("run", "generator", "distil", "synthesize", "audit", "export", "bench", "info")
ITEM = re.compile(r"^( *)(?:[-*]|\d+\.) ")
LINK = re.compile(r"\[[^\]]*\]\((\.\./[^)#\s]*)\)")
FENCE = re.compile(r"^ *```")


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Put the pages of the API under ``api/index.md`` in the navigation."""
    pages = ["api/index.md", *(f"api/{page}.md" for page in PACKAGES)]
    for section in config.nav:
        for entries in section.values() if isinstance(section, dict) else ():
            if isinstance(entries, list) and "api/index.md" in entries:
                entries[entries.index("api/index.md")] = {"API": pages}
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the generated pages."""
    for path, text in {**api_pages(), "reference/options.md": options_page()}.items():
        files.append(File.generated(config, path, content=text))
    return files


def on_page_markdown(markdown: str, page: Page, **_: Any) -> str:
    """The page as Python-Markdown reads it; links to files of the repository become their paths."""
    folder = posixpath.dirname(page.file.src_uri)

    def path_of(link: re.Match[str]) -> str:
        target = posixpath.normpath(posixpath.join("docs", folder, link[1]))
        return link[0] if target.startswith("docs/") else f"`{target}`"

    return indented(LINK.sub(path_of, markdown))


def indented(markdown: str) -> str:
    """What belongs to an item of a list by four spaces a level, and a blank line between items of several blocks."""
    lines, fence, inside, loose = [], None, False, False
    for line in markdown.split("\n"):
        indent = len(line) - len(line.lstrip(" "))
        item = ITEM.match(line) is not None
        if fence is None and line.strip() and not indent:
            if item and inside and loose and lines[-1].strip():
                lines.append("")
            inside, loose = item, False
        loose = loose or not line.strip()
        shift = fence if fence is not None else (4 * ((indent + 1) // 2) - indent if inside and line.strip() else 0)
        if FENCE.match(line):
            fence = shift if fence is None else None
        lines.append(" " * shift + line if line.strip() else line)
    return "\n".join(lines)


def public() -> dict[str, dict[str, Any]]:
    """Page -> public name, as a user writes it -> object. Each object stands on one page, under its shortest name."""
    import kr_fast

    pages: dict[str, dict[str, Any]] = {page: {} for page in PACKAGES}
    seen = set()
    for name in kr_fast.__all__:
        value = getattr(kr_fast, name)
        if not name.startswith("__") and inspect.getmodule(value) is not None and not inspect.ismodule(value):
            page = value.__module__.split(".")[1]
            pages[page][f"kr_fast.{name}"] = value
            seen.add(id(value))
    for page, package in PACKAGES.items():
        module = importlib.import_module(package)
        for name in module.__all__ if page != "ops" else ():
            value = getattr(module, name)
            if id(value) not in seen:
                pages[page][f"{package}.{name}"] = value
                seen.add(id(value))
    return pages


def api_pages() -> dict[str, str]:
    """Path -> text of each page of the API."""
    index = ["# API\n", "Every public name; those of `kr_fast` itself are loaded when they are first used.\n"]
    texts = {}
    for page, names in public().items():
        package = importlib.import_module(PACKAGES[page])
        first = inspect.getdoc(package).split("\n")[0]
        index += [f"## [{PACKAGES[page]}]({page}.md)\n", f"{first}\n", "| name | |", "|---|---|"]
        blocks = [f"# {PACKAGES[page]}\n", f"{first}\n"]
        for name, value in names.items():
            place, summary = where(name, value)
            index.append(f"| [`{name}`]({page}.md#{place}) | {summary} |")
            if place == name.lower():  # a constant
                words = textwrap.fill(textwrap.shorten(repr(value), 440), 110)
                blocks.append(f"## {name} {{ #{place} }}\n\n```text\n{words}\n```\n")
            else:
                blocks += [f"::: {place}", "    options:", f"      heading: {name}", f"      toc_label: {name}\n"]
        index.append("")
        texts[f"api/{page}.md"] = "\n".join(blocks)
    return {"api/index.md": "\n".join(index), **texts}


def where(name: str, value: Any) -> tuple[str, str]:
    """The path of the definition, which is the anchor, and the first sentence of its docstring."""
    if not (inspect.isclass(value) or inspect.isroutine(value)):
        return name.lower(), "a constant"
    lines = (inspect.getdoc(value) or "").split("\n\n")[0].replace("\n", " ")
    first = lines.partition(". ")[0].rstrip(".").replace("|", "\\|")
    return f"{value.__module__}.{value.__qualname__}", re.sub(r":\w+:(`[^`]+`)", r"\1", first)


def options_page() -> str:
    """The options of every command by group, from the parsers of the command line."""
    from kr_fast import cli

    whole = argparse.ArgumentParser()
    subparsers = whole.add_subparsers()
    for name in COMMANDS:
        importlib.import_module(f"{cli.__name__}.{name}").add(subparsers)
    parts = [
        "# Options of the commands\n",
        "Each can stand in a YAML file too (`--config FILE`), with underscores for hyphens. Of a run the file is "
        "`config.yaml` in its folder. Flags count over the file, the file over the preset, the preset over the "
        "defaults. A flag that takes no value has a negation, `--no-NAME`. Variables of the environment: "
        "[here](environment.md).\n",
    ]
    for name in COMMANDS:
        for prog, parser in parsers(f"kr-fast {name}", subparsers.choices[name]):
            parts += [f"## {prog}\n", *groups(prog, parser)]
    return "\n".join(parts)


def parsers(prog: str, parser: argparse.ArgumentParser) -> Iterator[tuple[str, argparse.ArgumentParser]]:
    """A command, or the commands below it."""
    below = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    if not below:
        yield prog, parser
    for action in below:
        for name, each in action.choices.items():
            yield from parsers(f"{prog} {name}", each)


def groups(prog: str, parser: argparse.ArgumentParser) -> Iterator[str]:
    """A table for each group of options that has any."""
    if parser.description:
        yield f"{plain(parser.description)}\n"
    for group in parser._action_groups:
        actions = [action for action in group._group_actions if action.help != argparse.SUPPRESS]
        actions = [action for action in actions if not isinstance(action, argparse._HelpAction)]
        if not actions:
            continue
        if group.title not in ("options", "positional arguments"):
            yield f"### {prog.removeprefix('kr-fast ')}: {group.title}\n"
        yield "| option | |\n|---|---|"
        for action in actions:
            names = [each for each in action.option_strings if not each.startswith("--no-")]
            yield f"| `{', '.join(names) or action.dest}` | {plain(action.help or '')} |"
        yield ""


def plain(text: str) -> str:
    """A help text as a cell of a table."""
    return re.sub(r"([<>|*_\[\]])", r"\\\1", " ".join(text.replace("%%", "%").split()))
