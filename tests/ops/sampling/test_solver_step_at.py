"""solver_step_at: whole trajectories by a counter on the device against the loop of solver_step, and the table."""

import pytest
import torch
from backends import on_backends
from cuda_on_host import same_bits

from kr_fast.backends import registry
from kr_fast.ops.sampling.pack_uint8 import pack_uint8
from kr_fast.ops.sampling.philox_normal import philox_normal
from kr_fast.ops.sampling.solver_step import SolverOutput, SolverRow, solver_step
from kr_fast.ops.sampling.solver_step_at import DeviceTable, solver_step_at
from kr_fast.synthesis.steptable import History, StepTable

diffusers = pytest.importorskip("diffusers")

SCHEDULERS = {
    "ddim clip": diffusers.DDIMScheduler(clip_sample=True),
    "ddpm": diffusers.DDPMScheduler(clip_sample=True),
    "dpm++2m": diffusers.DPMSolverMultistepScheduler(),
    "dpm++3m": diffusers.DPMSolverMultistepScheduler(solver_order=3),
    "unipc": diffusers.UniPCMultistepScheduler(),
    "heun": diffusers.HeunDiscreteScheduler(),
    "pndm": diffusers.PNDMScheduler(),
    "lms": diffusers.LMSDiscreteScheduler(),
    "euler ancestral": diffusers.EulerAncestralDiscreteScheduler(),
    "thresholding": diffusers.DDIMScheduler(thresholding=True, dynamic_thresholding_ratio=0.9, sample_max_value=1.5),
}
pytestmark = pytest.mark.filterwarnings("ignore:__array__:DeprecationWarning")  # of diffusers with numpy 2
SHAPE = (3, 3, 6, 5)
IDS = torch.tensor([4, 2**33 + 1, 0])


@pytest.fixture(scope="module", params=SCHEDULERS)
def table(request):
    return StepTable.compile(SCHEDULERS[request.param], 7)


def network(x, channels_last=False):
    """Smooth, and of the sample's size: a rounding stays one."""
    out = 0.5 * torch.sin(x) + 0.1 * x.roll(1, -1)
    return out.contiguous(memory_format=torch.channels_last) if channels_last else out.contiguous()


def outputs(x, guided, **layout):
    return network(x, **layout), network(0.7 * x, **layout) if guided else None


@registry.forced("cpu")
def begin(table):
    x = philox_normal(IDS, SHAPE[1:], seed=3) * table.init_noise_sigma
    inputs = (x * table.input_scales[0]).contiguous(memory_format=torch.channels_last)
    return x, inputs


@registry.forced("cpu")
def plain(table, guided):
    """Sample and network input after each step of the loop over solver_step in C++."""
    x, inputs = begin(table)
    history, result = History(table), []
    for i, row in enumerate(table.rows):
        cond, uncond = outputs(inputs, guided)
        into = SolverOutput(torch.empty_like(x), None if row.keep is None else torch.empty_like(x), inputs.clone())
        options = {"guidance_scale": 1.7, "ids": IDS, "seed": 3, "stream": 1 + i, "out": into}
        solver_step(x, cond, row, uncond_output=uncond, history=history.read(i), **options)
        history.write(i, x, into.kept)
        x, inputs = into.sample, into.input
        result.append((x, inputs))
    return result


def run(steps, step, samples, kept, cond, uncond, ids, **outputs):
    """One step of a trajectory by the table, as every test here takes it."""
    options = {"guidance_scale": 1.7, "seed": 3, "stream": 1}
    solver_step_at(steps, step, samples, kept, cond, uncond_output=uncond, ids=ids, **options, **outputs)


def by_counter(table, guided, channels_last=False, device="cpu"):
    """The same through one call whose arguments never change."""
    steps = DeviceTable.build(table.rows, table.sources, device)
    samples, kept = steps.ring_buffers(SHAPE)
    x, inputs = (t.to(device) for t in begin(table))
    samples.fill_(float("nan"))  # what no step wrote must not be read
    kept.fill_(float("nan"))
    samples[0] = x
    step, ids, image = torch.zeros(1, dtype=torch.int64, device=device), IDS.to(device), image_of(x)
    result = []
    for i in range(len(table)):
        cond, uncond = outputs(inputs, guided, channels_last=channels_last)
        run(steps, step, samples, kept, cond, uncond, ids, input=inputs, image=image)
        step.add_(1)
        result.append((samples[steps.slots[i, 1]].clone(), inputs.clone()))
    assert int(steps.slots[-1, 1]) == steps.last
    assert torch.equal(image.cpu(), pack_uint8(samples[steps.last].cpu()))
    return result


