"""What a person sees of a run: its start, progress, a line for each epoch, TensorBoard, diagnostics on
G(1,n).

Also the evaluation's table and --summary. Tables and the lines of a run fit 80 columns.
"""

import sys
import textwrap
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

import distributed
from grassmann_optimizer import grassmann_weights, orthogonality_gradient, project, unit
from options import Options
from utils import CONFIG, RunLog, environment, printable

# ------------------------------------------------------------------------------------------------ the console


def print_start(
    options: Options, model: nn.Module, optimizer: torch.optim.Optimizer, device: torch.device
) -> None:
    """The options, the device, every parameter with its shape and group, and the totals."""
    words = ", ".join(f"{name} {value}" for name, value in options.of_run().items())
    print(textwrap.fill(printable(f"options: {words}"), 80, subsequent_indent="  "))
    where = environment(device)
    print(f"device: {where['device']}, {where['threads']} threads, torch {where['torch']}")
    if (size := distributed.size()) > 1:
        print(f"processes: {size}, {options.batch_size // size} images of each batch to each")
    group_of = group_names(optimizer)
    totals: dict[str, list[int]] = {}
    for name, p in model.named_parameters():
        print(f"  {name:34} {shape_text(p):19} {group_of[p]}")
        total = totals.setdefault(group_of[p], [0, 0])
        total[0] += 1
        total[1] += p.numel()
    for group, (tensors, elements) in totals.items():
        print(f"{group}: {elements:,} parameters in {tensors} tensors")
    print(f"in all: {sum(elements for _, elements in totals.values()):,} parameters", flush=True)


def group_names(optimizer: torch.optim.Optimizer) -> dict[Tensor, str]:
    """The name of each parameter's group."""
    return {p: group["name"] for group in optimizer.param_groups for p in group["params"]}


def shape_text(p: Tensor) -> str:
    """As 64 x 32 x 3 x 3."""
    return " x ".join(map(str, p.shape))


def multiply_adds(model: nn.Module, images: Tensor) -> int:
    """Of a forward pass of images (B, 3, 32, 32); leaves the model in evaluation mode."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.eval()(images)
    return counter.get_total_flops() // 2


@torch.no_grad()
def print_weights(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Of each parameter its mean, deviation and group; of matrices the rows' norms and largest |cos|."""
    group_of = group_names(optimizer)
    columns = f"{'mean':>8} {'std':>8} {'norms of rows':>15} |cos|"
    print(f"{'weights of the checkpoint':29} {columns} group")
    for name, p in model.named_parameters():
        line = f"{name:29} {p.mean():8.1e} {p.std(correction=0):8.1e} "
        if p.ndim > 1:
            y, norms = unit(p.flatten(1).float())
            cosines = (y @ y.T).fill_diagonal_(0).abs()
            line += f"{norms.min():7.3g} {norms.max():7.3g} {cosines.max():5.3f}"
        else:
            line += " " * 21
        print(f"{line} {group_of[p].partition(', ')[0]}")


def print_epoch(options: Options, stats: dict) -> None:
    """The line of a finished epoch."""
    train = f"train loss {stats['train_loss']:.4f} error {100 - stats['train_acc']:5.2f}%"
    test = f"test {stats['test_loss']:.4f} {100 - stats['test_acc']:5.2f}%"
    speed = f"{stats['images_per_sec']:.0f} img/s"
    print(f"epoch {stats['epoch']:3d}/{options.epochs}  {train}  {test}  {speed}", flush=True)


def print_evaluation(logits: Tensor, labels: Tensor, classes: tuple[str, ...], heading: str) -> None:
    """Test loss, top-1 and (of more than five classes) top-5 error, and each class's error.

    Args:
        logits: (N, classes) float on the CPU. labels: (N,). heading: what was evaluated on what.
    """
    wrong = logits.argmax(1) != labels
    print(f"{heading}:")
    line = f"loss {cross_entropy(logits, labels):.4f}, top-1 error {100 * wrong.double().mean():.2f}%"
    if len(classes) > 5:
        top5_wrong = (logits.topk(5).indices != labels[:, None]).all(1)
        line += f", top-5 error {100 * top5_wrong.double().mean():.2f}%"
    print(line)
    for index, name in enumerate(classes):
        mine = wrong[labels == index].double()
        error = f"error {100 * mine.mean():6.2f}%" if len(mine) else "no error to tell"
        print(f"  {name:30} {len(mine):7,} pictures  {error}")


