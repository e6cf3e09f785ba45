"""Networks and schedulers from folders in diffusers' format. Nothing is downloaded unless that is asked for."""

import dataclasses
from pathlib import Path
from typing import Any

import torch

from kr_fast.runtime import files
from kr_fast.runtime.errors import UserError, fail

NETWORKS = ("UNet2DModel", "DiTTransformer2DModel")
WHERE = "synthesize"


@dataclasses.dataclass(frozen=True)
class Model:
    """What a sampler is made of."""

    network: Any
    scheduler: Any
    vae: Any = None

    def classes(self, guided: bool) -> int:
        """Classes of the network; the last embedding of a ``UNet2DModel`` that is guided is its null class."""
        config = self.network.config
        embeddings = getattr(config, "num_class_embeds", None)
        return getattr(config, "num_embeds_ada_norm", None) or (embeddings - guided if embeddings else 1)


def load_model(
    path: str, *, scheduler: str = "", device: torch.device, dtype: torch.dtype, allow_download: bool = False
) -> Model:
    """The network and scheduler of ``path``, in evaluation mode.

    Args:
        path: a pipeline's folder (``model_index.json``), a folder with ``unet`` or ``transformer`` and ``scheduler`` in
            it, or the folder of one network; with ``allow_download`` also a repository of the Hugging Face hub.
        scheduler: a class of diffusers that takes the place of the folder's own and takes over its configuration; a
            folder that has none needs it.
    Raises: UserError for a folder that holds something else.
    """
    folder = _folder(path, allow_download)
    parts = {name: folder / name for name in ("unet", "transformer", "vae", "scheduler") if (folder / name).is_dir()}
    if _class_name(folder / "config.json") is not None:
        parts = {"unet": folder}
    if ("unet" in parts) == ("transformer" in parts):
        fail(WHERE, "model", "be a folder with config.json, or with unet or transformer and a scheduler in it", path)
    network = _part(parts.get("unet") or parts["transformer"], NETWORKS, dtype).to(device)
    vae = _part(parts["vae"], ("AutoencoderKL",), dtype).to(device) if "vae" in parts else None
    return Model(network, make_scheduler(scheduler, parts.get("scheduler"), path), vae)


def _folder(path: str, allow_download: bool) -> Path:
    if path and Path(path).is_dir():
        return Path(path)
    if not allow_download or not path:
        fail(WHERE, "model", "be a folder (or a repository of the hub, with --allow-download)", path or "nothing")
    from huggingface_hub import snapshot_download

    try:
        # No pickles: weights come as safetensors.
        return Path(snapshot_download(path, allow_patterns=["*.json", "*.safetensors"]))
    except Exception as error:  # the hub has errors of its own for each of its refusals
        raise UserError(f"{WHERE}: model must be a folder or a repository of the hub, got {path} ({error})") from error


def _class_name(path: Path) -> str | None:
    """``_class_name`` of a configuration, or None without one."""
    try:
        return files.read_json(path)["_class_name"] if path.exists() else None
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{WHERE}: model must hold a configuration of diffusers, got {path} ({error!r})") from error


def _part(folder: Path, known: tuple[str, ...], dtype: torch.dtype) -> Any:
    """A model of one of the ``known`` classes; the folder's own choice of a class is not followed beyond them."""
    import diffusers

    name = _class_name(folder / "config.json")
    if name not in known:
        fail(WHERE, "model", f"hold {' or '.join(known)}", f"{name} in {folder}")
    try:
        return getattr(diffusers, name).from_pretrained(folder, local_files_only=True, torch_dtype=dtype).eval()
    except (OSError, ValueError, RuntimeError) as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else repr(error)
        raise UserError(f"{WHERE}: model must hold readable weights, got {folder} ({first})") from error


def make_scheduler(name: str, own: Path | Any | None, model: str) -> Any:
    """The scheduler ``name`` with the configuration of ``own`` (a folder or a scheduler), or ``own`` without a name."""
    import diffusers

    config = _scheduler_config(own) if own is None or isinstance(own, Path) else {**own.config}
    chosen = name or (config or {}).get("_class_name") or (None if own is None else type(own).__name__)
    if chosen is None:
        fail(WHERE, "scheduler", "be given for a model without one", f"nothing for {model}")
    kind = getattr(diffusers, chosen, None)
    if not (isinstance(kind, type) and issubclass(kind, diffusers.SchedulerMixin)):
        fail(WHERE, "scheduler", "be a scheduler of diffusers", chosen)
    return kind() if config is None else kind.from_config(config)


def _scheduler_config(folder: Path | None) -> dict[str, Any] | None:
    path = None if folder is None else folder / "scheduler_config.json"
    return None if path is None or _class_name(path) is None else files.read_json(path)
