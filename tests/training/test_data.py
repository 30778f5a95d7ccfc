"""Properties of the data sets, the epoch plan and the batches."""

import fcntl
import os
import socket
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from urllib.error import URLError

import cv2
import numpy as np
import pytest
import torch
from helpers import LAYOUTS, contents, write_archive, write_svhn

from data import EpochPlan, TrainBatches, eval_batches, hold_out, load_data
from utils import UserError


@pytest.fixture
def images():
    """50 random images with labels that say which image it is."""
    images = np.random.default_rng(1).integers(0, 256, (50, 32, 32, 3), dtype=np.uint8)
    return images, np.arange(50, dtype=np.int64)


def arrays(plan):
    return plan.order, plan.offsets, plan.flips


def same(a, b):
    return all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))


class TestEpochPlan:
    def test_is_a_pure_function_of_seed_and_epoch(self):
        first = EpochPlan(1000, 64, seed=3, epoch=7)
        np.random.seed(5)  # noqa: NPY002 -- the plan must not read numpy's global generator
        assert same(arrays(first), arrays(EpochPlan(1000, 64, seed=3, epoch=7)))

    @pytest.mark.parametrize(("seed", "epoch"), [(3, 6), (3, 8), (4, 7), (7, 3), (3 + 2**32, 7)])
    def test_another_seed_or_epoch_is_another_plan(self, seed, epoch):
        first, other = EpochPlan(1000, 64, seed=3, epoch=7), EpochPlan(1000, 64, seed=seed, epoch=epoch)
        for a, b in zip(arrays(first), arrays(other), strict=True):
            assert not np.array_equal(a, b)

    @pytest.mark.parametrize(("n_images", "batch_size"), [(1000, 64), (128, 64), (64, 64), (65, 64), (5, 1)])
    def test_full_batches_only_and_no_image_twice(self, n_images, batch_size):
        plan = EpochPlan(n_images, batch_size, seed=0, epoch=0)
        assert len(plan) == n_images // batch_size
        assert plan.order.shape == plan.flips.shape == (len(plan), batch_size)
        assert plan.offsets.shape == (len(plan), batch_size, 2)
        assert len(np.unique(plan.order)) == plan.order.size
        assert (plan.order.min(), plan.order.max() < n_images) >= (0, True)

    @pytest.mark.parametrize("pad", [0, 1, 4, 31])
    def test_each_image_draws_its_offsets_and_flip_evenly_by_itself(self, pad):
        plan = EpochPlan(40_000, 200, seed=0, epoch=0, pad=pad)
        assert plan.flips.dtype == bool
        for axis in range(2):  # in each batch, and at each place of a batch: 200 draws, a deviation of 0.035
            np.testing.assert_allclose(plan.flips.mean(axis), 0.5, atol=0.2)
            np.testing.assert_allclose(plan.offsets.mean((axis, 2)), pad, atol=0.2 * pad)
            counts = np.bincount(plan.offsets[..., axis].ravel())
            assert len(counts) == 2 * pad + 1
            np.testing.assert_allclose(counts / counts.mean(), 1, atol=0.25)
        top, left = plan.offsets[..., 0], plan.offsets[..., 1]
        assert (top == left).mean() == pytest.approx(1 / (2 * pad + 1), abs=0.02)  # two draws, not one

    def test_flip_off_changes_nothing_else(self):
        plain, mirrored = (EpochPlan(500, 50, seed=0, epoch=0, flip=flip) for flip in (False, True))
        assert not plain.flips.any()
        assert same(arrays(plain)[:2], arrays(mirrored)[:2])

    @pytest.mark.parametrize(
        ("batch", "pad", "pattern"),
        [(128, 4, r"batchSize 128.*100"), (0, 4, "batchSize 0"), (9, -1, "pad -1 "), (9, 32, "pad 32 ")],
    )
    def test_a_batch_or_border_that_does_not_fit_is_named(self, batch, pad, pattern):
        with pytest.raises(UserError, match=pattern):
            EpochPlan(100, batch, seed=0, epoch=0, pad=pad)


def naive_batch(images, labels, plan, k):
    """The paper's augmentation, one image after the other."""
    batch = []
    for index, (top, left), flip in zip(plan.order[k], plan.offsets[k], plan.flips[k], strict=True):
        p = plan.pad
        padded = cv2.copyMakeBorder(images[index], p, p, p, p, cv2.BORDER_REFLECT_101)
        crop = padded[top : top + 32, left : left + 32]
        batch.append(cv2.flip(crop, 1) if flip else crop)
    return np.stack(batch), labels[plan.order[k]]


def preparing_threads():
    """The threads that `TrainBatches.iterate` has started and that still live."""
    return [thread for thread in threading.enumerate() if thread.name.startswith("batches")]


