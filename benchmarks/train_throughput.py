"""Training steps of main.py beside a plain configuration, both taking turns in one process.

    python benchmarks/train_throughput.py --depth 28 --width 10 --optim_method SGDG [--dtype bfloat16]
        [--compile] [--device cuda] [--rounds 5] [--steps 10] [--json FILE]

All other flags are main.py's, of a run; the images are scikit-learn's digits. The plain configuration trains
the same network from the same weights as a script does that follows the paper line by line: float32, eager,
contiguous, the optimizer weight by weight. In float32 without dropout both compute the same losses.

Steps are timed without waiting for the device; on a GPU by CUDA events. "Waiting for input" is the time in
which the loop stands still for the next batch. The share of a large product's rate counts the multiply-adds
of convolutions and classifier, for a step 3 times those of a forward pass; the product is of the
convolutions' type. A gain above 1 is in our favour.
"""

import argparse
import json
import sys
import time
from contextlib import closing
from dataclasses import replace
from itertools import islice
from pathlib import Path
from statistics import mean, median

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from optimizer_step import PlainOptimizer, seconds, wait
from torch import Tensor

import utils
from data import DataSet, TrainBatches, load_data
from main import Training
from options import Options, model_name, parse_options
from report import multiply_adds

PRODUCT = {"cpu": (1024, 1), "cuda": (8192, 20)}  # rows and columns; how many of them are timed at once
ROWS = (  # of the table: key of the figure, label, factor, digits
    ("images_per_s", "images/s", 1, 1),
    ("step_s", "ms per step", 1e3, 2),
    ("forward_backward_s", "  forward and backward", 1e3, 2),
    ("optimizer_s", "  optimizer", 1e3, 2),
    ("input_wait_s", "  waiting for input", 1e3, 2),
    ("product_flops", "a large product, TFLOP/s", 1e-12, 3),
    ("share_of_product", "share of its rate, %", 100, 1),
)
TIMES = ("step_s", "forward_backward_s", "optimizer_s", "input_wait_s")  # of these the gain is printed


