"""Warm-started QR (Algorithm 4) against eigh on the factors of a full-size model in training.

    PYTHONPATH=.:benchmarks python benchmarks/qr_at_full_size.py --workload imagenet_vit --json OUT

Trains the model on synthetic batches (a few, again and again, so that gradients have structure and
shrink) with EShampoo at its point and F = --frequency. At every check from the second on, samples
of the matrices' factors of every size go to every contender: eigh where Eq. 11 fails; Algorithm 4
with columns sorted descending before the iterations; ascending after them, as
facebookresearch/optimizers does; and not sorted. Each keeps bases of its own from the first check
on (where all get eigh's), and all see the same factors. Counted: checks, refreshes, QR iterations,
refreshes that hit the bound on iterations without meeting Eq. 11. Timed, from idle to idle: every
check as it is made here, iterations by our QR in float64; and once per size and sample what one
iteration costs by torch.linalg.qr, from which the time that all iterations would have taken by it
is computed.
"""

from __future__ import annotations

import argparse
import math
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from measure import machine, seconds, write
from torch import Tensor
from workload_step import point

from algoperf_shampoo.contract import ForwardPassMode
from algoperf_shampoo.harness import prng
from algoperf_shampoo.optim import EShampoo
from algoperf_shampoo.optim.criterion import relative_off_diagonal
from algoperf_shampoo.optim.eigen.exact import exact
from algoperf_shampoo.optim.eigen.problem import Problem
from algoperf_shampoo.optim.eigen.simultaneous import iterate
from algoperf_shampoo.optim.ops.linalg import matmul_precision
from algoperf_shampoo.workloads import load

ORDERS = ("eigh", "descending", "ascending", "unsorted")


@dataclass
class Tally:
    checks: int = 0
    refreshes: int = 0
    iterations: int = 0
    unfinished: int = 0
    ms: float = 0.0
    ms_by_householder: float = 0.0


@dataclass
class Contender:
    """One way to keep the bases of all samples."""

    order: str
    tau: float
    most: int
    bases: dict[int, Tensor] = field(default_factory=dict)
    tallies: dict[int, Tally] = field(default_factory=dict)

    def check(self, n: int, a: Tensor, start: Tensor, householder_ms: float) -> None:
        """a [N, n, n]; start: eigh's bases at the first check, ascending; householder_ms: of one
        iteration of one matrix."""
        if n not in self.bases:
            self.bases[n] = start if self.order in ("eigh", "ascending") else start.flip(-1)
            self.tallies[n] = Tally()
            return
        tally, device = self.tallies[n], a.device
        tally.checks += len(a)
        tally.ms += 1e3 * seconds(lambda: self._refreshed(n, a, tally), device)
        tally.ms_by_householder = tally.iterations * householder_ms

    def _refreshed(self, n: int, a: Tensor, tally: Tally) -> None:
        q = self.bases[n] = self.bases[n].clone()
        left = failing(a, q, range(len(a)), self.tau)
        refreshed, most = list(left), self.most
        tally.refreshes += len(left)
        if self.order == "eigh":
            if left:
                q[left] = exact(a[left])[1]
            return
        if self.order == "descending":
            sort_(a, q, refreshed, descending=True)
        while left and most:
            step_(a, q, left)
            tally.iterations += len(left)
            most -= 1
            left = failing(a, q, left, self.tau)
        tally.unfinished += len(left)
        if self.order == "ascending":
            sort_(a, q, refreshed, descending=False)


def failing(a: Tensor, q: Tensor, those: Any, tau: float) -> list[int]:
    """Which of those do not meet Eq. 11."""
    those = list(those)
    with matmul_precision("highest"):
        off = relative_off_diagonal(a[those], q[those]).tolist()
    return [i for i, x in zip(those, off, strict=True) if x > tau]


def step_(a: Tensor, q: Tensor, those: list[int]) -> None:
    """q <- QR(a q) of those, by what the optimizer has."""
    problem = Problem(a[those], q[those], list(range(len(those))))
    iterate(problem, 0.0, 1, False, 2**31)
    q[those] = problem.operators


def sort_(a: Tensor, q: Tensor, those: list[int], descending: bool) -> None:
    if not those:
        return
    some = q[those]
    with matmul_precision("highest"):
        quotients = (some * (a[those] @ some)).sum(-2)
    order = quotients.argsort(dim=-1, descending=descending, stable=True)
    q[those] = torch.gather(some, -1, order[:, None, :].expand_as(some))


