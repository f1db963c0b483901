"""Ranks that share an optimizer's work, killed at chosen points and started again; each is forked
from a process that has torch loaded.

``python -m tests.faults.rank_kills FOLDER KILLS``: two ranks train a small model under DDP on their
own halves of a batch, with checkpoints. Points are the optimizer's writes, what ranks send each
other, and renames of files. For KILLS of them, drawn from one seed, a rank or both are killed
there; then the run goes on, on two ranks, and what the checkpoint holds is loaded on one and three.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
import sys
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch._dynamo  # before the forks: torch.optim imports it
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from algoperf_shampoo.harness import checkpoint
from algoperf_shampoo.optim import sharding
from algoperf_shampoo.optim.journal import Journal
from tests.faults.forks import fork
from tests.optim.support import make

VARIANTS = ("eshampoo_adaptive", "kl_shampoo")
RANKS, STEPS, EVERY = 2, 14, 4
BATCH = 32  # of a rank


class Points:
    """Counts them, and kills the process at one."""

    def __init__(self, at: int) -> None:
        self.at, self.count = at, 0

    def before(self, owner: Any, name: str) -> None:
        """Calls of owner's function are points."""
        function = getattr(owner, name)

        def counted(*arguments: Any, **more: Any) -> Any:
            if self.count == self.at:
                os.kill(os.getpid(), signal.SIGKILL)
            self.count += 1
            return function(*arguments, **more)

        setattr(owner, name, counted)


def together(
    ranks: int, work: Callable[[int, Any], None], folder: Path, all_die: bool = False
) -> list[int]:
    """work(rank, group) in processes of a gloo group; their exit codes, negative for a signal.

    all_die: when one has been killed, the others are killed as well.
    """
    store = folder / "store"
    store.unlink(missing_ok=True)

    def one(rank: int) -> None:
        dist.init_process_group(
            "gloo", init_method=f"file://{store}", rank=rank, world_size=ranks,
            timeout=timedelta(seconds=60),
        )  # fmt: skip
        work(rank, dist.group.WORLD)

    sys.stdout.flush()
    left = {fork(lambda rank=rank: one(rank)): rank for rank in range(ranks)}
    codes = [0] * ranks
    while left:
        number, status = os.wait()
        code = codes[left.pop(number)] = os.waitstatus_to_exitcode(status)
        for other in left if all_die and code == -signal.SIGKILL else ():
            os.kill(other, signal.SIGKILL)
    return codes


def build(variant: str, group: Any) -> tuple[torch.nn.Module, Any]:
    torch.manual_seed(0)
    layers = torch.nn.Linear(20, 24, bias=False), torch.nn.Tanh(), torch.nn.Linear(24, 6)
    model = torch.nn.Sequential(*layers).double()
    settings = {"precondition_frequency": 3, "max_preconditioner_dim": 12}
    params = list(model.parameters())
    return model, make(variant, params, process_group=group, sharding="on", **settings)


def train(folder: Path, variant: str, at: int, rank: int, group: Any) -> None:
    """From the newest checkpoint to the last step; what each rank ends with goes to a file."""
    model, optimizer = build(variant, group)
    saved, _ = checkpoint.load_newest(folder)
    first = 0
    if saved is not None:
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        first = saved["step"]
    replica = DistributedDataParallel(model, process_group=group)
    points = Points(at)
    points.before(Journal, "once")
    for name in ("_all_gather", "_send", "_receive", "_tell_counters"):
        points.before(sharding, name)
    points.before(os, "replace")
    for t in range(first + 1, STEPS + 1):
        generator = torch.Generator().manual_seed(100 * t + rank)
        x, y = torch.randn(2, BATCH, 26, generator=generator, dtype=torch.float64)
        optimizer.zero_grad()
        (replica(x[:, :20]) - y[:, :6]).square().sum().backward()
        optimizer.step()
        if t % EVERY == 0:
            optimizer.gather_state(to=0)
            if rank == 0:
                state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
                checkpoint.save(folder, t, {**state, "step": t})
    optimizer.gather_state()
    end = {"state": digest(optimizer.state_dict()), "points": points.count}
    end["params"] = digest(model.state_dict())
    (folder / f"end_{rank}").write_text(json.dumps(end))


