"""Runs killed at a chosen write, in children forked from a process that has torch loaded.

``python -m tests.faults.kills FOLDER KILLS``: counts the calls that write in a run of the stand-in
workload, then for KILLS of them, spread evenly, kills a run there and runs it to its end.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path

import torch._dynamo  # noqa: F401  before the forks: torch.optim imports it

from tests.faults.disks import Failing, standing_in
from tests.faults.forks import fork
from tests.harness import fakes


def in_a_child(work: Callable[[], None]) -> int:
    """Call it in a forked process; its exit code, negative for a signal."""
    return os.waitstatus_to_exitcode(os.waitpid(fork(work), 0)[1])


def train(folder: Path, stand_in: Failing) -> None:
    """A run whose writes go through ``stand_in``; the number of writes goes to a file beside."""
    with standing_in(stand_in):
        fakes.execute(fakes.spec_in(folder))
    (folder / "writes").write_text(str(stand_in.count))


def main() -> None:
    """Print a line of JSON for each kill: the call, the exit codes, the folder."""
    root, kills = Path(sys.argv[1]), int(sys.argv[2])
    whole = root / "whole"
    whole.mkdir()
    assert in_a_child(lambda: train(whole, Failing(at=-1))) == 0
    writes = int((whole / "writes").read_text())
    for number in range(kills):
        at, folder = number * writes // kills, root / f"kill_{number}"
        folder.mkdir()
        killed = in_a_child(lambda: train(folder, Failing(at, code=None)))  # noqa: B023
        resumed = in_a_child(lambda: train(folder, Failing(at=-1)))  # noqa: B023
        print(json.dumps({"at": at, "of": writes, "killed": killed, "resumed": resumed}))


if __name__ == "__main__":
    main()
