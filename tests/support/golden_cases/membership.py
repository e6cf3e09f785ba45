"""Small fixed calls of the audit, for golden.py: membership attacks, statistics, audits of signals."""

import dataclasses
import functools
import inspect
from pathlib import Path
from typing import Any

import numpy as np
import torch
from golden_cases.base import Cases, Lazy, find, get, integers, normal
from torch import Tensor, nn

COUNT, MODELS, CLASSES = 160, 8, 4


attacks = Lazy("kr_fast.membership")


def chosen(name: str, *given: Any, **options: Any) -> Any:
    """A function of membership; options that it takes within one object (``choices=Choices(...)``) are put into it."""
    function = get("kr_fast.membership", name)
    for group in {"choices", "auxiliary"} & set(inspect.signature(function).parameters):
        kind = find("choices", group.title(), "kr_fast.membership")
        fields = {field.name for field in dataclasses.fields(kind)}
        options[group] = kind(**{key: options.pop(key) for key in list(options) if key in fields})
    return function(*given, **options)


def report(name: str, *given: Any, **options: Any) -> list[Any]:
    """All that an audit finds."""
    result = chosen(name, *given, **options)
    return [result.to_dict(), result.arrays(), result.exposed(3), result.warnings, repr(result)]


def logits() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Logits ``[M + 1, N, A, C]`` that lean to the label, more where the example was held; keep; labels; members."""
    labels, members = integers(CLASSES, COUNT, seed=1), normal(COUNT, seed=2) > 0
    keep = normal(MODELS, COUNT, seed=3).argsort(0) < MODELS // 2
    z = 2 * normal(MODELS + 1, COUNT, 2, CLASSES, seed=4)
    lean = 1 + 1.5 * torch.cat([keep, members[None]])[:, :, None, None]
    return z + lean * nn.functional.one_hot(labels, CLASSES)[None, :, None], keep, labels, members


def audit_data(population: bool = True, **changes: Any) -> Any:
    """Logits as an audit's data."""
    z, keep, labels, members = logits()
    images = integers(256, COUNT, 4, 4, 1, dtype=torch.uint8)
    more = {"population": (z[:-1, :30], {"target": z[-1, :30]}, labels[:30])} if population else {}
    result = attacks.from_logits(z[:-1], keep, labels, target=z[-1], members=members, images=images, **more)
    return dataclasses.replace(result, **changes)


