"""Tables and figures from run directories: medians over seeds, with the paper's numbers beside them.

    python scripts/summarize.py logs/table1 [more directories] [--markdown FILE] [--csv FILE]
                                [--plots DIR_OR_FILE] [--x epoch|time]

A run is a directory with `config.json` and `log.txt`. Its result is the last epoch's test error, never the best
epoch's. Runs that differ in nothing but the seed (and in what cannot change a result, such as the number of
workers) make one cell; a run that has not finished is shown, but counts in no median. Runs may still be writing.
Runs with --holdout serve to choose hyperparameters: a table of their own says how each method did with each set,
without a figure.
"""

import argparse
import csv
import json
import os
import re
import sys
from collections import defaultdict
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path
from statistics import median
from typing import NamedTuple
from urllib.parse import quote

METHODS = {"SGD": "SGD", "SGDG": "SGD-G", "AdamG": "Adam-G"}
COLOURS = {"SGD": "#000000", "SGDG": "#0072B2", "AdamG": "#D55E00"}  # Okabe and Ito: safe for colour-blind eyes
DROP = "0.5"  # grey


class Paper(NamedTuple):
    """One data set of the paper's tables: test error in %, median of five runs, for SGD, SGD-G and Adam-G."""

    epochs: int
    epoch_step: list
    images: tuple  # training, test
    errors: dict


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

# Options by their part in a table, beside data set, SHA-256, and the precision of float32 convolutions (TF32 on many
# GPUs). Those of NO_RESULT change no result; those of SECTION must agree within a section of the output; those of CELL
# belong to a method and may differ along a row. All others, also those added to main.py in the future, must agree along
# a row. Within a cell all of them agree.
NO_RESULT = ("seed", "device", "nthread", "dataroot", "dataset_name", "compile")
SECTION = ("dataset", "holdout", "dtype", "epochs", "epoch_step", "lr_decay_ratio", "batch_size")
CELL = ("optim_method", "lr", "lrg", "momentum", "weight_decay", "bn_decay", "omega", "grad_clip", "select")
NOT_OF_SGD = ("lrg", "omega", "grad_clip", "select")


@dataclass
class Run:
    path: Path
    experiment: str  # the folders above the run that name no data set, network, method or seed
    config: dict
    epochs: list  # the records of log.txt, in order

    @property
    def options(self):
        return self.config["options"]

    @property
    def finished(self):
        return len(self.epochs) >= self.options["epochs"]

    @property
    def progress(self):
        return f"{len(self.epochs)} of {self.options['epochs']} epochs"

    @property
    def test_error(self):
        return 100 - self.epochs[-1]["test_acc"]


@dataclass
class Cell:
    """Runs that differ in the seed only."""

    runs: list = field(default_factory=list)
    unfinished: list = field(default_factory=list)

    @property
    def any_run(self):
        return (self.runs + self.unfinished)[0]

    @property
    def options(self):
        return self.any_run.options

    @property
    def test_errors(self):
        return [run.test_error for run in self.runs]

    @property
    def train_loss(self):
        return median(run.epochs[-1]["train_loss"] for run in self.runs)

    @property
    def images_per_sec(self):
        return median(median(epoch["images_per_sec"] for epoch in run.epochs) for run in self.runs)

    @property
    def difference(self):
        """Ours minus the paper's, or None where they cannot be compared, as after another number of epochs."""
        paper = paper_error(self.any_run, self.any_run.config["model"], self.options["optim_method"])
        comparable = self.runs and paper is not None and follows_paper(self.any_run)
        return median(self.test_errors) - paper if comparable else None


@dataclass
class Row:
    """One network in one experiment: a cell for each method, as in the paper's tables."""

    model: str
    experiment: str = ""
    cells: dict = field(default_factory=dict)  # method: Cell
    number: int = 1  # counts the rows of one network and experiment, that is, sets of rates
    figure: Path | None = None

    @property
    def label(self):
        return self.model.upper() + (f" #{self.number}" if self.number > 1 else "")

    @property
    def any_run(self):
        return next(iter(self.cells.values())).any_run

    @property
    def started(self):
        return any(run.epochs for cell in self.cells.values() for run in cell.runs + cell.unfinished)

    @property
    def held_out(self):
        """Whether the test pictures are a held-out part of the training pictures."""
        return bool(self.any_run.options["holdout"])

    def best(self):
        """The best methods; none where only one ran."""
        return best(self.cells)


