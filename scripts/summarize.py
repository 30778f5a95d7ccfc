"""Tables and figures from run directories: medians over seeds, with the paper's numbers beside them.

    python scripts/summarize.py logs/table1 [more directories] [--markdown PAGE] [--csv FILE]
                                [--plots DIR_OR_FILE]

A run is a directory with config.json and log.txt. Its result is the last epoch's test error, never the best
epoch's. Runs that differ in nothing but the seed, and in what cannot change a result, make a cell; cells with
the same data, precision and schedule make a table. A run that has not finished is named, but counts in no
median; one whose files cannot be used is left out, with a sentence. Runs with --holdout serve to choose
hyperparameters and have tables of their own. A folder `published` is passed over unless it is named itself.
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
import textwrap
from collections import Counter, namedtuple
from functools import cache
from itertools import groupby, pairwise, zip_longest
from pathlib import Path
from statistics import median
from urllib.parse import quote

ROOT = Path(__file__).resolve().parents[1]
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
# future, are the same in a cell; SGD makes no use of some.
NO_RESULT = ("seed", "device", "nthread", "dataroot", "dataset_name", "compile")
OF_TABLE = ("dataset", "holdout", "epochs", "epoch_step")
IN_COLUMNS = ("optim_method", "model", "depth", "width", "lr", "lrg")
NOT_OF_SGD = ("omega", "grad_clip", "select")
OLDER = {"holdout": 0, "select": "shape", "sync_bn": False}  # what runs from before these options did
BEGIN, END = (f"<!-- made by scripts/summarize.py: {word} -->" for word in ("begin", "end"))
NOTE = """Error: the last epoch's. Loss: the training loss, median of the last three epochs up to that one.
Of several seeds (n) the median and the range. An experiment is the folder of its runs. Options
are named where they differ from most of the method's in the table; config.json has all."""


@cache
def read_paper_curves():
    """{(data set, network): {method: [(epoch, training loss), ...]}}."""
    curves = {}
    with (ROOT / "docs/paper_curves.csv").open(encoding="utf-8") as file:
        for line in csv.DictReader(file):
            points = curves.setdefault((line["data"], line["network"]), {}).setdefault(line["method"], [])
            points.append((int(line["epoch"]), float(line["training_loss"])))
    return curves


