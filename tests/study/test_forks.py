"""Runs as forks: their output, exit codes and signals are those of processes of their own."""

from __future__ import annotations

import signal
import sys
import time
from pathlib import Path

import pytest

from algoperf_shampoo.study import forks, local, status
from tests.study import test_study
from tests.study.test_study import ROOT, SUBMIT, small

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="PR_SET_PDEATHSIG")


@pytest.fixture
def server(monkeypatch, tmp_path):
    """A server that imports nothing for its forks."""
    root = tmp_path / "root"
    (root / "scripts").mkdir(parents=True)
    (root / "scripts" / "fork.py").write_text(
        "import socket, sys\n"
        f"sys.path.insert(0, {str(ROOT)!r})\n"
        "from algoperf_shampoo.study import forks\n"
        "with socket.socket(fileno=int(sys.argv[1])) as connection:\n"
        "    forks.serve(connection)\n"
    )
    made = forks.Forks(root)
    yield made
    made.close()


def program(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def ended(run: forks.Forked) -> tuple[int, str]:
    return run.wait(), run.stdout.read()


def test_output_and_exit_codes(server, tmp_path):
    said = "import sys, os\nprint(sys.argv[1:], __name__)\nprint('wrong', file=sys.stderr)\n"
    well = server.start(program(tmp_path / "well.py", said), ["--a=1", "b c"])
    ill = server.start(program(tmp_path / "ill.py", "raise SystemExit(3)"), [])
    words = server.start(program(tmp_path / "words.py", "raise SystemExit('why')"), [])
    broken = server.start(program(tmp_path / "broken.py", "1 / 0"), [])
    killed = server.start(program(tmp_path / "k.py", "import os; os.kill(os.getpid(), 9)"), [])
    assert ended(well) == (0, "['--a=1', 'b c'] __main__\nwrong\n")
    assert ended(ill) == (3, "") and ended(words) == (1, "why\n")
    code, text = ended(broken)
    assert code == 1 and text.endswith("ZeroDivisionError: division by zero\n")
    assert ended(killed) == (-9, "")


def test_many_at_once_are_processes_of_their_own(server, tmp_path):
    own = program(tmp_path / "own.py", "import os, sys\nprint(os.getpid(), sys.argv[1])")
    runs = [server.start(own, [str(number)]) for number in range(40)]
    said = [ended(run)[1].split() for run in runs]
    assert [number for _, number in said] == [str(number) for number in range(40)]
    assert len({pid for pid, _ in said}) == 40


def test_a_signal_reaches_its_run_alone(server, tmp_path):
    text = "import time\nprint('here')\ntime.sleep(60)\n"
    first, second = (server.start(program(tmp_path / "s.py", text), []) for _ in range(2))
    assert first.stdout.readline() == second.stdout.readline() == "here\n"
    first.send_signal(signal.SIGTERM)
    assert first.wait() == 128 + signal.SIGTERM and second.poll() is None
    assert "interrupted" in first.stdout.read()


def test_runs_end_with_their_server_and_are_not_waited_for(server, tmp_path):
    text = "import os, time\nprint(os.getpid(), flush=True)\ntime.sleep(60)\n"
    run = server.start(program(tmp_path / "s.py", text), [])
    pid = int(run.stdout.readline())
    server._server.kill()
    assert run.wait() == 1
    test_study.wait_until(lambda: not Path(f"/proc/{pid}").exists())
    assert server.start(tmp_path / "s.py", []).wait() == 1  # no server, no run


def note(asked: list[int], job: test_study.study.Job) -> list[test_study.study.Job]:
    asked.append(job.run.seed)
    return []


class OfFakes(forks.Forks):
    """Its program is the stand-in for scripts/submit.py, in a mode."""

    mode = "well"

    def start(self, program: Path, arguments: list[str]) -> forks.Forked:
        assert program.name == "submit.py"
        return super().start(SUBMIT, [self.mode, *arguments])


def test_a_study_by_forks_and_more_jobs_on_the_way(tmp_path):
    made, lines = small(tmp_path), []
    server = OfFakes(ROOT)
    followers = {made.jobs[0].run.seed: [made.jobs[2]]}
    try:
        failed = local.run(
            made, made.jobs[:2], 2, lines.append, forks=server,
            more=lambda job: followers.get(job.run.seed, []),
        )  # fmt: skip
    finally:
        server.close()
    assert failed == 0
    assert [now.state for _, now in status.look([job.run for job in made.jobs])] == ["done"] * 3
    assert sum(": hit: " in line for line in lines) == 3
    # One that is done already brings its followers too.
    asked: list[int] = []
    assert local.run(made, made.jobs[:1], 1, lines.append, more=lambda job: note(asked, job)) == 0
    assert asked == [made.jobs[0].run.seed]


def test_when_the_seconds_are_over_runs_end_and_no_other_begins(tmp_path):
    made, lines = small(tmp_path), []
    started = time.monotonic()
    failed = local.run(made, made.jobs, 1, lines.append, test_study.program("forever"), seconds=1)
    assert failed == 0 and time.monotonic() - started < 30
    assert lines[-1] == "1 seconds are over: 1 runs under way are ended, 2 have not begun"
    assert [now.state for _, now in status.look([job.run for job in made.jobs])][1:] == [
        "missing",
        "missing",
    ]


def test_a_real_run_by_fork_is_the_run_of_a_process(tmp_path):
    """The suite's own server and submission: the same final parameters."""
    name = test_study.write(
        tmp_path / "one.json", mini={"seeds": "5,", "all_steps": True, "evals": 3},
        rows=[{"workload": "ogbg", "variant": "nadamw"}],
    )  # fmt: skip
    hashes = []
    for own in ("fork", "process"):
        options = test_study.Options(out=str(tmp_path / own), steps="3")
        made = test_study.study.lay_out(ROOT, name, options)
        server = forks.Forks(ROOT) if own == "fork" else None
        try:
            assert local.run(made, made.jobs, 1, print, forks=server) == 0
        finally:
            if server is not None:
                server.close()
        record = test_study.json.loads((made.jobs[0].run.run_dir / "run.json").read_text())
        hashes.append(record["result"]["params_sha256"])
        steps = [
            row.split(",")[3]
            for row in (made.jobs[0].run.run_dir / "eval_measurements.csv").read_text().split()[1:]
        ]
        assert steps == ["1", "3"]
    assert hashes[0] == hashes[1]
