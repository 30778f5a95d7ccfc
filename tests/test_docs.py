"""Every page says what the code does: flags, commands, code, places, links; and its numbers are the logs'."""

import importlib
import json
import re
import shlex
import subprocess
from itertools import pairwise
from statistics import median

import pytest
import torch
from helpers import METHODS, ROOT, call, log_lines
from summarize import PAPER, read_paper_curves
from torch.nn.functional import cross_entropy

import options
from grassmann_optimizer import SGDG, grassmann_weights, scale_invariance
from resnet import WideResNet
from vgg import VGG

FILES = [path for folder in (".", "docs", "logs/published") for path in sorted((ROOT / folder).glob("*.md"))]
TEXT = {str(p.relative_to(ROOT)): re.sub(r"<!--.*?-->", "", p.read_text(), flags=re.S) for p in FILES}
README, RUNNING = TEXT["README.md"], TEXT["docs/running.md"]
METHOD, RESULTS = TEXT["docs/method.md"], TEXT["docs/results.md"]
FLAG = r"(?<![\w-])--[a-zA-Z][\w-]*"
# Of TensorBoard, torchrun and Slurm; those of our other programs stand in scripts/ and benchmarks/.
OF_OTHERS = "--logdir --nnodes --nproc_per_node --max-restarts --rdzv-backend --rdzv-endpoint --rdzv-id"
OF_OTHERS += " --signals-to-handle --ntasks-per-node --requeue --signal"
# Written by runs, or of the authors' code: not kept in the repository.
NOT_HERE = {"config.json", "log.txt", "checkpoint.pt", "checkpoint.previous.pt", "output.txt", "commands.txt"}
NOT_HERE |= {"evaluation.txt", "docs/table1.md", "table1.csv", "train.py", "logs/gpu.json"}
NAMES = {"SGD": "SGD", "SGD-G": "SGDG", "Adam-G": "AdamG"}
ENDS = (60, 120, 160, 200)  # of the phases of a whole schedule, in epochs
PUBLISHED = ROOT / "logs/published"


def table(text, head):
    """The rows of the table whose first heading is `head`, as lists of cells without bold."""
    lines = text[text.index(f"| {head} |") :].split("\n\n")[0].replace("**", "").splitlines()
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines if line][2:]


def given(flags):
    """The options of a command line, as main.py understands them."""
    return options.parse_flags(shlex.split(flags, comments=True))


@pytest.mark.parametrize("page", TEXT)
def test_flags_exist_and_commands_are_accepted(page):
    """Commands of main.py, in blocks and within a sentence."""
    commands = re.findall(r"main\.py (-[^`\n|]*)", TEXT[page].replace("\\\n", ""))
    assert len(commands) >= (6 if page == "README.md" else 0)
    for command in set(commands) - {"--help"}:
        given(command)
    text = TEXT[page]
    if page == "docs/differences.md":
        text = re.sub(r"^\| .*? \|", "|", text, flags=re.M)  # the first cell says it in the authors' words
    files = [path for folder in ("scripts", "benchmarks") for path in (ROOT / folder).glob("*.*")]
    known = " ".join([OF_OTHERS, call("--help").out, *(path.read_text() for path in files)])
    assert set(re.findall(FLAG, text)) <= set(re.findall(FLAG, known))


@pytest.mark.parametrize(("dataset", "first"), [("CIFAR10", 1), ("SVHN", 4)])
def test_the_papers_values(dataset, first):
    rows = table(RUNNING, "flag")
    for column, method in enumerate(METHODS, start=first):
        flags = " ".join(f"{row[0]} {row[column]}" for row in rows if row[column] != "none")
        paper = options.paper_values("resnet", dataset, method)
        assert given(flags.replace("`", "")) == {k: v for k, v in paper.items() if v is not None}, method


