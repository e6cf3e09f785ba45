"""The CUDA kernels of distillation_loss above 16,384 classes against float64, on a GPU and, by fibers, without one.

Class counts: 16,384 the last in registers, 16,385 one block in half precision and two in float32, rows that are not
16-byte aligned, so that nothing is copied beside the threads; 32,000 two blocks and four; 32,004 a last vector of
float32 that is not whole; 33,001 odd rows; 72,000 four blocks; 128,256 eight, of which in float32 each takes a
multiprocessor for itself; 230,400 half precision, two on a multiprocessor; 256,000 the same alone, and in float32 rows
that no cluster holds.
"""

import math
import threading

import pytest
import torch
import torch.nn.functional as F
from cuda_on_host import device as host_device
from cuda_on_host import machine, same_bits
from distillation_cases import DTYPES, EVERYTHING, GRAD_TOLERANCE, check, close, draw, on_both, oracle

import kr_fast
from kr_fast.backends import native
from kr_fast.ops.distillation.distillation_loss import distillation_loss, distillation_loss_and_grad

# (classes, student, teacher): blocks of a cluster on a device with 228 KB of shared memory a multiprocessor
BLOCKS = {
    (16_384, 1, 1): 0, (16_385, 1, 1): 1, (16_385, 2, 2): 1, (16_385, 0, 0): 2, (32_000, 1, 1): 2, (32_000, 0, 1): 4,
    (32_000, 0, 0): 4, (72_000, 1, 1): 4, (75_000, 1, 1): 8, (128_256, 1, 1): 8, (128_256, 0, 0): 8, (256_000, 1, 1): 8,
    (256_000, 1, 0): 8, (256_000, 0, 0): 0,
}  # fmt: skip


@pytest.fixture(params=["clusters", "blocks"])
def regime(request, cuda_device):
    """With clusters where they can run, and without."""
    native.cuda.distillation_loss_use_clusters(request.param == "clusters")
    yield cuda_device
    native.cuda.distillation_loss_use_clusters(True)


def clusters_or_skip():
    if native.cuda.distillation_loss_cluster(16_385, 1, 1) == 0:
        pytest.skip("needs a GPU of compute capability 9.0")


def test_who_holds_a_row(host_cuda):
    cluster = host_cuda.distillation_loss_cluster
    assert {call: cluster(*call) for call in BLOCKS} == BLOCKS
    # An H100 compiles the PTX of a build for 8.0+PTX, in which the kernel has no body.
    for lacking in ({"compute_capability": 89}, {"most_clusters": 0}, {"compiled_for": 80}, {"compiled_for": 89}):
        with host_device(host_cuda, **lacking):
            cluster(20_000, 1, 1)  # another call, so that the device is asked again
            assert cluster(40_000, 1, 1) == 0
    host_cuda.distillation_loss_use_clusters(False)
    assert cluster(32_000, 1, 1) == 0
    host_cuda.distillation_loss_use_clusters(True)


@pytest.mark.parametrize("classes", [16_384, 16_385, 32_000, 32_004, 33_001])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_values_and_gradients(regime, classes, dtype):
    z, t, y = draw(classes, dtype)
    y[1] = -100
    check(regime, z, t)
    for reduction in ("mean", "none"):
        check(regime, z, t, y, weight=torch.rand(3), reduction=reduction, **EVERYTHING)


@pytest.mark.parametrize(
    ("classes", "dtype"),
    [(72_000, "bfloat16"), (128_256, "bfloat16"), (128_256, "float32"), (230_400, "float16"), (256_000, "bfloat16")]
    + [(256_000, "float32")],
)
def test_vocabularies(cuda_device, classes, dtype):
    z, t, y = draw(classes, getattr(torch, dtype), rows=2)
    check(cuda_device, z, t, y, **EVERYTHING)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0, 4.0, 20.0])
def test_temperatures(cuda_device, temperature):
    """The sum of the hard term comes from that of the soft one by squaring at 1, 2 and 4."""
    check(cuda_device, *draw(17_000, torch.bfloat16), T=temperature, hard=0.5)


