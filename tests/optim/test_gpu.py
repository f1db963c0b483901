"""The same promises on a GPU: back ends, precision settings, recorded steps. Run by `make
test-gpu`."""

import pytest
import torch

from algoperf_shampoo import submission
from algoperf_shampoo.optim import EShampoo
from algoperf_shampoo.optim.blocks.memory import BorrowedMemory
from algoperf_shampoo.optim.criterion import relative_off_diagonal
from algoperf_shampoo.optim.eigen import batch_plan, batched, cusolver, exact
from algoperf_shampoo.optim.eigen.orthogonal_iteration import ORTHOGONALIZATIONS
from algoperf_shampoo.optim.eigen.problem import Problem
from algoperf_shampoo.optim.eigen.solver import Solver
from algoperf_shampoo.optim.ops.linalg import gram_ema_, matricized

from .support import (
    PLAIN,
    PRECONDITIONED,
    SETTINGS,
    VARIANTS,
    ReferenceParameter,
    gradients,
    limits,
    make,
)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.mark.parametrize(
    ("dtype", "precision", "tolerance"),
    [
        (torch.float64, "highest", 1e-10),
        (torch.float32, "highest", 1e-4),
        (torch.float32, "high", 2e-3),  # TF32 rotations: 3e-4 each, of updates of 1e-2
    ],
)
@pytest.mark.parametrize("variant", PRECONDITIONED)
@pytest.mark.parametrize(("shape", "max_dim"), [((32, 20), 16), ((8, 4, 3, 3), 12), ((96, 64), 96)])
def test_hundred_steps(variant, shape, max_dim, dtype, precision, tolerance):
    start = next(gradients(shape, 1, seed=7))
    parameter = torch.nn.Parameter(start.to("cuda", dtype))
    optimizer = make(
        variant,
        [parameter],
        max_preconditioner_dim=max_dim,
        matmul_precision=precision,
        nadam=variant not in PLAIN,
    )
    expected = ReferenceParameter(variant, start, max_dim=max_dim, nadam=variant not in PLAIN)
    for gradient in gradients(shape, 100, dtype=dtype):
        parameter.grad = gradient.cuda()
        optimizer.step()
        expected.walk(gradient, optimizer)
    if variant == "eshampoo_qr":
        tolerance *= 10
    assert expected.relative_error(parameter.cpu()) < tolerance


def factors(n, count, rank):
    g = torch.Generator("cuda").manual_seed(n)
    x = torch.randn(count, n, rank, device="cuda", generator=g).double()
    return (x * torch.linspace(1, 0.01, rank, device="cuda")) @ x.mT


