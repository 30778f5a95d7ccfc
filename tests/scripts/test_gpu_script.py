"""benchmarks/gpu.sh: what it refuses, and a part that fails; all of it on the CPU."""

import json
import os
import subprocess
import sys

import pytest
from helpers import ROOT

PARTS = ["tests", "optimizer_step", "train_SGDG", "train_AdamG", "train_SGD", "train_float32"]

# In place of an environment's Python: there is no GPU, and optimizer_step fails until `mended`.
STAND_IN = """#!/usr/bin/env bash
case "$1$2" in *cuda.is_available*) exit 1 ;; -c$'\\n'*) exec {python} "$@" ;; -*) exit 0 ;; esac
echo "$*" >>"$OUT/calls"
case $* in *optimizer_step*) [ -e "$OUT/mended" ] ;; esac && while [ "$#" -gt 1 ]; do
    [ "$1" != --json ] || echo '{{"ratio": 2}}' >"$2"
    shift
done
"""


@pytest.fixture
def environment(tmp_path):
    (tmp_path / "out").mkdir()
    python = tmp_path / "environment" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(STAND_IN.format(python=sys.executable))
    python.chmod(0o755)
    settings = {"VIRTUAL_ENV": str(tmp_path / "environment"), "OUT": str(tmp_path / "out"), "DEVICE": "cpu"}
    return {name: value for name, value in os.environ.items() if name != "PYTHON"} | settings


def gpu(environment, *words):
    """The script's exit code, and what it prints."""
    command = ["bash", "benchmarks/gpu.sh", *words]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize("words", [["soon"], ["0"], ["1.5"], ["--help"], ["5", "6"]])
def test_only_a_number_of_minutes_is_taken(environment, words):
    code, out, err = gpu(environment, *words)
    assert (code, out) == (2, "")
    assert err.startswith(f"gpu.sh: error: '{' '.join(words)}' is no number of minutes")


def test_without_a_gpu_one_sentence_says_so(environment):
    code, out, err = gpu(environment | {"DEVICE": "cuda"})
    assert (code, out, err.count("\n")) == (1, "", 1)
    assert "no GPU" in err


def test_a_part_that_fails_stops_no_other_and_is_done_again(environment, tmp_path):
    def states(out):
        rows = [line.split(maxsplit=3) for line in out.splitlines()[: len(PARTS)]]
        assert [row[0] for row in rows] == PARTS
        return {row[0]: row[3] for row in rows}

    (tmp_path / "benchmarks").mkdir()  # which CDPATH would find
    code, out, err = gpu(environment | {"CDPATH": str(tmp_path)}, "5")
    assert (code, err) == (1, "")
    assert [name for name, state in states(out).items() if state != "finished"] == ["optimizer_step"]
    calls = (tmp_path / "out/calls").read_text().splitlines()
    assert all("--depth 28 --width 10 --device cpu" in words for words in calls)
    (tmp_path / "out/mended").touch()
    code, out, _ = gpu(environment)
    assert [name for name, state in states(out).items() if state != "done before"] == ["optimizer_step"]
    assert (code, (tmp_path / "out/calls").read_text().splitlines()) == (0, [*calls, calls[0]])
    result = json.loads((tmp_path / "out.json").read_text())
    assert result["figures"] == {name: {"ratio": 2} for name in sorted(PARTS[1:])}
    assert result["texts"].keys() == set(PARTS)


@pytest.mark.long
def test_all_parts_run_on_the_cpu(environment, tmp_path):
    small = {"NETWORK": "--depth 10 --width 1", "SETTING": "--batchSize 16", "ROUNDS": "1"}
    code, out, _ = gpu(environment | {"VIRTUAL_ENV": sys.prefix} | small)
    assert (code, out.count("finished")) == (0, len(PARTS)), out
    assert json.loads((tmp_path / "out.json").read_text())["figures"]["train_SGDG"]["gain"]
