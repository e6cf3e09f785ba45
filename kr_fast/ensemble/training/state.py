"""The numbers of M models in training: parameters, velocities and BatchNorm statistics as stacks, in and out."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from kr_fast.ensemble.training.layer_ops import stacked, unstacked
from kr_fast.ensemble.training.stacked_graph import StackedGraph
from kr_fast.ops.batched.model_batch_norm import update_running
from kr_fast.ops.batched.model_sgd import model_sgd


@dataclasses.dataclass
class ModelState:
    """Where one model stood after ``epoch`` epochs."""

    epoch: int
    weights: dict[str, Tensor]
    velocities: dict[str, Tensor]
    buffers: dict[str, Tensor]


class TrainingState:
    """Models of one architecture, side by side on ``device``: parameter after parameter, each ``[M, ...]``, float32."""

    def __init__(self, models: Sequence[nn.Module], graph: StackedGraph, device: torch.device, decay: float):
        first = models[0]
        self.graph, self.count, self.device = graph, len(models), device
        trained = [(name, value) for name, value in first.named_parameters() if value.requires_grad]
        dtype = trained[0][1].dtype
        self.names = [name for name, _ in trained]
        self.sizes = [value.numel() for _, value in trained]
        self.decays = [decay if value.ndim > 1 else 0.0 for _, value in trained]
        self.weight = torch.empty(self.count * sum(self.sizes), dtype=dtype, device=device)
        self.velocity, self.grad = torch.zeros_like(self.weight), torch.empty_like(self.weight)
        self.tensors: dict[str, Tensor] = {}
        states = [dict((*model.named_parameters(), *model.named_buffers())) for model in models]
        running = {f"{name}.{what}" for name in graph.norms for what in ("running_mean", "running_var")}
        for name, value in states[0].items():
            if name not in self.names and name not in running:
                self.tensors[name] = self._stacked([state[name] for state in states], name).to(device)
            elif name in self.names:
                like = stacked(value.detach()[None], name in graph.channels_last)
                self.tensors[name] = self._view(self.weight, name, like.shape[1:]).detach().requires_grad_()
        channels = [first.get_submodule(name).num_features for name in graph.norms]
        self.statistics = torch.zeros(2, self.count, sum(channels), dtype=dtype, device=device)
        self.slices = dict(zip(graph.norms, _slices(channels), strict=True))
        rates = [torch.full((n,), first.get_submodule(m).momentum) for m, n in zip(graph.norms, channels, strict=True)]
        self.rates = torch.cat([torch.zeros(0), *rates]).to(device, dtype)
        for m, model in enumerate(models):
            self.load(m, model)

    def _stacked(self, values: Sequence[Tensor], name: str) -> Tensor:
        return stacked(torch.stack([value.detach() for value in values]), name in self.graph.channels_last)

    def _view(self, flat: Tensor, name: str, shape: Sequence[int]) -> Tensor:
        index = self.names.index(name)
        start = self.count * sum(self.sizes[:index])
        return flat[start : start + self.count * self.sizes[index]].view(self.count, *shape)

    def leaves(self) -> list[Tensor]:
        """The parameters that learn, ``[M, ...]`` each, sharing memory with ``weight``."""
        return [self.tensors[name] for name in self.names]

    def update(self, grads: Sequence[Tensor], seen: Sequence[tuple[Tensor, Tensor, int]], rate, momentum) -> None:
        """One step of SGD and of the running statistics; models whose rate ``[M]`` is 0 stay as they are."""
        with torch.no_grad():
            torch.cat([grad.reshape(-1) for grad in grads], out=self.grad)
            model_sgd(self.weight, self.velocity, self.grad, rate, momentum, self.sizes, self.decays)
            if seen:
                speed = torch.where(rate[:, None] == 0, 0, self.rates)
                mean = torch.cat([mean for mean, _, _ in seen], 1)
                var = torch.cat([var * (rows / (rows - 1)) for _, var, rows in seen], 1)
                update_running(self.statistics[0], mean, speed)
                update_running(self.statistics[1], var, speed)

    @torch.no_grad()
    def load(self, m: int, model: nn.Module) -> None:
        """Weights and running statistics of ``model`` as those of model ``m``."""
        for name, value in model.named_parameters():
            if name in self.names:
                self.tensors[name][m] = self._one(name, value)
        for name, columns in self.slices.items():
            part = model.get_submodule(name)
            self.statistics[0, m, columns], self.statistics[1, m, columns] = part.running_mean, part.running_var

    def _one(self, name: str, value: Tensor) -> Tensor:
        return stacked(value.detach()[None], name in self.graph.channels_last)[0].to(self.device)

    def _back(self, name: str, value: Tensor) -> Tensor:
        return unstacked(value.detach()[None], name in self.graph.channels_last)[0].clone()

    @torch.no_grad()
    def store(self, m: int, model: nn.Module, steps: int) -> None:
        """Model ``m`` into ``model``, after ``steps`` steps of training."""
        for name, value in model.named_parameters():
            if name in self.names:
                value.copy_(self._back(name, self.tensors[name][m]))
        for name, columns in self.slices.items():
            part = model.get_submodule(name)
            part.running_mean.copy_(self.statistics[0, m, columns])
            part.running_var.copy_(self.statistics[1, m, columns])
            part.num_batches_tracked.fill_(steps)

    def saved(self, m: int, epoch: int) -> dict[str, Any]:
        """Model ``m`` as :class:`ModelState`, in plain types on the CPU, in torch's own order of dimensions."""
        velocities = {name: self._view(self.velocity, name, self.tensors[name].shape[1:]) for name in self.names}
        return {
            "epoch": epoch,
            "weights": {name: self._back(name, self.tensors[name][m]).cpu() for name in self.names},
            "velocities": {name: self._back(name, velocities[name][m]).cpu() for name in self.names},
            "buffers": {name: self.statistics[:, m, columns].cpu() for name, columns in self.slices.items()},
        }

    @torch.no_grad()
    def restore(self, m: int, saved: ModelState) -> None:
        """Go on from ``saved``."""
        for name in self.names:
            self.tensors[name][m] = self._one(name, saved.weights[name])
            self._view(self.velocity, name, self.tensors[name].shape[1:])[m] = self._one(name, saved.velocities[name])
        for name, columns in self.slices.items():
            self.statistics[:, m, columns] = saved.buffers[name].to(self.device)


def _slices(sizes: Sequence[int]) -> list[slice]:
    ends = [sum(sizes[: i + 1]) for i in range(len(sizes))]
    return [slice(end - size, end) for size, end in zip(sizes, ends, strict=True)]
