"""What a run needs besides the mathematics: its directory, generators, errors for the user, a polite stop.

A run is a directory: `config.json`, `log.txt`, TensorBoard events, `checkpoint.pt` and `lock`. Everything
that reads results reads such directories; everything that resumes needs only the directory.
"""

import errno
import fcntl
import json
import os
import platform
import re
import signal
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

import cv2
import numpy as np
import torch

import distributed

CONFIG, LOG, CHECKPOINT, LOCK = "config.json", "log.txt", "checkpoint.pt", "lock"
PREVIOUS = "checkpoint.previous.pt"  # the one before, while the run goes on
AUTHORS_CHECKPOINT = "model.pt7"  # of the authors' PyTorch script


class UserError(Exception):
    """Something the user can mend, in one sentence: what is wrong and what to do. Ends with exit code 1."""


class UsageError(UserError):
    """The same for the command line itself. Ends with exit code 2."""


def answer(run: Callable[[], int]) -> int:
    """Run it and return the exit code; what the user can mend becomes one sentence on standard error."""
    try:
        return run()
    except UserError as error:
        return say(str(error), 2 if isinstance(error, UsageError) else 1)
    except BrokenPipeError:  # whoever read the output has left, as `head` does
        distributed.first_to_say("failed")
        with suppress(OSError):  # what a notebook prints to has no number
            number = sys.stdout.fileno()
            os.dup2(os.open(os.devnull, os.O_WRONLY), number)
        return 128 + signal.SIGPIPE
    except OSError as error:
        return say(f"{error}; when that is mended, continue with --resume", 1)
    except RuntimeError as error:
        if trouble := distributed.trouble(error):
            return say(trouble, 1) if distributed.first_to_say("failed") else 1
        if type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
            reason = " ".join(str(error).split("\n\n")[0].split())[:200]
            advice = "it needs a C++ compiler, or on a GPU Triton; leave it out"
            return say(f"--compile failed ({reason}); {advice}", 1)
        if not isinstance(error, torch.OutOfMemoryError) and "can't allocate memory" not in str(error):
            raise
        return say("out of memory; choose a smaller --batchSize, --width or --depth", 1)
    except KeyboardInterrupt:
        if distributed.launched():
            signal.signal(signal.SIGINT, signal.SIG_IGN)  # the launcher sends its own after the terminal's
        if distributed.first_to_say("failed"):
            print("main.py: interrupted outside of training; nothing was lost", file=sys.stderr)
        return 128 + signal.SIGINT


def printable(words: str) -> str:
    """The words on one line of UTF-8, whatever bytes they have: an escape for each that cannot be printed."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in words)


def say(sentence: str, code: int) -> int:
    """Print it as an error of main.py, once of all processes, and give the code back."""
    distributed.first_to_say("failed")  # others that lose the connection need not say so
    if distributed.first_to_say(sentence):
        print(f"main.py: error: {printable(sentence)}", file=sys.stderr)
    return code


# ------------------------------------------------------------------------------------------------------ files


def write_whole(path: Path, write: Callable[[BinaryIO], None]) -> None:
    """Let `write` fill a temporary file beside `path`, then rename it: a kill leaves the old file or the new
    one whole.

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
        with suppress(OSError):
            temporary.unlink()
        raise UserError(f"cannot write {path} ({error}); free some space or choose another --save") from error


def write_json(path: Path, value: dict) -> None:
    """Write `value` as indented JSON, whole or not at all."""
    write_whole(path, lambda file: file.write((json.dumps(value, indent=2) + "\n").encode()))


def claim_directory(save: Path, own: bool) -> BinaryIO:
    """Make the run's directory and lock it until the file that is returned is closed.

    Args:
        own: the run that is in it, if any, is the one to continue.

    Raises:
        UserError: it cannot be written, or a living process writes to it.
        UsageError: another run is in it, or a file of another program that a run would overwrite.
    """
    if str(save) != os.fsencode(save).decode(errors="replace"):
        raise UsageError(f"{save} is not UTF-8, and TensorBoard cannot write there; choose another --save")
    try:
        save.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write to {save} ({error.strerror}); choose another --save") from error
    there = [name for name in (CONFIG, LOG, CHECKPOINT, AUTHORS_CHECKPOINT) if (save / name).exists()]
    other = "choose another --save"
    if there and not own and is_ours(save, there):
        raise UsageError(f"{save} already holds a run; continue it with --resume auto, or {other}")
    logged = (save / LOG).read_text(errors="replace").count("\n") if LOG in there else 0
    # A run that was killed before it wrote its first checkpoint has logged one epoch at most.
    if there and not (is_ours(save, there) and (CHECKPOINT in there or logged <= 1)):
        names = " and ".join(there)
        raise UsageError(f"{save} holds {names} but no checkpoint of main.py, and is left as it is; {other}")
    return lock_directory(save)


