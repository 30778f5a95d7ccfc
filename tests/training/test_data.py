"""Properties of the data sets, the epoch plan and the batches."""

import fcntl
import socket
import threading
from dataclasses import replace
from urllib.error import URLError

import cv2
import numpy as np
import pytest
import torch
from helpers import LAYOUTS, SVHN_SIZES, write_archive, write_svhn

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
        np.random.default_rng(0).random(10)
        np.random.seed(5)  # noqa: NPY002 -- the plan must not read numpy's global generator
        assert same(arrays(first), arrays(EpochPlan(1000, 64, seed=3, epoch=7)))

    @pytest.mark.parametrize(("seed", "epoch"), [(3, 6), (3, 8), (4, 7), (7, 3), (3 + 2**32, 7)])
    def test_another_seed_or_epoch_is_another_plan(self, seed, epoch):
        first, other = EpochPlan(1000, 64, seed=3, epoch=7), EpochPlan(1000, 64, seed=seed, epoch=epoch)
        for a, b in zip(arrays(first), arrays(other), strict=True):
            assert not np.array_equal(a, b)

    def test_a_large_seed_is_not_a_small_one_with_an_epoch(self):
        large = EpochPlan(1000, 64, seed=5 + (3 << 32), epoch=0)
        assert not same(arrays(large), arrays(EpochPlan(1000, 64, seed=5, epoch=3)))

    @pytest.mark.parametrize(("n_images", "batch_size"), [(1000, 64), (128, 64), (64, 64), (65, 64), (5, 1)])
    def test_full_batches_only_and_no_image_twice(self, n_images, batch_size):
        plan = EpochPlan(n_images, batch_size, seed=0, epoch=0)
        assert len(plan) == n_images // batch_size
        assert plan.order.shape == plan.flips.shape == (len(plan), batch_size)
        assert plan.offsets.shape == (len(plan), batch_size, 2)
        assert len(np.unique(plan.order)) == plan.order.size
        assert plan.order.min() >= 0
        assert plan.order.max() < n_images

    @pytest.mark.parametrize("pad", [0, 1, 4, 31])
    def test_offsets_and_flips_cover_their_range_evenly(self, pad):
        plan = EpochPlan(20000, 100, seed=0, epoch=0, pad=pad)
        assert plan.flips.dtype == bool
        assert 0.48 < plan.flips.mean() < 0.52
        for axis in range(2):
            counts = np.bincount(plan.offsets[..., axis].ravel())
            assert len(counts) == 2 * pad + 1
            np.testing.assert_allclose(counts / counts.mean(), 1, atol=0.3)
        top, left = plan.offsets[..., 0], plan.offsets[..., 1]
        assert (top == left).mean() == pytest.approx(
            1 / (2 * pad + 1), abs=0.01
        )  # as for two independent draws

    def test_flip_off_changes_nothing_else(self):
        plain, mirrored = (EpochPlan(500, 50, seed=0, epoch=0, flip=flip) for flip in (False, True))
        assert not plain.flips.any()
        assert same(arrays(plain)[:2], arrays(mirrored)[:2])

    def test_a_batch_larger_than_the_training_set_is_an_error_with_both_numbers(self):
        with pytest.raises(UserError, match=r"128.*100"):
            EpochPlan(100, 128, seed=0, epoch=0)
        with pytest.raises(UserError, match=r"--batchSize 0"):
            EpochPlan(100, 0, seed=0, epoch=0)

    @pytest.mark.parametrize("pad", [-1, 32])
    def test_a_pad_that_reflection_does_not_allow_is_an_error(self, pad):
        with pytest.raises(UserError, match=f"randomcrop_pad {pad} "):
            EpochPlan(100, 10, seed=0, epoch=0, pad=pad)


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

    def test_types_and_layout(self, images):
        plan = EpochPlan(50, 16, seed=0, epoch=0)
        images, labels = TrainBatches(*images, 4).batch(plan, 0)
        assert (images.shape, images.dtype, labels.shape, labels.dtype) == (
            (16, 32, 32, 3),
            np.uint8,
            (16,),
            np.int64,
        )
        assert images.flags.c_contiguous

    def test_a_plan_for_other_data_is_refused(self, images):
        batches = TrainBatches(*images, 4)
        for plan in (EpochPlan(50, 16, seed=0, epoch=0, pad=3), EpochPlan(49, 16, seed=0, epoch=0)):
            with pytest.raises(AssertionError):
                batches.batch(plan, 0)


