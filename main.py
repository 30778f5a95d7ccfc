"""Train Wide ResNet or VGG with SGD, SGD-G or Adam-G, as in "Riemannian approach to batch normalization" (NIPS 2017).

    python main.py --depth 28 --width 10 --dataset CIFAR10 --optim_method SGDG

Read from the top: the paper's hyperparameters, the command line, model and optimizer, one epoch, the run.
"""

# ruff: noqa: E402
import time

PROCESS_START = time.monotonic()  # --max_minutes counts from here: importing torch takes seconds

import argparse
import contextlib
import copy
import json
import math
import os
import platform
import re
import shlex
import signal
import subprocess
import sys
import textwrap
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import cv2
import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from data import DataSet, EpochPlan, TrainBatches, eval_batches, hold_out, load_data
from grassmann_optimizer import SGDG, AdamG, grassmann_param_groups, orthogonality_gradient, project, unit
from resnet import WideResNet, blocks_per_group
from utils import (
    CHECKPOINT,
    CONFIG,
    LOG,
    RunLog,
    StopRequest,
    UsageError,
    UserError,
    generator_states,
    load_checkpoint,
    lock_directory,
    save_checkpoint,
    set_generator_states,
    write_json,
)
from vgg import VGG

# The paper's hyperparameters. An option that is not given takes its value from here.
PROTOCOLS = {
    "CIFAR": {
        "common": {"epochs": 200, "epoch_step": [60, 120, 160], "lr_decay_ratio": 0.2, "randomcrop_pad": 4},
        "dropout": {"resnet": 0.3},  # of other models: 0
        "SGD": {"lr": 0.1, "lrg": None, "bn_decay": 5e-4},
        "SGDG": {"lr": 0.01, "lrg": 0.2, "bn_decay": 0.0},
        "AdamG": {"lr": 0.01, "lrg": 0.05, "bn_decay": 0.0},
    },
    "SVHN": {
        "common": {"epochs": 160, "epoch_step": [60, 120], "lr_decay_ratio": 0.1, "randomcrop_pad": 0},
        "dropout": {"resnet": 0.4},
        "SGD": {"lr": 0.01, "lrg": None, "bn_decay": 5e-4},
        "SGDG": {"lr": 0.001, "lrg": 0.02, "bn_decay": 0.0},
        "AdamG": {"lr": 0.001, "lrg": 0.005, "bn_decay": 0.0},
    },
}
PROTOCOL_OF = {"CIFAR10": "CIFAR", "CIFAR100": "CIFAR", "SVHN": "SVHN", "digits": "CIFAR", "folder": "CIFAR"}


def paper_values(model: str, dataset: str, method: str) -> dict:
    """The paper's learning rates, decay of BN and biases, dropout, schedule and augmentation."""
    protocol = PROTOCOLS[PROTOCOL_OF[dataset]]
    return {**protocol["common"], "dropout": protocol["dropout"].get(model, 0.0), **protocol[method]}


# ------------------------------------------------------------------------------------------------ command line

DEFAULTS = {
    "model": "resnet",
    "depth": 28,
    "width": 10,
    "dataset": "CIFAR10",
    "dataroot": "./data",
    "dataset_name": None,
    "holdout": 0,
    "nthread": 1,
    "optim_method": "SGD",
    "batch_size": 128,
    "momentum": 0.9,
    "weight_decay": 5e-4,
    "omega": 0.1,
    "grad_clip": 0.1,
    "select": "shape",
    "seed": 0,
    "device": "auto",
    "dtype": "float32",
    "compile": False,
}
VGGS = {f"vgg{depth}": depth for depth in (11, 13, 16, 19)}
# Options of one call, not of the run: never taken from a checkpoint.
PER_CALL = {"save": None, "resume": None, "eval": False, "summary": False, "max_minutes": None}
# What may change when a run is resumed.
MAY_CHANGE = {"epochs", "nthread", "device", "dataroot", "compile"}
# Flags of the authors' script without a meaning of their own any more, with the one value that changes nothing.
LEGACY = {
    "gpu_id": ("0", "to train on another GPU, set the environment variable CUDA_VISIBLE_DEVICES"),
    "ngpu": ("1", "a run uses one GPU; run several seeds or methods at once, each with its own CUDA_VISIBLE_DEVICES"),
    "groups": ("1", "the paper's networks have no grouped convolutions; leave it out"),
}


class Parser(argparse.ArgumentParser):
    """argparse that answers a mistake by one sentence instead of a page of usage."""

    def error(self, message: str):
        raise UsageError(f"{message} (python main.py --help lists all flags)")


def number(kind: type, low: float, high: float = math.inf, *, exclusive: bool = False):
    """An argparse type: a finite int or float from low (itself allowed unless `exclusive`) to below high."""
    what = "a whole number" if kind is int else "a number"
    bound = f"{'above' if exclusive else 'of at least'} {low}" + ("" if high == math.inf else f" and below {high}")

    def parse(text: str):
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not (low < value < high or (value == low and not exclusive)):
            raise argparse.ArgumentTypeError(f"must be {what} {bound}, got {text!r}")
        return value

    return parse


def clip_threshold(text: str) -> float | None:
    """An argparse type: a positive number; 0 or none: no clipping."""
    return None if text.lower() == "none" else number(float, 0)(text) or None


