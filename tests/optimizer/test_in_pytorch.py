"""What users of torch.optim.SGD rely on holds for SGDG and AdamG: a test for each thing that people do."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler as schedulers
from torch.optim import swa_utils
from torch.testing import assert_close

import grassmann_optimizer as go
from grassmann_optimizer import SGDG, AdamG

pytestmark = pytest.mark.filterwarnings("ignore:steps of plain SGD")
BOTH = pytest.mark.parametrize("Optimizer", [SGDG, AdamG])
GRASSMANN = {"grassmann": True, "lr": 0.2, "momentum": 0.9, "omega": 0.1, "grad_clip": 0.5}


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def make_params(dtype=torch.float32):
    """Two weights for G(1, n), then a weight and a bias; the same at each call."""
    generator = torch.Generator().manual_seed(1)
    shapes = [(4, 3, 3, 3), (3, 8), (2, 4), (4,)]
    return [nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in shapes]


def make_groups(params):
    nesterov = {"lr": 0.05, "momentum": 0.9, "nesterov": True, "weight_decay": 1e-2}
    return [{"params": params[:2], **GRASSMANN}, {"params": params[2:3], **nesterov}, {"params": params[3:]}]


def give_gradients(params, seed):
    generator = torch.Generator().manual_seed(seed)
    for p in params:
        p.grad = torch.randn(p.shape, generator=generator).to(p.dtype)


def train(optimizer, seeds):
    """One step for each seed, with gradients from it."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    for seed in seeds:
        give_gradients(params, seed)
        optimizer.step()


def everything(optimizer):
    """Weights and state as a flat list of tensors."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    state = [optimizer.state.get(p, {}) for p in params]
    tensors = [s[key] for s in state for key in sorted(s) if s[key] is not None]
    return [t.detach() for t in (*params, *tensors)]


def assert_same(a, b):
    a, b = everything(a), everything(b)
    assert len(a) == len(b)
    for x, y in zip(a, b, strict=True):
        assert x.dtype == y.dtype
        assert torch.equal(x, y)


def through_a_file(thing):
    file = io.BytesIO()
    torch.save(thing, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


# -------------------------------------------------------------------------------------------------- groups


# -------------------------------------------------------------------------------------------------- state


@BOTH
def test_a_checkpoint_continues_bit_for_bit(Optimizer):
    first = Optimizer(make_groups(make_params()))
    train(first, range(3))
    saved = through_a_file(
        {"params": [p.detach() for g in first.param_groups for p in g["params"]], **first.state_dict()}
    )
    params = [nn.Parameter(p) for p in saved.pop("params")]
    second = Optimizer([{"params": params[:2]}, {"params": params[2:3]}, {"params": params[3:]}], lr=7)
    second.load_state_dict(saved)
    assert_same(second, first)
    for optimizer in (first, second):
        train(optimizer, range(3, 6))
    assert_same(second, first)
    assert second.param_groups[0]["lr"] == 0.2


@BOTH
@pytest.mark.parametrize("narrow", [torch.bfloat16, torch.float16])
def test_state_stays_float32_when_a_checkpoint_changes_the_parameters_type(Optimizer, narrow):
    pairs = [(torch.float32, narrow), (narrow, torch.float32), (narrow, narrow), (torch.float64, narrow)]
    for source, target in pairs:
        first, second = (Optimizer(make_params(dtype)[:2], **GRASSMANN) for dtype in (source, target))
        train(first, range(3))
        second.load_state_dict(through_a_file(first.state_dict()))
        for a, b in zip(first.state.values(), second.state.values(), strict=True):
            assert set(b) == set(a)
            for key, value in b.items():
                assert value.dtype == torch.float32
                assert torch.equal(value, a[key].float())
        train(second, [3])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_loaded_step_counter_is_its_own(dtype):
    first, second = (AdamG(make_params(dtype)[:2], **GRASSMANN) for _ in range(2))
    train(first, range(3))
    state_dict = first.state_dict()
    second.load_state_dict(state_dict)
    train(second, range(2))
    assert [s["step"].item() for s in state_dict["state"].values()] == [3, 3]
    assert [s["step"].item() for s in first.state.values()] == [3, 3]
    assert [s["step"].item() for s in second.state.values()] == [5, 5]


@BOTH
def test_a_load_state_dict_hook_may_rewrite_what_is_loaded(Optimizer):
    """As torch's documentation reorders a checkpoint by names: here two weights come in the other order."""
    first = Optimizer(make_params(torch.bfloat16)[:2], **GRASSMANN)
    give_gradients(first.param_groups[0]["params"][:1], 0)
    first.step()
    train(first, range(2))
    second = Optimizer(make_params(torch.bfloat16)[1::-1], **GRASSMANN)

    def reorder(optimizer, state_dict):
        state = {1 - i: s for i, s in state_dict["state"].items()}
        return {"state": state, "param_groups": state_dict["param_groups"]}

    second.register_load_state_dict_pre_hook(reorder)
    second.load_state_dict(first.state_dict())
    for p, q in zip(first.param_groups[0]["params"], second.param_groups[0]["params"][::-1], strict=True):
        for key, value in first.state[p].items():
            assert torch.equal(second.state[q][key], value)


