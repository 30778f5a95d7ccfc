"""The paper's hyperparameters, the options of main.py (a row each), and which of them a run has.

An option that is not given on the command line is the checkpoint's; without one it is the paper's, or its
row's default.
"""

# ruff: noqa: E501, RUF009 (a row may be longer than a line)
import argparse
import copy
import json
import math
import os
import re
from argparse import ArgumentTypeError
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

import torch

import distributed
from checkpoint import load_checkpoint, reading
from utils import CHECKPOINT, UsageError, UserError, counted, printable
from vgg import CONVOLUTIONS

# The paper's hyperparameters. VGG's are inferred: the authors published one command for it, without dropout.
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
METHODS = ("SGD", "SGDG", "AdamG")
VGGS = {f"vgg{depth}": depth for depth in CONVOLUTIONS}
HUGE = 1e38  # rates and factors are below it, so that float32 holds them


def paper_values(model: str, dataset: str, method: str) -> dict:
    """The paper's learning rates, decay of BN and biases, dropout, schedule and augmentation."""
    protocol = copy.deepcopy(PROTOCOLS[PROTOCOL_OF[dataset]])
    return {**protocol["common"], "dropout": protocol["dropout"].get(model, 0.0), **protocol[method]}


# --------------------------------------------------------------------------------- values on the command line


def number(kind: Callable[[str], float], low: float, high: float = math.inf, *, exclusive: bool = False):
    """An argparse type: a finite number from low (itself allowed unless `exclusive`) to below high."""
    what = "a number" if kind is float else "a whole number"
    bound = f"{'above' if exclusive else 'of at least'} {low}"
    bound += "" if high == math.inf else f" and below {high}"

    def parse(text: str):
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not (low < value < high or (value == low and not exclusive)):
            raise ArgumentTypeError(f"must be {what} {bound}, got {text!r}")
        return value

    return parse


def depth(text: str) -> int:
    """An argparse type: the depth 6n+4 of a Wide ResNet."""
    value = number(int, 1, 10_000)(text)
    if value % 6 != 4 or value < 10:
        nearest = max(10, value - (value - 4) % 6)
        raise ArgumentTypeError(f"must be 6n+4, got {value}; the nearest are {nearest} and {nearest + 6}")
    return value


def clip_threshold(text: str) -> float | None:
    """An argparse type: a positive number; 0 or none: no clipping."""
    return None if text.lower() == "none" else number(float, 0, HUGE)(text) or None


def epoch_list(text: str) -> list[int]:
    """An argparse type: '[60,120,160]'."""
    try:
        epochs = json.loads(text)
    except (ValueError, RecursionError):  # no JSON, a number of thousands of digits, brackets without end
        epochs = None
    is_list = isinstance(epochs, list) and all(type(epoch) is int and epoch >= 1 for epoch in epochs)
    if not is_list or epochs != sorted(set(epochs)):
        raise ArgumentTypeError(f"must be a list of rising epochs such as '[60,120,160]', got {text!r}")
    return epochs


def local_path(text: str) -> str:
    """An argparse type: a path of this machine; `~` is the home directory also where no shell has seen it."""
    if not text or "\0" in text:  # as of a shell variable that was never set
        raise ArgumentTypeError("must be a path, and not empty")
    if "://" in text:
        raise ArgumentTypeError(f"must be a path of this machine, got {text!r}")
    return os.path.expanduser(text)


# --------------------------------------------------------------------------------------------------- the rows

PAPER = object()  # the default is the paper's for the model, data set and method
ALWAYS = object()  # all runs have stored the option
# When an option may differ from the checkpoint's: whenever a run goes on; only to evaluate. Or it is of one call.
RESUMED, EVALUATED, CALL = "resumed", "evaluated", "call"
ANY_RATE = number(float, 0, HUGE)


# fmt: off
def option(default, help, when=None, *, shown=None, camel=None, older=ALWAYS, **argparse_keywords):
    """A row: its default (`shown`: in words), what it means, when it may change, the authors' name of the flag.

    older: of a row that is newer than some runs, what these did: stored only where it differs from this.
    """
    row = {"default": default, "help": help, "when": when, "shown": shown, "camel": camel, "older": older}
    return field(metadata={**row, "argparse": argparse_keywords})


