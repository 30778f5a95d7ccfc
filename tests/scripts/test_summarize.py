"""Tables from run directories: what may be in a cell, what is compared and shown, and what is left out."""

import contextlib
import csv
import io
import json
import os
import random
import re
import shutil
import subprocess
import sys
from pathlib import Path

import figures
import pytest
import runs
import summarize
from helpers import ROOT

import options

OPTIONS = {
    "dataset": "digits", "dataset_name": None, "model": "resnet", "depth": 10, "width": 1, "dtype": "float32",
    "seed": 0, "epochs": 5, "epoch_step": [], "lr_decay_ratio": 0.2, "batch_size": 128, "momentum": 0.9,
    "weight_decay": 5e-4, "bn_decay": 0.0, "omega": 0.1, "grad_clip": 0.1, "dropout": 0.3, "device": "cpu",
    "optim_method": "SGD", "lr": 0.1, "lrg": None, "nthread": 1,
}  # fmt: skip
RATES = {"SGD": {}, "SGDG": {"lr": 0.01, "lrg": 0.2}, "AdamG": {"lr": 0.01, "lrg": 0.05}}
DIGITS = {"name": "digits", "train_images": 1437, "test_images": 360, "sha256": "a" * 64}
CIFAR10 = {"name": "CIFAR10", "train_images": 50_000, "test_images": 10_000, "sha256": "c" * 64}
PAPER_RUN = {"dataset": "CIFAR10", "epochs": 200, "epoch_step": [60, 120, 160]}


@pytest.fixture(autouse=True)
def in_a_folder(tmp_path, monkeypatch):
    """Each test works in an empty folder, mostly on the runs below `runs`."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def drawn(monkeypatch):
    """The paths of the figures that would have been written, without the time that drawing takes."""
    paths = set()
    monkeypatch.setattr(figures, "draw_row", lambda row, path, x: paths.add(str(path)))
    monkeypatch.setattr(figures, "draw_losses", lambda section, path, x: paths.add(str(path)))
    monkeypatch.setattr(figures, "draw_paper", lambda path, curves, drops: paths.add(str(path)))
    return paths


def write_run(
    name, error, method="SGD", *, data=DIGITS, model="wrn-10-1", written=None, losses=None, **changes
):
    """A run whose test error falls to `error` in the last epoch, with a better epoch just before it.

    losses: of all its epochs; they fall to a hundredth of the error if not given.
    """
    changes |= {"epochs": len(losses)} if losses else {}
    options = OPTIONS | {"optim_method": method} | RATES[method] | changes
    path = Path(name)
    path.mkdir(parents=True)
    config = {"options": options, "model": model, "data": data, "device": "x86_64 CPU"}
    (path / "config.json").write_text(json.dumps(config))
    with (path / "log.txt").open("w") as log:
        for epoch in range(1, (options["epochs"] if written is None else written) + 1):
            left = options["epochs"] - epoch
            now = error + (10 * left / options["epochs"] if left != 1 else -0.5)
            loss = losses[epoch - 1] if losses else error / 100 + left
            record = {"epoch": epoch, "train_loss": loss, "test_acc": 100 - now}
            record |= {"train_time": 2.0, "test_time": 1.0, "images_per_sec": 600.0 + 100 * error + left}
            log.write(f"json_stats: {json.dumps(options | record)}\n")
    return path


def write_seeds(name, errors, *arguments, **changes):
    for seed, error in enumerate(errors):
        write_run(f"{name}/seed{seed}", error, *arguments, seed=seed, **changes)


def show(*arguments):
    """What the program prints."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        summarize.main([*arguments])
    return out.getvalue()


def cells(*directories):
    """The lines of the CSV file for these directories."""
    show(*directories, "--csv", "table.csv")
    with open("table.csv") as file:
        return list(csv.DictReader(file))


def columns(line):
    """The cells of a line of a Markdown table."""
    return [column.strip() for column in re.split(r"(?<!\\)\|", line)[1:-1]]


def table_after(text, note):
    """The table below the paragraph that begins with `note`, a dict for each line; None if there is none."""
    found = re.search(rf"^{note}.*?\n\n(\|.*?\n)\n", text, re.S | re.M)
    heads, _, *lines = map(columns, found[1].splitlines()) if found else ([], [])
    return [dict(zip(heads, line, strict=True)) for line in lines] if found else None


def test_a_cell_is_the_median_of_its_seeds_last_epochs():
    write_seeds("runs/SGD", (4.0, 3.0, 9.0, 3.5, 5.0))
    (cell,) = cells("runs")
    assert [float(cell[name]) for name in ("test_error", "min", "max")] == pytest.approx([4.0, 3.0, 9.0])
    assert (cell["runs"], cell["unfinished"]) == ("5", "0")
    assert float(cell["train_loss"]) == pytest.approx(0.04)  # the last epoch's
    assert float(cell["images_per_sec"]) == pytest.approx(1002)  # the median epoch's
    text = show("runs")
    assert "4.00 (3.00 to 9.00, n = 5)" in text
    assert text.count("missing") == 2  # the other methods


