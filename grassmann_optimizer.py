"""SGD-G and Adam-G: optimizers for weights that feed a batch normalization.

"Riemannian approach to batch normalization", Minhyung Cho and Jaehyung Lee, NIPS 2017, arXiv:1709.09603.

BN(w'x) = BN(u'x) for u = w/|w|: only the direction of such a weight vector counts, so it is a point of the
Grassmann manifold G(1, n), represented by a unit vector. A convolution weight of shape (out, in, kh, kw) is
`out` such points in R^n, n = in*kh*kw: the rows of a matrix. Rows move along geodesics (great circles) and
momentum is carried along by parallel translation.

Letters, all row by row (docs/method.md compares them with the authors' poster):
    y    point on G(1, n), a unit row              g    Euclidean gradient of the loss at y
    h    gradient on G(1, n), tangent at y         d    step, tangent at y: y moves to exp_y(d)
    tau  momentum of SGD-G, tangent at y           m, v  first and second moment of Adam-G, v a scalar a row
    nu   norm clipping's threshold (`grad_clip`)   omega  strength of the orthogonality regularizer
In the operators of Eq. 7 to 9 h is any tangent vector; the update rules put the step d there. A reader of the
paper may stop before section 5. This file needs torch alone and can be copied into any project.
"""

import difflib
import importlib.util
import math
import warnings
from collections.abc import Callable, Collection
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer
from torch.optim.sgd import sgd

__version__ = "0.1.0"
__all__ = ["SGDG", "AdamG", "ScaleInvariance", "grassmann_param_groups", "grassmann_weights",
           "scale_invariance", "unit"]  # fmt: skip
_Loss = Callable[[nn.Module], Tensor]
_OF_ROWS = {"omega": 0, "grad_clip": None, "beta2": 0.99, "epsilon": 1e-8}  # on G(1, n) only, with defaults
_NO_ROWS = "no group has grassmann=True: give the optimizer grassmann_param_groups(model, lr, lrg)"
_LOW_PRECISION = (torch.float16, torch.bfloat16)
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


# -------------------------------------------------------------------------------------- 1. operators
def unit(v: Tensor) -> tuple[Tensor, Tensor]:
    """Rows of unit length (..., rows, n) and the lengths they had (..., rows, 1): v / |v|, |v|.

    A zero row stays zero. The largest element scales each row first: |v| neither overflows nor underflows.
    """
    largest = v.abs().amax(-1, keepdim=True)
    scaled = v / torch.where(largest > 0, largest, 1)
    norm = torch.linalg.vector_norm(scaled, dim=-1, keepdim=True)
    return scaled / torch.where(norm > 0, norm, 1), norm * largest


def project(y: Tensor, g: Tensor) -> Tensor:
    """Gradient on G(1, n) from the Euclidean one: h = g - (y'g) y (Eq. 6). y, g: (..., rows, n), y unit."""
    for _ in range(2):  # where g is nearly parallel to y, rounding leaves a part along y the first time
        g = g - (y * g).sum(-1, keepdim=True) * y
    return g


def clip_by_norm(h: Tensor, nu: float) -> Tensor:
    """Norm clipping of each row: h * min(1, nu / |h|). h: (..., rows, n); nu > 0, in radians per unit lr."""
    direction, norm = unit(h)
    return torch.where(norm > nu, direction * nu, h)


def exp_map(y: Tensor, h: Tensor) -> Tensor:
    """Exponential map: exp_y(h) = y cos|h| + (h / |h|) sin|h| (Eq. 7); y itself for h = 0.

    y: (..., rows, n), unit rows. h: likewise, tangent at y; its length is the angle of the move in radians.
    """
    u, angle = unit(h)
    return y * angle.cos() + u * angle.sin()


def parallel_translate(delta: Tensor, y: Tensor, h: Tensor) -> Tensor:
    """Carry delta from y to exp_y(h): delta - (u'delta)(y sin|h| + u (1 - cos|h|)), u = h/|h| (Eq. 8).

    delta, y, h: (..., rows, n); delta and h tangent at y. For delta = h: h cos|h| - y |h| sin|h| (Eq. 9).
    """
    u, angle = unit(h)
    # 1 - cos|h| as 2 sin^2(|h|/2): no cancellation for small angles.
    return delta - (u * delta).sum(-1, keepdim=True) * (y * angle.sin() + u * (2 * (angle / 2).sin() ** 2))


def orthogonality_gradient(y: Tensor) -> Tensor:
    """Gradient of (1/2) ||Y Y' - I||_F^2 with respect to Y: 2 (Y Y' - I) Y (omega multiplies it).

    y: (..., rows, n), unit rows. Needs rows <= n to have a minimum of 0.
    """
    gram = y @ y.mT
    # Subtracting I before the second product keeps the small off-diagonal part from drowning in Y itself.
    gram.diagonal(dim1=-2, dim2=-1).sub_(1)
    return 2 * gram @ y


# -------------------------------------------------------------------------------------- 2. update rules
# The definition of both methods. The optimizers compute it by section 5, which the tests hold equal to this.
def _riemannian_gradient(y: Tensor, g: Tensor, omega: float, grad_clip: float | None) -> Tensor:
    if omega:
        g = g + omega * orthogonality_gradient(y)
    h = project(y, g)
    return h if grad_clip is None else clip_by_norm(h, grad_clip)


def sgdg_update(
    y: Tensor, g: Tensor, tau: Tensor, *, lr: float, momentum: float, omega: float, grad_clip: float | None
) -> tuple[Tensor, Tensor]:
    """One step of the paper's SGD-G: the new (y, tau). Nothing is changed.

    y, g, tau: (..., rows, n); y of any length but 0, tau tangent at it. lr: radians per unit of gradient.
    grad_clip: nu, or None for no clipping.
    """
    y, _ = unit(y)
    h = _riemannian_gradient(y, g, omega, grad_clip)
    d = momentum * tau - lr * h
    return exp_map(y, d), parallel_translate(d, y, d)


