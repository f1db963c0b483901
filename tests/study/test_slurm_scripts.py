"""The scripts for Slurm: which tasks, which resources, and what a task does with signals."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from algoperf_shampoo.errors import UserError
from algoperf_shampoo.study import slurm, study

ROOT = Path(__file__).resolve().parents[2]


def full(tmp_path: Path) -> study.Study:
    words = study.Options(size="full", data_dir="/data", out=str(tmp_path / "out"))
    return study.lay_out(ROOT, "table1", words)


def test_an_array_a_number_of_gpus_and_a_task_a_run(tmp_path: Path) -> None:
    made = full(tmp_path)
    options = slurm.Options(partition="a100", limit="4", time="10:00", extra="--exclude='n 1' -v")
    texts = slurm.scripts(made, made.jobs, options, largest=1000)
    assert sorted(texts) == ["table1_full_1gpu.sbatch", "table1_full_4gpu.sbatch"]
    one, four = texts["table1_full_1gpu.sbatch"], texts["table1_full_4gpu.sbatch"]
    assert "#SBATCH --array=0-29%4" in one and "#SBATCH --array=0-2%4" in four
    assert "#SBATCH --gres=gpu:4" in four and "#SBATCH --cpus-per-task=32" in four
    for line in ("--requeue", "--partition=a100", "--time=10:00", "--signal=B:USR1@120", "-v"):
        assert f"#SBATCH {line}\n" in one
    folders = [path for text in texts.values() for _, path in slurm._RUN.findall(text)]
    assert sorted(folders) == sorted(str(job.run.run_dir) for job in made.jobs)
    split = slurm.scripts(made, made.jobs, options, largest=12)
    assert [name for name in split if "1gpu" in name] == [
        f"table1_full_1gpu_{part}.sbatch" for part in (1, 2, 3)
    ]
    for text in [*texts.values(), *split.values()]:
        assert subprocess.run(["bash", "-n"], input=text, text=True).returncode == 0


@pytest.mark.parametrize(
    ("container", "words"),
    [
        ("pyxis", "srun --container-image=IMG --container-mounts=OUT:OUT,/data:/data:ro"),
        ("apptainer", "apptainer exec --nv --bind=OUT:OUT,/data:/data:ro --pwd="),
        ("docker", "docker run --rm --init --ipc=host --env=CUDA_VISIBLE_DEVICES --gpus=all"),
    ],
)
def test_containers_mount_the_folders_under_their_own_names(
    tmp_path: Path, container: str, words: str
) -> None:
    made = full(tmp_path)
    options = slurm.Options(container=container, image="IMG")
    text = slurm.scripts(made, made.jobs, options, largest=1000)["table1_full_1gpu.sbatch"]
    assert words.replace("OUT", str(made.out)) in text
    assert "0) run=(submit-shampoo-grafting WORKLOAD=fastmri SIZE=full " in text
    assert f"OUT={made.out}" in text and "VENV=none" in text


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (slurm.Options(limit="0"), "LIMIT=0"),
        (slurm.Options(container="podman", image="x"), "CONTAINER=podman: there is pyxis"),
        (slurm.Options(container="pyxis"), "IMAGE= is needed"),
    ],
)
def test_refused(options: slurm.Options, words: str) -> None:
    with pytest.raises(UserError, match=words):
        slurm.check(options)


@pytest.mark.parametrize(
    ("number", "requeued"), [(signal.SIGTERM, False), (signal.SIGUSR1, True), (None, False)]
)
def test_a_task_ends_its_run_in_order_and_requeues_at_its_time_limit(
    tmp_path: Path, number: int | None, requeued: bool
) -> None:
    """The script's own shell, with a run that says when it starts and takes its time to end."""
    tool = tmp_path / "scontrol"
    tool.write_text(f'#!/bin/sh\necho "$@" >{tmp_path}/requeued\n')
    tool.chmod(0o755)
    code = (
        "import pathlib, signal, sys, time\n"
        "def end(*_):\n"
        "    time.sleep(.3)\n"
        f"    pathlib.Path({str(tmp_path / 'ended')!r}).touch()\n"
        "    sys.exit(143)\n"
        "signal.signal(signal.SIGTERM, end)\n"
        f"pathlib.Path({str(tmp_path / 'started')!r}).touch()\n"
        f"time.sleep({0.1 if number is None else 60})\n"
    )
    made = full(tmp_path)
    text = slurm.scripts(made, made.jobs[:1], slurm.Options(), 1000)["table1_full_1gpu.sbatch"]
    text = re.sub(r"command=\(.*\)", lambda _: 'command=("$PYTHON" -c "$CODE")', text)
    task = subprocess.Popen(
        ["bash", "-c", text],
        env={
            "PATH": f"{tmp_path}:{os.environ['PATH']}",
            "PYTHON": sys.executable,
            "CODE": code,
            "SLURM_ARRAY_TASK_ID": "0",
            "SLURM_JOB_ID": "77",
        },
    )
    if number is not None:
        while not (tmp_path / "started").exists():
            time.sleep(0.02)
        task.send_signal(number)
    assert task.wait(timeout=60) == (0 if number is None else 143)
    assert (tmp_path / "ended").exists() == (number is not None)
    assert (tmp_path / "requeued").exists() == requeued
    if requeued:
        assert (tmp_path / "requeued").read_text() == "requeue 77\n"
