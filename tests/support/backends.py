"""Where a test of an op runs: its reference, C++ per instruction set, CUDA sources on the CPU, Triton, and a GPU.

A test that takes the fixture ``backend`` and is marked with ``@on_backends(op)`` runs on each backend that has a kernel
of this op. The backend is forced; ``backend.device`` is where its tensors lie::

    @on_backends("solver_step")
    @pytest.mark.parametrize("case", CASES, ids=str)
    def test_values(backend, case):
        x = case.draw().to(backend.device)

``@on_backends(op, cases=CASES)`` does so for each ``case``, where ``case.on`` names the backends that it reaches a
regime of (none: all); ``case.kernel_chosen()``, if it has one, is a context in which that regime's kernel is chosen.

Triton's interpreter needs TRITON_INTERPRET=1 and a process of its own: those cases carry the marker ``interpreter``,
as those of a GPU carry ``gpu``.
"""

import contextlib
from collections.abc import Callable, Iterable, Iterator
from types import ModuleType
from typing import NamedTuple

import cuda_on_host
import pytest
import torch

import kr_fast.ops  # noqa: F401  (registers the kernels)
from kr_fast.backends import native, registry
from kr_fast.backends.calls import Call


class Backend(NamedTuple):
    """What the fixture gives: the forced backend, and where its tensors lie."""

    id: str  # of IDS
    name: str  # of registry.BACKENDS
    device: torch.device
    isa: str | None = None  # instruction set of the backend cpu
    module: ModuleType | None = None  # the CUDA sources built for the CPU, for cuda_on_host.machine and its like

    def require(self, op: str, call: Call) -> None:
        """Skip the test where the backend refuses such a call."""
        reason = registry.refusal(op, self.name, call)
        if reason is not None:
            pytest.skip(f"{op} on {self.id}: {reason}")


ISAS = () if native.cpu is None else tuple(native.cpu.isa_available())
# id of a case -> (backend, markers)
IDS: dict[str, tuple[str, tuple]] = {
    "reference": ("reference", ()),
    **{f"cpu-{isa}": ("cpu", ()) for isa in ISAS},
    "cuda-host": ("cuda", ()),
    "cuda-gpu": ("cuda", (pytest.mark.gpu,)),
    "triton-interpreter": ("triton", (pytest.mark.interpreter,)),
    "triton-gpu": ("triton", (pytest.mark.gpu,)),
}


def on_backends(op: str, *names: str, cases: Iterable = ()) -> pytest.MarkDecorator:
    """The test runs on every backend that has a kernel of ``op``, or on those of ``names`` alone.

    A name is one of registry.BACKENDS, or an id as "cuda-host". With ``cases`` it takes a ``case`` too.
    """
    assert op in registry.ops(), f"no op {op}"
    where = _ids(op, names)
    if not cases:
        return pytest.mark.parametrize(
            "backend", [pytest.param(i, marks=IDS[i][1], id=i) for i in where], indirect=True
        )
    pairs = [
        pytest.param(i, case, marks=IDS[i][1], id=f"{case}-{i}")
        for case in cases
        for i in _ids(op, getattr(case, "on", ()))
        if i in where
    ]
    return pytest.mark.parametrize(("backend", "case"), pairs, indirect=["backend"])


def _ids(op: str, names: Iterable[str]) -> list[str]:
    unknown = set(names) - set(registry.BACKENDS) - IDS.keys()
    assert not unknown, f"no backend {sorted(unknown)}"
    return [i for i, (name, _) in IDS.items() if registry.has(op, name) and (not names or name in names or i in names)]


@contextlib.contextmanager
def in_use(id: str, host_module: Callable[[], ModuleType]) -> Iterator[Backend]:
    """The backend of this id, forced for every op; ``host_module()`` is the module of :mod:`cuda_on_host`."""
    name, _ = IDS[id]
    if id.endswith("-gpu"):
        if registry.unavailable(name):
            pytest.skip(registry.unavailable(name))
        with registry.forced(name):
            yield Backend(id, name, torch.device("cuda"))
    elif id == "cuda-host":
        with cuda_on_host.in_use(host_module()) as module:
            yield Backend(id, name, torch.device("cpu"), module=module)
    elif id.startswith("cpu-"):
        with registry.forced(name), instruction_set(id.removeprefix("cpu-")) as isa:
            yield Backend(id, name, torch.device("cpu"), isa=isa)
    else:
        with registry.forced(name):
            yield Backend(id, name, torch.device("cpu"))


@contextlib.contextmanager
def instruction_set(isa: str) -> Iterator[str]:
    """The C++ kernels use this instruction set."""
    before = native.cpu.isa()
    native.cpu.set_isa(isa)
    try:
        yield isa
    finally:
        native.cpu.set_isa(before)
