"""RUNS=, as every script that reads runs takes it."""

from __future__ import annotations

import sys

from absl import flags
from command_line import ROOT

from algoperf_shampoo import paths
from algoperf_shampoo.study import logs

_RUNS = flags.DEFINE_string("runs", "results/runs", "Folders of runs, comma-separated.")


def are_default() -> bool:
    """Whether no other folders were asked for."""
    return bool(flags.FLAGS["runs"].using_default_value)


def read() -> list[logs.Trial]:
    """Every run in the folders; what is left out is noted on the terminal.

    Raises:
        UserError: a folder that was asked for does not exist.
    """
    whole = paths.given("RUNS", _RUNS.value, ROOT)  # a folder's name may have a comma in it
    names = [_RUNS.value] if whole.is_dir() else _RUNS.value.split(",")
    folders = [paths.given("RUNS", name, ROOT) for name in names]
    # Before the first run the default folder does not exist: there are no runs yet.
    return logs.find_trials(
        (folder for folder in folders if folder.exists() or not are_default()),
        lambda note: print(f"note: {note}", file=sys.stderr),
    )
