"""The optimizers are the update rules and touch nothing else; parameters are sorted as in the paper."""

import copy
import math
import sys
import warnings

import pytest
import torch
from torch import nn
from torch.testing import assert_close

import grassmann_optimizer as go
from grassmann_optimizer import SGDG, AdamG, grassmann_param_groups, grassmann_weights, unit

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


def by_rule(Optimizer, y, gradients, *, lr, momentum, omega, grad_clip, beta2=0.99, epsilon=1e-8):
    """The rows after a step of the update rule for each gradient, in float64."""
    y = y.double()
    m, v = torch.zeros_like(y), torch.zeros(len(y), 1, dtype=y.dtype)
    options = {"lr": lr, "omega": omega, "grad_clip": grad_clip}
    for t, g in enumerate(gradients, 1):
        if Optimizer is SGDG:
            y, m = go.sgdg_update(y, g.double(), m, momentum=momentum, **options)
        else:
            betas = {"beta1": momentum, "beta2": beta2, "epsilon": epsilon}
            y, m, v = go.adamg_update(y, g.double(), m, v, torch.tensor(t).double(), **betas, **options)
    return y


@BOTH
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_optimizer_is_the_update_rule(Optimizer, dtype):
    weight = torch.randn(4, 3, 3, 3, dtype=dtype)
    gradients = torch.randn(5, 4, 3, 3, 3, dtype=dtype)
    options = {"lr": 0.3, "momentum": 0.7, "omega": 0.2, "grad_clip": 0.4}
    options |= {"beta2": 0.95, "epsilon": 1e-3} if Optimizer is AdamG else {}
    got = run_optimizer(Optimizer, weight, gradients, **options).flatten(1)
    tolerance = 1e-12 if dtype == torch.float64 else 1e-6
    expected = by_rule(Optimizer, weight.flatten(1), gradients.flatten(2), **options)
    assert_close(got.double(), expected, rtol=tolerance, atol=tolerance)


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


# ------------------------------------------------------------------------------------------------- groups


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


# ------------------------------------------------------------------------------------------------- errors
# ------------------------------------------------------------------------------------------ what is refused

ONES, CONVOLUTION = torch.ones(2, 3), {"grassmann": True, "lr": 0.2}
BAD_GROUPS = [  # weight, options, what the sentence names
    (ONES, {"lr": -1.0}, "lr.*-1"),
    (ONES, {"momentum": -0.5}, "momentum.*-0.5"),
    (ONES, {"weight_decay": -0.1}, "weight_decay.*-0.1"),
    (ONES, {"omega": -0.1}, "omega.*-0.1"),
    (ONES, {"grad_clip": 0.0}, "grad_clip.*0.0"),
    (ONES, {"nesterov": True}, "nesterov.*momentum"),
    (ONES, {"nesterov": True, "momentum": 0.9, "dampening": 0.5}, "nesterov.*dampening"),
    (ONES, {"beta2": 1.0}, "beta2.*1.0"),
    (ONES, {"epsilon": 0.0}, "epsilon.*0.0"),
    (ONES, {"momentum": 1.0, "grassmann": True}, "momentum.*1.0.*beta1"),
    (torch.ones(5), CONVOLUTION, r"rows of at least two elements.*\(5,\)"),
    (torch.ones(5, 1), CONVOLUTION, r"rows of at least two elements.*\(5, 1\)"),
    (torch.ones(5, 2), {**CONVOLUTION, "omega": 0.1}, r"omega=0.1 needs.*\(5, 2\)"),
    (ONES.to(torch.complex64), CONVOLUTION, "real.*complex64"),
    (ONES, {"grassman": True}, "'grassman'.*'grassmann'"),
    (ONES, {"weightdecay": 0.1}, "'weightdecay'.*'weight_decay'"),
    (ONES, {"eps": 1e-8}, "'eps'.*'epsilon'"),
]


@pytest.mark.parametrize(("weight", "options", "named"), BAD_GROUPS)
def test_a_bad_option_or_weight_is_named_and_its_group_not_added(weight, options, named):
    with pytest.raises(ValueError, match=named):
        AdamG([{"params": [nn.Parameter(weight)], **options}])
    optimizer = AdamG([nn.Parameter(torch.ones(2, 3))])
    with pytest.raises(ValueError, match=named):
        optimizer.add_param_group({"params": [nn.Parameter(weight)], **options})
    assert len(optimizer.param_groups) == 1


@BOTH
def test_an_option_of_rows_where_there_are_none_is_refused(Optimizer):
    more = {"beta2": 0.9, "epsilon": 1e-3} if Optimizer is AdamG else {}
    for name, value in {"omega": 0.1, "grad_clip": 0.1, **more}.items():
        for groups, options in ([ONES], {name: value}), ([{"params": [ONES], name: value}], {}):
            with pytest.raises(ValueError, match=f"{name} has no effect.*grassmann_param_groups"):
                Optimizer(groups, **options)


def zeroed():
    """Two convolutions, the second of them zero."""
    model = nn.ModuleDict({"first": nn.Conv2d(2, 4, 3), "zero": nn.Conv2d(4, 4, 3)})
    nn.init.zeros_(model["zero"].weight)
    return model