@BOTH
@pytest.mark.parametrize("copier", [copy.deepcopy, lambda thing: pickle.loads(pickle.dumps(thing))])
@pytest.mark.parametrize("steps", [0, 3])
def test_a_copy_with_its_parameters_continues_bit_for_bit(Optimizer, copier, steps):
    params = make_params()
    optimizer = Optimizer(make_groups(params))
    train(optimizer, range(steps))
    copied_params, copied = copier((params, optimizer))
    assert copied.param_groups[0]["params"][0] is copied_params[0]
    for o in (optimizer, copied):
        train(o, range(5, 8))
    assert_same(optimizer, copied)
    assert copied_params[0] is not params[0]


# --------------------------------------------------------------------------------------------------- steps


@BOTH
def test_a_closure_is_called_once_with_gradients_and_its_loss_returned(Optimizer):
    params = make_params()
    optimizer = Optimizer(make_groups(params))
    twin = Optimizer(make_groups(make_params()))
    calls = []

    def closure(params=params, optimizer=optimizer):
        optimizer.zero_grad()
        loss = sum(p.square().sum() + p.sum() for p in params)
        loss.backward()
        calls.append(loss)
        return loss

    with torch.no_grad():
        assert optimizer.step(closure) is calls[0]
    assert len(calls) == 1
    assert calls[0].requires_grad
    closure([p for g in twin.param_groups for p in g["params"]], twin)
    assert twin.step() is None
    assert_same(optimizer, twin)


@BOTH
@pytest.mark.parametrize("set_by", ["constructor", "group"])
def test_maximize_negates_the_loss_gradient_and_not_the_regularizer(Optimizer, set_by):
    down_params, up_params = make_params(), make_params()
    down = Optimizer(make_groups(down_params))
    if set_by == "constructor":
        up = Optimizer(make_groups(up_params), maximize=True)
    else:
        up = Optimizer([{**group, "maximize": True} for group in make_groups(up_params)])
    loaded = Optimizer(make_groups(up_params))  # as a run that is resumed
    loaded.load_state_dict(up.state_dict())
    for seed in range(3):
        give_gradients(down_params, seed)
        give_gradients(up_params, seed)
        for p in up_params[:2]:
            p.grad.neg_()
        down.step()
        loaded.step()
    for p, q in zip(down_params[:2], up_params[:2], strict=True):
        assert torch.equal(p, q)
    plain, torchs = make_params()[2:], make_params()[2:]
    optimizers = [Optimizer(plain, lr=0.1, maximize=True), torch.optim.SGD(torchs, lr=0.1, maximize=True)]
    for optimizer in optimizers:
        train(optimizer, range(3))
    for p, q in zip(plain, torchs, strict=True):
        assert torch.equal(p, q)


