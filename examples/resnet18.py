"""SGD-G beside SGD on torchvision's ResNet-18 and scikit-learn's digits: the two curves of the training loss.

    python examples/resnet18.py [--steps 100] [--plot resnet18.png]      (70 seconds of one core)

All that a model of your own needs for SGD-G is the line that makes the optimizer.
"""

import argparse
import sys
from pathlib import Path
from statistics import mean

import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_digits
from torchvision.models import resnet18

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # not needed once the package is installed
from grassmann_optimizer import SGDG, grassmann_param_groups


def make_model() -> torch.nn.Module:
    """ResNet-18 for images (B, 1, 8, 8): its first convolution keeps their size, without pooling."""
    torch.manual_seed(0)
    model = resnet18(num_classes=10)
    model.conv1, model.maxpool = torch.nn.Conv2d(1, 64, 3, padding=1, bias=False), torch.nn.Identity()
    return model


def train(model: torch.nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> list[float]:
    """The losses of steps with batches of 64 images, at rates that fall to 0 along a cosine."""
    images, labels = (torch.from_numpy(part) for part in load_digits(return_X_y=True))
    images = images.float().view(-1, 1, 8, 8) / 16
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    losses: list[float] = []
    while len(losses) < steps:
        batch = torch.randint(len(images), (64,))
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(model(images[batch]), labels[batch])
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    return losses


parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--steps", type=int, default=100)
parser.add_argument("--plot", default="resnet18.png")
args = parser.parse_args()
model = make_model()
sgd = train(model, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, nesterov=True), args.steps)
model = make_model()
sgdg = train(model, SGDG(grassmann_param_groups(model, lr=0.1, lrg=0.4)), args.steps)
for name, losses in (("SGD", sgd), ("SGD-G", sgdg)):
    print(f"{name}: last losses {mean(losses[-10:]):.4f} on average")
    plt.semilogy(losses, label=name)
plt.gca().set(xlabel="step", ylabel="training loss")
plt.legend()
plt.savefig(args.plot)
print(f"the two curves are in {args.plot}")
