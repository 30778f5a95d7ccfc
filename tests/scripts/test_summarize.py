"""Tables and figures from run directories: what may be in a cell, what is shown, and what is left out."""

import csv
import json
import re
import shlex
import subprocess
import sys

import pytest
import summarize
from helpers import ROOT

OPTIONS = {
    "dataset": "digits", "dataset_name": None, "model": "resnet", "depth": 10, "width": 1, "dtype": "float32",
    "seed": 0, "epochs": 5, "epoch_step": [2, 3], "lr_decay_ratio": 0.2, "batch_size": 128, "momentum": 0.9,
    "weight_decay": 5e-4, "bn_decay": 0.0, "omega": 0.1, "grad_clip": 0.1, "dropout": 0.3, "device": "cpu",
    "optim_method": "SGD", "lr": 0.1, "lrg": None, "nthread": 1,
}  # fmt: skip
RATES = {"SGD": {}, "SGDG": {"lr": 0.01, "lrg": 0.2}, "AdamG": {"lr": 0.01, "lrg": 0.05}}
# The paper's tables: SGD, SGD-G and Adam-G on CIFAR-10, then on CIFAR-100; SVHN.
PAPER_CIFAR = """
vgg-13     5.88 5.87 6.05  26.17 25.29 24.89
vgg-19     6.49 5.92 6.02  27.62 25.79 25.59
wrn-28-10  3.89 3.85 3.78  18.66 18.19 18.30
wrn-40-10  3.72 3.72 3.80  18.39 18.04 17.85
"""
PAPER_SVHN = """
vgg-13    1.78 1.74 1.72
vgg-19    1.94 1.81 1.77
wrn-16-4  1.64 1.67 1.61
wrn-22-8  1.64 1.63 1.55
"""
DIGITS = {"name": "digits", "train_images": 1437, "test_images": 360, "sha256": "a" * 64}
CIFAR10 = {"name": "CIFAR10", "train_images": 50_000, "test_images": 10_000, "sha256": "c" * 64}
PAPER_RUN = {"dataset": "CIFAR10", "epochs": 200, "epoch_step": [60, 120, 160]}


def write_run(path, error, method="SGD", *, data=DIGITS, model="wrn-10-1", written=None, **changes):
    """A run whose test error falls to `error` in the last epoch, with a better epoch just before it."""
    options = OPTIONS | {"optim_method": method} | RATES[method] | changes
    path.mkdir(parents=True)
    config = {"options": options, "model": model, "data": data, "device": "x86_64 CPU"}
    (path / "config.json").write_text(json.dumps(config))
    with (path / "log.txt").open("w") as log:
        for epoch in range(1, (options["epochs"] if written is None else written) + 1):
            left = options["epochs"] - epoch
            now = error + (10 * left / options["epochs"] if left != 1 else -0.5)
            record = {"epoch": epoch, "train_loss": 0.01 + left, "test_acc": 100 - now, "train_acc": 90.0}
            record |= {"test_loss": 1.0, "train_time": 2.0, "test_time": 1.0, "images_per_sec": 700.0}
            log.write(f"json_stats: {json.dumps(options | record)}\n")
    return path


def output(capsys, *arguments):
    summarize.main([str(argument) for argument in arguments])
    return capsys.readouterr().out


def records(tmp_path, capsys, *directories):
    """The lines of the CSV file for these directories."""
    target = tmp_path / "table.csv"
    output(capsys, *directories, "--csv", target)
    with target.open() as file:
        return list(csv.DictReader(file))


def test_a_cell_is_the_median_of_its_seeds_last_epochs(tmp_path, capsys):
    for seed, error in enumerate((4.0, 3.0, 9.0, 3.5, 5.0)):
        write_run(tmp_path / f"runs/SGD/seed{seed}", error, seed=seed)
    (cell,) = records(tmp_path, capsys, tmp_path / "runs")
    assert [float(cell[name]) for name in ("test_error", "min", "max")] == pytest.approx([4.0, 3.0, 9.0])
    assert (cell["runs"], cell["unfinished"]) == ("5", "0")
    assert float(cell["train_loss"]) == pytest.approx(0.01)
    assert "4.00 (3.00 to 9.00, n = 5)" in output(capsys, tmp_path / "runs")


