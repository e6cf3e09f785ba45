"""Every option of a run in one dataclass: flags of the command, read from YAML, written next to the results."""

import dataclasses
from typing import Any, ClassVar

from kr_fast.data import TEST_FRACTION, VAL_FRACTION, Augment, ReadOptions
from kr_fast.ensemble import TrainConfig
from kr_fast.ensemble.inference.queries import AUGMENTS
from kr_fast.ensemble.training.evaluation import SCORES
from kr_fast.ensemble.training.recipe import LEAST_MIXUP
from kr_fast.membership.attacks.canaries import LEAST as LEAST_CANARIES
from kr_fast.membership.attacks.catalog import DEFAULT
from kr_fast.membership.audit.choices import Choices
from kr_fast.membership.verdict.limits import Limits
from kr_fast.membership.verdict.paths import Names, check_paths
from kr_fast.models import CLASSIFIERS
from kr_fast.recycling.commands import COMMANDS
from kr_fast.recycling.dp.options import PrivacyOptions, check_privacy
from kr_fast.recycling.generator_options import check_generator
from kr_fast.recycling.search_options import Searched, check_search
from kr_fast.report.run_audit import CONTROL, FULL, RELEASED, TEACHER, TRANSFER
from kr_fast.runtime.errors import fail
from kr_fast.runtime.options import check, option, option_like, option_of, record
from kr_fast.runtime.text import seconds

MOST, IMAGES, WIDEST = 1_000_000, 1_000_000_000, 4096  # of counts, of images per period, of channels
RATES = {"above": None, "least": 1e-6, "most": 10}  # of learning rates
LABELS = ("soft", "top1", "class")
OF_SOFT_LABELS = ("temperature", "soft_weight", "hard_weight", "loss", "dkd_alpha", "dkd_beta", "standardize_logits")
LEAST_WEIGHT = 1e-3  # of the terms of the loss together; a much smaller one vanishes in float32
# What the figures of a run can be of.
TIMED = ("data", "privacy", "teacher", "generator", "checkpoints", "tuning", "few_step", "gkd", "student", "ablation")
TIMED += ("shadows", "canaries", "canary_students", "shadow_students", "audit")
NAMES = Names((TEACHER, TRANSFER, FULL, CONTROL, RELEASED), (TEACHER, FULL), DEFAULT, Choices.priors, TIMED)