class Run:
    """One run. Raises whatever goes wrong with files that main.py did not write.

    table: (whether it chooses hyperparameters, order, description, data set), which a table's runs share.
    setting: what a cell's runs share within a table, in the order of the output.
    rates: lr and, where the method has one, lrg. options: the others that may change a result, as text.
    ends: the last epoch of each phase, that is, before each drop of the learning rates, and of the run.
    paper, curves: the paper's test error in % where network, data and schedule are its own, and its curves.
    """

    def __init__(self, path, root, config):
        data, options = config["data"], OLDER | config["options"]
        self.path, self.method = path, METHODS[options["optim_method"]]
        self.model, self.dataset = printable(config["model"]), printable(options["dataset"])
        self.data, self.sha256 = printable(LABELS.get(data["name"], data["name"])), printable(data["sha256"])
        self.images = int(data["train_images"]), int(data["test_images"])
        self.seed, self.epochs, self.holdout = (int(options[key]) for key in ("seed", "epochs", "holdout"))
        self.drops = sorted(map(int, options["epoch_step"]))
        self.ends = [*(drop for drop in self.drops if drop < self.epochs), self.epochs]
        self.rates = tuple(number(options[key]) for key in ("lr", "lrg") if options[key] is not None)
        self.options = self.other_options(config, options)
        self.experiment = experiment_of(
            path.relative_to(root), (self.data, self.dataset, self.model, self.method)
        )
        self.name = self.model.upper() + (f", {self.experiment}" if self.experiment else "")
        self.title = self.data + (", choice of hyperparameters" if self.holdout else "")
        self.table = self.holdout > 0, self.data, self.description(), self.dataset
        order = list(COLOURS).index(self.method)
        self.setting = self.model, self.experiment, order, self.rates, sorted(self.options.items())
        self.paper, self.curves = self.of_paper()

    def other_options(self, config, options):
        apart = {*NO_RESULT, *OF_TABLE, *IN_COLUMNS, *(NOT_OF_SGD if self.method == "SGD" else ())}
        others = {key: value for key, value in options.items() if key not in apart}
        # Several processes normalize by slices of a batch; older runs used TF32 on GPUs and do not say it.
        others |= {key: config[key] for key in ("weights_from", "processes") if config.get(key)}
        precision = "float32" if config["device"].endswith("CPU") else "TF32"
        others["convolutions"] = config.get("float32_convolutions") or precision
        return {printable(key): printable(value) for key, value in others.items()}

    def description(self):
        train, test = self.images
        kind, epochs = "held-out" if self.holdout else "test", "epoch" if self.epochs == 1 else "epochs"
        drops = f"drop after {', '.join(map(str, self.drops))}" if self.drops else "are constant"
        images = f"{train:,} training and {test:,} {kind} images (SHA-256 {self.sha256[:12]})"
        return f"{images}, {self.epochs} {epochs}, learning rates {drops}."

    def of_paper(self):
        paper = PAPER.get(self.dataset)
        if not paper or paper.images != self.images:  # archives of another size are not that data set
            return None, {}
        curves = read_paper_curves().get((self.data, self.model.upper()), {})
        curves = {method: [p for p in points if p[0] <= self.epochs] for method, points in curves.items()}
        errors = dict(zip(COLOURS, paper.errors.get(self.model, ()), strict=False))
        same = (paper.epochs, paper.epoch_step) == (self.epochs, self.drops)
        return errors.get(self.method) if same else None, curves

    def add_epochs(self, log):
        """Takes the losses and errors of a log. What follows the last line end is being written."""
        lines = [json.loads(line.removeprefix("json_stats:")) for line in log.split("\n")[:-1]]
        self.losses = [number(line["train_loss"]) for line in lines]
        self.errors = [100 - number(line["test_acc"]) for line in lines]
        if [line["epoch"] for line in lines] != list(range(1, len(lines) + 1)) or len(lines) > self.epochs:
            raise ValueError(f"its epochs are not the first of {self.epochs}, each once")
        self.finished = len(lines) == self.epochs
        self.progress = f"unfinished, epoch {len(lines)} of {self.epochs}"


def experiment_of(path, names):
    """Below `logs`, `own-rates/CIFAR10/wrn-10-1/SGD/seed0` is of the experiment `own-rates`."""
    marks = re.compile(r"[\W_]")  # say nothing: the folder `cifar10-jpeg` is for CIFAR-10 (JPEG)
    known = {marks.sub("", name.lower()) for name in names}
    parts = [part for part in path.parts[:-1] if marks.sub("", part.lower()) not in known]
    return printable("/".join(part for part in parts if not re.fullmatch(r"seed\d+", part)))


def read_runs(roots):
    """All usable runs below `roots`, and a sentence for each that is left out."""
    runs, left_out, seen = [], [], set()
    for root in roots:
        for folder, subfolders, files in os.walk(root, followlinks=True):
            path, is_run = Path(folder), {"config.json", "log.txt"} & set(files)
            subfolders[:] = sorted(name for name in subfolders if name != "published")
            if path.resolve() in seen:
                subfolders.clear()  # or a link to a folder above would lead round and round
            elif is_run:
                file = path / "config.json"
                try:
                    run = Run(path, root, json.loads(file.read_text(encoding="utf-8")))
                    file = path / "log.txt"  # which a run that has just begun has not
                    run.add_epochs(file.read_text(encoding="utf-8") if "log.txt" in files else "")
                    runs.append(run)
                except Exception as error:  # whatever is in a file, it ends its run alone
                    reason = f"it says nothing of {error}" if isinstance(error, KeyError) else error
                    left_out.append(printable(f"{file}: {reason}"[:400]))
            seen.add(path.resolve())
    return runs, left_out


