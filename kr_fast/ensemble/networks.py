"""Networks that a user brings: made and asked in one place, where every failure of their code is one line.

What is asked of a network is ``[N, C]`` logits for images. Its code may raise anything and return anything; here that
becomes ``where: argument must return [N, C] logits for H x W x C images, got ...`` with the network's own words.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter

from kr_fast.runtime.errors import UserError, fail, first_line
from kr_fast.runtime.inputs import described
from kr_fast.runtime.logits import not_logits

TORCHSCRIPT = "The following operation failed in the TorchScript interpreter"


class LogitsOf(nn.Module):
    """A network whose output holds the logits, as one that returns them.

    Taken are ``output.logits``, ``output["logits"]`` and a tuple of one tensor. A tensor stays as it is.

    Args:
        network: its weights are those of this module, under ``network.``.
    """

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        """float ``[N, C, H, W]`` -> logits ``[N, K]``."""
        return logits_of(self.network(x))


def logits_of(output: Any) -> Any:
    """The logits in a network's output where it is certain which they are, else the output as it is."""
    if isinstance(output, Tensor | fx.Proxy):
        return output
    logits = None
    if isinstance(output, Mapping):
        logits = output.get("logits")
    elif isinstance(output, tuple | list) and len(output) == 1:
        logits = output[0]
    else:
        with contextlib.suppress(Exception):  # a property of the user's own
            logits = output.logits
    return logits if isinstance(logits, Tensor | fx.Proxy) else output


def plain(model: nn.Module) -> nn.Module:
    """The user's own network, whose names a checkpoint has: without :class:`LogitsOf`."""
    return model.network if isinstance(model, LogitsOf) else model


def error_text(error: BaseException) -> str:
    """What a user's code says of its failure, in one line, with the type unless that says nothing more."""
    text = first_line(error)
    if text.startswith(TORCHSCRIPT):
        text = str(error).strip().splitlines()[-1].strip()
    kind = type(error).__name__
    return text if text == kind or type(error) in (RuntimeError, UserError) else f"{kind}: {text}"


def made(where: str, argument: str, make: Callable[[], Any], rule: str = "return a torch module") -> nn.Module:
    """What a user's ``make()`` returns: a torch module with all its sizes.

    Raises: UserError with the words of whatever ``make`` raises, an exit of the program included.
    """
    if isinstance(make, nn.Module) or not callable(make):
        got = f"the network itself, {an(type(make).__name__)}" if isinstance(make, nn.Module) else described(make)
        fail(where, argument, "be a function that returns a torch module", got)
    try:
        model = make()
    except (Exception, SystemExit) as error:
        raise UserError(f"{where}: {argument} must {rule}, got the error {error_text(error)}") from error
    if isinstance(model, type) and issubclass(model, nn.Module):
        fail(where, argument, rule, f"the class {model.__name__} and not an object of it")
    if not isinstance(model, nn.Module):
        fail(where, argument, rule, _shown(model))
    check_sizes(where, argument, model)
    return model


def check_sizes(where: str, argument: str, model: nn.Module) -> None:
    """Refuse lazy modules, whose weights have no sizes before the first images."""
    for name, value in (*model.named_parameters(), *model.named_buffers()):
        if isinstance(value, UninitializedParameter | UninitializedBuffer):
            part = type(model.get_submodule(name.rpartition(".")[0])).__name__
            hint = "give them, or call the network once on images where it is made"
            fail(where, argument, "be a torch module with all its sizes", f"{an(part)} without ({name}; {hint})")


def check_saved(where: str, argument: str, model: nn.Module) -> None:
    """Refuse a network that a file of weights cannot hold."""
    for name, value in model.state_dict().items():
        if not isinstance(value, Tensor):
            fail(where, argument, "have a state dict of tensors alone", f"{name}, {an(type(value).__name__)}")