class TestIterate:
    @pytest.mark.parametrize("nthread", [0, 1, 3])
    @pytest.mark.parametrize("start", [0, 5, 12, 13])
    def test_gives_the_plans_batches_whatever_the_threads(self, images, nthread, start):
        batches, plan = TrainBatches(*images, 4), EpochPlan(50, 4, seed=0, epoch=0)
        assert len(plan) == 12
        got = list(batches.iterate(plan, start=start, nthread=nthread))
        assert len(got) == max(0, 12 - start)
        for k, (images, labels) in enumerate(got, start):
            assert isinstance(images, torch.Tensor)
            assert isinstance(labels, torch.Tensor)
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
        batch, prepared = batches.batch, []

        def recorded(plan, k):
            prepared.append(k)
            return batch(plan, k)

        monkeypatch.setattr(batches, "batch", recorded)
        iterator = batches.iterate(plan, nthread=3)
        next(iterator)
        assert 1 <= len(preparing_threads()) <= 3
        iterator.close()
        assert not preparing_threads()
        assert len(prepared) <= 2 * 3


@pytest.mark.parametrize("batch_size", [1, 7, 50, 64])
def test_eval_batches_are_all_images_in_order(images, batch_size):
    images, labels = images
    got = list(eval_batches(images, labels, batch_size))
    assert len(got) == -(-50 // batch_size)
    assert torch.equal(torch.cat([x for x, _ in got]), torch.from_numpy(images))
    assert torch.equal(torch.cat([y for _, y in got]), torch.from_numpy(labels))


# CIFAR: tiny archives in the real format, with torchvision's checksums replaced by theirs.


@pytest.mark.usefixtures("no_network")
class TestCifar:
    @pytest.mark.parametrize(
        ("dataset", "mean", "std"),
        [
            ("CIFAR10", (125.3, 123.0, 113.9), (63.0, 62.1, 66.7)),
            ("CIFAR100", (129.3, 124.1, 112.4), (68.2, 65.4, 70.4)),
        ],
    )
    def test_reads_the_real_format(self, dataset, mean, std, tmp_path, monkeypatch):
        content = write_archive(dataset, tmp_path, monkeypatch)
        _, train_files, test_file, label_key, _ = LAYOUTS[dataset]
        loaded = load_data(dataset, tmp_path)
        for images, labels, files in (
            (loaded.train_images, loaded.train_labels, train_files),
            (loaded.test_images, loaded.test_labels, [test_file]),
        ):
            assert images.flags.c_contiguous
            assert images.dtype == np.uint8
            assert labels.dtype == np.int64
            # In the file a row holds the red plane, then the green and the blue one, each row by row.
            rows = np.concatenate([content[name]["data"] for name in files])
            for channel in range(3):
                plane = rows[:, channel * 1024 : (channel + 1) * 1024]
                assert np.array_equal(images[..., channel].reshape(len(rows), 1024), plane)
            assert labels.tolist() == [label for name in files for label in content[name][label_key]]
        assert loaded.name == dataset
        assert len(loaded.classes) == (100 if dataset == "CIFAR100" else 10)
        assert loaded.flip
        assert (loaded.mean, loaded.std) == (mean, std)

    def test_unpacked_data_need_no_archive(self, tmp_path, monkeypatch):
        write_archive("CIFAR10", tmp_path, monkeypatch)
        first = load_data("CIFAR10", tmp_path)
        (tmp_path / "cifar-10-python.tar.gz").unlink()
        assert load_data("CIFAR10", str(tmp_path)).sha256 == first.sha256

    @pytest.mark.parametrize("dataset", ["CIFAR10", "CIFAR100"])
    def test_no_network_is_one_sentence_that_says_what_to_do(self, dataset, tmp_path):
        archive = {"CIFAR10": "cifar-10-python.tar.gz", "CIFAR100": "cifar-100-python.tar.gz"}[dataset]
        with pytest.raises(UserError) as caught:
            load_data(dataset, tmp_path / "data")
        message = str(caught.value)
        for part in ("could not be downloaded", "name resolution", archive, str(tmp_path / "data"), "digits"):
            assert part in message
        assert "\n" not in message

    def test_a_download_is_alone_and_gives_up_on_a_silent_server(self, tmp_path, monkeypatch):
        seen = []

        def look(*_args, **_kwargs):
            with open(tmp_path / ".lock") as file, pytest.raises(BlockingIOError):
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)  # fails while somebody has it alone
            seen.append(socket.getdefaulttimeout())
            raise URLError("no route")

        monkeypatch.setattr("torchvision.datasets.utils.urllib.request.urlopen", look)
        before = socket.getdefaulttimeout()
        socket.setdefaulttimeout(7)
        try:
            with pytest.raises(UserError, match="no route"):
                load_data("CIFAR10", tmp_path)
            assert socket.getdefaulttimeout() == 7
        finally:
            socket.setdefaulttimeout(before)
        assert seen
        assert all(10 <= timeout <= 60 for timeout in seen)
        with open(tmp_path / ".lock") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)

    def test_a_corrupt_archive_is_named(self, tmp_path, monkeypatch):
        write_archive("CIFAR10", tmp_path, monkeypatch)
        archive = tmp_path / "cifar-10-python.tar.gz"
        archive.write_bytes(archive.read_bytes()[:-100])
        with pytest.raises(
            UserError, match=r"cifar-10-python.tar.gz is incomplete, corrupt.*--dataset digits"
        ):
            load_data("CIFAR10", tmp_path)

    def test_an_archive_without_its_files_is_an_error(self, tmp_path, monkeypatch):
        write_archive("CIFAR10", tmp_path, monkeypatch)
        from torchvision.datasets import CIFAR10

        monkeypatch.setattr(CIFAR10, "test_list", [["test_batch", "0" * 32]])
        with pytest.raises(UserError, match="corrupt"):
            load_data("CIFAR10", tmp_path)

    def test_a_dataroot_that_is_a_file_is_an_error(self, tmp_path):
        (tmp_path / "file").write_text("")
        with pytest.raises(UserError, match=r"File exists|Not a directory"):
            load_data("CIFAR10", tmp_path / "file")


