"""What a run leaves: directory and lock, config.json, log.txt, TensorBoard, a checkpoint that is whole."""

import errno
import io
import itertools
import json
import math
import os
import re
import shutil
import stat
import subprocess
import sys
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
    stop_at,
)
from tensorboard.backend.event_processing.event_file_loader import EventFileLoader
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData
from tensorboard.summary.writer.record_writer import RecordWriter
from tensorboard.util.tensor_util import make_ndarray
from torch import nn

import checkpoint
import main
import options
import report
import utils
from data import load_data
from grassmann_optimizer import SGDG
from resnet import WideResNet

RATES = {"SGD": (0.1, None), "SGDG": (0.01, 0.2), "AdamG": (0.01, 0.05)}


def failing(error):
    """A function that raises it."""

    def fail(*args, **kwargs):
        raise error

    return fail


def training(words, images_root) -> main.Training:
    """The state of a run that has not begun."""
    return main.Training(options.parse_options(words)[0], load_data("folder", images_root))


# ------------------------------------------------------------------------------------- the directory and lock

OURS = '{"options": {}, "model": "wrn-10-1", "data": {}}'
LOST, FOREIGN, HOLDS = "without its checkpoint", "of another program", "already holds a run; continue it"


@pytest.mark.parametrize(("files", "anew", "continues"), [
    ({}, None, None),
    ({"notes.md": "mine"}, None, None),
    ({"config.json": OURS, "log.txt": "1\n2\n", "checkpoint.pt": ""}, HOLDS, None),
    ({"checkpoint.pt": "of anybody"}, HOLDS, None),
    ({"config.json": OURS, "log.txt": "1\n2\n"}, LOST, LOST),
    ({"config.json": OURS, "log.txt": "1\n"}, None, None),  # killed before its first checkpoint
    ({"config.json": OURS}, None, None),
    ({"log.txt": ""}, FOREIGN, FOREIGN),
    ({"config.json": '{"options": {"a": 1}, "mine": 2}'}, FOREIGN, FOREIGN),
    ({"config.json": '["options", "model", "data"]', "log.txt": ""}, FOREIGN, FOREIGN),
    ({"config.json": "[" * 100_000}, FOREIGN, FOREIGN),
])  # fmt: skip
def test_a_run_goes_only_where_it_overwrites_nothing(tiny, tmp_path, files, anew, continues):
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    for said, is_own in ((anew, False), (continues, True)):
        reason = utils.why_not_there(tmp_path, is_own)
        assert reason is None if said is None else said in reason and "another --save" in reason
    if continues:
        assert_one_sentence(call(*tiny("SGD", tmp_path, "--resume", "auto")), 2, continues)
        assert contents(tmp_path) == {name: text.encode() for name, text in files.items()}


@pytest.mark.parametrize("make", ["write_text", "symlink_to"])
def test_a_lock_that_main_py_did_not_write_is_left_as_it_is(tiny, tmp_path, make):
    (tmp_path / "mine").touch()
    (tmp_path / "run").mkdir()
    getattr(tmp_path / "run" / "lock", make)("../mine")
    before = contents(tmp_path)
    assert_one_sentence(call(*tiny("SGD", tmp_path / "run")), 1, "another --save")
    assert contents(tmp_path) == before
    assert (tmp_path / "run" / "lock").is_symlink() == (make == "symlink_to")


@pytest.mark.parametrize("there", [[], ["a"], ["a", "a/b"]])
def test_a_run_that_wrote_nothing_leaves_no_directory_that_it_made(tmp_path, there):
    """As where the data cannot be had."""
    for folder in there:
        (tmp_path / folder).mkdir()
    words = ["--dataset", "folder", "--dataroot", tmp_path / "nowhere", "--save", tmp_path / "a" / "b"]
    assert_one_sentence(call(*words), 1, "nowhere")
    assert [str(path.relative_to(tmp_path)) for path in sorted(tmp_path.rglob("*"))] == there


def test_one_epoch_is_not_called_epochs():
    assert [utils.counted(number, "epoch") for number in range(3)] == ["0 epochs", "1 epoch", "2 epochs"]


