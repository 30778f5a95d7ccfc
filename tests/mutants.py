"""Small deliberate faults, each of which a test must notice: what the tests promise is held to by trying.

    python tests/mutants.py [NUMBER or part of the text ...]        JOBS=2: how many at once

Each fault is put into a copy of the files, and the tests named beside it must fail there. One line each;
the exit code is 1 if one survives. An import that fails is no catch: only a test's own failure counts.
"""

# ruff: noqa: E501
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from importlib import import_module
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
LIMIT = 300  # seconds for a fault; tests that take longer have noticed nothing: no fault of the table hangs
LINKED = "logs/published"  # too many files to copy, and none that a test writes to
# What takes seconds to import: here once, and every run of pytest is a fork of this process.
SLOW_IMPORTS = (
    "torch", "torch._dynamo", "torch.utils.tensorboard", "torchvision.datasets", "sklearn.datasets",
    "sklearn.model_selection", "scipy.io", "cv2", "pytest",
)  # fmt: skip

FILES = {  # of tests, by the word that begins a selection; an expression as of pytest's -k follows it
    "paper": "tests/test_paper.py", "operators": "tests/optimizer/test_operators.py",
    "optimizer": "tests/optimizer/test_grassmann_optimizer.py", "pytorch": "tests/optimizer/test_in_pytorch.py",
    "foreign": "tests/optimizer/test_foreign_state.py", "frameworks": "tests/optimizer/test_frameworks.py",
    "fast": "tests/optimizer/test_fast_paths.py", "invariance": "tests/optimizer/test_scale_invariance.py",
    "data": "tests/training/test_data.py", "folder": "tests/training/test_folder.py", "flags": "tests/training/test_command_line.py",
    "run": "tests/training/test_run_directory.py", "resume": "tests/training/test_resume.py",
    "authors": "tests/training/test_convert_authors.py", "damage": "tests/training/test_damage.py",
    "ranks": "tests/training/test_distributed.py",
    "benchmarks": "tests/scripts/test_benchmarks.py", "dry": "tests/training/test_cuda_dry_run.py", "tables": "tests/scripts/test_summarize.py", "gpu": "tests/scripts/test_gpu_script.py",
    "sweeps": "tests/scripts/test_sweeps.py", "setup": "tests/scripts/test_setup.py",
    "subset": "tests/scripts/test_subset.py", "networks": "tests/training/test_networks.py", "package": "tests/optimizer/test_package.py",
    "peers": "tests/scripts/test_peers.py",
}  # fmt: skip
WRN, GROUPS, STARTED = "paper a_run_of_a_wrn", "paper groups", "paper hyperparameters"

