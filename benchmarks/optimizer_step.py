"""Time of one optimizer step on a Wide ResNet's parameters, all variants taking turns in one process.

    python benchmarks/optimizer_step.py --depth 28 --width 10 [--device cuda] [--rounds 15] [--json FILE]

Every variant updates the same parameters with the same random gradients, so that only the optimizers differ.
SGD has the paper's options (Nesterov momentum, weight decay) unless said otherwise. Prints medians, the ratio
to torch.optim.SGD(foreach=True), and the peak of the memory that a step allocates and frees. geoopt's
RiemannianSGD and adamp's SGDP are included where they are installed.
"""

import argparse
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

sys.path.insert(0, str(Path(__file__).parent.parent))

import grassmann_optimizer as go
from resnet import WideResNet

GRASSMANN = "grassmann"


def make_variants(model: nn.Module) -> dict[str, Callable[[], object]]:
    """Name -> one step. Parameters have gradients already; rows on G(1,n) are unit rows."""
    options = {"lr": 0.01, "lrg": 0.2}
    names = {group["name"]: group["params"] for group in go.grassmann_param_groups(model, **options)}
    on_grassmann, params = names[GRASSMANN], [p for p in model.parameters()]
    sgd = {"lr": 1e-4, "momentum": 0.9, "weight_decay": 5e-4, "nesterov": True}
    variants = {
        "SGD foreach": torch.optim.SGD(params, foreach=True, **sgd).step,
        "SGD foreach, momentum only": torch.optim.SGD(params, foreach=True, lr=1e-4, momentum=0.9).step,
        "SGD fused": torch.optim.SGD(params, fused=True, **sgd).step,
    }
    for cls in (go.SGDG, go.AdamG):
        for omega in (0.0, 0.1):
            optimizer = cls(go.grassmann_param_groups(model, omega=omega, **options))
            variants[f"{cls.__name__} omega={omega:g}"] = optimizer.step
    matrices = [as_matrix(p) for p in on_grassmann]
    for omega in (0.0, 0.1):
        variants[f"plain rule omega={omega:g}"] = plain_rule(matrices, omega)
    variants["matrix products alone"] = matrix_products(matrices)
    variants["copy of a step's bytes"] = copies(params)
    variants["Muon, the matrices on G(1,n)"] = torch.optim.Muon(matrices, lr=1e-4).step
    variants.update(installed_elsewhere(matrices))
    return variants


def as_matrix(p: Tensor) -> nn.Parameter:
    """A channels_last weight's rows as a parameter (rows, n) that shares its memory, and its gradient's."""
    matrix = nn.Parameter(p.detach().permute(0, 2, 3, 1).view(p.shape[0], -1))
    matrix.grad = p.grad.permute(0, 2, 3, 1).view(p.shape[0], -1)
    return matrix


def plain_rule(matrices: list[Tensor], omega: float) -> Callable[[], None]:
    """SGD-G as it stands in the paper: `sgdg_update`, layer by layer, with all its temporaries."""
    momentum = [torch.zeros_like(y) for y in matrices]
    options = {"lr": 0.2, "momentum": 0.9, "omega": omega, "grad_clip": 0.1}

    @torch.no_grad()
    def step() -> None:
        for y, tau in zip(matrices, momentum, strict=True):
            new_y, new_tau = go.sgdg_update(y, y.grad, tau, **options)
            y.copy_(new_y)
            tau.copy_(new_tau)

    return step


def matrix_products(matrices: list[Tensor]) -> Callable[[], None]:
    """The regularizer's two products, Y Y' and (Y Y') Y, of every layer."""

    @torch.no_grad()
    def step() -> None:
        for y in matrices:
            (y @ y.T) @ y

    return step


def copies(params: list[Tensor]) -> Callable[[], None]:
    """Copy the bytes that a step moves: it reads y, g, tau, writes y, tau; a copy reads one, writes one."""
    sizes = [p.numel() for p in params]
    source = torch.randn(sum(sizes) * 5 // 2, device=params[0].device)
    target = torch.empty_like(source)
    return lambda: target.copy_(source)


def installed_elsewhere(matrices: list[Tensor]) -> dict[str, Callable[[], object]]:
    """Steps of other packages' optimizers, where they are installed."""
    variants = {}
    try:
        import geoopt

        spheres = [geoopt.ManifoldParameter(m.data, manifold=geoopt.SphereExact()) for m in matrices]
        for sphere, matrix in zip(spheres, matrices, strict=True):
            sphere.grad = matrix.grad
        optimizer = geoopt.optim.RiemannianSGD(spheres, lr=1e-4, momentum=0.9)
        variants["geoopt RiemannianSGD, the same"] = optimizer.step
    except ImportError:
        print("geoopt is not installed: left out")
    try:
        import adamp

        variants["adamp SGDP, the same"] = adamp.SGDP(matrices, lr=1e-4, momentum=0.9, nesterov=True).step
    except ImportError:
        print("adamp is not installed: left out")
    return variants


def seconds(step: Callable[[], object], cuda: bool) -> float:
    """One step, the device's work included."""
    if cuda:
        torch.cuda.synchronize()
    start = time.perf_counter()
    step()
    if cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - start


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
    held = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def main(argv: list[str] | None = None) -> None:
    """Measure and print the table."""
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
    times: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(args.rounds):
        for name, step in variants.items():
            times[name].append(seconds(step, cuda))

    report(args, model, times, peaks)


def report(args: argparse.Namespace, model: nn.Module, times: dict[str, list[float]], peaks: dict) -> None:
    """Print the table and write the JSON."""
    medians = {name: statistics.median(values) for name, values in times.items()}
    device = torch.cuda.get_device_name() if args.device == "cuda" else f"{platform.machine()} CPU"
    parameters = sum(p.numel() for p in model.parameters())
    title = f"WRN-{args.depth}-{args.width}, {parameters:,} parameters, {device}"
    versions = f"{torch.get_num_threads()} threads, torch {torch.__version__}"
    print(f"{title}, {versions}, {args.rounds} interleaved rounds")
    print(f"{'':30} {'median ms':>10} {'min':>9} {'/ SGD foreach':>14} {'peak MB':>9}")
    for name, median in medians.items():
        ratio = median / medians["SGD foreach"]
        least, peak = 1e3 * min(times[name]), peaks[name] / 1e6
        print(f"{name:30} {1e3 * median:10.2f} {least:9.2f} {ratio:14.2f} {peak:9.1f}")
    floor = {omega: medians["copy of a step's bytes"] for omega in ("0", "0.1")}
    floor["0.1"] += medians["matrix products alone"]
    print("SGDG over the floor (copy; with omega the matrix products besides):", end="")
    ratios = {omega: medians[f"SGDG omega={omega}"] / value for omega, value in floor.items()}
    print(*(f" omega={omega}: {ratio:.2f}" for omega, ratio in ratios.items()), sep=",")
    if args.json:
        data = {"device": device, "threads": torch.get_num_threads(), "torch": str(torch.__version__)}
        data |= {"depth": args.depth, "width": args.width, "seconds": times, "peak_bytes": peaks}
        args.json.write_text(json.dumps(data, indent=1) + "\n")


if __name__ == "__main__":
    main()
