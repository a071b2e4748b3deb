"""DBRX and the models beside it in plain NumPy, float64: the published mathematics, read from top to bottom.

Written from the models' papers and reference code (SPEC 1.2, 3.1-3.4: databricks/dbrx@a3200393, xai-org/grok-1@7050ed20,
mosaicml/llm-foundry@8c8dd48f), not from this package, and sharing nothing with it. One sequence, one token and one head
at a time; no cache, no batch. ``w`` holds the weights under their Hugging Face names, ``c`` is config.json.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

Array = np.ndarray[Any, np.dtype[np.float64]]
Weights = Mapping[str, Array]
Config = Mapping[str, Any]


def softmax(x: Array) -> Array:
    e = np.exp(x - x.max())
    return e / e.sum()


def layer_norm(x: Array, weight: Array, eps: float = 1e-5) -> Array:
    return (x - x.mean()) / np.sqrt(x.var() + eps) * weight


def rms_norm(x: Array, weight: Array, eps: float = 1e-5) -> Array:
    return x / np.sqrt((x**2).mean() + eps) * weight


def silu(x: Array) -> Array:
    return x / (1 + np.exp(-x))


def sigmoid(x: Array) -> Array:
    return 1 / (1 + np.exp(-x))


def gelu(x: Array) -> Array:
    """The exact form: x times the normal distribution function."""
    return np.array([v * 0.5 * (1 + math.erf(v / math.sqrt(2))) for v in x])


def gelu_tanh(x: Array) -> Array:
    """The tanh approximation, jax's default."""
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def rotate(
    x: Array,
    position: int,
    theta: float,
    scaling: Config | None = None,
    part: float = 1.0,
    side_by_side: bool = False,
) -> Array:
    """RoPE of one head, half rotation: the pair (j, j + d/2) turns by position * theta^(-2j/d), or a scaled angle.

    With ``part`` below 1 only the first numbers of the head turn, as if they were a head of their own. ``side_by_side``:
    the pairs are (2j, 2j + 1).
    """
    if part != 1:
        n = int(len(x) * part)
        return np.concatenate((rotate(x[:n], position, theta, scaling), x[n:]))
    half = len(x) // 2
    turn, length = scaled(theta ** (-2 * np.arange(half) / len(x)), theta, scaling)
    angle = position * turn
    cos, sin = length * np.cos(angle), length * np.sin(angle)
    if side_by_side:
        a, b, out = x[0::2], x[1::2], np.zeros_like(x)
        out[0::2], out[1::2] = a * cos - b * sin, b * cos + a * sin
        return out
    a, b = x[:half], x[half:]
    return np.concatenate((a * cos - b * sin, b * cos + a * sin))


def scaled(turn: Array, theta: float, scaling: Config | None) -> tuple[Array, float]:
    """(angles a position, what the rotated pair is stretched by) under rope_scaling.

    linear: all slower. llama3: slow pairs slower, quick ones as they are, a ramp between, by turns within the original
    context (Meta's release of LLaMA-3.1). yarn: the same with a ramp over the pairs' numbers (arXiv 2309.00071, 3.2-3.4).
    """
    if scaling is None:
        return turn, 1.0
    if (
        scaling.get("type") == "longrope"
    ):  # of which the longer list is taken, as texts are longer than the first context
        return turn / np.array(scaling["long_factor"]), scaling["long_mscale"]
    factor = scaling["factor"]
    if scaling.get("rope_type") == "linear":
        return turn / factor, 1.0
    context = scaling["original_max_position_embeddings"]
    if scaling.get("rope_type") == "llama3":
        low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
        rounds = context * turn / (2 * math.pi)
        smooth = np.clip((rounds - low) / (high - low), 0, 1)
        return turn * (smooth + (1 - smooth) / factor), 1.0
    pairs = len(turn)

    def pair_that_turns(rounds: float) -> float:
        return 2 * pairs * math.log(context / (rounds * 2 * math.pi)) / (2 * math.log(theta))

    first, last = pair_that_turns(scaling.get("beta_fast", 32)), pair_that_turns(scaling.get("beta_slow", 1))
    if scaling.get("truncate", True):
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, 2 * pairs - 1)
    ramp = np.clip((np.arange(pairs) - first) / max(last - first, 0.001), 0, 1)
    length = 0.1 * math.log(factor) + 1
    if "mscale" in scaling:
        length = (0.1 * scaling["mscale"] * math.log(factor) + 1) / mscale(scaling)
    return turn * (1 - ramp) + turn / factor * ramp, length


def mscale(scaling: Config | None) -> float:
    """What DeepSeek multiplies a query and a key by under YaRN, besides the turning part's own length."""
    return 0.1 * scaling["mscale_all_dim"] * math.log(scaling["factor"]) + 1 if scaling and "mscale" in scaling else 1.0