# fmt: off
FAULTS = {  # file: (text, which stands there once; its replacement; tests that could notice)
    "main.py": [
        ('"SGDG": SGDG, "AdamG": AdamG}', '"SGDG": AdamG, "AdamG": SGDG}', WRN),
        ('"nesterov": options.momentum > 0', '"nesterov": False', WRN),
        (" omega=options.omega,", "", WRN),
        ("momentum=options.momentum, ", "", WRN),
        (" bn_decay=options.bn_decay,", "", WRN),
        ("weight_decay=options.weight_decay,", "", WRN),
        (" grad_clip=options.grad_clip,", "", WRN),
        ("options.width, classes, options.dropout", "options.width, classes", WRN),
        ("VGGS[options.model], classes, options.dropout", "VGGS[options.model], classes", "paper a_run_of_a_vgg"),
        ("select=options.select,", 'select="shape",', "flags TestSummary"),
        ("(x.float() - self.mean) / self.std", "x.float() / self.std", WRN),
        ("permute(0, 3, 1, 2)", "permute(0, 3, 2, 1)", WRN),
        ("epoch=self.epoch, pad", "epoch=0, pad", WRN),
        ("torch.manual_seed(options.seed)", "torch.manual_seed(0)", WRN),
        ("self.scaler.scale(loss)", "self.scaler.scale(1.5 * loss)", WRN),
        ("return loss.detach(), ", "return 1.5 * loss.detach(), ", WRN),
        ("self.optimizer.zero_grad(set_to_none=True)", "pass", WRN),
        ("self.optimizer, drops, gamma=ratio", "self.optimizer, drops, gamma=0.2", WRN),
        ("t.model.eval()", "t.model.train()", WRN),
        ("        with t.autocast():\n            logits = t.forward(x)", "        logits = t.forward(x)", "run precision"),
        ("torch.stack([loss_share, (logits.argmax(1) != labels)", "torch.stack([loss_share, (logits.argmax(1) == labels)", WRN),
        ("                if not math.isfinite(loss):\n", "                if False:\n", "run is_not_finite"),
        ("        if not math.isfinite(self.totals()[0]):\n", "        if False:\n", "run is_not_finite"),
        ("if not torch.stack([p.isfinite().all() ", "if not torch.stack([p.isfinite().any() ", "run is_not_finite"),
        ("    if not math.isfinite(result[0]):", "    if False:", "run is_not_finite"),
        ("(options.save / PREVIOUS).unlink(missing_ok=True)", "None", "run leaves_nothing_else"),
        ("and not stop.asked(by_signal=True):", "and not stop.asked():", "resume gets_on"),
        ("return stop.exit_code", "return 1", "resume signal or max_minutes"),
        ("started + 60 * options.max_minutes", "started + options.max_minutes", "resume from_the_start"),
        ("PROCESS_START if argv is None else", "PROCESS_START if True else", "resume from_the_start"),
        ("os.utime(options.save / CHECKPOINT)", "pass", "sweeps real_thing"),
        ("if t.epoch == 0:\n            distributed", "if True:\n            distributed", "run one_value"),
        ("hold_out(data, options.holdout) if options.holdout", "hold_out(data, options.holdout) if options.eval", "flags held_out"),
        ("error = 100 * wrong / (t.batch", "error = wrong / (t.batch", "flags bar"),
        ("self.forward = torch.compile(self.forward, dynamic=False)", "pass", "run compiled_model"),
        ("torch.compile(self.forward, dynamic=False)", "torch.compile(self.forward)", "run compiled_model"),
        ("math.ceil(len(plan) / 4)", "math.ceil(len(plan) / 2)", "run one_value"),
        ("self.sums = torch.zeros(2, dtype=torch.float64, device=self.device)", "self.sums = torch.zeros(2, dtype=torch.float64)", "dry never_waits"),
        ("            bar.update()\n", "            bar.update()\n            t.sums.tolist()\n", "dry reads_its_sums"),
        ("torch.tensor(data.mean, device=self.device)", "torch.tensor(data.mean)", "dry never_waits"),
        ("self.device, non_blocking=True).permute", "self.device).permute", "dry never_waits"),
        ("torch.autocast(self.device.type, self.dtype", 'torch.autocast("cpu", self.dtype', "dry never_waits"),
        ("if t.batch % read_every == 0:", "if True:", "dry reads_its_sums"),
        ('pin = t.device.type == "cuda"\n    t.model', "pin = False\n    t.model", "dry reads_its_sums"),
        ("dtype=torch.float64, device=t.device)", "dtype=torch.float64)", "dry reads_its_sums"),
        ("torch.randn(64, 3, 32, 32, device=next(model.parameters()).device)", "torch.randn(64, 3, 32, 32)", "dry are_measured"),
        ("return plan.of_rank(distributed.rank(), ", "return plan.of_rank(0, ", "ranks whole_batch[SGDG]"),
        ("loss.double() / distributed.world_size()", "loss.double()", "ranks whole_batch[SGDG]"),
        ("sync_bn=options.sync_bn and not options.eval)", "sync_bn=options.sync_bn)", "ranks could_not"),
        ("utils.seed_rank(options.seed, 0, 0)", "pass", "ranks with_zero_and_without and SGD-2"),
        ("distributed.broadcast_tensors(t.model.buffers())", "pass", "ranks with_zero_and_without and SGD-2"),
        ("if options.zero and distributed.world_size() > 1:", "if False:", "dry goes_on and zero"),
        ("            print(message)\n", "            pass\n", "resume finished_run_says"),
        ("last_loss, last_batch = t.totals()[0], t.batch", "last_loss, last_batch = 0, 0", "run one_value"),
        ("t.train_time += time", "t.train_time = time", "resume before_a_stop"),
        ("if stop.asked() and t.epoch < options.epochs:", "if stop.asked():", "resume last_check"),
        ('raise UsageError("--ngpu is for', 'UsageError("--ngpu is for', "ranks ngpu_becomes"),
        ("> 1 and not distributed.launched():", "> 1:", "ranks answered_once and ngpu"),
        ("        self.scaler.update()\n", "", "run overflows"),
        ("distributed.all_sum(self.sums.tolist())", "self.sums.tolist()", "ranks not_finite"),
        ("distributed.all_sum(sums.tolist())", "sums.tolist()", "ranks whole_batch and SGDG"),
        ("self.scaler.step(self.optimizer)", "self.optimizer.step()", "run overflows"),
        ("enabled=self.dtype == torch.float16", "enabled=False", "dry never_waits and float16"),
        (".to(self.device, memory_format=torch.channels_last)", ".to(self.device)", "dry never_waits and SGD-"),
        ("self.sums = torch.zeros(2, dtype=torch.float64", "self.sums = torch.zeros(2, dtype=torch.float32", "run add_up_in_float64"),
        ("    sums = torch.zeros(2, dtype=torch.float64", "    sums = torch.zeros(2, dtype=torch.float32", "run add_up_in_float64"),
        ("yield logits.float(), labels", "yield logits, labels", "run add_up_in_float64"),
        ("log.add_loss((loss - last_loss) / (t.batch - last_batch), steps)", "log.add_loss(loss / t.batch, steps)", "run one_value"),
        ("steps = t.epoch * len(plan) + t.batch", "steps = t.batch", "run one_value"),
        ("            until_the_end.enter_context(utils.locked(save_to, goes_on_there))\n        options, state = distributed.on_rank0(lambda: choose_options(given, save_to, source))\n", "            pass\n        options, state = distributed.on_rank0(lambda: choose_options(given, save_to, source))\n        if not (options.eval or options.summary):\n            until_the_end.enter_context(utils.locked(save_to, goes_on_there))\n", "run before_it_reads"),
        ("        if not options.eval:\n            t.plan()", "        if False:\n            t.plan()", "flags leaves_the_directory_free"),
        ('sys.stderr = sys.stderr or open(os.devnull, "w")', "pass", "flags nobody_need"),
        ("    with suppress(AttributeError):  # a notebook", "    if True:  # a notebook", "flags any_kind"),
    ],
    "options.py": [
        (", older=False)", ")", "flags matched_by_their_order"),
        ("momentum: float = option(0.9,", "momentum: float = option(0.95,", STARTED),
        ('"SGD": {"lr": 0.1, "lrg": None, "bn_decay": 5e-4}', '"SGD": {"lr": 0.1, "lrg": None, "bn_decay": 0.0}', STARTED),
        ('[60, 120], "lr_decay_ratio": 0.1', '[60, 120], "lr_decay_ratio": 0.2', STARTED),
        ('protocol["dropout"].get(model, 0.0)', 'protocol["dropout"]["resnet"]', "paper dropout_of_vgg"),
        ("copy.deepcopy(PROTOCOLS[PROTOCOL_OF[dataset]])", "PROTOCOLS[PROTOCOL_OF[dataset]]", "flags not_those_of_the_next"),
        ("return without_unused({**defaults, **paper, **given})", "return without_unused({**defaults, **given, **paper})", "flags what_is_given_wins"),
        ("type=number(int, 0, 2**63))", "type=number(int, 0))", "flags not_accepted"),
        ('order and augmentation", type', 'order and augmentation", RESUMED, type', "flags every_option"),
        ("CHANGES_ON_EVAL if call[\"eval\"] else CHANGES_ON_RESUME", "CHANGES_ON_EVAL", "flags every_option"),
        ("CHANGES_ON_EVAL if call[\"eval\"] else CHANGES_ON_RESUME", "CHANGES_ON_RESUME", "flags TestOtherImages"),
        ('shown="folder", type=printable', 'shown="folder"', "flags what_is_given_wins"),
        ("return {**stored, **{", "return {**fill_in({}), **{", "resume stopped_run_ends"),
        ("if not isinstance(value, kind) or", "if", "damage part_that_cannot"),
        (" or (isinstance(value, (int, float)) and not value >= 0)", "", "damage part_that_cannot"),
        ("        check_options(options)\n", "        pass\n    if True:\n        check_options(options)\n", "damage part_that_cannot"),
        ("if options.eval or options.summary:\n        return", "if False:\n        return", "ranks could_not"),
        ('if "://" in text:', "if False:", "flags not_accepted"),
        ("return os.path.expanduser(text)", "return text", "flags what_is_given_wins"),
        ('("lrg", "omega", "grad_clip", "select") if', '("omega", "grad_clip", "select") if', "flags no_effect"),
        ("number(float, 0, HUGE)(text) or None", "number(float, 0, HUGE)(text)", "flags what_is_given_wins"),
        ("allow_abbrev=False", "allow_abbrev=True", "flags do_not_fit"),
        ("if done > options.epochs:", "if False:", "flags cannot_go_on"),
        ("own.exists() and source.samefile(own)", "own.exists()", "flags over_another"),
        (').strip("-") or "folder"', ') or "folder"', "flags save_has_a_default"),
        ('f"note: {text}", flush=True', 'f"note: {text}"', "flags last_line"),
        ("source.samefile(own)", "source == own", "flags by_any_name"),
        ("return own.parent, own if found else None, found", "return own.parent, own if found else None, True", "run ended_meanwhile"),
        ("options.epoch_step[0] >= options.epochs", "options.epoch_step[0] > options.epochs", "flags will_not_drop"),
        ('{"False": "off", "None": "none"}.get(str(row["default"]), ', '{False: "off", None: "none"}.get(row["default"], ', "flags help"),
        ('(name == "auto" and torch.cuda.is_available())', "False", "flags auto_takes_a_gpu"),
        ("if rate and math.log(rate) +", "if False and math.log(rate) +", "damage last_drop"),
        ('stored = {**stored, "holdout": 0, "dataset_name": None}', 'stored = {**stored, "dataset_name": None}', "flags held_out"),
        ('if call["eval"] and changed', "if changed", "flags held_out"),
    ],
    "report.py": [
        ('f"loss/{part}": stats[f"{part}_loss"]', 'f"loss/{part}": stats["test_loss"]', "run tensorboard"),
        ('self._add_scalar(tag, value, stats["epoch"])', 'self._add_scalar(tag, value, stats["epoch"] - 1)', "run tensorboard"),
        ('TAGS.get(tag, "of one layer, as rows/...")', '""', "run tensorboard"),
        ('"test_time": test_time', '"test_time": t.train_time', "resume before_a_stop"),
        ("hparams[first.get(name, name)]", "hparams[name]", "run hyperparameters"),
        ("            if name not in CHANGES_ON_RESUME:", "            if True:", "run hyperparameters"),
        ("else printable(str(value))", "else str(value)", "damage edited_checkpoint"),
        ("        self.writer.flush()\n", "", "run reach_the_disk"),
        ("            os.fsync(file.fileno())\n        scalars", "        scalars", "run reach_the_disk"),
        ('lines = "".join(map(_log_line, history))', 'lines = ""', "resume more_epochs"),
        ("        **t.learning_rates(),  # this epoch's", "        # this epoch's", "run every_key"),
        ("error {100 - stats['train_acc']:5.2f}%", "error {stats['train_acc']:5.2f}%", "run terminal_says"),
        ('print(textwrap.fill(printable(f"options: {words}"),', 'print(textwrap.fill((f"options: {words}"),', "flags control"),
        ('print(printable(f"{trained}, on', 'print((f"{trained}, on', "flags control"),
        ("where = printable(str(t.options.save))", "where = t.options.save", "flags control"),
        (".asin()).rad2deg().mean()", ".asin()).mean()", "run probe_takes or counts_for_clipping"),
        ('"omega"] * orthogonality_gradient(y)', '"omega"] * 0', "run probe_takes or counts_for_clipping"),
        ("(gram.sum() - gram.trace())", "gram.sum()", "run probe_takes or counts_for_clipping"),
        ('if group["grad_clip"] is not None:', "if False:", "run probe_takes or counts_for_clipping"),
        ("        if not group_of:\n", "        if False:\n", "run scalars_of"),
        ('{"omega": 0.0, "grad_clip": None}', '{"omega": 0.0, "grad_clip": 0.0}', "run scalars_of"),
        ("        self.sums.zero_()\n", "", "run probe_takes or counts_for_clipping"),
        ('sum(p.numel() for p in group["params"])', 'max(p.numel() for p in group["params"])', "flags start_names"),
        ("get_total_flops() // 2", "get_total_flops()", "flags TestSummary"),
        ("cosines.max()", "cosines.mean()", "flags TestSummary"),
        ("len(classes) > 5", "len(classes) >= 5", "run top5"),
        ("len(self.NAMES), device=device)", "len(self.NAMES))", "dry never_waits"),
        ("issubclass(args.exc_type, OSError) or ", "", "run on_a_full_disk"),
        ('state["sums"].view_as(self.sums)', 'state["sums"]', "damage part_that_cannot"),
        ("means = (self.sums / self.steps).cpu()", "means = self.sums.cpu()", "run probe_takes"),
        ("means.mean(0).tolist()", "means[0].tolist()", "run probe_takes"),
    ],
    "utils.py": [
        ('temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")\n    try:\n        with open(temporary, "xb")', 'temporary = path.with_name(f"{path.name}.tmp")\n    try:\n        with open(temporary, "wb")', "run link_is_followed"),
        ('open(temporary, "xb")', 'os.fdopen(os.open(temporary, os.O_WRONLY | os.O_CREAT, 0o600), "wb")', "run umask"),
        ("os.replace(temporary, path)", "os.replace(temporary, path.resolve())", "run link_is_followed"),
        ("            os.fsync(file.fileno())\n", "", "run reach_the_disk"),
        ("os.fsync(directory)", "pass", "run reach_the_disk"),
        ("        half.unlink()  # of", "        pass  # of", "resume auto_without"),
        ("            temporary.unlink()\n", "            pass\n", "run half_file"),
        ("except (OSError, RuntimeError) as error:  # torch.save", "except OSError as error:  # torch.save", "run half_file"),
        ("    if CHECKPOINT in found:\n", "    if False:\n", "run overwrites_nothing"),
        ("    if not ours:\n", "    if False:\n", "run overwrites_nothing"),
        ('.count(b"\\n") > 1:', '.count(b"\\n") > 2:', "run overwrites_nothing"),
        ('.count(b"\\n") > 1:', '.count(b"\\n") > 0:', "resume auto_without"),
        ("        if not (save / CONFIG).exists():", "        if False:", "run wrote_nothing"),
        ("        if not (save / CONFIG).exists():", "        if True:", "run leaves_nothing_else"),
        ("os.fstat(file.fileno()).st_nlink == 0", "False", "run just_removed"),
        ("now.get(k, v)]", "now[k]]", "resume another_machine"),
        ("for place in new:", "for place in (save / LOCK, save, save.parent):", "run wrote_nothing"),
        (" | os.O_NOFOLLOW", "", "run did_not_write"),
        (r"if not re.match(", r"if False and re.match(", "run did_not_write"),
        ("fcntl.LOCK_EX | fcntl.LOCK_NB", "fcntl.LOCK_SH | fcntl.LOCK_NB", "run second_writer"),
        ("for command in (known, describe):", "for command in (describe,):", "run another_repository"),
        ("env=clean, ", "", "run another_repository"),
        ('"--dirty", ', "", "run another_repository"),
        ("kinds = (MemoryError, torch.OutOfMemoryError)", "kinds = torch.OutOfMemoryError", "damage the_machine"),
        (" or any(word in str(error) for word in words)", "", "damage the_machine"),
        (', "CUDA error: out of memory")', ",)", "damage the_machine"),
        ("error: {printable(sentence)}", "error: {sentence}", "flags control"),
        ("{printable('; '.join(changed))}", "{'; '.join(changed)}", "flags control"),
        ('torch.set_rng_state(states["cpu"])', "pass", "resume stopped_run_ends"),
        ("signal.Signals(number).name, 128 + number", "signal.Signals(number).name, number", "resume signal"),
        ("signal.signal(number, signal.SIG_DFL)", "pass", "resume asked_twice"),
        ('warnings.filterwarnings("ignore", message="TensorFloat32', 'warnings.filterwarnings("default", message="TensorFloat32', "run compiled_model"),
        ("cudnn.deterministic = True", "cudnn.deterministic = False", "run repeats"),
        ("return 128 + signal.SIGPIPE", "return 1", "flags reader_that_left"),
        ("if distributed.world_size() == 1:\n            signal", "if True:\n            signal", "ranks more_than_once"),
        ("with suppress(OSError):  # what a", "if True:  # what a", "ranks raised_on_all"),
        ("cudnn.deterministic, cudnn.allow_tf32 = before", "pass", "resume leaves_everything"),
        ("signal.signal(number, handler or signal.SIG_DFL)", "pass", "resume leaves_everything"),
        ("if threading.current_thread() is threading.main_thread():", "if True:", "resume in_a_thread"),
        ("                if not by_nohup:\n", "                if True:\n", "resume nohup"),
        ('if str(save) != os.fsencode(save).decode(errors="replace"):', "if False:", "flags tensorboard_cannot_write"),
        ('if device.type == "cuda" and "cuda" in states:', 'if device.type == "cuda":', "dry goes_on"),
        ('if device.type == "cuda" and "cuda" in states:', 'if "cuda" in states:', "resume another_machine"),
    ],
    "checkpoint.py": [
        ('if "classes" not in state:', "if False:", "flags matched_by_their_order"),
        ("    t.check_finite()\n", "", "damage edited_checkpoint"),
        ("os.link(path, previous)", "pass", "damage before_a_damaged"),
        ("weights_only=True", "weights_only=False", "damage run_code"),
        ("if damaged := archive.testzip():", "if False:", "damage flipped"),
        ("except (UserError, OSError, ", "except (UserError, ", "damage the_machine"),
        (", ImportError, torch.AcceleratorError)", ", ImportError)", "damage not_the_files"),
        (", ImportError, torch.AcceleratorError)", ", torch.AcceleratorError)", "damage not_the_files"),
        ("utils.is_out_of_memory(error) or ", "", "damage the_machine"),
        ("        except OSError as error:\n", "        except ZeroDivisionError as error:\n", "damage the_machine"),
        ('[group["params"] for group in stored["param_groups"]] != [group["params"] for group in groups]', "False", "damage part_that_cannot"),
        ("if buffer is not None and buffer.shape != p.shape:", "if False:", "damage part_that_cannot"),
        ('{"state": stored["state"], "param_groups": groups}', "stored", "damage rates_are"),
        ("if not isinstance(value, kind):", "if False:", "damage part_that_cannot"),
        ("if not 0 <= t.batch <= len(t.plan()):", "if False:", "damage part_that_cannot"),
        ('if state["data_sha256"] != t.data.sha256:', "if False:", "flags cannot_go_on"),
        ("t.data = t.data.with_classes(theirs)", "pass", "flags matched_by_name"),
        ("if odd := sorted(set(ours) ^ set(theirs)):", "if odd := []:", "flags matched_by_name"),
        ('state.get("classes", ours)', 'state["classes"]', "flags older_checkpoint"),
        ("t.mean, t.std = torch.tensor", "_, _ = torch.tensor", "flags normalized_as"),
        ('t.scaler.load_state_dict(state["scaler"])', "pass", "run overflows"),
        ('t.probe.load_state_dict(state["probe"])', "pass", "resume stopped_run_ends"),
        ("        t.schedule.step()\n", "        pass\n", "resume stopped_run_ends"),
        ('t.sums.copy_(ranks[rank]["sums"])', "pass", "resume stopped_run_ends"),
        ('utils.set_generator_states(ranks[rank]["generators"], t.device)', "pass", "resume stopped_run_ends"),
        ('t.sums.copy_(sum(other["sums"] for other in ranks))', 't.sums.copy_(ranks[0]["sums"])', "ranks another_number"),
        ("previous.unlink(missing_ok=True)", "pass", "damage before_a_damaged"),
        ('utils.set_generator_states(ranks[0]["generators"], t.device)', "pass", "ranks another_number"),
        ("utils.seed_rank(t.options.seed, t.epoch, t.batch)", "pass", "ranks another_number"),
    ],
    "benchmarks/train_throughput.py": [
        ("if len(self.moments) != 3 * (1 + steps):", "if False:", "benchmarks figures_of_a_turn"),
        ('"share_of_product": 3 * 2 *', '"share_of_product": 2 *', "benchmarks figures_of_a_turn"),
        ("self.t.options.batch_size / step", "1 / step", "benchmarks figures_of_a_turn"),
        ("/ len(afters[1:])", "/ len(afters)", "benchmarks figures_of_a_turn"),
        ("starts[1:], befores[1:]", "starts, befores", "benchmarks figures_of_a_turn"),
        ("self._between, befores[1:], afters[1:]", "self._between, starts[1:], afters[1:]", "benchmarks figures_of_a_turn"),
        ("mean(waits[1:])", "sum(waits[1:])", "benchmarks figures_of_a_turn"),
        ("2 * size**3", "size**3", "benchmarks rate_of_a_product"),
        ("* repeats / passed", "/ passed", "benchmarks rate_of_a_product"),
        ("median(b / a for", "median(a / b for", "benchmarks figures_of_a_turn"),
        ("of its rate, %\", 100", "of its rate, %\", 1", "benchmarks figures_of_a_turn"),
        ("TFLOP/s\", 1e-12", "TFLOP/s\", 1e-9", "benchmarks figures_of_a_turn"),
        ("for figures in (ours, plain)]", "for figures in (plain, ours)]", "benchmarks figures_of_a_turn"),
    ],
    "benchmarks/peers.py": [
        ("nesterov=momentum > 0", "nesterov=True", "peers without_momentum"),
        ("u * length.atan() if", "u * length if", "peers closed_form"),
        ("go.unit(y + d)[0] if", "go.exp_map(y, d) if", "peers closed_form"),
        ('if "untransported" not in group["changes"]:', "if True:", "peers closed_form"),
        ("d = go.project(y, tau)", "d = tau", "peers closed_form"),
        ('group["grad_clip"] or float("inf")', 'float("inf")', "peers closed_form"),
        ("w *= radius / w.norm()", "pass", "peers adamh"),
        ("lr * radius / u.norm() * u", "lr * u", "peers adamh"),
        ('part.param_groups[0]["lr"] = group["lr"]', "pass", "peers moves"),
        ("matrix(p.data)) for p in", "matrix(p.data).clone()) for p in", "peers moves"),
        ('of_rows if group.get("grassmann") else of_rest', "of_rest", "peers a_run"),
        ('"params": last, "lr": lr,', '"params": last,', "peers moves"),
        ('"make_optimizer", make_optimizer)', '"make_optimizer", own)', "peers a_run"),
        ("round(100 - line", "round(line", "peers a_run"),
    ],
    "benchmarks/last_layer.py": [
        ("t.model.train()", "t.model.eval()", "benchmarks that_of_training"),
        ("t.epoch += 1", "pass", "benchmarks that_of_training"),
        ("hold_out(data, options.holdout) if options.holdout else data", "data", "benchmarks that_of_training"),
        ("with t.autocast():", "if True:", "benchmarks that_of_training"),
        ("restore(t, state)", "pass", "benchmarks another_length"),
        ("factor * (logits - bias) + bias", "factor * logits", "benchmarks another_length"),
        ('figures[0]["length"]', 'figures[-1]["length"]', "benchmarks another_length"),
        ('"--summary", *', '"--eval", *', "benchmarks other_images"),
    ],
    "distributed.py": [
        ("redirect_stdout(nowhere):", "open(os.devnull):", "ranks above_0"),
        ("    logging.disable(logging.WARNING)", "    pass", "ranks above_0"),
        ("    logging.disable(logging.NOTSET)\n", "        pass\n", "ranks above_0"),
        ("return [mine]\n    gathered", "return [mine]\n    return [mine] * world_size()\n    gathered", "ranks whole_batch[SGDG]"),
        ("for error in filter(None, errors):", "for error in ():", "ranks raised_on_all"),
        ('if int(said["RANK"]) >= int(said["WORLD_SIZE"]):', "if False:", "ranks beyond_the_number"),
        ("error.happened_elsewhere = True", "pass", "ranks raised_on_all"),
        ("all_gather(_portable(own))", "all_gather(own)", "ranks pickle_cannot"),
        ("    if own:\n        raise own\n", "", "ranks pickle_cannot"),
        ("pickle.loads(pickle.dumps(error))", "pickle.dumps(error)", "ranks pickle_cannot"),
        ("dist.ReduceOp.MAX", "dist.ReduceOp.MIN", "ranks stopped_after_any_step and SGD-2"),
        ("value = value if rank() == 0 else values[0]", "pass", "ranks summary_and"),
        ('return f"{lost}: continue with --resume"', "return None", "ranks every_moment"),
        ("isinstance(error, dist.DistNetworkError) or any", "isinstance(error, dist.DistError) or any", "ranks error_of_the_connection"),
        ('"RANK" in os.environ and ', "", "ranks no_launch"),
        ("int(said) if makes_sense else 0", "int(said)", "ranks cannot_meet"),
        ("(RuntimeError, ValueError, OSError) as error:  # torch's", "(ValueError, OSError) as error:  # torch's", "ranks cannot_meet"),
        ("(RuntimeError, ValueError, OSError) as error:  # torch's", "(RuntimeError, OSError) as error:  # torch's", "ranks cannot_meet"),
        ("the environment says {words}; {way}", "{way}", "ranks cannot_meet"),
        ('print(f"processes: waiting for each other, with {words}", flush=True)', "pass", "ranks summary_and"),
        ("set_device(local_rank())", "set_device(rank())", "ranks takes_the_gpu"),
        ("if local_rank() < torch.cuda.device_count():", "if torch.cuda.is_available():", "ranks takes_the_gpu"),
        ("rank() % max(1, torch.cuda.device_count())", "0", "ranks takes_the_gpu"),
        ('"LOCAL_WORLD_SIZE", min(world_size(), torch.cuda.device_count() or 1)', '"LOCAL_WORLD_SIZE", world_size()', "ranks gpu_each_need"),
        ("os.environ.setdefault(\"OMP", "os.environ.update(OMP_NUM_THREADS=\"1\") or os.environ.setdefault(\"OMP", "ranks ngpu_becomes"),
        (") // count)))", "))))", "ranks ngpu_becomes"),
        ("if not torch.cuda.is_available():  # each", "if True:  # each", "ranks ngpu_becomes"),
        ('"--local-addr", "127.0.0.1", ', "", "ranks ngpu_becomes"),
        ("os.getppid() != _launcher", "os.getppid() == 0", "ranks lose_their"),
        ("self.optim.load_state_dict(self.optim.state_dict())", "pass", "dry goes_on and AdamG"),
        ("return DistributedDataParallel(model, broadcast", "DistributedDataParallel(model, broadcast", "ranks whole_batch[SGDG]"),
        ("broadcast_buffers=False, find_unused_parameters=True", "broadcast_buffers=False", "ranks stopped_after_any_step and 3"),
        ("        synchronize_batch_norm(model)\n", "        pass\n", "dry goes_on and sync"),
        ("(nn.BatchNorm1d, nn.BatchNorm2d)", "nn.BatchNorm2d", "networks synchronized"),
    ],
    "data.py": [
        ("std=(255.0, 255.0, 255.0),\n        flip=False", "std=(255.0, 255.0, 255.0),\n        flip=True", "paper on_svhn"),
        ("mean, std, flip=False", "mean, std, flip=True", "data digits"),
        ("(125.3, 123.0, 113.9)", "(123.0, 125.3, 113.9)", STARTED),
        ("random_state=0", "random_state=1", "data digits"),
        ("fcntl.flock(folder, fcntl.LOCK_EX)", "fcntl.flock(folder, fcntl.LOCK_SH)", "data download_is_alone"),
        ("folder = os.open(root, os.O_RDONLY)", 'folder = os.open(root / ".lock", os.O_RDWR | os.O_CREAT | os.O_TRUNC)', "data download_is_alone"),
        ("socket.setdefaulttimeout(DOWNLOAD_TIMEOUT)", "pass", "data download_is_alone"),
        ("offsets[:, 0], offsets[:, 1]]", "offsets[:, 0], offsets[:, 0]]", WRN),
        ("generator.integers(0, 2 * pad + 1, (*shape, 2))", "generator.integers(0, 2 * pad + 1, (*shape, 1)).repeat(2, 2)", "data by_itself"),
        ("generator.integers(0, 2, shape).astype(bool)", "generator.integers(0, 2, (steps, 1)).repeat(batch_size, 1).astype(bool)", "data by_itself"),
        ("generator.integers(0, 2, shape).astype(bool)", "generator.integers(0, 2, (1, batch_size)).repeat(steps, 0).astype(bool)", "data by_itself"),
        ("cv2.BORDER_REFLECT_101", "cv2.BORDER_REFLECT", WRN),
        ("classes.index(name) for name in self.classes", "self.classes.index(name) for name in classes", "data another_order"),
        ("if len(data.classes) < 2:", "if False:", "folder wrong_with_the_folders"),
        ('evaluation and not (root / "train").exists()', "evaluation", "folder test_part_is_enough"),
        ("SeedSequence(seed, spawn_key=(epoch,))", "SeedSequence(seed + epoch)", "data pure_function"),
        ("spawn_key=(epoch,)", "spawn_key=(epoch // 2,)", "data pure_function"),
        ("range(0, len(labels), batch_size)", "range(0, len(labels) - batch_size + 1, batch_size)", WRN),
        ("np.random.default_rng(0).permutation(total)", "np.random.default_rng(1).permutation(total)", "data TestHoldOut"),
        ("if len(pending) == 2 * nthread:", "if False:", "data so_far_ahead"),
        ("pool.shutdown(cancel_futures=True)", "pass", "data so_far_ahead"),
        ("array.dtype.str} {array.shape}", "array.dtype.str}", "data sha256"),
        ("value or 1.0 for value in std", "value for value in std", "folder constant_channel"),
        ("np.ascontiguousarray(train.data)", "np.ascontiguousarray(train.data[..., ::-1])", "data format_of_cifar"),
        ("if archive.is_file():", "if True:", "data missing_or_corrupt"),
        ("except Exception as error:\n            archive", "except RuntimeError as error:\n            archive", "data is_a_file"),
        ("if not 1 <= batch_size <= n_images:", "if not batch_size <= n_images:", "data does_not_fit"),
        ("astype(bool) if flip else np.zeros(shape, bool)", "astype(bool)", "data pure_function"),
        ("generator.permutation(n_images)", "generator.integers(0, n_images, n_images)", "data no_image_twice"),
        ("SeedSequence(seed, spawn_key=(epoch,))", "SeedSequence([seed, epoch, np.random.randint(9**9)])", "data pure_function"),
        ("range(start, len(plan))", "range(len(plan))", "data so_far_ahead"),
        ("Path(os.path.expanduser(dataroot))", "Path(dataroot).expanduser()", "flags missing_data"),
    ],
    "folder.py": [
        ("cv2.INTER_AREA if shrinking else cv2.INTER_LINEAR", "cv2.INTER_LINEAR", "folder kinds"),
        ("cv2.cvtColor(image, cv2.COLOR_BGR2RGB)", "image", "folder order_of_their_names"),
        ("return sorted(path for path", "return list(path for path", "folder order_of_their_names"),
        ("if not path.is_file():", "if not path.exists():", "folder never_opened and device"),
        ("(str(path.parent), path.name)", "path", "folder by_torchvision"),
        ("(real := os.path.realpath(here))", "(real := str(here))", "folder by_torchvision"),
        ("else passed_over).append(path)", "else []).append(path)", "folder passed_over"),
        ("tuple(map(printable, classes))", "classes", "folder any_name"),
        ("if image is None:", "if False:", "folder cannot_be_decoded"),
        ("(OSError, cv2.error) as", "OSError as", "folder cannot_be_decoded"),
        ("set(classes) ^ set(", "set(classes) - set(", "folder wrong_with_the_folders"),
        ("path.suffix.lower()", "path.suffix", "folder kinds"),
        ("cv2.IMREAD_COLOR", "cv2.IMREAD_COLOR | cv2.IMREAD_ANYDEPTH", "folder find_their"),
    ],
    "resnet.py": [
        ("stride = 2 if i > 0 and j == 0 else 1", "stride = 2 if j == 0 else 1", "networks computes"),
        ("nn.Conv2d(in_width, width, 1, stride, bias=False)", "nn.Conv2d(in_width, width, 1, stride)", GROUPS),
        ("z = relu(self.bn1(self.conv0(o)), inplace=True)", "z = self.bn1(self.conv0(o))", "networks computes"),
        ("self.convdim(o))", "self.convdim(x))", "networks computes"),
        ("self.dropout, self.training)", "self.dropout, True)", "networks computes"),
        ('mode="fan_in"', 'mode="fan_out"', "networks he_normal"),
    ],
    "vgg.py": [
        ("nn.MaxPool2d(2)", "nn.AvgPool2d(2)", "networks computes"),
        ("torch.ones_like(bn.weight", "2 * torch.ones_like(bn.weight", "networks computes"),
        ("nn.ReLU(inplace=True)", "nn.Identity()", "networks computes"),
        ("nn.Dropout(dropout)", "nn.Dropout2d(dropout)", "networks computes"),
        ("del bn.weight\n    bn.register_buffer(\"weight\", scale, persistent=False)", "pass", "networks computes"),
        ('mode="fan_in"', 'mode="fan_out"', "networks he_normal"),
    ],
    "grassmann_optimizer.py": [
        ("    gram.diagonal(dim1=-2, dim2=-1).sub_(1)\n    return 2 * gram @ y", "    return 2 * (gram @ y - y)", "operators small_part"),
        ("        gram.diagonal(dim1=-2, dim2=-1).sub_(1)\n        for i", "        for i", "operators small_part"),
        ("y * angle.sin() + u * (2 * (angle / 2).sin() ** 2)", "y * angle.sin() + u * (1 - angle.cos())", "operators small_turn"),
        ("for _ in range(2):", "for _ in range(1):", "operators nearly_along"),
        ("(1 - beta2) * (h * h).sum(-1, keepdim=True)", "(1 - beta2) * (g * g).sum(-1, keepdim=True)", "fast are_the_rule"),
        ("parallel_translate(m, y, d), v", "m, v", "fast are_the_rule"),
        ("torch.stack(steps)", "torch.stack(steps[:1] * len(steps))", "fast are_the_rule"),
        ("h_norm.mul_(clip)", "h_norm.mul_(1)", "fast are_the_rule"),
        ("(v_ + epsilon).sqrt_()", "(v_.sqrt() + epsilon)", "paper adamg"),
        ("(along.abs_() > _CANCELLED * h_norm).any()", "False", "fast nearly_along"),
        ("_BLOCK = 2**18", "_BLOCK = 2**22", "fast little_memory"),
        ("    @torch._disable_dynamo\n", "", "fast compiled"),
        ("foreach=False, fused=fused", "foreach=not fused, fused=fused", "optimizer torchs_sgd"),
        ('in saved["state"].get(i', 'in state_dict["state"].get(i', "pytorch loaded_state"),
        ("        h = h - tl.sum(y * h, 0) * y\n", "", "fast nearly_along"),
        ("high.item() < _LONG and low.item() >= least", "True", "fast huge_and_tiny or are_the_rule"),
        ("return y, -g if maximize else g, m", "return y, g, m", "pytorch maximize"),
        ('[{"maximize": False, **group}', '[{**group, "maximize": False}', "pytorch maximize"),
        (' and not group["dampening"]', "", "pytorch fused"),
        ('"nesterov": momentum > 0}', '"nesterov": False}', WRN),
        ('"grassmann" if p.shape[0] < p', '"grassmann" if p.shape[0] <= p', "invariance groups_by_measurement"),
        ("n not in computed and p.shape[0] < p", "n not in computed and p.shape[0] <= p", "optimizer groups_by"),
        ("stored.copy_(torch.where(kept, rows, y).view(stored.shape))", "pass", "optimizer groups_by"),
        ("stored.copy_(rows.view(stored.shape))", "pass", "pytorch narrow_parameters"),
        ('groups["bn_bias" if p.ndim < 2 else "other"]', 'groups["bn_bias" if "bias" in name else "other"]', GROUPS),
        ('{**grassmann, "omega": 0.0}', '{**grassmann, "omega": omega}', "invariance groups_by_measurement"),
        ("if p.dtype in _LOW_PRECISION else p.dtype", "if False else p.dtype", "pytorch narrow_parameters"),
        ('"meta" else device, enabled=False)', '"meta" else device, enabled=True)', "fast are_the_rule"),
        ("value.to(p.device, dtype, copy=True)", 'value.to("cpu", dtype, copy=True)', "dry goes_on"),
        ("value.to(p.device, dtype, copy=True)", "value.to(p.device, dtype)", "pytorch loaded_state"),
        ('torch.float32 if key == "step" else _arithmetic(p)', "p.dtype", "pytorch loaded_state"),
        ("torch.zeros((), dtype=torch.float32, device=p.device)", "torch.zeros((), dtype=torch.float32)", "dry never_waits"),
        ("torch.zeros((), dtype=torch.float32, device=p.device)", "torch.zeros((), device=p.device)", "pytorch counted"),
        ("dtype=_arithmetic(p), device=p.device)", "dtype=_arithmetic(p))", "dry never_waits"),
        ("torch.full((), lr, **like)", "torch.tensor(lr, **like)", "dry never_waits"),
        ("works = p.device.type == _KERNEL_DEVICE and", "works = False and", "dry never_waits"),
        ("return p.is_cuda and p", "return False and p", "dry never_waits"),
        ("lr = lr.to(params[0].device, torch.float32, non_blocking=True) if", "lr = lr if", "dry in_blocks"),
        ("    if not _is_on_host(x):", "    if False:", "dry in_blocks"),
        ("if not _is_on_host(h) or (along", "if (along", "dry in_blocks"),
        ("x.dtype == torch.float32 and x.is_cuda", "x.dtype == torch.float32", "fast are_the_rule"),
        ("w.flatten(1)\n", "w.flatten(1).double()\n", "fast without_float64"),
        ("        if kernel in _LAUNCHED:\n            raise\n", "", "fast later_launch"),
        ("        if not _WITHOUT_KERNEL:\n", "        if True:\n", "fast cannot_be_built"),
        ("        _WITHOUT_KERNEL.add(y.device)\n", "", "fast cannot_be_built"),
        ("    _advance(y, g, m, v, rates[layer], decay", "    dict(decay", "fast cannot_be_built"),
        ("1 << (n - 1).bit_length()", "8192", "fast at_most_twofold"),
        ("p.shape[1:].numel() <= _LONGEST_ROW", "True", "fast at_most_twofold"),
        ("min(16, size // 512)", "min(2, size // 512)", "fast spills_little"),
        ('if state["momentum_buffer"].shape != p.shape:', "if False:", "pytorch another_shape"),
        ('and group["lr"] == 0', "and False", "pytorch rate_of_0"),
        ('turned &= "beta2" not in group', "turned &= True", "pytorch rate_of_0"),
        (".clamp_(min=_ZERO_ROW).reciprocal_()", ".reciprocal_()", "fast are_the_rule"),
        ("self._tells_of_sgd = False", "pass", "optimizer plain_sgd"),
        ("not one_of_many and", "", "optimizer plain_sgd"),
        ("self._rates_differed = False\n            text", "text", "optimizer erases_lrg"),
        (" |= len(_rates_of(self.param_groups)) > 1", " = True", "optimizer erases_lrg"),
        ("and rates != {0.0}", "", "optimizer erases_lrg"),
        ('raise ValueError(f"{name} has no effect: {_NO_ROWS}")', "pass", "optimizer option_of_rows"),
        ("            self.param_groups.pop()\n", "", "optimizer not_added"),
        ('["epsilon"] if key == "eps" else', "", "optimizer not_added"),
        ("n == 1 or p.is_complex()", "n == 1", "optimizer not_added"),
        ("    if not isinstance(model, nn.Module):", "    if False:", "optimizer sorted_is_said"),
        ("if not chosen and isinstance(select, str):", "if False:", "optimizer sorted_is_said"),
        ("if not chosen and isinstance(select, str):", "if not chosen:", "optimizer by_name_or_not"),
        ("if lazy := [name for name, p in trainable.items() if is_lazy(p)]:", "if lazy := []:", "optimizer sorted_is_said"),
        ("(length - 1).abs() <= 16", "(length - 1).abs() <= -1", "invariance made_again"),
        ("whole.numel() and not whole.any()", "False", "optimizer sorted_is_said"),
        ("torch.autocast(device, enabled=False)", "torch.autocast(device, enabled=True)", "invariance in_float32"),
        ("model if model.training else model.train()", "model.train()", "invariance frozen"),
        ("cosine < 0.01 * chance", "cosine < 0.1 * chance", "invariance hundredth"),
        ('max(state["beta2_power"], 5e-324)', 'state["beta2_power"]', "foreign underflow"),
        ('.shape == p.flatten(1).shape:', ".shape == ():", "foreign same_meaning"),
        ('if found != needed if group["grassmann"] else not found.items() <= needed.items():', "if False:", "foreign refused"),
        ("part.is_shard(0)", "part.is_shard()", "frameworks two_processes"),
        ("return torch.addmm(g, gram, whole, alpha=2 * omega)", "return g", "frameworks two_processes"),
        ('given["state"].items() if s is not None', 'given["state"].items()', "frameworks two_processes"),
        ("whole = p.full_tensor() if _is_sharded(p) and not p.is_meta else p", "whole = p", "frameworks two_processes"),
    ],
    "scripts/summarize.py": [
        ("self.errors = [run.errors[-1] for run in self.runs]", "self.errors = [min(run.errors) for run in self.runs]", "tables tables_say"),
        ('"test_error": median(errors) if', '"test_error": sum(errors) / len(errors) if', "tables csv_has"),
        ("self.runs = [run for run in all_runs if run.finished]", "self.runs = [run for run in all_runs if run.losses]", "tables named_but_not_counted"),
        ('APART = {"seed", ', 'APART = {"seed", "dropout", ', "tables never_in_one_cell"),
        ('"nthread", "dataroot"', '"dataroot"', "tables where_a_run_ran"),
        ('"weights_from": None, "processes": 1}', '"processes": 1}', "tables never_in_one_cell"),
        ('"weights_from": None, "processes": 1}', '"weights_from": None}', "tables never_in_one_cell"),
        ('None if method == "SGD" else "shape"}', '"shape"}', "tables where_a_run_ran"),
        ('None if method == "SGD" else "shape"}', "None}", "tables where_a_run_ran"),
        ("max(all_runs, key=", "min(all_runs, key=", "tables named_but_not_counted"),
        ("split(\"\\n\")[:-1]", "split(\"\\n\")", "tables named_but_not_counted"),
        ("by_seed.setdefault(run.seed, run)", "by_seed.setdefault(run.path, run)", "tables seed_counts_once"),
        ("run.setting, not run.finished)", "run.setting, run.finished)", "tables seed_counts_once"),
        ("path.parts[:-1] if", "path.parts if", "tables tables_say"),
        ("most_common(1)", "most_common()[-1:]", "tables tables_say"),
        ("if text != usual[method, name]]", "]", "tables tables_say"),
        ("key=lambda cell: median(cell.errors))", "key=lambda cell: -median(cell.errors))", "tables tables_say"),
        ("self.holdout > 0, self.data", "False, self.data", "tables tables_say"),
        ("paper.epoch_step, paper.images) == (self.epochs, drops, images)", "paper.epoch_step) == (self.epochs, drops)", "tables where_they_may"),
        ("paper.epoch_step, paper.images) == (self.epochs, drops, images)", "paper.images) == (self.epochs, images)", "tables where_they_may"),
        ("(paper.epochs, paper.epoch_step, paper.images) == (self.epochs, drops", "(paper.epoch_step, paper.images) == (drops", "tables where_they_may"),
        ('f"{median(self.errors) - paper:+.2f}"', 'f"{paper - median(self.errors):+.2f}"', "tables where_they_may"),
        ('"errors", group, drops, {})', '"errors", group, drops, run.curves)', "tables where_they_may"),
        ("[start:end][-3:]", "[start:end][-1:]", "tables tables_say"),
        ("run.losses[start:end]", "run.losses[:end]", "tables tables_say"),
        ("if drop < self.epochs), self.epochs]", "), self.epochs]", "tables tables_say"),
        ('"Loss" not in head or head == heads[-1]', '"Loss" not in head', "tables tables_say"),
        ('f"{value:.6g}" if', 'f"{value:.6f}" if', "tables csv_has"),
        ('startswith(("=", "+", "-", "@"))', 'startswith(("=", "+", "-"))', "tables csv_has"),
        ("if pieces[1::2] != [BEGIN, END]:", "if len(pieces) != 5:", "tables two_markers"),
        ('{END}{pieces[-1]}"', "{END}\\n\"", "tables two_markers"),
        ("write_whole(path.resolve(), lambda file, content=content: file.write(content))", "path.write_bytes(content)", "tables written_whole"),
        ('sys.exit(printable(f"summarize.py: cannot write {path}', 'raise (printable(f"summarize.py: cannot write {path}', "tables written_whole"),
        ("`*\\[\\]<>|&~$]", "`*\\[\\]<>&~$]", "tables names_break"),
        ('g<0>", printable(text))', 'g<0>", text)', "tables names_break"),
        ("except Exception as error:  # whatever is in a file", "except (ValueError, KeyError, OSError) as error:  # whatever is in a file", "tables odd_run"),
        (" or len(lines) > self.epochs", "", "tables odd_run"),
        ("                    Cell([run], [])  #", "                    pass  #", "tables odd_run"),
        ("if not all(map(math.isfinite, self.losses + self.errors)):", "if False:", "tables odd_run"),
        ("math.isfinite, self.losses + self.errors", "math.isfinite, self.losses", "tables odd_run"),
        ('[line["epoch"] for line in lines] != list(range(1, len(lines) + 1)) or', "", "tables odd_run"),
        (' if name != "published")', ")", "tables behind_links"),
        ("Path(folder), Path(folder).resolve()", "Path(folder), Path(folder)", "tables behind_links"),
        (", followlinks=True", "", "tables behind_links"),
        ("in filter(None, begun) for", "in results for", "tables and_their_median"),
        ("1 - 0.8 * index", "1 - 0 * index", "tables side_by_side"),
        ("run.errors[run.epochs // 5 :]", "run.errors", "tables and_their_median"),
        ("for at in zip(*(getattr(run, quantity) for run in cell.runs), strict=True)]", "for at in zip(*(getattr(run, quantity) for run in cell.all_runs), strict=False)]", "tables and_their_median"),
        ("signal.signal(signal.SIGPIPE, signal.SIG_DFL)", "pass", "tables leaves_early"),
        ("sharey=shared", "sharey=False", "tables side_by_side"),
        ("for cell in group}) > 1:", "for cell in group}) > 0:", "tables side_by_side"),
        ('"text.parse_math": False, ', "", "tables side_by_side"),
        ("while (path := target", "if (path := target", "tables side_by_side"),
        ("(), drops[data], curves)", "(), (), curves)", "tables curves_alone"),
    ],
    "scripts/convert_authors.py": [
        ('if name.endswith((".weight", ".bias")) else', "if True else", "authors goes_on"),
        ('**theirs["stats"]}', "}", "authors goes_on"),
        ("order.index(names[p])", "names[p][::-1]", "authors goes_on"),
        ("t.optimizer.load_state_dict(optimizer_state", "(optimizer_state", "authors goes_on"),
        ('t.epoch = int(theirs.get("epoch", 0))', "t.epoch = 0", "authors goes_on"),
        ("weights_only=True", "weights_only=False", "authors runs_no_code"),
        ("continues=False", "continues=True", "authors overwritten"),
        ("        print(f\"note: the optimizer's", "        raise\n        print(f\"note: the optimizer's", "authors left_out"),
    ],
    "scripts/sweep.py": [
        ("process.kill() if len(self.signals) > 1 else process.terminate()", "process.terminate()", "sweeps second_signal"),
        ("{directory} {state}", "{directory}", "sweeps failure_is_reported"),
        ("return logged == epochs and not older", "return logged >= epochs and not older", "sweeps finished_is"),
        ("return logged == epochs and not older", "return logged == epochs", "sweeps finished_is"),
        ("if flags or d not in done", "if d not in done", "sweeps let_main_judge"),
        ("if flags or d not in done", "", "sweeps let_main_judge"),
        ('r"\\d+$|(GPU|MIG)-"', '""', "sweeps cuda_sees"),
        ("gpus[i % len(gpus)]", "gpus[0]", "sweeps gpus_by_turns"),
        ("// jobs))", "))", "sweeps share_the_cores"),
        ('"start_new_session": True', '"start_new_session": False', "sweeps asks_each_run_once"),
        ("process.terminate()", "process.kill()", "sweeps asks_each_run_once"),
        ("if self.signals and number == signal.SIGHUP:", "if False:", "sweeps asks_each_run_once"),
        ("if signal.getsignal(number) != signal.SIG_IGN:", "if True:", "sweeps asks_each_run_once"),
        ("                if self.signals:\n", "                if False:\n", "sweeps asks_each_run_once"),
        ('output.read_text(errors="replace")', "output.read_text()", "sweeps failure"),
        ("|epoch_step", "", "sweeps mistake"),
        ("|resume)", ")", "sweeps mistake"),
        ("+ 0.5)", ")", "sweeps narrowed_table"),
        (" - {0, epochs}", "", "sweeps real_thing"),
        ("product(seeds, datasets, models, methods)", "sorted(product(seeds, datasets, models, methods), key=lambda c: c[1:])", "sweeps seed_by_seed"),
        ("''.join(given)", "''", "sweeps goes_on_later"),
        ("{shlex.join(command)}", "{' '.join(command)}", "sweeps narrowed_table"),
        ("128 + runs.signals[0] if runs.signals else ", "", "sweeps goes_on_later"),
    ],
    "pyproject.toml": [
        ('torch>=2.11', 'torch>=2.12', "package metadata"),
        ('py-modules = ["grassmann_optimizer"]', 'py-modules = ["grassmann_optimizer", "main"]', "package module"),
    ],
    "MANIFEST.in": [("prune tests", "", "package module")],
    "tests/conftest.py": [('("pytest", "torch"', '("torch"', "setup one_sentence")],
    "scripts/setup.sh": [
        ("if [ -L .venv ] || ", "if ", "setup left_alone"),
        ("[ -e .venv ] && [ ! -e $mark ]", "false", "setup left_alone"),
        ("    touch $mark\n", "", "setup made_anew"),
        ('    command -v "$python" >/dev/null || return\n', "", "setup goes_before"),
        ("python3.{14..11}", "", "setup made_anew"),
        ("options=(--system-site-packages)", "options=()", "setup built_on"),
        ("sys.prefix != sys.base_prefix or not", "not", "setup built_on"),
        ("--no-index ", "", "setup takes_uv"),
        ('fail "Installing', 'echo "Installing', "setup tried_again"),
        ("if [ -n \"${PYTHON:-}\" ]", "if false", "setup goes_before"),
        ("${VIRTUAL_ENV:-$CONDA_PREFIX}", "${CONDA_PREFIX:-$VIRTUAL_ENV}", "setup goes_before"),
        ("pip=(uv pip", "pip=(uvx pip", "setup takes_uv"),
        ("command -v uv >/dev/null || return", "true", "setup takes_uv"),
    ],
    "scripts/quickstart.sh": [
        ("    printf '\\n== %s ==\\n'", "    rm -rf $out/\"$method\"; printf '\\n== %s ==\\n'", "setup goes_on"),
        (' --resume auto "$@"', ' "$@"', "setup goes_on"),
        ('train SGDG --lr 0.1 --lrg 0.5 "$@"', "train SGDG --lr 0.1 --lrg 0.5", "setup goes_on"),
        ('train SGDG --lr 0.1 --lrg 0.5 "$@"', 'train SGDG --lr -0.1 --lrg 0.5 "$@"', "setup draws_them"),
        ("${OMP_NUM_THREADS:-1}", "1", "setup goes_on"),
        ("${OMP_NUM_THREADS:-1}", "${OMP_NUM_THREADS:-2}", "setup goes_on"),
        ('"$(dirname "$(realpath "$0")")/.."', '"$(dirname "$0")/.."', "setup help"),
    ],
    "scripts/test.sh": [('"$(dirname "$(realpath "$0")")/.."', '"$(dirname "$0")/.."', "setup help")],
    "scripts/subset.py": [
        ("sorted(path for path in c.iterdir()", "list(path for path in reversed(sorted(c.iterdir()))", "subset first_images"),
        ("count < 1 or ", "", "subset mistake"),
        ("any(len(images) < count for images in chosen)", "False", "subset mistake"),
        ("args.target.mkdir(parents=True)", "args.target.mkdir(parents=True, exist_ok=True)", "subset mistake"),
    ],
    "benchmarks/optimizer_step.py": [
        ('state.get("step", y.new_zeros(())) + 1', 'state.get("step", y.new_zeros(())) + 2', "benchmarks same_network"),
        ("        self.sgd.step()\n", "", "benchmarks same_network"),
        ('momentum=group["momentum"], **options)', 'momentum=0.0, **options)', "benchmarks same_network"),
        ('("SGDG", go.SGDG), ("AdamG", go.AdamG)', '("SGDG", go.AdamG), ("AdamG", go.SGDG)', "benchmarks each_variant"),
        ("omega=omega)", "omega=0.1 - omega)", "benchmarks each_variant"),
        ("params, fused=True, **options", "params, fused=True, **momentum", "benchmarks each_variant"),
        ("params, foreach=True, **options", "params, foreach=False, **options", "benchmarks each_variant"),
        ("(y @ y.T) @ y for", "y @ y.T for", "benchmarks each_variant"),
        ("* 5 // 2", "* 5", "benchmarks each_variant"),
        ("accumulate(event.nbytes()", "accumulate(abs(event.nbytes())", "benchmarks peak_memory"),
        ("return time.perf_counter() - start", "return start - time.perf_counter()", "benchmarks to_their_names"),
        ("for step in variants.values()] for", "for step in reversed(variants.values())] for", "benchmarks to_their_names"),
        ("value / medians[SGD]", "medians[SGD] / value", "benchmarks to_their_names"),
        ("medians = {name: median(values)", "medians = {name: sum(values) / len(values)", "benchmarks to_their_names"),
        ("1e3 * min(times[name])", "1e3 * max(times[name])", "benchmarks to_their_names"),
        ("peaks[name] / 1e6", "peaks[name] / 1e3", "benchmarks to_their_names"),
        ("(medians[COPY] + medians[PRODUCTS])", "medians[PRODUCTS]", "benchmarks to_their_names"),
        ('["SGDG omega=0"] / medians[COPY]', '["SGDG omega=0"] / (2 * medians[COPY])', "benchmarks to_their_names"),
    ],
    "benchmarks/rates.py": [
        ("losses[-20:]", "losses", "benchmarks last_losses"),
        ("100 * wrong", "wrong", "benchmarks last_losses"),
        ("median(run['losses'])", "mean(run['losses'])", "benchmarks small_run_of_rates"),
        ("median(run['errors'])", "median(run['losses'])", "benchmarks small_run_of_rates"),
    ],
    "benchmarks/gpu.sh": [
        (" || [ $# -gt 1 ]", "", "gpu number_of_minutes"),
        ('    fail "gpu.sh: error: torch', '    : "gpu.sh: error: torch', "gpu without_a_gpu"),
        ("CDPATH='' cd", "cd", "gpu stops_no_other"),
        (" failed=1\n", "\n", "gpu stops_no_other"),
        ('touch "$out/$name.done"', ":", "gpu stops_no_other"),
        ('"${all[@]}" --json "$out/opt', '--json "$out/opt', "gpu stops_no_other"),
    ],
    "examples/resnet18.py": [
        ('("SGD", sgd), ("SGD-G", sgdg)', '("SGD", sgdg), ("SGD-G", sgd)', "benchmarks both_curves"),
        ("torch.manual_seed(0)", "pass", "benchmarks both_curves"),
    ],
}
# fmt: on


