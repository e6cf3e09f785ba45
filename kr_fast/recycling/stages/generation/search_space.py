"""The parameters of tuning: their configured values, the values tried one at a time, and quasi-random settings."""

import dataclasses
from typing import Any

from kr_fast.recycling.config import RecycleConfig
from kr_fast.recycling.stages.generation.sampling import Sampling

# Fields of Sampling in the order of the search. The configured value is the option of that name, or of OPTIONS; the
# values tried are those of tune_ and the option's name.
PARAMETERS = ("noise_scale", "guidance_scale", "num_inference_steps", "confidence")
PARAMETERS += ("guidance_interval", "solver", "images", "passes")
OPTIONS = {"passes": "student_epochs"}
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
    configured = name in ("images", "passes") and value == usual(c, name)
    return dataclasses.replace(sampling, **{name: 0 if configured else value})


def row(c: RecycleConfig, sampling: Sampling) -> dict[str, Any]:
    """The setting for the report: what it is drawn by, and the further parameters for which other values are tried."""
    values = sampling.values()
    names = (*ALWAYS, *(name for name in PARAMETERS if name not in ALWAYS and tried(c, name)))
    return {"checkpoint": sampling.checkpoint, **{name: values[name] or usual(c, name) for name in names}}


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
