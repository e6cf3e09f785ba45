"""Small fixed calls of every op, for golden.py: each public function with its options, arguments by keyword.

Nothing here imports an op from where it lies: :func:`find` looks its module up by name.
"""

import itertools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from golden_cases.base import find, integers, normal
from torch import Tensor

REDUCTIONS = ("mean", "sum", "none")
SIGNALS = ("phi", "loss", "entropy", "modified_entropy", "confidence", "correct")
MODEL = ("relu", "swish", "sigmoid", "tanh", ("hardtanh", (-0.5, 0.7), ""), ("leaky_relu", (0.1,), ""))


class Call(NamedTuple):
    """``function`` (a public name, or a callable) of each of ``arguments``; those named in ``grads`` get gradients."""

    op: str
    variant: str
    function: str | Callable
    arguments: list[dict[str, Any]]
    grads: tuple[str, ...] = ()


def last(x: Tensor) -> Tensor:
    """In channels_last."""
    return x.contiguous(memory_format=torch.channels_last)


def calls(dtype: torch.dtype) -> Iterator[Call]:
    """Every call with inputs of ``dtype``; ops that know one dtype only are among those of float32 alone."""
    yield from losses(dtype)
    yield from networks(dtype)
    yield from sampling(dtype)
    yield from batched(dtype)
    if dtype in (torch.float32, torch.float64):
        yield from membership(dtype)


def losses(dtype: torch.dtype) -> Iterator[Call]:
    """The distillation losses, for few classes and for more than a vector register or two hold."""
    given = {}
    for classes in (3, 10, 129):
        z, t = (3 * normal(11, classes, seed=seed, dtype=dtype) for seed in (1, 2))
        y, weight = integers(classes, 11, seed=3), torch.linspace(0, 2, 11)
        gaps = torch.where(torch.arange(11) % 3 == 0, -100, y)
        hard = {"labels": y, "hard_weight": 0.3, "soft_weight": 0.7}
        whole = hard | {"labels": gaps, "label_smoothing": 0.1, "temperature": 4.0, "sample_weight": weight}
        options = {
            "plain": {},
            "hot": {"temperature": 4.0},
            "hard": hard,
            "smooth": hard | {"label_smoothing": 0.1},
            "gaps": hard | {"labels": gaps},
            "ignored": hard | {"ignore_index": 1},
            "weight": {"sample_weight": weight},
            "whole": whole,
        }
        wide = normal(11, classes + 5, seed=4, dtype=dtype)[:, 2:-3]  # rows apart, and not aligned
        ruled_out = torch.where(torch.arange(classes) == 1, -torch.inf, z)
        students = {"": z, " strided": wide, " -inf": ruled_out, " empty": z[:0]}
        targets = {"logits": t, "probs": t.softmax(1), "log_probs": t.log_softmax(1)}
        top = t.float().softmax(1).topk(min(4, classes - 1))
        for (name, chosen), reduction in itertools.product(options.items(), REDUCTIONS):

            def add(function: str, variant: str, name=name, **arguments: Any) -> None:
                given.setdefault((function, f"{variant} {name}"), []).append(arguments)

            more = {"reduction": reduction, **chosen}
            for kind, target in targets.items():
                add("distillation_loss", kind, input=z, target=target, target_type=kind, **more)
                if reduction != "none":
                    add("distillation_loss_and_grad", kind, input=z, target=target, target_type=kind, **more)
            add("distillation_loss", "standardize", input=z, target=t, standardize=True, **more)
            add("distillation_loss", "validated", input=z, target=t, validate_args=True, **more)
            for tail in ("smooth", "renorm"):
                both = {"values": top.values.to(dtype), "indices": top.indices}
                add("distillation_loss_topk", tail, input=z, **both, tail=tail, **more)
            if "labels" in chosen:
                dkd = {key: value for key, value in more.items() if key not in ("soft_weight", "label_smoothing")}
                add("dkd_loss", "default", input=z, target=t, **dkd)
                add("dkd_loss", "options", input=z, target=t, **dkd | {"alpha": 0.5, "beta": 2.0, "temperature": 2.0})
        for (name, student), reduction in itertools.product(students.items(), REDUCTIONS):
            count = len(student)
            more = {"labels": y[:count], "hard_weight": 0.5, "reduction": reduction}
            key = ("distillation_loss", f"student{name}")
            given.setdefault(key, []).append({"input": student, "target": t[:count], **more})
        for (kind, target), reduction in itertools.product(targets.items(), REDUCTIONS):
            for name, more in {"plain": {}, "options": {"temperature": 3.0, "sample_weight": weight}}.items():
                key = ("soft_cross_entropy", f"{kind} {name}")
                both = {"input": z, "target": target, "target_type": kind}
                given.setdefault(key, []).append({**both, **more, "reduction": reduction})
        for name, more in {"plain": {}, "labels": {"labels": gaps, "temperature": 2.0}}.items():
            given.setdefault(("distillation_metrics", name), []).append({"input": z, "target": t, **more})
    for (function, variant), arguments in given.items():
        grads = ("input",) if function.endswith(("loss", "topk", "entropy")) else ()
        op = "distillation_metrics" if function.endswith("metrics") else "distillation_loss"
        yield Call(op, f"{function} {variant}", function, arguments, grads)


