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
import time
from importlib import import_module
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
LIMIT = 300  # seconds for a fault; tests that take longer have noticed nothing: no fault of the table hangs
TOO_SLOW = 99
LINKED = ("logs/published", "docs/figures")  # too many files to copy, and none that a test writes to
# What takes seconds to import: here once, and every run of pytest is a fork of this process.
SLOW_IMPORTS = (
    "torch", "torch._dynamo", "torch.utils.tensorboard", "torchvision.datasets", "sklearn.datasets",
    "sklearn.model_selection", "scipy.io", "cv2", "pytest",
)  # fmt: skip

FILES = {  # of tests, by the word that begins a selection; an expression as of pytest's -k follows it
    "paper": "tests/test_paper.py", "operators": "tests/optimizer/test_operators.py",
    "optimizer": "tests/optimizer/test_grassmann_optimizer.py", "pytorch": "tests/optimizer/test_in_pytorch.py",
    "odd": "tests/optimizer/test_odd_models.py", "frameworks": "tests/optimizer/test_frameworks.py",
    "fast": "tests/optimizer/test_fast_paths.py", "invariance": "tests/optimizer/test_scale_invariance.py",
    "data": "tests/training/test_data.py", "folder": "tests/training/test_folder.py", "flags": "tests/training/test_command_line.py",
    "run": "tests/training/test_run_directory.py", "resume": "tests/training/test_resume.py",
    "authors": "tests/training/test_authors_runs.py", "damage": "tests/training/test_damage.py", "resnet": "tests/training/test_resnet.py",
    "vgg": "tests/training/test_vgg.py", "ranks": "tests/training/test_distributed.py",
    "benchmarks": "tests/scripts/test_benchmarks.py", "dry": "tests/training/test_cuda_dry_run.py", "tables": "tests/scripts/test_summarize.py", "gpu": "tests/scripts/test_gpu_script.py",
    "sweeps": "tests/scripts/test_sweeps.py", "setup": "tests/scripts/test_setup.py",
    "subset": "tests/scripts/test_subset.py", "networks": "tests/scripts/test_networks.py", "package": "tests/optimizer/test_package.py",
    "peers": "tests/scripts/test_peers.py",
}  # fmt: skip
VERDICTS = {0: "SURVIVED", 1: "caught", TOO_SLOW: "too slow"}  # by pytest's exit code
WRN, GROUPS, STARTED = "paper a_run_of_a_wrn", "paper groups", "paper hyperparameters"

