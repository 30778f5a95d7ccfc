"""Tables and figures from run directories: medians over seeds, with the paper's numbers beside them.

    python scripts/summarize.py logs/table1 [more directories] [--markdown FILE] [--csv FILE]
                                [--plots DIR_OR_FILE] [--x epoch|time]

A run is a directory with `config.json` and `log.txt`. Its result is the last epoch's test error, never the
best epoch's. Runs that differ in nothing but the seed (and in what cannot change a result, such as the number
of workers) make one cell; a run that has not finished is shown, but counts in no median. Runs may still be
writing. Runs with --holdout serve to choose hyperparameters: a table of their own says how each method did
with each set, without a figure. Of the others, tables say how the training loss fell from one drop of the
learning rates to the next, which is what the paper's claims are about; a figure compares it in the rows that
have the most methods.

In this file: the paper's numbers, groups of runs, grouping, comparing, tables, the program. Runs are read by
`runs.py`, figures drawn by `figures.py`.
"""

import argparse
import csv
import json
import os
import re
import sys
from dataclasses import dataclass, field
from functools import cache
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import NamedTuple
from urllib.parse import quote

from runs import METHODS, read_runs

NAMES = list(METHODS.values())


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
LABELS = {"CIFAR10": "CIFAR-10", "CIFAR100": "CIFAR-100"}  # of data sets that have another name in options
PAPER_CURVES = Path(__file__).parents[1] / "docs/paper_curves.csv"

# Options by their part in a table, beside data set, SHA-256, and the precision of float32 convolutions (TF32
# on many GPUs). Those of NO_RESULT change no result; those of SECTION must agree within a section of the
# output; those of CELL belong to a method and may differ along a row. All others, also those added to main.py
# in the future, must agree along a row. Within a cell all of them agree.
NO_RESULT = ("seed", "device", "nthread", "dataroot", "dataset_name", "compile")
SECTION = ("dataset", "holdout", "dtype", "epochs", "epoch_step", "lr_decay_ratio", "batch_size")
CELL = ("optim_method", "lr", "lrg", "momentum", "weight_decay", "bn_decay", "omega", "grad_clip", "select")
NOT_OF_SGD = ("lrg", "omega", "grad_clip", "select")
IN_COLUMNS = ("optim_method", "model", "depth", "width", "lr", "lrg")  # a table has columns for them

BEGIN, END = (f"<!-- made by scripts/summarize.py: {word} -->" for word in ("begin", "end"))


# Groups of runs from small to large: cell, row, section


@dataclass
class Cell:
    """Runs that differ in the seed only."""

    runs: list = field(default_factory=list)  # the finished ones
    unfinished: list = field(default_factory=list)

    @property
    def all_runs(self):
        return self.runs + self.unfinished

    @property
    def any_run(self):
        return self.all_runs[0]

    @property
    def test_errors(self):
        return [run.test_error for run in self.runs]

    @property
    def train_loss(self):
        return median(run.epochs[-1]["train_loss"] for run in self.runs)

    def phases(self, ends):
        """A list of PhaseLoss for each finished run, one for each phase."""
        return [phase_losses(list(enumerate(run.losses, 1)), ends) for run in self.runs]

    @property
    def images_per_sec(self):
        speeds = [[epoch["images_per_sec"] for epoch in run.epochs] for run in self.runs]
        return median(median(of_run) for of_run in speeds)


@dataclass
class Row:
    """One network in one experiment: a cell for each method, as in the paper's tables."""

    key: tuple  # what its runs have in common
    model: str
    experiment: str
    number: int  # counts the rows of one network and experiment, that is, sets of rates
    cells: dict = field(default_factory=dict)  # by the method's name
    figure: Path | None = None

    @property
    def runs(self):
        return [run for cell in self.cells.values() for run in cell.all_runs]

    @property
    def any_run(self):
        return self.runs[0]

    @property
    def label(self):
        return self.model.upper() + (f" #{self.number}" if self.number > 1 else "")

    @property
    def title(self):
        return self.titled(f"{self.label} on {data_label(self.any_run)}")

    def titled(self, name):
        return one_line(f"{name} ({self.experiment})" if self.experiment else name)

    @property
    def paper_curves(self):
        """{method: its curve in the paper} where data set and network are the paper's, otherwise {}."""
        dataset = self.any_run.options["dataset"]
        data = LABELS.get(dataset, dataset) if paper_of(self.any_run) else None
        return read_paper_curves().get((data, self.model.upper()), {})


