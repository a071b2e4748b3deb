"""Executors run the tasks: in processes of this machine, or on a Ray cluster. No other module knows about processes.

An executor runs the tasks of one step in any order and yields each result when it is ready. Its workers need this
package, and the output folder under the same path (a shared file system if there are several machines).
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from dataclasses import dataclass
from multiprocessing import get_context
from typing import Any, Protocol

from quadriga import runtime
from quadriga.errors import ConfigError, HardwareError


@dataclass(frozen=True)
class Task:
    """A function of ``corpus.tasks`` and its arguments; ``name`` is unique, ``n_bytes`` is its size for progress."""

    name: str
    call: Callable[..., dict[str, Any]]
    args: tuple[Any, ...]
    n_bytes: int = 1


class Executor(Protocol):
    """Runs the tasks of a step."""

    def run(self, tasks: Sequence[Task]) -> Iterator[tuple[Task, dict[str, Any]]]:
        """Run all tasks; yield each with its result when it is ready. The first error is raised and ends the step."""
        ...

    def close(self) -> None:
        """Release the workers."""
        ...


class LocalExecutor:
    """Runs tasks in ``workers`` processes of this machine, or in this process if ``workers`` is 1."""

    def __init__(self, workers: int) -> None:
        if workers < 1:
            raise ConfigError(f"workers must be at least 1, got {workers}")
        # Forked workers inherit this process's imports; spawned ones (where fork is missing) import again.
        method = "fork" if sys.platform == "linux" else "spawn"
        self._pool = ProcessPoolExecutor(workers, mp_context=get_context(method)) if workers > 1 else None

    def run(self, tasks: Sequence[Task]) -> Iterator[tuple[Task, dict[str, Any]]]:
        """Run tasks in worker processes; see :class:`Executor`."""
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
        """End the worker processes."""
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)


class RayExecutor:
    """Runs tasks on a Ray cluster, one CPU per task; Ray runs lost tasks again on other nodes.

    Args:
        address: of a running cluster (``auto``, ``HOST:PORT``), or ``local`` to start one on this machine.
    """

    def __init__(self, address: str) -> None:
        try:
            import ray
        except ImportError:
            raise ConfigError(f"running on a cluster needs Ray: {runtime.install_hint('cluster')}") from None
        self._ray: Any = ray
        self._ours = not ray.is_initialized()
        if self._ours:
            try:
                ray.init(address=address, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
            except (ConnectionError, ValueError) as error:
                raise HardwareError(
                    f"no Ray cluster answers at {address!r} ({error}). Start one with `ray start --head`, then `ray "
                    "start --address HOST:6379` on the other machines."
                ) from None

    def nodes(self) -> int:
        """Number of nodes that are alive."""
        return sum(bool(node["Alive"]) for node in self._ray.nodes())

    def run(self, tasks: Sequence[Task]) -> Iterator[tuple[Task, dict[str, Any]]]:
        """Run tasks on the cluster; see :class:`Executor`."""
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
        """Disconnect from the cluster."""
        if self._ours:
            self._ray.shutdown()
