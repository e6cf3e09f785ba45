"""The ledger of a run: every use of private records, written before its result is, in a file that a reviewer can check.

Steps are numbered within what they are for, so an interrupted training that goes on from its last saved state spends
once what it spent. Where the ledger cannot know, it counts too much rather than too little, but for a state that was
saved and of which neither ``book`` nor ``finish`` has told it yet.
"""

import json
import math
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from kr_fast.privacy.accounting import (
    GRID,
    Gaussian,
    Laplace,
    Mechanism,
    PureDP,
    check_library,
    check_target,
    epsilon_of,
)
from kr_fast.runtime.errors import UserError, fail, first_line
from kr_fast.runtime.inputs import as_integer
from kr_fast.runtime.storage import files
from kr_fast.runtime.versions import versions

FORMAT = "kr-fast privacy ledger 1"
RULES = {
    "neighbouring": "add or remove one record",
    "sampling": "Poisson: a record is in a step with chance sample_rate, independently of all other records and steps",
    "records": "their number is taken as public",
    "accountant": f"dp-accounting: privacy loss distributions on a grid of {GRID:g}; epsilon is an upper bound",
}
KINDS: dict[str, type[Mechanism]] = {"gaussian": Gaussian, "laplace": Laplace, "pure": PureDP}
_SLACK = 1 + 1e-6  # of the order in which mechanisms are composed


@dataclass
class _Use:
    """What was booked for one purpose.

    Attributes:
        planned: the mechanism with all the steps that it is to take.
        top: steps up to this one were booked.
        saved: the last state from which steps were taken, or that was reported as finished: somebody has it.
        again: saved steps that were taken anew from an earlier state. Both results exist, so they count twice.
        lost: booked steps whose result an interruption destroyed, and that were taken anew. They count once.
    """

    planned: Mechanism
    top: int = 0
    saved: int = 0
    again: int = 0
    lost: int = 0

    def take(self, start: int, stop: int) -> None:
        """Book the steps from ``start`` to ``stop``; none: the state after ``start`` steps is saved."""
        if start < self.saved:
            self.again += self.saved - start
        else:
            self.lost += max(0, min(self.top, stop) - start)
        self.saved, self.top = start, max(self.top, stop)

    @property
    def spent(self) -> Mechanism:
        return replace(self.planned, steps=self.top + self.again)

    @property
    def whole(self) -> Mechanism:
        """With the steps that are still to come."""
        return replace(self.planned, steps=self.planned.steps + self.again)