class Progress:
    """The bar of an epoch on a terminal, and its clock.

    Args:
        title: as `epoch 3/200`. steps: of the whole epoch. done: of them before this process's first one.
        batch_size: images in a step.
    """

    FORM = "{desc} |{bar}| {n_fmt}/{total_fmt} [{remaining}{postfix}]"  # fits 80 columns

    def __init__(self, title: str, steps: int, done: int, batch_size: int):
        self.done, self.batch_size = done, batch_size
        self.started = time.perf_counter()
        hidden = distributed.rank() > 0 or not sys.stderr.isatty()
        form = {"bar_format": self.FORM, "leave": False, "disable": hidden}
        self.bar = tqdm(total=steps, initial=done, desc=title, **form)

    def step(self) -> None:
        """One step more."""
        self.bar.update()

    def show(self, loss: float, error: float, steps: int) -> None:
        """Mean loss and error in % so far, and the speed."""
        speed = (steps - self.done) * self.batch_size / self.seconds()
        self.bar.set_postfix_str(f"loss {loss:.4f}, error {error:.2f}%, {speed:.0f} img/s")

    def seconds(self) -> float:
        """Since the start."""
        return time.perf_counter() - self.started

    def close(self) -> None:
        """Take the bar away."""
        self.bar.close()


# ------------------------------------------------------------------------------------------- files of the run


@contextmanager
def disk_errors_said_once() -> Iterator[None]:
    """What TensorBoard's thread meets on the disk is raised at the next flush, and not printed before."""
    before = threading.excepthook

    def of_thread(args: threading.ExceptHookArgs) -> None:
        its_thread = type(args.thread).__module__.startswith("tensorboard")
        if not (its_thread and issubclass(args.exc_type, OSError)):
            before(args)

    threading.excepthook = of_thread
    try:
        yield
    finally:
        threading.excepthook = before


class Record:
    """What a run leaves as it goes: log.txt, TensorBoard, a line on the console. Rank 0's alone.

    Args:
        history: statistics of the epochs that are finished already.
    """

    def __init__(self, options: Options, history: list[dict]):
        self.options = options
        if distributed.rank() == 0:
            self.log = RunLog(options.save, history)
            self.board = Board(options.save, len(history))

    def start(self, images: Tensor) -> None:
        """The configuration and the first augmented pictures, (N, H, W, 3) uint8."""
        self.board.describe(images)

    def add(self, stats: dict, layers: dict[str, float]) -> None:
        """A finished epoch, with diagnostics of each layer."""
        self.log.add(stats)
        self.board.add(stats, layers)
        print_epoch(self.options, stats)

    def add_result(self, stats: dict) -> None:
        """The last epoch's, as what came of the options."""
        self.board.add_result(self.options, stats)

    def __enter__(self) -> "Record":
        return self

    def __exit__(self, *exception) -> None:
        if distributed.rank() == 0:
            self.board.close()


# ------------------------------------------------------------------------------------------------ TensorBoard


class Board:
    """TensorBoard's file of a run.

    Args:
        directory: the run's. finished: epochs that are logged already; what an interrupted run wrote after
        them is dropped (`purge_step`).
    """

    def __init__(self, directory: Path, finished: int):
        from torch.utils.tensorboard import SummaryWriter  # slow to import: only a training run needs it

        self.directory = directory
        self.writer = SummaryWriter(str(directory), purge_step=finished + 1 if finished else 0)

    def describe(self, images: Tensor) -> None:
        """The configuration as text, and augmented pictures (N, H, W, 3) uint8 as the first epoch sees
        them."""
        text = "\n".join(f"    {line}" for line in (self.directory / CONFIG).read_text().splitlines())
        self.writer.add_text("config", text, 0)
        self.writer.add_images("augmented pictures", images[:64], 0, dataformats="NHWC")

    def add(self, stats: dict, layers: dict[str, float]) -> None:
        """An epoch's statistics and its diagnostics of each layer, safe on disk on return."""
        scalars = {
            "loss/train": stats["train_loss"],
            "loss/test": stats["test_loss"],
            "error/train": 100 - stats["train_acc"],
            "error/test": 100 - stats["test_acc"],
            "images_per_sec": stats["images_per_sec"],
            "learning_rate/lr": stats["lr"],
            "learning_rate/lrg": stats["lrg"],
            **{f"grassmann/{name}": stats[name] for name in GrassmannProbe.NAMES},
            **layers,
        }
        for tag, value in scalars.items():
            if value is not None:
                self.writer.add_scalar(tag, value, stats["epoch"])
        self.writer.flush()

    def add_result(self, options: Options, stats: dict) -> None:
        """The options and what came of them, for TensorBoard's table of runs."""
        from torch.utils.tensorboard.summary import hparams as hparams_summaries

        metrics = {"hparam/test_error": 100 - stats["test_acc"], "hparam/train_loss": stats["train_loss"]}
        # No option: of a run that goes on to more epochs TensorBoard would show the first number.
        metrics["hparam/epochs"] = stats["epoch"]
        hparams = {}
        for name, value in options.fixed().items():
            plain = "none" if value is None else value
            hparams[name] = str(plain) if isinstance(plain, list) else plain
        # Not by add_hparams: it writes a second file, which may be read before the first and so be purged.
        for summary in hparams_summaries(hparams, metrics):
            self.writer.file_writer.add_summary(summary, stats["epoch"])
        for name, value in metrics.items():
            self.writer.add_scalar(name, value, stats["epoch"])

    def close(self) -> None:
        """Flush and close the file."""
        self.writer.close()


