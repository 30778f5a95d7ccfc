"""What the tests of whole runs share: a tiny data set of picture files, and main.py called in this process."""

import os

# Before torch is imported, and for every subprocess: one thread computes the same bits on any machine, and tiny
# networks gain nothing from more.
os.environ["OMP_NUM_THREADS"] = "1"

import contextlib
import io
import json
import re
import signal
import warnings
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # the optimizers' kernel runs on the CPU; before main imports them

import main

METHODS = ("SGD", "SGDG", "AdamG")
STEPS = 3  # of an epoch of `tiny`
TIMES = ("train_time", "test_time", "images_per_sec")  # of log.txt: what two equal runs do not share


class Outcome(NamedTuple):
    """What a user sees of one call of main.py."""

    code: int
    out: str
    err: str


def call(*argv) -> Outcome:
    """main.py in this process: much faster than another one, which would import torch for seconds."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    out, err = io.StringIO(), io.StringIO()
    try:
        with (
            contextlib.redirect_stdout(out),
            contextlib.redirect_stderr(err),
            warnings.catch_warnings(record=True) as caught,
        ):
            warnings.simplefilter("default")
            code = main.main([str(word) for word in argv])
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    hidden = (DeprecationWarning, PendingDeprecationWarning, ImportWarning, ResourceWarning)  # as Python hides them
    shown = [f"{w.filename}: {w.message}\n" for w in caught if not issubclass(w.category, hidden)]
    return Outcome(code, out.getvalue(), err.getvalue() + "".join(shown))


def assert_one_sentence(outcome: Outcome, code: int, *patterns: str) -> None:
    """The call failed with `code` and said why on one line of standard error, which has all `patterns`."""
    assert outcome.code == code, outcome
    assert re.fullmatch(r"main\.py: error: \S[^\n]*\n", outcome.err), outcome.err
    for pattern in patterns:
        assert re.search(pattern, outcome.err), (pattern, outcome.err)


def make_pictures(root: Path) -> Path:
    """A `folder` data set: 48 noisy pictures to train and 18 to test, of 3 classes with a tinge of their own."""
    rng = np.random.default_rng(0)
    for part, count in (("train", 16), ("test", 6)):
        for label in range(3):
            directory = root / part / f"class{label}"
            directory.mkdir(parents=True)
            for index in range(count):
                picture = rng.integers(0, 230, (32, 32, 3), dtype=np.uint8)
                picture[..., label] += 4
                cv2.imwrite(str(directory / f"{index:02}.png"), picture)
    return root


@pytest.fixture(scope="session")
def pictures_root(tmp_path_factory) -> Path:
    """The root of `make_pictures`; a test that changes it works on a copy."""
    return make_pictures(tmp_path_factory.mktemp("data") / "pictures")


@pytest.fixture(scope="session")
def tiny(pictures_root):
    """tiny(method, save, *more): the arguments of a run of a second: 2 epochs of 3 steps, the rates drop after one."""

    def arguments(method: str, save: Path, *more) -> list[str]:
        network = ["--depth", 10, "--width", 1, "--dropout", 0.3, "--optim_method", method]
        data = ["--dataset", "folder", "--dataroot", pictures_root, "--batchSize", 16]
        schedule = ["--epochs", 2, "--epoch_step", "[1]"]
        return [str(word) for word in [*network, *data, *schedule, "--save", save, *more]]

    return arguments


@pytest.fixture(scope="session")
def finished(tiny, tmp_path_factory) -> dict[str, tuple[Path, Outcome]]:
    """For each method the directory and the outcome of an uninterrupted `tiny` run; tests change copies only."""
    runs = {}
    for method in METHODS:
        save = tmp_path_factory.mktemp("finished") / method
        outcome = call(*tiny(method, save))
        assert (outcome.code, outcome.err) == (0, "")
        runs[method] = save, outcome
    return runs


def contents(directory: Path) -> dict[str, bytes]:
    """Every file below a directory, byte for byte."""
    return {str(p.relative_to(directory)): p.read_bytes() for p in directory.rglob("*") if p.is_file()}


def log_lines(directory: Path) -> list[dict]:
    """The epochs of log.txt, without the times."""
    epochs = [json.loads(line.removeprefix("json_stats: ")) for line in (directory / "log.txt").open()]
    return [{key: value for key, value in epoch.items() if key not in TIMES} for epoch in epochs]


def load(directory: Path) -> dict:
    """A run's checkpoint."""
    return torch.load(directory / "checkpoint.pt", weights_only=True)


def bits(value):
    """A checkpoint's value as something that == compares bit by bit, without the times."""
    if isinstance(value, torch.Tensor):
        return str(value.dtype), tuple(value.shape), value.cpu().contiguous().numpy().tobytes()
    if isinstance(value, dict):
        return {key: bits(item) for key, item in value.items() if key not in TIMES}
    if isinstance(value, (list, tuple)):
        return [bits(item) for item in value]
    return value


def assert_same_run(a: Path, b: Path, *, but: tuple[str, ...] = ()) -> None:
    """Both runs ended with the same bits in every part of the checkpoint, options `but` aside, and the same log."""
    first, second = load(a), load(b)
    for state in (first, second):
        for name in but:
            state["options"].pop(name)
            for epoch in state["history"]:
                epoch.pop(name)
    assert first.keys() == second.keys()
    for part in first:
        assert bits(first[part]) == bits(second[part]), part
    logs = [[{k: v for k, v in epoch.items() if k not in but} for epoch in log_lines(d)] for d in (a, b)]
    assert logs[0] == logs[1]
