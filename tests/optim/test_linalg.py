"""Batched routines against float64, loops and tensordot; the criterion near its threshold."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from algoperf_shampoo.optim import criterion, reference
from algoperf_shampoo.optim.blocks.memory import ALIGNMENT, joined
from algoperf_shampoo.optim.eigen.exact import exact
from algoperf_shampoo.optim.eigen.orthogonal_iteration import ORTHOGONALIZATIONS
from algoperf_shampoo.optim.eigen.problem import Problem
from algoperf_shampoo.optim.eigen.solver import Solver
from algoperf_shampoo.optim.ops import linalg

SHAPES = [(5,), (4, 6), (3, 4, 5), (2, 3, 2, 4), (64, 64, 3), (3, 4096), (8, 2, 512)]


def orthogonal(n, count, generator, dtype=torch.float64):
    x = torch.randn(count, n, n, generator=generator, dtype=torch.float64)
    return torch.linalg.qr(x).Q.to(dtype)


@pytest.mark.parametrize("shape", SHAPES)
def test_rotations_and_grams_equal_the_reference(shape):
    g = torch.Generator().manual_seed(0)
    x = torch.randn(3, *shape, generator=g, dtype=torch.float64)
    bases = [orthogonal(d, 3, g) for d in shape]
    rotated = linalg.rotate(x, bases)
    for b in range(3):
        expected = reference.to_basis(x[b], [q[b] for q in bases])
        torch.testing.assert_close(rotated[b], expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(linalg.rotate_back(rotated, bases), x, rtol=1e-12, atol=1e-12)
    for mode, d in enumerate(shape):
        one = linalg.rotate_mode(x, bases[mode], mode)
        torch.testing.assert_close(
            one[1], reference.mode_product(x[1], bases[mode][1].T, mode), rtol=1e-12, atol=1e-12
        )
        factor = torch.eye(d, dtype=torch.float64).repeat(3, 1, 1)
        linalg.gram_ema_(factor, linalg.matricized(x, mode), 0.9, 0.25)
        m = reference.matricize(x[2], mode)
        expected = 0.9 * torch.eye(d, dtype=torch.float64) + 0.25 * m @ m.T
        torch.testing.assert_close(factor[2], expected, rtol=1e-12, atol=1e-12)


def test_products_and_grams_between_kept_buffers_are_the_same_to_the_bit():
    g = torch.Generator().manual_seed(0)
    for shape in SHAPES:
        x = torch.randn(2, *shape, generator=g)
        bases = [orthogonal(d, 2, g, torch.float32) for d in shape]
        first, other = x.clone(), torch.empty_like(x)
        for a, q, out in linalg.products_to_and_fro(first, other, bases, back=False):
            torch.bmm(a, q, out=out)
        end = first if len(shape) % 2 == 0 else other
        assert torch.equal(end, linalg.rotate(x, bases))
        factors = [torch.rand(2, d, d, generator=g) for d in shape]
        spare = torch.full_like(x, torch.nan)
        operands = linalg.gram_operands(x, factors, spare)
        for mode, (factor, operand, copy) in enumerate(operands):
            assert (copy is not None) == (0 < mode < len(shape) - 1)
            if copy is not None:
                copy[0].copy_(copy[1])
            expected = factor.clone()
            linalg.gram_ema_(expected, linalg.matricized(x, mode), 0.9, 0.25)
            linalg.gram_ema_(factor, operand, 0.9, 0.25)
            assert torch.equal(factor, expected)


def test_tensors_that_follow_one_another_in_every_list_are_joined():
    sizes = [ALIGNMENT, ALIGNMENT + 5, 7, ALIGNMENT]
    starts = [0, ALIGNMENT, 3 * ALIGNMENT, 4 * ALIGNMENT]
    flats = [torch.arange(8.0 * ALIGNMENT) for _ in range(3)]

    def views(flat):
        return [flat[i : i + n].view(1, -1) for i, n in zip(starts, sizes, strict=True)]

    xs, ys, zs = map(views, flats)
    zs[2] = torch.zeros(1, 7)  # in other memory: nobody is joined with it
    order = [3, 1, 2, 0]
    lists = [[x[i] for i in order] for x in (xs, ys, zs)]
    together = joined(*lists)
    assert [len(x) for x in together] == [3, 3, 3]
    lengths = [2 * ALIGNMENT + 5, 7, ALIGNMENT]  # what lies between two of them is included
    for x in together:
        assert sorted(map(len, x)) == sorted(lengths)
    for x in together:
        for piece in x:
            piece.add_(1)
    for flat in flats[:2]:
        for start, n in zip(starts, sizes, strict=True):
            assert torch.equal(flat[start : start + n], torch.arange(start, start + n) + 1.0)
    assert torch.equal(zs[2], torch.ones(1, 7))


@pytest.mark.skipif(
    torch.cuda.is_available() or not hasattr(torch.backends.mkldnn.matmul, "fp32_precision"),
    reason="a CPU's switch",
)
def test_products_on_a_cpu_are_in_full_precision_and_the_switch_is_put_back():
    switch = torch.backends.mkldnn.matmul
    before = switch.fp32_precision
    try:
        for value in ("bf16", "tf32", "ieee"):
            switch.fp32_precision = value
            with linalg.matmul_precision("high"):
                assert switch.fp32_precision == "ieee"
            assert switch.fp32_precision == value
    finally:
        switch.fp32_precision = before
    with linalg.matmul_precision("highest"):  # "none": nobody asked, which is full precision
        assert switch.fp32_precision in ("none", "ieee")


def test_criterion_by_hand():
    a = torch.tensor([[[2.0, 1.0], [1.0, 3.0]]])
    off = criterion.relative_off_diagonal(a, torch.eye(2)[None])
    assert off.item() == pytest.approx((2 / 15) ** 0.5, rel=1e-6)


@given(
    st.integers(0, 10**6), st.sampled_from([1e-3, 1e-2, 0.1]), st.sampled_from([1e-12, 1.0, 1e9])
)
@settings(max_examples=25, deadline=None)
def test_criterion_agrees_with_float64_near_the_threshold(seed, tau, scale):
    """Eigenvectors turned a little, so that Eq. 11 holds or fails by 1%: float32 must see it."""
    g = torch.Generator().manual_seed(seed)
    n = 48
    q = orthogonal(n, 1, g)[0]
    lam = torch.logspace(0, -6, n, dtype=torch.float64)
    a = (q * lam) @ q.T
    skew = torch.randn(n, n, generator=g, dtype=torch.float64)
    skew = skew - skew.T
    low, high = 0.0, 1.0
    for _ in range(60):  # the angle at which the criterion is exactly tau
        middle = (low + high) / 2
        turned = q @ torch.linalg.matrix_exp(middle * skew)
        high, low = (middle, low) if _off(a, turned) > tau else (high, middle)
    for factor in (0.98, 1.02):
        turned = q @ torch.linalg.matrix_exp(low * factor * skew)
        exact = _off(a, turned)
        single = (a * scale).float()[None], turned.float()[None]
        fast = criterion.relative_off_diagonal(*single).item()
        assert fast == pytest.approx(exact, rel=1e-3)
        assert (fast > tau) == (exact > tau)


def _off(a, q):
    lam = q.T @ a @ q
    return ((lam - torch.diag(lam.diagonal())).norm() / lam.norm()).item()


def test_the_references_criterion_is_the_same_number():
    g = torch.Generator().manual_seed(3)
    x = torch.randn(6, 6, generator=g, dtype=torch.float64)
    a, q = x @ x.T, orthogonal(6, 1, g)[0]
    assert reference.relative_off_diagonal(a, q) == pytest.approx(_off(a, q), rel=1e-12)


def test_criterion_of_zero_and_of_nan():
    a = torch.zeros(2, 3, 3)
    a[1, 0, 0] = torch.nan
    off = criterion.relative_off_diagonal(a, torch.eye(3).repeat(2, 1, 1))
    assert off[0] == 0 and off[1].isnan()


@pytest.mark.parametrize("scale", [1e-24, 1.0, 1e12])
def test_eigh_residual_and_orthogonality(scale):
    g = torch.Generator().manual_seed(1)
    x = torch.randn(4, 32, 8, generator=g)
    a = scale * (x @ x.mT)  # rank 8 of 32
    values, vectors, converged = exact(a)
    assert all(converged)
    assert (values.diff(dim=-1) >= -1e-5 * values[:, -1:]).all()
    a, values = a / scale, values / scale  # the norm of 1e-24 would underflow here too
    residual = (a @ vectors - vectors * values[:, None]).norm() / a.norm()
    assert residual < 5e-6
    assert (vectors.mT @ vectors - torch.eye(32)).abs().max() < 5e-6


def test_one_matrix_without_eigenvectors_spares_the_others():
    a = torch.eye(3).repeat(3, 1, 1) * torch.tensor([1.0, 2.0, 3.0])[:, None, None]
    a[1] = torch.nan
    values, vectors, converged = exact(a)
    assert converged == [True, False, True]
    torch.testing.assert_close(values[2], torch.full((3,), 3.0))
    for vector in vectors:  # the identity where there is no answer
        torch.testing.assert_close(vector.abs(), torch.eye(3))


def near(n, count, rank, generator):
    """Factors, and the eigenvectors of slightly different ones."""
    x = torch.randn(count, n, rank, generator=generator)
    y = x + 0.2 * torch.randn(count, n, rank, generator=generator)
    decay = torch.linspace(1, 0.05, rank)
    a, b = ((z * decay) @ (z * decay).mT for z in (x, y))
    return a, torch.linalg.eigh(b).eigenvectors


@pytest.mark.parametrize("orthogonalization", ORTHOGONALIZATIONS)
@pytest.mark.parametrize("rank", [10, 96, 300])
@pytest.mark.parametrize("scale", [1e-20, 1.0])
def test_warm_start_ends_below_tau(orthogonalization, rank, scale):
    a, old = near(96, 3, rank, torch.Generator().manual_seed(rank))
    a = scale * a
    assert (criterion.relative_off_diagonal(a, old) > 0.1).all()
    solver = Solver(method="warm", orthogonalization=orthogonalization, max_iterations=10)
    factors = torch.stack([a[0], a[0], *a[1:]])
    operators = torch.stack([old[0], torch.eye(96), *old[1:]])
    untouched = operators[1].clone()
    (result,) = solver.solve([Problem(factors, operators, [0, 2, 3])], 0.1)
    q = operators[[0, 2, 3]]
    assert all(result.converged)
    assert torch.equal(operators[1], untouched)
    assert (criterion.relative_off_diagonal(a, q) <= 0.1).all()
    assert (result.values.diff() >= 0).all()
    assert (q.mT @ q - torch.eye(96)).abs().max() < 1e-5


def test_warm_start_falls_back_when_it_does_not_converge():
    a, old = near(96, 2, 96, torch.Generator().manual_seed(1))
    solver = Solver(method="warm", max_iterations=1, tolerance=1e-6)
    operators = old.clone()
    (result,) = solver.solve([Problem(a, operators, [0, 1])], 0.0)
    assert all(result.converged)
    assert (criterion.relative_off_diagonal(a, operators) < 1e-5).all()  # eigh's accuracy


@pytest.mark.parametrize(
    "settings",
    [
        {"method": "lanczos"},
        {"orthogonalization": "gram"},
        {"max_iterations": 0},
        {"tolerance": 0.0},
        {"workspace_mib": 0},
    ],
)
def test_bad_solver_settings_are_named(settings):
    with pytest.raises(ValueError, match=next(iter(settings))):
        Solver(**settings)


def test_inverse_root_by_hand_and_against_the_reference():
    values, vectors = torch.linalg.eigh(torch.diag(torch.tensor([16.0, 1.0])))
    root = linalg.inverse_root(values[None], vectors[None], torch.tensor([0.25]), 0.0)
    torch.testing.assert_close(root[0], torch.diag(torch.tensor([0.5, 1.0])))
    g = torch.Generator().manual_seed(2)
    x = torch.randn(7, 5, generator=g, dtype=torch.float64)
    a = x @ x.T
    lam, q = torch.linalg.eigh(a)
    fast = linalg.inverse_root(lam[None], q[None], torch.tensor([0.25], dtype=torch.float64), 1e-3)
    torch.testing.assert_close(fast[0], reference.inverse_root(a, 0.25, 1e-3), rtol=1e-9, atol=1e-9)