@pytest.mark.parametrize("other", [
    {"data": DIGITS | {"sha256": "b" * 64}}, {"data": DIGITS | {"name": "other"}}, {"dtype": "bfloat16"},
    {"epochs": 6}, {"epoch_step": [1, 3]}, {"lr_decay_ratio": 0.1}, {"batch_size": 64}, {"holdout": 100},
    {"lr": 0.2}, {"lrg": 0.1}, {"momentum": 0.8}, {"weight_decay": 0.0}, {"bn_decay": 5e-4}, {"omega": 0.0},
    {"grad_clip": None}, {"select": "measured"}, {"dropout": 0.0}, {"an_option_of_the_future": 1},
], ids=str)  # fmt: skip
def test_what_differs_in_more_than_the_seed_is_never_in_one_cell(other):
    write_run("runs/a", 4.0, "AdamG")
    write_run("runs/b", 8.0, "AdamG", **({"seed": 1} | other))
    assert sorted(float(cell["test_error"]) for cell in cells("runs")) == pytest.approx([4.0, 8.0])


def test_where_and_how_fast_a_run_ran_does_not_split_a_cell():
    write_run("here/a", 4.0)
    write_run("there/b", 8.0, seed=1, device="cuda", nthread=4)
    (cell,) = cells("here", "there")
    assert cell["runs"] == "2"


def test_runs_of_one_process_and_of_several_are_apart():
    """Their batch normalization sees the whole batch or a slice of it."""
    write_run("runs/one", 10.0)
    path = write_run("runs/two", 20.0, seed=1) / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"processes": 2}))
    out = show("runs")
    assert len(cells("runs")) == 2
    assert "x86_64 CPU (2 processes)" in out


def test_an_unfinished_run_is_shown_but_not_counted():
    write_run("runs/SGD/seed0", 4.0)
    write_run("runs/SGD/seed1", 1.0, seed=1, written=4)
    write_run("runs/SGDG/seed0", 1.0, "SGDG", written=3)
    write_run("runs/SGDG/seed1", 1.0, "SGDG", seed=1, written=2)  # the cell tells of the one that got further
    (write_run("runs/AdamG/seed0", 1.0, "AdamG") / "log.txt").unlink()  # it has just begun
    found = {cell["method"]: cell for cell in cells("runs")}
    assert float(found["SGD"]["test_error"]) == pytest.approx(4.0)
    assert (found["SGD"]["runs"], found["SGD"]["unfinished"]) == ("1", "1")
    assert (found["SGD-G"]["runs"], found["SGD-G"]["test_error"]) == ("0", "")
    text = show("runs")
    assert ("unfinished (3 of 5 epochs)" in text, "unfinished (2 of 5 epochs)" in text) == (True, False)
    assert "unfinished (0 of 5 epochs)" in text
    assert "- runs/SGD/seed1: unfinished, 4 of 5 epochs" in text


def test_a_line_that_is_being_written_is_ignored():
    log = write_run("runs/SGD", 4.0) / "log.txt"
    whole = log.read_text()
    last = whole.splitlines(keepends=True)[-1]
    for missing in range(1, len(last), 97):  # also with nothing missing but the line end
        log.write_text(whole[:-missing])
        assert "unfinished (4 of 5 epochs)" in show("runs")


def test_epochs_are_in_order_whatever_the_logs(tmp_path):
    log = write_run("runs/SGD", 4.0) / "log.txt"
    expected = show("runs")
    log.write_text("".join(reversed(log.read_text().splitlines(keepends=True))))
    assert show("runs") == expected


def test_methods_stand_side_by_side_with_the_best_in_bold_and_gaps_named():
    write_seeds("runs/SGD", (5.0, 6.0))
    assert "**" not in show("runs")  # of one method none is the best
    write_seeds("runs/AdamG", (4.0, 4.0), "AdamG")
    text = show("runs")
    (row,) = [columns(line) for line in text.splitlines() if "missing" in line]
    assert row == ["WRN-10-1", "5.50 (5.00 to 6.00, n = 2)", "missing", "**4.00** (4.00 to 4.00, n = 2)"]
    assert text.count("**4.00**") == 2  # in both tables


def test_a_single_run_is_never_the_best_and_a_tie_has_two():
    for method, error in zip(RATES, (5.0, 4.0, 6.0), strict=True):
        write_run(f"runs/{method}/seed0", error, method)
    assert "**" not in show("runs")
    assert show("runs").count("WRN-10-1") == 3  # one table is enough for these
    write_run("runs/SGD/seed1", 5.0, seed=1)
    assert "**" not in show("runs")
    write_run("runs/SGDG/seed1", 4.0, "SGDG", seed=1)
    write_run("runs/AdamG/seed1", 2.001, "AdamG", seed=1)  # 4.0005: equal in what is shown
    assert [show("runs").count(f"**{error}**") for error in ("4.00", "5.00")] == [4, 0]


def test_two_protocols_in_two_folders_are_two_rows():
    for method in RATES:
        write_run(f"runs/paper/digits/wrn-10-1/{method}/seed0", 5.0, method)
        write_run(f"runs/own/digits/wrn-10-1/{method}/seed0", 4.0, method, lr=0.05)
    expected = [(folder, method) for folder in ("own", "paper") for method in ("SGD", "SGD-G", "Adam-G")]
    assert [(cell["experiment"], cell["method"]) for cell in cells("runs")] == expected
    assert "missing" not in show("runs")


