"""One run of several processes: the same training as one process's, one directory, one voice, one end."""

import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
import torch.distributed.run
from helpers import (
    METHODS,
    ROOT,
    assert_one_sentence,
    assert_same_run,
    bits,
    call,
    call_ranks,
    load,
    log_lines,
    stop_at,
)
from torch import distributed as dist
from torch import nn
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

import distributed
import main

BATCH = ["--batchSize", 18]  # 2 steps of the 48 images; 2 and 3 processes divide it
SIZES = pytest.mark.parametrize("size", [2, 3])


@pytest.fixture
def ranks(tmp_path):
    """ranks(size, *argv): the outcomes of a run's processes."""
    return lambda size, *argv: call_ranks(size, *argv, folder=tmp_path / "outcomes")


@pytest.fixture
def frozen_statistics(monkeypatch):
    """Batch normalization by its running averages, which stay: without it ranks train as one process does."""
    monkeypatch.setattr(nn.BatchNorm2d, "train", lambda self, mode=True: nn.Module.train(self, False))


def assert_fine(outcomes, code=0):
    """All ended with the code, without an error, and rank 0 alone spoke."""
    assert [(outcome.code, outcome.err) for outcome in outcomes] == [(code, "")] * len(outcomes)
    assert outcomes[0].out
    assert not any(outcome.out for outcome in outcomes[1:])


def assert_one_voice(outcomes, code, *patterns):
    """All ended with the code, and one of them said why."""
    assert [outcome.code for outcome in outcomes] == [code] * len(outcomes)
    assert sum(bool(outcome.err) for outcome in outcomes) == 1
    for outcome in outcomes:
        if outcome.err:
            assert_one_sentence(outcome, code, *patterns)


def assert_same_losses(a, b):
    """Of two runs' logs, to rounding; errors exactly."""
    for one, other in zip(log_lines(a), log_lines(b), strict=True):
        for name in ("train_loss", "test_loss"):
            assert one[name] == pytest.approx(other[name], rel=1e-5), name
        assert (one["train_acc"], one["test_acc"]) == pytest.approx((other["train_acc"], other["test_acc"]))


def on_rank(number):
    return distributed.rank() == number


# ------------------------------------------------------------------------------------------ the same training


@pytest.mark.parametrize("method", METHODS)
def test_ranks_train_as_one_process_on_the_whole_batch(method, tiny, ranks, tmp_path, frozen_statistics):
    """Slices, averaged gradients and the loss's scale: losses, errors and weights are one process's."""
    flags = ["--dropout", 0, "--lr", 0.01, *BATCH]  # SGD's 0.1 needs the normalization
    assert call(*tiny(method, tmp_path / "single", *flags)).code == 0
    expected = load(tmp_path / "single")["model"]
    for size in (1, 2, 3):
        save = tmp_path / str(size)
        assert_fine(ranks(size, *tiny(method, save, *flags)))
        assert_same_losses(save, tmp_path / "single")
        for name, value in load(save)["model"].items():
            torch.testing.assert_close(value, expected[name], rtol=1e-3, atol=1e-5)


@SIZES
@pytest.mark.parametrize("method", METHODS)
def test_all_ranks_end_with_the_same_weights_with_zero_and_without(
    method, size, tiny, ranks, tmp_path, monkeypatch
):
    train = main.train

    def train_and_tell(t, stop):
        code = train(t, stop)
        torch.save(
            [p.detach() for p in t.model.parameters()], t.options.save / f"weights{distributed.rank()}"
        )
        return code

    monkeypatch.setattr(main, "train", train_and_tell)
    for name, flags in (("plain", []), ("zero", ["--zero"])):
        save = tmp_path / name
        assert_fine(ranks(size, *tiny(method, save, *BATCH, *flags)))
        first, *others = (bits(torch.load(save / f"weights{rank}")) for rank in range(size))
        assert others == [first] * (size - 1)
    assert_same_run(tmp_path / "plain", tmp_path / "zero")
    # Dropout and statistics of a slice of their own: it is not what one process does.
    assert call(*tiny(method, tmp_path / "single", *BATCH)).code == 0
    assert bits(load(tmp_path / "single")["model"]) != bits(load(tmp_path / "plain")["model"])


