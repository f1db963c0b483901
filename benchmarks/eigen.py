"""Every eigensolver back end by matrix size and batch: time and error.

    python benchmarks/eigen.py --sizes 128,384,1024 --batches 1,16 --json out.json

Matrices have the spectrum of the generator of gradients (eigenvalues i^-2), in
float32. Residual is ||A - Q Lambda Q'|| / ||A||, orthogonality max |Q'Q - I|, both in float64. The
warm back ends start from the eigenvectors of a matrix a few percent off, and end below tau.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch
from measure import machine, seconds, spread, table, write

from algoperf_shampoo.optim.eigen import cusolver
from algoperf_shampoo.optim.eigen.orthogonal_iteration import ORTHOGONALIZATIONS
from algoperf_shampoo.optim.eigen.problem import Problem
from algoperf_shampoo.optim.eigen.solver import Solver

Run = Callable[[], tuple[torch.Tensor, torch.Tensor]]


def matrices(n: int, batch: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Factors and old bases: [batch, n, n] each, float32."""
    g = torch.Generator(device).manual_seed(n)
    x = torch.randn(batch, n, n, device=device, generator=g, dtype=torch.float64)
    q = torch.linalg.qr(x).Q
    lam = torch.arange(1, n + 1, device=device, dtype=torch.float64) ** -2.0
    a = (q * lam) @ q.mT
    skew = torch.randn(batch, n, n, device=device, generator=g, dtype=torch.float64)
    turn = torch.linalg.qr(
        torch.eye(n, device=device, dtype=torch.float64) + 0.05 * (skew - skew.mT) / n**0.5
    ).Q
    return a.float(), (q.flip(-1) @ turn).float()


def back_ends(a: torch.Tensor, old: torch.Tensor, tau: float) -> dict[str, Run]:
    """Name -> a run that returns eigenvalues and vectors."""

    def lapack(dtype: torch.dtype) -> Run:
        def run() -> tuple[torch.Tensor, torch.Tensor]:
            values, vectors = torch.linalg.eigh(a.to("cpu", dtype))
            return values.to(a.device), vectors.to(a.device)

        return run

    def solver(**settings: Any) -> Run:
        chosen = Solver(workspace_mib=4096, **settings)

        def run() -> tuple[torch.Tensor, torch.Tensor]:
            q = old.clone()
            (result,) = chosen.solve([Problem(a, q, list(range(len(a))))], tau)
            return result.values, q

        return run

    runs: dict[str, Run] = {
        "CPU, float32": lapack(torch.float32),
        "CPU, float64": lapack(torch.float64),
    }
    if a.is_cuda:
        runs["torch.linalg.eigh"] = lambda: tuple(torch.linalg.eigh(a))  # type: ignore[return-value]
        if cusolver.available():
            runs["cuSOLVER, batched"] = solver()
    for name in ORTHOGONALIZATIONS:
        runs[f"warm, {name}"] = solver(method="warm", orthogonalization=name)
    return runs


def errors(a: torch.Tensor, values: torch.Tensor, vectors: torch.Tensor) -> tuple[float, float]:
    """(residual, orthogonality), the worst of the batch."""
    a, q, lam = a.double(), vectors.double(), values.double()
    norm = torch.linalg.matrix_norm
    residual = (norm((q * lam[:, None]) @ q.mT - a) / norm(a)).max().item()
    eye = torch.eye(a.shape[-1], device=a.device, dtype=torch.float64)
    return residual, (q.mT @ q - eye).abs().max().item()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--sizes", default="64,128,256,384,512,1024")
    parser.add_argument("--batches", default="1,4,16")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--tau", type=float, default=0.1, help="the warm back ends stop below it")
    parser.add_argument("--json", help="where to write the record")
    args = parser.parse_args()
    device = torch.device(args.device)
    entries = []
    for n in map(int, args.sizes.split(",")):
        for batch in map(int, args.batches.split(",")):
            a, old = matrices(n, batch, device)
            for name, run in back_ends(a, old, args.tau).items():
                values, vectors = run()  # also loads and compiles
                residual, orthogonality = errors(a, values, vectors)
                times = [1e3 * seconds(run, device) for _ in range(args.repeat)]
                entries.append(
                    {
                        "n": n,
                        "batch": batch,
                        "back_end": name,
                        "ms": spread(times),
                        "residual": residual,
                        "orthogonality": orthogonality,
                    }
                )
    rows = [
        [
            str(e["n"]),
            str(e["batch"]),
            e["back_end"],
            f"{e['ms']['median']:.2f} ({e['ms']['min']:.2f}-{e['ms']['max']:.2f})",
            f"{e['residual']:.1e}",
            f"{e['orthogonality']:.1e}",
        ]
        for e in entries
    ]
    print(machine(device)["device"])
    print(table(["n", "batch", "back end", "ms", "residual", "orthogonality"], rows))
    write(args.json, {"machine": machine(device), "tau": args.tau, "entries": entries})


if __name__ == "__main__":
    main()
