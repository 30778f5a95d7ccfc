"""Every faster path is the update rule: in blocks, the Triton kernel by its interpreter, compiled steps."""

import contextlib
import json
import os
import pickle
import subprocess
import sys
import unittest.mock
import warnings
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import grassmann_optimizer as go
from grassmann_optimizer import SGDG, AdamG, unit
from resnet import WideResNet

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # the kernel's: on the CPU in Triton's interpreter
pytestmark = pytest.mark.filterwarnings("ignore:steps of plain SGD")
BOTH = pytest.mark.parametrize("Optimizer", [SGDG, AdamG])
DECAY, BETA2, EPSILON = 0.9, 0.99, 1e-8
SHAPES = [(3, 27), (5, 144), (2, 300)]


def random_layer(rows, n, adam, dtype, *, scale=1.0, seed=0):
    """y, g, m, v with |h| >= |g|/10, so that the projection does not cancel."""
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape):
        return torch.randn(*shape, generator=generator, dtype=dtype)

    y = unit(randn(rows, n))[0]
    tangent = go.project(y, randn(rows, n))
    along = torch.rand(rows, 1, generator=generator, dtype=dtype) * 18 - 9
    g = scale * (unit(tangent)[0] + along * y)
    m = go.project(y, randn(rows, n)) * 0.01
    v = torch.rand(rows, 1, generator=generator, dtype=dtype) if adam else None
    return y, g, m, v


def by_rule(y, g, m, v, lr, step, clip, omega=0.0):
    """The update rule in float64."""
    y, g, m, v = (None if t is None else t.double() for t in (y, g, m, v))
    options = {"lr": lr, "omega": omega, "grad_clip": clip}
    if v is None:
        return (*go.sgdg_update(y, g, m, momentum=DECAY, **options), None)
    step = torch.tensor(float(step), dtype=torch.float64)
    return go.adamg_update(y, g, m, v, step, beta1=DECAY, beta2=BETA2, epsilon=EPSILON, **options)


def rate_of(lr, step, adam):
    if not adam:
        return lr
    return lr * go._bias_correction(torch.tensor(float(step), dtype=torch.float64), DECAY, BETA2).item()


def assert_same(got, expected, dtype):
    """float64: each row to 1e-12 of its norm. float32: y to 1e-6, and to 4e-6 the momentum, whose part along
    h carries the projection's cancellation (|g| is up to 9 |h| here) undamped, and v, a square of it. Where
    momentum and gradient nearly cancel, what counts is their size of 0.01.
    """
    for a, b, single in zip(got, expected, (1e-6, 4e-6, 4e-6), strict=True):
        if a is not None:
            error = ((a.double() - b).norm(dim=-1) / b.norm(dim=-1).clamp(min=0.01)).max()
            assert error <= (1e-12 if dtype == torch.float64 else single), error