class Fault(NamedTuple):
    """A row of the table; without a file the tests run as they are."""

    number: int
    file: str
    text: str
    replacement: str
    tests: str

    def __str__(self) -> str:
        words = " ".join(f"{self.text} -> {self.replacement}".split())
        return f"{self.number:3} {self.file.removeprefix('scripts/')}: {words}"

    def source(self) -> str:
        """The file with the fault; SystemExit where the text does not stand there once."""
        source = (ROOT / self.file).read_text()
        if (count := source.count(self.text)) != 1:
            sys.exit(f"fault {self.number}: {self.text!r} stands {count} times in {self.file}, not once")
        return source.replace(self.text, self.replacement)


def all_faults() -> list[Fault]:
    """The table's rows, numbered from 1."""
    rows = [(file, *row) for file, rows in FAULTS.items() for row in rows]
    return [Fault(number, *row) for number, row in enumerate(rows, 1)]


def copy_files(tree: Path) -> None:
    """Copy the files that git knows or would not ignore."""
    listed = ["git", "-C", str(ROOT), "ls-files", "--cached", "--others", "--exclude-standard"]
    for name in subprocess.check_output(listed, text=True).splitlines():
        if not name.startswith(LINKED) and (ROOT / name).is_file():
            (tree / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, tree / name)
    (tree / LINKED).parent.mkdir(exist_ok=True)
    (tree / LINKED).symlink_to(ROOT / LINKED)


