"""Distil a teacher into a smaller student with Accelerate, on any number of processes and devices.

    python examples/distill_accelerate.py
    accelerate launch --mixed_precision bf16 examples/distill_accelerate.py

Replace ``kr_fast.data.load("digits")`` and the two networks by your own.
"""

import argparse

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import kr_fast
from kr_fast.data import Split, load, to_float


def network(width: int) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, width, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(width, 2 * width, 3, padding=1), nn.ReLU(), nn.Flatten(),
        nn.Linear(2 * width * 16, 10),
    )  # fmt: skip


def batches(split: Split, shuffle: bool) -> DataLoader[tuple[Tensor, ...]]:
    return DataLoader(TensorDataset(to_float(split.images), split.labels), 64, shuffle=shuffle)


@torch.no_grad()
def accuracy(accelerator: Accelerator, model: nn.Module, loader: DataLoader[tuple[Tensor, ...]]) -> float:
    model.eval()
    right = [accelerator.gather_for_metrics(model(images).argmax(1) == labels) for images, labels in loader]
    return float(torch.cat(right).float().mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--temperature", type=float, default=4.0)
    arguments = parser.parse_args()

    accelerator = Accelerator()
    torch.manual_seed(0)
    digits = load("digits")
    train, test = accelerator.prepare(batches(digits.train, True), batches(digits.test, False))

    def fit(model: nn.Module, teacher: nn.Module | None) -> nn.Module:
        model, optimizer = accelerator.prepare(model, torch.optim.AdamW(model.parameters(), lr=3e-3))
        for _ in range(arguments.epochs):
            model.train()
            for images, labels in train:
                if teacher is None:
                    loss = nn.functional.cross_entropy(model(images), labels)
                else:
                    with torch.no_grad():
                        soft = teacher(images)
                    # Raw logits of any precision go in: no softmax, no division by the temperature, no cast.
                    loss = kr_fast.distillation_loss(
                        model(images), soft, labels, temperature=arguments.temperature, soft_weight=0.9, hard_weight=0.1
                    )
                optimizer.zero_grad()
                accelerator.backward(loss)
                optimizer.step()
        return model

    teacher = fit(network(32), None).eval()
    student = fit(network(4), teacher)
    for name, model in (("teacher", teacher), ("student", student)):
        accelerator.print(f"{name}: test accuracy {accuracy(accelerator, model, test):.3f}")


if __name__ == "__main__":
    main()
