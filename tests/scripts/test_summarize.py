"""Tables from run directories: what may be in a cell, what is compared and shown, and what is left out."""

import csv
import json
import re
import shlex
import subprocess
import sys

import figures
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
            record = {"epoch": epoch, "train_loss": error / 100 + left, "test_acc": 100 - now}
            record |= {"train_time": 2.0, "test_time": 1.0, "images_per_sec": 600.0 + 100 * error + left}
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
    assert float(cell["train_loss"]) == pytest.approx(0.04)  # the last epoch's
    assert float(cell["images_per_sec"]) == pytest.approx(1002)  # the median epoch's
    assert "4.00 (3.00 to 9.00, n = 5)" in output(capsys, tmp_path / "runs")


@pytest.mark.parametrize(
    "other",
    [
        {"data": DIGITS | {"sha256": "b" * 64}},
        {"data": DIGITS | {"name": "other"}},
        {"dtype": "bfloat16"},
        {"epochs": 6},
        {"epoch_step": [1, 3]},
        {"lr_decay_ratio": 0.1},
        {"lr": 0.2},
        {"lrg": 0.1},
        {"momentum": 0.8},
        {"bn_decay": 5e-4},
        {"omega": 0.0},
        {"grad_clip": None},
        {"select": "measured"},
        {"holdout": 100},
        {"dropout": 0.0},
        {"weight_decay": 0.0},
        {"batch_size": 64},
        {"an_option_of_the_future": 1},
    ],
)
def test_what_differs_in_more_than_the_seed_is_never_in_one_cell(tmp_path, capsys, other):
    write_run(tmp_path / "runs/a", 4.0, "AdamG")
    write_run(tmp_path / "runs/b", 8.0, "AdamG", **({"seed": 1} | other))
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
    for shown in (
        "unfinished (3 of 5 epochs)",
        "unfinished (0 of 5 epochs)",
        "seed1: unfinished, 4 of 5 epochs",
    ):
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
    text = output(capsys, tmp_path / "runs")
    (row,) = [line for line in text.splitlines() if "missing" in line]
    columns = [column.strip() for column in row.strip("|").split("|")]
    assert columns == ["WRN-10-1", "5.00 (5.00 to 5.00, n = 2)", "missing", "**4.00** (4.00 to 4.00, n = 2)"]
    assert text.count("**4.00**") == 2  # in both tables


def test_a_single_run_is_never_the_best(tmp_path, capsys):
    for method, error in zip(RATES, (5.0, 4.0, 6.0), strict=True):
        write_run(tmp_path / f"runs/{method}/seed0", error, method)
    assert "**" not in output(capsys, tmp_path / "runs")
    write_run(tmp_path / "runs/SGD/seed1", 5.0, seed=1)
    assert "**" not in output(capsys, tmp_path / "runs")
    write_run(tmp_path / "runs/SGDG/seed1", 4.0, "SGDG", seed=1)
    write_run(
        tmp_path / "runs/AdamG/seed1", 2.001, "AdamG", seed=1
    )  # a tie to the two decimals that are shown
    assert [output(capsys, tmp_path / "runs").count(f"**{best}**") for best in ("4.00", "5.00")] == [4, 0]


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
    assert sorted((cell["lr"], cell["runs"]) for cell in cells) == [
        (lr, "1") for lr in ("0.01", "0.1", "0.2", "0.4")
    ]
    text = output(capsys, tmp_path / "runs")
    assert text.count("missing") == 1 + 2 * 2  # Adam-G, and SGD-G in two rows
    assert [text.count(f"WRN-10-1 #{number} ") for number in (1, 2, 3, 4)] == [0, 2, 2, 0]  # in both tables


@pytest.fixture
def drawn_below(monkeypatch):
    """drawn_below(folder): the figures that would have been written there, without the time that drawing takes."""
    paths = set()
    monkeypatch.setattr(figures, "draw_row", lambda row, path, x: paths.add(path))
    monkeypatch.setattr(figures, "draw_paper", lambda path, drops: paths.add(path))
    return lambda folder: {path.relative_to(folder).as_posix() for path in paths}