def epoch_list(text: str) -> list[int]:
    """An argparse type: '[60,120,160]'."""
    try:
        epochs = json.loads(text)
    except (ValueError, RecursionError):  # no JSON, a number of thousands of digits, brackets without end
        epochs = None
    if (
        not isinstance(epochs, list)
        or any(type(e) is not int or e < 1 for e in epochs)
        or epochs != sorted(set(epochs))
    ):
        raise argparse.ArgumentTypeError(f"must be a list of rising epochs such as '[60,120,160]', got {text!r}")
    return epochs


def non_empty(text: str) -> str:
    """An argparse type: a shell variable that was never set is no path."""
    if not text:
        raise argparse.ArgumentTypeError("must not be empty")
    return text


def precision(text: str) -> str:
    """An argparse type: the authors' script says `float`."""
    return "float32" if text == "float" else text


def default_text(option: str) -> str:
    """The default of an option, for --help: from DEFAULTS, or the paper's for each method or data set."""
    if option in DEFAULTS:
        value = DEFAULTS[option]
        return "off" if value is False else str(value)
    texts = []
    for name, protocol in PROTOCOLS.items():
        if option in protocol["SGD"]:
            rates = ((method, protocol[method][option]) for method in ("SGD", "SGDG", "AdamG"))
            texts.append(f"{name}: " + ", ".join(f"{method} {rate}" for method, rate in rates if rate is not None))
        else:
            value = {**protocol, **protocol["common"]}[option]
            texts.append(f"{name}: {value}".replace("{", "").replace("}", "").replace("'", ""))
    return "the paper's, " + "; ".join(texts)


