"""The benchmarks' arithmetic, with clocks and figures that the tests give, and one small run of each."""

import json
import runpy
import shutil
import sys
from statistics import mean
from types import SimpleNamespace

import pytest
import torch
from helpers import METHODS, ROOT, call
from torch.utils.flop_counter import FlopCounterMode

import utils

sys.path.append(str(ROOT / "benchmarks"))

import last_layer
import optimizer_step
import rates
import train_throughput

SMALL = ("--depth", 10, "--width", 1, "--device", "cpu")


@pytest.fixture
def figures(tmp_path, capsys):
    """figures(program, *words): what its main prints, and its JSON."""

    def run(program, *words):
        program.main([*map(str, words), "--json", str(tmp_path / "figures.json")])
        return capsys.readouterr().out, json.loads((tmp_path / "figures.json").read_text())

    return run


class Clock:
    """A clock that goes on when it is told to, to be put in place of `time`."""

    now = 0.0

    def perf_counter(self):
        return self.now

    def passes(self, seconds):
        self.now += seconds


# optimizer_step.py


def test_times_go_to_their_names_and_into_the_table(monkeypatch, figures):
    clock = Clock()
    times = {"SGD foreach": [1, 2, 9], "SGDG omega=0": [4, 4, 4], "SGDG omega=0.1": [30, 30, 30]}
    times |= {"copy of a step's bytes": [1, 1, 1], "matrix products alone": [5, 5, 5]}

    def step_of(milliseconds):
        left = [0, 0, *milliseconds]  # the first two warm up
        return lambda: clock.passes(left.pop(0) / 1000)

    steps = {name: step_of(milliseconds) for name, milliseconds in times.items()}
    faked = {"time": clock, "make_variants": lambda model: steps, "peak_memory": lambda step, cuda: 2_500_000}
    for name, value in faked.items():
        monkeypatch.setattr(optimizer_step, name, value)
    out, result = figures(optimizer_step, *SMALL, "--rounds", 3)
    for name, milliseconds in times.items():
        assert result["seconds"][name] == pytest.approx([value / 1000 for value in milliseconds])
    *lines, floor = out.splitlines()[3:]
    rows = {line[:30].strip(): line[30:].split() for line in lines}
    assert rows["SGD foreach"] == ["2.00", "1.00", "1.00", "2.5"]
    assert rows["SGDG omega=0.1"] == ["30.00", "30.00", "15.00", "2.5"]
    assert floor.endswith("omega=0: 4.00, omega=0.1: 5.00")


def test_each_variant_is_what_its_name_says():
    model = optimizer_step.WideResNet(10, 1, 10).to(memory_format=torch.channels_last)
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    go, variants = optimizer_step.go, optimizer_step.make_variants(model)
    methods = {"SGDG": go.SGDG, "AdamG": go.AdamG, "plain rule": optimizer_step.PlainOptimizer}
    for name, omega in [(name, omega) for name in methods for omega in (0, 0.1)]:
        optimizer = variants[f"{name} omega={omega}"].__self__
        assert (type(optimizer), optimizer.param_groups[0]["omega"]) == (methods[name], omega)
    for name in ("foreach", "fused"):
        given = variants[f"SGD {name}"].__self__.defaults
        assert (given["nesterov"], given["weight_decay"], given[name]) == (True, 5e-4, True)
    weights = go.grassmann_weights(model).values()
    with FlopCounterMode(display=False) as counter:
        variants["matrix products alone"]()
    assert counter.get_total_flops() == sum(4 * len(w) * w.numel() for w in weights)
    for step in variants.values():
        step()
    copied = variants["copy of a step's bytes"]()  # each read once and written once
    assert 2 * copied.numel() == 5 * sum(p.numel() for p in model.parameters())


def test_peak_memory_is_what_is_held_at_once():
    assert optimizer_step.peak_memory(lambda: torch.ones(250_000) + torch.ones(250_000), False) == 3e6
    one_by_one = optimizer_step.peak_memory(lambda: [torch.ones(250_000).sum() for _ in range(3)], False)
    assert one_by_one == pytest.approx(1e6, rel=0.01)


