"""``params.json``, the configuration in Meta's and Mistral's own folders, as a LLaMA or a Mixtral.

    Meta      dim, n_layers, n_heads, n_kv_heads, multiple_of, ffn_dim_multiplier, norm_eps, rope_theta, vocab_size
    Mistral   dim, n_layers, n_heads, n_kv_heads, head_dim, hidden_dim, norm_eps, rope_theta, vocab_size, moe

Neither file gives the context or the tokens that begin and end a text: those stand in programs and tokenizers. What is
taken for them is said in the notes, which ``quadriga info`` shows. Sources: meta-llama/llama (model.py, ModelArgs),
mistralai/mistral-inference (args.py, transformer.py), for the contexts convert_llama_weights_to_hf.py of transformers.
No torch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TypedDict

from quadriga.errors import ConfigError
from quadriga.model.config import AttentionSpec, DenseSpec, ModelConfig, MoESpec, NormSpec, RopeSpec, uniform_model
from quadriga.model.families.keys import Keys, equal_heads

FILE = "params.json"

LAYOUTS: Mapping[str, tuple[str, ...]] = {"llama2": ("meta",), "mixtral": ("mistral", "mistral-stacked")}
"""Family -> the layouts that files beside a params.json are in."""

_LLAMA3_VOCABULARY = 128_256
_IGNORED = frozenset(
    {
        "max_batch_size",  # how much memory their program sets aside
    }
)


class _Tokens(TypedDict):
    bos_id: int
    eos_ids: tuple[int, ...]


def from_params(raw: Mapping[str, object], table_rows: Callable[[int], int]) -> tuple[ModelConfig, list[str]]:
    """Translate a parsed params.json.

    Args:
        table_rows: given the model's width, says how many rows the stored embedding table has; asked where the file
            says -1 for the vocabulary, as LLaMA-1's and -2's do.

    Returns:
        the model, and what the file leaves open and how it was read.

    Raises:
        ConfigError: a key is missing, unknown, of the wrong type, or asks for what Quadriga does not compute.
    """
    # Some copies of Meta's files have the parameters one level down.
    keys = Keys(raw, FILE) if "model" not in raw else Keys(raw, FILE).section("model")
    notes: list[str] = []
    read = _mistral if keys.given("hidden_dim") else _meta
    vocab_size = keys.integer("vocab_size") if keys.given("vocab_size") else -1
    config = read(keys, table_rows(keys.integer("dim")) if vocab_size == -1 else vocab_size, notes)
    keys.finish(_IGNORED)
    return config, notes


def _meta(keys: Keys, vocab_size: int, notes: list[str]) -> ModelConfig:
    keys.must_be("use_scaled_rope", False)
    d_model, n_heads = keys.integer("dim"), keys.integer("n_heads")
    eps = keys.number("norm_eps")
    theta = 10_000.0
    if keys.given("rope_theta"):
        theta = keys.number("rope_theta")
    else:
        notes.append(f"{FILE} does not give rope_theta: 10000, as in Meta's program of the time")
    n_kv_heads = keys.integer("n_kv_heads") if keys.given("n_kv_heads") else n_heads
    first = eps == 1e-6 or (d_model == 8192 and n_kv_heads == n_heads)  # LLaMA-1: 7B to 33B; its 65B
    context = 16_384 if theta == 1e6 else 8192 if theta > 10_000 else 2048 if first else 4096
    return uniform_model(
        family="llama2",
        vocab_size=vocab_size,
        d_model=d_model,
        n_layers=keys.integer("n_layers"),
        max_seq_len=_context(keys, context, "of Code Llama, LLaMA-3, LLaMA-1 or LLaMA-2, told by base and norm", notes),
        norm=NormSpec(kind="rms", eps=eps),
        mixer=AttentionSpec(
            n_heads=n_heads,
            n_kv_heads=n_kv_heads,
            head_dim=equal_heads(d_model, n_heads),
            position=RopeSpec(theta=theta),
        ),
        ffn=DenseSpec(d_ff=_meta_width(keys, d_model), activation="silu"),
        **_tokens(vocab_size, notes),
    )


def _meta_width(keys: Keys, d_model: int) -> int:
    """Two thirds of four times the model's width, times a factor, rounded up (FeedForward in Meta's model.py)."""
    width, multiple = int(2 * 4 * d_model / 3), keys.integer("multiple_of")
    if multiple < 1:
        raise ConfigError(f"{FILE}: multiple_of must be at least 1, got {multiple}")
    if keys.given("ffn_dim_multiplier"):
        width = int(keys.number("ffn_dim_multiplier") * width)
    return -(-width // multiple) * multiple


def _mistral(keys: Keys, vocab_size: int, notes: list[str]) -> ModelConfig:
    keys.must_be("model_type", "transformer")
    keys.must_be("lora", None)
    keys.must_be("tied_embeddings", False, None)
    window = _window(keys)
    theta = 1e6 if window is None else 1e4
    if keys.given("rope_theta"):
        theta = keys.number("rope_theta")
    else:
        notes.append(f"{FILE} does not give rope_theta: {theta:.12g}, as in Mistral's program of the time")
    d_ff = keys.integer("hidden_dim")
    ffn: DenseSpec | MoESpec = DenseSpec(d_ff=d_ff, activation="silu")
    if keys.given("moe"):
        moe = keys.section("moe")
        n_experts, top_k = moe.integer("num_experts"), moe.integer("num_experts_per_tok")
        ffn = MoESpec(d_ff=d_ff, n_experts=n_experts, top_k=top_k, activation="silu")
        moe.finish(frozenset())
    return uniform_model(
        family="llama2" if isinstance(ffn, DenseSpec) else "mixtral",
        vocab_size=vocab_size,
        d_model=keys.integer("dim"),
        n_layers=keys.integer("n_layers"),
        max_seq_len=_mistral_context(keys, window, notes),
        norm=NormSpec(kind="rms", eps=keys.number("norm_eps")),
        mixer=AttentionSpec(
            n_heads=keys.integer("n_heads"),
            n_kv_heads=keys.integer("n_kv_heads"),
            head_dim=keys.integer("head_dim"),
            position=RopeSpec(theta=theta),
        ),
        ffn=ffn,
        **_tokens(vocab_size, notes),
    )


def _mistral_context(keys: Keys, window: int | None, notes: list[str]) -> int:
    """Up to a window nothing is hidden; beyond it, keys would have to be forgotten."""
    if window is None:
        return _context(keys, 32_768, "of Mistral's models without a window", notes)
    notes.append(f"the context is the window of {FILE}, {window}: beyond it old tokens would have to be forgotten")
    return min(window, _context(keys, window, "the window leaves", []))


def _window(keys: Keys) -> int | None:
    """The sliding window, which some files write as text."""
    value = keys.value("sliding_window")
    if isinstance(value, str) and value.isdecimal() and len(value) < 10:
        return int(value)
    return keys.integer("sliding_window") if value is not None else None


def _context(keys: Keys, otherwise: int, whose: str, notes: list[str]) -> int:
    given = [keys.integer(key) for key in ("max_seq_len", "max_position_embeddings") if keys.given(key)]
    if given:
        return min(given)
    notes.append(f"{FILE} does not give the context: {otherwise}, that {whose}")
    return otherwise


def _tokens(vocab_size: int, notes: list[str]) -> _Tokens:
    llama3 = vocab_size == _LLAMA3_VOCABULARY
    bos, ends = (128_000, (128_001, 128_009)) if llama3 else (1, (2,))
    notes.append(f"{FILE} names no tokens: {bos} begins a text, {' and '.join(map(str, ends))} end it")
    return {"bos_id": bos, "eos_ids": ends}
