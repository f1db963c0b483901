"""``make test-slurm``: the acceptance on a real Slurm, with the record that it leaves."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slurm
def test_a_disturbed_study_ends_as_an_unbroken_one(tmp_path: Path) -> None:
    out = tmp_path / "result.json"
    command = [sys.executable, "tests/slurm/acceptance.py", f"--work={tmp_path}", f"--out={out}"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment)
    assert done.returncode == 0
    assert json.loads(out.read_text())["good"]
