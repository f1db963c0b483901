"""Steps as CUDA graphs: the arithmetic of a step recorded once and replayed.

Launching a dozen kernels from Python takes longer than a small model's kernels run. Recorded are
three sections, each a graph: the statistics, the check of all factors, and the update from gathered
gradients to parameters. Between them stands what only the host can do: reading which factors fail,
and refreshing those. The learning rate and the bias corrections are inputs, read from memory at
replay.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Hashable, Iterator, Mapping
from typing import Any

import torch

from ..blocks.layout import Layout, Stack
from ..journal import Journal, Run
from ..ops import Hyper

log = logging.getLogger(__name__)


class Recorder:
    """Runs a section directly the first time, records it the second, then replays.

    A recording holds for one set of parameter addresses, hyperparameters (but for the learning
    rate) and readiness of the bases; anything else starts over. If recording fails, sections run
    directly.

    Args:
        enabled: False to run all sections directly.
        journal: replays are entered there.
    """

    def __init__(
        self, device: torch.device, enabled: bool = True, journal: Journal | None = None
    ) -> None:
        self._device = device
        self._journal = journal or Journal()
        self._enabled = enabled
        self._stream: torch.cuda.Stream | None = None
        self._key: Hashable = None
        self._parameters: tuple[int, ...] = ()
        self._seen: set[str] = set()
        self._graphs: dict[str, tuple[torch.cuda.CUDAGraph, Any]] = {}
        self._pool: Any = None
        self._lr: torch.Tensor | None = None
        self._corrections: torch.Tensor | None = None  # [2, rows of all stacks]
        self._of_rows: tuple[torch.Tensor, ...] = ()
        self._filled: list[float | None] = [None, None, None]  # what the inputs hold, if uniform
        self._of_stacks: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self._due: Callable[[], None] | None = None  # writes the inputs of this step
        self._section = ""
        self._readers = {"update"}  # sections that read inputs

    def begin(self, layout: Layout, h: Hyper) -> tuple[Hyper, Run]:
        """One step in which all parameters have gradients: its hyperparameters with what changes
        from step to step on the device, and what runs its sections."""
        inputs = self._inputs(layout, h)
        constants = h._replace(lr=0.0)
        stacks = layout.stacks

        def run(name: str, section: Callable[[], Any]) -> Any:
            # Between the sections of one step bases may become ready.
            self._expect((constants, tuple([_readiness(stack) for stack in stacks])))
            if name == "update":
                # Looked at here, when the device is at work on the statistics already.
                self._expect_parameters(tuple(map(torch.Tensor.data_ptr, layout.params)))
            return self._run(name, section)

        return inputs, run

    def inputs(self, layout: Layout, h: Hyper) -> Hyper:
        """What changes from step to step as tensors, always the same ones: the learning rate, and
        the bias corrections of every row."""
        inputs = self._inputs(layout, h)
        self.write_inputs()
        return inputs

    def _inputs(self, layout: Layout, h: Hyper) -> Hyper:
        """:meth:`inputs`, written when they are needed: the device is at work by then."""
        if self._lr is None:
            self._allocate(layout)
        assert self._lr is not None
        self._due = functools.partial(self._write, layout, h)
        return h._replace(lr=self._lr, corrections=_Corrections(self._of_stacks, self._asked))

    def _asked(self) -> None:
        self._readers.add(self._section)
        self.write_inputs()

    def write_inputs(self) -> None:
        """Write this step's inputs, if that has not been done."""
        if self._due is not None:
            self._due()
            self._due = None

    def _write(self, layout: Layout, h: Hyper) -> None:
        assert self._lr is not None and self._corrections is not None
        self._fill(0, self._lr, float(h.lr))
        if not layout.stacks:
            return
        step = layout.stacks[0].steps[0]
        if all(stack.steps.count(step) == len(stack) for stack in layout.stacks):
            self._fill(1, self._of_rows[0], 1 - h.beta1**step)
            self._fill(2, self._of_rows[1], 1 - h.beta_d**step)
        else:
            steps = [t for stack in layout.stacks for t in stack.steps]
            values = [[1 - beta**t for t in steps] for beta in (h.beta1, h.beta_d)]
            self._filled[1:] = [None, None]
            # From pinned memory, which its allocator keeps until the copy has run.
            pinned = self._device.type == "cuda"
            host = torch.tensor(values, dtype=self._corrections.dtype, pin_memory=pinned)
            self._corrections.copy_(host, non_blocking=True)

    def _fill(self, number: int, place: torch.Tensor, value: float) -> None:
        """Fill an input unless it holds that value already; each fill is a launch."""
        if self._filled[number] != value:
            place.fill_(value)
            self._filled[number] = value

    def _allocate(self, layout: Layout) -> None:
        first = layout.everywhere[0]
        make = functools.partial(torch.zeros, dtype=first.dtype, device=first.device)
        self._lr, self._corrections = make(()), make(2, sum(len(s) for s in layout.stacks))
        self._of_rows = self._corrections.unbind()
        parts = self._corrections.split([len(s) for s in layout.stacks], dim=1)
        for stack, part in zip(layout.stacks, parts, strict=True):
            c1, c2 = (row.view(-1, *[1] * len(stack.shape)) for row in part)
            self._of_stacks[id(stack)] = c1, c2

    def _expect(self, key: Hashable) -> None:
        """Forget what was recorded if it does not hold any more."""
        if key != self._key:
            self._key = key
            self._forget()

    def _expect_parameters(self, addresses: tuple[int, ...]) -> None:
        """The same for the addresses of the parameters, which updates alone depend on."""
        if addresses != self._parameters:
            if self._parameters:
                self._forget()
            self._parameters = addresses

    def _forget(self) -> None:
        self._seen, self._graphs = set(), {}
        # One pool for all: sections never run at the same time, and what one leaves in it is read
        # before the next one starts.
        self._pool = torch.cuda.graph_pool_handle()

    def _run(self, name: str, section: Callable[[], Any]) -> Any:
        self._section = name
        if name in self._readers:
            self.write_inputs()
        if name in self._graphs:
            graph, result = self._graphs[name]
            with torch.cuda.device(self._device):
                self._journal.once(graph.replay)
            return result
        if not self._enabled or name not in self._seen:
            # It runs once before, so that kernels are compiled and loaded. If that fails on its
            # way, it has to run so again, along the same operations.
            result = section()
            self._seen.add(name)
            return result
        self.write_inputs()  # not while recording
        with torch.cuda.device(self._device):
            return self._record(name, section)

    def _record(self, name: str, section: Callable[[], Any]) -> Any:
        graph = torch.cuda.CUDAGraph()
        before = torch.cuda.current_stream()
        # torch's own stream for it is on whatever device the process recorded on first.
        self._stream = self._stream or torch.cuda.Stream(self._device)
        # A cuBLAS workspace from outside the graph's memory pool could be freed and handed to
        # someone else while the graph still writes to it (AlgoPerf frees them at every evaluation).
        torch._C._cuda_clearCublasWorkspaces()
        try:
            with (
                self._journal.closed(),
                torch.cuda.graph(graph, self._pool, self._stream, "thread_local"),
            ):
                result = section()
        except RuntimeError as error:
            torch.cuda.set_stream(before)  # a failed recording does not put it back
            log.warning("recording a step as CUDA graphs failed, going on without: %s", error)
            self._enabled = False
            return section()
        finally:
            torch._C._cuda_clearCublasWorkspaces()
        self._graphs[name] = graph, result
        self._journal.once(graph.replay)
        return result


class _Corrections(Mapping[int, tuple[torch.Tensor, torch.Tensor]]):
    """:attr:`Hyper.corrections` that says when it is read."""

    def __init__(
        self, of_stacks: dict[int, tuple[torch.Tensor, torch.Tensor]], asked: Callable[[], None]
    ) -> None:
        self._of_stacks, self._asked = of_stacks, asked

    def __getitem__(self, stack: int) -> tuple[torch.Tensor, torch.Tensor]:
        self._asked()
        return self._of_stacks[stack]

    def __iter__(self) -> Iterator[int]:
        return iter(self._of_stacks)

    def __len__(self) -> int:
        return len(self._of_stacks)


def _readiness(stack: Stack) -> bool | tuple[bool, ...]:
    """Whether all rows are ready, or none, or which."""
    return all(stack.ready) or (any(stack.ready) and tuple(stack.ready))
