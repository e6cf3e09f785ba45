"""One audit from names of files: what ``kr-fast audit`` runs. Models, or signals that were saved before."""

import dataclasses
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kr_fast.data import to_float
from kr_fast.ensemble import ModelArray, Shadows, load_shadows, train_shadows
from kr_fast.ensemble.checkpoints import load_weights
from kr_fast.ensemble.loading import FACTORY, model_factory
from kr_fast.ensemble.networks import ask, fitted, made
from kr_fast.ensemble.shadows import data_digest, keep_matrix
from kr_fast.membership.attacks.catalog import CATALOG, check_given, lacking, refuse
from kr_fast.membership.attacks.control import overfitted
from kr_fast.membership.audit.api import CONTROL, audit
from kr_fast.membership.audit.audit_pool import Pool
from kr_fast.membership.audit.config import AuditConfig
from kr_fast.membership.audit.data import RESERVED, AuditData, check_images
from kr_fast.membership.audit.figures import Choices
from kr_fast.membership.audit.rehearsal import rehearse, rehearsed
from kr_fast.membership.audit.report import AuditReport, audit_signals
from kr_fast.membership.inputs.answers import as_user_error, check_answers
from kr_fast.membership.inputs.copies import refuse_equal_weights
from kr_fast.membership.inputs.loading import load_npz
from kr_fast.membership.inputs.other_tools import load_lira_tree, load_privacy_meter
from kr_fast.report import repeated, without_folders
from kr_fast.runtime import seeds, state
from kr_fast.runtime.array_files import read_npy
from kr_fast.runtime.errors import fail
from kr_fast.runtime.log import logger
from kr_fast.runtime.storage import files, manifest
from kr_fast.runtime.storage.journal import MISSING, Journal, check_inside
from kr_fast.runtime.storage.journal import refuse as refuse_file
from kr_fast.runtime.storage.layout import Folder
from kr_fast.runtime.versions import versions


def run_audit(config: AuditConfig) -> tuple[AuditReport, Path] | None:
    """Run, or continue, the audit in ``config.out``; (report, path of the page) on rank 0, None on other ranks.

    Raises: UserError for bad input, before anything is written; FileNotFoundError for missing files.
    """
    options: dict[str, Any] = {
        "attacks": config.attacks or None, "primary": config.primary or None, **config.choices(),
    }  # fmt: skip
    runtime = state.current()
    manifest.refuse_inside(config.out, config.data, "audit")
    manifest.check_run(config.out, config.record(), "audit")  # before data that take long
    data, work = (_saved(config), None) if config.saved else (None, _Work(config))
    report = None
    try:
        # Attacks on saved signals need no folder: what they refuse leaves none.
        with runtime.main_first() as main:
            if main and data is not None:
                _check_needs(config, data)
                every = config.every_shadow or not data.targets
                report = audit_signals(data, targets="shadows" if every else "given", **options)
            if main:
                manifest.open_run(config.out, config.record(), "audit")
                _check_kept(config)
        if work is not None:
            report = work.run(options, "shadows" if config.every_shadow else "given")
        if report is None:
            return None
        source = Path(config.data or config.signals or config.lira_tree or config.privacy_meter).name
        details = {
            "title": f"Membership audit on {source}",
            "command": repeated("audit", Folder(config.out).config),
            "versions": versions("torch", "numpy", "scipy", "scikit-learn"),
            "config": without_folders(config.record()),
        }
        shown = {"show_real_images": config.show_real_images, "show_records": config.show_records}
        return report, report.write(config.out, details, **shown)
    finally:
        manifest.release()


def _check_kept(config: AuditConfig) -> None:
    """Refuse models of a continued audit that were changed; lost ones are trained again."""
    journal = Journal(config.out)
    for stage in list(journal.seconds()):
        found = list(journal.changed(stage))
        for path, got in found:
            if got != MISSING:
                refuse_file(journal, stage, "audit", path, got)
        if found:
            journal.forget(stage)


def _keep(config: AuditConfig, stage: str, start: float, left: Path) -> None:
    journal = Journal(config.out)
    if journal.done(stage) is None:
        journal.finish(stage, time.perf_counter() - start, {}, [left])


def _saved(config: AuditConfig) -> AuditData:
    if config.signals:
        return load_npz(config.signals, probabilities=config.probabilities)
    if config.lira_tree:
        return load_lira_tree(config.lira_tree, targets=[config.target] if config.target else [])
    if config.target and not config.target.isdecimal():
        fail("audit", "target", "be the index of a model", config.target)
    target = int(config.target) if config.target else None
    return load_privacy_meter(config.privacy_meter, target=target, signal=config.signal, name=config.signal_name)


