"""The list of deliberate faults fits the files and tests as they are; trying it takes minutes (--all)."""

import re
import subprocess
import sys

import pytest
from helpers import ROOT
from mutants import FILES, all_faults


@pytest.fixture(scope="module")
def collected():
    """{file: the names of its tests} of those that the faults are tried with."""
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-m", "not long", "-o", "addopts="]
    command += ["--import-mode=importlib", "-p", "no:cacheprovider", *FILES.values()]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    lines = [line.split("::", 1) for line in done.stdout.splitlines() if "::" in line]
    return {file: [name for where, name in lines if where == file] for file in FILES.values()}


def is_selected(name, expression):
    """As pytest's -k: each word but the operators stands for whether it is in the test's name."""
    words = re.findall(r"[()]|[^\s()]+", expression.lower())
    kept = ("and", "or", "not", "(", ")")
    return eval(" ".join(word if word in kept else str(word in name.lower()) for word in words))


def test_each_text_stands_once_in_its_file():
    for fault in all_faults():
        assert fault.source() != (ROOT / fault.file).read_text()


def test_each_fault_names_tests_that_exist(collected):
    for fault in all_faults():
        for selection in fault.tests.split("; "):
            file, _, expression = selection.partition(" ")
            names = collected[FILES[file]]
            if names or file != "frameworks":  # which may not be installed
                assert any(is_selected(name, expression) for name in names), fault
