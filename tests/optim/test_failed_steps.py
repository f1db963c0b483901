"""Steps that fail half-way: what may be asked for then, and that another try ends to the bit as a
step that did not fail. An error is raised before any one of torch's operations, in turn."""

import copy
import pickle

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from algoperf_shampoo.optim import EShampoo, Solver, criterion, refresh
from algoperf_shampoo.optim.blocks.layout import Layout
from algoperf_shampoo.optim.eigen import exact
from algoperf_shampoo.optim.eshampoo import EShampooRule as Rule
from algoperf_shampoo.optim.ops import BasisChange

from .support import PRECONDITIONED, VARIANTS, gradients, make

SHAPES = [(12, 10), (12, 10), (20,), (17, 16), (5, 4, 3)]
variants = pytest.mark.parametrize("variant", VARIANTS)


class OutOfMemory(TorchDispatchMode):
    """The ``number``-th operation is refused; counts them."""

    def __init__(self, number=None):
        super().__init__()
        self.count, self.number = 0, number

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "profiler":  # torch's own, around a step
            return function(*args, **(kwargs or {}))
        self.count += 1
        if self.count - 1 == self.number:
            raise torch.OutOfMemoryError("no memory")
        return function(*args, **(kwargs or {}))


def prepared(variant, dtype=torch.float32, **settings):
    """An optimizer after four steps; the fifth is due."""
    params = [
        torch.nn.Parameter(next(gradients(s, 1, seed=i)).to(dtype)) for i, s in enumerate(SHAPES)
    ]
    if variant in PRECONDITIONED:
        settings = {"max_preconditioner_dim": 16, **settings}
    optimizer = make(variant, params, weight_decay=0.1, **settings)
    for t in range(1, 5):
        give(params, t)
        optimizer.step()
    return optimizer, params


def give(params, t, missing=()):
    for i, p in enumerate(params):
        gradient = next(gradients(p.shape, 1, seed=10 * t + i)).to(p.dtype)
        p.grad = None if i in missing else gradient


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def state_of(optimizer):
    entries = optimizer.state_dict()["state"].values()
    return [torch.as_tensor(x) for entry in entries for x in entry.values()]


CASES = [(5, (), torch.float32), (6, (), torch.float32), (5, (1,), torch.float32),
         (5, (), torch.bfloat16)]  # fmt: skip


@variants
@pytest.mark.parametrize(("t", "missing", "dtype"), CASES)
@pytest.mark.slow
def test_an_error_before_any_operation(variant, t, missing, dtype):
    errors_before_operations(variant, t, missing, dtype, errors=10**6)


@pytest.mark.parametrize(
    ("variant", "t", "missing", "dtype"),
    [("eshampoo_adaptive", *CASES[2]), ("shampoo_grafting", *CASES[0]), ("nadamw", *CASES[3])],
)
def test_an_error_before_some_operations(variant, t, missing, dtype):
    errors_before_operations(variant, t, missing, dtype, errors=9)


