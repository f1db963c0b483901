"""Every operation that rules speak, on every back end, alone and composed at random.

By torch on a CPU always, in buffers and in memory taken anew; with the tests marked ``gpu`` both on
a GPU, and our kernels on a GPU or under Triton's interpreter (``TRITON_INTERPRET=1``).
"""

import importlib.util
import os

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from algoperf_shampoo.optim import EShampoo, PreconditionedOptimizer, reference, reference_kl
from algoperf_shampoo.optim.eshampoo import EShampooRule
from algoperf_shampoo.optim.gpu import tiles
from algoperf_shampoo.optim.gpu.graphs import Recorder
from algoperf_shampoo.optim.gpu.triton_ops import TritonOperations
from algoperf_shampoo.optim.journal import directly_run
from algoperf_shampoo.optim.rule import Rule

from .operations import Machine
from .support import gradients

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1" and importlib.util.find_spec("triton")
NO_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
NO_KERNELS = pytest.mark.skipif(
    not INTERPRETED and not torch.cuda.is_available(),
    reason="needs a CUDA device, or TRITON_INTERPRET=1",
)
BACK_ENDS = [
    pytest.param(("cpu", "fresh"), id="fresh"),
    pytest.param(("cpu", "torch"), id="torch"),
    pytest.param(("cuda", "fresh"), id="fresh-gpu", marks=[pytest.mark.gpu, NO_GPU]),
    pytest.param(("cuda", "torch"), id="torch-gpu", marks=[pytest.mark.gpu, NO_GPU]),
    pytest.param(
        ("cpu" if INTERPRETED else "cuda", "kernels"),
        id="kernels",
        marks=[pytest.mark.gpu, NO_KERNELS],
    ),
]
everywhere = pytest.mark.parametrize("back_end", BACK_ENDS)


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    if INTERPRETED:
        for name, tile in {
            "SMALL": dict(BM=16, BN=16, BK=16),
            "NARROW": dict(BM=16, BN=16, BK=16),
            "VECTOR": dict(BN=32, BK=32),
            "GRAM": dict(S=16, BK=16),
            "NARROW_GRAM": dict(S=16, BK=16),
            "OUTER": dict(S=32),
        }.items():
            monkeypatch.setattr(tiles, name, tile)


OPERATIONS = {
    "gram": ["gram", "gram", "copy", "gram"],
    "gram of modes": ["gram_of_modes", "rotate", "gram_of_modes"],
    "gram of state": ["averages", "gram_of_state", "gram"],
    "rotate": ["rotate"],
    "roots": ["copy", "torch_scale", "rotate_by_roots", "gradient", "rotate_by_roots"],
    "there and back": ["rotate", "rotate_back", "rotate", "rotate_back", "deliver"],
    "but one": ["rotate_but_one", "adam", "rotate_but_one"],
    "adam": ["adam", "gradient", "adam"],
    "uncorrected": ["adam_uncorrected", "rotate_back", "gradient", "adam"],
    "averages": ["averages", "copy_state", "rotate", "scale_modes", "rotate_back", "deliver"],
    "modes": ["rotate", "mean_square", "gradient", "rotate", "scale_modes", "mean_square"],
    "learn": ["learn", "momentum", "rotate_back", "deliver", "gradient", "learn", "momentum"],
    "learn of a buffer": ["copy", "torch_scale", "learn", "adam_uncorrected", "rotate_back"],
    "norms": ["normalize", "rotate_back", "normalize"],
    "a step": ["gram", "rotate", "adam", "rotate_back", "deliver", "gradient"] * 2,
    "moments": ["adam", "move_moments", "gradient", "adam", "move_moments"],
}


@everywhere
@pytest.mark.parametrize("program", OPERATIONS.values(), ids=OPERATIONS)
def test_operations(back_end, program):
    machine = Machine(*back_end)
    for name in program:
        getattr(machine, name)()


@everywhere
def test_torch_may_write_between_operations(back_end):
    """``x.mul_(2**20)`` between Adam and the way back."""
    machine = Machine(*back_end)
    machine.rotate()
    machine.adam()
    machine.torch_scale(2.0**20)
    machine.rotate_back()


@everywhere
def test_any_value_may_be_rotated(back_end):
    """One in a rule's own buffer, and then another one of its shapes in another."""
    machine = Machine(*back_end)
    for _ in range(2):
        machine.copy()
        machine.rotate()
        machine.copy()
        machine.rotate()
        machine.rotate_back()
        machine.gradient()


