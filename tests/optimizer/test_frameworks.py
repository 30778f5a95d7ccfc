"""Other people's frameworks around both optimizers, really run, by the lines of docs/frameworks.md.

What is not installed is skipped: requirements-frameworks.txt has it all.
"""

import copy
import os
import re
import subprocess
import sys
from datetime import timedelta
from functools import partial
from pathlib import Path

import pytest
import torch
from helpers import ROOT
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel
from torch.testing import assert_close
from torch.utils.data import DataLoader

from grassmann_optimizer import SGDG, AdamG, grassmann_param_groups

BOTH = pytest.mark.parametrize("Optimizer", [SGDG, AdamG])


def run_lines(name, Optimizer, **names):
    """Run the lines of the page's row with these names and the optimizer for SGDG; all names."""
    page = (ROOT / "docs" / "frameworks.md").read_text()
    (row,) = re.findall(rf"^\| {re.escape(name)} \|.*$", page, flags=re.M)
    names |= {"torch": torch, "SGDG": Optimizer, "grassmann_param_groups": grassmann_param_groups}
    exec("\n".join(re.findall("`(.+?)`", row)), names)
    return names


class Net(nn.Module):
    """Small, with convolutions for G(1, n), of 5 and 7 rows. GroupNorm: no statistics of a batch."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Conv2d(3, 5, 3), nn.GroupNorm(1, 5), nn.ReLU(), nn.Conv2d(5, 7, 3))
        self.head = nn.Linear(28, 5)

    def forward(self, x):
        return self.head(self.body(x).flatten(1))


def images(count=8):
    generator = torch.Generator().manual_seed(5)
    return torch.randn(count, 3, 6, 6, generator=generator), torch.arange(count) % 5


def fit(model, optimizer, x, labels, steps=3):
    for _ in range(steps):
        optimizer.zero_grad()
        cross_entropy(model(x), labels).backward()
        optimizer.step()


def assert_same(model, other):
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), other.parameters(), strict=True))


def assert_on_grassmann(model):
    for i in (0, 3):
        assert_close(model.body[i].weight.detach().flatten(1).norm(dim=1), torch.ones(5 + 2 * (i > 0)))


# --------------------------------------------------------------------------------------- torch, two processes


def in_processes(work, folder, *arguments, count=2):
    """Run this file's function work(rank, folder, *arguments) in new processes; returns what they return."""
    path = os.pathsep.join(map(str, (ROOT, ROOT / "tests", *sys.path)))
    ranks = [
        subprocess.Popen(
            [sys.executable, __file__, work, str(rank), str(folder), *arguments],
            env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        )
        for rank in range(count)
    ]
    assert [rank.wait() for rank in ranks] == [0] * count
    return [torch.load(folder / f"{rank}.pt") for rank in range(count)]


def whole(t):
    return t.full_tensor() if hasattr(t, "full_tensor") else t


def by_name(model, state):
    """A state dict's state, whole, by the names of the parameters."""
    return {
        name: {key: whole(t).clone() for key, t in state[p].items()} for name, p in model.named_parameters()
    }


WRAPPERS = {
    "DistributedDataParallel": DistributedDataParallel,
    "ZeroRedundancyOptimizer": ZeroRedundancyOptimizer,
    "fully_shard": fully_shard,
}
CASES = [(name, Optimizer, 0.1) for name in list(WRAPPERS)[:2] for Optimizer in (SGDG, AdamG)]
CASES += [("FSDP2", Optimizer, omega) for Optimizer in (SGDG, AdamG) for omega in (0.0, 0.1)]


def train_half(rank, folder):
    patience = timedelta(seconds=60)
    store = f"file://{folder}/store"
    torch.distributed.init_process_group("gloo", init_method=store, rank=rank, world_size=2, timeout=patience)
    results = []
    for heading, Optimizer, omega in CASES:
        make = partial(run_lines, heading, Optimizer, omega=omega, **WRAPPERS)
        x, labels = (t[rank::2] for t in images())
        made = make(model=Net())
        model, optimizer = made["model"], made["optimizer"]
        fit(made.get("parallel", model), optimizer, x, labels)
        results.append([[whole(p).detach() for p in model.parameters()], None])
        if heading == "ZeroRedundancyOptimizer":
            optimizer.consolidate_state_dict(to=0)
            results[-1][1] = optimizer.state_dict()["state"] if rank == 0 else None
        else:
            results[-1][1] = by_name(model, optimizer.state)
        if heading == "FSDP2":
            resume_elsewhere(make, model, optimizer, f"{folder}/{Optimizer.__name__}{omega}", x, labels)
    for Optimizer in (SGDG, AdamG):
        refuse_other_shards(Optimizer)
        load_what_zero_left_out(Optimizer, rank)
    return results


