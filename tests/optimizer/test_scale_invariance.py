"""scale_invariance measures what the networks' shapes imply, and leaves no trace; what is chosen by it."""

import copy
import math
from functools import partial

import pytest
import torch
from optimizer.steps import take_steps
from torch import nn
from torch.nn.functional import cross_entropy
from torch.nn.utils import parametrizations, prune

from grassmann_optimizer import SGDG, grassmann_param_groups, grassmann_weights, scale_invariance
from resnet import WideResNet


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def loss_on(*shape):
    """The loss of a batch of random images."""
    x, labels = torch.randn(*shape), torch.randint(5, shape[:1])
    return lambda model: cross_entropy(model(x), labels)


def convolutions():
    """Two convolutions, 0 and 3, each before a batch normalization."""
    first = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU()
    return nn.Sequential(*first, nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(32, 5))


# ------------------------------------------------------------------------------------------------ measurement


@pytest.mark.parametrize(("width", "more"), [(1, set()), (2, {"conv0"})])
def test_a_wide_resnets_first_convolutions_of_a_block_are_invariant_and_nothing_else(width, more):
    """At a width above 1 also the network's own first one, as a convdim follows its batch normalization."""
    measured = scale_invariance(WideResNet(10, width, 10, dropout=0.3), loss_on(16, 3, 32, 32))
    first = {f"group{i}.block0.conv0" for i in range(3)}
    assert {m.name.removesuffix(".weight") for m in measured if m.invariant} == first | more


def test_chance_is_about_the_largest_cosine_of_random_gradients():
    direction = torch.randn(1000, 400)
    (m,) = scale_invariance(nn.Linear(400, 1000), lambda net: (net.weight * direction).sum())
    assert m.chance == pytest.approx(math.sqrt(2 * math.log(2000) / 400))
    assert m.cosine == pytest.approx(m.chance, rel=0.25)
    assert not m.invariant


@pytest.mark.parametrize(("part", "invariant"), [(0.005, True), (0.02, False)])
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
    model = nn.ModuleList([nn.Linear(50, 6), nn.Linear(5, 3)])
    used, idle = scale_invariance(model, lambda net: net[0](torch.randn(4, 50))[:, :2].sum())
    assert (used.idle_rows, idle.idle_rows) == (4, 3)
    assert math.isnan(idle.cosine)
    assert not idle.invariant


@pytest.mark.parametrize("fails", [False, True])
def test_nothing_is_left_behind(fails):
    model = WideResNet(10, 1, 5, dropout=0.5).eval()
    model.fc.bias.grad = torch.ones(5)
    before = copy.deepcopy(model.state_dict())
    loss_fn = loss_on(4, 3, 32, 32)
    state = torch.get_rng_state()

    def loss_in_training(net):
        assert all(module.training for module in net.modules())
        loss = loss_fn(net)
        if fails:
            raise ArithmeticError
        return loss

    with pytest.raises(ArithmeticError) if fails else torch.no_grad():
        scale_invariance(model, loss_in_training)
    assert torch.equal(torch.get_rng_state(), state)
    assert not any(module.training for module in model.modules())
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert torch.equal(model.fc.bias.grad, torch.ones(5))
    assert all(p.grad is None for name, p in model.named_parameters() if name != "fc.bias")


def test_the_measurement_is_in_float32():
    model, loss_fn = convolutions(), loss_on(16, 3, 6, 6)
    expected = scale_invariance(model, loss_fn)
    assert max(measured.cosine for measured in expected[:2]) < 1e-4
    with torch.autocast("cpu", torch.bfloat16):
        assert scale_invariance(model, loss_fn) == expected
    with pytest.raises(ValueError, match=r"float32.*0\.weight"):
        scale_invariance(model.bfloat16(), loss_fn)


# ------------------------------------------------------------------------------------------------- the choice


def test_a_frozen_batch_normalization_is_measured_as_it_is():
    model, measured = convolutions(), {"select": "measured", "loss_fn": loss_on(16, 3, 6, 6)}
    model[1].eval()
    assert list(grassmann_weights(model, **measured)) == ["3.weight"]
    assert (model.training, model[1].training) == (True, False)
    model.eval()
    assert list(grassmann_weights(model, **measured)) == ["0.weight", "3.weight"]


def test_groups_by_measurement():
    """Of linear layers; only the second has fewer rows than elements in a row, the last feeds the loss."""
    model = nn.Sequential(nn.Linear(10, 40), nn.BatchNorm1d(40), nn.Linear(40, 20), nn.BatchNorm1d(20))
    model.extend([nn.Linear(20, 20), nn.BatchNorm1d(20), nn.Linear(20, 5)])
    measured = {"select": "measured", "loss_fn": loss_on(64, 10)}
    weights = [model[i].weight for i in (0, 2, 4, 6)]
    groups = {g["name"]: g for g in grassmann_param_groups(model, 0.1, 0.2, **measured)}
    assert groups["grassmann"]["params"] == [weights[1]]
    assert groups["grassmann_overcomplete"]["params"] == [weights[0], weights[2]]
    assert groups["other"]["params"] == [weights[3]]
    assert (groups["grassmann"]["omega"], groups["grassmann_overcomplete"]["omega"]) == (0.1, 0)


@pytest.mark.parametrize(
    "change", [parametrizations.weight_norm, partial(prune.random_unstructured, amount=1)]
)
def test_a_weight_that_is_computed_is_named_as_left_out(change):
    model = convolutions()
    change(model[3], name="weight")
    with pytest.warns(UserWarning, match=r"not on G\(1, n\).*3\.weight"):
        chosen = grassmann_weights(model)
    assert list(chosen) == ["0.weight"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_groups_made_again_change_nothing(dtype):
    model = convolutions().to(dtype)
    take_steps(SGDG(grassmann_param_groups(model, 0.01, 0.2)), range(3))
    before = copy.deepcopy(model.state_dict())
    grassmann_param_groups(model, 0.01, 0.2)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
