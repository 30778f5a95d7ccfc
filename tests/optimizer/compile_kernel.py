"""Compile the optimizers' Triton kernel for GPUs that need not be there, and print what it takes, as JSON.

    python tests/optimizer/compile_kernel.py "75 80 86 89 90 100 120" "32 1024 8192"

Compute capabilities, and lengths of a row. Each entry: capability, length, method, a thread's
registers, its bytes of stack (some 32 of which belong to sine and cosine; the rest is spilled registers).
"""

import json
import re
import subprocess
import sys
import tempfile
from collections import defaultdict
from itertools import product
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

sys.path.insert(0, str(Path(__file__).parents[2]))

import grassmann_optimizer as go

CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
TYPES = {torch.float32: "*fp32", int: "i32", float: "fp32", type(None): "constexpr"}


def resources(kernel, arguments, options, capability: int) -> tuple[int, int]:
    """Registers and bytes of stack of a thread."""
    sizes = {name: options.pop(name) for name in ("ADAM", "CLIP", "SIZE")}
    values = dict(zip(kernel.arg_names, arguments, strict=False))
    types = {k: TYPES[v.dtype if isinstance(v, torch.Tensor) else type(v)] for k, v in values.items()}
    constants = sizes | {k: v for k, v in values.items() if v is None}
    source = ASTSource(kernel, {**types, **dict.fromkeys(sizes, "constexpr")}, constexprs=constants)
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        words = [CUOBJDUMP, "--dump-resource-usage", file.name]
        text = subprocess.run(words, capture_output=True, text=True, check=True).stdout
    return int(re.search(r"REG:(\d+)", text)[1]), int(re.search(r"STACK:(\d+)", text)[1])


def main(capabilities: str, lengths: str) -> None:
    kernel, launches, found = go._advance_kernel, [], []  # arguments and options, instead of a launch
    go._advance_kernel = defaultdict(
        lambda: lambda *arguments, **options: launches.append((arguments, options))
    )
    for capability, n in product(map(int, capabilities.split()), map(int, lengths.split())):
        for method, v in {"SGD-G": None, "Adam-G": torch.zeros(2, 1)}.items():
            y = torch.zeros(2, n)
            go._launch(y, y, y, v, torch.zeros(1), 0, decay=0.9, grad_clip=0.1)
            found.append([capability, n, method, *resources(kernel, *launches.pop(), capability)])
    print(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
