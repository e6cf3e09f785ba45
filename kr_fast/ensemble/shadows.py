"""Shadow models: the same recipe trained on many random halves of a pool, with a record of who was in."""

import dataclasses
import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from kr_fast.data import to_float
from kr_fast.ensemble.checkpoints import load_weights
from kr_fast.ensemble.graph.architecture import Comparison
from kr_fast.ensemble.inference.model_array import ModelArray
from kr_fast.ensemble.made_by import recipe_digest, recipe_of
from kr_fast.ensemble.networks import ask, check_fresh, check_saved, made
from kr_fast.ensemble.training import trainer
from kr_fast.ensemble.training.recipe import TrainConfig
from kr_fast.ensemble.training.workers import Job, sent, train
from kr_fast.runtime import seeds, state
from kr_fast.runtime.array_files import read_npy
from kr_fast.runtime.errors import UserError, fail
from kr_fast.runtime.inputs import as_groups, as_images, as_integer, as_labels, as_mask, described
from kr_fast.runtime.memory import free_memory
from kr_fast.runtime.progress import bar
from kr_fast.runtime.reprs import ShortRepr
from kr_fast.runtime.storage import files
from kr_fast.runtime.storage.image_rows import Images, hash_images
from kr_fast.training.precision import check_precision


@dataclasses.dataclass(frozen=True, repr=False)
class Shadows(ShortRepr):
    """``array``: the M models; ``keep``: bool ``[M, N]``, True where example n was in model m's training set.

    ``recipe``: what they were made by (:func:`kr_fast.ensemble.recipe_of`), or None where that is not known.
    """

    array: ModelArray
    keep: Tensor
    recipe: dict[str, Any] | None = None


def keep_matrix(num_models: int, count: int, seed: int, groups: np.ndarray | Tensor | None = None) -> Tensor:
    """bool ``[M, N]``: each example is in exactly half of the models (M even), each model holds about half of them.

    With ``groups`` ``[N]`` (integers or texts) whole groups are drawn: each is in exactly half of the models.
    """
    if groups is not None:
        numbers = np.unique(np.asarray(groups), return_inverse=True)[1]
        return keep_matrix(num_models, int(numbers.max()) + 1, seed)[:, torch.from_numpy(numbers)]
    num_models, count = (
        as_integer("train_shadows", name, value) for name, value in (("num_models", num_models), ("count", count))
    )
    if num_models < 2 or num_models % 2:
        fail("train_shadows", "num_models", "be even and at least 2", num_models)
    if count < 1:
        fail("train_shadows", "count", "be at least 1", count)
    if (need := 20 * num_models * count) > (free := free_memory()):
        got = f"{num_models}, which take {need >> 20} MiB where {free >> 20} MiB are free"
        fail("train_shadows", "num_models", f"fit the memory with {count} examples", got)
    draws = torch.rand(num_models, count, generator=seeds.generator(seed, "keep"))
    return draws.argsort(0).argsort(0) < num_models // 2


