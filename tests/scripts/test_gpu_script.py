"""benchmarks/gpu.sh: what fails and goes on, a signal; all of it on the CPU, with a small network."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
from helpers import ROOT, log_lines

TRAINING = ["train_SGDG", "train_AdamG", "train_SGD", "train_float32"]
PARTS = ["tests", "deterministic", "optimizer_step", *TRAINING]
RUNS = ["SGD", "SGDG", "AdamG", "SGDG-measured", "AdamG-measured"]

# In place of Python: optimizer_step fails until `mended`. What has a word of the file `slow` goes on until
# SIGTERM, which it answers as the rest of the file says.
STAND_IN = """#!/usr/bin/env bash
echo "$*" >>"$OUT/calls"
if [ -e "$OUT/slow" ] && read -r word answer <"$OUT/slow" && [[ $* = *$word* ]]; then
    trap "$answer" TERM
    touch "$OUT/started"
    while :; do sleep 0.05; done
fi
case $* in *optimizer_step*) [ -e "$OUT/mended" ] ;; esac
"""


def start(tmp_path, python, **settings) -> subprocess.Popen:
    """The script, with its results in `out` and `runs`."""
    settings |= {"PYTHON": python, "OUT": tmp_path / "out", "RUNS": tmp_path / "runs", "SEEDS": 0}
    environment = os.environ | {name: str(value) for name, value in settings.items()}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(["bash", "benchmarks/gpu.sh", "30"], cwd=ROOT, env=environment, **pipes)


def results(process) -> dict[str, str]:
    """Part or run -> what became of it; nothing goes to standard error."""
    out, err = process.communicate()
    assert err == ""
    rows = [line.split(maxsplit=1) for line in out.splitlines()]
    return {row[0].removesuffix("/seed0"): " ".join(row[1:]) for row in rows}


@pytest.fixture
def stand_in(tmp_path):
    (tmp_path / "out").mkdir()
    path = tmp_path / "python"
    path.write_text(STAND_IN)
    path.chmod(0o755)
    return path


def calls(tmp_path) -> list[str]:
    """The commands since the last call."""
    file = tmp_path / "out" / "calls"
    lines = file.read_text().splitlines()
    file.unlink()
    return lines


def test_a_part_that_fails_stops_no_other_and_is_done_again(stand_in, tmp_path):
    process = start(tmp_path, stand_in)
    states = results(process)
    assert (process.returncode, list(states)) == (1, PARTS + RUNS)
    assert [name for name, state in states.items() if "failed" in state] == ["optimizer_step"]
    first = calls(tmp_path)
    for name, words in zip(PARTS + RUNS, first, strict=True):
        assert name == "tests" or "--depth 28 --width 10" in words
    (tmp_path / "out" / "mended").touch()
    process = start(tmp_path, stand_in)
    states = results(process)
    assert [name for name, state in states.items() if "done before" not in state] == ["optimizer_step", *RUNS]
    again = calls(tmp_path)
    assert (process.returncode, again[0]) == (0, first[2])
    assert all("--resume auto --max_minutes " in words for words in again[1:])


@pytest.mark.parametrize(
    ("word", "answer", "last", "state"),
    [
        ("/AdamG/", "echo a checkpoint is written; exit 143", "AdamG", "a checkpoint is written"),
        ("/SGD/", "echo a checkpoint is written; exit 130", "SGD", "a checkpoint is written"),
        ("optimizer_step", "exit 143", "optimizer_step", "stopped"),
    ],
)
def test_sigterm_stops_what_goes_on_and_starts_no_other(stand_in, tmp_path, word, answer, last, state):
    (tmp_path / "out" / "mended").touch()
    (tmp_path / "out" / "slow").write_text(f"{word} {answer}\n")
    process = start(tmp_path, stand_in)
    while not (tmp_path / "out" / "started").exists():
        assert process.poll() is None, results(process)
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    states = results(process)
    everything = PARTS + RUNS
    assert (process.returncode, list(states)) == (143, everything[: everything.index(last) + 1])
    assert states[last].endswith(state)


@pytest.mark.long
def test_all_parts_run_on_the_cpu_and_the_runs_are_finished(pictures_root, tmp_path):
    data = f"--dataset folder --dataroot {pictures_root}"
    small = {"NETWORK": "--depth 10 --width 1", "BATCH": 16, "EPOCHS": "--epochs 1 --epoch_step []"}
    process = start(tmp_path, sys.executable, DATA=data, SETTING="", ROUNDS=1, DEVICE="cpu", **small)
    states = results(process)
    assert (process.returncode, list(states)) == (0, PARTS + RUNS), states
    for name in RUNS:
        (stats,) = log_lines(tmp_path / "runs" / name / "seed0")
        assert (stats["epoch"], stats["optim_method"]) == (1, name.removesuffix("-measured"))
        assert stats["select"] == {"SGD": None}.get(name, "measured" if "-" in name else "shape")
    out = tmp_path / "out"
    assert json.loads((out / "train_SGDG.json").read_text())["gain"]
    assert json.loads((out / "deterministic.json").read_text())["ratio"] > 0
    assert json.loads((out / "optimizer_step.json").read_text())["seconds"]
    assert (out / "profile_SGDG" / "profile.txt").exists()