@dataclass
class Section:
    """Rows with the same data, precision and schedule: what one table may compare."""

    rows: list
    figure: Path | None = None

    @property
    def any_run(self):
        return self.rows[0].any_run

    @property
    def held_out(self):
        """Whether the test pictures are a held-out part of the training pictures."""
        return bool(self.any_run.options["holdout"])

    @property
    def runs(self):
        return [run for row in self.rows for run in row.runs]

    @property
    def title(self):
        return one_line(f"Training loss on {data_label(self.any_run)}")

    @property
    def phase_ends(self):
        """The last epoch at each value of the learning rates: before each drop, and of the run."""
        options = self.any_run.options
        return [*(drop for drop in options["epoch_step"] if drop < options["epochs"]), options["epochs"]]

    @property
    def has_reached_a_drop(self):
        first = self.phase_ends[0]
        return first < self.any_run.options["epochs"] and any(len(run.epochs) > first for run in self.runs)


# Grouping: runs to cells, cells to rows, rows to sections


def section_key(run):
    data = run.config["data"]
    options = json.dumps([run.options[name] for name in SECTION])
    return data["name"], data["sha256"], convolutions(run), options


def row_key(run):
    apart = (*NO_RESULT, *CELL, *SECTION)
    shared = {name: value for name, value in run.options.items() if name not in apart}
    shared |= {name: run.config.get(name) for name in ("weights_from", "processes")}
    return natural(run.model), run.experiment, json.dumps(shared, sort_keys=True)


def cell_key(run):
    return NAMES.index(run.method), json.dumps([run.options[name] for name in CELL])


def convolutions(run):
    """The precision of float32 convolutions. Runs that do not say it are older, and used TF32 on GPUs."""
    on_cpu = run.config["device"].endswith("CPU")
    return run.config.get("float32_convolutions") or ("float32" if on_cpu else "TF32")


def processes(run):
    """Of several, each normalizes by the statistics of its slice of a batch."""
    count = run.config.get("processes", 1)
    return f" ({count} processes)" if count > 1 else ""


def natural(text):
    """A key that sorts wrn-10-1 before wrn-28-10 and both before wrn-100-1."""
    return tuple(int(part) if part.isdigit() else part for part in re.split(r"(\d+)", text))


def make_sections(runs, left_out):
    """The sections in the order of the output; `left_out` gets a sentence for each run left out."""
    sections = {}
    for (key, _, _), cell in make_cells(runs, left_out).items():
        section = sections.setdefault(key, Section([]))
        add_to_rows(section.rows, cell)
    return sorted(sections.values(), key=lambda section: section.held_out)  # results first


def make_cells(runs, left_out):
    """{(section key, row key, cell key): Cell} in the order of the output. A seed counts once in a cell."""

    def order(run):
        return section_key(run), row_key(run), cell_key(run)

    cells = {}
    for run in sorted(runs, key=lambda run: (order(run), not run.finished)):
        cell = cells.setdefault(order(run), Cell())
        seed = run.options["seed"]
        twins = [other for other in cell.all_runs if other.options["seed"] == seed]
        if twins:
            left_out.append(f"{run.path}: seed {seed} of the same settings is there as {twins[0].path}")
        elif run.finished:
            cell.runs.append(run)
        else:
            cell.unfinished.append(run)
    return cells


def add_to_rows(rows, cell):
    """Into the first row with a place for it: a method that ran with several rates fills a row for each."""
    run = cell.any_run
    key = row_key(run)
    for row in rows:
        if row.key == key and run.method not in row.cells:
            row.cells[run.method] = cell
            return
    alike = [row for row in rows if (row.model, row.experiment) == (run.model, run.experiment)]
    rows.append(Row(key, run.model, run.experiment, 1 + len(alike), {run.method: cell}))


# Comparing: with the paper, cells with each other, options


