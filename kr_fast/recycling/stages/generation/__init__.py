"""The generator: training, choice of a checkpoint and of how images are sampled, attack on its weights."""
