"""What users of torch.optim.SGD rely on holds for SGDG and AdamG: a test for each thing that people do."""

import copy
import io
import pickle

import pytest
import torch
from optimizer.steps import BOTH, ON_ROWS, params_of, take_steps
from torch import nn
from torch.optim.lr_scheduler import OneCycleLR
from torch.optim.sgd import sgd
from torch.testing import assert_close

import grassmann_optimizer as go
from grassmann_optimizer import SGDG, AdamG

pytestmark = pytest.mark.filterwarnings("ignore:steps of plain SGD")


def make_params(dtype=torch.float32):
    """Two weights for G(1, n), then a weight and a bias; the same at each call."""
    generator = torch.Generator().manual_seed(1)
    shapes = [(4, 3, 3, 3), (3, 8), (2, 4), (4,)]
    return [nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in shapes]


def make_groups(params):
    nesterov = {"lr": 0.05, "momentum": 0.9, "nesterov": True, "weight_decay": 1e-2}
    return [{"params": params[:2], **ON_ROWS}, {"params": params[2:3], **nesterov}, {"params": params[3:]}]


def assert_same(a, b):
    """The optimizers have the same weights and state, bit for bit."""
    first, second = ((params_of(optimizer), optimizer.state_dict()["state"]) for optimizer in (a, b))
    assert_close(first, second, rtol=0, atol=0)