def test_a_step_of_zero_is_divided(tiny, ranks, tmp_path, monkeypatch):
    """Each weight's momentum is on one rank."""
    train = main.train

    def train_and_tell(t, stop):
        code = train(t, stop)
        names = {p: name for name, p in t.model.named_parameters()}
        held = [names[p] for p in t.optimizer.optim.state]
        torch.save((held, list(names.values())), t.options.save / f"held{distributed.rank()}")
        return code

    monkeypatch.setattr(main, "train", train_and_tell)
    assert_fine(ranks(2, *tiny("SGDG", tmp_path / "run", *BATCH, "--zero")))
    (first, names), (second, _) = (torch.load(tmp_path / "run" / f"held{rank}") for rank in range(2))
    assert first
    assert second
    assert sorted(first + second) == sorted(names)


def test_dropout_differs_between_the_ranks(tiny, ranks, tmp_path):
    assert_fine(ranks(3, *tiny("SGD", tmp_path / "run", *BATCH)))
    state = load(tmp_path / "run")
    generators = [state["generators"], *(other["generators"] for other in state["other_ranks"])]
    assert len({bits(generator["cpu"]) for generator in generators}) == 3


@SIZES
def test_evaluation_counts_each_image_once(size, tiny, ranks, tmp_path):
    """Also where a last batch has fewer images than there are processes."""
    for holdout in (0, 13, 19):  # with batches of 6: the last has 6, 1 and 1
        save = tmp_path / str(holdout)
        flags = ["--batchSize", 6, "--holdout", holdout]
        assert_fine(ranks(size, *tiny("SGD", save, *flags)))
        alone = call("--resume", save, "--eval")
        assert alone.code == 0
        outcomes = ranks(size, "--resume", save, "--eval")
        assert_fine(outcomes)
        assert outcomes[0].out == alone.out
        stats = log_lines(save)[-1]
        loss, error = map(float, re.search(r"loss ([\d.]+), top-1 error ([\d.]+)%", alone.out).groups())
        assert (stats["test_loss"], 100 - stats["test_acc"]) == pytest.approx((loss, error), abs=0.0051)


def test_the_running_averages_are_rank_0s(tiny, ranks, tmp_path, monkeypatch):
    """All ranks evaluate with them, and the checkpoint has them."""
    evaluate = main.evaluate

    def evaluate_and_tell(t, stop):
        result = evaluate(t, stop)
        torch.save(list(t.model.buffers()), t.options.save / f"buffers{distributed.rank()}")
        return result

    monkeypatch.setattr(main, "evaluate", evaluate_and_tell)
    save = tmp_path / "run"
    assert_fine(ranks(2, *tiny("SGD", save, *BATCH)))
    first, second = (bits(torch.load(save / f"buffers{rank}")) for rank in range(2))
    assert first == second


# ------------------------------------------------------------------------------------------ stop and continue


def kill_at(monkeypatch, moment, rank):
    """The process of that rank is killed at the moment-th moment of a run, counted from 1.

    An epoch of two steps has five: before each step, the evaluation and the checkpoint, and after that.
    """
    left = iter(range(1, moment))

    def counted(function):
        def wrapper(*args):
            if on_rank(rank) and next(left, None) is None:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args)

        return wrapper

    save, saved = counted(main.save), counted(lambda: None)
    monkeypatch.setattr(main.Training, "step", counted(main.Training.step))
    monkeypatch.setattr(main, "evaluate", counted(main.evaluate))
    monkeypatch.setattr(main, "save", lambda t: (save(t), saved()))


