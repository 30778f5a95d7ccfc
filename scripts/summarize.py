"""Tables and figures from run directories: medians over seeds, with the paper's numbers beside them.

    python scripts/summarize.py logs/table1 [more directories] [--markdown PAGE] [--csv FILE]
                                [--plots DIR_OR_FILE]

A run is a directory with config.json and log.txt. Its result is the last epoch's test error, never the best
epoch's. Runs that differ in nothing but the seed, and in what cannot change a result, make a cell; cells with
the same data and schedule make a table. A run that has not finished is named, but counts in no median; one
whose files cannot be used is left out, with a sentence. Runs with --holdout serve to choose hyperparameters
and have tables of their own. A folder `published` is passed over unless it is named itself.
"""

import argparse
import csv
import io
import json
import math
import os
import re
import signal
import sys
from collections import Counter, namedtuple
from itertools import groupby, pairwise
from pathlib import Path
from statistics import median
from textwrap import fill

import matplotlib
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from utils import CONFIG, LOG, counted, printable, write_whole

ROOT = Path(__file__).resolve().parent.parent
# One data set of the paper's tables: test error in %, median of five runs, for SGD, SGD-G and Adam-G.
Paper = namedtuple("Paper", "epochs epoch_step images errors")
PAPER = {
    "CIFAR10": Paper(200, [60, 120, 160], (50_000, 10_000), {
        "vgg-13": (5.88, 5.87, 6.05), "vgg-19": (6.49, 5.92, 6.02),
        "wrn-28-10": (3.89, 3.85, 3.78), "wrn-40-10": (3.72, 3.72, 3.80),
    }),
    "CIFAR100": Paper(200, [60, 120, 160], (50_000, 10_000), {
        "vgg-13": (26.17, 25.29, 24.89), "vgg-19": (27.62, 25.79, 25.59),
        "wrn-28-10": (18.66, 18.19, 18.30), "wrn-40-10": (18.39, 18.04, 17.85),
    }),
    "SVHN": Paper(160, [60, 120], (604_388, 26_032), {
        "vgg-13": (1.78, 1.74, 1.72), "vgg-19": (1.94, 1.81, 1.77),
        "wrn-16-4": (1.64, 1.67, 1.61), "wrn-22-8": (1.64, 1.63, 1.55),
    }),
}  # fmt: skip
METHODS = {"SGD": "SGD", "SGDG": "SGD-G", "AdamG": "Adam-G"}  # the option's values, and the paper's names
LABELS = {"CIFAR10": "CIFAR-10", "CIFAR100": "CIFAR-100"}  # of data sets that have another name in options
COLOURS = {"SGD": "#000000", "SGD-G": "#0072B2", "Adam-G": "#D55E00"}  # Okabe, Ito: for colour-blind eyes too
# Options that change no result, are the same in a table, or have a column. All others, also those of the
# future, are the same in a cell.
APART = {"seed", "device", "nthread", "dataroot", "dataset_name", "compile", "dataset", "holdout", "epochs"}
APART |= {"epoch_step", "optim_method", "model", "depth", "width", "lr", "lrg"}
BEGIN, END = (f"<!-- made by scripts/summarize.py: {word} -->" for word in ("begin", "end"))
NOTE = """Error: the last epoch's. Loss: the training loss, median of the last three epochs up to that one.
Of several seeds (n) the median and the range. An experiment is the folder of its runs. Options
are named where they differ from most of the method's in the table; config.json has all."""


def read_paper_curves():
    """{(data set, network): {method: [(epoch, training loss), ...]}}."""
    curves = {}
    with (ROOT / "docs/paper_curves.csv").open(encoding="utf-8") as file:
        for line in csv.DictReader(file):
            points = curves.setdefault((line["data"], line["network"]), {}).setdefault(line["method"], [])
            points.append((int(line["epoch"]), float(line["training_loss"])))
    return curves


CURVES = read_paper_curves()


