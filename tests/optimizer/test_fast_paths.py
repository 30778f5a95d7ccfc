"""Every way to make a step is the update rule: in blocks, by the Triton kernel (interpreted), compiled."""

import contextlib
import copy
import json
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from optimizer.steps import BOTH, ON_ROWS, by_rule, take_steps
from torch import nn
from torch.nn.functional import cross_entropy
from torch.profiler import ProfilerActivity, profile
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import grassmann_optimizer as go
from grassmann_optimizer import SGDG, AdamG, unit

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # the kernel's: on the CPU in Triton's interpreter


class NoFloat64(TorchDispatchMode):
    """A device that has no float64, and that must not be waited for (`looks`: unless at the end)."""

    def __init__(self, looks=False):
        super().__init__()
        self.looks = looks

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert self.looks or func is not torch.ops.aten._local_scalar_dense.default
        result = func(*args, **(kwargs or {}))
        assert not any(isinstance(t, torch.Tensor) and t.dtype == torch.float64 for t in tree_leaves(result))
        return result


WAYS = ["in blocks", "in small blocks", "by the kernel", "inside autocast", "without float64"]


@pytest.fixture(params=WAYS)
def way(request, monkeypatch):
    """One of WAYS, which `step` takes."""
    torch.manual_seed(0)
    monkeypatch.setattr(go, "_KERNEL_DEVICE", DEVICE if request.param == "by the kernel" else None)
    if request.param == "in small blocks":
        monkeypatch.setattr(go, "_BLOCK", 100)  # elements: one row or a few
    if request.param == "without float64":
        if DEVICE == "cuda":
            pytest.skip("a GPU has float64")
        monkeypatch.setattr(go, "_is_on_host", lambda t: False)
    return request.param


def step(optimizer, way):
    autocast = torch.autocast(DEVICE, torch.bfloat16, enabled=way == "inside autocast")
    with autocast, NoFloat64() if way == "without float64" else contextlib.nullcontext():
        optimizer.step()


def make_weights(way):
    """The same at each call: stored in different ways, of rows of any length, three alike as (rows, n)."""
    torch.manual_seed(0)
    shapes = (4, 3, 3, 3), (8, 4, 3, 3), (4, 3, 3, 3), (5, 14), (4, 27), (2, 300), (5, 60), (5, 60), (3, 9)
    weights = [torch.randn(shape, device=DEVICE) for shape in shapes]
    weights[1] = weights[1].to(memory_format=torch.channels_last)
    weights[2] = weights[2].transpose(1, 3)
    weights[3] = weights[3][:, ::2]  # not dense: worked on as a copy
    weights[6] *= 1e-25
    weights[7] *= 1e25
    weights[8][1:] = 0  # zero rows, of which the last one has no gradient either
    if way != "without float64":
        weights.append(torch.randn(5, 20, device=DEVICE, dtype=torch.float64))
    return weights


@BOTH
def test_steps_are_the_rule_and_gradients_are_read_only(Optimizer, way):
    weights = make_weights(way)
    gradients = [torch.rand(3, *w.shape, device=DEVICE).sub(0.5).to(w.dtype) for w in weights]  # some clipped
    gradients[0] = [g.to(memory_format=torch.channels_last) for g in gradients[0]]
    gradients[4] = [None, *gradients[4][1:]]  # each weight has its own number of steps
    gradients[8][:, 2] = 0
    adam = {"beta2": 0.95, "epsilon": 1e-3} if Optimizer is AdamG else {}
    for omega, grad_clip in ((0.0, None), (0.1, 1.0)):
        options = {"lr": 0.3, "momentum": 0.7, "omega": omega, "grad_clip": grad_clip, **adam}
        params = list(map(nn.Parameter, make_weights(way)))
        optimizer = Optimizer(params, grassmann=True, **options)
        for given in zip(*gradients, strict=True):
            for p, g in zip(params, given, strict=True):
                p.grad = copy.deepcopy(g)
            step(optimizer, way)
            assert all(g is None or torch.equal(p.grad, g) for p, g in zip(params, given, strict=True))
        for p, w, given in zip(params, weights, gradients, strict=True):
            state = optimizer.state[p]
            got = p.detach().flatten(1), state["momentum_buffer"].flatten(1), state.get("second_moment")
            steps = [g.flatten(1) for g in given if g is not None]
            expected = by_rule(Optimizer, w.flatten(1), steps, **options)
            tolerance = 1e-12 if p.dtype == torch.float64 else 1e-6
            for a, b in zip(got, expected, strict=True):
                if a is not None:
                    assert_close(a.double(), b, rtol=tolerance, atol=tolerance)