@pytest.mark.parametrize(
    ("method", "size", "zero"), [("SGD", 2, []), ("SGDG", 3, ["--zero"]), ("AdamG", 2, ["--zero"])]
)
def test_a_run_stopped_after_any_step_ends_with_the_same_bits(
    method, size, zero, tiny, ranks, tmp_path, monkeypatch
):
    """A signal to one process stops all; each continues with its own generators, with --zero or without."""
    whole = tmp_path / "whole"
    assert_fine(ranks(size, *tiny(method, whole, *BATCH)))
    checks = 0
    for check in range(1, 100):
        save = tmp_path / f"at{check}"
        with monkeypatch.context() as patch:
            stop_at(patch, check, rank=check % size)
            outcomes = ranks(size, *tiny(method, save, *BATCH, *zero))
        if outcomes[0].code == 0:
            break
        assert_fine(outcomes, 143)
        assert f"with {size} processes" in outcomes[0].out
        assert_fine(ranks(size, "--resume", save, *(zero if check % 2 else [])))
        assert_same_run(save, whole)
        checks += 1
    assert checks >= 9  # two epochs of two steps, and the checks around each evaluation


@pytest.mark.parametrize(
    ("size", "kills", "flags"),
    [(2, 10, []), pytest.param(3, 20, ["--zero"], marks=pytest.mark.long)],
)
def test_killed_at_random_moments_it_ends_with_the_same_bits(
    size, kills, flags, tiny, ranks, tmp_path, monkeypatch
):
    """In each run within the first epoch that it trains, or at the start of the next."""
    whole, save, draw = tmp_path / "whole", tmp_path / "killed", random.Random(size)
    run = [*BATCH, "--epochs", kills + 1, "--epoch_step", f"[{kills // 2}]"]
    assert_fine(ranks(size, *tiny("SGDG", whole, *run)))
    for _ in range(kills):
        victim = draw.randrange(size)
        with monkeypatch.context() as patch:
            kill_at(patch, draw.randint(1, 6), victim)
            outcomes = ranks(size, *tiny("SGDG", save, *run, *flags, "--resume", "auto"))
        codes = [1] * size
        codes[victim] = -signal.SIGKILL
        assert [outcome.code for outcome in outcomes] == codes
    assert_fine(ranks(size, *tiny("SGDG", save, *run, "--resume", "auto")))
    assert_same_run(save, whole)


@pytest.mark.parametrize("now", [1, 3])
def test_another_number_of_processes_goes_on_with_a_note(
    now, tiny, ranks, tmp_path, monkeypatch, frozen_statistics
):
    """In the middle of an epoch; its loss is the mean over all its steps."""
    flags = ["--dropout", 0, *BATCH]
    assert call(*tiny("SGDG", tmp_path / "single", *flags)).code == 0
    save = tmp_path / "run"
    with monkeypatch.context() as patch:
        stop_at(patch, 1)
        assert_fine(ranks(2, *tiny("SGDG", save, *flags)), 143)
    assert load(save)["batch"] == 1
    outcomes = ranks(now, "--resume", save) if now > 1 else [call("--resume", save)]
    assert_fine(outcomes)
    assert outcomes[0].out.count(f"note: 2 processes then, {now} now") == 1
    assert_same_losses(save, tmp_path / "single")
    assert len(load(save).get("other_ranks", [])) == now - 1


def test_a_run_of_one_process_goes_on_with_two(tiny, ranks, tmp_path, finished):
    save = shutil.copytree(finished["SGD"][0], tmp_path / "single")
    outcomes = ranks(2, "--resume", save, "--save", tmp_path / "run", "--epochs", 3)
    assert_fine(outcomes)
    assert "note: 1 processes then, 2 now" in outcomes[0].out
    assert [stats["epoch"] for stats in log_lines(tmp_path / "run")] == [1, 2, 3]


