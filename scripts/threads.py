"""Exit code 0 where one thread trains faster than the default number, by half at least.

So it is where other programs use the cores, or a container may use but a few: threads wait for each other.
Measured once, on 2 cores: 60 images/s instead of 400.
"""

import sys
import time
from collections.abc import Callable

import torch
from torch import nn


def seconds_of_steps(threads: int) -> float:
    """Seconds of four steps on 32 images, after one to warm up."""
    torch.set_num_threads(threads)
    model = nn.Sequential(*[nn.Conv2d(16, 16, 3, padding=1) for _ in range(8)])
    images = torch.randn(32, 16, 32, 32)
    for step in range(5):
        if step == 1:
            started = time.perf_counter()
        model(images).sum().backward()
    return time.perf_counter() - started


def one_is_faster(threads: int, seconds: Callable[[int], float]) -> bool:
    """Whether one thread beats the default number, by the seconds that a number of threads takes."""
    return threads > 1 and 1.5 * seconds(1) < seconds(threads)


if __name__ == "__main__":
    sys.exit(torch.cuda.is_available() or not one_is_faster(torch.get_num_threads(), seconds_of_steps))
