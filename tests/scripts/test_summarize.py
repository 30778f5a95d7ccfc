"""Tables and figures from run directories: what may be in a cell, what is shown, drawn, and left out."""

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
SVHN = {"name": "SVHN", "train_images": 604_388, "test_images": 26_032, "sha256": "d" * 64}
OF_CIFAR = {"data": CIFAR10, "dataset": "CIFAR10", "epochs": 200, "epoch_step": [60, 120, 160]}
OF_SVHN = {"data": SVHN, "dataset": "SVHN", "epochs": 160, "epoch_step": [60, 120]}


@pytest.fixture(autouse=True)
def in_a_folder(tmp_path, monkeypatch):
    """Each test works in an empty folder, mostly on the runs below `runs`."""
    monkeypatch.chdir(tmp_path)


def write_run(name, error, method="SGD", *, written=None, losses=None, config=(), **changes):
    """A run whose test error falls to `error` in the last epoch, with a better epoch just before it.

    losses: of all its epochs; they fall to a hundredth of the error if not given. config: more entries.
    """
    changes |= {"epochs": len(losses)} if losses else {}
    config = {"data": DIGITS, "model": "wrn-10-1", "device": "x86_64 CPU"} | dict(config)
    config |= {name: changes.pop(name) for name in ("data", "model") if name in changes}
    options = OPTIONS | {"optim_method": method} | RATES[method] | changes
    path, epochs = Path(name), options["epochs"]
    path.mkdir(parents=True)
    (path / "config.json").write_text(json.dumps(config | {"options": options}))
    with (path / "log.txt").open("w") as log:
        for epoch in range(1, (epochs if written is None else written) + 1):
            now = error + (10 * (epochs - epoch) / epochs if epoch != epochs - 1 else -0.5)
            loss = losses[epoch - 1] if losses else error / 100 + epochs - epoch
            record = {"epoch": epoch, "train_loss": loss, "test_acc": 100 - now}
            log.write(f"json_stats: {json.dumps(record)}\n")
    return path


@pytest.fixture
def show(capsys):
    """show(*arguments): what the program prints."""

    def printed(*arguments):
        capsys.readouterr()
        summarize.main([*arguments])
        return capsys.readouterr().out

    return printed


def cells(*roots):
    """The cells of all tables of the runs below these."""
    runs, left_out = summarize.read_runs(map(Path, roots))
    return [cell for table in summarize.make_tables(runs, left_out) for cell in table]


def column(head, *roots):
    """What stands below a head, from the first cell on."""
    return [cell.line[head] for cell in cells(*(roots or ["runs"]))]


# Cells


@pytest.mark.parametrize("other", [
    {"data": DIGITS | {"sha256": "b" * 64}}, {"data": DIGITS | {"name": "other"}}, {"dtype": "bfloat16"},
    {"epochs": 6}, {"epoch_step": [1, 3]}, {"lr_decay_ratio": 0.1}, {"batch_size": 64}, {"holdout": 100},
    {"lr": 0.2}, {"lrg": 0.1}, {"momentum": 0.8}, {"weight_decay": 0.0}, {"bn_decay": 5e-4}, {"omega": 0.0},
    {"grad_clip": None}, {"select": "measured"}, {"dropout": 0.0}, {"an_option_of_the_future": 1},
    {"sync_bn": True}, {"config": {"processes": 2}}, {"config": {"weights_from": "logs/other"}},
    {"config": {"float32_convolutions": "TF32"}},
], ids=str)  # fmt: skip
def test_what_differs_in_more_than_the_seed_is_never_in_one_cell(other):
    write_run("runs/a", 4.0, "AdamG")
    write_run("runs/b", 8.0, "AdamG", **({"seed": 1} | other))
    assert sorted(column("Error (%)")) == ["4.00", "8.00"]


@pytest.mark.parametrize("method", ["SGD", "SGDG"])
def test_where_a_run_ran_and_how_old_it_is_does_not_split_a_cell(method):
    """A run from before an option has the option's default."""
    path = write_run("here/a", 4.0, method) / "config.json"
    config = json.loads(path.read_text())
    config["options"] = {k: v for k, v in config["options"].items() if k not in ("holdout", "select")}
    path.write_text(json.dumps(config))
    elsewhere = {"device": "cuda", "nthread": 4, "dataroot": "there", "compile": True, "sync_bn": False}
    write_run("there/b", 8.0, method, seed=1, config={"float32_convolutions": "float32"}, **elsewhere)
    assert column("Error (%)", "here", "there") == ["6.00 (4.00 to 8.00, n = 2)"]


