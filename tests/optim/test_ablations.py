"""EShampoo's options for the paper's ablations, and Algorithm 4, against the float64 reference."""

import functools

import pytest
import torch

from algoperf_shampoo.optim import EShampoo, Shampoo2Trace, ShampooAdaptive, Solver
from algoperf_shampoo.optim.reference import Hyperparameters
from algoperf_shampoo.optim.reference_eshampoo import EShampooAblation, two_stage_tau
from algoperf_shampoo.optim.reference_shampoo import Shampoo
from benchmarks import separated

from .support import SETTINGS, blocks_of

STEPS = 60
QR = Solver(method="qr", max_iterations=3)
# Options of the fast optimizer, of the reference, and tau.
OPTIONS = [
    ({"beta3": 0.8}, {"beta3": 0.8}, 0.0),
    ({"basis_aware": True}, {"basis_aware": True}, 0.0),
    ({"basis_aware": True, "beta3": 0.99}, {"basis_aware": True, "beta3": 0.99}, 0.1),
    ({"eigensolver": QR}, {"max_iterations": 3}, 0.1),
    ({"eigensolver": QR}, {"max_iterations": 3}, 0.0),
    ({"eigensolver": QR, "basis_aware": True}, {"max_iterations": 3, "basis_aware": True}, 0.1),
    ({"freeze_after": 24}, {"freeze_after": 24}, 0.0),
    ({"tau_later": 0.01, "tau_switch": 30}, {"tau_at": two_stage_tau(0.5, 0.01, 30)}, 0.5),
    ({"tau_later": 0.5, "tau_switch": 30}, {"tau_at": two_stage_tau(0.01, 0.5, 30)}, 0.01),
    ({"one_dim": "only"}, {"one_dim": "only"}, 0.0),
    ({"grafting": "adam", "grafting_eps": 1e-3}, {"grafting_epsilon": 1e-3}, 0.1),
]
names = [f"{'-'.join(fast)}-tau{tau}" for fast, _, tau in OPTIONS]


@functools.cache
def drawn(shape):
    return list(separated.gradients(shape, STEPS, seed=3))


def movement(optimizer, parameter, start, gradients):
    for G in gradients:
        parameter.grad = G.clone().to(parameter.dtype)
        optimizer.step()
    return parameter.detach().double() - start


def walked(rule, start, gradients):
    W = start
    for G in gradients:
        W = rule.step(W, G)
    return W - start


def hyper(tau, F=5):
    beta1, beta2 = SETTINGS["betas"]
    more = {"alpha": SETTINGS["lr"], "weight_decay": SETTINGS["weight_decay"]}
    return Hyperparameters(beta1=beta1, beta2=beta2, F=F, tau=tau, **more)


@pytest.mark.parametrize("shape", [(5, 4), (4, 3, 2), (4,)])
@pytest.mark.parametrize(("options", "of_reference", "tau"), OPTIONS, ids=names)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-3)])
def test_against_the_reference(shape, options, of_reference, tau, dtype, tolerance):
    start = separated.start(shape, 3)
    parameter = torch.nn.Parameter(start.to(dtype, copy=True))
    small = {"precondition_frequency": 5, "max_preconditioner_dim": max(shape)}
    optimizer = EShampoo([parameter], tau=tau, **SETTINGS, **small, **options)
    mine = movement(optimizer, parameter, start, drawn(shape))
    theirs = walked(EShampooAblation(hyper(tau), **of_reference), start, drawn(shape))
    assert (mine - theirs).norm() < tolerance * theirs.norm()


@pytest.mark.parametrize(("options", "of_reference", "tau"), OPTIONS, ids=names)
def test_every_option_matters(options, of_reference, tau):
    """Agreement says nothing of one that does nothing."""
    shape = (5, 4)
    ends = []
    for given in (options, {}):
        start = separated.start(shape, 3)
        parameter = torch.nn.Parameter(start.clone())
        optimizer = EShampoo(
            [parameter],
            tau=tau,
            precondition_frequency=5,
            max_preconditioner_dim=5,
            **SETTINGS,
            **given,
        )
        ends.append(movement(optimizer, parameter, start, drawn(shape)))
    assert (ends[0] - ends[1]).norm() > 1e-4 * ends[1].norm()


def test_a_threshold_that_switches_holds_for_each_parameter_by_its_own_steps():
    """One that missed gradients is in the first part for longer."""
    params = [torch.nn.Parameter(torch.zeros(5, 4).double()) for _ in range(2)]
    optimizer = EShampoo(
        params,
        tau=0.99,
        tau_later=1e-12,
        tau_switch=10,
        precondition_frequency=2,
        max_preconditioner_dim=5,
    )
    for t, G in enumerate(drawn((5, 4))[:20]):
        params[0].grad, params[1].grad = G.clone(), None if t < 8 else G.clone()
        optimizer.step()
    first, second = (blocks_of(optimizer, i)[0] for i in range(2))
    assert first["checks_0"] == 10 and second["checks_0"] == 6
    # After step 10 at every check: 12, 14, ..., 20; and 12.
    assert first["refreshes_0"] == 5 and second["refreshes_0"] == 1


@pytest.mark.parametrize("shape", [(5, 4), (4, 3, 2), (4,)])
@pytest.mark.parametrize("kind", ["adaptive", "trace"])
def test_grafting_of_shampoo(shape, kind):
    """Adam before the first roots, and its length from then on."""
    start = separated.start(shape, 3)
    parameter = torch.nn.Parameter(start.clone())
    small = {"precondition_frequency": 5, "max_preconditioner_dim": max(shape), "eps": 1e-4}
    graft = {"grafting": "adam", "grafting_eps": 1e-3}
    h = hyper(0.1 if kind == "adaptive" else 0.0)
    h.epsilon = 1e-4
    if kind == "adaptive":
        optimizer = ShampooAdaptive([parameter], tau=0.1, **SETTINGS, **small, **graft)
        rule = Shampoo(h, grafting_epsilon=1e-3)
    else:
        optimizer = Shampoo2Trace([parameter], **SETTINGS, **small, **graft)
        rule = Shampoo(h, squared=True, trace_scaled=True, grafting_epsilon=1e-3)
    mine = movement(optimizer, parameter, start, drawn(shape))
    theirs = walked(rule, start, drawn(shape))
    assert (mine - theirs).norm() < 1e-9 * theirs.norm()


def test_shampoo_adaptive_keeps_its_basis_and_renews_its_eigenvalues():
    """tau so large that no basis is ever computed: diagonal Shampoo, its eigenvalues fresh."""
    shape = (5, 4)
    start = separated.start(shape, 3)
    parameter = torch.nn.Parameter(start.clone())
    settings = {"precondition_frequency": 3, "max_preconditioner_dim": 5, "eps": 1e-4}
    optimizer = ShampooAdaptive([parameter], tau=0.999, **SETTINGS, **settings)
    h = hyper(0.999, F=3)
    h.epsilon = 1e-4
    rule = Shampoo(h)
    mine = movement(optimizer, parameter, start, drawn(shape))
    theirs = walked(rule, start, drawn(shape))
    assert (mine - theirs).norm() < 1e-9 * theirs.norm()
    (block,) = blocks_of(optimizer)
    assert block["refreshes_0"] == 0 and block["checks_0"] == 20 and block["ready"] == 1
    assert torch.equal(block["operator_0"], torch.eye(5).double())
    assert (block["roots_0"] != 1).all()
