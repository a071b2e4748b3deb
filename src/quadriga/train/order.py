"""The order in which a curriculum reads its domains: stateless arithmetic on step and row numbers.

    row g of a stage  ->  its domain, and how many rows of that domain came before     (Mix)
    row j of a domain ->  a unit of the domain's stream, and a row inside that unit    (StageOrder)
    unit v            ->  epoch v // n, and a pseudo-random place in it                (shuffle)

A unit is ``unit_tokens`` consecutive tokens. A stage takes a whole number of units in the shuffled order. It reads one
row of each unit, then another row of each, so that neighbouring rows are read far apart in time and no token is read
twice in an epoch. Less than one unit per domain is left over at the end of a stage. Nothing depends on ranks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from quadriga.errors import ConfigError

_MASK = (1 << 64) - 1
MIX_PERIOD = 4096
"""Weights of a mix are rounded to multiples of 1 / MIX_PERIOD; the pattern of rows repeats with this period."""


def hash64(*values: int) -> int:
    """A 64-bit hash of whole numbers (SplitMix64's finaliser applied to each in turn)."""
    h = 0x9E3779B97F4A7C15
    for value in values:
        h = (h ^ (value & _MASK)) + 0x9E3779B97F4A7C15 & _MASK
        h = (h ^ (h >> 30)) * 0xBF58476D1CE4E5B9 & _MASK
        h = (h ^ (h >> 27)) * 0x94D049BB133111EB & _MASK
        h ^= h >> 31
    return h


def shuffle(index: int, n: int, key: int) -> int:
    """Map ``index`` by a pseudo-random permutation of 0 .. n-1 determined by ``key``, in constant time and memory.

    A four-round Feistel network on the next even number of bits; results outside the range are mapped again (cycle
    walking), less than four times on average.
    """
    assert 0 <= index < n, "index within the permutation"
    half = max(1, ((n - 1).bit_length() + 1) // 2)
    mask = (1 << half) - 1
    while True:
        left, right = index >> half, index & mask
        for r in range(4):
            left, right = right, left ^ (hash64(key, r, right) & mask)
        index = left << half | right
        if index < n:
            return index


class Mix:
    """Assigns a stage's rows to domains in fixed proportion; counts over any range of rows are off by about 1.

    A pattern of MIX_PERIOD rows is built once and repeats, so the number of a domain's rows before any row takes one
    division and one table look-up.
    """

    def __init__(self, weights: Sequence[float], seed: int) -> None:
        quotas = _apportion(weights, MIX_PERIOD)
        keys = [
            ((j + (hash64(seed, d, j) >> 11) / 2**53) / quota, d)
            for d, quota in enumerate(quotas)
            for j in range(quota)
        ]
        self._domain = np.array([d for _, d in sorted(keys)], dtype=np.int16)
        chosen = np.zeros((MIX_PERIOD + 1, len(quotas)), dtype=np.int64)
        chosen[np.arange(1, MIX_PERIOD + 1), self._domain] = 1
        self._before = chosen.cumsum(axis=0)
        self.quotas = quotas

    def domain(self, row: int) -> int:
        """Index of the domain of row ``row`` of the stage."""
        return int(self._domain[row % MIX_PERIOD])

    def before(self, row: int, domain: int) -> int:
        """How many of the rows 0 .. row-1 belong to ``domain``."""
        periods, rest = divmod(row, MIX_PERIOD)
        return periods * self.quotas[domain] + int(self._before[rest, domain])


def _apportion(weights: Sequence[float], parts: int) -> list[int]:
    """Divide ``parts`` in proportion to the weights (largest remainders); each weight above 0 gets at least one."""
    total = sum(weights)
    exact = [parts * weight / total for weight in weights]
    quotas = [max(1, int(x)) if weight > 0 else 0 for x, weight in zip(exact, weights, strict=True)]
    by_need = sorted(range(len(weights)), key=lambda d: (quotas[d] - exact[d], d))
    for d in by_need[: max(0, parts - sum(quotas))]:
        quotas[d] += 1
    while sum(quotas) > parts:  # many tiny weights were rounded up to one part
        can_give = (d for d in range(len(quotas)) if quotas[d] > 1)
        quotas[max(can_give, key=lambda d: (quotas[d] - exact[d], quotas[d]))] -= 1
    return quotas


@dataclass(frozen=True)
class DomainShape:
    """A domain's name and number of tokens."""

    name: str
    n_tokens: int


@dataclass(frozen=True)
class StageShape:
    """The sizes and mix of a stage, as the order needs them."""

    seq_len: int
    n_rows: int
    n_steps: int
    weights: Mapping[str, float]


class Curriculum:
    """The reading order of all stages over all domains.

    Raises:
        ConfigError: a mix names an unknown domain, or a domain has fewer tokens than a unit.
    """

    def __init__(
        self, domains: Sequence[DomainShape], stages: Sequence[StageShape], unit_tokens: int, seed: int
    ) -> None:
        self.domains, self.stages, self.unit_tokens, self.seed = tuple(domains), tuple(stages), unit_tokens, seed
        names = [domain.name for domain in domains]
        self.mixes: list[Mix] = []
        self._first_units: list[list[int]] = []
        next_unit = [0] * len(domains)
        for number, stage in enumerate(stages):
            weights = self._weights(number, names)
            self.mixes.append(Mix(weights, hash64(seed, number)))
            self._first_units.append(list(next_unit))
            for d in range(len(names)):
                next_unit[d] += -(-self.stage_rows(number, d) // (unit_tokens // stage.seq_len))
        self.units_read = next_unit
        for d, domain in enumerate(domains):
            if next_unit[d] and domain.n_tokens < unit_tokens:
                raise ConfigError(
                    f"domain {domain.name!r} has {domain.n_tokens} tokens, less than one unit of data.unit_tokens="
                    f"{unit_tokens}. Lower unit_tokens (it must stay a multiple of every seq_len) or prepare more text."
                )

    def _weights(self, number: int, names: list[str]) -> list[float]:
        weights = self.stages[number].weights
        unknown = sorted(set(weights) - set(names))
        if unknown:
            raise ConfigError(
                f"data.stages[{number}].mix names {', '.join(unknown)}, but the corpora have {', '.join(names)}"
            )
        if not weights:
            return [float(domain.n_tokens) for domain in self.domains]
        return [float(weights.get(name, 0.0)) for name in names]

    def stage_rows(self, stage: int, domain: int) -> int:
        """Rows of ``domain`` in the whole stage."""
        return self.mixes[stage].before(self.stages[stage].n_rows * self.stages[stage].n_steps, domain)

    def epochs(self, domain: int) -> float:
        """How often the whole curriculum reads the domain; may be fractional."""
        per_epoch = self.domains[domain].n_tokens // self.unit_tokens
        return self.units_read[domain] / per_epoch if per_epoch else 0.0

    def place(self, stage: int, row: int) -> tuple[int, int]:
        """(domain, first token in its stream) of row ``row`` of a stage, counted from the stage's start."""
        mix = self.mixes[stage]
        domain = mix.domain(row)
        nth = mix.before(row, domain)
        unit, inner = self._unit(stage, domain, nth)
        n_tokens = self.domains[domain].n_tokens
        per_epoch = n_tokens // self.unit_tokens
        epoch, index = divmod(unit, per_epoch)
        place = shuffle(index, per_epoch, hash64(self.seed, domain, epoch))
        # Each epoch starts at another place in the stream, so that rows are cut at other places.
        offset = hash64(self.seed, domain, epoch, 1) % n_tokens
        return domain, (offset + place * self.unit_tokens + inner * self.stages[stage].seq_len) % n_tokens

    def _unit(self, stage: int, domain: int, nth: int) -> tuple[int, int]:
        """(unit, row within it) of a stage's ``nth`` row of a domain; an epoch's units come before the next epoch's."""
        per_unit = self.unit_tokens // self.stages[stage].seq_len
        per_epoch = self.domains[domain].n_tokens // self.unit_tokens
        first = self._first_units[stage][domain]
        rest = self.stage_rows(stage, domain)
        head = min(per_epoch - first % per_epoch, -(-rest // per_unit))  # units until the current epoch ends
        if nth >= head * per_unit:
            whole, nth_left = divmod(nth - head * per_unit, per_epoch * per_unit)
            first, rest, nth = first + head + whole * per_epoch, rest - (head + whole * per_epoch) * per_unit, nth_left
            head = min(per_epoch, -(-rest // per_unit))
        turn, unit = divmod(nth, head)
        return first + unit, (turn + hash64(self.seed, domain, first + unit, 2)) % per_unit
