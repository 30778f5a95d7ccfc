"""The processes of one run, as torchrun starts them; a run of one process is the case without any of it.

Every process (rank) holds all weights and images. They differ in their slices of each batch, in dropout and
in the statistics that batch normalization takes of a slice. Rank 0 alone reads and writes a run's directory,
and it alone prints.
"""

import logging
import os
import pickle
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, redirect_stdout
from typing import Any, NoReturn, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

T = TypeVar("T")
_launcher = 0  # the process that started this one


def launched() -> bool:
    """Whether a launcher such as torchrun has started this process as one of several."""
    return "RANK" in os.environ and os.environ.get("WORLD_SIZE", "1") != "1"


def rank() -> int:
    """This process's number, from 0. Before the processes have joined it is what the launcher said."""
    if dist.is_initialized():
        return dist.get_rank()
    said, size = (os.environ[name] if launched() else "" for name in ("RANK", "WORLD_SIZE"))
    makes_sense = said.isdigit() and size.isdigit() and int(said) < int(size)
    return int(said) if makes_sense else 0  # what makes none, `joined` says


def world_size() -> int:
    """How many processes the run has."""
    return dist.get_world_size() if dist.is_initialized() else 1


def local_rank() -> int:
    """This process's number among those on its machine."""
    return int(os.environ.get("LOCAL_RANK", rank() % max(1, torch.cuda.device_count())))


def local_world_size() -> int:
    """How many processes of the run are on this machine; a launcher that does not say it gave each a GPU."""
    if world_size() == 1:
        return 1
    return int(os.environ.get("LOCAL_WORLD_SIZE", min(world_size(), torch.cuda.device_count() or 1)))


def orphaned() -> bool:
    """Whether the launcher has gone since this process joined the others."""
    return world_size() > 1 and os.getppid() != _launcher


def launch(count: int, program: list[str]) -> NoReturn:
    """Replace this process by torchrun, which runs `python *program` in `count` processes on this machine."""
    if not torch.cuda.is_available():  # each process its share of the cores
        os.environ.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // count)))
    # The address by number: not every machine can resolve its own name.
    here = ["--standalone", "--local-addr", "127.0.0.1", "--nproc_per_node", str(count)]
    os.execv(sys.executable, [sys.executable, "-m", "torch.distributed.run", *here, *program])


@contextmanager
def silent_above_rank_0() -> Iterator[None]:
    """Ranks above 0 print nothing to standard output."""
    if rank() == 0:
        yield
        return
    logging.disable(logging.WARNING)  # torch's, when it compiles: rank 0 has the same
    try:
        with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere):
            yield
    finally:
        logging.disable(logging.NOTSET)


@contextmanager
def joined() -> Iterator[None]:
    """Join the other processes, if a launcher has started any.

    CPU tensors travel by gloo, a GPU's by NCCL. A process that fails leaves at once; the others then find the
    connection lost (`connection_error`).

    Raises:
        ConnectionError: the processes did not find each other.
    """
    global _launcher
    if not launched():
        yield
        return
    _launcher = os.getppid()
    said = {name: os.environ.get(name) for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")}
    words = ", ".join(f"{name}={value!r}" for name, value in said.items())
    print(f"processes: waiting for each other, with {words}", flush=True)
    try:
        if int(said["RANK"]) >= int(said["WORLD_SIZE"]):
            raise ValueError("RANK is not below WORLD_SIZE")
        if local_rank() < torch.cuda.device_count():  # else the run is on CPUs, or `check_options` refuses it
            torch.cuda.set_device(local_rank())
        dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
        all_max([0])  # connects
    except (RuntimeError, ValueError, OSError) as error:  # torch's for the environment, the store, gloo, NCCL
        reason = " ".join(str(error).split())[:200].rstrip(".")
        way = "start by torchrun or --ngpu, or unset RANK and WORLD_SIZE"
        raise ConnectionError(
            f"the processes of the run did not meet ({reason}); the environment says {words}; {way}"
        ) from error
    yield
    all_max([0])  # torchrun takes one that leaves early, with an exit code, for a failure
    dist.destroy_process_group()


# -------------------------------------------------------------------------------------------------- agreement


def all_max(numbers: list[int]) -> list[int]:
    """The largest of all processes' numbers, place by place."""
    if world_size() > 1:
        tensor = torch.tensor(numbers)
        dist.all_reduce(tensor, dist.ReduceOp.MAX)
        return tensor.tolist()
    return numbers


def all_gather(mine: T) -> list[T]:
    """Every process's value, by rank."""
    if world_size() == 1:
        return [mine]
    gathered: list[Any] = [None] * world_size()
    dist.all_gather_object(gathered, mine)
    return gathered


def all_sum(numbers: list[float]) -> list[float]:
    """The sums of all processes' numbers, place by place."""
    return [sum(place) for place in zip(*all_gather(numbers), strict=True)]


def on_rank0(make: Callable[[], T]) -> T:
    """Rank 0's `make()`, on every rank; what it raises is raised on all."""
    value = raise_on_all(make if rank() == 0 else lambda: None)
    if world_size() > 1:
        values = [value]
        dist.broadcast_object_list(values)
        value = value if rank() == 0 else values[0]
    return value


def raise_on_all(make: Callable[[], T]) -> T:
    """This process's `make()`; what one raises is raised on all: its own, or the first rank's."""
    value, own = None, None
    try:
        value = make()
    except (Exception, SystemExit) as error:
        own = error
    # Gathered before it is raised: a process that left at once would cut the others off.
    errors = all_gather(_portable(own))
    if own:
        raise own
    for error in filter(None, errors):
        error.happened_elsewhere = True  # that process says it
        raise error
    return value


def _portable(error: BaseException | None) -> BaseException | None:
    """It as other processes can take it: in words where pickle cannot carry it."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error


def broadcast_tensors(tensors: Iterable[Tensor]) -> None:
    """Put rank 0's values into all ranks' tensors."""
    if world_size() > 1:
        for tensor in tensors:
            dist.broadcast(tensor, src=0)


def parallel(model: nn.Module, sync_bn: bool) -> nn.Module:
    """What a step calls: the model; of several processes, with gradients that are averaged over them."""
    if world_size() == 1:
        return model
    if sync_bn:
        synchronize_batch_norm(model)
    # With find_unused_parameters the buckets are not arranged anew after the first step: a resumed run
    # sums in the same order as one that went on.
    with warnings.catch_warnings(action="ignore", category=FutureWarning):  # the new name is too new
        return DistributedDataParallel(model, broadcast_buffers=False, find_unused_parameters=True)


def synchronize_batch_norm(model: nn.Module) -> None:
    """Let batch normalization take its statistics of all processes' slices.

    In place, as torch's convert_sync_batchnorm cannot take over VGG's constant scale, which is no parameter.
    """
    for module in model.modules():
        if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)):
            module.__class__, module.process_group = nn.SyncBatchNorm, None


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


def connection_error(error: Exception) -> str | None:
    """What to say of an error in what the processes of the run send each other; None for any other."""
    signs = ("Connection closed by peer", "Connection reset by peer", "Connection refused", "Broken pipe")
    signs += ("remote process exited", "Timed out waiting")  # NCCL's, and gloo's of one that answers no more
    text = " ".join(str(error).split())
    if world_size() == 1:
        return None
    if isinstance(error, dist.DistNetworkError) or any(sign in text for sign in signs):
        lost = "another process of the run has gone; the last checkpoint, if any, is kept"
        return f"{lost}: continue with --resume"
    return f"the processes cannot work together: {text[:400]}" if isinstance(error, dist.DistError) else None