@pytest.mark.parametrize("block", re.findall(r"^```python\n(.*?)^```", README + METHOD, re.M | re.S))
def test_the_code_for_a_model_of_ones_own_trains(block):
    torch.manual_seed(0)
    model = WideResNet(depth=10, width=1, num_classes=10)
    images, labels = torch.randn(16, 3, 32, 32), torch.arange(16) % 10
    names = {"model": model, "loss_fn": lambda net: cross_entropy(net(images), labels)}
    exec(block, names)
    optimizer = names.get("optimizer") or SGDG(names["groups"])
    listed = [p for group in optimizer.param_groups for p in group["params"]]
    assert len(listed) == len(set(listed)) == len(list(model.parameters()))
    losses = []
    for _ in range(12):
        optimizer.zero_grad()
        losses.append(names["loss_fn"](model))
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < losses[0] / 2
    for p in optimizer.param_groups[0]["params"]:
        torch.testing.assert_close(p.flatten(1).norm(dim=1), torch.ones(len(p)))


def test_the_table_of_scale_invariant_layers():
    images, labels = torch.randn(4, 3, 32, 32), torch.arange(4)
    for name, on_grassmann, invariant, *_ in table(METHOD, "network"):
        family, *size = name.lower().split("-")
        torch.manual_seed(0)
        model = WideResNet(*map(int, size), 10) if family == "wrn" else VGG(int(size[0]), 10)
        chosen = grassmann_weights(model)
        measured = scale_invariance(model, lambda net: cross_entropy(net(images), labels))
        found = [weight.invariant for weight in measured if weight.name in chosen]
        assert (len(found), sum(found)) == (int(on_grassmann), int(invariant)), name


def test_the_file_map_is_whole():
    """It links each file and folder of the repository, and each page."""
    mapped = set(re.findall(r"\]\(([^)]+)\)", str(table(README, "where"))))
    git = subprocess.run(["git", "-C", ROOT, "ls-files"], capture_output=True, text=True)
    if git.returncode == 0:  # not in a tree without git
        tracked = {path.split("/")[0] for path in git.stdout.splitlines()} - {"README.md", "docs"}
        assert {name for name in tracked if not name.startswith(".")} <= mapped
    assert {page for page in TEXT if page.startswith("docs/")} - NOT_HERE <= mapped


@pytest.mark.parametrize("page", TEXT)
def test_links_paths_and_places_in_the_code_exist(page):
    text, here = TEXT[page], (ROOT / page).parent
    for link in re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r'<img src="([^"]+)"', text):
        path, _, anchor = link.partition("#")
        target = here / path if path else ROOT / page
        if not link.startswith("https://"):
            assert target.exists(), link
            headings = re.findall(r"^#+ (.+)$", target.read_text(), re.M) if anchor else [""]
            assert anchor in [re.sub(r"[^\w -]", "", h.lower()).replace(" ", "-") for h in headings], link
    kinds = "py|sh|md|txt|pt|png|csv|json|toml|cff|yml"
    paths = re.findall(rf"(?<![\w./<>*-])[\w./-]+\.(?:{kinds})\b", re.sub(r"\]\(.*?\)|https://\S+", "", text))
    for path in set(paths) - NOT_HERE:
        assert (ROOT / path).is_file() or (here / path).is_file(), path
    for module, name in re.findall(r"`(\w+)\.py: (\w+)`", text):
        assert hasattr(importlib.import_module(module), name), (module, name)


def test_the_papers_equations_are_cited_by_the_functions_that_compute_them():
    rows = re.findall(r"^\|.*\| (Eq\. \d) \| `(\w+)\.py: (\w+)`", METHOD, re.M)
    assert [row[0] for row in rows] == ["Eq. 6", "Eq. 7", "Eq. 8", "Eq. 9"]
    for equation, module, name in rows:
        assert equation in getattr(importlib.import_module(module), name).__doc__


def test_the_citation_names_the_paper_and_the_version():
    citation, project = ((ROOT / name).read_text() for name in ("CITATION.cff", "pyproject.toml"))
    assert re.search(r"https://arxiv.org/abs/1709.09603", citation)
    version = re.search(r"^version: (.+)$", citation, re.M)[1]
    assert f'"{version}"' in project + (ROOT / "grassmann_optimizer.py").read_text()


