"""The lines that say which stage a run is in, and about how long it will take."""

import logging
from collections.abc import Callable, Mapping, Sequence

from kr_fast.recycling import preflight
from kr_fast.recycling.context import Context
from kr_fast.runtime.log import logger
from kr_fast.runtime.text import duration


class StageProgress:
    """Stages of a run in order; :meth:`begin` logs a line as each begins."""

    def __init__(
        self,
        names: Sequence[str],
        work: Callable[[], Mapping[str, float]],
        ahead: Callable[[], Mapping[str, float]] | None = None,
    ):
        """``work()``: how much of the whole each stage is, in any unit, as far as that is known.

        ``ahead()``: seconds of each stage that is to come, where they are planned, as with a budget; None elsewhere.
        """
        self.names, self._work, self._ahead, self._known = list(names), work, ahead, None

    def begin(self, name: str, seconds: Mapping[str, float]) -> None:
        """Stage ``name`` begins; ``seconds`` of the finished ones, which scale what is left."""
        if not logger.isEnabledFor(logging.INFO):
            return
        if self._ahead is not None:
            left = sum(value for each, value in self._ahead().items() if each not in seconds)
            logger.info("%s", line(self.names, name, {}, seconds, left))
            return
        if self._known is None:
            self._known = self._work()
        logger.info("%s", line(self.names, name, self._known, seconds))


def of_run(context: Context, names: Sequence[str]) -> StageProgress:
    """Progress of the run of ``context``: by its budget, or stages are compared by the operations of their networks."""
    ahead = None if context.ledger is None else context.ledger.ahead_by_stage
    return StageProgress(names, lambda: preflight.work(context), ahead)


def line(
    names: Sequence[str],
    name: str,
    work: Mapping[str, float],
    seconds: Mapping[str, float],
    left: float | None = None,
) -> str:
    """``[3/11] generator, 2.0 min so far, about 4.1 min left``; what is left is not said before a stage was timed.

    A unit of work takes as long as it took on average in the finished stages, unless ``left`` is given, in seconds.
    """
    parts = [f"[{names.index(name) + 1}/{len(names)}] {name}"]
    spent = sum(seconds.values())
    if spent:
        parts.append(f"{duration(spent)} so far")
    done = sum(work.get(each, 0.0) for each in seconds)
    if done and left is None:
        timed = sum(value for each, value in seconds.items() if work.get(each))
        left = sum(value for each, value in work.items() if each not in seconds) * timed / done
    if left is not None:
        parts.append(f"about {duration(left)} left")
    return ", ".join(parts)
