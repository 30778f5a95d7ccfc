"""Every network of the paper's tables trains with every method: whole runs of main.py on images of noise."""

import shutil

import cv2
import numpy as np
import pytest
from helpers import METHODS, call, log_lines

NETWORKS = {
    **{f"wrn-{depth}-{width}": ["resnet", "--depth", depth, "--width", width]
       for depth, width in ((16, 4), (22, 8), (28, 10), (40, 10))},
    **{f"vgg-{depth}": [f"vgg{depth}"] for depth in (13, 19)},
}  # fmt: skip


@pytest.fixture(scope="module")
def four_images(tmp_path_factory):
    """A `folder` of two classes: an image of each to train, and one to test."""
    root = tmp_path_factory.mktemp("four")
    for number, name in enumerate(("train/0", "train/1", "test/0", "test/1")):
        (root / name).mkdir(parents=True)
        image = np.random.default_rng(number).integers(0, 256, (32, 32, 3), np.uint8)
        cv2.imwrite(str(root / name / "0.png"), image)
    return root


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    "network", [pytest.param(n, marks=[pytest.mark.long] if n == "wrn-40-10" else []) for n in NETWORKS]
)
def test_trains(network, method, four_images, tmp_path):
    words = ["--model", *NETWORKS[network], "--optim_method", method]
    words += ["--dataset", "folder", "--dataroot", four_images, "--batch_size", 2, "--lr", 0.01]
    outcome = call(*words, "--epochs", 1, "--epoch_step", "[]", "--save", tmp_path / "run")
    assert outcome.code == 0, outcome
    assert [np.isfinite(epoch["train_loss"]) for epoch in log_lines(tmp_path / "run")] == [True]
    shutil.rmtree(tmp_path / "run")  # a checkpoint of up to 450 MB
