"""Fork runs for a launcher on the other end of a socket: ``python scripts/fork.py DESCRIPTOR``."""

from __future__ import annotations

import gc
import importlib
import socket
import sys

import command_line  # noqa: F401  first: it handles signals from here on

# What scripts/submit.py imports for a run of a mini, here and on its way.
_NEEDED = (
    "torch", "numpy", "algoperf_shampoo.harness.runner", "algoperf_shampoo.optim",
    "algoperf_shampoo.study.cost", "algoperf_shampoo.study.launch", "algoperf_shampoo.submission",
    "algoperf_shampoo.study.tables", "algoperf_shampoo.workloads.fastmri",
    "algoperf_shampoo.workloads.imagenet_vit", "algoperf_shampoo.workloads.ogbg",
)  # fmt: skip


def main() -> None:
    """Import what runs need, and serve."""
    from algoperf_shampoo.study import forks

    with socket.socket(fileno=int(sys.argv[1])) as connection:
        for name in _NEEDED:
            importlib.import_module(name)
        gc.collect()
        gc.freeze()  # so that a fork's collections do not touch, and copy, what is shared
        forks.serve(connection)


if __name__ == "__main__":
    main()
