"""DBRX and Grok-1 in plain NumPy, float64, token by token: written from the published mathematics, not from our code.

Sources: SPEC 1.2 (databricks/dbrx@a3200393) and 3.4 (xai-org/grok-1@7050ed20). Weights come under their Hugging Face
names. Slow on purpose; no caching, no batching, no shared code with the package.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

Array = np.ndarray[Any, np.dtype[np.float64]]
Weights = Mapping[str, Array]


def softmax(x: Array) -> Array:
    e = np.exp(x - x.max())
    return e / e.sum()


def rotate(x: Array, position: int, theta: float) -> Array:
    """RoPE, half rotation: pair (j, j + d/2) turns by position * theta^(-2j/d)."""
    half = len(x) // 2
    angle = position * theta ** (-2 * np.arange(half) / len(x))
    a, b = x[:half], x[half:]
    return np.concatenate((a * np.cos(angle) - b * np.sin(angle), b * np.cos(angle) + a * np.sin(angle)))


def attend(q: Array, keys: list[Array], values: list[Array], scale: float, cap: float | None) -> Array:
    """One head's output for one query over the keys up to it."""
    scores = np.array([q @ k for k in keys]) * scale
    if cap is not None:
        scores = cap * np.tanh(scores / cap)
    return softmax(scores) @ np.array(values)


def dbrx(weights: Weights, config: Mapping[str, Any], tokens: list[int]) -> tuple[Array, Array]:
    """Logits (T, V) and router probabilities (L, T, E)."""
    attn, ffn = config["attn_config"], config["ffn_config"]
    d, n_heads, n_kv = config["d_model"], config["n_heads"], attn["kv_n_heads"]
    hd = d // n_heads
    n_experts, width, top_k = ffn["moe_num_experts"], ffn["ffn_hidden_size"], ffn["moe_top_k"]

    def layer_norm(x: Array, w: Array) -> Array:
        return (x - x.mean()) / np.sqrt(x.var() + 1e-5) * w

    h = [weights["transformer.wte.weight"][t] for t in tokens]
    probabilities = []
    for i in range(config["n_layers"]):
        p = f"transformer.blocks.{i}."
        keys: list[list[Array]] = [[] for _ in range(n_kv)]
        values: list[list[Array]] = [[] for _ in range(n_kv)]
        probabilities.append([])
        for t in range(len(tokens)):
            a = layer_norm(h[t], weights[p + "norm_attn_norm.norm_1.weight"])
            qkv = np.clip(weights[p + "norm_attn_norm.attn.Wqkv.weight"] @ a, -attn["clip_qkv"], attn["clip_qkv"])
            q = qkv[:d].reshape(n_heads, hd)
            k = qkv[d : d + n_kv * hd].reshape(n_kv, hd)
            v = qkv[d + n_kv * hd :].reshape(n_kv, hd)
            for g in range(n_kv):
                keys[g].append(rotate(k[g], t, attn["rope_theta"]))
                values[g].append(v[g])
            heads = []
            for head in range(n_heads):
                g = head // (n_heads // n_kv)
                heads.append(attend(rotate(q[head], t, attn["rope_theta"]), keys[g], values[g], hd**-0.5, None))
            h[t] = h[t] + weights[p + "norm_attn_norm.attn.out_proj.weight"] @ np.concatenate(heads)
            m = layer_norm(h[t], weights[p + "norm_attn_norm.norm_2.weight"])
            probs = softmax(weights[p + "ffn.router.layer.weight"] @ m)
            probabilities[-1].append(probs)
            chosen = np.argsort(-probs, kind="stable")[:top_k]
            total = probs[chosen].sum()
            for e in chosen:
                rows = slice(e * width, (e + 1) * width)
                w1 = weights[p + "ffn.experts.mlp.w1"][rows]
                v1 = weights[p + "ffn.experts.mlp.v1"][rows]
                w2 = weights[p + "ffn.experts.mlp.w2"][rows]
                gate = w1 @ m
                hidden = gate / (1 + np.exp(-gate)) * (v1 @ m)
                h[t] = h[t] + probs[e] / total * (hidden @ w2)
        assert n_experts == len(probabilities[-1][0])
    head_weight = weights["lm_head.weight"]
    logits = [head_weight @ layer_norm(x, weights["transformer.norm_f.weight"]) for x in h]
    return np.array(logits), np.array(probabilities)