class Run:
    """One run. Raises whatever goes wrong with files that main.py did not write.

    table: (whether it chooses hyperparameters, data set, description), which a table's runs share.
    setting: what a cell's runs share within a table, in the order of the output.
    options: those that may change a result, without the rates, as text.
    ends: the last epoch of each phase, that is, before each drop of the learning rates, and of the run.
    paper, curves: the paper's test error in % and its losses, where data, network and schedule are its own.
    """

    def __init__(self, path, root, config):
        data, method = config["data"], config["options"]["optim_method"]
        # What runs from before an option or entry did comes first.
        options = {"holdout": 0, "sync_bn": False, "select": None if method == "SGD" else "shape"}
        options |= {"float32_convolutions": "float32", "weights_from": None, "processes": 1}
        options |= {key: config[key] for key in options if key in config} | config["options"]
        self.path, self.method, self.model = path, METHODS[method], config["model"]
        self.data, self.sha256 = LABELS.get(data["name"], data["name"]), data["sha256"]
        self.seed, self.epochs, self.holdout = (int(options[key]) for key in ("seed", "epochs", "holdout"))
        self.rates = [float(options[key]) for key in ("lr", "lrg") if options[key] is not None]
        self.options = {key: str(value) for key, value in options.items() if key not in APART}
        drops, images = options["epoch_step"], (data["train_images"], data["test_images"])
        self.ends = [*(drop for drop in drops if drop < self.epochs), self.epochs]
        self.experiment = experiment_of(
            path.relative_to(root), (self.data, options["dataset"], self.model, self.method)
        )
        self.name = self.model.upper() + (f", {self.experiment}" if self.experiment else "")
        self.table = self.holdout > 0, self.data, self.description(*images, drops)
        order = list(COLOURS).index(self.method)
        self.setting = self.model, self.experiment, order, self.rates, sorted(self.options.items())
        paper = PAPER.get(options["dataset"])  # archives of another size are not that data set
        same = paper and (paper.epochs, paper.epoch_step, paper.images) == (self.epochs, drops, images)
        self.paper = paper.errors[self.model][order] if same and self.model in paper.errors else None
        self.curves = CURVES.get((self.data, self.model.upper()), {}) if same else {}

    def description(self, train, test, drops):
        kind = "held-out" if self.holdout else "test"
        drops = f"drop after {', '.join(map(str, drops))}" if drops else "are constant"
        images = f"{train:,} training and {test:,} {kind} images (SHA-256 {self.sha256[:12]})"
        return f"{images}, {counted(self.epochs, 'epoch')}, learning rates {drops}."

    def read_log(self, log):
        """Losses and errors of the epochs. What follows the last line end is being written."""
        lines = [json.loads(line.removeprefix("json_stats:")) for line in log.split("\n")[:-1]]
        self.losses = [float(line["train_loss"]) for line in lines]
        self.errors = [100 - line["test_acc"] for line in lines]
        if not all(map(math.isfinite, self.losses + self.errors)):
            raise ValueError("not all its losses and errors are finite numbers")
        if [line["epoch"] for line in lines] != list(range(1, len(lines) + 1)) or len(lines) > self.epochs:
            raise ValueError(f"its epochs are not the first of {self.epochs}, each once")
        self.finished = len(lines) == self.epochs
        self.progress = f"unfinished, epoch {len(lines)} of {self.epochs}"


def experiment_of(path, names):
    """Below `logs`, `own-rates/CIFAR10/wrn-10-1/SGD/seed0` is of the experiment `own-rates`."""

    def plain(name):  # the folder `cifar10-jpeg` is for CIFAR-10 (JPEG)
        return re.sub(r"[\W_]", "", name.lower())

    return "/".join(part for part in path.parts[:-1] if plain(part) not in map(plain, names))


def read_runs(roots):
    """All usable runs below `roots`, and a sentence for each that is left out."""
    runs, left_out, seen = [], [], set()
    for root in roots:
        for folder, subfolders, files in os.walk(root, followlinks=True):
            path, real = Path(folder), Path(folder).resolve()
            # Links to a folder above would lead round and round.
            subfolders[:] = [] if real in seen else sorted(name for name in subfolders if name != "published")
            if {CONFIG, LOG} & set(files) and real not in seen:
                try:
                    file = path / CONFIG
                    run = Run(path, root, json.loads(file.read_text(encoding="utf-8")))
                    file = path / LOG
                    run.read_log(file.read_text(encoding="utf-8"))
                    Cell([run], [])  # raises what its tables would meet
                    runs.append(run)
                except Exception as error:  # whatever is in a file, it ends its run alone
                    left_out.append(f"{path}: {file.name}: {type(error).__name__}: {error}"[:400])
            seen.add(real)
    return runs, left_out


# ----------------------------------------------------------------------------------------------------- tables


