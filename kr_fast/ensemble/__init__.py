"""Many models of one architecture: trained on known halves of a pool, asked together."""

from kr_fast.ensemble.inference.model_array import ModelArray
from kr_fast.ensemble.inference.queries import Query
from kr_fast.ensemble.made_by import recipe_of
from kr_fast.ensemble.networks import LogitsOf
from kr_fast.ensemble.shadows import Shadows, load_shadows, train_shadows
from kr_fast.ensemble.training.evaluation import accuracy, score
from kr_fast.ensemble.training.recipe import History, TrainConfig, fit

__all__ = [
    "History",
    "LogitsOf",
    "ModelArray",
    "Query",
    "Shadows",
    "TrainConfig",
    "accuracy",
    "fit",
    "load_shadows",
    "recipe_of",
    "score",
    "train_shadows",
]
