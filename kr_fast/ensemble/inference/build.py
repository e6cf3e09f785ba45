"""Which runner an array takes: batched programs on a GPU, a program for each model, or the models' own forward."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from kr_fast.ensemble.graph.trace import Unsupported
from kr_fast.ensemble.inference.autotune import Tile, choose, tiles
from kr_fast.ensemble.inference.batched_program import BatchedProgram
from kr_fast.ensemble.inference.eager import Eager
from kr_fast.ensemble.inference.preprocessing import Preprocessing
from kr_fast.ensemble.inference.program import Program
from kr_fast.ensemble.inference.queries import Query
from kr_fast.ensemble.inference.runner import ArrayOptions, Runner
from kr_fast.ensemble.inference.tiled_runner import TiledRunner
from kr_fast.ensemble.inference.verify import Probe, is_close, own_answer, probe_images
from kr_fast.ensemble.networks import error_text
from kr_fast.runtime import memory
from kr_fast.runtime.errors import UserError, fail
from kr_fast.runtime.log import logger

BATCHED_DEVICES = ("cuda",)  # device types on which models are batched
PROBE_CHUNK = 4  # images, of which two are looked at: an answer may not follow from the others
# How far, beside the largest, logits may lie from those of other kernels.
TOLERANCE = {torch.float32: 1e-3, torch.float16: 0.02, torch.bfloat16: 0.1}


@torch.inference_mode()
def build(
    models: Sequence[nn.Module],
    options: ArrayOptions,
    preprocessing: Preprocessing,
    dtype: torch.dtype,
    images: Tensor,
    size: tuple[int, int],
    record: dict[str, Any] | None,
) -> Runner:
    """For images like ``images`` uint8 ``[N, H, W, C]``, of which models of ``dtype`` see views of ``size``.

    ``record``: of a run that this one continues, whose steps and kernels are taken; or None.

    Raises: UserError in the models' own words where they fail.
    """
    query, two = Query(size=tuple(size)), probe_images(images)
    sample = preprocessing.batch(two, query, 2, dtype)
    expected, why = own_answer(models[0], sample)
    if options.bn == "batch":
        return Eager(models, sample, options)
    probe = Probe(models, two, query, sample, expected)
    try:
        if why is not None:
            raise Unsupported(why)
        return _traced(probe, options, preprocessing, len(images), record)
    except Unsupported as reason:
        logger.warning("ModelArray: models run one by one in their own forward: %s", reason)
    return Eager(models, sample, options)


def _traced(
    probe: Probe, options: ArrayOptions, preprocessing: Preprocessing, images: int, record: dict | None
) -> Runner:
    """Raises Unsupported."""
    why = None
    if preprocessing.device.type in BATCHED_DEVICES and options.dtype != torch.float64:
        try:
            return _batched(probe, options, preprocessing, record)
        except Unsupported as reason:
            why = reason
    try:
        program = Program(probe.models, probe.sample, options, images)
        count = min(program.chunk, PROBE_CHUNK)
        chunk = preprocessing.batch(probe.images, probe.query, max(count, 2), program.input_dtype)
        probe.check(lambda m: program.bind(m)(chunk[:count] if m == 0 else chunk[:2])[:2], options.dtype)
    except (Unsupported, UserError, torch.OutOfMemoryError, MemoryError):
        raise
    except Exception as error:  # of a forward that runs, in its own order, on tensors that lie otherwise
        raise Unsupported(f"its trace does not run ({error_text(error)})") from None
    if why is not None:
        logger.warning("ModelArray: models run one after the other: %s", why)
    return program


def _batched(probe: Probe, options: ArrayOptions, preprocessing: Preprocessing, record: dict | None) -> TiledRunner:
    """All models at once. Raises Unsupported."""
    if record and options.chunk not in (None, record["images"]):
        rule = f"be {record['images']}, as in the signals that are continued"
        fail("ModelArray", "chunk", rule, options.chunk)
    models, device = probe.models, preprocessing.device
    program = BatchedProgram(models, probe.sample, options.dtype)
    size, two = tuple(probe.images.shape[1:]), probe.images.to(device)
    view = preprocessing.view(probe.query, size)
    candidates = tiles(program, len(models), options.chunk, memory.free_memory(device))
    own, most = program.kernels, candidates[0].models
    groups = [slice(m, min(m + most, len(models))) for m in range(0, len(models), most)]
    logits = torch.cat([program.try_run(group, two, view) for group in groups])
    probe.check(lambda m: logits[m], options.dtype)
    if record:
        tile, program.kernels = Tile(record["models"], record["images"]), program.only(record["layers"])
    elif options.kernels == "own":
        tile = candidates[0]
    else:
        tile = choose(program, candidates, two[:1], view)
    if program.kernels != own:  # what was chosen by its speed has to give the same answers
        again, tolerance = program.try_run(groups[0], two, view), TOLERANCE[options.dtype]
        if not is_close(again, logits[groups[0]], tolerance, tolerance):
            if record:
                fail("ModelArray", "kernels", "give the answers that the record's gave", record["layers"])
            logger.warning("ModelArray: these kernels give other logits and are not used: %s", program.kernels)
            tile, program.kernels = candidates[0], own
    return TiledRunner(program, tile, preprocessing, size, probe.query, capture=device.type == "cuda")