@pytest.mark.usefixtures("no_network")
class TestSvhn:
    def test_reads_the_real_format_with_extra_behind_train(self, tmp_path, monkeypatch):
        content = write_svhn(tmp_path, monkeypatch)
        loaded = load_data("SVHN", tmp_path)
        for images, labels, splits in (
            (loaded.train_images, loaded.train_labels, ("train", "extra")),
            (loaded.test_images, loaded.test_labels, ("test",)),
        ):
            assert images.flags.c_contiguous
            assert (images.dtype, labels.dtype) == (np.uint8, np.int64)
            # In the file a image is X[:, :, :, i] and the digit 0 has the label 10.
            pairs = [(content[split], i) for split in splits for i in range(SVHN_SIZES[split])]
            assert len(images) == len(labels) == len(pairs)
            for image, label, ((x, y), i) in zip(images, labels, pairs, strict=True):
                assert np.array_equal(image, x[:, :, :, i])
                assert label == y[i, 0] % 10
        assert loaded.name == "SVHN"
        assert loaded.classes == tuple("0123456789")
        assert not loaded.flip
        assert (loaded.mean, loaded.std) == ((0, 0, 0), (255, 255, 255))

    @pytest.mark.parametrize("split", ["train", "test", "extra"])
    @pytest.mark.parametrize("missing", [True, False])
    def test_a_missing_or_corrupt_file_is_one_sentence_that_says_what_to_do(
        self, split, missing, tmp_path, monkeypatch
    ):
        write_svhn(tmp_path, monkeypatch)
        file = tmp_path / f"{split}_32x32.mat"
        if missing:
            file.unlink()
        else:
            file.write_bytes(file.read_bytes()[:-100])
        with pytest.raises(UserError) as caught:
            load_data("SVHN", tmp_path)
        message = str(caught.value)
        problem = f"SVHN is not in {tmp_path} and" if missing else f"{file} is incomplete, corrupt"
        for part in (problem, "name resolution", f"place {file.name} from http", "--dataset digits"):
            assert part in message
        assert "\n" not in message


