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
from collections import defaultdict
from pathlib import Path

import pytest
import torch
from helpers import METHODS, ROOT, STEPS, assert_same_run, call, contents, load, log_lines, stop_at
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.util.tensor_util import make_ndarray
from torch import nn

import main
import report
import utils
from grassmann_optimizer import SGDG

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


def resume(save, *flags):
    outcome = call("--resume", save, *flags)
    assert (outcome.code, outcome.err) == (0, "")
    return outcome


def curves(save: Path) -> dict[tuple[str, int], set]:
    """The values that TensorBoard's files, read one by one, have for each tag and step."""
    values = defaultdict(set)
    for file in save.glob("events*"):
        events = EventAccumulator(str(file), {"tensors": 0}, purge_orphaned_data=False).Reload()
        for tag in set(events.Tags()["tensors"]) - {"config/text_summary"}:
            for event in events.Tensors(tag):
                values[tag, event.step].add(make_ndarray(event.tensor_proto).item())
    return values


def assert_same_curves(save, expected):
    """The same tags and steps with the same values, however often they were written; speed aside."""
    found, expected = curves(save), curves(expected)
    assert found.keys() == expected.keys()
    for (tag, step), values in expected.items():
        assert found[tag, step] == values or tag == "speed/images_per_sec", (tag, step)


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
        assert f"after {utils.counted(epochs, 'epoch')} and {steps} of {STEPS} steps" in outcome.out
        state = load(save)
        assert (state["epoch"], state["batch"]) == (epochs, steps)
        assert len(log_lines(save)) == epochs
        where = utils.counted(epochs, "epoch") + (f" and {utils.counted(steps, 'step')}" if steps else "")
        assert where in resume(save, "--eval").out
        resume(save)
        assert_same_run(save, finished[method][0])

    @pytest.mark.parametrize("flags", ["--select measured --width 2", "--grad_clip none"])
    def test_a_run_with_rare_options_ends_with_the_same_bits(self, tiny, tmp_path, monkeypatch, flags):
        whole, save = tmp_path / "whole", tmp_path / "run"
        assert call(*tiny("SGDG", whole, *flags.split())).code == 0
        stopped_run(tiny, monkeypatch, "SGDG", save, CHECKS + 1, *flags.split())
        resume(save)
        assert_same_run(save, whole)

    def test_a_stop_in_the_last_check_is_no_stop(self, tiny, finished, tmp_path, monkeypatch):
        outcome = stopped_run(tiny, monkeypatch, "SGD", tmp_path / "run", 2 * CHECKS)
        assert "finished 2 epochs" in outcome.out
        assert_same_run(tmp_path / "run", finished["SGD"][0])

    def test_a_run_gets_on_however_short_max_minutes_is(self, tiny, finished, tmp_path):
        save = tmp_path / "a run"  # the message quotes the space
        outcome = call(*tiny("SGDG", save, "--max_minutes", "1e-9"))
        for steps in range(1, 2 * STEPS):
            assert (outcome.code, outcome.err) == (0, "")
            where = f"after {utils.counted(steps // STEPS, 'epoch')} and {steps % STEPS} of {STEPS} steps"
            assert outcome.out.splitlines()[-1].startswith(f"stopped by --max_minutes {where}")
            outcome = self.continue_as_told(outcome, "--max_minutes", "1e-9")
        assert "finished 2 epochs" in outcome.out
        assert_same_run(save, finished["SGDG"][0])

    def test_max_minutes_counts_from_the_start_of_the_process(self, tiny, tmp_path, monkeypatch, capsys):
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
        assert self.continue_as_told(outcome).code == 0
        assert_same_run(save, finished["AdamG"][0])

    def continue_as_told(self, outcome, *more):
        interpreter, script, *flags = shlex.split(outcome.out.splitlines()[-1].split("to continue: ")[1])
        assert Path(shutil.which(interpreter) or "").samefile(sys.executable) or interpreter == "python"
        assert script == "main.py"
        return call(*flags, *more)

    def test_a_signal_to_the_process_itself(self, tiny, tmp_path):
        with start(tiny("SGD", tmp_path / "run", "--epochs", 10_000)) as process:
            for line in process.stdout:
                if line.startswith("epoch"):
                    break
            process.send_signal(signal.SIGTERM)
            out, err = process.communicate()
        assert (process.returncode, err) == (143, "")
        assert out.splitlines()[-1].endswith(f" main.py --resume {tmp_path / 'run'}")
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


