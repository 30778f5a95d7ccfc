"""Every page says what the code does: flags, defaults, commands, code, numbers, places, paths, file map."""

import importlib
import json
import re
import shlex
import subprocess
from statistics import median

import pytest
import summarize
import torch
from helpers import METHODS, ROOT, log_lines
from torch.nn.functional import cross_entropy

import options
from grassmann_optimizer import grassmann_weights, scale_invariance
from resnet import WideResNet
from vgg import VGG

PAGES = sorted(
    path.relative_to(ROOT).as_posix()
    for pattern in ("*.md", "docs/*.md", "logs/published/*.md")
    for path in ROOT.glob(pattern)
)
FLAG = r"(?<![\w-])--[a-zA-Z][\w-]*"
# Beside those that stand in scripts/ and benchmarks/: of TensorBoard, torchrun and Slurm.
OF_OTHER_PROGRAMS = {"--help", "--logdir", "--nodes", "--nnodes", "--ntasks-per-node", "--gpus-per-node"}
OF_OTHER_PROGRAMS |= {"--time", "--requeue", "--signal", "--nproc_per_node", "--max-restarts"}
OF_OTHER_PROGRAMS |= {"--rdzv-backend", "--rdzv-endpoint", "--rdzv-id", "--signals-to-handle"}
OF_OTHER_PROGRAMS |= {"--cpus-per-task"}
# Written by runs, or of the authors' code: not kept in the repository.
NOT_HERE = {
    "config.json",
    "log.txt",
    "checkpoint.pt",
    "checkpoint.previous.pt",
    "output.txt",
    "logs/quickstart/curves.png",
    "commands.txt",
    "docs/table1.md",
    "table1.csv",
    "train.py",
}
TEXT = {page: re.sub(r"<!--.*?-->", "", (ROOT / page).read_text(), flags=re.S) for page in PAGES}
PATHS = ("README.md", "docs/running.md", "docs/method.md", "docs/results.md")
README, RUNNING, METHOD, RESULTS = (TEXT[page] for page in PATHS)
NETWORKS = ("VGG-11", "WRN-16-2")  # of the whole schedules
PHASES = ("1 to 60", "61 to 120", "121 to 160", "161 to 200")
ACTIONS = {flag: a for a in options.make_parser()._actions for flag in a.option_strings if a.dest != "help"}


def table_rows(text):
    """The rows of all tables as lists of cells."""
    lines = re.findall(r"^\|(.*)\|$", text, re.M)
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)] for line in lines]


def code_blocks(text):
    return re.findall(r"^```python\n(.*?)^```", text, re.M | re.S)


@pytest.mark.parametrize("page", PAGES)
def test_no_page_names_a_flag_that_does_not_exist(page):
    text = TEXT[page]
    if page == "docs/differences.md":
        text = re.sub(r"^\| .*? \|", "|", text, flags=re.M)  # the first cell says it in the authors' words
    files = [path for folder in ("scripts", "benchmarks") for path in (ROOT / folder).glob("*.*")]
    of_scripts = {flag for path in files for flag in re.findall(FLAG, path.read_text())}
    assert set(re.findall(FLAG, text)) <= ACTIONS.keys() | of_scripts | OF_OTHER_PROGRAMS


def test_each_flag_stands_with_its_default():
    """docs/running.md, in tables of flag, default, meaning; the authors' own in docs/differences.md."""
    assert ACTIONS.keys() <= set(re.findall(FLAG, RUNNING))
    ours, theirs = (
        {row[0].split(",")[0].strip("`"): row[1].strip("`") for row in table_rows(text) if len(row) == 3}
        for text in (RUNNING, TEXT["docs/differences.md"])
    )
    paper = options.paper_values("resnet", "CIFAR10", "SGD")
    for flag, name in {a.option_strings[0]: a.dest for a in ACTIONS.values()}.items():
        if name in options.LEGACY:
            assert theirs[flag] == options.LEGACY[name][0]
        elif name in paper:
            assert ours[flag] == "the paper's", name
        elif name not in {"cuda", "save", "dataset_name"}:  # in words
            default = (options.DEFAULTS | options.PER_CALL)[name]
            if default is None or default is False:
                assert ours[flag] == {None: "none", False: "off"}[default], name
            else:
                assert type(default)(ours[flag]) == default, name


@pytest.mark.parametrize(("number", "dataset"), [(0, "CIFAR10"), (1, "SVHN")])
def test_the_papers_values(number, dataset):
    rows = table_rows(RUNNING)
    head = [i for i, row in enumerate(rows) if row == ["flag", *METHODS]][number]
    for column, method in enumerate(METHODS, start=1):
        paper = options.paper_values("resnet", dataset, method)
        said = {row[0].strip("`"): row[column] for row in rows[head + 2 :][: len(paper)]}
        values = {f: None if text == "none" else ACTIONS[f].type(text) for f, text in said.items()}
        assert {ACTIONS[flag].dest: value for flag, value in values.items()} == paper, method