def run_pytest(tree: str, tests: str) -> None:
    """Run what the selections name until a test fails; ends the process, with pytest's exit code."""
    os.chdir(tree)
    os.setsid()  # so that at LIMIT all that the tests have started ends with them
    output = os.open("output.txt", os.O_WRONLY | os.O_CREAT)
    os.dup2(output, 1)
    os.dup2(output, 2)
    selections = [selection.partition(" ") for selection in tests.split("; ")]
    files = sorted({FILES[word] for word, _, _ in selections})
    expression = " or ".join(f"({words})" for _, _, words in selections)
    words = ["-x", "-q", "-p", "no:cacheprovider", "-m", "not long", *files, "-k", expression]
    code = int(import_module("pytest").main(words))
    sys.stdout.flush()
    os._exit(code)  # the threads that this is a fork of are not here to be joined


def try_fault(fault: Fault) -> tuple[str, str]:
    """The verdict on a copy with the fault, and what pytest printed."""
    with tempfile.TemporaryDirectory(prefix="mutants-") as tree:
        copy_files(Path(tree))
        if fault.file:
            Path(tree, fault.file).write_text(fault.source())
        process = multiprocessing.get_context("fork").Process(target=run_pytest, args=(tree, fault.tests))
        process.start()
        process.join(LIMIT)
        if process.exitcode is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.join()
        text = Path(tree, "output.txt").read_text(errors="replace")
    if process.exitcode == 1:
        return "caught" if "\nFAILED " in text else "error", text  # of a fixture
    return {0: "SURVIVED", -9: "too slow"}.get(process.exitcode, f"pytest: {process.exitcode}"), text


