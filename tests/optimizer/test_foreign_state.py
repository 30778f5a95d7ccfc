"""`load_state_dict` takes over what means the same and refuses all else in one sentence, changing nothing."""

import copy

import pytest
import torch
from optimizer.steps import BOTH, ON_ROWS, by_rule, params_of, take_steps
from torch import nn
from torch.testing import assert_close

from grassmann_optimizer import SGDG, AdamG

pytestmark = pytest.mark.filterwarnings("ignore:steps of plain SGD")
SHAPE = (4, 3, 3, 3)
# What every group has had in its state dict from the first commit on; the authors' groups have no "maximize".
OPTIONS = {**ON_ROWS, "dampening": 0, "weight_decay": 0, "nesterov": False}
ADAM = {"beta2": 0.99, "epsilon": 1e-8}


def make(Optimizer, **options):
    """An optimizer of a weight on G(1, n), channels_last, and a bias, both float64."""
    weight = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    weight = nn.Parameter(weight.to(memory_format=torch.channels_last))
    groups = [{"params": [weight], **ON_ROWS, **options}, {"params": [nn.Parameter(torch.ones(5).double())]}]
    return Optimizer(groups, lr=0.05, momentum=0.9)


def after_steps(Optimizer, count):
    """Rows, momentum rows and second moment after so many of `take_steps`, by the rule alone."""
    y = params_of(make(Optimizer))[0].detach().flatten(1)
    generators = [torch.Generator().manual_seed(seed) for seed in range(count)]
    gradients = [torch.randn(SHAPE, generator=generator).flatten(1) for generator in generators]
    options = {name: value for name, value in ON_ROWS.items() if name != "grassmann"}
    return by_rule(Optimizer, y, gradients, **options)


def state_dict(Optimizer, state, **more):
    """A state dict with the weight's `state`."""
    more |= ADAM if Optimizer is AdamG else {}
    of_bias = {"grassmann": False, "lr": 0.05, "omega": 0, "grad_clip": None}
    groups = [{"params": [0], **OPTIONS, **more}, {"params": [1], **OPTIONS, **of_bias, **more}]
    return {"state": {0: state, 1: {"momentum_buffer": torch.ones(5).double()}}, "param_groups": groups}


def authors(Optimizer):
    """The state that the authors' PyTorch optimizer has after three steps."""
    _, m, v = after_steps(Optimizer, 3)
    if Optimizer is SGDG:
        return state_dict(SGDG, {"momentum_buffer": m})
    return state_dict(AdamG, {"m_buffer": m, "v_buffer": v, "beta1_power": 0.9**4, "beta2_power": 0.99**4})


def ours(Optimizer):
    """The state that every commit of this repository has written after three steps."""
    _, m, v = after_steps(Optimizer, 3)
    adam = {"second_moment": v, "step": torch.tensor(3.0)} if Optimizer is AdamG else {}
    return state_dict(Optimizer, {"momentum_buffer": m.view(SHAPE), **adam}, maximize=False)


@BOTH
@pytest.mark.parametrize("saved", [authors, ours])
def test_a_state_of_the_same_meaning_continues(Optimizer, saved):
    given = saved(Optimizer)
    before = copy.deepcopy(given)
    optimizer = make(Optimizer, lr=7.0)
    weight, _ = params_of(optimizer)
    with torch.no_grad():
        weight.copy_(after_steps(Optimizer, 3)[0].view(SHAPE))
    optimizer.load_state_dict(given)
    assert_close(given, before, rtol=0, atol=0)  # read only
    take_steps(optimizer, [3, 4])
    state = optimizer.state[weight]
    got = weight.detach().flatten(1), state["momentum_buffer"].flatten(1)
    y, m, v = after_steps(Optimizer, 5)
    assert_close(got, (y, m), rtol=1e-11, atol=1e-12)
    if Optimizer is AdamG:
        assert_close(state["second_moment"], v, rtol=1e-11, atol=0)
        assert state["step"] == 5