# Rules composed at random: rounds of statistics, a way into the basis, something there, a way back.
STATISTICS = "gram", "gram_of_modes", "rotate_but_one", "averages", "momentum"
INSIDE = "adam", "copy", "torch_scale", "gram", "normalize", "scale_modes", "mean_square"


def rules(inside):
    a_round = st.tuples(
        st.lists(st.sampled_from(STATISTICS), max_size=1),
        st.lists(st.sampled_from(inside), max_size=3),
        st.booleans(),
    )
    return st.lists(a_round, min_size=1, max_size=3)


def run(back_end, rule):
    machine = Machine(*back_end)
    for statistics, inside, moments in rule:
        for name in statistics:
            getattr(machine, name)()
        machine.rotate()
        for name in inside:
            scale = {"factor": 2.0**20} if name == "torch_scale" else {}
            getattr(machine, name)(**scale)
        machine.rotate_back()
        machine.deliver()
        if moments:
            machine.move_moments()
        machine.gradient()


def agrees_for_random_rules(back_end, inside=INSIDE):
    # Found once is enough: no database, no shrinking.
    @settings(
        max_examples=6 if INTERPRETED else 25,
        deadline=None,
        derandomize=True,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(rules(inside))
    def check(rule):
        run(back_end, rule)

    check()


@everywhere
def test_random_rules(back_end):
    agrees_for_random_rules(back_end)


@pytest.mark.parametrize("back_end", BACK_ENDS[-1:])
def test_random_rules_find_row_maxima_that_are_stale(back_end, monkeypatch):
    """Kernels that are not told of a write by torch."""
    monkeypatch.setattr(TritonOperations, "_measure", lambda self, stacks, places: None)
    with pytest.raises(AssertionError):
        agrees_for_random_rules(back_end, ("adam", "torch_scale"))


@pytest.mark.parametrize("back_end", BACK_ENDS[-1:])
def test_random_rules_find_buffers_that_share_a_launch_table(back_end, monkeypatch):
    """All buffers that are not the gradients' go by one number."""
    honest = TritonOperations.buffers

    def confused(self, stack):
        places = honest(self, stack)
        for place in places[1:]:
            place.number = 1
        return places

    monkeypatch.setattr(TritonOperations, "buffers", confused)
    with pytest.raises(AssertionError):
        agrees_for_random_rules(back_end, ("adam", "copy"))


@everywhere
def test_a_value_that_is_gone_says_so(back_end):
    machine = Machine(*back_end)
    machine.rotate()
    before = machine.x
    machine.rotate_back()
    with pytest.raises(RuntimeError, match="used it up"):
        machine.ops.gram_ema(before, 0.5, 0.5)
    machine.gradient()
    kept = machine.ops.gradients(machine.stacks, kept=True)
    ops, moments = machine.ops, (machine.state["exp_avg"], machine.state["exp_avg_sq"])
    for change in (
        lambda x: ops.rotate(x, machine.state.bases),
        lambda x: ops.scale(x, [2.0] * len(machine.stacks)),
        lambda x: ops.adam(x, *moments, machine.h),
    ):
        with pytest.raises(RuntimeError, match="kept"):
            change(kept)
        with pytest.raises(RuntimeError, match="kept"):
            change(machine.state["exp_avg"])
    machine.ops.gram_ema(kept, 0.5, 0.5)


def test_memory_that_serves_another_value_says_so():
    machine = Machine("cpu", "torch")
    first = machine.ops.copy(machine.x)
    for _ in range(2):
        machine.ops.copy(machine.x)
    with pytest.raises(RuntimeError, match="work_buffers"):
        first.tensors()


class Unrecorded(Recorder):
    """Stands in for ``Recorder`` where there is no GPU."""

    def begin(self, layout, h):
        return self.inputs(layout, h), directly_run


def on_back_end(optimizer, back_end):
    """Kernels are used where they can run by themselves, but under the interpreter."""
    for group in optimizer._groups if back_end[1] == "kernels" and INTERPRETED else ():
        group.recorder = Unrecorded(torch.device("cpu"))
        group.by_kernels = TritonOperations(group.layout.stacks, optimizer._journal.once)


class StatisticsAfter(EShampooRule):
    """EShampoo whose factors learn a gradient after the update, as SOAP's."""

    statistics_first = False


class ReferenceStatisticsAfter(reference.EShampoo):
    """Lines 10 to 13 with the bases of the step before, then lines 5 to 9."""

    def step(self, W, G):
        if self.M is None:
            self.M, self.D = torch.zeros_like(G), torch.zeros_like(G)
            self.factors = [torch.zeros(d, d, dtype=G.dtype) for d in G.shape]
            self.bases = [torch.eye(d, dtype=G.dtype) for d in G.shape]
        h = self.h
        self.t += 1
        self.M = h.beta1 * self.M + (1 - h.beta1) * G
        self.D = h.beta2 * self.D + (1 - h.beta2) * reference.to_basis(G, self.bases) ** 2
        numerator = reference.to_basis(self.M / (1 - h.beta1**self.t), self.bases)
        U = numerator / ((self.D / (1 - h.beta2**self.t)).sqrt() + h.epsilon)
        for i, L in enumerate(self.factors):
            X = reference.matricize(G, i)
            self.factors[i] = h.beta2 * L + (1 - h.beta2) * X @ X.T
        U = reference.from_basis(U, self.bases)
        if self.t % h.F == 0:
            self.bases = [reference.eigvec(L / (1 - h.beta2**self.t)) for L in self.factors]
        return W - h.alpha * (U + h.weight_decay * W)


@everywhere
@pytest.mark.parametrize("shape", [(9, 6), (5, 4, 3)])
def test_a_rule_whose_statistics_come_after_the_update(back_end, shape):
    device, kernels = back_end[0], back_end[1] == "kernels"
    h = reference.Hyperparameters(alpha=0.01, beta1=0.9, beta2=0.95, weight_decay=0.01, F=4)
    dtype = torch.float32 if kernels else torch.float64
    start = next(gradients(shape, 1, seed=7))
    parameter = torch.nn.Parameter(start.to(device, dtype).clone())
    optimizer = EShampoo(
        [parameter], 0.01, (0.9, 0.95), weight_decay=0.01, precondition_frequency=4,
        max_preconditioner_dim=10,
    )  # fmt: skip
    on_back_end(optimizer, back_end)
    (group,) = optimizer._groups
    rule = StatisticsAfter()
    group.rules = [(rule, stacks) for _, stacks in group.rules]
    optimizer.rule = rule
    expected, value = ReferenceStatisticsAfter(h), start.reshape(group.layout.blocks[0][0].merged)
    for gradient in gradients(shape, 30, dtype=dtype):
        parameter.grad = gradient.to(device)
        optimizer.step()
        value = expected.step(value, gradient.double().reshape(value.shape))
    error = (parameter.detach().double().cpu().reshape(value.shape) - value).norm() / value.norm()
    assert error < (1e-4 if kernels else 1e-10)


class ToyKL(Rule):
    """KL-Shampoo with exact decompositions and without its clamp: state per mode, statistics after
    the update, a first gradient that only starts."""

    statistics_first = False
    starts = True
    moments = ("exp_avg",)
    vectors = {"eigenvalues": 0.1}  # noqa: RUF012
    work_buffers = 2

    def direction(self, G, s, h, ops):
        ops.ema(s["exp_avg"], G, h.beta1)
        X = ops.rotate(ops.copy(s["exp_avg"]), s.bases, scale=self.roots(s))
        return ops.rotate_back(X, s.bases)

    def start(self, G, s, h, ops):
        for i in s.modes:
            ops.gram_ema(G, h.beta2, 1 - h.beta2, mode=i, mean=True)

    def accumulate(self, G, s, h, ops):
        roots = self.roots(s)
        for i in s.modes:
            X = ops.rotate(ops.copy(G), s.bases, skip=i, scale=roots)
            ops.gram_ema(X, h.beta2, 1 - h.beta2, mode=i, mean=True)
        P = ops.rotate(ops.copy(G), s.bases)
        for i in s.modes:
            new = ops.mean_square(P, i, scale=roots)
            old = s.vectors("eigenvalues")
            b = h.beta2
            averages = [
                None if x is None else b * v + (1 - b) * x
                for v, x in zip(old.mode(i), new, strict=True)
            ]
            ops.assign(old, averages, mode=i)

    @staticmethod
    def roots(s):
        return s.vectors("eigenvalues").map(lambda v: v**-0.5)

    def operator(self, eigenvalues, eigenvectors, order, correction):
        return eigenvectors.flip(-1)


# Factors of full rank after one gradient: eigenvectors of a null space would be arbitrary.
@everywhere
@pytest.mark.parametrize("shape", [(7, 7), (5, 4, 3)])
def test_a_rule_with_state_per_mode_that_only_starts_at_first(back_end, shape):
    device, kernels = back_end[0], back_end[1] == "kernels"
    dtype = torch.float32 if kernels else torch.float64
    h = reference.Hyperparameters(
        alpha=0.01, beta1=0.9, beta2=0.95, epsilon=0.0, weight_decay=0.0, F=4
    )
    start = next(gradients(shape, 1, seed=7))
    params = [torch.nn.Parameter(start.to(device, dtype).clone()) for _ in range(2)]
    optimizer = PreconditionedOptimizer(
        params, ToyKL(), dict(lr=0.01, betas=(0.9, 0.95), eps=0.0, weight_decay=0.0, nadam=False,
        precondition_frequency=4, max_preconditioner_dim=10),
    )  # fmt: skip
    on_back_end(optimizer, back_end)
    shape = optimizer._groups[0].layout.blocks[0][0].merged
    expected = [reference_kl.KLShampoo(h, max_clamp=None, exact=True) for _ in params]
    values = [start.reshape(shape)] * 2
    for t, gradient in enumerate(gradients(shape, 14, dtype=dtype)):
        for i, p in enumerate(params):  # the other one starts later, and misses one
            p.grad = None if i and t in (0, 1, 6) else (gradient * (1 + i)).view(p.shape).to(device)
            if p.grad is not None:
                exact = gradient.double() * (1 + i)
                values[i] = expected[i].step(values[i], exact)
        optimizer.step()
    steps = [entry["step"].item() for entry in optimizer.state_dict()["state"].values()]
    assert steps == [13, 10]
    for p, value in zip(params, values, strict=True):
        error = (p.detach().double().cpu().reshape(shape) - value).norm() / value.norm()
        assert error < (1e-4 if kernels else 1e-10)
    saved = optimizer.state_dict()
    lam = expected[0].lam[1]
    torch.testing.assert_close(
        saved["state"][0]["0.eigenvalues_1"].double().cpu(), lam, rtol=1e-3, atol=0
    )
    optimizer.load_state_dict(saved)


@everywhere
def test_defaults_on_a_gpu_are_said_once(back_end, caplog):
    machine = Machine(*back_end)
    with caplog.at_level("INFO"):
        for _ in range(2):
            machine.normalize()
            machine.rotate_but_one()
            machine.gram()
    said = [r for r in caplog.records if "by torch here" in r.message]
    assert len(said) == (2 if back_end[1] == "kernels" else 0)


@everywhere
def test_what_soap_and_kl_shampoo_compute_has_kernels(back_end, caplog):
    machine = Machine(*back_end)
    with caplog.at_level("INFO"):
        for after in ("momentum", "adam_uncorrected"):
            machine.learn()
            getattr(machine, after)()
            machine.rotate_back()
            machine.gradient()
    assert not [r for r in caplog.records if "by torch here" in r.message]


@everywhere
def test_bad_rows_keep_vectors_moments_and_factors(back_end):
    """As KL-Shampoo learns and steps."""
    machine = Machine(*back_end)
    bad = [torch.zeros(len(s), dtype=torch.int32, device=s.device) for s in machine.stacks]
    bad[1][1] = 1
    for s, mine in zip(machine.stacks, bad, strict=True):
        s.bad = mine
        s.g[mine != 0] = torch.nan
    machine.ops.gradients_gathered(machine.stacks)

    def kept():
        s = machine.stacks[1]
        parts = [s.state["exp_avg"], *s.vectors["scales"], *s.factors]
        return [x.detach().clone() for x in parts]

    before = kept()
    ops, state = machine.ops, machine.state
    scale = ops.inverse_sqrt(state.vectors("scales"), lambda d: 10.0)
    ops.gram_ema(machine.x, 0.5, 0.25, mean=True, scale=scale)
    P = ops.rotate(machine.x, state.bases)
    ops.mean_square_ema(state.vectors("scales"), P, 0.5, scale, lambda d: 10.0)
    ops.momentum(P, state["exp_avg"], 0.5, scale, 0.0, 1.0)
    for old, new in zip(before, kept(), strict=True):
        assert torch.equal(old[1], new[1])
        assert bool(new.isfinite().all())
        assert not torch.equal(old[0], new[0]) and not torch.equal(old[2], new[2])