def householder_ms(a: Tensor) -> float:
    """Of one iteration of one matrix by torch.linalg.qr, in this batch."""
    q = torch.linalg.qr(torch.randn_like(a)).Q
    with matmul_precision("highest"):
        times = [seconds(lambda: torch.linalg.qr(a @ q), a.device) for _ in range(3)]
    return 1e3 * min(times) / len(a)


def train(name: str, steps: int, batch: int, F: int) -> Any:
    """(step, its factors by size: [N, n, n] of all matrices, loss) at every check."""
    workload, rng, hyper = load(name), prng.PRNGKey(1), point("eshampoo_fixed")
    model, _ = workload.init_model_fn(rng)
    params = list(model.parameters())
    optimizer = EShampoo(
        params,
        lr=hyper.learning_rate,
        betas=(1 - hyper.one_minus_beta1, 1 - hyper.one_minus_beta2),
        weight_decay=hyper.weight_decay,
        nadam=hyper.use_nadam,
        precondition_frequency=F,
        one_dim="adam",
    )
    batches = [workload.synthetic_batch(batch, prng.fold_in(rng, i)) for i in range(4)]
    for t in range(1, steps + 1):
        optimizer.param_groups[0]["lr"] = hyper.learning_rate * min(1.0, t / 30)
        given = batches[t % 4]
        forward = (model, given, None, ForwardPassMode.TRAIN, prng.fold_in(rng, t), True)
        logits, _ = workload.model_fn(*forward, dropout_rate=0.0)
        result = workload.loss_fn(given["targets"], logits, given.get("weights"), 0.2)
        optimizer.zero_grad()
        loss = result["summed"] / result["n_valid_examples"]
        loss.backward()
        optimizer.step()
        if t % F == 0:
            yield t, {s.n: s.factors for s in optimizer.factor_sets()}, loss.item()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--workload", default="imagenet_vit")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--frequency", type=int, default=10, help="steps between checks")
    parser.add_argument("--sample", type=int, default=12, help="matrices of every size")
    parser.add_argument("--taus", default="0.3,0.1,0.01")
    parser.add_argument("--most", type=int, default=100, help="I: most QR iterations a refresh")
    parser.add_argument("--json", help="write the figures here")
    args = parser.parse_args()
    contenders = [
        Contender(order, float(tau), args.most) for tau in args.taus.split(",") for order in ORDERS
    ]
    costs: dict[int, float] = {}
    losses, ranks = [], {}
    for t, factors, loss in train(args.workload, args.steps, args.batch, args.frequency):
        losses.append(loss)
        for n, all_of_size in factors.items():
            if n < 32 or t < 2 * args.frequency:
                continue
            every = max(1, len(all_of_size) // args.sample)
            a = all_of_size[::every][: args.sample].clone()
            a = a[a.flatten(1).any(1)]
            if not len(a):
                continue
            a /= a.diagonal(dim1=1, dim2=2).amax(-1)[:, None, None]
            lam, start, _ = exact(a)
            level = n * torch.finfo(a.dtype).eps * lam[:, -1:]
            ranks[n] = (lam > level).sum(1).float().mean().item()
            if n not in costs:
                costs[n] = householder_ms(a)
            for c in contenders:
                c.check(n, a, start, costs[n])
        record = {
            "machine": machine(torch.device("cuda" if torch.cuda.is_available() else "cpu")),
            "settings": vars(args),
            "steps_seen": t,
            "householder_ms_a_matrix": costs,
            "mean_rank_above_n_eps": ranks,
            "loss": [losses[0], losses[-1]],
            "rows": rows_of(contenders),
        }
        write(args.json, record)
    for row in rows_of(contenders):
        if row["n"] == "all":
            print(row, flush=True)
    assert all(math.isfinite(x) for x in losses)


def rows_of(contenders: list[Contender]) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for c in contenders:
        for n, tally in sorted(c.tallies.items()):
            rows.append({"order": c.order, "tau": c.tau, "n": n, **asdict(tally)})
        each = [asdict(x) for x in c.tallies.values()]
        whole = {k: sum(x[k] for x in each) for k in asdict(Tally())}
        rows.append({"order": c.order, "tau": c.tau, "n": "all", **whole})
    return rows


if __name__ == "__main__":
    main()
