"""Tables and figures from run directories: what may be in a cell, what is shown, drawn, and left out."""

import cProfile
import csv
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import summarize
from helpers import ROOT
from matplotlib.figure import Figure

import utils

OPTIONS = {
    "dataset": "digits", "dataset_name": None, "model": "resnet", "depth": 10, "width": 1, "dtype": "float32",
    "seed": 0, "epochs": 5, "epoch_step": [], "lr_decay_ratio": 0.2, "batch_size": 128, "momentum": 0.9,
    "weight_decay": 5e-4, "bn_decay": 0.0, "omega": 0.1, "grad_clip": 0.1, "dropout": 0.3, "device": "cpu",
    "optim_method": "SGD", "lr": 0.1, "lrg": None, "nthread": 1, "select": "shape", "holdout": 0,
}  # fmt: skip
RATES = {"SGD": {"select": None}, "SGDG": {"lr": 0.01, "lrg": 0.2}, "AdamG": {"lr": 0.01, "lrg": 0.05}}
DIGITS = {"name": "digits", "train_images": 1437, "test_images": 360, "sha256": "a" * 64}
CIFAR10 = {"name": "CIFAR10", "train_images": 50_000, "test_images": 10_000, "sha256": "c" * 64}
PAPER_RUN = {"dataset": "CIFAR10", "epochs": 200, "epoch_step": [60, 120, 160]}
# Three phases, the third of one epoch less than three.
FALLING = [9.0, 8.0, 2.0, 1.5, 1.0, 0.9, 0.5, 0.4, 0.3, 0.3, 0.2]
DROPS = {"epoch_step": [5, 9]}


@pytest.fixture(autouse=True)
def in_a_folder(tmp_path, monkeypatch):
    """Each test works in an empty folder, mostly on the runs below `runs`."""
    monkeypatch.chdir(tmp_path)


def write_run(
    name,
    error,
    method="SGD",
    *,
    data=DIGITS,
    model="wrn-10-1",
    written=None,
    losses=None,
    config=(),
    **changes,
):
    """A run whose test error falls to `error` in the last epoch, with a better epoch just before it.

    losses: of all its epochs; they fall to a hundredth of the error if not given. config: more entries.
    """
    changes |= {"epochs": len(losses)} if losses else {}
    options = OPTIONS | {"optim_method": method} | RATES[method] | changes
    path = Path(name)
    path.mkdir(parents=True)
    entries = {"options": options, "model": model, "data": data, "device": "x86_64 CPU"} | dict(config)
    (path / "config.json").write_text(json.dumps(entries))
    with (path / "log.txt").open("w") as log:
        for epoch in range(1, (options["epochs"] if written is None else written) + 1):
            left = options["epochs"] - epoch
            now = error + (10 * left / options["epochs"] if left != 1 else -0.5)
            loss = losses[epoch - 1] if losses else error / 100 + left
            record = {"epoch": epoch, "train_loss": loss, "test_acc": 100 - now}
            log.write(f"json_stats: {json.dumps(record)}\n")
    return path


def write_seeds(name, errors, *arguments, **changes):
    for seed, error in enumerate(errors):
        write_run(f"{name}/seed{seed}", error, *arguments, seed=seed, **changes)


@pytest.fixture
def show(capsys):
    """show(*arguments): what the program prints."""

    def printed(*arguments):
        capsys.readouterr()
        summarize.main([*arguments])
        return capsys.readouterr().out

    return printed


@pytest.fixture
def cells(show):
    """cells(*directories): the lines of the CSV file for these."""

    def written(*directories):
        show(*directories, "--csv", "table.csv")
        with open("table.csv") as file:
            return list(csv.DictReader(file))

    return written