def paper_of(run):
    """The paper's entry for a run's data set, or None; archives of another size are not that data set."""
    paper, data = PAPER.get(run.options["dataset"]), run.config["data"]
    return paper if paper and paper.images == (data["train_images"], data["test_images"]) else None


@cache
def read_paper_curves():
    """{(data set, network): {method: [(epoch, training loss), ...]}}. The network is likely, not stated."""
    curves = {}
    with PAPER_CURVES.open(newline="", encoding="utf-8") as file:
        for line in csv.DictReader(file):
            methods = curves.setdefault((line["data"], line["likely_network"]), {})
            point = int(line["epoch"]), float(line["training_loss"])
            methods.setdefault(line["method"], []).append(point)
    return curves


def paper_error(run, model, method):
    """The paper's test error in % on a run's data set, or None where it is not in the paper's tables."""
    paper = paper_of(run)
    if paper is None or model not in paper.errors:
        return None
    return paper.errors[model][NAMES.index(method)]


def follows_paper(run):
    """True if a run has the paper's number of epochs and its learning-rate drops."""
    paper = paper_of(run)
    if paper is None:
        return False
    return (run.options["epochs"], run.options["epoch_step"]) == (paper.epochs, paper.epoch_step)


def compared_cells(section):
    """Lists of (row, cell): the methods of a row or, where hyperparameters are chosen, a method's sets."""
    groups = {}
    for index, row in enumerate(section.rows):
        for method, cell in row.cells.items():
            key = (natural(row.model), row.experiment, NAMES.index(method)) if section.held_out else index
            groups.setdefault(key, []).append((row, cell))
    return [groups[key] for key in sorted(groups)]


def best(samples, form=".2f"):
    """The keys of {key: values of its finished runs} with the lowest median, to the digits that are shown.

    None where only one has finished runs. A single run is never the best: another seed might say otherwise.
    """
    medians = {key: float(format(median(values), form)) for key, values in samples.items() if values}
    if len(medians) < 2:
        return []
    lowest = min(medians.values())
    return [key for key, value in medians.items() if value == lowest and len(samples[key]) > 1]


def options_by_method(section):
    """{option: {method: its values, as text}} for what may differ within a section and has no column."""
    values, runs = {}, section.runs
    for name in dict.fromkeys(name for run in runs for name in run.options):  # in the options' own order
        if name in (*NO_RESULT, *SECTION, *IN_COLUMNS):
            continue
        values[name] = {}
        for run in runs:
            if run.method != "SGD" or name not in NOT_OF_SGD:
                values[name].setdefault(run.method, set()).add(str(run.options.get(name)))
    return values


def differs(name, method, values):
    """Whether an option differs in a section: one of CELL among a method's runs, another among all runs."""
    if name in CELL:
        return len(values[name][method]) > 1
    return len(set.union(*values[name].values())) > 1


# Tables


def summary(row, cell, section):
    """The numbers of one cell under the names of the CSV file's columns; None where there is none."""
    run, errors = cell.any_run, cell.test_errors
    paper = paper_error(run, row.model, run.method)
    comparable = errors and paper is not None and follows_paper(run)
    return {
        "data": run.config["data"]["name"],
        "sha256": run.config["data"]["sha256"],
        "dtype": run.options["dtype"],
        "float32_convolutions": convolutions(run),
        "epochs": run.options["epochs"],
        "network": row.model,
        "experiment": row.experiment,
        "method": run.method,
        "lr": run.options["lr"],
        "lrg": run.options["lrg"],
        "other_options": other_options(run, section),
        "runs": len(cell.runs),
        "unfinished": len(cell.unfinished),
        "holdout": run.options["holdout"],
        "test_error": median(errors) if errors else None,
        "min": min(errors, default=None),
        "max": max(errors, default=None),
        "paper": paper,
        "difference": median(errors) - paper if comparable else None,
        "train_loss": cell.train_loss if errors else None,
        "images_per_sec": cell.images_per_sec if errors else None,
    }


def other_options(run, section):
    """The options without a column that a section's runs do not share, as 'dropout 0.0'."""
    parts, values = [], options_by_method(section)
    for name, value in run.options.items():
        if run.method in values.get(name, {}) and differs(name, run.method, values):
            parts.append(f"{name} {value}")
    return ", ".join(parts)


