"""Whatever has happened to a file or a flag: one sentence and nothing lost, or a run that trains.

Each case draws from a seed of its own, which its name shows; `long` ones draw for ten minutes in all.
"""

import copy
import math
import random
import shutil
from pathlib import Path

import pytest
import torch
from helpers import METHODS, assert_one_sentence, assert_same_run, bits, call, contents, load, stop_at

import main
from checkpoint import load_checkpoint, reading
from utils import UserError

MANY = pytest.param(range(1000), marks=pytest.mark.long, id="many")
ODD_VALUES = (
    None, True, -1, 0, 7, 10**30, 2.5, math.nan, math.inf, "", "no good", "\udcff\n\x1b[31m|<b>", [],
    [1, "a"], {}, {"epoch": 1}, {3: 4}, torch.zeros(3), torch.tensor(math.nan),
    torch.zeros(2, 3, dtype=torch.int8), torch.zeros(2).to_sparse(), torch.zeros(2, device="meta"),
)  # fmt: skip


# ------------------------------------------------------------------------------------------------- checkpoint


@pytest.fixture(scope="module")
def stopped(tiny, tmp_path_factory):
    """For each method the directory of a run that was stopped after an epoch and a step."""
    runs = {}
    for method in METHODS:
        runs[method] = tmp_path_factory.mktemp("stopped") / "run"
        with pytest.MonkeyPatch.context() as patch:
            stop_at(patch, 8)
            assert call(*tiny(method, runs[method])).code == 143
        assert (load(runs[method])["epoch"], load(runs[method])["batch"]) == (1, 1)
    return runs


@pytest.mark.parametrize("seeds", [range(60), MANY])
def test_a_flipped_bit_is_noticed_or_changes_nothing(finished, tmp_path, seeds):
    whole = (finished["AdamG"][0] / "checkpoint.pt").read_bytes()
    path, right, noticed = tmp_path / "checkpoint.pt", bits(load(finished["AdamG"][0])), 0
    for seed in seeds:
        draw, damaged = random.Random(seed), bytearray(whole)
        damaged[draw.randrange(len(whole))] ^= 1 << draw.randrange(8)
        path.write_bytes(damaged)
        try:
            assert bits(load_checkpoint(path)) == right, seed  # in what fills the file up
        except UserError:
            noticed += 1
    assert noticed > len(seeds) / 2


