"""Warm-started QR (Algorithm 4) against eigh on the factors of a mini in training, on a CPU.

    PYTHONPATH=. OMP_NUM_THREADS=1 python benchmarks/qr_against_eigh.py --json OUT

Trains a mini with EShampoo at its point (F = 10). Every --frequency steps every factor goes to
every contender: eigh where Eq. 11 fails; Algorithm 4 with columns sorted descending before the
iterations; ascending after them, as facebookresearch/optimizers does; and not sorted. Each keeps
bases of its own, and all see the same factors. Counted: checks, refreshes, QR iterations,
refreshes that hit the bound on iterations without meeting Eq. 11; CPU seconds of the thread,
criterion included.
"""

from __future__ import annotations

import argparse
import json
import time
from collections import defaultdict
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from algoperf_shampoo.contract import ForwardPassMode
from algoperf_shampoo.harness import prng
from algoperf_shampoo.optim import EShampoo
from algoperf_shampoo.optim.blocks.partition import cut
from algoperf_shampoo.optim.reference import matricize
from algoperf_shampoo.workloads import load

ROOT = Path(__file__).resolve().parent.parent
CONTENDERS = ("eigh", "descending", "ascending", "unsorted")


def criterion(Lambda: Tensor) -> float:
    """Eq. 11's left side from Q'LQ, summed over the off-diagonal."""
    total = Lambda.norm()
    off = (Lambda - torch.diag(torch.diag(Lambda))).norm()
    return (off / total).item() if total > 0 else 0.0


def iterate(L: Tensor, Q: Tensor, tau: float, most: int) -> tuple[Tensor, Tensor, int]:
    """Algorithm 4: Q^, Q^'LQ^ and the number of iterations."""
    Lambda, count = Q.T @ L @ Q, 0
    while count < most and criterion(Lambda) > tau:
        q, r = torch.linalg.qr(Lambda)
        Lambda, Q = r @ q, Q @ q
        count += 1
    return Q, Lambda, count


@dataclass
class Tally:
    checks: int = 0
    refreshes: int = 0
    iterations: int = 0
    unfinished: int = 0  # iterations used up, Eq. 11 not met
    seconds: float = 0.0


@dataclass
class Contender:
    """One way to keep the bases of all factors."""

    order: str
    tau: float
    most: int
    bases: dict[tuple[int, ...], Tensor] = field(default_factory=dict)
    tallies: dict[str, Tally] = field(default_factory=lambda: defaultdict(Tally))

    def check(self, key: tuple[int, ...], kind: str, L: Tensor) -> None:
        Q = self.bases.get(key)
        if Q is None:
            Q = torch.eye(len(L), dtype=L.dtype)
        tally = self.tallies[kind]
        began = time.thread_time()
        Q, refreshed, iterations, met = self.refreshed(L, Q)
        tally.seconds += time.thread_time() - began
        tally.checks += 1
        tally.refreshes += refreshed
        tally.iterations += iterations
        tally.unfinished += not met
        self.bases[key] = Q

    def refreshed(self, L: Tensor, Q: Tensor) -> tuple[Tensor, bool, int, bool]:
        """The basis, whether it is new, iterations, and whether Eq. 11 holds in it."""
        Lambda = Q.T @ L @ Q
        if criterion(Lambda) <= self.tau:
            if self.order == "ascending":
                Q = Q[:, torch.diag(Lambda).argsort(stable=True)]
            return Q, False, 0, True
        if self.order == "eigh":
            return torch.linalg.eigh(L).eigenvectors, True, 0, True
        if self.order == "descending":
            Q = Q[:, torch.diag(Lambda).argsort(descending=True, stable=True)]
        Q, Lambda, count = iterate(L, Q, self.tau, self.most)
        met = criterion(Lambda) <= self.tau
        if self.order == "ascending":
            Q = Q[:, torch.diag(Lambda).argsort(stable=True)]
        return Q, True, count, met


