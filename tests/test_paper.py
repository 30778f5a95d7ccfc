"""What the paper and the authors' code say, in numbers, held against what a run does.

Read this file first. Nothing expected here comes from the code under test: numbers are literal, and `plain_loop` is the
whole training once more, in plain PyTorch. In this order: one step of each method by hand; which weights are on
G(1, n); the hyperparameters and the learning rates epoch by epoch; the paper's tables; a run beside the plain loop.
"""

import json
import math
from dataclasses import dataclass, field

import cv2
import numpy as np
import pytest
import summarize
import torch
from helpers import METHODS, call, load, log_lines, write_archive, write_svhn
from torch.nn.functional import cross_entropy

import main
from data import EpochPlan
from grassmann_optimizer import SGDG, AdamG
from main import parse_options
from resnet import WideResNet
from vgg import VGG

# ------------------------------------------------------------------------------------------- one step, by hand


def step(method, y, g, state=None, **options):
    """The weight and its state after one step from y with gradient g, as lists rounded to six digits."""
    p = torch.nn.Parameter(torch.tensor(y, dtype=torch.float64))
    p.grad = torch.tensor(g, dtype=torch.float64)
    optimizer = method([p], grassmann=True, **options)
    optimizer.state[p] = {name: torch.tensor(value, dtype=torch.float64) for name, value in (state or {}).items()}
    optimizer.step()
    after = optimizer.state[p]
    tensors = [p.detach(), after["momentum_buffer"], *([after["second_moment"]] if method is AdamG else [])]
    return [(t.round(decimals=6) + 0.0).tolist() for t in tensors]


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
    # Across the rows: h = (0, 0.48, 0) and 0.48 (0.8, -0.6, 0). Each row turns by 0.48, away from the other one:
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
    # h = (0, 0, 0.16); m = 0.5 (0, 0.12, 0) + 0.5 h = 0.1 (0, 0.6, 0.8); v = 0.75 * 0.0048 + 0.25 * 0.0256 = 0.01.
    # sqrt(1 - 0.75^2) / (1 - 0.5^2) = 0.881917, so d = -0.5 * 0.881917 (0, 0.6, 0.8): an angle of 0.440959,
    # cos 0.904343, sin 0.426807.
    before = {"momentum_buffer": [[0.0, 0.12, 0.0]], "second_moment": [[0.0048]], "step": 1.0}
    options = {"lr": 0.5, "momentum": 0.5, "beta2": 0.75, "epsilon": 1e-12}
    y, m, v = step(AdamG, [[1.0, 0.0, 0.0]], [[0.3, 0.0, 0.16]], before, **options)
    assert y == [[0.904343, -0.256084, -0.341445]]
    assert m == [[0.042681, 0.054261, 0.072347]]
    assert v == [[0.01]]


# ----------------------------------------------------------------------------------- which weights are on G(1, n)


def authors_group(name, shape):
    """The rule of the authors' code, by name and shape: (on G(1, n), weight decay) with the decays of `groups`."""
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
        groups = {p: (g.get("grassmann", False), g["weight_decay"]) for g in optimizer.param_groups for p in g["params"]}
        assert {name: groups[p] for name, p in named.items()} == expected
        assert len(groups) == len(named)


# ------------------------------------------------------------------- the hyperparameters of both data sets

PAPER = {  # lr, lrg (None: nothing is on G(1, n)), decay of BN and biases
    ("CIFAR10", "SGD"): (0.1, None, 5e-4),
    ("CIFAR10", "SGDG"): (0.01, 0.2, 0.0),
    ("CIFAR10", "AdamG"): (0.01, 0.05, 0.0),
    ("SVHN", "SGD"): (0.01, None, 5e-4),
    ("SVHN", "SGDG"): (0.001, 0.02, 0.0),
    ("SVHN", "AdamG"): (0.001, 0.005, 0.0),
}
PAPER.update({("CIFAR100", method): PAPER["CIFAR10", method] for method in METHODS})
MEAN_AND_STD = {  # of red, green and blue on 0..255; SVHN: x / 255
    "CIFAR10": ([125.3, 123.0, 113.9], [63.0, 62.1, 66.7]),
    "CIFAR100": ([129.3, 124.1, 112.4], [68.2, 65.4, 70.4]),
    "SVHN": ([0.0, 0.0, 0.0], [255.0, 255.0, 255.0]),
}


