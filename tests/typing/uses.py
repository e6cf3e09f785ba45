"""Public names as users call them, for ``mypy --strict`` (make lint): nothing here runs.

A result that is not what the docs say, an argument of another type, or an annotation that is missing is an error, and
so is a line below that should be refused and is not.
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from typing_extensions import assert_type

import kr_fast
from kr_fast.data import Augment, Dataset, Split, SplitDuplicates, find_duplicates, load, to_float
from kr_fast.ensemble import History, Shadows, TrainConfig, fit, load_shadows
from kr_fast.membership import AuditReport, Choices, Curve, Target
from kr_fast.metrics import Evaluation, evaluate
from kr_fast.recycling import recycle_seeds
from kr_fast.synthesis import Batch, DeviceShards, StepTable, Synthesized


def losses(student: Tensor, teacher: Tensor, labels: Tensor, indices: Tensor) -> None:
    assert_type(kr_fast.distillation_loss(student, teacher, labels, temperature=4, hard_weight=0.1), Tensor)
    assert_type(kr_fast.distillation_loss_and_grad(student, teacher), tuple[Tensor, Tensor])
    assert_type(kr_fast.distillation_loss_topk(student, teacher, indices, labels, tail="smooth"), Tensor)
    assert_type(kr_fast.soft_cross_entropy(student, teacher, reduction="none"), Tensor)
    assert_type(kr_fast.dkd_loss(student, teacher, labels, alpha=1.0, beta=8.0), Tensor)
    assert_type(kr_fast.distillation_metrics(student, teacher, labels).kl, Tensor)
    kr_fast.no_such_loss(student, teacher)  # type: ignore[attr-defined]
    kr_fast.dkd_loss(student, teacher)  # type: ignore[call-arg]
    criterion: nn.Module = kr_fast.DistillationLoss(temperature=4.0, reduction="sum")
    criterion(student, teacher, labels)  # of any type, as every module of torch


def ops(x: Tensor, weight: Tensor, row: kr_fast.ResidualLayer) -> None:
    assert_type(kr_fast.group_norm_silu(x, 8, weight, None, shift=None), Tensor)
    assert_type(kr_fast.batch_norm_act(x, weight, weight, residual=x, activation=None), Tensor)
    assert_type(kr_fast.qkv_attention(x, 4), Tensor)
    assert_type(kr_fast.residual_block(x, row, row, stride=2), Tensor)
    assert_type(kr_fast.direct_conv2d(x, weight, stride=(1, 1), padding=1), Tensor)
    assert_type(kr_fast.preactivation_block(x, [(8, weight, weight, 1e-5)], [(weight, None)]), Tensor)
    assert_type(kr_fast.winograd_conv2d(x, kr_fast.winograd_pack(weight), 16, pool=True), Tensor)
    assert_type(kr_fast.philox_normal(torch.arange(4), (3, 8, 8), seed=1, dtype=torch.float16), Tensor)
    assert_type(kr_fast.encode_png(kr_fast.pack_uint8(x)), Tensor)
    assert_type(kr_fast.membership_signals(x, x, ("phi", "loss")), dict[str, Tensor])
    assert_type(kr_fast.conv2d_grad_norms(x, x, (3, 3), padding="same", bias=True), Tensor)
    assert_type(kr_fast.conv2d_grad_samples(x, x, 3, stride=2, multiplicity=4), tuple[Tensor, Tensor | None])
    assert_type(kr_fast.linear_grad_norms(x, x), Tensor)


def synthesis(unet: nn.Module, scheduler: Any, out: Path) -> None:
    plan = kr_fast.LabelPlan.balanced(num_classes=10, count=1_000)
    sampler = kr_fast.Sampler(unet, scheduler, 10, seed=7, guidance_scale=1.5)
    assert_type(plan.labels(torch.arange(4)), Tensor)
    assert_type(sampler(torch.arange(4), plan.labels(torch.arange(4))), Tensor)
    for batch in sampler.stream(plan, ids=range(1_000)):
        assert_type(batch, Batch)
        assert_type(batch.images, Tensor)
    assert_type(kr_fast.synthesize(sampler, plan, out, format="webdataset"), Synthesized)
    assert_type(kr_fast.synthesize(sampler, plan, "out").seconds, float)
    assert_type(kr_fast.synthesize(sampler, plan, None, format="device"), DeviceShards)
    assert_type(StepTable.compile(scheduler, 10), StepTable)
    with kr_fast.optimize(unet, training=True) as optimized:
        optimized.restore()


def models(networks: list[nn.Module], images: Tensor, pixels: np.ndarray, labels: Tensor) -> None:
    array = kr_fast.ModelArray(networks)
    assert_type(array(images), Tensor)
    assert_type(array.signals(images, labels, want=("phi",)), dict[str, Tensor])
    student = kr_fast.load_student("release/student", device=torch.device("cpu"))
    assert_type(student.predict(images), Tensor)
    assert_type(student.predict(pixels), np.ndarray)


def training(make: type[nn.Linear], split: Split, images: Tensor, labels: Tensor) -> Shadows:
    def network() -> nn.Module:
        return make(8, 2)

    recipe = TrainConfig(epochs=2, augment=Augment(shift=1, flip=True))
    assert_type(fit(network(), split, recipe, seed=0, val=split), History)
    assert_type(load_shadows(network, "shadows"), Shadows)
    return kr_fast.train_shadows(network, images, labels, num_models=4, config=recipe, seed=0, batched=True)


def audits(model: nn.Module, shadows: Shadows, images: Tensor, labels: Tensor, members: Tensor) -> None:
    report = kr_fast.audit(model, shadows, images, labels, members, choices=Choices(attacks=("lira", "rmia")))
    assert_type(report, AuditReport)
    kr_fast.audit({"a": model, "b": Target(model, kind="full")}, shadows, images, labels, members)
    scores = kr_fast.membership.lira(images, shadows.keep, variant="offline")
    assert_type(kr_fast.membership.rmia(images, images), tuple[Tensor, Tensor])
    curve = kr_fast.membership.roc(scores[0], members)
    assert_type(curve, Curve)
    assert_type(curve.auc, float)
    assert_type(curve.auc_interval(0.9), tuple[float, float])
    assert_type(curve.tpr_at(0.01), dict[str, Any])
    assert_type(kr_fast.membership.epsilon_one_run(scores[0], members), float)


def pipeline(images: Tensor, labels: Tensor) -> None:
    config = kr_fast.RecycleConfig(data="digits", periods=3, tune_solver=("heun",))
    result = kr_fast.recycle(config, data=(images, labels))
    assert_type(result.report, Path)
    assert_type(result.metrics, dict[str, Any])
    recycle_seeds(config, 3)
    data = load("digits", seed=1)
    assert_type(data, Dataset)
    assert_type(to_float(data.train.images), Tensor)
    assert_type(find_duplicates({"train": images, "test": images}), SplitDuplicates)
    assert_type(evaluate(images, labels, seed=0), Evaluation)
    assert_type(kr_fast.data.load("digits").train, Split)
