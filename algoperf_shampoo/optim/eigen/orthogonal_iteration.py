"""Warm starts: orthogonal iteration from the old eigenbasis until Eq. 11 holds.

Everything happens in place in two pieces of memory besides the factors and operators themselves,
because what a refresh can keep in memory at a time decides how fast it is: a Cholesky factorization
of twelve matrices of size 1024 takes hardly longer than one of four.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..criterion import off_diagonal_and_norm
from ..ops.linalg import largest_entry, matmul_precision
from . import cusolver

ORTHOGONALIZATIONS = ("cholesky", "householder")


def sweep_(
    a: Tensor, x: Tensor, y: Tensor, z: Tensor, orthogonalization: str = "cholesky"
) -> tuple[Tensor, Tensor]:
    """One sweep of x towards the eigenvectors of a; how far it got.

    Multiply by a (plus a small multiple of the identity), orthogonalize, then solve exactly in the
    span of the leading quarter (Rayleigh-Ritz): simultaneous iteration alone separates close
    leading eigenvalues slowly, and those are what Eq. 11 weighs.

    The shift, 1e-3 ||a||_F, bounds the condition of the product by 1e3 whatever the rank of a,
    which Cholesky-QR in float32 needs (its Gram matrix has the square); it slows down only
    directions whose eigenvalues are below it.

    Args:
        a: symmetric, not zero, [N, n, n].
        x: orthogonal [N, n, n], columns by ascending eigenvalue; replaced likewise.
        y, z: [N, n, n], contiguous, overwritten.
        orthogonalization: "cholesky" (Cholesky-QR, twice) or "householder".

    Returns:
        Rayleigh quotients [N, n], ascending, and the left side of Eq. 11, [N]: nan where the
        orthogonalization failed.
    """
    n = a.shape[-1]
    with matmul_precision("highest"):
        torch.index_select(x, -1, torch.arange(n - 1, -1, -1, device=x.device), out=y)
        # Scaled first: squares of a tiny factor's entries underflow.
        scale = largest_entry(a)
        norm = torch.linalg.matrix_norm(torch.div(a, scale[:, None, None], out=z))
        torch.bmm(a, y, out=x).div_(scale[:, None, None])
        x.addcmul_(y, 1e-3 * norm[:, None, None])
        if orthogonalization == "cholesky":
            _cholesky_qr2_(x, z)
        else:
            x.copy_(torch.linalg.qr(x).Q)
        _rayleigh_ritz_(a, x, max(32, n // 4), y, z)
        torch.bmm(a, x, out=y)
        # Sums over rows as a product: a reduction along them would take memory of its own.
        ones = x.new_ones(1, 1, n).expand(len(x), 1, n)
        rayleigh = torch.bmm(ones, torch.mul(x, y, out=z)).squeeze(1)
    values, order = rayleigh.sort(dim=-1)
    off, norm = off_diagonal_and_norm(a, x, y, scale)
    x.copy_(torch.gather(x, -1, order[:, None, :].expand_as(x), out=y))
    return values, off / norm


def _cholesky_qr2_(x: Tensor, gram: Tensor) -> None:
    """x <- Q of x = QR, by Cholesky of x'x, twice: the second pass repairs the first one's
    rounding. Where Cholesky fails x becomes nan."""
    info = torch.empty(len(x), dtype=torch.int32, device=x.device)
    lower = gram.mT  # LAPACK's order, so that nothing is copied
    for _ in range(2):
        x /= torch.linalg.matrix_norm(x)[:, None, None]
        torch.bmm(x.mT, x, out=gram)
        torch.linalg.cholesky_ex(lower, out=(lower, info))
        torch.linalg.solve_triangular(lower, x.mT, upper=False, out=x.mT)
        x += torch.where(info != 0, torch.nan, 0.0).to(x.dtype)[:, None, None]


def _rayleigh_ritz_(a: Tensor, x: Tensor, lead: int, y: Tensor, z: Tensor) -> None:
    """Replace the first ``lead`` columns of x by the eigenvectors of a in their span, in descending
    order."""
    N, n = x.shape[:2]
    leading = x[..., :lead]
    beside = y.view(-1)[: N * n * lead].view(N, n, lead)
    small = z.view(-1)[: N * lead * lead].view(N, lead, lead)
    torch.bmm(leading.mT, torch.bmm(a, leading, out=beside), out=small)
    torch.nan_to_num(small, out=small)
    scale = largest_entry(small).clamp_min(torch.finfo(a.dtype).tiny)
    small /= scale[:, None, None]
    if small.is_cuda and cusolver.available():
        # For small matrices cuSOLVER wants twenty times their size, so not all at a time.
        work, size = y.view(-1).view(torch.uint8), N
        while size > 1 and cusolver.workspace_bytes(lead, a.dtype, a.device, size) > work.numel():
            size = -(-size // 2)
        if cusolver.workspace_bytes(lead, a.dtype, a.device, size) > work.numel():
            work = cusolver.workspace(lead, a.dtype, a.device, size)
        for part in small.split(size):
            _, info = cusolver.enqueue_eigh_(part, work)
            part += torch.where(info != 0, torch.nan, 0.0).to(a.dtype)[:, None, None]
        vectors = small
    else:
        try:
            vectors = torch.linalg.eigh(small).eigenvectors
        except torch.linalg.LinAlgError:  # Eq. 11 then reads nan, and the caller goes on
            vectors = torch.full_like(small, torch.nan)
    leading.copy_(torch.bmm(leading, vectors.flip(-1), out=beside))
