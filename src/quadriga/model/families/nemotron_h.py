"""Nemotron-H (NVIDIA, from April 2025): layers of one branch each, most of them Mamba-2 or a network.

A layer is a state-space model, attention without positions, one plain network with squared ReLU, or a mixture of such
networks with DeepSeek-V3's router and a shared network. Sources: transformers 5.24.0 (configuration and
modeling_nemotron_h), llama.cpp (archs nemotron_h and nemotron_h_moe; conversion/nemotron.py). GGUF files have the
negative rate in place of its logarithm (``io.restate``).

Steps are not clamped: so does llama.cpp, and so says the published ``time_step_limit``, [0, inf]. transformers 5.24.0
takes ``time_step_min``, by which steps are drawn before training, for the least step there is. A layer for multi-token
prediction (``mtp.*``) is left out.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from quadriga.errors import ConfigError
from quadriga.model.config import AttentionSpec, DenseSpec, Mamba2Spec, ModelConfig, MoESpec, NormSpec, countable
from quadriga.model.families.base import Family, must_read_back, of_kind
from quadriga.model.families.granite_hybrid import gguf_form, hf_form
from quadriga.model.families.keys import PRETRAINED_KEYS, Keys
from quadriga.model.families.nemotron_h_gguf import ARCHS, config_from_gguf, config_to_gguf
from quadriga.model.families.nemotron_h_layers import NAME, Branch, Kind, branches_of, experts, model_of, network
from quadriga.model.families.nemotron_h_layouts import gguf_map, hf5_layout, hf_layout

IGNORED = PRETRAINED_KEYS | {
    *("chunk_size", "mamba_chunk_size"),  # how many tokens other programs compute at once
    *("use_mamba_kernels", "mamba_ssm_cache_dtype", "num_logits_to_keep", "moe_shared_expert_overlap"),
    "residual_in_fp32",  # a precision, in another program
    *("expand", "mamba_expand"),  # the inner width is that of all heads together
    # How the weights were drawn.
    *("rescale_prenorm_residual", "time_step_min", "time_step_max", "time_step_floor"),
    *("rope_theta", "rope_scaling", "rope_parameters", "partial_rotary_factor"),  # nothing turns
    *("mtp_layers_block_type", "mtp_hybrid_override_pattern"),  # of what is left out
}
"""What no answer depends on."""
_LETTERS: Mapping[str, Kind] = {"M": "mamba", "*": "attention", "-": "mlp", "E": "moe"}
_WORDS: Mapping[str, Kind] = {
    "linear_attention": "mamba",
    "full_attention": "attention",
    **{kind: kind for kind in _LETTERS.values()},
}
"""transformers 5's words, and NVIDIA's."""
_OF_EXPERTS = (
    *("n_routed_experts", "num_experts_per_tok", "moe_intermediate_size", "moe_shared_expert_intermediate_size"),
    *("n_shared_experts", "n_group", "topk_group", "norm_topk_prob", "routed_scaling_factor", "moe_latent_size"),
)
NO_LIMIT = ([0.0, math.inf], [0.0, {"__float__": "Infinity"}], None)
"""What stands for steps of any length."""


def _preset(
    pattern: str,
    *,
    d_model: int,
    heads: tuple[int, int],
    mamba: tuple[int, int],
    ffn: DenseSpec | MoESpec,
    max_seq_len: int,
    end: int,
) -> ModelConfig:
    branches: dict[Kind, Branch] = {
        "mamba": Mamba2Spec(n_heads=mamba[0], head_dim=mamba[1], n_groups=8, state_dim=128, taps=4, eps=1e-5),
        "attention": AttentionSpec(n_heads=heads[0], n_kv_heads=heads[1], head_dim=128, position=None),
        "moe" if isinstance(ffn, MoESpec) else "mlp": ffn,
    }
    return model_of(
        [_LETTERS[letter] for letter in pattern],
        branches,
        NormSpec(kind="rms", eps=1e-5),
        vocab_size=131_072,
        d_model=d_model,
        max_seq_len=max_seq_len,
        bos_id=1,
        eos_ids=(end,),
        pad_id=0,
    )


PRESETS = {
    "nemotron-nano-9b-v2": _preset(
        "M-M-M-MM-M-M-M*-M-M-M*-M-M-M-M*-M-M-M-M*-M-MM-M-M-M-M-M-",
        d_model=4480,
        heads=(40, 8),
        mamba=(128, 80),
        ffn=network(15_680),
        max_seq_len=131_072,
        end=12,
    ),
    "nemotron-3-nano-30b-a3b": _preset(
        "MEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEMEM*EMEMEMEME",
        d_model=2688,
        heads=(32, 2),
        mamba=(64, 64),
        ffn=experts(d_ff=1856, n_experts=128, top_k=6, shared=3712, scale=2.5),
        max_seq_len=262_144,
        end=2,
    ),
}


# config.json ---------------------------------------------------------------------------------------------------------


def config_from_hf(raw: Mapping[str, object]) -> ModelConfig:
    """Read a Nemotron-H config.json, as NVIDIA's own program or transformers 5 writes it."""
    keys = Keys(raw, "config.json")
    keys.must_be("model_type", NAME)
    keys.must_be("sliding_window", None)
    keys.must_be("num_nextn_predict_layers", 0, 1, None)  # see ``notes``
    eps = keys.number("layer_norm_epsilon")
    for key in ("norm_eps", "rms_norm_eps"):
        keys.must_be(key, eps)
    kinds = _kinds_from_hf(keys)
    branches: dict[Kind, Branch] = {"mamba": _mamba_from_hf(keys, eps), "attention": _attention_from_hf(keys)}
    for bias in ("mlp_bias", "use_bias"):
        keys.must_be(bias, False)
    keys.must_be("mlp_hidden_act", "relu2")
    if "mlp" in kinds:
        branches["mlp"] = network(keys.integer("intermediate_size"))
    else:
        keys.has("intermediate_size")
    if "moe" in kinds:
        branches["moe"] = _experts_from_hf(keys)
    else:
        for key in _OF_EXPERTS:
            keys.has(key)
    config = model_of(
        kinds,
        branches,
        NormSpec(kind="rms", eps=eps),
        vocab_size=keys.integer("vocab_size"),
        d_model=keys.integer("hidden_size"),
        max_seq_len=keys.integer("max_position_embeddings"),
        tied_embeddings=keys.flag("tie_word_embeddings"),
        bos_id=keys.token_id("bos_token_id"),
        eos_ids=keys.token_ids("eos_token_id"),
        pad_id=keys.token_id("pad_token_id"),
    )
    keys.finish(IGNORED)
    return config