def test_an_unfinished_run_is_named_but_not_counted(show):
    """Its last line may be one that is being written."""
    write_run("runs/SGD/seed0", 4.0)
    log = write_run("runs/SGD/seed1", 1.0, seed=1) / "log.txt"
    write_run("runs/SGDG/seed0", 1.0, "SGDG", written=3)
    write_run("runs/SGDG/seed1", 1.0, "SGDG", seed=1, written=2)  # the cell tells of the one that got further
    whole = log.read_text()
    for missing in (1, 30):  # nothing but the line end
        log.write_text(whole[:-missing])
        assert column("Error (%)") == ["4.00", "unfinished, epoch 3 of 5"]
        assert "- runs/SGD/seed1: unfinished, epoch 4 of 5" in show("runs").split("Not counted:")[1]


def test_a_seed_counts_once_and_the_second_is_named(show):
    write_run("runs/first", 1.0, written=2)
    write_run("runs/second", 4.0)
    assert column("Error (%)", "runs", "runs/second") == ["4.00"]  # the same folder twice is no twin
    assert "- runs/first: seed 0 of the same settings is there as runs/second" in show("runs")


# What is shown


TABLES = """
### Digits (8x8)

1,437 training and 360 test images (SHA-256 aaaaaaaaaaaa), 6 epochs, learning rates drop after 4, 6.

| Network | Experiment | Method | lr | lrg | Other options | Error (%) | Loss at 4 | Loss at 6 |
| WRN-10-1 | | SGD-G | 0.02 | 0.2 | | 5.00 | 1.50 | 0.350 |
| WRN-10-1 | a/b | SGD | 0.1 | | | 4.00 (3.00 to 9.00, n = 3) | 3.00 (1.50 to 4.50) | 0.700 (0.350 to 1.05) |
| WRN-10-1 | a/b | SGD-G | 0.01 | 0.2 | processes 2, dropout 0.0 | 5.00 | 1.50 | 0.350 |
| WRN-10-1 | a/b | SGD-G | 0.01 | 0.2 | | 4.00 | 1.50 | 0.350 |

### Digits (8x8), choice of hyperparameters

1,437 training and 360 held-out images (SHA-256 aaaaaaaaaaaa), 6 epochs, learning rates drop after 4, 6.

| Network | Method | Held-out error (%) at lr, lrg |
| WRN-10-1, grid | SGD | 4.25 (4.00 to 4.50, n = 2) at 0.2; 5.00 at 0.1 |
| WRN-10-1, wrn-10-10 | Adam-G | 7.00 at 0.01, 0.05 |

Error: the last epoch's."""


def test_what_the_tables_say(show):
    """Medians and ranges over seeds, of the last epochs and each phase's last three; what a folder names."""
    losses, data = [9.0, 2.0, 1.5, 1.0, 0.4, 0.3], DIGITS | {"name": "Digits (8x8)"}
    common = {"data": data, "epoch_step": [4, 6]}
    for seed, error in enumerate((4.0, 3.0, 9.0)):
        rising = [(1 + seed) * loss for loss in losses]
        write_run(f"runs/a/b/digits8x8/SGD/seed{seed}", error, losses=rising, seed=seed, **common)
    common["losses"] = losses
    write_run("runs/a/b/digits8x8/SGDG/a", 4.0, "SGDG", **common)
    write_run("runs/a/b/digits8x8/SGDG/b", 5.0, "SGDG", dropout=0.0, config={"processes": 2}, **common)
    write_run("runs/DIGITS-8X8/wrn-10-1/SGDG/c", 5.0, "SGDG", lr=0.02, **common)
    for lr, seed, error in ((0.1, 0, 5.0), (0.2, 0, 4.0), (0.2, 1, 4.5)):
        write_run(f"runs/grid/{lr}-{seed}", error, lr=lr, seed=seed, holdout=100, **common)
    write_run("runs/wrn-10-10/AdamG/x", 7.0, "AdamG", holdout=100, **common)  # not what it holds
    show("runs", "--markdown", "page.md", "--plots", "figures")
    said = re.sub(" +", " ", re.sub(r"\| -[-| ]*\n", "", Path("page.md").read_text()))
    assert TABLES in said
    out = show("runs")
    assert max(map(len, out.splitlines())) <= 80
    assert set(re.findall(r"loss at \d+", out)) == {"loss at 6"}
    drawn = ["a-b-digits-8x8-wrn-10-1.png", "digits-8x8-wrn-10-1.png", "paper-curves.png"]
    assert sorted(os.listdir("figures")) == drawn  # no search


