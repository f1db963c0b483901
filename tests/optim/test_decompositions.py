"""Decompositions that fail or are none: the old operator stays, and it is counted and said."""

import logging

import pytest
import torch

from algoperf_shampoo.optim import EShampoo, Shampoo, Solver, criterion, reference, refresh
from algoperf_shampoo.optim.blocks import state_dict
from algoperf_shampoo.optim.eigen import exact
from algoperf_shampoo.optim.eigen.problem import Problem, Result
from algoperf_shampoo.optim.eigen.verify import sound

from .support import VARIANTS, ReferenceParameter, gradients, make

SETTINGS = dict(lr=0.05, precondition_frequency=5, max_preconditioner_dim=16)
# Those whose epsilon is added to the factors.
ON_FACTORS = [v for v, variant in VARIANTS.items() if variant.rule.adam_eps != "eps"]


def garbage(kind, values, vectors):
    g = torch.Generator().manual_seed(1)
    if kind == "noise":
        vectors = torch.randn(vectors.shape, generator=g)
    elif kind == "other vectors":
        vectors = torch.linalg.qr(torch.randn(vectors.shape, generator=g)).Q
    elif kind == "scaled":
        vectors = 1.1 * vectors
    elif kind == "permuted values":
        values = values.flip(-1)
    elif kind == "zero values":
        values = torch.zeros_like(values)
    elif kind == "one column":
        vectors = vectors.clone()
        vectors[..., -1] = vectors[..., 0]
    elif kind == "nan":
        vectors = torch.full_like(vectors, torch.nan)
    elif kind == "huge":
        vectors = 1e30 * vectors
    return values, vectors


KINDS = ["noise", "other vectors", "scaled", "permuted values", "zero values", "one column",
         "nan", "huge"]  # fmt: skip


class Garbage(Solver):
    """Claims to have converged; if it mends that, as Solver does."""

    kind: str
    mends: bool

    def solve(self, problems, tau, borrowed=()):
        results = super().solve(problems, tau, borrowed)
        for problem, result in zip(problems, results, strict=True):
            for p, i in enumerate(problem.indices):
                if i == 0:
                    values, vectors = garbage(
                        self.kind, result.values[p : p + 1], problem.operators[i : i + 1]
                    )
                    result.values[p], problem.operators[i] = values[0], vectors[0]
        return results

    def again(self, problem, result, positions):
        if self.mends:
            super().again(problem, result, positions)


@pytest.mark.parametrize("mends", [True, False])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("build", [EShampoo, Shampoo])
def test_finite_garbage_is_noticed_and_mended_or_the_old_operator_stays(build, kind, mends, caplog):
    params = [torch.nn.Parameter(torch.zeros(12, 10)) for _ in range(3)]
    solver = Solver()
    optimizer = build(params, eigensolver=solver, **SETTINGS)
    for t in range(1, 16):
        for i, p in enumerate(params):
            p.grad = next(gradients(p.shape, 1, seed=10 * t + i)).float()
        if t == 10:
            blocks = [state_dict.blocks_of(optimizer.state_dict()["state"][i])[0] for i in range(2)]
            optimizer.solver = Garbage()
            object.__setattr__(optimizer.solver, "kind", kind)
            object.__setattr__(optimizer.solver, "mends", mends)
        with caplog.at_level(logging.WARNING):
            optimizer.step()
        if t == 10:
            optimizer.solver = solver
            now = [state_dict.blocks_of(optimizer.state_dict()["state"][i])[0] for i in range(2)]
            assert "no eigendecomposition" in caplog.text
            for name in ("operator_0", "operator_1"):  # index 0 of either size is parameter 0's
                assert torch.equal(now[0][name], blocks[0][name]) != mends
                assert not torch.equal(now[1][name], blocks[1][name])
            counts = [2, 2, 0] if mends else [2, 1, 1]
            assert [now[0][f"{c}_0"] for c in ("checks", "refreshes", "failures")] == counts
            assert [now[1][f"{c}_0"] for c in ("checks", "refreshes", "failures")] == [2, 2, 0]
    last = state_dict.blocks_of(optimizer.state_dict()["state"][0])[0]
    assert last["refreshes_0"] == 2 + mends
    assert not torch.equal(last["operator_0"], now[0]["operator_0"])
    assert all(p.isfinite().all() and p.abs().max() < 5 for p in params)


