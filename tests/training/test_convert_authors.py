"""scripts/convert_authors.py: who comes from the authors' PyTorch script keeps their files and goes on."""

import contextlib
import io
import itertools
import json
import re
import sys
from pathlib import Path

import convert_authors
import pytest
import torch
from helpers import Outcome, assert_one_sentence, call, contents, load, log_lines

import main
import options
import utils
from data import load_data

METHODS = ("SGD", "SGDG", "AdamG")


def convert(monkeypatch, *argv) -> Outcome:
    """The script in this process."""
    monkeypatch.setattr(sys, "argv", ["convert_authors.py", *map(str, argv)])
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
        code = utils.answer(convert_authors.convert)
    return Outcome(code, out.getvalue(), err.getvalue())


def as_theirs(value: dict) -> dict:
    """A state on G(1,n) as their optimizers name and shape it: rows flat, powers of beta for a step."""
    rows = value["momentum_buffer"].flatten(1)
    if "second_moment" not in value:
        return {"momentum_buffer": rows}
    powers = {"beta1_power": 0.9**4, "beta2_power": 0.99**4}
    return {"m_buffer": rows, "v_buffer": value["second_moment"], **powers}


@pytest.fixture(params=METHODS)
def theirs(request, tiny, images_root, tmp_path):
    """The method, their model.pt7 after three steps, and the directory of the same run here after as many."""
    method, ours, path = request.param, tmp_path / "ours", tmp_path / "theirs" / "model.pt7"
    words = tiny(method, ours, "--dropout", 0, "--epochs", 1, "--epoch_step", "[]")
    assert call(*words).code == 0
    t = main.Training(options.parse_options(words)[0], load_data("folder", images_root))
    state, names = load(ours), {p: name for name, p in t.model.named_parameters()}
    # Their groups number the weights in the order of the file, which need not be ours.
    values = iter(state["optimizer"]["state"].values())
    numbers, optimizer, groups = itertools.count(), {}, []
    for group, stored in zip(t.optimizer.param_groups, state["optimizer"]["param_groups"], strict=True):
        of_name = {names[p]: next(values) for p in group["params"]}
        mine = {next(numbers): of_name[name] for name in sorted(of_name)}
        on_g = stored.get("grassmann")
        optimizer |= {i: as_theirs(value) if on_g else value for i, value in mine.items()}
        groups.append({**stored, "params": list(mine)})
    params = {re.sub(r"(conv\w*)\.weight$", r"\1", n): state["model"][n] for n in sorted(names.values())}
    assert {"conv0", "group0.block0.conv1", "group1.block0.convdim", "bn.weight", "fc.bias"} <= params.keys()
    stats = {name: value for name, value in state["model"].items() if "running" in name}
    path.parent.mkdir()
    (path.parent / "log.txt").write_text("json_stats: {}\n")
    optimizer = {"state": optimizer, "param_groups": groups}
    torch.save({"params": params, "stats": stats, "epoch": 1, "optimizer": optimizer}, path)
    return method, path, ours


def flags(method, images_root) -> list:
    network = ["--depth", 10, "--width", 1, "--dropout", 0, "--optim_method", method, "--batchSize", 16]
    return [*network, "--dataset", "folder", "--dataroot", images_root, "--epochs", 1, "--epoch_step", "[]"]


def test_their_run_goes_on_as_the_same_run_here(theirs, images_root, tmp_path, monkeypatch):
    method, path, ours = theirs
    save, before = tmp_path / "new", contents(path.parent)
    outcome = convert(monkeypatch, path, save, *flags(method, images_root))
    assert (outcome.code, outcome.err) == (0, "")
    assert "the optimizer's state is taken over\n" in outcome.out
    assert f"the authors' script after 1 epoch: go on with python main.py --resume {save}\n" in outcome.out
    evaluated = [call("--eval", "--resume", run).out for run in (save, ours)]
    assert evaluated[0] == evaluated[1]
    for run in (save, ours):
        assert call("--resume", run, "--epochs", 2).code == 0
    assert [stats["epoch"] for stats in log_lines(save)] == [2]
    weights = {name: value for name, value in load(ours)["model"].items() if "num_b" not in name}
    torch.testing.assert_close({name: load(save)["model"][name] for name in weights}, weights)
    origin = json.loads((save / "config.json").read_text())["weights_from"]
    assert origin == load(save)["weights_from"] == "the authors' script after 1 epoch"
    assert contents(path.parent) == before


@pytest.mark.parametrize("theirs", ["SGDG"], indirect=True)
@pytest.mark.parametrize("change", [
    lambda state: state["optimizer"]["state"][0].update(momentum_buffer=torch.zeros(2)),
    lambda state: state["optimizer"]["param_groups"].pop(),
    lambda state: state.pop("optimizer"),
])  # fmt: skip
def test_an_optimizers_state_that_does_not_fit_is_left_out_and_said(
    theirs, images_root, tmp_path, monkeypatch, change
):
    method, path, ours = theirs
    state = torch.load(path, weights_only=True)
    change(state)
    torch.save(state, path)
    outcome = convert(monkeypatch, path, tmp_path / "new", *flags(method, images_root))
    assert (outcome.code, outcome.err) == (0, "")
    assert "note: the optimizer's state is not taken over (" in outcome.out
    assert load(tmp_path / "new")["optimizer"]["state"] == {}
    assert call("--eval", "--resume", tmp_path / "new").out == call("--eval", "--resume", ours).out


class Code:
    """A value that would run code where a pickle is trusted."""

    def __reduce__(self):
        return Path.touch, (Path("was here"),)


BROKEN = [{"params": None}, {"stats": [1]}, {"params": {1: torch.zeros(2)}}, {"params": Code()}, None]


@pytest.mark.parametrize("theirs", ["SGDG"], indirect=True)
@pytest.mark.parametrize("change", BROKEN)
def test_a_broken_file_is_one_sentence_and_runs_no_code(theirs, images_root, tmp_path, monkeypatch, change):
    method, path, _ = theirs
    monkeypatch.chdir(tmp_path)
    if change is None:
        path.write_bytes(path.read_bytes()[:-99])
    else:
        torch.save({**torch.load(path, weights_only=True), **change}, path)
    outcome = convert(monkeypatch, path, tmp_path / "new", *flags(method, images_root))
    assert_one_sentence(outcome, 1, r"model\.pt7 cannot be read as the authors' checkpoint", "check --model")
    assert not (tmp_path / "new").exists()
    assert not Path("was here").exists()


@pytest.mark.parametrize("theirs", ["SGDG"], indirect=True)
def test_nothing_is_overwritten(theirs, images_root, monkeypatch):
    method, path, ours = theirs
    for directory, said in ((path.parent, r"log\.txt of another program"), (ours, "already holds a run")):
        before = contents(directory)
        outcome = convert(monkeypatch, path, directory, *flags(method, images_root))
        assert_one_sentence(outcome, 2, said)
        assert contents(directory) == before