def make_parser() -> argparse.ArgumentParser:
    """All flags. None has a default here: what is not given comes from a checkpoint, the paper or DEFAULTS."""
    parser = Parser(
        description=__doc__.split("\n\n")[0],
        epilog="Without flags this is the paper's SGD baseline, WRN-28-10 on CIFAR-10.",
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    rate = number(float, 0)

    def flag(*names: str, help: str, default: str | None = None, **kwargs) -> None:
        action = group.add_argument(*names, help=help, **kwargs)
        action.help += f" (default: {default or default_text(action.dest)})"

    group = parser.add_argument_group("model")
    flag("--model", choices=["resnet", *VGGS], help="network")
    flag("--depth", type=number(int, 1), help="depth 6n+4 of a Wide ResNet")
    flag("--width", type=number(int, 1), help="its widening factor")
    flag("--dropout", type=number(float, 0, 1), help="between a block's two convolutions; VGG: after each pool")

    group = parser.add_argument_group("data")
    flag("--dataset", choices=list(PROTOCOL_OF), help="CIFAR and SVHN are downloaded; digits needs no network")
    flag("--dataroot", help="where data sets are; for folder it holds train/CLASS/*.png and test/...")
    flag("--dataset_name", default="folder", help="what a folder is called in logs")
    flag("--randomcrop_pad", type=number(int, 0, 32), help="reflected border before the random crop, in pixels")
    flag("--holdout", type=number(int, 0), help="test on so many training pictures instead, to choose hyperparameters")
    flag("--nthread", type=number(int, 0), help="threads that prepare batches; 0: none of their own")

    group = parser.add_argument_group("optimization")
    flag("--optim_method", choices=["SGD", "SGDG", "AdamG"], help="optimizer")
    flag("--batchSize", "--batch_size", dest="batch_size", type=number(int, 1), help="pictures in a step")
    flag("--lr", type=rate, help="learning rate of everything that is not on G(1,n)")
    flag("--lrg", type=rate, help="learning rate on G(1,n)")
    flag("--momentum", type=number(float, 0, 1), help="of SGD and SGD-G; beta1 of Adam-G")
    flag("--weightDecay", "--weight_decay", dest="weight_decay", type=rate, help="of other weights")
    flag("--bnDecay", "--bn_decay", dest="bn_decay", type=rate, help="weight decay of BN and biases")
    flag("--omega", type=rate, help="orthogonality regularizer on G(1,n)")
    flag("--grad_clip", type=clip_threshold, help="norm clipping on G(1,n); 0 or none: off")
    flag("--select", choices=["shape", "measured"], help="weights on G(1,n): the paper's rule, or the scale-invariant")
    flag("--epochs", type=number(int, 1), help="epochs in all")
    flag("--epoch_step", type=epoch_list, help="finished epochs after which the learning rates drop, as '[60,120]'")
    flag("--lr_decay_ratio", type=number(float, 0, exclusive=True), help="factor of a drop")

    group = parser.add_argument_group("run")
    save = "logs/<dataset>/<model>/<method>/seed<k>"
    flag("--save", type=non_empty, default=save, help="the run's directory")
    flag(
        "--resume",
        type=non_empty,
        metavar="DIR",
        default="none",
        help="continue the run in DIR, or a file; auto: that in --save, if any",
    )
    flag("--eval", action="store_true", default="off", help="evaluate the checkpoint that --resume names; no training")
    flag("--summary", action="store_true", default="off", help="print parameters, groups, multiply-adds, and exit")
    flag("--seed", type=number(int, 0, 2**63), help="of weights, dropout, data order and augmentation")
    flag("--device", choices=["auto", "cpu", "cuda"], help="auto takes a GPU where there is one")
    flag("--dtype", type=precision, choices=["float32", "bfloat16", "float16"], help="precision of autocast")
    flag("--compile", action="store_true", help="torch.compile the model")
    flag("--max_minutes", type=number(float, 0, exclusive=True), default="none", help="then stop, ready to be resumed")

    group = parser.add_argument_group("flags of the authors' script, accepted where they change nothing")
    group.add_argument("--cuda", action="store_true", help="now --device cuda")
    for name, (_, way) in LEGACY.items():
        group.add_argument(f"--{name}", help=way)
    return parser


def parse_options(argv: list[str] | None, again: bool = False) -> tuple[argparse.Namespace, dict | None]:
    """Options of the run, and the checkpoint to start from, if any.

    An option that was not given is the checkpoint's; without one, the paper's or DEFAULTS'. One that has no effect is
    named, but not `again`.

    Raises:
        UsageError: a flag or value that is not accepted, or one that differs from the checkpoint's.
    """
    given = vars(make_parser().parse_args(argv))
    check_legacy_flags(given)
    call = {name: given.pop(name, default) for name, default in PER_CALL.items()}
    options = fill_in(given)
    if call["save"] is None and call["resume"] in (None, "auto"):
        call["save"] = default_save(options)
    call["save"] = call["save"] and Path(call["save"])

    checkpoint = None
    if call["resume"]:
        path = call["save"] if call["resume"] == "auto" else Path(call["resume"])
        path = path / CHECKPOINT if path.is_dir() or call["resume"] == "auto" else path
        if path.exists() or call["resume"] != "auto":
            checkpoint = load_checkpoint(path)
            options = continue_with(given, checkpoint["options"], path)
            call["save"] = call["save"] or path.parent
        elif stored := finished_options(path.parent):
            options = continue_with(given, stored, path.with_name(CONFIG))
            if options["epochs"] != stored["epochs"]:
                raise UsageError(f"{path.parent} has no checkpoint any more to go on from; choose another --save")
    if call["eval"] and checkpoint is None:
        raise UsageError("--eval needs a checkpoint; name its run directory with --resume DIR")
    check_options(options)
    unused = [f"--{name}" for name in given if options[name] is None and given[name] is not None]
    if unused and not again:
        text = f"note: {', '.join(unused)} has no effect on {model_name(options)} with {options['optim_method']}"
        print(text, flush=True)  # ahead of what may go to standard error, where both go to one file
    return argparse.Namespace(**options, **call), checkpoint


def finished_options(save: Path) -> dict | None:
    """The options of a run in `save` that has logged all its epochs; None where there is no such run."""
    try:
        options = json.loads((save / CONFIG).read_text())["options"]
        return options if (save / LOG).read_text().count("\n") == options["epochs"] else None
    except (OSError, ValueError, KeyError, TypeError):  # TypeError: JSON of another kind
        return None


def check_legacy_flags(given: dict) -> None:
    """Take the flags that only the authors' script has out of `given`; UsageError where one would change something."""
    if given.pop("cuda", False) and (given.get("device") == "cpu" or not torch.cuda.is_available()):
        raise UsageError(
            "--cuda: there is no CUDA device to use; leave it out (--device auto takes a GPU where there is one)"
        )
    for flag, (harmless, way) in LEGACY.items():
        if (value := given.pop(flag, harmless)) != harmless:
            raise UsageError(f"--{flag} {value} has no meaning here: {way}")


def fill_in(given: dict) -> dict:
    """The given options, with the paper's values and DEFAULTS for the rest."""
    options = {**DEFAULTS, **given}
    options = {**options, **paper_values(options["model"], options["dataset"], options["optim_method"]), **given}
    return without_unused(options)


def without_unused(options: dict) -> dict:
    """None for what a method or model has no use for, so that no two equal runs look different."""
    unused = ("lrg", "omega", "grad_clip", "select") if options["optim_method"] == "SGD" else ()
    unused += ("depth", "width") if options["model"] in VGGS else ()
    return {name: None if name in unused else value for name, value in options.items()}


def continue_with(given: dict, stored: dict, path: Path) -> dict:
    """The checkpoint's options, with those given that may change on the way; UsageError for any other difference."""
    if odd := stored.keys() ^ fill_in({}).keys():
        raise UserError(f"{path} is of another version of main.py, whose options differ in {', '.join(sorted(odd))}")
    given = {name: value for name, value in without_unused({**stored, **given}).items() if name in given}
    for name, value in given.items():
        if name not in MAY_CHANGE and value != stored[name]:
            raise UsageError(
                f"--{name} {value} differs from {stored[name]} of {path}; leave it out, or start a new run"
            )
    return {**stored, **given}


def check_options(options: dict) -> None:
    """What no single flag can tell; UsageError."""
    if options["device"] == "cuda" and not torch.cuda.is_available():
        raise UsageError(
            "--device cuda: no CUDA device is available; use --device cpu, or check the driver with nvidia-smi"
        )
    if options["dtype"] == "float16" and choose_device(options["device"]).type == "cpu":
        raise UsageError("--dtype float16 needs a GPU (it crawls on the CPU); use float32 or bfloat16")
    if options["model"] in VGGS and options["batch_size"] == 1:
        raise UsageError("--batchSize 1: VGG normalizes each feature over the batch; use at least 2")
    try:
        if options["model"] == "resnet":
            blocks_per_group(options["depth"])
    except ValueError as error:
        raise UsageError(f"--depth: {error}") from error


def data_name(options: dict) -> str:
    """What logs call the data set."""
    return options["dataset_name"] or options["dataset"] if options["dataset"] == "folder" else options["dataset"]


def model_name(options: dict) -> str:
    """As the paper says it: wrn-28-10, vgg-13."""
    if options["model"] in VGGS:
        return f"vgg-{VGGS[options['model']]}"
    return f"wrn-{options['depth']}-{options['width']}"


def default_save(options: dict) -> Path:
    """logs/<dataset>/<model>/<method>/seed<k>."""
    dataset = re.sub(r"[^\w.-]+", "-", data_name(options))
    return Path("logs", dataset, model_name(options), options["optim_method"], f"seed{options['seed']}")


def choose_device(name: str) -> torch.device:
    """The device that --device names; auto: a GPU where there is one."""
    return torch.device("cuda" if name == "cuda" or (name == "auto" and torch.cuda.is_available()) else "cpu")


# ----------------------------------------------------------------------------- model, optimizer, what is measured


def make_model(options: argparse.Namespace, classes: int) -> nn.Module:
    """The network that --model names."""
    if options.model in VGGS:
        return VGG(VGGS[options.model], classes, options.dropout)
    return WideResNet(options.depth, options.width, classes, options.dropout)


def random_loss(model: nn.Module) -> Tensor:
    """The loss of random pictures with random labels: which weights are scale-invariant does not depend on them."""
    x = torch.randn(64, 3, 32, 32, device=next(model.parameters()).device)
    logits = model(x)
    return cross_entropy(logits, torch.randint(logits.shape[1], (len(x),), device=x.device))


def make_optimizer(model: nn.Module, options: argparse.Namespace) -> torch.optim.Optimizer:
    """The method's optimizer over the paper's parameter groups; sets the Grassmann weights to unit rows."""
    if options.optim_method == "SGD":
        params = [p for p in model.parameters() if p.requires_grad]
        groups = [
            {"params": [p for p in params if p.ndim < 2], "weight_decay": options.bn_decay, "name": "bn/bias"},
            {"params": [p for p in params if p.ndim >= 2], "weight_decay": options.weight_decay, "name": "other"},
        ]
        momentum = options.momentum
        return torch.optim.SGD(groups, lr=options.lr, momentum=momentum, nesterov=momentum > 0)
    groups = grassmann_param_groups(
        model,
        options.lr,
        options.lrg,
        momentum=options.momentum,
        omega=options.omega,
        grad_clip=options.grad_clip,
        weight_decay=options.weight_decay,
        bn_decay=options.bn_decay,
        select=options.select,
        loss_fn=random_loss if options.select == "measured" else None,
    )
    return {"SGDG": SGDG, "AdamG": AdamG}[options.optim_method](groups)


class GrassmannProbe:
    """What a step does on G(1,n), layer by layer: angle moved, share of rows clipped, |cos| between different rows.

    Sits on the optimizer's step hooks and measures the steps before which `active` is set. Sums stay on the device. For
    SGD, which has nothing on G(1,n), it takes the directions of the layers that the paper's rule would put there.
    """

    NAMES = ("angle_degrees", "clipped_share", "row_cosine")

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer, device: torch.device):
        group_of = {p: group for group in optimizer.param_groups if group.get("grassmann") for p in group["params"]}
        names = {p: name for name, p in model.named_parameters()}
        if not group_of:
            twin = copy.deepcopy(model)  # its rows are set to unit norm
            chosen = {p for group in grassmann_param_groups(twin, 0, 0) if group["grassmann"] for p in group["params"]}
            same = zip(model.parameters(), twin.parameters(), strict=True)
            group_of = {p: {"omega": 0.0, "grad_clip": None} for p, its_twin in same if its_twin in chosen}
        self.layers = [(names[p].removesuffix(".weight"), p, group) for p, group in group_of.items()]
        self.active = False
        self.steps = 0
        self.sums = torch.zeros(len(self.layers), len(self.NAMES), device=device)
        self._before: list[Tensor] = []
        if self.layers:
            optimizer.register_step_pre_hook(self._measure_before)
            optimizer.register_step_post_hook(self._measure_after)

    @torch.no_grad()
    def _measure_before(self, optimizer, args, kwargs) -> None:
        if not self.active:
            return
        self._before = [unit(p.flatten(1))[0] for _, p, _ in self.layers]
        for sums, y, (_, p, group) in zip(self.sums, self._before, self.layers, strict=True):
            gram = (y @ y.T).abs()
            rows = len(y)
            sums[2] += (gram.sum() - gram.trace()) / max(1, rows * (rows - 1))
            if group["grad_clip"] is not None:
                g = p.grad.flatten(1) + group["omega"] * orthogonality_gradient(y)
                sums[1] += (unit(project(y, g))[1] > group["grad_clip"]).float().mean()

    @torch.no_grad()
    def _measure_after(self, optimizer, args, kwargs) -> None:
        if not self.active:
            return
        for sums, y, (_, p, _) in zip(self.sums, self._before, self.layers, strict=True):
            chord = torch.linalg.vector_norm(unit(p.flatten(1))[0] - y, dim=-1)
            sums[0] += (2 * (chord / 2).clamp(max=1).asin()).rad2deg().mean()
        self.steps += 1
        self._before = []

    def read(self) -> tuple[dict[str, float | None], dict[str, float]]:
        """Means over the measured steps, then start anew: over all layers by name, and layer by layer by tag."""
        if not self.layers or not self.steps:
            return dict.fromkeys(self.NAMES), {}
        means = (self.sums / self.steps).cpu()
        scalars = {
            f"per_layer_{name}/{layer}": value
            for (layer, _, _), row in zip(self.layers, means.tolist(), strict=True)
            for name, value in zip(self.NAMES, row, strict=True)
        }
        self.sums.zero_()
        self.steps = 0
        return dict(zip(self.NAMES, means.mean(0).tolist(), strict=True)), scalars


