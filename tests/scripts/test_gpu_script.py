"""benchmarks/gpu.sh: what it refuses, and a part that fails; all of it on the CPU."""

import json
import os
import subprocess
import sys

import pytest
from helpers import ROOT

PARTS = ["tests", "optimizer_step", "train_SGDG", "train_AdamG", "train_SGD", "train_float32"]

# In place of an environment's Python: there is no GPU, and optimizer_step fails until `mended`.
STAND_IN = f"""#!/usr/bin/env bash
case "$1$2" in *cuda.is_available*) exit 1 ;; -c$'\\n'*) exec {sys.executable} "$@" ;; -*) exit 0 ;; esac
echo "$*" >>"$OUT/calls"
case $* in *optimizer_step*) [ -e "$OUT/mended" ] ;; esac && while [ "$#" -gt 1 ]; do
    [ "$1" != --json ] || echo '{{"ratio": 2}}' >"$2"
    shift
done
"""


@pytest.fixture
def gpu(tmp_path):
    """gpu(words, ..., name=value, ...): the script's exit code, and what it prints."""
    (tmp_path / "out").mkdir()
    python = tmp_path / "bin" / "python"
    python.parent.mkdir()
    python.write_text(STAND_IN)
    python.chmod(0o755)

    def gpu(*words, **settings):
        own = {"PYTHON": "", "VIRTUAL_ENV": str(tmp_path), "OUT": str(tmp_path / "out"), "DEVICE": "cpu"}
        where = {"cwd": ROOT, "env": os.environ | own | settings}
        done = subprocess.run(["bash", "benchmarks/gpu.sh", *words], **where, capture_output=True, text=True)
        return done.returncode, done.stdout, done.stderr

    return gpu


@pytest.mark.parametrize("words", [["soon"], ["0"], ["--help"], ["5", "6"]])
def test_only_a_number_of_minutes_is_taken(gpu, words):
    code, out, err = gpu(*words)
    assert (code, out) == (2, "")
    assert err.startswith(f"gpu.sh: error: '{' '.join(words)}' is no number of minutes")


def test_without_a_gpu_one_sentence_says_so(gpu):
    code, out, err = gpu(DEVICE="cuda")
    assert (code, out, err.count("\n")) == (1, "", 1)
    assert "no GPU" in err


def test_a_part_that_fails_stops_no_other_and_is_done_again(gpu, tmp_path):
    (tmp_path / "benchmarks").mkdir()  # which CDPATH would find
    calls = tmp_path / "out" / "calls"
    code, out, err = gpu("5", CDPATH=str(tmp_path))
    assert (code, err, out.count("finished"), out.count("failed, see")) == (1, "", len(PARTS) - 1, 1)
    before = calls.read_text().splitlines()
    assert all("--depth 28 --width 10 --device cpu" in words for words in before)
    (tmp_path / "out" / "mended").touch()
    code, out, _ = gpu()
    assert (code, out.count("done before"), out.count("finished")) == (0, len(PARTS) - 1, 1)
    assert calls.read_text().splitlines() == [*before, before[0]]
    result = json.loads((tmp_path / "out.json").read_text())
    assert result["figures"] == {name: {"ratio": 2} for name in sorted(PARTS[1:])}
    assert result["texts"].keys() == set(PARTS)


@pytest.mark.long
def test_all_parts_run_on_the_cpu(gpu, tmp_path):
    small = {"NETWORK": "--depth 10 --width 1", "SETTING": "--batchSize 16", "ROUNDS": "1"}
    code, out, _ = gpu(VIRTUAL_ENV=sys.prefix, **small)
    assert (code, out.count("finished")) == (0, len(PARTS)), out
    assert json.loads((tmp_path / "out.json").read_text())["figures"]["train_SGDG"]["gain"]