# fmt: off
FAULTS = {  # file: (text, which stands there once; its replacement; tests that could notice)
    "main.py": [
        ('"SGDG": SGDG, "AdamG": AdamG}', '"SGDG": AdamG, "AdamG": SGDG}', WRN),
        ('"nesterov": options.momentum > 0', '"nesterov": False', WRN),
        ("        omega=options.omega,\n", "", WRN),
        ("        momentum=options.momentum,\n", "", WRN),
        ("        bn_decay=options.bn_decay,\n", "", WRN),
        ("        weight_decay=options.weight_decay,\n", "", WRN),
        ("        grad_clip=options.grad_clip,\n", "", WRN),
        ("options.width, classes, options.dropout", "options.width, classes", WRN),
        ("VGGS[options.model], classes, options.dropout", "VGGS[options.model], classes", "paper a_run_of_a_vgg"),
        ("select=options.select,", 'select="shape",', "flags measured"),
        ("(x.float() - self.mean) / self.std", "x.float() / self.std", WRN),
        ("permute(0, 3, 1, 2)", "permute(0, 3, 2, 1)", WRN),
        ("epoch=self.epoch, pad", "epoch=0, pad", WRN),
        ("torch.manual_seed(options.seed)", "torch.manual_seed(0)", WRN),
        ("self.scaler.scale(loss)", "self.scaler.scale(1.5 * loss)", WRN),
        ("return loss.detach(), ", "return 1.5 * loss.detach(), ", WRN),
        ('"train_loss": loss / t.batch', '"train_loss": loss / images', WRN),
        ("self.optimizer.zero_grad(set_to_none=True)", "pass", WRN),
        ("self.optimizer, drops, gamma=ratio", "self.optimizer, drops, gamma=0.2", WRN),
        ("t.model.eval()", "t.model.train()", WRN),
        ("        with t.autocast():\n            logits = t.forward(x)", "        logits = t.forward(x)", "run precision"),
        ("logits.argmax(1) != labels).sum().double()])\n        self.bad", "logits.argmax(1) == labels).sum().double()])\n        self.bad", WRN),
        ("(self.bad_step == 0) & ~loss.isfinite()", "~loss.isfinite()", "run first_bad_step"),
        ("if not torch.stack([p.isfinite().all() ", "if not torch.stack([p.isfinite().any() ", "run TestNotFinite and weight"),
        ("    if not math.isfinite(result[0]):", "    if False:", "run TestNotFinite and test_loss"),
        ('self.sums.copy_(ranks[rank]["sums"])', "pass", "resume stopped_run_ends"),
        ('utils.set_generator_states(ranks[rank]["generators"], self.device)', "pass", "resume stopped_run_ends"),
        ('self.probe.load_state_dict(state["probe"])', "pass", "resume stopped_run_ends"),
        ("                self.schedule.step()\n", "                pass\n", "resume stopped_run_ends"),
        ("self.mean, self.std = mean, std", "pass", "flags normalized_as"),
        ("(options.save / PREVIOUS).unlink(missing_ok=True)", "None", "run left_over"),
        ('if state["data_sha256"] != self.data.sha256:', "if False:", "flags other_images"),
        ("and not stop.asked(by_signal=True):", "and not stop.asked():", "resume gets_on"),
        ("return stop.exit_code", "return 1", "resume signal or max_minutes"),
        ("started + 60 * options.max_minutes", "started + options.max_minutes", "resume from_the_start"),
        ("PROCESS_START if argv is None else", "PROCESS_START if True else", "resume from_the_start"),
        ("os.utime(options.save / CHECKPOINT)", "pass", "sweeps real_thing"),
        ("        t.plan()  # an impossible", "        # an impossible", "flags leaves_the_directory_free"),
        ("hold_out(data, options.holdout) if options.holdout", "hold_out(data, options.holdout) if options.eval", "flags holdout"),
        ("progress.show(loss / t.batch, 100 * wrong", "progress.show(loss / t.batch, wrong", "flags bar"),
        ("torch.compile(model, dynamic=False) if options.compile else model", "model", "run compiled_model"),
        ("torch.compile(model, dynamic=False)", "torch.compile(model)", "run compiled_model"),
        ("math.ceil(len(plan) / 4)", "math.ceil(len(plan) / 2)", "run four_steps"),
        ("if t.epoch == 0:\n            distributed", "if True:\n            distributed", "resume each_epoch_once"),
        ('"test_time": test_time', '"test_time": t.train_time', "run tells_the_time"),
        ("        utils.note_slow_bfloat16(options.dtype, t.device)\n", "", "run begins_with_a_note"),
        ("self.sums = torch.zeros(2, dtype=torch.float64, device=self.device)", "self.sums = torch.zeros(2, dtype=torch.float64)", "dry never_waits"),
        ("loss, logits = t.step(x, labels)\n            t.count", "loss, logits = t.step(x, labels)\n            loss.item()\n            t.count", "dry reads_its_sums"),
        ("torch.tensor(data.mean, device=self.device)", "torch.tensor(data.mean)", "dry never_waits"),
        ("self.device, non_blocking=True).permute", "self.device).permute", "dry never_waits"),
        ("torch.autocast(self.device.type, dtype", 'torch.autocast("cpu", dtype', "dry never_waits"),
        ("dtype=torch.int64, device=self.device)", "dtype=torch.int64)", "dry never_waits"),
        ("if t.batch % read_every == 0:", "if True:", "dry reads_its_sums"),
        ('pin = t.device.type == "cuda"\n    t.model', "pin = False\n    t.model", "dry reads_its_sums"),
        ("dtype=torch.float64, device=t.device)", "dtype=torch.float64)", "dry reads_its_sums"),
        ("torch.randn(64, 3, 32, 32, device=next(model.parameters()).device)", "torch.randn(64, 3, 32, 32)", "dry are_measured"),
        ("return plan.of_rank(distributed.rank(), distributed.size())", "return plan.of_rank(0, distributed.size())", "ranks whole_batch[SGDG]"),
        ("loss.double() / distributed.size()", "loss.double()", "ranks whole_batch[SGDG]"),
        ("model = DistributedDataParallel(model, ", "DistributedDataParallel(model, ", "ranks whole_batch[SGDG]"),
        ("broadcast_buffers=False, find_unused_parameters=True", "broadcast_buffers=False", "ranks stopped_after_any_step and 3"),
        ("if options.sync_bn and not options.eval:", "if options.sync_bn:", "ranks could_not"),
        ("model = nn.SyncBatchNorm.convert_sync_batchnorm(model)", "pass", "dry second_process and sync"),
        ("utils.seed_rank(options.seed, 0, 0)", "pass", "ranks dropout_differs"),
        ("distributed.take_first(t.model.buffers())", "pass", "ranks running_averages"),
        ("self.sums.copy_(sum(other[\"sums\"] for other in ranks))", "self.sums.copy_(ranks[0][\"sums\"])", "ranks another_number"),
        ("if options.zero and distributed.size() > 1:", "if False:", "ranks step_of_zero"),
        ("        if message:\n            print(message)", "        if message:\n            pass", "ranks summary_and"),
        ("if self.batch > len(self.plan()):", "if self.batch >= len(self.plan()):", "resume stopped_run_ends"),
        ("if any(told.get(name, value) != value for", "if any(False for", "damage each_part"),
    ],
    "options.py": [
        ('"momentum": 0.9,', '"momentum": 0.95,', STARTED),
        ('"SGD": {"lr": 0.1, "lrg": None, "bn_decay": 5e-4}', '"SGD": {"lr": 0.1, "lrg": None, "bn_decay": 0.0}', STARTED),
        ('[60, 120], "lr_decay_ratio": 0.1', '[60, 120], "lr_decay_ratio": 0.2', STARTED),
        ('protocol["dropout"].get(model, 0.0)', 'protocol["dropout"]["resnet"]', "paper dropout_of_vgg"),
        ('MAY_CHANGE = {"epochs", ', 'MAY_CHANGE = {"epochs", "seed", ', "flags option_that_differs"),
        ("return {**stored, **given}", "return {**fill_in({}), **given}", "resume stopped_run_ends"),
        ("trains = writes or ", "trains = True or ", "ranks could_not"),
        ("claimed = writes and own and", "claimed = False and", "flags before_the_checkpoint"),
        ('("lrg", "omega", "grad_clip", "select") if', '("omega", "grad_clip", "select") if', "flags no_effect"),
        ("number(float, 0, HUGE)(text) or None", "number(float, 0, HUGE)(text)", "flags switched_off"),
        ("allow_abbrev=False", "allow_abbrev=True", "flags do_not_fit"),
        ("if done > options.epochs:", "if False:", "flags fewer_epochs"),
        (').strip("-") or "folder"', ') or "folder"', "flags save_has_a_default"),
        ('(name == "auto" and torch.cuda.is_available())', "False", "flags auto_takes_a_gpu"),
        ("if options[name] and math.log(options[name]) +", "if False and math.log(options[name]) +", "damage last_drop"),
        ('stored = {**stored, "holdout": 0, "dataset_name": None}', 'stored = {**stored, "dataset_name": None}', "flags TestOtherImages"),
        ('if others and "holdout" in may_change:', "if others:", "flags TestOtherImages"),
    ],
    "report.py": [
        ('"loss/train": stats["train_loss"],', '"loss/train": stats["test_loss"],', "run TestTensorBoard"),
        ('add_scalar(tag, value, stats["epoch"])', 'add_scalar(tag, value, stats["epoch"] - 1)', "run TestTensorBoard"),
        ("finished + 1 if finished else 0", "finished if finished else 0", "resume each_epoch_once"),
        (".asin()).rad2deg().mean()", ".asin()).mean()", "run TestProbe"),
        ('"omega"] * orthogonality_gradient(y)', '"omega"] * 0', "run TestProbe"),
        ("(gram.sum() - gram.trace())", "gram.sum()", "run TestProbe"),
        ("total[1] += p.numel()", "total[1] = p.numel()", "flags start_names"),
        ("get_total_flops() // 2", "get_total_flops()", "flags TestSummary"),
        ("cosines.max()", "cosines.mean()", "authors summary"),
        ("(steps - self.done) * self.batch_size", "steps * self.batch_size", "run speed"),
        ("len(classes) > 5", "len(classes) >= 5", "run top5"),
        ("len(self.NAMES), device=device)", "len(self.NAMES))", "dry never_waits"),
        ("if not (its_thread and issubclass(args.exc_type, OSError)):", "if False:", "run other_threads"),
        ('if state["sums"].shape != self.sums.shape:', "if False:", "damage each_part"),
    ],
    "utils.py": [
        ('open(temporary, "wb")', 'open(path, "wb")', "run TestInterruptedWrite"),
        ("            os.fsync(file.fileno())\n        os.replace", "            pass\n        os.replace", "run TestInterruptedWrite"),
        ("os.fsync(directory)", "pass", "run TestInterruptedWrite"),
        ("fcntl.LOCK_EX | fcntl.LOCK_NB", "fcntl.LOCK_SH | fcntl.LOCK_NB", "flags second_writer"),
        ('lines = "".join(map(_log_line, history))', 'lines = ""', "resume more_epochs"),
        ('torch.set_rng_state(states["cpu"])', "pass", "resume stopped_run_ends"),
        ("return 128 + self.signal if", "return self.signal if", "resume signal"),
        ("signal.signal(number, signal.SIG_DFL)", "pass", "resume asked_twice"),
        ("if there and not own and is_ours(save, there):", "if False:", "flags not_overwritten or into_another_run"),
        ("if there and not (is_ours(save, there) and", "if False and (", "authors never_written or left_alone"),
        ("or logged <= 1)", "or logged >= 0)", "flags lost_its_checkpoint"),
        ('warnings.filterwarnings("ignore", message="TensorFloat32', 'warnings.filterwarnings("default", message="TensorFloat32', "run compiled_model"),
        ("cudnn.deterministic = True", "cudnn.deterministic = False", "run repeats"),
        ('"--dirty", ', "", "run told_from_the_commit"),
        ("return 128 + signal.SIGPIPE", "return 1", "flags broken_pipe"),
        ("if distributed.size() == 1:\n            signal", "if True:\n            signal", "ranks more_than_once"),
        ("if distributed.first_to_say(sentence):", "if True:", "ranks answered_once"),
        ('if distributed.first_to_say("failed"):\n            print', "if True:\n            print", "ranks before_training_is_said_once"),
        ('        distributed.first_to_say("failed")\n        with suppress', "        with suppress", "ranks before_training_is_said_once"),
        ("with suppress(OSError):  # what a", "if True:  # what a", "ranks reader_that_left"),
        (' or has.get("avx512_bf16")', "", "run no_note_where"),
        ('has.get("amx_bf16") or ', "", "run no_note_where"),
        ('has.get("architecture") == "x86_64" and ', "", "run no_note_where"),
        ("cudnn.deterministic, cudnn.allow_tf32 = before", "pass", "resume leaves_everything"),
        ("signal.signal(number, handler or signal.SIG_DFL)", "pass", "resume leaves_everything"),
        ("if threading.current_thread() is threading.main_thread():", "if True:", "resume in_a_thread"),
        ("                if not by_nohup:\n", "                if True:\n", "resume nohup"),
        ('log.read_bytes() != "".join(map(_log_line, history)).encode()', "False", "damage config_or_log"),
        ('if dtype == "bfloat16" and device.type == "cpu":', 'if dtype == "bfloat16":', "run no_note_where"),
        ('if str(save) != os.fsencode(save).decode(errors="replace"):', "if False:", "flags tensorboard_cannot_write"),
    ],
    "checkpoint.py": [
        ('if name == "step" and steps and not value == steps:', "if False:", "damage optimizers_state"),
        ('if name != "momentum_buffer" and not (value >= 0).all():', "if False:", "damage optimizers_state"),
        ("old.get(name, group.get(name)) != group.get(name)", "False", "damage optimizers_state"),
        ("weights_only=True", "weights_only=False", "flags run_code"),
        ("if damaged := archive.testzip():", "if False:", "damage flipped"),
        ("if value.shape != shapes.get(name) or", "if", "damage optimizers_state"),
        ('[group.get("params") for group in stored["param_groups"]] != [group["params"] for group in groups]', "False", "damage optimizers_state"),
        ('{"state": states, "param_groups": groups}', "stored", "damage rates_are"),
        ("os.link(path, previous)", "pass", "damage before_a_damaged"),
        ("has_state and not state and (steps or any(states.values()))", "False", "damage optimizers_state"),
        ("        if name in state and not holds(is_right, state[name]):", "        if False:", "damage each_part"),
        ('if state["epoch"] != len(state["history"]):', "if False:", "damage each_part"),
        ("== list(range(1, len(value) + 1))", "is not None", "damage each_part"),
        ("value.dtype == torch.float64 and all(map(is_amount, value.tolist()))", "value.dtype == torch.float64", "damage each_part"),
    ],
    "benchmarks/train_throughput.py": [
        ('"share_of_product": 3 * 2 *', '"share_of_product": 2 *', "benchmarks figures_of_a_turn"),
        ("self.t.options.batch_size / step", "1 / step", "benchmarks figures_of_a_turn"),
        ("- started) / len(waits)", "- started)", "benchmarks figures_of_a_turn"),
        ('_between("before", "after")', '_between("start", "after")', "benchmarks figures_of_a_turn"),
        ("mean(waits)", "sum(waits)", "benchmarks figures_of_a_turn"),
        ("moments.clear()", "pass", "benchmarks figures_of_a_turn"),
        ("2 * size**3", "size**3", "benchmarks rate_of_a_product"),
        ("* repeats / passed", "/ passed", "benchmarks rate_of_a_product"),
        ("median(b / a for", "median(a / b for", "benchmarks given_figures"),
        ("of its rate, %\", 100", "of its rate, %\", 1", "benchmarks given_figures"),
        ("TFLOP/s\", 1e-12", "TFLOP/s\", 1e-9", "benchmarks given_figures"),
        ("for figures in (ours, plain)]", "for figures in (plain, ours)]", "benchmarks given_figures"),
        ("parser.error(str(error))", "raise", "benchmarks one_sentence"),
    ],
    "benchmarks/peers.py": [
        ("u * length.atan() if", "u * length if", "peers closed_form"),
        ("go.unit(y + d)[0] if", "go.exp_map(y, d) if", "peers closed_form"),
        ('if "untransported" not in group["changes"]:', "if True:", "peers closed_form"),
        ("d = go.project(y, tau)", "d = tau", "peers closed_form"),
        ('if group["grad_clip"] is None', "if True", "peers closed_form"),
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
        ("except utils.UserError", "except KeyError", "benchmarks other_images"),
    ],
    "distributed.py": [
        ("if asked := [code for code in codes if code > 128]:", "if asked := []:", "ranks tells_a_stop"),
        ("redirect_stdout(nowhere):", "open(os.devnull):", "ranks summary_and"),
        ("return [mine]\n    gathered", "return [mine]\n    return [mine] * size()\n    gathered", "ranks whole_batch[SGDG]"),
        ("[error, *values(portable(error))]", "[error]", "ranks fails_on_one_rank"),
        ("values(portable(error))", "values(error)", "ranks pickle_cannot"),
        ("[error, *values(portable(error))]", "values(portable(error))", "ranks pickle_cannot"),
        ("pickle.loads(pickle.dumps(error))", "pickle.dumps(error)", "ranks pickle_cannot"),
        ("outcome = [(value, portable(error))]", "outcome = [(value, error)]", "ranks pickle_cannot"),
        ("dist.ReduceOp.MAX", "dist.ReduceOp.MIN", "ranks stopped_after_any_step and SGD-2"),
        ('return f"{lost}: continue with --resume"', "return None", "ranks dies_ends"),
        ('isinstance(error, dist.DistNetworkError) or any', "isinstance(error, dist.DistError) or any", "ranks error_of_the_connection"),
        ("return 128 - code", "return 1", "ranks who_died"),
        ("by_signal[0] if by_signal else error.get_first", "error.get_first", "ranks who_died"),
        ("if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:", "if True:", "ranks ngpu_starts"),
        ('"RANK" in os.environ and ', "", "ranks no_launch"),
        ("except (Exception, SystemExit) as", "except Exception as", "ranks help"),
        ("os.getppid() != _launcher", "os.getppid() == 0", "ranks lose_their"),
        ("self.optim.load_state_dict(self.optim.state_dict())", "pass", "dry second_process and AdamG"),
        ("logging.disable()  #", "pass  #", "ranks ngpu_starts"),
    ],
    "data.py": [
        ("std=(255.0, 255.0, 255.0),\n        flip=False", "std=(255.0, 255.0, 255.0),\n        flip=True", "data TestSvhn"),
        ("classes, mean, std, flip=False", "classes, mean, std, flip=True", "data TestDigits"),
        ("(125.3, 123.0, 113.9)", "(123.0, 125.3, 113.9)", STARTED),
        ("random_state=0", "random_state=1", "data TestDigits"),
        ("cv2.INTER_AREA if shrinking else cv2.INTER_LINEAR", "cv2.INTER_LINEAR", "folder averaged"),
        ("fcntl.flock(file, fcntl.LOCK_EX)", "fcntl.flock(file, fcntl.LOCK_SH)", "data download_is_alone"),
        ("socket.setdefaulttimeout(DOWNLOAD_TIMEOUT)", "pass", "data download_is_alone"),
        ("offsets[:, 0], offsets[:, 1]]", "offsets[:, 0], offsets[:, 0]]", "data naive_reference"),
        ("generator.integers(0, 2 * pad + 1, (*shape, 2))", "generator.integers(0, 2 * pad + 1, (*shape, 1)).repeat(2, 2)", "data cover_their_range"),
        ("cv2.BORDER_REFLECT_101", "cv2.BORDER_REFLECT", "data edge"),
        ("cv2.cvtColor(image, cv2.COLOR_BGR2RGB)", "image", "folder as_rgb"),
        ("if damage := DAMAGE.search(", "if damage := re.search('^$', ", "folder damaged_image"),
        (r"(\[ERROR:|Corrupt JPEG|", r"(\[ERROR:|", "folder damaged_image"),
        ("os.dup2(file.fileno(), 2)", "pass", "folder damaged_image"),
        ("not stat.S_ISREG(path.stat().st_mode)", "not path.stat()", "folder never_opened and device"),
        ("0 < values.max() < 4096", "values.max() > 65535", "folder would_be_black"),
        ("(str(path.parent), path.name)", "path", "folder by_torchvision"),
        ('evaluation and not (root / "train").exists()', "evaluation", "folder test_part_is_enough"),
        ("else passed_over).append(path)", "else []).append(path)", "folder passed_over"),
        ("tuple(map(printable, classes))", "classes", "folder any_name"),
        ("SeedSequence(seed, spawn_key=(epoch,))", "SeedSequence(seed + epoch)", "data another_seed_or_epoch"),
        ("range(0, len(labels), batch_size)", "range(0, len(labels) - batch_size + 1, batch_size)", "data eval_batches"),
        ("np.random.default_rng(0).permutation(total)", "np.random.default_rng(1).permutation(total)", "data TestHoldOut"),
        ("spawn_key=(epoch,)", "spawn_key=(epoch // 2,)", "data another_seed_or_epoch"),
    ],
    "resnet.py": [
        ("stride = 2 if i > 0 and j == 0 else 1", "stride = 2 if j == 0 else 1", "resnet shapes"),
        ("nn.Conv2d(in_width, width, 1, stride, bias=False)", "nn.Conv2d(in_width, width, 1, stride)", GROUPS),
        ("z = relu(self.bn1(self.conv0(o)), inplace=True)", "z = self.bn1(self.conv0(o))", "resnet computes"),
        ("self.convdim(o))", "self.convdim(x))", "resnet computes"),
        ("self.dropout, self.training)", "self.dropout, True)", "resnet computes"),
        ('mode="fan_in"', 'mode="fan_out"', "resnet he_normal"),
    ],
    "vgg.py": [
        ("nn.MaxPool2d(2)", "nn.AvgPool2d(2)", "vgg computes"),
        ("torch.ones_like(bn.weight", "2 * torch.ones_like(bn.weight", "vgg computes"),
        ("nn.ReLU(inplace=True)", "nn.Identity()", "vgg computes"),
        ("nn.Dropout(dropout)", "nn.Dropout2d(dropout)", "vgg behind_the_pools"),
    ],
    "grassmann_optimizer.py": [
        ("    gram.diagonal(dim1=-2, dim2=-1).sub_(1)\n    return 2 * gram @ y", "    return 2 * (gram @ y - y)", "operators small_part"),
        ("        gram.diagonal(dim1=-2, dim2=-1).sub_(1)\n        for i", "        for i", "operators small_part"),
        ("y * angle.sin() + u * (2 * (angle / 2).sin() ** 2)", "y * angle.sin() + u * (1 - angle.cos())", "operators small_turn"),
        ("for _ in range(2):", "for _ in range(1):", "operators nearly_along"),
        ("(1 - beta2) * (h * h).sum(-1, keepdim=True)", "(1 - beta2) * (g * g).sum(-1, keepdim=True)", "optimizer is_the_update_rule"),
        ("parallel_translate(m, y, d), v", "m, v", "optimizer is_the_update_rule"),
        ("h_norm.mul_(shorten)", "h_norm.mul_(1)", "fast blocks_is_the_rule"),
        ("(v_ + epsilon).sqrt_()", "(v_.sqrt() + epsilon)", "paper adamg"),
        ("(along.abs_() > _CANCELLED * h_norm).any()", "False", "fast nearly_along"),
        ("high.item() < _LONG and low.item() >= least", "True", "fast huge_and_tiny or any_length"),
        ("return y, -g if maximize else g, m", "return y, g, m", "pytorch maximize"),
        ('"nesterov": momentum > 0}', '"nesterov": False}', WRN),
        ("return p.shape[0] < p.shape[1:].numel()", "return p.shape[0] <= p.shape[1:].numel()", "optimizer groups_by"),
        ("_write_rows(weight, weight, torch.where(kept, rows, y))", "pass", "optimizer groups_by"),
        ('groups["bn_bias" if p.ndim < 2 else "other"]', 'groups["bn_bias" if "bias" in name else "other"]', GROUPS),
        ('{**grassmann, "omega": 0.0}', '{**grassmann, "omega": omega}', "invariance groups_by_measurement"),
        ("if p.dtype in _LOW_PRECISION else p.dtype", "if False else p.dtype", "pytorch narrow_parameters"),
        ('"meta" else device.type, enabled=False)', '"meta" else device.type, enabled=True)', "fast autocast"),
        ("        h = h - tl.sum(y * h, 0) * y\n", "", "fast nearly_along"),
        ("value.to(p.device, torch.float32, copy=True)", 'value.to("cpu", torch.float32, copy=True)', "dry goes_on"),
        ("torch.zeros((), dtype=torch.float32, device=p.device)", "torch.zeros((), dtype=torch.float32)", "dry never_waits"),
        ("torch.zeros((), dtype=torch.float32, device=p.device)", "torch.zeros((), device=p.device)", "odd counter"),
        ("dtype=_arithmetic(p), device=p.device)", "dtype=_arithmetic(p))", "dry never_waits"),
        ("torch.full((), lr, **like)", "torch.tensor(lr, **like)", "dry never_waits"),
        ("[t.to(device, non_blocking=True) for t in host]", "[t.to(device) for t in host]", "dry never_waits"),
        ("return fits and p.device.type == _KERNEL_DEVICE", "return False", "dry never_waits"),
        ("return p.is_cuda and p", "return False and p", "dry never_waits"),
        ("lr = lr.to(params[0].device, torch.float32, non_blocking=True) if", "lr = lr if", "dry in_blocks"),
        ("if not _is_readable(x):", "if False:", "dry in_blocks"),
        ("if not _is_readable(h) or (along", "if (along", "dry in_blocks"),
        ("if not _is_readable(y) or inverse", "if inverse", "dry in_blocks"),
        ('if state["momentum_buffer"].shape != p.shape:', "if False:", "odd another_shape"),
        ('and group["lr"] == 0', "and False", "odd rate_of_0"),
        ('turned &= "second_moment" not in self.state[p]', "turned &= True", "odd rate_of_0"),
        ("sin = torch.where(zero, angle.sign(), sin)", "pass", "odd zero_row"),
        ("tl.where(starts, tl.where(angle < 0, -1.0, 1.0), sin)", "sin", "odd zero_row"),
        ("self._has_warned = True", "pass", "odd plain_sgd"),
        ('_refuse(f"{_NO_ROWS}, without which nothing obeys", given)', "pass", "odd plain_sgd"),
        ('(key, name) == ("eps", "epsilon")', "False", "odd eps"),
        ("(length - 1).abs() <= 16", "(length - 1).abs() <= -1", "odd made_again"),
        ("not p.is_meta and p.numel()]", "False]", "odd zero_weight"),
        ("torch.autocast(device, enabled=False)", "torch.autocast(device, enabled=True)", "odd in_float32"),
        ("model if model.training else model.train()", "model.train()", "odd frozen"),
        ("part.is_shard(0)", "part.is_shard()", "frameworks two_processes"),
        ("return torch.addmm(g, gram, whole, alpha=2 * omega)", "return g", "frameworks two_processes"),
        ('given["state"].items() if state is not None', 'given["state"].items()', "frameworks two_processes"),
        ("for n, p in weights.items() if _is_sharded(p) and not p.is_meta]", "for n, p in ()]", "frameworks two_processes"),
    ],
    "scripts/summarize.py": [
        ("self.errors = [run.errors[-1] for run in self.runs]", "self.errors = [min(run.errors) for run in self.runs]", "tables median_of_its_seeds"),
        ('"test_error": median(errors) if', '"test_error": sum(errors) / len(errors) if', "tables median_of_its_seeds"),
        ("self.runs = [run for run in all_runs if run.finished]", "self.runs = [run for run in all_runs if run.losses]", "tables named_but_not_counted"),
        ('NO_RESULT = ("seed", ', 'NO_RESULT = ("seed", "dropout", ', "tables never_in_one_cell"),
        ('for key in ("weights_from", "processes") if', 'for key in ("processes",) if', "tables never_in_one_cell"),
        ('for key in ("weights_from", "processes") if', 'for key in ("weights_from",) if', "tables never_in_one_cell"),
        ('endswith("CPU") else "TF32"', 'endswith("CPU") else "float32"', "tables never_in_one_cell"),
        ('"select": "shape", "sync_bn": False}', '"sync_bn": False}', "tables before_an_option"),
        ('"select": "shape", "sync_bn": False}', '"select": "measured", "sync_bn": False}', "tables before_an_option"),
        ('data, options = config["data"], OLDER | config["options"]', 'data, options = config["data"], config["options"] | OLDER', "tables never_in_one_cell"),
        ("max(all_runs, key=", "min(all_runs, key=", "tables named_but_not_counted"),
        ("split(\"\\n\")[:-1]", "split(\"\\n\")", "tables being_written"),
        ("by_seed.setdefault(run.seed, run)", "by_seed.setdefault(run.path, run)", "tables seed_counts_once"),
        ("run.setting, not run.finished)", "run.setting, run.finished)", "tables seed_counts_once"),
        ("path.parts[:-1] if", "path.parts if", "tables experiment_is"),
        (" if not re.fullmatch(r\"seed\\d+\", part)", "", "tables experiment_is"),
        ("most_common(1)", "most_common()[-1:]", "tables options_are_named"),
        ("if text != usual[name])", ")", "tables options_are_named"),
        ("key=lambda cell: median(cell.errors))", "key=lambda cell: -median(cell.errors))", "tables held_out"),
        ("self.holdout > 0, self.data", "False, self.data", "tables held_out"),
        ("not paper or paper.images != self.images", "not paper", "tables where_it_may; tables nothing_else"),
        ("(paper.epochs, paper.epoch_step) == (self.epochs, self.drops)", "paper.epochs == self.epochs", "tables where_it_may"),
        ("(paper.epochs, paper.epoch_step) == (self.epochs, self.drops)", "paper.epoch_step == self.drops", "tables where_it_may"),
        ('f"{median(cell.errors) - paper:+.2f}"', 'f"{paper - median(cell.errors):+.2f}"', "tables where_it_may"),
        ("[start:end][-3:]", "[start:end][-1:]", "tables at_a_phases_end"),
        ("run.losses[start:end]", "run.losses[:end]", "tables at_a_phases_end"),
        ("if drop < self.epochs), self.epochs]", "), self.epochs]", "tables few_epochs"),
        ("run.ends[:-1], run.curves", "run.drops, run.curves", "tables few_epochs"),
        ("textwrap.wrap(text, 80", "textwrap.wrap(text, 81", "tables 80_columns"),
        ('text[heads[-1]].split(" (")[0]', "text[heads[-1]]", "tables 80_columns"),
        ('"epoch" if self.epochs == 1 else "epochs"', '"epochs"', "tables 80_columns"),
        ('f"{value:.6g}"', 'f"{value:.6f}"', "tables csv_has"),
        ('startswith(("=", "+", "-", "@"))', 'startswith(("=", "+", "-"))', "tables csv_has"),
        ("elif str(value).startswith", "elif value is not None and False and str(value).startswith", "tables csv_has"),
        ("page.count(BEGIN), page.count(END), rest.count(END)] != [1, 1, 1]", "page.count(BEGIN), page.count(END)] != [1, 1]", "tables two_markers"),
        ("page.count(BEGIN), page.count(END), rest.count(END)] != [1, 1, 1]", "rest.count(END)] != [1]", "tables two_markers"),
        ('{END}{after}"', "{END}\\n\"", "tables two_markers"),
        ("write_whole(path.resolve(), lambda file: file.write(content))", "path.write_bytes(content)", "tables written_whole"),
        ("`*\\[\\]<>|&~$]", "`*\\[\\]<>&~$]", "tables names_break"),
        ("c if c.isprintable() else", "c if c.isprintable() or c == \"\\x1b\" else", "tables names_break"),
        ("except Exception as error:  # whatever is in a file", "except (ValueError, KeyError) as error:  # whatever is in a file", "tables odd_run"),
        (" or len(lines) > self.epochs", "", "tables odd_run"),
        ("if not math.isfinite(value):", "if False:", "tables odd_run"),
        ('100 - number(line["test_acc"])', '100 - line["test_acc"]', "tables odd_run"),
        ('[line["epoch"] for line in lines] != list(range(1, len(lines) + 1)) or', "", "tables odd_run"),
        (' if name != "published")', ")", "tables published_runs"),
        ("[Cell(runs, usual[runs[0].method]) for runs in cells]", "[[Cell(r, usual[r[0].method]) for r in cells][i] for i in range(len(cells))]", "tables times_the_work"),
        ("if path.resolve() in seen", "if path in seen", "tables behind_links"),
        (", followlinks=True", "", "tables behind_links"),
        ("1 - 0.8 * index", "1 - 0 * index", "tables told_apart"),
        ("run.errors[run.epochs // 5 :]", "run.errors", "tables fifth"),
        ("MaxNLocator(integer=True, min_n_ticks=1)", "MaxNLocator()", "tables few_epochs"),
        ('marker = "o" if', "marker = None if", "tables few_epochs"),
        ("if p[0] <= self.epochs]", "]", "tables stand_behind_ours"),
        ('run.curves if quantity == "losses" else {}', "run.curves", "tables stand_behind_ours"),
        ("elif method in panel.curves and cells:", "elif method in panel.curves:", "tables stand_behind_ours"),
        ('axis.yaxis.set_major_formatter("{x:g}")', "pass", "tables and_their_median"),
        ("for at in zip(*(getattr(run, quantity) for run in cell.runs), strict=True)]", "for at in zip(*(getattr(run, quantity) for run in cell.all_runs), strict=False)]", "tables and_their_median"),
        ("signal.signal(signal.SIGPIPE, signal.SIG_DFL)", "pass", "tables leaves_early"),
        ("sharey=shared", "sharey=False", "tables side_by_side"),
        ("for cell in group}) > 1]", "for cell in group}) > 0]", "tables side_by_side"),
        ('"text.parse_math": False, ', "", "tables side_by_side"),
        ("names[stem] += 1", "names[stem] = 1", "tables file_of_its_own"),
        ("[:100].strip", ".strip", "tables file_of_its_own"),
        ("(), drops[data], of)", "(), (), of)", "tables curves_alone"),
        ("    matplotlib.rcdefaults()\n", "", "tables matplotlibrc"),
        ('os.environ["MPLBACKEND"] = "Agg"', 'os.environ.setdefault("MPLBACKEND", "Agg")', "tables matplotlibrc"),
    ],
    "scripts/sweep.py": [
        ("return logged == epochs and not older", "return logged >= epochs and not older", "sweeps finished_is"),
        ("return logged == epochs and not older", "return logged == epochs", "sweeps finished_is"),
        ("if flags or d not in done", "if d not in done", "sweeps judges_finished"),
        ("if flags or d not in done", "", "sweeps finished_runs"),
        ('r"\\d+$|(GPU|MIG)-"', '""', "sweeps cuda_sees"),
        ("gpus[i % len(gpus)]", "gpus[0]", "sweeps gpus_by_turns"),
        ("// jobs))", "))", "sweeps gpus_by_turns"),
        ('"start_new_session": True', '"start_new_session": False', "sweeps asks_each_run_once"),
        ("signal.SIGTERM if len(self.signals) == 1 else signal.SIGKILL", "signal.SIGKILL", "sweeps asks_each_run_once"),
        ("if self.signals and number == signal.SIGHUP:", "if False:", "sweeps asks_each_run_once"),
        ("if signal.getsignal(number) != signal.SIG_IGN:", "if True:", "sweeps asks_each_run_once"),
        ("                if self.signals:\n", "                if False:\n", "sweeps asks_each_run_once"),
        ('output.read_text(errors="replace")', "output.read_text()", "sweeps failure"),
        ("|epoch_step", "", "sweeps mistake"),
        ("|resume)", ")", "sweeps mistake"),
        ("+ 0.5)", ")", "sweeps drops"),
        ("product(seeds, datasets, models, methods)", "sorted(product(seeds, datasets, models, methods), key=lambda c: c[1:])", "sweeps seed_by_seed"),
        ("''.join(given)", "''", "sweeps goes_on_later"),
        ("128 + runs.signals[0] if runs.signals else ", "", "sweeps goes_on_later"),
    ],
    "pyproject.toml": [
        ('torch>=2.11', 'torch>=2.12', "package metadata"),
        ('"grassmann_optimizer.__version__"', '"options.VERSION"', "package metadata"),
        ('py-modules = ["grassmann_optimizer"]', 'py-modules = ["grassmann_optimizer", "main"]', "package module"),
    ],
    "MANIFEST.in": [("prune tests", "", "package module")],
    "tests/conftest.py": [('("pytest", "torch"', '("torch"', "setup one_sentence")],
    "scripts/setup.sh": [
        ("if [ -L .venv ] || ", "if ", "setup left_alone"),
        ("[ -e .venv ] && [ ! -e $mark ]", "false", "setup left_alone"),
        ("    touch $mark\n", "", "setup made_anew"),
        ("python3.{14..11}", "", "setup made_anew"),
        ("options=(--system-site-packages)", "options=()", "setup built_on"),
        ("sys.prefix != sys.base_prefix or not", "not", "setup built_on"),
        ("--no-index ", "", "setup tried_again"),
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
        ("args.target.mkdir(parents=True)", "args.target.mkdir(parents=True, exist_ok=True)", "subset left_alone"),
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
        ("held += event.nbytes()", "held += abs(event.nbytes())", "benchmarks peak_memory"),
        ("return time.perf_counter() - start", "return start - time.perf_counter()", "benchmarks to_their_names"),
        ("for step in variants.values()] for", "for step in reversed(variants.values())] for", "benchmarks to_their_names"),
        ("value / medians[SGD]", "medians[SGD] / value", "benchmarks given_times"),
        ("medians = {name: median(values)", "medians = {name: sum(values) / len(values)", "benchmarks given_times"),
        ("1e3 * min(times[name])", "1e3 * max(times[name])", "benchmarks given_times"),
        ("peaks[name] / 1e6", "peaks[name] / 1e3", "benchmarks given_times"),
        ("(medians[COPY] + medians[PRODUCTS])", "medians[PRODUCTS]", "benchmarks given_times"),
        ('["SGDG omega=0"] / medians[COPY]', '["SGDG omega=0"] / (2 * medians[COPY])', "benchmarks given_times"),
    ],
    "benchmarks/rates.py": [
        ("losses[-20:]", "losses", "benchmarks last_losses"),
        ("100 * wrong", "wrong", "benchmarks last_losses"),
        ("median(run['losses'])", "mean(run['losses'])", "benchmarks has_medians"),
        ("median(run['errors'])", "median(run['losses'])", "benchmarks has_medians"),
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
    for name in LINKED:
        (tree / name).parent.mkdir(exist_ok=True)
        (tree / name).symlink_to(ROOT / name)


def too_slow(*_args) -> None:
    """Ends the tests of a fault, at SIGALRM."""
    import_module("pytest").exit("too slow", returncode=TOO_SLOW)


def run_tests(fault: Fault) -> tuple[Fault, int, float, str]:
    """pytest's exit code for a copy with the fault, its seconds, and what it printed. In a process of its own."""
    started = time.monotonic()
    selections = [selection.partition(" ") for selection in fault.tests.split("; ")]
    files = sorted({FILES[name] for name, _, _ in selections})
    expression = " or ".join(f"({words})" for _, _, words in selections)
    with tempfile.TemporaryDirectory(prefix="mutants-") as folder:
        copy_files(Path(folder))
        if fault.file:
            Path(folder, fault.file).write_text(fault.source())
        with Path(folder, "output.txt").open("w+b") as output:
            for stream in (1, 2):
                os.dup2(output.fileno(), stream)
            os.chdir(folder)
            signal.signal(signal.SIGALRM, too_slow)
            signal.alarm(LIMIT)
            words = ["-x", "-q", "-p", "no:cacheprovider", "-m", "not long"]
            code = int(import_module("pytest").main([*words, *files, "-k", expression]))
            sys.stdout.flush()
            output.seek(0)
            text = output.read().decode(errors="replace")
    return fault, code, time.monotonic() - started, text


def is_caught(fault: Fault, code: int, seconds: float, text: str) -> bool:
    """Whether a test failed, by itself; says so, and what went wrong if pytest could not run them."""
    verdict = VERDICTS.get(code, f"pytest: {code}")
    verdict = "error" if code == 1 and "\nFAILED " not in text else verdict  # of a fixture
    print(f"{verdict:9}{seconds:4.0f}s {fault}"[:80], flush=True)
    if code > 1:
        print(text[-2000:])
    return verdict == "caught"


def main(words: list[str]) -> int:
    """Try the faults that the words name, or all; the exit code."""
    faults = all_faults()
    for fault in faults:
        fault.source()
    if words:
        faults = [f for f in faults if any(w == str(f.number) or w in f.text for w in words)]
    for name in SLOW_IMPORTS:
        import_module(name)
    jobs = int(os.environ.get("JOBS", 2))
    with multiprocessing.get_context("fork").Pool(jobs, maxtasksperchild=1) as pool:
        every = sorted({selection for fault in faults for selection in fault.tests.split("; ")})
        by_file = groupby(every, key=lambda selection: selection.partition(" ")[0])
        whole = [Fault(0, "", "", "", "; ".join(selections)) for _, selections in by_file]
        for _, code, _, text in pool.imap_unordered(run_tests, whole):
            if code != 0:
                print(text[-3000:], "these tests must pass without a fault", sep="\n")
                return 1
        results = pool.imap(run_tests, faults)  # TimeoutError below: a fault has killed its process
        caught = [is_caught(*results.next(4 * LIMIT)) for _ in faults]
    print(f"{sum(caught)} of {len(faults)} faults are caught")
    return 0 if faults and all(caught) else 1


if __name__ == "__main__":
    os.environ |= {"OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    os.environ |= {"CUDA_VISIBLE_DEVICES": "", "TRITON_INTERPRET": "1"}  # CUDA does not survive a fork
    sys.dont_write_bytecode = True
    sys.exit(main(sys.argv[1:]))
