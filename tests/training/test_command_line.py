"""The command line: the paper's commands, every flag, what is printed, a sentence for every mistake."""

import io
import json
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from helpers import METHODS, assert_one_sentence, call, contents, load, log_lines

import main
import options
from resnet import WideResNet

PROGRAM = [sys.executable, main.__file__]


def parse(*argv) -> dict:
    """The options that these flags lead to."""
    return vars(options.parse_options([str(word) for word in argv])[0])


@pytest.fixture
def other(images_root, tmp_path):
    """Images with another training part."""
    root = shutil.copytree(images_root, tmp_path / "images")
    shutil.copy(root / "train" / "class0" / "00.png", root / "train" / "class0" / "01.png")
    return root


class TestOptions:
    @pytest.mark.parametrize("dataset", ["CIFAR10", "CIFAR100"])
    @pytest.mark.parametrize("method", ["SGD", "SGDG --lr 0.01 --lrg 0.2", "AdamG --lr 0.01 --lrg 0.05"])
    def test_the_authors_six_commands_are_the_papers_runs(self, method, dataset):
        """Whose rates and schedule test_paper.py has."""
        words = f"--save ./logs/resnet_1 --depth 28 --width 10 --dataset {dataset} --optim_method {method}"
        paper = parse("--dataset", dataset, "--optim_method", method.split()[0])
        assert parse(*words.split()) == {**paper, "model": "resnet", "save": Path("logs/resnet_1")}

    @pytest.mark.parametrize(("flag", "text", "value"), [
        ("lr", "0.5", 0.5), ("lrg", "0.25", 0.25), ("dropout", "0", 0), ("epochs", "7", 7), ("omega", "0", 0),
        ("batchSize", "7", 7), ("weightDecay", "2", 2), ("bnDecay", "2", 2), ("grad_clip", "0.0", None),
        ("grad_clip", "None", None), ("epoch_step", "[]", []), ("epoch_step", "[3, 6 ,8]", [3, 6, 8]),
        ("dataset_name", "\x1b[31m", "\\x1b[31m"), ("dataroot", "~/x", os.path.expanduser("~/x")),
    ])  # fmt: skip
    def test_what_is_given_wins_also_by_a_snake_case_name(self, flag, text, value):
        name = re.sub("[A-Z]", lambda match: "_" + match[0].lower(), flag)
        plain = parse("--optim_method", "AdamG")
        for spelling in (flag, name):
            assert parse("--optim_method", "AdamG", f"--{spelling}", text) == {**plain, name: value}

    def test_save_has_a_default_for_each_run(self):
        argv = ["--dataset", "folder", "--optim_method", "SGDG", "--seed", "3", "--dataset_name"]
        for name, folder in (("my images", "my-images"), ("CIFAR-10 (JPEG)", "CIFAR-10-JPEG")):
            assert parse(*argv, name)["save"] == Path(f"logs/{folder}/wrn-28-10/SGDG/seed3")
        assert parse("--model", "vgg19", "--dataset", "SVHN")["save"] == Path("logs/SVHN/vgg-19/SGD/seed0")

    def test_options_of_one_run_are_not_those_of_the_next(self):
        parse()["epoch_step"].append(999)
        assert parse()["epoch_step"] == [60, 120, 160]

    @pytest.mark.parametrize(("there_is_one", "device"), [(True, "cuda"), (False, "cpu")])
    def test_auto_takes_a_gpu_where_there_is_one(self, there_is_one, device, monkeypatch):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: there_is_one)
        assert options.choose_device("auto").type == device
        assert options.choose_device("cpu").type == "cpu"