@dataclass(frozen=True)
class Options:
    """All options of one call of main.py, a row each. None: off, not given, or of no use to the method or model."""

    model: str = option("resnet", "network", choices=["resnet", *VGGS])
    depth: int | None = option(28, "depth 6n+4 of a Wide ResNet", type=depth)
    width: int | None = option(10, "its widening factor", type=number(int, 1, 1000))
    dropout: float = option(PAPER, "between a block's two convolutions; VGG: after each pool", type=number(float, 0, 1))

    dataset: str = option("CIFAR10", "CIFAR and SVHN are downloaded; digits needs no network", EVALUATED, choices=list(PROTOCOL_OF))
    dataroot: str = option("./data", "where data sets are; for folder it holds train/CLASS/... and test/CLASS/...", RESUMED, type=local_path)
    dataset_name: str | None = option(None, "what a folder is called in logs", EVALUATED, shown="folder", type=printable)
    randomcrop_pad: int = option(PAPER, "reflected border before the random crop, in pixels", type=number(int, 0, 32))
    holdout: int = option(0, "test on so many training images instead, to choose hyperparameters", EVALUATED, type=number(int, 0))
    nthread: int = option(1, "threads that prepare batches; 0: none of their own", RESUMED, type=number(int, 0, 1000))

    optim_method: str = option("SGD", "optimizer", choices=METHODS)
    batch_size: int = option(128, "images in a step", camel="batchSize", type=number(int, 1))
    lr: float = option(PAPER, "learning rate of everything that is not on G(1,n)", type=ANY_RATE)
    lrg: float | None = option(PAPER, "learning rate on G(1,n)", type=ANY_RATE)
    momentum: float = option(0.9, "momentum; beta1 of Adam-G on G(1,n)", type=number(float, 0, 1))
    weight_decay: float = option(5e-4, "weight decay of weights that are not on G(1,n)", camel="weightDecay", type=ANY_RATE)
    bn_decay: float = option(PAPER, "weight decay of BN and biases", camel="bnDecay", type=ANY_RATE)
    omega: float | None = option(0.1, "orthogonality regularizer on G(1,n)", type=ANY_RATE)
    grad_clip: float | None = option(0.1, "norm clipping on G(1,n); 0 or none: off", type=clip_threshold)
    select: str | None = option("shape", "weights on G(1,n): by the authors' rule, or the scale-invariant", choices=["shape", "measured"])
    epochs: int = option(PAPER, "epochs in all", RESUMED, type=number(int, 1))
    epoch_step: list = option(PAPER, "finished epochs after which the learning rates drop, as '[60,120]'", type=epoch_list)
    lr_decay_ratio: float = option(PAPER, "factor of a drop", type=number(float, 0, HUGE, exclusive=True))

    save: Path = option(None, "the run's directory", CALL, shown="logs/<dataset>/<model>/<method>/seed<k>", type=local_path)
    resume: str | None = option(None, "run directory or checkpoint to continue; auto: the run in --save, if there is one", CALL, type=local_path, metavar="DIR")
    eval: bool = option(False, "evaluate the checkpoint that --resume names; no training", CALL)
    summary: bool = option(False, "print parameters, groups, multiply-adds, with --resume also statistics of the weights, and exit", CALL)
    seed: int = option(0, "of weights, dropout, data order and augmentation", type=number(int, 0, 2**63))
    device: str = option("auto", "auto takes a GPU where there is one", RESUMED, choices=["auto", "cpu", "cuda"])
    dtype: str = option("float32", "precision of autocast", choices=["float32", "bfloat16", "float16"])
    compile: bool = option(False, "torch.compile the model", RESUMED)
    max_minutes: float | None = option(None, "then stop, ready to be resumed", CALL, type=number(float, 0, exclusive=True))
    ngpu: int = option(1, "train with so many processes on this machine, each on its own GPU", CALL, type=number(int, 1, 1000))
    zero: bool = option(False, "of several processes each makes its share of the optimizer's step", CALL)
    sync_bn: bool = option(False, "several GPUs: BN statistics of the whole batch, not of each GPU's slice", older=False)
    # fmt: on

    def of_run(self) -> dict:
        """The options of the run, as config.json, log.txt and checkpoints store them."""
        of_run = {name: value for name, value in asdict(self).items() if name not in CALL_NAMES}
        return {name: value for name, value in of_run.items() if name not in LATER or value != LATER[name]}



ROWS = {row.name: row.metadata for row in fields(Options)}
KINDS = {row.name: row.type for row in fields(Options)}
# Of --help, by their first row.
GROUPS = {"model": "model", "dataset": "data", "optim_method": "optimization", "save": "run"}
CALL_NAMES = {name for name, row in ROWS.items() if row["when"] == CALL}
CHANGES_ON_RESUME = {name for name, row in ROWS.items() if row["when"] == RESUMED}
CHANGES_ON_EVAL = {name for name, row in ROWS.items() if row["when"] in (RESUMED, EVALUATED)}
LATER = {name: row["older"] for name, row in ROWS.items() if row["older"] is not ALWAYS}


def data_name(options: Options) -> str:
    """What logs call the data set."""
    return (options.dataset == "folder" and options.dataset_name) or options.dataset


def model_name(options: Options) -> str:
    """As the paper says it: wrn-28-10, vgg-13."""
    if options.model in VGGS:
        return f"vgg-{VGGS[options.model]}"
    return f"wrn-{options.depth}-{options.width}"


