"""Shadow models: the same recipe trained on many random halves of a pool, with a record of who was in."""

import dataclasses
import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from kr_fast.data import Split
from kr_fast.ensemble.model_array import ModelArray
from kr_fast.ensemble.training import TrainConfig, fit
from kr_fast.runtime import files, seeds, state
from kr_fast.runtime.errors import fail
from kr_fast.runtime.progress import bar


@dataclasses.dataclass(frozen=True)
class Shadows:
    """``array``: the M models; ``keep``: bool ``[M, N]``, True where example n was in model m's training set."""

    array: ModelArray
    keep: Tensor


def keep_matrix(num_models: int, count: int, seed: int) -> Tensor:
    """bool ``[M, N]``: each example is in exactly half of the models (M even), each model holds about half of them."""
    if num_models < 2 or num_models % 2:
        fail("train_shadows", "num_models", "be even and at least 2", num_models)
    draws = torch.rand(num_models, count, generator=seeds.generator(seed, "keep"))
    return draws.argsort(0).argsort(0) < num_models // 2


def train_shadows(
    make_model: Callable[[], nn.Module],
    images: Tensor,
    labels: Tensor,
    *,
    num_models: int,
    config: TrainConfig,
    seed: int,
    out: str | Path | None = None,
) -> Shadows:
    """Train ``num_models`` models, each on its random half of (``images``, ``labels``).

    Model ``m`` depends on (seed, m) and on nothing else. Under several Accelerate processes the models are shared out
    by stride, with no communication until the end; then ``out`` must be a folder that all can read.

    Args:
        make_model: returns a fresh module; called under a seed of the model's own.
        images: uint8 ``[N, H, W, C]``.
        labels: int64 ``[N]``.
        num_models: even, at least 2.
        config: the target's recipe.
        seed: of the halves, weights and shuffles.
        out: folder for ``model-000.safetensors`` ... and ``keep.npy``; models found there are not trained again.
    Raises: UserError for another configuration in ``out``, or bad arguments.
    """
    runtime = state.current()
    keep = keep_matrix(num_models, len(labels), seed)
    out = None if out is None else Path(out)
    if out is None and runtime.world_size > 1:
        fail("train_shadows", "out", "be a folder that all processes share", out)
    if out is not None and runtime.is_main:
        _claim(out, make_model, images, labels, num_models, config, seed)
        files.save_array(out / "keep.npy", keep.numpy())
    runtime.barrier()
    models = {}
    with bar(len(runtime.shard(num_models)), "shadow models", "model") as progress:
        for index in runtime.shard(num_models):
            models[index] = _shadow(make_model, images, labels, keep[index], config, seed, index, out, runtime.device)
            progress.update()
    runtime.barrier()
    for index in range(num_models):
        if index not in models:  # trained by another process
            models[index] = _load(make_model, seed, index, out, runtime.device)
    return Shadows(ModelArray([models[index] for index in range(num_models)]), keep)


def _shadow(make_model, images, labels, keep, config, seed, index, out, device) -> nn.Module:
    if out is not None and _path(out, index).exists():
        return _load(make_model, seed, index, out, device)
    model = _fresh(make_model, seed, index).to(device)
    fit(model, Split(images[keep], labels[keep]), config, seed=seeds.derive(seed, "shadow", index))
    if out is not None:
        files.save_tensors(_path(out, index), model.state_dict())
    return model


def _fresh(make_model: Callable[[], nn.Module], seed: int, index: int) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seeds.derive(seed, "weights", index))
        return make_model()


def _load(make_model, seed, index, out, device) -> nn.Module:
    model = _fresh(make_model, seed, index)
    model.load_state_dict(files.load_tensors(_path(out, index)))
    return model.to(device).eval()


def _path(out: Path, index: int) -> Path:
    return out / f"model-{index:03d}.safetensors"


def _claim(out: Path, make_model, images, labels, num_models, config, seed) -> None:
    """The folder belongs to one data set and recipe; another one is refused, naming what differs."""
    digest = hashlib.sha256(
        images.cpu().contiguous().numpy().tobytes() + labels.cpu().contiguous().numpy().tobytes()
    ).hexdigest()
    shapes = {name: list(value.shape) for name, value in _fresh(make_model, seed, 0).state_dict().items()}
    architecture = hashlib.sha256(json.dumps(shapes).encode()).hexdigest()
    manifest = {"data": digest, "num_models": num_models, "seed": seed, **dataclasses.asdict(config)}
    manifest["architecture"] = architecture  # of parameter names and shapes
    path = out / "shadows.json"
    if path.exists():
        found = files.read_json(path)
        for key in manifest:
            if found.get(key) != manifest[key]:
                fail("train_shadows", key, f"equal {found.get(key)!r} of the shadows in {out}", repr(manifest[key]))
    else:
        files.write_json(path, manifest)
