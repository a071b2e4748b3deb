"""The ranks of a run: one process, or several started by torchrun; gloo on CPUs, NCCL on GPUs.

A single process needs no process group: collectives then return their input. A second, small gloo group carries the
messages about checkpoints, which are written while training continues.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from quadriga import runtime
from quadriga.errors import QuadrigaError, TrainingError
from quadriga.nn import devices

_CPU = torch.device("cpu")


@dataclass(frozen=True)
class World:
    """This process's rank, the number of ranks, its device, and the collectives among them."""

    rank: int = 0
    size: int = 1
    device: torch.device = _CPU
    watch: dist.ProcessGroup | None = None
    owned: bool = False
    """True if the process group was created here; Ray Train, for one, creates it for its workers."""

    @classmethod
    def join(cls, device: str = "auto", timeout_s: float = 600.0) -> World:
        """Create the process group if torchrun started this process; otherwise a world of one rank.

        Raises:
            HardwareError: the device is not available.
        """
        place = runtime.launched_rank()
        if place is None:
            return cls(device=devices.resolve_device(device))
        local = devices.resolve_device(device)
        if local.type == "cuda":
            local = torch.device("cuda", place)
            torch.cuda.set_device(local)
        timeout = timedelta(seconds=timeout_s)
        owned = not dist.is_initialized()
        if owned:
            dist.init_process_group("nccl" if local.type == "cuda" else "gloo", timeout=timeout)
        watch = dist.new_group(backend="gloo", timeout=timeout)
        return cls(dist.get_rank(), dist.get_world_size(), local, watch, owned)

    @property
    def first(self) -> bool:
        """True on rank 0, which prints and writes logs."""
        return self.rank == 0

    def sum(self, values: Tensor, among: dist.ProcessGroup | None = None) -> Tensor:
        """All-reduce: the sum of a detached tensor over all ranks (of a group), on all of them."""
        if self.size == 1:
            return values
        total = values.clone()
        try:
            dist.all_reduce(total, group=among)
        except RuntimeError as error:
            raise self.lost(error) from error
        return total

    def gather(self, values: Tensor) -> list[Tensor]:
        """All-gather host tensors of equal shape and dtype over the second group; safe in a second thread."""
        if self.size == 1:
            return [values]
        parts = [torch.empty_like(values) for _ in range(self.size)]
        try:
            dist.all_gather(parts, values, group=self.watch)
        except RuntimeError as error:
            raise self.lost(error) from error
        return parts

    def wait(self) -> None:
        """Barrier: block until all ranks have called this."""
        self.gather(torch.zeros(1))

    def first_does(self, action: Callable[[], None]) -> None:
        """Do something on rank 0 while the others wait; if it fails, all ranks raise its error.

        Raises:
            Exception: what ``action`` raises; on other ranks a :class:`TrainingError` in place of an unexpected one.
        """
        wrong: Exception | None = None
        if self.first:
            try:
                action()
            except Exception as error:
                wrong = error
        if self.size > 1:
            told = wrong
            if wrong is not None and not isinstance(wrong, QuadrigaError):
                told = TrainingError(f"rank 0 failed: {type(wrong).__name__}: {wrong}")
            box = [told]
            try:
                dist.broadcast_object_list(box, src=0, group=self.watch)
            except RuntimeError as error:
                raise self.lost(error) from error
            wrong = wrong or box[0]
        if wrong is not None:
            raise wrong

    @staticmethod
    def is_lost(error: RuntimeError) -> bool:
        """True for the errors that gloo and NCCL raise when a rank does not answer."""
        text = str(error).lower()
        return any(word in text for word in ("timed out", "timeout", "connection", "gloo", "nccl"))

    def lost(self, error: RuntimeError) -> TrainingError:
        """Turn a failed collective's error into one that names the ranks that do not answer.

        Every rank that gets here reports to the rendezvous store; ranks that have not after some seconds are dead or
        hung.
        The collective's own error does not name them: it is a closed connection or a timeout.
        """
        silent = self._silent_ranks(10.0)
        who = f" Ranks that do not answer: {silent}." if silent else ""
        first = (str(error).splitlines() or ["unknown"])[0]
        return TrainingError(
            f"rank {self.rank} of {self.size} lost the others.{who} ({first[:200]}) Look at their output; torchrun "
            "--max-restarts with --resume auto continues from the last checkpoint."
        )

    def _silent_ranks(self, patience_s: float) -> list[int]:
        try:
            store = dist.distributed_c10d._get_default_store()
            store.set(f"quadriga/alive/{self.rank}", "1")
            silent = [rank for rank in range(self.size) if rank != self.rank]
            deadline = time.monotonic() + patience_s
            while silent and time.monotonic() < deadline:
                silent = [rank for rank in silent if not store.check([f"quadriga/alive/{rank}"])]
                time.sleep(0.1)
            return silent
        except RuntimeError:  # the rank that hosts the store is gone
            return [0]

    def leave(self) -> None:
        """Destroy the process group, if :meth:`join` created one."""
        if self.owned and dist.is_initialized():
            # Sharded modules are cycles that hold groups. Freed at the interpreter's end, with their threads, they
            # ended some processes by SIGABRT after their work was done (3 of 12 runs of a test; 0 of 14 since).
            gc.collect()
            dist.destroy_process_group()
