"""Options of checkpoint choice, sampling and tuning, and which of them may be together; those of logging."""

from typing import Any

from kr_fast.runtime.errors import fail
from kr_fast.runtime.options import option
from kr_fast.synthesis.trajectory import check_interval

LEAST_LENGTH, MOST_LENGTH = 0.03, 0.2  # of averages that two kept ones make with an error below 5 %
SOLVERS = ("euler", "heun", "dpm++")
WHOLE = (0.0, 1.0)  # the interval of guidance that leaves no step out


class Searched:
    """Fields of a :class:`RecycleConfig`."""

    ema_lengths = option(
        (),
        "further averages of the weights at each checkpoint, by the standard deviation of what they remember as a "
        "share of the steps so far (sigma_rel)",
        least=LEAST_LENGTH,
        most=MOST_LENGTH,
    )
    checkpoint_halving = option(
        False,
        "choose among checkpoints and averages by successive halving: the better half is tried again by Students of "
        "twice as many periods, until one is left",
    )
    guidance_interval = option(
        WHOLE, "first and last share of the solver steps in which guidance applies, before tuning", least=0, most=1
    )
    solver = option(
        "euler",
        "before tuning: euler (DDIM for epsilon and v_prediction), heun (two network calls a step, for flow) or dpm++ "
        "(DPM-Solver++ of second order)",
        choices=SOLVERS,
    )
    tune_guidance_interval = option((), "an interval tried besides the default", least=0, most=1)
    tune_solver = option((), "solvers tried besides the default", choices=SOLVERS)
    tune_images = option(
        (), "images per period tried besides the default, at equal steps of the Student", least=1, most=1_000_000_000
    )
    tune_student_epochs = option(
        (), "passes over a period's images tried besides the default, at equal steps", least=1, most=1_000_000
    )
    log_with = option(
        (),
        "trackers of Accelerate that curves and figures are logged to, such as tensorboard (in OUT/private/logs), "
        "wandb or mlflow",
        repeated=True,
    )
    tune_trials = option(
        0,
        "settings that are compared by successive halving: the default, and quasi-random ones between the default and "
        "the values of tune_ options; 0 for these values one after the other",
        least=0,
        most=10_000,
    )


def calls_of(solver: str, steps: int) -> int:
    """Calls of the generator in ``steps`` of a solver, where none is guided."""
    return 2 * steps - 1 if solver == "heun" else steps


def trajectory_steps(calls: int, few_steps: int) -> int:
    """Steps of the trajectories that a generator of few steps is trained on: ``calls``, up to a multiple of these."""
    return -(-calls // few_steps) * few_steps


def _check_intervals(config: Any) -> None:
    """Refuse an interval of guidance that holds no step of a setting that may be tried; drawn ones are left out."""
    intervals = {"guidance_interval": config.guidance_interval}
    solvers, steps = (config.solver,), (config.num_inference_steps,)
    if not config.tune_trials:
        solvers, steps = (*solvers, *config.tune_solver), (*steps, *config.tune_num_inference_steps)
        intervals |= {"tune_guidance_interval": config.tune_guidance_interval} if config.tune_guidance_interval else {}
    for name, interval in intervals.items():
        tried = {calls_of(solver, count) for solver in solvers for count in steps}
        if config.few_steps:
            tried |= {trajectory_steps(calls, config.few_steps) for calls in tried}
        for calls in sorted(tried):
            check_interval("run", name, interval, calls)


def check_search(config: Any) -> None:
    """Refuse what cannot work together in a :class:`RecycleConfig`. Raises: UserError naming the option."""
    for name, none in (("guidance_interval", False), ("tune_guidance_interval", True)):
        value = getattr(config, name)
        if (value or not none) and (len(value) != 2 or not value[0] < value[1]):
            fail("run", name, f"be {'empty or ' if none else ''}two rising shares in [0, 1]", list(value))
    if "heun" in (config.solver, *config.tune_solver) and config.generator_objective != "flow":
        fail("run", "solver", "be euler or dpm++ unless generator_objective is flow", "heun")
    if config.tune_trials == 1:
        fail("run", "tune_trials", "be 0 or at least 2: the usual setting is one of them", 1)
    if config.tune_trials and (tried := config.tune_guidance_interval):
        usual = config.guidance_interval
        if not max(usual[0], tried[0]) < min(usual[1], tried[1]):
            rule = f"begin and end inside guidance_interval, {list(usual)}, or around it, with tune_trials"
            fail("run", "tune_guidance_interval", rule, list(tried))
    if any(scale != 1 for scale in (config.guidance_scale, *config.tune_guidance_scale)):
        _check_intervals(config)
    elif value := config.tune_guidance_interval:  # its Student would see the same images again
        rule = "be left out where guidance_scale and tune_guidance_scale are 1, which is no guidance"
        fail("run", "tune_guidance_interval", rule, list(value))
    length, rounds = "which decides how long a Student trains", "whose rounds choose the checkpoint"
    untrained, names = "a given one, which has one checkpoint", ("checkpoint_halving", "ema_lengths")
    refused = [(name, "budget", rounds) for name in names]
    refused += [(name, "budget", length) for name in ("tune_images", "tune_student_epochs")]
    refused += [(name, "generator", untrained) for name in names]
    for name, beside, why in refused:
        if (value := getattr(config, name)) and getattr(config, beside):
            value = list(value) if isinstance(value, tuple) else value
            fail("run", name, f"be left out with {beside}, {why}", value)
    for name, usual in (("solver", "euler"), ("tune_solver", ())):
        if config.generator and (value := getattr(config, name)) != usual:
            value = list(value) if isinstance(value, tuple) else value
            fail("run", name, "be left out with generator, a given one, which is sampled by its own scheduler", value)
    lengths = config.ema_lengths
    if len({f"{length:g}" for length in lengths}) < len(lengths):
        fail("run", "ema_lengths", "not repeat", list(lengths))
