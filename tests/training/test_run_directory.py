"""What a run leaves: directory and lock, config.json, log.txt, TensorBoard, a checkpoint that is whole."""

import errno
import itertools
import json
import math
import os
import re
import shutil
import stat
import subprocess
import threading
import warnings
from dataclasses import replace
from unittest.mock import Mock

import pytest
import torch
from helpers import METHODS, assert_one_sentence, assert_same_run, call, contents, load, log_lines, stop_at
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

# ------------------------------------------------------------------------------------- the directory and lock

OURS = '{"options": {}, "model": "wrn-10-1", "data": {}}'


@pytest.mark.parametrize(("files", "said"), [
    ({"config.json": OURS, "log.txt": "1\n2\n", "checkpoint.pt": ""}, "already holds a run; continue it"),
    ({"config.json": OURS, "log.txt": "1\n2\n"}, "already holds a run, without its checkpoint"),
    ({"config.json": '["options", "model", "data"]'}, "config.json of another program"),
    ({"log.txt": ""}, "log.txt of another program"),
])  # fmt: skip
def test_a_run_goes_only_where_it_overwrites_nothing(tiny, tmp_path, files, said):
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    assert_one_sentence(call(*tiny("SGD", tmp_path)), 2, said, "another --save")
    assert contents(tmp_path) == {name: text.encode() for name, text in files.items()}


@pytest.mark.parametrize("make", ["write_text", "symlink_to"])
def test_a_lock_that_main_py_did_not_write_is_left_as_it_is(tiny, tmp_path, make):
    (tmp_path / "mine").touch()
    (tmp_path / "run").mkdir()
    getattr(tmp_path / "run" / "lock", make)("../mine")
    before = contents(tmp_path)
    assert_one_sentence(call(*tiny("SGD", tmp_path / "run")), 1, "another --save")
    assert contents(tmp_path) == before


@pytest.mark.parametrize("there", [[], ["a"], ["a", "a/b"]])
def test_a_run_that_wrote_nothing_leaves_no_directory_that_it_made(tmp_path, there):
    """As where the data cannot be had."""
    for folder in there:
        (tmp_path / folder).mkdir()
    words = ["--dataset", "folder", "--dataroot", tmp_path / "nowhere", "--save", tmp_path / "a" / "b"]
    assert_one_sentence(call(*words), 1, "nowhere")
    assert [str(path.relative_to(tmp_path)) for path in sorted(tmp_path.rglob("*"))] == there


def test_a_second_writer_is_refused_before_it_reads_and_writes(finished, tmp_path):
    save = shutil.copytree(finished["SGD"][0], tmp_path / "run")
    whole = (save / "checkpoint.pt").read_bytes()
    with utils.locked(save, True):
        assert call("--resume", save, "--eval").code == 0  # reads only
        (save / "checkpoint.pt").write_bytes(b"half of it")
        before = contents(save)
        outcome = call("--resume", save, "--epochs", 3)
        assert_one_sentence(outcome, 1, f"is being written by process {os.getpid()} on", "another --save")
        assert contents(save) == before
        (save / "checkpoint.pt").write_bytes(whole)
    assert call("--resume", save, "--epochs", 3).code == 0


def test_a_run_that_began_and_ended_meanwhile_is_not_started_over(finished, tmp_path):
    """auto looks for a checkpoint before it has the lock."""
    save, source, goes_on_there = options.find_places({"resume": "auto", "save": str(tmp_path / "run")})
    assert (source, goes_on_there) == (None, False)
    shutil.copytree(finished["SGD"][0], save)
    with pytest.raises(utils.UsageError, match="already holds a run"), utils.locked(save, goes_on_there):
        pass