@BOTH
@pytest.mark.parametrize("clip", [None, 0.1])
@pytest.mark.filterwarnings("ignore:overflow")  # of the interpreter
def test_huge_and_tiny_gradients_stay_finite_and_on_the_sphere(Optimizer, clip, way):
    for size in (1e-30, 1e-20, 1e20, 1e30):
        y = unit(torch.randn(5, 30, device=DEVICE))[0]
        p = nn.Parameter(y.clone())
        optimizer = Optimizer([p], lr=0.1, momentum=0.9, grassmann=True, grad_clip=clip)
        for _ in range(3):
            p.grad = size * torch.randn_like(p)
            step(optimizer, way)
        assert_close(p.detach().norm(dim=1), torch.ones(5, device=DEVICE), atol=1e-6, rtol=0)
        if size == 1e-30:
            assert_close(p.detach(), y, atol=1e-6, rtol=0)


@BOTH
@pytest.mark.parametrize("ratio", [1e2, 1e4, 1e6])
def test_a_gradient_nearly_along_the_row_leaves_row_and_momentum_right(Optimizer, ratio, way):
    """One projection would leave a momentum that is not tangent, by 1e-5 to 1e-2 of its length."""
    p = nn.Parameter(unit(torch.randn(5, 60, device=DEVICE))[0])
    optimizer = Optimizer([p], lr=0.2, momentum=0.9, grassmann=True, grad_clip=0.1)
    for _ in range(20):
        p.grad = torch.randn_like(p) + ratio * p.detach()
        step(optimizer, way)
        y, m = p.detach().double(), optimizer.state[p]["momentum_buffer"].double()
        assert (y.norm(dim=1) - 1).abs().max() < 1e-6
        assert ((y * m).sum(1).abs() / m.norm(dim=1)).max() < 2e-6


@BOTH
@pytest.mark.parametrize("omega", [0.0, 0.1])
def test_a_step_needs_little_memory_besides_the_state(Optimizer, omega):
    """Under 32 MB for the largest layer of WRN-28-10; with the regularizer its gradient is whole."""
    optimizer = Optimizer([nn.Parameter(torch.randn(640, 640, 3, 3))], **ON_ROWS | {"omega": omega})
    take_steps(optimizer, [0])
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        optimizer.step()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    assert 0 < peak < (32e6 if omega else 2e6)


@BOTH
def test_compiled_training_steps_are_the_eager_ones(Optimizer):
    """`aot_eager` runs torch.compile's graph capture and functionalization without a C++ compiler."""
    x, labels = torch.randn(8, 3, 8, 8), torch.arange(8)

    def train(compiled):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(288, 8))
        optimizer = Optimizer(go.grassmann_param_groups(model, 0.01, 0.2))

        def train_step():
            optimizer.zero_grad()
            cross_entropy(model(x), labels).backward()
            optimizer.step()

        train_step = torch.compile(train_step, backend="aot_eager") if compiled else train_step
        for _ in range(10):
            train_step()
        return [*model.parameters(), *(s["momentum_buffer"] for s in optimizer.state.values())]

    eager = train(False)  # first: else torch starts threads, and no later test could fork
    assert_close(train(True), eager, rtol=1e-4, atol=1e-5)
    torch._dynamo.reset()


def test_a_device_without_float64_is_measured():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))
    with NoFloat64(looks=True):
        (measured,) = go.scale_invariance(model, lambda net: net(torch.randn(4, 3, 6, 6)).pow(3).sum())
    assert measured.invariant


