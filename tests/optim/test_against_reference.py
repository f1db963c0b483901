"""The fast optimizer against the paper's algorithms in float64, 100 steps."""

import pytest
import torch

from algoperf_shampoo.optim import AdamW, EShampoo, reference

from .support import (
    PLAIN,
    SETTINGS,
    STARTS,
    VARIANTS,
    ReferenceParameter,
    bases_of,
    gradients,
    limits,
    make,
)

# Shape and max_preconditioner_dim: a matrix, blocks of a matrix with a remainder of 1, a
# convolution (order 3 after merging), a wide one.
SEPARATED = [((12, 7), 16), ((17, 4), 16), ((32, 20), 16), ((8, 4, 3, 3), 12), ((6, 30), 64)]


@pytest.mark.parametrize("nadam", [False, True])
@pytest.mark.parametrize(("shape", "max_dim"), SEPARATED)
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-4)])
def test_hundred_steps(variant, shape, max_dim, nadam, dtype, tolerance):
    if nadam and variant in PLAIN:
        pytest.skip("has no numerator of NAdam's")
    start = next(gradients(shape, 1, seed=7))
    parameter = torch.nn.Parameter(start.to(dtype))
    small = limits(variant, max_preconditioner_dim=max_dim)
    optimizer = make(variant, [parameter], nadam=nadam, **small)
    expected = ReferenceParameter(variant, start, max_dim=max_dim, nadam=nadam)
    for gradient in gradients(shape, 100, dtype=dtype):
        parameter.grad = gradient.clone()
        optimizer.step()
        expected.walk(gradient, optimizer) if variant in STARTS else expected.step(gradient)
    if variant == "eshampoo_qr":  # QR(LQ) leaves eps cond(L) in columns of small eigenvalues
        tolerance *= 10
    assert expected.relative_error(parameter) < tolerance


@pytest.mark.parametrize(("shape", "max_dim"), [((20,), 64), ((40,), 16), ((24, 24), 64)])
@pytest.mark.parametrize("variant", ["eshampoo_fixed", "eshampoo_adaptive"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-4)])
def test_low_rank_gradients_with_the_same_basis(variant, shape, max_dim, dtype, tolerance):
    """The null space's basis is arbitrary: equal results given the same Q, and Q checked itself."""
    start = next(gradients(shape, 1, seed=7))
    parameter = torch.nn.Parameter(start.to(dtype))
    optimizer = make(variant, [parameter], max_preconditioner_dim=max_dim)
    expected = ReferenceParameter(variant, start, max_dim=max_dim)
    direction = next(gradients(shape, 1, seed=9))
    for t, noise in enumerate(gradients((), 100), start=1):
        gradient = (direction * noise).to(dtype)  # every factor has rank one (per block)
        parameter.grad = gradient.clone()
        optimizer.step()
        expected.step(gradient, bases=bases_of(optimizer))
        if t % 5 == 0:
            eps = torch.finfo(dtype).eps
            for rule in expected.rules:
                for factor, q in zip(rule.factors, rule.bases, strict=True):
                    identity = torch.eye(len(q), dtype=torch.float64)
                    assert (q.T @ q - identity).abs().max() < 100 * eps
                    off = reference.relative_off_diagonal(factor, q)
                    assert off < max(rule.h.tau, 100 * eps)
    assert expected.relative_error(parameter) < tolerance


def test_one_dim_parameter_is_full_matrix_adam_once_its_factor_has_full_rank():
    start = next(gradients((6,), 1, seed=7))
    parameter = torch.nn.Parameter(start.clone())
    optimizer = make("eshampoo_fixed", [parameter], precondition_frequency=10)
    expected = ReferenceParameter("eshampoo_fixed", start, frequency=10)
    for gradient in gradients((6,), 100):
        parameter.grad = gradient.clone()
        optimizer.step()
        expected.step(gradient)
    assert expected.relative_error(parameter) < 1e-10


