"""How much of a run's training loss is due to the length of its last layer.

    python benchmarks/last_layer.py RUN [RUN ...] [--dataroot DIR] [--json FILE]

A network that classifies every training image lowers its loss by longer logits alone. So the training loss
of each RUN, a directory with a checkpoint, is computed as it is, and with the last layer's weights (not its
bias) brought to the length (Frobenius norm) that they have in the first RUN. As in training, that is on the
augmented images of EPOCHS more epochs and with each batch's own statistics; but no weight moves.
"""

import argparse
import json
import sys
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import utils
from checkpoint import restore
from data import TrainBatches, hold_out, load_data
from main import Training
from options import parse_options

EPOCHS = 3


def trained(run: str, dataroot: str | None) -> Training:
    """A run as its checkpoint holds it; UserError where there is none or its images are not found."""
    # Not --eval, which takes other images too.
    words = ["--resume", run, "--summary", *(["--dataroot", dataroot] if dataroot else [])]
    options, state = parse_options(words)
    data = load_data(options.dataset, options.dataroot, options.dataset_name)
    t = Training(options, hold_out(data, options.holdout) if options.holdout else data)
    restore(t, state)
    return t


@torch.no_grad()
def training_logits(t: Training) -> tuple[Tensor, Tensor]:
    """Logits (N, classes) and labels (N,) of the next epochs' N images."""
    batches = TrainBatches(t.data.train_images, t.data.train_labels, t.options.randomcrop_pad)
    found = []
    t.model.train()
    for _ in range(EPOCHS):
        for images, labels in batches.iterate(t.plan(), nthread=0):
            x, labels = t.inputs(images, labels)
            with t.autocast():
                found.append((t.forward(x).float(), labels))
        t.epoch += 1
    logits, labels = map(torch.cat, zip(*found, strict=True))
    return logits, labels


@utils.repeatable()
def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("runs", nargs="+", metavar="RUN", help="a directory with a checkpoint")
    parser.add_argument("--dataroot", help="if the images are no longer where the runs found them")
    parser.add_argument("--json", type=Path, help="write the figures here")
    args = parser.parse_args(argv)
    figures: list[dict] = []
    print(f"{'length':>7} {'loss':>9} {'at the first length':>20}  run")
    for run in args.runs:
        t = trained(run, args.dataroot)
        logits, labels = training_logits(t)
        length, bias = t.model.fc.weight.norm().item(), t.model.fc.bias.detach()
        factor = figures[0]["length"] / length if figures else 1
        loss, other = (cross_entropy(z, labels).item() for z in (logits, factor * (logits - bias) + bias))
        figure = {"run": run, "images": len(labels), "length": length, "loss": loss}
        figures.append({**figure, "loss_at_first_length": other})
        print(f"{length:7.2f} {loss:#9.3g} {other:#20.3g}  {run}")
    if args.json:
        result = {"environment": utils.environment(t.device), "runs": figures}
        args.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    try:
        main()
    except utils.UserError as error:
        sys.exit(f"error: {error}")
