"""Other groups are plain SGD; a model's parameters are sorted as in the paper; mistakes are said."""

import copy
import warnings

import pytest
import torch
from optimizer.steps import BOTH, take_steps
from torch import nn
from torch.testing import assert_close

from grassmann_optimizer import SGDG, AdamG, grassmann_param_groups, grassmann_weights, unit


@BOTH
@pytest.mark.filterwarnings("ignore:steps of plain SGD")
def test_other_groups_are_torchs_sgd_bit_for_bit_and_gradients_are_read_only(Optimizer):
    nesterov = {"nesterov": True}
    for more in ({"dampening": 0.5}, {"maximize": True}, nesterov, {**nesterov, "weight_decay": 5e-4}):
        ours, theirs = ([nn.Parameter(torch.ones(4, 9)) for _ in range(2)] for _ in range(2))
        options = {"lr": 0.1, "momentum": 0.9, **more}
        optimizer = take_steps(Optimizer(ours, **options), range(3))
        take_steps(torch.optim.SGD(theirs, **options), range(3))
        assert all(map(torch.equal, ours, theirs))
        before = copy.deepcopy([p.grad for p in ours])
        optimizer.step()
        assert all(torch.equal(p.grad, g) for p, g in zip(ours, before, strict=True))


# --------------------------------------------------------------------------------------------------- groups


def test_groups_by_type_and_shape():
    tied, twice = nn.Linear(8, 8), nn.Conv2d(8, 8, 3)
    modules = {"conv1d": nn.Conv1d(4, 8, 3), "conv3d": nn.Conv3d(2, 4, 3), "twice": twice}
    modules |= {"square": nn.Conv2d(8, 8, 1), "wide": nn.Conv2d(2, 32, 3), "linear": tied, "again": tied}
    modules |= {"transposed": nn.ConvTranspose2d(4, 8, 3), "two": nn.Sequential(twice)}
    modules |= {"embedding": nn.Embedding(3, 50), "bn": nn.BatchNorm2d(8)}
    model = nn.ModuleDict({**modules, "frozen": nn.Conv2d(8, 8, 3).requires_grad_(False)})
    before = copy.deepcopy(model.state_dict())
    chosen = {f"{name}.weight": model[name].weight for name in ("conv1d", "conv3d", "twice")}
    assert grassmann_weights(model) == chosen
    assert grassmann_weights(model["conv1d"]) == {"weight": model["conv1d"].weight}
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())

    options = {"omega": 0.3, "grad_clip": 0.4, "momentum": 0.8, "weight_decay": 1e-3, "bn_decay": 1e-4}
    groups = grassmann_param_groups(model, 0.01, 0.2, **options)
    params = {group["name"]: set(group.pop("params")) for group in groups}
    others = {model[k].weight for k in ("square", "wide", "transposed", "linear", "embedding")}
    vectors = {p for p in model.parameters() if p.ndim < 2 and p.requires_grad}
    assert params == {"grassmann": set(chosen.values()), "bn_bias": vectors, "other": others}
    euclidean = {"lr": 0.01, "momentum": 0.8, "grassmann": False, "nesterov": True}
    assert groups == [
        {"name": "grassmann", "lr": 0.2, "momentum": 0.8, "grassmann": True, "omega": 0.3, "grad_clip": 0.4},
        {"name": "bn_bias", **euclidean, "weight_decay": 1e-4},
        {"name": "other", **euclidean, "weight_decay": 1e-3},
    ]
    for name, p in chosen.items():
        assert_close(p.flatten(1), unit(before[name].flatten(1))[0])


# ------------------------------------------------------------------------------------------ what is refused

ONES, CONVOLUTION = torch.ones(2, 3), {"grassmann": True, "lr": 0.2}
BAD_GROUPS = [  # weight, options, what the sentence names
    (ONES, {"lr": -1.0}, "lr.*-1"),
    (ONES, {"momentum": -0.5}, "momentum.*-0.5"),
    (ONES, {"grad_clip": 0.0}, "grad_clip.*0.0"),
    (ONES, {"nesterov": True, "momentum": 0.9, "dampening": 0.5}, "nesterov.*dampening"),
    (ONES, {"beta2": 1.0}, "beta2.*1.0"),
    (ONES, {"epsilon": 0.0}, "epsilon.*0.0"),
    (ONES, {"momentum": 1.0, "grassmann": True}, "momentum.*1.0.*beta1"),
    (torch.ones(5, 1), CONVOLUTION, r"rows of at least two elements.*\(5, 1\)"),
    (torch.ones(5, 2), {**CONVOLUTION, "omega": 0.1}, r"omega=0.1 needs.*\(5, 2\)"),
    (ONES.to(torch.complex64), CONVOLUTION, "real.*complex64"),
    (ONES, {"grassman": True}, "'grassman'.*'grassmann'"),
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
    (LINEAR, {"loss_fn": lambda _: 0}, "select: .*'shape'"),
    (LINEAR, {"select": ["0.weight", "none.weight"]}, r"no trainable parameter none\.weight$"),
    (LINEAR, {"select": ["1.weight"]}, r"rows of at least two elements, got 1\.weight"),
    (LINEAR, {"select": "measured", "loss_fn": lambda m: m[1].bias.sum()}, r"no gradient reaches 0\.weight"),
    (zeroed(), {}, r"zero\.weight is zero"),
    (nn.Sequential(nn.LazyConv2d(8, 3)), {}, r"a batch first.*0\.weight"),
]


@pytest.mark.parametrize(("model", "options", "named"), BAD_MODELS)
def test_a_model_that_cannot_be_sorted_is_said_in_one_sentence(model, options, named):
    with pytest.raises((TypeError, ValueError), match=named) as refused:
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


def test_plain_sgd_is_said_once_and_not_by_an_optimizer_for_each_parameter(recwarn):
    warnings.simplefilter("always")  # not once for a line, as recwarn does
    params = [nn.Parameter(torch.randn(3, 4)) for _ in range(2)]
    optimizer = SGDG(params, lr=0.1)
    take_steps(optimizer, range(3))
    assert len(recwarn) == 1
    assert "plain SGD: no group has grassmann=True" in str(recwarn[0].message)
    assert recwarn.pop().filename == take_steps.__code__.co_filename
    for p in params:  # as an optimizer in the backward pass
        take_steps(SGDG([p], lr=0.1), range(3))
    optimizer = SGDG([nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(4))], lr=0.1)
    optimizer.add_param_group({"params": params, "grassmann": True})
    take_steps(optimizer, range(3))
    assert not recwarn


def test_a_schedule_that_erases_lrg_is_said_once(recwarn):
    warnings.simplefilter("always")

    def make(**rates):
        model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
        return SGDG(grassmann_param_groups(model, **{"lr": 0.01, "lrg": 0.2, **rates}))

    scheduled = make()
    torch.optim.lr_scheduler.OneCycleLR(scheduled, max_lr=0.1, total_steps=9)
    take_steps(scheduled, range(3))
    assert len(recwarn) == 1
    assert "the rate 0.004 now" in str(recwarn.pop().message)
    for optimizer in (make(), make(lr=0.2), make(lr=torch.tensor(0.1), lrg=torch.tensor(0.1))):
        torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5)
        take_steps(optimizer, range(3))
        for group in optimizer.param_groups:
            group["lr"] = 0.0  # the end of a schedule
        take_steps(optimizer, range(3))
    assert not recwarn
