"""DeviceShards: the same images as the sampler's, whatever is asked for, in whatever order, with whatever room."""

import pytest
import torch
from toy_sampler import plan, sampler

import kr_fast
from kr_fast.runtime.errors import UserError

IDS = range(20, 90)  # shards 1 to 5 of 16: the first has 12 ids, the last 10


@pytest.fixture(scope="module")
def expected():
    ids = torch.arange(IDS.start, IDS.stop)
    return sampler()(ids, plan().labels(ids))


def held(**options):
    return kr_fast.DeviceShards(sampler(), plan(), ids=IDS, shard_size=16, **options)


@pytest.mark.parametrize("capacity", [None, 1, 2])
def test_iteration(expected, capacity):
    result = [(batch.ids.clone(), batch.labels.clone(), batch.images.clone()) for batch in held(capacity=capacity)]
    ids, labels, images = map(torch.cat, zip(*result, strict=True))
    assert [len(each) for each, _, _ in result] == [12, 16, 16, 16, 10]
    assert ids.tolist() == list(IDS)
    assert torch.equal(labels, plan().labels(ids))
    assert torch.equal(images, expected)


@pytest.mark.parametrize("capacity", [None, 1, 3])
def test_lookup_by_id(expected, capacity):
    shards = held(capacity=capacity)
    random = torch.Generator().manual_seed(0)
    for _ in range(4):
        ids = torch.randint(IDS.start, IDS.stop, (33,), generator=random)  # repeated ids too
        batch = shards[ids]
        assert torch.equal(batch.ids, ids)
        assert torch.equal(batch.labels, plan().labels(ids))
        assert torch.equal(batch.images, expected[ids - IDS.start])
    assert shards[ids[:0]].images.shape == (0, 8, 6, 3)
    assert len(shards) == len(IDS)


def test_each_shard_is_sampled_once_and_a_ring_keeps_the_newest():
    shards = held()
    list(shards)
    batches = shards.sampler.batches
    list(shards)
    shards[torch.tensor([25, 80])]
    assert shards.sampler.batches == batches
    assert shards.held == (1, 2, 3, 4, 5)
    ring = held(capacity=2)
    for number in (1, 2, 3):
        ring.shard(number)
    assert ring.held == (2, 3)
    memory = ring.shard(2).images.data_ptr()
    ring.shard(4)
    assert ring.shard(4).images.data_ptr() == memory  # in the place of shard 2, of the same length
    ring.shard(1)
    assert ring.held == (4, 1)


def test_synthesize_keeps_this_process_s_shards(expected):
    shards = kr_fast.synthesize(sampler(), plan(), None, ids=IDS, format="device", shard_size=16)
    assert shards.held == (1, 2, 3, 4, 5)
    assert torch.equal(torch.cat([batch.images for batch in shards]), expected)


def test_bad_arguments():
    with pytest.raises(UserError, match="DeviceShards: ids must be given for a plan without an end, got None"):
        kr_fast.DeviceShards(sampler(), plan())
    with pytest.raises(UserError, match="DeviceShards: capacity must be at least 1 or None, got 0"):
        held(capacity=0)
    with pytest.raises(UserError, match=r"DeviceShards: number must lie in \[1, 5\], got 0"):
        held().shard(0)
    with pytest.raises(UserError, match=r"DeviceShards: ids must lie in \[20, 90\), got \[19, 30\]"):
        held()[torch.tensor([30, 19])]
    with pytest.raises(UserError, match=r"DeviceShards: ids must be int64 \[B\], got torch.float32"):
        held()[torch.tensor([30.0])]
