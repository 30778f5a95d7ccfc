"""What a run leaves: config.json, log.txt, TensorBoard, a checkpoint that is whole; the probe's numbers."""

import hashlib
import io
import json
import math
import os
import re
import shutil
import stat
import subprocess
import threading
import time
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers import (
    METHODS,
    STEPS,
    assert_one_sentence,
    assert_same_run,
    bits,
    call,
    contents,
    load,
    log_lines,
    wait_for_the_next_second,
)
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.summary.writer.record_writer import RecordWriter
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

import checkpoint
import grassmann_optimizer
import main
import report
import utils
from data import load_data
from grassmann_optimizer import SGDG, unit
from resnet import WideResNet
from utils import UserError

RATES = {"SGD": (0.1, None), "SGDG": (0.01, 0.2), "AdamG": (0.01, 0.05)}


def board(directory) -> EventAccumulator:
    """All that TensorBoard knows of the run in `directory`; there must be no second run below it."""
    assert not [path for path in directory.iterdir() if path.is_dir()]
    events = EventAccumulator(str(directory), size_guidance={"scalars": 0, "images": 0, "tensors": 0})
    return events.Reload()


class TestConfig:
    @pytest.mark.parametrize("method", METHODS)
    def test_holds_options_versions_device_and_commit(self, finished, method):
        config = json.loads((finished[method][0] / "config.json").read_text())
        assert config["options"]["optim_method"] == method
        assert (config["options"]["lr"], config["options"]["lrg"]) == RATES[method]
        assert config["options"]["epoch_step"] == [1]
        assert config["versions"]["torch"] == torch.__version__
        assert config["versions"].keys() >= {"python", "numpy", "opencv"}
        assert "CPU" in config["device"]
        assert config["threads"] == 1
        assert config["float32_convolutions"] == "float32"
        assert config["git_commit"] is None or re.fullmatch("[0-9a-f]{40}(-dirty)?", config["git_commit"])

    @pytest.mark.parametrize(
        ("capability", "precision"), [((7, 5), "float32"), ((8, 0), "TF32"), ((9, 0), "TF32")]
    )
    def test_says_whether_a_gpu_convolves_in_tf32(self, monkeypatch, capability, precision):
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        where = utils.environment(torch.device("cuda"))
        assert (where["device"], where["float32_convolutions"]) == ("a GPU", precision)

    def test_holds_the_number_of_images_and_the_digest_of_the_arrays(self, finished, images_root):
        recorded = json.loads((finished["SGD"][0] / "config.json").read_text())["data"]
        data = load_data("folder", images_root)
        assert (recorded["train_images"], recorded["test_images"], recorded["classes"]) == (48, 18, 3)
        assert recorded["sha256"] == data.sha256
        assert len(recorded["sha256"]) == len(hashlib.sha256().hexdigest())
        assert recorded["mean"] == list(data.mean)
        assert recorded["std"] == list(data.std)


@pytest.mark.skipif(not shutil.which("git"), reason="needs git")
def test_a_changed_file_is_told_from_the_commit(tmp_path, monkeypatch):
    for name in ("GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE"):  # as a hook of git would set them
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(utils, "__file__", str(tmp_path / "utils.py"))
    git = ["git", "-C", tmp_path, "-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false"]
    (tmp_path / "utils.py").write_text("committed")
    for words in (["init", "-q"], ["add", "utils.py"], ["commit", "-qm", "all"]):
        subprocess.run([*git, *words], check=True)
    for text, end in (("committed", ""), ("changed", "-dirty")):
        (tmp_path / "utils.py").write_text(text)
        utils.write_config(tmp_path, {}, torch.device("cpu"))
        config = json.loads((tmp_path / "config.json").read_text())
        assert re.fullmatch("[0-9a-f]{40}" + end, config["git_commit"])
        assert "git_error" not in config


@pytest.mark.skipif(not shutil.which("git"), reason="needs git")
def test_where_git_does_not_know_the_commit_it_says_why(tmp_path, monkeypatch):
    monkeypatch.setattr(utils, "__file__", str(tmp_path / "utils.py"))
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    for path, reason in ((os.environ["PATH"], "not a git repository"), ("", "No such file")):
        monkeypatch.setenv("PATH", path)
        utils.write_config(tmp_path, {}, torch.device("cpu"))
        config = json.loads((tmp_path / "config.json").read_text())
        assert config["git_commit"] is None
        assert reason in config["git_error"]


