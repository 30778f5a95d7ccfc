"""The README and docs/method.md say what the code does: flags, defaults, commands, code, paths."""

import importlib
import re
import shlex

import pytest
import torch
from helpers import ROOT
from torch.nn.functional import cross_entropy

import main
from resnet import WideResNet

PAGES = ["README.md", "docs/method.md"]
# Flags of other programs that the README mentions, and where they come from.
OTHER_FLAGS = {"--all": "scripts/test.sh", "--print": "scripts/sweep.sh", "--logdir": None} | dict.fromkeys(
    ("--markdown", "--csv", "--plots", "--x"), "scripts/summarize.py"
)
# Written by runs, not kept in the repository.
MADE_BY_RUNS = {
    "config.json",
    "log.txt",
    "checkpoint.pt",
    "logs/quickstart/curves.png",
    "commands.txt",
    "output.txt",
    "docs/table1.md",
}


def visible(page):
    """The text of a page as a reader sees it: without HTML comments."""
    return re.sub(r"<!--.*?-->", "", (ROOT / page).read_text(), flags=re.S)


README = visible("README.md")
TABLE_ROWS = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in re.findall(r"^\|.*\|$", README, re.M)]


def actions():
    """The parser's own actions by flag, --help left out."""
    return {flag: a for a in main.make_parser()._actions for flag in a.option_strings if a.dest != "help"}


def code_blocks():
    return re.findall(r"^```python\n(.*?)^```", README, re.M | re.S)


def test_flags_are_those_of_the_parser():
    named = set(re.findall(r"(?<![\w-])--[a-zA-Z]\w*", README)) - {"--help"}
    assert named - OTHER_FLAGS.keys() == actions().keys()
    for flag, file in OTHER_FLAGS.items():
        assert flag in named
        assert file is None or flag in (ROOT / file).read_text()


def test_default_of_each_flag():
    """The three-column tables: flag, default, meaning."""
    rows = {row[0].split(",")[0].strip("`"): row[1].strip("`") for row in TABLE_ROWS if len(row) == 3}
    paper = main.paper_values("resnet", "CIFAR10", "SGD")
    for action in main.make_parser()._actions:
        said, name = rows.get(action.option_strings[0]), action.dest
        if name in main.LEGACY:
            assert said == main.LEGACY[name][0]
        elif name in paper:
            assert said == "the paper's", name
        elif name not in {"help", "cuda", "save", "dataset_name"}:
            default = (main.DEFAULTS | main.PER_CALL)[name]
            if default is None or default is False:
                assert said == {None: "none", False: "off"}[default], name
            else:
                assert type(default)(said) == default, name


@pytest.mark.parametrize(("number", "dataset"), [(0, "CIFAR10"), (1, "SVHN")])
def test_the_papers_values(number, dataset):
    heads = [i for i, row in enumerate(TABLE_ROWS) if row == ["flag", "SGD", "SGDG", "AdamG"]]
    values = len(main.paper_values("resnet", dataset, "SGD"))
    table = {row[0].strip("`"): row[1:] for row in TABLE_ROWS[heads[number] + 2 :][:values]}
    dests = {actions()[flag].dest: flag for flag in table}
    for column, method in enumerate(("SGD", "SGDG", "AdamG")):
        expected = main.paper_values("resnet", dataset, method)
        assert dests.keys() == expected.keys()
        for dest, value in expected.items():
            said = table[dests[dest]][column]
            assert (None if said == "none" else actions()[dests[dest]].type(said)) == value, (dest, method)


def test_commands_are_accepted():
    commands = re.findall(r"^ +python main\.py (.*)$", README, re.M)
    assert len(commands) >= 6
    for command in commands:
        main.make_parser().parse_args(shlex.split(command))


@pytest.mark.parametrize("number", [0, 1], ids=["groups by the helper", "groups by hand"])
def test_the_code_runs_and_trains(number):
    assert len(code_blocks()) == 3
    torch.manual_seed(0)
    model = WideResNet(depth=10, width=1, num_classes=10)
    names = {"model": model}
    exec(code_blocks()[number], names)
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


@pytest.mark.parametrize("page", PAGES)
def test_links_and_paths_exist(page):
    text = visible(page)
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if link.startswith("https://"):
            continue
        path, _, anchor = link.partition("#")
        target = (ROOT / page).parent / path if path else ROOT / page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target.read_text()), link
    paths = set(
        re.findall(r"(?<![\w./<>*-])[\w./-]+\.(?:py|sh|md|txt|pt|png|json|toml)\b", re.sub(r"\]\(.*?\)", "", text))
    )
    for path in paths - MADE_BY_RUNS:
        assert (ROOT / path).is_file(), path


def anchors(markdown):
    """The anchors that GitHub gives a page's headings."""
    headings = re.findall(r"^#+ (.+)$", markdown, re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_places_in_the_code_exist():
    places = re.findall(r"`(\w+)\.py: (\w+)`", visible("docs/method.md"))
    assert places
    for module, name in places:
        assert hasattr(importlib.import_module(module), name), (module, name)


def test_the_code_that_measures_runs(capsys):
    model = WideResNet(depth=10, width=1, num_classes=10)
    images, labels = torch.randn(16, 3, 32, 32), torch.arange(16) % 10
    names = {"model": model, "loss_fn": lambda net: cross_entropy(net(images), labels)}
    exec(code_blocks()[2], names)
    assert capsys.readouterr().out.count("True") == 3
    assert len(names["groups"][0]["params"]) == 3


def test_nothing_is_left_to_fill_in():
    assert "<!--" not in README