@pytest.mark.parametrize(
    "other",
    [
        {"data": DIGITS | {"sha256": "b" * 64}},
        {"data": DIGITS | {"name": "other"}},
        {"dtype": "bfloat16"},
        {"epochs": 6},
        {"epoch_step": [1, 3]},
        {"lr": 0.2},
        {"dropout": 0.0},
        {"weight_decay": 0.0},
        {"batch_size": 64},
        {"an_option_of_the_future": 1},
    ],
)
def test_what_differs_in_more_than_the_seed_is_never_in_one_cell(tmp_path, capsys, other):
    write_run(tmp_path / "runs/a", 4.0)
    write_run(tmp_path / "runs/b", 8.0, **({"seed": 1} | other))
    cells = records(tmp_path, capsys, tmp_path / "runs")
    assert sorted(float(cell["test_error"]) for cell in cells) == pytest.approx([4.0, 8.0])


def test_where_and_how_fast_a_run_ran_does_not_split_a_cell(tmp_path, capsys):
    write_run(tmp_path / "here/a", 4.0)
    write_run(tmp_path / "there/b", 8.0, seed=1, device="cuda", nthread=4)
    (cell,) = records(tmp_path, capsys, tmp_path / "here", tmp_path / "there")
    assert cell["runs"] == "2"


def test_an_unfinished_run_is_shown_but_not_counted(tmp_path, capsys):
    write_run(tmp_path / "runs/SGD/seed0", 4.0)
    write_run(tmp_path / "runs/SGD/seed1", 1.0, seed=1, written=4)
    write_run(tmp_path / "runs/SGDG/seed0", 1.0, "SGDG", written=3)
    write_run(tmp_path / "runs/AdamG/seed0", 1.0, "AdamG", written=0)
    cells = {cell["method"]: cell for cell in records(tmp_path, capsys, tmp_path / "runs")}
    assert float(cells["SGD"]["test_error"]) == pytest.approx(4.0)
    assert (cells["SGD"]["runs"], cells["SGD"]["unfinished"]) == ("1", "1")
    assert (cells["SGD-G"]["runs"], cells["SGD-G"]["test_error"]) == ("0", "")
    text = output(capsys, tmp_path / "runs")
    for shown in ("unfinished (3 of 5 epochs)", "unfinished (0 of 5 epochs)", "seed1: unfinished, 4 of 5 epochs"):
        assert shown in text
    assert "**" not in text  # one finished method is no best one


def test_a_line_that_is_being_written_is_ignored(tmp_path, capsys):
    path = write_run(tmp_path / "runs/SGD", 4.0)
    whole = (path / "log.txt").read_text()
    last = whole.splitlines(keepends=True)[-1]
    for missing in range(1, len(last), 97):  # also with nothing missing but the line end
        (path / "log.txt").write_text(whole[:-missing])
        assert "unfinished (4 of 5 epochs)" in output(capsys, tmp_path / "runs")


def test_methods_stand_side_by_side_with_the_best_in_bold_and_gaps_named(tmp_path, capsys):
    for seed in range(2):
        write_run(tmp_path / f"runs/wrn-10-1/SGD/seed{seed}", 5.0, seed=seed)
        write_run(tmp_path / f"runs/wrn-10-1/AdamG/seed{seed}", 4.0, "AdamG", seed=seed)
    (row,) = [line for line in output(capsys, tmp_path / "runs").splitlines() if "missing" in line]
    columns = [column.strip() for column in row.strip("|").split("|")]
    assert columns == ["WRN-10-1", "5.00 (5.00 to 5.00, n = 2)", "missing", "**4.00** (4.00 to 4.00, n = 2)"]


