"""distillation_loss anywhere in memory, in any order of threads, on streams and in graphs, and beyond 2^31 elements.

Which of the CUDA kernels has a row, of a thread, of lanes, a block or a cluster of blocks, is in distillation_cases.py.
"""

import contextlib
import math
import threading
import types

import pytest
import torch
from backends import on_backends
from cuda_on_host import device as host_device
from cuda_on_host import in_use, machine, same_bits
from distillation_cases import DTYPES, case_at, close, compare, draw, each_kernel, on, oracle

from kr_fast.backends import native
from kr_fast.backends.cuda import distillation as cuda
from kr_fast.ops.distillation.distillation_loss import distillation_loss, distillation_loss_and_grad
from kr_fast.ops.distillation.distillation_metrics import distillation_metrics

# (classes, student, teacher): blocks of a cluster on a device with 228 KB of shared memory a multiprocessor
BLOCKS = {
    (16_384, 1, 1): 0, (16_385, 1, 1): 1, (16_385, 2, 2): 1, (16_385, 0, 0): 2, (32_000, 1, 1): 2, (32_000, 0, 1): 4,
    (32_000, 0, 0): 4, (72_000, 1, 1): 4, (75_000, 1, 1): 8, (128_256, 1, 1): 8, (128_256, 0, 0): 8, (256_000, 1, 1): 8,
    (256_000, 1, 0): 8, (256_000, 0, 0): 0,
}  # fmt: skip
on_cuda, on_gpu = on_backends("distillation_loss", "cuda"), on_backends("distillation_loss", "cuda-gpu", "triton-gpu")


def test_which_rows_a_cluster_holds(host_cuda):
    cluster = host_cuda.distillation_loss_cluster
    assert {call: cluster(*call) for call in BLOCKS} == BLOCKS
    # An H100 compiles the PTX of a build for 8.0+PTX, in which the kernel has no body.
    for missing in ({"compute_capability": 89}, {"most_clusters": 0}, {"compiled_for": 80}, {"compiled_for": 89}):
        with host_device(host_cuda, **missing):
            cluster(20_000, 1, 1)  # another call, so that the device is asked again
            assert cluster(40_000, 1, 1) == 0
    host_cuda.distillation_loss_use_clusters(False)
    assert cluster(32_000, 1, 1) == 0
    host_cuda.distillation_loss_use_clusters(True)


# By bytes of a row in float32 and half precision: of a thread 40 and 20, 128 and 64; of lanes 132 and 66, 200 and 100,
# 400 and 200, 4000 and 2000; of a block 4112 and 2056; of a cluster that reads 8 and 4 bytes, and one that copies.
@pytest.mark.sanitize
@on_cuda
@pytest.mark.parametrize("classes", [10, 32, 33, 50, 100, 1000, 1028, 16_386, 17_000])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
# Elements before the first row, so that it begins at 16, 8 and fewer bytes; between rows; the narrower of both counts.
@pytest.mark.parametrize(("offset", "gap"), [(0, 0), (1, 0), (2, 0), (4, 0), (0, 1), (0, 8)])
def test_rows_anywhere(backend, classes, dtype, offset, gap):
    z, t, y = draw(classes, dtype, rows=3)
    wide = torch.full((2, 4 * (classes + gap) + 8), math.nan, dtype=dtype).to(backend.device)
    views = [
        buffer[offset:].as_strided((3, classes), (classes + gap, 1)).copy_(x)
        for buffer, x in zip(wide, (z, t), strict=True)
    ]
    # Of a cluster only the student: one of a pair is copied beside the threads, the other read by them.
    target, labels = views[1] if classes < 16_384 else t.to(backend.device), y.to(backend.device)
    compare(
        lambda z: distillation_loss(z, target, labels, temperature=2.0, hard_weight=0.5),
        lambda z: oracle(z, t, y, T=2.0, hard=0.5),
        views[0],
    )


@on_backends("distillation_loss", cases=each_kernel())
def test_no_rows(backend, case):
    z, t, y = on(backend.device, *draw(case.classes, rows=0))
    z.requires_grad_()
    for reduction in ("mean", "sum", "none"):
        loss = distillation_loss(z, t, y, reduction=reduction)
        assert loss.sum().item() == 0
        assert torch.autograd.grad(loss.sum(), z)[0].shape == (0, case.classes)


@pytest.mark.sanitize
@on_backends("distillation_loss", "cuda", cases=[*each_kernel(), case_at(17_000, dtype=DTYPES[1]), case_at(33_001)])
def test_same_bits_in_every_order_and_run(backend, case):
    """A missing barrier, or a sum in the order of arrival, would show; as would a counter that is not left at 0."""
    rows = 300 if case.classes < 1000 else 9 if case.classes < 16_384 else 3
    z, t, y = on(backend.device, *draw(case.classes, case.dtype, rows=rows))

    def order(**more):
        return contextlib.nullcontext() if backend.module is None else machine(backend.module, **more)

    def run():
        leaf = z.clone().requires_grad_()
        loss = distillation_loss(leaf, t, y, temperature=2.0, hard_weight=0.5)
        loss.backward()
        by_row = distillation_loss(z, t, y, hard_weight=0.5, reduction="none")
        return loss.detach(), leaf.grad, by_row, *distillation_loss_and_grad(z, t, y)

    results = []
    for descending in (False, True, False):
        with order(descending=descending):
            results.append(run())
    assert all(same_bits(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))
    with order(most_blocks=2):
        close(run()[0], results[0][0], 1e-6)


def clusters_or_skip():
    if native.cuda.distillation_loss_cluster(16_385, 1, 1) == 0:
        pytest.skip("needs a GPU of compute capability 9.0")


