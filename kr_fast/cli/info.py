"""``kr-fast info``: versions, devices and, for every op and backend, whether it can run or why not."""

import argparse
import json
import os
from typing import Any

from kr_fast.cli.parser import add_common


def add(subparsers: argparse._SubParsersAction) -> None:
    """Register the subcommand."""
    parser = subparsers.add_parser("info", help="versions, devices, and every op x backend: available or the reason")
    add_common(parser)
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Print versions, devices and ops."""
    facts = collect()
    if arguments.json:
        print(json.dumps(facts, indent=2))
        return 0
    for key in ("versions", "machine", "environment"):
        print(key)
        for name, value in facts[key].items():
            print(f"  {name:<22} {value}")
    print("ops (float32 tensors)")
    for op, cells in facts["ops"].items():
        print(f"  {op}")
        for backend, state in cells.items():
            print(f"    {backend:<10} {state}")
    return 0


def collect() -> dict[str, Any]:
    """Versions, machine, environment, and the state of every op and backend."""
    import torch

    from kr_fast.backends import native, registry
    from kr_fast.recycling.config import RecycleConfig
    from kr_fast.recycling.precision import decide
    from kr_fast.recycling.presets import preset
    from kr_fast.runtime.versions import versions

    gpus = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    machine = {
        "cpu instruction set": native.isa() or "kr_fast._cpu is missing",
        "threads": torch.get_num_threads(),
        "gpu": ", ".join(gpus) or "none",
        "cuda module": f"built with CUDA {native.cuda.cuda_version}" if native.cuda else "not built",
        "training on the CPU": str(decide(RecycleConfig(**preset("small")), (28, 28, 1), 10)),
    }
    environment = {key: value for key, value in sorted(os.environ.items()) if key.startswith("KR_FAST_")}
    return {
        "versions": versions("torch", "triton", "diffusers", "accelerate", "numpy"),
        "machine": machine,
        "environment": environment or {"KR_FAST_*": "none set"},
        "ops": dict(registry.table()),
    }
