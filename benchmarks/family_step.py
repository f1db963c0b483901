"""Time and memory of one step of every variant, and of SOAP's and KL-Shampoo's authors' code.

    PYTHONPATH=.:benchmarks python benchmarks/family_step.py --soap DIR --kl DIR \
        --emerging DIR --heavyball --json out.json

All contenders get the same tensors: a workload's parameters, merged and cut as ours are (into
blocks of at most --max-dim), every block a tensor of its own; the same gradients
(benchmarks/gradients.py), one step each in turn; and the same treatment of vectors, which go by
Adam (ours with one_dim="adam", the authors' by torch's fused AdamW beside). Checkouts:
nikhilvyas/SOAP, which computes in float32, and yorkerlin/KL-Methods, which computes in bfloat16
unless it is told not to, and is run in float32 as well; what it marks for torch.compile is
compiled, unless TORCHDYNAMO_DISABLE=1. Two libraries besides: HeavyBall (the installed package,
compiled only with --heavyball-compiled) and NVIDIA-NeMo/Emerging-Optimizers' KlSoapV3, which
refreshes at every step. Every F-th step refreshes; those are timed apart. Every step is timed from
an idle device to an idle device.

Per variant also: entries of the state by kind, MiB that it holds after its steps (without
parameters and gradients), and the most that a later step takes besides for a while. --entries
counts those of the state, and all that is allocated between steps, and makes no step.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import io
import math
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from gradients import TurningGradients
from measure import machine, seconds, spread, table, write
from optimizer_step import parameters
from peers import BLOCKS, POINT
from torch import Tensor

from algoperf_shampoo.optim import (
    KLSOAP,
    SOAP,
    EShampoo,
    KLShampoo,
    PreconditionedOptimizer,
    Shampoo,
    Shampoo2Trace,
    ShampooAdaptive,
)
from algoperf_shampoo.optim.blocks.partition import cut

Params = list[torch.nn.Parameter]


class Contender(NamedTuple):
    """How it is built for (parameters, F); ``starts``: its first step only starts, t stays 0;
    ``products``: which floor is its own; ``schedule``: it refreshes about every F steps, when its
    sum of 1/F says so, and a step that calls torch's QR is one."""

    build: Callable[[Params, int], Any]
    starts: bool = False
    products: str = "eshampoo"
    schedule: bool = False


class Beside:
    """An optimizer of tensors of order 2 and more, and torch's fused AdamW of the others."""

    def __init__(self, params: Params, build: Callable[[Params], Any]) -> None:
        self._parts = [build([p for p in params if p.ndim > 1])]
        if vectors := [p for p in params if p.ndim == 1]:
            fused = vectors[0].is_cuda or None
            self._parts.append(torch.optim.AdamW(vectors, **POINT, fused=fused))

    def step(self) -> None:
        for part in self._parts:
            part.step()


def blocks_of(workload: str, max_dim: int, device: torch.device) -> Params:
    """The parameters' blocks, each a tensor."""
    found = []
    for p in parameters(workload, device):
        for block in cut(tuple(p.shape), max_dim, "matrix"):
            piece = p.detach().reshape(block.merged)[block.slices]
            found.append(torch.nn.Parameter(piece.clone(memory_format=torch.contiguous_format)))
    return found


def ours(cls: Any, **more: Any) -> Callable[[Params, int], Any]:
    def build(params: Params, F: int) -> Any:
        fixed = dict(POINT, one_dim="adam", small_matrices="matrix", **BLOCKS)
        return cls(params, precondition_frequency=F, **{**fixed, **more})

    return build