@pytest.fixture
def page(show):
    """page(*directories): the tables of the page for these, as lists of {head: text}, and its text."""

    def written(*arguments):
        Path("page.md").unlink(missing_ok=True)
        show(*arguments, "--markdown", "page.md")
        text, tables = Path("page.md").read_text(), []
        for found in re.findall(r"(?:^\|.*\n)+", text, re.M):
            heads, _, *lines = [re.split(r" *(?<!\\)\| *", line)[1:-1] for line in found.splitlines()]
            tables.append([dict(zip(heads, line, strict=True)) for line in lines])
        return tables, text

    return written


# Cells


def test_a_cell_is_the_median_of_its_seeds_last_epochs(cells, show):
    write_seeds("runs/SGD", (4.0, 3.0, 9.0, 3.5, 5.0))
    (cell,) = cells("runs")
    assert [float(cell[name]) for name in ("test_error", "min", "max")] == [4.0, 3.0, 9.0]
    assert (cell["runs"], cell["unfinished"], cell["experiment"]) == ("5", "0", "")
    assert "4.00 (3.00 to 9.00, n = 5)" in show("runs")


@pytest.mark.parametrize("other", [
    {"data": DIGITS | {"sha256": "b" * 64}}, {"data": DIGITS | {"name": "other"}}, {"dtype": "bfloat16"},
    {"epochs": 6}, {"epoch_step": [1, 3]}, {"lr_decay_ratio": 0.1}, {"batch_size": 64}, {"holdout": 100},
    {"lr": 0.2}, {"lrg": 0.1}, {"momentum": 0.8}, {"weight_decay": 0.0}, {"bn_decay": 5e-4}, {"omega": 0.0},
    {"grad_clip": None}, {"select": "measured"}, {"dropout": 0.0}, {"an_option_of_the_future": 1},
    {"sync_bn": True}, {"config": {"processes": 2}}, {"config": {"weights_from": "logs/other"}},
    {"config": {"float32_convolutions": "TF32"}}, {"config": {"device": "NVIDIA H200"}},
], ids=str)  # fmt: skip
def test_what_differs_in_more_than_the_seed_is_never_in_one_cell(cells, other):
    """Of devices the older runs, which do not say that a GPU's convolutions have another precision."""
    write_run("runs/a", 4.0, "AdamG")
    write_run("runs/b", 8.0, "AdamG", **({"seed": 1} | other))
    assert sorted(float(cell["test_error"]) for cell in cells("runs")) == [4.0, 8.0]


def test_where_and_how_fast_a_run_ran_does_not_split_a_cell(cells):
    write_run("here/a", 4.0)
    write_run("there/b", 8.0, seed=1, device="cuda", nthread=4, config={"float32_convolutions": "float32"})
    (cell,) = cells("here", "there")
    assert cell["runs"] == "2"


@pytest.mark.parametrize(("option", "default"), [("holdout", 0), ("select", "shape"), ("sync_bn", False)])
def test_a_run_from_before_an_option_has_its_default(cells, option, default):
    path = write_run("runs/older", 4.0, "SGDG") / "config.json"
    config = json.loads(path.read_text())
    config["options"].pop(option, None)
    path.write_text(json.dumps(config))
    write_run("runs/today", 8.0, "SGDG", seed=1, **{option: default})
    (cell,) = cells("runs")
    assert cell["runs"] == "2"


def test_an_unfinished_run_is_named_but_not_counted(cells, show):
    write_run("runs/SGD/seed0", 4.0)
    write_run("runs/SGD/seed1", 1.0, seed=1, written=4)
    write_run("runs/SGDG/seed0", 1.0, "SGDG", written=3)
    write_run("runs/SGDG/seed1", 1.0, "SGDG", seed=1, written=2)  # the cell tells of the one that got further
    (write_run("runs/AdamG/seed0", 1.0, "AdamG") / "log.txt").unlink()  # it has just begun
    found = {cell["method"]: cell for cell in cells("runs")}
    assert [(found[m]["runs"], found[m]["unfinished"]) for m in ("SGD", "SGD-G")] == [("1", "1"), ("0", "2")]
    assert (float(found["SGD"]["test_error"]), found["SGD-G"]["test_error"]) == (4.0, "")
    tables, named = show("runs").split("Not counted:")
    assert re.findall(r"epoch \d of \d", tables) == ["epoch 3 of 5", "epoch 0 of 5"]
    assert "- runs/SGD/seed1: unfinished, epoch 4 of 5" in named