def errors_before_operations(variant, t, missing, dtype, errors):
    optimizer, params = prepared(variant, dtype)
    blank = pickle.dumps((optimizer, params))

    def again():
        return pickle.loads(blank)

    if t == 6:
        give(params, 5)
        optimizer.step()
        blank = pickle.dumps((optimizer, params))
    for _ in range(2):  # the first time, something may be made that is kept
        optimizer, params = again()
        give(params, t, missing)
        with OutOfMemory() as counter:
            optimizer.step()
    expected, expected_state = params, state_of(optimizer)
    assert counter.count > 10
    for number in range(0, counter.count, max(1, counter.count // errors)):
        optimizer, params = again()
        give(params, t, missing)
        before = [p.detach().clone() for p in params]
        with OutOfMemory(number), pytest.raises(torch.OutOfMemoryError):
            optimizer.step()
        if optimizer._journal:
            with pytest.raises(RuntimeError, match="failed half-way .OutOfMemoryError: no memory"):
                optimizer.state_dict()
        else:
            assert same(params, before), number
            optimizer.state_dict()
        with OutOfMemory(number + 7) as second:  # it may fail again
            try:
                optimizer.step()
            except torch.OutOfMemoryError:
                second.number = None
                optimizer.step()
        assert same(params, expected), number
        assert same(state_of(optimizer), expected_state), number


class SolverError(Exception):
    """Of any type, as a solver of somebody else's may raise."""


PHASES = {
    "gather": (Layout, "gather"),
    "statistics": (Rule, "accumulate"),
    "check": (criterion, "scores"),
    "rebase": (Rule, "rebase"),
    "leave": (BasisChange, "leave"),
    "solve": (exact, "exact"),
    "verify": (refresh, "sound"),
    "operators": (Rule, "operator"),
    "enter": (BasisChange, "enter"),
    "direction": (Rule, "direction"),
    "apply": (Layout, "apply"),
}


# After those that write, what they wrote has happened: errors before operations stand for that.
BOUNDARIES = [
    *((phase, False, "eigh") for phase in PHASES),
    *((phase, True, "eigh") for phase in ("gather", "check", "solve", "verify", "operators")),
    ("solve", True, "warm"),
    ("verify", False, "warm"),
]


@pytest.mark.parametrize(("phase", "after", "method"), BOUNDARIES)
def test_an_error_at_every_boundary(phase, after, method, monkeypatch):
    """Before or after the first, second and third call of a phase's function."""
    monkeypatch.setattr(refresh, "CHUNK_ENTRIES", 300)  # solved in many pieces
    if method == "warm":
        monkeypatch.setitem(globals(), "SHAPES", [(70, 66), (66, 70)])
    optimizer, params = prepared(
        "eshampoo_fixed", eigensolver=Solver(method=method), max_preconditioner_dim=128
    )
    blank = pickle.dumps((optimizer, params))
    give(params, 5)
    optimizer.step()
    expected, expected_state = params, state_of(optimizer)
    for number in range(3):
        optimizer, params = pickle.loads(blank)
        give(params, 5)
        owner, name = PHASES[phase]
        honest, calls = getattr(owner, name), []

        def fails(*arguments, honest=honest, calls=calls, number=number, **more):
            calls.append(1)
            if len(calls) == number + 1 and not after:
                raise SolverError("out of luck")
            result = honest(*arguments, **more)
            if len(calls) == number + 1:
                raise SolverError("out of luck")
            return result

        with monkeypatch.context() as patch:
            patch.setattr(owner, name, fails)
            try:
                optimizer.step()
            except SolverError:
                pass
            else:
                assert len(calls) <= number
        if optimizer._journal:
            with pytest.raises(RuntimeError, match="half-way .SolverError: out of luck"):
                optimizer.state_dict()
            optimizer.step()
        elif calls and len(calls) > number:
            optimizer.step()
        assert same(params, expected) and same(state_of(optimizer), expected_state)


def half_a_step():
    optimizer, params = prepared("eshampoo_fixed")
    saved = optimizer.state_dict()
    give(params, 5)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SolverError):
        patch.setattr(exact, "exact", lambda a: (_ for _ in ()).throw(SolverError()))
        optimizer.step()
    return optimizer, params, saved


def test_half_a_step_is_neither_saved_nor_copied_nor_finished_with_other_gradients():
    optimizer, params, _ = half_a_step()
    for refused in (optimizer.state_dict, lambda: copy.deepcopy(optimizer)):
        with pytest.raises(RuntimeError, match="failed half-way"):
            refused()
    params[1].grad = None
    with pytest.raises(RuntimeError, match="other gradients"):
        optimizer.step()
    give(params, 5)
    optimizer.step()
    assert optimizer.state_dict()["state"][0]["step"] == 5


def test_a_loaded_state_replaces_half_a_step():
    optimizer, params, saved = half_a_step()
    optimizer.load_state_dict(saved)
    twin, others = prepared("eshampoo_fixed")
    give(params, 5)
    give(others, 5)
    optimizer.step()
    twin.step()
    assert same(params, others)


def test_a_closure_is_not_called_again():
    optimizer, params = prepared("eshampoo_fixed")
    calls = []

    def closure():
        calls.append(1)
        give(params, 5)
        return torch.tensor(float(len(calls)))

    with pytest.MonkeyPatch.context() as patch, pytest.raises(SolverError):
        patch.setattr(exact, "exact", lambda a: (_ for _ in ()).throw(SolverError()))
        optimizer.step(closure)
    assert optimizer.step(closure) == 1 and len(calls) == 1
    assert optimizer.step(closure) == 2


@pytest.mark.parametrize(
    ("error", "why"),
    [
        (KeyboardInterrupt(), "was interrupted"),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), "of the device"),
    ],
)
def test_after_an_interrupt_or_a_device_error_nobody_knows_the_state(error, why):
    optimizer, params = prepared("eshampoo_fixed")
    saved = optimizer.state_dict()
    give(params, 5)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(type(error)):
        patch.setattr(exact, "exact", lambda a: (_ for _ in ()).throw(error))
        optimizer.step()
    for refused in (optimizer.state_dict, optimizer.step):
        with pytest.raises(RuntimeError, match=why):
            refused()
    optimizer.load_state_dict(saved)
    optimizer.step()


def test_groups_that_are_done_are_not_done_again():
    params = [torch.nn.Parameter(torch.ones(6, 5)) for _ in range(3)]
    groups = [{"params": [p]} for p in params]
    optimizer = EShampoo(groups, lr=0.1, precondition_frequency=1, max_preconditioner_dim=8)
    twins = copy.deepcopy(params)
    twin = EShampoo([{"params": [p]} for p in twins], lr=0.1, precondition_frequency=1,
                    max_preconditioner_dim=8)  # fmt: skip
    for t in range(3):
        give(params, t)
        give(twins, t)
        honest, calls = exact.exact, []

        def fails(a, honest=honest, calls=calls):
            calls.append(1)
            if len(calls) == 3:
                raise SolverError
            return honest(a)

        with pytest.MonkeyPatch.context() as patch, pytest.raises(SolverError):
            patch.setattr(exact, "exact", fails)
            optimizer.step()
        optimizer.step()
        twin.step()
    assert same(params, twins)
