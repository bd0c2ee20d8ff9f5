"""One run in several processes, on one host or many: how they find each other, and what each ends with.

JAX is told where the others are by `--coordinator=HOST:PORT` with `--num_processes` and `--process_id`, by
`JAX_COORDINATOR_ADDRESS` with `JAX_NUM_PROCESSES` and `JAX_PROCESS_ID`, or finds them itself with `--coordinator=auto`
(SLURM, Open MPI, TPU pods, Kubernetes; so does `SPARSECBM_DISTRIBUTED=1`). Without any of these a process is alone.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import traceback
import types
from collections.abc import Iterator
from typing import NoReturn

from absl import flags

from sparsecbm_jax.runtime.preemption import EXIT_STATUS, Preempted

FLAGS = flags.FLAGS
flags.DEFINE_string("coordinator", None, "HOST:PORT that process 0 listens on, or auto: JAX finds the other processes.")
flags.DEFINE_integer("num_processes", None, "Processes of the run, with --coordinator=HOST:PORT.", lower_bound=1)
flags.DEFINE_integer("process_id", None, "Number of this process, from 0, with --coordinator=HOST:PORT.", lower_bound=0)
flags.DEFINE_integer("start_seconds", 300, "How long processes wait for each other at the start.", lower_bound=1)
flags.DEFINE_integer("heartbeat_seconds", 100, "Silence after which a process counts as dead.", lower_bound=5)


def start() -> int:
    """Joins the other processes of the run, where there are any; call before any array is made.

    From here on SIGTERM ends this process with the status that asks for another start, unless somebody else listens.

    Returns:
        The index of this process: 0 is the one that prints and writes summaries.

    Raises:
        ValueError: Only some of the flags are given.
        ConnectionError: The others are not there in time.
    """
    signal.signal(signal.SIGTERM, _leave)
    import jax

    address = FLAGS.coordinator or os.environ.get("JAX_COORDINATOR_ADDRESS")
    is_found = address == "auto" or (not address and os.environ.get("SPARSECBM_DISTRIBUTED") == "1")
    if not address and not is_found:
        if FLAGS.num_processes is not None or FLAGS.process_id is not None:
            raise ValueError("--num_processes and --process_id go with --coordinator=HOST:PORT, which is missing")
        return 0
    given: tuple[int | None, int | None] = (None, None)
    if not is_found:
        given = (_number("num_processes", "JAX_NUM_PROCESSES"), _number("process_id", "JAX_PROCESS_ID"))
    try:
        jax.distributed.initialize(
            None if is_found else address,
            *given,
            initialization_timeout=FLAGS.start_seconds,
            heartbeat_timeout_seconds=FLAGS.heartbeat_seconds,
            shutdown_timeout_seconds=FLAGS.heartbeat_seconds,
        )
    except jax.errors.JaxRuntimeError as error:
        reason = str(error).splitlines()[0]
        raise ConnectionError(
            f"the other processes of the run could not be joined within {FLAGS.start_seconds} s: {reason}"
        ) from error
    return jax.process_index()


def _leave(number: int, frame: types.FrameType | None) -> NoReturn:
    # Not an exception: libraries that are just being loaded end the process with another status when they meet one.
    os._exit(EXIT_STATUS)


def _number(flag: str, variable: str) -> int | None:
    """Returns a flag, or else a variable of the environment; None where JAX is to find it."""
    given = FLAGS[flag].value
    if given is None and variable in os.environ:
        try:
            given = int(os.environ[variable])
        except ValueError:
            raise ValueError(f"{variable} is {os.environ[variable]!r}; expected an integer") from None
    return given


@contextlib.contextmanager
def ending_in_order() -> Iterator[None]:
    """Gives a run that was sent SIGTERM its exit status, and ends at once where work with the others has failed.

    JAX ends a process itself (status 134, "Terminating process because the JAX distributed service detected fatal
    errors") when another one is silent for `--heartbeat_seconds` while it waits.
    """
    import jax

    try:
        yield
    except Preempted as preempted:
        print(preempted, file=sys.stderr, flush=True)
        sys.exit(EXIT_STATUS)
    except jax.errors.JaxRuntimeError as error:
        if jax.process_count() == 1:
            raise
        traceback.print_exc()
        print(
            f"error: process {jax.process_index()} of {jax.process_count()} ends, since work with the others failed: "
            f"{str(error).splitlines()[0]}\nAnother process may have died; its own log says why. The same command, in "
            "all processes, goes on after the last checkpoint.",
            file=sys.stderr,
            flush=True,
        )
        sys.stdout.flush()
        # An orderly end would wait for the others.
        os._exit(1)