class TestTrainBatches:
    @pytest.mark.parametrize("flip", [False, True])
    @pytest.mark.parametrize("pad", [0, 1, 4, 31])
    def test_batch_equals_the_naive_reference(self, images, pad, flip):
        images, labels = images
        before = images.copy()
        batches = TrainBatches(images, labels, pad)
        plan = EpochPlan(50, 16, seed=0, epoch=0, pad=pad, flip=flip)
        for k in (2, 0, 1, 0):  # in any order, and again
            assert same(batches.batch(plan, k), naive_batch(images, labels, plan, k))
        assert np.array_equal(images, before)

    def test_the_edge_is_not_repeated(self):
        ramp = np.broadcast_to(np.arange(32, dtype=np.uint8)[None, :, None], (1, 32, 32, 3)).copy()
        plan = EpochPlan(1, 1, seed=0, epoch=0, pad=4, flip=False)
        plan.offsets[:] = 0
        images, _ = TrainBatches(ramp, np.zeros(1, np.int64), 4).batch(plan, 0)
        assert images[0, 0, :6, 0].tolist() == [4, 3, 2, 1, 0, 1]

    @pytest.mark.parametrize("nthread", [0, 1, 3])
    @pytest.mark.parametrize("start", [0, 5, 12, 13])
    def test_iterate_gives_the_plans_batches_whatever_the_threads(self, images, nthread, start):
        batches, plan = TrainBatches(*images, 4), EpochPlan(50, 4, seed=0, epoch=0)
        got = list(batches.iterate(plan, start=start, nthread=nthread))
        assert len(got) == max(0, 12 - start)
        for k, (images, labels) in enumerate(got, start):
            assert (images.dtype, labels.dtype) == (torch.uint8, torch.int64)
            assert images.is_contiguous()
            assert same((images.numpy(), labels.numpy()), batches.batch(plan, k))

    @pytest.mark.parametrize("nthread", [0, 2])
    def test_an_exception_in_a_worker_reaches_the_caller_in_its_turn(self, images, nthread, monkeypatch):
        batches, plan = TrainBatches(*images, 4), EpochPlan(50, 4, seed=0, epoch=0)
        batch = batches.batch

        def broken(plan, k):
            if k == 3:
                raise OSError("broken at 3")
            return batch(plan, k)

        monkeypatch.setattr(batches, "batch", broken)
        iterator = batches.iterate(plan, nthread=nthread)
        for _ in range(3):
            next(iterator)
        with pytest.raises(OSError, match="broken at 3"):
            next(iterator)
        assert not preparing_threads()

    def test_looks_ahead_only_so_far_and_leaves_no_thread(self, images, monkeypatch):
        batches, plan = TrainBatches(*images, 4), EpochPlan(50, 1, seed=0, epoch=0)
        submit, asked_for = ThreadPoolExecutor.submit, []
        monkeypatch.setattr(ThreadPoolExecutor, "submit", lambda *a: asked_for.append(a) or submit(*a))
        iterator = batches.iterate(plan, nthread=3)
        for k in range(3):
            next(iterator)
            assert len(asked_for) == 2 * 3 + k
        assert 1 <= len(preparing_threads()) <= 3
        iterator.close()
        assert not preparing_threads()


