"""From latents to images: an autoencoder of diffusers, by all that its configuration says of latents."""

from typing import Any

import torch
from torch import Tensor

from kr_fast.runtime.errors import UserError, fail, first_line


class Decoder:
    """``vae.decode(x * std / scaling_factor + mean)``, in the autoencoder's dtype; images in [-1, 1].

    ``mean`` is ``latents_mean`` or ``shift_factor`` of the configuration, and ``std`` its ``latents_std``, where it has
    them (else 0 and 1): as the pipelines of Stable Diffusion XL and 3 decode.

    Args:
        vae: diffusers' ``AutoencoderKL``, or a module with its configuration and ``decode``.
        channels: of the latents.
    Raises: UserError for another autoencoder, latents of other channels, or a configuration that says both.
    """

    def __init__(self, vae: Any, channels: int):
        config = getattr(vae, "config", None)
        needed = ("scaling_factor", "block_out_channels", "out_channels", "latent_channels")
        if not callable(getattr(vae, "decode", None)) or any(getattr(config, name, None) is None for name in needed):
            fail("Sampler", "vae", "be diffusers' AutoencoderKL", type(vae).__name__)
        if config.latent_channels != channels:
            fail(
                "Sampler",
                "vae",
                f"decode the network's {channels} channels",
                f"{config.latent_channels} latent_channels",
            )
        shift, mean, std = (getattr(config, name, None) for name in ("shift_factor", "latents_mean", "latents_std"))
        if (mean is None) != (std is None) or (mean is not None and shift is not None):
            rule = "have latents_mean and latents_std, or shift_factor, or none of them"
            fail("Sampler", "vae", rule, f"latents_mean {mean}, latents_std {std}, shift_factor {shift}")
        for name, value in (("latents_mean", mean), ("latents_std", std)):
            if value is not None and len(value) != channels:
                fail("Sampler", "vae", f"have {channels} numbers in {name}", len(value))
        self.vae = vae
        self.factor = 2 ** (len(config.block_out_channels) - 1)
        self.channels = config.out_channels
        self._scaling, self._std = config.scaling_factor, std
        self._shift = mean if mean is not None else shift

    def scaled(self, x: Tensor) -> Tensor:
        """What the autoencoder decodes, of latents ``[B, C, H, W]``."""
        if self._std is not None:
            x = x * _by_channel(self._std, x)
        x = x / self._scaling
        return x if self._shift is None else x + _by_channel(self._shift, x)

    def __call__(self, x: Tensor) -> Tensor:
        """Latents ``[B, C, H, W]`` -> float32 ``[B, channels, H factor, W factor]``. Raises: UserError, for NaN too."""
        expected = [len(x), self.channels, x.shape[2] * self.factor, x.shape[3] * self.factor]
        try:
            images = self.vae.decode(self.scaled(x).to(self.vae.dtype)).sample.float()
        except Exception as error:  # the code of a user
            got = f"the error {type(error).__name__}: {first_line(error)}"
            raise UserError(f"Sampler: vae must decode {list(x.shape)}, got {got}") from error
        if list(images.shape) != expected:
            fail("Sampler", "vae", f"return {expected}", list(images.shape))
        if not bool(images.sum().isfinite()):
            hint = " (force_upcast: it needs float32)" if self.vae.dtype == torch.float16 else ""
            fail("Sampler", "vae", "return finite values", f"NaN or inf in {self.vae.dtype}{hint}")
        return images


def _by_channel(value: Any, like: Tensor) -> Tensor:
    return torch.as_tensor(value, dtype=like.dtype, device=like.device).view(-1, 1, 1)
