"""Reading somebody else's configuration without defaults: every key asked for by name, every key accounted for.

    keys = Keys(json.load(...), "config.json")
    d_model = keys.integer("hidden_size")             missing or of another type: ConfigError
    keys.must_be("attention_bias", False)             may be absent; any other value: ConfigError
    if keys.given("head_dim"): ...                    an explicit rule for a key that may be absent or null
    keys.finish(IGNORED)                              a key nobody asked for: ConfigError with its nearest neighbour

transformers 5.15 to 5.23 runs DBRX with rope theta 10000 because a reader fell back on a default; this class has none.
It knows nothing of any family, and does not check ranges: the specs of ``model.config`` do.
"""

from __future__ import annotations

import difflib
import struct
from collections.abc import Collection, Iterable, Mapping

from quadriga.errors import ConfigError

GENERATION_KEYS = frozenset(
    {
        "bad_words_ids", "begin_suppress_tokens", "decoder_start_token_id", "diversity_penalty", "do_sample",
        "early_stopping", "encoder_no_repeat_ngram_size", "exponential_decay_length_penalty", "forced_bos_token_id",
        "forced_eos_token_id", "length_penalty", "max_length", "min_length", "no_repeat_ngram_size", "num_beam_groups",
        "num_beams", "num_return_sequences", "output_scores", "prefix", "remove_invalid_values", "repetition_penalty",
        "return_dict_in_generate", "sep_token_id", "suppress_tokens", "temperature", "top_k", "top_p", "typical_p",
        # What people move over from generation_config.json.
        "epsilon_cutoff", "eta_cutoff", "guidance_scale", "max_new_tokens", "max_time", "min_new_tokens", "min_p",
        "num_assistant_tokens", "penalty_alpha", "prompt_lookup_num_tokens", "renormalize_logits", "stop_strings",
    }
)  # fmt: skip
"""Sampling settings that a transformers PretrainedConfig carries; ours come from the request."""

BOOKKEEPING_KEYS = frozenset(
    {
        "_name_or_path", "name_or_path", "_commit_hash", "transformers_version", "architectures", "finetuning_task",
        "id2label", "label2id", "num_labels", "problem_type", "task_specific_params", "tokenizer_class",
        "tokenizer_name", "output_attentions", "output_hidden_states", "output_router_logits", "return_dict",
        "torchscript", "use_cache", "chunk_size_feed_forward", "gradient_checkpointing", "tf_legacy_loss",
        "use_bfloat16", "initializer_range", "init_config", "init_device",
        # The stored dtype is read from the tensors themselves.
        "dtype", "torch_dtype",
        # Encoder-decoder options, meaningless in a decoder-only model; transformers dumps them all the same.
        "add_cross_attention", "cross_attention_hidden_size", "is_decoder", "is_encoder_decoder",
        "tie_encoder_decoder", "pruned_heads",
        # Dropout is a choice of the training run, not of the model.
        "attention_dropout", "attn_pdrop", "emb_pdrop", "resid_pdrop", "hidden_dropout",
    }
)  # fmt: skip
"""Facts about how a checkpoint was made or labelled; none changes a forward pass."""

CODE_KEYS = frozenset(
    {
        "auto_map", "trust_remote_code", "custom_pipelines", "attn_implementation", "_attn_implementation",
        "_attn_implementation_internal", "_attn_implementation_autoset", "_experts_implementation",
        "_experts_implementation_internal", "attn_impl", "use_flash_attention_2", "_flash_attn_2_enabled",
    }
)  # fmt: skip
"""Keys that select code. They are never followed, whatever they say: this project runs no code from a checkpoint."""

_CACHE = "how transformers keeps keys and values, not what they are"
_TOKENIZER = "a setting of the tokenizer that the tuning program copied here; the tokenizer's own files are read"
HARMLESS_KEYS: Mapping[str, str] = {
    "cache_config": _CACHE,
    "cache_implementation": _CACHE,
    "return_legacy_cache": _CACHE,
    "is_llama_config": "written by SmolLM2's training code; says what model_type says",
    "max_sequence_length": "the length FastChat tuned with; transformers reads max_position_embeddings",
    "mergekit_version": "which release of mergekit wrote the file; the weights are merged already",
    "model_max_length": _TOKENIZER,
    "neftune_noise_alpha": "noise on the embeddings during tuning (NEFTune); there is none afterwards",
    "pretraining_tp": "splits matrix products to repeat the rounding of a training run",
    "tokenizer_model_max_length": _TOKENIZER,
    "tokenizer_padding_side": _TOKENIZER,
    "transformers.js_config": "how a browser quantises its cache",
    "unsloth_fixed": "Unsloth's mark that it corrected the tokenizer's files; they are read as they are",
    "unsloth_version": "which release of Unsloth wrote the file",
}
"""Keys that training and merging programs leave in config.json, each with the reason why no answer depends on it."""

