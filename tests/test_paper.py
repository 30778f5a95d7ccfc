"""What the paper and the authors' code say, in numbers, held against what a run does. Read this file first.

Nothing expected here comes from the code under test: numbers are literal, and `plain_loop` is the training
once more in plain PyTorch (but for the networks and the drawn order, which tests/training checks). In this
order: a step of each method by hand; which weights are on G(1, n); the hyperparameters, and the learning
rates epoch by epoch; the paper's tables; runs beside the plain loop.
"""

import json
import math
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import summarize
import torch
from helpers import METHODS, call, load, log_lines, write_archive, write_svhn
from torch.nn.functional import cross_entropy

import main
from data import EpochPlan, load_data
from grassmann_optimizer import SGDG, AdamG
from options import parse_options
from resnet import WideResNet
from vgg import VGG

# ---------------------------------------------------------------------------------------- one step, by hand


def step(method, y, g, state=None, **options):
    """The weight and its state after one step from y with gradient g, as lists rounded to six digits."""
    p = torch.nn.Parameter(torch.tensor(y).double())
    p.grad = torch.tensor(g).double()
    optimizer = method([p], grassmann=True, **options)
    for name, value in (state or {}).items():
        optimizer.state[p][name] = torch.tensor(value).double()
    optimizer.step()
    kept = ("momentum_buffer", "second_moment") if method is AdamG else ("momentum_buffer",)
    tensors = [p, *(optimizer.state[p][name] for name in kept)]
    return [(t.detach().round(decimals=6) + 0.0).tolist() for t in tensors]


def test_sgdg_in_the_plane():
    # h = (0, -0.5), the part of g across y; clipped to (0, -0.25); d = -2 h = (0, 0.5). cos 0.5 = 0.877583,
    # sin 0.5 = 0.479426: y turns by 0.5 to (cos 0.5, sin 0.5); d turns with it to 0.5 (-sin 0.5, cos 0.5).
    y, tau = step(SGDG, [[1.0, 0.0]], [[7.0, -0.5]], lr=2.0, momentum=0.9, grad_clip=0.25)
    assert y == [[0.877583, 0.479426]]
    assert tau == [[-0.239713, 0.438791]]


def test_sgdg_in_space_with_momentum_from_a_row_of_another_length():
    # y is (1, 0, 0) whatever its length; h = (0, 0, -0.5), shorter than the threshold.
    # d = 0.75 (0, 0.4, 0) - 0.8 h = (0, 0.3, 0.4) = 0.5 u with u = (0, 0.6, 0.8).
    # y = (cos 0.5, 0.6 sin 0.5, 0.8 sin 0.5), tau = 0.5 (-sin 0.5, 0.6 cos 0.5, 0.8 cos 0.5).
    before = {"momentum_buffer": [[0.0, 0.4, 0.0]]}
    y, tau = step(SGDG, [[2.0, 0.0, 0.0]], [[2.0, 0.0, -0.5]], before, lr=0.8, momentum=0.75, grad_clip=0.6)
    assert y == [[0.877583, 0.287655, 0.38354]]
    assert tau == [[-0.239713, 0.263275, 0.351033]]


def test_the_regularizer_parts_two_rows():
    # Y Y' - I = ((0, 0.6), (0.6, 0)); 2 omega (Y Y' - I) Y = ((0.36, 0.48, 0), (0.6, 0, 0)) for omega = 0.5.
    # Across the rows: h = (0, 0.48, 0) and 0.48 (0.8, -0.6, 0). Each row turns by 0.48, away from the other:
    # 0.6 cos 0.48 - 0.8 sin 0.48 = 0.162774, 0.8 cos 0.48 + 0.6 sin 0.48 = 0.986663.
    rows = [[1.0, 0.0, 0.0], [0.6, 0.8, 0.0]]
    y, _ = step(SGDG, rows, [[0.0] * 3] * 2, lr=1.0, momentum=0.0, omega=0.5)
    assert y == [[0.886995, -0.461779, 0.0], [0.162774, 0.986663, 0.0]]


