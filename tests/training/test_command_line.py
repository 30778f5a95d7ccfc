"""The command line: the paper's six commands, every flag, what is printed, a sentence for every mistake."""

import errno
import json
import os
import pty
import re
import shlex
import shutil
import subprocess
import sys
import termios
import threading
import urllib.error
from pathlib import Path

import pytest
import torch
from helpers import (
    METHODS,
    STEPS,
    assert_one_sentence,
    call,
    contents,
    load,
    log_lines,
    write_archive,
    write_svhn,
)

import main
import options
import utils
from resnet import WideResNet

PROGRAM = Path(main.__file__)

COMMANDS = """
python main.py --save ./logs/resnet_$RANDOM$RANDOM --depth 28 --width 10
python main.py --save ./logs/resnet_$RANDOM$RANDOM --depth 28 --width 10 --optim_method SGDG --lr 0.01 --lrg 0.2
python main.py --save ./logs/resnet_$RANDOM$RANDOM --depth 28 --width 10 --optim_method AdamG --lr 0.01 --lrg 0.05
"""  # noqa: E501
# What is the same for all three methods, and what is not.
COMMON = {
    "model": "resnet",
    "depth": 28,
    "width": 10,
    "dropout": 0.3,
    "randomcrop_pad": 4,
    "batch_size": 128,
    "momentum": 0.9,
    "weight_decay": 5e-4,
    "epochs": 200,
    "epoch_step": [60, 120, 160],
    "lr_decay_ratio": 0.2,
    "dtype": "float32",
    "dataroot": "./data",
    "seed": 0,
}
OF_METHOD = {
    "SGD": {"lr": 0.1, "lrg": None, "bn_decay": 5e-4, "omega": None, "grad_clip": None, "select": None},
    "SGDG": {"lr": 0.01, "lrg": 0.2, "bn_decay": 0.0, "omega": 0.1, "grad_clip": 0.1, "select": "shape"},
    "AdamG": {"lr": 0.01, "lrg": 0.05, "bn_decay": 0.0, "omega": 0.1, "grad_clip": 0.1, "select": "shape"},
}


def parse(*argv) -> dict:
    """The options that these flags lead to."""
    return vars(options.parse_options([str(word) for word in argv])[0])


class TestOptions:
    @pytest.mark.parametrize("dataset", ["CIFAR10", "CIFAR100"])
    @pytest.mark.parametrize(
        ("method", "command"), list(zip(METHODS, COMMANDS.split("\n")[1:4], strict=True))
    )
    def test_the_six_commands_are_the_papers_runs(self, method, command, dataset):
        words = shlex.split(command.replace("$RANDOM$RANDOM", "12345"))[2:]
        options = parse(*words, *(["--dataset", dataset] if dataset == "CIFAR100" else []))
        expected = {**COMMON, **OF_METHOD[method], "dataset": dataset, "optim_method": method}
        assert {name: options[name] for name in expected} == expected
        assert options["save"] == Path("logs/resnet_12345")

    @pytest.mark.parametrize("method", METHODS)
    @pytest.mark.parametrize("dataset", ["CIFAR10", "CIFAR100", "digits", "folder"])
    def test_what_is_not_given_is_the_papers(self, method, dataset):
        options = parse("--optim_method", method, "--dataset", dataset)
        expected = {**COMMON, **OF_METHOD[method]}
        assert {name: options[name] for name in expected} == expected

    def test_what_is_given_wins(self):
        flags = "--optim_method AdamG --lr 0.5 --lrg 0.25 --bnDecay 0.125 --dropout 0"
        flags += " --epochs 7 --epoch_step [2,5]"
        options = parse(
            *flags.split(), "--lr_decay_ratio", 0.5, "--momentum", 0, "--weightDecay", 0, "--omega", 0
        )
        expected = {
            "lr": 0.5,
            "lrg": 0.25,
            "bn_decay": 0.125,
            "dropout": 0.0,
            "epochs": 7,
            "epoch_step": [2, 5],
        }
        expected |= {"lr_decay_ratio": 0.5, "momentum": 0.0, "weight_decay": 0.0, "omega": 0.0}
        assert {name: options[name] for name in expected} == expected

    @pytest.mark.parametrize(
        ("camel", "snake"), [("batchSize", 7), ("weightDecay", 0.25), ("bnDecay", 0.125)]
    )
    def test_camel_case_flags_have_a_snake_case_name(self, camel, snake):
        value, name = snake, re.sub("[A-Z]", lambda match: "_" + match[0].lower(), camel)
        assert parse(f"--{camel}", value)[name] == parse(f"--{name}", value)[name] == value

    @pytest.mark.parametrize("off", ["0", "0.0", "none", "None"])
    def test_grad_clip_can_be_switched_off(self, off):
        assert parse("--optim_method", "SGDG", "--grad_clip", off)["grad_clip"] is None

    def test_epoch_step_may_be_empty_and_spaced(self):
        assert parse("--epoch_step", "[]")["epoch_step"] == []
        assert parse("--epoch_step", "[3, 6 ,8]")["epoch_step"] == [3, 6, 8]

    def test_float_is_float32(self):
        assert parse("--dtype", "float")["dtype"] == "float32"

    def test_save_has_a_default_for_each_run(self):
        argv = ["--dataset", "folder", "--optim_method", "SGDG", "--seed", "3", "--dataset_name"]
        for name, folder in (("my images", "my-images"), ("CIFAR-10 (JPEG)", "CIFAR-10-JPEG")):
            assert parse(*argv, name)["save"] == Path(f"logs/{folder}/wrn-28-10/SGDG/seed3")
        assert parse("--depth", 10, "--width", 1)["save"] == Path("logs/CIFAR10/wrn-10-1/SGD/seed0")

    def test_flags_of_the_authors_script_that_change_nothing_change_nothing(self, monkeypatch):
        assert parse("--gpu_id", "0", "--ngpu", "1", "--groups", "1") == parse()
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        assert parse("--cuda") == parse()

    @pytest.mark.parametrize(
        ("flags", "way"),
        [
            (["--gpu_id", "1"], "CUDA_VISIBLE_DEVICES"),
            (["--groups", "4"], "grouped convolutions"),
            (["--cuda"], "--device"),
            (["--cuda", "--device", "cpu"], "--device"),
        ],
    )
    def test_flags_of_the_authors_script_that_would_change_something_name_todays_way(
        self, flags, way, monkeypatch
    ):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        assert_one_sentence(call(*flags), 2, re.escape(flags[0]), way)


