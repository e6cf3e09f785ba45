"""The networks of the pipeline: small classifiers, and diffusers' UNet in sizes for 8 to 224 px."""

from kr_fast.models.resnet import CLASSIFIERS, ResNet, classifier
from kr_fast.models.student import Student, load_student
from kr_fast.models.unet import most_levels, padded_size, unet

__all__ = ["CLASSIFIERS", "ResNet", "Student", "classifier", "load_student", "most_levels", "padded_size", "unet"]