def image_of(x):
    return torch.empty(len(x), *x.shape[2:], x.shape[1], dtype=torch.uint8, device=x.device)


# Guidance and the layout of the network's output each in both forms; all of their pairs are tests of solver_step.
@pytest.mark.sanitize
@on_backends("solver_step_at")
@pytest.mark.parametrize(("guided", "channels_last"), [(False, False), (True, True)])
def test_trajectories_are_those_of_the_loop(backend, table, guided, channels_last):
    """In CUDA with the bits of the C++ loop, where the network has the same bits: a GPU's sine is another."""
    expected = plain(table, guided)
    result = by_counter(table, guided, channels_last, backend.device)
    size = max(float(x.abs().max()) for x, _ in expected)
    for step, (got, want) in enumerate(zip(result, expected, strict=True)):
        if backend.id == "cuda-host":
            assert same_bits(got[0], want[0]), step
            assert torch.equal(got[1], want[1]), step
        else:
            assert (got[0].cpu() - want[0]).abs().max() <= (1e-4 if got[0].is_cuda else 2e-6) * size, step


@on_backends("solver_step_at", "cuda-gpu")
@pytest.mark.parametrize("guided", [False, True])
def test_one_captured_graph_serves_every_step(backend, table, guided):
    steps = DeviceTable.build(table.rows, table.sources, "cuda")
    samples, kept = steps.ring_buffers(SHAPE)
    x, inputs = (t.cuda() for t in begin(table))
    ids, step = IDS.cuda(), torch.zeros(1, dtype=torch.int64, device="cuda")

    def once():
        cond, uncond = outputs(inputs, guided)
        run(steps, step, samples, kept, cond, uncond, ids, input=inputs)
        step.add_(1)

    once()  # loads the kernels
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        once()
    samples[0], step[0] = x, 0
    inputs.copy_(begin(table)[1])
    for _ in table.rows:
        graph.replay()
    want = plain(table, guided)[-1][0]
    assert (samples[steps.last].cpu() - want).abs().max() <= 1e-4 * want.abs().max()  # sin differs on the GPU


def test_rings_are_as_small_as_lifetimes_allow():
    def sizes(name):
        table = StepTable.compile(SCHEDULERS[name], 7)
        steps = DeviceTable.build(table.rows, table.sources, "cpu")
        return steps.sample_slots, steps.kept_slots

    assert sizes("ddim clip") == (1, 0)
    assert sizes("dpm++2m")[0] <= 2
    assert sum(sizes("dpm++2m")) == 3  # the sample, and what one step keeps while the next reads the one before
    for name in SCHEDULERS:
        assert max(sizes(name)) <= 5, name


def test_no_slot_is_taken_while_it_is_needed():
    """By brute force: what each slot holds, step by step."""
    for scheduler in SCHEDULERS.values():
        table = StepTable.compile(scheduler, 9)
        steps = DeviceTable.build(table.rows, table.sources, "cpu")
        held = {("sample", 0): (0, "sample")}
        for i, (keys, slots) in enumerate(zip(table.sources, steps.slots.tolist(), strict=True)):
            x, y, kept, _, *history = slots
            assert held["sample", x] == (i, "sample")
            for slot, key in zip(history, keys, strict=False):
                assert held[("kept", slot) if slot >= 0 else ("sample", -1 - slot)] == tuple(key)
                assert not (key[1] == "kept" and slot == kept)  # written before the history is read
            held["sample", y] = (i + 1, "sample")
            if kept >= 0:
                held["kept", kept] = (i, "kept")


@on_backends("solver_step_at", "cuda")
def test_a_counter_beyond_the_table_changes_nothing(backend):
    steps = DeviceTable.build([SolverRow(sample=2.0)], [()], backend.device)
    samples, kept = steps.ring_buffers((1, 1, 2, 2))
    samples += 1
    for at, expected in ((-1, 1.0), (1, 1.0), (2**40, 1.0), (0, 2.0)):
        step, output = torch.tensor([at], device=backend.device), torch.zeros(1, 1, 2, 2, device=backend.device)
        solver_step_at(steps, step, samples, kept, output)
        assert torch.equal(samples.cpu(), torch.full((1, 1, 1, 2, 2), expected))