def contenders(soap: str | None, kl: str | None, others: Others) -> dict[str, Contender]:
    high = {"matmul_precision": "high"}
    found = {
        "EShampoo": Contender(ours(EShampoo)),
        "EShampoo, 11 bits": Contender(ours(EShampoo, **high)),
        "EShampoo, QR": Contender(ours(EShampoo, tau=0.1, eigensolver="qr")),
        "Shampoo, grafting": Contender(ours(Shampoo)),
        "Shampoo": Contender(ours(Shampoo, grafting=None)),
        "Shampoo2, trace": Contender(ours(Shampoo2Trace)),
        "Shampoo, adaptive": Contender(ours(ShampooAdaptive, tau=0.1)),
        "SOAP": Contender(ours(SOAP), True),
        "SOAP, 11 bits": Contender(ours(SOAP, **high), True),
        "KL-Shampoo": Contender(ours(KLShampoo), True, "kl"),
        "KL-Shampoo, 11 bits": Contender(ours(KLShampoo, **high), True, "kl"),
        "KL-SOAP": Contender(ours(KLSOAP), True, "kl"),
        "KL-SOAP, 11 bits": Contender(ours(KLSOAP, **high), True, "kl"),
        "KL-Shampoo, vectors too": Contender(ours(KLShampoo, one_dim="full"), True, "kl"),
        "torch AdamW, fused": Contender(
            lambda p, F: torch.optim.AdamW(p, **POINT, fused=p[0].is_cuda or None), products=""
        ),
    }
    if soap:
        sys.path.insert(0, soap)
        module = importlib.import_module("soap")
        found["authors' SOAP, float32"] = Contender(
            lambda params, F: Beside(
                params, lambda p: module.SOAP(p, **POINT, precondition_frequency=F)
            ),
            True,
        )
    if kl:
        sys.path.insert(0, kl)
        kl_opt = importlib.import_module("optim.kl_opt")
        for dtype in (torch.float32, torch.bfloat16):
            for name, using in (("KL-Shampoo", False), ("KL-SOAP", True)):
                found[f"authors' {name}, {str(dtype).removeprefix('torch.')}"] = Contender(
                    _authors_kl(kl_opt.KLOpt, dtype, using), True, "kl"
                )
    if others.emerging:
        sys.path.insert(0, others.emerging)
        cls = importlib.import_module("emerging_optimizers.shampoo.soap_v3").KlSoapV3
        found["Emerging-Optimizers KlSoapV3"] = Contender(_beside(cls), True, "kl")
    if others.heavyball:
        heavyball, utils = (importlib.import_module(m) for m in ("heavyball", "heavyball.utils"))
        if not others.compiled:
            utils.compile_mode = None
        fixed = {"merge_dims": False, "use_precond_schedule": False}
        for name in ("SOAP", "KLShampoo", "KLSOAP"):
            build = _beside(getattr(heavyball, name), "precondition_frequency", **fixed)
            products = "kl" if "KL" in name else "eshampoo"
            found[f"HeavyBall {name}"] = Contender(build, True, products, schedule=True)
    return found


class Others(NamedTuple):
    """Libraries to take besides the authors' code."""

    emerging: str | None = None
    heavyball: bool = False
    compiled: bool = False


def _beside(cls: Any, frequency: str = "", **settings: Any) -> Callable[[Params, int], Any]:
    """frequency: how it calls F, if it has one."""
    given = {**POINT, "shampoo_beta": POINT["betas"][1], **settings}

    def build(params: Params, F: int) -> Any:
        more = {frequency: F} if frequency else {}
        return Beside(params, lambda p: cls(p, **given, **more))

    return build


def _authors_kl(cls: Any, dtype: torch.dtype, klsoap: bool) -> Callable[[Params, int], Any]:
    def build(params: Params, F: int) -> Any:
        settings = dict(POINT, precondition_frequency=F, cast_dtype=dtype, using_klsoap=klsoap)
        with contextlib.redirect_stdout(io.StringIO()):
            return Beside(params, lambda p: cls(p, **settings))

    return build


def floor(params: Params, products: str) -> dict[str, float]:
    """Operations and bytes that a step cannot do without.

    Operations: 2 d numel for each product with a mode's d x d matrix and for each Gram product.
    EShampoo and SOAP: all modes once there, once back, and a Gram matrix each. KL-Shampoo besides:
    each mode's Gram matrix is of G in the bases of all other modes; one of those is on the way to G
    in all bases. Bytes: gradient and parameter read, M and D (KL-Shampoo: M alone) read, all but
    the gradient written; factors read and written, bases read.
    """
    flop = byte = 0.0
    for p in params:
        if p.ndim == 1 or not products:
            byte += 4 * 7 * p.numel()
            continue
        modes = sum(2 * d * p.numel() for d in p.shape)
        flop += 3 * modes
        if products == "kl":
            flop += (p.ndim - 1) * modes - (modes - 2 * p.shape[-1] * p.numel())
        byte += 4 * (7 * p.numel() + 3 * sum(d * d for d in p.shape))
    return {"gflop": flop / 1e9, "mbyte": byte / 1e6}


