"""Train on a synthetic set that lies in files: with Hugging Face's ``datasets``, and with WebDataset.

    kr-fast synthesize --model runs/digits --format parquet --out sets/parquet
    kr-fast synthesize --model runs/digits --format webdataset --out sets/tar
    python examples/read_synthetic_set.py sets/parquet sets/tar

Without folders an untrained network draws a small set first. ``pip install datasets webdataset``.
"""

import argparse
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import datasets
import diffusers
import numpy as np
import torch
import webdataset
from torch import Tensor
from torch.utils.data import DataLoader

import kr_fast
from kr_fast.models import classifier


def as_tensor(image: Any) -> Tensor:
    """A PIL image as float32 [C, H, W] in [-1, 1]."""
    pixels = np.array(image)
    return torch.from_numpy(pixels.reshape(*pixels.shape[:2], -1)).permute(2, 0, 1).float() / 127.5 - 1


def by_datasets(folder: Path, cache: str) -> Iterable[tuple[Tensor, Tensor]]:
    files = sorted(map(str, folder.glob("*.parquet")))
    rows = datasets.load_dataset("parquet", data_files=files, split="train", cache_dir=cache).shuffle(seed=0)
    rows = rows.with_transform(lambda some: {**some, "image": [as_tensor(each) for each in some["image"]]})
    return ((batch["image"], batch["label"]) for batch in DataLoader(rows, batch_size=64))


def by_webdataset(folder: Path) -> Iterable[tuple[Tensor, Tensor]]:
    files = sorted(map(str, folder.glob("*.tar")))
    rows = webdataset.WebDataset(files, shardshuffle=100, seed=0).shuffle(1000).decode("pil").to_tuple("png", "cls")
    return DataLoader(rows.map_tuple(as_tensor, int), batch_size=64)  # give it num_workers and as many shards


def one_epoch(name: str, batches: Iterable[tuple[Tensor, Tensor]], classes: int) -> None:
    torch.manual_seed(0)
    seen, total = 0, 0.0
    for images, labels in batches:
        if not seen:
            model = classifier("resnet8", num_classes=classes, in_channels=images.shape[1], width=16)
            optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        loss = torch.nn.functional.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        seen, total = seen + len(images), total + len(images) * float(loss.detach())
    print(f"{name}: {seen} images, mean loss {total / seen:.3f}")


def draw(parquet: Path, tar: Path, count: int) -> None:
    torch.manual_seed(0)
    blocks = {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2, "norm_num_groups": 8}
    sizes = {"sample_size": 8, "in_channels": 1, "out_channels": 1, "block_out_channels": (8, 16)}
    unet = diffusers.UNet2DModel(num_class_embeds=10, **sizes, **blocks)
    sampler = kr_fast.Sampler(unet, diffusers.DDIMScheduler(), 4, seed=7, micro_batch=128)
    plan = kr_fast.LabelPlan.balanced(num_classes=10)
    for out, format in ((parquet, "parquet"), (tar, "webdataset")):
        kr_fast.synthesize(sampler, plan, out, count=count, format=format, shard_size=128)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parquet", nargs="?", type=Path, help="folder of a set in the format parquet")
    parser.add_argument("tar", nargs="?", type=Path, help="folder of the same set in the format webdataset")
    parser.add_argument("--count", type=int, default=512, help="images of the set that is drawn without folders")
    parser.add_argument("--classes", type=int, default=10, help="classes of the set")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        parquet, tar = arguments.parquet or Path(folder, "parquet"), arguments.tar or Path(folder, "tar")
        if not (arguments.parquet and arguments.tar):
            draw(parquet, tar, arguments.count)
        one_epoch("datasets", by_datasets(parquet, str(Path(folder, "cache"))), arguments.classes)
        one_epoch("WebDataset", by_webdataset(tar), arguments.classes)


if __name__ == "__main__":
    main()
