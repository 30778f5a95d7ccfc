"""Train as main.py does with another optimizer: SGD-G with one part changed, or what one would pick today.

    python benchmarks/peers.py METHOD --json FILE [--test DIR] [--fc_lr RATE] [main.py's flags]

FILE gets the options, each epoch's losses and test error, and the error on all images of DIR/test. --lrg is
the rate of the rows, the weights that SGD-G has on G(1,n), --lr that of all else. sgd and sgdg are main.py's
own optimizers, with --fc_lr for the last layer alone.
"""

import argparse
import io
import json
import re
import sys
import tempfile
from contextlib import redirect_stdout
from importlib import import_module
from pathlib import Path
from unittest import mock

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import grassmann_optimizer as go
import main as program

SGD, SGDG = ("--optim_method", "SGD"), ("--optim_method", "SGDG")
BARE = (*SGDG, "--omega", "0", "--grad_clip", "none")
METHODS = {  # flags that main.py makes the groups by; optimizer of the rows, and of the rest
    "sgd": (SGD,), "sgdg": (SGDG,), "adamw": (SGD, "AdamW", "AdamW"), "sgdp": (SGD, "SGDP", "SGDP"),
    "muon": (BARE, "Muon", "AdamW"), "adamh": (BARE, "AdamH", "AdamW"), "bare": (BARE, "Rows", "SGD"),
    "rsgd": (BARE, "RiemannianSGD", "SGD"),  # geoopt's
    "exact": (SGDG, "Rows", "SGD"),  # other than sgdg in rounding alone
    "retract": (SGDG, "Rows, retracting", "SGD"),  # without Eq. 7
    "untransported": (SGDG, "Rows, untransported", "SGD"),  # without Eq. 8
    "oblique": (SGDG, "Rows, retracting, untransported", "SGD"),
}  # fmt: skip


class Rows(torch.optim.Optimizer):
    """SGD-G on matrices of rows (rows, n) as `sgdg_update` defines it, or with a part of it changed.

    retracting: y goes to (y + d) / |y + d|, by the angle atan |d| instead of |d|; Eq. 8 by that angle.
    untransported: tau stays the same vector, and a step is its part that is tangent at y.
    """

    @torch.no_grad()
    def step(self):
        (group,) = self.param_groups
        for p in group["params"]:
            tau = self.state[p].setdefault("momentum_buffer", torch.zeros_like(p))
            y, _ = go.unit(p)
            h = go.project(y, p.grad + group["omega"] * go.orthogonality_gradient(y))
            h = go.clip_by_norm(h, group["grad_clip"] or float("inf"))
            tau.mul_(group["momentum"]).sub_(group["lr"] * h)
            d = go.project(y, tau)  # tau itself, if it is transported
            u, length = go.unit(d)
            retracts = "retracting" in group["changes"]
            p.copy_(go.unit(y + d)[0] if retracts else go.exp_map(y, d))
            if "untransported" not in group["changes"]:
                tau.copy_(go.parallel_translate(d, y, u * length.atan() if retracts else d))


class AdamH(torch.optim.Adam):
    """Hyperball (arXiv 2606.16899): W becomes R N(W - lr R N(u)); u Adam's step, R = |W|, N(x) = x / |x|."""

    @torch.no_grad()
    def step(self):
        group, lr = self.param_groups[0], self.param_groups[0]["lr"]
        before = [w.clone() for w in group["params"]]
        group["lr"] = 1.0
        super().step()  # leaves W - u
        group["lr"] = lr
        for w, old in zip(group["params"], before, strict=True):
            u, radius = old - w, old.norm()
            w.copy_(old - lr * radius / u.norm() * u)
            w *= radius / w.norm()


def make_part(name: str, params: list[nn.Parameter], group: dict) -> torch.optim.Optimizer:
    """The optimizer that METHODS names, of a group of main.py's; what no flag gives is its default."""
    lr, momentum, decay = group["lr"], group["momentum"], {"weight_decay": group["weight_decay"]}
    if name.startswith("Rows"):
        return Rows([{**group, "params": params, "changes": name}], {})
    if name in ("SGD", "SGDP"):  # arXiv 2006.08217
        cls = torch.optim.SGD if name == "SGD" else import_module("adamp").SGDP
        return cls(params, lr, momentum, nesterov=momentum > 0, **decay)
    if name == "RiemannianSGD":
        geoopt = import_module("geoopt")
        params = [geoopt.ManifoldParameter(p.data, manifold=geoopt.SphereExact()) for p in params]
        return geoopt.optim.RiemannianSGD(params, lr, momentum)
    if name == "Muon":  # rates scaled as AdamW's: arXiv 2502.16982
        return torch.optim.Muon(params, lr, adjust_lr_fn="match_rms_adamw")
    return AdamH(params, lr) if name == "AdamH" else torch.optim.AdamW(params, lr, **decay)


