"""The networks are the paper's: parameters, names, shapes, where a batch normalization follows."""

import pytest
import torch

from grassmann_optimizer import grassmann_param_groups
from resnet import WideResNet


def count(model):
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(
    ("depth", "width", "classes", "parameters", "grassmann_layers"),
    [
        (16, 4, 10, 2_748_890, 13),
        (22, 8, 10, 17_158_106, 19),
        (28, 10, 10, 36_479_194, 24),
        (28, 10, 100, 36_536_884, 24),
        (40, 10, 10, 55_841_754, 36),
    ],
)
def test_parameters_and_layers_on_the_manifold_are_those_of_the_paper(
    depth, width, classes, parameters, grassmann_layers
):
    model = WideResNet(depth, width, classes)
    assert count(model) == parameters
    group = grassmann_param_groups(model, lr=0.01, lrg=0.2)[0]
    assert group["name"] == "on G(1,n)"
    assert len(group["params"]) == grassmann_layers
    if (depth, width) == (28, 10):
        assert sum(p.shape[0] for p in group["params"]) == 8816


def test_names_are_those_of_the_authors_code():
    names = {name for name, _ in WideResNet(10, 2, 10).named_parameters()}
    assert {"conv0.weight", "group0.block0.conv0.weight", "group0.block0.bn0.weight"} <= names
    assert {"group2.block0.convdim.weight", "bn.weight", "bn.bias", "fc.weight", "fc.bias"} <= names
    assert not any("conv" in name and name.endswith("bias") for name in names)


@pytest.mark.parametrize(("depth", "nearest"), [(12, ("10", "16")), (29, ("28", "34")), (3, ("10", "16"))])
def test_a_depth_that_is_not_6n_plus_4_names_the_nearest_two(depth, nearest):
    with pytest.raises(ValueError, match=f"got {depth}") as error:
        WideResNet(depth, 1, 10)
    assert all(f" {n}" in str(error.value) for n in nearest)


@pytest.mark.parametrize(("width", "dropout", "named"), [(0, 0.0, "width"), (1, 1.0, "dropout"), (1, -0.1, "dropout")])
def test_a_bad_width_or_dropout_is_named(width, dropout, named):
    with pytest.raises(ValueError, match=named):
        WideResNet(10, width, 10, dropout)


def test_shapes_strides_and_memory_format():
    model = WideResNet(10, 1, 7).to(memory_format=torch.channels_last)
    x = torch.randn(2, 3, 32, 32).to(memory_format=torch.channels_last)
    sizes = []

    def record(module, args, out):
        assert out.is_contiguous(memory_format=torch.channels_last)
        sizes.append(tuple(out.shape[1:]))

    for group in (model.group0, model.group1, model.group2):
        group.register_forward_hook(record)
    assert model(x).shape == (2, 7)
    assert sizes == [(16, 32, 32), (32, 16, 16), (64, 8, 8)]


def test_initial_weights_are_he_normal_and_biases_zero():
    torch.manual_seed(0)
    model = WideResNet(16, 4, 100)
    for name, p in model.named_parameters():
        if p.ndim >= 2:
            expected = (2 / p[0].numel()) ** 0.5
            assert p.std().item() == pytest.approx(expected, rel=0.15), name
    assert (model.fc.bias == 0).all()


def test_dropout_sits_between_the_convolutions_of_a_block_and_only_in_training():
    torch.manual_seed(0)
    model = WideResNet(10, 1, 10, dropout=0.5)
    seen = []
    for block in (model.group0.block0, model.group1.block0, model.group2.block0):
        block.conv1.register_forward_pre_hook(lambda module, args: seen.append((args[0] == 0).float().mean().item()))
    x = torch.randn(8, 3, 32, 32)
    model.train()(x)
    trained, seen[:] = list(seen), []
    model.eval()(x)
    # ReLU alone leaves about half zero, dropout of 0.5 on top about three quarters.
    assert all(share > 0.65 for share in trained)
    assert all(share < 0.65 for share in seen)
    assert torch.equal(model(x), model(x))


@torch.no_grad()
def test_only_a_blocks_first_convolution_is_blind_to_its_weights_length():
    torch.manual_seed(0)
    model = WideResNet(10, 1, 10).train()
    x = torch.randn(8, 3, 32, 32)
    before = model(x)
    model.group1.block0.conv0.weight *= 3
    assert torch.allclose(model(x), before, atol=1e-3)
    model.group1.block0.conv1.weight *= 3
    assert not torch.allclose(model(x), before, atol=1e-3)