def best(cells):
    """The names of those with the lowest median, to the two decimals that are shown; none where only one ran."""
    medians = {name: round(median(cell.test_errors), 2) for name, cell in cells.items() if cell.runs}
    lowest = min(medians.values(), default=None)
    return {name for name, value in medians.items() if value == lowest and len(medians) > 1}


def paper_of(run):
    """The paper's entry for a run's data set, or None; archives of another size are not that data set."""
    paper, data = PAPER.get(run.options["dataset"]), run.config["data"]
    return paper if paper and paper.images == (data["train_images"], data["test_images"]) else None


def paper_error(run, model, method):
    """The paper's test error in % on a run's data set, or None where it is not in the paper's tables."""
    paper = paper_of(run)
    errors = paper and paper.errors.get(model)
    return errors and errors[list(METHODS).index(method)]


def follows_paper(run):
    """True if a run has the paper's number of epochs and its learning-rate drops."""
    paper = paper_of(run)
    return bool(paper) and (run.options["epochs"], run.options["epoch_step"]) == (paper.epochs, paper.epoch_step)


# Reading


def require(mapping, names):
    missing = [name for name in names if name not in mapping]
    if missing:
        raise ValueError(f"it has no {', '.join(missing)}")


def read_log(path):
    """The epochs of a log in order. What follows the last line end is still being written, and is left alone."""
    records, numbers = {}, ("epoch", "train_loss", "test_acc", "train_time", "test_time", "images_per_sec")
    if not path.exists():  # the run has just begun
        return []
    for line in path.read_text(encoding="utf-8", errors="replace").split("\n")[:-1]:
        if line.startswith("json_stats:"):
            record = json.loads(line.removeprefix("json_stats:"))
            require(record, numbers)
            if not all(isinstance(record[name], (int, float)) for name in numbers):
                raise ValueError("not all of its figures are numbers")
            records[record["epoch"]] = record
    return [records[epoch] for epoch in sorted(records)]


def read_run(path, root):
    """The run in directory `path`, found below `root`. Raises an error of UNUSABLE if it is that."""
    config = json.loads((path / "config.json").read_text(encoding="utf-8"))
    require(config, ("options", "data", "model", "device"))
    options = config["options"]
    options.setdefault("holdout", 0)  # older runs could not hold anything out, nor select by measurement
    options.setdefault("select", None if options.get("optim_method") == "SGD" else "shape")
    require(options, (*SECTION, *CELL, "seed"))
    require(config["data"], ("name", "sha256", "train_images", "test_images"))
    if options["optim_method"] not in METHODS:
        raise ValueError(f"its method {options['optim_method']} is not one of {', '.join(METHODS)}")
    return Run(path, experiment_of(path, root, config), config, read_log(path / "log.txt"))


def experiment_of(path, root, config):
    """Below `logs`, `own-rates/CIFAR10/wrn-10-1/SGD/seed0` is of the experiment `own-rates`."""
    options = config["options"]
    names = (options["dataset"], config["data"]["name"], config["model"], options.get("model"), options["optim_method"])
    known = {letters(str(name)) for name in filter(None, names)}
    parts = path.relative_to(root).parts[:-1]  # the last one is the run's own name, whatever it says
    return "/".join(part for part in parts if letters(part) not in known)


def letters(name):
    """What data sets and networks are told apart by: the folder `cifar10-jpeg` is for CIFAR-10 (JPEG)."""
    return re.sub(r"[\W_]", "", name.lower())


UNUSABLE = ValueError, TypeError, AttributeError, OSError  # the first is json's too; a type is wrong; no such file


