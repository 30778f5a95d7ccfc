"""What is odd about other people's models is done right, or said in a sentence that names it."""

import copy
import subprocess
import sys

import pytest
import torch
from helpers import ROOT
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.functional import cross_entropy
from torch.nn.utils import parametrizations, prune

import grassmann_optimizer as go
from grassmann_optimizer import SGDG, AdamG, grassmann_param_groups, grassmann_weights, scale_invariance

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BOTH = pytest.mark.parametrize("Optimizer", [SGDG, AdamG])
ON_ROWS = {"grassmann": True, "lr": 0.2, "momentum": 0.9, "omega": 0.1, "grad_clip": 0.5}


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def take_steps(optimizer, count=1):
    for _ in range(count):
        for group in optimizer.param_groups:
            for p in group["params"]:
                p.grad = torch.randn(p.shape).to(p)
        optimizer.step()


def lengths(p):
    return p.detach().float().flatten(1).norm(dim=1)


@pytest.fixture
def default_dtype():
    yield torch.set_default_dtype
    torch.set_default_dtype(torch.float32)


# ----------------------------------------------------------------------------------------------------- steps


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_the_step_counter_counts_whatever_the_default_type(default_dtype, dtype):
    default_dtype(dtype)
    p = nn.Parameter(torch.randn(2, 5, dtype=torch.float32))
    optimizer = AdamG([p], **ON_ROWS)
    take_steps(optimizer, 300)  # bfloat16 counts to 256
    assert optimizer.state[p]["step"].dtype == torch.float32
    assert optimizer.state[p]["step"] == 300


@BOTH
@pytest.mark.parametrize("lr", [0.0, torch.tensor(0.0)])
def test_a_rate_of_0_moves_no_row_that_does_not_turn(Optimizer, lr):
    weights = [nn.Parameter(3 * torch.randn(4, 2, 3, 3)) for _ in range(2)]
    weights[1].data = weights[1].data.to(memory_format=torch.channels_last)
    optimizer = Optimizer(weights, **{**ON_ROWS, "lr": lr})
    before = copy.deepcopy(weights)
    take_steps(optimizer, 2)
    assert all(map(torch.equal, weights, before))
    optimizer.param_groups[0]["lr"] = 0.2
    take_steps(optimizer)
    torch.testing.assert_close(lengths(weights[0]), torch.ones(4))
    optimizer.param_groups[0]["lr"] = lr
    before = copy.deepcopy(weights)
    take_steps(optimizer)
    assert torch.equal(weights[0], before[0]) == (Optimizer is AdamG)  # SGD-G's momentum holds its rate


@BOTH
def test_what_momentum_does_after_a_drop_of_the_rate(Optimizer):
    """SGD-G's holds steps and goes on at the old rate; Adam-G's holds gradients and slows at once."""
    turned = []
    for ratio in (1, 0.2):
        torch.manual_seed(0)
        p = nn.Parameter(torch.randn(4, 18))
        optimizer = Optimizer([p], **ON_ROWS | {"lr": 1e-3, "omega": 0})
        take_steps(optimizer, 2)
        optimizer.param_groups[0]["lr"] *= ratio
        before = p.detach().clone()
        p.grad = torch.zeros_like(p)
        optimizer.step()
        turned.append((p - before).norm().item())
    assert turned[1] / turned[0] == pytest.approx(1 if Optimizer is SGDG else 0.2, rel=1e-3)


@BOTH
def test_a_state_of_another_shape_than_the_weights_is_refused(Optimizer):
    p, q = nn.Parameter(torch.randn(6, 8)), nn.Parameter(torch.randn(3, 8))
    optimizer = Optimizer([q, p], **{**ON_ROWS, "omega": 0})
    take_steps(optimizer, 2)
    p.data = p.data[:4]  # pruned
    before = copy.deepcopy([q, p])
    with pytest.raises(ValueError, match=r"\(4, 8\).*\(6, 8\)"):
        take_steps(optimizer)
    assert torch.equal(q, before[0])
    assert torch.equal(p, before[1])


@BOTH
def test_steps_of_tensors_without_values(Optimizer):
    def make(device):
        weights = [nn.Parameter(torch.randn(shape, device=device)) for shape in ((4, 2, 3, 3), (3, 20))]
        weights.append(nn.Parameter(torch.randn(3, 20, device=device, dtype=torch.bfloat16)))
        weights.append(nn.Parameter(torch.randn(20, 3, device=device, dtype=torch.float64).t()))
        optimizer = Optimizer(weights, **ON_ROWS)
        optimizer.add_param_group(
            {"params": [nn.Parameter(torch.ones(3, device=device))], "grassmann": False}
        )
        for _ in range(2):
            for group in optimizer.param_groups:
                for p in group["params"]:
                    p.grad = torch.empty_like(p)
            optimizer.step()
        return [(t.shape, t.dtype) for s in optimizer.state.values() for t in s.values()], optimizer

    real, _ = make("cpu")
    on_meta, optimizer = make("meta")
    assert all(t.is_meta for state in optimizer.state.values() for t in state.values())
    with FakeTensorMode():
        fake, _ = make("cpu")
    assert on_meta == fake == real
    state = optimizer.state[optimizer.param_groups[0]["params"][0]]
    if Optimizer is AdamG:  # a ZeroRedundancyOptimizer leaves it on the CPU
        state["step"] = torch.tensor(2.0)
        optimizer.step()
        assert state["step"].is_meta


