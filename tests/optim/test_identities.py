"""What the papers say of the family's members, as identities and bounds on small tensors."""

import math
import random

import pytest
import torch

from algoperf_shampoo import optim
from algoperf_shampoo.optim.reference import AdamW, EShampoo, Hyperparameters, relative_off_diagonal
from algoperf_shampoo.optim.reference_eshampoo import (
    EShampooAblation,
    preconditioned,
    two_stage_tau,
    warm_started_qr,
)
from algoperf_shampoo.optim.reference_ideal import (
    exact_correction,
    in_basis,
    kronecker,
    moments_from_rows,
    power,
    second_moment,
    shampoo_factors,
    update,
)
from algoperf_shampoo.optim.reference_shampoo import Shampoo, shampoo2_trace
from benchmarks import qr_against_eigh, separated

SHAPES = [(4, 3), (2, 5), (3, 2, 2)]
SEEDS = range(5)


def spd(d, draw):
    """Symmetric positive definite with eigenvalues between 0.1 and 10."""
    q = separated.orthogonal(d, draw)
    lam = torch.tensor([10 ** draw.uniform(-1, 1) for _ in range(d)], dtype=torch.float64)
    return q @ torch.diag(lam) @ q.T


def with_moment(A, beta2):
    """Gradients whose bias-corrected EMA of gg' is exactly A: columns of A^1/2, over their
    weights."""
    root, T = power(A, 0.5), len(A)
    for t in range(1, T + 1):
        weight = (1 - beta2) * beta2 ** (T - t) / (1 - beta2**T)
        yield root[:, t - 1] / math.sqrt(weight)


def relative(a, b):
    return ((a - b).norm() / b.norm()).item()


def walk(rule, shape, gradients, seed=0):
    W = separated.start(shape, seed)
    for G in gradients:
        W = rule.step(W, G)
    return W


# Shampoo^2 with trace scaling.


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("shape", [*SHAPES, (4,)])
def test_trace_scale_makes_a_kronecker_product_exact(shape, seed):
    """S^-(k-1) times the product of Shampoo's factors is E[gg'] where that is a product."""
    draw = random.Random(seed)
    A = kronecker([spd(d, draw) for d in shape])
    factors = shampoo_factors(A, shape)
    S = torch.trace(A)
    for factor in factors:
        assert torch.trace(factor).item() == pytest.approx(S.item())
    assert relative(kronecker(factors) / S ** (len(shape) - 1), A) < 1e-12


@pytest.mark.parametrize("shape", [*SHAPES, (4,)])
def test_shampoo2_trace_is_full_matrix_adam_on_a_kronecker_product(shape):
    """U = A^-1/2 m; plain Shampoo and Shampoo^2 without the scale are not (but for vectors)."""
    A = kronecker([spd(d, random.Random(d)) for d in shape])
    h = Hyperparameters(alpha=1.0, beta2=0.9, epsilon=1e-14, F=len(A))
    gradients = [g.reshape(shape) for g in with_moment(A, h.beta2)]
    torch.testing.assert_close(second_moment(gradients, h.beta2) / (1 - h.beta2 ** len(A)), A)

    def last_update(rule):
        before = None
        W = separated.start(shape, 0)
        for G in gradients:
            before, W = W, rule.step(W, G)
        return before - W, rule.M / (1 - h.beta1 ** len(A))

    U, M = last_update(shampoo2_trace(h))
    adam = (power(A, -0.5) @ M.flatten()).reshape(shape)
    assert relative(U, adam) < 1e-10
    k = len(shape)
    for rule, exact in [
        (Shampoo(h), k == 1),
        (Shampoo(h, squared=True), k == 1),
        (shampoo2_trace(h, authors_scale=True), k == 2),
    ]:
        U, _ = last_update(rule)
        assert (relative(U, adam) < 1e-10) == exact


def test_shampoo2_trace_is_not_exact_elsewhere():
    A = spd(12, random.Random(1))
    factors = shampoo_factors(A, (4, 3))
    assert relative(kronecker(factors) / torch.trace(A), A) > 0.1


def test_factors_from_the_moment_are_the_means_of_gram_matrices():
    gradients = list(separated.gradients((3, 2, 2), 30, seed=3))
    A = second_moment(gradients)
    for ours, by_definition in zip(
        shampoo_factors(A, (3, 2, 2)), moments_from_rows(gradients), strict=True
    ):
        torch.testing.assert_close(ours, by_definition)


