"""The table scripts: which runs they start, that they skip, continue and report, and stop when asked.

A sweep runs here in a copy of the scripts beside a stand-in for main.py that "trains" in no time: it appends
a line to log.txt for each epoch, as the real one does. One test runs the real one.
"""

import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from types import SimpleNamespace

import pytest
import sweep
from helpers import ROOT, call
from sweep import SETTINGS, finished

SMALL = {"MODELS": "wrn-10-1 vgg-11", "METHODS": "SGDG AdamG", "SEEDS": "0", "EPOCHS": 2}

STAND_IN = r"""
import os, signal, sys, time
from pathlib import Path

flags = dict(zip(sys.argv, sys.argv[1:]))
save = Path(flags["--save"])
log = save / "log.txt"
done = len(log.read_text().splitlines()) if log.exists() else 0
with open("calls.txt", "a") as calls:
    gpu, threads = os.environ.get("CUDA_VISIBLE_DEVICES"), os.environ.get("OMP_NUM_THREADS")
    calls.write(f"{save} {done} {gpu} {threads} {sys.argv[-1]}\n")
if Path("broken").exists() and "CIFAR100/vgg-11/SGDG" in str(save):
    os.write(2, b"main.py: error: the disk \xff is full\n")
    sys.exit(1)
asked, parent = [], os.getppid()

def hear(number, _):
    asked.append((save / "heard").touch())
    signal.signal(number, signal.SIG_IGN)  # as one of several processes, or in the middle of a long call

if Path("slow").exists() and not Path("late").exists():
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, hear)
    (save / "started").touch()
    while (not asked or Path("deaf").exists()) and Path("slow").exists() and os.getppid() == parent:
        time.sleep(0.01)
if asked:
    time.sleep(0.2)  # a second request, which must not come, would come now
    (save / "asked").write_text(str(len(asked)))
    sys.exit(143)
with log.open("a") as file:
    for epoch in range(done, int(flags["--epochs"])):
        file.write('json_stats: {"epoch": %d}\n' % (epoch + 1))
(save / "checkpoint.pt").write_text("all that is needed")
"""


@pytest.fixture
def tree(tmp_path):
    """A copy of the scripts with the stand-in and without the setup; its path needs quotes."""
    root = tmp_path / "a tree & 'more'"
    shutil.copytree(ROOT / "scripts", root / "scripts")
    setup = f"python={shlex.quote(sys.executable)}\ninstall_requirements() {{ :; }}\n"
    (root / "scripts" / "setup.sh").write_text(setup)
    (root / "main.py").write_text(STAND_IN)
    return root


@pytest.fixture
def start(tree):
    """start(*words, **settings): a table, without a GPU, in the background; killed at the end of the test."""
    started = []

    def begin(*words, table="table1_cifar.sh", hup=signal.SIG_DFL, **settings):
        def inherit():
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            signal.signal(signal.SIGHUP, hup)

        outer = {k: v for k, v in os.environ.items() if k not in (*SETTINGS, "OMP_NUM_THREADS")}
        given = {name: str(value) for name, value in {"CUDA_VISIBLE_DEVICES": "", **settings}.items()}
        how = {"env": outer | given, "process_group": 0, "preexec_fn": inherit, "cwd": tree.parent}
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        started.append(subprocess.Popen(["bash", tree / "scripts" / table, *words], **pipes, **how))
        return started[-1]

    yield begin
    for process in started:
        process.kill()
        process.communicate()


@pytest.fixture
def run_table(start):
    """run_table(*words, **settings): what the table printed on both streams, and its exit code."""

    def run(*words, **settings):
        process = start(*words, **settings)
        return *process.communicate(), process.returncode

    return run