def test_a_file_that_is_no_checkpoint_gets_no_lock_beside_it(tmp_path):
    (tmp_path / "notes.md").write_text("mine")
    assert_one_sentence(call("--resume", tmp_path / "notes.md"), 1, r"notes\.md")
    assert contents(tmp_path) == {"notes.md": b"mine"}


def test_what_an_older_or_newer_version_said_of_the_machine_is_no_obstacle(capsys):
    utils.note_environment({"cores": 7}, torch.device("cpu"))
    assert "cores 7 then, None now" in capsys.readouterr().out


class TestLock:
    def test_a_run_that_began_and_ended_meanwhile_is_not_started_over(self, finished, tmp_path):
        """auto looks for a checkpoint before it has the lock."""
        save, source, goes_on_there = options.find_places({"resume": "auto", "save": str(tmp_path / "run")})
        assert (source, goes_on_there) == (None, False)
        shutil.copytree(finished["SGD"][0], save)
        with pytest.raises(utils.UsageError, match="already holds a run"), utils.locked(save, goes_on_there):
            pass

    def test_a_lock_that_its_holder_has_just_removed_is_none(self, tmp_path, monkeypatch):
        monkeypatch.setattr(utils.fcntl, "flock", lambda *_: (tmp_path / "lock").unlink())
        with pytest.raises(utils.UserError, match="try again"):
            utils.lock_directory(tmp_path, False)

    def test_a_second_writer_is_refused_while_the_first_lives(self, finished, tmp_path):
        save = shutil.copytree(finished["SGD"][0], tmp_path / "run")
        hold = "file = utils.lock_directory(pathlib.Path(sys.argv[1]), True); print(1, flush=True)"
        command = [sys.executable, "-c", f"import sys, utils, pathlib; {hold}; sys.stdin.read()", save]
        before = contents(save)
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        with subprocess.Popen(command, **pipes, cwd=Path(main.__file__).parent) as holder:
            assert holder.stdout.readline() == "1\n"
            outcome = call("--resume", save, "--epochs", 3)
            assert_one_sentence(outcome, 1, f"process {holder.pid} on", "another --save")
            assert contents(save) == {**before, "lock": (save / "lock").read_bytes()}
            assert call("--resume", save, "--eval").code == 0  # reads only
            holder.kill()
        assert call("--resume", save, "--epochs", 3).code == 0  # the lock died with its process
        assert re.fullmatch(rf"process {os.getpid()} on \S+", (save / "lock").read_text())

    def test_it_is_taken_before_the_checkpoint_is_read(self, tmp_path):
        """A run that is just ending might still write."""
        (tmp_path / "checkpoint.pt").write_bytes(b"half of a checkpoint")
        with utils.lock_directory(tmp_path, True):
            assert_one_sentence(call("--resume", tmp_path), 1, "is being written by process")

    def test_a_file_system_without_locks_is_one_sentence(self, tiny, tmp_path, monkeypatch):
        monkeypatch.setattr("fcntl.flock", failing(OSError(errno.ENOLCK, "No locks available")))
        assert_one_sentence(call(*tiny("SGD", tmp_path / "run")), 1, "cannot be locked", "local disk")


# ---------------------------------------------------------------------------------------------------- writing


class Broken(io.RawIOBase):
    """A value whose pickling fails when half of the file is written."""

    __reduce__ = failing(OSError(28, "No space left on device"))