class TestHelp:
    def test_states_each_default_in_80_columns(self, monkeypatch, capsys):
        monkeypatch.setenv("COLUMNS", "80")
        with pytest.raises(SystemExit) as end:
            main.main(["--help"])
        assert end.value.code == 0
        text = capsys.readouterr().out
        assert max(map(len, text.splitlines())) <= 80
        entries = {
            m[1]: " ".join(m[0].split()) for m in re.finditer(r"^  --(\w+)[^\n]*(\n {4,}[^\n]*)*", text, re.M)
        }
        flag_of = {"batch_size": "batchSize", "weight_decay": "weightDecay", "bn_decay": "bnDecay"}
        for name, value in options.DEFAULTS.items():
            if value is None or value is False:
                continue
            stated = re.search(r"\(default: ([^)]*)\)", entries[flag_of.get(name, name)])
            assert type(value)(stated[1]) == value, name
        for method in METHODS:
            for name, value in options.paper_values("resnet", "CIFAR10", method).items():
                if value is not None:
                    stated = re.search(r"\(default: the paper's, (.*)\)$", entries[flag_of.get(name, name)])
                    assert str(value) in stated[1], name
        assert "logs/<dataset>/<model>/<method>/seed<k>" in entries["save"]


class TestOutput:
    @pytest.mark.parametrize("method", METHODS)
    def test_the_start_names_each_parameter_with_shape_and_group(self, finished, method):
        out = finished[method][1].out
        rows = {
            line.split()[0]: re.split(r" {2,}", line.strip())[1:]
            for line in out.splitlines()
            if line[:2] == "  "
        }
        totals = {}
        for name, p in WideResNet(10, 1, 3).named_parameters():
            undercomplete = p.ndim == 4 and p.shape[0] < p[0].numel()
            group = "bn_bias" if p.ndim < 2 else "grassmann" if undercomplete and method != "SGD" else "other"
            assert rows[name] == [" x ".join(map(str, p.shape)), group]
            tensors, elements = totals.get(group, (0, 0))
            totals[group] = tensors + 1, elements + p.numel()
        for group, (tensors, elements) in totals.items():
            assert f"{group}: {elements:,} parameters in {tensors} tensors\n" in out
        assert "in all: 77,395 parameters\n" in out
        assert re.search(r"^device: .*CPU, 1 threads", out, re.M)
        assert f"optim_method {method}" in " ".join(out.split())
        assert max(map(len, out[: out.index("epoch   1/2")].splitlines())) <= 80

    def test_one_plain_line_per_epoch_where_no_terminal_is(self, finished):
        for save, outcome in finished.values():
            assert outcome.err == ""
            epochs = [line for line in outcome.out.splitlines() if line.startswith("epoch")]
            number = r"\d+\.\d+"
            for k, line in enumerate(epochs, 1):
                train, test = f"train loss {number} error +{number}%", f"test {number} +{number}%"
                pattern = rf"epoch +{k}/2  {train}  {test}  \d+ img/s"
                assert re.fullmatch(pattern, line), line
            assert len(epochs) == 2
            assert str(save) in outcome.out.splitlines()[-1]

    def test_a_bar_with_loss_error_and_speed_on_a_terminal(self, tiny, tmp_path, monkeypatch):
        master, slave = pty.openpty()
        termios.tcsetwinsize(slave, (24, 80))
        shown = []

        def read():
            try:
                while chunk := os.read(master, 4096):
                    shown.append(chunk)
            except OSError as error:  # how Linux says that the other end is closed
                assert error.errno == errno.EIO  # noqa: PT017

        reader = threading.Thread(target=read)
        reader.start()
        with os.fdopen(slave, "w") as terminal:
            monkeypatch.setattr(sys, "stderr", terminal)
            assert main_on_this_stderr(tiny("SGDG", tmp_path / "run", "--epochs", 1)) == 0
        reader.join()
        os.close(master)
        text = b"".join(shown).decode()
        bars = [bar for bar in re.split(r"[\r\n]+", text) if f"{STEPS}/{STEPS}" in bar]
        shown = re.search(r"epoch 1/1.*loss (\d+\.\d+), error (\d+\.\d+)%, \d+ img/s", bars[-1])
        assert shown, text
        (stats,) = log_lines(tmp_path / "run")
        expected = stats["train_loss"], 100 - stats["train_acc"]
        assert tuple(map(float, shown.groups())) == pytest.approx(expected, abs=0.0051)

    def test_the_program_itself_ends_with_the_exit_code(self, images_root, tmp_path):
        # The one real process for bad input: what C++ code prints would show here.
        root = shutil.copytree(images_root, tmp_path / "images")
        (root / "test" / "class1" / "05.png").write_bytes(b"\x89PNG\r\n\x1a\nbut no more")
        command = [
            sys.executable,
            PROGRAM,
            "--dataset",
            "folder",
            "--dataroot",
            root,
            "--save",
            tmp_path / "run",
        ]
        done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
        assert done.returncode == 1
        assert re.fullmatch(r"main\.py: error: [^\n]*class1/05\.png[^\n]*\n", done.stderr)