class PlainTraining(Training):
    """`Training` in float32, eager and contiguous, with `PlainOptimizer`."""

    def __init__(self, options: Options, data: DataSet):
        super().__init__(replace(options, dtype="float32", compile=False), data)
        self.model.to(memory_format=torch.contiguous_format)
        self.optimizer = PlainOptimizer(self.optimizer.param_groups)

    def inputs(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        x, labels = super().inputs(images, labels)
        return x.contiguous(), labels


class Turns:
    """One configuration, and its figures: key of ROWS -> a value for each turn; three losses."""

    def __init__(self, training: type[Training], options: Options, data: DataSet):
        self.t = training(options, data)
        self.cuda = self.t.device.type == "cuda"
        self.batches = TrainBatches(data.train_images, data.train_labels, options.randomcrop_pad)
        self.moments: list = []  # start, before the optimizer, after it, of each step
        self.t.optimizer.register_step_pre_hook(lambda *_: self._mark())
        self.t.optimizer.register_step_post_hook(lambda *_: self._mark())
        losses, _ = self._train(3)
        self.figures = {"losses": [loss.item() for loss in losses]}
        self.multiply_adds = multiply_adds(self.t.model)
        self.t.model.train()
        product_flops(self.t)  # warms up, too

    def turn(self, steps: int) -> None:
        """Time some steps of an epoch after a first one, which also waits for the threads to start."""
        _, waits = self._train(1 + steps)
        wait(self.cuda)
        if len(self.moments) != 3 * (1 + steps):  # the hooks were not run
            raise utils.UserError("a step was skipped, as its float16 gradients overflowed: try again")
        starts, befores, afters = (self.moments[i::3] for i in range(3))
        step = self._between(afters[0], afters[-1]) / len(afters[1:])
        rate, product = self.t.options.batch_size / step, product_flops(self.t)
        turn = {
            "images_per_s": rate,
            "step_s": step,
            "forward_backward_s": mean(map(self._between, starts[1:], befores[1:])),
            "optimizer_s": mean(map(self._between, befores[1:], afters[1:])),
            "input_wait_s": mean(waits[1:]),
            "product_flops": product,
            "share_of_product": 3 * 2 * self.multiply_adds * rate / product,
        }
        for key, value in turn.items():
            self.figures.setdefault(key, []).append(value)

    def _train(self, steps: int) -> tuple[list[Tensor], list[float]]:
        """The first steps of an epoch: their losses, and how long each waited for its batch."""
        losses, waits = [], []
        self.moments.clear()
        batches = self.batches.iterate(self.t.plan(), nthread=self.t.options.nthread, pin_memory=self.cuda)
        with closing(batches):
            asked = time.perf_counter()
            for images, labels in islice(batches, steps):
                waits.append(time.perf_counter() - asked)
                self._mark()
                losses.append(self.t.step(*self.t.inputs(images, labels))[0])
                asked = time.perf_counter()
        return losses, waits

    def _mark(self) -> None:
        """Now, on the device's own time line."""
        moment = torch.cuda.Event(enable_timing=True) if self.cuda else time.perf_counter()
        if self.cuda:
            moment.record()
        self.moments.append(moment)

    def _between(self, a, b) -> float:
        return a.elapsed_time(b) / 1e3 if self.cuda else b - a


def product_flops(t: Training) -> float:
    """Floating-point operations per second of a large product, of the type of the convolutions."""
    size, repeats = PRODUCT[t.device.type]
    a = torch.randn(size, size, device=t.device).to(getattr(torch, t.options.dtype))
    allowed = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = utils.environment(t.device)["float32_convolutions"] == "TF32"
    passed = seconds(lambda: [a @ a for _ in range(repeats)], t.device.type == "cuda")
    torch.backends.cuda.matmul.allow_tf32 = allowed
    return 2 * size**3 * repeats / passed


def gains(ours: dict, plain: dict) -> dict[str, float]:
    """The median of the turns' ratios, above 1 where ours takes less time."""
    return {key: median(b / a for a, b in zip(ours[key], plain[key], strict=True)) for key in TIMES}


def table(ours: dict, plain: dict, gain: dict) -> str:
    """Medians of the turns, in 80 columns."""
    lines = [f"{'':31}{'ours':>14}{'plain':>14}{'gain':>10}"]
    for key, label, factor, digits in ROWS:
        medians = [factor * median(figures[key]) for figures in (ours, plain)]
        numbers = "".join(f"{value:14,.{digits}f}" for value in medians)
        lines.append(f"{label:31}{numbers}" + (f"{gain[key]:10.2f}" if key in gain else ""))
    return "\n".join(lines)


@utils.repeatable()
def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], allow_abbrev=False)
    parser.add_argument("--rounds", type=int, default=5, help="times that each configuration takes its turn")
    parser.add_argument("--steps", type=int, default=10, help="steps that are timed in a turn")
    parser.add_argument("--json", type=Path, help="write all figures here")
    args, rest = parser.parse_known_args(argv)
    options, _ = parse_options([*rest, "--dataset", "digits"])
    data = load_data("digits", options.dataroot)
    ours, plain = Turns(Training, options, data), Turns(PlainTraining, options, data)
    for _ in range(args.rounds):
        ours.turn(args.steps)
        plain.turn(args.steps)
    gain, where = gains(ours.figures, plain.figures), utils.environment(ours.t.device)
    how = f"{options.dtype}{', compiled' * options.compile}, against plain float32"
    print(f"{model_name(options)}, {options.optim_method}, batch {options.batch_size}: {how}")
    print(f"{ours.multiply_adds:,} multiply-adds an image; {args.rounds} rounds of {args.steps} steps")
    print(f"{where['device']}, {where['threads']} threads, torch {where['torch']}")
    print(table(ours.figures, plain.figures, gain))
    if args.json:
        result = {**where, "options": options.of_run(), "multiply_adds": ours.multiply_adds}
        result |= {"ours": ours.figures, "plain": plain.figures, "gain": gain}
        args.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    try:
        main()
    except utils.UserError as error:
        sys.exit(f"error: {error}")
