"""Gradients and states that are not finite, or too large: who keeps what, who is told."""

import copy
import logging

import pytest
import torch

from algoperf_shampoo.optim import nonfinite
from algoperf_shampoo.optim.blocks import state_dict
from algoperf_shampoo.optim.nonfinite import BOUND, NonFiniteGradientError, Skipped

from .support import (
    PRECONDITIONED,
    STARTS,
    VARIANTS,
    ReferenceParameter,
    bases_of,
    gradients,
    late,
    limits,
    make,
)

variants = pytest.mark.parametrize("variant", VARIANTS)
SHAPES = [(17, 4), (9,), (17, 4), (6, 5, 3), ()]
KEPT = ("0.exp", "0.fac", "0.ope", "0.eig", "0.roo")  # what must be finite in a saved state
BAD = [float("nan"), float("inf"), -float("inf"), 1e30, BOUND[torch.float32]]


def start():
    return [torch.nn.Parameter(next(gradients(s, 1, seed=i)).float()) for i, s in enumerate(SHAPES)]


def give(params, t, bad=(), value=float("nan")):
    """Gradients of step t; those of ``bad`` parameters with one bad entry, in their last block."""
    for i, p in enumerate(params):
        p.grad = next(gradients(p.shape, 1, seed=100 * t + i)).float()
        if i in bad:
            p.grad.view(-1)[-1] = value


def tensors(optimizer, i):
    entry = optimizer.state_dict()["state"][i]
    return {k: v for k, v in entry.items() if isinstance(v, torch.Tensor) and k != "step"}


@variants
@pytest.mark.parametrize("value", BAD)
def test_a_bad_gradient_leaves_its_parameter_as_it_is_and_no_other_notices(variant, value):
    small = limits(variant, max_preconditioner_dim=16)
    params, others = start(), start()
    optimizer, twin = make(variant, params, **small), make(variant, others, **small)
    for t in range(1, 14):
        bad = {3: (0,), 4: (0, 1), 8: (3,), 9: (4,), 12: (0,)}.get(t, ())
        before = [(p.detach().clone(), tensors(optimizer, i)) for i, p in enumerate(params)]
        give(params, t, bad, value)
        optimizer.step()
        for i in bad:
            weight, kept = before[i]
            assert torch.equal(params[i], weight)
            now = tensors(optimizer, i)
            assert all(torch.equal(x, now[name]) for name, x in kept.items())
        # One of the same shape in the same stack, and one alone, walk as without them.
        give(others, t)
        twin.step()
        assert torch.equal(params[2], others[2])
    steps = [optimizer.state_dict()["state"][i]["step"].item() for i in range(5)]
    assert steps == [13 - late(variant)] * 4 + [13]  # the last one is a scalar: Adam
    assert optimizer.skipped_gradients() == {
        0: Skipped(3, 0), 1: Skipped(1, 0), 3: Skipped(1, 0), 4: Skipped(1, 0),
    }  # fmt: skip
    assert all(p.isfinite().all() for p in params)


@variants
@pytest.mark.parametrize("missing", [False, True])
def test_against_the_reference(variant, missing):
    """t counts on and nothing else; beside a parameter that lacks gradients, too."""
    value = next(gradients((32, 20), 1, seed=7))
    params = [torch.nn.Parameter(value.clone()), torch.nn.Parameter(torch.zeros(32, 20).double())]
    optimizer = make(variant, params, **limits(variant, max_preconditioner_dim=16))
    expected = ReferenceParameter(variant, value, max_dim=16)
    for t, gradient in enumerate(gradients((32, 20), 40), start=1):
        params[0].grad = gradient.clone()
        params[1].grad = None if missing and t % 3 == 0 else torch.ones(32, 20).double()
        if t in (2, 7, 8, 33):
            params[0].grad[31, 3] = torch.nan
        optimizer.step()
        if t in (2, 7, 8, 33):
            for rule in expected.rules:
                if hasattr(rule, "adam") and rule.adam is not None:
                    rule.adam.t += 1
                rule.t += 1
        else:
            expected.step(gradient)
        if t == 1 and variant in STARTS:
            expected.lend(bases_of(optimizer))
    assert expected.relative_error(params[0]) < 1e-10


@variants
def test_a_check_that_is_due_takes_place_without_the_gradient(variant):
    if variant not in PRECONDITIONED:
        pytest.skip("no checks")
    params = start()
    optimizer = make(variant, params, max_preconditioner_dim=16)
    first = late(variant)  # has a decomposition of its own
    for t in range(1, 6 + first):
        give(params, t, bad=(0,) if t == 5 + first else ())
        optimizer.step()
    block = state_dict.blocks_of(optimizer.state_dict()["state"][0])[0]
    assert block["checks_0"] == block["refreshes_0"] == 1 + first and block["failures_0"] == 0


@variants
def test_propagate_is_the_plain_behaviour(variant):
    params = start()
    optimizer = make(variant, params, nonfinite_gradients="propagate")
    for _ in range(1 + late(variant)):
        give(params, 1, bad=(0,))
        optimizer.step()
    assert params[0].isnan().any() and params[2].isfinite().all()
    assert optimizer.skipped_gradients() == {}
    for group in optimizer.param_groups:  # may change between steps
        group["nonfinite_gradients"] = "skip"
    give(params, 2, bad=(2,))
    optimizer.step()
    assert params[2].isfinite().all() and optimizer.skipped_gradients() == {2: Skipped(1, 1)}