def networks(dtype: torch.dtype) -> Iterator[Call]:
    """What stands in a network: norm, attention, convolution."""
    x, skip = last(normal(2, 16, 5, 4, dtype=dtype)), last(normal(2, 8, 5, 4, seed=1, dtype=dtype))
    weight, bias, shift = normal(24, seed=2), normal(24, seed=3), normal(2, 24, seed=4)
    plain = {"x": x, "groups": 4, "weight": weight[:16], "bias": bias[:16]}
    whole = {"x": x, "groups": 4, "weight": weight, "bias": bias, "shift": shift, "skip": skip}
    variants = {
        "plain": plain,
        "no weight": plain | {"weight": None, "bias": None},
        "norm": plain | {"activation": None},
        "one group": plain | {"groups": 1, "eps": 1e-3},
        "skip and shift": whole,
        "own dtype": whole | {"weight": weight.to(dtype), "bias": bias.to(dtype), "shift": shift.to(dtype)},
    }
    for name, arguments in variants.items():
        yield Call("group_norm_silu", name, "group_norm_silu", [arguments])
    for size in (8, 16, 32, 64, 12):
        qkv = [normal(2, tokens, 3 * 2 * size, seed=size, dtype=dtype) for tokens in (1, 9, 16)]
        yield Call("qkv_attention", f"head {size}", "qkv_attention", [{"qkv": each, "heads": 2} for each in qkv])
    for outputs, channels in ((5, 16), (40, 33)):
        x, filters = normal(2, channels, 7, 9, dtype=dtype), normal(outputs, channels, 3, 3, seed=1)
        scale, bias = normal(outputs, seed=2, dtype=dtype), normal(outputs, seed=3, dtype=dtype)
        residual = {
            pool: last(normal(2, outputs, *size, dtype=dtype)) for pool, size in ((False, (7, 9)), (True, (3, 4)))
        }
        arguments = [
            {"activation": name, "pool": pool, "scale": scale, "bias": bias, "residual": residual[pool]}
            for name in (None, "relu", "gelu", "silu")
            for pool in (False, True)
        ]
        for arguments_ in [*arguments, {}]:
            arguments_ |= {"x": last(x), "outputs": outputs, "filters": filters}
        yield Call("winograd_conv2d", f"{channels} to {outputs}", winograd, arguments)
    pack = {"weight": filters.to(dtype), "scale": normal(40, seed=2, dtype=torch.float64)}
    kinds = [{"dtype": torch.float32}, {"dtype": torch.float64}, {"scale": None}]
    yield Call("winograd_conv2d", "pack", "winograd_pack", [pack | each for each in kinds])
    yield Call("winograd_pack", "plain", "winograd_pack", [pack])


def winograd(x: Tensor, filters: Tensor, outputs: int, **options: Any) -> Tensor:
    """winograd_conv2d with filters that are packed here."""
    weight = find("winograd_conv2d", "winograd_pack")(filters, dtype=x.dtype)
    return find("winograd_conv2d", "winograd_conv2d")(x, weight, outputs, **options)


