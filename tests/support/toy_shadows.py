"""Four shadow models, trained at once by as many processes as run this script: ``toy_shadows.py OUT``."""

import functools
import sys

import torch

from kr_fast.data import Augment
from kr_fast.ensemble import TrainConfig, train_shadows
from kr_fast.models import classifier


def main(out):
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(1)
    images = torch.randint(0, 256, (61, 8, 8, 1), generator=generator, dtype=torch.uint8)
    labels = torch.randint(0, 3, (61,), generator=generator)
    make = functools.partial(classifier, "resnet8", num_classes=3, in_channels=1, width=4)
    config = TrainConfig(epochs=2, batch_size=8, learning_rate=0.05, augment=Augment(shift=1, flip=True))
    result = train_shadows(make, images, labels, num_models=4, config=config, seed=9, out=out, batched=True)
    print(f"models {len(result.array)}\n", end="", flush=True)  # in one piece


if __name__ == "__main__":
    main(sys.argv[1])