def test_two_protocols_in_two_folders_are_two_rows(tmp_path, capsys):
    for method in RATES:
        write_run(tmp_path / f"runs/paper/digits/wrn-10-1/{method}/seed0", 5.0, method)
        write_run(tmp_path / f"runs/own/digits/wrn-10-1/{method}/seed0", 4.0, method, lr=0.05)
    cells = records(tmp_path, capsys, tmp_path / "runs")
    assert [(cell["experiment"], cell["method"]) for cell in cells] == [
        (folder, method) for folder in ("own", "paper") for method in ("SGD", "SGD-G", "Adam-G")
    ]
    assert "missing" not in output(capsys, tmp_path / "runs")


def test_a_grid_of_rates_is_a_row_for_each(tmp_path, capsys):
    for index, lr in enumerate((0.1, 0.2, 0.4)):
        write_run(tmp_path / f"runs/{index}", 4.0 + index, lr=lr)
    write_run(tmp_path / "runs/g", 1.0, "SGDG")
    cells = records(tmp_path, capsys, tmp_path / "runs")
    assert sorted((cell["lr"], cell["runs"]) for cell in cells) == [(lr, "1") for lr in ("0.01", "0.1", "0.2", "0.4")]
    text = output(capsys, tmp_path / "runs")
    assert text.count("missing") == 1 + 2 * 2  # Adam-G, and SGD-G in two rows
    assert [text.count(f"WRN-10-1 #{number} ") for number in (1, 2, 3, 4)] == [0, 2, 2, 0]  # in both tables


def test_held_out_runs_have_a_table_of_their_own_with_the_best_set_of_each_method(tmp_path, capsys):
    errors = {("SGD", 0.1): 5.0, ("SGD", 0.2): 4.0, ("SGDG", 0.1): 7.0, ("SGDG", 0.2): 6.0, ("AdamG", 0.1): 9.0}
    for (method, lr), error in errors.items():
        write_run(tmp_path / f"runs/grid/{method}/lr{lr}", error, method, lr=lr, holdout=100)
    write_run(tmp_path / "runs/grid/SGD/lr0.2-seed1", 4.5, "SGD", lr=0.2, holdout=100, seed=1)
    write_run(tmp_path / "runs/result/SGD/seed0", 3.0, holdout=0)
    text = output(capsys, tmp_path / "runs", "--plots", tmp_path / "figures")
    results, search = text.split("choice of hyperparameters")
    assert ("3.00" in results, "3.00" in search) == (True, False)
    lines = [[column.strip() for column in line.split("|")] for line in search.splitlines() if "WRN" in line]
    assert [(line[3], line[4], *line[6:10]) for line in lines] == [
        ("SGD", "0.1", "1", "5.00", "", ""),
        ("SGD", "0.2", "2", "**4.25**", "4.00", "4.50"),
        ("SGD-G", "0.1", "1", "7.00", "", ""),
        ("SGD-G", "0.2", "1", "**6.00**", "", ""),
        ("Adam-G", "0.1", "1", "9.00", "", ""),  # one set is no choice
    ]
    assert [path.name for path in (tmp_path / "figures").iterdir()] == ["result-digits-wrn-10-1.png"]


def test_a_folder_named_after_data_and_network_is_no_experiment(tmp_path, capsys):
    named = {"data": DIGITS | {"name": "CIFAR-10 (JPEG)"}}
    write_run(tmp_path / "runs/CIFAR-10-JPEG-/wrn-10-1/SGD/seed0", 4.0, **named)
    write_run(tmp_path / "runs/own/rates/cifar10-jpeg/WRN-10-1/SGD/seed0", 5.0, **named)
    write_run(tmp_path / "runs/cifar10-jpeg/wrn-10-10/SGD/seed0", 6.0, **named)  # not what it holds
    write_run(tmp_path / "runs/опыт/цифры/SGD/seed0", 7.0, data=DIGITS | {"name": "Цифры"})
    cells = records(tmp_path, capsys, tmp_path / "runs")
    assert [cell["experiment"] for cell in cells] == ["", "own/rates", "wrn-10-10", "опыт"]


