"""Train Wide ResNet or VGG with SGD, SGD-G or Adam-G (Riemannian approach to batch normalization, NIPS 2017).

    python main.py --depth 28 --width 10 --dataset CIFAR10 --optim_method SGDG

Read from the top: the network, the optimizer over the paper's parameter groups, one step, an epoch, the run.
For a model of your own, `make_optimizer` shows all that is needed.
"""

# ruff: noqa: E402
import time

PROCESS_START = time.monotonic()  # --max_minutes counts from here: importing torch takes seconds

import math
import os
import shlex
import sys
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, closing, suppress

# Before the import, which reads it: no advice from each process; see `parallel`.
if "WORLD_SIZE" in os.environ:
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

import distributed
import report
import utils
from checkpoint import load_model, load_optimizer, load_weights, reading_checkpoint, save_checkpoint
from data import DataSet, EpochPlan, TrainBatches, eval_batches, hold_out, load_data
from grassmann_optimizer import SGDG, AdamG, grassmann_param_groups
from options import VGGS, Options, asked_processes, choose_device, model_name, nothing_to_do, parse_options
from resnet import WideResNet, blocks_per_group
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
            model,
            options.lr,
            options.lrg,
            momentum=options.momentum,
            omega=options.omega,
            grad_clip=options.grad_clip,
            weight_decay=options.weight_decay,
            bn_decay=options.bn_decay,
            select=options.select,
            loss_fn=random_loss if options.select == "measured" else None,
        )
    optimizer = {"SGD": torch.optim.SGD, "SGDG": SGDG, "AdamG": AdamG}[options.optim_method]
    if options.zero and distributed.size() > 1:
        return distributed.zero_redundancy(optimizer, groups)
    return optimizer(groups)


def sgd_groups(model: nn.Module, options: Options) -> list[dict]:
    """The baseline's parameter groups, with Nesterov momentum."""
    params = [p for p in model.parameters() if p.requires_grad]
    common = {"lr": options.lr, "momentum": options.momentum, "nesterov": options.momentum > 0}
    small = {"params": [p for p in params if p.ndim < 2], "weight_decay": options.bn_decay}
    weights = {"params": [p for p in params if p.ndim >= 2], "weight_decay": options.weight_decay}
    return [{**small, **common, "name": "bn_bias"}, {**weights, **common, "name": "other"}]


def parallel(model: nn.Module, options: Options) -> nn.Module:
    """What a step calls: the model; of several processes, with gradients that are averaged over them."""
    if distributed.size() > 1:
        if options.sync_bn and not options.eval:
            model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
        # With find_unused_parameters the buckets are not arranged anew after the first step: a resumed run
        # sums in the same order as one that went on.
        with warnings.catch_warnings(action="ignore", category=FutureWarning):  # the new name is too new
            model = DistributedDataParallel(model, broadcast_buffers=False, find_unused_parameters=True)
    # Each batch size on its own: else what was compiled before would decide how a resumed run is compiled.
    return torch.compile(model, dynamic=False) if options.compile else model


def random_loss(model: nn.Module) -> Tensor:
    """The loss of random images and labels: which weights are scale-invariant does not depend on them."""
    x = torch.randn(64, 3, 32, 32, device=next(model.parameters()).device)
    logits = model(x)
    return cross_entropy(logits, torch.randint(logits.shape[1], (len(x),), device=x.device))


# --------------------------------------------------------------------------------------------------- training