def membership(folder: Path) -> Cases:
    """Attacks, statistics, reading and writing, audits of signals."""
    phi, keep = 2 * normal(2, COUNT, MODELS), normal(MODELS, COUNT, seed=3).argsort(0) < MODELS // 2
    target, labels, z = normal(2, COUNT, 3, seed=1), integers(CLASSES, COUNT, seed=1), normal(2, 50, MODELS, seed=2)
    partner = attacks.partners(keep, seed=5)
    yield "partners", lambda: partner
    sides = {"shadows": {}, "target": {"target": target}, "partner": {"partner": partner}}
    for side, more in sides.items():
        for variant in ("online", "offline"):
            for variance in ("per_example", "fixed", "fixed_raw", "shrinkage"):
                lira = functools.partial(attacks.lira, phi, keep, variant=variant, variance=variance, **more)
                yield f"lira {variant} {variance}, {side}", lira
            yield f"base {variant}, {side}", functools.partial(attacks.base, phi, keep, variant=variant, **more)
            if side != "partner":
                for fixed in (False, True):
                    old = functools.partial(
                        attacks.lira_carlini2021, phi, keep, variant=variant, fix_variance=fixed, **more
                    )
                    yield f"lira_carlini2021 {variant} {fixed}, {side}", old
        yield f"attack_r, {side}", functools.partial(attacks.attack_r, phi, keep, **more)
        yield (
            f"label_only, {side}",
            functools.partial(
                attacks.label_only,
                (phi > 0).float(),
                keep,
                **{key: (v > 0).float() if key == "target" else v for key, v in more.items()},
            ),
        )
        own = {"target_population": normal(2, 50, 3, seed=4)} if side == "target" else {}
        for offline, predicate in ((None, "ratio"), (0.4, "ratio"), (None, "ratio_strict"), (0.4, "reciprocal")):
            options = {"gamma": 1.5, "offline_a": offline, "predicate": predicate, **more, **own}
            yield (
                f"rmia_attack {offline} {predicate}, {side}",
                functools.partial(attacks.rmia_attack, phi, keep, z, **options),
            )
        if side != "partner":
            by_class = functools.partial(attacks.threshold_per_class, phi, keep, labels, **more)
            yield f"threshold_per_class, {side}", by_class
            features = normal(COUNT, 3, seed=6)
            yield (
                f"quantile_regression, {side}",
                functools.partial(attacks.quantile_regression, phi, keep, features, **more),
            )
    features = torch.stack([phi[0], phi[1]], 2)
    for side, more in {
        "shadows": {"targets": (0, 3)},
        "target": {"target": features[:, :2]},
        "partner": {"targets": (1,), "partner": partner},
    }.items():
        yield f"shadow_network, {side}", functools.partial(attacks.shadow_network, features, keep, **more)
    yield "attack_p", lambda: attacks.attack_p(target, z[:, :, :3])
    yield "rmia", lambda: attacks.rmia(phi[0, 0].exp().tolist(), z[0, 0].exp().tolist(), gamma=1.2)
    images, synthetic, outside = (integers(256, n, 4, 4, 1, seed=n, dtype=torch.uint8) for n in (20, 30, 25))
    yield (
        "nearest_synthetic",
        lambda: [attacks.nearest_synthetic(images, synthetic, reference=each) for each in (None, outside)],
    )
    yield (
        "generated_density",
        lambda: [attacks.generated_density(images, synthetic, outside, dimensions=n) for n in (4, 16)],
    )
    yield (
        "catalog",
        lambda: {
            name: [each.title, each.assumes, each.needs] for name, each in get("kr_fast.membership", "CATALOG").items()
        },
    )
    yield "default", lambda: get("kr_fast.membership", "DEFAULT")
    yield from statistics()
    yield from reading(folder)
    every = sorted(get("kr_fast.membership", "CATALOG"))
    synthetic_data = {"synthetic": {"released": integers(256, 40, 4, 4, 1, seed=8, dtype=torch.uint8)}}
    synthetic_data["reference"] = integers(256, 30, 4, 4, 1, seed=9, dtype=torch.uint8)
    for name in every:
        yield (
            f"audit_signals {name}",
            lambda name=name: report("audit_signals", audit_data(**synthetic_data), attacks=[name]),
        )
    options = {
        "level": 0.9,
        "delta": 1e-3,
        "priors": (0.3,),
        "random_members": True,
        "rmia_gamma": 1.3,
        "rmia_offline_a": 0.5,
    }
    yield "audit_signals default", lambda: report("audit_signals", audit_data(**synthetic_data))
    yield (
        "audit_signals options",
        lambda: report(
            "audit_signals",
            audit_data(),
            attacks=["rmia", "rmia_offline", "loss"],
            primary="rmia",
            rmia_predicate="reciprocal",
            seed=3,
            **options,
        ),
    )
    yield "audit_signals shadows", lambda: report("audit_signals", audit_data(False), targets="shadows", seed=1)
    for wrong in (
        {"attacks": ["no"]},
        {"attacks": "lira"},
        {"attacks": []},
        {"primary": "rmia_offline"},
        {"targets": "all"},
        {"level": 2},
        {"rmia_gamma": -1},
    ):
        yield f"audit_signals wrong {wrong}", lambda wrong=wrong: report("audit_signals", audit_data(False), **wrong)
    for name, value in {"phi": phi[0], "keep": keep.T, "nan": phi * torch.nan}.items():
        pair = (phi, value) if name == "keep" else (value, keep)
        yield f"lira wrong {name}", lambda pair=pair: attacks.lira(*pair)


def statistics() -> Cases:
    """Of scores and members: with ties, few, apart, and the same in lists."""
    members, fprs = normal(200, seed=1) > 0.2, (0.1, 0.01, 0.001)
    scores = normal(200, seed=2).double() + members
    sets = {"plain": (scores, members), "ties": (scores.round(), members), "few": (scores[:9], members[:9])}
    sets |= {"apart": (members.double(), members), "lists": (scores.float().tolist(), members.int().tolist())}
    for name, pair in sets.items():
        yield f"curve {name}", lambda pair=pair: attacks.roc(*pair)
        yield (
            f"curve {name}, figures",
            lambda pair=pair: [
                [c.auc, c.balanced_accuracy, c.advantage, repr(c), c.tpr, c.fpr] for c in [attacks.roc(*pair)]
            ],
        )
        yield (
            f"curve {name}, auc_interval",
            lambda pair=pair: [attacks.roc(*pair).auc_interval(x) for x in (0.5, 0.95, 0.99)],
        )
        rules = [(fpr, level, rule) for fpr in fprs for level in (0.9, 0.95) for rule in ("<=", "<", "interpolated")]
        yield (
            f"curve {name}, tpr_at",
            lambda pair=pair, rules=rules: [attacks.roc(*pair).tpr_at(*each) for each in rules],
        )
        yield f"curve {name}, tpr_interval", lambda pair=pair: attacks.roc(*pair).tpr_interval(fprs)
        yield f"curve {name}, precision", lambda pair=pair: [attacks.roc(*pair).precision(p, 0.1) for p in (0.5, 0.01)]
        yield (
            f"bootstrap {name}",
            lambda pair=pair: attacks.bootstrap(attacks.roc(*pair), replicates=50, fprs=fprs, seed=3),
        )
        yield (
            f"operating_point {name}",
            lambda pair=pair: [attacks.operating_point(attacks.roc(*pair), t) for t in (-9.0, 0.4, 9.0)],
        )
        for strategy in ("bonferroni", "split", "multi_split"):
            more = {"strategy": strategy, "delta": 1e-3}
            yield (
                f"epsilon_clopper_pearson {name} {strategy}",
                lambda p=pair, m=more: attacks.epsilon_clopper_pearson(*p, **m),
            )
        yield (
            f"epsilon_clopper_pearson {name} thresholds",
            lambda p=pair: attacks.epsilon_clopper_pearson(*p, thresholds=(0.0, 1.0)),
        )
        yield (
            f"epsilon_one_run {name}",
            lambda p=pair: [attacks.epsilon_one_run(*p, delta=d, guesses=g) for d, g in ((0.0, None), (1e-3, 6))],
        )
        yield f"gaussian_mu {name}", lambda p=pair: attacks.gaussian_mu(*p)
        yield f"delong_test {name}", lambda p=pair: attacks.delong_test(p[0], normal(len(p[0]), seed=5), p[1])
    for name, pair in {
        "nan": (scores * torch.nan, members),
        "one class": (scores, members | True),
        "length": (scores[1:], members),
    }.items():
        for function in ("roc", "epsilon_one_run", "gaussian_mu", "epsilon_clopper_pearson"):
            yield f"{function} wrong {name}", lambda p=pair, f=function: getattr(attacks, f)(*p)
    yield "epsilon_of_mu", lambda: [attacks.epsilon_of_mu(mu, delta) for mu in (0.0, 0.5, 3.0) for delta in (1e-5, 0.1)]
    yield "aop", lambda: [attacks.aop(0.8, auc) for auc in (0.4, 0.5, 0.7)]
    keep = normal(MODELS, COUNT, seed=3).argsort(0) < MODELS // 2
    loo = normal(MODELS, COUNT, seed=4).double() + keep
    yield (
        "across_targets",
        lambda: [attacks.across_targets(loo, keep), attacks.across_targets(loo[:2], keep[:2], (0.1,), 0.9)],
    )
    yield "shadow_threshold", lambda: [attacks.shadow_threshold(loo, keep, fpr) for fpr in fprs]


