"""Ctrl-C and SIGTERM: one line, exit code 130 or 143, no traceback, and nothing lost."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.harness import fakes
from tests.harness.test_runner import curve

ROOT = Path(__file__).parents[2]
SIGNALS = [signal.SIGINT, signal.SIGTERM]


def start(code: str, *arguments: object) -> subprocess.Popen[str]:
    """Python code in a process of its own, that has printed its first line."""
    process = subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None and process.stdout.readline()
    return process


def end(process: subprocess.Popen[str], number: int) -> tuple[int, str]:
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    return process.returncode, errors


@pytest.mark.parametrize("number", SIGNALS)
def test_one_line_and_the_exit_code_a_shell_expects(number):
    code = (
        "import time; from algoperf_shampoo import interrupt; interrupt.install()\n"
        "with interrupt.saying(lambda: 'at step 3'):\n    print('ready', flush=True)\n"
        "    time.sleep(60)"
    )
    assert end(start(code), number) == (128 + number, "interrupted: at step 3\n")


@pytest.mark.parametrize("number", SIGNALS)
def test_in_an_import_too(number):
    code = (
        "import sys, time; from algoperf_shampoo import interrupt; interrupt.install()\n"
        "class Slow:\n    def find_spec(self, name, path, target=None):\n"
        "        try:\n            print('ready', flush=True); time.sleep(60)\n"
        "        except BaseException: pass\n"  # as some packages do around their imports
        "sys.meta_path.insert(0, Slow())\nimport no_such_module"
    )
    status, errors = end(start(code), number)
    assert status == 128 + number and errors.count("\n") == 1 and "no run was under way" in errors


@pytest.mark.parametrize("number", SIGNALS)
def test_who_has_to_clean_up_does_and_a_second_signal_ends_at_once(number):
    code = (
        "import sys, time; from algoperf_shampoo import interrupt\n"
        "try:\n    with interrupt.unwinding(lambda: 'x'):\n"
        "        print('ready', flush=True); time.sleep(60)\n"
        "except interrupt.Interrupted as stop:\n"
        "    print(stop.line, stop.code, interrupt.interrupted(), file=sys.stderr)\n    raise\n"
    )
    told = f"interrupted: x {128 + number} True\n"
    assert end(start(code), number) == (128 + number, told)
    code = code.replace("    raise\n", "").replace(
        "        print('ready', flush=True); time.sleep(60)\n",
        "        try:\n            print('ready', flush=True); time.sleep(60)\n"
        "        finally:\n            print('cleaning', flush=True); time.sleep(60)\n",
    )
    process = start(code)
    process.send_signal(number)
    assert process.stdout is not None and process.stdout.readline() == "cleaning\n"
    assert end(process, signal.SIGINT) == (130, "interrupted: x\n")


SLOW_RUN = """
import sys, time
from pathlib import Path
from algoperf_shampoo import interrupt
interrupt.install()
from tests.harness import fakes
def update_params(**given):
    if given["global_step"] == 25:
        print("at step 25", flush=True)
        time.sleep(60)
    return fakes._update_params(**given)
update_params.__signature__ = __import__("inspect").signature(fakes._update_params)
fakes.execute(fakes.spec_in(Path(sys.argv[1])), update_params=update_params)
"""


@pytest.mark.parametrize("number", SIGNALS)
def test_a_run_says_its_step_and_what_the_same_command_does(tmp_path, number):
    told = "interrupted: fake fake_mini seed 1: at step 25; the same command goes on from step 20\n"
    assert end(start(SLOW_RUN, tmp_path / "a"), number) == (128 + number, told)
    run, unbroken = fakes.spec_in(tmp_path / "a"), fakes.spec_in(tmp_path / "b")
    lines: list[str] = []
    fakes.execute(run, echo=lines.append)
    fakes.execute(unbroken)
    assert "continuing from step 20" in lines[0] and curve(run.run_dir) == curve(unbroken.run_dir)


RUNNER = """
import signal, sys, time
print("Step: 3, {'train/loss': nan}", flush=True)
try:
    print("training", flush=True)
    time.sleep(60)
except BaseException:
    print("a long", "traceback", sep="\\n", flush=True)
    raise
"""
DOOR = """
import sys
from pathlib import Path
from algoperf_shampoo import interrupt
from algoperf_shampoo.harness import run_lock
from algoperf_shampoo.harness.algoperf import console, door
here = Path(sys.argv[1])
command = door.Command((sys.executable, str(here / "runner.py")), {})
with run_lock.hold(here / "run") as lock:
    (here / "run" / "checkpoint_7").write_text("")
    try:
        console.run(here, here / "run", "a run", command, lock)
    except interrupt.Interrupted as stop:
        print(stop.line, file=sys.stderr)
        raise
"""


@pytest.mark.parametrize("number", SIGNALS)
def test_algoperfs_runner_is_ended_and_its_traceback_is_in_the_log_alone(tmp_path, number):
    (tmp_path / "runner.py").write_text(RUNNER)
    process = start(DOOR, tmp_path)
    assert process.stdout is not None
    while "training" not in process.stdout.readline():
        pass
    told = "interrupted: a run; the same command goes on from step 7\n"
    process.send_signal(number)
    output, errors = process.communicate(timeout=60)
    assert (process.returncode, errors, output) == (128 + number, told, "")
    assert "training" in (tmp_path / "run" / "console.log").read_text()


@pytest.mark.faults
@pytest.mark.parametrize("number", SIGNALS)
def test_the_real_command_at_any_moment(tmp_path, number):
    command = [sys.executable, "scripts/submit.py", "--variant=nadamw", "--workload=ogbg"]
    command += ["--steps=75", f"--out={tmp_path}"]
    seconds, ended = 0.3, []
    while "finished" not in ended:
        process = subprocess.Popen(
            command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        try:
            process.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            process.send_signal(number)
        output, errors = process.communicate()
        if process.returncode == 0:
            ended.append("finished")
        elif process.returncode == -number:
            # Before Python listens, or when it has stopped to: nothing is under way then.
            records = [json.loads(p.read_text()) for p in tmp_path.rglob("run.json")]
            assert errors == "" and (output == "" or records[0]["status"] == "finished")
            ended.append("outside")
        else:
            assert process.returncode == 128 + number, errors
            assert re.fullmatch(r"interrupted: .*the same command .*\n", errors), errors
            assert "Traceback" not in output
            ended.append("interrupted")
        seconds *= 1.25
    assert ended.count("interrupted") >= 3