@pytest.mark.parametrize("page", PAGES)
def test_commands_are_accepted(page):
    """Of main.py, in blocks and within a sentence."""
    text = TEXT[page].replace("\\\n", "")  # a command over several lines
    commands = re.findall(r"python main\.py ([^`\n]*)", text)
    assert len(commands) >= (6 if page == "README.md" else 0)
    for command in commands:
        if command.strip() != "--help":
            options.make_parser().parse_args(shlex.split(command, comments=True))


@pytest.mark.parametrize("number", [0, 1], ids=["groups by the helper", "groups by hand"])
def test_the_code_for_a_model_of_ones_own_trains(number):
    torch.manual_seed(0)
    model = WideResNet(depth=10, width=1, num_classes=10)
    names = {"model": model}
    exec(code_blocks((README, METHOD)[number])[0], names)
    optimizer = names["optimizer"]

    listed = [p for group in optimizer.param_groups for p in group["params"]]
    assert len(listed) == len(set(listed)) == len(list(model.parameters()))
    images, labels = torch.randn(16, 3, 32, 32), torch.arange(16) % 10
    losses = []
    for _ in range(12):
        loss = cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 2
    for p in optimizer.param_groups[0]["params"]:
        torch.testing.assert_close(p.flatten(1).norm(dim=1), torch.ones(len(p)))


def test_the_code_that_measures_runs(capsys):
    _, block = code_blocks(METHOD)
    torch.manual_seed(0)
    model = WideResNet(depth=10, width=1, num_classes=10)
    images, labels = torch.randn(16, 3, 32, 32), torch.arange(16) % 10
    names = {"model": model, "loss_fn": lambda net: cross_entropy(net(images), labels)}
    exec(block, names)
    assert capsys.readouterr().out.count("True") == 3
    assert len(names["groups"][0]["params"]) == 3


def test_the_table_of_scale_invariant_layers():
    rows = [row for row in table_rows(METHOD) if len(row) == 4 and re.match(r"(WRN|VGG)-\d", row[0])]
    assert len(rows) == 4
    torch.manual_seed(0)
    images, labels = torch.randn(4, 3, 32, 32), torch.arange(4)
    for name, on_grassmann, invariant, _ in rows:
        family, *size = name.lower().split("-")
        model = WideResNet(*map(int, size), 10) if family == "wrn" else VGG(int(size[0]), 10)
        chosen = grassmann_weights(model)
        measured = scale_invariance(model, lambda net: cross_entropy(net(images), labels))
        assert len(chosen) == int(on_grassmann), name
        assert sum(m.invariant for m in measured if m.name in chosen) == int(invariant), name


def test_the_file_map_is_whole():
    """Its rows link files and folders; a function that a row names stands in the row's file."""
    rows = [row for row in table_rows(README) if len(row) == 2 and row[0].startswith("[")]
    mapped = {path for row in rows for path in re.findall(r"\]\(([^)]+)\)", row[0])}
    git = subprocess.run(["git", "-C", ROOT, "ls-files"], capture_output=True, text=True)
    if git.returncode == 0:  # not in a tree without git
        tracked = {path.split("/")[0] for path in git.stdout.splitlines()} - {"README.md"}
        assert {name for name in tracked if not name.startswith(".")} <= mapped
    pages = {path.relative_to(ROOT).as_posix() for path in (ROOT / "docs").glob("*.md")}
    assert pages - NOT_HERE <= mapped
    for cell, meaning in rows:
        files = re.findall(r"\]\((\w+)\.py\)", cell)
        for name in re.findall(r"`(\w+)`", meaning):
            assert any(hasattr(importlib.import_module(file), name) for file in files), (files, name)


@pytest.mark.parametrize("page", PAGES)
def test_links_and_paths_exist(page):
    text = TEXT[page]
    here = (ROOT / page).parent
    for link in re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r'<img src="([^"]+)"', text):
        if link.startswith("https://"):
            continue
        path, _, anchor = link.partition("#")
        target = here / path if path else ROOT / page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target.read_text()), link
    kinds = "py|sh|md|txt|pt|png|csv|json|toml|cff|yml"
    paths = re.findall(rf"(?<![\w./<>*-])[\w./-]+\.(?:{kinds})\b", re.sub(r"\]\(.*?\)|https://\S+", "", text))
    for path in set(paths) - NOT_HERE:
        assert (ROOT / path).is_file() or (here / path).is_file(), path