def reading(folder: Path) -> Cases:
    """from_logits, and the files of others."""
    z, keep, labels, members = logits()
    one = {"logits": z[:-1, :, 0], "keep": keep, "labels": labels}
    held = {"members": members.nonzero()[:20, 0], "non_members": (~members).nonzero()[:30, 0]}
    first = z[:-1, :, 0]
    variants = {
        "shadows": one,
        "queries": one | {"logits": z[:-1]},
        "softmax": one | {"logits": first.softmax(2)},
        "targets": one | {"target": {"a": z[-1, :, 0], "b": z[-1, :, 1]}, **held},
        "probabilities": one | {"logits": first.softmax(2), "probabilities": True},
        "no shadows": {"logits": None, "keep": None, "labels": labels, "target": z[-1, :, 0], "members": members},
        "labels": one | {"labels": labels[1:]},
        "arrays": {key: value.tolist() for key, value in one.items()},
    }
    for name, given in variants.items():
        yield f"from_logits {name}", functools.partial(attacks.from_logits, **given)
    yield "AuditData", lambda: [audit_data(), repr(audit_data())]
    for kind, given in {
        "ShadowSignals": (keep, {"phi": normal(1, COUNT, MODELS)}),
        "TargetSignals": ({"phi": normal(1, COUNT)},),
    }.items():
        yield (
            kind,
            lambda kind=kind, given=given: [getattr(attacks, kind)(*given), repr(getattr(attacks, kind)(*given))],
        )
        yield f"{kind} wrong", lambda kind=kind, given=given: getattr(attacks, kind)(*given[:-1], {"phi": labels})

    def npz() -> Any:
        attacks.save_npz(folder / "saved.npz", audit_data())
        return dict(np.load(folder / "saved.npz")), attacks.load_npz(folder / "saved.npz")

    def tree() -> Any:
        for m in range(MODELS):
            path = folder / "tree" / f"experiment-{m}_{MODELS}"
            for name, value in (("logits", z[m][:, None]), ("scores", z[m, :, :, 0])):
                (path / name).mkdir(parents=True, exist_ok=True)
                np.save(path / name / "0000000100.npy", value.numpy())
            np.save(path / "keep.npy", keep[m].numpy())
        result = [attacks.load_lira_tree(folder / "tree")]
        np.save(folder / "tree" / "y_train.npy", labels.numpy())
        return [*result, attacks.load_lira_tree(folder / "tree", targets=[f"experiment-3_{MODELS}"])]

    def meter() -> Any:
        (folder / "meter" / "signals").mkdir(parents=True, exist_ok=True)
        np.save(folder / "meter" / "memberships.npy", keep.numpy())
        for name, count in (("rmia_signals", COUNT), ("rmia_signals_pop", 30)):
            np.save(folder / "meter" / "signals" / f"{name}.npy", z[:-1, :count, 0].softmax(2)[:, :, 0].T.numpy())
        return [
            attacks.load_privacy_meter(folder / "meter", target=each, signal=kind)
            for each, kind in ((0, "probability"), (None, "loss"))
        ]

    yield "npz", npz
    yield "lira tree", tree
    yield "privacy meter", meter
    for name in ("load_npz", "load_lira_tree", "load_privacy_meter"):
        yield f"{name} absent", lambda name=name: getattr(attacks, name)(folder / "absent")
