"""Differential privacy: training with clipping, noise and Poisson sampling, and the ledger of what that spends."""

from kr_fast.privacy.accounting import Gaussian, Laplace, PureDP, calibrate, check_target, epsilon_of
from kr_fast.privacy.engine import PrivateTraining, make_private
from kr_fast.privacy.ledger import Ledger
from kr_fast.privacy.sampling import Batch, PoissonBatches

__all__ = [
    "Batch",
    "Gaussian",
    "Laplace",
    "Ledger",
    "PoissonBatches",
    "PrivateTraining",
    "PureDP",
    "calibrate",
    "check_target",
    "epsilon_of",
    "make_private",
]