@pytest.fixture
def run(tmp_path, monkeypatch):
    """run(dataset, method, *flags): a small network on a few random pictures; returns the run's directory."""

    def start(dataset, method, *flags):
        (write_svhn(tmp_path, monkeypatch) if dataset == "SVHN" else write_archive(dataset, tmp_path, monkeypatch))
        save = tmp_path / "run"
        network = ["--depth", 10, "--width", 1, "--batchSize", 4]
        data = ["--dataset", dataset, "--dataroot", tmp_path, "--save", save]
        assert call(*network, *data, "--optim_method", method, *flags).code == 0
        return save

    return start


@pytest.mark.parametrize(("dataset", "method"), PAPER)
def test_hyperparameters_of_a_started_run(dataset, method, run):
    lr, lrg, bn_decay = PAPER[dataset, method]
    save = run(dataset, method, "--max_minutes", 1e-9)  # one step
    state = load(save)
    schedule = (160, [60, 120], 0.1) if dataset == "SVHN" else (200, [60, 120, 160], 0.2)
    omega = grad_clip = None if method == "SGD" else 0.1
    options = {
        **dict(zip(("epochs", "epoch_step", "lr_decay_ratio"), schedule, strict=True)),
        **{"lr": lr, "lrg": lrg, "momentum": 0.9, "weight_decay": 5e-4, "bn_decay": bn_decay},
        **{"omega": omega, "grad_clip": grad_clip, "dtype": "float32", "holdout": 0},
        **{"dropout": 0.4 if dataset == "SVHN" else 0.3, "randomcrop_pad": 0 if dataset == "SVHN" else 4},
    }
    assert options.items() <= state["options"].items()
    euclidean = {"lr": lr, "momentum": 0.9, "nesterov": True, "dampening": 0}
    groups = {
        "bn/bias": {**euclidean, "weight_decay": bn_decay},
        "other": {**euclidean, "weight_decay": 5e-4},
    }
    if method != "SGD":
        adam = {"beta2": 0.99, "epsilon": 1e-8} if method == "AdamG" else {}
        grassmann = {"grassmann": True, "lr": lrg, "momentum": 0.9, "omega": 0.1, "grad_clip": 0.1}
        groups["on G(1,n)"] = {**grassmann, "weight_decay": 0, **adam}
    used = {group["name"]: group for group in state["optimizer"]["param_groups"]}
    assert groups.keys() == used.keys()
    for name, group in groups.items():
        assert group.items() <= used[name].items(), name
    config = json.loads((save / "config.json").read_text())
    assert (config["data"]["mean"], config["data"]["std"]) == MEAN_AND_STD[dataset]


@pytest.mark.parametrize("dataset", MEAN_AND_STD)
def test_batch_size_and_the_dropout_of_vgg(dataset):
    assert parse_options(["--dataset", dataset])[0].batch_size == 128
    assert parse_options(["--dataset", dataset, "--model", "vgg19"])[0].dropout == 0


@pytest.mark.parametrize(
    ("dataset", "method", "rates"),  # lr and lrg, how many epochs
    [
        ("CIFAR10", "SGDG", [(0.01, 0.2, 60), (0.002, 0.04, 60), (0.0004, 0.008, 40), (0.00008, 0.0016, 40)]),
        ("SVHN", "AdamG", [(0.001, 0.005, 60), (0.0001, 0.0005, 60), (0.00001, 0.00005, 40)]),
    ],
)
def test_learning_rates_epoch_by_epoch(dataset, method, rates, run):
    log = log_lines(run(dataset, method, "--batchSize", 20))
    expected = [pair for *pair, epochs in rates for _ in range(epochs)]
    np.testing.assert_allclose([(epoch["lr"], epoch["lrg"]) for epoch in log], expected, rtol=1e-9)


