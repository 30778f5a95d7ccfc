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
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from itertools import product, takewhile
from pathlib import Path
from queue import SimpleQueue
from threading import RLock

DECIDED = "--(model|depth|width|dataset|optim_method|seed|epochs|epoch_step|save|resume)(=|$)"  # by the sweep
SETTINGS = ("MODELS", "DATASETS", "METHODS", "SEEDS", "EPOCHS", "JOBS")


def setting(name: str, default: str, form: str, meaning: str, most: int = 9999) -> list[str]:
    """The words of an environment variable, each once; ValueError for too many or another form."""
    words = list(dict.fromkeys(os.environ.get(name, default).split()))
    if not 1 <= len(words) <= most or not all(re.fullmatch(form, word) for word in words):
        raise ValueError(f"{name}={os.environ[name]!r} is not known; it takes {meaning}")
    return words


def make_cells(script, models, datasets, epochs, drops, flags) -> tuple[dict[Path, list[str]], int]:
    """Run directory -> command, seed by seed, so that a table fills evenly; and the number of epochs."""
    if wrong := [flag for flag in flags if re.match(DECIDED, flag)]:
        raise ValueError(f"{wrong[0]} after -- would override the sweep: set MODELS, DATASETS, ... or EPOCHS")
    models = setting("MODELS", models, r"vgg-1[1369]|wrn-\d+-\d+", "networks such as vgg-13 or wrn-28-10")
    known = f"{datasets} digits folder"
    datasets = setting("DATASETS", datasets, known.replace(" ", "|"), f"data sets out of {known}")
    methods = setting("METHODS", "SGD SGDG AdamG", "SGD|SGDG|AdamG", "methods out of SGD SGDG AdamG")
    seeds = setting("SEEDS", "0 1 2 3 4", "0|[1-9][0-9]{0,17}", "whole numbers from 0")
    epochs = int(*setting("EPOCHS", epochs, "[1-9][0-9]{0,5}", "a whole number from 1", most=1))
    drops = sorted({int(epochs * float(share) + 0.5) for share in drops.split()} - {0, epochs})  # halves up
    schedule = ["--epochs", str(epochs), "--epoch_step", str(drops).replace(" ", ""), "--resume", "auto"]
    cells = {}
    for seed, dataset, model, method in product(seeds, datasets, models, methods):
        kind, depth, *width = model.split("-")
        resnet = ["--model", "resnet", "--depth", depth, "--width", *width]
        network = resnet if kind == "wrn" else ["--model", f"vgg{depth}"]
        save = Path("logs", Path(script).name.split("_")[0], dataset, model, method, f"seed{seed}")
        cell = ["--dataset", dataset, "--optim_method", method, "--seed", seed, "--save", str(save)]
        cells[save] = [sys.executable, "main.py", *network, *cell, *schedule, *flags]
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
        os.write(stream, f"{text}\n".encode(errors="replace"))


