"""A data set on disk: fixed shards, one manifest, a journal of what is finished. Any number of processes, any order.

Shard ``k`` holds the ids of ``[k S, (k + 1) S)`` that belong to the data set, whatever the number of processes. It is
done when its files have their final names and the journal holds their SHA-256; until then nobody sees a part of it.
"""

import contextlib
import dataclasses
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from kr_fast.runtime.errors import fail
from kr_fast.runtime.log import logger
from kr_fast.runtime.storage import files, manifest
from kr_fast.runtime.storage.claims import Claims
from kr_fast.runtime.storage.journal import PartJournal
from kr_fast.synthesis.output.sinks import Output, Sink

INDEX = "index.json"
MOST_SHARDS = 10**6  # files in one folder


@dataclasses.dataclass(frozen=True)
class Layout:
    """The ids of a data set, cut into shards of ``size``."""

    ids: range
    size: int

    def __post_init__(self):
        if self.size < 1:
            fail("synthesize", "shard_size", "be at least 1", self.size)
        if self.ids.step != 1 or len(self.ids) == 0 or self.ids.start < 0 or self.ids.stop > 2**63:
            fail("synthesize", "ids", "be a non-empty range of step 1 in [0, 2^63)", self.ids)
        if len(self.shards) > MOST_SHARDS:
            least = -(-len(self.ids) // MOST_SHARDS)
            fail("synthesize", "shard_size", f"be at least {least} for {len(self.ids)} images", self.size)

    @property
    def shards(self) -> range:
        """Numbers of the shards, of which the first and the last may be short."""
        return range(self.ids.start // self.size, (self.ids.stop - 1) // self.size + 1)

    def of(self, shard: int) -> range:
        """The ids of one shard."""
        return range(max(self.ids.start, shard * self.size), min(self.ids.stop, (shard + 1) * self.size))


class Shards:
    """The folder of a data set: which shards are done, and how one is written."""

    def __init__(self, out: str | Path, values: dict[str, Any], layout: Layout, sink: Sink):
        self.layout, self.sink = layout, sink
        self._folder = manifest.open_shared(out, values, "synthesize")
        self.out = self._folder.out
        try:
            files.remove_leftovers(self.out)
            self.claims = Claims(self.out / manifest.CLAIMS)
        except BaseException:
            self._folder.close()
            raise
        self.journal = PartJournal(self.out / manifest.JOURNAL, {"shard": int, "count": int, "files": dict})
        self._records: dict[int, dict[str, Any]] = {}
        self._lock = threading.Lock()  # the writer's thread asks too, for the progress bar

    def paths(self, shard: int) -> list[Path]:
        """The files of a shard."""
        return [self.out / f"shard-{shard:06d}{suffix}" for suffix in self.sink.suffixes]

    def missing(self, verify: bool = False) -> list[int]:
        """Shards that are not done. ``verify``: nor is one whose files have another SHA-256 than the journal says."""
        self._refresh()
        return [shard for shard in self.layout.shards if not self._done(shard, verify)]

    def is_done(self, shard: int) -> bool:
        """Whether one shard is done, by whichever process."""
        self._refresh()
        return self._done(shard)

    def images_done(self) -> int:
        """Images in the shards that are done."""
        self._refresh()
        return sum(len(self.layout.of(shard)) for shard in self.layout.shards if shard in self._records)

    def _refresh(self) -> None:
        with self._lock:
            for record in self.journal.new():
                known = self._records.setdefault(record["shard"], record)
                if known != record:  # two processes wrote it, on devices that do not give the same bits
                    logger.warning("shard %d was written twice, with different bytes", record["shard"])
                    if self._is_on_disk(record):
                        self._records[record["shard"]] = record

    def _done(self, shard: int, verify: bool = False) -> bool:
        record = self._records.get(shard)
        if record is None or record["count"] != len(self.layout.of(shard)):
            return False
        for path in self.paths(shard):
            entry = record["files"].get(path.name)
            if not isinstance(entry, dict) or not path.exists() or path.stat().st_size != entry.get("bytes"):
                return False
        if verify and not self._is_on_disk(record):
            logger.warning("shard %d has other bytes than when it was written; it is made again", shard)
            del self._records[shard]
            return False
        return True

    def _is_on_disk(self, record: dict[str, Any]) -> bool:
        entries = [(self.out / name, entry) for name, entry in record["files"].items()]
        return all(isinstance(e, dict) and p.exists() and files.sha256(p) == e.get("sha256") for p, e in entries)

    @contextlib.contextmanager
    def writing(self, shard: int) -> Iterator[list[Output]]:
        """Open files that become the shard's on success and vanish on any error; then the journal's line."""
        with contextlib.ExitStack() as stack:
            temporaries = [stack.enter_context(files.atomic_path(path)) for path in self.paths(shard)]
            outputs = [Output(temporary) for temporary in temporaries]
            for output in outputs:
                stack.callback(output.give_up)
            yield outputs
            for output in outputs:
                output.close()
        written = {
            path.name: {"sha256": output.sha256(), "bytes": output.size}
            for path, output in zip(self.paths(shard), outputs, strict=True)
        }
        record = {"shard": shard, "count": len(self.layout.of(shard)), "files": written}
        self.journal.append(record)

    def finish(self) -> None:
        """Once nothing is missing: the index of all shards, and no leftovers. Every process may do it."""
        records = [self._records[shard] for shard in self.layout.shards]
        files.write_json(self.out / INDEX, {"count": len(self.layout.ids), "shards": records})
        if self.claims.supported:  # then nobody is writing a shard
            for path in self.out.glob(".shard-*.tmp"):
                if files.is_temporary(path):
                    path.unlink(missing_ok=True)

    def close(self) -> None:
        """Give back claims and files."""
        self.claims.close()
        self.journal.close()
        self._folder.close()
