"""All stacks at once by our kernels, against float64 one stack at a time.

On a GPU, and without one under Triton's interpreter, which runs the kernels' Python: `make
test-kernels` (the tiles are smaller there).
"""

import importlib.util
import os

import pytest
import torch

from algoperf_shampoo.optim.blocks.factors import build_factor_sets
from algoperf_shampoo.optim.blocks.layout import Layout
from algoperf_shampoo.optim.blocks.partition import cut
from algoperf_shampoo.optim.gpu import tiles
from algoperf_shampoo.optim.gpu.graphs import Recorder
from algoperf_shampoo.optim.gpu.triton_ops import TritonOperations
from algoperf_shampoo.optim.journal import directly_run
from algoperf_shampoo.optim.ops import Hyper, Operators, State, linalg

from .support import PLAIN, PRECONDITIONED, ReferenceParameter, gradients, make

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1" and importlib.util.find_spec("triton")
DEVICE = "cpu" if INTERPRETED else "cuda"
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not INTERPRETED and not torch.cuda.is_available(),
        reason="needs a CUDA device, or TRITON_INTERPRET=1",
    ),
]

# Matrices that fill no tile, vectors, order 3 with a narrow mode first, between and last, odd sizes
# and one that is cut: every kind of launch.
SHAPES = [
    (40, 36), (40, 36), (44,), (44,), (20, 50), (18, 24, 3), (3, 30, 22), (20, 9, 16), (7, 9, 20),
    (12, 6, 11, 13), (1,), (61, 33), (130,), (20, 65), (65, 20),
]  # fmt: skip


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    monkeypatch.setattr(tiles, "LONGEST_SUM", 128)
    if INTERPRETED:
        for name, tile in {
            "SMALL": dict(BM=32, BN=32, BK=16),
            "NARROW": dict(BM=32, BN=16, BK=16),
            "VECTOR": dict(BN=32, BK=32),
            "GRAM": dict(S=32, BK=16),
            "NARROW_GRAM": dict(S=16, BK=16),
            "OUTER": dict(S=32),
        }.items():
            monkeypatch.setattr(tiles, name, tile)


@pytest.fixture
def layout():
    """Random gradients, moments, orthogonal operators; magnitudes from 1e-18 to 1e12 per row."""
    torch.manual_seed(0)
    params = [torch.nn.Parameter(torch.zeros(s, device=DEVICE)) for s in SHAPES]
    layout = Layout(params, lambda p: cut(tuple(p.shape), 64))
    build_factor_sets(layout.stacks)
    layout.allocate(lambda stack: ("exp_avg", "exp_avg_sq"), lambda stack: 1)
    exponents = iter(torch.randint(-18, 12, (99,)).tolist())
    for stack in layout.stacks:
        for row in range(len(stack)):
            scale = 10.0 ** next(exponents)
            stack.g[row] = scale * torch.randn(stack.shape, device=DEVICE)
            stack.state["exp_avg"][row] = scale * torch.randn(stack.shape, device=DEVICE)
            stack.state["exp_avg_sq"][row] = scale**2 * torch.rand(stack.shape, device=DEVICE)
        for q in stack.operators:
            q.copy_(torch.linalg.qr(torch.randn(q.shape)).Q)
        stack.ready = [True] * len(stack)
    return layout


BASES = Operators()


def start(layout, precision="highest", some=None):
    """Our kernels' operations, and the gradients."""
    ops = TritonOperations(layout.stacks)
    return ops, again(ops, layout, precision, some)


def again(ops, layout, precision="highest", some=None):
    """A section of a step begins: its gradients."""
    ops.gradients_gathered(layout.stacks)
    ops.begin(precision)
    return ops.gradients(some or layout.stacks, kept=False)


def hyper(stacks=(), precision="highest"):
    """Bias corrections 0.3 + row / 100 and 0.2 + row / 100."""
    corrections = {}
    for s in stacks:
        rows = torch.arange(len(s), device=DEVICE).view(-1, *[1] * len(s.shape)) / 100
        corrections[id(s)] = 0.3 + rows, 0.2 + rows
    return Hyper(0.0, 0.9, 0.99, 1e-30, 0.0, True, precision, corrections)


def exact(x):
    return x.double().cpu().clone()


def rotated(x, operators, back=False):
    apply = linalg.rotate_back if back else linalg.rotate
    return apply(exact(x), [exact(q) for q in operators])


def relative_errors(values, expected):
    """Per row of all stacks, ||x - expected|| / ||expected||."""
    for x, e in zip(values, expected, strict=True):
        x, e = exact(x).flatten(1), e.flatten(1)
        yield from ((x - e).norm(dim=1) / e.norm(dim=1)).tolist()


