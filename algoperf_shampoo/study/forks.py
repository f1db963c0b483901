"""Runs as forks of one process that has imported everything: no run pays for it again.

:class:`Forks` belongs to the launcher; ``scripts/fork.py`` is the process that forks
(:func:`serve`). They talk over a socket, a line of JSON each: a run's arguments with the pipe that
it is to write to, then its process id, then its exit code. Every run is a process of its own that
executes its program as from a command line, so a failure or a signal is that run's alone. If the
launcher dies the server does, and if the server dies its runs do (Linux).
"""

from __future__ import annotations

import array
import functools
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TextIO

from algoperf_shampoo import interrupt
from algoperf_shampoo.harness.algoperf import processes

_LINE = 65536
_LOST = 1
"""Exit code of runs whose server has died."""


class Forked:
    """One run, used like a :class:`subprocess.Popen`."""

    def __init__(self, forks: Forks, number: int, stdout: TextIO) -> None:
        self._forks, self.number, self.stdout = forks, number, stdout
        self.pid: int | None = None
        self.returncode: int | None = None

    def poll(self) -> int | None:
        """Its exit code, negative for a signal; None while it runs."""
        self._forks.listen(0.0)
        return self.returncode

    def wait(self) -> int:
        """The same, when it has ended."""
        while self.returncode is None:
            self._forks.listen(1.0)
        return self.returncode

    def send_signal(self, number: int) -> None:
        """To a run that has not ended."""
        while self.pid is None and self.returncode is None:
            self._forks.listen(1.0)
        if self.returncode is None and self.pid is not None:
            with suppress(ProcessLookupError):
                os.kill(self.pid, number)


class Forks:
    """The launcher's end: a server that is started at once, and the runs it has forked.

    Args:
        root: of the repository.
    """

    def __init__(self, root: Path) -> None:
        self._socket, theirs = socket.socketpair()
        with theirs:
            self._server = subprocess.Popen(
                [sys.executable, str(root / "scripts" / "fork.py"), str(theirs.fileno())],
                cwd=root,
                env={**os.environ, "PYTHONUNBUFFERED": "1"},
                stdin=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
                preexec_fn=functools.partial(processes.die_with_parent, os.getpid()),
            )
        self._runs: dict[int, Forked] = {}
        self._count, self._read = 0, b""

    def start(self, program: Path, arguments: Sequence[str]) -> Forked:
        """Run a Python program; its output is the result's ``stdout``."""
        ours, theirs = os.pipe()
        self._count += 1
        run = Forked(self, self._count, os.fdopen(ours, encoding="utf-8", errors="replace"))
        self._runs[self._count] = run
        asked = {"number": self._count, "program": str(program), "arguments": list(arguments)}
        try:
            _send(self._socket, json.dumps(asked), theirs)
        except OSError:
            self._lose()
        finally:
            os.close(theirs)
        return run

    def listen(self, seconds: float) -> None:
        """Take what the server says, waiting so long for a first word."""
        while select.select([self._socket], [], [], seconds)[0]:
            seconds = 0.0
            with suppress(ConnectionResetError):
                data = self._socket.recv(_LINE)
                *lines, self._read = (self._read + data).split(b"\n")
                for said in map(json.loads, lines):
                    run = self._runs[said["number"]]
                    run.pid = said.get("pid", run.pid)
                    run.returncode = said.get("code")
                if data:
                    continue
            self._lose()
            return

    def close(self) -> None:
        """End the server; runs that are still going end with it."""
        self._socket.close()
        try:
            self._server.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self._server.kill()
            self._server.wait()

    def _lose(self) -> None:
        for run in self._runs.values():
            run.returncode = _LOST if run.returncode is None else run.returncode
        time.sleep(0.01)  # a socket at its end is always ready


def serve(connection: socket.socket) -> None:
    """Fork what is asked for until the other end closes. Everything a run needs is imported."""
    server = os.getpid()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal's; the launcher ends what runs
    numbers: dict[int, int] = {}  # by process id
    read, pipes, open_ = b"", [], True
    while open_ or numbers:
        ready = select.select([connection], [], [], 0.02)[0] if open_ else []
        if ready:
            data, pipes_now = _receive(connection)
            pipes += pipes_now
            *lines, read = (read + data).split(b"\n")
            for line in lines:
                asked, pipe = json.loads(line), pipes.pop(0)
                pid = os.fork()
                if pid == 0:
                    _become(asked["program"], asked["arguments"], pipe, connection, server)
                os.close(pipe)
                numbers[pid] = asked["number"]
                _send(connection, json.dumps({"number": asked["number"], "pid": pid}))
            if not data:
                open_ = False
                for pid in numbers:
                    with suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGTERM)
        while numbers:
            pid, status = os.waitpid(-1, os.WNOHANG if open_ else 0)
            if pid == 0:
                break
            said = {"number": numbers.pop(pid), "code": os.waitstatus_to_exitcode(status)}
            with suppress(OSError):
                _send(connection, json.dumps(said))


def _become(
    program: str, arguments: Sequence[str], pipe: int, connection: socket.socket, server: int
) -> None:
    """In a fork: be the program, and end with it."""
    code = 1
    try:
        interrupt.install()
        processes.die_with_parent(server)
        connection.close()
        os.dup2(pipe, 1)
        os.dup2(pipe, 2)
        os.close(pipe)
        sys.stdout, sys.stderr = (_writing_to(descriptor) for descriptor in (1, 2))
        sys.argv = [program, *arguments]
        runpy.run_path(program, run_name="__main__")
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
    finally:
        with suppress(OSError, ValueError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


def _writing_to(descriptor: int) -> TextIO:
    return os.fdopen(descriptor, "w", buffering=1, closefd=False)


def _send(connection: socket.socket, text: str, pipe: int | None = None) -> None:
    data = (text + "\n").encode()
    if pipe is None:
        connection.sendall(data)
        return
    sent = socket.send_fds(connection, [data], [pipe])
    connection.sendall(data[sent:])


def _receive(connection: socket.socket) -> tuple[bytes, list[int]]:
    room = socket.CMSG_SPACE(16 * array.array("i").itemsize)
    try:
        data, ancillary, _, _ = connection.recvmsg(_LINE, room)
    except ConnectionResetError:
        return b"", []
    pipes = array.array("i")
    for level, kind, content in ancillary:
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
            pipes.frombytes(content[: len(content) - len(content) % pipes.itemsize])
    return data, list(pipes)
