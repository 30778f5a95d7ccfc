"""SGD-G and Adam-G: optimizers for weights that feed a batch normalization.

"Riemannian approach to batch normalization", Minhyung Cho and Jaehyung Lee, NIPS 2017, arXiv:1709.09603.

BN(w'x) = BN(u'x) for u = w/|w|: only the direction of such a weight vector counts, so it is a point of the Grassmann
manifold G(1, n), represented by a unit vector. A convolution weight of shape (out, in, kh, kw) is `out` such points in
R^n, n = in*kh*kw: the rows of a matrix. Rows move along geodesics (great circles) and momentum is carried along by
parallel translation.

Letters, as in the paper, all row by row:
    y    point on G(1, n), a unit row              g    Euclidean gradient of the loss at y
    h    gradient on G(1, n), tangent at y         d    step, tangent at y: y moves to exp_y(d)
    tau  momentum of SGD-G, tangent at y           m, v  first and second moment of Adam-G; v is a scalar for each row
    nu   norm clipping's threshold (`grad_clip`)   omega  strength of the orthogonality regularizer

This file needs nothing but torch and can be copied into any project.
"""

import difflib
import math

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.sgd import sgd

__all__ = ["SGDG", "AdamG", "grassmann_param_groups", "unit"]


# ------------------------------------------------------------------------------------------------ 1. operators


def unit(v: Tensor) -> tuple[Tensor, Tensor]:
    """Rows of unit length and the lengths they had: v / |v|, |v|.

    Args:
        v: (..., rows, n). The largest element scales each row first, so |v| neither overflows nor underflows.

    Returns:
        unit rows (..., rows, n) and norms (..., rows, 1). A zero row stays zero, with norm 0.
    """
    largest = v.abs().amax(-1, keepdim=True)
    scaled = v / torch.where(largest > 0, largest, 1)
    norm = torch.linalg.vector_norm(scaled, dim=-1, keepdim=True)
    return scaled / torch.where(norm > 0, norm, 1), norm * largest


def project(y: Tensor, g: Tensor) -> Tensor:
    """Gradient on G(1, n) from the Euclidean one: h = g - (y'g) y (Eq. 6). y, g: (..., rows, n), rows of y unit."""
    return g - (y * g).sum(-1, keepdim=True) * y


def clip_by_norm(h: Tensor, nu: float) -> Tensor:
    """Norm clipping of each row: h * min(1, nu / |h|). h: (..., rows, n); nu > 0, in radians per unit lr."""
    direction, norm = unit(h)
    return torch.where(norm > nu, direction * nu, h)


def exp_map(y: Tensor, h: Tensor) -> Tensor:
    """Exponential map: exp_y(h) = y cos|h| + (h / |h|) sin|h| (Eq. 7); y itself for h = 0.

    Args:
        y: (..., rows, n), unit rows. h: the same shape, tangent at y; its length is the angle of the move in radians.
    """
    u, angle = unit(h)
    return y * angle.cos() + u * angle.sin()


def parallel_translate(delta: Tensor, y: Tensor, h: Tensor) -> Tensor:
    """Carry delta from y to exp_y(h): delta - (u'delta)(y sin|h| + u (1 - cos|h|)), u = h/|h| (Eq. 8).

    Args:
        delta, y, h: (..., rows, n); delta and h tangent at y. With delta = h this is Eq. 9: h cos|h| - y |h| sin|h|.
    """
    u, angle = unit(h)
    # 1 - cos|h| as 2 sin^2(|h|/2): no cancellation for small angles.
    return delta - (u * delta).sum(-1, keepdim=True) * (y * angle.sin() + u * (2 * (angle / 2).sin() ** 2))


def orthogonality_gradient(y: Tensor) -> Tensor:
    """Gradient of (1/2) ||Y Y' - I||_F^2 with respect to Y: 2 (Y Y' - I) Y (omega multiplies it).

    Args:
        y: (..., rows, n), unit rows. Needs rows <= n to have a minimum of 0.
    """
    gram = y @ y.mT
    # Subtracting I before the second product keeps the small off-diagonal part from drowning in Y itself.
    gram.diagonal(dim1=-2, dim2=-1).sub_(1)
    return 2 * gram @ y


# --------------------------------------------------------------------------------------------- 2. update rules


def _riemannian_gradient(y: Tensor, g: Tensor, omega: float, grad_clip: float | None) -> Tensor:
    if omega:
        g = g + omega * orthogonality_gradient(y)
    h = project(y, g)
    return h if grad_clip is None else clip_by_norm(h, grad_clip)


