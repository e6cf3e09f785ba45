"""optimizer_step: SGD and AdamW with clipping and averages against float64, bits, layouts, bad gradients, arguments."""

import itertools
import math

import pytest
import torch
from backends import on_backends

from kr_fast.backends.arguments import AdamWRule, SGDRule
from kr_fast.ops.nn.optimizer_step import OptimizerState, StaleStateError, optimizer_step

LAST = torch.channels_last
# A part of a vector of AVX2; one vector of AVX-512 and a part; filters that are not contiguous; a run of 4,096 exactly;
# several runs with a short last one; nothing at all.
SHAPES = [(5,), (33,), (8, 3, 3, 3), (64, 64), (4, 16, 1, 1), (10007,), (0,)]
RULES = {
    "plain": [SGDRule(0.1, 0.0, 1e-2), SGDRule(0.05)],
    "momentum": [SGDRule(0.1, 0.9, 1e-2), SGDRule(0.05, 0.8)],
    "nesterov": [SGDRule(0.1, 0.9, 1e-2, True), SGDRule(0.05, 0.8, 0.0, True)],
    "adamw": [AdamWRule(1e-2, weight_decay=0.1), AdamWRule(3e-3, 0.8, 0.95, 1e-6, 0.0)],
}
MAX_NORM, WEIGHT = 1.0, 0.03


class Case:
    """Parameters in two groups with gradients, state and averages."""

    def __init__(self, kind, shapes=SHAPES, dtype=torch.float32, device="cpu"):
        draw = torch.Generator().manual_seed(0)
        tensors = [torch.randn(shape, generator=draw, dtype=torch.float64) for shape in shapes]
        tensors = [(each.to(memory_format=LAST) if each.ndim == 4 else each).to(device, dtype) for each in tensors]
        self.draw, self.rules, self.groups = draw, RULES[kind], [i % 2 for i in range(len(shapes))]
        self.parameters = [each.requires_grad_() for each in tensors]
        self.averages = [p.detach().clone() + 1 for p in self.parameters]
        empty = [None] * len(shapes)
        self.first = empty if kind == "plain" else [torch.zeros_like(p) for p in tensors]
        self.second = [torch.zeros_like(p) for p in tensors] if kind == "adamw" else None
        self.steps = [torch.zeros((), device=device) for _ in tensors] if kind == "adamw" else None

    def state(self, **changes):
        lists = {"first": self.first, "second": self.second, "steps": self.steps, "averages": self.averages}
        return OptimizerState(self.parameters, **{**lists, "groups": self.groups, **changes})

    def set_gradients(self, scale=1.0):
        for p in self.parameters:
            grad = torch.randn(p.shape, generator=self.draw, dtype=torch.float64) * scale
            p.grad = torch.empty_like(p, requires_grad=False).copy_(grad)

    def written(self):
        lists = [self.parameters, self.first, self.second or [], self.steps or [], self.averages]
        return [each.detach().clone() for each in itertools.chain(*lists) if each is not None]

    def exact(self):
        """The step in float64 on tensors of its own: the formulas of the docstring; returns the norm."""
        grads = [p.grad.double() for p in self.parameters]
        norm = math.sqrt(sum(float((g * g).sum()) for g in grads))
        for i, (p, g) in enumerate(zip(self.parameters, grads, strict=True)):
            rule, g, value = self.rules[self.groups[i]], g * min(1, MAX_NORM / (norm + 1e-6)), p.detach()
            if isinstance(rule, SGDRule):
                g = g + rule.weight_decay * value
                if self.first[i] is not None:
                    self.first[i] = rule.momentum * self.first[i] + g
                    g = g + rule.momentum * self.first[i] if rule.nesterov else self.first[i]
                new = value - rule.lr * g
            else:
                self.steps[i] += 1
                t, b1, b2 = int(self.steps[i]), rule.beta1, rule.beta2
                self.first[i] = b1 * self.first[i] + (1 - b1) * g
                self.second[i] = b2 * self.second[i] + (1 - b2) * g * g
                direction = self.first[i] / (1 - b1**t) / ((self.second[i] / (1 - b2**t)).sqrt() + rule.eps)
                new = value - rule.lr * rule.weight_decay * value - rule.lr * direction
            p.data = new
            self.averages[i] = self.averages[i] + WEIGHT * (new - self.averages[i])
        return norm