def test_networks_are_in_the_order_of_their_numbers():
    for model in ("wrn-100-1", "wrn-28-10", "wrn-10-1", "wrn-28-2"):
        write_run(f"runs/{model}", 4.0, model=model)
    assert [cell["network"] for cell in cells("runs")] == ["wrn-10-1", "wrn-28-2", "wrn-28-10", "wrn-100-1"]


def test_a_grid_of_rates_is_a_row_for_each(drawn):
    for index, lr in enumerate((0.1, 0.2, 0.4)):
        write_run(f"runs/{index}", 4.0 + index, lr=lr)
    write_run("runs/g", 1.0, "SGDG")
    found = sorted((cell["lr"], cell["runs"]) for cell in cells("runs"))
    assert found == [("0.01", "1"), ("0.1", "1"), ("0.2", "1"), ("0.4", "1")]
    Path("figures.v2").mkdir()  # a folder, whatever its name
    text = show("runs", "--plots", "figures.v2")
    assert text.count("missing") == 1 + 2 * 2  # Adam-G, and SGD-G in two rows
    assert [text.count(f"WRN-10-1 #{number} ") for number in (1, 2, 3, 4)] == [0, 2, 2, 0]  # in both tables
    names = ("digits-wrn-10-1", "digits-wrn-10-1-2", "digits-wrn-10-1-3", "paper-curves")
    assert drawn == {f"figures.v2/{name}.png" for name in names}
    with pytest.raises(SystemExit, match="3 figures"):
        show("runs", "--plots", "one.png")
    drawn.clear()
    show("runs/0", "--plots", "one.png")
    assert drawn == {"one.png"}


def test_held_out_runs_have_a_table_of_their_own_with_the_best_set_of_each_method(drawn):
    sets = [("SGD", 0.1, 5.0), ("SGD", 0.2, 4.0, 4.5), ("SGDG", 0.1, 7.0), ("SGDG", 0.2, 6.0)]
    for method, lr, *errors in [*sets, ("AdamG", 0.1, 9.0, 9.5)]:
        for seed, error in enumerate(errors):
            write_run(f"runs/grid/{method}/lr{lr}-{seed}", error, method, lr=lr, seed=seed, holdout=100)
    write_run("runs/result/SGD/seed0", 3.0, holdout=0)
    results, search = show("runs", "--plots", "figures").split("choice of hyperparameters")
    assert ("3.00" in results, "3.00" in search) == (True, False)
    lines = [columns(line) for line in search.splitlines() if "WRN" in line]
    assert [(line[2], line[3], *line[6:9]) for line in lines] == [
        ("SGD", "0.1", "5.00", "", ""),
        ("SGD", "0.2", "**4.25**", "4.00", "4.50"),
        ("SGD-G", "0.1", "7.00", "", ""),
        ("SGD-G", "0.2", "6.00", "", ""),
        ("Adam-G", "0.1", "9.25", "9.00", "9.50"),  # one set is no choice
    ]
    assert drawn == {"figures/result-digits-wrn-10-1.png", "figures/paper-curves.png"}


def test_a_folder_named_after_data_and_network_is_no_experiment():
    named = {"data": DIGITS | {"name": "CIFAR-10 (JPEG)"}}
    write_run("runs/CIFAR-10-JPEG-/wrn-10-1/SGD/seed0", 4.0, **named)
    write_run("runs/own/rates/cifar10-jpeg/WRN-10-1/SGD/seed0", 5.0, **named)
    write_run("runs/cifar10-jpeg/wrn-10-10/SGD/seed0", 6.0, **named)  # not what it holds
    write_run("runs/опыт/цифры/SGD/seed0", 7.0, data=DIGITS | {"name": "Цифры"})
    assert [cell["experiment"] for cell in cells("runs")] == ["", "own/rates", "wrn-10-10", "опыт"]


def test_options_besides_the_rates_are_named_where_they_differ():
    write_run("runs/a", 4.0, dropout=0.0)
    write_run("runs/b", 5.0, weight_decay=0.1)
    write_run("runs/c", 5.0, "SGDG", bn_decay=0.1)  # a method's own, with nothing to differ from
    write_run("runs/d", 5.0, "AdamG", of_the_future=1, model="wrn-16-1", depth=16)
    write_run("runs/e", 5.0, "AdamG", of_the_future=1, model="wrn-16-1", depth=16, seed=1, select="shape")
    write_run("runs/f", 5.0, "AdamG", of_the_future=1, model="wrn-16-1", depth=16, select="measured")
    assert {(cell["method"], cell["runs"], cell["other_options"]) for cell in cells("runs")} == {
        ("SGD", "1", "weight_decay 0.0005, dropout 0.0"),
        ("SGD", "1", "weight_decay 0.1, dropout 0.3"),
        ("SGD-G", "1", "dropout 0.3"),
        (
            "Adam-G",
            "2",
            "dropout 0.3, of_the_future 1, select shape",
        ),  # as all older runs, which do not say it
        ("Adam-G", "1", "dropout 0.3, of_the_future 1, select measured"),
    }


def test_options_that_all_runs_share_are_said_once():
    write_run("runs/a", 4.0, omega=None, grad_clip=None, bn_decay=5e-4)
    write_run("runs/b", 4.0, "SGDG")
    write_run("runs/c", 4.0, "AdamG", grad_clip=None)  # off, which is not SGD's "has none"
    write_run("runs/d", 4.0, "AdamG", grad_clip=None, select="measured")
    shared = "momentum 0.9, weight_decay 0.0005, bn_decay 0.0005 (SGD), bn_decay 0.0 (SGD-G, Adam-G)"
    shared += ", omega 0.1, grad_clip 0.1 (SGD-G), grad_clip None (Adam-G), dropout 0.3, select shape (SGD-G)"
    assert f"; {shared}; device" in show("runs")