def train_shadows(
    make_model: Callable[[], nn.Module],
    images: Images,
    labels: Tensor,
    *,
    num_models: int,
    config: TrainConfig,
    seed: int,
    groups: Any = None,
    out: str | Path | None = None,
    workers: int = 1,
    batched: bool | int | None = None,
    precision: str | None = None,
    save_every: int = 5,
) -> Shadows:
    """Train ``num_models`` models, each on its random half of (``images``, ``labels``).

    Model ``m`` depends on (seed, m) and not on the models beside it. One after the other, its last bits depend on the
    number of threads that train it; many at once, on the backend. Both ways take the same steps on the same random
    draws and agree to rounding. Under several Accelerate processes the models are shared out by stride, with no
    communication until the end; then ``out`` must be a folder that all can read.

    Args:
        make_model: returns a fresh module; called under a seed of the model's own.
        images: uint8 ``[N, H, W, C]``, enough for two in every half.
        labels: integers ``[N]`` or ``[N, 1]``, below the number of logits.
        num_models: even, at least 2.
        config: the target's recipe.
        seed: of the halves, weights and shuffles.
        groups: ``[N]`` integers or texts, what each image belongs to (a patient, a site): halves are then of whole
            groups, so that a model that holds none of a group's images is one that never saw it.
        out: folder for ``model-000.safetensors`` ... and ``keep.npy``; models found there are not trained again, and
            groups of models that were cut off go on from the last of their states there.
        workers: on a CPU, how many models are trained at a time, each in a process of one thread; above 1 needs
            ``out``, and a ``make_model`` that can be imported by name.
        batched: whether models are trained many at once: None for yes on a GPU and no on a CPU; True for groups of as
            many models as fit the memory; a number for groups of at most so many. Models that draw random numbers
            (dropout) or cannot be traced are trained one after the other all the same, and a log line says why.
        precision: of activations and products, "float32" or "bfloat16"; None for bfloat16 in models trained at once on
            a GPU that has it, else float32. Weights, their gradients and the sums of BatchNorm are float32. Models
            trained at once on a CPU compute in float32.
        save_every: epochs between two states of a group in ``out``.
    Raises: UserError for another configuration in ``out``, a loss that is not finite (naming the model), models of
        different architecture, a group that does not fit (with the size that would), any failure of the models' own
        code, which are asked before the first is trained, or bad arguments; OSError if the disk is full.
    """
    runtime, seed = state.current(), as_integer("train_shadows", "seed", seed)
    if not isinstance(config, TrainConfig):
        fail("train_shadows", "config", "be a TrainConfig", described(config))
    images = as_images("train_shadows", "images", images).cpu()
    labels = as_labels("train_shadows", "labels", labels, len(images)).cpu()
    if len(images) == 0:
        fail("train_shadows", "images", "hold examples", described(images))
    groups = None if groups is None else as_groups("train_shadows", "groups", groups, len(labels))
    keep = keep_matrix(num_models, len(labels), seed, groups)
    if (least := int(keep.sum(1).min())) < 2:
        of = "" if groups is None else f" in {len(np.unique(groups))} groups"
        rule = "be enough for two in each model's half"
        fail("train_shadows", "images", rule, f"{len(images)}{of}, of which {least} are")
    workers = as_integer("train_shadows", "workers", workers)
    out = None if out is None else Path(out)
    if out is not None and out.exists() and not out.is_dir():
        fail("train_shadows", "out", "be a folder", out)
    if out is None and runtime.world_size > 1:
        fail("train_shadows", "out", "be a folder that all processes share", out)
    if workers < 1 or (workers > 1 and (out is None or runtime.device.type != "cpu")):
        fail("train_shadows", "workers", "be 1, or more on a CPU with out given", workers)
    _check_options(batched, save_every, workers)
    if workers > 1:
        sent("train_shadows", "make_model", make_model, make_model)
    if precision is not None:
        check_precision("train_shadows", precision)
    job = Job(make_model, images, labels, keep, config, seed, out, precision or "float32")
    _check_models(job, runtime.device)
    stacked = runtime.device.type == "cuda" if batched is None else bool(batched)
    dtype = trainer.compute_dtype(precision, runtime.device) if stacked else None
    graph = trainer.supported(job) if stacked else None
    if out is not None and runtime.is_main:
        _claim(job, job.precision if graph is None else str(dtype).removeprefix("torch."), groups)
        files.save_array(out / "keep.npy", keep.numpy())
    runtime.barrier()
    mine = runtime.shard(num_models)
    missing = [index for index in mine if out is None or not job.path(index).exists()]
    models: dict[int, nn.Module] = {}
    if graph is not None and missing:
        setup = trainer.Setup(graph, dtype, runtime.device)
        size = trainer.group_size(job, setup, None if isinstance(batched, bool | None) else batched)
        total, finished = len(mine) * config.epochs, (len(mine) - len(missing)) * config.epochs
        with bar(total, "shadow models", "epoch", finished) as progress:
            models = dict(trainer.train(job, missing, setup, size, save_every, progress.update))
    elif missing:
        with bar(len(mine), "shadow models", "model", len(mine) - len(missing)) as progress:
            if workers > 1:
                train(job, missing, workers, progress.update)
            else:
                for index in missing:
                    models[index] = job.train(index, runtime.device)
                    progress.update()
    runtime.barrier()
    if out is not None and runtime.is_main:  # of groups of other models
        for path in trainer.state_files(out):
            path.unlink(missing_ok=True)
    for index in range(num_models):
        if index not in models:  # trained before, or by another process
            models[index] = job.load(index, runtime.device)
    recipe = recipe_of(job.fresh(0), config)
    return Shadows(ModelArray([models[index] for index in range(num_models)]), keep, recipe)