def sgdg_update(
    y: Tensor, g: Tensor, tau: Tensor, *, lr: float, momentum: float, omega: float, grad_clip: float | None
) -> tuple[Tensor, Tensor]:
    """One step of the paper's SGD-G: the new (y, tau). All tensors (..., rows, n); nothing is changed."""
    y, _ = unit(y)
    h = _riemannian_gradient(y, g, omega, grad_clip)
    d = momentum * tau - lr * h
    return exp_map(y, d), parallel_translate(d, y, d)


def adamg_update(
    y: Tensor,
    g: Tensor,
    m: Tensor,
    v: Tensor,
    step: Tensor,
    *,
    lr: float,
    beta1: float,
    beta2: float,
    epsilon: float,
    omega: float,
    grad_clip: float | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """One step of the paper's Adam-G: the new (y, m, v). Nothing is changed.

    Args:
        y, g, m: (..., rows, n). v: (..., rows, 1), one adaptive scale for each row, so that no direction is bent.
        step: 0-dim tensor, the number t of this step, counted from 1.
    """
    y, _ = unit(y)
    h = _riemannian_gradient(y, g, omega, grad_clip)
    m = beta1 * m + (1 - beta1) * h
    v = beta2 * v + (1 - beta2) * (h * h).sum(-1, keepdim=True)
    correction = _one_minus_power(beta2, step).sqrt() / _one_minus_power(beta1, step)
    d = -lr * correction * m / (v + epsilon).sqrt()
    return exp_map(y, d), parallel_translate(m, y, d), v


def _one_minus_power(beta: float, step: Tensor) -> Tensor:
    """1 - beta^step without cancellation, on step's device."""
    return -torch.expm1(step * (math.log(beta) if beta > 0 else -math.inf))


# ------------------------------------------------------------------------------------------- 3. the optimizers


class _GrassmannOptimizer(Optimizer):
    """What SGDG and AdamG share: groups, their validation, rows of a weight, and torch's SGD for the other groups."""

    def __init__(self, params, defaults: dict):
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict) -> None:
        """As torch's; ValueError for an option out of range or misspelt, or a weight without rows on G(1, n)."""
        params = param_group["params"]
        param_group["params"] = [params] if isinstance(params, Tensor) else list(params)
        group = {**self.defaults, **param_group}
        _check_options(group, known=[*self.defaults, "params"])
        if group["grassmann"]:
            for p in param_group["params"]:
                _check_rows(p[1] if isinstance(p, tuple) else p, group["omega"])
        super().add_param_group(param_group)

    @torch.no_grad()
    def step(self, closure=None):
        """One step of every group; returns the closure's loss. Gradients are read only."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if group["grassmann"]:
                for p in params:
                    self._step_on_grassmann(p, group)
            else:
                self._step_sgd(params, group)
        return loss

    def _step_on_grassmann(self, p: Tensor, group: dict) -> None:
        if p.grad.is_sparse or p.is_complex():
            raise RuntimeError("a parameter on G(1, n) needs a dense, real gradient")
        if p.numel() == 0:
            return
        dtype = torch.float32 if p.dtype in (torch.float16, torch.bfloat16) else p.dtype
        g = _rows(p.grad, p).to(dtype)
        y = self._update(p, _rows(p, p).to(dtype), -g if group["maximize"] else g, group)
        _write_rows(p, p, y)

    def _update(self, p: Tensor, y: Tensor, g: Tensor, group: dict) -> Tensor:
        """The new rows of p; keeps p's state."""
        raise NotImplementedError

    def _step_sgd(self, params: list[Tensor], group: dict) -> None:
        buffers = [self.state[p].get("momentum_buffer") for p in params]
        sgd(
            params,
            [p.grad for p in params],
            buffers,
            has_sparse_grad=any(p.grad.is_sparse for p in params),
            # torch's foreach path adds Nesterov's term to the gradients themselves where weight decay made no copy.
            foreach=False if group["nesterov"] and not group["weight_decay"] else None,
            weight_decay=group["weight_decay"],
            momentum=group["momentum"],
            lr=group["lr"],
            dampening=group["dampening"],
            nesterov=group["nesterov"],
            maximize=group["maximize"],
        )
        if group["momentum"]:
            for p, buffer in zip(params, buffers, strict=True):
                self.state[p]["momentum_buffer"] = buffer


