"""The keys of GGUF files of archs nemotron_h and nemotron_h_moe, both ways.

Which branch a layer is follows from two lists, a number a layer: one with heads for keys and values is attention, one
with a width is a network (in nemotron_h) or a mixture (in nemotron_h_moe), and what has neither is a Mamba-2 layer.
Sources: see :mod:`quadriga.model.families.nemotron_h`.
"""

from __future__ import annotations

from collections.abc import Mapping

from quadriga.errors import ConfigError
from quadriga.model.config import AttentionSpec, DenseSpec, Mamba2Spec, ModelConfig, MoESpec, NormSpec
from quadriga.model.families import deepseek_moe, gguf_keys
from quadriga.model.families.base import of_kind
from quadriga.model.families.keys import Keys, equal_heads
from quadriga.model.families.nemotron_h_layers import Branch, Kind, branches_of, experts, model_of, network
from quadriga.model.weight_map import Shape

_DENSE, _MIXTURE = ARCHS = ("nemotron_h", "nemotron_h_moe")


def config_from_gguf(metadata: Mapping[str, object], shapes: Mapping[str, Shape]) -> ModelConfig:
    """Read a GGUF of arch ``nemotron_h`` or ``nemotron_h_moe``."""
    arch = str(metadata["general.architecture"])
    plain, attends = gguf_keys.by_heads(metadata, arch, "every other layer")
    widths = _widths(metadata, arch, len(attends))
    keys = gguf_keys.architecture_keys({**plain, f"{arch}.feed_forward_length": max(widths)}, arch)
    feeds: Kind = "mlp" if arch == _DENSE else "moe"
    kinds = [_kind(attention, width, feeds) for attention, width in zip(attends, widths, strict=True)]
    branches: dict[Kind, Branch] = {
        "mamba": _mamba(keys, kinds, shapes),
        "attention": _attention(keys),
        feeds: network(keys.integer("feed_forward_length")) if arch == _DENSE else _experts(keys),
    }
    keys.must_be("nextn_predict_layers", 0)
    keys.integer("block_count")
    config = model_of(
        kinds,
        branches,
        NormSpec(kind="rms", eps=gguf_keys.number(keys, "attention.layer_norm_rms_epsilon")),
        vocab_size=gguf_keys.vocabulary_size(keys, shapes),
        d_model=keys.integer("embedding_length"),
        max_seq_len=keys.integer("context_length"),
        tied_embeddings=gguf_keys.OUTPUT not in shapes,
        **gguf_keys.token_ids(metadata),
    )
    keys.finish(gguf_keys.IGNORED)
    return config


def _widths(metadata: Mapping[str, object], arch: str, n_layers: int) -> list[int]:
    name = f"{arch}.feed_forward_length"
    widths = metadata.get(name)
    if not isinstance(widths, list) or len(widths) != n_layers or len({*widths} - {0}) != 1:
        raise ConfigError(
            f"GGUF {name} must be a number for each of the {n_layers} layers, 0 for those without a network and the "
            f"same for all others; got {str(widths)[:80]}"
        )
    return widths


def _kind(attention: bool, width: int, feeds: Kind) -> Kind:
    if attention and width:
        raise ConfigError("a layer of Nemotron-H must have one branch, got one with heads and a network")
    return "attention" if attention else feeds if width else "mamba"


def _attention(keys: Keys) -> AttentionSpec:
    head_dim = keys.integer("attention.key_length")
    keys.must_be("attention.value_length", head_dim)
    for key in ("dimension_count", "freq_base", "scaling.finetuned", "scaling.type"):  # nothing turns
        keys.has(f"rope.{key}")
    return AttentionSpec(
        n_heads=keys.integer("attention.head_count"),
        n_kv_heads=keys.integer("attention.head_count_kv"),
        head_dim=head_dim,
        position=None,
    )