def test_a_line_that_is_being_written_is_ignored(show):
    log = write_run("runs/SGD", 4.0) / "log.txt"
    whole = log.read_text()
    last = whole.splitlines(keepends=True)[-1]
    for missing in range(1, len(last), 37):  # also with nothing missing but the line end
        log.write_text(whole[:-missing])
        assert "unfinished, epoch 4 of 5" in show("runs")


def test_a_seed_counts_once_and_the_second_is_named(cells, show):
    write_run("runs/first", 1.0, written=2)
    write_run("runs/second", 4.0)
    (cell,) = cells("runs", "runs/second")  # the same folder twice is no twin
    assert (cell["runs"], cell["unfinished"]) == ("1", "0")  # the finished one counts
    assert "- runs/first: seed 0 of the same settings is there as runs/second" in show("runs")


def test_an_experiment_is_the_folders_that_name_no_data_network_method_or_seed(cells):
    named = {"data": DIGITS | {"name": "CIFAR-10 (JPEG)"}}
    write_run("runs/CIFAR-10-JPEG-/wrn-10-1/SGD/seed0/run", 4.0, **named)
    write_run("runs/own/rates/cifar10-jpeg/WRN-10-1/SGD/seed0", 5.0, **named)
    write_run("runs/cifar10-jpeg/wrn-10-10/SGD/seed0", 6.0, **named)  # not what it holds
    assert [cell["experiment"] for cell in cells("runs")] == ["", "own/rates", "wrn-10-10"]


# What is shown


def test_options_are_named_where_they_differ_from_most_of_the_methods(page):
    write_run("runs/a", 4.0, bn_decay=5e-4)
    write_run("runs/b", 4.0, "SGDG")
    write_run("runs/c", 5.0, "SGDG", seed=1, dropout=0.0, config={"weights_from": "logs/a"})
    write_run("runs/d", 5.0, "SGDG", lr=0.02)
    ((*lines,),), _ = page("runs")
    assert [line["Other options"] for line in lines] == ["", "dropout 0.0, weights_from logs/a", "", ""]


def test_held_out_runs_have_a_table_of_their_own_with_the_best_first(page):
    sets = [("SGD", 0.1, 5.0), ("SGD", 0.2, 4.0, 4.5), ("SGDG", 0.1, 7.0)]
    for method, lr, *errors in sets:
        for seed, error in enumerate(errors):
            write_run(f"runs/grid/{method}/lr{lr}-{seed}", error, method, lr=lr, seed=seed, holdout=100)
    write_run("runs/result/SGD/seed0", 3.0)
    (results, search), text = page("runs", "--plots", "figures")
    assert [line["Error (%)"] for line in results] == ["3.00"]
    assert [list(line.values()) for line in search] == [
        ["WRN-10-1, grid", "SGD", "4.25 (4.00 to 4.50, n = 2) at 0.2; 5.00 at 0.1"],
        ["WRN-10-1, grid", "SGD-G", "7.00 at 0.1, 0.2"],
    ]
    assert "1,437 training and 360 held-out images" in text.split("choice of hyperparameters")[1]
    assert sorted(os.listdir("figures")) == ["paper-curves.png", "result-digits-wrn-10-1.png"]


def test_the_papers_number_stands_beside_ours_only_where_it_may(cells, page):
    named = {"data": CIFAR10, "model": "wrn-28-10"} | PAPER_RUN
    write_run("full/SGD/seed0", 4.0, **named)
    (full,) = cells("full")
    assert full["paper"] == "3.89"
    (((line),),), _ = page("full")
    assert (line["Paper"], line["Diff."]) == ("3.89", "+0.11")
    for name, other in {
        "network": {"model": "wrn-10-1"},
        "archive": {"data": CIFAR10 | {"train_images": 500}},
        "epochs": {"epochs": 20},
        "drops": {"epoch_step": [60, 120, 180]},
    }.items():
        write_run(f"{name}/SGD/seed0", 4.0, **named | other)
        (cell,) = cells(name)
        assert cell["paper"] == ""


