"""Whatever has happened to a file or a flag: one sentence and nothing lost, or a run that trains."""

import math
import random
import shutil
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from helpers import METHODS, assert_one_sentence, assert_same_run, bits, call, contents, load, stop_at

import main
from checkpoint import load_checkpoint, reading
from utils import UserError


@pytest.fixture(scope="module")
def stopped(tiny, tmp_path_factory):
    """For SGD and SGD-G the directory of a run that was stopped after two of three epochs and a step."""
    runs = {}
    for method in ("SGD", "SGDG"):
        runs[method] = tmp_path_factory.mktemp("stopped") / "run"
        with pytest.MonkeyPatch.context() as patch:
            stop_at(patch, 15)
            assert call(*tiny(method, runs[method], "--epochs", 3)).code == 143
        assert (load(runs[method])["epoch"], load(runs[method])["batch"]) == (2, 1)
    return runs


def test_a_flipped_bit_is_noticed_or_changes_nothing(finished, tmp_path):
    whole = (finished["AdamG"][0] / "checkpoint.pt").read_bytes()
    path, right, noticed = tmp_path / "checkpoint.pt", bits(load(finished["AdamG"][0])), 0
    for seed in range(60):
        draw, damaged = random.Random(seed), bytearray(whole)
        damaged[draw.randrange(len(whole))] ^= 1 << draw.randrange(8)
        path.write_bytes(damaged)
        try:
            assert bits(load_checkpoint(path)) == right, seed  # in what fills the file up
        except UserError:
            noticed += 1
    assert noticed > 30


