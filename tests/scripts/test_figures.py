"""Figures: runs with medians and drops, the paper's curves behind them where they belong, and these alone."""

import re
from pathlib import Path

import figures
import pytest
import summarize
from runs import Run

NAMES = ("SGD", "SGD-G", "Adam-G")
DROPS = {"CIFAR-10": [60, 120, 160], "CIFAR-100": [60, 120, 160], "SVHN": [60, 120]}
PAPER_NETWORKS = [("CIFAR10", "wrn-28-10"), ("CIFAR100", "wrn-28-10"), ("SVHN", "wrn-22-8")]
SIZES = {"CIFAR10": (50_000, 10_000), "CIFAR100": (50_000, 10_000), "SVHN": (604_388, 26_032)}


def make_run(method, error, written=5, dataset="folder", name=None, images=None, model="wrn-10-1", epochs=5):
    """A run whose loss falls to 1 and whose test error to `error`; an epoch takes 2 s, and 1 s of testing."""
    train, test = images or SIZES.get(dataset, (1437, 360))
    options = {"dataset": dataset, "optim_method": method, "epochs": epochs, "epoch_step": [2, 3]}
    data = {"name": name or dataset, "train_images": train, "test_images": test}
    times = {"train_time": 2.0, "test_time": 1.0}
    losses = [1 + epochs - epoch for epoch in range(1, written + 1)]
    records = [{"train_loss": loss, "test_acc": 100 - error - 2 * (loss - 1)} | times for loss in losses]
    return Run(Path(), "", {"options": options, "data": data, "model": model}, records)


def make_row(*runs):
    """As `summarize.py` makes it: finished runs and others of each method."""
    row = summarize.Row((), runs[0].model, "", 1)
    for run in runs:
        cell = row.cells.setdefault(run.method, summarize.Cell())
        (cell.runs if run.finished else cell.unfinished).append(run)
    return row


@pytest.fixture
def panels(monkeypatch):
    """panels(draw, *arguments): the panels of the figure that a function would write."""
    drawn = []
    monkeypatch.setattr(figures, "save", lambda figure, path: drawn.append(figure))

    def draw(function, *arguments):
        function(*arguments)
        figure = drawn.pop()
        figures.plt.close(figure)
        return figure.axes

    return draw


def lines(panel, method):
    """The curves of a method: (width, x, y), without drops and what stands in the legend alone."""
    mine = [line for line in panel.lines if line.get_color() == figures.COLOURS[method]]
    curves = [line for line in mine if len(line.get_xdata()) > 2]
    return [(line.get_linewidth(), list(line.get_xdata()), list(line.get_ydata())) for line in curves]


def dashed(panel):
    """{method: line} of the paper's curves in a panel."""
    methods = {colour: method for method, colour in figures.COLOURS.items()}
    curves = [line for line in panel.lines if line.get_linestyle() == "--" and len(line.get_xdata())]
    return {methods[line.get_color()]: line for line in curves}


def drops(panel):
    dotted = [line for line in panel.lines if line.get_linestyle() == ":" and len(line.get_xdata())]
    return {line.get_xdata()[0] for line in dotted}


def labels(panel):
    """What the figure's legend says."""
    return [text.get_text() for text in panel.figure.legends[0].get_texts()]


@pytest.mark.parametrize("x", ["epoch", "time"])
def test_a_figure_shows_the_runs_and_their_median(panels, x):
    runs = [make_run(method, 4.0 + more) for method in ("SGD", "SGDG", "AdamG") for more in (0, 1, 5)]
    loss, error = panels(figures.draw_row, make_row(*runs, make_run("AdamG", 50.0, written=3)), Path(), x)
    assert (loss.get_title(), loss.get_yscale()) == ("Training loss", "log")
    assert (error.get_title(), error.get_yscale()) == ("Test error (%)", "linear")
    assert labels(loss) == [*(f"{name} (median of 3)" for name in NAMES), "learning rates drop"]
    steps = [1, 2, 3, 4, 5] if x == "epoch" else [0.05, 0.1, 0.15, 0.2, 0.25]
    assert len(set(figures.COLOURS.values())) == 3
    for panel in (loss, error):
        assert sorted(drops(panel)) == pytest.approx(steps[1:3])
    for method in NAMES:
        *thin, (width, horizontal, vertical) = sorted(lines(error, method), key=lambda line: line[0])
        assert [line[0] < 1 for line in thin] == [True] * (3 + (method == "Adam-G"))
        assert sorted(line[2][-1] for line in thin)[:3] == pytest.approx([4, 5, 9])
        assert (width, horizontal) == (2, pytest.approx(steps))
        assert vertical == pytest.approx([5 + more for more in (8, 6, 4, 2, 0)])
        assert lines(loss, method)[-1][2] == [5, 4, 3, 2, 1]