class Cell:
    """Runs that differ in the seed only; `runs` and `errors` are of the finished ones.

    rates: and the options in which it differs from most cells of its method, as '0.1, dropout 0.0'.
    line: {head: text} for a table; the last entries are the losses at the ends of the phases.
    """

    def __init__(self, all_runs, unusual):
        self.all_runs, self.any = all_runs, all_runs[0]
        self.runs = [run for run in all_runs if run.finished]
        self.errors = [run.errors[-1] for run in self.runs]
        # Of each phase and each run the median of its last three epochs.
        self.losses = [
            [median(run.losses[start:end][-3:]) for run in self.runs]
            for start, end in pairwise([0, *self.any.ends])
        ]
        rates, n = [f"{rate:g}" for rate in self.any.rates], f", n = {len(self.runs)}"
        self.rates = ", ".join([*rates, *unusual])
        progress = max(all_runs, key=lambda run: len(run.losses)).progress
        run, paper = self.any, self.any.paper
        self.line = {
            "Network": run.model.upper(), "Experiment": run.experiment, "Method": run.method,
            "lr": rates[0], "lrg": [*rates, ""][1], "Other options": ", ".join(unusual),
            "Error (%)": middle(self.errors, ".2f", n) or progress,
            "Paper": f"{paper:.2f}" if paper else "",
            "Diff.": f"{median(self.errors) - paper:+.2f}" if paper and self.runs else "",
        }  # fmt: skip
        for end, losses in zip(run.ends, self.losses, strict=True):
            self.line[f"Loss at {end}"] = middle(losses, "#.3g")


def middle(values, form, n=""):
    """The median and, of several values, the range; of none nothing."""
    spread = f" ({min(values):{form}} to {max(values):{form}}{n})" if len(values) > 1 else ""
    return f"{median(values):{form}}{spread}" if values else ""


def make_tables(runs, left_out):
    """Lists of cells in the order of the output; `left_out` gets what is not counted."""
    tables = {}
    for run in sorted(runs, key=lambda run: (run.table, run.setting, not run.finished)):
        by_seed = tables.setdefault(run.table, {}).setdefault(str(run.setting), {})
        first = by_seed.setdefault(run.seed, run)
        if first is not run:
            left_out.append(f"{run.path}: seed {run.seed} of the same settings is there as {first.path}")
        elif not run.finished:
            left_out.append(f"{run.path}: {run.progress}")
    return [make_table([list(by_seed.values()) for by_seed in cells.values()]) for cells in tables.values()]


def make_table(cells):
    """The cells of lists of runs."""
    counts = {}  # (method, option) -> how many cells have which text
    for run, *_ in cells:
        for name, text in run.options.items():
            counts.setdefault((run.method, name), Counter())[text] += 1
    usual = {key: count.most_common(1)[0][0] for key, count in counts.items()}
    table = []
    for runs in cells:
        options, method = runs[0].options.items(), runs[0].method
        table.append(Cell(runs, [f"{name} {text}" for name, text in options if text != usual[method, name]]))
    return table


def choice_lines(cells):
    """{head: text} for each network and method: the errors with rates and options, the best first."""
    lines = []
    for (name, method), group in groupby(cells, lambda cell: (cell.any.name, cell.any.method)):
        best = sorted((cell for cell in group if cell.runs), key=lambda cell: median(cell.errors))
        texts = "; ".join(f"{cell.line['Error (%)']} at {cell.rates}" for cell in best)
        lines.append({"Network": name, "Method": method, "Held-out error (%) at lr, lrg": texts})
    return lines


def report(tables, left_out, terminal=False):
    """All tables in Markdown, or each line of them in 80 columns, with the losses of the last phase alone."""
    shown = []
    for cells in tables:
        is_choice, data, description = cells[0].any.table
        title = data + (", choice of hyperparameters" if is_choice else "")
        lines = choice_lines(cells) if is_choice else [cell.line for cell in cells]
        heads = [head for head in lines[0] if any(line[head] for line in lines)]
        if terminal:
            heads = [head for head in heads if "Loss" not in head or head == heads[-1]]
            texts = ["; ".join(f"{h.lower()} {line[h]}" for h in heads if line[h]) for line in lines]
            wrapped = [fill(printable(text), 80, subsequent_indent="    ") for text in (description, *texts)]
            shown += [printable(title), *wrapped, ""]
            continue
        rows = [[markdown(line[head]) for head in heads] for line in lines]
        widths = [max(map(len, column)) for column in zip(heads, *rows, strict=True)]
        rows = [heads, ["-" * width for width in widths], *rows]
        shown += [f"### {markdown(title)}", "", markdown(description), ""]
        shown += [f"| {' | '.join(map(str.ljust, row, widths))} |" for row in rows] + [""]
    if left_out:
        left_out = ["", "Not counted:", "", *(f"- {markdown(sentence)}" for sentence in left_out)]
    return "\n".join([*shown, fill(NOTE, 80) if terminal else NOTE, *left_out, ""])