_QUANTISED = (
    "the weights were packed by a quantiser whose blocks are not read. Give the checkpoint it was made from, or a GGUF "
    "file of it"
)
REFUSED_KEYS: Mapping[str, str] = {"quantization_config": _QUANTISED, "compression_config": _QUANTISED}
"""Keys that change what the stored numbers mean; null says nothing and passes."""

PRETRAINED_KEYS = GENERATION_KEYS | BOOKKEEPING_KEYS | CODE_KEYS | frozenset(HARMLESS_KEYS)
"""What any transformers config.json may carry besides the model: ignored by name, not by default."""


class Keys:
    """A configuration dict that remembers which of its keys were read."""

    def __init__(self, raw: object, where: str) -> None:
        """Wrap ``raw``, which must be a dict with string keys; ``where`` names it in errors ("config.json")."""
        if not isinstance(raw, Mapping) or not all(isinstance(key, str) for key in raw):
            raise ConfigError(f"{where} must be a JSON object with text keys, got {_quote(raw)}")
        self._raw: Mapping[str, object] = raw
        self._where = where
        self._read: set[str] = set()

    def _get(self, key: str) -> object:
        self._read.add(key)
        try:
            return self._raw[key]
        except KeyError:
            unread = [k for k in self._raw if k not in self._read]
            raise ConfigError(
                f"{self._where} lacks the key {key!r}, and nothing here is guessed.{_hint(key, unread)} "
                "Check that the file is complete and belongs to this model."
            ) from None

    def _wrong(self, key: str, wanted: str) -> ConfigError:
        return ConfigError(f"{self._where}: {key} must be {wanted}, got {_quote(self._raw[key])}")

    def given(self, key: str) -> bool:
        """True if the key is there and not null. Counts as reading it."""
        self._read.add(key)
        return self._raw.get(key) is not None

    def has(self, key: str) -> bool:
        """True if the key is there, null or not. Counts as reading it."""
        self._read.add(key)
        return key in self._raw

    def value(self, key: str) -> object:
        """What the key says, unchecked; None if it is absent. Counts as reading it."""
        self._read.add(key)
        return self._raw.get(key)

    def integer(self, key: str) -> int:
        """A whole number."""
        value = self._get(key)
        if not isinstance(value, int) or isinstance(value, bool):
            raise self._wrong(key, "a whole number")
        return value

    def number(self, key: str) -> float:
        """A finite number."""
        value = self._get(key)
        # 1e300 bounds whole numbers too long for a float; nothing in a model is that large.
        if not isinstance(value, (int, float)) or isinstance(value, bool) or not -1e300 < value < 1e300:
            raise self._wrong(key, "a finite number")
        return float(value)

    def number_or_null(self, key: str) -> float | None:
        """A finite number, or None if the key is there and null; the key must be there."""
        return self.number(key) if self._get(key) is not None else None

    def text(self, key: str) -> str:
        """A string."""
        value = self._get(key)
        if not isinstance(value, str):
            raise self._wrong(key, "text")
        return value

    def flag(self, key: str) -> bool:
        """true or false."""
        value = self._get(key)
        if not isinstance(value, bool):
            raise self._wrong(key, "true or false")
        return value

    def token_id(self, key: str) -> int | None:
        """A token id; None if the key is absent or null, or -1, which LLaMA-1's files write for "none"."""
        if not self.given(key) or self._raw[key] == -1:
            return None
        return self.integer(key)

    def token_ids(self, key: str) -> tuple[int, ...]:
        """One token id or a list of them; empty if the key is absent or null, or -1 ("none")."""
        if not self.given(key) or self._raw[key] == -1:
            return ()
        value = self._get(key)
        if not isinstance(value, list):
            return (self.integer(key),)
        if not all(isinstance(token, int) and not isinstance(token, bool) for token in value):
            raise self._wrong(key, "a token id or a list of token ids")
        return tuple(value)

    def integers(self, key: str) -> tuple[int, ...]:
        """A list of whole numbers; null is none of them."""
        value = self._get(key)
        if value is None:
            return ()
        if not isinstance(value, list) or not all(isinstance(n, int) and not isinstance(n, bool) for n in value):
            raise self._wrong(key, "a list of whole numbers")
        return tuple(value)

    def numbers(self, key: str) -> tuple[float, ...]:
        """A list of finite numbers."""
        value = self._get(key)
        if not isinstance(value, list) or not all(
            isinstance(n, (int, float)) and not isinstance(n, bool) and -1e300 < n < 1e300 for n in value
        ):
            raise self._wrong(key, "a list of finite numbers")
        return tuple(float(n) for n in value)

    def words(self, key: str, known: Collection[str], n: int) -> list[str]:
        """A list of ``n`` texts, each one of ``known``."""
        value = self._get(key)
        if (
            not isinstance(value, list)
            or len(value) != n
            or not all(isinstance(one, str) and one in known for one in value)
        ):
            raise self._wrong(key, f"a list of {n} words, each {' or '.join(known)}")
        return value

    def section(self, key: str) -> Keys:
        """A dict inside this one; it has a ``finish`` of its own."""
        return Keys(self._get(key), f"{self._where}: {key}")

    def mapping(self, key: str) -> Mapping[str, object]:
        """The same as it was parsed."""
        return self.section(key)._raw

    def names(self) -> list[str]:
        """All keys. Counts as reading none of them."""
        return list(self._raw)

    def must_be(self, key: str, *allowed: object) -> None:
        """Raise unless the key is absent or has one of the ``allowed`` values: other values change the mathematics."""
        self._read.add(key)
        if key in self._raw and not any(_same(self._raw[key], value) for value in allowed):
            choices = " or ".join("null" if value is None else _quote(value) for value in allowed)
            raise ConfigError(
                f"{self._where}: {key} must be {choices}, got {_quote(self._raw[key])}. "
                "Quadriga does not support this option, and leaving it out would change the model's answers."
            )

    def finish(self, ignored: frozenset[str]) -> None:
        """Raise if a key was neither read nor is in ``ignored``."""
        unknown = sorted(key for key in self._raw if key not in self._read and key not in ignored)
        unknown = [key for key in unknown if key not in REFUSED_KEYS or self._raw[key] is not None]
        for key in unknown:
            if key in REFUSED_KEYS:
                raise ConfigError(f"{self._where}: {key} must be null or absent: {REFUSED_KEYS[key]}.")
        if unknown:
            key = unknown[0]
            more = f" (and {len(unknown) - 1} more)" if len(unknown) > 1 else ""
            raise ConfigError(
                f"{self._where} has the key {_quote(key)}{more}, which Quadriga does not know."
                f"{_hint(key, self._read | ignored)} An unknown key may change the model, so it is not ignored."
            )


