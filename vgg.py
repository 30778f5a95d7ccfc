"""VGG (Simonyan & Zisserman, 2015) as trained in "Riemannian approach to batch normalization".

Five groups of 3x3 convolutions of widths 64, 128, 256, 512, 512, each group ended by a 2x2 max pool; two
fully connected layers 512 -> 512; a linear classifier. Batch normalization, with a shift but no scale, and
ReLU follow every layer but the last, so every weight but the classifier's matters only through the directions
of its rows.
"""

import torch
from torch import Tensor, nn
from torch.nn.functional import relu

WIDTHS = (64, 128, 256, 512, 512)
# Of each group, by depth:
CONVOLUTIONS = {11: (1, 1, 2, 2, 2), 13: (2, 2, 2, 2, 2), 16: (2, 2, 3, 3, 3), 19: (2, 2, 4, 4, 4)}


class VGG(nn.Module):
    """Images (N, 3, 32, 32) -> logits (N, num_classes). Batch normalization trains on at least 2 images.

    Args:
        depth: 11, 13, 16 or 19 layers with weights. A ValueError names the four otherwise.
        num_classes: outputs of the classifier.
        dropout: probability of a zero after each pool, in [0, 1).

    Convolutions and linear layers start He-normal (fan_in), biases and BN shifts at 0.
    """

    def __init__(self, depth: int, num_classes: int, dropout: float = 0.0):
        super().__init__()
        if depth not in CONVOLUTIONS:
            raise ValueError(f"a VGG has a depth of 11, 13, 16 or 19, got {depth}")
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout must be in [0, 1), got {dropout}")
        in_width = 3
        for i, (width, convolutions) in enumerate(zip(WIDTHS, CONVOLUTIONS[depth], strict=True)):
            self.add_module(f"group{i}", make_group(in_width, width, convolutions, dropout))
            in_width = width
        self.fc0 = nn.Linear(in_width, 512, bias=False)
        self.bn0 = without_scale(nn.BatchNorm1d(512))
        self.fc1 = nn.Linear(512, 512, bias=False)
        self.bn1 = without_scale(nn.BatchNorm1d(512))
        self.fc = nn.Linear(512, num_classes)
        for module in self.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                nn.init.kaiming_normal_(module.weight, mode="fan_in", nonlinearity="relu")  # He et al., 2015
        nn.init.zeros_(self.fc.bias)

    def forward(self, x: Tensor) -> Tensor:
        x = self.group4(self.group3(self.group2(self.group1(self.group0(x)))))
        x = x.flatten(1)  # five pools have made 1 x 1 pixels of 32 x 32
        x = relu(self.bn0(self.fc0(x)), inplace=True)
        x = relu(self.bn1(self.fc1(x)), inplace=True)
        return self.fc(x)


def make_group(in_width: int, width: int, convolutions: int, dropout: float) -> nn.Sequential:
    """(N, in_width, H, W) -> (N, width, H / 2, W / 2): convolutions, BN, ReLU; max pool; perhaps dropout."""
    group = nn.Sequential()
    for j in range(convolutions):
        inputs = in_width if j == 0 else width
        group.add_module(f"conv{j}", nn.Conv2d(inputs, width, 3, padding=1, bias=False))
        group.add_module(f"bn{j}", without_scale(nn.BatchNorm2d(width)))
        group.add_module(f"relu{j}", nn.ReLU(inplace=True))
    group.add_module("pool", nn.MaxPool2d(2))
    if dropout:
        group.add_module("dropout", nn.Dropout(dropout))
    return group


def without_scale(bn: nn.BatchNorm1d | nn.BatchNorm2d) -> nn.Module:
    """The same module with its scale a constant 1: no parameter, not in the state dict.

    A buffer rather than None, because PyTorch calls cuDNN's batch normalization only with both a scale and a
    shift.
    """
    scale = torch.ones_like(bn.weight.detach())
    del bn.weight
    bn.register_buffer("weight", scale, persistent=False)
    return bn