def markdown(text):
    """Text that Markdown is to show as it is, in a table too."""
    return re.sub(r"[\\`*\[\]<>|&~$]", r"\\\g<0>", printable(text))


def new_page(path, part):
    """The page with `part` between its markers. Raises ValueError where they do not stand there once each."""
    page = path.read_text(encoding="utf-8") if path.exists() else f"# Results\n\n{BEGIN}\n{END}\n"
    pieces = re.split(f"({BEGIN}|{END})", page)
    if pieces[1::2] != [BEGIN, END]:
        raise ValueError(f"it needs these two lines, once each and in this order: {BEGIN} and {END}")
    return f"{pieces[0]}{BEGIN}\n\n{part}\n{END}{pieces[-1]}"


def csv_text(tables):
    """A line for each cell, with all options, and six digits of each number."""
    records = []
    for cell in (cell for cells in tables for cell in cells):
        run, errors, losses = cell.any, cell.errors, [median(at) for at in cell.losses if at]
        records.append({
            "data": run.data, "sha256": run.sha256, "epochs": run.epochs, "holdout": run.holdout,
            "network": run.model, "experiment": run.experiment, "method": run.method,
            "lr": run.rates[0], "lrg": [*run.rates, ""][1],
            "other_options": ", ".join(f"{name} {value}" for name, value in run.options.items()),
            "runs": len(cell.runs), "unfinished": len(cell.all_runs) - len(cell.runs),
            "test_error": median(errors) if errors else "", "min": min(errors, default=""),
            "max": max(errors, default=""), "paper": run.paper or "",
            "train_loss": losses[-1] if losses else "", "phases": " ".join(f"{loss:.6g}" for loss in losses),
        })  # fmt: skip
    file = io.StringIO(newline="")
    writer = csv.writer(file)
    writer.writerow(records[0])
    writer.writerows(map(csv_cell, record.values()) for record in records)
    return file.getvalue()


def csv_cell(value):
    """As text that no spreadsheet takes for a formula."""
    text = f"{value:.6g}" if isinstance(value, float) else printable(str(value))
    return f"'{text}" if text.startswith(("=", "+", "-", "@")) else text


# ---------------------------------------------------------------------------------------------------- figures


# quantity: losses or errors, of the cells. curves: the paper's losses, behind them or alone.
Panel = namedtuple("Panel", "title quantity cells drops curves")


def figures_of(cells):
    """[(words of the file's name, title, panels)]: those with several methods, then each network."""
    data, figures, compared = cells[0].any.data, [], []
    for name, group in groupby(cells, lambda cell: cell.any.name):
        group = list(group)
        run, drops = group[0].any, group[0].any.ends[:-1]
        if len({cell.any.method for cell in group}) > 1:
            compared.append(Panel(name, "losses", group, drops, run.curves))
        losses = Panel("Training loss", "losses", group, drops, run.curves)
        errors = Panel("Test error (%)", "errors", group, drops, {})
        figures.append((f"{run.experiment} {data} {run.model}", f"{name} on {data}", [losses, errors]))
    if len(compared) > 1:
        figures.insert(0, (f"{data} training loss", f"Training loss on {data}", compared))
    return figures


def figure_of_the_paper():
    drops = {LABELS.get(name, name): paper.epoch_step for name, paper in PAPER.items()}
    panels = [
        Panel(f"{network} on {data}", "losses", (), drops[data], curves)
        for (data, network), curves in CURVES.items()
    ]
    return "paper curves", "The paper's training cross-entropy, read off the authors' poster", panels


def plan_figures(tables, target):
    """{path: (title, panels)}: in the folder `target`, or one figure in the file of that name."""
    results = [cells for cells in tables if not cells[0].any.holdout]
    begun = [[cell for cell in cells if any(run.losses for run in cell.all_runs)] for cells in results]
    figures = [figure for cells in filter(None, begun) for figure in figures_of(cells)]
    if target.suffix and not target.is_dir():
        if len(figures) != 1:
            sys.exit(f"summarize.py: {target} is one file for {len(figures)} figures: name a directory")
        return {target: figures[0][1:]}
    plan = {}
    for words, title, panels in [*figures, figure_of_the_paper()]:
        stem = re.sub(r"[^a-z0-9]+", "-", words.lower()).strip("-")
        while (path := target / f"{stem}.png") in plan:  # of a table with another schedule
            stem += "-more"
        plan[path] = title, panels
    return plan