def _mamba(keys: Keys, kinds: list[Kind], shapes: Mapping[str, Shape]) -> Mamba2Spec:
    first = kinds.index("mamba") if "mamba" in kinds else 0
    n_heads = keys.integer("ssm.time_step_rank")
    return Mamba2Spec(
        n_heads=n_heads,
        head_dim=equal_heads(keys.integer("ssm.inner_size"), n_heads),
        n_groups=keys.integer("ssm.group_count"),
        state_dim=keys.integer("ssm.state_size"),
        taps=keys.integer("ssm.conv_kernel"),
        eps=gguf_keys.number(keys, "attention.layer_norm_rms_epsilon"),
        conv_bias=f"blk.{first}.ssm_conv1d.bias" in shapes,
        log_rate=False,
    )


def _experts(keys: Keys) -> MoESpec:
    width = keys.integer("expert_feed_forward_length")
    keys.must_be("feed_forward_length", width)
    keys.must_be("expert_shared_count", 1)
    keys.must_be("moe_latent_size", 0)
    keys.must_be("expert_gating_func", deepseek_moe.SIGMOID, 0)  # llama.cpp: the sigmoid whatever a file says
    for key in ("expert_group_count", "expert_group_used_count"):
        keys.must_be(key, 0, 1)
    # llama.cpp: no scale, or 0, multiplies by nothing; no norm does not divide.
    scale = gguf_keys.number(keys, "expert_weights_scale") if keys.given("expert_weights_scale") else 1.0
    return experts(
        d_ff=width,
        n_experts=keys.integer("expert_count"),
        top_k=keys.integer("expert_used_count"),
        shared=keys.integer("expert_shared_feed_forward_length"),
        scale=scale or 1.0,
        normalised=keys.given("expert_weights_norm") and keys.flag("expert_weights_norm"),
    )


def config_to_gguf(config: ModelConfig) -> dict[str, object]:
    """Write the keys of a GGUF of the arch that the model's feed-forwards need, of a model with negative rates."""
    arch = _MIXTURE if config.is_moe else _DENSE
    form = f"GGUF arch {arch}"
    kinds, branches = branches_of(config, form)
    mamba = of_kind(branches.get("mamba"), Mamba2Spec, form)
    attention = of_kind(branches.get("attention"), AttentionSpec, form)
    written: dict[str, object] = {
        f"{arch}.block_count": config.n_layers,
        f"{arch}.context_length": config.max_seq_len,
        f"{arch}.embedding_length": config.d_model,
        f"{arch}.feed_forward_length": [layer.ffn.d_ff for layer in config.layers],
        f"{arch}.vocab_size": config.vocab_size,
        f"{arch}.attention.head_count": attention.n_heads,
        f"{arch}.attention.head_count_kv": [attention.n_kv_heads if kind == "attention" else 0 for kind in kinds],
        f"{arch}.attention.layer_norm_rms_epsilon": config.final_norm.eps,
        f"{arch}.attention.key_length": attention.head_dim,
        f"{arch}.attention.value_length": attention.head_dim,
        f"{arch}.rope.dimension_count": attention.head_dim,
        f"{arch}.rope.scaling.finetuned": False,
        f"{arch}.ssm.conv_kernel": mamba.taps,
        f"{arch}.ssm.state_size": mamba.state_dim,
        f"{arch}.ssm.group_count": mamba.n_groups,
        f"{arch}.ssm.inner_size": mamba.inner_dim,
        f"{arch}.ssm.time_step_rank": mamba.n_heads,
        **gguf_keys.token_id_keys(config),
    }
    moe = branches.get("moe")
    if isinstance(moe, MoESpec):
        written |= {
            f"{arch}.expert_count": moe.n_experts,
            f"{arch}.expert_used_count": moe.top_k,
            f"{arch}.expert_feed_forward_length": moe.d_ff,
            f"{arch}.expert_shared_count": 1,
            f"{arch}.expert_shared_feed_forward_length": of_kind(moe.shared, DenseSpec, form).d_ff,
            f"{arch}.expert_weights_norm": moe.normalize_p is not None,
            f"{arch}.expert_weights_scale": moe.routed_scale,
        }
    gguf_keys.must_read_back(config, config_from_gguf, written, form)
    return written
