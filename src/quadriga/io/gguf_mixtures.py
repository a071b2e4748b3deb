"""llama.cpp's mixtures of K formats (Q4_K_M and its kin): which tensor of a GGUF file is stored as what.

The rule is llama.cpp's (`llama_tensor_get_type` in src/llama-quant.cpp), for models that are not Falcon's:

    output                     q6_k, and so is the embedding table where it is the output too
    attn_v, ffn_down           M: q6_k in the first and last eighth of the layers and in every third between (q4, q5)
                               S: q5_k in the first layers (q4);   q3: q4_k or q5_k throughout, by S, M, L
    attn_output, attn_qkv      q3: q4_k (M), q5_k (L; attn_qkv q4_k);   attn_qkv of q4 M q5_k, of q5 M q6_k
    with eight experts         attn_k and attn_v q8_0, attn_output q5_k (q3 S and M, q4)
    80 layers, grouped heads   attn_v at least q5_k
"""

from __future__ import annotations

import re

from quadriga.model.config import ModelConfig

MIXTURES = {
    f"{base}_{size}": base for base, sizes in (("q3_k", "sml"), ("q4_k", "sm"), ("q5_k", "sm")) for size in sizes
}
"""A mixture's name -> the format of most of its tensors."""

_LAYER = re.compile(r"blk\.(\d+)\.")


def format_in(mixture: str, tensor: str, config: ModelConfig) -> str:
    """The format of a matrix.

    Args:
        mixture: one of MIXTURES.
        tensor: its name in GGUF.
    """
    if tensor == "output.weight" or (tensor == "token_embd.weight" and config.tied_embeddings):
        return "q6_k"
    found = _LAYER.match(tensor)
    if found is None:
        return MIXTURES[mixture]
    layer, part = int(found[1]), tensor[found.end() :]
    if part == "attn_v.weight":
        return _of_values(mixture, layer, config)
    if part == "attn_k.weight" and _n_experts(config) == 8:
        return "q8_0"
    if part.startswith("ffn_down"):
        return _of_down(mixture, layer, config.n_layers)
    if part == "attn_output.weight":
        return _of_output(mixture, _n_experts(config))
    if part == "attn_qkv.weight":
        fused = {"q3_k_m": "q4_k", "q3_k_l": "q4_k", "q4_k_m": "q5_k", "q5_k_m": "q6_k"}
        return fused.get(mixture, MIXTURES[mixture])
    return MIXTURES[mixture]


def _n_experts(config: ModelConfig) -> int:
    return max((spec.n_experts for _, spec in config.moe_layers), default=1)


def _takes_more_bits(layer: int, n_layers: int) -> bool:
    eighth = n_layers // 8
    return layer < eighth or layer >= 7 * n_layers // 8 or (layer - eighth) % 3 == 2


def _of_values(mixture: str, layer: int, config: ModelConfig) -> str:
    if _n_experts(config) == 8:
        return "q8_0"
    form = MIXTURES[mixture]
    if mixture == "q3_k_m":
        form = "q5_k" if layer < 2 else "q4_k"
    elif mixture == "q3_k_l" or (mixture == "q4_k_s" and layer < 4):
        form = "q5_k"
    elif mixture in ("q4_k_m", "q5_k_m") and _takes_more_bits(layer, config.n_layers):
        form = "q6_k"
    mixer = config.layers[layer].attention  # what this is asked for are its values
    large = config.n_layers == 80 and mixer.n_kv_heads < mixer.n_heads
    return "q5_k" if large and form in ("q3_k", "q4_k") else form


def _of_down(mixture: str, layer: int, n_layers: int) -> str:
    if mixture == "q3_k_m":
        return "q5_k" if layer < n_layers // 16 else "q4_k"
    if mixture == "q3_k_l" or (mixture == "q4_k_s" and layer < n_layers // 8):
        return "q5_k"
    more = mixture in ("q4_k_m", "q5_k_m") and _takes_more_bits(layer, n_layers)
    return "q6_k" if more else MIXTURES[mixture]


def _of_output(mixture: str, n_experts: int) -> str:
    if n_experts == 8:
        return "q5_k" if mixture in ("q3_k_s", "q3_k_m", "q4_k_s", "q4_k_m") else MIXTURES[mixture]
    return {"q3_k_m": "q4_k", "q3_k_l": "q5_k"}.get(mixture, MIXTURES[mixture])
