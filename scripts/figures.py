"""The figures of `summarize.py`: training loss and test error against epoch or time, and the paper's curves.

Rows and cells are those of `summarize.py`: a row has a cell for each method, a cell has runs that differ in
the seed only.
"""

import csv
import re
from itertools import accumulate
from pathlib import Path
from statistics import median

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter

COLOURS = {"SGD": "#000000", "SGD-G": "#0072B2", "Adam-G": "#D55E00"}  # Okabe, Ito: for colour-blind eyes too
DROP = "0.5"  # grey
PAPER_CURVES = Path(__file__).parents[1] / "docs/paper_curves.csv"
PAPER_STYLE = {"linestyle": (0, (4, 2)), "linewidth": 1, "zorder": 1.5}  # thin, dashed, behind ours


def minutes(run):
    return [seconds / 60 for seconds in accumulate(e["train_time"] + e["test_time"] for e in run.epochs)]


QUANTITIES = {
    "epoch": lambda run: list(range(1, len(run.epochs) + 1)),
    "time": minutes,
    "Training loss": lambda run: [epoch["train_loss"] for epoch in run.epochs],
    "Test error (%)": lambda run: [100 - epoch["test_acc"] for epoch in run.epochs],
}


# A row's figure


def draw_rows(rows, target, x):
    """A figure for each row, which `row.figure` names. `target` is a folder, or the one figure's file."""
    if is_file(target) and len(rows) > 1:
        raise ValueError(f"There are {len(rows)} figures to draw: give --plots a directory, not {target}.")
    names = set()
    for row in rows:
        words = [row.experiment, row.any_run.config["data"]["name"], row.model, "time" if x == "time" else ""]
        stem = name = re.sub(r"[^a-z0-9]+", "-", " ".join(words).lower()).strip("-")
        while name in names:  # another section or row of the same data set and network
            name = f"{stem}-{1 + sum(other.startswith(stem) for other in names)}"
        names.add(name)
        row.figure = target if is_file(target) else target / f"{name}.png"
        draw_row(row, row.figure, x)


def is_file(target):
    """Whether a place for figures is one figure's file: it has a suffix, and is no folder."""
    return bool(target.suffix) and not target.is_dir()


def draw_row(row, path, x):
    """The paper's kind of figure: all seeds thin, the median of the finished ones thick, the drops dotted."""
    figure, panels = plt.subplots(1, 2, figsize=(9, 4), layout="constrained")
    for panel, quantity in zip(panels, ("Training loss", "Test error (%)"), strict=True):
        for method, cell in row.cells.items():
            draw_cell(panel, method, cell, x, quantity)
        style(panel, quantity, {"epoch": "Epoch", "time": "Minutes"}[x])
    if x == "epoch":  # the poster has no times
        draw_paper_behind(panels[0], row)
    log_scale(panels[0])
    limit_errors(panels[1], row)
    legend(figure, panels[0])
    figure.suptitle(row.title)
    save(figure, path)


def draw_cell(panel, method, cell, x, quantity):
    colour, name = COLOURS[method], method
    horizontal, vertical = QUANTITIES[x], QUANTITIES[quantity]
    runs = [run for run in cell.all_runs if run.epochs]
    for run in runs:
        marker = "o" if len(run.epochs) == 1 else None  # a single epoch makes no line
        panel.plot(horizontal(run), vertical(run), color=colour, linewidth=0.8, alpha=0.6, marker=marker)
    if cell.runs:
        steps = median_curve(cell.runs, horizontal)
        name += f" (median of {len(cell.runs)})" if len(cell.runs) > 1 else ""
        panel.plot(steps, median_curve(cell.runs, vertical), color=colour, linewidth=2, label=name)
    elif runs:
        steps = max(map(horizontal, runs), key=len)
        panel.plot([], [], color=colour, linewidth=0.7, label=f"{name} (unfinished)")
    else:
        return
    for drop in cell.any_run.options["epoch_step"]:
        if drop <= len(steps):  # after so many epochs; against time, every method has its own moment
            draw_drop(panel, steps[drop - 1], DROP if x == "epoch" else colour)


