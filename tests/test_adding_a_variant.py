"""README, "Adding a variant", done in a copy of the repository: the folder is enough for the tests'
battery, help, tables, a run and an export. No list of variants stands anywhere else."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from algoperf_shampoo.harness import seal
from algoperf_shampoo.optim import EShampoo
from algoperf_shampoo.study import export, logs, tables

from .optim import support

ROOT = Path(__file__).resolve().parents[1]
COPIED = ("submissions", "search_spaces", "workloads_config", "scripts", "tests/optim")
FILES = ("Makefile", "pyproject.toml", "README.md", "LICENSE", "tests/conftest.py")
ALL = re.compile(r"^from .support import .*?(?:VARIANTS|PRECONDITIONED)", re.MULTILINE | re.DOTALL)
LOG = ROOT / "results/measured/mini/seeds/eshampoo_adaptive/study_1/ogbg_mini_pytorch"


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The repository's code, with the variant ``mine`` made as README says, tau in its module."""
    root = tmp_path_factory.mktemp("copy")
    ignore = shutil.ignore_patterns("__pycache__", "*.npz")
    for name in (*COPIED, "algoperf_shampoo"):
        shutil.copytree(ROOT / name, root / name, ignore=ignore)
    for name in FILES:
        shutil.copy(ROOT / name, root / name)
    (root / "tests/__init__.py").touch()
    (root / "results").symlink_to(ROOT / "results")
    readme = (ROOT / "README.md").read_text(encoding="utf-8").partition("## Adding a variant")[2]
    commands = re.findall(r"^    (cp .*)$", readme, flags=re.MULTILINE)
    assert len(commands) == 3
    for command in commands:
        subprocess.run(command, shell=True, cwd=root, check=True)
    module = root / "submissions/mine/submission.py"
    text = module.read_text(encoding="utf-8")
    assert text.count("tau=point.tau") == 1
    module.write_text(text.replace("tau=point.tau", "tau=0.25"), encoding="utf-8")
    return root


def run(root: Path, *arguments: str) -> str:
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("MAKE", "MFLAGS"))}
    done = subprocess.run(
        arguments,
        cwd=root,
        env={**environment, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


def test_it_is_in_every_test_of_all_variants(root: Path) -> None:
    """Tests that name their variants have reasons of their own."""
    pytest_ = (sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-m", "")
    files = sorted((root / "tests/optim").glob("test_*.py"))
    asks = [path for path in files if ALL.search(path.read_text(encoding="utf-8"))]
    assert len(asks) > 5
    collected = run(root, *pytest_, "--collect-only", *map(str, asks)).splitlines()
    tests = [line for line in collected if "::" in line]
    of: dict[str, Counter[str]] = {name: Counter() for name in ("mine", "eshampoo_fixed", "soap")}
    for line in tests:
        name, _, values = line.partition("[")
        for variant, found in of.items():
            if variant in values.rstrip("]").split("-"):
                found[name] += 1
    everywhere = {name for name in of["eshampoo_fixed"] if name in of["soap"]}
    assert len(everywhere) > 25
    assert {name: of["mine"][name] for name in everywhere} == {
        name: of["eshampoo_fixed"][name] for name in everywhere
    }
    mine = support.of_submissions(root)["mine"]
    assert mine.build is EShampoo and mine.settings["tau"] == 0.25
    assert support.of_submissions(root).keys() - support.VARIANTS.keys() == {"mine"}


def test_it_is_in_help_and_can_be_run(root: Path) -> None:
    assert "  mine\n" in run(root, "make", "--no-print-directory", "help")
    words = ("WORKLOAD=ogbg", "DRY_RUN=1", "F=7", "VENV=none", f"PYTHON={sys.executable}")
    lines = run(root, "make", "--no-print-directory", "submit-mine", *words)
    assert "mine_F7/study_1/ogbg_mini_pytorch/trial_1" in lines


def test_its_rows_in_tables_say_how_its_point_differs(root: Path, tmp_path: Path) -> None:
    place = tmp_path / "mine_F2" / "study_1" / LOG.name
    shutil.copytree(LOG, place)
    [space] = json.loads((root / "search_spaces/mini/mine.json").read_text())
    point = json.dumps({**space, "precondition_frequency": 2})
    (place / "trial_1/hparams.json").write_text(point)
    record = json.loads((place / "trial_1/run.json").read_text())
    record["identity"] |= {"variant": "mine", "label": "mine_F2"}
    (place / "trial_1/run.json").write_text(json.dumps(seal.signed(record)))
    mini, _ = tables.table1(logs.find_trials([tmp_path]), root)
    [row] = [row for row in mini.rows if row.runs]
    assert row.name == "mine (F = 2 (10), tau = 0.1)"


def test_it_is_exported(root: Path, tmp_path: Path) -> None:
    folder = export.export(root, "mine", tmp_path)
    assert "tau=0.25" in (folder / "submission.py").read_text()
    assert (folder / "algorithm/optim/eshampoo.py").is_file()