# Lemma 1, Propositions 1 and 2, Corollary 1.


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("p", [0.25, 0.5, 1.0])
def test_lemma_1(shape, seed, p):
    draw = random.Random(seed)
    Q = [separated.orthogonal(d, draw) for d in shape]
    D, G = separated.gaussian(shape, draw).abs() + 0.1, separated.gaussian(shape, draw)
    size = update(D, Q, G, p).norm()
    slack = 1 + 1e-12
    assert D.max() ** -p * G.norm() <= size * slack
    assert size <= D.min() ** -p * G.norm() * slack


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("shape", SHAPES)
def test_proposition_1_bounds_adam_and_eshampoo(shape, seed):
    draw = random.Random(seed)
    A, G = spd(math.prod(shape), draw), separated.gaussian(shape, draw)
    lam = torch.linalg.eigvalsh(A)
    Q = [torch.linalg.eigh(f).eigenvectors for f in shampoo_factors(A, shape)]
    identity = [torch.eye(d, dtype=torch.float64) for d in shape]
    for p in (0.25, 0.5, 1.0):
        updates = [
            (power(A, -p) @ G.flatten()).reshape(shape),
            update(exact_correction(A, identity), identity, G, p),
            update(exact_correction(A, Q), Q, G, p),
        ]
        for U in updates:
            assert lam[-1] ** -p * G.norm() <= U.norm() * (1 + 1e-12)
            assert U.norm() <= lam[0] ** -p * G.norm() * (1 + 1e-12)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("shape", [(4, 3), (2, 5)])
def test_proposition_1_bounds_shampoo_by_its_dimensions(shape, seed):
    """Independent entries: E[gg'] diagonal. C^Shampoo = (R (x) L)^1/2, to the power -p."""
    draw = random.Random(seed)
    m, n = shape
    variances = separated.gaussian(shape, draw).abs() + 0.5
    A, G = torch.diag(variances.flatten()), separated.gaussian(shape, draw)
    low, high = variances.min(), variances.max()
    C = power(kronecker(shampoo_factors(A, shape)), 0.5)
    for p in (0.5, 1.0):
        size = (power(C, -p) @ G.flatten()).norm()
        scale = (m * n) ** (-p / 2) * G.norm()
        assert high**-p * scale <= size * (1 + 1e-12)
        assert size <= low**-p * scale * (1 + 1e-12)


def test_shampoo_leaves_adams_bounds_by_its_dimensions():
    """Unit variances: every update of Adam has ||G||; Shampoo's is (mn)^-1/4 of that."""
    shape, draw = (6, 5), random.Random(0)
    A, G = torch.eye(30, dtype=torch.float64), separated.gaussian(shape, draw)
    C = power(kronecker(shampoo_factors(A, shape)), 0.5)
    size = (power(C, -0.5) @ G.flatten()).norm() / G.norm()
    assert size.item() == pytest.approx(30**-0.25)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("shape", SHAPES)
def test_proposition_2_and_corollary_1(shape, seed):
    """D* is the best diagonal in a basis, so no worse than any preconditioner of that basis."""
    draw = random.Random(seed)
    C = spd(math.prod(shape), draw)
    factors = shampoo_factors(C, shape)
    Q = [torch.linalg.eigh(f).eigenvectors for f in factors]
    D = exact_correction(C, Q)
    best = (C - in_basis(D, Q)).norm()
    shampoo_squared, S = kronecker(factors), torch.trace(C)
    rivals = [
        power(shampoo_squared, 0.5),
        shampoo_squared,
        shampoo_squared / S ** (len(shape) - 1),
    ]
    rivals += [
        in_basis(D + 10**e * separated.gaussian(shape, draw), Q) for e in (-6, -3, 0) for _ in "123"
    ]
    # CASPR (Duvvuri et al., 2024) applies the sum of the factors' fourth roots twice: C^-1/2 of it.
    ones = [torch.eye(d, dtype=torch.float64) for d in shape]
    roots = [
        kronecker([power(f, -0.25) if i == mode else ones[i] for i in range(len(shape))])
        for mode, f in enumerate(factors)
    ]
    rivals.append(power(sum(roots) / len(roots), -4.0))
    for rival in rivals:
        # The rival is diagonal in that basis ...
        whole = kronecker(Q)
        in_Q = whole.T @ rival @ whole
        assert (in_Q - torch.diag(torch.diag(in_Q))).norm() < 1e-10 * in_Q.norm()
        # ... and further away.
        assert best < (C - rival).norm()