def test_weights_on_g_by_measurement_are_another_cell_than_by_the_rule(tmp_path, capsys):
    write_run(tmp_path / "runs/old", 4.0, "SGDG")  # before there was a choice
    write_run(tmp_path / "runs/rule", 5.0, "SGDG", seed=1, select="shape")
    write_run(tmp_path / "runs/measured", 6.0, "SGDG", select="measured")
    cells = records(tmp_path, capsys, tmp_path / "runs")
    assert [(cell["runs"], cell["other_options"]) for cell in cells] == [
        ("1", "select measured"),
        ("2", "select shape"),
    ]


def test_options_besides_the_rates_are_named_where_they_differ(tmp_path, capsys):
    write_run(tmp_path / "runs/a", 4.0, dropout=0.0)
    write_run(tmp_path / "runs/b", 5.0, weight_decay=0.1)
    write_run(tmp_path / "runs/c", 5.0, "SGDG", bn_decay=0.1)  # a method's own, with nothing to differ from
    cells = records(tmp_path, capsys, tmp_path / "runs")
    assert {(cell["method"], cell["other_options"]) for cell in cells} == {
        ("SGD", "weight_decay 0.0005, dropout 0.0"),
        ("SGD", "weight_decay 0.1, dropout 0.3"),
        ("SGD-G", "dropout 0.3"),
    }


def test_a_seed_counts_once_and_the_second_is_named(tmp_path, capsys):
    write_run(tmp_path / "a/first", 1.0, written=2)
    write_run(tmp_path / "a/second", 4.0)
    write_run(tmp_path / "a/third", 4.0)
    target = tmp_path / "table.csv"
    text = output(capsys, tmp_path / "a", tmp_path / "a/second", "--csv", target)  # the same folder twice is no twin
    with target.open() as file:
        (cell,) = csv.DictReader(file)
    assert (cell["runs"], cell["unfinished"]) == ("1", "0")  # the finished one counts
    assert f"{tmp_path / 'a/first'}: seed 0" in text
    assert f"{tmp_path / 'a/third'}: seed 0" in text
    assert text.count("seed 0 of the same settings") == 2


def test_the_papers_number_stands_beside_ours_only_where_it_may(tmp_path, capsys):
    named = {"data": CIFAR10, "model": "wrn-28-10"}
    write_run(tmp_path / "full/SGD/seed0", 4.0, **named, **PAPER_RUN)
    write_run(tmp_path / "short/SGD/seed0", 9.0, **named, dataset="CIFAR10")
    write_run(tmp_path / "archive/SGD/seed0", 9.0, **named | {"data": CIFAR10 | {"train_images": 500}}, **PAPER_RUN)
    (full,) = records(tmp_path, capsys, tmp_path / "full")
    assert (float(full["paper"]), float(full["difference"])) == pytest.approx((3.89, 0.11))
    (short,) = records(tmp_path, capsys, tmp_path / "short")
    assert (short["paper"], short["difference"]) == ("3.89", "")
    assert "the paper trained 200 epochs" in output(capsys, tmp_path / "short")
    (archive,) = records(tmp_path, capsys, tmp_path / "archive")
    assert (archive["paper"], archive["difference"]) == ("", "")


def test_the_papers_tables():
    rows = [line.split() for line in PAPER_CIFAR.strip().splitlines()]
    cifar = {network: tuple(map(float, numbers)) for network, *numbers in rows}
    svhn = {network: tuple(map(float, numbers)) for network, *numbers in map(str.split, PAPER_SVHN.strip().split("\n"))}
    assert summarize.PAPER["CIFAR10"].errors == {network: numbers[:3] for network, numbers in cifar.items()}
    assert summarize.PAPER["CIFAR100"].errors == {network: numbers[3:] for network, numbers in cifar.items()}
    assert summarize.PAPER["SVHN"].errors == svhn
    assert {name: entry[:3] for name, entry in summarize.PAPER.items()} == {
        "CIFAR10": (200, [60, 120, 160], (50_000, 10_000)),
        "CIFAR100": (200, [60, 120, 160], (50_000, 10_000)),
        "SVHN": (160, [60, 120], (73_257 + 531_131, 26_032)),
    }