def attend(
    q: Array,
    k: Array,
    v: Array,
    *,
    theta: float | None = None,
    scaling: Config | None = None,
    part: float = 1.0,
    side_by_side: bool = False,
    normed: Callable[[Array, str], Array] | None = None,
    window: int | None = None,
    cap: float | None = None,
    slopes: Sequence[float] = (),
    sinks: Array | None = None,
) -> Array:
    """Causal attention of one sequence: q (T, H, d), k and v (T, K, d) -> (T, H d), heads side by side.

    With a window a query sees itself and the window - 1 keys before it. A head's sink is one more score, of no value.
    ``normed`` is a norm of the rotated heads.
    """
    n_tokens, n_heads, head_dim = q.shape
    group = n_heads // k.shape[1]
    out = np.zeros((n_tokens, n_heads, head_dim))
    for t in range(n_tokens):
        for h in range(n_heads):
            scores = np.full(t + 1, -np.inf)
            for s in range(0 if window is None else max(0, t - window + 1), t + 1):
                query, key = q[t, h], k[s, h // group]
                if theta is not None:
                    query = rotate(query, t, theta, scaling, part, side_by_side)
                    key = rotate(key, s, theta, scaling, part, side_by_side)
                if normed is not None:
                    query, key = normed(query, "query"), normed(key, "key")
                scores[s] = query @ key / math.sqrt(head_dim)
                if cap is not None:
                    scores[s] = cap * math.tanh(scores[s] / cap)
                if slopes:
                    scores[s] += slopes[h] * (s - t)
            shares = softmax(scores) if sinks is None else softmax(np.append(scores, sinks[h]))[:-1]
            out[t, h] = shares @ v[: t + 1, h // group]
    return out.reshape(n_tokens, n_heads * head_dim)


def heads(x: Array, n_heads: int) -> Array:
    """(T, H d) -> (T, H, d)."""
    return x.reshape(len(x), n_heads, -1)


def alibi_slopes(n_heads: int) -> list[float]:
    """2^(-8 i / n) for i = 1..n, n the next power of two; other head counts take every second slope, then the rest."""
    n = 1
    while n < n_heads:
        n *= 2
    slopes = [2 ** (-8 * i / n) for i in range(1, n + 1)]
    return slopes if n == n_heads else (slopes[1::2] + slopes[0::2])[:n_heads]


def dbrx(w: Weights, c: Config, tokens: Sequence[int]) -> tuple[Array, Array]:
    """Logits (T, V) and router probabilities (L, T, E)."""
    attn, ffn = c["attn_config"], c["ffn_config"]
    d, n_heads, n_kv = c["d_model"], c["n_heads"], attn["kv_n_heads"]
    kv_dim = n_kv * d // n_heads
    h = w["transformer.wte.weight"][tokens]
    probabilities = np.zeros((c["n_layers"], len(tokens), ffn["moe_num_experts"]))
    for i in range(c["n_layers"]):
        block = f"transformer.blocks.{i}."
        a = np.array([layer_norm(x, w[block + "norm_attn_norm.norm_1.weight"]) for x in h])
        qkv = a @ w[block + "norm_attn_norm.attn.Wqkv.weight"].T
        qkv = np.clip(qkv, -attn["clip_qkv"], attn["clip_qkv"])  # before the split and the rotation
        q, k, v = qkv[:, :d], qkv[:, d : d + kv_dim], qkv[:, d + kv_dim :]
        mixed = attend(heads(q, n_heads), heads(k, n_kv), heads(v, n_kv), theta=attn["rope_theta"])
        h = h + mixed @ w[block + "norm_attn_norm.attn.out_proj.weight"].T
        for t in range(len(tokens)):
            m = layer_norm(h[t], w[block + "norm_attn_norm.norm_2.weight"])
            p = softmax(w[block + "ffn.router.layer.weight"] @ m)
            probabilities[i, t] = p
            chosen = np.argsort(-p, kind="stable")[: ffn["moe_top_k"]]
            for e in chosen:
                rows = slice(e * ffn["ffn_hidden_size"], (e + 1) * ffn["ffn_hidden_size"])
                w1, v1, w2 = (w[f"{block}ffn.experts.mlp.{name}"][rows] for name in ("w1", "v1", "w2"))
                hidden = silu(w1 @ m) * (v1 @ m)
                h[t] += p[e] / p[chosen].sum() * (hidden @ w2)  # w2 is stored (d_ff, d_model)
    logits = [w["lm_head.weight"] @ layer_norm(x, w["transformer.norm_f.weight"]) for x in h]
    return np.array(logits), probabilities


AFTER = ("olmo2", "olmo3", "flex_olmo")
"""Models whose norms are behind attention and network."""


def llama_attention(w: Weights, c: Config, layer: str, h: Array) -> Array:
    """The attention branch of LLaMA and its kin, norm included: (T, D) -> (T, D)."""
    if c["model_type"] in AFTER:
        a = h
    elif c["model_type"] == "phimoe":
        norm = w[layer + "input_layernorm.weight"], c["rms_norm_eps"]
        a = np.array([layer_norm(x, *norm) + w[layer + "input_layernorm.bias"] for x in h])
    else:
        a = np.array([rms_norm(x, w[layer + "input_layernorm.weight"], c["rms_norm_eps"]) for x in h])
    q, k, v = (
        a @ w[f"{layer}self_attn.{name}_proj.weight"].T + w.get(f"{layer}self_attn.{name}_proj.bias", 0)
        for name in "qkv"
    )
    n_heads, n_kv = c["num_attention_heads"], c["num_key_value_heads"]
    if c["model_type"] in ("olmoe", "minimax_m2", *AFTER):  # norms of the whole vectors
        q, k = (
            np.array([rms_norm(row, w[f"{layer}self_attn.{name}_norm.weight"], c["rms_norm_eps"]) for row in x])
            for name, x in (("q", q), ("k", k))
        )
    if "clip_qkv" in c:  # behind the norms
        q, k, v = (np.clip(x, -c["clip_qkv"], c["clip_qkv"]) for x in (q, k, v))
    q, k, v = heads(q, n_heads), heads(k, n_kv), heads(v, n_kv)
    if c["model_type"].startswith(("qwen3", "dots1", "mellum")) or (
        c["model_type"] == "glm4_moe" and c["use_qk_norm"]
    ):  # a norm of every head
        q, k = (
            np.array(
                [
                    [rms_norm(head, w[f"{layer}self_attn.{name}_norm.weight"], c["rms_norm_eps"]) for head in row]
                    for row in x
                ]
            )
            for name, x in (("q", q), ("k", k))
        )
    if "attention_multiplier" in c:  # in place of 1/sqrt(d), which attend divides by
        q = q * c["attention_multiplier"] * math.sqrt(q.shape[-1])
    number = int(layer.split(".")[2])
    slides = c.get("layer_types", ["sliding_attention"] * (number + 1))[number] == "sliding_attention"
    if c["model_type"] == "mellum":  # frequencies by the kind of layer
        rope = c["rope_parameters"]["sliding_attention" if slides else "full_attention"]
        c = {**c, "rope_theta": rope["rope_theta"], "rope_scaling": None if slides else rope}
    turns = c["rope_theta"] if c.get("no_rope_layers", {number: 1})[number] else None
    if "layer_rope_theta" in c:
        turns = c["layer_rope_theta"][number] or None
    window = c.get("sliding_window") if slides and c.get("use_sliding_window", True) else None
    part = c.get("rotary_dim", q.shape[-1]) / q.shape[-1] * c.get("partial_rotary_factor", 1.0)
    options: dict[str, Any] = {"part": part, "scaling": c.get("rope_scaling")}
    if c["model_type"] == "ernie4_5_moe":
        options["side_by_side"] = True
    if c["model_type"] == "hunyuan_v1_moe":  # a larger base, and the norms behind the rotation
        turns, options["scaling"] = turns * c["rope_scaling"]["alpha"] ** (q.shape[-1] / (q.shape[-1] - 2)), None
        options["normed"] = lambda head, name: rms_norm(
            head, w[f"{layer}self_attn.{name}_layernorm.weight"], c["rms_norm_eps"]
        )
    if c["model_type"] == "olmo3" and slides:  # which the scaling is not for
        options["scaling"] = None
    options["sinks"] = w.get(layer + "self_attn.sinks")
    mixed = attend(q, k, v, theta=turns, window=window, **options)
    return mixed @ w[layer + "self_attn.o_proj.weight"].T + w.get(layer + "self_attn.o_proj.bias", 0)


def llama(w: Weights, c: Config, tokens: Sequence[int]) -> Array:
    """Logits (T, V)."""
    table, eps = w["model.embed_tokens.weight"], c["rms_norm_eps"]
    h = table[tokens]
    for i in range(c["num_hidden_layers"]):
        layer = f"model.layers.{i}."
        h = h + llama_attention(w, c, layer, h)
        for t in range(len(tokens)):
            m = rms_norm(h[t], w[layer + "post_attention_layernorm.weight"], eps)
            hidden = silu(w[layer + "mlp.gate_proj.weight"] @ m) * (w[layer + "mlp.up_proj.weight"] @ m)
            h[t] += w[layer + "mlp.down_proj.weight"] @ hidden
    head = table if c["tie_word_embeddings"] else w["lm_head.weight"]
    return np.array([head @ rms_norm(x, w["model.norm.weight"], eps) for x in h])


def of_networks(w: Weights, where: str, shares: Mapping[str, Any], m: Array) -> Array:
    """The sum of gated networks' outputs, each times its share; ``where`` and a network's name are before its weights."""
    out = np.zeros_like(m)
    for network, share in shares.items():
        gate, up, down = (w[f"{where}{network}{name}_proj.weight"] for name in ("gate", "up", "down"))
        out += share * (down @ (silu(gate @ m) * (up @ m)))
    return out


def fine_grained(w: Weights, c: Config, tokens: Sequence[int]) -> Array:
    """Qwen3-MoE, OLMoE and Qwen2-MoE, whose shared network has a gate: logits (T, V)."""
    eps = c["rms_norm_eps"]
    h = w["model.embed_tokens.weight"][tokens]
    for i in range(c["num_hidden_layers"]):
        layer = f"model.layers.{i}."
        h = h + llama_attention(w, c, layer, h)
        for t in range(len(tokens)):
            m = rms_norm(h[t], w[layer + "post_attention_layernorm.weight"], eps)
            if i in c.get("mlp_only_layers", ()) or c.get("mlp_layer_types", ["sparse"] * (i + 1))[i] == "dense":
                shares = {"": 1.0}
            else:
                p = softmax(w[layer + "mlp.gate.weight"] @ m)
                chosen = np.argsort(-p, kind="stable")[: c["num_experts_per_tok"]]
                whole = p[chosen].sum() if c["norm_topk_prob"] else 1.0
                shares = {f"experts.{e}.": p[e] / whole for e in chosen}
                if c["model_type"] == "qwen2_moe":
                    shares["shared_expert."] = sigmoid((w[layer + "mlp.shared_expert_gate.weight"] @ m)[0])
            h[t] += of_networks(w, layer + "mlp.", shares, m)
    return np.array([w["lm_head.weight"] @ rms_norm(x, w["model.norm.weight"], eps) for x in h])


def sigmoid_mixture(w: Weights, c: Config, tokens: Sequence[int]) -> Array:
    """GLM-4.5 and dots1: DeepSeek-V3's router over one group: logits (T, V)."""
    eps = c["rms_norm_eps"]
    h = w["model.embed_tokens.weight"][tokens]
    for i in range(c["num_hidden_layers"]):
        layer = f"model.layers.{i}."
        h = h + llama_attention(w, c, layer, h)
        for t in range(len(tokens)):
            m = rms_norm(h[t], w[layer + "post_attention_layernorm.weight"], eps)
            if i < c["first_k_dense_replace"]:
                shares = {"": 1.0}
            else:
                score = sigmoid(w[layer + "mlp.gate.weight"] @ m)
                corrected = score + w[layer + "mlp.gate.e_score_correction_bias"]  # for the choice, not the weights
                chosen = np.argsort(-corrected, kind="stable")[: c["num_experts_per_tok"]]
                whole = score[chosen].sum() if c["norm_topk_prob"] else 1.0
                shares = {f"experts.{e}.": c["routed_scaling_factor"] * score[e] / whole for e in chosen}
                shares["shared_experts."] = 1.0
            h[t] += of_networks(w, layer + "mlp.", shares, m)
    return np.array([w["lm_head.weight"] @ rms_norm(x, w["model.norm.weight"], eps) for x in h])


def solar(w: Weights, c: Config, tokens: Sequence[int]) -> Array:
    """Solar Open: LLaMA's attention, DeepSeek-V3's mixture in every layer: logits (T, V)."""
    eps, c = c["rms_norm_eps"], {**c, "rope_theta": c["rope_parameters"]["rope_theta"]}
    h = w["model.embed_tokens.weight"][tokens]
    for i in range(c["num_hidden_layers"]):
        layer = f"model.layers.{i}."
        h = h + llama_attention(w, c, layer, h)
        for t in range(len(tokens)):
            m = rms_norm(h[t], w[layer + "post_attention_layernorm.weight"], eps)
            h[t] += of_networks(w, layer + "mlp.", deepseek_shares(w, c, layer, m), m)
    return np.array([w["lm_head.weight"] @ rms_norm(x, w["model.norm.weight"], eps) for x in h])


def qwen3_vl(w: Weights, c: Config, tokens: Sequence[int]) -> Array:
    """The text of Qwen3-VL: Qwen3 under other names, a layer's experts in two tensors: logits (T, V)."""
    text = {**c["text_config"], "tie_word_embeddings": c["tie_word_embeddings"], "norm_topk_prob": True}
    text |= {"rope_theta": text["rope_parameters"]["rope_theta"]}
    named = {name.replace("language_model.", ""): values for name, values in w.items()}
    for name in [name for name in named if name.endswith(".experts.gate_up_proj")]:
        where = name.removesuffix("gate_up_proj")
        for e, both in enumerate(named[name]):
            gate, up = np.split(both, 2, axis=1)  # (D, 2 F)
            named |= {f"{where}{e}.gate_proj.weight": gate.T, f"{where}{e}.up_proj.weight": up.T}
            named[f"{where}{e}.down_proj.weight"] = named[where + "down_proj"][e].T
    return (fine_grained if "num_experts" in text else llama)(named, text, tokens)


def olmo2(w: Weights, c: Config, tokens: Sequence[int]) -> Array:
    """OLMo 2 and 3 and FlexOlmo, whose experts' weights are the softmax's: logits (T, V)."""
    eps = c["rms_norm_eps"]
    h = w["model.embed_tokens.weight"][tokens]
    for i in range(c["num_hidden_layers"]):
        layer = f"model.layers.{i}."
        mixed = llama_attention(w, c, layer, h)
        for t in range(len(tokens)):
            h[t] += rms_norm(mixed[t], w[layer + "post_attention_layernorm.weight"], eps)
            shares = {"": 1.0}
            if c["model_type"] == "flex_olmo":
                p = softmax(w[layer + "mlp.gate.weight"] @ h[t])
                shares = {f"experts.{e}.": p[e] for e in np.argsort(-p, kind="stable")[: c["num_experts_per_tok"]]}
            out = of_networks(w, layer + "mlp.", shares, h[t])
            h[t] += rms_norm(out, w[layer + "post_feedforward_layernorm.weight"], eps)
    return np.array([w["lm_head.weight"] @ rms_norm(x, w["model.norm.weight"], eps) for x in h])


def phimoe(w: Weights, c: Config, tokens: Sequence[int]) -> Array:
    """Phi-3.5-MoE: logits (T, V)."""

    def norm(x: Array, name: str) -> Array:
        return layer_norm(x, w[name + ".weight"], c["rms_norm_eps"]) + w[name + ".bias"]

    h = w["model.embed_tokens.weight"][tokens]
    for i in range(c["num_hidden_layers"]):
        layer = f"model.layers.{i}."
        h = h + llama_attention(w, c, layer, h)
        for t in range(len(tokens)):
            m = norm(h[t], layer + "post_attention_layernorm")
            logits = w[layer + "block_sparse_moe.gate.weight"] @ m
            left = list(range(c["num_local_experts"]))
            for _ in range(2):
                best = max(left, key=lambda e: logits[e])
                reach = 2 * c["router_jitter_noise"]
                near = [e for e in left if logits[best] - logits[e] <= reach * max(abs(logits[e]), logits[best])]
                share = 1 / sum(math.exp(logits[e] - logits[best]) for e in near)
                w1, w2, w3 = (w[f"{layer}block_sparse_moe.experts.{best}.w{n}.weight"] for n in (1, 2, 3))
                h[t] += share * (w2 @ (silu(w1 @ m) * (w3 @ m)))
                left.remove(best)
    return np.array([w["lm_head.weight"] @ norm(x, "model.norm") + w["lm_head.bias"] for x in h])


def latent_attention(w: Weights, c: Config, layer: str, h: Array) -> Array:
    """Multi-head latent attention with every head's keys and values made whole (arXiv 2405.04434, equations 9 to 19)."""
    where, eps = layer + "self_attn.", 1e-6  # of the latents, whatever rms_norm_eps says
    a = np.array([rms_norm(x, w[layer + "input_layernorm.weight"], c["rms_norm_eps"]) for x in h])
    n_heads, nope, turning = c["num_attention_heads"], c["qk_nope_head_dim"], c["qk_rope_head_dim"]
    rank, v_dim, theta, scaling = c["kv_lora_rank"], c["v_head_dim"], c["rope_theta"], c.get("rope_scaling")
    if c["q_lora_rank"] is None:
        q = a @ w[where + "q_proj.weight"].T
    else:
        low = [rms_norm(x, w[where + "q_a_layernorm.weight"], eps) for x in a @ w[where + "q_a_proj.weight"].T]
        q = np.array(low) @ w[where + "q_b_proj.weight"].T
    q = heads(q, n_heads)
    down = a @ w[where + "kv_a_proj_with_mqa.weight"].T
    latents = np.array([rms_norm(x, w[where + "kv_a_layernorm.weight"], eps) for x in down[:, :rank]])
    up = heads(latents @ w[where + "kv_b_proj.weight"].T, n_heads)
    out = np.zeros((len(h), n_heads, v_dim))
    shared = [rotate(x, s, theta, scaling, side_by_side=True) for s, x in enumerate(down[:, rank:])]
    for t in range(len(h)):
        for n in range(n_heads):
            query = np.concatenate((q[t, n, :nope], rotate(q[t, n, nope:], t, theta, scaling, side_by_side=True)))
            keys = [np.concatenate((up[s, n, :nope], shared[s])) for s in range(t + 1)]
            scores = np.array(keys) @ query * mscale(scaling) ** 2 / math.sqrt(nope + turning)
            out[t, n] = softmax(scores) @ up[: t + 1, n, nope:]
    return out.reshape(len(h), -1) @ w[where + "o_proj.weight"].T


def deepseek_shares(w: Weights, c: Config, layer: str, m: Array) -> dict[str, Any]:
    """How much each network of DeepSeek-V2's or V3's mixture counts."""
    logits, top_k = w[layer + "mlp.gate.weight"] @ m, c["num_experts_per_tok"]
    second = c["model_type"] == "deepseek_v2"
    score = softmax(logits) if second else sigmoid(logits)
    by = score if second else score + w[layer + "mlp.gate.e_score_correction_bias"]
    groups = np.split(by, c["n_group"])
    worth = np.array([max(group) if second else sum(sorted(group)[-2:]) for group in groups])
    best = np.argsort(-worth, kind="stable")[: c["topk_group"]]
    size = len(by) // c["n_group"]
    closed = [e for e in range(len(by)) if e // size not in best]
    by = by.copy()
    by[closed] = -np.inf
    chosen = np.argsort(-by, kind="stable")[:top_k]
    whole = score[chosen].sum() if c["norm_topk_prob"] else 1.0
    shares: dict[str, Any] = {f"experts.{e}.": c["routed_scaling_factor"] * score[e] / whole for e in chosen}
    return shares | {"shared_experts.": 1.0}


def deepseek(w: Weights, c: Config, tokens: Sequence[int]) -> Array:
    """DeepSeek-V2 and V3, GLM-4.7-Flash: logits (T, V)."""
    eps = c["rms_norm_eps"]
    h = w["model.embed_tokens.weight"][tokens]
    for i in range(c["num_hidden_layers"]):
        layer = f"model.layers.{i}."
        h = h + latent_attention(w, c, layer, h)
        for t in range(len(tokens)):
            m = rms_norm(h[t], w[layer + "post_attention_layernorm.weight"], eps)
            shares = {"": 1.0} if i < c["first_k_dense_replace"] else deepseek_shares(w, c, layer, m)
            h[t] += of_networks(w, layer + "mlp.", shares, m)
    return np.array([w["lm_head.weight"] @ rms_norm(x, w["model.norm.weight"], eps) for x in h])


def ernie(w: Weights, c: Config, tokens: Sequence[int]) -> Array:
    """ERNIE 4.5 with experts: logits (T, V)."""
    eps, table = c["rms_norm_eps"], w["model.embed_tokens.weight"]
    h = table[tokens]
    for i in range(c["num_hidden_layers"]):
        layer = f"model.layers.{i}."
        h = h + llama_attention(w, c, layer, h)
        for t in range(len(tokens)):
            m = rms_norm(h[t], w[layer + "post_attention_layernorm.weight"], eps)
            if not c["moe_layer_start_index"] <= i <= c["moe_layer_end_index"]:
                shares = {"": 1.0}
            else:
                p = softmax(w[layer + "mlp.gate.weight"] @ m)
                corrected = p + w[layer + "mlp.moe_statics.e_score_correction_bias"][0]
                chosen = np.argsort(-corrected, kind="stable")[: c["moe_k"]]
                whole = max(p[chosen].sum(), c["moe_norm_min"])
                shares = {f"experts.{e}.": p[e] / whole for e in chosen} | {"shared_experts.": 1.0}
            h[t] += of_networks(w, layer + "mlp.", shares, m)
    return np.array([table @ rms_norm(x, w["model.norm.weight"], eps) for x in h])


def minimax(w: Weights, c: Config, tokens: Sequence[int]) -> Array:
    """MiniMax-M2: logits (T, V)."""
    eps = c["rms_norm_eps"]
    h = w["model.embed_tokens.weight"][tokens]
    for i in range(c["num_hidden_layers"]):
        layer = f"model.layers.{i}."
        h = h + llama_attention(w, c, layer, h)
        for t in range(len(tokens)):
            m = rms_norm(h[t], w[layer + "post_attention_layernorm.weight"], eps)
            experts = layer + "block_sparse_moe."
            score = sigmoid(w[experts + "gate.weight"] @ m)
            corrected = score + w[experts + "e_score_correction_bias"]
            chosen = np.argsort(-corrected, kind="stable")[: c["num_experts_per_tok"]]
            for e in chosen:
                w1, w2, w3 = (w[f"{experts}experts.{e}.w{n}.weight"] for n in (1, 2, 3))
                h[t] += score[e] / score[chosen].sum() * (w2 @ (silu(w1 @ m) * (w3 @ m)))
    return np.array([w["lm_head.weight"] @ rms_norm(x, w["model.norm.weight"], eps) for x in h])


def hunyuan(w: Weights, c: Config, tokens: Sequence[int]) -> Array:
    """Hunyuan-A13B: logits (T, V)."""
    eps, table = c["rms_norm_eps"], w["model.embed_tokens.weight"]
    h = table[tokens]
    for i in range(c["num_hidden_layers"]):
        layer = f"model.layers.{i}."
        h = h + llama_attention(w, c, layer, h)
        for t in range(len(tokens)):
            m = rms_norm(h[t], w[layer + "post_attention_layernorm.weight"], eps)
            p = softmax(w[layer + "mlp.gate.wg.weight"] @ m)
            chosen = np.argsort(-p, kind="stable")[: c["moe_topk"]]
            shares = {f"experts.{e}.": p[e] / p[chosen].sum() for e in chosen} | {"shared_mlp.": 1.0}
            h[t] += of_networks(w, layer + "mlp.", shares, m)
    return np.array([table @ rms_norm(x, w["model.norm.weight"], eps) for x in h])


def granite(w: Weights, c: Config, tokens: Sequence[int]) -> Array:
    """Granite, dense and with experts: logits (T, V)."""
    eps, r = c["rms_norm_eps"], c["residual_multiplier"]
    h = w["model.embed_tokens.weight"][tokens] * c["embedding_multiplier"]
    for i in range(c["num_hidden_layers"]):
        layer = f"model.layers.{i}."
        h = h + r * llama_attention(w, c, layer, h)
        for t in range(len(tokens)):
            m = rms_norm(h[t], w[layer + "post_attention_layernorm.weight"], eps)
            if c["model_type"] in ("granite", "granite_swa"):
                gate, up, down = (w[f"{layer}mlp.{name}_proj.weight"] for name in ("gate", "up", "down"))
                h[t] += r * (down @ (silu(gate @ m) * (up @ m)))
                continue
            experts = layer + "block_sparse_moe."
            router, inner, outer = (
                ("router.weight", "experts.gate_up_proj", "experts.down_proj")
                if c["model_type"] == "granitemoe_swa"
                else ("router.layer.weight", "input_linear.weight", "output_linear.weight")
            )
            logits = w[experts + router] @ m
            chosen = np.argsort(-logits, kind="stable")[: c["num_experts_per_tok"]]
            made = np.zeros_like(m)
            for e, share in zip(chosen, softmax(logits[chosen]), strict=True):
                gate, up = np.split(w[experts + inner][e], 2)
                made += share * (w[experts + outer][e] @ (silu(gate @ m) * (up @ m)))
            if layer + "shared_mlp.input_linear.weight" in w:
                gate, up = np.split(w[layer + "shared_mlp.input_linear.weight"], 2)
                made += w[layer + "shared_mlp.output_linear.weight"] @ (silu(gate @ m) * (up @ m))
            h[t] += r * made
    return np.array([w["lm_head.weight"] @ rms_norm(x, w["model.norm.weight"], eps) for x in h]) / c["logits_scaling"]


def convolved(x: Array, taps: Array) -> Array:
    """Every channel with its own taps, the last one for the position itself: x (T, C), taps (C, L) -> (T, C)."""
    out = np.zeros_like(x)
    for t in range(len(x)):
        for back in range(min(taps.shape[1], t + 1)):
            out[t] += taps[:, -1 - back] * x[t - back]
    return out


def mamba2(w: Weights, c: Config, where: str, a: Array) -> Array:
    """Granite 4's state-space layer: (T, D) -> (T, D)."""
    n_heads, d, groups, n = (c[f"mamba_{name}"] for name in ("n_heads", "d_head", "n_groups", "d_state"))
    inner = n_heads * d
    z, mixed, steps = np.split(a @ w[where + "in_proj.weight"].T, [inner, 2 * inner + 2 * groups * n], axis=1)
    mixed = silu(convolved(mixed, w[where + "conv1d.weight"][:, 0]) + w[where + "conv1d.bias"])
    x, b, read = np.split(mixed, [inner, inner + groups * n], axis=1)
    x, b, read = x.reshape(-1, n_heads, d), b.reshape(-1, groups, n), read.reshape(-1, groups, n)
    out = np.zeros((len(a), n_heads, d))
    for h in range(n_heads):
        memory, group = np.zeros((n, d)), h // (n_heads // groups)
        for t in range(len(a)):
            step = math.log1p(math.exp(steps[t, h] + w[where + "dt_bias"][h]))
            memory = memory * math.exp(-math.exp(w[where + "A_log"][h]) * step)
            memory = memory + np.outer(b[t, group], step * x[t, h])
            out[t, h] = read[t, group] @ memory + w[where + "D"][h] * x[t, h]
    weights = np.split(w[where + "norm.weight"], groups)
    made = [np.split(row, groups) for row in out.reshape(len(a), inner) * silu(z)]
    normed = [[rms_norm(one, g, c["rms_norm_eps"]) for one, g in zip(row, weights, strict=True)] for row in made]
    return np.array(normed).reshape(len(a), inner) @ w[where + "out_proj.weight"].T


def granite_hybrid(w: Weights, c: Config, tokens: Sequence[int]) -> Array:
    """Granite 4, with experts and without: logits (T, V)."""
    eps, r, table = c["rms_norm_eps"], c["residual_multiplier"], w["model.embed_tokens.weight"]
    h = table[tokens] * c["embedding_multiplier"]
    for i in range(c["num_hidden_layers"]):
        layer, turns = f"model.layers.{i}.", c["position_embedding_type"] == "rope"
        if c["layer_types"][i] == "attention":
            h = h + r * llama_attention(w, c | {"no_rope_layers": {i: int(turns)}}, layer, h)
        else:
            a = np.array([rms_norm(x, w[layer + "input_layernorm.weight"], eps) for x in h])
            h = h + r * mamba2(w, c, layer + "mamba.", a)
        for t in range(len(tokens)):
            m = rms_norm(h[t], w[layer + "post_attention_layernorm.weight"], eps)
            gate, up = np.split(w[layer + "shared_mlp.input_linear.weight"], 2)
            made = w[layer + "shared_mlp.output_linear.weight"] @ (silu(gate @ m) * (up @ m))
            if c["num_local_experts"]:
                experts = layer + "block_sparse_moe."
                logits = w[experts + "router.layer.weight"] @ m
                chosen = np.argsort(-logits, kind="stable")[: c["num_experts_per_tok"]]
                for e, share in zip(chosen, softmax(logits[chosen]), strict=True):
                    gate, up = np.split(w[experts + "input_linear.weight"][e], 2)
                    made += share * (w[experts + "output_linear.weight"][e] @ (silu(gate @ m) * (up @ m)))
            h[t] += r * made
    return np.array([table @ rms_norm(x, w["model.norm.weight"], eps) for x in h]) / c["logits_scaling"]


def turned(x: Array, theta: float, part: float) -> Array:
    """The first part of the pairs (i, i + d/2) of every head turned: x (T, heads, d)."""
    out, half = x.copy(), x.shape[-1] // 2
    for t in range(len(x)):
        for i in range(int(part * half)):
            angle = t * theta ** (-2 * i / x.shape[-1])
            a, b = x[t, :, i], x[t, :, i + half]
            out[t, :, i] = a * math.cos(angle) - b * math.sin(angle)
            out[t, :, i + half] = b * math.cos(angle) + a * math.sin(angle)
    return out


def gemma(w: Weights, c: Config, tokens: Sequence[int]) -> Array:
    """Gemma 2 and 3: logits (T, V)."""
    eps, table, third = c["rms_norm_eps"], w["model.embed_tokens.weight"], c["model_type"] == "gemma3_text"
    h = table[tokens] * math.sqrt(c["hidden_size"])
    for i in range(c["num_hidden_layers"]):
        layer, slides = f"model.layers.{i}.", c["layer_types"][i] == "sliding_attention"

        def norm(name: str, x: Array, layer: str = layer) -> Array:
            return rms_norm(x, 1 + w[f"{layer}{name}.weight"], eps)

        a = np.array([norm("input_layernorm", x) for x in h])
        q, k, v = (
            (a @ w[f"{layer}self_attn.{name}_proj.weight"].T).reshape(len(a), -1, c["head_dim"]) for name in "qkv"
        )
        if third:
            q, k = (
                np.array([[norm(f"self_attn.{name}_norm", x) for x in row] for row in rows])
                for name, rows in (("q", q), ("k", k))
            )
        near = third and slides
        mixed = attend(
            q * math.sqrt(c["head_dim"] / c["query_pre_attn_scalar"]),
            k,
            v,
            theta=c["rope_local_base_freq"] if near else c["rope_theta"],
            scaling=None if near else c.get("rope_scaling"),
            window=c["sliding_window"] if slides else None,
            cap=c["attn_logit_softcapping"],
        )
        mixed = mixed @ w[layer + "self_attn.o_proj.weight"].T
        h = h + np.array([norm("post_attention_layernorm", x) for x in mixed])
        gate, up, down = (w[f"{layer}mlp.{name}_proj.weight"] for name in ("gate", "up", "down"))
        m = [norm("pre_feedforward_layernorm", x) for x in h]
        h = h + np.array([norm("post_feedforward_layernorm", down @ (gelu_tanh(gate @ x) * (up @ x))) for x in m])
    logits = np.array([table @ rms_norm(x, 1 + w["model.norm.weight"], eps) for x in h])
    cap = c["final_logit_softcapping"]
    return logits if cap is None else cap * np.tanh(logits / cap)


def gemma4(w: Weights, c: Config, tokens: Sequence[int]) -> Array:
    """Gemma 4, with experts and without: logits (T, V)."""
    eps, d_model, table = c["rms_norm_eps"], c["hidden_size"], w["model.embed_tokens.weight"]
    h = table[tokens] * math.sqrt(d_model)

    def network(where: str, x: Array) -> Array:
        gate, up, down = (w[f"{where}mlp.{name}_proj.weight"] for name in ("gate", "up", "down"))
        return down @ (gelu_tanh(gate @ x) * (up @ x))

    for i in range(c["num_hidden_layers"]):
        layer, kind = f"model.layers.{i}.", c["layer_types"][i]

        def norm(name: str, x: Array, layer: str = layer) -> Array:
            return rms_norm(x, w[f"{layer}{name}.weight"], eps)

        full = kind == "full_attention"
        d = c["global_head_dim"] if full else c["head_dim"]
        a = np.array([norm("input_layernorm", x) for x in h])
        q, k = ((a @ w[f"{layer}self_attn.{name}_proj.weight"].T).reshape(len(a), -1, d) for name in "qk")
        same = full and c["attention_k_eq_v"]
        v = k if same else (a @ w[layer + "self_attn.v_proj.weight"].T).reshape(len(a), -1, d)
        v = np.array([[rms_norm(x, np.ones(d), eps) for x in row] for row in v])
        rope = c["rope_parameters"][kind]
        q, k = (
            turned(
                np.array([[norm(f"self_attn.{name}_norm", x) for x in row] for row in rows]),
                rope["rope_theta"],
                rope.get("partial_rotary_factor", 1.0),
            )
            for name, rows in (("q", q), ("k", k))
        )
        mixed = attend(q * math.sqrt(d), k, v, window=None if full else c["sliding_window"])
        mixed = mixed @ w[layer + "self_attn.o_proj.weight"].T
        h = h + np.array([norm("post_attention_layernorm", x) for x in mixed])
        for t in range(len(tokens)):
            made = network(layer, norm("pre_feedforward_layernorm", h[t]))
            if c["enable_moe_block"]:
                judged = rms_norm(h[t], np.ones(d_model), eps) * w[layer + "router.scale"] / math.sqrt(d_model)
                p = softmax(w[layer + "router.proj.weight"] @ judged)
                chosen = np.argsort(-p, kind="stable")[: c["top_k_experts"]]
                m, own = norm("pre_feedforward_layernorm_2", h[t]), np.zeros(d_model)
                for e in chosen:
                    gate, up = np.split(w[layer + "experts.gate_up_proj"][e], 2)
                    share = p[e] / p[chosen].sum() * w[layer + "router.per_expert_scale"][e]
                    own += share * (w[layer + "experts.down_proj"][e] @ (gelu_tanh(gate @ m) * (up @ m)))
                made = norm("post_feedforward_layernorm_1", made) + norm("post_feedforward_layernorm_2", own)
            h[t] = (h[t] + norm("post_feedforward_layernorm", made)) * w[layer + "layer_scalar"][0]
    logits = np.array([table @ rms_norm(x, w["model.norm.weight"], eps) for x in h])
    cap = c["final_logit_softcapping"]
    return cap * np.tanh(logits / cap)


def lfm2(w: Weights, c: Config, tokens: Sequence[int]) -> Array:
    """LFM2, dense and with experts: logits (T, V)."""
    eps, table = c["norm_eps"], w["model.embed_tokens.weight"]
    n_heads, n_kv = c["num_attention_heads"], c["num_key_value_heads"]
    h = table[tokens]
    for i in range(c["num_hidden_layers"]):
        layer = f"model.layers.{i}."
        a = np.array([rms_norm(x, w[layer + "operator_norm.weight"], eps) for x in h])
        if c["layer_types"][i] == "conv":
            gate_in, gate_out, values = np.split(a @ w[layer + "conv.in_proj.weight"].T, 3, axis=1)
            mixed = gate_out * convolved(gate_in * values, w[layer + "conv.conv.weight"][:, 0])
            h = h + mixed @ w[layer + "conv.out_proj.weight"].T
        else:
            q, k, v = (
                heads(a @ w[f"{layer}self_attn.{name}_proj.weight"].T, n)
                for name, n in (("q", n_heads), ("k", n_kv), ("v", n_kv))
            )
            q, k = (
                np.array(
                    [[rms_norm(x, w[f"{layer}self_attn.{name}_layernorm.weight"], eps) for x in row] for row in rows]
                )
                for name, rows in (("q", q), ("k", k))
            )
            h = h + attend(q, k, v, theta=c["rope_theta"]) @ w[layer + "self_attn.out_proj.weight"].T
        for t in range(len(tokens)):
            m = rms_norm(h[t], w[layer + "ffn_norm.weight"], eps)
            where, shares = layer + "feed_forward.", {"": 1.0}
            if i >= c.get("num_dense_layers", c["num_hidden_layers"]):
                score = sigmoid(w[where + "gate.weight"] @ m)
                chosen = np.argsort(-(score + w[where + "expert_bias"]), kind="stable")[: c["num_experts_per_tok"]]
                whole = score[chosen].sum() + 1e-6
                shares = {f"experts.{e}.": c["routed_scaling_factor"] * score[e] / whole for e in chosen}
            for network, share in shares.items():
                w1, w2, w3 = (w[f"{where}{network}w{n}.weight"] for n in (1, 2, 3))
                h[t] += share * (w2 @ (silu(w1 @ m) * (w3 @ m)))
    return np.array([table @ rms_norm(x, w["model.embedding_norm.weight"], eps) for x in h])


def delta_net(w: Weights, c: Config, where: str, a: Array) -> Array:
    """The gated delta rule of Qwen3-Next and Qwen3.5: (T, D) -> (T, D)."""
    n_k, n_v = c["linear_num_key_heads"], c["linear_num_value_heads"]
    d_k, d_v = c["linear_key_head_dim"], c["linear_value_head_dim"]
    times, keys, values = n_v // n_k, n_k * d_k, n_v * d_v
    if where + "in_proj_qkvz.weight" in w:  # a head of keys with its two or three of values after the other
        parts = (a @ w[where + "in_proj_qkvz.weight"].T).reshape(len(a), n_k, -1)
        q, k, v, z = np.split(parts, np.cumsum([d_k, d_k, times * d_v]), axis=2)
        mixed = np.concatenate([x.reshape(len(a), -1) for x in (q, k, v)], axis=1)
        b, alpha = np.split((a @ w[where + "in_proj_ba.weight"].T).reshape(len(a), n_k, -1), 2, axis=2)
    else:
        mixed, z, b, alpha = (a @ w[f"{where}in_proj_{name}.weight"].T for name in ("qkv", "z", "b", "a"))
    z, b, alpha = z.reshape(len(a), n_v, d_v), b.reshape(len(a), n_v), alpha.reshape(len(a), n_v)
    mixed = silu(convolved(mixed, w[where + "conv1d.weight"][:, 0]))
    q, k = (x.reshape(len(a), n_k, d_k) for x in (mixed[:, :keys], mixed[:, keys : 2 * keys]))
    v = mixed[:, 2 * keys :].reshape(len(a), n_v, d_v)
    out = np.zeros((len(a), values))
    for h in range(n_v):
        memory = np.zeros((d_k, d_v))
        for t in range(len(a)):
            query, key = (x[t, h // times] / math.sqrt((x[t, h // times] ** 2).sum() + 1e-6) for x in (q, k))
            rate = math.exp(w[where + "A_log"][h]) * math.log1p(math.exp(alpha[t, h] + w[where + "dt_bias"][h]))
            memory = memory * math.exp(-rate)
            memory = memory + np.outer(key, sigmoid(b[t, h]) * (v[t, h] - key @ memory))
            read = rms_norm(query @ memory / math.sqrt(d_k), w[where + "norm.weight"], c["rms_norm_eps"])
            out[t, h * d_v : (h + 1) * d_v] = read * silu(z[t, h])
    return out @ w[where + "out_proj.weight"].T


def gated_attention(w: Weights, c: Config, where: str, a: Array) -> Array:
    """Qwen3-Next's and Qwen3.5's attention, whose output is gated: (T, D) -> (T, D)."""
    n_heads, n_kv, eps = c["num_attention_heads"], c["num_key_value_heads"], c["rms_norm_eps"]
    both, k, v = (a @ w[f"{where}{name}_proj.weight"].T for name in "qkv")
    q, gates = np.split(both.reshape(len(a), n_heads, -1), 2, axis=2)
    q, k = (
        np.array([[rms_norm(x, 1 + w[f"{where}{name}_norm.weight"], eps) for x in row] for row in rows])
        for name, rows in (("q", q), ("k", heads(k, n_kv)))
    )
    rope = c.get("rope_parameters", c)
    mixed = attend(q, k, heads(v, n_kv), theta=rope["rope_theta"], part=rope["partial_rotary_factor"])
    return (mixed * sigmoid(gates.reshape(len(a), -1))) @ w[where + "o_proj.weight"].T


def qwen3_next(w: Weights, c: Config, tokens: Sequence[int]) -> Array:
    """Qwen3-Next and Qwen3.5 with experts: logits (T, V). Norms but the delta rule's are stored less one."""
    eps = c["rms_norm_eps"]
    h = w["model.embed_tokens.weight"][tokens]
    for i in range(c["num_hidden_layers"]):
        layer = f"model.layers.{i}."
        a = np.array([rms_norm(x, 1 + w[layer + "input_layernorm.weight"], eps) for x in h])
        if c["layer_types"][i] == "full_attention":
            h = h + gated_attention(w, c, layer + "self_attn.", a)
        else:
            h = h + delta_net(w, c, layer + "linear_attn.", a)
        for t in range(len(tokens)):
            m = rms_norm(h[t], 1 + w[layer + "post_attention_layernorm.weight"], eps)
            mlp = layer + "mlp."
            if i in c.get("mlp_only_layers", ()):
                h[t] += of_networks(w, mlp, {"": 1.0}, m)
                continue
            p = softmax(w[mlp + "gate.weight"] @ m)
            chosen = np.argsort(-p, kind="stable")[: c["num_experts_per_tok"]]
            shares = {f"experts.{e}.": p[e] / p[chosen].sum() for e in chosen}
            made = of_networks(w, mlp, {"shared_expert.": sigmoid((w[mlp + "shared_expert_gate.weight"] @ m)[0])}, m)
            if mlp + "experts.down_proj" in w:  # all experts in one tensor, gate above up
                for e in chosen:
                    gate, up = np.split(w[mlp + "experts.gate_up_proj"][e], 2)
                    hidden = silu(gate @ m) * (up @ m)
                    made += shares[f"experts.{e}."] * (w[mlp + "experts.down_proj"][e] @ hidden)
            else:
                made += of_networks(w, mlp, shares, m)
            h[t] += made
    return np.array([w["lm_head.weight"] @ rms_norm(x, 1 + w["model.norm.weight"], eps) for x in h])


def gpt_oss(w: Weights, c: Config, tokens: Sequence[int]) -> Array:
    """Logits (T, V). Columns 0, 2, ... of gate_up_proj are gate, the others up."""
    eps = c["rms_norm_eps"]
    h = w["model.embed_tokens.weight"][tokens]
    for i in range(c["num_hidden_layers"]):
        layer = f"model.layers.{i}."
        h = h + llama_attention(w, c, layer, h)
        experts = layer + "mlp.experts."
        for t in range(len(tokens)):
            m = rms_norm(h[t], w[layer + "post_attention_layernorm.weight"], eps)
            logits = w[layer + "mlp.router.weight"] @ m + w[layer + "mlp.router.bias"]
            chosen = np.argsort(-logits, kind="stable")[: c["num_experts_per_tok"]]
            for e, share in zip(chosen, softmax(logits[chosen]), strict=True):
                both = m @ w[experts + "gate_up_proj"][e] + w[experts + "gate_up_proj_bias"][e]
                gate, up = np.minimum(both[0::2], 7.0), np.clip(both[1::2], -7.0, 7.0)
                hidden = (up + 1) * gate / (1 + np.exp(-1.702 * gate))
                h[t] += share * (hidden @ w[experts + "down_proj"][e] + w[experts + "down_proj_bias"][e])
    return np.array([w["lm_head.weight"] @ rms_norm(x, w["model.norm.weight"], eps) for x in h])


def mixtral(w: Weights, c: Config, tokens: Sequence[int]) -> tuple[Array, Array]:
    """Logits (T, V) and router probabilities (L, T, E)."""
    eps = c["rms_norm_eps"]
    h = w["model.embed_tokens.weight"][tokens]
    probabilities = np.zeros((c["num_hidden_layers"], len(tokens), c["num_local_experts"]))
    for i in range(c["num_hidden_layers"]):
        layer = f"model.layers.{i}."
        h = h + llama_attention(w, c, layer, h)
        for t in range(len(tokens)):
            m = rms_norm(h[t], w[layer + "post_attention_layernorm.weight"], eps)
            logits = w[layer + "block_sparse_moe.gate.weight"] @ m
            probabilities[i, t] = softmax(logits)
            chosen = np.argsort(-logits, kind="stable")[: c["num_experts_per_tok"]]
            for e, weight in zip(chosen, softmax(logits[chosen]), strict=True):  # softmax of the chosen alone
                w1, w2, w3 = (w[f"{layer}block_sparse_moe.experts.{e}.w{n}.weight"] for n in (1, 2, 3))
                h[t] += weight * (w2 @ (silu(w1 @ m) * (w3 @ m)))
    head = [w["lm_head.weight"] @ rms_norm(x, w["model.norm.weight"], eps) for x in h]
    return np.array(head), probabilities


def mpt(w: Weights, c: Config, tokens: Sequence[int]) -> Array:
    """Logits (T, V)."""
    clip = c["attn_config"]["clip_qkv"]
    table = w["transformer.wte.weight"]
    h = table[tokens]
    for i in range(c["n_layers"]):
        block = f"transformer.blocks.{i}."
        a = np.array([layer_norm(x, w[block + "norm_1.weight"]) for x in h])
        qkv = a @ w[block + "attn.Wqkv.weight"].T
        if clip is not None:
            qkv = np.clip(qkv, -clip, clip)
        q, k, v = (heads(x, c["n_heads"]) for x in np.split(qkv, 3, axis=1))
        h = h + attend(q, k, v, slopes=alibi_slopes(c["n_heads"])) @ w[block + "attn.out_proj.weight"].T
        for t in range(len(tokens)):
            m = layer_norm(h[t], w[block + "norm_2.weight"])
            h[t] += w[block + "ffn.down_proj.weight"] @ gelu(w[block + "ffn.up_proj.weight"] @ m)
    return np.array([table @ layer_norm(x, w["transformer.norm_f.weight"]) for x in h])


def grok1(w: Weights, sizes: Mapping[str, int], tokens: Sequence[int]) -> Array:
    """Logits (T, V) under the names of the hpcai port. ``sizes``: d_model, n_layers, n_heads, n_kv_heads, top_k."""
    n_heads, n_kv = sizes["n_heads"], sizes["n_kv_heads"]
    table = w["model.embed_tokens.weight"]
    h = table[tokens] * math.sqrt(sizes["d_model"])
    for i in range(sizes["n_layers"]):
        layer = f"model.layers.{i}."
        a = np.array([rms_norm(x, w[layer + "pre_attn_norm.scale"]) for x in h])
        q, k, v = (a @ w[f"{layer}attn.{name}_proj.weight"].T for name in "qkv")
        mixed = attend(heads(q, n_heads), heads(k, n_kv), heads(v, n_kv), theta=10_000.0, cap=30.0)
        mixed = mixed @ w[layer + "attn.o_proj.weight"].T
        for t in range(len(tokens)):
            h[t] += rms_norm(mixed[t], w[layer + "post_attn_norm.scale"])
            m = rms_norm(h[t], w[layer + "pre_moe_norm.scale"])
            p = softmax(w[layer + "moe_block.gate.weight"] @ m)
            out = np.zeros_like(m)
            for e in np.argsort(-p, kind="stable")[: sizes["top_k"]]:
                linear, linear_v, linear_1 = (
                    w[f"{layer}moe_block.experts.{e}.{name}.weight"] for name in ("linear", "linear_v", "linear_1")
                )
                out += p[e] * (linear_1 @ (gelu_tanh(linear @ m) * (linear_v @ m)))  # p as it is, not renormalised
            h[t] += rms_norm(out, w[layer + "post_moe_norm.scale"])
    return np.array([table @ rms_norm(x, w["model.norm.scale"]) / math.sqrt(3) for x in h])


def nemotron_h(w: Weights, c: Config, tokens: Sequence[int]) -> Array:
    """Nemotron-H: a layer is one of four branches: logits (T, V)."""
    eps, h = c["layer_norm_epsilon"], w["backbone.embeddings.weight"][tokens]
    mamba = {
        "mamba_n_heads": c["mamba_num_heads"],
        "mamba_d_head": c["mamba_head_dim"],
        "mamba_n_groups": c["n_groups"],
        "mamba_d_state": c["ssm_state_size"],
        "mamba_d_conv": c["conv_kernel"],
        "mamba_conv_bias": c["use_conv_bias"],
        "rms_norm_eps": eps,
    }

    def network(where: str, x: Array) -> Array:
        return w[where + "down_proj.weight"] @ np.maximum(w[where + "up_proj.weight"] @ x, 0) ** 2

    for i, kind in enumerate(c["hybrid_override_pattern"]):
        layer, mixer = f"backbone.layers.{i}.", f"backbone.layers.{i}.mixer."
        a = np.array([rms_norm(x, w[layer + "norm.weight"], eps) for x in h])
        if kind == "M":
            h = h + mamba2(w, mamba, mixer, a)
        elif kind == "*":
            q, k, v = (a @ w[f"{mixer}{name}_proj.weight"].T for name in "qkv")
            n_heads, n_kv = c["num_attention_heads"], c["num_key_value_heads"]
            h = h + attend(heads(q, n_heads), heads(k, n_kv), heads(v, n_kv)) @ w[mixer + "o_proj.weight"].T
        elif kind == "-":
            h = h + np.array([network(mixer, x) for x in a])
        else:
            for t, x in enumerate(a):
                scores = sigmoid(w[mixer + "gate.weight"] @ x)
                by = scores + w[mixer + "gate.e_score_correction_bias"]
                chosen = np.argsort(-by, kind="stable")[: c["num_experts_per_tok"]]
                for e in chosen:
                    share = c["routed_scaling_factor"] * scores[e] / scores[chosen].sum()
                    h[t] += share * network(f"{mixer}experts.{e}.", x)
                h[t] += network(mixer + "shared_experts.", x)
    return np.array([w["lm_head.weight"] @ rms_norm(x, w["backbone.norm_f.weight"], eps) for x in h])


ORACLES: dict[str, Callable[[Weights, Config, Sequence[int]], Array]] = {
    "dbrx": lambda w, c, tokens: dbrx(w, c, tokens)[0],
    "mixtral": lambda w, c, tokens: mixtral(w, c, tokens)[0],
    "llama": llama,
    "mistral": llama,
    "qwen2": llama,
    "smollm3": llama,
    "qwen3": llama,
    "qwen3_moe": fine_grained,
    "olmoe": fine_grained,
    "mellum": fine_grained,
    "granite": granite,
    "granitemoe": granite,
    "granitemoeshared": granite,
    "granitemoe_swa": granite,
    "granite_swa": granite,
    "solar_open": solar,
    "qwen3_vl": qwen3_vl,
    "qwen3_vl_moe": qwen3_vl,
    "gpt_oss": gpt_oss,
    "glm4_moe": sigmoid_mixture,
    "dots1": sigmoid_mixture,
    "ernie4_5_moe": ernie,
    "hunyuan_v1_moe": hunyuan,
    "minimax_m2": minimax,
    "olmo2": olmo2,
    "olmo3": olmo2,
    "flex_olmo": olmo2,
    "phimoe": phimoe,
    "qwen3_next": qwen3_next,
    "qwen3_5_moe_text": qwen3_next,
    "granitemoehybrid": granite_hybrid,
    "gemma2": gemma,
    "gemma3_text": gemma,
    "gemma4_text": gemma4,
    "nemotron_h": nemotron_h,
    "lfm2": lfm2,
    "lfm2_moe": lfm2,
    "qwen2_moe": fine_grained,
    "deepseek_v2": deepseek,
    "deepseek_v3": deepseek,
    "glm4_moe_lite": deepseek,
    "mpt": mpt,
}
"""Logits by ``model_type``."""