def test_adamg_in_the_plane():
    # h = (0, 0.5); m = 0.1 h = (0, 0.05); v = 0.01 * 0.25 = 0.0025, one number for the row.
    # sqrt(1 - 0.99) / (1 - 0.9) = 1, m / sqrt(v + 0.0011) = (0, 0.05 / 0.06); d = -0.6 of it = (0, -0.5).
    y, m, v = step(AdamG, [[1.0, 0.0]], [[3.0, 0.5]], lr=0.6, momentum=0.9, beta2=0.99, epsilon=0.0011)
    assert y == [[0.877583, -0.479426]]
    assert m == [[0.023971, 0.043879]]
    assert v == [[0.0025]]


def test_adamg_in_space_in_its_second_step():
    # h = (0, 0, 0.16); m = 0.5 (0, 0.12, 0) + 0.5 h = 0.1 (0, 0.6, 0.8); v = 0.75 * 0.0048 + 0.25 h'h = 0.01.
    # sqrt(1 - 0.75^2) / (1 - 0.5^2) = 0.881917, so d = -0.5 * 0.881917 (0, 0.6, 0.8): an angle of 0.440959,
    # cos 0.904343, sin 0.426807.
    before = {"momentum_buffer": [[0.0, 0.12, 0.0]], "second_moment": [[0.0048]], "step": 1.0}
    options = {"lr": 0.5, "momentum": 0.5, "beta2": 0.75, "epsilon": 1e-12}
    y, m, v = step(AdamG, [[1.0, 0.0, 0.0]], [[0.3, 0.0, 0.16]], before, **options)
    assert y == [[0.904343, -0.256084, -0.341445]]
    assert m == [[0.042681, 0.054261, 0.072347]]
    assert v == [[0.01]]


# ----------------------------------------------------------------------------- which weights are on G(1, n)


def authors_group(name, shape):
    """The rule of the authors' code: (whether on G(1, n), weight decay), bnDecay 0.25 and weightDecay 0.5."""
    if "conv" in name and shape[0] < math.prod(shape[1:]):
        return True, 0.0
    return False, 0.25 if "bn" in name or "bias" in name else 0.5


@pytest.mark.parametrize(
    ("network", "classes", "parameters", "layers"),
    [
        ("resnet --depth 16 --width 4", 10, 2_748_890, 13),
        ("resnet --depth 22 --width 8", 10, 17_158_106, 19),
        ("resnet --depth 28 --width 10", 10, 36_479_194, 24),
        ("resnet --depth 28 --width 10", 100, 36_536_884, 24),
        ("resnet --depth 40 --width 10", 10, 55_841_754, 36),
        ("vgg11", 10, 9_750_922, 7),
        ("vgg13", 10, 9_935_434, 9),
        ("vgg16", 10, 15_245_130, 12),
        ("vgg19", 10, 20_554_826, 15),
    ],
)
def test_parameters_and_their_groups(network, classes, parameters, layers):
    for method in METHODS:
        flags = f"--model {network} --optim_method {method} --bnDecay 0.25 --weightDecay 0.5"
        options, _ = parse_options(flags.split())
        with torch.device("meta"):  # shapes without numbers
            model = main.make_model(options, classes)
            optimizer = main.make_optimizer(model, options)
        named = dict(model.named_parameters())
        assert sum(p.numel() for p in named.values()) == parameters
        expected = {name: authors_group(name, p.shape) for name, p in named.items()}
        assert [on_manifold for on_manifold, _ in expected.values()].count(True) == layers
        if method == "SGD":  # the same decays, and the convolutions decay with the other weights
            expected = {name: (False, decay or 0.5) for name, (_, decay) in expected.items()}
        found = {}
        for group in optimizer.param_groups:
            found |= dict.fromkeys(group["params"], (group.get("grassmann", False), group["weight_decay"]))
        assert found == {p: expected[name] for name, p in named.items()}


