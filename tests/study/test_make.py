"""The Makefile: words are data, wrong words are refused, installations are whole or absent."""

from __future__ import annotations

import json
import os
import random
import re
import shlex
import shutil
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

# Prints what it was called with instead of doing it.
RECORDER = f"""#!{sys.executable}
import json, sys
if sys.argv[1].endswith("words.py"):
    import runpy
    sys.argv = sys.argv[1:]
    runpy.run_path(sys.argv[0], run_name="__main__")
print("CALLED", json.dumps(sys.argv[1:]))
"""

# `-m venv` and `-m pip install` as they are, but quick: files are written one after another, and
# what lies there already is taken to be whole.
INSTALLER = f"""#!{sys.executable}
import os, sys, time
from pathlib import Path
arguments = sys.argv[1:]
if arguments[:2] == ["-m", "venv"]:
    venv = Path(arguments[2])
    for folder in ("bin", "lib/python3/site-packages"):
        (venv / folder).mkdir(parents=True)
    time.sleep(0.01)
    (venv / "bin/python").symlink_to(Path(sys.argv[0]).resolve())
    time.sleep(0.03)
    (venv / "lib/python3/site-packages/pip").mkdir()
elif arguments[:3] == ["-m", "pip", "install"]:
    site = Path(sys.argv[0]).parents[1] / "lib/python3/site-packages"
    if not (site / "pip").exists():
        sys.exit("No module named pip")
    time.sleep(0.05)
    if os.environ.get("NO_NETWORK"):
        sys.exit("no network")
    for number in range(5):
        package = site / (arguments[-1].rsplit("[")[-1].strip("]") + str(number))
        if not package.exists():
            package.mkdir()
            for part in "ab":
                time.sleep(0.01)
                (package / part).touch()
else:
    os.execv(sys.executable, [sys.executable, *arguments])
"""

TABLE = """
import sys
from pathlib import Path
site = Path(sys.argv[0]).resolve().parents[1] / "venv/lib/python3/site-packages"
whole = [p.name for p in site.glob("*") if p.name == "pip" or len(list(p.iterdir())) == 2]
print("WHOLE", sorted(whole))
"""
WHOLE = "WHOLE ['pip', 'run0', 'run1', 'run2', 'run3', 'run4']\n"


def program(path: Path, text: str) -> Path:
    path.write_text(text)
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


def make(*arguments: str, cwd: Path = ROOT, **environment: str) -> subprocess.CompletedProcess:
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("MAKE", "MFLAGS"))}
    return subprocess.run(
        ["make", "--no-print-directory", *arguments],
        cwd=cwd,
        capture_output=True,
        text=True,
        env={**clean, **environment},
    )


@pytest.fixture(scope="module")
def recorder(tmp_path_factory):
    return program(tmp_path_factory.mktemp("a b'c") / "python", RECORDER)


def called(recorder: Path, *arguments: str, **environment: str) -> list[str]:
    done = make(*arguments, "VENV=none", f"PYTHON={recorder}", **environment)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == 1 and lines[0].startswith("CALLED "), done.stdout
    return json.loads(lines[0].removeprefix("CALLED "))


HOSTILE = [
    "x' ; echo X ; echo '",
    'a "b" $HOME $(HOME) $$ ${PATH} `echo X` ; echo X & | > < * ? # ! \\ \\\\ %',
    "two\nlines\n",
    "é – ü",
]


@pytest.mark.parametrize("value", HOSTILE)
def test_a_words_value_reaches_the_script_as_one_argument(recorder, value):
    words = {w: w.lower() for w in ("OUT", "SET", "DATA_DIR", "TAU", "WORKLOAD")}
    given = called(recorder, "submit-nadamw", *(f"{w}={value}" for w in words), "DRY_RUN=1")
    assert {f"--{flag}={value}" for flag in words.values()} <= set(given)
    assert given[-1] == "--dry_run=1" and given[:2] == ["scripts/submit.py", "--variant=nadamw"]
    # from the environment too
    assert f"--out={value}" in called(recorder, "submit-nadamw", OUT=value)
    for target, word, flag in (
        ("export-nadamw", "AUTHORS", "authors"),
        ("table1", "RUNS", "runs"),
        ("table1", "TABLE", "out"),
        ("figures", "RUNS", "runs"),
        ("report", "TITLE", "title"),
        ("repeat", "RUN", "run"),
    ):
        assert f"--{flag}={value}" in called(recorder, target, f"{word}={value}")