def test_a_launcher_may_send_its_signal_more_than_once(monkeypatch):
    monkeypatch.setattr(distributed, "size", lambda: 2)
    before = {number: signal.getsignal(number) for number in main.StopRequest.SIGNALS}
    try:
        with main.StopRequest(None) as stop:
            for _ in range(3):
                assert signal.getsignal(signal.SIGTERM) != signal.SIG_DFL  # which would end the tests
                signal.raise_signal(signal.SIGTERM)
        assert signal.getsignal(signal.SIGTERM) != signal.SIG_DFL
        signal.raise_signal(signal.SIGTERM)
        assert stop.received == signal.SIGTERM
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


# ------------------------------------------------------------------------------------------------- one voice


def test_processes_that_lose_their_launcher_before_training_stop(tiny, ranks, tmp_path, monkeypatch):
    load_data = main.load_data

    def load_and_lose(*args):
        monkeypatch.setattr(os, "getppid", lambda: 1)
        return load_data(*args)

    monkeypatch.setattr(main, "load_data", load_and_lose)
    outcomes = ranks(2, *tiny("SGD", tmp_path / "run", *BATCH))
    assert_fine(outcomes, 129)
    assert "stopped by SIGHUP after 0 epochs and 1 of 2 steps" in outcomes[0].out


@pytest.mark.parametrize("rank", [0, 1])
def test_a_loss_that_is_not_finite_on_one_rank_stops_all(rank, tiny, ranks, tmp_path, monkeypatch):
    inputs = main.Training.inputs

    def spoiled(t, images, labels):
        x, labels = inputs(t, images, labels)
        return (x * float("nan") if on_rank(rank) and t.batch == 1 else x), labels

    monkeypatch.setattr(main.Training, "inputs", spoiled)
    outcomes = ranks(2, *tiny("SGDG", tmp_path / "run", *BATCH))
    assert_one_voice(outcomes, 1, "not finite since epoch 1, step 2")
    assert not (tmp_path / "run" / "checkpoint.pt").exists()


@pytest.mark.parametrize(
    ("size", "flags", "code", "patterns"),
    [
        (3, ["--resume", "FINISHED", "--epochs", 9], 2, ["one of 1, 2, 4, 8, 16 processes"]),
        (3, ["--batchSize", 16], 2, ["16 does not divide among 3 processes.*15"]),
        (3, ["--batchSize", 1], 2, ["1 does not divide among 3 processes.*3"]),
        (2, ["--batchSize", 100], 1, ["--batchSize 100 does not fit"]),
        (2, ["--sync_bn"], 2, ["--sync_bn needs GPUs"]),
        (2, ["--ngpu", 3], 2, ["--ngpu 3", "2 processes"]),
        (2, ["--no-such-flag"], 2, ["--no-such-flag"]),
        (2, ["--resume", "/nowhere"], 1, ["/nowhere"]),
        (2, ["--depth", 11], 2, ["--depth"]),
        (2, ["--model", "vgg11", "--batchSize", 2], 2, ["at least 4"]),
    ],
)
def test_a_mistake_is_answered_once(size, flags, code, patterns, tiny, ranks, tmp_path, finished):
    flags = [finished["SGD"][0] if word == "FINISHED" else word for word in flags]
    assert_one_voice(ranks(size, *tiny("SGD", tmp_path / "run", *flags)), code, *patterns)


def test_help_is_printed_once(ranks):
    outcomes = ranks(2, "--help")
    assert_fine(outcomes)
    assert "--optim_method" in outcomes[0].out


@pytest.mark.parametrize(
    ("error", "code", "pattern"), [(KeyboardInterrupt(), 130, "interrupted"), (BrokenPipeError(), 141, None)]
)
def test_an_end_before_training_is_said_once(error, code, pattern, tiny, ranks, tmp_path, monkeypatch):
    """Ctrl-C on a terminal reaches all; the reader of the output leaves the first alone."""
    print_start = main.report.print_start

    def interrupted(*args):
        if pattern or on_rank(0):
            sys.stdout = open(os.devnull, "w")  # noqa: SIM115 (a real file, as a process has)
            raise error
        return print_start(*args)

    monkeypatch.setattr(main.report, "print_start", interrupted)
    outcomes = ranks(2, *tiny("SGD", tmp_path / "run", *BATCH))
    assert outcomes[0].code == code
    texts = [outcome.err for outcome in outcomes if outcome.err]
    assert [bool(re.search(pattern or "", text)) for text in texts] == [True] * bool(pattern)


