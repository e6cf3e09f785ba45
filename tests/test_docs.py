"""The code in the README runs as printed, its links lead somewhere, and the settings table is complete."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
GENERATED = ("docs/api/", "docs/reference/options.md")  # when the site is built, see tests/test_site.py
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
NAMES = [str(page.relative_to(ROOT)) for page in PAGES]  # design/ has pages of equal names
CODE = {
    name: re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)
    for name, page in zip(NAMES, PAGES, strict=True)
}
# The README's blocks stand alone, so that each can be copied; those of another page follow one another.
PIECES = [(f"README.md-{number}", code) for number, code in enumerate(CODE.pop("README.md"))]
PIECES += [(name, "\n".join(blocks)) for name, blocks in CODE.items() if blocks]


@pytest.mark.parametrize(("where", "code"), PIECES, ids=[where for where, _ in PIECES])
def test_code_runs(where, code, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    exec(compile(code, where, "exec"), {"__name__": "readme"})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_links_lead_somewhere(page):
    for link, anchor in re.findall(r"\]\(([^)#]*)#?([^)]*)\)", page.read_text()):
        if "://" in link:
            continue
        target = (page.parent / link).resolve() if link else page
        if str(target.relative_to(ROOT)).startswith(GENERATED):
            continue
        assert target.exists(), link
        if anchor:
            titles = re.findall(r"^#+ (.*)$", target.read_text(), re.MULTILINE)
            assert anchor in {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}, anchor


def test_pages_that_the_code_cites_are_there():
    folders = ("kr_fast", "kernels", "csrc", "bench", "tests", "examples")
    sources = [ROOT / "setup.py", ROOT / "Makefile", *(path for name in folders for path in (ROOT / name).rglob("*.*"))]
    for path in sources:
        if path.suffix in ("", ".py", ".h", ".cpp", ".cu", ".sh", ".ipynb"):
            for page in re.findall(r"\bdocs/[\w/]+\.md\b", path.read_text()):
                assert (ROOT / page).exists() or page.startswith(GENERATED), f"{path.relative_to(ROOT)}: {page}"


def test_every_environment_variable_is_listed():
    table = (ROOT / "docs" / "reference" / "environment.md").read_text()
    sources = [ROOT / "setup.py", *(ROOT / "kr_fast").rglob("*.py"), *(ROOT / "csrc").rglob("*.cpp")]
    used = {name for path in sources for name in re.findall(r"\bKR_FAST_[A-Z_]+\b|\bMAX_JOBS\b", path.read_text())}
    assert used
    for name in used:
        assert f"`{name}`" in table, name


def test_backends_table_is_the_registry():
    from kr_fast.backends import registry

    table = (ROOT / "docs" / "ops" / "backends.md").read_text()
    rows = dict(re.findall(r"^\| `(\w+)` \| (.*) \|$", table, re.MULTILINE))
    assert set(rows) == set(registry.ops())
    for op, cells in rows.items():
        claimed = [cell.strip() == "yes" for cell in cells.split("|")]
        assert claimed == [registry.has(op, backend) for backend in registry.BACKENDS], op
