"""Properties of the data sets, the epoch plan and the batches. What a batch holds is for test_paper.py."""

import fcntl
import os
import socket
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from urllib.error import URLError

import numpy as np
import pytest
import torch
from helpers import contents, write_archive, write_svhn

from data import EpochPlan, TrainBatches, hold_out, load_data
from utils import UserError


def same(a, b):
    return all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))


class TestEpochPlan:
    def test_is_a_pure_function_of_seed_and_epoch(self):
        def arrays(seed, epoch, flip=True):
            plan = EpochPlan(1000, 64, seed=seed, epoch=epoch, flip=flip)
            return plan.order, plan.offsets, plan.flips

        first = arrays(3, 7)
        assert same(first, arrays(3, 7))
        assert same((*first[:2], np.zeros_like(first[2])), arrays(3, 7, flip=False))
        for seed, epoch in [(3, 6), (3, 8), (4, 7), (7, 3), (3 + 2**32, 7)]:
            assert not any(np.array_equal(a, b) for a, b in zip(first, arrays(seed, epoch), strict=True))

    @pytest.mark.parametrize(("n_images", "batch_size"), [(1000, 64), (128, 64), (64, 64), (65, 64), (5, 1)])
    def test_full_batches_only_and_no_image_twice(self, n_images, batch_size):
        plan = EpochPlan(n_images, batch_size, seed=0, epoch=0)
        assert plan.order.shape == plan.flips.shape == (n_images // batch_size, batch_size)
        assert plan.offsets.shape == (len(plan), batch_size, 2)
        assert len(set(plan.order.flat) & set(range(n_images))) == plan.order.size

    @pytest.mark.parametrize("pad", [0, 1, 4, 31])
    def test_each_image_draws_its_offsets_and_flip_evenly_by_itself(self, pad):
        plan = EpochPlan(40_000, 200, seed=0, epoch=0, pad=pad)
        for axis in range(2):  # in each batch, and at each place of a batch: 200 draws, a deviation of 0.035
            np.testing.assert_allclose(plan.flips.mean(axis), 0.5, atol=0.2)
            np.testing.assert_allclose(plan.offsets.mean((axis, 2)), pad, atol=0.2 * pad)
            counts = np.bincount(plan.offsets[..., axis].ravel())
            assert len(counts) == 2 * pad + 1
            np.testing.assert_allclose(counts / counts.mean(), 1, atol=0.25)
        top, left = plan.offsets[..., 0], plan.offsets[..., 1]
        assert (top == left).mean() == pytest.approx(1 / (2 * pad + 1), abs=0.02)  # two draws, not one

    @pytest.mark.parametrize("batch_size", [0, 128])
    def test_a_batch_that_does_not_fit_is_named(self, batch_size):
        with pytest.raises(UserError, match=f"batchSize {batch_size} .*100"):
            EpochPlan(100, batch_size, seed=0, epoch=0)


@pytest.fixture
def arrays():
    """50 random images with labels that say which image it is."""
    return np.random.default_rng(1).integers(0, 256, (50, 32, 32, 3), np.uint8), np.arange(50)


@pytest.mark.parametrize("start", [0, 12])
@pytest.mark.parametrize("nthread", [0, 1, 3])
def test_batches_come_in_order_made_only_so_far_ahead_and_so_does_an_error(
    arrays, nthread, start, monkeypatch
):
    batches, plan = TrainBatches(*arrays, 4), EpochPlan(50, 3, seed=0, epoch=0)
    submit, asked_for, batch = ThreadPoolExecutor.submit, [], batches.batch
    monkeypatch.setattr(ThreadPoolExecutor, "submit", lambda *a: asked_for.append(a) or submit(*a))
    monkeypatch.setattr(batches, "batch", lambda plan, k: batch(plan, k) if k != 15 else 1 / 0)
    iterator = batches.iterate(plan, start=start, nthread=nthread)
    for k in range(start, 15):
        images, labels = next(iterator)
        assert same((images.numpy(), labels.numpy()), batch(plan, k))
        assert (images.dtype, labels.dtype) == (torch.uint8, torch.int64)
        assert len(asked_for) == (min(2 * nthread + k, 16) - start if nthread else 0)
    with pytest.raises(ZeroDivisionError):
        next(iterator)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("batches")]


# CIFAR and SVHN: tiny files in the real format, with torchvision's checksums replaced by theirs.


