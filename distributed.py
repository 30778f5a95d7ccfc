"""The processes of one run, as torchrun starts them; a run of one process is the case without any of it.

Every process (rank) holds all weights and pictures. They differ in their slices of each batch, in dropout
and in the statistics that batch normalization takes of a slice. Rank 0 alone reads and writes a run's
directory.
"""

import logging
import os
import pickle
import signal
import sys
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, redirect_stdout
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim import Optimizer

T = TypeVar("T")
_store: dist.Store | None = None  # the processes' notes to each other
_launcher = 0  # the process that started this one


def launched() -> bool:
    """Whether torchrun has started this process as one of several."""
    return "RANK" in os.environ and int(os.environ.get("WORLD_SIZE", "1")) > 1


def rank() -> int:
    """This process's number, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def size() -> int:
    """How many processes the run has."""
    return dist.get_world_size() if dist.is_initialized() else 1


def on_this_machine() -> tuple[int, int]:
    """This process's number among those of the run on its machine, and how many they are."""
    if size() == 1:
        return 0, 1
    return int(os.environ.get("LOCAL_RANK", rank())), int(os.environ.get("LOCAL_WORLD_SIZE", size()))


def orphaned() -> bool:
    """Whether the launcher has gone since this process joined the others."""
    return size() > 1 and os.getppid() != _launcher


@contextmanager
def joined() -> Iterator[None]:
    """Join the other processes, if torchrun has started any; only rank 0 goes on to print.

    CPU tensors travel by gloo, a GPU's by NCCL. A process that fails leaves at once; the others then find the
    connection lost (`trouble`).
    """
    global _store, _launcher
    if not launched():
        yield
        return
    _launcher = os.getppid()
    store, number, count = next(dist.rendezvous("env://"))
    _store = dist.PrefixStore(common_name(store, number, count), store)
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, store=_store, rank=number, world_size=count)
    if (local := on_this_machine()[0]) < torch.cuda.device_count():
        torch.cuda.set_device(local)
    if number == 0:
        yield
    else:
        logging.disable(logging.WARNING)  # torch's, when it compiles: rank 0 has the same
        with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere):
            yield
        logging.disable(logging.NOTSET)
    largest([0])  # torchrun takes one that leaves early, with an exit code, for a failure
    dist.destroy_process_group()
    _store = None


def common_name(store: dist.Store, number: int, count: int) -> str:
    """A name that rank 0 gives to this start of the processes.

    When torchrun starts them again after a death, the store still holds what the dead have written, and
    torchrun's own count of the starts may differ between machines. So each asks by a word of its own.
    """
    own = uuid.uuid4().hex
    if number > 0:
        store.set(f"{number} asks", own)
        while True:
            name, asked = store.get(f"{number} is told").decode().split()
            if asked == own:
                store.set(f"{number} knows", name)
                return name
            time.sleep(0.01)
    others = list(range(1, count))
    while others:
        for other in others:
            store.set(f"{other} is told", f"{own} {store.get(f'{other} asks').decode()}")
        time.sleep(0.01)
        known = [other for other in others if store.check([f"{other} knows"])]
        others = [
            other for other in others if other not in known or store.get(f"{other} knows").decode() != own
        ]
    return own


# -------------------------------------------------------------------------------------------------- agreement


def largest(numbers: list[int]) -> list[int]:
    """The largest of all processes' numbers, place by place."""
    if size() > 1:
        tensor = torch.tensor(numbers)
        dist.all_reduce(tensor, dist.ReduceOp.MAX)
        return tensor.tolist()
    return numbers


def values(mine: T) -> list[T]:
    """Every process's value, by rank."""
    if size() == 1:
        return [mine]
    gathered: list[Any] = [None] * size()
    dist.all_gather_object(gathered, mine)
    return gathered


def first(make: Callable[[], T]) -> T:
    """Rank 0's `make()`, on every rank; what it raises is raised on all."""
    value, error = attempt(make if rank() == 0 else lambda: None)
    if size() > 1:
        outcome = [(value, portable(error))]
        dist.broadcast_object_list(outcome)
        value, error = (value, error) if rank() == 0 else outcome[0]
    if error:
        raise error
    return value


def together(make: Callable[[], T]) -> T:
    """This process's `make()`; what one raises is raised on all: its own, or the first rank's."""
    value, error = attempt(make)
    # Gathered before it is raised: a process that left at once would cut the others off.
    errors = [error, *values(portable(error))]
    if error := next(filter(None, errors), None):
        raise error
    return value


