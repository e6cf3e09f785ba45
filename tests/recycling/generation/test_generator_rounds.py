"""Rounds of a generator with a budget, under several processes."""

import dataclasses
from typing import Any

import torch
from toy_runs import new_context

from kr_fast.recycling.stages import teacher
from kr_fast.recycling.stages.distillation import gkd
from kr_fast.recycling.stages.generation import generator, generator_rounds
from kr_fast.runtime.state import Runtime


@dataclasses.dataclass(frozen=True)
class Played(Runtime):
    """Rank 0 notes what it broadcasts, and rank 1, which runs after it, receives that in the same order."""

    sent: list[Any] = dataclasses.field(default_factory=list)

    def broadcast(self, value: Any) -> Any:
        if self.is_main:
            self.sent.append(value)
            return value
        return self.sent.pop(0)

    def barrier(self) -> None:
        pass


class TwoRounds:
    """A ledger whose generator trains in two rounds."""

    trial_images = 8

    def __init__(self):
        self.ends, self.rounds = [4, 8], []

    def next_round(self) -> int | None:
        return self.ends.pop(0) if self.ends else None

    def spend(self, stage: str) -> float:
        return 1.0

    def finish_round(self, *figures: float) -> None:
        self.rounds.append({"end": 4 * len(self.rounds) + 4})


def test_ranks_take_part_in_the_same_broadcasts(tmp_path, monkeypatch):
    """Else a rank takes one value for another, or waits for ever."""
    monkeypatch.setattr(generator, "train", lambda *_, **options: {"checkpoints": [4, 8], "curves": {}})
    monkeypatch.setattr(generator, "validation_loss", lambda *_: 1.0)
    monkeypatch.setattr(teacher, "load", lambda context: None)
    monkeypatch.setattr(gkd, "trial", lambda *_: 0.5)
    run, sent, results = new_context(tmp_path, budget="1h"), [], []
    images = torch.randint(0, 256, (8, 8, 8, 1), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    monkeypatch.setattr(gkd, "drawn", lambda *_: lambda period: (None, None, images))
    for rank in range(2):
        runtime = Played(rank, 2, torch.device("cpu"), "no", sent)
        results.append(generator_rounds.run(dataclasses.replace(run, runtime=runtime, ledger=TwoRounds())))
    assert [result["checkpoints"] for result in results] == [[4, 8], [4, 8]]
    assert sent == []
    assert [row["step"] for row in results[0]["memorisation"]["rows"]] == [4, 8]
