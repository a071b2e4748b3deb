"""How a token knows where it stands: rotation with its scalings, or distances (``model/config.py`` draws the tree)."""

from __future__ import annotations

from dataclasses import dataclass

from quadriga.model.spec_checks import require, require_number, require_positive


@dataclass(frozen=True, kw_only=True)
class LinearScaling:
    """Every frequency divided by ``factor`` (position interpolation, Chen et al. 2023)."""

    factor: float

    def __post_init__(self) -> None:
        require_number("scaling", factor=self.factor)


@dataclass(frozen=True, kw_only=True)
class Llama3Scaling:
    """LLaMA-3.1's bands: low frequencies divided by ``factor``, high ones as they are, between them a mixture.

    A frequency is high that turns more than ``high_freq_factor`` times within the original context, low one that turns
    less than ``low_freq_factor`` times.
    """

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_seq_len: int

    def __post_init__(self) -> None:
        require_positive("scaling", original_max_seq_len=self.original_max_seq_len)
        require_number("scaling", factor=self.factor, low_freq_factor=self.low_freq_factor)
        require_number("scaling", high_freq_factor=self.high_freq_factor)
        require(
            self.low_freq_factor < self.high_freq_factor,
            f"scaling.low_freq_factor must be below high_freq_factor, got {self.low_freq_factor:g} and "
            f"{self.high_freq_factor:g}",
        )


@dataclass(frozen=True, kw_only=True)
class YarnScaling:
    """YaRN (Peng et al. 2023, section 3.2): from ``beta_fast`` turns in the original context on frequencies stay, below
    ``beta_slow`` they are divided by ``factor``, with a linear ramp over the pairs between; cos and sin are multiplied
    by ``attention_factor``.
    """

    factor: float
    original_max_seq_len: int
    attention_factor: float
    """What is in force, not what a file leaves out: usually 0.1 ln(factor) + 1."""
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    """Whether the ends of the ramp are rounded outwards to whole pairs (gpt-oss: not)."""

    def __post_init__(self) -> None:
        require_positive("scaling", original_max_seq_len=self.original_max_seq_len)
        require_number("scaling", factor=self.factor, attention_factor=self.attention_factor)
        require_number("scaling", beta_fast=self.beta_fast, beta_slow=self.beta_slow)


@dataclass(frozen=True, kw_only=True)
class LongRopeScaling:
    """LongRoPE (Ding et al. 2024): every frequency divided by a factor of its own, from one of two lists.

    Which list is one decision for a model, made by its ``max_seq_len``: the long one where that exceeds
    ``original_max_seq_len``. transformers decides anew in every pass by the longest sequence in it, so that an answer
    depends on who shares its batch, and keys already cached keep the other list's angles. Deciding by the context that
    a model is opened for is llama.cpp's and vLLM's rule; a text below the original length is then read with the long
    factors, unless ``max_seq_len`` is set to the original length.
    """

    short_factors: tuple[float, ...]
    """One for each pair that turns."""
    long_factors: tuple[float, ...]
    original_max_seq_len: int
    short_scale: float
    """cos and sin are multiplied by it where the short factors are in force."""
    long_scale: float

    def __post_init__(self) -> None:
        require_positive("scaling", original_max_seq_len=self.original_max_seq_len)
        require_number("scaling", short_scale=self.short_scale, long_scale=self.long_scale)
        for name in ("short_factors", "long_factors"):
            _freeze_factors(self, name)


@dataclass(frozen=True, kw_only=True)
class FactorScaling:
    """Every frequency divided by a number of its own, as GGUF's ``rope_freqs`` keeps them."""

    factors: tuple[float, ...]
    """One for each pair that turns."""

    def __post_init__(self) -> None:
        _freeze_factors(self, "factors")


@dataclass(frozen=True, kw_only=True)
class ProportionalScaling:
    """The first ``part`` of the pairs turn at their usual frequencies, the others stand (Gemma 4).

    Not ``RopeSpec.dim``, which leaves the last numbers of a head alone: here a pair is a number of the first half of a
    head and one of the second, whatever part of the pairs turns.
    """

    part: float

    def __post_init__(self) -> None:
        require_number("scaling", part=self.part)
        require(self.part <= 1, f"scaling.part must be at most 1, got {self.part}")


def _freeze_factors(spec: object, name: str) -> None:
    """Check a list of factors, and keep it as a tuple: JSON has only lists."""
    values = getattr(spec, name)
    require(isinstance(values, (list, tuple)) and bool(values), f"scaling.{name} must be numbers, one for each pair")
    for value in values:
        require_number("scaling", **{name: value})
    object.__setattr__(spec, name, tuple(float(value) for value in values))


RopeScaling = LinearScaling | Llama3Scaling | YarnScaling | LongRopeScaling | FactorScaling | ProportionalScaling
"""How rotary frequencies are bent towards a longer context. ``dynamic`` has no type: its frequencies change with the
length of the text, so that cached keys would have to be computed again at every token."""


@dataclass(frozen=True, kw_only=True)
class RopeSpec:
    """Rotary positions in the half-rotation (NeoX) form: angle = position * theta^(-2j/dim), bent by ``scaling``.

    Checkpoints whose rotary pairs lie side by side (Meta, ERNIE, DeepSeek) have the rows of q and k put into halves by
    their weight map (``Piece.rotary_heads``), which leaves every score as it was; there is no second form to compute.
    """

    theta: float
    dim: int | None = None
    """How many of a head's numbers turn, the first ones; None: all of them."""
    scaling: RopeScaling | None = None

    def __post_init__(self) -> None:
        require_number("rope", theta=self.theta)
        if self.dim is not None:
            require_positive("rope", dim=self.dim)
            require(self.dim % 2 == 0, f"rope.dim must be even, got {self.dim}")

    def rotated(self, head_dim: int) -> int:
        """How many numbers of a head turn."""
        return head_dim if self.dim is None else self.dim


@dataclass(frozen=True, kw_only=True)
class AlibiSpec:
    """A linear bias slope_h * (key_position - query_position) on the attention scores (Press et al. 2022)."""

    max_bias: float = 8.0

    def __post_init__(self) -> None:
        require_number("alibi", max_bias=self.max_bias)
