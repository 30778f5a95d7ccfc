"""scripts/setup.sh and the quick start: which Python they take, and that nothing of the user's is lost."""

import os
import re
import shutil
import subprocess
import sys

import pytest
from helpers import METHODS, ROOT, contents, log_lines

BASE = sys._base_executable  # of the tests' own environment: without packages
PROBE = 'set -eu\nsource scripts/setup.sh\ninstall_requirements requirements.txt\necho "$python"\n'


@pytest.fixture
def tree(tmp_path):
    """A clone with nothing in its requirements, and a folder of its own for what PATH finds first."""
    root = tmp_path / "a tree & 'more'"
    shutil.copytree(ROOT / "scripts", root / "scripts")
    (root / "scripts/probe.sh").write_text(PROBE)
    (root / "requirements.txt").touch()
    (root / "bin").mkdir()
    return root


def run(root, script, *words, **settings):
    """A script by its name from the root, in no environment but the given."""
    clean = {k: v for k, v in os.environ.items() if k not in ("PYTHON", "VIRTUAL_ENV", "CONDA_PREFIX")}
    clean |= {"PATH": f"{root}/bin:/usr/bin:/bin", "PIP_NO_INDEX": "1", "PIP_FIND_LINKS": ""}
    where = {"cwd": root, "env": clean | {k: str(v) for k, v in settings.items()}}
    return subprocess.run(["bash", f"scripts/{script}", *words], **where, capture_output=True, text=True)


def write_program(path, *lines):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(["#!/bin/sh", *lines, ""]))
    path.chmod(0o755)
    return path


def test_a_broken_environment_of_ours_is_made_anew_with_a_recent_python_and_then_used(tree):
    write_program(tree / "bin/python3", "exit 1")  # an old one
    (tree / "bin/python3.14").symlink_to(BASE)
    write_program(tree / ".venv/bin/python", "exit 1")
    (tree / ".venv/made-by-setup.sh").touch()
    for said in ("Making the virtual environment .venv ...", ""):
        done = run(tree, "probe.sh")
        assert (done.returncode, done.stdout) == (0, f"{tree}/.venv/bin/python\n")
        assert done.stderr.partition("\n")[0] == said
    assert (tree / ".venv/made-by-setup.sh").exists()  # or it could not be made anew once more


@pytest.mark.parametrize("make", [
    f"{BASE} -m venv --without-pip .venv", "mkdir .venv && echo mine >.venv/mine", "echo mine >.venv",
    "mkdir ours && touch ours/mine ours/made-by-setup.sh && ln -s ours .venv",
])  # fmt: skip
def test_what_was_not_made_here_is_left_alone(tree, make):
    subprocess.run(["bash", "-c", make], cwd=tree, check=True)
    before = contents(tree)
    done = run(tree, "probe.sh")
    assert (done.returncode, done.stdout) == (1, "")
    sentence = r".venv cannot be used, .*(not found|no pip).* is left alone: remove or rename it, .*\n"
    assert re.fullmatch(sentence, done.stderr)
    assert contents(tree) == before


def test_python_goes_before_an_active_environment_and_that_before_venv(tree):
    settings = {}  # .venv needs none
    places = {"UNUSED": ".venv", "CONDA_PREFIX": "conda", "VIRTUAL_ENV": "active", "PYTHON": "py"}
    for name, place in places.items():
        python = write_program(tree / place / "bin/python", f'exec {sys.executable} "$@"')
        settings[name] = python if name == "PYTHON" else tree / place
        done = run(tree, "probe.sh", **settings)
        assert (done.returncode, done.stdout, done.stderr) == (0, f"{python}\n", "")
    assert "/nowhere/python was not found" in run(tree, "probe.sh", PYTHON="/nowhere/python").stderr


def test_an_active_environment_without_pip_takes_uv_or_says_so(tree):
    subprocess.run([BASE, "-m", "venv", "--without-pip", tree / "bare"], check=True)
    done = run(tree, "probe.sh", VIRTUAL_ENV=tree / "bare")
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (1, "", 1)
    assert "bare/bin/python has no pip, and uv was not found: " in done.stderr
    write_program(tree / "bin/uv", f'echo "$*" >>"{tree}/calls"')
    assert run(tree, "probe.sh", VIRTUAL_ENV=tree / "bare").stdout == f"{tree}/bare/bin/python\n"
    call = f"pip install --quiet --python {tree}/bare/bin/python --no-index -r requirements.txt\n"
    assert (tree / "calls").read_text() == call


