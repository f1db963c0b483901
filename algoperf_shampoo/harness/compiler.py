"""Keeping torch's compiler out of a process that compiles nothing: its import takes seconds.

``torch.optim.Optimizer`` marks methods as not to be compiled, and imports ``torch._dynamo`` (with
it ``torch._inductor`` and sympy) at the first call of one, to tell a compiler that nobody uses.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import torch

_CACHE = "__dynamo_disable"
"""Where torch's wrapper (``torch._compile``) keeps what it is to call."""


@contextmanager
def left_out() -> Iterator[None]:
    """Inside, optimizers do not import the compiler. Who compiles inside does it himself.

    Nothing is changed where it is imported already, or where torch does it in another way.
    """
    marked = []
    if "torch._dynamo" not in sys.modules:
        for method in vars(torch.optim.Optimizer).values():
            function = getattr(method, "__wrapped__", None)
            code = getattr(method, "__code__", None)
            if function is None or code is None or _CACHE not in code.co_consts:
                continue
            if not hasattr(function, _CACHE):
                setattr(function, _CACHE, function)
                marked.append(function)
    try:
        yield
    finally:
        for function in marked:
            with suppress(AttributeError):
                delattr(function, _CACHE)