# ------------------------------------------------------------------------------------------- the paper's tables

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


# -------------------------------------------------------------------------------------------- the plain loop


@dataclass
class Setting:
    """A run with no value that is a default: one left unused by the program shows in every weight."""

    method: str
    network: str = "resnet"
    drops: list = field(default_factory=lambda: [1, 2])  # the epochs, counted from 0, that start at lower rates
    seed: int = 7
    epochs: int = 3
    batch: int = 16
    lr: float = 0.05
    lrg: float = 0.3
    ratio: float = 0.5
    momentum: float = 0.8
    weight_decay: float = 0.1
    bn_decay: float = 0.3
    omega: float = 0.4
    grad_clip: float = 0.5
    dropout: float = 0.2
    pad: int = 3

    def flags(self):
        network = ["--depth", 10, "--width", 1] if self.network == "resnet" else []
        grassmann = ["--lrg", self.lrg, "--omega", self.omega, "--grad_clip", self.grad_clip]
        return [
            *["--model", self.network, *network, "--dropout", self.dropout, "--optim_method", self.method],
            *["--seed", self.seed, "--epochs", self.epochs, "--epoch_step", self.drops, "--lr_decay_ratio", self.ratio],
            *["--batchSize", self.batch, "--randomcrop_pad", self.pad, "--lr", self.lr, "--momentum", self.momentum],
            *["--weightDecay", self.weight_decay, "--bnDecay", self.bn_decay],
            *(grassmann if self.method != "SGD" else []),
        ]


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


def augmented(image, pad, top, left, flip):
    padded = cv2.copyMakeBorder(image, pad, pad, pad, pad, cv2.BORDER_REFLECT_101)
    crop = padded[top : top + 32, left : left + 32]
    return cv2.flip(crop, 1) if flip else crop


def plain_loop(train, test, mean, std, flip, s):
    """Training, once more. train, test: images (N, 32, 32, 3) RGB and labels. Returns weights and epochs' statistics."""

    def inputs(images):
        return torch.from_numpy(((np.stack(images) - mean) / std).astype(np.float32)).permute(0, 3, 1, 2)

    torch.manual_seed(s.seed)  # the same initial weights and, if stored in the same order, zeros of the dropout
    classes = len(set(train[1].tolist()))
    model = WideResNet(10, 1, classes, s.dropout) if s.network == "resnet" else VGG(11, classes, s.dropout)
    model.to(memory_format=torch.channels_last)
    named, states = dict(model.named_parameters()), {}
    rows = {n: p for n, p in named.items() if "conv" in n and p.shape[0] < p[0].numel() and s.method != "SGD"}
    for p in rows.values():
        p.data /= p.data.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
    lr, lrg, epochs = s.lr, s.lrg, []
    for epoch in range(s.epochs):
        if epoch in s.drops:
            lr, lrg = lr * s.ratio, lrg * s.ratio
        plan = EpochPlan(len(train[1]), s.batch, seed=s.seed, epoch=epoch, pad=s.pad, flip=flip)
        losses, wrong = [], 0
        model.train()
        for order, offsets, flips in zip(plan.order, plan.offsets, plan.flips, strict=True):
            choices = zip(order, offsets, flips, strict=True)
            x = inputs([augmented(train[0][i], s.pad, *offset, flipped) for i, offset, flipped in choices])
            labels = torch.from_numpy(train[1][order])
            logits = model(x)
            loss = cross_entropy(logits, labels)
            gram_errors = [p.flatten(1) @ p.flatten(1).T - torch.eye(len(p)) for p in rows.values()]
            penalty = sum(s.omega / 2 * (error**2).sum() for error in gram_errors)
            gradients = torch.autograd.grad(loss + penalty, named.values())
            for (name, p), g in zip(named.items(), gradients, strict=True):
                state = states.setdefault(name, {})
                if name in rows:
                    y = grassmann_step(s.method, p.data.flatten(1), g.flatten(1), state, lrg, s.momentum, s.grad_clip)
                    p.data.copy_(y.view(p.shape))
                else:
                    decay = s.bn_decay if "bn" in name or "bias" in name else s.weight_decay
                    p.data.copy_(sgd_step(p.data, g, state, lr, s.momentum, decay))
            losses.append(loss.item())
            wrong += (logits.argmax(1) != labels).sum().item()
        model.eval()
        with torch.no_grad():
            logits, labels = model(inputs(test[0])), torch.from_numpy(test[1])
        right = (logits.argmax(1) == labels).double().mean().item()
        train_acc = 100 - 100 * wrong / plan.order.size
        epochs.append((np.mean(losses), train_acc, cross_entropy(logits, labels).item(), 100 * right))
    return model.state_dict(), epochs


