"""The CUDA sources run on the CPU, every thread a fiber (tests/support/cuda_host): the same bits as the C++ kernels.

Element counts: 1, 3: less than one counter of four; 4: one; 75: rows that are not 16-byte aligned; 1024: a block of
threads; 3072: several; 16900: rows of many blocks.
"""

import ctypes
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cuda_on_host import HEADERS, ROOT, SANITIZED, WARNINGS, compile_all, in_use, machine, missing, rewritten, same_bits

import kr_fast
from kr_fast.backends import registry
from kr_fast.backends.calls import Call
from kr_fast.ops.sampling.solver_step import SolverRow, solver_step

pytestmark = pytest.mark.skipif(missing() is not None, reason=str(missing()))
TESTS = Path(__file__).parents[1]
SIZES = [1, 3, 4, 75, 1024, 3072, 16900]
IDS = torch.tensor([0, 5, 2**32 + 1, 2**63 - 1])


@pytest.fixture(scope="session")
def probe(tmp_path_factory):
    folder = tmp_path_factory.mktemp("probe")
    (folder / "probe.cu").write_text(rewritten((HEADERS / "probe.cu").read_text()))
    compile_all([(folder / "probe.cu", ("-O1", *WARNINGS))], ROOT / "csrc", folder / "probe.so")
    library = ctypes.CDLL(str(folder / "probe.so"))
    library.probe_error.restype = ctypes.c_char_p
    return library


def address(tensor: torch.Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(tensor.data_ptr())


@pytest.mark.parametrize(("blocks", "threads"), [(1, 32), (3, 64), (2, 1024)])
def test_fibers_run_shuffles_shared_memory_and_barriers(probe, blocks, threads):
    x, out = torch.arange(float(blocks * threads)), torch.zeros(blocks)
    assert probe.probe_sum(address(x), address(out), blocks, threads, threads // 32 * 4) == 0
    assert torch.equal(out, x.view(blocks, threads).sum(1))


@pytest.mark.parametrize(("blocks", "threads", "shared"), [(0, 32, 4), (1, 0, 4), (1, 1056, 132), (1, 32, 49153)])
def test_fibers_refuse_launches_that_a_gpu_refuses(probe, blocks, threads, shared):
    x = torch.zeros(2048)
    assert probe.probe_sum(address(x), address(x), blocks, threads, shared) == 9


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        (1, "deadlock in block 0: thread 0 waits at __shfl_xor_sync|lane 7, which has left"),
        (2, "collective whose lanes differ: thread 0 waits at __shfl_xor_sync, line"),
        (3, "deadlock|barrier that threads reach in different places"),
        (4, "shuffle from lane 20, which is not in its mask"),
        (5, "collective by a lane outside its mask"),
        (6, "deadlock in block 0: thread 0 waits at __syncwarp"),
    ],
)
def test_fibers_report_faults(probe, kind, text):
    out = torch.zeros(64)
    assert probe.probe_fault(kind, address(out)) == 719
    assert re.search(text, probe.probe_error().decode()), probe.probe_error()
    assert probe.probe_fault(0, address(out)) == 0  # and go on working
    assert out.sum() == 64


def test_a_missing_barrier_shows_in_the_other_order(probe):
    result = []
    for descending in (False, True):
        out = torch.zeros(64)
        assert probe.probe_race(address(out), descending) == 0
        result.append(out)
    assert not torch.equal(*result)


@pytest.mark.parametrize(("blocks", "size", "threads"), [(1, 1, 32), (2, 1, 32), (6, 2, 64), (16, 8, 256)])
@pytest.mark.parametrize("descending", [False, True])
def test_blocks_of_a_cluster_write_to_each_other(probe, blocks, size, threads, descending):
    x, out, rows = torch.arange(float(blocks)), torch.zeros(blocks), 5
    assert probe.probe_cluster(address(x), address(out), blocks, size, threads, rows, descending) == 0
    one = torch.zeros(1)
    assert probe.probe_cluster(address(one), address(one), 1, 1, 32, 1, False) == 0  # leaves the order as it was
    sums = (x + rows - 1).view(-1, size).sum(1, keepdim=True)
    assert torch.equal(out.view(-1, size), sums.expand(-1, size))


@pytest.mark.parametrize(("blocks", "size", "threads"), [(3, 2, 32), (16, 16, 32), (2, 2, 40)])
def test_clusters_that_a_gpu_refuses(probe, blocks, size, threads):
    x = torch.zeros(64)
    assert probe.probe_cluster(address(x), address(x), blocks, size, threads, 1, False) == 9


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        (1, "second arrival at the cluster's barrier"),
        (2, "wait at the cluster's barrier without an arrival"),
        (3, "mapping of what is not dynamic shared memory"),
        (4, "mapping to block 2, which the cluster has not"),
        (5, "deadlock in block 0: thread 0 waits at cluster_wait"),
    ],
)
def test_faults_of_clusters_are_reported(probe, kind, text):
    out = torch.zeros(2)
    assert probe.probe_cluster_fault(kind, address(out)) == 719
    assert re.search(text, probe.probe_error().decode()), probe.probe_error()
    assert probe.probe_cluster_fault(0, address(out)) == 0  # and go on working
    assert out.tolist() == [1, 0]