def test_a_seed_counts_once_and_the_second_is_named():
    write_run("runs/first", 1.0, written=2)
    write_run("runs/second", 4.0)
    write_run("runs/third", 4.0)
    (cell,) = cells("runs", "runs/second")  # the same folder twice is no twin
    assert (cell["runs"], cell["unfinished"]) == ("1", "0")  # the finished one counts
    text = show("runs", "runs/second")
    for twin in ("first", "third"):
        assert f"- runs/{twin}: seed 0 of the same settings is there as runs/second" in text
    assert text.count("seed 0 of the same settings") == 2


def test_the_papers_number_stands_beside_ours_only_where_it_may():
    named = {"data": CIFAR10, "model": "wrn-28-10"} | PAPER_RUN
    write_run("full/SGD/seed0", 4.0, **named)
    write_run("short/SGD/seed0", 9.0, **named | {"epochs": 20})
    write_run("drops/SGD/seed0", 9.0, **named | {"epoch_step": [60, 120, 180]})
    write_run("archive/SGD/seed0", 9.0, **named | {"data": CIFAR10 | {"train_images": 500}})
    (full,) = cells("full")
    assert (float(full["paper"]), float(full["difference"])) == pytest.approx((3.89, 0.11))
    assert "the paper trained" not in show("full")
    assert " +0.11 " in show("full")
    for other in ("short", "drops"):
        (cell,) = cells(other)
        assert (cell["paper"], cell["difference"]) == ("3.89", "")
        assert "the paper trained 200 epochs" in show(other)
    (archive,) = cells("archive")
    assert (archive["paper"], archive["difference"]) == ("", "")


def test_the_papers_networks_that_have_not_run_are_missing():
    write_seeds("runs", (4.0, 4.0), data=CIFAR10, model="wrn-28-10", dataset="CIFAR10")
    text = show("runs")
    assert "4.00 (4.00 to 4.00, n = 2); paper 3.89" in text
    absent = [columns(line)[0] for line in text.splitlines() if line.count("missing; paper") == 3]
    assert absent == ["VGG-13", "VGG-19", "WRN-40-10"]
    write_run("small/a", 4.0, data=CIFAR10, dataset="CIFAR10")  # WRN-10-1 is none of the paper's
    assert "WRN-40-10" not in show("small")


def test_figures_are_drawn_and_linked():
    write_seeds("runs/AdamG", (4.0, 4.0), "AdamG")
    write_run("runs/AdamG/seed2", 4.0, "AdamG", seed=2, written=2)
    write_run("runs/started", 4.0, written=0, depth=16, model="wrn-16-1")
    show("runs", "--plots", "docs/my figures", "--markdown", "docs/results.md", "--x", "time")
    written = {path.name: path.read_bytes() for path in Path("docs/my figures").iterdir()}
    assert written.keys() == {"digits-wrn-10-1-time.png", "paper-curves.png"}
    assert all(content.startswith(b"\x89PNG") and len(content) > 5000 for content in written.values())
    assert "(my%20figures/digits-wrn-10-1-time.png)" in Path("docs/results.md").read_text()


def test_a_page_keeps_what_stands_around_the_two_marker_comments():
    write_run("runs/a", 4.0)
    page, begin, end = Path("page.md"), summarize.BEGIN, summarize.END
    show("runs", "--markdown", "page.md")
    assert page.read_text().startswith("# Results\n")
    (generated,) = re.findall(r"### digits.*", page.read_text(), re.S)
    page.write_text(f"# By hand\n\n{begin}\nolder\n{end}\n\nBelow\n")
    for _ in range(2):  # again changes nothing
        show("runs", "--markdown", "page.md")
        assert page.read_text() == f"# By hand\n\n{begin}\n\n{generated}\n{end}\n\nBelow\n"
    for torn in (f"by hand\n{begin}\n", f"by hand\n{end}\n", f"{end}\nby hand\n{begin}\n"):
        page.write_text(torn)
        with pytest.raises(SystemExit, match="both marker comments"):
            show("runs", "--markdown", "page.md")
        assert page.read_text() == torn


def test_the_published_tables_are_those_of_the_published_logs(tmp_path, monkeypatch, drawn):
    text = (ROOT / "docs/results.md").read_text()
    page = tmp_path / "results.md"
    page.write_text(re.sub(f"(?<={summarize.BEGIN}).*(?={summarize.END})", "", text, flags=re.S))
    monkeypatch.chdir(ROOT)
    show("logs/published", "--markdown", str(page), "--plots", str(tmp_path / "figures"))
    assert page.read_text() == text
    names = {Path(path).name for path in drawn}
    assert names == {path.name for path in (ROOT / "docs/figures").iterdir()}
    assert names == set(re.findall(r"\(figures/(.*?)\)", text))


