"""Every export's pull request through the JavaScript of submissions_algorithms' two workflows.

``SUBMISSIONS_ALGORITHMS=... NODE_PATH=... python -m tests.algoperf.workflow_acceptance --out FILE``
runs ``test_pull_request.py``, which is skipped where node, js-yaml or a copy of their repository is
missing: here that is a failure. The record has the outcome for each variant and ruleset.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.algoperf import provenance

FILE = Path(__file__).with_name("test_pull_request.py")
TEST = "test_their_workflows_take_the_text_and_write_the_exported_folder"
WANTED = "wanted: SUBMISSIONS_ALGORITHMS= (a copy of their repository), node, js-yaml (NODE_PATH=)"


class Outcomes:
    """A plugin of pytest's that keeps how each case went."""

    def __init__(self) -> None:
        self.of: dict[str, str] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        name = report.nodeid.partition(f"{TEST}[")[2].rstrip("]")
        if name and (report.when == "call" or report.outcome != "passed"):
            self.of[name] = report.outcome


def versions() -> dict[str, str | None]:
    """Of node, js-yaml, and the commit of the workflows; None where one is missing."""
    place = Path(os.environ.get("SUBMISSIONS_ALGORITHMS", ""))
    yaml = "console.log(require('js-yaml/package.json').version)"
    whole = place / ".git"
    git = ["git", f"--git-dir={whole if whole.exists() else place}"]
    return {
        "node": said("node", "--version"),
        "js_yaml": said("node", "-e", yaml),
        "submissions_algorithms": said(*git, "rev-parse", "HEAD"),
    }


def said(*command: str) -> str | None:
    """What a command printed, None if it failed."""
    if shutil.which(command[0]) is None:
        return None
    done = subprocess.run(command, capture_output=True, text=True)
    return done.stdout.strip() if done.returncode == 0 else None


def main() -> int:
    """Run them; 1 if one fails or is skipped."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    found = {**provenance.of_this_run(), **versions()}
    outcomes = Outcomes()
    pytest.main(["-q", "-p", "no:cacheprovider", str(FILE), "-k", TEST], plugins=[outcomes])
    record = {
        "what": "pull requests of exports through validate_pr.yml and sync_submission.yml",
        **found,
        "cases": outcomes.of,
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(record, indent=1) + "\n")
    good = bool(outcomes.of) and set(outcomes.of.values()) == {"passed"}
    if not good:
        print(f"not all passed: {outcomes.of}; {WANTED}", file=sys.stderr)
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