def test_a_reader_that_left_is_answered_where_output_is_no_file_too(tiny, tmp_path, monkeypatch):
    def left(*_):
        raise BrokenPipeError

    monkeypatch.setattr(main.report, "print_start", left)  # `call` gives main.py a StringIO
    outcome = call(*tiny("SGD", tmp_path / "run"))
    assert (outcome.code, outcome.err) == (141, "")


def dead(*exit_codes):
    return {rank: ProcessFailure(rank, 1, code, "none") for rank, code in enumerate(exit_codes) if code}


@pytest.mark.parametrize(
    ("failures", "code", "name"),
    [
        (dead(1, -9, 1), 137, "rank 1 was ended by SIGKILL"),
        (dead(-15, 1), 143, "rank 0 was ended by SIGTERM"),
        (dead(0, 2, 2), 2, ""),
    ],
)
def test_ngpu_tells_who_died_from_who_followed(failures, code, name, tiny, tmp_path, monkeypatch):
    def fail(words):
        raise ChildFailedError("main.py", failures)

    monkeypatch.setattr(torch.distributed.run, "main", fail)
    outcome = call(*tiny("SGD", tmp_path / "run", "--ngpu", 3))
    assert (outcome.code, outcome.err) == (code, f"main.py: error: {name}\n" if name else "")


@pytest.mark.parametrize(
    ("error", "pattern"),
    [
        (RuntimeError("[connection.cc:79] Connection closed by peer [::1]:80"), "another process"),
        (RuntimeError("[buffer.cc:72] Timed out waiting 1800000ms for recv"), "another process"),
        (
            dist.DistBackendError("NCCL error in: a.cpp:9, remote process exited or there was"),
            "another process",
        ),
        (dist.DistNetworkError("failed to recv, got 0 bytes"), "another process"),
        (
            dist.DistBackendError(
                "NCCL error in: a.cpp:9, invalid usage\nLast error:\nDuplicate GPU detected"
            ),
            "the processes cannot work together: NCCL .* Last error: Duplicate GPU",
        ),
    ],
)
def test_an_error_of_the_connection_is_one_sentence(error, pattern, monkeypatch):
    def fail(argv):
        raise error

    monkeypatch.setattr(main, "run", fail)
    with pytest.raises(type(error)):
        call()  # of a single process it is none
    monkeypatch.setattr(distributed, "launched", lambda: True)
    assert_one_sentence(call(), 1, pattern)