class Runs:
    """Runs the cells, one at a time in each slot (its environment), until a signal asks them to stop."""

    def __init__(self, cells: dict[Path, list[str]], epochs: int, slots: list[dict[str, str]]):
        self.cells, self.epochs = cells, epochs
        self.signals: list[int] = []
        self.processes: list[subprocess.Popen] = []
        self.free: SimpleQueue[dict[str, str]] = SimpleQueue()
        for slot in slots:
            self.free.put(slot)
        self.starting = RLock()

    def run_all(self) -> list[str]:
        """Returns a sentence for each failure."""
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(number) != signal.SIG_IGN:  # as nohup leaves it
                signal.signal(number, self.stop)
        with ThreadPoolExecutor(self.free.qsize()) as pool:
            return [failure for failure in pool.map(self.run, self.cells) if failure]

    def stop(self, number: int, _frame) -> None:
        if self.signals and number == signal.SIGHUP:  # a lost terminal may send it twice
            return
        self.signals.append(number)
        say(f"signal {number}: waiting for the runs' checkpoints (once more to end them at once)", 2)
        with self.starting:
            for process in self.processes:
                process.kill() if len(self.signals) > 1 else process.terminate()

    def run(self, directory: Path) -> str:
        """Returns why the run failed, or nothing."""
        output, failure, slot = directory / "output.txt", "", self.free.get()
        try:
            with self.starting:
                if self.signals:
                    return ""
                process = self.start(directory, output, slot)
            if (code := process.wait()) and not self.signals:
                last = "".join(output.read_text(errors="replace").splitlines()[-1:])
                failure = f"failed with exit code {code if code > 0 else 128 - code}: {output}: {last}"
        except OSError as error:
            failure = f"failed: {error}"
        finally:
            self.free.put(slot)
        state = failure or ("finished" if finished(directory, self.epochs) else "stopped")
        say(f"{time.strftime('%T')} {directory} {state}")
        return failure

    def start(self, directory: Path, output: Path, slot: dict[str, str]) -> subprocess.Popen:
        say(f"{time.strftime('%T')} {directory} starts")
        directory.mkdir(parents=True, exist_ok=True)
        with output.open("ab") as file:
            # A session of its own: Ctrl-C and a lost terminal do not reach it, it is asked just once.
            own = {"env": os.environ | slot, "stdin": subprocess.DEVNULL, "start_new_session": True}
            self.processes.append(subprocess.Popen(self.cells[directory], stdout=file, stderr=file, **own))
        return self.processes[-1]


def visible_gpus() -> list[str]:
    """All, or of CUDA_VISIBLE_DEVICES those before the first that is none, as CUDA reads it."""
    if (named := os.environ.get("CUDA_VISIBLE_DEVICES")) is None:
        return re.findall(r"^GPU (\d+):", subprocess.getoutput("nvidia-smi -L"), re.M)
    return list(takewhile(re.compile(r"\d+$|(GPU|MIG)-").match, named.split(",")))


def main(script: str, models: str, datasets: str, epochs: str, drops: str, *words: str) -> int:
    """The sweep of a table script; returns the exit code."""
    try:
        end = (*words, "--").index("--")
        if wrong := [word for word in words[:end] if word != "--print"]:
            raise ValueError(f"{wrong[0]} is not known: --print, --help, and after -- flags for main.py")
        cells, last = make_cells(script, models, datasets, epochs, drops, flags := words[end + 1 :])
        gpus = visible_gpus()
        jobs = int(*setting("JOBS", str(len(gpus) or 1), "[1-9][0-9]{0,3}", "a whole number from 1", most=1))
    except ValueError as error:
        say(f"{Path(script).name}: error: {error}", 2)
        return 2
    if "--print" in words[:end]:
        for command in cells.values():
            say(f"cd {shlex.quote(os.getcwd())} && {shlex.join(command)}")
        return 0
    if not gpus and not os.environ.get("OMP_NUM_THREADS"):  # each run's share of the cores
        os.environ["OMP_NUM_THREADS"] = str(max(1, len(os.sched_getaffinity(0)) // jobs))
    slots = [{"CUDA_VISIBLE_DEVICES": gpus[i % len(gpus)]} if gpus else {} for i in range(jobs)]
    done = [directory for directory in cells if finished(directory, last)]
    say(f"{len(done)} of {len(cells)} runs are finished; {jobs} at once, on {len(gpus)} GPUs (0: the CPU)")
    # With flags of its own main.py judges finished runs, too: they may be of other flags.
    runs = Runs({d: cells[d] for d in cells if flags or d not in done}, last, slots)
    failures = runs.run_all()
    done = [directory for directory in cells if finished(directory, last)]
    for failure in failures:
        say(failure, 2)
    say(f"{len(done)} of {len(cells)} runs are finished, {len(failures)} failed")
    if len(done) < len(cells):
        given = [f"{name}={shlex.quote(os.environ[name])} " for name in SETTINGS if name in os.environ]
        say(f"to continue: {''.join(given)}bash {shlex.join([script, *words])}")
    return 128 + runs.signals[0] if runs.signals else min(len(failures), 1)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
