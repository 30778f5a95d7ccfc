"""What a run needs besides the mathematics: errors for the user, whole files, initial weights, logs, a polite stop.

A run is a directory: `config.json`, `log.txt`, TensorBoard events and `checkpoint.pt`. Everything that reads results
reads such directories; everything that resumes needs only the directory.
"""

import errno
import fcntl
import json
import os
import platform
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

import torch
from torch import nn

CONFIG, LOG, CHECKPOINT, LOCK = "config.json", "log.txt", "checkpoint.pt", "lock"


class UserError(Exception):
    """Something the user can mend, in one sentence: what is wrong and what to do. Ends with exit code 1."""


class UsageError(UserError):
    """The same for the command line itself. Ends with exit code 2."""


# ------------------------------------------------------------------------------------------------------- files


def write_whole(path: Path, write: Callable[[BinaryIO], None]) -> None:
    """Let `write` fill a temporary file beside `path`, then rename it: a kill leaves the old file or the new one whole.

    Raises:
        UserError: the file cannot be written (no permission, disk full); an old one is as it was.
    """
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        directory = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(directory)  # the rename itself survives a power cut
        finally:
            os.close(directory)
    except (OSError, RuntimeError) as error:  # torch.save reports a full disk as RuntimeError
        temporary.unlink(missing_ok=True)
        raise UserError(f"cannot write {path} ({error}); free some space or choose another --save") from error


def write_json(path: Path, value: dict) -> None:
    """Write `value` as indented JSON, whole or not at all."""
    write_whole(path, lambda file: file.write((json.dumps(value, indent=2) + "\n").encode()))


def save_checkpoint(path: Path, state: dict) -> None:
    """Write a dictionary of tensors and plain Python values, whole or not at all."""
    write_whole(path, lambda file: torch.save(state, file))


def load_checkpoint(path: Path) -> dict:
    """Read what `save_checkpoint` wrote, tensors on the CPU.

    Raises:
        UserError: there is none, or it is broken.
    """
    if not path.is_file():
        raise UserError(f"there is no checkpoint {path}; give --resume a run directory or a checkpoint file")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises whatever the broken bytes lead it to
        raise UserError(
            f"{path} is not a whole checkpoint ({type(error).__name__}); resume from another one"
        ) from error
    keys = {"model", "optimizer", "options", "epoch"}
    if (
        not isinstance(state, dict)
        or not keys <= state.keys()
        or not isinstance(state["options"], dict)
        or not isinstance(state["epoch"], int)
    ):
        raise UserError(f"{path} was not written by main.py; give --resume a run directory or its checkpoint.pt")
    return state


def lock_directory(directory: Path) -> BinaryIO:
    """Lock a run's directory against a second writer until the returned file is closed, if only by the process's end.

    Raises:
        UserError: a living process holds the lock, on this machine or on one that shares the file system.
    """
    path = directory / LOCK
    try:
        file = open(path, "a+b")  # noqa: SIM115 (closed by the caller)
    except OSError as error:
        raise UserError(f"cannot write to {directory} ({error.strerror}); choose another --save") from error
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        file.seek(0)
        holder = file.read().decode(errors="replace").strip() or "another process"
        file.close()
        if error.errno not in (errno.EAGAIN, errno.EACCES):
            raise UserError(
                f"{directory} cannot be locked ({error.strerror}); "
                "choose a --save on a local disk, or make a folder above it a link to one"
            ) from error
        raise UserError(
            f"{directory} is being written by {holder}; wait for it, or choose another --save "
            f"(if that machine is gone, remove {path} and try again)"
        ) from error
    file.truncate(0)
    file.write(f"process {os.getpid()} on {platform.node()}".encode())
    file.flush()
    return file


# ------------------------------------------------------------------------------ initial weights and generators


@torch.no_grad()
def initialize(model: nn.Module) -> None:
    """He-normal weights (He et al., 2015, fan_in), zero biases; drawn from torch's default generator."""
    for module in model.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            nn.init.kaiming_normal_(module.weight, mode="fan_in", nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)


def generator_states(device: torch.device) -> dict[str, torch.Tensor]:
    """State of every generator that a run draws from: torch's on the CPU and on its device.

    (The data order needs none: it is a pure function of seed and epoch.)
    """
    states = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    return states


def set_generator_states(states: dict[str, torch.Tensor], device: torch.device) -> None:
    """Put the generators back to `generator_states()`, as far as the run is on a device of the same kind."""
    torch.set_rng_state(states["cpu"])
    if device.type == "cuda" and "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"], device)


# -------------------------------------------------------------------------------------------------------- logs


class RunLog:
    """The metric log of a run: `log.txt`, one `json_stats: {...}` line per epoch, and TensorBoard.

    Args:
        directory: the run's.
        history: statistics of the epochs that are finished already; log.txt starts with just these, and TensorBoard
            drops what an interrupted run wrote after them (its `purge_step`).
    """

    def __init__(self, directory: Path, history: list[dict]):
        from torch.utils.tensorboard import SummaryWriter  # slow to import: only a training run needs it

        self.path = directory / LOG
        lines = "".join(map(_log_line, history))
        write_whole(self.path, lambda file: file.write(lines.encode()))
        self.board = SummaryWriter(str(directory), purge_step=len(history) + 1 if history else 0)

    def add(self, stats: dict, scalars: dict[str, float]) -> None:
        """Append an epoch's statistics to log.txt and its scalars to TensorBoard, both safe on disk on return."""
        with open(self.path, "a") as file:
            file.write(_log_line(stats))
            file.flush()
            os.fsync(file.fileno())
        for tag, value in scalars.items():
            self.board.add_scalar(tag, value, stats["epoch"])
        self.board.flush()

    def close(self) -> None:
        """Flush and close TensorBoard's file."""
        self.board.close()


def _log_line(stats: dict) -> str:
    return f"json_stats: {json.dumps(stats)}\n"


# -------------------------------------------------------------------------------------------------------- stop


class StopRequest:
    """Whether the run was asked to stop: SIGTERM, Ctrl-C, or a deadline. The loop asks after every step.

    Args:
        deadline: on `time.monotonic()`'s clock, in seconds; None: none.
    """

    def __init__(self, deadline: float | None):
        self.deadline = deadline
        self.signal: int | None = None
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._receive)

    def _receive(self, number: int, frame) -> None:
        self.signal = number
        signal.signal(number, signal.SIG_DFL)  # asked twice, the process ends at once

    def __bool__(self) -> bool:
        return self.by_signal or (self.deadline is not None and time.monotonic() >= self.deadline)

    @property
    def by_signal(self) -> bool:
        """Whether a signal asked for it."""
        return self.signal is not None

    @property
    def reason(self) -> str:
        """For the message: what asked for the stop."""
        return signal.Signals(self.signal).name if self.by_signal else "--max_minutes"

    @property
    def exit_code(self) -> int:
        """0 for the deadline, 128 + number for a signal."""
        return 128 + self.signal if self.by_signal else 0
