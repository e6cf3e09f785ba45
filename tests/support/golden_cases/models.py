"""Small fixed calls of many models, of their training and of synthesis, for golden.py."""

import copy
import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from golden_cases.base import Cases, Lazy, get, integers, normal
from golden_cases.membership import CLASSES, attacks, report
from golden_cases.ops import SIGNALS
from torch import Tensor, nn

MILD = {"beta_start": 1e-4, "beta_end": 2e-3}  # the network is not trained: the usual schedule gives black and white
SOLVERS = {
    "DDIMScheduler": [MILD | {"clip_sample": True}, MILD | {"thresholding": True, "sample_max_value": 1.5}],
    "DDPMScheduler": [MILD],
    "DPMSolverMultistepScheduler": [MILD, MILD | {"solver_order": 3}, MILD | {"algorithm_type": "sde-dpmsolver++"}],
    "DPMSolverSinglestepScheduler": [MILD],
    "UniPCMultistepScheduler": [MILD],
    "DEISMultistepScheduler": [MILD],
    "PNDMScheduler": [MILD | {"skip_prk_steps": True}],
    "IPNDMScheduler": [{}],
    "EulerDiscreteScheduler": [MILD],
    "EulerAncestralDiscreteScheduler": [MILD],
    "HeunDiscreteScheduler": [MILD],
    "KDPM2DiscreteScheduler": [MILD],
    "LMSDiscreteScheduler": [MILD],
    "FlowMatchEulerDiscreteScheduler": [{}],
    "FlowMatchHeunDiscreteScheduler": [{}],
    "LCMScheduler": [MILD],
    "TCDScheduler": [MILD],
    "SASolverScheduler": [MILD],
}
kr, ensemble = Lazy("kr_fast"), Lazy("kr_fast.ensemble")


def of_array(array: Any) -> list[dict[str, Tensor]]:
    """The weights of a ModelArray."""
    return [dict(model.state_dict()) for model in array.models]


class Branching(nn.Module):
    """A forward that asks for numbers: it cannot be traced."""

    def __init__(self):
        super().__init__()
        self.conv, self.head = nn.Conv2d(1, 8, 3), nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        return self.head((x * 2 if bool(x.isfinite().all()) else x).mean((2, 3)))


def pooled() -> nn.Module:
    """Pooling, BatchNorm without weight, GELU, GroupNorm, depthwise and strided convolutions."""
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1),
        nn.MaxPool2d(2),
        nn.BatchNorm2d(16, affine=False),
        nn.GELU(),
        nn.Conv2d(16, 16, 3, padding=1, groups=16),
        nn.BatchNorm2d(16),
        nn.SiLU(),
        nn.Conv2d(16, 32, 3, 2, 1),
        nn.GroupNorm(4, 32),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Dropout(0.2),
        nn.Linear(32, CLASSES),
    )


def resnet() -> nn.Module:
    return importlib.import_module("kr_fast.models").classifier("resnet8", num_classes=CLASSES, in_channels=1, width=16)


def small() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 12), nn.ReLU(), nn.Linear(12, CLASSES))


NETWORKS = {"resnet": resnet, "pooled": pooled, "branching": Branching, "small": small}


def models(make: Callable[[], nn.Module], count: int = 3) -> list[nn.Module]:
    """Models whose BatchNorms do something."""
    result = []
    for seed in range(count):
        torch.manual_seed(seed)
        model = make()
        for part in model.modules():
            if isinstance(part, nn.BatchNorm2d):
                part.running_mean.normal_(0, 0.3)
                part.running_var.uniform_(0.3, 2)
        result.append(model.eval())
    return result


