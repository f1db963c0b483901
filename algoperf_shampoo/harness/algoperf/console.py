"""Start the runner of one run, show and keep what it prints, and act on what it says."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable
from pathlib import Path

from algoperf_shampoo import interrupt
from algoperf_shampoo.errors import UserError
from algoperf_shampoo.harness import disk
from algoperf_shampoo.harness.algoperf import folder, processes
from algoperf_shampoo.harness.algoperf.command import Command
from algoperf_shampoo.harness.spec import Standing, no_standing

# The runner's line on an evaluation: "Time since start: 9.87s, Step: 20, {'train/loss': nan, ...".
_STEP = re.compile(r"\bStep: (\d+),")
_STRANGE = re.compile(r"'(\w+/(?!num_examples)\w+)': [^,}]*?(-?\b(?:nan|inf)\b)")

HitLine = Callable[[Path, str], str | None]
"""From a run's folder and name the line on its hit, None before; from who can read its log."""


def no_hit_line(run_dir: Path, name: str) -> None:
    """Says of no run that it has hit."""


def run(
    root: Path,
    run_dir: Path,
    name: str,
    command: Command,
    lock: int,
    echo: Callable[[str], None] = print,
    hit_line: HitLine = no_hit_line,
    standing: Standing = no_standing,
) -> processes.Ending:
    """Start it in ``root``, and wait for its end and its children's.

    ``lock`` holds the run's lock. ``echo`` gets what we have to say of the run called ``name``;
    ``hit_line`` is asked at every checkpoint, until it gives a line; ``standing`` at every one.

    Raises:
        UserError: a checkpoint could not be kept.
    """
    hit = hit_line(run_dir, name) is not None

    def say() -> str:
        steps = folder.steps(run_dir)
        then = f"goes on from step {steps[0]}" if steps else "starts it again"
        return f"{name}; the same command {then}"

    with disk.explained(run_dir / folder.CONSOLE):
        log = (run_dir / folder.CONSOLE).open("a", encoding="utf-8")
    diverged = False
    trouble: list[UserError] = []
    with log:

        def on_line(line: str) -> None:
            nonlocal diverged, hit
            # What a runner says that is being ended, after ours, is in the log alone.
            for target in (log,) if interrupt.interrupted() else (log, sys.stdout):
                target.write(line)
                target.flush()
            news = None if diverged else divergence(line)
            if news:
                diverged = True
                echo(f"{name}: {news}: AlgoPerf goes on to the end of the budget")
            if "Saved checkpoint to" in line and not trouble:
                try:
                    folder.keep_checkpoint(run_dir)
                except UserError as error:
                    trouble.append(error)
            if "Saved checkpoint to" in line and not hit:
                words = hit_line(run_dir, name)
                hit = words is not None
                if words:
                    echo(words)
            if "Saved checkpoint to" in line and (words := standing(run_dir, name)):
                echo(words)

        environment = {**os.environ, "TF_CPP_MIN_LOG_LEVEL": "2", **command.environment}
        ending = processes.run(command.arguments, root, environment, lock, on_line, say)
    if trouble:
        raise trouble[0]
    return ending


def divergence(line: str) -> str | None:
    """What a line of the runner about an evaluation says that is not finite, None if nothing."""
    step, strange = _STEP.search(line), _STRANGE.search(line)
    if not (step and strange):
        return None
    return f"diverged: {strange[1]} is {strange[2]} at step {step[1]}"
