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
import importlib.util
import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.sgd import sgd

__all__ = ["SGDG", "AdamG", "ScaleInvariance", "grassmann_param_groups", "scale_invariance", "unit"]


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
    for _ in range(2):  # again: where g is nearly parallel to y, rounding leaves a part along y the first time
        g = g - (y * g).sum(-1, keepdim=True) * y
    return g


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
    """One step of the paper's SGD-G: the new (y, tau). Nothing is changed.

    Args:
        y, g, tau: (..., rows, n); y of any length but 0, tau tangent at it.
        lr: radians per unit of gradient. grad_clip: nu, or None for no clipping.
    """
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
        lr, grad_clip: as in `sgdg_update`.
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


# ---------------------------------------------------------------------------------------------- 3. fast paths
#
# Both algorithms at once, in place: with the momentum M (tau or m),
#     M <- decay M + gain h;   a = s |M|;   y <- y cos a + M/|M| sin a;   M <- M cos a - y |M| sin a
# where SGD-G has gain = -lr and s = 1, Adam-G gain = 1 - b1 and s = -lr correction / sqrt(v + epsilon). The step is
# d = s M, so a is |d| with the sign of s, and the last formula is Eq. 8 for an M parallel to d. `rate` is lr (SGD-G) or
# lr * correction (Adam-G); v is None for SGD-G.

_Layer = tuple[Tensor, Tensor, Tensor, Tensor | None]  # y, g, m (rows, n) and v (rows, 1), None for SGD-G
_BLOCK = 2**18  # elements: a block of y, g, M and scratch stays in the cache, and many operations share its overhead


