"""Stops a run in good order when it is sent SIGTERM, as schedulers do before they take a machine away.

The run asks at moments that all of its processes come to in the same order: after a training step, a gradient of the
pruner, a batch that is scored. Of several processes any may get the signal; JAX's own service tells the others and
settles the moment, the same for all. JAX is imported late: a main that listens from its start has not imported it yet.
"""

import signal
import threading
import types

# What sysexits.h calls a temporary failure: the same command, given again, goes on.
EXIT_STATUS = 75


class Preempted(Exception):
    """SIGTERM came. What the run had done is saved; the same call goes on with it."""

    def __str__(self) -> str:
        return f"stopped by SIGTERM; the same command goes on where it was (exit status {EXIT_STATUS})"


class StopSignal:
    """Listens for SIGTERM while it is entered.

    A process that has joined others (`jax.distributed.initialize`) leaves the signal to JAX, which listens from then
    on. Only the main thread can listen otherwise; in another one the signal keeps its meaning.
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
        """Whether all processes are to stop now; to be asked by all of them, equally often."""
        from jax.experimental import multihost_utils

        self._num_asked += 1
        # False where no others have been joined.
        return self._is_sent or multihost_utils.reached_preemption_sync_point(self._num_asked)

    def check(self) -> None:
        """Raises `Preempted` where `is_due`; to be called as that is asked."""
        if self.is_due():
            raise Preempted
