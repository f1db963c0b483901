"""KL-Shampoo's factors as estimates: stationarity, maximum likelihood, scale, divergence."""

import functools
import math
import random

import pytest
import torch

from algoperf_shampoo.optim.reference import Hyperparameters
from algoperf_shampoo.optim.reference_ideal import (
    exact_correction,
    flip_flop,
    in_basis,
    kl_divergence,
    kronecker,
    power,
    second_moment,
    shampoo_factors,
    whitened_factor,
)
from algoperf_shampoo.optim.reference_kl import KLSOAP, KLShampoo, inverse_sqrt
from algoperf_shampoo.optim.reference_shampoo import Shampoo
from benchmarks import separated

from .test_identities import relative, spd

RATES = (0.1, 0.03, 0.01)  # 1 - beta2


def factors(rule):
    """What KL-Shampoo preconditions with: Q_i diag(lambda_i) Q_i'."""
    return [q @ torch.diag(lam) @ q.T for q, lam in zip(rule.bases, rule.lam, strict=True)]


def residual(S, A):
    """Distance from stationarity, relative: the largest over the modes."""
    targets = [whitened_factor(A, S, i) for i in range(len(S))]
    return max(relative(s, t) for s, t in zip(S, targets, strict=True))


def estimate(gradients, rate, steps, eigenvalues="ema"):
    """KL-Shampoo's statistics alone, F = 1 and no clamp, on gradients in a cycle."""
    h = Hyperparameters(beta2=1 - rate, F=1)
    rule = KLShampoo(h, eigenvalues=eigenvalues, max_clamp=None)
    rule.start(gradients[0])
    # From the second gradient on: the first alone would leave S1 singular, and its eigenvalues,
    # which are not clamped here, rounding.
    for t in range(1, steps + 1):
        rule.accumulate(gradients[t % len(gradients)])
        rule.refresh()
    return factors(rule)


@functools.cache
def moment(shape, seed):
    """A second moment that is no Kronecker product, and gradients whose mean gg' it is exactly."""
    count = math.prod(shape)
    A = spd(count, random.Random(seed))
    columns = power(A, 0.5).T * math.sqrt(count)
    return A, [g.reshape(shape).contiguous() for g in columns]


@functools.cache
def estimates(shape, eigenvalues):
    """By rate."""
    _, gradients = moment(shape, 1)
    count = len(gradients)
    steps = {rate: math.ceil(8 / rate / count) * count for rate in RATES}
    return {rate: estimate(gradients, rate, n, eigenvalues) for rate, n in steps.items()}


CASES = [((4, 3), "ema"), ((4, 3), "decomposition"), ((3, 2, 2), "ema")]


@pytest.mark.parametrize(("shape", "eigenvalues"), CASES)
def test_approaches_stationarity_and_maximum_likelihood_as_beta2_approaches_1(shape, eigenvalues):
    A, _ = moment(shape, 1)
    likelihood = kronecker(flip_flop(A, shape))
    found = estimates(shape, eigenvalues)
    for distances in (
        [residual(found[rate], A) for rate in RATES],
        [relative(kronecker(found[rate]), likelihood) for rate in RATES],
    ):
        # In proportion to 1 - beta2, near enough: a third of the rate, less than half the distance.
        for near, far in zip(distances[1:], distances, strict=False):
            assert near < 0.5 * far
        assert distances[-1] < 0.05


def test_shampoos_factors_do_not_satisfy_kl_shampoos_stationarity():
    A, _ = moment((4, 3), 1)
    assert residual(shampoo_factors(A, (4, 3)), A) > 0.5


@pytest.mark.parametrize("shape", [(4, 3), (2, 5), (3, 2, 2)])
@pytest.mark.parametrize("seed", range(3))
def test_flip_flop_is_stationary_and_no_neighbour_is_better(shape, seed):
    """The solver the others are held against, by the definition of what it solves."""
    A, _ = moment(shape, seed)
    S = flip_flop(A, shape)
    assert residual(S, A) < 1e-10
    best, draw = kl_divergence(A, kronecker(S)), random.Random(seed)
    for i, factor in enumerate(S):
        for size in (1e-3, 1e-1):
            noise = separated.gaussian(factor.shape, draw)
            moved = factor + size * torch.trace(factor) / len(factor) * (noise + noise.T) / 4
            others = [moved if j == i else s for j, s in enumerate(S)]
            assert best < kl_divergence(A, kronecker(others))


# On samples of a matrix Gaussian.


def assert_recovers(product, S1, S2, tolerance):
    """S1 (x) S2 with its scale."""
    truth = kronecker([S1, S2])
    assert relative(product, truth) < tolerance
    assert torch.trace(product).item() == pytest.approx(torch.trace(truth).item(), rel=tolerance)


def cosine(a, b):
    return ((a * b).sum() / (a.norm() * b.norm())).item()


@functools.cache
def matrix_gaussian(count):
    draw = random.Random(3)
    S1, S2 = spd(4, draw), spd(3, draw)
    left, right = power(S1, 0.5), power(S2, 0.5)
    return S1, S2, [left @ separated.gaussian((4, 3), draw) @ right for _ in range(count)]