def load_shadows(
    make_model: Callable[[], nn.Module], folder: str | Path, *, device: torch.device | str = "cpu"
) -> Shadows:
    """The shadows that :func:`train_shadows` left in ``folder``: ``keep.npy`` and ``model-*.safetensors``.

    Args:
        make_model: returns a fresh module of their architecture.
        folder: the ``out`` of :func:`train_shadows`.
        device: to put them on.
    Raises: UserError if a file does not fit; FileNotFoundError.
    """
    folder = Path(folder)
    if not (folder / "keep.npy").exists():
        raise FileNotFoundError(f"load_shadows: folder must hold keep.npy and model-000.safetensors ..., got {folder}")
    keep = as_mask("load_shadows", "keep.npy", read_npy(folder / "keep.npy", "load_shadows", "keep.npy"), 2)
    models = []
    for index in range(len(keep)):
        path = folder / f"model-{index:03d}.safetensors"
        if not path.exists():
            raise FileNotFoundError(f"load_shadows: folder must hold {len(keep)} models, got no {path}")
        model = made("load_shadows", "make_model", make_model)
        load_weights(model, path, "load_shadows: model")
        models.append(model.to(device).eval())
    return Shadows(ModelArray(models), keep, recorded_recipe(folder))


def recorded_recipe(folder: Path) -> dict[str, Any] | None:
    """What ``shadows.json`` in ``folder`` says that the models were made by; None where it does not.

    Raises: UserError if the record was changed.
    """
    path = folder / "shadows.json"
    record = files.read_json(path, dict) if path.exists() else {}
    recipe = record.get("recipe")
    if recipe is not None and (not isinstance(recipe, dict) or record.get("recipe_sha256") != recipe_digest(recipe)):
        raise UserError(f"{path} must hold a recipe with its SHA-256 in recipe_sha256, got another one")
    return recipe


def recipe_record(recipe: dict[str, Any], keep: Tensor) -> dict[str, Any]:
    """What ``shadows.json`` says of a recipe, and of the sizes of the training sets (the least and the largest)."""
    sizes = keep.sum(1)
    spread = [int(sizes.min()), int(sizes.max())]
    return {"recipe": recipe, "recipe_sha256": recipe_digest(recipe), "training_sizes": spread}


def data_digest(images: Images, labels: Tensor) -> str:
    """SHA-256 of the examples, as ``shadows.json`` records it."""
    digest = hashlib.sha256()
    hash_images(digest, images)
    digest.update(labels.contiguous().numpy().data)
    return digest.hexdigest()


def _check_options(batched: bool | int | None, save_every: int, workers: int) -> None:
    number = isinstance(batched, int | np.integer) and not isinstance(batched, bool)
    if not (batched is None or isinstance(batched, bool) or (number and batched >= 1)):
        fail("train_shadows", "batched", "be None, True, False or an integer above 0", repr(batched))
    as_integer("train_shadows", "save_every", save_every, 1)
    if batched and workers > 1:
        fail("train_shadows", "workers", "be 1 where models are trained at once", workers)


def _check_models(job: Job, device: torch.device) -> None:
    """Refuse a ``make_model`` whose models cannot be trained on the job's examples, before anything is."""
    where, argument = "train_shadows", "make_model"
    first, second = job.fresh(0), job.fresh(1)
    check_fresh(where, argument, first, second)
    Comparison(where).pair(first, second, 1)
    if job.out is not None:
        check_saved(where, argument, first)
    second = second.to(device)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        logits = ask(where, argument, second, to_float(job.images[:2].to(device)), training=True)
    as_labels(where, "labels", job.labels, classes=logits.shape[1])


def _claim(job: Job, precision: str, groups: np.ndarray | None) -> None:
    """The folder belongs to one data set and recipe; another one is refused, naming what differs."""
    digest, recipe = data_digest(job.images, job.labels), recipe_of(job.fresh(0), job.config)
    manifest = {"data": digest, "num_models": len(job.keep), "seed": job.seed, **dataclasses.asdict(job.config)}
    manifest["architecture"] = recipe["architecture"]
    manifest["precision"] = precision
    # Of who belongs together, whatever the groups are called.
    numbers = None if groups is None else np.unique(groups, return_inverse=True)[1].astype("<i8")
    manifest["groups"] = None if numbers is None else hashlib.sha256(numbers.tobytes()).hexdigest()
    added = recipe_record(recipe, job.keep)
    path = job.out / "shadows.json"
    if path.exists():
        written = files.read_json(path, dict)
        # What an older version did not record was not there to be chosen: it is what does nothing.
        written = {**dataclasses.asdict(TrainConfig()), "precision": "float32", "groups": None, **written}
        for key in manifest:
            if (value := written.get(key)) != manifest[key]:
                fail("train_shadows", key, f"equal {value!r} of the shadows in {job.out}", repr(manifest[key]))
    else:
        files.write_json(path, {**manifest, **added})