def test_the_loss_at_a_phases_end_is_the_median_of_its_last_three_epochs(cells, page):
    write_run("runs/a", 4.0, losses=FALLING, **DROPS)
    write_run("runs/b", 4.0, losses=[2 * loss for loss in FALLING], seed=1, **DROPS)
    write_run("runs/unfinished", 4.0, losses=[9.0] * 11, seed=2, written=10, **DROPS)
    ((line,),), _ = page("runs")
    assert [line[f"Loss at {end}"] for end in (5, 9, 11)] == [
        "2.25 (1.50 to 3.00)", "0.600 (0.400 to 0.800)", "0.375 (0.250 to 0.500)"
    ]  # fmt: skip
    (cell,) = cells("runs")
    assert (cell["phases"], cell["train_loss"]) == ("2.25 0.6 0.375", "0.375")


def test_the_terminal_has_80_columns(show):
    named = {"data": CIFAR10, "model": "wrn-28-10"} | PAPER_RUN
    for method, rates in {"SGD": {}, "SGDG": {"lrg": 0.0125}, "AdamG": {"dropout": 0.05}}.items():
        write_seeds(f"runs/a-name-of-some-length/{method}", (14.0, 13.0), method, **named | rates)
    write_run("runs/other/SGDG", 1.0, "SGDG", epochs=1)
    text = show("runs")
    assert max(map(len, text.splitlines())) <= 80
    assert "SGD     0.1           13.50 (13.00 to 14.00, n = 2)  3.89   +9.61  1.14\n" in text
    assert " 1 epoch, learning rates are constant" in " ".join(text.split())


# Files


def test_a_csv_has_every_digit_and_no_formula(cells):
    for index, name in enumerate(("=1+1", "+1", "-1", "@a", "\tb", "c")):
        write_run(f"runs/{index}", 4.0, model=name, losses=[1.23456e-5, 1.23456e-5])
    found = cells("runs")
    assert {cell["network"] for cell in found} == {"'=1+1", "'+1", "'-1", "'@a", "\\tb", "c"}
    assert {cell["train_loss"] for cell in found} == {"1.23456e-05"}


def test_a_page_keeps_what_stands_around_its_two_markers(show):
    write_run("runs/a", 4.0)
    page, begin, end = Path("page.md"), summarize.BEGIN, summarize.END
    show("runs", "--markdown", "page.md")
    (generated,) = re.findall(f"{begin}\n\n(.*)\n{end}", page.read_text(), re.S)
    assert generated.startswith("### digits")
    page.write_text(f"# By hand\n\n{begin}\nolder\n{end}\n\nBelow\n")
    for _ in range(2):  # again changes nothing
        show("runs", "--markdown", "page.md")
        assert page.read_text() == f"# By hand\n\n{begin}\n\n{generated}\n{end}\n\nBelow\n"
    for torn in (
        "by hand\n", f"{begin}\n", f"{end}\n", f"{end}\n{begin}\n", f"{begin}\n{begin}\n{end}\n",
        f"{begin}\n{end}\n{end}\n", f"{end}\n{begin}\n{end}\n",
    ):  # fmt: skip
        page.write_text(torn)
        with pytest.raises(SystemExit, match="it needs these two lines, once each and in this order"):
            show("runs", "--markdown", "page.md")
        assert page.read_text() == torn


