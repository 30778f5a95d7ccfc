"""Time of one optimizer step on a Wide ResNet's parameters, all variants taking turns in one process.

    python benchmarks/optimizer_step.py --depth 28 --width 10 [--device cuda] [--rounds 15] [--json FILE]

Every variant updates the same parameters with the same random gradients. SGD has the paper's options
(Nesterov momentum, weight decay); "plain rule" is the paper, weight by weight. The floor of a step is a copy
of the bytes that it moves, and with the regularizer its matrix products besides. Peak memory is what a step
holds and frees again. geoopt's RiemannianSGD and adamp's SGDP are included where both are installed.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable
from itertools import accumulate
from pathlib import Path
from statistics import median

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

try:
    import adamp
    import geoopt
except ImportError:
    adamp = geoopt = None

import grassmann_optimizer as go
from resnet import WideResNet
from utils import environment

SGD, COPY, PRODUCTS = "SGD foreach", "copy of a step's bytes", "matrix products alone"


class PlainOptimizer(torch.optim.Optimizer):
    """`sgdg_update` or `adamg_update` weight by weight; for groups not on G(1,n) torch's SGD, likewise."""

    def __init__(self, groups: list[dict]):
        super().__init__(groups, {})
        rest = [group for group in groups if not group.get("grassmann")]
        self.sgd = torch.optim.SGD([{**group, "foreach": False, "fused": False} for group in rest])

    @torch.no_grad()
    def step(self) -> None:
        self.sgd.step()
        for group in self.param_groups:
            for p in group["params"] if group.get("grassmann") else []:
                p.copy_(self._stepped(p.flatten(1), p.grad.flatten(1), self.state[p], group).view_as(p))

    def _stepped(self, y: Tensor, g: Tensor, state: dict, group: dict) -> Tensor:
        options = {name: group[name] for name in ("lr", "omega", "grad_clip")}
        tau = state.get("tau", torch.zeros_like(y))  # m of Adam-G
        if "beta2" not in group:
            y, state["tau"] = go.sgdg_update(y, g, tau, momentum=group["momentum"], **options)
            return y
        options |= {"beta1": group["momentum"], "beta2": group["beta2"], "epsilon": group["epsilon"]}
        state["step"] = state.get("step", y.new_zeros(())) + 1
        v = state.get("v", y.new_zeros(len(y), 1))
        y, state["tau"], state["v"] = go.adamg_update(y, g, tau, v, state["step"], **options)
        return y


def make_variants(model: nn.Module) -> dict[str, Callable[[], object]]:
    """Name -> one step. Parameters have gradients already; rows on G(1,n) become unit rows."""
    params = list(model.parameters())
    weights = go.grassmann_weights(model).values()
    matrices = [nn.Parameter(go.unit(p.detach().flatten(1))[0]) for p in weights]
    for matrix, p in zip(matrices, weights, strict=True):
        matrix.grad = p.grad.flatten(1)
    momentum = {"lr": 1e-4, "momentum": 0.9}
    options = {**momentum, "weight_decay": 5e-4, "nesterov": True}
    variants = {
        SGD: torch.optim.SGD(params, foreach=True, **options).step,
        "SGD fused": torch.optim.SGD(params, fused=True, **options).step,
    }
    for name, cls in (("SGDG", go.SGDG), ("AdamG", go.AdamG), ("plain rule", PlainOptimizer)):
        for omega in (0.0, 0.1):
            groups = go.grassmann_param_groups(model, lr=0.01, lrg=0.2, omega=omega)
            variants[f"{name} omega={omega:g}"] = cls(groups).step
    variants[PRODUCTS] = lambda: [(y @ y.T) @ y for y in map(Tensor.detach, matrices)]
    # A step reads y, g, tau and writes y, tau; a copy reads one and writes one.
    source = torch.randn(sum(p.numel() for p in params) * 5 // 2, device=params[0].device)
    target = torch.empty_like(source)
    variants[COPY] = lambda: target.copy_(source)
    variants["Muon, the matrices on G(1,n)"] = torch.optim.Muon(matrices, lr=1e-4).step
    if geoopt and adamp:
        spheres = [geoopt.ManifoldParameter(m.data, manifold=geoopt.SphereExact()) for m in matrices]
        for sphere, matrix in zip(spheres, matrices, strict=True):
            sphere.grad = matrix.grad
        variants["geoopt RiemannianSGD, the same"] = geoopt.optim.RiemannianSGD(spheres, 1e-4, 0.9).step
        variants["adamp SGDP, the same"] = adamp.SGDP(matrices, **momentum, nesterov=True).step
    return variants


def seconds(step: Callable[[], object], cuda: bool) -> float:
    """Of one step, the device's work included."""
    wait(cuda)
    start = time.perf_counter()
    step()
    wait(cuda)
    return time.perf_counter() - start


def wait(cuda: bool) -> None:
    if cuda:
        torch.cuda.synchronize()


def peak_memory(step: Callable[[], object], cuda: bool) -> int:
    """Largest number of bytes that one step holds besides what was there before it."""
    if cuda:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = accumulate(event.nbytes() for event in sorted(events, key=lambda e: e.start_ns()))
    return max(held, default=0)


def table(times: dict[str, list[float]], peaks: dict[str, int]) -> str:
    """Each variant's seconds and peak bytes as a table, and how far SGDG is above the floor."""
    medians = {name: median(values) for name, values in times.items()}
    lines = [f"{'':30} {'median ms':>10} {'min':>9} {'/ SGD foreach':>14} {'peak MB':>9}"]
    for name, value in medians.items():
        numbers = f"{1e3 * value:10.2f} {1e3 * min(times[name]):9.2f} {value / medians[SGD]:14.2f}"
        lines.append(f"{name:30} {numbers} {peaks[name] / 1e6:9.1f}")
    plain = medians["SGDG omega=0"] / medians[COPY]
    regularized = medians["SGDG omega=0.1"] / (medians[COPY] + medians[PRODUCTS])
    lines.append(f"SGDG over the floor: omega=0: {plain:.2f}, omega=0.1: {regularized:.2f}")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--depth", type=int, default=28)
    parser.add_argument("--width", type=int, default=10)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--rounds", type=int, default=15, help="times that each variant takes its turn")
    parser.add_argument("--json", type=Path, help="write all times here")
    args = parser.parse_args(argv)
    cuda = args.device == "cuda"
    torch.manual_seed(0)
    model = WideResNet(args.depth, args.width, 10).to(args.device, memory_format=torch.channels_last)
    for p in model.parameters():
        p.grad = torch.randn_like(p) * 1e-3
    variants = make_variants(model)
    for step in variants.values():  # state, code caches, and on a GPU the kernel's compilation
        step()
        step()
    peaks = {name: peak_memory(step, cuda) for name, step in variants.items()}
    rounds = [[seconds(step, cuda) for step in variants.values()] for _ in range(args.rounds)]
    times = dict(zip(variants, map(list, zip(*rounds, strict=True)), strict=True))
    where, count = environment(torch.device(args.device)), sum(p.numel() for p in model.parameters())
    print(f"WRN-{args.depth}-{args.width}, {count:,} parameters, {args.rounds} interleaved rounds")
    print(f"{where['device']}, {where['threads']} threads, torch {where['torch']}")
    print(table(times, peaks))
    if args.json:
        data = {**where, "depth": args.depth, "width": args.width, "seconds": times, "peak_bytes": peaks}
        args.json.write_text(json.dumps(data, indent=1) + "\n")


if __name__ == "__main__":
    main()
