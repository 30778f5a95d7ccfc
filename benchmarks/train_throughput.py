"""Training steps of main.py beside a plain configuration, both taking turns in one process.

    python benchmarks/train_throughput.py --depth 28 --width 10 --optim_method SGDG [--dtype bfloat16]
        [--compile] [--device cuda] [--rounds 5] [--steps 20] [--json FILE] [--profile DIR]

All other flags are main.py's, of a run. "Ours" is main.py's `Training` on its `TrainBatches`, with random
pictures. The "plain" configuration trains the same network from the same weights as a script does that
follows the paper line by line: float32, eager, contiguous, `sgdg_update` or `adamg_update` weight by weight
(torch's SGD parameter by parameter), one float32 transform per picture. As many threads prepare its batches
ahead. In float32 and without dropout, whose zeros depend on the order in memory, both compute the same
losses.

Whole steps are timed without waiting for the device in between; on a GPU the parts come from CUDA events.
"Waiting for input" is the time in which the loop stands still for the next batch; a GPU may still be busy
then. The share of a large product's rate counts the multiply-adds of convolutions and classifier, for a step
3 times those of a forward pass, and neither the optimizer's nor BN's; the product is of the convolutions'
type and takes its turn too. Peak memory: weights, buffers, optimizer state, and what a step holds besides.
The first step includes making the network and compiling it, for ours also what a process does once. A gain
above 1 is in our favour.
"""

import argparse
import json
import math
import statistics
import sys
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from itertools import islice
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch
from data_pipeline import PAD, float_batch
from optimizer_step import peak_memory
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

import utils
from data import CIFAR_STATISTICS, DataSet, EpochPlan, TrainBatches
from grassmann_optimizer import adamg_update, sgdg_update
from main import Training
from options import PER_CALL, Options, make_parser, model_name, number, parse_options

WARM_UP = 3  # steps of each configuration before its first turn
PRODUCT = {"cpu": (1024, 1), "cuda": (8192, 20)}  # rows and columns; how many of them are timed at once
# The table: key of the figure, label, factor, digits, whether more is better (None: no gain is printed).
ROWS = (
    ("images_per_s", "images/s", 1, 1, True),
    ("step_s", "ms per step", 1e3, 2, False),
    ("forward_backward_s", "  forward and backward", 1e3, 2, False),
    ("optimizer_s", "  optimizer", 1e3, 2, False),
    ("input_wait_s", "  waiting for input", 1e3, 2, False),
    ("product_flops", "a large product, TFLOP/s", 1e-12, 3, None),
    ("share_of_product", "share of its rate, %", 100, 1, None),
    ("peak_bytes", "peak memory, MB", 1e-6, 1, False),
    ("first_step_s", "first step done after, s", 1, 2, None),
)


# --------------------------------------------------------------------------------- the plain configuration