def adamg_update(
    y: Tensor, g: Tensor, m: Tensor, v: Tensor, step: Tensor,
    *, lr: float, beta1: float, beta2: float, epsilon: float, omega: float, grad_clip: float | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """One step of the paper's Adam-G: the new (y, m, v). Nothing is changed; arguments as in `sgdg_update`.

    v: (..., rows, 1), one scale for each row, so that no direction is bent. step: 0-dim tensor, the number t
    of this step, counted from 1.
    """
    y, _ = unit(y)
    h = _riemannian_gradient(y, g, omega, grad_clip)
    m = beta1 * m + (1 - beta1) * h
    v = beta2 * v + (1 - beta2) * (h * h).sum(-1, keepdim=True)
    d = -lr * _bias_correction(step, beta1, beta2) * m / (v + epsilon).sqrt()
    return exp_map(y, d), parallel_translate(m, y, d), v


def _bias_correction(step: Tensor, beta1: float, beta2: float) -> Tensor:
    """sqrt(1 - beta2^t) / (1 - beta1^t), without cancellation, on step's device."""
    log1, log2 = (math.log(beta) if beta > 0 else -math.inf for beta in (beta1, beta2))
    return (-torch.expm1(step * log2)).sqrt() / -torch.expm1(step * log1)


# -------------------------------------------------------------------------------------- 3. the optimizers
class _GrassmannOptimizer(Optimizer):
    """What SGDG and AdamG share: groups, state and their checks, torch's SGD for groups not on G(1, n)."""

    _tells_of_sgd, _rates_differed = True, False

    def __init__(self, params, defaults: dict):
        _check_options(defaults, known=list(defaults))
        super().__init__(params, defaults)
        if not any(group["grassmann"] for group in self.param_groups):
            for name, unset in _OF_ROWS.items():
                if any(group.get(name, unset) != unset for group in self.param_groups):
                    raise ValueError(f"{name} has no effect: {_NO_ROWS}")

    def add_param_group(self, param_group: dict) -> None:
        """As torch's; ValueError for an option out of range or misspelt, or a weight that has no rows."""
        _check_options({**self.defaults, **param_group}, known=[*self.defaults, "params"])
        super().add_param_group(param_group)
        try:
            group = self.param_groups[-1]
            for p in group["params"] if group["grassmann"] else []:
                _check_rows(p, group["omega"])
        except (RuntimeError, ValueError):
            self.param_groups.pop()
            raise
        self._rates_differed |= len(_rates_of(self.param_groups)) > 1

    # Opaque to torch.compile, which mishandles results written in place (torch 2.13 and 2.15). The public
    # torch.compiler.disable does the same, but hides the method's type and takes over a second to import.
    @torch._disable_dynamo
    @torch.no_grad()
    def step(self, closure=None):
        """One step of every group; returns the closure's loss. Gradients are read only."""
        self._warn()
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            (self._step_on_grassmann if group["grassmann"] else self._step_sgd)(params, group)
        return loss

    def _warn(self) -> None:
        """Say once what is seldom meant."""
        groups, rates = self.param_groups, _rates_of(self.param_groups)
        one_of_many = sum(len(group["params"]) for group in groups) == 1  # an optimizer for each parameter
        if self._tells_of_sgd and not one_of_many and not any(group["grassmann"] for group in groups):
            self._tells_of_sgd = False
            warnings.warn(f"steps of plain SGD: {_NO_ROWS}", stacklevel=7)
        if self._rates_differed and len(rates) == 1 and rates != {0.0}:
            self._rates_differed = False
            text = f"all groups have the rate {rates.pop():g} now, and were given different ones"
            warnings.warn(f"{text}: give a schedule such as OneCycleLR a list of rates", stacklevel=7)

    def _step_on_grassmann(self, params: list[Tensor], group: dict) -> None:
        if any(p.grad.is_sparse for p in params):
            raise RuntimeError("a parameter on G(1, n) needs a dense gradient")
        params = [p for p in params if p.numel()]
        alike: dict[tuple, list[Tensor]] = {}
        for p in params:
            self._init_state(p, self.state[p])
            alike.setdefault((p.device, p.dtype, _suits_kernel(p)), []).append(p)
        # torch.distributed.checkpoint makes a step at a rate of 0 after the weights are loaded. A row that
        # does not turn stays then: making it unit again would cost its last bit. No look at a rate on a GPU.
        still = (not isinstance(group["lr"], Tensor) or _is_on_host(group["lr"])) and group["lr"] == 0
        before = [_local(p, p).clone() for p in params if still]
        for some in alike.values():
            self._step_alike(some, group)
        for p, rows in zip(params, before, strict=False):
            momentum = _local(self.state[p]["momentum_buffer"], p)
            turned = (momentum != 0).any(list(range(1, p.ndim)), keepdim=True)
            turned &= "beta2" not in group  # Adam-G's rate multiplies its momentum
            _local(p, p).copy_(torch.where(turned, _local(p, p), rows))

    def _step_alike(self, params: list[Tensor], group: dict) -> None:
        """A step of weights of one device and type: by the kernel where it takes them, else in blocks."""
        states, device = [self.state[p] for p in params], params[0].device.type
        options = {name: group[name] for name in ("maximize", *_OF_ROWS) if name in group}
        step = _step_by_kernel if _suits_kernel(params[0]) else _step_in_blocks
        with torch.autocast("cpu" if device == "meta" else device, enabled=False):
            step(params, states, self._rates(params, group), decay=group["momentum"], **options)

    def _init_state(self, p: Tensor, state: dict) -> None:
        """Fill in what the state of a weight on G(1, n) lacks; ValueError where it is another weight's."""
        if state.get("momentum_buffer") is None:
            state["momentum_buffer"] = torch.zeros_like(p, dtype=_arithmetic(p))
        if state["momentum_buffer"].shape != p.shape:
            found = f"a weight {tuple(p.shape)} has a state {tuple(state['momentum_buffer'].shape)}"
            raise ValueError(f"{found}: cut optimizer.state[weight] as the weight was, or delete it")

    def _rates(self, params: list[Tensor], group: dict) -> Tensor:
        """The lr of each weight, in Adam-G times its bias correction: (weights,), on their device."""
        like, lr = {"dtype": _arithmetic(params[0]), "device": params[0].device}, group["lr"]
        lr = lr.to(**like, non_blocking=True) if isinstance(lr, Tensor) else torch.full((), lr, **like)
        return lr.reshape(()).repeat(len(params))

    def _step_sgd(self, params: list[Tensor], group: dict) -> None:
        states = [self.state[p] for p in params]
        sparse, lr = any(p.grad.is_sparse for p in params), group["lr"]
        # Fused where it is one launch: on a GPU, for tensors stored alike. A buffer of zeros beforehand is
        # torch's first step if nothing is dampened, and lets a CUDA graph hold the step.
        plain = bool(params) and not sparse and not group["dampening"]
        if fused := plain and all(map(_suits_fused_sgd, params, states)):
            lr = lr.to(params[0].device, torch.float32, non_blocking=True) if isinstance(lr, Tensor) else lr
            for p, state in zip(params, states, strict=True):
                if group["momentum"] and state.get("momentum_buffer") is None:
                    state["momentum_buffer"] = torch.zeros_like(p)
        buffers = [state.get("momentum_buffer") for state in states]
        names = ("momentum", "dampening", "weight_decay", "nesterov", "maximize")
        options = {"lr": lr, "has_sparse_grad": sparse, **{name: group[name] for name in names}}
        # Not foreach: torch's foreach path may add Nesterov's term to the gradients themselves.
        sgd(params, [p.grad for p in params], buffers, foreach=False, fused=fused, **options)
        if group["momentum"]:
            for state, buffer in zip(states, buffers, strict=True):
                state["momentum_buffer"] = buffer

    def load_state_dict(self, state_dict: dict) -> None:
        """As torch's, but state on G(1, n) stays float32 for narrower weights; `step` goes to their device.

        Takes the state of the authors' PyTorch optimizer of the same kind too. The state of another optimizer
        or of weights of other shapes is a ValueError, which changes nothing.
        """
        saved: dict = {}  # what the user's hooks have made of state_dict, in our terms

        def translate(_, given: dict) -> dict:
            try:
                saved.update(self._translated(given))
            except Exception as error:
                why = f"it has no {error}" if isinstance(error, KeyError) else error
                raise ValueError(f"not the state of {type(self).__name__}: {why}") from error
            return saved

        hook = self.register_load_state_dict_pre_hook(translate)  # the last of them
        try:
            super().load_state_dict(state_dict)
        finally:
            hook.remove()
        for group, saved_group in zip(self.param_groups, saved["param_groups"], strict=True):
            if group["grassmann"]:  # torch has given the state its weight's type
                for p, i in zip(group["params"], saved_group["params"], strict=True):
                    for key, value in saved["state"].get(i, {}).items():
                        dtype = torch.float32 if key == "step" else _arithmetic(p)
                        self.state[p][key] = value.to(p.device, dtype, copy=True)

    def _translated(self, given: dict) -> dict:
        """A state dict in our terms; ValueError where it cannot be one of this optimizer."""
        groups = [{"maximize": False, **group} for group in given["param_groups"]]  # the authors' lack it
        states = {i: s for i, s in given["state"].items() if s is not None}  # None: ZeroRedundancyOptimizer's
        needed = {*self.defaults, "params"} - {"differentiable"}  # which torch adds to a copy's defaults
        for number, group in enumerate(groups):
            if wrong := needed - group.keys() or group.keys() & _OF_ROWS.keys() - needed:
                has = "has no" if wrong - group.keys() else "has"
                raise ValueError(f"parameter group {number} {has} {', '.join(map(repr, sorted(wrong)))}")
            _check_options(group, known=[*self.defaults, "params"])
        for group, own in zip(groups, self.param_groups, strict=False):  # torch refuses another number
            for i, p in zip(group["params"], own["params"], strict=False):
                if group["grassmann"]:
                    _check_rows(p, group["omega"])
                if states.get(i):
                    states[i] = self._translated_state(states[i], p, group, f"parameter {i}")
        return {**given, "param_groups": groups, "state": states}

    def _translated_state(self, state: dict, p: Tensor, group: dict, which: str) -> dict:
        state = {key: value for key, value in state.items() if value is not None}  # None: an older torch's
        rows = state.get("momentum_buffer")
        if group["grassmann"] and isinstance(rows, Tensor) and rows.shape == p.flatten(1).shape:
            state["momentum_buffer"] = rows.reshape(p.shape)  # the authors' is (rows, n)
        adam = {"second_moment": (*p.shape[:1], 1), "step": ()} if "beta2" in self.defaults else {}
        needed = {"momentum_buffer": tuple(p.shape), **adam}
        found = {key: tuple(t.shape) if isinstance(t, Tensor) else t for key, t in state.items()}
        if found != needed if group["grassmann"] else not found.items() <= needed.items():
            raise ValueError(f"{which} has {found}, where {needed} is needed")
        shards = {getattr(t, "placements", None) for t in (p, *state.values()) if t.ndim}
        if len(shards) > 1:
            raise ValueError(f"{which} and its state are not sharded alike: use torch.distributed.checkpoint")
        return state


class SGDG(_GrassmannOptimizer):
    """SGD with momentum on the product of G(1, n)s, one for each row of a weight: the paper's SGD-G.

    A group with `grassmann=True` moves the rows of its weights (dimension 0 counts the rows) along geodesics;
    any other is plain SGD with momentum. For weights whose length does not matter, as those that feed a batch
    normalization; `grassmann_param_groups` sorts a model's parameters.

    Args:
        lr: learning rate; on G(1, n) the angle in radians that a gradient of length 1 moves a row. Take your
            own SGD rate for `lr`, and for rows 0.2 to 0.4 (about 0.1 in Adam-G); the paper's rates, 0.01 and
            0.2 (0.05 in Adam-G), are for the paper's schedule.
        momentum: of both kinds of groups. dampening, weight_decay, nesterov: other groups only.
        grassmann: whether a group's rows are points of G(1, n).
        omega: regularizer (omega/2) ||Y Y' - I||_F^2 of each weight on G(1, n); 0: none, the cheapest.
        grad_clip: largest length of a row's gradient on G(1, n); None: no limit.
        maximize: ascend the loss (the regularizer is minimized all the same).
    ValueError: an option out of range, misspelt or without effect; `grassmann=True` on a parameter that is
    complex, has no rows of at least two elements or, with omega > 0, more rows than a row has elements.

    State on G(1, n): `momentum_buffer` (tau, shaped as the weight). It holds steps, with the rate inside:
    after a drop of the rate rows go on at the old one for about 1/(1 - momentum) steps, and lr = 0 does not
    stop them. To stop a layer, leave it without gradients: `weight.requires_grad_(False)`, `zero_grad()`.
    """

    def __init__(
        self, params, lr: float | Tensor = 1e-3, momentum: float = 0, dampening: float = 0,
        weight_decay: float = 0, nesterov: bool = False, grassmann: bool = False,
        omega: float = 0, grad_clip: float | None = None, *, maximize: bool = False,
    ):  # fmt: skip
        super().__init__(params, dict(
            lr=lr, momentum=momentum, dampening=dampening, weight_decay=weight_decay, nesterov=nesterov,
            grassmann=grassmann, omega=omega, grad_clip=grad_clip, maximize=maximize,
        ))  # fmt: skip


class AdamG(_GrassmannOptimizer):
    """Adam on the product of G(1, n)s, with one adaptive scale for each row of a weight: the paper's Adam-G.

    Groups, rates, errors and what is said of rows are as in `SGDG`; another group is SGD with momentum.
    momentum: on G(1, n) beta1, decay of the first moment, in [0, 1); of other groups SGD's.
    beta2, epsilon: of rows, decay of the second moment, in [0, 1), and what is added to it under the root.

    State on G(1, n): `momentum_buffer` (m, shaped as the weight), `second_moment` (v, (rows, 1)), `step`
    (0-dim, float32). Here lr = 0 does stop a row.
    """

    def __init__(
        self, params, lr: float | Tensor = 1e-3, momentum: float = 0, dampening: float = 0,
        weight_decay: float = 0, nesterov: bool = False, grassmann: bool = False, beta2: float = 0.99,
        epsilon: float = 1e-8, omega: float = 0, grad_clip: float | None = None, *, maximize: bool = False,
    ):  # fmt: skip
        super().__init__(params, dict(
            lr=lr, momentum=momentum, dampening=dampening, weight_decay=weight_decay, nesterov=nesterov,
            grassmann=grassmann, omega=omega, grad_clip=grad_clip, beta2=beta2, epsilon=epsilon,
            maximize=maximize,
        ))  # fmt: skip

    def _init_state(self, p: Tensor, state: dict) -> None:
        super()._init_state(p, state)
        if "step" not in state:
            v = torch.zeros(len(_local(p, p)), 1, dtype=_arithmetic(p), device=p.device)
            state["second_moment"] = _sharded_as(p, v) if _is_sharded(p) else v
            state["step"] = torch.zeros((), dtype=torch.float32, device=p.device)  # bfloat16 counts to 256
        elif state["step"].device != p.device:  # ZeroRedundancyOptimizer loads it to the CPU
            state["step"] = state["step"].to(p.device)

    def _rates(self, params: list[Tensor], group: dict) -> Tensor:
        steps = [self.state[p]["step"] for p in params]
        torch._foreach_add_(steps, 1)  # this step's number
        lr = super()._rates(params, group)
        return lr * _bias_correction(torch.stack(steps).to(lr.dtype), group["momentum"], group["beta2"])

    def _translated_state(self, state: dict, p: Tensor, group: dict, which: str) -> dict:
        """Also of the authors' m_buffer, v_buffer, beta1_power, beta2_power: beta2^(t+1) after t steps."""
        if "beta2_power" in state:  # which underflows after some 74,000 steps, when the correction is 1
            t = math.log(max(state["beta2_power"], 5e-324), group["beta2"]) - 1
            names = {"m_buffer": "momentum_buffer", "v_buffer": "second_moment"}
            state = {names.get(key, key): value for key, value in state.items() if "power" not in key}
            state["step"] = torch.tensor(t, dtype=torch.float32).round()
        return super()._translated_state(state, p, group, which)


def _rates_of(groups: list[dict]) -> set[float]:  # 0 for a tensor, which may be on a GPU
    return {0.0 if isinstance(group["lr"], Tensor) else float(group["lr"]) for group in groups}


def _check_options(group: dict, known: list[str]) -> None:
    for key in group.keys() - set(known):
        # Not a name of its own, such as a scheduler's initial_lr or max_momentum.
        if not any(key.startswith(f"{name}_") or key.endswith(f"_{name}") for name in known):
            close = ["epsilon"] if key == "eps" else difflib.get_close_matches(key, known, n=1, cutoff=0.79)
            if close and close[0] in known:
                raise ValueError(f"unknown option {key!r} of a parameter group; did you mean {close[0]!r}?")
    clip, momentum, on_grassmann = group["grad_clip"], group["momentum"], group["grassmann"]
    nesterov_fits = not group["nesterov"] or on_grassmann or (momentum != 0 and group["dampening"] == 0)
    beta1_fits = "beta2" not in group or not on_grassmann or momentum < 1
    for name, fits, need in (
        *((name, group[name] >= 0, "must not be negative") for name in ("lr", "weight_decay", "omega")),
        ("grad_clip", clip is None or clip > 0, "must be positive, or None for no clipping"),
        ("nesterov", nesterov_fits, "needs a momentum and no dampening"),
        ("beta2", 0 <= group.get("beta2", 0) < 1, "must be in [0, 1)"),
        ("epsilon", group.get("epsilon", 1) > 0, "must be positive"),
        ("momentum", momentum >= 0, "must not be negative"),
        ("momentum", beta1_fits, "beta1 of a group on G(1, n) must be below 1"),
    ):
        if not fits:
            raise ValueError(f"Invalid {name} value: {group[name]} ({need})")


def _check_rows(p: Tensor, omega: float, name: str = "a parameter") -> None:
    n, which = p.shape[1:].numel(), f"{name} of shape {tuple(p.shape)}"
    if n == 1 or p.is_complex():
        raise ValueError(f"grassmann=True needs real rows of at least two elements, got {which}, {p.dtype}")
    if not all(part.is_replicate() or part.is_shard(0) for part in getattr(p, "placements", ())):
        raise ValueError(f"grassmann=True needs whole rows, got {which}, {p.placements}")
    if omega > 0 and p.shape[0] > n:
        raise ValueError(f"omega={omega} needs at least as many elements as rows, got {which}: take omega=0")


# ------------------------------------------------------------------------------------ 4. a model's parameters
def grassmann_weights(
    model: nn.Module, select: str | Collection[str] = "shape", loss_fn: _Loss | None = None
) -> dict[str, nn.Parameter]:
    """Which of a model's trainable weights are on G(1, n), by name, tied ones once. Nothing is changed.

    Args:
        select: "shape", the authors' rule by module type, not by name: weights of Conv1d/2d/3d with fewer
            rows than elements in a row (warns of those left out as computed from other parameters:
            weight_norm, pruning, FSDP1). Or "measured": all that `scale_invariance(model, loss_fn)` finds
            invariant. Or the names of the weights.

    ValueError: another `select`, or one that does not go with `loss_fn`; a weight that is zero, so without
    directions (FSDP2's are gathered to see it), or that no gradient reaches to measure it.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"give the model itself, whose modules are looked at, not {type(model).__name__}")
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if lazy := [name for name, p in trainable.items() if is_lazy(p)]:
        raise ValueError(f"give the model a batch first, which shapes {', '.join(lazy)}")
    if select == "shape" and loss_fn is None:
        chosen = _weights_by_shape(model)
    elif select == "measured" and loss_fn is not None:
        measured = scale_invariance(model, loss_fn)
        if idle := [m.name for m in measured if math.isnan(m.cosine)]:
            raise ValueError(f"no gradient reaches {', '.join(idle)}: freeze it, or measure after a step")
        chosen = [m.name for m in measured if m.invariant]
    elif isinstance(select, str) or loss_fn is not None:
        raise ValueError(f"select: 'shape', names, 'measured' with loss_fn(model); not {select!r}, {loss_fn}")
    else:
        chosen = list(select)
        if unknown := sorted(set(chosen) - trainable.keys()):
            raise ValueError(f"select: the model has no trainable parameter {', '.join(unknown)}")
    weights = {name: p for name, p in trainable.items() if name in chosen}
    for name, p in weights.items():
        whole = p.full_tensor() if _is_sharded(p) and not p.is_meta else p
        if type(whole) in (Tensor, nn.Parameter) and not whole.is_meta and whole.numel() and not whole.any():
            raise ValueError(f"{name} is zero, without a direction: initialize it, or do not select it")
    return weights


def _weights_by_shape(model: nn.Module) -> list[str]:
    modules = [(name, module) for name, module in model.named_modules() if isinstance(module, _CONVOLUTIONS)]
    convolutions = {f"{name}.weight".removeprefix("."): m._parameters.get("weight") for name, m in modules}
    if computed := [name for name, p in convolutions.items() if p is None or p.ndim < 2]:
        why = "not on G(1, n), as computed from other parameters (weight_norm, pruning, FSDP1)"
        warnings.warn(f"{why}: {', '.join(computed)}", stacklevel=3)
    return [n for n, p in convolutions.items() if n not in computed and p.shape[0] < p.shape[1:].numel()]


def _normalize_rows(p: Tensor) -> None:
    weight = _local(p, p).detach()
    rows = _rows(weight, weight)
    y, length = unit(rows)
    # Rows that are unit but for rounding stay: groups made again, as to resume, change nothing.
    kept = (length - 1).abs() <= 16 * torch.finfo(p.dtype).eps
    stored = _stored(weight, weight)
    stored.copy_(torch.where(kept, rows, y).view(stored.shape))


def grassmann_param_groups(
    model: nn.Module, lr: float, lrg: float,
    *, momentum: float = 0.9, omega: float = 0.1, grad_clip: float | None = 0.1,
    weight_decay: float = 5e-4, bn_decay: float = 0.0,
    select: str | Collection[str] = "shape", loss_fn: _Loss | None = None,
) -> list[dict]:  # fmt: skip
    """Sort a model's trainable parameters into the authors' groups, named, ready for `SGDG` or `AdamG`.

        "grassmann"  `grassmann_weights(model, select, loss_fn)`: lrg, momentum, omega, grad_clip
        "bn_bias"    other parameters with fewer than two dimensions: lr, Nesterov momentum, bn_decay
        "other"      all else (also overcomplete convolutions): lr, Nesterov momentum, weight_decay

    Weights on G(1, n) with no fewer rows than elements in a row, whose rows cannot be orthogonal, make a
    group "grassmann_overcomplete" with omega = 0. Frozen parameters and empty groups are left out.

    Warning: makes the rows on G(1, n) unit, in place (zero rows stay zero), which changes what a trained
    network computes. Make the groups before a copy of the model and after `fully_shard`.

    lr, lrg: learning rates of the Euclidean groups and of the rows on G(1, n). momentum: of all groups. Other
    arguments, errors and warnings: as in `SGDG` and `grassmann_weights`; ValueError where nothing is chosen.
    """
    chosen = grassmann_weights(model, select, loss_fn)
    if not chosen and isinstance(select, str):
        seen = ", ".join(name for name, m in model.named_modules() if isinstance(m, _CONVOLUTIONS)) or "none"
        rule = f"no weight of Conv1d, Conv2d or Conv3d (here: {seen}) has fewer rows than elements in a row"
        way = "choose linear layers before a normalization by select='measured' with a loss_fn, or by name"
        raise ValueError(f"nothing for G(1, n): {'no weight is invariant' if loss_fn else f'{rule}; {way}'}")
    for name, p in chosen.items():
        _check_rows(p, omega=0.0, name=name)
        _normalize_rows(p)
    grassmann = {"lr": lrg, "momentum": momentum, "grassmann": True, "grad_clip": grad_clip}
    euclidean = {"lr": lr, "momentum": momentum, "grassmann": False, "nesterov": momentum > 0}
    options = {
        "grassmann": {**grassmann, "omega": omega},
        "grassmann_overcomplete": {**grassmann, "omega": 0.0},
        "bn_bias": {**euclidean, "weight_decay": bn_decay},
        "other": {**euclidean, "weight_decay": weight_decay},
    }
    groups: dict[str, list[Tensor]] = {name: [] for name in options}
    for name, p in model.named_parameters():
        if name in chosen:
            groups["grassmann" if p.shape[0] < p.shape[1:].numel() else "grassmann_overcomplete"].append(p)
        elif p.requires_grad:
            groups["bn_bias" if p.ndim < 2 else "other"].append(p)
    return [{"params": params, "name": name, **options[name]} for name, params in groups.items() if params]


class ScaleInvariance(NamedTuple):
    """What `scale_invariance` measured of one weight, as rows (rows, n)."""

    name: str
    shape: tuple[int, ...]
    cosine: float  # the largest |cos(w_i, g_i)| over the rows that have a gradient; nan if none has
    chance: float  # the largest that as many random gradients would give, about sqrt(2 ln(2 rows) / n)
    idle_rows: int  # rows without a gradient, or zero themselves
    invariant: bool  # cosine is far below chance


def scale_invariance(model: nn.Module, loss_fn: _Loss) -> list[ScaleInvariance]:
    """Measure which weights matter only through the directions of their rows, by a forward and backward pass.

    If the loss does not depend on the length of a row w, its gradient is orthogonal to w (Euler): the cosine
    is then rounding error and what a normalization's eps leaves, else as large as chance gives.

    model: any module in float32 or more, not sharded; in evaluation mode it is measured in training mode. Its
    buffers, gradients and modes, and torch's generators, are left as they were.
    loss_fn: the loss of a batch, `loss_fn(model)`, a scalar; called with autocast off.
    Returns an entry for each trainable weight that has rows of at least two elements.
    """
    trainable = [(name, p) for name, p in model.named_parameters() if p.requires_grad and p.numel()]
    if not (named := [(name, p) for name, p in trainable if p.shape[1:].numel() > 1]):
        return []
    if unfit := [name for name, p in named if p.dtype in _LOW_PRECISION or _is_sharded(p)]:
        raise ValueError(f"measure in float32 and before weights are sharded, not {', '.join(unfit)}")
    modes = [(module, module.training) for module in model.modules()]
    buffers = [(m, name, b, b.clone()) for m in model.modules() for name, b in m.named_buffers(recurse=False)]
    devices, device = {p.device.index for p in model.parameters() if p.is_cuda}, named[0][1].device.type
    try:
        with torch.random.fork_rng(devices), torch.enable_grad(), torch.autocast(device, enabled=False):
            loss = loss_fn(model if model.training else model.train())
            gradients = torch.autograd.grad(loss, [p for _, p in named], allow_unused=True)
    finally:
        for module, training in modes:
            module.training = training
        for module, name, buffer, before in buffers:
            setattr(module, name, buffer)  # forward may have put another one in its place
            buffer.copy_(before)
    return [_measure_cosine(name, p.detach(), g) for (name, p), g in zip(named, gradients, strict=True)]


def _measure_cosine(name: str, w: Tensor, g: Tensor | None) -> ScaleInvariance:
    shape, w = tuple(w.shape), w.flatten(1)
    g = torch.zeros_like(w) if g is None else g.flatten(1)
    active = (w != 0).any(1) & (g != 0).any(1)
    cosines = (unit(w)[0] * unit(g)[0]).sum(1).abs()[active]
    cosine = cosines.max().item() if len(cosines) else math.nan
    chance = min(1.0, math.sqrt(2 * math.log(2 * max(1, len(cosines))) / w.shape[1]))
    return ScaleInvariance(name, shape, cosine, chance, len(w) - len(cosines), cosine < 0.01 * chance)


# -------------------------------------------------------------------------------------- 5. fast paths
# The rules of section 2 once more, in place and with fewer passes over memory; M is tau or m:
#     g <- g + 2 omega (Y Y' - I) Y                                             by layers, _add_regularizer
#     y <- y / |y|;   h <- g - (y'g) y, twice;   h <- h min(1, nu / |h|)        by rows, the rest
#     SGD-G:   M <- momentum M - rate h;        s <- 1
#     Adam-G:  M <- beta1 M + (1 - beta1) h;    v <- beta2 v + (1 - beta2) h'h;   s <- -rate/sqrt(v + epsilon)
#     a <- s |M|                                                                the step is d = s M
#     y, M <- y cos a + M/|M| sin a,   M cos a - y |M| sin a                    Eq. 7, and Eq. 8 for M along d
# rate: lr, in Adam-G times its bias correction. On the CPU rows go in blocks that stay in the cache, on a
# GPU each in a program of a Triton kernel, which reads and writes its elements once.
_Layer = tuple[Tensor, Tensor, Tensor, Tensor | None]  # y, g, m (rows, n) and v (rows, 1), None for SGD-G


def _step_in_blocks(params, states: list[dict], rates: Tensor, *, omega, maximize, **options) -> None:
    """One step of weights of one device and type, in place: one by one, in blocks of rows (`_advance`)."""
    for p, state, rate in zip(params, states, rates, strict=True):
        (layer,) = _add_regularizer([p], [_layer(p, state, maximize)], omega)
        _advance(*layer, rate, **options)
        _put_back(p, state, layer)
        del layer  # before the next one's buffer is made


def _step_by_kernel(params, states: list[dict], rates: Tensor, *, omega, maximize, **options) -> None:
    """The same for float32 weights on a GPU, with the matrix products of all of them first."""
    layers = [_layer(p, state, maximize) for p, state in zip(params, states, strict=True)]
    layers = _add_regularizer(params, layers, omega)
    with torch.cuda.device_of(params[0]):
        for i, (p, state, layer) in enumerate(zip(params, states, layers, strict=True)):
            _launch(*layer, rates, i, **options)
            _put_back(p, state, layer)


def _suits_kernel(p: Tensor) -> bool:
    fits = p.dtype == torch.float32 and p.shape[1:].numel() <= _LONGEST_ROW
    works = p.device.type == _KERNEL_DEVICE and p.device not in _WITHOUT_KERNEL
    return fits and works and "_advance_kernel" in globals()


def _suits_fused_sgd(p: Tensor, state: dict) -> bool:
    """Whether torch's fused SGD takes the parameter as it is stored."""
    buffer = state.get("momentum_buffer")
    stored = [(t.stride(), t.dtype) for t in (p, p.grad, p if buffer is None else buffer)]
    dense = torch.empty_like(p, device="meta").stride() == p.stride()  # so zeros_like is stored as p is
    return p.is_cuda and p.is_floating_point() and not _is_sharded(p) and dense and len(set(stored)) == 1


def _arithmetic(p: Tensor) -> torch.dtype:
    """The type of a weight's state and arithmetic: float32 for narrower ones."""
    return torch.float32 if p.dtype in _LOW_PRECISION else p.dtype


def _stored(t: Tensor, weight: Tensor) -> Tensor:
    """t with its dimensions behind the rows in the order in which `weight` stores them (any order serves)."""
    return t.permute(0, *sorted(range(1, weight.ndim), key=weight.stride, reverse=True))


def _rows(t: Tensor, weight: Tensor) -> Tensor:
    """t as (rows, n): a view where it is stored as the weight is (contiguous, channels_last), else a copy."""
    return _stored(t, weight).reshape(t.shape[0], t.shape[1:].numel())


def _layer(p: Tensor, state: dict, maximize: bool) -> _Layer:
    """y, g, m and v of a weight as contiguous rows: views where possible."""
    dtype, weight = _arithmetic(p), _local(p, p)
    tensors = (_local(t, p) for t in (p, p.grad, state["momentum_buffer"]))
    y, g, m = (_rows(t, weight).to(dtype).contiguous() for t in tensors)
    v = state.get("second_moment")
    return y, -g if maximize else g, m, v if v is None else _local(v, p)


def _put_back(p: Tensor, state: dict, layer: _Layer) -> None:
    """Write y and m where `_layer` had to copy them."""
    for t, rows in ((p, layer[0]), (state["momentum_buffer"], layer[2])):
        if rows._base is None:  # no view
            stored = _stored(_local(t, p), _local(p, p))
            stored.copy_(rows.view(stored.shape))


def _add_regularizer(params: list[Tensor], layers: list[_Layer], omega: float) -> list[_Layer]:
    """The layers with g + omega * orthogonality_gradient(y) for g; makes the rows of each y unit, in place.

    Products of weights of one shape go together: one by one they are too small to fill a GPU.
    """
    layers, alike = list(layers), dict[torch.Size, list[int]]()
    for i, (y, g, m, v) in enumerate(layers if omega else []):
        if len(y):
            y.div_(_norms(y, least=_SHORT).clamp_(min=_ZERO_ROW))
        if _is_sharded(params[i]):
            layers[i] = y, _add_sharded_regularizer(params[i], y, g, omega), m, v
        else:
            alike.setdefault(y.shape, []).append(i)
    for indices in alike.values():
        first, *others = ys = [layers[i][0] for i in indices]
        buffer = torch.stack(ys) if others else torch.empty_like(first)[None]  # and then of the results
        gram = buffer @ buffer.mT if others else (first @ first.mT)[None]
        gram.diagonal(dim1=-2, dim2=-1).sub_(1)
        for i, e, out in zip(indices, gram, buffer, strict=True):
            y, g, m, v = layers[i]
            layers[i] = y, torch.addmm(g, e, y, alpha=2 * omega, out=out), m, v
    return layers


def _is_sharded(t: Tensor) -> bool:
    """Whether it is a DTensor (to import which takes half a second), as FSDP2's `fully_shard` makes."""
    return hasattr(t, "placements")


def _local(t: Tensor, weight: Tensor) -> Tensor:
    """The part of t that is in this process, where `weight` is sharded; else t."""
    if not _is_sharded(weight):
        return t
    if t.placements != weight.placements:
        t = t.redistribute(placements=weight.placements)
    return t.to_local()


def _sharded_as(weight: Tensor, local: Tensor) -> Tensor:
    """The rows of all processes, sharded as `weight`; `local`: those of this one, (its rows, n)."""
    whole = {"shape": torch.Size((weight.shape[0], local.shape[1])), "stride": (local.shape[1], 1)}
    return type(weight).from_local(local, weight.device_mesh, weight.placements, run_check=False, **whole)


def _add_sharded_regularizer(weight: Tensor, y: Tensor, g: Tensor, omega: float) -> Tensor:
    """This process's rows of g + omega * orthogonality_gradient(y), for which y, unit rows, is gathered."""
    from torch.distributed.tensor import Replicate

    everywhere = [Replicate()] * weight.device_mesh.ndim
    all_rows = torch.arange(weight.shape[0], device=y.device)
    numbers = type(weight).from_local(all_rows, weight.device_mesh, everywhere, run_check=False)
    numbers = numbers.redistribute(placements=weight.placements).to_local()  # of this process's rows
    whole = _sharded_as(weight, y).full_tensor()
    gram = y @ whole.mT
    gram.scatter_add_(1, numbers[:, None], gram.new_full((len(y), 1), -1))
    return torch.addmm(g, gram, whole, alpha=2 * omega)


_BLOCK = 2**18  # elements: blocks of y, g, M and scratch stay in the cache
_SHORT, _LONG = 1e-15, 1e18  # the squares of a shorter or longer row may under- or overflow in float32
_ZERO_ROW, _ZERO_MOMENTUM = 1e-30, 1e-18  # divisors instead of lengths of 0
_CANCELLED = 8  # |y'g| / |h| beyond which the first projection lost so many digits that a second one matters


def _advance(y, g, m, v, rate, *, decay, beta2=0.0, epsilon=0.0, grad_clip=None) -> None:
    """`sgdg_update` (v is None) or `adamg_update` without regularizer, in place, in blocks of rows.

    y, g, m: (rows, n) of one floating-point type; g is read only. v: (rows, 1). rate: a number or 0-dim.
    decay: momentum or beta1. beta2, epsilon: of Adam-G only.
    """
    size = max(1, _BLOCK // y.shape[1])
    scratch = torch.empty_like(y[:size], memory_format=torch.contiguous_format)
    for i in range(0, len(y), size):
        y_, g_, m_ = (t[i : i + size] for t in (y, g, m))
        inverse = _norms(y_, least=_SHORT).clamp_(min=_ZERO_ROW).reciprocal_()
        h, h_norm = _tangent(y_, g_, inverse, out=scratch[: len(y_)])
        clip = torch.ones_like(h_norm) if grad_clip is None else grad_clip / h_norm.clamp(min=grad_clip)
        if v is None:
            gain, scale = clip * -rate, 1.0
        else:
            h_norm.mul_(clip)
            v_ = v[i : i + size].mul_(beta2).addcmul_(h_norm, h_norm, value=1 - beta2)
            gain, scale = clip * (1 - decay), -rate / (v_ + epsilon).sqrt_()
        m_.mul_(decay).addcmul_(h, gain)
        m_norm = _norms(m_)
        angle = m_norm * scale
        sin, cos = angle.sin(), angle.cos()
        back = torch.mul(y_, sin * inverse * m_norm, out=h)  # what turns back along y; h has been used
        y_.mul_(inverse * cos).addcmul_(m_, sin / m_norm.clamp(min=_ZERO_MOMENTUM))
        m_.mul_(cos).sub_(back)


def _tangent(y: Tensor, g: Tensor, inverse: Tensor, out: Tensor) -> tuple[Tensor, Tensor]:
    """h = project(y/|y|, g), written to `out`, and |h|; inverse: 1/|y|."""
    along = torch.mul(y, g, out=out).sum(1, keepdim=True).mul_(inverse)
    h = torch.addcmul(g, y, along * inverse, value=-1, out=out)
    h_norm = _norms(h)
    # As in `project`, a second time; where a look at the values is cheap, only if it matters.
    if not _is_on_host(h) or (along.abs_() > _CANCELLED * h_norm).any():
        along = (y * h).sum(1, keepdim=True).mul_(inverse)
        h.addcmul_(y, along.mul_(inverse), value=-1)
        h_norm = _norms(h)
    return h, h_norm


def _norms(x: Tensor, least: float = 0.0) -> Tensor:
    """|x| row by row, (rows, 1), also where float32 squares overflow or, below `least`, underflow."""
    if not _is_on_host(x):  # a look would wait
        if x.dtype == torch.float32 and x.is_cuda:  # which has float64, as not every device
            return torch.linalg.vector_norm(x, dim=1, keepdim=True, dtype=torch.float64).float()
        return unit(x)[1]
    norms = torch.linalg.vector_norm(x, dim=1, keepdim=True)
    low, high = norms.aminmax()
    return norms if high.item() < _LONG and low.item() >= least else unit(x)[1]


def _is_on_host(t: Tensor) -> bool:
    """Whether t has values (is not fake) that can be read without waiting for a device."""
    return t.is_cpu and type(t) in (Tensor, nn.Parameter)


_LONGEST_ROW = 8192  # elements that a program of the kernel holds in registers; longer rows go in blocks
_KERNEL_DEVICE = "cuda" if importlib.util.find_spec("triton") else None  # torch brings it for a GPU
_BLOCKS_INSTEAD = """Steps go on in blocks of rows, slower, with the same results. The kernel needs a C \
compiler, Python's headers (python3-dev), a folder to write to (TRITON_CACHE_DIR) and a GPU it knows."""
_LAUNCHED: set[tuple] = set()  # device, length of a row, method, clipping: of the kernels launched so far
_WITHOUT_KERNEL: set[torch.device] = set()  # where the first launch of one failed


def _launch(y, g, m, v, rates, layer, *, decay, beta2=0.0, epsilon=0.0, grad_clip=None) -> None:
    """`_advance` by a Triton kernel; y, g, m: contiguous float32, n <= _LONGEST_ROW; rate: rates[layer].

    What stops a kernel from being built or launched the first time has changed nothing: the blocks take over.
    """
    rows, n = y.shape
    kernel, size = (y.device, n, v is None, grad_clip is None), 1 << (n - 1).bit_length()
    try:
        if rows and y.device not in _WITHOUT_KERNEL:
            # Not by name: cloudpickle would take the kernel along, which cannot be pickled.
            globals()["_advance_kernel"][(rows,)](
                y, g, m, v, rates, layer, n, float(decay), 1.0 - decay, float(beta2), 1.0 - beta2,
                float(epsilon), float(grad_clip or 0), ADAM=v is not None, CLIP=grad_clip is not None,
                SIZE=size, num_warps=max(1, min(16, size // 512)), enable_fp_fusion=True,
            )  # fmt: skip
            _LAUNCHED.add(kernel)
            return
    except Exception as error:
        if kernel in _LAUNCHED:
            raise
        if not _WITHOUT_KERNEL:
            why = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
            warnings.warn(f"no Triton kernel on {y.device} ({why}). {_BLOCKS_INSTEAD}", stacklevel=2)
        _WITHOUT_KERNEL.add(y.device)
    _advance(y, g, m, v, rates[layer], decay=decay, beta2=beta2, epsilon=epsilon, grad_clip=grad_clip)


if _KERNEL_DEVICE:
    import triton
    import triton.language as tl

    @triton.jit
    def _norm(x):
        """|x| by float64 squares, which neither overflow nor underflow."""
        x = x.to(tl.float64)
        return tl.sqrt(tl.sum(x * x, 0)).to(tl.float32)

    @triton.jit(do_not_specialize=["layer"])
    def _advance_kernel(
        y_at, g_at, m_at, v_at, rates, layer, n, decay, rest, beta2, rest2, epsilon, grad_clip,
        ADAM: tl.constexpr, CLIP: tl.constexpr, SIZE: tl.constexpr,
    ):  # fmt: skip
        """`_advance` for a row, in registers. rest, rest2: 1 - decay, 1 - beta2. SIZE: a power of 2 >= n."""
        row = tl.program_id(0).to(tl.int64)
        y_at, g_at, m_at = y_at + row * n, g_at + row * n, m_at + row * n
        columns = tl.arange(0, SIZE)
        inside = columns < n
        y = tl.load(y_at + columns, inside, 0.0)
        g = tl.load(g_at + columns, inside, 0.0)
        m = tl.load(m_at + columns, inside, 0.0)
        y_norm = _norm(y)
        y = y / tl.where(y_norm > 0, y_norm, 1.0)
        h = g - tl.sum(y * g, 0) * y
        h = h - tl.sum(y * h, 0) * y
        h_norm = _norm(h)
        clip = 1.0
        if CLIP:
            clip = grad_clip / tl.maximum(h_norm, grad_clip)
        rate = tl.load(rates + layer)
        gain = -rate * clip
        scale = 1.0
        if ADAM:
            v = beta2 * tl.load(v_at + row) + rest2 * (h_norm * clip) * (h_norm * clip)
            tl.store(v_at + row, v)
            gain = rest * clip
            scale = -rate / tl.sqrt(v + epsilon)
        m = decay * m + gain * h
        m_norm = _norm(m)
        angle = m_norm * scale
        sin, cos = tl.sin(angle), tl.cos(angle)
        to_y = tl.where(m_norm > 0, sin / tl.where(m_norm > 0, m_norm, 1.0), scale)  # sin a / |M|, or s
        tl.store(y_at + columns, y * cos + m * to_y, inside)
        tl.store(m_at + columns, m * cos - y * (m_norm * sin), inside)
