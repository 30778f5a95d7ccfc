"""benchmarks/peers.py: rules as their closed forms, on the weights of main.py's groups, in its training."""

import json
import sys

import pytest
import torch
from helpers import ROOT, call, log_lines
from torch.testing import assert_close

import grassmann_optimizer as go
import main
from options import parse_options

sys.path.append(str(ROOT / "benchmarks"))
import peers


def part_of(name, weight, grad):
    """A copy of `weight` that has the gradient, and an optimizer of it alone."""
    p = torch.nn.Parameter(weight.clone())
    p.grad = grad.clone()
    group = {"lr": 0.2, "momentum": 0.9, "omega": 0.1, "grad_clip": 0.5, "weight_decay": 0.0}
    return p, peers.make_part(name, [p], group)


@pytest.mark.parametrize("method", ["exact", "retract", "untransported", "oblique"])
def test_each_ablation_is_its_closed_form(method):
    y, g, tau = go.unit(torch.randn(3, 4, 9, dtype=torch.float64))[0]
    tau = 0.3 * go.project(y, tau)
    h = go.clip_by_norm(go.project(y, g + 0.1 * go.orthogonality_gradient(y)), 0.5)
    d = 0.9 * tau - 0.2 * h  # what follows is all that the methods differ in
    p, optimizer = part_of(peers.METHODS[method][1], y, g)
    optimizer.state[p]["momentum_buffer"] = tau
    optimizer.step()
    length, retracts = d.norm(dim=-1, keepdim=True), method in ("retract", "oblique")
    assert_close(p.detach(), (y + d) / (1 + length**2).sqrt() if retracts else go.exp_map(y, d))
    if method in ("untransported", "oblique"):
        assert_close(tau, d)
        optimizer.step()  # by its tangent part
        assert_close(p.norm(dim=-1), torch.ones(4, dtype=torch.float64))
    else:  # tangent at the new row, and as long as d, from which it has turned as the row from y
        along, square, turned, cosine = ((a * b).sum(-1) for a, b in ((tau, p), (tau, tau), (tau, d), (p, y)))
        for found, expected in ((along, 0), (square, length**2), (turned, length**2 * cosine[:, None])):
            assert_close(found[:, None], expected + 0 * length)


def test_adamh_keeps_the_length_of_a_matrix():
    w, g = torch.randn(2, 5, 8, dtype=torch.float64)
    p, optimizer = part_of("AdamH", w, g)
    optimizer.step()  # Adam's first step is the gradient's sign
    straight = w - 0.2 * w.norm() * g.sign() / 40**0.5
    assert_close(p.detach(), straight * w.norm() / straight.norm(), rtol=1e-6, atol=1e-6)
    optimizer.step()
    assert_close(p.norm(), w.norm())


@pytest.mark.parametrize("method", peers.METHODS)
def test_each_method_moves_the_networks_own_weights_at_their_groups_rate(method):
    if package := {"rsgd": "geoopt", "sgdp": "adamp"}.get(method):
        pytest.importorskip(package)
    flags, *names = peers.METHODS[method]
    options, *_ = parse_options([*flags, "--depth", "10", "--width", "1", "--summary"])
    model = main.make_model(options, 10).to(memory_format=torch.channels_last)
    main.random_loss(model).backward()
    optimizer = main.make_optimizer(model, options)
    if names:
        optimizer = peers.Peer(optimizer.param_groups, *names)
        optimizer.param_groups[0]["lr"] = 0.0  # as a schedule changes it
        still = set(optimizer.param_groups[0]["params"])
        assert "SGD" in flags or still == set(go.grassmann_weights(model).values())
    else:
        peers.split_off(model.fc, optimizer, 0.0)
        still = set(model.fc.parameters())
    before = [p.detach().clone() for p in model.parameters()]
    optimizer.step()
    pairs = zip(model.parameters(), before, strict=True)
    assert {p for p, old in pairs if torch.allclose(p, old, atol=1e-6)} == still


def test_a_rest_without_momentum_takes_no_nesterov_step():
    group = {"lr": 0.1, "momentum": 0.0, "weight_decay": 0.0}
    assert not peers.make_part("SGD", [torch.nn.Parameter(torch.ones(2))], group).defaults["nesterov"]


def test_a_run_is_main_pys_own_with_another_optimizer(tiny, images_root, tmp_path, monkeypatch):
    made = []

    class Peer(peers.Peer):
        def __init__(self, groups, *names):
            made.append(names)
            super().__init__(groups, *names)

    monkeypatch.setattr(peers, "Peer", Peer)
    words, file = tiny("SGDG", tmp_path / "main"), tmp_path / "new" / "exact.json"
    assert call(*words).code == 0
    peers.main(["exact", *words[:-2], "--json", str(file), "--test", str(images_root)])
    assert made == [("Rows", "SGD")]
    result, own = json.loads(file.read_text()), log_lines(tmp_path / "main")
    last = {"images": 18, "loss": own[-1]["test_loss"], "error": 100 - own[-1]["test_acc"]}
    assert result["test"] == pytest.approx(last, rel=1e-3)
    assert result["epochs"]["train_loss"] == pytest.approx([line["train_loss"] for line in own], rel=1e-4)
    assert result["epochs"]["test_error"] == pytest.approx([100 - line["test_acc"] for line in own])
