"""The CUDA paths on a machine without a GPU: fake tensors, which have a device and a shape but no values.

They find tensors that meet on different devices, and every place where the host waits for the device. What
has no fake form is replaced by stand-ins that check the devices: backward, the kernel's launch, fused SGD,
pinned memory, the generator. All else is the real code.
"""

import contextlib
import sys
from collections import Counter, defaultdict
from pathlib import Path

import pytest
import torch
from helpers import METHODS, ROOT
from torch import distributed as dist
from torch import nn
from torch._subclasses import fake_tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

import checkpoint
import distributed
import grassmann_optimizer as go
import main
from data import TrainBatches, load_data
from grassmann_optimizer import SGDG, AdamG
from options import parse_options
from utils import StopRequest

STEPS = 12  # of an epoch: after every second one its sums are read
CONSTRUCTION = {"Training.__init__", "Reads.move"}  # the weights and constants go to the device
EACH = pytest.mark.parametrize("method", METHODS)
aten = torch.ops.aten


class Reads(TorchDispatchMode):
    """Notes each place of the program that waits for the device, and answers with 0 or True.

    Counts besides how often the stand-ins for the kernel, fused SGD and pinned memory are used.
    """

    ITEM = (aten.item.default, aten._local_scalar_dense.default, aten.is_nonzero.default)
    COPY = (aten._to_copy.default, aten.copy_.default)

    def __init__(self):
        super().__init__()
        self.places: list[str] = []  # qualified names of functions, one for each wait
        self.used: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in self.ITEM and isinstance(args[0], FakeTensor):
            if args[0].device.type == "cuda":
                self.note()
            return args[0].dtype == torch.bool
        if func == aten.index.Tensor and any(i is not None and i.dtype == torch.bool for i in args[1]):
            self.note()  # for how many are chosen: here all
            return args[0]
        result = func(*args, **kwargs)
        if func in self.COPY:
            source = args[1] if func == aten.copy_.default else args[0]
            waits = result.device.type == "cpu" or not (kwargs.get("non_blocking") or True in args[2:])
            if waits and source.device != result.device:
                self.note()
        return result

    def note(self):
        frame = sys._getframe(2)
        while Path(frame.f_code.co_filename).parent not in (ROOT, Path(__file__).parent):
            frame = frame.f_back
        self.places.append(frame.f_code.co_qualname)

    def since(self) -> set[str]:
        """The places since the last call."""
        places, self.places = set(self.places), []
        return places

    def launch(self, y, g, m, v, rates, layer, n, *numbers, **constants):
        """In place of the optimizers' kernel."""
        assert on_device(y, g, m, rates)
        assert v is None or on_device(v)
        assert (y.shape, y.dtype, rates.dtype) == ((len(y), n), torch.float32, torch.float32)
        assert layer < len(rates)
        assert not any(isinstance(value, torch.Tensor) for value in (*numbers, *constants.values()))
        self.used["kernel"] += 1

    def fused_sgd(self, *lists, **options):
        assert on_device(lists, options)
        self.used["fused SGD"] += 1

    def pin(self, tensor):
        self.used["pinned"] += 1
        return tensor

    def move(self, model, device, memory_format=torch.preserve_format):
        """In place of nn.Module.to, which would swap the fake tensors for others and cannot."""
        self.model = model
        for part in model.modules():
            for name, p in part._parameters.items():
                if p is not None:
                    stored = {"memory_format": memory_format} if p.ndim == 4 else {}
                    part._parameters[name] = nn.Parameter(p.detach().to(device, **stored))
            for name, buffer in part._buffers.items():
                part._buffers[name] = buffer.to(device)
        return model

    def grad(self, loss, params, allow_unused=True):
        assert on_device(loss)
        assert (loss.shape, loss.requires_grad) == ((), True)
        return [torch.empty_like(p) for p in params]

    def backward(self, loss):
        params = list(self.model.parameters())
        for p, gradient in zip(params, self.grad(loss, params), strict=True):
            p.grad = gradient


def on_device(*values) -> bool:
    tensors = [value for value in tree_leaves(values) if isinstance(value, torch.Tensor)]
    return bool(tensors) and all(t.device.type == "cuda" for t in tensors)


