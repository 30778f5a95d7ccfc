"""One network with each method: a whole run of main.py on six pictures. Called by smoke_all.sh.

    python scripts/smoke_network.py wrn-28-10 DIRECTORY

The three runs share a process: to import PyTorch takes longer than such a run of most networks.
"""

import contextlib
import os
import shutil
import sys
import time
from pathlib import Path

import cv2
import numpy as np
from sweep import model_flags

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import main


def write_pictures(root: Path) -> None:
    """A `folder` of noise in two classes: two pictures of each to train, one to test."""
    for part, count in (("train", 2), ("test", 1)):
        for label in ("0", "1"):
            (root / part / label).mkdir(parents=True)
            for number in range(count):
                picture = np.random.default_rng(number).integers(0, 256, (32, 32, 3), np.uint8)
                cv2.imwrite(str(root / part / label / f"{number}.png"), picture)


def train(model: str, method: str, scratch: Path) -> bool:
    """Whether two steps, an evaluation and a checkpoint went well; prints one line, or the reason."""
    save, output, started = scratch / method, scratch / "output.txt", time.monotonic()
    data = ["--dataset", "folder", "--dataroot", str(scratch / "pictures")]
    short = ["--batchSize", "2", "--epochs", "1", "--epoch_step", "[]", "--nthread", "0", "--save", str(save)]
    with output.open("w") as file, contextlib.redirect_stdout(file), contextlib.redirect_stderr(file):
        code = main.main([*model_flags(model), "--optim_method", method, *data, *short])
    whole = code == 0 and all((save / name).is_file() for name in ("checkpoint.pt", "log.txt"))
    result = f"ok      {model} {method} ({time.monotonic() - started:.0f} s)\n"
    if not whole:
        last_lines = "".join(output.read_text().splitlines(keepends=True)[-5:])
        result = f"FAILED  {model} {method} with exit code {code}:\n{last_lines}"
    os.write(1, result.encode())  # at once: other networks write to the same place
    shutil.rmtree(save, ignore_errors=True)  # checkpoints of up to 450 MB
    return whole


if __name__ == "__main__":
    model, scratch = sys.argv[1], Path(sys.argv[2], sys.argv[1])
    write_pictures(scratch / "pictures")
    sys.exit(not all([train(model, method, scratch) for method in ("SGD", "SGDG", "AdamG")]))