@pytest.mark.parametrize("damage", [
    lambda whole: b"", lambda whole: b"json_stats: {}\n", lambda whole: whole[:-1],
    lambda whole: bytes(len(whole) // 3) + whole[len(whole) // 3 :],
    [1, 2], {"state_dict": {}, "epoch": 3}, {"model": {}, "optimizer": {}, "options": 3, "epoch": 4},
])  # fmt: skip
def test_what_is_no_whole_checkpoint_is_one_sentence_with_a_way_out(finished, tmp_path, damage):
    """Damaged, or saved by something else; nothing is written beside it."""
    path = tmp_path / "checkpoint.pt"
    if callable(damage):
        path.write_bytes(damage((finished["SGDG"][0] / "checkpoint.pt").read_bytes()))
    else:
        torch.save(damage, path)
    before = contents(tmp_path)
    for flags in ([], ["--lr", "0.1"], ["--eval"]):
        outcome = call("--resume", tmp_path, *flags)
        assert_one_sentence(outcome, 1, f"{path} is damaged or of another model", "resume from another one")
    assert contents(tmp_path) == before


def test_a_pickle_that_would_run_code_is_not_run(tmp_path):
    class Evil:
        def __reduce__(self):
            return Path.touch, (tmp_path / "was here",)

    torch.save({"model": Evil(), "optimizer": 0, "options": {}, "epoch": 0}, tmp_path / "checkpoint.pt")
    assert_one_sentence(call("--resume", tmp_path), 1, "checkpoint")
    assert not (tmp_path / "was here").exists()


def test_the_checkpoint_before_a_damaged_one_is_named_and_goes_on(stopped, tmp_path):
    save = shutil.copytree(stopped["SGDG"], tmp_path / "run")
    (save / "checkpoint.pt").write_bytes(b"half of it")
    outcome = call("--resume", save)
    assert_one_sentence(outcome, 1, f"mv {save}/checkpoint.previous.pt {save}/checkpoint.pt$")
    (save / "checkpoint.previous.pt").rename(save / "checkpoint.pt")
    assert (load(save)["epoch"], load(save)["batch"]) == (2, 0)  # the last but one
    assert call("--resume", save).code == 0
    assert load(save)["epoch"] == 3
    assert not (save / "checkpoint.previous.pt").exists()  # a finished run takes the room of one


@pytest.mark.parametrize(("method", "change", "said"), [
    ("SGD", lambda s: s["optimizer"]["state"][0].update(momentum_buffer=torch.zeros(2)), "momentum"),
    ("SGD", lambda s: s["optimizer"]["param_groups"][0]["params"].reverse(), "groups are others"),
    ("SGDG", lambda s: s["probe"].update(sums=s["probe"]["sums"][:1].clone()), "invalid for input"),
    ("SGDG", lambda s: s.update(model=main.WideResNet(16, 1, 3).state_dict()), "of another model"),
    ("SGDG", lambda s: s.update(train_time="long"), "train_time"),
    ("SGDG", lambda s: s.update(batch=4), "batch"),
    ("SGDG", lambda s: s["options"].update(depth="10"), "option depth is '10'"),
    ("SGDG", lambda s: s["options"].update(lr=-0.01), "option lr is -0.01"),
    ("SGDG", lambda s: s["options"].update(lr_decay_ratio=0.0), "math"),
])  # fmt: skip
def test_a_part_that_cannot_be_the_runs_is_named(stopped, tmp_path, method, change, said):
    save = shutil.copytree(stopped[method], tmp_path / "run")
    state = load(save)
    change(state)
    torch.save(state, save / "checkpoint.pt")
    before = contents(save)
    assert_one_sentence(call("--resume", save), 1, "is damaged or of another model", said)
    assert contents(save) == before


@pytest.mark.parametrize("value", [None, 7, math.nan, "\udcff\n", [1, "a"], {3: 4}, torch.zeros(3)])
def test_an_edited_checkpoint_trains_or_is_one_sentence_and_left_as_it_is(stopped, tmp_path, value):
    state = load(stopped["SGDG"])
    for part in state:
        save = shutil.copytree(stopped["SGDG"], tmp_path / part)
        edited = {**state["options"], "dataset_name": value} if part == "options" else value
        torch.save({**state, part: edited}, save / "checkpoint.pt")
        before = contents(save)
        outcome = call("--resume", save)
        if outcome.code:
            # (torch may warn of what it is given, below the sentence.)
            assert_one_sentence(outcome._replace(err=outcome.err.split("\n")[0] + "\n"), outcome.code)
            assert contents(save) == before, part


@pytest.mark.parametrize("method", METHODS)
def test_the_rates_are_those_of_the_options_whatever_the_optimizers_state_says(finished, tmp_path, method):
    for name in ("as it was", "edited"):
        save = shutil.copytree(finished[method][0], tmp_path / name)
        state = load(save)
        for group in state["optimizer"]["param_groups"] if name == "edited" else []:
            group["lr"] *= 2
        torch.save(state, save / "checkpoint.pt")
        assert call("--resume", save, "--epochs", 3).code == 0
    assert_same_run(tmp_path / "edited", tmp_path / "as it was")


@pytest.mark.parametrize(("place", "error", "said"), [
    ("torch.load", OSError(116, "Stale file handle"), "cannot read .*Stale file handle"),
    ("torch.load", MemoryError("no room"), "out of memory"),
    ("torch.load", RuntimeError("DefaultCPUAllocator: can't allocate memory"), "out of memory"),
    ("main.make_model", torch.OutOfMemoryError("CUDA out of memory"), "out of memory"),
    ("main.load_data", OSError(5, "Input/output error"), "Input/output error"),
    ("main.make_model", torch.AcceleratorError("CUDA error: out of memory"), "out of memory"),
])  # fmt: skip
def test_what_is_wrong_with_the_machine_is_not_called_damage(finished, monkeypatch, place, error, said):
    monkeypatch.setattr(place, Mock(side_effect=error))
    outcome = call("--resume", finished["SGD"][0], "--eval")
    assert_one_sentence(outcome, 1, said)
    assert "damaged" not in outcome.err


@pytest.mark.parametrize("error", [torch.AcceleratorError("CUDA error: device busy"), ImportError("scipy")])
def test_what_is_not_the_files_fault_is_raised_as_it_is(error, tmp_path):
    with pytest.raises(type(error)), reading(tmp_path / "checkpoint.pt"):
        raise error


# ------------------------------------------------------------------------------------------------------ flags


@pytest.mark.parametrize(("method", "rate", "ratio"), [("SGD", "lr", 1e20), ("SGDG", "lrg", 3e36)])
def test_rates_after_the_last_drop_are_numbers_too(tiny, tmp_path, method, rate, ratio):
    # Of SGDG's two rates only the larger one is too large: lr 1e-30 is not.
    words = ["--lr_decay_ratio", ratio, "--epoch_step", [1, 2], *(["--lr", 1e-60] if rate == "lrg" else [])]
    assert_one_sentence(call(*tiny(method, tmp_path / "run", *words)), 2, f"--{rate} is not below")
