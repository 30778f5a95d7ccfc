"""Which rates train a small model in a first trial: the table of docs/method.md, "Choosing lr and lrg".

    python benchmarks/rates.py [--json FILE]

scikit-learn's digits (1,437 images to train, 360 to test), batches of 64, cosine schedule, torch's initial
weights. A cell has the mean of the last 20 losses and the test error, medians of the seeds.
"""

import argparse
import itertools
import json
import sys
from pathlib import Path
from statistics import mean, median

import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import nn
from torch.nn.functional import cross_entropy
from torchvision.models.resnet import BasicBlock

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from grassmann_optimizer import SGDG, AdamG, grassmann_param_groups
from utils import environment

STEPS, SEEDS = (200, 1000), 3
SETTINGS = [*(("SGD", lr, None) for lr in (0.1, 0.3, 1.0)),
            *(("SGD-G", *rates) for rates in ((0.01, 0.2), (0.1, 0.2), (0.1, 0.4), (0.3, 0.4))),
            *(("Adam-G", *rates) for rates in ((0.01, 0.05), (0.1, 0.1), (0.3, 0.1)))]  # fmt: skip


def conv(before: int, after: int, stride: int, size: int = 3) -> nn.Sequential:
    convolution = nn.Conv2d(before, after, size, stride, size // 2, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(after), nn.ReLU())


def block(before: int, after: int) -> nn.Module:
    return BasicBlock(before, after, 2, conv(before, after, 2, 1)[:2])


def dense(before: int, after: int) -> list[nn.Module]:
    return [nn.Linear(before, after, bias=False), nn.BatchNorm1d(after), nn.ReLU()]


MODELS = {  # images (B, 1, 8, 8) to features (B, 64, H, W)
    "three convolutions": lambda: [conv(1, 16, 1), conv(16, 32, 2), conv(32, 64, 2)],
    "residual network": lambda: [conv(1, 16, 1), block(16, 32), block(32, 64)],
    "linear layers": lambda: [nn.Flatten(), *dense(64, 128), *dense(128, 64), nn.Unflatten(1, (64, 1, 1))],
}


def train(name: str, method: str, lr: float, lrg: float | None, steps: int, seed: int) -> tuple[float, float]:
    """The mean of the last losses, and the test error in %."""
    x, y = (torch.from_numpy(part) for part in load_digits(return_X_y=True))
    x = x.float().view(-1, 1, 8, 8) / 16
    x, test_x, y, test_y = train_test_split(x, y, test_size=360, stratify=y, random_state=0)
    torch.manual_seed(seed)
    model = nn.Sequential(*MODELS[name](), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))
    if method == "SGD":
        optimizer = torch.optim.SGD(model.parameters(), lr, momentum=0.9, nesterov=True, weight_decay=5e-4)
    else:
        select = ["1.weight", "4.weight"] if name == "linear layers" else "shape"
        groups = grassmann_param_groups(model, lr, lrg, select=select)
        optimizer = {"SGD-G": SGDG, "Adam-G": AdamG}[method](groups)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    order, losses = [], []
    for _ in range(steps):
        order = order[64:] if len(order) >= 128 else torch.randperm(len(x)).tolist()
        loss = cross_entropy(model(x[order[:64]]), y[order[:64]])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    with torch.no_grad():
        wrong = model.eval()(test_x).argmax(1) != test_y
    return mean(losses[-20:]), 100 * wrong.double().mean().item()


def table(runs: list[dict]) -> str:
    columns = dict.fromkeys(f"{run['model']}, {run['steps']:,} steps" for run in runs)
    rows = {("method", "`lr`, `lrg`"): [*columns], ("---", "---"): ["---"] * len(columns)}
    for run in runs:
        rates = str(run["lr"]) + (f", {run['lrg']}" if run["lrg"] else "")
        text = f"{median(run['losses']):#.2g}, {median(run['errors']):.1f}%"
        rows.setdefault((run["method"], rates), []).append(text)
    return "\n".join(f"| {' | '.join([*head, *cells])} |" for head, cells in rows.items())


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--json", type=Path, help="write all figures here")
    args = parser.parse_args(argv)
    runs = []
    for model, steps, (method, lr, lrg) in itertools.product(MODELS, STEPS, SETTINGS):
        results = [train(model, method, lr, lrg, steps, seed) for seed in range(SEEDS)]
        runs.append({"model": model, "steps": steps, "method": method, "lr": lr, "lrg": lrg})
        runs[-1]["losses"], runs[-1]["errors"] = zip(*results, strict=True)
    print(table(runs))
    if args.json:
        result = {"environment": environment(torch.device("cpu")), "runs": runs}
        args.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
