"""The processes of a run end together, and hold its lock until the last one is gone."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from algoperf_shampoo.errors import UserError
from algoperf_shampoo.harness import run_lock
from algoperf_shampoo.harness.algoperf import console, door, env, folder, processes
from algoperf_shampoo.harness.spec import Plan, RunSpec
from algoperf_shampoo.study import progress

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")

# A stand-in for torchrun: two workers in sessions of their own, every descriptor but 0 to 2 closed,
# and an end with code 1 when one of them dies. A worker starts a child, as data loaders do.
TORCHRUN = """
import subprocess, sys, time
command = [sys.executable, "-m", "algoperf_shampoo.harness.algoperf.worker", "fake_worker"]
workers = [subprocess.Popen([*command, str(rank)], start_new_session=True) for rank in range(2)]
while all(worker.poll() is None for worker in workers):
    time.sleep(.01)
for rank, worker in enumerate(workers):
    if worker.poll() is not None:
        print(f"failed (exitcode: {worker.returncode}) local_rank: {rank} (pid: 1)", flush=True)
    worker.kill()
sys.exit(1)
"""
WORKER = """
import os, subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
os.write(1, f"worker {sys.argv[1]} {os.getpid()} {child.pid}\\n".encode())
time.sleep(60)
"""
LAUNCHER = """
import sys
from pathlib import Path
from tests.algoperf.test_processes import train
print("exit", train(Path(sys.argv[1])), flush=True)
"""


def run_in(here: Path) -> RunSpec:
    run_dir = here / "nadamw" / "study_1" / "ogbg_pytorch" / "trial_1"
    return RunSpec("nadamw", "nadamw", "ogbg", 1, 1, {}, run_dir)


def train(here: Path) -> bool:
    """Run the stand-in through the door, as a launch does."""
    run = run_in(here)
    plan = Plan(ROOT, "algoperf", "full", here, (run,), {})
    command = door.Command(
        (sys.executable, str(here / "torchrun.py")), {"PYTHONPATH": f"{ROOT}:{here}"}
    )
    environment = env.Environment(
        sys.executable, "3.11", None, None, None, None, (), (), False, True, {}
    )
    job = door._Job(run, None, folder.State(run.run_dir, None, ()), (), command)
    return door._train(plan, job, environment, lambda line: print(line, flush=True))


class Started:
    """A launch in a process group of its own, and the pids of its processes."""

    def __init__(self, here: Path) -> None:
        (here / "torchrun.py").write_text(TORCHRUN)
        (here / "fake_worker.py").write_text(WORKER)
        self.run_dir = run_in(here).run_dir
        self.launcher = subprocess.Popen(
            [sys.executable, "-c", LAUNCHER, str(here)],
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            start_new_session=True,
        )
        assert self.launcher.stdout is not None
        pids: dict[int, list[int]] = {}
        while len(pids) < 2:
            words = self.launcher.stdout.readline().split()
            assert words, "the launcher ended early"
            pids[int(words[1])] = [int(word) for word in words[2:]]
        self.workers = [pids[0][0], pids[1][0]]
        self.all = processes.descendants(self.launcher.pid)
        self.torchrun = self.all[0]
        assert set(self.all) >= {self.torchrun, *pids[0], *pids[1]}

    def kill(self, whom: str, number: int) -> None:
        if whom == "group":
            os.killpg(self.launcher.pid, number)
        else:
            pids = {
                "launcher": self.launcher.pid,
                "torchrun": self.torchrun,
                "worker": self.workers[1],
            }
            os.kill(pids[whom], number)

    def alive(self) -> list[int]:
        return [pid for pid in self.all if run_lock.process_start(pid) is not None]


@pytest.fixture
def started(tmp_path: Path) -> Iterator[Started]:
    launch = Started(tmp_path)
    yield launch
    for pid in (launch.launcher.pid, *launch.all):
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    launch.launcher.wait()


def comes_true(condition: Callable[[], bool]) -> bool:
    """Wait for it, within reason."""
    for _ in range(1200):
        if condition():
            return True
        time.sleep(0.05)
    return False


@pytest.mark.parametrize(
    ("whom", "number", "how"),
    [
        ("worker", signal.SIGKILL, "worker of rank 1 killed by SIGKILL"),
        ("torchrun", signal.SIGKILL, "runner killed by SIGKILL"),
        ("launcher", signal.SIGTERM, "stopped by SIGTERM"),
        ("launcher", signal.SIGINT, "stopped by SIGINT"),
        ("launcher", signal.SIGKILL, "launcher killed"),
        ("group", signal.SIGKILL, "launcher killed"),
    ],
)
def test_whoever_is_killed_all_end_and_the_record_says_how(
    started: Started, whom: str, number: int, how: str
) -> None:
    assert len(run_lock.holders(started.run_dir / run_lock.LOCK)) >= 4
    started.kill(whom, number)
    started.launcher.wait()
    if how == "launcher killed":
        # Nobody was left to end what a worker had started: until it ends, it keeps the lock.
        own = {started.torchrun, *started.workers}
        assert comes_true(lambda: not own & set(started.alive()))
        for pid in started.alive():
            os.kill(pid, signal.SIGKILL)
        assert comes_true(lambda: not run_lock.held(started.run_dir))
    assert comes_true(lambda: not started.alive())
    with run_lock.hold(started.run_dir, patience=0):
        (launch,) = folder.close_launches(folder.read_launches(started.run_dir))
    assert launch["how"] == how
    assert (launch["ended"] is None) == (how == "launcher killed")
    if whom == "torchrun":
        assert len(launch["left_behind"]) >= 2  # each worker's child; the workers died with it


def test_a_survivor_keeps_a_second_launch_out_and_is_named(started: Started) -> None:
    # A worker's child has asked for nothing, so it outlives a group that is killed at once.
    started.kill("group", signal.SIGKILL)
    assert comes_true(lambda: len(started.alive()) == 2)
    told: list[str] = []
    survivors = started.alive()
    with (
        pytest.raises(UserError, match=f"pid {min(survivors)} .*sleep") as caught,
        run_lock.hold(started.run_dir, patience=0.5, echo=told.append),
    ):
        pass
    assert "left behind by a launch that is over" in str(caught.value) and len(told) == 1
    for pid in survivors:
        os.kill(pid, signal.SIGKILL)
    with run_lock.hold(started.run_dir, echo=told.append):
        assert run_lock.held(started.run_dir)
    assert not run_lock.held(started.run_dir)


def test_a_launch_under_way_is_not_waited_for(started: Started) -> None:
    with (
        pytest.raises(UserError, match=f"pid {started.launcher.pid}") as caught,
        run_lock.hold(started.run_dir, echo=pytest.fail),
    ):
        pass
    assert "\n" not in str(caught.value)


def test_exit_code_console_and_no_input(tmp_path: Path) -> None:
    code = "import sys; print('one'); print('two', file=sys.stderr); input()"
    run = run_in(tmp_path)
    with run_lock.hold(run.run_dir) as lock:
        command = door.Command((sys.executable, "-u", "-c", code), {})
        ending = console.run(tmp_path, run.run_dir, run.name, command, lock)
    assert (ending.exit_code, ending.how) == (1, "failed: exit code 1")  # asked, and got no answer
    printed = (run.run_dir / folder.CONSOLE).read_text()
    assert printed.startswith("one\ntwo\n") and "EOFError" in printed


def test_what_a_runner_leaves_behind_is_ended_and_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(processes, "GRACE", 0.2)
    code = (
        "import subprocess, sys\n"
        "subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'],"
        " start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)\n"
    )
    mine = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    try:
        with run_lock.hold(tmp_path) as lock:
            command = [sys.executable, "-c", code]
            ending = processes.run(command, tmp_path, os.environ, lock, lambda line: None)
        assert ending.how == "finished" and len(ending.left_behind) == 1
        assert not run_lock.held(tmp_path)
        assert mine.poll() is None  # a child of ours that is not of the run
    finally:
        mine.kill()
        mine.wait()


def test_launches_of_another_boot_machine_and_version() -> None:
    here = folder.launcher()
    closed = folder.close_launches(
        [
            {**here, "how": "finished"},
            {**here, "exit_code": None},
            {**here, "boot": "another"},
            {**here, "host": "node7"},
            {"exit_code": 0},
            {"exit_code": 3},
        ]
    )
    assert [launch["how"] for launch in closed] == [
        "finished",
        "launcher killed",
        "the machine stopped",
        "launcher killed, or its machine (node7) stopped",
        "finished",
        "failed: exit code 3",
    ]
    assert json.loads(json.dumps(closed)) == closed


def test_a_hit_is_said_once_and_at_once(tmp_path: Path) -> None:
    run = run_in(tmp_path)
    code = """
import json, pathlib, sys
folder = pathlib.Path(sys.argv[1])
meta = {"workload.target_metric_name": "ssim", "workload.validation_target_value": 0.5}
(folder / "meta_data_0.json").write_text(json.dumps(meta))
table = folder / "eval_measurements.csv"
table.write_text("global_step,accumulated_submission_time,validation/ssim\\n")
for step, value in ((1, .1), (10, .6), (20, .7)):
    with table.open("a") as file:
        file.write(f"{step},{step}.5,{value}\\n")
    print("Saved checkpoint to somewhere", flush=True)
"""
    lines: list[str] = []
    with run_lock.hold(run.run_dir) as lock:
        command = door.Command((sys.executable, "-c", code, str(run.run_dir)), {})
        for _ in range(2):
            line = progress.hit_line_of
            console.run(ROOT, run.run_dir, run.name, command, lock, lines.append, line)
    # The second launch finds it hit already: nothing is said again.
    told = "hit: ssim 0.5 reached at step 10, 10.5 s of submission time"
    assert lines == [f"nadamw ogbg seed 1: {told}"]