def read_runs(roots):
    """All runs below `roots`, and a sentence for each that is left out."""
    runs, left_out, seen = [], [], set()
    for root in roots:
        for folder, subfolders, files in os.walk(root, followlinks=True):
            path = Path(folder)
            if path.resolve() in seen:
                subfolders.clear()  # or a link to a folder above would lead round and round
                continue
            seen.add(path.resolve())
            subfolders.sort()
            if not {"config.json", "log.txt"} & set(files):
                continue
            try:
                runs.append(read_run(path, root))
            except UNUSABLE as error:
                left_out.append(f"{path}: its config.json or log.txt cannot be used ({error})")
    return runs, left_out


# Runs to cells, cells to rows, rows to sections


def section_key(run):
    data = run.config["data"]
    return data["name"], data["sha256"], convolutions(run), json.dumps([run.options[name] for name in SECTION])


def convolutions(run):
    """The precision of float32 convolutions. Runs that do not say it are older; their GPUs used TF32 if they had it."""
    on_cpu = run.config["device"].endswith("CPU")
    return run.config.get("float32_convolutions") or ("float32" if on_cpu else "TF32")


def row_key(run):
    shared = {k: v for k, v in run.options.items() if k not in NO_RESULT and k not in CELL and k not in SECTION}
    return natural(run.config["model"]), run.experiment, json.dumps(shared, sort_keys=True)


def cell_key(run):
    return list(METHODS).index(run.options["optim_method"]), json.dumps([run.options[name] for name in CELL])


def natural(text):
    """A key that sorts wrn-10-1 before wrn-28-10 and both before wrn-100-1."""
    return tuple(int(part) if part.isdigit() else part for part in re.split(r"(\d+)", text))


def make_cells(runs, left_out):
    """{(section key, row key, cell key): Cell} in the order of the output. A seed counts once in a cell."""
    cells = defaultdict(Cell)
    keyed = [((section_key(run), row_key(run), cell_key(run)), run) for run in runs]
    for key, run in sorted(keyed, key=lambda pair: (pair[0], not pair[1].finished)):
        cell = cells[key]
        twin = next((r for r in cell.runs + cell.unfinished if r.options["seed"] == run.options["seed"]), None)
        if twin:
            left_out.append(f"{run.path}: seed {run.options['seed']} of the same settings is there as {twin.path}")
        else:
            (cell.runs if run.finished else cell.unfinished).append(run)
    return cells


def make_sections(runs, left_out):
    """Lists of rows. A method that ran with several rates in one experiment fills a row for each of them."""
    sections, keys = defaultdict(list), defaultdict(list)
    for (section, row, _), cell in make_cells(runs, left_out).items():
        method = cell.options["optim_method"]
        for known, candidate in zip(keys[section], sections[section], strict=True):
            if known == row and method not in candidate.cells:
                candidate.cells[method] = cell
                break
        else:
            model, experiment = cell.any_run.config["model"], cell.any_run.experiment
            number = 1 + sum((r.model, r.experiment) == (model, experiment) for r in sections[section])
            keys[section].append(row)
            sections[section].append(Row(model, experiment, {method: cell}, number))
    return sorted(sections.values(), key=lambda rows: rows[0].held_out)  # results first


# What is known of a cell, and its text


def summary(row, cell, section):
    """The numbers of one cell under the names of the CSV file's columns; None where there is none."""
    run, errors = cell.any_run, cell.test_errors
    return {
        "data": run.config["data"]["name"],
        "sha256": run.config["data"]["sha256"],
        "dtype": run.options["dtype"],
        "float32_convolutions": convolutions(run),
        "epochs": run.options["epochs"],
        "network": row.model,
        "experiment": row.experiment,
        "method": METHODS[run.options["optim_method"]],
        "lr": run.options["lr"],
        "lrg": run.options["lrg"],
        "other_options": other_options(cell, section),
        "runs": len(cell.runs),
        "unfinished": len(cell.unfinished),
        "holdout": run.options["holdout"],
        "test_error": median(errors) if errors else None,
        "min": min(errors, default=None),
        "max": max(errors, default=None),
        "paper": paper_error(run, row.model, run.options["optim_method"]),
        "difference": cell.difference,
        "train_loss": cell.train_loss if errors else None,
        "images_per_sec": cell.images_per_sec if errors else None,
    }


