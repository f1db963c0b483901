"""Time and memory of one optimizer step, ours beside peers, on a workload's exact parameter shapes.

    python benchmarks/optimizer_step.py --workload imagenet_vit --meta DIR --soap DIR --json
    out.json

All contenders get the same gradients (benchmarks/gradients.py), one step each in turn. Every F-th
step refreshes; those are timed apart. Memory is the peak over a refresh, parameters and gradients
included.
"""

from __future__ import annotations

import argparse
import gc
from typing import Any

import torch
from gradients import TurningGradients
from measure import machine, seconds, spread, table, write
from peers import BLOCKS, contenders

from algoperf_shampoo.harness import prng
from algoperf_shampoo.optim.blocks.partition import cut
from algoperf_shampoo.optim.eigen import cusolver
from algoperf_shampoo.workloads import load


def parameters(workload: str, device: torch.device) -> list[torch.nn.Parameter]:
    """Parameters with the shapes of a workload's model."""
    model, _ = load(workload).init_model_fn(prng.PRNGKey(1))
    return [torch.nn.Parameter(p.detach().to(device)) for p in model.parameters()]


def floor(params: list[torch.nn.Parameter]) -> dict[str, float]:
    """Operations and bytes that an EShampoo step cannot do without.

    Operations: per block and mode d, 2 d * numel for each of Gram, rotation and rotation back (M is
    averaged in the basis, so the gradient alone is rotated). Bytes: gradient, parameter, M and D
    read, all but the gradient written; factors read and written, bases read.
    """
    flop = byte = 0.0
    for p in params:
        for block in cut(tuple(p.shape), BLOCKS["max_preconditioner_dim"]):
            flop += 3 * sum(2 * d * block.numel for d in block.shape)
            byte += 4 * (7 * block.numel + 3 * sum(d * d for d in block.shape))
    return {"gflop": flop / 1e9, "mbyte": byte / 1e6}


def eigen_floor(params: list[torch.nn.Parameter], device: torch.device) -> float | None:
    """Milliseconds of cuSOLVER's batched kernels alone on random factors of the same sizes."""
    if not cusolver.available():
        return None
    sizes: dict[int, int] = {}
    for p in params:
        for block in cut(tuple(p.shape), BLOCKS["max_preconditioner_dim"]):
            for d in block.shape:
                if block.shape != (1,):
                    sizes[d] = sizes.get(d, 0) + 1
    total = 0.0
    for n, count in sizes.items():
        batch = max(1, min(count, 2**24 // (n * n)))
        x = torch.randn(batch, n, 2 * n, device=device)
        a = x @ x.mT / n
        work = cusolver.workspace(n, a.dtype, device, batch)
        times = [
            seconds(lambda a=a, w=work: cusolver.eigh_(a.clone(), w), device) for _ in range(3)
        ]
        total += min(times) * 1e3 * count / batch
    return total


def peak_memory(build: Any, workload: str, device: torch.device, F: int) -> tuple[float, float]:
    """MiB at the peak of F + 3 steps, one of them a refresh, and how many seconds they took: the
    first contender that needs a kernel has it compiled, or loaded where the compiler finds it in
    its cache."""
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    params = parameters(workload, device)
    optimizer = build(params, F)
    for p in params:
        p.grad = torch.randn_like(p)

    def steps() -> None:
        for _ in range(F + 3):
            optimizer.step()

    took = seconds(steps, device)
    return (torch.cuda.max_memory_allocated() - before) / 2**20, took


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--workload", default="imagenet_vit")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--frequency", type=int, default=10, help="F: every F-th step refreshes")
    parser.add_argument(
        "--rounds", type=int, default=4, help="refreshes timed, after three as warm-up"
    )
    parser.add_argument("--max-dim", type=int, default=1024, help="largest dimension of a block")
    parser.add_argument("--meta", help="checkout of facebookresearch/optimizers")
    parser.add_argument("--soap", help="checkout of nikhilvyas/SOAP")
    parser.add_argument("--only", help="names of contenders, separated by ;")
    parser.add_argument("--json", help="where to write the record")
    args = parser.parse_args()
    device = torch.device(args.device)
    F = args.frequency
    BLOCKS["max_preconditioner_dim"] = args.max_dim
    table_of = contenders(args.meta, args.soap)
    if args.only:
        table_of = {k: v for k, v in table_of.items() if k in args.only.split(";")}
    memory: dict[str, tuple[float, float]] = {}
    if device.type == "cuda":
        memory = {n: peak_memory(b, args.workload, device, F) for n, b in table_of.items()}
    replicas = {name: parameters(args.workload, device) for name in table_of}
    optimizers = {name: build(replicas[name], F) for name, build in table_of.items()}
    first = next(iter(replicas.values()))
    gradients = TurningGradients(list(first))
    ordinary: dict[str, list[float]] = {name: [] for name in table_of}
    refreshing: dict[str, list[float]] = {name: [] for name in table_of}
    one_off: dict[str, float] = dict.fromkeys(table_of, 0.0)
    for t in range(1, (args.rounds + 4) * F):
        drawn = gradients.draw()
        for name, optimizer in optimizers.items():
            for p, g in zip(replicas[name], drawn, strict=True):
                p.grad = g
            ms = 1e3 * seconds(optimizer.step, device)
            if t < F + 3:  # first calls: loading, compiling, recording
                one_off[name] += ms
            elif t % F:
                ordinary[name].append(ms)
            elif t > 3 * F:  # before that a check runs directly, then is recorded
                refreshing[name].append(ms)
    limits = floor(first)
    eigen = eigen_floor(first, device) if device.type == "cuda" else None
    record: dict[str, Any] = {
        "machine": machine(device),
        "workload": args.workload,
        "max_dim": args.max_dim,
        "tensors": len(first),
        "parameters": sum(p.numel() for p in first),
        "floor": {**limits, "eigen_kernels_ms": eigen},
        "contenders": {
            name: {
                "ordinary_ms": spread(ordinary[name]),
                "refresh_ms": spread(refreshing[name]),
                "very_first_steps_s": memory[name][1] if memory else None,
                "first_steps_ms": one_off[name],
                "peak_mib": memory[name][0] if memory else None,
            }
            for name in table_of
        },
    }
    rows = []
    for name, entry in record["contenders"].items():
        o, r = entry["ordinary_ms"], entry["refresh_ms"]
        rows.append(
            [
                name,
                f"{o['median']:.2f} ({o['min']:.2f}-{o['max']:.2f})",
                f"{r['median']:.1f} ({r['min']:.1f}-{r['max']:.1f})",
                f"{(99 * o['median'] + r['median']) / 100:.2f}",
                "-" if entry["peak_mib"] is None else f"{entry['peak_mib']:.0f}",
                f"{entry['first_steps_ms'] / 1e3:.1f}",
            ]
        )
    n = len(next(iter(ordinary.values())))
    print(f"\n{args.workload}: {record['tensors']} tensors, {record['machine']['device']}, n = {n}")
    print(f"floor: {limits['gflop']:.0f} GFLOP, {limits['mbyte']:.0f} MB", end="")
    print("" if eigen is None else f"; eigen kernels alone {eigen:.0f} ms")
    header = ["optimizer", "ordinary step, ms", "refresh step, ms", "mean at F = 100, ms"]
    print(table([*header, "peak MiB", f"first {F + 2} steps, s"], rows))
    write(args.json, record)


if __name__ == "__main__":
    main()
