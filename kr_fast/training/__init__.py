"""What a training step has around the network: optimizers that clip, update and average the weights in one pass."""

from kr_fast.training.ema import EMA, PowerEMA
from kr_fast.training.optimizers import SGD, AdamW

__all__ = ["EMA", "SGD", "AdamW", "PowerEMA"]