class TestWriting:
    @pytest.fixture
    def old(self, tmp_path):
        """A checkpoint that is about to be replaced."""
        checkpoint.save_checkpoint(tmp_path / "checkpoint.pt", {"model": torch.arange(1000)})
        return tmp_path / "checkpoint.pt"

    @pytest.mark.parametrize("function", [None, "os.replace", "os.fsync", "torch.save"])
    def test_what_fails_leaves_the_old_file_whole_and_no_half_file(self, old, monkeypatch, function):
        before, value = old.read_bytes(), {"model": torch.zeros(1000)}
        if function:
            kind = RuntimeError if function == "torch.save" else OSError  # what torch makes of a full disk
            monkeypatch.setattr(function, failing(kind("no space left")))
        else:
            value["then"] = Broken()
        with pytest.raises(utils.UserError, match=r"cannot write .*free some space"):
            checkpoint.save_checkpoint(old, value)
        assert contents(old.parent) == {"checkpoint.pt": before, "checkpoint.previous.pt": before}

    def test_content_then_name_reach_the_disk_and_an_epoch_at_once(self, finished, tmp_path, monkeypatch):
        """Else a power cut might leave the new name with no content, or none at all."""
        done, rename = [], os.replace
        kinds = {stat.S_IFDIR: "folder", stat.S_IFREG: "file"}
        monkeypatch.setattr(os, "fsync", lambda fd: done.append(kinds[stat.S_IFMT(os.fstat(fd).st_mode)]))
        monkeypatch.setattr(os, "replace", lambda *names: done.append("rename") or rename(*names))
        checkpoint.save_checkpoint(tmp_path / "checkpoint.pt", {})
        assert done == ["file", "rename", "folder"]
        log = report.RunLog(options.parse_options(["--save", str(tmp_path)])[0], [])
        done.clear()
        flush = log.writer.flush
        monkeypatch.setattr(log.writer, "flush", lambda: done.append("flush") or flush())
        log.add(log_lines(finished["SGDG"][0])[0] | {"images_per_sec": 1.0}, {})
        assert done == ["file", "flush"]
        assert [step for step, _ in scalars(tmp_path)["loss/test"]] == [1]
        log.close()

    def test_no_link_is_followed(self, tiny, tmp_path):
        (tmp_path / "mine").write_text("my notes")
        (tmp_path / "run").mkdir()
        for name in ("checkpoint.pt", "config.json", "log.txt"):
            (tmp_path / "run" / f"{name}.tmp").symlink_to("../mine")
        assert call(*tiny("SGD", tmp_path / "run", "--epochs", 1)).code == 0
        (tmp_path / "link").symlink_to("mine")
        utils.write_json(tmp_path / "link", {})
        assert (tmp_path / "mine").read_text() == "my notes"
        for name in ("link", "run/checkpoint.pt", "run/config.json", "run/log.txt"):
            assert not (tmp_path / name).is_symlink()

    def test_the_next_run_removes_what_a_killed_one_left_half_written(self, tiny, tmp_path):
        (tmp_path / ".checkpoint.pt.abcd1234.tmp").write_bytes(b"half")
        assert_one_sentence(call(*tiny("SGD", tmp_path, "--batchSize", 49)), 1, "49")
        assert list(tmp_path.iterdir()) == []

    @pytest.mark.parametrize("mask", [0o022, 0o077])
    def test_permissions_follow_the_umask(self, tmp_path, mask):
        before = os.umask(mask)
        try:
            utils.write_json(tmp_path / "config.json", {})
        finally:
            assert os.umask(before) == mask
        assert stat.S_IMODE((tmp_path / "config.json").stat().st_mode) == 0o666 & ~mask


# ------------------------------------------------------------------------------------------------ config.json


def test_config_holds_options_versions_device_and_the_digest_of_the_arrays(finished, images_root):
    config = json.loads((finished["AdamG"][0] / "config.json").read_text())
    chosen, data = config["options"], load_data("folder", images_root)
    assert (chosen["optim_method"], chosen["lr"], chosen["lrg"]) == ("AdamG", *RATES["AdamG"])
    assert config["versions"].keys() >= {"python", "torch", "numpy", "opencv"}
    assert (config["threads"], config["float32_convolutions"]) == (1, "float32")
    assert "CPU" in config["device"]
    assert config["data"] == json.loads(json.dumps(data.description()))


@pytest.mark.parametrize(("capability", "precision"), [((7, 5), "float32"), ((8, 0), "TF32")])
def test_config_says_whether_a_gpu_convolves_in_tf32(monkeypatch, capability, precision):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    where = utils.environment(torch.device("cuda"))
    assert (where["device"], where["float32_convolutions"]) == ("a GPU", precision)


