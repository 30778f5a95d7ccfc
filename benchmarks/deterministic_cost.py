"""What cuDNN's deterministic algorithms, which main.py uses, cost: steps with and without, taking turns.

    python benchmarks/deterministic_cost.py --depth 28 --width 10 [--device cuda] [--dtype bfloat16]
        [--rounds 15] [--json FILE]

On the CPU the setting has no effect, and the ratio shows the noise.
"""

import argparse
import json
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch import Tensor
from train_throughput import options_of_run, random_data

import utils
from main import Training

STEPS = 10  # in a turn


def seconds(t: Training, x: Tensor, labels: Tensor) -> float:
    """Of one step, the mean of STEPS; a first one lets cuDNN choose its algorithms."""
    t.step(x, labels)[0].item()
    started = time.perf_counter()
    for _ in range(STEPS):
        loss, _ = t.step(x, labels)
    loss.item()  # waits for the device
    return (time.perf_counter() - started) / STEPS


@utils.repeatable()
def main(argv: list[str] | None = None) -> None:
    """Measure and print the ratio."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], allow_abbrev=False)
    parser.add_argument("--rounds", type=int, default=15, help="times that each takes its turn")
    parser.add_argument("--json", type=Path, help="write all times here")
    args, rest = parser.parse_known_args(argv)
    options = options_of_run(parser, [*rest, "--optim_method", "SGDG"])
    data = random_data(options.batch_size)
    t = Training(options, data)
    x, labels = t.inputs(torch.from_numpy(data.train_images), torch.from_numpy(data.train_labels))
    times: dict[str, list[float]] = {"deterministic": [], "free": []}
    for _ in range(args.rounds):
        for name, values in times.items():
            torch.backends.cudnn.deterministic = name == "deterministic"
            values.append(seconds(t, x, labels))
    ratio = statistics.median(a / b for a, b in zip(*times.values(), strict=True))
    device = utils.environment(t.device)["device"]
    medians = {name: 1e3 * statistics.median(values) for name, values in times.items()}
    print(f"{device}: {medians['deterministic']:.2f} ms a step with deterministic algorithms,", end=" ")
    print(f"{medians['free']:.2f} without; median ratio {ratio:.3f}, {args.rounds} rounds")
    if args.json:
        result = {"device": device, "options": options.of_run(), "seconds": times, "ratio": ratio}
        args.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
