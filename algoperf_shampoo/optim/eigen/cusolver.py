"""cuSOLVER's batched symmetric eigensolver (cusolverDnXsyevBatched), the fast one on a GPU.

torch.linalg.eigh loops over the matrices of a batch on CUDA up to torch 2.11 at least: 7.5 ms for a
256 x 256 matrix against 0.09 ms in a batch. The library is the one torch itself has loaded;
cuSOLVER has the routine since CUDA 12.6 Update 2.
"""

from __future__ import annotations

import ctypes
import functools
import logging
from pathlib import Path

import torch
from torch import Tensor

log = logging.getLogger(__name__)

_REAL = {torch.float32: 0, torch.float64: 1}  # CUDA_R_32F, CUDA_R_64F
_VECTORS, _LOWER = 1, 0  # CUSOLVER_EIG_MODE_VECTOR, CUBLAS_FILL_MODE_LOWER


@functools.cache
def _library() -> ctypes.CDLL | None:
    if not torch.cuda.is_available() or torch.version.hip is not None:
        return None
    major = int((torch.version.cuda or "0").split(".")[0])
    name = f"libcusolver.so.{major - 1}"  # .so.11 in CUDA 12, .so.12 in CUDA 13
    # torch's own solver call makes sure that the library is loaded.
    torch.linalg.eigh(torch.eye(2, device="cuda"))
    candidates = [name]
    for site in Path(torch.__file__).parents[1:2]:
        candidates += map(str, sorted(site.glob(f"nvidia/*/lib/{name}")))
    for candidate in candidates:
        try:
            library = ctypes.CDLL(candidate)
        except OSError:
            continue
        if hasattr(library, "cusolverDnXsyevBatched"):
            return library
    log.info("%s has no XsyevBatched; eigendecompositions by torch.linalg.eigh", name)
    return None


def available() -> bool:
    """Whether the routine is there."""
    return _library() is not None


@functools.cache
def _handle(device: int, stream: int) -> tuple[ctypes.c_void_p, ctypes.c_void_p]:
    """(cusolverDnHandle_t, cusolverDnParams_t), kept for the life of the process.

    One per stream: work on two streams must not share a handle.
    """
    library = _library()
    assert library is not None
    handle, params = ctypes.c_void_p(), ctypes.c_void_p()
    with torch.cuda.device(device):
        _check(library.cusolverDnCreate(ctypes.byref(handle)), "Create")
        _check(library.cusolverDnCreateParams(ctypes.byref(params)), "CreateParams")
        _check(library.cusolverDnSetStream(handle, ctypes.c_void_p(stream)), "SetStream")
    return handle, params


def _check(status: int, what: str) -> None:
    if status != 0:
        raise RuntimeError(f"cusolverDn{what} returned status {status}")


def _problem(a: Tensor, values: Tensor) -> tuple[object, ...]:
    """The arguments that XsyevBatched and its workspace query share."""
    n = a.shape[-1]
    kind = ctypes.c_int(_REAL[a.dtype])
    stream = torch.cuda.current_stream(a.device).cuda_stream
    handle, params = _handle(a.device.index, stream)
    pointer, size = ctypes.c_void_p, ctypes.c_int64
    matrix, spectrum = pointer(a.data_ptr()), pointer(values.data_ptr())
    mode, triangle = ctypes.c_int(_VECTORS), ctypes.c_int(_LOWER)
    return handle, params, mode, triangle, size(n), kind, matrix, size(n), kind, spectrum, kind


@functools.cache
def workspace_bytes(n: int, dtype: torch.dtype, device: torch.device, count: int) -> int:
    """Device memory that :func:`eigh_` needs for ``count`` matrices of size n."""
    library = _library()
    assert library is not None
    # Its address is all that is asked for; a whole matrix would count towards the peak.
    dummy = torch.empty(1, dtype=dtype, device=device).expand(1, n, n)
    on_device, on_host = ctypes.c_size_t(), ctypes.c_size_t()
    with torch.cuda.device(device):
        status = library.cusolverDnXsyevBatched_bufferSize(
            *_problem(dummy, dummy),
            ctypes.byref(on_device),
            ctypes.byref(on_host),
            ctypes.c_int64(count),
        )
    _check(status, "XsyevBatched_bufferSize")
    if on_host.value:
        raise RuntimeError(f"cuSOLVER asks for {on_host.value} bytes of host workspace")
    # The vectors are transposed through the workspace, so it holds the matrices at least.
    return max(on_device.value, count * n * n * dtype.itemsize)