@pytest.mark.parametrize("descending", [False, True])
def test_what_is_mended_is_the_decomposition(descending):
    x = torch.randn(2, 9, 9, generator=torch.Generator().manual_seed(0))
    factors = x @ x.mT
    problem = Problem(factors, torch.zeros_like(factors), [1])
    result = Result.empty(problem)
    Solver(descending=descending).again(problem, result, [0])
    (values,), vectors = result.values, problem.operators[1]
    torch.testing.assert_close(vectors * values @ vectors.mT, factors[1], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(vectors.mT @ vectors, torch.eye(9))
    assert torch.equal(values.argsort(descending=descending), torch.arange(9))
    assert not problem.operators[0].any()


@pytest.mark.gpu
@pytest.mark.parametrize("together", [1, 9])
@pytest.mark.parametrize("rank", [4, 20])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_vectors_of_a_factor_of_low_rank_are_orthogonal(rank, seed, together):
    """cuSOLVER's own are off by 1e-2 to 1 on such factors of OGBG's gradients, at status 0."""
    n, generator = 1024, torch.Generator().manual_seed(seed)
    x = torch.randn(n, rank, generator=generator) * 10.0 ** -torch.linspace(0, 3, rank)
    x *= 10.0 ** -(8 * torch.rand(n, 1, generator=generator))
    x[:: 1 + seed + 4] = 0
    a = (x @ x.mT).cuda()
    values, vectors, converged = exact.exact(a.expand(together, n, n).contiguous())
    assert all(converged)
    for lam, q in zip(values.double(), vectors.double(), strict=True):
        eye = torch.eye(n, dtype=q.dtype, device=q.device)
        assert (q.mT @ q - eye).norm() / n**0.5 < 1e-4
        assert (q * lam @ q.mT - a).norm() / a.norm() < 1e-5


def test_moments_stay_in_the_basis_that_stays(monkeypatch):
    """A step whose every decomposition fails is one that refreshes nothing."""
    optimizers, moved = [], []
    for fails in (False, True):
        params = [torch.nn.Parameter(torch.zeros(12, 10).double())]
        optimizer = EShampoo(params, **SETTINGS)
        for t in range(1, 13):
            params[0].grad = next(gradients((12, 10), 1, seed=t))
            with monkeypatch.context() as patch:
                if t == 10 and fails:
                    patch.setattr(exact, "exact", lambda a: (a[..., 0], a, [False] * len(a)))
                elif t == 10:
                    patch.setattr(refresh, "refresh", lambda *a, **k: False)
                    patch.setattr("algoperf_shampoo.optim.optimizer.refresh", lambda *a, **k: False)
                optimizer.step()
        optimizers.append(optimizer)
        moved.append(params[0])
    torch.testing.assert_close(*moved, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("n", [1, 2, 9, 128])
@pytest.mark.parametrize("scale", [1e-24, 1.0, 1e20])
def test_what_is_sound_passes(n, scale, dtype):
    g = torch.Generator().manual_seed(n)
    x = torch.randn(5, n, max(1, n // 3), generator=g, dtype=dtype)
    a = scale * (x @ x.mT)
    values, vectors, _ = exact.exact(a)
    assert sound(a, vectors, [0, 2, 4], values[[0, 2, 4]], 0.0).all()
    for kind in KINDS:
        if n < 9 and kind in ("other vectors", "permuted values", "one column"):
            continue
        wrong, other = garbage(kind, values, vectors)
        assert not sound(a, other.to(dtype), [0, 2, 4], wrong[[0, 2, 4]], 0.0).any(), kind


def test_a_check_costs_less_than_one_of_eq_11():
    """In multiplications: some products with a few vectors, not one with a matrix."""
    from torch.utils.flop_counter import FlopCounterMode

    a = torch.eye(256).repeat(4, 1, 1)
    with FlopCounterMode(display=False) as mine:
        sound(a, a, [0, 1, 2, 3], torch.ones(4, 256), 0.0)
    with FlopCounterMode(display=False) as theirs:
        criterion.relative_off_diagonal(a, a)
    assert mine.get_total_flops() < 0.2 * theirs.get_total_flops()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("eps", [0.0, 1e-8])
@pytest.mark.parametrize("variant", ["shampoo_grafting", "shampoo"])
def test_roots_of_zero_factors_are_the_references(variant, eps, dtype):
    """Gradients of zero until after the first check, as of a head that starts at zero."""
    eps = 1e-4 if eps and variant == "shampoo" else eps
    value = next(gradients((12, 7), 1, seed=7))
    p = torch.nn.Parameter(value.to(dtype))
    optimizer = make(variant, [p], eps=eps, max_preconditioner_dim=16)
    expected = ReferenceParameter(variant, value, max_dim=16)
    for rule in expected.rules:
        rule.h.epsilon = eps
    for t in range(1, 20):
        gradient = next(gradients((12, 7), 1, seed=t)) * (0 if t < 7 else 1)
        p.grad = gradient.to(dtype)
        optimizer.step()
        expected.step(gradient)
    assert p.isfinite().all()
    assert expected.relative_error(p) < (1e-9 if dtype == torch.float64 else 1e-4)


@pytest.mark.parametrize("variant", ON_FACTORS)
def test_singular_factors_with_eps_of_zero(variant):
    """Directions whose eigenvalue is rounding take no step: a pseudo-inverse's root."""
    value, gradient = (next(gradients((12, 7), 1, seed=s)) for s in (7, 8))
    p = torch.nn.Parameter(value.clone())
    optimizer = make(variant, [p], eps=0.0, max_preconditioner_dim=16)
    expected = ReferenceParameter(variant, value, max_dim=16)
    for rule in expected.rules:
        rule.h.epsilon = 0.0
    for _ in range(12):
        p.grad = gradient.clone()  # R has full rank, L rank 7 of 12
        optimizer.step()
        expected.step(gradient)
    assert expected.relative_error(p) < 1e-9
    root = reference.inverse_root(torch.diag(torch.tensor([4.0, 0.0])).double(), 0.5, 0.0)
    torch.testing.assert_close(root, torch.diag(torch.tensor([0.5, 0.0])).double())
