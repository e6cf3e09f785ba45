"""Plain results of a run, as the report takes them."""

import numpy as np


def attack(auc, low, high, false_positives=12, role="primary"):
    tpr = {
        "tpr": 0.05,
        "interval": [0.02, 0.09],
        "false_positives": false_positives,
        "point_claim": false_positives >= 10,
    }
    actual = {"auc": auc, "auc_ci": [low, high], "balanced_accuracy": 0.55, "tpr_at_fpr": {"0.01": tpr}}
    return {**actual, "role": role, "auc_ci_corrected": [low - 0.01, high + 0.01]}


def paired(difference, p, exploratory=False):
    interval, wide = ([difference - reach, difference + reach] for reach in (0.04, 0.05 if exploratory else 0.04))
    corrected = {"interval_corrected": wide, "p_corrected": 2 * p if exploratory else p}
    role = "exploratory" if exploratory else "primary"
    return {"first": "teacher", "role": role, "difference": difference, "interval": interval, "p": p, **corrected}


def recipe(mean, low, high, role="primary", difference=None):
    """As of an audit's leave_one_out: one attack on shadows, each from the others."""
    spread = {"mean": mean, "sd": 0.012, "each": [mean] * 16}
    auc = {**spread, "interval": [low, high], "interval_corrected": [low - 0.01, high + 0.01]}
    gap = None if difference is None else {**paired(*difference), "first": "teacher", "targets": 12}
    tprs = {"0.01": {"mean": None, "sd": None, "each": [], "interval": None}}
    return {"targets": 16, "auc": auc, "balanced_accuracy": spread, "tpr_at_fpr": tprs, "role": role, "difference": gap}


def whole_audit(full=True, control=True, released=True, recipes=True):
    """As of a run: Teacher by its shadows, Student by transfer and in full, images, control."""
    loss = {"role": "exploratory"}
    actual = {
        "teacher": {"lira": attack(0.6, 0.57, 0.63), "loss": attack(0.55, 0.52, 0.58, 3, **loss)},
        "student": {"lira": attack(0.51, 0.48, 0.54), "loss": attack(0.5, 0.47, 0.53, **loss)},
        "comparison": {"student": {"lira": paired(0.09, 0.004), "loss": paired(0.05, 0.03, True)}},
        "leave_one_out": {},
        "records": {},
    }
    targets = {
        "teacher": {"kind": "full", "shadows": "teacher", "shared": "", "control": False, "primary": "lira"},
        "student": {"kind": "transfer", "shadows": "teacher", "shared": "", "control": False, "primary": "lira"},
    }
    if recipes:
        actual["leave_one_out"]["teacher"] = {
            "lira": recipe(0.58, 0.565, 0.595),
            "loss": recipe(0.54, 0.53, 0.55, "exploratory"),
        }
        if full:
            actual["leave_one_out"]["student_full"] = {
                "lira": recipe(0.52, 0.505, 0.535, difference=(0.06, 0.001)),
                "loss": recipe(0.51, 0.495, 0.525, "exploratory", (0.03, 0.02, True)),
            }
    sets = {"teacher": {"models": 16, "on_the_smaller_side": 8}}
    if full:
        actual["student_full"] = {"lira": attack(0.57, 0.54, 0.6), "loss": attack(0.5, 0.47, 0.53, **loss)}
        actual["comparison"]["student_full"] = {"lira": paired(0.03, 0.2), "loss": paired(0.05, 0.03, True)}
        targets["student_full"] = {**targets["teacher"], "shadows": "student_full", "shared": "the generator"}
        sets["student_full"] = {"models": 12, "on_the_smaller_side": 6}
    if control:
        actual["control"] = {"lira": attack(0.8, 0.78, 0.82), "loss": attack(0.7, 0.67, 0.73, **loss)}
        targets["control"] = {"kind": "full", "shadows": "teacher", "shared": "", "control": True, "primary": "lira"}
    if released:
        actual["released"] = {"nearest_synthetic": attack(0.53, 0.50, 0.56, **loss)}
        targets["released"] = {"kind": "released", "images": 1024, "control": False, "primary": "nearest_synthetic"}
    titles = {"lira": "LiRA online", "loss": "loss threshold", "nearest_synthetic": "nearest synthetic image"}
    detected = {"name": "control", "found": True, "by": ["lira", "loss"], "by_primary": True}
    setting = {"members": 900, "non_members": 500, "num_shadows": 16, "augment": "none", "lira_variance": "fixed"}
    setting |= {"warnings": [], "level": 0.95, "targets": targets, "shadow_sets": sets}
    setting["attacks"] = {name: {"title": title, "assumes": ""} for name, title in titles.items()}
    return {**actual, "setting": {**setting, "control": detected if control else None, "negative_controls": None}}


