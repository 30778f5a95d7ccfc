"""Runs a table of the paper: each network, data set, method and seed by main.py in a directory of its own.

    python scripts/sweep.py SCRIPT MODELS DATASETS EPOCHS DROPS [--print] [-- FLAGS FOR EACH main.py]

The table scripts call this with their defaults; their headers say what narrows a sweep.
"""

import os
import re
import shlex
import signal
import subprocess
import sys
import time
from contextlib import suppress
from itertools import product
from pathlib import Path


def setting(name: str, default: str, form: str, meaning: str, most: int = 9999) -> list[str]:
    """The words of an environment variable, each once; ValueError for too many or another form."""
    words = list(dict.fromkeys(os.environ.get(name, default).split()))
    if not 1 <= len(words) <= most or not all(re.fullmatch(form, word) for word in words):
        raise ValueError(f"{name}={os.environ[name]!r} is not known; it takes {meaning}")
    return words


def model_flags(model: str) -> list[str]:
    """main.py's flags for vgg-13 or wrn-28-10."""
    kind, depth, *width = model.split("-")
    if kind == "wrn" and (int(depth) < 10 or int(depth) % 6 != 4):
        raise ValueError(f"MODELS: {model} is not known; a Wide ResNet has depth 6n+4, such as 10, 16 or 28")
    resnet = ["--model", "resnet", "--depth", depth, "--width", *width]
    return resnet if kind == "wrn" else ["--model", f"vgg{depth}"]


def make_cells(script, models, datasets, epochs, drops, flags) -> tuple[dict[Path, list[str]], int]:
    """Run directory -> command, seed by seed, so that a table fills evenly; and the number of epochs."""
    decided = "--(model|depth|width|dataset|optim_method|seed|epochs|epoch_step|save|resume)(=|$)"
    if wrong := [flag for flag in flags if re.match(decided, flag)]:
        raise ValueError(f"{wrong[0]} after -- would override the sweep: set MODELS, DATASETS, ... or EPOCHS")
    network = "vgg-1[1369]|wrn-[1-9][0-9]{0,3}-[1-9][0-9]{0,3}"
    models = setting("MODELS", models, network, "networks such as vgg-13 or wrn-28-10")
    datasets = setting("DATASETS", datasets, datasets.replace(" ", "|"), f"data sets out of {datasets}")
    methods = setting("METHODS", "SGD SGDG AdamG", "SGD|SGDG|AdamG", "methods out of SGD SGDG AdamG")
    seeds = setting("SEEDS", "0 1 2 3 4", "0|[1-9][0-9]{0,17}", "whole numbers from 0")
    epochs = int(*setting("EPOCHS", epochs, "[1-9][0-9]{0,5}", "a whole number from 1", most=1))
    drops = sorted({int(epochs * float(share) + 0.5) for share in drops.split()} - {0, epochs})  # halves up
    schedule = ["--epochs", str(epochs), "--epoch_step", str(drops).replace(" ", ""), "--resume", "auto"]
    cells = {}
    for seed, dataset, model, method in product(seeds, datasets, models, methods):
        save = Path("logs", Path(script).name.split("_")[0], dataset, model, method, f"seed{seed}")
        cell = ["--dataset", dataset, "--optim_method", method, "--seed", seed, "--save", str(save)]
        cells[save] = [sys.executable, "main.py", *model_flags(model), *cell, *schedule, *flags]
    return cells, epochs


def finished(directory: Path, epochs: int) -> bool:
    """Whether all epochs are logged and a checkpoint, if any, came after: a kill may fall between the two."""
    log, checkpoint = directory / "log.txt", directory / "checkpoint.pt"
    with suppress(OSError):
        logged = len(re.findall(r"^json_stats: \{.*\}$", log.read_text(errors="replace"), re.M))
        older = checkpoint.exists() and checkpoint.stat().st_mtime_ns < log.stat().st_mtime_ns
        return logged == epochs and not older
    return False


def say(text: str, stream: int = 1) -> None:
    """A line, also to a terminal that is gone: the runs must still be asked to stop and waited for."""
    with suppress(OSError):
        os.write(stream, f"{text}\n".encode())