# -------------------------------------------------------------------- the hyperparameters of both data sets

CIFAR = {"epochs": 200, "epoch_step": [60, 120, 160], "lr_decay_ratio": 0.2, "randomcrop_pad": 4}
SVHN = {"epochs": 160, "epoch_step": [60, 120], "lr_decay_ratio": 0.1, "randomcrop_pad": 0}
RATES = {  # lr, lrg (None: nothing is on G(1, n)), decay of BN and biases
    ("CIFAR10", "SGD"): (0.1, None, 5e-4),
    ("CIFAR10", "SGDG"): (0.01, 0.2, 0.0),
    ("CIFAR10", "AdamG"): (0.01, 0.05, 0.0),
    ("SVHN", "SGD"): (0.01, None, 5e-4),
    ("SVHN", "SGDG"): (0.001, 0.02, 0.0),
    ("SVHN", "AdamG"): (0.001, 0.005, 0.0),
}
RATES |= {("CIFAR100", method): RATES["CIFAR10", method] for method in METHODS}
MEAN_AND_STD = {  # of red, green and blue on 0..255; SVHN: x / 255
    "CIFAR10": ([125.3, 123.0, 113.9], [63.0, 62.1, 66.7]),
    "CIFAR100": ([129.3, 124.1, 112.4], [68.2, 65.4, 70.4]),
    "SVHN": ([0.0, 0.0, 0.0], [255.0, 255.0, 255.0]),
}


def write_images(dataset, root, monkeypatch):
    """A few random images as the data set's files; for SVHN returns them."""
    return write_svhn(root, monkeypatch) if dataset == "SVHN" else write_archive(dataset, root, monkeypatch)


@pytest.mark.parametrize(("dataset", "method"), RATES)
def test_hyperparameters_of_a_started_run(dataset, method, tmp_path, monkeypatch):
    write_images(dataset, tmp_path, monkeypatch)
    flags = ["--dataset", dataset, "--dataroot", tmp_path, "--optim_method", method, "--batchSize", 4]
    flags += ["--max_minutes", 1e-9, "--depth", 10, "--width", 1, "--save", tmp_path / "run"]
    assert call(*flags).code == 0
    state, (lr, lrg, bn_decay) = load(tmp_path / "run"), RATES[dataset, method]
    options = {"lr": lr, "lrg": lrg, "bn_decay": bn_decay, "momentum": 0.9, "weight_decay": 5e-4}
    options |= dict.fromkeys(("omega", "grad_clip"), None if method == "SGD" else 0.1)
    options |= SVHN | {"dropout": 0.4} if dataset == "SVHN" else CIFAR | {"dropout": 0.3}
    assert options.items() <= state["options"].items()
    sgd = {"lr": lr, "momentum": 0.9, "nesterov": True, "dampening": 0}
    groups = {"bn_bias": sgd | {"weight_decay": bn_decay}, "other": sgd | {"weight_decay": 5e-4}}
    if method != "SGD":
        rows = {"grassmann": True, "lr": lrg, "momentum": 0.9, "omega": 0.1, "grad_clip": 0.1}
        groups["grassmann"] = rows | ({"beta2": 0.99, "epsilon": 1e-8} if method == "AdamG" else {})
    used = {group["name"]: group for group in state["optimizer"]["param_groups"]}
    assert groups.keys() == used.keys()
    for name, group in groups.items():
        assert group.items() <= used[name].items(), name
    data = json.loads((tmp_path / "run" / "config.json").read_text())["data"]
    assert (data["mean"], data["std"]) == MEAN_AND_STD[dataset]


@pytest.mark.parametrize("dataset", MEAN_AND_STD)
def test_batch_size_and_the_dropout_of_vgg(dataset):
    assert parse_options(["--dataset", dataset])[0].batch_size == 128
    assert parse_options(["--dataset", dataset, "--model", "vgg19"])[0].dropout == 0


