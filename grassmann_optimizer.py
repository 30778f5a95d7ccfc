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

__all__ = ["SGDG", "AdamG", "ScaleInvariance", "grassmann_param_groups", "grassmann_weights",
           "scale_invariance", "unit"]  # fmt: skip
_Loss = Callable[[nn.Module], Tensor]
_OF_ROWS = {"omega": 0, "grad_clip": None, "beta2": 0.99, "epsilon": 1e-8}  # on G(1, n) only, with defaults
_NO_ROWS = "no group has grassmann=True: give the optimizer grassmann_param_groups(model, lr, lrg)"


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

    def __init__(self, params, defaults: dict):
        _check_options(defaults, known=list(defaults))
        super().__init__(params, defaults)
        if not any(group["grassmann"] for group in self.param_groups):
            given = {k for g in self.param_groups for k in _OF_ROWS.keys() & g.keys() if g[k] != _OF_ROWS[k]}
            _refuse(f"{_NO_ROWS}, without which nothing obeys", given)

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

    # Opaque to torch.compile, which mishandles results written in place (torch 2.13 and 2.15). The public
    # torch.compiler.disable does the same, but hides the method's type and takes over a second to import.
    @torch._disable_dynamo
    @torch.no_grad()
    def step(self, closure=None):
        """One step of every group; returns the closure's loss. Gradients are read only."""
        if not (any(group["grassmann"] for group in self.param_groups) or vars(self).get("_has_warned")):
            self._has_warned = True
            warnings.warn(f"steps of plain SGD: {_NO_ROWS}", stacklevel=6)
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            (self._step_on_grassmann if group["grassmann"] else self._step_sgd)(params, group)
        return loss

    def _step_on_grassmann(self, params: list[Tensor], group: dict) -> None:
        if any(p.grad.is_sparse or p.is_complex() for p in params):
            raise RuntimeError("a parameter on G(1, n) needs a dense, real gradient")
        alike: dict[tuple, list[Tensor]] = {}
        for p in params:
            if p.numel():
                alike.setdefault((p.device, p.dtype, _suits_kernel(p)), []).append(p)
                self._init_state(p, self.state[p])
        # At a rate of 0, where that is known here, rows that do not turn keep their lengths too.
        still = (not isinstance(group["lr"], Tensor) or _is_readable(group["lr"])) and group["lr"] == 0
        before = [(p, _local(p, p).clone()) for p in params if still and p.numel()]
        options = {name: group[name] for name in ("maximize", *_OF_ROWS) if name in group}
        options["decay"] = group["momentum"]
        for (device, _, by_kernel), some in alike.items():
            states = [self.state[p] for p in some]
            with torch.autocast("cpu" if device.type == "meta" else device.type, enabled=False):
                rates = self._rates(some, group)
                if by_kernel:
                    tables = vars(self).setdefault("_tables", {})  # neither copied nor pickled
                    _step_by_kernel(some, states, rates, tables=tables, group=id(group), **options)
                else:
                    _step_in_blocks(some, states, rates, **options)
        for p, rows in before:
            m = _local(self.state[p]["momentum_buffer"], p)
            turned = (m != 0).any(list(range(1, m.ndim)), keepdim=True)
            turned &= "second_moment" not in self.state[p]  # Adam-G's rate multiplies its momentum
            _local(p, p).copy_(torch.where(turned, _local(p, p), rows))

    def _init_state(self, p: Tensor, state: dict) -> None:
        """Fill in what the state of a weight on G(1, n) lacks; ValueError where it is another weight's."""
        if state.get("momentum_buffer") is None:
            state["momentum_buffer"] = torch.zeros_like(p, dtype=_arithmetic(p))
        if state["momentum_buffer"].shape != p.shape:
            found = f"a weight {tuple(p.shape)} has a state {tuple(state['momentum_buffer'].shape)}"
            raise ValueError(f"{found}: cut optimizer.state[weight] as the weight was, or delete it")

    def _state_shapes(self, p: Tensor) -> dict[str, tuple[int, ...]]:
        adam = {"second_moment": (*p.shape[:1], 1), "step": ()} if "beta2" in self.defaults else {}
        return {"momentum_buffer": tuple(p.shape), **adam}

    def _rates(self, params: list[Tensor], group: dict) -> Tensor:
        """The lr of each weight, in Adam-G times its bias correction: (weights,), on their device."""
        like = {"dtype": _arithmetic(params[0]), "device": params[0].device}
        lr = group["lr"]
        lr = lr.to(**like, non_blocking=True) if isinstance(lr, Tensor) else torch.full((), lr, **like)
        return lr.reshape(()).repeat(len(params))

    def _step_sgd(self, params: list[Tensor], group: dict) -> None:
        states = [self.state[p] for p in params]
        sparse, lr = any(p.grad.is_sparse for p in params), group["lr"]
        # Fused where it is one launch: on a GPU, for tensors stored alike. A buffer of zeros beforehand is
        # torch's first step if nothing is dampened, and lets a CUDA graph hold the step.
        alike = bool(params) and all(map(_suits_fused_sgd, params, states))
        fused = alike and not sparse and not group["dampening"]
        if fused:
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

        Takes the state of the authors' PyTorch optimizer of the same kind too, weight by weight in order. The
        state of another optimizer or of weights of other shapes is a ValueError, which changes nothing.
        """
        loaded: dict = {}  # what the user's hooks have made of state_dict, in our terms

        def adapt(_, given: dict) -> dict:
            try:
                loaded.update(self._adapted(given))
            except (AttributeError, RuntimeError, TypeError) as error:  # a value of another type
                raise ValueError(f"not the state of {type(self).__name__}: {error}") from error
            return loaded

        handle = self.register_load_state_dict_pre_hook(adapt)  # the last of them
        try:
            super().load_state_dict(state_dict)
        finally:
            handle.remove()
        ids = [i for group in loaded["param_groups"] for i in group["params"]]
        params = [(p, group["grassmann"]) for group in self.param_groups for p in group["params"]]
        for i, (p, grassmann) in zip(ids, params, strict=True):
            for key, value in loaded["state"].get(i, {}).items():
                if grassmann and (key == "step" or p.dtype in _LOW_PRECISION):
                    self.state[p][key] = value.to(p.device, torch.float32, copy=True)

    def _adapted(self, given: dict) -> dict:
        """A state dict in our terms; ValueError where it cannot be one of this optimizer."""
        _refuse("not the state of an optimizer: it has no", {"param_groups", "state"} - given.keys())
        # The authors' optimizers cannot maximize.
        groups = [{**group, "maximize": group.get("maximize", False)} for group in given["param_groups"]]
        kind = f"not the state of {type(self).__name__}"
        needed = {*self.defaults, "params"} - {"differentiable"}  # which torch adds to a copy's defaults
        for i, group in enumerate(groups):
            _refuse(f"{kind}: parameter group {i} has no", needed - group.keys())
            _refuse(f"{kind}: parameter group {i} has", group.keys() & _OF_ROWS.keys() - self.defaults.keys())
            _check_options(group, known=[*self.defaults, "params"])
        # None where there is none: of a ZeroRedundancyOptimizer.
        states = {i: state for i, state in given["state"].items() if state is not None}
        adapted = {**given, "param_groups": groups, "state": states}
        if [len(g["params"]) for g in groups] != [len(g["params"]) for g in self.param_groups]:
            return adapted  # torch refuses it
        for group, own in zip(groups, self.param_groups, strict=True):
            for i, p in zip(group["params"], own["params"], strict=True):
                if group["grassmann"]:
                    _check_rows(p, group["omega"])
                if state := states.get(i):
                    states[i] = self._adapted_state(state, p, group, f"{kind}: parameter {i}")
        return adapted

    def _adapted_state(self, state: dict, p: Tensor, group: dict, where: str) -> dict:
        """A parameter's state in our terms; `where` begins the error's sentence."""
        shapes = self._state_shapes(p)
        if group["grassmann"]:
            _refuse(f"{where} has no", shapes.keys() - state.keys())
            rows = state["momentum_buffer"]
            if isinstance(rows, Tensor) and rows.shape == (p.shape[0], p.shape[1:].numel()):
                state = {**state, "momentum_buffer": rows.reshape(p.shape)}
        _refuse(f"{where} has an unknown entry", state.keys() - shapes.keys())
        for key, value in state.items():
            found = tuple(value.shape) if isinstance(value, Tensor) else value
            if found != shapes[key] and (value is not None or group["grassmann"]):  # None: an older torch's
                raise ValueError(f"{where} has {key!r} {found}, where shape {shapes[key]} is needed")
            if shapes[key] and value is not None and _placements(value) != _placements(p):
                raise ValueError(f"{where} has {key!r} not sharded like it: use torch.distributed.checkpoint")
        return state


def _refuse(why: str, names: Collection[str]) -> None:
    if names:
        raise ValueError(f"{why} {', '.join(map(repr, sorted(names)))}")


class SGDG(_GrassmannOptimizer):
    """SGD with momentum on the product of G(1, n)s, one for each row of a weight: the paper's SGD-G.

    A group with `grassmann=True` moves the rows of its weights (dimension 0 counts the rows) along geodesics;
    any other is plain SGD with momentum. For weights whose length does not matter, as those that feed a batch
    normalization; `grassmann_param_groups` sorts a model's parameters.

    Args:
        params: parameters, or groups of them with options of their own.
        lr: learning rate; on G(1, n) the angle in radians that a gradient of length 1 moves a row.
        momentum: of both kinds of groups. dampening, weight_decay, nesterov: other groups only.
        grassmann: whether a group's rows are points of G(1, n).
        omega: orthogonality regularizer (omega/2) ||Y Y' - I||_F^2 of each weight on G(1, n); 0: none.
        grad_clip: largest length of a row's gradient on G(1, n); None: no limit.
        maximize: ascend the loss (the regularizer is minimized all the same).

    ValueError: an option out of range or misspelt; `grassmann=True` on a parameter without rows of at least
    two elements, or with omega > 0 and more rows than a row has elements; omega or grad_clip where nothing is
    on G(1, n) (without them the first step warns).

    On G(1, n) the state is `momentum_buffer` (tau, shaped as the weight), and:
    - The first step makes rows unit, except where a rate of 0 moves nothing (a rate that is a tensor on a GPU
      is not looked at). A zero row stays zero until a gradient comes, and then becomes its step's direction:
      pruned rows come back at full length.
    - The momentum holds steps, with the rate inside: after a drop of the rate rows go on at the old one for
      about 1/(1 - momentum) steps, and lr = 0 does not stop them. To stop a layer, leave it without
      gradients: `weight.requires_grad_(False)` and `zero_grad()`.
    - One NaN in a gradient makes its row NaN, and with omega > 0 in the next step the whole weight.
    - FSDP2's weights are taken; with omega > 0 each step gathers each of them.
    """

    def __init__(
        self, params, lr: float | Tensor = 1e-3, momentum: float = 0, dampening: float = 0,
        weight_decay: float = 0, nesterov: bool = False, grassmann: bool = False,
        omega: float = 0, grad_clip: float | None = None, *, maximize: bool = False,
    ):  # fmt: skip
        everywhere = dict(lr=lr, momentum=momentum, grassmann=grassmann, maximize=maximize)
        euclidean = dict(dampening=dampening, weight_decay=weight_decay, nesterov=nesterov)
        super().__init__(params, dict(**everywhere, **euclidean, omega=omega, grad_clip=grad_clip))


class AdamG(_GrassmannOptimizer):
    """Adam on the product of G(1, n)s, with one adaptive scale for each row of a weight: the paper's Adam-G.

    Groups, errors and what is said of rows are as in `SGDG`; any other group is plain SGD with momentum.

    Args:
        params, lr, dampening, weight_decay, nesterov, grassmann, omega, grad_clip, maximize: as in `SGDG`.
        momentum: on G(1, n) beta1, decay of the first moment, in [0, 1); of other groups SGD's.
        beta2, epsilon: decay of the second moment, in [0, 1), and what is added to it before the root is
            taken, positive; on G(1, n) only.

    State on G(1, n): `momentum_buffer` (m, shaped as the weight), `second_moment` (v, (rows, 1)), `step`
    (0-dim, float32). Here lr = 0 does stop a row. Without clipping, a gradient beyond 1e19 makes a row's
    second moment infinite in float32: the row then stays put.
    """

    def __init__(
        self, params, lr: float | Tensor = 1e-3, momentum: float = 0, dampening: float = 0,
        weight_decay: float = 0, nesterov: bool = False, grassmann: bool = False, beta2: float = 0.99,
        epsilon: float = 1e-8, omega: float = 0, grad_clip: float | None = None, *, maximize: bool = False,
    ):  # fmt: skip
        everywhere = dict(lr=lr, momentum=momentum, grassmann=grassmann, maximize=maximize)
        euclidean = dict(dampening=dampening, weight_decay=weight_decay, nesterov=nesterov)
        rows = dict(omega=omega, grad_clip=grad_clip, beta2=beta2, epsilon=epsilon)
        super().__init__(params, {**everywhere, **euclidean, **rows})

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

    def _adapted_state(self, state: dict, p: Tensor, group: dict, where: str) -> dict:
        """Also takes the authors' m_buffer, v_buffer, beta1_power, beta2_power: beta^(t+1) after t steps."""
        theirs = ("m_buffer", "v_buffer", "beta1_power", "beta2_power")
        if group["grassmann"] and any(name in state for name in theirs):
            _refuse(f"{where} has no", set(theirs) - state.keys())
            m, v, power1, power2 = (state[name] for name in theirs)
            beta1, beta2 = group["momentum"], group["beta2"]
            step = round(math.log(power2, beta2)) - 1 if 0 < power2 < 1 and beta2 else -1
            for name, power, beta in (("beta2_power", power2, beta2), ("beta1_power", power1, beta1)):
                # Below 1e-300 a power has lost its digits, and Adam-G's correction is 1.
                if step < 0 or not math.isclose(power, beta ** (step + 1), rel_tol=1e-6, abs_tol=1e-300):
                    raise ValueError(f"{where} has {name!r} {power}, not {beta} to the number of a step")
            others = {key: value for key, value in state.items() if key not in theirs}
            t = torch.tensor(step, dtype=torch.float32)
            state = {"momentum_buffer": m, "second_moment": v, "step": t, **others}
        return super()._adapted_state(state, p, group, where)