@pytest.mark.parametrize("flag", ["--csv", "--markdown"])
def test_files_are_written_whole_or_left_as_they_are(monkeypatch, capsys, flag):
    write_run("runs/a", 4.0)
    old = f"By hand {summarize.BEGIN}{summarize.END}"
    Path("file").write_text(old)

    def full(number):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(utils.os, "fsync", full)
    with pytest.raises(SystemExit, match=r"cannot write file: .*No space left on device"):
        summarize.main(["runs", flag, "file"])
    assert "4.00" in capsys.readouterr().out
    assert (Path("file").read_text(), sorted(os.listdir())) == (old, ["file", "runs"])


def test_names_break_neither_page_nor_terminal(show, page):
    nasty = f"a|b\n<img src=x> `c` *d* [f](g) $x$ & ~~h~~ \x1b[31m \udcff{summarize.END}"
    write_run("runs/a", 4.0, data=DIGITS | {"name": nasty}, model=f"WRN² {nasty}", an_option=nasty)
    write_run("runs/b", 4.0, data=DIGITS | {"name": nasty}, model=f"WRN² {nasty}", an_option=1)
    ((*lines,),), text = page("runs", "--plots", "figures")
    assert len(lines) == 2
    plain = re.sub(r"\\[^a-z\s]", "", text.split(summarize.BEGIN)[1])  # without what is escaped
    assert not re.search(r"[<>`$~]", plain.replace(summarize.END, ""))
    assert not re.search("[\x00-\x09\x0b-\x1f\x7f\udcff]", text + show("runs"))


def test_the_published_tables_are_those_of_the_published_logs(show, monkeypatch):
    text, published = (ROOT / "docs/results.md").read_text(), ROOT / "logs/published"
    before, after = text.split(summarize.BEGIN)[0], text.split(summarize.END)[1]
    Path("results.md").write_text(f"{before}{summarize.BEGIN}{summarize.END}{after}")
    show(str(published), "--markdown", "results.md")
    assert Path("results.md").read_text() == text
    monkeypatch.setattr(summarize, "draw", lambda *arguments: None)
    drawn = show(str(published / "whole-schedule"), "--plots", "f").split("Figures: ")[1].split()
    assert {Path(path).name for path in drawn} == {path.name for path in (ROOT / "docs/figures").iterdir()}


def test_a_reader_that_leaves_early_is_no_error():
    write_run("runs/a", 4.0)
    command = f'"{sys.executable}" -u "{summarize.__file__}" runs | true'
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


# Runs that cannot be used, and where runs are looked for


ODD = [  # (file, what is there: bytes, or values that replace others; what is said of it)
    ("config.json", b"", "Expecting value"),
    ("config.json", b"\xff\xfe", "codec can't decode"),
    ("config.json", b"[" * 100_000, "recursion"),
    ("config.json", b"{}", "it says nothing of 'data'"),
    ("config.json", {"options": None}, "unsupported operand"),
    ("config.json", {"options": OPTIONS | {"lr": float("inf")}}, "inf is not a finite number"),
    ("log.txt", b"json_stats: {}\n", "it says nothing of 'train_loss'"),
    ("log.txt", {"train_loss": float("nan")}, "nan is not a finite number"),
    ("log.txt", {"test_acc": float("nan")}, "nan is not a finite number"),
    ("log.txt", {"epoch": 4}, "its epochs are not the first of 5, each once"),
    ("config.json", {"options": OPTIONS | {"epochs": 4}}, "its epochs are not the first of 4"),
]


@pytest.mark.parametrize(("file", "odd", "reason"), ODD, ids=range(len(ODD)))
def test_an_odd_run_is_named_and_ends_no_other(capsys, file, odd, reason):
    write_run("runs/good", 4.0)
    path = write_run("runs/odd", 5.0, seed=1) / file
    *lines, last = path.read_text().splitlines(keepends=True)
    if isinstance(odd, dict):
        values = json.dumps(json.loads(last.removeprefix("json_stats:")) | odd)
        odd = "".join([*lines, "json_stats:" if lines else "", values, "\n"]).encode()
    path.write_bytes(odd)
    summarize.main(["runs"])
    out, said = capsys.readouterr()
    assert re.fullmatch(r"summarize\.py: left out runs/odd/(config.json|log.txt): [^\n]+\n", said)
    assert reason in said
    assert " 4.00 " in out
    assert out.count("- runs/odd/") == 1


