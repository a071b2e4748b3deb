"""The mixers of a model on the kernels: what ``nn.attention``, ``latent_attention``, ``short_conv``, ``delta_net`` say.

Each takes its layer's weights by their names, keeps its part of the cache, and maps normed states (N, D) to what is
added to the residual stream.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Protocol

import torch
from torch import Tensor

from quadriga.kernels.triton.attention import Attend, attend_prompts
from quadriga.kernels.triton.attention_tokens import Meeting, attend_tokens, prepares_itself
from quadriga.kernels.triton.heads import Heads, prepare, rotation_table
from quadriga.kernels.triton.latent import prepare_latent
from quadriga.kernels.triton.linear import head_linear, linear
from quadriga.kernels.triton.norm import norm
from quadriga.kernels.triton.recurrent import DeltaRule, causal_conv, delta_rule, gated_norm
from quadriga.model.config import (
    AlibiSpec,
    AttentionSpec,
    DeltaNetSpec,
    LatentAttentionSpec,
    NormSpec,
    RopeSpec,
    ShortConvSpec,
)
from quadriga.model.positions import alibi_slopes, rotation
from quadriga.runners.cuda.inputs import DevicePass
from quadriga.runners.cuda.weights import DeviceWeights


class Mixer(Protocol):
    """How tokens hear of each other, in one layer."""

    def __call__(self, x: Tensor, told: DevicePass) -> Tensor:
        """x (N, D), normed -> (N, D)."""
        ...


class Rotations:
    """cos and sin of all positions of a model, one table for each kind of rotation that its layers have."""

    def __init__(self, max_seq_len: int, device: torch.device) -> None:
        self._max_seq_len, self._device = max_seq_len, device
        self._made: dict[tuple[RopeSpec, int], Tensor] = {}

    def __call__(self, spec: RopeSpec, head_dim: int) -> Tensor:
        """(positions, 2, pairs) float32; see ``heads.rotation_table``."""
        if (spec, head_dim) not in self._made:
            turning = rotation(spec, head_dim, self._max_seq_len)
            frequencies = torch.from_numpy(turning.frequencies).to(self._device)
            self._made[spec, head_dim] = rotation_table(frequencies, turning.scale, self._max_seq_len)
        return self._made[spec, head_dim]


def attend_of(spec: AttentionSpec, weights: DeviceWeights, max_seq_len: int) -> Attend:
    """How a layer's queries meet its keys."""
    slopes = None
    if isinstance(spec.position, AlibiSpec):
        slopes = torch.from_numpy(alibi_slopes(spec.position, spec.n_heads)).to(weights.device)
    return Attend(
        n_heads=spec.n_heads,
        n_kv_heads=spec.n_kv_heads,
        key_dim=spec.head_dim,
        value_dim=spec.kv_rank if isinstance(spec, LatentAttentionSpec) else spec.head_dim,
        scale=spec.score_scale,
        max_seq_len=max_seq_len,
        soft_cap=spec.soft_cap,
        slopes=slopes,
        window=spec.window,
        sinks=weights.numbers("attn.sinks") if spec.sinks else None,
    )


class PagedAttention:
    """Grouped-query attention of one layer over its part of the blocks.

    Args:
        keys, values: (blocks * 16, K, d), this layer's.
        group: whose block tables find them.
    """

    def __init__(
        self,
        spec: AttentionSpec,
        weights: DeviceWeights,
        max_seq_len: int,
        keys: Tensor,
        values: Tensor,
        group: int,
        meeting: Meeting,
        rotations: Rotations,
    ) -> None:
        self._keys, self._values, self._group, self._meeting = keys, values, group, meeting
        self._attend = attend_of(spec, weights, max_seq_len)
        self._wqkv, self._wo = weights.matrix("attn.wqkv.weight"), weights.matrix("attn.wo.weight")
        self._wo_bias = weights.numbers_or_none("attn.wo.bias")
        heads = Heads(
            n_heads=spec.n_heads,
            n_kv_heads=spec.n_kv_heads,
            head_dim=spec.head_dim,
            bias=weights.numbers_or_none("attn.wqkv.bias"),
            clip=spec.clip_qkv,
            gated=spec.output_gate,
        )
        if isinstance(spec.position, RopeSpec):
            heads = replace(heads, rotation=rotations(spec.position, spec.head_dim))
        if spec.qk_norm is not None:
            rms = NormSpec(kind="rms", eps=spec.qk_norm.eps, plus_one=spec.qk_norm.plus_one)
            heads = replace(
                heads,
                q_norm=weights.norm("attn.q_norm", rms).weight,
                k_norm=weights.norm("attn.k_norm", rms).weight,
                norm_eps=spec.qk_norm.eps,
                norm_late=spec.qk_norm.after_rotation,
            )
        self._heads = heads

    def __call__(self, x: Tensor, told: DevicePass) -> Tensor:
        """See :class:`Mixer`."""
        qkv = linear(x, self._wqkv)
        return linear(self._attended(qkv, told).flatten(1), self._wo, self._wo_bias)

    def _attended(self, qkv: Tensor, told: DevicePass) -> Tensor:
        tables, slots = told.tables[self._group], told.slots[self._group]
        cache = (self._keys, self._values, self._attend, tables, told.positions)
        if told.tiles is None and prepares_itself(self._attend):
            return attend_tokens(qkv, *cache, slots, self._meeting, self._heads)
        q = prepare(qkv, self._heads, told.positions, slots, self._keys, self._values)
        gates = self._heads.gates(qkv)
        if told.tiles is None:
            return attend_tokens(q.flatten(1), *cache, slots, self._meeting, gates=gates)
        return attend_prompts(q, *cache, told.tiles[self._attend.tile_tokens], gates)


