"""From a trained network to labelled images, each addressed by its id."""

from kr_fast.synthesis.device import DeviceShards
from kr_fast.synthesis.labels import LabelPlan
from kr_fast.synthesis.networks import DiTNetwork, Network, PromptNetwork
from kr_fast.synthesis.pipeline import Synthesized, synthesize
from kr_fast.synthesis.sampler import Batch, Sampler
from kr_fast.synthesis.steptable import StepTable

__all__ = [
    "Batch",
    "DeviceShards",
    "DiTNetwork",
    "LabelPlan",
    "Network",
    "PromptNetwork",
    "Sampler",
    "StepTable",
    "Synthesized",
    "synthesize",
]
