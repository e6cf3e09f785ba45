"""CUDA against Triton for the distillation loss, and the table that the registry chooses by.

``python bench/choices.py measure OUT.json`` times forward and backward on the GPU at hand, by class count and dtype;
``python bench/choices.py table OUT.json ...`` prints what such files say as rows of ``CHOICES`` in
``kr_fast/backends/registry.py``.
"""

import json
import statistics
import sys
from pathlib import Path

# Of each kernel's regime, the most asked for first; each costs Triton two compilations. 50257: rows off 16 bytes.
CLASSES = (1000, 10, 100, 32_000, 128_256, 4096, 50_257, 256, 16_384)
DTYPES = ("bfloat16", "float32", "float16")
MARGIN = 1.03  # a backend that is not faster than by this much does not take over from its neighbour


def rows_for(classes: int) -> int:
    return max(256, min(65_536, 2**24 // classes))


def table(measured: list[dict]) -> list[tuple[int, int, str, str]]:
    """(first class count, first one beyond, dtype, winner), from ``[{"classes", "dtype", "us": {backend: us}}]``.

    Between two measured counts the border is the larger one; before the first and after the last the neighbour holds.
    Where the two differ by less than MARGIN the choice of the smaller count goes on.
    """
    found = []
    for dtype in dict.fromkeys(entry["dtype"] for entry in measured):
        of_dtype = sorted((e for e in measured if e["dtype"] == dtype), key=lambda entry: entry["classes"])
        choices = []
        for entry in of_dtype:
            best, other = sorted(entry["us"], key=entry["us"].get)[:2]
            if choices and entry["us"][other] < MARGIN * entry["us"][best] and choices[-1][1] in (best, other):
                best = choices[-1][1]
            if not choices or choices[-1][1] != best:
                choices.append((entry["classes"] if choices else 2, best))
        ends = [first for first, _ in choices[1:]] + [2**28]
        found += [(first, end, dtype, best) for (first, best), end in zip(choices, ends, strict=True)]
    return found


def as_source(document: dict) -> str:
    """Rows of CHOICES, with what they were measured on."""
    capability = tuple(document["capability"])
    lines = [f"    # {document['gpu']}, torch {document['torch']}, triton {document['triton']}"]
    for first, end, dtype, best in table(document["measured"]):
        other = "triton" if best == "cuda" else "cuda"
        order = f'("{best}", "{other}", "reference")'
        lines.append(f'    ("distillation_loss", range({first}, {end}), (torch.{dtype},), {capability}, {order}),')
    return "\n".join(lines)


def measure(path: Path) -> None:
    """Written after each class count, so that a run which is cut short leaves what it had."""
    import torch
    import triton

    import kr_fast
    from kr_fast.backends import native, registry
    from kr_fast.runtime.storage.files import write_json

    def step(student, teacher, labels):
        student.grad = None
        kr_fast.distillation_loss(student, teacher, labels, temperature=4.0, hard_weight=0.1).backward()

    def microseconds(arguments, calls):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        start.record()
        for _ in range(calls):
            step(*arguments)
        end.record()
        torch.cuda.synchronize()
        return 1e3 * start.elapsed_time(end) / calls

    document = {
        "gpu": torch.cuda.get_device_name(),
        "capability": torch.cuda.get_device_capability(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "measured": [],
    }
    for dtype in DTYPES:
        for classes in CLASSES:
            rows = rows_for(classes)
            teacher = torch.randn(rows, classes, device="cuda", dtype=getattr(torch, dtype)).mul_(2)
            student = (teacher + torch.randn_like(teacher)).requires_grad_()
            arguments = student, teacher, torch.randint(0, classes, (rows,), device="cuda")
            times = {"cuda": [], "triton": []}
            variants = {"cuda": True, "triton": True}
            if classes > 16_384:
                variants["cuda, no clusters"], times["cuda, no clusters"] = False, []
            for turn in range(8):  # by turns, so that a clock that changes meets all of them; the first one warms up
                for name, clusters in variants.items():
                    native.cuda.distillation_loss_use_clusters(clusters)
                    with registry.forced(name.split(",")[0]):
                        taken = microseconds(arguments, 10)
                    if turn:
                        times[name].append(taken)
            native.cuda.distillation_loss_use_clusters(True)
            us = {name: round(statistics.median(values), 2) for name, values in times.items()}
            entry = {"classes": classes, "rows": rows, "dtype": dtype, "us": {k: us[k] for k in ("cuda", "triton")}}
            if "cuda, no clusters" in us:
                entry["us_without_clusters"] = us["cuda, no clusters"]
            entry["gb_per_s"] = round(3 * teacher.nbytes / us["cuda"] / 1e3, 1)
            document["measured"].append(entry)
            print(entry, flush=True)
            write_json(path, document)
            del teacher, student, arguments


if __name__ == "__main__":
    if len(sys.argv) < 3 or sys.argv[1] not in ("measure", "table"):
        raise SystemExit(__doc__)
    if sys.argv[1] == "measure":
        measure(Path(sys.argv[2]))
    else:
        for name in sys.argv[2:]:
            print(as_source(json.loads(Path(name).read_text())))
