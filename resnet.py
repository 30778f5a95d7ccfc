"""Wide ResNet (Zagoruyko & Komodakis, 2016) as trained in "Riemannian approach to batch normalization".

WRN-d-k: a 3x3 convolution 3 -> 16; three groups of n = (d - 4) / 6 pre-activation blocks of widths 16k, 32k,
64k and strides 1, 2, 2; batch normalization, ReLU, global average pool, linear classifier. The model knows
nothing of training.
"""

from torch import Tensor, nn
from torch.nn.functional import dropout, relu


class Block(nn.Module):
    """Pre-activation residual block: (N, in_width, H, W) -> (N, width, H / stride, W / stride).

    o = relu(bn0(x)); z = conv1(dropout(relu(bn1(conv0(o))))); plus x, or convdim(o) where widths differ. Only
    conv0 feeds a batch normalization directly; conv1 and convdim feed the sum.
    """

    def __init__(self, in_width: int, width: int, stride: int, dropout: float):
        super().__init__()
        self.bn0 = nn.BatchNorm2d(in_width)
        self.conv0 = nn.Conv2d(in_width, width, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv1 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.convdim = nn.Conv2d(in_width, width, 1, stride, bias=False) if in_width != width else None
        self.dropout = dropout

    def forward(self, x: Tensor) -> Tensor:
        o = relu(self.bn0(x), inplace=True)
        z = relu(self.bn1(self.conv0(o)), inplace=True)
        if self.dropout:
            z = dropout(z, self.dropout, self.training)
        return self.conv1(z) + (x if self.convdim is None else self.convdim(o))


def blocks_per_group(depth: int) -> int:
    """n of a network of 6n + 4 layers; ValueError names the nearest two depths where there is none."""
    blocks = max(1, (depth - 4) // 6)
    if depth != 6 * blocks + 4:
        nearest = f"{6 * blocks + 4} and {6 * blocks + 10}"
        raise ValueError(f"a Wide ResNet has a depth of 6n+4, got {depth}; the nearest are {nearest}")
    return blocks


class WideResNet(nn.Module):
    """Images (N, 3, H, W) -> logits (N, num_classes).

    Args:
        depth: layers in all, 6n + 4. A ValueError names the nearest two depths otherwise.
        width: the factor k that multiplies the widths 16, 32, 64; at least 1.
        num_classes: outputs of the classifier.
        dropout: probability of a zero between a block's two convolutions, in [0, 1).

    Convolutions and the classifier start He-normal (fan_in), biases at 0, BN scales at 1.
    """

    def __init__(self, depth: int, width: int, num_classes: int, dropout: float = 0.0):
        super().__init__()
        if width < 1:
            raise ValueError(f"width must be at least 1, got {width}")
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout must be in [0, 1), got {dropout}")
        blocks = blocks_per_group(depth)
        widths = [16, 16 * width, 32 * width, 64 * width]
        self.conv0 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        for i in range(3):
            group = nn.Sequential()
            for j in range(blocks):
                in_width = widths[i] if j == 0 else widths[i + 1]
                stride = 2 if i > 0 and j == 0 else 1
                group.add_module(f"block{j}", Block(in_width, widths[i + 1], stride, dropout))
            self.add_module(f"group{i}", group)
        self.bn = nn.BatchNorm2d(widths[3])
        self.fc = nn.Linear(widths[3], num_classes)
        for module in self.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                nn.init.kaiming_normal_(module.weight, mode="fan_in", nonlinearity="relu")  # He et al., 2015
        nn.init.zeros_(self.fc.bias)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv0(x)
        x = self.group2(self.group1(self.group0(x)))
        x = relu(self.bn(x), inplace=True)
        return self.fc(x.mean((2, 3)))
