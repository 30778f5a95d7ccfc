"""benchmarks/gpu.sh, on the CPU with a small network."""

import json
import os
import shlex
import subprocess
import sys

import pytest
from helpers import ROOT, log_lines

PARTS = (
    "tests",
    "deterministic",
    "optimizer_step",
    "train_SGDG",
    "train_AdamG",
    "train_SGD",
    "train_float32",
)


@pytest.mark.long
def test_all_parts_run_and_the_same_command_goes_on(pictures_root, tmp_path):
    out, runs = tmp_path / "out", tmp_path / "runs"
    settings = {
        "PYTHON": sys.executable,
        "OUT": out,
        "RUNS": runs,
        "DATA": shlex.join(["--dataset", "folder", "--dataroot", str(pictures_root)]),
        "NETWORK": "--depth 10 --width 1",
        "BATCH": 16,
        "SETTING": "",
        "EPOCHS": "--epochs 1 --epoch_step []",
        "SEEDS": 0,
        "ROUNDS": 1,
        "DEVICE": "cpu",
        "OMP_NUM_THREADS": 1,
    }
    environment = os.environ | {name: str(value) for name, value in settings.items()}
    command = ["bash", "benchmarks/gpu.sh", "30"]
    (tmp_path / "out").mkdir()
    (out / "optimizer_step.json").mkdir()  # so that this part fails, and no other
    first = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert (first.returncode, first.stderr) == (1, "")
    assert {line.split()[0]: "failed" in line for line in first.stdout.splitlines() if line[0] != "S"} == {
        part: part == "optimizer_step" for part in PARTS
    } | {f"AdamG{kind}/seed0": False for kind in ("", "-measured")}
    for method in ("SGD", "SGDG", "AdamG", "SGDG-measured", "AdamG-measured"):
        (stats,) = log_lines(runs / method / "seed0")
        assert (stats["epoch"], stats["optim_method"]) == (1, method.removesuffix("-measured"))
        assert stats["select"] == {"SGD": None}.get(method, "measured" if "-" in method else "shape")
    assert json.loads((out / "train_SGDG.json").read_text())["gain"]
    assert (out / "profile_SGDG" / "profile.txt").exists()
    assert json.loads((out / "deterministic.json").read_text())["ratio"] > 0
    (out / "optimizer_step.json").rmdir()
    second = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert (second.returncode, second.stderr) == (0, ""), second.stdout
    assert second.stdout.count("done before") == len(PARTS) - 1
    assert second.stdout.count("nothing to do") == 5