# train_throughput.py


@pytest.mark.parametrize("method", METHODS)
def test_the_plain_configuration_trains_the_same_network(figures, method):
    strong = [] if method == "SGD" else ["--omega", 5]  # else too weak to be seen in three steps
    words = (*SMALL, "--batchSize", 4, "--rounds", 1, "--steps", 1, "--dropout", 0, *strong)
    _, result = figures(train_throughput, "--optim_method", method, *words)
    ours, plain = result["ours"]["losses"], result["plain"]["losses"]
    assert len(set(ours)) == 3
    assert ours == pytest.approx(plain, rel=1e-5)


def test_the_figures_of_a_turn(monkeypatch, figures):
    """A step waits 1 s for its images, computes for 2 (an epoch's first: 20), updates for 5, plain for 8."""
    clock = Clock()

    class Training(train_throughput.Training):
        updating = 5

        def __init__(self, *arguments):
            super().__init__(*arguments)
            self.optimizer.register_step_post_hook(lambda *_: clock.passes(self.updating))

        def step(self, x, labels):
            clock.passes(clock.computing)
            return super().step(x, labels)

    class Batches(train_throughput.TrainBatches):
        def iterate(self, *arguments, **options):
            for k, batch in enumerate(super().iterate(*arguments, **options)):
                clock.passes(1)
                clock.computing = 2 if k else 20
                yield batch

    skipped = SimpleNamespace(_train=lambda steps: ([], []), cuda=False, moments=[0.0] * 4)
    with pytest.raises(utils.UserError, match="a step was skipped"):
        train_throughput.Turns.turn(skipped, 1)
    plain = type("Plain", (Training,), {"updating": 8})
    faked = {"time": clock, "Training": Training, "PlainTraining": plain, "TrainBatches": Batches}
    for name, value in (faked | {"product_flops": lambda t: 1e9}).items():
        monkeypatch.setattr(train_throughput, name, value)
    out, result = figures(train_throughput, *SMALL, "--batchSize", 4, "--rounds", 2, "--steps", 3)
    expected = {"step_s": 8, "images_per_s": 4 / 8, "forward_backward_s": 2, "optimizer_s": 5}
    expected |= {"input_wait_s": 1, "share_of_product": 6 * result["multiply_adds"] * 4 / 8 / 1e9}
    for key, value in expected.items():
        assert result["ours"][key] == pytest.approx([value] * 2), key
    rows = {line[:31].strip(): line[31:].split() for line in out.splitlines()[3:]}
    assert (rows[""], rows["images/s"]) == (["ours", "plain", "gain"], ["0.5", "0.4"])
    assert rows["ms per step"] == ["8,000.00", "11,000.00", "1.38"]
    assert rows["optimizer"] == ["5,000.00", "8,000.00", "1.60"]
    assert rows["a large product, TFLOP/s"] == ["0.001", "0.001"]
    assert rows["share of its rate, %"][0] == f"{100 * expected['share_of_product']:.1f}"


def test_the_rate_of_a_product(monkeypatch):
    monkeypatch.setitem(train_throughput.PRODUCT, "cpu", (64, 3))
    monkeypatch.setattr(train_throughput, "seconds", lambda work, cuda: 2.0 if work() else 0)
    t = SimpleNamespace(device=torch.device("cpu"), options=SimpleNamespace(dtype="float32"))
    with FlopCounterMode(display=False) as counter:
        rate = train_throughput.product_flops(t)
    assert 2 * rate == counter.get_total_flops() == 3 * 2 * 64**3


# last_layer.py


# Of a run whose weights do not move, so that each epoch's loss is of the same network.
STILL = ("--dropout", 0, "--lr", 1e-30, "--weightDecay", 0, "--bnDecay", 0)


