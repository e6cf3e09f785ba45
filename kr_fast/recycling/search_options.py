"""What options of checkpoint choice, sampling and tuning may be together."""

from typing import Any

from kr_fast.runtime.errors import fail

SOLVERS = ("euler", "heun", "dpm++")
WHOLE = (0.0, 1.0)  # the interval of guidance that leaves no step out


def check_search(config: Any) -> None:
    """Refuse what cannot work together in a :class:`RecycleConfig`. Raises: UserError naming the option."""
    for name, none in (("guidance_interval", False), ("tune_guidance_interval", True)):
        value = getattr(config, name)
        if (value or not none) and (len(value) != 2 or not value[0] < value[1]):
            fail("run", name, f"be {'empty or ' if none else ''}two rising shares in [0, 1]", list(value))
    if "heun" in (config.solver, *config.tune_solver) and config.generator_objective != "flow":
        fail("run", "solver", "be euler or dpm++ unless generator_objective is flow", "heun")
    if config.budget:
        for name in ("tune_images", "tune_student_epochs"):
            if getattr(config, name):
                fail("run", name, "be left out with a budget, which decides how long a Student trains", "some")