@pytest.mark.skipif(not shutil.which("git"), reason="needs git")
def test_the_commit_is_that_of_the_program_and_never_of_another_repository(tmp_path, monkeypatch):
    for name in [name for name in os.environ if name.startswith("GIT_")]:  # as a hook of git sets them
        monkeypatch.delenv(name)
    own, program, copy = utils.git_commit(), tmp_path / "utils.py", tmp_path / "copy" / "utils.py"
    git = ["git", "-C", tmp_path, "-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false"]
    program.write_text("committed")
    for words in (["init", "-q"], ["add", "utils.py"], ["commit", "-qm", "all"]):
        subprocess.run([*git, *words], check=True)
    commit = subprocess.check_output([*git, "rev-parse", "HEAD"], text=True).strip()
    monkeypatch.setenv("GIT_DIR", str(tmp_path / ".git"))
    assert utils.git_commit() == own != commit
    monkeypatch.setattr(utils, "__file__", str(program))
    assert utils.git_commit() == commit
    program.write_text("changed")
    assert utils.git_commit() == f"{commit}-dirty"
    copy.parent.mkdir()
    shutil.copy(program, copy)
    monkeypatch.setattr(utils, "__file__", str(copy))
    assert utils.git_commit() is None  # nobody has added this one
    monkeypatch.setenv("PATH", "")
    assert utils.git_commit() is None


# ---------------------------------------------------------------------------------------------------- log.txt


@pytest.mark.parametrize("method", METHODS)
def test_log_has_one_line_per_epoch_with_every_key_and_the_terminal_says_the_same(finished, method):
    save, outcome = finished[method]
    chosen = json.loads((save / "config.json").read_text())["options"]
    shown = re.findall(r"train loss ([\d.]+) error +([\d.]+)%  test ([\d.]+) +([\d.]+)%", outcome.out)
    lines = [json.loads(line.removeprefix("json_stats: ")) for line in (save / "log.txt").open()]
    for k, (stats, numbers) in enumerate(zip(lines, shown, strict=True), 1):
        assert all(0 < stats[key] < math.inf for key in ("train_time", "test_time", "images_per_sec"))
        errors = {part: 100 - stats[f"{part}_acc"] for part in ("train", "test")}
        for part, count in (("train", 48), ("test", 18)):
            wrong = errors[part] * count / 100
            assert 0 <= wrong <= count
            assert wrong == pytest.approx(round(wrong))
        assert stats["images_per_sec"] == pytest.approx(48 / stats["train_time"])
        assert (stats["epoch"], stats["n_parameters"], stats["num_classes"]) == (k, 77_395, 3)
        assert {**chosen, "lr": stats["lr"], "lrg": stats["lrg"]}.items() <= stats.items()
        for name in ("lr", "lrg"):  # this epoch's: they drop after the first
            first = chosen[name]
            assert stats[name] == (first and pytest.approx(first * 0.2 ** (k - 1)))
        expected = stats["train_loss"], errors["train"], stats["test_loss"], errors["test"]
        assert tuple(map(float, numbers)) == pytest.approx(expected, abs=0.0051)


def test_log_tells_the_time_of_training_from_that_of_testing(tiny, tmp_path, monkeypatch):
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


# ------------------------------------------------------------------------------------------------ TensorBoard


def summaries(directory) -> list:
    """All summaries of a run, as (step, value) in the order of writing; there must be no second run below."""
    assert not [path for path in directory.iterdir() if path.is_dir()]
    files = sorted(directory.glob("events.*"), key=lambda path: path.stat().st_mtime_ns)
    events = itertools.chain.from_iterable(EventFileLoader(str(path)).Load() for path in files)
    return [(event.step, value) for event in events for value in event.summary.value]


def scalars(directory) -> dict[str, list[tuple[int, float]]]:
    """The curves that TensorBoard shows: steps and values by tag."""
    found: dict[str, list] = {}
    for step, value in summaries(directory):
        if value.tensor.dtype == 1 and not value.tensor.tensor_shape.dim:  # one float32
            found.setdefault(value.tag, []).append((step, make_ndarray(value.tensor).item()))
    return found