def shared_options(section):
    """The options without a column that all runs share, or all of a method: 'omega 0.1 (Adam-G)'."""
    parts, values = [], options_by_method(section)
    for name, by_method in values.items():
        methods_with = {}  # by the value that all their runs have
        for method in NAMES:
            if method in by_method and not differs(name, method, values):
                (value,) = by_method[method]
                methods_with.setdefault(value, []).append(method)
        for value, methods in methods_with.items():
            whose = f" ({', '.join(methods)})" if len(methods) < len(by_method) else ""
            parts.append(f"{name} {value}{whose}")
    return ", ".join(parts)


def cell_table(section):
    """A Markdown table with a line for each cell, and the best of those that are compared in bold."""
    lines = []
    for group in compared_cells(section):
        winners = best({id(cell): cell.test_errors for _, cell in group})
        for row, cell in group:
            lines.append(cell_line(summary(row, cell, section), row, cell, id(cell) in winners))
    return markdown_table(lines)


def cell_line(record, row, cell, is_best):
    """The texts of one cell by the heads of their columns."""
    held_out, several = bool(record["holdout"]), record["runs"] > 1
    error = bold(text(record["test_error"], ".2f"), is_best) if cell.runs else unfinished_text(cell)
    return {
        "Network": markdown(row.model.upper() if held_out else row.label),
        "Experiment": markdown(record["experiment"]),
        "Method": record["method"],
        "lr": text(record["lr"]),
        "lrg": text(record["lrg"]),
        "Other options": markdown(record["other_options"]),
        "Runs": f"{record['runs']}" + (f" (+{record['unfinished']} unfinished)" if cell.unfinished else ""),
        "Held-out error (%)" if held_out else "Test error (%)": error,
        "Min": text(record["min"], ".2f") if several else "",
        "Max": text(record["max"], ".2f") if several else "",
        "Paper (%)": text(record["paper"], ".2f"),
        "Difference": text(record["difference"], "+.2f"),
        "Training loss": text(record["train_loss"], ".4f"),
        "Images/s": "" if held_out else text(record["images_per_sec"], ",.0f"),
    }


def overview(section):
    """The paper's kind of table, in Markdown: a row for each network, a column for each method.

    It names all of the paper's networks where one of them has a run.
    """
    run, lines = section.any_run, []
    for row in section.rows:
        winners = best({name: cell.test_errors for name, cell in row.cells.items()})
        errors = {name: overview_text(row.cells.get(name), name in winners) for name in NAMES}
        lines.append(overview_line(run, row.model, row.label, row.experiment, errors))
    paper, present = paper_of(run), {row.model for row in section.rows}
    if paper and present & paper.errors.keys():
        for model in paper.errors:
            if model not in present:
                lines.append(overview_line(run, model, model.upper(), "", dict.fromkeys(NAMES, "missing")))
    return markdown_table(lines)


def overview_line(run, model, label, experiment, errors):
    line = {"Test error (%)": markdown(label), "Experiment": markdown(experiment)}
    for name, words in errors.items():
        line[name] = beside(words, paper_error(run, model, name), ".2f")
    return line


def overview_text(cell, is_best):
    if cell is None:
        return "missing"
    errors = cell.test_errors
    if not errors:
        return unfinished_text(cell)
    spread = f" ({min(errors):.2f} to {max(errors):.2f}, n = {len(errors)})" if len(errors) > 1 else ""
    return bold(f"{median(errors):.2f}", is_best) + spread


def is_small(section):
    """One row of single runs, of all methods: the table of cells says it all."""
    counts = [len(cell.runs) for row in section.rows for cell in row.cells.values()]
    return len(section.rows) == 1 and counts == [1] * len(NAMES)


def markdown_table(lines):
    """`lines` are dicts with the columns' heads as keys. A column without any entry is left out."""
    heads = [head for head in lines[0] if any(line[head] for line in lines)]
    table = [heads] + [[line[head] for head in heads] for line in lines]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    table.insert(1, ["-" * width for width in widths])
    return ["| " + " | ".join(map(str.ljust, line, widths)) + " |" for line in table]


def data_label(run):
    name = run.config["data"]["name"]
    return LABELS.get(name, name)


def text(value, form=""):
    return "" if value is None else format(value, form)


