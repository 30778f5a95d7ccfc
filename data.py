"""Data sets as uint8 arrays, the plan of an epoch, and batches.

An image is (32, 32, 3) uint8 RGB from the file to the device: OpenCV pads, crops and flips uint8, and
normalizing with `mean` and `std` is the device's work. What an epoch does with the images is drawn at once
by `EpochPlan`, so a batch depends on neither the number of threads nor what ran before it.
"""

import copy
import fcntl
import hashlib
import os
import socket
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import cv2
import numpy as np
import torch

from folder import SIZE, read_folder
from utils import UserError, reason

# Per channel (R, G, B) on 0..255: mean, std. The constants of the authors' PyTorch script.
CIFAR_STATISTICS = {
    "CIFAR10": ((125.3, 123.0, 113.9), (63.0, 62.1, 66.7)),
    "CIFAR100": ((129.3, 124.1, 112.4), (68.2, 65.4, 70.4)),
}
DOWNLOAD_TIMEOUT = 30  # seconds without an answer; torchvision itself would wait for ever
# One image is too small to share among threads; threads work on different images instead.
cv2.setNumThreads(0)


@dataclass(frozen=True, eq=False)
class DataSet:
    """A data set in memory.

    Images are (N, 32, 32, 3) uint8 RGB, C-contiguous; labels are (N,) int64, indices into `classes`. `mean`
    and `std` are per channel on 0..255. `flip` says whether a mirrored image still shows its class (a
    digit's does not).
    """

    name: str
    train_images: np.ndarray
    train_labels: np.ndarray
    test_images: np.ndarray
    test_labels: np.ndarray
    classes: tuple[str, ...]
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    flip: bool

    @cached_property
    def sha256(self) -> str:
        """Hex digest of the four arrays, their types and shapes included: the same data, the same digest."""
        digest = hashlib.sha256()
        for array in (self.train_images, self.train_labels, self.test_images, self.test_labels):
            digest.update(f"{array.dtype.str} {array.shape}\n".encode())
            digest.update(np.ascontiguousarray(array))
        return digest.hexdigest()

    def with_classes(self, classes: list[str]) -> "DataSet":
        """The same with its classes in another order, and labels that follow it."""
        new = np.array([classes.index(name) for name in self.classes])
        labels = {"train_labels": new[self.train_labels], "test_labels": new[self.test_labels]}
        return replace(self, classes=tuple(classes), **labels)

    def description(self) -> dict:
        """For config.json: sizes, statistics and hash."""
        return {
            "name": self.name,
            "classes": len(self.classes),
            "train_images": len(self.train_labels),
            "test_images": len(self.test_labels),
            "mean": self.mean,
            "std": self.std,
            "sha256": self.sha256,
        }


def load_data(dataset: str, dataroot, dataset_name: str | None = None, evaluation: bool = False) -> DataSet:
    """Load CIFAR10, CIFAR100, SVHN, digits or a folder whole into memory.

    `dataroot` is where CIFAR or SVHN is or will be downloaded to, or the root of a `folder` (unused for
    digits). `dataset_name` is what a folder is called in logs (default "folder"; the others have a name).
    For `evaluation` a folder needs no `train`: its training part is then empty, and `mean` and `std` are the
    test part's, which a network that was trained on other images was not trained with.
    Raises UserError for data that are missing, broken, of a single class or cannot be downloaded.
    """
    root = Path(os.path.expanduser(dataroot))
    if dataset in CIFAR_STATISTICS:
        data = _load_cifar(dataset, root)
    elif dataset == "SVHN":
        data = _load_svhn(root)
    elif dataset == "digits":
        data = _load_digits()
    else:
        data = _load_folder(root, dataset_name or "folder", evaluation)
    if len(data.classes) < 2:
        raise UserError(f"{data.name} has a single class, {data.classes[0]}: there is nothing to tell apart")
    return data


