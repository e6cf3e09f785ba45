"""What users and their editors see: lazy names are typed alike, annotations and docstrings are complete."""

import ast
import importlib
import inspect
import re
import textwrap
import typing
from collections import abc
from pathlib import Path

import pytest

import kr_fast

PACKAGES = ("data", "ensemble", "membership", "metrics", "models", "privacy", "recycling", "synthesis")
OBJECTS = {name: getattr(kr_fast, name) for name in kr_fast.__all__ if name != "__version__"}
for package in PACKAGES:
    module = importlib.import_module(f"kr_fast.{package}")
    OBJECTS |= {f"{package}.{name}": getattr(module, name) for name in module.__all__}


def documented(name, thing):
    """(name, class or function, text it may rely on) of a public object and of the public methods of a class."""
    yield name, thing, ""
    if inspect.isclass(thing):
        for key, value in vars(thing).items():
            value = getattr(value, "__func__", getattr(value, "fget", getattr(value, "func", value)))
            ours = inspect.isfunction(value) and "/kr_fast/" in value.__code__.co_filename
            if ours and (key in ("__init__", "__call__") or not key.startswith("_")):
                yield f"{name}.{key}", value, inspect.getdoc(thing) or ""


DOCUMENTED = {
    id(thing): (name, thing, text)
    for public, value in OBJECTS.items()
    if callable(value)
    for name, thing, text in documented(public, value)
}.values()


def seen_by_checkers(module):
    """Name -> module of what a file imports for type checkers alone."""
    tree = ast.parse(Path(module.__file__).read_text())
    block = next(node for node in tree.body if isinstance(node, ast.If) and node.test.id == "TYPE_CHECKING")
    found = [(alias, node.module) for node in block.body for alias in node.names]
    assert all(alias.asname == alias.name for alias, _ in found)  # "X as X" is exported, "X" alone is not
    return {alias.name: module for alias, module in found}


def test_lazy_names_are_those_that_type_checkers_see():
    lazy = seen_by_checkers(kr_fast)
    assert set(dir(kr_fast)) == {*kr_fast.__all__, *PACKAGES} == {*lazy, "__version__"}
    for name, module in lazy.items():
        known = importlib.import_module(f"kr_fast.{name}") if name in PACKAGES else OBJECTS[name]
        assert known is getattr(kr_fast, name) is getattr(importlib.import_module(module), name)
    with pytest.raises(AttributeError, match="module 'kr_fast' has no attribute 'x'"):
        _ = kr_fast.x
    lazy = seen_by_checkers(kr_fast.recycling)
    assert set(kr_fast.recycling.__all__) == {*lazy, "RecycleConfig"}
    for name, module in lazy.items():
        assert getattr(kr_fast.recycling, name) is getattr(importlib.import_module(module), name)
    with pytest.raises(AttributeError, match="module 'kr_fast.recycling' has no attribute 'x'"):
        _ = kr_fast.recycling.x


@pytest.mark.parametrize(("name", "thing", "text"), DOCUMENTED, ids=[name for name, _, _ in DOCUMENTED])
def test_docstrings_name_arguments_and_errors(name, thing, text):
    doc = thing.__doc__ or ""
    assert doc.strip() or name.endswith((".__init__", ".__call__", ".forward"))  # which the class describes
    if inspect.isclass(thing):
        return
    doc = f"{doc} {text}"
    if (name in OBJECTS or name.endswith(".__init__")) and not re.search(r"[Aa]s\s+:func:", doc):
        parameters = [each for each in inspect.signature(thing).parameters if each != "self"]
        assert [each for each in parameters if not re.search(rf"\b{each}\b", doc)] == []
    tree = ast.parse(textwrap.dedent(inspect.getsource(thing)))
    refuses = any(
        isinstance(node, ast.Raise)
        or (isinstance(node, ast.Call) and getattr(node.func, "id", getattr(node.func, "attr", "")) == "fail")
        for node in ast.walk(tree)
    )
    assert not refuses or re.search("Raises|Error", doc)


def bare(hint):
    """Whether a generic without its arguments, a dict say, is in an annotation: type checkers then know nothing."""
    generic = {dict, list, tuple, set, type, abc.Callable, abc.Iterable, abc.Iterator, abc.Mapping, abc.Sequence}
    return any(hint is each for each in generic) or any(bare(each) for each in typing.get_args(hint))


def test_annotations_are_complete():
    incomplete = []
    for name, thing, _ in DOCUMENTED:
        if inspect.isclass(thing):
            continue
        hints = typing.get_type_hints(thing)
        own = [each for each in inspect.signature(thing).parameters if each not in ("self", "cls")]
        own += [] if name.endswith("__init__") else ["return"]
        incomplete += [f"{name}: {each}" for each in own if each not in hints or bare(hints[each])]
    assert incomplete == []