@pytest.mark.parametrize("adam", [False, True])
@pytest.mark.parametrize("clip", [None, 0.1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@settings(deadline=None, max_examples=25)
@given(
    rows=st.integers(1, 9),
    block=st.integers(1, 9),
    n=st.integers(2, 70),
    exponent=st.integers(-8, 8),
    seed=st.integers(0, 2**31),
)
def test_the_path_in_blocks_is_the_rule(adam, clip, dtype, rows, block, n, exponent, seed):
    scale = 10.0**exponent if clip else 10.0 ** min(exponent, 0)
    y, g, m, v = random_layer(rows, n, adam, dtype, scale=scale, seed=seed)
    expected = by_rule(y, g, m, v, 0.2, 3, clip)
    options = {"decay": DECAY, "beta2": BETA2, "epsilon": EPSILON, "grad_clip": clip}
    before = g.clone()
    with unittest.mock.patch.object(go, "_BLOCK", block * n):
        go._advance(y, g, m, v, rate_of(0.2, 3, adam), **options)
    assert torch.equal(g, before)
    assert_same((y, m, v), expected, dtype)


@BOTH
@pytest.mark.parametrize("clip", [None, 0.1])
def test_huge_and_tiny_gradients_stay_finite_and_on_the_sphere(Optimizer, clip):
    for size in (1e-30, 1e-20, 1e20, 1e30):
        y = unit(torch.randn(5, 30))[0]
        p = nn.Parameter(y.clone())
        optimizer = Optimizer([p], lr=0.1, momentum=0.9, grassmann=True, grad_clip=clip)
        for _ in range(3):
            p.grad = size * torch.randn(5, 30)
            optimizer.step()
        torch.testing.assert_close(p.detach().norm(dim=1), torch.ones(5), atol=1e-6, rtol=0)
        if size == 1e-30:
            torch.testing.assert_close(p.detach(), y, atol=1e-6, rtol=0)


@BOTH
@pytest.mark.parametrize("omega", [0.0, 0.1])
def test_a_step_needs_little_memory_besides_the_state(Optimizer, omega):
    """Under 32 MB for the largest layer of WRN-28-10; with the regularizer its gradient is whole."""
    p = nn.Parameter(unit(torch.randn(640, 5760))[0].view(640, 640, 3, 3))
    p.grad = torch.randn_like(p) * 1e-3
    optimizer = Optimizer([p], lr=0.2, momentum=0.9, grassmann=True, grad_clip=0.1, omega=omega)
    optimizer.step()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        optimizer.step()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    assert 0 < peak < (32e6 if omega else 2e6)


@BOTH
@pytest.mark.parametrize("omega", [0.0, 0.1])
def test_compiled_training_steps_are_the_eager_ones(Optimizer, omega):
    """`aot_eager` runs torch.compile's graph capture and functionalization without a C++ compiler."""
    x, labels = torch.randn(8, 3, 8, 8), torch.arange(8)

    def train(compiled):
        torch.manual_seed(0)
        model = WideResNet(10, 1, 10)
        optimizer = Optimizer(go.grassmann_param_groups(model, 0.01, 0.2, omega=omega))

        def step():
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(x), labels)
            loss.backward()
            optimizer.step()
            return loss

        if compiled:
            step = torch.compile(step, backend="aot_eager")
        for _ in range(10):
            step()
        momentum = [s["momentum_buffer"] for s in optimizer.state.values()]
        return [*model.parameters(), *momentum]

    for eager, compiled in zip(train(False), train(True), strict=True):
        torch.testing.assert_close(compiled, eager, rtol=1e-4, atol=1e-5)
    torch._dynamo.reset()


@BOTH
@pytest.mark.parametrize("omega", [0.0, 0.1])
def test_steps_through_the_kernel_are_the_steps_in_blocks(Optimizer, omega, monkeypatch):
    """Weight, state, table and kernel together, for weights stored in different ways and two groups."""

    def train(kernel):
        torch.manual_seed(0)
        shapes = [(4, 3, 3, 3), (8, 4, 3, 3), (4, 27)]  # the last as many rows and columns as the first
        params = [nn.Parameter(torch.randn(shape, device=DEVICE)) for shape in shapes]
        params[1].data = params[1].data.to(memory_format=torch.channels_last)
        params.append(
            nn.Parameter(torch.randn(5, 14, device=DEVICE)[:, ::2])
        )  # not dense: worked on as a copy
        monkeypatch.setattr(go, "_KERNEL_DEVICE", DEVICE if kernel else None)
        groups = [{"params": params[:3], "lr": 0.2}, {"params": params[3:], "lr": 0.1}]
        optimizer = Optimizer(groups, momentum=0.9, grassmann=True, omega=omega, grad_clip=0.1)
        for _ in range(3):
            for p in params:
                p.grad = torch.randn(p.shape, device=DEVICE)
            optimizer.step()
        return [*params, *(optimizer.state[p]["momentum_buffer"] for p in params)]

    for by_kernel, in_blocks in zip(train(True), train(False), strict=True):
        torch.testing.assert_close(by_kernel, in_blocks, rtol=1e-5, atol=1e-6)


@BOTH
@pytest.mark.parametrize("kernel", [True, False])
@pytest.mark.parametrize("omega", [0.0, 0.1])
@pytest.mark.parametrize("length", [1e-25, 1e-19, 1e19, 1e25])
def test_rows_of_any_length_are_normalized_by_the_first_step(Optimizer, kernel, omega, length, monkeypatch):
    monkeypatch.setattr(go, "_KERNEL_DEVICE", DEVICE if kernel else None)
    torch.manual_seed(0)
    y = unit(torch.randn(5, 60, device=DEVICE))[0]
    gradient = torch.randn_like(y)
    results = []
    for factor in (1.0, length):
        p = nn.Parameter(y * factor)
        p.grad = gradient.clone()
        Optimizer([p], lr=0.2, momentum=0.9, grassmann=True, grad_clip=0.1, omega=omega).step()
        results.append(p.detach())
    torch.testing.assert_close(results[1], results[0], rtol=0, atol=1e-6)


@BOTH
def test_a_step_inside_autocast_is_the_step_outside(Optimizer):
    results = []
    for enabled in (False, True):
        torch.manual_seed(0)
        p = nn.Parameter(unit(torch.randn(8, 60))[0])
        p.grad = torch.randn_like(p)
        optimizer = Optimizer([p], lr=0.2, grassmann=True, omega=0.1)
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            optimizer.step()
        results.append(p.detach())
    assert torch.equal(*results)


def launch_all(layers, rates, options):
    for i, layer in enumerate(layers):
        go._launch(*layer, rates, i, **options)


@pytest.mark.parametrize("adam", [False, True])
@pytest.mark.parametrize("clip", [None, 0.1])
def test_the_triton_kernel_is_the_rule(adam, clip):
    """Rows of three sizes, each at most doubled."""
    layers = [random_layer(*shape, adam, torch.float32, seed=i) for i, shape in enumerate(SHAPES)]
    layers = [tuple(t if t is None else t.to(DEVICE) for t in layer) for layer in layers]
    lrs = [0.1, 0.2, 0.3]
    expected = [by_rule(*layer, lr, 3, clip) for layer, lr in zip(layers, lrs, strict=True)]
    rates = torch.tensor([rate_of(lr, 3, adam) for lr in lrs], device=DEVICE)
    launch_all(layers, rates, {"decay": DECAY, "beta2": BETA2, "epsilon": EPSILON, "grad_clip": clip})
    for (y, _, m, v), right in zip(layers, expected, strict=True):
        assert_same((y, m, v), right, torch.float32)


class Kernel:
    """In place of the Triton kernel: notes the launches, makes those fail that `fails` names by number."""

    def __init__(self, fails=lambda number: False):
        self.kernel, self.fails, self.launches = go._advance_kernel, fails, []

    def __getitem__(self, grid):
        def launch(y, *arguments, **options):
            self.launches.append((tuple(y.shape), options))
            if self.fails(len(self.launches)):
                raise RuntimeError("Failed to find C compiler.\nPlease specify via CC environment variable")
            return self.kernel[grid](y, *arguments, **options)

        return launch


@pytest.fixture
def kernel(monkeypatch):
    """kernel(fails): a `Kernel` in a process that has launched none yet."""

    def make(*fails):
        kernel = Kernel(*fails)
        values = {"_KERNEL_DEVICE": DEVICE, "_advance_kernel": kernel, "_LAUNCHED": set()}
        for name, value in {**values, "_WITHOUT_KERNEL": set()}.items():
            monkeypatch.setattr(go, name, value)
        return kernel

    return make


def test_a_row_is_rounded_up_at_most_twofold_and_what_the_kernel_cannot_hold_goes_in_blocks(kernel):
    params = [nn.Parameter(torch.randn(3, n, device=DEVICE)) for n in (27, 32, 33, 8192, 8193)]
    params.append(nn.Parameter(torch.randn(3, 40, dtype=torch.float64, device=DEVICE)))
    launched = kernel().launches
    optimizer = SGDG(params, lr=0.2, grassmann=True)
    for p in params:
        p.grad = torch.randn_like(p)
    optimizer.step()
    sizes = {shape[1]: options["SIZE"] for shape, options in launched}
    assert sizes == {27: 32, 32: 32, 33: 64, 8192: 8192}


def train_two(Optimizer):
    """Two optimizers of two weights each, the second through a pickle; the bits after three steps."""
    torch.manual_seed(0)
    options = {"lr": 0.2, "momentum": 0.9, "grassmann": True, "omega": 0.1, "grad_clip": 0.1}
    weights = [[nn.Parameter(torch.randn(5, n, device=DEVICE)) for n in (14, 40)] for _ in range(2)]
    optimizers = [
        Optimizer(weights[0], **options),
        pickle.loads(pickle.dumps(Optimizer(weights[1], **options))),
    ]
    for optimizer in optimizers * 3:
        for p in optimizer.param_groups[0]["params"]:
            p.grad = torch.randn_like(p)
        optimizer.step()
    states = [t for optimizer in optimizers for s in optimizer.state.values() for t in s.values()]
    return [p.detach() for optimizer in optimizers for p in optimizer.param_groups[0]["params"]] + states


@BOTH
@pytest.mark.parametrize("before", [0, 1])
def test_where_the_kernel_cannot_be_built_the_blocks_take_over_with_one_warning(Optimizer, before, kernel):
    """Also where one size of a row could be launched and the next one cannot."""
    failing = kernel(lambda number: number > before)
    with pytest.warns(UserWarning, match=r"no Triton kernel.*C compiler. Please.*python3-dev") as caught:
        got = train_two(Optimizer)
    assert (len(failing.launches), len(caught)) == (before + 1, 1)
    go._WITHOUT_KERNEL.add(torch.device("meta"))  # another device is heard of without a second warning
    go._LAUNCHED.clear()
    go._WITHOUT_KERNEL.discard(torch.empty(0, device=DEVICE).device)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train_two(Optimizer)
    expected = train_two(Optimizer)  # in blocks; Adam-G counts its steps once
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6 if before else 0)