LINEAR = nn.Sequential(nn.Linear(9, 4), nn.BatchNorm1d(4))
BAD_MODELS = [  # model, select and loss_fn, what the sentence names
    (LINEAR.parameters(), {}, "the model itself.*generator"),
    (LINEAR, {}, r"Conv1d, Conv2d or Conv3d \(here: none\).*linear layers.*measured.*by name"),
    (nn.Sequential(nn.Conv2d(3, 64, 1)), {}, r"\(here: 0\)"),
    (nn.Linear(9, 4), {"select": "measured", "loss_fn": lambda m: m.weight.sum()}, "no weight is inv"),
    (LINEAR, {"select": "measured"}, "select: .*'measured'"),
    (LINEAR, {"select": "name"}, "select: .*'name'"),
    (LINEAR, {"loss_fn": lambda _: 0}, "select: .*'shape'"),
    (LINEAR, {"select": ["0.weight", "none.weight"]}, r"no trainable parameter none\.weight$"),
    (LINEAR, {"select": ["1.weight"]}, r"rows of at least two elements, got 1\.weight"),
    (LINEAR, {"select": "measured", "loss_fn": lambda m: m[1].bias.sum()}, r"no gradient reaches 0\.weight"),
    (nn.Sequential(nn.Conv2d(2, 4, 3, dtype=torch.complex64)), {}, r"real.*0\.weight.*complex64"),
    (zeroed(), {}, r"zero\.weight is zero"),
    (nn.Sequential(nn.LazyConv2d(8, 3)), {}, r"a batch first.*0\.weight"),
]


@pytest.mark.parametrize(("model", "options", "named"), BAD_MODELS)
def test_a_model_that_cannot_be_sorted_is_said_in_one_sentence(model, options, named):
    with pytest.raises((TypeError, ValueError, RuntimeError), match=named) as refused:
        grassmann_param_groups(model, 0.01, 0.2, **options)
    assert "\n" not in str(refused.value)


def test_what_is_chosen_by_name_or_not_at_all_is_taken():
    model = zeroed()
    groups = grassmann_param_groups(model, 0.01, 0.2, select=["first.weight"])
    assert [g["name"] for g in groups] == ["grassmann", "bn_bias", "other"]
    assert [g["name"] for g in grassmann_param_groups(LINEAR, 0.01, 0.2, select=[])] == ["bn_bias", "other"]
    model["zero"].weight.data[0] = 1  # a row that is zero beside others stays so
    grassmann_param_groups(model, 0.01, 0.2)
    assert_close(model["zero"].weight.detach().flatten(1).norm(dim=1), torch.tensor([1.0, 0, 0, 0]))


# --------------------------------------------------------------------------------------- what is warned of


def train(optimizer, steps=3):
    for _ in range(steps):
        for group in optimizer.param_groups:
            for p in group["params"]:
                p.grad = torch.ones_like(p)
        optimizer.step()


def test_plain_sgd_is_said_once_and_not_by_an_optimizer_for_each_parameter(recwarn):
    warnings.simplefilter("always")  # not once for a line, as recwarn does
    params = [nn.Parameter(torch.randn(3, 4)) for _ in range(2)]
    optimizer = SGDG(params, lr=0.1)
    train(optimizer)
    assert len(recwarn) == 1
    assert "plain SGD: no group has grassmann=True" in str(recwarn[0].message)
    assert recwarn.pop().filename == __file__
    for p in params:  # as an optimizer in the backward pass
        train(SGDG([p], lr=0.1))
    optimizer = SGDG([nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(4))], lr=0.1)
    optimizer.add_param_group({"params": params, "grassmann": True})
    train(optimizer)
    assert not recwarn


def test_a_schedule_that_erases_lrg_is_said_once(recwarn):
    warnings.simplefilter("always")

    def make(**rates):
        model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
        return SGDG(grassmann_param_groups(model, **{"lr": 0.01, "lrg": 0.2, **rates}))

    scheduled = make()
    torch.optim.lr_scheduler.OneCycleLR(scheduled, max_lr=0.1, total_steps=9)
    train(scheduled)
    assert len(recwarn) == 1
    assert "the rate 0.004 now" in str(recwarn.pop().message)
    for optimizer in (make(), make(lr=0.2), make(lr=torch.tensor(0.1), lrg=torch.tensor(0.1))):
        torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5)
        train(optimizer)
        for group in optimizer.param_groups:
            group["lr"] = 0.0  # the end of a schedule
        train(optimizer)
    assert not recwarn


# ------------------------------------------------------------------------------------------- rows of length 0


@BOTH
@pytest.mark.parametrize("omega", [0.0, 0.1])
def test_a_zero_row_follows_the_rule(Optimizer, omega):
    """It is as long as the sine of its first step's angle; without a gradient it stays zero."""
    weight = torch.randn(3, 9, dtype=torch.float64)
    weight[1:] = 0
    gradients = torch.randn(2, 3, 9, dtype=torch.float64)
    gradients[:, 2] = 0
    options = {"lr": 0.2, "grad_clip": 0.5, "omega": omega}
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-6), (torch.bfloat16, 1e-2)):
        for steps in (1, 2):
            expected = by_rule(Optimizer, weight, gradients[:steps], momentum=0.9, **options)
            got = run_optimizer(Optimizer, weight.to(dtype), gradients[:steps].to(dtype), **options)
            assert_close(got.double(), expected, rtol=0, atol=tolerance)
            if steps == 1:
                angle = 0.2 * (
                    0.5 if Optimizer is SGDG else 1
                )  # of a clipped gradient; of Adam-G's first step
                assert_close(
                    expected.norm(dim=1), torch.tensor([1, math.sin(angle), 0.0]).double(), rtol=1e-5, atol=0
                )
