"""Rotary positions as config.json and GGUF state them, both ways; shared by every family whose layers rotate.

    config.json   rope_theta, rope_scaling {"rope_type" or "type", ...}     transformers 4
                  rope_parameters {"rope_theta", "rope_type", ...}          transformers 5
    GGUF          rope.freq_base, rope.scaling.*; LLaMA-3's bands as a factor a pair in a tensor, rope_freqs.weight

Sources: transformers 4.57.6 and 5.24.0 (modeling_rope_utils), llama.cpp (convert_hf_to_gguf.py, llama-model.cpp and
ggml's ``rope_yarn``). GGUF files of LLaMA-3 keep the factors and not the bands they were made by; where the factors are
those of the bands that LLaMA-3.1 to 3.3 have, the bands are what is read.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from quadriga.errors import ConfigError
from quadriga.model.config import (
    AttentionSpec,
    FactorScaling,
    LinearScaling,
    Llama3Scaling,
    LongRopeScaling,
    ModelConfig,
    ProportionalScaling,
    RopeScaling,
    RopeSpec,
    YarnScaling,
)
from quadriga.model.families.keys import Keys, shortest_float32
from quadriga.model.families.windows import FULL, SLIDING
from quadriga.model.positions import rotation
from quadriga.model.weight_map import Shape

FREQS = "rope_freqs.weight"
"""GGUF's tensor of one factor a pair, which llama.cpp divides frequencies by."""
VALUES = "tensor values: "
"""Before a tensor's name among GGUF metadata: its numbers, which ``io.detect`` reads for the tensors of VALUES_OF."""
VALUES_OF = (FREQS,)
STANDING = float(np.float32(1e30))
"""The factor of a pair that does not turn, in files of arch gemma4."""
_FACTOR_ARCHS = frozenset({"llama", "granite", "granitemoe"})
"""Architectures in which llama.cpp reads the tensor of factors."""

# config.json ---------------------------------------------------------------------------------------------------------


def rope_from_hf(keys: Keys, head_dim: int, max_seq_len: int, *, partial: bool = False) -> RopeSpec:
    """Base, part of the head that turns, and scaling.

    Args:
        partial: whether the family's program turns a part of a head, which the file must then state; where not,
            ``partial_rotary_factor`` must be 1.
    """
    given = keys.given("rope_parameters")
    section = keys.section("rope_parameters") if given else None
    scaled = keys.section("rope_scaling") if keys.given("rope_scaling") else section
    theta = keys.number("rope_theta") if section is None else section.number("rope_theta")
    if section is not None:
        keys.must_be("rope_theta", theta)
    parts = [where for where in (keys, section, scaled) if where is not None]
    stated = [where for where in parts if partial and where.given("partial_rotary_factor")]
    # Where it is missing, the classes have defaults of their own: nothing is guessed, the key is asked for.
    part = (stated or [keys])[0].number("partial_rotary_factor") if partial else 1.0
    for where in parts:
        where.must_be("partial_rotary_factor", part, None)
    # A size out of bounds is for the specs to refuse, not for a product to overflow.
    dim = head_dim if part == 1 or not 0 < head_dim < 2**31 else int(head_dim * part)
    scaling = None
    if scaled is not None:
        scaling = _scaling_from_hf(scaled, keys, max_seq_len)
        # A copy of the key above. transformers 5 takes this one and 4 the other, so they must not differ.
        scaled.must_be("rope_theta", theta, None)
        scaled.finish(frozenset({"finetuned"}))  # left by scripts and read by no program
    if section is not None and section is not scaled:
        if _scaling_from_hf(section, keys, max_seq_len) not in (None, scaling):
            raise ConfigError("config.json: rope_scaling and rope_parameters must say the same; they differ")
        section.finish(frozenset({"finetuned"}))
    return RopeSpec(theta=theta, dim=None if dim == head_dim else dim, scaling=scaling)


def _scaling_from_hf(keys: Keys, outer: Keys, max_seq_len: int) -> RopeScaling | None:
    names = [name for name in ("rope_type", "type") if keys.given(name)]
    kind = keys.text(names[0]) if names else "default"
    for name in names:
        keys.must_be(name, kind)
    match kind:
        case "default":
            keys.must_be("factor", 1, None)
            return None
        case "linear":
            factor = keys.number("factor")
            return None if factor == 1 else LinearScaling(factor=factor)
        case "llama3":
            return Llama3Scaling(
                factor=keys.number("factor"),
                low_freq_factor=keys.number("low_freq_factor"),
                high_freq_factor=keys.number("high_freq_factor"),
                original_max_seq_len=keys.integer("original_max_position_embeddings"),
            )
        case "yarn":
            return _yarn_from_hf(keys, max_seq_len)
        case "longrope" | "su":
            return _longrope_from_hf(keys, outer, max_seq_len)
        case "dynamic":
            raise ConfigError(
                "config.json: rope_scaling of the type 'dynamic' changes the frequencies with the length of the text, "
                "so that every cached key would have to be computed again at every token. Quadriga does not support "
                "it; within the original context the model is the same without rope_scaling."
            )
    raise ConfigError(
        f"config.json: rope_scaling's type must be default, linear, llama3, yarn or longrope, got {kind[:40]!r}"
    )


