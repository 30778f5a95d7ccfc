"""Who comes from the authors' PyTorch script keeps their files and their weights."""

import json
import re

import pytest
import torch
from helpers import assert_one_sentence, assert_same_run, call, contents, load, log_lines

import main
from grassmann_optimizer import SGDG, grassmann_param_groups
from resnet import WideResNet

NETWORK = ["--depth", 10, "--width", 1]


def authors_checkpoint(model, epoch=3) -> dict:
    """What their script saves as model.pt7: convolutions without `.weight`, averages apart, no options."""
    optimizer = SGDG(grassmann_param_groups(model, 0.01, 0.2)).state_dict()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    stats = {name: state.pop(name) for name in list(state) if "running" in name}
    names = {name: re.sub(r"(conv\w*)\.weight$", r"\1", name) for name in state if "num_batches" not in name}
    params = {names[name]: state[name] for name in names}
    assert {"conv0", "group0.block0.conv1", "group1.block0.convdim", "bn.weight", "fc.bias"} <= params.keys()
    return {"params": params, "stats": stats, "optimizer": optimizer, "epoch": epoch}


@pytest.fixture
def theirs(tmp_path):
    """A directory of their script: model.pt7, and log.txt with one line. Also the network that is in it."""
    torch.manual_seed(7)
    model = WideResNet(10, 1, 3)
    for name, value in model.state_dict().items():
        if "running" in name:
            value.uniform_(0.5, 2)
    directory = tmp_path / "theirs"
    directory.mkdir()
    torch.save(authors_checkpoint(model), directory / "model.pt7")
    line = {"model": "resnet", "depth": 10, "batchSize": 128, "epoch": 3, "train_loss": 1.5, "test_acc": 60.0}
    (directory / "log.txt").write_text(f"json_stats: {json.dumps(line)}\n")
    return directory, model


@pytest.mark.parametrize("resume", [[], ["--resume", "auto"]])
def test_their_directory_is_never_written_to(tiny, theirs, resume):
    directory, _ = theirs
    before = contents(directory)
    outcome = call(*tiny("SGD", directory, *resume))
    assert_one_sentence(outcome, 2, r"log\.txt and model\.pt7", "left as it is", "another --save")
    assert contents(directory) == before


@pytest.mark.parametrize("name", ["config.json", "lock"])
@pytest.mark.parametrize("content", ['{"options": {"a": 1}, "mine": 2}', '["options"]'])
def test_a_file_of_another_program_is_left_alone(tiny, tmp_path, name, content):
    (tmp_path / name).write_text(content)
    assert_one_sentence(call(*tiny("SGD", tmp_path, "--resume", "auto")), 2, name, "left as it is")
    assert contents(tmp_path) == {name: content.encode()}


def test_their_weights_are_evaluated(theirs, images_root, tiny, tmp_path):
    """As the same weights in a checkpoint of ours."""
    directory, model = theirs
    before = contents(directory)
    data = ["--dataset", "folder", "--dataroot", images_root, "--batchSize", 16]
    outcome = call("--eval", "--resume", directory / "model.pt7", *NETWORK, *data)
    assert (outcome.code, outcome.err) == (0, "")
    note = r"(?m)^note: .* authors' script after 3 epochs; the epoch and the optimizer's state are not"
    assert re.search(note, outcome.out)
    assert contents(directory) == before

    assert call(*tiny("SGD", tmp_path / "ours")).code == 0
    state = load(tmp_path / "ours")
    torch.save({**state, "model": model.state_dict()}, tmp_path / "ours" / "checkpoint.pt")
    same = call("--eval", "--resume", tmp_path / "ours")
    assert same.out.splitlines()[-4:] == outcome.out.splitlines()[-4:]  # below the heading with the epochs


def test_a_run_can_start_from_their_weights(theirs, tiny, tmp_path):
    """With a rate of 0 they stay; the epochs count anew, and the new run is an ordinary one."""
    directory, model = theirs
    before, save = contents(directory), tmp_path / "run"
    rates = ["--lr", 0, "--momentum", 0, "--epochs", 1, "--epoch_step", "[]"]
    outcome = call(*tiny("SGD", save, "--resume", directory / "model.pt7", *rates))
    assert (outcome.code, outcome.err) == (0, "")
    assert contents(directory) == before
    assert [stats["epoch"] for stats in log_lines(save)] == [1]
    for name, p in model.named_parameters():
        assert torch.equal(load(save)["model"][name], p), name
    assert call("--resume", save, "--epochs", 2).code == 0
    origin = json.loads((save / "config.json").read_text())["weights_from"]
    assert origin == load(save)["weights_from"] == "the authors' script after 3 epochs"