def resume_elsewhere(make, model, optimizer, folder, x, labels):
    """By torch.distributed.checkpoint, from a fresh optimizer whose rows are of any length."""
    names = {"get_state_dict": get_state_dict, "set_state_dict": set_state_dict, "folder": folder}
    run_lines("saving by torch.distributed.checkpoint", SGDG, model=model, optimizer=optimizer, **names)
    made = make(model=Net())
    fresh, resumed = made["model"], made["optimizer"]
    with torch.no_grad():
        for p in fresh.parameters():
            p.mul_(1.3)
    before = parts(fresh)
    get_state_dict(fresh, resumed)
    assert all(map(torch.equal, parts(fresh), before))
    run_lines("loading by torch.distributed.checkpoint", SGDG, model=fresh, optimizer=resumed, **names)
    fit(model, optimizer, x, labels)
    fit(fresh, resumed, x, labels)
    assert all(map(torch.equal, parts(fresh), parts(model)))


def parts(model):
    return [p.to_local().detach().clone() for p in model.parameters()]


def refuse_other_shards(Optimizer):
    mesh = init_device_mesh("cpu", (2,))
    rows, columns = (nn.Parameter(distribute_tensor(torch.ones(4, 6), mesh, [Shard(i)])) for i in (0, 1))
    with pytest.raises(ValueError, match=r"whole rows.*Shard\(dim=1\)"):
        Optimizer([columns], grassmann=True)
    model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.Conv2d(4, 2, 1))
    nn.init.zeros_(fully_shard(model)[1].weight)
    with pytest.raises(ValueError, match=r"^1\.weight is zero"):
        grassmann_param_groups(model, 0.01, 0.2)
    plain = nn.Parameter(torch.ones(4, 6))
    plain.grad = torch.ones(4, 6)
    one = Optimizer([plain], grassmann=True)
    one.step()
    states = [one.state_dict() for _ in range(2)]
    momentum = states[1]["state"][0]["momentum_buffer"]
    states[1]["state"][0]["momentum_buffer"] = distribute_tensor(momentum, mesh, [Replicate()])
    for state in states:  # a copy on each process would be changed in its copy alone
        with pytest.raises(ValueError, match=r"not sharded alike.*torch\.distributed\.checkpoint"):
            Optimizer([rows], grassmann=True).load_state_dict(state)


def load_what_zero_left_out(Optimizer, rank):
    """A consolidated state has None for a parameter that has had no gradient."""
    p, idle = (nn.Parameter(torch.ones(4, 6)) for _ in range(2))
    zero = ZeroRedundancyOptimizer([p, idle], optimizer_class=Optimizer, lr=0.1, grassmann=True)
    for _ in range(2):
        p.grad = torch.ones(4, 6)
        zero.step()
        zero.consolidate_state_dict(to=0)
        if rank == 0:
            state = zero.state_dict()
            state["state"][1] = state["state"].get(1)
            one = Optimizer([p, idle], grassmann=True)
            one.load_state_dict(state)
            assert list(one.state) == [p]


def test_two_processes_train_as_one_on_the_joint_batch(tmp_path):
    first, second = in_processes("train_half", tmp_path)
    for (heading, Optimizer, omega), (ours, state), (others, _) in zip(CASES, first, second, strict=True):
        model = Net()
        optimizer = Optimizer(grassmann_param_groups(model, 0.1, 0.4, omega=omega))
        fit(model, optimizer, *images())
        for p, a, b in zip(model.parameters(), ours, others, strict=True):
            assert torch.equal(a, b), heading
            assert_close(a, p.detach(), rtol=0, atol=1e-6)
        zero = heading == "ZeroRedundancyOptimizer"
        expected = optimizer.state_dict()["state"] if zero else by_name(model, optimizer.state)
        assert state.keys() == expected.keys()
        for i, values in expected.items():
            for key, value in values.items():
                assert_close(state[i][key], value, rtol=0, atol=1e-6)


# ------------------------------------------------------------------------------------------------ trainers


def lightning_module(Optimizer):
    lightning = pytest.importorskip("lightning")

    class Lit(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = Net()

        def training_step(self, batch, _):
            x, labels = batch
            return cross_entropy(self.net(x), labels)

        configure_optimizers = run_lines("Lightning", Optimizer)["configure_optimizers"]

    return lightning, Lit()


def lightning_trainer(lightning, folder, epochs, **more):
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False}
    options = {"accelerator": "cpu", "max_epochs": epochs, "default_root_dir": folder, **quiet}
    return lightning.Trainer(**{"devices": 1, **options, **more})


@BOTH
@pytest.mark.filterwarnings("ignore")
def test_lightning(Optimizer, tmp_path):
    """Clips and accumulates as the plain loop does; a saved run goes on bit for bit."""
    loader = DataLoader(list(zip(*images(24), strict=True)), batch_size=4)
    more = {"gradient_clip_val": 0.5, "accumulate_grad_batches": 2}
    lightning, model = lightning_module(Optimizer)
    lightning_trainer(lightning, tmp_path, 4, **more).fit(model, loader)
    plain = Net()
    optimizer = Optimizer(grassmann_param_groups(plain, 0.1, 0.4))
    for _ in range(4):
        for i, (x, labels) in enumerate(loader):
            (cross_entropy(plain(x), labels) / 2).backward()
            if i % 2:
                nn.utils.clip_grad_norm_(plain.parameters(), 0.5)
                optimizer.step()
                optimizer.zero_grad()
    for p, q in zip(model.net.parameters(), plain.parameters(), strict=True):
        assert_close(p, q, rtol=0, atol=1e-6)
    _, stopped = lightning_module(Optimizer)
    trainer = lightning_trainer(lightning, tmp_path, 2, **more)
    trainer.fit(stopped, loader)
    trainer.save_checkpoint(tmp_path / "two.ckpt")
    _, resumed = lightning_module(Optimizer)
    lightning_trainer(lightning, tmp_path, 4, **more).fit(resumed, loader, ckpt_path=tmp_path / "two.ckpt")
    assert_same(model, resumed)


