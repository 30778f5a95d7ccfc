"""Train Wide ResNet or VGG with SGD, SGD-G or Adam-G (Riemannian approach to batch normalization, NIPS 2017).

    python main.py --depth 28 --width 10 --dataset CIFAR10 --optim_method SGDG

Read from the top: the network, the optimizer over the paper's parameter groups, one step, an epoch, the run.
For a model of your own, `make_optimizer` shows all that is needed. The paper's equations are in
grassmann_optimizer.py.
"""

# ruff: noqa: E402
import time

PROCESS_START = time.monotonic()  # --max_minutes counts from here: importing torch takes seconds

import math
import os
import sys
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path

# DDP prints a hint once per process unless this is set before torch is imported.
if "WORLD_SIZE" in os.environ:
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import distributed
import report
import utils
from checkpoint import reading, restore, run_state, save_checkpoint
from data import DataSet, EpochPlan, TrainBatches, eval_batches, hold_out, load_data
from grassmann_optimizer import SGDG, AdamG, grassmann_param_groups
from options import VGGS, Options, choose_device, choose_options, find_places, nothing_to_do, parse_flags
from resnet import WideResNet
from utils import CHECKPOINT, PREVIOUS, StopRequest, UsageError, UserError
from vgg import VGG

# ---------------------------------------------------------------------------------------- model and optimizer


def make_model(options: Options, classes: int) -> nn.Module:
    """The network that --model names."""
    if options.model in VGGS:
        return VGG(VGGS[options.model], classes, options.dropout)
    return WideResNet(options.depth, options.width, classes, options.dropout)


def make_optimizer(model: nn.Module, options: Options) -> torch.optim.Optimizer:
    """The method's optimizer over the paper's parameter groups; sets the Grassmann weights to unit rows."""
    if options.optim_method == "SGD":
        groups = sgd_groups(model, options)
    else:
        groups = grassmann_param_groups(
            model, options.lr, options.lrg,
            momentum=options.momentum, omega=options.omega, grad_clip=options.grad_clip,
            weight_decay=options.weight_decay, bn_decay=options.bn_decay,
            select=options.select, loss_fn=random_loss if options.select == "measured" else None,
        )  # fmt: skip
    optimizer = {"SGD": torch.optim.SGD, "SGDG": SGDG, "AdamG": AdamG}[options.optim_method]
    if options.zero and distributed.world_size() > 1:
        return distributed.zero_redundancy(optimizer, groups)
    return optimizer(groups)


def sgd_groups(model: nn.Module, options: Options) -> list[dict]:
    """The baseline's parameter groups, with Nesterov momentum."""
    params = [p for p in model.parameters() if p.requires_grad]
    common = {"lr": options.lr, "momentum": options.momentum, "nesterov": options.momentum > 0}
    small = {"params": [p for p in params if p.ndim < 2], "weight_decay": options.bn_decay}
    weights = {"params": [p for p in params if p.ndim >= 2], "weight_decay": options.weight_decay}
    return [{**small, **common, "name": "bn_bias"}, {**weights, **common, "name": "other"}]


def random_loss(model: nn.Module) -> Tensor:
    """The loss of random images and labels: which weights are scale-invariant does not depend on them."""
    x = torch.randn(64, 3, 32, 32, device=next(model.parameters()).device)
    logits = model(x)
    return cross_entropy(logits, torch.randint(logits.shape[1], (len(x),), device=x.device))


# --------------------------------------------------------------------------------------------------- training


