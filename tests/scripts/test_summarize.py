"""Tables from run directories: what may be in a cell, what is compared and shown, and what is left out."""

import contextlib
import csv
import io
import json
import re
import subprocess
import sys
from pathlib import Path

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


@pytest.fixture(autouse=True)
def in_a_folder(tmp_path, monkeypatch):
    """Each test works in an empty folder, mostly on the runs below `runs`."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def drawn(monkeypatch):
    """The paths of the figures that would have been written, without the time that drawing takes."""
    paths = set()
    monkeypatch.setattr(figures, "draw_row", lambda row, path, x: paths.add(str(path)))
    monkeypatch.setattr(figures, "draw_paper", lambda path, drops: paths.add(str(path)))
    return paths


def write_run(name, error, method="SGD", *, data=DIGITS, model="wrn-10-1", written=None, **changes):
    """A run whose test error falls to `error` in the last epoch, with a better epoch just before it."""
    options = OPTIONS | {"optim_method": method} | RATES[method] | changes
    path = Path(name)
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
    return [column.strip() for column in line.strip("|").split("|")]


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


@pytest.mark.parametrize(
    ("file", "content", "reason"),
    [
        ("config.json", "5", ""),
        ("config.json", '{"options": {', ""),
        ("config.json", '{"options": {}}', "it has no data, model, device"),
        ("config.json", '{"options": [], "data": {}, "model": "m", "device": "CPU"}', ""),
        ("config.json", '{"options": null, "data": null, "model": "m", "device": "CPU"}', ""),
        ("config.json", None, "No such file"),
        ("log.txt", "json_stats: 5\n", ""),
        ("log.txt", "json_stats: {}\n", "it has no epoch, train_loss"),
        ("log.txt", 'json_stats: {"test_acc": null, "train_loss": 1, "epoch": 1, "images_per_sec": 1, '
         '"train_time": 1, "test_time": 1}\n', "not all of its figures are numbers"),
    ],
)  # fmt: skip
def test_whatever_is_in_a_file_the_others_are_shown(file, content, reason):
    write_run("runs/good", 4.0)
    odd = write_run("runs/odd", 5.0) / file
    odd.unlink() if content is None else odd.write_text(content)
    text = show("runs")
    assert "4.00" in text
    (line,) = [line for line in text.splitlines() if "runs/odd" in line]
    assert line.startswith("- runs/odd: its config.json or log.txt cannot be used (")
    assert reason in line


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