def assert_same_training(save, state, epochs):
    """The run ended with these weights, each tensor to 1e-3 of its norm, and logged these losses and errors."""
    stored = load(save)["model"]
    assert stored.keys() == state.keys()
    for name, expected in state.items():
        difference = (stored[name].double() - expected.double()).norm()
        assert difference <= 1e-3 * expected.double().norm(), name
    logged = [[e[key] for key in ("train_loss", "train_acc", "test_loss", "test_acc")] for e in log_lines(save)]
    np.testing.assert_allclose(logged, epochs, rtol=1e-3)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """48 pictures to train, 18 to test, 3 classes, noise of another mean and deviation in each channel; their folder."""
    root, rng, parts = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0), []
    for part, count in (("train", 16), ("test", 6)):
        labels = np.repeat(np.arange(3), count)
        images = rng.integers([0, 90, 20], [256, 150, 60], (3 * count, 32, 32, 3)).astype(np.uint8)
        images[..., 1] += 40 * labels[:, None, None].astype(np.uint8)
        for i, (image, label) in enumerate(zip(images, labels, strict=True)):
            (root / part / str(label)).mkdir(parents=True, exist_ok=True)
            cv2.imwrite(str(root / part / str(label) / f"{i:02}.png"), image[..., ::-1])  # OpenCV's order is BGR
        parts.append((images, labels))
    return root, *parts


@pytest.mark.parametrize("network", ["resnet", "vgg11"])
@pytest.mark.parametrize("drops", [[1, 2], []])
@pytest.mark.parametrize("method", METHODS)
def test_a_run_is_the_plain_loop(method, drops, network, pictures, tmp_path):
    setting = Setting(method, network, drops)
    root, train, test = pictures
    outcome = call("--dataset", "folder", "--dataroot", root, "--save", tmp_path / "run", *setting.flags())
    assert (outcome.code, outcome.err) == (0, "")
    pixels = train[0].reshape(-1, 3).astype(float)
    assert_same_training(tmp_path / "run", *plain_loop(train, test, pixels.mean(0), pixels.std(0), True, setting))


def test_a_run_on_svhn_is_the_plain_loop_without_augmentation(tmp_path, monkeypatch):
    content = write_svhn(tmp_path, monkeypatch)
    (train, extra, test) = ((x.transpose(3, 0, 1, 2), y[:, 0].astype(int) % 10) for x, y in
        (content["train"], content["extra"], content["test"]))
    both = tuple(np.concatenate(pair) for pair in zip(train, extra, strict=True))
    setting = Setting("SGDG", pad=0)
    outcome = call("--dataset", "SVHN", "--dataroot", tmp_path, "--save", tmp_path / "run", *setting.flags())
    assert (outcome.code, outcome.err) == (0, "")
    assert_same_training(tmp_path / "run", *plain_loop(both, test, 0, 255, False, setting))
