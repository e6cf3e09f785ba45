"""Peak memory of whole runs on sets of several sizes: does it grow with the set?

    python bench/data/run_memory.py 1000 4000

makes a folder of so many images of 224 px in colour, maps it however small it is (``--map-above``), runs the toy preset
with its audit on it, and prints the peak of anonymous memory (``Pss_Anon`` of /proc/PID/smaps_rollup, all processes of
the run together: pages of mapped files are not in it, the system takes them back when memory is short) by stage, and
for each pair of sizes the growth an image.
"""

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image

# One epoch of small networks: what counts here is what is held, not what is learnt.
OPTIONS = "--preset toy --teacher-epochs 1 --teacher-batch-size 16 --periods 1 --images 64"
OPTIONS += " --student-batch-size 16 --generator-steps 2 --generator-batch-size 8 --micro-batch 16 --trial-images 16"
OPTIONS += " --tune-noise-scale --tune-guidance-scale --tune-confidence --checkpoints 1"
CODE = """
import sys
from kr_fast.data.readers import decoding
decoding.LARGE = int(sys.argv[1])
from kr_fast.cli import main
sys.exit(main(sys.argv[2:]))
"""


def make_images(folder: Path, count: int, side: int) -> None:
    """Two classes of smooth noise."""
    draw = np.random.default_rng(0)
    for at in range(count):
        (own := folder / "ab"[at % 2]).mkdir(parents=True, exist_ok=True)
        small = draw.integers(0, 256, (8, 8, 3), dtype=np.uint8) // 2 + 96 * (at % 2)
        image = Image.fromarray(small.astype(np.uint8)).resize((side, side), Image.Resampling.BILINEAR)
        image.save(own / f"{at:06}.ppm")


def children(root: int) -> list[int]:
    """``root`` and all processes below it."""
    parents = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                parents[int(entry.name)] = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
    found = {root}
    while more := {pid for pid, parent in parents.items() if parent in found} - found:
        found |= more
    return sorted(found)


def anonymous(root: int) -> int:
    """Bytes of anonymous memory of a tree of processes; shared pages are divided by those who share them."""
    total = 0
    for pid in children(root):
        with contextlib.suppress(OSError):
            lines = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:])
            total += int(lines.get("Pss_Anon", lines["Anonymous"]).split()[0]) << 10
    return total


def peaks(out: Path, command: list[str]) -> dict[str, int]:
    """The peak of each stage, in the order of the run."""
    process, result, stage = subprocess.Popen(command), {}, "reading"
    while process.poll() is None:
        now = anonymous(process.pid)
        with contextlib.suppress(OSError, ValueError):
            done = list(json.loads((out / "journal.json").read_text()))
            stage = f"after {done[-1]}" if done else "data"
        result[stage] = max(result.get(stage, 0), now)
        time.sleep(0.5)
    if process.returncode:
        raise SystemExit(f"exit code {process.returncode}, after peaks of {result} bytes")
    return result


def main() -> None:
    """Measure, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("counts", nargs="+", type=int)
    parser.add_argument("--side", type=int, default=224)
    parser.add_argument("--map-above", type=int, default=0, help="bytes of pixels")
    arguments, further = parser.parse_known_args()  # the others are options of the run
    rows = {}
    for count in arguments.counts:
        with tempfile.TemporaryDirectory() as folder:
            make_images(Path(folder) / "set", count, arguments.side)
            out = Path(folder) / "run"
            command = [sys.executable, "-c", CODE, str(arguments.map_above), "run", "--data", f"{folder}/set"]
            command += ["--out", str(out), *OPTIONS.split(), *further]
            rows[count] = peaks(out, command)
        print(
            json.dumps({"images": count, "side": arguments.side, "MiB": {k: v >> 20 for k, v in rows[count].items()}})
        )
    for first, last in zip(arguments.counts, arguments.counts[1:], strict=False):
        growth = max(rows[last].values()) - max(rows[first].values())
        print(f"{first} to {last} images: {growth / (last - first):.0f} bytes an image")


if __name__ == "__main__":
    os.environ.setdefault("KR_FAST_PROGRESS", "0")
    main()
