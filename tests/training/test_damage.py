"""Whatever has happened to a file or a flag: one sentence and nothing lost, or the run as it should be.

Each case draws from a seed of its own, which its name shows; `long` ones draw for ten minutes in all.
"""

import contextlib
import copy
import json
import math
import random
import shutil

import pytest
import torch
from helpers import assert_one_sentence, assert_same_run, bits, call, contents, load, stop_at

import main
from checkpoint import load_checkpoint
from options import METHODS, make_parser, parse_options
from utils import UserError

MANY = pytest.param(range(1000), marks=pytest.mark.long, id="many")
ODD_VALUES = (
    None, True, -1, 0, 7, 10**30, 2.5, math.nan, math.inf, "", "no good", "\udcff\n|<b>", [], [1, "a"], {},
    {"epoch": 1}, {3: 4}, torch.zeros(3), torch.tensor(math.nan), torch.zeros(2, 3, dtype=torch.int8),
)  # fmt: skip
ODD_TEXTS = (
    "", " ", "nan", "inf", "-inf", "1e308", "3.5e38", "9e37", "1e-320", "-1", "0", "0.5", "1e400", "٣", "1_0",
    "0x10", "true", "None", "none", "[1]", "[[[", "[1,1e99]", "9" * 5000, "--lr", "\udcff", "a\nb", "\x00",
)  # fmt: skip


# ------------------------------------------------------------------------------------------------- checkpoint


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


def test_the_checkpoint_before_a_damaged_one_is_named_and_goes_on(tiny, finished, tmp_path, monkeypatch):
    save = tmp_path / "run"
    with monkeypatch.context() as patch:
        stop_at(patch, 8)  # in the second epoch
        assert call(*tiny("SGDG", save)).code == 143
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


def test_no_part_of_a_checkpoint_can_be_of_any_other_kind(finished, tmp_path, recwarn):
    state = load(finished["AdamG"][0])
    odd = [*ODD_VALUES, torch.zeros(2).to_sparse(), torch.zeros(2, device="meta"), {**state["options"], 3: 4}]
    for part in state:
        for value in odd:
            torch.save({**state, part: value}, tmp_path / "checkpoint.pt")
            with contextlib.suppress(UserError):
                parse_options(["--resume", str(tmp_path), "--epochs", "3"])
    assert not recwarn  # of sparse tensors, beside the sentence


@pytest.mark.parametrize(
    ("method", "change"),
    [
        ("AdamG", lambda values, groups: values.clear()),
        ("SGD", lambda values, groups: values.pop(0)),
        ("AdamG", lambda values, groups: values[0]["step"].add_(1)),
        ("AdamG", lambda values, groups: values[0]["second_moment"].neg_()),
        ("SGD", lambda values, groups: values[0].update(momentum_buffer=values[0]["momentum_buffer"][None])),
        ("AdamG", lambda values, groups: groups[0].update(momentum=0.8)),
        ("SGD", lambda values, groups: groups[0]["params"].reverse()),
    ],
)
def test_an_optimizers_state_that_cannot_be_the_runs_is_refused(finished, tmp_path, method, change):
    save = shutil.copytree(finished[method][0], tmp_path / "run")
    state = load(save)
    change(state["optimizer"]["state"], state["optimizer"]["param_groups"])
    torch.save(state, save / "checkpoint.pt")
    assert_one_sentence(call("--resume", save, "--epochs", 3), 1, "not whole")


@pytest.fixture(scope="module")
def stopped(tiny, tmp_path_factory):
    """The directory of a run that was stopped after an epoch and a step."""
    save = tmp_path_factory.mktemp("stopped") / "run"
    with pytest.MonkeyPatch.context() as patch:
        stop_at(patch, 8)
        assert call(*tiny("SGDG", save)).code == 143
    assert (load(save)["epoch"], load(save)["batch"]) == (1, 1)
    return save