def test_tf32_is_another_precision_and_versions_are_named():
    """As most GPUs compute float32 convolutions."""
    write_run("runs/a", 4.0)  # an older run, on a CPU
    for seed, more in enumerate(("float32", "TF32", "TF32", None), 1):
        config = write_run(f"runs/{seed}", 8.0, seed=seed) / "config.json"
        commit = f"{seed}234567890" + 30 * "0" + ("-dirty" if seed == 3 else "")
        versions = {"float32_convolutions": more, "torch": "2.11.0", "git_commit": commit}
        versions = versions if more else {"device": "NVIDIA H200"}  # an older one
        config.write_text(json.dumps(json.loads(config.read_text()) | versions))
    found = [(cell["float32_convolutions"], cell["runs"]) for cell in cells("runs")]
    assert found == [("TF32", "3"), ("float32", "2")]
    text = show("runs")
    assert text.count("; float32, batches") == 1
    assert text.count("; float32 (TF32 in convolutions), batches") == 1
    assert "torch: 2.11.0; commit: 1234567." in text
    assert "torch: 2.11.0; commit: 2234567, 3234567-dirty." in text


def test_runs_behind_links_are_found_once(tmp_path):
    write_run("disk/wrn-10-1/SGD/seed0", 4.0)
    Path("runs").mkdir()
    Path("runs/digits").symlink_to(tmp_path / "disk")
    Path("disk/back").symlink_to(tmp_path / "runs")
    (cell,) = cells("runs", "disk")
    assert (cell["runs"], cell["experiment"]) == ("1", "")


@pytest.mark.parametrize("flag", ["--csv", "--markdown", "--plots"])
def test_a_place_that_cannot_be_written_is_one_sentence(flag):
    write_run("runs/a", 4.0)
    Path("file").touch()
    with pytest.raises(SystemExit, match="file"):
        show("runs", flag, "file/x")


def test_a_reader_that_leaves_early_is_no_error():
    write_run("runs/a", 4.0)
    command = f'"{sys.executable}" -u "{summarize.__file__}" runs | true'
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_run_of_the_authors_script_is_left_out_by_name():
    record = {"train_loss": 0.5, "test_acc": 90.0, "epoch": 1, "batchSize": 128, "optim_method": "SGDG"}
    Path("theirs/resnet_1").mkdir(parents=True)
    Path("theirs/resnet_1/log.txt").write_text(f"json_stats: {json.dumps(record)}\n")
    named = "theirs/resnet_1: a run of the authors' script, which has no config.json"
    with pytest.raises(SystemExit, match=f"No usable run.*{named}") as stop:
        show("theirs")
    assert "train one" not in stop.value.code
    write_run("ours/a", 4.0)
    assert f"- {named}" in show("ours", "theirs")


def test_nothing_to_read_is_one_sentence(capsys):
    Path("empty").mkdir()
    with pytest.raises(SystemExit, match=r"No usable run .* below empty: train one first\.$"):
        show("empty")
    with pytest.raises(SystemExit, match="2"):
        show("nowhere")
    assert "nowhere is not a directory" in capsys.readouterr().err


# The paper's claims: the training loss from drop to drop

FALLING = [8.0, 4.0, 2.0, 1.0, 1.5, 0.8, 0.4, 0.2, 0.3, 0.6, 0.5, 0.55]  # drops after 5 and 8 of 12 epochs
DROPS = {"epoch_step": [5, 8, 12, 15]}  # the rates of the last two are of no epoch


def test_the_loss_at_the_end_of_a_phase_is_the_median_of_its_last_three_epochs():
    """And of the runs' medians, their range and ratio to SGD's. The lowest in bold, as everywhere."""
    for seed, factor in enumerate((1, 10, 2)):
        write_run(f"runs/SGD{seed}", 4.0, losses=[factor * loss for loss in FALLING], seed=seed, **DROPS)
    for seed in (0, 1):
        halves = [loss / 2 for loss in FALLING]
        write_run(f"runs/SGDG{seed}", 4.0, "SGDG", losses=halves, seed=seed, **DROPS)
    write_run("runs/AdamG", 4.0, "AdamG", losses=FALLING, **DROPS)
    (first, second, third) = table_after(show("runs"), "Training loss at the end")
    assert [line["Epochs"] for line in (first, second, third)] == ["1 to 5", "6 to 8", "9 to 12"]
    assert [line["SGD"] for line in (first, second)] == ["3.00 (1.50 to 15.0)", "0.800 (0.400 to 4.00)"]
    assert [line["SGD-G"] for line in (first, second)] == [
        "**0.750** (0.750 to 0.750)",
        "**0.200** (0.200 to 0.200)",
    ]
    assert third["Adam-G"] == "0.550"
    assert [third[f"{method} / SGD"] for method in ("SGD-G", "Adam-G")] == ["0.25", "0.50"]


def test_the_plateau_is_the_rise_from_the_lowest_and_the_fall_from_half_to_half():
    """Of the medians: 4, 2, 1.5; 0.3, 0.5, 0.55 in the phases that have more than one of them."""
    flat = [1.0] * 5 + FALLING[5:8] + [0.2, 0.2, 0.2, 0.3]
    write_run("runs/SGD", 4.0, losses=[*FALLING[:8], 0.2, 0.3, 0.6, 0.4], **DROPS)
    write_run("runs/SGDG0", 4.0, "SGDG", losses=flat, **DROPS)
    write_run("runs/SGDG1", 4.0, "SGDG", losses=[*FALLING[:8], 0.3, 0.3, 0.6, 0.8], seed=1, **DROPS)
    text = show("runs")
    rises, falls = table_after(text, "The lowest training loss"), table_after(text, "The plateau")
    assert [line["Epochs"] for line in rises] == [line["Epochs"] for line in falls] == ["1 to 5", "9 to 12"]
    assert [line["SGD"] for line in rises] == ["1.50, +0%", "0.300, +33%"]
    assert [line["SGD"] for line in falls] == ["-25%", "+33%"]
    assert rises[1]["SGD-G"] == "0.250, +50% (+0 to +100%)"
    assert falls[0]["SGD-G"] == "-12% (-25 to +0%)"