PRECISIONS = [("highest", 1e-6), ("high", 1e-3)]


@pytest.mark.parametrize(("precision", "tolerance"), PRECISIONS)
def test_rotations_and_adam_between(layout, precision, tolerance):
    stacks, h, state = layout.stacks, hyper(layout.stacks, precision), State(layout.stacks)
    expected = [rotated(s.g, s.operators) for s in stacks]
    ops, G = start(layout, precision)
    X = ops.rotate(G, state.bases)
    assert max(relative_errors(X.tensors(), expected)) < tolerance
    # Adam's own arithmetic is float32: on the same input.
    copies = [exact(x) for x in X.tensors()]
    moments = [[exact(s.state[n]) for n in ("exp_avg", "exp_avg_sq")] for s in stacks]
    ops.adam(X, state["exp_avg"], state["exp_avg_sq"], h)
    for s, x, copy, (m, v) in zip(stacks, X.tensors(), copies, moments, strict=True):
        m, v = 0.9 * m + 0.1 * copy, 0.99 * v + 0.01 * copy**2
        c1, c2 = (c.double().cpu() for c in h.corrections[id(s)])
        direction = (0.9 * m + 0.1 * copy) / c1 / ((v / c2).sqrt() + 1e-30)
        assert max(relative_errors([s.state["exp_avg"]], [m])) < 1e-6
        assert max(relative_errors([s.state["exp_avg_sq"]], [v])) < 1e-6
        assert max(relative_errors([x], [direction])) < 1e-6
    expected = [rotated(x, s.operators, back=True) for s, x in X.pairs()]
    U = ops.rotate_back(X, state.bases)
    assert all(place.number == 0 for place in U.places())  # in `g` already
    assert max(relative_errors(U.tensors(), expected)) < tolerance


@pytest.mark.parametrize(("precision", "tolerance"), PRECISIONS)
def test_operators_that_are_not_orthogonal(layout, precision, tolerance):
    stacks = layout.stacks
    for stack in stacks:
        for q in stack.operators:
            q.mul_(1e3)
    ops, G = start(layout, precision)
    for _ in range(2):  # what is kept of a first call must not disturb a second
        X = ops.copy(G)
        with ops.write(X) as xs:
            for x in xs:
                x.mul_(0.01)
        expected = [rotated(x, s.operators) for s, x in X.pairs()]
        kept = [s.g.clone() for s in stacks]
        X = ops.rotate(X, Operators(orthogonal=False))
        assert max(relative_errors(X.tensors(), expected)) < tolerance
        for stack, g in zip(stacks, kept, strict=True):
            stack.g.copy_(g)
        G = again(ops, layout, precision)


def test_gram(layout):
    """Alone (beta = 0), and as an average; symmetric to rounding."""
    stacks = layout.stacks
    ops, G = start(layout)
    grams = []
    for s in stacks:
        wide = [exact(s.g).movedim(i + 1, 1).reshape(len(s), d, -1) for i, d in enumerate(s.shape)]
        grams.append([x @ x.mT for x in wide])
    for beta, weight in ((0.0, 1.0), (0.9, 0.1)):
        ops.gram_ema(G, beta, weight)
        for s, expected in zip(stacks, grams, strict=True):
            assert max(relative_errors(s.factors, expected)) < 1e-6
            assert max(relative_errors([f.mT for f in s.factors], expected)) < 1e-6


@pytest.mark.parametrize("back", [False, True])
@pytest.mark.parametrize("first_row", [0, 1])
def test_one_mode_of_some_rows_in_place(layout, back, first_row):
    """As moments leave and enter a basis; other rows stay as they are."""
    ops, _ = start(layout)
    for stack in layout.stacks:
        rows = list(range(first_row, len(stack)))
        for mode in range(len(stack.shape)):
            x = stack.state["exp_avg"]
            before = exact(x)
            q = exact(stack.operators[mode])
            expected = linalg.rotate_mode(before, q.mT if back else q, mode)
            if rows:
                ops.rotate_mode_(stack, x, mode, rows, back)
                assert max(relative_errors([x[rows]], [expected[rows]])) < 1e-6
            assert torch.equal(exact(x)[:first_row], before[:first_row])


