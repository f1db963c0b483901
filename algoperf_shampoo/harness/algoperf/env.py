"""The Python environment that AlgoPerf is installed in, seen from the launcher."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from algoperf_shampoo import paths
from algoperf_shampoo.errors import UserError
from algoperf_shampoo.harness.algoperf import probe

COMMIT = "2c90454fc05d5bdf3598b0c7651e611f132a7060"
HOW_TO_INSTALL = "run `make algoperf-env` (docs/algoperf.md), or set ALGOPERF_PYTHON="
PYTHON_VARIABLE = "ALGOPERF_PYTHON"
FOLDER = ".venv-algoperf"


@dataclass(frozen=True)
class Environment:
    """What :mod:`.probe` found. ``gpus`` are names, one per GPU that torch sees there."""

    executable: str
    python: str
    torch: str | None
    cuda: str | None
    algoperf: str | None
    algoperf_commit: str | None
    missing: tuple[str, ...]
    gpus: tuple[str, ...]
    wandb: bool
    psutil_knows_machine: bool
    checkpoints: dict[str, dict[str, Any]] = field(hash=False)


def executable(root: Path) -> str:
    """Python to run AlgoPerf with: ``ALGOPERF_PYTHON``, ``.venv-algoperf``, or this one."""
    named = os.environ.get(PYTHON_VARIABLE)
    if named:
        path = paths.given(PYTHON_VARIABLE, named, root)
        if not path.is_file() or not os.access(path, os.X_OK):
            raise UserError(f"{PYTHON_VARIABLE}={named}: no such program")
        return str(path.absolute())  # not resolved: a venv's python is a link
    own = root / FOLDER / "bin" / "python"
    return str(own) if own.is_file() else sys.executable


def look(root: Path, checkpoints: Sequence[Path] = ()) -> Environment:
    """Probe that Python, and the given checkpoints with it.

    Raises:
        UserError: it cannot run the probe.
    """
    python = executable(root)
    command = [python, "-m", probe.__name__, *map(str, checkpoints)]
    done = subprocess.run(
        command,
        cwd=root,
        env={**os.environ, "PYTHONPATH": python_path(root)},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith(probe.MARK)]
    if done.returncode or not lines:
        words = (done.stderr.strip().splitlines() or ["no output"])[-1]
        raise UserError(f"{python}: cannot look at this Python ({words}); {HOW_TO_INSTALL}")
    facts = json.loads(lines[-1][len(probe.MARK) :])
    return Environment(
        executable=python,
        python=facts["python"],
        torch=facts["torch"],
        cuda=facts["cuda"],
        algoperf=facts["algoperf"],
        algoperf_commit=facts["algoperf_commit"],
        missing=tuple(facts["missing"]),
        gpus=tuple(facts["gpus"]),
        wandb=facts["wandb"],
        psutil_knows_machine=facts["psutil_knows_machine"],
        checkpoints={entry["path"]: entry for entry in facts["checkpoints"]},
    )


def python_path(root: Path) -> str:
    """PYTHONPATH with ``root`` first: the submissions are imported from there, by relative path."""
    rest = os.environ.get("PYTHONPATH")
    return f"{root}{os.pathsep}{rest}" if rest else str(root)


def missing_message(environment: Environment) -> str | None:
    """One line on what AlgoPerf's environment lacks, None if nothing."""
    if not environment.missing:
        return None
    lacks = ", ".join(environment.missing)
    return f"{environment.executable}: no {lacks}: {HOW_TO_INSTALL}"
