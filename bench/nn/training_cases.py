"""The convolutions that the benchmarks of training share."""

# N, inputs, outputs, side: stages of ResNet-14 and of UNets at 28 and 8 px.
TRAINING = [
    (64, 16, 16, 28),
    (64, 32, 32, 14),
    (64, 64, 64, 7),
    (64, 32, 32, 28),
    (64, 64, 64, 28),
    (64, 128, 64, 28),
    (64, 64, 64, 14),
    (128, 32, 32, 8),
    (128, 64, 64, 4),
]
