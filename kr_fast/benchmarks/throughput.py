"""How fast images are made, end to end, by this package and by what one would write without it.

Each provider runs in a process of its own, so that peak memory and compiled code are its own. Its images are compared
with those of the ``exact`` tier before the clock starts.
"""

import concurrent.futures
import dataclasses
import multiprocessing
import resource
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kr_fast.benchmarks.case import OURS
from kr_fast.benchmarks.config import CLASSES, MODELS, Case
from kr_fast.ops.sampling.pack_uint8 import pack_uint8
from kr_fast.ops.sampling.philox_normal import philox_normal
from kr_fast.runtime.errors import fail, first_line
from kr_fast.synthesis.labels import LabelPlan
from kr_fast.synthesis.networks import adapt
from kr_fast.synthesis.sampler import Sampler

SEED = 1


def measure(case: Case, providers: tuple[str, ...], repeats: int, progress: Callable[[str], None]) -> dict[str, Any]:
    """Per provider: images/s with and without the sink, NFE x images/s, share of the matrix peak, memory, error.

    Args:
        case: what to run.
        providers: ``documented`` is a float32 loop in diffusers that saves PNG files by PIL, ``loop`` the same
            channels_last (bfloat16 on a GPU) that saves raw bytes, ``compile`` that loop under ``torch.compile``,
            ``kr_fast`` the fused sampler on an optimized network.
        repeats: timed runs, of which the fastest and the median are reported.
        progress: called with the name of each provider before it starts.
    Returns: the case, ``evaluations`` of an image, ``providers``, ``skipped`` (name -> why), the machine.
    Raises: UserError if none runs; what ``kr_fast`` raises.
    """
    context = multiprocessing.get_context("spawn")
    results, skipped = {}, {}
    for provider in providers:
        progress(provider)
        with concurrent.futures.ProcessPoolExecutor(1, mp_context=context) as pool:
            try:
                results[provider] = pool.submit(_run, case, provider, repeats).result()
            except Exception as error:  # without a compiler, too little memory: the others are measured all the same
                if provider == OURS:
                    raise
                skipped[provider] = f"{type(error).__name__}: {first_line(error)}"[:200]
    if not results:
        fail("bench", "providers", "name one that runs here", "; ".join(map(": ".join, skipped.items())))
    found = {"evaluations": case.evaluations, "providers": results, "skipped": skipped}
    return {"case": dataclasses.asdict(case), **found, **_machine(case)}


def _machine(case: Case) -> dict[str, Any]:
    device = torch.cuda.get_device_name() if case.device == "cuda" else f"CPU, {case.threads} threads"
    return {"device": device, "torch": torch.__version__, "python": sys.version.split()[0]}


