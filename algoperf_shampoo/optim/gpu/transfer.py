"""Gradients into the buffer and updates into parameters, on a GPU: one kernel each.

A model has hundreds of parameters, and 200 small copies cost a host more time than they take on the
device. Here a kernel reads where the parameters (or their gradients) are from a table of addresses
on the device, which is uploaded anew only when one has moved, so that a step is one launch each way
and writing the update, scaled and with weight decay, one pass over the parameters.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from . import triton_kernels

TILE = 4096  # entries copied by one program
GRADIENT_TABLES = 4
Piece = tuple[int, int, int, int, int]


class Transfer:
    """The copies of one layout, all of whose parameters are contiguous float32 on one GPU.

    blocks: (parameter, the block's pieces, offset of the block in the buffer), row by row of the
    stacks; a piece is (offset in the parameter, offset in the block, run, stride, entries): runs of
    ``run`` consecutive entries every ``stride``. Use :meth:`fits` first.
    """

    def __init__(self, blocks: Iterable[tuple[int, Iterable[Piece], int]], buffer: Tensor) -> None:
        pieces: list[tuple[int, ...]] = []
        tiles: list[tuple[int, int]] = []
        for row, (param, block, position) in enumerate(blocks):
            for offset, inside, run, stride, entries in block:
                tiles += [(len(pieces), start) for start in range(0, entries, TILE)]
                pieces.append((param, offset, position + inside, run, stride, entries, row))
        module = triton_kernels()
        assert module is not None
        self._kernels = module
        self._buffer = buffer
        params = 1 + max(piece[0] for piece in pieces)
        self._none_bad = torch.zeros(params, dtype=torch.int32, device=buffer.device)
        self._pieces = torch.tensor(pieces, dtype=torch.int64, device=buffer.device)
        self._tiles = torch.tensor(tiles, dtype=torch.int64, device=buffer.device)
        # Gradients come and go between a few places, so a few tables are kept. That of parameters
        # is kept apart: a recorded step goes on reading it.
        self._gradients: dict[tuple[int, ...], Tensor] = {}
        self._parameters: dict[tuple[int, ...], Tensor] = {}

    @staticmethod
    def fits(params: Sequence[Tensor]) -> bool:
        """Whether the parameters are such that this class can serve."""
        return (
            bool(params)
            and triton_kernels() is not None
            and all(
                p.is_cuda
                and p.device == params[0].device
                and p.dtype == torch.float32
                and p.is_contiguous()
                for p in params
            )
        )

    def gather(
        self, gradients: Sequence[Tensor | None], row_absmax: Tensor | None, zeros: bool = False
    ) -> bool:
        """Copy gradients into the buffer; False, and nothing done, if one is missing or is not
        contiguous float32 on the buffer's device.

        row_absmax: int32 [rows]; becomes the largest absolute entry of each row, as float32's bits.
        zeros: it is all zeros already.
        """
        present = [g for g in gradients if g is not None]
        if len(present) < len(gradients) or not _contiguous(present):
            return False
        table = self._table(self._gradients, GRADIENT_TABLES, present)
        if table is None:
            return False
        if row_absmax is not None and not zeros:
            row_absmax.zero_()
        with torch.cuda.device(self._buffer.device):
            self._kernels.gather[(len(self._tiles),)](
                table,
                self._pieces,
                self._tiles,
                self._buffer,
                self._none_bad if row_absmax is None else row_absmax,
                SIZE=TILE,
                MEASURE=row_absmax is not None,
            )
        return True

    def scatter(
        self, params: Sequence[Tensor], lr: Tensor, weight_decay: float, bad: Tensor | None = None
    ) -> bool:
        """W <- W - lr * (U + weight_decay * W), U in the buffer, lr [] on the device; but not for
        parameters where bad, int32 on the device, is not zero.

        False, and nothing done, if the parameters are not any more what :meth:`fits` asks for.
        """
        table = self._table(self._parameters, 1, params) if self.fits(params) else None
        if table is None:
            return False
        with torch.cuda.device(self._buffer.device):
            self._kernels.scatter[(len(self._tiles),)](
                table,
                self._pieces,
                self._tiles,
                self._buffer,
                lr,
                weight_decay,
                self._none_bad if bad is None else bad,
                SIZE=TILE,
            )
        return True

    def _table(
        self, tables: dict[tuple[int, ...], Tensor], limit: int, tensors: Sequence[Tensor]
    ) -> Tensor | None:
        """The tensors' addresses on the device, from ``tables`` or made and kept there, the oldest
        beyond ``limit`` forgotten; None if one is of another dtype or device, which is looked at
        when an address is new."""
        addresses = tuple(map(Tensor.data_ptr, tensors))
        if addresses not in tables:
            device = self._buffer.device
            for x in tensors:
                if x.dtype != torch.float32 or x.device != device:
                    return None
            if len(tables) >= limit:
                del tables[next(iter(tables))]
            # From pinned memory, which its allocator keeps until the copy has run.
            host = torch.tensor(addresses, dtype=torch.int64, pin_memory=True)
            tables[addresses] = host.to(device, non_blocking=True)
        return tables[addresses]


def _contiguous(tensors: Sequence[Tensor]) -> bool:
    """Whether all are dense and contiguous."""
    try:
        return all(map(Tensor.is_contiguous, tensors))
    except RuntimeError:  # what compressed sparse ones say
        return False