# Files


def test_a_csv_has_every_digit_and_no_formula(show):
    for index, name in enumerate(("=1+1", "+1", "-1", "@a", "\tb", "c")):
        for seed in (0, 1, 2):
            write_run(f"runs/{index}/{seed}", 4.0 + seed**2, model=name, losses=[1.23456e-5] * 2, seed=seed)
    show("runs", "--csv", "table.csv")
    with open("table.csv") as file:
        found = list(csv.DictReader(file))
    assert {cell["network"] for cell in found} == {"'=1+1", "'+1", "'-1", "'@a", "\\tb", "c"}
    wanted = {"test_error": "5", "min": "4", "max": "8", "train_loss": "1.23456e-05", "runs": "3"}
    assert wanted.items() <= found[0].items()


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
    for torn in ("by hand\n", f"{begin}\n", f"{end}\n{begin}\n", f"{begin}\n{end}\n{end}\n"):
        page.write_text(torn)
        with pytest.raises(SystemExit, match="it needs these two lines, once each and in this order"):
            show("runs", "--markdown", "page.md")
        assert page.read_text() == torn


def test_names_break_neither_page_nor_terminal(show):
    nasty = f"a|b\n<img src=x> `c` *d* [f](g) $x$ & ~~h~~ \x1b[31m \udcff{summarize.END}"
    for option in (1, nasty):
        data = DIGITS | {"name": nasty}
        write_run(f"runs/{len(str(option))}", 4.0, data=data, model=f"WRN² {nasty}", an_option=option)
    out, page = show("runs", "--markdown", "page.md"), Path("page.md").read_text().split("\n\n", 3)[3]
    assert len(re.findall(r"^\|.*\|$", page, re.M)) == 2 + 2
    assert not re.search(r"(?<!\\)[<>`$~]|[aA]\|", page.removesuffix(f"{summarize.END}\n"))
    assert not re.search("[\x00-\x09\x0b-\x1f\x7f\udcff]", out + page)


def test_the_published_tables_are_those_of_the_published_logs(show, monkeypatch):
    text, published = (ROOT / "docs/results.md").read_text(), ROOT / "logs/published"
    before, after = text.split(summarize.BEGIN)[0], text.split(summarize.END)[1]
    Path("results.md").write_text(f"{before}{summarize.BEGIN}{summarize.END}{after}")
    show(str(published), "--markdown", "results.md")
    assert Path("results.md").read_text().replace(f"{ROOT}/", "") == text
    monkeypatch.setattr(summarize, "draw", lambda *arguments: b"")
    show(str(published / "whole-schedule"), "--plots", "figures")
    assert set(os.listdir("figures")) == {path.name for path in (ROOT / "docs/figures").iterdir()}


@pytest.mark.parametrize("flag", ["--csv", "--markdown", "--plots"])
def test_files_are_written_whole_or_left_as_they_are(monkeypatch, capsys, flag):
    write_run("runs/a", 4.0)
    old = f"By hand {summarize.BEGIN}{summarize.END}"
    Path("file.x").write_text(old)

    def full(number):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(utils.os, "fsync", full)
    with pytest.raises(SystemExit, match=r"cannot write file\.x: .*No space left on device"):
        summarize.main(["runs", flag, "file.x"])
    assert "4.00" in capsys.readouterr().out
    assert (Path("file.x").read_text(), sorted(os.listdir())) == (old, ["file.x", "runs"])


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
    ("config.json", b"{}", "KeyError: 'data'"),
    ("config.json", {"options": OPTIONS | {"epochs": 4}}, "its epochs are not the first of 4"),
    ("config.json", {"options": OPTIONS | {"lr": None}}, "list index out of range"),
    ("log.txt", b"json_stats: {}\n", "KeyError: 'train_loss'"),
    ("log.txt", {"train_loss": float("nan")}, "not all its losses and errors are finite"),
    ("log.txt", {"test_acc": float("nan")}, "not all its losses and errors are finite"),
    ("log.txt", {"epoch": 4}, "its epochs are not the first of 5, each once"),
]


