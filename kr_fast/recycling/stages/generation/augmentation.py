"""Augmentation conditioning of the generator's training, and the classes of its batches.

Each image is rotated, scaled and shifted with probability ``generator_augment`` each, and the network is told by how
much, so that it can be sampled without any of it (Karras et al., "Elucidating the Design Space of Diffusion-Based
Generative Models", NeurIPS 2022, section 5 and appendix F.2). What it is told enters by a linear map without bias,
which vanishes for an image as it is: in training alone, so that a checkpoint is a plain network.
"""

from typing import Any

import torch
from torch import Tensor, nn

from kr_fast.data.augment import affine_maps, resample
from kr_fast.recycling.config import RecycleConfig

TOLD = 4  # numbers that the network is told of an image: rotation, scale, and the shift of columns and rows
KEY = "class_embedding.augmentation.weight"  # in the state dict of a network in training


class AugmentedEmbedding(nn.Embedding):
    """``weight[labels] + told @ augmentation.weight.T``: an embedding of classes that takes augmentation with them.

    ``told``: float ``[N, TOLD]`` of the next batch, or None for none. The map begins at zero.
    """

    def __init__(self, classes: nn.Embedding):
        super().__init__(classes.num_embeddings, classes.embedding_dim, _weight=classes.weight)
        self.weight = classes.weight
        self.augmentation = nn.Linear(TOLD, classes.embedding_dim, bias=False)
        nn.init.zeros_(self.augmentation.weight)
        self.told: Tensor | None = None

    def forward(self, labels: Tensor) -> Tensor:
        """int64 ``[N]`` -> ``[N, embedding_dim]``."""
        embedded = super().forward(labels)
        return embedded if self.told is None else embedded + self.augmentation(self.told)


def condition(network: Any, config: RecycleConfig) -> None:
    """Let the class embedding of a ``UNet2DModel`` take augmentation, where the configuration has some."""
    if config.generator_augment:
        network.class_embedding = AugmentedEmbedding(network.class_embedding)


def plain_state(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The state dict without what :func:`condition` added: that of the network as it is sampled."""
    return {name: value for name, value in state.items() if name != KEY}


def draw(config: RecycleConfig, count: int, size: tuple[int, int], generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """(``told`` float32 ``[N, TOLD]``, the affine maps ``[N, 2, 3]`` of :func:`kr_fast.data.augment.resample`).

    ``told`` is uniform in [-1, 1], in units of the largest change, and 0 for what an image is spared.
    """
    told = torch.rand(count, TOLD, generator=generator).mul_(2).sub_(1)
    applied = torch.rand(count, 3, generator=generator) < config.generator_augment
    told *= applied[:, [0, 1, 2, 2]]
    matrix = affine_maps(told.T, config.generator_rotate, config.generator_scale, config.generator_shift, size)
    # A change whose range is zero is none, and nothing is said of it.
    spared = [config.generator_rotate, config.generator_scale, config.generator_shift, config.generator_shift]
    return told * (torch.tensor(spared) > 0), matrix


def augmented(network: Any, config: RecycleConfig, images: Tensor, share: Tensor, generator: torch.Generator) -> Tensor:
    """Augmented float ``images`` ``[N, C, H, W]``, the rows ``share`` of a batch; ``network`` is told.

    A network without :class:`AugmentedEmbedding` is one that is asked as it is sampled: its images stay as they are.
    """
    embedding = getattr(network, "module", network).class_embedding  # of the network itself, in data-parallel training
    if not isinstance(embedding, AugmentedEmbedding):
        return images
    told, matrix = (v[share] for v in draw(config, config.generator_batch_size, tuple(images.shape[2:]), generator))
    embedding.told = told.to(images.device)
    changed = told.any(1).nonzero()[:, 0].to(images.device)
    if not len(changed):  # torch resamples no empty batch
        return images
    return images.index_copy(0, changed, resample(images[changed], matrix.to(images.device)[changed]))


def batch_index(config: RecycleConfig, labels: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """int64 ``[count]``: the training images of a batch, drawn alike, or from classes that are drawn alike."""
    if config.generator_classes == "train":
        return torch.randint(len(labels), (count,), generator=generator)
    order, sizes = labels.cpu().argsort(stable=True), labels.cpu().bincount()
    sizes = sizes[sizes > 0]
    label = torch.randint(len(sizes), (count,), generator=generator)
    within = (torch.rand(count, generator=generator, dtype=torch.float64) * sizes[label]).long()
    return order[(sizes.cumsum(0) - sizes)[label] + within]
