"""The canonical state_dict: per parameter and per block, whatever the stacks or the device."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from .buckets import Layout, Stack
from .eigenbasis import FactorSet

Groups = Sequence[tuple[Layout, Sequence[FactorSet]]]
Rows = dict[tuple[int, int], tuple[Stack, int]]


def _rows(layout: Layout) -> Rows:
    """(parameter, block) -> (stack, row)."""
    return {
        (member.param, member.index): (stack, row)
        for stack in layout.stacks
        for row, member in enumerate(stack.members)
    }


def _tensors(stack: Stack, row: int) -> Iterator[tuple[str, Tensor]]:
    """Names and live views of all tensors of one block."""
    for name, x in stack.state.items():
        yield name, x[row]
    for mode, x in enumerate(stack.factors):
        yield f"factor_{mode}", x[row]
    for mode, x in enumerate(stack.operators):
        yield f"operator_{mode}", x[row]


def _counts(factor_sets: Sequence[FactorSet]) -> dict[tuple[int, int, int], tuple[FactorSet, int]]:
    """(id(stack), mode, row) -> (factor set, index)."""
    return {
        (id(span.stack), span.mode, row): (factor_set, span.start + row)
        for factor_set in factor_sets
        for span in factor_set.spans
        for row in range(len(span.stack))
    }


def pack(param_groups: Sequence[dict[str, Any]], groups: Groups) -> dict[str, Any]:
    packed_state: dict[int, Any] = {}
    packed_groups = []
    for settings, (layout, factor_sets) in zip(param_groups, groups, strict=True):
        rows, counts = _rows(layout), _counts(factor_sets)
        first = len(packed_state)
        for i, blocks in enumerate(layout.blocks):
            packed_blocks = []
            for j, block in enumerate(blocks):
                stack, row = rows[i, j]
                owners = [counts[id(stack), mode, row] for mode in range(len(stack.factors))]
                packed_blocks.append(
                    {
                        "start": list(block.start),
                        "shape": list(block.shape),
                        "ready": stack.ready[row],
                        "checks": [s.checks[k] for s, k in owners],
                        "refreshes": [s.refreshes[k] for s, k in owners],
                        "failures": [s.failures[k] for s, k in owners],
                        # Moments share memory with the gradient buffer, and torch.save writes
                        # all of a memory that a view belongs to.
                        **{
                            name: x.clone() if name in stack.state else x
                            for name, x in _tensors(stack, row)
                        },
                    }
                )
            stack, row = rows[i, 0]
            packed_state[first + i] = {"step": stack.steps[row], "blocks": packed_blocks}
        packed = {name: value for name, value in settings.items() if name != "params"}
        packed_groups.append({**packed, "params": list(range(first, first + len(layout.params)))})
    return {"state": packed_state, "param_groups": packed_groups}


@torch.no_grad()
def unpack(
    state_dict: dict[str, Any], param_groups: Sequence[dict[str, Any]], groups: Groups
) -> None:
    """Check everything first, then copy: a bad state_dict changes nothing."""
    saved_groups = state_dict["param_groups"]
    sizes = [len(layout.params) for layout, _ in groups]
    saved_sizes = [len(g["params"]) for g in saved_groups]
    if sizes != saved_sizes:
        raise ValueError(
            f"state_dict has parameter groups of sizes {saved_sizes}, this optimizer {sizes}"
        )
    copies: list[tuple[Tensor, Tensor]] = []
    scalars: list[tuple[Any, int, Any]] = []
    first = 0
    for layout, factor_sets in groups:
        rows, counts = _rows(layout), _counts(factor_sets)
        for i, blocks in enumerate(layout.blocks):
            saved = state_dict["state"][first + i]
            where = f"state_dict, parameter {first + i}"
            shapes = [(list(b.start), list(b.shape)) for b in blocks]
            saved_shapes = [(list(b["start"]), list(b["shape"])) for b in saved["blocks"]]
            if shapes != saved_shapes:
                raise ValueError(
                    f"{where}: blocks (start, shape) {saved_shapes}, this optimizer has {shapes}; "
                    "were the shapes or max_preconditioner_dim changed?"
                )
            for j, block in enumerate(saved["blocks"]):
                stack, row = rows[i, j]
                scalars += [(stack.steps, row, saved["step"]), (stack.ready, row, block["ready"])]
                for name, live in _tensors(stack, row):
                    value = block.get(name)
                    if value is None or value.shape != live.shape:
                        got = "missing" if value is None else f"of shape {tuple(value.shape)}"
                        raise ValueError(
                            f"{where}, block {j}: {name} is {got}, expected {tuple(live.shape)}"
                        )
                    copies.append((live, value))
                for mode in range(len(stack.factors)):
                    factor_set, k = counts[id(stack), mode, row]
                    for name in ("checks", "refreshes", "failures"):
                        scalars.append((getattr(factor_set, name), k, block[name][mode]))
        first += len(layout.params)
    for live, value in copies:
        live.copy_(value)
    for target, index, value in scalars:
        target[index] = value
    for settings, saved in zip(param_groups, saved_groups, strict=True):
        settings.update({k: v for k, v in saved.items() if k != "params"})
