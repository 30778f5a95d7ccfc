"""Folders of images: what is found, what is read, and that a damaged file is named; a fuzz of the reader.

A failure of the fuzz names the seed of its file: FUZZ_SEED=<seed> pytest -m "long or not long" -k fuzz
"""

import io
import os
import secrets
import shutil
import socket
import struct
import zlib
from pathlib import Path

import cv2
import numpy as np
import pytest
from helpers import call, make_images
from PIL import Image

from data import load_data
from utils import UserError

RED, GREEN = (200, 10, 10), (20, 180, 30)  # RGB


def write_image(path, rgb=RED, size=(32, 32)):
    path.parent.mkdir(parents=True, exist_ok=True)
    image = np.full((*size, 3), rgb[::-1], np.uint8)
    cv2.imwrite(str(path), image)


def encoded(kind: str, image: np.ndarray, *options: int) -> bytes:
    """The image's file; of RGB, as everything here."""
    ok, content = cv2.imencode(kind, image[..., ::-1] if image.ndim == 3 else image, options)
    assert ok
    return content.tobytes()


def with_pillow(image: Image.Image, kind: str, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def read_one(path: Path, content: bytes) -> np.ndarray:
    """The only image of the data set that `path` (DIR/test/<class>/...) makes, as (32, 32, 3) RGB."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    loaded = load_data("folder", path.parents[2], evaluation=True)
    assert loaded.test_images.shape == (1, 32, 32, 3)
    return loaded.test_images[0]


def noise(*shape: int, high: int = 256, dtype=np.uint8) -> np.ndarray:
    return np.random.default_rng(0).integers(0, high, shape or (32, 32, 3), dtype)


def reads(kind: str) -> pytest.MarkDecorator:
    """Not every build of OpenCV has it."""
    return pytest.mark.skipif(not cv2.haveImageWriter(kind), reason=f"OpenCV without {kind}")


@pytest.fixture
def folder(tmp_path):
    """Two classes, two training images and one test image each."""
    for part, count in (("train", 2), ("test", 1)):
        for name, rgb in (("red", RED), ("green", GREEN)):
            for i in range(count):
                write_image(tmp_path / part / name / f"{i}.png", rgb)
    return tmp_path


class TestFolder:
    def test_reads_classes_in_order_as_rgb(self, folder, monkeypatch):
        loaded = load_data("folder", folder, dataset_name="colours")
        assert loaded.name == "colours"
        assert loaded.classes == ("green", "red")
        assert loaded.train_labels.tolist() == [0, 0, 1, 1]
        assert loaded.test_labels.tolist() == [0, 1]
        assert loaded.train_labels.dtype == np.int64
        assert (loaded.train_images[0] == GREEN).all()
        assert (loaded.test_images[1] == RED).all()
        assert loaded.flip
        np.testing.assert_allclose(loaded.mean, np.mean([RED, GREEN], 0))
        np.testing.assert_allclose(loaded.std, np.std([RED, GREEN], 0))
        assert load_data("folder", folder).name == "folder"
        monkeypatch.setenv("HOME", str(folder))
        assert load_data("folder", "~").sha256 == loaded.sha256

    def test_extensions_greyscale_and_sizes_mix_and_hidden_files_are_ignored(self, folder):
        red = folder / "train" / "red"
        for name, size in (
            ("a.jpg", (32, 32)),
            ("b.JPEG", (100, 37)),
            ("c.bmp", (8, 8)),
            ("d.WebP", (20, 64)),
        ):
            write_image(red / name, RED, size)
        cv2.imwrite(str(red / "e.PNG"), np.full((40, 32), 99, np.uint8))
        cv2.imwrite(str(red / "f.png"), np.full((32, 32, 4), (10, 10, 200, 0), np.uint8))
        (red / ".hidden.png").write_text("not a image")
        (red / "notes.txt").write_text("not a image")
        (folder / "train" / ".cache").mkdir()
        (folder / "train" / "readme.md").write_text("")
        loaded = load_data("folder", folder)
        assert loaded.classes == ("green", "red")
        # green: 0, 1; red: 0, 1, a, b, c, d, e, f
        assert loaded.train_images.shape == (10, 32, 32, 3)
        assert loaded.train_labels.tolist() == [0] * 2 + [1] * 8
        for index in (4, 5, 6, 7, 9):
            np.testing.assert_allclose(loaded.train_images[index], np.full((32, 32, 3), RED), atol=4)
        assert (loaded.train_images[8] == 99).all()

    def test_the_threads_keep_the_order_of_many_images(self, folder):
        generator = np.random.default_rng(0)
        noise = generator.integers(0, 256, (300, 32, 32, 3), dtype=np.uint8)
        for i, image in enumerate(noise):
            cv2.imwrite(str(folder / "train" / "red" / f"noise{i:03}.png"), image[..., ::-1])
        loaded = load_data("folder", folder)
        found = loaded.train_images[
            [(image == noise[0]).all() for image in loaded.train_images].index(True) :
        ][:300]
        np.testing.assert_array_equal(found, noise)

    def test_a_larger_image_is_averaged(self, folder):
        stripes = np.zeros((128, 128, 3), np.uint8)
        stripes[:, ::4] = (
            240  # one column of each four that become one; bilinear sampling would see the middle two
        )
        cv2.imwrite(str(folder / "test" / "green" / "0.png"), stripes)
        assert (load_data("folder", folder).test_images[0] == 60).all()

    def test_a_constant_channel_can_be_divided_by(self, folder):
        for path in (folder / "train").rglob("*.png"):
            write_image(path, (5, path.parent.name == "red", 7))
        assert load_data("folder", folder).std == (1.0, 0.5, 1.0)

    @pytest.mark.parametrize("what", ["fifo", "socket", "device", "missing"])
    def test_what_is_no_file_is_named_and_never_opened(self, folder, what, monkeypatch):
        path = folder / "test" / "green" / "odd.png"
        if what == "fifo":
            os.mkfifo(path)
        elif what == "socket":
            monkeypatch.chdir(path.parent)  # a socket's name must be short
            socket.socket(socket.AF_UNIX).bind(path.name)
        else:
            path.symlink_to("/dev/zero" if what == "device" else "nowhere")
        reason = "No such file or directory" if what == "missing" else "not a regular file"
        with pytest.raises(UserError, match=rf"cannot read .*test/green/odd.png \({reason}\)"):
            load_data("folder", folder)

    @pytest.mark.parametrize("part", ["train", "test"])
    def test_a_missing_part_is_named(self, folder, part):
        (folder / part).rename(folder / "elsewhere")
        with pytest.raises(UserError, match=f"{folder / part}.*No such file"):
            load_data("folder", folder)

    def test_a_part_without_classes_is_named(self, tmp_path):
        (tmp_path / "train").mkdir()
        with pytest.raises(UserError, match=f"{tmp_path / 'train'} has no class folder"):
            load_data("folder", tmp_path)

    @pytest.mark.parametrize("part", ["train", "test"])
    def test_an_empty_class_is_named(self, folder, part):
        for path in (folder / part / "red").iterdir():
            path.unlink()
        with pytest.raises(UserError, match=f"{folder / part / 'red'} has no image"):
            load_data("folder", folder)

    @pytest.mark.parametrize("part", ["train", "test"])
    def test_classes_that_differ_are_named(self, folder, part):
        write_image(folder / part / "blue" / "0.png")
        with pytest.raises(UserError, match="differ in: blue"):
            load_data("folder", folder)

    def test_folders_in_class_folders_are_read_as_by_torchvision(self, folder):
        from torchvision.datasets import ImageFolder

        red = folder / "train" / "red"
        for number, name in enumerate(
            ("a/1.png", "a-b/1.png", "a/c/0.png", "a/c/Z.png", "z.png", "A 1/y.png")
        ):
            write_image(red / name, (number, 0, 99))
        for place in (red / "a" / "c" / "round", red / "b" / "round"):
            place.parent.mkdir(exist_ok=True)
            place.symlink_to(red)
        write_image(red / ".hidden" / "0.png")
        (folder / "other").mkdir()
        write_image(folder / "other" / "0.png", (77, 0, 99))
        (red / "linked").symlink_to(folder / "other")
        loaded = load_data("folder", folder)
        shutil.rmtree(red / ".hidden")  # torchvision would read it, and go round
        (red / "a" / "c" / "round").unlink()
        (red / "b" / "round").unlink()
        expected = ImageFolder(folder / "train")
        assert loaded.train_labels.tolist() == expected.targets
        for image, (other, _) in zip(loaded.train_images, expected, strict=True):
            assert np.array_equal(image, np.asarray(other))

    def test_says_what_was_found_and_what_was_passed_over(self, folder, capsys):
        load_data("folder", folder)
        assert (
            capsys.readouterr().out == "images: 4 to train and 2 to test, in 2 classes: green 2+1, red 2+1\n"
        )
        for name in ("0.png", "train/0.png", "train/red/a/notes.txt", "test/red/0.psd", "test/.DS_Store"):
            write_image(folder / "new.png")
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / "new.png").rename(folder / name)
        write_image(folder / "train/red/a/more.TIF")
        load_data("folder", folder)
        found, note = capsys.readouterr().out.splitlines()
        assert found == "images: 5 to train and 2 to test, in 2 classes: green 2+1, red 3+1"
        assert note.startswith(f"note: files passed over: 4, such as {folder}/0.png; read are .avif, .bmp, ")

    def test_for_evaluation_the_test_part_is_enough(self, folder, capsys):
        whole = load_data("folder", folder, evaluation=True)
        assert whole.sha256 == load_data("folder", folder).sha256
        shutil.rmtree(folder / "train")
        capsys.readouterr()
        part = load_data("folder", folder, evaluation=True)
        assert capsys.readouterr().out == "images: 2 to test, in 2 classes: green 1, red 1\n"
        assert np.array_equal(part.test_images, whole.test_images)
        assert part.test_labels.tolist() == [0, 1]
        assert part.train_images.shape == (0, 32, 32, 3)
        assert (part.train_images.dtype, part.train_labels.dtype) == (np.uint8, np.int64)
        np.testing.assert_allclose(part.mean, np.mean([RED, GREEN], 0))
        with pytest.raises(UserError, match="train"):
            load_data("folder", folder)

    def test_old_checkpoints_find_their_images(self, tmp_path):
        """What older versions could read stays as it was, in order and pixels: a checkpoint knows both."""
        grey = noise(32, 32)
        files = {
            "b.png": encoded(".png", noise()),
            "B.png": encoded(".png", noise(32, 32, 3, high=65536, dtype=np.uint16)),
            "a.bmp": encoded(".bmp", 255 - noise()),
            "é.WebP": encoded(".webp", noise() // 2, cv2.IMWRITE_WEBP_QUALITY, 101),  # without loss
            "c d.PNG": encoded(".png", np.dstack([noise(), grey])),
            "a-1.png": encoded(".png", grey),
            "a.png": with_pillow(Image.fromarray(grey).quantize(16), "png"),
        }
        for part in ("train", "test"):
            for number, label in enumerate(("Z", "a", "a b")):
                (tmp_path / part / label).mkdir(parents=True)
                for name in list(files)[number:]:
                    (tmp_path / part / label / name).write_bytes(files[name])
        digest = "09c181a6de096b3b857f5a91fdb6b55455a0107a3d113d6874946dbf36ecf063"
        assert load_data("folder", tmp_path).sha256 == digest


OTHERS = [Image.new("RGB", (32, 32))]  # further images of the same file


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.tif", encoded(".tif", noise())),
        ("a.TIFF", with_pillow(Image.fromarray(noise()), "tiff", compression="tiff_deflate")),
        ("a.ppm", encoded(".ppm", noise())),
        ("a.jp2", with_pillow(Image.fromarray(noise()), "jpeg2000")),
        ("cut-off.png", encoded(".png", noise()) + b"what follows the end"),
        ("frames.tif", with_pillow(Image.fromarray(noise()), "tiff", save_all=True, append_images=OTHERS)),
    ],
)  # fmt: skip
def test_is_read_as_it_was_written(name, content, tmp_path, capfd):
    assert np.array_equal(read_one(tmp_path / "test" / "a" / name, content), noise())
    assert capfd.readouterr().err == ""


@reads(".gif")
def test_of_a_gif_the_first_image_is_read(tmp_path):
    first, second = (Image.new("RGB", (32, 32), colour).quantize() for colour in (RED, GREEN))
    content = with_pillow(first, "gif", save_all=True, append_images=[second])
    assert (read_one(tmp_path / "test" / "a" / "a.gif", content) == RED).all()


@reads(".avif")
def test_an_avif_of_any_depth_is_read(tmp_path):
    deep = np.full((32, 32, 3), RED, np.uint16) * 4
    for content in (
        encoded(".avif", np.full((32, 32, 3), RED, np.uint8)),
        encoded(".avif", deep, cv2.IMWRITE_AVIF_DEPTH, 10),
    ):
        np.testing.assert_allclose(
            read_one(tmp_path / "test" / "a" / "a.avif", content), np.full((32, 32, 3), RED), atol=6
        )


def test_a_kind_that_this_opencv_lacks_is_said(tmp_path, monkeypatch):
    monkeypatch.setattr(cv2, "haveImageWriter", lambda kind: kind != ".gif")
    monkeypatch.setattr(cv2, "imdecode", lambda *_: None)
    with pytest.raises(UserError, match=r"a.gif: OpenCV \S+ was built without .gif"):
        read_one(tmp_path / "test" / "a" / "a.gif", b"GIF89a")


class TestDepth:
    @pytest.mark.parametrize("kind", [".png", ".tif", ".ppm"])
    def test_16_bits_become_8(self, kind, tmp_path):
        deep = noise(32, 32, 3, high=65536, dtype=np.uint16)
        found = read_one(tmp_path / "test" / "a" / f"a{kind}", encoded(kind, deep))
        assert (np.abs(found.astype(int) - deep / 257) <= 1).all()

    @pytest.mark.parametrize("high", [1024, 4096])
    @pytest.mark.parametrize("kind", [".png", ".tif", ".ppm"])
    def test_what_would_be_black_is_refused(self, kind, high, tmp_path):
        shallow = noise(32, 32, high=high, dtype=np.uint16)
        with pytest.raises(
            UserError, match=rf"a{kind} would be black: its 16-bit values end at {shallow.max()},"
        ):
            read_one(tmp_path / "test" / "a" / f"a{kind}", encoded(kind, np.dstack([shallow] * 3)))

    def test_what_is_dark_is_read(self, tmp_path):
        stars = np.zeros((640, 640), np.uint16)
        stars[::160, ::160] = 65535
        assert read_one(tmp_path / "test" / "a" / "a.png", encoded(".png", stars)).max() < 16
        for dtype in (np.uint8, np.uint16):
            assert not read_one(
                tmp_path / "test" / "a" / "a.png", encoded(".png", np.zeros((32, 32), dtype))
            ).any()

    def test_other_numbers_are_refused(self, tmp_path):
        with pytest.raises(UserError, match=r"cannot decode .*a\.tif"):
            read_one(tmp_path / "test" / "a" / "a.tif", with_pillow(Image.new("F", (32, 32), 0.5), "tiff"))


def png(width, height, pixels=b"", more=b"") -> bytes:
    """A PNG of 8-bit RGB from its parts; each row of `pixels` begins with a 0. `more`: further chunks."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    parts = [(b"IHDR", header), (b"IDAT", zlib.compress(pixels)), (b"IEND", b"")]
    first, *rest = (chunk(kind, data) for kind, data in parts)
    return b"\x89PNG\r\n\x1a\n" + first + more + b"".join(rest)


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def flipped(content: bytes, *places: int) -> bytes:
    """With a bit of each of these bytes flipped."""
    damaged = bytearray(content)
    for place in places:
        damaged[place] ^= 0x40
    return bytes(damaged)


PIXELS = b"".join(b"\0" + row.tobytes() for row in noise())
JPEG = encoded(".jpg", noise(128, 128, 3))
PROGRESSIVE = encoded(".jpg", noise(128, 128, 3), cv2.IMWRITE_JPEG_PROGRESSIVE, 1)
JPEG_IN_TIFF = with_pillow(Image.fromarray(noise(128, 128, 3)), "tiff", compression="jpeg")
BMP = encoded(".bmp", noise())
DAMAGED = {
    "empty.png": b"",
    "text.jpg": b"not a image",
    "cut.png": encoded(".png", noise())[:1000],
    "crc.png": flipped(encoded(".png", noise()), 500),
    "huge.png": png(2**31 - 1, 2**31 - 1),
    "bomb.png": png(60_000, 60_000),
    "length.png": flipped(encoded(".png", noise()), 33),
    "short.png": png(32, 32, PIXELS[:100]),
    "text-crc.png": png(32, 32, PIXELS, chunk(b"tEXt", b"a\0b")[:-1] + b"x"),
    "cut.jpg": JPEG[: len(JPEG) // 2],
    "no-end.jpg": JPEG[:-2],
    "flips.jpg": flipped(JPEG, *range(800, len(JPEG), 97)),
    "progressive.jpg": flipped(PROGRESSIVE, *range(800, len(PROGRESSIVE), 97)),
    "cut.bmp": BMP[:1000],
    "head.bmp": BMP[:30],
    "huge.bmp": BMP[:18] + struct.pack("<i", 2**30) + BMP[22:],
    "cut.webp": encoded(".webp", noise())[:1000],
    "cut.tif": encoded(".tif", noise())[:1000],
    "jpeg-in.tif": flipped(JPEG_IN_TIFF, *range(800, 9000, 97)),
    "cut.jp2": encoded(".jp2", noise())[:500],
    "cut.gif": b"GIF89a\x20\0\x20\0",
}  # fmt: skip


@pytest.mark.parametrize("name", DAMAGED)
def test_a_damaged_image_is_named_once(name, folder, capfd):
    path = folder / "test" / "green" / name
    path.write_bytes(DAMAGED[name])
    with pytest.raises(UserError) as caught:
        load_data("folder", folder)
    assert str(path) in str(caught.value)
    assert "mend or remove it" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert capfd.readouterr().err == ""  # not even what the C libraries say of themselves


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("profile.png", png(32, 32, PIXELS, chunk(b"iCCP", b"icc\0\0" + zlib.compress(bytes(200))))),
        ("revision.jpg", JPEG.replace(b"JFIF\0\1\1", b"JFIF\0\7\1", 1)),
    ],
)
def test_what_harms_no_pixel_is_read_without_a_word(name, content, folder, capfd):
    (folder / "test" / "green" / name).write_bytes(content)
    assert len(load_data("folder", folder).test_labels) == 3
    assert capfd.readouterr().err == ""


