"""SIGKILL of ranks that share an optimizer's work: the run goes on as if nothing had happened."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.faults
def test_twenty_kills_of_ranks(tmp_path):
    command = [sys.executable, "-m", "tests.faults.rank_kills", str(tmp_path), "20"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    kills = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(kills) == 20
    assert {kill["from"] for kill in kills} >= {None, 4, 8, 12}
    for kill in kills:
        codes = kill["killed"]
        assert codes[kill["victim"]] == -signal.SIGKILL, kill
        # The other one was killed too, or ended of itself.
        assert codes[1 - kill["victim"]] in ((-signal.SIGKILL, 1) if kill["all"] else (1,)), kill
        assert kill["damaged"] == [] and kill["resumed"] == [0, 0], kill
        assert kill["same"] == [[True, True]] * 2, kill
        for other in kill["others"]:
            assert other["same_state"] and other["distance"] < 1e-12, kill
        assert bool(kill["others"]) == (kill["from"] is not None)