class PlainTraining(Training):
    """`Training` in float32, eager and contiguous, with `PlainOptimizer`; takes batches of `PlainBatches`."""

    def __init__(self, options: Options, data: DataSet):
        super().__init__(replace(options, dtype="float32", compile=False), data)
        self.model.to(memory_format=torch.contiguous_format)
        self.optimizer = PlainOptimizer(self.optimizer.param_groups)

    def inputs(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Normalized float32 (B, 3, H, W) on the host -> the same on the device."""
        return images.to(self.device, non_blocking=True), labels.to(self.device, non_blocking=True)


class PlainOptimizer(torch.optim.Optimizer):
    """`sgdg_update` or `adamg_update` weight by weight; for the groups not on G(1,n) torch's plain SGD."""

    def __init__(self, groups: list[dict]):
        super().__init__(groups, {})
        rest = [group for group in groups if not group.get("grassmann")]
        self.sgd = torch.optim.SGD([{**group, "foreach": False, "fused": False} for group in rest])
        self.sgd.state = self.state

    @torch.no_grad()
    def step(self) -> None:
        """One step of every group."""
        self.sgd.step()
        for group in self.param_groups:
            for p in group["params"] if group.get("grassmann") else []:
                p.copy_(self._stepped(p.flatten(1), p.grad.flatten(1), self.state[p], group).view_as(p))

    def _stepped(self, y: Tensor, g: Tensor, state: dict, group: dict) -> Tensor:
        """The rows after the step; state is that of one weight."""
        options = {name: group[name] for name in ("lr", "omega", "grad_clip")}
        tau = state.get("tau", torch.zeros_like(y))  # m of Adam-G
        if "beta2" not in group:
            y, state["tau"] = sgdg_update(y, g, tau, momentum=group["momentum"], **options)
            return y
        options |= {"beta1": group["momentum"], "beta2": group["beta2"], "epsilon": group["epsilon"]}
        state["step"] = state.get("step", y.new_zeros(())) + 1
        v = state.get("v", y.new_zeros(len(y), 1))
        y, state["tau"], state["v"] = adamg_update(y, g, tau, v, state["step"], **options)
        return y


class PlainBatches(TrainBatches):
    """Batches of `float_batch`: each picture on its own, normalized float32 (B, 3, 32, 32)."""

    def __init__(self, images: np.ndarray, labels: np.ndarray, pad: int):
        self.images, self.labels = images, labels

    def batch(self, plan: EpochPlan, k: int) -> tuple[np.ndarray, np.ndarray]:
        """Batch k of the plan, which pads as `float_batch` does."""
        return float_batch(self.images, self.labels, plan, k)


# --------------------------------------------------------------------------------------------- measurement


class Turns:
    """One configuration, warmed up, and what its turns measured.

    figures: key of ROWS -> one value for each turn, or a single one. losses: of the steps that warmed it up.
    """

    def __init__(self, training: type[Training], batches: TrainBatches, options: Options, data: DataSet):
        self.batches = batches
        self.moments: list[dict] = []  # of each step: its start, before and after the optimizer
        started = time.perf_counter()
        self.t = training(options, data)
        self.cuda = self.t.device.type == "cuda"
        self.t.optimizer.register_step_pre_hook(lambda *_: self._mark("before"))
        self.t.optimizer.register_step_post_hook(lambda *_: self._mark("after"))
        self.t.model.train()
        self.losses, done = [], []
        with closing(self.iterate(epoch=0)) as epoch:
            for images, labels in islice(epoch, WARM_UP):
                self.losses.append(self.step(images, labels).item())  # waits for the device
                done.append(time.perf_counter())
        self.multiply_adds = multiply_adds(self.t)
        self.t.optimizer.zero_grad()  # a step's gradients are then its own
        held = held_bytes(self.t) + peak_memory(lambda: self.step(images, labels), self.cuda)
        self.figures = {"peak_bytes": [held], "first_step_s": [done[0] - started]}
        self.product_flops()  # warms up, too

    def iterate(self, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        """The batches of an epoch, as main.py's loop takes them."""
        self.t.epoch = epoch
        self.t.start_epoch()
        return self.batches.iterate(self.t.plan(), nthread=self.t.options.nthread, pin_memory=self.cuda)

    def step(self, images: Tensor, labels: Tensor) -> Tensor:
        """All that main.py's loop does with a batch; the loss, on the device."""
        self.moments.append({"start": self._moment()})
        x, labels = self.t.inputs(images, labels)
        loss, logits = self.t.step(x, labels)
        self.t.count(loss, logits, labels)
        return loss

    def turn(self, epoch: int) -> None:
        """Time the steps of an epoch but the first, which also waits for the threads to start."""
        waits = []
        with closing(self.iterate(epoch)) as batches:
            self.step(*next(batches))
            self._synchronize()
            self.moments.clear()
            started = asked = time.perf_counter()
            for images, labels in batches:
                waits.append(time.perf_counter() - asked)
                self.step(images, labels)
                asked = time.perf_counter()
        self._synchronize()
        step = (time.perf_counter() - started) / len(waits)
        forward_backward, optimizer = self._parts()
        rate, product = self.t.options.batch_size / step, self.product_flops()
        turn = {
            "images_per_s": rate,
            "step_s": step,
            "forward_backward_s": forward_backward,
            "optimizer_s": optimizer,
            "input_wait_s": statistics.mean(waits),
            "product_flops": product,
            "share_of_product": 3 * 2 * self.multiply_adds * rate / product,
        }
        for key, value in turn.items():
            self.figures.setdefault(key, []).append(value)

    def product_flops(self) -> float:
        """Floating-point operations per second of a large product, of the type of the convolutions."""
        size, repeats = PRODUCT[self.t.device.type]
        a = torch.randn(size, size, device=self.t.device).to(getattr(torch, self.t.options.dtype))
        allowed = torch.backends.cuda.matmul.allow_tf32
        where = utils.environment(self.t.device)
        torch.backends.cuda.matmul.allow_tf32 = where["float32_convolutions"] == "TF32"
        self._synchronize()
        started = time.perf_counter()
        for _ in range(repeats):
            a @ a
        self._synchronize()
        torch.backends.cuda.matmul.allow_tf32 = allowed
        return 2 * size**3 * repeats / (time.perf_counter() - started)

    def write_profile(self, directory: Path) -> None:
        """Of a few steps: profile.txt, operations by the time they take, and trace.json.gz."""
        directory.mkdir(parents=True, exist_ok=True)
        activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * self.cuda
        with profile(activities=activities) as profiler, closing(self.iterate(epoch=0)) as batches:
            for images, labels in islice(batches, WARM_UP):
                self.step(images, labels)
            self._synchronize()
        order = "self_device_time_total" if self.cuda else "self_cpu_time_total"
        table = profiler.key_averages().table(sort_by=order, row_limit=60)
        (directory / "profile.txt").write_text(table)
        profiler.export_chrome_trace(str(directory / "trace.json.gz"))

    def _moment(self) -> float | torch.cuda.Event:
        """Now, on the device's own time line."""
        if not self.cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _mark(self, name: str) -> None:
        self.moments[-1][name] = self._moment()

    def _parts(self) -> tuple[float, float]:
        """Mean seconds of forward and backward pass, and of the optimizer, over the finished steps."""

        def seconds(a, b) -> float:
            return a.elapsed_time(b) / 1e3 if self.cuda else b - a

        steps = [m for m in self.moments if "after" in m]  # float16's scaler may leave out the optimizer
        if not steps:
            return math.nan, math.nan
        forward_backward = statistics.mean(seconds(m["start"], m["before"]) for m in steps)
        return forward_backward, statistics.mean(seconds(m["before"], m["after"]) for m in steps)

    def _synchronize(self) -> None:
        if self.cuda:
            torch.cuda.synchronize()


def multiply_adds(t: Training) -> int:
    """Of one picture's forward pass."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        t.model.eval()(torch.zeros(1, 3, 32, 32, device=t.device))
    t.model.train()
    return counter.get_total_flops() // 2


def held_bytes(t: Training) -> int:
    """Of weights, buffers and the optimizer's state."""
    tensors = [*t.model.buffers()]
    for p in t.model.parameters():
        tensors += [p, *t.optimizer.state[p].values()]
    return sum(tensor.nbytes for tensor in tensors if isinstance(tensor, Tensor))


def options_of_run(parser: argparse.ArgumentParser, words: list[str]) -> Options:
    """main.py's options; the parser's error for a mistake, and for what is of a call, not of a run."""
    try:
        given = vars(make_parser().parse_args(words))
        for name, default in PER_CALL.items():
            if given.get(name, default) != default:
                raise utils.UsageError(f"--{name} means nothing to a benchmark")
        return parse_options(words)[0]
    except utils.UserError as error:
        parser.error(str(error))


def random_data(count: int) -> DataSet:
    """Pictures for the training part, with CIFAR-10's statistics; none to test on."""
    generator = np.random.default_rng(0)
    images = generator.integers(0, 256, (count, 32, 32, 3), dtype=np.uint8)
    labels = generator.integers(0, 10, count)
    names, (mean, std) = tuple("0123456789"), CIFAR_STATISTICS["CIFAR10"]
    return DataSet("random", images, labels, images[:0], labels[:0], names, mean, std, flip=True)


@utils.repeatable()
def measure(options: Options, rounds: int, steps: int) -> dict[str, Turns]:
    """Ours and the plain configuration, after `rounds` turns of `steps` steps each."""
    data = random_data(options.batch_size * (max(steps, WARM_UP) + 1))
    arrays = data.train_images, data.train_labels, PAD
    turns = {
        "ours": Turns(Training, TrainBatches(*arrays), options, data),
        "plain": Turns(PlainTraining, PlainBatches(*arrays), options, data),
    }
    for epoch in range(1, rounds + 1):
        for configuration in turns.values():
            configuration.turn(epoch)
    return turns


# -------------------------------------------------------------------------------------------------- report


def gains(ours: dict, plain: dict) -> dict[str, float]:
    """The median of the turns' ratios, above 1 where ours is better."""
    result = {}
    for key, _, _, _, more_is_better in ROWS:
        if more_is_better is not None:
            better, worse = (ours, plain) if more_is_better else (plain, ours)
            pairs = zip(better[key], worse[key], strict=True)
            result[key] = statistics.median(a / b for a, b in pairs)
    return result


def print_table(result: dict) -> None:
    """In 80 columns."""
    options = result["options"]
    how = f"{options['dtype']}, {'compiled' if options['compile'] else 'eager'}"
    network = f"{result['model']}, {options['optim_method']}, batch {options['batch_size']}"
    print(f"{network}: {how} against float32, eager")
    print(f"{result['multiply_adds']:,} multiply-adds a picture")
    print(f"{result['device']}, {result['threads']} threads, torch {result['torch']}", end="")
    print(f"; {result['rounds']} rounds of {result['steps']} steps, medians")
    print(f"{'':28}{'ours':>14}{'plain':>14}{'gain':>10}")
    for key, label, factor, digits, _ in ROWS:
        medians = [factor * statistics.median(result[name][key]) for name in ("ours", "plain")]
        gain = f"{result['gain'][key]:10.2f}" if key in result["gain"] else ""
        print(f"{label:28}" + "".join(f"{value:14,.{digits}f}" for value in medians) + gain)


def main(argv: list[str] | None = None) -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], allow_abbrev=False)
    count = number(int, 1)
    parser.add_argument(
        "--rounds", type=count, default=5, help="times that each configuration takes its turn"
    )
    parser.add_argument("--steps", type=count, default=20, help="steps that are timed in a turn")
    parser.add_argument("--json", type=Path, help="write all figures here")
    parser.add_argument("--profile", type=Path, metavar="DIR", help="profile a few of our steps into DIR")
    args, rest = parser.parse_known_args(argv)
    options = options_of_run(parser, [*rest, "--dataset", "CIFAR10", "--randomcrop_pad", str(PAD)])
    turns = measure(options, args.rounds, args.steps)
    ours, plain = turns["ours"], turns["plain"]
    result = {
        **utils.environment(ours.t.device),
        "model": model_name(options),
        "options": options.of_run(),
        "rounds": args.rounds,
        "steps": args.steps,
        "multiply_adds": ours.multiply_adds,
        **{name: {**each.figures, "losses": each.losses} for name, each in turns.items()},
        "gain": gains(ours.figures, plain.figures),
    }
    print_table(result)
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n")
    if args.profile:
        ours.write_profile(args.profile)


if __name__ == "__main__":
    main()