# Eigenvalue corrections: the exact one, EShampoo's and that of D.2.


def test_eshampoo_keeps_the_exact_correction_while_its_basis_stays():
    """Before the first refresh the basis is I, and D is D* (Eqs. 24 and 25)."""
    shape, beta2 = (4, 3), 0.9
    gradients = list(separated.gradients(shape, 20, seed=1))
    rule = EShampoo(Hyperparameters(beta2=beta2, F=100))
    walk(rule, shape, gradients)
    exact = exact_correction(second_moment(gradients, beta2), rule.bases)
    assert relative(rule.D, exact) < 1e-12


def exact_recursion(gradients, bases, beta2):
    """Eq. 26, mended: C^_T = beta2 R C^_T-1 R' + (1 - beta2) Q_T' g g' Q_T; D* is its diagonal."""
    old = kronecker(bases[0])
    C = torch.zeros_like(old)
    for G, Q in zip(gradients, bases, strict=True):
        new = kronecker(Q)
        R, g = new.T @ old, new.T @ G.flatten()
        C = beta2 * R @ C @ R.T + (1 - beta2) * torch.outer(g, g)
        old = new
    return torch.diag(C).reshape(gradients[0].shape)


def test_equation_26_is_the_exact_correction_and_the_others_are_not():
    shape, beta2 = (4, 3), 0.9
    gradients = list(separated.gradients(shape, 40, seed=2, angle=0.3))
    plain = EShampooAblation(Hyperparameters(beta2=beta2, F=4))
    aware = EShampooAblation(Hyperparameters(beta2=beta2, F=4), basis_aware=True)
    W, bases = separated.start(shape, 0), []
    for G in gradients:
        plain.step(W, G)
        aware.step(W, G)
        bases.append(list(plain.bases))
    exact = exact_correction(second_moment(gradients, beta2), plain.bases)
    assert relative(exact_recursion(gradients, bases, beta2), exact) < 1e-12
    assert relative(plain.D, exact) > 0.01
    assert relative(aware.D, exact) > 0.01


def test_basis_aware_correction_is_exact_where_the_moment_is_diagonal_in_the_basis():
    """One refresh from I; gradients with independent entries on average: C diagonal at Q = I."""
    d, beta2 = 3, 0.9
    A = torch.diag(torch.tensor([1.0, 2.0, 4.0, 8.0, 5.0, 0.3, 0.7, 6.0, 9.0]).double())
    gradients = [g.reshape(d, d) for g in with_moment(A, beta2)]
    last = separated.gaussian((d, d), random.Random(5))
    rules = [
        EShampooAblation(Hyperparameters(beta2=beta2, F=10), basis_aware=aware)
        for aware in (True, False)
    ]
    for rule in rules:
        walk(rule, (d, d), [*gradients, last])  # the refresh is step 10, on the last gradient
    exact = exact_correction(second_moment([*gradients, last], beta2), rules[0].bases)
    assert relative(rules[0].D, exact) < 1e-12
    assert relative(rules[1].D, exact) > 0.01


def steady(steps, draw, noise=0.0):
    """4x4 gradients with fixed singular vectors and order of singular values, and some noise."""
    u, v = separated.orthogonal(4, draw), separated.orthogonal(4, draw)
    scale = torch.tensor([1.0, 2.0, 4.0, 8.0]).double()
    for _ in range(steps):
        size = draw.uniform(0.8, 1.2) * draw.choice([-1, 1])
        yield u @ torch.diag(scale * size) @ v.T + noise * separated.gaussian((4, 4), draw)


