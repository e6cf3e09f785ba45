"""The table between CUDA and Triton: what bench/choices.py makes of measured times."""

import importlib.util
from pathlib import Path

import pytest
import torch

from kr_fast.backends import registry

PATH = Path(__file__).parents[3] / "bench" / "choices.py"
pytestmark = pytest.mark.skipif(not PATH.exists(), reason="needs the source tree")


@pytest.fixture(scope="module")
def choices():
    spec = importlib.util.spec_from_file_location("choices", PATH)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def entry(classes, cuda, triton, dtype="bfloat16"):
    return {"classes": classes, "dtype": dtype, "us": {"cuda": cuda, "triton": triton}}


@pytest.mark.parametrize(
    ("measured", "wanted"),
    [
        ([entry(10, 1, 2)], [(2, 2**28, "bfloat16", "cuda")]),
        ([entry(10, 1, 2), entry(100, 3, 2)], [(2, 100, "bfloat16", "cuda"), (100, 2**28, "bfloat16", "triton")]),
        ([entry(100, 3, 2), entry(10, 1, 2)], [(2, 100, "bfloat16", "cuda"), (100, 2**28, "bfloat16", "triton")]),
        # Less than 3 % faster: the neighbour goes on.
        ([entry(10, 1, 2), entry(100, 2.02, 2), entry(1000, 1, 2)], [(2, 2**28, "bfloat16", "cuda")]),
        (
            [entry(10, 1, 2), entry(10, 2, 1, "float32")],
            [(2, 2**28, "bfloat16", "cuda"), (2, 2**28, "float32", "triton")],
        ),
    ],
)
def test_rows_of_the_table(choices, measured, wanted):
    assert choices.table(measured) == wanted


def test_rows_are_taken_by_the_registry(choices, monkeypatch):
    document = {"gpu": "a GPU", "capability": [9, 0], "torch": "2", "triton": "3"}
    document["measured"] = [entry(10, 1, 2), entry(1000, 3, 2)]
    source = choices.as_source(document)
    assert "a GPU, torch 2, triton 3" in source
    monkeypatch.setattr(registry, "CHOICES", eval(f"({source}\n)", {"torch": torch}) + registry.CHOICES)
    for classes, capability, first in ((999, (9, 0), "cuda"), (1000, (9, 0), "triton"), (1000, (8, 0), "cuda")):
        order = registry.preference("distillation_loss", "cuda", torch.bfloat16, classes, capability)
        assert order[0] == first
    assert registry.preference("distillation_loss", "cuda", torch.float16, 1000, (9, 0))[0] == "cuda"
