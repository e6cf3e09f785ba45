"""The documentation builds as a site without a warning, loads nothing from elsewhere, and has every name and option."""

import dataclasses
import inspect
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import kr_fast
from kr_fast.membership.audit.config import AuditConfig

ROOT = Path(__file__).resolve().parent.parent
pytest.importorskip("mkdocstrings")


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    out = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(out)]
    paths = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        command,
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": paths, "NO_MKDOCS_2_WARNING": "1"},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "WARNING" not in done.stderr, done.stderr
    return out


def test_nothing_is_loaded_from_elsewhere(site):
    loading = re.compile(r"""<(?:script|img|iframe|link)[^>]*\b(?:src|href)=["']?(?:https?:)?//[^"'> ]+""")
    for page in site.rglob("*.html"):
        assert not [tag for tag in loading.findall(page.read_text()) if 'rel="canonical"' not in tag], page
    for style in site.rglob("*.css"):
        assert not re.search(r"url\([\"']?(?:https?:)?//|@import", style.read_text()), style


def test_every_public_name_has_its_docstring_in_the_api(site):
    text = "\n".join(page.read_text() for page in (site / "api").glob("*.html"))
    for name in kr_fast.__all__:
        value = getattr(kr_fast, name)
        if not name.startswith("__") and not isinstance(value, type(kr_fast)):
            assert f'id="{value.__module__}.{value.__qualname__}"' in text, name


def test_every_option_is_on_the_page_of_options(site):
    text = (site / "reference" / "options.html").read_text()
    for config in (kr_fast.RecycleConfig, AuditConfig):
        for field in dataclasses.fields(config):
            assert "help" not in field.metadata or f"--{field.name.replace('_', '-')}" in text, field.name


def test_documented_arguments_are_those_of_the_signature():
    """griffe would check this, but for ``a, b: text``, which documents two arguments."""
    for name in kr_fast.__all__:
        value = getattr(kr_fast, name)
        section = re.search(r"^Args:\n((?: {4}.*\n?|\n)*)", inspect.getdoc(value) or "", re.MULTILINE)
        if callable(value) and section:
            for documented in re.findall(r"^ {4}(\w[\w., ]*?): ", section[1], re.MULTILINE):
                unknown = set(documented.split(", ")) - set(inspect.signature(value).parameters) - {"..."}
                assert not unknown, f"{name}: {unknown}"
