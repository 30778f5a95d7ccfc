"""The Wide ResNets are the paper's: names, shapes, what they compute, initial weights, dropout."""

import pytest
import torch
from torch import nn
from torch.nn.functional import batch_norm, conv2d, dropout, linear, relu

from resnet import WideResNet


@torch.no_grad()
@pytest.mark.parametrize("training", [True, False])
def test_computes_what_the_paper_describes(training):
    """Layer by layer with functions: WRN-16-2, two blocks a group, the dropout's zeros from the same seed."""
    torch.manual_seed(0)
    model = WideResNet(16, 2, 10, dropout=0.3).double().train(training)
    for bn in (module for module in model.modules() if isinstance(module, nn.BatchNorm2d)):
        for tensor in (bn.weight, bn.running_var):
            tensor.uniform_(0.5, 2)
        for tensor in (bn.bias, bn.running_mean):
            tensor.normal_()
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}

    def normalized(h, name):
        names = ("running_mean", "running_var", "weight", "bias")
        parts = (state[f"{name}.{part}"] for part in names)
        return relu(batch_norm(h, *parts, training, momentum=0.1, eps=1e-5))

    x = torch.randn(4, 3, 32, 32, dtype=torch.float64)
    torch.manual_seed(1)
    h = conv2d(x, state["conv0.weight"], padding=1)
    for group, block in ((group, block) for group in range(3) for block in range(2)):
        name, stride = f"group{group}.block{block}", 2 if group and not block else 1
        o = normalized(h, f"{name}.bn0")
        z = normalized(conv2d(o, state[f"{name}.conv0.weight"], stride=stride, padding=1), f"{name}.bn1")
        z = conv2d(dropout(z, 0.3, training), state[f"{name}.conv1.weight"], padding=1)
        h = z + (h if block else conv2d(o, state[f"{name}.convdim.weight"], stride=stride))
    expected = linear(normalized(h, "bn").mean((2, 3)), state["fc.weight"], state["fc.bias"])
    torch.manual_seed(1)
    torch.testing.assert_close(model(x), expected, rtol=1e-10, atol=1e-10)
    for name, tensor in model.state_dict().items():  # the running averages
        if "num_batches" not in name:
            torch.testing.assert_close(tensor, state[name], rtol=1e-10, atol=1e-10)


def test_initial_weights_are_he_normal_and_biases_zero():
    torch.manual_seed(0)
    for name, p in WideResNet(16, 4, 100).named_parameters():
        if p.ndim >= 2:
            assert p.std().item() == pytest.approx((2 / p[0].numel()) ** 0.5, rel=0.15), name
            # sqrt(2/pi) = 0.798 for a normal distribution, 0.866 for a uniform one.
            ratio = (p.abs().mean() / p.std()).item()
            assert p.numel() < 2000 or ratio == pytest.approx(0.798, rel=0.04), name
        else:
            assert (p == (1 if "bn" in name and name.endswith("weight") else 0)).all(), name
