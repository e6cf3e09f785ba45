"""What users and their editors see: names that load lazily are typed alike."""

import ast
import importlib
from pathlib import Path

import pytest

import kr_fast

PACKAGES = ("data", "ensemble", "membership", "metrics", "models", "recycling", "synthesis")


def test_lazy_names_are_those_that_type_checkers_see():
    tree = ast.parse(Path(kr_fast.__file__).read_text())
    block = next(node for node in tree.body if isinstance(node, ast.If) and node.test.id == "TYPE_CHECKING")
    seen = {alias.asname: (node.module, alias.name) for node in block.body for alias in node.names}
    assert all(name == of for name, (_, of) in seen.items())  # "X as X" is exported, "X" alone is not
    packages = dict.fromkeys(PACKAGES, "kr_fast")
    lazy = {name: module for name, (module, _) in seen.items()}
    table = next(
        ast.literal_eval(node.value)
        for node in tree.body
        if isinstance(node, ast.Assign) and node.targets[0].id == "_PUBLIC"
    )
    assert lazy == table | packages
    assert set(dir(kr_fast)) == {*kr_fast.__all__, *PACKAGES} == {*lazy, "__version__"}
    for name in PACKAGES:
        assert getattr(kr_fast, name) is importlib.import_module(f"kr_fast.{name}")
    with pytest.raises(AttributeError, match="module 'kr_fast' has no attribute 'x'"):
        _ = kr_fast.x