class Training:
    """Everything that changes while a run trains, and how it goes to a checkpoint and back."""

    def __init__(self, options: Options, data: DataSet):
        self.options, self.data = options, data
        self.device = choose_device(options.device)
        torch.manual_seed(options.seed)
        model = make_model(options, len(data.classes))
        self.model = model.to(self.device, memory_format=torch.channels_last)
        self.optimizer = make_optimizer(self.model, options)
        self.forward = parallel(self.model, options)
        utils.seed_rank(options.seed, 0, 0)
        drops, ratio = options.epoch_step, options.lr_decay_ratio
        self.schedule = torch.optim.lr_scheduler.MultiStepLR(self.optimizer, drops, gamma=ratio)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=options.dtype == "float16")
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
        # The first step with a non-finite loss, counted from 1; 0: none.
        self.bad_step = torch.zeros((), dtype=torch.int64, device=self.device)

    def plan(self) -> EpochPlan:
        """What this epoch does with this rank's pictures; UserError if the training set has no full batch."""
        options, n = self.options, len(self.data.train_labels)
        pad, flip = options.randomcrop_pad, self.data.flip
        plan = EpochPlan(n, options.batch_size, seed=options.seed, epoch=self.epoch, pad=pad, flip=flip)
        return plan.of_rank(distributed.rank(), distributed.size())

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
        dtype = getattr(torch, self.options.dtype)
        return torch.autocast(self.device.type, dtype, enabled=dtype != torch.float32)

    def count(self, loss: Tensor, logits: Tensor, labels: Tensor) -> None:
        """Add a finished step to the epoch's sums, without waiting for the device."""
        self.batch += 1
        loss_share = loss.double() / distributed.size()  # the batch's loss is the mean of the slices'
        self.sums += torch.stack([loss_share, (logits.argmax(1) != labels).sum().double()])
        self.bad_step.copy_(torch.where((self.bad_step == 0) & ~loss.isfinite(), self.batch, self.bad_step))

    def totals(self) -> tuple[float, float]:
        """Loss and wrong answers, summed over this epoch's steps; waits for the device and all ranks."""
        loss, wrong = map(sum, zip(*distributed.values(self.sums.tolist()), strict=True))
        return loss, wrong

    def first_bad_step(self) -> int:
        """The first step of this epoch whose loss was not finite on some rank; 0: none. Waits likewise."""
        return min(filter(None, distributed.values(self.bad_step.item())), default=0)

    def learning_rates(self) -> dict[str, float | None]:
        """The current lr and lrg (None where nothing is on G(1,n))."""
        rates = {bool(group.get("grassmann")): group["lr"] for group in self.optimizer.param_groups}
        return {"lr": rates[False], "lrg": rates.get(True)}

    def check_finite(self) -> None:
        """UserError if a loss of this epoch, or a weight, is not finite."""
        rates = {name: rate for name, rate in self.learning_rates().items() if rate is not None}
        text = ", ".join(f"{name} {rate:g}" for name, rate in rates.items())
        advice = f"({text}); the last good checkpoint, if any, is kept: try lower learning rates"
        epoch = self.epoch + 1
        if step := self.first_bad_step():
            raise UserError(f"the loss is not finite since epoch {epoch}, step {step} {advice}")
        if not torch.stack([p.isfinite().all() for p in self.model.parameters()]).all():
            raise UserError(f"a weight is not finite in epoch {epoch}, after step {self.batch} {advice}")

    PLAIN = ("epoch", "batch", "train_time", "history", "weights_from")

    def state(self) -> dict:
        """The checkpoint: tensors and plain Python values only. All ranks take part; rank 0 gets it."""
        if hasattr(self.optimizer, "consolidate_state_dict"):  # --zero
            self.optimizer.consolidate_state_dict()
        mine = {"generators": utils.generator_states(self.device), "sums": self.sums.cpu()}
        first, *others = distributed.values(mine)
        if distributed.rank() > 0:
            return {}
        return {
            **{name: getattr(self, name).state_dict() for name in ("model", "optimizer", "scaler", "probe")},
            **{name: getattr(self, name) for name in self.PLAIN},
            **first,
            **({"other_ranks": others} if others else {}),
            "options": self.options.of_run(),
            "environment": utils.environment(self.device),
            "data_sha256": self.data.sha256,
            "statistics": [list(self.data.mean), list(self.data.std)],
        }

    def restore(self, state: dict) -> None:
        """Go on where the checkpoint was written; UserError if it is of another model or of other data."""
        with reading_checkpoint():
            if state["data_sha256"] != self.data.sha256:
                self.take_other_pictures(state)
            load_model(self.model, state["model"])
            for name in self.PLAIN:
                setattr(self, name, {"weights_from": None, **state}[name])  # older ones know no such origin
            if self.options.eval:
                return
            # Each epoch tells its options. (The pictures' name may have been made printable since.)
            told = {**self.history[0], "dataset_name": self.options.dataset_name} if self.history else {}
            if any(told.get(name, value) != value for name, value in self.options.fixed().items()):
                raise ValueError("its options are not those of its epochs")
            if self.batch > len(self.plan()):
                raise ValueError("its epoch has more steps")
            for _ in range(self.epoch):
                self.schedule.step()
            steps = self.epoch * len(self.plan()) + self.batch
            load_optimizer(self.optimizer, state["optimizer"], 0 if self.scaler.is_enabled() else steps)
            self.scaler.load_state_dict(state["scaler"])
            self.probe.load_state_dict(state["probe"])
            self.restore_rank([state, *state.get("other_ranks", [])])
            utils.note_environment(state["environment"], self.device)

    def take_other_pictures(self, state: dict) -> None:
        """Evaluate on them, normalized as the checkpoint's; UserError where that cannot be."""
        if not self.options.eval:
            raise UserError("the checkpoint is of other pictures than --dataset and --dataroot name")
        ours, theirs = len(self.data.classes), len(state["model"]["fc.bias"])
        if ours != theirs:
            raise UserError(f"{self.data.name} has {ours} classes, the checkpoint's network {theirs}")
        if "statistics" not in state:
            raise UserError(
                "the checkpoint is of an older main.py and does not hold the mean of its pictures: "
                "it can only be evaluated on these"
            )
        mean, std = torch.tensor(state["statistics"], device=self.device).view(2, 1, 3, 1, 1)
        self.mean, self.std = mean, std
        print("note: other pictures than the run's, normalized as the run's", flush=True)

    def restore_rank(self, ranks: list[dict]) -> None:
        """This rank's sums and generators; of another number of ranks, only rank 0's go on."""
        rank, size = distributed.rank(), distributed.size()
        if len(ranks) == size:
            self.sums.copy_(ranks[rank]["sums"])
            utils.set_generator_states(ranks[rank]["generators"], self.device)
            return
        effects = "batch normalization and dropout see other slices from here on"
        print(f"note: {len(ranks)} processes then, {size} now: {effects}", flush=True)
        utils.seed_rank(self.options.seed, self.epoch, self.batch)
        if rank == 0:
            self.sums.copy_(sum(other["sums"] for other in ranks))
            utils.set_generator_states(ranks[0]["generators"], self.device)