def test_the_authors_step_counter_survives_the_underflow_of_their_powers():
    # In the paper's runs the second power is 0 at the end.
    for steps, at_least in ((30_000, 30_000), (78_000, 74_000)):
        given = authors(AdamG)
        given["state"][0] |= {"beta1_power": 0.9 ** (steps + 1), "beta2_power": 0.99 ** (steps + 1)}
        optimizer = make(AdamG)
        optimizer.load_state_dict(given)
        assert at_least <= optimizer.state[params_of(optimizer)[0]]["step"] <= steps


def test_an_older_torchs_none_is_no_momentum():
    optimizer = make(SGDG)
    optimizer.load_state_dict({**optimizer.state_dict(), "state": {1: {"momentum_buffer": None}}})
    take_steps(optimizer, [0])


def torchs_sgd(Optimizer):
    return take_steps(torch.optim.SGD(params_of(make(Optimizer)), lr=0.1, momentum=0.9), [0]).state_dict()


def changed(state=None, group=None, drop=()):
    """`ours` with entries of the weight's state and of the groups changed or dropped."""

    def make_state_dict(Optimizer):
        given = ours(Optimizer)
        given["state"][0] |= state or {}
        for entries in (given["state"][0], *given["param_groups"]):
            for name in drop:
                entries.pop(name, None)
        for entries in given["param_groups"]:
            entries |= group or {}
        return given

    return make_state_dict


def other(Optimizer):
    return AdamG if Optimizer is SGDG else SGDG


NEEDED = r"parameter 0 has .*, where .*'momentum_buffer': \(4, 3, 3, 3\).* is needed"
REFUSED = {
    "torch's SGD": (torchs_sgd, "group 0 has no.*'grassmann'"),
    "the other kind": (lambda kind: ours(other(kind)), "group 0 has.*'beta2', 'epsilon'"),
    "the other kind's state": (lambda kind: {**ours(kind), "state": ours(other(kind))["state"]}, "'second_m"),
    "a checkpoint": (lambda kind: {"params": {}, "optimizer": ours(kind)}, "it has no 'param_groups'"),
    "an option out of range": (changed(group={"grad_clip": 0}), "grad_clip.*0"),
    "no momentum": (changed({"m": torch.ones(4)}, drop=["momentum_buffer"]), NEEDED),
    "other rows": (changed({"momentum_buffer": torch.zeros(7, 3, 3, 3)}), r"\(7, 3, 3, 3\)"),
    "not a tensor": (changed({"momentum_buffer": 1.5}), "'momentum_buffer'.*1.5"),
    "an unknown entry": (changed({"exp_avg": torch.zeros(4)}), r"'exp_avg': \(4,\)"),
    "no number": (changed(group={"momentum": None}), "not the state of"),
    "fewer groups": (lambda kind: {**ours(kind), "param_groups": ours(kind)["param_groups"][:1]}, "groups"),
    "no omega": (changed(drop=["omega"]), "group 0 has no 'omega'"),
    "a bias on G(1, n)": (changed(group={"grassmann": True}), r"at least two elements.*\(5,\)"),
}


@BOTH
@pytest.mark.parametrize("name", REFUSED)
def test_any_other_state_is_refused_by_name_and_changes_nothing(Optimizer, name):
    make_state_dict, named = REFUSED[name]
    optimizer, twin = (take_steps(make(Optimizer), [0]) for _ in range(2))
    with pytest.raises(ValueError, match=named) as refused:
        optimizer.load_state_dict(make_state_dict(Optimizer))
    assert "\n" not in str(refused.value)
    assert not optimizer._optimizer_load_state_dict_pre_hooks
    assert_close(optimizer.state_dict(), twin.state_dict(), rtol=0, atol=0)
    optimizer.load_state_dict(optimizer.state_dict())
    assert_close(params_of(take_steps(optimizer, [1])), params_of(take_steps(twin, [1])), rtol=0, atol=0)