class Run:
    """A published run: options, test error, and the training loss at each epoch, as the median of three."""

    def __init__(self, path):
        epochs = log_lines(path)
        losses = [epoch["train_loss"] for epoch in epochs]
        self.loss = {end: median(losses[end - 3 : end]) for end in range(3, len(losses) + 1)}
        self.errors = [100 - epoch["test_acc"] for epoch in epochs]
        self.error = self.errors[-1]
        self.options = json.loads((path / "config.json").read_text())["options"]
        self.evaluation = "".join(file.read_text() for file in path.glob("evaluation.txt"))
        self.rates = [rate for rate in map(self.options.get, ("lr", "lrg")) if rate is not None]

    def row(self, *ends):  # as the page writes them
        return [*(f"{self.loss[end]:#.3g}" for end in ends), f"{self.error:.2f}"]

    def fall(self, start, end):
        """How far the lowest loss of a phase's second half is below that of the first."""
        losses = [self.loss[epoch] for epoch in range(start + 3, end + 1)]
        half = (len(losses) + 1) // 2
        return min(losses[half:]) / min(losses[:half]) - 1


def runs(experiment, network, method="*", seed="*", images=1000):
    folder = f"{experiment}/cifar10-jpeg-{images}/{network.lower()}/{method}"
    return list(map(Run, sorted(PUBLISHED.glob(f"{folder}/{seed}"))))


