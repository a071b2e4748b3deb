"""Who runs the tasks: processes of this machine, or a Ray cluster. Nothing else here knows about processes or nodes.

An executor takes tasks of one step, in any order, and hands back each result as it comes. It needs two things of its
workers: this package, and the output folder under the same path (a shared file system, when there are machines).
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from dataclasses import dataclass
from multiprocessing import get_context
from typing import Any, Protocol

from quadriga.errors import ConfigError, HardwareError


@dataclass(frozen=True)
class Task:
    """A function of ``corpus.tasks`` and its arguments; ``name`` is unique, ``n_bytes`` measures it for the bar."""

    name: str
    call: Callable[..., dict[str, Any]]
    args: tuple[Any, ...]
    n_bytes: int = 1


class Executor(Protocol):
    """Runs tasks."""

    def run(self, tasks: Sequence[Task]) -> Iterator[tuple[Task, dict[str, Any]]]:
        """Run all tasks; yield each with its result, as it ends. The first error ends the step."""
        ...

    def close(self) -> None:
        """Let go of the workers."""
        ...


class LocalExecutor:
    """``workers`` processes of this machine; one worker is this process."""

    def __init__(self, workers: int) -> None:
        if workers < 1:
            raise ConfigError(f"workers must be at least 1, got {workers}")
        # Forked workers share this process's imports; where there is no fork they import for themselves.
        method = "fork" if sys.platform == "linux" else "spawn"
        self._pool = ProcessPoolExecutor(workers, mp_context=get_context(method)) if workers > 1 else None

    def run(self, tasks: Sequence[Task]) -> Iterator[tuple[Task, dict[str, Any]]]:
        """See :class:`Executor`."""
        if self._pool is None:
            for task in tasks:
                yield task, task.call(*task.args)
            return
        running = {self._pool.submit(task.call, *task.args): task for task in tasks}
        while running:
            ended, _ = wait(running, return_when=FIRST_COMPLETED)
            for future in ended:
                yield running.pop(future), future.result()

    def close(self) -> None:
        """See :class:`Executor`."""
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)


class RayExecutor:
    """The nodes of a Ray cluster: one processor a task, lost tasks are run again elsewhere by Ray.

    Args:
        address: of a running cluster (``auto``, ``HOST:PORT``), or ``local`` to start one in this machine.
    """

    def __init__(self, address: str) -> None:
        try:
            import ray
        except ImportError:
            raise ConfigError("running on a cluster needs Ray: pip install 'quadriga[cluster]'") from None
        self._ray: Any = ray
        self._ours = not ray.is_initialized()
        if self._ours:
            try:
                ray.init(address=address, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
            except (ConnectionError, ValueError) as error:
                raise HardwareError(
                    f"no Ray cluster answers at {address!r} ({error}). Start one: `ray start --head`, then `ray start "
                    "--address HOST:6379` on the other machines."
                ) from None

    def nodes(self) -> int:
        """Machines that are alive."""
        return sum(bool(node["Alive"]) for node in self._ray.nodes())

    def run(self, tasks: Sequence[Task]) -> Iterator[tuple[Task, dict[str, Any]]]:
        """See :class:`Executor`."""
        ray = self._ray
        options = {"num_cpus": 1, "max_retries": 3, "scheduling_strategy": "SPREAD"}
        running = {ray.remote(task.call).options(**options).remote(*task.args): task for task in tasks}
        while running:
            (ended,), _ = ray.wait(list(running), num_returns=1)
            task = running.pop(ended)
            try:
                yield task, ray.get(ended)
            except ray.exceptions.RayTaskError as error:
                raise error.cause from None

    def close(self) -> None:
        """See :class:`Executor`."""
        if self._ours:
            self._ray.shutdown()