def beside(words, paper, form):
    return "; ".join(filter(None, [words, None if paper is None else f"paper {paper:{form}}"]))


def one_line(words):
    """With what cannot be seen in Python's notation: line ends, controls, bytes of no known encoding."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in words)


def markdown(words):
    """Words that Markdown is to show as they are, in a table too. A _ within a word means nothing there."""
    return re.sub(r"[\\`*\[\]<>|&~$]|(?<![^\W_])_|_(?![^\W_])", r"\\\g<0>", one_line(words))


def bold(words, yes):
    return f"**{words}**" if yes else words


def unfinished_text(cell):
    return f"unfinished ({max(cell.unfinished, key=lambda run: len(run.epochs)).progress})"


# Tables of the training loss, which the paper's claims are about

AT_END = """\
Training loss at the end of each phase, that is, before each drop of the learning rates and at the last epoch:
the median of the phase's last three epochs, or of all where it has fewer. Of these the median and range over
the runs, and the ratio of the medians to SGD's.
"""
RISE = """\
The lowest training loss within each phase, and how far it rose again to the phase's end. Both are medians of
three epochs in a row, so +0% says that the phase ended with its lowest loss.
"""
FALL = """\
The plateau: the lowest training loss of each phase's second half against that of its first half, of the same
medians. Near 0% the loss stood still, far below it went on falling.
"""
OF_PAPER = "The paper's losses are medians of three points of its curves, which have every second epoch.\n"


class PhaseLoss(NamedTuple):
    """A training loss between two drops: the median of three epochs in a row, after each of them."""

    medians: list

    @property
    def end(self):
        return self.medians[-1]

    @property
    def lowest(self):
        return min(self.medians)

    @property
    def rise(self):
        """From the lowest to the end, in %."""
        return percent_more(self.end, self.lowest)

    @property
    def fall(self):
        """From the lowest of the first half to the lowest of the second, in %: below 0 if it fell."""
        half = (len(self.medians) + 1) // 2
        return percent_more(min(self.medians[half:]), min(self.medians[:half]))


def percent_more(a, b):
    return 100 * (a / b - 1) if b else 0.0


def phase_losses(curve, ends):
    """A PhaseLoss for each phase of a curve [(epoch, loss), ...] that has points in each."""
    found = []
    for start, end in pairwise([0, *ends]):
        losses = [loss for epoch, loss in curve if start < epoch <= end]
        found.append(PhaseLoss([median(losses[i : i + 3]) for i in range(max(1, len(losses) - 2))]))
    return found


def loss_tables(section):
    """Tables in Markdown with a line for each network and phase: its end, the rise to it, the plateau."""
    ends = section.phase_ends
    rows = [row for row in section.rows if any(cell.runs for cell in row.cells.values())]
    if section.held_out or len(ends) == 1 or not rows:
        return []
    tables, has_paper = {AT_END: [], RISE: [], FALL: []}, False
    for row in rows:
        curves = row.paper_curves if follows_paper(row.any_run) else {}
        has_paper = has_paper or bool(curves)
        sgd = sgd_beside(row, section)
        for phase, (start, end) in enumerate(pairwise([0, *ends])):
            paper = {method: [phase_losses(curve, ends)[phase]] for method, curve in curves.items()}
            ours = {method: [of[phase] for of in cell.phases(ends)] for method, cell in row.cells.items()}
            of_sgd = [of[phase] for of in sgd.phases(ends)] if sgd else []
            head = {"Network": markdown(row.label), "Experiment": markdown(row.experiment)}
            head["Epochs"] = f"{start + 1} to {end}"
            ratios = ratio_texts(ours, paper, of_sgd)
            tables[AT_END].append(head | loss_texts(row, ours, paper, end_words) | ratios)
            if end - start > 3:  # in fewer there is one median
                tables[RISE].append(head | loss_texts(row, ours, paper, rise_words))
                tables[FALL].append(head | loss_texts(row, ours, paper, fall_words))
    lines = []
    for note, table in tables.items():
        lines += [note, *markdown_table(table), ""] if table else []
    return [*lines, OF_PAPER] if has_paper else lines


def sgd_beside(row, section):
    """The row's SGD, or the only one of its network and experiment; None where there is none."""
    cells = [other.cells["SGD"] for other in section.rows if other.key == row.key and "SGD" in other.cells]
    return row.cells.get("SGD") or (cells[0] if len(cells) == 1 else None)


