"""The stage ``privacy``: how much noise each use of the training images gets, booked in a ledger before it is made.

The noise follows from the options and the number of training images alone, and is recorded once, so that a run that is
continued trains with the same.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from kr_fast.privacy.accounting import Gaussian, PureDP, calibrate
from kr_fast.privacy.ledger import Ledger
from kr_fast.recycling.context import Context
from kr_fast.recycling.dp import spending
from kr_fast.recycling.dp.spending import COUNTS, GENERATOR, TEACHER, Spending
from kr_fast.runtime.errors import fail

SEEDED = "private noise and sampling come from a seed (dp_seed)"
STAGES = {"privacy": COUNTS, "teacher": TEACHER, "generator": GENERATOR}  # stage -> what it spends on


def opened(context: Context) -> Ledger:
    """The run's ledger, which holds what its finished stages have spent.

    Raises: UserError where it holds less: another file, or none, stands in its place.
    """
    if context.privacy is None:
        c = context.config
        target = {"epsilon": c.epsilon, "delta": c.delta, "records": len(context.data.train)}
        path, seeded = context.folder.privacy_ledger, SEEDED if c.dp_seed >= 0 else None
        done = [use for stage, use in STAGES.items() if context.journal.done(stage) is not None]
        needed = [use for use in done if use != COUNTS or spending.counts_are_read(c)]
        if needed and not path.exists():
            fail("run", "epsilon", f"have the ledger of what was spent on {', '.join(needed)}", f"no {path}")
        ledger = Ledger.open(path, **target, not_private=seeded)
        if less := [use for use in needed if not _holds(ledger, context, use)]:
            fail("run", "epsilon", f"have the ledger of what was spent on {', '.join(less)}", f"another one in {path}")
        context.privacy = ledger
    return context.privacy


def _holds(ledger: Ledger, context: Context, use: str) -> bool:
    """Whether all that was spent on ``use`` is booked, with the noise that it had."""
    own = counts(context) if use == COUNTS else mechanism(spending.of(context, use))
    booked = ledger.spent.get(use)
    alike = booked is not None and dataclasses.replace(booked, steps=own.steps) == own
    return alike and ledger.booked(use) >= own.steps


def noise(context: Context) -> dict[str, Spending]:
    """The trainings, each with the least noise that keeps all uses together within the target.

    Raises: UserError for a target that no noise reaches.
    """
    if context.spending is None:
        c, uses = context.config, spending.trainings(context.config, len(context.data.train))
        beside = [counts(context)] if spending.counts_are_read(c) else []
        for name, own in uses.items():
            rate = {"sample_rate": own.sample_rate, "steps": own.steps}
            if name == TEACHER:
                multiplier = calibrate(c.epsilon_teacher_share * c.epsilon, c.delta, **rate)
            else:
                multiplier = calibrate(c.epsilon, c.delta, **rate, beside=beside)
            uses[name] = dataclasses.replace(own, noise_multiplier=multiplier)
            beside.append(mechanism(uses[name]))
        context.spending = uses
    return context.spending


def counts(context: Context) -> PureDP:
    """Of noised class counts."""
    return PureDP(spending.COUNTS_SHARE * context.config.epsilon)


def mechanism(own: Spending) -> Gaussian:
    """Of a training."""
    return Gaussian(own.noise_multiplier, own.sample_rate, own.steps)


def run(context: Context) -> dict[str, Any]:
    """Open the ledger; returns what the later stages read: noise of the trainings, class counts and their ``kind``."""
    uses, ledger = noise(context), opened(context)
    if spending.counts_are_read(context.config):
        ledger.book(COUNTS, counts(context))
    kind, values = spending.class_counts(context)
    trainings = {name: dataclasses.asdict(each) for name, each in uses.items()}
    return {"trainings": trainings, "class_counts": values, "kind": kind}


def guarantee(context: Context) -> Mapping[str, Any]:
    """What the run guarantees, as ``metrics.json`` holds it: the ledger's summary, and the kind of ``class_counts``."""
    return {**opened(context).summary(), "class_counts": context.result("privacy")["kind"]}