@pytest.fixture
def printed(run_table):
    """printed(*words, **settings): the lines of --print, and the options of each by name."""

    def lines_of(*words, **settings):
        out, err, code = run_table("--print", *words, **settings)
        assert (code, err) == (0, "")
        rows = [shlex.split(line) for line in out.splitlines()]
        assert {(row[0], row[2], row[4]) for row in rows} == {("cd", "&&", "main.py")}
        options = [{k[2:]: v for k, v in zip(row[5::2], row[6::2], strict=True)} for row in rows]
        return out.splitlines(), [SimpleNamespace(**o) for o in options]

    return lines_of


def go_on(tree, out):
    """Do what a sweep printed as the way to continue, from elsewhere: all runs get finished."""
    subprocess.run(["bash", "-c", re.search(r"to continue: (.*)", out)[1]], cwd=tree.parent, check=True)
    assert epochs_of(tree) == [2] * 8


def calls(root):
    """What the stand-in was called with: directory, finished epochs, GPU, threads, last argument."""
    path = root / "calls.txt"
    return [line.split(" ") for line in path.read_text().splitlines()] if path.exists() else []


def epochs_of(root):
    """The finished epochs of each run."""
    return [len(path.read_text().splitlines()) for path in root.rglob("log.txt")]


def wait_for_runs(tree, process, count, what="started"):
    while len(list(tree.rglob(what))) < count and process.poll() is None:
        time.sleep(0.02)


