"""Properties of the operators on G(1, n), for any rows, and where rounding counts."""

import math
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

import grassmann_optimizer as go
from grassmann_optimizer import unit

with warnings.catch_warnings():
    warnings.simplefilter("ignore", FutureWarning)  # geoopt scripts a function; torch calls that deprecated
    import geoopt

quick = settings(deadline=None, max_examples=30)
lengths = st.one_of(st.just(0.0), st.floats(1e-12, 1e-3), st.floats(1e-3, 20.0))


@st.composite
def points(draw):
    """Unit rows y and two tangents at them in float64, (rows, n); and the first tangent's length."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    shape = draw(st.integers(1, 6)), draw(st.integers(2, 40))
    y, a, b = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(3))
    y = unit(y)[0]
    length = draw(lengths)
    # Twice: where little is left, what is left is not tangent yet.
    h = unit(go.project(y, go.project(y, a)))[0] * length
    return y, h, go.project(y, go.project(y, b)), length


def inner(a, b):
    return (a * b).sum(-1)


def close(a, b, tolerance=1e-12):
    assert_close(a, torch.as_tensor(b, dtype=a.dtype).expand_as(a), rtol=0, atol=tolerance)


@quick
@given(points(), st.integers(-200, 200))
def test_unit_splits_rows_into_directions_and_lengths(point, exponent):
    y, _, _, _ = point
    scale = 10.0**exponent
    directions, norms = unit(y * scale)
    close(directions, y)
    assert_close(norms, torch.full_like(norms, scale), rtol=1e-12, atol=0)


@quick
@given(points())
def test_translation_is_an_isometry_into_the_new_tangent_space(point):
    y, h, a, length = point
    z, ta, th = go.exp_map(y, h), go.parallel_translate(a, y, h), go.parallel_translate(h, y, h)
    close(inner(ta, z), 0.0, 1e-11)
    close(inner(ta, ta), inner(a, a), 1e-11)
    close(inner(ta, th), inner(a, h), 1e-10)
    close(th, h * math.cos(length) - y * length * math.sin(length), 1e-11)  # Eq. 9
    u, _ = unit(h)
    across = a - inner(u, a)[:, None] * u
    close(go.parallel_translate(across, y, h), across)
    assert torch.equal(go.parallel_translate(a, y, torch.zeros_like(h)), a)
    assert torch.equal(go.exp_map(y, torch.zeros_like(h)), y)


@quick
@given(points(), st.floats(1e-6, 10.0))
def test_clipping_keeps_the_direction_and_bounds_the_length(point, nu):
    _, h, _, length = point
    clipped = go.clip_by_norm(h, nu)
    close(unit(clipped)[0], unit(h)[0])
    close(clipped.norm(dim=-1), min(length, nu), 1e-11)
    if length < nu * (1 - 1e-9):
        assert torch.equal(clipped, h)


@quick
@given(points(), st.floats(-10, 10))
def test_projection_and_exponential_map_are_geoopts(point, along):
    y, h, a, _ = point
    sphere = geoopt.SphereExact()
    close(go.project(y, a + along * y), sphere.egrad2rgrad(y, a + along * y))
    z = go.exp_map(y, h)
    close(z, sphere.expmap(y, h))
    close(z.norm(dim=-1), 1.0)


@quick
@given(points())
def test_the_regularizers_gradient_is_autograds(point):
    y = point[0].clone().requires_grad_()
    (y @ y.mT - torch.eye(len(y), dtype=y.dtype)).square().sum().div(2).backward()
    close(go.orthogonality_gradient(y.detach()), y.grad)


# ----------------------------------------------------------------------------- where rounding counts


@pytest.mark.parametrize("ratio", [1e2, 1e5, 1e7])
def test_a_gradient_nearly_along_the_row_becomes_tangent_all_the_same(ratio):
    y, a = unit(torch.randn(20, 50, generator=torch.Generator().manual_seed(0)).view(2, 10, 50))[0]
    h = go.project(y, a + ratio * y).double()
    assert (inner(h, unit(y.double())[0]).abs() <= 1e-6 * h.norm(dim=-1)).all()


@pytest.mark.parametrize("angle", [1e-2, 1e-3, 1e-4, 1e-5])
def test_a_small_turn_of_a_vector_is_not_lost(angle):
    """(0, 1, 0) carried along u = (0, 0.6, 0.8) turns towards -u by 1 - cos: its last component is new."""
    y, u, delta = torch.tensor([[[1.0, 0.0, 0.0]], [[0.0, 0.6, 0.8]], [[0.0, 1.0, 0.0]]])
    carried = go.parallel_translate(delta, y, angle * u)
    last = -0.6 * 0.8 * 2 * math.sin(angle / 2) ** 2
    assert carried[0, 2].item() == pytest.approx(last, rel=1e-5)


def test_the_regularizers_small_part_is_not_lost_in_the_rows():
    """Rows (1, 0, 0) and (a, 1, 0) are unit in float32, a = 2^-13; at the first: 2 (a^2, a, 0)."""
    a = 2.0**-13
    y = torch.tensor([[1.0, 0.0, 0.0], [a, 1.0, 0.0]])
    assert go.orthogonality_gradient(y)[0].tolist() == [2 * a * a, 2 * a, 0]
    for count in (1, 2):  # as in the optimizers, weights of one shape together
        layers = [(y.clone(), torch.zeros_like(y), torch.zeros_like(y), None) for _ in range(count)]
        for _, g, _, _ in go._add_regularizer([y] * count, layers, omega=0.25):
            assert g[0].tolist() == [a * a / 2, a / 2, 0]