# -------------------------------------------------------------------------------------------------- one epoch


def train_epoch(t: Training, batches: TrainBatches, stop: StopRequest) -> None:
    """Train from batch t.batch to the end of the epoch, or until `stop`. Waits for the device ten times."""
    options, plan = t.options, t.plan()
    read_every, probe_every = math.ceil(len(plan) / 10), math.ceil(len(plan) / 4)
    pin = t.device.type == "cuda"
    t.model.train()
    title = f"epoch {t.epoch + 1}/{options.epochs}"
    with closing(report.Progress(title, len(plan), t.batch, options.batch_size)) as progress:
        for images, labels in batches.iterate(plan, start=t.batch, nthread=options.nthread, pin_memory=pin):
            x, labels = t.inputs(images, labels)
            t.probe.active = t.batch % probe_every == 0
            loss, logits = t.step(x, labels)
            t.count(loss, logits, labels)
            progress.step()
            if t.batch % read_every == 0:
                if t.first_bad_step():
                    t.check_finite()
                loss, wrong = t.totals()
                progress.show(loss / t.batch, 100 * wrong / (t.batch * options.batch_size), t.batch)
            if stop.asked():
                break
    t.check_finite()  # waits for the device: what follows is timed right
    t.train_time += progress.seconds()


@torch.no_grad()
def test_logits(t: Training) -> Iterator[tuple[Tensor, Tensor]]:
    """Logits (B, classes) and labels (B,) on the device, batch by batch over this rank's test pictures."""
    distributed.take_first(t.model.buffers())  # rank 0's running averages
    t.model.eval()
    data, pin, part = t.data, t.device.type == "cuda", (distributed.rank(), distributed.size())
    for images, labels in eval_batches(data.test_images, data.test_labels, t.options.batch_size, pin, part):
        x, labels = t.inputs(images, labels)
        with t.autocast():
            logits = t.forward(x)  # perhaps of no picture at all: another rank has the last
        yield logits.float(), labels