# ------------------------------------------------------------------------------------- the kernel's launches


class Kernel:
    """In place of the Triton kernel: notes the launches, and fails in all after the first `works` ones."""

    def __init__(self, works):
        self.kernel, self.works, self.sizes = go._advance_kernel, works, {}

    def __getitem__(self, grid):
        def launch(y, *arguments, **options):
            self.sizes[y.shape[1]] = options["SIZE"]
            self.works -= 1
            if self.works < 0:
                raise RuntimeError("Failed to find C compiler.\nPlease specify via CC environment variable")
            return self.kernel[grid](y, *arguments, **options)

        return launch


@pytest.fixture
def kernel(monkeypatch):
    """kernel(works): a `Kernel` in a process that has launched none yet."""

    def make(works=10**6):
        values = {"_KERNEL_DEVICE": DEVICE, "_advance_kernel": Kernel(works), "_LAUNCHED": set()}
        for name, value in {**values, "_WITHOUT_KERNEL": set()}.items():
            monkeypatch.setattr(go, name, value)
        return go._advance_kernel

    return make


def test_a_row_is_rounded_up_at_most_twofold_and_what_the_kernel_cannot_hold_goes_in_blocks(kernel):
    weights = [torch.randn(3, n, device=DEVICE) for n in (27, 32, 33, 8192, 8193)]
    weights.append(torch.randn(3, 40, dtype=torch.float64, device=DEVICE))
    launched = kernel()
    take_steps(SGDG(map(nn.Parameter, weights), lr=0.2, grassmann=True), [0])
    assert launched.sizes == {27: 32, 32: 32, 33: 64, 8192: 8192}


def train_two(Optimizer):
    """Two weights and their state after three steps."""
    torch.manual_seed(0)
    weights = [nn.Parameter(torch.randn(5, n, device=DEVICE)) for n in (14, 40)]
    return weights, take_steps(Optimizer(weights, **ON_ROWS), range(3)).state_dict()["state"]


@BOTH
@pytest.mark.parametrize("works", [0, 1])
def test_where_the_kernel_cannot_be_built_the_blocks_take_over_with_one_warning(Optimizer, works, kernel):
    """Also where one size of a row could be launched and the next one cannot."""
    failing = kernel(works)
    with pytest.warns(UserWarning, match=r"no Triton kernel.*C compiler. Please.*python3-dev") as caught:
        got = train_two(Optimizer)
    assert (failing.works, len(caught)) == (-1, 1)  # one launch failed, and no other was tried
    go._WITHOUT_KERNEL.add(torch.device("meta"))  # another device is heard of without a second warning
    go._LAUNCHED.clear()
    go._WITHOUT_KERNEL.discard(torch.empty(0, device=DEVICE).device)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train_two(Optimizer)
        expected = train_two(Optimizer)  # in blocks; Adam-G counts its steps once
    assert_close(got, expected, rtol=0, atol=1e-6 if works else 0)


@BOTH
def test_an_error_of_a_later_launch_is_not_hidden(Optimizer, kernel):
    kernel(works=2)
    with pytest.raises(RuntimeError, match="C compiler"):
        train_two(Optimizer)


ALL_LENGTHS = pytest.param("75 80 86 89 90 100 120", "32 1024 8192", marks=pytest.mark.long)


@pytest.mark.parametrize(("capabilities", "lengths"), [("75 120", "8192"), ALL_LENGTHS])
def test_the_kernel_compiles_without_a_gpu_and_spills_little(capabilities, lengths):
    pytest.importorskip("triton")
    words = [sys.executable, Path(__file__).with_name("compile_kernel.py"), capabilities, lengths]
    clean = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    run = subprocess.run(words, env=clean, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    found = json.loads(run.stdout)
    assert len(found) == 2 * len(capabilities.split()) * len(lengths.split())
    for capability, length, method, registers, stack in found:
        assert 0 < registers <= 255
        assert stack <= 100, (capability, length, method)
