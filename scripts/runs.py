"""Runs as `main.py` leaves them: directories with `config.json` and `log.txt`, checked by one schema.

A run that cannot be used, whatever is in its files, is left out with a sentence that names it. In those that
are returned nothing that tables and figures read is missing, of another type, infinite or not a number.
"""

import json
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from reprlib import repr as shortened  # long and deep values end in ...
from typing import NamedTuple

METHODS = {"SGD": "SGD", "SGDG": "SGD-G", "AdamG": "Adam-G"}  # the option's values, and the paper's names

# Options beside which a run goes on as the same run, as `main.py` allows.
MAY_CHANGE = ("epochs", "nthread", "device", "dataroot", "compile")


@dataclass
class Run:
    """A run that passed the schema.

    epochs: the records of log.txt, in order and without a gap.
    experiment: the folders above the run that name no data set, network, method or seed.
    """

    path: Path
    experiment: str
    config: dict
    epochs: list

    @property
    def options(self):
        return self.config["options"]

    @property
    def method(self):
        return METHODS[self.options["optim_method"]]

    @property
    def model(self):
        return self.config["model"]

    @property
    def finished(self):
        return len(self.epochs) == self.options["epochs"]

    @property
    def progress(self):
        return f"{len(self.epochs)} of {self.options['epochs']} epochs"

    @property
    def test_error(self):
        return 100 - self.epochs[-1]["test_acc"]

    @property
    def losses(self):
        """The training loss of each epoch."""
        return [epoch["train_loss"] for epoch in self.epochs]


# The schema


class Unusable(ValueError):
    """Why a run cannot be used, as the end of a sentence."""


class Kind(NamedTuple):
    """What a single value may be, in words and as a test. An optional one may be null or not there."""

    words: str
    allows: Callable
    optional: bool = False


LARGEST = 3e38  # training is in float32; and the sum of two such numbers is a number yet
OTHER = ...  # in a shape: every key that has no entry of its own


def is_number(value, low=-LARGEST, high=LARGEST):
    """Whether it is a number in this range: no truth value, infinity or NaN."""
    return type(value) in (int, float) and low <= value <= high


def number(low, high=LARGEST):
    return Kind(f"a number from {low} to {high:g}", lambda value: is_number(value, low, high))


def whole(low):
    return Kind(f"a whole number from {low} on", lambda value: type(value) is int and is_number(value, low))


def or_null(kind):
    return Kind(f"{kind.words}, or null", lambda value: value is None or kind.allows(value))


def optional(kind):
    return or_null(kind)._replace(optional=True)


def is_plain(value):
    return value is None or isinstance(value, (str, bool)) or is_number(value)


def are_rising_epochs(value):
    return isinstance(value, list) and all(map(whole(1).allows, value)) and value == sorted(set(value))


NAME = Kind("a text of 1 to 1000 characters", lambda value: isinstance(value, str) and 0 < len(value) <= 1000)
DROPS = Kind("a list of rising epochs", are_rising_epochs)
METHOD = Kind(f"one of {', '.join(METHODS)}", lambda value: isinstance(value, str) and value in METHODS)
PLAIN = Kind(
    "a single value or a list of such",
    lambda value: all(map(is_plain, value)) if isinstance(value, list) else is_plain(value),
)

CONFIG = {
    "options": {
        "dataset": NAME, "holdout": whole(0), "dtype": NAME, "epochs": whole(1), "epoch_step": DROPS,
        "lr_decay_ratio": number(0), "batch_size": whole(1), "optim_method": METHOD, "lr": number(0),
        "lrg": or_null(number(0)), "momentum": number(0), "weight_decay": number(0), "bn_decay": number(0),
        "omega": or_null(number(0)), "grad_clip": or_null(number(0)), "select": or_null(NAME),
        "seed": whole(0), OTHER: PLAIN,
    },
    "data": {"name": NAME, "sha256": NAME, "train_images": whole(1), "test_images": whole(1)},
    "model": NAME, "device": NAME, "torch": optional(NAME), "git_commit": optional(NAME),
    "float32_convolutions": optional(NAME), "processes": optional(whole(1)), "weights_from": optional(NAME),
}  # fmt: skip
RECORD = {
    "epoch": whole(1), "train_loss": number(0), "test_acc": number(0, 100), "train_time": number(0),
    "test_time": number(0), "images_per_sec": number(0),
}  # fmt: skip


def check(value, shape, name):
    """Raises Unusable where a value has not the shape: a Kind or, of an object, {key: its value's shape}."""
    if isinstance(shape, Kind):
        if not shape.allows(value):
            raise Unusable(f"{name} is {shortened(value)}, not {shape.words}")
        return
    if not isinstance(value, dict):
        raise Unusable(f"{name} is {shortened(value)}, not a JSON object")
    required = [key for key, part in shape.items() if key != OTHER and not getattr(part, "optional", False)]
    missing = [key for key in required if key not in value]
    if missing:
        raise Unusable(f"{name} has no {', '.join(missing)}")
    for key, item in value.items():
        if key in shape or OTHER in shape:
            check(item, shape.get(key, shape.get(OTHER)), f"{name}: {key}")