class TestLog:
    @pytest.mark.parametrize("method", METHODS)
    def test_has_one_line_per_epoch_with_every_key(self, finished, method):
        save = finished[method][0]
        config = json.loads((save / "config.json").read_text())
        lines = (save / "log.txt").read_text().splitlines()
        assert len(lines) == 2
        for k, line in enumerate(lines, 1):
            assert line.startswith("json_stats: {")
            stats = json.loads(line.removeprefix("json_stats: "))
            assert stats["epoch"] == k
            for key in ("train_loss", "test_loss", "train_time", "test_time", "images_per_sec"):
                assert 0 < stats[key] < math.inf
            for key in ("train_acc", "test_acc"):
                assert 0 <= stats[key] <= 100
            assert stats["train_acc"] * 48 / 100 == pytest.approx(round(stats["train_acc"] * 48 / 100))
            assert stats["test_acc"] * 18 / 100 == pytest.approx(round(stats["test_acc"] * 18 / 100))
            assert stats["images_per_sec"] == pytest.approx(48 / stats["train_time"])
            assert (stats["n_parameters"], stats["num_classes"]) == (77_395, 3)
            own = ("lr", "lrg")  # of this epoch, where the option is that of the first
            assert {k: stats[k] for k in config["options"] if k not in own} == {
                k: v for k, v in config["options"].items() if k not in own
            }

    def test_tells_the_time_of_training_from_that_of_testing(self, tiny, tmp_path, monkeypatch):
        """On a clock that only steps, 2 seconds each, and evaluations, 5, move on."""
        now = [0.0]

        def takes(seconds, function):
            def timed(*args):
                now[0] += seconds
                return function(*args)

            return timed

        monkeypatch.setattr(time, "perf_counter", lambda: now[0])
        monkeypatch.setattr(main.Training, "step", takes(2.0, main.Training.step))
        monkeypatch.setattr(main, "evaluate", takes(5.0, main.evaluate))
        assert call(*tiny("SGD", tmp_path / "run")).code == 0
        for stats in load(tmp_path / "run")["history"]:
            assert (stats["train_time"], stats["test_time"]) == (2.0 * STEPS, 5.0)

    @pytest.mark.parametrize("method", METHODS)
    def test_rates_drop_in_the_epochs_of_epoch_step_counted_from_0(self, tiny, tmp_path, method):
        flags = ["--epochs", 4, "--epoch_step", "[1,3]", "--lr_decay_ratio", 0.5]
        assert call(*tiny(method, tmp_path / "run", *flags)).code == 0
        lr, lrg = RATES[method]
        for k, stats in enumerate(log_lines(tmp_path / "run")):
            factor = 0.5 ** ((k >= 1) + (k >= 3))
            assert stats["lr"] == pytest.approx(lr * factor)
            assert stats["lrg"] == (None if lrg is None else pytest.approx(lrg * factor))

    def test_the_line_on_the_terminal_says_the_same(self, finished):
        save, outcome = finished["SGDG"]
        shown = re.findall(r"train loss ([\d.]+) error +([\d.]+)%  test ([\d.]+) +([\d.]+)%", outcome.out)
        for numbers, stats in zip(shown, log_lines(save), strict=True):
            expected = (
                stats["train_loss"],
                100 - stats["train_acc"],
                stats["test_loss"],
                100 - stats["test_acc"],
            )
            assert tuple(map(float, numbers)) == pytest.approx(expected, abs=0.0051)