def test_a_run_that_has_not_finished_has_no_phases():
    """Not even those that it has behind it; nor has one without drops, or a search for hyperparameters."""
    write_run("runs/SGD0", 4.0, losses=FALLING, **DROPS)
    write_run("runs/SGD1", 4.0, losses=[9.0] * 12, written=11, seed=1, **DROPS)
    write_run("runs/SGDG", 4.0, "SGDG", losses=FALLING, written=11, **DROPS)
    (line, _, _) = table_after(show("runs"), "Training loss at the end")
    assert (line["SGD"], line["SGD-G"]) == ("1.50", "unfinished (11 of 12 epochs)")
    write_run("constant/SGD", 4.0, losses=FALLING, epoch_step=[12])
    write_run("search/SGD", 4.0, losses=FALLING, holdout=10, **DROPS)
    assert "Training loss at the end" not in show("constant", "search", "runs/SGDG")


def test_the_ratio_is_to_the_only_sgd_of_network_and_experiment():
    """Two choices of layers are two rows, and SGD has no such choice."""
    write_run("runs/SGD", 4.0, losses=FALLING, **DROPS)
    for select, factor in (("measured", 2), ("shape", 4)):
        losses = [factor * loss for loss in FALLING]
        write_run(f"runs/{select}", 4.0, "SGDG", losses=losses, select=select, **DROPS)
    ratios = [line["SGD-G / SGD"] for line in table_after(show("runs"), "Training loss at the end")]
    assert ratios == ["2.00"] * 3 + ["4.00"] * 3
    write_run("runs/SGD-2", 4.0, losses=FALLING, lr=0.2, **DROPS)
    write_run("runs/third", 4.0, "SGDG", losses=FALLING, omega=0.0, **DROPS)  # beside neither
    ratios = [line.get("SGD-G / SGD") for line in table_after(show("runs"), "Training loss at the end")]
    assert sorted(ratios)[:3] == [""] * 3


def test_a_loss_of_zero_is_no_division_by_zero():
    for method in RATES:
        write_run(f"runs/{method}", 4.0, method, losses=[0.0] * 12, **DROPS)
    (line, *_) = table_after(show("runs"), "Training loss at the end")
    assert (line["SGD-G"], line.get("SGD-G / SGD", "")) == ("0.00", "")


def test_the_papers_losses_stand_beside_those_of_its_network_data_and_schedule():
    """Of the last three points before the first drop: SGD 0.3, 0.3 and 0.29, SGD-G about 0.31."""
    named = {"data": CIFAR10, "model": "wrn-28-10", "losses": [1.0] * 200} | PAPER_RUN
    for method in RATES:
        write_run(f"full/{method}", 4.0, method, **named)
    write_run("going-on/SGDG", 4.0, "SGDG", **named, written=100)
    write_run("going-on/SGD", 4.0, **named)
    line = table_after(show("going-on"), "Training loss at the end")[0]
    assert (line["SGD-G"], line["SGD-G / SGD"]) == (
        "unfinished (100 of 200 epochs); paper 0.31",
        "paper 1.03",
    )
    text = show("full")
    first, second, *_ = table_after(text, "Training loss at the end")
    assert (first["SGD"], first["SGD-G"]) == ("1.00; paper 0.3", "1.00; paper 0.31")
    assert first["SGD-G / SGD"] == "1.00; paper 1.03"
    assert float(second["SGD-G / SGD"].split()[-1]) < 0.2
    plateau = table_after(text, "The plateau")[1]  # what the poster claims, in a number
    assert [int(plateau[m].split()[-1].strip("%")) for m in ("SGD", "SGD-G", "Adam-G")] == [-4, -38, -26]
    for name, other in {
        "network": {"model": "wrn-40-10"},
        "data": {"data": CIFAR10 | {"train_images": 500}},
        "schedule": {"epoch_step": [50, 120, 160]},
    }.items():
        write_run(name, 4.0, **named | other)
        assert table_after(show(name), "Training loss at the end")[0]["SGD"] == "1.00"


# Runs that cannot be used