def _check_needs(config: AuditConfig, data: AuditData) -> None:
    """Refuse an attack that was asked for and lacks something in the saved signals."""
    for name in filter(None, (*config.attacks, config.primary)):
        attack = CATALOG[name]
        asked = [(data.shadows_of(each), each) for each in data.targets.values()]
        asked = [(None, None)] if attack.released else asked or [(each, None) for each in data.shadows.values()]
        for each in asked:
            if (missing := lacking(attack, data, *each)) is not None:
                refuse(name, missing)


class _Work:
    """Everything about models that is read and checked before the folder is touched."""

    def __init__(self, config: AuditConfig):
        self.config, self.runtime, self.recipe = config, state.current(), config.recipe()
        pool = Pool(config)
        self.images, self.labels, self.splits, classes = pool.images, pool.labels, pool.splits, pool.classes
        self.index, self.members, self.population = pool.index, pool.members, pool.population
        self._check_needs()
        shape = tuple(self.images.shape[1:])
        for name in ("mean", "std"):
            if len(found := getattr(config, name)) not in (0, 1, shape[2]):
                fail("audit", name, f"hold one number, or one for each of {shape[2]} channels", list(found))
        self.normalize = (config.mean, config.std) if config.mean else None
        self.make = self._factory(config.model, "model", classes, shape)
        self.models = self._models(classes, shape)
        self.transfer = self._is_transfer()
        self.shadows = None
        if config.shadows:
            check_inside(config.shadows, "audit")
            found = load_shadows(self.make, config.shadows, device=self.runtime.device)
            columns = found.keep.shape[1]
            if columns not in (len(self.index), len(self.images)):
                rule = f"be of these {len(self.index)} examples, members and non-members in the order of the data"
                fail("audit", "shadows", rule, f"keep.npy of {columns}")
            keep = found.keep if columns == len(self.index) else found.keep[:, self.index]
            self.shadows = Shadows(found.array, keep)
            self._check_origin(columns)
        self.synthetic = self._synthetic(shape) if config.synthetic else None
        self.accuracies = self._accuracies()
        self._check_training(classes)
        self._rehearse()

    def _accuracies(self) -> dict[str, float]:
        """Of the models on the non-members; each has to answer every example with numbers."""
        images, labels, away = self.images[self.index], self.labels[self.index], ~self.members
        found = {}
        for name, array in self.models.items():
            with as_user_error(f"the answers of {name}"):
                right = array.signals(images, labels, want=("correct",))["correct"][0, :, 0]
                if isinstance(self.population, tuple):
                    array.signals(*self.population, want=("correct",))
            found[name] = float(right[away].mean())
        return found

    def _check_training(self, classes: int) -> None:
        """What is to be trained answers in training mode; what has been trained is none of the models under attack."""
        if self.shadows is None or self.config.control:
            x = to_float(self.images[self.index[:2]]).to(self.runtime.device)
            model = made("audit", "model", self.make, FACTORY).to(self.runtime.device)
            ask("audit", "model", model, x, classes, training=True, finite=False)
        if self.shadows is not None:
            refuse_equal_weights({n: array.models[0] for n, array in self.models.items()}, self.shadows.array.models)
            for index, logits in enumerate(self.shadows.array(self.images[self.index[:64]])):
                check_answers(logits, f"shadow {index}")

    def _rehearse(self) -> None:
        """Refuse attacks that this keep matrix does not allow, and images that no attack can tell apart."""
        config, count = self.config, len(self.index)
        seed = seeds.derive(config.seed, "shadows")
        keep = keep_matrix(config.num_shadows, count, seed) if self.shadows is None else self.shadows.keep
        pool = rehearsed(keep, self.members, self.labels[self.index], self.images[self.index], self.population)
        if self.synthetic is not None:
            pool = dataclasses.replace(pool, synthetic={"synthetic": self.synthetic})
        rmia = Choices(**config.choices()).rmia
        rehearse(pool, config.attacks or None, config.primary or None, rmia, config.every_shadow)

    def _check_needs(self) -> None:
        given = {
            "population": self.population is not None,
            "reference": self.population is not None,
            "synthetic": bool(self.config.synthetic),
        }
        check_given(filter(None, (*self.config.attacks, self.config.primary)), given)

    def _factory(self, name: str, argument: str, classes: int, shape: tuple) -> Callable[[], nn.Module]:
        return model_factory(
            "audit", argument, name, num_classes=classes, image_shape=shape, width=self.config.width,
            sample=self._shown(2),
        )  # fmt: skip

    def _shown(self, count: int) -> Tensor:
        """The first images as the models are shown them, float ``[n, C, H, W]``."""
        x = to_float(self.images[:count])
        if self.normalize is None:
            return x
        mean, std = (torch.tensor(each).view(1, -1, 1, 1) for each in self.normalize)
        return ((x + 1) / 2 - mean) / std

    def _models(self, classes: int, shape: tuple) -> dict[str, ModelArray]:
        """Name -> the model under attack, which has answered some images."""
        found: dict[str, ModelArray] = {}
        for entry in self.config.checkpoint:
            name, _, file = entry.rpartition("=")
            file, _, other = file.partition("@")
            name = name or ("target" if len(self.config.checkpoint) == 1 else Path(file).stem)
            if name in found or name == CONTROL:
                fail("audit", "checkpoint", f"have names that differ, and none {CONTROL}", entry)
            taken = (*RESERVED, "shadows", *(("synthetic",) if self.config.synthetic else ()))
            if name in taken or "/" in name:
                fail("audit", "checkpoint", f"have names without / and other than {', '.join(taken)}", entry)
            if not Path(file).exists():
                raise FileNotFoundError(f"audit: checkpoint must be a file, got {file}")
            argument = f"model of {name}" if other else "model"
            make = self._factory(other, argument, classes, shape) if other else self.make
            model = made("audit", argument, make, FACTORY)
            load_weights(model, Path(file), f"audit: checkpoint {name}")
            model = model.to(self.runtime.device).eval()
            ask("audit", argument, model, fitted(model, self._shown(64)), classes)
            found[name] = ModelArray([model], normalize=self.normalize)
        return found

    def _is_transfer(self) -> bool:
        """Whether the shadows were not made as the first model under attack was."""
        kind, (name, array) = self.config.kind, next(iter(self.models.items()))
        mine, shadow = (
            {key: tuple(value.shape) for key, value in model.state_dict().items()}
            for model in (array.models[0], self.make())
        )
        if mine != shadow and kind == "full":
            fail("audit", "kind", f"be transfer where {name} is not of the shadows' architecture", kind)
        other = self.config.checkpoint[0].rpartition("=")[2].partition("@")[2]
        differs = mine != shadow or other not in ("", self.config.model)
        return kind == "transfer" or (kind == "auto" and (differs or bool(self.config.shadows)))

    def _check_origin(self, columns: int) -> None:
        """Refuse shadows of other images: their keep matrix would mean nothing here."""
        path = Path(self.config.shadows) / "shadows.json"
        if not path.exists():
            logger.warning("audit: %s is missing, so nothing says that these shadows are of these images", path)
            return
        at = self.index if columns == len(self.index) else slice(None)
        if files.read_json(path, dict).get("data") != data_digest(self.images[at], self.labels[at]):
            rule = "be of these examples: members and non-members in the order of the data"
            fail("audit", "shadows", rule, f"those of other images in {self.config.shadows}")

    def _synthetic(self, shape: tuple) -> Tensor:
        images = read_npy(self.config.synthetic, "audit", "synthetic")
        images = torch.from_numpy(images[..., None] if images.ndim == 3 else images)
        return check_images("synthetic", images, shape)

    def run(self, options: dict[str, Any], targets: str) -> AuditReport | None:
        """Train what is missing, then attack."""
        config, folder = self.config, Folder(self.config.out)
        images, labels = self.images[self.index], self.labels[self.index]
        shadows, start = self.shadows, time.perf_counter()
        if shadows is None:
            workers = torch.get_num_threads() if self.runtime.device.type == "cpu" else 1
            shadows = train_shadows(
                self.make, images, labels, num_models=config.num_shadows, config=self.recipe,
                seed=seeds.derive(config.seed, "shadows"), out=folder.shadows, workers=workers,
            )  # fmt: skip
        if not self.runtime.is_main:
            return None
        if self.shadows is None:
            _keep(config, "shadows", start, folder.shadows)
        control, start = None, time.perf_counter()
        if config.control:
            control = overfitted(
                self.make, images, labels, self.members, like=self.recipe, seed=config.seed,
                device=self.runtime.device, path=folder.control,
            )  # fmt: skip
            _keep(config, "control", start, folder.control)
        files.remove_leftovers(folder.private)
        kinds = {next(iter(self.models)): "transfer"} if self.transfer else None
        report = audit(
            self.models, shadows, images, labels, self.members, targets=targets, control=control,
            population=self.population, synthetic=self.synthetic, augment=config.augment, accuracies=self.accuracies,
            kinds=kinds, path=folder.signals, **options,
        )  # fmt: skip
        index = self.index[report.data.index]  # numbers in the user's data, not in the pool
        return dataclasses.replace(report, data=dataclasses.replace(report.data, index=index))
