"""Every benchmark runs, on a small setting, and prints and writes figures that can be true."""

import gzip
import json
import math
import os
import re
import runpy
import shutil
import statistics
import sys

import pytest
import torch
from helpers import METHODS, ROOT, call


@pytest.fixture
def benchmark(tmp_path, monkeypatch, capsys):
    """benchmark(name, *words): what the program printed, and its JSON."""
    cores = os.sched_getaffinity(0)
    monkeypatch.setattr(sys, "path", [*sys.path])

    def run(name, *words):
        file = tmp_path / "figures.json"
        monkeypatch.setattr(sys, "argv", [name, *map(str, words), "--json", str(file)])
        runpy.run_path(str(ROOT / "benchmarks" / f"{name}.py"), run_name="__main__")
        return capsys.readouterr().out, json.loads(file.read_text())

    yield run  # one of them holds its process to a single core
    os.sched_setaffinity(0, cores)


def is_positive(*figures):
    return all(math.isfinite(figure) and figure > 0 for figure in figures)


def test_data_pipeline(benchmark, pictures_root):
    words = ["--images", 300, "--rounds", 2, "--folder", pictures_root]
    out, result = benchmark("data_pipeline", *words)
    batches, folder = result["batches"], result["folder"]
    assert (batches["n"], batches["images"], folder["pictures"]) == (2, 300, 66)
    assert is_positive(batches["ratio"], batches["seconds_to_pad"], folder["seconds"])
    for name in ("ours", "baseline"):
        low, median, high = (batches[name][key] for key in ("min", "median", "max"))
        assert is_positive(low)
        assert low <= median <= high
        assert f"{median:,.0f}" in out
    assert result["environment"]["cores"] >= 1


def test_optimizer_step(benchmark):
    out, result = benchmark("optimizer_step", "--depth", 10, "--width", 1, "--rounds", 2)
    ours = {f"{method} omega={omega}" for method in ("SGDG", "AdamG") for omega in ("0", "0.1")}
    assert ours | {"SGD foreach", "SGD fused"} <= result["seconds"].keys() == result["peak_bytes"].keys()
    for name, times in result["seconds"].items():
        assert len(times) == 2
        assert is_positive(*times)
        assert any(line.startswith(name) for line in out.splitlines())
    assert all(peak >= 0 for peak in result["peak_bytes"].values())


def test_regularizer_precision(benchmark):
    out, result = benchmark("regularizer_precision", "--rows", 8, "--columns", 640)
    lines = {line[:24].strip(): line[24:].split() for line in out.splitlines()[1:]}
    assert lines[""] == ["cost", "random", *["20", "steps", "60", "steps", "100", "steps"]]
    figures = result["figures"].values()
    for errors in (each["errors"] for each in figures):
        assert is_positive(*errors.values())
        assert errors["float32"] < errors["tf32"] < errors["bfloat16"] < 1
        assert errors["6 x bfloat16"] < errors["3 x bfloat16"] < errors["bfloat16"] / 100
        for split in ("3 x float16", "3 x tf32"):  # 22 bits of 24
            assert errors[split] < 10 * errors["float32"]
            assert errors[split] < errors[split + ", then 1 x"] < 4e-4
        assert errors["3 x float16, in slices"] < errors["3 x float16, truncated"] / 1.5
    for way, cost in result["costs"].items():
        assert lines[way] == [str(cost), *(f"{each['errors'][way]:.1e}" for each in figures)]


def test_costs_of_the_regularizers_products(benchmark):
    """Products of parts, those of a lower order than the number of parts; of Y Y' the half that is new."""
    _, result = benchmark("regularizer_precision", "--rows", 2, "--columns", 4)
    one, two, three = 1 + 1, 2 + 3, 4 + 6
    assert result["costs"] == {
        "bfloat16": one, "float16": one, "tf32": 2 * one,
        "3 x bfloat16": two, "3 x float16": two, "3 x tf32": 2 * two, "6 x bfloat16": three,
        "3 x float16, truncated": two, "3 x float16, in slices": two,
        "3 x float16, then 1 x": 2 + 1, "3 x tf32, then 1 x": 2 * (2 + 1), "6 x bfloat16, then 3 x": 4 + 3,
    }  # fmt: skip