class TestOutput:
    def test_help_states_each_default_in_80_columns(self, monkeypatch):
        monkeypatch.setenv("COLUMNS", "80")
        outcome = call("--help")
        assert outcome.code == 0
        assert max(map(len, outcome.out.splitlines())) <= 80
        entries = re.findall(r"^  --(\w+)(.*(?:\n {4,}.*)*)", outcome.out, re.M)
        texts = {name: " ".join(text.split()) for name, text in entries}
        assert len(texts) == len(options.ROWS)
        for name, row in options.ROWS.items():
            stated = re.search(r"\(default: (.*)\)$", texts[row["camel"] or name])[1]
            if isinstance(row["default"], (int, float, str)) and row["default"] is not False:
                assert stated == str(row["default"])
            for method in METHODS if row["default"] is options.PAPER else ():
                value = options.paper_values("resnet", "CIFAR10", method)[name]
                assert value is None or str(value) in stated, name

    @pytest.mark.parametrize("method", METHODS)
    def test_the_start_names_each_parameter_with_shape_and_group(self, finished, method):
        out, totals = finished[method][1].out, Counter()
        for name, p in WideResNet(10, 1, 3).named_parameters():
            undercomplete = p.ndim == 4 and p.shape[0] < p[0].numel()
            group = "bn_bias" if p.ndim < 2 else "grassmann" if undercomplete and method != "SGD" else "other"
            shape = " x ".join(map(str, p.shape))
            assert re.search(rf"^  {re.escape(name)} +{shape} +{group}$", out, re.M), name
            totals[group] += p.numel()
        for group, elements in totals.items():
            assert f"{group}: {elements:,} parameters in " in out
        assert re.search(r"^device: .*CPU, 1 threads", out, re.M)
        assert max(map(len, out.splitlines()[:-1])) <= 80

    def test_a_bar_with_loss_error_and_speed_on_a_terminal(self, tiny, tmp_path, monkeypatch):
        terminal = io.StringIO()
        terminal.isatty = lambda: True
        monkeypatch.setattr(sys, "stderr", terminal)
        assert main.main(tiny("SGDG", tmp_path / "run", "--epochs", 1)) == 0
        bar = r"epoch 1/1 .* 3/3 .*loss ([\d.]+), error ([\d.]+)%, \d+ img/s"
        shown = re.findall(bar, terminal.getvalue())
        (stats,) = log_lines(tmp_path / "run")
        expected = stats["train_loss"], 100 - stats["train_acc"]
        assert tuple(map(float, shown[-1])) == pytest.approx(expected, abs=0.0051)

    def test_the_error_is_the_last_line_where_all_goes_to_one_file(self, tmp_path, monkeypatch):
        """Python buffers what it prints to a file; a sweep reports the file's last line as the cause."""
        monkeypatch.delenv("PYTHONUNBUFFERED", raising=False)
        words = ["--lrg", "0.1", "--dataset", "folder", "--dataroot", "nowhere", "--save", tmp_path / "run"]
        done = subprocess.run([*PROGRAM, *words], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        assert done.returncode == 1
        assert re.fullmatch("note: --lrg has no effect.*\nmain.py: error: .*\n", done.stdout)

    def test_nobody_need_listen_to_the_program(self, tiny, tmp_path):
        words = shlex.join([*PROGRAM, *tiny("SGD", tmp_path / "run", "--epochs", 1)])
        assert subprocess.run(["bash", "-c", f"{words} >&- 2>&- <&-"]).returncode == 0
        assert len(log_lines(tmp_path / "run")) == 1

    def test_a_reader_that_left_is_answered_by_the_code_of_its_signal(self):
        reader, writer = os.pipe()
        os.close(reader)
        done = subprocess.run([*PROGRAM, "--summary"], stdout=writer, stderr=subprocess.PIPE)
        os.close(writer)
        assert (done.returncode, done.stderr) == (141, b"")

    def test_a_stream_may_be_of_any_kind(self, monkeypatch):
        """As a notebook's, which cannot be told how to encode."""
        monkeypatch.setattr(sys, "argv", ["main.py", "--summary", "--depth", "10", "--width", "1"])
        monkeypatch.setattr(sys, "stdout", io.StringIO())
        with pytest.raises(SystemExit) as end:
            runpy.run_path(main.__file__, run_name="__main__")
        assert end.value.code == 0

    def test_control_characters_are_printed_as_escapes(self, tiny, tmp_path):
        save = tmp_path / "a\x1b[31m\n|"
        outcomes = [call(*tiny("SGD", save)), call(*tiny("SGD", save))]  # a path, then an error about it
        state = load(save)
        state["environment"]["device"] = state["options"]["dataset_name"] = "\x1b[31mred"
        torch.save(state, save / "checkpoint.pt")
        outcomes += [call("--resume", save, "--eval"), call("--resume", save, "--epochs", 3)]
        assert [outcome.code for outcome in outcomes] == [0, 2, 0, 0]
        for outcome in outcomes:
            assert "\\x1b[31m" in outcome.out + outcome.err
            assert "\x1b" not in outcome.out + outcome.err
            assert not re.search("^[|]", outcome.out + outcome.err, re.M)

    def test_what_has_no_effect_and_rates_that_will_not_drop_are_said(self, capsys):
        parse("--model", "vgg11", "--depth", 28, "--width", 10, "--lrg", 0.2, "--epochs", 60)
        assert capsys.readouterr().out.splitlines() == [
            "note: no drop of the learning rates within 60 epochs (--epoch_step)",
            "note: --depth, --width, --lrg have no effect on vgg-11 with SGD",
        ]
        parse("--epochs", 61)
        assert capsys.readouterr().out == ""


BAD_VALUES = """
    --model=vgg99 --save= --save=s3://bucket/run --resume=gs://bucket/run --dataroot=https://host/data
    --dataset=cifar --optim_method=sgd --device=tpu --dtype=half --select=all --depth=many --depth=-10
    --depth=10.5 --depth=12 --width=0 --width=1.5 --dropout=1 --randomcrop_pad=32 --nthread=-1 --holdout=-1
    --batchSize=0 --batchSize=1e2 --lr=-0.1 --lr=nan --lr=1e999 --lr=1e38 --lrg=1e38 --momentum=1
    --weightDecay=1e38 --bnDecay=1e38 --omega=1e38 --grad_clip=-1 --grad_clip=off --epochs=0 --epochs=2.5
    --lr_decay_ratio=0 --lr_decay_ratio=1e38 --seed=-1 --seed=18446744073709551616 --max_minutes=0 --ngpu=0
    --epoch_step=60 --epoch_step=60,120 --epoch_step=[60, --epoch_step=[2,1] --epoch_step=[1,1]
    --epoch_step=[0,2] --epoch_step=[1.5] --epoch_step={} --epoch_step=["a"] --epoch_step=[true]
"""


class TestBadInput:
    def test_a_value_that_is_not_accepted(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        for word in [*BAD_VALUES.split(), f"--epoch_step={'[' * 100_000}"]:
            flag, value = word.split("=", 1)
            assert_one_sentence(call(word), 2, flag, re.escape(value[:20]))
        assert os.listdir() == []

    @pytest.mark.parametrize(("words", "said"), [
        ("--learning_rate 0.1", "--learning_rate"), ("--optim SGD", "--optim"),  # no guessing
        ("stray", "stray"), ("--lr", "--lr"), ("--lr -inf", "--lr"), ("--depth 12", "10 and 16"),
        ("--eval", "--resume"), ("--eval --resume auto", "--resume"), ("--device cuda", "--device cpu"),
        ("--dtype float16 --device cpu", "bfloat16"), ("--model vgg11 --batchSize 1", "batchSize"),
    ])  # fmt: skip
    def test_flags_that_do_not_fit(self, words, said, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        assert_one_sentence(call(*words.split()), 2, said)
        assert os.listdir() == []

    def test_a_batch_larger_than_the_training_set_leaves_the_directory_free(self, tiny, tmp_path):
        assert_one_sentence(call(*tiny("SGD", tmp_path / "run", "--batchSize", 49)), 1, "49", "48")
        assert not (tmp_path / "run").exists()

    @pytest.mark.parametrize("root", ["nowhere", "file", "~nosuchuser/x"])
    def test_missing_data(self, tmp_path, monkeypatch, root):
        monkeypatch.chdir(tmp_path)
        Path("file").write_text("no directory")
        outcome = call("--dataset", "folder", "--save", "run", "--dataroot", root)
        assert_one_sentence(outcome, 1, root, "--dataset folder needs")
        assert os.listdir() == ["file"]

    @pytest.mark.parametrize("name", ["config.json", "log.txt", "checkpoint.pt", "lock"])
    def test_a_save_that_cannot_be_written(self, tiny, tmp_path, name):
        """A directory is in the place of a file, or a file in the place of the run's directory."""
        (tmp_path / "run" / name).mkdir(parents=True)
        (tmp_path / "file").write_text("mine")
        for save in (tmp_path / "run", tmp_path / "file" / "run"):
            outcome = call(*tiny("SGD", save, "--epochs", 1))
            assert_one_sentence(outcome, outcome.code, re.escape(str(save.parent)))
        assert (tmp_path / "file").read_text() == "mine"

    def test_a_directory_whose_name_tensorboard_cannot_write(self, tiny, tmp_path):
        outcome = call(*tiny("SGD", f"{tmp_path}/\udcff"))
        assert_one_sentence(outcome, 2, r"\\udcff is not UTF-8", "another --save")
        assert list(tmp_path.iterdir()) == []

    def test_a_compiler_that_fails(self, tiny, tmp_path, monkeypatch):
        def backend(graph, inputs):
            raise RuntimeError("InvalidCxxCompiler: no compiler\nand much more")

        compile_model = torch.compile
        monkeypatch.setattr(torch, "compile", lambda model, **_: compile_model(model, backend=backend))
        outcome = call(*tiny("SGD", tmp_path / "run", "--compile"))
        assert_one_sentence(outcome, 1, "--compile failed", "InvalidCxxCompiler", "leave it out")


OTHER_VALUES = {
    "model": "vgg11", "depth": 16, "width": 2, "dropout": 0.5, "dataset": "digits", "dataset_name": "other",
    "randomcrop_pad": 2, "holdout": 6, "optim_method": "SGDG", "batch_size": 8, "lr": 0.5, "lrg": 0.5,
    "momentum": 0.5, "weight_decay": 0.25, "bn_decay": 0.25, "omega": 0.5, "grad_clip": "none",
    "select": "measured", "epoch_step": "[2]", "lr_decay_ratio": 0.5, "seed": 1, "dtype": "bfloat16",
}  # fmt: skip


class TestResume:
    def test_every_option_but_a_few_is_the_checkpoints(self, finished, images_root):
        """Those that change neither what is trained nor how, and --epochs; sync_bn cannot be given here."""
        save = finished["AdamG"][0]
        before = contents(save)
        may_change = {"epochs", "dataroot", "nthread", "device", "compile"}
        assert {*options.CALL_NAMES, *OTHER_VALUES, *may_change, "sync_bn"} == options.ROWS.keys()
        for name, value in OTHER_VALUES.items():
            stored = load(save)["options"][name]
            shown = None if value == "none" else value
            sentence = re.escape(f"--{name} {shown} differs from {stored} of {save}")
            assert_one_sentence(call("--resume", save, f"--{name}", value), 2, sentence)
        flags = ["--dataroot", images_root / ".", "--nthread", 0, "--device", "cpu", "--compile"]
        assert "nothing to do" in call("--resume", save, *flags).out
        assert {**contents(save), "lock": 0} == {**before, "lock": 0}

    def test_no_run_is_written_over_another(self, tiny, finished, tmp_path):
        """A kept copy of an early checkpoint goes on in a directory of its own."""
        run = shutil.copytree(finished["SGDG"][0], tmp_path / "run")
        early = shutil.copy(finished["SGD"][0] / "checkpoint.pt", run / "early.pt")
        before = contents(run)
        for words in ([], ["--save", run]):
            outcome = call("--resume", early, "--epochs", 3, *words)
            assert_one_sentence(outcome, 2, "already holds a run")
        assert call("--resume", early, "--epochs", 3, "--save", tmp_path / "branch").code == 0
        assert [stats["epoch"] for stats in log_lines(tmp_path / "branch")] == [1, 2, 3]
        assert contents(run) == before

    def test_what_cannot_go_on(self, finished, other, tmp_path):
        save = shutil.copytree(finished["SGD"][0], tmp_path / "run")
        before = contents(save)
        assert_one_sentence(call("--resume", save, "--dataroot", other, "--epochs", 3), 1, "other images")
        assert_one_sentence(call("--resume", save, "--epochs", 1), 2, "--epochs 1", r"\b2\b")
        assert {**contents(save), "lock": 0} == {**before, "lock": 0}
        for name in ("nowhere", "images"):  # the latter without a checkpoint
            assert_one_sentence(call("--resume", tmp_path / name), 1, name, "no checkpoint")

    def test_a_directory_is_itself_by_any_name(self, finished, tmp_path, monkeypatch):
        save = shutil.copytree(finished["SGD"][0], tmp_path / "run")
        monkeypatch.chdir(tmp_path)
        Path("link").symlink_to(save)
        for name in ("run", "./run/checkpoint.pt", "link"):
            assert call("--resume", name, "--save", save).code == 0


class TestOtherImages:
    """A checkpoint is evaluated on any images of the same classes."""

    def test_are_normalized_as_the_runs(self, finished, other):
        words = ["--resume", finished["SGD"][0], "--eval"]
        evaluated = [call(*words), call(*words, "--dataroot", other)]
        shutil.rmtree(other / "train")
        evaluated.append(call(*words, "--dataroot", other))
        note = "note: other images than the run's, normalized as the run's\n"
        assert [outcome.out.count(note) for outcome in evaluated] == [0, 1, 1]
        assert len({outcome.out[outcome.out.index("wrn-10-1 after") :] for outcome in evaluated}) == 1

    def test_classes_are_matched_by_name(self, finished, other, tmp_path):
        save, state = finished["SGD"][0], load(finished["SGD"][0])
        right = call("--resume", save, "--eval").out.splitlines()
        turned = {name: value.flip(0) for name, value in state["model"].items() if name.startswith("fc.")}
        new = {**state, "classes": state["classes"][::-1], "model": {**state["model"], **turned}}
        torch.save(new, tmp_path / "turned.pt")  # the same network, its outputs in another order
        out = call("--resume", tmp_path / "turned.pt", "--eval", "--dataroot", other).out.splitlines()
        assert out[-4:] == [right[-4], *right[:-4:-1]]
        for part in ("train", "test"):
            (other / part / "class1").rename(other / part / "dog")
        outcome = call("--resume", save, "--eval", "--dataroot", other)
        assert_one_sentence(outcome, 1, "differ in .*class1.*dog")

    def test_classes_of_an_older_checkpoint_are_matched_by_their_order(self, finished, other, tmp_path):
        save, state = finished["SGD"][0], load(finished["SGD"][0])
        torch.save({k: v for k, v in state.items() if k != "classes"}, tmp_path / "old.pt")
        assert "sync_bn" not in state["options"]  # an option newer than those runs
        out = call("--resume", tmp_path / "old.pt", "--eval", "--dataroot", other).out
        assert "matched by their order" in out
        assert out.splitlines()[-4:] == call("--resume", save, "--eval").out.splitlines()[-4:]

    def test_held_out_images_are_tested_on_but_by_choice_the_test_set(self, tiny, other, tmp_path):
        save, words = tmp_path / "run", ["--resume", tmp_path / "run", "--eval"]
        assert call(*tiny("SGD", save, "--holdout", 12, "--dataroot", other)).code == 0
        config = json.loads((save / "config.json").read_text())
        assert (config["data"]["train_images"], config["data"]["test_images"]) == (36, 12)
        assert "on 12 held-out training images of folder" in call(*words).out
        assert "on 18 test images of folder" in call(*words, "--holdout", 0).out
        other = other.rename(tmp_path / "moved")  # goes on with what was held out
        assert call("--resume", save, "--dataroot", other, "--epochs", 3).code == 0
        assert load(save)["options"]["holdout"] == 12
        shutil.rmtree(other / "train")
        other.rename(tmp_path / "others")
        assert "on 18 test images of folder" in call(*words, "--dataroot", tmp_path / "others").out


class TestSummary:
    @pytest.mark.parametrize(("flags", "parameters", "multiply_adds"), [
        (["--depth", 10, "--width", 1], 77_850, 12_501_632),
        (["--model", "vgg13", "--optim_method", "SGDG"], 9_935_434, 228_791_296),
    ])  # fmt: skip
    def test_counts_and_leaves_nothing(self, flags, parameters, multiply_adds, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        out = call("--summary", *flags).out
        assert f"in all: {parameters:,} parameters" in out
        assert f"multiply-adds of one image: {multiply_adds:,}" in out
        assert os.listdir() == []

    def test_measured_weights_are_on_g(self):
        words = ["--depth", 10, "--width", 10, "--optim_method", "SGDG", "--select", "measured"]
        out = call("--summary", *words).out
        found = re.findall(r"(\S*conv0)\.weight .* (grassmann.*)", out)
        expected = [("conv0", "grassmann"), ("group0.block0.conv0", "grassmann_overcomplete")]
        expected += [(f"group{group}.block0.conv0", "grassmann") for group in (1, 2)]
        assert sorted(found) == expected
        assert out.count("grassmann") == 4 + 2  # and the two totals
        assert max(map(len, out.splitlines())) <= 80

    def test_of_a_checkpoint_describes_its_weights(self, finished, monkeypatch):
        """Mean, deviation, shortest and longest row, and largest |cos| between two."""
        save, _ = finished["SGDG"]
        monkeypatch.setattr(main, "load_data", None)  # the images may be gone
        out = call("--summary", "--resume", save).out
        assert max(map(len, out.splitlines())) <= 80
        for name in ("group1.block0.convdim.weight", "fc.weight"):
            w = load(save)["model"][name].double().flatten(1)
            norms = w.norm(dim=1)
            cosines = (w @ w.T / norms[:, None] / norms).fill_diagonal_(0).abs()
            shown = re.search(rf"^{re.escape(name)} +((?:[-+\d.e]+ +){{5}})\w+$", out, re.M)[1]
            expected = w.mean(), w.std(correction=0), norms.min(), norms.max(), cosines.max()
            close = pytest.approx([*map(float, expected)], rel=0.06, abs=6e-4)
            assert [*map(float, shown.split())] == close