def test_any_name_will_do(tmp_path):
    """Names of bytes that are no UTF-8, of lines and of markup: training, evaluation, and what they print."""
    images, names = make_images(tmp_path / "images"), [b"a\nb|<b>", b"\xff\"'`*", b"\x1b[31m"]
    for part in ("train", "test"):
        for number, name in enumerate(names):
            place = os.fsencode(images / part)
            os.rename(place + b"/class%d" % number, os.path.join(place, name))
            os.rename(os.path.join(place, name, b"00.png"), os.path.join(place, name, b"\xfe\n.png"))
    loaded = load_data("folder", images, "x\ny\udcff")
    for name in (loaded.name, *loaded.classes):
        assert name.isprintable()
        assert name.encode()
    assert loaded.classes == ("\\x1b[31m", "a\\nb|<b>", "\\udcff\"'`*")
    data = ["--dataset", "folder", "--dataroot", images, "--batchSize", 16, "--depth", 10, "--width", 1]
    assert call(*data, "--epochs", 1, "--epoch_step", "[]", "--save", tmp_path / "run").code == 0
    outcome = call("--eval", "--resume", tmp_path / "run")
    assert (outcome.code, outcome.err) == (0, "")
    assert outcome.out.encode()
    for name in loaded.classes:
        assert f"\n  {name:30} " in outcome.out