def _kinds_from_hf(keys: Keys) -> list[Kind]:
    """The branch of every layer: a letter each, a word each, or both."""
    letters = keys.text("hybrid_override_pattern") if keys.given("hybrid_override_pattern") else None
    words = keys.value("layers_block_type")
    n_layers = len(letters) if letters is not None else len(words) if isinstance(words, list) else 0
    keys.must_be("num_hidden_layers", n_layers)
    if letters is not None and set(letters) - set(_LETTERS):
        raise ConfigError(
            f"config.json: hybrid_override_pattern must be letters of {' '.join(_LETTERS)}, got {letters[:80]!r}"
        )
    if words is None and letters is not None:
        return [_LETTERS[letter] for letter in letters]
    said = [_WORDS[word] for word in keys.words("layers_block_type", list(_WORDS), countable(n_layers))]
    if letters is not None and said != [_LETTERS[letter] for letter in letters]:
        raise ConfigError("config.json: layers_block_type and hybrid_override_pattern must say the same of every layer")
    return said


def _mamba_from_hf(keys: Keys, eps: float) -> Mamba2Spec:
    keys.must_be("mamba_hidden_act", "silu")
    keys.must_be("mamba_proj_bias", False)
    keys.must_be("time_step_limit", *NO_LIMIT)
    return Mamba2Spec(
        n_heads=keys.integer("mamba_num_heads"),
        head_dim=keys.integer("mamba_head_dim"),
        n_groups=keys.integer("n_groups"),
        state_dim=keys.integer("ssm_state_size"),
        taps=keys.integer("conv_kernel"),
        eps=eps,
        conv_bias=keys.flag("use_conv_bias"),
    )


def _attention_from_hf(keys: Keys) -> AttentionSpec:
    keys.must_be("attention_bias", False)
    # The first files say attention_head_dim.
    name = "head_dim" if keys.given("head_dim") else "attention_head_dim"
    head_dim = keys.integer(name)
    keys.must_be("attention_head_dim", head_dim)
    return AttentionSpec(
        n_heads=keys.integer("num_attention_heads"),
        n_kv_heads=keys.integer("num_key_value_heads"),
        head_dim=head_dim,
        position=None,
    )


