"""One thread that runs all work of the model, so that requests wait for it in turn."""

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from sparsecbm_jax.app.security import too_many

T = TypeVar("T")


class Worker:
    """One thread for the model's work, and a bound on the number of requests that wait for it."""

    def __init__(self, max_waiting: int) -> None:
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="model")
        self._max_waiting, self.num_waiting = max_waiting, 0

    async def do(self, work: Callable[..., T], *args: Any) -> T:
        """Runs work in the thread, after all earlier work, and returns its result.

        Args:
            work: The function to run.
            *args: Its arguments.

        Raises:
            ApiError: 429, if too many requests wait already.
        """
        if self.num_waiting >= self._max_waiting:
            raise too_many(f"{self.num_waiting} requests wait for the model already", 1)
        self.num_waiting += 1
        turn = asyncio.get_running_loop().run_in_executor(self._pool, work, *args)
        turn.add_done_callback(self._is_done)
        # Work counts until it is done, also when its request was cancelled.
        return await asyncio.shield(turn)

    def _is_done(self, turn: asyncio.Future) -> None:
        self.num_waiting -= 1
        if not turn.cancelled():
            turn.exception()

    def close(self) -> None:
        """Waits for the work that has begun; cancels work that has not."""
        self._pool.shutdown(cancel_futures=True)
