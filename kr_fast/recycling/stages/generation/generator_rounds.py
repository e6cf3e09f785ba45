"""The stage ``generator``: a training as configured, rounds of one in a run with a budget, or a given generator.

Each round ends with a checkpoint and a short Student, and another one follows for as long as they help: Checkpoint
Optimisation merged into the training. Training ends where its share of the time does, or when two rounds have brought
nothing; what is left then goes to the Student.
"""

from typing import Any

from kr_fast.recycling import given
from kr_fast.recycling.context import Context
from kr_fast.recycling.dp import generator as dp_generator
from kr_fast.recycling.stages import teacher
from kr_fast.recycling.stages.distillation import gkd
from kr_fast.recycling.stages.generation import generator
from kr_fast.recycling.stages.generation.memorisation import MemorisationMonitor
from kr_fast.recycling.stages.generation.sampling import default_sampling

STATE = "generator.pt"


def run(context: Context) -> dict[str, Any]:
    """Train on every rank: as configured, or in rounds where there is a budget; a given generator is not trained."""
    c = context.config
    if c.epsilon:
        return dp_generator.train(context)
    monitor = MemorisationMonitor(context, [] if c.generator or context.ledger else generator.early_step(c))
    if c.generator:
        trained = given.run(context)
    elif context.ledger is None:
        trained = generator.run(context, monitor)
    else:
        trained = _in_rounds(context, monitor)
    return monitor.results(trained)


def _in_rounds(context: Context, monitor: MemorisationMonitor) -> dict[str, Any]:
    result, ledger, runtime = None, context.ledger, context.runtime
    with runtime.main_first() as main:
        if main and not ledger.rounds:  # its record was deleted, to plan anew
            (context.folder.state / STATE).unlink(missing_ok=True)
    while end := runtime.broadcast(ledger.next_round() if runtime.is_main else None):
        ledger.spend("generator")
        result = _train(context, end)
        seconds = ledger.spend("generator")
        monitor(end)  # on every rank, as in a training without a budget
        with runtime.main_first() as main:
            if main:
                loss = generator.validation_loss(context, context.folder.generator(end))
                ledger.spend("generator")
                accuracy = gkd.trial(context, teacher.load(context), default_sampling(context, end))
                ledger.finish_round(seconds, ledger.spend("generator"), loss, accuracy)
    ends = runtime.broadcast([each["end"] for each in ledger.rounds])
    if result is None:  # it was killed after its last round
        result = _train(context, ends[-1])
    return {**result, "checkpoints": ends}


def _train(context: Context, end: int) -> dict[str, Any]:
    """Continue the training up to step ``end``."""
    return generator.train(
        context,
        context.data.train,
        [end],
        context.folder.generator,
        seed=context.config.seed,
        state_path=context.folder.state / STATE,
        keep_state=True,
        description="generator",
    )
