"""The plan of a run with a budget: what each stage costs here is measured, and the time divided by it."""

import dataclasses

from kr_fast.recycling import precision
from kr_fast.recycling.budget import planner
from kr_fast.recycling.budget.ledger import NAME, Ledger
from kr_fast.recycling.context import Context, Precision
from kr_fast.recycling.preflight import time_estimate
from kr_fast.runtime.errors import fail
from kr_fast.runtime.text import duration, seconds

MARGIN = 1.1  # of the least budget: what was measured in a moment is not exact


def ledger(context: Context) -> Ledger:
    """The run's ledger, of an earlier call or new. Nothing is written.

    Raises: UserError for a budget that is too short for one pass of each stage, with the least that would do.
    """
    path, given = context.folder.state / NAME, float(seconds(context.config.budget))
    if (before := Ledger.read(path)) is not None:
        before.budget = given
        return before
    context = dataclasses.replace(context, precision=_precision(context))
    costs, fixed = time_estimate.costs(context, time_estimate.measure(context))
    sizes = time_estimate.asked(context)
    others, shortest = sum(fixed.values()), planner.least(costs, sizes)
    if given - others < planner.total(costs, sizes, shortest):
        least = MARGIN * (others + planner.total(costs, sizes, shortest))
        rule = f"be at least {in_minutes(least)}, which one pass of each stage takes here"
        fail("run", "budget", rule, context.config.budget)
    plan = planner.divide(costs, sizes, given - others)
    planned = {**fixed, **planner.stages(costs, sizes, plan)}
    return Ledger(path, given, costs, sizes, planned, fixed, plan.trial_images, plan.passes)


def _precision(context: Context) -> Precision:
    """That of the run, without a word to the other ranks: they are not here."""
    if context.runtime.device.type == "cpu" and context.journal.done("data") is None:
        return precision.decide(context.config, context.data.image_shape, context.data.num_classes)
    return precision.of_run(context)


def larger(context: Context) -> float | None:
    """The budget in seconds, where an earlier call had a smaller one. Raises: UserError where it had a larger one."""
    given, before = float(seconds(context.config.budget) or 0), Ledger.read(context.folder.state / NAME)
    if before is None or given == before.budget:
        return None
    if given < before.budget:
        rule = f"be at least the {duration(before.budget)} of the run in {context.out}"
        fail("run", "budget", rule, context.config.budget)
    return given


def describe(ledger: Ledger) -> list[str]:
    """The plan in lines for a reader."""
    plan, sizes, c = ledger.plan(), ledger.sizes, ledger.costs
    trials = len(plan.rounds) + sizes.tuned
    measured = (("step of the generator", c.step), ("synthetic image", c.image), ("Student's pass over one", c.trained))
    ends = ", ".join(f"{end:,}" for end in plan.rounds)
    cycles = " + ".join(f"{count:,}" for count in plan.cycles)
    return [
        f"budget: {duration(ledger.budget)}; measured: "
        + ", ".join(f"a {what} {1e3 * cost:.3g} ms" for what, cost in measured),
        f"plan: generator in rounds up to step {ends}, or fewer where rounds bring nothing",
        f"plan: {trials} short Students (rounds and tuning) of {plan.trial_images:,} images, {plan.passes} passes each",
        f"plan: Student of {cycles} periods of {sizes.images:,} images, {plan.passes} passes each",
    ]


def in_minutes(least: float) -> str:
    """The shortest budget of at least so many seconds, as it is given on the command line."""
    return f"{-(-int(least + 1) // 60)}m" if least >= 120 else f"{int(least + 1)}s"


def planned(context: Context) -> Context:
    """The context with the numbers of the plan in its configuration, for estimates of time, memory and disk."""
    if context.ledger is None:
        return context
    plan, c = context.ledger.plan(), context.config
    steps = plan.rounds[-1]
    lengths = {
        "generator_steps": steps,
        "checkpoints": min(len(plan.rounds), max(steps // 2, 1)),
        "trial_images": plan.trial_images,
        "trial_periods": 1,
        "trial_epochs": plan.passes,
        "periods": sum(plan.cycles),
        "student_epochs": plan.passes,
    }
    return dataclasses.replace(context, config=dataclasses.replace(c, **lengths))