class TestDownloaded:
    @pytest.fixture(autouse=True)
    def no_network(self, monkeypatch):
        def refuse(*_args, **_kwargs):
            raise URLError("Temporary failure in name resolution")

        monkeypatch.setattr("torchvision.datasets.utils.urllib.request.urlopen", refuse)

    @pytest.mark.parametrize(("dataset", "classes"), [("CIFAR10", 10), ("CIFAR100", 100)])
    def test_reads_the_real_format_of_cifar(self, dataset, classes, tmp_path, monkeypatch):
        written, loaded = write_archive(dataset, tmp_path, monkeypatch), load_data(dataset, tmp_path)
        for part, (rows, expected) in written.items():
            images, labels = getattr(loaded, f"{part}_images"), getattr(loaded, f"{part}_labels")
            # In the file a row holds the red plane, then the green and the blue one, each row by row.
            assert np.array_equal(images, rows.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1))
            assert images.flags.c_contiguous
            assert np.array_equal(labels, expected)
            assert (images.dtype, labels.dtype) == (np.uint8, np.int64)
        assert (loaded.name, loaded.flip, len(loaded.classes)) == (dataset, True, classes)

    @pytest.mark.parametrize("missing", [True, False])
    @pytest.mark.parametrize(("dataset", "file"), [
        ("CIFAR10", "cifar-10-python.tar.gz"), ("CIFAR100", "cifar-100-python.tar.gz"),
        ("SVHN", "train_32x32.mat"), ("SVHN", "test_32x32.mat"), ("SVHN", "extra_32x32.mat"),
    ])  # fmt: skip
    def test_a_missing_or_corrupt_file_is_named_with_a_way_out(
        self, dataset, file, missing, tmp_path, monkeypatch
    ):
        if dataset == "SVHN":
            write_svhn(tmp_path, monkeypatch)
        else:
            write_archive(dataset, tmp_path, monkeypatch)
        path = tmp_path / file
        path.unlink() if missing else path.write_bytes(path.read_bytes()[:-100])
        problem = f"{dataset} is not in {tmp_path} and" if missing else f"{path} is incomplete, corrupt"
        way_out = f"name resolution.* place {file} from http.*--dataset digits, [^\n]*$"
        with pytest.raises(UserError, match=f"^{problem}.*{way_out}"):
            load_data(dataset, tmp_path)

    def test_a_download_is_alone_and_gives_up_on_a_silent_server(self, tmp_path, monkeypatch):
        """The lock is the folder itself: no file in it is made, emptied or followed."""
        seen, timeout = [], socket.getdefaulttimeout()
        (tmp_path / "data").mkdir()
        (tmp_path / "mine").write_text("the user's")
        (tmp_path / "data" / ".lock").symlink_to(tmp_path / "mine")
        before, folder = contents(tmp_path), os.open(tmp_path / "data", os.O_RDONLY)

        def look(*_args, **_kwargs):
            with pytest.raises(BlockingIOError):
                fcntl.flock(folder, fcntl.LOCK_SH | fcntl.LOCK_NB)  # fails while somebody has it alone
            seen.append(socket.getdefaulttimeout())
            raise URLError("no route")

        monkeypatch.setattr("torchvision.datasets.utils.urllib.request.urlopen", look)
        with pytest.raises(UserError, match="no route"):
            load_data("CIFAR10", tmp_path / "data")
        assert socket.getdefaulttimeout() == timeout
        assert seen
        assert all(10 <= seconds <= 60 for seconds in seen)
        fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.close(folder)
        assert contents(tmp_path) == before

    def test_a_dataroot_that_is_a_file_is_an_error(self, tmp_path):
        (tmp_path / "file").write_text("")
        with pytest.raises(UserError, match=r"File exists|Not a directory"):
            load_data("CIFAR10", tmp_path / "file")


@pytest.fixture(scope="module")
def digits():
    return load_data("digits", "unused")


def test_digits_are_the_same_everywhere(digits):
    assert digits.sha256 == "0bc7938f4cc77f1f7ac9ec87a11b6f58dad207ddec9123fbf484f1384456b9bb"
    assert (digits.name, digits.flip, digits.classes) == ("digits", False, tuple("0123456789"))
    pixels = digits.train_images.reshape(-1, 3).astype(np.float64)
    np.testing.assert_allclose((digits.mean, digits.std), (pixels.mean(0), pixels.std(0)), rtol=1e-9)


def test_sha256_depends_on_every_array_and_its_shape(digits):
    digests = {digits.sha256}
    for field in ("train_images", "train_labels", "test_images", "test_labels"):
        changed = getattr(digits, field).copy()
        changed.flat[-1] += 1
        digests.add(replace(digits, **{field: changed}).sha256)
    digests.add(replace(digits, train_images=digits.train_images.reshape(1437, 16, 64, 3)).sha256)
    assert len(digests) == 6


def test_classes_in_another_order_keep_their_images(digits):
    other = digits.with_classes(list("3741520986"))
    for name in ("train_labels", "test_labels"):
        labels = [other.classes[label] for label in getattr(other, name)]
        assert labels == [digits.classes[label] for label in getattr(digits, name)]
    assert "".join(other.classes) == "3741520986"


class TestHoldOut:
    @pytest.mark.parametrize("count", [20, 143, 360, 1417])
    def test_splits_the_training_set_by_class_and_leaves_the_test_set_out(self, digits, count):
        held = hold_out(digits, count)
        assert (len(held.train_labels), len(held.test_labels)) == (1437 - count, count)
        label_of = {x.tobytes(): y for x, y in zip(digits.train_images, digits.train_labels, strict=True)}
        assert len(label_of) == 1437  # digits has no image twice
        parts = (held.train_images, held.train_labels), (held.test_images, held.test_labels)
        assert label_of == {x.tobytes(): y for part in parts for x, y in zip(*part, strict=True)}
        share = np.bincount(digits.train_labels) * count / 1437
        assert (np.abs(np.bincount(held.test_labels) - share) < 1).all()
        assert (held.mean, held.std, held.flip) == (digits.mean, digits.std, digits.flip)

    def test_is_always_the_same(self, digits):
        sha256 = "6386255a94742fbcb142c6a5ff367f9ad1e5f37ec0f9170d355ad2787765411c"
        assert hold_out(digits, 100).sha256 == sha256

    @pytest.mark.parametrize(("count", "said"), [
        (-1, ".*1437"), (1437, ".*1437"), (2000, ".*1437"),
        (9, r"leaves no image to choose on of the classes: \d"),
        (1428, r"leaves no image to train on of the classes: \d"),
    ])  # fmt: skip
    def test_a_count_that_does_not_fit_is_an_error(self, digits, count, said):
        with pytest.raises(UserError, match=f"--holdout {count} {said}"):
            hold_out(digits, count)
