"""The lines that say which stage a run is in, and about how long it will take."""

import logging
from collections.abc import Callable, Mapping, Sequence

from kr_fast.recycling import preflight
from kr_fast.recycling.context import Context
from kr_fast.runtime.log import logger
from kr_fast.runtime.text import duration


class StageProgress:
    """Stages of a run in order; :meth:`begin` logs a line as each begins."""

    def __init__(self, names: Sequence[str], work: Callable[[], Mapping[str, float]]):
        """``work()``: how much of the whole each stage is, in any unit, as far as that is known."""
        self.names, self._work, self._known = list(names), work, None

    def begin(self, name: str, seconds: Mapping[str, float]) -> None:
        """Stage ``name`` begins; ``seconds`` of the finished ones, which scale what is left."""
        if not logger.isEnabledFor(logging.INFO):
            return
        if self._known is None:
            self._known = self._work()
        logger.info("%s", line(self.names, name, self._known, seconds))


def of_run(context: Context, names: Sequence[str]) -> StageProgress:
    """Progress of the run of ``context``: stages are compared by the operations of their networks."""
    return StageProgress(names, lambda: preflight.work(preflight.planned(context)))


def line(names: Sequence[str], name: str, work: Mapping[str, float], seconds: Mapping[str, float]) -> str:
    """``[3/11] generator, 2.0 min so far, about 4.1 min left``; what is left is not said before a stage was timed.

    A unit of work takes as long as it took on average in the finished stages.
    """
    parts = [f"[{names.index(name) + 1}/{len(names)}] {name}"]
    spent = sum(seconds.values())
    if spent:
        parts.append(f"{duration(spent)} so far")
    done = sum(work.get(each, 0.0) for each in seconds)
    if done:
        timed = sum(value for each, value in seconds.items() if work.get(each))
        left = sum(value for each, value in work.items() if each not in seconds) * timed / done
        parts.append(f"about {duration(left)} left")
    return ", ".join(parts)
