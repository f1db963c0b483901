"""SIGKILL at any write: the same command then gives the unbroken curve."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.faults.test_power_cuts import cell
from tests.harness import fakes
from tests.harness.test_runner import curve

ROOT = Path(__file__).parents[2]


@pytest.mark.faults
def test_sixty_kills_at_writes(tmp_path):
    command = [sys.executable, "-m", "tests.faults.kills", str(tmp_path), "60"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    kills = [json.loads(line) for line in done.stdout.splitlines()]
    assert [kill["killed"] for kill in kills] == [-9] * 60
    assert [kill["resumed"] for kill in kills] == [0] * 60
    whole = fakes.spec_in(tmp_path / "whole").run_dir
    for number in range(60):
        run_dir = fakes.spec_in(tmp_path / f"kill_{number}").run_dir
        assert curve(run_dir) == curve(whole), kills[number]
        assert cell(run_dir) == cell(whole), kills[number]
        leftovers = [p.name for p in run_dir.iterdir() if p.suffix == ".tmp"]
        digests = {p.stem for p in run_dir.glob("*.sha256")}
        assert not leftovers and digests == {"checkpoint_40"}