class TestTensorBoard:
    @pytest.mark.parametrize("method", METHODS)
    def test_has_the_scalars_of_every_epoch_with_its_wall_time(self, finished, method):
        save = finished[method][0]
        events, log = board(save), log_lines(save)
        tags = {
            "loss/train": [stats["train_loss"] for stats in log],
            "loss/test": [stats["test_loss"] for stats in log],
            "error/train": [100 - stats["train_acc"] for stats in log],
            "error/test": [100 - stats["test_acc"] for stats in log],
            "learning_rate/lr": [stats["lr"] for stats in log],
        }
        if method != "SGD":
            tags["learning_rate/lrg"] = [stats["lrg"] for stats in log]
        for tag, values in tags.items():
            assert [e.step for e in events.Scalars(tag)] == [1, 2]
            assert [e.value for e in events.Scalars(tag)] == pytest.approx(values, rel=1e-6)
            assert all(abs(e.wall_time - time.time()) < 3600 for e in events.Scalars(tag))
        assert [e.step for e in events.Scalars("images_per_sec")] == [1, 2]

    @pytest.mark.parametrize("method", METHODS)
    def test_has_the_probe_of_each_grassmann_layer(self, finished, method):
        events = board(finished[method][0])
        layers = ["conv0"] + [f"group{i}.block0.conv{j}" for i in range(3) for j in (0, 1)]
        wanted = {f"per_layer_{name}/{layer}" for name in report.GrassmannProbe.NAMES for layer in layers}
        found = {tag for tag in events.Tags()["scalars"] if tag.startswith("per_layer")}
        assert found == wanted  # SGD's too: the directions of the same layers
        for tag in found:
            assert [e.step for e in events.Scalars(tag)] == [1, 2]
        for name in report.GrassmannProbe.NAMES:  # over all layers: the mean
            values = [[e.value for e in events.Scalars(f"per_layer_{name}/{layer}")] for layer in layers]
            means = [sum(of_epoch) / len(layers) for of_epoch in zip(*values, strict=True)]
            assert [e.value for e in events.Scalars(f"grassmann/{name}")] == pytest.approx(means, rel=1e-5)

    def test_an_epoch_is_on_disk_at_once(self, finished, tmp_path):
        stats = log_lines(finished["SGDG"][0])[0] | {"images_per_sec": 1.0}
        writer = report.RunLog(tmp_path, 0)
        writer.add(stats, {})
        assert [e.step for e in board(tmp_path).Scalars("loss/test")] == [1]
        writer.close()

    def test_has_configuration_images_and_hyperparameters_in_the_same_run(self, finished):
        save = finished["AdamG"][0]
        events = board(save)
        text = events.Tensors("config/text_summary")[0].tensor_proto.string_val[0].decode()
        assert '"optim_method": "AdamG"' in text
        (grid,) = events.Images("augmented images")
        assert (grid.height, grid.width) >= (64, 64)  # at least two rows and two columns of images
        last = log_lines(save)[-1]
        (error,), (loss,) = events.Scalars("hparam/test_error"), events.Scalars("hparam/train_loss")
        assert (error.step, loss.step) == (2, 2)
        assert error.value == pytest.approx(100 - last["test_acc"], rel=1e-6)
        assert loss.value == pytest.approx(last["train_loss"], rel=1e-6)
        start = events.PluginTagToContent("hparams")["_hparams_/session_start_info"]
        for name in ("optim_method", "lrg", "epoch_step"):
            assert name.encode() in start
        assert b"dataroot" not in start  # changes no result

    def test_of_a_run_with_more_epochs_it_shows_the_new_number(self, finished, tmp_path):
        save = shutil.copytree(finished["SGD"][0], tmp_path / "run")
        wait_for_the_next_second()
        assert call("--resume", save, "--epochs", 3).code == 0
        events = board(save)
        assert [event.value for event in events.Scalars("hparam/epochs")] == [2, 3]
        assert b"epochs" not in events.PluginTagToContent("hparams")["_hparams_/session_start_info"]

    def test_errors_of_other_threads_are_still_printed(self, monkeypatch):
        told = []
        monkeypatch.setattr(threading, "excepthook", told.append)
        with report.disk_errors_said_once():
            thread = threading.Thread(target=lambda: Path("/nowhere").read_text())
            thread.start()
            thread.join()
        assert [args.exc_type for args in told] == [FileNotFoundError]

    def test_a_full_disk_is_one_sentence(self, tiny, tmp_path, monkeypatch):
        written, write = [], RecordWriter.write

        def fill_up(writer, data):
            written.append(data)
            if len(written) > limit:
                raise OSError(28, "No space left on device")
            write(writer, data)

        monkeypatch.setattr(RecordWriter, "write", fill_up)
        for limit in (0, 3, 20):
            written.clear()
            outcome = call(*tiny("SGD", tmp_path / str(limit)))
            assert_one_sentence(outcome, 1, "No space left", "--resume")


