"""Draw from an existing diffusers pipeline by ``optimize`` and ``Sampler``: the same network, faster, and by image id.

python examples/speed_up_pipeline.py                     # an untrained network, to see the time
python examples/speed_up_pipeline.py path/to/pipeline    # your DDPMPipeline or DDIMPipeline, as diffusers saved it

These pipelines know no classes. A network that has some is sampled by its labels in the same way, with ``num_classes``
of ``Sampler`` for guidance; ``kr-fast synthesize --model`` writes its images.
"""

import argparse
import time

import diffusers
import torch

import kr_fast


def untrained() -> diffusers.DDIMPipeline:
    unet = diffusers.UNet2DModel(
        sample_size=16,
        in_channels=1,
        out_channels=1,
        block_out_channels=(32, 64),
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    )
    return diffusers.DDIMPipeline(unet, diffusers.DDIMScheduler())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pipeline", nargs="?", help="folder of a pipeline of a UNet2DModel without classes")
    parser.add_argument("--count", type=int, default=128)
    parser.add_argument("--steps", type=int, default=10)
    arguments = parser.parse_args()
    count, steps = arguments.count, arguments.steps

    torch.manual_seed(0)
    where = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")
    pipeline = untrained()
    if arguments.pipeline:
        pipeline = diffusers.DiffusionPipeline.from_pretrained(arguments.pipeline, local_files_only=True)
    pipeline = pipeline.to(where)
    pipeline.set_progress_bar_config(disable=True)

    pipeline(batch_size=count, num_inference_steps=1)  # warm-up
    begun = time.perf_counter()
    pipeline(batch_size=count, num_inference_steps=steps, output_type="np")
    before = time.perf_counter() - begun

    with kr_fast.optimize(pipeline.unet):  # undone at the end of the block; the pipeline itself can also be called here
        sampler = kr_fast.Sampler(pipeline.unet, pipeline.scheduler, steps, seed=7, micro_batch=count)
        ids = torch.arange(count)  # an image is a function of its id: any batch, any order, any process
        labels = torch.zeros_like(ids)  # the network has no classes
        sampler(ids, labels)  # warm-up; on a GPU each step is captured as a CUDA graph
        begun = time.perf_counter()
        images = sampler(ids, labels).cpu()  # uint8 [count, H, W, C]
        after = time.perf_counter() - begun
        assert torch.equal(sampler(ids[3:5], labels[3:5]).cpu(), images[3:5])

    shape, name = list(images.shape[1:]), type(pipeline).__name__
    print(f"{count} images {shape}, {steps} steps: {before:.2f} s by {name}, {after:.2f} s by kr_fast")


if __name__ == "__main__":
    main()
