"""Ordinary steps as a CUDA graph: the arithmetic of a step recorded once and replayed.

A step of a ViT is about 200 kernel launches; launched one by one from Python they take longer than
the kernels. Recorded is everything between the gathered gradients and the updated parameters;
gradients are gathered outside, because their addresses change. The learning rate and the bias
corrections are inputs, read from memory at replay.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable

import torch

from .buckets import Layout
from .preconditioners.base import Hyper

log = logging.getLogger(__name__)


class Recorder:
    """Runs a step's arithmetic directly the first time, records it the second, then replays.

    A recording holds for one set of parameter addresses, hyperparameters (but for the learning
    rate) and readiness of the bases; anything else starts over. If recording fails, steps run
    directly.
    """

    def __init__(self) -> None:
        self._key: Hashable = None
        self._graph: torch.cuda.CUDAGraph | None = None
        self._scalars: torch.Tensor | None = None
        self._failed = False

    def run(self, arithmetic: Callable[[Hyper], None], layout: Layout, h: Hyper) -> None:
        """One ordinary step: all parameters have gradients, all blocks the same step count."""
        if self._scalars is None:
            first = layout.stacks[0]
            self._scalars = torch.zeros(3, dtype=first.dtype, device=first.device)
        lr, c1, c2 = self._scalars.unbind()
        step = layout.stacks[0].steps[0]
        lr.fill_(h.lr)
        c1.fill_(1 - h.beta1**step)
        c2.fill_(1 - h.beta2**step)
        on_device = h._replace(lr=lr, c1=c1, c2=c2)
        key = (
            h._replace(lr=0.0),
            tuple(any(stack.ready) for stack in layout.stacks),
            tuple(p.data_ptr() for p in layout.params),
        )
        if (
            key != self._key
        ):  # first step of its kind: run it, so that kernels are compiled and loaded
            self._key, self._graph = key, None
            arithmetic(on_device)
        elif self._graph is not None:
            self._graph.replay()
        elif self._failed or not self._record(arithmetic, on_device):
            arithmetic(on_device)

    def _record(self, arithmetic: Callable[[Hyper], None], h: Hyper) -> bool:
        graph = torch.cuda.CUDAGraph()
        # A cuBLAS workspace from outside the graph's memory pool could be freed and handed to
        # someone else while the graph still writes to it (AlgoPerf frees them at every evaluation).
        torch._C._cuda_clearCublasWorkspaces()
        try:
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                arithmetic(h)
        except RuntimeError as error:
            log.warning("recording the step as a CUDA graph failed, going on without: %s", error)
            self._failed = True
            return False
        finally:
            torch._C._cuda_clearCublasWorkspaces()
        self._graph = graph
        graph.replay()
        return True
