"""Networks of a user: whatever their code does, it is one line, or logits ``[N, C]``."""

import types

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from kr_fast.ensemble import LogitsOf, ModelArray
from kr_fast.ensemble.networks import ask, check_fresh, logits_of, made, takes_logits
from kr_fast.runtime.errors import UserError

X = torch.linspace(-1, 1, 2 * 8 * 8).view(2, 1, 8, 8)
RULE = "net: model must return [N, 3] logits for 8 x 8 x 1 images, got "


class Net(nn.Module):
    """What ``answer`` makes of right logits."""

    def __init__(self, answer=lambda z: z):
        super().__init__()
        self.head, self.answer = nn.Linear(64, 3), answer

    def forward(self, x):
        return self.answer(self.head(x.flatten(1)))


def raising(error):
    def answer(z):
        raise error

    return answer


def line(model, **options):
    with pytest.raises(UserError) as caught:
        ask("net", "model", model, X, 3, **options)
    text = str(caught.value)
    assert "\n" not in text
    return text


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (raising(AssertionError()), "the error AssertionError"),
        (raising(KeyError("label")), "the error KeyError: 'label'"),
        (raising(RuntimeError("mat1 and mat2\nmore")), "the error mat1 and mat2"),
        (raising(NotImplementedError()), "the error NotImplementedError"),
        (lambda z: z.no_such, "the error AttributeError: 'Tensor' object has no attribute 'no_such'"),
        (lambda z: z.detach().numpy(), "a numpy array float32 [2, 3] (return the logits alone)"),
        (lambda z: None, "None (return the logits alone)"),
        (lambda z: (z, z), "a tuple of 2 (return the logits alone)"),
        (lambda z: {"out": z, "aux": z}, "a dict of out, aux (return the logits alone)"),
        (lambda z: {"logits": z}, "a dict of logits (kr_fast.ensemble.LogitsOf(model) takes its logits)"),
        (lambda z: z[:1], "[1, 3]"),
        (lambda z: z[:, :2], "[2, 2]"),
        (lambda z: z[..., None, None], "[2, 3, 1, 1] (return x.flatten(1))"),
        (lambda z: z.argmax(1), "int64 [2]"),
        (lambda z: z.long(), "int64 [2, 3]"),
        (lambda z: z.to(torch.complex64), "complex64 [2, 3]"),
        (lambda z: z.to("meta"), "[2, 3] on meta for images on cpu"),
    ],
)
def test_other_answers_are_one_line(answer, words):
    assert line(Net(answer)) == RULE + words


def test_numbers_that_are_no_logits():
    broken = Net()
    broken.head.bias.data[1] = torch.nan
    assert line(broken).endswith("images that are finite, got NaN or inf, which its head.bias holds")
    assert line(Net(lambda z: z / 0)).endswith("that are finite, got NaN or inf")
    assert "must return logits (remove its softmax)" in line(Net(lambda z: z.softmax(1)))
    assert "must return logits (remove its softmax)" in line(Net(lambda z: z.bfloat16().softmax(1)))
    assert "must return logits (remove its sigmoid)" in line(nn.Sequential(Net(), nn.Sigmoid()))
    assert "must return logits (not labels), got rows of hard" in line(Net(lambda z: torch.eye(3)[:2] * 5 - 2 + 0 * z))
    frozen = nn.Sequential(Net(), nn.Sigmoid()).requires_grad_(False)
    assert "must return logits (remove its sigmoid)" in line(frozen)
    # Logits that happen to lie in [0, 1] are logits, and log-probabilities are logits but for a constant.
    assert ask("net", "model", Net(lambda z: z * 0 + 0.5), X, 3).shape == (2, 3)
    assert ask("net", "model", Net(lambda z: z.log_softmax(1)), X, 3).shape == (2, 3)
    with pytest.raises(UserError, match="must return logits"):
        ask("net", "model", Net(lambda z: z.softmax(1)), X)


def test_training_wants_a_gradient():
    assert ask("net", "model", Net(), X, 3, training=True).requires_grad
    assert "have a gradient, got logits without" in line(Net(lambda z: z.detach()), training=True)
    assert "have a gradient, got logits without" in line(Net().requires_grad_(False), training=True)

    class Two(Net):
        def forward(self, x):
            z = super().forward(x)
            return types.SimpleNamespace(logits=z, aux=z) if self.training else z

    assert ask("net", "model", Two(), X, 3).shape == (2, 3)
    assert "a SimpleNamespace (kr_fast.ensemble.LogitsOf(model)" in line(Two(), training=True)
    assert ask("net", "model", LogitsOf(Two()), X, 3, training=True).shape == (2, 3)


