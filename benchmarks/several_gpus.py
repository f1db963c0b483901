"""The submission itself on several GPUs of one host, its work shared or done by every rank.

    torchrun --nproc_per_node 4 benchmarks/several_gpus.py --json four.json --save DIR
    torchrun --nproc_per_node 2 benchmarks/several_gpus.py --json two.json --load DIR

Full-size models under DDP, synthetic batches of AlgoPerf's size per GPU, EShampoo at F = 10. Of the
real training step (update_params): periods of ordinary steps, and the steps at which all bases are
due. Of ``optimizer.step`` alone, on gradients that stay: the same two. Memory is of factors and
bases that a GPU keeps, and the peak of the process. ``--save`` writes parameters, canonical state
and gradients of every workload after the measured steps, goes on for some, and notes hashes;
``--load`` starts from there on any number of GPUs, and says which hashes are the same.
With ``--device cpu`` it runs by gloo on the minis, to try it.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from measure import machine, spread, synchronize, write
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from algoperf_shampoo.harness import hparams, prng, submission_loader
from algoperf_shampoo.workloads import load

ROOT = Path(__file__).resolve().parent.parent
# Per GPU: AlgoPerf's global batch over 4.
BATCHES = {"imagenet_vit": 256, "fastmri": 8, "ogbg": 128}
MINI = "_mini"


class Run:
    """One workload's training on this rank's device."""

    def __init__(self, name: str, device: torch.device, variant: str, **changes: Any) -> None:
        self.workload = load(name)
        self.workload.device = self.device = device
        self.submission = submission_loader.load(ROOT, variant)
        fields = submission_loader.fields(ROOT, variant)
        folder = ROOT / "search_spaces" / ("mini" if self.workload.is_mini else "")
        (point,) = hparams.read_points(folder / f"{variant}.json", 1, fields, self.workload.name)
        self.point = hparams.as_namedtuple({**point, **changes})
        self.frequency = int(changes[hparams.F_KEY])
        self.rng = prng.PRNGKey(1)
        self.model, _ = self.workload.init_model_fn(self.rng)
        if dist.is_initialized():
            ids = [device] if device.type == "cuda" else None
            self.model = DistributedDataParallel(self.model, device_ids=ids)
        self.state = self.submission.init_optimizer_state(
            self.workload, self.model, None, self.point, self.rng
        )
        self.optimizer = self.state["optimizer"]
        rank = dist.get_rank() if dist.is_initialized() else 0
        size = BATCHES.get(name, 8)
        self.batches = [
            self.workload.synthetic_batch(size, prng.fold_in(self.rng, 4 * rank + i))
            for i in range(4)
        ]
        self.steps = 0

    @property
    def params(self) -> list[Tensor]:
        return list(self.model.parameters())

    def step(self) -> None:
        self.submission.update_params(
            self.workload, self.model, None, None, self.point, self.batches[self.steps % 4],
            self.workload.loss_type, self.state, [], self.steps, self.rng,
        )  # fmt: skip
        self.steps += 1

    def timed(self, calls: int, call: Any) -> float:
        """Milliseconds of a call, the slowest rank's."""
        if dist.is_initialized():
            dist.barrier()
        synchronize(self.device)
        start = time.perf_counter()
        for _ in range(calls):
            call()
        synchronize(self.device)
        ms = torch.tensor(1e3 * (time.perf_counter() - start) / calls, device=self.device)
        if dist.is_initialized():
            dist.all_reduce(ms, dist.ReduceOp.MAX)
        return float(ms)


def measure(run: Run, steps: int) -> dict[str, Any]:
    """Both kinds of training steps and of optimizer steps, memory, and whether replicas are one."""
    F = run.frequency
    for _ in range(2 * F):
        run.step()
    whole: dict[str, list[float]] = {"ordinary": [], "due": []}
    while run.steps < steps:
        whole["ordinary"].append(run.timed(F - 1, run.step))
        whole["due"].append(run.timed(1, run.step))
    unequal, parted = run.optimizer.replicas_differ()
    peak = torch.cuda.max_memory_allocated() if run.device.type == "cuda" else 0
    sets = list(run.optimizer.factor_sets())
    kept = sum(x.numel() * x.element_size() for s in sets for x in (s.factors, s.operators))
    return {
        "training_ms": {kind: spread(values) for kind, values in whole.items()},
        "replicas": {"unequal_gradients": unequal, "parameters_differ": parted},
        "factors_and_bases_mib": kept / 2**20,
        "peak_mib": peak / 2**20,
        "shared": any(g.shard.shared for g in run.optimizer._groups),
        "matrices": {str(s.n): len(s.factors) for s in sets},
        "refreshes": sum(sum(s.refreshes) for s in sets),
        "failures": sum(sum(s.failures) for s in sets),
    }


def optimizer_alone(run: Run, periods: int) -> dict[str, Any]:
    """``optimizer.step`` on gradients that stay as they are."""
    F = run.frequency
    found: dict[str, list[float]] = {"ordinary": [], "due": []}
    while run.optimizer._groups[0].layout.everywhere[0].steps[0] % F:
        run.optimizer.step()
    for _ in range(periods):
        found["ordinary"].append(run.timed(F - 1, run.optimizer.step))
        found["due"].append(run.timed(1, run.optimizer.step))
    return {kind: spread(values) for kind, values in found.items()}


def digest(tensors: Iterable[Any]) -> str:
    """Of tensors and numbers, in order."""
    known = hashlib.sha256()
    for x in tensors:
        data = x.detach().cpu().numpy().tobytes() if isinstance(x, Tensor) else str(x).encode()
        known.update(data)
    return known.hexdigest()[:16]