def number(value):
    """As a float. Raises ValueError for infinity and NaN, which would spoil medians and figures."""
    if not math.isfinite(value):
        raise ValueError(f"{value} is not a finite number")
    return float(value)


def printable(value):
    """As text on one line, with an escape for each control character and byte of no known encoding."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(value))


# ----------------------------------------------------------------------------------------------------- tables


class Cell:
    """Runs that differ in the seed only; `runs` and `errors` are of the finished ones.

    unusual: the options in which it differs from most cells of its method, as 'dropout 0.0, omega 0.0'.
    """

    def __init__(self, all_runs, usual):
        self.all_runs, self.any = all_runs, all_runs[0]
        self.runs = [run for run in all_runs if run.finished]
        self.errors = [run.errors[-1] for run in self.runs]
        furthest = max(all_runs, key=lambda run: len(run.losses))
        n = f", n = {len(self.runs)}"
        self.error_text = middle(self.errors, ".2f", n) if self.runs else furthest.progress
        options = {name: self.any.options.get(name, "none") for name in usual}
        self.unusual = ", ".join(f"{name} {text}" for name, text in options.items() if text != usual[name])
        self.rates = [f"{rate:g}" for rate in self.any.rates]
        self.hyperparameters = ", ".join(filter(None, [*self.rates, self.unusual]))

    def losses_at_ends(self):
        """For each phase the loss at its end of each finished run: the median of its last three epochs."""
        bounds = list(pairwise([0, *self.any.ends])) if self.runs else []
        return [[median(run.losses[start:end][-3:]) for run in self.runs] for start, end in bounds]


def middle(values, form, n=""):
    """The median and, of several values, the range."""
    spread = f" ({min(values):{form}} to {max(values):{form}}{n})" if len(values) > 1 else ""
    return f"{median(values):{form}}{spread}"


def make_tables(runs, left_out):
    """[(description, cells), ...] in the order of the output; `left_out` gets what is not counted."""
    tables = {}
    for run in sorted(runs, key=lambda run: (run.table, run.setting, not run.finished)):
        by_seed = tables.setdefault(run.table, {}).setdefault(str(run.setting), {})
        first = by_seed.setdefault(run.seed, run)
        twin = f"seed {run.seed} of the same settings is there as {first.path}"
        if first is not run or not run.finished:
            left_out.append(printable(f"{run.path}: {run.progress if first is run else twin}"))
    return [make_table([list(by_seed.values()) for by_seed in cells.values()]) for cells in tables.values()]


def make_table(cells):
    """(what all its runs share, cells) of lists of runs."""
    usual = usual_options([runs[0] for runs in cells])
    return cells[0][0].description(), [Cell(runs, usual[runs[0].method]) for runs in cells]


def usual_options(runs):
    """{method: {name: the text that most of its runs have}}; it is 'none' where they have no such option."""
    usual = {}
    for method in dict.fromkeys(run.method for run in runs):
        options = [run.options for run in runs if run.method == method]
        names = dict.fromkeys(name for each in options for name in each)
        counts = {name: Counter(each.get(name, "none") for each in options) for name in names}
        usual[method] = {name: count.most_common(1)[0][0] for name, count in counts.items()}
    return usual


def line_of(cell):
    """{head: text} of one cell; the last entries are the losses at the ends of the phases."""
    run, paper, (lr, lrg) = cell.any, cell.any.paper, [*cell.rates, ""][:2]
    difference = f"{median(cell.errors) - paper:+.2f}" if paper and cell.runs else ""
    losses = [middle(values, "#.3g") for values in cell.losses_at_ends()] or [""] * len(run.ends)
    return {
        "Network": run.model.upper(), "Experiment": run.experiment, "Method": run.method,
        "lr": lr, "lrg": lrg, "Other options": cell.unusual, "Error (%)": cell.error_text,
        "Paper": f"{paper:.2f}" if paper else "", "Diff.": difference,
    } | {f"Loss at {end}": text for end, text in zip(run.ends, losses, strict=True)}  # fmt: skip


def choice_lines(cells):
    """{head: text} for each network and method: the errors with rates and options, the best first."""
    lines = []
    for (name, method), group in groupby(cells, lambda cell: (cell.any.name, cell.any.method)):
        best = sorted((cell for cell in group if cell.runs), key=lambda cell: median(cell.errors))
        texts = "; ".join(f"{cell.error_text} at {cell.hyperparameters}" for cell in best)
        lines.append({"Network": name, "Method": method, "Held-out error (%) at lr, lrg": texts})
    return lines


def grid(lines, left="", between="  ", right="", rule=False):
    """Aligned rows of {head: text}, with a column for each head that has an entry."""
    heads = [head for head in lines[0] if any(line[head] for line in lines)]
    rows = [heads, *([line[head] for head in heads] for line in lines)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    rows[1:1] = [["-" * width for width in widths]] * rule
    return [(left + between.join(map(str.ljust, row, widths)) + right).rstrip() for row in rows]


def report(tables, left_out):
    """What the terminal shows, in 80 columns: of the losses the last one's median."""
    shown = []
    for description, cells in tables:
        shown += [f"== {cells[0].any.title} ==", *wrapped(description)]
        for name, group in groupby(cells, lambda cell: cell.any.name):
            lines = [line_of(cell) for cell in group]
            heads = "Method", "lr", "lrg", "Error (%)", "Paper", "Diff.", f"Loss at {cells[0].any.epochs}"
            texts = [{head: line[head] for head in heads} for line in lines]
            for text in texts:
                text[heads[-1]] = text[heads[-1]].split(" (")[0]
            head, *rows = grid(texts)
            shown += ["", *wrapped(name), head]
            for row, line in zip(rows, lines, strict=True):
                shown += [row, *wrapped(line["Other options"], "    ")]
        shown.append("")
    return "\n".join([*shown, *wrapped(NOTE), *not_counted(left_out), ""])