def test_asking_leaves_network_and_images_as_they_were():
    model = nn.Sequential(nn.BatchNorm2d(1), nn.ReLU(inplace=True), nn.Dropout(), Net(lambda z: z.mul_(1)))
    model.train()
    model[0].eval()
    before, state = X.clone(), {name: value.clone() for name, value in model.state_dict().items()}
    ask("net", "model", nn.Sequential(nn.ReLU(inplace=True), model), X, 3)
    assert [part.training for part in model] == [False, True, True, True]
    assert torch.equal(X, before)
    assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())


def test_scripted_networks():
    scripted = torch.jit.script(nn.Sequential(nn.Flatten(), nn.Linear(64, 3)))
    assert ask("net", "model", scripted, X, 3).shape == (2, 3)
    with pytest.raises(UserError) as caught:
        ask("net", "model", scripted, torch.zeros(2, 1, 9, 9), 3)
    assert "got the error RuntimeError: mat1 and mat2 shapes" in str(caught.value)


leaves = st.one_of(
    st.none(),
    st.integers(-3, 3),
    st.text(max_size=3),
    st.sampled_from([np.zeros((2, 3)), torch.zeros(2, 3), torch.zeros(2), object(), Net(), range(3)]),
)
objects = st.recursive(
    leaves,
    lambda inner: st.one_of(
        st.lists(inner, max_size=2),
        st.tuples(inner),
        st.dictionaries(st.sampled_from(["logits", "loss", 1]), inner, max_size=2),
        st.builds(lambda value: types.SimpleNamespace(logits=value), inner),
    ),
    max_leaves=4,
)
tensors = st.builds(
    lambda shape, dtype: torch.ones(shape, dtype=dtype),
    st.lists(st.sampled_from([0, 1, 2, 3]), max_size=4),
    st.sampled_from([torch.float32, torch.float64, torch.float16, torch.int64, torch.bool, torch.complex64]),
)


@settings(max_examples=80, deadline=None)
@given(st.one_of(objects, tensors), st.booleans())
def test_any_answer_is_logits_or_one_line(answer, wrapped):
    model, expected, words = Net(lambda z: answer), logits_of(answer) if wrapped else answer, ""
    try:
        result = ask("net", "model", LogitsOf(model) if wrapped else model, X)
    except UserError as error:
        result, words = None, str(error)
    assert "\n" not in words
    right = isinstance(expected, torch.Tensor) and expected.is_floating_point() and expected.ndim == 2
    right = right and len(expected) == 2 and expected.shape[1] > 1
    if right:
        assert torch.equal(result, expected)
    elif result is not None:  # one class alone, which is [2, 1]
        assert expected.shape == (2, 1)
    else:
        assert words.startswith("net: model must return ")


@pytest.mark.parametrize(
    "answer", [lambda z: {"logits": z}, lambda z: (z,), lambda z: types.SimpleNamespace(logits=z, hidden=None)]
)
def test_logits_that_are_certain_are_taken(answer):
    def make():
        torch.manual_seed(0)
        return Net(answer)

    make_logits = takes_logits("net", "model", make, X)
    wrapped, own = make_logits(), make()
    own.answer = lambda z: z
    assert isinstance(wrapped, LogitsOf)
    assert torch.equal(ask("net", "model", wrapped, X, 3), own(X))
    images = torch.randint(0, 256, (4, 8, 8, 1), dtype=torch.uint8)
    assert torch.allclose(ModelArray([wrapped])(images), ModelArray([own])(images), atol=1e-6)
    assert takes_logits("net", "model", Net, X) is Net


def test_what_a_factory_returns():
    def refused(make, words):
        with pytest.raises(UserError) as caught:
            made("net", "make_model", make)
        assert words in str(caught.value)
        assert "\n" not in str(caught.value)

    refused(3, "make_model must be a function that returns a torch module, got int")
    refused(Net(), "make_model must be a function that returns a torch module, got the network itself, a Net")
    refused(lambda: Net, "got the class Net and not an object of it")
    refused(lambda: None, "got None")
    refused(lambda: nn.Linear(3, 3).state_dict(), "got an OrderedDict of weight, bias")
    refused(raising(SystemExit(2)).__get__(0), "got the error SystemExit: 2")
    refused(raising(ValueError("a\nb")).__get__(0), "got the error ValueError: a")
    refused(lambda: nn.Sequential(nn.LazyLinear(3)), "with all its sizes, got a LazyLinear without (0.weight;")
    once = Net()
    with pytest.raises(UserError, match="must return a fresh module at every call, got the same object twice"):
        check_fresh("net", "make_model", once, once)
    with pytest.raises(UserError, match="at every call, got 0.head.weight of the call before once more"):
        check_fresh("net", "make_model", once, nn.Sequential(once))
    check_fresh("net", "make_model", Net(), Net())