class TestCheckpoint:
    @pytest.mark.parametrize("method", METHODS)
    def test_is_tensors_and_plain_values_only(self, finished, method):
        def walk(value, where):
            if isinstance(value, dict):
                for key, item in value.items():
                    assert type(key) in (str, int), where
                    walk(item, f"{where}.{key}")
            elif type(value) in (list, tuple):
                for index, item in enumerate(value):
                    walk(item, f"{where}[{index}]")
            elif isinstance(value, torch.Tensor):
                assert type(value) is torch.Tensor, where
                assert value.device.type == "cpu", where
            else:
                assert type(value) in (str, int, float, bool, type(None)), where

        state = load(finished[method][0])  # weights_only=True
        walk(state, method)
        parts = "model optimizer scaler epoch batch sums options generators environment"
        assert state.keys() >= set(parts.split())
        assert state["environment"]["threads"] == 1
        assert (state["epoch"], state["batch"]) == (2, 0)

    def test_its_directory_has_nothing_left_over(self, finished):
        for save, _ in finished.values():
            names = {re.sub(r"^events.*", "events", path.name) for path in save.iterdir()}
            assert names == {"config.json", "log.txt", "checkpoint.pt", "lock", "events"}

    @pytest.mark.parametrize("method", METHODS)
    def test_the_same_command_twice_gives_the_same_bits(self, tiny, finished, tmp_path, method):
        torch.rand(7)  # the run does not depend on what was drawn before it
        assert call(*tiny(method, tmp_path / "again")).code == 0
        assert_same_run(tmp_path / "again", finished[method][0])

    def test_another_seed_gives_another_network(self, tiny, finished, tmp_path):
        assert call(*tiny("SGDG", tmp_path / "run", "--seed", 1)).code == 0
        ours, theirs = load(tmp_path / "run")["model"], load(finished["SGDG"][0])["model"]
        assert not torch.equal(ours["conv0.weight"], theirs["conv0.weight"])

    @pytest.mark.parametrize("method", METHODS)
    def test_eval_prints_the_numbers_of_the_last_epoch(self, finished, method):
        save, outcome = finished[method]
        before = contents(save)
        loss, error = re.findall(r"test ([\d.]+) +([\d.]+)%", outcome.out)[-1]
        for source in (save, save / "checkpoint.pt"):
            evaluated = call("--eval", "--resume", source)
            assert (evaluated.code, evaluated.err) == (0, "")
            assert f"\nloss {loss}, top-1 error {error}%\n" in evaluated.out  # three classes have no top 5
            assert re.findall(r"^  (class\d) +6 images  error +[\d.]+%$", evaluated.out, re.M) == [
                "class0",
                "class1",
                "class2",
            ]
            assert max(map(len, evaluated.out.splitlines())) <= 80
        assert contents(save) == before

    def test_top5_counts_the_five_most_likely_of_more_classes(self, capsys):
        logits = torch.arange(8.0).repeat(4, 1)  # 7 is the most likely class, 3 the fifth
        report.print_evaluation(logits, torch.tensor([7, 3, 2, 0]), tuple("abcdefgh"), "eight classes")
        out = capsys.readouterr().out
        assert "top-1 error 75.00%, top-5 error 50.00%" in out
        assert re.search(r"^  d +1 images  error 100.00%$", out, re.M)
        assert re.search(r"^  h +1 images  error   0.00%$", out, re.M)
        assert re.search(r"^  e +0 images  no error to tell$", out, re.M)
        report.print_evaluation(logits[:, :5], torch.tensor([4, 3, 2, 0]), tuple("abcde"), "five classes")
        assert "top-5" not in capsys.readouterr().out  # would be 0 whatever the network does

    @pytest.mark.parametrize("method", METHODS)
    def test_bfloat16_trains_on_the_cpu(self, tiny, finished, tmp_path, method):
        assert call(*tiny(method, tmp_path / "run", "--dtype", "bfloat16")).code == 0
        stats, full = log_lines(tmp_path / "run")[-1], log_lines(finished[method][0])[-1]
        assert stats["dtype"] == "bfloat16"
        assert stats["train_loss"] != full["train_loss"]
        assert stats["train_loss"] == pytest.approx(full["train_loss"], rel=0.3)
        for value in load(tmp_path / "run")["model"].values():
            assert value.dtype in (torch.float32, torch.int64)  # only the computation is in bfloat16

    def test_a_run_begins_with_a_note_where_bfloat16_is_slow(self, tiny, tmp_path, monkeypatch):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"architecture": "x86_64"}, raising=False)
        for dtype, notes in (("bfloat16", 1), ("float32", 0)):
            out = call(*tiny("SGD", tmp_path / dtype, "--dtype", dtype, "--epochs", 1)).out
            assert ("note: this CPU has no bfloat16" in out) == (out.count("note:") == 1) == notes

    @pytest.mark.parametrize(
        ("has", "device"),
        [
            ({"architecture": "x86_64", "avx512_bf16": True, "amx_bf16": False}, "cpu"),
            ({"architecture": "x86_64", "avx512_bf16": False, "amx_bf16": True}, "cpu"),
            ({"architecture": "x86_64"}, "cuda"),
            ({"architecture": "arm64"}, "cpu"),
            (None, "cpu"),  # an older torch
        ],
    )
    def test_no_note_where_bfloat16_is_not_slow_or_nobody_knows(self, has, device, monkeypatch, capsys):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: has, raising=False)
        if has is None:
            monkeypatch.delattr(torch.cpu, "get_capabilities")
        utils.note_slow_bfloat16("bfloat16", torch.device(device))
        assert capsys.readouterr().out == ""


class Broken(io.RawIOBase):
    """A value whose pickling fails when half of the file is written."""

    def __reduce__(self):
        raise OSError(28, "No space left on device")


