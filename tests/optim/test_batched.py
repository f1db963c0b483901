"""Batches in idle memory, with threads but without a GPU: cuSOLVER is a stand-in that spoils its
workspace and notices when two batches at a time share memory."""

import contextlib
import itertools
import random
import threading
import time

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from algoperf_shampoo.optim.blocks.memory import BorrowedMemory
from algoperf_shampoo.optim.blocks.rows import consecutive, longest_run, put, take
from algoperf_shampoo.optim.eigen import batch_plan, batched, cusolver, host_offload
from algoperf_shampoo.optim.eigen.problem import Problem


def span(x):
    return x.data_ptr(), x.data_ptr() + x.numel() * x.element_size()


def apart(x, y):
    return x[1] <= y[0] or y[1] <= x[0]


class Solver:
    """Stands in for cuSOLVER: LAPACK, in as much workspace."""

    def __init__(self):
        self.active, self.works, self.lock = {}, [], threading.Lock()
        self.tickets = itertools.count()
        self.random = random.Random(0)
        self.unconverged = ()  # sizes whose first matrix of a batch does not converge
        self.broken = ()  # sizes that raise

    @staticmethod
    def workspace_bytes(n, dtype, device, count):
        return count * (4 * n * n * dtype.itemsize + 100)

    def eigh_(self, a, work):
        n = a.shape[-1]
        assert work.numel() >= self.workspace_bytes(n, a.dtype, a.device, len(a))
        assert a.is_contiguous()
        with self.lock:
            ticket, mine = next(self.tickets), [span(a), span(work)]
            assert apart(*mine)
            for other in itertools.chain(*self.active.values()):
                assert all(apart(x, other) for x in mine)
            self.active[ticket] = mine
            self.works.append(span(work))
        try:
            if n in self.broken:
                raise RuntimeError("cusolverDnXsyevBatched returned status 7")
            matrices = a.clone()
            a.fill_(torch.nan)
            work.random_(0, 256)
            time.sleep(self.random.random() * 0.003)
            values, vectors = torch.linalg.eigh(matrices)
            work.random_(0, 256)
            a.copy_(vectors)
            if failed := n in self.unconverged:
                values[0], a[0] = torch.nan, torch.nan
            return values, [not failed] + [True] * (len(a) - 1)
        finally:
            del self.active[ticket]


@pytest.fixture
def solver(monkeypatch):
    """Sizes above 20 count as large, so that LAPACK is quick."""

    class Stream:
        def __init__(self, device=None):
            pass

        def wait_stream(self, other):
            pass

    chosen = Solver()
    for name, stand_in in {
        "Stream": Stream,
        "current_stream": Stream,
        "stream": contextlib.nullcontext,
        "device": contextlib.nullcontext,
    }.items():
        monkeypatch.setattr(torch.cuda, name, stand_in)
    monkeypatch.setattr(torch._C, "_cuda_clearCublasWorkspaces", lambda: None, raising=False)
    monkeypatch.setattr(cusolver, "workspace_bytes", chosen.workspace_bytes)
    monkeypatch.setattr(cusolver, "eigh_", chosen.eigh_)
    monkeypatch.setattr(batch_plan, "LARGE", 20)
    for cached in (batch_plan.schedule, batched._stream):
        cached.cache_clear()
    yield chosen
    for cached in (batch_plan.schedule, batched._stream):
        cached.cache_clear()


def make_job(n, count, indices, dtype=torch.float32):
    x = torch.randn(count, n, n + 3, generator=torch.Generator().manual_seed(n), dtype=dtype)
    return Problem(1e-20 * x @ x.mT, torch.randn(count, n, n, dtype=dtype), list(indices))


ALL = {12: range(90), 30: range(40), 26: range(8), 9: range(7)}
SOME = {12: [*range(60), *range(63, 90)], 30: [0, *range(4, 38)], 26: [1, 3, 5], 9: range(2, 7)}


