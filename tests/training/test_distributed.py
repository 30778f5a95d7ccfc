"""One run of several processes: the same training as one process's, one directory, one voice, one end."""

import logging
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from itertools import chain, count, repeat
from unittest.mock import Mock

import pytest
import torch
from helpers import assert_one_sentence, assert_same_run, bits, call, call_ranks, load, log_lines, stop_at
from torch import distributed as dist
from torch import nn

import distributed
import main
from options import parse_options

BATCH = ["--batchSize", 18]  # 2 steps of the 48 images; 2 and 3 processes divide it


@pytest.fixture
def ranks(tmp_path):
    """ranks(size, *argv): the outcomes of a run's processes."""
    return lambda size, *argv, **said: call_ranks(size, *argv, folder=tmp_path / "outcomes", **said)


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
    """All ended with the code, and rank 0 said why."""
    assert [outcome.code for outcome in outcomes] == [code] * len(outcomes)
    assert not any(outcome.err for outcome in outcomes[1:])
    assert_one_sentence(outcomes[0], code, *patterns)


def assert_same_losses(a, b):
    """Of two runs' logs, to rounding; and the same errors."""
    names = ("train_loss", "test_loss", "train_acc", "test_acc")
    for one, other in zip(log_lines(a), log_lines(b), strict=True):
        assert [one[name] for name in names] == pytest.approx([other[name] for name in names], rel=1e-5)


def generators(save):
    """Of a run's checkpoint, by rank."""
    state = load(save)
    return [bits(rank["generators"]["cpu"]) for rank in (state, *state.get("other_ranks", []))]


# ------------------------------------------------------------------------------------------ the same training


