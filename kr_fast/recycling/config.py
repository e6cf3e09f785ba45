"""Every choice of a run, in one dataclass: shown as flags, read from YAML, written next to the results."""

import dataclasses
from typing import Any

from kr_fast.data import TEST_FRACTION, VAL_FRACTION
from kr_fast.runtime.errors import fail
from kr_fast.runtime.options import option


@dataclasses.dataclass(frozen=True)
class RecycleConfig:
    """Configuration of :func:`kr_fast.recycle`. The defaults are those of the preset ``digits``."""

    out: str = option("runs/digits", "folder of the run; the same command continues a run that was stopped")
    data: str = option("digits", "digits, a MedMNIST-layout .npz file, or a folder class/image.png")
    seed: int = option(0, "decides everything that is random")
    val_fraction: float = option(
        VAL_FRACTION, "share of training images for validation, where the data has no such split"
    )
    test_fraction: float = option(TEST_FRACTION, "share of all images for the test, where the data has no such split")

    teacher: str = option("", "pkg.mod:factory or a .safetensors/.pt state dict, in place of training a Teacher")
    teacher_arch: str = option("resnet14", "Teacher's architecture")
    teacher_width: int = option(16, "channels of the Teacher's first stage")
    teacher_epochs: int = option(40, "epochs on real images; the epoch is chosen on validation")
    teacher_batch_size: int = option(64, "batch size of Teacher and shadows")
    teacher_learning_rate: float = option(0.1, "peak of the one-cycle schedule of Teacher and shadows")
    teacher_weight_decay: float = option(5e-4, "of Teacher and shadows")
    teacher_shift: int = option(0, "augmentation on real images: largest shift in pixels")
    teacher_flip: bool = option(False, "augmentation on real images: mirror half of them")
    teacher_rotate: float = option(5.0, "augmentation on real images: largest angle in degrees")
    teacher_scale: float = option(0.05, "augmentation on real images: largest relative change of size")

    generator_objective: str = option("flow", "flow (rectified flow), epsilon or v_prediction (DDIM)")
    generator_widths: tuple[int, ...] = option((32, 64), "channels at each resolution of the UNet")
    generator_layers: int = option(1, "residual blocks at each resolution")
    generator_steps: int = option(500, "optimizer steps")
    generator_batch_size: int = option(128, "images a step, over all processes")
    generator_learning_rate: float = option(2e-3, "peak of the cosine schedule")
    generator_ema: float = option(0.995, "decay of the weights' moving average")
    generator_flip: bool = option(False, "mirror half of the generator's training images")
    label_dropout: float = option(0.1, "share of training labels replaced by the null class (for guidance)")
    checkpoints: int = option(3, "EMA checkpoints saved, evenly over the second half of the training")

    num_inference_steps: int = option(5, "solver steps before tuning")
    guidance_scale: float = option(1.0, "classifier-free guidance before tuning; 1 is none")
    noise_scale: float = option(1.0, "initial-noise scale sigma before tuning; above 1 is the Expansion Trick")
    confidence: float = option(0.0, "before tuning: least Teacher probability of the label; images below count nothing")
    micro_batch: int = option(256, "images in one network call of the sampler")
    label_plan: str = option("train", "classes of synthetic images: train (as the training split) or balanced")

    tune_noise_scale: tuple[float, ...] = option((1.1,), "values tried besides the default")
    tune_guidance_scale: tuple[float, ...] = option((1.5,), "values tried besides the default")
    tune_num_inference_steps: tuple[int, ...] = option((8,), "values tried besides the default")
    tune_confidence: tuple[float, ...] = option((0.5,), "values tried besides the default")
    trial_images: int = option(1024, "synthetic images a period of a short Student (checkpoint choice, tuning)")
    trial_periods: int = option(2, "periods of a short Student")
    trial_epochs: int = option(3, "passes over a period's images of a short Student")

    student_arch: str = option("resnet14", "Student's architecture")
    student_width: int = option(16, "channels of the Student's first stage")
    periods: int = option(10, "times the synthetic set is regenerated, with fresh image ids")
    images: int = option(1024, "synthetic images a period")
    student_epochs: int = option(3, "passes over a period's images")
    student_batch_size: int = option(64, "batch size of the Student")
    student_learning_rate: float = option(0.1, "peak of the one-cycle schedule")
    student_weight_decay: float = option(5e-4, "weight decay of the Student")
    temperature: float = option(4.0, "of the soft labels")
    soft_weight: float = option(1.0, "weight of T^2 KL(teacher || student)")
    hard_weight: float = option(0.0, "weight of the cross-entropy with the generator's class label")
    student_shift: int = option(1, "augmentation on synthetic images: largest shift in pixels")
    student_flip: bool = option(False, "augmentation on synthetic images: mirror half of them")
    student_rotate: float = option(15.0, "augmentation on synthetic images: largest angle in degrees")
    student_scale: float = option(0.15, "augmentation on synthetic images: largest relative change of size")

    num_shadows: int = option(16, "shadow Teachers of the audit, even; 0 skips the audit")
    student_shadows: int = option(
        -1, "shadow Students of as many first shadow Teachers, even; -1 for all of them, 0 for none"
    )
    audit_generator: str = option("shared", "images of shadow Students: shared (this run's) or retrained on each half")
    audit_control: bool = option(True, "train an overfitted model, which the audit has to find")
    audit_released: bool = option(True, "attack the synthetic images of the last period by themselves")
    audit_page: bool = option(True, "write audit.html: every attack with all of its figures")
    audit_augment: str = option("none", "queries of the attack: none, flip (2), shift (5) or lira (18)")

    def __post_init__(self):
        positive = (
            "teacher_width", "teacher_epochs", "teacher_batch_size", "teacher_learning_rate", "generator_layers",
            "generator_steps", "generator_batch_size", "generator_learning_rate", "checkpoints",
            "num_inference_steps", "noise_scale", "micro_batch", "trial_images", "trial_periods", "trial_epochs",
            "student_width", "periods", "images", "student_epochs", "student_batch_size", "student_learning_rate",
            "temperature",
        )  # fmt: skip
        for name in positive:
            if not getattr(self, name) > 0:
                fail("run", name, "be above 0", getattr(self, name))
        for name, choices in (
            ("generator_objective", ("flow", "epsilon", "v_prediction")),
            ("label_plan", ("train", "balanced")),
            ("audit_augment", ("none", "flip", "shift", "lira")),
            ("audit_generator", ("shared", "retrained")),
        ):
            if getattr(self, name) not in choices:
                fail("run", name, f"be one of {', '.join(choices)}", getattr(self, name))
        for name in ("confidence", "label_dropout", "generator_ema"):
            if not 0 <= getattr(self, name) < 1:
                fail("run", name, "be in [0, 1)", getattr(self, name))
        for name in ("soft_weight", "hard_weight", "teacher_shift", "student_shift", "seed"):
            if not getattr(self, name) >= 0:
                fail("run", name, "be at least 0", getattr(self, name))
        if self.num_shadows < 0 or self.num_shadows % 2 or self.num_shadows == 2:
            fail("run", "num_shadows", "be 0, or even and at least 4", self.num_shadows)
        if self.student_shadows > 0 and not self.num_shadows:
            fail("run", "student_shadows", "be 0 or -1 without an audit (num_shadows 0)", self.student_shadows)
        if self.student_shadows not in (-1, 0, *range(4, self.num_shadows + 1, 2)):
            rule = f"be 0, -1, or even and from 4 to num_shadows, {self.num_shadows}"
            fail("run", "student_shadows", rule, self.student_shadows)
        if not self.generator_widths or min(self.generator_widths) < 1:
            fail("run", "generator_widths", "hold channel counts above 0", list(self.generator_widths))
        if self.checkpoints > self.generator_steps:
            fail("run", "checkpoints", f"be at most generator_steps, {self.generator_steps}", self.checkpoints)

    @property
    def num_students(self) -> int:
        """Shadow Students to train."""
        return self.num_shadows if self.student_shadows == -1 else self.student_shadows

    def record(self) -> dict[str, Any]:
        """The configuration as plain values, without ``out``: what makes two runs the same run."""
        values = {key: list(v) if isinstance(v, tuple) else v for key, v in dataclasses.asdict(self).items()}
        del values["out"]
        return values
