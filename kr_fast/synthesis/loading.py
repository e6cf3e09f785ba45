"""Networks and schedulers from folders in diffusers' format. Nothing is downloaded unless that is asked for."""

import dataclasses
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from kr_fast.runtime.errors import UserError, fail, first_line
from kr_fast.runtime.storage import files

PARTS = ("unet", "transformer", "vae", "scheduler")
NETWORKS = ("UNet2DModel", "DiTTransformer2DModel")
ASKED = ("synthesize", "model")  # command and option of a model, for errors


@dataclasses.dataclass(frozen=True)
class Model:
    """What a sampler is made of."""

    network: Any
    scheduler: Any
    vae: Any = None

    def classes(self, stated: int, guided: bool) -> int:
        """Classes of the network: as ``stated``, else of its embeddings, 1 without any.

        Raises: UserError for a guided ``UNet2DModel`` of which nothing says whether its last embedding is the null
            class of guidance or a class.
        """
        config = self.network.config
        known, embeddings = getattr(config, "num_embeds_ada_norm", None), getattr(config, "num_class_embeds", None)
        if known and stated not in (0, known):
            fail(ASKED[0], "num_classes", f"be {known}, as the model's configuration says, or 0", stated)
        if embeddings and not stated and guided:
            rule = f"be given with guidance: {embeddings - 1} if the last of the {embeddings} class embeddings of the"
            fail(ASKED[0], "num_classes", f"{rule} model is the null class (without one there is no guidance)", 0)
        return known or stated or embeddings or 1


def load_model(
    path: str,
    *,
    scheduler: str = "",
    device: torch.device,
    dtype: torch.dtype,
    allow_download: bool = False,
    asked: tuple[str, str] = ASKED,
) -> Model:
    """The network and scheduler of ``path``, in evaluation mode.

    Args:
        path: a pipeline's folder (``model_index.json``), a folder with ``unet`` or ``transformer`` and ``scheduler`` in
            it, or the folder of one network; with ``allow_download`` also a repository of the Hugging Face hub.
        scheduler: a class of diffusers that takes the place of the folder's own and takes over its configuration; a
            folder that has none needs it.
        asked: command and option that the path was given by.
    Raises: UserError for a folder that holds something else.
    """
    folder = _folder(path, allow_download, asked)
    parts = {name: folder / name for name in PARTS if (folder / name).is_dir()}
    if _class_name(folder / "config.json", asked) is not None:
        parts = {"unet": folder}
    if ("unet" in parts) == ("transformer" in parts):
        fail(*asked, "be a folder with config.json, or with unet or transformer and a scheduler in it", path)
    _check_index(folder, asked)
    network = _part(parts.get("unet") or parts["transformer"], NETWORKS, dtype, asked).to(device)
    vae = _part(parts["vae"], ("AutoencoderKL",), dtype, asked).to(device) if "vae" in parts else None
    return Model(network, make_scheduler(scheduler, parts.get("scheduler"), path, asked), vae)


def _folder(path: str, allow_download: bool, asked: tuple[str, str]) -> Path:
    if path and Path(path).is_dir():
        return Path(path)
    if not allow_download or not path:
        fail(*asked, "be a folder (or a repository of the hub, with --allow-download)", path or "nothing")
    from huggingface_hub import snapshot_download

    try:
        # No pickles: weights come as safetensors.
        return Path(snapshot_download(path, allow_patterns=["*.json", "*.safetensors"]))
    except Exception as error:  # the hub has errors of its own for each of its refusals
        raise UserError(
            f"{asked[0]}: {asked[1]} must be a folder or a repository of the hub, got {path} ({error})"
        ) from error


def _class_name(path: Path, asked: tuple[str, str]) -> str | None:
    """``_class_name`` of a configuration, or None without one."""
    if not path.exists():
        return None
    name = _json(path, asked).get("_class_name")
    if not isinstance(name, str):
        fail(*asked, "hold a configuration of diffusers", f"{path} (no _class_name)")
    return name


