"""Memory of the trainings of a run on a set that is larger than memory: does it grow with the set?

    python bench/data/trainings_memory.py 1000 100000

maps so many images of 224 px in colour (a file of holes, which takes no disk) and lets the Teacher, a twin Teacher with
canaries, the generator and 16 shadow Teachers take a step each, of small networks and 2 to 4 images. Printed is the
peak of anonymous memory in MiB by training, and the bytes that a worker process is sent. ``run_memory.py`` measures
whole runs, which take hours on large sets.
"""

import dataclasses
import json
import pickle
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import torch

from kr_fast.data import Dataset, ImageRows, Split
from kr_fast.ensemble import fit, train_shadows
from kr_fast.ensemble.training.recipe import Steps
from kr_fast.recycling.config import RecycleConfig
from kr_fast.recycling.context import Context
from kr_fast.recycling.presets import preset
from kr_fast.recycling.stages import canaries, shadows, teacher
from kr_fast.recycling.stages.generation import generator
from kr_fast.runtime import state
from kr_fast.runtime.storage.image_rows import MappedFile
from kr_fast.runtime.storage.journal import Journal

SIDE = 224
OPTIONS = {"teacher_batch_size": 4, "teacher_epochs": 1, "generator_steps": 2, "generator_batch_size": 2}
OPTIONS |= {"generator_widths": (8, 8, 8, 8, 8), "num_shadows": 16, "audit_canaries": 10, "checkpoints": 1}


class Peaks(threading.Thread):
    """The peak of anonymous memory in MiB of each ``stage``, of this process."""

    def __init__(self):
        super().__init__(daemon=True)
        self.stage, self.most = "start", {}
        self.start()

    def run(self) -> None:
        """Until the process ends."""
        while True:
            lines = dict(line.split(":", 1) for line in Path("/proc/self/smaps_rollup").read_text().splitlines()[1:])
            now = int(lines["Anonymous"].split()[0]) >> 10
            self.most[self.stage] = max(now, self.most.get(self.stage, 0))
            time.sleep(0.05)


def context_of(folder: Path, count: int) -> Context:
    """A run on ``count`` mapped images in shuffled splits."""
    with open(folder / "images.u8", "wb") as file:
        file.truncate(count * SIDE * SIDE * 3)
    every = Split(ImageRows(MappedFile(folder / "images.u8", (count, SIDE, SIDE, 3))), torch.arange(count) % 2)
    order = torch.randperm(count, generator=torch.Generator().manual_seed(0))
    splits = map(every.rows, order.split([count - 2 * (count // 5), count // 5, count // 5]))
    config = RecycleConfig(**{**preset("toy"), "out": str(folder / "run"), **OPTIONS})
    data = Dataset("made", ("a", "b"), *splits)
    return Context(config, folder / "run", state.current(), data, Journal(folder / "run"))


def measure(folder: Path, count: int) -> dict[str, int]:
    """Bytes sent to a worker, and the peaks."""
    Steps.of = classmethod(lambda cls, config, _: cls(config.batch_size, 1))  # a step is an epoch
    context, peaks = context_of(folder, count), Peaks()
    recipe, train = teacher.recipe(context), context.data.train
    make_model = context.make_network("resnet8", 4)
    sent = len(pickle.dumps(context))
    peaks.stage = "teacher"
    fit(make_model(), train, recipe, seed=0)
    peaks.stage = "twin teacher"
    kept = torch.ones(len(train), dtype=torch.bool)
    kept[canaries.drawn(context).index] = False
    fit(make_model(), dataclasses.replace(train, labels=train.labels.clone()).rows(kept), recipe, seed=0)
    peaks.stage = "generator"
    options = {"seed": 0, "state_path": folder / "state.pt", "single_process": True}
    generator.train(context, train, [2], lambda step: folder / f"generator-{step}", **options)
    peaks.stage = "shadows"
    images, labels, _ = shadows.pool(context)
    train_shadows(make_model, images, labels, num_models=16, config=recipe, seed=0)
    return {"sent": sent, **peaks.most}


def main() -> None:
    """Each size in a process of its own."""
    if sys.argv[1] == "--one":
        with tempfile.TemporaryDirectory() as folder:
            print(json.dumps({"images": int(sys.argv[2]), **measure(Path(folder), int(sys.argv[2]))}))
        return
    for count in sys.argv[1:]:
        subprocess.run([sys.executable, __file__, "--one", count], check=True)


if __name__ == "__main__":
    main()
