"""Differentially private training: per-record clipping, noise and Poisson sampling."""

from kr_fast.privacy.engine import PrivateTraining, make_private
from kr_fast.privacy.sampling import Batch, PoissonBatches

__all__ = ["Batch", "PoissonBatches", "PrivateTraining", "make_private"]
