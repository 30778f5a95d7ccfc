"""What the optimizers' tests share: steps with drawn gradients, and the rules that define them."""

import pytest
import torch

import grassmann_optimizer as go
from grassmann_optimizer import SGDG, AdamG

BOTH = pytest.mark.parametrize("Optimizer", [SGDG, AdamG])
ON_ROWS = {"grassmann": True, "lr": 0.2, "momentum": 0.9, "omega": 0.1, "grad_clip": 0.5}


def params_of(optimizer):
    return [p for group in optimizer.param_groups for p in group["params"]]


def take_steps(optimizer, seeds):
    """A step for each seed, with the gradients that it draws."""
    for seed in seeds:
        generator = torch.Generator().manual_seed(seed)
        for p in params_of(optimizer):
            p.grad = torch.randn(p.shape, generator=generator, dtype=torch.float32).to(p)
        optimizer.step()
    return optimizer


def by_rule(Optimizer, y, gradients, *, lr, momentum, omega, grad_clip, beta2=0.99, epsilon=1e-8):
    """Rows, momentum and second moment after a step of the update rule for each gradient, in float64."""
    y, m, v = y.double(), torch.zeros_like(y).double(), torch.zeros(len(y), 1).to(y).double()
    options = {"lr": lr, "omega": omega, "grad_clip": grad_clip}
    betas = {"beta1": momentum, "beta2": beta2, "epsilon": epsilon}
    for t, g in enumerate(gradients, 1):
        if Optimizer is SGDG:
            y, m = go.sgdg_update(y, g.double(), m, momentum=momentum, **options)
        else:
            step = torch.tensor(t, dtype=torch.float64, device=y.device)
            y, m, v = go.adamg_update(y, g.double(), m, v, step, **betas, **options)
    return y, m, v