def other_options(cell, section):
    """The options besides the rates that are not the same for all runs of this network, as 'dropout 0.0'.

    Those that belong to a method are compared among the runs of that method.
    """
    mine, model = cell.options, cell.any_run.config["model"]
    cells = [other for row in section for other in row.cells.values()]
    alike = [other.options for other in cells if other.any_run.config["model"] == model]
    same_method = [options for options in alike if options["optim_method"] == mine["optim_method"]]
    names = [name for name in mine if name not in NO_RESULT and name not in ("optim_method", "lr", "lrg")]
    differing = [n for n in names if any(o.get(n) != mine[n] for o in (same_method if n in CELL else alike))]
    return ", ".join(f"{name} {mine[name]}" for name in differing)


def data_label(run):
    name = run.config["data"]["name"]
    return {"CIFAR10": "CIFAR-10", "CIFAR100": "CIFAR-100"}.get(name, name)


def text(value, form=""):
    return "" if value is None else format(value, form)


def bold(words, yes):
    return f"**{words}**" if yes else words


def unfinished_text(cell):
    return f"unfinished ({max(cell.unfinished, key=lambda run: len(run.epochs)).progress})"


def details(section):
    """A Markdown table with a line for each cell, and the best method of a row in bold."""
    header = ["Network", "Experiment", "Method", "lr", "lrg", "Other options", "Runs", "Test error (%)", "Min", "Max"]
    header += ["Paper (%)", "Difference", "Training loss", "Images/s"]
    lines = []
    for row in section:
        for method, cell in sorted(row.cells.items(), key=lambda item: list(METHODS).index(item[0])):
            s = summary(row, cell, section)
            line = [row.label, *common_columns(s, cell, method in row.best())]
            line += [text(s["paper"], ".2f"), text(s["difference"], "+.2f")]
            lines.append([*line, text(s["train_loss"], ".4f"), text(s["images_per_sec"], ",.0f")])
    return markdown_table(header, lines)


def search(section):
    """What `details` is for results, for hyperparameters: method by method, with its best set in bold."""
    header = ["Network", "Experiment", "Method", "lr", "lrg", "Other options", "Runs"]
    header += ["Held-out error (%)", "Min", "Max", "Training loss"]
    sets = defaultdict(dict)
    for number, row in enumerate(section):
        for method, cell in row.cells.items():
            sets[natural(row.model), row.experiment, list(METHODS).index(method)][number] = cell
    lines = []
    for _, cells in sorted(sets.items()):
        for number, cell in cells.items():
            row = section[number]
            s = summary(row, cell, section)
            line = [row.model.upper(), *common_columns(s, cell, number in best(cells))]
            lines.append([*line, text(s["train_loss"], ".4f")])
    return markdown_table(header, lines)


def common_columns(s, cell, is_best):
    """From the experiment to the error and its range."""
    error = bold(text(s["test_error"], ".2f"), is_best) if cell.runs else unfinished_text(cell)
    runs = f"{s['runs']}" + (f" (+{s['unfinished']} unfinished)" if cell.unfinished else "")
    spread = [text(s[name], ".2f") if s["runs"] > 1 else "" for name in ("min", "max")]
    return [s["experiment"], s["method"], text(s["lr"]), text(s["lrg"]), s["other_options"], runs, error, *spread]


def overview(section):
    """The paper's kind of table, in Markdown: a row for each network, a column for each method."""
    run, lines = section[0].any_run, []
    for row in section + absent_networks(section):
        cells = []
        for method in METHODS:
            paper = paper_error(run, row.model, method)
            beside = f"; paper {paper:.2f}" if paper is not None else ""
            cells.append(overview_text(row.cells.get(method), method in row.best()) + beside)
        lines.append([row.label, row.experiment, *cells])
    return markdown_table(["Test error (%)", "Experiment", *METHODS.values()], lines)


