"""A Student's folder: the same answers as the network that was saved, without anything else, or one line of error."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

import kr_fast
from kr_fast.data import to_float
from kr_fast.models.student import Student, classifier, load_student, save_student
from kr_fast.runtime.errors import UserError

SHAPE, NAMES = (9, 8, 3), ("cat", "Ödem", "")  # sides that differ; a name that is no ASCII, an empty one


def saved(folder, shape=SHAPE, names=NAMES, width=5):
    """The network whose weights, and statistics of BatchNorm, are in the folder."""
    torch.manual_seed(0)
    network = classifier("resnet8", num_classes=len(names), in_channels=shape[2], width=width, image_size=max(shape))
    network(torch.randn(16, shape[2], *shape[:2]))
    state = network.state_dict()
    save_student(folder, state, architecture="resnet8", width=width, image_shape=shape, class_names=names)
    return network.eval()


def pixels(count, shape=SHAPE):
    return np.random.default_rng(1).integers(0, 256, (count, *shape), dtype=np.uint8)


@pytest.mark.parametrize("shape", [SHAPE, (65, 8, 1)], ids=str)  # above 64 px the stem halves the image
def test_logits_are_those_of_the_network(tmp_path, shape):
    network, images = saved(tmp_path, shape), pixels(7, shape)
    student = kr_fast.load_student(tmp_path)
    assert (student.class_names, student.image_shape) == (NAMES, shape)
    with torch.no_grad():
        expected = network(to_float(torch.from_numpy(images)))
        exact = network.double()(to_float(torch.from_numpy(images)).double()).softmax(1).numpy()
    logits = student.logits(images, batch_size=3)
    assert logits.dtype == np.float32
    assert np.abs(logits - expected.numpy()).max() <= 1e-6
    assert np.abs(student.predict(images) - exact).max() <= 1e-6
    tensor = student.predict(torch.from_numpy(images))
    assert isinstance(tensor, torch.Tensor)
    assert np.array_equal(tensor.numpy(), student.predict(images))


def test_views_grey_images_and_none(tmp_path):
    saved(tmp_path, (6, 7, 1))
    student, images = load_student(tmp_path), pixels(4, (6, 7, 1))
    expected = student.predict(images)
    assert np.array_equal(student.predict(images[..., 0]), expected)
    assert np.array_equal(student.predict(images[::-1]), expected[::-1])
    constant = images.copy()
    constant.flags.writeable = False
    assert np.array_equal(student.predict(constant), expected)
    assert student.predict(images[:0]).shape == (0, 3)
    assert student.train().predict(images).tolist() == expected.tolist()  # BatchNorm by its own statistics


WRONG = {
    "float": (pixels(2) / 255, r"got float64 \[2, 9, 8, 3\]"),
    "NCHW": (torch.zeros(2, 3, 9, 8, dtype=torch.uint8), r"got uint8 \[2, 3, 9, 8\]"),
    "another size": (np.zeros((2, 9, 9, 3), np.uint8), r"got uint8 \[2, 9, 9, 3\]"),
    "grey for colour": (np.zeros((2, 9, 8), np.uint8), r"got uint8 \[2, 9, 8\]"),
    "one image": (np.zeros(SHAPE, np.uint8), r"got uint8 \[9, 8, 3\]; images\[None\] is an array of one image"),
    "int64": (torch.zeros(2, *SHAPE, dtype=torch.int64), r"got int64 \[2, 9, 8, 3\]"),
    "PIL": (Image.new("L", (5, 4)), r"got a PIL image of 4 x 5 in mode L; np.asarray\(image\)\[None\] is an array of"),
    "a list": ([1, 2], "got list of 2"),
}


@pytest.mark.parametrize("case", WRONG)
def test_other_images_are_refused(case):
    value, words = WRONG[case]
    student = Student(torch.nn.Identity(), SHAPE, NAMES)
    rule = r"predict: images must be a uint8 array or tensor \[N, 9, 8, 3\], resized as the training images were, "
    with pytest.raises(UserError, match=rule + words):
        student.predict(value)


DAMAGE = {
    "no format": ({"format": "x"}, "be of the format 'kr_fast Student', got 'x'"),
    "later version": ({"version": 2}, r"be of version 1, got 2; this is kr-fast \d"),
    "no width": ({"width": None}, "hold width of type int, got None"),
    "bool": ({"width": True}, "hold width of type int, got True"),
    "architecture": ({"architecture": "vgg"}, "name one of resnet8, .*, got 'vgg'"),
    "shape": ({"image_shape": [9, 0]}, r"hold a width and an image_shape of three whole .*, got 5 and \[9, 0\]"),
    "overflow": ({"width": 1 << 40}, r"hold a width and an image_shape of .* in \[1, 1048576\], got 1099511627776 and"),
    "classes": ({"class_names": ["a"]}, r"hold the names of at least two classes, got \['a'\]"),
    "scale": ({"normalisation": {"divide_by": 0, "subtract": 1}}, "hold divide_by and subtract of normalisation"),
    "infinite": ({"normalisation": {"divide_by": float("inf"), "subtract": 1}}, "hold divide_by and subtract of norm"),
    "weights": ({"width": 10**5}, r"hold the weights of the resnet8 in config.json, got others \(size mismatch"),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_damaged_folders_are_named(tmp_path, case):
    changes, words = DAMAGE[case]
    saved(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | changes))
    with pytest.raises(UserError, match=f"load_student: {tmp_path}/.* must {words}"):
        load_student(tmp_path)


def test_no_student():
    with pytest.raises(UserError, match=r"folder must be the folder of a Student \(config.json and .*got /absent, whi"):
        load_student("/absent")


ALONE = """
import importlib.abc, sys
class Absent(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("diffusers", "accelerate", "scipy", "sklearn", "matplotlib", "PIL", "jinja2", "yaml"):
            raise ImportError(name)
sys.meta_path.insert(0, Absent())
import numpy, kr_fast
print(kr_fast.load_student(sys.argv[1]).predict(numpy.zeros((2, 9, 8, 3), numpy.uint8)).shape)
"""


def test_loads_on_a_machine_without_diffusers(tmp_path):
    saved(tmp_path)
    done = subprocess.run([sys.executable, "-c", ALONE, tmp_path], capture_output=True, text=True)
    assert done.stdout == "(2, 3)\n", done.stderr
