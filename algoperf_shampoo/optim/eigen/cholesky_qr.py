"""The Q of X = QR for X = A Q_old, by Cholesky factors in float64: Householder's columns, up to
their signs, in a fraction of the time on GPUs that multiply float64 as fast as float32.

Plain Cholesky-QR fails at the condition numbers of rank-deficient factors (1e6 and more in
float32; its Gram matrix has the square). Here:

1. X gets 2^-32 max_j |x_j| Q_old, a five-hundredth of what rounding A Q_old to float32 leaves.
   Where A says nothing, in its null space, columns so stay near their old places; Householder takes
   there whatever rounding says. Columns of eigenvalues lambda are moved by about 2^-32 lambda_max /
   lambda.
2. Its columns are divided by their lengths, which changes nothing of Q. In a warm-started basis
   most of X's condition is in those.
3. The Gram matrix of that, in float64, plus n eps_64, is factorized: X = Q R with a Q that is
   orthogonal but for directions whose condition is above 1e5.
4. Where there are such directions the same is done once more with that Q, whose condition is now
   1e4 or less. The R of both together is triangular, so the columns are still those of QR.
5. With E = Q'Q - I, Q <- Q (I - upper(E)), upper(E) its upper triangle with half of its diagonal,
   is orthogonal to E^2, and its leading columns span the same spaces. Where E is not small (or nan,
   where Cholesky failed) the caller goes to Householder.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..ops.linalg import matmul_precision

SHIFT = 2.0**-32
# Of entries of Q'Q - I before the last step: their squares are below float32's eps.
LARGEST_ERROR = 1e-4


def fast_float64(device: torch.device) -> bool:
    """Whether the device multiplies float64 on tensor cores: data centres' GPUs."""
    if device.type != "cuda" or torch.version.hip is not None:
        return False
    return torch.cuda.get_device_capability(device) in ((8, 0), (9, 0), (10, 0))


def orthonormal_(x: Tensor, y: Tensor, q: Tensor, out: Tensor, spare: Tensor) -> list[bool]:
    """out <- Q of x + shift q = QR; whether it is orthogonal. Waits for the device.

    Args:
        x, y: float64 [N, n, n], contiguous; overwritten.
        q: the old bases [N, n, n].
        out, spare: float32 [N, n, n]; spare, which is overwritten, may be q's memory.
    """
    length = torch.linalg.vector_norm(x, dim=1).amax(-1)
    x += torch.mul(q, (SHIFT * length)[:, None, None], out=y)
    good = _orthogonalize_(x, y)
    bad = [i for i, fine in enumerate(good) if not fine]
    if bad and 2 * len(bad) <= len(x):  # in y, when the good ones have no use for it any more
        _repaired(x, y, out, spare)
        some, gram = y[: len(bad)], y[len(bad) : 2 * len(bad)]
        index = torch.tensor(bad, device=x.device)
        torch.index_select(x, 0, index, out=some)
        again = _orthogonalize_(some, gram)
        part = _in_float32(x)[: len(bad)]
        _repaired(some, gram, part, spare[: len(bad)])
        out.index_copy_(0, index, part)
        for i, fine in zip(bad, again, strict=True):
            good[i] = fine
        return good
    if bad:
        good = _orthogonalize_(x, y)
    _repaired(x, y, out, spare)
    return good


def _orthogonalize_(x: Tensor, y: Tensor) -> list[bool]:
    """x <- Q of x = QR, almost, and y <- Q'Q - I; whether that is small."""
    n = x.shape[-1]
    x /= torch.linalg.vector_norm(x, dim=1, keepdim=True)
    torch.bmm(x.mT, x, out=y)
    y.diagonal(dim1=1, dim2=2).add_(n * torch.finfo(x.dtype).eps)
    info = torch.empty(len(x), dtype=torch.int32, device=x.device)
    lower = y.mT  # LAPACK's order, so that nothing is copied
    torch.linalg.cholesky_ex(lower, out=(lower, info))
    torch.linalg.solve_triangular(lower, x.mT, upper=False, out=x.mT)
    torch.bmm(x.mT, x, out=y)
    y.diagonal(dim1=1, dim2=2).sub_(1.0)
    error = torch.linalg.vector_norm(y, torch.inf, dim=(1, 2))
    return ((info == 0) & (error <= LARGEST_ERROR)).tolist()


def _repaired(x: Tensor, y: Tensor, out: Tensor, spare: Tensor) -> None:
    """out <- x (I - upper(y)), in float32: y is small."""
    upper = spare.copy_(y).triu_()
    upper.diagonal(dim1=1, dim2=2).mul_(0.5)
    with matmul_precision("highest"):
        out.sub_(torch.bmm(out.copy_(x), upper, out=_in_float32(y)))


def _in_float32(x: Tensor) -> Tensor:
    """The memory of x for as many numbers of float32."""
    return x.view(-1).view(torch.float32)[: x.numel()].view(x.shape)
