"""The memory of an image of Pillow, without a copy, for which Python's lock would be held."""

import ctypes
import math

import numpy as np
from PIL import Image


class _Array(ctypes.Structure):
    """``struct ArrowArray`` of Arrow's C data interface."""


_Array._fields_ = [
    *((name, ctypes.c_int64) for name in ("length", "null_count", "offset", "n_buffers", "n_children")),
    ("buffers", ctypes.POINTER(ctypes.c_void_p)),
    ("children", ctypes.POINTER(ctypes.POINTER(_Array))),
    *((name, ctypes.c_void_p) for name in ("dictionary", "release", "private_data")),
]
_of_capsule = ctypes.PYFUNCTYPE(ctypes.c_void_p, ctypes.py_object, ctypes.c_char_p)(
    ("PyCapsule_GetPointer", ctypes.pythonapi)
)
_of_address = ctypes.PYFUNCTYPE(ctypes.py_object, ctypes.c_void_p, ctypes.c_ssize_t, ctypes.c_int)(
    ("PyMemoryView_FromMemory", ctypes.pythonapi)
)
READ = 0x100  # PyBUF_READ


def view(image: Image.Image) -> tuple[np.ndarray, object]:
    """(uint8 ``[H, W, 1]`` of an image of mode L, ``[H, W, 3 or 4]`` of RGB, its owner: the pixels are there as long).

    Pillow keeps four bytes a pixel of colour, the last of which is none, and lends them from version 11.2 on where they
    lie in one block, as those of 4 million pixels do. Other images are copied.
    """
    height, width, count = image.height, image.width, math.prod(image.size) * (1 if image.mode == "L" else 4)
    try:
        if Image.core.get_alignment() != 1:  # rows may end in bytes that are no pixels
            raise ValueError
        _, owner = image.__arrow_c_array__()
    except (AttributeError, ValueError):  # an older Pillow; several blocks
        pixels = np.asarray(image)
        return pixels.reshape(height, width, -1), pixels
    array = _Array.from_address(_of_capsule(owner, b"arrow_array"))
    if array.n_children:
        array = array.children[0].contents  # of a list of 4 bytes for each pixel
    if array.length != count:
        raise ValueError(f"Pillow lends {array.length} bytes of an image of {count}")
    lent = _of_address(array.buffers[1] + array.offset, count, READ)
    return np.frombuffer(lent, np.uint8).reshape(height, width, -1), owner