def is_small(section):
    """One row of single runs, of all methods: the details say it all."""
    return len(section) == 1 and [len(cell.runs) for cell in section[0].cells.values()] == [1] * len(METHODS)


def overview_text(cell, best):
    if cell is None:
        return "missing"
    errors = cell.test_errors
    if not errors:
        return unfinished_text(cell)
    words = bold(f"{median(errors):.2f}", best)
    return words + (f" ({min(errors):.2f} to {max(errors):.2f}, n = {len(errors)})" if len(errors) > 1 else "")


def absent_networks(section):
    """A row for each of the paper's networks without a run, where another of them has one."""
    paper, present = paper_of(section[0].any_run), {row.model for row in section}
    names = paper.errors if paper and present & paper.errors.keys() else ()
    return [Row(name) for name in names if name not in present]


def markdown_table(header, lines):
    """A column without any entry is left out."""
    kept = [i for i in range(len(header)) if any(line[i] for line in lines)]
    table = [[line[i] for i in kept] for line in (header, *lines)]
    widths = [max(len(line[i]) for line in table) for i in range(len(kept))]
    table.insert(1, ["-" * width for width in widths])
    return ["| " + " | ".join(map(str.ljust, line, widths)) + " |" for line in table]


def describe(section):
    """What all runs of a section share, and the devices, versions and commits they ran with."""
    run = section[0].any_run
    options, data = run.options, run.config["data"]
    runs = [r for row in section for cell in row.cells.values() for r in cell.runs + cell.unfinished]
    precision = options["dtype"]
    if precision == "float32" and convolutions(run) != precision:
        precision += f" ({convolutions(run)} in convolutions)"
    drops = ", ".join(map(str, options["epoch_step"]))
    tested = "held-out" if options["holdout"] else "test"
    numbers = f"{data['train_images']:,} training and {data['test_images']:,} {tested} pictures"
    parts = [
        f"{numbers} (SHA-256 {data['sha256'][:12]})",
        f"{precision}, batches of {options['batch_size']}, {options['epochs']} epochs",
        f"learning rates x{options['lr_decay_ratio']:g} after {drops}" if drops else "constant learning rates",
        shared_options(runs),
        listed("device", (r.config["device"] for r in runs)),
        listed("torch", (r.config.get("torch") for r in runs)),
        listed("commit", (c[:7] + c[40:] for c in (r.config.get("git_commit") or "" for r in runs))),  # 40: "-dirty"
    ]
    paper = paper_of(run)
    if paper and not follows_paper(run):
        parts.append(f"the paper trained {paper.epochs} epochs, so its numbers are no measure of these")
    return "; ".join(filter(None, parts)) + "."


def shared_options(runs):
    """The options besides the rates that all runs of a section share, or all of a method: 'omega 0.1 (Adam-G)'."""
    parts, known = [], (*NO_RESULT, *SECTION, "optim_method", "model", "depth", "width", "lr", "lrg")
    for name in (name for name in runs[0].options if name not in known):
        values = defaultdict(set)  # those of each method that has such an option
        for run in runs:
            method = run.options["optim_method"]
            if method != "SGD" or name not in NOT_OF_SGD:
                values[method].add(str(run.options.get(name)))
        single = {METHODS[method]: min(found) for method, found in values.items() if len(found) == 1}
        for value in dict.fromkeys(single.values()):
            methods = [method for method in METHODS.values() if single.get(method) == value]
            parts.append(f"{name} {value}" + (f" ({', '.join(methods)})" if len(methods) < len(values) else ""))
    return ", ".join(parts)


def listed(name, values):
    values = sorted(set(filter(None, values)))
    return f"{name}: {', '.join(values)}" if values else ""