def _advance(
    y: Tensor,
    g: Tensor,
    m: Tensor,
    v: Tensor | None,
    rate: float | Tensor,
    *,
    decay: float,
    beta2: float = 0.0,
    epsilon: float = 0.0,
    grad_clip: float | None = None,
) -> None:
    """`sgdg_update` (v is None) or `adamg_update` without regularizer, in place on y, m and v, block by block of rows.

    Args:
        y, g, m: (rows, n) of one floating-point type. v: (rows, 1). g is read only.
    """
    size = max(1, _BLOCK // y.shape[1])
    scratch = torch.empty_like(y[:size], memory_format=torch.contiguous_format)
    vs = [None] * len(y) if v is None else v.split(size)
    for y_, g_, m_, v_ in zip(y.split(size), g.split(size), m.split(size), vs, strict=False):
        _advance_block(y_, g_, m_, v_, scratch[: len(y_)], -rate, decay, beta2, epsilon, grad_clip)


def _advance_block(y, g, m, v, h, minus_rate, decay, beta2, epsilon, grad_clip) -> None:
    inverse = _norms(y, least=1e-15).clamp_(min=1e-30).reciprocal_()
    along = torch.mul(y, g, out=h).sum(1, keepdim=True).mul_(inverse)
    torch.addcmul(g, y, along * inverse, value=-1, out=h)
    h_norm = _norms(h)
    # As in `project`, a second time; on the CPU, where a look at the host is cheap, only if it matters.
    if h.device.type != "cpu" or (along.abs_() > 8 * h_norm).any():
        along = (y * h).sum(1, keepdim=True).mul_(inverse)
        h.addcmul_(y, along.mul_(inverse), value=-1)
        h_norm = _norms(h)
    shorten = torch.ones_like(h_norm) if grad_clip is None else grad_clip / h_norm.clamp(min=grad_clip)
    if v is None:
        m.mul_(decay).addcmul_(h, shorten.mul_(minus_rate))
        scale = 1.0
    else:
        h_norm.mul_(shorten)
        v.mul_(beta2).addcmul_(h_norm, h_norm, value=1 - beta2)
        m.mul_(decay).addcmul_(h, shorten.mul_(1 - decay))
        scale = minus_rate / (v + epsilon).sqrt_()
    m_norm = _norms(m)
    angle = m_norm * scale
    sin, cos = angle.sin(), angle.cos_()
    torch.mul(y, (sin * inverse).mul_(m_norm), out=h)
    y.mul_(inverse.mul_(cos)).addcmul_(m, sin.div_(m_norm.clamp_(min=1e-18)))
    m.mul_(cos).sub_(h)


def _norms(x: Tensor, least: float = 0.0) -> Tensor:
    """|x| row by row, (rows, 1), also where float32 squares overflow or, below `least`, underflow."""
    if x.dtype == torch.float32 and x.device.type != "cpu":  # float64 sums cost nothing there; a look would wait
        return torch.linalg.vector_norm(x, dim=1, keepdim=True, dtype=torch.float64).float()
    norms = torch.linalg.vector_norm(x, dim=1, keepdim=True)
    low, high = norms.aminmax()
    return norms if high.item() < 1e18 and low.item() >= least else unit(x)[1]


def _add_regularizer(ys: list[Tensor], gs: list[Tensor], omega: float) -> list[Tensor]:
    """g + omega * orthogonality_gradient(y) of weights of one shape; makes the rows of each y unit, in place.

    Needs one buffer of the weights' size. It holds the stacked y for the first products, which are too small to fill a
    GPU one by one, and then the results.
    """
    for y in ys:
        y.div_(_norms(y, least=1e-15).clamp_(min=1e-30))
    if len(ys) == 1:
        buffer, gram = torch.empty_like(ys[0])[None], (ys[0] @ ys[0].mT)[None]
    else:
        buffer = torch.stack(ys)
        gram = buffer @ buffer.mT
    gram.diagonal(dim1=-2, dim2=-1).sub_(1)
    products = zip(gs, gram, ys, buffer, strict=True)
    return [torch.addmm(g, e, y, alpha=2 * omega, out=out) for g, e, y, out in products]


_HAS_TRITON = importlib.util.find_spec("triton") is not None  # comes with torch where there is a GPU

if _HAS_TRITON:
    import triton
    import triton.language as tl

    @triton.jit
    def _square(x):
        """|x|^2 in float64, where it neither overflows nor underflows."""
        x = x.to(tl.float64)
        return tl.sum(x * x, 0)

    @triton.jit
    def _moments(h_norm, v_at, rate, gain, beta2, rest2, epsilon, grad_clip, ADAM: tl.constexpr, CLIP: tl.constexpr):
        """gain and s of a row; updates its v."""
        shorten = 1.0
        if CLIP:
            shorten = grad_clip / tl.maximum(h_norm, grad_clip)
        factor = -rate * shorten
        scale = 1.0
        if ADAM:
            v = beta2 * tl.load(v_at) + rest2 * (h_norm * shorten) * (h_norm * shorten)
            tl.store(v_at, v)
            factor = gain * shorten
            scale = -rate / tl.sqrt(v + epsilon)
        return factor, scale

    @triton.jit
    def _turn(m_norm, scale):
        """cos a, sin a / |M| (its limit s for M = 0) and |M| sin a."""
        angle = m_norm * scale
        sin = tl.sin(angle)
        return tl.cos(angle), tl.where(m_norm > 0, sin / tl.where(m_norm > 0, m_norm, 1.0), scale), m_norm * sin

    @triton.jit
    def _advance_kernel(
        table, layer_of_row, rates, decay, gain, beta2, rest2, epsilon, grad_clip,
        ADAM: tl.constexpr, CLIP: tl.constexpr, WHOLE: tl.constexpr, BLOCK: tl.constexpr,
    ):  # fmt: skip
        """`_advance_block` for one row of one layer: in registers if WHOLE, else in passes over blocks of it.

        table: (layers, 6) int64: addresses of y, g, m and v, n, and how many rows come before the layer's.
        """
        layer = tl.load(layer_of_row + tl.program_id(0))
        entry = table + 6 * layer
        n = tl.load(entry + 4)
        row = tl.program_id(0) - tl.load(entry + 5)
        y_at = tl.load(entry).to(tl.pointer_type(tl.float32)) + row * n
        g_at = tl.load(entry + 1).to(tl.pointer_type(tl.float32)) + row * n
        m_at = tl.load(entry + 2).to(tl.pointer_type(tl.float32)) + row * n
        v_at = tl.load(entry + 3).to(tl.pointer_type(tl.float32)) + row
        rate = tl.load(rates + layer)
        columns = tl.arange(0, BLOCK)
        if WHOLE:
            inside = columns < n
            y = tl.load(y_at + columns, inside, 0.0)
            g = tl.load(g_at + columns, inside, 0.0)
            m = tl.load(m_at + columns, inside, 0.0)
            y_norm = tl.sqrt(_square(y)).to(tl.float32)
            y = y / tl.where(y_norm > 0, y_norm, 1.0)
            h = g - tl.sum(y * g, 0) * y
            h = h - tl.sum(y * h, 0) * y
            h_norm = tl.sqrt(_square(h)).to(tl.float32)
            factor, scale = _moments(h_norm, v_at, rate, gain, beta2, rest2, epsilon, grad_clip, ADAM, CLIP)
            m = decay * m + factor * h
            m_norm = tl.sqrt(_square(m)).to(tl.float32)
            cos, to_y, to_m = _turn(m_norm, scale)
            tl.store(y_at + columns, y * cos + m * to_y, inside)
            tl.store(m_at + columns, m * cos - y * to_m, inside)
        else:
            zero = tl.zeros((), tl.float64)
            y_square = zero
            for start in range(0, n, BLOCK):
                inside = start + columns < n
                y_square += _square(tl.load(y_at + start + columns, inside, 0.0))
            y_norm = tl.sqrt(y_square).to(tl.float32)
            y_norm = tl.where(y_norm > 0, y_norm, 1.0)
            along = tl.zeros((), tl.float32)
            for start in range(0, n, BLOCK):
                inside = start + columns < n
                y = tl.load(y_at + start + columns, inside, 0.0) / y_norm
                along += tl.sum(y * tl.load(g_at + start + columns, inside, 0.0), 0)
            again = tl.zeros((), tl.float32)
            for start in range(0, n, BLOCK):
                inside = start + columns < n
                y = tl.load(y_at + start + columns, inside, 0.0) / y_norm
                again += tl.sum(y * (tl.load(g_at + start + columns, inside, 0.0) - along * y), 0)
            h_square = zero
            for start in range(0, n, BLOCK):
                inside = start + columns < n
                y = tl.load(y_at + start + columns, inside, 0.0) / y_norm
                h_square += _square(tl.load(g_at + start + columns, inside, 0.0) - along * y - again * y)
            h_norm = tl.sqrt(h_square).to(tl.float32)
            factor, scale = _moments(h_norm, v_at, rate, gain, beta2, rest2, epsilon, grad_clip, ADAM, CLIP)
            m_square = zero
            for start in range(0, n, BLOCK):
                inside = start + columns < n
                y = tl.load(y_at + start + columns, inside, 0.0) / y_norm
                h = tl.load(g_at + start + columns, inside, 0.0) - along * y - again * y
                m = decay * tl.load(m_at + start + columns, inside, 0.0) + factor * h
                m_square += _square(m)
                tl.store(m_at + start + columns, m, inside)
            m_norm = tl.sqrt(m_square).to(tl.float32)
            cos, to_y, to_m = _turn(m_norm, scale)
            for start in range(0, n, BLOCK):
                inside = start + columns < n
                y = tl.load(y_at + start + columns, inside, 0.0) / y_norm
                m = tl.load(m_at + start + columns, inside, 0.0)
                tl.store(y_at + start + columns, y * cos + m * to_y, inside)
                tl.store(m_at + start + columns, m * cos - y * to_m, inside)


def _advance_all(
    layers: list[_Layer],
    rates: Tensor,
    table: Tensor,
    layer_of_row: Tensor,
    *,
    decay: float,
    beta2: float = 0.0,
    epsilon: float = 0.0,
    grad_clip: float | None = None,
    block: int = 8192,
) -> None:
    """`_advance` for all rows of all layers in one launch of a Triton kernel, reading and writing each element once.

    Args:
        layers: (y, g, m, v) of each, as in `_advance`, contiguous float32.
        rates: (layers,) float32 on the device. table, layer_of_row: from `_host_table`.
        block: longest row that is held in registers; longer ones are passed over in blocks of this size (a power of 2).
    """
    longest = max(y.shape[1] for y, *_ in layers)
    size = min(block, 1 << (longest - 1).bit_length())
    _advance_kernel[(len(layer_of_row),)](  # pyright: ignore[reportPossiblyUnbound]
        table, layer_of_row, rates,
        float(decay), 1.0 - decay, float(beta2), 1.0 - beta2, float(epsilon), float(grad_clip or 0),
        ADAM=layers[0][3] is not None, CLIP=grad_clip is not None, WHOLE=longest <= size,
        BLOCK=size, num_warps=max(1, min(16, size // 512)),  # pyright: ignore[reportCallIssue]
    )  # fmt: skip


def _host_table(layers: list[_Layer], pin: bool) -> tuple[Tensor, Tensor]:
    """The kernel's table (layers, 6) int64 and layer of each row (rows,) int32, on the host."""
    rows = [len(y) for y, *_ in layers]
    before = [sum(rows[:i]) for i in range(len(rows))]
    addresses = [[0 if t is None else t.data_ptr() for t in layer] for layer in layers]
    entries = [[*a, layer[0].shape[1], b] for a, layer, b in zip(addresses, layers, before, strict=True)]
    table = torch.tensor(entries, dtype=torch.int64, pin_memory=pin)
    layer_of_row = torch.repeat_interleave(torch.arange(len(rows), dtype=torch.int32), torch.tensor(rows))
    return table, layer_of_row.pin_memory() if pin else layer_of_row


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


_LOW_PRECISION = (torch.float16, torch.bfloat16)


def _suits_fused_sgd(p: Tensor, state: dict) -> bool:
    buffer = state.get("momentum_buffer")
    alike = [t for t in (_grad(p), p if buffer is None else buffer) if t.stride() == p.stride() and t.dtype == p.dtype]
    dense = torch.empty_like(p, device="meta").stride() == p.stride()  # so zeros_like is stored as p is
    return p.is_cuda and p.is_floating_point() and dense and len(alike) == 2


def _grad(p: Tensor) -> Tensor:
    assert p.grad is not None  # parameters without one are left out before
    return p.grad


def _arithmetic(p: Tensor) -> torch.dtype:
    """The type of a weight's state and arithmetic: float32 for narrower ones."""
    return torch.float32 if p.dtype in _LOW_PRECISION else p.dtype


# ---------------------------------------------------------------------------------------------- 4. the optimizers


class _GrassmannOptimizer(Optimizer):
    """What SGDG and AdamG share: groups and their validation, choice of a path, torch's SGD for other groups."""

    def __init__(self, params, defaults: dict):
        self._tables: dict = {}  # see `_address_table`
        self._captured: list = []
        _check_options(defaults, known=list(defaults))
        super().__init__(params, defaults)

    def __setstate__(self, state: dict) -> None:
        super().__setstate__(state)
        self.__dict__.setdefault("_tables", {})  # neither copied nor pickled
        self.__dict__.setdefault("_captured", [])

    def add_param_group(self, param_group: dict) -> None:
        """As torch's; ValueError for an option out of range or misspelt, or a weight without rows on G(1, n)."""
        _check_options({**self.defaults, **param_group}, known=[*self.defaults, "params"])
        super().add_param_group(param_group)
        try:
            group = self.param_groups[-1]
            for p in group["params"] if group["grassmann"] else []:
                _check_rows(p, group["omega"])
        except ValueError:
            self.param_groups.pop()
            raise

    def load_state_dict(self, state_dict: dict) -> None:
        """As torch's, but on G(1, n) the state of bfloat16 and float16 weights stays float32, and `step` moves too."""
        loaded: dict = {}  # what the user's hooks have made of state_dict: this one is the last
        handle = self.register_load_state_dict_pre_hook(lambda _, adapted: loaded.update(adapted))
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

    # Opaque to torch.compile, which mishandles results written in place (torch 2.13 and 2.15).
    @torch.compiler.disable
    @torch.no_grad()
    def step(self, closure=None):  # pyright: ignore[reportIncompatibleMethodOverride]
        """One step of every group; returns the closure's loss. Gradients are read only."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if group["grassmann"]:
                self._step_on_grassmann(params, group)
            else:
                self._step_sgd(params, group)
        return loss

    def _step_on_grassmann(self, params: list[Tensor], group: dict) -> None:
        if any(_grad(p).is_sparse or p.is_complex() for p in params):
            raise RuntimeError("a parameter on G(1, n) needs a dense, real gradient")
        alike: dict[tuple, list[Tensor]] = {}
        for p in params:
            if p.numel():
                alike.setdefault((p.device, p.dtype), []).append(p)
                self._init_state(p, self.state[p])
        options = {name: group[name] for name in ("grad_clip", "beta2", "epsilon") if name in group}
        options["decay"] = group["momentum"]
        for (device, dtype), some in alike.items():
            with torch.autocast(device.type, enabled=False):
                rates = self._rates(some, group)
                if self._has_kernel(device) and dtype == torch.float32:
                    layers = self._regularized([self._layer(p, group) for p in some], group["omega"])
                    with torch.cuda.device_of(some[0]):
                        _advance_all(layers, rates, *self._address_table(layers, id(group)), **options)
                    for p, layer in zip(some, layers, strict=True):
                        self._put_back(p, layer)
                else:
                    for p, rate in zip(some, rates, strict=True):
                        (layer,) = self._regularized([self._layer(p, group)], group["omega"])
                        _advance(*layer, rate, **options)
                        self._put_back(p, layer)
                        del layer  # before the next one's buffer is made

    @staticmethod
    def _has_kernel(device: torch.device) -> bool:
        return _HAS_TRITON and device.type == "cuda"

    def _init_state(self, p: Tensor, state: dict) -> None:
        """Fill in what the state of a weight on G(1, n) lacks."""
        if state.get("momentum_buffer") is None:
            state["momentum_buffer"] = torch.zeros_like(p, dtype=_arithmetic(p))

    def _rates(self, params: list[Tensor], group: dict) -> Tensor:
        """`_advance`'s rate for each weight: (weights,), on their device."""
        like = {"dtype": _arithmetic(params[0]), "device": params[0].device}
        lr = group["lr"]
        lr = lr.to(**like, non_blocking=True) if isinstance(lr, Tensor) else torch.full((), lr, **like)
        return lr.reshape(()).repeat(len(params))

    def _layer(self, p: Tensor, group: dict) -> _Layer:
        """y, g, m and v of a weight as contiguous rows: views where possible."""
        state, dtype = self.state[p], _arithmetic(p)
        y, g = (_rows(t, p).to(dtype).contiguous() for t in (p, _grad(p)))
        if group["maximize"]:
            g = -g
        m = _rows(state["momentum_buffer"], p).to(dtype).contiguous()
        return y, g, m, state.get("second_moment")

    def _regularized(self, layers: list[_Layer], omega: float) -> list[_Layer]:
        """The layers with the regularizer's part in g, those of one shape together."""
        alike: dict[torch.Size, list[int]] = {}
        for i, (y, *_) in enumerate(layers if omega else []):
            alike.setdefault(y.shape, []).append(i)
        for indices in alike.values():
            ys, gs = [layers[i][0] for i in indices], [layers[i][1] for i in indices]
            for i, g in zip(indices, _add_regularizer(ys, gs, omega), strict=True):
                y, _, m, v = layers[i]
                layers[i] = y, g, m, v
        return layers

    def _put_back(self, p: Tensor, layer: _Layer) -> None:
        """Write y and m where `_layer` had to copy them."""
        for t, rows in ((p, layer[0]), (self.state[p]["momentum_buffer"], layer[2])):
            if rows.data_ptr() != t.data_ptr():
                _write_rows(t, p, rows)

    def _address_table(self, layers: list[_Layer], group: int) -> list[Tensor]:
        """`_advance_all`'s table on the device, made anew only where an address or shape has changed."""
        device = layers[0][0].device
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            # Each replay of the graph copies from the host's table again: both belong to the graph alone, for good.
            host = _host_table(layers, pin=True)
            self._captured.append((host, [t.to(device, non_blocking=True) for t in host]))
            return self._captured[-1][1]
        key = [(t.shape, t.data_ptr()) for layer in layers for t in layer if t is not None]
        if self._tables.get((group, device), (None,))[0] != key:
            host = _host_table(layers, pin=device.type == "cuda")
            self._tables[group, device] = key, [t.to(device, non_blocking=True) for t in host]
        return self._tables[group, device][1]

    def _step_sgd(self, params: list[Tensor], group: dict) -> None:
        states = [self.state[p] for p in params]
        sparse = any(_grad(p).is_sparse for p in params)
        # Fused where it is one launch: on a GPU, for tensors stored alike. A buffer of zeros beforehand is torch's
        # first step if nothing is dampened, and lets a CUDA graph hold the step.
        fused = bool(params) and not sparse and not group["dampening"] and all(map(_suits_fused_sgd, params, states))
        lr = group["lr"]
        if fused:
            lr = lr.to(params[0].device, torch.float32, non_blocking=True) if isinstance(lr, Tensor) else lr
            for p, state in zip(params, states, strict=True):
                if group["momentum"] and state.get("momentum_buffer") is None:
                    state["momentum_buffer"] = torch.zeros_like(p)
        buffers = [state.get("momentum_buffer") for state in states]
        sgd(
            params,
            [_grad(p) for p in params],
            buffers,
            has_sparse_grad=sparse,
            foreach=False,  # torch's foreach path may add Nesterov's term to the gradients themselves
            fused=fused,
            weight_decay=group["weight_decay"],
            momentum=group["momentum"],
            lr=lr,
            dampening=group["dampening"],
            nesterov=group["nesterov"],
            maximize=group["maximize"],
        )
        if group["momentum"]:
            for state, buffer in zip(states, buffers, strict=True):
                state["momentum_buffer"] = buffer


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
        super().__init__(
            params,
            {
                "lr": lr,
                "momentum": momentum,
                "dampening": dampening,
                "weight_decay": weight_decay,
                "nesterov": nesterov,
                "grassmann": grassmann,
                "omega": omega,
                "grad_clip": grad_clip,
                "maximize": maximize,
            },
        )


class AdamG(_GrassmannOptimizer):
    """Adam on the product of G(1, n)s, with one adaptive scale for each row of a weight: the paper's Adam-G.

    Groups, arguments and errors are those of `SGDG`; any group that is not on G(1, n) is plain SGD with momentum. Three
    arguments mean something of their own in a group on G(1, n):

    Args:
        momentum: beta1, decay of the first moment, in [0, 1).
        beta2: decay of the second moment, in [0, 1).
        epsilon: added to the second moment before the root is taken; positive.

    State on G(1, n): `momentum_buffer` (m, shaped as the weight), `second_moment` (v, (rows, 1)), `step` (0-dim).
    Without clipping, a gradient beyond 1e19 makes a row's second moment infinite in float32: the row then stays put.
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
        super().__init__(
            params,
            {
                "lr": lr,
                "momentum": momentum,
                "dampening": dampening,
                "weight_decay": weight_decay,
                "nesterov": nesterov,
                "grassmann": grassmann,
                "beta2": beta2,
                "epsilon": epsilon,
                "omega": omega,
                "grad_clip": grad_clip,
                "maximize": maximize,
            },
        )

    def _init_state(self, p: Tensor, state: dict) -> None:
        super()._init_state(p, state)
        if "step" not in state:
            state["second_moment"] = torch.zeros(p.shape[0], 1, dtype=_arithmetic(p), device=p.device)
            state["step"] = torch.zeros((), device=p.device)

    def _rates(self, params: list[Tensor], group: dict) -> Tensor:
        steps = [self.state[p]["step"] for p in params]
        torch._foreach_add_(steps, 1)  # pyright: ignore[reportPrivateImportUsage]
        lr = super()._rates(params, group)
        step = torch.stack(steps).to(lr.dtype)
        return lr * _bias_correction(step, group["momentum"], group["beta2"])


def _check_options(group: dict, known: list[str]) -> None:
    for key in group.keys() - set(known):
        if any(key.startswith(f"{name}_") or key.endswith(f"_{name}") for name in known):
            continue  # a name of its own, such as a scheduler's initial_lr or max_momentum
        if close := difflib.get_close_matches(key, known, n=1, cutoff=0.79):
            raise ValueError(f"unknown option {key!r} of a parameter group; did you mean {close[0]!r}?")
    if isinstance(group["lr"], Tensor) and group["lr"].numel() != 1:
        raise ValueError(f"Invalid lr value: {group['lr']} (a tensor must be 1-element)")
    for name in ("lr", "momentum", "weight_decay", "omega"):
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


# --------------------------------------------------------------------------------------- 5. a model's parameters


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
    select: str = "shape",
    loss_fn: Callable[[nn.Module], Tensor] | None = None,
) -> list[dict]:
    """Sort a model's trainable parameters into the groups of the paper, ready for `SGDG` or `AdamG`.

    By module type and shape, not by name:
        "on G(1,n)"  weights of Conv1d/2d/3d with fewer rows than elements in a row: lrg, momentum, omega, grad_clip
        "bn/bias"    every parameter with fewer than two dimensions: lr, Nesterov momentum, bn_decay
        "other"      all else (linear layers, overcomplete and transposed convolutions): lr, Nesterov momentum,
                     weight_decay

    With `select="measured"` a weight is on G(1, n) if `scale_invariance(model, loss_fn)` finds it invariant, whatever
    its module; invariant weights that have no fewer rows than elements in a row make a group "on G(1,n), overcomplete"
    with omega = 0, since their rows cannot be orthogonal.

    Frozen parameters are left out, tied ones counted once, empty groups dropped.

    Warning: sets the rows of the Grassmann weights to unit length, in place, which changes what a trained network
    computes: in evaluation mode the running averages of a following batch normalization belong to the old lengths until
    training renews them; where none follows (a residual block's last convolution) the output itself changes.

    Args:
        lr, lrg: learning rates of the Euclidean groups and of the rows on G(1, n).
        momentum: of all groups, with Nesterov's in the Euclidean ones.
        omega, grad_clip: regularizer and norm clipping on G(1, n), as in `SGDG`.
        weight_decay, bn_decay: of the group "other" and of "bn/bias".
        select: "shape" or "measured". loss_fn: for "measured", as in `scale_invariance`.

    Returns:
        group dictionaries with a "name".

    Raises:
        ValueError: another `select`, or one that does not go with `loss_fn`.
    """
    if select not in ("shape", "measured") or (select == "measured") != (loss_fn is not None):
        raise ValueError(f"select must be 'shape', or 'measured' with a loss_fn; got {select!r}, loss_fn={loss_fn}")
    invariant = set() if loss_fn is None else {m.name for m in scale_invariance(model, loss_fn) if m.invariant}
    names = {p: name for name, p in model.named_parameters()}
    groups: dict[str, list[Tensor]] = {
        name: [] for name in ("on G(1,n)", "on G(1,n), overcomplete", "bn/bias", "other")
    }
    for module in model.modules():
        for local_name, p in module.named_parameters(recurse=False):
            if not p.requires_grad or p not in names:
                continue
            name = names.pop(p)  # tied: sorted where it is met first
            is_conv = isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)) and local_name == "weight"
            undercomplete = p.ndim > 1 and p.shape[0] < p.shape[1:].numel()
            if p.ndim < 2:
                groups["bn/bias"].append(p)
            elif name in invariant or (loss_fn is None and is_conv and undercomplete):
                groups["on G(1,n)" if undercomplete else "on G(1,n), overcomplete"].append(p)
                _write_rows(p, p, unit(_rows(p, p))[0])
            else:
                groups["other"].append(p)
    grassmann = {"lr": lrg, "momentum": momentum, "grassmann": True, "grad_clip": grad_clip}
    euclidean = {"lr": lr, "momentum": momentum, "grassmann": False, "nesterov": momentum > 0}
    options = {
        "on G(1,n)": {**grassmann, "omega": omega},
        "on G(1,n), overcomplete": {**grassmann, "omega": 0.0},
        "bn/bias": {**euclidean, "weight_decay": bn_decay},
        "other": {**euclidean, "weight_decay": weight_decay},
    }
    return [{"params": params, "name": name, **options[name]} for name, params in groups.items() if params]


# ------------------------------------------------------------------------------- 6. which weights are scale-invariant?


class ScaleInvariance(NamedTuple):
    """What `scale_invariance` measured of one weight, as rows (rows, n)."""

    name: str
    shape: tuple[int, ...]
    cosine: float  # the largest |cos(w_i, g_i)| over the rows that have a gradient; nan if none has
    chance: float  # the largest that as many random gradients would give, about sqrt(2 ln(2 rows) / n)
    idle_rows: int  # rows without a gradient, or zero themselves
    invariant: bool  # cosine is far below chance


def scale_invariance(model: nn.Module, loss_fn: Callable[[nn.Module], Tensor]) -> list[ScaleInvariance]:
    """Measure which weights matter only through the directions of their rows.

    If the loss does not depend on the length of a row w, its gradient is orthogonal to w (Euler's theorem for functions
    homogeneous of degree 0). One forward and backward pass in training mode tells: cos(w, g) is then rounding error and
    what a normalization's eps leaves, else as large as chance gives. (So weights whose outputs vary by little more than
    eps are not invariant, and are not found to be.)

    Args:
        model: any module. Its buffers, gradients and modes, and torch's generators, are left as they were.
        loss_fn: the loss of a batch, `loss_fn(model)`, a scalar.

    Returns:
        one entry for each trainable weight with two or more dimensions and rows of at least two elements, as in
        `model.named_parameters()`.
    """
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad and p.ndim > 1]
    named = [(name, p) for name, p in named if p.numel() and p.shape[1:].numel() > 1]
    if not named:
        return []
    modes = [(module, module.training) for module in model.modules()]
    buffers = [(m, name, b, b.clone()) for m in model.modules() for name, b in m.named_buffers(recurse=False)]
    devices = {p.device.index for p in model.parameters() if p.is_cuda}
    try:
        with torch.random.fork_rng(devices=sorted(devices)), torch.enable_grad():
            loss = loss_fn(model.train())
            gradients = torch.autograd.grad(loss, [p for _, p in named], allow_unused=True)
    finally:
        for module, training in modes:
            module.training = training
        for module, name, buffer, before in buffers:
            setattr(module, name, buffer)  # forward may have put another one in its place
            buffer.copy_(before)
    return [_measure_cosine(name, p.detach(), g) for (name, p), g in zip(named, gradients, strict=True)]


def _measure_cosine(name: str, w: Tensor, g: Tensor | None) -> ScaleInvariance:
    rows, n = w.shape[0], w.shape[1:].numel()
    w = w.flatten(1).double()
    g = torch.zeros_like(w) if g is None else g.flatten(1).double()
    active = (w != 0).any(1) & (g != 0).any(1)
    cosines = (unit(w)[0] * unit(g)[0]).sum(1).abs()[active]
    cosine = cosines.max().item() if len(cosines) else math.nan
    chance = min(1.0, math.sqrt(2 * math.log(2 * max(1, len(cosines))) / n))
    idle = rows - len(cosines)
    return ScaleInvariance(name, tuple(w.shape), cosine, chance, idle, cosine < _FAR_BELOW * chance)


_FAR_BELOW = 0.01


def grassmann_weights(model):
    import copy
    twin = copy.deepcopy(model)
    chosen = {p for group in grassmann_param_groups(twin, 0, 0) if group["grassmann"] for p in group["params"]}
    names = {p: n for n, p in twin.named_parameters()}
    own = dict(model.named_parameters())
    return {names[p]: own[names[p]] for p in names if p in chosen}
