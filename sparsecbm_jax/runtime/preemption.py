"""An orderly stop of a run on SIGTERM, which schedulers send before they take a machine away.

The run asks at moments that all of its processes reach in the same order: after a training step, a gradient of the
pruner, a batch that is scored. Of several processes any may get the signal; JAX's own service tells the others and
fixes the moment, the same for all. JAX is imported late: a main that listens from its start has not imported it yet.
"""

import signal
import threading
import types

# A temporary failure in sysexits.h: the same command, given again, goes on.
EXIT_STATUS = 75


class Preempted(Exception):
    """The stop of a run by SIGTERM. Its work so far is saved; the same call goes on from there."""

    def __str__(self) -> str:
        return f"stopped by SIGTERM; the same command goes on where it was (exit status {EXIT_STATUS})"


class StopSignal:
    """A context that listens for SIGTERM.

    In a process that has joined others (`jax.distributed.initialize`) JAX listens instead. Otherwise only the main
    thread can listen; in any other thread the signal keeps its meaning.
    """

    def __init__(self) -> None:
        self._is_sent = False
        self._num_asked = 0

    def __enter__(self) -> "StopSignal":
        import jax

        is_main = threading.current_thread() is threading.main_thread()
        self._is_listening = is_main and not jax.distributed.is_initialized()
        if self._is_listening:
            self._before = signal.signal(signal.SIGTERM, self._on_signal)
        return self

    def __exit__(self, *_: object) -> None:
        if self._is_listening:
            signal.signal(signal.SIGTERM, self._before)

    def _on_signal(self, number: int, frame: types.FrameType | None) -> None:
        self._is_sent = True

    def is_due(self) -> bool:
        """Returns True where all processes are to stop now; all of them must call it, equally often."""
        from jax.experimental import multihost_utils

        self._num_asked += 1
        # False in a process that has not joined others.
        return self._is_sent or multihost_utils.reached_preemption_sync_point(self._num_asked)

    def check(self) -> None:
        """Calls `is_due`, and raises `Preempted` where it is true.

        Raises:
            Preempted: All processes are to stop now.
        """
        if self.is_due():
            raise Preempted