def report(sections, left_out, figures_from):
    """The whole output in Markdown; figures are linked relative to the folder `figures_from`, if it is given."""
    lines = ["# Results", "", "Made by `scripts/summarize.py` from the logs of the runs.", ""] if figures_from else []
    for section in sections:
        what = ", choice of hyperparameters" if section[0].held_out else ""
        lines += [f"### {data_label(section[0].any_run)}{what}", "", describe(section), ""]
        if section[0].held_out:
            lines += [*search(section), ""]
        else:
            lines += [*([] if is_small(section) else [*overview(section), ""]), *details(section), ""]
        for row in section:
            if row.figure and figures_from:
                where = quote(Path(os.path.relpath(row.figure, figures_from)).as_posix())
                lines += [f"![{title(row)}]({where})", ""]
    cells = [cell for section in sections for row in section for cell in row.cells.values()]
    unfinished = [f"{run.path}: unfinished, {run.progress}" for cell in cells for run in cell.unfinished]
    if unfinished or left_out:
        lines += ["Not counted:", "", *(f"- {reason}" for reason in unfinished + left_out), ""]
    lines += ["The test error is the last epoch's; test error, training loss and images/s are medians over the runs."]
    lines += ["A difference to the paper stands where epochs and drops are the paper's, whatever the other options."]
    lines += ["Images/s is what the machine gave with whatever ran beside. An experiment is the folder of its runs."]
    return "\n".join(lines) + "\n"


def write_csv(path, sections):
    records = [summary(row, c, section) for section in sections for row in section for c in row.cells.values()]
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(records[0]))
        writer.writeheader()
        writer.writerows([{k: round(v, 6) if isinstance(v, float) else v for k, v in r.items()} for r in records])


# Figures


def title(row):
    name = f"{row.label} on {data_label(row.any_run)}"
    return f"{name} ({row.experiment})" if row.experiment else name


def curve(runs, quantity):
    """The median over runs after each epoch, up to where the shortest of them is."""
    return [median(values) for values in zip(*(quantity(run) for run in runs), strict=False)]


def minutes(run):
    return [seconds / 60 for seconds in accumulate(e["train_time"] + e["test_time"] for e in run.epochs)]


QUANTITIES = {
    "epoch": lambda run: list(range(1, len(run.epochs) + 1)),
    "time": minutes,
    "Training loss": lambda run: [epoch["train_loss"] for epoch in run.epochs],
    "Test error (%)": lambda run: [100 - epoch["test_acc"] for epoch in run.epochs],
}


