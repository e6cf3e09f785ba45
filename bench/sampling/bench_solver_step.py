"""solver_step against diffusers' own step and its compiled formula, one thread.

Every provider gets the same tensors and returns the next sample, and what a multistep solver keeps for the next step.
``diffusers`` is ``scheduler.step`` (with guidance by hand before it, as pipelines do), ``compile`` the formula of the
step in torch under ``torch.compile``; ``kr_fast in place`` writes over the sample by ``out=``, as the sampler does.
"""

import copy

import pytest
import torch
from torch.utils.benchmark import Timer

import kr_fast
from kr_fast.benchmarks.case import compiled
from kr_fast.ops.sampling.solver_step import SolverOutput, solver_step
from kr_fast.synthesis import StepTable

diffusers = pytest.importorskip("diffusers")

# 64 x 3x32x32: in L2 and L3; 256 x 3x32x32: a common batch; 64 x 3x224x224: 38 MB a tensor, memory bandwidth.
SHAPES = [(64, 3, 32, 32), (256, 3, 32, 32), (64, 3, 224, 224)]
CASES = {  # scheduler, guidance scale
    "ddim clip": (diffusers.DDIMScheduler(clip_sample=True), None),
    "guided ddim clip": (diffusers.DDIMScheduler(clip_sample=True), 2.0),
    "dpm++2m": (diffusers.DPMSolverMultistepScheduler(), None),
    "ddpm noise": (diffusers.DDPMScheduler(clip_sample=True), None),
}
STEP = 3


pytestmark = pytest.mark.usefixtures("one_thread")


def providers(case, shape):
    """Functions that return the next sample, the step's row, and the network's outputs."""
    scheduler, guidance = CASES[case]
    table = StepTable.compile(scheduler, 10)
    row = table.rows[STEP]
    draw = torch.Generator().manual_seed(0)
    x, cond, uncond = (torch.randn(shape, generator=draw) for _ in range(3))
    uncond = None if guidance is None else uncond
    ids = torch.arange(shape[0]) if row.noise else None
    # A multistep scheduler's step reads what its earlier steps left, so it is brought to the step by them.
    scheduler = copy.deepcopy(scheduler)
    scheduler.set_timesteps(10)
    earlier = [torch.randn(shape, generator=draw) for _ in range(STEP if row.history else 0)]
    samples, at = [torch.randn(shape, generator=draw)], STEP - len(earlier)
    for k, output in enumerate(earlier):
        samples.append(scheduler.step(output, scheduler.timesteps[at + k], samples[-1]).prev_sample)
    x = samples[-1] if earlier else x
    history = []
    for j, kind in table.sources[STEP]:
        keep = table.rows[j].keep
        history.append(samples[j] if kind == "sample" else keep[0] * samples[j] + keep[1] * earlier[j])
    history, state = tuple(history), {k: v for k, v in vars(scheduler).items() if not k.startswith("timesteps")}
    state = {key: list(value) if isinstance(value, list) else value for key, value in state.items()}
    emit = ("sample", "kept") if row.keep else ("sample",)
    options = {"uncond_output": uncond, "guidance_scale": guidance or 1.0, "history": history, "ids": ids}
    options |= {"seed": 1, "stream": 4}

    def ours():
        result = solver_step(x, cond, row, emit=emit, **options)
        return result.sample if row.keep else result

    into = SolverOutput(x.clone(), torch.empty_like(x) if row.keep else None)

    def in_place():
        return solver_step(into.sample, cond, row, out=into, **options).sample

    def eager():
        vars(scheduler).update({key: list(v) if isinstance(v, list) else v for key, v in state.items()})
        e = cond if uncond is None else uncond + guidance * (cond - uncond)
        return scheduler.step(e, scheduler.timesteps[STEP], x).prev_sample

    def formula(x, cond, uncond, history):
        e = cond if uncond is None else uncond + guidance * (cond - uncond)
        y = row.sample * x + row.model * e
        if row.x0:
            y = y + row.x0 * (row.x0_sample * x + row.x0_model * e).clamp(-row.clip, row.clip)
        for coefficient, h in zip(row.history, history, strict=True):
            y = y + coefficient * h
        y = y + row.noise * torch.randn_like(x) if row.noise else y
        return (y, row.keep[0] * x + row.keep[1] * e) if row.keep else y

    fast = compiled(formula)  # from a clean state: beyond eight cases torch would run it eagerly

    def inductor():
        result = fast(x, cond, uncond, history)
        return result[0] if row.keep else result

    return {"kr_fast": ours, "kr_fast in place": in_place, "diffusers": eager, "compile": inductor}, row


@pytest.mark.parametrize("provider", ["kr_fast", "kr_fast in place", "diffusers", "compile"])
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
    moved = 4 * numel * (3 + (CASES[case][1] is not None) + len(row.history) + (row.keep is not None))
    source, target = torch.randn(numel), torch.empty(numel)
    copy = (
        8 * numel / Timer("b.copy_(a)", globals={"a": source, "b": target}).blocked_autorange(min_run_time=0.1).median
    )
    benchmark.extra_info.update(error=error, bytes=moved)
    benchmark(run)
    if benchmark.stats:  # not under --benchmark-disable
        rate = moved / benchmark.stats.stats.min
        benchmark.extra_info.update(gb_per_second=rate / 1e9, share_of_copy_bandwidth=rate / copy)