def main_on_this_stderr(argv) -> int:
    """main.main with the signal handlers put back; standard error stays what the test made it."""
    import signal

    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        return main.main(argv)
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


BAD_VALUES = [
    # flag, values that are not accepted
    ("--model", ["vgg99", ""]),
    ("--save", [""]),
    ("--resume", [""]),
    ("--dataset", ["cifar", "CIFAR1000"]),
    ("--optim_method", ["Adam", "sgd"]),
    ("--device", ["tpu", "cuda:x"]),
    ("--dtype", ["float64", "double", ""]),
    ("--depth", ["many", "0", "-10", "10.5", ""]),
    ("--width", ["0", "-1", "wide", "1.5"]),
    ("--dropout", ["1", "-0.1", "nan", "half"]),
    ("--randomcrop_pad", ["-1", "32", "1.5"]),
    ("--nthread", ["-1", "x"]),
    ("--batchSize", ["0", "-128", "1e2", "x"]),
    ("--lr", ["-0.1", "nan", "inf", "fast", "1e999"]),
    ("--lrg", ["-0.1", "nan", "inf", "x"]),
    ("--momentum", ["1", "-0.5", "nan"]),
    ("--weightDecay", ["-1", "nan", "inf"]),
    ("--bnDecay", ["-1", "nan", "inf"]),
    ("--omega", ["-1", "nan", "inf"]),
    ("--grad_clip", ["-1", "nan", "inf", "off"]),
    ("--epochs", ["0", "-5", "2.5", "nan", "all"]),
    (
        "--epoch_step",
        ["60", "60,120", "[60,", "[2,1]", "[1,1]", "[0,2]", "[1.5]", "['1']", "{}", "null", '["a"]'],
    ),
    ("--epoch_step", ["[true]", "[-1]", "[[1]]", "[NaN]", "[" * 100_000]),
    ("--lr_decay_ratio", ["0", "-0.2", "nan", "inf"]),
    ("--seed", ["-1", "x", "1.0", str(2**64)]),
    ("--max_minutes", ["0", "-1", "nan", "inf", "soon"]),
]


