"""Every faster path is the update rule: in blocks, the Triton kernel by its interpreter, compiled steps."""

import math
import pickle
import unittest.mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.profiler import ProfilerActivity, profile

import grassmann_optimizer as go
from grassmann_optimizer import SGDG, AdamG, unit
from resnet import WideResNet

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # the kernel's: on the CPU in Triton's interpreter
pytestmark = pytest.mark.filterwarnings("ignore:steps of plain SGD")
BOTH = pytest.mark.parametrize("Optimizer", [SGDG, AdamG])
DECAY, BETA2, EPSILON = 0.9, 0.99, 1e-8


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


@pytest.mark.parametrize("adam", [False, True])
@pytest.mark.parametrize("clip", [None, 0.1])
def test_the_triton_kernel_is_the_rule(adam, clip):
    """Three layers in one launch."""
    shapes = [(3, 27), (5, 144), (2, 300)]
    layers = [random_layer(*shape, adam, torch.float32, seed=i) for i, shape in enumerate(shapes)]
    layers = [tuple(t if t is None else t.to(DEVICE) for t in layer) for layer in layers]
    lrs = [0.1, 0.2, 0.3]
    expected = [by_rule(*layer, lr, 3, clip) for layer, lr in zip(layers, lrs, strict=True)]
    rates = torch.tensor([rate_of(lr, 3, adam) for lr in lrs], device=DEVICE)
    options = {"decay": DECAY, "beta2": BETA2, "epsilon": EPSILON, "grad_clip": clip}
    table = [t.to(DEVICE) for t in go._host_table(layers, pin=False)]
    go._advance_all(layers, rates, *table, **options)
    for (y, _, m, v), right in zip(layers, expected, strict=True):
        assert_same((y, m, v), right, torch.float32)


def edges(dtype, device):
    """y and g: zero gradient, zero row, a gradient along y, |h| of 1e-30 and 1e30, a row of length 2."""
    y = torch.eye(6, 40, dtype=dtype, device=device)
    y[1] = 0
    y[5] *= 2
    g = torch.zeros_like(y)
    g[1, 7], g[2, 2], g[3, 7], g[4, 7], g[5, 7] = 0.05, 1.0, 1e-30, 1e30, 0.05
    return y, g


def test_edges_in_the_triton_kernel():
    y, g = edges(torch.float32, DEVICE)
    m = torch.zeros_like(y)
    layers = [(y, g, m, None)]
    table = [t.to(DEVICE) for t in go._host_table(layers, pin=False)]
    rates = torch.tensor([0.5], device=DEVICE)
    go._advance_all(layers, rates, *table, decay=0.9, grad_clip=0.1)
    check_edges(y.cpu(), m.cpu())


def check_edges(y, m):
    expected = torch.eye(6, 40)
    expected[1, 1], expected[1, 7] = 0, -1  # a zero row takes the direction of its step
    for row, angle in ((4, 0.5 * 0.1), (5, 0.5 * 0.05)):
        expected[row, row], expected[row, 7] = math.cos(angle), -math.sin(angle)
    torch.testing.assert_close(y, expected, atol=1e-7, rtol=0)
    assert m.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_edges_in_blocks(dtype, monkeypatch):
    monkeypatch.setattr(go, "_BLOCK", 80)  # two rows
    y, g = edges(dtype, "cpu")
    p = nn.Parameter(y)
    p.grad = g
    optimizer = SGDG([p], lr=0.5, momentum=0.9, grassmann=True, grad_clip=0.1)
    optimizer.step()
    check_edges(p.detach().float(), optimizer.state[p]["momentum_buffer"])


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
@pytest.mark.parametrize("steps", [3_000, pytest.param(100_000, marks=pytest.mark.long)])
def test_many_steps_keep_the_rows_unit(Optimizer, omega, steps):
    p = nn.Parameter(unit(torch.randn(4, 10))[0])
    optimizer = Optimizer([p], lr=0.2, momentum=0.9, grassmann=True, grad_clip=0.1, omega=omega)
    gradients = torch.randn(100, 4, 10)
    for i in range(steps):
        p.grad = gradients[i % 100]
        optimizer.step()
        if i % 100 == 99:
            assert (p.detach().double().norm(dim=1) - 1).abs().max() < 1e-6


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


