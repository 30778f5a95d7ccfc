"""What tests share: main.py in this process, its runs as files, small data sets in the real formats."""

import os

# Before torch is imported, and for every subprocess: one thread computes the same bits on any machine, and
# tiny networks gain nothing from more.
os.environ["OMP_NUM_THREADS"] = "1"

import contextlib
import io
import json
import pickle
import re
import signal
import tarfile
import traceback
import warnings
from hashlib import md5
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
import pytest
import scipy.io
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # the optimizers' kernel runs on the CPU; before main imports them

import main

ROOT = Path(main.__file__).parent
METHODS = ("SGD", "SGDG", "AdamG")
STEPS = 3  # of an epoch of `tiny`
TIMES = ("train_time", "test_time", "images_per_sec")  # of log.txt: what two equal runs do not share


class Outcome(NamedTuple):
    """What a user sees of one call of main.py."""

    code: int
    out: str
    err: str


def call(*argv) -> Outcome:
    """main.py in this process: much faster than another one, which would import torch for seconds."""
    out, err, caught = io.StringIO(), io.StringIO(), warnings.catch_warnings(record=True)
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), caught as seen:
        warnings.simplefilter("default")
        try:
            code = main.main([str(word) for word in argv])
        except SystemExit as end:  # of --help
            code = end.code
    hidden = (DeprecationWarning, PendingDeprecationWarning, ImportWarning, ResourceWarning)  # by Python
    shown = [f"{w.filename}: {w.message}\n" for w in seen if not issubclass(w.category, hidden)]
    return Outcome(code, out.getvalue(), err.getvalue() + "".join(shown))


def assert_one_sentence(outcome: Outcome, code: int, *patterns: str) -> None:
    """The call failed with `code` and said why on one line of standard error, which has all `patterns`."""
    assert outcome.code == code, outcome
    assert re.fullmatch(r"main\.py: error: \S[^\n]*\n", outcome.err), outcome.err
    for pattern in patterns:
        assert re.search(pattern, outcome.err), (pattern, outcome.err)


def stop_at(monkeypatch, check: int, rank: int = 0) -> None:
    """The run is asked to stop, as by SIGTERM, when the loop asks for the check-th time, counted from 1.

    Of several processes, the one of that rank is asked.
    """

    class Stop(main.StopRequest):
        checks = 0

        def asked(self, by_signal=False):
            self.checks += 1
            if main.distributed.rank() == rank and self.checks >= check:
                self.received = signal.SIGTERM
            return super().asked(by_signal)

    monkeypatch.setattr(main, "StopRequest", Stop)


def make_images(root: Path, train: int = 16, test: int = 6) -> Path:
    """A `folder` data set of so many noisy images of each of 3 classes, which have a tinge of their own."""
    rng = np.random.default_rng(0)
    for part, count in (("train", train), ("test", test)):
        for label in range(3):
            directory = root / part / f"class{label}"
            directory.mkdir(parents=True)
            for index in range(count):
                image = rng.integers(0, 230, (32, 32, 3), dtype=np.uint8)
                image[..., label] += 4
                cv2.imwrite(str(directory / f"{index:02}.png"), image)
    return root


def contents(directory: Path) -> dict[str, bytes]:
    """Every file below a directory, byte for byte."""
    return {str(p.relative_to(directory)): p.read_bytes() for p in directory.rglob("*") if p.is_file()}


def log_lines(directory: Path) -> list[dict]:
    """The epochs of log.txt, without the times."""
    epochs = [json.loads(line.removeprefix("json_stats: ")) for line in (directory / "log.txt").open()]
    return [{key: value for key, value in epoch.items() if key not in TIMES} for epoch in epochs]


def load(directory: Path) -> dict:
    """A run's checkpoint."""
    return torch.load(directory / "checkpoint.pt", weights_only=True)


def bits(value):
    """A checkpoint's value as something that == compares bit by bit, without the times."""
    if isinstance(value, torch.Tensor):
        return str(value.dtype), tuple(value.shape), value.cpu().contiguous().numpy().tobytes()
    if isinstance(value, dict):
        return {key: bits(item) for key, item in value.items() if key not in TIMES}
    if isinstance(value, (list, tuple)):
        return [bits(item) for item in value]
    return value


