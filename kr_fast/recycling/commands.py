"""The commands that make a run or a part of one: which options and stages each has."""

import dataclasses
from collections.abc import Mapping
from typing import Any, TypeVar

from kr_fast.runtime.errors import fail
from kr_fast.runtime.log import logger

T = TypeVar("T")
OF_DATA = ("out", "data", "seed", "precision", "val_fraction", "test_fraction", "duplicates", "log_with")
OF_READING = ("table", "image_column", "label_column", "split_column", "group_column", "image_size", "resize")
OF_READING += ("skip_unreadable",)
OF_SAMPLING = ("num_inference_steps", "guidance_scale", "guidance_interval", "noise_scale", "micro_batch", "label_plan")
OF_AN_AUDIT = {"num_shadows": 0, "audit_control": False, "audit_released": False}  # of none
TRAINED = "objective widths layers steps batch_size learning_rate ema flip dropout augment shift rotate scale classes"
SEARCHED = "noise_scale guidance_scale num_inference_steps confidence guidance_interval images student_epochs trials"


@dataclasses.dataclass(frozen=True)
class Command:
    """A command on the configuration of a run.

    ``options``: those that it has; ``values``: of others, where these are not the defaults of a run; ``stages``: those
    that it goes through, None for all; ``defaults``: of ``options``, in place of a run's; ``titles``: of groups of
    options, in place of a run's.
    """

    name: str
    options: tuple[str, ...] = ()
    values: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    stages: tuple[str, ...] | None = None
    defaults: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    titles: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def used(self, values: Mapping[str, Any], usual: Mapping[str, Any]) -> dict[str, Any]:
        """Those of ``values`` that are options of this command; a line names others that are not as ``usual``.

        Raises: as :meth:`refuse`.
        """
        self.refuse(values)
        rest = [name for name in values if name not in self.options and name in usual]
        own = {**usual, **self.values}
        other = [name for name in rest if _plain(values[name]) not in (_plain(usual[name]), _plain(own[name]))]
        if other:
            logger.warning("%s: left out, as this command has no such option: %s", self.name, ", ".join(other))
        return {name: value for name, value in values.items() if name not in rest}

    def refuse(self, values: Mapping[str, Any]) -> None:
        """Refuse a differentially private run as another command: to leave epsilon out would break a promise."""
        if values.get("epsilon") and self.name != RUN.name:
            fail(self.name, "epsilon", "be left out, as kr-fast run alone trains with privacy", values["epsilon"])

    def of(self, config: T) -> T:
        """The configuration of a run as this command carries it out: options of others have no effect."""
        fields = {field.name: field.default for field in dataclasses.fields(config)}
        used = self.used({name: getattr(config, name) for name in fields if name != "command"}, fields)
        return type(config)(**{**used, **self.values, "command": self.name})


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


RUN = Command("run")
GENERATOR = Command(
    "generator",
    (
        *OF_DATA,
        *(f"generator_{name}" for name in TRAINED.split()),
        *("generator_stop_above", "label_dropout", "checkpoints"),
        *(*OF_SAMPLING, "solver"),
        *OF_READING,
    ),
    # What is not tuned cannot contradict what the network is trained for.
    {**OF_AN_AUDIT, "tune_noise_scale": (), "tune_guidance_scale": ()},
    ("data", "generator"),
    {"out": "runs/generator"},
    {"num_inference_steps": "sampling: of the images by which checkpoints are measured, and as others read it here"},
)
DISTIL = Command(
    "distil",
    (
        *(*OF_DATA, "ordinal", "teacher", "teacher_arch", "teacher_width", "generator"),
        *(*OF_SAMPLING, "confidence"),
        *(f"tune_{name}" for name in SEARCHED.split()),
        *("trial_images", "trial_periods", "trial_epochs"),
        *(f"student_{name}" for name in ("arch", "width", "epochs", "batch_size", "learning_rate", "weight_decay")),
        *("periods", "images", "labels", "temperature", "soft_weight", "hard_weight", "student_choose"),
        *("loss", "dkd_alpha", "dkd_beta", "standardize_logits", "student_mixup", "student_cutmix"),
        *("fixed_images", "ablation", *(f"student_{name}" for name in ("shift", "flip", "rotate", "scale"))),
        *("show_real_images", "fail_above", "verdict_gap"),
        *OF_READING,
    ),
    OF_AN_AUDIT,
    None,
    {"out": "runs/distil"},
    {"teacher": "Teacher", "tune_noise_scale": "tuning", "num_shadows": "report"},
)
COMMANDS = {each.name: each for each in (RUN, GENERATOR, DISTIL)}


def of_command(config: Any, stages: Mapping[str, T]) -> dict[str, T]:
    """What belongs to stages that the command of ``config`` goes through, from a dictionary by stage."""
    own = COMMANDS[config.command].stages
    return {stage: value for stage, value in stages.items() if own is None or stage in own}