@pytest.mark.parametrize(
    ("part", "change", "said"),
    [
        ("history", lambda part: part[0].update(epoch=2), "history"),
        ("history", lambda part: part[0].update(test_loss=math.nan), "history"),
        ("history", lambda part: part[0].update(note=math.inf), "history"),
        ("history", lambda part: part.clear(), "gaps"),
        ("sums", lambda part: part.fill_(math.nan), "sums"),
        ("sums", lambda part: part.neg_(), "sums"),
        ("batch", lambda part: 4, "more steps"),
        ("epoch", lambda part: 2, "gaps"),
        ("options", lambda part: part.update(lr=0.02), "options"),
        ("options", lambda part: part.update(epoch_step=[]), "options"),
        ("options", lambda part: part.update(omega=math.nan), "omega"),
        ("options", lambda part: part.update(depth="10"), "depth"),
        ("probe", lambda part: part.update(sums=part["sums"][:1].clone()), "other layers"),
        ("probe", lambda part: part["sums"].fill_(math.inf), "probe"),
        ("model", lambda part: part.update({"fc.bias": part["fc.bias"].double()}), "precision"),
        ("model", lambda part: part["fc.bias"].fill_(math.nan), "model"),
        ("generators", lambda part: part.clear(), "generators"),
        ("statistics", lambda part: part[1].__setitem__(0, 0.0), "statistics"),
        ("train_time", lambda part: -1.0, "train_time"),
        ("scaler", lambda part: part.update(scale=math.nan), "scaler"),
    ],
)
def test_each_part_of_a_checkpoint_is_held_to_what_it_can_be(stopped, tmp_path, part, change, said):
    save = shutil.copytree(stopped, tmp_path / "run")
    state = load(save)
    other = change(state[part])
    if isinstance(other, (int, float)):
        state[part] = other
    torch.save(state, save / "checkpoint.pt")
    before = contents(save)
    assert_one_sentence(call("--resume", save), 1, said)
    assert contents(save) == before


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


def test_a_checkpoint_that_cannot_be_read_is_not_called_damaged(finished, tmp_path, monkeypatch):
    def stale(*args, **kwargs):
        raise OSError(116, "Stale file handle")

    monkeypatch.setattr(torch, "load", stale)
    assert_one_sentence(call("--resume", finished["SGD"][0], "--eval"), 1, "cannot read .*Stale file handle")


def places(value, path=()):
    """The ways to everything in nested dictionaries and lists."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield (*path, key)
        yield from places(item, (*path, key))


def is_free(place) -> bool:
    """Whether any value that it could have is right: what is told of the past, and what data are called."""
    return place[0] == "history" or place[-1] == "dataset_name"


def edited(state: dict, draw: random.Random) -> tuple[dict, str]:
    """A copy with one value replaced, left out or added, and what was done."""
    state = copy.deepcopy(state)
    parts = [place for place in places(state) if len(place) == 1]
    inside = [place for place in places(state) if len(place) > 1 and not is_free(place)]
    *way, key = draw.choice(draw.choice([parts, inside]))
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


@pytest.mark.parametrize("seeds", [range(40), MANY])
def test_an_edited_checkpoint_is_refused_or_trains_as_before(finished, tmp_path, seeds):
    whole, references = tmp_path / "whole", {}
    for method in METHODS:
        shutil.copytree(finished[method][0], whole / method)
        assert call("--resume", whole / method, "--epochs", 3).code == 0
        references[method] = load(whole / method)
    for seed in seeds:
        draw, save = random.Random(seed), tmp_path / "run"
        method = draw.choice(METHODS)
        shutil.rmtree(save, ignore_errors=True)
        shutil.copytree(finished[method][0], save)
        state, what = edited(load(save), draw)
        torch.save(state, save / "checkpoint.pt")
        before = contents(save)
        outcome = call("--resume", save, "--epochs", 3)
        if outcome.code:
            assert_one_sentence(outcome, outcome.code)
            assert contents(save) == before, (seed, what)
        else:
            for part in ("model", "optimizer", "generators", "options", "data_sha256"):
                assert bits(load(save)[part]) == bits(references[method][part]), (seed, what, part)


# ------------------------------------------------------------------------------------ config.json and log.txt


def damaged_text(text: str, draw: random.Random) -> bytes:
    """A file's text, cut off, overwritten, doubled, of another type, or with one value replaced."""
    data = text.encode()
    at = draw.randrange(len(data))
    value = json.loads(text.splitlines()[0].removeprefix("json_stats: ")) if "json_stats" in text else None
    value = value or json.loads(text)
    *way, key = draw.choice(list(places(value)))
    parent = value
    for step in way:
        parent = parent[step]
    parent[key] = draw.choice([v for v in ODD_VALUES if not isinstance(v, torch.Tensor)])
    other = draw.choice(["", "[]", "1", "null", "{}", "[" * 100_000, '{"options": []}', "\0" * 99])
    texts = [data[:at], data[:at] + b"\xff\x00\n" + data[at:], data * 2, other.encode()]
    return draw.choice([*texts, json.dumps(value).encode()])