def is_ours(save: Path, there: list[str]) -> bool:
    """Whether main.py wrote the files `there`: a run has its config.json before anything else."""
    if CHECKPOINT in there:
        return True  # as far as a name tells; `load_checkpoint` looks into it
    return {"options", "model", "data"} <= read_config(save).keys()


def read_config(save: Path) -> dict:
    """What config.json says; nothing where it is not there or not whole."""
    try:
        config = json.loads((save / CONFIG).read_text())
    except (OSError, ValueError, RecursionError):
        return {}
    return config if isinstance(config, dict) else {}


def lock_directory(directory: Path) -> BinaryIO:
    """Lock a run's directory against a second writer until the returned file is closed.

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
    file.seek(0)
    if not re.match(rb"(process \d+ on |$)", file.read()):
        file.close()
        raise UsageError(f"{path} was not written by main.py and is left as it is; choose another --save")
    file.truncate(0)
    file.write(f"process {os.getpid()} on {platform.node()}".encode())
    file.flush()
    return file


def write_config(save: Path, config: dict, device: torch.device) -> None:
    """config.json: what the run is (options, model, data); the call's device, versions and git commit."""
    git = ["git", "-C", str(Path(__file__).parent)]
    try:
        describe = [*git, "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
        process = subprocess.run(describe, capture_output=True, text=True, errors="replace")
        commit, reason = process.stdout.strip(), process.stderr.strip()
    except OSError as error:
        commit, reason = "", str(error)
    versions = {
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "cuda": torch.version.cuda,
        "numpy": np.__version__,
        "opencv": cv2.__version__,
    }
    where = {**environment(device), "versions": versions, "git_commit": commit or None}
    if not commit:
        where["git_error"] = reason
    write_json(save / CONFIG, {**config, **where})


def environment(device: torch.device) -> dict[str, str | int]:
    """What decides the last bits of a result besides the options."""
    processes = {"processes": distributed.size()} if distributed.size() > 1 else {}
    cuda = device.type == "cuda"
    tf32 = cuda and torch.backends.cudnn.allow_tf32 and torch.cuda.get_device_capability(device) >= (8, 0)
    return {
        "device": torch.cuda.get_device_name(device) if cuda else platform.machine() + " CPU",
        "threads": torch.get_num_threads(),
        "torch": str(torch.__version__),
        "float32_convolutions": "TF32" if tf32 else "float32",
        **processes,
    }


@contextmanager
def repeatable() -> Iterator[None]:
    """Torch's global settings: deterministic, TF32 for convolutions only; and two warnings off.

    Afterwards they are the caller's again.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    cudnn = torch.backends.cudnn
    before = cudnn.deterministic, cudnn.allow_tf32
    cudnn.deterministic = True  # channels_last lets cuDNN choose well without a search
    # TF32 for float32 convolutions only: the regularizer needs exact matrix products.
    cudnn.allow_tf32 = True
    with warnings.catch_warnings():
        # GradScaler may skip a first step, and a schedule is put where it was before any step.
        warnings.filterwarnings("ignore", message="Detected call of `lr_scheduler.step")
        warnings.filterwarnings("ignore", message="TensorFloat32 tensor cores")  # as chosen above
        try:
            yield
        finally:
            cudnn.deterministic, cudnn.allow_tf32 = before


def note_environment(then: dict, device: torch.device) -> None:
    """Say what has changed since `environment` gave `then`, if anything."""
    now = environment(device)
    then = {key: value for key, value in then.items() if key != "processes"}  # these have a note of their own
    changed = [f"{key} {old} then, {now[key]} now" for key, old in then.items() if old != now[key]]
    if changed:
        print(f"note: the last bits of the result may differ: {'; '.join(changed)}", flush=True)


def note_slow_bfloat16(dtype: str, device: torch.device) -> None:
    """Say so where bfloat16 is slower than float32: on an x86 CPU without instructions for it."""
    if dtype == "bfloat16" and device.type == "cpu":
        has = getattr(torch.cpu, "get_capabilities", dict)()  # torch that has no such function cannot tell
        if has.get("architecture") == "x86_64" and not (has.get("amx_bf16") or has.get("avx512_bf16")):
            print("note: this CPU has no bfloat16 instructions; float32 is several times faster", flush=True)


# ------------------------------------------------------------------------------------------------- generators


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


def seed_rank(seed: int, epoch: int, batch: int) -> None:
    """Start the generators of a rank above 0, for dropout of its own; rank 0 has a single process's."""
    if rank := distributed.rank():
        sequence = np.random.SeedSequence(seed, spawn_key=(epoch, batch, rank))
        torch.manual_seed(int(sequence.generate_state(1, np.uint64)[0]))


# ------------------------------------------------------------------------------------------------------- logs


class RunLog:
    """log.txt: one line `json_stats: {...}` for each finished epoch.

    Args:
        directory: the run's.
        history: statistics of the epochs that are finished already; the file starts with just these.
    """

    def __init__(self, directory: Path, history: list[dict]):
        self.path = directory / LOG
        lines = "".join(map(_log_line, history))
        write_whole(self.path, lambda file: file.write(lines.encode()))

    def add(self, stats: dict) -> None:
        """Append an epoch's statistics, safe on disk on return."""
        with open(self.path, "a") as file:
            file.write(_log_line(stats))
            file.flush()
            os.fsync(file.fileno())


def mend_log(directory: Path, history: list[dict]) -> None:
    """Write log.txt anew where a finished run's has not all epochs of its checkpoint."""
    log = directory / LOG
    if not log.is_file() or log.read_bytes() != "".join(map(_log_line, history)).encode():
        RunLog(directory, history)
        print(f"note: {log} differed from the checkpoint's epochs, and was written anew", flush=True)


def _log_line(stats: dict) -> str:
    return f"json_stats: {json.dumps(stats)}\n"


# ------------------------------------------------------------------------------------------------------- stop


class StopRequest:
    """Whether the run was asked to stop: by a signal or a deadline. The loop asks after every step.

    Args:
        deadline: on `time.monotonic()`'s clock, in seconds; None: none.

    Within `with`, the first of each of SIGNALS is noted, and the same once more ends the process; in a thread
    that is not Python's main one, signals stay as they are. Where the run has several processes, a signal or
    deadline of one stops all; the launcher sends its signals more than once, and ends by itself what does not
    stop in time, so that there the signals stay caught.
    """

    SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)

    def __init__(self, deadline: float | None):
        self.deadline = deadline
        self.received = self.signal = 0  # by this process; by any, when they last agreed
        self.before: dict[int, Any] = {}

    def __enter__(self) -> "StopRequest":
        if threading.current_thread() is threading.main_thread():
            for number in self.SIGNALS:
                by_nohup = number == signal.SIGHUP and signal.getsignal(number) == signal.SIG_IGN
                if not by_nohup:
                    self.before[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, *exception) -> None:
        if distributed.size() == 1:
            for number, handler in self.before.items():
                signal.signal(number, handler or signal.SIG_DFL)

    def _receive(self, number: int, frame) -> None:
        self.received = number
        if distributed.size() == 1:
            signal.signal(number, signal.SIG_DFL)  # asked twice, the process ends at once

    def asked(self, by_signal: bool = False) -> bool:
        """Whether to stop now, by a signal or (unless `by_signal`) the deadline; the same on every rank."""
        late = not by_signal and self.deadline is not None and time.monotonic() >= self.deadline
        received = self.received or (signal.SIGHUP if distributed.orphaned() else 0)
        self.signal, late = distributed.largest([received, int(late)])
        return bool(self.signal or late)

    @property
    def reason(self) -> str:
        """For the message: what asked for the stop."""
        return signal.Signals(self.signal).name if self.signal else "--max_minutes"

    @property
    def exit_code(self) -> int:
        """0 for the deadline, 128 + number for a signal."""
        return 128 + self.signal if self.signal else 0