def _yarn_from_hf(keys: Keys, max_seq_len: int) -> YarnScaling:
    factor, names = keys.number("factor"), ("mscale", "mscale_all_dim")
    # transformers: no original length means max_position_embeddings; 0 or null are the paper's 32 and 1.
    original = "original_max_position_embeddings"
    mscale, all_dims = (keys.number(name) if keys.given(name) else 0.0 for name in names)
    if keys.given("attention_factor"):
        attention = keys.number("attention_factor")
    elif mscale and all_dims:
        attention = usual_attention_factor(factor, mscale) / usual_attention_factor(factor, all_dims)
    else:
        attention = usual_attention_factor(factor)
    fast, slow = (keys.number(name) if keys.given(name) else 0.0 for name in ("beta_fast", "beta_slow"))
    return YarnScaling(
        factor=factor,
        original_max_seq_len=keys.integer(original) if keys.given(original) else max_seq_len,
        attention_factor=attention,
        beta_fast=fast or 32.0,
        beta_slow=slow or 1.0,
        truncate=keys.flag("truncate") if keys.given("truncate") else True,
    )


def usual_attention_factor(factor: float, mscale: float = 1.0) -> float:
    """What YaRN multiplies cos and sin by where a file does not say: 0.1 mscale ln(factor) + 1."""
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0


def _longrope_from_hf(keys: Keys, outer: Keys, max_seq_len: int) -> LongRopeScaling:
    original = "original_max_position_embeddings"
    n = (outer if outer.given(original) else keys).integer(original)
    keys.must_be(original, n)
    if n < 1:
        raise ConfigError(f"config.json: {original} must be 1 or more, got {n}")
    stretch = max_seq_len / n
    keys.must_be("factor", stretch, None)
    usual = math.sqrt(1 + math.log(stretch) / math.log(n)) if stretch > 1 and n > 1 else 1.0
    both = keys.number("attention_factor") if keys.given("attention_factor") else usual
    short, long = (
        keys.number(name) if keys.given(name) else both for name in ("short_mscale", "long_mscale")
    )  # Phi-MoE has one for each list
    return LongRopeScaling(
        short_factors=keys.numbers("short_factor"),
        long_factors=keys.numbers("long_factor"),
        original_max_seq_len=n,
        short_scale=short,
        long_scale=long,
    )


def without_pictures(text: Mapping[str, object], *sections: str) -> Mapping[str, object]:
    """A text's keys whose sections of a rotation do not say which part of a head turns with pictures' height and width.

    For text all parts turn alike.
    """
    found = dict(text)
    for key in sections:
        rope = text.get(key)
        if isinstance(rope, Mapping):
            found[key] = {name: x for name, x in rope.items() if name not in ("mrope_section", "mrope_interleaved")}
    return found


def ropes_by_kind(keys: Keys, head_dim: int, max_seq_len: int) -> tuple[RopeSpec, RopeSpec]:
    """The rotation of layers with a window, and of those that see all: ``rope_parameters`` has a section for each."""
    sections = keys.section("rope_parameters")
    near, far = (
        rope_from_hf(Keys({"rope_parameters": sections.value(name)}, f"config.json: {name}"), head_dim, max_seq_len)
        for name in (SLIDING, FULL)
    )
    sections.finish(frozenset())
    return near, far