class TestInterruptedWrite:
    def fails_with(self, path, value):
        with pytest.raises(UserError, match=r"cannot write .*free some space"):
            checkpoint.save_checkpoint(path, value)

    def test_a_failing_write_leaves_the_old_file_whole(self, tmp_path):
        path = tmp_path / "checkpoint.pt"
        checkpoint.save_checkpoint(path, {"model": torch.arange(1000)})
        before = path.read_bytes()
        self.fails_with(path, {"model": torch.zeros(1000), "then": Broken()})
        assert contents(tmp_path) == {"checkpoint.pt": before, "checkpoint.previous.pt": before}

    def test_a_failing_write_leaves_no_half_file(self, tmp_path):
        self.fails_with(tmp_path / "checkpoint.pt", {"model": Broken()})
        assert contents(tmp_path) == {}

    @pytest.mark.parametrize("function", ["replace", "fsync"])
    def test_a_failing_system_call_leaves_the_old_file_whole(self, tmp_path, monkeypatch, function):
        path = tmp_path / "checkpoint.pt"
        checkpoint.save_checkpoint(path, {"model": torch.arange(1000)})
        before = path.read_bytes()

        def fail(*args):
            raise OSError(5, "Input/output error")

        monkeypatch.setattr(utils.os, function, fail)
        self.fails_with(path, {"model": torch.zeros(1000)})
        assert contents(tmp_path) == {"checkpoint.pt": before, "checkpoint.previous.pt": before}

    def test_content_then_name_reach_the_disk(self, tmp_path, monkeypatch):
        """Else a power cut might leave the new name with no content, or none at all."""
        done, replace = [], utils.os.replace
        monkeypatch.setattr(
            utils.os, "fsync", lambda fd: done.append(stat.S_ISDIR(os.fstat(fd).st_mode) and "folder")
        )
        monkeypatch.setattr(utils.os, "replace", lambda *names: done.append("rename") or replace(*names))
        checkpoint.save_checkpoint(tmp_path / "checkpoint.pt", {})
        assert done == [False, "rename", "folder"]
        log = utils.RunLog(tmp_path, [])
        done.clear()
        log.add({"epoch": 1})
        assert done == [False]

    def test_the_old_file_is_there_until_the_new_one_is_whole(self, tmp_path, monkeypatch):
        path = tmp_path / "checkpoint.pt"
        checkpoint.save_checkpoint(path, {"model": torch.arange(1000)})
        before, replace = path.read_bytes(), utils.os.replace

        def look(source, target):
            assert target == path
            assert path.read_bytes() == before
            assert torch.load(source, weights_only=True)["model"].sum() == 0
            replace(source, target)

        monkeypatch.setattr(utils.os, "replace", look)
        checkpoint.save_checkpoint(path, {"model": torch.zeros(1000)})
        assert torch.load(path, weights_only=True)["model"].sum() == 0

    def test_a_full_disk_ends_the_run_with_the_last_checkpoint_whole(
        self, tiny, finished, tmp_path, monkeypatch
    ):
        save = tmp_path / "run"
        kept, write = [], checkpoint.save_checkpoint

        def fill_up(path, state):
            if state["epoch"] == 2:
                kept.append(path.read_bytes())
                state = {**state, "history": Broken()}
            write(path, state)

        with monkeypatch.context() as patch:
            patch.setattr(main, "save_checkpoint", fill_up)
            assert_one_sentence(call(*tiny("SGDG", save)), 1, r"checkpoint\.pt", "No space left")
        assert (save / "checkpoint.pt").read_bytes() == kept[0]
        assert call(*tiny("SGDG", save, "--resume", "auto")).code == 0
        assert_same_run(save, finished["SGDG"][0])