def test_rows_too_long_for_the_kernel_and_other_types_go_in_blocks(monkeypatch):
    monkeypatch.setattr(go, "_KERNEL_DEVICE", DEVICE)
    monkeypatch.setattr(go, "_LONGEST_ROW", 64)
    by_kernel = []
    suits = go._suits_kernel
    monkeypatch.setattr(go, "_suits_kernel", lambda p: suits(p) and (by_kernel.append(p.shape) or True))
    layers = [random_layer(3, n, False, torch.float32, seed=n) for n in (65, 64, 27)]
    params = [nn.Parameter(y.clone().to(DEVICE)) for y, *_ in layers]
    params.append(nn.Parameter(torch.eye(2, 9, dtype=torch.float64, device=DEVICE)))
    for p, layer in zip(params, layers, strict=False):
        p.grad = layer[1].to(DEVICE)
    params[3].grad = torch.ones_like(params[3])
    optimizer = SGDG(params, lr=0.2, momentum=DECAY, grassmann=True, grad_clip=0.1)
    optimizer.step()
    assert by_kernel == [(3, 64), (3, 27)]
    for p, (y, g, m, _) in zip(params, layers, strict=False):
        expected = by_rule(y, g, torch.zeros_like(m), None, 0.2, 1, 0.1)
        assert_same(
            (p.detach().cpu(), optimizer.state[p]["momentum_buffer"].cpu(), None), expected, torch.float32
        )


@BOTH
@pytest.mark.parametrize("kernel", [True, False])
@pytest.mark.parametrize("ratio", [1e2, 1e4, 1e6])
def test_rows_stay_unit_where_the_gradient_is_nearly_along_them(Optimizer, kernel, ratio, monkeypatch):
    monkeypatch.setattr(go, "_KERNEL_DEVICE", DEVICE if kernel else None)
    torch.manual_seed(0)
    p = nn.Parameter(unit(torch.randn(5, 60, device=DEVICE))[0])
    optimizer = Optimizer([p], lr=0.2, momentum=0.9, grassmann=True, grad_clip=0.1)
    for _ in range(20):
        p.grad = torch.randn_like(p) + ratio * p.detach()
        optimizer.step()
        assert (p.detach().double().norm(dim=1) - 1).abs().max() < 1e-6


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


def test_a_group_may_move_to_the_manifold_later():
    p = nn.Parameter(torch.randn(4, 9))
    optimizer = AdamG([p], lr=0.1, momentum=0.9)
    for grassmann in (False, True):
        optimizer.param_groups[0]["grassmann"] = grassmann
        p.grad = torch.randn_like(p)
        optimizer.step()
    assert optimizer.state[p]["step"] == 1
    assert p.isfinite().all()


class FailingKernel:
    """In place of the Triton kernel: `fails` names the numbers of the launches that raise."""

    def __init__(self, kernel, fails):
        self.kernel, self.fails, self.launches = kernel, fails, 0

    def __getitem__(self, grid):
        def launch(*arguments, **options):
            self.launches += 1
            if self.fails(self.launches):
                raise RuntimeError("Failed to find C compiler.\nPlease specify via CC environment variable")
            return self.kernel[grid](*arguments, **options)

        return launch


def train_by(Optimizer, monkeypatch, fails, steps=3):
    """Two optimizers of one weight each, the second through a pickle; the kernel's launches and the bits."""
    kernel = FailingKernel(go._advance_kernel, fails)
    monkeypatch.setattr(go, "_KERNEL_DEVICE", DEVICE)
    monkeypatch.setattr(go, "_advance_kernel", kernel)
    monkeypatch.setattr(go, "_LAUNCHED", set())
    monkeypatch.setattr(go, "_WITHOUT_KERNEL", set())
    torch.manual_seed(0)
    p, q = (nn.Parameter(torch.randn(5, 14, device=DEVICE)) for _ in range(2))
    options = {"lr": 0.2, "momentum": 0.9, "grassmann": True, "omega": 0.1, "grad_clip": 0.1}
    optimizers = [Optimizer([p], **options), pickle.loads(pickle.dumps(Optimizer([q], **options)))]
    for _ in range(steps):
        for optimizer in optimizers:
            (weight,) = optimizer.param_groups[0]["params"]
            weight.grad = torch.randn_like(weight)
            optimizer.step()
    weights = [optimizer.param_groups[0]["params"][0] for optimizer in optimizers]
    states = [t for optimizer in optimizers for s in optimizer.state.values() for t in s.values()]
    return kernel.launches, [*weights, *states]


@BOTH
def test_a_kernel_that_cannot_be_built_is_said_once_and_the_blocks_take_over(Optimizer, monkeypatch):
    with monkeypatch.context() as patch, pytest.warns(UserWarning, match="C compiler. Please") as caught:
        launches, failed = train_by(Optimizer, patch, fails=lambda number: True)
    assert (launches, len(caught)) == (1, 1)
    monkeypatch.setattr(go, "_suits_kernel", lambda p: False)
    _, in_blocks = train_by(Optimizer, monkeypatch, fails=lambda number: True)
    assert all(map(torch.equal, failed, in_blocks))  # Adam-G's number of steps too


@BOTH
def test_an_error_of_a_later_launch_is_not_hidden(Optimizer, monkeypatch):
    with pytest.raises(RuntimeError, match="C compiler"):
        train_by(Optimizer, monkeypatch, fails=lambda number: number > 1)