# ---------------------------------------------------------------------------------------------------- groups


class Residual(nn.Module):
    """x + bn(conv(x)), the convolution behind another one with a batch normalization."""

    def __init__(self):
        super().__init__()
        self.first, self.bn = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.conv, self.last = nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.head = nn.Linear(8, 5)

    def forward(self, x):
        x = torch.relu(self.bn(self.first(x)))
        return self.head(torch.relu(x + self.last(self.conv(x))).mean((2, 3)))


def random_loss(model):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(16, 3, 6, 6, generator=generator).to(next(model.parameters()))
    return cross_entropy(model(x), torch.arange(16) % 5)


@pytest.mark.filterwarnings("ignore:.*weight_norm.*is deprecated")
@pytest.mark.parametrize(
    "change",
    [
        nn.utils.weight_norm,
        parametrizations.weight_norm,
        parametrizations.orthogonal,
        lambda conv: prune.l1_unstructured(conv, "weight", 0.5),
    ],
)
def test_a_weight_that_is_computed_is_named_as_left_out(change):
    model = Residual()
    change(model.conv)
    with pytest.warns(UserWarning, match=r"not on G\(1, n\).*conv\.weight"):
        chosen = grassmann_weights(model)
    assert list(chosen) == ["first.weight"]


@BOTH
def test_groups_made_again_change_nothing(Optimizer):
    model = Residual()
    optimizer = Optimizer(grassmann_param_groups(model, 0.01, 0.2))
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        model.to(dtype)
        grassmann_param_groups(model, 0.01, 0.2)
        take_steps(optimizer, 3)
        before = copy.deepcopy(model.state_dict())
        grassmann_param_groups(model, 0.01, 0.2)
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
        optimizer.state.clear()


# ------------------------------------------------------------------------------------------------ measurement


def test_a_frozen_batch_normalization_is_measured_as_it_is():
    model = Residual()
    model.bn.eval()
    assert list(grassmann_weights(model, "measured", random_loss)) == ["conv.weight"]
    assert (model.training, model.bn.training) == (True, False)
    model.eval()
    assert list(grassmann_weights(model, "measured", random_loss)) == ["first.weight", "conv.weight"]


def test_the_measurement_is_in_float32():
    model = Residual()
    expected = scale_invariance(model, random_loss)
    assert max(measured.cosine for measured in expected[:2]) < 1e-4
    with torch.autocast("cpu", torch.bfloat16):
        assert scale_invariance(model, random_loss) == expected
    with pytest.raises(ValueError, match=r"float32.*first\.weight"):
        scale_invariance(model.bfloat16(), random_loss)


# ------------------------------------------------------------------------------------------------- the module


def test_the_import_leaves_what_takes_a_second_to_later():
    script = "import sys, grassmann_optimizer; print('torch._dynamo' in sys.modules)"
    run = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "False"


def test_the_class_pickles_by_value(tmp_path):
    """As a notebook's classes go to other processes, which have no such module."""
    cloudpickle = pytest.importorskip("cloudpickle")
    cloudpickle.register_pickle_by_value(go)
    (tmp_path / "class.pkl").write_bytes(cloudpickle.dumps(AdamG))
    cloudpickle.unregister_pickle_by_value(go)
    script = """if True:
        import pickle, torch
        p = torch.nn.Parameter(torch.eye(2, 5))
        p.grad = torch.ones(2, 5)
        pickle.load(open("class.pkl", "rb"))([p], grassmann=True, omega=0.1).step()
        print((p != torch.eye(2, 5)).any().item())
    """
    run = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True)
    assert (run.returncode, run.stdout.strip()) == (0, "True"), run.stderr


TYPED = """
import torch
from torch import nn
from grassmann_optimizer import SGDG, AdamG, ScaleInvariance, grassmann_param_groups, scale_invariance

model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))
optimizer: torch.optim.Optimizer = SGDG(grassmann_param_groups(model, lr=0.01, lrg=0.2, grad_clip=None))
optimizer = AdamG([{"params": model.parameters()}], lr=0.1, beta2=0.9)
optimizer.step()
AdamG(model.parameters()).step(lambda: 1.0)
optimizer.load_state_dict(optimizer.state_dict())
found: list[ScaleInvariance] = scale_invariance(model, lambda net: net(torch.ones(2, 3, 8, 8)).sum())
"""


@pytest.mark.parametrize("checker", ["mypy", "pyright"])
def test_a_typed_script_passes_its_checker(checker, tmp_path):
    pytest.importorskip(checker)
    (tmp_path / "script.py").write_text(TYPED)
    (tmp_path / "grassmann_optimizer.py").write_text((ROOT / "grassmann_optimizer.py").read_text())
    flags = ["--follow-imports=silent"] if checker == "mypy" else ["--pythonpath", sys.executable]
    command = [sys.executable, "-m", checker, *flags, "script.py"]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout
