"""Which models and optimizers a private step takes; what it does not take is named, with what to do."""

from typing import Any

import torch
from torch import Tensor, nn

from kr_fast.privacy.convolutions import Form
from kr_fast.privacy.rules import RULES
from kr_fast.runtime.errors import UserError, fail
from kr_fast.training.ema import EMA

OP = "make_private"
# Wrappers that gather gradients of their own, by the names of their classes.
_WRAPPERS = ("DataParallel", "DistributedDataParallel", "FullyShardedDataParallel", "FSDPModule", "OptimizedModule")


def check(model: Any, optimizer: Any, ema: Any) -> dict[str, nn.Parameter]:
    """The trained parameters by their names.

    Raises: UserError naming the module or parameter.
    """
    if not isinstance(model, nn.Module):
        fail(OP, "model", "be a torch module", type(model).__name__)
    if not isinstance(optimizer, torch.optim.Optimizer):
        fail(OP, "optimizer", "be a torch optimizer", type(optimizer).__name__)
    for name, module in model.named_modules(remove_duplicate=True):
        _check_module(name or type(model).__name__, module)
    _check_shared(model)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not trained:
        fail(OP, "model", "have at least one parameter that requires a gradient", "none")
    first = next(iter(trained.values()))
    for name, p in trained.items():
        if p.dtype != torch.float32 or p.device != first.device:
            rule = f"have float32 parameters on one device ({first.device}; autocast the forward for less)"
            fail(OP, "model", rule, f"{name}: {p.dtype} on {p.device}")
    _check_optimizer(trained, optimizer)
    if ema is not None and not isinstance(ema, EMA):
        fail(OP, "ema", "be a kr_fast.training.EMA", type(ema).__name__)
    if ema is not None and not {id(p) for p in ema.parameters} <= {id(p) for p in model.parameters()}:
        fail(OP, "ema", "average parameters of the model alone", "those of another")
    return trained


def check_as_made(trained: dict[str, nn.Parameter], model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Refuse what changed since: an unfrozen parameter would move by its plain gradient, without clipping and noise."""
    now = {name: p for name, p in model.named_parameters() if p.requires_grad}
    for name in {**trained, **now}:
        if trained.get(name) is not now.get(name):
            rule = "train the parameters that it did in make_private (after a change restore(), and make_private again)"
            fail("step", "model", rule, f"a change of {name}")
    _check_optimizer(trained, optimizer)


def read_elsewhere(name: str, grad: Tensor) -> None:
    """What autograd calls with a gradient by the trained parameter ``name``."""
    rule = "read trained parameters in their layers' forwards alone (untie weights, give the optimizer weight_decay in"
    fail("backward", "model", f"{rule} the place of a penalty on them)", f"a gradient of {name} from elsewhere")


def _check_module(name: str, module: Any) -> None:
    kind = type(module)
    if kind.__name__ in _WRAPPERS:
        fail(OP, "model", "be the network itself (step() sums over the processes)", f"{kind.__name__} around it")
    if isinstance(module, nn.modules.batchnorm._BatchNorm):
        rule = "have no layer that mixes records (use nn.GroupNorm; kr_fast.models.classifier: 'resnet14-gn')"
        fail(OP, "model", rule, f"{name}: {kind.__name__}")
    if isinstance(module, nn.modules.instancenorm._InstanceNorm) and module.track_running_stats:
        rule = "keep no statistics of records (track_running_stats=False)"
        fail(OP, "model", rule, f"{name}: {kind.__name__}")
    own = {each for each, p in module.named_parameters(recurse=False) if p.requires_grad}
    if not own:
        return
    if kind not in RULES:
        rule = (
            f"have parameters in {', '.join(each.__name__ for each in RULES)} alone (elsewhere make them of these, or"
        )
        fail(OP, "model", f"{rule} freeze them with requires_grad_(False))", f"{name}: {kind.__name__}")
    if further := sorted(own - {"weight", "bias"}):  # of old weight_norm or spectral_norm: what a hook makes weights of
        rule = "train weight and bias alone in such a layer (undo what made others, or freeze them)"
        fail(OP, "model", rule, f"{name}: {kind.__name__} with {', '.join(further)}")
    if "forward" in vars(module):
        rule = "have its own forwards (call restore() on what kr_fast.optimize or make_private gave)"
        fail(OP, "model", rule, f"another one at {name}")
    why = _refusal(module)
    if why is not None:
        fail(OP, "model", why[0], f"{name}: {why[1]}")


def _refusal(module: Any) -> tuple[str, str] | None:
    """(rule, what was found) of a layer whose kind is known."""
    if type(module) is nn.Conv2d:
        if module.padding_mode != "zeros":
            return (
                "pad convolutions with zeros (or by a module of its own before)",
                f"padding_mode={module.padding_mode}",
            )
        try:
            Form.of(module)
        except ValueError as error:
            return "pad convolutions alike on all sides", str(error)
    if type(module) is nn.Embedding:
        if module.scale_grad_by_freq:
            return "have no layer that mixes records", "scale_grad_by_freq, which counts over the batch"
        for option in ("max_norm", "sparse"):
            if getattr(module, option):
                return f"have embeddings without {option}", f"{option}={getattr(module, option)}"
    return None


def _check_shared(model: nn.Module) -> None:
    owners: dict[int, str] = {}
    for name, p in model.named_parameters(remove_duplicate=False):
        module = model.get_submodule(name.rpartition(".")[0])
        key = f"{id(module)} {name.rpartition('.')[2]}"  # a module that stands in two places is one layer
        if p.requires_grad and owners.setdefault(id(p), f"{key}\n{name}").partition("\n")[0] != key:
            first = owners[id(p)].partition("\n")[2]
            rule = "have each trained parameter in one layer (untie them, or call the one module twice)"
            fail(OP, "model", rule, f"{name}, which is {first}")


def _check_optimizer(trained: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer) -> None:
    given = {id(p): p for group in optimizer.param_groups for p in group["params"]}
    for name, p in trained.items():
        if id(p) not in given:
            rule = "have all of the model's trained parameters (or freeze those with requires_grad_(False))"
            fail(OP, "optimizer", rule, f"none of {name}")
    names = {id(p) for p in trained.values()}
    strange = [p for key, p in given.items() if key not in names and p.requires_grad]
    if strange:
        raise UserError(
            f"{OP}: optimizer must have parameters of the model alone, got {len(strange)} others, of which the first "
            f"is {list(strange[0].shape)}"
        )