def relative(got, expected):
    return max(
        (float((a.double() - b).norm() / b.norm()) for a, b in zip(got, expected, strict=True) if a.numel()), default=0
    )


@pytest.mark.sanitize
@on_backends("optimizer_step")
@pytest.mark.parametrize("kind", RULES)
def test_steps_against_float64(backend, kind):
    case, exact = Case(kind, device=backend.device), Case(kind, dtype=torch.float64)
    state = case.state()
    for step in range(12):
        case.set_gradients(1e-3 if step % 4 == 0 else 1.0)  # every fourth norm is below max_norm
        for p, q in zip(case.parameters, exact.parameters, strict=True):
            q.grad = p.grad.double()
        before = [p.grad.clone() for p in case.parameters]
        norm = optimizer_step(state, case.rules, max_norm=MAX_NORM, average_weight=WEIGHT)
        assert norm == pytest.approx(exact.exact(), rel=1e-6)
        assert all(map(torch.equal, before, [p.grad for p in case.parameters]))
    # 12 roundings of half a unit in the last place, at random: 12 ** 0.5 * 3e-8 = 1e-7 for each of a few operations.
    assert relative(case.written(), exact.written()) < 5e-7


@on_backends("optimizer_step")
@pytest.mark.parametrize("kind", ["nesterov", "adamw"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_nothing_is_written_where_the_norm_is_not_finite(backend, kind, value):
    case = Case(kind, device=backend.device)
    state = case.state()
    case.set_gradients()
    optimizer_step(state, case.rules, max_norm=MAX_NORM, average_weight=WEIGHT)
    before = case.written()
    case.parameters[5].grad[10006] = value
    assert not math.isfinite(optimizer_step(state, case.rules, max_norm=MAX_NORM, average_weight=WEIGHT))
    assert all(map(torch.equal, before, case.written()))


@on_backends("optimizer_step")
@pytest.mark.parametrize("kind", ["nesterov", "adamw"])
def test_a_parameter_without_gradient_is_averaged_alone(backend, kind):
    case, alone = Case(kind, device=backend.device), Case(kind, device=backend.device)
    for each in (case, alone):
        each.set_gradients()
        each.parameters[0].grad, each.parameters[4].grad = None, None
    before = [each.detach().clone() for each in (case.parameters[4], case.first[4], case.averages[4])]
    optimizer_step(case.state(), case.rules, average_weight=WEIGHT)
    assert torch.equal(case.parameters[4], before[0])
    assert torch.equal(case.first[4], before[1])
    torch.testing.assert_close(case.averages[4], before[2] + WEIGHT * (before[0] - before[2]))
    if kind == "adamw":
        assert [int(each) for each in case.steps] == [0, 1, 1, 1, 0, 1, 1]
    # The others, and their norm, as if it did not exist.
    optimizer_step(alone.state(averages=None), alone.rules)
    for i in (1, 2, 3, 5):
        assert torch.equal(case.parameters[i], alone.parameters[i])


@on_backends("optimizer_step", "cpu")
@pytest.mark.parametrize("kind", ["nesterov", "adamw"])
def test_bits_do_not_depend_on_threads(backend, kind):
    results = []
    before = torch.get_num_threads()
    for threads in (1, 2, 3):
        case = Case(kind, [*SHAPES, (90000,), (33,)])  # over 3 x 32,768 numbers: a part for each thread
        torch.set_num_threads(threads)
        try:
            for _ in range(2):
                case.set_gradients()
                norm = optimizer_step(case.state(), case.rules, max_norm=MAX_NORM, average_weight=WEIGHT)
        finally:
            torch.set_num_threads(before)
        results.append([torch.tensor(norm), *case.written()])
    for other in results[1:]:
        assert all(map(torch.equal, results[0], other))


@on_backends("optimizer_step")
def test_gradients_in_any_layout(backend):
    case, other = Case("nesterov", device=backend.device), Case("nesterov", device=backend.device)
    states = case.state(), other.state()
    for _ in range(3):
        case.set_gradients()
        for p, q in zip(case.parameters, other.parameters, strict=True):
            q.grad = p.grad.contiguous() if p.ndim == 4 else torch.stack([p.grad, p.grad], -1)[..., 0]
        optimizer_step(states[0], case.rules, max_norm=MAX_NORM)
        optimizer_step(states[1], other.rules, max_norm=MAX_NORM)
    assert all(map(torch.equal, case.written(), other.written()))


def test_backward_through_a_parameter_that_has_moved_on_is_refused():
    w = torch.ones(4, requires_grad=True)
    loss = (w * w).sum()
    loss.backward(retain_graph=True)
    optimizer_step(OptimizerState([w], [None]), [SGDRule(0.1)])
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_a_state_is_stale_where_a_parameter_moved():
    case = Case("nesterov")
    state = case.state()
    case.set_gradients()
    case.parameters[1].data = case.parameters[1].data.clone()
    with pytest.raises(StaleStateError, match="optimizer_step: parameters must lie"):
        optimizer_step(state, case.rules)
    plain = Case("plain")
    with pytest.raises(StaleStateError, match="momentum must be 0 where first is None, got 0.9"):
        optimizer_step(plain.state(), RULES["momentum"])


X = torch.zeros(4, 6)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"parameters": []}, "parameters must hold at least one tensor"),
        ({"parameters": [X.half()]}, "parameters must be float32 or float64, got float16"),
        ({"parameters": [X[:, :4]]}, r"parameters must fill one run of memory, got 'strides \(6, 1\) of \[4, 4\]'"),
        ({"parameters": [X, X.double()], "first": [X, X]}, "parameters must be float32, got float64"),
        ({"parameters": [X, X.view(-1)[:12]], "first": [X, X]}, "parameters must not share memory"),
        ({"first": []}, "first must hold 1 elements, as parameters, got 0"),
        ({"first": [X.t()]}, r"first must be \[4, 6\] on cpu, got float32 \[6, 4\]"),
        ({"first": [torch.zeros(6, 4).t()]}, r"first must have its parameter's strides \(6, 1\), got \(1, 4\)"),
        ({"averages": [X.double()]}, "averages must be float32, got float64"),
        ({"averages": [torch.zeros(4, 6, requires_grad=True)]}, "averages must not require grad"),
        ({"second": [torch.zeros(4, 6)]}, "steps must be a tensor, got None"),
        ({"groups": [0, 0]}, "groups must hold 1 elements"),
    ],
)
def test_state_arguments(changes, message):
    arguments = {"parameters": [X], "first": [torch.zeros(4, 6)], **changes}
    with pytest.raises((TypeError, ValueError), match=f"optimizer_step: {message}"):
        OptimizerState(**arguments)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rules": []}, "rules must hold 1 groups, got 0"),
        ({"rules": [AdamWRule(0.1)]}, "rules must be SGDRule for such a state, got AdamWRule"),
        ({"max_norm": 0.0}, "max_norm must be above 0, got 0.0"),
        ({"max_norm": math.nan}, "max_norm must be above 0, got nan"),
        ({"average_weight": 1.5}, r"average_weight must be in \[0, 1\], got 1.5"),
    ],
)
def test_arguments(changes, message):
    p = torch.zeros(3, requires_grad=True)
    p.grad = torch.ones(3)
    arguments = {"rules": [SGDRule(0.1)], **changes}
    with pytest.raises((TypeError, ValueError), match=f"optimizer_step: {message}"):
        optimizer_step(OptimizerState([p], [None]), **arguments)
    assert not p.any()


def test_sparse_gradients_are_refused():
    table = torch.nn.Embedding(4, 3, sparse=True)
    table(torch.tensor([1])).sum().backward()
    with pytest.raises(TypeError, match="optimizer_step: gradients must be dense, got torch.sparse_coo"):
        optimizer_step(OptimizerState([table.weight], [None]), [SGDRule(0.1)])
