"""Memory that holds something else between refreshes: its contents stand aside on the host."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from ..blocks.memory import BorrowedMemory
from ..blocks.rows import chunks, take

# At most so much of a piece of borrowed memory is offloaded: the host memory for it is kept.
OFFLOADED_BYTES = 2**29
ALIGNMENT = 256  # bytes; cuSOLVER's workspaces start at a multiple


def usable(borrowed: BorrowedMemory) -> int:
    """How many entries of it a refresh may work in: the free ones, and what it may offload."""
    return min(
        len(borrowed.memory), borrowed.free + OFFLOADED_BYTES // borrowed.memory.element_size()
    )


def as_bytes(x: Tensor) -> Tensor:
    """The memory of a contiguous tensor, as bytes, from the first aligned address on."""
    flat = x.view(-1).view(torch.uint8)
    return flat[-flat.data_ptr() % ALIGNMENT :]


@contextlib.contextmanager
def offloaded(parts: Sequence[Tensor]) -> Iterator[None]:
    """The contents of flat tensors stand aside in (pinned) host memory while their memory serves
    otherwise.

    Copies are ordered by the current stream. Not to be nested: a device has one host buffer.
    """
    by_device: dict[torch.device, list[Tensor]] = {}
    for x in parts:
        if len(x):
            by_device.setdefault(x.device, []).append(x.view(torch.uint8))
    pairs: list[tuple[Tensor, Tensor]] = []
    for device, mine in by_device.items():
        sizes = [len(x) for x in mine]
        pairs += zip(_host(device, sum(sizes)).split(sizes), mine, strict=True)
    for host, x in pairs:
        host.copy_(x, non_blocking=True)
    try:
        yield
    finally:
        for host, x in pairs:
            x.copy_(host, non_blocking=True)
        for device in by_device:
            if device.type == "cuda":
                _RESTORED[device] = torch.cuda.current_stream(device).record_event()


def aside(operators: Tensor, indices: Sequence[int]) -> Tensor:
    """A copy of operators[indices] [N, n, n] on the host, ordered by the current stream."""
    size = len(indices), *operators.shape[1:]
    host = torch.empty(size, dtype=operators.dtype, pin_memory=operators.is_cuda)
    start = 0
    for chunk in chunks(indices, operators.shape[-1]):
        part = host[start : start + len(chunk)]
        part.copy_(take(operators, chunk), non_blocking=True)
        start += len(chunk)
    return host


# Per device one buffer, as large as the most that was offloaded at a time: at most OFFLOADED_BYTES
# a piece of borrowed memory (one per dtype), which torch rounds up to a power of two. Kept for the
# life of the process, because pinning takes longer than copying.
_HOST: dict[torch.device, Tensor] = {}
# When its contents were back on the device: another optimizer may offload from another stream.
_RESTORED: dict[torch.device, torch.cuda.Event] = {}


def _host(device: torch.device, size: int) -> Tensor:
    """``size`` bytes of host memory, pinned for a GPU."""
    if device in _RESTORED:
        torch.cuda.current_stream(device).wait_event(_RESTORED[device])
    if device not in _HOST or len(_HOST[device]) < size:
        _HOST.pop(device, None)
        _HOST[device] = torch.empty(size, dtype=torch.uint8, pin_memory=device.type == "cuda")
    return _HOST[device][:size]
