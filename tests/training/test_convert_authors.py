"""scripts/convert_authors.py: who comes from the authors' PyTorch script keeps their files and goes on."""

import itertools
import json
import os
import re
import sys
from pathlib import Path

import convert_authors
import pytest
import torch
from helpers import METHODS, Outcome, assert_one_sentence, call, contents, load, log_lines

import main
import options
import utils
from data import load_data


def as_theirs(value: dict) -> dict:
    """A state on G(1,n) as their optimizers name and shape it: rows flat, powers of beta for a step."""
    rows = value["momentum_buffer"].flatten(1)
    if "second_moment" not in value:
        return {"momentum_buffer": rows}
    powers = {"beta1_power": 0.9**4, "beta2_power": 0.99**4}
    return {"m_buffer": rows, "v_buffer": value["second_moment"], **powers}


@pytest.fixture
def theirs(method, tiny, images_root, tmp_path):
    """Their model.pt7 after three steps; the same run after as many is in the directory `ours`."""
    words = tiny(method, tmp_path / "ours", "--dropout", 0, "--epochs", 1, "--epoch_step", "[]")
    assert call(*words).code == 0
    t = main.Training(options.parse_options(words)[0], load_data("folder", images_root))
    state, names = load(tmp_path / "ours"), {p: name for name, p in t.model.named_parameters()}
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
    path = tmp_path / "theirs" / "model.pt7"
    path.parent.mkdir()
    (path.parent / "log.txt").write_text("json_stats: {}\n")
    optimizer = {"state": optimizer, "param_groups": groups}
    torch.save({"params": params, "stats": stats, "epoch": 1, "optimizer": optimizer}, path)
    return path


@pytest.fixture
def convert(theirs, method, tiny, monkeypatch, capsys):
    """convert(directory): the outcome of the script in this process."""

    def convert(directory: Path) -> Outcome:
        words = tiny(method, directory, "--dropout", 0, "--epochs", 1, "--epoch_step", "[]")
        monkeypatch.setattr(sys, "argv", ["convert_authors.py", str(theirs), str(directory), *words])
        return Outcome(utils.answer(convert_authors.convert), *capsys.readouterr())

    return convert


@pytest.mark.parametrize("method", METHODS)
def test_their_run_goes_on_as_the_same_run_here(theirs, convert, tmp_path):
    save, ours, before = tmp_path / "new", tmp_path / "ours", contents(theirs.parent)
    outcome = convert(save)
    assert (outcome.code, outcome.err) == (0, "")
    assert "the optimizer's state is taken over\n" in outcome.out
    assert f"the authors' script after 1 epoch: go on with python main.py --resume {save}\n" in outcome.out
    assert call("--eval", "--resume", save).out == call("--eval", "--resume", ours).out
    for run in (save, ours):
        assert call("--resume", run, "--epochs", 2).code == 0
    assert [stats["epoch"] for stats in log_lines(save)] == [2]
    weights = {name: value for name, value in load(ours)["model"].items() if "num_b" not in name}
    torch.testing.assert_close({name: load(save)["model"][name] for name in weights}, weights)
    origin = json.loads((save / "config.json").read_text())["weights_from"]
    assert origin == load(save)["weights_from"] == "the authors' script after 1 epoch"
    assert contents(theirs.parent) == before


class Code:
    """A value that would run code where a pickle is trusted."""

    def __reduce__(self):
        return Path.touch, (Path("was here"),)


@pytest.mark.parametrize("method", ["SGDG"])
class TestWhatDoesNotFit:
    @pytest.mark.parametrize("change", [
        lambda state: state["optimizer"]["state"][0].update(momentum_buffer=torch.zeros(2)),
        lambda state: state["optimizer"]["param_groups"].pop(),
        lambda state: state.pop("optimizer"),
    ])  # fmt: skip
    def test_an_optimizers_state_is_left_out_and_said(self, theirs, convert, tmp_path, change):
        state = torch.load(theirs, weights_only=True)
        change(state)
        torch.save(state, theirs)
        outcome = convert(tmp_path / "new")
        assert (outcome.code, outcome.err) == (0, "")
        assert "note: the optimizer's state is not taken over (" in outcome.out
        assert load(tmp_path / "new")["optimizer"]["state"] == {}

    @pytest.mark.parametrize("change", [{"params": None}, {"stats": [1]}, {"params": Code()}, None])
    def test_a_broken_file_is_one_sentence_and_runs_no_code(
        self, theirs, convert, tmp_path, monkeypatch, change
    ):
        monkeypatch.chdir(tmp_path)
        if change is None:
            theirs.write_bytes(theirs.read_bytes()[:-99])
        else:
            torch.save({**torch.load(theirs, weights_only=True), **change}, theirs)
        outcome = convert(tmp_path / "new")
        assert_one_sentence(
            outcome, 1, "model.pt7 cannot be read as the authors' checkpoint", "check --model"
        )
        assert sorted(os.listdir()) == ["ours", "theirs"]

    def test_nothing_is_overwritten(self, theirs, convert, tmp_path):
        for name, said in (("theirs", r"log\.txt of another program"), ("ours", "already holds a run")):
            before = contents(tmp_path / name)
            assert_one_sentence(convert(tmp_path / name), 2, said)
            assert contents(tmp_path / name) == before
