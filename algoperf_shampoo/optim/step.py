"""What a step asks now and then: whose first it is, and which threshold holds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from .blocks.layout import Stack
from .group import Group
from .ops import Hyper, Operations, State
from .rule import Rule


def by_tau(
    options: Mapping[str, Any], stacks: Sequence[Stack], due: dict[int, list[int]]
) -> dict[float, dict[int, list[int]]]:
    """The rows that are ``due`` by the threshold that holds for them: tau, and after their step
    number tau_switch tau_later."""
    tau, switch = options.get("tau", 0.0), options.get("tau_switch")
    if switch is None:
        return {tau: due}
    found: dict[float, dict[int, list[int]]] = {}
    for stack in stacks:
        for row in due[id(stack)]:
            now = tau if stack.steps[row] <= switch else options["tau_later"]
            found.setdefault(now, {}).setdefault(id(stack), []).append(row)
    return found


def starting(group: Group, present: Sequence[bool]) -> list[bool]:
    """Which parameters with a gradient are of a rule that ``starts``, and have not started."""
    late = [False] * len(present)
    stacks = [s for rule, mine in group.rules if rule.starts for s in mine]
    stacks += [s for s in group.layout.others if s.factors]
    if all(all(s.ready) for s in stacks):
        return late
    for stack in stacks:
        for member, ready in zip(stack.members, stack.ready, strict=True):
            late[member.param] |= present[member.param] and not ready
    return late


def begin(rule: Rule, stacks: list[Stack], h: Hyper, ops: Operations) -> None:
    state = State(stacks, rule.orthogonal)
    rule.start(ops.gradients(stacks, kept=True), state, h, ops)
