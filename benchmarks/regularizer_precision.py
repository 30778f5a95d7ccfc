"""How far reduced precision in the matrix products turns the regularizer's gradient.

    python benchmarks/regularizer_precision.py [--rows 640] [--columns 5760] [--json FILE]

For random unit rows, and for rows that the regularizer itself has made nearly orthogonal, the gradient
2 (Y Y' - I) Y, projected onto the tangent spaces, is compared with float64: |error| / |gradient|, all rows.
"tf32" and "bfloat16" round both operands of a product to that type and accumulate in float32, as the hardware
does; "I afterwards" is the other order, 2 (Y Y' Y - Y).
"""

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent.parent))

from grassmann_optimizer import SGDG, orthogonality_gradient, project, unit


def tf32(x: Tensor) -> Tensor:
    """float32 rounded to TF32's 10 bits of mantissa, to nearest."""
    return ((x.contiguous().view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)


def bfloat16(x: Tensor) -> Tensor:
    """float32 rounded to bfloat16."""
    return x.bfloat16().float()


def rounded_gradient(y: Tensor, rounded: Callable[[Tensor], Tensor]) -> Tensor:
    """`orthogonality_gradient` with the operands of both products rounded."""
    gram = rounded(y) @ rounded(y).T
    gram.diagonal().sub_(1)
    return 2 * rounded(gram) @ rounded(y)


def other_order(y: Tensor) -> Tensor:
    """The same gradient with I subtracted after the second product."""
    return 2 * ((y @ y.T) @ y - y)


def nearly_orthogonal(y: Tensor, steps: int) -> Tensor:
    """Rows after some steps of SGD-G on the regularizer alone."""
    p = torch.nn.Parameter(y.clone())
    p.grad = torch.zeros_like(p)
    optimizer = SGDG([p], lr=0.2, momentum=0.9, grassmann=True, omega=0.1)
    for _ in range(steps):
        optimizer.step()
    return unit(p.detach())[0]


def main(argv: list[str] | None = None) -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--rows", type=int, default=640)
    parser.add_argument("--columns", type=int, default=5760)
    parser.add_argument("--json", type=Path, help="write the figures here")
    args = parser.parse_args(argv)
    torch.manual_seed(0)
    random = unit(torch.randn(args.rows, args.columns))[0]
    ways = {
        "float32": orthogonality_gradient,
        "float32, I afterwards": other_order,
        "tf32": lambda y: rounded_gradient(y, tf32),
        "bfloat16": lambda y: rounded_gradient(y, bfloat16),
    }
    figures = {}
    print(f"Relative error of the projected gradient, {args.rows} rows of {args.columns} elements")
    print(f"{'rows':16} {'off':>11} " + " ".join(f"{name:>21}" for name in ways))
    for steps in (0, 20, 60, 100):
        y, name = nearly_orthogonal(random, steps), f"after {steps} steps" if steps else "random"
        exact = project(y.double(), orthogonality_gradient(y.double()))
        errors = {way: ((project(y, f(y)) - exact).norm() / exact.norm()).item() for way, f in ways.items()}
        gram = y.double() @ y.double().T
        off = (gram - torch.eye(len(y), dtype=gram.dtype)).norm().item()
        print(f"{name:16} {off:11.1e} " + " ".join(f"{error:21.1e}" for error in errors.values()))
        figures[name] = {"off_orthogonal": off, "errors": errors}
    if args.json:
        result = {"rows": args.rows, "columns": args.columns, "figures": figures}
        args.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
