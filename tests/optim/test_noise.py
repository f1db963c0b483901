"""Coordinates that are nothing but rounding take no step, and whatever is more takes its step."""

import copy

import pytest
import torch

from algoperf_shampoo.optim import EShampoo, noise, reference

from .support import SETTINGS, ReferenceParameter, bases_of, gradients, make


def shares(shape, steps, F, noise_directions="drop", noise_level=32.0, **settings):
    """Per step from the second refresh on, the share of |U| outside the span of all gradients so
    far; exactly it is 0."""
    settings = dict(lr=1.0, weight_decay=0.0, precondition_frequency=F) | settings
    p = torch.nn.Parameter(torch.zeros(shape))
    optimizer = EShampoo(
        [p], noise_directions=noise_directions, noise_level=noise_level, **settings
    )
    seen, found = [], []
    for gradient in gradients(shape, steps, seed=3):
        p.grad = gradient.float()
        seen.append(p.grad.double().flatten())
        before = p.detach().clone()
        optimizer.step()
        u = (before - p.detach()).double().flatten()
        q = torch.linalg.qr(torch.stack(seen, 1)).Q
        found.append(((u - q @ (q.T @ u)).norm() / u.norm()).item())
    return found[2 * F :]


@pytest.mark.parametrize("shape", [(200,), pytest.param((200, 3), marks=pytest.mark.slow)])
def test_at_f_1_almost_nothing_is_outside_the_span_of_the_gradients(shape):
    """The authors' code: .65 and .42 after 40 steps."""
    kept = shares(shape, 40, 1, "keep", betas=(0.9, 0.95))
    assert sum(kept) / len(kept) > 0.5  # the test sees what it is about
    assert max(shares(shape, 40, 1, betas=(0.9, 0.95))) < 0.05


def test_weak_directions_leak_less_at_a_higher_level():
    """Gradients over four decades: their weak directions are mixed with null ones by float32."""

    def walk(level):
        g = torch.Generator().manual_seed(0)
        basis = torch.linalg.qr(torch.randn(120, 30, generator=g, dtype=torch.float64)).Q
        weights = torch.logspace(0, -4, 30, dtype=torch.float64)
        p = torch.nn.Parameter(torch.zeros(120))
        optimizer = EShampoo([p], lr=1.0, weight_decay=0.0, precondition_frequency=1,
                             betas=(0.9, 0.999), noise_level=level)  # fmt: skip
        for _ in range(60):
            p.grad = (basis * weights @ torch.randn(30, generator=g, dtype=torch.float64)).float()
            before = p.detach().clone()
            optimizer.step()
        u = (before - p.detach()).double()
        return ((u - basis @ (basis.T @ u)).norm() / u.norm()).item()

    assert walk(32.0) > 0.2
    assert walk(4096.0) < 0.05


@pytest.mark.parametrize("tau", [0.0, 0.1])
@pytest.mark.parametrize(
    ("size", "steps"), [(100, 300), pytest.param(400, 2000, marks=pytest.mark.slow)]
)
def test_a_constant_gradient_is_followed(size, steps, tau):
    """In float64, cos(U, G) is .92 and more; noise made it .025."""
    gradient = next(gradients((size,), 1)).float()
    cosines = {}
    for policy in ("keep", "drop"):
        p = torch.nn.Parameter(torch.zeros(size))
        optimizer = EShampoo([p], lr=1.0, weight_decay=0.0, betas=(0.9, 0.95), tau=tau,
                             precondition_frequency=10, noise_directions=policy)  # fmt: skip
        for _ in range(steps):
            p.grad = gradient.clone()
            before = p.detach().clone()
            optimizer.step()
        u = before - p.detach()
        cosines[policy] = torch.cosine_similarity(u, gradient, dim=0)
        length = u.norm()
    assert cosines["keep"] < 0.9 < cosines["drop"]
    assert 0.9 < length < 1.1  # one direction, in which m / sqrt(D) is 1


@pytest.mark.parametrize("shape", [(200,), (40, 30)])
def test_at_f_10_no_movement_is_lost(shape):
    """Most of a step goes to directions that were null at the last refresh, and all of it stays."""
    params = [torch.nn.Parameter(torch.zeros(shape)) for _ in range(2)]
    build = dict(lr=1.0, weight_decay=0.0, precondition_frequency=10, betas=(0.9, 0.999),
                 max_preconditioner_dim=256 if len(shape) == 1 else 48)  # fmt: skip
    optimizer = EShampoo(params[:1], **build)
    twin = EShampoo(params[1:], noise_directions="keep", **build)
    rank = 4
    for t, gradient in enumerate(gradients(shape, 39, seed=3), start=1):
        if len(shape) == 2:
            gradient = gradient[:, :rank] @ gradient[:rank]  # another subspace in every step
        before = params[0].detach().clone()
        for p, o in zip(params, (optimizer, twin), strict=True):
            p.grad = gradient.float()
            o.step()
        stack = optimizer._groups[0].layout.stacks[0]
        if t == 30:
            lam = [f[0].double() for f in stack.factors]
            null = [torch.linalg.eigh(a) for a in lam]
        if t > 30:
            u = (before - params[0].detach()).double().view(stack.shape)
            q = [v[:, e < 1e-6 * e.max()] for e, v in null]
            if len(shape) == 1:
                assert (q[0].T @ u).norm() > 0.4 * u.norm()  # was null then
    assert torch.equal(params[0], params[1])


