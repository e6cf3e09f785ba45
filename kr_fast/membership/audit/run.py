"""One audit from names of files: what ``kr-fast audit`` runs. Models, or signals that were saved before."""

import dataclasses
import time
from pathlib import Path

import torch

from kr_fast.ensemble import train_shadows
from kr_fast.membership.attacks.catalog import CATALOG, refuse
from kr_fast.membership.attacks.control import overfitted
from kr_fast.membership.audit.api import checked
from kr_fast.membership.audit.choices import Auxiliary
from kr_fast.membership.audit.config import AuditConfig
from kr_fast.membership.audit.loading import Loaded, load
from kr_fast.membership.audit.query import query
from kr_fast.membership.audit.record_table import unnamed
from kr_fast.membership.audit.report import AuditReport, audit_signals
from kr_fast.membership.audit.scores import missing_of
from kr_fast.membership.inputs.data import AuditData
from kr_fast.membership.inputs.loading import load_npz
from kr_fast.membership.inputs.other_tools import load_lira_tree, load_privacy_meter
from kr_fast.membership.verdict.limits import MOVABLE
from kr_fast.report import repeated, without_folders
from kr_fast.runtime import seeds, state
from kr_fast.runtime.errors import fail
from kr_fast.runtime.storage import files, manifest
from kr_fast.runtime.storage.journal import MISSING, Journal
from kr_fast.runtime.storage.journal import refuse as refuse_file
from kr_fast.runtime.storage.layout import Folder
from kr_fast.runtime.versions import versions


def run_audit(config: AuditConfig) -> tuple[AuditReport, Path] | None:
    """Run, or continue, the audit in ``config.out``; (report, path of the page) on rank 0, None on other ranks.

    Raises: UserError for bad input, before anything is written; FileNotFoundError for missing files.
    """
    runtime = state.current()
    manifest.refuse_inside(config.out, config.data, "audit")
    manifest.check_run(config.out, config.record(), "audit", MOVABLE)  # before data that take long
    data, loaded = (load_saved(config), None) if config.saved else (None, load(config))
    report = None
    try:
        # Attacks on saved signals need no folder: what they refuse leaves none.
        with runtime.main_first() as main:
            if main and data is not None:
                report = score(config, data)
            if main:
                manifest.open_run(config.out, config.record(), "audit", MOVABLE)
                _check_kept(config)
        if loaded is not None and (data := query_models(config, loaded)) is not None:
            report = score(config, data)
        return None if report is None else (report, write(config, report))
    finally:
        manifest.release()


def load_saved(config: AuditConfig) -> AuditData:
    """The saved signals, which hold what each attack that was asked for needs."""
    if config.signals:
        data = load_npz(config.signals, probabilities=config.probabilities)
    elif config.lira_tree:
        data = load_lira_tree(config.lira_tree, targets=[config.target] if config.target else [])
    else:
        if config.target and not config.target.isdecimal():
            fail("audit", "target", "be the index of a model", config.target)
        target = int(config.target) if config.target else None
        data = load_privacy_meter(config.privacy_meter, target=target, signal=config.signal, name=config.signal_name)
    for name in filter(None, (*config.attacks, config.primary)):
        if (missing := missing_of(CATALOG[name], data)) is not None:
            refuse(name, missing)
    return data


def query_models(config: AuditConfig, loaded: Loaded) -> AuditData | None:
    """Train what is missing and ask all models about the pool; None on other ranks than 0."""
    runtime, folder, examples = state.current(), Folder(config.out), loaded.examples
    images, labels, shadows = examples.images, examples.labels, loaded.shadows
    start = time.perf_counter()
    if shadows is None:
        workers = torch.get_num_threads() if runtime.device.type == "cpu" else 1
        given = {"num_models": config.num_shadows, "config": config.recipe(), "workers": workers}
        seed = seeds.derive(config.seed, "shadows")
        given["groups"] = examples.groups
        shadows = train_shadows(loaded.make, images, labels, seed=seed, out=folder.shadows, **given)
    if not runtime.is_main:
        return None
    if loaded.shadows is None:
        _keep(config, "shadows", start, folder.shadows)
    control, start = None, time.perf_counter()
    if config.control:
        given = {"like": config.recipe(), "seed": config.seed, "device": runtime.device, "path": folder.control}
        control = overfitted(loaded.make, images, labels, examples.members, **given)
        _keep(config, "control", start, folder.control)
    files.remove_leftovers(folder.private)
    choices, auxiliary = config.choices(), Auxiliary(examples.population, loaded.synthetic)
    given = (examples.members, None, control, examples.groups, auxiliary, choices)
    inputs = checked(loaded.targets, shadows, images, labels, *given)
    data = query(inputs, choices, folder.signals)
    return dataclasses.replace(data, index=examples.index[data.index])  # numbers in the user's data, not in the pool


def score(config: AuditConfig, data: AuditData) -> AuditReport:
    """All attacks; without a target every shadow is one."""
    choices = config.choices()
    report = audit_signals(data, choices if data.targets else dataclasses.replace(choices, targets="shadows"))
    return report if config.saved else dataclasses.replace(report, records=unnamed(report.records))


def write(config: AuditConfig, report: AuditReport) -> Path:
    """The files of the report; returns the path of the page."""
    source = Path(config.data or config.signals or config.lira_tree or config.privacy_meter).name
    details = {
        "title": f"Membership audit on {source}",
        "command": repeated("audit", Folder(config.out).config),
        "versions": versions("torch", "numpy", "scipy", "scikit-learn"),
        "config": without_folders(config.record()),
    }
    options = {"show_real_images": config.show_real_images, "show_records": config.show_records}
    return report.write(config.out, details, **options)


def _check_kept(config: AuditConfig) -> None:
    """Refuse models of a continued audit that were changed; lost ones are trained again."""
    journal = Journal(config.out)
    for stage in list(journal.seconds()):
        changed = list(journal.changed(stage))
        for path, got in changed:
            if got != MISSING:
                refuse_file(journal, stage, "audit", path, got)
        if changed:
            journal.forget(stage)


def _keep(config: AuditConfig, stage: str, start: float, left: Path) -> None:
    journal = Journal(config.out)
    if journal.done(stage) is None:
        journal.finish(stage, time.perf_counter() - start, {}, [left])