def evaluate(t: Training, stop: StopRequest) -> tuple[float, float] | None:
    """Test loss and error in %, over all test pictures; None if a signal came first."""
    n = len(t.data.test_labels)
    sums = torch.zeros(2, dtype=torch.float64, device=t.device)
    for logits, labels in test_logits(t):
        loss = cross_entropy(logits, labels, reduction="sum")
        sums += torch.stack([loss.double(), (logits.argmax(1) != labels).sum().double()])
        if stop.asked(by_signal=True):
            return None
    loss, wrong = map(sum, zip(*distributed.values(sums.tolist()), strict=True))
    return loss / n, 100 * wrong / n


def end_epoch(t: Training, record: report.Record, stop: StopRequest) -> None:
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
    stats = epoch_statistics(t, means, *result, time.perf_counter() - started)
    t.history.append(stats)
    distributed.first(lambda: record.add(stats, layers))
    t.schedule.step()
    t.start_epoch()


def epoch_statistics(t: Training, probe: dict, test_loss: float, test_error: float, test_time: float) -> dict:
    """The line of log.txt for the epoch that t has just finished."""
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


# ---------------------------------------------------------------------------------------------------- the run


def train(t: Training, stop: StopRequest) -> int:
    """Train to the last epoch or until `stop`, with a checkpoint after every epoch; returns the exit code."""
    options = t.options
    batches = TrainBatches(t.data.train_images, t.data.train_labels, options.randomcrop_pad)
    steps = len(t.plan())
    with report.disk_errors_said_once(), report.Record(options, t.history) as record:
        if t.epoch == 0:
            distributed.first(lambda: record.start(batches.batch(t.plan(), 0)[0]))
        while t.epoch < options.epochs:
            if t.batch < steps:
                train_epoch(t, batches, stop)
            # Also past the deadline: a run given less time than an evaluation takes would never get on.
            if t.batch == steps and not stop.asked(by_signal=True):
                end_epoch(t, record, stop)
            if t.epoch == options.epochs:  # before the checkpoint that says that nothing is left to do
                distributed.first(lambda: record.add_result(t.history[-1]))
            save(t)
            if t.epoch == options.epochs:
                distributed.first(lambda: (options.save / PREVIOUS).unlink(missing_ok=True))
            if stop.asked() and t.epoch < options.epochs:
                where = f"after {t.epoch} epochs and {t.batch} of {steps} steps"
                way = f"python main.py --resume {shlex.quote(str(options.save))}"
                way += f", with {distributed.size()} processes" if distributed.size() > 1 else ""
                print(f"stopped by {stop.reason} {where}; to continue: {way}")
                return stop.exit_code
    print(f"finished {t.epoch} epochs: test error {100 - t.history[-1]['test_acc']:.2f}%;", end=" ")
    print(f"logs are in {options.save}")
    return 0


def save(t: Training) -> None:
    """Write the checkpoint."""
    state, path = t.state(), t.options.save / CHECKPOINT
    distributed.first(lambda: save_checkpoint(path, state))


def print_evaluation(t: Training) -> None:
    """The test pictures' loss and errors with the weights that t has now."""
    mine = [torch.cat(parts).cpu() for parts in zip(*test_logits(t), strict=True)]
    logits, labels = (torch.cat(parts) for parts in zip(*distributed.values(mine), strict=True))
    kind = "held-out training" if t.options.holdout else "test"
    steps = f" and {t.batch} steps" if t.batch else ""
    trained = f"{model_name(t.options)} after {t.epoch} epochs{steps}"
    heading = f"{trained}, on {len(labels):,} {kind} pictures of {t.data.name}"
    report.print_evaluation(logits, labels, t.data.classes, heading)