def main(words: list[str]) -> int:
    """Try the faults that the words name, or all; the exit code."""
    faults = all_faults()
    if words:
        faults = [f for f in faults if any(w == str(f.number) or w in f.text for w in words)]
    for name in SLOW_IMPORTS:
        import_module(name)
    of_file = {}
    for selection in sorted({selection for fault in faults for selection in fault.tests.split("; ")}):
        of_file.setdefault(selection.split()[0], []).append(selection)
    whole = [Fault(0, "", "", "", "; ".join(selections)) for selections in of_file.values()]
    caught = 0
    with ThreadPoolExecutor(int(os.environ.get("JOBS", 2))) as pool:
        for verdict, text in pool.map(try_fault, whole):
            if verdict != "SURVIVED":
                sys.exit(f"{text[-3000:]}\nthese tests must pass without a fault")
        for fault, (verdict, text) in zip(faults, pool.map(try_fault, faults), strict=True):
            print(f"{verdict:9} {fault}"[:80], flush=True)
            caught += verdict == "caught"
            if verdict.startswith("pytest"):
                print(text[-2000:])
    print(f"{caught} of {len(faults)} faults are caught")
    return 0 if faults and caught == len(faults) else 1


if __name__ == "__main__":
    os.environ |= {"OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    os.environ |= {"CUDA_VISIBLE_DEVICES": "", "TRITON_INTERPRET": "1"}  # CUDA does not survive a fork
    sys.dont_write_bytecode = True
    sys.exit(main(sys.argv[1:]))
