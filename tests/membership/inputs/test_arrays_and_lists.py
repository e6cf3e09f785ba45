"""Wherever a function of ``kr_fast.membership`` takes a tensor it takes the same numbers as a numpy array or a list."""

import dataclasses
import inspect

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import kr_fast
from kr_fast import membership
from kr_fast.data import Augment
from kr_fast.ensemble import ModelArray, Shadows, TrainConfig
from kr_fast.membership import Auxiliary, Choices

A, N, M, K, Z = 2, 24, 6, 2, 9
G = torch.Generator().manual_seed(0)


def draw(*shape):
    return torch.randn(*shape, generator=G)


PHI, TARGET, KEEP = draw(A, N, M), draw(A, N, K), (torch.arange(M)[:, None] + torch.arange(N)) % 2 == 0
Z_PHI, Z_TARGET = draw(A, Z, M), draw(A, Z, K)
SCORES, OTHER, MEMBERS = draw(N), draw(N), torch.arange(N) % 2 == 0
LABELS, FEATURES = torch.arange(N) % 3, draw(N, M, 4)
LOGITS, ANSWERS = draw(M, N, 3), draw(N, 3)
IMAGES, MADE, REAL = (torch.randint(0, 256, (n, 4, 4, 1), generator=G, dtype=torch.uint8) for n in (N, 12, 15))
RATIOS, Z_RATIOS = SCORES.exp(), OTHER.exp()
RECIPE = TrainConfig(epochs=1, batch_size=24, augment=Augment())


def make():
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(16, 3))


def denoised(z, time, class_labels):
    """Knows the class, and no more."""
    return z * class_labels.view(-1, 1, 1, 1)


def networks():
    torch.manual_seed(1)
    return [nn.Sequential(nn.Flatten(), nn.Linear(16, 3)) for _ in range(M + 1)]


MODELS = networks()


def audited(images, labels, members, synthetic, reference, z, z_labels, keep):
    report = kr_fast.audit(
        MODELS[M],
        Shadows(ModelArray(MODELS[:M]), keep),
        images,
        labels,
        members,
        choices=Choices(attacks=("lira", "rmia", "nearest_synthetic")),
        auxiliary=Auxiliary(synthetic={"made": synthetic}, reference=reference, population=(z, z_labels)),
    )
    return report.scores


def of_signals(phi, keep, target, members, labels, z, z_target, images):
    shadows = membership.ShadowSignals(keep, {"phi": phi}, z)
    target = membership.TargetSignals({"phi": target}, z_target)
    data = membership.AuditData({"shadows": shadows}, {"t": target}, members, labels, images)
    return membership.audit_signals(data, membership.Choices(attacks=("lira", "rmia", "confidence"))).scores


def of_logits(logits, keep, labels, target, members, z, z_target, z_labels, images):
    result = membership.from_logits(
        logits, keep, labels, target=target, members=members, population=(z, z_target, z_labels), images=images
    )
    return dict(result.targets["target"].signals), dict(result.shadows["shadows"].signals), result.images, result.labels


def control(images, labels, members):
    model = membership.overfitted(make, images, labels, members, like=RECIPE, seed=0, description=None)
    return dict(model.state_dict())