def _json(path: Path, asked: tuple[str, str]) -> dict[str, Any]:
    try:
        return files.read_json(path, dict)
    except UserError as error:
        raise UserError(
            f"{asked[0]}: {asked[1]} must hold a configuration of diffusers, got {path} ({error})"
        ) from error


def _check_index(folder: Path, asked: tuple[str, str]) -> None:
    """A pipeline has no parts but those that are loaded: another autoencoder, or a text encoder, would be left out."""
    path = folder / "model_index.json"
    index = _json(path, asked) if path.exists() else {}
    entries = {name: kind for name, kind in index.items() if not name.startswith("_") and name not in PARTS}
    others = [name for name, kind in entries.items() if isinstance(kind, list) and any(kind)]
    if others:
        rule = f"be made of {', '.join(PARTS)} alone"
        fail(*asked, rule, f"{', '.join(others)} in {index.get('_class_name', path)}")


def _part(folder: Path, known: tuple[str, ...], dtype: torch.dtype, asked: tuple[str, str]) -> Any:
    """A model of one of the ``known`` classes; the folder's own choice of a class is not followed beyond them."""
    import diffusers

    name = _class_name(folder / "config.json", asked)
    if name not in known:
        fail(*asked, f"hold {' or '.join(known)}", f"{name} in {folder}")
    try:
        model, info = getattr(diffusers, name).from_pretrained(
            folder, local_files_only=True, torch_dtype=dtype, output_loading_info=True
        )
    except Exception as error:  # diffusers, safetensors and torch have errors of their own for each kind of damage
        raise UserError(
            f"{asked[0]}: {asked[1]} must hold readable weights, got {folder} ({first_line(error)})"
        ) from error
    missing, foreign = info["missing_keys"], info["unexpected_keys"]
    if missing or foreign:  # what is missing lies on the device meta
        problems = [f"{_first(keys)} {what}" for keys, what in ((missing, "missing"), (foreign, "unexpected")) if keys]
        compiled = any(key.startswith("_orig_mod.") for key in foreign)
        hint = " (saved from a compiled module: save its _orig_mod)" if compiled else ""
        fail(*asked, f"hold the weights of its {name} and no others", f"{'; '.join(problems)} in {folder}{hint}")
    return model.eval()


def _first(keys: Iterable[str]) -> str:
    """The first names and how many there are."""
    names = sorted(keys)
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def make_scheduler(name: str, own: Path | Any | None, model: str, asked: tuple[str, str] = ASKED) -> Any:
    """The scheduler ``name`` with the configuration of ``own`` (a folder or a scheduler), or ``own`` without a name."""
    import diffusers

    config = _scheduler_config(own, asked) if own is None or isinstance(own, Path) else {**own.config}
    chosen = name or (config or {}).get("_class_name") or (None if own is None else type(own).__name__)
    if chosen is None:
        if asked != ASKED:  # no option names one
            fail(*asked, "hold a scheduler beside the network", model)
        fail(ASKED[0], "scheduler", "be given for a model without one", f"nothing for {model}")
    kind = getattr(diffusers, chosen, None)
    if not (isinstance(kind, type) and issubclass(kind, diffusers.SchedulerMixin)):
        fail(asked[0], "scheduler", "be a scheduler of diffusers", chosen)
    try:
        return kind() if config is None else kind.from_config(config)
    except Exception as error:  # of diffusers, for values that it does not take
        got = f"{chosen} ({type(error).__name__}: {first_line(error)})"
        raise UserError(f"{asked[0]}: scheduler must take the configuration of {model}, got {got}") from error


def _scheduler_config(folder: Path | None, asked: tuple[str, str]) -> dict[str, Any] | None:
    path = None if folder is None else folder / "scheduler_config.json"
    return None if path is None or _class_name(path, asked) is None else _json(path, asked)