class TestNotFinite:
    def test_a_diverging_run_stops_with_one_sentence(self, tiny, tmp_path):
        outcome = call(*tiny("SGD", tmp_path / "run", "--lr", "1e30"))
        assert_one_sentence(outcome, 1, "not finite", r"epoch 1, step 2\b", r"lr 1e\+30")
        assert not (tmp_path / "run" / "checkpoint.pt").exists()
        assert log_lines(tmp_path / "run") == []

    def test_the_last_good_checkpoint_stays(self, tiny, tmp_path):
        save = tmp_path / "run"
        assert call(*tiny("SGD", save, "--epochs", 1, "--lr_decay_ratio", "1e31")).code == 0
        good = (save / "checkpoint.pt").read_bytes()
        outcome = call("--resume", save, "--epochs", 2)
        assert_one_sentence(outcome, 1, "not finite", "epoch 2, step 2", r"lr 1e\+30", "kept")
        assert (save / "checkpoint.pt").read_bytes() == good
        assert [stats["epoch"] for stats in log_lines(save)] == [1]

    def poison(self, monkeypatch, reduction, at):
        """Make the at-th training loss (reduction mean) or test loss (sum) infinite, counted from 1."""
        calls, true_loss = [], main.cross_entropy

        def loss(logits, labels, **kwargs):
            calls.append(kwargs.get("reduction", "mean"))
            bad = calls[-1] == reduction and calls.count(reduction) == at
            return true_loss(logits, labels, **kwargs) * (math.inf if bad else 1)

        monkeypatch.setattr(main, "cross_entropy", loss)
        return calls

    @pytest.mark.parametrize("method", METHODS)
    @pytest.mark.parametrize("step", range(1, STEPS + 1))
    def test_the_first_bad_step_is_named(self, tiny, tmp_path, monkeypatch, method, step):
        self.poison(monkeypatch, "mean", STEPS + step)
        rates = [rf"lr {0.2 * RATES[method][0]:g}\b"]
        if method != "SGD":
            rates.append(rf"lrg {0.2 * RATES[method][1]:g}\b")
        outcome = call(*tiny(method, tmp_path / "run"))
        assert_one_sentence(outcome, 1, rf"epoch 2, step {step}\b", *rates)
        assert load(tmp_path / "run")["epoch"] == 1

    def test_the_first_bad_step_is_named_although_the_losses_are_read_now_and_then(
        self, tiny, tmp_path, monkeypatch
    ):
        # 24 steps, read after every third: those after step 4 are bad as well, the gradients having been.
        calls = self.poison(monkeypatch, "mean", 4)
        outcome = call(*tiny("SGD", tmp_path / "run", "--batchSize", 2))
        assert_one_sentence(outcome, 1, r"epoch 1, step 4\b")
        assert len(calls) == 6

    def test_a_stop_does_not_hide_it(self, tiny, tmp_path, monkeypatch):
        self.poison(monkeypatch, "mean", 1)
        outcome = call(*tiny("SGD", tmp_path / "run", "--max_minutes", "1e-9"))
        assert_one_sentence(outcome, 1, "epoch 1, step 1")
        assert not (tmp_path / "run" / "checkpoint.pt").exists()

    def test_neither_a_test_loss(self, tiny, tmp_path, monkeypatch):
        self.poison(monkeypatch, "sum", 4)  # the second of the second epoch's two test batches
        outcome = call(*tiny("SGD", tmp_path / "run"))
        assert_one_sentence(outcome, 1, "test loss is not finite after epoch 2")
        assert load(tmp_path / "run")["epoch"] == len(log_lines(tmp_path / "run")) == 1

    def test_nor_a_weight(self, tiny, tmp_path, monkeypatch):
        """It may come from the epoch's last step, whose loss was still finite."""
        true_step = main.Training.step

        def step(t, x, labels):
            result = true_step(t, x, labels)
            if (t.epoch, t.batch) == (1, STEPS - 1):
                with torch.no_grad():
                    t.model.fc.weight[0, 0] = math.nan
            return result

        monkeypatch.setattr(main.Training, "step", step)
        outcome = call(*tiny("SGD", tmp_path / "run"))
        assert_one_sentence(outcome, 1, f"a weight is not finite in epoch 2, after step {STEPS} ")
        assert load(tmp_path / "run")["epoch"] == len(log_lines(tmp_path / "run")) == 1


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_training_and_evaluation_are_in_the_precision_asked_for(tiny, tmp_path, monkeypatch, dtype):
    seen = {True: set(), False: set()}  # by training mode
    original = WideResNet.forward

    def forward(model, x):
        logits = original(model, x)
        seen[model.training].add(logits.dtype)
        return logits

    monkeypatch.setattr(WideResNet, "forward", forward)
    assert call(*tiny("SGD", tmp_path / "run", "--dtype", dtype)).code == 0
    assert seen == {True: {getattr(torch, dtype)}, False: {getattr(torch, dtype)}}


def test_weights_and_images_are_channels_last(tiny, tmp_path, images_root):
    """As the arrays are: no step has to transpose them."""
    data = load_data("folder", images_root)
    t = main.Training(main.parse_options(tiny("SGD", tmp_path / "run"))[0], data)
    x, _ = t.inputs(torch.from_numpy(data.test_images), torch.from_numpy(data.test_labels))
    for tensor in (x, t.model.conv0.weight, t.model.group1.block0.conv1.weight):
        assert tensor.is_contiguous(memory_format=torch.channels_last)


def test_the_probe_measures_four_steps_of_an_epoch(tiny, tmp_path, monkeypatch):
    true_step, active = main.Training.step, []

    def step(t, x, labels):
        active.append(t.probe.active)
        return true_step(t, x, labels)

    monkeypatch.setattr(main.Training, "step", step)
    assert call(*tiny("SGDG", tmp_path / "run", "--batchSize", 2, "--epochs", 1)).code == 0
    assert [k for k, measured in enumerate(active) if measured] == [0, 6, 12, 18]


def test_losses_are_scaled_in_float16_alone(tiny, tmp_path, images_root):
    """Whose gradients would underflow."""
    options, data = main.parse_options(tiny("SGD", tmp_path / "run"))[0], load_data("folder", images_root)
    for dtype in ("float32", "bfloat16", "float16"):
        t = main.Training(replace(options, dtype=dtype), data)
        assert t.scaler.is_enabled() == (dtype == "float16")