class PagedLatentAttention:
    """Latent attention of one layer, absorbed, over its part of the blocks; see ``nn.latent_attention``.

    Args:
        keys: (blocks * 16, 1, R + rope_dim), this layer's.
    """

    def __init__(
        self,
        spec: LatentAttentionSpec,
        weights: DeviceWeights,
        max_seq_len: int,
        keys: Tensor,
        group: int,
        meeting: Meeting,
        rotations: Rotations,
    ) -> None:
        self._spec, self._keys, self._group, self._meeting = spec, keys, group, meeting
        self._attend = attend_of(spec, weights, max_seq_len)
        rms = NormSpec(kind="rms", eps=spec.norm_eps)
        self._kv_norm = weights.norm("attn.kv_a_norm", rms)
        if spec.q_rank is None:
            self._through, self._wq = None, weights.matrix("attn.wq.weight")
        else:
            self._through = weights.matrix("attn.wq_a.weight"), weights.norm("attn.q_a_norm", rms)
            self._wq = weights.matrix("attn.wq_b.weight")
        self._wkv_a, self._wo = weights.matrix("attn.wkv_a.weight"), weights.matrix("attn.wo.weight")
        self._wk_b = weights.numbers("attn.wk_b.weight").view(spec.n_heads, spec.kv_rank, spec.nope_dim)
        self._wv_b = weights.numbers("attn.wv_b.weight").view(spec.n_heads, spec.v_dim, spec.kv_rank)
        assert isinstance(spec.position, RopeSpec), "the spec requires it"
        self._rotation = rotations(spec.position, spec.rope_dim)

    def __call__(self, x: Tensor, told: DevicePass) -> Tensor:
        """See :class:`Mixer`."""
        spec, n = self._spec, len(x)
        narrow = x
        if self._through is not None:
            wq_a, q_norm = self._through
            narrow = norm(linear(x, wq_a), q_norm)
        q = linear(narrow, self._wq).view(n, spec.n_heads, spec.qk_dim)
        queries = x.new_empty(n, spec.n_heads, spec.head_dim)
        head_linear(q[..., : spec.nope_dim], self._wk_b, queries[..., : spec.kv_rank])
        latent = linear(x, self._wkv_a)
        slots, tables = told.slots[self._group], told.tables[self._group]
        prepare_latent(q, latent, queries, self._rotation, self._kv_norm, told.positions, slots, self._keys)
        cache = (self._keys, None, self._attend, tables, told.positions)
        if told.tiles is None:
            mixed = attend_tokens(queries.flatten(1), *cache, slots, self._meeting)
        else:
            mixed = attend_prompts(queries, *cache, told.tiles[self._attend.tile_tokens])
        values = x.new_empty(n, spec.n_heads, spec.v_dim)
        head_linear(mixed, self._wv_b, values)
        return linear(values.flatten(1), self._wo)


class SlottedConv:
    """A short convolution whose states lie in slots; see ``nn.short_conv``.

    Args:
        state: (slots, L - 1, W) float32, this layer's.
    """

    def __init__(self, spec: ShortConvSpec, weights: DeviceWeights, state: Tensor) -> None:
        self._spec, self._state = spec, state
        self._w_in, self._w_out = weights.matrix("conv.w_in.weight"), weights.matrix("conv.w_out.weight")
        self._taps = weights.numbers("conv.taps")

    def __call__(self, x: Tensor, told: DevicePass) -> Tensor:
        """See :class:`Mixer`."""
        assert told.sequences is not None, "a recurrent model's pass says where states are"
        b, c, values = torch.split(linear(x, self._w_in), self._spec.width, dim=-1)
        return linear(causal_conv(values, self._taps, self._state, told.sequences, gates=b, outer=c), self._w_out)


class SlottedDeltaNet:
    """A gated DeltaNet whose states lie in slots; see ``nn.delta_net``.

    Args:
        before: (slots, L - 1, channels) float32, what the convolution keeps. matrix: (slots, H, d_k, d_v) float32.
    """

    def __init__(self, spec: DeltaNetSpec, weights: DeviceWeights, before: Tensor, matrix: Tensor) -> None:
        self._spec, self._before, self._matrix = spec, before, matrix
        self._w_in, self._w_out = weights.matrix("delta.w_in.weight"), weights.matrix("delta.w_out.weight")
        self._w_ba, self._taps = weights.numbers("delta.w_ba.weight"), weights.numbers("delta.taps")
        self._norm = weights.norm("delta.norm", NormSpec(kind="rms", eps=spec.eps))
        self._rule = DeltaRule(
            n_k_heads=spec.n_k_heads,
            n_v_heads=spec.n_v_heads,
            k_dim=spec.k_dim,
            v_dim=spec.v_dim,
            rate=weights.numbers("delta.rate"),
            dt=weights.numbers("delta.dt"),
            log_rate=spec.log_rate,
            tiled=spec.tiled,
        )

    def __call__(self, x: Tensor, told: DevicePass) -> Tensor:
        """See :class:`Mixer`."""
        spec = self._spec
        assert told.sequences is not None, "a recurrent model's pass says where states are"
        convolved, z = torch.split(linear(x, self._w_in), [spec.width, spec.value_dim], dim=-1)
        qkv = causal_conv(convolved, self._taps, self._before, told.sequences, silu=True)
        ba = linear(x, self._w_ba)
        # By chunks prompts would take fewer steps, but that kernel spills registers: docs/gpu.md.
        out = delta_rule(qkv, ba, self._rule, self._matrix, told.sequences, chunked=False)
        return linear(gated_norm(out, z, self._norm.weight, self._norm.eps), self._w_out)
