"""A case of a benchmark: the same work by several providers, each checked before the clock starts."""

import dataclasses
import functools
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from kr_fast.runtime.errors import fail, first_line

OURS = "kr_fast"
NO_ROOM = "needs more memory than the GPU has left"
SHORTEST = 0.005  # seconds of one sample: shorter work is repeated within it


class Unavailable(Exception):
    """Why a provider cannot run here."""


def needs_bfloat16() -> None:
    """Refuse a provider in bfloat16 where the processor does not multiply it: it would take many times as long."""
    if not torch.cpu._is_avx512_bf16_supported():
        raise Unavailable("needs a processor that multiplies bfloat16")


@dataclasses.dataclass(frozen=True)
class Work:
    """What a provider does.

    Attributes:
        run: once.
        error: of its result, as the case defines it, before the clock starts.
        share: the part of the case's work that one run does, for a provider that would take minutes for all of it.
    """

    run: Callable[[], Any]
    error: float
    share: float = 1.0


@dataclasses.dataclass(frozen=True)
class Case:
    """Work to be compared.

    Attributes:
        name: with sizes, dtype and device.
        providers: name -> what lays the work out, or raises :class:`Unavailable`; ``kr_fast`` first.
        tolerance: the largest error that counts as right; by provider where they differ.
        moved: the least bytes that the work reads and writes; None where it is not bound by memory.
        device: ``cpu`` or ``cuda``.
    """

    name: str
    providers: Mapping[str, Callable[[], Work]]
    tolerance: float | Mapping[str, float]
    moved: int | None = None
    device: str = "cpu"

    def prepared(self, provider: str) -> Work:
        """The provider's work, found right.

        Raises: Unavailable if it cannot run here or is another's and wrong; UserError if ours is wrong.
        """
        work = self.providers[provider]()
        allowed = self.tolerance if isinstance(self.tolerance, float) else self.tolerance[provider]
        if not work.error <= allowed:
            if provider.startswith(OURS):
                fail("bench", f"{provider} on {self.name}", f"be within {allowed:g} of its reference", work.error)
            raise Unavailable(f"its result is wrong by {work.error:.2g}, where {allowed:g} is allowed")
        return work

    def facts(self, seconds: float) -> dict[str, float]:
        """What a time of the whole work amounts to: GB/s, and the share of what a copy reaches on this device."""
        if self.moved is None:
            return {}
        rate = self.moved / seconds
        return {"gb_per_s": rate / 1e9, "share_of_copy": rate / copy_bandwidth(self.device)}


def measure(case: Case, repeats: int, only: tuple[str, ...] = ()) -> dict[str, Any]:
    """Times of all providers, taken in turns so that a change of the machine's speed meets all of them.

    Args:
        repeats: samples of each provider; the median counts.
        only: providers besides ours; all of them without.
    Returns: ``case``, ``providers`` (name -> ``seconds`` of the whole work, ``ratio`` to ours, ``error``, and GB/s
        where the work is bound by memory) and ``skipped`` (name -> reason).
    """
    works, skipped = {}, {}
    for name in case.providers:
        if only and name not in only and name != OURS:
            continue
        try:
            works[name] = case.prepared(name)
        except Unavailable as reason:
            skipped[name] = str(reason)
        except torch.OutOfMemoryError:  # else the cases before would be lost
            skipped[name] = NO_ROOM
    counts = {}
    for name, work in list(works.items()):
        try:
            work.run()  # compiles, captures, warms caches
        except torch.OutOfMemoryError:
            skipped[name] = NO_ROOM
            del works[name]
            continue
        counts[name] = max(1, round(SHORTEST / max(seconds_of(work, 1, case.device), 1e-9)))
    samples = {name: [] for name in works}
    for _ in range(repeats):
        for name, work in works.items():
            samples[name].append(seconds_of(work, counts[name], case.device) / counts[name] / work.share)
    providers = {}
    medians = {name: statistics.median(values) for name, values in samples.items()}
    for name, seconds in medians.items():
        row = {"seconds": seconds, "fastest": min(samples[name]), "error": works[name].error}
        if OURS in medians:
            row["ratio"] = seconds / medians[OURS]
        providers[name] = row | case.facts(seconds)
    return {"case": case.name, "providers": providers, "skipped": skipped}


def seconds_of(work: Work, count: int, device: str) -> float:
    """Wall time of ``count`` runs, one after the other."""
    start = time.perf_counter()
    for _ in range(count):
        work.run()
    if device == "cuda":  # needs a GPU
        torch.cuda.synchronize()
    return time.perf_counter() - start


def compiled(function: Callable) -> Callable:
    """``torch.compile`` of it from a clean state."""
    torch._dynamo.reset()
    return torch.compile(function, dynamic=False)


def attempt(what: Callable[[], Any]) -> Any:
    """Its result; a compiler or a package that is missing or fails is a reason not to measure it.

    Raises: Unavailable.
    """
    try:
        return what()
    except Exception as error:  # torch.compile fails with what its compilers raise
        raise Unavailable(f"{type(error).__name__}: {first_line(error)}"[:200]) from error


@functools.cache
def copy_bandwidth(device: str) -> float:
    """Bytes a second, read and written, of a copy of 256 MiB."""
    source = torch.empty(1 << 26, device=device).normal_()
    into = torch.empty_like(source)
    work = Work(lambda: into.copy_(source), 0.0)
    seconds_of(work, 2, device)
    return 2 * source.nbytes / statistics.median(seconds_of(work, 1, device) for _ in range(7))


def relative_error(value: Tensor, exact: Tensor) -> float:
    """Norm of the difference over the norm of ``exact``."""
    return float((value.double() - exact.double()).norm() / exact.double().norm())