def rope_to_hf(rope: RopeSpec, head_dim: int, form: str) -> dict[str, object]:
    """The keys that transformers 4.57.6 reads.

    Raises:
        ConfigError: frequencies that the format has no formula for.
    """
    keys: dict[str, object] = {"rope_theta": rope.theta, "rope_scaling": None}
    if rope.dim is not None:
        keys["partial_rotary_factor"] = rope.dim / head_dim
    match rope.scaling:
        case LinearScaling(factor=factor):
            keys["rope_scaling"] = {"rope_type": "linear", "factor": factor}
        case Llama3Scaling() as bands:
            keys["rope_scaling"] = {
                "rope_type": "llama3",
                "factor": bands.factor,
                "low_freq_factor": bands.low_freq_factor,
                "high_freq_factor": bands.high_freq_factor,
                "original_max_position_embeddings": bands.original_max_seq_len,
            }
        case YarnScaling() as yarn:
            keys["rope_scaling"] = {
                "rope_type": "yarn",
                "factor": yarn.factor,
                "original_max_position_embeddings": yarn.original_max_seq_len,
                "attention_factor": yarn.attention_factor,
                "beta_fast": yarn.beta_fast,
                "beta_slow": yarn.beta_slow,
                "truncate": yarn.truncate,
            }
        case LongRopeScaling() as long:
            if long.short_scale != long.long_scale:
                raise ConfigError(f"{form} has one attention factor for both lists of LongRoPE, this model two")
            keys["original_max_position_embeddings"] = long.original_max_seq_len
            keys["rope_scaling"] = {
                "rope_type": "longrope",
                "short_factor": list(long.short_factors),
                "long_factor": list(long.long_factors),
                "attention_factor": long.long_scale,
            }
        case ProportionalScaling():
            raise ConfigError(f"{form} has no key for a part of the pairs that turns")
        case FactorScaling():
            raise ConfigError(f"{form} has no key for a factor of every rotary frequency, as GGUF's {FREQS} is")
    return keys


# GGUF ----------------------------------------------------------------------------------------------------------------


def rope_from_gguf(
    keys: Keys,
    arch: str,
    metadata: Mapping[str, object],
    shapes: Mapping[str, Shape],
    max_seq_len: int,
    *,
    multiplier: bool = False,
) -> RopeSpec:
    """Base and scaling.

    Args:
        multiplier: whether the caller reads ``yarn_log_multiplier``; where not, it must be 0.
        metadata: with the values of the tensors in VALUES_OF that the file has, under VALUES + their names.
    """
    # llama.cpp: no freq_base means 10000; LLaMA-2's own files leave it out.
    theta = shortest_float32(keys.number("rope.freq_base")) if keys.given("rope.freq_base") else 10_000.0
    # llama.cpp: no type is linear; no factor, or 0, divides by nothing; the key was scale_linear once.
    kind = keys.text("rope.scaling.type") if keys.given("rope.scaling.type") else "linear"
    named = next((k for k in ("rope.scaling.factor", "rope.scale_linear") if keys.given(k) and keys.number(k)), None)
    factor = shortest_float32(keys.number(named)) if named else 1.0
    keys.must_be("rope.scale_linear", 0, 1, factor)
    for key in ("alpha", "yarn_ext_factor"):
        keys.must_be(f"rope.scaling.{key}", 0, 1)
    if not multiplier:
        keys.must_be("rope.scaling.yarn_log_multiplier", 0)
    scaling: RopeScaling | None = None
    match kind:
        case "yarn" if factor != 1:
            scaling = _yarn_from_gguf(keys, factor, max_seq_len)
        case "linear" if factor != 1:
            scaling = LinearScaling(factor=factor)
        case "none" | "linear" | "yarn":
            pass
        case _:
            raise ConfigError(f"GGUF rope.scaling.type must be none, linear or yarn, got {kind[:40]!r}")
    if not isinstance(scaling, YarnScaling):
        for key in ("attn_factor", "yarn_attn_factor"):
            keys.must_be(f"rope.scaling.{key}", 1, 0)
    # Facts about how a scaled model was made; nothing reads them where the formula does not.
    for key in ("original_context_length", "finetuned", "yarn_beta_fast", "yarn_beta_slow"):
        keys.has(f"rope.scaling.{key}")
    if FREQS in shapes:
        if scaling is not None or arch not in _FACTOR_ARCHS:
            raise ConfigError(
                f"the GGUF file has {FREQS}, which must stand alone and in arch {', '.join(_FACTOR_ARCHS)}"
            )
        scaling = _from_factors(theta, metadata.get(VALUES + FREQS), shapes[FREQS])
    return RopeSpec(theta=theta, scaling=scaling)


def _yarn_from_gguf(keys: Keys, factor: float, max_seq_len: int) -> YarnScaling:
    """llama.cpp multiplies the usual attention factor by ``attn_factor``; no original length means the context."""

    def number(name: str, missing: float) -> float:
        key = f"rope.scaling.{name}"
        return (shortest_float32(keys.number(key)) if keys.given(key) else missing) or missing

    original = "rope.scaling.original_context_length"
    usual, more = usual_attention_factor(factor), number("attn_factor", 1.0) * number("yarn_attn_factor", 1.0)
    return YarnScaling(
        factor=factor,
        original_max_seq_len=keys.integer(original) if keys.given(original) else max_seq_len,
        attention_factor=usual if more == 1 else shortest_float32(float(np.float32(usual * more))),
        beta_fast=number("yarn_beta_fast", 32.0),
        beta_slow=number("yarn_beta_slow", 1.0),
    )


