"""The table scripts: which runs they start, that they skip, continue and report, and stop when asked.

A sweep runs here in a copy of the scripts beside a stand-in for main.py that "trains" in no time: it appends
a line to log.txt for each epoch, as the real one does. One test runs the real one, on a small archive of
CIFAR-10. Nothing here has a deadline: what never comes is ended by pytest's time-out.
"""

import fcntl
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
from types import SimpleNamespace

import pytest
from helpers import ROOT, call, write_archive
from sweep import finished

import options
from utils import lock_directory

TABLES = {"table1": "table1_cifar.sh", "table2": "table2_svhn.sh"}
SETTINGS = ("MODELS", "DATASETS", "METHODS", "SEEDS", "EPOCHS", "JOBS")
SMALL = {"MODELS": "wrn-10-1 vgg-11", "METHODS": "SGDG AdamG", "SEEDS": "0", "EPOCHS": 2}

STAND_IN = """
import os, signal, sys, time
from pathlib import Path

def main(argv):
    flags = dict(zip(argv, argv[1:]))
    save = Path(flags["--save"])
    save.mkdir(parents=True, exist_ok=True)
    log = save / "log.txt"
    done = len(log.read_text().splitlines()) if log.exists() else 0
    with open("calls.txt", "a") as calls:
        gpu, threads = os.environ.get("CUDA_VISIBLE_DEVICES"), os.environ.get("OMP_NUM_THREADS")
        calls.write(f"{save} {done} {gpu} {threads} {argv[-1]}\\n")
    if Path("broken").exists() and Path("broken").read_text() in str(save):
        print("main.py: error: the disk is full", file=sys.stderr)
        if "CIFAR100" in str(save):
            os.kill(os.getpid(), signal.SIGKILL)
        return 1
    asked, parent = [], os.getppid()
    if Path("slow").exists() and not Path("late").exists():
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, lambda *_: asked.append((save / "heard").touch()))
        (save / "started").touch()
        while (not asked or Path("deaf").exists()) and Path("slow").exists() and os.getppid() == parent:
            time.sleep(0.01)
    if asked:
        time.sleep(0.2)  # a second request, which must not come, would come now
        (save / "asked").write_text(str(len(asked)))
        return 143
    with log.open("a") as file:
        for epoch in range(done, int(flags["--epochs"])):
            file.write('json_stats: {"epoch": %d}\\n' % (epoch + 1))
    (save / "checkpoint.pt").write_text("all that is needed")
    return 0

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
"""


@pytest.fixture
def tree(tmp_path):
    """A copy of the scripts with the stand-in and without the setup; its path needs quotes."""
    root = tmp_path / "a tree & 'more'"
    shutil.copytree(ROOT / "scripts", root / "scripts")
    setup = f"python={shlex.quote(sys.executable)}\ninstall_requirements() {{ echo setting up >&2; }}\n"
    (root / "scripts" / "setup.sh").write_text(setup + 'fail() { echo "$1" >&2; exit 1; }\n')
    (root / "main.py").write_text(STAND_IN)
    return root


def environment(settings):
    """The tests' own with a sweep's settings (None: not set), no GPU, and nothing of an outer sweep."""
    given = {"CUDA_VISIBLE_DEVICES": "", **settings}
    clean = {k: v for k, v in os.environ.items() if k not in (*SETTINGS, *given, "OMP_NUM_THREADS")}
    return clean | {name: str(value) for name, value in given.items() if value is not None}


def run(command, root, settings=None):
    """A command, from another directory than the repository's root."""
    where = {"env": environment(settings or {}), "cwd": root.parent}
    return subprocess.run(command, **where, capture_output=True, text=True)


def sweep(root, table, *words, **settings):
    return run(["bash", root / "scripts" / TABLES[table], *words], root, settings)


@pytest.fixture
def start(tree):
    """start(*words, **settings): table 1 in the background; killed at the end of the test."""
    started = []

    def begin(*words, before=lambda: None, **settings):
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        how = {"env": environment(settings), "process_group": 0, "preexec_fn": before}
        script = tree / "scripts" / "table1_cifar.sh"
        started.append(subprocess.Popen(["bash", script, *words], **pipes, **how))
        return started[-1]

    yield begin
    for process in started:
        process.kill()
        process.communicate()


