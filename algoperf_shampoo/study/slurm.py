"""Launch a study on Slurm: job arrays, a task a run, that come back when they are preempted.

``sbatch`` scripts are written and submitted as they are, so that a cluster's users can read, change
and submit them by hand; submitit would hide them in pickles and have to be installed on the login
node. Which runs wait is asked of Slurm itself, from the scripts that it keeps.

A task is one run: ``scripts/submit.py`` with its flags, or ``make`` in a container. SIGTERM
(preemption, ``scancel``) is passed on to it, and Slurm requeues what it preempts or loses with a
node. SIGUSR1 comes two minutes before the time limit: the task ends its run in order and puts
itself back into the queue. The run then goes on from its last checkpoint.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from algoperf_shampoo.errors import UserError
from algoperf_shampoo.study.local import HIDDEN
from algoperf_shampoo.study.study import Job, Study

CONTAINERS = ("pyxis", "apptainer", "docker")
IN_IMAGE = "/opt/algoperf-shampoo"
_GRACE = 120  # seconds before the time limit
_CPUS_PER_GPU = 8
_RUN = re.compile(r"^# run (\d+) (.+)$", re.MULTILINE)


@dataclass(frozen=True)
class Options:
    """Words for Slurm, as ``sbatch`` takes them; None: the cluster's default.

    ``limit`` is how many tasks of an array run at once; ``extra`` further flags of ``sbatch``;
    ``container`` one of :data:`CONTAINERS`, with its ``image``.
    """

    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    time: str | None = None
    mem: str | None = None
    cpus: str | None = None
    limit: str | None = None
    extra: str | None = None
    container: str | None = None
    image: str | None = None


def check(options: Options) -> None:
    """Refuse what does not fit together.

    Raises:
        UserError: naming the word and what would be right.
    """
    for word, value in (("LIMIT", options.limit), ("CPUS", options.cpus)):
        if value is not None and not (value.isascii() and value.isdecimal() and int(value) > 0):
            raise UserError(f"{word}={value}: an integer of at least 1")
    if options.container is not None and options.container not in CONTAINERS:
        raise UserError(f"CONTAINER={options.container}: there is {', '.join(CONTAINERS)}")
    if options.container is not None and not options.image:
        raise UserError(f"CONTAINER={options.container}: IMAGE= is needed: its file or name")


def scripts(study: Study, jobs: Sequence[Job], options: Options, largest: int) -> dict[str, str]:
    """Array scripts by file name: one for each number of GPUs, split at ``largest`` tasks."""
    groups: dict[int, list[Job]] = {}
    for job in jobs:
        groups.setdefault(job.gpus or 0, []).append(job)
    made = {}
    for gpus, group in sorted(groups.items()):
        for start in range(0, len(group), largest):
            part = f"_{start // largest + 1}" if len(group) > largest else ""
            name = f"{study.name}_{study.size}_{gpus}gpu{part}.sbatch"
            made[name] = _script(study, group[start : start + largest], gpus, options)
    return made


def submit(
    study: Study, jobs: Sequence[Job], options: Options, echo: Callable[[str], None]
) -> list[str]:
    """Write the scripts and give them to ``sbatch``; the array jobs' numbers.

    Raises:
        UserError: no Slurm here, or it refuses a script.
    """
    check(options)
    if shutil.which("sbatch") is None:
        raise UserError("LAUNCHER=slurm: no sbatch here; DRY_RUN=1 shows the scripts")
    folder = study.out / HIDDEN / "slurm"
    folder.mkdir(parents=True, exist_ok=True)
    numbers = []
    for name, text in scripts(study, jobs, options, _largest_array()).items():
        path = folder / name
        path.write_text(text, encoding="utf-8")
        done = _slurm("sbatch", "--parsable", str(path))
        if done is None or done.returncode:
            words = " ".join(done.stderr.split()) if done else "no answer"
            raise UserError(f"{path}: sbatch: {words}")
        number = done.stdout.strip().split(";")[0]
        tasks = len(_RUN.findall(text))
        echo(f"Slurm job {number}: {tasks} run{'s' * (tasks > 1)}, {path}")
        numbers.append(number)
    return numbers


def queue() -> dict[Path, str]:
    """Run folders of tasks that Slurm has waiting or running for us, with what it says of them.

    Empty without Slurm, or when it does not answer: then a run's lock still keeps others out.
    """
    if shutil.which("squeue") is None:
        return {}
    user = os.environ.get("USER") or str(os.getuid())
    done = _slurm("squeue", "--noheader", "--array", f"--user={user}", "--format=%A|%F|%K|%T|%r")
    if done is None or done.returncode:
        return {}
    found: dict[Path, str] = {}
    known: dict[str, dict[str, str]] = {}
    for line in done.stdout.splitlines():
        job, array, task, state, reason = [word.strip() for word in line.split("|", 4)]
        if array not in known:
            kept = _slurm("scontrol", "write", "batch_script", job, "-")
            known[array] = dict(_RUN.findall(kept.stdout)) if kept and not kept.returncode else {}
        if task in known[array]:
            why = f", {reason}" if reason not in ("", "None") else ""
            found[Path(known[array][task])] = f"Slurm {array}_{task} {state.lower()}{why}"
    return found


def _script(study: Study, jobs: Sequence[Job], gpus: int, options: Options) -> str:
    check(options)
    logs = study.out / HIDDEN / "slurm"
    cpus = options.cpus or str(max(1, _CPUS_PER_GPU * gpus))
    throttle = f"%{options.limit}" if options.limit else ""
    flags = {
        "job-name": f"shampoo-{study.name}",
        "array": f"0-{len(jobs) - 1}{throttle}",
        "nodes": "1",
        "ntasks": "1",
        "cpus-per-task": cpus,
        "gres": f"gpu:{gpus}" if gpus else None,
        "partition": options.partition,
        "account": options.account,
        "qos": options.qos,
        "time": options.time,
        "mem": options.mem,
        "signal": f"B:USR1@{_GRACE}",
        "output": f"{logs}/%A_%a.log",
    }
    lines = ["#!/bin/bash", f"# {study.title}: {len(jobs)} runs, SIZE={study.size}"]
    lines += [f"#SBATCH --{name}={value}" for name, value in flags.items() if value is not None]
    lines += ["#SBATCH --requeue", "#SBATCH --open-mode=append"]
    lines += [f"#SBATCH {flag}" for flag in shlex.split(options.extra or "")]
    lines += ["", *(f"# run {index} {job.run.run_dir}" for index, job in enumerate(jobs))]
    lines += ["case $SLURM_ARRAY_TASK_ID in"]
    for index, job in enumerate(jobs):
        lines.append(f"{index}) run=({shlex.join(_arguments(job, options))}) ;;")
    lines += ["esac", f"command=({_command(study, jobs[0], options)})", _BODY]
    return "\n".join(lines)


_BODY = """\
end() { kill -TERM "$child" 2>/dev/null; }
trap end TERM INT
trap 'again=1; end' USR1
"${command[@]}" "${run[@]}" &
child=$!
# A trap ends a wait early: wait until the run itself has ended.
while :; do
    wait "$child"
    code=$?
    kill -0 "$child" 2>/dev/null || break