def test_one_bad_row_spares_the_others_and_zeros_stay_zero(layout):
    stacks = layout.stacks
    bad = stacks[0]
    assert len(bad) == 2
    bad.g[0, 3, 4] = torch.nan
    stacks[1].g[1] = torch.inf
    stacks[2].g[0] = 0
    for precision in ("highest", "high"):
        ops, G = start(layout, precision)
        expected = [rotated(s.g, s.operators) for s in stacks]
        kept = [s.g.clone() for s in stacks]
        ops.gram_ema(G, 0.0, 1.0)
        xs = ops.rotate(G, BASES).tensors()
        for s, x, e in zip(stacks, xs, expected, strict=True):
            for row in range(len(s)):
                fine = bool(e[row].isfinite().all())
                assert bool(x[row].isfinite().all()) == fine
                assert all(bool(f[row].isfinite().all()) == fine for f in s.factors)
        assert not xs[2][0].any() and not any(f[0].any() for f in stacks[2].factors)
        for s, g in zip(stacks, kept, strict=True):
            s.g.copy_(g)


class Unrecorded(Recorder):
    """Stands in for ``Recorder`` where there is no GPU."""

    def begin(self, layout, h):
        return self.inputs(layout, h), directly_run


@pytest.mark.parametrize("nadam", [False, True])
@pytest.mark.parametrize(("shape", "max_dim"), [((32, 20), 16), ((8, 4, 5, 3), 8)])
@pytest.mark.parametrize("variant", PRECONDITIONED)
def test_steps_against_the_reference(variant, shape, max_dim, nadam, monkeypatch):
    """Statistics, refreshes that move moments, and updates; another parameter beside, whose step
    count falls behind."""
    if nadam and variant in PLAIN:
        pytest.skip("has no numerator of NAdam's")
    start = next(gradients(shape, 1, seed=7))
    params = [torch.nn.Parameter(x.to(DEVICE, torch.float32)) for x in (start, torch.zeros(9, 7))]
    optimizer = make(variant, params, max_preconditioner_dim=max_dim, nadam=nadam)
    if INTERPRETED:
        (group,) = optimizer._groups
        group.recorder = Unrecorded(torch.device("cpu"))
        group.by_kernels = TritonOperations(group.layout.stacks)
    expected = ReferenceParameter(variant, start, max_dim=max_dim, nadam=nadam)
    by_ours = []
    (group,) = optimizer._groups
    direction = optimizer.rule.direction

    def watched(G, s, h, ops):
        by_ours.append(ops is group.by_kernels)
        return direction(G, s, h, ops)

    monkeypatch.setattr(optimizer.rule, "direction", watched)
    for t, gradient in enumerate(gradients(shape, 24, dtype=torch.float32)):
        params[0].grad = gradient.to(DEVICE)
        other = next(gradients((9, 7), 1, seed=99 + t, dtype=torch.float32))
        params[1].grad = other.to(DEVICE)
        if t in (8, 12, 13):  # these steps go by torch
            params[t != 8].grad = None
        optimizer.step()
        if params[0].grad is not None:
            expected.walk(gradient, optimizer)
    tolerance = 1e-3 if variant == "eshampoo_qr" else 1e-4
    assert expected.relative_error(params[0].cpu()) < tolerance
    assert by_ours.count(False) == 3


def test_entries_far_below_the_largest_keep_an_absolute_accuracy(layout):
    """Powers of ten down to 1e-10 of the top: what scaling to float16's range could lose."""
    stacks = layout.stacks
    for s in stacks:
        decay = torch.logspace(0, -10, s.shape[-1], device=DEVICE)
        s.g.copy_(torch.randn(s.g.shape, device=DEVICE) * decay)
        for q in s.operators:  # permutations: entries pass unchanged
            q.copy_(torch.eye(q.shape[-1]).flip(0).expand_as(q))
    expected = [rotated(s.g, s.operators) for s in stacks]
    ops, G = start(layout)
    xs = ops.rotate(G, BASES).tensors()
    for s, x, e in zip(stacks, xs, expected, strict=True):
        top = e.flatten(1).abs().amax(1).reshape(-1, *[1] * len(s.shape))
        error = (exact(x) - e).abs()
        assert (error <= 3e-7 * e.abs() + 1e-11 * top).all()


def test_results_do_not_depend_on_what_else_steps(layout):
    """Rows are computed alike in a launch of all and in one of some."""
    stacks = layout.stacks
    ops, G = start(layout)
    kept = [s.g.clone() for s in stacks]
    together = [x.clone() for x in ops.rotate(G, BASES).tensors()]
    for some in (stacks[::2], stacks[1::2]):
        for s, g in zip(stacks, kept, strict=True):
            s.g.copy_(g)
        for s, x in ops.rotate(again(ops, layout, some=some), BASES).pairs():
            assert torch.equal(x, together[stacks.index(s)])
