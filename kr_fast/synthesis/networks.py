"""What the sampler asks of a network, and the networks of diffusers brought into that form.

A network is called as ``network(x, t, labels, step)``: ``x`` ``[B, C, H, W]`` of its dtype, ``t`` a tensor of one
timestep, ``labels`` int64 ``[B]``, ``step`` None unless its ``prepare`` asked for steps; it returns ``[B, C, H, W]``.
A subclass of :class:`Network` is taken as it is.
"""

import hashlib
import threading
from typing import Any

import torch
from torch import Tensor, nn

from kr_fast.runtime.errors import UserError, fail, first_line
from kr_fast.runtime.log import logger

# Blocks that halve the side, so that each but the last needs an even one.
_HALVING = ("DownBlock2D", "AttnDownBlock2D", "ResnetDownsampleBlock2D")

_PREPARING = threading.Lock()  # of threads that call one sampler, the first prepares the network


class Network:
    """A callable ``model(x, t, class_labels=labels)``: diffusers' ``UNet2DModel``, or anything with its signature.

    Attributes:
        model: what is called, and put into evaluation mode meanwhile if it is a module.
        embeddings: number of class embeddings; None if not known. In a class derived from this one the last of them is
            the null class of guidance; of a network of diffusers that is for the caller to say.
        shape: (channels, height, width) of its input and output, or None if not known.
        device, dtype: of its input.
    Raises: UserError for a network without weights, or of diffusers' with options that ask for more than this call.
    """

    _no_table_of: tuple[float, ...] | None = None  # timesteps whose table would be too large

    def __init__(self, model: Any):
        self.model = model
        config = getattr(model, "config", None)
        _check_config(config)
        self.embeddings: int | None = getattr(config, "num_class_embeds", None)
        self.shape = _shape(config)
        first = next(iter(model.parameters()), None) if isinstance(model, nn.Module) else None
        self.device = torch.device("cpu") if first is None else first.device
        if self.device.type == "meta":
            fail("Sampler", "unet", "have weights", "tensors on the device meta, which hold none")
        self.dtype = torch.float32 if first is None else first.dtype
        # diffusers refuses labels for a network without class embeddings; of other callables nothing is known.
        self.takes_labels = bool(
            config is None or self.embeddings or getattr(config, "class_embed_type", None) is not None
        )

    @property
    def optimized(self) -> bool:
        """Whether the model runs through :func:`kr_fast.optimize`."""
        return isinstance(self.model, nn.Module) and hasattr(self.model, "_kr_fast_table")

    def identity(self) -> Any:
        """Changes where what a captured graph holds the address of has moved: the weights, or an optimized table."""
        if not isinstance(self.model, nn.Module):
            return id(self.model)
        table = getattr(self.model, "_kr_fast_table", None)
        return [p.data_ptr() for p in self.model.parameters()], self.optimized, 0 if table is None else table.data_ptr()

    def prepare(self, timesteps: tuple[float, ...]) -> Tensor | None:
        """Before a trajectory: the ``step`` of each of its calls, if the model can look its conditioning up."""
        config = getattr(self.model, "config", None)
        plain = getattr(config, "class_embed_type", None) is None
        if not self.optimized or not plain or getattr(config, "time_embedding_type", None) == "fourier":
            return None
        # Noted at the model and not here: another sampler of the same model may have prepared other timesteps since.
        with _PREPARING:
            if self._no_table_of == timesteps:
                return None
            if self.model._kr_fast_timesteps != timesteps:
                try:
                    self.model.prepare_steps(torch.tensor(timesteps, device=self.device))
                except UserError as error:
                    self._no_table_of = timesteps
                    logger.warning("Sampler: the conditioning is computed in every step: %s", error)
                    return None
                self.model._kr_fast_timesteps = timesteps
        return torch.arange(len(timesteps), device=self.device)

    def __call__(self, x: Tensor, t: Tensor, labels: Tensor, step: Tensor | None = None) -> Tensor:
        more = {} if step is None else {"step": step}
        out = self.model(x, t, class_labels=labels if self.takes_labels else None, **more)
        return getattr(out, "sample", out)

    def run(self, x: Tensor, t: Tensor, labels: Tensor, step: Tensor | None = None) -> Tensor:
        """The call, checked. Raises: UserError with the network's own message, or for an output of another shape."""
        try:
            out = self(x, t, labels, step)
        except Exception as error:  # the code of a user
            rule = f"run on {str(x.dtype).removeprefix('torch.')} {list(x.shape)} with labels {list(labels.shape)}"
            got = f"the error {type(error).__name__}: {first_line(error)}"
            raise UserError(f"Sampler: unet must {rule}, got {got}") from error
        if not isinstance(out, Tensor) or out.shape != x.shape:
            got = list(out.shape) if isinstance(out, Tensor) else type(out).__name__
            fail("Sampler", "unet", f"return {list(x.shape)}, the shape of its input", got)
        return out

    def digest(self) -> str:
        """What a manifest holds to tell this network from others."""
        return weights_digest(self.model)


class DiTNetwork(Network):
    """diffusers' ``DiTTransformer2DModel`` (Peebles and Xie, 2023): label ``num_embeds_ada_norm`` is its null class.

    A ``model`` that also predicts variances returns twice its input's channels; the first half is the prediction, as
    in diffusers' ``DiTPipeline``.
    """

    def __init__(self, model: Any):
        super().__init__(model)
        self.embeddings, self.takes_labels = model.config.num_embeds_ada_norm + 1, True

    def __call__(self, x: Tensor, t: Tensor, labels: Tensor, step: Tensor | None = None) -> Tensor:
        # An optimized one computes the rows of one timestep by class; diffusers' own asks for a timestep an image.
        timestep, more = (t, {"step": step}) if self.optimized else (t.expand(len(x)), {})
        out = self.model(x, timestep=timestep, class_labels=labels, **more).sample
        return out[:, : x.shape[1]]