def anchors(markdown):
    """The anchors that GitHub gives a page's headings."""
    headings = re.findall(r"^#+ (.+)$", markdown, re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES)
def test_places_in_the_code_exist(page):
    places = re.findall(r"`(\w+)\.py: (\w+)`", TEXT[page])
    assert places or page != "docs/method.md"
    for module, name in places:
        assert hasattr(importlib.import_module(module), name), (module, name)


def test_each_equation_names_the_function_that_cites_it():
    rows = [row for row in table_rows(METHOD) if len(row) == 4 and row[2].startswith("Eq.")]
    assert [row[2] for row in rows] == ["Eq. 6", "Eq. 7", "Eq. 8", "Eq. 9"]
    for row in rows:
        module, name = re.match(r"`(\w+)\.py: (\w+)`", row[3]).groups()
        assert row[2] in getattr(importlib.import_module(module), name).__doc__


def test_nothing_else_of_the_paper_is_cited_by_number():
    patterns = ("*.py", "scripts/*.*", "benchmarks/*.py", "tests/**/*.py")
    texts = TEXT | {path: path.read_text() for pattern in patterns for path in ROOT.glob(pattern)}
    for where, text in texts.items():
        cited = re.findall(r"\b(?:Eqs?\.|Equations?|Algorithm|Theorem|Lemma|Definition|Section) \d+", text)
        assert set(cited) <= {"Eq. 6", "Eq. 7", "Eq. 8", "Eq. 9", "Algorithm 1"}, where


def test_the_papers_numbers_and_ours():
    """The paper's are those that the tables are made with; ours stand in the page made from the logs."""
    rows = [row for row in table_rows(RESULTS) if len(row) == 5 and " / " in "".join(row)]
    said = {
        (dataset, model.lower()): tuple(map(float, cell.split(" / ")))
        for model, *cells, _ in rows
        for dataset, cell in zip(("CIFAR10", "CIFAR100", "SVHN"), cells, strict=True)
        if cell
    }
    paper = {(d, m): errors for d, paper in summarize.PAPER.items() for m, errors in paper.errors.items()}
    assert said == paper
    ours = re.findall(r"\d+\.\d+ \(\d+\.\d+ to \d+\.\d+, n = \d+\)", README)
    assert ours
    assert [text for text in ours if text not in RESULTS.replace("**", "")] == []


def test_the_tables_by_hand_are_those_made_from_the_logs():
    """Of the whole schedules: ends of phases, plateau and test error, all but the one-change table."""
    cells = [[cell.replace("**", "") for cell in row] for row in table_rows(RESULTS)]
    made = {network: [r for r in cells if r[:2] == [network, "whole-schedule"]] for network in NETWORKS}
    by_hand = [row for row in cells if len(row) == 10 and row[0] in {*PHASES, "test error (%)"}]
    assert [row[0] for row in by_hand] == [*PHASES, "test error (%)", *PHASES[1:]]
    for number, row in enumerate(by_hand):
        for network, ours in zip(NETWORKS, (row[4:7], row[7:]), strict=True):
            if row[0] == "test error (%)":
                source = next(r for r in made[network] if len(r) == 5)[2:]
            else:  # the tables follow each other: ends of phases, lowest and rise, plateau
                ends, _, plateau = (r[3:6] for r in made[network] if r[2] == row[0])
                source = ends if number < len(PHASES) else plateau
            assert ours == [cell.split(" (")[0] for cell in source], (row[0], network)


def test_the_papers_columns_are_its_curves():
    curves = summarize.read_paper_curves()["CIFAR-10", "WRN-28-10"]
    columns = [dict(curves[method]) for method in ("SGD", "SGD-G", "Adam-G")]
    rows = [[cell.replace("**", "") for cell in r[:4]] for r in table_rows(RESULTS) if len(r) == 10]
    rows = [row for row in rows if row[0] in PHASES]
    for row, epoch in zip(rows[: len(PHASES)], (58, 118, 158, 198), strict=True):
        assert [float(cell) for cell in row[1:]] == [column[epoch] for column in columns]
    for row, (start, end) in zip(rows[len(PHASES) :], ((60, 120), (120, 160), (160, 200)), strict=True):
        half = (start + end) / 2
        falls = []
        for column in columns:
            before, after = (
                min(loss for epoch, loss in column.items() if first < epoch <= last)
                for first, last in ((start, half), (half, end))
            )
            falls.append(f"{after / before - 1:+.0%}")
        assert row[1:] == falls


