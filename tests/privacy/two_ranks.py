"""One of two processes of a private training, started by ``torch.distributed.run``: it writes ``FOLDER/RANK.pt``."""

import sys
from pathlib import Path

import torch
from private_cases import losses, network

from kr_fast.privacy import PoissonBatches, make_private
from kr_fast.runtime import state

RECORDS, STEPS, SIZE = 6, 3, 4
SEEDED = {"seed": 3, "not_private": True}


def train(rank):
    """(records of each step, weights after the last, gradients of each, which are clipped sums and noise by 4)."""
    model = network("images", seed=rank)[0]  # of which rank 0's weights are taken
    _, x, labels = network("images")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    private = make_private(model, optimizer, noise_multiplier=1.0, expected_batch_size=4.0, **SEEDED)
    found = []
    optimizer.register_step_pre_hook(lambda *_: found.append(flat(p.grad for p in model.parameters())))
    batches, drawn = PoissonBatches(RECORDS, 0.5, STEPS, SIZE, **SEEDED), [[] for _ in range(STEPS)]
    for batch in batches:
        private.backward(losses(model, x[batch.indices], labels[batch.indices]), present=batch.present)
        drawn[batch.step] += batch.indices[batch.present].tolist()
        if batch.last:
            private.step()
    return drawn, flat(model.parameters()), torch.stack(found)


def flat(tensors):
    return torch.cat([each.detach().flatten() for each in tensors])


if __name__ == "__main__":
    rank = state.current().rank
    torch.save(train(rank), Path(sys.argv[1]) / f"{rank}.pt")