@on_cuda
def test_plans_of_other_threads_do_not_matter(backend):
    """17,000 and 32,000 classes are the same kernel with 68 and 64 KB a block; autograd has a thread of its own."""
    clusters_or_skip()
    z, t, _ = on(backend.device, *draw(17_000, torch.bfloat16, rows=2))
    expected = distillation_loss(z, t).item()
    other = threading.Thread(target=native.cuda.distillation_loss_cluster, args=(32_000, 1, 1))
    other.start()
    other.join()
    assert distillation_loss(z, t).item() == expected


@on_cuda
def test_clusters_and_blocks_agree(backend):
    clusters_or_skip()
    z, t, y = on(backend.device, *draw(32_000, rows=3))
    results = []
    for case in (case_at(32_000), case_at(32_000, clusters=False)):
        with case.kernel_chosen():
            results.append(distillation_loss_and_grad(z, t, y, temperature=4.0, hard_weight=0.5, label_smoothing=0.1))
    for a, b in zip(*results, strict=True):
        close(a, b, 1e-6)
        assert not torch.equal(a, b)  # two kernels


def warm_up(function):
    """What a capture asks for: compiled and run on a side stream before."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            function()
    torch.cuda.current_stream().wait_stream(side)


@on_gpu
@pytest.mark.parametrize("classes", [10, 100, 1000, 32_000, 128_256])
def test_nothing_waits_for_the_device_and_graphs_replay(backend, classes):
    z, t, y = on(backend.device, *draw(classes, rows=64))
    weight = torch.rand(64, device="cuda")
    options = {"temperature": 4.0, "hard_weight": 0.5}
    leaf = z.clone().requires_grad_()

    def run():
        distillation_loss_and_grad(z, t, y, **options)
        distillation_loss(leaf, t, y, sample_weight=weight, **options).backward()
        distillation_loss(leaf, t, y, **options).backward()
        distillation_loss(leaf, t).backward()

    warm_up(run)
    expected = distillation_loss_and_grad(z, t, y, **options)
    torch.cuda.set_sync_debug_mode("error")
    try:
        run()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    held = torch.zeros_like(z)
    with torch.cuda.graph(graph):
        result = distillation_loss_and_grad(held, t, y, **options)
    for _ in range(3):  # also finds a counter that a replay does not leave at 0
        held.copy_(z)
        graph.replay()
        assert all(same_bits(a, b) for a, b in zip(result, expected, strict=True))


def test_only_the_default_stream_keeps_its_workspace(monkeypatch):
    """Another one may be that of a graph's warm-up, whose memory pool nothing may outlive."""
    monkeypatch.setattr(cuda, "WORKSPACES", {})
    device = torch.device("cpu")
    with in_use(types.SimpleNamespace(distillation_loss_workspace=9)):
        kept, same = (cuda.workspace_of(device, 0) for _ in range(2))
        others = [cuda.workspace_of(device, stream) for stream in (7, 7)]
    assert same is kept
    assert len({each.data_ptr() for each in (kept, *others)}) == 3
    assert list(cuda.WORKSPACES.values()) == [kept]
    assert not torch.cat([kept, *others]).any()


@on_gpu
def test_compiled_into_a_graph(backend):
    """``reduce-overhead`` raises where anything but a graph's outputs is left in its memory after a warm-up."""
    z, t, y = on(backend.device, *draw(100, rows=2000))
    z.requires_grad_()
    options = {"temperature": 4.0, "hard_weight": 0.3}
    compiled = torch.compile(lambda: distillation_loss(z, t, y, **options), mode="reduce-overhead", fullgraph=True)
    expected = torch.autograd.grad(distillation_loss(z, t, y, **options), z)[0]
    for _ in range(4):  # a warm-up, the capture, replays
        torch.compiler.cudagraph_mark_step_begin()
        close(torch.autograd.grad(compiled(), z)[0], expected, 1e-6)


@on_backends("distillation_loss", "triton-gpu")
def test_loss_and_backward_in_a_graph(backend):
    z, t, y = on(backend.device, *draw(1000, rows=256))
    z.requires_grad_()

    def step():
        z.grad = None
        loss = distillation_loss(z, t, y, temperature=4.0, hard_weight=0.3)
        loss.backward()
        return loss

    warm_up(step)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = step()
    with torch.no_grad():
        z.copy_(torch.randn_like(z))
    graph.replay()
    exact = z.detach().cpu().double().requires_grad_()
    expected = oracle(exact, t.cpu(), y.cpu(), T=4.0, hard=0.3)
    expected.backward()
    close(loss, expected, 2e-6)
    close(z.grad, exact.grad, 3e-6)


@on_gpu
@pytest.mark.parametrize(("rows", "classes"), [(2**28 + 3, 10), (2**21 + 5, 1030), (17_000, 128_256)])
def test_more_than_2_to_the_31_elements(backend, rows, classes):
    if torch.cuda.mem_get_info()[0] < 20 * rows * classes // 10 * 4:
        pytest.skip("needs a GPU with more memory")
    z = torch.randn(rows, classes, device="cuda", dtype=torch.bfloat16)
    t = z.roll(1, 1)
    last = z[-5:].clone(), t[-5:].clone()
    loss, grad = distillation_loss_and_grad(z, t, reduction="sum")
    assert torch.isfinite(loss)
    assert torch.equal(grad[-5:], distillation_loss_and_grad(*last, reduction="sum")[1])
    if backend.name == "triton" and classes > 10_000:  # one index of a row for both
        assert torch.equal(distillation_metrics(z, t).kl[-5:], distillation_metrics(*last).kl)