def _run(case: Case, provider: str, repeats: int) -> dict[str, Any]:
    torch.set_num_threads(case.threads)
    torch.manual_seed(0)
    network = MODELS[case.model]().eval().to(case.device)
    flops = _flops(network)
    ids = torch.arange(case.batch)
    plan = LabelPlan.balanced(CLASSES)
    exact = _sampler(case, network, quality="exact")(ids, plan.labels(ids))
    make, save = _provider(case, provider, network)
    error = (make(ids, plan.labels(ids)).cpu().double() - exact.cpu().double()).square().mean()
    batches = [torch.arange(at, min(at + case.batch, case.images)) for at in range(0, case.images, case.batch)]
    first = list({len(part): part for part in batches}.values())  # one of each size: compiles, captures, warms caches

    if case.device == "cuda":  # needs a GPU
        torch.cuda.reset_peak_memory_stats()  # the exact tier ran in float32

    def plain(batches: list[Tensor]) -> None:
        for part in batches:
            make(part, plan.labels(part))
        if case.device == "cuda":  # needs a GPU
            torch.cuda.synchronize()

    result = {
        "psnr": float(10 * torch.log10(255**2 / error)) if error > 0 else None,
        **_time(plain, batches, first, repeats),
    }
    if case.format is not None:
        result["sink"] = _time(lambda parts: save(parts, plan), batches, first, repeats)
    if case.device == "cuda":  # needs a GPU
        result["peak_bytes"] = torch.cuda.max_memory_allocated()
    else:
        result["peak_bytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    result["evaluations_per_second"] = result["images_per_second"] * case.evaluations
    # After the memory was read: the matrices take more of it than a small network.
    result["share_of_matrix_peak"] = result["evaluations_per_second"] * flops / _matrix_peak(case, provider)
    return result


def _time(
    run: Callable[[list[Tensor]], None], batches: list[Tensor], first: list[Tensor], repeats: int
) -> dict[str, float]:
    run(first)
    seconds, images = [], sum(map(len, batches))
    for _ in range(repeats):
        start = time.perf_counter()
        run(batches)
        seconds.append(time.perf_counter() - start)
    return {
        "images_per_second": images / min(seconds),
        "images_per_second_median": images / statistics.median(seconds),
    }


def scheduler_of(case: Case) -> Any:
    """The case's scheduler. Raises: UserError for a name that diffusers does not have."""
    import diffusers

    kind = getattr(diffusers, case.scheduler, None)
    if kind is None or not hasattr(kind, "set_timesteps"):
        fail("bench", "scheduler", "be the name of a diffusers scheduler", case.scheduler)
    return kind()


def _sampler(case: Case, network: Any, **options: Any) -> Sampler:
    options |= {"guidance_scale": case.guidance_scale, "num_classes": CLASSES, "micro_batch": case.batch}
    return Sampler(network, scheduler_of(case), case.steps, seed=SEED, **options)


def _provider(case: Case, provider: str, network: Any) -> tuple[Callable, Callable]:
    """(ids and labels to uint8 images, batches and plan into files)."""
    if provider == "kr_fast":
        from kr_fast.synthesis.optimized.optimize import optimize

        if case.device == "cuda":  # needs a GPU
            network = network.to(torch.bfloat16)
        optimize(network)
        sampler = _sampler(case, network)
        return sampler, lambda batches, plan: _synthesize(case, sampler, plan, sum(map(len, batches)))
    if provider != "documented":
        network = network.to(memory_format=torch.channels_last)
        if case.device == "cuda":  # needs a GPU
            network = network.to(torch.bfloat16)
    call = torch.compile(network, mode="max-autotune") if provider == "compile" else network
    loop = _Loop(case, network, call)
    return loop, _save_png(loop) if provider == "documented" else _save_raw(loop)


class _Loop:
    """Class-conditional sampling as one writes it with diffusers: the scheduler's step, one batch after the other."""

    def __init__(self, case: Case, network: Any, call: Callable):
        self.case, self.network, self.call, self.scheduler = case, network, call, scheduler_of(case)

    @torch.inference_mode()
    def __call__(self, ids: Tensor, labels: Tensor) -> Tensor:
        case, scheduler = self.case, self.scheduler
        scheduler.set_timesteps(case.steps)
        dtype, labels = self.network.dtype, labels.to(case.device)
        # Any generator would do: it runs once per image.
        x = philox_normal(ids.to(case.device), adapt(self.network).shape, seed=SEED)
        x = x * float(getattr(scheduler, "init_noise_sigma", 1.0))
        null = torch.full_like(labels, CLASSES)
        for t in scheduler.timesteps:
            inputs = scheduler.scale_model_input(x, t).to(dtype)
            if case.guidance_scale is None:
                e = self.call(inputs, t, class_labels=labels).sample.float()
            else:
                output = self.call(torch.cat([inputs] * 2), t, class_labels=torch.cat([labels, null])).sample.float()
                e, unconditional = output.chunk(2)
                e = unconditional + case.guidance_scale * (e - unconditional)
            x = scheduler.step(e, t, x).prev_sample
        return pack_uint8(x.contiguous())


def _save_png(loop: _Loop) -> Callable:
    from PIL import Image

    def save(batches: list[Tensor], plan: LabelPlan) -> None:
        with tempfile.TemporaryDirectory() as folder:
            for part in batches:
                images = loop(part, plan.labels(part)).cpu().numpy()
                for number, image in zip(part.tolist(), images, strict=True):
                    Image.fromarray(image[..., 0] if image.shape[2] == 1 else image).save(f"{folder}/{number:06d}.png")

    return save


def _save_raw(loop: _Loop) -> Callable:
    def save(batches: list[Tensor], plan: LabelPlan) -> None:
        with tempfile.TemporaryFile() as file:
            for part in batches:
                file.write(loop(part, plan.labels(part)).cpu().numpy().tobytes())

    return save


def _synthesize(case: Case, sampler: Sampler, plan: LabelPlan, count: int) -> None:
    from kr_fast.synthesis.pipeline import synthesize

    folder = Path(tempfile.mkdtemp())
    try:
        out = None if case.format == "device" else folder / "set"
        synthesize(sampler, plan, out, count=count, format=case.format)
    finally:
        shutil.rmtree(folder)


def _flops(network: Any) -> int:
    """Operations of one evaluation of one image: two per multiply-add."""
    from torch.utils.flop_counter import FlopCounterMode

    x = torch.zeros((1, *adapt(network).shape), device=network.device, dtype=network.dtype)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network(x, 0, class_labels=torch.zeros(1, dtype=torch.int64, device=x.device))
    return counter.get_total_flops()


def _matrix_peak(case: Case, provider: str) -> float:
    """Operations per second of a large matrix product in the provider's dtype, measured here: the upper limit."""
    half = case.device == "cuda" and provider != "documented"
    size = 8192 if case.device == "cuda" else 1536
    a = torch.randn(size, size, device=case.device, dtype=torch.bfloat16 if half else torch.float32)
    best = float("inf")
    for _ in range(5):
        start = time.perf_counter()
        a @ a
        if case.device == "cuda":  # needs a GPU
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best
