"""What a person sees of a run: start, progress, epochs, TensorBoard, diagnostics, evaluation, --summary.

Tables and the lines of a run fit 80 columns.
"""

import json
import os
import platform
import shlex
import sys
import textwrap
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager, nullcontext
from typing import TYPE_CHECKING

import cv2
import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

import distributed
from grassmann_optimizer import grassmann_weights, orthogonality_gradient, project, unit
from options import CHANGES_ON_RESUME, Options, model_name
from utils import CONFIG, LOG, counted, environment, git_commit, printable, write_whole

if TYPE_CHECKING:
    from main import Training

# ------------------------------------------------------------------------------------------------ the console


def print_start(options: Options, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """The options, the device, every parameter with its shape and group, and the totals."""
    words = ", ".join(f"{name} {value}" for name, value in options.of_run().items())
    print(textwrap.fill(printable(f"options: {words}"), 80, subsequent_indent="  "))
    where = environment(next(model.parameters()).device)
    print(f"device: {where['device']}, {where['threads']} threads, torch {where['torch']}")
    if (size := distributed.world_size()) > 1:
        print(f"processes: {size}, {options.batch_size // size} images of each batch to each")
    group_of = group_names(optimizer)
    for name, p in model.named_parameters():
        print(f"  {name:34} {' x '.join(map(str, p.shape)):19} {group_of[p]}")
    for group in optimizer.param_groups:
        elements = sum(p.numel() for p in group["params"])
        print(f"{group['name']}: {elements:,} parameters in {len(group['params'])} tensors")
    print(f"in all: {sum(p.numel() for p in model.parameters()):,} parameters", flush=True)


def group_names(optimizer: torch.optim.Optimizer) -> dict[Tensor, str]:
    """The name of each parameter's group."""
    return {p: group["name"] for group in optimizer.param_groups for p in group["params"]}


@torch.no_grad()
def print_weights(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Print each parameter's mean, deviation and group, and of matrices the rows' norms and largest |cos|."""
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


def print_summary(
    options: Options, model: nn.Module, optimizer: torch.optim.Optimizer, state: dict | None
) -> None:
    """`print_start`, the weights of a checkpoint if there is one, and multiply-adds."""
    print_start(options, model, optimizer)
    if state:
        model.load_state_dict(state["model"])
        print_weights(model, optimizer)
    print(f"multiply-adds of one image: {multiply_adds(model):,}")


def multiply_adds(model: nn.Module) -> int:
    """Of a forward pass of one image; leaves the model in evaluation mode."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.eval()(torch.zeros(1, 3, 32, 32, device=next(model.parameters()).device))
    return counter.get_total_flops() // 2


def print_stopped(t: "Training", reason: str, steps: int) -> None:
    """Why, where, and how to go on; steps: of an epoch."""
    size, here = distributed.world_size(), distributed.local_world_size()
    way = f"{shlex.quote(sys.executable)} main.py --resume {shlex.quote(str(t.options.save))}"
    if size > 1:
        way += f" --ngpu {size}" if here == size else f", with {size} processes"
    where = f"after {counted(t.epoch, 'epoch')} and {t.batch} of {counted(steps, 'step')}"
    print(printable(f"stopped by {reason} {where}; to continue: {way}"))


def print_finished(t: "Training") -> None:
    """The last test error, and where the logs are."""
    error = 100 - t.history[-1]["test_acc"]
    where = printable(str(t.options.save))
    print(f"finished {counted(t.epoch, 'epoch')}: test error {error:.2f}%; logs are in {where}")


def print_evaluation(t: "Training", logits: Tensor, labels: Tensor) -> None:
    """Test loss, top-1 and (of more than five classes) top-5 error, and each class's error.

    Args:
        logits: (N, classes) float on the CPU. labels: (N,).
    """
    wrong, classes = logits.argmax(1) != labels, t.data.classes
    kind = "held-out training" if t.options.holdout else "test"
    steps = f" and {counted(t.batch, 'step')}" if t.batch else ""
    trained = f"{model_name(t.options)} after {counted(t.epoch, 'epoch')}{steps}"
    print(printable(f"{trained}, on {len(labels):,} {kind} images of {t.data.name}:"))
    line = f"loss {cross_entropy(logits, labels):.4f}, top-1 error {100 * wrong.double().mean():.2f}%"
    if len(classes) > 5:
        top5_wrong = (logits.topk(5).indices != labels[:, None]).all(1)
        line += f", top-5 error {100 * top5_wrong.double().mean():.2f}%"
    print(line)
    for index, name in enumerate(classes):
        mine = wrong[labels == index].double()
        error = f"error {100 * mine.mean():6.2f}%" if len(mine) else "no error to tell"
        print(f"  {name:30} {len(mine):7,} images  {error}")


def progress_bar(title: str, steps: int, done: int) -> tqdm:
    """The bar of an epoch on rank 0's terminal, within 80 columns; `done` of its steps are made already."""
    hidden = distributed.rank() > 0 or not sys.stderr.isatty()
    form = "{desc} |{bar}| {n_fmt}/{total_fmt} [{remaining}{postfix}]"
    return tqdm(total=steps, initial=done, desc=title, bar_format=form, leave=False, disable=hidden)


# ------------------------------------------------------------------------------------------- files of the run


def write_config(t: "Training") -> None:
    """config.json: what the run is and where it comes from; the call's device, versions and git commit."""
    versions = {
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "cuda": torch.version.cuda,
        "numpy": np.__version__,
        "opencv": cv2.__version__,
    }
    run = {"options": t.options.of_run(), "model": model_name(t.options), "data": t.data.description()}
    call = {**environment(t.device), "versions": versions, "git_commit": git_commit()}
    text = json.dumps({**run, "weights_from": t.weights_from, **call}, indent=2) + "\n"
    write_whole(t.options.save / CONFIG, lambda file: file.write(text.encode()))


def epoch_statistics(
    t: "Training", probe: dict, test_loss: float, test_error: float, test_time: float
) -> dict:
    """The line of log.txt for the epoch that t has just finished; times in seconds, errors in %."""
    images = t.batch * t.options.batch_size
    loss, wrong = t.totals()
    return {
        "train_loss": loss / t.batch,
        "train_acc": 100 - 100 * wrong / images,
        "test_loss": test_loss,
        "test_acc": 100 - test_error,
        "epoch": t.epoch,
        "train_time": t.train_time,
        "test_time": test_time,
        "images_per_sec": images / t.train_time,
        "n_parameters": sum(p.numel() for p in t.model.parameters() if p.requires_grad),
        "num_classes": len(t.data.classes),
        **probe,
        **t.options.of_run(),
        **t.learning_rates(),  # this epoch's, in place of the first
    }


# TensorBoard sorts tags by name, so that the first ones head its page. A word of description each.
TAGS = {
    "error/test": "% of the test images that are classified wrongly, after the epoch",
    "error/train": "% of the training images that are classified wrongly, as the network learned",
    "loss/test": "cross-entropy of the test images, after the epoch",
    "loss/train": "cross-entropy of the training images, mean over the epoch's steps",
    "loss/train_by_step": "the same as it goes: mean over each tenth of an epoch, against the step",
    "rate/lr": "learning rate of what is not on G(1,n)",
    "rate/lrg": "learning rate on G(1,n): radians per unit of gradient",
    "rows/angle_degrees": "degrees that a row on G(1,n) moves in a step, mean over rows and layers",
    "rows/clipped_share": "share of the rows on G(1,n) whose gradient was clipped",
    "rows/row_cosine": "mean |cos| between different rows of a layer; 0: orthogonal",
    "speed/images_per_sec": "training images a second",
}


class RunLog:
    """What a run leaves as it goes: log.txt, TensorBoard, a line on the console. Rank 0's alone.

    log.txt has one line `json_stats: {...}` for each finished epoch.

    Args:
        history: statistics of the epochs that are finished already; log.txt starts with just these.
    """

    def __init__(self, options: Options, history: list[dict]):
        from torch.utils.tensorboard import SummaryWriter  # slow to import: only a training run needs it

        self.options = options
        lines = "".join(map(_log_line, history))
        write_whole(options.save / LOG, lambda file: file.write(lines.encode()))
        self.writer = SummaryWriter(str(options.save))

    def start(self, images: Tensor) -> None:
        """The configuration as text, and the first augmented images, (N, H, W, 3) uint8."""
        text = "\n".join(f"    {line}" for line in (self.options.save / CONFIG).read_text().splitlines())
        self.writer.add_text("config", text, 0)
        self.writer.add_images("training/augmented_images", images[:64], 0, dataformats="NHWC")

    def add_loss(self, loss: float, step: int) -> None:
        """The mean training loss of some steps up to `step`, which counts from the start of the run."""
        self._add_scalar("loss/train_by_step", loss, step)

    def add(self, stats: dict, layers: dict[str, float]) -> None:
        """A finished epoch, with diagnostics of each layer; safe on disk on return."""
        with open(self.options.save / LOG, "a") as file:
            file.write(_log_line(stats))
            file.flush()
            os.fsync(file.fileno())
        scalars = {
            **{f"loss/{part}": stats[f"{part}_loss"] for part in ("train", "test")},
            **{f"error/{part}": 100 - stats[f"{part}_acc"] for part in ("train", "test")},
            **{f"rate/{name}": stats[name] for name in ("lr", "lrg")},
            **{f"rows/{name}": stats[name] for name in GrassmannProbe.NAMES},
            "speed/images_per_sec": stats["images_per_sec"],
            **layers,
        }
        for tag, value in scalars.items():
            if value is not None:
                self._add_scalar(tag, value, stats["epoch"])
        self.writer.flush()
        train = f"train loss {stats['train_loss']:.4f} error {100 - stats['train_acc']:5.2f}%"
        test = f"test {stats['test_loss']:.4f} {100 - stats['test_acc']:5.2f}%"
        speed = f"{stats['images_per_sec']:.0f} img/s"
        print(f"epoch {stats['epoch']:3d}/{self.options.epochs}  {train}  {test}  {speed}", flush=True)

    def _add_scalar(self, tag: str, value: float, step: int) -> None:
        from torch.utils.tensorboard.summary import scalar

        summary = scalar(tag, value, new_style=True)
        summary.value[0].metadata.summary_description = TAGS.get(tag, "of one layer, as rows/...")
        self.writer.file_writer.add_summary(summary, step)

    def add_result(self, stats: dict) -> None:
        """The options and what came of them, for TensorBoard's table of runs: method and rates first."""
        from torch.utils.tensorboard.summary import hparams as hparams_summaries

        first = {"optim_method": "1 optim_method", "lr": "2 lr", "lrg": "3 lrg"}  # TensorBoard sorts by name
        hparams = {}
        for name, value in self.options.of_run().items():
            if name not in CHANGES_ON_RESUME:
                is_number = isinstance(value, (int, float))
                hparams[first.get(name, name)] = value if is_number else printable(str(value))
        # Not by add_hparams, which writes a second file.
        metrics = dict.fromkeys(("error/test", "loss/train"), 0)
        for summary in hparams_summaries(hparams, metrics):
            self.writer.file_writer.add_summary(summary, stats["epoch"])


def _log_line(stats: dict) -> str:
    return f"json_stats: {json.dumps(stats)}\n"


@contextmanager
def run_log(options: Options, history: list[dict]) -> Iterator[RunLog | None]:
    """Rank 0's RunLog, closed at the end; None on other ranks.

    What TensorBoard's thread meets on the disk is raised at the next flush, and not printed before.
    """
    before = threading.excepthook
    threading.excepthook = lambda args: issubclass(args.exc_type, OSError) or before(args)
    try:
        log = RunLog(options, history) if distributed.rank() == 0 else None
        with closing(log.writer) if log else nullcontext():
            yield log
    finally:
        threading.excepthook = before


# ------------------------------------------------------------------------------------------------ diagnostics


class GrassmannProbe:
    """What a step does on G(1,n), layer by layer: angle moved, share of rows clipped, |cos| between rows.

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
        self._before = [unit(p.flatten(1))[0] for _, p, _ in self.layers] if self.active else []
        for sums, y, (_, p, group) in zip(self.sums, self._before, self.layers, strict=False):
            gram = (y @ y.T).abs()
            rows = len(y)
            sums[2] += (gram.sum() - gram.trace()) / max(1, rows * (rows - 1))
            if group["grad_clip"] is not None:
                g = p.grad.flatten(1) + group["omega"] * orthogonality_gradient(y)
                sums[1] += (unit(project(y, g))[1] > group["grad_clip"]).float().mean()

    @torch.no_grad()
    def _measure_after(self, optimizer, args, kwargs) -> None:
        for sums, y, (_, p, _) in zip(self.sums, self._before, self.layers, strict=False):
            chord = torch.linalg.vector_norm(unit(p.flatten(1))[0] - y, dim=-1)
            sums[0] += (2 * (chord / 2).clamp(max=1).asin()).rad2deg().mean()
        self.steps += int(self.active)
        self._before = []

    def state_dict(self) -> dict:
        """What was measured since the last `read`."""
        return {"sums": self.sums, "steps": self.steps}

    def load_state_dict(self, state: dict) -> None:
        """Put that back; RuntimeError if it is of other layers."""
        self.sums.copy_(state["sums"].view_as(self.sums))
        self.steps = int(state["steps"])

    def read(self) -> tuple[dict[str, float | None], dict[str, float]]:
        """Means over the measured steps: over all layers by name, of each by its tag. Starts anew."""
        if not self.layers or not self.steps:
            return dict.fromkeys(self.NAMES), {}
        means = (self.sums / self.steps).cpu()
        scalars = {
            f"rows_by_layer_{name}/{layer}": value
            for (layer, _, _), row in zip(self.layers, means.tolist(), strict=True)
            for name, value in zip(self.NAMES, row, strict=True)
        }
        self.sums.zero_()
        self.steps = 0
        return dict(zip(self.NAMES, means.mean(0).tolist(), strict=True)), scalars
