"""How ranks reach each other: torch.distributed, gloo between processors. Names torch, and nothing of the kernels.

    everyone   what rank 0 tells: passes, and the end. Waits for as long as nobody asks anything
    data       a stage's parts, hidden states, logits. A rank that does not answer for DATA_TIMEOUT_S is gone
    watch      nothing is ever sent until the end, or that a rank refuses the model: a thread waits at each
               connection, and hears when it closes

Processes that end close their connections, so a lost rank is known at once, in a pass or between two. Then every rank
says so, in one line with the rank's number, and ends: what they have together cannot go on.
"""

from __future__ import annotations

import atexit
import os
import sys
import threading
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

from quadriga.errors import EngineError
from quadriga.model.rank_mesh import RankMesh
from quadriga.runners.base import Floats

DATA_TIMEOUT_S = 300.0
"""As long as a step may take (engine.async_engine)."""
START_TIMEOUT_S = 600.0
"""Machines are not started at once."""
_FOREVER = timedelta(days=365)
_HEAD = 2048
"""Numbers of a message that travel with its length; a decoding step's fit."""
_GRACE_S = 2.0
"""What rank 0 gives a pass under way to fail in order, and be told to whoever waits for it."""
_PART_WAIT_S = 30.0
"""For all others to hear that the work is done, and answer."""
_KNOWN_WAIT_S = 2.0
"""Until the watch has found out who is gone, after a connection failed."""
_REFUSAL_WAIT_S = 20.0
"""For others to come to the refusal that a rank has come to: they have read the same files."""
_PARTING, _REFUSING = -1, -2