def _from_factors(theta: float, values: object, shape: Shape) -> Llama3Scaling | FactorScaling | None:
    """The bands of LLaMA-3 where the factors are theirs, else the factors; None if they change nothing."""
    if not isinstance(values, list) or len(values) != shape[-1]:
        raise ConfigError(f"the values of {FREQS} must be read with the file's metadata; there are none")
    spec = FactorScaling(factors=tuple(values))
    if all(value == 1 for value in spec.factors):
        return None
    bands = Llama3Scaling(
        factor=max(spec.factors), low_freq_factor=1.0, high_freq_factor=4.0, original_max_seq_len=8192
    )
    alike = factors_of(RopeSpec(theta=theta, scaling=bands), 2 * len(values))
    return bands if np.allclose(alike, spec.factors, rtol=2e-6, atol=0) else spec


def factors_of(rope: RopeSpec, head_dim: int) -> list[float]:
    """What every frequency is divided by, as float32 keeps it."""
    plain, bent = (
        rotation(spec, head_dim, 1).frequencies.astype(np.float64) for spec in (replace(rope, scaling=None), rope)
    )
    return [shortest_float32(float(value)) for value in (plain / bent).astype(np.float32)]


def gguf_tensors(config: ModelConfig) -> dict[str, list[float]]:
    """The tensors beside the weights that a GGUF of this model has: name -> values."""
    for layer in config.kinds():
        mixer = layer.mixer
        if not isinstance(mixer, AttentionSpec) or not isinstance(mixer.position, RopeSpec):
            continue
        if isinstance(scaling := mixer.position.scaling, ProportionalScaling):
            turning, n_pairs = int(scaling.part * mixer.head_dim // 2), mixer.head_dim // 2
            return {FREQS: [1.0] * turning + [STANDING] * (n_pairs - turning)}
    attn = config.first_attention().attention
    position = attn.position
    if not isinstance(position, RopeSpec):
        return {}
    match position.scaling:
        case FactorScaling(factors=factors):
            return {FREQS: list(factors)}
        case Llama3Scaling():
            return {FREQS: factors_of(position, attn.head_dim)}
    return {}


def rope_to_gguf(rope: RopeSpec, head_dim: int, arch: str) -> dict[str, object]:
    """The keys of rotary positions; see :func:`gguf_tensors` for what is no key.

    Raises:
        ConfigError: llama.cpp does not compute this scaling in this architecture.
    """
    keys: dict[str, object] = {
        f"{arch}.rope.freq_base": rope.theta,
        f"{arch}.rope.dimension_count": rope.rotated(head_dim),
    }
    scaling = f"{arch}.rope.scaling."
    match rope.scaling:
        case LinearScaling(factor=factor):
            keys |= {f"{scaling}type": "linear", f"{scaling}factor": factor}
        case YarnScaling() as yarn:
            if not yarn.truncate:
                raise ConfigError(f"GGUF arch {arch} rounds the ends of YaRN's ramp, this model does not")
            keys |= {
                f"{scaling}type": "yarn",
                f"{scaling}factor": yarn.factor,
                f"{scaling}original_context_length": yarn.original_max_seq_len,
                f"{scaling}yarn_beta_fast": yarn.beta_fast,
                f"{scaling}yarn_beta_slow": yarn.beta_slow,
            }
            usual = usual_attention_factor(yarn.factor)
            if yarn.attention_factor != usual:
                keys[f"{scaling}attn_factor"] = yarn.attention_factor / usual
        case ProportionalScaling():
            raise ConfigError(f"GGUF arch {arch} has no key for a part of the pairs that turns")
        case LongRopeScaling():
            raise ConfigError(f"GGUF arch {arch} has no place for LongRoPE's factors in Quadriga's files yet")
        case Llama3Scaling() | FactorScaling() if arch not in _FACTOR_ARCHS:
            raise ConfigError(f"llama.cpp reads {FREQS} in arch {', '.join(sorted(_FACTOR_ARCHS))}, not in {arch}")
    return keys


def as_read(rope: RopeSpec, head_dim: int) -> RopeSpec:
    """``rope`` as a GGUF file with its factors reads back: other bands than LLaMA-3's are factors from then on."""
    if not isinstance(rope.scaling, Llama3Scaling):
        return rope
    factors = factors_of(rope, head_dim)
    return replace(rope, scaling=_from_factors(rope.theta, factors, (len(factors),)))
