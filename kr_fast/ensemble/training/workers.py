"""Shadow models on a CPU, several at a time: worker processes of one thread each, which the parent feeds by pipe.

Small networks gain little from a second thread, so M models on T cores are trained fastest T at a time. Workers are
plain child processes and not ``multiprocessing`` ones, which would run the user's main script again. A worker that
loses its parent ends at once.
"""

import contextlib
import dataclasses
import io
import json
import os
import pickle
import queue
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import torch
from torch import Tensor, nn

from kr_fast.data import Split
from kr_fast.ensemble.checkpoints import load_weights
from kr_fast.ensemble.networks import error_text, made
from kr_fast.ensemble.training.recipe import TrainConfig, fit_for
from kr_fast.runtime import seeds
from kr_fast.runtime.errors import UserError, fail
from kr_fast.runtime.storage import files
from kr_fast.runtime.storage.image_rows import ImageRows, Images, MappedFile

IMPORTABLE = "be importable by name (functools.partial of a module's function) for more than one worker"


@dataclasses.dataclass(frozen=True)
class Job:
    """Everything that shadow models are functions of, and the folder they go to."""

    make_model: Callable[[], nn.Module]
    images: Images
    labels: Tensor
    keep: Tensor
    config: TrainConfig
    seed: int
    out: Path | None
    precision: str = "float32"  # of models that are trained one after the other

    def path(self, index: int) -> Path:
        """The file of model ``index``."""
        return self.out / f"model-{index:03d}.safetensors"

    def fresh(self, index: int) -> nn.Module:
        """Model ``index`` before training."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seeds.derive(self.seed, "weights", index))
            return made("train_shadows", "make_model", self.make_model)

    def load(self, index: int, device: torch.device) -> nn.Module:
        """Model ``index`` from its file, in eval mode."""
        model = self.fresh(index)
        load_weights(model, self.path(index), "train_shadows: model")
        return model.to(device).eval()

    def train(self, index: int, device: torch.device) -> nn.Module:
        """Train model ``index`` on its half, and save it."""
        model, half = self.fresh(index).to(device), self.keep[index]
        split = Split(ImageRows(self.images), self.labels).rows(half)
        seed = seeds.derive(self.seed, "shadow", index)
        options = {"precision": self.precision, "which": f" for model {index}"}
        fit_for("train_shadows", model, split, self.config, seed=seed, **options)
        if self.out is not None:
            files.save_tensors(self.path(index), model.state_dict())
        return model


class Trains(Protocol):
    """What workers are given: it can be pickled, and leaves model ``index`` in a file."""

    def train(self, index: int, device: torch.device) -> object:
        """Train model ``index`` and save it."""


class _Pickler(pickle.Pickler):
    """Images in memory go to files in ``folder``, which all workers map: none has a copy of its own."""

    def __init__(self, file: BinaryIO, folder: Path):
        super().__init__(file)
        self.folder = folder

    def reducer_override(self, value: object) -> Any:
        """Of a tensor of images; anything else goes the usual way."""
        if type(value) is not Tensor or value.dtype != torch.uint8 or value.ndim != 4 or value.device.type != "cpu":
            return NotImplemented
        path = self.folder / f"images-{len(list(self.folder.glob('images-*')))}"
        value.contiguous().numpy().tofile(path)
        return _mapped, (path, tuple(value.shape))


def _mapped(path: Path, shape: tuple[int, int, int, int]) -> Tensor:
    return MappedFile(path, shape).images


def sent(where: str, argument: str, value: object, named: object, folder: Path | None = None) -> bytes:
    """``value`` as other processes are given it, but for images, which go to ``folder`` where there is one.

    Raises: UserError if it cannot be, which it blames on ``named``.
    """
    data = io.BytesIO()
    try:
        (pickle.Pickler(data) if folder is None else _Pickler(data, folder)).dump(value)
    except (pickle.PicklingError, AttributeError, TypeError):
        fail(where, argument, IMPORTABLE, named)
    return data.getvalue()


def train(
    job: Trains,
    indices: Sequence[int],
    workers: int,
    done: Callable[[], None],
    where: str = "train_shadows",
    argument: str = "make_model",
) -> None:
    """Train ``indices`` in ``workers`` processes; ``done`` is called after each. Models are left in their files.

    Raises: UserError in the words of the op ``where`` if the job cannot be sent, which it blames on ``argument``, or if
        a worker's process ends, as for want of memory.
    """
    waiting: queue.SimpleQueue[int] = queue.SimpleQueue()
    for index in indices:
        waiting.put(index)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "job"
        file.write_bytes(sent(where, argument, job, getattr(job, argument, job), Path(folder)))
        processes = [_start(file) for _ in range(min(workers, len(indices)))]
        try:
            with ThreadPoolExecutor(len(processes)) as pool:
                try:
                    for future in [
                        pool.submit(_feed, process, waiting, done, where, argument) for process in processes
                    ]:
                        future.result()
                finally:  # before the pool waits for its threads, which wait for their workers
                    _stop(processes)
        finally:
            _stop(processes)


def _start(file: Path) -> subprocess.Popen:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    code = f"import sys; from {__name__} import work; work(sys.argv[1])"
    command = [sys.executable, "-c", code, str(file)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)


def _stop(processes: Sequence[subprocess.Popen]) -> None:
    for process in processes:
        with contextlib.suppress(OSError):
            process.stdin.close()
        process.kill()
        process.wait()


def _feed(
    process: subprocess.Popen, waiting: queue.SimpleQueue, done: Callable[[], None], where: str, argument: str
) -> None:
    while True:
        try:
            index = waiting.get_nowait()
        except queue.Empty:
            return
        with contextlib.suppress(BrokenPipeError):
            process.stdin.write(f"{index}\n")
            process.stdin.flush()
        line = process.stdout.readline()
        if not line:
            code = process.wait()
            why = " (killed, as for want of memory)" if code < 0 else ""
            fail(where, "every worker", "run to the end", f"code {code} from that of model {index}{why}")
        answer = json.loads(line)
        if answer.get("lost"):
            fail(where, argument, IMPORTABLE, answer["lost"])
        if answer["error"]:
            raise UserError(answer["error"])
        done()


def work(file: str) -> None:
    """The worker: an index on each line of stdin, an answer on each line of stdout."""
    torch.set_num_threads(1)
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a user's network prints is no answer
    given: queue.SimpleQueue[int] = queue.SimpleQueue()

    def listen() -> None:
        for line in sys.stdin:
            given.put(int(line))
        os._exit(0)  # the parent is through, or is no more

    threading.Thread(target=listen, daemon=True).start()
    try:
        job: Trains = pickle.loads(Path(file).read_bytes())
    except Exception as error:  # of importing a user's module, or of a name that only the parent's main script has
        print(json.dumps({"lost": error_text(error)}), file=answers, flush=True)
        while True:  # until the parent ends this process
            given.get()
    while True:
        error = None
        try:
            job.train(given.get(), torch.device("cpu"))
        except (UserError, OSError) as caught:
            error = str(caught)
        print(json.dumps({"error": error}), file=answers, flush=True)
