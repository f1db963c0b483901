"""Ctrl-C in the first seconds of a make, as a terminal sends it: to make and all it started."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.study.test_make import ROOT, WHOLE, copy, table, words_of

__all__ = ["copy"]  # a fixture

HELD = subprocess.run(["env", "--block-signal=INT", "true"], capture_output=True).returncode == 0
pytestmark = [
    pytest.mark.faults,
    pytest.mark.skipif(not HELD, reason="this env holds no signals back; Python may answer first"),
]
LINES = (
    r"(installing into venv \(once; extra: run\)\n)?"
    r"(interrupted: [^\n]*the same command[^\n]*\n)?"
)
MAKES = r"(make: [^\n]*\n)*"
MOMENTS = [0.02 * 1.4**k for k in range(16)]  # seconds, up to 3.1


def interrupted(command: list[str], cwd: Path, seconds: float) -> tuple[int, str]:
    """Exit code as a shell has it, and all that was printed.

    A program that make or a shell is just starting can miss it: then, as for a user, a second one
    is needed.
    """
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("MAKE", "MFLAGS"))}
    process = subprocess.Popen(
        command,
        cwd=cwd,
        env=clean,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    time.sleep(seconds)
    for _ in range(2):
        os.killpg(process.pid, signal.SIGINT)
        try:
            printed = process.communicate(timeout=15)[0]
        except subprocess.TimeoutExpired:
            continue
        return 128 - process.returncode if process.returncode < 0 else process.returncode, printed
    raise AssertionError(f"two signals after {seconds} s did not end it")


def test_a_submission_ends_in_one_line_at_any_moment(tmp_path):
    words = ["submit-nadamw", "WORKLOAD=ogbg", "VENV=none", f"PYTHON={sys.executable}"]
    words += [f"OUT={tmp_path}"]
    said = []
    for seconds in MOMENTS:
        code, printed = interrupted(["make", *words, "STEPS=499"], ROOT, seconds)
        # Before make listens it dies silently; "wait: No child processes" is its own, with 2.
        assert code == 130 or (code == 2 and "No child processes" in printed), (seconds, printed)
        # What a run had printed by then is no one's fault.
        tail = re.sub(r"^(nadamw|note: |\n|  ).*\n?", "", printed, flags=re.MULTILINE)
        assert re.fullmatch(LINES + MAKES, tail), (seconds, printed)
        said.append("interrupted: " in printed)
    assert any(said)
    done = subprocess.run(["make", *words, "STEPS=3"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_first_installation_ends_in_one_line_and_the_next_make_works(copy):
    said, seconds = [], 0.02
    while seconds < 60:  # until it had been installed by then
        shutil.rmtree(copy / "venv", ignore_errors=True)
        code, printed = interrupted(words_of(copy), copy, seconds)
        if WHOLE in printed:  # by then, or the signal was missed: make says so after the end
            if code == 0:
                break
            seconds *= 1.25
            continue
        assert code == 130 or (code == 2 and "No child processes" in printed), (seconds, printed)
        assert re.fullmatch(LINES + MAKES, printed), (seconds, printed)
        said.append("installs into venv again" in printed)
        assert not (copy / "venv").exists() or (copy / "venv" / ".ready-run").exists()
        assert table(copy).stdout.endswith(WHOLE)
        seconds *= 1.25
    assert printed.endswith(WHOLE) and any(said)