# Name of a public function -> (call, its tensors).
CALLS = {
    "AuditData": (of_signals, (PHI, KEEP, TARGET[:, :, 0], MEMBERS, LABELS, Z_PHI, Z_TARGET[:, :, 0], IMAGES)),
    "across_targets": (membership.across_targets, (PHI[0].T, KEEP)),
    "attack_canaries": (membership.attack_canaries, (PHI, KEEP)),
    "attack_p": (membership.attack_p, (TARGET, Z_TARGET)),
    "attack_r": (lambda p, k, t: membership.attack_r(p, k, target=t), (PHI, KEEP, TARGET)),
    "audit": (audited, (IMAGES, LABELS, MEMBERS, MADE, REAL, REAL, LABELS[:15], KEEP)),
    "base": (lambda p, k, t: membership.base(p, k, target=t), (PHI, KEEP, TARGET)),
    "blind": (lambda i, m: membership.blind(i, m, folds=2), (IMAGES, MEMBERS)),
    "calibrated_nearest": (
        lambda d, k, t: membership.calibrated_nearest(d, k, target=t),
        (PHI[0].T.exp(), KEEP, TARGET[0].T.exp()),
    ),
    "delong_test": (membership.delong_test, (SCORES, OTHER, MEMBERS)),
    "denoising_attack": (
        lambda errors, shadows, keep: membership.denoising_attack(errors, shadows=shadows, keep=keep),
        (RATIOS[:, None].repeat(1, 2), PHI.permute(2, 1, 0).exp(), KEEP),
    ),
    "denoising_errors": (
        lambda x, y: membership.denoising_errors(denoised, x, y, objective="flow", levels=(0.5,), draws=1),
        (FEATURES[:, :, :, None], LABELS),
    ),
    "draw_canaries": (
        lambda labels: vars(membership.draw_canaries(labels, 10, models=4, classes=3, seed=0)),
        (LABELS.repeat(10),),
    ),
    "duplicates_across": (lambda i, m: vars(membership.duplicates_across(i, m)), (IMAGES, MEMBERS)),
    "epsilon_clopper_pearson": (membership.epsilon_clopper_pearson, (SCORES + 9 * MEMBERS, MEMBERS)),
    "epsilon_one_run": (membership.epsilon_one_run, (SCORES + 9 * MEMBERS, MEMBERS)),
    "from_logits": (
        of_logits,
        (LOGITS, KEEP, LABELS, ANSWERS, MEMBERS, LOGITS[:, :9], ANSWERS[:9], LABELS[:9], IMAGES),
    ),
    "gaussian_mu": (membership.gaussian_mu, (SCORES + 9 * MEMBERS, MEMBERS)),
    "generated_density": (membership.generated_density, (IMAGES, MADE, REAL)),
    "label_only": (lambda p, k, t: membership.label_only(p, k, target=t), ((PHI > 0).float(), KEEP, TARGET)),
    "lira": (lambda p, k, t: membership.lira(p, k, target=t), (PHI, KEEP, TARGET)),
    "lira_carlini2021": (lambda p, k, t: membership.lira_carlini2021(p, k, target=t), (PHI, KEEP, TARGET)),
    "nearest_synthetic": (lambda x, s, r: membership.nearest_synthetic(x, s, reference=r), (IMAGES, MADE, REAL)),
    "overfitted": (control, (IMAGES, LABELS, MEMBERS)),
    "partners": (membership.partners, (KEEP,)),
    "quantile_regression": (
        lambda p, k, f, t: membership.quantile_regression(p, k, f, target=t),
        (PHI, KEEP, FEATURES[:, 0], TARGET),
    ),
    "record_risk": (
        lambda s, k: {name: value.tolist() for name, value in vars(membership.record_risk(s, k)).items()},
        (PHI[0].T, KEEP),
    ),
    "released_tests": (lambda i, m, s: vars(membership.released_tests(i, m, s)), (IMAGES, MEMBERS, MADE)),
    "rmia": (membership.rmia, (RATIOS, Z_RATIOS)),
    "rmia_attack": (
        lambda p, k, z, t, tz: membership.rmia_attack(p, k, z, target=t, target_population=tz),
        (PHI, KEEP, Z_PHI, TARGET, Z_TARGET),
    ),
    "roc": (lambda s, m: [value.tolist() for value in dataclasses.astuple(membership.roc(s, m))], (SCORES, MEMBERS)),
    "shadow_network": (
        lambda f, k, t: membership.shadow_network(f, k, target=t),
        (FEATURES, KEEP, FEATURES[:, :2].contiguous()),
    ),
    "shadow_threshold": (lambda s, k: membership.shadow_threshold(s, k, 0.1), (PHI[0].T, KEEP)),
    "threshold_per_class": (
        lambda p, k, y, t: membership.threshold_per_class(p, k, y, target=t),
        (PHI, KEEP, LABELS, TARGET),
    ),
}
WITHOUT_TENSORS = {
    "aop",
    "audit_signals",
    "bootstrap",
    "epsilon_of_mu",
    "load_lira_tree",
    "load_npz",
    "load_privacy_meter",
    "negative_controls",
    "operating_point",
    "overfitted_recipe",
    "save_npz",
}


def test_every_public_function_is_tried():
    public = {name for name in membership.__all__ if inspect.isfunction(getattr(membership, name))}
    assert public == set(CALLS) - {"AuditData"} | WITHOUT_TENSORS


def same(a, b):
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, Tensor):
        return a.dtype == b.dtype and torch.allclose(a.double(), b.double(), rtol=1e-6, atol=1e-6)
    return a == b or a == pytest.approx(b, rel=1e-6, nan_ok=True)


def as_list(value):
    """Nested lists; numbers that are images and labels stay arrays of their dtype where a list has none."""
    return value.numpy() if value.dtype == torch.uint8 else value.tolist()


FORMS = {
    "array": lambda value: value.numpy(),
    "read-only array of another order": lambda value: np.frombuffer(
        value.numpy().astype(value.numpy().dtype.newbyteorder(">")).tobytes(), value.numpy().dtype.newbyteorder(">")
    ).reshape(value.shape),
    "strided array": lambda value: np.repeat(value.numpy(), 2, axis=0)[::2],
    "list": as_list,
    "0 and 1": lambda value: value.long() if value.dtype == torch.bool else value,
    "labels in a column": lambda value: value.int()[:, None] if value is LABELS else value,
}


SLOW = ("overfitted", "quantile_regression", "audit")


@pytest.mark.parametrize("name", CALLS)
def test_arrays_and_lists_give_what_tensors_give(name):
    call, tensors = CALLS[name]
    expected = call(*tensors) if name not in SLOW else None
    # Lists of numbers are float64; so are the tensors that they are compared with.
    exact = call(*(value.double() if value.dtype == torch.float32 else value for value in tensors))
    for form, convert in FORMS.items():
        if name not in SLOW or form == "list":
            assert same(call(*map(convert, tensors)), exact if form == "list" else expected), form


@pytest.mark.parametrize("name", CALLS)
def test_what_is_no_array_is_named(name):
    """Each argument in turn: text, a ragged list, objects, complex numbers: one error in the package's form."""
    call, tensors = CALLS[name]
    for at, value in enumerate(tensors):
        for bad in ("text", [[1.0], [2.0, 3.0]], np.array([object()]), value.double() * 1j, {0: 1}):
            with pytest.raises((ValueError, TypeError), match=r"^[a-z_A-Z0-9]+: .* must .*, got "):
                call(*tensors[:at], bad, *tensors[at + 1 :])
