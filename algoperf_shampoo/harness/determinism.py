"""What makes a run repeat to the bit, and what shows that it did."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch


def seed_global_generators(seed: int) -> None:
    """Nothing should draw from the generators of torch, numpy and Python; what does, repeats."""
    torch.manual_seed(seed)
    np.random.seed(seed)
    random.seed(seed)


def hash_parameters(model: torch.nn.Module) -> str:
    """sha256 over the names, dtypes, shapes and bytes of a model's state, in its own order."""
    total = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        value = tensor.detach().cpu().contiguous()
        total.update(f"{name} {value.dtype} {list(value.shape)}\0".encode())
        total.update(value.reshape(-1).view(torch.uint8).numpy().tobytes())
    return total.hexdigest()


@contextmanager
def repeatable_on_cpu() -> Iterator[None]:
    """Ask torch for repeatable kernels on a CPU; on a GPU its own choices stay, as in AlgoPerf."""
    if torch.cuda.is_available():
        yield
        return
    before = torch.get_deterministic_debug_mode()
    options: Any = torch.utils.deterministic  # a module whose attributes are made at run time
    fill = options.fill_uninitialized_memory
    # torch.use_deterministic_algorithms imports torch's compiler as well, which takes seconds.
    torch.set_deterministic_debug_mode("warn")
    options.fill_uninitialized_memory = False
    try:
        yield
    finally:
        torch.set_deterministic_debug_mode(before)
        options.fill_uninitialized_memory = fill