# Reading


def read_runs(roots):
    """All usable runs below `roots`, and a sentence for each that is left out."""
    runs, left_out, seen = [], [], set()

    def unreadable(error):
        left_out.append(f"{error.filename}: cannot be looked into ({error.strerror})")

    for root in roots:
        for folder, subfolders, files in os.walk(root, onerror=unreadable, followlinks=True):
            path = Path(folder)
            if path.resolve() in seen:
                subfolders.clear()  # or a link to a folder above would lead round and round
                continue
            seen.add(path.resolve())
            subfolders.sort()
            if {"config.json", "log.txt"}.isdisjoint([*files, *subfolders]):
                continue
            try:
                runs.append(read_run(path, root))
            except Unusable as error:
                reason = f"cannot be used, {error}"
                if is_authors_run(path):
                    reason = "a run of the authors' script, which has no config.json to say data and versions"
                left_out.append(f"{path}: {reason}")
    return runs, left_out


def read_run(path, root):
    """The run in directory `path`, found below `root`. Raises Unusable."""
    config = parse(read(path / "config.json"), "config.json")
    options = config.get("options") if isinstance(config, dict) else None
    if isinstance(options, dict):  # older runs could not hold anything out, nor select by measurement
        options.setdefault("holdout", 0)
        options.setdefault("select", None if options.get("optim_method") == "SGD" else "shape")
    check(config, CONFIG, "config.json")
    return Run(path, experiment_of(path, root, config), config, read_log(path / "log.txt", options))


def read_log(path, options):
    """The epochs of a log in order, those of a run with these options. Raises Unusable."""
    if not os.path.lexists(path):  # the run has just begun
        return []
    epochs = {}
    for place, record in log_records(path):
        check(record, RECORD, place)
        epoch = record["epoch"]
        if epoch in epochs:
            raise Unusable(f"log.txt has epoch {epoch} twice")
        epochs[epoch] = record
        rates = () if epoch == 1 else ("lr", "lrg")  # they drop
        for name in options.keys() & record.keys() - {*MAY_CHANGE, *rates}:
            if record[name] != options[name]:
                raise Unusable(f"log.txt is of another run than config.json: {name} differs")
    if len(epochs) > options["epochs"]:
        raise Unusable(f"log.txt has {len(epochs)} epochs, and config.json {options['epochs']}")
    for epoch in range(1, len(epochs) + 1):
        if epoch not in epochs:
            raise Unusable(f"log.txt has later epochs, but not epoch {epoch}")
    return [epochs[epoch] for epoch in sorted(epochs)]


def log_records(path) -> Iterator:
    """(place, value) of a log's lines. What follows the last line end is being written, and is left alone."""
    for count, line in enumerate(read(path).split(b"\n")[:-1], 1):
        place = f"line {count} of log.txt"
        if not line.startswith(b"json_stats:"):
            raise Unusable(f"{place} does not begin with json_stats")
        yield place, parse(line.removeprefix(b"json_stats:"), place)


def read(path):
    """The bytes of a file. Raises Unusable."""
    try:
        if path.exists() and not path.is_file():
            raise Unusable(f"{path.name} is not a file")  # reading a pipe would never end
        return path.read_bytes()
    except OSError as error:
        raise Unusable(f"{path.name} cannot be read ({error.strerror})") from error


def parse(content, name):
    """The value of JSON in UTF-8. Raises Unusable."""
    try:
        return json.loads(content.decode())
    except (ValueError, RecursionError) as error:
        raise Unusable(f"{name} is not JSON ({error})") from error


def is_authors_run(path):
    """Whether the authors' script wrote the log: options have their flags' names, and there is no config."""
    try:
        _, record = next(log_records(path / "log.txt"), (None, None))
    except Unusable:
        return False
    return not (path / "config.json").exists() and isinstance(record, dict) and "batchSize" in record


def experiment_of(path, root, config):
    """Below `logs`, `own-rates/CIFAR10/wrn-10-1/SGD/seed0` is of the experiment `own-rates`."""
    options = config["options"]
    names = [config["data"]["name"], config["model"]]
    names += [options[name] for name in ("dataset", "model", "optim_method") if options.get(name)]
    known = {letters(str(name)) for name in names}
    parts = path.relative_to(root).parts[:-1]  # the last one is the run's own name, whatever it says
    return "/".join(part for part in parts if letters(part) not in known)


def letters(name):
    """What data sets and networks are told apart by: the folder `cifar10-jpeg` is for CIFAR-10 (JPEG)."""
    return re.sub(r"[\W_]", "", name.lower())
