"""Tiny models of every family, all sizes different, and their checkpoints on disk."""

from __future__ import annotations

import json
from dataclasses import replace
from math import log
from pathlib import Path

import torch
from torch import Tensor

from quadriga.io.parameters import to_stored
from quadriga.model import families
from quadriga.model.config import (
    AlibiSpec,
    AttentionSpec,
    DenseSpec,
    LatentAttentionSpec,
    LayerSpec,
    Llama3Scaling,
    ModelConfig,
    MoESpec,
    NormSpec,
    QKNormSpec,
    RopeSpec,
    YarnScaling,
    uniform_model,
)
from quadriga.model.weight_map import Piece, parameter_shapes, source_index, source_shapes, whole
from tests.configs import (
    between_norms,
    first_dense,
    with_convolutions,
    with_delta_rules,
    with_near_layers,
    with_single_branches,
    with_sinks,
    with_state_spaces,
    with_windows,
)

_SIZES = {"vocab_size": 97, "d_model": 48, "n_layers": 3, "max_seq_len": 64}
_ATTN = AttentionSpec(n_heads=6, n_kv_heads=2, head_dim=8, position=RopeSpec(theta=1e4))


LATENT = LatentAttentionSpec(
    n_heads=6,
    kv_rank=32,
    q_rank=20,
    nope_dim=12,
    rope_dim=10,
    v_dim=16,
    yarn_mscale=0.8,
    position=RopeSpec(theta=1e2, scaling=YarnScaling(factor=4.0, original_max_seq_len=16, attention_factor=1.0)),
)
_DEEPSEEK = {
    "n_experts": 9,
    "top_k": 4,
    "n_groups": 3,
    "top_k_groups": 2,
    "shared": DenseSpec(d_ff=160, activation="silu"),
}


def _moe(**changes: object) -> MoESpec:
    return MoESpec(**({"d_ff": 80, "n_experts": 5, "top_k": 3, "activation": "silu"} | changes))  # type: ignore[arg-type]


