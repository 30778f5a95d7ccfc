"""The paper's hyperparameters, the flags of main.py, and which options a run has.

An option that is not given on the command line is the checkpoint's; without one it is the paper's, or
DEFAULTS'.
"""

import argparse
import copy
import json
import math
import os
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

import distributed
from checkpoint import load_checkpoint
from utils import CHECKPOINT, CONFIG, LOCK, LOG, UsageError, UserError, printable, read_config

METHODS = ("SGD", "SGDG", "AdamG")

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
    "sync_bn": False,
}
# Options that older runs did not have: stored only where they differ from this, what those runs did.
LATER = {"sync_bn": False}
VGGS = {f"vgg{depth}": depth for depth in (11, 13, 16, 19)}
# Options of one call, not of the run: never taken from a checkpoint.
PER_CALL = {
    "save": None,
    "resume": None,
    "eval": False,
    "summary": False,
    "max_minutes": None,
    "ngpu": 1,
    "zero": False,
}
# What may change when a run is resumed.
MAY_CHANGE = {"epochs", "nthread", "device", "dataroot", "compile"}
# What may differ when a checkpoint is only evaluated.
MAY_DIFFER = MAY_CHANGE | {"dataset", "dataset_name", "holdout"}
HUGE = 1e38  # rates and factors are below it, so that float32 holds them
# Flags of the authors' script without a meaning of their own any more, with the one value that changes
# nothing.
LEGACY = {
    "gpu_id": ("0", "to train on another GPU, set the environment variable CUDA_VISIBLE_DEVICES"),
    "groups": ("1", "the paper's networks have no grouped convolutions; leave it out"),
}


@dataclass(frozen=True)
class Options:
    """All options of one call of main.py. None: off, not given, or of no use to the method or model."""

    model: str
    depth: int | None
    width: int | None
    dataset: str
    dataroot: str
    dataset_name: str | None
    holdout: int
    nthread: int
    optim_method: str
    batch_size: int
    momentum: float
    weight_decay: float
    omega: float | None
    grad_clip: float | None
    select: str | None
    seed: int
    device: str
    dtype: str
    compile: bool
    sync_bn: bool
    epochs: int
    epoch_step: list[int]
    lr_decay_ratio: float
    randomcrop_pad: int
    dropout: float
    lr: float
    lrg: float | None
    bn_decay: float
    # Of one call, not of the run:
    save: Path
    resume: str | None
    eval: bool
    summary: bool
    max_minutes: float | None
    ngpu: int
    zero: bool

    def of_run(self) -> dict:
        """The options of the run, as config.json, log.txt and checkpoints store them."""
        absent = {*PER_CALL, *(name for name, value in LATER.items() if getattr(self, name) == value)}
        return {name: value for name, value in asdict(self).items() if name not in absent}

    def fixed(self) -> dict:
        """Those of the run that cannot change on the way."""
        return {name: value for name, value in self.of_run().items() if name not in MAY_CHANGE}


def paper_values(model: str, dataset: str, method: str) -> dict:
    """The paper's learning rates, decay of BN and biases, dropout, schedule and augmentation."""
    protocol = copy.deepcopy(PROTOCOLS[PROTOCOL_OF[dataset]])
    return {**protocol["common"], "dropout": protocol["dropout"].get(model, 0.0), **protocol[method]}


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


# ------------------------------------------------------------------------------------------------------ flags


class Parser(argparse.ArgumentParser):
    """argparse that answers a mistake by one sentence instead of a page of usage."""

    def error(self, message: str):
        raise UsageError(f"{message} (python main.py --help lists all flags)")


def whole(text: str) -> int:
    """An int, also written as 10.0: the authors' script has `--width` and `--randomcrop_pad` as floats."""
    try:
        return int(text)
    except ValueError:
        value = float(text)
        if not value.is_integer():
            raise
        return int(value)


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
            raise argparse.ArgumentTypeError(f"must be {what} {bound}, got {text!r}")
        return value

    return parse


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
        raise argparse.ArgumentTypeError(
            f"must be a list of rising epochs such as '[60,120,160]', got {text!r}"
        )
    return epochs


def non_empty(text: str) -> str:
    """An argparse type: a shell variable that was never set is no path."""
    if not text or "\0" in text:
        raise argparse.ArgumentTypeError("must be a path, and not empty")
    return text


def expanded(text: str) -> str:
    """An argparse type: `~` is the home directory also where no shell has seen it, as in --save=~/run."""
    return os.path.expanduser(non_empty(text))