def _load_cifar(dataset: str, root: Path) -> DataSet:
    """CIFAR through torchvision, which downloads what is missing and verifies every file's checksum."""
    from torchvision import datasets  # here, because it takes seconds to import

    source = getattr(datasets, dataset)
    with _downloading(dataset, root, source.filename, source.url):
        train, test = source(root, train=True, download=True), source(root, train=False)
    mean, std = CIFAR_STATISTICS[dataset]
    return DataSet(
        name=dataset,
        train_images=np.ascontiguousarray(train.data),
        train_labels=np.array(train.targets, dtype=np.int64),
        test_images=np.ascontiguousarray(test.data),
        test_labels=np.array(test.targets, dtype=np.int64),
        classes=tuple(train.classes),
        mean=mean,
        std=std,
        flip=True,
    )


def _load_svhn(root: Path) -> DataSet:
    """SVHN through torchvision: 604,388 images (train and extra, 1.86 GB) to train; the paper's x / 255.

    While torchvision's arrays are put together, the images are in memory twice (3.7 GB).
    """
    from torchvision.datasets import SVHN

    parts = {}
    for split, (url, filename, _) in SVHN.split_list.items():
        with _downloading("SVHN", root, filename, url):
            parts[split] = SVHN(root, split, download=True)
    train = [parts["train"], parts["extra"]]
    return DataSet(
        name="SVHN",
        train_images=_join_planes([part.data for part in train]),
        train_labels=np.concatenate([part.labels for part in train]),
        test_images=_join_planes([parts["test"].data]),
        test_labels=parts["test"].labels,
        classes=tuple("0123456789"),
        mean=(0.0, 0.0, 0.0),
        std=(255.0, 255.0, 255.0),
        flip=False,
    )


def _join_planes(arrays: list[np.ndarray]) -> np.ndarray:
    """Arrays (n, 3, 32, 32) as one (N, 32, 32, 3), C-contiguous, which np.concatenate alone is not."""
    images = np.empty((sum(map(len, arrays)), SIZE, SIZE, 3), np.uint8)
    return np.concatenate([array.transpose(0, 2, 3, 1) for array in arrays], out=images)


@contextmanager
def _downloading(dataset: str, root: Path, filename: str, url: str) -> Iterator[None]:
    """Alone there, as two downloads at once would spoil a file; what torchvision meets becomes a sentence."""
    with ExitStack() as afterwards:
        afterwards.callback(socket.setdefaulttimeout, socket.getdefaulttimeout())
        socket.setdefaulttimeout(DOWNLOAD_TIMEOUT)
        with suppress(OSError):  # not writable, so nothing can be downloaded either; or it knows no locks
            root.mkdir(parents=True, exist_ok=True)
            folder = os.open(root, os.O_RDONLY)  # the folder itself: no file of anybody's is touched
            afterwards.callback(os.close, folder)
            fcntl.flock(folder, fcntl.LOCK_EX)
        try:
            yield
        except (MemoryError, ImportError):
            raise
        except Exception as error:
            archive = root / filename
            problem = f"{dataset} is not in {root} and could not be downloaded"
            if archive.is_file():
                problem = f"{archive} is incomplete, corrupt or unreadable, and could not be downloaded"
            way = f"place {filename} from {url} in {root}, or use --dataset digits, which needs no network"
            raise UserError(f"{problem} ({reason(error)}): {way}") from error


def _load_digits() -> DataSet:
    """scikit-learn's 8x8 handwritten digits: 1,437 to train and 360 to test, stratified, always the same."""
    from sklearn.datasets import load_digits  # here, because it takes seconds to import
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    grey = np.rint(digits.images * 255 / 16).astype(np.uint8)
    images = np.empty((len(grey), SIZE, SIZE, 3), np.uint8)
    for image, digit in zip(images, grey, strict=True):
        image[:] = cv2.resize(digit, (SIZE, SIZE), interpolation=cv2.INTER_LINEAR)[:, :, None]
    labels = digits.target.astype(np.int64)
    train, test = train_test_split(np.arange(len(labels)), test_size=360, stratify=labels, random_state=0)
    mean, std = channel_statistics(images[train])
    parts = images[train], labels[train], images[test], labels[test]
    return DataSet("digits", *parts, tuple("0123456789"), mean, std, flip=False)


