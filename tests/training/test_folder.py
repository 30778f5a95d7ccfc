"""Folders of images: what is found, what is read, and that a file which cannot be read is named."""

import os
import re
import shutil
from pathlib import Path

import cv2
import numpy as np
import pytest
from helpers import call, make_images

from data import load_data
from utils import UserError

RED, GREEN = (200, 10, 10), (20, 180, 30)  # RGB


def write_image(path, rgb=RED, size=(32, 32)):
    path.parent.mkdir(parents=True, exist_ok=True)
    cv2.imwrite(str(path), np.full((*size, 3), rgb[::-1], np.uint8))


def encoded(kind: str, image: np.ndarray, *options: int) -> bytes:
    """The file of an image, which is RGB as everything here."""
    return cv2.imencode(kind, image[..., ::-1] if image.ndim == 3 else image, options)[1].tobytes()


def assert_refused(folder, *patterns: str) -> None:
    """Loading ends in one line that has all patterns."""
    with pytest.raises(UserError) as caught:
        load_data("folder", folder)
    for pattern in (*patterns, r"^[^\n]+$"):
        assert re.search(pattern, str(caught.value)), caught.value


@pytest.fixture
def folder(tmp_path):
    """Two classes, two training images and one test image each."""
    for name, rgb in (("red", RED), ("green", GREEN)):
        for place in (f"train/{name}/0.png", f"train/{name}/1.png", f"test/{name}/0.png"):
            write_image(tmp_path / place, rgb)
    return tmp_path


@pytest.mark.parametrize("step", [1, -1])
def test_classes_are_in_order_of_their_names_however_they_are_listed(folder, monkeypatch, step):
    """By the file system, which may have any order."""
    listed = lambda path: sorted(map(path.joinpath, os.listdir(path)))[::step]  # noqa: E731
    monkeypatch.setattr(Path, "iterdir", listed)
    loaded = load_data("folder", folder, dataset_name="colours")
    assert (loaded.name, loaded.classes, loaded.flip) == ("colours", ("green", "red"), True)
    assert (loaded.train_labels.tolist(), loaded.test_labels.tolist()) == ([0, 0, 1, 1], [0, 1])
    assert (loaded.train_labels.dtype, loaded.train_images.dtype) == (np.int64, np.uint8)
    assert (loaded.train_images[0] == GREEN).all()
    assert (loaded.test_images[1] == RED).all()
    np.testing.assert_allclose(loaded.mean, np.mean([RED, GREEN], 0))
    np.testing.assert_allclose(loaded.std, np.std([RED, GREEN], 0))


def test_kinds_greyscale_and_sizes_mix_and_hidden_files_are_ignored(folder):
    red, sizes = folder / "train" / "red", {"a.jpg": 32, "b.JPEG": 37, "c.bmp": 8, "d.WebP": 64}
    for name, width in sizes.items():
        write_image(red / name, RED, (20, width))
    cv2.imwrite(str(red / "e.PNG"), np.full((32, 32, 4), (10, 10, 200, 0), np.uint8))
    cv2.imwrite(str(red / "f.png"), np.full((40, 32), 99, np.uint8))
    stripes = np.zeros((128, 128, 3), np.uint8)
    stripes[:, ::4] = 240  # one column of each four that become one: bilinear sampling sees the middle two
    cv2.imwrite(str(red / "g.png"), stripes)
    (red / ".hidden.png").write_text("no image")
    (folder / "train" / ".cache").mkdir()
    loaded = load_data("folder", folder)
    assert loaded.classes == ("green", "red")
    assert loaded.train_labels.tolist() == [0] * 2 + [1] * 9
    np.testing.assert_allclose(loaded.train_images[4:9], np.full((5, 32, 32, 3), RED), atol=4)
    assert (loaded.train_images[9] == 99).all()
    assert (loaded.train_images[10] == 60).all()


def test_a_constant_channel_can_be_divided_by(folder):
    for path in (folder / "train").rglob("*.png"):
        write_image(path, (5, path.parent.name == "red", 7))
    assert load_data("folder", folder).std == (1.0, 0.5, 1.0)


@pytest.mark.parametrize("what", ["fifo", "device", "missing"])
def test_what_is_no_file_is_named_and_never_opened(folder, what):
    path = folder / "test" / "green" / "odd.png"
    if what == "fifo":
        os.mkfifo(path)
    else:
        path.symlink_to("/dev/zero" if what == "device" else "nowhere")
    assert_refused(folder, r"cannot read the image .*test/green/odd.png \(it is no regular file\)")


@pytest.mark.parametrize("part", ["train", "test"])
def test_what_is_wrong_with_the_folders_is_named(folder, part):
    place = folder / part
    write_image(place / "blue" / "0.png")
    assert_refused(folder, "differ in: blue")
    shutil.rmtree(place / "blue")
    shutil.rmtree(place / "red")
    (place / "red").mkdir()
    assert_refused(folder, f"{place / 'red'} has no image")
    for name in ("train", "test"):
        shutil.rmtree(folder / name / "red")
    assert_refused(folder, "folder has a single class, green")
    shutil.rmtree(place / "green")
    assert_refused(folder, f"{place} has no class folder")
    place.rmdir()
    assert_refused(folder, f"{place}.*No such file")