def better_alone(n: int, count: int) -> bool:
    """Whether ``count`` matrices take less time one after the other than as a batch.

    For one matrix alone cuSOLVER has another algorithm, which takes a seventh of the time of the
    smallest batch (see :func:`milliseconds`). Up to n = 256 batches are as fast as one.
    """
    return n > 256 and count < 8


# (n, base, slope) of batches, in ms, measured on an H100.
_BATCHES = ((384, 20.0, 0.123), (512, 25.0, 0.2), (1024, 75.0, 0.63))


def milliseconds(n: int, count: int) -> float:
    """About how long :func:`enqueue_eigh_` takes on an H100 in float32. Only for planning: see
    :mod:`.batch_plan`.

    A batch takes base + slope * count: thousands of short kernels in a row, whatever the count.
    Linear in n between the sizes measured, and beyond.
    """
    if better_alone(n, count):
        return 0.0104 * n * count
    if n <= 256:
        return 0.011 * n + 0.055 * (n / 256) ** 2 * count
    low, high = _BATCHES[:2] if n <= 512 else _BATCHES[1:]
    x = (n - low[0]) / (high[0] - low[0])
    base, slope = (low[i] + x * (high[i] - low[i]) for i in (1, 2))
    return base + slope * count


def workspace(n: int, dtype: torch.dtype, device: torch.device, count: int) -> Tensor:
    """A workspace from torch's allocator, so that it is counted and reused."""
    size = workspace_bytes(n, dtype, device, count)
    return torch.empty(size, dtype=torch.uint8, device=device)


def eigh_(a: Tensor, work: Tensor) -> tuple[Tensor, list[bool]]:
    """:func:`enqueue_eigh_`, then who converged: waits for the device."""
    values, info = enqueue_eigh_(a, work)
    return values, [i == 0 for i in info.tolist()]


def enqueue_eigh_(a: Tensor, work: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues [N, n] ascending, and [N] zeros where it converged; a is overwritten by the
    eigenvectors (columns).

    Args:
        a: symmetric [N, n, n], float32 or float64, contiguous, on CUDA. One triangle is read.
        work: uint8 memory of at least :func:`workspace_bytes`.

    Raises:
        ValueError: the workspace is too small.
        RuntimeError: cuSOLVER refused the call.
    """
    library = _library()
    assert library is not None and a.is_contiguous()
    count, n = a.shape[:2]
    needed = workspace_bytes(n, a.dtype, a.device, count)
    if work.numel() < needed:
        raise ValueError(f"workspace of {work.numel()} bytes for {count} x {n}^2, needs {needed}")
    values = torch.empty(count, n, dtype=a.dtype, device=a.device)
    info = torch.zeros(count, dtype=torch.int32, device=a.device)
    step = 1 if better_alone(n, count) else count
    for i in range(0, count, step):
        part = a[i : i + step], values[i : i + step], info[i : i + step]
        with torch.cuda.device(a.device):
            status = library.cusolverDnXsyevBatched(
                *_problem(part[0], part[1]),
                ctypes.c_void_p(work.data_ptr()),
                ctypes.c_size_t(work.numel()),
                None,
                ctypes.c_size_t(0),
                ctypes.c_void_p(part[2].data_ptr()),
                ctypes.c_int64(step),
            )
        _check(status, "XsyevBatched")
    # cuSOLVER is column-major: its columns are our rows.
    columns = work[: a.numel() * a.element_size()].view(a.dtype).view(a.shape)
    columns.copy_(a.mT)
    a.copy_(columns)
    return values, info
