"""What ``kr-fast audit`` reads, and refuses, before its folder is touched: examples, models under attack, shadows."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from kr_fast.data import to_float
from kr_fast.ensemble import ModelArray, Shadows, TrainConfig, load_shadows, recipe_of
from kr_fast.ensemble.checkpoints import load_weights
from kr_fast.ensemble.loading import FACTORY, model_factory
from kr_fast.ensemble.networks import ask, fitted, made
from kr_fast.ensemble.shadows import data_digest, keep_matrix
from kr_fast.membership.attacks.catalog import check_given
from kr_fast.membership.audit.api import CONTROL
from kr_fast.membership.audit.choices import Target
from kr_fast.membership.audit.config import AuditConfig
from kr_fast.membership.audit.examples import Examples, read_examples
from kr_fast.membership.audit.preflight import check_attacks, random_data
from kr_fast.membership.inputs.answers import as_user_error, check_answers
from kr_fast.membership.inputs.copies import refuse_equal_weights
from kr_fast.membership.inputs.data import RESERVED, UNNAMED, check_images
from kr_fast.runtime import seeds, state
from kr_fast.runtime.array_files import read_npy
from kr_fast.runtime.errors import fail
from kr_fast.runtime.log import logger
from kr_fast.runtime.storage import files
from kr_fast.runtime.storage.journal import check_inside

Shape = tuple[int, int, int]


@dataclasses.dataclass(frozen=True)
class Loaded:
    """Examples and models, each of which has answered.

    Args:
        make: returns a fresh network of the shadows' architecture.
        targets: name -> classifier under attack, with its kind and its accuracy on the non-members.
        shadows: those that were given; None where they are still to be trained.
    """

    examples: Examples
    make: Callable[[], nn.Module]
    targets: dict[str, Target]
    shadows: Shadows | None
    synthetic: Tensor | None


def load(config: AuditConfig) -> Loaded:
    """Read and check everything. Raises: UserError naming the option or the file; FileNotFoundError."""
    examples = read_examples(config)
    further = examples.population is not None
    given = {"population": further, "reference": further, "synthetic": bool(config.synthetic)}
    check_given(filter(None, (*config.attacks, config.primary)), given)
    shape = tuple(examples.all_images.shape[1:])
    for name in ("mean", "std"):
        if len(values := getattr(config, name)) not in (0, 1, shape[2]):
            fail("audit", name, f"hold one number, or one for each of {shape[2]} channels", list(values))
    make = _factory(config, examples, config.model, "model")
    models = _models(config, examples, make)
    transfer = _is_transfer(config, models, make)
    shadows = _shadows(config, examples, make) if config.shadows else None
    synthetic = _synthetic(config, shape) if config.synthetic else None
    targets = {}
    for name, model in models.items():
        kind = "transfer" if transfer and not targets else None  # of the first; others are transfer in any case
        recipe = None
        if not targets and config.recipe() != TrainConfig():  # the options of the recipe were given
            recipe = recipe_of(model.models[0], config.recipe())
        targets[name] = Target(model, kind, accuracy=_accuracy(name, model, examples), recipe=recipe)
    also = [name for name, there in ((CONTROL, config.control), ("synthetic", config.synthetic)) if there]
    config.choices().check_paths((*targets, *also), (UNNAMED,))
    _check_training(config, examples, make, models, shadows)
    _check_attacks(config, examples, shadows, synthetic)
    return Loaded(examples, make, targets, shadows, synthetic)


def _shown(config: AuditConfig, examples: Examples, count: int) -> Tensor:
    """The first images as the models are shown them, float ``[n, C, H, W]``."""
    x = to_float(examples.all_images[:count])
    if not config.mean:
        return x
    mean, std = (torch.tensor(each).view(1, -1, 1, 1) for each in (config.mean, config.std))
    return ((x + 1) / 2 - mean) / std


def _factory(config: AuditConfig, examples: Examples, name: str, argument: str) -> Callable[[], nn.Module]:
    shape, sample = tuple(examples.all_images.shape[1:]), _shown(config, examples, 2)
    options = {"num_classes": examples.classes, "image_shape": shape, "width": config.width, "sample": sample}
    return model_factory("audit", argument, name, **options)


def _models(config: AuditConfig, examples: Examples, make: Callable[[], nn.Module]) -> dict[str, ModelArray]:
    """Name -> the model under attack, which has answered some images."""
    models: dict[str, ModelArray] = {}
    for entry in config.checkpoint:
        name, _, file = entry.rpartition("=")
        file, _, other = file.partition("@")
        name = name or ("target" if len(config.checkpoint) == 1 else Path(file).stem)
        if name in models or name == CONTROL:
            fail("audit", "checkpoint", f"have names that differ, and none {CONTROL}", entry)
        taken = (*RESERVED, UNNAMED, *(("synthetic",) if config.synthetic else ()))
        if name in taken or "/" in name:
            fail("audit", "checkpoint", f"have names without / and other than {', '.join(taken)}", entry)
        if not Path(file).exists():
            raise FileNotFoundError(f"audit: checkpoint must be a file, got {file}")
        argument = f"model of {name}" if other else "model"
        own = _factory(config, examples, other, argument) if other else make
        model = made("audit", argument, own, FACTORY)
        load_weights(model, Path(file), f"audit: checkpoint {name}")
        model = model.to(state.current().device).eval()
        ask("audit", argument, model, fitted(model, _shown(config, examples, 64)), examples.classes)
        models[name] = ModelArray([model], normalize=(config.mean, config.std) if config.mean else None)
    return models


def _is_transfer(config: AuditConfig, models: dict[str, ModelArray], make: Callable[[], nn.Module]) -> bool:
    """Whether the shadows were not made as the first model under attack was."""
    name, array = next(iter(models.items()))
    own, shadow = (
        {key: tuple(value.shape) for key, value in model.state_dict().items()} for model in (array.models[0], make())
    )
    if own != shadow and config.kind == "full":
        fail("audit", "kind", f"be transfer where {name} is not of the shadows' architecture", config.kind)
    other = config.checkpoint[0].rpartition("=")[2].partition("@")[2]
    differs = own != shadow or other not in ("", config.model)
    return config.kind == "transfer" or (config.kind == "auto" and (differs or bool(config.shadows)))


def _shadows(config: AuditConfig, examples: Examples, make: Callable[[], nn.Module]) -> Shadows:
    """The shadows that were given, of exactly these examples: of other images their keep matrix would mean nothing."""
    check_inside(config.shadows, "audit")
    shadows, index = load_shadows(make, config.shadows, device=state.current().device), examples.index
    columns = shadows.keep.shape[1]
    if columns not in (len(index), len(examples.all_images)):
        rule = f"be of these {len(index)} examples, members and non-members in the order of the data"
        if columns < len(index):
            rule += " (of a run without the test images that it dropped, which a file of non_members leaves out)"
        fail("audit", "shadows", rule, f"keep.npy of {columns}")
    of_pool = columns == len(index)
    path = Path(config.shadows) / "shadows.json"
    images, labels = examples.all_images, examples.all_labels
    digest = (examples.images, examples.labels) if of_pool else (images, labels)
    if not path.exists():
        logger.warning("audit: %s is missing, so nothing says that these shadows are of these images", path)
    elif files.read_json(path, dict).get("data") != data_digest(*digest):
        rule = "be of these examples: members and non-members in the order of the data"
        fail("audit", "shadows", rule, f"those of other images in {config.shadows}")
    return shadows if of_pool else dataclasses.replace(shadows, keep=shadows.keep[:, index])


def _synthetic(config: AuditConfig, shape: Shape) -> Tensor:
    images = read_npy(config.synthetic, "audit", "synthetic")
    images = torch.from_numpy(images[..., None] if images.ndim == 3 else images)
    return check_images("synthetic", images, shape)


def _accuracy(name: str, array: ModelArray, examples: Examples) -> float:
    """Of a model on the non-members; it has to answer every example with numbers."""
    with as_user_error(f"the answers of {name}"):
        right = array.signals(examples.images, examples.labels, want=("correct",))["correct"][0, :, 0]
        if isinstance(examples.population, tuple):
            array.signals(*examples.population, want=("correct",))
    return float(right[~examples.members].mean())


def _check_training(
    config: AuditConfig,
    examples: Examples,
    make: Callable[[], nn.Module],
    models: dict[str, ModelArray],
    shadows: Shadows | None,
) -> None:
    """What is to be trained answers in training mode; what has been trained is none of the models under attack."""
    if shadows is None or config.control:
        device = state.current().device
        x = to_float(examples.images[:2]).to(device)
        model = made("audit", "model", make, FACTORY).to(device)
        ask("audit", "model", model, x, examples.classes, training=True, finite=False)
    if shadows is not None:
        refuse_equal_weights({n: array.models[0] for n, array in models.items()}, shadows.array.models)
        for index, logits in enumerate(shadows.array(examples.images[:64])):
            check_answers(logits, f"shadow {index}")


def _check_attacks(config: AuditConfig, examples: Examples, shadows: Shadows | None, synthetic: Tensor | None) -> None:
    """Refuse attacks that this keep matrix does not allow, and images that no attack can tell apart."""
    seed = seeds.derive(config.seed, "shadows")
    if shadows is None:
        keep = keep_matrix(config.num_shadows, len(examples.index), seed, examples.groups)
    else:
        keep = shadows.keep
    data = random_data(keep, examples.members, examples.labels, examples.images, examples.population)
    if synthetic is not None:
        data = dataclasses.replace(data, synthetic={"synthetic": synthetic})
    check_attacks(data, config.choices())
