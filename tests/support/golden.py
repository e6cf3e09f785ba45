"""Whether a refactoring has changed what the package does: everything public on small fixed inputs, by hash.

    python tests/support/golden.py record FILE     write {name: hash, short value or error} as JSON
    python tests/support/golden.py compare FILE    record again, print every name that differs, is missing or is new

``compare`` exits with 1 if anything differs. Both must run on one machine: a result may depend on the processor. Inputs
are drawn from seeds, one thread is used, and no case knows of another, so that a change shows under the names of what
it changed. Names begin with ``op/`` (each op on each backend, instruction set and dtype), ``wrong/`` (what is said of
wrong arguments), ``signature/``, the part of the package, ``command/`` (toy runs of the command line in processes), or
``messages/`` (what a part has logged).
"""

import contextlib
import inspect
import itertools
import json
import logging
import os
import re
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from golden_cases import membership, models, ops
from golden_cases.base import Cases, Recorder, find, get, integers, outcome, public
from torch import Tensor

import kr_fast
from kr_fast import _cpu
from kr_fast.backends import registry

FACTORY = """
from torch import nn
def make(num_classes, in_channels):
    return nn.Sequential(nn.Flatten(), nn.Linear(64 * in_channels, 16), nn.ReLU(), nn.Linear(16, num_classes))
"""
SECTIONS = {"membership": membership.membership, "ensemble": models.arrays}
SECTIONS["synthesis"] = models.synthesis
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# What no two recordings have alike: keys of JSON and YAML, files, and places in text.
PASSING = {"stages", "versions", "seconds", "torch", "kr_fast", "date", "time", "host", "memory", "out", "command"}
BY_NAME = {".html", ".png", ".md", ".lock", ".claims", ".jsonl", ".txt", ".pt"}


def backends() -> dict[str, tuple[str | None, str]]:
    """Name -> (forced backend, instruction set)."""
    best = _cpu.isa()
    cpu = {f"cpu {isa}": ("cpu", isa) for isa in _cpu.isa_available()}
    return {"automatic": (None, best), "reference": ("reference", best), **cpu}


@contextlib.contextmanager
def using(backend: str | None, isa: str) -> Iterator[None]:
    """A backend and an instruction set."""
    before = _cpu.isa()
    _cpu.set_isa(isa)
    try:
        with registry.forced(backend):
            yield
    finally:
        _cpu.set_isa(before)


def result(call: ops.Call, given: dict[str, Any]) -> Any:
    """The result, with gradients where the call has some, and the inputs afterwards, which must not have changed."""
    name = call.function
    function = find(call.op, name) if isinstance(name, str) else name
    given = dict(given)
    results = [function(**given)]
    requested = [name for name in call.grads if isinstance(given.get(name), Tensor)]
    if requested:
        leaves = {name: given[name].detach().requires_grad_() for name in requested}
        with_grad = function(**{**given, **leaves})
        outputs = [with_grad] if isinstance(with_grad, Tensor) else with_grad
        outputs = [each for each in outputs if each.requires_grad]
        upstream = [torch.linspace(0.5, 2, each.numel()).view(each.shape).to(each.dtype) for each in outputs]
        torch.autograd.backward(outputs, upstream)
        results += [with_grad, {name: leaf.grad for name, leaf in leaves.items()}]
    return results, {name: value for name, value in given.items() if isinstance(value, Tensor)}