def grok1(weights: Weights, sizes: Mapping[str, int], tokens: list[int]) -> Array:
    """Logits (T, V). ``sizes``: d_model, n_layers, n_heads, n_kv_heads, head_dim, n_experts, top_k."""
    d, hd = sizes["d_model"], sizes["head_dim"]
    group = sizes["n_heads"] // sizes["n_kv_heads"]

    def rms_norm(x: Array, w: Array) -> Array:
        return x / np.sqrt((x**2).mean() + 1e-5) * w

    def gelu(x: Array) -> Array:  # jax's default, the tanh form
        return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))

    h = [weights["model.embed_tokens.weight"][t] * np.sqrt(d) for t in tokens]
    for i in range(sizes["n_layers"]):
        p = f"model.layers.{i}."
        keys: list[list[Array]] = [[] for _ in range(sizes["n_kv_heads"])]
        values: list[list[Array]] = [[] for _ in range(sizes["n_kv_heads"])]
        for t in range(len(tokens)):
            a = rms_norm(h[t], weights[p + "pre_attn_norm.scale"])
            q = (weights[p + "attn.q_proj.weight"] @ a).reshape(-1, hd)
            k = (weights[p + "attn.k_proj.weight"] @ a).reshape(-1, hd)
            v = (weights[p + "attn.v_proj.weight"] @ a).reshape(-1, hd)
            for g in range(sizes["n_kv_heads"]):
                keys[g].append(rotate(k[g], t, 10_000.0))
                values[g].append(v[g])
            heads = [
                attend(rotate(q[n], t, 10_000.0), keys[n // group], values[n // group], hd**-0.5, 30.0)
                for n in range(sizes["n_heads"])
            ]
            mixed = weights[p + "attn.o_proj.weight"] @ np.concatenate(heads)
            h[t] = h[t] + rms_norm(mixed, weights[p + "post_attn_norm.scale"])
            m = rms_norm(h[t], weights[p + "pre_moe_norm.scale"])
            probs = softmax(weights[p + "moe_block.gate.weight"] @ m)
            out = np.zeros(d)
            for e in np.argsort(-probs, kind="stable")[: sizes["top_k"]]:
                one = f"{p}moe_block.experts.{e}."
                hidden = gelu(weights[one + "linear.weight"] @ m) * (weights[one + "linear_v.weight"] @ m)
                out += probs[e] * (weights[one + "linear_1.weight"] @ hidden)  # as the softmax gives it
            h[t] = h[t] + rms_norm(out, weights[p + "post_moe_norm.scale"])
    table = weights["model.embed_tokens.weight"]
    return np.array([table @ rms_norm(x, weights["model.norm.scale"]) * 0.5773502691896257 for x in h])


def hf_balance_loss(probs: Array, top_k: int) -> float:
    """transformers' load-balancing loss: E sum_j sum_e f[j, e] P[e] over the rows of all layers together.

    ``probs``: (rows, E) of every layer, one after the other.
    """
    n_experts = probs.shape[1]
    f = np.zeros((top_k, n_experts))
    for row in probs:
        for j, e in enumerate(np.argsort(-row, kind="stable")[:top_k]):
            f[j, e] += 1 / len(probs)
    mean = probs.mean(0)
    return float(n_experts * sum(f[j, e] * mean[e] for j in range(top_k) for e in range(n_experts)))


def megablocks_balance_loss(layers: list[Array], top_k: int) -> float:
    """MegaBlocks' form: E / (L T k) sum over layers of counts . mean probabilities; perfect balance gives 1."""
    total = 0.0
    for probs in layers:
        n_tokens, n_experts = probs.shape
        counts = np.zeros(n_experts)
        for row in probs:
            for e in np.argsort(-row, kind="stable")[:top_k]:
                counts[e] += 1
        total += n_experts / (len(layers) * n_tokens * top_k) * float(counts @ probs.mean(0))
    return total
