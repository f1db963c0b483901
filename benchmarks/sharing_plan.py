"""What ranks that share an optimizer's work hold and take, by shapes: a plan, nothing is measured.

    python benchmarks/sharing_plan.py --workloads imagenet_vit,finewebedu_lm --ranks 1,2,4,8,64

Blocks go to ranks as the optimizer gives them out. Memory is the fullest rank's. A refresh is the
time that the batch plan of the rank with most expects (cuSOLVER on an H100, docs/performance.md);
sending is the bytes of all directions that a GPU receives over NVLink within a host of eight, and
beyond that over its own network card.
"""

from __future__ import annotations

import argparse
import math
from typing import Any

from measure import table, write

from algoperf_shampoo.optim import sharding
from algoperf_shampoo.optim.blocks.layout import Member
from algoperf_shampoo.optim.blocks.partition import cut
from algoperf_shampoo.optim.eigen.batch_plan import Room, Task, schedule
from algoperf_shampoo.study import memory

# Bytes per millisecond: all-gather between GPUs of one host (355 GB/s of bus bandwidth were seen in
# an all-reduce on four H100), and a 400 Gbit/s card.
NVLINK, NETWORK, HOST = 3.0e8, 4.5e7, 8
WORKSPACE = 17  # of cuSOLVER, in bytes per entry of a matrix: 16.6 MiB for one of 1024


def blocks_of(workload: str, max_dim: int) -> list[Member]:
    found: list[Member] = []
    number = 0
    for shape, count in memory.shapes(workload):
        for _ in range(count):
            found += [Member(number, i, b) for i, b in enumerate(cut(shape, max_dim))]
            number += 1
    return found


def has_factors(shape: tuple[int, ...]) -> bool:
    return shape != (1,)


def refresh_ms(blocks: list[Member], everywhere: int, elsewhere: int) -> float:
    """Expected of one rank: its blocks; to work in, all gradients and as much as others keep."""
    counts: dict[int, int] = {}
    for m in blocks:
        for n in m.block.shape if has_factors(m.block.shape) else ():
            counts[n] = counts.get(n, 0) + 1
    if not counts:
        return 0.0
    tasks = tuple(Task(n, c, WORKSPACE * n * n) for n, c in counts.items())
    idle = tuple(4 * c * n * n for n, c in counts.items())
    own = sum(m.block.numel for m in blocks)
    free = 4 * (everywhere + own)
    room = Room(free + min(8 * own, 2**29), free)
    workspace = (8 << 20) + min(elsewhere, sharding.ROOM_MIB << 20)
    found = schedule(tasks, idle, (room,), workspace)
    return sum(plan.milliseconds for plan in found.phases)


def plan(workload: str, ranks: int, max_dim: int) -> dict[str, Any]:
    members = blocks_of(workload, max_dim)
    entries = sum(m.block.numel for m in members)
    owner = sharding.owners(members, has_factors, ranks)
    by_rank: list[list[Member]] = [[] for _ in range(ranks)]
    for rank, m in zip(owner, members, strict=True):
        by_rank[rank].append(m)
    kept = [
        8 * sum(n * n for m in mine if has_factors(m.block.shape) for n in m.block.shape)
        for mine in by_rank
    ]
    longest = max(sum(m.block.numel for m in mine) for mine in by_rank)
    sent = 4 * longest * (ranks - 1)
    within = min(ranks, HOST)
    hosts = math.ceil(ranks / HOST)
    # Ring within a host; between hosts every card brings its share of what the others have.
    sending = sent / NVLINK if ranks > 1 else 0.0
    if hosts > 1:
        sending += 4 * longest * ranks * (hosts - 1) / hosts / within / NETWORK
    total = sum(kept)
    slowest = max(
        refresh_ms(mine, longest * ranks, total - k)
        for mine, k in sorted(zip(by_rank, kept, strict=True), key=lambda x: -x[1])[:2]
    )
    return {
        "workload": workload,
        "ranks": ranks,
        "blocks": len(members),
        "parameters": entries,
        "factors_and_bases_gib": max(kept) / 2**30,
        "moments_and_buffers_gib": 4 * (longest * ranks + 3 * longest) / 2**30,
        "refresh_ms": slowest,
        "sending_ms": sending,
        "pays_at_F_100": sharding.pays([(m.block.shape, True) for m in members], 100, ranks)
        if ranks > 1
        else None,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--workloads", default="imagenet_vit,finewebedu_lm,criteo1tb")
    parser.add_argument("--ranks", default="1,2,4,8,64")
    parser.add_argument("--max-dim", type=int, default=1024)
    parser.add_argument("--json")
    args = parser.parse_args()
    found = [
        plan(workload, int(ranks), args.max_dim)
        for workload in args.workloads.split(",")
        for ranks in args.ranks.split(",")
    ]
    header = ["workload", "GPUs", "factors + bases, GiB", "moments + buffers, GiB",
              "refresh, ms", "sending, ms a step"]  # fmt: skip
    rows = [
        [
            r["workload"],
            str(r["ranks"]),
            f"{r['factors_and_bases_gib']:.2f}",
            f"{r['moments_and_buffers_gib']:.2f}",
            f"{r['refresh_ms']:.0f}",
            f"{r['sending_ms']:.2f}",
        ]
        for r in found
    ]
    print(table(header, rows))
    write(args.json, {"plan": found})


if __name__ == "__main__":
    main()
