"""The benchmarks' arithmetic, with clocks and figures that the tests give, and one small run of each."""

import importlib.util
import json
import re
import runpy
import shutil
import statistics
import sys
from types import SimpleNamespace

import pytest
import torch
from helpers import METHODS, ROOT, call
from torch.utils.flop_counter import FlopCounterMode

from resnet import WideResNet


@pytest.fixture
def program(monkeypatch):
    """program(name): the benchmark as a module of its own."""
    monkeypatch.setattr(sys, "path", [*sys.path])

    def load(name):
        spec = importlib.util.spec_from_file_location(name, ROOT / "benchmarks" / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    return load


@pytest.fixture
def figures(program, tmp_path, capsys):
    """figures(module, *words): what its main prints, and its JSON."""

    def run(module, *words):
        file = tmp_path / "figures.json"
        module.main([*map(str, words), "--json", str(file)])
        return capsys.readouterr().out, json.loads(file.read_text())

    return run


class Clock:
    """A clock that goes on when it is told to, to be put in place of `time`."""

    now = 0.0

    def perf_counter(self):
        return self.now

    def passes(self, seconds):
        self.now += seconds


class TestOptimizerStep:
    @pytest.fixture
    def module(self, program):
        return program("optimizer_step")

    @pytest.fixture
    def model(self):
        model = WideResNet(10, 1, 10).to(memory_format=torch.channels_last)
        for p in model.parameters():
            p.grad = torch.randn_like(p)
        return model

    def test_the_table_of_given_times(self, module):
        times = {"SGD foreach": [1e-3, 2e-3, 9e-3], "SGDG omega=0": [4e-3] * 3, "SGDG omega=0.1": [0.03] * 3}
        times |= {"copy of a step's bytes": [1e-3] * 3, "matrix products alone": [5e-3] * 3}
        *lines, floor = module.table(times, dict.fromkeys(times, 0) | {"SGD foreach": 2_500_000}).splitlines()
        rows = {line[:30].strip(): line[30:].split() for line in lines}
        assert rows["SGD foreach"] == ["2.00", "1.00", "1.00", "2.5"]
        assert rows["SGDG omega=0.1"] == ["30.00", "30.00", "15.00", "0.0"]
        assert floor.endswith("omega=0: 4.00, omega=0.1: 5.00")

    def test_each_variant_is_what_its_name_says(self, module, model):
        variants = module.make_variants(model)
        for cls in (module.go.SGDG, module.go.AdamG, module.PlainOptimizer):
            name = getattr(cls, "__name__", "").replace("PlainOptimizer", "plain rule")
            for omega in (0, 0.1):
                optimizer = variants[f"{name} omega={omega}"].__self__
                assert (type(optimizer), optimizer.param_groups[0]["omega"]) == (cls, omega)
        for name, nesterov, fused in (("foreach", 1, None), ("foreach, momentum only", 0, None), ("fused", 1, 1)):
            options = variants[f"SGD {name}"].__self__.defaults
            assert (options["nesterov"], options["weight_decay"] > 0, options["fused"]) == (nesterov, nesterov, fused)
        weights = module.go.grassmann_weights(model).values()
        with FlopCounterMode(display=False) as counter:
            variants["matrix products alone"]()
        assert counter.get_total_flops() == sum(4 * len(w) * w.numel() for w in weights)
        copied = variants["copy of a step's bytes"]()
        assert 2 * copied.numel() == 5 * sum(p.numel() for p in model.parameters())  # read once, written once

    def test_peak_memory_is_what_is_held_at_once(self, module):
        one_after_the_other = [lambda: torch.ones(250_000).sum()] * 3
        assert module.peak_memory(lambda: [f() for f in one_after_the_other], False) == pytest.approx(1e6, 0.01)
        assert module.peak_memory(lambda: torch.ones(250_000) + torch.ones(250_000), False) == 3e6

    def test_times_go_to_their_names(self, module, monkeypatch, figures):
        clock = Clock()
        monkeypatch.setattr(module, "time", clock)
        names = ["SGD foreach", "SGDG omega=0", "SGDG omega=0.1", module.COPY, module.PRODUCTS]
        steps = {name: lambda seconds=k: clock.passes(seconds) for k, name in enumerate(names, start=1)}
        monkeypatch.setattr(module, "make_variants", lambda model: steps)
        _, result = figures(module, "--depth", 10, "--width", 1, "--rounds", 2)
        assert result["seconds"] == {name: [k, k] for k, name in enumerate(names, start=1)}

    def test_a_small_run(self, module, figures):
        out, result = figures(module, "--depth", 10, "--width", 1, "--rounds", 1)
        assert all(name in out and times[0] > 0 for name, times in result["seconds"].items())


class TestTrainThroughput:
    NETWORK = ("--depth", 10, "--width", 1, "--device", "cpu", "--batchSize", 4)

    @pytest.fixture
    def module(self, program):
        return program("train_throughput")

    @pytest.mark.parametrize("method", METHODS)
    def test_the_plain_configuration_trains_the_same_network(self, module, figures, method):
        strong = [] if method == "SGD" else ["--omega", 5]  # else too weak to be seen in three steps
        words = ("--rounds", 1, "--steps", 1, "--optim_method", method, "--dropout", 0, *strong)
        _, result = figures(module, *self.NETWORK, *words)
        ours, plain = result["ours"]["losses"], result["plain"]["losses"]
        assert len(set(ours)) == 3
        assert ours == pytest.approx(plain, rel=1e-5)

    def test_the_figures_of_a_turn(self, module, monkeypatch, figures):
        """A step waits 1 s for its images, computes for 2 and updates for 5; the network is made in 3."""
        clock = Clock()

        class Training(module.Training):
            def __init__(self, *arguments):
                super().__init__(*arguments)
                clock.passes(3)
                self.optimizer.register_step_post_hook(lambda *_: clock.passes(5))

            def step(self, x, labels):
                clock.passes(2)
                return super().step(x, labels)

        class Batches(module.TrainBatches):
            def iterate(self, *arguments, **options):
                for batch in super().iterate(*arguments, **options):
                    clock.passes(1)
                    yield batch

        faked = {"time": clock, "Training": Training, "TrainBatches": Batches, "product_flops": lambda t: 1e9}
        for name, value in faked.items():
            monkeypatch.setattr(module, name, value)
        monkeypatch.setattr(module, "PlainTraining", lambda *arguments: Training(*arguments))
        _, result = figures(module, *self.NETWORK, "--rounds", 2, "--steps", 3)
        expected = {"step_s": 8, "images_per_s": 4 / 8, "forward_backward_s": 2, "optimizer_s": 5}
        expected |= {"input_wait_s": 1, "product_flops": 1e9}
        expected["share_of_product"] = 6 * result["multiply_adds"] * 4 / 8 / 1e9
        for key, value in expected.items():
            assert result["ours"][key] == pytest.approx([value] * 2), key
        assert result["ours"]["first_step_s"] == [3 + 1 + 2 + 5]

    def test_the_rate_of_a_product(self, module, monkeypatch):
        monkeypatch.setitem(module.PRODUCT, "cpu", (64, 3))
        monkeypatch.setattr(module, "seconds", lambda work, cuda: 2.0 if work() else 0)
        t = SimpleNamespace(device=torch.device("cpu"), options=SimpleNamespace(dtype="float32"))
        with FlopCounterMode(display=False) as counter:
            rate = module.product_flops(t)
        assert 2 * rate == counter.get_total_flops() == 3 * 2 * 64**3

    def test_the_table_of_given_figures(self, module):
        ours = {key: [2.0, 4.0, 6.0] for key, *_ in module.ROWS} | {"share_of_product": [0.25] * 3}
        plain = {key: [3.0, 8.0, 6.0] for key, *_ in module.ROWS} | {"product_flops": [3e12] * 3}
        gain = module.gains(ours, plain)
        assert gain == {key: 1.5 for key in ("step_s", "forward_backward_s", "optimizer_s", "input_wait_s")}
        rows = {line[:31].strip(): line[31:].split() for line in module.table(ours, plain, gain).splitlines()}
        assert rows.pop("") == ["ours", "plain", "gain"]
        assert rows["images/s"] == ["4.0", "6.0"]
        assert rows["optimizer"] == ["4,000.00", "6,000.00", "1.50"]
        assert rows["a large product, TFLOP/s"] == ["0.000", "3.000"]
        assert rows["share of its rate, %"][0] == "25.0"

    def test_a_mistake_is_answered_by_one_sentence(self, module, capsys):
        with pytest.raises(SystemExit):
            module.main(["--no-such-flag"])
        assert "--no-such-flag" in capsys.readouterr().err.rsplit("error: ", 1)[1]


class TestLastLayer:
    @pytest.fixture
    def module(self, program):
        return program("last_layer")

    @pytest.fixture
    def still(self, tiny, tmp_path):
        """still(*more): a run whose weights do not move, so that each epoch's loss is of the same network."""

        def train(*more):
            words = ["--dropout", 0, "--lr", 1e-30, "--weightDecay", 0, "--bnDecay", 0]
            assert call(*tiny("SGD", tmp_path / "run", *words, *more)).code == 0
            return tmp_path / "run"

        return train

    @pytest.mark.parametrize("more", [[], ["--holdout", 16], ["--dtype", "bfloat16"]])
    def test_the_loss_is_that_of_training(self, more, still, module, figures, pictures_root, tmp_path):
        run = still(*more)
        root = shutil.copytree(pictures_root, tmp_path / "moved")
        out, result = figures(module, run, "--dataroot", root)
        (figure,) = result["runs"]
        assert figure["loss_at_first_length"] == figure["loss"]
        assert f"{figure['loss']:#9.3g}" in out.splitlines()[-1]
        assert figure["images"] == 3 * 16 * (2 if more[:1] == ["--holdout"] else 3)
        assert call("--resume", run, "--epochs", 5).code == 0
        history = torch.load(run / "checkpoint.pt")["history"]
        logged = statistics.mean(epoch["train_loss"] for epoch in history[2:])
        assert figure["loss"] == pytest.approx(logged, rel=1e-6)

    def test_what_it_is_at_another_length(self, still, module, figures, tmp_path):
        run = still()

        def lengthened(factor):
            copy = shutil.copytree(run, tmp_path / f"{factor} times as long")
            state = torch.load(copy / "checkpoint.pt")
            state["model"]["fc.weight"] *= factor
            state["model"]["fc.bias"] += torch.arange(len(state["model"]["fc.bias"]))
            torch.save(state, copy / "checkpoint.pt")
            return copy

        first, *others = figures(module, *map(lengthened, (1, 8, 64)))[1]["runs"]
        for factor, longer in zip((8, 64), others, strict=True):
            assert longer["length"] == pytest.approx(factor * first["length"])
            assert longer["loss"] != pytest.approx(first["loss"], rel=1e-2)
            assert longer["loss_at_first_length"] == pytest.approx(first["loss"], rel=1e-6)

    def test_runs_that_it_cannot_measure(self, still, module, pictures_root, tmp_path, capsys):
        others = shutil.copytree(pictures_root, tmp_path / "others")
        next(others.glob("train/*/*")).unlink()
        for words in ([tmp_path], [still(), "--dataroot", others]):
            with pytest.raises(SystemExit):
                module.main([str(word) for word in words])
            assert re.search("no checkpoint|of other", capsys.readouterr().err.rsplit("error: ", 1)[1])


class TestRates:
    @pytest.fixture
    def module(self, program):
        return program("rates")

    def test_a_run_is_told_by_its_last_losses_and_its_test_error(self, module, monkeypatch):
        losses = iter(range(1, 31))
        monkeypatch.setattr(module, "cross_entropy", lambda z, y: 0 * z.sum() + next(losses))
        loss, error = module.train("linear layers", "SGD", 0.0, None, steps=30, seed=0)
        assert loss == 20.5
        assert 50 < error < 100  # %: nothing was learnt

    def test_a_small_run_and_its_table(self, module, figures, monkeypatch):
        monkeypatch.setattr(module, "SETTINGS", [("SGD", 0.3, None), ("SGD-G", 0.1, 0.4), ("Adam-G", 0.1, 0.1)])
        out, result = figures(module, "--steps", 25, "--seeds", 1)
        assert out.strip() == module.table(result["runs"])
        assert all(run["errors"][0] < 60 for run in result["runs"])

    def test_the_table_has_medians(self, module):
        run = {"model": "linear layers", "steps": 1000, "method": "SGD-G", "lr": 0.1, "lrg": 0.4}
        table = module.table([{**run, "losses": [0.1, 0.02, 9], "errors": [1, 2, 60]}])
        assert table.splitlines()[0] == "| method | `lr`, `lrg` | linear layers, 1,000 steps |"
        assert table.splitlines()[-1] == "| SGD-G | 0.1, 0.4 | 0.10, 2.0% |"


def test_the_example_draws_both_curves(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr(sys, "argv", ["resnet18.py", "--steps", "2", "--plot", str(tmp_path / "curves.png")])
    result = runpy.run_path(str(ROOT / "examples/resnet18.py"))
    curves = [result["sgd"], result["sgdg"]]
    for line, (name, losses) in zip(capsys.readouterr().out.splitlines(), zip(("SGD", "SGD-G"), curves), strict=True):
        assert line == f"{name}: the mean loss of the last steps is {statistics.mean(losses):.4f}"
    assert curves[0][0] == pytest.approx(curves[1][0], rel=1e-3)  # unit rows in front of BN change nothing
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
