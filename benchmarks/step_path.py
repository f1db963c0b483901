"""Which files one ordinary EShampoo step on a CPU travels: `python benchmarks/step_path.py`.

A call trace of one step between refreshes: every file of optim/ of which any function runs. The
numeric policies (what is done about bad gradients, failed steps and noise) are counted apart from
the step itself.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from algoperf_shampoo import optim

FOLDER = Path(optim.__file__).parent
POLICIES = ("journal.py", "nonfinite.py", "noise.py")


def files_of(call: Callable[[], Any]) -> dict[str, int]:
    """File below optim/ -> how many of its functions were called."""
    functions: dict[str, set[str]] = {}

    def note(frame: FrameType, event: str, argument: Any) -> None:
        path = Path(frame.f_code.co_filename)
        if event == "call" and path.is_relative_to(FOLDER):
            name = path.relative_to(FOLDER).as_posix()
            functions.setdefault(name, set()).add(frame.f_code.co_qualname)

    sys.setprofile(note)
    try:
        call()
    finally:
        sys.setprofile(None)
    return {name: len(found) for name, found in sorted(functions.items())}


def ordinary_step() -> dict[str, int]:
    """Of a model of two matrices and a vector, all of whose bases are there."""
    torch.manual_seed(0)
    params = [torch.nn.Parameter(torch.randn(s)) for s in ((40, 30), (30, 50), (30,))]
    optimizer = optim.EShampoo(params, precondition_frequency=5, max_preconditioner_dim=64)
    found: dict[str, int] = {}
    for t in range(1, 13):
        for p in params:
            p.grad = torch.randn_like(p)
        if t == 12:
            found = files_of(optimizer.step)
        else:
            optimizer.step()
    return found


def lines(name: str) -> int:
    return len((FOLDER / name).read_text(encoding="utf-8").splitlines())


def main() -> None:
    found = ordinary_step()
    step = [name for name in found if name not in POLICIES]
    policies = [name for name in found if name in POLICIES]
    print(f"an ordinary EShampoo step travels {len(step)} files, and {len(policies)} of policies:")
    for name in [*step, *policies]:
        print(f"  {name:20} {found[name]:3} functions, {lines(name):3} lines")


if __name__ == "__main__":
    main()
