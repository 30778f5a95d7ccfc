"""Other people's tools around both optimizers, really run, by the lines of docs/frameworks.md.

What is not installed is skipped: requirements-frameworks.txt has it all.
"""

import copy
import os
import re
import subprocess
import sys
from datetime import timedelta

import pytest
import torch
from helpers import ROOT
from optimizer.steps import BOTH
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel
from torch.testing import assert_close
from torch.utils._pytree import tree_map
from torch.utils.data import DataLoader

import grassmann_optimizer as go
from grassmann_optimizer import SGDG, AdamG, grassmann_param_groups

OF_PAGE = [DistributedDataParallel, ZeroRedundancyOptimizer, fully_shard, get_state_dict, set_state_dict]
OF_PAGE.append(grassmann_param_groups)


def run_lines(name, Optimizer=SGDG, **names):
    """Run the lines of the page's row with these names and the optimizer for SGDG; all names."""
    page = (ROOT / "docs" / "frameworks.md").read_text()
    (row,) = re.findall(rf"^\| {re.escape(name)} \|.*$", page, flags=re.M)
    names |= {"torch": torch, "SGDG": Optimizer, **{thing.__name__: thing for thing in OF_PAGE}}
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


def batches(count):
    return DataLoader(list(zip(*images(count), strict=True)), batch_size=4)


def fit(model, optimizer, x, labels, steps=3):
    for _ in range(steps):
        optimizer.zero_grad()
        cross_entropy(model(x), labels).backward()
        optimizer.step()


def assert_same(model, other):
    assert all(map(torch.equal, model.parameters(), other.parameters()))


def assert_on_grassmann(model):
    lengths = torch.cat([model.body[i].weight.detach().flatten(1).norm(dim=1) for i in (0, 3)])
    assert_close(lengths, torch.ones(12))


# --------------------------------------------------------------------------------------- torch, two processes


def whole(t):
    return (t.full_tensor() if hasattr(t, "full_tensor") else t).detach().clone()


CASES = [("FSDP2", Optimizer, omega) for Optimizer in (SGDG, AdamG) for omega in (0.0, 0.1)]
CASES += [("DistributedDataParallel", Optimizer, 0.1) for Optimizer in (SGDG, AdamG)]
CASES += [("ZeroRedundancyOptimizer", Optimizer, 0.1) for Optimizer in (SGDG, AdamG)]


def train_half(rank, folder):
    store, patience = f"file://{folder}/store", timedelta(seconds=60)
    torch.distributed.init_process_group("gloo", init_method=store, rank=rank, world_size=2, timeout=patience)
    x, labels = (t[rank::2] for t in images())
    results = []
    for number, (heading, Optimizer, omega) in enumerate(CASES):
        made = run_lines(heading, Optimizer, omega=omega, model=Net())
        model, optimizer = made["model"], made["optimizer"]
        fit(made.get("parallel", model), optimizer, x, labels)
        zero = isinstance(optimizer, ZeroRedundancyOptimizer)
        if zero:
            optimizer.consolidate_state_dict(to=0)
        state = {} if zero and rank else optimizer.state_dict()["state"]
        results.append(tree_map(whole, [list(model.parameters()), state]))
        if heading == "FSDP2":
            fresh = run_lines(heading, Optimizer, omega=omega, model=Net())
            resume_elsewhere(made, fresh, f"{folder}/{number}", x, labels)
    for Optimizer in (SGDG, AdamG):
        refuse_other_shards(Optimizer)
        load_what_zero_left_out(Optimizer, rank)
    return results


def resume_elsewhere(made, fresh, folder, x, labels):
    """By torch.distributed.checkpoint, from a fresh optimizer whose rows are of any length."""
    run_lines("saving by torch.distributed.checkpoint", **made, folder=folder)
    with torch.no_grad():
        for p in fresh["model"].parameters():
            p.mul_(1.3)
    before = copy.deepcopy(parts(fresh))
    get_state_dict(fresh["model"], fresh["optimizer"])
    assert all(map(torch.equal, parts(fresh), before))
    run_lines("loading by torch.distributed.checkpoint", **fresh, folder=folder)
    for names in (made, fresh):
        fit(names["model"], names["optimizer"], x, labels)
    assert all(map(torch.equal, parts(fresh), parts(made)))


def parts(made):
    return [p.to_local().detach() for p in made["model"].parameters()]


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
    path = os.pathsep.join(map(str, (ROOT, ROOT / "tests", *sys.path)))
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    words = [sys.executable, __file__, str(tmp_path)]
    ranks = [subprocess.Popen([*words, str(rank)], env=environment) for rank in (0, 1)]
    assert [rank.wait() for rank in ranks] == [0, 0]
    results = [torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1)]
    for (heading, Optimizer, omega), (ours, state), (others, _) in zip(CASES, *results, strict=True):
        model = Net()
        optimizer = Optimizer(grassmann_param_groups(model, 0.1, 0.4, omega=omega))
        fit(model, optimizer, *images())
        assert all(map(torch.equal, ours, others)), heading
        assert_close(ours, list(model.state_dict().values()), rtol=0, atol=1e-6)
        assert_close(state, optimizer.state_dict()["state"], rtol=0, atol=1e-6)


