"""The forwards that :func:`kr_fast.optimize` puts in the place of those of diffusers' ``DiTTransformer2DModel``.

Every block of a DiT owns an embedding of (timestep, class) and a projection of it to six shifts, scales and gates: half
of the network's kernels. Here they are computed once a class for one timestep, or looked up (Peebles and Xie, "Scalable
Diffusion Models with Transformers", ICCV 2023, section 3.2, adaLN-Zero).
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kr_fast.synthesis.optimized.calls import check_call, check_hooks
from kr_fast.synthesis.optimized.fast_blocks import attend, join_qkv, linear


def modulated(x: Tensor, eps: float, shift: Tensor, scale: Tensor) -> Tensor:
    """``norm(x) * scale + shift``; the projection's bias already holds the 1 of ``1 + scale``."""
    return torch.addcmul(shift[:, None], F.layer_norm(x, x.shape[-1:], eps=eps), scale[:, None])


def conditions(embedder: Any, timestep: Tensor, class_labels: Tensor | None, dtype: torch.dtype) -> Tensor:
    """SiLU of one block's embedding: a row for each label, or for every class where ``class_labels`` is None."""
    time = embedder.timestep_embedder(embedder.time_proj(timestep).to(dtype))
    table = embedder.class_embedder.embedding_table
    return F.silu(time + (table.weight if class_labels is None else table(class_labels)))


def all_rows(self: Any, timestep: Tensor, class_labels: Tensor | None) -> Tensor:
    """``[rows, columns]``: the six vectors of every block, then shift and scale of the output."""
    parts = []
    for block in self.transformer_blocks:
        hidden = conditions(block.norm1.emb, timestep, class_labels, self.proj_out_1.weight.dtype)
        parts.append(F.linear(hidden, block.norm1.linear.weight, block._kr_fast_bias))
        if len(parts) == 1:
            last = F.linear(hidden, self.proj_out_1.weight, self._kr_fast_bias)
    return torch.cat([*parts, last], 1)


def rows_of(self: Any, count: int, timestep: Tensor, class_labels: Tensor, step: Tensor | None) -> Tensor:
    table = getattr(self, "_kr_fast_table", None)
    if step is not None:
        return table.flatten(0, 1).index_select(0, step * table.shape[1] + class_labels)
    embeddings = self.transformer_blocks[0].norm1.emb.class_embedder.embedding_table.num_embeddings
    if timestep.numel() == 1 and embeddings <= count:
        return all_rows(self, timestep.reshape(1), None).index_select(0, class_labels)
    return all_rows(self, timestep.reshape(1) if timestep.numel() == 1 else timestep, class_labels)


def through(layers: nn.ModuleList, x: Tensor) -> Tensor:
    """The layers one after the other, their products by :func:`linear`."""
    for layer in layers:
        if type(layer) is nn.Linear:
            x = linear(x, layer.weight, layer.bias)
        elif type(layer).__name__ == "GELU" and type(getattr(layer, "proj", None)) is nn.Linear:
            x = F.gelu(linear(x, layer.proj.weight, layer.proj.bias), approximate=layer.approximate)
        else:
            x = layer(x)
    return x


def block(self: Any, x: Tensor, row: Tensor) -> Tensor:
    """``BasicTransformerBlock`` with adaLN-Zero, its six vectors given."""
    shift, scale, gate, shift_mlp, scale_mlp, gate_mlp = row.chunk(6, dim=1)
    h = modulated(x, self.norm1.norm.eps, shift, scale)
    h = attend(linear(h, self._kr_fast_qkv_weight, self._kr_fast_qkv_bias), self.attn1.heads)
    x = torch.addcmul(x, gate[:, None], through(self.attn1.to_out, h))
    h = through(self.ff.net, modulated(x, self.norm3.eps, shift_mlp, scale_mlp))
    return torch.addcmul(x, gate_mlp[:, None], h)


def attention_alone(self: Any, hidden_states: Tensor, encoder_hidden_states: Any = None, *args: Any, **kwargs: Any):
    """``Attention`` of a block of a DiT over its own tokens, as it is in training."""
    if encoder_hidden_states is not None or args or any(value is not None for value in kwargs.values()):
        return type(self).forward(self, hidden_states, encoder_hidden_states, *args, **kwargs)
    check_hooks(self)
    weight, bias = join_qkv(self)
    return through(self.to_out, attend(linear(hidden_states, weight[:, :, 0, 0], bias), self.heads))


