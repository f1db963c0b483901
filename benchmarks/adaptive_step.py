"""EShampoo with the adaptive criterion on gradients whose eigenvectors turn: what it decides and
costs.

    python benchmarks/adaptive_step.py --workload imagenet_vit --meta DIR --json out.json

All contenders get the same gradients (benchmarks/gradients.py). At every F-th step all factors are
checked and those that fail are refreshed; per such step: time, share of factors that failed, sweeps
of warm-started iteration per failed factor, and the left side of Eq. 11 afterwards.
"""

from __future__ import annotations

import argparse
import statistics
from typing import Any

import torch
from gradients import TurningGradients
from measure import machine, seconds, spread, table, write
from optimizer_step import parameters
from peers import Build, adaptive_contenders

from algoperf_shampoo.optim import PreconditionedOptimizer
from algoperf_shampoo.optim.blocks.rows import chunks
from algoperf_shampoo.optim.criterion import relative_off_diagonal
from algoperf_shampoo.optim.eigen import solver
from algoperf_shampoo.optim.ops.linalg import matmul_precision


class SweepCounter:
    """Counts matrices times sweeps of the warm-started iteration."""

    def __init__(self) -> None:
        self.matrices = 0
        self._sweep = solver.sweep_

    def __enter__(self) -> SweepCounter:
        def counting(a: torch.Tensor, *rest: Any) -> Any:
            self.matrices += len(a)
            return self._sweep(a, *rest)

        solver.sweep_ = counting
        return self

    def __exit__(self, *_: Any) -> None:
        solver.sweep_ = self._sweep


def criterion(optimizer: PreconditionedOptimizer, refreshed: list[list[int]] | None) -> float:
    """Largest left side of Eq. 11, over factors refreshed since the counts given (or all)."""
    worst = 0.0
    sets = list(optimizer.factor_sets())
    for s, before in zip(sets, refreshed or [[-1] * len(s.factors) for s in sets], strict=True):
        indices = [i for i, n in enumerate(s.refreshes) if n > before[i]]
        for part in chunks(indices, s.n):
            index = torch.tensor(part, device=s.factors.device)
            with matmul_precision("highest"):
                off = relative_off_diagonal(s.factors[index], s.operators[index])
            worst = max(worst, off.max().item())
    return worst


def measure(
    name: str, build: Build, workload: str, args: argparse.Namespace, device: torch.device
) -> dict[str, Any]:
    """One contender through F * checks steps."""
    F = args.frequency
    params = parameters(workload, device)
    optimizer = build(params, F)
    gradients = TurningGradients(list(params), angle=args.angle)
    ordinary: list[float] = []
    checks = []
    for t in range(1, args.checks * F + F // 2):
        for p, g in zip(params, gradients.draw(), strict=True):
            p.grad = g
        before = None
        if isinstance(optimizer, PreconditionedOptimizer):
            before = [list(s.refreshes) for s in optimizer.factor_sets()]
        with SweepCounter() as counter:
            ms = 1e3 * seconds(optimizer.step, device)
        if t % F:
            if t > F + 5:  # the first steps compile, load and record
                ordinary.append(ms)
            continue
        check: dict[str, Any] = {"step": t, "ms": ms}
        if isinstance(optimizer, PreconditionedOptimizer) and before is not None:
            sets = list(optimizer.factor_sets())
            fresh = sum(sum(s.refreshes) - sum(b) for s, b in zip(sets, before, strict=True))
            check |= {
                "factors": sum(len(s.factors) for s in sets),
                "refreshed": fresh,
                "sweeps_per_refresh": counter.matrices / fresh if fresh else 0.0,
                "criterion_of_refreshed": criterion(optimizer, before),
                "criterion_of_all": criterion(optimizer, None),
            }
        checks.append(check)
    later = [c["ms"] for c in checks[1:]]  # the first check has no basis to start from
    middle = statistics.median(ordinary)
    return {
        "contender": name,
        "ordinary_ms": spread(ordinary),
        "check_ms": spread(later),
        "mean_ms": ((F - 1) * middle + statistics.mean(later)) / F,
        "checks": checks,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--workload", default="imagenet_vit")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--tau", type=float, default=0.1)
    parser.add_argument("--frequency", type=int, default=50, help="F: steps between checks")
    parser.add_argument("--checks", type=int, default=6)
    parser.add_argument("--angle", type=float, default=0.002, help="radians a step")
    parser.add_argument("--meta", help="checkout of facebookresearch/optimizers")
    parser.add_argument("--only", help="names of contenders, separated by ;")
    parser.add_argument("--json", help="where to write the record")
    args = parser.parse_args()
    device = torch.device(args.device)
    entries = []
    for name, build in adaptive_contenders(args.meta, args.tau).items():
        if args.only and name not in args.only.split(";"):
            continue
        entries.append(measure(name, build, args.workload, args, device))
    rows = []
    for e in entries:
        later = e["checks"][1:]
        ours = "refreshed" in later[0]
        rows.append(
            [
                e["contender"],
                f"{e['ordinary_ms']['median']:.2f}",
                f"{e['check_ms']['median']:.1f} "
                f"({e['check_ms']['min']:.1f}-{e['check_ms']['max']:.1f})",
                f"{e['mean_ms']:.2f}",
                " ".join(f"{100 * c['refreshed'] / c['factors']:.0f}" for c in later)
                if ours
                else "-",
                f"{max(c['sweeps_per_refresh'] for c in later):.2f}" if ours else "-",
                f"{max(c['criterion_of_refreshed'] for c in later):.3f}" if ours else "-",
            ]
        )
    print(f"{args.workload}, tau = {args.tau}, F = {args.frequency}, {machine(device)['device']}")
    header = ["optimizer", "ordinary, ms", "check, ms", "mean, ms", "% failing, check by check"]
    print(table([*header, "sweeps at most", "Eq. 11 after refresh, at most"], rows))
    keys = {"tau": args.tau, "frequency": args.frequency, "angle": args.angle}
    record = {"machine": machine(device), "workload": args.workload, **keys, "contenders": entries}
    write(args.json, record)


if __name__ == "__main__":
    main()