def sampling(dtype: torch.dtype) -> Iterator[Call]:
    """Noise, solver steps, bytes and PNG."""
    ids = torch.tensor([0, 5, 2**33 + 1])
    for shape in (7, (3, 8, 8), (1, 5, 3)):
        more = {"ids": ids, "shape": shape, "dtype": dtype}
        arguments = [more | {"seed": seed, "stream": stream} for seed in (0, 2**62 + 3) for stream in (0, 9)]
        yield Call("philox_normal", f"{shape}", "philox_normal", arguments)
    x = 0.8 * normal(3, 3, 5, 7, dtype=dtype)
    bad = torch.where(x > 1.5, torch.nan, 9 * x)
    yield Call("pack_uint8", "layouts", "pack_uint8", [{"x": x}, {"x": last(x)}, {"x": bad}, {"x": x[:, :, ::2]}])
    if dtype == torch.float32:
        images = [integers(256, 2, 5, 7, channels, dtype=torch.uint8) for channels in (1, 2, 3, 4)]
        images.append(integers(256, 1, 200, 150, 3, dtype=torch.uint8))  # more than one stored block
        yield Call("encode_png", "channels", "encode_png", [{"images": each} for each in images])
    sample = normal(3, 3, 4, 5, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    m, u = normal(3, 3, 4, 5, seed=1, dtype=dtype), normal(3, 3, 4, 5, seed=2, dtype=dtype)
    held = tuple(normal(3, 3, 4, 5, seed=3 + k, dtype=sample.dtype) for k in range(4))
    row = {"x0_sample": 1.1, "x0_model": -0.4, "clip": 1.0, "sample": 0.3, "model": 0.2, "x0": 0.6, "next_input": 0.7}
    keep = row | {"keep": (0.1, 0.2, 0.7), "noise": 0.5}
    start, noise = {"sample": sample, "model_output": m}, {"ids": ids, "seed": 7, "stream": 3}
    guided = {"uncond_output": u, "guidance_scale": 2.5}
    emitted = {"emit": ("sample", "kept", "input", "image")}
    variants = {
        "plain": {"row": row},
        "guided": {"row": row, **guided},
        "noise": {"row": row | {"noise": 0.5}, **noise},
        "history": {"row": row | {"history": (0.5, -0.2, 0.1, 0.3)}, "history": held},
        "threshold": {"row": row | {"quantile": 0.9, "clip": 1.5}, **guided},
        "emit": {"row": keep, **noise, **guided, **emitted},
        "emit kept": {"row": keep, **noise, "emit": ("kept",)},
        "emit halves": {"row": keep, **noise, "emit": ("input",), "input_dtype": torch.bfloat16, "copies": 2},
        "channels last": {"row": row, "model_output": last(m)},
    }
    for name, arguments in variants.items():
        yield Call("solver_step", name, step, [start | arguments])
    for name, more in {"plain": {}, "guided": guided, "threshold": {"quantile": 0.9, "clip": 1.5}}.items():
        first = keep | {key: more[key] for key in more if key in row or key == "quantile"}
        rows = [first, first | {"history": (0.4, -0.3)}]
        options = {key: more[key] for key in more if key in guided}
        yield Call("solver_step_at", name, steps, [{"rows": rows, **start, **noise, **options}])


def step(row: dict[str, Any], **arguments: Any) -> Any:
    """solver_step of a row's numbers, into new tensors and into given ones."""
    function, kind = find("solver_step", "solver_step"), find("solver_step", "SolverRow")
    made = function(row=kind(**row), **arguments)
    if isinstance(made, Tensor):
        return made
    into = type(made)(*(None if each is None else torch.zeros_like(each) for each in made))
    more = {key: value for key, value in arguments.items() if key not in ("emit", "input_dtype")}
    return made, function(row=kind(**row), out=into, **more)


def steps(rows: list[dict[str, Any]], sample: Tensor, model_output: Tensor, **arguments: Any) -> list[Tensor]:
    """Two steps of solver_step_at; the second reads what the first kept and its sample."""
    kind, table = find("solver_step", "SolverRow"), find("solver_step_at", "DeviceTable")
    made = table.build([kind(**row) for row in rows], [[], [(0, "kept"), (0, "sample")]], "cpu")
    samples, kept = made.ring_buffers(sample.shape)
    samples[0] = sample
    network, image = last(torch.zeros_like(sample)), torch.zeros(3, 4, 5, 3, dtype=torch.uint8)
    for i in range(len(rows)):
        find("solver_step_at", "solver_step_at")(
            made, torch.tensor([i]), samples, kept, model_output, input=network, image=image, **arguments
        )
    return [samples, kept, network, image]


def batched(dtype: torch.dtype) -> Iterator[Call]:
    """Ops over many models, with their gradients."""
    exact = torch.float64 if dtype == torch.float64 else torch.float32
    x, residual = normal(2, 3, 5, 4, 6, dtype=dtype), normal(2, 3, 5, 4, 6, seed=1, dtype=dtype)
    weight, bias = (normal(2, 6, seed=seed, dtype=exact) for seed in (2, 3))
    names = ("x", "weight", "bias", "residual")
    plain, affine = {"x": x}, {"x": x, "weight": weight, "bias": bias}
    both = affine | {"residual": residual, "relu": True, "eps": 1e-3}
    for name, arguments in {"plain": plain, "affine": affine, "residual and relu": both}.items():
        yield Call("model_batch_norm", name, "model_batch_norm", [arguments], names)
    geometry = {"stride": (2, 1), "padding": 1, "dilation": (1, 2)}
    for groups in (1, 2, 6):
        filters, more = normal(2, 12, 3, 3, 6 // groups, seed=groups, dtype=dtype), {"groups": groups}
        own = {"x": x, "weight": filters, "bias": normal(2, 12, seed=9, dtype=exact), **more, **geometry}
        yield Call("model_conv2d_backward", f"{groups} groups", "model_conv2d", [own], names)
        after = normal(2, 3, 3, 2, 12, seed=8, dtype=dtype)
        acts = [own | {"activation": each, "residual": after} for each in (*MODEL, "hardswish", ("gelu", (), "none"))]
        yield Call("model_conv2d", f"{groups} groups", "model_conv2d", acts)
        yield Call("model_conv2d", f"{groups} groups, shared", "model_conv2d", [own | {"x": x[:1]}])
        yield Call("model_conv2d", f"{groups} groups, view", viewed, [own | {"x": integers(256, 1, 3, 6, 7, 6)}])
    block = {"x": x, "bias1": bias, "bias2": weight}
    block |= {f"weight{k}": normal(2, 6, 3, 3, 6, seed=k, dtype=dtype) / 8 for k in (1, 2)}
    for name, more in {
        "plain": {},
        "no bias": {"bias1": None, "bias2": None},
        "sum": {"relu": False},
        "before": {"scale": weight, "shift": bias},
    }.items():
        yield Call("model_residual_block", name, "model_residual_block", [block | more])
    flat = {name: normal(3 * 6, seed=k, dtype=exact) for k, name in enumerate(("weight", "velocity", "grad"))}
    rates = {"rate": torch.tensor([0.1, 0.0, 0.3]).to(exact), "momentum": torch.tensor([0.9, 0.8, 0.0]).to(exact)}
    yield Call("model_sgd", "step", sgd, [flat | rates | {"sizes": [1, 2, 3], "decays": [0.0, 0.1, 0.01]}])


def viewed(x: Tensor, **arguments: Any) -> Tensor:
    """model_conv2d of uint8 images through a view."""
    index = [torch.tensor([0, 0, 1, 5, 3], dtype=torch.int32), torch.tensor([6, 2, 1, 1], dtype=torch.int32)]
    view = find("model_conv2d", "View")(*index, torch.full((6,), 0.01), torch.linspace(-1, 1, 6))
    return find("model_conv2d", "model_conv2d")(x=x.to(torch.uint8), view=view, **arguments)


def sgd(weight: Tensor, velocity: Tensor, **arguments: Any) -> tuple[Tensor, Tensor]:
    """model_sgd of copies."""
    weight, velocity = weight.clone(), velocity.clone()
    find("model_sgd", "model_sgd")(weight=weight, velocity=velocity, **arguments)
    return weight, velocity


def membership(dtype: torch.dtype) -> Iterator[Call]:
    """Attacks and statistics."""
    for models in (8, 13):
        phi = 2 * normal(2, 57, models, seed=models, dtype=dtype)
        phi[0, 3, 1], phi[1, 4, 2] = torch.inf, -torch.inf
        keep = normal(models, 57, seed=1).argsort(0) < models // 2
        given, target = {"phi": phi, "keep": keep}, {"target": normal(2, 57, 3, seed=2, dtype=dtype)}
        for variant, variance in itertools.product(
            ("online", "offline"), ("per_example", "fixed", "fixed_raw", "shrinkage")
        ):
            options = {"variant": variant, "variance": variance}
            yield Call("lira", f"{variant} {variance} {models}", "lira", [given | options, given | options | target])
        yield Call("attack_r", f"{models}", "attack_r", [given, given | target])
        values = {"values": phi[0], "members": keep.T.contiguous()}
        yield Call("best_threshold", f"{models}", "best_threshold", [values, values | {"leave_out": False}])
    x, z = normal(2, 40, dtype=dtype).exp(), normal(2, 30, seed=1, dtype=dtype).exp()
    for predicate, gamma in itertools.product(("ratio", "ratio_strict", "reciprocal"), (1.0, 2.0)):
        options = {"gamma": gamma, "predicate": predicate}
        arguments = [{"p_x": x, "p_z": z, **options}, {"p_x": x[0], "p_z": z[0], **options}]
        yield Call("rmia", f"{predicate} {gamma}", "rmia", arguments)
    scores, members = (3 * normal(200, dtype=dtype)).round(decimals=1), normal(200, seed=1) > 0.3
    yield Call("roc", "ties", "roc", [{"scores": scores, "members": members}])
    sides = {"inside": integers(4, 50, seed=1), "outside": integers(5, 50, seed=2), "limits": torch.tensor([0, 1, 10])}
    yield Call("bootstrap_auc", "seeds", "bootstrap_auc", [sides | {"replicates": 20, "seed": s} for s in (0, 2**63)])
    for classes in (2, 10, 129):
        wide = {"labels": integers(classes, 3, 7, seed=2), "want": SIGNALS}
        logits = [5 * normal(3, 7, classes, dtype=kind) for kind in (dtype, torch.bfloat16, torch.float16)]
        yield Call(
            "membership_signals", f"{classes}", "membership_signals", [{"logits": each, **wide} for each in logits]
        )