@pytest.fixture(scope="module")
def digits():
    return load_data("digits", "unused")


class TestDigits:
    def test_shapes_and_range(self, digits):
        assert digits.train_images.shape == (1437, 32, 32, 3)
        assert digits.test_images.shape == (360, 32, 32, 3)
        assert digits.train_images.dtype == np.uint8
        assert (digits.train_images.min(), digits.train_images.max()) == (0, 255)
        assert digits.train_labels.dtype == digits.test_labels.dtype == np.int64
        assert digits.classes == tuple("0123456789")
        assert digits.name == "digits"
        assert not digits.flip

    def test_the_split_is_stratified_disjoint_and_complete(self, digits):
        train, test = np.bincount(digits.train_labels), np.bincount(digits.test_labels)
        np.testing.assert_allclose(test / (train + test), 360 / 1797, atol=0.01)
        from sklearn.datasets import load_digits

        original = load_digits()
        assert np.array_equal(train + test, np.bincount(original.target))
        # Every original is there once: the enlarged images' mean brightnesses, sorted, are the same.
        both = np.concatenate([digits.train_images, digits.test_images])[..., 0].mean((1, 2))
        enlarged = [
            cv2.resize(np.rint(image * 255 / 16).astype(np.uint8), (32, 32)).mean()
            for image in original.images
        ]
        np.testing.assert_allclose(np.sort(both), np.sort(enlarged))

    def test_is_the_same_everywhere(self, digits):
        assert digits.sha256 == "0bc7938f4cc77f1f7ac9ec87a11b6f58dad207ddec9123fbf484f1384456b9bb"
        assert load_data("digits", "elsewhere").sha256 == digits.sha256

    def test_statistics_are_those_of_the_training_part(self, digits):
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


class TestHoldOut:
    @staticmethod
    def images(images):
        return sorted(image.tobytes() for image in images)

    @pytest.mark.parametrize("count", [20, 143, 360, 1417])
    def test_splits_the_training_set_by_class_and_leaves_the_test_set_out(self, digits, count):
        held = hold_out(digits, count)
        assert (len(held.train_labels), len(held.test_labels)) == (1437 - count, count)
        both = np.concatenate([held.train_images, held.test_images])
        assert self.images(both) == self.images(digits.train_images)
        # Every image kept its label: digits has no image twice.
        label_of = {x.tobytes(): y for x, y in zip(digits.train_images, digits.train_labels, strict=True)}
        assert len(label_of) == 1437
        for images, labels in ((held.train_images, held.train_labels), (held.test_images, held.test_labels)):
            assert [label_of[image.tobytes()] for image in images] == labels.tolist()
        share = np.bincount(digits.train_labels) * count / 1437
        assert (np.abs(np.bincount(held.test_labels) - share) < 1).all()
        assert (held.mean, held.std, held.name, held.flip) == (
            digits.mean,
            digits.std,
            digits.name,
            digits.flip,
        )

    def test_depends_on_the_count_only(self, digits):
        first = hold_out(digits, 100)
        assert first.sha256 == "6386255a94742fbcb142c6a5ff367f9ad1e5f37ec0f9170d355ad2787765411c"
        np.random.seed(5)  # noqa: NPY002 -- the choice must not read numpy's global generator
        torch.manual_seed(5)
        assert hold_out(digits, 100).sha256 == first.sha256
        assert len({digits.sha256, hold_out(digits, 101).sha256, first.sha256}) == 3

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
