"""Fixtures: a tiny data set, and finished runs of it."""

import sys
from importlib.util import find_spec
from pathlib import Path

if missing := [name for name in ("pytest", "torch", "cv2", "hypothesis", "geoopt") if not find_spec(name)]:
    needed = "pip install -r requirements.txt -r requirements-test.txt"
    sys.exit(f"the tests need {', '.join(missing)}: {needed}")

import pytest
from helpers import METHODS, Outcome, call, make_images


@pytest.fixture(scope="session")
def images_root(tmp_path_factory) -> Path:
    """The root of `make_images`; a test that changes it works on a copy."""
    return make_images(tmp_path_factory.mktemp("data") / "images")


@pytest.fixture(scope="session")
def tiny(images_root):
    """tiny(method, save, *more): arguments of a short run: 2 epochs of 3 steps, the rates drop after one."""

    def arguments(method: str, save: Path, *more) -> list[str]:
        network = ["--depth", 10, "--width", 1, "--dropout", 0.3, "--optim_method", method]
        data = ["--dataset", "folder", "--dataroot", images_root, "--batchSize", 16]
        schedule = ["--epochs", 2, "--epoch_step", "[1]"]
        return [str(word) for word in [*network, *data, *schedule, "--save", save, *more]]

    return arguments


@pytest.fixture(scope="session")
def finished(tiny, tmp_path_factory) -> dict[str, tuple[Path, Outcome]]:
    """For each method the directory and outcome of an uninterrupted `tiny` run; tests change copies only."""
    runs = {}
    for method in METHODS:
        save = tmp_path_factory.mktemp("finished") / method
        outcome = call(*tiny(method, save))
        assert (outcome.code, outcome.err) == (0, "")
        runs[method] = save, outcome
    return runs