@dataclasses.dataclass(frozen=True)
class RecycleConfig(ReadOptions, PrivacyOptions):
    """Configuration of :func:`kr_fast.recycle`. The defaults are those of the preset ``digits``."""

    FIRST: ClassVar[tuple[str, ...]] = ("data", "out", "image_size", "seed", "budget", "teacher_epochs")
    FIRST += ("generator_steps", "periods", "images", "num_shadows")
    GROUPS: ClassVar[dict[str, str]] = {
        "out": "data, precision and tracking",
        "teacher": "Teacher and its shadow models",
        "generator": "generator",
        "num_inference_steps": "sampling",
        "tune_noise_scale": "checkpoint choice and tuning",
        "student_arch": "Student",
        "num_shadows": "audit",
        "fail_above": "verdict: a finished run with other limits is not computed again",
        "table": "how the data are read",
        "epsilon": "differential privacy",
    }

    out: str = option("runs/digits", "folder of the run; the same command continues a run that was stopped")
    data: str = option(
        "digits", "digits; .npz, .parquet or .tar file; folder of images or of a data set (docs/reference/data.md)"
    )
    seed: int = option(0, "decides everything that is random", least=0)
    precision: str = option(
        "auto",
        "of training on a CPU: float32, bfloat16 (mixed precision), or auto for the faster on a processor with AMX",
        choices=("auto", "float32", "bfloat16"),
    )
    budget: str = option(
        "",
        "time for the run, such as 90s, 30m or 1h30m, which is divided by what each stage is measured to cost: "
        "the numbers of generator_steps, checkpoints, trial_*, periods and student_epochs then follow from it",
    )
    log_with: tuple[str, ...] = Searched.log_with
    val_fraction: float = option(
        VAL_FRACTION, "share of training images for validation, where the data has no such split", above=0, below=1
    )
    test_fraction: float = option(
        TEST_FRACTION, "share of all images for the test, where the data has no such split", above=0, below=1
    )
    ordinal: bool = option(
        False, "the classes are grades, in their order: adds the quadratic weighted kappa to the test figures"
    )
    duplicates: str = option(
        "auto",
        "images with a near-duplicate in an earlier split (train, val, test): drop or keep them; auto drops them from "
        "splits that are cut and keeps those that the data have",
        choices=("auto", "drop", "keep"),
    )

    teacher: str = option("", "in place of training one: pkg.mod:factory, a .safetensors/.pt state dict, or a run")
    teacher_arch: str = option("resnet14", "Teacher's architecture", choices=tuple(CLASSIFIERS))
    teacher_width: int = option(16, "channels of the Teacher's first stage", least=1, most=WIDEST)
    teacher_epochs: int = option_like(TrainConfig, "epochs", "of the Teacher; the epoch is chosen on validation")
    teacher_batch_size: int = option_like(TrainConfig, "batch_size", "batch size of Teacher and shadows")
    teacher_learning_rate: float = option_like(
        TrainConfig, "learning_rate", "peak of the one-cycle schedule of Teacher and shadows", **RATES
    )
    teacher_weight_decay: float = option_like(TrainConfig, "weight_decay", "of Teacher and shadows", most=1)
    teacher_label_smoothing: float = option_like(
        TrainConfig, "label_smoothing", "share of each label that goes to all classes"
    )
    teacher_mixup: float = option_like(
        TrainConfig, "mixup", "alpha of mixup, which mixes pairs of images and their labels"
    )
    teacher_choose: str = option("accuracy", "what the Teacher's epoch is chosen by on validation", choices=SCORES)
    # As the Student's: a Teacher that augments less is easier to attack and, of the digits, no more accurate.
    teacher_shift: int = option_like(Augment, "shift", "augmentation on real images: largest shift in pixels", 1)
    teacher_flip: bool = option_like(Augment, "flip", "augmentation on real images: mirror half of them")
    teacher_rotate: float = option_like(
        Augment, "rotate", "augmentation on real images: largest angle in degrees", 15.0
    )
    teacher_scale: float = option_like(
        Augment, "scale", "augmentation on real images: largest relative change of size", 0.15
    )

    generator: tuple[str, ...] = option(
        (),
        "in place of training one: the folder of a run or of a class-conditional diffusers model, ready images (a "
        "folder class/image.png, or .npz), or pkg.mod:function of labels that returns images; several share a period",
        repeated=True,
    )
    generator_objective: str = option(
        "flow", "flow (rectified flow), epsilon or v_prediction (DDIM)", choices=("flow", "epsilon", "v_prediction")
    )
    generator_widths: tuple[int, ...] = option(
        (32, 64), "channels at each resolution of the UNet", least=1, most=WIDEST
    )
    generator_layers: int = option(1, "residual blocks at each resolution", least=1, most=64)
    generator_steps: int = option(500, "optimizer steps of the generator", least=1, most=10 * MOST)
    generator_batch_size: int = option(128, "images per step, over all processes", least=1, most=MOST)
    generator_learning_rate: float = option(2e-3, "peak of the cosine schedule", least=1e-7, most=1)
    generator_ema: float = option(0.995, "decay of the weights' moving average", least=0, below=1)
    generator_flip: bool = option(False, "mirror half of the generator's training images")
    generator_dropout: float = option(0.0, "dropout in the UNet's residual blocks, in training", least=0, most=0.9)
    generator_augment: float = option(
        0.0,
        "probability of each of generator_rotate, generator_scale and generator_shift on a training image; the network "
        "is told how much, and sampled without",
        least=0,
        most=1,
    )
    generator_shift: int = option_like(Augment, "shift", "generator_augment: largest shift in pixels", 1)
    generator_rotate: float = option_like(Augment, "rotate", "generator_augment: largest angle in degrees", 15.0)
    generator_scale: float = option_like(Augment, "scale", "generator_augment: largest relative change of size", 0.15)
    generator_classes: str = option(
        "train", "classes in training batches: train (as the training split) or balanced", choices=("train", "balanced")
    )
    label_dropout: float = option(
        0.1, "share of training labels replaced by the null class (for guidance)", least=0, below=1
    )
    checkpoints: int = option(
        3, "EMA checkpoints saved, evenly over the second half of the training", least=1, most=MOST
    )
    few_steps: int = option(
        0,
        "solver steps, 1 to 4, of a generator that is made from the chosen one, with its guidance in it, and that the "
        "Student's images are drawn from; 0 for none",
        least=0,
        most=4,
    )
    few_step_training: int = option(400, "optimizer steps of the few-step generator", least=1, most=10 * MOST)
    ema_lengths: tuple[float, ...] = Searched.ema_lengths
    checkpoint_halving: bool = Searched.checkpoint_halving

    generator_stop_above: float = option(
        1.0,
        "end the training at the first checkpoint of whose images a larger share is nearer to training than to "
        "validation images, and leave it out; 0.5 is chance, 1 never ends it",
        least=0.5,
        most=1,
    )

    num_inference_steps: int = option(5, "solver steps before tuning", least=1, most=1000)
    guidance_scale: float = option(1.0, "classifier-free guidance before tuning; 1 is none", least=0, most=100)
    guidance_interval: tuple[float, ...] = Searched.guidance_interval
    solver: str = Searched.solver
    noise_scale: float = option(
        1.0, "initial-noise scale sigma before tuning; above 1 is the Expansion Trick", least=0.01, most=100
    )
    confidence: float = option(
        0.0, "before tuning: least Teacher probability of the label; images below it have weight 0", least=0, below=1
    )
    micro_batch: int = option(256, "images in one network call of the sampler", least=1, most=MOST)
    label_plan: str = option(
        "train", "classes of synthetic images: train (as the training split) or balanced", choices=("train", "balanced")
    )

    tune_noise_scale: tuple[float, ...] = option((1.1,), "values tried besides the default", least=0.01, most=100)
    tune_guidance_scale: tuple[float, ...] = option((1.5,), "values tried besides the default", least=0, most=100)
    tune_num_inference_steps: tuple[int, ...] = option((8,), "values tried besides the default", least=1, most=1000)
    tune_confidence: tuple[float, ...] = option((0.5,), "values tried besides the default", least=0, below=1)
    tune_guidance_interval: tuple[float, ...] = Searched.tune_guidance_interval
    tune_solver: tuple[str, ...] = Searched.tune_solver
    tune_images: tuple[int, ...] = Searched.tune_images
    tune_student_epochs: tuple[int, ...] = Searched.tune_student_epochs
    tune_trials: int = Searched.tune_trials
    trial_images: int = option(
        1024, "synthetic images per period of a short Student (checkpoint choice, tuning)", least=1, most=IMAGES
    )
    trial_periods: int = option(2, "periods of a short Student", least=1, most=MOST)
    trial_epochs: int = option(3, "passes over a period's images of a short Student", least=1, most=MOST)

    student_arch: str = option("resnet14", "Student's architecture", choices=tuple(CLASSIFIERS))
    student_width: int = option(16, "channels of the Student's first stage", least=1, most=WIDEST)
    periods: int = option(10, "times the synthetic set is regenerated, with fresh image ids", least=1, most=MOST)
    images: int = option(1024, "synthetic images per period", least=1, most=IMAGES)
    student_epochs: int = option_like(TrainConfig, "epochs", "passes over a period's images", 3)
    student_batch_size: int = option_like(TrainConfig, "batch_size", "batch size of the Student")
    student_learning_rate: float = option_like(TrainConfig, "learning_rate", "peak of the one-cycle schedule", **RATES)
    student_weight_decay: float = option_like(TrainConfig, "weight_decay", "weight decay of the Student", most=1)
    labels: str = option(
        "soft",
        "what the Student learns of an image: soft (the Teacher's probabilities), top1 (the class that the Teacher "
        "gives most) or class (the one that it was drawn for, without the Teacher)",
        choices=LABELS,
    )
    temperature: float = option(4.0, "of the soft labels", least=0.01, most=1000)
    soft_weight: float = option(1.0, "weight of T^2 KL(teacher || student)", least=0, most=1000)
    hard_weight: float = option(0.0, "weight of the cross-entropy with the generator's class label", least=0, most=1000)
    student_choose: str = option(
        "accuracy",
        "what the Student's period, the checkpoint and the sampling are chosen by on validation",
        choices=("accuracy", "auc"),
    )
    loss: str = option(
        "kl",
        "of soft labels: kl, the divergence over all classes, or dkd, which weighs that of the image's class against "
        "the others and that among the others apart",
        choices=("kl", "dkd"),
    )
    dkd_alpha: float = option(1.0, "with dkd: weight of the image's class against the others", least=0, most=1000)
    dkd_beta: float = option(8.0, "with dkd: weight of the divergence among the others", least=0, most=1000)
    standardize_logits: bool = option(
        False, "divide the logits of an image, less their mean, by their standard deviation before the temperature"
    )
    student_mixup: float = option_like(
        TrainConfig, "mixup", "alpha of mixup, which mixes pairs of synthetic images; the Teacher is asked on the mixed"
    )
    student_cutmix: float = option(
        0.0,
        "alpha of CutMix, which puts a part of another synthetic image in; with student_mixup, half of the batches",
        least=0,
        most=100,
    )
    fixed_images: bool = option(False, "learn from the first period's synthetic set in all periods")
    ablation: bool = option(
        False,
        "train three further Students, to compare class labels with those of the option labels, and one synthetic set "
        "with a new one each period, in all four pairs",
    )
    student_shift: int = option_like(Augment, "shift", "augmentation on synthetic images: largest shift in pixels", 1)
    student_flip: bool = option_like(Augment, "flip", "augmentation on synthetic images: mirror half of them")
    student_rotate: float = option_like(
        Augment, "rotate", "augmentation on synthetic images: largest angle in degrees", 15.0
    )
    student_scale: float = option_like(
        Augment, "scale", "augmentation on synthetic images: largest relative change of size", 0.15
    )

    num_shadows: int = option(16, "shadow Teachers of the audit, even; 0 skips the audit", least=0, most=MOST)
    student_shadows: int = option(
        -1,
        "shadow Students, of the first shadow Teachers, even; -1 for one of each, 0 for none",
        least=-1,
        most=MOST,
    )
    audit_generator: str = option(
        "shared",
        "images of shadow Students: shared (this run's) or retrained on each half",
        choices=("shared", "retrained"),
    )
    audit_control: bool = option(True, "train an overfitted model, which the attacks have to detect")
    audit_canaries: int = option(
        0,
        "training images that get a wrong label in twins of the Teacher and the Student, one twin for each shadow: how "
        "well the attacks find these canaries proves their power; even, at least 10; 0 for none",
        least=0,
        most=MOST,
    )
    audit_released: bool = option(True, "attack the synthetic images of the last period by themselves")
    audit_generator_weights: bool = option(
        True, "attack the generator's weights by how well they take noise off each image"
    )
    audit_page: bool = option(True, "write audit.html: every attack with all of its figures")
    leave_out_duplicates: bool = option(
        False, "attack no training or test image that has a near-duplicate in the other split"
    )
    show_real_images: bool = option(False, "show real images in report.html and audit.html, which then say so")
    show_records: bool = option(False, "name the most exposed members by index in audit.html, which then says so")
    audit_augment: str = option(
        "none",
        "queries of the attack: none, flip (2), shift (5) or lira (18)",
        choices=tuple(AUGMENTS),
    )

    fail_above: tuple[str, ...] = option_of(Limits, "fail_above")
    verdict_auc: float = option_of(Limits, "auc")
    verdict_records: int = option_of(Limits, "records")
    verdict_controls: bool = option_of(Limits, "controls")
    verdict_gap: float = option(
        5.0, "verdict: largest gap of test accuracy between Teacher and Student, in points", least=0, most=100
    )

    command: str = dataclasses.field(default="run", metadata={"choices": tuple(COMMANDS)})  # no option: which made it

    def __post_init__(self):
        check(self, "run")
        self.check_reading("run")
        check_paths("run", self.fail_above, NAMES)
        for name in ("out", "data"):
            if not (given := getattr(self, name)) or "\0" in given:
                fail("run", name, "be the name of a folder" + ("" if name == "out" else " or file"), repr(given))
        if self.budget and not seconds(self.budget):
            fail("run", "budget", "be a time above 0 such as 90s, 30m or 1h30m", repr(self.budget))
        if self.budget and self.student_choose != "accuracy":
            rule = "be accuracy with a budget, which compares Students by the standard error of their accuracies"
            fail("run", "student_choose", rule, self.student_choose)
        if self.num_shadows % 2 or self.num_shadows == 2:
            fail("run", "num_shadows", "be 0, or even and at least 4", self.num_shadows)
        if self.student_shadows > 0 and not self.num_shadows:
            fail("run", "student_shadows", "be 0 or -1 without an audit (num_shadows 0)", self.student_shadows)
        if self.student_shadows not in (-1, 0, *range(4, self.num_shadows + 1, 2)):
            rule = f"be 0, -1, or even and from 4 to num_shadows, {self.num_shadows}"
            fail("run", "student_shadows", rule, self.student_shadows)
        if k := self.audit_canaries:
            if k % 2 or k < LEAST_CANARIES:
                fail("run", "audit_canaries", f"be 0, or even and at least {LEAST_CANARIES}", k)
            if not self.num_shadows:
                fail("run", "audit_canaries", "be 0 without an audit (num_shadows 0)", k)
            if self.teacher:
                fail("run", "audit_canaries", "be 0 with teacher, a given one, which cannot be trained again", k)
        check_generator(self)
        check_privacy(self)
        for name in ("teacher", "student"):
            rate, decay = getattr(self, f"{name}_learning_rate"), getattr(self, f"{name}_weight_decay")
            if rate * decay >= 1:  # a step of such a decay overshoots zero, and momentum lets it grow
                rule = f"be below 1 / {name}_learning_rate, {1 / rate:g}"
                fail("run", f"{name}_weight_decay", rule, decay)
        for name in ("teacher_mixup", "student_mixup", "student_cutmix"):
            if 0 < (alpha := getattr(self, name)) < LEAST_MIXUP:
                fail("run", name, f"be 0 or at least {LEAST_MIXUP}", alpha)
        self._check_loss()
        if self.ablation and self.labels == "class":
            fail("run", "ablation", "be left out with labels class, which it compares with others", True)
        if self.ablation and self.budget:
            fail("run", "ablation", "be left out with budget, in which three further Students have no share", True)
        if self.fixed_images and self.budget:
            fail("run", "fixed_images", "be left out with budget, which shares the time out between sets", True)
        check_search(self)
        guided = [scale for scale in (self.guidance_scale, *self.tune_guidance_scale) if scale != 1]
        if guided and not self.label_dropout:
            rule = "be above 0, which trains the null class, unless guidance_scale and tune_guidance_scale are 1"
            fail("run", "label_dropout", rule, f"0.0 beside {guided[0]:g}")

    def _check_loss(self) -> None:
        """Refuse options of the Student's loss that do nothing beside others, and weights that are too small."""
        idle = (
            {"soft_weight": "loss dkd"} if self.loss == "dkd" else dict.fromkeys(("dkd_alpha", "dkd_beta"), "loss kl")
        )
        if self.labels != "soft":
            idle = dict.fromkeys(OF_SOFT_LABELS, f"labels {self.labels}")
        for name, beside in idle.items():
            if (value := getattr(self, name)) != self.__dataclass_fields__[name].default:
                fail("run", name, f"be left out with {beside}, where it does nothing", value)
        names = ("dkd_alpha", "dkd_beta") if self.loss == "dkd" else ("soft_weight",)
        values = {name: getattr(self, name) for name in (*names, "hard_weight")}
        if sum(values.values()) < LEAST_WEIGHT:
            rule = f"be at least {LEAST_WEIGHT:g} in all, or nothing is learnt"
            fail("run", " and ".join(values), rule, " and ".join(f"{value:g}" for value in values.values()))

    def recipe(self, whose: str) -> TrainConfig:
        """How the ``teacher`` and its shadows, or the ``student``, are trained: the options of that name."""
        prefix = f"{whose}_"
        values = {name.removeprefix(prefix): value for name, value in vars(self).items() if name.startswith(prefix)}
        train, augment = ({field.name for field in dataclasses.fields(kind)} for kind in (TrainConfig, Augment))
        augmentation = Augment(**{name: values[name] for name in augment})
        return TrainConfig(**{name: values[name] for name in train & values.keys()}, augment=augmentation)

    @property
    def num_students(self) -> int:
        """Shadow Students to train."""
        return self.num_shadows if self.student_shadows == -1 else self.student_shadows

    @property
    def keeps_sets(self) -> bool:
        """Whether the Student's synthetic sets are kept for further Students that learn from them."""
        shared = self.audit_generator == "shared" or bool(self.audit_canaries)
        return self.ablation or (bool(self.num_students) and shared)

    @property
    def retrains_generators(self) -> bool:
        """Whether each shadow Student has a generator of its own."""
        return bool(self.num_students) and self.audit_generator == "retrained"

    @property
    def attacks_generator(self) -> bool:
        """Whether the generator's weights are attacked."""
        return bool(self.num_shadows) and self.audit_generator_weights

    def record(self) -> dict[str, Any]:
        """The configuration as plain values, without ``out``: what makes two runs the same run."""
        return record(self)