class TestProbe:
    """The probe on one layer whose movement is known in closed form."""

    def probe(self, weight, grad, *, lr, omega=0.0, grad_clip=0.1):
        layer = nn.Conv2d(1, len(weight), weight.shape[1:], bias=False)
        layer.weight.data = weight.clone()[:, None]
        layer.weight.grad = grad.clone()[:, None]
        groups = [
            {"params": [layer.weight], "grassmann": True, "omega": omega, "grad_clip": grad_clip, "lr": lr}
        ]
        optimizer = SGDG(groups)
        probe = report.GrassmannProbe(nn.Sequential(layer), optimizer, torch.device("cpu"))
        probe.active = True
        optimizer.step()
        return probe, layer.weight.detach()[:, 0]

    def orthonormal(self, rows=6, n=16):
        q, _ = torch.linalg.qr(torch.randn(n, n, generator=torch.Generator().manual_seed(0)))
        return q[:rows].reshape(rows, 4, n // 4).contiguous(), q[rows : 2 * rows].reshape(rows, 4, n // 4)

    def test_sgd_is_measured_on_the_layers_that_the_rule_would_take(self):
        y, tangent = self.orthonormal()
        layer, overcomplete = nn.Conv2d(1, 6, (4, 4), bias=False), nn.Conv2d(6, 6, 1, bias=False)
        layer.weight.data, layer.weight.grad = 2 * y[:, None], 3 * tangent[:, None]
        model = nn.Sequential(layer, overcomplete)
        optimizer = torch.optim.SGD([layer.weight], lr=0.1)
        probe = report.GrassmannProbe(model, optimizer, torch.device("cpu"))
        probe.active = True
        optimizer.step()
        means, layers = probe.read()
        assert (
            torch.linalg.vector_norm(layer.weight.flatten(1), dim=1).min() > 2
        )  # nothing was set to unit norm
        assert means["angle_degrees"] == pytest.approx(math.degrees(math.atan(0.1 * 3 / 2)), rel=1e-4)
        assert (means["clipped_share"], means["row_cosine"]) == (0, pytest.approx(0, abs=1e-6))
        assert {tag.split("/")[1] for tag in layers} == {"0"}

    def test_a_clipped_step_moves_by_the_rate_times_the_threshold(self):
        y, tangent = self.orthonormal()
        probe, _ = self.probe(y, 50 * tangent, lr=0.2)
        means, layers = probe.read()
        assert means["angle_degrees"] == pytest.approx(math.degrees(0.2 * 0.1), rel=1e-4)
        assert means["clipped_share"] == 1
        assert means["row_cosine"] == pytest.approx(0, abs=1e-6)
        assert layers == {f"per_layer_{name}/0": pytest.approx(value) for name, value in means.items()}

    def test_a_step_below_the_threshold_moves_by_the_rate_times_the_gradient(self):
        y, tangent = self.orthonormal()
        length = torch.tensor([0.02, 0.04, 0.06, 0.08, 0.2, 0.4]).view(
            -1, 1, 1
        )  # the last two are clipped to 0.1
        means, _ = self.probe(y, length * tangent + 3 * y, lr=0.5)[0].read()
        assert means["angle_degrees"] == pytest.approx(math.degrees(0.5 * (0.2 + 0.2) / 6), rel=1e-4)
        assert means["clipped_share"] == pytest.approx(2 / 6)

    def test_the_regularizer_counts_for_clipping(self):
        # As by hand in test_paper.py: without a loss each of these rows has a gradient of length 0.48.
        y = torch.tensor([[[1.0, 0.0, 0.0]], [[0.6, 0.8, 0.0]]])
        for grad_clip, share in ((0.47, 1), (0.49, 0)):
            probe, _ = self.probe(y, torch.zeros_like(y), lr=0.1, omega=0.5, grad_clip=grad_clip)
            assert probe.read()[0]["clipped_share"] == share

    def test_rest_and_no_clipping(self):
        y, tangent = self.orthonormal()
        means, _ = self.probe(y, torch.zeros_like(y), lr=0.5)[0].read()
        assert (means["angle_degrees"], means["clipped_share"]) == (pytest.approx(0, abs=1e-4), 0)
        means, _ = self.probe(y, 5 * tangent, lr=0.5, grad_clip=None)[0].read()
        assert means["clipped_share"] == 0
        assert means["angle_degrees"] == pytest.approx(math.degrees(2.5), rel=1e-4)

    def test_equal_rows_have_cosine_1(self):
        y = self.orthonormal()[0][:1].repeat(4, 1, 1)
        y[::2] *= -1
        assert self.probe(y, torch.zeros_like(y), lr=0.1)[0].read()[0]["row_cosine"] == pytest.approx(1)

    def test_random_steps_agree_with_the_angle_between_before_and_after(self):
        g = torch.Generator().manual_seed(1)
        before, grad = (torch.randn(8, 3, 3, generator=g) for _ in "12")
        probe, after = self.probe(before, grad, lr=2.0, omega=0.1)
        a, b = (unit(w.double().flatten(1))[0] for w in (before, after))
        cos = (a * b).sum(1)
        assert probe.read()[0]["angle_degrees"] == pytest.approx(cos.acos().rad2deg().mean().item(), rel=1e-4)
        off = (a @ a.T).abs()[~torch.eye(8, dtype=torch.bool)]
        assert probe.sums.abs().sum() == 0  # read() starts anew
        probe, _ = self.probe(before, grad, lr=2.0, omega=0.1)
        assert probe.read()[0]["row_cosine"] == pytest.approx(off.mean().item(), rel=1e-4)

    def test_only_the_steps_before_which_it_is_active_count(self):
        y, tangent = self.orthonormal()
        probe, _ = self.probe(y, 50 * tangent, lr=0.2)
        probe.read()
        assert probe.read() == (dict.fromkeys(report.GrassmannProbe.NAMES), {})

    @pytest.mark.parametrize("method", ["SGDG", "AdamG"])
    def test_measuring_changes_no_bit_of_the_weights(self, tiny, finished, tmp_path, monkeypatch, method):
        monkeypatch.setattr(report.GrassmannProbe, "_measure_before", lambda *args: None)
        monkeypatch.setattr(report.GrassmannProbe, "_measure_after", lambda *args: None)
        assert call(*tiny(method, tmp_path / "run")).code == 0
        ours, theirs = load(tmp_path / "run"), load(finished[method][0])
        assert bits(ours["model"]) == bits(theirs["model"])
        assert bits(ours["optimizer"]) == bits(theirs["optimizer"])


def test_the_bars_speed_is_that_of_this_process(monkeypatch):
    """After a resume in step 30 of an epoch, 10 more steps of 16 images in 4 seconds."""
    clock = iter((100.0, 104.0))
    monkeypatch.setattr(report.time, "perf_counter", lambda: next(clock))
    progress = report.Progress("epoch 1/1", 50, 30, 16)
    assert (progress.bar.n, progress.bar.total) == (30, 50)
    shown = []
    monkeypatch.setattr(progress.bar, "set_postfix_str", shown.append)
    progress.show(0.5, 12.5, 40)
    assert shown == ["loss 0.5000, error 12.50%, 40 img/s"]


def test_a_gpu_repeats_its_results():
    with utils.repeatable():
        assert torch.backends.cudnn.deterministic
        assert not torch.backends.cudnn.benchmark
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
        assert not torch.backends.cuda.matmul.allow_tf32  # the regularizer needs exact products


def test_a_run_can_be_moved(finished, tmp_path):
    """Everything that resumes or evaluates needs only the directory."""
    moved = shutil.copytree(finished["SGD"][0], tmp_path / "a name with spaces")
    assert call("--eval", "--resume", moved).code == 0
    assert call("--resume", moved, "--epochs", 3).code == 0
    assert [stats["epoch"] for stats in log_lines(moved)] == [1, 2, 3]


class CountReads(TorchDispatchMode):
    """Counts the times that the host reads a value from the device: each would wait for a GPU."""

    def __init__(self):
        super().__init__()
        self.reads = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.reads += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("method", METHODS)
def test_steps_do_not_wait_for_the_device(tiny, tmp_path, method, monkeypatch):
    """The loop reads a few times an epoch, however many steps it has."""
    reads = []
    train_epoch = main.train_epoch

    def counted(*args):
        with CountReads() as mode:
            train_epoch(*args)
        reads.append(mode.reads)

    monkeypatch.setattr(main, "train_epoch", counted)
    # On the CPU the optimizers look at norms on the host; tests/test_cuda.py shows that they do not on a GPU.
    for name in ("_advance", "_add_regularizer"):
        original = getattr(grassmann_optimizer, name)
        monkeypatch.setattr(grassmann_optimizer, name, _disable_current_modes()(original))
    for size in (16, 1):  # 3 and 48 steps
        arguments = tiny(method, tmp_path / f"{method}{size}", "--epochs", 1, "--batchSize", size)
        assert call(*arguments).code == 0
    few, many = reads
    assert many <= few + 12


def test_a_compiled_model_leaves_the_same_checkpoint_names(tiny, finished, tmp_path, monkeypatch):
    """`--compile`, by a backend that needs no C++ compiler and warns as the real one does on a GPU with TF32.

    Each size of a batch is compiled on its own: 16 of an epoch and 16 and 2 of an evaluation.
    """
    compile_model, sizes = torch.compile, []

    def backend(graph, inputs):
        warnings.warn("TensorFloat32 tensor cores for float32 are available", stacklevel=1)
        assert all(isinstance(value, torch.Tensor) for value in inputs)  # no symbol for a size
        sizes.extend(len(t) for t in inputs if t.shape[1:] == (3, 32, 32))
        return graph.forward

    monkeypatch.setattr(torch, "compile", lambda *a, **options: compile_model(*a, backend=backend, **options))
    save = tmp_path / "run"
    outcome = call(*tiny("SGD", save, "--compile"))
    assert (outcome.code, outcome.err, sizes) == (0, "", [16, 16, 2])
    torch._dynamo.reset()
    assert load(save)["model"].keys() == load(finished["SGD"][0])["model"].keys()
    assert call("--resume", save, "--eval").code == 0