@pytest.mark.parametrize(("dataset", "method"), RATES)
def test_learning_rates_epoch_by_epoch(dataset, method, tmp_path, monkeypatch):
    write_images(dataset, tmp_path, monkeypatch)
    flags = f"--depth 10 --width 1 --dataset {dataset} --optim_method {method}"
    t = main.Training(parse_options(flags.split())[0], load_data(dataset, tmp_path))
    cifar, svhn = [0.2] * 60 + [0.04] * 40 + [0.008] * 40, [0.1] * 60 + [0.01] * 40
    factors = [1] * 60 + (svhn if dataset == "SVHN" else cifar)
    assert t.options.epochs == len(factors)
    lr, lrg, _ = RATES[dataset, method]
    for factor in factors:
        for group in t.optimizer.param_groups:
            assert group["lr"] == pytest.approx(factor * (lrg if group.get("grassmann") else lr), rel=1e-9)
        t.optimizer.step()
        t.schedule.step()


# --------------------------------------------------------------------------------------- the paper's tables

TABLES = """
CIFAR10   vgg-13     5.88  5.87  6.05
CIFAR10   vgg-19     6.49  5.92  6.02
CIFAR10   wrn-28-10  3.89  3.85  3.78
CIFAR10   wrn-40-10  3.72  3.72  3.80
CIFAR100  vgg-13    26.17 25.29 24.89
CIFAR100  vgg-19    27.62 25.79 25.59
CIFAR100  wrn-28-10 18.66 18.19 18.30
CIFAR100  wrn-40-10 18.39 18.04 17.85
SVHN      vgg-13     1.78  1.74  1.72
SVHN      vgg-19     1.94  1.81  1.77
SVHN      wrn-16-4   1.64  1.67  1.61
SVHN      wrn-22-8   1.64  1.63  1.55
"""  # test error in %, median of five runs: SGD, SGD-G, Adam-G


def test_the_tables_are_the_papers():
    rows = [line.split() for line in TABLES.split("\n") if line]
    expected = {(dataset, network): tuple(map(float, errors)) for dataset, network, *errors in rows}
    quoted = summarize.PAPER.items()
    assert {(name, network): e for name, paper in quoted for network, e in paper.errors.items()} == expected
    cifar, svhn = (200, [60, 120, 160], (50_000, 10_000)), (160, [60, 120], (604_388, 26_032))
    settings = {name: (paper.epochs, paper.epoch_step, paper.images) for name, paper in quoted}
    assert settings == {"CIFAR10": cifar, "CIFAR100": cifar, "SVHN": svhn}


# ------------------------------------------------------------------------------------------- the plain loop


def setting(method, **changes):
    """Flags and values of a run, none of them a default: one that was ignored would show in the weights."""
    flags = {"optim_method": method, "model": "resnet", "depth": 10, "width": 1, "dropout": 0.2, "seed": 7}
    flags |= {"batchSize": 12, "randomcrop_pad": 3, "epochs": 2, "epoch_step": [1], "lr_decay_ratio": 0.5}
    flags |= {"lr": 0.05, "lrg": 0.1, "momentum": 0.8, "weightDecay": 0.1, "bnDecay": 0.3}
    flags |= {"omega": 0.4, "grad_clip": 0.3}  # some rows' gradients are longer, some shorter
    return SimpleNamespace(**flags | changes)


def sgd_step(w, g, state, lr, momentum, decay):
    g = g + decay * w
    state["buffer"] = momentum * state.get("buffer", 0) + g
    return w - lr * (g + momentum * state["buffer"])  # Nesterov


def turn(y, d):
    """exp_y(d) of Eq. 7, and what translates a tangent vector along d, Eq. 8."""
    a = d.norm(dim=1, keepdim=True)
    u = d / a.clamp(min=1e-30)
    bend = y * a.sin() + u * (1 - a.cos())
    return y * a.cos() + u * a.sin(), lambda vector: vector - (u * vector).sum(1, keepdim=True) * bend


