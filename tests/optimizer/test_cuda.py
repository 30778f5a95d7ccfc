"""What only a GPU can show of the optimizers: no waiting for the device, CUDA graphs, moved state."""

import copy

import pytest
import torch
from optimizer.steps import BOTH, take_steps
from torch.nn.functional import cross_entropy
from torch.testing import assert_close

import grassmann_optimizer as go
from resnet import WideResNet

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
OMEGAS = pytest.mark.parametrize("omega", [0.0, 0.1])


def make(Optimizer, device, omega=0.1, lr=0.01, lrg=0.2):
    """A small network and its optimizer; the same weights on any device."""
    torch.manual_seed(0)
    model = WideResNet(10, 1, 10).to(device, memory_format=torch.channels_last)
    return model, Optimizer(go.grassmann_param_groups(model, lr, lrg, omega=omega))


@BOTH
@OMEGAS
def test_steps_are_those_of_the_cpu_and_do_not_wait_for_the_device(Optimizer, omega):
    results = []
    for device in ("cpu", "cuda"):
        model, optimizer = make(Optimizer, device, omega)
        take_steps(optimizer, range(4))
        torch.cuda.set_sync_debug_mode("error")
        try:
            optimizer.step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        results.append([p.detach().cpu() for p in model.parameters()])
    on_cpu, on_gpu = results
    assert_close(on_gpu, on_cpu, rtol=1e-4, atol=1e-5)


@BOTH
@OMEGAS
@pytest.mark.parametrize("by_kernel", [True, False])  # or in blocks, as where it cannot be built
def test_a_cuda_graph_replays_training_steps(Optimizer, omega, by_kernel, monkeypatch):
    monkeypatch.setattr(go, "_KERNEL_DEVICE", "cuda" if by_kernel else None)
    images = torch.randn(8, 3, 32, 32, device="cuda").to(memory_format=torch.channels_last)
    labels = torch.arange(8, device="cuda")
    rates = (torch.tensor(rate, device="cuda") for rate in (0.01, 0.2))
    eager, eager_optimizer = make(Optimizer, "cuda", omega)
    graphed, optimizer = make(Optimizer, "cuda", omega, *rates)

    def step(model, optimizer):
        optimizer.zero_grad(set_to_none=True)
        cross_entropy(model(images), labels).backward()
        optimizer.step()

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step(graphed, optimizer)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step(graphed, optimizer)
    for _ in range(3):
        graph.replay()
    for _ in range(6):
        step(eager, eager_optimizer)
    assert_close(list(graphed.parameters()), list(eager.parameters()), rtol=1e-2, atol=1e-3)


@BOTH
def test_a_state_moves_to_another_device_and_back(Optimizer):
    _, optimizer = make(Optimizer, "cuda")
    state = copy.deepcopy(take_steps(optimizer, [0]).state_dict())
    _, moved = make(Optimizer, "cpu")
    moved.load_state_dict(state)
    assert all(t.device.type == "cpu" for s in moved.state.values() for t in s.values())
    optimizer.load_state_dict(moved.state_dict())
    assert_close(optimizer.state_dict()["state"], state["state"], rtol=0, atol=0)  # on the GPU again