@pytest.mark.parametrize("batch_size", [1, 7, 50, 64])
def test_eval_batches_are_all_images_in_order(images, batch_size):
    images, labels = images
    got = list(eval_batches(images, labels, batch_size))
    assert len(got) == -(-50 // batch_size)
    assert torch.equal(torch.cat([x for x, _ in got]), torch.from_numpy(images))
    assert torch.equal(torch.cat([y for _, y in got]), torch.from_numpy(labels))


# CIFAR and SVHN: tiny files in the real format, with torchvision's checksums replaced by theirs.


@pytest.mark.usefixtures("no_network")
class TestDownloaded:
    @pytest.mark.parametrize("dataset", LAYOUTS)
    def test_reads_the_real_format_of_cifar(self, dataset, tmp_path, monkeypatch):
        content = write_archive(dataset, tmp_path, monkeypatch)
        _, train_files, test_file, label_key, _ = LAYOUTS[dataset]
        loaded = load_data(dataset, tmp_path)
        for images, labels, files in (
            (loaded.train_images, loaded.train_labels, train_files),
            (loaded.test_images, loaded.test_labels, [test_file]),
        ):
            assert images.flags.c_contiguous
            assert (images.dtype, labels.dtype) == (np.uint8, np.int64)
            # In the file a row holds the red plane, then the green and the blue one, each row by row.
            rows = np.concatenate([content[name]["data"] for name in files])
            for channel in range(3):
                plane = rows[:, channel * 1024 : (channel + 1) * 1024]
                assert np.array_equal(images[..., channel].reshape(len(rows), 1024), plane)
            assert labels.tolist() == [label for name in files for label in content[name][label_key]]
        assert (loaded.name, loaded.flip) == (dataset, True)
        assert len(loaded.classes) == (100 if dataset == "CIFAR100" else 10)

    @pytest.mark.parametrize("missing", [True, False])
    @pytest.mark.parametrize(
        ("dataset", "file"),
        [
            ("CIFAR10", "cifar-10-python.tar.gz"), ("CIFAR100", "cifar-100-python.tar.gz"),
            ("SVHN", "train_32x32.mat"), ("SVHN", "test_32x32.mat"), ("SVHN", "extra_32x32.mat"),
        ],
    )  # fmt: skip
    def test_a_missing_or_corrupt_file_is_one_sentence_that_says_what_to_do(
        self, dataset, file, missing, tmp_path, monkeypatch
    ):
        if dataset == "SVHN":
            write_svhn(tmp_path, monkeypatch)
        else:
            write_archive(dataset, tmp_path, monkeypatch)
        archive = tmp_path / file
        content = archive.read_bytes()
        archive.unlink() if missing else archive.write_bytes(content[:-100])
        with pytest.raises(UserError) as caught:
            load_data(dataset, tmp_path)
        message = str(caught.value)
        problem = f"{dataset} is not in {tmp_path} and" if missing else f"{archive} is incomplete, corrupt"
        for part in (problem, "name resolution", f"place {file} from http", "--dataset digits"):
            assert part in message
        assert "\n" not in message

    def test_a_download_is_alone_and_gives_up_on_a_silent_server(self, tmp_path, monkeypatch):
        """The lock is the folder itself: no file in it is made, emptied or followed."""
        seen = []
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
        timeout = socket.getdefaulttimeout()
        socket.setdefaulttimeout(7)
        try:
            with pytest.raises(UserError, match="no route"):
                load_data("CIFAR10", tmp_path / "data")
            assert socket.getdefaulttimeout() == 7
        finally:
            socket.setdefaulttimeout(timeout)
        assert seen
        assert all(10 <= timeout <= 60 for timeout in seen)
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
    np.testing.assert_allclose(digits.mean, pixels.mean(0), rtol=1e-12)
    np.testing.assert_allclose(digits.std, pixels.std(0), rtol=1e-9)


def test_sha256_depends_on_every_array_and_its_shape(digits):
    digests = {digits.sha256}
    for field in ("train_images", "train_labels", "test_images", "test_labels"):
        changed = getattr(digits, field).copy()
        changed.flat[-1] += 1
        digests.add(replace(digits, **{field: changed}).sha256)
    digests.add(replace(digits, train_images=digits.train_images.reshape(1437, 16, 64, 3)).sha256)
    assert len(digests) == 6


def test_classes_in_another_order_keep_their_images(digits):
    order = list("3741520986")
    other = digits.with_classes(order)
    assert other.classes == tuple(order)
    for name in ("train_labels", "test_labels"):
        labels = [order[label] for label in getattr(other, name)]
        assert labels == [digits.classes[label] for label in getattr(digits, name)]
    assert other.train_images is digits.train_images


class TestHoldOut:
    @pytest.mark.parametrize("count", [20, 143, 360, 1417])
    def test_splits_the_training_set_by_class_and_leaves_the_test_set_out(self, digits, count):
        held = hold_out(digits, count)
        assert (len(held.train_labels), len(held.test_labels)) == (1437 - count, count)
        label_of = {x.tobytes(): y for x, y in zip(digits.train_images, digits.train_labels, strict=True)}
        assert len(label_of) == 1437  # digits has no image twice
        parts = (held.train_images, held.train_labels), (held.test_images, held.test_labels)
        found = {x.tobytes(): y for images, labels in parts for x, y in zip(images, labels, strict=True)}
        assert found == label_of
        share = np.bincount(digits.train_labels) * count / 1437
        assert (np.abs(np.bincount(held.test_labels) - share) < 1).all()
        kept = ("mean", "std", "name", "flip")
        assert [getattr(held, name) for name in kept] == [getattr(digits, name) for name in kept]

    def test_depends_on_the_count_only(self, digits):
        first = hold_out(digits, 100)
        assert first.sha256 == "6386255a94742fbcb142c6a5ff367f9ad1e5f37ec0f9170d355ad2787765411c"
        np.random.seed(5)  # noqa: NPY002 -- the choice must not read numpy's global generator
        assert hold_out(digits, 100).sha256 == first.sha256

    @pytest.mark.parametrize("count", [-1, 0, 1437, 2000])
    def test_a_count_that_does_not_fit_is_an_error_with_both_numbers(self, digits, count):
        with pytest.raises(UserError, match=f"--holdout {count} .*1437"):
            hold_out(digits, count)

    @pytest.mark.parametrize(("count", "use"), [(9, "choose on"), (1428, "train on")])
    def test_a_part_without_a_class_is_an_error(self, digits, count, use):
        with pytest.raises(
            UserError, match=rf"--holdout {count} leaves no image to {use} of the classes: \d"
        ):
            hold_out(digits, count)


def test_an_unknown_data_set_is_an_error():
    with pytest.raises(UserError, match=r"MNIST.*CIFAR10, CIFAR100, SVHN, digits, folder"):
        load_data("MNIST", "data")