class Ledger:
    """What a run's private records were used for, in one JSON file; made by :meth:`open` or :meth:`read`.

    The file states target, neighbouring relation, sampling and versions, then ``spent``, the sums, and ``events``, one
    a line, to which lines are only added. One process writes it.
    """

    def __init__(self, path: Path, head: dict[str, Any], events: list[dict[str, Any]], writable: bool):
        """By :meth:`open` and :meth:`read`: ``path``, the file's ``head`` and ``events``, and whether ``writable``."""
        self.path, self._head, self._events, self._writable = path, head, [], writable
        self._uses: dict[str, _Use] = {}
        self._here: dict[str, int] = {}  # steps whose results this process may still hold
        for event in events:
            self._replay(event)

    @classmethod
    def open(
        cls, path: str | Path, *, epsilon: float, delta: float, records: int | None, not_private: str | None = None
    ) -> "Ledger":
        """The ledger of a run that begins, or goes on, with this target.

        Args:
            path: the file; written at once where there is none.
            epsilon: what may be spent; bookings beyond it are refused.
            delta: of the guarantee; above ``1 / records`` is warned of.
            records: in the private set. It is taken as public.
            not_private: why nothing here is private (a seed), or None. It stays so whoever opens the file later.
        Raises: UserError naming the argument: another target than the file's, a file that is damaged or was changed,
            data of unknown size, dp-accounting missing.
        """
        path = Path(path)
        check_target("Ledger", epsilon, delta, records)
        check_library()
        target = {"epsilon": float(epsilon), "delta": float(delta), "records": int(records or 0)}
        if path.exists():
            ledger = cls.read(path)
            ledger._writable = True
            for name, value in target.items():
                if (before := ledger._head["target"][name]) != value:
                    rule = f"be {before:g}, with which {path} was begun (a run with another is another folder's)"
                    fail("Ledger", name, rule, f"{value:g}")
        else:
            head = {"format": FORMAT, "target": target, **RULES, "versions": versions("dp-accounting")}
            ledger = cls(path, head, [], True)
            ledger._write()
        if not_private is not None and ledger.is_private:
            ledger._append({"not_private": str(not_private)})
        return ledger

    @classmethod
    def read(cls, path: str | Path) -> "Ledger":
        """The ledger in the file ``path``, to compute with.

        Raises: UserError naming the file where it is damaged, or where its sums do not follow from its events.
        """
        path = Path(path)
        content = files.read_json(path, dict)
        rule, got = "hold a privacy ledger of this version", None
        try:
            events, spent = content.pop("events"), content.pop("spent")
            got = content["format"] if content["format"] != FORMAT else None
            ledger = cls(path, content, events, False)
            _ = {name: float(content["target"][name]) for name in ("epsilon", "delta", "records")}
            if got is None and spent != ledger._sums():
                got = "sums that do not follow from the events"
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            got = got or first_line(error)
        if got is not None:
            raise UserError(f"{path} must {rule}, as it was written, got {got}")
        return ledger

    def book(self, purpose: str, mechanism: Mechanism, start: int = 0, stop: int | None = None) -> None:
        """Book the steps ``start`` to ``stop`` before they are taken; the call returns once they are on the disk.

        ``start`` says which saved state they follow. After an interruption it may be less than was booked: results that
        were lost with their process count once. A ``start`` before a state from which steps were booked already, or
        that :meth:`finish` reported, takes released steps anew, and both count; so does what one process books twice.

        Args:
            purpose: what the steps are for, such as "teacher"; each has one mechanism.
            mechanism: with all ``steps`` that are planned: the whole plan has to fit the target before its first step.
            start, stop: the steps, counted from 0; ``stop`` None: all that are planned.
        Raises: UserError naming the argument, where the target does not cover the plan, and where the file is not as
            this object left it.
        """
        where = "Ledger.book"
        if not isinstance(purpose, str) or not purpose:
            fail(where, "purpose", "be a text", purpose)
        if type(mechanism) not in KINDS.values():
            fail(where, "mechanism", "be a Gaussian, Laplace or PureDP", mechanism)
        use = self._uses.get(purpose, _Use(mechanism))
        if use.planned != mechanism:
            fail(where, f"mechanism of {purpose}", f"be {use.planned}, of which steps are booked", mechanism)
        stop = as_integer(where, "stop", mechanism.steps if stop is None else stop, 0, mechanism.steps)
        start = as_integer(where, "start", start, 0, stop)
        if start > use.top:
            fail(where, "start", f"be at most {use.top}, the steps of {purpose} that are booked in {self.path}", start)
        held = self._here.get(purpose, 0)
        events = [_event(purpose, mechanism, held, held)] if start < held and use.saved < held else []
        self._book(purpose, [*events, _event(purpose, mechanism, start, stop)])
        self._here[purpose] = stop

    def finish(self, purpose: str) -> None:
        """Say that the result of all steps booked for ``purpose`` is saved: taking them anew counts from now on.

        Raises: UserError where nothing was booked for it.
        """
        use = self._uses.get(purpose)
        if use is None:
            fail("Ledger.finish", "purpose", f"be one of {', '.join(self._uses) or 'those booked'}", purpose)
        if use.saved < use.top:
            self._append(_event(purpose, use.planned, use.top, use.top))

    def booked(self, purpose: str) -> int:
        """How many steps of ``purpose`` are booked: no saved state can have more; 0 where there are none."""
        return self._uses[purpose].top if purpose in self._uses else 0

    @property
    def is_private(self) -> bool:
        """False where a seed, or another reason in the file, makes the guarantee void."""
        return not any("not_private" in event for event in self._events)

    @property
    def target(self) -> dict[str, float]:
        """``epsilon``, ``delta`` and ``records`` with which the ledger was begun."""
        return dict(self._head["target"])

    @property
    def spent(self) -> dict[str, Mechanism]:
        """By purpose the mechanism with the steps that count."""
        return {purpose: use.spent for purpose, use in self._uses.items()}

    def epsilon(self, delta: float | None = None) -> float:
        """Epsilon of everything booked, recomputed from the events.

        Args:
            delta: in [1e-12, 1); None: the target's.
        Returns: an upper bound; infinity where the ledger is not private.
        Raises: UserError naming the argument, or that dp-accounting is missing.
        """
        if not self.is_private:
            return math.inf
        return epsilon_of(list(self.spent.values()), self._head["target"]["delta"] if delta is None else delta)

    def summary(self) -> dict[str, Any]:
        """Plain values for reports and metrics.

        ``epsilon`` (None where it is infinite), ``delta``, ``target_epsilon``, ``records``, ``private``,
        ``not_private`` (why), ``neighbouring``, ``sampling``; in ``spent`` of each purpose (``for``) its mechanism and
        steps, those taken ``again`` (they count twice) or ``lost`` by an interruption (once), and ``epsilon_alone``.

        Raises: UserError that dp-accounting is missing.
        """
        target, private = self._head["target"], self.is_private
        alone = [epsilon_of([each], target["delta"]) if private else None for each in self.spent.values()]
        return files.strict(
            {
                "epsilon": self.epsilon(),
                "delta": target["delta"],
                "target_epsilon": target["epsilon"],
                "records": target["records"],
                "private": private,
                "not_private": next((each["not_private"] for each in self._events if "not_private" in each), None),
                "neighbouring": self._head["neighbouring"],
                "sampling": self._head["sampling"],
                "spent": [{**each, "epsilon_alone": own} for each, own in zip(self._sums(), alone, strict=True)],
            }
        )

    def _book(self, purpose: str, events: list[dict[str, Any]]) -> None:
        """Add ``events`` of ``purpose`` if the target covers what they lead to."""
        before = self._uses.get(purpose)
        after = replace(before) if before else _Use(_mechanism(events[0]))
        for event in events:
            after.take(*event["steps"])
        if self.is_private and (before is None or after.again > before.again):
            whole = [use.whole for name, use in self._uses.items() if name != purpose]
            target = self._head["target"]
            if (spent := epsilon_of([*whole, after.whole], target["delta"])) > target["epsilon"] * _SLACK:
                rule = f"cover the steps planned for {', '.join({**self._uses, purpose: 0})}, which spend {spent:.4f}"
                mend = "calibrate the noise to the target, or begin another run with a larger epsilon"
                if after.again:
                    mend = f"{after.again} steps of {purpose} are taken twice: put its last saved state back, or {mend}"
                fail("Ledger.book", "epsilon", f"{rule} ({mend})", target["epsilon"])
        self._append(*events)

    def _append(self, *events: dict[str, Any]) -> None:
        if not self._writable:
            fail("Ledger", "ledger", "be opened by Ledger.open to book in it", "one made by Ledger.read")
        if not self.path.exists() or self.path.read_text() != self._text():
            raise UserError(f"{self.path} must be as this run left it, got another file; put it back")
        for event in events:
            self._replay(event)
        self._write()

    def _replay(self, event: dict[str, Any]) -> None:
        if "not_private" not in event:
            mechanism, (start, stop) = _mechanism(event), event["steps"]
            use = self._uses.setdefault(event["for"], _Use(mechanism))
            if use.planned != mechanism or not 0 <= start <= min(stop, use.top) or stop > mechanism.steps:
                raise ValueError(f"steps {start} to {stop} of {event['for']} that do not follow what is before them")
            use.take(start, stop)
        self._events.append(event)

    def _sums(self) -> list[dict[str, Any]]:
        return [
            {"for": purpose, **_plain(use.spent), "again": use.again, "lost": use.lost}
            for purpose, use in self._uses.items()
        ]

    def _text(self) -> str:
        """JSON with one line for each event: a file that people read and compare."""
        head = json.dumps({**self._head, "spent": self._sums()}, indent=2, allow_nan=False)
        lines = ",\n".join(f"    {json.dumps(event, allow_nan=False)}" for event in self._events)
        return f'{head[:-2]},\n  "events": [\n{lines}\n  ]\n}}\n'

    def _write(self) -> None:
        files.write_text(self.path, self._text())


def _plain(mechanism: Mechanism) -> dict[str, Any]:
    kind = next(name for name, each in KINDS.items() if type(mechanism) is each)
    return {"mechanism": kind, **asdict(mechanism)}


def _event(purpose: str, mechanism: Mechanism, start: int, stop: int) -> dict[str, Any]:
    plain = _plain(mechanism)
    return {"for": purpose, **plain, "planned": plain.pop("steps"), "steps": [start, stop]}


def _mechanism(event: dict[str, Any]) -> Mechanism:
    values = {key: value for key, value in event.items() if key not in ("for", "mechanism", "planned", "steps")}
    return KINDS[event["mechanism"]](**values, steps=event["planned"])