def through_a_file(thing):
    file = io.BytesIO()
    torch.save(thing, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


# -------------------------------------------------------------------------------------------------- state


@BOTH
def test_a_checkpoint_continues_bit_for_bit(Optimizer):
    first = take_steps(Optimizer(make_groups(make_params())), range(3))
    saved = through_a_file({"params": [p.detach() for p in params_of(first)], **first.state_dict()})
    params = list(map(nn.Parameter, saved.pop("params")))
    second = Optimizer([{"params": params[:2]}, {"params": params[2:3]}, {"params": params[3:]}], lr=7)
    second.load_state_dict(saved)
    assert_same(second, first)
    for optimizer in (first, second):
        take_steps(optimizer, range(3, 6))
    assert_same(second, first)


@BOTH
@pytest.mark.parametrize("narrow", [torch.bfloat16, torch.float16])
def test_loaded_state_is_float32_and_a_copy_for_weights_of_another_type_and_order(Optimizer, narrow):
    """A hook reorders, as torch's documentation reorders a checkpoint by names."""

    def reorder(optimizer, state_dict):
        return {**state_dict, "state": {1 - i: state for i, state in state_dict["state"].items()}}

    for source, target in ((torch.float32, narrow), (narrow, torch.float32), (narrow, narrow)):
        first = Optimizer(make_params(source)[:2], **ON_ROWS)
        second = Optimizer(make_params(target)[1::-1], **ON_ROWS)
        second.register_load_state_dict_pre_hook(reorder)
        before = copy.deepcopy(take_steps(first, range(3)).state_dict()["state"])
        second.load_state_dict(first.state_dict())
        loaded = {1 - i: state for i, state in second.state_dict()["state"].items()}
        assert_close(loaded, before, rtol=0, atol=0)
        assert {t.dtype for state in loaded.values() for t in state.values()} == {torch.float32}
        take_steps(second, [3])
        assert_close(first.state_dict()["state"], before, rtol=0, atol=0)


@BOTH
@pytest.mark.parametrize("copier", [copy.deepcopy, lambda thing: pickle.loads(pickle.dumps(thing))])
def test_a_copy_with_its_parameters_continues_bit_for_bit(Optimizer, copier):
    optimizer = take_steps(Optimizer(make_groups(make_params())), range(3))
    params, copied = copier((params_of(optimizer), optimizer))
    assert all(p is q for p, q in zip(params, params_of(copied), strict=True))
    for o in (optimizer, copied):
        take_steps(o, range(5, 8))
    assert_same(optimizer, copied)


def test_steps_are_counted_in_float32_whatever_the_default_type():
    p = nn.Parameter(torch.randn(2, 5))
    torch.set_default_dtype(torch.bfloat16)  # which counts to 256
    try:
        optimizer = take_steps(AdamG([p], **ON_ROWS), [0])
    finally:
        torch.set_default_dtype(torch.float32)
    assert optimizer.state[p]["step"].dtype == torch.float32


@BOTH
def test_a_state_of_another_shape_than_the_weights_is_refused(Optimizer):
    p, q = nn.Parameter(torch.randn(6, 8)), nn.Parameter(torch.randn(3, 8))
    optimizer = take_steps(Optimizer([q, p], **ON_ROWS), range(2))
    p.data = p.data[:4]  # pruned
    before = copy.deepcopy([q, p])
    with pytest.raises(ValueError, match=r"\(4, 8\).*\(6, 8\)"):
        take_steps(optimizer, [2])
    assert_close([q, p], before, rtol=0, atol=0)


# --------------------------------------------------------------------------------------------------- steps


@BOTH
def test_a_closure_is_called_once_with_gradients_and_its_loss_returned(Optimizer):
    optimizer, twin = (Optimizer(make_groups(make_params())) for _ in range(2))
    losses = []

    def closure(optimizer=optimizer):
        optimizer.zero_grad()
        losses.append(sum(p.square().sum() + p.sum() for p in params_of(optimizer)))
        losses[-1].backward()
        return losses[-1]

    with torch.no_grad():
        assert optimizer.step(closure) is losses[0]
    assert len(losses) == 1
    closure(twin)
    assert twin.step() is None
    assert_same(optimizer, twin)


@BOTH
def test_maximize_negates_the_loss_gradient_and_not_the_regularizer(Optimizer):
    down, up = (Optimizer(make_params()[:2], **ON_ROWS, maximize=maximize) for maximize in (False, True))
    loaded = Optimizer(params_of(up), **ON_ROWS)  # as a run that is resumed
    loaded.load_state_dict(up.state_dict())
    for seed in range(3):
        take_steps(down, [seed])
        for p, q in zip(params_of(down), params_of(loaded), strict=True):
            q.grad = -p.grad
        loaded.step()
    assert_same(down, loaded)


@BOTH
def test_no_gradient_leaves_parameter_and_state_alone_and_no_elements_are_no_obstacle(Optimizer):
    params = make_params()
    empty = [nn.Parameter(torch.empty(shape)) for shape in ((0, 5), (3, 0), (0, 2, 3, 3))]
    optimizer = Optimizer([*make_groups(params), {"params": empty, **ON_ROWS, "omega": 0}])
    optimizer.step()  # none at all
    assert not any(optimizer.state.values())
    take_steps(optimizer, range(2))
    optimizer.load_state_dict(through_a_file(optimizer.state_dict()))
    params[0].grad = params[2].grad = None
    idle = [params[0], params[2]]
    before, moving = copy.deepcopy([(p, optimizer.state[p]) for p in idle]), params[1].detach().clone()
    optimizer.step()
    assert_close([(p, optimizer.state[p]) for p in idle], before, rtol=0, atol=0)
    assert not torch.equal(params[1], moving)


@BOTH
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_parameters_take_the_float32_step_rounded(Optimizer, dtype):
    narrow, wide = make_params(dtype)[:2], make_params()[:2]
    options = {**ON_ROWS, "lr": 2.0}  # steps that rounding does not swallow
    optimizer, reference = Optimizer(narrow, **options), Optimizer(wide, **options)
    for seed in range(5):
        for p, q in zip(narrow, wide, strict=True):
            q.data.copy_(p.data)  # from the rounded weight
        take_steps(optimizer, [seed])
        for p, q in zip(narrow, wide, strict=True):
            q.grad = p.grad.float()
        reference.step()
        assert_close(narrow, [q.to(dtype) for q in wide], rtol=0, atol=0)
        assert_close(optimizer.state_dict()["state"], reference.state_dict()["state"], rtol=0, atol=0)


@BOTH
def test_sparse_gradients_are_refused_on_rows_and_elsewhere_torchs(Optimizer):
    p, q, r = (nn.Parameter(torch.ones(4, 6)) for _ in range(3))
    for each in (p, q, r):
        each.grad = torch.zeros(4, 6).index_fill(0, torch.tensor([1]), 0.5).to_sparse(1)
    with pytest.raises(RuntimeError, match="dense"):
        Optimizer([p], **ON_ROWS).step()
    assert torch.equal(p, torch.ones(4, 6))
    Optimizer([q], lr=0.1, momentum=0.9).step()
    torch.optim.SGD([r], lr=0.1, momentum=0.9).step()
    assert torch.equal(q, r)


@pytest.mark.parametrize("dampening", [0.0, 0.5])
def test_fused_sgd_is_torchs_first_step_too(dampening, monkeypatch):
    """As on a GPU: what is dampened is not fused, whose buffer of zeros would dampen the first gradient."""
    fused = []
    monkeypatch.setattr(go, "sgd", lambda *a, **o: (fused.append(o["fused"]), sgd(*a, **o)))
    monkeypatch.setattr(go, "_suits_fused_sgd", lambda p, state: True)
    options = {"lr": 0.1, "momentum": 0.9, "dampening": dampening}
    ours, theirs = (kind(make_params()[2:], **options) for kind in (SGDG, torch.optim.SGD))
    for optimizer in (ours, theirs):
        take_steps(optimizer, range(3))
    assert fused == [dampening == 0] * 3
    assert_close(params_of(ours), params_of(theirs))


@BOTH
@pytest.mark.parametrize("lr", [0.0, torch.tensor(0.0)])
def test_a_rate_of_0_moves_no_row_that_does_not_turn(Optimizer, lr):
    weights = [nn.Parameter(3 * torch.randn(4, 2, 3, 3)) for _ in range(2)]
    weights[1].data = weights[1].data.to(memory_format=torch.channels_last)
    before = copy.deepcopy(weights)
    optimizer = take_steps(Optimizer(weights, **{**ON_ROWS, "lr": lr}), range(2))
    assert_close(weights, before, rtol=0, atol=0)
    optimizer.param_groups[0]["lr"] = 0.2
    take_steps(optimizer, [2])
    before = copy.deepcopy(weights)
    optimizer.param_groups[0]["lr"] = lr
    take_steps(optimizer, [3])
    assert torch.equal(weights[0], before[0]) == (Optimizer is AdamG)  # SGD-G's momentum holds its rate


@BOTH
def test_steps_of_tensors_without_values(Optimizer):
    dtypes = torch.float32, torch.float32, torch.float64, torch.bfloat16
    weights = [nn.Parameter(torch.empty(3, 20, device="meta", dtype=dtype)) for dtype in dtypes]
    optimizer = Optimizer(weights, **ON_ROWS)
    for _ in range(2):
        for p in weights:
            p.grad = torch.empty_like(p)
        optimizer.step()
        for state in optimizer.state.values():
            assert all(t.is_meta for t in state.values())
            if "step" in state:
                state["step"] = torch.tensor(2.0)  # ZeroRedundancyOptimizer leaves it on the CPU


# ------------------------------------------------------------------------------------- gradients and rates


@BOTH
def test_gradient_scaling_takes_the_same_steps_and_skips_infinite_gradients(Optimizer):
    optimizer, twin = (Optimizer(make_groups(make_params())) for _ in range(2))
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    for seed in range(3):
        take_steps(twin, [seed])
        optimizer.zero_grad()
        pairs = zip(params_of(optimizer), params_of(twin), strict=True)
        scaler.scale(sum((p * q.grad).sum() for p, q in pairs)).backward()
        scaler.step(optimizer)
        scaler.update()
    assert_same(optimizer, twin)
    optimizer.zero_grad()
    scaler.scale(sum(p.sum() for p in params_of(optimizer)) * float("inf")).backward()
    scaler.step(optimizer)
    scaler.update()
    assert_same(optimizer, twin)
    assert scaler.get_scale() == 2.0**9


@BOTH
@pytest.mark.parametrize("as_tensor", [False, True])
def test_a_schedule_drives_rate_and_momentum_of_each_group(Optimizer, as_tensor):
    def make(rates):
        weight, _, other, _ = make_params(torch.float64)
        groups = [{"params": [weight], **ON_ROWS, "lr": rates[0]}, {"params": [other], "lr": rates[1]}]
        return Optimizer(groups, momentum=0.9)

    rates = [torch.tensor(rate).double() if as_tensor else rate for rate in (0.2, 0.05)]
    scheduled, by_hand = make(rates), make([0.2, 0.05])
    schedule = OneCycleLR(scheduled, max_lr=[0.3, 0.1], total_steps=8)
    seen = set()
    for seed in range(7):
        for group, set_by_hand in zip(scheduled.param_groups, by_hand.param_groups, strict=True):
            set_by_hand |= {"lr": float(group["lr"]), "momentum": group["momentum"]}
            seen.add((set_by_hand["lr"], set_by_hand["momentum"]))
        for optimizer in (scheduled, by_hand):
            take_steps(optimizer, [seed])
        schedule.step()
    assert len(seen) == 14
    assert_close(params_of(scheduled), params_of(by_hand), rtol=1e-13, atol=1e-14)
