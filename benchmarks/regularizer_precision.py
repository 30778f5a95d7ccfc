"""How far matrix products of narrow types turn the regularizer's gradient, and what they cost.

    python benchmarks/regularizer_precision.py [--rows 640] [--columns 5760] [--json FILE]

For random unit rows, and for rows that the regularizer itself has made nearly orthogonal, the gradient
2 (Y Y' - I) Y, projected onto the tangent spaces, is compared with float64: |error| / |gradient|, all rows.
The distance from orthogonal is ||Y Y' - I||, "20 steps" are so many of SGD-G on the regularizer alone.
"I afterwards" is the other order, 2 (Y Y' Y - Y).

Narrow types are emulated: operands are rounded, products accumulate in float32. "3 x" splits an operand into
two parts, a = hi + lo, and takes hi hi + hi lo + lo hi; "6 x" splits it into three, and leaves out what is
smaller than the last part. "3 x, then 1 x" is the first product and the second. Operands of float16 are
multiplied by 2^14 first: none is above 1. "Truncated" sums as NVIDIA's tensor cores have been found to (Fasi
et al., "Numerical behavior of NVIDIA tensor cores", 2021): each 16 products exactly, then added to the
float32 sum and rounded towards zero. "In slices" adds sums of 128 products in float32, rounded to nearest.

The cost counts products of 16-bit types, one of TF32 as 2. Y Y' is symmetric: its lo hi is hi lo transposed
and costs nothing. Computing half of its hi hi alone would save 0.5 more, of TF32 1.
"""

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent.parent))

from grassmann_optimizer import SGDG, orthogonality_gradient, project, unit

SCALE = 2.0**14  # exact; keeps what counts of a unit row above float16's smallest numbers