def _check_options(group: dict, known: list[str]) -> None:
    for key in group.keys() - set(known):
        if any(key.startswith(f"{name}_") or key.endswith(f"_{name}") for name in known):
            continue  # a name of its own, such as a scheduler's initial_lr or max_momentum
        close = difflib.get_close_matches(key, known, n=1, cutoff=0.79)
        if close := close or [name for name in known if (key, name) == ("eps", "epsilon")]:
            raise ValueError(f"unknown option {key!r} of a parameter group; did you mean {close[0]!r}?")
    if isinstance(group["lr"], Tensor) and group["lr"].numel() != 1:
        raise ValueError(f"Invalid lr value: {group['lr']} (a tensor must be 1-element)")
    clip, momentum, on_grassmann = group["grad_clip"], group["momentum"], group["grassmann"]
    at_least_0 = ("lr", "momentum", "weight_decay", "omega")
    fits = not group["nesterov"] or on_grassmann or (momentum != 0 and group["dampening"] == 0)
    got = f"got momentum={momentum}, dampening={group['dampening']}"
    needs = [
        *((name, group[name] >= 0, "must not be negative") for name in at_least_0),
        ("grad_clip", clip is None or clip > 0, "must be positive, or None for no clipping"),
        ("nesterov", fits, f"needs a momentum and no dampening, {got}"),
        ("beta2", 0 <= group.get("beta2", 0) < 1, "must be in [0, 1)"),
        ("epsilon", group.get("epsilon", 1) > 0, "must be positive"),
    ]
    if "beta2" in group and on_grassmann:
        needs.append(("momentum", momentum < 1, "beta1 of a group on G(1, n) must be below 1"))
    for name, fulfilled, need in needs:
        if not fulfilled:
            raise ValueError(f"Invalid {name} value: {group[name]} ({need})")