def test_runs_behind_links_are_found_once(cells, tmp_path):
    write_run("disk/wrn-10-1/SGD/seed0", 4.0)
    Path("runs").mkdir()
    Path("runs/digits").symlink_to(tmp_path / "disk")
    Path("disk/back").symlink_to(tmp_path / "runs")
    for directories in (["runs"], ["runs", "disk"]):
        (cell,) = cells(*directories)
        assert (cell["runs"], cell["experiment"]) == ("1", "")


def test_published_runs_stay_apart_unless_they_are_named(cells):
    write_run("logs/mine/seed0", 4.0)
    write_run("logs/published/theirs/seed1", 8.0, seed=1)
    assert [cell["experiment"] for cell in cells("logs")] == ["mine"]
    assert [cell["experiment"] for cell in cells("logs", "logs/published")] == ["mine", "theirs"]
    Path("logs/mine").rename("mine")
    with pytest.raises(SystemExit, match="No usable run"):
        summarize.main(["logs"])


def test_four_times_the_settings_are_four_times_the_work():
    """Counted in calls of functions instead of timed."""
    calls = dict.fromkeys((10, 40), 0)
    for settings in calls:
        for index in range(settings):
            write_run(f"{settings}/{index}", 4.0, lr=0.001 * (index + 1), epochs=1)
        runs, _ = summarize.read_runs([Path(f"{settings}")])
        profile = cProfile.Profile()
        profile.runcall(lambda runs=runs: summarize.report(summarize.make_tables(runs, []), []))
        calls[settings] = sum(entry.callcount for entry in profile.getstats())
    assert calls[40] < 5 * calls[10]


# Figures


SIZES = {"CIFAR10": (50_000, 10_000), "CIFAR100": (50_000, 10_000), "SVHN": (604_388, 26_032)}


def draw_run(name, error, method="SGD", epochs=5, **changes):
    """A run whose loss falls by 1 each epoch, to 1, and whose rates drop after two epochs and after three."""
    losses = [*range(epochs, 0, -1)]
    return write_run(f"runs/{name}", error, method, epoch_step=[2, 3], losses=losses, **changes)


def of_paper(dataset, images=None):
    sizes = dict(zip(("train_images", "test_images"), images or SIZES[dataset], strict=True))
    return {"data": DIGITS | {"name": dataset} | sizes, "dataset": dataset}


@pytest.fixture
def panels(monkeypatch):
    """panels(*arguments): {file: the panels that can be seen} of what the program draws of `runs`."""
    drawn = {}

    def keep(figure, path, **_):
        drawn[Path(path).name] = [axis for axis in figure.axes if axis.get_visible()]

    monkeypatch.setattr(Figure, "savefig", keep)

    def draw(*arguments):
        drawn.clear()
        summarize.main(["runs", "--plots", "figures", *arguments])
        return dict(drawn)

    return draw


def curves(panel, method, style="-"):
    """(width, x, y) of a method's curves."""
    lines = [line for line in panel.lines if line.get_color() == summarize.COLOURS[method]]
    lines = [line for line in lines if line.get_linestyle() == style and len(line.get_xdata()) > 2]
    return [(line.get_linewidth(), list(line.get_xdata()), list(line.get_ydata())) for line in lines]


def drops(panel):
    dotted = [line for line in panel.lines if line.get_linestyle() == ":"]
    return {line.get_xdata()[0] for line in dotted if len(line.get_xdata())}


def labels(panel):
    return [text.get_text() for text in panel.get_legend().get_texts()]