def not_finite(model: nn.Module) -> str | None:
    """The first weight or buffer that holds NaN or an infinity."""
    for name, value in (*model.named_parameters(), *model.named_buffers()):
        if value.is_floating_point() and not bool(torch.isfinite(value).all()):
            return name
    return None


def check_fresh(where: str, argument: str, first: nn.Module, second: nn.Module) -> None:
    """Refuse two results of one ``make`` that are one object, or whose training writes into the same memory."""
    if first is second:
        fail(where, argument, "return a fresh module at every call", "the same object twice")
    written = {_memory(value) for _, value in _trained(first)}
    for name, value in _trained(second):
        if _memory(value) in written:
            fail(where, argument, "return a fresh module at every call", f"{name} of the call before once more")


def _trained(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """What training writes to: weights with a gradient, and running statistics. Constants may be shared."""
    yield from ((name, value) for name, value in model.named_parameters() if value.requires_grad)
    for name, part in model.named_modules():
        if isinstance(part, nn.modules.batchnorm._NormBase):
            yield from part.named_buffers(name)


def _memory(value: Tensor) -> int:
    """Where its numbers lie; two weights that were made of one tensor are two objects."""
    return value.untyped_storage().data_ptr() or id(value)


def device_of(model: nn.Module) -> torch.device:
    """Where the first of its weights lies; the CPU where it has none."""
    return next((value.device for value in (*model.parameters(), *model.buffers())), torch.device("cpu"))


def fitted(model: nn.Module, x: Tensor) -> Tensor:
    """Images on the network's device and in the dtype of its weights."""
    dtype = next((value.dtype for value in model.parameters() if value.is_floating_point()), x.dtype)
    return x.to(device_of(model), dtype)


def answers_rule(shape: tuple[int, ...], classes: int | None = None) -> str:
    """What is asked of a network for images ``[N, C, H, W]`` of ``shape``."""
    _, channels, height, width = shape
    return f"return [N, {classes or 'C'}] logits for {height} x {width} x {channels} images"


@contextlib.contextmanager
def failures(where: str, argument: str, rule: str) -> Iterator[None]:
    """Whatever the user's network raises inside as one line with its own words.

    Raises: UserError ``where: argument must RULE, got the error ...``.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{where}: {argument} must {rule}, got the error {error_text(error)}") from error


def checked(where: str, argument: str, output: Any, x: Tensor, classes: int | None = None) -> Tensor:
    """A network's output for ``x`` ``[N, C, H, W]`` if it is floating ``[N, classes]``, 2 or more, on x's device.

    Raises: UserError, with what to write where that is known.
    """
    if isinstance(output, Tensor):
        right = output.ndim == 2 and len(output) == len(x) and output.shape[1] == (classes or max(output.shape[1], 2))
        if right and output.dtype.is_floating_point and output.device == x.device:
            return output
    got = _shown(output)
    if not isinstance(output, Tensor):
        taken = isinstance(logits_of(output), Tensor)
        got += " (kr_fast.ensemble.LogitsOf(model) takes its logits)" if taken else " (return the logits alone)"
    elif not output.dtype.is_floating_point:
        got = described(output)
    elif output.ndim == 4 and output.shape[2:] == (1, 1):
        got += " (return x.flatten(1))"
    elif classes in (None, 2) and (output.ndim == 1 or output.shape[1:] == (1,)):
        got += " (one logit z for two classes is torch.stack([torch.zeros_like(z), z], 1) with z of [N])"
    elif output.device != x.device:
        got += f" on {output.device} for images on {x.device}"
    fail(where, argument, answers_rule(x.shape, classes), got)


def answer(where: str, argument: str, model: nn.Module, x: Tensor, classes: int | None = None) -> Tensor:
    """``model(x)`` as it is, which is :func:`checked`. Raises: UserError for any failure of its code."""
    with failures(where, argument, answers_rule(x.shape, classes)):
        output = model(x)
    return checked(where, argument, output, x, classes)


def ask(
    where: str,
    argument: str,
    model: nn.Module,
    x: Tensor,
    classes: int | None = None,
    *,
    training: bool = False,
    finite: bool = True,
) -> Tensor:
    """Logits ``[N, classes]`` of a user's network, or one line that says what it does instead.

    The network and its modes are left as they were found, but for running statistics with ``training``.

    Args:
        where, argument: for errors, ``where: argument must ...``.
        x: float ``[N, C, H, W]``, images as the network is shown them.
        classes: how many logits it must return; None for any number.
        training: ask as a training step does: in training mode, for logits that have a gradient.
        finite: whether the logits must be; those of a deep network that was not trained yet need not in eval mode.
    Raises: UserError for any failure of its code, another output, numbers that are not finite, and probabilities.
    """
    rule = answers_rule(x.shape, classes)
    # Not inference_mode: what a network makes at its first call and keeps could not be trained with.
    with failures(where, argument, rule), mode(model, training), torch.set_grad_enabled(training):
        output = model(x.clone())  # a forward may write into its input
    logits = checked(where, argument, output, x, classes)
    if training and not logits.requires_grad:
        fail(where, argument, f"{rule} that have a gradient", "logits without (no weight is trained, or no_grad is on)")
    values = logits.detach()
    if finite and not bool(torch.isfinite(values).all()):
        name = not_finite(model)
        fail(where, argument, f"{rule} that are finite", "NaN or inf" + (f", which its {name} holds" if name else ""))
    if what := not_logits(values):
        hint = "not labels" if "labels" in what else "remove its softmax"
        fail(where, argument, f"return logits ({hint})", what)
    if bool(((values >= 0) & (values <= 1)).all()) and _ends_in_sigmoid(model, x):
        fail(where, argument, "return logits (remove its sigmoid)", "the outputs of a sigmoid")
    return logits


def takes_logits(
    where: str,
    argument: str,
    make: Callable[[], Any],
    x: Tensor,
    classes: int | None = None,
    rule: str = "return a torch module",
) -> Callable[[], nn.Module]:
    """``make``, with :class:`LogitsOf` around what it makes if that answers ``x`` in a form that needs it.

    Raises: UserError for any failure of ``make`` and of the network.
    """
    model = made(where, argument, make, rule)
    x = fitted(model, x)
    with failures(where, argument, answers_rule(x.shape, classes)), mode(model, False), torch.no_grad():
        output = model(x.clone())
    if isinstance(output, Tensor) or not isinstance(logits_of(output), Tensor):
        return make
    return functools.partial(_wrapped, make)


def _wrapped(make: Callable[[], nn.Module]) -> LogitsOf:
    return LogitsOf(make())


@contextlib.contextmanager
def mode(model: nn.Module, training: bool) -> Iterator[None]:
    """Training or eval mode inside, and each module's own again behind."""
    before = [(part, part.training) for part in model.modules()]
    model.train(training)
    try:
        yield
    finally:
        for part, mode in before:
            part.training = mode


def _ends_in_sigmoid(model: nn.Module, x: Tensor) -> bool:
    """Whether the last step of its forward is a sigmoid, as far as autograd knows. Values alone cannot tell."""
    with contextlib.suppress(Exception), mode(model, False), torch.enable_grad():
        # Not a leaf, for a forward may write into it; it has a gradient where no weight has one.
        step = model(x.clone().requires_grad_() * 1).grad_fn
        return step is not None and step.name().startswith("Sigmoid")
    return False


def _shown(output: Any) -> str:
    """An output in a few words."""
    if isinstance(output, Tensor):
        return str(list(output.shape))
    if output is None:
        return "None"
    if isinstance(output, np.ndarray):
        return f"a numpy array {described(output)}"
    if isinstance(output, Mapping):
        return an(f"{type(output).__name__} of {', '.join(map(str, list(output)[:5])) or 'nothing'}")
    return an(described(output))


def an(words: str) -> str:
    """``words`` behind an article."""
    return f"{'an' if words[0].lower() in 'aeiou' else 'a'} {words}"