def test_errors_are_shown_from_a_fifth_of_the_epochs_on(panels):
    """Errors 26, 24, ... 8: the first two would press the last ones together. From 0 on, if that is near."""
    for last in (8.0, 1.0):
        row = make_row(make_run("SGD", last, written=10, epochs=10))
        low, high = panels(figures.draw_row, row, Path(), "epoch")[1].get_ylim()
        assert last + 14 < high < last + 18
        assert 6 < low < 8 if last == 8 else low == 0


def test_a_single_epoch_is_a_dot_and_drops_stand_where_they_were_reached(panels):
    for written, reached in ((1, set()), (2, {2}), (3, {2, 3})):
        loss, _ = panels(figures.draw_row, make_row(make_run("SGD", 4.0, written=written)), Path(), "epoch")
        assert drops(loss) == reached
        low, high = loss.get_ylim()
        assert sum(low <= tick <= high for tick in loss.get_yticks()) >= 3  # also of a short range
        assert ("o" in [line.get_marker() for line in loss.lines]) == (written == 1)


@pytest.mark.parametrize(("dataset", "model"), PAPER_NETWORKS)
def test_the_papers_curves_stand_behind_ours(panels, dataset, model):
    row = make_row(*[make_run(m, 4.0, dataset=dataset, model=model, epochs=30) for m in ("SGD", "AdamG")])
    loss, error = panels(figures.draw_row, row, Path(), "epoch")
    paper = row.paper_curves
    assert dashed(loss).keys() == {"SGD", "Adam-G"}  # those of the methods that ran, for as many epochs
    for method, line in dashed(loss).items():
        points = list(zip(*line.get_data(), strict=True))
        assert points == [(epoch, loss) for epoch, loss in paper[method] if epoch <= 30]
        assert line.get_zorder() < 2  # ours, as all lines of matplotlib
        assert line.get_linewidth() <= 1
    assert f"the paper's (likely {model.upper()})" in labels(loss)
    assert not dashed(error)
    assert not dashed(panels(figures.draw_row, row, Path(), "time")[0])


@pytest.mark.parametrize(
    "other",
    [
        {"dataset": "folder", "name": "CIFAR-10 (JPEG)", "images": SIZES["CIFAR10"]},
        {"dataset": "folder", "name": "CIFAR-10", "images": SIZES["CIFAR10"]},
        {"images": (500, 100)},
        {"model": "wrn-10-1"},
        {"dataset": "SVHN"},  # with another network than the paper's
        {"epochs": 1, "written": 1},  # before the first epoch that was read
    ],
)
def test_the_papers_curves_stand_behind_nothing_else(panels, other):
    run = make_run("SGD", 4.0, **({"dataset": "CIFAR10", "model": "wrn-28-10"} | other))
    loss, error = panels(figures.draw_row, make_row(run), Path(), "epoch")
    assert not dashed(loss)
    assert not dashed(error)
    assert not any("paper" in label for label in labels(loss))


def test_the_losses_of_a_section_are_a_panel_for_each_row_that_compares(panels):
    """On the same axes: two networks with two methods, one of them the paper's, and runs that go on."""
    named = {"dataset": "CIFAR10", "epochs": 30, "written": 30}
    rows = [
        make_row(*[make_run(m, 4.0, model="wrn-28-10", **named) for m in ("SGD", "SGD", "AdamG")]),
        make_row(*[make_run(m, 4.0, **named) for m in ("SGD", "SGDG")]),
        make_row(*[make_run(m, 4.0, **named | {"written": 3}) for m in ("SGDG", "AdamG")]),
        # Nothing to draw yet.
        make_row(*[make_run(m, 4.0, **named | {"written": 0}) for m in ("SGD", "SGDG", "AdamG")]),
        make_row(make_run("SGDG", 4.0, **named)),  # nothing to compare
    ]
    rows[1].experiment = "$\\frac"  # a formula, and a broken one, if it were read as such
    section = summarize.Section(rows)
    *drawn, empty = panels(figures.draw_losses, section, Path(), "epoch")
    titles = ["WRN-28-10", r"WRN-10-1 ($\frac)", "WRN-10-1"]
    assert [panel.get_title() for panel in drawn] == titles
    assert not any(panel.title.get_parse_math() for panel in drawn)
    assert len({panel.get_ylim() for panel in drawn}) == 1
    assert [drops(panel) for panel in drawn] == [{2, 3}] * 3
    assert [dashed(panel).keys() for panel in drawn] == [{"SGD", "Adam-G"}, set(), set()]
    legends = [[text.get_text() for text in panel.get_legend().get_texts()] for panel in drawn]
    assert legends[0] == [
        "SGD (median of 2)", "Adam-G", "the paper's (likely WRN-28-10)", "learning rates drop"
    ]  # fmt: skip
    assert legends[2][0] == "SGD-G (unfinished)"
    assert not empty.get_visible()
    for panel in drawn:
        assert panel.get_yscale() == "log"


