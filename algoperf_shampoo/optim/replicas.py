"""A process group that stands in an optimizer's copies and pickles."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.distributed as dist


class Replicas:
    """Holds a process group: a copy has the same, a pickle of the group of all processes becomes
    that of the processes which load it (None where there is none).

    Raises:
        TypeError: pickling any other group.
    """

    def __init__(self, group: dist.ProcessGroup | None) -> None:
        self.group = group

    def __deepcopy__(self, memo: dict[int, Any]) -> Replicas:
        return self

    def __reduce__(self) -> tuple[Callable[[bool], Replicas], tuple[bool]]:
        if self.group is not None and self.group is not dist.group.WORLD:
            raise TypeError("an optimizer with a process_group other than WORLD cannot be pickled")
        return _unpickled, (self.group is not None,)


def _unpickled(together: bool) -> Replicas:
    there = dist.is_available() and dist.is_initialized()
    return Replicas(dist.group.WORLD if together and there else None)