class TestTensorBoard:
    @pytest.mark.parametrize("method", METHODS)
    def test_has_the_scalars_of_every_epoch_error_and_loss_first(self, finished, method):
        save = finished[method][0]
        found, log = scalars(save), log_lines(save)
        curves = {f"loss/{part}": [stats[f"{part}_loss"] for stats in log] for part in ("train", "test")}
        curves |= {
            f"error/{part}": [100 - stats[f"{part}_acc"] for stats in log] for part in ("train", "test")
        }
        curves |= {f"rate/{name}": [stats[name] for stats in log] for name in ("lr", "lrg") if log[0][name]}
        for tag, values in curves.items():
            assert found[tag] == [(k, pytest.approx(value, rel=1e-6)) for k, value in enumerate(values, 1)]
        pages = sorted({tag.partition("/")[0] for tag in found if not tag.startswith("rows_by_layer")})
        assert pages == ["error", "loss", "rate", "rows", "speed"]
        told = {tag for tag in found if not tag.startswith("rows_by_layer")}
        assert told == report.TAGS.keys() - ({"rate/lrg"} if method == "SGD" else set())
        for _, value in summaries(save):
            if value.tag in report.TAGS and value.metadata.plugin_data.plugin_name == "scalars":
                assert value.metadata.summary_description == report.TAGS[value.tag]

    @pytest.mark.parametrize("method", METHODS)
    def test_has_the_probe_of_each_grassmann_layer(self, finished, method):
        found, names = scalars(finished[method][0]), report.GrassmannProbe.NAMES
        layers = ["conv0"] + [f"group{i}.block0.conv{j}" for i in range(3) for j in (0, 1)]
        wanted = {f"rows_by_layer_{name}/{layer}" for name in names for layer in layers}
        assert {tag for tag in found if tag.startswith("rows_by")} == wanted  # SGD's: of the same layers
        for name in names:  # over all layers: the mean
            values = [[value for _, value in found[f"rows_by_layer_{name}/{layer}"]] for layer in layers]
            means = [sum(of_epoch) / len(layers) for of_epoch in zip(*values, strict=True)]
            assert found[f"rows/{name}"] == [(k, pytest.approx(m, rel=1e-5)) for k, m in enumerate(means, 1)]
        assert method != "SGD" or found["rows/clipped_share"] == [(1, 0), (2, 0)]

    def test_the_training_loss_is_shown_as_it_goes_and_once_for_each_step(self, tiny, tmp_path, monkeypatch):
        """Of 24 steps after every third; what is written again after a kill and a resume is the same."""
        losses, true_step, kill_at = {}, main.Training.step, [24 + 8]

        def step(t, x, labels):
            number = t.epoch * 24 + t.batch
            if number in kill_at:
                raise KeyboardInterrupt
            assert t.probe.active == (number % 6 == 0)  # the probe measures four steps of an epoch
            loss, logits = true_step(t, x, labels)
            losses[number] = loss.item()
            return loss, logits

        monkeypatch.setattr(main.Training, "step", step)
        words = tiny("SGDG", tmp_path / "run", "--batchSize", 2)
        assert call(*words).code == 130
        kill_at.clear()
        assert call(*words, "--resume", "auto").code == 0
        found = scalars(tmp_path / "run")
        for end, mean in found["loss/train_by_step"]:
            assert mean == pytest.approx(sum(losses[k] for k in range(end - 3, end)) / 3, rel=1e-6)
        assert [end for end, _ in found["loss/train_by_step"]] == [*range(3, 31, 3), *range(27, 49, 3)]
        for tag in found.keys() - {"speed/images_per_sec"}:
            assert len(dict(found[tag])) == len(set(found[tag])), tag

    def test_has_configuration_images_and_hyperparameters_method_and_rates_first(self, finished):
        found = {value.tag: value for _, value in summaries(finished["AdamG"][0])}
        assert b'"optim_method": "AdamG"' in make_ndarray(found["config/text_summary"].tensor).item()
        width, height, _ = make_ndarray(found["training/augmented_images"].tensor)
        assert int(width) >= 64 <= int(height)  # two rows and columns of images at least
        start = HParamsPluginData.FromString(found["_hparams_/experiment"].metadata.plugin_data.content)
        names = [column.name for column in start.experiment.hparam_infos]
        assert sorted(names)[:3] == ["1 optim_method", "2 lr", "3 lrg"]  # as TensorBoard sorts them
        assert not {"epochs", "dataroot"} & set(names)  # may change on the way
        metrics = [column.name.tag for column in start.experiment.metric_infos]
        assert metrics == ["error/test", "loss/train"]  # curves of the run: the table shows their last values

    def test_errors_of_other_threads_are_still_printed(self, monkeypatch):
        told = []
        monkeypatch.setattr(threading, "excepthook", told.append)
        with report.disk_errors_said_once():
            thread = threading.Thread(target=lambda: Path("/nowhere").read_text())
            thread.start()
            thread.join()
        assert [args.exc_type for args in told] == [FileNotFoundError]

    @pytest.mark.parametrize("limit", [0, 20])
    def test_a_full_disk_is_one_sentence(self, tiny, tmp_path, monkeypatch, limit):
        told = []
        monkeypatch.setattr(threading, "excepthook", told.append)
        write, left = RecordWriter.write, itertools.count(limit, -1)
        fail = failing(OSError(28, "No space left on device"))
        monkeypatch.setattr(RecordWriter, "write", lambda *args: (write if next(left) > 0 else fail)(*args))
        assert_one_sentence(call(*tiny("SGD", tmp_path / "run")), 1, "No space left", "--resume")
        assert told == []  # the thread that writes has met it as well


