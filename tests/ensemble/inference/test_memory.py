"""Peak memory of signals and logits: within 1.2x of weights, one chunk of activations a thread, and the output.

Measured in a process of its own as the kernel's high-water mark, from the point where models and images exist. Weights
count once: they are the models' own.
"""

import subprocess
import sys

import pytest

CHILD = """
import copy, ctypes, gc, sys
import torch
from torch import nn
import kr_fast

case, path, threads = sys.argv[1], sys.argv[2] or None, int(sys.argv[3])
torch.set_num_threads(threads)
torch.manual_seed(0)

def status(key):
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(key))

def weights():  # 1.2 million numbers at little work
    return nn.Sequential(nn.Conv2d(3, 256, 3, 4), nn.ReLU(), nn.Conv2d(256, 256, 3, 2), nn.ReLU(),
                         nn.Conv2d(256, 256, 3, 1, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(256, 10))

class Wide(nn.Module):  # three maps of 1 MiB an image live at the sum
    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 256, 1), nn.Conv2d(256, 256, 1), nn.Conv2d(256, 256, 1)
        self.head = nn.Linear(256, 10)

    def forward(self, x):
        x = torch.relu(self.a(x))
        return self.head((self.c(torch.relu(self.b(x))) + x).mean((2, 3)))

def output():
    return nn.Sequential(nn.Conv2d(3, 8, 3, 4), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 1000))

make, count, images, chunk, classes = {
    "weights": (weights, 96, 64, None, 10),
    "activations": (Wide, 2, 128, 64, 10),
    "output": (output, 4, 16384, None, 1000),
}[case]
small = kr_fast.ModelArray([make()])  # what the first call of a process costs once is not counted
small.signals(torch.zeros(40, 32, 32, 3, dtype=torch.uint8), torch.zeros(40, dtype=torch.long))
first = make()
models = [copy.deepcopy(first) for _ in range(count)]  # each in its own memory, at less work than random numbers
held = sum(value.numel() * 4 for model in models for value in model.parameters())
data, labels = torch.randint(0, 256, (images, 32, 32, 3), dtype=torch.uint8), torch.arange(images) % classes
del small, first
gc.collect()
ctypes.CDLL("libc.so.6").malloc_trim(0)
with open("/proc/self/clear_refs", "w") as file:
    file.write("5")  # the high-water mark starts here
before = status("VmHWM")
array = kr_fast.ModelArray(models, chunk=chunk)
if case == "output":
    found = array(data)
else:
    found = array.signals(data, labels, augment="flip", path=path)["phi"]
grown = status("VmHWM") - before
(program,) = array.runners.values()
out = 0 if path else found.numel() * 4
bound = held + program.bytes_per_image * program.chunk * threads + out
print((held + grown) / bound, held >> 20, grown >> 20, bound >> 20)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads the high-water mark from /proc")
@pytest.mark.parametrize(
    ("case", "threads"),
    [("weights", 2), ("weights to files", 2), ("activations", 1), ("activations", 2), ("output", 2)],
)
def test_peak_memory(tmp_path, case, threads):
    """Of one thread where activations are most of the bound, which grows by them alone with the threads."""
    case, _, files = case.partition(" to ")
    arguments = [sys.executable, "-c", CHILD, case, str(tmp_path) if files else "", str(threads)]
    told = subprocess.run(arguments, capture_output=True, text=True, check=True).stdout.split()
    ratio, held, grown, bound = map(float, told)
    assert bound > 90  # MiB: beside which the heap's own rests are small
    assert ratio <= 1.2, (held, grown, bound)
