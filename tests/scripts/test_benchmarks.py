"""Every benchmark runs, on a small setting, and prints and writes figures that can be true."""

import json
import math
import os
import runpy
import sys

import pytest
from helpers import ROOT


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
    out, result = benchmark("regularizer_precision", "--rows", 8, "--columns", 40)
    for rows, figures in result["figures"].items():
        assert any(line.startswith(rows) for line in out.splitlines())
        errors = figures["errors"]
        assert is_positive(figures["off_orthogonal"], *errors.values())
        assert errors["float32"] < errors["tf32"] < errors["bfloat16"] < 1


def test_scale_invariance(benchmark):
    """What feeds a sum has a length that counts; in VGG all but the classifier feeds a normalization."""
    out, result = benchmark("scale_invariance", "--depth", 10, "--width", 1)
    assert list(result) == ["WRN-10-1", "VGG-13", "ResNet-18 (torchvision)"]
    invariant = {name: sum(w["invariant"] for w in weights) for name, weights in result.items()}
    for name, weights in result.items():
        assert f"{name}: {invariant[name]} of {len(weights)} weights are scale-invariant" in out
        assert all(0 <= w["cosine"] <= 1.0001 for w in weights)
    assert (invariant["WRN-10-1"], invariant["VGG-13"]) == (3, 12)
