"""The record of a run with a budget, ``state/budget.json``: costs, what was planned, what it took, what it brought.

The next piece of work is written here before it begins, so that a killed run continues with the same steps.
"""

import dataclasses
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from kr_fast.data.printable import counted
from kr_fast.recycling.budget import planner
from kr_fast.recycling.budget.planner import Costs, Plan, Sizes
from kr_fast.runtime.errors import UserError
from kr_fast.runtime.log import logger
from kr_fast.runtime.storage import files
from kr_fast.runtime.text import duration

NAME = "budget.json"
# Stages whose lengths are planned.
DIVIDED = ("generator", "checkpoints", "tuning", "gkd", "canary_students", "shadow_students")


@dataclasses.dataclass
class Ledger:
    """What is known of a run's time.

    Attributes:
        budget: seconds of the whole run.
        costs: as last measured.
        planned: seconds of each stage by the first plan.
        ahead: seconds of those unfinished stages whose length is not planned, as measured.
        spent: seconds of each stage so far.
        rounds: of the generator: ``{"end": step}``, and once it is over ``seconds``, ``val_loss``, ``val_accuracy``.
        cycles: of the Student: ``{"periods": count}``, and once it is over ``val_accuracy``.
        student: how the images of these cycles are drawn, and the passes over them.
        notes: what was planned anew, as sentences.
    """

    path: Path
    budget: float
    costs: Costs
    sizes: Sizes
    planned: dict[str, float]
    ahead: dict[str, float]
    trial_images: int
    passes: int
    spent: dict[str, float] = dataclasses.field(default_factory=dict)
    rounds: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    cycles: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    student: dict[str, Any] = dataclasses.field(default_factory=dict)
    notes: list[str] = dataclasses.field(default_factory=list)

    def __post_init__(self):
        self.since = time.perf_counter()  # from when the next seconds are charged
        self.resumed = False  # whether the work under way was begun by a process that was killed, and cannot be timed

    @classmethod
    def read(cls, path: Path) -> "Ledger | None":
        """The record in ``path``; None where there is none. Raises: UserError where it is damaged."""
        if not path.exists():
            return None
        values = files.read_json(path, dict)
        try:
            typed = {"path": path, "costs": Costs(**values["costs"]), "sizes": Sizes(**values["sizes"])}
            return cls(**{**values, **typed})
        except (TypeError, KeyError) as error:
            rule = "hold the budget of a run of this version of kr-fast"
            raise UserError(f"{path} must {rule}, got something else; delete it to plan anew") from error

    def save(self) -> None:
        """Write the file."""
        values = dataclasses.asdict(self)
        del values["path"]
        files.write_json(self.path, values)

    def spend(self, stage: str) -> float:
        """Charge the seconds since the last call to ``stage``; returns them."""
        now = time.perf_counter()
        seconds, self.since = now - self.since, now
        self.spent[stage] = self.spent.get(stage, 0.0) + seconds
        return seconds

    def finish(self, stage: str) -> float:
        """Charge ``stage``, which is finished; returns all of its seconds."""
        self.spend(stage)
        self.ahead.pop(stage, None)
        self.save()
        return self.spent[stage]

    def left(self) -> float:
        """Seconds that the planned stages still have together."""
        return self.budget - sum(self.spent.values()) - sum(self.ahead.values())

    def free(self) -> float:
        """Seconds that the planned stages have had, and have."""
        return self.left() + sum(spent for stage, spent in self.spent.items() if stage in DIVIDED)

    def reopen(self, stages: Iterable[str], budget: float) -> None:
        """A larger ``budget``: finished ``stages`` are made again, or go on."""
        self.budget = budget
        self.ahead |= {stage: self.planned[stage] for stage in stages if stage in self.planned and stage not in DIVIDED}
        self.save()

    def plan(self) -> Plan:
        """What is done, and what is to come by the costs as they are known now."""
        whole = planner.divide(self.costs, self.sizes, self.free())
        fixed = {"trial_images": self.trial_images, "passes": self.passes}
        if not self.rounds:
            return dataclasses.replace(whole, **fixed)
        ends = (*(each["end"] for each in self.rounds), *self._rounds_ahead())
        cycles = tuple(each["periods"] for each in self.cycles)
        return Plan(ends, **fixed, cycles=cycles or whole.cycles)

    def ahead_by_stage(self) -> dict[str, float]:
        """Seconds of each stage that is not finished."""
        planned = planner.stages(self.costs, self.sizes, self.plan())
        return {
            **self.ahead,
            **{stage: max(value - self.spent.get(stage, 0.0), 0.0) for stage, value in planned.items()},
        }

    def _rounds_ahead(self) -> tuple[int, ...]:
        done = self.rounds[-1]["end"] if self.rounds else 0
        spent = sum(each.get("seconds", 0.0) for each in self.rounds)
        left = planner.GENERATOR * self.free() / self.costs.generators - spent
        last = done + max(int(left / self.costs.step), 0 if done else self.sizes.pass_steps)
        # A Student that is there learns anew from a better generator, which has to leave it as much time as it had.
        again = sum(each["periods"] for each in self.cycles) * self._period() if self.cycles else 0.0
        if again and self.left() - (last - done) * self.costs.step * self.costs.generators < again:
            return ()
        return planner.rounds(done, last, self.sizes.pass_steps)

    def next_round(self) -> int | None:
        """The step at which the generator's next round ends, which is noted; None where its training is over."""
        if self.rounds and "seconds" not in self.rounds[-1]:
            self.resumed = True
            return self.rounds[-1]["end"]
        ends = self._rounds_ahead()
        if not ends or not self.generator_improves():
            return None
        self.rounds.append({"end": ends[0]})
        self.save()
        return ends[0]

    def finish_round(self, seconds: float, trial_seconds: float, val_loss: float, val_accuracy: float) -> None:
        """Note what the round and its short Student took, and what they brought."""
        first, end = len(self.rounds) == 1, self.rounds[-1]["end"]
        planned = (end - (0 if first else self.rounds[-2]["end"])) * self.costs.step
        if self.resumed:  # the seconds of the process that was killed are not known
            seconds = max(seconds, planned)
        self.rounds[-1] |= {"seconds": seconds, "val_loss": val_loss, "val_accuracy": val_accuracy}
        self._revise("generator", f"the generator's training up to step {end}", planned, seconds, first)
        planned = planner.trial_seconds(self.costs, Plan((), self.trial_images, self.passes, ()))
        self._revise("student", f"the short Student of step {end}", planned, trial_seconds, first)
        self.save()

    def generator_improves(self) -> bool:
        """Whether the generator's last rounds brought something."""
        losses, accuracies = ([each[key] for each in self.rounds] for key in ("val_loss", "val_accuracy"))
        return planner.improving(losses, accuracies, self.sizes.validation)

    def begin_student(self, sampling: dict[str, Any], state: Path, cost: float) -> None:
        """The Student learns from ``sampling``, whose images cost ``cost`` times as much as those of short Students.

        Cycles, and the ``state`` of their training, that belong to another sampling are dropped.
        """
        if self.student.get("sampling") != sampling:
            state.unlink(missing_ok=True)
            costs = dataclasses.replace(self.costs, image=self.costs.image * cost)
            self.cycles, self.student = [], {"sampling": sampling, "passes": planner.passes(costs), "cost": cost}
            self.save()

    def next_cycle(self) -> list[int] | None:
        """The periods of all of the Student's cycles, the next one included; None where it is finished."""
        if self.cycles and "val_accuracy" not in self.cycles[-1]:
            self.resumed = True
            return [each["periods"] for each in self.cycles]
        done = [each["periods"] for each in self.cycles]
        of_shadows = self._period() - self._period(own=True)
        left = int((self.left() - sum(done) * of_shadows) / self._period())
        count = planner.next_cycle(done, left, planner.period_steps(self.sizes, self.student["passes"]))
        if not count or not planner.student_improves([each["val_accuracy"] for each in self.cycles]):
            return None
        self.cycles.append({"periods": count})
        self.save()
        return [*done, count]

    def finish_cycle(self, seconds: float, val_accuracy: float) -> None:
        """Note what the cycle under way took, and its best accuracy on validation."""
        count = self.cycles[-1]["periods"]
        self.cycles[-1]["val_accuracy"] = val_accuracy
        planned = count * self._period(own=True)
        self._revise("student", f"the Student's cycle of {counted(count, 'period')}", planned, seconds, False)
        self.save()

    def _period(self, *, own: bool = False) -> float:
        costs = dataclasses.replace(self.costs, image=self.costs.image * self.student["cost"])
        return planner.period_seconds(costs, self.sizes, self.student["passes"], own=own)

    def _revise(self, kind: str, what: str, planned: float, took: float, first: bool) -> None:
        if self.resumed:
            self.resumed = False
            return
        self.costs, pace = planner.revised(self.costs, kind, planned, took, self.budget, first)
        if pace != 1:
            self.ahead = {stage: seconds * pace for stage, seconds in self.ahead.items()}
            words = f"{what} took {duration(took)} and not {duration(planned)}: the time that is left was divided anew"
            self.notes.append(words)
            logger.warning("run: %s", words)

    def summary(self, teacher_accuracy: float) -> dict[str, Any]:
        """For the report: seconds of each stage as planned, what rounds and cycles brought, what was still improving.

        The Student does where its last cycle is its best and still below the Teacher on validation.
        """
        best = [each["val_accuracy"] for each in self.cycles]
        student = best[-1] < teacher_accuracy and best[-1] > max(best[:-1], default=0.0)
        return {
            "seconds": self.budget,
            "planned": self.planned,
            "rounds": self.rounds,
            "cycles": self.cycles,
            "still_improving": ["generator"] * self.generator_improves() + ["gkd"] * student,
            "notes": self.notes,
        }