def test_the_papers_networks_that_have_not_run_are_missing(tmp_path, capsys):
    for seed in range(2):
        run = tmp_path / f"runs/seed{seed}"
        write_run(run, 4.0, data=CIFAR10, model="wrn-28-10", seed=seed, **PAPER_RUN)
    text = output(capsys, tmp_path / "runs")
    assert "4.00 (4.00 to 4.00, n = 2); paper 3.89" in text
    for network in ("VGG-13", "VGG-19", "WRN-40-10"):
        (line,) = [line for line in text.splitlines() if network in line]
        assert line.count("missing; paper") == 3
    write_run(tmp_path / "short/a", 4.0, data=CIFAR10, model="wrn-28-10", dataset="CIFAR10")
    assert "WRN-40-10" in output(capsys, tmp_path / "short")
    write_run(tmp_path / "small/a", 4.0, data=CIFAR10, dataset="CIFAR10")  # WRN-10-1 is none of the paper's
    assert "WRN-40-10" not in output(capsys, tmp_path / "small")


def test_a_missing_method_of_a_single_row_is_shown(tmp_path, capsys):
    write_run(tmp_path / "runs/a", 4.0)
    assert output(capsys, tmp_path / "runs").count("missing") == 2


def test_figures_are_drawn_and_linked(tmp_path, capsys):
    for method in RATES:
        for seed in range(2):
            write_run(tmp_path / f"runs/{method}/seed{seed}", 4.0, method, seed=seed)
    write_run(tmp_path / "runs/AdamG/seed2", 4.0, "AdamG", seed=2, written=2)
    write_run(tmp_path / "runs/started", 4.0, written=0, depth=16, model="wrn-16-1")
    markdown = tmp_path / "docs/results.md"
    for x in ("epoch", "time"):
        output(capsys, tmp_path / "runs", "--plots", tmp_path / "docs/figures", "--markdown", markdown, "--x", x)
    figures = list((tmp_path / "docs/figures").iterdir())
    assert {figure.name for figure in figures} == {"digits-wrn-10-1.png", "digits-wrn-10-1-time.png"}
    assert all(figure.read_bytes().startswith(b"\x89PNG") and figure.stat().st_size > 5000 for figure in figures)
    assert "(figures/digits-wrn-10-1-time.png)" in markdown.read_text()
    output(capsys, tmp_path / "runs", "--plots", tmp_path / "docs/my figures", "--markdown", markdown)
    assert "(my%20figures/digits-wrn-10-1.png)" in markdown.read_text()


@pytest.mark.parametrize("x", ["epoch", "time"])
def test_a_figure_shows_the_runs_and_their_median(tmp_path, capsys, monkeypatch, x):
    for method, error in zip(RATES, (4.0, 6.0, 9.0), strict=True):
        for seed in range(3):
            write_run(tmp_path / f"runs/{method}/seed{seed}", error + seed**2, method, seed=seed)
    write_run(tmp_path / "runs/AdamG/seed3", 50.0, "AdamG", seed=3, written=2)
    figures = []
    monkeypatch.setattr("matplotlib.pyplot.close", figures.append)
    output(capsys, tmp_path / "runs", "--plots", tmp_path / "figures", "--x", x)
    (figure,) = figures
    loss, error = figure.axes
    assert (loss.get_title(), loss.get_yscale()) == ("Training loss", "log")
    assert (error.get_title(), error.get_yscale()) == ("Test error (%)", "linear")
    steps = [1, 2, 3, 4, 5] if x == "epoch" else [0.05, 0.1, 0.15, 0.2, 0.25]  # 2 s of training and 1 s of testing
    for panel in (loss, error):
        drops = {line.get_xdata()[0] for line in panel.lines if line.get_linestyle() == ":" and len(line.get_xdata())}
        assert sorted(drops) == pytest.approx([steps[1], steps[2]])
    assert len(set(summarize.COLOURS.values())) == 3
    for method, lowest in zip(RATES, (4.0, 6.0, 9.0), strict=True):
        mine = [line for line in error.lines if line.get_color() == summarize.COLOURS[method]]
        curves = [line for line in mine if line.get_linestyle() == "-" and len(line.get_xdata()) > 1]
        (thick,) = [line for line in curves if line.get_linewidth() == 2]
        thin = [line for line in curves if line.get_linewidth() < 1]
        assert len(thin) == 3 + (method == "AdamG")
        assert sorted(line.get_ydata()[-1] for line in thin)[:3] == pytest.approx([lowest, lowest + 1, lowest + 4])
        assert list(thick.get_xdata()) == pytest.approx(steps)
        assert list(thick.get_ydata()) == pytest.approx([lowest + 1 + more for more in (8, 6, 4, -0.5, 0)])
        (falling,) = [
            line.get_ydata()
            for line in loss.lines
            if line.get_color() == summarize.COLOURS[method] and line.get_linewidth() == 2
        ]
        assert list(falling) == pytest.approx([4.01, 3.01, 2.01, 1.01, 0.01])