def _experts_from_hf(keys: Keys) -> MoESpec:
    keys.must_be("n_shared_experts", 1)
    keys.must_be("moe_latent_size", None)
    return experts(
        d_ff=keys.integer("moe_intermediate_size"),
        n_experts=keys.integer("n_routed_experts"),
        top_k=keys.integer("num_experts_per_tok"),
        shared=keys.integer("moe_shared_expert_intermediate_size"),
        scale=keys.number("routed_scaling_factor"),
        normalised=keys.flag("norm_topk_prob"),
        groups=(keys.integer("n_group"), keys.integer("topk_group")),
    )


def config_to_hf(config: ModelConfig) -> dict[str, object]:
    """Write config.json as transformers 5.24.0 and NVIDIA's own program read it."""
    form = "Nemotron-H's config.json"
    kinds, branches = branches_of(config, form)
    mamba = of_kind(branches.get("mamba"), Mamba2Spec, form)
    attention = of_kind(branches.get("attention"), AttentionSpec, form)
    letter = {kind: one for one, kind in _LETTERS.items()}
    raw: dict[str, object] = {
        "architectures": ["NemotronHForCausalLM"],
        "model_type": NAME,
        "vocab_size": config.vocab_size,
        "hidden_size": config.d_model,
        "num_hidden_layers": config.n_layers,
        "hybrid_override_pattern": "".join(letter[kind] for kind in kinds),
        "max_position_embeddings": config.max_seq_len,
        "layer_norm_epsilon": config.final_norm.eps,
        "num_attention_heads": attention.n_heads,
        "num_key_value_heads": attention.n_kv_heads,
        "head_dim": attention.head_dim,
        "attention_bias": False,
        "mamba_num_heads": mamba.n_heads,
        "mamba_head_dim": mamba.head_dim,
        "n_groups": mamba.n_groups,
        "ssm_state_size": mamba.state_dim,
        "conv_kernel": mamba.taps,
        "use_conv_bias": mamba.conv_bias,
        "mamba_hidden_act": "silu",
        "mamba_proj_bias": False,
        "mlp_hidden_act": "relu2",
        "mlp_bias": False,
        "use_bias": False,
        **_networks_to_hf(branches, form),
        "tie_word_embeddings": config.tied_embeddings,
        "bos_token_id": config.bos_id,
        "eos_token_id": list(config.eos_ids) or None,
        "pad_token_id": config.pad_id,
        "use_cache": True,
    }
    must_read_back(config, config_from_hf(raw), form)
    return raw


def _networks_to_hf(branches: Mapping[Kind, Branch], form: str) -> dict[str, object]:
    """Of one network, of experts, or of both; where no layer has the one, its width is the experts'."""
    raw: dict[str, object] = {}
    if "moe" in branches:
        moe = of_kind(branches["moe"], MoESpec, form)
        raw = {
            "intermediate_size": moe.d_ff,
            "n_routed_experts": moe.n_experts,
            "num_experts_per_tok": moe.top_k,
            "moe_intermediate_size": moe.d_ff,
            "n_shared_experts": 1,
            "moe_shared_expert_intermediate_size": of_kind(moe.shared, DenseSpec, form).d_ff,
            "n_group": moe.n_groups,
            "topk_group": moe.top_k_groups,
            "norm_topk_prob": moe.normalize_p is not None,
            "routed_scaling_factor": moe.routed_scale,
        }
    if "mlp" in branches:
        raw["intermediate_size"] = of_kind(branches["mlp"], DenseSpec, form).d_ff
    return raw


def notes(raw: Mapping[str, object]) -> list[str]:
    """What is said of the layer for multi-token prediction."""
    if not raw.get("num_nextn_predict_layers"):
        return []
    return ["the layers behind the last, which predict one token more (multi-token prediction), are left out"]


FAMILY = Family(
    name=NAME,
    presets=PRESETS,
    model_types=(NAME,),
    config_from_hf=config_from_hf,
    config_to_hf=config_to_hf,
    layouts={"hf": hf_layout, "hf5": hf5_layout},
    gguf_archs=ARCHS,
    config_from_gguf=config_from_gguf,
    config_to_gguf=config_to_gguf,
    gguf_form=gguf_form,
    hf_form=hf_form,
    gguf_map=gguf_map,
    ignored_tensors=("mtp.*",),
    notes=notes,
)
