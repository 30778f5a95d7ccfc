"""What only a GPU can show of the optimizers: kernel, no waiting for the device, CUDA graphs, moved state."""

import copy

import pytest
import torch
from torch.nn.functional import cross_entropy

import grassmann_optimizer as go
from grassmann_optimizer import SGDG, AdamG
from resnet import WideResNet

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
BOTH = pytest.mark.parametrize("Optimizer", [SGDG, AdamG])
OMEGAS = pytest.mark.parametrize("omega", [0.0, 0.1])


def make(Optimizer, device, omega=0.1, **rates):
    """A small network and its optimizer; the same weights on any device."""
    torch.manual_seed(0)
    model = WideResNet(10, 1, 10).to(device, memory_format=torch.channels_last)
    rates = {"lr": 0.01, "lrg": 0.2, **rates}
    return model, Optimizer(go.grassmann_param_groups(model, omega=omega, **rates))


def give_gradients(model, step):
    generator = torch.Generator().manual_seed(step)
    for p in model.parameters():
        p.grad = (
            torch.randn(p.shape, generator=generator).to(p.device).to(memory_format=torch.preserve_format)
        )


@BOTH
@OMEGAS
def test_steps_are_those_of_the_cpu(Optimizer, omega):
    results = []
    for device in ("cpu", "cuda"):
        model, optimizer = make(Optimizer, device, omega)
        for step in range(5):
            give_gradients(model, step)
            optimizer.step()
        results.append([p.detach().cpu() for p in model.parameters()])
    for on_cpu, on_gpu in zip(*results, strict=True):
        torch.testing.assert_close(on_gpu, on_cpu, rtol=1e-4, atol=1e-5)


@BOTH
@OMEGAS
def test_a_step_does_not_wait_for_the_device(Optimizer, omega):
    model, optimizer = make(Optimizer, "cuda", omega)
    for step in range(2):  # state and the compiled kernels
        give_gradients(model, step)
        optimizer.step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        optimizer.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@BOTH
@OMEGAS
@pytest.mark.parametrize("by_kernel", [True, False])  # or in blocks, as where it cannot be built
def test_a_cuda_graph_replays_training_steps(Optimizer, omega, by_kernel, monkeypatch):
    monkeypatch.setattr(go, "_KERNEL_DEVICE", "cuda" if by_kernel else None)
    images = torch.randn(8, 3, 32, 32, device="cuda").to(memory_format=torch.channels_last)
    labels = torch.arange(8, device="cuda")
    rates = {"lr": torch.tensor(0.01, device="cuda"), "lrg": torch.tensor(0.2, device="cuda")}
    eager, eager_optimizer = make(Optimizer, "cuda", omega)
    graphed, optimizer = make(Optimizer, "cuda", omega, **rates)

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
    for a, b in zip(eager.parameters(), graphed.parameters(), strict=True):
        torch.testing.assert_close(b, a, rtol=1e-2, atol=1e-3)


@BOTH
def test_a_state_moves_to_another_device_and_back(Optimizer):
    model, optimizer = make(Optimizer, "cuda")
    give_gradients(model, 0)
    optimizer.step()
    state = copy.deepcopy(optimizer.state_dict())
    _, moved = make(Optimizer, "cpu")
    moved.load_state_dict(state)
    assert all(t.device.type == "cpu" for s in moved.state.values() for t in s.values())
    optimizer.load_state_dict(moved.state_dict())
    for index, values in optimizer.state_dict()["state"].items():
        for key, value in values.items():
            assert value.is_cuda
            assert torch.equal(value, state["state"][index][key])
