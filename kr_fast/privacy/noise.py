"""Gaussian noise and coin flips from a generator that the operating system's entropy seeds, or from a seed for tests.

**What is defended.** Every random bit comes from OpenSSL's cryptographic generator (``ssl.RAND_bytes``: by default
CTR_DRBG of NIST SP 800-90A with AES-256), which the operating system's entropy seeds, again after a fork and from time
to time, and which no seed of ours reaches. A bit is used once and is neither kept nor written, and no output tells
another one to whoever cannot break AES. ``os.urandom`` promises the same and took most of the time of a step's noise.
Noise is made in float64 from 63 and 64 random bits a pair (Box and Muller), its tails end at 9.3 standard deviations (a
chance of 1e-20 a value), and ``sum + noise`` is rounded to a grid of ``2^-20`` of the noise's standard deviation, on
which every sum can reach the same points: the low bits of a result do not tell which sum it was made from (Mironov, "On
significance of the least significant bits for differential privacy", CCS 2012).

**What is not.** This is no proof for finite precision: float64's logarithm and cosine are rounded, and the clipped sum
itself is made in float32, whose order of summation changes its last bits (Casacuberta et al., CCS 2022; for B records
at most B 2^-24 of the sum). Timing, memory and whoever can read this process are not defended against. The exactly
sampled discrete Gaussian (Canonne et al., NeurIPS 2020) is not used.
"""

import math
import ssl

import numpy as np
import torch
from torch import Tensor

from kr_fast.runtime import seeds

NOT_PRIVATE = "not private: its randomness comes from a seed"
GRID = -20  # binary digits below the noise's standard deviation that a result keeps
_CHUNK = 1 << 17  # pairs of values made at a time: a few MiB


def words(count: int, seed: int | None, *names: object) -> np.ndarray:
    """``count`` random uint64: of the cryptographic generator, or a function of ``seed`` and ``names``."""
    if seed is None:
        return np.frombuffer(ssl.RAND_bytes(8 * count), np.uint64)
    return np.random.Generator(np.random.Philox(seeds.derive(seed, *names))).integers(
        0, 1 << 64, count, np.uint64, endpoint=False
    )


def normal(count: int, seed: int | None, *names: object) -> Tensor:
    """``count`` standard normal values in float64.

    ``sqrt(-2 ln u) (cos v, sin v)`` with ``u`` in (0, 1] and ``v`` in [0, 2 pi): Box and Muller, 1958.
    """
    pairs = -(-count // 2)
    both = torch.from_numpy(words(2 * pairs, seed, *names).view(np.int64).copy())
    radius = (both[:pairs] & (2**63 - 1)).double().add_(1).mul_(2.0**-63).log_().mul_(-2).sqrt_()
    angle = both[pairs:].double().mul_(math.pi * 2.0**-63)  # a signed word: in [-pi, pi)
    return torch.cat([radius * angle.cos(), radius * angle.sin()])[:count]


def add_noise(total: Tensor, deviation: float, seed: int | None, *names: object) -> None:
    """Add ``N(0, deviation^2)`` to each value of a flat float32 ``total``, in place, rounded to the grid above."""
    if deviation == 0:
        return
    grid = 2.0 ** (math.floor(math.log2(deviation)) + GRID)
    for number, part in enumerate(total.split(2 * _CHUNK)):
        noise = normal(len(part), seed, *names, number).mul_(deviation).to(part.device)
        part.copy_(noise.add_(part).div_(grid).round_().mul_(grid))


def coins(count: int, chance: float, seed: int | None, *names: object) -> np.ndarray:
    """Indices of the heads among ``count`` independent coins that show one with ``chance`` (at most, within 2^-64)."""
    threshold = math.floor(chance * 2.0**64)
    if threshold >= 1 << 64:
        return np.arange(count)
    return np.flatnonzero(words(count, seed, *names) < np.uint64(threshold))