@pytest.mark.parametrize(("dtype", "target_dtype"), [(a, b) for a in DTYPES for b in DTYPES if a != b], ids=str)
def test_dtypes_of_student_and_teacher_are_independent(cuda_device, dtype, target_dtype):
    check(cuda_device, *draw(17_000, dtype, target_dtype, rows=2), **EVERYTHING)


@pytest.mark.parametrize("kind", ["probs", "log_probs"])
@pytest.mark.parametrize("classes", [17_000, 33_001])
def test_probabilities_as_target(regime, classes, kind):
    z, t, y = draw(classes, kind=kind)
    check(regime, z, t, y, kind=kind, **EVERYTHING)
    check(regime, z, t, y, kind=kind, soft=0.0, hard=1.0)


@pytest.mark.parametrize("hard", [0.0, 0.5])
def test_dkd(regime, hard):
    z, t, y = draw(17_003, rows=3)
    y[1] = -100
    z[2, y[2]] += 30
    found = on_both(regime, lambda z, d: kr_fast.dkd_loss(z, t.to(d), y.to(d), temperature=4.0, hard_weight=hard), z)
    torch.testing.assert_close(found[0][0], found[1][0], rtol=2e-6, atol=0)
    close(found[0][1], found[1][1], 3e-6)


@pytest.mark.parametrize("tail", ["smooth", "renorm"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_cached_probabilities(regime, tail, reduction):
    z, t, y = draw(17_003, rows=3)
    values, indices = t.softmax(1).topk(40)

    def loss(z, d):
        options = {"tail": tail, "temperature": 2.0, "hard_weight": 0.5, "reduction": reduction}
        return kr_fast.distillation_loss_topk(z, values.to(d), indices.to(d), y.to(d), **options)

    found = on_both(regime, loss, z)
    torch.testing.assert_close(found[0][0], found[1][0], rtol=2e-6, atol=0)
    close(found[0][1], found[1][1], 2e-6)


def test_soft_cross_entropy(regime):
    z, t, _ = draw(17_003, rows=3, kind="probs")
    t[0] = F.one_hot(torch.tensor(1), 17_003)
    found = on_both(regime, lambda z, d: kr_fast.soft_cross_entropy(z, t.to(d), temperature=2.0), z)
    torch.testing.assert_close(found[0][0], found[1][0], rtol=2e-6, atol=0)
    close(found[0][1], found[1][1], 2e-6)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("offset", [0, 1, 2, 4])  # in elements: copies of 16, 8 and fewer bytes
@pytest.mark.parametrize("gap", [0, 1, 8])  # between rows
def test_rows_anywhere_in_memory(cuda_device, dtype, offset, gap):
    """Only the student, so that one of a pair is copied beside the threads and the other not."""
    classes = 17_000
    z, t, y = draw(classes, dtype, rows=2)
    wide = torch.full((2 * (classes + gap) + 8,), math.nan, dtype=dtype).to(cuda_device)
    leaf = wide[offset:].as_strided((2, classes), (classes + gap, 1)).copy_(z).detach().requires_grad_()
    exact = z.double().requires_grad_()
    loss = distillation_loss(leaf, t.to(cuda_device), y.to(cuda_device), temperature=2.0, hard_weight=0.5)
    wanted = oracle(exact, t, y, T=2.0, hard=0.5)
    loss.backward()
    wanted.backward()
    close(loss, wanted, 1e-6)
    close(leaf.grad, exact.grad, GRAD_TOLERANCE[dtype])


@pytest.mark.parametrize("rows", [0, 1, 2, 5])  # none; fewer than clusters, as many, more than twice as many
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_any_number_of_rows(cuda_device, rows, reduction):
    z, t, y = draw(17_000, torch.bfloat16, rows=rows)
    if rows:
        return check(cuda_device, z, t, y, weight=torch.rand(rows), reduction=reduction, **EVERYTHING)
    z = z.to(cuda_device).requires_grad_()
    loss = distillation_loss(z, t.to(cuda_device), y.to(cuda_device), reduction=reduction)
    assert loss.sum().item() == 0
    assert torch.autograd.grad(loss.sum(), z)[0].shape == (0, 17_000)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("noise", [1.0, 0.1, 0.01])
def test_no_further_off_than_torch(cuda_device, dtype, noise):
    torch.manual_seed(0)
    t = torch.randn(4, 17_000).mul(2)
    z, t = (t + noise * torch.randn_like(t)).to(dtype), t.to(dtype)

    def by_torch(z, t):
        return 16 * F.kl_div(F.log_softmax(z / 4, 1), F.softmax(t / 4, 1), reduction="batchmean")

    errors = []
    exact = z.double().requires_grad_()
    wanted = by_torch(exact, t.double())
    wanted.backward()
    for loss, where in ((lambda z, t: distillation_loss(z, t, temperature=4.0), cuda_device), (by_torch, "cpu")):
        leaf = z.to(where).detach().requires_grad_()
        found = loss(leaf, t.to(where))
        found.backward()
        off = torch.linalg.norm(leaf.grad.cpu().double() - exact.grad) / torch.linalg.norm(exact.grad)
        errors.append((abs(found.detach().cpu().double() - wanted) / wanted, off))
    # Rounding of the result itself is granted: one in 2^23 of the value; of the gradient that of its dtype.
    assert errors[0][0] <= errors[1][0] + 3e-7
    assert errors[0][1] <= 1.1 * errors[1][1] + 3e-7


def test_small_divergences_are_exact_and_never_negative(cuda_device):
    torch.manual_seed(2)
    t = torch.randn(3, 17_000)
    for noise, tolerance in ((2.4e-2, 5e-7), (1e-3, 1e-5)):
        z = t + noise * torch.randn_like(t)
        rows = distillation_loss(z.to(cuda_device), t.to(cuda_device), reduction="none")
        assert (rows >= 0).all()
        close(rows.mean(), oracle(z.double(), t), tolerance)


@pytest.mark.parametrize("where", [0, 16_999, slice(9000, 17_000)])  # one class, and a masked part of the vocabulary
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_infinite_logits(cuda_device, where, dtype):
    z, t, _ = draw(17_000, dtype, rows=4)
    t[0, where] = -math.inf  # teacher rules classes out: they contribute q only
    z[1, where] = t[1, where] = -math.inf  # both: nothing
    t[2, 5], z[2, 5] = -30_000.0, -math.inf  # the student rules out what underflows in the teacher: nothing either
    z[3, 7] = -math.inf  # the student what the teacher does not: infinite
    rows = distillation_loss(z.to(cuda_device), t.to(cuda_device), reduction="none")
    assert rows[3].item() == math.inf
    exact = z[:3].double().requires_grad_()
    q, p = exact.softmax(1), t[:3].double().softmax(1)
    wanted = torch.where(p > 0, p * (p.log() - torch.where(p > 0, q, 1).log()), 0).sum(1)
    close(rows[:3], wanted, 1e-6)
    leaf = z[:3].to(cuda_device).requires_grad_()
    loss, grad = distillation_loss_and_grad(leaf, t[:3].to(cuda_device), reduction="sum")
    close(loss, wanted.sum(), 1e-6)
    close(grad, (q - p).detach(), max(2e-6, GRAD_TOLERANCE[dtype]))


def test_equal_logits_give_exactly_zero_and_nan_comes_through(cuda_device):
    z, t, y = (x.to(cuda_device) for x in draw(17_001, rows=3))
    leaf = (z * 3).requires_grad_()
    loss = distillation_loss(leaf, leaf.detach().clone(), temperature=3.0)
    assert loss.item() == 0
    assert torch.autograd.grad(loss, leaf)[0].abs().max() == 0
    for value in (math.nan, math.inf):
        bad = z.clone()
        bad[1, 17_000] = value
        for pair in ((bad, t), (t, bad)):
            assert not math.isfinite(distillation_loss(*pair).item())
            finite = distillation_loss(*pair, reduction="none").isfinite()
            assert finite.tolist() == [True, False, True]
    y[1] = 2**40  # poisons its row
    assert distillation_loss(z, t, y, hard_weight=1.0, reduction="none").isnan().tolist() == [False, True, False]


def test_offsets_do_not_matter(cuda_device):
    z, t, _ = draw(17_000)
    z, t = ((x * 256).round() / 256 for x in (z, t))  # so that adding 10^4 is exact
    loss, grad = distillation_loss_and_grad(z.to(cuda_device), t.to(cuda_device))
    for offset in (1e4, -1e4):
        moved = distillation_loss_and_grad((z + offset).to(cuda_device), (t - offset).to(cuda_device))
        assert abs(moved[0].item() - loss.item()) <= 1e-6 * loss.item()
        close(moved[1], grad.cpu().double(), 1e-6)


def test_rows_of_no_weight(regime):
    """Ignored, of weight 0, all of them; whatever they hold, and under an infinite upstream gradient."""
    z, t, y = draw(17_000, rows=6)
    weight = torch.tensor([1.0, 1, 0, 2, 1, 0.5])
    y[4] = -100
    z[2], z[4], t[4] = math.inf, math.nan, math.nan
    keep = [0, 1, 3, 5]
    wanted = oracle(z[keep].double(), t[keep], y[keep], hard=1.0, weight=weight[keep])
    z, t, y, weight = (x.to(regime) for x in (z, t, y, weight))
    loss, grad = distillation_loss_and_grad(z, t, y, hard_weight=1.0, sample_weight=weight)
    close(loss, wanted, 1e-6)
    assert grad[[2, 4]].abs().max() == 0
    assert torch.isfinite(grad).all()
    leaf = z.clone().requires_grad_()
    rows = distillation_loss(leaf, t, y, sample_weight=weight, reduction="none")
    upstream = torch.tensor([1.0, 1, math.inf, 1, math.nan, 1]).to(regime)
    assert torch.autograd.grad(rows, leaf, upstream)[0][[2, 4]].abs().max() == 0
    nothing = distillation_loss(leaf, t, torch.full_like(y, -100), hard_weight=1.0)
    assert nothing.item() == 0
    assert torch.autograd.grad(nothing, leaf)[0].abs().max() == 0


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_backward_of_the_gradient_that_is_there_already(regime, dtype):
    """An upstream gradient of 1, of 3, and a second backward."""
    z, t, _ = draw(17_000, dtype, rows=2)
    for factor in (1.0, 3.0):
        check(regime, z, t, T=2.0, upstream=torch.tensor(factor, dtype=torch.float64))
    leaf = z.to(regime).requires_grad_()
    loss = distillation_loss(leaf, t.to(regime))
    first = torch.autograd.grad(loss, leaf, retain_graph=True)[0]
    assert torch.equal(first, torch.autograd.grad(loss, leaf)[0])


@pytest.mark.sanitize
@pytest.mark.parametrize(("classes", "dtype"), [(17_000, torch.bfloat16), (33_001, torch.float32)], ids=str)
def test_same_bits_in_every_order_and_run(cuda_device, classes, dtype, host_cuda):
    """A missing barrier, or a sum in the order of arrival, would show; as would a counter that is not left at 0."""
    z, t, y = (x.to(cuda_device) for x in draw(classes, dtype, rows=3))
    found = []
    for descending in (False, True, False):
        with machine(host_cuda, descending=descending):
            rows = distillation_loss(z, t, y, hard_weight=0.5, reduction="none")
            found.append((rows, *distillation_loss_and_grad(z, t, y, temperature=2.0, hard_weight=0.5)))
    assert all(same_bits(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True))


def test_plans_of_other_threads_do_not_matter(cuda_device):
    """17,000 and 32,000 classes are the same kernel with 68 and 64 KB a block; autograd has a thread of its own."""
    clusters_or_skip()
    z, t, _ = draw(17_000, torch.bfloat16, rows=2)
    z, t = z.to(cuda_device), t.to(cuda_device)
    wanted = distillation_loss(z, t).item()
    other = threading.Thread(target=native.cuda.distillation_loss_cluster, args=(32_000, 1, 1))
    other.start()
    other.join()
    assert distillation_loss(z, t).item() == wanted


def test_clusters_and_blocks_agree(cuda_device):
    clusters_or_skip()
    z, t, y = (x.to(cuda_device) for x in draw(32_000, rows=3))
    found = []
    for use in (True, False):
        native.cuda.distillation_loss_use_clusters(use)
        found.append(distillation_loss_and_grad(z, t, y, temperature=4.0, hard_weight=0.5, label_smoothing=0.1))
    native.cuda.distillation_loss_use_clusters(True)
    for a, b in zip(*found, strict=True):
        close(a, b.cpu().double(), 1e-6)
        assert not torch.equal(a, b)  # two kernels
