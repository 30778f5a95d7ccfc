"""The table scripts: which runs they start, that they skip, continue and report, and that they stop when asked.

A sweep runs here in a copy of the scripts beside a stand-in for main.py that "trains" in no time: it appends a line
to log.txt for each epoch, as the real one does. The last test runs the real one, on a small archive of CIFAR-10.
"""

import os
import pty
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
from helpers import ROOT, write_archive

import main

TABLES = {"table1": "table1_cifar.sh", "table2": "table2_svhn.sh"}
SETTINGS = ("MODELS", "DATASETS", "METHODS", "SEEDS", "EPOCHS", "JOBS")

STAND_IN = """
import os, signal, sys, time
from pathlib import Path

flags = dict(zip(sys.argv[1:], sys.argv[2:]))
save = Path(flags["--save"])
save.mkdir(parents=True, exist_ok=True)
log = save / "log.txt"
done = len(log.read_text().splitlines()) if log.exists() else 0
with open("calls.txt", "a") as calls:
    gpu, threads = os.environ.get("CUDA_VISIBLE_DEVICES"), os.environ.get("OMP_NUM_THREADS")
    calls.write(f"{time.time()} {save} {done} {gpu} {threads} {sys.argv[-1]}\\n")
if Path("broken").exists() and Path("broken").read_text() in str(save):
    sys.exit("main.py: error: the disk is full")
asked = []
for number in (signal.SIGTERM, signal.SIGINT):
    signal.signal(number, lambda *_: asked.append(1))
if Path("slow").exists():
    (save / "started").touch()
    deadline = time.time() + 120
    while not asked and Path("slow").exists() and time.time() < deadline:
        time.sleep(0.01)
if asked:
    time.sleep(0.2)
    (save / "asked").write_text(str(len(asked)))
    sys.exit(143)
with log.open("a") as file:
    for epoch in range(done, int(flags["--epochs"])):
        file.write('json_stats: {"epoch": %d}\\n' % (epoch + 1))
(save / "checkpoint.pt").write_text("all that is needed")
"""


@pytest.fixture
def tree(tmp_path):
    """A copy of the scripts with the stand-in and without the setup; its path needs quotes."""
    root = tmp_path / "a tree & 'more'"
    (root / "scripts").mkdir(parents=True)
    for name in [*TABLES.values(), "sweep.sh", "smoke_all.sh"]:
        shutil.copy(ROOT / "scripts" / name, root / "scripts")
    setup = f"python={shlex.quote(sys.executable)}\ninstall_requirements() {{ echo setting up; }}\n"
    (root / "scripts" / "setup.sh").write_text(setup + 'fail() { echo "$1" >&2; exit 1; }\n')
    (root / "main.py").write_text(STAND_IN)
    return root


def environment(settings):
    """The tests' own environment with a sweep's settings, no GPU, and nothing of an outer sweep."""
    clean = {k: v for k, v in os.environ.items() if k not in (*SETTINGS, "OMP_NUM_THREADS")}
    return clean | {"CUDA_VISIBLE_DEVICES": ""} | {name: str(value) for name, value in settings.items()}


def sweep(root, table, *words, **settings):
    """A table script, called from another directory."""
    script = root / "scripts" / TABLES[table]
    command = ["bash", str(script), *words]
    return subprocess.run(
        command, env=environment(settings), cwd=root.parent, capture_output=True, text=True, timeout=60
    )


def printed(root, table, *words, **settings):
    """The lines of --print."""
    done = sweep(root, table, "--print", *words, **settings)
    assert done.returncode == 0, done
    return done.stdout.splitlines()


def parsed(line):
    """The options of a printed line, by the real main.py's parser."""
    words = shlex.split(line)
    assert words[0] == "cd"
    assert words[2] == "&&"
    assert words[4] == "main.py"
    return main.make_parser().parse_args(words[5:])