def _quote(value: object, limit: int = 80) -> str:
    shown = repr(value)
    return shown if len(shown) <= limit else f"{shown[:limit]}... ({len(shown)} characters)"


def _same(a: object, b: object) -> bool:
    # 0 == False in Python; in a configuration they mean different things, while 1 and 1.0 do not.
    return a == b and isinstance(a, bool) == isinstance(b, bool)


def _hint(key: str, candidates: Iterable[str]) -> str:
    near = difflib.get_close_matches(key[:80], sorted(candidates), n=1)
    return f" Did you mean {_quote(near[0])}?" if near else ""


def equal_heads(d_model: int, n_heads: int) -> int:
    """The size of a head where the heads share d_model equally.

    Raises:
        ConfigError: they cannot.
    """
    if n_heads < 1 or d_model % n_heads:
        raise ConfigError(
            f"the model's width must be a multiple of its heads: got d_model={d_model}, n_heads={n_heads}"
        )
    return d_model // n_heads


def shortest_float32(value: float) -> float:
    """The shortest decimal that rounds to the same float32: 9.999999747378752e-06 was written as 1e-05.

    A value that is no float32 was never rounded to one and comes back unchanged.
    """
    if _float32(value) != value:
        return value
    for digits in range(1, 10):
        candidate = float(f"{value:.{digits}g}")
        if _float32(candidate) == _float32(value):
            return candidate
    return value


def exact_or(value: float, exact: float) -> float:
    """``exact`` if ``value`` is its float32 rounding, else ``value``: undoes the rounding of constants like sqrt(D)."""
    return exact if _float32(value) == _float32(exact) else value


def _float32(value: float) -> float:
    try:
        return float(struct.unpack("<f", struct.pack("<f", value))[0])
    except OverflowError:  # beyond float32: such a value was stored as float64
        return value