def test_held_out_runs_have_a_table_of_their_own_with_the_best_set_of_each_method(
    tmp_path, capsys, drawn_below
):
    errors = {
        ("SGD", 0.1): 5.0,
        ("SGD", 0.2): 4.0,
        ("SGDG", 0.1): 7.0,
        ("SGDG", 0.2): 6.0,
        ("AdamG", 0.1): 9.0,
    }
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
        ("SGD-G", "0.2", "1", "6.00", "", ""),  # of single runs none is the best
        ("Adam-G", "0.1", "1", "9.00", "", ""),  # one set is no choice
    ]
    assert drawn_below(tmp_path) == {"figures/result-digits-wrn-10-1.png", "figures/paper-curves.png"}


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
    write_run(tmp_path / "runs/d", 5.0, "AdamG", of_the_future=1, model="wrn-16-1", depth=16)
    cells = records(tmp_path, capsys, tmp_path / "runs")
    assert {(cell["method"], cell["other_options"]) for cell in cells} == {
        ("SGD", "weight_decay 0.0005, dropout 0.0"),
        ("SGD", "weight_decay 0.1, dropout 0.3"),
        ("SGD-G", "dropout 0.3"),
        ("Adam-G", "dropout 0.3, of_the_future 1"),
    }


def test_a_seed_counts_once_and_the_second_is_named(tmp_path, capsys):
    write_run(tmp_path / "a/first", 1.0, written=2)
    write_run(tmp_path / "a/second", 4.0)
    write_run(tmp_path / "a/third", 4.0)
    target = tmp_path / "table.csv"
    text = output(
        capsys, tmp_path / "a", tmp_path / "a/second", "--csv", target
    )  # the same folder twice is no twin
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
    write_run(
        tmp_path / "archive/SGD/seed0", 9.0, **named | {"data": CIFAR10 | {"train_images": 500}}, **PAPER_RUN
    )
    (full,) = records(tmp_path, capsys, tmp_path / "full")
    assert (float(full["paper"]), float(full["difference"])) == pytest.approx((3.89, 0.11))
    assert "the paper trained" not in output(capsys, tmp_path / "full")
    write_run(tmp_path / "drops/SGD/seed0", 9.0, **named, **PAPER_RUN | {"epoch_step": [60, 120, 180]})
    for other in ("short", "drops"):
        (cell,) = records(tmp_path, capsys, tmp_path / other)
        assert (cell["paper"], cell["difference"]) == ("3.89", "")
        assert "the paper trained 200 epochs" in output(capsys, tmp_path / other)
    (archive,) = records(tmp_path, capsys, tmp_path / "archive")
    assert (archive["paper"], archive["difference"]) == ("", "")


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
        output(
            capsys, tmp_path / "runs", "--plots", tmp_path / "docs/figures", "--markdown", markdown, "--x", x
        )
    written = list((tmp_path / "docs/figures").iterdir())
    names = {"digits-wrn-10-1.png", "digits-wrn-10-1-time.png", "paper-curves.png"}
    assert {figure.name for figure in written} == names
    assert all(
        figure.read_bytes().startswith(b"\x89PNG") and figure.stat().st_size > 5000 for figure in written
    )
    assert "(figures/digits-wrn-10-1-time.png)" in markdown.read_text()


def test_a_figure_is_linked_from_where_the_page_is(tmp_path, capsys, drawn_below):
    write_run(tmp_path / "runs/a", 4.0)
    markdown = tmp_path / "docs/results.md"
    output(capsys, tmp_path / "runs", "--plots", tmp_path / "docs/my figures", "--markdown", markdown)
    assert "(my%20figures/digits-wrn-10-1.png)" in markdown.read_text()
    output(capsys, tmp_path / "runs", "--plots", tmp_path / "one.png", "--markdown", markdown)
    assert "(../one.png)" in markdown.read_text()
    assert "one.png" in drawn_below(tmp_path)
    assert not (tmp_path / "one.png").exists()