# A fuzz of the reader: files of every kind, damaged at random


def smooth() -> np.ndarray:
    """(48, 40, 3): a image that a lossy format stores in a few blocks with many coefficients."""
    return cv2.resize(noise(9, 9, 3), (40, 48), interpolation=cv2.INTER_CUBIC)


KINDS = (".jpg", ".png", ".bmp", ".webp", ".tif", ".ppm", ".jp2", ".gif", ".avif")
ORIGINALS = {
    **{f"a{kind}": encoded(kind, smooth()) for kind in KINDS if cv2.haveImageWriter(kind)},
    "progressive.jpg": encoded(".jpg", smooth(), cv2.IMWRITE_JPEG_PROGRESSIVE, 1),
    "lossless.webp": encoded(".webp", smooth(), cv2.IMWRITE_WEBP_QUALITY, 101),
    "cmyk.jpg": with_pillow(Image.fromarray(smooth()).convert("CMYK"), "jpeg"),
    "palette.png": with_pillow(Image.fromarray(smooth()).quantize(16), "png"),
    "deep.png": encoded(".png", smooth().astype(np.uint16) * 257),
    "deep.tif": encoded(".tif", smooth().astype(np.uint16) * 257),
    "fax.tif": with_pillow(Image.fromarray(smooth()).convert("1"), "tiff", compression="group4"),
    "jpeg-in.tif": with_pillow(Image.fromarray(smooth()), "tiff", compression="jpeg"),
    "grey.pgm": encoded(".pgm", smooth()[..., 0]),
}  # fmt: skip


