"""Augmented pictures per second on one core: `TrainBatches.batch` beside a per-picture float pipeline.

    python benchmarks/data_pipeline.py [--json FILE] [--folder DIR]

Both pad by reflection, crop and flip random 32x32 pictures in batches of 128, from the same plans. Ours leaves them
uint8, because normalizing is the device's work; the baseline is what a loader with one transform per picture does:
float32, normalize, pad, crop, flip, channels first. The two take turns; the figures are medians over the rounds.
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

N_IMAGES = 50_000
BATCH_SIZE = 128
PAD = 4
ROUNDS = 9
TARGET = 150_000  # pictures/s that one core has to deliver


def float_batch(images: np.ndarray, labels: np.ndarray, plan: EpochPlan, k: int) -> tuple[np.ndarray, np.ndarray]:
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


def measure_batches() -> dict:
    """Medians and ranges in pictures/s, both variants in turn on whatever core this thread runs on."""
    generator = np.random.default_rng(0)
    images = generator.integers(0, 256, (N_IMAGES, 32, 32, 3), dtype=np.uint8)
    labels = generator.integers(0, 10, N_IMAGES)
    start = time.perf_counter()
    batches = TrainBatches(images, labels, PAD)
    padding = time.perf_counter() - start
    rates = {"ours": [], "baseline": []}
    for epoch in range(ROUNDS):
        plan = EpochPlan(N_IMAGES, BATCH_SIZE, seed=0, epoch=epoch, pad=PAD)
        rates["ours"].append(throughput(batches.batch, plan, len(plan)))
        rates["baseline"].append(
            throughput(lambda plan, k: float_batch(images, labels, plan, k), plan, len(plan) // 10)
        )
    ratios = [ours / baseline for ours, baseline in zip(*rates.values(), strict=True)]
    result = {"n": ROUNDS, "target": TARGET, "seconds_to_pad_all_once": padding, "ratio": statistics.median(ratios)}
    for name, values in rates.items():
        result[name] = {"median": statistics.median(values), "min": min(values), "max": max(values)}
    return result


def measure_folder(folder: str, nthread: int) -> dict:
    """Seconds that `load_data` takes; the first reading after a start of the machine also waits for the disk."""
    start = time.perf_counter()
    loaded = load_data("folder", folder, nthread=nthread)
    seconds = time.perf_counter() - start
    return {"pictures": len(loaded.train_labels) + len(loaded.test_labels), "seconds": seconds, "nthread": nthread}


def environment(one_core: bool) -> dict:
    """Hardware and versions, for the record."""
    cpu = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        names = [line.split(":")[1].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
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
    print(f"{env['cpu']}, {env['cores']} cores; Python {env['python']}, numpy {env['numpy']}, OpenCV {env['opencv']}")
    print(f"Batches of {BATCH_SIZE} on {'one core' if env['held_to_one_core'] else 'one thread'}, {rates['n']} rounds")
    print(f"\n{'augmented pictures/s':<42}{'median':>12}{'min':>12}{'max':>12}")
    for name, label in (("ours", "TrainBatches.batch, uint8"), ("baseline", "per picture, float32, normalized")):
        print(f"{label:<42}" + "".join(f"{rates[name][column]:>12,.0f}" for column in ("median", "min", "max")))
    print(f"{'ratio':<42}{rates['ratio']:>12.1f}")
    print(f"{'padding 50,000 pictures once, s':<42}{rates['seconds_to_pad_all_once']:>12.2f}")
    if "folder" in result:
        folder = result["folder"]
        label = f"folder of {folder['pictures']:,}, {folder['nthread']} threads, s"
        print(f"{label:<42}{folder['seconds']:>12.1f}")
    verdict = "reached" if rates["ours"]["median"] >= TARGET else "MISSED"
    print(f"\n{TARGET:,} pictures/s on one core: {verdict}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", metavar="FILE", help="also write the figures, hardware and versions to FILE")
    parser.add_argument("--folder", metavar="DIR", help="also time reading DIR/{train,test}/<class>/<picture>")
    parser.add_argument("--nthread", type=int, default=2, help="threads that read the folder (default 2)")
    args = parser.parse_args()

    one_core = hasattr(os, "sched_setaffinity")
    result = {}
    if args.folder:  # before this process is held to one core
        result["folder"] = measure_folder(args.folder, args.nthread)
    if one_core:
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    result["batches"] = measure_batches()
    result["environment"] = environment(one_core)
    print_table(result)
    if args.json:
        Path(args.json).write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
