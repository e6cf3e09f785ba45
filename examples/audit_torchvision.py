"""How much does a torchvision classifier leak of its training images? (needs ``pip install torchvision``)

    python examples/audit_torchvision.py

Put your images (uint8 [N, H, W, C]), their labels and your trained model in place of the first lines of ``main``. The
shadow models are trained as yours was: give your recipe, the number of epochs above all. A model that was shown other
than ``x / 127.5 - 1``, as with torchvision's weights, is given as ``kr_fast.ModelArray([model], normalize=(mean,
std))``. A release deserves 64 shadows and a positive control (``kr_fast.membership.overfitted``), see
docs/tasks/audit.md.
"""

import argparse
import functools

import torch
import torchvision

import kr_fast
from kr_fast.data import Split, load_uncut
from kr_fast.ensemble import TrainConfig, fit


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=400)
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--shadows", type=int, default=8)
    parser.add_argument("--out", default="runs/audit_torchvision")
    arguments = parser.parse_args()

    digits = load_uncut("digits")[2]["all"]
    images, labels = digits.images[: arguments.images].repeat(1, 1, 1, 3), digits.labels[: arguments.images]
    members = torch.arange(len(images)) % 2 == 0  # the images that the model is trained on
    make = functools.partial(torchvision.models.resnet18, num_classes=10)
    recipe = TrainConfig(epochs=arguments.epochs)
    model = make()
    fit(model, Split(images[members], labels[members]), recipe, seed=0)  # or your own training

    shadows = kr_fast.train_shadows(make, images, labels, num_models=arguments.shadows, config=recipe, seed=1)
    report = kr_fast.audit(model, shadows, images, labels, members)
    report.write(arguments.out)
    print("\n".join([report.verdict["decision"], *report.verdict["reasons"]]))
    print(f"report: {arguments.out}/release/audit.html")


if __name__ == "__main__":
    main()
