"""What the records of the acceptance runs begin with: which sources, on what, by which command."""

from __future__ import annotations

import datetime
import os
import platform
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

from algoperf_shampoo.harness.algoperf import env

ROOT = Path(__file__).resolve().parents[2]
CODE = ("Makefile", "algoperf_shampoo", "scripts", "search_spaces", "submissions", "tests")
# Options that name places of one machine, and what a record says instead.
PLACES = {"--data": "DATA", "--work": "WORK", "--out": "OUT"}


def of_this_run() -> dict[str, Any]:
    """Sources, command, versions, machine and time, for a JSON record: asked before what is run."""
    found = env.look(ROOT)
    return {
        **sources(),
        "command": command(sys.argv),
        "environment": {k: os.environ[k] for k in SIZES if k in os.environ},
        "torch": found.torch,
        "algoperf": found.algoperf,
        "python": found.python,
        "machine": f"{os.cpu_count()} CPUs, {platform.system()} {platform.machine()}",
        "started": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def sources() -> dict[str, Any]:
    """Commit, and the files of code that differ from it."""
    return {
        "commit": git("rev-parse", "HEAD").strip(),
        "uncommitted": git("status", "--porcelain", "--", *CODE).splitlines(),
    }


# Environment variables that make a model smaller than the workload's.
SIZES = ("VIT_VARIANT", "FASTMRI_CHANNELS")


def command(arguments: list[str]) -> str:
    """The command line, without the places of this machine.

    >>> command(["x/kill_acceptance.py", "--data", "/a", "--out=/b", "--whom=group"])
    'python -m tests.algoperf.kill_acceptance --data=DATA --out=OUT --whom=group'
    """
    tool, *rest = arguments
    words = [f"tests.algoperf.{Path(tool).stem}"]
    pending = None
    for argument in rest:
        if pending is not None:
            words.append(f"{pending}={PLACES[pending]}")
            pending = None
        elif argument in PLACES:
            pending = argument
        else:
            name, equals, _ = argument.partition("=")
            words.append(f"{name}={PLACES[name]}" if equals and name in PLACES else argument)
    return shlex.join(["python", "-m", *words])


def git(*arguments: str) -> str:
    """Output of git, asked about these sources."""
    whole = ["git", "-C", str(ROOT), *arguments]
    return subprocess.run(whole, capture_output=True, text=True, check=True).stdout