def choose_device(name: str) -> torch.device:
    """The device that --device names; auto: a GPU where there is one."""
    return torch.device("cuda" if name == "cuda" or (name == "auto" and torch.cuda.is_available()) else "cpu")


# ------------------------------------------------------------------------------------------- the command line


class Parser(argparse.ArgumentParser):
    """argparse that answers a mistake by one sentence instead of a page of usage."""

    def error(self, message: str):
        raise UsageError(f"{message} (python main.py --help lists all flags)")


def parse_flags(argv: list[str] | None) -> dict:
    """The options that are given, by name; UsageError for a flag or value that is not accepted."""
    parser = Parser(
        description="Train Wide ResNet or VGG with SGD, SGD-G or Adam-G, "
        'as in "Riemannian approach to batch normalization" (NIPS 2017).',
        epilog="Without flags this is the paper's SGD baseline, WRN-28-10 on CIFAR-10.",
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    for name, row in ROWS.items():
        if name in GROUPS:
            group = parser.add_argument_group(GROUPS[name])
        flags = [f"--{row['camel']}"] if row["camel"] else []
        keywords = {"action": "store_true"} if row["default"] is False else row["argparse"]
        help = f"{row['help']} (default: {default_text(name)})"
        group.add_argument(*flags, f"--{name}", dest=name, help=help, **keywords)
    return vars(parser.parse_args(argv))


def default_text(name: str) -> str:
    """The default of an option, for --help: its row's, or the paper's for each method or model."""
    row = ROWS[name]
    if row["default"] is not PAPER:
        return row["shown"] or {"False": "off", "None": "none"}.get(str(row["default"]), str(row["default"]))
    texts = []
    for protocol, values in PROTOCOLS.items():
        if name in values["common"]:
            text = str(values["common"][name])
        else:
            by = values["dropout"] if name == "dropout" else {m: values[m][name] for m in METHODS}
            text = ", ".join(f"{key} {value}" for key, value in by.items() if value is not None)
        texts.append(f"{protocol}: {text}")
    return "the paper's, " + "; ".join(texts)


# --------------------------------------------------------------------------------------- the options of a run


def fill_in(given: dict) -> dict:
    """The given options, with the paper's values and the rows' defaults for the rest."""
    defaults = {name: row["default"] for name, row in ROWS.items() if row["default"] is not PAPER}
    paper = paper_values(*({**defaults, **given}[name] for name in ("model", "dataset", "optim_method")))
    return without_unused({**defaults, **paper, **given})


def without_unused(options: dict) -> dict:
    """None for what a method or model has no use for, so that no two equal runs look different."""
    unused = ("lrg", "omega", "grad_clip", "select") if options["optim_method"] == "SGD" else ()
    unused += ("depth", "width") if options["model"] in VGGS else ()
    return {name: None if name in unused else value for name, value in options.items()}


def find_places(given: dict) -> tuple[Path, Path | None, bool]:
    """The run's directory; the checkpoint to read, if any; whether it is the directory's own.

    Raises:
        UserError: there is no such checkpoint.
    """
    save, resume = given.get("save"), given.get("resume")
    default = default_save(Options(**fill_in(given)))
    if resume is None:
        return Path(save or default), None, False
    if resume == "auto":
        own = Path(save or default) / CHECKPOINT
        found = own.exists()  # one that another process writes from here on is not overwritten (`locked`)
        return own.parent, own if found else None, found
    source = Path(resume) / CHECKPOINT if Path(resume).is_dir() else Path(resume)
    if not source.is_file():
        raise UserError(
            f"there is no checkpoint {source}; give --resume a run directory or a checkpoint file"
        )
    own = Path(save or source.parent) / CHECKPOINT
    return own.parent, source, own.exists() and source.samefile(own)


def default_save(options: Options) -> Path:
    """logs/<dataset>/<model>/<method>/seed<k>."""
    dataset = re.sub(r"[^\w.-]+", "-", data_name(options)).strip("-") or "folder"
    return Path("logs", dataset, model_name(options), options.optim_method, f"seed{options.seed}")


def choose_options(given: dict, save: Path, source: Path | None) -> tuple[Options, dict | None]:
    """The options, and the checkpoint to start from, if any. Says which given options have no effect.

    Args:
        given: from `parse_flags`. save, source: from `find_places`.

    Raises:
        UsageError: an option differs from the checkpoint's, or options do not go together.
        UserError: the checkpoint cannot be used.
    """
    if source is None and given.get("eval"):
        raise UsageError("--eval needs a checkpoint; name its run directory with --resume DIR")
    state = load_checkpoint(source) if source else None
    with reading(source):
        chosen = continue_with(given, state["options"], source) if state else fill_in(given)
        options = Options(**{**chosen, "save": save})
        check_options(options)
        if options.epoch_step and options.epoch_step[0] >= options.epochs and not (options.eval or options.summary):
            print(f"note: no drop of the learning rates within {options.epochs} epochs (--epoch_step)", flush=True)
    # `without_unused` has put None.
    unused = [f"--{name}" for name in given if given[name] is not None and getattr(options, name) is None]
    if unused:
        verb = "has" if len(unused) == 1 else "have"
        text = f"{', '.join(unused)} {verb} no effect on {model_name(options)} with {options.optim_method}"
        # Flushed: ahead of what goes to standard error, where both go to one file.
        print(f"note: {text}", flush=True)
    return options, state


def parse_options(argv: list[str] | None) -> tuple[Options, dict | None]:
    """`parse_flags`, `find_places` and `choose_options` in one, for programs that lock nothing."""
    given = parse_flags(argv)
    save, source, _ = find_places(given)
    return choose_options(given, save, source)


def continue_with(given: dict, stored: dict, source: Path) -> dict:
    """The checkpoint's options, with those given that may change on the way.

    Raises:
        UsageError: another one that is given differs. ValueError: the stored ones are not a run's.
    """
    call = {name: given.get(name, row["default"]) for name, row in ROWS.items() if name in CALL_NAMES}
    stored = {**LATER, **stored}
    for name in (ROWS.keys() | stored.keys()) - CALL_NAMES:
        value, kind = stored[name], KINDS[name]
        if not isinstance(value, kind) or (isinstance(value, (int, float)) and not value >= 0):
            raise ValueError(f"its option {name} is {value!r}")
    may_change = CHANGES_ON_EVAL if call["eval"] else CHANGES_ON_RESUME
    names = [name for name in stored if name in given and name not in CALL_NAMES]
    usable = without_unused({**stored, **{name: given[name] for name in names}})
    changed = {name: usable[name] for name in names if usable[name] != stored[name]}
    if wrong := [name for name in changed if name not in may_change]:
        was = f"--{wrong[0]} {changed[wrong[0]]} differs from {stored[wrong[0]]} of {source}"
        raise UsageError(f"{was}; leave it out, or start a new run")
    if call["eval"] and changed.keys() & {"dataset", "dataroot"}:  # other images: their test part
        stored = {**stored, "holdout": 0, "dataset_name": None}
    return {**stored, **{name: usable[name] for name in names}, **call}


def nothing_to_do(options: Options, state: dict | None) -> str | None:
    """Says so of a run that is finished; UsageError where its checkpoint has more epochs than --epochs."""
    done = state["epoch"] if state else 0
    if done > options.epochs:
        raise UsageError(f"--epochs {options.epochs}: the checkpoint has finished {counted(done, 'epoch')} already")
    return f"nothing to do: the run has its {counted(done, 'epoch')}" if done == options.epochs else None


def check_options(options: Options) -> None:
    """UsageError for options that do not go together."""
    drops, ratio = len(options.epoch_step), options.lr_decay_ratio
    for name, rate in (("lr", options.lr), ("lrg", options.lrg)):
        if rate and math.log(rate) + drops * math.log(ratio) >= math.log(HUGE):
            raise UsageError(f"--lr_decay_ratio {ratio}: after {drops} drops --{name} is not below {HUGE}")
    if options.device == "cuda" and not torch.cuda.is_available():
        raise UsageError(
            "--device cuda: no CUDA device is available; use --device cpu, or check with nvidia-smi"
        )
    size, here, gpus = distributed.world_size(), distributed.local_world_size(), torch.cuda.device_count()
    on_cpu, batch = choose_device(options.device).type == "cpu", options.batch_size
    if size > 1 and options.ngpu not in (1, size):
        raise UsageError(f"--ngpu {options.ngpu}: torchrun has started {size} processes; leave it out")
    if size > 1 and not on_cpu and here > gpus:
        raise UsageError(f"{here} processes on this machine need as many GPUs, and it has {gpus}")
    if options.eval or options.summary:
        return
    if on_cpu and options.dtype == "float16":
        raise UsageError("--dtype float16 needs a GPU; without one start a run in float32 or bfloat16")
    if on_cpu and options.sync_bn:
        raise UsageError("--sync_bn needs GPUs, as torch's SyncBatchNorm has no form for the CPU; start a run without it")
    if batch % size:
        divisors = ", ".join(str(count) for count in range(1, min(batch, 1000) + 1) if batch % count == 0)
        raise UsageError(f"--batchSize {batch} does not divide among {size} processes; it does among {divisors}")
    if options.model in VGGS and batch == size:
        advice = "it needs two images or more in each process"
        raise UsageError(f"--batchSize {batch}: VGG normalizes each feature over the batch; {advice}")
