"""``fused(model)``: a classifier's modules in training by this package's kernels, undone by ``restore()``."""

import functools

from torch import nn

from kr_fast.backends import native
from kr_fast.runtime.log import logger
from kr_fast.runtime.memory import keep_freed_memory
from kr_fast.training import classifiers
from kr_fast.training.patches import Patches


def fused(model: nn.Module, patches: Patches | None = None) -> Patches:
    """Patch ``model`` for training; what is not taken stays as it is, which the logger says once.

    Args:
        model: any module; float32 on a CPU, or it stays as it is.
        patches: of ``model``, to add to.
    """
    patches = Patches(model) if patches is None else patches
    why = unsupported(model)
    if why is None:
        keep_freed_memory()
        classifiers.fuse(patches, model)
        why = None if patches.patched else "it has no convolution or norm that a kernel here takes"
    tell(patches, why)
    return patches


def unsupported(model: nn.Module) -> str | None:
    """Why no network like this can be patched, whatever its layers are."""
    if native.isa() is None:
        return "kr_fast._cpu is missing"
    others = {f"{p.dtype} on {p.device.type}".removeprefix("torch.") for p in model.parameters()} - {"float32 on cpu"}
    return f"its parameters are {', '.join(sorted(others))}" if others else None


def tell(patches: Patches, why: str | None) -> None:
    """Log what was patched, or why nothing was."""
    counts = ", ".join(f"{count} {name}" for name, count in patches.patched.items())
    _tell(type(patches.model).__name__, f"by this package's kernels: {counts}" if why is None else f"as it is: {why}")


@functools.cache
def _tell(name: str, how: str) -> None:
    logger.info("optimize: %s trains %s", name, how)