def test_the_losses_of_a_section_leave_out_rows_of_fewer_methods(panels):
    rows = [
        make_row(*[make_run(m, 4.0) for m in methods]) for methods in (["SGD", "SGDG"], summarize.METHODS)
    ]
    drawn, *others = panels(figures.draw_losses, summarize.Section(rows), Path(), "epoch")
    legend = [text.get_text() for text in drawn.get_legend().get_texts()]
    assert legend == ["SGD", "SGD-G", "Adam-G", "learning rates drop"]
    assert not others


def test_every_figure_has_a_file_of_its_own(monkeypatch):
    """Also where names end in a number, are longer than a file's may be, or have no letter."""
    monkeypatch.setattr(figures, "draw_row", lambda row, path, x: None)
    monkeypatch.setattr(figures, "draw_losses", lambda section, path, x: None)
    names = ["a", "a-2", "a", "a-3", "a", "a", "A!", "a training loss", "long" * 100, "long" * 100, "…", "…"]
    rows = [make_row(make_run("SGD", 4.0, name="", model=name)) for name in names]
    sections, taken = [summarize.Section([make_row(make_run("SGD", 4.0, name="a"))])], set()
    figures.draw_rows(rows, Path("figures"), "epoch", taken)
    figures.draw_sections(sections, Path("figures"), "epoch", taken)
    paths = {drawn.figure for drawn in [*rows, *sections]}
    assert len(paths) == len(rows) + 1
    assert all(len(path.name) < 200 and not path.name.startswith(".") for path in paths)


def test_the_papers_curves_are_those_that_the_page_quotes():
    """Before each drop, the lowest in bold; and SGD leads before the first drop on CIFAR, nowhere on SVHN."""
    page = (summarize.PAPER_CURVES.parent / "results.md").read_text()
    quoted = {
        int(epoch): line.split("|") for epoch, line in re.findall(r"^\| (\d+), .*?\|(.*)\|$", page, re.M)
    }
    assert list(quoted) == [58, 118, 158, 198]
    for index, ((data, _), methods) in enumerate(summarize.read_paper_curves().items()):
        assert tuple(methods) == NAMES
        losses = [dict(points) for points in methods.values()]
        for epoch, numbers in quoted.items():
            shown = [number.strip() for number in numbers[3 * index : 3 * index + 3] if number.strip()]
            read = [loss[epoch] for loss in losses if epoch in loss]
            assert [float(number.strip("*")) for number in shown] == read
            assert ["*" in number for number in shown] == [loss == min(read) for loss in read]
        for epoch in set.intersection(*map(set, losses)):
            leads = losses[0][epoch] == min(loss[epoch] for loss in losses)
            assert epoch > 60 or leads == (data != "SVHN"), (data, epoch)


def test_the_papers_curves_alone(panels):
    drawn = panels(figures.draw_paper, Path(), summarize.read_paper_curves(), DROPS)
    assert [panel.get_title().split(" (likely ")[0] for panel in drawn] == list(DROPS)
    assert labels(drawn[0]) == [*NAMES, "learning rates drop"]
    for panel, methods in zip(drawn, summarize.read_paper_curves().values(), strict=True):
        assert panel.get_yscale() == "log"
        assert drops(panel) == set(DROPS[panel.get_title().split(" ")[0]])
        for method in NAMES:
            ((_, epochs, losses),) = lines(panel, method)
            assert list(zip(epochs, losses, strict=True)) == methods[method]