TINY: dict[str, ModelConfig] = {
    "dbrx": uniform_model(
        family="dbrx",
        **_SIZES,
        norm=NormSpec(kind="layer"),
        mixer=AttentionSpec(n_heads=6, n_kv_heads=2, head_dim=8, clip_qkv=8.0, position=RopeSpec(theta=5e5)),
        ffn=_moe(aux_loss_weight=0.05, jitter_eps=0.0),
        eos_ids=(7,),
    ),
    "mixtral": uniform_model(
        family="mixtral",
        **_SIZES,
        norm=NormSpec(kind="rms"),
        mixer=replace(_ATTN, position=RopeSpec(theta=1e6)),
        ffn=_moe(),
    ),
    "llama2": uniform_model(
        family="llama2",
        **_SIZES,
        norm=NormSpec(kind="rms"),
        mixer=_ATTN,
        ffn=DenseSpec(d_ff=80, activation="silu"),
    ),
    "llama2-tied": uniform_model(
        family="llama2",
        **_SIZES,
        norm=NormSpec(kind="rms"),
        mixer=_ATTN,
        ffn=DenseSpec(d_ff=80, activation="silu"),
        tied_embeddings=True,
    ),
    "llama3": uniform_model(
        family="llama2",
        **_SIZES,
        norm=NormSpec(kind="rms"),
        mixer=replace(
            _ATTN,
            position=RopeSpec(
                theta=500.0,
                scaling=Llama3Scaling(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_seq_len=8192),
            ),
        ),
        ffn=DenseSpec(d_ff=80, activation="silu"),
    ),
    "mistral": uniform_model(
        family="mistral",
        **_SIZES,
        norm=NormSpec(kind="rms"),
        mixer=replace(_ATTN, head_dim=10, window=7),
        ffn=DenseSpec(d_ff=80, activation="silu"),
    ),
    "qwen2": uniform_model(
        family="qwen2",
        **_SIZES,
        norm=NormSpec(kind="rms", eps=1e-6),
        mixer=replace(_ATTN, qkv_bias=True),
        ffn=DenseSpec(d_ff=80, activation="silu"),
        tied_embeddings=True,
    ),
    "qwen3": uniform_model(
        family="qwen3",
        **_SIZES,
        norm=NormSpec(kind="rms", eps=1e-6),
        mixer=replace(_ATTN, head_dim=10, qk_norm=QKNormSpec(over="head", eps=1e-6)),
        ffn=DenseSpec(d_ff=80, activation="silu"),
        tied_embeddings=True,
    ),
    "qwen3moe": uniform_model(
        family="qwen3moe",
        **_SIZES,
        norm=NormSpec(kind="rms", eps=1e-6),
        mixer=replace(_ATTN, head_dim=10, qk_norm=QKNormSpec(over="head", eps=1e-6)),
        ffn=_moe(),
    ),
    "olmoe": uniform_model(
        family="olmoe",
        **_SIZES,
        norm=NormSpec(kind="rms"),
        mixer=replace(_ATTN, qk_norm=QKNormSpec(over="vector", eps=1e-5)),
        ffn=_moe(normalize_p=None),
    ),
    "granitemoe": uniform_model(
        family="granitemoe",
        **_SIZES,
        norm=NormSpec(kind="rms"),
        mixer=replace(_ATTN, scale=0.3),
        ffn=_moe(),
        residual_scale=0.6,
        embedding_scale=3.0,
        logit_scale=0.5,
        tied_embeddings=True,
    ),
    "granitemoeshared": uniform_model(
        family="granitemoeshared",
        **_SIZES,
        norm=NormSpec(kind="rms"),
        mixer=replace(_ATTN, scale=0.3),
        ffn=_moe(shared=DenseSpec(d_ff=56, activation="silu")),
        residual_scale=0.6,
        embedding_scale=3.0,
        logit_scale=0.5,
        tied_embeddings=True,
    ),
    "gpt_oss": ModelConfig(
        family="gpt_oss",
        vocab_size=97,
        d_model=48,
        max_seq_len=64,
        layers=tuple(
            LayerSpec(
                norm=NormSpec(kind="rms"),
                mixer=replace(
                    _ATTN,
                    head_dim=10,
                    position=RopeSpec(
                        theta=1e3,
                        scaling=YarnScaling(
                            factor=4.0, original_max_seq_len=16, attention_factor=0.1 * log(4) + 1, truncate=False
                        ),
                    ),
                    qkv_bias=True,
                    out_bias=True,
                    sinks=True,
                    window=window,
                ),
                ffn=_moe(activation="clamped_glu", router_bias=True, expert_bias=True),
            )
            for window in (7, None, 7)
        ),
        final_norm=NormSpec(kind="rms"),
    ),
    "glm4moe": first_dense(
        uniform_model(
            family="glm4moe",
            **_SIZES,
            norm=NormSpec(kind="rms"),
            mixer=replace(
                _ATTN,
                head_dim=20,
                position=RopeSpec(theta=1e4, dim=10),
                qkv_bias=True,
                qk_norm=QKNormSpec(over="head", eps=1e-5),
            ),
            ffn=_moe(
                score="sigmoid",
                correction=True,
                normalize_eps=1e-20,
                routed_scale=1.7,
                shared=DenseSpec(d_ff=160, activation="silu"),
            ),
        )
    ),
    "dots1": first_dense(
        uniform_model(
            family="dots1",
            **_SIZES,
            norm=NormSpec(kind="rms"),
            mixer=replace(_ATTN, qk_norm=QKNormSpec(over="head", eps=1e-5)),
            ffn=_moe(
                score="sigmoid",
                correction=True,
                normalize_eps=1e-20,
                routed_scale=2.5,
                shared=DenseSpec(d_ff=160, activation="silu"),
            ),
        )
    ),
    "ernie4_5-moe": first_dense(
        uniform_model(
            family="ernie4_5-moe",
            **_SIZES,
            norm=NormSpec(kind="rms"),
            mixer=_ATTN,
            ffn=_moe(correction=True, normalize_min=1e-12, shared=DenseSpec(d_ff=160, activation="silu")),
            tied_embeddings=True,
        )
    ),
    "hunyuan-moe": uniform_model(
        family="hunyuan-moe",
        **_SIZES,
        norm=NormSpec(kind="rms"),
        mixer=replace(_ATTN, head_dim=10, qk_norm=QKNormSpec(over="head", eps=1e-5, after_rotation=True)),
        ffn=_moe(shared=DenseSpec(d_ff=80, activation="silu")),
        tied_embeddings=True,
    ),
    "minimax-m2": uniform_model(
        family="minimax-m2",
        **_SIZES,
        norm=NormSpec(kind="rms"),
        mixer=replace(
            _ATTN,
            head_dim=20,
            position=RopeSpec(theta=1e4, dim=10),
            qk_norm=QKNormSpec(over="vector", eps=1e-5),
        ),
        ffn=_moe(score="sigmoid", correction=True),
    ),
    "deepseek_v2": first_dense(
        uniform_model(
            family="deepseek_v2",
            **_SIZES,
            norm=NormSpec(kind="rms", eps=1e-6),
            mixer=replace(LATENT, q_rank=None),
            ffn=_moe(**_DEEPSEEK, normalize_p=None, routed_scale=1.7, group_worth="best"),
        )
    ),
    "deepseek_v3": first_dense(
        uniform_model(
            family="deepseek_v3",
            **_SIZES,
            norm=NormSpec(kind="rms", eps=1e-6),
            mixer=LATENT,
            ffn=_moe(**_DEEPSEEK, score="sigmoid", correction=True, normalize_eps=1e-20, routed_scale=2.5),
        )
    ),
    "qwen2moe": uniform_model(
        family="qwen2moe",
        **_SIZES,
        norm=NormSpec(kind="rms", eps=1e-6),
        mixer=replace(_ATTN, qkv_bias=True),
        ffn=_moe(normalize_p=None, shared=DenseSpec(d_ff=56, activation="silu"), shared_gate=True),
    ),
    "lfm2": with_convolutions(
        uniform_model(
            family="lfm2",
            **_SIZES,
            norm=NormSpec(kind="rms"),
            mixer=replace(_ATTN, qk_norm=QKNormSpec(over="head", eps=1e-5)),
            ffn=DenseSpec(d_ff=80, activation="silu"),
            tied_embeddings=True,
        )
    ),
    "lfm2moe": with_convolutions(
        first_dense(
            uniform_model(
                family="lfm2moe",
                **_SIZES,
                norm=NormSpec(kind="rms"),
                mixer=replace(_ATTN, qk_norm=QKNormSpec(over="head", eps=1e-5)),
                ffn=_moe(score="sigmoid", correction=True, normalize_eps=1e-6),
                tied_embeddings=True,
            )
        )
    ),
    "qwen3next": with_delta_rules(
        uniform_model(
            family="qwen3next",
            **_SIZES,
            norm=NormSpec(kind="rms", eps=1e-6),
            mixer=replace(_ATTN, head_dim=20, position=RopeSpec(theta=1e4, dim=10)),
            ffn=_moe(aux_loss_weight=0.001, shared=DenseSpec(d_ff=56, activation="silu"), shared_gate=True),
        )
    ),
    "qwen35moe": with_delta_rules(
        uniform_model(
            family="qwen35moe",
            **_SIZES,
            norm=NormSpec(kind="rms", eps=1e-6),
            mixer=replace(_ATTN, head_dim=20, position=RopeSpec(theta=1e4, dim=10)),
            ffn=_moe(aux_loss_weight=0.001, shared=DenseSpec(d_ff=56, activation="silu"), shared_gate=True),
        )
    ),
    "qwen35": with_delta_rules(
        uniform_model(
            family="qwen35",
            **_SIZES,
            norm=NormSpec(kind="rms", eps=1e-6),
            mixer=replace(_ATTN, head_dim=20, position=RopeSpec(theta=1e4, dim=10)),
            ffn=DenseSpec(d_ff=80, activation="silu"),
            tied_embeddings=True,
        )
    ),
    "granitehybrid": with_state_spaces(
        uniform_model(
            family="granitehybrid",
            **_SIZES,
            norm=NormSpec(kind="rms"),
            mixer=replace(_ATTN, position=None, scale=0.25),
            ffn=_moe(aux_loss_weight=0.01, shared=DenseSpec(d_ff=56, activation="silu")),
            residual_scale=0.5,
            embedding_scale=6.0,
            logit_scale=0.25,
            tied_embeddings=True,
        )
    ),
    "granitehybrid-dense": with_state_spaces(
        uniform_model(
            family="granitehybrid",
            **_SIZES,
            norm=NormSpec(kind="rms"),
            mixer=replace(_ATTN, scale=0.25),
            ffn=DenseSpec(d_ff=80, activation="silu"),
            residual_scale=0.5,
            tied_embeddings=True,
        ),
        n_groups=1,
        conv_bias=False,
    ),
    "gemma4": with_windows(
        uniform_model(
            family="gemma4",
            **_SIZES,
            norm=NormSpec(kind="rms", eps=1e-6),
            mixer=_ATTN,
            ffn=_moe(activation="gelu_tanh", apart=True, shared=DenseSpec(d_ff=56, activation="gelu_tanh")),
        )
    ),
    "gemma4-dense": with_windows(
        uniform_model(
            family="gemma4",
            **_SIZES,
            norm=NormSpec(kind="rms", eps=1e-6),
            mixer=_ATTN,
            ffn=DenseSpec(d_ff=80, activation="gelu_tanh"),
        )
    ),
    "gemma2": between_norms(
        uniform_model(
            family="gemma2",
            **_SIZES,
            norm=NormSpec(kind="rms", eps=1e-6),
            mixer=replace(_ATTN, head_dim=10),
            ffn=DenseSpec(d_ff=80, activation="gelu_tanh"),
        ),
        period=2,
    ),
    "gemma3": between_norms(
        uniform_model(
            family="gemma3",
            **{**_SIZES, "n_layers": 6},
            norm=NormSpec(kind="rms", eps=1e-6),
            mixer=replace(_ATTN, head_dim=10),
            ffn=DenseSpec(d_ff=80, activation="gelu_tanh"),
        ),
        period=6,
    ),
    "granite_swa": with_sinks(
        uniform_model(
            family="granite_swa",
            **_SIZES,
            norm=NormSpec(kind="rms"),
            mixer=_ATTN,
            ffn=DenseSpec(d_ff=80, activation="silu"),
            tied_embeddings=True,
        )
    ),
    "granitemoe_swa": with_sinks(
        uniform_model(
            family="granitemoe_swa",
            **_SIZES,
            norm=NormSpec(kind="rms"),
            mixer=_ATTN,
            ffn=_moe(shared=DenseSpec(d_ff=56, activation="silu")),
        )
    ),
    "mellum": with_near_layers(
        uniform_model(
            family="mellum",
            **_SIZES,
            norm=NormSpec(kind="rms", eps=1e-6),
            mixer=replace(_ATTN, head_dim=10),
            ffn=_moe(aux_loss_weight=0.001),
        )
    ),
    "nemotron_h": with_single_branches(
        uniform_model(
            family="nemotron_h",
            **_SIZES,
            norm=NormSpec(kind="rms"),
            mixer=_ATTN,
            ffn=_moe(
                activation="relu2",
                gated=False,
                score="sigmoid",
                correction=True,
                normalize_eps=1e-20,
                routed_scale=2.5,
                shared=DenseSpec(d_ff=56, activation="relu2", gated=False),
            ),
        )
    ),
    "nemotron_h-dense": with_single_branches(
        uniform_model(
            family="nemotron_h",
            **_SIZES,
            norm=NormSpec(kind="rms"),
            mixer=_ATTN,
            ffn=DenseSpec(d_ff=80, activation="relu2", gated=False),
        ),
        n_groups=1,
    ),
    "olmo2": uniform_model(
        family="olmo2",
        **_SIZES,
        norm=NormSpec(kind="rms"),
        mixer=replace(_ATTN, qk_norm=QKNormSpec(over="vector", eps=1e-5)),
        ffn=DenseSpec(d_ff=80, activation="silu"),
        pre_norms=False,
        post_norms=True,
    ),
    "flex_olmo": uniform_model(
        family="flex_olmo",
        **_SIZES,
        norm=NormSpec(kind="rms"),
        mixer=replace(_ATTN, qk_norm=QKNormSpec(over="vector", eps=1e-5)),
        ffn=_moe(normalize_p=None),
        pre_norms=False,
        post_norms=True,
    ),
    "phimoe": uniform_model(
        family="phimoe",
        **_SIZES,
        norm=NormSpec(kind="layer", bias=True),
        mixer=replace(_ATTN, qkv_bias=True, out_bias=True),
        ffn=_moe(top_k=2, score="sparse_mixer", normalize_p=None, mixer_eps=0.3),
        head_bias=True,
    ),
    "mpt": uniform_model(
        family="mpt",
        **_SIZES,
        norm=NormSpec(kind="layer"),
        mixer=AttentionSpec(n_heads=6, n_kv_heads=6, head_dim=8, position=AlibiSpec()),
        ffn=DenseSpec(d_ff=192, activation="gelu", gated=False),
        tied_embeddings=True,
    ),
    "grok1": uniform_model(
        family="grok1",
        **_SIZES,
        norm=NormSpec(kind="rms"),
        mixer=AttentionSpec(n_heads=6, n_kv_heads=2, head_dim=8, soft_cap=30.0, position=RopeSpec(theta=1e4)),
        ffn=_moe(activation="gelu_tanh", normalize_p=None, aux_loss_weight=0.001),
        post_norms=True,
        tied_embeddings=True,
        embedding_scale=48**0.5,
        logit_scale=0.5773502691896257,
        bos_id=1,
        eos_ids=(2,),
        pad_id=0,
    ),
}