class TestTrainThroughput:
    NETWORK = ("--depth", 10, "--width", 1, "--device", "cpu")

    @pytest.fixture
    def throughput(self, benchmark):
        """throughput(*words): two short turns of each configuration of a tiny network."""
        turns = ("--batchSize", 4, "--rounds", 2, "--steps", 2)
        return lambda *words: benchmark("train_throughput", *self.NETWORK, *turns, *words)

    @pytest.mark.parametrize("method", METHODS)
    def test_the_plain_configuration_trains_the_same_network(self, throughput, method):
        strong = [] if method == "SGD" else ["--omega", 5]  # else too weak to be seen in three steps
        _, result = throughput("--optim_method", method, "--dropout", 0, *strong)
        ours, plain = result["ours"]["losses"], result["plain"]["losses"]
        assert len(set(ours)) == 3
        assert ours == pytest.approx(plain, rel=1e-5)

    def test_figures_agree_with_each_other_and_with_the_table(self, throughput):
        out, result = throughput("--optim_method", "SGDG")
        table = {line[:28].strip(): line[28:].split() for line in out.splitlines()[4:]}
        assert all(len(line) <= 80 for line in out.splitlines())
        for column, name in enumerate(("ours", "plain")):
            figures = result[name]
            for turn in range(2):
                rate, step, product = (
                    figures[key][turn] for key in ("images_per_s", "step_s", "product_flops")
                )
                parts = [
                    figures[f"{part}_s"][turn] for part in ("forward_backward", "optimizer", "input_wait")
                ]
                assert is_positive(rate, step, product, *parts)
                assert rate * step == pytest.approx(4)  # pictures of a batch
                assert sum(parts) <= step
                flops = figures["share_of_product"][turn] * product
                assert flops == pytest.approx(6 * result["multiply_adds"] * rate)
            seconds = statistics.median(figures["optimizer_s"])
            assert table["optimizer"][column] == f"{1e3 * seconds:,.2f}"
            assert is_positive(*figures["first_step_s"])
        assert result["gain"]["images_per_s"] == pytest.approx(result["gain"]["step_s"])
        assert table["images/s"][2] == f"{result['gain']['images_per_s']:.2f}"
        assert result["options"]["optim_method"] == "SGDG"

    def test_counts_are_those_of_the_summary(self, throughput):
        wide = ("--width", 4, "--batchSize", 1)  # so that the weights weigh more than the activations
        _, result = throughput("--optim_method", "SGDG", *wide)
        summary = call("--summary", *self.NETWORK, *wide).out
        count, parameters = (
            int(re.search(rf"{what}: ([\d,]+)", summary)[1].replace(",", ""))
            for what in ("multiply-adds of one picture", "in all")
        )
        assert result["multiply_adds"] == count
        ours, plain = (result[name]["peak_bytes"][0] / (4 * parameters) for name in ("ours", "plain"))
        assert (
            3 < ours < plain < 10
        )  # weights, gradients, momentum; the activations, what the rule makes anew

    def test_profile(self, throughput, tmp_path):
        throughput("--profile", tmp_path / "profile")
        assert "aten::convolution_backward" in (tmp_path / "profile/profile.txt").read_text()
        trace = json.loads(gzip.decompress((tmp_path / "profile/trace.json.gz").read_bytes()))
        assert trace["traceEvents"]


@pytest.mark.parametrize("name", ["train_throughput", "deterministic_cost"])
@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["--no-such-flag"], "--no-such-flag"),
        (["--ngpu", 2], "--ngpu means nothing"),
        (["--zero"], "--zero means nothing"),
        (["--save", "here"], "--save means nothing"),
        (["--max_minutes", 3], "--max_minutes means nothing"),
        (["--resume", "auto"], "--resume means nothing"),
        (["--eval"], "--eval means nothing"),
    ],
)
def test_flags_that_mean_nothing_to_a_benchmark(name, words, reason, benchmark, capsys):
    with pytest.raises(SystemExit):
        benchmark(name, "--depth", 10, "--width", 1, "--batchSize", 4, "--rounds", 1, *words)
    usage, error = capsys.readouterr().err.rsplit("error: ", 1)
    assert usage.startswith("usage: ")
    assert reason in error