# ------------------------------------------------------------------------------------------------- a run's state


class Training:
    """Everything that changes while a run trains, and how it goes to a checkpoint and back."""

    def __init__(self, options: argparse.Namespace, data: DataSet):
        self.options, self.data = options, data
        self.device = choose_device(options.device)
        torch.manual_seed(options.seed)
        model = make_model(options, len(data.classes))
        self.model = model.to(self.device, memory_format=torch.channels_last)
        self.forward = torch.compile(self.model) if options.compile else self.model
        self.optimizer = make_optimizer(self.model, options)
        self.schedule = torch.optim.lr_scheduler.MultiStepLR(
            self.optimizer, options.epoch_step, gamma=options.lr_decay_ratio
        )
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=options.dtype == "float16")
        self.probe = GrassmannProbe(self.model, self.optimizer, self.device)
        self.mean, self.std = (
            torch.tensor(values, device=self.device).view(1, 3, 1, 1) for values in (data.mean, data.std)
        )
        self.epoch = 0  # finished epochs
        self.history: list[dict] = []  # their statistics
        self.start_epoch()

    def start_epoch(self) -> None:
        """Position and running sums at the start of an epoch; the sums stay on the device."""
        self.batch = 0  # finished batches of this epoch
        self.train_time = 0.0
        self.sums = torch.zeros(2, dtype=torch.float64, device=self.device)  # loss, wrong
        self.bad_step = torch.zeros((), dtype=torch.int64, device=self.device)  # first with a non-finite loss; 0: none

    def plan(self) -> EpochPlan:
        """What this epoch does with the pictures; UserError if the training set has no full batch."""
        options, n = self.options, len(self.data.train_labels)
        return EpochPlan(
            n,
            options.batch_size,
            seed=options.seed,
            epoch=self.epoch,
            pad=options.randomcrop_pad,
            flip=self.data.flip,
        )

    def inputs(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """uint8 (B, H, W, 3) on the host -> normalized float32 (B, 3, H, W), channels_last, on the device; labels."""
        x = images.to(self.device, non_blocking=True).permute(0, 3, 1, 2)
        return (x.float() - self.mean) / self.std, labels.to(self.device, non_blocking=True)

    def autocast(self) -> torch.autocast:
        """The precision that --dtype asks for."""
        dtype = getattr(torch, self.options.dtype)
        return torch.autocast(self.device.type, dtype, enabled=dtype != torch.float32)

    def learning_rates(self) -> dict[str, float | None]:
        """The current lr and lrg (None where nothing is on G(1,n))."""
        rates = {bool(group.get("grassmann")): group["lr"] for group in self.optimizer.param_groups}
        return {"lr": rates[False], "lrg": rates.get(True)}

    def test_error(self) -> float:
        """Of the last finished epoch, in %."""
        return 100 - self.history[-1]["test_acc"]

    def check_finite(self) -> None:
        """UserError if a loss of this epoch, or a weight, is not finite."""
        rates = ", ".join(f"{name} {value:g}" for name, value in self.learning_rates().items() if value is not None)
        advice = f"({rates}); the last good checkpoint, if any, is kept: try lower learning rates"
        if step := self.bad_step.item():
            raise UserError(f"the loss is not finite since epoch {self.epoch + 1}, step {step} {advice}")
        if not torch.stack([p.isfinite().all() for p in self.model.parameters()]).all():
            raise UserError(f"a weight is not finite in epoch {self.epoch + 1}, after step {self.batch} {advice}")

    def state(self) -> dict:
        """The checkpoint: tensors and plain Python values only."""
        schedule = {key: value for key, value in self.schedule.state_dict().items() if key != "milestones"}
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "schedule": schedule,  # without the milestones: an option
            "scaler": self.scaler.state_dict(),
            "epoch": self.epoch,
            "batch": self.batch,
            "train_time": self.train_time,
            "sums": self.sums,
            "probe": {"sums": self.probe.sums, "steps": self.probe.steps},
            "history": self.history,
            "options": run_options(self.options),
            "environment": environment(self.device),
            "data_sha256": self.data.sha256,
            "generators": generator_states(self.device),
        }

    def restore(self, state: dict) -> None:
        """Go on where the checkpoint was written; UserError where it belongs to another model or other data."""
        try:
            if state["data_sha256"] != self.data.sha256:
                raise UserError("the checkpoint was trained on other pictures than --dataset and --dataroot hold now")
            self.model.load_state_dict(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.schedule.load_state_dict(state["schedule"])
            self.scaler.load_state_dict(state["scaler"])
            self.sums.copy_(state["sums"])
            self.probe.sums.copy_(state["probe"]["sums"])
            self.epoch, self.batch, self.train_time = state["epoch"], state["batch"], state["train_time"]
            self.probe.steps, self.history = state["probe"]["steps"], state["history"]
            set_generator_states(state["generators"], self.device)
            if [stats["epoch"] for stats in self.history] != list(range(1, self.epoch + 1)):
                raise ValueError("its history has gaps")
            now = environment(self.device)
            then = state["environment"].items()
            changed = [f"{key} {old} then, {now[key]} now" for key, old in then if old != now[key]]
        except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
            reason = "".join(str(error).splitlines()[:1]).rstrip(".:")
            raise UserError(f"the checkpoint is of another model or not whole ({reason}); start a new run") from error
        if changed:
            print(f"note: the last bits of the result may differ: {'; '.join(changed)}", flush=True)


def run_options(options: argparse.Namespace) -> dict:
    """The options of the run, without those of one call."""
    return {name: value for name, value in vars(options).items() if name not in PER_CALL}


def environment(device: torch.device) -> dict[str, str | int]:
    """What decides the last bits of a result besides the options."""
    cuda = device.type == "cuda"
    tf32 = cuda and torch.backends.cudnn.allow_tf32 and torch.cuda.get_device_capability(device) >= (8, 0)
    return {
        "device": torch.cuda.get_device_name(device) if cuda else platform.machine() + " CPU",
        "threads": torch.get_num_threads(),
        "torch": str(torch.__version__),
        "float32_convolutions": "TF32" if tf32 else "float32",
    }


# ----------------------------------------------------------------------------------------------------- one epoch


def train_epoch(t: Training, batches: TrainBatches, stop: StopRequest) -> None:
    """Train from batch t.batch to the end of the epoch, or until `stop`. No step waits for the device."""
    options = t.options
    plan = t.plan()
    read_every, probe_every = math.ceil(len(plan) / 10), math.ceil(len(plan) / 4)
    pin = t.device.type == "cuda"
    t.model.train()
    started = time.perf_counter()
    title = f"epoch {t.epoch + 1}/{options.epochs}"
    form = "{desc} |{bar}| {n_fmt}/{total_fmt} [{remaining}{postfix}]"  # fits 80 columns
    shown = sys.stderr.isatty()
    with tqdm(total=len(plan), initial=t.batch, desc=title, bar_format=form, leave=False, disable=not shown) as bar:
        first = t.batch
        for images, labels in batches.iterate(plan, start=first, nthread=options.nthread, pin_memory=pin):
            x, labels = t.inputs(images, labels)
            with t.autocast():
                logits = t.forward(x)
                loss = cross_entropy(logits, labels)
            t.optimizer.zero_grad(set_to_none=True)
            t.scaler.scale(loss).backward()
            t.probe.active = t.batch % probe_every == 0
            t.scaler.step(t.optimizer)
            t.scaler.update()
            t.batch += 1
            with torch.no_grad():
                t.sums += torch.stack([loss.double(), (logits.argmax(1) != labels).sum().double()])
                t.bad_step.copy_(torch.where((t.bad_step == 0) & ~loss.isfinite(), t.batch, t.bad_step))
            bar.update()
            if t.batch % read_every == 0:
                show_progress(t, bar, first, started)
            if stop:
                break
    t.check_finite()  # waits for the device: what follows is timed right
    t.train_time += time.perf_counter() - started


def show_progress(t: Training, bar: tqdm, first: int, started: float) -> None:
    """Read the running sums, a few times an epoch: stop if a loss was not finite, show the means otherwise."""
    if t.bad_step.item():
        t.check_finite()
    loss, wrong = (t.sums / t.batch).tolist()
    size = t.options.batch_size
    speed = (t.batch - first) * size / (time.perf_counter() - started)
    bar.set_postfix_str(f"loss {loss:.4f}, error {100 * wrong / size:.2f}%, {speed:.0f} img/s")


@torch.no_grad()
def test_logits(t: Training) -> Iterator[tuple[Tensor, Tensor]]:
    """Logits (B, classes) and labels (B,) on the device, batch by batch over all test pictures."""
    t.model.eval()
    pin = t.device.type == "cuda"
    for images, labels in eval_batches(t.data.test_images, t.data.test_labels, t.options.batch_size, pin_memory=pin):
        x, labels = t.inputs(images, labels)
        with t.autocast():
            logits = t.forward(x)
        yield logits.float(), labels


def evaluate(t: Training, stop: StopRequest) -> tuple[float, float] | None:
    """Test loss and error in %, over all test pictures; None if a signal came first."""
    n = len(t.data.test_labels)
    sums = torch.zeros(2, dtype=torch.float64, device=t.device)
    for logits, labels in test_logits(t):
        loss = cross_entropy(logits, labels, reduction="sum")
        sums += torch.stack([loss.double(), (logits.argmax(1) != labels).sum().double()])
        if stop.by_signal:
            return None
    loss, wrong = sums.tolist()
    return loss / n, 100 * wrong / n


def print_evaluation(t: Training) -> None:
    """Test loss, top-1 and top-5 error, and each class's error; 80 columns."""
    logits, labels = (torch.cat(parts).cpu() for parts in zip(*test_logits(t), strict=True))
    wrong = logits.argmax(1) != labels
    nearest = logits.topk(min(5, logits.shape[1])).indices
    top5 = (nearest != labels[:, None]).all(1)
    part = f"{len(labels):,} {'held-out training' if t.options.holdout else 'test'} pictures of {t.data.name}"
    steps = f" and {t.batch} steps" if t.batch else ""
    print(f"{model_name(vars(t.options))} after {t.epoch} epochs{steps}, on {part}:")
    print(f"loss {cross_entropy(logits, labels):.4f}, top-1 error {100 * wrong.double().mean():.2f}%", end=", ")
    print(f"top-5 error {100 * top5.double().mean():.2f}%")
    for index, name in enumerate(t.data.classes):
        mine = wrong[labels == index].double()
        error = f"error {100 * mine.mean():6.2f}%" if len(mine) else "no error to tell"
        print(f"  {name:30} {len(mine):7,} pictures  {error}")


def finish_epoch(t: Training, log: RunLog, test_loss: float, test_error: float, test_time: float) -> None:
    """Write an epoch's statistics, step the schedule, and make t ready for the next epoch."""
    options = t.options
    t.epoch += 1
    pictures = t.batch * options.batch_size
    loss, wrong = t.sums.tolist()
    means, layers = t.probe.read()
    rates = t.learning_rates()
    stats = {
        "train_loss": loss / t.batch,
        "train_acc": 100 - 100 * wrong / pictures,
        "test_loss": test_loss,
        "test_acc": 100 - test_error,
        "epoch": t.epoch,
        "train_time": t.train_time,
        "test_time": test_time,
        "images_per_sec": pictures / t.train_time,
        "n_parameters": sum(p.numel() for p in t.model.parameters() if p.requires_grad),
        "num_classes": len(t.data.classes),
        **means,
        **run_options(options),
        **rates,
    }
    t.history.append(stats)
    scalars = {
        "loss/train": stats["train_loss"],
        "loss/test": test_loss,
        "error/train": 100 - stats["train_acc"],
        "error/test": test_error,
        "images_per_sec": stats["images_per_sec"],
        **{f"learning_rate/{name}": value for name, value in rates.items() if value is not None},
        **{f"grassmann/{name}": value for name, value in means.items() if value is not None},
        **layers,
    }
    log.add(stats, scalars)
    train = f"train loss {stats['train_loss']:.4f} error {100 - stats['train_acc']:5.2f}%"
    test = f"test {test_loss:.4f} {test_error:5.2f}%"
    print(f"epoch {t.epoch:3d}/{options.epochs}  {train}  {test}  {stats['images_per_sec']:.0f} img/s", flush=True)
    t.schedule.step()
    t.start_epoch()


# ------------------------------------------------------------------------------------------------------- the run


def train(t: Training, stop: StopRequest) -> int:
    """Train to the last epoch or until `stop`, with a checkpoint after every epoch; returns the exit code."""
    options = t.options
    log = RunLog(options.save, t.history)
    batches = TrainBatches(t.data.train_images, t.data.train_labels, options.randomcrop_pad)
    steps = len(t.plan())
    checkpoint = options.save / CHECKPOINT
    if t.epoch == 0:
        describe_to_tensorboard(t, log, batches)
    while t.epoch < options.epochs:
        if t.batch < steps:
            train_epoch(t, batches, stop)
        started = time.perf_counter()
        # A deadline may come during the evaluation: with less time than one takes, a run would never get on.
        result = evaluate(t, stop) if t.batch == steps and not stop.by_signal else None
        if result is not None:
            if not math.isfinite(result[0]):
                raise UserError(
                    f"the test loss is not finite after epoch {t.epoch + 1}; the last good checkpoint is kept"
                )
            finish_epoch(t, log, *result, time.perf_counter() - started)
            if t.epoch == options.epochs:
                log_hyperparameters(t, log)  # before the checkpoint that says that nothing is left to do
        save_checkpoint(checkpoint, t.state())
        if stop and t.epoch < options.epochs:
            log.close()
            where = f"after {t.epoch} epochs and {t.batch} of {steps} steps"
            way = f"python main.py --resume {shlex.quote(str(options.save))}"
            print(f"stopped by {stop.reason} {where}; to continue: {way}")
            return stop.exit_code
    log.close()
    print(f"finished {t.epoch} epochs: test error {t.test_error():.2f}%; logs are in {options.save}")
    return 0


def log_hyperparameters(t: Training, log: RunLog) -> None:
    """The options and what came of them, for TensorBoard's table of runs."""
    metrics = {"hparam/test_error": t.test_error(), "hparam/train_loss": t.history[-1]["train_loss"]}
    options = {name: value for name, value in run_options(t.options).items() if name not in MAY_CHANGE - {"epochs"}}
    plain = {name: "none" if value is None else value for name, value in options.items()}
    hparams = {name: str(value) if isinstance(value, list) else value for name, value in plain.items()}
    log.board.add_hparams(hparams, metrics, run_name=".", global_step=t.epoch)


def describe_to_tensorboard(t: Training, log: RunLog, batches: TrainBatches) -> None:
    """The configuration as text and a grid of augmented pictures, as the first epoch sees them."""
    text = "\n".join(f"    {line}" for line in (t.options.save / CONFIG).read_text().splitlines())
    log.board.add_text("config", text, 0)
    log.board.add_images("augmented pictures", batches.batch(t.plan(), 0)[0][:64], 0, dataformats="NHWC")


def claim_directory(save: Path, resume: str | None) -> BinaryIO:
    """Make the run's directory and lock it until the file that is returned is closed.

    Raises:
        UserError: it cannot be written, or a living process writes to it.
        UsageError: a run other than `resume` is in it.
    """
    try:
        save.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write to {save} ({error.strerror}); choose another --save") from error
    source = Path(resume) if resume not in (None, "auto") else save
    source = source / CHECKPOINT if source.is_dir() else source
    own = resume == "auto" or (resume and (save / CHECKPOINT).exists() and source.samefile(save / CHECKPOINT))
    if not own and any((save / name).exists() for name in (CONFIG, LOG, CHECKPOINT)):
        raise UsageError(f"{save} already holds a run; continue it with --resume auto, or choose another --save")
    # Without a checkpoint a run can have logged one epoch at most, if it was killed before it wrote the first.
    log = save / LOG
    if not (save / CHECKPOINT).exists() and log.exists() and log.read_text(errors="replace").count("\n") > 1:
        raise UsageError(f"{save} holds the log of a run but no checkpoint to resume from; choose another --save")
    return lock_directory(save)


def write_config(t: Training) -> None:
    """config.json: options, versions, device, git commit, and the data by size and hash."""
    data = t.data
    root = Path(__file__).parent
    git = ["git", "-C", str(root)]
    try:
        commit = subprocess.run(
            [*git, "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"], capture_output=True, text=True
        ).stdout.strip()
    except OSError:
        commit = ""
    write_json(
        t.options.save / CONFIG,
        {
            "options": run_options(t.options),
            "model": model_name(vars(t.options)),
            "data": {
                "name": data.name,
                "classes": len(data.classes),
                "train_images": len(data.train_labels),
                "test_images": len(data.test_labels),
                "mean": data.mean,
                "std": data.std,
                "sha256": data.sha256,
            },
            **environment(t.device),
            "versions": {
                "python": platform.python_version(),
                "torch": str(torch.__version__),
                "cuda": torch.version.cuda,
                "numpy": np.__version__,
                "opencv": cv2.__version__,
            },
            "git_commit": commit or None,
        },
    )


def print_start(t: Training) -> None:
    """The options, the device, every parameter with its shape and group, and the totals; 80 columns."""
    options = ", ".join(f"{name} {value}" for name, value in run_options(t.options).items())
    print(textwrap.fill(f"options: {options}", 80, subsequent_indent="  "))
    where = environment(t.device)
    print(f"device: {where['device']}, {where['threads']} threads, torch {where['torch']}")
    group_of = {p: group["name"] for group in t.optimizer.param_groups for p in group["params"]}
    totals: dict[str, list[int]] = {}
    for name, p in t.model.named_parameters():
        shape = " x ".join(map(str, p.shape))
        print(f"  {name:34} {shape:19} {group_of[p]}")
        total = totals.setdefault(group_of[p], [0, 0])
        total[0] += 1
        total[1] += p.numel()
    for group, (tensors, elements) in totals.items():
        print(f"{group}: {elements:,} parameters in {tensors} tensors")
    print(f"in all: {sum(elements for _, elements in totals.values()):,} parameters", flush=True)


def print_summary(options: argparse.Namespace) -> None:
    """What `print_start` says, and the multiply-adds of one picture; no data set is needed but a folder's."""
    if options.dataset == "folder":
        classes = load_data(options.dataset, options.dataroot, options.dataset_name).classes
    else:
        classes = tuple(map(str, range(100 if options.dataset == "CIFAR100" else 10)))
    picture, label = np.zeros((1, 32, 32, 3), np.uint8), np.zeros(1, np.int64)
    one = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
    t = Training(options, DataSet(data_name(vars(options)), picture, label, picture, label, classes, *one, flip=False))
    print_start(t)
    t.forward = t.model  # not compiled: the operators are counted one by one
    with FlopCounterMode(display=False) as counter:
        next(test_logits(t))
    print(f"multiply-adds of one picture: {counter.get_total_flops() // 2:,}")


def run(argv: list[str] | None) -> int:
    """One call of main.py; returns the exit code."""
    options, checkpoint = parse_options(argv)
    if options.summary:
        print_summary(options)
        return 0
    if options.resume == "auto" and not checkpoint and finished_options(options.save):
        print(f"nothing to do: the run has its {options.epochs} epochs, and no checkpoint any more")
        return 0
    lock = None if options.eval else claim_directory(options.save, options.resume)
    if lock and options.resume:
        # Now nobody else writes here, as a run that has just ended may have done since the first look.
        options, checkpoint = parse_options(argv, again=True)
    if checkpoint and not options.eval and checkpoint["epoch"] >= options.epochs:
        if checkpoint["epoch"] > options.epochs:
            raise UsageError(
                f"--epochs {options.epochs}: the checkpoint has {checkpoint['epoch']} finished epochs already"
            )
        print(f"nothing to do: the run has its {options.epochs} epochs")
        with contextlib.suppress(OSError):  # a sweep knows a finished run by a checkpoint that is newer than the log
            os.utime(options.save / CHECKPOINT)
        return 0
    # The same bits again after a resume, on a GPU too; channels_last lets cuDNN choose well without a search.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.backends.cudnn.deterministic = True
    # TF32 for float32 convolutions only: the regularizer needs exact matrix products, and besides it only fc has one.
    torch.backends.cudnn.allow_tf32 = True
    # GradScaler may skip a first step, and a run may be resumed between an epoch's last step and its end.
    warnings.filterwarnings("ignore", message="Detected call of `lr_scheduler.step")
    data = load_data(options.dataset, options.dataroot, options.dataset_name)
    if options.holdout:
        data = hold_out(data, options.holdout)
    t = Training(options, data)
    if checkpoint:
        t.restore(checkpoint)
    if options.eval:
        print_evaluation(t)
        return 0
    t.plan()  # an impossible --batchSize ends here, before a file is written
    write_config(t)
    print_start(t)
    deadline = options.max_minutes and PROCESS_START + 60 * options.max_minutes
    with lock:
        return train(t, StopRequest(deadline))


def main(argv: list[str] | None = None) -> int:
    """Run, and answer what the user can mend by one sentence on standard error."""
    try:
        return run(argv)
    except UserError as error:
        print(f"main.py: error: {error}", file=sys.stderr)
        return 2 if isinstance(error, UsageError) else 1
    except BrokenPipeError:  # whoever read the output has left, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except OSError as error:
        print(f"main.py: error: {error}; when that is mended, continue with --resume", file=sys.stderr)
        return 1
    except RuntimeError as error:
        if not isinstance(error, torch.OutOfMemoryError) and "can't allocate memory" not in str(error):
            raise
        print("main.py: error: out of memory; choose a smaller --batchSize, --width or --depth", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("main.py: interrupted outside of training; nothing was lost", file=sys.stderr)
        return 128 + signal.SIGINT


if __name__ == "__main__":
    sys.exit(main())
