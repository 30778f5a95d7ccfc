"""scripts/subset.py: the first images of each class, the same ones for everyone."""

import sys

import pytest
import subset
from helpers import contents


def take(monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", ["subset.py", *map(str, words)])
    return subset.main()


def test_takes_the_first_images_of_each_class_by_name(images_root, tmp_path, monkeypatch, capsys):
    assert take(monkeypatch, images_root, tmp_path / "few", "--train", 5, "--test", 2) == 0
    assert "21 images" in capsys.readouterr().out
    counts, images = {"train": 5, "test": 2}, contents(images_root)
    first = {name: images[name] for name in images if int(name[-6:-4]) < counts[name.split("/")[0]]}
    assert contents(tmp_path / "few") == first


@pytest.mark.parametrize(("source", "target", "train", "test", "message"), [
    ("images", "few", 17, 1, "train should hold one folder for each class, each with at least 17 images"),
    ("images", "few", 1, 0, "test should hold"),
    ("images/train/class0", "few", 1, 1, "class0/train"),
    ("images", "", 1, 1, "exists"),  # what is there is left alone
])  # fmt: skip
def test_a_mistake_is_one_sentence_and_writes_nothing(
    source, target, train, test, message, images_root, tmp_path, monkeypatch, capsys
):
    words = [images_root.parent / source, tmp_path / target, "--train", train, "--test", test]
    assert take(monkeypatch, *words) == 2
    error = capsys.readouterr().err
    assert (error.startswith("subset.py: error: "), error.count("\n")) == (True, 1)
    assert message in error
    assert list(tmp_path.iterdir()) == []