KEEP = SolverRow(keep=(0.0, 1.0, 0.0))
READ = SolverRow(history=(1.0,))


@pytest.mark.parametrize(
    ("rows", "sources", "text"),
    [
        ([], [], "sources must have an entry for each of the 0"),
        ([KEEP, READ], [()], r"sources must have an entry for each of the 2 \(at least 1\) rows, got 1"),
        ([KEEP, READ], [(), ()], r"sources\[1\] must name the row's 1"),
        ([KEEP, READ], [(), ((1, "kept"),)], r"sources\[1\] must name samples and kept tensors of earlier steps"),
        ([READ._replace(history=()), READ], [(), ((0, "kept"),)], r"sources\[1\] must name samples and kept"),
        ([KEEP, READ], [(), ((0, "noise"),)], r"sources\[1\] must name samples and kept"),
        ([SolverRow(x0=1.0, quantile=0.9), SolverRow(x0=1.0)], [(), ()], "rows must threshold at one quantile"),
    ],
)
def test_bad_tables_are_named(rows, sources, text):
    with pytest.raises(ValueError, match="DeviceTable: " + text):
        DeviceTable.build(rows, sources, "cpu")


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"step": torch.zeros(1)}, TypeError, "step must be int64"),
        ({"step": torch.zeros(2, dtype=torch.int64)}, ValueError, r"step must be \[1\] on cpu"),
        ({"samples": torch.zeros(1, 2, 3, 4, 4).double()}, TypeError, "samples must be float32"),
        ({"samples": torch.zeros(0, 2, 3, 4, 4)}, ValueError, r"samples must be contiguous \[1, 2, 3, 4, 4\]"),
        ({"kept": torch.zeros(0, 2, 3, 4, 5)}, ValueError, r"kept must be contiguous \[0, 2, 3, 4, 4\]"),
        ({"model_output": torch.zeros(2, 3, 4, 5)}, ValueError, r"model_output must be \[2, 3, 4, 4\]"),
        ({"uncond_output": torch.zeros(2, 3, 4, 4).half()}, ValueError, "uncond_output must be .* of one dtype"),
        ({"ids": None}, TypeError, "ids must be given for a table with noise"),
        ({"ids": torch.arange(3)}, ValueError, r"ids must be contiguous \[2\] on cpu"),
        ({"stream": 2**32 - 1}, ValueError, "stream must be in"),
        ({"copies": 0}, ValueError, "copies must be in"),
        ({"input": torch.zeros(2, 3, 4, 4)}, ValueError, r"input must be \[2, 3, 4, 4\] channels_last"),
        ({"image": torch.zeros(2, 3, 4, 4, dtype=torch.uint8)}, ValueError, r"image must be contiguous \[2, 4, 4, 3\]"),
    ],
)
def test_bad_arguments_are_named(change, error, text):
    table = DeviceTable.build([SolverRow(noise=1.0)], [()], "cpu")
    samples, kept = table.ring_buffers((2, 3, 4, 4))
    call = {"samples": samples, "kept": kept, "model_output": torch.zeros(2, 3, 4, 4), "ids": torch.arange(2)}
    call |= {"step": torch.zeros(1, dtype=torch.int64)}
    with pytest.raises(error, match="solver_step_at: " + text):
        solver_step_at(table, **{**call, **change})


def test_opcheck():
    table = DeviceTable.build([KEEP, READ._replace(noise=0.5)], [(), ((0, "kept"),)], "cpu")
    samples, kept = (ring.normal_() for ring in table.ring_buffers((2, 1, 4, 4)))
    x = torch.randn(2, 1, 4, 4)
    given = (torch.ones(1, dtype=torch.int64), table.rows, table.slots, samples, kept, x, x.clone(), torch.arange(2))
    more = (None, 2.0, 3, 4, 1, torch.empty_like(x), image_of(x))
    with registry.forced("reference"):
        torch.library.opcheck(torch.ops.kr_fast.solver_step_at, (*given, *more))