done
if [ -n "$again" ] && [ "$code" -ne 0 ]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
"""


def _arguments(job: Job, options: Options) -> list[str]:
    if options.container is None:
        return job.flags
    words = [f"{name}={value}" for name, value in job.words]
    return [f"submit-{job.run.variant.replace('_', '-')}", *words]


def _command(study: Study, job: Job, options: Options) -> str:
    """What takes a run's arguments, in a shell's words; it starts in the right folder."""
    if options.container is None:
        program = [sys.executable, str(study.root / "scripts" / "submit.py")]
        return shlex.join(["env", "-C", str(study.root), "PYTHONUNBUFFERED=1", *program])
    words = dict(job.words)
    # Under their own names, so that the words of a run are the same inside and outside.
    folders = {"OUT": study.out, **({"DATA_DIR": words["DATA_DIR"]} if "DATA_DIR" in words else {})}
    modes = {"OUT": "", "DATA_DIR": ":ro"}
    mounts = [f"{path}:{path}{modes[name]}" for name, path in folders.items()]
    image = str(options.image)
    if options.container == "pyxis":
        start = ["srun", f"--container-image={image}", f"--container-mounts={','.join(mounts)}"]
        return shlex.join([*start, f"--container-workdir={IN_IMAGE}", "make", "VENV=none"])
    if options.container == "apptainer":
        start = ["apptainer", "exec", *(["--nv"] if job.gpus else [])]
        start += [f"--bind={','.join(mounts)}", f"--pwd={IN_IMAGE}", image]
        return shlex.join([*start, "make", "VENV=none"])
    start = ["docker", "run", "--rm", "--init", "--ipc=host"]
    if job.gpus:
        start += ["--env=CUDA_VISIBLE_DEVICES", "--gpus=all"]
    start += [f"--volume={mount}" for mount in mounts]
    user = '--user="$(id -u):$(id -g)"'
    return f"{shlex.join(start)} {user} {shlex.join([image, 'VENV=none'])}"


def _largest_array() -> int:
    """Slurm's limit on the number of tasks of one array; 1001 is its default, 0 among them."""
    done = _slurm("scontrol", "show", "config")
    match = re.search(r"MaxArraySize\s*=\s*(\d+)", done.stdout) if done else None
    return max(1, (int(match[1]) if match else 1001) - 1)


def _slurm(*command: str) -> subprocess.CompletedProcess[str] | None:
    """Ask Slurm; None if it takes too long or cannot be started."""
    try:
        return subprocess.run(
            command, capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=60
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
