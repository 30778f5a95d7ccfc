"""The figures of `summarize.py`: training loss and test error against epoch or time, and the paper's curves.

Sections, rows and cells are those of `summarize.py`: a section has rows, a row has a cell for each method, a
cell has runs that differ in the seed only.
"""

import re
from itertools import accumulate, count
from statistics import median

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter

COLOURS = {"SGD": "#000000", "SGD-G": "#0072B2", "Adam-G": "#D55E00"}  # Okabe, Ito: for colour-blind eyes too
DROP = "0.5"  # grey
DROPS = "learning rates drop"
PAPER_STYLE = {"linestyle": (0, (4, 2)), "linewidth": 1, "zorder": 1.5}  # thin, dashed, behind ours


def minutes(run):
    return [seconds / 60 for seconds in accumulate(e["train_time"] + e["test_time"] for e in run.epochs)]


QUANTITIES = {
    "epoch": lambda run: list(range(1, len(run.epochs) + 1)),
    "time": minutes,
    "Training loss": lambda run: run.losses,
    "Test error (%)": lambda run: [100 - epoch["test_acc"] for epoch in run.epochs],
}
AXES = {"epoch": "Epoch", "time": "Minutes"}


# The figures of a row and of a section


def draw_rows(rows, target, x, names):
    """A figure for each row, which `row.figure` names. `target` is a folder, or the one figure's file."""
    if is_file(target) and len(rows) > 1:
        raise ValueError(f"There are {len(rows)} figures to draw: give --plots a directory, not {target}.")
    for row in rows:
        words = [row.experiment, row.any_run.config["data"]["name"], row.model]
        row.figure = target if is_file(target) else target / free_name(words, x, names)
        draw_row(row, row.figure, x)


def draw_sections(sections, folder, x, names):
    """A figure of the training losses in each section, which `section.figure` names."""
    for section in sections:
        words = [section.any_run.config["data"]["name"], "training loss"]
        section.figure = folder / free_name(words, x, names)
        draw_losses(section, section.figure, x)


def free_name(words, x, names):
    """A file's name of these words that is not among `names`, and is added to them."""
    words = " ".join([*words, "time" if x == "time" else ""]).lower()
    stem = re.sub(r"[^a-z0-9]+", "-", words)[:100].strip("-") or "figure"  # file systems take 255 bytes
    numbered = (f"{stem}-{number}.png" for number in count(2))  # another of the same data set and network
    name = f"{stem}.png" if f"{stem}.png" not in names else next(n for n in numbered if n not in names)
    names.add(name)
    return name


def is_file(target):
    """Whether a place for figures is one figure's file: it has a suffix, and is no folder."""
    return bool(target.suffix) and not target.is_dir()


def draw_row(row, path, x):
    """The paper's kind of figure: all seeds thin, the median of the finished ones thick, the drops dotted."""
    figure, panels = plt.subplots(1, 2, figsize=(9, 4), layout="constrained")
    for panel, quantity in zip(panels, ("Training loss", "Test error (%)"), strict=True):
        draw_cells(panel, row, x, quantity)
        style(panel, quantity, AXES[x])
    log_scale(panels[0])
    limit_errors(panels[1], row)
    legend(figure, panels[0])
    figure.suptitle(row.title, parse_math=False)
    save(figure, path)


def draw_losses(section, path, x):
    """The training loss, on the same axes: a panel for each of the rows that compare the most methods."""
    counts = [sum(any(run.epochs for run in c.all_runs) for c in row.cells.values()) for row in section.rows]
    rows = [row for row, count in zip(section.rows, counts, strict=True) if count == max(counts)]
    across = min(2, len(rows))
    down = -(-len(rows) // across)
    figure, panels = plt.subplots(
        down, across, figsize=(8 if across == 1 else 11, 1 + 3.4 * down), layout="constrained",
        sharex=True, sharey=True, squeeze=False,
    )  # fmt: skip
    for panel, row in zip(panels.flat, rows, strict=False):
        draw_cells(panel, row, x, "Training loss")
        style(panel, row.titled(row.label), AXES[x])
        panel.tick_params(labelbottom=True, labelleft=True)
        panel.plot([], [], color=DROP, linestyle=":", label=DROPS)
        panel.legend(fontsize="small", loc="upper right", frameon=False)
    log_scale(panels[0, 0])
    for panel in panels.flat[len(rows) :]:
        panel.set_visible(False)
    figure.suptitle(section.title, parse_math=False)
    save(figure, path)


def draw_cells(panel, row, x, quantity):
    for method, cell in row.cells.items():
        draw_cell(panel, method, cell, x, quantity)
    if x == "epoch" and quantity == "Training loss":  # the poster's curves are of nothing else
        draw_paper_behind(panel, row)


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


def draw_paper_behind(panel, row):
    """Where data set and network are the paper's, its curves of the methods that ran, for as many epochs."""
    curves = row.paper_curves
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


def draw_paper(path, curves, drops):
    """The paper's curves alone, a panel for each {(data set, network): {method: points}}.

    drops[data]: the epochs before a drop.
    """
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
    panel.set_title(title, parse_math=False)
    panel.set_xlabel(xlabel)
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
    panel.plot([], [], color=DROP, linestyle=":", label=DROPS)
    handles, labels = panel.get_legend_handles_labels()
    columns = 4 if len(labels) <= 4 else 3
    figure.legend(handles, labels, loc="outside lower center", ncols=columns, frameon=False)


def save(figure, path):
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    plt.close(figure)
