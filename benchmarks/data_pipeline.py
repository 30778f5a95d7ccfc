"""Augmented pictures per second on one core: `TrainBatches.batch` beside a per-picture float pipeline.

    python benchmarks/data_pipeline.py [--images 50000] [--rounds 9] [--folder DIR] [--json FILE]

Both pad by reflection, crop and flip random 32x32 pictures in batches of 128, from the same plans. Ours
leaves them uint8, because normalizing is the device's work; the baseline is what a loader with one transform
per picture does: float32, normalize, pad, crop, flip, channels first. The two take turns; the figures are
medians over the rounds.
"""

import argparse
import json
import os
import platform
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import cv2
import numpy as np
import torch

from data import CIFAR_STATISTICS, EpochPlan, TrainBatches, load_data

BATCH_SIZE = 128
PAD = 4


def float_batch(
    images: np.ndarray, labels: np.ndarray, plan: EpochPlan, k: int
) -> tuple[np.ndarray, np.ndarray]:
    """The baseline: each picture on its own, in float32; (B, 3, 32, 32) float32 normalized, (B,) int64."""
    mean, std = (np.array(value, np.float32) for value in CIFAR_STATISTICS["CIFAR10"])
    batch = []
    for index, (top, left), flip in zip(plan.order[k], plan.offsets[k], plan.flips[k], strict=True):
        image = (images[index].astype(np.float32) - mean) / std
        image = cv2.copyMakeBorder(image, PAD, PAD, PAD, PAD, cv2.BORDER_REFLECT_101)
        image = image[top : top + 32, left : left + 32]
        if flip:
            image = image[:, ::-1]
        batch.append(image.transpose(2, 0, 1))
    return np.stack(batch), labels[plan.order[k]]


def throughput(batch, plan: EpochPlan, steps: int) -> float:
    """Pictures/s of `batch(plan, k)` over the first `steps` batches of a plan."""
    start = time.perf_counter()
    for k in range(steps):
        batch(plan, k)
    return steps * BATCH_SIZE / (time.perf_counter() - start)


def measure_batches(n_images: int, rounds: int) -> dict:
    """Medians and ranges in pictures/s, both variants in turn on whatever core this thread runs on."""
    generator = np.random.default_rng(0)
    images = generator.integers(0, 256, (n_images, 32, 32, 3), dtype=np.uint8)
    labels = generator.integers(0, 10, n_images)
    start = time.perf_counter()
    batches = TrainBatches(images, labels, PAD)
    padding = time.perf_counter() - start
    rates = {"ours": [], "baseline": []}
    for epoch in range(rounds):
        plan = EpochPlan(n_images, BATCH_SIZE, seed=0, epoch=epoch, pad=PAD)
        rates["ours"].append(throughput(batches.batch, plan, len(plan)))
        rates["baseline"].append(
            throughput(lambda plan, k: float_batch(images, labels, plan, k), plan, max(1, len(plan) // 10))
        )
    ratios = [ours / baseline for ours, baseline in zip(*rates.values(), strict=True)]
    result = {"n": rounds, "images": n_images, "seconds_to_pad": padding, "ratio": statistics.median(ratios)}
    for name, values in rates.items():
        result[name] = {"median": statistics.median(values), "min": min(values), "max": max(values)}
    return result


def measure_folder(folder: str) -> dict:
    """Seconds that `load_data` takes; the first after the machine's start also waits for the disk."""
    start = time.perf_counter()
    loaded = load_data("folder", folder)
    seconds = time.perf_counter() - start
    return {"pictures": len(loaded.train_labels) + len(loaded.test_labels), "seconds": seconds}


def environment(one_core: bool) -> dict:
    """Hardware and versions, for the record."""
    cpu = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        names = [
            line.split(":")[1].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line
        ]
        cpu = names[0] if names else cpu
    return {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "held_to_one_core": one_core,
        "python": platform.python_version(),
        "numpy": np.__version__,
        "opencv": cv2.__version__,
        "torch": torch.__version__,
    }


def print_table(result: dict) -> None:
    env, rates = result["environment"], result["batches"]
    versions = f"Python {env['python']}, numpy {env['numpy']}, OpenCV {env['opencv']}"
    print(f"{env['cpu']}, {env['cores']} cores; {versions}")
    where = "one core" if env["held_to_one_core"] else "one thread"
    print(f"Batches of {BATCH_SIZE} on {where}, {rates['n']} rounds")
    print(f"\n{'augmented pictures/s':<42}{'median':>12}{'min':>12}{'max':>12}")
    for name, label in (
        ("ours", "TrainBatches.batch, uint8"),
        ("baseline", "per picture, float32, normalized"),
    ):
        print(
            f"{label:<42}" + "".join(f"{rates[name][column]:>12,.0f}" for column in ("median", "min", "max"))
        )
    print(f"{'ratio':<42}{rates['ratio']:>12.1f}")
    padding = f"padding {rates['images']:,} pictures once, s"
    print(f"{padding:<42}{rates['seconds_to_pad']:>12.2f}")
    if "folder" in result:
        folder = result["folder"]
        label = f"reading a folder of {folder['pictures']:,}, s"
        print(f"{label:<42}{folder['seconds']:>12.1f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=50_000, help="pictures of an epoch, at least 128")
    parser.add_argument("--rounds", type=int, default=9, help="times that each variant takes its turn")
    parser.add_argument(
        "--folder", metavar="DIR", help="also time reading DIR/{train,test}/<class>/<picture>"
    )
    parser.add_argument("--json", type=Path, help="write the figures, hardware and versions here")
    args = parser.parse_args()

    one_core = hasattr(os, "sched_setaffinity")
    if one_core:
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    result = {"folder": measure_folder(args.folder)} if args.folder else {}
    result["batches"] = measure_batches(args.images, args.rounds)
    result["environment"] = environment(one_core)
    print_table(result)
    if args.json:
        args.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
