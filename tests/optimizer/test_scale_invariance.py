"""scale_invariance measures what the networks' shapes imply, and leaves no trace."""

import copy
import math

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from grassmann_optimizer import grassmann_param_groups, grassmann_weights, scale_invariance
from resnet import WideResNet


def loss_on(*shape, classes=10):
    """The loss of a batch of random pictures."""
    x, labels = torch.randn(*shape), torch.randint(classes, shape[:1])
    return lambda model: cross_entropy(model(x), labels)


def verdicts(model, loss_fn):
    return {m.name.removesuffix(".weight"): m.invariant for m in scale_invariance(model, loss_fn)}


def test_a_wide_resnets_first_convolutions_of_a_block_are_invariant_and_nothing_else():
    torch.manual_seed(0)
    found = verdicts(WideResNet(10, 1, 10, dropout=0.3), loss_on(16, 3, 32, 32))
    first = {f"group{i}.block0.conv0" for i in range(3)}
    assert {name for name, invariant in found.items() if invariant} == first
    # At a width above 1 the network's first convolution feeds only a batch normalization: group0.block0 has a
    # convdim.
    found = verdicts(WideResNet(10, 2, 10), loss_on(16, 3, 32, 32))
    assert {name for name, invariant in found.items() if invariant} == {"conv0", *first}


def test_chance_is_about_the_largest_cosine_of_random_gradients():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(400, 1000))
    direction = torch.randn(1000, 400)
    (m,) = scale_invariance(model, lambda net: (net[1].weight * direction).sum())
    assert m.chance == pytest.approx(math.sqrt(2 * math.log(2000) / 400))
    assert m.cosine == pytest.approx(m.chance, rel=0.25)
    assert not m.invariant


@pytest.mark.parametrize(("part", "invariant"), [(0.005, True), (0.02, False), (0.2, False)])
def test_invariant_is_below_a_hundredth_of_chance(part, invariant):
    w, tangent = torch.eye(2, 400)[:1], torch.eye(2, 400)[1:]
    model = nn.Linear(400, 1)
    model.weight.data = w.clone()
    cosine = part * math.sqrt(2 * math.log(2) / 400)
    gradient = cosine * w + math.sqrt(1 - cosine**2) * tangent
    (m,) = scale_invariance(model, lambda net: (net.weight * gradient).sum())
    assert m.cosine == pytest.approx(cosine)
    assert m.invariant == invariant


def test_rows_without_a_gradient_are_counted_and_not_measured():
    torch.manual_seed(0)
    model = nn.Linear(50, 6)
    (m,) = scale_invariance(model, lambda net: net(torch.randn(4, 50))[:, :2].sum())
    assert m.idle_rows == 4
    unused = nn.ModuleList([nn.Linear(5, 3), nn.Linear(5, 3)])
    used, idle = scale_invariance(unused, lambda net: net[0](torch.ones(1, 5)).sum())
    assert (used.idle_rows, idle.idle_rows) == (0, 3)
    assert math.isnan(idle.cosine)
    assert not idle.invariant


@pytest.mark.parametrize("training", [True, False])
def test_nothing_is_left_behind(training):
    torch.manual_seed(0)
    model = WideResNet(10, 1, 10, dropout=0.5).train(training)
    model.bn.eval()
    model.fc.bias.grad = torch.ones(10)
    before = copy.deepcopy(model.state_dict())
    modes = [module.training for module in model.modules()]
    state = torch.get_rng_state()
    seen = []
    model.group0.block0.register_forward_hook(lambda module, *_: seen.append(module.training))
    scale_invariance(model, fixed_loss())
    assert seen == [True]
    assert torch.equal(torch.get_rng_state(), state)
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert torch.equal(model.fc.bias.grad, torch.ones(10))
    assert all(p.grad is None for name, p in model.named_parameters() if name != "fc.bias")


def fixed_loss():
    x = torch.linspace(-1, 1, 8 * 3 * 32 * 32).view(8, 3, 32, 32)
    return lambda model: cross_entropy(model(x), torch.arange(8))


def test_buffers_and_modes_are_put_back_when_the_loss_fails():
    model = WideResNet(10, 1, 10).eval()
    before = copy.deepcopy(model.state_dict())

    def failing(net):
        net(torch.randn(4, 3, 32, 32))
        raise ArithmeticError

    with pytest.raises(ArithmeticError):
        scale_invariance(model, failing)
    assert not model.training
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_a_square_weight_whose_rows_can_only_just_be_orthogonal_has_no_regularizer():
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    groups = grassmann_param_groups(model, 0.1, 0.2, select=["0.weight"])
    assert groups[0]["name"] == "grassmann_overcomplete"


def test_groups_by_measurement():
    torch.manual_seed(0)
    # The first linear layer feeds a batch normalization, with more rows than elements in a row; the last does
    # not.
    model = nn.Sequential(nn.Linear(10, 40), nn.BatchNorm1d(40), nn.ReLU())
    model.extend([nn.Linear(40, 20), nn.BatchNorm1d(20), nn.ReLU(), nn.Linear(20, 5)])
    loss_fn = loss_on(64, 10, classes=5)
    measured = {"select": "measured", "loss_fn": loss_fn}
    before = copy.deepcopy(model.state_dict())
    assert grassmann_weights(model, **measured) == {"0.weight": model[0].weight, "3.weight": model[3].weight}
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    groups = {g["name"]: g for g in grassmann_param_groups(model, 0.1, 0.2, **measured)}
    assert groups["grassmann"]["params"] == [model[3].weight]
    assert groups["grassmann_overcomplete"]["params"] == [model[0].weight]
    assert groups["other"]["params"] == [model[6].weight]
    assert (groups["grassmann"]["omega"], groups["grassmann_overcomplete"]["omega"]) == (0.1, 0)