def outcome(run, *ends):
    """Of a published run: the median training loss of three epochs before each end, and its last error."""
    epochs = log_lines(run)
    losses = [median(epoch["train_loss"] for epoch in epochs[end - 3 : end]) for end in ends]
    return [*(f"{loss:#.3g}" for loss in losses), f"{100 - epochs[-1]['test_acc']:.2f}"]


def test_the_table_of_one_change_after_the_other():
    """Seed 0 of each: the median of the three epochs before the second drop, and of the last three."""
    rows = RESULTS[RESULTS.index("| loss at 120 |") :].split("\n\n")[0]
    rows = [row for row in table_rows(rows) if len(row) == 4 and "." in row[1]]
    folders = (
        "whole-schedule/SGD/seed0", "one-change/SGD/no-decay-seed0", "whole-schedule/SGDG/seed0",
        "one-change/SGDG/omega0-seed0", "one-change/SGDG/noclip-seed0", "measured/SGDG/seed0",
        "one-change/SGDG/lr0.1-seed0", "one-change/SGDG/measured-lr0.1-seed0",
        "whole-schedule/AdamG/seed0", "measured/AdamG/seed0",
    )  # fmt: skip
    for row, folder in zip(rows, folders, strict=True):
        experiment, method, run = folder.split("/")
        path = ROOT / "logs/published" / experiment / "cifar10-jpeg-1000/wrn-16-2" / method / run
        assert row[1:] == outcome(path, 120, 200), folder
        given = json.loads((path / "config.json").read_text())["options"]
        flags = shlex.split(" ".join(re.findall(r"`(.*?)`", row[0])))
        for flag, value in zip(flags[::2], flags[1::2], strict=True):
            assert str(given[ACTIONS[flag].dest]).lower().removesuffix(".0") == value, folder


def test_each_methods_own_rates():
    """The grid's best, and the whole schedule with them."""
    published = ROOT / "logs/published"
    grid = RESULTS[RESULTS.index("| held-out error (%) |") :].split("\n\n")[0]
    best = {}
    for network, *cells in table_rows(grid)[2:]:
        for method, cell in zip(summarize.METHODS, cells, strict=True):
            runs = (published / "grid/cifar10-jpeg-2000" / network.lower() / method).iterdir()
            error, run = min((100 - log_lines(run)[-1]["test_acc"], run) for run in runs)
            options = json.loads((run / "config.json").read_text())["options"]
            rates = [rate for rate in (options["lr"], options["lrg"]) if rate is not None]
            best[network, summarize.METHODS[method]] = rates
            assert cell.startswith(f"{error:.2f} at ")
            assert [float(number) for number in re.findall(r"\b0\.\d+", cell)] == rates
    schedule = RESULTS[RESULTS.index("| own rates, seed 0 |") :].split("\n\n")[0]
    for name, *numbers in table_rows(schedule)[2:]:
        network, method = name.split(": ")
        option = next(option for option, label in summarize.METHODS.items() if label == method)
        run = published / "own-rates/cifar10-jpeg-1000" / network.lower() / option / "seed0"
        options = json.loads((run / "config.json").read_text())["options"]
        assert [options["lr"], options["lrg"]][: len(best[network, method])] == best[network, method]
        assert numbers == outcome(run, 60, 120, 160, 200)


def test_the_table_of_the_last_layers():
    """As benchmarks/last_layer.py wrote it, of runs whose logs are there."""
    rows = RESULTS[RESULTS.index("| last layer |") :].split("\n\n")[0]
    rows = [row for row in table_rows(rows) if "." in row[1]]
    names = ("wrn-16-2-seed1", "wrn-16-2-seed2", "vgg-11-seed1")
    folder = ROOT / "logs/published/last-layer"
    figures = [
        figure for name in names for figure in json.loads((folder / f"{name}.json").read_text())["runs"]
    ]
    for (name, *numbers), figure in zip(rows, figures, strict=True):
        config = json.loads((ROOT / "logs/published" / figure["run"] / "config.json").read_text())
        method = summarize.METHODS[config["options"]["optim_method"]]
        assert name.lower().startswith(config["model"])
        assert f"seed {config['options']['seed']}: {method}" in name
        length, *losses = (figure[key] for key in ("length", "loss", "loss_at_first_length"))
        assert numbers == [f"{length:.2f}", *(f"{loss:#.3g}" for loss in losses)]


@pytest.mark.parametrize("page", PAGES)
def test_no_page_counts_what_goes_stale(page):
    assert not re.findall(r"(?<!at most )\b\d[\d,]* (?:\w+ )?(?:tests|mutants|faults|lines)\b", TEXT[page])
    assert "TODO" not in TEXT[page]
