"""Turns a checkpoint of the authors' PyTorch script into a run with which main.py goes on, or evaluates it.

    python scripts/convert_authors.py model.pt7 DIR --depth 28 --width 10 --optim_method SGDG [more flags]
    python main.py --resume DIR [--eval]

The file holds no options: give the network's, the method's and the data's, as for main.py. Its weights,
running averages and number of epochs are taken, and its optimizer's state where that fits: the weights of
each group are expected in the order that they have in the file. What the epochs gave is not in the file.
"""

import argparse
import shlex
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

import report
import utils
from checkpoint import run_state, save_checkpoint
from data import load_data
from main import Training
from options import parse_options


def our_name(name: str) -> str:
    """A weight's name here: the authors leave out the `.weight` of convolutions."""
    return name if name.endswith((".weight", ".bias")) else f"{name}.weight"


def load_authors(t: Training, path: Path) -> None:
    """Put the weights, running averages, epochs and optimizer's state of the authors' file into a run.

    Raises:
        UserError: it is no such file, or of another network.
    """
    try:
        theirs = torch.load(path, map_location="cpu", weights_only=True)
        params = {our_name(name): value for name, value in theirs["params"].items()}
        counts = {name: value for name, value in t.model.state_dict().items() if name.endswith("_tracked")}
        t.model.load_state_dict({**counts, **params, **theirs["stats"]})
        t.epoch = int(theirs.get("epoch", 0))
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        advice = "check --model, --depth, --width and --dataset"
        what = f"{path} cannot be read as the authors' checkpoint"
        raise utils.UserError(f"{what} ({reason}); {advice}") from error
    try:
        t.optimizer.load_state_dict(optimizer_state(t, theirs["optimizer"], list(params)))
        print("the optimizer's state is taken over")
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        print(f"note: the optimizer's state is not taken over ({reason}): momentum starts at 0")
    t.weights_from = f"the authors' script after {utils.counted(t.epoch, 'epoch')}"


def optimizer_state(t: Training, theirs: dict, order: list[str]) -> dict:
    """The authors' state dict with our groups; `order`: names of the weights as their groups have them."""
    names = {p: name for name, p in t.model.named_parameters()}
    number = {p: i for i, p in enumerate(p for group in t.optimizer.param_groups for p in group["params"])}
    state, groups = {}, []
    for ours, group in zip(t.optimizer.param_groups, theirs["param_groups"], strict=True):
        in_their_order = sorted(ours["params"], key=lambda p: order.index(names[p]))
        for i, p in zip(group["params"], in_their_order, strict=True):
            if i in theirs["state"]:
                state[number[p]] = theirs["state"][i]
        groups.append({**ours, "params": [number[p] for p in ours["params"]]})
    return {"state": state, "param_groups": groups}


def convert() -> int:
    """Read, write, and say how to go on; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("file", type=Path)
    parser.add_argument("directory", type=Path, help="of the new run")
    args, flags = parser.parse_known_args()
    options, _ = parse_options([*flags, "--save", str(args.directory)])
    with utils.locked(options.save, continues=False):
        t = Training(options, load_data(options.dataset, options.dataroot, options.dataset_name))
        load_authors(t, args.file)
        report.write_config(t)
        save_checkpoint(options.save / utils.CHECKPOINT, run_state(t))
    way = f"python main.py --resume {shlex.quote(str(options.save))}"
    print(utils.printable(f"{t.weights_from}: go on with {way}"))
    return 0


if __name__ == "__main__":
    sys.exit(utils.answer(convert))
