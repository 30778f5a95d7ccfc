"""A run that was stopped, killed or cut off and then resumed ends with the bits of one that never was."""

import os
import re
import shlex
import shutil
import signal
import sys
import threading
import time
import warnings

import pytest
import torch
from helpers import METHODS, STEPS, assert_same_run, call, contents, load, log_lines, stop_at

import main
import utils

# The loop asks whether to stop after each step, before an evaluation, after its two batches, at the end.
CHECKS = STEPS + 1 + 2 + 1
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)  # of a user, a terminal, Slurm


@pytest.fixture
def stopped(tiny, tmp_path):
    """stopped(method, check): the directory of a run that was stopped there."""

    def run(method, check):
        with pytest.MonkeyPatch.context() as patch:
            stop_at(patch, check)
            outcome = call(*tiny(method, tmp_path / "run"))
        assert (outcome.code, outcome.err) == (128 + signal.SIGTERM, "")
        return tmp_path / "run"

    return run


def resume(save, *flags):
    outcome = call("--resume", save, *flags)
    assert (outcome.code, outcome.err) == (0, "")
    return outcome


def continue_as_told(outcome, *more):
    interpreter, script, *flags = shlex.split(outcome.out.splitlines()[-1].split("to continue: ")[1])
    assert (interpreter, script) == (sys.executable, "main.py")
    return call(*flags, *more)


def send(patch, number):
    """The run sends itself the signal in the second step of an epoch."""
    count = main.Training.count

    def count_and_send(t, *args):
        if t.batch == 1:
            os.kill(os.getpid(), number)
        count(t, *args)

    patch.setattr(main.Training, "count", count_and_send)