def wrapped(text, indent=""):
    return textwrap.wrap(text, 80, initial_indent=indent, subsequent_indent=indent, break_on_hyphens=False)


def not_counted(left_out):
    return ["", "Not counted:", "", *(f"- {sentence}" for sentence in left_out)] if left_out else []


def page_part(tables, left_out, plan, folder):
    """What stands between the markers of a page in `folder`, in Markdown."""
    shown = []
    for description, cells in tables:
        run, lines = cells[0].any, choice_lines(cells) if cells[0].any.holdout else map(line_of, cells)
        lines = [{head: markdown(text) for head, text in line.items()} for line in lines]
        shown += [f"### {markdown(run.title)}", "", markdown(description), ""]
        shown += [*grid(lines, "| ", " | ", " |", rule=True), ""]
        for _, path, title, _ in (figure for figure in plan if figure[0] == run.table):
            where = os.fsencode(Path(os.path.relpath(path, folder)).as_posix())
            shown += [f"![{markdown(title)}]({quote(where)})", ""]
    return "\n".join([*shown, NOTE, *map(markdown, not_counted(left_out)), ""])


def markdown(text):
    """Text that Markdown is to show as it is, in a table too."""
    return re.sub(r"[\\`*\[\]<>|&~$]", r"\\\g<0>", text)


def new_page(path, part):
    """The page with `part` between its markers. Raises ValueError where they do not stand there once each."""
    page = path.read_text(encoding="utf-8") if path.exists() else f"# Results\n\n{BEGIN}\n{END}\n"
    before, _, rest = page.partition(BEGIN)
    _, _, after = rest.partition(END)
    if [page.count(BEGIN), page.count(END), rest.count(END)] != [1, 1, 1]:
        raise ValueError(f"it needs these two lines, once each and in this order: {BEGIN} and {END}")
    return f"{before}{BEGIN}\n\n{part}\n{END}{after}"