def test_kl_shampoo_recovers_a_matrix_gaussian_with_its_scale_and_shampoo_does_not():
    rate, count = 0.01, 800
    S1, S2, gradients = matrix_gaussian(count)
    assert_recovers(kronecker(estimate(gradients, rate, count)), S1, S2, tolerance=0.25)

    shampoo = Shampoo(Hyperparameters(beta2=1 - rate, F=count + 1))
    W = torch.zeros(4, 3, dtype=torch.float64)
    for G in gradients:
        W = shampoo.step(W, G)
    product = kronecker(shampoo.factors) / (1 - (1 - rate) ** count) ** 2
    truth = kronecker([S1, S2])
    # It has the factors: E[GG'] = Tr(S2) S1 and E[G'G] = Tr(S1) S2. It has not the scale.
    assert cosine(product, truth) > 0.97
    scale = (torch.trace(product) / torch.trace(truth)).item()
    assert scale == pytest.approx(torch.trace(truth).item(), rel=0.25)
    with pytest.raises(AssertionError):
        assert_recovers(product, S1, S2, tolerance=0.25)


def test_maximum_likelihood_recovers_a_matrix_gaussian():
    S1, S2, gradients = matrix_gaussian(4000)
    A = second_moment(gradients)
    assert_recovers(kronecker(flip_flop(A, (4, 3))), S1, S2, tolerance=0.06)
    exact = kronecker([S1, S2])
    assert relative(kronecker(flip_flop(exact, (4, 3))), exact) < 1e-10


# On second moments that are no Kronecker product.


@pytest.mark.parametrize("shape", [(4, 3), (2, 5), (3, 2, 2)])
@pytest.mark.parametrize("seed", range(5))
def test_divergence_is_smaller_than_trace_scaled_shampoos(shape, seed):
    A, _ = moment(shape, seed)
    shampoo = kronecker(shampoo_factors(A, shape))
    scaled = shampoo / torch.trace(A) ** (len(shape) - 1)
    kl = kl_divergence(A, kronecker(flip_flop(A, shape)))
    assert kl < kl_divergence(A, scaled) < kl_divergence(A, shampoo)


@pytest.mark.parametrize(("shape", "eigenvalues"), CASES)
def test_the_recursion_attains_the_smaller_divergence_too(shape, eigenvalues):
    A, _ = moment(shape, 1)
    scaled = kronecker(shampoo_factors(A, shape)) / torch.trace(A) ** (len(shape) - 1)
    found = kl_divergence(A, kronecker(estimates(shape, eigenvalues)[RATES[-1]]))
    assert kl_divergence(A, kronecker(flip_flop(A, shape))) < found < kl_divergence(A, scaled)


def test_a_corrected_diagonal_beats_every_product_in_its_basis():
    """KL-SOAP and EShampoo keep d1 d2 eigenvalues, KL-Shampoo d1 + d2: what the rest buys."""
    A, _ = moment((4, 3), 1)
    S = flip_flop(A, (4, 3))
    Q = [torch.linalg.eigh(s).eigenvectors for s in S]
    corrected = in_basis(exact_correction(A, Q), Q)
    assert kl_divergence(A, corrected) < kl_divergence(A, kronecker(S))


# Details of the recursion.


def test_the_clamp_is_the_authors():
    lam = torch.tensor([1.0, 0.04, 0.0001, 0.0]).double()
    assert inverse_sqrt(lam, 4000).tolist() == pytest.approx([1, 5, 10, 0])
    many = torch.full((30,), 1e-6).double()
    assert inverse_sqrt(many, 4000).tolist() == pytest.approx([30.0] * 30)
    assert inverse_sqrt(many, 20).tolist() == pytest.approx([20.0] * 30)
    assert inverse_sqrt(many, None).tolist() == pytest.approx([1000.0] * 30)


@pytest.mark.parametrize("build", [KLShampoo, KLSOAP])
def test_the_first_call_updates_nothing(build):
    W, G = separated.start((4, 3), 0), separated.start((4, 3), 1)
    rule = build(Hyperparameters(weight_decay=0.1))
    assert torch.equal(rule.step(W, G), W)
    assert not torch.equal(rule.step(W, G), W)


def test_kl_shampoo_with_unit_eigenvalues_is_momentum_in_any_basis():
    """One step after the first call, U = M / lambda: the basis cancels."""
    W, G = separated.start((4, 3), 0), separated.start((4, 3), 1)
    rule = KLShampoo(Hyperparameters(alpha=1.0, epsilon=0.0), initial_eigenvalue=0.25)
    rule.step(W, G)
    torch.testing.assert_close(W - rule.step(W, G), (1 - rule.h.beta1) * G / 0.25)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: KLShampoo(Hyperparameters(), eigenvalues="exact"), "eigenvalues must be one of"),
        (lambda: KLShampoo(Hyperparameters(tau=0.1)), "neither a threshold"),
        (lambda: KLShampoo(Hyperparameters(), sequential=True).start(torch.ones(2)), "order 2"),
    ],
)
def test_settings_that_make_no_sense_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