def arrays(folder: Path) -> Cases:
    """ModelArray, training and audits of models."""
    images, labels = integers(256, 60, 8, 8, 1, dtype=torch.uint8), integers(CLASSES, 60, seed=1)
    changes = {
        "plain": {},
        "bfloat16": {"dtype": torch.bfloat16},
        "batch": {"bn": "batch", "chunk": 30},
        "chunk": {"chunk": 7},
        "own": {"kernels": "own"},
        "normalize": {"normalize": ((0.4,), (0.3,))},
        "wrong bn": {"bn": "x"},
        "wrong chunk": {"chunk": 0},
    }
    for name, make in NETWORKS.items():
        for change, options in changes.items():

            def array(make=make, options=options) -> Any:
                return kr.ModelArray(models(make), **options)

            yield (
                f"ModelArray {name}, {change}",
                lambda a=array: [a()(images), a().signals(images, labels, want=SIGNALS), repr(a())],
            )
        for augment in ("flip", "shift", "lira", "none", "no"):
            yield (
                f"signals {name}, {augment}",
                lambda m=make, x=augment: kr.ModelArray(models(m)).signals(images[:20], labels[:20], augment=x),
            )
    query = [{"flip": True, "down": 2, "right": -1, "border": "reflect", "size": (6, 5)}, {"size": (6, 5)}]
    yield (
        "signals of queries",
        lambda: kr.ModelArray(models(pooled)).signals(images, labels, augment=[ensemble.Query(**q) for q in query]),
    )
    yield "Query", lambda: [ensemble.Query(**q).index(8, 8) for q in query]
    yield "Query wrong", lambda: ensemble.Query(border="x")
    yield "signals on disk", lambda: kr.ModelArray(models(small)).signals(images, labels, path=folder / "signals")
    yield "state dicts", lambda: kr.ModelArray([m.state_dict() for m in models(small)], small)(images)
    yield "LogitsOf", lambda: [ensemble.LogitsOf(models(small, 1)[0])(images / 255.0), repr(ensemble.LogitsOf(small()))]
    for name, (x, y) in {
        "images": (images.float(), labels),
        "labels": (images, labels + 9),
        "length": (images, labels[1:]),
    }.items():
        yield f"signals wrong {name}", lambda x=x, y=y: kr.ModelArray(models(small)).signals(x, y)
    yield from training(folder, images, labels)


def training(folder: Path, images: Tensor, labels: Tensor) -> Cases:
    """fit, train_shadows, load_shadows, the positive control, audits of models."""
    data = importlib.import_module("kr_fast.data")
    split, val = data.Split(images[:40], labels[:40]), data.Split(images[40:], labels[40:])

    def config(**options: Any) -> Any:
        return ensemble.TrainConfig(**{"epochs": 2, "batch_size": 16, "learning_rate": 0.05, **options})

    shaken = {"augment": data.Augment(shift=1, flip=True, rotate=10.0, scale=0.1), "label_smoothing": 0.1}
    for name in ("small", "resnet", "pooled"):

        def fitted(make=NETWORKS[name], **options: Any) -> Any:
            model = models(make, 1)[0]
            history = ensemble.fit(model, split, config(**options), seed=3, val=val)
            return model, history, ensemble.accuracy(model, val)

        yield f"fit {name}", fitted
        yield f"fit {name}, augmented", lambda fitted=fitted: fitted(**shaken)
        for way, more in {
            "one by one": {"batched": False},
            "batched": {"batched": 2},
            "bfloat16": {"batched": True, "precision": "bfloat16"},
        }.items():

            def trained(make=NETWORKS[name], more=more) -> Any:
                result = ensemble.train_shadows(
                    make, images, labels, num_models=4, config=config(**shaken), seed=5, **more
                )
                return of_array(result.array), result.keep, repr(result)

            yield f"train_shadows {name}, {way}", trained

    def shadows(out: Path | None = None) -> Any:
        return ensemble.train_shadows(small, images, labels, num_models=4, config=config(), seed=5, out=out)

    def saved() -> Any:
        shadows(folder / "shadows")
        result = ensemble.load_shadows(small, folder / "shadows")
        return of_array(result.array), result.keep, sorted(path.name for path in (folder / "shadows").iterdir())

    members = torch.arange(60) % 2 == 0

    def control() -> nn.Module:
        return attacks.overfitted(small, images, labels, members, like=config(), seed=1, description=None)

    def audit(facts: dict | None = None, given: bool = True, **options: Any) -> Any:
        networks = {"teacher": models(small, 1)[0], "student": models(resnet, 1)[0]}
        targets = {name: attacks.Target(net, **(facts or {}).get(name, {})) for name, net in networks.items()}
        known = (targets if given else None, shadows(), images, labels, members if given else None)
        return report("audit", *known, **options)

    yield "saved shadows", saved
    yield "overfitted", control
    yield "overfitted_recipe", lambda: attacks.overfitted_recipe(config())
    more = {"synthetic": images[:9].flip(1), "augment": "flip", "population": 0.3}
    facts = {"teacher": {"accuracy": 0.6}, "student": {"kind": "transfer"}}
    yield "audit", audit
    yield "audit, all", lambda: audit(facts, control=control(), **more)
    yield "audit of shadows", lambda: audit(given=False, targets="shadows", attacks=["lira", "loss"])
    yield "audit wrong", lambda: audit(attacks=["no"])
    for wrong in ({"num_models": 3}, {"seed": -1}, {"batched": "x"}, {"precision": "x"}):
        options = {"num_models": 4, "seed": 0, "config": config(), **wrong}
        yield f"train_shadows wrong {wrong}", lambda o=options: ensemble.train_shadows(small, images, labels, **o)
    for wrong in ({"epochs": 0}, {"learning_rate": -1.0}, {"label_smoothing": 1.0}):
        yield f"TrainConfig wrong {wrong}", lambda wrong=wrong: ensemble.TrainConfig(**wrong)
    yield "TrainConfig", ensemble.TrainConfig
    yield "History", ensemble.History