def draw(row, path, x):
    """The paper's kind of figure: all seeds thin, the median of the finished ones thick, the drops dotted."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter

    figure, panels = plt.subplots(1, 2, figsize=(9, 4), layout="constrained")
    for panel, quantity in zip(panels, ("Training loss", "Test error (%)"), strict=True):
        for method in METHODS:
            if method in row.cells:
                draw_cell(panel, row.cells[method], x, quantity)
        panel.set(title=quantity, xlabel={"epoch": "Epoch", "time": "Minutes"}[x])
        panel.grid(alpha=0.25)
        panel.spines[["top", "right"]].set_visible(False)
    panels[0].set_yscale("log")
    low, high = panels[0].get_ylim()
    # 1, 2 and 5 of each decade, or round numbers where the range is too short to hold enough of them.
    panels[0].yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)) if high > 8 * low else MaxNLocator(5))
    panels[0].yaxis.set_major_formatter("{x:g}")
    panels[0].yaxis.set_minor_formatter(NullFormatter())  # or a short range would be labelled 6 x 10^-1
    panels[0].plot([], [], color=DROP, linestyle=":", label="learning rates drop")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False)
    limit_errors(panels[1], row)
    figure.suptitle(title(row))
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def marker(run):
    """A single epoch makes no line."""
    return "o" if len(run.epochs) == 1 else None


def draw_cell(panel, cell, x, quantity):
    method = cell.options["optim_method"]
    colour, name = COLOURS[method], METHODS[method]
    horizontal, vertical = QUANTITIES[x], QUANTITIES[quantity]
    runs = [run for run in cell.runs + cell.unfinished if run.epochs]
    for run in runs:
        panel.plot(horizontal(run), vertical(run), color=colour, linewidth=0.8, alpha=0.6, marker=marker(run))
    if cell.runs:
        steps = curve(cell.runs, horizontal)
        name += f" (median of {len(cell.runs)})" if len(cell.runs) > 1 else ""
        panel.plot(steps, curve(cell.runs, vertical), color=colour, linewidth=2, label=name)
    elif runs:
        steps = max(map(horizontal, runs), key=len)
        panel.plot([], [], color=colour, linewidth=0.7, label=f"{name} (unfinished)")
    else:
        return
    for drop in cell.options["epoch_step"]:
        if drop <= len(steps):  # after so many epochs; against time, every method has its own moment
            panel.axvline(steps[drop - 1], color=DROP if x == "epoch" else colour, linewidth=1, linestyle=":", zorder=1)


def limit_errors(panel, row):
    """Cuts off the first epochs' errors, and what is far below the lowest: the last ones should be told apart."""
    runs = [run for cell in row.cells.values() for run in cell.runs + cell.unfinished]
    later = [e for run in runs for e in QUANTITIES["Test error (%)"](run)[len(run.epochs) // 5 :]]
    low, high = min(later, default=0), max(later, default=100)
    panel.set_ylim(0.9 * low if low > high / 4 else 0, 1.1 * high or 1)


def draw_all(sections, target, x):
    """A figure for each row. `target` is a folder, or the one figure's file if it has a suffix."""
    rows = [row for section in sections for row in section if row.started and not row.held_out]
    is_file = target.suffix and not target.is_dir()
    if is_file and len(rows) > 1:
        raise ValueError(f"There are {len(rows)} figures to draw: give --plots a directory instead of {target}.")
    names = set()
    for row in rows:
        words = [row.experiment, row.any_run.config["data"]["name"], row.model, *(["time"] if x == "time" else [])]
        stem = name = re.sub(r"[^a-z0-9]+", "-", " ".join(words).lower()).strip("-")
        while name in names:  # another section or row of the same data set and network
            name = f"{stem}-{1 + sum(other.startswith(stem) for other in names)}"
        names.add(name)
        row.figure = target if is_file else target / f"{name}.png"
        draw(row, row.figure, x)


def parse_arguments(arguments):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("directories", nargs="+", type=Path, metavar="DIR", help="where to look for runs")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write the tables there, with the figures")
    parser.add_argument("--csv", type=Path, metavar="FILE", help="write one line per cell that has runs there")
    parser.add_argument("--plots", type=Path, metavar="DIR_OR_FILE", help="draw a figure per network and data set")
    parser.add_argument("--x", choices=("epoch", "time"), default="epoch", help="the figures' axis (default: epoch)")
    options = parser.parse_args(arguments)
    for directory in options.directories:
        if not directory.is_dir():
            parser.error(f"{directory} is not a directory: name one that holds runs.")
    return options


def main(arguments=None):
    options = parse_arguments(arguments)
    runs, left_out = read_runs(options.directories)
    if not runs:
        places = ", ".join(map(str, options.directories))
        reasons = "".join(f" {reason};" for reason in left_out)
        sys.exit(f"No usable run (a directory with config.json and log.txt) below {places}:{reasons} train one first.")
    sections = make_sections(runs, left_out)
    try:
        if options.plots:
            draw_all(sections, options.plots, options.x)
        print(report(sections, left_out, None), end="")
        if options.markdown:
            options.markdown.parent.mkdir(parents=True, exist_ok=True)
            options.markdown.write_text(report(sections, left_out, options.markdown.parent), encoding="utf-8")
        if options.csv:
            options.csv.parent.mkdir(parents=True, exist_ok=True)
            write_csv(options.csv, sections)
    except BrokenPipeError:
        raise
    except (ValueError, OSError) as error:
        sys.exit(str(error))
    if options.plots:
        print("\nFigures:", *(row.figure for section in sections for row in section if row.figure))


if __name__ == "__main__":
    try:
        main()
    except BrokenPipeError:  # whoever read the output has left, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