def test_basis_aware_correction_is_plain_eshampoo_while_the_basis_does_not_move():
    """Fixed singular vectors: Q does not move after step 1, when D is still 0."""
    h = Hyperparameters(alpha=0.1, beta2=0.9, epsilon=1e-3, F=1)

    def distance(gradients):
        plain = walk(EShampooAblation(h), (4, 4), gradients)
        aware = walk(EShampooAblation(h, basis_aware=True), (4, 4), gradients)
        start = separated.start((4, 4), 0)
        return relative(aware - start, plain - start)

    assert distance(list(steady(40, random.Random(0)))) < 1e-10
    assert distance(list(steady(40, random.Random(0), noise=0.1))) > 1e-4


# Options of EShampoo.


@pytest.mark.parametrize("shape", [(5, 4), (4, 3, 2)])
def test_no_options_is_algorithm_2(shape):
    gradients = list(separated.gradients(shape, 40, seed=7))
    for F, tau in [(1, 0.0), (3, 0.1)]:
        h = Hyperparameters(F=F, tau=tau, nadam=True)
        assert torch.equal(
            walk(EShampoo(h), shape, gradients), walk(EShampooAblation(h), shape, gradients)
        )
        assert torch.equal(
            walk(EShampoo(h), shape, gradients),
            walk(EShampooAblation(h, beta3=h.beta2, tau_at=lambda _, t=tau: t), shape, gradients),
        )


def test_tau_to_zero_is_the_fixed_frequency():
    """tau = 0 skips Eq. 11; a small tau evaluates it, at every check. The distance falls to 0."""
    shape = (5, 4)
    gradients = list(separated.gradients(shape, 60, seed=8, angle=0.01))
    start = separated.start(shape, 0)

    def moved(tau):
        rule = EShampoo(Hyperparameters(alpha=0.1, beta2=0.95, F=4, tau=tau))
        return walk(rule, shape, gradients) - start

    fixed = moved(0.0)
    distances = [relative(moved(tau), fixed) for tau in (0.5, 0.2, 0.05, 1e-12)]
    assert distances == sorted(distances, reverse=True)
    assert distances[0] > 0.05
    assert distances[-1] == 0.0


def test_tau_to_zero_is_the_fixed_frequency_of_the_fast_optimizer():
    shape = (5, 4)
    ends = []
    for tau in (0.0, 1e-12, 0.5):
        parameter = torch.nn.Parameter(separated.start(shape, 0))
        optimizer = optim.EShampoo(
            [parameter], precondition_frequency=4, tau=tau, max_preconditioner_dim=5
        )
        for G in separated.gradients(shape, 60, seed=8, angle=0.01):
            parameter.grad = G.clone()
            optimizer.step()
        ends.append(parameter.detach() - separated.start(shape, 0))
    assert relative(ends[1], ends[0]) < 1e-10
    assert relative(ends[2], ends[0]) > 1e-3


def test_a_frozen_basis_and_a_schedule_of_tau():
    shape, h = (5, 4), Hyperparameters(F=2, tau=0.0)
    gradients = list(separated.gradients(shape, 40, seed=9))

    def refreshes(rule):
        W, steps = separated.start(shape, 0), []
        for t, G in enumerate(gradients, start=1):
            W = rule.step(W, G)
            if any(rule.refreshed):
                steps.append(t)
        return steps

    assert refreshes(EShampooAblation(h, freeze_after=7)) == [2, 4, 6]
    late = EShampooAblation(h, tau_at=two_stage_tau(first=0.99, then=1e-12, switch=30))
    assert [t for t in refreshes(late) if t > 2] == [32, 34, 36, 38, 40]
    early = EShampooAblation(h, tau_at=two_stage_tau(first=1e-12, then=0.99, switch=8))
    assert refreshes(early) == [2, 4, 6, 8]


@pytest.mark.parametrize("build", [EShampooAblation, Shampoo])
def test_grafting_gives_every_step_adams_length_and_keeps_the_direction(build):
    """Equal statistics, as both see the same gradients: only the length may differ."""
    shape, h = (5, 4), Hyperparameters(alpha=1.0, F=3)
    rules = [build(h), build(h, grafting_epsilon=1e-8), AdamW(h)]
    W = torch.zeros(shape, dtype=torch.float64)
    for t, G in enumerate(separated.gradients(shape, 20, seed=13), start=1):
        plain, grafted, adam = (-rule.step(W, G) for rule in rules)
        assert grafted.norm().item() == pytest.approx(adam.norm().item())
        expected = plain if t >= h.F else adam
        assert relative(grafted / grafted.norm(), expected / expected.norm()) < 1e-10