class TorchLinks:
    """The links of one process; see the module docstring and ``runners.ranks.Links``.

    Args:
        mesh: of as many ranks as torchrun has started.

    Raises:
        EngineError: the others cannot be reached.
    """

    def __init__(self, mesh: RankMesh) -> None:
        try:
            if not dist.is_initialized():
                dist.init_process_group("gloo", timeout=timedelta(seconds=START_TIMEOUT_S))
            self.place = mesh.place(dist.get_rank())
            self._size = mesh.size
            patience = timedelta(seconds=DATA_TIMEOUT_S)
            self._everyone = dist.new_group(backend="gloo", timeout=_FOREVER)
            self._watch = dist.new_group(backend="gloo", timeout=_FOREVER)
            self._data = dist.new_group(backend="gloo", timeout=patience)
            stages = [
                dist.new_group(list(range(s * mesh.group, (s + 1) * mesh.group)), backend="gloo", timeout=patience)
                for s in range(mesh.pp)
            ]
        except (RuntimeError, ValueError) as error:
            raise EngineError(f"the ranks do not find each other: {_first_line(error)}") from None
        self._stage = stages[self.place.stage]
        self._parting = self._parted = self._failed = False
        self._refused = threading.Event()
        self._exit_code = 1
        atexit.register(self._last)
        self._lost: int | None = None
        self._known = threading.Event()
        watched = range(1, mesh.size) if self.place.rank == 0 else (0,)
        self._watchers = [
            threading.Thread(target=self._keep_watch, args=(rank,), name=f"watch {rank}", daemon=True)
            for rank in watched
        ]
        for thread in self._watchers:
            thread.start()

    # What a pass needs -----------------------------------------------------------------------------------------------

    def meet(self, parts: Floats) -> None:
        """See ``Links``."""
        rows = list(torch.from_numpy(parts).unbind())
        self._guarded(lambda: dist.all_gather(rows, rows[self.place.index], group=self._stage))

    def send(self, values: NDArray[Any], to: int) -> None:
        """See ``Links``."""
        if values.size:
            self._guarded(lambda: dist.send(torch.from_numpy(values), to, group=self._data))

    def receive(self, out: NDArray[Any], source: int) -> None:
        """See ``Links``."""
        if out.size:
            self._guarded(lambda: dist.recv(torch.from_numpy(out), source, group=self._data))

    def tell(self, message: NDArray[np.int32]) -> None:
        """See ``Links``."""
        head = np.zeros(_HEAD + 1, dtype=np.int32)
        head[0] = len(message)
        head[1 : 1 + len(message)] = message[:_HEAD]
        self._broadcast(head)
        if len(message) > _HEAD:
            self._broadcast(message[_HEAD:])

    def hear(self) -> NDArray[np.int32]:
        """See ``Links``."""
        head = np.empty(_HEAD + 1, dtype=np.int32)
        self._broadcast(head)
        n = int(head[0])
        if n <= _HEAD:
            return head[1 : 1 + n]
        rest = np.empty(n - _HEAD, dtype=np.int32)
        self._broadcast(rest)
        return np.concatenate((head[1:], rest))

    def _broadcast(self, values: NDArray[np.int32]) -> None:
        self._guarded(lambda: dist.broadcast(torch.from_numpy(values), 0, group=self._everyone))

    def compare(self, facts: str) -> list[str]:
        """See ``Links``."""
        told: list[Any] = [None] * self._size
        self._guarded(lambda: dist.all_gather_object(told, facts, group=self._everyone))
        return told

    # Who is gone -----------------------------------------------------------------------------------------------------

    def _guarded(self, work: Callable[[], object]) -> None:
        try:
            work()
        except RuntimeError as error:
            self._failed = True
            self._known.wait(_KNOWN_WAIT_S)
            raise self._error(_first_line(error)) from None

    def _error(self, why: str = "") -> EngineError:
        who = "another rank" if self._lost is None else f"rank {self._lost}"
        return EngineError(
            f"rank {self.place.rank} of {self._size}: {who} is gone, or does not answer any more. Its own output says "
            f"why; then start all of them again.{f' ({why})' if why else ''}"
        )

    def _keep_watch(self, rank: int) -> None:
        """Wait at one connection, in a thread of its own, until it closes or the rank at its end parts in order."""
        word = torch.zeros(1, dtype=torch.int64)
        try:
            dist.recv(word, rank, group=self._watch)
        except RuntimeError:
            self._found(rank)
            return
        if word.item() == _PARTING:
            if self.place.rank:
                self._parting = True
                self._tell_watch(_PARTING, [0])
        elif word.item() == _REFUSING:
            if not self._refused.wait(_REFUSAL_WAIT_S):
                self._found(rank)
        else:
            self._found(int(word.item()))

    def _found(self, rank: int) -> None:
        """A rank is gone: say so, tell the others, end."""
        if self._parting or self._known.is_set():
            return
        self._lost = rank
        self._known.set()
        if self.place.rank == 0:
            self._tell_watch(rank, [other for other in range(1, self._size) if other != rank])
        print(f"error: {self._error()}", file=sys.stderr, flush=True)
        if self.place.rank == 0:
            threading.Event().wait(_GRACE_S)
        sys.stdout.flush()
        os._exit(1)

    def _tell_watch(self, word: int, ranks: list[int]) -> None:
        sent = [torch.tensor([word], dtype=torch.int64) for _ in ranks]
        for message, rank in zip(sent, ranks, strict=True):
            try:
                dist.isend(message, rank, group=self._watch)
            except RuntimeError:
                continue  # that one is gone too
        self._kept: list[Tensor] = sent  # as long as they are on their way

    def abandon(self, exit_code: int) -> None:
        """See ``Links``."""
        self._parting, self._exit_code = True, exit_code
        self._refused.set()
        if self._failed:
            return
        # Each says its own reason: who ended at once would look lost to those that are not as far yet.
        self._tell_watch(_REFUSING, [0] if self.place.rank else list(range(1, self._size)))
        for thread in self._watchers:
            thread.join(_REFUSAL_WAIT_S)

    def _last(self) -> None:
        """When all else of this process's end is done: threads still wait in gloo, and cannot be made to stop."""
        if not self._parted:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(self._exit_code)

    def close(self) -> None:
        """See ``Links``."""
        if self._failed or self._known.is_set():
            return
        self._parting = True
        if self.place.rank == 0:
            self._tell_watch(_PARTING, list(range(1, self._size)))
        for thread in self._watchers:
            thread.join(_PART_WAIT_S)
        self._parted = not any(thread.is_alive() for thread in self._watchers)
        if self._parted:
            dist.destroy_process_group()


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]