@BOTH
def test_gradients_of_none_leave_parameter_and_state_alone(Optimizer):
    params = make_params()
    optimizer = Optimizer(make_groups(params))
    optimizer.step()  # none at all
    assert all(not s for s in optimizer.state.values())
    train(optimizer, range(2))
    params[0].grad = params[2].grad = None
    idle = [params[0], params[2]]
    before = copy.deepcopy([(p.detach(), optimizer.state[p]) for p in idle])
    moving = params[1].detach().clone()
    optimizer.step()
    for p, (value, state) in zip(idle, before, strict=True):
        assert torch.equal(p, value)
        assert all(torch.equal(optimizer.state[p][key], state[key]) for key in state)
    assert not torch.equal(params[1], moving)


@BOTH
def test_a_parameter_without_elements_is_no_obstacle(Optimizer):
    empty = [nn.Parameter(torch.empty(shape)) for shape in ((0, 5), (3, 0), (0, 2, 3, 3))]
    optimizer = Optimizer([{"params": [*empty, make_params()[0]], **GRASSMANN, "omega": 0}])
    twin = Optimizer([{"params": make_params()[0], **GRASSMANN, "omega": 0}])
    for _ in range(2):
        for o in (optimizer, twin):
            for p in o.param_groups[0]["params"]:
                p.grad = torch.ones_like(p)
            o.step()
    assert torch.equal(optimizer.param_groups[0]["params"][-1], twin.param_groups[0]["params"][0])
    optimizer.load_state_dict(through_a_file(optimizer.state_dict()))
    optimizer.step()


@BOTH
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_parameters_take_the_float32_step_rounded(Optimizer, dtype):
    narrow, wide = make_params(dtype)[:2], make_params()[:2]
    options = {**GRASSMANN, "lr": 2.0}  # steps that rounding does not swallow
    optimizer, reference = Optimizer(narrow, **options), Optimizer(wide, **options)
    for seed in range(5):
        give_gradients(narrow, seed)
        for p, q in zip(narrow, wide, strict=True):
            q.data.copy_(p.data)  # from the rounded weight
            q.grad = p.grad.float()
        optimizer.step()
        reference.step()
        for p, q in zip(narrow, wide, strict=True):
            assert torch.equal(p, q.to(dtype))
            assert optimizer.state[p]["momentum_buffer"].dtype == torch.float32
            for key, value in reference.state[q].items():
                assert torch.equal(optimizer.state[p][key], value)


@BOTH
def test_sparse_gradients_are_refused_on_rows_and_elsewhere_torchs(Optimizer):
    p, q, r = (nn.Parameter(torch.ones(4, 6)) for _ in range(3))
    for each in (p, q, r):
        each.grad = torch.zeros(4, 6).index_fill(0, torch.tensor([1]), 0.5).to_sparse(1)
    with pytest.raises(RuntimeError, match="dense"):
        Optimizer([p], **GRASSMANN).step()
    assert torch.equal(p, torch.ones(4, 6))
    Optimizer([q], lr=0.1, momentum=0.9).step()
    torch.optim.SGD([r], lr=0.1, momentum=0.9).step()
    assert torch.equal(q, r)


@pytest.mark.parametrize("dampening", [0.0, 0.5])
def test_fused_sgd_is_torchs_first_step_too(dampening, monkeypatch):
    """As on a GPU: what is dampened is not fused, whose buffer of zeros would dampen the first gradient."""
    fused = []
    sgd = go.sgd
    monkeypatch.setattr(go, "sgd", lambda *a, **o: (fused.append(o["fused"]), sgd(*a, **o)))
    monkeypatch.setattr(go, "_suits_fused_sgd", lambda p, state: True)
    ours, theirs = make_params()[2:], make_params()[2:]
    options = {"lr": 0.1, "momentum": 0.9, "dampening": dampening}
    for optimizer in (SGDG(ours, **options), torch.optim.SGD(theirs, **options)):
        train(optimizer, range(3))
    assert fused == [dampening == 0] * 3
    assert_close(ours, theirs)


# ------------------------------------------------------------------------------------- gradients on the way