def damaged(content: bytes, random: np.random.Generator) -> bytes:
    """Cut off, with bits flipped, with bytes replaced, taken out or put in, or with another number ahead."""
    result, place = bytearray(content), int(random.integers(len(content)))
    how = random.integers(4)
    if how == 0:
        del result[place:]
    elif how == 1:
        for other in random.integers(len(content), size=random.integers(1, 9)):
            result[other] ^= 1 << random.integers(8)
    elif how == 2:
        result[place : place + int(random.integers(64))] = random.bytes(int(random.integers(64)))
    else:
        start = int(random.integers(min(200, len(content) - 4)))
        result[start : start + 4] = random.choice(
            [b"\0\0\0\0", b"\xff\xff\xff\xff", b"\x7f\xff\xff\xff", b"\0\0\xff\xff"]
        )
    return bytes(result)


@pytest.mark.parametrize("count", [2000, pytest.param(60_000, marks=pytest.mark.long)])
def test_fuzz(count, tmp_path, capfd):
    """Whatever a file holds: it is read, or one sentence names it, and the C libraries are not heard.

    A file that is cut off is never another image; nor is a PNG, which has checksums.
    """
    given = os.environ.get("FUZZ_SEED")
    first = secrets.randbits(32) if count > 10_000 else 0
    pixels = {
        name: read_one(tmp_path / name / "test" / "a" / name, content) for name, content in ORIGINALS.items()
    }
    for seed in [int(given)] if given else range(first, first + count):
        random = np.random.default_rng(seed)
        name = list(ORIGINALS)[random.integers(len(ORIGINALS))]
        content, path = damaged(ORIGINALS[name], random), tmp_path / "test" / "a" / name
        where = f"FUZZ_SEED={seed}, {name}"
        image, problem = None, None
        try:
            image = read_one(path, content)
        except UserError as error:
            problem = str(error)
        except Exception as error:
            raise AssertionError(where) from error
        if image is None:
            assert str(path) in problem, where
            assert "\n" not in problem, where
        elif name.endswith(".png") or ORIGINALS[name].startswith(content):
            assert np.array_equal(image, pixels[name]), where
        path.unlink()
        assert capfd.readouterr().err == "", where
