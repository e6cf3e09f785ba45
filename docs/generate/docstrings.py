"""Docstrings as Markdown: roles of reST become code, and sections of one line begin with their name in bold."""

import re
from typing import Any

import griffe

ROLE = re.compile(r":(?:func|class|meth|mod|data|attr):`~?\.?([^`]+)`")
ONE_LINE = re.compile(r"^(Args|Returns|Raises|Yields): (?=\S)", re.MULTILINE)


class Markdown(griffe.Extension):
    """Rewrites each docstring before its sections are parsed."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring:
            text = ROLE.sub(r"`\1`", obj.docstring.value)
            obj.docstring.value = ONE_LINE.sub(r"\n**\1:** ", text)