class SGDG(_GrassmannOptimizer):
    """SGD with momentum on the product of G(1, n)s, one for each row of a weight: the paper's SGD-G.

    A group with `grassmann=True` moves the rows of its weights (dimension 0 counts the rows) along geodesics. Any other
    group is plain SGD with momentum. Meant for weights whose length does not matter, as those that feed a batch
    normalization; `grassmann_param_groups` sorts a model's parameters.

    Args:
        params: parameters, or groups of them with options of their own.
        lr: learning rate; on G(1, n) the angle in radians that a gradient of length 1 moves a row.
        momentum: of both kinds of groups. dampening, weight_decay, nesterov: other groups only.
        grassmann: whether a group's rows are points of G(1, n).
        omega: orthogonality regularizer (omega/2) ||Y Y' - I||_F^2 of each weight on G(1, n); 0: none.
        grad_clip: largest length of a row's gradient on G(1, n); None: no limit.
        maximize: ascend the loss (the regularizer is minimized all the same).

    Raises:
        ValueError: an option out of range or misspelt; `grassmann=True` on a parameter without rows of at least two
            elements, or with more rows than a row has elements while omega > 0.

    Rows that are not of unit length are made so by the first step. State there: `momentum_buffer` (tau, shaped
    as the weight).
    """

    def __init__(
        self,
        params,
        lr: float | Tensor = 1e-3,
        momentum: float = 0,
        dampening: float = 0,
        weight_decay: float = 0,
        nesterov: bool = False,
        grassmann: bool = False,
        omega: float = 0,
        grad_clip: float | None = None,
        *,
        maximize: bool = False,
    ):
        options = locals()
        super().__init__(params, {name: options[name] for name in _OPTIONS})

    def _update(self, p: Tensor, y: Tensor, g: Tensor, group: dict) -> Tensor:
        state = self.state[p]
        if not state:
            state["momentum_buffer"] = torch.zeros_like(p, dtype=y.dtype)
        tau = _rows(state["momentum_buffer"], p)
        keys = ("lr", "momentum", "omega", "grad_clip")
        y, tau = sgdg_update(y, g, tau, **{key: group[key] for key in keys})
        _write_rows(state["momentum_buffer"], p, tau)
        return y


class AdamG(_GrassmannOptimizer):
    """Adam on the product of G(1, n)s, one adaptive scale for each row of a weight: Adam-G.

    As `SGDG`, with `momentum` as beta1 of a group on G(1, n) (below 1), and there

    Args:
        beta2: decay of the second moment, in [0, 1). epsilon: added to the second moment before the root.

    State on G(1, n): `momentum_buffer` (m, shaped as the weight), `second_moment` (v, (rows, 1)), `step` (0-dim).
    """

    def __init__(
        self,
        params,
        lr: float | Tensor = 1e-3,
        momentum: float = 0,
        dampening: float = 0,
        weight_decay: float = 0,
        nesterov: bool = False,
        grassmann: bool = False,
        beta2: float = 0.99,
        epsilon: float = 1e-8,
        omega: float = 0,
        grad_clip: float | None = None,
        *,
        maximize: bool = False,
    ):
        options = locals()
        super().__init__(params, {name: options[name] for name in (*_OPTIONS, "beta2", "epsilon")})

    def _update(self, p: Tensor, y: Tensor, g: Tensor, group: dict) -> Tensor:
        state = self.state[p]
        if not state:
            state["step"] = torch.zeros((), device=p.device)
            state["momentum_buffer"] = torch.zeros_like(p, dtype=y.dtype)
            state["second_moment"] = y.new_zeros(y.shape[0], 1)
        state["step"] += 1
        m = _rows(state["momentum_buffer"], p)
        keys = ("lr", "beta2", "epsilon", "omega", "grad_clip")
        options = {key: group[key] for key in keys}
        step = state["step"].to(y.dtype)
        y, m, v = adamg_update(y, g, m, state["second_moment"], step, beta1=group["momentum"], **options)
        _write_rows(state["momentum_buffer"], p, m)
        state["second_moment"].copy_(v)
        return y


# Of both optimizers.
_OPTIONS = ("lr", "momentum", "dampening", "weight_decay", "nesterov", "grassmann", "omega", "grad_clip", "maximize")


def _rows(t: Tensor, weight: Tensor) -> Tensor:
    """t as (rows, n), the elements of a row in the order in which `weight` stores them.

    Everything on G(1, n) is row by row, so any order serves as long as weight, gradient and state share it. A view
    where t is stored as the weight is (contiguous, channels_last or any other order), else a copy.
    """
    return t.permute(0, *_storage_order(weight)).reshape(t.shape[0], -1)


def _write_rows(t: Tensor, weight: Tensor, rows: Tensor) -> None:
    """The inverse of `_rows`: fill t, in place, from rows (rows, n)."""
    stored = t.permute(0, *_storage_order(weight))
    stored.copy_(rows.view(stored.shape))


def _storage_order(weight: Tensor) -> list[int]:
    return sorted(range(1, weight.ndim), key=weight.stride, reverse=True)