def test_scale_invariance(benchmark):
    """What feeds a sum has a length that counts; in VGG all but the classifier feeds a normalization."""
    out, result = benchmark("scale_invariance", "--depth", 10, "--width", 1)
    assert list(result) == ["WRN-10-1", "VGG-13", "ResNet-18 (torchvision)"]
    invariant = {name: sum(w["invariant"] for w in weights) for name, weights in result.items()}
    for name, weights in result.items():
        assert f"{name}: {invariant[name]} of {len(weights)} weights are scale-invariant" in out
        assert all(0 <= w["cosine"] <= 1.0001 for w in weights)
    assert (invariant["WRN-10-1"], invariant["VGG-13"]) == (3, 12)


class TestLastLayer:
    @pytest.fixture
    def still(self, tiny, tmp_path):
        """still(*more): a run whose weights do not move, so that each epoch's loss is of the same network."""

        def train(*more):
            save = tmp_path / "run"
            words = ["--dropout", 0, "--lr", 1e-30, "--weightDecay", 0, "--bnDecay", 0]
            assert call(*tiny("SGD", save, *words, *more)).code == 0
            return save

        return train

    @pytest.mark.parametrize("more", [[], ["--holdout", 16], ["--dtype", "bfloat16"]])
    def test_the_loss_is_that_of_training(self, more, still, benchmark, pictures_root, tmp_path):
        run = still(*more)
        root = shutil.copytree(pictures_root, tmp_path / "moved")
        out, result = benchmark("last_layer", run, "--dataroot", root)
        (figure,) = result["runs"]
        assert figure["loss_at_first_length"] == figure["loss"]
        assert f"{figure['loss']:#9.3g}" in out.splitlines()[-1]
        assert figure["pictures"] == 3 * 16 * (2 if more[:1] == ["--holdout"] else 3)
        assert result["environment"]["torch"] == torch.__version__
        assert call("--resume", run, "--epochs", 5).code == 0
        history = torch.load(run / "checkpoint.pt")["history"]
        logged = statistics.mean(epoch["train_loss"] for epoch in history[2:])
        assert figure["loss"] == pytest.approx(logged, rel=1e-6)

    def test_what_it_is_at_another_length(self, still, benchmark, tmp_path):
        run = still()

        def lengthened(factor):
            copy = shutil.copytree(run, tmp_path / f"{factor} times as long")
            state = torch.load(copy / "checkpoint.pt")
            state["model"]["fc.weight"] *= factor
            state["model"]["fc.bias"] += torch.arange(len(state["model"]["fc.bias"]))
            torch.save(state, copy / "checkpoint.pt")
            return copy

        first, *others = benchmark("last_layer", *map(lengthened, (1, 8, 64)))[1]["runs"]
        for factor, longer in zip((8, 64), others, strict=True):
            assert longer["length"] == pytest.approx(factor * first["length"])
            assert longer["loss"] != pytest.approx(first["loss"], rel=1e-2)
            assert longer["loss_at_first_length"] == pytest.approx(first["loss"], rel=1e-6)

    def test_runs_that_it_cannot_measure(self, still, benchmark, pictures_root, tmp_path, capsys):
        def refused(run, *words):
            with pytest.raises(SystemExit):
                benchmark("last_layer", run, *words)
            return capsys.readouterr().err.rsplit("error: ", 1)[1]

        assert refused(tmp_path).startswith("there is no checkpoint")
        run = still()
        others = shutil.copytree(pictures_root, tmp_path / "others")
        next(others.glob("train/*/*")).unlink()
        assert refused(run, "--dataroot", others).startswith("the checkpoint is of other pictures")
        state = torch.load(run / "checkpoint.pt")
        torch.save({**state, "other_ranks": []}, run / "checkpoint.pt")
        assert "several processes" in refused(run)