@pytest.mark.parametrize(("table", "count", "epochs", "drops"), [
    ("table1_cifar.sh", 120, "200", "[60,120,160]"), ("table2_svhn.sh", 60, "160", "[60,120]")
])  # fmt: skip
def test_all_cells_once_seed_by_seed(printed, table, count, epochs, drops):
    _, options = printed(table=table)
    assert len(options) == len({o.save for o in options}) == count
    for o in options:
        network = f"wrn-{o.depth}-{o.width}" if o.model == "resnet" else f"vgg-{o.model[3:]}"
        assert o.save == f"logs/{table[:6]}/{o.dataset}/{network}/{o.optim_method}/seed{o.seed}"
        assert (o.resume, o.epochs, o.epoch_step) == ("auto", epochs, drops)
    assert [o.seed for o in options] == sorted(o.seed for o in options)
    assert set(Counter(o.seed for o in options).values()) == {count // 5}


MISTAKES = {
    "MODELS": ["vgg-12", "*", "wrn-28", ""], "DATASETS": ["SVHN", "../CIFAR10"], "METHODS": ["Adam"],
    "SEEDS": ["", "0 -1", "01"], "EPOCHS": ["0", "1 2"], "JOBS": ["0"], "": ["--prin"],
    "--": ["--model", "--depth", "--width", "--dataset", "--optim_method", "--seed", "--epochs", "--save",
           "--epoch_step", "--resume", "--seed=3"],
}  # fmt: skip


@pytest.mark.parametrize(("name", "value"), [(name, v) for name, values in MISTAKES.items() for v in values])
def test_a_mistake_is_one_sentence_and_starts_nothing(tmp_path, monkeypatch, capfd, name, value):
    monkeypatch.chdir(tmp_path)
    if name in SETTINGS:
        monkeypatch.setenv(name, value)
    words = [] if name in SETTINGS else ["--", "--dropout", "0", value, "3"] if name else [value]
    assert sweep.main("table1_x.sh", "vgg-13", "CIFAR10 CIFAR100", "200", "0.3", *words) == 2
    out, err = capfd.readouterr()
    assert out == ""
    assert re.fullmatch(r"table1_x\.sh: error: [^\n]+\n", err)
    assert (f"{name}={value!r} " if name in SETTINGS else f"{value} ") in err
    assert not list(tmp_path.iterdir())


def test_finished_is_a_log_of_all_epochs_and_no_older_checkpoint(tmp_path):
    assert not finished(tmp_path / "none", 2)
    log, checkpoint = tmp_path / "log.txt", tmp_path / "checkpoint.pt"
    for lines, age, answer in [
        (2, None, True),  # the checkpoint was deleted to free the disk
        (1, 1, False),
        (2, 1, True),
        (3, 1, False),  # of a longer run: main.py has to judge that
        (2, 0, True),
        (2, -0.001, False),  # a kill fell between the last line and the last checkpoint
    ]:
        log.write_text('json_stats: {"epoch": 1}\n' * lines)
        os.utime(log, (1000, 1000))
        if age is not None:
            checkpoint.touch()
            os.utime(checkpoint, (1000 + age, 1000 + age))
        assert finished(tmp_path, 2) is answer, (lines, age)


def test_what_is_finished_is_skipped_what_was_interrupted_goes_on_and_flags_let_main_judge(tree, run_table):
    out, err, code = run_table(**SMALL)
    assert (err, code) == ("", 0)
    assert "8 of 8 runs are finished, 0 failed" in out
    assert "to continue" not in out
    assert epochs_of(tree) == [2] * 8
    interrupted = calls(tree)[3][0]
    log = tree / interrupted / "log.txt"
    log.write_text(log.read_text().splitlines(keepends=True)[0])
    assert run_table(**SMALL)[2] == 0
    assert [c[:2] for c in calls(tree)[8:]] == [[interrupted, "1"]]
    assert epochs_of(tree) == [2] * 8
    assert run_table("--", "--dataroot", "it's/a&b", **SMALL)[2] == 0
    assert [c[4] for c in calls(tree)[9:]] == ["it's/a&b"] * 8


def test_a_failure_is_reported_while_the_others_go_on_and_tried_again(tree, run_table):
    (tree / "broken").touch()
    (tree / "logs/table1/CIFAR10").mkdir(parents=True)
    (tree / "logs/table1/CIFAR10/wrn-10-1").touch()  # where directories of runs should be
    out, err, code = run_table(**SMALL)
    cell, broken = "logs/table1/CIFAR10/wrn-10-1", "logs/table1/CIFAR100/vgg-11/SGDG/seed0"
    assert (code, err.splitlines()) == (1, [
        *(f"failed: [Errno 20] Not a directory: '{cell}/{method}/seed0'" for method in ("SGDG", "AdamG")),
        f"failed with exit code 1: {broken}/output.txt: main.py: error: the disk \ufffd is full",
    ])  # fmt: skip
    assert f"{broken} {err.splitlines()[2]}\n" in out
    assert "5 of 8 runs are finished, 3 failed" in out
    (tree / "broken").unlink()
    (tree / cell).unlink()
    go_on(tree, out)
    assert len(calls(tree)) == 9
    output = (tree / broken / "output.txt").read_bytes()
    assert output == b"main.py: error: the disk \xff is full\n"  # and what came then


def test_a_narrowed_table_is_printed_as_commands_for_any_place(tree, printed):
    names = {"MODELS": "vgg-16 wrn-10-1 vgg-16", "DATASETS": "digits", "METHODS": "AdamG", "SEEDS": "7 3"}
    lines, options = printed("--", "--dataroot", "it's/a&b", EPOCHS=5, **names)
    assert {o.epoch_step for o in options} == {"[2,3,4]"}  # halves up
    places = [f"logs/table1/digits/{m}/AdamG/seed{seed}" for seed in (7, 3) for m in ("vgg-16", "wrn-10-1")]
    assert [(o.save, o.dataroot) for o in options] == [(place, "it's/a&b") for place in places]
    (tree / places[0]).mkdir(parents=True)
    subprocess.run(["bash", "-c", lines[0]], cwd=tree.parent, check=True)
    assert [(c[0], c[4]) for c in calls(tree)] == [(places[0], "it's/a&b")]


@pytest.mark.parametrize(("visible", "gpus"), [
    ("4,6", ["4", "6"]), ("3,-1,5", ["3"]), ("GPU-5f,MIG-2", ["GPU-5f", "MIG-2"]), (None, ["0", "1"]),
    ("", []), ("NoDevFiles", []),  # the last is Slurm's
])  # fmt: skip
def test_the_gpus_are_those_that_cuda_sees(tmp_path, monkeypatch, visible, gpus):
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\nprintf 'GPU 0: one (UUID: x)\\n  MIG 1g: y\\nGPU 1: two (UUID: z)\\n'\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible or "")
    if visible is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert sweep.visible_gpus() == gpus