def state_of(optimizer: Any) -> dict[str, int]:
    """Entries of the state by kind: names as in the state dict, without numbers."""
    found: dict[str, int] = {}
    if isinstance(optimizer, PreconditionedOptimizer):
        for entry in optimizer.state.values():
            for name, x in entry.items():
                if isinstance(x, Tensor) and x.ndim:
                    kind = name.split(".")[-1].rstrip("0123456789").rstrip("_")
                    found[kind] = found.get(kind, 0) + x.numel()
    return found


def allocated_entries(optimizer: PreconditionedOptimizer) -> int:
    """Entries of float32 that are kept between steps: state, buffers for gradients and for work."""
    total = sum(s.factors.numel() + s.operators.numel() for s in optimizer.factor_sets())
    for group in optimizer._groups:
        total += sum(x.memory.numel() for x in group.layout.borrowed)
        vectors = [v for s in group.layout.stacks for mine in s.vectors.values() for v in mine]
        total += sum(v.numel() for v in vectors)
    return total


def entries(workload: str, table_of: dict[str, Contender], args: Any) -> dict[str, Any]:
    """Entries of ours alone, one variant after the other."""
    params = blocks_of(workload, args.max_dim, torch.device(args.device))
    found = {}
    for name, c in table_of.items():
        optimizer = c.build(params, args.frequency)
        if isinstance(optimizer, PreconditionedOptimizer):
            state, kept = state_of(optimizer), allocated_entries(optimizer)
            found[name] = {"state_entries": state, "allocated_entries": kept}
            print(f"{workload} {name}: {kept} allocated, state {state}", flush=True)
        del optimizer
    by_formula = formula(params)
    print(workload, by_formula)
    return {"workload": workload, "entries_by_formula": by_formula, "contenders": found}


def formula(params: Params) -> dict[str, int]:
    """Entries by formula of the tensors that are no vectors: d1 d2 (and those of them of order 3 or
    more), d1 + d2, d1^2 + d2^2; and of vectors."""
    matrices = [p for p in params if p.ndim > 1]
    return {
        "d1 d2": sum(p.numel() for p in matrices),
        "d1 + d2": sum(sum(p.shape) for p in matrices),
        "d1^2 + d2^2": sum(sum(d * d for d in p.shape) for p in matrices),
        "of order 3": sum(p.numel() for p in matrices if p.ndim > 2),
        "vectors": sum(p.numel() for p in params if p.ndim == 1),
    }


@dataclass
class Figures:
    """What is measured of one contender."""

    ordinary: list[float] = field(default_factory=list)
    refreshing: list[float] = field(default_factory=list)
    first_ms: float = 0.0
    held: float = 0.0
    besides: float = 0.0

    def step(self, optimizer: Any, device: torch.device, t: int, F: int, schedule: bool) -> None:
        """One step, number t, measured."""
        before = allocated(device)
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        with counted_qr() as calls:
            ms = 1e3 * seconds(optimizer.step, device)
        after = allocated(device)
        self.held += after - before
        if t <= F + 3:  # first calls: loading, compiling, recording
            self.first_ms += ms
            return
        if device.type == "cuda":
            self.besides = max(self.besides, torch.cuda.max_memory_allocated() / 2**20 - after)
        if not (calls if schedule else t % F == 0):
            self.ordinary.append(ms)
        elif t > 2 * F:  # before that a check runs directly, then is recorded
            self.refreshing.append(ms)


@contextlib.contextmanager
def counted_qr() -> Iterator[list[None]]:
    """An entry for every call of torch.linalg.qr within."""
    original, calls = torch.linalg.qr, []

    def qr(*args: Any, **kwargs: Any) -> Any:
        calls.append(None)
        return original(*args, **kwargs)

    torch.linalg.qr = qr
    try:
        yield calls
    finally:
        torch.linalg.qr = original


def allocated(device: torch.device) -> float:
    """MiB."""
    return torch.cuda.memory_allocated(device) / 2**20 if device.type == "cuda" else 0.0