def attempt(make: Callable[[], T]) -> tuple[T | None, BaseException | None]:
    """`make()`, or what it raises."""
    try:
        return make(), None
    except (Exception, SystemExit) as error:  # --help ends by SystemExit
        return None, error


def portable(error: BaseException | None) -> BaseException | None:
    """It as other processes can take it: in words where pickle cannot carry it."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error


def one_before_others(make: Callable[[], T]) -> T:
    """This process's `make()`; the first process of each machine makes it before the others do."""
    leads = on_this_machine()[0] == 0
    value = together(lambda: make() if leads else None)
    return together(lambda: value if leads else make())


def take_first(tensors: Iterable[Tensor]) -> None:
    """Put rank 0's values into all ranks' tensors."""
    if size() > 1:
        for tensor in tensors:
            dist.broadcast(tensor, src=0)


def zero_redundancy(kind: type[Optimizer], groups: list[dict]) -> Optimizer:
    """Each rank makes its share of the step and sends the parameters round; with momentum for its share."""
    from torch.distributed.optim import ZeroRedundancyOptimizer  # takes a second to import

    class Sharded(ZeroRedundancyOptimizer):
        """Its share loads its state as `kind` does: torch's own way puts each scalar on the CPU."""

        def load_state_dict(self, state_dict: dict) -> None:
            super().load_state_dict(state_dict)
            self.optim.load_state_dict(self.optim.state_dict())
            self.state.clear()  # a second copy, which nothing reads

    return Sharded(groups, optimizer_class=kind)


def first_to_say(sentence: str) -> bool:
    """Whether no other process of the run has said it yet, so that each message stands once."""
    try:
        return _store is None or _store.add(f"said: {sentence}", 1) == 1
    except RuntimeError:  # the store's host is gone
        return True


def trouble(error: Exception) -> str | None:
    """What to say of an error in what the processes of the run send each other; None for any other."""
    signs = ("Connection closed by peer", "Connection reset by peer", "Connection refused", "Broken pipe")
    signs += ("remote process exited", "Timed out waiting")  # NCCL's, and gloo's of one that answers no more
    text = " ".join(str(error).split())
    if not launched():
        return None
    if isinstance(error, dist.DistNetworkError) or any(sign in text for sign in signs):
        lost = "another process of the run has gone; the last checkpoint, if any, is kept"
        return f"{lost}: continue with --resume"
    return f"the processes cannot work together: {text[:400]}" if isinstance(error, dist.DistError) else None


# ----------------------------------------------------------------------------------------------------- launch


def launch(count: int, program: list[str]) -> int:
    """Run `python *program` in so many processes on this machine by torchrun; returns the exit code."""
    from torch.distributed import run  # torchrun; slow to import
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    if not torch.cuda.is_available():  # each process its share of the cores
        os.environ.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // count)))
    passed_on = ["SIGTERM", "SIGINT", "SIGQUIT", "SIGUSR1"]
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # else started by nohup: ignored by all of them
        passed_on.append("SIGHUP")
    level, caught = (
        logging.root.manager.disable,
        (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1),
    )
    handlers = {number: signal.getsignal(number) for number in caught}  # which torchrun sets and leaves
    logging.disable()  # of torchrun's: the processes say it better
    try:
        signals = f"--signals-to-handle={','.join(passed_on)}"
        run.main(["--standalone", f"--nproc_per_node={count}", signals, *program])
    except SignalException as stop:
        return 128 + stop.sigval
    except ChildFailedError as error:
        # A signal's, if any: the others end because of it. (torch would take the first by whole seconds.)
        codes = [failure.exitcode for failure in error.failures.values()]
        if asked := [code for code in codes if code > 128]:
            return asked[0]  # a stop, after which the launcher may have ended one that was just leaving
        by_signal = [number for number, failure in error.failures.items() if failure.exitcode < 0]
        number = by_signal[0] if by_signal else error.get_first_failure()[0]
        code = error.failures[number].exitcode
        if code > 0:
            return code
        # How to go on, the others have said.
        print(f"main.py: error: rank {number} was ended by {signal.Signals(-code).name}", file=sys.stderr)
        return 128 - code
    finally:
        logging.disable(level)
        for number, handler in handlers.items():
            signal.signal(number, handler)
    return 0