class TestBadInput:
    @pytest.mark.parametrize(("flag", "values"), BAD_VALUES)
    def test_a_value_that_is_not_accepted(self, flag, values, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        for value in values:
            outcome = call(flag, value)
            assert_one_sentence(outcome, 2, flag)
            assert value[:20] in outcome.err
        assert not list(tmp_path.iterdir())

    @pytest.mark.parametrize(
        ("flags", "pattern"),
        [
            (["--learning_rate", "0.1"], "--learning_rate"),
            (["--optim", "SGD"], "--optim"),  # no guessing from a beginning
            (["stray"], "stray"),
            (["--lr"], "--lr"),
            (["--lr", "-inf"], "--lr"),
            (["--eval"], "--resume"),
            (["--eval", "--resume", "auto"], "--resume"),
        ],
    )
    def test_flags_that_do_not_fit(self, flags, pattern, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        assert_one_sentence(call(*flags), 2, pattern)

    def test_a_depth_that_is_not_6n_plus_4_names_the_nearest(self):
        assert_one_sentence(call("--depth", 12), 2, "--depth", r"\b10\b", r"\b16\b")

    def test_cuda_where_there_is_none(self, monkeypatch):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        assert_one_sentence(call("--device", "cuda"), 2, "--device cpu")

    @pytest.mark.parametrize("there_is_one", [True, False])
    def test_auto_takes_a_gpu_where_there_is_one(self, there_is_one, monkeypatch):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: there_is_one)
        assert options.choose_device("auto").type == ("cuda" if there_is_one else "cpu")
        assert options.choose_device("cpu").type == "cpu"

    def test_float16_on_the_cpu(self):
        assert_one_sentence(call("--dtype", "float16", "--device", "cpu"), 2, "bfloat16")

    def test_a_batch_larger_than_the_training_set_leaves_the_directory_free(self, tiny, tmp_path):
        assert_one_sentence(call(*tiny("SGD", tmp_path / "run", "--batchSize", 49)), 1, "49", "48")
        assert call(*tiny("SGD", tmp_path / "run", "--batchSize", 48, "--epochs", 1)).code == 0

    def test_missing_data(self, tmp_path):
        flags = ["--dataset", "folder", "--save", tmp_path / "run", "--dataroot"]
        assert_one_sentence(call(*flags, tmp_path / "nowhere"), 1, "nowhere", "--dataset folder needs")
        (tmp_path / "empty" / "train").mkdir(parents=True)
        assert_one_sentence(call(*flags, tmp_path / "empty"), 1, "class")
        (tmp_path / "file").write_text("no directory")
        assert_one_sentence(call(*flags, tmp_path / "file"), 1, "file")

    @pytest.mark.parametrize("content", [b"", b"no image", b"\xff\xd8\xff\xe0 cut"])
    def test_a_corrupt_image_is_named(self, images_root, tmp_path, content):
        root = shutil.copytree(images_root, tmp_path / "images")
        (root / "train" / "class2" / "07.png").write_bytes(content)
        outcome = call("--dataset", "folder", "--dataroot", root, "--save", tmp_path / "run")
        assert_one_sentence(outcome, 1, r"class2/07\.png", "mend or remove")

    @pytest.fixture
    def no_network(self, monkeypatch):
        from torchvision.datasets import utils

        def refuse(*args, **kwargs):
            raise urllib.error.URLError("Temporary failure in name resolution")

        monkeypatch.setattr(utils.urllib.request, "urlopen", refuse)

    @pytest.mark.usefixtures("no_network")
    @pytest.mark.parametrize("dataset", ["CIFAR10", "CIFAR100"])
    def test_no_network_for_the_download(self, dataset, tmp_path):
        flags = ["--dataset", dataset, "--dataroot", tmp_path / "data", "--save", tmp_path / "run"]
        assert_one_sentence(call(*flags), 1, dataset, "name resolution", "https?://")

    @pytest.mark.usefixtures("no_network")
    def test_a_corrupt_archive(self, tmp_path):
        (tmp_path / "cifar-10-python.tar.gz").write_bytes(b"half of an archive")
        flags = ["--dataset", "CIFAR10", "--dataroot", tmp_path, "--save", tmp_path / "run"]
        assert_one_sentence(call(*flags), 1, r"cifar-10-python\.tar\.gz", "corrupt")

    @pytest.mark.parametrize("below", ["file", "file/run"])
    def test_an_unwritable_save(self, tiny, tmp_path, below):
        (tmp_path / "file").write_text("a regular file")
        assert_one_sentence(call(*tiny("SGD", tmp_path / below)), 1, "--save", below)
        assert (tmp_path / "file").read_text() == "a regular file"


class TestBadCheckpoint:
    @pytest.mark.parametrize("name", ["checkpoint.pt", "log.txt", "config.json"])
    def test_a_directory_that_holds_a_run_is_not_overwritten(self, tiny, finished, tmp_path, name):
        save = tmp_path / "run"
        save.mkdir()
        shutil.copy(finished["SGD"][0] / name, save)
        before = contents(save)
        way = ["--resume auto"] if name != "log.txt" else ["holds log.txt"]
        assert_one_sentence(call(*tiny("SGD", save)), 2, "another --save", *way)
        assert contents(save) == before

    def test_resuming_does_not_write_into_another_run(self, tiny, finished, tmp_path):
        other = shutil.copytree(finished["SGDG"][0], tmp_path / "other")
        before = contents(other)
        outcome = call(*tiny("SGD", other, "--resume", finished["SGD"][0], "--epochs", 3))
        assert_one_sentence(outcome, 2, "already holds a run")
        assert contents(other) == before

    def test_nothing_to_resume(self, tmp_path):
        (tmp_path / "empty").mkdir()
        for name in ("nowhere", "empty"):
            assert_one_sentence(call("--resume", tmp_path / name), 1, name, "no checkpoint")

    def broken(self, directory):
        """Checkpoint files that are not whole, by what is wrong with them."""
        whole = (directory / "checkpoint.pt").read_bytes()
        yield "empty", b""
        yield "cut short", whole[: len(whole) // 2]
        yield "a byte short", whole[:-1]
        yield "noise", bytes(range(256)) * 100
        yield "text", b"json_stats: {}\n"
        flipped = bytearray(whole)
        flipped[: len(whole) // 3] = bytes(len(whole) // 3)
        yield "zeros at the start", bytes(flipped)

    def test_a_broken_file(self, finished, tmp_path):
        for name, content in self.broken(finished["SGDG"][0]):
            (tmp_path / "checkpoint.pt").write_bytes(content)
            outcome = call("--resume", tmp_path)
            assert_one_sentence(outcome, 1, "whole checkpoint")
            assert contents(tmp_path) == {"checkpoint.pt": content}, name

    @pytest.mark.parametrize(
        "value",
        [
            {},
            {"state_dict": {}, "epoch": 3},
            [1, 2],
            torch.zeros(3),
            {"model": {}, "optimizer": {}, "options": {}, "epoch": 0},
            {"model": 1, "optimizer": 2, "options": 3, "epoch": 4},
        ],
    )
    def test_a_file_that_something_else_wrote(self, value, tmp_path):
        torch.save(value, tmp_path / "checkpoint.pt")
        for flags in ([], ["--lr", "0.1"], ["--eval"]):
            assert_one_sentence(call("--resume", tmp_path, *flags), 1, "main.py")

    @pytest.mark.parametrize(
        "part",
        [
            "model",
            "optimizer",
            "generators",
            "sums",
            "probe",
            "data_sha256",
            "environment",
            "history",
        ],
    )
    def test_a_part_of_a_checkpoint_that_is_missing_or_no_good(self, finished, tmp_path, part):
        state = load(finished["SGDG"][0])
        save = tmp_path / "run"
        save.mkdir()
        torch.save({key: value for key, value in state.items() if key != part}, save / "checkpoint.pt")
        assert_one_sentence(call("--resume", save, "--epochs", 3), 1, "checkpoint")
        torch.save({**state, part: "no good"}, save / "checkpoint.pt")
        assert_one_sentence(call("--resume", save, "--epochs", 3), 1, "checkpoint")

    def test_a_pickle_that_would_run_code_is_not_run(self, tmp_path):
        class Evil:
            def __reduce__(self):
                return Path.touch, (tmp_path / "was here",)

        torch.save({"model": Evil(), "optimizer": 0, "options": {}, "epoch": 0}, tmp_path / "checkpoint.pt")
        assert_one_sentence(call("--resume", tmp_path), 1, "checkpoint")
        assert not (tmp_path / "was here").exists()

    def test_the_weights_of_another_model(self, finished, tmp_path):
        state = load(finished["SGDG"][0])
        state["model"] = WideResNet(16, 1, 3).state_dict()
        torch.save(state, tmp_path / "checkpoint.pt")
        assert_one_sentence(call("--resume", tmp_path, "--epochs", 3), 1, "another model")

    @pytest.mark.parametrize(
        ("flag", "value", "stored"),
        [
            ("--depth", "16", "10"),
            ("--width", "2", "1"),
            ("--dropout", "0.5", r"0\.3"),
            ("--dataset", "digits", "folder"),
            ("--optim_method", "SGDG", "AdamG"),
            ("--batchSize", "8", "16"),
            ("--lr", "0.5", r"0\.01"),
            ("--lrg", "0.5", r"0\.05"),
            ("--epoch_step", "[2]", r"\[1\]"),
            ("--grad_clip", "none", r"0\.1"),
            ("--select", "measured", "shape"),
            ("--seed", "1", "0"),
            ("--dtype", "bfloat16", "float32"),
        ],
    )
    def test_an_option_that_differs_names_both_values(self, finished, flag, value, stored):
        save = finished["AdamG"][0]
        before = contents(save)
        shown = "None" if value == "none" else re.escape(value)
        assert_one_sentence(call("--resume", save, flag, value), 2, rf"{shown}\b|{shown} ", stored)
        assert contents(save) == before

    def test_other_images_than_at_training(self, finished, images_root, tmp_path):
        save = shutil.copytree(finished["SGD"][0], tmp_path / "run")
        root = shutil.copytree(images_root, tmp_path / "images")
        shutil.copy(root / "train" / "class0" / "00.png", root / "train" / "class0" / "01.png")
        before = contents(save)
        assert_one_sentence(call("--resume", save, "--dataroot", root, "--epochs", 3), 1, "other images")
        assert contents(save) == before

    def test_fewer_epochs_than_are_finished(self, finished, tmp_path):
        save = shutil.copytree(finished["SGD"][0], tmp_path / "run")
        before = contents(save)
        assert_one_sentence(call("--resume", save, "--epochs", 1), 2, "--epochs 1", r"\b2\b")
        assert contents(save) == before


def test_another_checkpoint_file_does_not_overwrite_the_run_beside_it(finished, tmp_path):
    """A kept copy of an early checkpoint goes on in a directory of its own."""
    run = shutil.copytree(finished["SGD"][0], tmp_path / "run")
    (run / "checkpoint.pt").rename(run / "early.pt")
    before = contents(run)
    assert_one_sentence(call("--resume", run / "early.pt", "--epochs", 3), 2, "already holds a run")
    assert contents(run) == before
    assert call("--resume", run / "early.pt", "--epochs", 3, "--save", tmp_path / "branch").code == 0
    assert [stats["epoch"] for stats in log_lines(tmp_path / "branch")] == [1, 2, 3]
    assert contents(run) == before


def test_a_full_disk_while_logging_is_one_sentence(tiny, tmp_path, monkeypatch):
    def write_to_full_disk(log, stats):
        Path("/dev/full").write_text("line\n")

    monkeypatch.setattr(utils.RunLog, "add", write_to_full_disk)
    assert_one_sentence(call(*tiny("SGD", tmp_path / "run")), 1, "No space left", "--resume")


@pytest.mark.parametrize("end", ["", ".tmp"])
@pytest.mark.parametrize("name", ["config.json", "log.txt", "checkpoint.pt", "lock"])
def test_a_directory_in_the_place_of_a_file_is_one_sentence(tiny, tmp_path, name, end):
    (tmp_path / "run" / f"{name}{end}").mkdir(parents=True)
    outcome = call(*tiny("SGD", tmp_path / "run", "--epochs", 1))
    if name + end != "lock.tmp":  # no file of ours
        assert_one_sentence(outcome, outcome.code, re.escape(str(tmp_path / "run")))


def test_a_compiler_that_fails_is_one_sentence(tiny, tmp_path, monkeypatch):
    def backend(graph, inputs):
        raise RuntimeError("InvalidCxxCompiler: no compiler\nand much more")

    compile_model = torch.compile
    monkeypatch.setattr(torch, "compile", lambda model, **_: compile_model(model, backend=backend))
    outcome = call(*tiny("SGD", tmp_path / "run", "--compile"))
    assert_one_sentence(outcome, 1, "--compile failed", "InvalidCxxCompiler", "leave it out")


def test_a_directory_whose_name_tensorboard_cannot_write_is_refused(tiny, tmp_path):
    outcome = call(*tiny("SGD", f"{tmp_path}/\udcff"))
    assert_one_sentence(outcome, 2, r"\\udcff is not UTF-8", "another --save")
    assert list(tmp_path.iterdir()) == []


def test_the_home_directory_is_known_without_a_shell(tiny, finished, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    shutil.copytree(finished["SGD"][0], tmp_path / "run")
    assert call("--resume=~/run", "--eval").code == 0
    assert "nothing to do" in call(*tiny("SGD", "~/run", "--resume", "auto")).out


class TestOtherImages:
    """A checkpoint is evaluated on any images of as many classes."""

    def test_are_normalized_as_the_runs(self, finished, images_root, tmp_path):
        save = finished["SGD"][0]
        root = shutil.copytree(images_root, tmp_path / "images")
        shutil.copy(root / "train" / "class0" / "00.png", root / "train" / "class0" / "01.png")
        own, other = call("--resume", save, "--eval"), call("--resume", save, "--eval", "--dataroot", root)
        note = "note: other images than the run's, normalized as the run's\n"
        assert (other.code, other.err) == (0, "")
        assert other.out.replace(note, "") == own.out  # the test part is the same
        shutil.rmtree(root / "train")
        alone = call("--resume", save, "--eval", "--dataroot", root)
        assert (alone.code, alone.err) == (0, "")
        assert alone.out.count(note) == other.out.count(note) == 1
        assert alone.out.split(note)[1] == other.out.split(note)[1]
        state = load(save)
        del state["statistics"]  # as of an older main.py
        torch.save(state, tmp_path / "old.pt")
        outcome = call("--resume", tmp_path / "old.pt", "--eval", "--dataroot", root)
        assert_one_sentence(outcome, 1, "only be evaluated on these")
        assert call("--resume", tmp_path / "old.pt", "--eval").code == 0

    def test_of_another_number_of_classes_are_refused(self, finished):
        outcome = call("--resume", finished["SGD"][0], "--eval", "--dataset", "digits")
        assert_one_sentence(outcome, 1, "digits has 10 classes", "network 3")

    def test_a_run_with_held_out_images_is_evaluated_on_the_test_set_too(self, tiny, images_root, tmp_path):
        assert call(*tiny("SGD", tmp_path / "run", "--holdout", 12)).code == 0
        words = ["--resume", tmp_path / "run", "--eval"]
        assert "on 12 held-out training images of folder" in call(*words).out
        assert "on 18 test images of folder" in call(*words, "--holdout", 0).out
        other = shutil.copytree(images_root, tmp_path / "other")
        shutil.rmtree(other / "train")
        assert "on 18 test images of folder" in call(*words, "--dataroot", other).out
        moved = shutil.copytree(images_root, tmp_path / "moved")  # goes on with what was held out
        assert call("--resume", tmp_path / "run", "--dataroot", moved, "--epochs", 3).code == 0
        assert load(tmp_path / "run")["options"]["holdout"] == 12


def test_too_little_memory_is_one_sentence(tiny, tmp_path, monkeypatch):
    def exhausted(*args):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(main, "cross_entropy", exhausted)
    assert_one_sentence(call(*tiny("SGD", tmp_path / "run")), 1, "out of memory", "--batchSize")


def test_a_log_without_a_checkpoint_is_not_emptied(finished, tmp_path):
    """As in a directory of published logs."""
    save = shutil.copytree(finished["SGD"][0], tmp_path / "run")
    (save / "checkpoint.pt").unlink()
    before = contents(save)
    options = ["--dataset", "digits", "--depth", 10, "--width", 1, "--save", save]
    assert_one_sentence(call(*options, "--resume", "auto"), 2, "--dataset digits differs from folder")
    assert contents(save) == before
    (save / "config.json").unlink()
    assert_one_sentence(call(*options, "--resume", "auto"), 2, "no checkpoint")
    del before["config.json"]
    assert contents(save) == before


def test_an_unfinished_run_that_has_lost_its_checkpoint_is_left_as_it_is(tiny, finished, tmp_path):
    save = shutil.copytree(finished["SGD"][0], tmp_path / "run")
    (save / "checkpoint.pt").unlink()
    config = (save / "config.json").read_text()
    (save / "config.json").write_text(config.replace('"epochs": 2', '"epochs": 3'))
    before = contents(save)
    assert_one_sentence(call(*tiny("SGD", save, "--epochs", 3, "--resume", "auto")), 2, "no checkpoint")
    assert contents(save) == before


def test_a_finished_run_needs_its_checkpoint_no_more(tiny, finished, tmp_path):
    save = shutil.copytree(finished["SGDG"][0], tmp_path / "run")
    (save / "checkpoint.pt").unlink()
    before = contents(save)
    outcome = call(*tiny("SGDG", save, "--resume", "auto"))
    assert (outcome.code, outcome.err) == (0, "")
    assert outcome.out.startswith("nothing to do: the run has its 2 epochs")
    assert call("--save", save, "--resume", "auto") == outcome  # the rest is taken from the run
    assert_one_sentence(
        call(*tiny("SGDG", save, "--epochs", 3, "--resume", "auto")), 2, "no checkpoint any more"
    )
    assert_one_sentence(
        call(*tiny("SGDG", save, "--lr", 0.3, "--resume", "auto")), 2, "--lr 0.3 differs from 0.01"
    )
    assert contents(save) == before
    for content in ("{", "[1]", '{"options": null}', '{"options": [1]}'):
        (save / "config.json").write_text(content)
        assert_one_sentence(call(*tiny("SGDG", save, "--resume", "auto")), 2, "no checkpoint")


def test_the_error_is_the_last_line_where_all_goes_to_one_file(tmp_path):
    """Python buffers what it prints to a file; a sweep reports the file's last line as the cause."""
    words = ["--lrg", "0.1", "--dataset", "folder", "--dataroot", "nowhere", "--save", tmp_path / "run"]
    clean = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    command = [sys.executable, main.__file__, *words]
    with (tmp_path / "output.txt").open("w") as file:
        done = subprocess.run(command, stdout=file, stderr=subprocess.STDOUT, env=clean)
    assert done.returncode == 1
    note, error = (tmp_path / "output.txt").read_text().splitlines()
    assert note.startswith("note: --lrg has no effect")
    assert error.startswith("main.py: error: ")


def test_a_directory_is_itself_by_any_name(finished, tmp_path, monkeypatch):
    save = shutil.copytree(finished["SGD"][0], tmp_path / "run")
    monkeypatch.chdir(tmp_path)
    Path("link").symlink_to(save)
    for name in ("run", "./run/checkpoint.pt", "link"):
        assert call("--resume", name, "--save", save).code == 0


class TestSummary:
    @pytest.mark.parametrize(
        ("flags", "parameters", "multiply_adds"),
        [
            (["--depth", 10, "--width", 1], 77_850, 12_501_632),
            (["--model", "vgg13", "--optim_method", "SGDG"], 9_935_434, 228_791_296),
        ],
    )
    def test_counts_and_leaves_nothing(self, flags, parameters, multiply_adds, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        outcome = call("--summary", *flags)
        assert (outcome.code, outcome.err) == (0, "")
        assert f"in all: {parameters:,} parameters" in outcome.out
        assert f"multiply-adds of one image: {multiply_adds:,}" in outcome.out
        assert not list(tmp_path.iterdir())

    def test_measured_weights_are_on_g_and_leave_the_generators_alone(self):
        out = call(
            "--summary", "--depth", 10, "--width", 10, "--optim_method", "SGDG", "--select", "measured"
        ).out
        conv0 = re.findall(r"(\S*conv0)\.weight .* (grassmann.*)", out)
        overcomplete = ("group0.block0.conv0", "grassmann_overcomplete")
        others = [(name, "grassmann") for name in ("conv0", "group1.block0.conv0", "group2.block0.conv0")]
        assert sorted(conv0) == sorted([overcomplete, *others])
        assert out.count("grassmann") == 4 + 2  # and the two totals
        assert max(map(len, out.splitlines())) <= 80
        model = main.WideResNet(10, 1, 10)
        state = main.torch.get_rng_state()
        main.grassmann_param_groups(model, 0.1, 0.1, select="measured", loss_fn=main.random_loss)
        assert main.torch.equal(main.torch.get_rng_state(), state)

    def test_of_a_folder_has_its_classes(self, images_root):
        out = call(
            "--summary", "--depth", 10, "--width", 1, "--dataset", "folder", "--dataroot", images_root
        ).out
        assert re.search(r"fc\.weight +3 x 64", out)


def test_what_has_no_effect_is_said(tmp_path):
    out = call("--summary", "--model", "vgg11", "--depth", 28, "--width", 10, "--lrg", 0.2).out
    assert out.startswith("note: --depth, --width, --lrg have no effect on vgg-11 with SGD\n")


@pytest.mark.parametrize(
    ("method", "rates"),
    [("SGD", (0.01, None, 5e-4)), ("SGDG", (0.001, 0.02, 0)), ("AdamG", (0.001, 0.005, 0))],
)
def test_svhn_and_vgg_take_the_papers_values(method, rates):
    chosen, _ = options.parse_options(["--model", "vgg19", "--dataset", "SVHN", "--optim_method", method])
    assert (chosen.lr, chosen.lrg, chosen.bn_decay) == rates
    assert (chosen.epochs, chosen.epoch_step, chosen.lr_decay_ratio) == (160, [60, 120], 0.1)
    assert (chosen.dropout, chosen.randomcrop_pad) == (0, 0)
    assert chosen.save == Path(f"logs/SVHN/vgg-19/{method}/seed0")
    assert options.parse_options(["--dataset", "SVHN"])[0].dropout == 0.4


def test_vgg_needs_a_batch_to_normalize_over():
    assert_one_sentence(call("--model", "vgg11", "--batchSize", 1), 2, "batchSize")


class TestLock:
    def test_a_second_writer_is_refused_while_the_first_lives(self, finished, tmp_path):
        save = shutil.copytree(finished["SGD"][0], tmp_path / "run")
        lock = "f = utils.lock_directory(pathlib.Path(sys.argv[1])); print(1, flush=True); sys.stdin.read()"
        command = [sys.executable, "-c", f"import sys, utils, pathlib; {lock}", str(save)]
        before = contents(save)
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        with subprocess.Popen(command, **pipes) as holder:
            assert holder.stdout.readline() == "1\n"
            assert_one_sentence(
                call("--resume", save, "--epochs", 3), 1, f"process {holder.pid} on", "another --save"
            )
            del before["lock"]
            assert {name: value for name, value in contents(save).items() if name != "lock"} == before
            assert call("--resume", save, "--eval").code == 0  # reads only
            holder.kill()
        assert call("--resume", save, "--epochs", 3).code == 0  # the lock died with its process

    def test_it_is_taken_before_the_checkpoint_is_read(self, finished, tmp_path):
        """A run that is just ending might still write."""
        save = shutil.copytree(finished["SGD"][0], tmp_path / "run")
        (save / "checkpoint.pt").write_bytes(b"half of a checkpoint")
        with utils.lock_directory(save):
            assert_one_sentence(call("--resume", save), 1, "is being written by process")

    def test_a_lock_file_that_nobody_holds_does_not_matter(self, finished, tmp_path):
        save = shutil.copytree(finished["SGD"][0], tmp_path / "run")
        (save / "lock").write_text("process 1 on a machine that is gone")
        assert call("--resume", save, "--epochs", 3).code == 0
        assert re.fullmatch(rf"process {os.getpid()} on \S+", (save / "lock").read_text())

    def test_a_file_system_without_locks_is_one_sentence(self, tiny, tmp_path, monkeypatch):
        def no_locks(*args):
            raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

        monkeypatch.setattr("fcntl.flock", no_locks)
        assert_one_sentence(call(*tiny("SGD", tmp_path / "run")), 1, "cannot be locked", "local disk")


def test_a_holdout_is_tested_on_instead_of_the_test_set(tiny, tmp_path):
    save = tmp_path / "run"
    assert call(*tiny("SGD", save, "--holdout", 12)).code == 0
    config = json.loads((save / "config.json").read_text())
    assert (config["data"]["train_images"], config["data"]["test_images"]) == (36, 12)
    assert config["options"]["holdout"] == 12
    assert "on 12 held-out training images" in call("--eval", "--resume", save).out
    assert_one_sentence(call("--resume", save, "--holdout", 6), 2, "12", "6")


@pytest.mark.usefixtures("no_network")
@pytest.mark.parametrize("dataset", ["CIFAR10", "CIFAR100", "SVHN"])
def test_one_epoch_on_an_archive_in_the_real_format(dataset, tmp_path, monkeypatch):
    if dataset == "SVHN":
        write_svhn(tmp_path, monkeypatch)
    else:
        write_archive(dataset, tmp_path, monkeypatch)
    flags = [
        "--dataroot",
        tmp_path,
        "--dataset",
        dataset,
        "--batchSize",
        2,
        "--epochs",
        1,
        "--epoch_step",
        "[]",
    ]
    outcome = call("--depth", 10, "--width", 1, "--optim_method", "SGDG", *flags, "--save", tmp_path / "run")
    assert (outcome.code, outcome.err) == (0, "")
    (stats,) = log_lines(tmp_path / "run")
    assert stats["num_classes"] == (100 if dataset == "CIFAR100" else 10)


def test_a_broken_pipe_has_the_code_of_its_signal(monkeypatch):
    def run():
        raise BrokenPipeError

    monkeypatch.setattr(os, "dup2", lambda *descriptors: None)
    assert utils.answer(run) == 141


def test_a_reader_that_leaves_early_is_no_error(tmp_path):
    command = f"{shlex.quote(sys.executable)} main.py --summary --depth 10 --width 1 | head -n 1"
    done = subprocess.run(
        ["bash", "-c", command], cwd=Path(main.__file__).parent, capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_options_of_one_run_are_not_those_of_the_next():
    parse()["epoch_step"].append(999)
    assert parse()["epoch_step"] == [60, 120, 160]