def _check_rows(p: Tensor, omega: float) -> None:
    which = f"of shape {tuple(p.shape)}"
    if p.ndim < 2:
        raise ValueError(f"grassmann=True needs parameters with two or more dimensions, got one {which}")
    if not all(part.is_replicate() or part.is_shard(0) for part in getattr(p, "placements", ())):
        raise ValueError(f"grassmann=True needs whole rows, got a parameter {which}, {p.placements}")
    if (n := p.shape[1:].numel()) == 1:
        raise ValueError(f"grassmann=True needs rows of at least two elements, got a parameter {which}")
    if omega > 0 and p.shape[0] > n:
        need = f"omega={omega} asks for orthogonal rows, but a parameter {which} has {p.shape[0]} rows of {n}"
        raise ValueError(f"{need} elements; give it a group with omega=0")


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

    ValueError: another `select`, or one that does not go with `loss_fn`; a parameter without a shape yet
    (lazy); a weight that is zero, so without directions (FSDP2's are gathered to see it), or that no gradient
    reaches to measure it.
    """
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    _refuse("give the model a batch first, uninitialized:", [n for n, p in trainable.items() if is_lazy(p)])
    if select == "shape" and loss_fn is None:
        chosen = _weights_by_shape(model)
    elif select == "measured" and loss_fn is not None:
        measured = scale_invariance(model, loss_fn)
        remedy = "measure after a step or without scales of 0, and freeze what is unused; no gradient:"
        _refuse(remedy, [m.name for m in measured if math.isnan(m.cosine)])
        chosen = [m.name for m in measured if m.invariant]
    elif isinstance(select, str) or loss_fn is not None:
        got = f"got {select!r}, loss_fn={loss_fn}"
        raise ValueError(f"select must be 'shape', names of weights, or 'measured' with a loss_fn; {got}")
    else:
        chosen = list(select)
        _refuse("select: no trainable parameter", set(chosen) - trainable.keys())
    weights = {name: p for name, p in trainable.items() if name in chosen}
    known = [(n, p) for n, p in weights.items() if type(p) is nn.Parameter and not p.is_meta and p.numel()]
    known += [(n, p.full_tensor()) for n, p in weights.items() if _is_sharded(p) and not p.is_meta]
    _refuse("initialize, or do not select, what has no direction:", [n for n, p in known if not p.any()])
    return weights


def _weights_by_shape(model: nn.Module) -> list[str]:
    types = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
    modules = [(name, module) for name, module in model.named_modules() if isinstance(module, types)]
    convolutions = {f"{name}.weight".removeprefix("."): m._parameters.get("weight") for name, m in modules}
    if computed := [name for name, p in convolutions.items() if p is None or p.ndim < 2]:
        why = "not on G(1, n), as computed from other parameters (weight_norm, pruning, FSDP1)"
        warnings.warn(f"{why}: {', '.join(computed)}", stacklevel=3)
    return [name for name, p in convolutions.items() if name not in computed and _is_undercomplete(p)]


def _is_undercomplete(p: Tensor) -> bool:
    return p.shape[0] < p.shape[1:].numel()


@torch.no_grad()
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

    Warning: sets the rows of the Grassmann weights to unit length, in place (zero rows stay zero), which
    changes what a trained network computes: in evaluation mode the running averages of a following batch
    normalization belong to the old lengths until training renews them; where none follows (a residual block's
    last convolution) the output itself changes. So make the groups before a copy of the model that averages
    weights (EMA, SWA), and after what replaces parameters (`fully_shard`). Tools that set one rate for all
    groups (SWALR, OneCycleLR or CyclicLR with a number) erase lrg: give them a list of rates.

    lr, lrg: learning rates of the Euclidean groups and of the rows on G(1, n). momentum: of all groups. Other
    arguments, errors and warnings: as in `SGDG` and `grassmann_weights`.
    """
    chosen = grassmann_weights(model, select, loss_fn)
    for p in chosen.values():
        _check_rows(p, omega=0.0)
        weight = _local(p, p)
        rows = _rows(weight, weight)
        y, length = unit(rows)
        # Rows that are unit but for rounding stay: groups made again, as to resume, change nothing.
        kept = (length - 1).abs() <= 16 * torch.finfo(p.dtype).eps
        _write_rows(weight, weight, torch.where(kept, rows, y))
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
            groups["grassmann" if _is_undercomplete(p) else "grassmann_overcomplete"].append(p)
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

    If the loss does not depend on the length of a row w, its gradient is orthogonal to w (Euler's theorem for
    functions homogeneous of degree 0): cos(w, g) is then rounding error and what a normalization's eps
    leaves, else as large as chance gives. (So weights whose outputs vary by little more than eps are not
    invariant, and are not found to be.)

    model: any module in float32 or more, not sharded. Its buffers, gradients and modes, and torch's
    generators, are left as they were. If it is in training mode its parts keep their modes (as a frozen batch
    normalization), else all are in training mode for the measurement.
    loss_fn: the loss of a batch, `loss_fn(model)`, a scalar; called with autocast off.

    Returns an entry for each trainable weight with two or more dimensions and rows of at least two elements.
    """
    trainable = [(name, p) for name, p in model.named_parameters() if p.requires_grad and p.numel()]
    if not (named := [(name, p) for name, p in trainable if p.shape[1:].numel() > 1]):
        return []
    unfit = [name for name, p in named if p.dtype in _LOW_PRECISION or _is_sharded(p)]
    _refuse("measure in float32, and before weights are sharded:", unfit)
    modes = [(module, module.training) for module in model.modules()]
    buffers = [(m, name, b, b.clone()) for m in model.modules() for name, b in m.named_buffers(recurse=False)]
    devices = {p.device.index for p in model.parameters() if p.is_cuda}
    try:
        generators, device = torch.random.fork_rng(devices=sorted(devices)), named[0][1].device.type
        with generators, torch.enable_grad(), torch.autocast(device, enabled=False):
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
    shape, w = tuple(w.shape), w.flatten(1).double()
    g = torch.zeros_like(w) if g is None else g.flatten(1).double()
    active = (w != 0).any(1) & (g != 0).any(1)
    cosines = (unit(w)[0] * unit(g)[0]).sum(1).abs()[active]
    cosine = cosines.max().item() if len(cosines) else math.nan
    chance = min(1.0, math.sqrt(2 * math.log(2 * max(1, len(cosines))) / w.shape[1]))
    return ScaleInvariance(name, shape, cosine, chance, len(w) - len(cosines), cosine < 0.01 * chance)


# -------------------------------------------------------------------------------------- 5. fast paths
# The rules of section 2 once more, in place and with fewer passes over memory. Both algorithms at once, with
# the momentum M (tau or m):
#     M <- decay M + gain h;   a = s |M|;   y <- y cos a + M/|M| sin a;   M <- M cos a - y |M| sin a
# where SGD-G has gain = -lr and s = 1, Adam-G gain = 1 - b1 and s = -lr correction / sqrt(v + epsilon). The
# step is d = s M, so a is |d| with the sign of s, and the last formula is Eq. 8 for an M parallel to d.
# `rate` is lr (SGD-G) or lr * correction (Adam-G); v is None for SGD-G.
_Layer = tuple[Tensor, Tensor, Tensor, Tensor | None]  # y, g, m (rows, n) and v (rows, 1), None for SGD-G
_LOW_PRECISION = (torch.float16, torch.bfloat16)


def _step_in_blocks(params, states: list[dict], rates: Tensor, *, omega, maximize, **options) -> None:
    """One step of weights of one device and type, in place: one by one, in blocks of rows (`_advance`)."""
    for p, state, rate in zip(params, states, rates, strict=True):
        (layer,) = _add_regularizer([p], [_layer(p, state, maximize)], omega)
        _advance(*layer, rate, **options)
        _put_back(p, state, layer)
        del layer  # before the next one's buffer is made


def _step_by_kernel(params, states, rates, *, tables, group, omega, maximize, **options) -> None:
    """The same for float32 weights on a GPU: all rows of all weights in one launch (`_advance_all`)."""
    layers = [_layer(p, state, maximize) for p, state in zip(params, states, strict=True)]
    layers = _add_regularizer(params, layers, omega)
    with torch.cuda.device_of(params[0]):
        _advance_all(layers, rates, *_device_tables(tables, layers, group), **options)
    for p, state, layer in zip(params, states, layers, strict=True):
        _put_back(p, state, layer)


def _suits_kernel(p: Tensor) -> bool:
    fits = p.dtype == torch.float32 and p.shape[1:].numel() <= _LONGEST_ROW
    fits = fits and p.device.type == _KERNEL_DEVICE and p.device not in _WITHOUT_KERNEL
    return fits and "_advance_kernel" in globals()


def _suits_fused_sgd(p: Tensor, state: dict) -> bool:
    """Whether torch's fused SGD takes the parameter as it is stored."""
    buffer = state.get("momentum_buffer")
    stored = [(t.stride(), t.dtype) for t in (p, p.grad, p if buffer is None else buffer)]
    dense = torch.empty_like(p, device="meta").stride() == p.stride()  # so zeros_like is stored as p is
    return p.is_cuda and p.is_floating_point() and not _is_sharded(p) and dense and len(set(stored)) == 1


def _arithmetic(p: Tensor) -> torch.dtype:
    """The type of a weight's state and arithmetic: float32 for narrower ones."""
    return torch.float32 if p.dtype in _LOW_PRECISION else p.dtype


def _rows(t: Tensor, weight: Tensor) -> Tensor:
    """t as (rows, n), the elements of a row in the order in which `weight` stores them; any order serves.

    A view where t is stored as the weight is (contiguous, channels_last or any other order), else a copy.
    """
    return t.permute(0, *_storage_order(weight)).reshape(t.shape[0], t.shape[1:].numel())


def _write_rows(t: Tensor, weight: Tensor, rows: Tensor) -> None:
    """The inverse of `_rows`: fill t, in place, from rows (rows, n)."""
    stored = t.permute(0, *_storage_order(weight))
    stored.copy_(rows.view(stored.shape))


def _storage_order(weight: Tensor) -> list[int]:
    return sorted(range(1, weight.ndim), key=weight.stride, reverse=True)


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
            _write_rows(_local(t, p), _local(p, p), rows)


def _add_regularizer(params: list[Tensor], layers: list[_Layer], omega: float) -> list[_Layer]:
    """The layers with g + omega * orthogonality_gradient(y) for g; makes the rows of each y unit, in place.

    Needs one buffer of the size of the weights of one shape: for the stacked y of the first products, which
    are too small to fill a GPU one by one, and then for the results.
    """
    layers, alike = list(layers), dict[torch.Size, list[int]]()
    for i, (y, g, m, v) in enumerate(layers if omega else []):
        if len(y):
            y.div_(_lengths(y))
        if _is_sharded(params[i]):
            layers[i] = y, _add_sharded_regularizer(params[i], y, g, omega), m, v
        else:
            alike.setdefault(y.shape, []).append(i)
    for indices in alike.values():
        ys = [layers[i][0] for i in indices]
        if len(ys) == 1:
            buffer, gram = torch.empty_like(ys[0])[None], (ys[0] @ ys[0].mT)[None]
        else:
            buffer = torch.stack(ys)
            gram = buffer @ buffer.mT
        gram.diagonal(dim1=-2, dim2=-1).sub_(1)
        for i, e, out in zip(indices, gram, buffer, strict=True):
            y, g, m, v = layers[i]
            layers[i] = y, torch.addmm(g, e, y, alpha=2 * omega, out=out), m, v
    return layers


def _is_sharded(t: Tensor) -> bool:
    """Whether it is a DTensor, as FSDP2 (`fully_shard`) makes: several processes share its rows."""
    return _placements(t) is not None


def _placements(t: Tensor) -> tuple | None:
    return getattr(t, "placements", None)  # importing DTensor takes half a second


def _local(t: Tensor, weight: Tensor) -> Tensor:
    """The part of t that is in this process, where `weight` is sharded; else t."""
    if not _is_sharded(weight):
        return t
    if not _is_sharded(t):
        raise ValueError("a sharded weight has a gradient or state that is not sharded")
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
    numbers = torch.arange(weight.shape[0], device=y.device)  # of all rows
    numbers = type(weight).from_local(numbers, weight.device_mesh, everywhere, run_check=False)
    numbers = numbers.redistribute(placements=weight.placements).to_local()  # of this process's rows
    whole = _sharded_as(weight, y).full_tensor()
    gram = y @ whole.mT
    gram.scatter_add_(1, numbers[:, None], gram.new_full((len(y), 1), -1))
    return torch.addmm(g, gram, whole, alpha=2 * omega)


# In blocks of rows.
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
    buffer = torch.empty_like(y[:size], memory_format=torch.contiguous_format)
    for i in range(0, len(y), size):
        y_, g_, m_ = (t[i : i + size] for t in (y, g, m))
        scratch = buffer[: len(y_)]
        inverse = _lengths(y_).reciprocal_()
        h, h_norm = _tangent(y_, g_, inverse, out=scratch)
        shorten = torch.ones_like(h_norm) if grad_clip is None else grad_clip / h_norm.clamp(min=grad_clip)
        scale: float | Tensor = 1.0
        if v is None:
            m_.mul_(decay).addcmul_(h, shorten.mul_(-rate))
        else:
            h_norm.mul_(shorten)
            v_ = v[i : i + size].mul_(beta2).addcmul_(h_norm, h_norm, value=1 - beta2)
            m_.mul_(decay).addcmul_(h, shorten.mul_(1 - decay))
            scale = -rate / (v_ + epsilon).sqrt_()
        m_norm = _norms(m_)
        angle = m_norm * scale
        sin, cos = angle.sin(), angle.cos()
        if not _is_readable(y) or inverse.max().item() > 0.5 / _ZERO_ROW:
            zero = inverse > 0.5 / _ZERO_ROW  # such a row becomes its step's direction, where it has one
            sin = torch.where(zero, angle.sign(), sin)
            cos = torch.where(zero & (angle != 0), 0, cos)
        lost = torch.mul(y_, (sin * inverse).mul_(m_norm), out=scratch)  # m's part that points back along y
        y_.mul_(inverse.mul_(cos)).addcmul_(m_, sin.div_(m_norm.clamp_(min=_ZERO_MOMENTUM)))
        m_.mul_(cos).sub_(lost)


def _tangent(y: Tensor, g: Tensor, inverse: Tensor, out: Tensor) -> tuple[Tensor, Tensor]:
    """h = project(y/|y|, g), written to `out`, and |h|; inverse: 1/|y|."""
    along = torch.mul(y, g, out=out).sum(1, keepdim=True).mul_(inverse)
    h = torch.addcmul(g, y, along * inverse, value=-1, out=out)
    h_norm = _norms(h)
    # As in `project`, a second time; where a look at the values is cheap, only if it matters.
    if not _is_readable(h) or (along.abs_() > _CANCELLED * h_norm).any():
        along = (y * h).sum(1, keepdim=True).mul_(inverse)
        h.addcmul_(y, along.mul_(inverse), value=-1)
        h_norm = _norms(h)
    return h, h_norm


def _lengths(y: Tensor) -> Tensor:
    """|y| row by row, (rows, 1), to divide by: not 0 for a zero row."""
    return _norms(y, least=_SHORT).clamp_(min=_ZERO_ROW)


def _norms(x: Tensor, least: float = 0.0) -> Tensor:
    """|x| row by row, (rows, 1), also where float32 squares overflow or, below `least`, underflow."""
    if not _is_readable(x):  # float64 sums cost nothing there; a look would wait
        if x.dtype != torch.float32:
            return unit(x)[1]
        return torch.linalg.vector_norm(x, dim=1, keepdim=True, dtype=torch.float64).float()
    norms = torch.linalg.vector_norm(x, dim=1, keepdim=True)
    low, high = norms.aminmax()
    return norms if high.item() < _LONG and low.item() >= least else unit(x)[1]


def _is_readable(t: Tensor) -> bool:
    """Whether t has values (is not fake) that can be read without waiting for a device."""
    return t.is_cpu and type(t) in (Tensor, nn.Parameter)


# In one Triton kernel.
_LONGEST_ROW = 8192  # elements that a program of the kernel holds in registers; longer rows go in blocks
_KERNEL_DEVICE = "cuda" if importlib.util.find_spec("triton") else None  # torch brings it for a GPU
_LAUNCHED: set[tuple] = set()  # the kernels that have been launched: device, method, with clipping, size
_WITHOUT_KERNEL: set[torch.device] = set()  # where the first launch of one failed


def _advance_all(layers, rates, table, layer_of_row, *, decay, beta2=0.0, epsilon=0.0, grad_clip=None):
    """`_advance` for all rows of all layers in one launch of a Triton kernel, which reads each element once.

    layers: as in `_advance`, contiguous float32, n <= _LONGEST_ROW; rates: (layers,) float32 on the device;
    table, layer_of_row: from `_host_table`.
    """
    if not len(layer_of_row):
        return
    size = 1 << (max(y.shape[1] for y, *_ in layers) - 1).bit_length()
    adam, clip, device = layers[0][3] is not None, grad_clip is not None, rates.device
    try:
        # Not by name: cloudpickle would take the kernel along, which cannot be pickled.
        globals()["_advance_kernel"][(len(layer_of_row),)](
            table, layer_of_row, rates,
            float(decay), 1.0 - decay, float(beta2), 1.0 - beta2, float(epsilon), float(grad_clip or 0),
            ADAM=adam, CLIP=clip, SIZE=size, num_warps=max(1, min(16, size // 512)),
        )  # fmt: skip
        _LAUNCHED.add((device, adam, clip, size))
    except Exception as error:
        if (device, adam, clip, size) in _LAUNCHED:
            raise  # only a first launch can find that the kernel cannot be built; it has changed nothing then
        _give_up_kernel(device, error)
        for layer, rate in zip(layers, rates, strict=True):
            _advance(*layer, rate, decay=decay, beta2=beta2, epsilon=epsilon, grad_clip=grad_clip)


def _give_up_kernel(device: torch.device, error: Exception) -> None:
    """Go on in blocks on this device, and say why, once in a process."""
    if not _WITHOUT_KERNEL:
        warnings.warn(
            f"no Triton kernel on {device}: {type(error).__name__}: {' '.join(str(error).split())[:300]}. Steps "
            "go on in blocks of rows, slower, with the same results. The kernel needs a C compiler, Python's "
            "headers (python3-dev), a folder to write to (TRITON_CACHE_DIR) and a GPU that Triton supports.",
            stacklevel=2,
        )
    _WITHOUT_KERNEL.add(device)


def _host_table(layers: list[_Layer], pin: bool) -> tuple[Tensor, Tensor]:
    """The kernel's table (layers, 6) int64 and layer of each row (rows,) int32, on the host."""
    rows = [len(y) for y, *_ in layers]
    before = [sum(rows[:i]) for i in range(len(rows))]
    addresses = [[0 if t is None else t.data_ptr() for t in layer] for layer in layers]
    entries = [[*a, y.shape[1], b] for a, (y, *_), b in zip(addresses, layers, before, strict=True)]
    table = torch.tensor(entries, dtype=torch.int64, pin_memory=pin)
    layer_of_row = torch.repeat_interleave(torch.arange(len(rows), dtype=torch.int32), torch.tensor(rows))
    return table, layer_of_row.pin_memory() if pin else layer_of_row


def _device_tables(cache: dict, layers: list[_Layer], group: int) -> list[Tensor]:
    """`_host_table` on the device; `cache` keeps it until an address or shape has changed."""
    device = layers[0][0].device
    captured = device.type == "cuda" and torch.cuda.is_current_stream_capturing()
    made_from = [(t.shape, t.data_ptr()) for layer in layers for t in layer if t is not None]
    if captured or cache.get((group, device), (None,))[0] != made_from:
        host = _host_table(layers, pin=device.type == "cuda")
        tables = [t.to(device, non_blocking=True) for t in host]
        if captured:  # each replay copies from the host's table again: both are the graph's alone, for good
            cache.setdefault("captured", []).append((host, tables))
            return tables
        cache[group, device] = made_from, tables
    return cache[group, device][1]


if _KERNEL_DEVICE:
    import triton
    import triton.language as tl

    @triton.jit
    def _norm(x):
        """|x| by float64 squares, which neither overflow nor underflow."""
        x = x.to(tl.float64)
        return tl.sqrt(tl.sum(x * x, 0)).to(tl.float32)

    @triton.jit
    def _advance_kernel(
        table, layer_of_row, rates, decay, gain, beta2, rest2, epsilon, grad_clip,
        ADAM: tl.constexpr, CLIP: tl.constexpr, SIZE: tl.constexpr,
    ):  # fmt: skip
        """`_advance` for one row of one layer, in registers.

        table: (layers, 6) int64: addresses of y, g, m and v, n, and how many rows come before the layer's.
        gain: 1 - decay. rest2: 1 - beta2. SIZE: a power of 2, at least n.
        """
        layer = tl.load(layer_of_row + tl.program_id(0))
        entry = table + 6 * layer
        n = tl.load(entry + 4)
        row = tl.program_id(0) - tl.load(entry + 5)
        y_at = tl.load(entry).to(tl.pointer_type(tl.float32)) + row * n
        g_at = tl.load(entry + 1).to(tl.pointer_type(tl.float32)) + row * n
        m_at = tl.load(entry + 2).to(tl.pointer_type(tl.float32)) + row * n
        v_at = tl.load(entry + 3).to(tl.pointer_type(tl.float32)) + row
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
        shorten = 1.0
        if CLIP:
            shorten = grad_clip / tl.maximum(h_norm, grad_clip)
        rate = tl.load(rates + layer)
        factor = -rate * shorten
        scale = 1.0
        if ADAM:
            v = beta2 * tl.load(v_at) + rest2 * (h_norm * shorten) * (h_norm * shorten)
            tl.store(v_at, v)
            factor = gain * shorten
            scale = -rate / tl.sqrt(v + epsilon)
        m = decay * m + factor * h
        m_norm = _norm(m)
        angle = m_norm * scale
        sin, cos = tl.sin(angle), tl.cos(angle)
        starts = (y_norm == 0) & (angle != 0)  # a zero row becomes its step's direction
        sin = tl.where(starts, tl.where(angle < 0, -1.0, 1.0), sin)
        cos = tl.where(starts, 0.0, cos)
        to_y = tl.where(m_norm > 0, sin / tl.where(m_norm > 0, m_norm, 1.0), scale)  # sin a / |M|, or s
        tl.store(y_at + columns, y * cos + m * to_y, inside)
        tl.store(m_at + columns, m * cos - y * (m_norm * sin), inside)