def tested(auc, apart):
    """What is measured of a model on test images beside its accuracy; class "b|c" has none."""
    figures = {name: auc - 0.02 * at for at, name in enumerate(("auc", "balanced_accuracy", "ece"))}
    intervals = {f"test_{name}_ci": [value - 0.01, value + 0.01] for name, value in figures.items()}
    figures = {f"test_{name}": value for name, value in figures.items()}
    few = {"images": apart, "accuracy": 0.96, "auc": auc - 0.1}
    return {
        **figures,
        **intervals,
        "test_recall": [0.5, None],
        "test_recall_ci": [[0.45, 0.551], None],
        "test_precision": [1.0, 0.0],
        "test_precision_ci": [[1.0, 1.0], [0.0, 0.0]],
        "test_class_auc": [auc, None],
        "test_class_auc_ci": [[auc - 0.01, auc + 0.01], None],
        "test_class_ece": [0.04, None],
        "test_class_ece_ci": [[0.03, 0.06], None],
        "test_confusion": [[250, 250], [0, 0]],
        "test_confusion_ci": [[[0.45, 0.55], [0.45, 0.55]], None],
        "test_absent_classes": [1],
        "test_without_duplicates": few,
    }


def generated(kid):
    """What is measured of generated images; of class "b|c" there are too few."""
    own = {"fid": 2.5, "fid_ci": None, "precision": 0.7, "precision_ci": [0.6, 0.8], "recall": 0.6, "density": 0.8}
    own |= {"recall_ci": [0.5, 0.7], "density_ci": [0.7, 0.9], "coverage": 0.5, "coverage_ci": [0.4, 0.6]}
    facts = {"mean": kid, "sd": 0.03, "subsets": 50, "subset_size": 64, "all": kid, "all_ci": [kid - 0.02, kid + 0.02]}
    of_class = {"images": 100, "test_images": 500, **own, "kid": kid, "kid_ci": [kid - 0.02, kid + 0.02]}
    return {"kid": facts, **own, "classes": [{**of_class, "real": of_class}, {"images": 28, "test_images": 0}]}


def summary(**changes):
    dataset = {"name": "<script>alert(1)</script>", "num_classes": 2, "class_names": ["<i>a", "b|c"]}
    dataset |= {"train": 900, "val": 100, "test": 500, "height": 8, "width": 8, "channels": 1}
    dataset["notes"] = ["pixels are 8-bit", "not read: 3 files"]
    actual = {
        "title": "Knowledge Recycling on <b>set</b>",
        "command": "kr-fast run --out x",
        "config": {"seed": 0, "audit_generator": "shared"},
        "seed": 0,
        "versions": {"torch": "2.13.0"},
        "stages": {"teacher": 3.0, "gkd": 4.5},
        "dataset": dataset,
        "teacher": {"test_accuracy": 0.97, "val_accuracy": 0.98, "parameters": 10, **tested(0.99, 490)},
        "student": {"test_accuracy": 0.95, "val_accuracy": 0.96, "parameters": 10, **tested(0.98, 490)},
        "cas_gap": 0.02,
        "student_minus_teacher": {
            name: {"difference": -0.01, "interval": [-0.02, 0.004]}
            for name in ("accuracy", "auc", "balanced_accuracy", "ece")
        },
        "synthetic": {"images": 128, "test_images": 500, "features": 16, **generated(0.12), "real": generated(0.01)},
        "audit": whole_audit(),
        "aop": {"teacher": 0.67, "student": 0.91, "student_full": 0.8},
        "checkpoints": [{"step": 9, "val_accuracy": 0.5, "chosen": True}],
        "tuning": [{"sigma": 1.0, "val_accuracy": 0.5, "chosen": True}],
        "notes": ["few shadows"],
    }
    return actual | changes


def arrays():
    grid = np.zeros((2, 8, 8, 8, 1), np.uint8)
    curves = {
        "teacher": {"epoch": [1, 2], "train_loss": [1.0, 0.5], "val_accuracy": [0.5, 0.9]},
        "generator": {"step": [20, 40], "loss": [1.0, 0.4]},
        "student": {"period": [1, 2], "loss": [3.0, 1.0], "val_accuracy": [0.4, 0.8]},
    }
    rate = np.linspace(0, 1, 50)
    roc = {f"{m}/{a}": {"fpr": rate, "tpr": rate**0.8} for m in ("teacher", "student") for a in ("lira", "loss")}
    return {"real_grid": grid, "synthetic_grid": grid + 9, "curves": curves, "roc": roc}