def grassmann_step(method, y, g, state, lr, momentum, nu):
    """Algorithm 1, SGD-G, and its sister Adam-G on the rows of y; g has the regularizer's part in it."""
    h = g - (y * g).sum(1, keepdim=True) * y  # Eq. 6
    h = h * (nu / h.norm(dim=1, keepdim=True)).clamp(max=1)
    if method == "SGDG":
        d = momentum * state.get("tau", 0) - lr * h
        y, translate = turn(y, d)
        state["tau"] = translate(d)
        return y
    t = state["t"] = state.get("t", 0) + 1
    m = momentum * state.get("m", 0) + (1 - momentum) * h
    state["v"] = 0.99 * state.get("v", 0) + 0.01 * (h * h).sum(1, keepdim=True)
    d = -lr * math.sqrt(1 - 0.99**t) / (1 - momentum**t) * m / (state["v"] + 1e-8).sqrt()
    y, translate = turn(y, d)
    state["m"] = translate(m)
    return y


def augmented(image, pad, offset, flip):
    top, left = offset
    padded = cv2.copyMakeBorder(image, pad, pad, pad, pad, cv2.BORDER_REFLECT_101)
    crop = padded[top : top + 32, left : left + 32]
    return cv2.flip(crop, 1) if flip else crop


def plain_loop(s, train, test, mean, std, flip):
    """Training, once more, on images (N, 32, 32, 3) in RGB and labels: the weights, and what is logged."""

    def inputs(images):
        x = (np.stack(list(images)) - np.float32(mean)) / np.float32(std)
        return torch.from_numpy(x).permute(0, 3, 1, 2)

    torch.manual_seed(s.seed)  # the same initial weights and, as both are stored NHWC, zeros of the dropout
    classes = len(set(train[1].tolist()))
    model = VGG(11, classes, s.dropout) if s.model == "vgg11" else WideResNet(10, 1, classes, s.dropout)
    named = dict(model.to(memory_format=torch.channels_last).named_parameters())
    undercomplete = {n: p for n, p in named.items() if "conv" in n and len(p) < p[0].numel()}
    rows = {} if s.optim_method == "SGD" else undercomplete  # the weights on G(1, n)
    for p in rows.values():
        p.data /= p.data.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
    lr, lrg, states, log = s.lr, s.lrg, {name: {} for name in named}, []
    for epoch in range(s.epochs):
        if epoch in s.epoch_step:
            lr, lrg = lr * s.lr_decay_ratio, lrg * s.lr_decay_ratio
        pad, losses, wrong = s.randomcrop_pad, [], 0
        plan = EpochPlan(len(train[1]), s.batchSize, seed=s.seed, epoch=epoch, pad=pad, flip=flip)
        model.train()
        for chosen, offsets, flips in zip(plan.order, plan.offsets, plan.flips, strict=True):
            images = map(augmented, train[0][chosen], [pad] * len(chosen), offsets, flips)
            labels = torch.from_numpy(train[1][chosen])
            logits = model(inputs(images))
            loss = cross_entropy(logits, labels)
            grams = [p.flatten(1) @ p.flatten(1).T for p in rows.values()]
            penalty = sum(s.omega / 2 * ((gram - torch.eye(len(gram))) ** 2).sum() for gram in grams)
            gradients = torch.autograd.grad(loss + penalty, named.values())
            for (name, p), g in zip(named.items(), gradients, strict=True):
                if name in rows:
                    y, g = p.data.flatten(1), g.flatten(1)
                    new = grassmann_step(s.optim_method, y, g, states[name], lrg, s.momentum, s.grad_clip)
                else:
                    decay = s.bnDecay if "bn" in name or "bias" in name else s.weightDecay
                    new = sgd_step(p.data, g, states[name], lr, s.momentum, decay)
                p.data.copy_(new.view(p.shape))
            losses.append(loss.item())
            wrong += (logits.argmax(1) != labels).sum().item()
        model.eval()
        with torch.no_grad():
            logits, labels = model(inputs(test[0])), torch.from_numpy(test[1])
        test_acc = 100 * (logits.argmax(1) == labels).double().mean().item()
        train_acc = 100 - 100 * wrong / plan.order.size
        log.append((np.mean(losses), train_acc, cross_entropy(logits, labels).item(), test_acc))
    return model.state_dict(), log


