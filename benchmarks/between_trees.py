"""Time and memory of an EShampoo step in several versions of this project, in one process.

    python benchmarks/between_trees.py --trees CHECKOUT,. --workload imagenet_vit --json out.json

Timings of two processes differ by several percent on a machine that others use. Here every version
takes each step in turn, on the same gradients, in an order that changes from step to step, and what
is compared is the ratio to the first version's time of the same step. ``--device cpu`` with a mini
measures the processor's time of this process, which a busy machine disturbs less than a clock.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import importlib.util
import statistics
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from gradients import TurningGradients
from measure import machine, seconds, spread, table, write
from optimizer_step import parameters

POINT: dict[str, Any] = dict(lr=1.4e-3, betas=(0.9747, 0.9749), weight_decay=2e-4, nadam=True)
SETTINGS: dict[str, dict[str, Any]] = {
    "fp32": {},
    "11-bit rotations": dict(matmul_precision="high"),
}


def load_optim(tree: Path, name: str) -> ModuleType:
    """``algoperf_shampoo/optim`` of a checkout as a package called ``name``: it imports itself by
    relative names alone."""
    folder = tree / "algoperf_shampoo" / "optim"
    spec = importlib.util.spec_from_file_location(
        name, folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    if spec is None or spec.loader is None or not folder.is_dir():
        raise SystemExit(f"error: --trees={tree}: no algoperf_shampoo/optim in it")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def build(module: ModuleType, params: list[torch.nn.Parameter], **settings: Any) -> Any:
    """EShampoo of a version; the first ones had functions in the place of classes."""
    made = getattr(module, "EShampoo", None)
    if made is None:
        made = importlib.import_module(f"{module.__name__}.kronecker").eshampoo
    return made(params, **POINT, **settings)


def took(optimizer: Any, device: torch.device) -> float:
    """Milliseconds of a step."""
    if device.type == "cuda":
        return 1e3 * seconds(optimizer.step, device)
    start = time.process_time()
    optimizer.step()
    return 1e3 * (time.process_time() - start)


def peak(make: Any, params: list[torch.nn.Parameter], device: torch.device, F: int) -> float | None:
    """MiB at the peak of F + 3 steps beside the parameters; None on a CPU."""
    if device.type != "cuda":
        return None
    gc.collect()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    optimizer = make()
    for p in params:
        p.grad = torch.randn_like(p)
    for _ in range(F + 3):
        optimizer.step()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--trees", required=True, help="checkouts, separated by commas")
    parser.add_argument("--workload", default="imagenet_vit")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--frequency", type=int, default=10, help="F: every F-th step refreshes")
    parser.add_argument("--rounds", type=int, default=12, help="refreshes timed")
    parser.add_argument("--max-dim", type=int, default=1024, help="largest dimension of a block")
    parser.add_argument("--json", help="where to write the record")
    args = parser.parse_args()
    device, F = torch.device(args.device), args.frequency
    trees = args.trees.split(",")
    modules = [load_optim(Path(tree), f"tree{i}_optim") for i, tree in enumerate(trees)]
    record: dict[str, Any] = {
        "machine": machine(device),
        "workload": args.workload,
        "clock": "wall" if device.type == "cuda" else "processor",
        "settings": {},
    }
    rows = []
    for setting, options in SETTINGS.items():
        if device.type == "cpu" and options:
            continue
        replicas = [parameters(args.workload, device) for _ in trees]

        def make(i: int, options: dict[str, Any] = options, replicas: Any = replicas) -> Any:
            return build(
                modules[i],
                replicas[i],
                precondition_frequency=F,
                max_preconditioner_dim=args.max_dim,
                **options,
            )

        peaks = [peak(lambda i=i: make(i), replicas[i], device, F) for i in range(len(trees))]
        optimizers = [make(i) for i in range(len(trees))]
        gradients = TurningGradients(list(replicas[0]))
        ordinary: list[list[float]] = [[] for _ in trees]
        refreshing: list[list[float]] = [[] for _ in trees]
        for t in range(1, (args.rounds + 4) * F):
            drawn = gradients.draw()
            for k in range(len(trees)):
                i = (k + t) % len(trees)
                for p, g in zip(replicas[i], drawn, strict=True):
                    p.grad = g
                ms = took(optimizers[i], device)
                if t > 3 * F:  # before that: loading, compiling, recording
                    (ordinary if t % F else refreshing)[i].append(ms)
        entries = {}
        for i, tree in enumerate(trees):
            entry = entries[tree] = {
                "ordinary_ms": spread(ordinary[i]),
                "refresh_ms": spread(refreshing[i]),
                "ordinary_ratio": _ratio(ordinary, i),
                "refresh_ratio": _ratio(refreshing, i),
                "peak_mib": peaks[i],
            }
            o, r = entry["ordinary_ms"], entry["refresh_ms"]
            rows.append(
                [
                    f"{tree}, {setting}",
                    f"{o['median']:.3f} (from {o['min']:.3f})",
                    f"{entry['ordinary_ratio']:.3f}",
                    f"{r['median']:.1f} (from {r['min']:.1f})",
                    f"{entry['refresh_ratio']:.3f}",
                    "-" if peaks[i] is None else f"{peaks[i]:.0f}",
                ]
            )
        record["settings"][setting] = entries
        del optimizers, replicas
    counts = f"n = {len(ordinary[0])} and {len(refreshing[0])}"
    print(f"\n{args.workload}, {record['machine']['device']}: medians, {counts}")
    header = ["version", "ordinary step, ms", "ratio", "refresh step, ms", "ratio", "peak MiB"]
    print(table(header, rows))
    write(args.json, record)


def _ratio(times: list[list[float]], i: int) -> float:
    """Median over steps of version i's time by the first version's of the same step."""
    return statistics.median(a / b for a, b in zip(times[i], times[0], strict=True))


if __name__ == "__main__":
    main()
