"""The optimizers are the update rules and touch nothing else; parameters are sorted as in the paper."""

import copy
import math
import sys

import pytest
import torch
from torch import nn
from torch.testing import assert_close

import grassmann_optimizer as go
from grassmann_optimizer import SGDG, AdamG, grassmann_param_groups, grassmann_weights, unit
from resnet import WideResNet

pytestmark = pytest.mark.filterwarnings("ignore:steps of plain SGD")
BOTH = pytest.mark.parametrize("Optimizer", [SGDG, AdamG])


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def rows(*shape, dtype=torch.float64):
    return unit(torch.randn(*shape, dtype=dtype))[0]


# ----------------------------------------------------------------------------------------------- one step


def run_optimizer(Optimizer, weight, gradients, **options):
    """The weight after one step for each gradient."""
    p = nn.Parameter(weight.clone())
    options = {"lr": 0.2, "momentum": 0.9, "grassmann": True, "omega": 0.1, "grad_clip": 0.1, **options}
    optimizer = Optimizer([p], **options)
    for g in gradients:
        p.grad = g.clone()
        optimizer.step()
    return p.detach()


@BOTH
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_optimizer_is_the_update_rule(Optimizer, dtype):
    weight = torch.randn(4, 3, 3, 3, dtype=dtype)
    gradients = [torch.randn(4, 3, 3, 3, dtype=dtype) for _ in range(5)]
    options = {"omega": 0.2, "grad_clip": 0.4}
    adam = {"beta2": 0.95, "epsilon": 1e-3} if Optimizer is AdamG else {}
    y = weight.double().flatten(1)
    tau, v = torch.zeros_like(y), torch.zeros(4, 1, dtype=y.dtype)
    for t, g in enumerate(gradients, 1):
        g = g.double().flatten(1)
        if Optimizer is SGDG:
            y, tau = go.sgdg_update(y, g, tau, lr=0.3, momentum=0.7, **options)
        else:
            step = torch.tensor(t, dtype=y.dtype)
            rates = {"lr": 0.3, "beta1": 0.7, **adam}
            y, tau, v = go.adamg_update(y, g, tau, v, step, **rates, **options)
    got = (
        run_optimizer(Optimizer, weight, gradients, lr=0.3, momentum=0.7, **options, **adam)
        .flatten(1)
        .double()
    )
    tolerance = 1e-12 if dtype == torch.float64 else 1e-6
    assert_close(got, y, rtol=tolerance, atol=tolerance)


def test_adamg_by_hand():
    """Two steps in the plane, where a row is an angle and translation keeps m's signed length."""
    angle, m, v = 0.0, 0.0, 0.0
    p = nn.Parameter(torch.tensor([[1.0, 0.0]], dtype=torch.float64))
    optimizer = AdamG([p], lr=0.3, momentum=0.9, grassmann=True, grad_clip=0.1)
    for t, slope in enumerate([0.05, -0.7], 1):
        p.grad = slope * torch.tensor([[-math.sin(angle), math.cos(angle)]], dtype=torch.float64)
        optimizer.step()
        h = max(-0.1, min(0.1, slope))
        m, v = 0.9 * m + 0.1 * h, 0.99 * v + 0.01 * h * h
        angle -= 0.3 * math.sqrt(1 - 0.99**t) / (1 - 0.9**t) * m / math.sqrt(v + 1e-8)
        assert_close(p.detach(), torch.tensor([[math.cos(angle), math.sin(angle)]], dtype=torch.float64))


@BOTH
def test_any_storage_of_weight_and_gradient_gives_the_same_trajectory(Optimizer):
    weight = torch.randn(4, 3, 3, 3, dtype=torch.float64)
    gradients = [torch.randn(4, 3, 3, 3, dtype=torch.float64) for _ in range(5)]
    last = torch.channels_last
    expected = run_optimizer(Optimizer, weight, gradients)
    for w in (weight, weight.to(memory_format=last), weight.transpose(1, 3).contiguous().transpose(1, 3)):
        for convert in (lambda g: g, lambda g: g.to(memory_format=last)):
            got = run_optimizer(Optimizer, w, [convert(g) for g in gradients])
            assert got.stride() == w.stride()
            assert_close(got, expected)