@BOTH
def test_gradient_scaling_takes_the_same_steps_and_skips_infinite_gradients(Optimizer):
    params, twins = make_params(), make_params()
    optimizer, twin = Optimizer(make_groups(params)), Optimizer(make_groups(twins))
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    for seed in range(3):
        weights = [torch.randn(p.shape, generator=torch.Generator().manual_seed(seed)) for p in params]
        optimizer.zero_grad()
        scaler.scale(sum((p * w).sum() for p, w in zip(params, weights, strict=True))).backward()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(params, 1.0)
        scaler.step(optimizer)
        scaler.update()
        for p, w in zip(twins, weights, strict=True):
            p.grad = w
        nn.utils.clip_grad_norm_(twins, 1.0)
        twin.step()
    assert_same(optimizer, twin)
    optimizer.zero_grad()
    scaler.scale(sum(p.sum() for p in params) * float("inf")).backward()
    scaler.step(optimizer)
    scaler.update()
    assert_same(optimizer, twin)
    assert scaler.get_scale() == 2.0**9


# -------------------------------------------------------------------------------------------- schedulers

MAKE_SCHEDULER = {
    "LambdaLR": lambda o: schedulers.LambdaLR(o, [lambda t: 0.9**t, lambda t: 1 / (1 + t)]),
    "StepLR": lambda o: schedulers.StepLR(o, 2, gamma=0.2),
    "CosineAnnealingLR": lambda o: schedulers.CosineAnnealingLR(o, T_max=5),
    "SequentialLR": lambda o: schedulers.SequentialLR(
        o, [schedulers.LinearLR(o, 0.1, total_iters=3), schedulers.ExponentialLR(o, 0.9)], milestones=[3]
    ),
    "ReduceLROnPlateau": lambda o: schedulers.ReduceLROnPlateau(o, patience=1, factor=0.5),
    "CyclicLR": lambda o: schedulers.CyclicLR(
        o, 0.05, 0.3, step_size_up=3, base_momentum=0.7, max_momentum=0.95
    ),
    "OneCycleLR": lambda o: schedulers.OneCycleLR(o, max_lr=[0.3, 0.1], total_steps=8),
    "SWALR": lambda o: swa_utils.SWALR(o, swa_lr=0.01, anneal_epochs=4),
}
STEPS = 7


def scheduled(Optimizer, make_scheduler, tensor_lr):
    """The optimizer after STEPS scheduled steps, and each step's (lr, momentum) of both groups."""
    weight, _, other, _ = make_params(torch.float64)
    lrs = [torch.tensor(lr, dtype=torch.float64) if tensor_lr else lr for lr in (0.2, 0.05)]
    groups = [{"params": [weight], "lr": lrs[0]}, {"params": [other], "lr": lrs[1]}]
    if Optimizer is not torch.optim.SGD:
        groups[0] |= {"grassmann": True, "omega": 0.1}
    optimizer = Optimizer(groups, lr=0.1, momentum=0.9)
    scheduler = make_scheduler(optimizer)
    history = []
    for t in range(STEPS):
        history.append([(float(g["lr"]), g["momentum"]) for g in optimizer.param_groups])
        train(optimizer, [t])
        if isinstance(scheduler, schedulers.ReduceLROnPlateau):
            scheduler.step(1.0)
        else:
            scheduler.step()
    return optimizer, history


@BOTH
@pytest.mark.parametrize("tensor_lr", [False, True])
@pytest.mark.parametrize("name", MAKE_SCHEDULER)
def test_schedulers_drive_learning_rate_and_momentum_as_torchs_sgds(Optimizer, name, tensor_lr):
    optimizer, history = scheduled(Optimizer, MAKE_SCHEDULER[name], tensor_lr)
    _, expected = scheduled(torch.optim.SGD, MAKE_SCHEDULER[name], tensor_lr)
    assert history == expected
    assert len(set(map(tuple, history))) > 1
    assert all(isinstance(g["lr"], torch.Tensor) == tensor_lr for g in optimizer.param_groups)
    by_hand, _ = scheduled(Optimizer, lambda o: Script(o, expected), False)
    assert_close(everything(optimizer), everything(by_hand), rtol=1e-13, atol=1e-14)


class Script:
    """A scheduler that sets the options of a history by hand, as floats."""

    def __init__(self, optimizer, history):
        self.optimizer, self.history = optimizer, iter(history)
        self.step()

    def step(self):
        for group, (lr, momentum) in zip(self.optimizer.param_groups, next(self.history, []), strict=False):
            group |= {"lr": lr, "momentum": momentum}
