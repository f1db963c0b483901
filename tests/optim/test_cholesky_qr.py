"""QR of A Q by products in float64: Householder's columns, up to their signs."""

import pytest
import torch

from algoperf_shampoo.optim.eigen import cholesky_qr, simultaneous
from algoperf_shampoo.optim.eigen.problem import Problem

EPS = torch.finfo(torch.float32).eps


def by_products(x, q):
    """Q of x = QR by :mod:`.cholesky_qr`, in float32, and whether it says it is orthogonal."""
    work, out = x.double().contiguous(), torch.empty_like(x, memory_format=torch.contiguous_format)
    good = cholesky_qr.orthonormal_(work, torch.empty_like(work), q, out, torch.empty_like(out))
    return out, torch.tensor(good)


def differences(a, q):
    """What columns of Q of A Q = QR are off from Householder's in float64 for the same float32
    product, up to signs, in units of the tolerance: 16 times 2^-32 ||A|| / |r_jj|, and 1e-6.

    Of columns j before any one whose |r_jj| is not above n eps ||A||: there, whatever comes is
    decided by rounding. Also whether all columns are orthogonal to 1e-6.
    """
    x = a @ q
    found, good = by_products(x, q)
    assert good.all()
    expected, r = torch.linalg.qr(x.double())
    r = r.diagonal(dim1=1, dim2=2).abs()
    norm = torch.linalg.matrix_norm(a.double(), 2)[:, None]
    known = (r > a.shape[-1] * EPS * norm).cumprod(-1).bool()
    found = found.double()
    signs = torch.where((found * expected).sum(1, keepdim=True) < 0, -1.0, 1.0)
    error = torch.linalg.vector_norm(found * signs - expected, dim=1)
    tolerance = 16 * cholesky_qr.SHIFT * norm / r + 1e-6
    eye = torch.eye(a.shape[-1], dtype=torch.float64)
    assert torch.allclose(found.mT @ found, eye.expand_as(found), atol=1e-6)
    return (error / tolerance)[known], known


def spectrum(n, last):
    q = torch.linalg.qr(torch.randn(2, n, n, dtype=torch.float64)).Q
    return (q * torch.logspace(0, last, n, dtype=torch.float64)) @ q.mT


def gram(n, columns, dead=False):
    g = torch.randn(2, n, columns, dtype=torch.float64)
    g *= torch.logspace(0, -3, columns, dtype=torch.float64)
    if dead:
        g[:, ::3] = 0
    return g @ g.mT


FACTORS = {
    "condition 1e6": lambda n: spectrum(n, -6),
    "condition 1e12": lambda n: spectrum(n, -12),
    "a quarter of the rank": lambda n: gram(n, n // 4),
    "rank 1": lambda n: gram(n, 1),
    "dead units": lambda n: gram(n, 3 * n, dead=True),
}


@pytest.mark.parametrize("moved", [0.0, 1e-3, 0.1])
@pytest.mark.parametrize("n", [9, 64, 150, 300])
@pytest.mark.parametrize("kind", FACTORS)
def test_columns_are_householders_where_the_factor_says_anything(kind, n, moved):
    """Warm: the basis is that of the factor before it learnt something else."""
    torch.manual_seed(n)
    before = FACTORS[kind](n)
    a = ((1 - moved) * before + moved * FACTORS[kind](n)).float()
    q = torch.linalg.eigh(before.float()).eigenvectors.flip(-1)
    off, known = differences(a, q)
    assert off.max() <= 1
    assert known[:, 0].all()


def test_plain_cholesky_qr_fails_where_this_does_not():
    """At a condition of 1e6 in float32, and with null columns in float64."""
    torch.manual_seed(0)
    a = spectrum(64, -6).float()
    x = a @ torch.linalg.qr(torch.randn(2, 64, 64)).Q
    assert torch.linalg.cholesky_ex(x.mT @ x).info.all()
    a = gram(64, 8).float()
    q = torch.linalg.qr(torch.randn(2, 64, 64)).Q
    x = (a @ q).double()
    assert torch.linalg.cholesky_ex(x.mT @ x).info.all()
    found, good = by_products(a @ q, q)
    assert good.all() and found.isfinite().all()


def test_the_null_space_keeps_its_place():
    a = torch.zeros(1, 6, 6)
    a[0, :2, :2] = torch.tensor([[2.0, 1.0], [1.0, 2.0]])
    q = torch.eye(6)[None]
    found, good = by_products(a @ q, q)
    assert good.all()
    torch.testing.assert_close(found[0, :, 2:], torch.eye(6)[:, 2:], atol=1e-7, rtol=0)


def test_nan_is_said():
    x = torch.randn(3, 8, 8)
    x[1, 2, 3] = torch.nan
    _, good = by_products(x, torch.eye(8).expand(3, -1, -1))
    assert good.tolist() == [True, False, True]


@pytest.mark.parametrize("sort", [False, True])
@pytest.mark.parametrize("iterations", [1, 3])
def test_a_step_of_iteration_is_the_same_by_products(sort, iterations, monkeypatch):
    """As on a GPU, in borrowed memory and chunks, for scattered matrices; one is not finite."""
    torch.manual_seed(0)
    factors = torch.cat([gram(20, 60), spectrum(20, -3), gram(20, 40)]).float()
    old = torch.linalg.qr(torch.randn(6, 20, 20)).Q
    factors[4] = torch.nan
    results = []
    for fast in (False, True):
        monkeypatch.setattr(cholesky_qr, "fast_float64", lambda device, fast=fast: fast)
        problem = Problem(factors, old.clone(), [0, 2, 3, 4])
        memory = torch.randn(9000)
        borrowed = [simultaneous.BorrowedMemory(memory, 8500)]
        monkeypatch.setattr(torch.linalg, "qr", no_householder if fast else torch.linalg.qr)
        results.append((simultaneous.iterate(problem, 0.0, iterations, sort, 2**16, borrowed),
                        problem.operators))  # fmt: skip
        monkeypatch.undo()
    (theirs, expected), (ours, found) = results
    good = [0, 2, 3]
    assert ours.converged == theirs.converged == [True, True, True, False]
    assert torch.equal(found[[1, 5]], old[[1, 5]])
    signs = torch.where((found * expected).sum(1, keepdim=True) < 0, -1.0, 1.0)
    torch.testing.assert_close((found * signs)[good], expected[good], atol=3e-4, rtol=0)
    torch.testing.assert_close(ours.values[:3], theirs.values[:3], atol=1e-3, rtol=1e-3)
    if sort:
        assert torch.equal(ours.permutation[:3], theirs.permutation[:3])


def no_householder(x):
    assert x.isnan().any(), "only what is not finite goes to Householder"
    return torch.return_types.linalg_qr((x, x))
