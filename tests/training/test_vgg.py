"""The VGGs are the paper's: names, shapes, what they compute, BN without a scale, first weights, dropout."""

import pytest
import torch
from torch import nn
from torch.nn.functional import batch_norm, conv2d, linear, max_pool2d, relu

import distributed
from vgg import VGG

DEPTHS = (11, 13, 16, 19)


def norms(model):
    return [module for module in model.modules() if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d))]


@pytest.mark.parametrize("depth", DEPTHS)
def test_batch_normalization_has_a_shift_but_no_scale(depth):
    model = VGG(depth, 10)
    names = {name for name, _ in model.named_parameters()}
    layers = {name.removesuffix(".weight") for name in names if name.endswith(".weight")}
    assert names == {f"{layer}.weight" for layer in layers} | {
        "fc.bias",
        *(f"{layer.replace('conv', 'bn').replace('fc', 'bn')}.bias" for layer in layers - {"fc"}),
    }
    assert len(norms(model)) == depth - 1
    assert not any("bn" in key and key.endswith("weight") for key in model.state_dict())


PAPERS_LAYERS = {
    11: "64 M 128 M 256 256 M 512 512 M 512 512 M",
    13: "64 64 M 128 128 M 256 256 M 512 512 M 512 512 M",
    16: "64 64 M 128 128 M 256 256 256 M 512 512 512 M 512 512 512 M",
    19: "64 64 M 128 128 M 256 256 256 256 M 512 512 512 512 M 512 512 512 512 M",
}  # M: a 2x2 max pool


@torch.no_grad()
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("depth", DEPTHS)
def test_computes_what_the_paper_describes(depth, training):
    """Layer by layer with functions, from the list above: zero padding, BN with a shift, ReLU, max pool."""
    torch.manual_seed(depth)
    model = VGG(depth, 10).double().train(training)
    for bn in norms(model):
        for tensor in (bn.bias, bn.running_mean):
            tensor.normal_()
        bn.running_var.uniform_(0.5, 2)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    weights = iter([t for name, t in state.items() if "conv" in name or name in ("fc0.weight", "fc1.weight")])
    shifts = iter([(t, name.removesuffix("bias")) for name, t in state.items() if name.endswith("bias")])

    def normalized(h):
        shift, name = next(shifts)
        averages = state[f"{name}running_mean"], state[f"{name}running_var"]
        return relu(batch_norm(h, *averages, None, shift, training, momentum=0.1, eps=1e-5))

    x = h = torch.randn(4, 3, 32, 32, dtype=torch.float64)
    for layer in PAPERS_LAYERS[depth].split():
        if layer == "M":
            h = max_pool2d(h, 2)
        else:
            h = normalized(conv2d(h, next(weights), padding=1))
            assert h.shape[1] == int(layer)
    h = h.reshape(4, 512)
    for _ in range(2):
        h = normalized(linear(h, next(weights)))
    expected = linear(h, state["fc.weight"], state["fc.bias"])
    torch.testing.assert_close(model(x), expected, rtol=1e-10, atol=1e-10)
    for name, tensor in model.state_dict().items():  # the running averages
        if "num_batches" not in name:
            torch.testing.assert_close(tensor, state[name], rtol=1e-10, atol=1e-10)


def test_initial_weights_are_he_normal_and_biases_zero():
    torch.manual_seed(0)
    for name, p in VGG(11, 100).named_parameters():
        if p.ndim >= 2:
            assert p.std().item() == pytest.approx((2 / p[0].numel()) ** 0.5, rel=0.1), name
            assert abs(p.mean().item()) < 0.1 * p.std().item(), name
            ratio = (p.abs().mean() / p.std()).item()  # of a normal distribution, not a uniform one
            assert p.numel() < 2000 or ratio == pytest.approx(0.798, rel=0.04), name
        else:
            assert (p == 0).all(), name


@torch.no_grad()
def test_dropout_sits_behind_the_pools_and_acts_only_in_training():
    torch.manual_seed(0)
    model = VGG(13, 10, dropout=0.5)
    dropouts = [name for name, module in model.named_modules() if isinstance(module, nn.Dropout)]
    assert dropouts == [f"group{i}.dropout" for i in range(5)]
    pooled, dropped = {}, {}
    for i in range(5):
        group = model.get_submodule(f"group{i}")
        group.pool.register_forward_hook(lambda module, args, out, i=i: pooled.update({i: out.clone()}))
        group.register_forward_hook(lambda module, args, out, i=i: dropped.update({i: out.clone()}))
    x = torch.randn(8, 3, 32, 32)
    model.train()(x)
    for i in range(5):
        kept = dropped[i] != 0
        assert torch.equal(dropped[i][kept], 2 * pooled[i][kept])
        assert 0.4 < kept[pooled[i] > 0].float().mean() < 0.6
    first = model.eval()(x)
    assert all(torch.equal(pooled[i], dropped[i]) for i in range(5))
    assert torch.equal(model(x), first)
    assert not any(isinstance(module, nn.Dropout) for module in VGG(13, 10).modules())


def test_synchronized_batch_normalization_keeps_names_and_weights():
    """Which torch's convert_sync_batchnorm refuses, as the scale is no parameter."""
    model, x = VGG(11, 10).eval(), torch.randn(2, 3, 32, 32)
    before, result = model.state_dict(), model(x)
    distributed.synchronize_batch_norm(model)
    assert sum(isinstance(module, nn.SyncBatchNorm) for module in model.modules()) == 10
    assert norms(model) == []
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    assert torch.equal(model(x), result)