def csv_text(tables):
    """A line for each cell, with all options, and six digits of each number."""
    file, writer = io.StringIO(newline=""), None
    for cell in (cell for _, cells in tables for cell in cells):
        run, errors, losses = cell.any, cell.errors, list(map(median, cell.losses_at_ends()))
        record = {
            "data": run.data, "sha256": run.sha256, "epochs": run.epochs, "holdout": run.holdout,
            "network": run.model, "experiment": run.experiment, "method": run.method,
            "lr": run.rates[0], "lrg": [*run.rates, None][1],
            "other_options": ", ".join(f"{name} {value}" for name, value in run.options.items()),
            "runs": len(cell.runs), "unfinished": len(cell.all_runs) - len(cell.runs),
            "test_error": median(errors) if errors else None, "min": min(errors, default=None),
            "max": max(errors, default=None), "paper": run.paper,
            "train_loss": losses[-1] if losses else None,
            "phases": " ".join(f"{loss:.6g}" for loss in losses),
        }  # fmt: skip
        for name, value in record.items():
            if isinstance(value, float):
                record[name] = f"{value:.6g}"
            elif str(value).startswith(("=", "+", "-", "@")):
                record[name] = f"'{value}"  # or a spreadsheet would take it for a formula
        if not writer:
            writer = csv.DictWriter(file, record)
            writer.writeheader()
        writer.writerow(record)
    return file.getvalue()


def write(path, make):
    """Writes the text that `make` makes, whole or not at all; a sentence ends the program if it cannot."""
    try:
        sys.path.append(str(ROOT))
        from utils import write_whole  # here, because it imports torch, and tables need none

        content = make().encode(errors="backslashreplace")
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path.resolve(), lambda file: file.write(content))
    except Exception as error:
        sys.exit(printable(f"summarize.py: cannot write {path}: {error.__cause__ or error}"))


# ---------------------------------------------------------------------------------------------------- figures


DROP = {"color": "0.5", "linewidth": 1, "linestyle": ":"}
# quantity: losses or errors, of the cells. curves: the paper's losses, behind them or alone.
Panel = namedtuple("Panel", "title quantity cells drops curves")


def panel_of(title, quantity, cells):
    """Of cells with the same data, network and schedule."""
    run = cells[0].any
    return Panel(title, quantity, cells, run.ends[:-1], run.curves if quantity == "losses" else {})


def figures_of(cells):
    """[(words of the file's name, title, panels)]: those with several methods, then each network."""
    drawn = [cell for cell in cells if not cell.any.holdout and any(run.losses for run in cell.all_runs)]
    groups = [list(group) for _, group in groupby(drawn, lambda cell: cell.any.name)]
    compared = [group for group in groups if len({cell.any.method for cell in group}) > 1]
    data, figures = cells[0].any.data, []
    if len(compared) > 1:
        panels = [panel_of(group[0].any.name, "losses", group) for group in compared]
        figures.append((f"{data} training loss", f"Training loss on {data}", panels))
    for group in groups:
        run = group[0].any
        panels = [panel_of("Training loss", "losses", group), panel_of("Test error (%)", "errors", group)]
        figures.append((f"{run.experiment} {data} {run.model}", f"{run.name} on {data}", panels))
    return figures


def figure_of_the_paper():
    drops = {LABELS.get(name, name): paper.epoch_step for name, paper in PAPER.items()}
    curves = read_paper_curves().items()
    panels = [Panel(f"{network} on {data}", "losses", (), drops[data], of) for (data, network), of in curves]
    return "paper curves", "The paper's training cross-entropy, read off the authors' poster", panels


