"""solver_step_at, the step that a counter in device memory chooses, against solver_step of the same row.

On a GPU (``cuda``, as one captured graph in ``cuda graph``) the difference is what the look-up costs; on a CPU the op
has its definition alone, which ``reference`` measures. The network's next input is written too, as in a trajectory.
"""

import pytest
import torch

from kr_fast.ops.sampling.solver_step import SolverOutput, SolverRow, solver_step
from kr_fast.ops.sampling.solver_step_at import DeviceTable, solver_step_at

# 64 x 3x32x32: a launch; 256 x 3x32x32: a common batch; 64 x 3x224x224: 38 MB a tensor, memory bandwidth.
SHAPES = [(64, 3, 32, 32), (256, 3, 32, 32), (64, 3, 224, 224)]
FIRST = SolverRow(x0_sample=1.1, x0_model=-0.4, clip=1.0, sample=0.5, x0=0.4, keep=(0.0, 0.0, 1.0))
CASES = {  # the row of the step that is measured, the second one
    "clip": FIRST,
    "history": FIRST._replace(history=(0.3,)),
    "noise": FIRST._replace(noise=0.4),
}
GPU = pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"))

pytestmark = pytest.mark.usefixtures("one_thread")


def providers(row, shape, device):
    """Functions that make the step, and the sample that each leaves."""
    draw = torch.Generator().manual_seed(0)
    x, output, kept = (torch.randn(shape, generator=draw).to(device) for _ in range(3))
    network = torch.empty_like(x, memory_format=torch.channels_last)
    options = {"ids": torch.arange(shape[0], device=device), "seed": 1}
    table = DeviceTable.build([FIRST, row], [[], [(0, "kept")] * len(row.history)], device)
    samples, ring = table.ring_buffers(shape)
    source, _, _, _, place, *_ = table.slots[1].tolist()
    step = torch.ones(1, dtype=torch.int64, device=device)
    if row.history:
        ring[place].copy_(kept)

    def at():
        samples[source].copy_(x)  # the step writes over it
        solver_step_at(table, step, samples, ring, output, input=network, stream=1, **options)
        return samples[table.last]

    into = SolverOutput(sample=torch.empty_like(x), input=network)

    def stored():
        into.sample.copy_(x)
        history = (kept,) * len(row.history)
        return solver_step(into.sample, output, row, history=history, stream=2, out=into, **options).sample

    runs = {"solver_step": stored, "solver_step_at": at}
    if device == "cuda":
        at()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            at()
        runs["cuda graph"] = lambda: (graph.replay(), samples[table.last])[1]
    return runs


@pytest.mark.parametrize("device", ["cpu", GPU])
@pytest.mark.parametrize("provider", ["solver_step", "solver_step_at", "cuda graph"])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@torch.inference_mode()
def test_solver_step_at(benchmark, shape, case, provider, device):
    benchmark.group = f"solver_step_at {case} {shape} {device}"
    runs = providers(CASES[case], shape, device)
    if provider not in runs:
        pytest.skip("needs an NVIDIA GPU")
    error = float((runs[provider]() - runs["solver_step"]()).abs().max())
    assert error < 1e-3  # the definition's noise is that of the kernels but for rounding

    def run():
        runs[provider]()
        if device == "cuda":
            torch.cuda.synchronize()

    numel, row = int(torch.tensor(shape).prod()), CASES[case]
    moved = 4 * numel * (4 + len(row.history) + 2)  # and the copy of the sample into its place
    benchmark.extra_info.update(error=error, bytes=moved)
    benchmark(run)
    if benchmark.stats:  # not under --benchmark-disable
        benchmark.extra_info.update(gb_per_second=moved / benchmark.stats.stats.min / 1e9)
