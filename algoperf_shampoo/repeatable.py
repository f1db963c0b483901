"""What makes a run on GPUs repeat to the bit, and a resumed one continue as if it had not ended.

A part of the submission, for either harness; on a CPU the embedded harness asks for repeatable
kernels by itself (:mod:`.harness.determinism`).
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from . import points

VARIABLE = "SHAMPOO_DETERMINISTIC"


def set_up() -> None:
    """Ask torch for repeatable kernels, if the environment does. What has none, torch warns of.

    Raises:
        ValueError: the variable is neither empty nor "0" nor "1".
    """
    asked = os.environ.get(VARIABLE, "")
    if asked not in ("", "0", "1"):
        raise points.PointError(f"{VARIABLE}={asked}: it must be 1, or empty")
    if asked == "1":
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        # Not torch.use_deterministic_algorithms, which imports torch's compiler.
        torch.set_deterministic_debug_mode("warn")
        torch.backends.cudnn.benchmark = False


def buckets_matter(model: torch.nn.Module) -> bool:
    """Whether the gradients' sums depend on DDP's buckets, where everything else repeats.

    A process's first backward reduces gradients in the order of parameters, the later ones in the
    order in which gradients were ready. A ring of three or more ranks adds an element's summands in
    an order that its place in the bucket decides; two summands have one sum.
    """
    inner = getattr(model, "_orig_mod", model)
    return (
        isinstance(inner, DistributedDataParallel)
        and dist.get_world_size(inner.process_group) > 2
        and torch.are_deterministic_algorithms_enabled()
    )


def throw_away(model: torch.nn.Module, backward: Callable[[], Any]) -> None:
    """A backward whose gradients nobody uses, so that the next one reduces as later ones do.

    Buffers and generators of random numbers are left as they were.
    """
    buffers = [(b, b.detach().clone()) for b in model.buffers()]
    device = next(model.parameters()).device
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        backward()
    with torch.no_grad():
        for buffer, value in buffers:
            buffer.copy_(value)
    for p in model.parameters():
        p.grad = None