def test_copies_arrive_when_they_are_waited_for(probe):
    x, out = torch.arange(12.0), torch.zeros(12)
    assert probe.probe_bulk(0, address(x), address(out), 3) == 0
    assert torch.equal(out, x)
    probe.probe_bulk(2, address(x), address(out), 1)  # does not wait
    assert out[:4].isnan().all()
    for kind, text in ((1, "not 16-byte aligned"), (3, "not announced or not made"), (4, "announced twice")):
        assert probe.probe_bulk(kind, address(x), address(out), 1) == 719
        assert re.search(text, probe.probe_error().decode()), probe.probe_error()


@pytest.mark.sanitize
@pytest.mark.parametrize("numel", SIZES)
def test_normals_have_the_bits_of_the_cpu(host_cuda, numel):
    expected = kr_fast.philox_normal(IDS, (numel,), seed=2**62 + 5, stream=3)
    with in_use(host_cuda):
        assert same_bits(kr_fast.philox_normal(IDS, (numel,), seed=2**62 + 5, stream=3), expected)


ROWS = {
    "clip": SolverRow(x0_sample=1.3, x0_model=-0.9, clip=1.0, sample=0.1, model=0.3, x0=0.8),
    "noise": SolverRow(sample=0.9, model=-0.2, noise=0.4),
    "everything": SolverRow(1.3, -0.9, 0.7, 0.1, 0.3, 0.8, 0.25, 1.0, (0.5, -0.25, 0.125, -1.5)),
}


@pytest.mark.sanitize
@pytest.mark.parametrize("numel", SIZES)
@pytest.mark.parametrize("name", ROWS)
@pytest.mark.parametrize("guided", [False, True])
@pytest.mark.parametrize("offset", [0, 1])  # in elements, of the base addresses: 16-byte aligned or not
def test_solver_steps_have_the_bits_of_the_cpu(host_cuda, numel, name, guided, offset):
    torch.manual_seed(numel)
    row, count = ROWS[name], len(IDS) * numel
    x, e, u, *history = (
        torch.randn(count + offset)[offset:].view(len(IDS), numel) for _ in range(3 + len(ROWS[name].history))
    )
    more = {"uncond_output": u, "guidance_scale": 2.5} if guided else {}
    options = {"history": tuple(history), "ids": IDS, "seed": 9, "stream": 4, **more}
    expected = solver_step(x, e, row, **options)
    with in_use(host_cuda):
        assert same_bits(solver_step(x, e, row, **options), expected)


@pytest.mark.sanitize
@pytest.mark.parametrize("most_blocks", [1, 3])
def test_grid_strides_and_order_do_not_matter(host_cuda, most_blocks):
    """Few blocks, so that threads take several items, and threads from the last to the first."""
    x, e = torch.randn(4, 3072), torch.randn(4, 3072)
    options = {"ids": IDS, "seed": 9, "stream": 4}
    expected = kr_fast.philox_normal(IDS, (3072,), seed=1), solver_step(x, e, ROWS["noise"], **options)
    with in_use(host_cuda), machine(host_cuda, descending=True, most_blocks=most_blocks):
        assert same_bits(kr_fast.philox_normal(IDS, (3072,), seed=1), expected[0])
        assert same_bits(solver_step(x, e, ROWS["noise"], **options), expected[1])


@pytest.mark.skipif(SANITIZED, reason="is that run")
def test_no_access_is_out_of_bounds(tmp_path):
    """The tests marked ``sanitize`` once more, with address and undefined-behaviour sanitizers in every kernel."""
    # libstdc++ too, or an exception that is thrown before it is there ends the process.
    libraries = [
        subprocess.run(["g++", f"-print-file-name={name}"], capture_output=True, text=True).stdout.strip()
        for name in ("libasan.so", "libstdc++.so.6")
    ]
    if not all(Path(library).is_absolute() for library in libraries):
        pytest.skip("needs libasan")
    more = {"LD_PRELOAD": " ".join(libraries), "ASAN_OPTIONS": "detect_leaks=0:verify_asan_link_order=0"}
    more |= {"CUDA_ON_HOST_SANITIZED": "1", "CUDA_ON_HOST_UNUSED": str(tmp_path / "unused")}
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-m", "sanitize"]
    command += [TESTS / "ops", TESTS / "backends"]
    done = subprocess.run(command, env={**os.environ, **more}, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]
    # Functions of the module that no such test called: the two which launch nothing.
    unused = set((tmp_path / "unused").read_text().split())
    assert unused <= {"distillation_loss_cluster", "distillation_loss_use_clusters", "cuda_version"}


def test_the_backend_is_left_as_it_was(host_cuda):
    before = registry.refusal("philox_normal", "cuda", Call("cpu", torch.float32))
    with in_use(host_cuda):
        assert registry.refusal("philox_normal", "cuda", Call("cpu", torch.float32)) is None
    assert registry.refusal("philox_normal", "cuda", Call("cpu", torch.float32)) == before