def gradients(name: str, steps: int, point: dict[str, Any]) -> Any:
    """Gradients of all parameters per step, while EShampoo trains the mini."""
    workload = load(name)
    rng = prng.PRNGKey(1)
    model, _ = workload.init_model_fn(rng)
    params = list(model.parameters())
    queue = workload._build_input_queue(rng, "train", None, 4)
    optimizer = EShampoo(
        params,
        lr=point["learning_rate"],
        betas=(1 - point["one_minus_beta1"], 1 - point["one_minus_beta2"]),
        weight_decay=point["weight_decay"],
        nadam=point["use_nadam"],
        precondition_frequency=point["precondition_frequency"],
        max_preconditioner_dim=point["max_preconditioner_dim"],
    )
    warmup = int(point["warmup_factor"] * steps)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = point["learning_rate"] * min(1, (step + 1) / warmup)
        batch = next(queue)
        forward = (model, batch, None, ForwardPassMode.TRAIN, prng.fold_in(rng, step), True)
        logits, _ = workload.model_fn(*forward, dropout_rate=0.0)
        result = workload.loss_fn(batch["targets"], logits, batch.get("weights"), 0.2)
        optimizer.zero_grad()
        loss = result["summed"] / result["n_valid_examples"]
        loss.backward()
        optimizer.step()
        yield loss.item(), [None if p.grad is None else p.grad.clone() for p in params]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--workload", default="imagenet_vit")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--frequency", type=int, default=10, help="steps between checks")
    parser.add_argument("--taus", default="0.3,0.1,0.01")
    parser.add_argument("--most", type=int, default=200, help="I: most QR iterations a refresh")
    parser.add_argument("--json", help="write the figures here")
    args = parser.parse_args()
    torch.set_num_threads(1)
    space = ROOT / "search_spaces" / "mini" / "eshampoo_fixed.json"
    point = json.loads(space.read_text())[args.workload][0]
    beta2 = 1 - point["one_minus_beta2"]
    contenders = [
        Contender(order, float(tau), args.most)
        for tau in args.taus.split(",")
        for order in CONTENDERS
    ]
    factors: dict[tuple[int, ...], Tensor] = {}
    losses = []
    for t, (loss, step) in enumerate(gradients(f"{args.workload}_mini", args.steps, point), 1):
        losses.append(loss)
        for i, g in enumerate(step):
            if g is None or g.numel() == 1:
                continue
            for b, block in enumerate(cut(tuple(g.shape), point["max_preconditioner_dim"])):
                G = g.reshape(block.merged)[block.slices]
                for mode in range(G.ndim):
                    X = matricize(G, mode)
                    key = (i, b, mode)
                    old = factors.get(key, torch.zeros(len(X), len(X)))
                    factors[key] = L = beta2 * old + (1 - beta2) * X @ X.T
                    if t % args.frequency == 0 and L.any():
                        kind = "A" if G.ndim == 1 else "LRT"[mode]
                        for contender in contenders:
                            contender.check(key, kind, L / (1 - beta2**t))
    sizes = sorted({len(L) for L in factors.values()})
    rows = []
    for c in contenders:
        for kind, tally in sorted(c.tallies.items()):
            rows.append({"order": c.order, "tau": c.tau, "kind": kind, **asdict(tally)})
        total = [asdict(t) for t in c.tallies.values()]
        whole = {k: sum(t[k] for t in total) for k in total[0]}
        rows.append({"order": c.order, "tau": c.tau, "kind": "all", **whole})
        print(f"tau {c.tau:5} {c.order:11}", {k: round(v, 2) for k, v in whole.items()})
    if args.json:
        record = {
            "torch": torch.__version__,
            "settings": vars(args),
            "point": point,
            "factors": len(factors),
            "sizes": sizes,
            "loss": [losses[0], losses[-1]],
            "rows": rows,
        }
        Path(args.json).write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