def assert_run_is_plain_loop(s, save, data_flags, *data):
    """The run ends with the loop's weights, to 1e-3 of a norm (but shifts), and its losses and errors."""
    outcome = call(*(f"--{name}={value}" for name, value in vars(s).items()), *data_flags, "--save", save)
    assert (outcome.code, outcome.err) == (0, "")
    state, log = plain_loop(s, *data)
    stored = load(save)["model"]
    assert stored.keys() == state.keys()
    for name, expected in state.items():
        # Shifts start at 0 and are nothing but a few gradients: where rounding decided whether a ReLU is
        # open, up to 3% of them went either way in VGG's last layers, 0.2% in the WRN.
        of_shifts = 0.1 if s.model == "vgg11" else 0.01
        tolerance = of_shifts if name.endswith("bias") else 1e-3
        assert (stored[name] - expected).double().norm() <= tolerance * expected.double().norm(), name
    names = ("train_loss", "train_acc", "test_loss", "test_acc")
    logged = [[epoch[name] for name in names] for epoch in log_lines(save)]
    np.testing.assert_allclose(logged, log, rtol=1e-3)


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """27 images to train, 18 to test: noise, each channel at a level of its own. As files and as arrays."""
    root, rng, parts = tmp_path_factory.mktemp("images"), np.random.default_rng(0), []
    for part, count in (("train", 9), ("test", 6)):
        labels = np.repeat(np.arange(3), count)
        images = rng.integers([0, 90, 20], [256, 150, 60], (3 * count, 32, 32, 3)).astype(np.uint8)
        images[..., 1] += 40 * labels[:, None, None].astype(np.uint8)
        for i, (image, label) in enumerate(zip(images, labels, strict=True)):
            path = root / part / str(label) / f"{i:02}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            cv2.imwrite(str(path), image[..., ::-1])  # OpenCV's order is BGR
        parts.append((images, labels))
    pixels = parts[0][0].reshape(-1, 3).astype(float)
    return ["--dataset", "folder", "--dataroot", root], *parts, pixels.mean(0), pixels.std(0), True


@pytest.mark.parametrize("epoch_step", [[1], []])  # finished epochs after which the learning rates drop
@pytest.mark.parametrize("method", METHODS)
def test_a_run_of_a_wrn_is_the_plain_loop(method, epoch_step, images, tmp_path):
    assert_run_is_plain_loop(setting(method, epoch_step=epoch_step), tmp_path / "run", *images)


@pytest.mark.parametrize("method", METHODS)
def test_a_run_of_a_vgg_is_the_plain_loop(method, images, tmp_path):
    slow = setting(method, model="vgg11", batchSize=20, lr=0.002, lrg=0.004)
    assert_run_is_plain_loop(slow, tmp_path / "run", *images)


def test_a_run_on_svhn_is_the_plain_loop_without_augmentation(tmp_path, monkeypatch):
    content = write_images("SVHN", tmp_path, monkeypatch)
    parts = {name: (x.transpose(3, 0, 1, 2), y[:, 0].astype(int) % 10) for name, (x, y) in content.items()}
    train = [np.concatenate(pair) for pair in zip(parts["train"], parts["extra"], strict=True)]
    flags = ["--dataset", "SVHN", "--dataroot", tmp_path]
    s = setting("SGDG", randomcrop_pad=0)
    assert_run_is_plain_loop(s, tmp_path / "run", flags, train, parts["test"], 0, 255, False)