@pytest.mark.parametrize("seeds", [range(40), MANY])
@pytest.mark.parametrize("with_checkpoint", [True, False])
def test_a_damaged_config_or_log_is_refused_or_made_anew(tiny, finished, tmp_path, seeds, with_checkpoint):
    """Without the checkpoint a run that is known to be finished is left as it is."""
    source, save = finished["SGD"][0], tmp_path / "run"
    for seed in seeds:
        shutil.rmtree(save, ignore_errors=True)
        shutil.copytree(source, save)
        draw = random.Random(seed)
        path = save / draw.choice(["config.json", "log.txt"])
        path.write_bytes(damaged_text(path.read_text(), draw))
        if not with_checkpoint:
            (save / "checkpoint.pt").unlink()
        before = contents(save)
        outcome = call(*tiny("SGD", save, "--resume", "auto"))
        after = contents(save)
        if outcome.code:
            assert_one_sentence(outcome, outcome.code)
            assert after == before, seed
        elif with_checkpoint:
            assert "nothing to do" in outcome.out
            assert after["log.txt"] == (source / "log.txt").read_bytes(), seed
        else:  # started anew only where no more than an epoch was logged
            assert after["log.txt"] == before["log.txt"] or before["log.txt"].count(b"\n") <= 1, seed


# ------------------------------------------------------------------------------------------------------ flags


@pytest.mark.parametrize("seeds", [range(400), MANY])
def test_odd_flags_are_refused_or_mean_what_they_say(seeds):
    flags = [action for action in make_parser()._actions if action.option_strings and action.dest != "help"]
    for seed in seeds:
        draw = random.Random(seed)
        action = draw.choice(flags)
        text = draw.choice(ODD_TEXTS)
        words = [f"{draw.choice(action.option_strings)}={text}"] if action.nargs != 0 else [text]
        try:
            options, _ = parse_options([*words, "--optim_method", "SGDG", "--summary"])
        except UserError:
            continue
        value = getattr(options, action.dest)
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            assert value == float(text), (seed, words)
            assert math.isfinite(value)


BELOW_ONE = 1 - 2**-53
LIMITS = {
    "SGD": {"lr": 9e37, "weightDecay": 9e37, "bnDecay": 9e37, "dropout": BELOW_ONE, "width": 999},
    "SGDG": {"lrg": 9e37, "omega": 9e37, "grad_clip": 9e37, "lr_decay_ratio": 9e37, "momentum": BELOW_ONE},
    "AdamG": {"lrg": 9e37, "omega": 9e37, "grad_clip": 1e-99, "lr_decay_ratio": 1e-99, "momentum": BELOW_ONE},
}  # fmt: skip


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


@pytest.mark.parametrize(("method", "name"), [(method, name) for method in LIMITS for name in LIMITS[method]])
def test_the_largest_values_train_or_end_in_a_sentence(tiny, tmp_path, method, name, monkeypatch):
    if name == "width":  # no memory for it, on any machine

        def exhausted(*args):
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes")

        monkeypatch.setattr(main, "make_model", exhausted)
    outcome = call(*tiny(method, tmp_path / "run", f"--{name}", LIMITS[method][name]))
    if outcome.code:
        assert_one_sentence(outcome, outcome.code, "not finite|out of memory|not below")