def test_a_number_of_processes_without_a_launcher_is_no_launch(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert call("--summary", "--depth", 10, "--width", 1).code == 0


def test_what_fails_on_one_rank_is_said_once(tiny, ranks, tmp_path, monkeypatch):
    load_data = main.load_data

    def broken_elsewhere(*args):
        if on_rank(1):
            raise main.UserError("this disk is broken")
        return load_data(*args)

    def say(sentence, code):
        (tmp_path / f"rank {distributed.rank()}").write_text(sentence)
        return utils_say(sentence, code)

    utils_say = main.utils.say
    monkeypatch.setattr(main.utils, "say", say)
    monkeypatch.setattr(main, "load_data", broken_elsewhere)
    assert_one_voice(ranks(2, *tiny("SGD", tmp_path / "run", *BATCH)), 1, "this disk is broken")
    # The other stopped for the same reason, not for a lost connection.
    assert (tmp_path / "rank 0").read_text() == (tmp_path / "rank 1").read_text() == "this disk is broken"


class DiskError(Exception):
    """Pickle writes it, and then cannot read it."""

    def __init__(self, name, number):
        super().__init__(f"{name} has error {number}")


@pytest.mark.parametrize(("broken", "place"), [(0, "main.utils.write_config"), (1, "main.load_data")])
def test_an_error_that_pickle_cannot_carry_is_told(broken, place, tiny, ranks, tmp_path, monkeypatch):
    """Of the first process to all, and of any to all."""
    load_data = main.load_data

    def failing(*args):
        if on_rank(broken):
            raise DiskError("sda", 5)
        return load_data(*args)

    monkeypatch.setattr(place, failing)
    outcomes = ranks(2, *tiny("SGD", tmp_path / "run", *BATCH))
    last = [outcome.err.splitlines()[-1] for outcome in outcomes]
    assert [line.endswith("DiskError: sda has error 5") for line in last] == [True, True], outcomes
    # The process that it happened to says where.
    assert ["in failing" in outcome.err for outcome in outcomes] == [broken == 0, broken == 1]


def test_a_directory_that_cannot_be_written_is_said_once(tiny, ranks, tmp_path, monkeypatch):
    def full(path, state):
        raise main.UserError("the disk is full")

    monkeypatch.setattr(main, "save_checkpoint", full)
    assert_one_voice(ranks(2, *tiny("SGD", tmp_path / "run", *BATCH)), 1, "the disk is full")


def test_a_second_run_in_the_same_directory_is_refused_once(tiny, ranks, tmp_path):
    with main.utils.claim_directory(tmp_path / "run", True):
        outcomes = ranks(2, *tiny("SGD", tmp_path / "run", *BATCH))
    assert_one_voice(outcomes, 1, f"is being written by process {os.getpid()}")


def test_a_process_that_dies_ends_the_others(tiny, ranks, tmp_path, monkeypatch):
    """Those that are left say so once, and the last checkpoint is whole."""
    step = main.Training.step

    def die(t, x, labels):
        if on_rank(1) and (t.epoch, t.batch) == (1, 1):
            os.kill(os.getpid(), signal.SIGKILL)
        return step(t, x, labels)

    monkeypatch.setattr(main.Training, "step", die)
    save = tmp_path / "run"
    outcomes = ranks(3, *tiny("SGD", save, *BATCH))
    assert [outcome.code for outcome in outcomes] == [1, -signal.SIGKILL, 1]
    assert (outcomes[0].err + outcomes[2].err).count("another process of the run has gone") == 1
    assert (load(save)["epoch"], load(save)["batch"]) == (1, 0)


def test_summary_and_a_finished_run(tiny, ranks, tmp_path, finished):
    save = shutil.copytree(finished["SGDG"][0], tmp_path / "run")
    for words in (["--summary"], ["--summary", "--zero"], []):
        alone, outcomes = call("--resume", save, *words), ranks(2, "--resume", save, *words)
        assert_fine(outcomes)
        assert outcomes[0].out.replace("processes: 2, 8 images of each batch to each\n", "") == alone.out


def test_what_could_not_be_trained_here_is_evaluated_all_the_same(ranks, tmp_path, finished):
    """Of a run with --sync_bn or float16, without a GPU; with processes that do not divide its batches."""
    save = shutil.copytree(finished["SGD"][0], tmp_path / "run")
    expected = call("--resume", save, "--eval").out
    state = load(save)
    for options in ({"sync_bn": True}, {"dtype": "float16"}):
        torch.save({**state, "options": {**state["options"], **options}}, save / "checkpoint.pt")
        assert_fine([call("--resume", save, "--summary")])
        outcomes = ranks(3, "--resume", save, "--eval")
        assert_fine(outcomes)
        if "sync_bn" in options:
            assert outcomes[0].out == expected
        (name,) = options
        assert_one_sentence(
            call("--resume", save, "--epochs", 9), 2, f"--{name} .*a run that was made with it"
        )


# --------------------------------------------------------------------------------------------- real launchers


def spawn(*words, **how):
    command = [sys.executable, *map(str, words)]
    how = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "cwd": ROOT, **how}
    return subprocess.Popen(command, **how)


