"""The parameters of tuning: their configured values, the values tried one at a time, and quasi-random settings."""

import dataclasses
from typing import Any

import torch

from kr_fast.recycling.config import RecycleConfig
from kr_fast.recycling.stages.generation.sampling import Sampling, guides

# Fields of Sampling in the order of the search. The configured value is the option of that name, or of OPTIONS; the
# values tried are those of tune_ and the option's name.
PARAMETERS = ("noise_scale", "guidance_scale", "num_inference_steps", "confidence")
PARAMETERS += ("guidance_interval", "solver", "images", "passes")
OPTIONS = {"passes": "student_epochs"}
OF_SETS = ("images", "passes")  # 0 in a Sampling for the configured value
CHOICES = ("solver", *OF_SETS)  # of which a value in between is not drawn
DIGITS = 3  # behind the point of a drawn number
ALWAYS = ("num_inference_steps", "guidance_scale", "noise_scale", "confidence")  # in every row of the report


def usual(c: RecycleConfig, name: str) -> Any:
    """The configured value of a parameter."""
    return getattr(c, OPTIONS.get(name, name))


def tried(c: RecycleConfig, name: str) -> list[Any]:
    """The other values of a parameter that are to be tried."""
    values = getattr(c, f"tune_{OPTIONS.get(name, name)}")
    values = [values] if name == "guidance_interval" and values else list(values)
    return [value for value in values if value != usual(c, name)]


def with_value(c: RecycleConfig, sampling: Sampling, name: str, value: Any) -> Sampling:
    """``sampling`` with another value of one parameter."""
    configured = name in OF_SETS and value == usual(c, name)
    return dataclasses.replace(sampling, **{name: 0 if configured else value})


def row(c: RecycleConfig, sampling: Sampling) -> dict[str, Any]:
    """The setting for the report: what it is drawn by, and the further parameters for which other values are tried."""
    values = sampling.values()
    names = (*ALWAYS, *(name for name in PARAMETERS if name not in ALWAYS and tried(c, name)))
    values |= {name: values[name] or usual(c, name) for name in OF_SETS}
    return {"checkpoint": sampling.checkpoint, **{name: values[name] for name in names}}


def one_at_a_time(c: RecycleConfig, usual_sampling: Sampling) -> list[Sampling]:
    """Each value tried in the usual setting."""
    return [with_value(c, usual_sampling, name, value) for name in PARAMETERS for value in tried(c, name)]


def costliest(c: RecycleConfig, usual_sampling: Sampling) -> Sampling:
    """The setting of most network calls an image that tuning may choose."""
    options = {name: [usual(c, name), *tried(c, name)] for name in PARAMETERS}
    scales = sorted(options["guidance_scale"], key=lambda scale: scale != 1)
    solvers, intervals = options["solver"], options["guidance_interval"]
    return dataclasses.replace(
        usual_sampling,
        num_inference_steps=max(options["num_inference_steps"]),
        guidance_scale=scales[-1],
        solver="heun" if "heun" in solvers else solvers[0],
        guidance_interval=max(intervals, key=lambda pair: pair[1] - pair[0]),
    )


def drawn_settings(c: RecycleConfig, usual_sampling: Sampling, count: int, seed: int) -> list[Sampling]:
    """``count`` settings, or fewer where some are equal, without the usual one and those whose guidance has no step.

    A scrambled Sobol sequence (Owen, 1998) over the parameters for which values are tried: numbers between the least
    and the greatest of configured value and values tried (an interval's ends each by themselves), else one of them.
    """
    ranges: list[tuple[str, int, list[Any]]] = []
    for name in PARAMETERS:
        if others := tried(c, name):
            values = [usual(c, name), *others]
            parts = zip(*values, strict=True) if name == "guidance_interval" else [values]
            ranges += [(name, at, list(part)) for at, part in enumerate(parts)]
    if not ranges or not count:
        return []
    points = torch.quasirandom.SobolEngine(len(ranges), scramble=True, seed=seed % 2**31).draw(count)
    settings = dict.fromkeys(_setting(c, usual_sampling, ranges, point) for point in points.tolist())
    return [each for each in settings if each != usual_sampling and guides(each)]


def _setting(
    c: RecycleConfig, usual_sampling: Sampling, ranges: list[tuple[str, int, list[Any]]], point: list[float]
) -> Sampling:
    interval, setting = list(usual_sampling.guidance_interval), usual_sampling
    for (name, at, values), share in zip(ranges, point, strict=True):
        if name == "guidance_interval":
            interval[at] = _between(values, share)
        else:
            choices = list(dict.fromkeys(values))
            value = choices[int(share * len(choices))] if name in CHOICES else _between(values, share)
            setting = with_value(c, setting, name, value)
    return dataclasses.replace(setting, guidance_interval=tuple(interval))


def _between(values: list[Any], share: float) -> Any:
    low, high = min(values), max(values)
    return low + int(share * (high - low + 1)) if isinstance(low, int) else round(low + share * (high - low), DIGITS)
