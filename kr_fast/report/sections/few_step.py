"""The few-step generator beside the many-step one that it was made from."""

from collections.abc import Iterator, Mapping
from typing import Any

from kr_fast.report.render import Block

WORDS = {"accuracy": "accuracy", "auc": "AUC"}


def blocks(summary: Mapping[str, Any]) -> Iterator[Block]:
    """The section, where the run made one; nothing elsewhere.

    Args:
        summary: of the run; its ``few_step`` holds what :mod:`kr_fast.recycling.stages.generation.few_step` returned.
    """
    if not (few := summary.get("few_step")):
        return
    many, by = few["many_step"], "auc" if "val_auc" in few else "accuracy"
    yield "heading", "The few-step generator"
    yield (
        "text",
        "It learned where the solver of the many-step generator goes, with the tuned guidance and noise scale. Every "
        "image of the Student was drawn from it. Validation is of a short Student of each, images per second are the "
        "sampler's alone.",
    )
    yield (
        "table",
        [
            ["generator", "solver steps", "network calls per image", f"validation {WORDS[by]}", "images per second"],
            _row("many-step", many["num_inference_steps"], many["network_calls"], many, by),
            _row("few-step", few["steps"], few["steps"], few, by),
        ],
    )
    yield "text", f"It draws {few['speedup']:.1f} times as many images per second."


def _row(name: str, steps: int, calls: int, figures: Mapping[str, Any], by: str) -> list[str]:
    return [name, str(steps), str(calls), f"{figures[f'val_{by}']:.4f}", f"{figures['images_per_second']:.0f}"]
