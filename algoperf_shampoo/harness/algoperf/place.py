"""Where a run goes: the number of its processes, and the GPUs that it is shown."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass

from algoperf_shampoo.errors import UserError
from algoperf_shampoo.harness import gpus
from algoperf_shampoo.harness.algoperf import env
from algoperf_shampoo.harness.spec import Plan


@dataclass(frozen=True)
class Place:
    """Where runs go: the number of processes, and the GPUs they are shown (None on a CPU)."""

    processes: int
    visible: str | None


def choose_place(
    plan: Plan,
    processes: int | None,
    environment: env.Environment,
    echo: Callable[[str], None] = print,
) -> Place:
    """Processes of a run, and the GPUs it would be shown if no other run held one.

    A dry run may be of another machine, a cluster's node say, and then takes its GPUs as given.

    Raises:
        UserError: more GPUs asked for than there are, or processes where there are GPUs.
    """
    asked, present = plan.gpus, len(environment.gpus)
    elsewhere = asked is not None or (plan.size == "full" and processes is None)
    if plan.dry_run and elsewhere and (asked or 1) > present:
        count = asked or 1
        found = f"torch {environment.torch} finds {present} GPUs here"
        echo(f"note: {found}: shown for {count}; GPUS= sets another number")
        return Place(count, ",".join(map(str, range(count))))
    if asked is not None and asked > present:
        remedy = "leave GPUS out" + (", PROCESSES= sets the processes on a CPU" * (not present))
        raise UserError(f"GPUS={asked}: torch {environment.torch} finds {present} here; {remedy}")
    if not present:
        return Place(processes or 1, None)
    if processes is not None:
        raise UserError(f"PROCESSES={processes}: for machines without a GPU; use GPUS=")
    # The runner counts every GPU it can see, whatever torchrun starts: show it just these.
    shown = visible_gpus(environment)[: asked or present]
    return Place(len(shown), ",".join(shown))


def visible_gpus(environment: env.Environment) -> list[str]:
    """The GPUs that torch sees, as ``CUDA_VISIBLE_DEVICES`` names them."""
    count = len(environment.gpus)
    return (os.environ.get(gpus.VISIBLE) or ",".join(map(str, range(count)))).split(",")[:count]