def test_which_tensors_leave_the_identity_basis():
    known = {"full": [1, 2, 3], "adam": [2, 3], "only": [1]}
    for one_dim, orders in known.items():
        assert [k for k in (1, 2, 3) if preconditioned(k, one_dim)] == orders
        for k in (1, 2):
            rule = EShampooAblation(Hyperparameters(F=1), one_dim=one_dim)
            walk(rule, (3,) * k, separated.gradients((3,) * k, 5, seed=k))
            still = all(torch.equal(q, torch.eye(3, dtype=torch.float64)) for q in rule.bases)
            assert still == (k not in orders)
    with pytest.raises(ValueError, match="one_dim must be one of"):
        preconditioned(1, "none")


# Algorithm 4.


@pytest.mark.parametrize("tau", [0.3, 0.1, 0.01])
def test_algorithm_4_ends_where_equation_11_holds(tau):
    draw = random.Random(0)
    L, Q = spd(6, draw), separated.orthogonal(6, draw)
    assert relative_off_diagonal(L, Q) > tau
    ended, Lambda, iterations = warm_started_qr(L, Q, tau, max_iterations=1000)
    assert 0 < iterations < 1000
    assert relative_off_diagonal(L, ended) <= tau
    torch.testing.assert_close(ended.T @ L @ ended, Lambda)
    torch.testing.assert_close(ended.T @ ended, torch.eye(6, dtype=torch.float64))
    # One iteration fewer does not do, and a good basis takes none.
    before, _, _ = warm_started_qr(L, Q, tau, max_iterations=iterations - 1)
    assert relative_off_diagonal(L, before) > tau
    assert warm_started_qr(L, ended, tau, max_iterations=9)[2] == 0


def test_the_benchmarks_algorithm_4_is_the_references():
    draw = random.Random(2)
    L, Q = spd(6, draw), separated.orthogonal(6, draw)
    for ours, theirs in zip(
        qr_against_eigh.iterate(L, Q, 0.01, 50), warm_started_qr(L, Q, 0.01, 50), strict=True
    ):
        torch.testing.assert_close(ours, theirs)


def test_one_iteration_of_algorithm_4_is_soaps():
    """QR(Q'LQ), then Q <- Q Q_step, is QR(LQ) up to signs."""
    draw = random.Random(1)
    L, Q = spd(5, draw), separated.orthogonal(5, draw)
    ours, _, _ = warm_started_qr(L, Q, 0.0, max_iterations=1)
    torch.testing.assert_close(ours.abs(), torch.linalg.qr(L @ Q).Q.abs())


def test_eshampoo_by_qr_to_the_end_is_eshampoo_by_eigh_where_the_order_stays():
    """D moves along when columns are sorted, so that descending and ascending are one. But by eigh
    D goes by rank: where the order changes while D is not 0 (F = 2: at the first refresh, from
    Q = I) the two are different algorithms."""
    gradients = list(steady(30, random.Random(0), noise=0.05))

    def distance(F):
        h = Hyperparameters(alpha=0.1, beta2=0.95, epsilon=1e-3, F=F)
        by_qr = walk(EShampooAblation(h, max_iterations=40), (4, 4), gradients)
        by_eigh = walk(EShampooAblation(h), (4, 4), gradients)
        start = separated.start((4, 4), 0)
        return relative(by_qr - start, by_eigh - start)

    assert distance(F=1) < 1e-10
    assert distance(F=2) > 0.1


def test_descending_order_takes_fewer_iterations():
    shape, counts = (8, 8), {}
    gradients = list(separated.gradients(shape, 60, seed=12))
    for order in ("descending", "ascending"):
        rule = EShampooAblation(
            Hyperparameters(beta2=0.95, F=5, tau=0.05), max_iterations=50, qr_order=order
        )
        W, total = separated.start(shape, 0), 0
        for G in gradients:
            W = rule.step(W, G)
            total += sum(rule.iterations)
        counts[order] = total
    assert 0 < counts["descending"] < counts["ascending"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"qr_order": "up"}, "qr_order must be one of"),
        ({"basis_aware": True, "max_iterations": 3, "permute_D": False}, "permute_D must be True"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        EShampooAblation(Hyperparameters(), **settings)