def wrong(arguments: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """One argument wrong at a time."""
    for name, value in arguments.items():
        if isinstance(value, Tensor):
            other = value.to(torch.int8 if value.dtype.is_floating_point else torch.float32)
            changed = {"text": "x", "None": None, "dtype": other, "dimensions": value[None], "length": value[:-1]}
            changed["complex"] = torch.zeros(value.shape, dtype=torch.complex64)
            if value.dtype.is_floating_point:
                changed |= {"nan": torch.full_like(value, torch.nan), "gradient": value.clone().requires_grad_()}
        elif isinstance(value, bool | str):
            changed = {"text": "nonsense", "None": None}
        elif isinstance(value, int | float):
            changed = {"text": "x", "None": None, "-1": -1, "0": 0, "half": 0.5, "nan": float("nan")}
        else:
            changed = {} if isinstance(value, dict) else {"empty": (), "text": "x"}
        for how, each in changed.items():
            yield f"{name}, {how}", {**arguments, name: each}


def record_ops(into: Recorder) -> None:
    """Every op on every backend, and what each public function says of wrong arguments."""
    seen: dict[str, tuple[ops.Call, dict[str, Any]]] = {}
    known = set()
    for dtype, (name, chosen) in itertools.product(DTYPES, backends().items()):
        of = str(dtype).removeprefix("torch.")
        for call in ops.calls(dtype):
            known.add(call.op)
            with using(*chosen):
                results = [outcome(lambda call=call, each=each: result(call, each)) for each in call.arguments]
            into.entries[f"op/{call.op}/{call.variant}/{of}/{name}"] = into.short(results)
            if dtype == torch.float32:
                function = call.function if isinstance(call.function, str) else call.function.__name__
                longest = max([*call.arguments, seen.get(function, (None, {}))[1]], key=len)
                seen[function] = (call, longest)
    for function, (call, arguments) in seen.items():
        for how, each in wrong(arguments):
            into.add(f"wrong/{function}/{how}", lambda call=call, each=each: result(call._replace(grads=()), each)[0])
    for op in registry.ops():
        into.entries[f"op/{op}"] = "covered" if op in known else "not covered: add its calls to golden_cases/ops.py"


def signature(value: Any) -> str:
    """Parameters with their defaults; annotations name modules, which move."""
    if not callable(value):
        return type(value).__name__
    parameters = inspect.signature(value).parameters.values()
    return str(inspect.Signature([each.replace(annotation=inspect.Parameter.empty) for each in parameters]))


def scrubbed(value: Any) -> Any:
    """JSON or YAML without what passes: times, versions, paths."""
    if isinstance(value, Mapping):
        return {key: scrubbed(each) for key, each in value.items() if key not in PASSING}
    return [scrubbed(each) for each in value] if isinstance(value, list) else value


def files_of(folder: Path, begin: str) -> Cases:
    """All files: data by their bytes, JSON and YAML without what passes, pages by name alone."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    names = [re.sub(r"[0-9a-f]{16}", "HEX", str(path.relative_to(folder))) for path in paths]
    yield f"{begin}/names", lambda: names
    for name, path in zip(names, paths, strict=True):
        if path.name in (".lock", ".claims") or path.suffix in BY_NAME:
            continue
        if path.suffix in (".json", ".yaml"):
            read = json.loads if path.suffix == ".json" else yaml.safe_load
            content = scrubbed(read(path.read_text()))
            if path.name == "journal.json":  # hashes of files that hold dates
                content = {key: {**each, "files": sorted(each.get("files", ()))} for key, each in content.items()}
            if path.name in ("metrics.json", "audit.json"):  # as fine as a reader would ask
                for key, value in content.items():
                    within = value if isinstance(value, dict) else {"": value}
                    for inner, each in within.items():
                        yield f"{begin}/{name}/{key}/{inner}", lambda each=each: each
            else:
                yield f"{begin}/{name}", lambda content=content: content
        elif path.name == "audit.npz":  # a zip file has a date
            yield f"{begin}/{name}", lambda path=path: dict(np.load(path))
        else:
            yield f"{begin}/{name}", path.read_bytes


def command(*arguments: str | Path, cwd: Path) -> str:
    """What ``kr-fast`` prints; its error in place of it where it fails."""
    here = str(Path(kr_fast.__file__).parents[1])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "KR_FAST_PROGRESS": "0", "PYTHONPATH": here}
    line = [sys.executable, "-m", "kr_fast", *map(str, arguments)]
    done = subprocess.run(line, capture_output=True, text=True, cwd=cwd, env=environment)
    said = (done.stderr.strip() or done.stdout.strip()).splitlines()
    return done.stdout if done.returncode == 0 else f"{done.returncode}: {said[-1:]}"


def write_inputs(folder: Path) -> None:
    """Signals, a factory, weights and images."""
    z, keep, labels, members = (value.numpy() for value in membership.logits())
    arrays = {"logits": z[:-1], "keep": keep, "labels": labels, "members": members, "target/t/logits": z[-1]}
    arrays |= {"population/labels": labels[:30], "population/logits": z[:-1, :30] + 0.1}
    np.savez(folder / "signals.npz", **arrays, **{"target/t/population/logits": z[-1, :30] + 0.1})
    (folder / "mynet.py").write_text(FACTORY)
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 16), torch.nn.ReLU(), torch.nn.Linear(16, 3))
    torch.save(net.state_dict(), folder / "net.pt")
    arrays = {}
    for k, (which, count) in enumerate({"train": 60, "val": 30, "test": 40}.items()):
        arrays[f"{which}_images"] = integers(256, count, 8, 8, seed=k, dtype=torch.uint8).numpy()
        arrays[f"{which}_labels"] = integers(3, count, seed=k).numpy()
    np.savez(folder / "data.npz", **arrays)


def record_commands(into: Recorder) -> None:
    """A toy run, data sets from its generator, audits of saved signals and of models: all files and what is printed."""
    folder = into.folder
    write_inputs(folder)
    run, audit = ["run", "--preset", "toy"], ["--attacks", "lira", "rmia", "base", "loss", "--every-shadow"]
    model = ["--model", "mynet:make", "--checkpoint", "net.pt", "--data", "data.npz", "--num-shadows", 4, "--epochs", 3]
    made = ["synthesize", "--model", "run", "--count", 70, "--shard-size", 32, "--seed", 3, "--format"]
    lines = {
        "run": [*run, "--audit-control", "--audit-generator", "retrained", "--audit-page"],
        "npy": [*made, "npy"],
        "webdataset": [*made, "webdataset"],
        "audit of signals": ["audit", "--signals", "signals.npz", *audit],
        "audit of a model": ["audit", *model, "--batch-size", 16, "--augment", "flip"],
    }
    for name, arguments in lines.items():
        out = name.replace(" ", "-")
        into.add(f"command/{name}/printed", lambda a=arguments, out=out: command(*a, "--out", out, cwd=folder))
        into.add_all("command", files_of(folder / out, name))
    for line in ("run --seed -1", "audit", "synthesize --model none", "audit --signals no.npz", "no"):
        into.add(f"command/wrong/{line}", lambda line=line: command(*line.split(), cwd=folder))


def record() -> dict[str, str]:
    """Everything."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    os.environ["DIFFUSERS_VERBOSITY"] = "error"
    with tempfile.TemporaryDirectory() as folder:
        into = Recorder(Path(folder).resolve())
        logging.getLogger("kr_fast").handlers[:], logging.getLogger("kr_fast").propagate = [into], False
        sections: dict[str, Any] = {"ops": record_ops, "commands": record_commands}
        for package in ("kr_fast", "kr_fast.membership", "kr_fast.ensemble"):
            names = public(package)
            into.entries[f"names/{package}"] = ", ".join(names)
            for name in names:
                into.add(f"signature/{package}.{name}", lambda p=package, n=name: signature(get(p, n)))
        for name, cases in SECTIONS.items():
            sections[name] = lambda into, name=name, cases=cases: into.add_all(name, cases(into.folder))
        for name, section in sections.items():
            start = time.perf_counter()
            section(into)
            into.entries[f"messages/{name}"] = into.short(sorted(into.messages))
            into.messages.clear()
            print(f"{name}: {time.perf_counter() - start:.1f} s", file=sys.stderr)
        return into.entries


def main(what: str, file: str) -> int:
    after = record()
    if what == "record":
        Path(file).write_text(json.dumps(after, indent=1, sort_keys=True) + "\n")
        print(f"{len(after)} entries")
        return 0
    before = json.loads(Path(file).read_text())
    same = 0
    for name in sorted(before.keys() | after.keys()):
        old, new = before.get(name, "absent"), after.get(name, "absent")
        same += old == new
        if old != new:
            kind = "new" if old == "absent" else "missing" if new == "absent" else "differs"
            print(f"{kind}: {name}\n    before: {old}\n    now:    {new}")
    print(f"{same} of {len(before)} entries are the same, {len(before.keys() | after.keys()) - same} differ")
    return int(before != after)


if __name__ == "__main__":
    if len(sys.argv) != 3 or sys.argv[1] not in ("record", "compare"):
        sys.exit(__doc__)
    sys.exit(main(*sys.argv[1:]))
