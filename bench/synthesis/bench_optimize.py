"""An optimized network in a DDIM loop against the same loop in diffusers.

Every provider runs ``STEPS`` network calls and solver steps by :class:`kr_fast.Sampler` from the same noise. ``nchw``
and ``nhwc`` are diffusers as it is, in either layout; ``compile`` is torch.compile of the better one. The share of the
time in convolutions, which are torch's in all of them, goes to extra_info: it is the limit.
"""

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

import kr_fast
from kr_fast.models import unet

diffusers = pytest.importorskip("diffusers")

STEPS = 4
THREADS = 2


def digits():
    return unet(8, 8, 1, 10, widths=(32, 64)), 256


def small():
    return unet(28, 28, 1, 10, widths=(32, 64, 64)), 64


def documented():
    """28 px, two layers a block, diffusers' defaults: 32 groups, heads of 8 channels."""
    model = diffusers.UNet2DModel(
        sample_size=28,
        in_channels=1,
        out_channels=1,
        layers_per_block=2,
        block_out_channels=(32, 64, 64),
        down_block_types=("DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
        num_class_embeds=11,
    )
    return model, 64


@pytest.mark.parametrize("provider", ["kr_fast", "nchw", "nhwc", "compile"])
@pytest.mark.parametrize("make", [digits, small, documented], ids=lambda make: make.__name__)
def test_sampling(benchmark, make, provider):
    benchmark.group = f"sampling {make.__name__} {THREADS} threads"
    torch.manual_seed(0)
    model, batch = make()
    model.eval()
    ids = torch.arange(batch)

    def sampler():
        return kr_fast.Sampler(
            model,
            diffusers.DDIMScheduler(clip_sample=True),
            STEPS,
            seed=1,
            micro_batch=batch,
            image_shape=(1, *model.config.sample_size) if isinstance(model.config.sample_size, (list, tuple)) else None,
        )

    before = torch.get_num_threads()
    torch.set_num_threads(THREADS)
    want = sampler()(ids, ids % 10)
    if provider == "kr_fast":
        kr_fast.optimize(model)
    elif provider != "nchw":
        model.to(memory_format=torch.channels_last)
    if provider == "compile":
        torch._dynamo.reset()
        model.forward = torch.compile(model.forward, dynamic=False)
    run = sampler()
    error = int((run(ids, ids % 10).int() - want.int()).abs().max())
    assert error <= 1  # of 255: rounding
    try:
        benchmark.pedantic(run, args=(ids, ids % 10), rounds=5, warmup_rounds=1)
        with profile(activities=[ProfilerActivity.CPU]) as watch:
            run(ids, ids % 10)
    finally:
        torch.set_num_threads(before)
    own = {event.key: event.self_cpu_time_total for event in watch.key_averages()}
    share = sum(time for name, time in own.items() if "convolution" in name) / sum(own.values())
    benchmark.extra_info.update(error=error, convolution_share=share)
    if benchmark.stats:  # not under --benchmark-disable
        benchmark.extra_info.update(images_times_steps_per_second=batch * STEPS / benchmark.stats.stats.min)
