"""How precisely our matrix products are computed, without leaving a global flag changed."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

# A setting of `matmul_precision`, and what it means for a float32 product on a GPU. CPUs compute
# float32 in full precision under every setting.
MATMUL_PRECISIONS = {
    "highest": "ieee",  # full float32
    "high": "tf32",  # inputs rounded to 10 bits of mantissa, relative error about 3e-4
}


@contextlib.contextmanager
def matmul_precision(setting: str) -> Iterator[None]:
    """Compute float32 matrix products inside the block at ``setting`` of MATMUL_PRECISIONS.

    torch's own switch is global; it is put back on exit, also after an error. torch >= 2.9 has one
    switch per back end (`fp32_precision`), earlier versions `allow_tf32`; mixing the two raises
    there, so the newer is used where it exists.
    """
    wanted = MATMUL_PRECISIONS[setting]
    if not torch.cuda.is_available():
        # The CPU has one switch too (mkldnn may use bfloat16 under "medium"); same treatment.
        backend = torch.backends.mkldnn.matmul if hasattr(torch.backends.mkldnn, "matmul") else None
        wanted = "ieee"
    else:
        backend = torch.backends.cuda.matmul
    if backend is None:
        yield
    elif hasattr(backend, "fp32_precision"):
        before = backend.fp32_precision
        if before == wanted:
            yield
            return
        backend.fp32_precision = wanted
        try:
            yield
        finally:
            backend.fp32_precision = before
    else:
        legacy = torch.backends.cuda.matmul
        allowed = legacy.allow_tf32
        legacy.allow_tf32 = wanted == "tf32"
        try:
            yield
        finally:
            legacy.allow_tf32 = allowed
