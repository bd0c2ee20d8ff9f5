"""A bash whose `python` and `sparsecbm` are forks of a Python that has imported the libraries already.

Two small programs come first on its PATH. Each hands its arguments, folder, environment and open files to a thread
here, which starts the fork, as `tests.support.mains` does, and returns its status.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import json
import os
import runpy
import socket
import stat
import subprocess
import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import NoReturn

from tests.support.mains import FORKSERVER
from tests.support.paths import REPOSITORY

_NUM_FILES = 3  # standard input, output and error
_PROGRAM = """\
#!{python} -ISs
import json, os, socket, sys
with socket.socket(socket.AF_UNIX) as connection:
    connection.connect({address!r})
    request = json.dumps([{first!r} + sys.argv[1:], os.getcwd(), dict(os.environ)]).encode()
    socket.send_fds(connection, [len(request).to_bytes(8, "little")], [0, 1, 2])
    connection.sendall(request)
    status = int(connection.recv(64) or b"1")
sys.exit(status)
"""


class Shell:
    """Runs blocks of bash, in any folder, until it is closed."""

    def __init__(self, folder: Path) -> None:
        """Puts the programs into a folder.

        Args:
            folder: an empty one, whose path is short enough for a socket.
        """
        self._listening = socket.socket(socket.AF_UNIX)
        self._listening.bind(str(folder / "socket"))
        self._listening.listen(16)
        self._path = folder / "bin"
        self._path.mkdir()
        for name, first in (("python", []), ("python3", []), ("sparsecbm", ["-m", "sparsecbm_jax"])):
            program = self._path / name
            program.write_text(_PROGRAM.format(python=sys.executable, address=str(folder / "socket"), first=first))
            program.chmod(program.stat().st_mode | stat.S_IXUSR)
        threading.Thread(target=self._accept, daemon=True).start()

    def run(
        self, code: str, cwd: Path, variables: Mapping[str, str] | None = None, timeout: float = 300
    ) -> subprocess.CompletedProcess[str]:
        """Runs a block up to the first command that fails.

        Args:
            code: the block.
            cwd: where.
            variables: of the environment, beside those of this process.
            timeout: seconds, after which `subprocess.TimeoutExpired` is raised.
        """
        return subprocess.run(
            ["bash", "-euo", "pipefail", "-c", code],
            cwd=cwd,
            env={
                **os.environ,
                "PATH": f"{self._path}{os.pathsep}{os.environ['PATH']}",
                "PYTHONPATH": str(REPOSITORY),
                **(variables or {}),
            },
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=timeout,
        )

    def close(self) -> None:
        """Takes no further commands."""
        with contextlib.suppress(OSError):
            self._listening.shutdown(socket.SHUT_RDWR)
        self._listening.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):  # closed
            while True:
                threading.Thread(target=_attend, args=self._listening.accept()[:1], daemon=True).start()


def _attend(connection: socket.socket) -> None:
    with connection:
        process = FORKSERVER.Process(target=_run, args=(connection,))
        process.start()
        process.join()
        with contextlib.suppress(OSError):  # whoever asked was stopped
            connection.sendall(str(process.exitcode).encode())


def _run(connection: socket.socket) -> None:
    """Is the asked command, in a process of its own."""
    size, files, _, _ = socket.recv_fds(connection, 8, _NUM_FILES)
    request = b""
    while len(request) < int.from_bytes(size, "little"):
        request += connection.recv(1 << 16)
    connection.close()
    arguments, folder, environment = json.loads(request)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    for descriptor, file in enumerate(files):
        os.dup2(file, descriptor)
        os.close(file)
    sys.stdin, sys.stdout, sys.stderr = (
        os.fdopen(descriptor, mode, buffering=1, encoding="utf-8", closefd=False)
        for descriptor, mode in enumerate(("r", "w", "w"))
    )
    gc.disable()
    _become(arguments)


def _become(arguments: list[str]) -> None:
    """Does what Python does with these arguments."""
    with contextlib.ExitStack() as stack:
        for file in (sys.stdout, sys.stderr):
            stack.callback(file.flush)
        stack.callback(atexit._run_exitfuncs)
        match arguments:
            case ["-m", module, *rest]:
                sys.argv = [module, *rest]
                sys.path.insert(0, os.getcwd())
                runpy.run_module(module, run_name="__main__", alter_sys=True)
            case [file, *rest] if not file.startswith("-"):
                sys.argv = [file, *rest]
                sys.path.insert(0, str(Path(file).resolve().parent))
                runpy.run_path(file, run_name="__main__")
            case _:
                _replace(arguments)


def _replace(arguments: list[str]) -> NoReturn:
    os.execv(sys.executable, [sys.executable, *arguments])