def test_a_page_keeps_what_stands_around_the_two_marker_comments(tmp_path, capsys):
    write_run(tmp_path / "runs/a", 4.0)
    page, begin, end = tmp_path / "page.md", summarize.BEGIN, summarize.END
    output(capsys, tmp_path / "runs", "--markdown", page)
    assert page.read_text().startswith("# Results\n")
    (generated,) = re.findall(r"(### digits.*)", page.read_text(), re.S)
    page.write_text(f"# By hand\n\n{begin}\nolder\n{end}\n\nBelow\n")
    for _ in range(2):  # again changes nothing
        output(capsys, tmp_path / "runs", "--markdown", page)
        assert page.read_text() == f"# By hand\n\n{begin}\n\n{generated}\n{end}\n\nBelow\n"
    for torn in (f"by hand\n{begin}\n", f"by hand\n{end}\n", f"{end}\nby hand\n{begin}\n"):
        page.write_text(torn)
        with pytest.raises(SystemExit, match="both marker comments"):
            summarize.main([str(tmp_path / "runs"), "--markdown", str(page)])
        assert page.read_text() == torn


def test_rows_of_one_network_get_figures_of_their_own(tmp_path, capsys, drawn_below):
    for index in range(3):
        write_run(tmp_path / f"runs/{index}", 4.0, lr=0.1 * (1 + index))
    (tmp_path / "figures.v2").mkdir()  # a folder, whatever its name
    output(capsys, tmp_path / "runs", "--plots", tmp_path / "figures.v2")
    names = {"digits-wrn-10-1.png", "digits-wrn-10-1-2.png", "digits-wrn-10-1-3.png", "paper-curves.png"}
    assert drawn_below(tmp_path / "figures.v2") == names
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
    assert [(cell["float32_convolutions"], cell["runs"]) for cell in cells] == [
        ("TF32", "3"),
        ("float32", "2"),
    ]
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
    shared = (
        "momentum 0.9, weight_decay 0.0005, bn_decay 0.0005 (SGD), bn_decay 0.0 (SGD-G, Adam-G), omega 0.1, "
    )
    shared += "grad_clip 0.1 (SGD-G), grad_clip None (Adam-G), dropout 0.3, select shape (SGD-G)"
    assert f"; {shared}; device" in text


def test_the_published_tables_are_those_of_the_published_logs(tmp_path, capsys, monkeypatch, drawn_below):
    monkeypatch.chdir(ROOT)
    text = (ROOT / "docs/results.md").read_text()
    page = tmp_path / "results.md"
    page.write_text(re.sub(f"(?<={summarize.BEGIN}).*(?={summarize.END})", "", text, flags=re.S))
    output(capsys, "logs/published", "--markdown", page, "--plots", tmp_path / "figures")
    assert page.read_text() == text
    assert drawn_below(tmp_path) == set(re.findall(r"\((figures/.*?)\)", text))
    assert drawn_below(tmp_path) == {f"figures/{path.name}" for path in (ROOT / "docs/figures").iterdir()}


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
    command = (
        f"{shlex.quote(sys.executable)} -u {summarize.__file__} {shlex.quote(str(tmp_path / 'runs'))} | true"
    )
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_run_of_the_authors_script_is_left_out_by_name(tmp_path, capsys):
    record = {"train_loss": 0.5, "test_acc": 90.0, "epoch": 1, "batchSize": 128, "optim_method": "SGDG"}
    theirs = tmp_path / "theirs/resnet_1"
    theirs.mkdir(parents=True)
    (theirs / "log.txt").write_text(f"json_stats: {json.dumps(record)}\n")
    named = f"{theirs}: a run of the authors' script, which has no config.json"
    with pytest.raises(SystemExit) as stop:
        summarize.main([str(tmp_path / "theirs")])
    assert named in stop.value.code
    assert "train one" not in stop.value.code
    write_run(tmp_path / "ours", 4.0)
    assert f"- {named}" in output(capsys, tmp_path)


def test_nothing_to_read_is_one_sentence(tmp_path, capsys):
    with pytest.raises(SystemExit, match=r"No usable run .*: train one first\.$"):
        summarize.main([str(tmp_path)])
    with pytest.raises(SystemExit) as stop:
        summarize.main([str(tmp_path / "nowhere")])
    assert stop.value.code == 2
    assert "is not a directory" in capsys.readouterr().err
