"""Fixtures and markers for all tests."""

import contextlib
import os
import shutil

import backends
import cuda_on_host
import hypothesis
import numpy as np
import pytest
import torch

from kr_fast.backends import native, registry
from kr_fast.runtime import progress
from kr_fast.runtime.log import logger
from kr_fast.runtime.storage import manifest

# The same examples in every run: a search for new ones (HYPOTHESIS_PROFILE=search) is not what a change is judged by.
hypothesis.settings.register_profile("fixed", derandomize=True, deadline=None)
hypothesis.settings.register_profile("search", deadline=None, print_blob=True)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "fixed"))


def pytest_addoption(parser):
    parser.addoption("--one-case", action="store_true", help="of each test only the first case on each backend")


def pytest_ignore_collect(collection_path, config):
    """To import all files takes as long as a fifth of the interpreter's tests, which few of them hold."""
    if config.getoption("markexpr") == "interpreter" and collection_path.name.startswith("test_"):
        text = collection_path.read_text()
        return None if "interpreter" in text or "on_backends" in text else True
    return None


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config, items):
    if config.getoption("--one-case"):
        seen = set()
        kept = [item for item in items if (key := _case_on_a_backend(item)) not in seen and not seen.add(key)]
        config.hook.pytest_deselected(items=[item for item in items if item not in set(kept)])
        items[:] = kept
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    reasons = {"gpu": None if torch.cuda.is_available() else "needs an NVIDIA GPU"}
    reasons["interpreter"] = None if interpreted else "needs TRITON_INTERPRET=1"
    reasons["compile"] = "Triton's interpreter replaces its compiler in this process" if interpreted else None
    for item in items:
        if item.get_closest_marker("compile") and not _for_hopper(item):
            item.add_marker(pytest.mark.nightly)
        for marker, reason in reasons.items():
            if reason is not None and item.get_closest_marker(marker):
                item.add_marker(pytest.mark.skip(reason=reason))
        used = getattr(item, "callspec", None) and item.callspec.params.get("backend")
        if cuda_on_host.SANITIZED and used not in (None, "cuda-host"):
            item.add_marker(pytest.mark.skip(reason="only CUDA sources are built with sanitizers"))
        if getattr(native.cpu, "sanitized", False) and used is not None and not used.startswith("cpu-"):
            item.add_marker(pytest.mark.skip(reason="only kr_fast._cpu is built with sanitizers"))


def _for_hopper(item) -> bool:
    """Whether a test compiles for compute capability 9.0, or for none in particular."""
    chosen = getattr(item, "callspec", None)
    return chosen is None or chosen.params.get("capability", 90) in (90, (90,))


def _case_on_a_backend(item) -> tuple:
    """What two cases of a test have in common that differ in their numbers alone."""
    chosen = getattr(item, "callspec", None)
    where = () if chosen is None else tuple(chosen.params.get(name) for name in ("backend", "isa", "cuda_device"))
    return item.path, getattr(item, "cls", None), getattr(item, "originalname", item.name), where


@pytest.fixture(autouse=True)
def _messages_as_they_were():
    """What a command does to the package's messages ends with its test: pytest sees those of the next one."""
    before = list(logger.handlers), logger.level, logger.propagate
    yield
    logger.handlers[:], logger.propagate = before[0], before[2]
    logger.setLevel(before[1])
    progress.quiet(False)


@pytest.fixture(autouse=True)
def _products_in_order(request, monkeypatch):
    """Triton's interpreter takes a tile's product from numpy's BLAS, where a row's bits can depend on its place in the
    tile, on some processors only. Here they do not, as in the matrix units of a GPU."""
    if request.node.get_closest_marker("interpreter"):
        monkeypatch.setattr(np, "matmul", _matmul)


def _matmul(a, b, dtype=None):
    """``a @ b`` summed in the order of the inner axis, in float64."""
    a64, b64 = (np.ascontiguousarray(each, np.float64) for each in (a, b))
    return np.einsum("...mk,...kn->...mn", a64, b64).astype(np.result_type(a, b) if dtype is None else dtype)


@pytest.fixture
def backend(request):
    """The backend that ``@on_backends(op)`` names, forced; see backends.py."""
    chosen = getattr(request.node.callspec.params.get("case"), "kernel_chosen", contextlib.nullcontext)
    with backends.in_use(request.param, lambda: request.getfixturevalue("host_cuda")) as used, chosen():
        yield used


@pytest.fixture(params=backends.ISAS)
def isa(request):
    """Each instruction set that this machine can run."""
    with backends.instruction_set(request.param):
        yield request.param


@pytest.fixture
def reference():
    """Everything on the reference backend."""
    with registry.forced("reference"):
        yield


@pytest.fixture(scope="session")
def host_cuda():
    """``kr_fast._cuda`` for the CPU, see cuda_on_host.py; with sanitizers if the environment asks for them."""
    if cuda_on_host.missing():
        pytest.skip(cuda_on_host.missing())
    return cuda_on_host.load(cuda_on_host.build())


@pytest.fixture(params=["cuda-host", pytest.param("cuda-gpu", marks=pytest.mark.gpu)])
def cuda_device(request):
    """Where the cuda backend runs; it is forced."""
    with backends.in_use(request.param, lambda: request.getfixturevalue("host_cuda")) as used:
        yield used.device


@pytest.fixture
def one_thread():
    """Small work loses more at a barrier than two threads save: seconds where other processes run too."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def no_progress(monkeypatch):
    """No bars among what a command prints."""
    monkeypatch.setenv("KR_FAST_PROGRESS", "0")


@pytest.fixture
def released_run():
    """The folder of a run that the test has opened is free for the next one."""
    yield
    manifest.release()


@pytest.fixture
def by_threads():
    """``by_threads(run)``: what ``run()`` returns with 1, 2 and 3 threads."""
    before = torch.get_num_threads()

    def results(run):
        result = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            result.append(run())
        return result

    yield results
    torch.set_num_threads(before)


@pytest.fixture
def nvcc():
    """The path of nvcc; skips without it."""
    result = shutil.which("nvcc")
    if result is None:
        pytest.skip("needs nvcc")
    return result
