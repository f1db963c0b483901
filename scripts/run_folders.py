"""RUNS=, as every script that reads runs takes it."""

from __future__ import annotations

import sys

from absl import flags
from command_line import ROOT

from algoperf_shampoo import paths, versions
from algoperf_shampoo.errors import UserError
from algoperf_shampoo.study import logs

_RUNS = flags.DEFINE_string("runs", "results/runs", "Folders of runs, comma-separated.")

_VERSION = flags.DEFINE_string("version", None, "Runs of one version of AlgoPerf alone.")


def are_default() -> bool:
    """Whether no other folders, nor a part of the runs, were asked for."""
    return bool(flags.FLAGS["runs"].using_default_value) and version() is None


def version() -> str | None:
    """The version of AlgoPerf whose runs alone are wanted, None for all.

    Raises:
        UserError: there is no such version.
    """
    if _VERSION.value is not None and _VERSION.value not in versions.NAMES:
        raise UserError(f"VERSION={_VERSION.value}: there is {', '.join(versions.NAMES)}")
    return _VERSION.value


def read() -> list[logs.Trial]:
    """Every run in the folders; what is left out is noted on the terminal.

    Raises:
        UserError: a folder that was asked for does not exist or has no name, or no such version.
    """
    wanted = version()
    folders = paths.listed("RUNS", _RUNS.value, ROOT)
    # Before the first run the default folder does not exist: there are no runs yet.
    default = bool(flags.FLAGS["runs"].using_default_value)
    found = logs.find_trials(
        (folder for folder in folders if folder.exists() or not default),
        lambda note: print(f"note: {note}", file=sys.stderr),
    )
    if wanted is None:
        return found
    # Where a log does not say which of two it is, it is of either: "v0.5 or v0.6".
    kept = [trial for trial in found if wanted in trial.version.split(" or ")]
    if len(kept) < len(found):
        print(f"note: VERSION={wanted}: {len(found) - len(kept)} other runs are left out")
    return kept
