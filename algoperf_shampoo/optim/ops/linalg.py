"""Batched routines on stacked blocks, and how precise matrix products are. Shapes in comments.

A block of order k is a tensor [d_1, ..., d_k]; B blocks of one shape are stacked to
[B, d_1, ..., d_k]. Each mode i has a factor and a basis [B, d_i, d_i]. For a matrix (k = 2) mode 0
is the paper's L, mode 1 its R; a vector (k = 1) has one factor, that of full-matrix Adam.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..journal import Once, directly


def rotate(x: Tensor, bases: Sequence[Tensor]) -> Tensor:
    """Q_1' x_1 ... Q_k' x_k: coordinates of every block in its bases (Algorithm 2, line 10).

    x: [B, d_1, ..., d_k]; bases[i]: [B, d_i, d_i]. Returns a contiguous tensor like x.

    Each product contracts the leading mode and appends it at the back, so after k products the
    modes stand in their first order again and nothing is ever permuted in memory.
    """
    shape = x.shape
    for q in bases:
        # bmm: what @ does before it calls it takes longer than a small product.
        x = torch.bmm(x.reshape(shape[0], q.shape[-1], -1).mT, q)  # [B, rest, d_i]
    return x.reshape(shape)


def rotate_back(x: Tensor, bases: Sequence[Tensor], out: Tensor | None = None) -> Tensor:
    """Q_1 x_1 ... Q_k x_k: the inverse of :func:`rotate` for orthogonal bases.

    out: contiguous, like x but other memory; receives the result.
    """
    shape = x.shape
    for q in bases[:-1]:
        x = torch.bmm(x.reshape(shape[0], q.shape[-1], -1).mT, q.mT)
    q = bases[-1]
    x = x.reshape(shape[0], q.shape[-1], -1).mT
    if out is None:
        return torch.bmm(x, q.mT).reshape(shape)
    torch.bmm(x, q.mT, out=out.view(shape[0], -1, q.shape[-1]))
    return out


def products_to_and_fro(
    x: Tensor, other: Tensor, bases: Sequence[Tensor], back: bool
) -> list[tuple[Tensor, Tensor, Tensor]]:
    """(A, Q, out) of the products A Q that are :func:`rotate` (or :func:`rotate_back`), from x to
    ``other``, from there to x and so on. x, other: contiguous [B, d_1, ..., d_k]."""
    products = []
    for d, q in zip(x.shape[1:], bases, strict=True):
        a, out = x.view(len(x), d, -1).mT, other.view(len(x), -1, d)
        products.append((a, q.mT if back else q, out))
        x, other = other, x
    return products


def rotate_mode(x: Tensor, q: Tensor, mode: int) -> Tensor:
    """Multiply one mode by q': [B, ..., d_i, ...] with q [B, d_i, d_new] -> same shape as x."""
    moved = x.movedim(mode + 1, 1)  # [B, d_i, ...]
    flat = moved.reshape(x.shape[0], x.shape[mode + 1], -1)
    return (q.mT @ flat).reshape(moved.shape).movedim(1, mode + 1)


# Below this size a Gram product has too few outputs to occupy a GPU: its long sum is cut in pieces.
SMALL_GRAM = 64
GRAM_PIECES = 256


class Matricization(NamedTuple):
    """X [B, d, rest] and its transpose, [B, rest, d]: views of one memory.

    pieces: in how many the sum of X X' is cut.
    """

    x: Tensor
    rows: Tensor
    pieces: int


def matricized(x: Tensor, mode: int) -> Matricization:
    """X, the mode-``mode`` matricization of blocks [B, d_1, ..., d_k].

    A view for the first and the last mode of contiguous blocks.
    """
    B, d = x.shape[0], x.shape[mode + 1]
    last = mode == x.ndim - 2
    X = x.reshape(B, -1, d).mT if last else x.movedim(mode + 1, 1).reshape(B, d, -1)
    rest = X.shape[2]
    pieces = math.gcd(rest, GRAM_PIECES) if d <= SMALL_GRAM else 1
    return Matricization(X, X.mT, pieces if rest >= 16 * pieces else 1)


# A factor, what it learns from, and what is to be copied for that as (target, source).
GramOperand = tuple[Tensor, Matricization, tuple[Tensor, Tensor] | None]


def gram_operands(
    x: Tensor, factors: Sequence[Tensor], spare: Tensor | None = None
) -> list[GramOperand]:
    """Of all modes of x, [B, d_1, ..., d_k]. With ``spare``, like x, they are views of these two,
    into which modes in between are to be copied."""
    operands: list[GramOperand] = []
    for mode, factor in enumerate(factors):
        if spare is None or mode in (0, x.ndim - 2):
            operands.append((factor, matricized(x, mode), None))
        else:
            moved = x.movedim(mode + 1, 1)
            target = spare.view(moved.shape)
            operands.append((factor, matricized(target, 0), (target, moved)))
    return operands


def gram_ema_(
    factor: Tensor,
    operand: Matricization,
    beta: float | Tensor,
    weight: float,
    once: Callable[..., Any] = directly,
) -> None:
    """factor <- beta * factor + weight * X X' (Eq. 15).

    factor: [B, d, d], updated in place by operations called through ``once``
    (:mod:`.journal`); operand: X, see :func:`matricized`; beta: a number or [B, 1, 1].
    """
    x, rows, pieces = operand
    if pieces > 1:
        B, d = factor.shape[:2]
        rows = rows.reshape(B * pieces, -1, d)
        partial = (rows.mT @ rows).view(B, pieces, d, d).sum(1)
        once(factor.copy_, (factor * beta).add_(partial, alpha=weight))
    elif isinstance(beta, Tensor):
        once(factor.mul_, beta)
        once(factor.baddbmm_, x, rows, alpha=weight)
    else:
        once(factor.baddbmm_, x, rows, beta=beta, alpha=weight)