class Training:
    """Everything that changes while a run trains. `checkpoint.py` stores it and puts it back."""

    def __init__(self, options: Options, data: DataSet):
        self.options, self.data = options, data
        self.device = choose_device(options.device)
        torch.manual_seed(options.seed)
        self.model = make_model(options, len(data.classes)).to(self.device, memory_format=torch.channels_last)
        self.optimizer = make_optimizer(self.model, options)
        self.forward = distributed.parallel(self.model, sync_bn=options.sync_bn and not options.eval)
        if options.compile:
            # Each batch size on its own: else what was compiled before would decide how a resumed run is.
            self.forward = torch.compile(self.forward, dynamic=False)
        utils.seed_rank(options.seed, 0, 0)
        drops, ratio = options.epoch_step, options.lr_decay_ratio
        self.schedule = torch.optim.lr_scheduler.MultiStepLR(self.optimizer, drops, gamma=ratio)
        self.dtype = getattr(torch, options.dtype)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.dtype == torch.float16)
        self.probe = report.GrassmannProbe(self.model, self.optimizer, self.device)
        self.mean = torch.tensor(data.mean, device=self.device).view(1, 3, 1, 1)
        self.std = torch.tensor(data.std, device=self.device).view(1, 3, 1, 1)
        self.weights_from: str | None = None  # where the initial weights come from, if not from --seed
        self.epoch = 0  # finished epochs
        self.history: list[dict] = []  # their statistics
        self.start_epoch()

    def start_epoch(self) -> None:
        """Position and running sums at the start of an epoch; the sums stay on the device."""
        self.batch = 0  # finished batches of this epoch
        self.train_time = 0.0
        self.sums = torch.zeros(2, dtype=torch.float64, device=self.device)  # this rank's part: loss, wrong

    def step(self, x: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """One step on a batch from `inputs`; returns loss () and logits (B, classes) before the update."""
        with self.autocast():
            logits = self.forward(x)
            loss = cross_entropy(logits, labels)
        self.optimizer.zero_grad(set_to_none=True)
        self.scaler.scale(loss).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        return loss.detach(), logits.detach()

    def inputs(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """uint8 (B, H, W, 3) on the host -> normalized float32 (B, 3, H, W) on the device, channels_last."""
        x = images.to(self.device, non_blocking=True).permute(0, 3, 1, 2)
        return (x.float() - self.mean) / self.std, labels.to(self.device, non_blocking=True)

    def autocast(self) -> torch.autocast:
        """The precision that --dtype asks for."""
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)

    def plan(self) -> EpochPlan:
        """What this epoch does with this rank's images; UserError if the training set has no full batch."""
        options, n = self.options, len(self.data.train_labels)
        pad, flip = options.randomcrop_pad, self.data.flip
        plan = EpochPlan(n, options.batch_size, seed=options.seed, epoch=self.epoch, pad=pad, flip=flip)
        return plan.of_rank(distributed.rank(), distributed.world_size())

    def count(self, loss: Tensor, logits: Tensor, labels: Tensor) -> None:
        """Add a finished step to the epoch's sums, without waiting for the device."""
        self.batch += 1
        loss_share = loss.double() / distributed.world_size()  # the batch's loss is the mean of the slices'
        self.sums += torch.stack([loss_share, (logits.argmax(1) != labels).sum().double()])

    def totals(self) -> list[float]:
        """Loss and wrong answers, summed over this epoch's steps; waits for the device and all ranks."""
        return distributed.all_sum(self.sums.tolist())

    def learning_rates(self) -> dict[str, float | None]:
        """The current lr and lrg (None where nothing is on G(1,n))."""
        rates = {group.get("grassmann", False): group["lr"] for group in self.optimizer.param_groups}
        return {"lr": rates[False], "lrg": rates.get(True)}

    def check_finite(self) -> None:
        """UserError if a loss of this epoch, or a weight, is not finite. Waits as `totals`."""
        if not math.isfinite(self.totals()[0]):
            what = "the loss"
        elif not torch.stack([p.isfinite().all() for p in self.model.parameters()]).all():
            what = "a weight"
        else:
            return
        rates = ", ".join(f"{k} {v:g}" for k, v in self.learning_rates().items() if v is not None)
        advice = "the last good checkpoint, if any, is kept: try lower learning rates"
        where = f"by epoch {self.epoch + 1}, step {self.batch}"
        raise UserError(f"{what} is not finite {where} ({rates}); {advice}")


# -------------------------------------------------------------------------------------------------- one epoch


def train_epoch(t: Training, batches: TrainBatches, log: report.RunLog | None, stop: StopRequest) -> None:
    """Train from batch t.batch to the end of the epoch, or until `stop`; some ten waits for the device."""
    options, plan = t.options, t.plan()
    read_every, probe_every = math.ceil(len(plan) / 10), math.ceil(len(plan) / 4)
    pin = t.device.type == "cuda"
    t.model.train()
    last_loss, last_batch = t.totals()[0], t.batch
    started, batches_before = time.perf_counter(), t.batch
    with report.progress_bar(f"epoch {t.epoch + 1}/{options.epochs}", len(plan), t.batch) as bar:
        for images, labels in batches.iterate(plan, start=t.batch, nthread=options.nthread, pin_memory=pin):
            x, labels = t.inputs(images, labels)
            t.probe.active = t.batch % probe_every == 0
            t.count(*t.step(x, labels), labels)
            bar.update()
            if t.batch % read_every == 0:
                loss, wrong = t.totals()
                if not math.isfinite(loss):
                    t.check_finite()
                error = 100 * wrong / (t.batch * options.batch_size)
                speed = (t.batch - batches_before) * options.batch_size / (time.perf_counter() - started)
                bar.set_postfix_str(f"loss {loss / t.batch:.4f}, error {error:.2f}%, {speed:.0f} img/s")
                if log:
                    steps = t.epoch * len(plan) + t.batch
                    log.add_loss((loss - last_loss) / (t.batch - last_batch), steps)
                last_loss, last_batch = loss, t.batch
            if stop.asked():
                break
    t.check_finite()  # waits for the device: what follows is timed right
    t.train_time += time.perf_counter() - started


@torch.no_grad()
def test_logits(t: Training) -> Iterator[tuple[Tensor, Tensor]]:
    """Logits (B, classes) and labels (B,) on the device, batch by batch over this rank's test images."""
    distributed.broadcast_tensors(t.model.buffers())  # rank 0's running averages
    t.model.eval()
    data, pin, part = t.data, t.device.type == "cuda", (distributed.rank(), distributed.world_size())
    for images, labels in eval_batches(data.test_images, data.test_labels, t.options.batch_size, pin, part):
        x, labels = t.inputs(images, labels)
        with t.autocast():
            logits = t.forward(x)  # may be empty: another rank has the last images
        yield logits.float(), labels


def evaluate(t: Training, stop: StopRequest) -> tuple[float, float] | None:
    """Test loss and error in %, over all test images; None if a signal came first."""
    n = len(t.data.test_labels)
    sums = torch.zeros(2, dtype=torch.float64, device=t.device)
    for logits, labels in test_logits(t):
        loss = cross_entropy(logits, labels, reduction="sum")
        sums += torch.stack([loss.double(), (logits.argmax(1) != labels).sum().double()])
        if stop.asked(by_signal=True):
            return None
    loss, wrong = distributed.all_sum(sums.tolist())
    return loss / n, 100 * wrong / n


def end_epoch(t: Training, log: report.RunLog | None, stop: StopRequest) -> None:
    """Evaluate, log, step the schedule, make t ready for the next epoch; nothing if a signal comes first."""
    started = time.perf_counter()
    result = evaluate(t, stop)
    if result is None:
        return
    if not math.isfinite(result[0]):
        advice = "the last good checkpoint is kept"
        raise UserError(f"the test loss is not finite after epoch {t.epoch + 1}; {advice}")
    t.epoch += 1
    means, layers = t.probe.read()
    stats = report.epoch_statistics(t, means, *result, time.perf_counter() - started)
    t.history.append(stats)
    distributed.on_rank0(lambda: log.add(stats, layers))
    t.schedule.step()
    t.start_epoch()


# ---------------------------------------------------------------------------------------------------- the run


def train(t: Training, stop: StopRequest) -> int:
    """Train to the last epoch or until `stop`, with a checkpoint after every epoch; returns the exit code."""
    options = t.options
    batches = TrainBatches(t.data.train_images, t.data.train_labels, options.randomcrop_pad)
    steps = len(t.plan())
    with report.run_log(options, t.history) as log:
        if t.epoch == 0:
            distributed.on_rank0(lambda: log.start(batches.batch(t.plan(), 0)[0]))
        while t.epoch < options.epochs:
            if t.batch < steps:
                train_epoch(t, batches, log, stop)
            # A deadline does not stop the evaluation: a run given less time than that would get nowhere.
            if t.batch >= steps and not stop.asked(by_signal=True):
                end_epoch(t, log, stop)
            if t.epoch == options.epochs:  # before the checkpoint that says that nothing is left to do
                distributed.on_rank0(lambda: log.add_result(t.history[-1]))
            state = run_state(t)
            distributed.on_rank0(lambda state=state: save_checkpoint(options.save / CHECKPOINT, state))
            if stop.asked() and t.epoch < options.epochs:
                report.print_stopped(t, stop.reason, steps)
                return stop.exit_code
    distributed.on_rank0(lambda: (options.save / PREVIOUS).unlink(missing_ok=True))
    report.print_finished(t)
    return 0


def print_evaluation(t: Training) -> None:
    """The test images' loss and errors with the weights that t has now."""
    mine = [torch.cat(parts).cpu() for parts in zip(*test_logits(t), strict=True)]
    logits, labels = (torch.cat(parts) for parts in zip(*distributed.all_gather(mine), strict=True))
    report.print_evaluation(t, logits, labels)


def print_summary(options: Options, state: dict | None) -> None:
    """What a run would start with, and a checkpoint's weights; reads no data but a folder's."""
    classes = 100 if options.dataset == "CIFAR100" else 10
    if state:
        classes = len(state["model"]["fc.bias"])
    elif options.dataset == "folder":
        classes = len(load_data(options.dataset, options.dataroot, options.dataset_name).classes)
    model = make_model(options, classes).to(choose_device(options.device))
    report.print_summary(options, model, make_optimizer(model, options), state)


def run(argv: list[str] | None) -> int:
    """One call of main.py; returns the exit code."""
    started = PROCESS_START if argv is None else time.monotonic()
    given = parse_flags(argv)
    if (processes := given.get("ngpu", 1)) > 1 and not distributed.launched():
        if argv is not None:
            raise UsageError("--ngpu is for the command line; from Python start main.py by torchrun")
        distributed.launch(processes, [__file__, *sys.argv[1:]])
    with distributed.joined(), utils.repeatable(), ExitStack() as until_the_end:
        save_to, source, goes_on_there = distributed.on_rank0(lambda: find_places(given))
        if not (given.get("eval") or given.get("summary")):
            until_the_end.enter_context(utils.locked(save_to, goes_on_there))
        options, state = distributed.on_rank0(lambda: choose_options(given, save_to, source))
        return carry_out(options, state, source, started)


def carry_out(options: Options, state: dict | None, source: Path | None, started: float) -> int:
    """Summarize, evaluate or train; returns the exit code. state: the checkpoint in `source`, if any."""
    with reading(source):
        if options.summary:
            print_summary(options, state)
            return 0
        if not options.eval and (message := nothing_to_do(options, state)):
            print(message)
            with suppress(OSError):  # a sweep knows a finished run by a checkpoint newer than the log
                os.utime(options.save / CHECKPOINT)
            return 0
        data = distributed.raise_on_all(
            lambda: load_data(options.dataset, options.dataroot, options.dataset_name, options.eval)
        )
        t = Training(options, hold_out(data, options.holdout) if options.holdout else data)
        if state:
            restore(t, state)
        if not options.eval:
            t.plan()  # an impossible --batchSize ends here, before a file is written
    if options.eval:
        print_evaluation(t)
        return 0
    distributed.on_rank0(lambda: report.write_config(t))
    report.print_start(options, t.model, t.optimizer)
    deadline = options.max_minutes and started + 60 * options.max_minutes
    with StopRequest(deadline) as stop:  # Ctrl-C finishes the step, and `train` writes a checkpoint
        return train(t, stop)


def main(argv: list[str] | None = None) -> int:
    """Run, and answer what the user can put right by one sentence; torch's generators stay as they end."""
    with distributed.silent_above_rank_0():
        return utils.answer(lambda: run(argv))


if __name__ == "__main__":
    sys.stdout = sys.stdout or open(os.devnull, "w")  # noqa: SIM115 (closed: nobody listens)
    sys.stderr = sys.stderr or open(os.devnull, "w")  # noqa: SIM115
    with suppress(AttributeError):  # a notebook's stream has no such method
        sys.stdout.reconfigure(errors="backslashreplace")  # for paths that are not UTF-8
    sys.exit(main())