def run_all(cells: dict[Path, list[str]], epochs: int, skip: bool, slots: list[dict[str, str]]):
    """Run the cells, one at a time in each slot (its environment); returns the failures and the signals."""
    signals, answered, failures, queue, running = [], 0, [], list(cells), {}
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) != signal.SIG_IGN:  # as nohup leaves it
            signal.signal(number, lambda received, _: signals.append(signal.Signals(received)))
    recorded = 'mkdir -p "$0" && exec "$@" >>"$0/output.txt" 2>&1 </dev/null'  # cannot: a failed run
    while running or (queue and not signals):
        for slot, variables in enumerate(slots):
            if slot in running and running[slot][1].poll() is not None:
                directory, process = running.pop(slot)
                state, code = "finished" if finished(directory, epochs) else "stopped ", process.returncode
                if code and not signals:
                    state, output = "failed  ", f"{directory}/output.txt"
                    last_line = subprocess.getoutput(shlex.join(["tail", "-n", "1", output]))
                    failures.append(
                        f"failed with exit code {code if code > 0 else 128 - code}: {output}: {last_line}"
                    )
                say(f"{time.strftime('%T')} {state} {directory}")
            while slot not in running and queue and not signals:
                if not (finished(directory := queue.pop(0), epochs) and skip):
                    say(f"{time.strftime('%T')} start    {directory}")
                    # A session of its own: Ctrl-C and a lost terminal do not reach it, it is asked just once.
                    command, own = (
                        ["sh", "-c", recorded, directory, *cells[directory]],
                        os.environ | variables,
                    )
                    running[slot] = directory, subprocess.Popen(command, env=own, start_new_session=True)
        for number in signals[answered:]:
            if answered == 0:
                say(f"{number.name}: waiting for the runs' checkpoints (once more to end them at once)", 2)
            for _, process in running.values():
                if answered == 0 or number != signal.SIGHUP:  # a lost terminal may send it twice
                    process.send_signal(signal.SIGKILL if answered else signal.SIGTERM)
            answered += 1
        time.sleep(0.05)
    return failures, signals


def main(script: str, models: str, datasets: str, epochs: str, drops: str, *words: str) -> int:
    """The sweep of a table script; returns the exit code."""
    end = (*words, "--").index("--")
    if wrong := [word for word in words[:end] if word != "--print"]:
        raise ValueError(f"{wrong[0]} is not known: --print, --help, and after -- flags for main.py")
    cells, last = make_cells(script, models, datasets, epochs, drops, flags := words[end + 1 :])
    if (named := os.environ.get("CUDA_VISIBLE_DEVICES")) is None:
        gpus = re.findall(r"^GPU (\d+):", subprocess.getoutput("nvidia-smi -L"), re.M)
    else:  # as CUDA reads it: those before the first -1
        gpus = [gpu for gpu in re.sub("(^|,)-.*", "", named).split(",") if gpu]
    jobs = int(*setting("JOBS", str(len(gpus) or 1), "[1-9][0-9]{0,3}", "a whole number from 1", most=1))
    if "--print" in words[:end]:
        for command in cells.values():
            say(f"cd {shlex.quote(os.getcwd())} && {shlex.join(command)}")
        return 0
    if not gpus and not os.environ.get("OMP_NUM_THREADS"):  # each run's share of the cores
        os.environ["OMP_NUM_THREADS"] = str(max(1, len(os.sched_getaffinity(0)) // jobs))
    slots = [{"CUDA_VISIBLE_DEVICES": gpus[i % len(gpus)]} if gpus else {} for i in range(jobs)]
    done = [finished(directory, last) for directory in cells]
    say(f"{sum(done)} of {len(done)} runs are finished; {jobs} at once, on {len(gpus)} GPUs (0: the CPU)")
    failures, signals = run_all(cells, last, not flags, slots)
    for failure in failures:
        say(failure, 2)
    done = [finished(directory, last) for directory in cells]
    say(f"{sum(done)} of {len(done)} runs are finished, {len(failures)} failed")
    if not all(done):
        settings = ("MODELS", "DATASETS", "METHODS", "SEEDS", "EPOCHS", "JOBS")
        given = [f"{name}={shlex.quote(os.environ[name])} " for name in settings if name in os.environ]
        say(f"to continue: {''.join(given)}bash {shlex.join([script, *words])}")
    return 128 + signals[0] if signals else min(len(failures), 1)


if __name__ == "__main__":
    try:
        sys.exit(main(*sys.argv[1:]))
    except ValueError as error:  # of what the user set
        say(f"{Path(sys.argv[1]).name}: error: {error}", 2)
        sys.exit(2)
