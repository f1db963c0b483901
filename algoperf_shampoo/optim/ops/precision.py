"""How precisely our matrix products are computed, without leaving a global flag changed."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import torch

# A setting of `matmul_precision`, and what it means for a float32 product on a GPU. CPUs compute
# float32 in full precision under every setting.
MATMUL_PRECISIONS = {
    "highest": "ieee",  # full float32
    "high": "tf32",  # inputs rounded to 10 bits of mantissa, relative error about 3e-4
}


@functools.cache
def _switch() -> tuple[Any, str, dict[str, Any]] | None:
    """(object, attribute, its value per setting) of torch's switch; None where there is none."""
    newer: dict[str, Any] = dict(MATMUL_PRECISIONS)
    if not torch.cuda.is_available():
        # The CPU has a switch too (mkldnn may use bfloat16 under "medium"); always full precision.
        backend = getattr(torch.backends.mkldnn, "matmul", None)
        if not hasattr(backend, "fp32_precision"):
            return None
        return backend, "fp32_precision", dict.fromkeys(newer, "ieee")
    backend = torch.backends.cuda.matmul
    if hasattr(backend, "fp32_precision"):
        return backend, "fp32_precision", newer
    return backend, "allow_tf32", {name: value == "tf32" for name, value in newer.items()}


@contextlib.contextmanager
def matmul_precision(setting: str) -> Iterator[None]:
    """Compute float32 matrix products inside the block at ``setting`` of MATMUL_PRECISIONS.

    torch's own switch is global; it is put back on exit, also after an error. torch >= 2.9 has one
    switch per back end (`fp32_precision`), earlier versions `allow_tf32`; mixing the two raises
    there, so the newer is used where it exists.
    """
    switch = _switch()
    if switch is None:
        yield
        return
    backend, attribute, values = switch
    before = getattr(backend, attribute)
    if before == values[setting]:
        yield
        return
    setattr(backend, attribute, values[setting])
    try:
        yield
    finally:
        setattr(backend, attribute, before)
