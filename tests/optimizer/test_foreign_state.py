"""`load_state_dict` takes over what means the same and refuses all else in one sentence, changing nothing."""

import copy

import pytest
import torch
from torch import nn
from torch.testing import assert_close

import grassmann_optimizer as go
from grassmann_optimizer import SGDG, AdamG

pytestmark = pytest.mark.filterwarnings("ignore:steps of plain SGD")
BOTH = pytest.mark.parametrize("Optimizer", [SGDG, AdamG])
SHAPE = (4, 3, 3, 3)
MANIFOLD = {"lr": 0.2, "momentum": 0.9, "omega": 0.1, "grad_clip": 0.5}
ADAM = {"beta2": 0.99, "epsilon": 1e-8}
# What every group has had in its state dict from the first commit on; the authors' groups have no "maximize".
SGD = {"dampening": 0, "weight_decay": 0, "nesterov": False}
OPTIONS = {**MANIFOLD, **SGD, "grassmann": True}


def make(Optimizer, shape=SHAPE, **options):
    """An optimizer of a weight on G(1, n), channels_last if it can be, and a bias, both float64."""
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    weight = nn.Parameter(weight.to(memory_format=torch.channels_last) if len(shape) == 4 else weight)
    groups = [{"params": [weight], **OPTIONS, **options}, {"params": [nn.Parameter(torch.ones(5).double())]}]
    return Optimizer(groups, lr=0.05, momentum=0.9)


def params_of(optimizer):
    return [p for group in optimizer.param_groups for p in group["params"]]


def gradients(seed):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in (SHAPE, (5,))]


def train(optimizer, seeds):
    for seed in seeds:
        for p, g in zip(params_of(optimizer), gradients(seed), strict=True):
            p.grad = g
        optimizer.step()
    return optimizer


def by_rule(Optimizer, steps):
    """Rows, momentum rows, second moment and bias with its buffer after `steps` steps of the rules alone."""
    weight, bias = (p.detach().clone() for p in params_of(make(Optimizer)))
    y, buffer = weight.flatten(1), torch.zeros(5, dtype=torch.float64)
    m, v = torch.zeros_like(y), torch.zeros(4, 1, dtype=torch.float64)
    for t in range(steps):
        g, g_bias = gradients(t)
        if Optimizer is SGDG:
            y, m = go.sgdg_update(y, g.flatten(1), m, **MANIFOLD)
        else:
            rates = {"lr": 0.2, "beta1": 0.9, **ADAM, "omega": 0.1, "grad_clip": 0.5}
            y, m, v = go.adamg_update(y, g.flatten(1), m, v, torch.tensor(t + 1.0).double(), **rates)
        buffer = 0.9 * buffer + g_bias
        bias = bias - 0.05 * buffer
    return y, m, v, bias, buffer


def state_dict(Optimizer, state, **more):
    """A state dict with the weight's `state`, as after three steps."""
    adam = ADAM if Optimizer is AdamG else {}
    groups = [{"params": [0], **OPTIONS, **adam, **more}]
    groups.append({"params": [1], **OPTIONS, **adam, "lr": 0.05, "omega": 0, "grad_clip": None, **more})
    groups[1]["grassmann"] = False
    return {"state": {0: state, 1: {"momentum_buffer": by_rule(Optimizer, 3)[4]}}, "param_groups": groups}


def authors(Optimizer):
    """The state that the authors' PyTorch optimizer has after three steps."""
    _, m, v, _, _ = by_rule(Optimizer, 3)
    if Optimizer is SGDG:
        return state_dict(SGDG, {"momentum_buffer": m})
    return state_dict(AdamG, {"m_buffer": m, "v_buffer": v, "beta1_power": 0.9**4, "beta2_power": 0.99**4})


def ours(Optimizer):
    """The state that every commit of this repository has written after three steps."""
    _, m, v, _, _ = by_rule(Optimizer, 3)
    adam = {"second_moment": v, "step": torch.tensor(3.0)} if Optimizer is AdamG else {}
    return state_dict(Optimizer, {"momentum_buffer": m.view(SHAPE), **adam}, maximize=False)


@BOTH
@pytest.mark.parametrize("saved", [authors, ours])
def test_a_state_of_the_same_meaning_continues(Optimizer, saved):
    given = saved(Optimizer)
    before = copy.deepcopy(given)
    optimizer = make(Optimizer, lr=7.0)
    y, _, _, bias, _ = by_rule(Optimizer, 3)
    with torch.no_grad():
        for p, value in zip(params_of(optimizer), (y.view(SHAPE), bias), strict=True):
            p.copy_(value)
    optimizer.load_state_dict(copy.deepcopy(given))
    y, m, v, bias, buffer = by_rule(Optimizer, 5)
    train(optimizer, [3, 4])
    weight, got_bias = params_of(optimizer)
    state = optimizer.state[weight]
    assert_close(weight.detach().flatten(1), y, rtol=1e-11, atol=1e-12)
    assert_close(state["momentum_buffer"].flatten(1), m, rtol=1e-11, atol=1e-12)
    assert_close((got_bias.detach(), optimizer.state[got_bias]["momentum_buffer"]), (bias, buffer))
    if Optimizer is AdamG:
        assert_close(state["second_moment"], v, rtol=1e-11, atol=0)
        assert state["step"] == 5
    optimizer.load_state_dict(given)
    torch.testing.assert_close(given, before, rtol=0, atol=0)  # read only


def test_the_authors_step_counter_survives_the_underflow_of_their_powers():
    for steps, at_least in (
        (30_000, 30_000),
        (78_000, 74_000),
    ):  # in the paper's runs the second is 0 at the end
        given = authors(AdamG)
        given["state"][0] |= {"beta1_power": 0.9 ** (steps + 1), "beta2_power": 0.99 ** (steps + 1)}
        optimizer = make(AdamG)
        optimizer.load_state_dict(given)
        assert at_least <= optimizer.state[params_of(optimizer)[0]]["step"] <= steps