@pytest.fixture
def no_nohup():
    """SIGHUP as a terminal leaves it, however the tests were started; afterwards as before."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


# ----------------------------------------------------------------------------------------------------- a stop


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("check", "epochs", "steps"), [
    (2, 0, 2),  # in the middle of an epoch
    (3, 0, 3),  # after the last step: nothing is evaluated yet
    (STEPS + 2, 0, 3),  # in the middle of the evaluation
    (CHECKS, 1, 0),  # between two epochs
    (CHECKS + 1, 1, 1),  # after the first step at the lower rates
])  # fmt: skip
def test_a_stopped_run_ends_with_the_same_bits(stopped, finished, method, check, epochs, steps):
    save = stopped(method, check)
    state = load(save)
    assert (state["epoch"], state["batch"], len(log_lines(save))) == (epochs, steps, epochs)
    assert "top-1 error" in resume(save, "--eval").out
    resume(save)
    assert_same_run(save, finished[method][0])


def test_a_stop_in_the_last_check_is_no_stop(tiny, finished, tmp_path, monkeypatch):
    stop_at(monkeypatch, 2 * CHECKS)
    assert "finished 2 epochs" in call(*tiny("SGD", tmp_path / "run")).out
    assert_same_run(tmp_path / "run", finished["SGD"][0])


def test_a_run_gets_on_however_short_max_minutes_is(tiny, finished, tmp_path):
    save = tmp_path / "a run"  # the message quotes the space
    outcome = call(*tiny("SGDG", save, "--max_minutes", "1e-9"))
    for steps in range(1, 2 * STEPS):
        assert (outcome.code, outcome.err) == (0, "")
        assert f"stopped by --max_minutes after {steps // STEPS} epoch" in outcome.out
        assert f"and {steps % STEPS} of {STEPS} steps" in outcome.out
        outcome = continue_as_told(outcome, "--max_minutes", "1e-9")
    assert "finished 2 epochs" in outcome.out
    assert_same_run(save, finished["SGDG"][0])


def test_max_minutes_counts_from_the_start_of_the_process(tiny, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(main, "PROCESS_START", time.monotonic() - 60 * 500)
    for minutes, end in ((400, "stopped by --max_minutes"), (1000, "finished 2 epochs")):
        words = tiny("SGD", tmp_path / end[:8], "--max_minutes", minutes)
        monkeypatch.setattr(sys, "argv", ["main.py", *words])
        assert main.main() == 0
        assert end in capsys.readouterr().out
    # Called from Python, the call counts: the process may be a notebook that has been open for days.
    assert "finished 2 epochs" in call(*tiny("SGD", tmp_path / "run", "--max_minutes", 400)).out


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_finishes_the_step_and_exits_with_128_plus_its_number(
    tiny, finished, tmp_path, monkeypatch, number, no_nohup
):
    with monkeypatch.context() as patch:
        send(patch, number)
        outcome = call(*tiny("AdamG", tmp_path / "run"))
    assert (outcome.code, outcome.err) == (128 + number, "")
    assert f"stopped by {number.name} after 0 epochs and 2 of {STEPS} steps" in outcome.out
    assert continue_as_told(outcome).code == 0
    assert_same_run(tmp_path / "run", finished["AdamG"][0])


def test_nohup_stays_in_force(tiny, tmp_path, monkeypatch, no_nohup):
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    send(monkeypatch, signal.SIGHUP)
    assert "finished 2 epochs" in call(*tiny("SGD", tmp_path / "run")).out


def test_asked_twice_the_process_ends_at_once():
    before = signal.getsignal(signal.SIGTERM)
    with utils.StopRequest(None) as stop:
        assert not stop.asked()
        signal.raise_signal(signal.SIGTERM)
        assert stop.asked()
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    assert signal.getsignal(signal.SIGTERM) == before


def settings():
    handlers = [signal.getsignal(number) for number in SIGNALS]
    cudnn = torch.backends.cudnn
    return handlers, list(warnings.filters), threading.excepthook, cudnn.deterministic, cudnn.allow_tf32


def test_called_from_python_it_leaves_everything_as_it_was(tiny, tmp_path, monkeypatch):
    """As from a notebook."""
    with torch.backends.cudnn.flags(allow_tf32=False), monkeypatch.context() as patch:
        before = settings()
        stop_at(patch, 2)
        assert main.main(tiny("SGD", tmp_path / "run")) == 143
        assert settings() == before


def test_called_from_python_it_trains_in_a_thread(tiny, finished, tmp_path):
    thread = threading.Thread(target=lambda: main.main(tiny("SGD", tmp_path / "run")))
    thread.start()
    thread.join()
    assert_same_run(tmp_path / "run", finished["SGD"][0])


# -------------------------------------------------------------------------------------------------- going on


def test_auto_without_a_checkpoint_starts_anew(tiny, finished, tmp_path):
    assert call(*tiny("SGD", tmp_path / "new", "--resume", "auto")).code == 0
    assert_same_run(tmp_path / "new", finished["SGD"][0])
    # What a kill before the first checkpoint leaves: a configuration, an epoch's line, halves of files.
    save = tmp_path / "killed"
    save.mkdir()
    shutil.copy(finished["SGD"][0] / "config.json", save)
    (save / "log.txt").write_text((finished["SGD"][0] / "log.txt").read_text().splitlines(True)[0])
    for name in ("checkpoint.pt", "log.txt", "config.json"):
        (save / f".{name}.x7f3.tmp").write_bytes(b"half of it")
    (save / "mine.tmp").write_bytes(b"the user's")
    assert call(*tiny("SGD", save, "--resume", "auto")).code == 0
    assert_same_run(save, finished["SGD"][0])
    assert [path.name for path in save.glob("*.tmp")] == ["mine.tmp"]


def test_more_epochs_are_as_if_asked_for_from_the_start(tiny, finished, tmp_path):
    save = tmp_path / "run"
    assert call(*tiny("AdamG", save, "--epochs", 1)).code == 0
    resume(save, "--epochs", 2)
    assert_same_run(save, finished["AdamG"][0], but=("epochs",))
    assert load(save)["options"]["epochs"] == 2


def test_an_epochs_time_has_the_seconds_before_a_stop_and_not_those_of_its_test(stopped, monkeypatch):
    """On a clock that moves on by 2 seconds with a step, and by 5 with an evaluation."""
    steps, evaluations, step, evaluate = [], [], main.Training.step, main.evaluate
    monkeypatch.setattr(main.Training, "step", lambda *args: steps.append(1) or step(*args))
    monkeypatch.setattr(main, "evaluate", lambda *args: evaluations.append(1) or evaluate(*args))
    monkeypatch.setattr(time, "perf_counter", lambda: 2.0 * len(steps) + 5.0 * len(evaluations))
    save = stopped("SGD", 2)
    resume(save)
    for stats in load(save)["history"]:
        assert (stats["train_time"], stats["test_time"]) == (2.0 * STEPS, 5.0)


def test_a_checkpoint_goes_on_elsewhere_and_stays_as_it_was(stopped, finished, tmp_path):
    save = stopped("SGD", 2)
    before = contents(save)
    resume(save / "checkpoint.pt", "--save", tmp_path / "branch")
    assert contents(save) == before
    assert_same_run(tmp_path / "branch", finished["SGD"][0])
    resume(save / "checkpoint.pt")
    assert_same_run(save, finished["SGD"][0])


def test_a_finished_run_says_so_and_changes_nothing(tiny, finished):
    save = finished["SGDG"][0]
    before = contents(save)
    for words in (tiny("SGDG", save, "--resume", "auto"), ("--resume", save)):
        outcome = call(*words)
        assert (outcome.code, outcome.err) == (0, "")
        assert re.search(r"nothing to do: .* has its 2 epochs", outcome.out)
        assert contents(save) == before


def test_a_run_goes_on_another_machine_with_a_note(stopped, finished, images_root, tmp_path, monkeypatch):
    """From one with a GPU, whose generator has a state of its own; with an option of another version."""
    save, moved = stopped("SGD", 2), shutil.copytree(images_root, tmp_path / "moved")
    state = load(save)
    state["environment"] |= {"threads": 2, "float32_convolutions": "TF32", "cores": 7}
    state["generators"]["cuda"] = torch.zeros(16, dtype=torch.uint8)
    torch.save(state, save / "checkpoint.pt")
    monkeypatch.setattr(torch.cuda, "set_rng_state", None)  # torch would keep it in mind for a first GPU
    may_change = {"nthread": 3, "device": "cpu", "dataroot": moved}
    out = resume(save, *(f"--{name}={value}" for name, value in may_change.items())).out
    assert "threads 2 then, 1 now; float32_convolutions TF32 then, float32 now\n" in out
    assert_same_run(save, finished["SGD"][0], but=tuple(may_change))
