"""Every choice of a run, in one dataclass: shown as flags, read from YAML, written next to the results."""

import dataclasses
from typing import Any, ClassVar

from kr_fast.data import TEST_FRACTION, VAL_FRACTION
from kr_fast.models import CLASSIFIERS
from kr_fast.runtime.errors import fail
from kr_fast.runtime.options import check, option


@dataclasses.dataclass(frozen=True)
class RecycleConfig:
    """Configuration of :func:`kr_fast.recycle`. The defaults are those of the preset ``digits``."""

    GROUPS: ClassVar[dict[str, str]] = {
        "out": "folder and data",
        "teacher": "Teacher and its shadow models",
        "generator_objective": "generator",
        "num_inference_steps": "sampling",
        "tune_noise_scale": "checkpoint choice and tuning",
        "student_arch": "Student",
        "num_shadows": "audit",
    }

    out: str = option("runs/digits", "folder of the run; the same command continues a run that was stopped")
    data: str = option("digits", "digits, a MedMNIST-layout .npz file, or a folder class/image.png")
    seed: int = option(0, "decides everything that is random", least=0)
    val_fraction: float = option(
        VAL_FRACTION, "share of training images for validation, where the data has no such split", above=0, below=1
    )
    test_fraction: float = option(
        TEST_FRACTION, "share of all images for the test, where the data has no such split", above=0, below=1
    )

    teacher: str = option("", "pkg.mod:factory or a .safetensors/.pt state dict, in place of training a Teacher")
    teacher_arch: str = option("resnet14", "Teacher's architecture", choices=tuple(CLASSIFIERS))
    teacher_width: int = option(16, "channels of the Teacher's first stage", above=0)
    teacher_epochs: int = option(40, "epochs on real images; the epoch is chosen on validation", above=0)
    teacher_batch_size: int = option(64, "batch size of Teacher and shadows", above=0)
    teacher_learning_rate: float = option(0.1, "peak of the one-cycle schedule of Teacher and shadows", above=0)
    teacher_weight_decay: float = option(5e-4, "of Teacher and shadows", least=0)
    teacher_shift: int = option(0, "augmentation on real images: largest shift in pixels", least=0, most=224)
    teacher_flip: bool = option(False, "augmentation on real images: mirror half of them")
    teacher_rotate: float = option(5.0, "augmentation on real images: largest angle in degrees", least=0, most=180)
    teacher_scale: float = option(
        0.05, "augmentation on real images: largest relative change of size", least=0, below=1
    )

    generator_objective: str = option(
        "flow", "flow (rectified flow), epsilon or v_prediction (DDIM)", choices=("flow", "epsilon", "v_prediction")
    )
    generator_widths: tuple[int, ...] = option((32, 64), "channels at each resolution of the UNet", above=0)
    generator_layers: int = option(1, "residual blocks at each resolution", above=0)
    generator_steps: int = option(500, "optimizer steps", above=0)
    generator_batch_size: int = option(128, "images a step, over all processes", above=0)
    generator_learning_rate: float = option(2e-3, "peak of the cosine schedule", above=0)
    generator_ema: float = option(0.995, "decay of the weights' moving average", least=0, below=1)
    generator_flip: bool = option(False, "mirror half of the generator's training images")
    label_dropout: float = option(
        0.1, "share of training labels replaced by the null class (for guidance)", least=0, below=1
    )
    checkpoints: int = option(3, "EMA checkpoints saved, evenly over the second half of the training", above=0)

    num_inference_steps: int = option(5, "solver steps before tuning", above=0)
    guidance_scale: float = option(1.0, "classifier-free guidance before tuning; 1 is none", least=0)
    noise_scale: float = option(1.0, "initial-noise scale sigma before tuning; above 1 is the Expansion Trick", above=0)
    confidence: float = option(
        0.0, "before tuning: least Teacher probability of the label; images below count nothing", least=0, below=1
    )
    micro_batch: int = option(256, "images in one network call of the sampler", above=0)
    label_plan: str = option(
        "train", "classes of synthetic images: train (as the training split) or balanced", choices=("train", "balanced")
    )

    tune_noise_scale: tuple[float, ...] = option((1.1,), "values tried besides the default", above=0)
    tune_guidance_scale: tuple[float, ...] = option((1.5,), "values tried besides the default", least=0)
    tune_num_inference_steps: tuple[int, ...] = option((8,), "values tried besides the default", above=0)
    tune_confidence: tuple[float, ...] = option((0.5,), "values tried besides the default", least=0, below=1)
    trial_images: int = option(
        1024, "synthetic images a period of a short Student (checkpoint choice, tuning)", above=0
    )
    trial_periods: int = option(2, "periods of a short Student", above=0)
    trial_epochs: int = option(3, "passes over a period's images of a short Student", above=0)

    student_arch: str = option("resnet14", "Student's architecture", choices=tuple(CLASSIFIERS))
    student_width: int = option(16, "channels of the Student's first stage", above=0)
    periods: int = option(10, "times the synthetic set is regenerated, with fresh image ids", above=0)
    images: int = option(1024, "synthetic images a period", above=0)
    student_epochs: int = option(3, "passes over a period's images", above=0)
    student_batch_size: int = option(64, "batch size of the Student", above=0)
    student_learning_rate: float = option(0.1, "peak of the one-cycle schedule", above=0)
    student_weight_decay: float = option(5e-4, "weight decay of the Student", least=0)
    temperature: float = option(4.0, "of the soft labels", above=0)
    soft_weight: float = option(1.0, "weight of T^2 KL(teacher || student)", least=0)
    hard_weight: float = option(0.0, "weight of the cross-entropy with the generator's class label", least=0)
    student_shift: int = option(1, "augmentation on synthetic images: largest shift in pixels", least=0, most=224)
    student_flip: bool = option(False, "augmentation on synthetic images: mirror half of them")
    student_rotate: float = option(
        15.0, "augmentation on synthetic images: largest angle in degrees", least=0, most=180
    )
    student_scale: float = option(
        0.15, "augmentation on synthetic images: largest relative change of size", least=0, below=1
    )

    num_shadows: int = option(16, "shadow Teachers of the audit, even; 0 skips the audit", least=0)
    student_shadows: int = option(
        -1, "shadow Students of as many first shadow Teachers, even; -1 for all of them, 0 for none", least=-1
    )
    audit_generator: str = option(
        "shared",
        "images of shadow Students: shared (this run's) or retrained on each half",
        choices=("shared", "retrained"),
    )
    audit_control: bool = option(True, "train an overfitted model, which the audit has to find")
    audit_released: bool = option(True, "attack the synthetic images of the last period by themselves")
    audit_page: bool = option(True, "write audit.html: every attack with all of its figures")
    show_real_images: bool = option(False, "show real images in report.html and audit.html, which then say so")
    show_records: bool = option(False, "name the most exposed members by index in audit.html, which then says so")
    audit_augment: str = option(
        "none",
        "queries of the attack: none, flip (2), shift (5) or lira (18)",
        choices=("none", "flip", "shift", "lira"),
    )

    def __post_init__(self):
        check(self, "run")
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