# ------------------------------------------------------------------------------------------------- checkpoint


def test_a_finished_run_leaves_nothing_else(finished):
    for save, _ in finished.values():
        names = {re.sub(r"^events.*", "events", path.name) for path in save.iterdir()}
        assert names == {"config.json", "log.txt", "checkpoint.pt", "lock", "events"}


@pytest.mark.parametrize("method", METHODS)
def test_eval_prints_the_numbers_of_the_last_epoch(finished, method):
    save, outcome = finished[method]
    before = contents(save)
    loss, error = re.findall(r"test ([\d.]+) +([\d.]+)%", outcome.out)[-1]
    evaluated = call("--eval", "--resume", save / "checkpoint.pt")
    assert (evaluated.code, evaluated.err) == (0, "")
    assert f"\nloss {loss}, top-1 error {error}%\n" in evaluated.out  # three classes have no top 5
    shown = re.findall(r"^  (class\d) +6 images  error +[\d.]+%$", evaluated.out, re.M)
    assert shown == ["class0", "class1", "class2"]
    assert max(map(len, evaluated.out.splitlines())) <= 80
    assert contents(save) == before


def test_top5_counts_the_five_most_likely_of_more_classes(tiny, tmp_path, images_root, capsys):
    t = training(tiny("SGD", tmp_path / "run"), images_root)
    logits = torch.arange(8.0).repeat(4, 1)  # 7 is the most likely class, 3 the fifth
    t.data = replace(t.data, classes=tuple("abcdefgh"))
    report.print_evaluation(t, logits, torch.tensor([7, 3, 2, 0]))
    out = capsys.readouterr().out
    assert "top-1 error 75.00%, top-5 error 50.00%" in out
    for text in ("d +1 images  error 100.00%", "h +1 images  error   0.00%", "e +0 images  no error to tell"):
        assert re.search(f"^  {text}$", out, re.M)
    t.data = replace(t.data, classes=tuple("abcde"))
    report.print_evaluation(t, logits[:, :5], torch.tensor([4, 3, 2, 0]))
    assert "top-5" not in capsys.readouterr().out  # would be 0 whatever the network does


