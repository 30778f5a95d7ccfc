"""scripts/subset.py: the first images of each class, the same ones for everyone."""

import sys

import pytest
import subset
from helpers import call, contents


def take(monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", ["subset.py", *map(str, words)])
    return subset.main()


def test_takes_the_first_images_of_each_class_by_name(images_root, tmp_path, monkeypatch, capsys):
    assert take(monkeypatch, images_root, tmp_path / "few", "--train", 5, "--test", 2) == 0
    assert "21 images" in capsys.readouterr().out
    expected = {
        name: image
        for name, image in contents(images_root).items()
        if int(name[-6:-4]) < (5 if name.startswith("train") else 2)
    }
    assert contents(tmp_path / "few") == expected
    outcome = call("--dataset", "folder", "--dataroot", tmp_path / "few", "--summary", "--depth", 10)
    assert (outcome.code, outcome.err) == (0, "")


@pytest.mark.parametrize(
    ("source", "train", "test", "message"),
    [
        ("images", 17, 1, "train should hold one folder for each class, each with at least 17 images"),
        ("images", 1, 0, "test should hold"),
        ("images/train/class0", 1, 1, "class0/train"),
    ],
)
def test_a_mistake_is_one_sentence_and_writes_nothing(
    source, train, test, message, images_root, tmp_path, monkeypatch, capsys
):
    words = [images_root.parent / source, tmp_path / "few", "--train", train, "--test", test]
    assert take(monkeypatch, *words) == 2
    error = capsys.readouterr().err
    assert error.startswith("subset.py: error: ")
    assert error.count("\n") == 1
    assert message in error
    assert not (tmp_path / "few").exists()


def test_what_is_there_is_left_alone(images_root, tmp_path, monkeypatch, capsys):
    assert take(monkeypatch, images_root, tmp_path, "--train", 1, "--test", 1) == 2
    assert "exists" in capsys.readouterr().err
    assert contents(tmp_path) == {}
