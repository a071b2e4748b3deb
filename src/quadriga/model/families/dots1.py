"""dots.llm1 (rednote, June 2025): Qwen3's attention and DeepSeek-V3's mixture with two shared networks.

Sources: transformers 4.57.6 and 5.24.0 (configuration_dots1, modeling_dots1), llama.cpp (arch dots1, without biases and
windows; rotary halves lie as in Hugging Face's files).
"""

from __future__ import annotations

from collections.abc import Mapping

from quadriga.errors import ConfigError
from quadriga.model.config import (
    AttentionSpec,
    DenseSpec,
    LayerSpec,
    ModelConfig,
    MoESpec,
    NormSpec,
    QKNormSpec,
    RopeSpec,
    in_order,
)
from quadriga.model.families import deepseek_moe, gguf_keys
from quadriga.model.families.base import Family, must_read_back
from quadriga.model.families.keys import PRETRAINED_KEYS, Keys
from quadriga.model.families.llama2 import (
    GGUF_FFN,
    HF_FFN,
    HF_TIED,
    common_from_gguf,
    common_from_hf,
    common_to_hf,
    with_networks,
)
from quadriga.model.families.pieces import copies
from quadriga.model.families.qwen3 import gguf_attention, hf5_experts, hf_attention, hf_experts
from quadriga.model.weight_map import Piece, Shape

IGNORED = PRETRAINED_KEYS | {"aux_loss_alpha", "seq_aux", "max_window_layers", "sliding_window"}
"""Settings of the training's balance loss, and of windows, of which ``_no_windows`` sees that no layer has one."""

_NORM = NormSpec(kind="rms", eps=1e-5)
_ATTENTION = AttentionSpec(
    n_heads=32,
    n_kv_heads=32,
    head_dim=128,
    position=RopeSpec(theta=10_000_000.0),
    qk_norm=QKNormSpec(over="head", eps=1e-5),
)
_MOE = MoESpec(
    d_ff=1408,
    n_experts=128,
    top_k=6,
    activation="silu",
    score="sigmoid",
    correction=True,
    normalize_eps=deepseek_moe.EPS,
    routed_scale=2.5,
    shared=DenseSpec(d_ff=2816, activation="silu"),
)
PRESETS = {
    "dots.llm1": ModelConfig(
        family="dots1",
        vocab_size=152_064,
        d_model=4096,
        max_seq_len=32_768,
        layers=in_order(
            LayerSpec(norm=_NORM, mixer=_ATTENTION, ffn=DenseSpec(d_ff=10_944, activation="silu") if i < 1 else _MOE)
            for i in range(62)
        ),
        final_norm=_NORM,
        eos_ids=(151_649,),
    )
}


def config_from_hf(raw: Mapping[str, object]) -> ModelConfig:
    """Read a dots1 config.json, as transformers 4 or 5 writes it."""
    keys = Keys(raw, "config.json")
    keys.must_be("model_type", "dots1")
    keys.must_be("hidden_act", "silu")
    keys.must_be("scoring_func", "noaux_tc", "sigmoid")  # two names of the one that there is
    keys.must_be("topk_method", "noaux_tc", None)
    keys.must_be("moe_layer_freq", 1)
    keys.integer("num_key_value_heads")  # every published file has it, and the class's default is no other key's value
    common = {**common_from_hf(keys, biases=True), "tied_embeddings": keys.flag("tie_word_embeddings")}
    ffns = deepseek_moe.ffns_from_hf(keys, common["n_layers"])
    _no_windows(keys, len(ffns))
    config = with_networks("dots1", common, ffns, qk_norm=QKNormSpec(over="head", eps=common["norm"].eps))
    keys.finish(IGNORED)
    return config


def _no_windows(keys: Keys, n_layers: int) -> None:
    """Refuse a configuration that gives a layer a window; no published one does."""
    if keys.given("layer_types"):
        keys.must_be("layer_types", ["full_attention"] * n_layers)
    elif keys.given("sliding_window") and keys.integer("max_window_layers") < n_layers:
        raise ConfigError(
            f"config.json: max_window_layers must be at least the {n_layers} layers beside a sliding_window, got "
            f"{keys.integer('max_window_layers')}: windows in some layers of a dots1 are not supported"
        )


def config_to_hf(config: ModelConfig) -> dict[str, object]:
    """Write config.json as transformers 4.57.6 reads it."""
    form = "dots1's config.json"
    raw: dict[str, object] = {
        **common_to_hf(config, form),
        **deepseek_moe.to_hf(config, form),
        "architectures": ["Dots1ForCausalLM"],
        "model_type": "dots1",
        "sliding_window": None,
    }
    must_read_back(config, config_from_hf(raw), form)
    return raw


def hf_layout(config: ModelConfig) -> list[Piece]:
    """transformers 4, and every published checkpoint: a matrix per expert."""
    return hf_attention(config) + copies(config, HF_FFN | deepseek_moe.HF_MIXTURE) + hf_experts(config)


def hf5_layout(config: ModelConfig) -> list[Piece]:
    """transformers 5 in memory: all experts in one tensor, gate above up."""
    return hf_attention(config) + copies(config, HF_FFN | deepseek_moe.HF_MIXTURE) + hf5_experts(config)


def gguf_map(config: ModelConfig) -> list[Piece]:
    """Every tensor of arch ``dots1``."""
    return gguf_attention(config) + copies(config, GGUF_FFN | deepseek_moe.GGUF_MIXTURE)


def config_from_gguf(metadata: Mapping[str, object], shapes: Mapping[str, Shape]) -> ModelConfig:
    """Read a GGUF of arch ``dots1``."""
    keys = gguf_keys.architecture_keys(metadata, "dots1")
    keys.integer("expert_gating_func")  # must be there: llama.cpp has no usual one in this arch
    keys.must_be("expert_gating_func", deepseek_moe.SIGMOID)
    common = common_from_gguf(keys, metadata, shapes)
    ffns = deepseek_moe.ffns_from_gguf(keys, common["n_layers"])
    config = with_networks("dots1", common, ffns, qk_norm=QKNormSpec(over="head", eps=common["norm"].eps))
    keys.finish(gguf_keys.IGNORED)
    return config


def config_to_gguf(config: ModelConfig) -> dict[str, object]:
    """Write the keys of a GGUF of arch ``dots1``."""
    return deepseek_moe.config_to_gguf(config, "dots1", config_from_gguf)


FAMILY = Family(
    name="dots1",
    presets=PRESETS,
    model_types=("dots1",),
    config_from_hf=config_from_hf,
    config_to_hf=config_to_hf,
    layouts={"hf": hf_layout, "hf5": hf5_layout},
    gguf_archs=("dots1",),
    config_from_gguf=config_from_gguf,
    config_to_gguf=config_to_gguf,
    gguf_map=gguf_map,
    tied_copies=HF_TIED,
)