class TestNotFinite:
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
    def test_the_first_bad_step_is_named_and_the_last_good_checkpoint_stays(
        self, tiny, tmp_path, monkeypatch, method, step
    ):
        self.poison(monkeypatch, "mean", STEPS + step)
        lr, lrg = RATES[method]
        rates = rf"\(lr {0.2 * lr:g}" + (rf", lrg {0.2 * lrg:g}\)" if lrg else r"\)")
        outcome = call(*tiny(method, tmp_path / "run"))
        assert_one_sentence(outcome, 1, rf"not finite since epoch 2, step {step} {rates}", "kept")
        assert load(tmp_path / "run")["epoch"] == len(log_lines(tmp_path / "run")) == 1

    @pytest.mark.parametrize("stop", [[], ["--max_minutes", "1e-9"]])
    def test_the_first_bad_step_is_named_although_losses_are_read_now_and_then(
        self, tiny, tmp_path, monkeypatch, stop
    ):
        # 24 steps, read after every third: those after step 4 are bad as well, the gradients having been.
        calls = self.poison(monkeypatch, "mean", 1 if stop else 4)
        outcome = call(*tiny("SGD", tmp_path / "run", "--batchSize", 2, *stop))
        assert_one_sentence(outcome, 1, r"epoch 1, step 1\b" if stop else r"epoch 1, step 4\b")
        assert len(calls) == (1 if stop else 6)
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
                t.model.fc.weight.data[0, 0] = math.nan
            return result

        monkeypatch.setattr(main.Training, "step", step)
        outcome = call(*tiny("SGD", tmp_path / "run"))
        assert_one_sentence(outcome, 1, f"a weight is not finite in epoch 2, after step {STEPS} ")
        assert load(tmp_path / "run")["epoch"] == len(log_lines(tmp_path / "run")) == 1


# -------------------------------------------------------------------------------------------------- precision


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_networks_run_in_the_precision_asked_for_and_losses_add_up_in_float64(
    tiny, tmp_path, monkeypatch, dtype
):
    seen, losses = {True: set(), False: set()}, {"mean": [], "sum": []}  # by training mode, by reduction
    forward, cross_entropy = WideResNet.forward, main.cross_entropy

    def watched(model, x):
        logits = forward(model, x)
        seen[model.training].add(logits.dtype)
        return logits

    def loss(logits, labels, reduction="mean"):
        losses[reduction].append(cross_entropy(logits, labels, reduction=reduction))
        return losses[reduction][-1]

    monkeypatch.setattr(WideResNet, "forward", watched)
    monkeypatch.setattr(main, "cross_entropy", loss)
    assert call(*tiny("SGDG", tmp_path / "run", "--dtype", dtype, "--batchSize", 4, "--epochs", 1)).code == 0
    assert seen == {True: {getattr(torch, dtype)}, False: {getattr(torch, dtype)}}
    assert {loss.dtype for part in losses.values() for loss in part} == {torch.float32}
    (stats,) = log_lines(tmp_path / "run")
    assert stats["train_loss"] == sum(loss.item() for loss in losses["mean"]) / 12
    assert stats["test_loss"] == sum(loss.item() for loss in losses["sum"]) / 18
    for value in load(tmp_path / "run")["model"].values():
        assert value.dtype in (torch.float32, torch.int64)  # only the computation is in bfloat16


def test_losses_are_scaled_in_float16_alone(tiny, tmp_path, images_root):
    """Whose gradients would underflow."""
    t = training(tiny("SGD", tmp_path / "run"), images_root)
    for dtype in ("float32", "bfloat16", "float16"):
        scaler = main.Training(replace(t.options, dtype=dtype), t.data).scaler
        assert scaler.is_enabled() == (dtype == "float16")


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("first", "growth"), [(2.0**10, 3), (math.inf, -6)])
@pytest.mark.parametrize("check", [1, 8])
def test_a_step_that_overflows_is_skipped_and_the_scale_goes_on_after_a_stop(
    tiny, finished, tmp_path, monkeypatch, method, first, growth, check
):
    """As in float16 on a GPU; here over float32, whose gradients a power of two changes by no bit."""
    scaler, scale = torch.amp.GradScaler, {"init_scale": first, "growth_interval": 2}
    monkeypatch.setattr(torch.amp, "GradScaler", lambda device, enabled: scaler(device, **scale))
    assert call(*tiny(method, tmp_path / "whole")).code == 0
    with monkeypatch.context() as patch:
        stop_at(patch, check)
        assert call(*tiny(method, tmp_path / "stopped")).code == 143
    assert call("--resume", tmp_path / "stopped").code == 0
    assert_same_run(tmp_path / "stopped", tmp_path / "whole")
    state = load(tmp_path / "whole")
    assert state["scaler"]["scale"] == first * 2.0**growth
    if first == math.inf:  # every step is skipped, and none has left a trace
        assert state["optimizer"]["state"] == {}
    else:
        assert bits(state["model"]) == bits(load(finished[method][0])["model"])