TORCHRUN = ("-m", "torch.distributed.run", "--nproc_per_node", 2)


def wait_for_an_epoch(save, process, then=None):
    """Until there is another checkpoint than then; returns what tells it from others."""
    file = save / "checkpoint.pt"
    while not file.exists() or file.stat().st_mtime_ns == then:
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    return file.stat().st_mtime_ns


def children(pid):
    return list(map(int, subprocess.check_output(["pgrep", "-P", str(pid)], text=True).split()))


@pytest.mark.parametrize("number", [signal.SIGINT, pytest.param(signal.SIGUSR1, marks=pytest.mark.long)])
def test_ngpu_starts_the_processes_and_a_stop_reaches_them(number, tiny, ranks, tmp_path):
    """Ctrl-C in a terminal reaches launcher and processes, and the launcher passes it on.

    Started by nohup, none of them minds that the terminal is closed.
    """
    save = tmp_path / "run"
    more = [*BATCH, "--ngpu", 2, "--epochs", 1000, "--epoch_step", "[]"]
    nohup = {"start_new_session": True, "preexec_fn": lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN)}
    process = spawn("main.py", *tiny("SGDG", save, *more), **nohup)
    then = wait_for_an_epoch(save, process)
    os.killpg(process.pid, signal.SIGHUP)
    for _ in range(2):
        then = wait_for_an_epoch(save, process, then)
    os.killpg(process.pid, number)
    out, err = process.communicate()
    assert (process.returncode, err) == (128 + number, "")
    assert out.count(f"stopped by {number.name}") == 1
    state = load(save)
    assert len(state["other_ranks"]) == 1
    epochs = state["epoch"] + 1
    assert_fine(ranks(2, "--resume", save, "--epochs", epochs))
    more[more.index(1000)] = epochs
    assert_fine(ranks(2, *tiny("SGDG", tmp_path / "whole", *more)))
    assert_same_run(save, tmp_path / "whole", but=("epochs",))


def signal_one_of_ngpu(number, tiny, save) -> tuple[int, str, str]:
    """Exit code and outputs of a run of two processes, of which the second gets the signal."""
    process = spawn("main.py", *tiny("SGD", save, *BATCH, "--ngpu", 2, "--epochs", 1000))
    wait_for_an_epoch(save, process)
    os.kill(children(process.pid)[1], number)
    out, err = process.communicate()
    return process.returncode, out, err


def test_ngpu_names_a_process_that_was_killed(tiny, tmp_path):
    save = tmp_path / "run"
    code, _, err = signal_one_of_ngpu(signal.SIGKILL, tiny, save)
    assert code == 128 + signal.SIGKILL
    assert err.endswith("main.py: error: rank 1 was ended by SIGKILL\n")
    assert err.count("continue with --resume") <= 1
    assert "Traceback" not in err
    assert load(save)["epoch"] >= 1


@pytest.mark.parametrize(
    ("codes", "result", "said"),
    [
        ([143, -15], 143, ""),  # asked to stop, and one was ended by the launcher while it left
        ([-9, 1], 137, "main.py: error: rank 0 was ended by SIGKILL\n"),
        ([1, -9], 137, "main.py: error: rank 1 was ended by SIGKILL\n"),
        ([1, 1], 1, ""),  # they have said why
    ],
)
def test_the_launcher_tells_a_stop_from_a_death(codes, result, said, monkeypatch, capsys):
    def fail(words):
        failures = {rank: ProcessFailure(rank, 1, code, "") for rank, code in enumerate(codes)}
        raise ChildFailedError("main.py", failures)

    monkeypatch.setattr(torch.distributed.run, "main", fail)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert distributed.launch(2, ["main.py"]) == result
    assert capsys.readouterr().err == said


