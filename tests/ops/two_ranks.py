"""One of two processes that train every op under DDP and under FSDP2: ``python two_ranks.py RANK FOLDER``.

Gradients are the mean of those that the two halves of a batch have alone, and a step of the package's optimizer is
torch's with clipping by the global norm.
"""

import datetime
import sys

import torch
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import kr_fast
from kr_fast.models import classifier
from kr_fast.training import AdamW

CHANNELS, SIDE, CLASSES = 16, 4, 5
# There torch asks a CPU for a stream's event, and in 2.7 it sums the gradients of any network, which it should average.
FSDP2_ON_CPU = not torch.__version__.startswith(("2.6.", "2.7."))


def last(x):
    return x.contiguous(memory_format=torch.channels_last)


def layer(conv, norm):
    return kr_fast.ResidualLayer(conv.weight, norm.weight, norm.bias, norm.running_mean, norm.running_var)


class Net(nn.Module):
    """Every op that trains, one behind the other; its output is a loss."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, CHANNELS, 3, padding=1)
        self.qkv, self.head = nn.Linear(CHANNELS, 3 * CHANNELS), nn.Linear(CHANNELS, CLASSES)
        self.convs = nn.ModuleList(nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1, bias=n not in (2, 3)) for n in range(6))
        self.norms = nn.ModuleList(nn.BatchNorm2d(CHANNELS) for _ in range(3))
        self.groups = nn.ModuleList(nn.GroupNorm(4, CHANNELS) for _ in range(3))

    def forward(self, x, teacher, labels):
        norm, group = self.norms[0], self.groups[0]
        x = last(self.stem(x))
        x = kr_fast.batch_norm_act(x, norm.weight, norm.bias, norm.running_mean, norm.running_var)
        x = kr_fast.group_norm_silu(x, 4, group.weight, group.bias)
        x = kr_fast.qkv_attention(self.qkv(x.flatten(2).transpose(1, 2)).contiguous(), 2)
        x = last(x.float().transpose(1, 2).unflatten(2, (SIDE, SIDE)))  # the convolutions take float32
        direct, winograd, *rest = self.convs
        x = kr_fast.direct_conv2d(x, direct.weight, bias=direct.bias, padding=1)
        x = kr_fast.winograd_conv2d(x, winograd.weight, bias=winograd.bias)
        x = kr_fast.residual_block(x, *(layer(*pair) for pair in zip(rest[:2], self.norms[1:], strict=True)))
        norms = [(4, each.weight, each.bias, each.eps) for each in self.groups[1:]]
        x = kr_fast.preactivation_block(x, norms, [(each.weight, each.bias) for each in rest[2:]])
        z, p = self.head(x.mean((2, 3))), teacher.softmax(1)
        loss = kr_fast.distillation_loss(z, teacher, labels, temperature=2.0, hard_weight=0.1)
        loss = loss + kr_fast.dkd_loss(z, teacher, labels) + kr_fast.distillation_loss_topk(z, *p.topk(2))
        return loss + kr_fast.soft_cross_entropy(z, p)


class Classifier(nn.Module):
    """A network for ``optimize(training=True)``; its output is a loss."""

    def __init__(self):
        super().__init__()
        self.model = classifier("resnet8", num_classes=CLASSES, in_channels=3, width=16, image_size=SIDE)

    def forward(self, x, teacher, labels):
        return kr_fast.distillation_loss(self.model(x), teacher, labels)


def plain(value):
    """The whole of a parameter or gradient."""
    return value.full_tensor() if hasattr(value, "full_tensor") else value


def ddp(net):
    if isinstance(net, Classifier):
        kr_fast.optimize(net.model, training=True)
    return DistributedDataParallel(net)


def fsdp2(net):
    fully_shard(net)  # before: it takes contiguous weights alone
    if isinstance(net, Classifier):
        kr_fast.optimize(net.model, training=True)
    return net


def check(make, wrap, rank, dtype):
    torch.manual_seed(0)
    net, alone = make(), make()
    alone.load_state_dict(net.state_dict())
    if isinstance(alone, Classifier):  # which rounds elsewhere in bfloat16
        kr_fast.optimize(alone.model, training=True)
    parameters = list(alone.parameters())
    halves = [(torch.randn(6, 3, SIDE, SIDE), torch.randn(6, CLASSES), torch.arange(6) % CLASSES) for _ in range(2)]
    expected = [torch.zeros_like(p) for p in parameters]
    for half in halves:
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype is torch.bfloat16):
            loss = alone(*half)
        for total, grad in zip(expected, torch.autograd.grad(loss, parameters), strict=True):
            total += grad / 2
    wrapped = wrap(net)
    optimizer = AdamW(wrapped.parameters(), lr=1e-2, max_grad_norm=0.5, ema_decay=0.9)
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype is torch.bfloat16):
        loss = wrapped(*halves[rank])
    loss.backward()
    for p, grad in zip(wrapped.parameters(), expected, strict=True):
        torch.testing.assert_close(plain(p.grad), grad, rtol=1e-4, atol=1e-5 * float(grad.abs().max()) + 1e-7)
    for p, grad in zip(parameters, expected, strict=True):
        p.grad = grad
    norm = nn.utils.clip_grad_norm_(parameters, 0.5)
    torch.optim.AdamW(parameters, lr=1e-2).step()
    before = [plain(p).detach().clone() for p in wrapped.parameters()]
    optimizer.step()
    assert abs(float(optimizer.grad_norm) - float(norm)) <= 1e-4 * float(norm), (optimizer.grad_norm, norm)
    with torch.no_grad():
        for p, was, wanted in zip(wrapped.parameters(), before, parameters, strict=True):
            torch.testing.assert_close(plain(p) - was, wanted - was, rtol=1e-2, atol=1e-4)


def main(rank, folder):
    torch.set_num_threads(1)
    where, patience = f"file://{folder}/group", datetime.timedelta(minutes=5)
    torch.distributed.init_process_group("gloo", init_method=where, rank=rank, world_size=2, timeout=patience)
    for make in (Net, Classifier):
        for wrap in (ddp, fsdp2) if FSDP2_ON_CPU else (ddp,):
            for dtype in (torch.float32, torch.bfloat16):
                print(make.__name__, wrap.__name__, dtype, file=sys.stderr)
                check(make, wrap, rank, dtype)
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])