@pytest.mark.parametrize("more", [["--holdout", 16], ["--dtype", "bfloat16"]])
def test_the_loss_of_the_last_layer_is_that_of_training(more, tiny, figures, images_root, tmp_path):
    run, root = tmp_path / "run", shutil.copytree(images_root, tmp_path / "moved")
    assert call(*tiny("SGD", run, *STILL, *more)).code == 0
    out, result = figures(last_layer, run, "--dataroot", root)
    (figure,) = result["runs"]
    assert f"{figure['loss']:#9.3g}" in out.splitlines()[-1]
    assert figure["images"] == 3 * 16 * (2 if more[0] == "--holdout" else 3)
    assert call("--resume", run, "--epochs", 5).code == 0
    history = torch.load(run / "checkpoint.pt")["history"]
    logged = mean(epoch["train_loss"] for epoch in history[2:])
    assert figure["loss"] == figure["loss_at_first_length"] == pytest.approx(logged, rel=1e-6)


def test_the_loss_at_another_length_and_other_images(tiny, figures, images_root, tmp_path):
    runs = [tmp_path / name for name in ("1", "8", "64")]
    assert call(*tiny("SGD", runs[0], *STILL)).code == 0
    state = torch.load(runs[0] / "checkpoint.pt")
    state["model"]["fc.bias"] += torch.arange(len(state["model"]["fc.bias"]))
    for run, factor in zip(runs, (1, 8, 8), strict=True):
        state["model"]["fc.weight"] *= factor
        run.mkdir(exist_ok=True)
        torch.save(state, run / "checkpoint.pt")
    first, *others = figures(last_layer, *runs)[1]["runs"]
    for factor, longer in zip((8, 64), others, strict=True):
        assert longer["length"] == pytest.approx(factor * first["length"])
        assert longer["loss"] != pytest.approx(first["loss"], rel=1e-2)
        assert longer["loss_at_first_length"] == pytest.approx(first["loss"], rel=1e-6)
    others = shutil.copytree(images_root, tmp_path / "others")
    next(others.glob("train/*/*")).unlink()
    with pytest.raises(utils.UserError, match="the checkpoint is of other"):
        last_layer.main([str(runs[0]), "--dataroot", str(others)])


# rates.py and the example


def test_a_run_of_rates_is_told_by_its_last_losses_and_its_test_error(monkeypatch):
    losses = iter(range(1, 31))
    monkeypatch.setattr(rates, "cross_entropy", lambda z, y: 0 * z.sum() + next(losses))
    loss, error = rates.train("linear layers", "SGD", 0.0, None, steps=30, seed=0)
    assert loss == 20.5
    assert 50 < error < 100  # %: nothing was learnt


def test_a_small_run_of_rates_learns_and_the_page_has_the_table_of_the_published_one(figures, monkeypatch):
    few = {"SETTINGS": [s for s in rates.SETTINGS if s[1] == 0.1], "STEPS": [25], "SEEDS": 1}
    for name, value in few.items():
        monkeypatch.setattr(rates, name, value)
    out, result = figures(rates)
    assert out.strip() == rates.table(result["runs"])
    assert all(run["errors"][0] < 60 for run in result["runs"])
    published = json.loads((ROOT / "logs/published/rates.json").read_text())["runs"]
    assert rates.table(published) in (ROOT / "docs/method.md").read_text()


def test_the_example_draws_both_curves(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(sys, "argv", ["resnet18.py", "--steps", "2", "--plot", str(tmp_path / "curves.png")])
    result = runpy.run_path(str(ROOT / "examples/resnet18.py"))
    sgd, sgdg = result["sgd"], result["sgdg"]
    said = f"SGD: last losses {mean(sgd):.4f} on average\nSGD-G: last losses {mean(sgdg):.4f} on average\n"
    assert capsys.readouterr().out.startswith(said)
    assert sgd[0] == pytest.approx(sgdg[0], rel=1e-3)  # unit rows in front of BN change nothing
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