def test_rows_of_one_network_get_figures_of_their_own(tmp_path, capsys):
    for index in range(3):
        write_run(tmp_path / f"runs/{index}", 4.0, lr=0.1 * (1 + index))
    output(capsys, tmp_path / "runs", "--plots", tmp_path / "figures")
    assert len(list((tmp_path / "figures").iterdir())) == 3
    (tmp_path / "figures.v2").mkdir()
    output(capsys, tmp_path / "runs", "--plots", tmp_path / "figures.v2")
    assert len(list((tmp_path / "figures.v2").iterdir())) == 3
    with pytest.raises(SystemExit, match="3 figures"):
        summarize.main([str(tmp_path / "runs"), "--plots", str(tmp_path / "one.png")])


def test_a_run_that_cannot_be_read_is_left_out_and_said(tmp_path, capsys):
    write_run(tmp_path / "runs/good", 4.0)
    (write_run(tmp_path / "runs/torn", 4.0) / "config.json").write_text('{"options": {')
    (write_run(tmp_path / "runs/old", 4.0) / "config.json").write_text('{"options": {}}')
    text = output(capsys, tmp_path / "runs")
    assert f"{tmp_path / 'runs/torn'}: its config.json" in text
    assert f"{tmp_path / 'runs/old'}: its config.json" in text
    assert "it has no data, model, device" in text


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("config.json", "5"),
        ("config.json", '{"options": [], "data": {}, "model": "m", "device": "CPU"}'),
        ("config.json", '{"options": null, "data": null, "model": "m", "device": "CPU"}'),
        ("config.json", None),
        ("log.txt", "json_stats: 5\n"),
        ("log.txt", "json_stats: {}\n"),
    ],
)
def test_whatever_is_in_a_file_the_others_are_shown(tmp_path, capsys, file, content):
    write_run(tmp_path / "runs/good", 4.0)
    odd = write_run(tmp_path / "runs/odd", 5.0) / file
    odd.unlink() if content is None else odd.write_text(content)
    text = output(capsys, tmp_path / "runs")
    assert "4.00" in text
    assert f"- {tmp_path / 'runs/odd'}: its config.json or log.txt cannot be used" in text


def test_a_figure_that_is_no_number_makes_a_log_unusable(tmp_path, capsys):
    write_run(tmp_path / "runs/good", 4.0)
    log = write_run(tmp_path / "runs/odd", 5.0) / "log.txt"
    log.write_text(log.read_text().replace('"test_acc": 95.0', '"test_acc": null'))
    assert "not all of its figures are numbers" in output(capsys, tmp_path / "runs")


def test_a_run_that_has_just_begun_has_no_log_yet(tmp_path, capsys):
    (write_run(tmp_path / "runs/a", 4.0) / "log.txt").unlink()
    assert "unfinished (0 of 5 epochs)" in output(capsys, tmp_path / "runs")


