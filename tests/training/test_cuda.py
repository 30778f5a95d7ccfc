"""What only a GPU can show of training: the CPU's losses, the same bits after a stop."""

import pytest
import torch
from helpers import METHODS, assert_same_run, call, load, log_lines, stop_at

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
EACH = pytest.mark.parametrize("method", METHODS)


def train(tiny, method, save, *flags):
    outcome = call(*tiny(method, save, "--device", "cuda", *flags))
    assert (outcome.code, outcome.err) == (0, "")


@EACH
def test_losses_are_those_of_the_cpu(method, tiny, tmp_path):
    """To the rounding of TF32, in which the GPU's convolutions are."""
    flags = ["--dropout", 0, "--lr", 0.01]
    assert call(*tiny(method, tmp_path / "cpu", "--device", "cpu", *flags)).code == 0
    train(tiny, method, tmp_path / "gpu", *flags)
    for on_gpu, on_cpu in zip(*(log_lines(tmp_path / name) for name in ("gpu", "cpu")), strict=True):
        assert on_gpu["train_loss"] == pytest.approx(on_cpu["train_loss"], rel=0.01)


@EACH
@pytest.mark.parametrize("setting", ["float32", "bfloat16", "float16", "bfloat16 --compile"])
def test_a_stopped_run_ends_with_the_same_bits(method, setting, tiny, tmp_path, monkeypatch):
    flags = ["--dtype", *setting.split()]
    train(tiny, method, tmp_path / "whole", *flags)
    with monkeypatch.context() as patch:
        stop_at(patch, 2)
        assert call(*tiny(method, tmp_path / "run", "--device", "cuda", *flags)).code == 143
    assert call("--resume", tmp_path / "run").code == 0
    assert_same_run(tmp_path / "run", tmp_path / "whole")


@EACH
def test_a_run_moves_to_the_cpu_and_back(method, tiny, tmp_path):
    train(tiny, method, tmp_path / "run")
    for epochs, device in ((3, "cpu"), (4, "cuda")):
        assert call("--resume", tmp_path / "run", "--device", device, "--epochs", epochs).code == 0
    assert load(tmp_path / "run")["epoch"] == 4


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_compiled_network_trains_as_the_eager_one(dtype, tiny, tmp_path):
    flags = ["--dropout", 0, "--dtype", dtype]
    train(tiny, "SGDG", tmp_path / "eager", *flags)
    train(tiny, "SGDG", tmp_path / "compiled", *flags, "--compile")
    eager, compiled = (log_lines(tmp_path / name)[0]["train_loss"] for name in ("eager", "compiled"))
    assert compiled == pytest.approx(eager, rel=0.02)