FILES = [  # of config.json or log.txt, by what is in it; None: there is no such file
    ("config.json", None, "config.json cannot be read (No such file or directory)"),
    ("config.json", "", "config.json is not JSON"),
    ("config.json", b"\xff\xfe", "config.json is not JSON ('utf-8' codec can't decode"),
    ("config.json", "[" * 100_000, "config.json is not JSON"),
    ("config.json", "9" * 10_000, "config.json is not JSON"),
    ("config.json", "5", "config.json is 5, not a JSON object"),
    ("config.json", '{"options": {}}', "config.json has no data, model, device"),
    ("config.json", '{"options": null, "data": {}, "model": "m", "device": "CPU"}', "options is None, not a"),
    ("log.txt", b"json_stats: \xff\n", "line 1 of log.txt is not JSON"),
    ("log.txt", "by hand\n", "line 1 of log.txt does not begin with json_stats"),
    ("log.txt", "json_stats: 5\n", "line 1 of log.txt is 5, not a JSON object"),
    ("log.txt", "json_stats: {}\n", "line 1 of log.txt has no epoch, train_loss, test_acc, train_time"),
]
VALUES = [  # (object, key, value): reason. `record` is the fifth epoch's line.
    ("config", "device", 5, "device is 5, not a text"),
    ("config", "model", "", "model is '', not a text"),
    ("config", "processes", 0, "processes is 0, not a whole number from 1"),
    ("config", "torch", [], "torch is [], not a text"),
    ("data", "train_images", -5, "data: train_images is -5"),
    ("data", "sha256", None, "data: sha256 is None"),
    ("options", "optim_method", "Adam", "is 'Adam', not one of SGD, SGDG, AdamG"),
    ("options", "epoch_step", [3, 2], "is [3, 2], not a list of rising epochs"),
    ("options", "epoch_step", "[3]", "not a list of rising epochs"),
    ("options", "epochs", 5.0, "is 5.0, not a whole number"),
    ("options", "epochs", True, "is True, not a whole number"),
    ("options", "epochs", 4, "log.txt has 5 epochs, and config.json 4"),
    ("options", "lr", 10**400, "lr is 1000"),
    ("options", "lr", 0.2, "log.txt is of another run than config.json: lr differs"),
    ("options", "lr_decay_ratio", float("nan"), "lr_decay_ratio is nan, not a number"),
    ("options", "dropout", [[0.3]], "dropout is [[0.3]], not a single value"),
    ("options", "seed", 3, "log.txt is of another run than config.json: seed differs"),
    ("record", "train_loss", float("nan"), "line 5 of log.txt: train_loss is nan, not a number"),
    ("record", "train_loss", float("inf"), "train_loss is inf, not a number"),
    ("record", "train_loss", 1e308, "train_loss is 1e+308, not a number"),
    ("record", "train_loss", "0.5", "train_loss is '0.5', not a number"),
    ("record", "test_acc", 101, "test_acc is 101, not a number from 0 to 100"),
    ("record", "test_time", {}, "test_time is {}, not a number"),
    ("record", "epoch", 4, "log.txt has epoch 4 twice"),
    ("record", "epoch", 6, "log.txt has later epochs, but not epoch 5"),
]


@pytest.fixture
def expect_left_out(capsys):
    """expect_left_out(reason): `runs/odd` is named with it, once on standard error; the others are shown."""
    write_run("runs/good", 4.0)
    expected = show("runs")
    capsys.readouterr()

    def expect(reason):
        text = show("runs")
        (said,) = capsys.readouterr().err.splitlines()
        assert said.startswith("summarize.py: left out runs/odd: cannot be used, ")
        assert reason in said
        *others, left_out = [line for line in text.splitlines() if line.startswith("- ")]
        assert (others, left_out.startswith("- runs/odd: ")) == ([], True)
        assert text.split("Not counted")[0] == expected.split("The test error is")[0]

    return expect


@pytest.mark.parametrize(("file", "content", "reason"), FILES)
def test_a_file_that_cannot_be_used_is_named(expect_left_out, file, content, reason):
    odd = write_run("runs/odd", 5.0) / file
    odd.unlink()
    if content is not None:
        odd.write_bytes(content if isinstance(content, bytes) else content.encode())
    expect_left_out(reason)


@pytest.mark.parametrize(("where", "key", "value", "reason"), VALUES)
def test_a_value_that_cannot_be_used_is_named(expect_left_out, where, key, value, reason):
    path = write_run("runs/odd", 5.0)
    if where == "record":
        *lines, last = (path / "log.txt").read_text().splitlines(keepends=True)
        record = json.loads(last.removeprefix("json_stats:")) | {key: value}
        (path / "log.txt").write_text("".join(lines) + f"json_stats: {json.dumps(record)}\n")
    else:
        config = json.loads((path / "config.json").read_text())
        (config if where == "config" else config[where])[key] = value
        (path / "config.json").write_text(json.dumps(config))
    expect_left_out(reason)


@pytest.mark.parametrize("files", [["config.json"], ["log.txt"], ["config.json", "log.txt"]])
@pytest.mark.parametrize("kind", ["directory", "pipe", "broken link"])
def test_what_is_no_file_is_named(expect_left_out, files, kind):
    path = write_run("runs/odd", 5.0)
    for file in files:
        (path / file).unlink()
        if kind == "directory":
            (path / file).mkdir()
        elif kind == "pipe":
            os.mkfifo(path / file)
        else:
            (path / file).symlink_to("nowhere")
    expect_left_out(f"{files[0]} cannot be read" if kind == "broken link" else f"{files[0]} is not a file")


def test_a_folder_that_cannot_be_looked_into_is_named(monkeypatch, capsys):
    write_run("runs/good", 4.0)
    write_run("runs/odd", 5.0)
    scandir = os.scandir

    def refuse(path):
        if str(path).endswith("odd"):  # as without permission, which root always has
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    assert "4.00" in show("runs")
    assert "left out runs/odd: cannot be looked into (Permission denied)" in capsys.readouterr().err


