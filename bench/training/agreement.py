"""How training by ``kr_fast.optimize(model, training=True)`` agrees with torch's: gradients, bits, curves.

    python bench/training/agreement.py [gradients] [bits] [curves]      # minutes; without arguments all three

``gradients``: of one step, the largest error of any parameter's gradient relative to float64, ours and torch's.
``bits``: whether 20 steps on one thread and on two give the same weights.
``curves``: the loss of 300 steps on the bundled digits from three seeds; in windows of 20 steps, the distance between
ours and torch's of one seed beside the distance between torch's of different seeds.
"""

import copy
import itertools
import sys

import torch
import torch.nn.functional as F

import kr_fast
from kr_fast.benchmarks.cases.training import NETWORKS as CASES
from kr_fast.benchmarks.cases.training import Step
from kr_fast.data import to_float
from kr_fast.data.sources import load
from kr_fast.models import classifier, unet
from kr_fast.training import SGD, AdamW

SEEDS, STEPS, WINDOW = (0, 1, 2), 300, 20


def dit():
    from diffusers import DiTTransformer2DModel

    options = {"num_attention_heads": 4, "attention_head_dim": 16, "in_channels": 1, "out_channels": 1, "num_layers": 4}
    model = DiTTransformer2DModel(**options, sample_size=8, patch_size=2, num_embeds_ada_norm=10, norm_num_groups=1)
    for block in model.transformer_blocks:  # which drops labels at random
        block.norm1.emb.class_embedder.dropout_prob = 0.0
    return model, (64, 1, 8, 8)


NETWORKS = {**CASES, "dit 8 px": dit}


def made(name):
    """The network with weights that hide no gradient, as zeros and ones of a new one would."""
    torch.manual_seed(0)
    model, shape = NETWORKS[name]()
    if model.__class__.__module__.startswith("diffusers."):
        for parameter in model.parameters():
            parameter.data += 0.05 * torch.randn_like(parameter)
    return model, shape


def gradients_of(run):
    run.optimizer.zero_grad()
    run.loss().backward()
    return {name: p.grad.double() for name, p in run.model.named_parameters() if p.grad is not None}


def print_gradients(name):
    model, shape = made(name)
    exact = Step(copy.deepcopy(model), shape, "eager_nchw")
    exact.model.double()
    exact.x, exact.target, exact.time = (each.double() for each in (exact.x, exact.target, exact.time))
    exact = gradients_of(exact)

    def error(provider):
        found = gradients_of(Step(copy.deepcopy(model), shape, provider))
        # A softmax does not change with the bias of its keys: that gradient is rounding, beside that of the queries.
        scales = {each: exact[each.replace("to_k.bias", "to_q.bias")].norm() for each in exact}
        errors = {each: float((found[each] - exact[each]).norm() / scales[each]) for each in exact}
        worst = max(errors, key=errors.get)
        return f"{errors[worst]:.1e} ({worst})"

    print(f"gradients  {name:22} kr_fast {error('kr_fast'):44} torch {error('eager_nhwc')}", flush=True)


def print_bits(name):
    model, shape = made(name)
    weights, first = [], []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        run = Step(copy.deepcopy(model), shape, "kr_fast")
        first.append(gradients_of(run))
        for _ in range(20):
            run()
        weights.append(dict(run.model.named_parameters()))
    torch.set_num_threads(1)
    different = [sum(not torch.equal(a[each], b[each]) for each in a) for a, b in (weights, first)]
    names = [each for each in first[0] if not torch.equal(first[0][each], first[1][each])]
    told = "the same" if not different[0] else f"{different[0]} of {len(weights[0])} tensors differ"
    told += f"; of the first gradient {different[1]}, {', '.join(names[:4])}" if names else ""
    print(f"bits       {name:22} {told}", flush=True)


def digits(seed):
    """x, class and step -> the batch of this step, of 64 or 128 real digits."""
    split = load("digits").train
    images = to_float(split.images)

    def batch(step, count):
        draw = torch.Generator().manual_seed(1_000_003 * seed + step)
        index = torch.randint(len(images), (count,), generator=draw)
        return images[index], split.labels[index], draw

    return batch


def losses_of(kind, seed, ours):
    torch.manual_seed(seed)
    batch = digits(seed)
    if kind == "resnet14 digits":
        model = classifier("resnet14", num_classes=10, in_channels=1, width=16, image_size=8)
        options = {"lr": 0.05, "momentum": 0.9, "weight_decay": 5e-4, "nesterov": True}
        make = SGD if ours else torch.optim.SGD
    else:
        model, options = unet(8, 8, 1, 10, widths=(32, 64)), {"lr": 1e-3}
        make = AdamW if ours else torch.optim.AdamW
    model.to(memory_format=torch.channels_last).train()
    if ours:
        kr_fast.optimize(model, training=True)
    optimizer, losses = make(model.parameters(), **options), []
    for step in range(STEPS):
        x, labels, draw = batch(step, 64 if kind == "resnet14 digits" else 128)
        if kind == "resnet14 digits":
            loss = F.cross_entropy(model(x.contiguous(memory_format=torch.channels_last)), labels)
        else:  # flow matching, as the generator
            noise, level = torch.randn(x.shape, generator=draw), torch.rand(len(x), generator=draw)
            noisy = torch.lerp(x, noise, level[:, None, None, None]).contiguous(memory_format=torch.channels_last)
            loss = F.mse_loss(model(noisy, level * 1000, class_labels=labels).sample, noise - x)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return torch.stack(losses).unflatten(0, (-1, WINDOW)).mean(1)


def print_curves(kind):
    torchs, ours = (torch.stack([losses_of(kind, seed, mine) for seed in SEEDS]) for mine in (False, True))
    own = (ours - torchs).abs()  # [seed, window]
    seeds = torch.stack([(torchs[a] - torchs[b]).abs() for a, b in itertools.combinations(range(len(SEEDS)), 2)])
    for window in (0, 1, 4, 9, 14):
        curves = " ".join(f"{a:.4f}/{b:.4f}" for a, b in zip(ours[:, window], torchs[:, window], strict=True))
        print(f"curves     {kind:22} steps {WINDOW * window + 1}-{WINDOW * (window + 1)}: ours/torch {curves}")
    low, high = torchs.min(0).values, torchs.max(0).values
    margin = (high - low).mean()
    inside = ((ours >= low - margin) & (ours <= high + margin)).float().mean()
    print(
        f"curves     {kind:22} distance of one seed, mean {own.mean():.5f} largest {own.max():.5f}; "
        f"between seeds, mean {seeds.mean():.5f} largest {seeds.max():.5f}; {inside:.0%} of ours within their spread",
        flush=True,
    )


def main(parts):
    for name in NETWORKS:
        for each, show in (("gradients", print_gradients), ("bits", print_bits)):
            if each in parts:
                try:
                    show(name)
                except BaseException as error:  # torchvision is not there
                    if type(error).__name__ != "Skipped":
                        raise
                    print(f"{each:10} {name:22} skipped: {error}")
    if "curves" in parts:
        for kind in ("resnet14 digits", "unet digits"):
            print_curves(kind)


if __name__ == "__main__":
    main(sys.argv[1:] or ["gradients", "bits", "curves"])