def test_an_odd_run_is_named_and_ends_no_other(capsys):
    write_run("runs/good", 4.0)
    (write_run("runs/odd", 5.0) / "config.json").unlink()  # as the authors' runs have none
    for index, (file, odd, _) in enumerate(ODD):
        path = write_run(f"runs/odd{index}", 5.0, seed=1) / file
        *lines, last = path.read_text().splitlines(keepends=True)
        if isinstance(odd, dict):
            values = json.dumps(json.loads(last.removeprefix("json_stats:")) | odd)
            odd = "".join([*lines, "json_stats:" if lines else "", values, "\n"]).encode()
        path.write_bytes(odd)
    summarize.main(["runs"])
    out, said = capsys.readouterr()
    reasons = [r"config\.json: .*No such file", *(rf"(config\.json|log\.txt): .*{odd[2]}" for odd in ODD)]
    for sentence, reason in zip(said.splitlines(), reasons, strict=True):
        assert re.match(rf"summarize\.py: left out runs/odd\d?: {reason}", sentence)
    assert " 4.00;" in out
    assert out.count("- runs/odd") == 1 + len(ODD)


def test_runs_behind_links_are_found_once_and_published_ones_only_if_named(tmp_path):
    write_run("disk/wrn-10-1/SGD/seed0", 4.0)
    write_run("runs/published/theirs/seed1", 8.0, seed=1)
    Path("runs/digits").symlink_to(tmp_path / "disk")
    Path("disk/back").symlink_to(tmp_path / "runs")
    for directories in (["runs"], ["runs", "disk"]):
        assert column("Experiment", *directories) == [""]
    assert column("Experiment", "runs", "runs/published") == ["", "theirs"]
    Path("runs/digits").unlink()
    with pytest.raises(SystemExit, match="No usable run"):
        summarize.main(["runs"])


# Figures


@pytest.fixture
def panels(monkeypatch, show):
    """panels(*arguments): {file: the panels} of what the program draws of `runs`."""
    drawn = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: drawn.append(figure.axes))

    def draw(*arguments):
        drawn.clear()
        names = show("runs", "--plots", "figures", *arguments).split("Written: ")[1].split()
        return dict(zip((Path(name).name for name in names), drawn, strict=True))

    return draw


def curves(panel, method, style="-"):
    """(width, x, y) of a method's curves."""
    lines = [line for line in panel.lines if line.get_color() == summarize.COLOURS[method]]
    lines = [line for line in lines if line.get_linestyle() == style and len(line.get_xdata())]
    return [(line.get_linewidth(), list(line.get_xdata()), list(line.get_ydata())) for line in lines]


def drops(panel):
    return {line.get_xdata()[0] for line in panel.lines if line.get_linestyle() == ":"}


def labels(panel):
    return [text.get_text() for text in panel.get_legend().get_texts()]