def on_host(state, *device):
    """In place of setting a generator, also a GPU's: its state is the host's."""
    assert (state.device.type, state.dtype) == ("cpu", torch.uint8)


@pytest.fixture
def reads(monkeypatch):
    """A GPU of fake tensors, for the duration of the test."""
    # Autograd counts the devices once. With fake ones it would start threads, and no later test could fork.
    torch.zeros((), requires_grad=True).backward()
    # Whether there is a real GPU, which fake tensors ask, before the answer becomes yes.
    monkeypatch.setattr(FakeTensorMode, "avoid_device_init", not torch.cuda.is_available())
    monkeypatch.setattr(fake_tensor, "init_gpu_context", lambda device: None)
    for name, value in {
        "is_available": True, "device_count": 1, "is_bf16_supported": True,
        "is_current_stream_capturing": False, "get_rng_state": torch.zeros(16, dtype=torch.uint8),
        "get_device_name": "a GPU", "get_device_capability": (9, 0), "device_of": contextlib.nullcontext(),
    }.items():  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, lambda *args, value=value, **kwargs: value)
    reads = Reads()
    monkeypatch.setattr(go, "_KERNEL_DEVICE", "cuda")
    monkeypatch.setattr(go, "_advance_kernel", defaultdict(lambda: reads.launch), raising=False)
    monkeypatch.setattr(go, "_WITHOUT_KERNEL", set())
    monkeypatch.setattr(torch, "_fused_sgd_", reads.fused_sgd)
    monkeypatch.setattr(nn.Module, "to", lambda model, *args, **kwargs: reads.move(model, *args, **kwargs))
    monkeypatch.setattr(torch.autograd, "grad", reads.grad)
    monkeypatch.setattr(torch.Tensor, "backward", lambda loss: reads.backward(loss))
    monkeypatch.setattr(torch, "set_rng_state", on_host)
    monkeypatch.setattr(torch.cuda, "set_rng_state", on_host)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: reads.pin(tensor))
    with FakeTensorMode(allow_non_fake_inputs=True), reads:
        yield reads


@pytest.fixture
def make(reads, tiny, tmp_path, images_root, monkeypatch):
    """make(method, *flags): a run on the fake GPU."""
    data = load_data("folder", images_root)
    run = ["--device", "cuda", "--batchSize", 4, "--nthread", 0]  # another thread has no fakes
    return lambda method, *flags: main.Training(parse_options(tiny(method, tmp_path, *run, *flags))[0], data)


def batches(t):
    return TrainBatches(t.data.train_images, t.data.train_labels, t.options.randomcrop_pad)


def step(t):
    """The last step of an epoch, without the reads of `train_epoch`; returns the type of the logits."""
    ((images, labels),) = batches(t).iterate(t.plan(), STEPS - 1, nthread=0)
    x, labels = t.inputs(images, labels)
    weights = [p for p in t.model.parameters() if p.ndim == 4]
    assert all(tensor.is_contiguous(memory_format=torch.channels_last) for tensor in [x, *weights])
    loss, logits = t.step(x, labels)
    t.count(loss, logits, labels)
    return logits.dtype


@pytest.mark.parametrize(
    ("model", "dtype"), [("resnet", "float32"), ("vgg11", "bfloat16"), ("resnet", "float16")]
)
@EACH
def test_a_step_in_channels_last_never_waits_for_the_device(reads, make, method, model, dtype):
    t = make(method, "--model", model, "--dtype", dtype)
    assert on_device(list(t.model.parameters()), list(t.model.buffers()), t.sums, t.probe.sums)
    reads.since()
    for t.probe.active in (True, False):
        assert step(t) == getattr(torch, dtype)
    # torch's scaler looks whether a gradient has overflowed.
    assert reads.since() == ({"Training.step"} if dtype == "float16" else set())
    # A launch for each of the 7 weights on G(1,n), and for each other group.
    assert reads.used == ({} if method == "SGD" else {"kernel": 14, "fused SGD": 4})


