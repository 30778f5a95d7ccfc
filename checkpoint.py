"""A run's checkpoint: all that knows what is in one, how it is written, read, and put back into a run.

It holds tensors and plain Python values only, so that reading one runs no code. What the options decide
(learning rates, hyperparameters of a group, the schedule) is not taken from it: those are made anew.
"""

import json
import os
import shlex
import warnings
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

import torch

import distributed
import utils
from utils import CHECKPOINT, PREVIOUS, UserError, write_whole

if TYPE_CHECKING:
    from main import Training

# What is stored as it is, and of which kind it is.
PLAIN = {"epoch": int, "batch": int, "train_time": float, "history": list, "weights_from": str | None}


# ---------------------------------------------------------------------------------------------------- writing


def run_state(t: "Training") -> dict:
    """What `restore` needs to go on from here. All ranks take part; rank 0 gets it."""
    if hasattr(t.optimizer, "consolidate_state_dict"):  # --zero
        t.optimizer.consolidate_state_dict()
    mine = {"generators": utils.generator_states(t.device), "sums": t.sums.cpu()}
    first, *others = distributed.all_gather(mine)
    if distributed.rank() > 0:
        return {}
    return {
        **{name: getattr(t, name).state_dict() for name in ("model", "optimizer", "scaler", "probe")},
        **{name: getattr(t, name) for name in PLAIN},
        **first,
        **({"other_ranks": others} if others else {}),
        "options": t.options.of_run(),
        "environment": utils.environment(t.device),
        "data_sha256": t.data.sha256,
        "statistics": [list(t.data.mean), list(t.data.std)],
        "classes": list(t.data.classes),
    }


def save_checkpoint(path: Path, state: dict) -> None:
    """Write a dictionary of tensors and plain Python values, whole or not at all; keep the one before it."""
    previous = path.with_name(PREVIOUS)
    with suppress(OSError):  # there is none yet, or the file system knows no links
        previous.unlink(missing_ok=True)
        os.link(path, previous)  # not renamed: at each moment `path` is a whole checkpoint
    write_whole(path, lambda file: torch.save(state, file))


# ---------------------------------------------------------------------------------------------------- reading


@contextmanager
def reading(path: Path | None) -> Iterator[None]:
    """The stage's one catch: whatever a checkpoint leads to becomes a sentence, a UserError.

    What is wrong with the machine and not with the file (memory, disk, GPU, packages, other processes) is
    raised as it is. So is everything where there is no file: `path` is None for a run that starts anew.
    """
    try:
        yield
    except (UserError, OSError, ImportError, torch.AcceleratorError):
        raise
    except Exception as error:
        if path is None or utils.is_out_of_memory(error) or distributed.connection_error(error):
            raise
        what = f"{path} is damaged or of another model ({utils.reason(error)})"
        raise UserError(f"{what}; {way_back(path)}") from error


def load_checkpoint(path: Path) -> dict:
    """Read what `save_checkpoint` wrote, tensors on the CPU.

    Raises:
        UserError: there is none, it is damaged, or another program wrote it.
    """
    with reading(path):
        try:
            check_sums(path)
            # torch warns of how it reads a file that is not a checkpoint at all.
            with warnings.catch_warnings(action="ignore"):
                state = torch.load(path, map_location="cpu", weights_only=True)
        except OSError as error:
            raise UserError(f"cannot read {path} ({error}); try again, or resume from another one") from error
        if not isinstance(state, dict) or not {"model", "optimizer", "options", "epoch"} <= state.keys():
            raise ValueError("main.py did not write it")
        return state


def check_sums(path: Path) -> None:
    """Compare the check sums that torch.save writes and torch.load does not read; any exception: damaged."""
    with zipfile.ZipFile(path) as archive:
        if damaged := archive.testzip():
            raise zipfile.BadZipFile(f"the check sum of {damaged} is another")