@BOTH
def test_a_group_that_left_the_manifold_is_saved_and_loaded(Optimizer):
    first, second = (train(make(Optimizer), [0]) for _ in range(2))
    first.param_groups[0]["grassmann"] = False
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    for optimizer in (first, second):
        train(optimizer, [1])
    assert_close(params_of(second), params_of(first), rtol=0, atol=0)


def torchs(cls, Optimizer):
    return train(
        cls(params_of(make(Optimizer)), lr=0.1, **({"momentum": 0.9} if cls is torch.optim.SGD else {})), [0]
    )


def in_our_groups(cls):
    return lambda kind: {**ours(kind), "state": torchs(cls, kind).state_dict()["state"]}


def changed(saved=ours, state=None, group=None, group_of_bias=None, drop=()):
    """`saved` with entries of the weight's state or group changed or dropped."""

    def make_state_dict(Optimizer):
        given = saved(Optimizer)
        given["state"][0] |= state or {}
        given["param_groups"][0] |= group or {}
        given["param_groups"][1] |= group_of_bias or {}
        for name in drop:
            given["state"][0].pop(name, None)
            given["param_groups"][0].pop(name, None)
        return given

    return make_state_dict


def other(Optimizer):
    return AdamG if Optimizer is SGDG else SGDG


ONES = torch.ones(4)
NEEDED = r"parameter 0 has .*, where .*'momentum_buffer': \(4, 3, 3, 3\).* is needed"
REFUSED = {
    "torch's SGD": (lambda kind: torchs(torch.optim.SGD, kind).state_dict(), "group 0 has no.*'grassmann'"),
    "torch's Adam in our groups": (in_our_groups(torch.optim.Adam), NEEDED),
    "the other kind": (lambda kind: ours(other(kind)), "group 0 has.*'beta2', 'epsilon'"),
    "the authors' other kind": (lambda kind: authors(other(kind)), "group 0 has.*'beta2'"),
    "a checkpoint": (lambda kind: {"params": {}, "optimizer": ours(kind)}, "it has no 'param_groups'"),
    "no state": (lambda kind: {"param_groups": ours(kind)["param_groups"]}, "it has no 'state'"),
    "no omega": (changed(drop=["omega"]), "group 0 has no 'omega'"),
    "an option out of range": (changed(group={"grad_clip": 0}), "grad_clip.*0"),
    "no momentum": (changed(state={"m": ONES}, drop=["momentum_buffer"]), NEEDED),
    "other rows": (changed(state={"momentum_buffer": torch.zeros(7, 3, 3, 3)}), r"\(7, 3, 3, 3\)"),
    "other columns": (changed(state={"momentum_buffer": torch.zeros(4, 18)}), r"\(4, 18\)"),
    "not a tensor": (changed(state={"momentum_buffer": 1.5}), "'momentum_buffer'.*1.5"),
    "an unknown entry": (changed(state={"exp_avg": torch.zeros(4)}), r"'exp_avg': \(4,\)"),
    "a tensor for a state": (lambda kind: {**ours(kind), "state": {0: torch.zeros(2)}}, "not the state of"),
    "no number": (changed(group={"momentum": None}), "not the state of"),
    "fewer groups": (lambda kind: {**ours(kind), "param_groups": ours(kind)["param_groups"][:1]}, "groups"),
    "a bias on G(1, n)": (changed(group_of_bias={"grassmann": True}), r"at least two elements.*\(5,\)"),
}
REFUSED_BY_ADAMG = {
    "SGDG's state": (lambda kind: {**ours(kind), "state": ours(SGDG)["state"]}, "'second_moment'.*needed"),
    "another second moment": (changed(state={"second_moment": torch.zeros(4)}), r"'second_moment': \(4,\)"),
    "a number of steps": (changed(state={"step": 3.0}), "'step': 3.0"),
    "the authors' without v": (changed(authors, drop=["v_buffer"]), NEEDED),
    "the authors' without a number": (changed(authors, state={"beta2_power": None}), "not the state of"),
}
REFUSED_BY_SGDG = {
    "AdamG's state": (lambda kind: {**ours(kind), "state": ours(AdamG)["state"]}, "'second_moment'"),
}


def test_an_older_torchs_none_is_no_momentum():
    optimizer = make(SGDG)
    given = optimizer.state_dict()
    index = given["param_groups"][1]["params"][0]
    optimizer.load_state_dict({**given, "state": {index: {"momentum_buffer": None}}})
    train(optimizer, [0])


CASES = [(SGDG, *case) for case in {**REFUSED, **REFUSED_BY_SGDG}.items()]
CASES += [(AdamG, *case) for case in {**REFUSED, **REFUSED_BY_ADAMG}.items()]


@pytest.mark.parametrize(
    ("Optimizer", "name", "case"), CASES, ids=lambda value: getattr(value, "__name__", value)
)
def test_any_other_state_is_refused_by_name_and_changes_nothing(Optimizer, name, case):
    make_state_dict, named = case
    optimizer, twin = (train(make(Optimizer), [0]) for _ in range(2))
    with pytest.raises(ValueError, match=named) as refused:
        optimizer.load_state_dict(make_state_dict(Optimizer))
    assert "\n" not in str(refused.value)
    assert not optimizer._optimizer_load_state_dict_pre_hooks
    torch.testing.assert_close(optimizer.state_dict(), twin.state_dict(), rtol=0, atol=0)
    optimizer.load_state_dict(optimizer.state_dict())
    assert_close(params_of(train(optimizer, [1])), params_of(train(twin, [1])), rtol=0, atol=0)