@BOTH
def test_an_error_of_a_later_launch_is_not_hidden(Optimizer, kernel):
    kernel(lambda number: number > 2)
    with pytest.raises(RuntimeError, match="C compiler"):
        train_two(Optimizer)


@BOTH
@pytest.mark.parametrize("by_kernel", [True, False])
@pytest.mark.parametrize("ratio", [1e2, 1e4, 1e6])
def test_a_gradient_nearly_along_the_row_leaves_row_and_momentum_right(
    Optimizer, by_kernel, ratio, monkeypatch
):
    """One projection would leave a momentum that is not tangent, by 1e-5 to 1e-2 of its length."""
    monkeypatch.setattr(go, "_KERNEL_DEVICE", DEVICE if by_kernel else None)
    torch.manual_seed(0)
    p = nn.Parameter(unit(torch.randn(5, 60, device=DEVICE))[0])
    optimizer = Optimizer([p], lr=0.2, momentum=0.9, grassmann=True, grad_clip=0.1)
    for _ in range(20):
        p.grad = torch.randn_like(p) + ratio * p.detach()
        optimizer.step()
        y, m = p.detach().double(), optimizer.state[p]["momentum_buffer"].double()
        assert (y.norm(dim=1) - 1).abs().max() < 1e-6
        assert ((y * m).sum(1).abs() / m.norm(dim=1)).max() < 2e-6