def measured(
    workload: str,
    table_of: dict[str, Contender],
    args: Any,
    so_far: Callable[[dict[str, Any]], None],
) -> dict[str, Any]:
    """so_far: is given the entry as it stands after every round."""
    device, F = torch.device(args.device), args.frequency
    params = blocks_of(workload, args.max_dim, device)
    replicas = {n: [torch.nn.Parameter(p.detach().clone()) for p in params] for n in table_of}
    figures = {n: Figures() for n in table_of}
    optimizers = {}
    for name, c in table_of.items():
        before = allocated(device)
        optimizers[name] = c.build(replicas[name], F)
        figures[name].held += allocated(device) - before
    gradients = TurningGradients(list(params))

    def entry() -> dict[str, Any]:
        return {
            "workload": workload,
            "tensors": len(params),
            "parameters": sum(p.numel() for p in params),
            "entries_by_formula": formula(params),
            "contenders": {
                n: {
                    "ordinary_ms": spread(figures[n].ordinary),
                    "refresh_ms": spread(figures[n].refreshing),
                    "first_steps_ms": figures[n].first_ms,
                    "held_mib": figures[n].held,
                    "besides_mib": figures[n].besides,
                    "state_entries": state_of(optimizers[n]),
                    "floor": floor(params, c.products),
                    "finite": all(bool(p.isfinite().all()) for p in replicas[n]),
                }
                for n, c in table_of.items()
            },
        }

    for i in range(1, (args.rounds + 2) * F + 2):
        drawn = gradients.draw()
        for name, c in table_of.items():
            for p, g in zip(replicas[name], drawn, strict=True):
                p.grad = g
            figures[name].step(optimizers[name], device, i - c.starts, F, c.schedule)
        if i > 3 * F and i % F == 1:
            so_far(entry())
    return entry()


def printed(entry: dict[str, Any]) -> None:
    rows = []
    n = entry["contenders"]
    base = n.get("EShampoo", {}).get("ordinary_ms", {}).get("median", math.nan)
    for name, one in n.items():
        o, r, f = one["ordinary_ms"], one["refresh_ms"], one["floor"]
        rows.append(
            [
                name,
                f"{o['median']:.2f} ({o['min']:.2f}-{o['max']:.2f})",
                f"{o['median'] / base:.2f}",
                f"{r['median']:.1f} ({r['min']:.1f}-{r['max']:.1f})",
                f"{f['gflop']:.0f} GFLOP, {f['mbyte']:.0f} MB",
                f"{one['held_mib']:.0f} + {one['besides_mib']:.0f}",
            ]
        )
    counts = next(iter(n.values()))["ordinary_ms"]["n"]
    print(f"\n{entry['workload']}: {entry['tensors']} tensors, n = {counts}")
    header = ["optimizer", "ordinary step, ms", "/ EShampoo's", "refresh step, ms"]
    print(table([*header, "floor", "MiB held + besides"], rows), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--workloads", default="imagenet_vit", help="separated by commas")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--frequency", type=int, default=10, help="F: every F-th step refreshes")
    parser.add_argument("--rounds", type=int, default=4, help="refreshes timed, after two")
    parser.add_argument("--max-dim", type=int, default=1024, help="largest dimension of a block")
    parser.add_argument("--entries", action="store_true", help="count entries, make no step")
    parser.add_argument("--soap", help="checkout of nikhilvyas/SOAP")
    parser.add_argument("--kl", help="checkout of yorkerlin/KL-Methods")
    parser.add_argument("--emerging", help="checkout of NVIDIA-NeMo/Emerging-Optimizers")
    parser.add_argument("--heavyball", action="store_true", help="which is installed")
    parser.add_argument("--heavyball-compiled", action="store_true", help="as it is by default")
    parser.add_argument("--only", help="names of contenders, separated by ;")
    parser.add_argument("--json", help="where to write the record")
    args = parser.parse_args()
    BLOCKS["max_preconditioner_dim"] = args.max_dim
    compiled = args.heavyball_compiled
    others = Others(args.emerging, args.heavyball or compiled, compiled)
    found = contenders(args.soap, args.kl, others)
    if args.only:
        found = {name: found[name] for name in args.only.split(";")}
    whole: dict[str, Any] = {
        "machine": machine(torch.device(args.device)),
        "frequency": args.frequency,
        "max_dim": args.max_dim,
        "authors_compiled": os.environ.get("TORCHDYNAMO_DISABLE") != "1",
        "heavyball_compiled": compiled,
    }
    if args.entries:
        del whole["authors_compiled"], whole["heavyball_compiled"]
        workloads = [entries(name, found, args) for name in args.workloads.split(",")]
        return write(args.json, {**whole, "workloads": workloads})
    done: list[dict[str, Any]] = []
    for workload in args.workloads.split(","):

        def keep(entry: dict[str, Any]) -> None:
            write(args.json, {**whole, "workloads": [*done, entry]})

        entry = measured(workload, found, args, keep)
        keep(entry)
        done.append(entry)
        printed(entry)


if __name__ == "__main__":
    main()