def _load_folder(root: Path, name: str, evaluation: bool) -> DataSet:
    """Class folders (`folder.read_folder`), normalized by the statistics of their first part."""
    parts = ("test",) if evaluation and not (root / "train").exists() else ("train", "test")
    images, labels, classes = read_folder(root, parts)
    mean, std = channel_statistics(images[parts[0]])
    nothing = np.empty((0, SIZE, SIZE, 3), np.uint8), np.empty(0, np.int64)
    train = (images["train"], labels["train"]) if "train" in parts else nothing
    return DataSet(name, *train, images["test"], labels["test"], classes, mean, std, flip=True)


def hold_out(data: DataSet, count: int) -> DataSet:
    """The same data with `count` training images as the test part, to choose hyperparameters on.

    They leave the training part; the real test part is not in the result. Each class gives its share, rounded
    up or down; which images depends on nothing but the training labels and `count`. The mean and std stay
    those of the whole training part.

    Raises UserError where `count` is not in 1..N-1, or where one of the parts would lack a class.
    """
    labels, total = data.train_labels, len(data.train_labels)
    if not 1 <= count < total:
        raise UserError(
            f"--holdout {count} does not fit a training set of {total} images: choose 1 to {total - 1}"
        )
    shuffled = np.random.default_rng(0).permutation(total)
    by_class = shuffled[np.argsort(labels[shuffled], kind="stable")]
    held = np.zeros(total, bool)
    held[by_class[np.arange(count) * total // count]] = True  # evenly spaced through the classes: stratified
    for part, use in ((held, "choose on"), (~held, "train on")):
        if missing := set(labels.tolist()) - set(labels[part].tolist()):
            names = ", ".join(data.classes[label] for label in sorted(missing))
            raise UserError(f"--holdout {count} leaves no image to {use} of the classes: {names}")
    return replace(
        data,
        train_images=data.train_images[~held],
        train_labels=labels[~held],
        test_images=data.train_images[held],
        test_labels=labels[held],
    )


def channel_statistics(images: np.ndarray) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and (population) standard deviation per channel of (N, 32, 32, 3) uint8, on 0..255.

    Sums are float64, without a float copy of the images. A constant channel gets the standard deviation 1,
    so that one can divide by it.
    """
    mean, std = cv2.meanStdDev(images.reshape(-1, SIZE, 3))
    return tuple(mean.ravel().tolist()), tuple(value or 1.0 for value in std.ravel().tolist())


class EpochPlan:
    """All that is random about an epoch, as a pure function of the arguments.

    order: (steps, batch) int64, indices of images, none twice; a last batch that is not full is dropped.
    offsets: (steps, batch, 2) int64 in 0..2*pad, the crop's top and left in the padded image.
    flips: (steps, batch) bool, all False without `flip`.
    The epoch counts from 0. Raises UserError where no full batch exists.
    """

    def __init__(
        self, n_images: int, batch_size: int, *, seed: int, epoch: int, pad: int = 4, flip: bool = True
    ):
        if not 1 <= batch_size <= n_images:
            raise UserError(
                f"--batchSize {batch_size} does not fit a training set of {n_images} images: "
                f"choose 1 to {n_images}, since a partial batch is dropped"
            )
        steps = n_images // batch_size
        shape = (steps, batch_size)
        # spawn_key keeps (seed, epoch) apart from every other pair, whatever their sizes.
        generator = np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(epoch,)))
        self.order = generator.permutation(n_images)[: steps * batch_size].reshape(shape)
        self.offsets = generator.integers(0, 2 * pad + 1, (*shape, 2))
        self.flips = generator.integers(0, 2, shape).astype(bool) if flip else np.zeros(shape, bool)

    def of_rank(self, rank: int, size: int) -> "EpochPlan":
        """The same with the slice of each batch that one of `size` processes takes."""
        part = copy.copy(self)
        for name in ("order", "offsets", "flips"):
            setattr(part, name, np.array_split(getattr(self, name), size, axis=1)[rank])
        return part

    def __len__(self) -> int:
        """Number of batches, that is of steps."""
        return len(self.order)


class TrainBatches:
    """Augmented training batches: reflect-pad (edge not repeated), crop, flip, on uint8.

    The images are padded once, at the start: N (32 + 2 pad)^2 3 bytes, 240 MB for CIFAR with pad 4.
    """

    def __init__(self, images: np.ndarray, labels: np.ndarray, pad: int):
        self.labels = labels
        padded = images
        if pad:
            padded = np.empty((len(images), SIZE + 2 * pad, SIZE + 2 * pad, 3), np.uint8)
            for image, dst in zip(images, padded, strict=True):
                cv2.copyMakeBorder(image, pad, pad, pad, pad, cv2.BORDER_REFLECT_101, dst=dst)
        # A view, [image, top, left] -> the crop (32, 32, 3): one index expression cuts out a whole batch.
        views = np.lib.stride_tricks.sliding_window_view(padded, (SIZE, SIZE, 3), axis=(1, 2, 3))
        self.crops = views[:, :, :, 0]

    def batch(self, plan: EpochPlan, k: int) -> tuple[np.ndarray, np.ndarray]:
        """Batch k of the plan: images (B, 32, 32, 3) uint8, labels (B,) int64; a pure function of both."""
        order, offsets = plan.order[k], plan.offsets[k]
        images = self.crops[order, offsets[:, 0], offsets[:, 1]]
        for index in np.flatnonzero(plan.flips[k]).tolist():
            cv2.flip(images[index], 1, dst=images[index])
        return images, self.labels[order]

    def iterate(
        self, plan: EpochPlan, start: int = 0, nthread: int = 1, pin_memory: bool = False
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Batches start..len(plan)-1 in order, as tensors: (B, 32, 32, 3) uint8 and (B,) int64.

        `nthread` threads prepare batches ahead, at most 2 * nthread of them; with 0 the caller's thread does
        the work. An exception in a thread reaches the caller. Exhausting or closing the iterator ends its
        threads.
        """

        def prepare(k: int) -> tuple[torch.Tensor, torch.Tensor]:
            return _tensors(*self.batch(plan, k), pin_memory)

        steps = range(start, len(plan))
        if nthread == 0:
            yield from map(prepare, steps)
            return
        pool = ThreadPoolExecutor(nthread, thread_name_prefix="batches")
        pending = deque()
        try:
            for k in steps:
                pending.append(pool.submit(prepare, k))
                if len(pending) == 2 * nthread:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            pool.shutdown(cancel_futures=True)


def eval_batches(
    images: np.ndarray, labels: np.ndarray, batch_size: int, pin_memory: bool = False, part=(0, 1)
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """All images in order and unchanged, the last batch perhaps smaller: (B, 32, 32, 3) uint8, (B,) int64.

    With `part` (rank, size) the slice of each batch that one of `size` processes takes; so all have as many
    batches, and one of the last may be empty. Without `pin_memory` the tensors are views of the arrays.
    """
    rank, size = part
    for start in range(0, len(labels), batch_size):
        count = min(batch_size, len(labels) - start)
        mine = slice(start + count * rank // size, start + count * (rank + 1) // size)
        yield _tensors(images[mine], labels[mine], pin_memory)


def _tensors(images: np.ndarray, labels: np.ndarray, pin_memory: bool) -> tuple[torch.Tensor, torch.Tensor]:
    pair = torch.from_numpy(images), torch.from_numpy(labels)
    return tuple(tensor.pin_memory() for tensor in pair) if pin_memory else pair
