"""What an optimizer tells of itself between steps."""

from __future__ import annotations

import math
from collections.abc import Iterable

from .blocks.factors import FactorSet
from .nonfinite import NonFiniteGradientError, Skipped
from .saving import Saving
from .sharding import Comparison


class Reports(Saving):
    """Counts and checks; most of them wait for the device."""

    def skipped_gradients(self) -> dict[int, Skipped]:
        """Parameters whose gradients were not finite, or not below :data:`.nonfinite.BOUND`, and
        how often, since the optimizer was made in this process. Waits for the device."""
        counts = [c for group in self._groups for c in group.guard.counts()]
        return {number: c for number, c in enumerate(counts) if c.total}

    def check_gradients(self) -> None:
        """
        Raises:
            NonFiniteGradientError: parameters have had ``nonfinite_limit`` bad gradients in a row
                (or more). The state is that of a complete step, and may be stepped on or saved.
        """
        first, found = 0, []
        for options, group in zip(self.param_groups, self._groups, strict=True):
            limit = options.get("nonfinite_limit", math.inf)
            for number, c in enumerate(group.guard.counts(), first):
                if c.in_a_row >= limit:
                    found.append(f"parameter {number} {c.in_a_row} (of {c.total} in all)")
            first += len(group.layout.params)
        if found:
            more = f" and {len(found) - 5} parameters more" if len(found) > 5 else ""
            raise NonFiniteGradientError(
                "gradients not finite, or too large, in so many steps in a row: "
                f"{', '.join(found[:5])}{more}; weights of those stay as they are"
            )

    def replicas_differ(self) -> tuple[int, bool]:
        """At how many comparisons since the last call the replicas of ``process_group`` had other
        gradients, by a bit, and whether their parameters or step counts differ now (as when not all
        have loaded a state). All of them must call it."""
        if self.process_group is None:
            return 0, False
        held = [p for group in self._groups for p in group.layout.params]
        held += [group.layout.step_counts for group in self._groups]
        return self._comparison.read(), Comparison.held(held, self.process_group)

    def factor_sets(self, everywhere: bool = False) -> Iterable[FactorSet]:
        """All factor sets that this rank keeps, for telemetry and tests.

        everywhere: and those of other ranks, whose counters are as of the last
        :meth:`gather_counters`, and whose tensors have no memory.
        """
        for group in self._groups:
            yield from group.factor_sets
            if everywhere:
                yield from group.state.others