@BOTH
@pytest.mark.parametrize("grassmann", [True, False])
@pytest.mark.parametrize("decay", [0, 5e-4])
@pytest.mark.parametrize("maximize", [True, False])
@pytest.mark.parametrize("foreach", [False, True])
def test_gradients_are_read_only(Optimizer, grassmann, decay, maximize, foreach, monkeypatch):
    # On a GPU torch's own choice is foreach, which adds Nesterov's term to the gradients themselves.
    torch_sgd = sys.modules[torch.optim.SGD.__module__]
    monkeypatch.setattr(torch_sgd, "_default_to_fused_or_foreach", lambda *args, **kwargs: (False, foreach))
    params = [nn.Parameter(torch.randn(4, 9)) for _ in range(2)]
    options = {"momentum": 0.9, "weight_decay": decay, "nesterov": not grassmann, "maximize": maximize}
    rows = {"grassmann": True, "grad_clip": 0.1} if grassmann else {}
    optimizer = Optimizer(params, lr=0.1, **rows, **options)
    for _ in range(2):
        for p in params:
            p.grad = torch.randn_like(p)
        before = [p.grad.clone() for p in params]
        optimizer.step()
        assert all(torch.equal(p.grad, g) for p, g in zip(params, before, strict=True))


@BOTH
@pytest.mark.parametrize("decay", [0, 5e-4])
def test_other_groups_are_torchs_sgd_bit_for_bit(Optimizer, decay):
    ours, theirs = (nn.Parameter(torch.linspace(-1, 1, 12).view(3, 4)) for _ in range(2))
    options = {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": decay}
    optimizers = [Optimizer([ours], **options), torch.optim.SGD([theirs], **options)]
    for _ in range(5):
        ours.grad = torch.randn(3, 4)
        theirs.grad = ours.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    assert torch.equal(ours, theirs)


@BOTH
def test_limits_at_zero(Optimizer):
    options = {"omega": 0.0}
    y = rows(3, 5)
    zero = torch.zeros(3, 5, dtype=torch.float64)
    assert_close(run_optimizer(Optimizer, y, [zero], **options), y, rtol=0, atol=1e-15)
    assert torch.equal(run_optimizer(Optimizer, zero, [zero], **options), zero)
    g = torch.randn(3, 5, dtype=torch.float64)
    assert_close(unit(run_optimizer(Optimizer, zero, [g], **options))[0], -unit(g)[0])


# ------------------------------------------------------------------------------------------------- groups


def test_groups_are_the_authors_name_rule_for_these_networks():
    for depth, width in [(10, 1), (16, 4), (28, 10)]:
        model = WideResNet(depth, width, 10)
        by_name = {"grassmann": [], "bn_bias": [], "other": []}
        for name, p in model.named_parameters():
            if "conv" in name and p.shape[0] < p.shape[1:].numel():
                by_name["grassmann"].append(p)
            elif "bn" in name or name.endswith("bias"):
                by_name["bn_bias"].append(p)
            else:
                by_name["other"].append(p)
        groups = {g["name"]: g["params"] for g in grassmann_param_groups(model, 0.01, 0.2)}
        assert {k: set(map(id, v)) for k, v in groups.items()} == {
            k: set(map(id, v)) for k, v in by_name.items()
        }


def test_groups_by_type_and_shape():
    tied, twice = nn.Linear(8, 8), nn.Conv2d(8, 8, 3)
    model = nn.ModuleDict(
        {
            "conv1d": nn.Conv1d(4, 8, 3),
            "conv3d": nn.Conv3d(2, 4, 3),
            "square": nn.Conv2d(8, 8, 1),
            "wide": nn.Conv2d(2, 32, 3),
            "transposed": nn.ConvTranspose2d(4, 8, 3),
            "frozen": nn.Conv2d(8, 8, 3).requires_grad_(False),
            "linear": tied,
            "again": tied,
            "twice": twice,
            "two": nn.Sequential(twice),
            "embedding": nn.Embedding(3, 50),
            "bn": nn.BatchNorm2d(8),
        }
    )
    before = copy.deepcopy(model.state_dict())
    chosen = grassmann_weights(model)
    expected = {f"{name}.weight": model[name].weight for name in ("conv1d", "conv3d", "twice")}
    assert list(chosen) == list(expected)
    assert all(chosen[name] is p for name, p in expected.items())
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert grassmann_weights(model["conv1d"]) == {"weight": model["conv1d"].weight}

    options = {"omega": 0.3, "grad_clip": 0.4, "momentum": 0.8, "weight_decay": 1e-3, "bn_decay": 1e-4}
    groups = {g["name"]: g for g in grassmann_param_groups(model, 0.01, 0.2, **options)}
    params = {k: set(map(id, g.pop("params"))) for k, g in groups.items()}
    others = (model[k].weight for k in ("square", "wide", "transposed", "linear", "embedding"))
    vectors = (p for p in model.parameters() if p.ndim < 2 and p.requires_grad)
    sorted_by_hand = {"grassmann": expected.values(), "bn_bias": vectors, "other": others}
    assert params == {k: set(map(id, ps)) for k, ps in sorted_by_hand.items()}
    euclidean = {"lr": 0.01, "momentum": 0.8, "grassmann": False, "nesterov": True}
    assert list(groups.values()) == [
        {"name": "grassmann", "lr": 0.2, "momentum": 0.8, "grassmann": True, "omega": 0.3, "grad_clip": 0.4},
        {"name": "bn_bias", **euclidean, "weight_decay": 1e-4},
        {"name": "other", **euclidean, "weight_decay": 1e-3},
    ]
    for name, p in expected.items():
        assert_close(p.flatten(1), unit(before[name].flatten(1))[0])


@BOTH
def test_the_explicit_form_and_the_helper_train_alike(Optimizer):
    model = WideResNet(10, 1, 10)
    twin = copy.deepcopy(model)
    helper = Optimizer(grassmann_param_groups(model, 0.01, 0.2))
    g, e0, e1 = (group["params"] for group in grassmann_param_groups(twin, 0.01, 0.2))
    explicit = Optimizer(
        [
            {"params": g, "lr": 0.2, "momentum": 0.9, "grassmann": True, "omega": 0.1, "grad_clip": 0.1},
            {
                "params": e0,
                "lr": 0.01,
                "momentum": 0.9,
                "grassmann": False,
                "weight_decay": 0,
                "nesterov": True,
            },
            {
                "params": e1,
                "lr": 0.01,
                "momentum": 0.9,
                "grassmann": False,
                "weight_decay": 5e-4,
                "nesterov": True,
            },
        ]
    )
    x, labels = torch.randn(8, 3, 32, 32), torch.arange(8)
    for _ in range(2):
        for net, optimizer in ((model, helper), (twin, explicit)):
            optimizer.zero_grad()
            nn.functional.cross_entropy(net(x), labels).backward()
            optimizer.step()
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(a, b)


# ------------------------------------------------------------------------------------------------- errors


@BOTH
@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"lr": -1.0}, "lr.*-1"),
        ({"momentum": -0.5}, "momentum.*-0.5"),
        ({"weight_decay": -0.1}, "weight_decay.*-0.1"),
        ({"omega": -0.1}, "omega.*-0.1"),
        ({"grad_clip": 0.0}, "grad_clip.*0.0"),
        ({"nesterov": True}, "nesterov.*momentum"),
        ({"nesterov": True, "momentum": 0.9, "dampening": 0.5}, "nesterov.*dampening"),
    ],
)
def test_a_bad_value_is_named(Optimizer, options, named):
    with pytest.raises(ValueError, match=named):
        Optimizer([nn.Parameter(torch.ones(2, 3))], **options)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"beta2": 1.0}, "beta2.*1.0"),
        ({"beta2": -0.1}, "beta2"),
        ({"epsilon": 0.0}, "epsilon.*0.0"),
        ({"momentum": 1.0, "grassmann": True}, "momentum.*1.0.*beta1"),
    ],
)
def test_a_bad_value_of_adamg_is_named(options, named):
    with pytest.raises(ValueError, match=named):
        AdamG([nn.Parameter(torch.ones(2, 3))], **options)


@BOTH
@pytest.mark.parametrize(
    ("shape", "omega", "named"),
    [((5,), 0, "two or more dimensions"), ((5, 1), 0, "at least two elements"), ((5, 2), 0.1, "5 rows of 2")],
)
def test_a_weight_without_rows_on_the_manifold_is_refused(Optimizer, shape, omega, named):
    with pytest.raises(ValueError, match=named):
        Optimizer([nn.Parameter(torch.ones(shape))], grassmann=True, omega=omega)


@BOTH
def test_a_misspelt_group_option_is_refused_and_a_schedulers_is_not(Optimizer):
    p = nn.Parameter(torch.ones(2, 3))
    for wrong, right in [("grassman", "grassmann"), ("weightdecay", "weight_decay")]:
        with pytest.raises(ValueError, match=f"{wrong}.*{right}"):
            Optimizer([{"params": [p], wrong: 1}])
    optimizer = Optimizer([{"params": [p], "initial_lr": 0.1, "name": "all", "lr_scale": 2}])
    assert optimizer.param_groups[0]["lr_scale"] == 2
