"""A full-size model's training step on synthetic batches, and the optimizer's share of it.

    python benchmarks/workload_step.py --variant eshampoo_fixed --frequency 10 --steps 50

Runs the submission itself (its update_params) on AlgoPerf's architectures at the paper's batch per
GPU, so it shows as well that the three workloads train at full size without an error. Forward and
backward run at AlgoPerf's default precision: TF32 convolutions and matrix products.
"""

from __future__ import annotations

import argparse
import collections
import importlib.util
import json
import math
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from measure import machine, seconds, spread, table, write

from algoperf_shampoo.harness import prng
from algoperf_shampoo.workloads import load

ROOT = Path(__file__).resolve().parent.parent
# The paper's batch per GPU: its runs used 1 GPU, and 4 for ImageNet ViT.
BATCHES = {"fastmri": 32, "imagenet_vit": 256, "ogbg": 512}


def submission(variant: str) -> ModuleType:
    path = ROOT / "submissions" / variant / "submission.py"
    spec = importlib.util.spec_from_file_location(f"submissions.{variant}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def point(variant: str, **overrides: Any) -> Any:
    """The variant's search-space point, some of its fields replaced."""
    space = json.loads((ROOT / "search_spaces" / f"{variant}.json").read_text(encoding="utf-8"))
    given = {k: v for k, v in overrides.items() if v is not None and k in space[0]}
    fields = {**space[0], **given}
    return collections.namedtuple("Hyperparameters", fields)(**fields)  # type: ignore[misc]


def measure(name: str, args: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    workload = load(name)
    module = submission(args.variant)
    hyper = point(
        args.variant,
        precondition_frequency=args.frequency,
        matmul_precision=args.precision,
    )
    rng = prng.PRNGKey(1)
    model, _ = workload.init_model_fn(rng)
    optimizer_state = module.init_optimizer_state(workload, model, None, hyper, rng)
    optimizer = optimizer_state["optimizer"]
    batches = [
        workload.synthetic_batch(BATCHES.get(name, 8), prng.fold_in(rng, i)) for i in range(4)
    ]
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    step_ms: dict[bool, list[float]] = {False: [], True: []}
    optimizer_ms: dict[bool, list[float]] = {False: [], True: []}
    losses = []
    real_step = optimizer.step
    inside: list[float] = []

    def timed_step() -> None:
        inside.append(1e3 * seconds(real_step, device))

    timed_step._wrapped_by_lr_sched = True  # type: ignore[attr-defined]
    optimizer.step = timed_step
    for t in range(1, args.steps + 1):
        arguments = dict(
            workload=workload,
            current_param_container=model,
            current_params_types=None,
            model_state=None,
            hyperparameters=hyper,
            batch=batches[t % 4],
            loss_type=None,
            optimizer_state=optimizer_state,
            eval_results=[],
            global_step=t - 1,
            rng=rng,
        )
        before = seconds(lambda a=arguments: module.update_params(**a), device) * 1e3
        if t > args.frequency + 2:
            refreshing = t % args.frequency == 0
            step_ms[refreshing].append(before)
            optimizer_ms[refreshing].append(inside[-1])
        if t in (1, args.steps):
            losses.append(module_loss(optimizer_state))
    ordinary, total = spread(optimizer_ms[False]), spread(step_ms[False])
    rest = total["median"] - ordinary["median"]
    entry = {
        "workload": name,
        "batch": BATCHES.get(name, 8),
        "tensors": sum(1 for _ in model.parameters()),
        "forward_backward_ms": rest,
        "optimizer_ms": ordinary,
        "share": ordinary["median"] / total["median"],
        "loss_first_and_mean": losses,
        "peak_mib": torch.cuda.max_memory_allocated() / 2**20 if device.type == "cuda" else None,
        "reserved_mib": torch.cuda.max_memory_reserved() / 2**20 if device.type == "cuda" else None,
    }
    if optimizer_ms[True]:
        refresh = spread(optimizer_ms[True])
        mean = ordinary["median"] + (refresh["median"] - ordinary["median"]) / 100
        entry |= {"refresh_ms": refresh, "share_at_F_100": mean / (rest + mean)}
    if not all(math.isfinite(x) for x in losses):
        raise RuntimeError(f"{name}: loss is not finite: {losses}")
    return entry


def module_loss(optimizer_state: dict[str, Any]) -> float:
    """Mean training loss since the last reading."""
    return optimizer_state["monitor"].flush()["loss"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--workloads", default="fastmri,imagenet_vit,ogbg")
    parser.add_argument("--variant", default="eshampoo_fixed")
    parser.add_argument("--frequency", type=int, default=10)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--precision", choices=["highest", "high"])
    parser.add_argument("--json")
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.set_float32_matmul_precision("high")  # AlgoPerf's setting on GPUs
    torch.backends.cudnn.benchmark = True
    entries = [measure(name, args, device) for name in args.workloads.split(",")]
    rows = [
        [
            e["workload"],
            str(e["batch"]),
            f"{e['forward_backward_ms']:.1f}",
            f"{e['optimizer_ms']['median']:.2f}",
            f"{100 * e['share']:.1f}%",
            f"{e['refresh_ms']['median']:.0f}" if "refresh_ms" in e else "-",
            f"{100 * e['share_at_F_100']:.1f}%" if "share_at_F_100" in e else "-",
            "-" if e["peak_mib"] is None else f"{e['peak_mib']:.0f}",
            " -> ".join(f"{x:.4g}" for x in e["loss_first_and_mean"]),
        ]
        for e in entries
    ]
    header = [
        "workload",
        "batch",
        "forward + backward, ms",
        "optimizer, ms",
        "share",
        "refresh, ms",
    ]
    header += ["share at F = 100", "peak MiB", "loss: first, mean"]
    print(f"{args.variant}, F = {args.frequency}, {args.steps} steps, {machine(device)['device']}")
    print(table(header, rows))
    write(args.json, {"machine": machine(device), "variant": args.variant, "workloads": entries})


if __name__ == "__main__":
    main()
