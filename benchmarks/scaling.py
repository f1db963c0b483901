"""How an optimizer step's cost grows with the width of tensors, and with their number.

    python benchmarks/scaling.py --meta DIR --soap DIR --json out.json

Width: --count square tensors of each of --widths (from 33 on: smaller ones are merged to vectors).
Number: each of --counts of --width. Ordinary steps and refreshing ones apart, all contenders on the
same gradients. The floor is the arithmetic of an ordinary EShampoo step, see optimizer_step.py.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from gradients import TurningGradients
from measure import machine, seconds, spread, table, write
from optimizer_step import floor
from peers import Build, contenders

DEFAULT = "ours, fp32;ours, 11-bit rotations;ours, fp32, warm;torch AdamW;public EShampoo;SOAP"


def case(
    width: int, count: int, table_of: dict[str, Build], F: int, rounds: int, device: torch.device
) -> dict[str, Any]:
    """``count`` tensors of width x width."""
    replicas = {
        name: [torch.nn.Parameter(torch.zeros(width, width, device=device)) for _ in range(count)]
        for name in table_of
    }
    optimizers = {name: build(replicas[name], F) for name, build in table_of.items()}
    first = next(iter(replicas.values()))
    gradients = TurningGradients(list(first))
    ordinary: dict[str, list[float]] = {name: [] for name in table_of}
    refreshing: dict[str, list[float]] = {name: [] for name in table_of}
    for t in range(1, (rounds + 1) * F + F // 2):
        drawn = gradients.draw()
        for name, optimizer in optimizers.items():
            for p, g in zip(replicas[name], drawn, strict=True):
                p.grad = g
            ms = 1e3 * seconds(optimizer.step, device)
            if t >= F + 3:  # first calls load, compile and record
                (ordinary if t % F else refreshing)[name].append(ms)
    return {
        "width": width,
        "count": count,
        "floor": floor(first),
        "contenders": {
            name: {"ordinary_ms": spread(ordinary[name]), "refresh_ms": spread(refreshing[name])}
            for name in table_of
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--widths", default="64,128,256,512,1024")
    parser.add_argument("--count", type=int, default=12)
    parser.add_argument("--counts", default="1,4,16,64,256")
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--frequency", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=3, help="refreshes timed")
    parser.add_argument("--meta", help="checkout of facebookresearch/optimizers")
    parser.add_argument("--soap", help="checkout of nikhilvyas/SOAP")
    parser.add_argument("--only", default=DEFAULT, help="names of contenders, separated by ;")
    parser.add_argument("--json", help="where to write the record")
    args = parser.parse_args()
    device = torch.device(args.device)
    known = contenders(args.meta, args.soap)
    table_of = {name: known[name] for name in args.only.split(";") if name in known}
    sizes = [(int(w), args.count) for w in args.widths.split(",")]
    sizes += [(args.width, int(c)) for c in args.counts.split(",")]
    cases = [case(w, c, table_of, args.frequency, args.rounds, device) for w, c in sizes]
    rows = []
    for c in cases:
        for name, entry in c["contenders"].items():
            o, r = entry["ordinary_ms"], entry["refresh_ms"]
            rows.append(
                [
                    str(c["width"]),
                    str(c["count"]),
                    name,
                    f"{o['median']:.2f} ({o['min']:.2f}-{o['max']:.2f})",
                    f"{r['median']:.1f} ({r['min']:.1f}-{r['max']:.1f})",
                    f"{c['floor']['gflop']:.1f}",
                ]
            )
    print(machine(device)["device"])
    header = ["width", "tensors", "optimizer", "ordinary, ms", "refresh, ms", "floor, GFLOP"]
    print(table(header, rows))
    write(args.json, {"machine": machine(device), "frequency": args.frequency, "cases": cases})


if __name__ == "__main__":
    main()