def test_a_figure_shows_the_runs_and_their_median(panels):
    for method in ("SGD", "SGDG", "AdamG"):
        for seed, more in enumerate((0, 1, 5)):
            draw_run(f"{method}{seed}", 4.0 + more, method, seed=seed)
    draw_run("unfinished", 50.0, "AdamG", seed=3, written=3)
    loss, error = panels()["digits-wrn-10-1.png"]
    assert (loss.get_title(), loss.get_yscale()) == ("Training loss", "log")
    assert loss.yaxis.get_major_formatter()(0.01, 0) == "0.01"  # not a power as a formula
    assert (error.get_title(), error.get_yscale()) == ("Test error (%)", "linear")
    assert labels(loss) == [*(f"{m} (median of 3)" for m in summarize.COLOURS), "learning rates drop"]
    for method in summarize.COLOURS:
        *thin, (width, horizontal, vertical) = sorted(curves(error, method), key=lambda line: line[0])
        assert [line[0] < 1 for line in thin] == [True] * (3 + (method == "Adam-G"))
        assert sorted(line[2][-1] for line in thin if len(line[2]) == 5) == pytest.approx([4, 5, 9])
        assert (width, horizontal) == (2, [1, 2, 3, 4, 5])
        assert vertical == pytest.approx([13, 11, 9, 4.5, 5])
        assert [line[2] for line in curves(loss, method) if line[0] == 2] == [[5, 4, 3, 2, 1]]
    assert drops(loss) == drops(error) == {2, 3}


def test_cells_of_one_method_are_told_apart(panels):
    for lr in (0.1, 0.2):
        draw_run(f"SGD{lr}", 4.0, lr=lr)
    draw_run("SGDG", 4.0, "SGDG", written=2)
    loss, _ = panels()["digits-wrn-10-1.png"]
    assert labels(loss) == ["SGD 0.1", "SGD 0.2", "SGD-G (unfinished)", "learning rates drop"]
    assert len({line.get_alpha() for line in loss.lines if line.get_linewidth() == 2}) == 2


def test_errors_are_shown_from_a_fifth_of_the_epochs_on(panels):
    """They fall by a point an epoch: the first two would press the last together."""
    draw_run("a", 8.0, epochs=10)
    limits = panels()["digits-wrn-10-1.png"][1].get_ylim()
    assert limits == pytest.approx((0.9 * 7.5, 1.1 * 15))


def test_few_epochs_have_whole_ticks_and_a_single_one_is_a_dot(panels):
    for epochs in (1, 2, 3):
        path = draw_run("a", 4.0, epochs=epochs)
        (loss, _), *_ = panels().values()
        low, high = loss.get_xlim()
        assert all(tick == int(tick) for tick in loss.get_xticks() if low <= tick <= high)
        assert ("o" in [line.get_marker() for line in loss.lines]) == (epochs == 1)
        assert drops(loss) == {drop for drop in (2, 3) if drop < epochs}
        path.rename(f"kept{epochs}")


@pytest.mark.parametrize(("dataset", "model"), [("CIFAR100", "wrn-28-10"), ("SVHN", "wrn-22-8")])
def test_the_papers_curves_stand_behind_ours(panels, dataset, model):
    for method in ("SGD", "AdamG"):
        draw_run(method, 4.0, method, epochs=30, model=model, **of_paper(dataset))
    (loss, error), *_ = panels().values()
    paper = summarize.read_paper_curves()[summarize.LABELS.get(dataset, dataset), model.upper()]
    dashed = {line.get_color(): line for line in loss.lines if line.get_linestyle() == "--"}
    assert len(dashed) == 2  # those of the methods that ran, for as many epochs
    for method in ("SGD", "Adam-G"):
        line = dashed[summarize.COLOURS[method]]
        points = list(zip(*line.get_data(), strict=True))
        assert points == [(epoch, loss) for epoch, loss in paper[method] if epoch <= 30]
        assert line.get_zorder() < 2  # ours, as all lines of matplotlib
        assert f"{method}, the paper's" in labels(loss)
    assert "--" not in {line.get_linestyle() for line in error.lines}