def product(self: Any, input: Tensor) -> Tensor:
    """A ``Linear`` by :func:`linear`."""
    return linear(input, self.weight, self.bias) if input.ndim == 3 else F.linear(input, self.weight, self.bias)


def dit(
    self: Any,
    hidden_states: Tensor,
    timestep: Tensor | float | int | None = None,
    class_labels: Tensor | None = None,
    cross_attention_kwargs: dict[str, Any] | None = None,
    return_dict: bool = True,
    *,
    step: Tensor | None = None,
) -> Any:
    """``DiTTransformer2DModel``; ``step`` indexes the timesteps of ``prepare_steps`` and replaces ``timestep``."""
    from diffusers.models.modeling_outputs import Transformer2DModelOutput

    check_call(self, class_labels, step)
    timestep = torch.as_tensor(0 if timestep is None else timestep, device=hidden_states.device)
    rows = rows_of(self, len(hidden_states), timestep, class_labels, step)
    x, start = self.pos_embed(hidden_states), 0
    for each in self.transformer_blocks:
        stop = start + len(each._kr_fast_bias)
        x, start = block(each, x, rows[:, start:stop]), stop
    shift, scale = rows[:, start:].chunk(2, dim=1)
    x = self.proj_out_2(modulated(x, self.norm_out.eps, shift, scale))
    side, patch = int(x.shape[1] ** 0.5), self.patch_size
    x = x.view(-1, side, side, patch, patch, self.out_channels).permute(0, 5, 1, 3, 2, 4)
    x = x.reshape(-1, self.out_channels, side * patch, side * patch)
    return Transformer2DModelOutput(sample=x) if return_dict else (x,)


def refusal(model: Any) -> str | None:
    """What of a DiT is not as this file has it."""
    from diffusers.models.attention import BasicTransformerBlock

    for each in model.transformer_blocks:
        if type(each) is not BasicTransformerBlock or each.norm_type != "ada_norm_zero":
            return type(each).__name__ if type(each) is not BasicTransformerBlock else each.norm_type
        if each.attn2 is not None or each.pos_embed is not None or getattr(each, "fuser", None) is not None:
            return "a block with cross-attention or position embeddings of its own"
        if type(each.norm1.norm) is not nn.LayerNorm or each.norm3.elementwise_affine or each._chunk_size is not None:
            return "norms with weights, in float32, or a chunked feed-forward"
        if type(each.attn1.processor).__name__ not in ("AttnProcessor", "AttnProcessor2_0"):
            return type(each.attn1.processor).__name__
        if each.attn1.norm_q is not None or each.attn1.norm_k is not None:
            return "norms of queries or keys"
        attention = each.attn1
        for layer in (attention.to_q, attention.to_k, attention.to_v, each.norm1.linear, model.proj_out_1):
            if type(layer) is not nn.Linear:  # their weights are joined or read, so an adapter would be lost
                return f"{type(layer).__name__} in the place of a linear layer"
        if type(each.norm1.emb.class_embedder.embedding_table) is not nn.Embedding:
            return f"{type(each.norm1.emb.class_embedder.embedding_table).__name__} in the place of class embeddings"
    return None


def joined(model: Any) -> list[tuple[nn.Module, str, Tensor | None]]:
    """(module, name, tensor) of the weights made from the model's own."""
    tensors: list[tuple[nn.Module, str, Tensor | None]] = []
    for each in model.transformer_blocks:
        layers = (each.attn1.to_q, each.attn1.to_k, each.attn1.to_v)
        tensors.append((each, "_kr_fast_qkv_weight", torch.cat([layer.weight for layer in layers])))
        bias = None if layers[0].bias is None else torch.cat([layer.bias for layer in layers])
        tensors.append((each, "_kr_fast_qkv_bias", bias))
        linear = each.norm1.linear
        bias = torch.zeros_like(linear.weight[:, 0]) if linear.bias is None else linear.bias.clone()
        bias.view(6, -1)[[1, 4]] += 1  # of 1 + scale
        tensors.append((each, "_kr_fast_bias", bias))
    bias = model.proj_out_1.bias.clone()
    bias.view(2, -1)[1] += 1
    return [*tensors, (model, "_kr_fast_bias", bias)]