class TestResume:
    def test_tensorboard_has_one_value_for_each_step(self, tiny, finished, tmp_path, monkeypatch):
        """Also of an epoch that was logged and then lost, and of one in two parts."""
        save, true_save = tmp_path / "run", main.save_checkpoint

        def die(path, state):
            if state["epoch"] == 2:
                raise KeyboardInterrupt  # the second epoch is logged, but not in the checkpoint
            true_save(path, state)

        with monkeypatch.context() as patch:
            patch.setattr(main, "save_checkpoint", die)
            assert call(*tiny("SGDG", save)).code == 130
        assert (len(log_lines(save)), load(save)["epoch"]) == (2, 1)
        with (save / "log.txt").open("a") as log:
            log.write('json_stats: {"train_loss": 0.5, "tra')  # as a kill leaves a line
        stopped_run(tiny, monkeypatch, "SGDG", save, 2, "--resume", "auto")
        assert len(log_lines(save)) == 1
        resume(save)
        assert_same_run(save, finished["SGDG"][0])
        assert [stats["epoch"] for stats in log_lines(save)] == [1, 2]
        assert_same_curves(save, finished["SGDG"][0])
        files = [EventAccumulator(str(file)).Reload() for file in save.glob("events*")]
        assert sum("training/augmented_images" in file.Tags()["images"] for file in files) == 1
        assert len(list(finished["SGDG"][0].glob("events*"))) == 1  # of two, the order of reading would count

    def test_auto_without_a_checkpoint_starts_anew(self, tiny, finished, tmp_path):
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

    def test_more_epochs_are_as_if_asked_for_from_the_start(self, tiny, finished, tmp_path):
        save = tmp_path / "run"
        assert call(*tiny("AdamG", save, "--epochs", 1)).code == 0
        resume(save, "--epochs", 2)
        assert_same_run(save, finished["AdamG"][0], but=("epochs",))
        assert load(save)["options"]["epochs"] == 2

    @pytest.mark.parametrize("nthread", [0, 3])
    def test_threads_device_and_dataroot_may_change(
        self, tiny, finished, images_root, tmp_path, monkeypatch, nthread
    ):
        save, moved = tmp_path / "run", shutil.copytree(images_root, tmp_path / "moved")
        stopped_run(tiny, monkeypatch, "AdamG", save, 2)
        may_change = {"nthread": nthread, "device": "cpu", "dataroot": moved}
        resume(save, *(f"--{name}={value}" for name, value in may_change.items()), "--max_minutes", 600)
        assert_same_run(save, finished["AdamG"][0], but=tuple(may_change))

    def test_an_epochs_time_has_the_seconds_before_the_stop(self, tiny, tmp_path, monkeypatch):
        save = tmp_path / "run"
        stopped_run(tiny, monkeypatch, "SGD", save, 2)
        torch.save(load(save) | {"train_time": 1e6}, save / "checkpoint.pt")
        resume(save)
        times = [json.loads(line.split(" ", 1)[1])["train_time"] for line in (save / "log.txt").open()]
        assert times[0] > 1e6 > times[1]

    def test_a_checkpoint_goes_on_elsewhere_and_stays_as_it_was(self, tiny, finished, tmp_path, monkeypatch):
        stopped_run(tiny, monkeypatch, "SGD", tmp_path / "run", 2)
        before = contents(tmp_path / "run")
        source = tmp_path / "run" / "checkpoint.pt"
        resume(source, "--save", tmp_path / "branch")
        assert contents(tmp_path / "run") == before
        assert_same_run(tmp_path / "branch", finished["SGD"][0])
        resume(source)
        assert_same_run(tmp_path / "run", finished["SGD"][0])

    def test_a_finished_run_says_so_and_changes_nothing(self, tiny, finished):
        save = finished["SGDG"][0]
        before = contents(save)
        for words in (tiny("SGDG", save, "--resume", "auto"), ("--resume", save)):
            outcome = call(*words)
            assert (outcome.code, outcome.err) == (0, "")
            assert re.search(r"nothing to do: .* has its 2 epochs", outcome.out)
            assert contents(save) == before

    def test_a_checkpoint_of_another_machine_goes_on_with_a_note(self, tiny, finished, tmp_path, monkeypatch):
        """Of one with a GPU, whose generator has a state of its own, and with other threads."""
        save = tmp_path / "run"
        stopped_run(tiny, monkeypatch, "SGD", save, 2)
        state = load(save)
        state["environment"] |= {"threads": 2, "float32_convolutions": "TF32"}
        state["generators"]["cuda"] = torch.zeros(16, dtype=torch.uint8)
        torch.save(state, save / "checkpoint.pt")
        monkeypatch.setattr(torch.cuda, "set_rng_state", None)  # torch would keep it in mind for a first GPU
        out = resume(save).out
        assert "threads 2 then, 1 now; float32_convolutions TF32 then, float32 now" in out
        assert_same_run(save, finished["SGD"][0])