@pytest.mark.parametrize("build", [AdamW, EShampoo])
def test_identity_basis_is_torch_adamw(build):
    """EShampoo before its first refresh, and the baseline: torch.optim.AdamW."""
    shapes = [(12, 7), (5,), (), (4, 3, 2)]
    ours = [torch.nn.Parameter(next(gradients(s, 1))) for s in shapes]
    theirs = [torch.nn.Parameter(p.detach().clone()) for p in ours]
    optimizer = build(ours, **SETTINGS)  # F = 100
    expected = torch.optim.AdamW(theirs, **SETTINGS)
    for t in range(99):
        for i, (p, q) in enumerate(zip(ours, theirs, strict=True)):
            p.grad = next(gradients(p.shape, 1, seed=100 * t + i))
            q.grad = p.grad.clone()
        optimizer.step()
        expected.step()
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("lr", [1.44e-3, torch.tensor(1.44e-3)])
@pytest.mark.parametrize("build", [AdamW, EShampoo])
def test_weight_decay_keeps_its_size_in_float32(build, lr):
    """At the paper's point lr * weight_decay is 2.8e-7, and in float32 1 less that is 1 less
    3.0e-7: torch.optim.AdamW, which multiplies by it, decays 6% too much."""
    shape, decay, steps = (64, 64), 1.97e-4, 60
    start = torch.linspace(0.5, 1, 64 * 64).view(shape)
    drawn = list(gradients(shape, steps, seed=1, dtype=torch.float32))

    def excess(build, **more):
        """Of the decay over that of the same steps in float64, as a share of it."""
        ends = []
        for dtype in (torch.float32, torch.float64):
            p = torch.nn.Parameter(start.to(dtype, copy=True))
            rate = more["lr"].to(dtype) if isinstance(more["lr"], torch.Tensor) else more["lr"]
            optimizer = build([p], **{**more, "lr": rate}, weight_decay=decay)
            for g in drawn:
                p.grad = g.to(dtype, copy=True)
                optimizer.step()
            ends.append(p.detach().double())
        along = torch.dot((ends[1] - ends[0]).flatten(), start.double().flatten())
        return (along / (steps * 1.44e-3 * decay * start.double().square().sum())).item()

    assert abs(excess(build, lr=lr, betas=(0.9, 0.999))) < 0.01
    assert excess(torch.optim.AdamW, lr=1.44e-3) > 0.04


def test_identity_basis_is_nadamw():
    """With the flag on: the NAdamW formula, written out here once more."""
    value = next(gradients((9, 4), 1))
    parameter = torch.nn.Parameter(value.clone())
    optimizer = EShampoo([parameter], nadam=True, **SETTINGS)
    (b1, b2), lr, wd = SETTINGS["betas"], SETTINGS["lr"], SETTINGS["weight_decay"]
    m = v = torch.zeros_like(value)
    for t, g in enumerate(gradients((9, 4), 50), start=1):
        parameter.grad = g.clone()
        optimizer.step()
        m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g * g
        numerator = (b1 * m + (1 - b1) * g) / (1 - b1**t)
        value = value - lr * (numerator / ((v / (1 - b2**t)).sqrt() + 1e-8) + wd * value)
    torch.testing.assert_close(parameter.detach(), value, rtol=1e-12, atol=1e-12)


def test_a_rotated_parameter_learns_as_the_unrotated_one():
    """EShampoo with F = 1 is equivariant: gradients U G V' give updates U (...) V'."""
    g = torch.Generator().manual_seed(0)
    u = torch.linalg.qr(torch.randn(6, 6, generator=g, dtype=torch.float64)).Q
    v = torch.linalg.qr(torch.randn(9, 9, generator=g, dtype=torch.float64)).Q
    plain = torch.nn.Parameter(torch.zeros(6, 9, dtype=torch.float64))
    turned = torch.nn.Parameter(torch.zeros(6, 9, dtype=torch.float64))
    settings = dict(
        lr=0.1,
        precondition_frequency=1,
        max_preconditioner_dim=16,
        weight_decay=0.0,
        betas=(0.0, 0.9),
    )
    optimizers = [EShampoo([p], **settings) for p in (plain, turned)]
    # From the third step on the factors have full rank; the first two set an arbitrary null space.
    for t, gradient in enumerate(gradients((6, 9), 30)):
        plain.grad, turned.grad = gradient.clone(), u @ gradient @ v.T
        for optimizer in optimizers:
            optimizer.step()
        if t == 2:
            with torch.no_grad():
                turned.copy_(u @ plain @ v.T)
            states = [o._groups[0].layout.stacks[0].state["exp_avg_sq"] for o in optimizers]
            states[1].copy_(states[0])
    torch.testing.assert_close(turned.detach(), (u @ plain @ v.T).detach(), rtol=1e-8, atol=1e-8)