class PromptNetwork(Network):
    """diffusers' ``UNet2DConditionModel`` with one prompt a class.

    Args:
        model: the network.
        prompts: ``[classes + 1, tokens, width]`` text embeddings: ``prompts[c]`` is that of class ``c``, the last one
            that of the empty prompt, which guidance starts from.
    Raises: UserError for prompts of another shape, and for a network that reads more than a prompt.
    """

    def __init__(self, model: Any, prompts: Tensor):
        super().__init__(model)
        for name in ("num_class_embeds", "class_embed_type", "addition_embed_type", "time_cond_proj_dim"):
            if getattr(model.config, name, None) is not None:
                rule = f"have no {name} (it reads more than a prompt)"
                fail("PromptNetwork", "model", rule, getattr(model.config, name))
        if not isinstance(prompts, Tensor):
            fail("PromptNetwork", "prompts", "be a tensor", type(prompts).__name__)
        if prompts.ndim != 3 or not prompts.is_floating_point():
            fail("PromptNetwork", "prompts", "be floating [classes + 1, tokens, width]", list(prompts.shape))
        width = model.config.cross_attention_dim
        if isinstance(width, int) and prompts.shape[2] != width:
            fail("PromptNetwork", "prompts", f"have the network's width {width}", prompts.shape[2])
        self.prompts = prompts.to(self.device, self.dtype)
        self.embeddings, self.takes_labels = len(prompts), True

    def __call__(self, x: Tensor, t: Tensor, labels: Tensor, step: Tensor | None = None) -> Tensor:
        return self.model(x, t, encoder_hidden_states=self.prompts[labels]).sample

    def digest(self) -> str:
        """As for other networks, with the prompts."""
        return hashlib.sha256((super().digest() + tensor_digest(self.prompts)).encode()).hexdigest()


def adapt(model: Any) -> Network:
    """The :class:`Network` of ``model``, by the names of its configuration."""
    if isinstance(model, Network):
        return model
    config = getattr(model, "config", None)
    if getattr(config, "num_embeds_ada_norm", None):
        return DiTNetwork(model)
    if getattr(config, "cross_attention_dim", None) and hasattr(config, "encoder_hid_dim"):
        fail("Sampler", "unet", "come as PromptNetwork(unet, prompts) if it reads text", type(model).__name__)
    return Network(model)


def tensor_digest(value: Tensor) -> str:
    """SHA-256 of a tensor's bytes."""
    flat = value.detach().cpu().contiguous().view(-1)
    return hashlib.sha256(flat.view(torch.uint8).numpy()).hexdigest()


def weights_digest(model: Any) -> str:
    """SHA-256 of a module's configuration, parameters and buffers; of another callable, its qualified name."""
    if not isinstance(model, nn.Module):
        return f"{type(model).__module__}.{getattr(model, '__qualname__', type(model).__qualname__)}"
    # Keys with an underscore say where the model was loaded from and by which version.
    config = {key: value for key, value in dict(getattr(model, "config", {})).items() if not key.startswith("_")}
    digest = hashlib.sha256(repr(sorted(config.items())).encode())
    for name, value in model.state_dict().items():
        digest.update(f"{name} {value.dtype} {list(value.shape)} {tensor_digest(value)}\n".encode())
    return digest.hexdigest()


def check_size(model: Any, height: int, width: int) -> None:
    """Refuse a size that a ``UNet2DModel`` cannot halve at each of its levels. Raises: UserError."""
    blocks = getattr(getattr(model, "config", None), "down_block_types", None)
    if type(model).__name__ != "UNet2DModel" or not blocks or not all(block in _HALVING for block in blocks):
        return
    multiple = 2 ** (len(blocks) - 1)
    if height % multiple or width % multiple:
        size = f"{height} px" if height == width else f"{height} x {width} px"
        fail("Sampler", "image_shape", f"be a multiple of {multiple}: the network has {len(blocks)} levels", size)


def _check_config(config: Any) -> None:
    """Options of diffusers' networks that ask for more than ``(x, t, class_labels)``."""
    kind = getattr(config, "class_embed_type", None)
    if kind not in (None, "timestep") and getattr(config, "cross_attention_dim", None) is None:
        rule = "look its labels up (num_class_embeds) or embed them as numbers (class_embed_type 'timestep')"
        fail("Sampler", "unet", rule, f"class_embed_type {kind!r}")
    taken, given = getattr(config, "in_channels", None), getattr(config, "out_channels", None)
    dit = getattr(config, "num_embeds_ada_norm", None) is not None
    if isinstance(taken, int) and given == 2 * taken and not dit:
        rule = "return as many channels as it takes (variances that a network predicts are not used)"
        fail("Sampler", "unet", rule, f"{given} for {taken}")


def _shape(config: Any) -> tuple[int, int, int] | None:
    size, channels = getattr(config, "sample_size", None), getattr(config, "in_channels", None)
    if size is None or channels is None:
        return None
    sizes = (size, size) if isinstance(size, int) else size
    if not isinstance(sizes, list | tuple) or len(sizes) != 2:
        fail("Sampler", "unet", "have one or two integers as config.sample_size", repr(size))
    return channels, *sizes
