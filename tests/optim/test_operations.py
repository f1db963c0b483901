"""Every operation that rules speak, on every back end, alone and composed at random.

By torch on a CPU always; with the tests marked ``gpu`` by torch on a GPU, and by our kernels on a
GPU or under Triton's interpreter (``TRITON_INTERPRET=1``).

Two things that a rule may well write go wrong today without any error; they are strict xfails here,
and the random rules are shown to find both.
"""

import importlib.util
import os

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from algoperf_shampoo.optim import EShampoo, reference
from algoperf_shampoo.optim.gpu import tiles
from algoperf_shampoo.optim.preconditioners import EShampoo as EShampooRule

from .operations import Machine
from .support import gradients

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1" and importlib.util.find_spec("triton")
NO_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
NO_KERNELS = pytest.mark.skipif(
    not INTERPRETED and not torch.cuda.is_available(),
    reason="needs a CUDA device, or TRITON_INTERPRET=1",
)
TORCH = pytest.param(("cpu", False), id="torch")
TORCH_ON_GPU = pytest.param(("cuda", False), id="torch-gpu", marks=[pytest.mark.gpu, NO_GPU])
KERNELS = pytest.param(
    ("cpu" if INTERPRETED else "cuda", True), id="kernels", marks=[pytest.mark.gpu, NO_KERNELS]
)
everywhere = pytest.mark.parametrize("back_end", [TORCH, TORCH_ON_GPU, KERNELS])

STALE_MAXIMA = "kernels keep each row's largest entry and are not told of a write by torch"
FOREIGN_TENSOR = "a tensor that is neither g nor scratch is taken for one that is"


def known(back_end, bug):
    """The same back end, expected to fail."""
    return pytest.param(
        *back_end.values,
        id=back_end.id,
        marks=[*back_end.marks, pytest.mark.xfail(strict=True, raises=AssertionError, reason=bug)],
    )


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
    "gram": ["gram", "gram"],
    "rotate": ["rotate"],
    "there and back": ["rotate", "rotate_back", "rotate", "rotate_back"],
    "adam": ["adam", "gradient", "adam"],
    "a step": [
        "gram",
        "rotate",
        "adam",
        "rotate_back",
        "gradient",
        "rotate",
        "adam",
        "rotate_back",
    ],
    "moments": ["adam", "move_moments", "gradient", "adam", "move_moments"],
}


@everywhere
@pytest.mark.parametrize("program", OPERATIONS.values(), ids=OPERATIONS)
def test_operations(back_end, program):
    machine = Machine(*back_end)
    for name in program:
        getattr(machine, name)()


@pytest.mark.parametrize("back_end", [TORCH, TORCH_ON_GPU, known(KERNELS, STALE_MAXIMA)])
def test_torch_may_write_between_operations(back_end):
    """``x.mul_(2**20)`` between Adam and the way back."""
    machine = Machine(*back_end)
    machine.rotate()
    machine.adam()
    machine.torch_scale(2.0**20)
    machine.rotate_back()


@pytest.mark.parametrize(
    "back_end",
    [known(back_end, FOREIGN_TENSOR) for back_end in (TORCH, TORCH_ON_GPU, KERNELS)],
)
def test_any_tensor_may_be_rotated(back_end):
    """A rule's own tensor, and another one of its shape after it."""
    machine = Machine(*back_end)
    for _ in range(2):
        machine.gradient()
        machine.torch_fresh()
        machine.rotate()


# Rules composed at random: rounds of statistics, a way into the basis, something there, a way back.
SAFE = ("adam",)
INSIDE = {"safe": SAFE, "torch writes": (*SAFE, "torch_scale"), "fresh": (*SAFE, "torch_fresh")}


def rules(inside):
    a_round = st.tuples(
        st.lists(st.just("gram"), max_size=1),
        st.lists(st.sampled_from(INSIDE[inside]), max_size=3),
        st.booleans(),
    )
    return st.lists(a_round, min_size=1, max_size=3)


def run(back_end, rule):
    machine = Machine(*back_end)
    for statistics, inside, moments in rule:
        machine.gradient()
        for name in statistics:
            getattr(machine, name)()
        machine.rotate()
        for name in inside:
            scale = {"factor": 2.0**20} if name == "torch_scale" else {}
            getattr(machine, name)(**scale)
        machine.rotate_back()
        if moments:
            machine.move_moments()


def agrees_for_random_rules(back_end, inside):
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
    agrees_for_random_rules(back_end, "safe")


@pytest.mark.parametrize("back_end", [TORCH, TORCH_ON_GPU, known(KERNELS, STALE_MAXIMA)])
def test_random_rules_in_which_torch_writes(back_end):
    agrees_for_random_rules(back_end, "torch writes")


@pytest.mark.parametrize(
    "back_end",
    [known(back_end, FOREIGN_TENSOR) for back_end in (TORCH, TORCH_ON_GPU, KERNELS)],
)
def test_random_rules_with_tensors_of_their_own(back_end):
    agrees_for_random_rules(back_end, "fresh")


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
    device, kernels = back_end
    if kernels and INTERPRETED:
        pytest.skip("a whole optimizer uses the kernels on a GPU only")
    h = reference.Hyperparameters(alpha=0.01, beta1=0.9, beta2=0.95, weight_decay=0.01, F=4)
    dtype = torch.float32 if kernels else torch.float64
    start = next(gradients(shape, 1, seed=7))
    parameter = torch.nn.Parameter(start.to(device, dtype).clone())
    optimizer = EShampoo(
        [parameter], 0.01, (0.9, 0.95), weight_decay=0.01, precondition_frequency=4,
        max_preconditioner_dim=10,
    )  # fmt: skip
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