def assert_same_run(a: Path, b: Path, *, but: tuple[str, ...] = ()) -> None:
    """Both runs ended with the same bits in every part of checkpoint and log, options `but` aside."""
    runs = [{**load(run), "log": log_lines(run)} for run in (a, b)]
    for run in runs:
        for part in (run["options"], *run["history"], *run["log"]):
            for name in but:
                part.pop(name, None)
    assert runs[0].keys() == runs[1].keys()
    for part in runs[0]:
        assert bits(runs[0][part]) == bits(runs[1][part]), part


def write_archive(dataset, root, monkeypatch):
    """Writes CIFAR's archive with 4 random images a file; returns {part: (rows of 3,072 bytes, labels)}."""
    from torchvision import datasets

    source, label_key = getattr(datasets, dataset), "labels" if dataset == "CIFAR10" else "fine_labels"
    rng, parts, files, checksums = np.random.default_rng(0), {}, {}, {}
    for part, listed in (("train", source.train_list), ("test", source.test_list)):
        count = 4 * len(listed)
        rows, labels = parts[part] = rng.integers(0, 256, (count, 3072), np.uint8), rng.integers(0, 10, count)
        for i, (name, _) in enumerate(listed):
            mine = slice(4 * i, 4 * i + 4)
            files[name] = {"data": rows[mine], label_key: labels[mine].tolist()}
    names = [f"class{i}" for i in range(100 if dataset == "CIFAR100" else 10)]
    files[source.meta["filename"]] = {source.meta["key"]: names}
    with tarfile.open(root / source.filename, "w:gz") as archive:
        for name, content in files.items():
            payload = pickle.dumps(content)
            checksums[name] = md5(payload).hexdigest()
            info = tarfile.TarInfo(f"{source.base_folder}/{name}")
            info.size = len(payload)
            archive.addfile(info, io.BytesIO(payload))
    monkeypatch.setattr(source, "tgz_md5", md5((root / source.filename).read_bytes()).hexdigest())
    for listed in ("train_list", "test_list"):
        monkeypatch.setattr(source, listed, [[name, checksums[name]] for name, _ in getattr(source, listed)])
    monkeypatch.setattr(source, "meta", {**source.meta, "md5": checksums[source.meta["filename"]]})
    return parts


def write_svhn(root, monkeypatch):
    """Writes the three files of SVHN with random images, compressed as the real ones; returns them."""
    from torchvision.datasets import SVHN

    rng, content, listed = np.random.default_rng(0), {}, {}
    for split, count in (("train", 11), ("test", 5), ("extra", 23)):
        url, filename, _ = SVHN.split_list[split]
        images = rng.integers(0, 256, (32, 32, 3, count), dtype=np.uint8)
        labels = np.resize(np.arange(10, 0, -1, dtype=np.uint8), (count, 1))  # 10 is the digit 0
        scipy.io.savemat(root / filename, {"X": images, "y": labels}, do_compression=True)
        listed[split] = [url, filename, md5((root / filename).read_bytes()).hexdigest()]
        content[split] = images, labels
    monkeypatch.setattr(SVHN, "split_list", listed)
    return content


def call_ranks(size: int, *argv, folder: Path, **environment) -> list[Outcome]:
    """main.py in forked processes of one run, as torchrun starts them; what is patched here is patched there.

    `folder` takes what they print, and must not be a run's. `environment`: what the launcher says otherwise
    than torchrun (None: not at all). Returns their outcomes, by rank; of one that was killed the signal,
    negative, as its code.
    """
    if tuple(map(int, torch.__version__.split(".")[:2])) < (2, 14):
        pytest.skip("an older torch's gloo hangs when a forked process leaves; torchrun's processes do not")
    folder.mkdir(exist_ok=True)
    port, tell_port = os.pipe()  # the store's threads start last: a fork could copy a lock that one holds
    pids = []
    for rank in range(size):
        if (pid := os.fork()) == 0:
            try:
                place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size}
                place |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": int(os.read(port, 5))}
                place |= {"TORCHELASTIC_USE_AGENT_STORE": True, "TORCHELASTIC_RESTART_COUNT": 0} | environment
                os.environ |= {name: str(value) for name, value in place.items() if value is not None}
                outcome = call(*argv)
            except BaseException:
                outcome = Outcome(99, "", traceback.format_exc())
            (folder / str(rank)).write_text(json.dumps(outcome))
            os._exit(0)
        pids.append(pid)
    store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    os.write(tell_port, f"{store.port:05}".encode() * size)
    os.close(port)
    os.close(tell_port)
    codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
    return [
        Outcome(*json.loads((folder / str(rank)).read_text())) if code == 0 else Outcome(code, "", "")
        for rank, code in enumerate(codes)
    ]