@pytest.mark.parametrize("shape", [(12, 7), (6, 5, 4), (10,)])
@pytest.mark.parametrize("tau", [0.0, 0.1])
def test_the_rule_against_the_reference(shape, tau):
    """At a level so high that it leaves out much, in float64; spectra over three decades."""
    value = next(gradients(shape, 1, seed=7))
    kappa = 0.05
    level = kappa / torch.finfo(torch.float64).eps
    p = torch.nn.Parameter(value.clone())
    variant = "eshampoo_adaptive" if tau else "eshampoo_fixed"
    optimizer = make(variant, [p], noise_level=level, max_preconditioner_dim=16)
    expected = ReferenceParameter(variant, value, max_dim=16)
    plain = ReferenceParameter(variant, value, max_dim=16)
    for rule in expected.rules:
        rule.h.kappa = kappa
    decay = torch.logspace(0, -3, shape[0], dtype=torch.float64).view(-1, *[1] * (len(shape) - 1))
    for gradient in gradients(shape, 80, seed=2):
        p.grad = gradient * decay
        optimizer.step()
        for walked in (expected, plain):
            walked.step(gradient * decay, bases=bases_of(optimizer))
    assert expected.relative_error(p) < 1e-9
    assert plain.relative_error(p) > 1e-4  # it has left something out


def test_looking_when_it_may_matter_is_as_looking_always(monkeypatch):
    """Noise that comes and goes, rows that miss gradients, levels and states that change."""
    honest, looks = noise.Watch.noisy, []

    def watched(watch, h):
        looks.append(honest(watch, h))
        return looks[-1]

    def always(watch, h):
        return [(i, noise.diagonal(s).sum(1)) for i, s in enumerate(watch._stacks)]

    results = []
    for looking in (watched, always):
        monkeypatch.setattr(noise.Watch, "noisy", looking)
        results.append(_walk_with_noise())
    assert any(looks) and not all(looks)
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


def _walk_with_noise():
    shapes = [(20, 15), (20, 15), (60,), (12, 4, 3)]
    params = [torch.nn.Parameter(torch.zeros(s)) for s in shapes]
    optimizer = make("eshampoo_fixed", params, max_preconditioner_dim=64, betas=(0.5, 0.5))
    for t in range(1, 120):
        for i, p in enumerate(params):
            g = next(gradients(p.shape, 1, seed=100 * t + i)).float()
            if t > 60:
                g[: len(g) // 2] *= 1e-9 if t < 105 else 1
            p.grad = None if (t, i) in ((50, 1), (70, 0), (71, 0)) else g
        if t == 95:
            optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        if t == 100:
            optimizer.param_groups[0]["noise_level"] = 1000.0
        optimizer.step()
    return params


def test_levels_by_hand():
    p = torch.nn.Parameter(torch.zeros(3, 4))
    optimizer = make("eshampoo_fixed", [p], max_preconditioner_dim=8)
    (stack,) = optimizer._groups[0].layout.stacks
    h = optimizer._hyper(optimizer.param_groups[0])
    assert noise.square(stack, h) ** 0.5 == pytest.approx(32 * 2.0**-23)
    high = h._replace(matmul_precision="high")
    assert noise.levels(high, torch.float32, on_gpu=True) == (32 * 2.0**-23, 8 * 2.0**-11)
    assert noise.levels(high, torch.float32, on_gpu=False)[1] == 0
    stack.factors[0].copy_(torch.diag(torch.tensor([4.0, 8.0, 4.0])))
    stack.state["exp_avg"][0, 0, :2] = torch.tensor([1e-5, 1.0])
    stack.state["exp_avg_sq"][0, 0, 2] = 1.0
    traces = noise.diagonal(stack).sum(1)
    assert traces.tolist() == [16.0]
    # k S sqrt(c2) = 3.8e-6 * 4; |m| <= k S c1
    moments = stack.state["exp_avg"], stack.state["exp_avg_sq"]
    mask = noise.of(stack, *moments, traces, 1.0, 1.0, h)
    assert mask[0, 0].tolist() == [True, False, False, True]
    mask = noise.of(stack, *moments, traces, 0.1, 1.0, h)
    assert mask[0, 0].tolist() == [False, False, False, True]


def test_settings_and_reference_defaults():
    assert reference.Hyperparameters().kappa == 0
    for bad in ({"noise_directions": "lose"}, {"noise_level": -1.0}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            EShampoo([torch.nn.Parameter(torch.zeros(3))], **{**SETTINGS, **bad})
