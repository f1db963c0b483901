"""Make a virtual environment that is whole or absent: ``python scripts/install.py run``.

Environments cannot be moved, so none is built aside and renamed. Instead:

- A stamp, ``.ready-EXTRA``, says by a digest of what it was installed from that an extra is whole.
- ``.installing`` lies in the folder from before the first change until after the last. While it is
  there no stamp counts. The next call puts the stamps back if nothing was changed yet, and else
  removes the folder and installs anew, whatever moment the earlier call was killed at.
- ``VENV.lock`` is held by the installer and by the pip it started: a second call waits, for a pip
  that outlived its installer too.
- Ctrl-C is the installer's alone: what it started is in a process group of its own, which it ends.

Standard library only, and no syntax that a Python too old to be used would stumble over.
"""

import argparse
import fcntl
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
MARKER, STAMP = ".installing", ".ready-"
OLDEST = (3, 11)
# An extra of pyproject.toml, and the extras that come with it.
EXTRAS = {
    "run": (),
    "figures": ("run",),
    "dev": ("run", "figures"),
    "dev-kernels": ("dev", "run", "figures"),
}
ALGOPERF = "algoperf"
_ALGOPERF_FILES = ("requirements-algoperf.txt", "requirements-algoperf-no-deps.txt")


_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Failed(Exception):
    """One line for the user, who can mend it; exit code 2."""


class Stopped(BaseException):
    """By a signal, whose number is ``code`` less 128."""

    def __init__(self, number):
        super().__init__()
        self.code = 128 + number


