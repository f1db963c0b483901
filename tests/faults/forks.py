"""Work in a forked process."""

import os
from collections.abc import Callable


def fork(work: Callable[[], None]) -> int:
    """Call it in a forked process, whose number is returned."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            work()
            code = 0
        finally:
            os._exit(code)
    return child