def way_back(path: Path) -> str:
    """What to do about a damaged checkpoint."""
    previous = path.with_name(PREVIOUS)
    if path.name == CHECKPOINT and previous.is_file() and not previous.samefile(path):
        return f"the one before it is there: mv {shlex.quote(str(previous))} {shlex.quote(str(path))}"
    return "resume from another one, or start a new run"


def restore(t: "Training", state: dict) -> None:
    """Go on where the checkpoint was written.

    With --eval only the weights, running averages and position are taken, and the images may be others.

    Raises:
        UserError: it is of other images. Anything else (see `reading`): it is not whole, or of another model.
    """
    if state["data_sha256"] != t.data.sha256:
        take_other_images(t, state)
    t.model.load_state_dict(state["model"])
    for name, kind in PLAIN.items():
        value = json.loads(json.dumps(state.get(name)))  # plain values, as log.txt will hold them
        if not isinstance(value, kind):
            raise ValueError(f"its {name} is {value!r}")
        setattr(t, name, value)
    if t.options.eval:
        return
    if not 0 <= t.batch <= len(t.plan()):
        raise ValueError(f"its batch is {t.batch} of {len(t.plan())}")
    load_optimizer(t.optimizer, state["optimizer"])
    for _ in range(t.epoch):
        t.schedule.step()
    t.scaler.load_state_dict(state["scaler"])
    t.probe.load_state_dict(state["probe"])
    restore_rank(t, [state, *state.get("other_ranks", [])])
    t.check_finite()
    utils.note_environment(state["environment"], t.device)


def load_optimizer(optimizer: torch.optim.Optimizer, stored: dict) -> None:
    """Put back the state of each parameter; the groups' options stay as the run's options say them.

    Raises:
        ValueError: it is of other parameters. (torch's SGD does not look.)
    """
    groups = torch.optim.Optimizer.state_dict(optimizer)["param_groups"]  # also with --zero as of one process
    if [group["params"] for group in stored["param_groups"]] != [group["params"] for group in groups]:
        raise ValueError("its parameter groups are others")
    optimizer.load_state_dict({"state": stored["state"], "param_groups": groups})
    for p, of_parameter in optimizer.state.items():
        buffer = of_parameter.get("momentum_buffer")
        if buffer is not None and buffer.shape != p.shape:
            raise ValueError("its momentum is of other parameters")


def take_other_images(t: "Training", state: dict) -> None:
    """Evaluate on them, normalized as the run's, classes matched by name; UserError where it cannot be."""
    if not t.options.eval:
        raise UserError("the checkpoint is of other images than --dataset and --dataroot name")
    ours = list(t.data.classes)
    theirs = state.get("classes", ours)
    if "classes" not in state:
        print("note: the checkpoint is an older main.py's: classes are matched by their order", flush=True)
    if odd := sorted(set(ours) ^ set(theirs)):
        raise UserError(
            f"the classes of {t.data.name} are not the checkpoint's; they differ in {', '.join(odd)}"
        )
    t.data = t.data.with_classes(theirs)
    t.mean, t.std = torch.tensor(state["statistics"], device=t.device).view(2, 1, 3, 1, 1)
    print("note: other images than the run's, normalized as the run's", flush=True)


def restore_rank(t: "Training", ranks: list[dict]) -> None:
    """This rank's sums and generators; of another number of ranks, only rank 0's go on."""
    rank, size = distributed.rank(), distributed.world_size()
    if len(ranks) == size:
        t.sums.copy_(ranks[rank]["sums"])
        utils.set_generator_states(ranks[rank]["generators"], t.device)
        return
    effects = "batch normalization and dropout see other slices from here on"
    print(f"note: {len(ranks)} processes then, {size} now: {effects}", flush=True)
    utils.seed_rank(t.options.seed, t.epoch, t.batch)
    if rank == 0:
        t.sums.copy_(sum(other["sums"] for other in ranks))
        utils.set_generator_states(ranks[0]["generators"], t.device)
