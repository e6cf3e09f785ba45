"""The few-step generator beside the many-step one that it was made from."""

from collections.abc import Iterator, Mapping
from typing import Any

from kr_fast.report.render import Block

SCORES = {"val_accuracy": "accuracy", "val_auc": "AUC"}


def blocks(summary: Mapping[str, Any]) -> Iterator[Block]:
    """The section, where the run made one; nothing elsewhere.

    Args:
        summary: of the run; its ``few_step`` holds what :mod:`kr_fast.recycling.stages.generation.few_step` returned.
    """
    if not (few := summary.get("few_step")):
        return
    many, score = few["many_step"], next((name for name in SCORES if name in few), None)  # none with epsilon
    yield "heading", "The few-step generator"
    validation = "Validation is of a short Student of each, images" if score else "Images"
    yield (
        "text",
        "It learned where the solver of the many-step generator goes, with the tuned guidance and noise scale. Every "
        f"image of the Student was drawn from it. {validation} per second are the sampler's alone.",
    )
    scored = [f"validation {SCORES[score]}"] if score else []
    yield (
        "table",
        [
            ["generator", "solver steps", "network calls per image", *scored, "images per second"],
            _row("many-step", many["num_inference_steps"], many["network_calls"], many, score),
            _row("few-step", few["steps"], few["steps"], few, score),
        ],
    )
    yield "text", f"It draws {few['speedup']:.1f} times as many images per second."


def _row(name: str, steps: int, calls: int, figures: Mapping[str, Any], score: str | None) -> list[str]:
    scored = [f"{figures[score]:.4f}"] if score else []
    return [name, str(steps), str(calls), *scored, f"{figures['images_per_second']:.0f}"]