def tf32(x: Tensor) -> Tensor:
    """float32 rounded to TF32's 10 bits of mantissa, to nearest."""
    return ((x.contiguous().view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)


def bfloat16(x: Tensor) -> Tensor:
    """float32 rounded to bfloat16."""
    return x.bfloat16().float()


def float16(x: Tensor) -> Tensor:
    """float32, at most 2 in magnitude, rounded to float16 after scaling."""
    return (x * SCALE).half().float() / SCALE


def truncated(a: Tensor, b: Tensor) -> Tensor:
    """a @ b, float32, with a sum that is rounded towards zero after each 16 products."""
    total = torch.zeros(len(a), b.shape[1], dtype=torch.float64)
    for i in range(0, a.shape[1], 16):
        total = total.addmm(a[:, i : i + 16].double(), b[i : i + 16].double())
        total = (total.view(torch.int64) & ~(2**29 - 1)).view(torch.float64)  # to float32's 24 bits
    return total.float()


def in_slices(a: Tensor, b: Tensor) -> Tensor:
    """The same with the sums of each 128 products added in float32."""
    return sum(truncated(a[:, i : i + 128], b[i : i + 128]) for i in range(0, a.shape[1], 128))


class Narrow(NamedTuple):
    """A way to multiply: an operand's rounding, the parts that it is split into before, how products are
    summed."""

    rounded: Callable[[Tensor], Tensor]
    parts: int
    matmul: Callable[[Tensor, Tensor], Tensor] = torch.matmul

    def split(self, x: Tensor) -> list[Tensor]:
        """Tensors of the narrow type whose sum is x but for rounding, the largest first."""
        parts = []
        for _ in range(self.parts):
            parts.append(self.rounded(x))
            x = x - parts[-1]
        return parts

    def product(self, a: Tensor, b: Tensor) -> Tensor:
        """a @ b from the products of parts that are not below the last part's size, the smallest first."""
        left, right, n = self.split(a), self.split(b), self.parts
        pairs = [(i, size - i) for size in reversed(range(n)) for i in range(size + 1)]
        return torch.stack([self.matmul(left[i], right[j]) for i, j in pairs]).sum(0)

    def cost(self, symmetric: bool) -> int:
        """Products of 16-bit types; of a symmetric result one of (i, j) and (j, i) is enough."""
        pairs = [(i, j) for i in range(self.parts) for j in range(self.parts - i)]
        return (2 if self.rounded is tf32 else 1) * sum(i <= j or not symmetric for i, j in pairs)


class Way(NamedTuple):
    """A way to compute the gradient: `orthogonality_gradient` with narrow products."""

    first: Narrow  # Y Y'
    second: Narrow  # (Y Y' - I) Y

    def __call__(self, y: Tensor) -> Tensor:
        gram = self.first.product(y, y.T)
        gram.diagonal().sub_(1)
        return 2 * self.second.product(gram, y)

    def cost(self) -> int:
        """Of both products."""
        return self.first.cost(symmetric=True) + self.second.cost(symmetric=False)


def other_order(y: Tensor) -> Tensor:
    """The same gradient with I subtracted after the second product."""
    return 2 * ((y @ y.T) @ y - y)


WAYS = {
    "float32": orthogonality_gradient,
    "float32, I afterwards": other_order,
    "tf32": Way(Narrow(tf32, 1), Narrow(tf32, 1)),
    "bfloat16": Way(Narrow(bfloat16, 1), Narrow(bfloat16, 1)),
    "float16": Way(Narrow(float16, 1), Narrow(float16, 1)),
    "3 x tf32": Way(Narrow(tf32, 2), Narrow(tf32, 2)),
    "3 x tf32, then 1 x": Way(Narrow(tf32, 2), Narrow(tf32, 1)),
    "3 x bfloat16": Way(Narrow(bfloat16, 2), Narrow(bfloat16, 2)),
    "6 x bfloat16": Way(Narrow(bfloat16, 3), Narrow(bfloat16, 3)),
    "6 x bfloat16, then 3 x": Way(Narrow(bfloat16, 3), Narrow(bfloat16, 2)),
    "3 x float16": Way(Narrow(float16, 2), Narrow(float16, 2)),
    "3 x float16, then 1 x": Way(Narrow(float16, 2), Narrow(float16, 1)),
    "3 x float16, truncated": Way(*2 * [Narrow(float16, 2, truncated)]),
    "3 x float16, in slices": Way(*2 * [Narrow(float16, 2, in_slices)]),
}


def nearly_orthogonal(y: Tensor, steps: int) -> Tensor:
    """Rows after some steps of SGD-G on the regularizer alone."""
    p = torch.nn.Parameter(y.clone())
    p.grad = torch.zeros_like(p)
    optimizer = SGDG([p], lr=0.2, momentum=0.9, grassmann=True, omega=0.1)
    for _ in range(steps):
        optimizer.step()
    return unit(p.detach())[0]


def measure(y: Tensor) -> dict:
    """How far from orthogonal unit rows (rows, n) are, and each way's error on them."""
    exact = project(y.double(), orthogonality_gradient(y.double()))
    gram = y.double() @ y.double().T
    off = (gram - torch.eye(len(y), dtype=gram.dtype)).norm().item()
    errors = {way: ((project(y, f(y)) - exact).norm() / exact.norm()).item() for way, f in WAYS.items()}
    return {"off_orthogonal": off, "errors": errors}


def main(argv: list[str] | None = None) -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--rows", type=int, default=640)
    parser.add_argument("--columns", type=int, default=5760)
    parser.add_argument("--json", type=Path, help="write the figures here")
    args = parser.parse_args(argv)
    torch.manual_seed(0)
    random = unit(torch.randn(args.rows, args.columns))[0]
    figures = {"random": measure(random)}
    for steps in (20, 60, 100):
        figures[f"{steps} steps"] = measure(nearly_orthogonal(random, steps))
    costs = {way: f.cost() for way, f in WAYS.items() if isinstance(f, Way)}
    print(f"Relative error of the projected gradient, {args.rows} rows of {args.columns} elements")
    print(f"{'':24}{'cost':>5}" + "".join(f"{name:>12}" for name in figures))
    off = "".join(f"{each['off_orthogonal']:12.1e}" for each in figures.values())
    print(f"{'distance from orthogonal':29}{off}")
    for way in WAYS:
        errors = "".join(f"{each['errors'][way]:12.1e}" for each in figures.values())
        print(f"{way:24}{costs.get(way, ''):>5}{errors}")
    if args.json:
        result = {"rows": args.rows, "columns": args.columns, "costs": costs, "figures": figures}
        args.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