def median_curve(runs, quantity):
    """The median over runs after each epoch, up to where the shortest of them is."""
    return [median(values) for values in zip(*(quantity(run) for run in runs), strict=False)]


def limit_errors(panel, row):
    """Cuts off the first epochs' errors, and what is far below the lowest: the last ones are told apart."""
    later = []
    for run in row.runs:
        later += QUANTITIES["Test error (%)"](run)[len(run.epochs) // 5 :]
    low, high = min(later, default=0), max(later, default=100)
    panel.set_ylim(0.9 * low if low > high / 4 else 0, 1.1 * high or 1)


# The paper's curves


def read_paper_curves():
    """{(data set, network): {method: [(epoch, training loss), ...]}}. The network is likely, not stated."""
    curves = {}
    with PAPER_CURVES.open(newline="", encoding="utf-8") as file:
        for line in csv.DictReader(file):
            methods = curves.setdefault((line["data"], line["likely_network"]), {})
            point = int(line["epoch"]), float(line["training_loss"])
            methods.setdefault(line["method"], []).append(point)
    return curves


def draw_paper_behind(panel, row):
    """Where data set and network are the paper's, its curves of the methods that ran, for as many epochs."""
    curves = read_paper_curves().get((row.paper_data, row.model.upper()), {})
    last = row.any_run.options["epochs"]
    drawn = False
    for method in row.cells:
        points = [(epoch, loss) for epoch, loss in curves.get(method, []) if epoch <= last]
        if points:
            draw_points(panel, points, color=COLOURS[method], **PAPER_STYLE)
            drawn = True
    if drawn:
        panel.plot([], [], color=DROP, **PAPER_STYLE, label=f"the paper's (likely {row.model.upper()})")


def draw_points(panel, points, **style):
    panel.plot([epoch for epoch, _ in points], [loss for _, loss in points], **style)


def draw_paper(path, drops):
    """The paper's curves alone, a panel for each data set; `drops[data]` are the epochs before a drop."""
    curves = read_paper_curves()
    figure, panels = plt.subplots(1, len(curves), figsize=(12, 4), layout="constrained")
    for panel, ((data, network), methods) in zip(panels, curves.items(), strict=True):
        for method, points in methods.items():
            draw_points(panel, points, color=COLOURS[method], linewidth=1.5, label=method)
        for drop in drops[data]:
            draw_drop(panel, drop, DROP)
        style(panel, f"{data} (likely {network})", "Epoch")
        log_scale(panel)
    legend(figure, panels[0])
    figure.suptitle("The paper's training cross-entropy, read off the authors' poster")
    save(figure, path)


# What figures share


def style(panel, title, xlabel):
    panel.set(title=title, xlabel=xlabel)
    panel.grid(alpha=0.25)
    panel.spines[["top", "right"]].set_visible(False)


def log_scale(panel):
    """1, 2 and 5 of each decade, or round numbers where the range is too short to hold enough of them."""
    panel.set_yscale("log")
    low, high = panel.get_ylim()
    panel.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)) if high > 8 * low else MaxNLocator(5))
    panel.yaxis.set_major_formatter("{x:g}")
    panel.yaxis.set_minor_formatter(NullFormatter())  # or a short range would be labelled 6 x 10^-1


def draw_drop(panel, where, colour):
    panel.axvline(where, color=colour, linewidth=1, linestyle=":", zorder=1)


def legend(figure, panel):
    panel.plot([], [], color=DROP, linestyle=":", label="learning rates drop")
    handles, labels = panel.get_legend_handles_labels()
    columns = 4 if len(labels) <= 4 else 3
    figure.legend(handles, labels, loc="outside lower center", ncols=columns, frameon=False)


def save(figure, path):
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    plt.close(figure)