@BOTH
@pytest.mark.parametrize("omega", [0.0, 0.1])
def test_many_steps_keep_the_rows_unit(Optimizer, omega):
    p = nn.Parameter(unit(torch.randn(4, 10))[0])
    optimizer = Optimizer([p], lr=0.2, momentum=0.9, grassmann=True, grad_clip=0.1, omega=omega)
    gradients = torch.randn(100, 4, 10)
    for i in range(2_000):
        p.grad = gradients[i % 100]
        optimizer.step()
    assert (p.detach().double().norm(dim=1) - 1).abs().max() < 1e-6


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


@BOTH
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_device_without_float64_takes_the_same_steps_without_a_look(Optimizer, dtype, monkeypatch):
    results = []
    for mode in (contextlib.nullcontext(), NoFloat64()):
        torch.manual_seed(0)
        params = [nn.Parameter(torch.randn(shape).to(dtype)) for shape in ((4, 2, 3, 3), (5, 60), (7,))]
        rows = {"grassmann": True, "omega": 0.1, "grad_clip": 0.1}
        groups = [{"params": params[:2], **rows}, {"params": params[2:]}]
        optimizer = Optimizer(groups, lr=0.2, momentum=0.9)
        for p in params:
            p.grad = torch.randn_like(p)
        with mode:
            optimizer.step()
        results.append([p.detach() for p in params])
        monkeypatch.setattr(go, "_is_on_host", lambda t: False)
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6)


def test_a_device_without_float64_is_measured():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))
    with NoFloat64(looks=True):
        (measured,) = go.scale_invariance(model, lambda net: net(torch.randn(4, 3, 6, 6)).pow(3).sum())
    assert measured.invariant


def compiled(capabilities, lengths):
    """[capability, length of a row, method, registers, bytes of stack]: the kernel built without a GPU."""
    words = [sys.executable, Path(__file__).with_name("compile_kernel.py"), capabilities, lengths]
    pytest.importorskip("triton")
    clean = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    run = subprocess.run(words, env=clean, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)


CAPABILITIES = "75 80 86 89 90 100 120"


@pytest.mark.parametrize(
    ("capabilities", "lengths"),
    [("75 120", "8192"), pytest.param(CAPABILITIES, "32 1024 8192", marks=pytest.mark.long)],
)
def test_the_kernel_compiles_without_a_gpu_and_spills_little(capabilities, lengths):
    found = compiled(capabilities, lengths)
    assert len(found) == 2 * len(capabilities.split()) * len(lengths.split())
    for capability, length, method, registers, stack in found:
        assert 0 < registers <= 255
        assert stack <= 100, (capability, length, method)