@pytest.mark.parametrize("n", [1, 3, 9, 31, 128, 384, 1024])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("method", ["torch", "exact", "cusolver", "queues", "scattered"])
def test_back_ends_against_float64(n, dtype, method):
    """Residual, orthogonality and eigenvalues, relative to the norm of the factor."""
    if method not in ("torch", "exact") and not cusolver.available():
        pytest.skip("this CUDA has no batched solver")
    a = factors(n, 8, max(1, n // 2)).to(dtype)
    truth = torch.linalg.eigvalsh(a.double().cpu())
    if method == "torch":
        values, vectors = torch.linalg.eigh(a)
    elif method == "exact":
        values, vectors, _ = exact.exact(a)
    elif method == "cusolver":
        vectors = a.clone()
        values, _ = cusolver.eigh_(vectors, cusolver.workspace(n, dtype, a.device, 8))
    else:  # as a refresh does: several batches in two batch_plan, in place or through copies
        indices = list(range(8)) if method == "queues" else [0, 1, 3, 4, 6, 7]
        operators = torch.zeros_like(a)
        problem = Problem(a, operators, indices)
        memory = torch.randn(40 * 2**20 // a.element_size(), dtype=dtype, device="cuda")
        kept = memory[len(memory) // 2 :].clone()
        borrowed = BorrowedMemory(memory, len(memory) // 2)
        (result,) = Solver().solve([problem], 0.0, [borrowed])
        assert torch.equal(memory[len(memory) // 2 :], kept)
        rows = torch.tensor(indices, device="cuda")
        assert not operators[[i for i in range(8) if i not in indices]].any()
        a, truth = a[rows], truth[indices]
        values, vectors = result.values, operators[rows]
    q, lam = vectors.double(), values.double()
    # torch's own batched float32 solver is the least accurate, 1e-4 at n = 128 on an H200
    single = 5e-4 if method == "torch" else 1e-5
    tolerance = single if dtype == torch.float32 else 1e-12
    norm = torch.linalg.matrix_norm(a.double())
    error = torch.linalg.matrix_norm((q * lam[:, None]) @ q.mT - a.double()) / norm
    assert error.max() < tolerance
    assert (q.mT @ q - torch.eye(n, device="cuda")).abs().max() < tolerance
    assert ((lam.cpu() - truth).abs().amax(-1) / norm.cpu()).max() < tolerance


@pytest.fixture
def batched_solver():
    if not cusolver.available():
        pytest.skip("this CUDA has no batched solver")


ALL = {384: range(260), 1024: range(24), 9: range(50), 768: range(1), 512: range(20)}
SOME = {384: [*range(60), *range(62, 100)], 1024: [0, *range(2, 24)], 768: [0], 512: [3, 7, 8]}


def assert_eigenvectors(a, q, values):
    """Residual relative to the norm, and orthogonality."""
    a, q = a.double(), q.double()
    norm = torch.linalg.matrix_norm
    assert (norm((q * values.double()[:, None]) @ q.mT - a) / norm(a)).max() < 1e-5
    eye = torch.eye(a.shape[-1], device="cuda", dtype=torch.float64)
    assert (q.mT @ q - eye).abs().max() < 1e-5


def mixed_jobs(chosen):
    """Factors of several sizes, and old operators."""
    problems = []
    for n, indices in chosen.items():
        a = factors(n, max(indices) + 3, n).float()
        problems.append(Problem(a, torch.randn_like(a), list(indices)))
    return problems


def solve_and_check(problems, entries, solver):
    """Within borrowed memory of which a half is free."""
    before = [problem.operators.clone() for problem in problems]
    memory = torch.randn(entries, device="cuda")
    kept = memory[entries // 2 :].clone()
    results = solver.solve(problems, 0.0, [BorrowedMemory(memory, entries // 2)])
    assert torch.equal(memory[entries // 2 :], kept)
    for problem, result, old in zip(problems, results, before, strict=True):
        assert all(result.converged)
        rows = torch.tensor(problem.indices, device="cuda")
        assert_eigenvectors(problem.factors[rows], problem.operators[rows], result.values)
        others = [i for i in range(len(old)) if i not in problem.indices]
        assert torch.equal(problem.operators[others], old[others])


@pytest.mark.usefixtures("batched_solver")
@pytest.mark.parametrize("mib", [0, 12, 200, 1000])
@pytest.mark.parametrize("chosen", [ALL, SOME], ids=["all", "some"])
def test_sizes_in_two_phases(chosen, mib, monkeypatch):
    """The large ones in the memory of the small ones' operators, with little and much borrowed."""
    schedules = []

    def schedule(*arguments):
        schedules.append(batch_plan.schedule(*arguments))
        return schedules[-1]

    monkeypatch.setattr(batched, "schedule", schedule)
    for _ in range(3):  # a race would not show every time
        solve_and_check(mixed_jobs(chosen), mib * 2**18, Solver())
    assert schedules == schedules[:1] * 3
    if mib == 200:
        (both,) = {len(found.phases) for found in schedules}
        assert both == 2 and max(schedules[0].used[2:]) > 0


@pytest.mark.usefixtures("batched_solver")
@pytest.mark.parametrize("chosen", [ALL, SOME], ids=["all", "some"])
def test_what_cusolver_gives_up_is_decomposed_from_the_factor(chosen, monkeypatch):
    honest = cusolver.eigh_

    def spoiled(a, work):
        values, converged = honest(a, work)
        a[-1] = torch.nan
        values[-1] = torch.nan
        return values, [*converged[:-1], False]

    monkeypatch.setattr(cusolver, "eigh_", spoiled)
    small = {n: list(indices)[:8] for n, indices in chosen.items()}
    solve_and_check(mixed_jobs(small), 50 * 2**20, Solver())


@pytest.mark.parametrize("n", [9, 100, 384])
@pytest.mark.parametrize("tau", [1e-3, 0.1])
def test_criterion_against_float64(n, tau):
    a = factors(n, 5, n).float()
    g = torch.Generator("cuda").manual_seed(0)
    skew = torch.randn(5, n, n, device="cuda", generator=g).double()
    turn = torch.linalg.matrix_exp(tau * 0.3 / n**0.5 * (skew - skew.mT))
    q = (torch.linalg.eigh(a.double()).eigenvectors @ turn).float()
    a[4] = 0
    lam = q.double().mT @ a.double() @ q.double()
    off = torch.linalg.matrix_norm(lam - torch.diag_embed(lam.diagonal(dim1=1, dim2=2)))
    exact = (off / torch.linalg.matrix_norm(lam)).nan_to_num()
    torch.testing.assert_close(relative_off_diagonal(a, q).double(), exact, rtol=5e-3, atol=0)


@pytest.mark.parametrize("mode", [0, 1])
@pytest.mark.parametrize(
    "shape",
    [(3, 1000, 384), (40, 100, 70), (300, 9, 200), (120, 384, 1), (1, 1024, 9), (2, 9, 70001)],
)
def test_gram_against_float64(shape, mode):
    """As accurate as a float32 product, whoever computes it, and symmetric to rounding."""
    g = torch.Generator("cuda").manual_seed(1)
    x = torch.randn(shape, device="cuda", generator=g)
    d = shape[1 + mode]
    if d > 2000:
        pytest.skip("no block is that large")
    factor = torch.randn(shape[0], d, d, device="cuda", generator=g)
    factor = factor @ factor.mT / d
    wide = x.double()
    product = wide @ wide.mT if mode == 0 else wide.mT @ wide
    expected = 0.9 * factor.double() + 0.1 * product
    gram_ema_(factor, matricized(x, mode), 0.9, 0.1)
    error = torch.linalg.matrix_norm(factor - expected) / torch.linalg.matrix_norm(expected)
    assert error.max() < 6e-7
    scale = expected.diagonal(dim1=1, dim2=2).amax(-1)[:, None, None]
    assert ((factor - factor.mT).abs() / scale).max() < 1e-6


@pytest.mark.parametrize("orthogonalization", ORTHOGONALIZATIONS)
@pytest.mark.parametrize("rank", [20, 384])
def test_warm_start_ends_below_tau(orthogonalization, rank):
    a = factors(384, 4, rank).float()
    old = torch.linalg.eigh(a + 0.05 * factors(384, 4, 384).float()).eigenvectors
    solver = Solver(method="warm", orthogonalization=orthogonalization)
    q = old.clone()
    (result,) = solver.solve([Problem(a, q, [0, 1, 2, 3])], 0.1)
    values = result.values
    assert all(result.converged)
    assert relative_off_diagonal(a, q).max() < 0.1
    assert (values.diff() >= 0).all()
    assert (q.mT @ q - torch.eye(384, device="cuda")).abs().max() < 1e-5


@pytest.mark.parametrize("indices", [range(40), range(0, 40, 3)])
def test_warm_start_in_lent_memory(indices):
    """Within borrowed memory, in pieces; what was offloaded is back, and others are untouched."""
    a = factors(128, 40, 60).float()
    old = torch.linalg.eigh(a + 0.02 * factors(128, 40, 128).float()).eigenvectors
    q = old.clone()
    memory = torch.randn(600_000, device="cuda")
    kept = memory[200_000:].clone()
    solver = Solver(method="warm", workspace_mib=1)
    problem = Problem(a, q, list(indices))
    (result,) = solver.solve([problem], 0.1, [BorrowedMemory(memory, 200_000)])
    assert torch.equal(memory[200_000:], kept)
    rows = torch.tensor(problem.indices, device="cuda")
    others = [i for i in range(40) if i not in problem.indices]
    assert torch.equal(q[others], old[others])
    assert relative_off_diagonal(a[rows], q[rows]).max() < 0.1
    rayleigh = (q[rows] * (a[rows] @ q[rows])).sum(-2)
    torch.testing.assert_close(result.values, rayleigh, rtol=1e-4, atol=1e-5)
    assert (q[rows].mT @ q[rows] - torch.eye(128, device="cuda")).abs().max() < 1e-5


@pytest.mark.usefixtures("batched_solver")
def test_what_a_warm_start_leaves_over_takes_no_memory_of_its_own():
    """All of 60, in borrowed memory; and sizes below WARM_MIN."""
    problems = mixed_jobs({384: range(60), 20: range(30)})
    solver = Solver(method="warm", max_iterations=1, tolerance=1e-6)
    peaks = []
    for _ in range(2):  # the first time, libraries allocate theirs
        for problem in problems:
            problem.operators.copy_(
                torch.eye(problem.n, device="cuda").expand_as(problem.operators)
            )
        memory = torch.randn(25 * 2**20, device="cuda")
        kept = memory[10**6 :].clone()
        ones = torch.ones(1, 64, 64, device="cuda")
        torch.bmm(ones, ones)  # cuBLAS takes its workspace
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        results = solver.solve(problems, 0.0, [BorrowedMemory(memory, 10**6)])
        peaks.append(torch.cuda.max_memory_allocated() - before)
        assert torch.equal(memory[10**6 :], kept)
    for problem, result in zip(problems, results, strict=True):
        assert all(result.converged)
        rows = torch.tensor(problem.indices, device="cuda")
        assert_eigenvectors(problem.factors[rows], problem.operators[rows], result.values)
    assert peaks[-1] < 16 * 2**20


@pytest.mark.parametrize("variant", VARIANTS)
def test_recorded_steps_equal_direct_ones(variant):
    """To rounding: a recorded step multiplies by the learning rate before it adds."""
    shapes = [(48, 32), (3,), (8, 4, 3, 3), (48, 32), (60, 100), (2, 50, 49)]
    results = []
    for recorded in (True, False):
        params = [
            torch.nn.Parameter(next(gradients(s, 1, seed=i, dtype=torch.float32)).cuda())
            for i, s in enumerate(shapes)
        ]
        small = limits(variant, max_preconditioner_dim=48)
        optimizer = make(variant, params, cuda_graph=recorded, **small)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: 1 - t / 60)
        for t in range(40):
            for i, p in enumerate(params):
                gradient = next(gradients(p.shape, 1, seed=50 * t + i, dtype=torch.float32))
                p.grad = None if (t, i) == (23, 1) else gradient.cuda()
            optimizer.step()
            scheduler.step()
            if t % 7 == 0:
                torch._C._cuda_clearCublasWorkspaces()
                torch.cuda.empty_cache()
        results.append([p.detach().clone() for p in params])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_an_ordinary_step_does_not_wait_for_the_device():
    params = [torch.nn.Parameter(torch.randn(64, 48, device="cuda")) for _ in range(3)]
    optimizer = EShampoo(params, precondition_frequency=4, **SETTINGS)
    for t in range(1, 16):
        for p in params:
            p.grad = torch.randn_like(p)
        if t % 4 and t > 6:  # not while the graph is recorded
            torch.cuda.set_sync_debug_mode("error")
        try:
            optimizer.step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert all(p.isfinite().all() for p in params)


def test_a_monitor_whose_state_was_loaded_onto_the_cpu_goes_on():
    monitor = submission.Monitor()
    monitor.load_state_dict({"batches": 1, "sum": torch.tensor(2.0), "count": 1})
    monitor.add(torch.tensor(4.0, device="cuda"))
    assert monitor.flush() == {"loss": 3.0}