def test_a_figure_shows_the_runs_and_their_median(panels):
    for method in ("SGD", "SGDG", "AdamG"):
        for seed, more in enumerate((0, 1, 5)):
            drawn = {"seed": seed, "losses": [5.0, 4.0, 3.0, 2.0, 1.0], "epoch_step": [2, 3, 5]}
            write_run(f"runs/{method}{seed}", 4.0 + more, method, **drawn)
    write_run("runs/unfinished", 50.0, "AdamG", **{**drawn, "seed": 3}, written=3)
    write_run("runs/just_begun", 50.0, model="another", written=0)
    (loss, error), _ = panels().values()
    assert (loss.get_title(), loss.get_yscale()) == ("Training loss", "log")
    assert loss.yaxis.get_major_formatter()(0.01, 0) == "0.01"  # not a power as a formula
    assert (error.get_title(), error.get_yscale()) == ("Test error (%)", "linear")
    assert labels(loss) == [f"{m} (median of 3)" for m in summarize.COLOURS]
    for method in summarize.COLOURS:
        *thin, (width, horizontal, vertical) = sorted(curves(error, method), key=lambda line: line[0])
        assert [line[0] < 1 for line in thin] == [True] * (3 + (method == "Adam-G"))
        assert sorted(line[2][-1] for line in thin if len(line[2]) == 5) == pytest.approx([4, 5, 9])
        assert (width, horizontal) == (2, [1, 2, 3, 4, 5])
        assert vertical == pytest.approx([13, 11, 9, 4.5, 5])
        assert [line[2] for line in curves(loss, method) if line[0] == 2] == [[5, 4, 3, 2, 1]]
    assert drops(loss) == drops(error) == {2, 3}
    # Without the first fifth of the epochs, which would press the last ones together.
    assert error.get_ylim() == pytest.approx((0.9 * 3.5, 1.1 * 56))


def test_the_losses_of_networks_that_compare_methods_stand_side_by_side(panels):
    """On the same axes, without those of one method; a name is no formula; each figure has its file."""
    for model in ("a$\\frac", "b", "c", "d"):
        for method in ("SGD", "SGDG")[: 1 if model == "c" else 2]:
            write_run(f"runs/{model}/{method}", 4.0, method, model=model, written=3 if model == "d" else 5)
    write_run("runs/b/SGD2", 4.0, model="b", lr=0.2)
    write_run("runs/longer", 4.0, model="b", epochs=6)
    drawn = panels()
    losses = drawn["digits-training-loss.png"]
    assert [panel.get_title() for panel in losses] == ["A$\\FRAC", "B", "D"]
    assert not any(panel.title.get_parse_math() for panel in losses)
    assert len({panel.get_ylim() for panel in losses}) == 1
    assert labels(losses[1]) == ["SGD 0.1", "SGD 0.2", "SGD-G"]
    assert len({line.get_alpha() for line in losses[1].lines if line.get_linewidth() == 2}) == 2
    assert labels(losses[2]) == ["SGD (unfinished)", "SGD-G (unfinished)"]
    assert len(drawn) == 1 + 4 + 1 + 1
    with pytest.raises(SystemExit, match="one file for 6 figures"):
        panels("--plots", "one.png")


def test_the_papers_curves_alone(panels):
    write_run("runs/a", 4.0)
    drawn = panels()["paper-curves.png"]
    for panel, ((data, network), methods) in zip(drawn, summarize.CURVES.items(), strict=True):
        assert (panel.get_title(), panel.get_yscale()) == (f"{network} on {data}", "log")
        assert drops(panel) == ({60, 120} if data == "SVHN" else {60, 120, 160})
        for method in summarize.COLOURS:
            ((_, *points),) = curves(panel, method)
            assert list(zip(*points, strict=True)) == methods[method]


# The paper's number and curves


OTHER = {"model": "wrn-16-8"}, {"data": CIFAR10 | {"train_images": 500}}, {"epochs": 20}, {"epoch_step": [60]}


@pytest.mark.parametrize("other", [{}, *OTHER], ids=str)
def test_the_papers_number_and_curves_stand_beside_ours_only_where_they_may(panels, other):
    write_run("runs/SGD/seed0", 4.0, **OF_CIFAR | {"model": "wrn-28-10"} | other)
    assert [column("Paper"), column("Diff.")] == ([[""], [""]] if other else [["3.89"], ["+0.11"]])
    loss, error = next(iter(panels().values()))
    assert labels(loss) == (["SGD"] if other else ["SGD", *(f"{m}, the paper's" for m in summarize.COLOURS)])
    assert labels(error) == ["SGD"]
    for method, points in summarize.CURVES["CIFAR-10", "WRN-28-10"].items() if not other else []:
        assert [list(zip(*line[1:], strict=True)) for line in curves(loss, method, "--")] == [points]


def test_the_papers_number_and_curves_of_svhn(panels):
    write_run("runs/a", 4.0, "SGDG", model="wrn-22-8", **OF_SVHN)
    assert column("Paper") == ["1.63"]
    assert "SGD-G, the paper's" in labels(next(iter(panels().values()))[0])