def solve(chosen, dtype=torch.float32, memory=30_000):
    """Decompose within ``memory`` borrowed entries; check results, and what must be as it was."""
    problems = [make_job(n, 90, indices, dtype) for n, indices in chosen.items()]
    before = [problem.operators.clone() for problem in problems]
    held = torch.randn(memory, dtype=dtype)
    borrowed = BorrowedMemory(held, memory // 3)
    kept = held[borrowed.free :].clone()
    results = batched.decompose(problems, 4096, [borrowed])
    assert torch.equal(held[borrowed.free :], kept)
    tolerance = 1e-5 if dtype == torch.float32 else 1e-12
    for problem, result, old in zip(problems, results, before, strict=True):
        assert result.converged == [True] * len(problem.indices)
        a, q = 1e20 * problem.factors[problem.indices], problem.operators[problem.indices]
        eye = torch.eye(problem.n, dtype=dtype)
        assert (q.mT @ q - eye).abs().max() < tolerance
        norm = torch.linalg.matrix_norm(a)
        error = torch.linalg.matrix_norm((q * (1e20 * result.values)[:, None]) @ q.mT - a)
        assert (error / norm).max() < tolerance
        others = [i for i in range(90) if i not in problem.indices]
        assert torch.equal(problem.operators[others], old[others])
    return problems


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("chosen", [ALL, SOME], ids=["all", "some"])
def test_results_do_not_depend_on_the_memory(solver, chosen, dtype):
    problems = solve(chosen, dtype)
    start, stop = span(problems[0].operators)  # of the small ones, which were memory to work in
    assert any(start <= low and high <= stop for low, high in solver.works)


@pytest.mark.parametrize(("indices", "run"), [(SOME[12], 60), ([4], 1), (range(90), 90)])
def test_only_operators_that_are_replaced_are_memory(indices, run):
    problem = make_job(16, 90, indices)  # a matrix is a multiple of the alignment
    old = problem.operators.clone()
    memory = batched._operator_memory(problem)
    assert len(memory) > 4 * 16 * 16 * run - host_offload.ALIGNMENT
    memory.fill_(0)
    others = [i for i in range(90) if i not in indices]
    assert torch.equal(problem.operators[others], old[others])


@pytest.mark.parametrize("chosen", [ALL, SOME], ids=["all", "some"])
def test_what_does_not_converge_is_decomposed_from_the_factor_again(solver, chosen):
    solver.unconverged = (12, 30)
    solve(chosen)


@pytest.mark.parametrize("n", [12, 30])
def test_an_error_is_raised_and_lent_memory_is_as_it_was(solver, n):
    solver.broken = (n,)
    with pytest.raises(RuntimeError, match="status 7"):
        solve(ALL)


def test_parked_contents_come_back_after_an_error():
    x, y = torch.arange(10.0), torch.arange(7)
    with pytest.raises(KeyError), host_offload.offloaded([x[3:], y, y[7:]]):
        x.fill_(-1)
        y.fill_(-1)
        raise KeyError
    assert x.tolist() == [-1, -1, -1, *range(3, 10)] and y.tolist() == list(range(7))


def test_lent_memory_is_used_as_far_as_it_may_be_parked(monkeypatch):
    monkeypatch.setattr(host_offload, "OFFLOADED_BYTES", 40)
    x = torch.zeros(100)
    assert [host_offload.usable(BorrowedMemory(x, free)) for free in (0, 50, 95, 100)] == [
        10,
        60,
        100,
        100,
    ]


@given(st.integers(0, 300), st.sampled_from([torch.float32, torch.float64, torch.uint8]))
def test_queues_start_aligned_and_end_with_their_memory(start, dtype):
    x = torch.empty(1000, dtype=dtype)[start:]
    queue = host_offload.as_bytes(x)
    low, high = span(x)
    assert span(queue)[1] == high and queue.data_ptr() - low < host_offload.ALIGNMENT
    assert queue.data_ptr() % host_offload.ALIGNMENT == 0


@given(st.sets(st.integers(0, 30), min_size=1).map(sorted))
def test_rows_by_index(indices):
    first, count = longest_run(indices)
    assert set(range(first, first + count)) <= set(indices)
    runs = [
        length
        for i in indices
        for length in range(1, 32)
        if set(range(i, i + length)) <= set(indices)
    ]
    assert count == max(runs)
    assert consecutive(indices) == (count == len(indices))
    x = torch.arange(31.0)
    assert take(x, indices).tolist() == indices
    put(x, indices, -torch.ones(len(indices)))
    assert [i for i in range(31) if x[i] == -1] == indices
