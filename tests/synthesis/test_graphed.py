"""The trajectory of a CUDA graph: on a CPU step by step without a capture, on a GPU as it is."""

import logging

import pytest
import torch
from small_samplers import CLASSES, MILD, SOLVERS, make_sampler, make_unet

import kr_fast
from kr_fast.synthesis.graphed import GraphTrajectory

diffusers = pytest.importorskip("diffusers")

IDS = torch.tensor([3, 1, 2**33, 12])
LABELS = IDS % CLASSES


@pytest.fixture(scope="module")
def unet():
    return make_unet()


def graphed(sampler):
    """The sampler with the trajectory that it has on a GPU, uncaptured."""
    settings, batch = sampler.trajectory.settings, sampler.micro_batch
    sampler.trajectory = GraphTrajectory(sampler.network, settings, sampler.table, batch, capture=False)
    return sampler


@pytest.mark.parametrize("name", SOLVERS)
@pytest.mark.parametrize("options", [{}, {"guidance_scale": 2.5}], ids=["plain", "guided"])
def test_steps_by_the_device_counter_are_those_of_the_loop(unet, name, options):
    make = lambda: make_sampler(unet, SOLVERS[name], 6, noise_scale=0.3, micro_batch=4, **options)  # noqa: E731
    want, sampler = make()(IDS, LABELS), graphed(make())
    for _ in range(2):  # its tensors are used again
        got = sampler(IDS, LABELS)
        # Its reference kernel on a CPU rounds each product: a byte may fall on the other side.
        assert (got.int() - want.int()).abs().max() <= 1
        assert (got != want).float().mean() < 0.01


def test_guidance_of_0(unet):
    make = lambda: make_sampler(unet, diffusers.DDIMScheduler(**MILD), guidance_scale=0.0, micro_batch=4)  # noqa: E731
    assert (graphed(make())(IDS, LABELS).int() - make()(IDS, LABELS).int()).abs().max() <= 1


def test_guidance_interval_and_optimized_networks(unet):
    options = {"guidance_scale": 3.0, "guidance_interval": (0.2, 0.6), "micro_batch": 4}
    make = lambda: make_sampler(unet, diffusers.DDIMScheduler(**MILD), 5, **options)  # noqa: E731
    want = make()(IDS, LABELS)
    assert (graphed(make())(IDS, LABELS).int() - want.int()).abs().max() <= 1
    with kr_fast.optimize(unet):
        assert (graphed(make())(IDS, LABELS).int() - want.int()).abs().max() <= 1


def test_nothing_is_read_back_in_the_loop(unet, monkeypatch):
    """On a GPU sync-debug mode checks it; here, that no step turns a tensor into a Python number."""
    sampler = graphed(make_sampler(unet, SOLVERS["UniPC"], 4, guidance_scale=2.0, micro_batch=4))
    sampler(IDS, LABELS)
    trajectory, read = sampler.trajectory, []
    advance = trajectory.advance

    def watched(*arguments):
        for name in ("item", "tolist", "__bool__", "__int__", "__float__", "cpu", "numpy"):
            original = getattr(torch.Tensor, name)
            monkeypatch.setattr(
                torch.Tensor,
                name,
                lambda t, *a, name=name, original=original, **k: read.append(name) or original(t, *a, **k),
            )
        advance(*arguments)
        monkeypatch.undo()

    trajectory.advance = watched
    # The reference kernel, which stands in for the GPU's, reads the counter; the network and the loop must not.
    monkeypatch.setattr("kr_fast.synthesis.graphed.solver_step_at", lambda *a, **k: None)
    with torch.inference_mode():
        trajectory(IDS, LABELS)
    assert read == []


needs_gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")]


class TestOnAGpu:
    pytestmark = needs_gpu

    @pytest.mark.parametrize("name", SOLVERS)
    @pytest.mark.parametrize("guidance", [None, 2.5])
    def test_the_graph_is_near_the_cpu(self, name, guidance):
        options = {"steps": 6, "guidance_scale": guidance, "noise_scale": 0.3, "micro_batch": 4}
        want = make_sampler(make_unet(), SOLVERS[name], **options)(IDS, LABELS)
        sampler = make_sampler(make_unet().cuda(), SOLVERS[name], **options)
        got = sampler(IDS, LABELS)
        assert sampler.trajectory.graphs
        assert torch.equal(got, sampler(IDS, LABELS))
        order = [2, 0, 3, 1]
        assert torch.equal(got[order], sampler(IDS[order], LABELS[order]))
        assert (got.cpu().int() - want.int()).abs().float().mean() < 0.5

    def test_no_synchronisation_in_the_loop(self):
        sampler = make_sampler(make_unet().cuda(), SOLVERS["DPM++ 2M"], 6, guidance_scale=2.0, micro_batch=4)
        sampler(IDS, LABELS)
        ids, labels = IDS.cuda(), LABELS.cuda()
        torch.cuda.set_sync_debug_mode("error")
        try:
            with torch.inference_mode():
                sampler.trajectory(ids, labels)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    def test_a_network_that_cannot_be_captured_says_so(self, caplog):
        def network(x, t, class_labels):
            return x * float(t.sum())  # a synchronisation

        sampler = make_sampler(network, SOLVERS["DDIM"], 3, image_shape=(1, 4, 4), micro_batch=4)
        sampler.network.device = sampler.device = torch.device("cuda")
        sampler.trajectory = GraphTrajectory(sampler.network, sampler.trajectory.settings, sampler.table, 4)
        with caplog.at_level(logging.WARNING, "kr_fast"):
            sampler(IDS, LABELS)
        assert any("cannot be captured" in record.message for record in caplog.records)
