"""Tokens for rows of logits, chosen by the C++ kernels: ``csrc/sampling.inl``, all rows of a pass in one call.

What each setting means, ``engine/request.py`` says; ``engine/sampler.py`` has the same arithmetic in NumPy, and the
tests hold the two to each other. A token depends on its row, its settings, its seed and its position in the answer
alone.
"""

from __future__ import annotations

import ctypes
from array import array
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from quadriga.kernels.cpu import bindings
from quadriga.kernels.cpu.library import Context, address

Floats = NDArray[np.float32]
Ids = NDArray[np.int32]


class Logits(Protocol):
    """Rows of logits (R, V) float32: a NumPy array, or what becomes one where somebody reads it."""

    @property
    def shape(self) -> tuple[int, ...]:
        """(R, V)"""
        ...

    def __getitem__(self, key: Any, /) -> Any:
        """As an array's."""
        ...

    def __len__(self) -> int:
        """R."""
        ...

    def __array__(self) -> NDArray[Any]:
        """The array."""
        ...


class Sampled(NamedTuple):
    """What became of a row."""

    token_id: int
    """-1: no token may be chosen, or the logits are not finite."""
    log_sum: float
    """log(sum(exp(logits))); not finite where a logit is not."""
    logit: float
    """The token's, as it came from the model."""
    top: tuple[tuple[int, float], ...]
    """The most probable tokens and their logits, best first."""


class RowSettings:
    """How the rows of one answer become tokens.

    Args:
        unused: ids that are never chosen and never listed.
        early: ids that are not chosen while :meth:`set` says so.
        moves: token id -> what is added to its logit.
        breaks, breakers: where repetitions end; see ``engine.dry``. (V,) uint8 and its longer sequences, flat.
        temperature: 0: greedy.
        n_top: so many of the most probable tokens are listed.

    Attributes:
        struct: the numbers, and where the arrays lie; at last what became of the row.
        address: where it lies.
        lists: unused, early, ids that are moved, and by how much.
        allowed: see :meth:`set`.
        history: what :meth:`said` was given.
    """

    def __init__(
        self,
        *,
        unused: Ids,
        early: Ids,
        moves: Mapping[int, float],
        temperature: float,
        repetition_penalty: float,
        presence_penalty: float,
        frequency_penalty: float,
        top_k: int,
        top_p: float,
        min_p: float,
        typical_p: float,
        xtc_probability: float,
        xtc_threshold: float,
        dry_multiplier: float,
        dry_base: float,
        dry_allowed_length: int,
        breaks: NDArray[np.uint8] | None,
        breakers: Ids | None,
        n_top: int,
        seed: int,
    ) -> None:
        moved, amounts = np.array([*moves], np.int32), np.array([*moves.values()], np.float32)
        self._top_ids, self._top_logits = np.empty(n_top, np.int32), np.empty(n_top, np.float32)
        self._n_early = len(early)
        self.lists = (unused, early, moved, amounts)
        self._keep: tuple[object, ...] = (breaks, breakers)
        self.history: tuple[Ids, Ids] | None = None
        self.allowed: NDArray[np.bool_] | None = None
        self.struct = bindings.Sampling(
            unused=unused.ctypes.data,
            early=early.ctypes.data,
            moved=moved.ctypes.data,
            moves=amounts.ctypes.data,
            n_unused=len(unused),
            n_moved=len(moved),
            temperature=temperature,
            repetition_penalty=repetition_penalty,
            presence_penalty=presence_penalty,
            frequency_penalty=frequency_penalty,
            top_p=top_p,
            min_p=min_p,
            typical_p=typical_p,
            xtc_probability=xtc_probability,
            xtc_threshold=xtc_threshold,
            dry_multiplier=dry_multiplier,
            dry_base=dry_base,
            dry_allowed_length=dry_allowed_length,
            breaks=None if breaks is None else breaks.ctypes.data,
            breakers=None if breakers is None else breakers.ctypes.data,
            n_breakers=0 if breakers is None else len(breakers),
            top_k=top_k,
            n_top=n_top,
            seed=seed,
            top_ids=self._top_ids.ctypes.data,
            top_logits=self._top_logits.ctypes.data,
        )
        self.address = ctypes.addressof(self.struct)
        self._chosen = self.struct.chosen

    def set(self, position: int, *, early: bool, allowed: NDArray[np.bool_] | None) -> None:
        """What is different for every token.

        Args:
            position: in the answer.
            early: the answer is too short to end.
            allowed: (V,), the tokens that may be chosen; None: all.
        """
        struct = self.struct
        struct.position, struct.n_early = position, self._n_early if early else 0
        self.allowed = allowed  # its memory must live until the row is sampled
        struct.allowed = None if allowed is None else np.ascontiguousarray(allowed).ctypes.data

    def said(self, ids: Ids, counts: Ids, n: int) -> None:
        """The first n of ids, all different, are in prompt and answer; counts: how often in the answer."""
        struct = self.struct
        struct.n_said = n
        if self.history is None or self.history[0] is not ids:
            self.history = ids, counts
            struct.said, struct.counts = ids.ctypes.data, counts.ctypes.data

    def repeats(self, history: Ids) -> None:
        """The tokens so far in which repetitions are looked for, the newest last."""
        self._looked_at = history  # its memory must live until the row is sampled
        self.struct.history, self.struct.n_history = history.ctypes.data, len(history)

    def sampled(self) -> Sampled:
        """What became of the row that was sampled last."""
        chosen = self._chosen
        n = chosen.n_top
        top = tuple(zip(self._top_ids[:n].tolist(), self._top_logits[:n].tolist(), strict=True)) if n else ()
        return Sampled(chosen.token, chosen.log_sum, chosen.logit, top)


class TokenSampler(Protocol):
    """What chooses tokens from rows of logits, each by settings of its own."""

    def beside(self) -> TokenSampler:
        """One whose tokens are the same, for another thread, which works while passes are computed."""
        ...

    def sample(self, logits: Logits, places: Sequence[int], settings: Sequence[RowSettings]) -> list[Sampled]:
        """Choose a token for some rows of logits (R, V); one setting for each place."""
        ...


class RowSampler:
    """Samples rows on the threads of a context."""

    def __init__(self, context: Context) -> None:
        self._context = context
        self._alone: RowSampler | None = None

    def beside(self) -> RowSampler:
        """One that works beside this one's context, on one thread; its tokens are the same."""
        if self._alone is None:
            self._alone = RowSampler(Context(1, self._context.isa))
        return self._alone

    def sample(self, logits: Logits, places: Sequence[int], settings: Sequence[RowSettings]) -> list[Sampled]:
        """Choose a token for some rows of logits (R, V) float32, contiguous; one setting for each place, all different.

        Raises:
            HardwareError: no memory is left for the intermediate results.
        """
        values = logits if isinstance(logits, np.ndarray) else np.asarray(logits)
        assert values.dtype.char == "f", "logits are float32"
        v = values.shape[-1]
        base, stride = address(values), 4 * v
        for place, setting in zip(places, settings, strict=True):
            setting.struct.logits = base + place * stride
        rows = array("Q", [setting.address for setting in settings])
        self._context.call(self._context.lib.qd_sample, rows.buffer_info()[0], len(rows), v)
        return [setting.sampled() for setting in settings]
