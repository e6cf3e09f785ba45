"""``kr-fast info``: what a bug report needs, and every backend and op: whether it can run, or why not and the mend."""

import argparse
import json
import os
import platform
import shutil
import subprocess
from pathlib import Path
from typing import Any

from kr_fast.cli.parser import add_common

PACKAGES = ("torch", "triton", "diffusers", "accelerate", "numpy", "safetensors", "scipy", "scikit-learn", "pillow")
# What others set of a process that changes results, speed or memory.
VARIABLES = ("KR_FAST_", "CUDA_", "NVIDIA_", "OMP_", "MKL_", "TRITON_", "TORCH_", "PYTORCH_", "NCCL_", "ACCELERATE_")
YES = "available"
SHORT = {YES: "yes", f"{YES} in half precision": "half", f"{YES} in float64": "float64"}


def add(subparsers: argparse._SubParsersAction) -> None:
    """Register the subcommand."""
    parser = subparsers.add_parser("info", help="what a bug report needs; backends and ops: available or the reason")
    add_common(parser)
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Print versions, machine, build, environment, backends and ops."""
    facts = collect()
    print(json.dumps(facts, indent=2) if arguments.json else "\n".join(lines(facts)))
    return 0


def collect() -> dict[str, Any]:
    """Versions, machine, build, environment, and the state of every backend and op."""
    from kr_fast.backends import native, registry
    from kr_fast.runtime.versions import versions

    backends = {name: native.missing(name) or YES for name in registry.BACKENDS}
    if native.cpu is not None:
        backends["cpu"] += f", {native.isa()}"
    ops = dict(registry.table())
    for op, cells in ops.items():
        for name in cells:
            if registry.has(op, name) and not backends[name].startswith(YES):
                cells[name] = backends[name]
    environment = {key: value for key, value in sorted(os.environ.items()) if key.startswith(VARIABLES)}
    return {
        "versions": versions(*PACKAGES),
        "machine": _machine(),
        "build": _build(),
        "environment": environment or {"KR_FAST_*": "none set"},
        "backends": backends,
        "ops": ops,
    }


def lines(facts: dict[str, Any]) -> list[str]:
    """The facts for people: the ops as one table, and below it what is refused though its backend can run."""
    from kr_fast.backends import registry
    from kr_fast.runtime.text import aligned

    result = []
    for key in ("versions", "machine", "build", "environment", "backends"):
        result += [key, *(f"  {line}" for line in aligned([(name, str(value)) for name, value in facts[key].items()]))]
    result.append("ops on float32 tensors (half, float64: in that alone; no: see backends; -: no such kernel)")
    rows, refused = [("", *registry.BACKENDS)], []
    for op, cells in facts["ops"].items():
        row = [op]
        for name, state in cells.items():
            has = registry.has(op, name)
            row.append(SHORT.get(state, "no" if has else "-"))
            if has and state not in (*SHORT, facts["backends"][name]):
                refused.append(f"  {op} on {name}: {state}")
        rows.append(tuple(row))
    return [*result, *(f"  {line}" for line in aligned(rows)), *refused]


def _machine() -> dict[str, Any]:
    import torch

    from kr_fast.recycling.config import RecycleConfig
    from kr_fast.recycling.precision import decide
    from kr_fast.recycling.presets import preset
    from kr_fast.runtime.versions import processor

    gpus = []
    for index in range(torch.cuda.device_count()):  # needs a GPU
        found = torch.cuda.get_device_properties(index)
        gpus.append(f"{found.name}, {found.total_memory >> 20} MiB, compute capability {found.major}.{found.minor}")
    return {
        "system": platform.platform(),
        "cpu": f"{processor()}, {len(os.sched_getaffinity(0))} of {os.cpu_count()} cores",
        "memory": f"{(os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES')) >> 20} MiB",
        "threads": torch.get_num_threads(),
        "gpu": "; ".join(gpus) or "none",
        "gpu driver": _driver(),
        "torch is built for": _torch_build(),
        "training on the CPU": str(decide(RecycleConfig(**preset("small")), (28, 28, 1), 10)),
    }


def _build() -> dict[str, Any]:
    """Where the package lies, and what its compiled modules were made with."""
    from kr_fast.backends import native

    cpu, cuda = "not built", "not built"
    if native.cpu is not None:
        sanitized = ", with sanitizers, which make it slow" if getattr(native.cpu, "sanitized", False) else ""
        cpu = f"{getattr(native.cpu, 'compiler', 'unknown')}{sanitized}"
    if native.cuda is not None:
        version = f"{native.cuda.cuda_version // 1000}.{native.cuda.cuda_version % 1000 // 10}"
        cuda = f"CUDA {version} for compute capability {getattr(native.cuda, 'architectures', 'unknown')}"
    folder = str(Path(__file__).resolve().parents[1])
    return {"folder": folder.replace(str(Path.home()), "~", 1), "_cpu": cpu, "_cuda": cuda}


def _torch_build() -> str:
    import torch

    if torch.version.cuda is not None:
        return f"CUDA {torch.version.cuda}, cuDNN {torch.backends.cudnn.version()}"
    return "CPUs" if torch.version.hip is None else f"ROCm {torch.version.hip}"


def _driver() -> str:
    if shutil.which("nvidia-smi") is None:
        return "no nvidia-smi"
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"nvidia-smi fails: {error}"
    text = (done.stdout + done.stderr).strip().splitlines()
    return text[0] if text else "nvidia-smi prints nothing"
