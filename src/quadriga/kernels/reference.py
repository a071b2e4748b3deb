"""The ops in plain torch: the truth every other backend is held to, on any device and float dtype.

Written for exactness first and for a plain torch's best speed second: fused torch kernels where they compute the same
function, one grouped matrix product instead of a loop over experts, and no loop over tokens but the delta rule's.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from quadriga.kernels.arrays import tensor
from quadriga.kernels.ops import AdaptedPart, Choice, Routing

_QUERY_BLOCK = 512
"""Query rows scored at a time where torch has no fused kernel: bounds the (H, T, S) score matrix."""


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def norm(x: Tensor, weight: Tensor, kind: str, eps: float, bias: Tensor | None = None) -> Tensor:
    shape = (x.shape[-1],)
    if kind == "layer":
        return F.layer_norm(x, shape, weight, bias, eps)
    normed = F.rms_norm(x, shape, weight, eps)
    return normed if bias is None else normed + bias


def causal_conv(x: Tensor, taps: Tensor, before: Tensor) -> Tensor:
    seen = torch.cat((before.to(x.dtype), x)).T[None]  # (1, C, L - 1 + T)
    return F.conv1d(seen, taps.to(x.dtype)[:, None], groups=x.shape[1])[0].T


def delta_rule(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, beta: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    q, k, v = (t.to(state.dtype) for t in (q, k, v))
    q, k = (t * (t.square().sum(-1, keepdim=True) + 1e-6).rsqrt() for t in (q, k))
    q, decay = q * q.shape[-1] ** -0.5, log_decay.exp()
    out = []
    for t in range(len(q)):
        state = state * decay[t, :, None, None]
        change = (v[t] - torch.einsum("hk,hkv->hv", k[t], state)) * beta[t, :, None]
        state = state + k[t, :, :, None] * change[:, None]
        out.append(torch.einsum("hk,hkv->hv", q[t], state))
    return torch.stack(out), state


STATE_CHUNK = 64
"""Tokens whose share in each other's results is one matrix product; states are carried between chunks."""


