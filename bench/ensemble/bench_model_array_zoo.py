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

import kr_fast
from kr_fast.benchmarks.cases.models import models_of
from kr_fast.data import to_float
from kr_fast.runtime.errors import first_line

MODELS, IMAGES, ROUNDS, BATCHES = 3, 256, 4, (64, 256)
TORCHVISION = [
    "resnet18",
    "mobilenet_v2",
    "mobilenet_v3_small",
    "efficientnet_b0",
    "regnet_y_400mf",
    "densenet121",
    "squeezenet1_1",
    "shufflenet_v2_x1_0",
    "convnext_tiny",
    "vgg11_bn",
    "googlenet",
    "mnasnet0_5",
    "swin_t",
    "resnext50_32x4d",
]
TIMM = [
    "efficientnet_lite0",
    "mixer_s16_224",
    "vit_tiny_patch16_224",
    "deit_tiny_patch16_224",
    "swin_tiny_patch4_window7_224",
    "mobilenetv2_100",
    "mobilenetv3_small_050",
    "resnet10t",
    "resnetv2_18",
    "ghostnet_050",
    "regnety_002",
    "rexnet_100",
    "hrnet_w18_small",
    "lcnet_050",
    "fasternet_t0",
    "edgenext_xx_small",
    "efficientformerv2_s0",
    "repvit_m0_9",
    "starnet_s050",
    "inception_next_atto",
    "convnext_atto",
    "poolformer_s12",
    "pvt_v2_b0",
    "levit_128s",
    "xcit_nano_12_p16_224",
    "cait_xxs24_224",
    "gmlp_ti16_224",
    "resmlp_12_224",
    "dla46_c",
    "res2net50_14w_8s",
    "resnest14d",
    "ese_vovnet19b_slim",
    "mambaout_femto",
    "coat_tiny",
    "davit_tiny",
    "convit_tiny",
    "efficientvit_b0",
    "mobilevit_xxs",
    "vgg11",
    "tiny_vit_5m_224",
    "nest_tiny",
    "dm_nfnet_f0",
    "twins_svt_small",
    "eva02_tiny_patch14_224",
]
NETWORKS = [*(f"torchvision/{name}" for name in TORCHVISION), *(f"timm/{name}" for name in TIMM)]
OPTIONS = {"googlenet": {"aux_logits": False, "init_weights": False}}


@functools.cache
def library(name):
    """The module with the networks, or why there is none."""
    try:
        return __import__(name, fromlist=["models"])
    except (ImportError, RuntimeError) as error:  # torchvision of another torch fails as it is imported
        return f"{name} cannot be imported: {first_line(error)}"


def make(network, size):
    kind, name = network.split("/")
    if kind == "torchvision":
        return getattr(library(kind).models, name)(num_classes=10, **OPTIONS.get(name, {}))
    create = functools.partial(library(kind).create_model, name, num_classes=10)
    try:
        return create(img_size=size)
    except TypeError:  # it takes images of any size
        return create()


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
    models = models_of(functools.partial(make, network, size), MODELS)
    images = torch.randint(
        0, 256, (IMAGES, size, size, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )
    try:
        expected = loop(models, images, BATCHES[0])
    except RuntimeError as error:
        pytest.skip(f"it takes no images of {size} px: {first_line(error)}")
    array = kr_fast.ModelArray(models)
    with caplog.at_level(logging.WARNING, "kr_fast"):
        first = times(array, images)[0]
    error = float((array(images) - expected).abs().max() / (1e-6 + expected.abs().max()))
    assert error < 1e-3
    benchmark.group = f"{network} {size} px {threads} threads"
    taken = {batch: [] for batch in BATCHES}
    own = []

    def round_of_all():
        own.append(times(array, images))
        for batch in BATCHES:
            taken[batch].append(times(loop, models, images, batch))

    benchmark.pedantic(round_of_all, rounds=ROUNDS)
    walls = {batch: min(each[0] for each in result) for batch, result in taken.items()}
    cpus = {batch: min(each[1] for each in result) for batch, result in taken.items()}
    wall, cpu = min(each[0] for each in own), min(each[1] for each in own)
    ratios = {"ratio": min(walls.values()) / wall, "cpu_ratio": min(cpus.values()) / cpu}
    own_forward = [record.getMessage() for record in caplog.records]
    benchmark.extra_info.update(ratios, seconds=wall, loop_seconds=walls, first_call_seconds=first, error=error)
    benchmark.extra_info["own_forward"] = own_forward