def draw(title, panels):
    """The PNG of one figure; panels that do not show errors have the same axes."""
    matplotlib.rcParams |= {"text.parse_math": False, "legend.frameon": False, "legend.fontsize": "small"}
    figure = Figure(figsize=(4.5 * len(panels), 4.2), layout="constrained")
    shared = panels[-1].quantity != "errors"
    axes = figure.subplots(1, len(panels), sharex=shared, sharey=shared, squeeze=False)
    for axis, panel in zip(axes.flat, panels, strict=True):
        draw_panel(axis, panel)
    figure.suptitle(title)
    png = io.BytesIO()
    figure.savefig(png, dpi=150)
    return png.getvalue()


def draw_panel(axis, panel):
    """All cells, and behind losses the paper's curves; or these alone."""
    for method, color in COLOURS.items():
        cells = [cell for cell in panel.cells if cell.any.method == method]
        for index, cell in enumerate(cells):
            name = f"{method} {cell.rates}" if len(cells) > 1 else method
            draw_cell(axis, cell, panel.quantity, name, color=color, alpha=1 - 0.8 * index / len(cells))
        if method in panel.curves:
            points, line = zip(*panel.curves[method], strict=True), "--" if panel.cells else "-"
            axis.plot(*points, line, color=color, linewidth=1, zorder=1.5, label=f"{method}, the paper's")
    axis.set(title=panel.title, xlabel="Epoch (dotted: the learning rates drop)")
    axis.grid(alpha=0.25)
    axis.spines[["top", "right"]].set_visible(False)
    axis.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    for drop in panel.drops:
        axis.axvline(drop, color="0.5", linewidth=1, linestyle=":")
    axis.legend(loc="upper right")
    if panel.quantity == "errors":  # without the first epochs, or the last ones cannot be told apart
        later = [e for cell in panel.cells for run in cell.all_runs for e in run.errors[run.epochs // 5 :]]
        axis.set_ylim(0.9 * min(later, default=0), 1.1 * max(later, default=100) or 1)
    else:
        axis.set_yscale("log")
        axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.yaxis.set_major_formatter("{x:g}")
        axis.yaxis.set_minor_formatter(NullFormatter())


def draw_cell(axis, cell, quantity, name, color, alpha):
    """All seeds thin, the median of the finished ones thick."""
    for run in cell.all_runs:
        values = getattr(run, quantity)
        axis.plot(range(1, len(values) + 1), values, color=color, linewidth=0.8, alpha=0.6 * alpha)
    medians = [median(at) for at in zip(*(getattr(run, quantity) for run in cell.runs), strict=True)]
    name += f" (median of {len(cell.runs)})" if len(cell.runs) > 1 else ""
    name += "" if cell.runs else " (unfinished)"
    axis.plot(range(1, len(medians) + 1), medians, linewidth=2, label=name, color=color, alpha=alpha)


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("directories", nargs="+", type=Path, metavar="DIR", help="where to look for runs")
    add("--markdown", type=Path, metavar="PAGE", help="write the tables there, between its two markers")
    add("--csv", type=Path, metavar="FILE", help="write one line per cell there, with all digits")
    add("--plots", type=Path, metavar="DIR_OR_FILE", help="draw a figure for each network and data set")
    options = parser.parse_args(arguments)
    runs, left_out = read_runs(options.directories)
    for sentence in left_out:
        print(f"summarize.py: left out {printable(sentence)}", file=sys.stderr)
    if not runs:
        sys.exit("No usable run (a directory with config.json and log.txt) is there: train one first.")
    tables = make_tables(runs, left_out)
    print(report(tables, left_out, terminal=True), end="")
    files = {}  # path -> what makes its content
    if options.csv:
        files[options.csv] = lambda: csv_text(tables).encode()
    if options.markdown:
        files[options.markdown] = lambda: new_page(options.markdown, report(tables, left_out)).encode()
    for path, figure in (plan_figures(tables, options.plots) if options.plots else {}).items():
        files[path] = lambda figure=figure: draw(*figure)
    for path, make in files.items():
        try:
            content = make()
            path.parent.mkdir(parents=True, exist_ok=True)
            write_whole(path.resolve(), lambda file, content=content: file.write(content))
        except Exception as error:
            sys.exit(printable(f"summarize.py: cannot write {path}: {error.__cause__ or error}"))
    if files:
        print("\nWritten:", *(printable(str(path)) for path in files))


if __name__ == "__main__":
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # a reader that leaves, as `head` does, is no error
    main()
