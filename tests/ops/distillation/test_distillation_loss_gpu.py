"""The distillation loss on a GPU, on the Triton kernels: streams, graphs, scaling, and sizes that only fit there."""

import pytest
import torch

import kr_fast
from kr_fast.backends import registry
from kr_fast.ops.distillation.distillation_loss import distillation_loss, distillation_loss_and_grad
from kr_fast.ops.distillation.distillation_metrics import distillation_metrics

pytestmark = pytest.mark.gpu
OPTIONS = {"temperature": 4.0, "hard_weight": 0.3}
# As in test_distillation_loss.py, and the regimes of the tiles: 2048, 2049 one and two blocks; vocabularies.
CLASSES = (2, 3, 10, 31, 32, 33, 100, 128, 129, 1000, 1024, 1025, 2048, 2049, 4096, 16_385, 32_000, 128_256)
GRAD_TOLERANCE = {torch.float32: 3e-6, torch.bfloat16: 4e-3, torch.float16: 1e-3}


@pytest.fixture(autouse=True)
def triton():
    with registry.forced("triton"):
        yield


def batch(rows, classes, dtype=torch.float32):
    torch.manual_seed(classes)
    t = 2 * torch.randn(rows, classes, device="cuda")
    z = (t + torch.randn_like(t)).to(dtype)
    return z, t.to(dtype), torch.randint(0, classes, (rows,), device="cuda")


def exact(z, t, y):
    """(loss, gradient) in float64 by torch's own functions."""
    leaf, T = z.detach().double().requires_grad_(), OPTIONS["temperature"]
    log_q, log_p = torch.log_softmax(leaf / T, 1), torch.log_softmax(t.double() / T, 1)
    soft = torch.nn.functional.kl_div(log_q, log_p, reduction="batchmean", log_target=True)
    loss = T * T * soft + OPTIONS["hard_weight"] * torch.nn.functional.cross_entropy(leaf, y)
    loss.backward()
    return loss.detach(), leaf.grad


def far(found, wanted):
    return float((found.double() - wanted).norm() / wanted.norm())


# Every kernel is compiled for each class count and dtype, so half precision takes one count a regime.
@pytest.mark.parametrize(
    ("dtype", "classes"),
    [(torch.float32, classes) for classes in CLASSES]
    + [(dtype, classes) for dtype in (torch.bfloat16, torch.float16) for classes in (10, 1000, 2049, 128_256)],
    ids=str,
)
def test_values_and_gradients(dtype, classes):
    z, t, y = batch(37, classes, dtype)
    z.requires_grad_()
    loss = distillation_loss(z, t, y, **OPTIONS)
    loss.backward()
    wanted, grad = exact(z, t, y)
    assert far(loss, wanted) <= 2e-6
    assert far(z.grad, grad) <= GRAD_TOLERANCE[dtype]
    with registry.forced("reference"):
        theirs = distillation_metrics(z.double(), t.double(), y, temperature=4.0)
    ours = distillation_metrics(z, t, y, temperature=4.0)
    for name, value in ours._asdict().items():
        if value.dtype == torch.bool:
            assert torch.equal(value, getattr(theirs, name)), name
        else:
            torch.testing.assert_close(value, getattr(theirs, name), rtol=1e-5, atol=1e-5, msg=name)


def warm_up(function):
    """What a capture asks for: compiled and run on a side stream before."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            function()
    torch.cuda.current_stream().wait_stream(side)


def test_loss_and_grad_in_a_cuda_graph():
    z, t, y = batch(256, 100)
    warm_up(lambda: distillation_loss_and_grad(z, t, y, **OPTIONS))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss, grad = distillation_loss_and_grad(z, t, y, **OPTIONS)
    z.copy_(torch.randn_like(z))
    graph.replay()
    wanted, wanted_grad = exact(z, t, y)
    assert far(loss, wanted) <= 2e-6
    assert far(grad, wanted_grad) <= 3e-6


def test_loss_and_backward_in_a_cuda_graph():
    z, t, y = batch(256, 1000)
    z.requires_grad_()

    def step():
        z.grad = None
        loss = distillation_loss(z, t, y, **OPTIONS)
        loss.backward()
        return loss

    warm_up(step)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = step()
    with torch.no_grad():
        z.copy_(torch.randn_like(z))
    graph.replay()
    wanted, grad = exact(z, t, y)
    assert far(loss, wanted) <= 2e-6
    assert far(z.grad, grad) <= 3e-6


def test_training_step_never_waits_for_the_device():
    layer = torch.nn.Linear(16, 100, device="cuda")
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    x, (_, t, y) = torch.randn(64, 16, device="cuda"), batch(64, 100)
    weight = torch.rand(64, device="cuda")

    def step():
        optimizer.zero_grad()
        kr_fast.distillation_loss(layer(x), t, y, sample_weight=weight, **OPTIONS).backward()
        optimizer.step()

    step()  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_grad_scaler_in_half_precision():
    """The scale is folded in before the gradient is rounded: 1/N of it would underflow."""
    z, t, y = batch(4096, 1000, torch.float16)
    z.requires_grad_()
    scaler = torch.amp.GradScaler("cuda", init_scale=2.0**16)
    scaler.scale(distillation_loss(z, t, y, **OPTIONS)).backward()
    grad = exact(z, t, y)[1]
    assert far(z.grad, grad * 2.0**16) <= 1e-3
    assert float((z.grad == 0).float().mean()) < 1e-3


def test_more_than_2_31_elements():
    rows, classes = 17_000, 128_256
    need = 4 * rows * classes * 2
    if torch.cuda.mem_get_info()[0] < 1.2 * need:
        pytest.skip(f"needs {need / 2**30:.0f} GiB of free GPU memory")
    t = torch.randn(rows, classes, device="cuda", dtype=torch.bfloat16)
    z = torch.randn(rows, classes, device="cuda", dtype=torch.bfloat16).requires_grad_()
    y = torch.randint(0, classes, (rows,), device="cuda")
    assert t.numel() > 2**31
    distillation_loss(z, t, y, **OPTIONS).backward()
    last = slice(rows - 8, rows)
    grad = exact(z[last], t[last], y[last])[1] * 8 / rows
    assert far(z.grad[last], grad) <= 4e-3
    found = distillation_metrics(z[last], t[last], y[last], temperature=4.0)
    whole = distillation_metrics(z, t, y, temperature=4.0)
    assert torch.equal(whole.kl[last], found.kl)