def print_summary(options: Options, checkpoint: dict | None) -> None:
    """What a run would start with, a checkpoint's weights, multiply-adds; reads no data but a folder's."""
    classes = 100 if options.dataset == "CIFAR100" else 10
    if checkpoint:
        classes = len(checkpoint["model"]["fc.bias"])
    elif options.dataset == "folder":
        classes = len(load_data(options.dataset, options.dataroot, options.dataset_name).classes)
    device = choose_device(options.device)
    model = make_model(options, classes).to(device)
    optimizer = make_optimizer(model, options)
    report.print_start(options, model, optimizer, device)
    if checkpoint:
        load_weights(model, checkpoint)
        report.print_weights(model, optimizer)
    count = report.multiply_adds(model, torch.zeros(1, 3, 32, 32, device=device))
    print(f"multiply-adds of one picture: {count:,}")


def check_network(options: Options) -> None:
    """UsageError for a depth that the network does not have."""
    try:
        if options.model == "resnet":
            blocks_per_group(options.depth)
    except ValueError as error:
        raise UsageError(f"--depth: {error}") from error


def prepare(argv: list[str] | None, lock: ExitStack) -> tuple[Options, dict | None, str | None]:
    """What rank 0 finds out: options, checkpoint, and why there is nothing to do, if so."""
    options, checkpoint = parse_options(
        argv, check_network, lambda *place: lock.enter_context(utils.claim_directory(*place))
    )
    message = None if options.eval or options.summary else nothing_to_do(options, checkpoint)
    if message:
        if checkpoint and (options.save / CHECKPOINT).exists():
            utils.mend_log(options.save, checkpoint["history"])
        with suppress(OSError):  # a sweep knows a finished run by a checkpoint that is newer than the log
            os.utime(options.save / CHECKPOINT)
    return options, checkpoint, message


def run(argv: list[str] | None) -> int:
    """One call of main.py; returns the exit code."""
    started = PROCESS_START if argv is None else time.monotonic()
    if not distributed.launched() and (processes := asked_processes(argv)) > 1:
        return distributed.launch(processes, [__file__, *(sys.argv[1:] if argv is None else argv)])
    with distributed.joined(), ExitStack() as until_the_end:  # of the run: its directory's lock, and settings
        options, checkpoint, message = distributed.first(lambda: prepare(argv, until_the_end))
        if options.summary:
            print_summary(options, checkpoint)
            return 0
        if message:
            print(message)
            return 0
        until_the_end.enter_context(utils.repeatable())
        data = distributed.one_before_others(
            lambda: load_data(options.dataset, options.dataroot, options.dataset_name, options.eval)
        )
        t = Training(options, hold_out(data, options.holdout) if options.holdout else data)
        if checkpoint and "options" in checkpoint:
            t.restore(checkpoint)
        elif checkpoint:  # of the authors' script
            t.weights_from = load_weights(t.model, checkpoint)
        if options.eval:
            print_evaluation(t)
            return 0
        t.plan()  # an impossible --batchSize ends here, before a file is written
        config = {"options": options.of_run(), "model": model_name(options), "data": t.data.description()}
        config["weights_from"] = t.weights_from
        distributed.first(lambda: utils.write_config(options.save, config, t.device))
        utils.note_slow_bfloat16(options.dtype, t.device)
        report.print_start(options, t.model, t.optimizer, t.device)
        if t.weights_from and not t.history:  # a run that is killed in its first epoch starts from them again
            save(t)
        deadline = options.max_minutes and started + 60 * options.max_minutes
        with StopRequest(deadline) as stop:
            return train(t, stop)


def main(argv: list[str] | None = None) -> int:
    """Run, and answer what the user can mend by one sentence on standard error.

    Called from Python it gives back signal handlers, warning filters and torch's settings as they were, but
    not the state of torch's generators.
    """
    return utils.answer(lambda: run(argv))


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="backslashreplace")  # for paths that are not UTF-8
    sys.exit(main())
