"""Options of differential privacy, and what cannot be together with them: whatever reads private images unpaid."""

import dataclasses
from typing import Any

from kr_fast.models.resnet import CLASSIFIERS, GROUP_NORM
from kr_fast.runtime.errors import fail
from kr_fast.runtime.options import option

# Option -> (its value under epsilon, why). Each of the others reads real images, or changes what one record reaches.
READS_VALIDATION = "as no choice may read private images that is not paid for"
TUNED = ("noise_scale", "guidance_scale", "num_inference_steps", "confidence", "guidance_interval", "solver")
TUNED += ("images", "student_epochs")
UNPAID: dict[str, tuple[Any, str]] = {
    **{f"tune_{name}": ((), READS_VALIDATION) for name in TUNED},
    "tune_trials": (0, READS_VALIDATION),
    "checkpoint_halving": (False, READS_VALIDATION),
    "ema_lengths": ((), READS_VALIDATION),
    "checkpoints": (1, READS_VALIDATION),
    "generator_stop_above": (1.0, READS_VALIDATION),
    "teacher_choose": ("accuracy", "as the Teacher of the last step is taken and none is chosen"),
    "student_choose": ("accuracy", "as the Student of the last period is taken and none is chosen"),
    "budget": ("", "which divides the time by scores on private validation images"),
    "teacher_mixup": (0.0, "as a mixed image has the gradient of two records"),
    "generator_classes": ("train", "as records are drawn alike, each by itself"),
    "generator_augment": (0.0, "whose conditioning has no rule for gradients of single records"),
    "generator_dropout": (0.0, "whose masks would be drawn from the run's seed and depend on other records"),
    "audit_generator": ("shared", "as generators on halves would not be trained with privacy"),
    "audit_canaries": (0, "as twins would not be trained with privacy"),
    "log_with": ((), "as curves of real images are not covered by the guarantee"),
    "show_real_images": (False, "as nothing of a real image may lie beside the guarantee"),
    "show_records": (False, "as nothing of a single record may lie beside the guarantee"),
}
PRESET = "guaranteed"  # whose values are those of UNPAID


@dataclasses.dataclass(frozen=True, kw_only=True)
class PrivacyOptions:
    """Fields of a :class:`RecycleConfig`."""

    epsilon: float = option(
        0.0,
        "differential privacy: Teacher and generator are trained so that the Student and the synthetic images spend at "
        "most this epsilon, and release/ holds nothing else of the training images; 0 for none",
        least=0,
        most=1000,
    )
    delta: float = option(1e-5, "with epsilon: delta, which belongs below 1 / training images", above=0, below=1)
    epsilon_teacher_share: float = option(
        0.5, "share of epsilon that the Teacher may spend by itself; the generator spends the rest", above=0, below=1
    )
    class_counts: str = option(
        "noised",
        "with epsilon, how often each class is drawn by label_plan train: noised (paid for) or public (you declare "
        "that the class counts of the training images may be known)",
        choices=("noised", "public"),
    )
    dp_clipping: str = option(
        "flat",
        "how the gradient of a record is bounded: flat (norm at most dp_max_grad_norm) or automatic (Bu et al., 2023)",
        choices=("flat", "automatic"),
    )
    dp_max_grad_norm: float = option(1.0, "largest norm of the gradient of a record", least=1e-6, most=1e6)
    dp_multiplicity: int = option(
        4, "noise levels of an image whose gradients are averaged before clipping, in the generator", least=1, most=1024
    )
    dp_physical_batch: int = option(
        64,
        "records of a private batch in one call of a network; the guarantee does not depend on it",
        least=1,
        most=1_000_000,
    )
    dp_seed: int = option(
        -1, "seed of private noise and sampling, for tests alone, with not_private; -1 for none", least=-1, most=2**62
    )
    not_private: bool = option(False, "allow dp_seed: the result is marked as not private everywhere")


def check_privacy(config: Any) -> None:
    """Refuse what cannot work together in a :class:`RecycleConfig`. Raises: UserError naming the option."""
    if config.dp_seed >= 0 and not config.not_private:
        rule = "be left out without not_private: noise that can be drawn again protects nothing"
        fail("run", "dp_seed", rule, config.dp_seed)
    if not config.epsilon:
        usual = {field.name: field.default for field in dataclasses.fields(PrivacyOptions)}
        for name, value in usual.items():
            if getattr(config, name) != value:
                fail("run", name, "be left out without epsilon, where it does nothing", getattr(config, name))
        return
    if not config.teacher_arch.endswith(GROUP_NORM):
        names = ", ".join(name for name in CLASSIFIERS if name.endswith(GROUP_NORM))
        rule = f"be one of {names} with epsilon, as BatchNorm mixes the records of a batch"
        fail("run", "teacher_arch", rule, config.teacher_arch)
    if config.not_private and config.dp_seed < 0:
        fail("run", "not_private", "be left out without dp_seed, which it allows", True)
    for name, what in (("teacher", "a given one"), ("generator", "a given one")):
        if value := getattr(config, name):
            rule = f"be left out with epsilon, as {what} was trained on records that nothing was spent for"
            fail("run", name, rule, list(value) if isinstance(value, tuple) else value)
    for name, (allowed, why) in UNPAID.items():
        if (value := getattr(config, name)) != allowed:
            rule = "left out" if allowed in ((), "") or allowed is False else allowed
            got = list(value) if isinstance(value, tuple) else value
            fail("run", name, f"be {rule} with epsilon, {why} (the preset {PRESET} has these values)", got)
