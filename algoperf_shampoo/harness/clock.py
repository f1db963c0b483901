"""The clock that submission time is read from."""

from __future__ import annotations

import time

import torch


def now() -> float:
    """Seconds, once the GPU is done with what it was given; never set back, as times of day are."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()
