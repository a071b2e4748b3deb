"""What a run reads, as frozen structs: the ``[data]`` section of a run's TOML file. No tensors, no files, no torch.

    [data]
    corpora = ["corpora/mix"]                # directories that `quadriga data prepare` wrote

    [[data.stages]]                          # a curriculum: one stage after the other
    tokens = "24M"
    seq_len = 512
    batch_tokens = 65536
    mix = {en = 0.3, zh = 0.3, code = 0.2, math = 0.2}

    [[data.stages]]
    tokens = "6M"
    seq_len = 2048
    batch_tokens = 65536
    mix = {code = 0.5, math = 0.5}

A stage that has begun is frozen: a resumed run refuses any change to it. To train longer, add a stage.
"""

from __future__ import annotations

import math
import re
from typing import Any

import msgspec

from quadriga.errors import ConfigError

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "b": 10**9, "g": 10**9, "t": 10**12}
_COUNT = re.compile(r"\s*(\d+(?:\.\d+)?(?:e\d+)?)\s*([kmbgt]?)\s*", re.IGNORECASE)


def parse_count(text: int | str, what: str = "a count of tokens") -> int:
    """A positive whole number from ``12_000`` or ``"12T"``: K, M, B (or G) and T are powers of a thousand.

    Raises:
        ConfigError: it is neither.
    """
    if isinstance(text, int) and not isinstance(text, bool):
        count = text
    else:
        match = _COUNT.fullmatch(str(text).replace("_", ""))
        count = round(float(match[1]) * _UNITS[match[2].lower()]) if match else 0
    if count < 1:
        raise ConfigError(f"{what} looks like 30_000_000 or 12T, got {text!r}")
    return count


class StageConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One stage of the curriculum: how long, in rows of which length, from which mix."""

    tokens: int | str
    """Length of the stage; rounded up to whole batches."""
    seq_len: int
    """Tokens of a row; must divide ``DataConfig.unit_tokens``."""
    batch_tokens: int | str
    """Tokens of a global batch (an optimiser step), over all ranks; a whole number of rows."""
    mix: dict[str, float] = {}
    """Domain -> weight, normalised; {} takes every domain by its number of tokens."""

    def __post_init__(self) -> None:
        if self.seq_len < 1:
            raise ConfigError(f"data.stages.seq_len must be at least 1, got {self.seq_len}")
        if self.n_batch_tokens % self.seq_len:
            raise ConfigError(
                f"data.stages.batch_tokens must be a multiple of seq_len={self.seq_len}, got {self.n_batch_tokens}; "
                f"take {max(1, round(self.n_batch_tokens / self.seq_len)) * self.seq_len}"
            )
        bad = {name: weight for name, weight in self.mix.items() if not (math.isfinite(weight) and weight >= 0)}
        if bad:
            raise ConfigError(f"data.stages.mix weights must be finite and not negative, got {bad}")
        if self.mix and not sum(self.mix.values()):
            raise ConfigError("data.stages.mix must give at least one domain a weight above 0")

    @property
    def n_tokens(self) -> int:
        """``tokens`` as a number."""
        return parse_count(self.tokens, "data.stages.tokens")

    @property
    def n_batch_tokens(self) -> int:
        """``batch_tokens`` as a number."""
        return parse_count(self.batch_tokens, "data.stages.batch_tokens")

    @property
    def n_rows(self) -> int:
        """Rows of a global batch."""
        return self.n_batch_tokens // self.seq_len

    @property
    def n_steps(self) -> int:
        """Optimiser steps of the stage."""
        return -(-self.n_tokens // self.n_batch_tokens)


class DataConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Which corpora, in which order."""

    corpora: list[str]
    """Directories written by ``quadriga data prepare`` with one tokenizer; domains of one name are joined."""
    stages: list[StageConfig]
    seed: int = 17
    unit_tokens: int = 32768
    """Documents are shuffled in stretches of this length. Frozen for a run: later stages may have rows up to it."""
    max_epochs: float | None = None
    """Refuse a curriculum that reads a domain more often than this; None allows any."""

    def __post_init__(self) -> None:
        if not self.corpora:
            raise ConfigError("data.corpora must name at least one directory written by `quadriga data prepare`")
        if not self.stages:
            raise ConfigError("data.stages must have at least one stage")
        if self.unit_tokens < 1:
            raise ConfigError(f"data.unit_tokens must be at least 1, got {self.unit_tokens}")
        for stage in self.stages:
            if self.unit_tokens % stage.seq_len:
                raise ConfigError(
                    f"data.unit_tokens must be a multiple of every stage's seq_len: got {self.unit_tokens} and "
                    f"seq_len={stage.seq_len}"
                )

    @property
    def n_steps(self) -> int:
        """Optimiser steps of the whole curriculum."""
        return sum(stage.n_steps for stage in self.stages)

    @property
    def n_tokens(self) -> int:
        """Tokens of the whole curriculum."""
        return sum(stage.n_steps * stage.n_batch_tokens for stage in self.stages)

    def stage_at(self, step: int) -> tuple[int, int]:
        """(index of the stage that optimiser step ``step`` belongs to, that stage's first step)."""
        first = 0
        for index, stage in enumerate(self.stages):
            if step < first + stage.n_steps:
                return index, first
            first += stage.n_steps
        raise ConfigError(f"the curriculum has {first} steps; there is no step {step}. Add a stage to train longer.")

    def as_table(self) -> dict[str, Any]:
        """Plain values, for manifests."""
        table = msgspec.to_builtins(self)
        assert isinstance(table, dict)
        return table
