"""A sampler that is quick and has weights, a solver and classes like any other; also for processes of their own.

``python toy_sampler.py OUT COUNT [name=value ...]`` writes a data set.
"""

import os
import signal
import sys

import torch

import kr_fast


class Net(torch.nn.Module):
    """Depends on pixels, time and class."""

    def __init__(self, channels: int = 3, classes: int = 7):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(3)
            self.conv = torch.nn.Conv2d(channels, channels, 3, padding=1)
            self.shift = torch.nn.Embedding(classes, channels)

    def forward(self, x, t, class_labels=None):
        return torch.tanh(self.conv(x)) + self.shift(class_labels)[:, :, None, None] + 1e-3 * t


class Watched(kr_fast.Sampler):
    """Calls ``before(number of batches so far)`` before each batch."""

    before = staticmethod(lambda batches: None)
    batches = 0

    def __call__(self, ids, labels):
        self.before(self.batches)
        self.batches += 1
        return super().__call__(ids, labels)


def sampler(shape=(3, 8, 6), *, seed=11, micro_batch=8, net=None, before=None):
    from diffusers import DDIMScheduler

    made = Watched(net or Net(shape[0]), DDIMScheduler(), 2, seed=seed, micro_batch=micro_batch, image_shape=shape)
    if before is not None:
        made.before = before
    return made


def plan(count=None):
    return kr_fast.LabelPlan.counts([3, 1, 0, 2, 1, 1, 1], count)


def die_at(number):
    """``before`` of a sampler that is killed, as by the system, at a batch."""

    def before(batches):
        if batches == number:
            os.kill(os.getpid(), signal.SIGKILL)

    return before


def main(out, count, *options):
    """``kill=N`` kills the process at batch N, in the rank of ``rank=R`` only; ``slow=S`` seconds a batch elsewhere."""
    import time

    from kr_fast.runtime import state

    torch.set_num_threads(1)
    chosen = dict(option.split("=") for option in options)
    made = sampler()
    if "slow" in chosen:
        made.before = lambda batches: time.sleep(float(chosen["slow"]))
    if "kill" in chosen and state.current().rank == int(chosen.get("rank", 0)):
        made.before = die_at(int(chosen["kill"]))
    done = kr_fast.synthesize(made, plan(), out, count=int(count), format=chosen.get("format", "npy"), shard_size=16)
    print(f"written {done.written}")


if __name__ == "__main__":
    main(*sys.argv[1:])