def _check_options(group: dict, known: list[str]) -> None:
    for key in group.keys() - set(known):
        if close := difflib.get_close_matches(key, known, n=1, cutoff=0.8):
            raise ValueError(f"unknown option {key!r} of a parameter group; did you mean {close[0]!r}?")
    for name in ("lr", "momentum", "weight_decay", "omega", "dampening"):
        if group[name] < 0:
            raise ValueError(f"Invalid {name} value: {group[name]} (must not be negative)")
    if group["grad_clip"] is not None and not group["grad_clip"] > 0:
        raise ValueError(f"Invalid grad_clip value: {group['grad_clip']} (must be positive, or None for no clipping)")
    if group["nesterov"] and (group["momentum"] == 0 or group["dampening"] != 0) and not group["grassmann"]:
        raise ValueError(
            f"Invalid nesterov value: {group['nesterov']} (needs a momentum and no dampening, "
            f"got momentum={group['momentum']}, dampening={group['dampening']})"
        )
    if "beta2" not in group:
        return
    if not 0 <= group["beta2"] < 1:
        raise ValueError(f"Invalid beta2 value: {group['beta2']} (must be in [0, 1))")
    if not group["epsilon"] > 0:
        raise ValueError(f"Invalid epsilon value: {group['epsilon']} (must be positive)")
    if group["grassmann"] and group["momentum"] >= 1:
        raise ValueError(f"Invalid momentum value: {group['momentum']} (beta1 of a group on G(1, n) must be below 1)")


def _check_rows(p: Tensor, omega: float) -> None:
    shape = tuple(p.shape)
    if p.ndim < 2:
        raise ValueError(f"grassmann=True needs parameters with two or more dimensions, got one of shape {shape}")
    rows, n = p.shape[0], p.shape[1:].numel()
    if n == 1:
        raise ValueError(f"grassmann=True needs rows of at least two elements, got a parameter of shape {shape}")
    if omega > 0 and rows > n:
        raise ValueError(
            f"omega={omega} asks for orthogonal rows, but a parameter of shape {shape} has {rows} rows of {n} "
            "elements; give it a group with omega=0"
        )


# --------------------------------------------------------------------------------------- 4. a model's parameters


@torch.no_grad()
def grassmann_param_groups(
    model: nn.Module,
    lr: float,
    lrg: float,
    *,
    momentum: float = 0.9,
    omega: float = 0.1,
    grad_clip: float | None = 0.1,
    weight_decay: float = 5e-4,
    bn_decay: float = 0.0,
) -> list[dict]:
    """Sort a model's trainable parameters into the groups of the paper, ready for `SGDG` or `AdamG`.

    By module type and shape, not by name:
        "on G(1,n)"  weights of Conv1d/2d/3d with fewer rows than elements in a row: lrg, momentum, omega, grad_clip
        "bn/bias"    every parameter with fewer than two dimensions: lr, Nesterov momentum, bn_decay
        "other"      all else (linear layers, overcomplete and transposed convolutions): lr, Nesterov momentum,
                     weight_decay

    Frozen parameters are left out, tied ones counted once, empty groups dropped.

    Warning: sets the rows of the Grassmann weights to unit length, in place, which changes what a trained network
    computes: in evaluation mode the running averages of a following batch normalization belong to the old lengths until
    training renews them; where none follows (a residual block's last convolution) the output itself changes.

    Args:
        lr, lrg: learning rates of the Euclidean groups and of the rows on G(1, n).

    Returns:
        group dictionaries with a "name".
    """
    on_grassmann, bn_or_bias, other = [], [], []
    seen = set()
    for module in model.modules():
        for name, p in module.named_parameters(recurse=False):
            if p in seen or not p.requires_grad:
                continue
            seen.add(p)
            is_conv = isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)) and name == "weight"
            if p.ndim < 2:
                bn_or_bias.append(p)
            elif is_conv and p.shape[0] < p.shape[1:].numel():
                on_grassmann.append(p)
                _write_rows(p, p, unit(_rows(p, p))[0])
            else:
                other.append(p)
    grassmann = {"lr": lrg, "momentum": momentum, "grassmann": True, "omega": omega, "grad_clip": grad_clip}
    euclidean = {"lr": lr, "momentum": momentum, "grassmann": False, "nesterov": momentum > 0}
    groups = [
        {"params": on_grassmann, "name": "on G(1,n)", **grassmann},
        {"params": bn_or_bias, "name": "bn/bias", **euclidean, "weight_decay": bn_decay},
        {"params": other, "name": "other", **euclidean, "weight_decay": weight_decay},
    ]
    return [group for group in groups if group["params"]]