def loss_texts(row, ours, paper, words):
    """{method: text} for {method: list of PhaseLoss}, of which `words` makes median and range."""
    winners = best({method: ends_of(losses) for method, losses in ours.items()}, ".3g")
    texts = dict.fromkeys(NAMES, "")
    for method, losses in ours.items():
        middle, spread = words(losses, "#.3g") if losses else (unfinished_text(row.cells[method]), "")
        theirs = f"; paper {words(paper[method], '.2g')[0]}" if method in paper else ""
        texts[method] = bold(middle, words is end_words and method in winners) + spread + theirs
    return texts


def end_words(losses, form):
    return middle_and_spread(ends_of(losses), form)


def rise_words(losses, form):
    middle, spread = middle_and_spread([loss.rise for loss in losses], "+z.0f", "%")
    return f"{median(loss.lowest for loss in losses):{form}}, {middle}", spread


def fall_words(losses, _form):
    return middle_and_spread([loss.fall for loss in losses], "+z.0f", "%")


def ends_of(losses):
    return [loss.end for loss in losses]


def middle_and_spread(values, form, unit=""):
    """The median and, of several values, the range."""
    spread = f" ({min(values):{form}} to {max(values):{form}}{unit})" if len(values) > 1 else ""
    return f"{median(values):{form}}{unit}", spread


def ratio_texts(ours, paper, of_sgd):
    """Of each other method's loss at the end to SGD's, which are `of_sgd`."""

    def ratio(losses, sgd):
        if not losses or not sgd or not median(ends_of(sgd)):
            return None
        return median(ends_of(losses)) / median(ends_of(sgd))

    texts = {}
    for method in NAMES[1:]:
        theirs = ratio(paper.get(method), paper.get("SGD")) if method in ours else None
        texts[f"{method} / SGD"] = beside(text(ratio(ours.get(method), of_sgd), ".2f"), theirs, ".2f")
    return texts


# The whole output


FOOTNOTES = """\
The test error is the last epoch's; test error, training loss and images/s are medians over the runs.
A difference to the paper stands where epochs and drops are the paper's, whatever the other options.
Images/s is what the machine gave with whatever ran beside. An experiment is the folder of its runs.
"""


def report(sections, left_out, figures_from=None):
    """The whole output in Markdown; figures are linked relative to the folder `figures_from`, if given."""
    lines = []
    for section in sections:
        what = ", choice of hyperparameters" if section.held_out else ""
        lines += [f"### {markdown(data_label(section.any_run))}{what}", "", markdown(describe(section)), ""]
        if not section.held_out and not is_small(section):
            lines += [*overview(section), ""]
        lines += [*cell_table(section), "", *loss_tables(section)]
        for drawn in (section, *section.rows):
            if drawn.figure and figures_from:
                where = quote(os.fsencode(Path(os.path.relpath(drawn.figure, figures_from)).as_posix()))
                lines += [f"![{markdown(drawn.title)}]({where})", ""]
    unfinished = [run for section in sections for run in section.runs if not run.finished]
    reasons = [f"{run.path}: unfinished, {run.progress}" for run in unfinished] + left_out
    if reasons:
        lines += ["Not counted:", "", *(f"- {markdown(reason)}" for reason in reasons), ""]
    return "\n".join([*lines, FOOTNOTES])