def norm(x: Tensor) -> Tensor:
    """Frobenius norm of every block [B, *shape], as [B, 1, ..., 1]."""
    return torch.linalg.vector_norm(x, dim=tuple(range(1, x.ndim)), keepdim=True)


def largest_entry(a: Tensor) -> Tensor:
    """max |a_ij| of positive semi-definite a: [N, n, n] -> [N]. It stands on the diagonal."""
    return a.diagonal(dim1=-2, dim2=-1).amax(-1)


def inverse_powers(eigenvalues: Tensor, exponent: Tensor, epsilon: float) -> Tensor:
    """(lambda - min(lambda_min, 0) + epsilon)^-exponent for stacks.

    eigenvalues [N, n] in any order, exponent [N]. As the AlgoPerf submission regularises: negative
    eigenvalues are rounding, so the spectrum is shifted up by the lowest. With epsilon = 0 what is
    rounding, n eps_machine of the largest, has the root 0 (as in a pseudo-inverse), and zeros all
    over the root 1.
    """
    lam = eigenvalues - eigenvalues.amin(-1, keepdim=True).clamp(max=0.0) + epsilon
    roots = lam.pow(-exponent[:, None])
    if epsilon == 0:
        largest = lam.amax(-1, keepdim=True)
        rounding = lam <= lam.shape[-1] * torch.finfo(lam.dtype).eps * largest
        roots = torch.where(rounding, (largest == 0).to(lam.dtype), roots)
    return roots


def inverse_root(
    eigenvalues: Tensor, eigenvectors: Tensor, exponent: Tensor, epsilon: float
) -> Tensor:
    """Q diag(:func:`inverse_powers` of lambda) Q' for stacks.

    eigenvalues [N, n], eigenvectors [N, n, n], exponent [N].
    """
    roots = inverse_powers(eigenvalues, exponent, epsilon)
    return (eigenvectors * roots[:, None, :]) @ eigenvectors.mT


def moments_(
    xs: list[Tensor], ms: list[Tensor], vs: list[Tensor], beta1: float, beta2: float, once: Once
) -> None:
    """Update both moments by x. xs, ms, vs: contiguous, of one shape [B, ...] and dtype each.

    The order of operations, here and in :func:`direction_`, is torch.optim.AdamW's, so that the
    two agree to rounding.
    """
    once(torch._foreach_mul_, vs, beta2)
    once(torch._foreach_addcmul_, vs, xs, xs, value=1 - beta2)
    once(torch._foreach_lerp_, ms, xs, 1 - beta1)


def direction_(
    xs: list[Tensor],
    ms: list[Tensor],
    vs: list[Tensor],
    c1: list[Any],
    c2: list[Any],
    beta1: float,
    eps: float,
    nadam: bool,
) -> None:
    """Replace x by Adam's direction (NAdam's numerator with ``nadam``).

    c1, c2 = 1 - beta1^t, 1 - beta2^t: all numbers, or all tensors [B, 1, ..., 1] on x's device;
    where they are longer than xs, which is in fewer pieces then, all are the same.
    """
    c1, c2 = c1[: len(xs)], c2[: len(xs)]
    if nadam:
        torch._foreach_lerp_(xs, ms, beta1)
    else:
        torch._foreach_copy_(xs, ms)
    denominators = torch._foreach_sqrt(vs)
    torch._foreach_div_(denominators, [c**0.5 for c in c2])
    torch._foreach_add_(denominators, eps)
    torch._foreach_mul_(denominators, c1)
    torch._foreach_div_(xs, denominators)


# A setting of `matmul_precision`, and what it means for a float32 product on a GPU. CPUs compute
# float32 in full precision under every setting.
MATMUL_PRECISIONS = {
    "highest": "ieee",  # full float32
    "high": "tf32",  # inputs rounded to 10 bits of mantissa, relative error about 3e-4
}


class _Switch(NamedTuple):
    """torch's switch: an attribute of an object, and its value per setting.

    unset: the value that it has while nobody has asked for anything, if that is full precision.
    """

    backend: Any
    attribute: str
    values: dict[str, Any]
    unset: str | None = None


@functools.cache
def _switch() -> _Switch | None:
    """None where there is none."""
    newer: dict[str, Any] = dict(MATMUL_PRECISIONS)
    if not torch.cuda.is_available():
        # The CPU has a switch too (mkldnn may use bfloat16 under "medium"); always full precision.
        backend = getattr(torch.backends.mkldnn, "matmul", None)
        if not hasattr(backend, "fp32_precision"):
            return None
        return _Switch(backend, "fp32_precision", dict.fromkeys(newer, "ieee"), "none")
    backend = torch.backends.cuda.matmul
    if hasattr(backend, "fp32_precision"):
        return _Switch(backend, "fp32_precision", newer)
    return _Switch(backend, "allow_tf32", {name: value == "tf32" for name, value in newer.items()})


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
    backend, attribute, values, unset = switch
    before = getattr(backend, attribute)
    if before in (values[setting], unset):
        yield
        return
    setattr(backend, attribute, values[setting])
    try:
        yield
    finally:
        setattr(backend, attribute, before)