def test_a_run_from_their_weights_that_is_killed_at_once_goes_on_from_them(
    theirs, tiny, tmp_path, monkeypatch
):
    directory, _ = theirs
    flags = ["--resume", directory / "model.pt7", "--epochs", 1, "--epoch_step", "[]"]
    assert call(*tiny("SGDG", tmp_path / "whole", *flags)).code == 0
    save = tmp_path / "killed"
    with monkeypatch.context() as patch:
        patch.setattr(main, "train", interrupted)
        assert call(*tiny("SGDG", save, *flags)).code == 130
    assert call("--resume", save).code == 0
    assert_same_run(save, tmp_path / "whole")


def interrupted(*args):
    raise KeyboardInterrupt


@pytest.mark.parametrize("part", [{"params": None}, {"stats": [1]}, {"params": {1: torch.zeros(2)}}])
def test_their_broken_checkpoint_is_one_sentence(theirs, images_root, tmp_path, part):
    state = torch.load(theirs[0] / "model.pt7", weights_only=True)
    torch.save({**state, **part}, tmp_path / "model.pt7")
    data = ["--dataset", "folder", "--dataroot", images_root]
    outcome = call("--eval", "--resume", tmp_path / "model.pt7", *NETWORK, *data)
    assert_one_sentence(outcome, 1, "broken checkpoint of the authors' script")


def test_what_does_not_fit_is_said(theirs, images_root):
    directory, _ = theirs
    data = ["--dataset", "folder", "--dataroot", images_root]
    outcome = call("--eval", "--resume", directory / "model.pt7", "--depth", 16, "--width", 1, *data)
    assert_one_sentence(outcome, 1, "do not fit", "--depth")
    assert_one_sentence(call("--eval", "--resume", directory), 1, r"--resume \S*model\.pt7 to start")


def test_summary_of_a_checkpoint_describes_its_weights(finished, monkeypatch):
    """Mean, deviation, shortest and longest row, and largest |cos|, against their definitions in float64."""
    save, _ = finished["SGDG"]
    monkeypatch.setattr(main, "load_data", interrupted)  # the images may be gone
    outcome = call("--summary", "--resume", save)
    assert (outcome.code, outcome.err) == (0, "")
    assert max(map(len, outcome.out.splitlines())) <= 80
    line = r"^(\S+) +([-+\d.e]+) +([-+\d.e]+) +([\d.e-]+ +[\d.e-]+ +[\d.]+ )? *(grassmann|bn_bias|other)$"
    found = {row[0]: row[1:] for row in re.findall(line, outcome.out, re.M)}
    model = load(save)["model"]
    weights = {name: value for name, value in model.items() if "running" not in name and "num_b" not in name}
    assert found.keys() == weights.keys()
    for name, value in weights.items():
        mean, deviation, matrix, _ = found[name]
        w = value.double()
        assert float(mean) == pytest.approx(w.mean().item(), rel=0.06, abs=1e-9), name
        assert float(deviation) == pytest.approx(w.std(correction=0).item(), rel=0.06, abs=1e-9), name
        assert bool(matrix) == (w.ndim > 1)
        if matrix:
            w = w.flatten(1)
            norms = w.norm(dim=1)
            cosines = (w @ w.T / norms[:, None] / norms).fill_diagonal_(0).abs()
            expected = norms.min().item(), norms.max().item(), cosines.max().item()
            assert tuple(map(float, matrix.split())) == pytest.approx(expected, rel=6e-3, abs=6e-4), name


@pytest.mark.parametrize(("theirs_flag", "option", "value"), [
    (("--width", "10.0"), "width", 10), (("--randomcrop_pad", "4.0"), "randomcrop_pad", 4),
    (("--dtype", "float"), "dtype", "float32"),
])  # fmt: skip
def test_their_notation_is_taken(theirs_flag, option, value):
    import options

    assert getattr(options.parse_options(list(theirs_flag))[0], option) == value


def test_half_is_float16(tiny, tmp_path):
    if not torch.cuda.is_available():
        assert_one_sentence(call(*tiny("SGD", tmp_path / "run", "--dtype", "half")), 2, "float16 needs a GPU")