PUBLISHED = ROOT / "logs/published/own-rates/cifar10-jpeg/wrn-10-1/SGDG/seed0"
INF = float("inf")
ODD = [
    None, True, False, 0, -1, 1, 7, 0.5, -0.0, 1e-300, 1e39, 1e308, INF, -INF, INF - INF, 10**39, -(10**400),
    "", "0.1", "|", "\n", "<b>", "\ud800", "Adam", "9" * 2000,
    [], {}, [[]], [3, 1], [1, 2, 30], {"": [None]}, [0.5, "a"] * 9,
]  # fmt: skip


def change_json(value, rng):
    """A value anywhere in it is replaced, taken out or added."""
    key = rng.choice(list(value) if isinstance(value, dict) else range(len(value)))
    if isinstance(value[key], (dict, list)) and value[key] and rng.random() < 0.8:
        return change_json(value[key], rng)
    action = rng.choice(["replace", "replace", "replace", "remove", "add"])
    if action == "remove":
        del value[key]
    elif action == "add" and isinstance(value, dict):
        value[rng.choice(["", "|", "of the future", "\ud800"])] = rng.choice(ODD)
    else:
        value[key] = rng.choice(ODD)


def change_file(path, rng):
    """Damages config.json or log.txt: the values in it, its lines or its bytes."""
    content = path.read_bytes()
    lines = content.splitlines(keepends=True)
    kind = rng.choice(["values", "values", "lines", "bytes"])
    if kind == "values":
        start = b"json_stats:" if path.name == "log.txt" else b""
        values = [json.loads(line.removeprefix(start)) for line in (lines if start else [content])]
        change_json(values, rng)
        content = b"".join(start + json.dumps(value).encode() + b"\n" for value in values)
    elif kind == "lines":  # in another order, some of them, some twice
        picked = rng.choices(lines, k=rng.randint(0, len(lines) + 2))
        content = b"".join(rng.choice([picked, rng.sample(lines, len(lines)), lines[: len(picked)]]))
    else:
        start, stop = sorted(rng.choices(range(len(content) + 1), k=2))
        piece = rng.choice([b"", content[start:stop] * 2, rng.randbytes(3)])
        content = content[:start] + piece + content[rng.choice([start + 1, stop]) :]
    path.write_bytes(content)


@pytest.mark.parametrize(
    "seeds", [range(200), pytest.param(range(200, 10_000), marks=pytest.mark.long)], ids=len
)
def test_any_damage_leaves_the_good_runs_table(seeds):
    """The good run is shown, the other one shown or named; every figure is a number, every table whole."""
    write_run("runs/good", 4.0)
    for seed in seeds:
        rng = random.Random(seed)
        shutil.copytree(PUBLISHED, "runs/odd")
        for name in rng.choice([["config.json"], ["log.txt"], ["config.json", "log.txt"]]):
            change_file(Path("runs/odd", name), rng)
        with contextlib.redirect_stderr(io.StringIO()) as error:
            found = cells("runs", "--markdown", "page.md")
        check_the_good_run_is_shown(found, Path("page.md").read_text(), error.getvalue().splitlines())
        shutil.rmtree("runs/odd")
        Path("page.md").unlink()


def check_the_good_run_is_shown(found, page, said):
    assert "4.00" in page
    assert len(found) + len(said) == 2
    assert all(line.startswith("summarize.py: left out runs/odd: cannot be used, ") for line in said)
    assert not said or "- runs/odd: cannot be used, " in page
    for table in re.findall(r"(?:^\|.*\n)+", page, re.M):
        assert len({len(columns(line)) for line in table.splitlines()}) == 1
    for cell in found:
        figures = [cell[name] for name in ("test_error", "min", "max", "train_loss", "images_per_sec")]
        assert all(0 <= float(figure or 0) <= runs.LARGEST for figure in figures)  # NaN is not


NASTY = "a|b\n<img src=x> \"q\" 'p' `c` *d* _e_ [f](g) $\\frac{ \\ & ~~h~~ \udcff"


def test_names_break_neither_markdown_nor_csv(drawn):
    data = DIGITS | {"name": NASTY + summarize.END}
    for experiment, option in ((NASTY, NASTY), ("other", "|")):
        options = {"an_option": option, "losses": FALLING} | DROPS
        write_run(f"runs/{experiment}/a", 4.0, data=data, model=f"WRN {NASTY}", **options)
    (write_run(f"runs/{NASTY}/odd", 5.0) / "config.json").unlink()
    found = cells("runs", "--markdown", "page.md", "--plots", "figures")
    assert {cell["network"] for cell in found} == {f"WRN {NASTY}".replace("\udcff", r"\udcff")}
    _, page = Path("page.md").read_text().split("### ")
    plain = re.sub(r"\\[^a-z\s]", "", page)  # without what is escaped
    assert not re.search(r"[<>`~$]|(?<!\w)_|\nimg", plain)
    for table in re.findall(r"(?:^\|.*\n)+", plain, re.M):
        assert len({line.count("|") for line in table.splitlines()}) == 1
    links = re.findall(r"\]\((.*?)\)", plain)
    assert len(links) == 3
    assert set(links) < drawn


def test_what_may_change_in_a_run_is_the_same_for_training_and_tables():
    """Two lists, since reading logs needs no torch."""
    assert set(runs.MAY_CHANGE) == options.MAY_CHANGE
