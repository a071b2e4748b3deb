"""The ``[data]`` section of a run's TOML file, as frozen structs. Imports no torch and opens no files.

    [data]
    corpora = ["corpora/mix"]                # directories written by `quadriga data prepare`

    [[data.stages]]                          # a curriculum: one stage after another
    tokens = "24M"
    seq_len = 512
    batch_tokens = 65536
    mix = {en = 0.3, zh = 0.3, code = 0.2, math = 0.2}

    [[data.stages]]
    tokens = "6M"
    seq_len = 2048
    batch_tokens = 65536
    mix = {code = 0.5, math = 0.5}

Once a stage has begun it must not change: a resumed run refuses any change to it. To train longer, add a stage.
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
    """Parse a positive whole number such as ``12_000`` or ``"12T"``; K, M, B (or G) and T are powers of 1000.

    Raises:
        ConfigError: anything else; ``what`` names the value in the message.
    """
    if isinstance(text, int) and not isinstance(text, bool):
        count = text
    else:
        match = _COUNT.fullmatch(str(text).replace("_", ""))
        count = round(float(match[1]) * _UNITS[match[2].lower()]) if match else 0
    if count < 1:
        raise ConfigError(f"{what} must look like 30_000_000 or 12T, got {text!r}")
    return count


class StageConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One stage of the curriculum: its length, row length, batch size and mix of domains."""

    tokens: int | str
    """Length of the stage in tokens, rounded up to whole batches; a number or text such as "24M"."""
    seq_len: int
    """Tokens per row; must divide ``DataConfig.unit_tokens``."""
    batch_tokens: int | str
    """Tokens per global batch (one optimiser step, all ranks); a multiple of ``seq_len``."""
    mix: dict[str, float] = {}
    """Domain -> weight, normalised to sum 1; {}: weights in proportion to the domains' tokens."""

    def __post_init__(self) -> None:
        if self.seq_len < 1:
            raise ConfigError(f"data.stages.seq_len must be at least 1, got {self.seq_len}")
        if self.n_batch_tokens % self.seq_len:
            raise ConfigError(
                f"data.stages.batch_tokens must be a multiple of seq_len={self.seq_len}, got {self.n_batch_tokens}: "
                f"use {max(1, round(self.n_batch_tokens / self.seq_len)) * self.seq_len}"
            )
        bad = {name: weight for name, weight in self.mix.items() if not (math.isfinite(weight) and weight >= 0)}
        if bad:
            raise ConfigError(f"data.stages.mix weights must be finite and not negative, got {bad}")
        if self.mix and not sum(self.mix.values()):
            raise ConfigError("data.stages.mix must give at least one domain a weight above 0")

    @property
    def n_tokens(self) -> int:
        """``tokens`` parsed to a number."""
        return parse_count(self.tokens, "data.stages.tokens")

    @property
    def n_batch_tokens(self) -> int:
        """``batch_tokens`` parsed to a number."""
        return parse_count(self.batch_tokens, "data.stages.batch_tokens")

    @property
    def n_rows(self) -> int:
        """Rows per global batch."""
        return self.n_batch_tokens // self.seq_len

    @property
    def n_steps(self) -> int:
        """Optimiser steps of the stage."""
        return -(-self.n_tokens // self.n_batch_tokens)


class DataConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The corpora and the curriculum over them."""

    corpora: list[str]
    """Directories written by ``quadriga data prepare`` with the same tokenizer, or their addresses in an object store
    (s3://, gs://, hf://); domains of equal name are joined."""
    cache_bytes: int | str = "20G"
    """Most bytes of shards of a corpus in an object store that a process keeps on this machine's disk."""
    stages: list[StageConfig]
    seed: int = 17
    unit_tokens: int = 32768
    """Data are shuffled in units of this many tokens. Fixed for a run; bounds the seq_len of later stages."""
    max_epochs: float | None = None
    """Refuse a curriculum that reads a domain more often than this; None: no limit."""
    prefetch: int = 2
    """Steps whose rows are read ahead, in a thread; 0: none."""

    def __post_init__(self) -> None:
        if not self.corpora:
            raise ConfigError("data.corpora must name at least one directory written by `quadriga data prepare`")
        if not self.stages:
            raise ConfigError("data.stages must have at least one stage")
        if self.prefetch < 0:
            raise ConfigError(f"data.prefetch must be 0 or above, got {self.prefetch}")
        if self.max_epochs is not None and not self.max_epochs > 0:
            raise ConfigError(f"data.max_epochs must be above 0, got {self.max_epochs}")
        if self.unit_tokens < 1:
            raise ConfigError(f"data.unit_tokens must be at least 1, got {self.unit_tokens}")
        _ = self.n_cache_bytes
        for stage in self.stages:
            if self.unit_tokens % stage.seq_len:
                raise ConfigError(
                    f"data.unit_tokens must be a multiple of every stage's seq_len: got {self.unit_tokens} and "
                    f"seq_len={stage.seq_len}"
                )

    @property
    def n_cache_bytes(self) -> int:
        """``cache_bytes`` parsed to a number."""
        return parse_count(self.cache_bytes, "data.cache_bytes")

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
        raise ConfigError(f"the curriculum has {first} steps, got step {step}. Add a stage to train longer.")

    def as_table(self) -> dict[str, Any]:
        """All values as a plain dictionary, for manifests."""
        table = msgspec.to_builtins(self)
        assert isinstance(table, dict)
        return table
