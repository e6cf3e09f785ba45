"""The models of an audit and their answers on one pool of examples: what the attacks then read."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kr_fast.data import shared_images
from kr_fast.ensemble import ModelArray, Query, Shadows
from kr_fast.ensemble.inference.queries import as_queries
from kr_fast.membership.attacks.catalog import CATALOG, DEFAULT
from kr_fast.membership.audit.choices import Choices
from kr_fast.membership.inputs.answers import ANSWERS, SIGNALS, as_user_error
from kr_fast.membership.inputs.data import UNNAMED, AuditData, ShadowSignals, TargetSignals
from kr_fast.membership.inputs.features import penultimate
from kr_fast.runtime.storage.image_rows import Images, rows_of

LABEL_ONLY = "lira"  # queries of "label_only" where the audit itself makes one


@dataclasses.dataclass(frozen=True)
class Inputs:
    """Models and the examples under attack, checked against each other.

    Args:
        models: name -> one classifier under attack, the control among them.
        facts: name -> shadows, kind, shared, accuracy, control, title and recipe of :class:`TargetSignals`.
        shadows: name -> shadows, whose keep is of the pool.
        images, labels: the pool; members: bool ``[N]``, None without models; index: its numbers in all examples;
            groups: what they belong to, or None.
        population: None, (images, labels), or indices of the pool that are split off and not attacked.
    """

    models: dict[str, ModelArray]
    facts: dict[str, dict[str, Any]]
    shadows: dict[str, Shadows]
    images: Images
    labels: Tensor
    members: Tensor | None
    index: Tensor
    population: tuple[Images, Tensor] | Tensor | None
    synthetic: dict[str, Tensor]
    reference: Images | None
    groups: np.ndarray | None


def query(inputs: Inputs, choices: Choices, path: Path | None = None) -> AuditData:
    """Ask all models; a call that was interrupted continues in ``path``."""
    z, reference = inputs.population, inputs.reference
    split = isinstance(z, Tensor)
    pool = torch.arange(len(inputs.labels))
    pool = pool[~torch.isin(pool, z)] if split else pool
    images = rows_of(inputs.images, pool) if split else inputs.images
    if reference is None and z is not None:
        reference = rows_of(inputs.images, z) if split else z[0]
    answers_of = _ModelQueries(inputs, pool, choices, path)
    shadows = {}
    for name, each in inputs.shadows.items():
        signals, population, answers = answers_of(each.array, name if name == UNNAMED else f"shadows-{name}")
        z_keep = each.keep[:, z] if split else None
        shadows[name] = ShadowSignals(each.keep[:, pool], signals, population, z_keep, answers)
    targets = {}
    for name, model in inputs.models.items():
        signals, population, answers = answers_of(model, f"target-{name}")
        signals = {signal: value[:, :, 0] for signal, value in signals.items()}
        population = None if population is None else population[:, :, 0]
        answers = None if answers is None else answers[:, 0]
        targets[name] = TargetSignals(signals, population, answers, **inputs.facts[name])
    notes = []
    # Data sets repeat images, so some overlap is noted and not refused.
    if isinstance(z, tuple) and (both := int(shared_images(z[0], inputs.images).sum())):
        notes.append(f"{both} images of the population are among those under attack too: some may be members")
    features, made = None, {}
    # Of a shadow: the features of a target tell its own members from others, whatever was released.
    if inputs.synthetic and inputs.models:
        array = next(iter(inputs.shadows.values())).array
        features = penultimate(array, images)
        if features is not None:
            made = {name: penultimate(array, each) for name, each in inputs.synthetic.items()}
    return AuditData(
        shadows,
        targets,
        None if inputs.members is None else inputs.members[pool],
        inputs.labels[pool],
        images,
        inputs.synthetic,
        reference,
        choices.augment if isinstance(choices.augment, str) else f"{len(choices.augment)} given",
        tuple(notes),
        inputs.index[pool],
        None if inputs.groups is None else inputs.groups[pool.numpy()],
        features,
        made,
    )


class _ModelQueries:
    """``(array, name) -> (signals [A, N, M], phi of the population [A, Z, M] or None, answers [N, M, T] or None)``."""

    def __init__(self, inputs: Inputs, pool: Tensor, choices: Choices, path: Path | None):
        self.inputs, self.pool, self.augment, self.path = inputs, pool, choices.augment, path
        names = DEFAULT if choices.attacks is None else choices.attacks
        needs = {need for name in names for need in CATALOG[name].needs}
        self.network, self.population = "shadow_network" in names, "population" in needs
        self.want = tuple(name for name in SIGNALS if name == "phi" or name in needs or self.network)
        queries = len(as_queries(self.augment, *inputs.images.shape[1:3]))
        self.more_queries = "label_only" in names and queries == 1

    def __call__(self, array: ModelArray, name: str) -> tuple[dict[str, Tensor], Tensor | None, Tensor | None]:
        z, pool = self.inputs.population, (self.inputs.images, self.inputs.labels)
        signals = self.signals(array, name, f"signals of {name}", pool, self.augment, self.want)
        if self.more_queries:
            words = f"label-only queries of {name}"
            signals |= self.signals(array, f"{name}-label-only", words, pool, LABEL_ONLY, ("correct",))
        answers = self.answers(array) if self.network else None
        population = None
        if isinstance(z, Tensor):
            population = signals["phi"][:, z]
            signals = {signal: value[:, self.pool] for signal, value in signals.items()}
            answers = None if answers is None else answers[self.pool]
        elif z is not None and self.population:
            folder, words = f"{name}-population", f"population of {name}"
            population = self.signals(array, folder, words, z, self.augment, ("phi",))["phi"]
        return signals, population, answers

    def signals(
        self,
        array: ModelArray,
        folder: str,
        words: str,
        examples: tuple[Tensor, Tensor],
        augment: str | list[Query],
        want: tuple[str, ...],
    ) -> dict[str, Tensor]:
        """name -> ``[A, N, M]``, kept in ``folder``."""
        path = None if self.path is None else self.path / folder
        with as_user_error(words):
            return dict(array.signals(*examples, augment=augment, want=want, path=path, description=words))

    def answers(self, array: ModelArray) -> Tensor:
        """Largest log-probabilities, model by model: logits of all at once could fill the memory."""
        rows = []
        for model in array.models:
            logits = ModelArray([model], normalize=array.normalize)(self.inputs.images)[0].float().cpu()
            rows.append(logits.log_softmax(1).topk(min(ANSWERS, logits.shape[1]), 1).values)
        return torch.stack(rows, 1)