# ------------------------------------------------------------------- what shows only the second or third time


def test_the_checkpoint_before_is_always_the_last_but_one(tiny, tmp_path, monkeypatch):
    save, seen = tmp_path / "run", []
    true_save = main.save_checkpoint

    def save_and_look(path, state):
        true_save(path, state)
        seen.append([torch.load(file)["epoch"] for file in sorted(save.glob("checkpoint*.pt"))])

    monkeypatch.setattr(main, "save_checkpoint", save_and_look)
    assert call(*tiny("SGD", save, "--epochs", 4)).code == 0
    assert seen == [[1], [1, 2], [2, 3], [3, 4]]  # checkpoint.previous.pt, checkpoint.pt


def test_the_probe_takes_the_mean_over_steps_and_over_layers_and_starts_anew():
    """Two layers that turn by angles of their own; the second of the steps is not measured."""
    layers = [nn.Conv2d(1, 1, (1, 4), bias=False) for _ in range(2)]
    groups = [{"params": [layer.weight for layer in layers], "omega": 0.0, "grad_clip": None}]
    optimizer = SGDG(groups, lr=1.0, momentum=0.0, grassmann=True)
    probe = report.GrassmannProbe(nn.Sequential(*layers), optimizer, torch.device("cpu"))

    def step(*angles, measured=True):
        probe.active = measured
        for layer, angle in zip(layers, angles, strict=True):
            y = layer.weight.detach().flatten()
            across = torch.stack([-y[1], y[0], -y[3], y[2]])
            layer.weight.grad = (angle * across / across.norm()).view(1, 1, 1, 4)
        optimizer.step()

    def radians():
        means, by_layer = probe.read()
        found = [by_layer[f"rows_by_layer_angle_degrees/{i}"] for i in range(2)]
        return torch.tensor([*found, means["angle_degrees"]]).deg2rad().tolist()

    step(0.1, 0.4)
    step(1.0, 1.0, measured=False)
    step(0.3, 0.6)
    assert radians() == pytest.approx([0.2, 0.5, 0.35], rel=1e-4)
    step(0.2, 0.8)
    assert radians() == pytest.approx([0.2, 0.8, 0.5], rel=1e-4)
    assert probe.read() == (dict.fromkeys(probe.NAMES), {})


# ----------------------------------------------------------------------------------------- kills of a process


def start(argv) -> subprocess.Popen:
    """main.py as a process of its own."""
    command = [sys.executable, ROOT / "main.py", *argv]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_for_a_moment(process: subprocess.Popen, save: Path, draw: random.Random) -> None:
    """Until a random moment of the start, the training, or a checkpoint's writing."""
    kind, epochs = draw.choice(["start", "training", "checkpoint"]), draw.randint(0, 2)
    if kind == "start":
        time.sleep(draw.uniform(0, 3))
        return
    for line in process.stdout:  # to the last line before the first step, or to an epoch's
        epochs -= line.startswith("epoch")
        if epochs <= 0 and line.startswith(("in all", "epoch")):
            break
    while kind == "checkpoint" and process.poll() is None and not half_written(save):
        pass
    time.sleep(draw.uniform(0, 0.3 if kind == "training" else 0.004))


def half_written(save: Path) -> list[Path]:
    return list(save.glob(".checkpoint.pt.*.tmp"))


@pytest.mark.long
@pytest.mark.parametrize("method", METHODS)
def test_a_run_killed_at_twenty_random_moments_ends_with_the_same_bits(tiny, tmp_path, method):
    """As many runs as it takes; of the last one the last call is left alone."""
    flags = ["--epochs", 8, "--epoch_step", "[3,6]", "--resume", "auto"]
    whole, kills, draw = tmp_path / "whole", 0, random.Random(2)
    assert call(*tiny(method, whole, *flags)).code == 0
    while kills < 20:
        save, code = tmp_path / f"after{kills}", None
        while code != 0:
            with start(tiny(method, save, *flags)) as process:
                if kills < 20:
                    wait_for_a_moment(process, save, draw)
                    process.kill()
                out, err = process.communicate()
            code = process.returncode
            assert code in (0, -signal.SIGKILL), (out, err)
            kills += code != 0
        assert_same_run(save, whole)
        assert_same_curves(save, whole)
        assert not half_written(save)
