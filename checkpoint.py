"""A run's checkpoint: written whole, and read as what it is: a file that anything may have happened to.

It holds tensors and plain Python values only, so that reading one runs no code. What the options decide
(learning rates, hyperparameters of a group, the schedule) is not taken from it: those are made anew.
"""

import json
import math
import os
import shlex
import warnings
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from utils import AUTHORS_CHECKPOINT, CHECKPOINT, PREVIOUS, UserError, write_whole


def save_checkpoint(path: Path, state: dict) -> None:
    """Write a dictionary of tensors and plain Python values, whole or not at all; keep the one before it."""
    previous = path.with_name(PREVIOUS)
    with suppress(OSError):  # there is none yet, or the file system knows no links
        previous.unlink(missing_ok=True)
        os.link(path, previous)  # not renamed: at each moment `path` is a whole checkpoint
    write_whole(path, lambda file: torch.save(state, file))


def load_checkpoint(path: Path) -> dict:
    """Read what `save_checkpoint` wrote, tensors on the CPU.

    Of a checkpoint of the authors' script there is only "model", its weights and running averages under the
    names that they have here, and "authors_epoch", the epochs that they were trained.

    Raises:
        UserError: there is none, it is damaged, or a part of it cannot be right.
    """
    if not path.is_file():
        theirs = path.with_name(AUTHORS_CHECKPOINT)
        hint = (
            f"--resume {theirs} to start from its weights" if theirs.is_file() else "--resume a run directory"
        )
        raise UserError(f"there is no checkpoint {path}; give {hint} or a checkpoint file")
    try:
        check_sums(path)
        with warnings.catch_warnings(action="ignore"):  # torch tells how it reads what cannot be right here
            state = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, MemoryError) as error:
        raise UserError(f"cannot read {path} ({error}); when that is mended, try again") from error
    except Exception as error:  # torch.load raises whatever the broken bytes lead it to
        raise UserError(
            f"{path} is not a whole checkpoint ({type(error).__name__}); {way_back(path)}"
        ) from error
    if isinstance(state, dict) and {"params", "stats"} <= state.keys():
        return from_authors(state, path)
    if not isinstance(state, dict) or not {"model", "optimizer", "options", "epoch"} <= state.keys():
        raise UserError(
            f"{path} was not written by main.py; give --resume a run directory or its checkpoint.pt"
        )
    for name, is_right in PARTS.items():
        if name not in state and name not in LATER_PARTS:
            raise UserError(f"{path} is not a whole checkpoint, it has no {name!r}; {way_back(path)}")
        if name in state and not holds(is_right, state[name]):
            raise UserError(f"{path} is a damaged checkpoint, its {name!r} cannot be right; {way_back(path)}")
    if state["epoch"] != len(state["history"]):
        raise UserError(f"{path} is a damaged checkpoint, its history has gaps; {way_back(path)}")
    return state


def holds(is_right: Callable[[Any], bool], value: Any) -> bool:
    """Whether it is right; what cannot even be looked at (a sparse tensor, a number for a list) is not."""
    try:
        return is_right(value)
    except Exception:
        return False


def check_sums(path: Path) -> None:
    """Compare the check sums that torch.save writes and torch.load does not read; any exception: damaged."""
    with open(path, "rb") as file:
        if file.read(2) == b"PK":  # else older than torch's zip format: the authors'
            with zipfile.ZipFile(file) as archive:
                if damaged := archive.testzip():
                    raise zipfile.BadZipFile(damaged)


def way_back(path: Path) -> str:
    """What to do about a damaged checkpoint."""
    previous = path.with_name(PREVIOUS)
    if path.name == CHECKPOINT and previous.is_file() and not previous.samefile(path):
        return f"the one before it is there: mv {shlex.quote(str(previous))} {shlex.quote(str(path))}"
    return "resume from another one"


# ---------------------------------------------------------------------------------- what can be right in one


