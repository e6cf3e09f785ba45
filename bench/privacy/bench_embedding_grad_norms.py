"""embedding_grad_norms against the Gram matrix of each record and against dense per-sample gradients."""

import pytest
import torch
from per_sample import BATCH, check

import kr_fast

CASES = [(1, 128, 11), (50, 64, 1000)]  # positions, width, rows of the table


def gram(indices, grad_output, rows):
    """Ghost clipping (Li et al., 2022): equal indices times products of gradients."""
    equal = indices[:, :, None] == indices[:, None, :]
    return (torch.bmm(grad_output, grad_output.transpose(1, 2)) * equal).sum((1, 2)).sqrt()


def dense(indices, grad_output, rows):
    """As Opacus takes it (grad_sample/embedding.py): a table for each record."""
    index = indices[..., None].expand_as(grad_output)
    table = grad_output.new_zeros(len(indices), rows, grad_output.shape[2])
    return table.scatter_add_(1, index, grad_output).flatten(1).norm(dim=1)


def ours(indices, grad_output, rows):
    return kr_fast.embedding_grad_norms(indices, grad_output)


PROVIDERS = {"kr_fast": ours, "gram": gram, "dense": dense}


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("case", CASES, ids=str)
@torch.inference_mode()
def test_embedding_grad_norms(benchmark, case, provider, threads):
    benchmark.group = f"embedding_grad_norms {case} {threads} threads"
    positions, width, rows = case
    indices, grad_output = torch.randint(0, rows, (BATCH, positions)), torch.randn(BATCH, positions, width)
    run = PROVIDERS[provider]
    error = check(run(indices, grad_output, rows), dense(indices, grad_output.double(), rows))
    benchmark.pedantic(run, args=(indices, grad_output, rows), rounds=15, iterations=4, warmup_rounds=2)
    benchmark.extra_info.update(error=error)