def test_runs_take_the_gpus_by_turns(tree, start):
    (tree / "slow").touch()
    process = start(**SMALL, JOBS=3, CUDA_VISIBLE_DEVICES="4,6")
    wait_for_runs(tree, process, 3)
    assert sorted(c[2] for c in calls(tree)) == ["4", "4", "6"]
    (tree / "slow").unlink()
    out, _ = process.communicate()
    assert "; 3 at once, on 2 GPUs" in out
    assert len(calls(tree)) == len({c[0] for c in calls(tree)}) == 8
    assert {c[3] for c in calls(tree)} == {"None"}


def test_runs_without_a_gpu_share_the_cores(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setenv("JOBS", "3")
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)))
    monkeypatch.setattr(sweep.Runs, "run_all", lambda runs: [])
    sweep.main("table1_x.sh", "vgg-13", "CIFAR10", "200", "0.3")
    assert os.environ.pop("OMP_NUM_THREADS") == "2"


@pytest.mark.parametrize(("number", "kill", "hup"), [
    (signal.SIGINT, os.killpg, signal.SIG_DFL),  # as a terminal sends it
    (signal.SIGTERM, os.kill, signal.SIG_IGN),  # under nohup
])  # fmt: skip
def test_a_signal_asks_each_run_once_and_the_sweep_goes_on_later(tree, start, number, kill, hup):
    """A terminal that is lost may send SIGHUP after another signal, or twice, and takes no more words."""
    (tree / "slow").touch()
    (tree / "deaf").touch()  # the checkpoints take until it is gone
    process = start("--", "--dataroot", "a b", **SMALL, JOBS=2, hup=hup)
    wait_for_runs(tree, process, 2)
    (tree / "late").touch()  # what were started now would end at once
    process.stderr.close()
    if hup == signal.SIG_IGN:
        process.send_signal(signal.SIGHUP)
    kill(process.pid, number)
    wait_for_runs(tree, process, 2, "heard")
    process.send_signal(signal.SIGHUP)
    (tree / "deaf").unlink()
    out, _ = process.communicate()
    assert process.returncode == 128 + number
    assert [path.read_text() for path in tree.rglob("asked")] == ["1", "1"]
    assert len(calls(tree)) == 2  # nothing was started afterwards
    assert "0 of 8 runs are finished, 0 failed" in out

    (tree / "slow").unlink()
    go_on(tree, out)


def test_a_second_signal_ends_the_runs_at_once(tree, start):
    (tree / "slow").touch()
    (tree / "deaf").touch()
    process = start(**SMALL, JOBS=2)
    wait_for_runs(tree, process, 2)
    process.terminate()
    assert "waiting for the runs' checkpoints" in process.stderr.readline()
    wait_for_runs(tree, process, 2, "heard")
    process.terminate()
    assert process.wait(10) == 143
    assert not list(tree.rglob("asked"))


def test_the_real_thing_leaves_what_a_sweep_looks_for(tree, printed, images_root, monkeypatch):
    """A copy that does not keep times makes a checkpoint look older than its log: main.py then judges it."""
    cell = {"MODELS": "wrn-10-1", "DATASETS": "folder", "METHODS": "SGDG", "SEEDS": "0", "EPOCHS": 1}
    words = ["--", "--dataroot", images_root, "--batch_size", "16"]
    (line,), _ = printed(*words, **cell)
    monkeypatch.chdir(tree)
    save = tree / "logs/table1/folder/wrn-10-1/SGDG/seed0"
    for _ in range(2):
        assert call(*shlex.split(line)[5:]).code == 0
        assert finished(save, 1)
        os.utime(save / "checkpoint.pt", (0, 0))
        assert not finished(save, 1)