def random_bits(config: ModelConfig, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> dict[str, Tensor]:
    """Parameters of arbitrary bit patterns: NaN with payloads, infinities, negative zero, denormals."""
    generator = torch.Generator().manual_seed(seed)
    width = torch.empty((), dtype=dtype).element_size()
    return {
        name: torch.randint(0, 256, (*shape[:-1], shape[-1] * width), generator=generator, dtype=torch.uint8).view(
            dtype
        )
        for name, shape in parameter_shapes(config).items()
    }


def bits(tensor: Tensor) -> bytes:
    """A tensor's exact bytes; NaNs compare."""
    return tensor.contiguous().view(torch.uint8).numpy().tobytes()


def stored(pieces: list[Piece], parameters: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors a checkpoint in this layout holds, made without the code that writes checkpoints."""
    dtypes = {piece.source: parameters[piece.target].dtype for piece in pieces}
    out = {name: torch.empty(shape, dtype=dtypes[name]) for name, shape in source_shapes(pieces).items()}
    for piece in pieces:
        target = piece.target_box or whole(piece.target_shape)
        part = parameters[piece.target][tuple(slice(*r) for r in target)]
        out[piece.source][source_index(piece)] = to_stored(part, piece)
    return out


def write_hf(
    folder: Path,
    config: ModelConfig,
    layout: str | None = None,
    *,
    n_shards: int = 1,
    parameters: dict[str, Tensor] | None = None,
) -> dict[str, Tensor]:
    """A Hugging Face directory, written by the safetensors library. Returns the stored tensors."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    family = families.family_of(config)
    tensors = stored(family.layouts[layout or next(iter(family.layouts))](config), parameters or random_bits(config))
    (folder / "config.json").write_text(json.dumps(family.config_to_hf(config)))
    names = list(tensors)
    if n_shards == 1:
        save_file(tensors, folder / "model.safetensors")
        return tensors
    table = {}
    for shard in range(n_shards):
        file = f"model-{shard + 1:05d}-of-{n_shards:05d}.safetensors"
        mine = names[shard::n_shards]
        save_file({name: tensors[name] for name in mine}, folder / file)
        table.update(dict.fromkeys(mine, file))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": table}))
    return tensors
