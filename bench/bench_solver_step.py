"""solver_step against diffusers' own step and its compiled formula, one thread: ``pytest bench/bench_solver_step.py``.

Every provider gets the same tensors and returns the next sample. ``diffusers`` is ``scheduler.step`` (with guidance by
hand before it, as pipelines do), ``compile`` the step's formula in torch under ``torch.compile``.
"""

import diffusers
import pytest
import torch
from torch.utils.benchmark import Timer

import kr_fast
from kr_fast.ops.solver_step import solver_step
from kr_fast.synthesis import StepTable

# 64 x 3x32x32: in L2 and L3; 256 x 3x32x32: a common batch; 64 x 3x224x224: 38 MB a tensor, memory bandwidth.
SHAPES = [(64, 3, 32, 32), (256, 3, 32, 32), (64, 3, 224, 224)]
CASES = {  # scheduler, guidance scale
    "ddim clip": (diffusers.DDIMScheduler(clip_sample=True), None),
    "guided ddim clip": (diffusers.DDIMScheduler(clip_sample=True), 2.0),
    "ddpm noise": (diffusers.DDPMScheduler(clip_sample=True), None),
}
STEP = 3


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def providers(case, shape):
    scheduler, guidance = CASES[case]
    row = StepTable.compile(scheduler, 10).rows[STEP]
    scheduler.set_timesteps(10)
    t = int(scheduler.timesteps[STEP])
    draw = torch.Generator().manual_seed(0)
    x, cond, uncond = (torch.randn(shape, generator=draw) for _ in range(3))
    uncond = None if guidance is None else uncond
    ids = torch.arange(shape[0]) if row.noise else None

    def ours():
        return solver_step(
            x, cond, row, uncond_output=uncond, guidance_scale=guidance or 1.0, ids=ids, seed=1, stream=4
        )

    def eager():
        e = cond if uncond is None else uncond + guidance * (cond - uncond)
        return scheduler.step(e, t, x).prev_sample

    def formula(x, cond, uncond):
        e = cond if uncond is None else uncond + guidance * (cond - uncond)
        clean = (row.x0_sample * x + row.x0_model * e).clamp(-row.clip, row.clip)
        y = row.sample * x + row.model * e + row.x0 * clean
        return y + row.noise * torch.randn_like(x) if row.noise else y

    compiled = torch.compile(formula, dynamic=False)
    return {"kr_fast": ours, "diffusers": eager, "compile": lambda: compiled(x, cond, uncond)}, row


@pytest.mark.parametrize("provider", ["kr_fast", "diffusers", "compile"])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_solver_step(benchmark, shape, case, provider):
    benchmark.group = f"solver_step {case} {shape}"
    runs, row = providers(case, shape)
    run, eager = runs[provider], runs["diffusers"]
    if row.noise:  # each draws its own: compare what they do without it, then the noise's deviation
        noise = kr_fast.philox_normal(torch.arange(shape[0]), shape[1:], seed=1, stream=4)
        mean = runs["kr_fast"]() - row.noise * noise
        error = float((run() - mean).std() / row.noise - 1)
        assert abs(error) < 0.02
        assert abs((eager() - mean).mean()) < 0.02 * row.noise
    else:
        error = float((run() - eager()).abs().max())
        assert error < 1e-4
    numel = mean.numel() if row.noise else run().numel()
    moved = 4 * numel * (4 if CASES[case][1] else 3)
    source, target = torch.randn(numel), torch.empty(numel)
    copy = (
        8 * numel / Timer("b.copy_(a)", globals={"a": source, "b": target}).blocked_autorange(min_run_time=0.1).median
    )
    benchmark.extra_info.update(error=error, bytes=moved)
    benchmark(run)
    if benchmark.stats:  # not under --benchmark-disable
        rate = moved / benchmark.stats.stats.min
        benchmark.extra_info.update(gb_per_second=rate / 1e9, share_of_copy_bandwidth=rate / copy)
