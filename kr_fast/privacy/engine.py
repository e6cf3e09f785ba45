"""``make_private``: training steps whose result is differentially private (DP-SGD, and DPDM for generators)."""

import itertools
import logging
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from kr_fast.backends.exact import float32_products
from kr_fast.privacy import clipping, noise, refusals, residual_blocks, unet_blocks
from kr_fast.privacy.layers import Layer, forward_of
from kr_fast.privacy.options import check_seed, number, whole
from kr_fast.privacy.rules import RULES
from kr_fast.runtime import state
from kr_fast.runtime.errors import UserError, fail
from kr_fast.runtime.memory import keep_freed_memory
from kr_fast.training.ema import EMA
from kr_fast.training.patches import Patches

logger = logging.getLogger("kr_fast")
_OP = refusals.OP
LEAST_NORM = 1e-12  # squares of much smaller norms vanish in float32, and such a gradient would not be clipped


class PrivateTraining:
    """What :func:`make_private` returns: ``backward`` adds clipped gradients, ``step`` adds noise and updates.

    Its arguments, and what it raises (UserError), are as :func:`make_private` has them.

    Attributes:
        is_private: whether noise is added, from the operating system's entropy. ``why_not`` says why it is not.
        steps: taken so far.
        not_finite: records of the steps so far whose gradient was not finite and which were left out, on this rank.
            A count over private records: nothing to publish.
    """

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer, ema: EMA | None, options: dict[str, Any]):
        self.model, self.optimizer, self.ema = model, optimizer, ema
        self.noise_multiplier: float = options["noise_multiplier"]
        self.expected_batch_size: float = options["expected_batch_size"]
        self.max_grad_norm: float = options["max_grad_norm"]
        self.clipping: str = options["clipping"]
        self.multiplicity: int = options["multiplicity"]
        self._seed: int | None = options["seed"]
        self._runtime = state.current()
        self._trained = refusals.check(model, optimizer, ema)
        self.steps, self.not_finite = 0, 0
        self._torn = False  # whether a batch is in some sums and not in others, or with noise already
        self._reached = False  # whether it was told which layers the losses reach
        first = next(iter(self._trained.values()))
        # One tensor for all sums, so that noise and exchange between processes are one pass.
        self._total = torch.zeros(sum(p.numel() for p in self._trained.values()), device=first.device)
        pieces = self._total.split([p.numel() for p in self._trained.values()])
        self._sums = {name: piece.view(p.shape) for (name, p), piece in zip(self._trained.items(), pieces, strict=True)}
        self._patches = Patches(model)
        self._layers: list[Layer] = []
        self._share_start()
        try:
            for name, module in model.named_modules():
                prefix = f"{name}." if name else ""
                own = {each: self._sums[prefix + each] for each in module._parameters if prefix + each in self._sums}
                if own:
                    layer = RULES[type(module)](name, module, own, self.multiplicity)
                    self._layers.append(layer)
                    self._patches.forward(module, forward_of(layer))
            for blocks in (residual_blocks, unet_blocks):
                blocks.fuse(self._patches, model, self._layers)
        except BaseException:
            self._patches.restore()
            raise
        # Layers hide their parameters from autograd: what reaches one came past its layer, and no record's norm has it.
        self._hooks = [p.register_hook(partial(refusals.read_elsewhere, name)) for name, p in self._trained.items()]
        optimizer.zero_grad(set_to_none=True)  # of frozen parameters too, which an old gradient would move
        if first.device.type == "cpu":
            keep_freed_memory()

    @property
    def is_private(self) -> bool:
        """Whether the weights after a step may be called differentially private."""
        return self.why_not is None

    @property
    def why_not(self) -> str | None:
        """Why the result is not private; None where it is."""
        if self._seed is not None:
            return noise.NOT_PRIVATE
        return None if self.noise_multiplier > 0 else "not private: no noise is added"

    def __repr__(self) -> str:
        options = {**self._options(), "steps": self.steps}
        inside = ", ".join(f"{name}={value!r}" for name, value in options.items() if name != "private")
        return f"PrivateTraining({inside}{'' if self.is_private else f', {self.why_not}'})"

    def backward(self, losses: Tensor, *, present: Tensor | None = None) -> None:
        """Add the clipped gradients of a physical batch to those of the logical batch.

        Args:
            losses: ``[B K]``, one of each row of the batch and a function of that row alone: no mean over the batch, no
                weight that depends on other rows. ``K`` is the multiplicity; a record's loss is the mean of its rows'.
            present: bool ``[B]``, the records that count; None: all. Nothing of another enters the sum.
        Raises: UserError naming the argument.
        """
        self._check_whole("backward")
        rows, present = self._checked(losses, present)
        seeds = present.repeat_interleave(self.multiplicity).to(losses.dtype) / self.multiplicity
        for layer in self._layers:
            layer.rows = rows
        try:
            with torch.autocast(losses.device.type, enabled=False):
                torch.autograd.backward(losses, seeds)
                with torch.no_grad(), float32_products():
                    self._add(present)
        finally:
            for layer in self._layers:
                layer.rows = None
                layer.clear()

    def _checked(self, losses: Tensor, present: Tensor | None) -> tuple[int, Tensor]:
        if not isinstance(losses, Tensor) or losses.ndim != 1 or not losses.is_floating_point():
            what = f"{losses.dtype} {list(losses.shape)}" if isinstance(losses, Tensor) else type(losses).__name__
            fail("backward", "losses", 'be one number a row (reduction="none")', what)
        rows, multiplicity = len(losses), self.multiplicity
        if not rows or rows % multiplicity:
            rule = f"have rows in groups of multiplicity {multiplicity} (a logical batch without rows is step() alone)"
            fail("backward", "losses", rule, rows)
        if not losses.requires_grad:
            rule = "come from a forward of the model after make_private, with gradients enabled"
            fail("backward", "losses", rule, "a tensor that requires none")
        records = rows // multiplicity
        if present is None:
            return rows, torch.ones(records, dtype=torch.bool, device=losses.device)
        if not isinstance(present, Tensor) or present.dtype != torch.bool or present.shape != (records,):
            what = f"{present.dtype} {list(present.shape)}" if isinstance(present, Tensor) else type(present).__name__
            fail("backward", "present", f"be a bool tensor [{records}]", what)
        return rows, present.to(losses.device)

    def _add(self, present: Tensor) -> None:
        found = {layer.name: squares for layer in self._layers if (squares := layer.squares()) is not None}
        if not found:
            fail("backward", "losses", "come from a forward of the model after make_private", "those of another")
        if not self._reached:
            self._reached = True
            if apart := [layer.name for layer in self._layers if layer.name not in found]:
                words = "had no part in the first losses: freeze what no loss reaches, for noise moves it"
                logger.warning(
                    "make_private: %d trained layers, of which the first is %s, %s", len(apart), apart[0], words
                )
        squares = torch.stack(list(found.values()))
        factors, spoilt = clipping.factors(self.clipping, squares.sum(0), self.max_grad_norm, present)
        # A row that is not present has the seed 0, and so no gradient that is not 0 but where rows are mixed.
        mixed = torch.cat((spoilt.any()[None], ((squares > 0) & ~present & ~spoilt).any(1)))
        some_spoilt, *mixed = mixed.tolist()  # the one wait for a GPU in a physical batch
        if any(mixed):
            *_, name = itertools.compress(found, mixed)
            rule = "have gradients by row of that row's loss alone (the batch first, what rows share expanded to them"
            fail(
                "backward", f"layer {name}", f"{rule}, no mean over rows behind it)", "one of a row that is not present"
            )
        left_out = spoilt if some_spoilt else None
        if left_out is not None:
            self.not_finite += int((left_out & present).sum())
        self._torn = True
        for layer in self._layers:
            layer.add(factors, left_out)
        self._torn = False

    def _check_whole(self, where: str) -> None:
        """A batch that was added in part, or with noise already, and is tried again would count twice."""
        if self._torn:
            rule = f"{where}: sums must be whole (go on from a saved state, which load_state_dict takes)"
            raise UserError(f"{rule}, got some of a batch whose backward or step ended in an error")

    @torch.no_grad()
    def step(self) -> None:
        """End the logical batch: add noise, divide by ``expected_batch_size``, update the weights and their average.

        A logical batch without a record, and so without a ``backward``, is a step like any other. Among several
        processes each calls this once a logical batch: sums are added over them, and noise once in all.

        Raises: UserError where parameters were frozen, unfrozen, added or replaced since :func:`make_private`.
        """
        self._check_whole("step")
        refusals.check_as_made(self._trained, self.model, self.optimizer)
        several = self._runtime.world_size > 1
        self._torn = True  # until the sums are empty: an optimizer's error leaves them divided and with noise
        if several:  # noise is added to the whole sum: what is added to noise afterwards shows in the low bits
            torch.distributed.reduce(self._total, 0)
        if self._runtime.is_main:
            deviation = self.noise_multiplier * self.max_grad_norm
            noise.add_noise(self._total, deviation, self._seed, "noise", self.steps)
        if several:
            torch.distributed.broadcast(self._total, 0)
        self._total.div_(self.expected_batch_size)
        for name, p in self._trained.items():
            p.grad = self._sums[name]
        try:
            self.optimizer.step()
        finally:
            for p in self._trained.values():
                p.grad = None
            torch.clear_autocast_cache()  # of the weights before, where autocast is around the whole loop
        self._total.zero_()
        self._torn = False
        if self.ema is not None and self.ema is not getattr(self.optimizer, "ema", None):
            self.ema.step()
        self.steps += 1

    def restore(self) -> None:
        """Give the model its own forwards back, and its parameters their gradients. Again: nothing."""
        self._patches.restore()
        for hook in self._hooks:
            hook.remove()

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs besides the states of model, optimizer and average: also within a logical batch.

        It may hold sums of private gradients without noise: keep it where the private images are kept.
        """
        self._check_whole("state_dict")
        state = {"steps": self.steps, "not_finite": self.not_finite, "sums": self._total.clone()}
        return {**state, "rank": self._rank(), **self._options()}

    def load_state_dict(self, values: dict[str, Any]) -> None:
        """Go on from :meth:`state_dict`.

        Raises: UserError for a state of other options: a guarantee is for one set of them; for another process's sums,
            which would count twice.
        """
        for name, own in self._options().items():
            if values[name] != own:
                fail(_OP, name, f"be {values[name]!r}, as it was when the state was saved", repr(own))
        if values["sums"].shape != self._total.shape:
            what = f"{self._total.numel()} trained parameters"
            raise UserError(f"{_OP}: model must have the {values['sums'].numel()} of the state, got {what}")
        own = self._rank()
        if (saved := values.get("rank", own)) != own and bool(values["sums"].any()):
            rule = f"be of rank {own[0]} of {own[1]}, within a logical batch: each process has sums of its own"
            fail(_OP, "state", rule, f"that of rank {saved[0]} of {saved[1]}")
        self.steps, self.not_finite = values["steps"], values["not_finite"]
        self._total.copy_(values["sums"])
        self._torn = False

    def _rank(self) -> list[int]:
        return [self._runtime.rank, self._runtime.world_size]

    def _options(self) -> dict[str, Any]:
        names = ("noise_multiplier", "expected_batch_size", "max_grad_norm", "clipping", "multiplicity")
        return {**{name: getattr(self, name) for name in names}, "private": self.is_private}

    def _share_start(self) -> None:
        """Begin with the same weights on all processes."""
        if self._runtime.world_size > 1:
            for each in (*self.model.parameters(), *self.model.buffers()):
                torch.distributed.broadcast(each.detach(), 0)


CLIPPINGS = tuple(clipping.RULES)


def make_private(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    *,
    noise_multiplier: float,
    expected_batch_size: float,
    max_grad_norm: float = 1.0,
    clipping: str = "flat",
    multiplicity: int = 1,
    ema: EMA | None = None,
    seed: int | None = None,
    not_private: bool = False,
) -> PrivateTraining:
    """Train ``model`` by DP-SGD: clipped gradients of single records, Gaussian noise, then any optimizer.

    ``g = (sum_b f_b g_b + sigma C z) / B`` over the present records ``b`` of a logical batch, ``z`` standard normal,
    ``B = expected_batch_size`` (that of the sampling, never the drawn one, which is private). Flat: ``f_b = min(1, C /
    |g_b|)``; automatic: ``f_b = C / (|g_b| + 0.01)``. Either way a record moves the sum by ``C`` at most: with records
    drawn by :class:`PoissonBatches`, neighbouring sets differ in one record that is added or removed. With
    ``multiplicity`` K, ``g_b`` is the mean over K consecutive rows (noise levels of an image, say), taken before it is
    clipped, which costs no privacy.

    Gradients of single records are not kept: one forward pass, one backward pass for the signals, in which each layer
    takes norms at once, and a weighted weight gradient, see :mod:`kr_fast.privacy.layers`. From here on a plain
    ``backward`` raises; ``restore()`` undoes this. A record whose gradient is not finite adds nothing, and is counted
    in ``not_finite``.

    What is private are the weights after each ``step``. Not private: losses, ``not_finite``, the drawn indices, states
    for resuming, and whatever else is computed from private records, so choices made by these count too.

    Args:
        model: its trained parameters are float32 and in ``Conv2d``, ``Linear``, ``Embedding``, ``GroupNorm`` and
            ``LayerNorm`` alone, each of which reads a row of the batch for each loss; nothing in it mixes rows, as
            BatchNorm does, or reads a parameter past its layer, as a penalty on weights does. Parameters that require
            no gradient stay as they are. It is not wrapped for several processes: sums are added in ``step``.
        optimizer: of these parameters; its gradients are ``g``.
        noise_multiplier: sigma; 0 adds no noise, and the result is not private.
        expected_batch_size: ``B``, over all processes.
        max_grad_norm: ``C``, above 1e-12.
        clipping: "flat" or "automatic".
        multiplicity: K.
        ema: an average of the weights to move at each step, unless the optimizer does so itself.
        seed: for tests alone: noise becomes a function of it, and the result is marked as not private.
        not_private: True, said in words, where there is a ``seed``.
    Returns: with ``backward(losses, present=...)``, ``step()`` and ``restore()``.
    Raises: UserError naming the argument, or the module that has no rule and what to do.
    Source: Abadi et al., "Deep Learning with Differential Privacy", CCS 2016; Bu et al., "Automatic Clipping", NeurIPS
        2023; Dockhorn et al., "Differentially Private Diffusion Models", TMLR 2023, eq. 6 (noise multiplicity).
    """
    if clipping not in CLIPPINGS:
        fail(_OP, "clipping", f"be one of {', '.join(CLIPPINGS)}", clipping)
    bound, batch = number(_OP, "max_grad_norm", max_grad_norm), number(_OP, "expected_batch_size", expected_batch_size)
    for name, value, least in (("max_grad_norm", bound, LEAST_NORM), ("expected_batch_size", batch, 0.0)):
        if value <= least:
            fail(_OP, name, f"be above {least:g}", value)
    options = {
        "noise_multiplier": number(_OP, "noise_multiplier", noise_multiplier),
        "expected_batch_size": batch,
        "max_grad_norm": bound,
        "clipping": clipping,
        "multiplicity": whole(_OP, "multiplicity", multiplicity, 1),
        "seed": check_seed(_OP, seed, not_private),
    }
    return PrivateTraining(model, optimizer, ema, options)