def test_an_epoch_waits_only_where_it_reads_its_sums(reads, make):
    t = make("SGDG")
    stop = StopRequest(None)
    reads.since()
    main.train_epoch(t, batches(t), None, stop)
    assert reads.used["pinned"] == 2 * STEPS
    assert Counter(reads.places)["Training.totals"] == 2 * (STEPS // 2 + 2)
    assert reads.since() == {"Training.totals", "Training.check_finite"}
    assert main.evaluate(t, stop) == (0, 0)
    assert reads.since() == {"evaluate"}
    list(main.test_logits(t))
    assert reads.since() == set()
    t.probe.read()
    assert reads.since() == {"GrassmannProbe.read"}
    t.totals()
    checkpoint.run_state(t)
    assert reads.since() == {"Training.totals", "run_state"}


@pytest.fixture
def second_of_two(monkeypatch):
    """A run's second process, without the first: what they send each other is what this one has."""
    dist.init_process_group("fake", rank=1, world_size=2, store=FakeStore())
    monkeypatch.setenv("LOCAL_RANK", "0")  # on a machine of its own
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")
    monkeypatch.setattr(distributed, "all_gather", lambda mine: [mine, mine])
    monkeypatch.setattr(distributed, "DistributedDataParallel", lambda model, **flags: model)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("flag", ["", "--zero", "--sync_bn"])
@EACH
def test_a_checkpoint_read_on_the_cpu_goes_on_on_the_device(reads, make, method, flag, request):
    """Alone, and as the second of two processes."""
    alone = make(method)
    step(alone)
    state = tree_map_only(torch.Tensor, lambda tensor: tensor.detach().cpu(), checkpoint.run_state(alone))
    if flag:
        state["other_ranks"] = [{"generators": state["generators"], "sums": state["sums"]}]
        request.getfixturevalue("second_of_two")
    elif method == "SGD":  # written on a machine without a GPU, it has no state of one's generator
        del state["generators"]["cuda"]
    t = make(method, *flag.split())
    checkpoint.restore(t, state)
    held = getattr(t.optimizer, "optim", t.optimizer).state  # with --zero of its share
    assert on_device(t.model.state_dict(), list(held.values()), t.sums, t.probe.sums)
    reads.since()
    list(main.test_logits(t))
    if flag == "--sync_bn":  # a step of it has no fake form
        assert sum(isinstance(part, nn.SyncBatchNorm) for part in t.model.modules()) == 7
    else:
        step(t)
        assert (len(held) < len(list(t.model.parameters()))) == (flag == "--zero")
    assert reads.since() == set()


@pytest.mark.parametrize("method", METHODS[1:])
def test_weights_are_measured_on_the_device(reads, make, method):
    t = make(method, "--model", "vgg11", "--select", "measured")
    assert reads.since() == {"_measure_cosine", *CONSTRUCTION}
    step(t)
    assert reads.since() == set()


@pytest.mark.parametrize("Optimizer", [SGDG, AdamG])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_steps_in_blocks_do_not_wait(reads, monkeypatch, Optimizer, dtype):
    """Rows too long for the kernel, or all where there is no Triton; narrow weights; a rate on the host."""
    p = nn.Parameter(torch.empty(3, go._LONGEST_ROW + 1, dtype=dtype, device="cuda"))
    q = nn.Parameter(torch.empty(3, 5, dtype=dtype, device="cuda").t())
    r = nn.Parameter(torch.empty(7, dtype=dtype, device="cuda"))
    for each in (p, q, r):
        each.grad = torch.empty_like(each)
    optimizer = Optimizer([p], lr=torch.tensor(0.1), momentum=0.9, grassmann=True, omega=0.1, grad_clip=0.1)
    optimizer.add_param_group({"params": [q], "grassmann": True, "omega": 0.0, "maximize": True})
    optimizer.add_param_group({"params": [r], "grassmann": False})
    for kernel in ("cuda", None):
        monkeypatch.setattr(go, "_KERNEL_DEVICE", kernel)
        reads.since()
        optimizer.step()
        assert reads.since() == set()
    assert on_device([list(state.values()) for state in optimizer.state.values()])