@pytest.mark.parametrize("damage", [
    lambda whole: b"", lambda whole: whole[: len(whole) // 2], lambda whole: whole[:-1],
    lambda whole: bytes(range(256)) * 100, lambda whole: b"json_stats: {}\n",
    lambda whole: bytes(len(whole) // 3) + whole[len(whole) // 3 :],
])  # fmt: skip
def test_a_checkpoint_that_is_not_whole_is_one_sentence_with_a_way_out(finished, tmp_path, damage):
    content = damage((finished["SGDG"][0] / "checkpoint.pt").read_bytes())
    (tmp_path / "checkpoint.pt").write_bytes(content)
    outcome = call("--resume", tmp_path)
    assert_one_sentence(outcome, 1, rf"{tmp_path}/checkpoint\.pt is damaged", "resume from another one")
    assert contents(tmp_path)["checkpoint.pt"] == content


@pytest.mark.parametrize("value", [
    {}, {"state_dict": {}, "epoch": 3}, [1, 2], torch.zeros(3),
    {"model": {}, "optimizer": {}, "options": {}, "epoch": 0},
    {"model": 1, "optimizer": 2, "options": 3, "epoch": 4},
])  # fmt: skip
def test_a_file_that_something_else_wrote_is_one_sentence(value, tmp_path):
    torch.save(value, tmp_path / "checkpoint.pt")
    for flags in ([], ["--lr", "0.1"], ["--eval"]):
        assert_one_sentence(call("--resume", tmp_path, *flags), 1, "damaged or of another model", "a new run")


def test_a_pickle_that_would_run_code_is_not_run(tmp_path):
    class Evil:
        def __reduce__(self):
            return Path.touch, (tmp_path / "was here",)

    torch.save({"model": Evil(), "optimizer": 0, "options": {}, "epoch": 0}, tmp_path / "checkpoint.pt")
    assert_one_sentence(call("--resume", tmp_path), 1, "checkpoint")
    assert not (tmp_path / "was here").exists()


def test_the_checkpoint_before_a_damaged_one_is_named_and_goes_on(finished, stopped, tmp_path):
    save = shutil.copytree(stopped["SGDG"], tmp_path / "run")
    damaged = bytearray((save / "checkpoint.pt").read_bytes())
    damaged[len(damaged) // 2] ^= 1
    (save / "checkpoint.pt").write_bytes(damaged)
    outcome = call("--resume", save)
    assert_one_sentence(outcome, 1, f"mv {save}/checkpoint.previous.pt {save}/checkpoint.pt$")
    (save / "checkpoint.previous.pt").rename(save / "checkpoint.pt")
    assert load(save)["epoch"] == 1
    assert call("--resume", save).code == 0
    assert bits(load(save)["model"]) == bits(load(finished["SGDG"][0])["model"])
    assert not (save / "checkpoint.previous.pt").exists()  # a finished run takes the room of one


@pytest.mark.parametrize(("method", "change", "said"), [
    ("SGD", lambda s: s["optimizer"]["state"][0].update(momentum_buffer=torch.zeros(2)), "momentum"),
    ("SGD", lambda s: s["optimizer"]["param_groups"][0]["params"].reverse(), "groups are others"),
    ("SGDG", lambda s: s["probe"].update(sums=s["probe"]["sums"][:1].clone()), "other layers"),
    ("SGDG", lambda s: s.update(model=main.WideResNet(16, 1, 3).state_dict()), "of another model"),
    ("SGDG", lambda s: s.update(train_time="long"), "train_time"),
    ("SGDG", lambda s: s.update(batch=4), "batch"),
    ("SGDG", lambda s: s["options"].update(depth="10"), "option depth is '10'"),
    ("SGDG", lambda s: s["options"].update(lr=-0.01), "option lr is -0.01"),
    ("SGDG", lambda s: s["options"].update(nthread=None), "option nthread is None"),
    ("SGDG", lambda s: s["options"].update(lr_decay_ratio=0.0), "math"),
    ("SGDG", lambda s: s["options"].update(new=1), "new"),
])  # fmt: skip
def test_a_part_that_cannot_be_the_runs_is_named(stopped, tmp_path, method, change, said):
    save = shutil.copytree(stopped[method], tmp_path / "run")
    state = load(save)
    change(state)
    torch.save(state, save / "checkpoint.pt")
    before = contents(save)
    assert_one_sentence(call("--resume", save), 1, "is damaged or of another model", said)
    assert contents(save) == before


def places(value, path=()):
    """The ways to everything in nested dictionaries and lists."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield (*path, key)
        yield from places(item, (*path, key))


def edited(state: dict, draw: random.Random, part: str | None) -> tuple[dict, str]:
    """A copy with `part`, or else one value in a part, replaced, left out or added; and what was done."""
    state = copy.deepcopy(state)
    *way, key = [part] if part else draw.choice([place for place in places(state) if len(place) > 1])
    parent = state
    for step in way:
        parent = parent[step]
    kind = draw.choice(["replace"] * 6 + ["delete", "add"])
    if kind == "delete":
        del parent[key]
    elif kind == "add" and isinstance(parent, dict):
        parent["new"] = draw.choice(ODD_VALUES)
    else:
        parent[key] = draw.choice(ODD_VALUES)
        kind = f"replace by {parent[key]!r}"
    return state, f"{kind} {way} {key}"


@pytest.mark.parametrize("seeds", [range(80), MANY])
def test_an_edited_checkpoint_trains_or_is_one_sentence_and_left_as_it_is(stopped, tmp_path, seeds):
    """Every second time a whole part is another, in turn, else anything in one."""
    for seed in seeds:
        draw, save = random.Random(seed), tmp_path / "run"
        shutil.rmtree(save, ignore_errors=True)
        shutil.copytree(stopped[draw.choice(METHODS)], save)
        state = load(save)
        state, what = edited(state, draw, [*state][seed // 2 % len(state)] if seed % 2 else None)
        torch.save(state, save / "checkpoint.pt")
        before = contents(save)
        try:
            outcome = call("--resume", save, "--epochs", 2)
        except Exception as error:
            raise AssertionError((seed, what)) from error
        if outcome.code:
            # (torch may warn of what it is given, below the sentence.)
            assert_one_sentence(outcome._replace(err=outcome.err.split("\n")[0] + "\n"), outcome.code)
            trained = "not finite" in outcome.err  # what log.txt and TensorBoard have is of the new start
            assert trained or contents(save) == before, (seed, what)


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
    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr(place, fail)
    outcome = call("--resume", finished["SGD"][0], "--eval")
    assert_one_sentence(outcome, 1, said)
    assert "damaged" not in outcome.err


@pytest.mark.parametrize("error", [torch.AcceleratorError("CUDA error: device busy"), ImportError("scipy")])
def test_what_is_not_the_files_fault_is_raised_as_it_is(error, tmp_path):
    with pytest.raises(type(error)), reading(tmp_path / "checkpoint.pt"):
        raise error


# ------------------------------------------------------------------------------------------------------ flags


@pytest.mark.parametrize(
    ("method", "rate", "ratio", "drops"),
    [("SGD", "lr", 1e20, [1, 2]), ("SGDG", "lrg", 3e36, [1, 2]), ("SGD", "lr", 1e37, list(range(1, 20)))],
)
def test_rates_after_the_last_drop_are_numbers_too(tiny, tmp_path, method, rate, ratio, drops):
    # Of SGDG's two rates only the larger one is too large: lr 1e-30 is not.
    words = ["--lr_decay_ratio", ratio, "--epoch_step", drops, *(["--lr", 1e-60] if rate == "lrg" else [])]
    outcome = call(*tiny(method, tmp_path / "run", *words))
    assert_one_sentence(outcome, 2, f"--{rate} is not below")
    assert not (tmp_path / "run").exists()