@pytest.mark.parametrize("method", ["SGD", "SGDG", "AdamG"])
def test_ranks_train_and_test_as_one_process_on_the_whole_batch(
    method, tiny, ranks, tmp_path, frozen_statistics
):
    """Slices, averaged gradients and the loss's scale: losses, errors and weights are one process's.

    Also where a last batch of the evaluation, here of one image, has fewer than there are processes.
    """
    flags = ["--dropout", 0, "--lr", 0.01, "--batchSize", 12, "--holdout", 13]  # 0.1 needs the normalization
    assert call(*tiny(method, tmp_path / "single", *flags)).code == 0
    expected = load(tmp_path / "single")["model"]
    for size in (2, 3):
        save = tmp_path / str(size)
        assert_fine(ranks(size, *tiny(method, save, *flags)))
        assert_same_losses(save, tmp_path / "single")
        for name, value in load(save)["model"].items():
            torch.testing.assert_close(value, expected[name], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(("method", "size"), [("SGD", 2), ("SGDG", 3), ("AdamG", 2)])
def test_all_ranks_end_with_the_same_weights_with_zero_and_without(
    method, size, tiny, ranks, tmp_path, monkeypatch
):
    """And the same running averages. Dropout differs."""
    train = main.train

    def train_and_tell(t, stop):
        code = train(t, stop)
        torch.save(t.model.state_dict(), t.options.save / f"told{distributed.rank()}")
        return code

    monkeypatch.setattr(main, "train", train_and_tell)
    for name, flags in (("plain", []), ("zero", ["--zero"])):
        save = tmp_path / name
        assert_fine(ranks(size, *tiny(method, save, *BATCH, *flags)))
        states = [bits(torch.load(save / f"told{rank}")) for rank in range(size)]
        assert states == [states[0]] * size
    assert_same_run(tmp_path / "plain", tmp_path / "zero")
    assert len(set(generators(save))) == size


# ------------------------------------------------------------------------------------------ stop and continue


@pytest.mark.parametrize(("method", "size", "zero"), [("SGD", 2, []), ("AdamG", 3, ["--zero"])])
def test_a_run_stopped_after_any_step_ends_with_the_same_bits(
    method, size, zero, tiny, ranks, tmp_path, monkeypatch
):
    """A signal to one process stops all; each continues with its own generators, with --zero or without."""
    whole = tmp_path / "whole"
    assert_fine(ranks(size, *tiny(method, whole, *BATCH)))
    for check in count(1):
        save = tmp_path / f"at{check}"
        with monkeypatch.context() as patch:
            stop_at(patch, check, rank=check % size)
            outcomes = ranks(size, *tiny(method, save, *BATCH, *zero))
        if outcomes[0].code == 0:
            break
        assert_fine(outcomes, 143)
        assert f"--ngpu {size}" in outcomes[0].out
        assert_fine(ranks(size, "--resume", save, *(zero if check % 2 else [])))
        assert_same_run(save, whole)
    assert check > 9  # two epochs of two steps, and the checks around each evaluation


def kill_at(monkeypatch, check, rank):
    """The process of that rank is killed when it asks for the check-th time whether to stop."""
    asked, left = main.StopRequest.asked, iter(range(1, check))

    def ask(stop, by_signal=False):
        if distributed.rank() == rank and next(left, None) is None:
            os.kill(os.getpid(), signal.SIGKILL)
        return asked(stop, by_signal)

    monkeypatch.setattr(main.StopRequest, "asked", ask)


@pytest.mark.parametrize(("size", "zero"), [(1, []), (2, ["--zero"])])
def test_killed_at_every_moment_of_an_epoch_it_ends_with_the_same_bits(
    size, zero, tiny, ranks, tmp_path, monkeypatch
):
    """After each of two steps, before and after the evaluation, after the checkpoint, and in the next epoch.

    A process that is left says so in one sentence, and the last checkpoint is whole.
    """
    whole, save = tmp_path / "whole", tmp_path / "killed"
    run = [*BATCH, "--epochs", 4, "--epoch_step", "[2]"]
    assert_fine(ranks(size, *tiny("SGDG", whole, *run)))
    for check in range(1, 7):
        victim = check % size
        with monkeypatch.context() as patch:
            kill_at(patch, check, victim)
            outcomes = ranks(size, *tiny("SGDG", save, *run, *zero, "--resume", "auto"))
        assert outcomes.pop(victim).code == -signal.SIGKILL
        if victim == 1:
            assert_one_sentence(outcomes[0], 1, "another process of the run has gone.*--resume")
    assert load(save)["epoch"] == 2  # which the last two left
    assert_fine(ranks(size, *tiny("SGDG", save, *run, "--resume", "auto")))
    assert_same_run(save, whole)


@pytest.mark.parametrize(("then", "now"), [(2, 1), (2, 3), (1, 2)])
def test_another_number_of_processes_goes_on_with_a_note(
    then, now, tiny, ranks, tmp_path, monkeypatch, frozen_statistics
):
    """In the middle of an epoch; its loss is the mean over all its steps."""
    flags, save, whole = ["--dropout", 0, *BATCH], tmp_path / "run", tmp_path / "whole"
    assert_fine(ranks(now, *tiny("SGDG", whole, *flags)))
    with monkeypatch.context() as patch:
        stop_at(patch, 1)
        assert_fine(ranks(then, *tiny("SGDG", save, *flags)), 143)
    state = load(save)
    assert state["batch"] == 1
    # Without dropout nothing draws: rank 0 has its generator to the end, the others new ones.
    state["generators"]["cpu"] = torch.Generator().manual_seed(123).get_state()
    torch.save(state, save / "checkpoint.pt")
    outcomes = ranks(now, "--resume", save)
    assert_fine(outcomes)
    assert outcomes[0].out.count(f"note: {then} processes then, {now} now") == 1
    assert_same_losses(save, whole)
    assert generators(save)[0] == bits(state["generators"]["cpu"])
    assert len({*generators(save), *generators(whole)}) == 2 * now


def test_a_launcher_may_send_its_signal_more_than_once(monkeypatch):
    """Also when the training has ended, and the others' has not."""
    handlers = {}
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    monkeypatch.setattr(signal, "signal", lambda number, handler: handlers.update({number: handler}))
    with main.StopRequest(None) as stop:
        handlers[signal.SIGTERM](signal.SIGTERM, None)
    handlers[signal.SIGTERM](signal.SIGTERM, None)
    assert stop.received == signal.SIGTERM


def test_processes_that_lose_their_launcher_before_training_stop(tiny, ranks, tmp_path, monkeypatch):
    parents = chain([100], repeat(1))
    monkeypatch.setattr(os, "getppid", lambda: next(parents))
    outcomes = ranks(2, *tiny("SGD", tmp_path / "run", *BATCH))
    assert_fine(outcomes, 129)
    assert "stopped by SIGHUP after 0 epochs and 1 of 2 steps" in outcomes[0].out


# ------------------------------------------------------------------------------------------------- one voice


@pytest.mark.parametrize("rank", [0, 1])
def test_a_loss_that_is_not_finite_on_one_rank_stops_all(rank, tiny, ranks, tmp_path, monkeypatch):
    inputs = main.Training.inputs

    def spoiled(t, images, labels):
        x, labels = inputs(t, images, labels)
        return (x * float("nan") if distributed.rank() == rank and t.batch == 1 else x), labels

    monkeypatch.setattr(main.Training, "inputs", spoiled)
    outcomes = ranks(2, *tiny("SGDG", tmp_path / "run", *BATCH))
    assert_one_voice(outcomes, 1, "not finite by epoch 1, step 2")
    assert not (tmp_path / "run" / "checkpoint.pt").exists()


@pytest.mark.parametrize(("size", "flags", "code", "said"), [
    (3, ["--resume", "FINISHED", "--epochs", 9], 2, "does among 1, 2, 4, 8, 16$"),
    (3, ["--batchSize", 16], 2, "16 does not divide among 3 processes; .*2, 4, 8"),
    (2, ["--batchSize", 100], 1, "--batchSize 100 does not fit"),
    (2, ["--ngpu", 3], 2, "--ngpu 3.*2 processes"),
    (2, ["--no-such-flag"], 2, "--no-such-flag"),
    (2, ["--resume", "/nowhere"], 1, "/nowhere"),
    (2, ["--model", "vgg11", "--batchSize", 2], 2, "two images or more"),
])  # fmt: skip
def test_a_mistake_is_answered_once(size, flags, code, said, tiny, ranks, tmp_path, finished):
    flags = [finished["SGD"][0] if word == "FINISHED" else word for word in flags]
    assert_one_voice(ranks(size, *tiny("SGD", tmp_path / "run", *flags)), code, said)


def fail(monkeypatch, error, place, name, *ranks):
    """Let the processes of these ranks fail there."""
    function = getattr(place, name)

    def failing(*args):
        if distributed.rank() in ranks:
            raise error
        return function(*args)

    monkeypatch.setattr(place, name, failing)


@pytest.mark.parametrize(("where", "error", "code", "said"), [
    ((main.report, "write_config", 0), OSError(28, "disk is full"), 1, "disk is full.*--resume"),
    ((main, "load_data", 1), main.UserError("this disk is broken"), 1, "main.py: error: this disk is broken"),
    ((main.report, "print_start", 0, 1), KeyboardInterrupt(), 130, "interrupted"),  # as on a terminal
    ((main.report, "print_start", 0), BrokenPipeError(), 141, "^$"),  # its reader leaves rank 0 alone
])  # fmt: skip
def test_what_fails_on_some_ranks_is_raised_on_all_and_said_once(
    where, error, code, said, tiny, ranks, tmp_path, monkeypatch
):
    fail(monkeypatch, error, *where)
    outcomes = ranks(2, *tiny("SGD", tmp_path / "run", *BATCH))
    assert outcomes[0].code == code
    assert outcomes[1].code in (1, code)
    assert re.search(said, outcomes[0].err)
    assert outcomes[1].err == ""


class DiskError(Exception):
    """Pickle writes it, and then cannot read it."""

    def __init__(self, name, number):
        super().__init__(f"{name} has error {number}")


def test_an_error_that_pickle_cannot_carry_is_told(tiny, ranks, tmp_path, monkeypatch):
    """The process that it happened to says where."""
    fail(monkeypatch, DiskError("sda", 5), main, "load_data", 1)
    outcomes = ranks(2, *tiny("SGD", tmp_path / "run", *BATCH))
    assert all(outcome.err.endswith("DiskError: sda has error 5\n") for outcome in outcomes), outcomes
    assert ["in failing" in outcome.err for outcome in outcomes] == [False, True]


def test_summary_and_a_finished_run_are_told_once(tiny, ranks, tmp_path, finished):
    save = shutil.copytree(finished["SGDG"][0], tmp_path / "run")
    for words in (["--summary"], ["--summary", "--zero"], []):
        alone, outcomes = call("--resume", save, *words), ranks(2, "--resume", save, *words)
        assert_fine(outcomes)
        waiting, _, told = outcomes[0].out.partition("\n")
        assert "waiting for each other, with RANK='0', WORLD_SIZE='2', MASTER_ADDR='127.0.0.1'" in waiting
        assert told.replace("processes: 2, 8 images of each batch to each\n", "") == alone.out


def test_what_could_not_be_trained_here_is_evaluated_all_the_same(ranks, tmp_path, finished):
    """Of a run with --sync_bn or float16, without a GPU; with processes that do not divide its batches."""
    save = shutil.copytree(finished["SGD"][0], tmp_path / "run")
    expected = call("--resume", save, "--eval").out
    state = load(save)
    for name, value in {"sync_bn": True, "dtype": "float16"}.items():
        torch.save({**state, "options": {**state["options"], name: value}}, save / "checkpoint.pt")
        assert_fine([call("--resume", save, "--summary")])
        outcomes = ranks(3, "--resume", save, "--eval")
        assert_fine(outcomes)
        assert outcomes[0].out.endswith(expected) or name == "dtype"
        refused = call("--resume", save, "--epochs", 9)
        assert_one_sentence(refused, 2, f"--{name} .*needs")


# --------------------------------------------------------------------------------- what the environment says


def test_a_rank_beyond_the_number_of_processes_waits_for_nobody(monkeypatch):
    place = {"RANK": "5", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    for name, value in place.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(dist, "init_process_group", lambda *_: pytest.fail("it waits"))
    assert_one_sentence(call("--summary"), 1, "RANK is not below WORLD_SIZE", "RANK='5'")


@pytest.mark.parametrize(("name", "value"), [
    ("RANK", "first"), ("WORLD_SIZE", ""), ("MASTER_ADDR", None), ("TORCHELASTIC_USE_AGENT_STORE", None),
])  # fmt: skip
def test_processes_that_cannot_meet_name_what_the_environment_said(name, value, ranks):
    """The last: another program has the port, so that rank 0 cannot wait there for the others."""
    (outcome,) = ranks(1, "--summary", **{"WORLD_SIZE": 2, name: value})
    shown = "MASTER_PORT='" if name.startswith("TORCH") else f"{name}={value!r}"
    assert_one_sentence(outcome, 1, "processes of the run did not meet", f"says .*{shown}", "unset RANK")


def test_a_number_of_processes_without_a_launcher_is_no_launch(ranks):
    assert_fine(ranks(1, "--summary", "--depth", 10, "--width", 1, RANK=None, WORLD_SIZE=2))


@pytest.mark.parametrize(("rank", "local_rank", "gpus", "devices"), [
    (3, "1", 8, [1]),
    (3, None, 2, [1]),  # a launcher that does not say which process of its machine it is: by turns
    (3, "3", 2, []),  # the options, which all processes look at together, may ask for CPUs
])  # fmt: skip
def test_each_process_takes_the_gpu_of_its_number(rank, local_rank, gpus, devices, monkeypatch):
    calls, said = [], {"RANK": str(rank), "WORLD_SIZE": "4", "LOCAL_RANK": local_rank}
    monkeypatch.setattr(os, "environ", {name: value for name, value in said.items() if value})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(torch.cuda, "set_device", calls.append)
    monkeypatch.setattr(dist, "init_process_group", calls.append)
    monkeypatch.setattr(dist, "destroy_process_group", lambda: None)
    with distributed.joined():
        assert calls == [*devices, "cpu:gloo,cuda:nccl"]


def test_two_machines_with_a_gpu_each_need_no_word_of_the_launcher(monkeypatch):
    """But two processes of one machine need two GPUs."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    assert parse_options([])[0].batch_size == 128
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    with pytest.raises(main.UsageError, match="2 processes on this machine need as many GPUs, and it has 1"):
        parse_options([])


@pytest.mark.parametrize(("error", "said"), [
    (RuntimeError("[connection.cc:79] Connection closed by peer [::1]:80"), "another process"),
    (dist.DistBackendError("NCCL error in: a.cpp:9, remote process exited or"), "another process"),
    (dist.DistNetworkError("failed to recv, got 0 bytes"), "another process"),
    (dist.DistBackendError("NCCL error in: a.cpp:9,\nDuplicate GPU"), "cannot work together: .* Duplicate"),
])  # fmt: skip
def test_an_error_of_the_connection_is_one_sentence(error, said, monkeypatch):
    monkeypatch.setattr(main, "run", Mock(side_effect=error))
    with pytest.raises(type(error)):
        call()  # of a single process it is none
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    assert_one_sentence(call(), 1, said)


def test_ranks_above_0_print_and_warn_nothing(monkeypatch, capsys, caplog):
    for rank, heard in (("1", []), ("0", ["a warning"])):
        monkeypatch.setenv("RANK", rank)
        monkeypatch.setenv("WORLD_SIZE", "2")
        with distributed.silent_above_rank_0():
            print("a line")
            logging.getLogger("torch").warning("a warning")
        assert (caplog.messages, capsys.readouterr().out) == (heard, "a line\n" if heard else "")
        caplog.clear()


# --------------------------------------------------------------------------------------------- real launchers


@pytest.mark.parametrize(("gpu", "own", "threads"), [
    (False, None, "2"), (False, "5", "5"), (True, None, None),
])  # fmt: skip
def test_ngpu_becomes_torchrun_with_a_share_of_the_cores_each(gpu, own, threads, monkeypatch):
    """Without a GPU, where the user has not said how many threads."""

    def execv(program, command):
        here = ["--standalone", "--local-addr", "127.0.0.1", "--nproc_per_node", "3"]
        assert program == command[0] == sys.executable
        assert command[1:] == ["-m", "torch.distributed.run", *here, main.__file__, "--ngpu", "3", "--lr=0.5"]
        assert os.environ.get("OMP_NUM_THREADS") == threads
        raise SystemExit("replaced")

    monkeypatch.setattr(os, "execv", execv)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    monkeypatch.setenv("OMP_NUM_THREADS", own) if own else monkeypatch.delenv("OMP_NUM_THREADS")
    monkeypatch.setattr(sys, "argv", ["main.py", "--ngpu", "3", "--lr=0.5"])
    with pytest.raises(SystemExit, match="replaced"):
        main.main()
    assert_one_sentence(call("--ngpu", 3), 2, "from Python start main.py by torchrun")


def spawn(*words, **how):
    how |= {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([sys.executable, *map(str, words)], **how)


def wait_for_an_epoch(save, process):
    while not (save / "checkpoint.pt").exists():
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)


def test_ngpu_starts_the_processes_and_a_stop_reaches_them(tiny, tmp_path):
    """Ctrl-C in a terminal; on a machine that cannot resolve its own name."""
    save, nameless = tmp_path / "run", "import socket\nsocket.gethostname = lambda: 'no.such.invalid'"
    (tmp_path / "sitecustomize.py").write_text(nameless)
    how = {"start_new_session": True, "env": os.environ | {"PYTHONPATH": str(tmp_path)}}
    process = spawn(main.__file__, *tiny("SGDG", save, *BATCH, "--ngpu", 2, "--epochs", 10_000), **how)
    wait_for_an_epoch(save, process)
    os.killpg(process.pid, signal.SIGINT)
    out, err = process.communicate()
    assert process.returncode != 0
    assert out.count("stopped by SIGINT") == 1, err
    assert len(load(save)["other_ranks"]) == 1


@pytest.mark.long
def test_torchrun_starts_all_again_after_one_was_killed(tiny, ranks, tmp_path):
    save, whole, more = tmp_path / "run", tmp_path / "whole", [*BATCH, "--epochs", 60]
    torchrun = ["-m", "torch.distributed.run", "--nproc_per_node", 2, "--standalone", "--max-restarts", 3]
    process = spawn(*torchrun, main.__file__, *tiny("SGDG", save, *more, "--resume", "auto"))
    wait_for_an_epoch(save, process)
    children = subprocess.check_output(["pgrep", "-P", str(process.pid)], text=True).split()
    os.kill(int(children[0]), signal.SIGKILL)
    out, err = process.communicate()
    assert process.returncode == 0, err
    assert "failed (exitcode: -9) local_rank: 0" in err
    assert "finished 60 epochs" in out
    assert_fine(ranks(2, *tiny("SGDG", whole, *more)))
    assert_same_run(save, whole)


@pytest.mark.long
def test_two_machines(tiny, ranks, tmp_path):
    """Two torchruns that meet over the loopback, one process each."""
    save, whole = tmp_path / "run", tmp_path / "whole"
    meeting = ["--nnodes", 2, "--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:29517", "--rdzv-id", 7]
    torchrun = ["-m", "torch.distributed.run", "--nproc_per_node", 1, *meeting, main.__file__]
    hosts = [spawn(*torchrun, *tiny("SGDG", save, *BATCH)) for _ in range(2)]
    outputs = [host.communicate() for host in hosts]
    assert [host.returncode for host in hosts] == [0, 0], outputs
    assert sum(out.count("finished 2 epochs") for out, _ in outputs) == 1
    assert_fine(ranks(2, *tiny("SGDG", whole, *BATCH)))
    assert_same_run(save, whole)
