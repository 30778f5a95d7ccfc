"""Which weights of three known networks are scale-invariant, by `grassmann_optimizer.scale_invariance`.

    python benchmarks/scale_invariance.py [--depth 28] [--width 10] [--json FILE]

WRN-28-10 (resnet.py), VGG-13 (vgg.py) and torchvision's ResNet-18, at their initial weights, on random
pictures: one forward and backward pass each, in float32 on the CPU.
"""

import argparse
import json
import sys
from pathlib import Path

import torch
import torchvision
from torch.nn.functional import cross_entropy

sys.path.insert(0, str(Path(__file__).parent.parent))

from grassmann_optimizer import scale_invariance
from resnet import WideResNet
from vgg import VGG


def main(argv: list[str] | None = None) -> None:
    """Measure and print one line per weight."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--depth", type=int, default=28, help="of the Wide ResNet")
    parser.add_argument("--width", type=int, default=10)
    parser.add_argument("--json", type=Path, help="write the figures here")
    args = parser.parse_args(argv)
    torch.manual_seed(0)
    networks = {  # and the pictures: how many, and their size
        f"WRN-{args.depth}-{args.width}": (WideResNet(args.depth, args.width, 10, dropout=0.3), 4, 32),
        "VGG-13": (VGG(13, 10), 8, 32),
        "ResNet-18 (torchvision)": (torchvision.models.resnet18(num_classes=10), 16, 64),
    }
    figures = {}
    for name, (model, count, size) in networks.items():
        images, labels = torch.randn(count, 3, size, size), torch.randint(10, (count,))
        measured = scale_invariance(model, lambda net, x=images, t=labels: cross_entropy(net(x), t))
        print(f"{name}: {sum(m.invariant for m in measured)} of {len(measured)} weights are scale-invariant")
        print(f"  {'weight':28} {'shape':20} {'max |cos|':>10} {'chance':>7} {'idle':>5}")
        for m in measured:
            verdict = "invariant" if m.invariant else ""
            shape = " x ".join(map(str, m.shape))
            print(f"  {m.name:28} {shape:20} {m.cosine:10.1e} {m.chance:7.2f} {m.idle_rows:5} {verdict}")
        figures[name] = [m._asdict() for m in measured]
    if args.json:
        args.json.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