def test_defaults_are_handed_over_and_empty_words_are_not(recorder):
    given = called(recorder, "submit-nadamw", "F=", "OUT=")
    assert given[1:] == ["--variant=nadamw", "--workload=all", "--size=mini", "--seeds=1"]
    assert called(recorder, "submit-x'; echo X; '")[1] == "--variant=x'; echo X; '"


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["submit-nadamw", "LR=0.5"], "LR=0.5: no such word; a field of the point is set by SET="),
        (["submit-nadamw", "SEED=7"], "SEED=7: no such word; SEEDS=7, is that seed"),
        (["submit-nadamw", "TAUU="], "TAUU=: no such word; did you mean TAU=?"),
        (["submit-nadamw", "DRYRUN=1"], "DRYRUN=1: no such word; did you mean DRY_RUN=1?"),
        (["table1", "SEEDS=3"], "SEEDS=3: make table1 does not take SEEDS; it takes PYTHON, RUNS"),
        (["help", "OUT=x"], "OUT=x: make help does not take OUT; it takes PYTHON, VENV"),
        (["docker-submit-nadamw", "HARNESS=embedded"], "HARNESS=embedded: make docker-submit"),
        (["submit-nadamw", "ODD=$(shell echo X >&2)"], "ODD=$(shell echo X >&2): no such word"),
    ],
)
def test_words_that_are_not_taken_are_refused_with_the_nearest(recorder, arguments, line):
    done = make(*arguments, "VENV=none", f"PYTHON={recorder}")
    assert done.returncode == 2 and "CALLED" not in done.stdout
    first, last = done.stderr.splitlines()
    assert first.startswith(f"error: {line}"), done.stderr
    assert last.startswith("make: ***")


def test_what_make_and_other_programs_know_is_not_refused(recorder):
    given = called(
        recorder, "submit-nadamw", "OMP_NUM_THREADS=1", "CFLAGS=-O2", CFLAGS="-g", LR="3", CC="cc"
    )
    assert "--seeds=1" in given


def test_version_is_a_word_of_the_command_line_alone(recorder):
    """Environments have a VERSION of their own."""
    for target in ("submit-nadamw", "study", "status", "table1", "table3", "figures", "report"):
        assert "--version=2026" in called(recorder, target, "VERSION=2026")
        assert not any("version" in word for word in called(recorder, target, VERSION="1.2"))