class Peer(torch.optim.Optimizer):
    """The optimizers of main.py's groups, at the groups' rates; convolutions as matrices of rows."""

    def __init__(self, groups: list[dict], of_rows: str, of_rest: str):
        super().__init__(groups, {})
        names = [of_rows if group.get("grassmann") else of_rest for group in groups]
        params = [[nn.Parameter(matrix(p.data)) for p in group["params"]] for group in groups]
        self.parts = list(map(make_part, names, params, groups))

    @torch.no_grad()
    def step(self):
        for group, part in zip(self.param_groups, self.parts, strict=True):
            part.param_groups[0]["lr"] = group["lr"]
            for p, m in zip(group["params"], part.param_groups[0]["params"], strict=True):
                m.grad = matrix(p.grad)
            part.step()


def matrix(t: Tensor) -> Tensor:
    """A convolution's weight as its rows (rows, n): a view where it is channels_last; others as they are."""
    return t.movedim(1, -1).flatten(1) if t.ndim > 2 else t


def split_off(layer: nn.Module, optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Give the layer's parameters groups of their own, at the rate lr."""
    own = set(layer.parameters())
    for group in list(optimizer.param_groups):
        if last := [p for p in group["params"] if p in own]:
            group["params"] = [p for p in group["params"] if p not in own]
            optimizer.add_param_group({**group, "params": last, "lr": lr, "name": f"fc, {group['name']}"})


def evaluate(save: str, root: str) -> dict:
    """Loss and error in % on all images of root/test, normalized as the run's."""
    with redirect_stdout(io.StringIO()) as out:
        program.main(["--resume", save, "--eval", "--dataset", "folder", "--dataroot", root])
    images, loss, error = re.search(r"on (\S+) .*\nloss (\S+), top-1 error (\S+)%", out.getvalue()).groups()
    return {"images": int(images.replace(",", "")), "loss": float(loss), "error": float(error)}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], allow_abbrev=False)
    parser.add_argument("method", choices=METHODS)
    parser.add_argument("--json", type=Path, required=True, metavar="FILE", help="the result's")
    parser.add_argument("--test", metavar="DIR", help="evaluate on the images in DIR/test at the end")
    parser.add_argument("--fc_lr", type=float, metavar="RATE", help="of the last layer alone")
    args, words = parser.parse_known_args(argv)
    flags, *names = METHODS[args.method]
    own = program.make_optimizer

    def make_optimizer(model, options):
        optimizer = own(model, options)
        if args.fc_lr is not None:
            split_off(model.fc, optimizer, args.fc_lr)
        return Peer(optimizer.param_groups, *names) if names else optimizer

    with tempfile.TemporaryDirectory() as save:  # checkpoints too, which nobody can resume
        # main.py has no flag for other optimizers; with this one name replaced, all else is its own.
        with mock.patch.object(program, "make_optimizer", make_optimizer):
            if code := program.main([*flags, *words, "--save", save]):
                sys.exit(code)
        log = [json.loads(line.partition(": ")[2]) for line in Path(save, "log.txt").read_text().splitlines()]
        names_of = ("train_loss", "test_loss", "angle_degrees")
        epochs = {name: [line[name] for line in log] for name in names_of}
        epochs["test_error"] = [round(100 - line["test_acc"], 4) for line in log]
        result = {"method": args.method, "optimizers": names, "fc_lr": args.fc_lr, "epochs": epochs}
        result |= json.loads(Path(save, "config.json").read_text())
        result["test"] = evaluate(save, args.test) if args.test else None
    args.json.parent.mkdir(parents=True, exist_ok=True)
    args.json.write_text(json.dumps(result) + "\n")


if __name__ == "__main__":
    main()
