"""The state of a study as text: a line a run, with its progress, and the sums above."""

from __future__ import annotations

import shutil
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from algoperf_shampoo.harness.progress import duration
from algoperf_shampoo.harness.spec import RunSpec
from algoperf_shampoo.study import progress, standing
from algoperf_shampoo.study.progress import Progress
from algoperf_shampoo.study.standing import Rival

QUEUED = "queued"
ORDER = (
    progress.RUNNING, QUEUED, progress.FAILED, progress.DAMAGED, progress.OTHER, progress.STOPPED,
    progress.MISSING, progress.DONE,
)  # fmt: skip
_NOT_COUNTED = (progress.DAMAGED, progress.OTHER)
_BAR = 12


def look(
    runs: Sequence[RunSpec],
    queue: Mapping[Path, str] | None = None,
    rivals: Mapping[Path, Rival] | None = None,
    compare: bool = True,
) -> list[tuple[RunSpec, Progress]]:
    """How each run is now.

    ``queue`` are jobs of a scheduler that wait or start, by run folder: what they are, in words. A
    run that is neither done nor held by a process is then "queued". ``rivals``: what a run is to
    stand against, by its folder. ``compare``: a folder is to hold the very run that is named, not
    only some run.
    """
    found = []
    for run in runs:
        now = progress.of(run.run_dir, run if compare else None)
        waiting = (queue or {}).get(run.run_dir)
        if waiting and not now.over and now.state != progress.RUNNING:
            now = Progress(**{**vars(now), "state": QUEUED, "note": waiting})
        rival = (rivals or {}).get(run.run_dir)
        stands = None
        if rival and now.step is not None and now.state not in _NOT_COUNTED:
            stands = standing.of(run.run_dir, rival)
        if stands:
            now = Progress(**{**vars(now), "standing": stands.short()})
        found.append((run, now))
    return found


def unlaunchable(found: Sequence[tuple[RunSpec, Progress]]) -> list[str]:
    """A line for each run that is over and not counted: to launch it would train nothing."""
    return [
        f"{run.name}: {now.state}: {now.note}; put back a copy, set OUT= to another folder, or "
        f"remove {run.run_dir}"
        for run, now in found
        if now.over and now.state in _NOT_COUNTED
    ]


def render(
    title: str,
    found: Sequence[tuple[RunSpec, Progress]],
    width: int = 100,
    height: int | None = None,
) -> str:
    """The table.

    ``height`` cuts the list of runs to so many lines in all, those that are under way first; None
    shows every run.
    """
    counts = Counter(now.state for _, now in found)
    hits = sum(1 for _, now in found if now.hit_step is not None)
    sums = [f"{counts[state]} {state}" for state in reversed(ORDER) if counts[state]]
    left = _together(found)
    lines = [title, f"{len(found)} runs: {', '.join(sums)}; {hits} hits{left}", ""]
    shown = list(found)
    if height is not None and len(found) > (room := max(1, height - len(lines) - 2)):
        shown = sorted(found, key=lambda pair: ORDER.index(pair[1].state))[:room]
    names = max((len(run.name) for run, _ in shown), default=0)
    for run, now in shown:
        line = _line(run, now, names)
        if len(line) > width:  # the figures say more than the metric's name
            line = _line(run, now, names, metric=False)
        lines.append(line[:width].rstrip())
    if len(shown) < len(found):
        lines.append(f"... and {len(found) - len(shown)} more")
    return "\n".join(lines)


def watch(
    title: str,
    look_now: Callable[[], list[tuple[RunSpec, Progress]]],
    seconds: float,
    out: Callable[[str], None] = lambda text: print(text, end="", flush=True),
) -> None:
    """Draw the table again every ``seconds`` until no run is under way or waiting."""
    while True:
        found = look_now()
        size = shutil.get_terminal_size((100, 40))
        # Home, then each line to its end and what is below: without a flicker.
        text = render(title, found, size.columns, size.lines)
        out("\x1b[H" + text.replace("\n", "\x1b[K\n") + "\x1b[K\n\x1b[J")
        if not any(now.state in (progress.RUNNING, QUEUED) for _, now in found):
            return
        time.sleep(seconds)


def live() -> bool:
    """Whether the table can be drawn again in place."""
    return sys.stdout.isatty()


def _line(run: RunSpec, now: Progress, width: int, metric: bool = True) -> str:
    words = [run.name.ljust(width), now.state.ljust(7)]
    if now.fraction is not None and now.state != progress.DONE:
        full = round(_BAR * now.fraction)
        words.append(f"[{'#' * full}{'.' * (_BAR - full)}] {100 * now.fraction:3.0f}%")
    if now.step is not None:
        words.append(f"step {now.step}")
    if now.standing:
        words.append(f"({now.standing})")
    if now.value is not None and now.target is not None:
        name = f"{now.metric} " if metric else ""
        words.append(f"{name}{now.value:.4f} of {now.target:.4f}")
    if now.hit_step is not None:
        words.append(f"hit at step {now.hit_step}, {now.hit_seconds:.1f} s")
    elif now.state == progress.DONE:
        words.append("miss")
    if now.seconds_left is not None and now.state == progress.RUNNING:
        words.append(f"at most {duration(now.seconds_left)} left")
    if now.note:
        words.append(f"({now.note})")
    return "  ".join(words)


def _together(found: Sequence[tuple[RunSpec, Progress]]) -> str:
    """What is running now, until the last of it ends."""
    left = [now.seconds_left for _, now in found if now.state == progress.RUNNING]
    known = [seconds for seconds in left if seconds is not None]
    return f"; those running end in at most {duration(max(known))}" if known else ""