def is_count(value) -> bool:
    """A whole number, 0 or above."""
    return type(value) is int and value >= 0


def is_amount(value) -> bool:
    """A finite number, 0 or above."""
    return type(value) in (int, float) and 0 <= value < math.inf


def are_tensors(value) -> bool:
    """Finite tensors by name."""
    return isinstance(value, dict) and all(
        isinstance(name, str) and isinstance(tensor, Tensor) and tensor.isfinite().all()
        for name, tensor in value.items()
    )


def is_generators(value) -> bool:
    """States of torch's generators."""
    return are_tensors(value) and "cpu" in value and all(t.dtype == torch.uint8 for t in value.values())


def is_sums(value) -> bool:
    """An epoch's sums of loss and wrong answers."""
    return value.shape == (2,) and value.dtype == torch.float64 and all(map(is_amount, value.tolist()))


def is_statistics(value) -> bool:
    """Of an epoch, as they stand in log.txt."""
    numbers = ("train_loss", "train_acc", "test_loss", "test_acc", "images_per_sec", "lr")
    return isinstance(value, dict) and all(is_amount(value.get(name)) for name in numbers)


def is_history(value) -> bool:
    """Statistics of the epochs 1, 2, ..., which log.txt can hold."""
    if not isinstance(value, list) or not all(map(is_statistics, value)):
        return False
    try:
        json.dumps(value, allow_nan=False)
    except (TypeError, ValueError, RecursionError):
        return False
    return [stats.get("epoch") for stats in value] == list(range(1, len(value) + 1))


def is_optimizer(value) -> bool:
    """The state of each parameter by its number, and groups of such numbers."""
    return (
        isinstance(value, dict)
        and isinstance(value.get("state"), dict)
        and isinstance(value["param_groups"], list)
        and all(isinstance(group, dict) for group in value["param_groups"])
        # A second moment may be infinite where nothing is clipped.
        and all(
            is_count(number) and not any(tensor.isnan().any() for tensor in (state or {}).values())
            for number, state in value["state"].items()
        )
    )


PARTS = {
    "options": lambda value: isinstance(value, dict),
    "model": are_tensors,
    "optimizer": is_optimizer,
    "scaler": lambda value: isinstance(value, dict) and all(map(is_amount, value.values())),
    "probe": lambda value: type(value) is dict
    and is_count(value["steps"])
    and are_tensors({"sums": value["sums"]}),
    "epoch": is_count,
    "batch": is_count,
    "train_time": is_amount,
    "history": is_history,
    "weights_from": lambda value: value is None or isinstance(value, str),
    "generators": is_generators,
    "sums": is_sums,
    "other_ranks": lambda value: (
        isinstance(value, list)
        and all(
            isinstance(rank, dict) and is_generators(rank.get("generators")) and is_sums(rank.get("sums"))
            for rank in value
        )
    ),
    "environment": lambda value: isinstance(value, dict),
    "data_sha256": lambda value: isinstance(value, str),
    "statistics": lambda value: (
        all(map(is_amount, value[0] + value[1])) and len(value[0]) == len(value[1]) == 3 and min(value[1]) > 0
    ),
}
HYPERPARAMETERS = ("initial_lr", "momentum", "nesterov", "weight_decay")
HYPERPARAMETERS += ("omega", "grad_clip", "beta2", "epsilon")
LATER_PARTS = {"weights_from", "other_ranks", "statistics"}  # not in each run, or not in older ones'


# ---------------------------------------------------------------------------------------- back into the run


@contextmanager
def reading_checkpoint() -> Iterator[None]:
    """Turns what a checkpoint of another model leads to into a UserError."""
    try:
        yield
    except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
        reason = "".join(str(error).splitlines()[:1]).rstrip(".:")
        raise UserError(
            f"the checkpoint is of another model or not whole ({reason}); start a new run"
        ) from error


