"""A run that was stopped, killed or cut off and then resumed ends with the bits of one that never was."""

import json
import os
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
import warnings
from pathlib import Path

import pytest
import torch
from helpers import (
    METHODS,
    STEPS,
    assert_one_sentence,
    assert_same_run,
    call,
    contents,
    load,
    log_lines,
    stop_at,
    wait_for_the_next_second,
)
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import checkpoint
import main
import utils

TEST_BATCHES = 2  # of an evaluation of `tiny`
# The loop asks whether to stop after each step, before the evaluation, after each of its batches, at the end.
CHECKS = STEPS + 1 + TEST_BATCHES + 1


SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)  # of a user, a terminal, Slurm


def stopped_run(tiny, monkeypatch, method, save, check, *flags):
    """A run that stops at a check and has everything to continue."""
    with monkeypatch.context() as patch:
        stop_at(patch, check)
        outcome = call(*tiny(method, save, *flags))
    assert (outcome.code, outcome.err) == (0 if "finished" in outcome.out else 128 + signal.SIGTERM, "")
    return outcome


def scalars(save: Path) -> dict[str, list[int]]:
    """The epochs of each curve that TensorBoard shows."""
    events = EventAccumulator(str(save), size_guidance={"scalars": 0}).Reload()
    return {tag: [event.step for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


@pytest.fixture
def no_nohup():
    """SIGHUP as a terminal leaves it, however the tests were started."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


class TestStop:
    @pytest.mark.parametrize("method", METHODS)
    @pytest.mark.parametrize(
        ("check", "epochs", "steps"),
        [
            (2, 0, 2),  # in the middle of an epoch
            (3, 0, 3),  # after the last step: nothing is evaluated yet
            (STEPS + 2, 0, 3),  # in the middle of the evaluation
            (CHECKS, 1, 0),  # between two epochs
            (CHECKS + 1, 1, 1),  # after the first step at the lower rates
        ],
    )
    def test_a_stopped_run_ends_with_the_same_bits(
        self, tiny, finished, tmp_path, monkeypatch, method, check, epochs, steps
    ):
        save = tmp_path / "run"
        outcome = stopped_run(tiny, monkeypatch, method, save, check)
        assert f"after {epochs} epochs and {steps} of {STEPS} steps" in outcome.out
        state = load(save)
        assert (state["epoch"], state["batch"]) == (epochs, steps)
        assert len(log_lines(save)) == epochs
        where = f"after {epochs} epochs and {steps} steps," if steps else f"after {epochs} epochs,"
        assert where in call("--resume", save, "--eval").out
        resumed = call("--resume", save)
        assert (resumed.code, resumed.err) == (0, "")
        assert_same_run(save, finished[method][0])

    def test_measured_layers_are_the_same_after_a_stop(self, tiny, tmp_path, monkeypatch):
        measured = ("--select", "measured", "--depth", 10, "--width", 2)
        whole, save = tmp_path / "whole", tmp_path / "run"
        assert call(*tiny("SGDG", whole, *measured)).code == 0
        stopped_run(tiny, monkeypatch, "SGDG", save, CHECKS + 1, *measured)
        assert call("--resume", save).code == 0
        assert_same_run(save, whole)

    @pytest.mark.parametrize("method", METHODS)
    def test_stopping_after_every_step(self, tiny, finished, tmp_path, monkeypatch, method):
        save, argv = tmp_path / "run", ["--resume", "auto"]
        for _ in range(STEPS):
            stopped_run(tiny, monkeypatch, method, save, 1, *argv)
        stopped_run(tiny, monkeypatch, method, save, 2 + TEST_BATCHES, *argv)  # evaluates
        assert load(save)["epoch"] == 1
        for k in range(1, STEPS + 1):
            stopped_run(tiny, monkeypatch, method, save, 1, *argv)
            assert (load(save)["epoch"], load(save)["batch"]) == (1, k)
        assert call(*tiny(method, save, *argv)).code == 0
        assert_same_run(save, finished[method][0])

    def test_a_stop_in_the_last_check_is_no_stop(self, tiny, finished, tmp_path, monkeypatch):
        outcome = stopped_run(tiny, monkeypatch, "SGD", tmp_path / "run", 2 * CHECKS)
        assert "finished 2 epochs" in outcome.out
        assert_same_run(tmp_path / "run", finished["SGD"][0])

    def test_a_run_gets_on_however_short_max_minutes_is(self, tiny, finished, tmp_path):
        save = tmp_path / "run"
        for _ in range(2 * STEPS):
            assert call(*tiny("SGD", save, "--max_minutes", "1e-9", "--resume", "auto")).code == 0
        assert_same_run(save, finished["SGD"][0])

    def test_max_minutes_finishes_the_step_and_exits_with_0(self, tiny, finished, tmp_path):
        save = tmp_path / "a run"  # the message quotes the space
        outcome = call(*tiny("SGDG", save, "--max_minutes", "1e-9"))
        assert (outcome.code, outcome.err) == (0, "")
        last = outcome.out.splitlines()[-1]
        assert last.startswith(f"stopped by --max_minutes after 0 epochs and 1 of {STEPS} steps")
        self.continue_as_told(outcome)
        assert_same_run(save, finished["SGDG"][0])

    def test_max_minutes_counts_from_the_start_of_the_process(self, tiny, tmp_path, monkeypatch, capsys):
        monkeypatch.setattr(main, "PROCESS_START", time.monotonic() - 60 * 5)
        for minutes, end in ((4, "stopped by --max_minutes"), (10, "finished 2 epochs")):
            words = tiny("SGD", tmp_path / end[:8], "--max_minutes", minutes)
            monkeypatch.setattr(sys, "argv", ["main.py", *words])
            assert main.main() == 0
            assert end in capsys.readouterr().out
        # Called from Python, the call counts: the process may be a notebook that has been open for days.
        assert "finished 2 epochs" in call(*tiny("SGD", tmp_path / "run", "--max_minutes", 4)).out

    @pytest.mark.parametrize("number", SIGNALS)
    def test_a_signal_finishes_the_step_and_exits_with_128_plus_its_number(
        self, tiny, finished, tmp_path, monkeypatch, number, no_nohup
    ):
        save, true_loss, calls = tmp_path / "run", main.cross_entropy, []

        def loss(*args, **kwargs):
            calls.append(1)
            if len(calls) == 2:
                os.kill(os.getpid(), number)
            return true_loss(*args, **kwargs)

        with monkeypatch.context() as patch:
            patch.setattr(main, "cross_entropy", loss)
            outcome = call(*tiny("AdamG", save))
        assert (outcome.code, outcome.err) == (128 + number, "")
        assert f"stopped by {number.name} after 0 epochs and 2 of {STEPS} steps" in outcome.out
        self.continue_as_told(outcome)
        assert_same_run(save, finished["AdamG"][0])

    def continue_as_told(self, outcome):
        command = shlex.split(outcome.out.splitlines()[-1].split("to continue: ")[1])
        assert command[:2] == ["python", "main.py"]
        assert call(*command[2:]).code == 0

    def test_ctrl_c_before_training_is_one_sentence(self, tiny, tmp_path, monkeypatch):
        def interrupted(*args):
            raise KeyboardInterrupt

        monkeypatch.setattr(main, "load_data", interrupted)
        outcome = call(*tiny("SGD", tmp_path / "run"))
        assert outcome.code == 130
        assert re.fullmatch(r"main\.py: [^\n]+\n", outcome.err)

    @pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
    def test_the_process_itself(self, tiny, tmp_path, number, code):
        with start(tiny("SGD", tmp_path / "run", "--epochs", 10_000)) as process:
            for line in process.stdout:
                if line.startswith("epoch"):
                    break
            process.send_signal(number)
            out, err = process.communicate()
        assert (process.returncode, err) == (code, "")
        assert out.splitlines()[-1].endswith(f"to continue: python main.py --resume {tmp_path / 'run'}")
        assert load(tmp_path / "run")["epoch"] == len(log_lines(tmp_path / "run")) >= 1


class TestCalledFromPython:
    """As from a notebook."""

    def settings(self):
        handlers = [signal.getsignal(number) for number in SIGNALS]
        cudnn = torch.backends.cudnn
        return handlers, list(warnings.filters), threading.excepthook, cudnn.deterministic, cudnn.allow_tf32

    def test_leaves_everything_as_it_was(self, tiny, tmp_path, monkeypatch):
        with torch.backends.cudnn.flags(allow_tf32=False):
            before = self.settings()
            with monkeypatch.context() as patch:
                stop_at(patch, 2)
                assert main.main(tiny("SGD", tmp_path / "run")) == 143
            assert main.main(tiny("SGD", tmp_path / "run", "--resume", "auto")) == 0
            assert self.settings() == before

    def test_trains_in_a_thread(self, tiny, finished, tmp_path):
        codes = []
        thread = threading.Thread(target=lambda: codes.append(main.main(tiny("SGD", tmp_path / "run"))))
        thread.start()
        thread.join()
        assert codes == [0]
        assert_same_run(tmp_path / "run", finished["SGD"][0])


def test_nohup_stays_in_force(tiny, tmp_path, monkeypatch):
    before, count = signal.signal(signal.SIGHUP, signal.SIG_IGN), main.Training.count
    monkeypatch.setattr(main.Training, "count", lambda *a: os.kill(os.getpid(), signal.SIGHUP) or count(*a))
    try:
        assert "finished 2 epochs" in call(*tiny("SGD", tmp_path / "run")).out
    finally:
        signal.signal(signal.SIGHUP, before)


class TestResume:
    def test_tensorboard_has_each_epoch_once(self, tiny, finished, tmp_path, monkeypatch):
        save = tmp_path / "run"
        true_save = checkpoint.save_checkpoint

        def die(path, state):
            if state["epoch"] == 2:
                raise KeyboardInterrupt  # the second epoch is logged, but not in the checkpoint
            true_save(path, state)

        with monkeypatch.context() as patch:
            patch.setattr(main, "save_checkpoint", die)
            assert call(*tiny("SGDG", save)).code == 130
        assert (len(log_lines(save)), load(save)["epoch"]) == (2, 1)
        wait_for_the_next_second()
        stopped_run(tiny, monkeypatch, "SGDG", save, 2, "--resume", "auto")
        assert len(log_lines(save)) == 1
        wait_for_the_next_second()
        assert call(*tiny("SGDG", save, "--resume", "auto")).code == 0
        assert_same_run(save, finished["SGDG"][0])
        assert scalars(save) == scalars(finished["SGDG"][0])
        assert len(EventAccumulator(str(save)).Reload().Images("augmented images")) == 1
        assert [int(stats["epoch"]) for stats in log_lines(save)] == [1, 2]
        assert len(list(finished["SGDG"][0].glob("events*"))) == 1  # of two, the order of reading would count

    def test_auto_without_a_checkpoint_starts_anew(self, tiny, finished, tmp_path):
        assert call(*tiny("SGD", tmp_path / "new", "--resume", "auto")).code == 0
        assert_same_run(tmp_path / "new", finished["SGD"][0])
        # What a kill before the first checkpoint leaves: a configuration, an epoch's line, half a file.
        save = tmp_path / "killed"
        save.mkdir()
        shutil.copy(finished["SGD"][0] / "config.json", save)
        (save / "log.txt").write_text((finished["SGD"][0] / "log.txt").read_text().splitlines(True)[0])
        (save / "checkpoint.pt.tmp").write_bytes(b"half of a checkpoint")
        assert call(*tiny("SGD", save, "--resume", "auto")).code == 0
        assert_same_run(save, finished["SGD"][0])
        assert not list(save.glob("*.tmp"))

    def test_half_a_line_in_the_log_is_gone(self, tiny, finished, tmp_path, monkeypatch):
        save = tmp_path / "run"
        stopped_run(tiny, monkeypatch, "SGD", save, CHECKS)
        with (save / "log.txt").open("a") as log:
            log.write('json_stats: {"train_loss": 0.5, "tra')
        assert call("--resume", save).code == 0
        assert_same_run(save, finished["SGD"][0])

    @pytest.mark.parametrize("method", METHODS)
    def test_more_epochs_are_as_if_asked_for_from_the_start(self, tiny, finished, tmp_path, method):
        save = tmp_path / "run"
        assert call(*tiny(method, save, "--epochs", 1)).code == 0
        assert call("--resume", save, "--epochs", 2).code == 0
        assert_same_run(save, finished[method][0], but=("epochs",))
        assert load(save)["options"]["epochs"] == 2

    @pytest.mark.parametrize("nthread", [0, 3])
    def test_threads_that_prepare_batches_may_change(self, tiny, finished, tmp_path, monkeypatch, nthread):
        save = tmp_path / "run"
        stopped_run(tiny, monkeypatch, "AdamG", save, 2)
        assert call("--resume", save, "--nthread", nthread, "--device", "cpu", "--max_minutes", 60).code == 0
        assert_same_run(save, finished["AdamG"][0], but=("nthread", "device"))

    def test_an_epochs_time_has_the_seconds_before_the_stop(self, tiny, tmp_path, monkeypatch):
        save = tmp_path / "run"
        stopped_run(tiny, monkeypatch, "SGD", save, 2)
        torch.save(load(save) | {"train_time": 1000.0}, save / "checkpoint.pt")
        assert call("--resume", save, "--epochs", 2).code == 0
        times = [json.loads(line.split(" ", 1)[1])["train_time"] for line in (save / "log.txt").open()]
        assert times[0] > 1000 > times[1]

    def test_the_data_may_have_moved(self, tiny, finished, images_root, tmp_path, monkeypatch):
        save = tmp_path / "run"
        stopped_run(tiny, monkeypatch, "SGD", save, 2)
        moved = shutil.copytree(images_root, tmp_path / "moved")
        assert call("--resume", save, "--dataroot", moved).code == 0
        assert_same_run(save, finished["SGD"][0], but=("dataroot",))

    def test_a_file_and_another_directory(self, tiny, finished, tmp_path, monkeypatch):
        stopped_run(tiny, monkeypatch, "SGD", tmp_path / "run", 2)
        before = contents(tmp_path / "run")
        source = tmp_path / "run" / "checkpoint.pt"
        assert call("--resume", source, "--save", tmp_path / "branch").code == 0
        assert contents(tmp_path / "run") == before
        assert_same_run(tmp_path / "branch", finished["SGD"][0])
        assert call("--resume", source).code == 0
        assert_same_run(tmp_path / "run", finished["SGD"][0])

    @pytest.mark.parametrize("how", ["auto", "directory"])
    def test_a_finished_run_says_so_and_changes_nothing(self, tiny, finished, how):
        save = finished["SGDG"][0]
        before = contents(save)
        outcome = call(*(tiny("SGDG", save, "--resume", "auto") if how == "auto" else ("--resume", save)))
        assert (outcome.code, outcome.err) == (0, "")
        assert re.search(r"nothing to do: .* has its 2 epochs", outcome.out)
        assert contents(save) == before

    def test_another_number_of_threads_is_said(self, tiny, tmp_path, monkeypatch):
        save = tmp_path / "run"
        stopped_run(tiny, monkeypatch, "SGD", save, 2)
        state = load(save)
        state["environment"]["threads"] = 2
        torch.save(state, save / "checkpoint.pt")
        outcome = call("--resume", save)
        assert (outcome.code, outcome.err) == (0, "")
        assert "threads 2 then, 1 now" in outcome.out

    def test_options_of_the_checkpoint_need_not_be_repeated_but_may(
        self, tiny, finished, tmp_path, monkeypatch
    ):
        save = tmp_path / "run"
        stopped_run(tiny, monkeypatch, "SGDG", save, 2)
        assert_one_sentence(
            call(*tiny("SGDG", save, "--resume", "auto", "--seed", 5)), 2, "seed", r"\b5\b", r"\b0\b"
        )
        assert call(*tiny("SGDG", save, "--resume", "auto")).code == 0
        assert_same_run(save, finished["SGDG"][0])


@pytest.mark.parametrize("number", SIGNALS)
def test_asked_twice_the_process_ends_at_once(number, no_nohup):
    before = signal.getsignal(number)
    with utils.StopRequest(None) as stop:
        assert not stop.asked()
        signal.raise_signal(number)
        assert stop.asked()
        assert stop.exit_code == 128 + number
        assert signal.getsignal(number) == signal.SIG_DFL
    assert signal.getsignal(number) == before


def start(argv) -> subprocess.Popen:
    """main.py as a process of its own."""
    command = [sys.executable, main.__file__, *argv]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


class Killer:
    """Starts a run again and again, killed by SIGKILL at random moments, until it finishes by itself."""

    def __init__(self, argv, save: Path, seed: int):
        self.argv, self.save, self.random = argv, save, random.Random(seed)
        self.hits: list[str] = []  # what each kill that met a living process interrupted

    def run(self, kills: int) -> None:
        """At most `kills` kills, then to the end."""
        target = len(self.hits) + kills
        while True:
            stale = self.half_written()
            with start(self.argv) as process:
                if len(self.hits) < target:
                    self.wait(process, stale)
                    if process.poll() is None:
                        process.kill()
                out, err = process.communicate()
            if process.returncode == 0:
                return
            assert process.returncode == -signal.SIGKILL, (out, err)
            self.hits.append(self.moment(stale))

    def wait(self, process: subprocess.Popen, stale: int | None) -> None:
        """Until a random moment of the start, the first steps, the training, or a checkpoint's writing."""
        kind = self.random.choice(
            ["start", "first steps", "training", "training", "checkpoint", "checkpoint"]
        )
        if kind == "start":
            time.sleep(self.random.uniform(0, 3))
            return
        # The last line before the first step, or a random epoch's.
        awaited = 0 if kind == "first steps" else self.random.randint(0, 2)
        for line in process.stdout:
            awaited -= line.startswith("epoch")
            if awaited <= 0 and line.startswith(("in all", "epoch")):
                break
        if kind == "checkpoint":
            deadline = time.monotonic() + 10
            while (
                self.half_written() in (None, stale)
                and process.poll() is None
                and time.monotonic() < deadline
            ):
                pass
            time.sleep(self.random.uniform(0, 0.004))
        else:
            time.sleep(self.random.uniform(0, 1.5 if kind == "first steps" else 0.3))

    def half_written(self) -> int | None:
        """When the temporary file beside the checkpoint was last written to, in ns; None: there is none."""
        try:
            return (self.save / "checkpoint.pt.tmp").stat().st_mtime_ns
        except FileNotFoundError:
            return None

    def moment(self, stale: int | None) -> str:
        """What the kill left behind; a temporary file of time `stale` is an earlier kill's."""
        if self.half_written() not in (None, stale):
            return "checkpoint"
        if not (self.save / "checkpoint.pt").exists():
            return "first epoch" if (self.save / "log.txt").exists() else "start"
        lines = (self.save / "log.txt").read_bytes().splitlines()
        return "between log and checkpoint" if len(lines) > load(self.save)["epoch"] else "epoch"


class TestSigkill:
    EPOCHS = 8

    def killed_runs(self, tiny, tmp_path, method, kills, seed):
        """As many runs as it takes; each must end as the uninterrupted one. Returns what the kills hit."""
        flags = ["--epochs", self.EPOCHS, "--epoch_step", "[3,6]", "--resume", "auto"]
        reference = tmp_path / "reference"
        assert call(*tiny(method, reference, *flags)).code == 0
        hits = []
        while len(hits) < kills:
            save = tmp_path / f"run{len(hits)}"
            killer = Killer(tiny(method, save, *flags), save, seed + len(hits))
            killer.run(kills - len(hits))
            hits += killer.hits
            assert_same_run(save, reference)
            assert [stats["epoch"] for stats in log_lines(save)] == list(range(1, self.EPOCHS + 1))
            assert scalars(save) == scalars(reference)
            assert not list(save.glob("*.tmp"))
        return hits

    def test_two_kills_at_random_moments(self, tiny, tmp_path):
        assert len(self.killed_runs(tiny, tmp_path, "SGDG", 2, seed=1)) == 2

    @pytest.mark.long
    @pytest.mark.parametrize("method", METHODS)
    def test_twenty_kills_at_random_moments(self, tiny, tmp_path, method):
        hits = self.killed_runs(tiny, tmp_path, method, 20, seed=2)
        print({moment: hits.count(moment) for moment in sorted(set(hits))})
        assert len(hits) == 20
