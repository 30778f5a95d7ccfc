"""`--dataset folder`: images in class folders, `<dataroot>/{train,test}/<class>/`, at any depth.

The order is that of torchvision's ImageFolder. Hidden files and folders are left out; what is no image by its
name is counted, and said.
"""

import os
import textwrap
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from pathlib import Path

import cv2
import numpy as np

from utils import UserError, printable, reason

SIZE = 32  # pixels: height and width of every image
EXTENSIONS = (".avif", ".bmp", ".gif", ".jp2", ".jpeg", ".jpg")
EXTENSIONS += (".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")


def read_folder(root: Path, parts: tuple[str, ...]) -> tuple[dict[str, np.ndarray], dict, tuple[str, ...]]:
    """Images (N, 32, 32, 3) uint8 RGB and labels (N,) int64 of each part ("train", "test"), and the classes.

    Prints how many images of which classes there are.

    Raises:
        UserError: a folder is missing, the parts have other classes, a class has no image, or an image cannot
            be read.
    """
    classes = _class_names(root / parts[0])
    for part in parts:
        if odd := set(classes) ^ set(_class_names(root / part)):
            names = ", ".join(sorted(odd))
            raise UserError(
                f"{root / parts[0]} and {root / part} need the same class folders, but differ in: {names}"
            )
    passed_over = [path for path in _visible(root) if not path.is_dir()]
    found = {part: _find_images(root / part, classes, passed_over) for part in parts}
    shown = tuple(map(printable, classes))
    _print_found({part: list(map(len, groups)) for part, groups in found.items()}, shown, passed_over)
    images, labels = {}, {}
    for part, groups in found.items():
        with ThreadPoolExecutor() as pool:
            decoded = pool.map(_read_image, chain(*groups))
            images[part] = np.fromiter(decoded, np.dtype((np.uint8, (SIZE, SIZE, 3))))
        labels[part] = np.repeat(np.arange(len(classes), dtype=np.int64), list(map(len, groups)))
    return images, labels, shown


def _visible(directory: Path) -> list[Path]:
    """The entries of a directory that are not hidden, sorted by name."""
    try:
        return sorted(path for path in directory.iterdir() if not path.name.startswith("."))
    except OSError as error:
        raise UserError(
            f"cannot read the directory {directory} ({error.strerror}): "
            "--dataset folder needs <dataroot>/train/<class>/ and <dataroot>/test/<class>/ with images"
        ) from error


def _class_names(directory: Path) -> tuple[str, ...]:
    names = tuple(path.name for path in _visible(directory) if path.is_dir())
    if not names:
        raise UserError(
            f"{directory} has no class folder: put each class's images into a sub-folder of its own"
        )
    return names


def _files(directory: Path) -> list[Path]:
    """All visible files at any depth, in the order of torchvision's ImageFolder; each real folder once."""
    found, pending, seen = [], [directory], set()
    while pending:
        here = pending.pop()
        if (real := os.path.realpath(here)) not in seen:  # else a link would lead round and round
            seen.add(real)
            for path in _visible(here):
                (pending if path.is_dir() else found).append(path)
    return sorted(found, key=lambda path: (str(path.parent), path.name))


def _find_images(directory: Path, classes: tuple[str, ...], passed_over: list[Path]) -> list[list[Path]]:
    """The images of each class, at any depth; adds files that are none by their name to `passed_over`."""
    passed_over += [path for path in _visible(directory) if not path.is_dir()]
    groups: list[list[Path]] = []
    for name in classes:
        groups.append([])
        for path in _files(directory / name):
            (groups[-1] if path.suffix.lower() in EXTENSIONS else passed_over).append(path)
        if not groups[-1]:
            raise UserError(
                f"{directory / name} has no image: it needs at least one of {', '.join(EXTENSIONS)}"
            )
    return groups


def _print_found(counts: dict[str, list[int]], classes: tuple[str, ...], passed_over: list[Path]) -> None:
    """How many images of which classes there are, and whether there are other files."""
    totals = " and ".join(f"{sum(numbers)} to {part}" for part, numbers in counts.items())
    of_class = zip(classes, *counts.values(), strict=True)
    words = ", ".join(f"{name} {'+'.join(map(str, numbers))}" for name, *numbers in of_class)
    text = f"images: {totals}, in {len(classes)} classes: {words}"
    print(textwrap.fill(text, 80, subsequent_indent="  ", break_on_hyphens=False), flush=True)
    if passed_over:
        example, names = printable(str(passed_over[0])), ", ".join(EXTENSIONS)
        print(f"note: files passed over: {len(passed_over)}, such as {example}; read are {names}", flush=True)


def _read_image(path: Path) -> np.ndarray:
    """One image as (32, 32, 3) uint8 RGB; another size is resized (its aspect ratio is not kept)."""
    try:
        if not path.is_file():  # to open a FIFO is to wait for its writer
            raise OSError("it is no regular file")
        encoded = np.fromfile(path, np.uint8)
        image = cv2.imdecode(encoded, cv2.IMREAD_COLOR) if len(encoded) else None
        if image is None:
            raise OSError(f"OpenCV {cv2.__version__} cannot decode its {len(encoded)} bytes")
        if image.shape[:2] != (SIZE, SIZE):
            shrinking = min(image.shape[:2]) >= SIZE
            way = cv2.INTER_AREA if shrinking else cv2.INTER_LINEAR
            image = cv2.resize(image, (SIZE, SIZE), interpolation=way)
        return cv2.cvtColor(image, cv2.COLOR_BGR2RGB)
    except (OSError, cv2.error) as error:
        raise UserError(f"cannot read the image {path} ({reason(error)}); replace or remove it") from error
