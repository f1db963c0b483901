"""Our GPU kernels, where they can run.

They need Triton, which torch's Linux CUDA wheels bring along; without it, or on other devices, the
same arithmetic runs as torch operations.
"""

from __future__ import annotations

import functools
import logging
from types import ModuleType

import torch

log = logging.getLogger(__name__)


@functools.cache
def triton_kernels() -> ModuleType | None:
    """:mod:`.kernels`, or None where Triton is missing. Compiled at their first launch."""
    try:
        from . import kernels
    except ImportError:
        if torch.cuda.is_available():
            log.warning("no Triton: steps go by torch's operations, several times slower")
        return None
    return kernels


@functools.cache
def triton_mode_kernels() -> ModuleType | None:
    """:mod:`.mode_kernels`, likewise."""
    if triton_kernels() is None:
        return None
    from . import mode_kernels

    return mode_kernels


def multiplies(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether our kernels compute products there: float32, tensor cores for float16."""
    return (
        device.type == "cuda"
        and dtype == torch.float32
        and torch.version.hip is None
        and torch.cuda.get_device_capability(device) >= (8, 0)
        and triton_kernels() is not None
    )
