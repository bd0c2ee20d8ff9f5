"""Runs the mains of `launch/` in processes of their own, forked from one that has imported the libraries already."""

from __future__ import annotations

import atexit
import contextlib
import gc
import io
import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.support.paths import REPOSITORY

# Importing these takes five seconds, which is more than most mains do in a test.
FORKSERVER = multiprocessing.get_context("forkserver")
FORKSERVER.set_forkserver_preload(
    ["sparsecbm_jax.training.run", "sparsecbm_jax.explanation.pathways", "transformers.tokenization_utils_tokenizers"]
)


def run_main(name: str, *arguments: str, cwd: Path = REPOSITORY) -> subprocess.CompletedProcess[str]:
    """What `python launch/NAME ARGUMENTS...` leaves: its status and what it printed."""
    command = [str(REPOSITORY / "launch" / name), *arguments]
    with tempfile.TemporaryDirectory() as folder:
        printed = [Path(folder, stream) for stream in ("stdout", "stderr")]
        process = FORKSERVER.Process(target=_run, args=(command, cwd, printed))
        process.start()
        process.join()
        out, err = (path.read_text(encoding="utf-8") if path.exists() else "" for path in printed)
    assert process.exitcode is not None
    return subprocess.CompletedProcess(command, process.exitcode, out, err)


def _run(command: list[str], cwd: Path, printed: list[Path]) -> None:
    gc.disable()
    os.chdir(cwd)
    for name, descriptor, path in zip(("stdout", "stderr"), (1, 2), printed, strict=True):
        file = os.open(path, os.O_WRONLY | os.O_CREAT)
        os.dup2(file, descriptor)
        os.close(file)
        setattr(sys, name, io.TextIOWrapper(io.FileIO(descriptor, "w", closefd=False), "utf-8", write_through=True))
    sys.argv = command
    sys.path.insert(0, str(Path(command[0]).parent))
    with contextlib.ExitStack() as stack:
        stack.callback(atexit._run_exitfuncs)
        runpy.run_path(command[0], run_name="__main__")
