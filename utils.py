"""What a run needs besides the mathematics: errors for the user, its directory, settings of torch, the stop.

A run is a directory: `config.json`, `log.txt`, TensorBoard events, `checkpoint.pt` and `lock`. Everything
that reads results reads such directories; everything that resumes needs only the directory.
"""

import fcntl
import json
import os
import platform
import re
import secrets
import signal
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch

import distributed

CONFIG, LOG, CHECKPOINT, LOCK = "config.json", "log.txt", "checkpoint.pt", "lock"
PREVIOUS = "checkpoint.previous.pt"  # the one before, while the run goes on
ANOTHER = "choose another --save"  # in sentences for the user


# ----------------------------------------------------------------------------------------------------- errors


class UserError(Exception):
    """Something the user can put right, in one sentence: what is wrong and what to do. Exit code 1.

    Of several processes all raise it (`distributed.raise_on_all`), and rank 0 says it.
    """


class UsageError(UserError):
    """The same for the command line itself. Exit code 2."""


def answer(run: Callable[[], int]) -> int:
    """Run it and return the exit code; what the user can put right becomes one sentence on standard error."""
    try:
        return run()
    except UserError as error:
        code = 2 if isinstance(error, UsageError) else 1
        return say(str(error), code) if distributed.rank() == 0 else code
    except BrokenPipeError:  # whoever read the output has left, as `head` does
        with suppress(OSError):  # what a notebook prints to has no number
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except ConnectionError as error:  # of `distributed.joined`
        return say(str(error), 1) if distributed.rank() == 0 else 1
    except OSError as error:
        elsewhere = hasattr(error, "happened_elsewhere")  # another process of the run says it
        return 1 if elsewhere else say(f"{error}; when that is settled, continue with --resume", 1)
    except (RuntimeError, MemoryError) as error:
        if lost := distributed.connection_error(error):
            return say(lost, 1) if distributed.rank() == 0 else 1
        if type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
            advice = "it needs a C++ compiler, or on a GPU Triton; leave it out"
            return say(f"--compile failed ({reason(error)}); {advice}", 1)
        if not is_out_of_memory(error):
            raise
        return say("out of memory; choose a smaller --batchSize, --width or --depth", 1)
    except KeyboardInterrupt:
        if distributed.launched():
            signal.signal(signal.SIGINT, signal.SIG_IGN)  # the launcher sends its own after the terminal's
        if distributed.rank() == 0:
            print("main.py: interrupted outside of training; nothing was lost", file=sys.stderr)
        return 128 + signal.SIGINT


def is_out_of_memory(error: Exception) -> bool:
    """Whether it is Python's, CUDA's or torch's word for that on the CPU."""
    kinds = (MemoryError, torch.OutOfMemoryError)
    words = ("can't allocate memory", "CUDA error: out of memory")  # where others use it
    return isinstance(error, kinds) or any(word in str(error) for word in words)


def say(sentence: str, code: int) -> int:
    """Print it as an error of main.py, and give the exit code back."""
    print(f"main.py: error: {printable(sentence)}", file=sys.stderr)
    return code


def reason(error: BaseException) -> str:
    """What it says, on one line without a closing full stop; of an error of the system its words alone."""
    words = " ".join(str(getattr(error, "strerror", None) or error).split())
    return words[:200].rstrip(".:") or type(error).__name__


def counted(number: int, word: str) -> str:
    """As 1 epoch, 2 epochs."""
    return f"{number} {word}{'s' * (number != 1)}"


def printable(words: str) -> str:
    """The words on one line of UTF-8: what a terminal cannot show, or would obey, is written as an escape."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in words)


# ------------------------------------------------------------------------------------------------------ files


def write_whole(path: Path, write: Callable[[BinaryIO], None]) -> None:
    """Let `write` fill a new file beside `path`, then rename it: a kill leaves the old file or the new one.

    Raises:
        UserError: the file cannot be written (no permission, disk full); an old one is as it was.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        with open(temporary, "xb") as file:  # made exclusively: nothing there is followed or overwritten
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        directory = os.open(path.parent, os.O_RDONLY)
        os.fsync(directory)  # the rename itself survives a power cut
        os.close(directory)
    except (OSError, RuntimeError) as error:  # torch.save reports a full disk as RuntimeError
        with suppress(OSError):
            temporary.unlink()
        raise UserError(f"cannot write {path} ({error}); free some space or choose another --save") from error


def refuse_what_is_there(save: Path) -> None:
    """UsageError where another run, or a file of another program, would be overwritten."""
    found = [name for name in (CONFIG, LOG, CHECKPOINT) if (save / name).exists()]
    if CHECKPOINT in found:
        raise UsageError(f"{save} already holds a run; continue it with --resume auto, or {ANOTHER}")
    ours = not found
    with suppress(OSError, ValueError, AttributeError, RecursionError):
        ours |= {"options", "model", "data"} <= json.loads((save / CONFIG).read_text()).keys()
    if not ours:
        raise UsageError(f"{save} holds {' and '.join(found)} of another program; {ANOTHER}")
    if LOG in found and (save / LOG).read_bytes().count(b"\n") > 1:  # else killed before its first checkpoint
        raise UsageError(f"{save} already holds a run, without its checkpoint; {ANOTHER}")


@contextmanager
def locked(save: Path, continues: bool) -> Iterator[None]:
    """Make a run's directory and hold it against a second writer; it is as before if nothing is written.

    Raises:
        UserError: it cannot be written, or a living process writes to it.
        UsageError: another run is in it and not to be continued, or a file of another program.
    """
    with ExitStack() as until_the_end:
        distributed.on_rank0(lambda: lock_directory(save, continues, until_the_end))
        yield