def again(out, root):
    """What a sweep printed as the way to continue."""
    return run(["bash", "-c", re.search(r"to continue: (.*)", out)[1]], root)


def printed(root, table, *words, **settings):
    """The lines of --print."""
    done = sweep(root, table, "--print", *words, **settings)
    assert done.returncode == 0, done
    return done.stdout.splitlines()


def parsed(line):
    """The options of a printed line, by the real main.py's parser."""
    words = shlex.split(line)
    assert (words[0], words[2], words[4]) == ("cd", "&&", "main.py")
    return options.make_parser().parse_args(words[5:])


def calls(root):
    """What the stand-in was called with: directory, finished epochs, GPU, threads, last argument."""
    path = root / "calls.txt"
    rows = [line.split(" ") for line in path.read_text().splitlines()] if path.exists() else []
    return [SimpleNamespace(save=r[0], done=int(r[1]), gpu=r[2], threads=r[3], last=r[4]) for r in rows]


def epochs_of(root):
    """Finished epochs by run directory."""
    return {str(p.parent.relative_to(root)): len(p.read_text().splitlines()) for p in root.rglob("log.txt")}


def wait_for_runs(tree, count, what="started"):
    while len(list(tree.rglob(what))) < count:
        time.sleep(0.02)


@pytest.mark.parametrize(("table", "count"), [("table1", 120), ("table2", 60)])
def test_all_cells_once_seed_by_seed(tree, table, count):
    options = [parsed(line) for line in printed(tree, table)]
    assert len(options) == len({o.save for o in options}) == count
    for o in options:
        network = f"wrn-{o.depth}-{o.width}" if o.model == "resnet" else f"vgg-{o.model[3:]}"
        assert o.save == f"logs/{table}/{o.dataset}/{network}/{o.optim_method}/seed{o.seed}"
        assert o.resume == "auto"
        schedule = (160, [60, 120]) if table == "table2" else (200, [60, 120, 160])
        assert (o.epochs, o.epoch_step) == schedule
    assert [o.seed for o in options] == sorted(o.seed for o in options)
    assert set(Counter(o.seed for o in options).values()) == {count // 5}


def test_narrowed(tree):
    models = ("vgg-16", "wrn-10-1")
    names = {"MODELS": "vgg-16 wrn-10-1 vgg-16", "DATASETS": "CIFAR100", "METHODS": "AdamG", "SEEDS": "7 3"}
    saves = [parsed(line).save for line in printed(tree, "table1", **names)]
    assert saves == [f"logs/table1/CIFAR100/{m}/AdamG/seed{seed}" for seed in (7, 3) for m in models]


@pytest.mark.parametrize(
    ("epochs", "cifar", "svhn"),
    [(1, [], []), (2, [1], [1]), (4, [1, 2, 3], [2, 3]), (5, [2, 3, 4], [2, 4]), (10, [3, 6, 8], [4, 8])],
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
        ({"MODELS": "*"}, [], "MODELS='\\*' "),
        ({"DATASETS": "SVHN"}, [], "SVHN"),
        ({"METHODS": "Adam"}, [], "Adam"),
        ({"SEEDS": ""}, [], "SEEDS='' "),
        ({"SEEDS": "0 -1"}, [], "-1"),
        ({"EPOCHS": 0}, [], "EPOCHS"),
        ({"EPOCHS": "1 2"}, [], "EPOCHS"),
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
    assert re.fullmatch(r"setting up\ntable1_cifar\.sh: error: [^\n]+\n", done.stderr), done.stderr
    assert re.search(said, done.stderr), done.stderr
    assert not (tree / "logs").exists()


@pytest.mark.parametrize("script", [*TABLES.values(), "smoke_all.sh", "quickstart.sh", "test.sh"])
def test_help_says_what_a_script_does_and_does_nothing(script, tmp_path):
    """In a copy with an environment that cannot be used: what came after the help would fail."""
    shutil.copytree(ROOT / "scripts", tmp_path / "scripts")
    kept = tmp_path / "logs/quickstart/SGD/log.txt"
    kept.parent.mkdir(parents=True)
    kept.touch()
    for words in (["--help"], ["-h"], ["--all", "--print", "--help"]):
        done = run(
            ["bash", tmp_path / "scripts" / script, *words], tmp_path, {"VIRTUAL_ENV": tmp_path / "none"}
        )
        assert (done.returncode, done.stderr) == (0, "")
        assert f"bash scripts/{script}" in done.stdout
        assert "set -euo" not in done.stdout
    assert kept.exists()


def test_a_second_quick_start_leaves_the_first_alone(tree):
    kept = tree / "logs/quickstart/SGD/log.txt"
    kept.parent.mkdir(parents=True)
    kept.touch()
    with (tree / "logs/quickstart/lock").open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        done = run(["bash", tree / "scripts/quickstart.sh"], tree)
    assert done.returncode == 1
    assert re.fullmatch(r"setting up\nquickstart\.sh: error: cannot lock [^\n]+\n", done.stderr)
    assert kept.exists()


def write_run(directory, lines, *, checkpoint):
    """A run's log of so many epochs and, unless None, its checkpoint, written so many seconds after it."""
    directory.mkdir(exist_ok=True)
    log = directory / "log.txt"
    log.write_text('json_stats: {"epoch": 1}\n' * lines)
    os.utime(log, (1000, 1000))
    if checkpoint is not None:
        (directory / "checkpoint.pt").touch()
        os.utime(directory / "checkpoint.pt", (1000 + checkpoint, 1000 + checkpoint))


def test_finished_is_a_log_of_all_epochs_and_no_older_checkpoint(tmp_path):
    assert not finished(tmp_path / "none", 2)
    for lines, checkpoint, answer in [
        (1, 1, False),
        (2, 1, True),
        (3, 1, False),  # of a longer run: main.py has to judge that
        (2, 0, True),
        (2, -0.001, False),  # a kill fell between the last line and the last checkpoint
    ]:
        write_run(tmp_path / "run", lines, checkpoint=checkpoint)
        assert finished(tmp_path / "run", 2) is answer, (lines, checkpoint)
    write_run(tmp_path / "bare", 2, checkpoint=None)  # the checkpoint was deleted to free the disk
    assert finished(tmp_path / "bare", 2)
    (tmp_path / "bare" / "log.txt").write_text('json_stats: {"epoch": 1}\njson_stats: {"ep')
    assert not finished(tmp_path / "bare", 2)


def test_finished_runs_are_skipped_and_interrupted_ones_continued(tree):
    first = sweep(tree, "table1", **SMALL)
    assert first.returncode == 0, first
    assert "8 of 8 runs are finished, 0 failed" in first.stdout
    assert "to continue" not in first.stdout
    assert len(calls(tree)) == 8
    assert set(epochs_of(tree).values()) == {2}

    log = tree / calls(tree)[3].save / "log.txt"
    log.write_text(log.read_text().splitlines(keepends=True)[0])
    assert sweep(tree, "table1", **SMALL).returncode == 0
    assert [(c.save, c.done) for c in calls(tree)[8:]] == [(calls(tree)[3].save, 1)]
    assert set(epochs_of(tree).values()) == {2}


def test_a_failure_is_reported_while_the_others_go_on_and_tried_again(tree):
    (tree / "broken").write_text("vgg-11/SGDG")
    (tree / "logs/table1/CIFAR10").mkdir(parents=True)
    (tree / "logs/table1/CIFAR10/wrn-10-1").touch()  # where directories of runs should be
    done = sweep(tree, "table1", **SMALL)
    assert done.returncode == 1
    failed = re.findall(
        r"^failed with exit code (\d+): logs/table1/(.*)/seed0/output.txt: (.*)$", done.stderr, re.M
    )
    assert [(code, cell) for code, cell, _ in failed] == [
        ("1", "CIFAR10/wrn-10-1/SGDG"),
        ("1", "CIFAR10/wrn-10-1/AdamG"),
        ("1", "CIFAR10/vgg-11/SGDG"),
        ("137", "CIFAR100/vgg-11/SGDG"),  # 128 + SIGKILL
    ]
    assert failed[3][2] == "main.py: error: the disk is full"
    assert "4 of 8 runs are finished, 4 failed" in done.stdout
    assert len(calls(tree)) == 6

    (tree / "broken").unlink()
    (tree / "logs/table1/CIFAR10/wrn-10-1").unlink()
    assert again(done.stdout, tree).returncode == 0
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


def test_printed_lines_run_in_parallel(tree):
    lines = "".join(f"{line}\n" for line in printed(tree, "table1", **SMALL))
    command = ["xargs", "-P", "2", "-d", "\n", "-I", "{}", "bash", "-c", "{}"]
    subprocess.run(command, input=lines, text=True, cwd="/", check=True)
    assert "8 of 8 runs are finished; " in sweep(tree, "table1", **SMALL).stdout
    assert len(calls(tree)) == 8


@pytest.mark.parametrize(
    ("visible", "gpus"), [("4,6", ["4", "6"]), ("3,-1,5", ["3"]), (None, ["0", "1"]), ("-1", []), ("", [])]
)
def test_runs_take_the_gpus_by_turns_or_share_the_cores(tree, start, tmp_path, visible, gpus):
    """-1 hides what follows it, as in CUDA; without the variable nvidia-smi is asked (no MIG slices)."""
    tool = tmp_path / "bin" / "nvidia-smi"
    tool.parent.mkdir()
    tool.write_text(
        "#!/bin/sh\necho 'GPU 0: one (UUID: x)'\necho '  MIG 1g: y'\necho 'GPU 1: two (UUID: z)'\n"
    )
    tool.chmod(0o755)
    jobs = len(gpus) or 2
    settings = {"JOBS": None if gpus else jobs, "PATH": f"{tool.parent}:{os.environ['PATH']}"}
    (tree / "slow").touch()
    process = start(**SMALL, **settings, CUDA_VISIBLE_DEVICES=visible)
    wait_for_runs(tree, jobs)
    (tree / "slow").unlink()
    assert f"; {jobs} at once, on {len(gpus)} GPUs" in process.communicate()[0]
    assert len(calls(tree)) == len({call.save for call in calls(tree)}) == 8
    assert {call.gpu for call in calls(tree)} == (set(gpus) or {visible})
    share = max(1, len(os.sched_getaffinity(0)) // 2)
    assert {call.threads for call in calls(tree)} == {"None" if gpus else str(share)}


@pytest.mark.parametrize("group", [False, True], ids=["the script alone", "the whole process group"])
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_asks_each_run_once_and_the_sweep_goes_on_later(tree, start, number, code, group):
    (tree / "slow").touch()
    heard = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)  # noqa: E731
    process = start("--", "--dataroot", "a b", before=heard, **SMALL, JOBS=2)
    wait_for_runs(tree, 2)
    (tree / "late").touch()  # what were started now would end at once
    (os.killpg if group else os.kill)(process.pid, number)
    out, _ = process.communicate()
    assert process.returncode == code
    assert [path.read_text() for path in tree.rglob("asked")] == ["1", "1"]
    assert len(calls(tree)) == 2  # nothing was started afterwards
    assert "0 of 8 runs are finished, 0 failed" in out

    (tree / "slow").unlink()
    assert again(out, tree).returncode == 0
    assert set(epochs_of(tree).values()) == {2}
    assert len(epochs_of(tree)) == 8


def test_a_second_signal_ends_the_runs_at_once(tree, start):
    (tree / "slow").touch()
    (tree / "deaf").touch()  # they answer the first with a checkpoint that takes for ever
    process = start(**SMALL, JOBS=2)
    wait_for_runs(tree, 2)
    process.terminate()
    assert "SIGTERM: waiting" in process.stderr.readline() + process.stderr.readline()  # after `setting up`
    process.terminate()
    process.communicate()
    assert process.returncode == 143
    assert not list(tree.rglob("asked"))


def test_nohup_keeps_a_sweep_going(tree, start):
    (tree / "slow").touch()
    process = start(before=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN), **SMALL)
    wait_for_runs(tree, 1)
    process.send_signal(signal.SIGHUP)
    (tree / "slow").unlink()
    assert "8 of 8 runs are finished, 0 failed" in process.communicate()[0]


def test_a_lost_terminal_asks_the_runs_once_too(tree):
    """As after a dropped connection: the sweep can say nothing any more; SIGHUP may come twice."""
    (tree / "slow").touch()
    (tree / "deaf").touch()
    pid, terminal = pty.fork()
    if pid == 0:
        signal.signal(signal.SIGHUP, signal.SIG_DFL)  # these tests themselves may run under nohup
        command = ["bash", str(tree / "scripts/table1_cifar.sh")]
        os.execvpe("bash", command, environment(SMALL | {"JOBS": 2}))
    wait_for_runs(tree, 2)
    os.close(terminal)
    wait_for_runs(tree, 2, "heard")
    os.kill(pid, signal.SIGHUP)
    (tree / "deaf").unlink()
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 129
    assert [path.read_text() for path in tree.rglob("asked")] == ["1", "1"]


def test_a_directory_that_vanishes_is_one_failure(tree, start):
    """As when a cleaner, or the disk's owner, removes what a run writes to."""
    (tree / "slow").touch()
    process = start(**SMALL)
    wait_for_runs(tree, 1)
    shutil.rmtree(tree / "logs")
    (tree / "slow").unlink()
    out, err = process.communicate()
    assert process.returncode == 1
    assert "7 of 8 runs are finished, 1 failed" in out
    assert err.count("failed with exit code 1") == 1


def test_the_real_thing_is_refused_killed_and_continued(tree, monkeypatch):
    """The real main.py, on a small archive of CIFAR-10: what a run leaves is what a sweep looks for."""
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
    monkeypatch.chdir(tree)
    cell = {"MODELS": "wrn-10-1", "DATASETS": "CIFAR10", "METHODS": "SGDG", "SEEDS": "0"}
    flags = ["--", "--batch_size", "4"]
    save = tree / "logs/table1/CIFAR10/wrn-10-1/SGDG/seed0"

    def epochs(number):  # of the printed command, in this process
        (line,) = printed(tree, "table1", *flags, **cell, EPOCHS=number)
        return call(*shlex.split(line)[5:], "--epoch_step", "[1]")

    assert epochs(1).code == 0
    shutil.copy2(save / "checkpoint.pt", tree / "first.pt")
    assert epochs(2).code == 0
    assert finished(save, 2)
    shutil.copy2(
        tree / "first.pt", save / "checkpoint.pt"
    )  # killed after the last line, before the checkpoint
    assert not finished(save, 2)
    with lock_directory(save):  # another sweep has got there first
        done = sweep(tree, "table1", *flags, **cell, EPOCHS=2)
        assert (done.returncode, "is being written by process" in done.stderr) == (1, True)
    assert "1 of 1 runs are finished, 0 failed" in sweep(tree, "table1", *flags, **cell, EPOCHS=2).stdout
    assert finished(save, 2)

    os.utime(
        save / "checkpoint.pt", (0, 0)
    )  # as a copy that does not keep times: it looks older than the log
    assert "nothing to do" in epochs(2).out
    assert finished(save, 2)


def test_smoke_all_runs_each_network_with_each_method_and_names_what_fails(tree, tmp_path):
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    networks = {parsed(line).save.split("/")[3] for table in TABLES for line in printed(tree, table)}
    for broken, code in (("vgg-13/SGDG", 1), ("nothing", 0)):
        (tree / "broken").write_text(broken)
        done = run(["bash", tree / "scripts" / "smoke_all.sh"], tree, {"TMPDIR": scratch})
        assert done.returncode == code, done
        lines = [line for line in done.stdout.splitlines() if line.startswith(("ok", "FAILED"))]
        cells = {(line.split()[1], line.split()[2]) for line in lines}
        assert cells == {(network, method) for network in networks for method in ("SGD", "SGDG", "AdamG")}
        assert len(cells) == len(lines) == 18
        failed = [line for line in lines if line.startswith("FAILED")]
        assert failed == ["FAILED  vgg-13 SGDG with exit code 1:"] * code
        assert ("the disk is full" in done.stdout) == (code == 1)
        assert not list(scratch.iterdir())
