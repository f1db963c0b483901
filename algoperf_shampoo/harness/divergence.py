"""Whether a run's loss is still a number."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any


class Watch:
    """Looks at losses when they are read, off the clock, and says what is not finite.

    A run has diverged when, at the time its losses are read, the last training loss or a loss or
    metric of the evaluation is inf or NaN. Single losses that are not finite are said, no more. So
    has one whose optimizer gives up, because gradients are not finite in so many steps in a row:
    then losses may be finite, and are read only at the next evaluation.
    """

    def __init__(self, metric: str, diverged_at_step: int | None = None) -> None:
        self.metric = metric
        self.diverged_at_step = diverged_at_step
        """The first step of those, up to now, whose loss is not finite, or that in which the
        optimizer gave up; None if the loss is finite and it did not."""
        self._given_up = False

    def look(
        self, step: int, losses: list[tuple[int, float]], evaluation: Mapping[str, Any]
    ) -> str | None:
        """Take in the (step, loss) pairs since the last look; a line if there is news.

        Args:
            evaluation: the results at ``step``, empty if there was none.
        """
        strange = self._strange(losses, evaluation)
        if strange:
            if self.diverged_at_step is not None:
                return None
            first = _first_of_the_last(losses)
            self.diverged_at_step = step if first is None else first
            what, value = next(iter(strange.items()))
            return f"diverged at step {self.diverged_at_step}: {what} is {value} at step {step}"
        if self._given_up or (not losses and not evaluation):
            return None
        before, self.diverged_at_step = self.diverged_at_step, None
        bad = [at for at, loss in losses if not math.isfinite(loss)]
        if bad and before is None:
            steps = f"{len(bad)} step{'s' * (len(bad) > 1)} (first: {bad[0]})"
            return f"the training loss was not finite at {steps} and is again"
        return None if before is None else f"finite again at step {step}"

    @contextmanager
    def giving_up(self, name: str, step: int, say: Callable[[str], None]) -> Iterator[None]:
        """Around a call of the submission for a step, which is complete also where its optimizer
        gives up: that is a FloatingPointError."""
        try:
            yield
        except FloatingPointError as error:
            self._given_up = True
            if self.diverged_at_step is None:
                self.diverged_at_step = step
                say(f"{name}: diverged at step {step}: {error}")

    def _strange(
        self, losses: list[tuple[int, float]], evaluation: Mapping[str, Any]
    ) -> dict[str, float]:
        found = {"training loss": losses[-1][1]} if losses else {}
        wanted = ("/loss", f"/{self.metric}")
        found |= {key: value for key, value in evaluation.items() if key.endswith(wanted)}
        return {key: value for key, value in found.items() if not math.isfinite(value)}


def _first_of_the_last(losses: list[tuple[int, float]]) -> int | None:
    """The first step of the unbroken run of losses at the end that are inf or NaN; None if none."""
    first = None
    for step, loss in reversed(losses):
        if math.isfinite(loss):
            break
        first = step
    return first