def test_every_script_that_signals_are_held_back_from_listens():
    """scripts/in_venv.sh holds them back; command_line answers them, in scripts/data/ too."""
    found = set(re.findall(r"scripts/[\w/]+\.py", (ROOT / "Makefile").read_text()))
    others = {f"scripts/{name}.py" for name in ("install", "words", "container")}
    assert len(found - others) > 8
    for name in found - others:
        assert "from command_line import" in (ROOT / name).read_text(), name
    code = (
        "import signal, sys; from pathlib import Path; sys.path.insert(0, 'scripts'); "
        "sys.modules['__main__'].__file__ = str(Path('scripts/data/mini.py')); "
        "signal.pthread_sigmask(signal.SIG_BLOCK, {2, 15}); import command_line; "
        "assert signal.getsignal(2) is command_line.interrupt._handle; "
        "assert not signal.pthread_sigmask(signal.SIG_BLOCK, ())"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_help_names_every_word(recorder):
    text = make("help").stdout
    words = make("-pn", "help").stdout
    (line,) = [line for line in words.splitlines() if line.startswith("words.submit := ")]
    for word in [*line.split()[2:], "RUNS", "TABLE"]:
        if word != "ALGOPERF_PYTHON":
            assert f"{word}=" in text, word


def container(*arguments: str, **environment: str) -> str:
    done = make(*arguments, "DRY_RUN=1", **environment)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_docker_targets_hand_words_over_as_data(tmp_path):
    data = tmp_path / 'it\'s, a "folder"'
    data.mkdir()
    words = [f"DATA_DIR={data}", f"OUT={tmp_path}/o;ut", "SET=a=1 b='2'", "GPUS=1"]
    line = container("docker-submit-nadamw", *words, CUDA_VISIBLE_DEVICES="3,5")
    command = shlex.split(line)
    quoted = str(data).replace('"', '""')
    assert f'type=bind,"source={quoted}",target=/data,readonly' in command
    assert f"type=bind,source={tmp_path}/o;ut,target=/results" in command
    assert command[command.index("--gpus") + 1] == '"device=3"'
    assert command[-6:] == [
        "DATA_DIR=/data", "WORKLOAD=all", "SIZE=mini", "SEEDS=1", "GPUS=1", "SET=a=1 b='2'",
    ]  # fmt: skip
    assert not (tmp_path / "o;ut").exists()
    home = container("docker-submit-nadamw", "DATA_DIR=~", "OUT=~/o", HOME=str(tmp_path))
    assert f"source={tmp_path},target=/data" in home and f"source={tmp_path}/o," in home
    refused = make("docker-submit-nadamw", "DATA_DIR=/no/such", "OUT=x", "DRY_RUN=1")
    assert refused.returncode == 2 and "error: DATA_DIR=/no/such: no such folder" in refused.stderr
    few = make("docker-submit-nadamw", *words[:3], "GPUS=3", "DRY_RUN=1", CUDA_VISIBLE_DEVICES="1")
    assert "error: GPUS=3: CUDA_VISIBLE_DEVICES=1 leaves fewer" in few.stderr
    built = container("docker-build", "BASE=ubuntu:24.04", "IMAGE=it's")
    assert "BASE=ubuntu:24.04" in built and shlex.split(built)[-2] == "it's:2.13.0"
    assert "ALGOPERF_COMMIT" not in built
    assert "ALGOPERF_COMMIT=abcdef0" in container("docker-build", "ALGOPERF_COMMIT=abcdef0")


def test_algoperf_is_installed_at_the_pinned_commit_or_the_one_asked_for(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    import install

    name = "requirements-algoperf-no-deps.txt"
    assert install.pip_arguments("algoperf", "2.13.0")[1][-2:] == ["-r", str(ROOT / name)]
    code = install.pip_arguments("algoperf", "2.13.0", "b21be29be0")[1][-1]
    assert code.startswith("algoperf @ git+https://") and code.endswith(".git@b21be29be0")
    digests = {install.digest_of("algoperf", "2", tmp_path, c) for c in ("", "b21be29be0")}
    assert len(digests) == 2
    for wrong in ("main", "abc", "x" * 40, "--help"):
        done = make("algoperf-env", f"ALGOPERF_COMMIT={wrong}", f"ALGOPERF_VENV={tmp_path}/venv")
        assert done.returncode == 2 and f"error: ALGOPERF_COMMIT={wrong}: 7 to 40" in done.stderr
        assert not (tmp_path / "venv").exists()
    # What the image does with it.
    lines = (ROOT / "Dockerfile").read_text().splitlines()
    (line,) = [line for line in lines if line.startswith("      sed")]
    shutil.copy(ROOT / name, tmp_path)
    command = line.strip().removesuffix("\\").strip().removesuffix("; fi")
    given = {"ALGOPERF_COMMIT": "b21b"}
    subprocess.run(["bash", "-c", command], cwd=tmp_path, env={**os.environ, **given}, check=True)
    assert (tmp_path / name).read_text().strip().endswith(".git@b21b")


def test_every_word_of_a_container_run_reaches_it(tmp_path):
    """A word that docker-submit takes and drops would train something else than was asked for."""
    text = make("-pn", "help").stdout
    (taken,) = [line for line in text.splitlines() if line.startswith("words.docker-submit :=")]
    names = set(taken.split()[2:]) - {"DATA_DIR", "OUT", "ENGINE", "IMAGE", "TORCH", "DRY_RUN"}
    (tmp_path / "7").touch()
    given = [f"{name}=7" for name in names - {"SEARCH_SPACE"}]
    given += [f"DATA_DIR={tmp_path}", "OUT=x", f"SEARCH_SPACE={tmp_path}/7"]
    line = container("docker-submit-nadamw", *given)
    assert set(given[:-3]) <= set(shlex.split(line))
    assert "SEARCH_SPACE=/search_space.json" in line and len(names) > 10


def test_podman_gets_its_own_words(tmp_path):
    words = [f"DATA_DIR={tmp_path}", "OUT=x", "ENGINE=podman", "GPUS=2"]
    line = container("docker-submit-nadamw", *words, CUDA_VISIBLE_DEVICES="4,6,7")
    assert "--device nvidia.com/gpu=4 --device nvidia.com/gpu=6 --security-opt" in line
    assert ("--userns keep-id" in line) == (os.getuid() != 0)
    assert "--format docker" in container("docker-build", "ENGINE=podman")
    sys.path.insert(0, str(ROOT / "scripts"))
    try:
        import container as module
    finally:
        sys.path.pop(0)
    values = {"DATA_DIR": str(tmp_path), "OUT": "x", "ENGINE": "podman"}
    command = module.submit(values, "nadamw", uid=1234, gid=99)
    assert command[command.index("--userns") + 1] == "keep-id"
    assert command[command.index("--user") + 1] == "1234:99"
    built = module.build({"ENGINE": "docker"}, uid=1234)
    assert "UID=1234" in built and "UID=0" not in module.build({}, uid=0)


@pytest.fixture
def copy(tmp_path):
    """A copy of the Makefile and its helpers, with a quick Python in it."""
    (tmp_path / "scripts").mkdir()
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path / name)
    for name in ("in_venv.sh", "held.sh", "install.py", "words.py"):
        shutil.copy(ROOT / "scripts" / name, tmp_path / "scripts" / name)
    (tmp_path / "scripts" / "table.py").write_text(TABLE)
    program(tmp_path / "python", INSTALLER)
    return tmp_path


def words_of(copy: Path) -> list[str]:
    return ["make", "-s", "table1", "VENV=venv", f"PYTHON={copy}/python"]


def table(copy: Path, **environment: str) -> subprocess.CompletedProcess:
    return make(*words_of(copy)[1:], cwd=copy, **environment)


def test_killed_at_any_moment_an_installation_is_whole_or_made_anew(copy):
    draw = random.Random(9)
    for attempt in range(10):
        shutil.rmtree(copy / "venv", ignore_errors=True)
        first = subprocess.Popen(
            words_of(copy),
            cwd=copy,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        time.sleep(draw.uniform(0.0, 0.5))
        if attempt % 4 == 3:  # what make has started goes on alone: the next call waits for it
            first.kill()
        else:
            how = (signal.SIGKILL, signal.SIGINT, signal.SIGTERM)[attempt % 4]
            os.killpg(first.pid, how)
        second = table(copy)
        assert second.returncode == 0, second.stderr
        assert second.stdout.endswith(WHOLE), (attempt, second.stdout, second.stderr)
        first.wait()
        assert table(copy).stdout == WHOLE  # nothing left to install
    assert sorted(p.name for p in copy.glob("venv*")) == ["venv", "venv.lock"]


def test_two_at_once_install_once(copy):
    both = [
        subprocess.Popen(words_of(copy), cwd=copy, stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    said = [process.communicate()[0] for process in both]
    assert [process.returncode for process in both] == [0, 0]
    assert all(text.endswith(WHOLE) for text in said)
    assert sum("installing into venv" in text for text in said) == 1


def test_an_addition_that_changed_nothing_leaves_the_environment_whole(copy):
    assert table(copy).stdout.endswith(WHOLE)
    refused = make("lint", "VENV=venv", f"PYTHON={copy}/python", cwd=copy, NO_NETWORK="1")
    assert refused.returncode == 2 and "did not install" in refused.stderr
    assert table(copy, NO_NETWORK="1").stdout == WHOLE
    # killed before pip changed anything: the same
    (copy / "venv" / ".ready-run").rename(copy / "stamp")
    sys.path.insert(0, str(ROOT / "scripts"))
    try:
        import install
    finally:
        sys.path.pop(0)
    (copy / "stamp").rename(copy / "venv" / ".ready-run")
    install.mark(copy / "venv")
    assert not (copy / "venv" / ".ready-run").exists()
    install.settle(copy / "venv")
    assert table(copy, NO_NETWORK="1").stdout == WHOLE
    # killed after: removed
    install.mark(copy / "venv")
    (copy / "venv/lib/python3/site-packages/run3/b").unlink()
    install.settle(copy / "venv")
    assert not (copy / "venv").exists()


def test_an_environment_made_elsewhere_is_left_alone(copy):
    (copy / "venv" / "bin").mkdir(parents=True)
    (copy / "venv" / "bin" / "mine").touch()
    done = table(copy)
    assert done.returncode == 2 and "not made by this make" in done.stderr
    assert (copy / "venv" / "bin" / "mine").exists()
    (copy / "afile").touch()
    done = make("table1", "VENV=afile", f"PYTHON={copy}/python", cwd=copy)
    assert "a file is where the environment would be" in done.stderr
    done = make("table1", "PYTHON=no-python", cwd=copy)
    assert done.returncode == 2 and "error: no-python: no such program" in done.stderr


def test_other_files_to_install_from_mean_another_installation(copy):
    assert "installing" in table(copy).stdout
    (copy / "constraints.txt").touch()  # a checkout changes times and no content
    assert table(copy).stdout == WHOLE
    with (copy / "constraints.txt").open("a") as file:
        file.write("six==1.0\n")
    assert table(copy).stdout == "installing into venv (once; extra: run)\n" + WHOLE
    # a moved environment leads to where it was: it is installed again
    moved = copy / "moved"
    moved.mkdir()
    for path in list(copy.iterdir()):
        if path.name not in ("moved", "python"):
            path.rename(moved / path.name)
    (moved / "python").symlink_to(copy / "python")
    assert table(moved).stdout.endswith(WHOLE)