def test_tf32_is_another_precision_and_versions_are_named(tmp_path, capsys):
    """As most GPUs compute float32 convolutions."""
    write_run(tmp_path / "runs/a", 4.0)  # an older run, on a CPU
    for seed, more in enumerate(("float32", "TF32", "TF32", None), 1):
        config = write_run(tmp_path / f"runs/{seed}", 8.0, seed=seed) / "config.json"
        commit = f"{seed}234567890" + 30 * "0" + ("-dirty" if seed == 3 else "")
        versions = {"float32_convolutions": more, "torch": "2.11.0", "git_commit": commit}
        versions = versions if more else {"device": "NVIDIA H200"}  # an older one
        config.write_text(json.dumps(json.loads(config.read_text()) | versions))
    cells = records(tmp_path, capsys, tmp_path / "runs")
    assert [(cell["float32_convolutions"], cell["runs"]) for cell in cells] == [("TF32", "3"), ("float32", "2")]
    text = output(capsys, tmp_path / "runs")
    assert text.count("; float32, batches") == 1
    assert text.count("; float32 (TF32 in convolutions), batches") == 1
    assert "torch: 2.11.0; commit: 1234567." in text
    assert "torch: 2.11.0; commit: 2234567, 3234567-dirty." in text


def test_what_all_runs_share_is_said(tmp_path, capsys):
    write_run(tmp_path / "runs/a", 4.0, omega=None, grad_clip=None, bn_decay=5e-4)
    write_run(tmp_path / "runs/b", 4.0, "SGDG")
    write_run(tmp_path / "runs/c", 4.0, "AdamG", grad_clip=None)  # off, which is not SGD's "has none"
    write_run(tmp_path / "runs/d", 4.0, "AdamG", grad_clip=None, select="measured")
    text = output(capsys, tmp_path / "runs")
    shared = "momentum 0.9, weight_decay 0.0005, bn_decay 0.0005 (SGD), bn_decay 0.0 (SGD-G, Adam-G), omega 0.1, "
    shared += "grad_clip 0.1 (SGD-G), grad_clip None (Adam-G), dropout 0.3, select shape (SGD-G)"
    assert f"; {shared}; device" in text


def test_the_published_table_is_that_of_the_published_logs(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(summarize, "draw", lambda *arguments: None)
    output(capsys, "logs/published", "--markdown", tmp_path / "results.md", "--plots", tmp_path / "figures")
    assert (tmp_path / "results.md").read_text() == (ROOT / "docs/results.md").read_text()
    linked = re.findall(r"\((figures/.*?)\)", (ROOT / "docs/results.md").read_text())
    assert sorted(linked) == sorted(f"figures/{path.name}" for path in (ROOT / "docs/figures").iterdir())


def test_runs_behind_links_are_found_once(tmp_path, capsys):
    write_run(tmp_path / "disk/wrn-10-1/SGD/seed0", 4.0)
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs/digits").symlink_to(tmp_path / "disk")
    (tmp_path / "disk/back").symlink_to(tmp_path / "runs")
    (cell,) = records(tmp_path, capsys, tmp_path / "runs", tmp_path / "disk")
    assert (cell["runs"], cell["experiment"]) == ("1", "")


@pytest.mark.parametrize("flag", ["--csv", "--markdown", "--plots"])
def test_a_place_that_cannot_be_written_is_one_sentence(tmp_path, flag):
    write_run(tmp_path / "runs/a", 4.0)
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit, match="file"):
        summarize.main([str(tmp_path / "runs"), flag, str(tmp_path / "file" / "x")])


def test_a_reader_that_leaves_early_is_no_error(tmp_path):
    write_run(tmp_path / "runs/a", 4.0)
    command = f"{shlex.quote(sys.executable)} -u {summarize.__file__} {shlex.quote(str(tmp_path / 'runs'))} | true"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")


def test_nothing_to_read_is_one_sentence(tmp_path, capsys):
    with pytest.raises(SystemExit, match="No usable run"):
        summarize.main([str(tmp_path)])
    with pytest.raises(SystemExit) as stop:
        summarize.main([str(tmp_path / "nowhere")])
    assert stop.value.code == 2
    assert "is not a directory" in capsys.readouterr().err