def calls(root):
    """What the stand-in was called with, in order: run directory, finished epochs, GPU, threads, last argument."""
    path = root / "calls.txt"
    rows = [line.split(" ") for line in path.read_text().splitlines()] if path.exists() else []
    return [SimpleNamespace(save=r[1], done=int(r[2]), gpu=r[3], threads=r[4], last=r[5]) for r in rows]


def epochs_of(root):
    """Finished epochs by run directory."""
    return {str(p.parent.relative_to(root)): len(p.read_text().splitlines()) for p in root.rglob("log.txt")}


SMALL = {"MODELS": "wrn-10-1 vgg-11", "METHODS": "SGDG AdamG", "SEEDS": "0", "EPOCHS": 2}


@pytest.mark.parametrize(("table", "count"), [("table1", 120), ("table2", 60)])
def test_all_cells_once_seed_by_seed(tree, table, count):
    options = [parsed(line) for line in printed(tree, table)]
    assert len(options) == len({o.save for o in options}) == count
    for o in options:
        full = main.fill_in({k: v for k, v in vars(o).items() if k not in main.PER_CALL})
        assert Path(o.save) == Path("logs", table, *main.default_save(full).parts[1:])
        assert o.resume == "auto"
        paper = main.paper_values(o.model, o.dataset, o.optim_method)
        assert (o.epochs, o.epoch_step) == (paper["epochs"], paper["epoch_step"])
    assert [o.seed for o in options] == sorted(o.seed for o in options)
    assert set(Counter(o.seed for o in options).values()) == {count // 5}


def test_narrowed(tree):
    names = {"MODELS": "vgg-16 wrn-10-1", "DATASETS": "CIFAR100", "METHODS": "AdamG", "SEEDS": "7 3"}
    saves = [parsed(line).save for line in printed(tree, "table1", **names)]
    assert saves == [
        f"logs/table1/CIFAR100/{model}/AdamG/seed{seed}" for seed in (7, 3) for model in ("vgg-16", "wrn-10-1")
    ]


@pytest.mark.parametrize(
    ("epochs", "cifar", "svhn"),
    [
        (1, [], []),
        (2, [1], [1]),
        (3, [1, 2], [1, 2]),
        (4, [1, 2, 3], [2, 3]),
        (10, [3, 6, 8], [4, 8]),
        (200, [60, 120, 160], [75, 150]),
    ],
)
def test_drops_at_the_protocols_fractions(tree, epochs, cifar, svhn):
    for table, expected in (("table1", cifar), ("table2", svhn)):
        options = [parsed(line) for line in printed(tree, table, EPOCHS=epochs, SEEDS=0)]
        assert {(o.epochs, tuple(o.epoch_step)) for o in options} == {(epochs, tuple(expected))}


@pytest.mark.parametrize(
    ("settings", "words", "said"),
    [
        ({"MODELS": "vgg-12"}, [], "vgg-12"),
        ({"MODELS": "wrn-11-1"}, [], "6n\\+4"),
        ({"MODELS": "wrn-4-1"}, [], "6n\\+4"),
        ({"MODELS": "*"}, [], "MODELS: \\* "),
        ({"MODELS": "vgg-13 vgg-13"}, [], "twice"),
        ({"DATASETS": "SVHN"}, [], "SVHN"),
        ({"METHODS": "Adam"}, [], "Adam "),
        ({"SEEDS": ""}, [], "SEEDS is empty"),
        ({"SEEDS": "0 -1"}, [], "-1"),
        ({"SEEDS": "01"}, [], "01"),
        ({"EPOCHS": 0}, [], "EPOCHS"),
        ({"EPOCHS": ""}, [], "EPOCHS"),
        ({"JOBS": "two"}, [], "JOBS"),
        ({"JOBS": 0}, [], "JOBS"),
        ({}, ["--prin"], "--prin "),
        ({}, ["--", "--seed", "3"], "--seed"),
        ({}, ["--", "--epochs=3"], "EPOCHS"),
        ({}, ["--", "--save", "x"], "--save"),
    ],
)
def test_a_mistake_is_one_sentence_and_starts_nothing(tree, settings, words, said):
    done = sweep(tree, "table1", *words, **settings)
    assert (done.returncode, done.stdout) == (2, "")
    assert re.fullmatch(r"table1_cifar\.sh: error: [^\n]+\n", done.stderr), done.stderr
    assert re.search(said, done.stderr), done.stderr
    assert not (tree / "logs").exists()


@pytest.mark.parametrize("script", [*TABLES.values(), "smoke_all.sh"])
def test_help(script):
    done = subprocess.run(["bash", ROOT / "scripts" / script, "--help"], capture_output=True, text=True, timeout=10)
    assert (done.returncode, done.stderr) == (0, "")
    assert f"bash scripts/{script}" in done.stdout
    assert "set -euo" not in done.stdout


def test_finished_runs_are_skipped_and_interrupted_ones_continued(tree):
    first = sweep(tree, "table1", **SMALL)
    assert first.returncode == 0, first
    assert "8 of 8 runs are finished, 0 failed" in first.stdout
    assert len(calls(tree)) == 8
    assert set(epochs_of(tree).values()) == {2}

    directory = tree / calls(tree)[3].save
    text = (directory / "log.txt").read_text()
    (directory / "log.txt").write_text(text.splitlines(keepends=True)[0])
    again = sweep(tree, "table1", **SMALL)
    assert again.returncode == 0
    assert [(c.save, c.done) for c in calls(tree)[8:]] == [(calls(tree)[3].save, 1)]
    assert set(epochs_of(tree).values()) == {2}


def test_a_failure_is_reported_while_the_others_go_on_and_tried_again(tree):
    (tree / "broken").write_text("vgg-11/SGDG")
    done = sweep(tree, "table1", **SMALL)
    assert done.returncode == 1
    failed = [line for line in done.stderr.splitlines() if line.startswith("failed")]
    assert failed == [
        f"failed with exit code 1: logs/table1/{dataset}/vgg-11/SGDG/seed0/output.txt: main.py: error: the disk is full"
        for dataset in ("CIFAR10", "CIFAR100")
    ]
    assert "6 of 8 runs are finished, 2 failed" in done.stdout
    assert len(calls(tree)) == 8

    (tree / "broken").unlink()
    way = re.search(r"to continue: (.*)", done.stdout)[1]
    done = subprocess.run(way, shell=True, env=environment({}), cwd=tree.parent, capture_output=True, timeout=60)
    assert done.returncode == 0
    assert len(calls(tree)) == 10
    output = tree / "logs/table1/CIFAR10/vgg-11/SGDG/seed0/output.txt"
    assert output.read_text() == "main.py: error: the disk is full\n"


def test_flags_after_two_dashes_reach_main_which_then_judges_finished_runs_too(tree):
    words = ["--", "--dataroot", "it's/a&b"]
    lines = printed(tree, "table1", *words, **SMALL)
    assert {parsed(line).dataroot for line in lines} == {"it's/a&b"}
    for count in (8, 16):
        assert sweep(tree, "table1", *words, **SMALL).returncode == 0
        assert len(calls(tree)) == count
    assert {call.last for call in calls(tree)} == {"it's/a&b"}


def test_printed_lines_run_in_parallel_and_again(tree):
    lines = "".join(f"{line}\n" for line in printed(tree, "table1", **SMALL))
    for count in (8, 16):
        command = ["xargs", "-P", "2", "-d", "\n", "-I", "{}", "bash", "-c", "{}"]
        subprocess.run(command, input=lines, text=True, cwd="/", check=True, timeout=60)
        assert len(calls(tree)) == count
        assert set(epochs_of(tree).values()) == {2}
    assert "8 of 8 runs are finished" in sweep(tree, "table1", **SMALL).stdout
    assert len(calls(tree)) == 16


def test_each_run_has_one_gpu_or_its_share_of_the_cores(tree):
    done = sweep(tree, "table2", SEEDS="0 1", EPOCHS=1, JOBS=3, CUDA_VISIBLE_DEVICES="4,6")
    assert done.returncode == 0
    assert len(calls(tree)) == len({call.save for call in calls(tree)}) == 24
    assert {call.gpu for call in calls(tree)} == {"4", "6"}

    cores = len(os.sched_getaffinity(0))
    assert sweep(tree, "table2", SEEDS="2", EPOCHS=1, JOBS=2).returncode == 0
    assert {call.threads for call in calls(tree)[24:]} == {str(max(1, cores // 2))}


def test_nvidia_smi_tells_the_gpus(tree, tmp_path):
    """Without CUDA_VISIBLE_DEVICES nvidia-smi is asked; MIG slices do not count; JOBS is the number of GPUs."""
    tool = tmp_path / "bin" / "nvidia-smi"
    tool.parent.mkdir()
    tool.write_text("#!/bin/sh\necho 'GPU 0: one (UUID: x)'\necho '  MIG 1g: y'\necho 'GPU 1: two (UUID: z)'\n")
    tool.chmod(0o755)
    settings = environment(SMALL | {"PATH": f"{tool.parent}:{os.environ['PATH']}"})
    del settings["CUDA_VISIBLE_DEVICES"]
    (tree / "slow").touch()
    process = subprocess.Popen(["bash", tree / "scripts/table1_cifar.sh"], env=settings, stdout=subprocess.DEVNULL)
    wait_for(lambda: len(list(tree.rglob("started"))) == 2)
    process.terminate()
    assert process.wait(timeout=60) == 143
    assert sorted(call.gpu for call in calls(tree)) == ["0", "1"]


def wait_for(condition):
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.parametrize("group", [False, True], ids=["the script alone", "the whole process group"])
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_asks_each_run_once_and_the_sweep_goes_on_later(tree, number, code, group):
    (tree / "slow").touch()
    process = subprocess.Popen(
        ["bash", str(tree / "scripts/table1_cifar.sh"), "--", "--dataroot", "a b"],
        env=environment(SMALL | {"JOBS": 2}),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    wait_for(lambda: len(list(tree.rglob("started"))) == 2)
    (os.killpg if group else os.kill)(process.pid, number)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == code
    assert [path.read_text() for path in tree.rglob("asked")] == ["1", "1"]
    assert len(calls(tree)) == 2  # nothing was started afterwards
    assert "0 of 8 runs are finished, 0 failed" in out

    (tree / "slow").unlink()
    way = re.search(r"to continue: (.*)", out)[1]
    done = subprocess.run(way, shell=True, env=environment({}), cwd=tree.parent, capture_output=True, timeout=60)
    assert done.returncode == 0, done
    assert set(epochs_of(tree).values()) == {2}
    assert len(epochs_of(tree)) == 8


def test_a_lost_terminal_asks_the_runs_too(tree):
    """As after a dropped connection: the sweep can say nothing any more."""
    (tree / "slow").touch()
    pid, terminal = pty.fork()
    if pid == 0:
        os.execvpe("bash", ["bash", str(tree / "scripts/table1_cifar.sh")], environment(SMALL | {"JOBS": 2}))
    wait_for(lambda: len(list(tree.rglob("started"))) == 2)
    os.close(terminal)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 129
    assert [path.read_text() for path in tree.rglob("asked")] == ["1", "1"]


def test_runs_that_nobody_started_are_reported(tree):
    """As when a cleaner removes what the workers share."""
    (tree / "slow").touch()
    command = ["bash", str(tree / "scripts" / TABLES["table1"])]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen(command, env=environment(SMALL), **pipes)
    wait_for(lambda: list(tree.rglob("started")))
    shutil.rmtree(next(tree.glob("logs/table1/.sweep.*")))
    (tree / "slow").unlink()
    out, err = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "1 of 8 runs are finished, 7 failed" in out
    assert err.count("not started") == 7
    again = sweep(tree, "table1", **SMALL)
    assert (again.returncode, len(epochs_of(tree))) == (0, 8)
    assert not list(tree.glob("logs/table1/.sweep.*"))


def test_a_run_that_fails_at_once_is_reported(tree):
    setup = "python=/bin/false\ninstall_requirements() { :; }\n"
    (tree / "scripts" / "setup.sh").write_text(setup)
    done = sweep(tree, "table1", JOBS=2)
    assert (done.returncode, done.stderr.count("failed with exit code 1")) == (1, 120)


def test_the_real_thing_is_killed_and_continued(tree, monkeypatch):
    """Lines of --print, and the sweep itself, with the real main.py on a small archive in CIFAR-10's format."""
    from torchvision.datasets import CIFAR10

    (tree / "data").mkdir()
    write_archive("CIFAR10", tree / "data", monkeypatch)
    checksums = {name: getattr(CIFAR10, name) for name in ("tgz_md5", "train_list", "test_list", "meta")}
    (tree / "main.py").write_text(f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
from torchvision.datasets import CIFAR10
for name, value in {checksums!r}.items():
    setattr(CIFAR10, name, value)
import main
sys.exit(main.main())
""")
    small = {"MODELS": "wrn-10-1", "DATASETS": "CIFAR10", "METHODS": "SGDG", "SEEDS": "0", "EPOCHS": 40}
    flags = ["--", "--batch_size", "4"]
    (line,) = printed(tree, "table1", *flags, **small)
    save = tree / "logs/table1/CIFAR10/wrn-10-1/SGDG/seed0"

    def start():
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        return subprocess.Popen(["bash", "-c", line.replace("&& ", "&& exec ")], env=environment({}), **pipes)

    first = start()
    wait_for(lambda: (save / "log.txt").exists() and (save / "log.txt").read_text())
    first.send_signal(signal.SIGSTOP)  # alive, but it does not get on
    refused = start()
    assert "is being written by process" in refused.communicate(timeout=60)[1]
    assert refused.returncode == 1
    first.send_signal(signal.SIGCONT)
    first.kill()
    first.communicate(timeout=60)
    assert 0 < epochs_of(tree)[str(save.relative_to(tree))] < 40

    second = start()
    wait_for(lambda: "epoch " in second.stdout.readline())
    second.terminate()
    assert "stopped by SIGTERM" in second.communicate(timeout=60)[0]
    done = sweep(tree, "table1", *flags, **small)
    assert "1 of 1 runs are finished, 0 failed" in done.stdout, done
    assert epochs_of(tree) == {str(save.relative_to(tree)): 40}

    os.utime(save / "checkpoint.pt", (0, 0))  # as a copy that does not keep times: it looks older than the log
    last = start()
    assert "nothing to do" in last.communicate(timeout=60)[0]
    assert "1 of 1 runs are finished; " in sweep(tree, "table1", **small).stdout

    (save / "checkpoint.pt").unlink()  # to free the disk: the log alone is enough
    last = start()
    assert "nothing to do" in last.communicate(timeout=60)[0]
    assert last.returncode == 0
    assert "1 of 1 runs are finished, 0 failed" in sweep(tree, "table1", *flags, **small).stdout


def test_smoke_all_runs_each_network_with_each_method_and_names_what_fails(tree, tmp_path):
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    for broken, code in (("vgg-13-SGDG", 1), ("nothing", 0)):
        (tree / "broken").write_text(broken)
        command = ["bash", tree / "scripts" / "smoke_all.sh"]
        settings = environment({"TMPDIR": scratch})
        done = subprocess.run(command, env=settings, capture_output=True, text=True, timeout=60)
        assert done.returncode == code, done
        lines = [line for line in done.stdout.splitlines() if line.startswith(("ok", "FAILED"))]
        cells = {(line.split()[1], line.split()[2]) for line in lines}
        networks = {parsed(line).save.split("/")[3] for table in TABLES for line in printed(tree, table)}
        assert cells == {(network, method) for network in networks for method in ("SGD", "SGDG", "AdamG")}
        failed = [line for line in lines if line.startswith("FAILED")]
        assert failed == ["FAILED  vgg-13 SGDG with exit code 1:"] * code
        assert ("the disk is full" in done.stdout) == (code == 1)
        assert not list(scratch.iterdir())
