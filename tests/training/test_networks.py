"""The networks are the paper's: what they compute, their first weights; and each trains with every method."""

import copy
import shutil

import pytest
import torch
from helpers import METHODS, call, make_images
from torch import nn
from torch.nn.functional import batch_norm, conv2d, dropout, linear, max_pool2d, relu

import distributed
from resnet import WideResNet
from vgg import VGG

VGGS = {  # M: a 2x2 max pool
    11: "64 M 128 M 256 256 M 512 512 M 512 512",
    13: "64 64 M 128 128 M 256 256 M 512 512 M 512 512",
    16: "64 64 M 128 128 M 256 256 256 M 512 512 512 M 512 512 512",
    19: "64 64 M 128 128 M 256 256 256 256 M 512 512 512 512 M 512 512 512 512",
}


def normalized(h, state, name, training, scale=None):
    """Batch normalization, which moves the running averages in `state`, and ReLU."""
    averages = state[f"{name}.running_mean"], state[f"{name}.running_var"]
    return relu(batch_norm(h, *averages, scale, state[f"{name}.bias"], training, momentum=0.1, eps=1e-5))


def vgg(depth, x, state, training):
    """Zero padding, BN with a shift but no scale, dropout behind each pool."""
    h = x
    for i, widths in enumerate(VGGS[depth].split(" M ")):
        for j, width in enumerate(widths.split()):
            h = conv2d(h, state[f"group{i}.conv{j}.weight"], padding=1)
            assert h.shape[1] == int(width)
            h = normalized(h, state, f"group{i}.bn{j}", training)
        h = dropout(max_pool2d(h, 2), 0.3, training)
    h = h.flatten(1)
    for i in range(2):
        h = normalized(linear(h, state[f"fc{i}.weight"]), state, f"bn{i}", training)
    return linear(h, state["fc.weight"], state["fc.bias"])


def wrn_16_2(x, state, training):
    """Two blocks a group, dropout between a block's convolutions."""

    def bn(h, name):
        return normalized(h, state, name, training, state[f"{name}.weight"])

    h = conv2d(x, state["conv0.weight"], padding=1)
    for group, block in ((group, block) for group in range(3) for block in range(2)):
        name, stride = f"group{group}.block{block}", 2 if group and not block else 1
        o = bn(h, f"{name}.bn0")
        z = bn(conv2d(o, state[f"{name}.conv0.weight"], stride=stride, padding=1), f"{name}.bn1")
        z = conv2d(dropout(z, 0.3, training), state[f"{name}.conv1.weight"], padding=1)
        h = z + (h if block else conv2d(o, state[f"{name}.convdim.weight"], stride=stride))
    return linear(bn(h, "bn").mean((2, 3)), state["fc.weight"], state["fc.bias"])


@torch.no_grad()
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("depth", [*VGGS, None])
def test_computes_what_the_paper_describes(depth, training):
    """Layer by layer with functions, the dropout's zeros from the same seed; None: WRN-16-2."""
    torch.manual_seed(0)
    model = VGG(depth, 10, dropout=0.3) if depth else WideResNet(16, 2, 10, dropout=0.3)
    model = model.double().train(training)
    for tensor in model.state_dict().values():
        if tensor.ndim == 1:  # of batch normalization, and the classifier's bias
            tensor.uniform_(0.5, 2)
    state, x = copy.deepcopy(model.state_dict()), torch.randn(4, 3, 32, 32, dtype=torch.float64)
    torch.manual_seed(1)
    expected = vgg(depth, x, state, training) if depth else wrn_16_2(x, state, training)
    torch.manual_seed(1)
    torch.testing.assert_close(model(x), expected, rtol=1e-10, atol=1e-10)
    for name, average in model.state_dict().items():
        if "running" in name:
            torch.testing.assert_close(average, state[name], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("network", "size"), [(WideResNet, (16, 4)), (VGG, (11,))])
def test_initial_weights_are_he_normal_and_biases_zero(network, size):
    torch.manual_seed(0)
    for name, p in network(*size, 100).named_parameters():
        if p.ndim >= 2:
            assert p.std().item() == pytest.approx((2 / p[0].numel()) ** 0.5, rel=0.15), name
            # sqrt(2/pi) = 0.798 for a normal distribution, 0.866 for a uniform one.
            ratio = (p.abs().mean() / p.std()).item()
            assert p.numel() < 2000 or ratio == pytest.approx(0.798, rel=0.04), name
        else:
            assert (p == (1 if "bn" in name and name.endswith("weight") else 0)).all(), name


def test_synchronized_batch_normalization_keeps_names_and_weights():
    """Which torch's convert_sync_batchnorm refuses, as VGG's scale is no parameter."""
    model, x = VGG(11, 10).eval(), torch.randn(2, 3, 32, 32)
    before, result = model.state_dict(), model(x)
    distributed.synchronize_batch_norm(model)
    assert sum(isinstance(module, nn.SyncBatchNorm) for module in model.modules()) == 10
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    assert torch.equal(model(x), result)


@pytest.fixture(scope="module")
def few_images(tmp_path_factory):
    return make_images(tmp_path_factory.mktemp("few"), train=1, test=1)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("network", [
    "resnet --depth 16 --width 4", "resnet --depth 22 --width 8", "resnet --depth 28 --width 10",
    pytest.param("resnet --depth 40 --width 10", marks=pytest.mark.long), "vgg13", "vgg19",
])  # fmt: skip
def test_each_network_of_the_papers_tables_trains(network, method, few_images, tmp_path):
    words = ["--model", *network.split(), "--optim_method", method, "--batch_size", 2, "--lr", 0.01]
    words += ["--dataset", "folder", "--dataroot", few_images, "--epochs", 1, "--epoch_step", "[]"]
    outcome = call(*words, "--save", tmp_path / "run")
    assert outcome.code == 0, outcome  # else a loss was not finite
    shutil.rmtree(tmp_path / "run")  # a checkpoint of up to 450 MB