def test_just_below_the_bound_the_state_stays_finite_and_goes_on():
    largest = BOUND[torch.float32] * (1 - 2.0**-20)
    p = torch.nn.Parameter(torch.zeros(64, 48))
    optimizer = make("eshampoo_fixed", [p], max_preconditioner_dim=64)
    moved = []
    for t in range(1, 700):
        p.grad = torch.full((64, 48), largest) if t == 5 else torch.randn(64, 48)
        before = p.detach().clone()
        optimizer.step()
        moved.append((p.detach() - before).abs().max().item())
    assert all(x.isfinite().all() for x in tensors(optimizer, 0).values())
    assert optimizer.skipped_gradients() == {}
    # beta2 = .95: sqrt(D) needs 2 ln(2^48) / (1 - beta2) = 1,300 steps back to size 1, and every
    # step moves by more than the weight decay alone as soon as it has come some way.
    assert moved[-1] > 0


@variants
def test_too_many_in_a_row_are_an_error_of_a_complete_step(variant):
    params = start()
    optimizer = make(variant, params, nonfinite_limit=7 + late(variant))
    last = 10 + late(variant)
    for t in range(1, last + 1):
        give(params, t, bad=(1, 3) if t != 2 else (3,))
        if variant in PRECONDITIONED and t == last:  # the check after the seventh
            found = f"parameter 1 {last - 2} .of {last - 1} in all., param"
            with pytest.raises(NonFiniteGradientError, match=found):
                optimizer.step()
        else:
            optimizer.step()
    saved = optimizer.state_dict()
    assert saved["state"][0]["step"] == 10
    with pytest.raises(NonFiniteGradientError, match=f"parameter 3 {last} .of {last} in all."):
        optimizer.check_gradients()
    optimizer.load_state_dict(saved)  # and nothing is in a row any more
    optimizer.check_gradients()
    assert optimizer.skipped_gradients()[3] == Skipped(last, 0)


@variants
@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_a_parameter_whose_saved_state_is_not_finite_starts_anew(variant, value, caplog):
    params = start()
    small = limits(variant, max_preconditioner_dim=16)
    optimizer = make(variant, params, **small)
    for t in range(1, 8):
        give(params, t)
        optimizer.step()
    saved = optimizer.state_dict()
    names = [name for name in saved["state"][0] if name.startswith(KEPT)]
    for name in names:
        damaged = copy.deepcopy(saved)
        damaged["state"][0][name].view(-1)[0] = value
        with caplog.at_level(logging.WARNING):
            optimizer.load_state_dict(damaged)
        assert "parameter 0: state not finite" in caplog.text
        entry = optimizer.state_dict()["state"]
        assert entry[0]["step"] == 0 and entry[2]["step"] == 7 - late(variant)
        fresh = make(variant, start(), **small).state_dict()["state"][0]
        for key, x in entry[0].items():
            assert torch.equal(x, fresh[key]) if isinstance(x, torch.Tensor) else x == fresh[key]
        twins = [torch.nn.Parameter(p.detach().clone()) for p in params]
        alone = make(variant, twins[:1], **small)
        copies = [p.detach().clone() for p in params]
        for t in range(8, 15):
            give(params, t)
            twins[0].grad = params[0].grad.clone()
            optimizer.step()
            alone.step()
        torch.testing.assert_close(params[0], twins[0], rtol=1e-5, atol=1e-6)
        with torch.no_grad():
            for p, c in zip(params, copies, strict=True):
                p.copy_(c)


def test_a_factor_that_is_not_finite_starts_anew_at_the_next_check():
    params = start()
    optimizer = make("eshampoo_fixed", params, max_preconditioner_dim=16)
    for t in range(1, 5):
        give(params, t)
        optimizer.step()
    optimizer.state[params[0]]["0.factor_0"][0, 0] = float("inf")  # somebody writes into it
    for t in range(5, 11):
        give(params, t)
        optimizer.step()
        block = state_dict.blocks_of(optimizer.state_dict()["state"][0])[0]
        if t == 5:
            assert block["failures_0"] == 1 and not block["factor_0"].any()
            assert torch.equal(block["operator_0"], torch.eye(16))
    assert block["refreshes_0"] == 1 and block["factor_0"].isfinite().all()


@variants
def test_marks_of_a_device_agree_with_what_the_host_sees(variant):
    """The path of torch's operations on a GPU, on the CPU: rows are marked, nothing is read."""
    shapes = [(6, 5), (6, 5), (17, 16), (6, 5, 3)]
    results = []
    for marked in (False, True):
        params = [torch.nn.Parameter(next(gradients(s, 1, seed=5))) for s in shapes]
        optimizer = make(variant, params, **limits(variant, max_preconditioner_dim=16))
        (group,) = optimizer._groups
        if marked:
            group.guard._on_host, group.guard._flat = [], []
            group.guard._marks = [nonfinite.Marks(group.layout, torch.device("cpu"))]
        for t in range(1, 14):
            for i, p in enumerate(params):
                p.grad = next(gradients(p.shape, 1, seed=100 * t + i))
                if i in {3: (0,), 9: (0, 1), 10: (2, 3)}.get(t, ()):
                    p.grad.view(-1)[-1] = torch.nan
            if t == 6:
                params[1].grad = None
            optimizer.step()
        entries = optimizer.state_dict()["state"]
        results.append((params, optimizer.skipped_gradients(), entries))
    (a, counts, kept), (b, same_counts, same) = results
    assert counts == same_counts and counts[0] == Skipped(2, 0)
    for x, y in zip(a, b, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-9, atol=1e-9)
    for i, entry in kept.items():
        for name, x in entry.items():
            torch.testing.assert_close(torch.as_tensor(x), torch.as_tensor(same[i][name]))
