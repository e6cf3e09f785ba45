"""ModelArray against an eager loop on published networks.

Three models of random weights, 256 uint8 images, logits ``[M, N, C]``. The loop calls each model under inference_mode
on batches of BATCHES, of which the faster counts; both take turns, and the least time of each is compared. torchvision
and timm are no dependencies: networks of one that is not installed are skipped. ``ratio`` above 1: ModelArray is
faster; ``cpu_ratio`` is that of processor time, which other processes disturb less.
"""

import functools
import logging
import time

import pytest
import torch
from torch import nn

import kr_fast
from kr_fast.data import to_float

MODELS, IMAGES, ROUNDS, BATCHES = 3, 256, 4, (64, 256)
NETWORKS = [
    "torchvision/resnet18", "torchvision/mobilenet_v2", "torchvision/mobilenet_v3_small", "torchvision/efficientnet_b0",
    "torchvision/regnet_y_400mf", "torchvision/densenet121", "torchvision/squeezenet1_1",
    "torchvision/shufflenet_v2_x1_0", "torchvision/convnext_tiny", "torchvision/vgg11_bn", "torchvision/googlenet",
    "torchvision/mnasnet0_5", "torchvision/swin_t", "torchvision/resnext50_32x4d", "timm/efficientnet_lite0",
    "timm/mixer_s16_224", "timm/vit_tiny_patch16_224", "timm/deit_tiny_patch16_224",
    "timm/swin_tiny_patch4_window7_224", "timm/mobilenetv2_100", "timm/mobilenetv3_small_050", "timm/resnet10t",
    "timm/resnetv2_18", "timm/ghostnet_050", "timm/regnety_002", "timm/rexnet_100", "timm/hrnet_w18_small",
    "timm/lcnet_050", "timm/fasternet_t0",
    "timm/edgenext_xx_small", "timm/efficientformerv2_s0", "timm/repvit_m0_9", "timm/starnet_s050",
    "timm/inception_next_atto", "timm/convnext_atto", "timm/poolformer_s12", "timm/pvt_v2_b0", "timm/levit_128s",
    "timm/xcit_nano_12_p16_224", "timm/cait_xxs24_224", "timm/gmlp_ti16_224", "timm/resmlp_12_224", "timm/dla46_c",
    "timm/res2net50_14w_8s", "timm/resnest14d", "timm/ese_vovnet19b_slim", "timm/mambaout_femto", "timm/coat_tiny",
    "timm/davit_tiny", "timm/convit_tiny", "timm/efficientvit_b0", "timm/mobilevit_xxs", "timm/vgg11",
    "timm/tiny_vit_5m_224", "timm/nest_tiny", "timm/dm_nfnet_f0", "timm/twins_svt_small", "timm/eva02_tiny_patch14_224",
]  # fmt: skip
OPTIONS = {"googlenet": {"aux_logits": False, "init_weights": False}}


@functools.cache
def library(name):
    """The module with the networks, or why there is none."""
    try:
        return __import__(name, fromlist=["models"])
    except (ImportError, RuntimeError) as error:  # torchvision of another torch fails as it is imported
        return f"{name} cannot be imported: {str(error).splitlines()[0]}"


def models_of(network, size):
    kind, name = network.split("/")
    found = []
    for seed in range(MODELS):
        torch.manual_seed(seed)
        if kind == "torchvision":
            model = getattr(library(kind).models, name)(num_classes=10, **OPTIONS.get(name, {}))
        else:
            create = functools.partial(library(kind).create_model, name, num_classes=10)
            try:
                model = create(img_size=size)
            except TypeError:  # it takes images of any size
                model = create()
        with torch.no_grad():
            for part in model.modules():
                if isinstance(part, nn.modules.batchnorm._BatchNorm):
                    part.running_mean.normal_(0, 0.1)
                    part.running_var.uniform_(0.5, 1.5)
        found.append(model.eval())
    return found


@torch.inference_mode()
def loop(models, images, batch):
    x = to_float(images).contiguous()
    return torch.stack([torch.cat([model(part) for part in x.split(batch)]) for model in models])


def times(run, *arguments):
    """Wall time and processor time of a call."""
    wall, processor = time.perf_counter(), time.process_time()
    run(*arguments)
    return time.perf_counter() - wall, time.process_time() - processor


@pytest.mark.parametrize("size", [32, 64])
@pytest.mark.parametrize("network", NETWORKS)
def test_against_an_eager_loop(benchmark, threads, network, size, caplog):
    if isinstance(library(network.split("/")[0]), str):
        pytest.skip(library(network.split("/")[0]))
    models = models_of(network, size)
    images = torch.randint(
        0, 256, (IMAGES, size, size, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )
    try:
        wanted = loop(models, images, BATCHES[0])
    except RuntimeError as error:
        pytest.skip(f"it takes no images of {size} px: {str(error).splitlines()[0]}")
    array = kr_fast.ModelArray(models)
    with caplog.at_level(logging.WARNING, "kr_fast"):
        first = times(array, images)[0]
    error = float((array(images) - wanted).abs().max() / (1e-6 + wanted.abs().max()))
    assert error < 1e-3
    benchmark.group = f"{network} {size} px {threads} threads"
    taken = {batch: [] for batch in BATCHES}
    own = []

    def round_of_all():
        own.append(times(array, images))
        for batch in BATCHES:
            taken[batch].append(times(loop, models, images, batch))

    benchmark.pedantic(round_of_all, rounds=ROUNDS)
    walls = {batch: min(each[0] for each in found) for batch, found in taken.items()}
    cpus = {batch: min(each[1] for each in found) for batch, found in taken.items()}
    wall, cpu = min(each[0] for each in own), min(each[1] for each in own)
    benchmark.extra_info.update(
        ratio=min(walls.values()) / wall, cpu_ratio=min(cpus.values()) / cpu, seconds=wall, loop_seconds=walls,
        first_call_seconds=first, error=error, own_forward=[record.getMessage() for record in caplog.records],
    )  # fmt: skip