def precision(text: str) -> str:
    """An argparse type: the authors' script says `float` and `half`."""
    return {"float": "float32", "half": "float16"}.get(text, text)


def default_text(option: str) -> str:
    """The default of an option, for --help: from DEFAULTS, or the paper's for each method or data set."""
    if option in DEFAULTS:
        return "off" if DEFAULTS[option] is False else str(DEFAULTS[option])
    texts = [f"{name}: {paper_text(protocol, option)}" for name, protocol in PROTOCOLS.items()]
    return "the paper's, " + "; ".join(texts)


def paper_text(protocol: dict, option: str) -> str:
    """What a protocol says of an option: one value, or one for each method or model."""
    if option in protocol["common"]:
        return str(protocol["common"][option])
    values = (
        protocol["dropout"] if option == "dropout" else {name: protocol[name][option] for name in METHODS}
    )
    return ", ".join(f"{name} {value}" for name, value in values.items() if value is not None)


def add_flag(group, *names: str, help: str, default: str | None = None, **kwargs) -> None:
    """Add a flag whose help ends with the default; the parser itself has none."""
    action = group.add_argument(*names, help=help, **kwargs)
    action.help += f" (default: {default or default_text(action.dest)})"


def make_parser() -> argparse.ArgumentParser:
    """All flags. None has a default here: what is not given comes from a checkpoint, the paper or
    DEFAULTS."""
    parser = Parser(
        description="Train Wide ResNet or VGG with SGD, SGD-G or Adam-G, "
        'as in "Riemannian approach to batch normalization" (NIPS 2017).',
        epilog="Without flags this is the paper's SGD baseline, WRN-28-10 on CIFAR-10.",
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    add_model_flags(parser.add_argument_group("model"))
    add_data_flags(parser.add_argument_group("data"))
    add_optimization_flags(parser.add_argument_group("optimization"))
    add_run_flags(parser.add_argument_group("run"))
    group = parser.add_argument_group("flags of the authors' script, accepted where they change nothing")
    group.add_argument("--cuda", action="store_true", help="now --device cuda")
    for name, (_, way) in LEGACY.items():
        group.add_argument(f"--{name}", help=way)
    return parser


def add_model_flags(group) -> None:
    """The network."""
    add_flag(group, "--model", choices=["resnet", *VGGS], help="network")
    add_flag(group, "--depth", type=number(int, 1, 10_000), help="depth 6n+4 of a Wide ResNet")
    add_flag(group, "--width", type=number(whole, 1, 1000), help="its widening factor")
    dropout = "between a block's two convolutions; VGG: after each pool"
    add_flag(group, "--dropout", type=number(float, 0, 1), help=dropout)


def add_data_flags(group) -> None:
    """The pictures."""
    dataset = "CIFAR and SVHN are downloaded; digits needs no network"
    add_flag(group, "--dataset", choices=list(PROTOCOL_OF), help=dataset)
    root = "where data sets are; for folder it holds train/CLASS/... and test/CLASS/..."
    add_flag(group, "--dataroot", help=root)
    name = "what a folder is called in logs"
    add_flag(group, "--dataset_name", type=printable, default="folder", help=name)
    pad = "reflected border before the random crop, in pixels"
    add_flag(group, "--randomcrop_pad", type=number(whole, 0, 32), help=pad)
    holdout = "test on so many training pictures instead, to choose hyperparameters"
    add_flag(group, "--holdout", type=number(int, 0), help=holdout)
    threads = "threads that prepare batches; 0: none of their own"
    add_flag(group, "--nthread", type=number(int, 0, 1000), help=threads)


def add_optimization_flags(group) -> None:
    """The method and its hyperparameters."""
    rate = number(float, 0, HUGE)
    add_flag(group, "--optim_method", choices=METHODS, help="optimizer")
    batch = number(int, 1)
    add_flag(group, "--batchSize", "--batch_size", dest="batch_size", type=batch, help="pictures in a step")
    add_flag(group, "--lr", type=rate, help="learning rate of everything that is not on G(1,n)")
    add_flag(group, "--lrg", type=rate, help="learning rate on G(1,n)")
    add_flag(group, "--momentum", type=number(float, 0, 1), help="momentum; beta1 of Adam-G on G(1,n)")
    weight_decay = "weight decay of weights that are not on G(1,n)"
    add_flag(group, "--weightDecay", "--weight_decay", dest="weight_decay", type=rate, help=weight_decay)
    bn_decay = "weight decay of BN and biases"
    add_flag(group, "--bnDecay", "--bn_decay", dest="bn_decay", type=rate, help=bn_decay)
    add_flag(group, "--omega", type=rate, help="orthogonality regularizer on G(1,n)")
    add_flag(group, "--grad_clip", type=clip_threshold, help="norm clipping on G(1,n); 0 or none: off")
    select = "weights on G(1,n): by the authors' rule, or the scale-invariant"
    add_flag(group, "--select", choices=["shape", "measured"], help=select)
    add_flag(group, "--epochs", type=number(int, 1), help="epochs in all")
    drops = "finished epochs after which the learning rates drop, as '[60,120]'"
    add_flag(group, "--epoch_step", type=epoch_list, help=drops)
    ratio = number(float, 0, HUGE, exclusive=True)
    add_flag(group, "--lr_decay_ratio", type=ratio, help="factor of a drop")


def add_run_flags(group) -> None:
    """Where and how it runs, and what a call does."""
    save = "logs/<dataset>/<model>/<method>/seed<k>"
    add_flag(group, "--save", type=expanded, default=save, help="the run's directory")
    resume = "run directory or checkpoint to continue; auto: the run in --save, if there is one"
    add_flag(group, "--resume", type=expanded, metavar="DIR", default="none", help=resume)
    evaluate = "evaluate the checkpoint that --resume names; no training"
    add_flag(group, "--eval", action="store_true", default="off", help=evaluate)
    summary = (
        "print parameters, groups, multiply-adds, with --resume also statistics of the weights, and exit"
    )
    add_flag(group, "--summary", action="store_true", default="off", help=summary)
    add_flag(
        group, "--seed", type=number(int, 0, 2**63), help="of weights, dropout, data order and augmentation"
    )
    add_flag(group, "--device", choices=["auto", "cpu", "cuda"], help="auto takes a GPU where there is one")
    dtypes = ["float32", "bfloat16", "float16"]
    add_flag(group, "--dtype", type=precision, choices=dtypes, help="precision of autocast")
    add_flag(group, "--compile", action="store_true", help="torch.compile the model")
    minutes = number(float, 0, exclusive=True)
    add_flag(group, "--max_minutes", type=minutes, default="none", help="then stop, ready to be resumed")
    processes = "train with so many processes on this machine, each on its own GPU"
    add_flag(group, "--ngpu", type=number(whole, 1, 1000), default="1", help=processes)
    zero = "of several processes each makes its share of the optimizer's step"
    add_flag(group, "--zero", action="store_true", default="off", help=zero)
    sync_bn = "several GPUs: BN statistics of the whole batch, not of each GPU's slice"
    add_flag(group, "--sync_bn", action="store_true", help=sync_bn)


# --------------------------------------------------------------------------------------- the options of a run


def asked_processes(argv: list[str] | None) -> int:
    """What --ngpu says; UsageError for words that are no flags."""
    return getattr(make_parser().parse_args(argv), "ngpu", 1)


def parse_options(
    argv: list[str] | None,
    check: Callable[[Options], object] = lambda options: None,
    claim: Callable[[Path, bool], object] = lambda save, own: None,
) -> tuple[Options, dict | None]:
    """The options, and the checkpoint to start from, if any. Says which given options have no effect.

    Args:
        argv: as `sys.argv[1:]`, or None for that.
        check: raises a UsageError for options that do not go together.
        claim: called once as `claim(save, own)` with the directory that a run will write to; `own`: the run
            in it is the one to continue, and it is claimed before its checkpoint is read, since a run that is
            just ending might still write. Not for --eval, --summary and a finished run without one.

    Raises:
        UsageError: a flag or value that is not accepted, or one that differs from the checkpoint's.
        UserError: there is no such checkpoint, or it cannot be used.
    """
    given = vars(make_parser().parse_args(argv))
    check_legacy_flags(given)
    call = {name: given.pop(name, default) for name, default in PER_CALL.items()}
    options = fresh = fill_in(given)
    default = default_save(Options(**fresh, **call))
    save, source, own = find_places(call, default)
    checkpoint = None
    finished = None if source is None or source.exists() else finished_options(save)
    writes = not (call["eval"] or call["summary"] or finished)
    claimed = writes and own and (save / LOCK).exists()  # else nobody has written there
    if claimed:
        claim(save, own)
    if finished and own:
        options = continue_with(given, finished, save / CONFIG, MAY_CHANGE)
        if options["epochs"] != finished["epochs"]:
            raise UsageError(f"{save} has no checkpoint any more to go on from; choose another --save")
    elif source and (source.exists() or call["resume"] != "auto"):
        checkpoint = load_checkpoint(source)
        if "options" in checkpoint:
            may_change = MAY_DIFFER if call["eval"] else MAY_CHANGE
            options = continue_with(given, checkpoint["options"], source, may_change)
        else:  # weights alone, of the authors' script
            save = Path(call["save"] or default)
    if call["eval"] and checkpoint is None:
        raise UsageError("--eval needs a checkpoint; name its run directory with --resume DIR")
    trains = writes or (call["summary"] and options is fresh)  # or would
    check_options(options, call["ngpu"], trains, stored=options is not fresh)
    result = Options(**options, **{**call, "save": save})
    check(result)
    if writes and not claimed:
        claim(save, own)
    note_unused([name for name in given if options[name] is None and given[name] is not None], result)
    return result, checkpoint


def find_places(call: dict, default: Path) -> tuple[Path, Path | None, bool]:
    """The run's directory; the checkpoint that --resume names, if any; whether it is the directory's own."""
    save = call["save"] and Path(call["save"])
    if call["resume"] is None:
        return save or default, None, False
    if call["resume"] == "auto":
        save = save or default
        return save, save / CHECKPOINT, True
    source = Path(call["resume"])
    source = source / CHECKPOINT if source.is_dir() else source
    save = save or source.parent
    own = save / CHECKPOINT
    return save, source, own.exists() and source.exists() and source.samefile(own)


def default_save(options: Options) -> Path:
    """logs/<dataset>/<model>/<method>/seed<k>."""
    dataset = re.sub(r"[^\w.-]+", "-", data_name(options)).strip("-") or "folder"
    return Path("logs", dataset, model_name(options), options.optim_method, f"seed{options.seed}")


def finished_options(save: Path) -> dict | None:
    """The options of a run in `save` that has logged all its epochs; None where there is no such run."""
    options = read_config(save).get("options")
    if not isinstance(options, dict) or not (save / LOG).is_file():
        return None
    logged = (save / LOG).read_bytes().count(b"\n")
    return options if logged and logged == options.get("epochs") else None


def nothing_to_do(options: Options, checkpoint: dict | None) -> str | None:
    """Says so of a run that is finished; UsageError where its checkpoint has more epochs than --epochs."""
    if options.resume == "auto" and not checkpoint and finished_options(options.save):
        return f"nothing to do: the run has its {options.epochs} epochs, and no checkpoint any more"
    done = checkpoint["epoch"] if checkpoint and "options" in checkpoint else 0
    if done > options.epochs:
        raise UsageError(f"--epochs {options.epochs}: the checkpoint has {done} finished epochs already")
    return f"nothing to do: the run has its {options.epochs} epochs" if done == options.epochs else None


def note_unused(names: list[str], options: Options) -> None:
    """Say which given options this model and method have no use for."""
    if names:
        flags = ", ".join(f"--{name}" for name in names)
        verb = "has" if len(names) == 1 else "have"
        text = f"note: {flags} {verb} no effect on {model_name(options)} with {options.optim_method}"
        print(text, flush=True)  # ahead of what may go to standard error, where both go to one file


def check_legacy_flags(given: dict) -> None:
    """Take the flags that only the authors' script has out of `given`; UsageError where one would change
    something."""
    if given.pop("cuda", False) and (given.get("device") == "cpu" or not torch.cuda.is_available()):
        raise UsageError(
            "--cuda: there is no CUDA device to use; leave it out (--device auto takes a GPU if there is one)"
        )
    for flag, (harmless, way) in LEGACY.items():
        if (value := given.pop(flag, harmless)) != harmless:
            raise UsageError(f"--{flag} {value} has no meaning here: {way}")


def fill_in(given: dict) -> dict:
    """The given options, with the paper's values and DEFAULTS for the rest."""
    options = {**DEFAULTS, **given}
    options = {
        **options,
        **paper_values(options["model"], options["dataset"], options["optim_method"]),
        **given,
    }
    return without_unused(options)


def without_unused(options: dict) -> dict:
    """None for what a method or model has no use for, so that no two equal runs look different."""
    unused = ("lrg", "omega", "grad_clip", "select") if options["optim_method"] == "SGD" else ()
    unused += ("depth", "width") if options["model"] in VGGS else ()
    return {name: None if name in unused else value for name, value in options.items()}


def continue_with(given: dict, stored: dict, path: Path, may_change: set[str]) -> dict:
    """The checkpoint's options, with those given that may change on the way.

    Raises:
        UsageError: another one that is given differs.
        UserError: the stored ones are none that flags could give.
    """
    stored = {**LATER, **stored}
    if odd := stored.keys() ^ fill_in({}).keys():
        names = ", ".join(sorted(map(str, odd)))
        raise UserError(f"{path} is of another version of main.py, whose options differ in {names}")
    stored = as_flags_give(stored, path)
    given = {name: value for name, value in without_unused({**stored, **given}).items() if name in given}
    others = any(given.get(name, stored[name]) != stored[name] for name in ("dataset", "dataroot"))
    if others and "holdout" in may_change:  # to evaluate on other pictures: on their test part
        stored = {**stored, "holdout": 0, "dataset_name": None}
    for name, value in given.items():
        if name not in may_change and value != stored[name]:
            raise UsageError(
                f"--{name} {value} differs from {stored[name]} of {path}; leave it out, or start a new run"
            )
    return {**stored, **given}


def as_flags_give(stored: dict, path: Path) -> dict:
    """The same options from flags that say them, held to the rules of flags; UserError."""
    words = []
    if isinstance(stored["dataset_name"], str):  # older runs stored any
        stored = {**stored, "dataset_name": printable(stored["dataset_name"])}
    try:
        for name, value in stored.items():
            if value is True:
                words.append(f"--{name}")
            elif value is not None and value is not False:
                words.append(f"--{name}={json.dumps(value) if name == 'epoch_step' else value}")
            elif name == "grad_clip":
                words.append("--grad_clip=none")
        options = fill_in(vars(make_parser().parse_args(words)))
        if odd := [name for name in options if options[name] != stored[name]]:
            raise UsageError(f"{odd[0]} {stored[odd[0]]!r} is not what flags give")
    except (UsageError, TypeError, RecursionError) as error:  # of what is no JSON, or nested without end
        raise UserError(f"the options in {path} cannot be a run's: {error}") from error
    return options


def check_options(options: dict, ngpu: int, trains: bool, stored: bool) -> None:
    """What no single flag can tell; UsageError.

    Args:
        trains: the call is none that can do with less: an evaluation, the summary of a checkpoint.
        stored: the options are a checkpoint's, so that the advice cannot be to change one.
    """
    drops, ratio = len(options["epoch_step"]), options["lr_decay_ratio"]
    for name in ("lr", "lrg"):
        if options[name] and math.log(options[name]) + drops * math.log(ratio) >= math.log(HUGE):
            raise UsageError(f"--lr_decay_ratio {ratio}: after {drops} drops --{name} is not below {HUGE}")
    if options["device"] == "cuda" and not torch.cuda.is_available():
        raise UsageError(
            "--device cuda: no CUDA device is available; use --device cpu, or check with nvidia-smi"
        )
    size, here, gpus = distributed.size(), distributed.on_this_machine()[1], torch.cuda.device_count()
    if size > 1 and ngpu not in (1, size):
        raise UsageError(f"--ngpu {ngpu}: torchrun has started {size} processes; leave it out")
    if size > 1 and choose_device(options["device"]).type == "cuda" and here > gpus:
        raise UsageError(f"{here} processes on this machine need as many GPUs, and it has {gpus}")
    if trains:
        check_training(options, size, stored)


def check_training(options: dict, size: int, stored: bool) -> None:
    """UsageError for what `size` processes, each on its device, cannot train."""
    batch, on_cpu = options["batch_size"], choose_device(options["device"]).type == "cpu"
    if on_cpu and options["dtype"] == "float16":
        advice = "train a run that was made with it on one" if stored else "use float32 or bfloat16"
        raise UsageError(f"--dtype float16 needs a GPU (it crawls on the CPU); {advice}")
    if on_cpu and options["sync_bn"]:
        advice = "train a run that was made with it on one" if stored else "leave it out"
        raise UsageError(f"--sync_bn needs GPUs: torch's SyncBatchNorm has no form for the CPU; {advice}")
    if batch % size:
        nearest = f"the nearest is {max(1, round(batch / size)) * size}"
        divisors = ", ".join(str(count) for count in range(1, min(batch, 1000) + 1) if batch % count == 0)
        advice = f"the run goes on with one of {divisors} processes" if stored else nearest
        raise UsageError(f"--batchSize {batch} does not divide among {size} processes; {advice}")
    if options["model"] in VGGS and batch == size:
        advice = "take fewer processes" if stored else f"use at least {2 * size}"
        raise UsageError(f"--batchSize {batch}: VGG normalizes each feature over the batch; {advice}")
