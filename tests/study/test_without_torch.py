"""A login node has absl and numpy and no torch: plans, previews and scripts need no more."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from algoperf_shampoo import submission
from algoperf_shampoo.harness import submission_loader
from algoperf_shampoo.optim.blocks import partition
from algoperf_shampoo.study import memory

ROOT = Path(__file__).parents[2]
# None in sys.modules: torch is neither imported nor found.
WITHOUT = (
    "import runpy, sys; sys.modules['torch'] = None; del sys.argv[0]; "
    "sys.path.insert(0, 'scripts'); runpy.run_path(sys.argv[0], run_name='__main__')"
)


def script(name: str, *arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-c", WITHOUT, f"scripts/{name}.py", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


def test_a_full_study_is_previewed_to_its_last_script(tmp_path):
    done = script("study", "--study=table3", "--size=full", "--dry_run", f"--out={tmp_path}/o")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len([line for line in lines if line.startswith("make submit-")]) == 106
    assert "cost of 106 runs:" in lines and any("GiB each at the peak" in line for line in lines)
    assert any(line.startswith("in all, at most: ") for line in lines)
    scripts = [line for line in lines if line.endswith("(LAUNCHER=slurm)")]
    assert len(scripts) >= 2 and any("#SBATCH --array=" in line for line in lines)
    assert not (tmp_path / "o").exists()


def test_a_mini_is_planned_and_its_training_refused_in_one_line(tmp_path):
    words = ("--variant=nadamw", "--workload=ogbg", f"--out={tmp_path}/o")
    done = script("submit", *words, "--dry_run")
    assert done.returncode == 0, done.stderr
    assert "nadamw ogbg_mini seed 1 -> " in done.stdout and "no torch in this" in done.stdout
    done = script("submit", *words)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1
    assert "no module torch: pip install -e '.[run]' brings it" in done.stderr
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize("name", ["export", "repeat"])
def test_other_doors(tmp_path, name):
    if name == "export":
        done = script(name, "--variant=eshampoo_adaptive", "--ruleset=self", f"--out={tmp_path}")
        assert done.returncode == 0 and "ogbg: 0.2 of 40 GiB" in done.stdout, done.stderr
    else:
        done = script(name, f"--run={tmp_path}")
        assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr


def test_what_is_read_without_torch_is_what_is_read_with_it(monkeypatch):

    for shape, _ in memory.shapes("fastmri"):
        theirs = memory._partition().cut(shape, 1024)
        assert [block.shape for block in theirs] == [b.shape for b in partition.cut(shape, 1024)]
    with_torch = submission_loader.batch_size(ROOT, "nadamw", "imagenet_vit")
    monkeypatch.setitem(sys.modules, "torch", None)
    assert submission_loader.batch_size(ROOT, "nadamw", "imagenet_vit") == with_torch == 1024
    assert submission.Submission.get_batch_size("imagenet_vit") == 1024