@pytest.mark.parametrize(("network", "column"), [("VGG-11", 4), ("WRN-16-2", 7)])
def test_the_tables_of_the_claims_are_the_logs(network, column):
    """Ends of phases, plateau, test error, and what the two tables of claims say of them."""
    ours = slice(column, column + 3)
    seeds = [runs("whole-schedule", network, method) for method in METHODS]
    for row, end in zip(table(RESULTS, "training loss at the end of epochs"), ENDS, strict=True):
        losses = [median(run.loss[end] for run in of_method) for of_method in seeds]
        assert row[ours] == [f"{loss:#.3g}" for loss in losses]
    for row, phase in zip(table(RESULTS, "epochs"), pairwise(ENDS), strict=True):
        assert row[ours] == [f"{median(run.fall(*phase) for run in of_method):+.0%}" for of_method in seeds]
    errors = [[run.error for run in of_method] for of_method in seeds]
    [_, n, *cells] = next(row for row in table(RESULTS, "test error (%)") if row[0] == network)
    assert cells == [f"{median(e):.2f} ({min(e):.2f} to {max(e):.2f})" for e in errors]
    points = [f"{median(errors[0]) - median(e):.1f}" for e in errors[1:]]
    for text in (README, RESULTS):
        assert f"{network} (n = {n})" in text
        claims = [row[column // 3 + 1] for row in table(text, "claim") if "own rates" not in row[0]]
        loss, _, error = (re.findall(r"\d+\.\d+", claim) for claim in claims[:3])
        assert loss == [f"{loss / losses[0]:.2g}" for loss in losses[1:]]
        assert error in (points, [f"{median(e):.2f}" for e in errors])


def test_the_papers_numbers_and_curves():
    """Those that stand beside the tables of logs; the curves' values before each drop, and their plateau."""
    for dataset, column in (("CIFAR10", 1), ("CIFAR100", 2), ("SVHN", 3)):
        rows = [row for row in table(RESULTS, "the paper, all not run here yet") if row[column]]
        said = {row[0].lower(): tuple(map(float, row[column].split(" / "))) for row in rows}
        assert said == PAPER[dataset].errors
    for column, method in enumerate(NAMES, start=1):
        curve = dict(read_paper_curves()["CIFAR-10", "WRN-28-10"][method])
        at_ends = [float(row[column]) for row in table(RESULTS, "training loss at the end of epochs")]
        assert at_ends == [curve[end - 2] for end in ENDS]
        for row, (start, end) in zip(table(RESULTS, "epochs"), pairwise(ENDS), strict=True):
            half = (end - start) / 2
            first, second = (min(curve[e] for e in curve if 0 < e - s <= half) for s in (start, end - half))
            assert row[column] == f"{second / first - 1:+.0%}"


def test_the_table_of_one_change_after_the_other():
    """Seed 0: each row's run is the one with the paper's options but for those that the row names."""
    paper = {run.options["optim_method"]: run for run in runs("whole-schedule", "WRN-16-2", seed="seed0")}
    changed = [run for name in ("one-change", "measured") for run in runs(name, "WRN-16-2", seed="*seed0")]
    rows = table(RESULTS, "WRN-16-2, seed 0")
    assert len(rows) == len(paper) + len(changed)
    for name, *numbers in rows:
        wanted = paper[NAMES[name.split(" ")[0]]].options | given(" ".join(re.findall(r"`(.*?)`", name)))
        [run] = [run for run in (*paper.values(), *changed) if run.options == wanted]
        assert numbers == run.row(120, 200), name


def test_the_table_of_each_methods_own_rates():
    """The grid's best; the whole schedule with them where it was run; what the table of claims says of it."""
    last = {}
    for name, held_out, *numbers in table(RESULTS, "at `lr`, `lrg`"):
        network, label, rates = re.match(r"(.*): (.*) at (.*)", name).groups()
        method = NAMES[label]
        best = min(runs("grid", network, method, images=2000), key=lambda run: run.error)
        assert ([held_out], list(map(float, rates.split(", ")))) == (best.row(), best.rates)
        whole = runs("own-rates", network, method, "seed0") + runs("whole-schedule", network, method, "seed0")
        found = [run.row(*ENDS) for run in whole if run.rates == best.rates]
        assert [numbers] == (found or [["not run", *[""] * len(ENDS)]])
        last[network, label] = numbers[-2:]
    claims = [row for row in table(RESULTS, "claim") if "own rates" in row[0]]
    for network, place in (("VGG-11", 2), ("WRN-16-2", 3)):
        (loss, error), (of_sgd, error_of_sgd) = (map(float, last[network, m]) for m in ("SGD-G", "SGD"))
        said = re.findall(r"\d+\.\d+", " ".join(row[place] for row in claims))
        assert said == [f"{loss / of_sgd:.2f}", f"{error_of_sgd - error:.1f}"]


def test_the_table_of_more_data():
    """Seed 0: the ends of phases that are reached, errors after 130 epochs, at the end, and of all images."""
    for name, *cells in table(RESULTS, "WRN-16-2, images"):
        images, method = name.replace(",", "").split(": ")
        [run] = runs("whole-schedule", "WRN-16-2", NAMES[method], "seed0", images)
        losses = [f"{run.loss[end]:#.3g}" if end in run.loss else "" for end in ENDS]
        error = f"{run.error:.2f}" if len(run.errors) == ENDS[-1] else ""
        of_all = re.findall(r"10,000 test.*\nloss .* top-1 error (.*?)%", run.evaluation)
        assert cells == [*losses, f"{run.errors[129]:.2f}", error, *(of_all or [""])], name


def test_the_table_of_the_geometry():
    """The first rows are SGD-G's whole schedules, the others results of benchmarks/peers.py."""
    rows = {name: cells for name, *cells in table(RESULTS, "VGG-11, the geometry")}
    for seed, run in enumerate(runs("whole-schedule", "VGG-11", "SGDG")):
        assert rows.pop(f"SGD-G, seed {seed}") == [*run.row(*ENDS), ""]
    for file in (PUBLISHED / "peers/vgg-11").glob("oblique-*.json"):
        found = json.loads(file.read_text())
        ends = [f"{median(found['epochs']['train_loss'][end - 3 : end]):#.3g}" for end in ENDS]
        errors = [f"{error:.2f}" for error in (found["epochs"]["test_error"][-1], found["test"]["error"])]
        assert rows.pop(f"both replaced, seed {found['options']['seed']}") == [*ends, *errors]
    assert not rows


def test_the_table_of_the_last_layers():
    """As benchmarks/last_layer.py wrote it, each in the column of its method."""
    written = {method: [] for method in METHODS}
    for name in ("wrn-16-2-seed2", "wrn-16-2-seed1", "wrn-16-2-own-rates", "vgg-11-seed1"):  # as the rows
        for i, run in enumerate(json.loads((PUBLISHED / f"last-layer/{name}.json").read_text())["runs"]):
            losses = f"{run['loss']:#.3g}" + (f", {run['loss_at_first_length']:#.3g}" if i else "")
            written[run["run"].split("/")[3]].append(f"{run['length']:.2f}: {losses}")
    _, *columns = zip(*table(RESULTS, "last layer's length: loss, loss at SGD's length"), strict=True)
    assert [list(filter(None, column)) for column in columns] == list(written.values())