def unet(channels: int = 3, **change: Any) -> nn.Module:
    """A UNet of three classes and the null class."""
    import diffusers

    torch.manual_seed(0)
    options = {
        "sample_size": 8,
        "in_channels": channels,
        "out_channels": channels,
        "layers_per_block": 1,
        "block_out_channels": (16,),
        "down_block_types": ("DownBlock2D",),
        "up_block_types": ("UpBlock2D",),
        "norm_num_groups": 4,
        "num_class_embeds": 4,
        "add_attention": False,
        **change,
    }
    return stirred(diffusers.UNet2DModel(**options))


def dit() -> nn.Module:
    """Two blocks of 2 heads; 3 classes and the null class."""
    import diffusers

    torch.manual_seed(0)
    options = {"num_attention_heads": 2, "attention_head_dim": 8, "in_channels": 3, "num_layers": 2, "sample_size": 8}
    return stirred(diffusers.DiTTransformer2DModel(**options, num_embeds_ada_norm=3))


def stirred(model: nn.Module) -> nn.Module:
    """Zeros and ones would hide a weight that is not read."""
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return model.eval()


def solver(name: str = "DDIMScheduler", **options: Any) -> Any:
    import diffusers

    return getattr(diffusers, name)(**options)


def synthesis(folder: Path) -> Cases:
    """Label plans, samplers of every solver, data sets in every format, optimized networks."""
    ids = torch.tensor([0, 1, 6, 2**33 + 1, 40])
    kind = get("kr_fast", "LabelPlan")
    plans = {
        "balanced": lambda: kind.balanced(num_classes=3, count=70),
        "counts": lambda: kind.counts([3, 0, 2]),
        "explicit": lambda: kind.explicit(integers(3, 41)),
        "wrong": lambda: kind.balanced(num_classes=0),
    }
    for name, plan in plans.items():
        yield f"LabelPlan {name}", lambda p=plan: [p().labels(ids[ids < 41]), p().describe(), repr(p())]
    network, labels = unet(), torch.tensor([0, 2, 1, 1, 0])

    def sampler(scheduler: Any = None, net: Any = network, steps: int = 3, **options: Any) -> Any:
        return kr.Sampler(net, scheduler or solver(**MILD), steps, **{"seed": 7, "micro_batch": 4, **options})

    for name, variants in SOLVERS.items():
        for k, options in enumerate(variants):
            for quality in ("exact", "fused"):

                def images(n=name, o=options, q=quality, **more: Any) -> Any:
                    return sampler(solver(n, **o), quality=q, **more)(ids, labels)

                yield f"Sampler {name} {k} {quality}", images
            guided = {"guidance_scale": 2.0, "num_classes": 3}
            yield f"Sampler {name} {k} guided", lambda images=images, guided=guided: images(**guided)
    changes = {
        "fast": {"quality": "fast"},
        "scale": {"noise_scale": 1.3},
        "crop": {"crop": (6, 5)},
        "eta": {"eta": 0.5},
        "interval": {**guided, "guidance_interval": (0.2, 0.8)},
        "batch": {"micro_batch": 8},
        "dit": {"net": dit()},
        "guided dit": {"net": dit(), "guidance_scale": 2.0},
        "wrong quality": {"quality": "x"},
        "wrong seed": {"seed": -1},
        "no null class": {**guided, "num_classes": 4},
        "wrong steps": {"steps": 0},
        "wrong scale": {"noise_scale": 0},
    }
    for name, options in changes.items():
        yield f"Sampler {name}", lambda o=options: [sampler(**o)(ids, labels), sampler(**o).describe()]
    plan = plans["balanced"]
    yield "Sampler stream", lambda: list(sampler().stream(plan(), range(3, 12)))
    for name, pair in {"ids": (-ids, labels), "labels": (ids, labels + 3), "length": (ids, labels[1:])}.items():
        yield f"Sampler wrong {name}", lambda pair=pair: sampler()(*pair)
    for form in ("npy", "npz", "webdataset", "parquet", "no"):

        def written(form=form) -> Any:
            result = kr.synthesize(sampler(), plan(), folder / "sets" / form, count=21, format=form, shard_size=8)
            shards = sorted((folder / "sets" / form).glob("shard-*"))
            return [result.images, result.shards, result.written, {path.name: path.read_bytes() for path in shards}]

        yield f"synthesize {form}", written

    def held() -> Any:
        result = kr.DeviceShards(sampler(), plan(), ids=range(5, 30), shard_size=8, capacity=2)
        return [list(result), result[torch.tensor([5, 29, 12, 5])], result.held, len(result)]

    yield "DeviceShards", held
    yield (
        "synthesize device",
        lambda: list(kr.synthesize(sampler(), plan(), None, count=21, format="device", shard_size=8)),
    )
    with_attention = {
        "block_out_channels": (16, 32),
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
        "norm_num_groups": 8,
        "add_attention": True,
    }
    for name, model in {"unet": network, "attention": unet(**with_attention), "dit": dit()}.items():
        for dtype in (torch.float32, torch.bfloat16):

            def faster(model=model, dtype=dtype) -> Any:
                model = copy.deepcopy(model).to(dtype)
                given = normal(3, 3, 8, 8, dtype=dtype), torch.full((3,), 37), torch.tensor([0, 2, 1])
                with torch.inference_mode():
                    plain = model(given[0], given[1], class_labels=given[2]).sample
                    with kr.optimize(model):
                        ours = model(given[0], given[1], class_labels=given[2]).sample
                    return plain, ours, model(given[0], given[1], class_labels=given[2]).sample

            yield f"optimize {name} {dtype}", faster
    yield "optimize wrong", lambda: kr.optimize(nn.Linear(2, 2))
    yield "RecycleConfig", kr.RecycleConfig
    for wrong in ({"seed": -1}, {"num_shadows": 3}, {"teacher_arch": "x"}, {"out": ""}, {"soft_weight": 0.0}):
        yield f"RecycleConfig wrong {wrong}", lambda wrong=wrong: kr.RecycleConfig(**wrong)
    yield (
        "recycle wrong",
        lambda: kr.recycle(kr.RecycleConfig(out=str(folder / "run"), data=str(folder / "absent.npz"))),
    )
