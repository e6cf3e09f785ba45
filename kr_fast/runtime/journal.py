"""Which stages of a run are finished, with their seconds and results. A finished stage is never done again."""

from pathlib import Path
from typing import Any

from kr_fast.runtime import files


class Journal:
    """The file ``journal.json`` of a run folder, rewritten atomically at the end of each stage."""

    def __init__(self, folder: str | Path):
        self.path = Path(folder) / "journal.json"
        self._stages: dict[str, dict] = {}
        self.reload()

    def reload(self) -> None:
        """Read what another process may have written."""
        self._stages = files.read_json(self.path) if self.path.exists() else {}

    def done(self, stage: str) -> dict[str, Any] | None:
        """The stage's result, or None if it has not been finished."""
        entry = self._stages.get(stage)
        return None if entry is None else entry["result"]

    def finish(self, stage: str, seconds: float, result: dict[str, Any]) -> None:
        """Record ``stage`` as finished."""
        self._stages[stage] = {"seconds": seconds, "result": result}
        files.write_json(self.path, self._stages)

    def seconds(self) -> dict[str, float]:
        """Seconds of each finished stage, in the order in which they were finished."""
        return {stage: entry["seconds"] for stage, entry in self._stages.items()}