def main():
    """Install what is asked for, unless it is whole already; the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("extra", choices=[*EXTRAS, ALGOPERF])
    parser.add_argument("--venv", default=".venv")
    parser.add_argument("--python", default=sys.executable, help="makes the environment")
    parser.add_argument("--torch", default="", help="version of torch, for algoperf")
    parser.add_argument("--algoperf_commit", default="", help="another commit of AlgoPerf's code")
    options = parser.parse_args()
    # Links are followed: what is removed must be the environment, not the link to it.
    venv = Path(os.path.realpath(os.path.expanduser(options.venv)))
    python = os.path.expanduser(options.python)
    begun = False
    try:
        listen()
        if sys.version_info < OLDEST:
            raise Failed(f"{python} is too old: Python 3.11 or newer, as in PYTHON=python3.12")
        commit = checked_commit(options.algoperf_commit)
        digest = digest_of(options.extra, options.torch, venv, commit)
        if not is_whole(venv, options.extra, digest):
            begun = True
            install(venv, python, options.extra, options.torch, digest, commit)
    except Failed as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        where = error.filename or venv
        print(f"error: {where}: {error.strerror}: VENV= names another folder", file=sys.stderr)
        return 2
    except Stopped as stopped:
        what = "no run was under way; the same command does what this one would have"
        if begun:
            what = f"the same command installs into {venv.name} again"
        print(f"interrupted: {what}", file=sys.stderr)
        return stopped.code
    return 0


def listen():
    """Answer signals from here on, and one that ``scripts/held.sh`` held back until now."""
    for number in _SIGNALS:
        signal.signal(number, stop)
    unblock()


def unblock():
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)


def stop(number, _):
    raise Stopped(number)


def checked_commit(text):
    """A commit as git writes it, or nothing for the pinned one.

    Raises:
        Failed: it is none.
    """
    if text and not (7 <= len(text) <= 40 and set(text) <= set("0123456789abcdef")):
        raise Failed(f"ALGOPERF_COMMIT={text}: 7 to 40 digits of 0-9a-f")
    return text


def digest_of(extra, torch, venv, commit=""):
    """sha256 of what decides an installation: the files it is made from, and where it lies."""
    names = _ALGOPERF_FILES if extra == ALGOPERF else ("pyproject.toml", "constraints.txt")
    total = hashlib.sha256(f"{extra} {torch} {venv}\0".encode(errors="surrogateescape"))
    total.update(commit.encode())
    for name in names:
        total.update(hashlib.sha256((ROOT / name).read_bytes()).digest())
    return total.hexdigest()


def is_whole(venv, extra, digest):
    """Whether the environment holds the extra, installed to the end."""
    if (venv / MARKER).exists() or not os.access(venv / "bin" / "python", os.X_OK):
        return False
    try:
        return (venv / (STAMP + extra)).read_text(encoding="utf-8") == digest
    except FileNotFoundError:
        return False


def install(venv, python, extra, torch, digest, commit=""):
    """Install under the lock; nothing is done if another call has done it meanwhile."""
    venv.parent.mkdir(parents=True, exist_ok=True)
    lock = os.open(beside(venv, ".lock"), os.O_RDWR | os.O_CREAT, 0o644)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"waiting: another make installs into {venv.name}", flush=True)
            fcntl.flock(lock, fcntl.LOCK_EX)
        for path in list(venv.parent.iterdir()):
            if path.name.startswith(venv.name + ".partial-"):  # of a kill while one was removed
                shutil.rmtree(path)
        settle(venv)
        if is_whole(venv, extra, digest):
            return
        print(f"installing into {venv.name} (once; extra: {extra})", flush=True)
        try:
            if not venv.exists():
                create(venv)
                call(lock, [python, "-m", "venv", str(venv)], "makes no environment")
            else:
                mark(venv)
            pip = [str(venv / "bin" / "python"), "-m", "pip", "install"]
            for arguments in pip_arguments(extra, torch, commit):
                call(lock, pip + arguments, "did not install; its reason is above")
        except BaseException:
            settle(venv)
            raise
        stamps = json.loads((venv / MARKER).read_text(encoding="utf-8"))["stamps"]
        whole = [STAMP + name for name in (extra, *EXTRAS.get(extra, ()))]
        stamps.update({name: digest_of(name[len(STAMP) :], torch, venv, commit) for name in whole})
        release(venv, stamps)
    finally:
        os.close(lock)


def pip_arguments(extra, torch, commit=""):
    """What follows ``pip install``, one list a call. ``commit``: another than the pinned one."""
    common = ["--quiet", "--disable-pip-version-check"]
    if extra == ALGOPERF:
        first, second = (str(ROOT / name) for name in _ALGOPERF_FILES)
        code = ["-r", second]
        if commit:
            pinned = Path(second).read_text(encoding="utf-8").strip().splitlines()[-1]
            code = [f"{pinned.rpartition('@')[0]}@{commit}"]
        return [[*common, f"torch=={torch}", "-r", first], [*common, "--no-deps", *code]]
    return [[*common, "-c", str(ROOT / "constraints.txt"), "-e", f"{ROOT}[{extra}]"]]


def settle(venv):
    """After this the environment is whole as of its stamps, or absent.

    Raises:
        Failed: the folder was not made here, so it is neither trusted nor removed.
    """
    if not venv.exists():
        return
    if not venv.is_dir():
        raise Failed(f"{venv}: a file is where the environment would be; set VENV=")
    try:
        before = json.loads((venv / MARKER).read_text(encoding="utf-8"))
    except FileNotFoundError:
        if any(venv.glob(STAMP + "*")):
            if not os.access(venv / "bin" / "python", os.X_OK):  # its Python was removed or moved
                remove(venv)
        elif any(venv.iterdir()):
            raise Failed(
                f"{venv}: not made by this make, or left half made by an older one; remove it, or "
                f"use it as it is: VENV=none PYTHON={venv}/bin/python"
            ) from None
        else:
            venv.rmdir()
        return
    if before["stamps"] and before["contents"] == contents(venv):
        release(venv, before["stamps"])
    else:
        remove(venv)


def create(venv):
    """The folder with its marker in it, in one step."""
    fresh = beside(venv, f".partial-{os.getpid()}")
    fresh.mkdir()
    mark(fresh)
    fresh.rename(venv)


def mark(venv):
    """Say that the environment is being changed, and how it was before."""
    paths = list(venv.glob(STAMP + "*"))
    stamps = {path.name: path.read_text(encoding="utf-8") for path in paths}
    write(venv / MARKER, json.dumps({"stamps": stamps, "contents": contents(venv)}))
    for path in paths:
        path.unlink()


def release(venv, stamps):
    """Put the stamps there, then take the marker away."""
    for name, digest in stamps.items():
        write(venv / name, digest)
    (venv / MARKER).unlink()


def contents(venv):
    """Names and times of what pip adds to or takes away: packages and programs."""
    folders = [*venv.glob("lib/python*/site-packages"), venv / "bin"]
    return {
        f"{folder.name}/{entry.name}": entry.stat(follow_symlinks=False).st_mtime_ns
        for folder in folders
        if folder.is_dir()
        for entry in os.scandir(folder)
        if entry.name != "__pycache__"
    }


def remove(venv):
    """Remove an environment: at once for who looks on, its files after that."""
    gone = beside(venv, f".partial-{os.getpid()}")
    venv.rename(gone)
    shutil.rmtree(gone)


def call(lock, arguments, complaint):
    """Run a program that holds the lock as long as it lives."""
    program = None
    try:
        signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)  # until it is known to be there
        try:
            program = subprocess.Popen(
                arguments,
                cwd=ROOT,
                pass_fds=[lock],
                stdin=subprocess.DEVNULL,
                process_group=0,
                preexec_fn=unblock,
            )
        finally:
            unblock()
        code = program.wait()
    except Stopped:  # the program and what it has started know nothing of it
        if program is not None:
            os.killpg(program.pid, signal.SIGTERM)
            program.wait()
        raise
    if code < 0:
        raise Failed(f"{arguments[0]} was ended by signal {-code}; the same command begins anew")
    if code:
        raise Failed(f"{' '.join(arguments[:4])} {complaint}")


def beside(path, ending):
    """``path`` with an ending after its whole name."""
    return path.with_name(path.name + ending)


def write(path, text):
    """Write a file whole or not at all."""
    fresh = beside(path, ".new")
    fresh.write_text(text, encoding="utf-8")
    fresh.replace(path)


if __name__ == "__main__":
    sys.exit(main())