def test_folders_in_class_folders_are_read_as_by_torchvision(folder):
    from torchvision.datasets import ImageFolder

    red, round_ = folder / "train" / "red", folder / "train" / "red" / "a" / "c" / "round"
    for number, name in enumerate(("a/1.png", "a-b/1.png", "a/c/0.png", "a/c/Z.png", "z.png", "A 1/y.png")):
        write_image(red / name, (number, 0, 99))
    write_image(folder / "other" / "0.png", (77, 0, 99))
    (red / "linked").symlink_to(folder / "other")
    round_.symlink_to(red)  # which torchvision would follow round and round
    loaded = load_data("folder", folder)
    round_.unlink()
    expected = ImageFolder(folder / "train")
    assert loaded.train_labels.tolist() == expected.targets
    for image, (other, _) in zip(loaded.train_images, expected, strict=True):
        assert np.array_equal(image, np.asarray(other))


def test_says_what_was_found_and_what_was_passed_over(folder, capsys):
    load_data("folder", folder)
    assert capsys.readouterr().out == "images: 4 to train and 2 to test, in 2 classes: green 2+1, red 2+1\n"
    write_image(folder / "train/red/a/more.TIF")
    for name in ("0.png", "train/0.png", "train/red/a/notes.txt", "test/red/0.psd", "test/.DS_Store"):
        (folder / name).touch()
    load_data("folder", folder)
    found, note = capsys.readouterr().out.splitlines()
    assert found == "images: 5 to train and 2 to test, in 2 classes: green 2+1, red 3+1"
    assert note.startswith(f"note: files passed over: 4, such as {folder}/0.png; read are .avif, .bmp, ")


def test_for_evaluation_the_test_part_is_enough(folder, capsys):
    whole = load_data("folder", folder, evaluation=True)
    assert whole.sha256 == load_data("folder", folder).sha256
    shutil.rmtree(folder / "train")
    capsys.readouterr()
    part = load_data("folder", folder, evaluation=True)
    assert capsys.readouterr().out == "images: 2 to test, in 2 classes: green 1, red 1\n"
    assert np.array_equal(part.test_images, whole.test_images)
    assert part.test_labels.tolist() == [0, 1]
    assert part.train_images.shape == (0, 32, 32, 3)
    np.testing.assert_allclose(part.mean, np.mean([RED, GREEN], 0))
    assert_refused(folder, "train")


def noise(*shape: int, kind=np.uint8) -> np.ndarray:
    return np.random.default_rng(0).integers(0, np.iinfo(kind).max + 1, shape or (32, 32, 3), kind)


def test_old_checkpoints_find_their_images(tmp_path):
    """What older versions could read stays as it was, in order and pixels: a checkpoint knows both."""
    grey = noise(32, 32)
    files = {
        "b.png": encoded(".png", noise()), "B.png": encoded(".png", noise(32, 32, 3, kind=np.uint16)),
        "a.bmp": encoded(".bmp", 255 - noise()), "c d.PNG": encoded(".png", np.dstack([noise(), grey])),
        "é.WebP": encoded(".webp", noise() // 2, cv2.IMWRITE_WEBP_QUALITY, 101),  # without loss
        "a-1.png": encoded(".png", grey),
    }  # fmt: skip
    for place in ("train/Z", "train/a b", "test/Z", "test/a b"):
        (tmp_path / place).mkdir(parents=True)
        for name, content in files.items():
            (tmp_path / place / name).write_bytes(content)
    digest = "5bf17c3a6e9031361f5d8da5370bea7d7d04241142bab4bd8de0064a14ef78d1"
    assert load_data("folder", tmp_path).sha256 == digest


BMP = encoded(".bmp", noise())
BROKEN = {
    "empty.png": b"", "text.jpg": b"no image", "cut.bmp": BMP[:30],
    "cut.webp": encoded(".webp", noise())[:1000], "head.jpg": encoded(".jpg", noise())[:100],
    "cut.jp2": encoded(".jp2", noise())[:100], "huge.bmp": BMP[:18] + b"\0\0\0\x40" + BMP[22:],
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
def test_an_image_that_cannot_be_decoded_is_named_in_one_sentence(name, folder):
    path = folder / "test" / "green" / name
    path.write_bytes(BROKEN[name])
    assert_refused(folder, str(path), "replace or remove it")


def test_any_name_will_do(tmp_path):
    """Names of bytes that are no UTF-8, of lines and of markup: training, evaluation, and what they print."""
    images, names = make_images(tmp_path / "images"), [b"a\nb|<b>", b"\xff\"'`*", b"\x1b[31m"]
    for part in ("train", "test"):
        for number, name in enumerate(names):
            place = os.fsencode(images / part)
            os.rename(place + b"/class%d" % number, os.path.join(place, name))
            os.rename(os.path.join(place, name, b"00.png"), os.path.join(place, name, b"\xfe\n.png"))
    data = ["--dataset", "folder", "--dataroot", images, "--batchSize", 16, "--depth", 10, "--width", 1]
    assert call(*data, "--epochs", 1, "--epoch_step", "[]", "--save", tmp_path / "run").code == 0
    outcome = call("--eval", "--resume", tmp_path / "run")
    assert (outcome.code, outcome.err) == (0, "")
    assert outcome.out.encode()
    for name in ("\\x1b[31m", "a\\nb|<b>", "\\udcff\"'`*"):
        assert f"\n  {name:30} " in outcome.out