def lock_directory(save: Path, continues: bool, until_the_end: ExitStack) -> None:
    """`locked` on rank 0, whose directory is made if need be."""
    if str(save) != os.fsencode(save).decode(errors="replace"):
        raise UsageError(f"{save} is not UTF-8, and TensorBoard cannot write there; {ANOTHER}")
    path = save / LOCK
    new = [place for place in (path, save, *save.parents) if not place.exists()]
    try:
        save.mkdir(parents=True, exist_ok=True)
        if not continues:
            refuse_what_is_there(save)
        file = os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666), "r+b")
    except OSError as error:
        raise UserError(f"cannot write to {save} ({error.strerror}); {ANOTHER}") from error
    until_the_end.enter_context(file)
    holder = file.read().decode(errors="replace").strip()
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        way = f"wait for it, or {ANOTHER} (if that machine is gone, remove {path} and try again)"
        raise UserError(f"{save} is being written by {holder or 'another process'}; {way}") from error
    except OSError as error:
        why = f"{save} cannot be locked ({error.strerror})"
        raise UserError(f"{why}; choose a --save on a local disk") from error
    if os.fstat(file.fileno()).st_nlink == 0:  # its holder has just removed it
        raise UserError(f"{save} has just been left by another run; try again")
    if not re.match(r"(process \d+ on |$)", holder):
        raise UserError(f"{path} was not written by main.py and is left as it is; {ANOTHER}")
    file.seek(0)
    file.truncate()
    file.write(f"process {os.getpid()} on {platform.node()}".encode())
    file.flush()
    for name in (CONFIG, LOG, CHECKPOINT):
        for half in save.glob(f".{name}.*.tmp"):
            half.unlink()  # of a run that was killed in `write_whole`
    if path in new:
        until_the_end.callback(remove_if_unused, save, new)


def remove_if_unused(save: Path, new: list[Path]) -> None:
    """Leave things as they were where no run has begun; `new`: the lock, and folders from the inmost."""
    with suppress(OSError):  # somebody has removed it, or another run has come
        if not (save / CONFIG).exists():
            for place in new:
                place.rmdir() if place.is_dir() else place.unlink()


def git_commit() -> str | None:
    """The commit of this program, "-dirty" where a file has changed; None where git does not know it."""
    git = ["git", "-C", str(Path(__file__).parent)]
    clean = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    # Else of an untracked copy inside another repository it would be the other's.
    known = [*git, "ls-files", "--error-unmatch", Path(__file__).name]
    describe = [*git, "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        for command in (known, describe):
            done = subprocess.run(command, capture_output=True, env=clean, check=True)
        return done.stdout.decode().strip()
    except (OSError, subprocess.CalledProcessError):
        return None


# ---------------------------------------------------------------------------------------- repeatable settings


def environment(device: torch.device) -> dict[str, str | int]:
    """What decides the last bits of a result besides the options."""
    size = distributed.world_size()
    cuda = device.type == "cuda"
    tf32 = cuda and torch.backends.cudnn.allow_tf32 and torch.cuda.get_device_capability(device) >= (8, 0)
    return {
        "device": torch.cuda.get_device_name(device) if cuda else platform.machine() + " CPU",
        "threads": torch.get_num_threads(),
        "torch": str(torch.__version__),
        "float32_convolutions": "TF32" if tf32 else "float32",
        **({"processes": size} if size > 1 else {}),
    }


def note_environment(then: dict, device: torch.device) -> None:
    """Say what has changed since `environment` gave `then`, if anything."""
    now = environment(device)
    changed = [f"{k} {v} then, {now[k]} now" for k, v in then.items() if v != now.get(k, v)]
    if changed:
        print(f"note: the last bits of the result may differ: {printable('; '.join(changed))}", flush=True)


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


# ------------------------------------------------------------------------------------------------------- stop


class StopRequest:
    """Whether the run was asked to stop: by a signal or a deadline. The loop asks after every step.

    `deadline` is on `time.monotonic()`'s clock, in seconds. Within `with`, the first of each of SIGNALS is
    noted, and the same once more ends the process; in a thread that is not Python's main one, signals stay as
    they are. A signal or deadline of one process of a run stops all; there the signals stay caught, as a
    launcher sends them more than once, and ends by itself what does not stop in time.
    """

    SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)

    def __init__(self, deadline: float | None):
        self.deadline = deadline
        self.received = 0  # by this process
        self.before: dict[int, Any] = {}

    def __enter__(self) -> "StopRequest":
        if threading.current_thread() is threading.main_thread():
            for number in self.SIGNALS:
                by_nohup = number == signal.SIGHUP and signal.getsignal(number) == signal.SIG_IGN
                if not by_nohup:
                    self.before[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, *exception) -> None:
        if distributed.world_size() == 1:
            for number, handler in self.before.items():
                signal.signal(number, handler or signal.SIG_DFL)

    def _receive(self, number: int, frame) -> None:
        self.received = number
        if distributed.world_size() == 1:
            signal.signal(number, signal.SIG_DFL)  # asked twice, the process ends at once

    def asked(self, by_signal: bool = False) -> bool:
        """Whether to stop now, by a signal or (unless `by_signal`) the deadline; the same on every rank."""
        late = not by_signal and self.deadline is not None and time.monotonic() >= self.deadline
        received = self.received or (signal.SIGHUP if distributed.orphaned() else 0)
        number, late = distributed.all_max([received, int(late)])
        self.reason, self.exit_code = "--max_minutes", 0
        if number:
            self.reason, self.exit_code = signal.Signals(number).name, 128 + number
        return bool(number or late)