def canonical(optimizer: Any) -> tuple[dict[str, Any], str, float]:
    """The state on rank 0 as a checkpoint has it, its hash, and the seconds of gathering it."""
    start = time.perf_counter()
    optimizer.gather_state(to=0)
    taken = time.perf_counter() - start
    if dist.is_initialized() and dist.get_rank():
        return {}, "", taken
    state = optimizer.state_dict()
    values = (x for entry in state["state"].values() for _, x in sorted(entry.items()))
    return state, digest(values), taken


def after(run: Run, steps: int) -> list[float]:
    """Some training steps; the first parameter's norm after each, to see two runs part."""
    norms = []
    for _ in range(steps):
        run.step()
        norms.append(float(torch.linalg.vector_norm(run.params[0].detach().double())))
    return norms


def one_step(run: Run, gradients: list[Tensor]) -> str:
    """A step on given gradients; hash of the parameters."""
    for p, g in zip(run.params, gradients, strict=True):
        p.grad = g.to(run.device)
    run.optimizer.step()
    return digest(run.params)


def save(run: Run, folder: Path, more: int) -> dict[str, Any]:
    """Write the present state; hashes of it, of one step from it, and of ``more`` after it."""
    state, known, taken = canonical(run.optimizer)
    content = {
        "state": state,
        "params": [p.detach().clone() for p in run.params],
        "gradients": [p.grad.clone() for p in run.params],
        "scheduler": run.state["scheduler"].state_dict(),
        "monitor": run.state["monitor"].state_dict(),
        "steps": run.steps,
    }
    if state:
        folder.mkdir(parents=True, exist_ok=True)
        torch.save(content, folder / f"{run.workload.name}.pt")
    size = sum(x.numel() * x.element_size() for e in state.get("state", {}).values()
               for x in e.values() if isinstance(x, Tensor))  # fmt: skip
    norms = after(run, more)
    return {
        "state": known,
        "gather_s": taken,
        "state_mib": size / 2**20,
        "continued": {"norms": norms, "parameters": digest(run.params)},
    }


def loaded(run: Run, folder: Path, more: int) -> dict[str, Any]:
    """From what :func:`save` wrote: the same hashes, made on these GPUs."""
    content = torch.load(folder / f"{run.workload.name}.pt", map_location="cpu", weights_only=True)
    found: dict[str, Any] = {}

    def start() -> None:
        with torch.no_grad():
            for p, value in zip(run.params, content["params"], strict=True):
                p.copy_(value)
        run.optimizer.load_state_dict(content["state"])
        run.state["scheduler"].load_state_dict(content["scheduler"])
        run.state["monitor"].load_state_dict(content["monitor"])
        run.steps = content["steps"]

    start()
    found["state"] = canonical(run.optimizer)[1]
    found["one_step"] = one_step(run, content["gradients"])
    start()
    norms = after(run, more)
    found["continued"] = {"norms": norms, "parameters": digest(run.params)}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--workloads", default="imagenet_vit,fastmri,ogbg")
    parser.add_argument("--variant", default="eshampoo_fixed")
    parser.add_argument("--sharding", default="off,on")
    parser.add_argument("--frequency", type=int, default=10)
    parser.add_argument("--steps", type=int, default=200, help="of the last of --sharding")
    parser.add_argument("--fewer", type=int, default=60, help="steps of the others")
    parser.add_argument("--more", type=int, default=20, help="steps after a state that is saved")
    parser.add_argument("--save", type=Path)
    parser.add_argument("--load", type=Path)
    parser.add_argument("--deterministic", action="store_true")
    parser.add_argument("--json")
    args = parser.parse_args()
    rank, ranks = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    device = torch.device(args.device)
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")  # AlgoPerf's setting on GPUs
    else:
        torch.set_num_threads(1)
    if args.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    if ranks > 1:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    results: dict[str, Any] = {}
    choices = args.sharding.split(",") if ranks > 1 else ["off"]
    for name in args.workloads.split(","):
        full = name if device.type == "cuda" else name.removesuffix(MINI) + MINI
        results[full] = {}
        for sharding in choices:
            last = sharding == choices[-1]
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats()
            changes = {hparams.F_KEY: args.frequency, "sharding": sharding}
            run = Run(full, device, args.variant, **changes)
            found: dict[str, Any] = {}
            if args.load and last:
                found["loaded"] = loaded(run, args.load, args.more)
            if args.steps:
                found |= measure(run, run.steps + (args.steps if last else args.fewer))
            if args.save and last:
                found["saved"] = save(run, args.save, args.more)
            if args.steps:
                found["optimizer_ms"] = optimizer_alone(run, 5)
            results[full][sharding] = found
            if rank == 0:
                print(ranks, full, sharding, _line(found), flush=True)
            del run
    if rank == 0:
        write(args.json, {"machine": machine(device), "ranks": ranks, "results": results})
    if ranks > 1:
        dist.destroy_process_group()


def _line(found: dict[str, Any]) -> str:
    said = []
    for key in ("training_ms", "optimizer_ms"):
        if key in found:
            parts = [f"{kind} {x['median']:.2f}" for kind, x in found[key].items()]
            said.append(f"{key}: {', '.join(parts)}")
    for key in ("factors_and_bases_mib", "replicas", "matrices", "loaded", "saved"):
        if key in found:
            said.append(f"{key} {found[key]}")
    return "; ".join(said)


if __name__ == "__main__":
    main()