def look(folder: Path, variant: str, ranks: int) -> Callable[[int, Any], None]:
    """The newest checkpoint's state as such ranks have it, and parameters after one step."""

    def work(rank: int, group: Any) -> None:
        model, optimizer = build(variant, group)
        saved, _ = checkpoint.load_newest(folder)
        assert saved is not None
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        optimizer.gather_state()
        found = digest(optimizer.state_dict())
        generator = torch.Generator().manual_seed(7)
        for p in (params := list(model.parameters())):
            p.grad = torch.randn(p.shape, generator=generator, dtype=p.dtype)
        optimizer.step()
        if rank == 0:
            torch.save((found, [p.detach() for p in params]), folder / f"look_{ranks}")

    return work


def digest(value: Any) -> str:
    """sha256 over the bytes of nested tensors and values."""
    total = hashlib.sha256()

    def add(x: Any) -> None:
        if isinstance(x, torch.Tensor):
            total.update(f"{x.dtype} {list(x.shape)}".encode())
            total.update(x.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        elif isinstance(x, dict):
            for key in sorted(x, key=str):
                total.update(f"{key}=".encode())
                add(x[key])
        elif isinstance(x, list | tuple):
            for item in x:
                add(item)
        else:
            total.update(repr(x).encode())

    add(value)
    return total.hexdigest()


def ends(folder: Path) -> list[dict[str, Any]]:
    return [json.loads((folder / f"end_{rank}").read_text()) for rank in range(RANKS)]


def on_other_numbers(folder: Path, variant: str) -> list[dict[str, Any]]:
    """Per number of ranks: whether the state is the file's, and how far one step ends from where
    one on two ranks does, over the step's length."""
    saved, _ = checkpoint.load_newest(folder)
    if saved is None:
        return []
    looks = {}
    for ranks in (RANKS, 1, 3):
        codes = together(ranks, look(folder, variant, ranks), folder)
        assert codes == [0] * ranks, codes
        looks[ranks] = torch.load(folder / f"look_{ranks}", weights_only=False)
    start, wanted = list(saved["model"].values()), looks[RANKS][1]
    found = []
    for ranks in (1, 3):
        state, params = looks[ranks]
        far = max(
            float((a - b).norm() / (b - s).norm())
            for a, b, s in zip(params, wanted, start, strict=True)
        )
        same = state == looks[RANKS][0] == digest(saved["optimizer"])
        found.append({"ranks": ranks, "same_state": same, "distance": far})
    return found


def main() -> None:
    """Print a line of JSON for each kill."""
    torch.set_num_threads(1)
    root, kills = Path(sys.argv[1]), int(sys.argv[2])
    whole = {}
    for variant in VARIANTS:
        folder = root / variant
        folder.mkdir()
        codes = together(RANKS, lambda *who: train(folder, variant, -1, *who), folder)  # noqa: B023
        assert codes == [0] * RANKS, codes
        whole[variant] = ends(folder)
    drawn = random.Random(0)
    for number in range(kills):
        variant, victim = VARIANTS[number % len(VARIANTS)], drawn.randrange(RANKS)
        all_die, of = drawn.random() < 0.5, whole[variant][victim]["points"]
        at = drawn.randrange(of)
        folder = root / f"kill_{number}"
        folder.mkdir()

        def work(rank: int, group: Any) -> None:
            train(folder, variant, at if rank == victim else -1, rank, group)  # noqa: B023

        killed = together(RANKS, work, folder, all_die)
        saved, damaged = checkpoint.load_newest(folder)
        others = on_other_numbers(folder, variant)
        resumed = together(RANKS, lambda *who: train(folder, variant, -1, *who), folder)  # noqa: B023
        same = [
            [a[key] == b[key] for key in ("params", "state")]
            for a, b in zip(ends(folder), whole[variant], strict=True)
        ]
        line = {
            "variant": variant, "victim": victim, "all": all_die, "at": at, "of": of,
            "killed": killed, "from": saved and saved["step"], "damaged": damaged,
            "others": others, "resumed": resumed, "same": same,
        }  # fmt: skip
        print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