@pytest.mark.parametrize("other", [
    {"dataset": "folder"}, of_paper("CIFAR10", (500, 100)), {"model": "wrn-10-1"}, of_paper("SVHN"),
])  # fmt: skip
def test_the_papers_curves_stand_behind_nothing_else(panels, other):
    draw_run("a", 4.0, epochs=30, **({"model": "wrn-28-10"} | of_paper("CIFAR10") | other))
    (loss, _), *_ = panels().values()
    assert not any("paper" in label for label in labels(loss))


def test_the_losses_of_networks_that_compare_methods_stand_side_by_side(panels):
    """On the same axes, without those that have one method; a name is no formula."""
    for model in ("a$\\frac", "b", "c", "d"):
        for method in ("SGD", "SGDG")[: 1 if model == "c" else 2]:
            draw_run(f"{model}/{method}", 4.0, method, model=model, written=3 if model == "d" else 5)
    drawn = panels()
    losses = drawn["digits-training-loss.png"]
    assert [panel.get_title() for panel in losses] == ["A$\\FRAC", "B", "D"]
    assert not any(panel.title.get_parse_math() for panel in losses)
    assert len({panel.get_ylim() for panel in losses}) == 1
    assert [len(curves(panel, "SGD-G")) for panel in losses] == [2, 2, 1]
    assert drops(losses[1]) == {2, 3}
    assert len(drawn) == 1 + 4 + 1


def test_every_figure_has_a_file_of_its_own(panels):
    """Also where only the epochs differ, or names are long."""
    for index, model in enumerate(("a", "a", "A!", "long" * 100)):
        draw_run(f"{index}", 4.0, model=model, epochs=5 + index)
    names = panels().keys()
    assert len(names) == 5
    assert all(len(name) < 200 for name in names)
    with pytest.raises(SystemExit, match="one file for 4 figures"):
        panels("--plots", "one.png")


def test_the_papers_curves_alone(panels):
    draw_run("a", 4.0)
    drawn = panels()["paper-curves.png"]
    for panel, ((data, network), methods) in zip(drawn, summarize.read_paper_curves().items(), strict=True):
        assert (panel.get_title(), panel.get_yscale()) == (f"{network} on {data}", "log")
        assert labels(panel) == [*summarize.COLOURS, "learning rates drop"]
        assert drops(panel) == ({60, 120} if data == "SVHN" else {60, 120, 160})
        for method in summarize.COLOURS:
            ((_, *points),) = curves(panel, method)
            assert list(zip(*points, strict=True)) == methods[method]


def test_tables_are_there_whatever_matplotlib_does(tmp_path, monkeypatch, capsys):
    """The page links the figure, and a failure is one sentence."""
    draw_run("a", 4.0)

    def fail(*_arguments):
        raise RuntimeError("no fonts")

    monkeypatch.setattr(summarize, "draw_panel", fail)
    arguments = ["runs", "--plots", "figures", "--csv", "a.csv", "--markdown", "docs/a.md"]
    with pytest.raises(SystemExit, match=r"cannot draw figures/digits-wrn-10-1\.png: no fonts"):
        summarize.main(arguments)
    assert "4.00" in capsys.readouterr().out
    assert "4," in Path("a.csv").read_text()
    assert "](../figures/digits-wrn-10-1.png)" in Path("docs/a.md").read_text()


def test_a_notebooks_backend_and_a_matplotlibrc_change_nothing():
    draw_run("a", 4.0)
    Path("matplotlibrc").write_text("text.usetex: True\nlines.color: red\naxes.facecolor: black\n")
    environment = os.environ | {"MPLBACKEND": "module://matplotlib_inline.backend_inline"}
    command = [sys.executable, summarize.__file__, "runs", "--plots", "curves.png"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert (done.returncode, done.stderr) == (0, "")
    plain = Path("curves.png").read_bytes()
    Path("matplotlibrc").unlink()
    subprocess.run(command, capture_output=True, check=True)
    assert Path("curves.png").read_bytes() == plain