def test_a_lock_that_its_holder_has_just_removed_is_none(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr("fcntl.flock", lambda *_: (tmp_path / "lock").unlink())
    assert_one_sentence(call(*tiny("SGD", tmp_path)), 1, "try again")


def test_a_file_system_without_locks_is_one_sentence(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr("fcntl.flock", Mock(side_effect=OSError(errno.ENOLCK, "No locks available")))
    assert_one_sentence(call(*tiny("SGD", tmp_path)), 1, "cannot be locked", "local disk")


# ---------------------------------------------------------------------------------------------------- writing


@pytest.mark.parametrize("function", ["os.replace", "os.fsync", "torch.save"])
def test_a_full_disk_leaves_the_old_checkpoint_whole_and_no_half_file(tmp_path, monkeypatch, function):
    path, kind = tmp_path / "checkpoint.pt", RuntimeError if function == "torch.save" else OSError
    checkpoint.save_checkpoint(path, {"model": torch.arange(1000)})
    before = path.read_bytes()
    monkeypatch.setattr(function, Mock(side_effect=kind("no space left")))
    with pytest.raises(utils.UserError, match=r"cannot write .*free some space"):
        checkpoint.save_checkpoint(path, {"model": torch.zeros(1000)})
    assert contents(tmp_path) == {"checkpoint.pt": before, "checkpoint.previous.pt": before}


def test_content_then_name_reach_the_disk_and_an_epoch_at_once(finished, tmp_path, monkeypatch):
    """Else a power cut might leave the new name with no content, or none at all."""
    done, rename = [], os.replace
    kinds = {stat.S_IFDIR: "folder", stat.S_IFREG: "file"}
    monkeypatch.setattr(os, "fsync", lambda fd: done.append(kinds[stat.S_IFMT(os.fstat(fd).st_mode)]))
    monkeypatch.setattr(os, "replace", lambda *names: done.append("rename") or rename(*names))
    checkpoint.save_checkpoint(tmp_path / "checkpoint.pt", {})
    assert done == ["file", "rename", "folder"]
    log = report.RunLog(options.parse_options(["--save", str(tmp_path)])[0], [])
    done.clear()
    log.add(log_lines(finished["SGDG"][0])[0] | {"images_per_sec": 1.0}, {})
    assert done == ["file"]
    assert [step for step, _ in scalars(tmp_path)["loss/test"]] == [1]
    log.writer.close()


def test_no_link_is_followed(tmp_path):
    (tmp_path / "mine").write_text("my notes")
    for name in ("config.json", "config.json.tmp"):
        (tmp_path / name).symlink_to("mine")
    utils.write_whole(tmp_path / "config.json", lambda file: file.write(b"{}"))
    assert (tmp_path / "mine").read_text() == "my notes"
    assert not (tmp_path / "config.json").is_symlink()


def test_permissions_follow_the_umask(tmp_path):
    before = os.umask(0o027)
    utils.write_whole(tmp_path / "config.json", lambda file: file.write(b"{}"))
    assert os.umask(before) == 0o027
    assert stat.S_IMODE((tmp_path / "config.json").stat().st_mode) == 0o640


# ------------------------------------------------------------------------------------ config.json and log.txt


def test_config_holds_options_versions_device_and_the_digest_of_the_arrays(finished, images_root):
    config = json.loads((finished["AdamG"][0] / "config.json").read_text())
    assert config["options"].items() >= {"optim_method": "AdamG", "lr": 0.01, "lrg": 0.05}.items()
    assert config["versions"].keys() >= {"python", "torch", "numpy", "opencv"}
    assert (config["threads"], config["float32_convolutions"]) == (1, "float32")
    assert "CPU" in config["device"]
    assert config["data"] == json.loads(json.dumps(load_data("folder", images_root).description()))


@pytest.mark.skipif(not shutil.which("git"), reason="needs git")
def test_the_commit_is_that_of_the_program_and_never_of_another_repository(tmp_path, monkeypatch):
    for name in [name for name in os.environ if name.startswith("GIT_")]:  # as a hook of git sets them
        monkeypatch.delenv(name)
    program = tmp_path / "utils.py"
    program.write_text("committed")
    git = ["git", "-C", tmp_path, "-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false"]
    for words in (["init", "-q"], ["add", "utils.py"], ["commit", "-qm", "all"]):
        subprocess.run([*git, *words], check=True)
    commit = subprocess.check_output([*git, "rev-parse", "HEAD"], text=True).strip()
    monkeypatch.setattr(utils, "__file__", str(program))
    monkeypatch.setenv("GIT_DIR", str(tmp_path / "another"))
    assert utils.git_commit() == commit
    program.write_text("changed")
    assert utils.git_commit() == f"{commit}-dirty"
    monkeypatch.setattr(utils, "__file__", str(tmp_path / "copy.py"))
    assert utils.git_commit() is None  # nobody has added this one
    monkeypatch.setenv("PATH", "")
    assert utils.git_commit() is None


@pytest.mark.parametrize("method", METHODS)
def test_log_has_one_line_per_epoch_with_every_key_and_the_terminal_says_the_same(finished, method):
    save, outcome = finished[method]
    chosen = json.loads((save / "config.json").read_text())["options"]
    shown = re.findall(r"train loss ([\d.]+) error +([\d.]+)%  test ([\d.]+) +([\d.]+)%", outcome.out)
    lines = [json.loads(line.removeprefix("json_stats: ")) for line in (save / "log.txt").open()]
    for k, (stats, numbers) in enumerate(zip(lines, shown, strict=True), 1):
        assert stats["images_per_sec"] == pytest.approx(48 / stats["train_time"])
        assert (stats["epoch"], stats["n_parameters"], stats["num_classes"]) == (k, 77_395, 3)
        for name in ("lr", "lrg"):  # this epoch's: they drop after the first
            assert stats[name] == (chosen[name] and pytest.approx(chosen[name] * 0.2 ** (k - 1)))
        assert {**chosen, "lr": stats["lr"], "lrg": stats["lrg"]}.items() <= stats.items()
        train, test = ((stats[f"{part}_loss"], 100 - stats[f"{part}_acc"]) for part in ("train", "test"))
        assert tuple(map(float, numbers)) == pytest.approx((*train, *test), abs=0.0051)


# ------------------------------------------------------------------------------------------------ TensorBoard


def summaries(directory) -> list:
    """All summaries of a run, as (step, value) in the order of writing."""
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


@pytest.mark.parametrize("method", METHODS)
def test_tensorboard_has_the_scalars_of_every_epoch_each_with_a_description(finished, method):
    save = finished[method][0]
    found, log = scalars(save), log_lines(save)
    curves = {f"loss/{part}": [stats[f"{part}_loss"] for stats in log] for part in ("train", "test")}
    curves |= {f"error/{part}": [100 - s[f"{part}_acc"] for s in log] for part in ("train", "test")}
    curves |= {f"rate/{name}": [stats[name] for stats in log] for name in ("lr", "lrg") if log[0][name]}
    for tag, values in curves.items():
        assert found[tag] == [(k, pytest.approx(value, rel=1e-6)) for k, value in enumerate(values, 1)]
    layers = ["conv0"] + [f"group{i}.block0.conv{j}" for i in range(3) for j in (0, 1)]  # of SGD, too
    probe = {f"rows_by_layer_{name}/{layer}" for name in report.GrassmannProbe.NAMES for layer in layers}
    rates = {"rate/lrg"} if method == "SGD" else set()
    assert found.keys() == (report.TAGS.keys() | probe) - rates
    assert method != "SGD" or found["rows/clipped_share"] == [(1, 0), (2, 0)]
    assert all(value.metadata.summary_description for _, value in summaries(save) if value.tag in found)


def test_tensorboard_has_one_value_for_each_step_of_the_loss_as_it_goes(tiny, tmp_path, monkeypatch):
    """Of 24 steps after every third. The second epoch is logged and lost, then trained in two parts."""
    save, losses, true_step, true_save = tmp_path / "run", {}, main.Training.step, main.save_checkpoint
    words = tiny("SGDG", save, "--batchSize", 2, "--resume", "auto")

    def step(t, x, labels):
        number = t.epoch * 24 + t.batch
        assert t.probe.active == (number % 6 == 0)  # the probe measures four steps of an epoch
        loss, logits = true_step(t, x, labels)
        losses[number] = loss.item()
        return loss, logits

    def die(path, state):
        if state["epoch"] == 2:
            raise KeyboardInterrupt
        true_save(path, state)

    monkeypatch.setattr(main.Training, "step", step)
    with monkeypatch.context() as patch:
        patch.setattr(main, "save_checkpoint", die)
        assert call(*words).code == 130
    with (save / "log.txt").open("a") as log:
        log.write('json_stats: {"train_loss": 0.5, "tra')  # as a kill leaves a line
    with monkeypatch.context() as patch:
        stop_at(patch, 9)
        assert call(*words).code == 143
    assert [stats["epoch"] for stats in log_lines(save)] == [1]
    assert call(*words).code == 0
    assert [stats["epoch"] for stats in log_lines(save)] == [1, 2]
    found = scalars(save)
    for end, mean in found["loss/train_by_step"]:
        assert mean == pytest.approx(sum(losses[k] for k in range(end - 3, end)) / 3, rel=1e-6)
    assert [end for end, _ in found["loss/train_by_step"]] == [*range(3, 49, 3), *range(27, 49, 3)]
    for tag in found.keys() - {"speed/images_per_sec"}:
        assert len(dict(found[tag])) == len(set(found[tag])), tag
    assert [value.tag for _, value in summaries(save)].count("training/augmented_images") == 1


def test_tensorboard_has_configuration_images_and_hyperparameters_method_and_rates_first(finished):
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


@pytest.mark.parametrize("limit", [0, 20])
def test_tensorboard_on_a_full_disk_is_one_sentence(tiny, tmp_path, monkeypatch, limit):
    """The thread that writes meets it as well."""
    told = []
    monkeypatch.setattr(threading, "excepthook", told.append)
    write, left = RecordWriter.write, itertools.count(limit, -1)
    fail = Mock(side_effect=OSError(28, "No space left on device"))
    monkeypatch.setattr(RecordWriter, "write", lambda *args: (write if next(left) > 0 else fail)(*args))
    assert_one_sentence(call(*tiny("SGD", tmp_path / "run")), 1, "No space left", "--resume")
    assert told == []


# ------------------------------------------------------------------------------------------------- checkpoint


def test_a_finished_run_leaves_nothing_else(finished):
    for save, _ in finished.values():
        names = sorted(re.sub(r"^events.*", "events", path.name) for path in save.iterdir())
        assert names == ["checkpoint.pt", "config.json", "events", "lock", "log.txt"]


def test_eval_prints_the_numbers_of_the_last_epoch_and_each_classs_error(finished):
    save, outcome = finished["SGDG"]
    before = contents(save)
    loss, error = re.findall(r"test ([\d.]+) +([\d.]+)%", outcome.out)[-1]
    evaluated = call("--eval", "--resume", save / "checkpoint.pt")
    assert (evaluated.code, evaluated.err) == (0, "")
    assert f"\nloss {loss}, top-1 error {error}%\n" in evaluated.out  # three classes have no top 5
    shown = re.findall(r"^  (class\d) +6 images  error +[\d.]+%$", evaluated.out, re.M)
    assert shown == ["class0", "class1", "class2"]
    assert contents(save) == before


def test_top5_counts_the_five_most_likely_of_more_classes(tiny, tmp_path, images_root, capsys):
    t = main.Training(options.parse_options(tiny("SGD", tmp_path))[0], load_data("folder", images_root))
    logits = torch.arange(8.0).repeat(4, 1)  # 7 is the most likely class, 3 the fifth
    for classes, is_shown in (("abcdefgh", True), ("abcde", False)):  # of five the error would be 0
        t.data = replace(t.data, classes=tuple(classes))
        report.print_evaluation(t, logits[:, : len(classes)], torch.tensor([4, 3, 2, 0]))
        out = capsys.readouterr().out
        assert ("top-5 error 50.00%" in out, "top-5" in out) == (is_shown, is_shown)
        assert re.search(r"^  b +0 images  no error to tell$", out, re.M)


@pytest.mark.parametrize(("bad", "said"), [
    ("loss", r"the loss is not finite by epoch 2, step 6 \(lr 0.002, lrg 0.04\); the last good"),
    ("weight", "a weight is not finite by epoch 2, step 24 "),  # though all losses were
    ("test loss", "the test loss is not finite after epoch 2; the last good"),
])  # fmt: skip
def test_what_is_not_finite_is_named_and_the_last_good_checkpoint_stays(
    tiny, tmp_path, monkeypatch, bad, said
):
    """Training losses are read after every third of 24 steps."""
    true_step, true_evaluate = main.Training.step, main.evaluate

    def step(t, x, labels):
        loss, logits = true_step(t, x, labels)
        if bad == "weight" and (t.epoch, t.batch) == (1, 23):
            t.model.fc.weight.data[0, 0] = math.nan
        return loss * (math.inf if bad == "loss" and (t.epoch, t.batch) >= (1, 3) else 1), logits

    def evaluate(t, stop):
        loss, error = true_evaluate(t, stop)
        return loss * (math.inf if bad == "test loss" and t.epoch == 1 else 1), error

    monkeypatch.setattr(main.Training, "step", step)
    monkeypatch.setattr(main, "evaluate", evaluate)
    assert_one_sentence(call(*tiny("SGDG", tmp_path / "run", "--batchSize", 2)), 1, said, "is kept")
    assert load(tmp_path / "run")["epoch"] == len(log_lines(tmp_path / "run")) == 1


# -------------------------------------------------------------------------------------------------- precision


def test_networks_run_in_the_precision_asked_for_and_losses_add_up_in_float64(tiny, tmp_path, monkeypatch):
    seen, losses = set(), {"mean": [], "sum": []}  # by reduction
    forward, cross_entropy = WideResNet.forward, main.cross_entropy

    def watched(model, x):
        logits = forward(model, x)
        seen.add((model.training, logits.dtype))
        return logits

    def loss(logits, labels, reduction="mean"):
        losses[reduction].append(cross_entropy(logits, labels, reduction=reduction))
        return losses[reduction][-1]

    monkeypatch.setattr(WideResNet, "forward", watched)
    monkeypatch.setattr(main, "cross_entropy", loss)
    flags = ["--dtype", "bfloat16", "--batchSize", 4, "--epochs", 1]
    assert call(*tiny("SGDG", tmp_path / "run", *flags)).code == 0
    assert seen == {(True, torch.bfloat16), (False, torch.bfloat16)}
    assert {loss.dtype for part in losses.values() for loss in part} == {torch.float32}
    (stats,) = log_lines(tmp_path / "run")
    assert stats["train_loss"] == sum(loss.item() for loss in losses["mean"]) / 12
    assert stats["test_loss"] == sum(loss.item() for loss in losses["sum"]) / 18
    assert {v.dtype for v in load(tmp_path / "run")["model"].values()} == {torch.float32, torch.int64}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("first", "growth"), [(2.0**10, 3), (math.inf, -6)])
def test_a_step_that_overflows_is_skipped_and_the_scale_goes_on_after_a_stop(
    tiny, finished, tmp_path, monkeypatch, method, first, growth
):
    """As in float16 on a GPU; here over float32, whose gradients a power of two changes by no bit."""
    scaler, scale = torch.amp.GradScaler, {"init_scale": first, "growth_interval": 2}
    monkeypatch.setattr(torch.amp, "GradScaler", lambda device, enabled: scaler(device, **scale))
    assert call(*tiny(method, tmp_path / "whole")).code == 0
    with monkeypatch.context() as patch:
        stop_at(patch, 8)
        assert call(*tiny(method, tmp_path / "stopped")).code == 143
    assert call("--resume", tmp_path / "stopped").code == 0
    assert_same_run(tmp_path / "stopped", tmp_path / "whole")
    state = load(tmp_path / "whole")
    assert state["scaler"]["scale"] == first * 2.0**growth
    if first == math.inf:  # every step is skipped, and none has left a trace
        assert state["optimizer"]["state"] == {}
    else:
        for name, value in load(finished[method][0])["model"].items():
            assert torch.equal(value, state["model"][name])


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


# ------------------------------------------------------------------------------------------------------ probe


def probed(weights, **options):
    """A probe, which measures, of layers with these weights, and a function that makes a step.

    The step turns row i of layer k by lengths[k][i], clipped: its rows are in a plane each.
    """
    layers = [nn.Conv2d(1, 2, (1, 4), bias=False) for _ in weights]
    for layer, y in zip(layers, weights, strict=True):
        layer.weight.data = torch.tensor(y).view(2, 1, 1, 4)
    groups = [{"params": [layer.weight for layer in layers], **options}]
    optimizer = SGDG(groups, lr=0.5, momentum=0.0, grassmann=True)
    probe = report.GrassmannProbe(nn.Sequential(*layers), optimizer, torch.device("cpu"))

    def step(*lengths, measured=True):
        probe.active = measured
        for layer, length in zip(layers, lengths, strict=True):
            y = layer.weight.detach().view(2, 4)
            across = torch.stack([-y[:, 1], y[:, 0], -y[:, 3], y[:, 2]], 1)
            layer.weight.grad = (torch.tensor(length)[:, None] * across + 3 * y).view(2, 1, 1, 4)
        optimizer.step()

    return probe, step


def test_the_probe_takes_means_over_rows_steps_and_layers_and_starts_anew():
    """A row turns by the rate, 0.5, times the gradient's length, which is clipped at 0.5."""
    orthogonal = [[1.0, 0, 0, 0], [0, 0, 1.0, 0]]
    probe, step = probed([orthogonal, orthogonal], omega=0.0, grad_clip=0.5)
    step([0.1, 0.3], [0.2, 0.9])
    step([1.0, 1.0], [1.0, 1.0], measured=False)
    step([0.3, 0.1], [0.4, 0.8])
    means, layers = probe.read()
    angles = [math.degrees(angle) for angle in (0.1, 0.2, 0.15)]
    for name, expected in zip(probe.NAMES, (angles, (0, 0.5, 0.25), (0, 0, 0)), strict=True):
        found = layers[f"rows_by_layer_{name}/0"], layers[f"rows_by_layer_{name}/1"], means[name]
        assert found == pytest.approx(tuple(expected), rel=1e-4, abs=1e-6)
    step([0.4, 0.4], [0.2, 0.2])
    assert probe.read()[0]["angle_degrees"] == pytest.approx(math.degrees(0.15), rel=1e-4)
    assert probe.read() == (dict.fromkeys(probe.NAMES), {})


def test_the_regularizer_counts_for_clipping():
    # As by hand in test_paper.py: without a loss each of these rows has a gradient of length 0.48.
    for grad_clip, share in ((0.47, 1), (0.49, 0)):
        probe, step = probed([[[1.0, 0, 0, 0], [0.6, 0.8, 0, 0]]], omega=0.5, grad_clip=grad_clip)
        step([0.0, 0.0])
        assert probe.read()[0]["clipped_share"] == share
