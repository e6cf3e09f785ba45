"""The networks of the pipeline: small classifiers, and diffusers' UNet in sizes for 8 to 224 px."""

from kr_fast.models.resnet import CLASSIFIERS, ResNet, classifier
from kr_fast.models.unet import most_levels, padded_size, unet

__all__ = ["CLASSIFIERS", "ResNet", "classifier", "most_levels", "padded_size", "unet"]