# ------------------------------------------------------------------------------------------------ trainers


@BOTH
@pytest.mark.filterwarnings("ignore")
def test_lightning(Optimizer, tmp_path):
    lightning = pytest.importorskip("lightning")

    class Lit(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = Net()

        def training_step(self, batch, _):
            x, labels = batch
            return cross_entropy(self.net(x), labels)

        configure_optimizers = run_lines("Lightning", Optimizer)["configure_optimizers"]

    def train(epochs, start=None):
        options = {"gradient_clip_val": 0.5, "accumulate_grad_batches": 2, "max_epochs": epochs}
        options |= {"enable_progress_bar": False, "enable_model_summary": False, "logger": False}
        trainer = lightning.Trainer(accelerator="cpu", devices=1, default_root_dir=tmp_path, **options)
        model = Lit()
        trainer.fit(model, batches(24), ckpt_path=start)
        trainer.save_checkpoint(tmp_path / f"{epochs}.ckpt")
        return model.net

    trained = train(4)
    assert_on_grassmann(trained)
    train(2)
    assert_same(train(4, start=tmp_path / "2.ckpt"), trained)


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
        names = {"arguments": transformers.TrainingArguments(str(folder), **options), "data": data}
        made = run_lines("Transformers", Optimizer, model=WithLoss(), Trainer=transformers.Trainer, **names)
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
    names = {"accelerator": accelerator, "model": Net(), "loader": batches(16)}
    made = run_lines("Accelerate", Optimizer, **names)
    model, optimizer = made["model"], made["optimizer"]

    def epoch():
        for x, labels in made["loader"]:
            with accelerator.accumulate(model):
                accelerator.backward(cross_entropy(model(x), labels))
                accelerator.clip_grad_norm_(model.parameters(), 0.5)
                optimizer.step()
                optimizer.zero_grad()

    epoch()
    accelerator.save_state(tmp_path)
    epoch()
    after = copy.deepcopy(model)
    accelerator.load_state(tmp_path)
    epoch()
    assert_same(model, after)
    assert_on_grassmann(model)


@BOTH
def test_timm(Optimizer):
    pytest.importorskip("timm")
    from timm.scheduler import CosineLRScheduler
    from timm.utils import ModelEmaV3

    names = {"CosineLRScheduler": CosineLRScheduler, "ModelEmaV3": ModelEmaV3}
    made = run_lines("timm", Optimizer, model=Net(), **names)
    model, optimizer = made["model"], made["optimizer"]
    for epoch in range(6):
        made["schedule"].step(epoch)
        rates = [group["lr"] for group in optimizer.param_groups]
        assert rates == pytest.approx([4 * rates[1], rates[1], rates[1]])
        fit(model, optimizer, *images(), steps=1)
        made["average"].update(model)
    assert_on_grassmann(model)
    average = made["average"].module.body[0].weight.flatten(1).norm(dim=1)
    assert ((average > 0.9) & (average <= 1 + 1e-6)).all()


# ------------------------------------------------------------------------------------------- other tools


def test_cloudpickle_takes_the_class_by_value(tmp_path):
    """As a notebook's classes go to other processes, which have no such module."""
    cloudpickle = pytest.importorskip("cloudpickle")
    cloudpickle.register_pickle_by_value(go)
    (tmp_path / "class.pkl").write_bytes(cloudpickle.dumps(AdamG))
    cloudpickle.unregister_pickle_by_value(go)
    script = """if True:
        import pickle, torch
        p = torch.nn.Parameter(torch.eye(2, 5))
        p.grad = torch.ones(2, 5)
        pickle.load(open("class.pkl", "rb"))([p], grassmann=True, omega=0.1).step()
        assert not torch.equal(p, torch.eye(2, 5))
    """
    subprocess.run([sys.executable, "-c", script], cwd=tmp_path, check=True)


TYPED = """
import torch
from torch import nn
from grassmann_optimizer import SGDG, AdamG, ScaleInvariance, grassmann_param_groups, scale_invariance

model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))
optimizer: torch.optim.Optimizer = SGDG(grassmann_param_groups(model, lr=0.01, lrg=0.2, grad_clip=None))
optimizer = AdamG([{"params": model.parameters()}], lr=0.1, beta2=0.9)
optimizer.step()
AdamG(model.parameters()).step(lambda: 1.0)
optimizer.load_state_dict(optimizer.state_dict())
found: list[ScaleInvariance] = scale_invariance(model, lambda net: net(torch.ones(2, 3, 8, 8)).sum())
"""


@pytest.mark.parametrize("checker", ["mypy", "pyright"])
def test_a_typed_script_passes_its_checker(checker, tmp_path):
    pytest.importorskip(checker)
    (tmp_path / "script.py").write_text(TYPED)
    (tmp_path / "grassmann_optimizer.py").write_text((ROOT / "grassmann_optimizer.py").read_text())
    flags = ["--follow-imports=silent"] if checker == "mypy" else ["--pythonpath", sys.executable]
    command = [sys.executable, "-m", checker, *flags, "script.py"]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout


if __name__ == "__main__":
    folder, rank = sys.argv[1:]
    torch.save(train_half(int(rank), folder), f"{folder}/{rank}.pt")
