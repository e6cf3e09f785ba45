"""Named starting points. A preset only lists what differs from the defaults of ``RecycleConfig``.

``digits``, ``small`` and ``toy`` are for kinds of images, ``private``, ``accurate`` and ``guaranteed`` are methods that
go with each.
"""

from collections.abc import Mapping
from typing import Any

from kr_fast.models.resnet import GROUP_NORM
from kr_fast.recycling.dp.options import PRESET, UNPAID
from kr_fast.runtime.errors import fail

PRESETS: dict[str, dict[str, Any]] = {
    # scikit-learn's 8x8 digits: minutes on two cores.
    "digits": {},
    # MedMNIST at 28 px on a small machine: under an hour on two cores.
    "small": {
        "out": "runs/small",
        "teacher_epochs": 20,
        "teacher_shift": 2,
        "teacher_flip": True,
        "teacher_rotate": 0.0,
        "teacher_scale": 0.0,
        "generator_widths": (32, 64, 64),
        "generator_steps": 800,
        "generator_batch_size": 64,
        "generator_learning_rate": 1e-3,
        "generator_flip": True,
        "num_inference_steps": 6,
        "micro_batch": 128,
        "tune_num_inference_steps": (10,),
        "trial_images": 512,
        "trial_periods": 1,
        "periods": 6,
        "student_shift": 2,
        "student_flip": True,
        "student_rotate": 0.0,
        "student_scale": 0.0,
        "num_shadows": 8,
    },
    # A Student that knows less of single training images: a Teacher that is less sure of its own, and only its top
    # class. Mixup needs a strong augmentation, or it makes a Teacher easier to attack (docs/measured/leakage.md).
    "private": {"out": "runs/private", "teacher_mixup": 1.0, "teacher_choose": "loss", "labels": "top1"},
    # A Student that learns for longer, from more images (docs/measured/accuracy.md).
    "accurate": {"out": "runs/accurate", "periods": 20},
    # A Student with a guarantee: what cannot be paid for is off, and the Teacher has no norm across records.
    PRESET: {
        "out": "runs/guaranteed",
        "epsilon": 8.0,
        "teacher_arch": f"resnet14{GROUP_NORM}",
        **{name: value for name, (value, _) in UNPAID.items()},
    },
    # The shortest run that goes through every stage; its figures mean nothing.
    "toy": {
        "out": "runs/toy",
        "precision": "float32",  # nothing to gain
        "teacher_arch": "resnet8",
        "teacher_width": 4,
        "teacher_epochs": 2,
        "generator_widths": (8, 8),
        "generator_steps": 12,
        "generator_batch_size": 32,
        "checkpoints": 2,
        "num_inference_steps": 2,
        "micro_batch": 64,
        "tune_noise_scale": (1.1,),
        "tune_guidance_scale": (1.5,),
        "tune_num_inference_steps": (),
        "tune_confidence": (0.05,),
        "trial_images": 64,
        "trial_periods": 1,
        "trial_epochs": 1,
        "student_arch": "resnet8",
        "student_width": 4,
        "periods": 3,
        "images": 128,
        "student_epochs": 1,
        "num_shadows": 4,
        "audit_control": False,
        "audit_generator_weights": False,
        "audit_page": False,
    },
}


def preset(names: str) -> dict[str, Any]:
    """The values of a preset, or of several with commas between, the last of which counts: ``small,private``.

    Raises: UserError listing the known names for an unknown one.
    """
    values: dict[str, Any] = {}
    chosen = [name.strip() for name in names.split(",")] if isinstance(names, str) else [names]
    for name in chosen:
        if not isinstance(name, str) or name not in PRESETS:
            fail("run", "preset", f"be one of {', '.join(PRESETS)}, or several with commas", name)
        values |= PRESETS[name]
    return values


def implied(values: Mapping[str, Any]) -> dict[str, Any]:
    """What follows from the options ``values``: with epsilon, the values of the preset ``guaranteed``, and the Teacher
    with GroupNorm in place of BatchNorm."""
    if not values.get("epsilon"):
        return {}
    arch = str(values.get("teacher_arch", "resnet14")).removesuffix(GROUP_NORM)
    return {**preset(PRESET), "teacher_arch": f"{arch}{GROUP_NORM}"}