def plan_figures(tables, target):
    """[(table, path, title, panels)]: in the folder `target`, or one figure in the file of that name."""
    figures = [(cells[0].any.table, *figure) for _, cells in tables for figure in figures_of(cells)]
    if target.suffix and not target.is_dir():
        if len(figures) != 1:
            sys.exit(
                f"summarize.py: {target} is one file for {len(figures)} figures: give --plots a directory"
            )
        return [(table, target, title, panels) for table, _, title, panels in figures]
    plan, names = [], Counter()
    for table, words, title, panels in [*figures, (None, *figure_of_the_paper())]:
        stem = re.sub(r"[^a-z0-9]+", "-", words.lower())[:100].strip("-")
        names[stem] += 1
        number = f"-{names[stem]}" if names[stem] > 1 else ""
        plan.append((table, target / f"{stem}{number}.png", title, panels))
    return plan


def draw(path, title, panels):
    """Draws one figure; panels that do not show errors have the same axes."""
    os.environ["MPLBACKEND"] = "Agg"  # whatever a notebook or a matplotlibrc chose
    import matplotlib  # here, because it takes a second, and tables need none
    from matplotlib import pyplot

    matplotlib.rcdefaults()
    matplotlib.rcParams |= {"text.parse_math": False, "legend.frameon": False, "legend.fontsize": "small"}
    shared, across = panels[-1].quantity != "errors", min(3, len(panels))
    down = -(-len(panels) // across)
    figure, axes = pyplot.subplots(
        down, across, sharex=shared, sharey=shared, squeeze=False, layout="constrained",
        figsize=(4.5 * across, 0.6 + 3.6 * down),
    )  # fmt: skip
    for axis, panel in zip_longest(axes.flat, panels):
        draw_panel(axis, panel) if panel else axis.set_visible(False)
    figure.suptitle(title)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def draw_panel(axis, panel):
    """All cells, and behind losses the paper's curves; or these alone."""
    from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter

    for method, color in COLOURS.items():
        cells = [cell for cell in panel.cells if cell.any.method == method]
        for index, cell in enumerate(cells):
            name = f"{method} {cell.hyperparameters}" if len(cells) > 1 else method
            draw_cell(axis, cell, panel.quantity, name, color=color, alpha=1 - 0.8 * index / len(cells))
        if method in panel.curves and not panel.cells:
            axis.plot(*zip(*panel.curves[method], strict=True), color=color, label=method)
        elif method in panel.curves and cells:
            style = {"color": color, "linestyle": (0, (4, 2)), "linewidth": 1, "zorder": 1.5}
            axis.plot(*zip(*panel.curves[method], strict=True), label=f"{method}, the paper's", **style)
    axis.set(title=panel.title, xlabel="Epoch")
    axis.grid(alpha=0.25)
    axis.spines[["top", "right"]].set_visible(False)
    axis.tick_params(labelbottom=True, labelleft=True)
    axis.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axis.plot([], [], label="learning rates drop", **DROP)
    for drop in panel.drops:
        axis.axvline(drop, **DROP)
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
        marker = "o" if len(values) == 1 else None  # one epoch makes no line
        thin = {"linewidth": 0.8, "alpha": 0.6 * alpha}
        axis.plot(range(1, len(values) + 1), values, marker=marker, color=color, **thin)
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
        print(f"summarize.py: left out {sentence}", file=sys.stderr)
    if not runs:
        places = printable(", ".join(map(str, options.directories)))
        sys.exit(f"No usable run (a directory with config.json and log.txt) below {places}: train one first.")
    tables = make_tables(runs, left_out)
    print(report(tables, left_out), end="")
    plan = plan_figures(tables, options.plots) if options.plots else []
    if options.csv:
        write(options.csv, lambda: csv_text(tables))
    if options.markdown:
        part = page_part(tables, left_out, plan, options.markdown.parent)
        write(options.markdown, lambda: new_page(options.markdown, part))
    for _, path, title, panels in plan:
        try:
            draw(path, title, panels)
        except Exception as error:
            sys.exit(printable(f"summarize.py: cannot draw {path}: {error}"))
    if plan:
        print("\nFigures:", *(printable(path) for _, path, *_ in plan))


if __name__ == "__main__":
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # a reader that leaves, as `head` does, is no error
    main()
