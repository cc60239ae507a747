"""MiniCache's formulas against closed forms in the plane, a loop over vectors, and what must hold at the ends."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mmcompress.cache.minicache import angle, furthest, interpolate, norms, restore, retained


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def plane(*degrees, length=1.0):
    """Vectors of the plane, (1, 1, N, 2)."""
    at = torch.tensor(degrees, dtype=torch.float64).deg2rad()
    return (length * torch.stack([at.cos(), at.sin()], -1)).float()[None, None]


def slerp(u, v, t):
    """Shoemake's formula, one pair of vectors at a time, in Python's floats."""
    u, v = ([float(a) / math.hypot(*map(float, x)) for a in x] for x in (u, v))
    omega = math.acos(max(-1.0, min(1.0, sum(a * b for a, b in zip(u, v)))))
    if omega < 1e-7:
        return omega, u
    p, q = math.sin((1 - t) * omega) / math.sin(omega), math.sin(t * omega) / math.sin(omega)
    return omega, [p * a + q * b for a, b in zip(u, v)]


@pytest.mark.parametrize("first, second", [(0, 90), (10, 60), (350, 20), (0, 1e-3), (45, 45), (0, 179), (170, -20 + 1)])
@pytest.mark.parametrize("t", [0.0, 0.25, 0.5, 0.6, 1.0])
def test_in_the_plane_degrees_are_interpolated(first, second, t):
    below, above = plane(first, length=3.0), plane(second, length=0.2)
    way = (second - first + 180) % 360 - 180
    torch.testing.assert_close(angle(below, above), torch.tensor([[[math.radians(abs(way))]]]), rtol=1e-5, atol=3e-7)
    torch.testing.assert_close(interpolate(below, above, t), plane(first + t * way), rtol=0, atol=2e-6)


@pytest.mark.parametrize("t", [0.0, 0.3, 0.6, 1.0])
def test_it_is_shoemakes_formula(t):
    below, above = draw(2, 3, 5, 7), 4 * draw(2, 3, 5, 7, seed=1)
    arc, between = interpolate(below, above, t), angle(below, above)
    for place in [(b, h, n) for b in range(2) for h in range(3) for n in range(5)]:
        omega, want = slerp(below[place].tolist(), above[place].tolist(), t)
        assert float(between[place]) == pytest.approx(omega, abs=1e-6)
        assert arc[place].tolist() == pytest.approx(want, abs=2e-6)


@given(st.integers(0, 10**6), st.floats(0, 1), st.sampled_from([1e-7, 1e-5, 1e-3, 0.1, 1.0, 100.0]))
def test_the_arc_is_of_unit_vectors_and_divides_the_angle(seed, t, apart):
    below = draw(1, 2, 3, 8, seed=seed)
    above = 2 * below + apart * draw(1, 2, 3, 8, seed=seed + 1)
    arc, whole = interpolate(below, above, t), angle(below, above)
    torch.testing.assert_close(norms(arc), torch.ones(1, 2, 3), rtol=0, atol=1e-5)
    torch.testing.assert_close(angle(below, arc), t * whole, rtol=1e-4, atol=2e-6)
    torch.testing.assert_close(angle(arc, above), (1 - t) * whole, rtol=1e-4, atol=2e-6)
    torch.testing.assert_close(interpolate(above, below, 1 - t), arc, rtol=0, atol=1e-5)


def test_an_end_of_the_arc_restores_its_layer():
    below, above = draw(2, 2, 9, 16), 3 * draw(2, 2, 9, 16, seed=1)
    for t, whole in ((0.0, below), (1.0, above)):
        torch.testing.assert_close(restore(interpolate(below, above, t), norms(whole)), whole, rtol=1e-5, atol=2e-6)
    shared = interpolate(below, above)
    for layer in (below, above):
        torch.testing.assert_close(norms(restore(shared, norms(layer))), norms(layer))
    near, far = (angle(shared, x) for x in (above, below))
    torch.testing.assert_close(near / far, torch.full_like(near, 2 / 3), rtol=1e-4, atol=0)          # t is 0.6


@pytest.mark.parametrize("t", [0.0, 0.4, 0.5, 0.6, 1.0])
def test_opposite_directions_take_the_nearer_end(t):
    below = draw(1, 2, 4, 8)
    for above in (-below, -3.1 * below, -2 * below + 1e-6 * draw(1, 2, 4, 8, seed=1)):
        torch.testing.assert_close(angle(below, above), torch.full((1, 2, 4), math.pi), rtol=0, atol=1e-5)
        end = above if t >= 0.5 else below
        torch.testing.assert_close(restore(interpolate(below, above, t), norms(end)), end, rtol=1e-4, atol=1e-4)


def test_equal_directions_are_no_special_case():
    below = draw(1, 2, 4, 8)
    assert float(angle(below, 5 * below).max()) < 1e-6
    torch.testing.assert_close(restore(interpolate(below, 5 * below), norms(below)), below, rtol=1e-5, atol=1e-6)
    tilt = torch.zeros(1, 1, 1, 2)
    tilt[..., 0], other = 1, torch.tensor([[[[1.0, 1e-5]]]])
    assert float(angle(tilt, other)) == pytest.approx(1e-5, rel=1e-3)                                # arccos would say 0


def test_a_zero_vector_comes_back_and_costs_nothing():
    below, above = draw(1, 1, 3, 4), draw(1, 1, 3, 4, seed=1)
    below[..., 0, :], above[..., 1, :] = 0, 0
    below[..., 2, :], above[..., 2, :] = 0, 0
    assert angle(below, above).eq(0).all()
    shared = interpolate(below, above)
    for layer in (below, above):
        torch.testing.assert_close(restore(shared, norms(layer)), layer)
    assert shared.isfinite().all() and shared[0, 0, 2].eq(0).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32(dtype):
    below, above = draw(1, 2, 50, 64).to(dtype), draw(1, 2, 50, 64, seed=1).to(dtype)
    shared, exact = interpolate(below, above), interpolate(below.float(), above.float())
    assert shared.dtype == dtype and norms(below).dtype == angle(below, above).dtype == torch.float32
    assert torch.equal(shared, exact.to(dtype))                                                     # rounded once
    assert torch.equal(angle(below, above), angle(below.float(), above.float()))
    assert restore(shared, norms(below)).dtype == dtype
    large = torch.full((1, 1, 1, 64), 6e4, dtype=dtype)                                             # float16 squares overflow
    assert float(norms(large)) == pytest.approx(8 * float(large[0, 0, 0, 0]))
    torch.testing.assert_close(restore(interpolate(large, large), norms(large)), large, rtol=1e-2, atol=0)


def test_the_furthest_are_of_each_head_alone_and_valid():
    angles = torch.tensor([[[0.1, 0.9, 0.2, 0.8, 0.3], [0.5, 0.4, 0.3, 0.2, 0.1]]])
    valid = torch.ones(1, 1, 5, dtype=torch.bool)
    pick = lambda *args, **more: furthest(*args, **more).int().tolist()[0]  # noqa: E731
    assert pick(angles, valid, 2) == [[0, 1, 0, 1, 0], [1, 1, 0, 0, 0]]
    assert pick(angles, valid, 0) == [[0] * 5] * 2 and pick(angles, valid, 9) == [[1] * 5] * 2
    some = torch.tensor([[[True, False, True, True, False], [False, False, False, True, False]]])
    assert pick(angles, some, 2) == [[0, 0, 1, 1, 0], [0, 0, 0, 1, 0]]                               # fewer than two there
    assert pick(angles, some & False, 2) == [[0] * 5] * 2
    assert pick(torch.zeros(1, 1, 5), valid, 2) == [[1, 1, 0, 0, 0]]                                 # of equals the earlier


def test_counts_may_differ_by_row():
    angles = draw(2, 3, 20).abs()
    got = furthest(angles, torch.ones(2, 1, 20, dtype=torch.bool), torch.tensor([3, 7])[:, None, None])
    assert got.sum(-1).tolist() == [[3] * 3, [7] * 3]
    for b, k in ((0, 3), (1, 7)):
        for h in range(3):
            assert set(got[b, h].nonzero().flatten().tolist()) == set(angles[b, h].topk(k).indices.tolist())


def test_the_papers_threshold_takes_the_end_of_the_range_and_no_more_than_the_count():
    angles = torch.tensor([[[0.0, 1.0, 0.97, 0.9, 0.96]]])
    valid = torch.ones(1, 1, 5, dtype=torch.bool)
    pick = lambda count, gamma, there=valid: furthest(angles, there, count, gamma)[0, 0].int().tolist()  # noqa: E731
    assert pick(5, 0.05) == [0, 1, 1, 0, 1] and pick(5, 0.035) == [0, 1, 1, 0, 0]
    assert pick(2, 0.05) == [0, 1, 1, 0, 0] and pick(5, 0.2) == [0, 1, 1, 1, 1]
    rest = torch.tensor([[[False, False, True, True, True]]])                                        # the range is 0.90 to 0.97
    assert pick(5, 0.05, rest) == [0, 0, 1, 0, 0] and pick(5, 0.2, rest) == [0, 0, 1, 0, 1]
    assert pick(5, 0.05, valid & False) == [0] * 5
    assert not furthest(torch.full((1, 1, 5), 0.3), valid, 2, 0.05).any()                            # none is further


def test_the_share_is_rounded_up():
    assert [retained(n) for n in (0, 1, 20, 21, 140, 1000)] == [0, 1, 1, 2, 7, 50]
    assert retained(1000, 0.0) == 0 and retained(30, 0.1) == 3 and retained(10, 1.0) == 10
    assert 100 * 0.07 > 7 and retained(100, 0.07) == 7
    assert all(retained(n) == -(-n // 20) for n in range(3000))


def test_retaining_the_furthest_lowers_the_error_most():
    """Of all ways to retain one token, the furthest restores unit vectors best."""
    below, above = (torch.nn.functional.normalize(draw(1, 1, 6, 8, seed=s), dim=-1) for s in (0, 1))
    shared = interpolate(below, above)
    error = sum((restore(shared, norms(x)) - x).norm(dim=-1) ** 2 for x in (below, above))
    [kept] = furthest(angle(below, above), torch.ones(1, 1, 6, dtype=torch.bool), 1)[0, 0].nonzero().flatten().tolist()
    assert kept == int(error.argmax())