def load_model(model: nn.Module, stored: dict[str, Tensor]) -> None:
    """Put back weights and running averages; RuntimeError or ValueError where they are of another model."""
    model.load_state_dict(stored)
    if any(stored[name].dtype != own.dtype for name, own in model.state_dict().items()):
        raise ValueError("its weights are in another precision")


def load_optimizer(optimizer: torch.optim.Optimizer, stored: dict, steps: int) -> None:
    """Put back the state of each parameter; ValueError where it is not of this optimizer.

    The groups' options stay as they are: the run's options and the schedule say them.

    Args:
        steps: those that were made for sure.
    """
    # The groups with numbers for parameters; for each number the parameter, and whether it has state.
    groups, places = [], []
    for group in optimizer.param_groups:
        numbers = list(range(len(places), len(places) + len(group["params"])))
        groups.append({**group, "params": numbers})
        places += [(p, group["momentum"] or group.get("grassmann")) for p in group["params"]]
    if [group.get("params") for group in stored["param_groups"]] != [group["params"] for group in groups]:
        raise ValueError("its parameter groups are others")
    for old, group in zip(stored["param_groups"], groups, strict=True):
        if any(old.get(name, group.get(name)) != group.get(name) for name in HYPERPARAMETERS):
            raise ValueError("its optimizer has other hyperparameters than its options")
    states = stored["state"]
    if states.keys() - set(range(len(places))):
        raise ValueError("its optimizer's state is of other parameters")
    for number, (p, has_state) in enumerate(places):
        state = states.get(number) or {}  # None: of a ZeroRedundancyOptimizer
        if has_state and not state and (steps or any(states.values())):
            raise ValueError("it lacks the optimizer's state of a parameter")
        shapes = {"momentum_buffer": p.shape, "second_moment": (len(p), 1), "step": ()}
        for name, value in state.items():
            if value.shape != shapes.get(name) or value.dtype != torch.float32:
                raise ValueError("its optimizer's state has other shapes")
            if name != "momentum_buffer" and not (value >= 0).all():
                raise ValueError(f"its optimizer's {name} is below 0")
            if name == "step" and steps and not value == steps:
                raise ValueError("its optimizer has made another number of steps")
    optimizer.load_state_dict({"state": states, "param_groups": groups})


def from_authors(state: dict, path: Path) -> dict:
    """What `load_checkpoint` gives for a checkpoint of the authors' script; UserError if it is broken."""
    try:
        new_name = {
            name: name if name.endswith((".weight", ".bias")) else f"{name}.weight"
            for name in state["params"]
        }
        params = {new_name[name]: value for name, value in state["params"].items()}
        weights = {**params, **state["stats"]}
    except (AttributeError, TypeError) as error:
        raise UserError(f"{path} is a broken checkpoint of the authors' script ({error})") from error
    return {"model": weights, "authors_epoch": state.get("epoch", "an unknown number of")}


def load_weights(model: nn.Module, checkpoint: dict) -> str | None:
    """The weights and running averages of a checkpoint, alone.

    Of an authors' one it prints what is left out, and returns where the weights come from.

    Raises:
        UserError: they are of another model.
    """
    own = model.state_dict()
    # The authors' checkpoints do not count the batches, which nothing here reads.
    counts = {name: value for name, value in own.items() if name.endswith("num_batches_tracked")}
    try:
        model.load_state_dict({**counts, **checkpoint["model"]})
    except (AttributeError, RuntimeError, TypeError) as error:
        reason = " ".join(str(error).split())[:200]
        advice = "check --model, --depth and --width"
        raise UserError(f"the checkpoint's weights do not fit ({reason}); {advice}") from error
    if "authors_epoch" not in checkpoint:
        return None
    origin = f"the authors' script after {checkpoint['authors_epoch']} epochs"
    left_out = "the epoch and the optimizer's state are not taken over, and it has no options"
    print(f"note: weights of {origin}; {left_out}", flush=True)
    return origin