def state_space(
    x: Tensor, b: Tensor, c: Tensor, step: Tensor, log_decay: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    times = state.shape[0] // b.shape[1]
    out = []
    for start in range(0, len(x), STATE_CHUNK):
        rows = slice(start, start + STATE_CHUNK)
        written = (x[rows].to(state.dtype) * step[rows, :, None]).transpose(0, 1)  # (H, Q, P)
        key, query = (t[rows].to(state.dtype).repeat_interleave(times, dim=1).transpose(0, 1) for t in (b, c))
        decays = log_decay[rows].T  # (H, Q)
        since = _sums_between(decays)  # (H, Q, Q)
        begun, left = decays.cumsum(-1).exp(), since[:, -1].exp()
        shares = (query @ key.mT) * since.exp()
        out.append(shares @ written + begun[..., None] * (query @ state))
        state = begun[:, -1, None, None] * state + (key * left[..., None]).mT @ written
    return torch.cat(out, dim=1).transpose(0, 1), state


def _sums_between(values: Tensor) -> Tensor:
    """(..., Q) -> (..., Q, Q): at [t, s] the sum of the values behind s up to t, -infinity where s is behind t.

    Summed as they are: the difference of two long sums has lost the digits of a short one.
    """
    n = values.shape[-1]
    seen = torch.ones(n, n, dtype=torch.bool, device=values.device).tril()
    behind = values[..., :, None].expand(*values.shape, n).masked_fill(~seen.tril(-1), 0.0)
    return behind.cumsum(-2).masked_fill(~seen, float("-inf"))


def rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    x1, x2 = x.chunk(2, dim=-1)
    return torch.cat((x1 * cos - x2 * sin, x2 * cos + x1 * sin), dim=-1)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float,
    q_positions: Tensor | None = None,
    soft_cap: float | None = None,
    alibi_slopes: Tensor | None = None,
    window: int | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    batch, n_heads, n_queries, head_dim = q.shape
    if window is not None and q_positions is None:  # nobody sees the keys before the first query's window
        k, v = (t[:, :, max(0, t.shape[2] - n_queries - window + 1) :] for t in (k, v))
    n_kv_heads, n_keys = k.shape[1], k.shape[2]
    if window is not None and q_positions is None and n_keys <= window:
        window = None
    plain = soft_cap is None and alibi_slopes is None and sinks is None
    if plain and q_positions is None and n_queries == 1:
        # One query sees every key: the heads of a group become query rows, so each key is read once for all of them.
        grouped = q.reshape(batch, n_kv_heads, n_heads // n_kv_heads, head_dim)
        mixed = F.scaled_dot_product_attention(grouped, k, v, scale=scale)
        return mixed.reshape(*q.shape[:-1], v.shape[-1])
    if plain and q_positions is None and n_queries == n_keys and window is None:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=True)
    if q_positions is None:
        q_positions = torch.arange(n_keys - n_queries, n_keys, device=q.device).expand(batch, -1)
    key_positions = torch.arange(n_keys, device=q.device)
    # Padding rows (position < 0) see key 0, which keeps them finite.
    seen_from = q_positions.clamp(min=0)[:, :, None]
    visible = key_positions <= seen_from  # (B, T, S)
    if window is not None:
        visible = visible & (key_positions > seen_from - window)
    if plain:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=visible[:, None], scale=scale, enable_gqa=True)
    grouped = q.reshape(batch, n_kv_heads, n_heads // n_kv_heads, n_queries, head_dim)
    blocks = []
    for start in range(0, n_queries, _QUERY_BLOCK):
        rows = slice(start, start + _QUERY_BLOCK)
        scores = _wide(torch.einsum("bkgtd,bksd->bkgts", grouped[:, :, :, rows], k)) * scale
        if soft_cap is not None:
            scores = soft_cap * torch.tanh(scores / soft_cap)
        if alibi_slopes is not None:
            distance = key_positions - q_positions[:, rows, None]  # (B, T, S), 0 on the diagonal, negative before
            slopes = alibi_slopes.to(scores.dtype).reshape(n_kv_heads, -1, 1, 1)
            scores = scores + slopes * distance[:, None, None]
        scores = scores.masked_fill(~visible[:, None, None, rows], float("-inf"))
        if sinks is not None:  # one more key, which has no value
            sink = sinks.to(scores.dtype).reshape(n_kv_heads, -1, 1, 1).expand(*scores.shape[:-1], 1)
            scores = torch.cat((scores, sink), dim=-1)
        weights = scores.softmax(dim=-1)[..., :n_keys].to(v.dtype)
        blocks.append(torch.einsum("bkgts,bksd->bkgtd", weights, v))
    return torch.cat(blocks, dim=3).reshape(*q.shape[:-1], v.shape[-1])


def route(
    x: Tensor, weight: Tensor, how: Choice, bias: Tensor | None = None, correction: Tensor | None = None
) -> Routing:
    logits = F.linear(_wide(x), _wide(weight))
    if bias is not None:
        logits = logits + bias
    if how.score == "sparse_mixer":
        assert correction is None, "a sparse mixer chooses by its logits alone"
        ids = logits.sort(dim=-1, descending=True, stable=True).indices[:, : how.top_k]
        return Routing(ids, mix_sparsely(logits, ids, how, logits), logits.softmax(-1), logits)
    scores = score(logits, how)
    # A stable sort, not topk: equal scores must take the lower expert id on every device and batch size.
    ids = standing(scores, how, correction).sort(dim=-1, descending=True, stable=True).indices[:, : how.top_k]
    chosen = scores.gather(1, ids)
    probs = scores if how.score == "softmax" else scores / scores.sum(-1, keepdim=True)
    return Routing(ids, weigh(chosen, how), probs, logits)


def mix_sparsely(logits: Tensor, ids: Tensor, how: Choice, judged: Tensor) -> Tensor:
    """Weights (N, k) of the experts chosen by a sparse mixer; see ``MoESpec``.

    Args:
        judged: (N, E) the logits by which it is judged what is near; no gradient comes from them.
    """
    weights, left = [], logits
    for chosen in ids.T[:, :, None]:  # (N, 1)
        with torch.no_grad():
            best = judged.gather(1, chosen)
            far = (best - judged) > how.near * torch.maximum(judged.abs(), best)
        weights.append(left.masked_fill(far, float("-inf")).softmax(-1).gather(1, chosen))
        left = left.scatter(1, chosen, float("-inf"))
    return torch.cat(weights, dim=-1)


def score(logits: Tensor, how: Choice) -> Tensor:
    """Scores (N, E) of all experts."""
    return logits.softmax(dim=-1) if how.score == "softmax" else logits.sigmoid()


def standing(scores: Tensor, how: Choice, correction: Tensor | None) -> Tensor:
    """(N, E) what experts are chosen by: corrected scores, -infinity in closed groups."""
    by = scores if correction is None else scores + correction
    if how.n_groups == 1:
        return by
    groups = by.view(*by.shape[:-1], how.n_groups, -1)
    worth = groups.topk(2 if how.group_worth == "two_best" else 1, dim=-1).values.sum(-1)
    best = worth.sort(dim=-1, descending=True, stable=True).indices[:, : how.top_k_groups]
    is_open = torch.zeros_like(worth, dtype=torch.bool).scatter_(-1, best, True)
    return groups.masked_fill(~is_open[..., None], float("-inf")).flatten(-2)


def weigh(chosen: Tensor, how: Choice) -> Tensor:
    """Weights (N, k) from the scores of the chosen."""
    if how.normalize_p is not None:
        norm = torch.linalg.vector_norm(chosen, ord=how.normalize_p, dim=-1, keepdim=True)
        if how.normalize_eps or how.normalize_min:
            norm = (norm + how.normalize_eps).clamp(min=how.normalize_min)
        chosen = chosen / norm
    return chosen if how.scale == 1 else chosen * how.scale


def experts(
    x: Tensor,
    routing_ids: Tensor,
    combine: Tensor,
    w_gate: Tensor | None,
    w_up: Tensor,
    w_down: Tensor,
    activation: str,
) -> Tensor:
    n_tokens, top_k = routing_ids.shape
    flat = routing_ids.reshape(-1)
    order = flat.argsort(stable=True)  # (N k,) slots, all of expert 0 first
    counts = tally(flat, w_up.shape[0])
    # Odd shapes and other dtypes (float64 checks) take one host sync per layer, never one per expert.
    sizes = None if _fits_grouped_mm(w_up, w_down) else counts.tolist()
    gathered = x[order // top_k]
    up = _grouped_linear(gathered, w_up, counts, sizes)
    gate = None if w_gate is None else _grouped_linear(gathered, w_gate, counts, sizes)
    hidden = activate(up, activation) if gate is None else gated(gate, up, activation)
    y = _grouped_linear(hidden, w_down, counts, sizes)
    outputs = torch.empty_like(gathered).index_copy(0, order, y)  # back to (token, slot) order
    combine = combine.to(x.dtype)[:, None, :]  # (N, 1, k)
    return torch.bmm(combine, outputs.view(n_tokens, top_k, -1)).squeeze(1)


def tally(ids: Tensor, n: int) -> Tensor:
    """(n,) int64: how often each number occurs; bincount, but without a wait of the host for a GPU."""
    return ids.new_zeros(n).scatter_add_(0, ids, torch.ones_like(ids))


def adapted_experts(
    x: Tensor, routing_ids: Tensor, combine: Tensor, parts: Mapping[str, AdaptedPart], activation: str
) -> Tensor:
    weights = {name: _materialised(part, x.dtype) for name, part in parts.items()}
    gate = weights.get("w_gate")
    return experts(x, routing_ids, combine, gate, weights["w_up"], weights["w_down"], activation)


def _materialised(part: AdaptedPart, dtype: torch.dtype) -> Tensor:
    """W + s B A of every expert (E, out, in)."""
    frozen = part.frozen
    weight = frozen if isinstance(frozen, Tensor) else torch.stack([tensor(one.unpack()) for one in frozen])
    weight = weight.to(dtype)
    return weight if part.a is None or part.b is None else weight + part.scale * (part.b @ part.a)


def activate(x: Tensor, activation: str) -> Tensor:
    match activation:
        case "silu":
            return F.silu(x)
        case "gelu":
            return F.gelu(x)
        case "gelu_tanh":
            return F.gelu(x, approximate="tanh")
        case "relu":
            return F.relu(x)
        case "relu2":
            return F.relu(x).square()
        case _:
            raise AssertionError(f"ModelConfig lets no activation {activation!r} through")


CLAMP, CLAMPED_SLOPE = 7.0, 1.702
"""Of clamped_glu."""


def gated(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    if activation != "clamped_glu":
        return activate(gate, activation) * up
    g, u = gate.clamp(max=CLAMP), up.clamp(-CLAMP, CLAMP)
    return (u + 1) * (g * torch.sigmoid(CLAMPED_SLOPE * g))


def grouped_linear(rows: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
    return _grouped_linear(rows, weight, counts, None if _fits_grouped_mm(weight, weight.mT) else counts.tolist())


def _fits_grouped_mm(*weights: Tensor) -> bool:
    """torch 2.13's grouped product wants bf16 or fp32 rows whose stride is a multiple of 16 bytes (CPU and CUDA)."""
    return all(w.dtype in (torch.bfloat16, torch.float32) and w.shape[-1] * w.element_size() % 16 == 0 for w in weights)


def _grouped_linear(rows: Tensor, w: Tensor, counts: Tensor, sizes: list[int] | None) -> Tensor:
    """Rows of group e times w[e]^T, for rows sorted by group: (R, in), (E, out, in) -> (R, out).

    ``sizes`` is ``counts`` on the host, or None where torch's grouped product can run from the device's own counts.
    """
    if sizes is None:
        return F.grouped_mm(rows, w.transpose(-2, -1), offs=counts.cumsum(0).to(torch.int32))
    # unbind, not w[e]: indexing would write a full-size zero gradient for every expert in the backward pass.
    parts = zip(torch.split(rows, sizes), w.unbind(0), strict=True)
    return torch.cat([F.linear(part, weight) for part, weight in parts if part.shape[0]])
