"""A trajectory on a GPU as one captured CUDA graph of a step, replayed for every step without a look from the host."""

from typing import Any

import torch
from torch import Tensor

from kr_fast.ops.sampling.solver_step_at import DeviceTable, solver_step_at
from kr_fast.runtime.cuda_graph import capture
from kr_fast.runtime.errors import UserError, first_line
from kr_fast.runtime.log import logger
from kr_fast.synthesis.networks import Network
from kr_fast.synthesis.steptable import StepTable
from kr_fast.synthesis.trajectory import Settings, TableTrajectory, Trajectory, note_finite


class GraphTrajectory(Trajectory):
    """As :class:`TableTrajectory`: the same arithmetic, in tensors that stay where they are.

    The step is counted in device memory: the solver's row, the timestep, the noise and the network's conditioning
    follow from it, so one graph serves all steps (a second one where guidance applies to some of them only). A network
    that cannot be captured runs uncaptured, which one line of the log says.

    Args:
        capture: False runs the same calls one by one, on any device.
    """

    def __init__(self, network: Network, settings: Settings, table: StepTable, batch: int, capture: bool = True):
        super().__init__(network, settings)
        self.table, self.batch, self.capture = table, batch, capture
        self.eager = TableTrajectory(network, settings, table)
        self.guided = [settings.guided(step, len(table)) for step in range(len(table))]
        self._state: _State | None = None
        self.graphs: dict[bool, Any] = {}
        self._captured_for: Any = None

    def __call__(self, ids: Tensor, labels: Tensor, watch: bool = False) -> tuple[Tensor, Tensor]:
        """As :class:`TableTrajectory`; ``ids`` has the batch's length."""
        if watch:
            return self.eager(ids, labels, watch)
        looked_up = self.network.prepare(self.table.timesteps) is not None
        if self._state is None:
            self._state = _State(self)
        state = self._state
        if self.capture and self._captured_for != (looked_up, self.network.identity()):
            self._capture(state, looked_up)
        state.begin(self, ids, labels)
        for guided in self.guided:
            if guided in self.graphs:
                self.graphs[guided].replay()
            else:
                self.advance(state, guided, looked_up)
        x = state.samples[state.table.last]
        # Copied, because the next trajectory writes over it.
        return x.clone(), state.finite & x.flatten(1).sum(1).isfinite()

    def advance(self, state: "_State", guided: bool, looked_up: bool) -> None:
        """One step: the one that the counter names."""
        s, inputs = self.settings, state.inputs[: self.batch * (1 + guided)]
        t = state.timesteps.index_select(0, state.step)
        cond, uncond = self.outputs(inputs, t, state.labels, guided, state.step[0] if looked_up else None)
        note_finite(state.finite, cond, uncond)
        if cond.untyped_storage().data_ptr() == inputs.untyped_storage().data_ptr():
            cond, uncond = cond.clone(), None if uncond is None else uncond.clone()
        rings, options = (state.samples, state.kept), {"guidance_scale": s.guidance, "seed": s.seed}
        options |= {"ids": state.ids, "stream": 1, "input": state.inputs, "copies": len(state.inputs) // self.batch}
        solver_step_at(state.table, state.step, *rings, cond, uncond_output=uncond, **options)
        state.step.add_(1)

    def _capture(self, state: "_State", looked_up: bool) -> None:  # needs a GPU
        self.graphs, self._captured_for = {}, (looked_up, self.network.identity())
        pool = torch.cuda.graph_pool_handle()
        try:
            for guided in sorted(set(self.guided)):
                step = lambda guided=guided: self.advance(state, guided, looked_up)  # noqa: E731
                self.graphs[guided] = capture(step, prepare=state.step.zero_, pool=pool)
        except (RuntimeError, UserError) as error:  # a wait or an allocation of the network's own: no capture has those
            self.graphs, self.capture, why = {}, False, first_line(error)
            logger.warning("Sampler: steps are launched one by one, for the network cannot be captured: %s", why)


class _State:
    """The tensors of a trajectory, at addresses that a graph can hold."""

    def __init__(self, trajectory: GraphTrajectory):
        network, table, batch = trajectory.network, trajectory.table, trajectory.batch
        device, shape = network.device, trajectory.settings.shape
        copies = 1 + any(trajectory.guided)
        self.table = DeviceTable.build(table.rows, table.sources, device)
        self.samples, self.kept = self.table.ring_buffers((batch, *shape))
        self.inputs = torch.empty(
            (copies * batch, *shape), dtype=network.dtype, device=device, memory_format=torch.channels_last
        )
        self.timesteps = torch.tensor(table.timesteps, device=device)
        self.step = torch.zeros(1, dtype=torch.int64, device=device)
        self.ids = torch.zeros(batch, dtype=torch.int64, device=device)
        halves = 1 if trajectory.settings.guidance_scale is None else 2
        self.labels = torch.zeros(halves * batch, dtype=torch.int64, device=device)
        self.finite = torch.ones(batch, dtype=torch.bool, device=device)

    def begin(self, trajectory: GraphTrajectory, ids: Tensor, labels: Tensor) -> None:
        """Set to the first step of ``ids``."""
        x = trajectory.start(ids, trajectory.table.init_noise_sigma)
        self.samples[0].copy_(x)
        first = x * trajectory.table.input_scales[0]
        self.inputs.copy_(first.repeat(len(self.inputs) // len(first), 1, 1, 1))
        self.ids.copy_(ids)
        self.labels.copy_(trajectory.labels(labels))
        self.finite.fill_(True)
        self.step.zero_()