def test_weights_and_images_are_channels_last(tiny, tmp_path, images_root):
    """As the arrays are: no step has to transpose them."""
    t = training(tiny("SGD", tmp_path / "run"), images_root)
    x, _ = t.inputs(torch.from_numpy(t.data.test_images), torch.from_numpy(t.data.test_labels))
    for tensor in (x, t.model.conv0.weight, t.model.group1.block0.conv1.weight):
        assert tensor.is_contiguous(memory_format=torch.channels_last)


def test_a_gpu_repeats_its_results():
    with utils.repeatable():
        assert torch.backends.cudnn.deterministic
        assert not torch.backends.cudnn.benchmark
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
        assert not torch.backends.cuda.matmul.allow_tf32  # the regularizer needs exact products


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
    outcome = call(*tiny("SGD", tmp_path / "run", "--compile"))
    assert (outcome.code, outcome.err, sizes) == (0, "", [16, 16, 2])
    torch._dynamo.reset()
    assert load(tmp_path / "run")["model"].keys() == load(finished["SGD"][0])["model"].keys()


# ----------------------------------------------------------------------------------------- probe and progress


class TestProbe:
    """The probe on one layer whose movement is known in closed form."""

    def probe(self, weight, grad, *, lr, omega=0.0, grad_clip=0.1):
        layer = nn.Conv2d(1, len(weight), weight.shape[1:], bias=False)
        layer.weight.data = weight.clone()[:, None]
        layer.weight.grad = grad.clone()[:, None]
        group = {"params": [layer.weight], "omega": omega, "grad_clip": grad_clip, "lr": lr}
        optimizer = SGDG([{**group, "grassmann": True}])
        probe = report.GrassmannProbe(nn.Sequential(layer), optimizer, torch.device("cpu"))
        probe.active = True
        optimizer.step()
        return probe

    @pytest.mark.parametrize("clip", [0.1, None])
    def test_a_step_moves_by_the_rate_times_the_clipped_gradient_and_is_read_once(self, clip):
        q, _ = torch.linalg.qr(torch.randn(16, 16, generator=torch.Generator().manual_seed(0)))
        y, tangent = q.reshape(16, 4, 4)[:6].contiguous(), q.reshape(16, 4, 4)[6:12]
        length = torch.tensor([0.02, 0.04, 0.06, 0.08, 0.2, 0.4]).view(-1, 1, 1)  # two are above 0.1
        probe = self.probe(y, length * tangent + 3 * y, lr=0.5, grad_clip=clip)
        means, layers = probe.read()
        moved = length.clamp(max=clip or 1).mean().item()
        assert means["angle_degrees"] == pytest.approx(math.degrees(0.5 * moved), rel=1e-4)
        assert means["clipped_share"] == pytest.approx(2 / 6 if clip else 0)
        assert means["row_cosine"] == pytest.approx(0, abs=1e-6)
        assert layers == {f"rows_by_layer_{name}/0": pytest.approx(value) for name, value in means.items()}
        assert probe.sums.abs().sum() == 0
        assert probe.read() == (dict.fromkeys(report.GrassmannProbe.NAMES), {})

    def test_the_regularizer_counts_for_clipping(self):
        # As by hand in test_paper.py: without a loss each of these rows has a gradient of length 0.48.
        y = torch.tensor([[[1.0, 0.0, 0.0]], [[0.6, 0.8, 0.0]]])
        for grad_clip, share in ((0.47, 1), (0.49, 0)):
            probe = self.probe(y, torch.zeros_like(y), lr=0.1, omega=0.5, grad_clip=grad_clip)
            assert probe.read()[0]["clipped_share"] == share


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
