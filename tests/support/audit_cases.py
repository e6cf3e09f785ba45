"""Simulated signals and logits for tests of the audit: each example of a difficulty of its own, members higher."""

import dataclasses

import torch

import kr_fast
from kr_fast.membership import AuditData, Auxiliary, Choices, ShadowSignals, TargetSignals, partners
from kr_fast.runtime import seeds

COUNT, MODELS, CLASSES = 600, 12, 5


def simulated(seed=0, effect=1.5):
    """phi ``[1, N, M]`` of shadows and ``[1, N]`` of a target; members lie ``effect`` higher, each example its own."""
    generator = torch.Generator().manual_seed(seed)
    keep = torch.rand(MODELS, COUNT, generator=generator).argsort(0) < MODELS // 2
    difficulty = 2 * torch.randn(COUNT, generator=generator)
    members = torch.rand(COUNT, generator=generator) < 0.5
    noise = torch.randn(COUNT, MODELS + 1, generator=generator)
    held = torch.cat([keep, members[None]]).T
    phi = (difficulty[:, None] + effect * held + noise)[None]
    return phi[:, :, :MODELS], phi[:, :, MODELS], keep, members


def data(seed=0, effect=1.5, **changes):
    phi, target, keep, members = simulated(seed, effect)
    whole = AuditData(
        {"shadows": ShadowSignals(keep, {"phi": phi})}, {"target": TargetSignals({"phi": target})}, members
    )
    return dataclasses.replace(whole, **changes)


def with_population(count=200):
    """The simulated audit with a population of further non-members."""
    whole = data()
    z = torch.randn(1, count, MODELS + 1, generator=torch.Generator().manual_seed(5))
    shadows = dataclasses.replace(whole.shadows["shadows"], population=z[:, :, :MODELS])
    target = dataclasses.replace(whole.targets["target"], population=z[:, :, MODELS])
    return dataclasses.replace(whole, shadows={"shadows": shadows}, targets={"target": target})


def audit(*given, **options):
    """:func:`kr_fast.audit`, with the fields of its choices and of its auxiliary data by their names."""
    for name, kind in (("choices", Choices), ("auxiliary", Auxiliary)):
        fields = {field.name for field in dataclasses.fields(kind)} & set(options)
        options[name] = kind(**{field: options.pop(field) for field in fields})
    return kr_fast.audit(*given, **options)


def logits_of(seed=0, queries=None):
    generator = torch.Generator().manual_seed(seed)
    shape = (MODELS + 1, 80, CLASSES) if queries is None else (MODELS + 1, 80, queries, CLASSES)
    logits = 3 * torch.randn(shape, generator=generator)
    keep = torch.rand(MODELS, 80, generator=generator).argsort(0) < MODELS // 2
    return logits, keep, torch.randint(0, CLASSES, (80,), generator=generator), torch.arange(80) % 2 == 0


def left_out(shadows, seed=0):
    """The shadow that an audit with this seed leaves out beside each one that it attacks from the others."""
    return partners(shadows.keep, seeds.derive(seed, "leave one out"), shadows.signals["phi"])


def averages(row):
    """What :func:`kr_fast.membership.across_targets` gives, of what an audit says of a recipe."""
    auc = {key: value for key, value in row["auc"].items() if key != "interval_corrected"}
    return {key: value for key, value in row.items() if key not in ("role", "difference")} | {"auc": auc}