def describe(section):
    """What all runs of a section share, and the devices, versions and commits they ran with."""
    run, runs = section.any_run, section.runs
    options, data = run.options, run.config["data"]
    precision = options["dtype"]
    if precision == "float32" and convolutions(run) != precision:
        precision += f" ({convolutions(run)} in convolutions)"
    drops = ", ".join(map(str, options["epoch_step"]))
    ratio = f"{options['lr_decay_ratio']:g}"
    tested = "held-out" if options["holdout"] else "test"
    numbers = f"{data['train_images']:,} training and {data['test_images']:,} {tested} pictures"
    commits = [run.config.get("git_commit") or "" for run in runs]
    parts = [
        f"{numbers} (SHA-256 {data['sha256'][:12]})",
        f"{precision}, batches of {options['batch_size']}, {options['epochs']} epochs",
        f"learning rates x{ratio} after {drops}" if drops else "constant learning rates",
        shared_options(section),
        listed("device", [run.config["device"] + processes(run) for run in runs]),
        listed("torch", [run.config.get("torch") for run in runs]),
        listed("commit", [commit[:7] + commit[40:] for commit in commits]),  # "-dirty" follows the 40 digits
    ]
    paper = paper_of(run)
    if paper and not follows_paper(run):
        parts.append(f"the paper trained {paper.epochs} epochs, so its numbers are no measure of these")
    return "; ".join(filter(None, parts)) + "."


def listed(name, values):
    values = sorted(set(filter(None, values)))
    return f"{name}: {', '.join(values)}" if values else ""


def write_markdown(path, generated):
    """Between the two marker comments of a page that has them; otherwise the whole file."""
    page = path.read_text(encoding="utf-8") if path.exists() else ""
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if begin and end:
        page = f"{before}{begin}\n\n{generated}\n{end}{after}"
    elif BEGIN in page or END in page:
        raise ValueError(f"{path} needs both marker comments, in this order: {BEGIN} and {END}.")
    else:
        page = f"# Results\n\nMade by `scripts/summarize.py` from the logs of the runs.\n\n{generated}"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page, encoding="utf-8")


def write_csv(path, sections):
    records = []
    for section in sections:
        for row in section.rows:
            records += [summary(row, cell, section) for cell in row.cells.values()]
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8", errors="backslashreplace") as file:
        writer = csv.DictWriter(file, fieldnames=list(records[0]))
        writer.writeheader()
        for record in records:
            rounded = {name: round(v, 6) if isinstance(v, float) else v for name, v in record.items()}
            writer.writerow(rounded)


def draw(sections, target, x):
    """A figure for each row with results; in a folder also of the losses in each section, and the paper's."""
    import figures  # here, because matplotlib takes a second to import and tables need none

    results, names = [section for section in sections if not section.held_out], {"paper-curves.png"}
    rows = [row for section in results for row in section.rows if any(run.epochs for run in row.runs)]
    figures.draw_rows(rows, target, x, names)
    if not figures.is_file(target):
        figures.draw_sections([each for each in results if each.has_reached_a_drop], target, x, names)
        drops = {LABELS.get(dataset, dataset): paper.epoch_step for dataset, paper in PAPER.items()}
        figures.draw_paper(target / "paper-curves.png", read_paper_curves(), drops)


# The program


def parse_arguments(arguments):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    pages = "write the tables there, with the figures; only between this program's marker comments, if there"
    add("directories", nargs="+", type=Path, metavar="DIR", help="where to look for runs")
    add("--markdown", type=Path, metavar="FILE", help=pages)
    add("--csv", type=Path, metavar="FILE", help="write one line per cell that has runs there")
    add("--plots", type=Path, metavar="DIR_OR_FILE", help="draw a figure per network and data set")
    add("--x", choices=("epoch", "time"), default="epoch", help="the figures' axis (default: epoch)")
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
        advice = f"left out {one_line('; '.join(left_out))}." if left_out else "train one first."
        sys.exit(f"No usable run (a directory with config.json and log.txt) below {places}: {advice}")
    for sentence in left_out:
        print(f"summarize.py: left out {one_line(sentence)}", file=sys.stderr)
    sections = make_sections(runs, left_out)
    try:
        if options.plots:
            draw(sections, options.plots, options.x)
        print(report(sections, left_out), end="")
        if options.markdown:
            write_markdown(options.markdown, report(sections, left_out, options.markdown.parent))
        if options.csv:
            write_csv(options.csv, sections)
    except BrokenPipeError:
        raise
    except (ValueError, OSError) as error:
        sys.exit(str(error))
    if options.plots:
        drawn = [drawn.figure for section in sections for drawn in (*section.rows, section) if drawn.figure]
        print("\nFigures:", *(one_line(str(path)) for path in drawn))


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="backslashreplace")  # whatever a terminal cannot show
    try:
        main()
    except BrokenPipeError:  # whoever read the output has left, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