def fit_by_lightning_on_two(rank, folder, name):
    """Lightning forks, which only a process can that has not trained yet."""
    lightning, model = lightning_module({"SGDG": SGDG, "AdamG": AdamG}[name])
    loader = DataLoader(list(zip(*images(), strict=True)), batch_size=4)
    lightning_trainer(lightning, folder, 3, strategy="ddp_fork", devices=2).fit(model, loader)
    return [p.detach() for p in model.net.parameters()]


@BOTH
def test_lightning_on_two_processes(Optimizer, tmp_path):
    pytest.importorskip("lightning")
    (found,) = in_processes("fit_by_lightning_on_two", tmp_path, Optimizer.__name__, count=1)
    plain = Net()
    fit(plain, Optimizer(grassmann_param_groups(plain, 0.1, 0.4)), *images())
    for p, q in zip(found, plain.parameters(), strict=True):
        assert_close(p, q.detach(), rtol=0, atol=1e-6)


class WithLoss(nn.Module):
    """As transformers' models: the loss beside the logits."""

    def __init__(self):
        super().__init__()
        self.net = Net()

    def forward(self, x, labels):
        logits = self.net(x)
        return {"loss": cross_entropy(logits, labels), "logits": logits}


@BOTH
@pytest.mark.filterwarnings("ignore")
def test_transformers(Optimizer, tmp_path):
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    data = [{"x": x, "labels": label} for x, label in zip(*images(16), strict=True)]

    def train(folder, **more):
        options = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "max_grad_norm": 0.5}
        options |= {"max_steps": 6, "save_steps": 3, "use_cpu": True, "report_to": [], "disable_tqdm": True}
        arguments = transformers.TrainingArguments(str(folder), **options)
        names = {"model": WithLoss(), "arguments": arguments, "data": data, "Trainer": transformers.Trainer}
        made = run_lines("Transformers", Optimizer, **names)
        made["trainer"].train(**more)
        return made["model"].net, made["optimizer"]

    model, optimizer = train(tmp_path / "whole")
    assert_on_grassmann(model)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.4 * 0.9**6)
    resumed, _ = train(tmp_path / "part", resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    assert_same(model, resumed)


@BOTH
def test_accelerate(Optimizer, tmp_path):
    accelerate = pytest.importorskip("accelerate")
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2)
    loader = DataLoader(list(zip(*images(16), strict=True)), batch_size=4)

    def prepare():
        made = run_lines("Accelerate", Optimizer, accelerator=accelerator, model=Net(), loader=loader)
        return made["model"], made["optimizer"], made["loader"]

    def epoch(model, optimizer, batches):
        for x, labels in batches:
            with accelerator.accumulate(model):
                accelerator.backward(cross_entropy(model(x), labels))
                accelerator.clip_grad_norm_(model.parameters(), 0.5)
                optimizer.step()
                optimizer.zero_grad()

    model, optimizer, batches = prepare()
    epoch(model, optimizer, batches)
    accelerator.save_state(tmp_path)
    saved = copy.deepcopy(model.state_dict())
    epoch(model, optimizer, batches)
    after = copy.deepcopy(model)
    accelerator.load_state(tmp_path)
    assert all(torch.equal(value, saved[name]) for name, value in model.state_dict().items())
    epoch(model, optimizer, batches)
    assert_same(model, after)
    assert_on_grassmann(model)


@BOTH
def test_timm(Optimizer):
    pytest.importorskip("timm")
    from timm.scheduler import CosineLRScheduler
    from timm.utils import ModelEmaV3

    model = Net()
    names = {"CosineLRScheduler": CosineLRScheduler, "ModelEmaV3": ModelEmaV3}
    made = run_lines("timm", Optimizer, model=model, **names)
    optimizer = made["optimizer"]
    for epoch in range(6):
        made["schedule"].step(epoch)
        rates = [group["lr"] for group in optimizer.param_groups]
        assert rates == pytest.approx([4 * rates[1], rates[1], rates[1]])
        fit(model, optimizer, *images(), steps=1)
        made["average"].update(model)
    assert_on_grassmann(model)
    average = made["average"].module.body[0].weight.flatten(1).norm(dim=1)
    assert ((average > 0.9) & (average <= 1 + 1e-6)).all()


if __name__ == "__main__":
    work, rank, folder, *arguments = sys.argv[1:]
    torch.save(globals()[work](int(rank), Path(folder), *arguments), f"{folder}/{rank}.pt")
