"""Time and memory of a step in several versions of this project, in one process.

    python benchmarks/between_trees.py --trees CHECKOUT,. --workload imagenet_vit --json out.json

Timings of two processes differ by several percent on a machine that others use. Here every version
takes each step in turn, on the same gradients, in an order that changes from step to step, and what
is compared is the ratio to the first version's time of the same step. ``--device cpu`` with a mini
measures the processor's time of this process, which a busy machine disturbs less than a clock, but
does (others empty its caches): so two ordinary steps, which are not timed, are counted, one its
calls of Python functions and of functions in C, one its calls of torch's operations. These counts
are the same on every run.
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
from torch.utils._python_dispatch import TorchDispatchMode

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


# Of a variant: the class, its name where versions had functions instead, and its settings.
VARIANTS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "eshampoo_fixed": ("EShampoo", "eshampoo", {}),
    "eshampoo_adaptive": ("EShampoo", "eshampoo", dict(tau=0.1)),
    "shampoo_grafting": ("Shampoo", "shampoo_grafting", {}),
}


def build(
    module: ModuleType, variant: str, params: list[torch.nn.Parameter], **settings: Any
) -> Any:
    """An optimizer of a version."""
    name, function, more = VARIANTS[variant]
    made = getattr(module, name, None)
    if made is None:
        made = getattr(importlib.import_module(f"{module.__name__}.kronecker"), function)
    return made(params, **POINT, **more, **settings)


class _Operations(TorchDispatchMode):
    """Counts torch's operations; those on lists of tensors once."""

    count = 0

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        self.count += function.namespace != "profiler"
        return function(*args, **(kwargs or {}))


def calls(step: Any) -> dict[str, int]:
    """Calls of functions in a step, in Python and in C."""
    found = {"call": 0, "c_call": 0}

    def note(frame: Any, event: str, argument: Any) -> None:
        if event in found:
            found[event] += 1

    sys.setprofile(note)
    try:
        step()
    finally:
        sys.setprofile(None)
    return {"python_calls": found["call"], "c_calls": found["c_call"]}


def operations(step: Any) -> dict[str, int]:
    """Calls of torch's operations in a step."""
    with _Operations() as mode:
        step()
    return {"torch_operations": mode.count}


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
    parser.add_argument("--variant", default="eshampoo_fixed", choices=sorted(VARIANTS))
    parser.add_argument("--json", help="where to write the record")
    args = parser.parse_args()
    device, F = torch.device(args.device), args.frequency
    trees = args.trees.split(",")
    modules = [load_optim(Path(tree), f"tree{i}_optim") for i, tree in enumerate(trees)]
    record: dict[str, Any] = {
        "machine": machine(device),
        "workload": args.workload,
        "variant": args.variant,
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
                args.variant,
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
        counts: list[dict[str, int]] = [{} for _ in trees]
        for t in range(1, (args.rounds + 4) * F):
            drawn = gradients.draw()
            for k in range(len(trees)):
                i = (k + t) % len(trees)
                for p, g in zip(replicas[i], drawn, strict=True):
                    p.grad = g
                if t in (2 * F + 2, 2 * F + 3):
                    count = calls if t == 2 * F + 2 else operations
                    counts[i] |= count(optimizers[i].step)
                    continue
                ms = took(optimizers[i], device)
                if t > 3 * F:  # before that: loading, compiling, recording
                    (ordinary if t % F else refreshing)[i].append(ms)
        entries = {}
        for i, tree in enumerate(trees):
            entry = entries[tree] = {
                "ordinary_ms": spread(ordinary[i]),
                "refresh_ms": spread(refreshing[i]),
                "ordinary_ratio": _ratio(ordinary, i),
                "ordinary_min_ratio": min(ordinary[i]) / min(ordinary[0]),
                "refresh_ratio": _ratio(refreshing, i),
                "peak_mib": peaks[i],
                **counts[i],
            }
            o, r = entry["ordinary_ms"], entry["refresh_ms"]
            rows.append(
                [
                    f"{tree}, {setting}",
                    f"{o['median']:.3f} (from {o['min']:.3f})",
                    f"{entry['ordinary_ratio']:.3f} ({entry['ordinary_min_ratio']:.3f})",
                    f"{r['median']:.1f} (from {r['min']:.1f})",
                    f"{entry['refresh_ratio']:.3f}",
                    "-" if peaks[i] is None else f"{peaks[i]:.0f}",
                    " / ".join(str(n) for n in counts[i].values()),
                ]
            )
        record["settings"][setting] = entries
        del optimizers, replicas
    n = f"n = {len(ordinary[0])} and {len(refreshing[0])}"
    print(f"\n{args.variant}, {args.workload}, {record['machine']['device']}: medians, {n}")
    header = ["version", "ordinary step, ms", "ratio (of fastest)", "refresh step, ms", "ratio"]
    header += ["peak MiB", "Python / C / torch calls"]
    print(table(header, rows))
    write(args.json, record)


def _ratio(times: list[list[float]], i: int) -> float:
    """Median over steps of version i's time by the first version's of the same step."""
    return statistics.median(a / b for a, b in zip(times[i], times[0], strict=True))


if __name__ == "__main__":
    main()