# ------------------------------------------------------------------------------------------------ diagnostics


class GrassmannProbe:
    """What a step does on G(1,n), layer by layer: angle moved, share of rows clipped, |cos| between different
    rows.

    Sits on the optimizer's step hooks and measures the steps before which `active` is set. Sums stay on the
    device. For SGD, which has nothing on G(1,n), it takes the directions of the layers that the authors' rule
    would put there.
    """

    NAMES = ("angle_degrees", "clipped_share", "row_cosine")

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer, device: torch.device):
        group_of = {
            p: group for group in optimizer.param_groups if group.get("grassmann") for p in group["params"]
        }
        if not group_of:
            group_of = {p: {"omega": 0.0, "grad_clip": None} for p in grassmann_weights(model).values()}
        names = {p: name for name, p in model.named_parameters()}
        self.layers = [(names[p].removesuffix(".weight"), p, group) for p, group in group_of.items()]
        self.active = False
        self.steps = 0
        self.sums = torch.zeros(len(self.layers), len(self.NAMES), device=device)
        self._before: list[Tensor] = []
        if self.layers:
            optimizer.register_step_pre_hook(self._measure_before)
            optimizer.register_step_post_hook(self._measure_after)

    @torch.no_grad()
    def _measure_before(self, optimizer, args, kwargs) -> None:
        if not self.active:
            return
        self._before = [unit(p.flatten(1))[0] for _, p, _ in self.layers]
        for sums, y, (_, p, group) in zip(self.sums, self._before, self.layers, strict=True):
            gram = (y @ y.T).abs()
            rows = len(y)
            sums[2] += (gram.sum() - gram.trace()) / max(1, rows * (rows - 1))
            if group["grad_clip"] is not None:
                g = p.grad.flatten(1) + group["omega"] * orthogonality_gradient(y)
                sums[1] += (unit(project(y, g))[1] > group["grad_clip"]).float().mean()

    @torch.no_grad()
    def _measure_after(self, optimizer, args, kwargs) -> None:
        if not self.active:
            return
        for sums, y, (_, p, _) in zip(self.sums, self._before, self.layers, strict=True):
            chord = torch.linalg.vector_norm(unit(p.flatten(1))[0] - y, dim=-1)
            sums[0] += (2 * (chord / 2).clamp(max=1).asin()).rad2deg().mean()
        self.steps += 1
        self._before = []

    def state_dict(self) -> dict:
        """What was measured since the last `read`."""
        return {"sums": self.sums, "steps": self.steps}

    def load_state_dict(self, state: dict) -> None:
        """Put that back; ValueError if it is of other layers."""
        if state["sums"].shape != self.sums.shape:
            raise ValueError("its probe has other layers")
        self.sums.copy_(state["sums"])
        self.steps = state["steps"]

    def read(self) -> tuple[dict[str, float | None], dict[str, float]]:
        """Means over the measured steps: over all layers by name, of each by its tag. Starts anew."""
        if not self.layers or not self.steps:
            return dict.fromkeys(self.NAMES), {}
        means = (self.sums / self.steps).cpu()
        scalars = {
            f"per_layer_{name}/{layer}": value
            for (layer, _, _), row in zip(self.layers, means.tolist(), strict=True)
            for name, value in zip(self.NAMES, row, strict=True)
        }
        self.sums.zero_()
        self.steps = 0
        return dict(zip(self.NAMES, means.mean(0).tolist(), strict=True)), scalars