def test_a_python_that_has_torch_is_built_on(tree):
    """As in a container for PyTorch: 6 GB are not downloaded again. Nothing shows through two layers."""
    (tree / "packages/torch").mkdir(parents=True)
    (tree / "packages/torch/__init__.py").touch()
    subprocess.run([BASE, "-m", "venv", "--without-pip", tree / "other"], check=True)
    for python, option in ((BASE, "--system-site-packages "), (tree / "other/bin/python", "")):
        write_program(tree / "bin/python3", f'[ "$2" = venv ] && echo "$*" && exit 1\nexec "{python}" "$@"')
        done = run(tree, "probe.sh", PYTHONPATH=tree / "packages")
        assert done.stdout == f"-m venv {option}.venv\n"
        assert ("torch among them" in done.stderr) == bool(option)


def test_the_tests_say_in_one_sentence_what_they_need():
    done = subprocess.run([BASE, "-S", ROOT / "tests/conftest.py"], capture_output=True, text=True)
    assert done.returncode == 1
    assert re.fullmatch(r"the tests need pytest, torch, .*: pip install -r .*\n", done.stderr)


def test_what_could_not_be_installed_is_tried_again_and_what_is_there_needs_no_network(tree):
    for needed, code in (("no-such-package>=1", 1), ("no-such-package>=1", 1), ("pytest>=1", 0)):
        (tree / "requirements.txt").write_text(needed)
        done = run(tree, "probe.sh", PYTHON=sys.executable)
        assert done.returncode == code
        for said in ("Installing what is missing", "Installing requirements.txt failed or was stopped: "):
            assert (said in done.stderr) == (code == 1)


@pytest.mark.parametrize("script", sorted({path.name for path in ROOT.glob("scripts/*.sh")} - {"setup.sh"}))
def test_help_does_nothing_else_and_no_foreign_setup_is_sourced(script, tree, tmp_path):
    write_program(tmp_path / "foreign/scripts/setup.sh", "echo foreign; exit 1")
    for word in ("--help", "-h"):
        done = run(tree, script, "--print", word, CDPATH=tmp_path / "foreign", VIRTUAL_ENV=tmp_path / "none")
        assert (done.returncode, done.stderr) == (0, "")
        assert f"bash scripts/{script}" in done.stdout
        assert "set -euo" not in done.stdout


@pytest.mark.parametrize("threads", ["", "3"])
def test_the_quick_start_goes_on_with_what_is_there(tree, threads):
    """It removes nothing: main.py judges each directory, and its lock keeps out of one that is in use."""
    log = f'echo "$OMP_NUM_THREADS $*" >>"{tree}/calls"'
    cases = f'case $1 in main.py) {log};; scripts/*);; *) exec {sys.executable} "$@";; esac'
    python = write_program(tree / "bin/python", cases)
    kept = tree / "logs/quickstart/SGD/log.txt"
    kept.parent.mkdir(parents=True)
    kept.write_text("mine")
    words = ["--epochs", "3", "--device", "cpu"]
    done = run(tree, "quickstart.sh", *words, PYTHON=python, OMP_NUM_THREADS=threads)
    assert done.returncode == 0, done
    assert "to train anew, remove or rename it first" in done.stderr
    assert kept.read_text() == "mine"
    calls = (tree / "calls").read_text().splitlines()
    for method, call in zip(METHODS, calls, strict=True):
        assert call.startswith(f"{threads or 1} main.py --dataset digits ")
        assert f"--optim_method {method} --save logs/quickstart/{method} --resume auto " in call
        assert call.endswith("--epochs 3 --device cpu")
    assert "bin/python -m tensorboard.main --logdir" in done.stdout


def test_the_quick_start_trains_the_three_methods_and_draws_them(tree):
    """The real one, with one epoch."""
    for path in (*ROOT.glob("*.py"), ROOT / "requirements.txt"):
        shutil.copy(path, tree)
    shutil.copytree(ROOT / "docs", tree / "docs")
    words = ["--epochs", "1", "--epoch_step", "[]", "--device", "cpu"]
    done = run(tree, "quickstart.sh", *words, PYTHON=sys.executable)
    assert (done.returncode, done.stderr) == (0, "")
    for method in METHODS:
        assert len(log_lines(tree / "logs/quickstart" / method)) == 1
        assert f"== {method} ==" in done.stdout
    assert (tree / "logs/quickstart/curves.png").stat().st_size > 10000