@pytest.mark.long
def test_a_signal_to_a_process_of_ngpu_stops_all(tiny, tmp_path):
    code, out, err = signal_one_of_ngpu(signal.SIGTERM, tiny, tmp_path / "run")
    assert (code, err, out.count("stopped by SIGTERM")) == (143, "", 1)


@pytest.mark.long
def test_compiled_processes_go_on_with_the_same_bits(tiny, tmp_path):
    whole, save = tmp_path / "whole", tmp_path / "run"
    flags = [*BATCH, "--ngpu", 2, "--compile", "--epoch_step", "[]"]
    for words in (tiny("SGDG", whole, *flags), tiny("SGDG", save, *flags, "--epochs", 1)):
        process = spawn("main.py", *words)
        _, err = process.communicate()
        assert process.returncode == 0, err
        assert "[rank1]" not in err
    assert spawn("main.py", "--resume", save, "--epochs", 2, "--ngpu", 2, "--compile").wait() == 0
    assert_same_run(save, whole, but=("epochs",))


@pytest.mark.long
@pytest.mark.parametrize(
    ("number", "named"),
    [(signal.SIGKILL, "(exitcode: -9) local_rank: 0"), (signal.SIGTERM, "(exitcode: 143) local_rank: ")],
)
def test_torchrun_names_a_process_that_ended_and_starts_all_again(number, named, tiny, ranks, tmp_path):
    """Also after a stop by a signal, which it takes for a failure."""
    save, whole = tmp_path / "run", tmp_path / "whole"
    more = [*BATCH, "--epochs", 60]
    words = [*TORCHRUN, "--standalone", "--max-restarts", 3, "main.py"]
    process = spawn(*words, *tiny("SGDG", save, *more, "--resume", "auto"))
    wait_for_an_epoch(save, process)
    os.kill(children(process.pid)[0], number)
    out, err = process.communicate()
    assert process.returncode == 0, err
    assert f"failed {named}" in err
    assert "finished 60 epochs" in out
    assert_fine(ranks(2, *tiny("SGDG", whole, *more)))
    assert_same_run(save, whole)


@pytest.mark.long
def test_a_signal_to_torchrun_ends_in_a_checkpoint(tiny, tmp_path):
    save = tmp_path / "run"
    process = spawn(*TORCHRUN, "--standalone", "main.py", *tiny("SGD", save, *BATCH, "--epochs", 1000))
    wait_for_an_epoch(save, process)
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate()
    assert process.returncode != 0
    assert out.count("stopped by SIGTERM") == 1
    assert call("--resume", save, "--eval").code == 0


@pytest.mark.long
def test_without_their_launcher_the_processes_stop(tiny, tmp_path):
    save = tmp_path / "run"
    process = spawn("main.py", *tiny("SGD", save, *BATCH, "--ngpu", 2, "--epochs", 10000))
    wait_for_an_epoch(save, process)
    process.kill()
    out, _ = process.communicate()  # until the processes, too, have closed their output
    assert out.count("stopped by SIGHUP") == 1
    assert load(save)["epoch"] < 10000


@pytest.mark.long
def test_two_machines(tiny, ranks, tmp_path):
    """Two torchruns that meet over the loopback, one process each."""
    save, whole = tmp_path / "run", tmp_path / "whole"
    meeting = ["--nnodes", 2, "--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:29517", "--rdzv-id", 7]
    torchrun = ["-m", "torch.distributed.run", "--nproc_per_node", 1, *meeting, "main.py"]
    hosts = [spawn(*torchrun, *tiny("SGDG", save, *BATCH)) for _ in range(2)]
    outputs = [host.communicate() for host in hosts]
    assert [host.returncode for host in hosts] == [0, 0], outputs
    assert sum(out.count("finished 2 epochs") for out, _ in outputs) == 1
    assert_fine(ranks(2, *tiny("SGDG", whole, *BATCH)))
    assert_same_run(save, whole)
