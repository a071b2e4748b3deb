"""What the CPU kernels' program is told of each layer: its weights, its sizes, and where its keys or states lie."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from quadriga.kernels.cpu.expert_store import ExpertStore
from quadriga.kernels.cpu.layer_args import (
    ApartArgs,
    AttentionArgs,
    ChoiceArgs,
    DeltaNetArgs,
    FFNArgs,
    Floats,
    LatentArgs,
    Mamba2Args,
    NormArgs,
    SharedArgs,
    ShortConvArgs,
)
from quadriga.kernels.cpu.packing import Packed, Parameter, pack
from quadriga.model.cache_layout import CacheLayout
from quadriga.model.config import (
    AlibiSpec,
    AttentionSpec,
    DeltaNetSpec,
    DenseSpec,
    LatentAttentionSpec,
    LayerSpec,
    Mamba2Spec,
    ModelConfig,
    MoESpec,
    NormSpec,
    RopeSpec,
)
from quadriga.model.positions import alibi_slopes, rotation
from quadriga.model.rank_share import RankShare


def _queries_of(spec: AttentionSpec) -> str:
    """The projection that makes queries, with keys and values where they have no projection of their own."""
    if not isinstance(spec, LatentAttentionSpec):
        return "attn.wqkv.weight"
    return "attn.wq.weight" if spec.q_rank is None else "attn.wq_b.weight"


def _unit_norm(dim: int, eps: float) -> NormArgs:
    """An RMSNorm without a weight."""
    return NormArgs(np.ones(dim, dtype=np.float32), "rms", eps)


@dataclass(frozen=True, kw_only=True)
class Layers:
    """The layers of a model as :class:`~quadriga.kernels.cpu.program.Program` takes them."""

    config: ModelConfig
    parameters: Mapping[str, Parameter]
    cache: CacheLayout
    kv: Sequence[NDArray[np.uint8]]
    """Of each place in a block its bytes in all blocks, (n_blocks, bytes); rows need not lie next to each other."""
    kv_format: str
    states: Mapping[int, Floats]
    """Of each recurrent layer, (slots, numbers of a state)."""
    store: ExpertStore | None
    share: RankShare | None

    def short_conv(self, layer: int) -> ShortConvArgs:
        shape, p = self.config.layers[layer], f"layers.{layer}."
        return ShortConvArgs(
            norm=self.norm(p + "attn_norm.weight", shape.norm),
            post_norm=self._post_norm(p + "attn", shape),
            w_in=self.packed(p + "conv.w_in.weight"),
            w_out=self.packed(p + "conv.w_out.weight"),
            taps=self.packed(p + "conv.taps").unpack(),
            residual_scale=shape.residual_scale,
            state=self.states[layer],
        )

    def delta_net(self, layer: int, spec: DeltaNetSpec) -> DeltaNetArgs:
        shape, p = self.config.layers[layer], f"layers.{layer}."
        rate = self.vector(p + "delta.rate")
        return DeltaNetArgs(
            norm=self.norm(p + "attn_norm.weight", shape.norm),
            post_norm=self._post_norm(p + "attn", shape),
            w_in=self.packed(p + "delta.w_in.weight"),
            w_ba=self.packed(p + "delta.w_ba.weight"),
            w_out=self.packed(p + "delta.w_out.weight"),
            taps=self.packed(p + "delta.taps").unpack(),
            rate=np.exp(rate) if spec.log_rate else -rate,
            dt=self.vector(p + "delta.dt"),
            head_norm=self.norm(p + "delta.norm.weight", NormSpec(kind="rms", eps=spec.eps)),
            n_k_heads=spec.n_k_heads,
            n_v_heads=spec.n_v_heads,
            k_dim=spec.k_dim,
            v_dim=spec.v_dim,
            tiled=spec.tiled,
            residual_scale=shape.residual_scale,
            state=self.states[layer],
        )

    def mamba2(self, layer: int, spec: Mamba2Spec) -> Mamba2Args:
        shape, p = self.config.layers[layer], f"layers.{layer}."
        rate = self.vector(p + "mamba.rate")
        return Mamba2Args(
            norm=self.norm(p + "attn_norm.weight", shape.norm),
            post_norm=self._post_norm(p + "attn", shape),
            w_in=self.packed(p + "mamba.w_in.weight"),
            w_dt=self.packed(p + "mamba.w_dt.weight"),
            w_out=self.packed(p + "mamba.w_out.weight"),
            taps=self.packed(p + "mamba.taps").unpack(),
            conv_bias=self.vector(p + "mamba.conv_bias") if spec.conv_bias else None,
            rate=np.exp(rate) if spec.log_rate else -rate,
            dt=self.vector(p + "mamba.dt"),
            skip=self.vector(p + "mamba.skip"),
            group_norm=self.norm(p + "mamba.norm.weight", NormSpec(kind="rms", eps=spec.eps)),
            n_heads=spec.n_heads,
            n_groups=spec.n_groups,
            state_dim=spec.state_dim,
            head_dim=spec.head_dim,
            residual_scale=shape.residual_scale,
            state=self.states[layer],
        )

    def attention(self, layer: int, spec: AttentionSpec) -> AttentionArgs:
        shape, p = self.config.layers[layer], f"layers.{layer}."
        turning = slopes = q_norm = k_norm = None
        if isinstance(spec.position, RopeSpec):
            turning = rotation(spec.position, spec.turning_dim, self.config.max_seq_len)
        elif isinstance(spec.position, AlibiSpec):
            share = self.share
            slopes = alibi_slopes(spec.position, spec.n_heads) if share is None else share.slopes(layer)
        if spec.qk_norm is not None:
            rms = NormSpec(kind="rms", eps=spec.qk_norm.eps, plus_one=spec.qk_norm.plus_one)
            q_norm, k_norm = (self.norm(f"{p}attn.{part}_norm.weight", rms) for part in "qk")
        return AttentionArgs(
            norm=self.norm(p + "attn_norm.weight", shape.norm) if shape.pre_norms else None,
            post_norm=self._post_norm(p + "attn", shape),
            wqkv=self._pieces(p + _queries_of(spec)),
            latent=self._latent(p + "attn.", spec) if isinstance(spec, LatentAttentionSpec) else None,
            wo=self.packed(p + "attn.wo.weight"),
            n_heads=spec.n_heads,
            n_kv_heads=spec.n_kv_heads,
            head_dim=spec.head_dim,
            q_norm=q_norm,
            k_norm=k_norm,
            clip=spec.clip_qkv,
            residual_scale=shape.residual_scale,
            score_scale=spec.score_scale,
            soft_cap=spec.soft_cap,
            inverse_frequencies=None if turning is None else turning.frequencies,
            rotary_scale=1.0 if turning is None else turning.scale,
            alibi_slopes=slopes,
            kv=self.kv[self.cache.slots[layer]],
            kv_stride=self.kv[self.cache.slots[layer]].strides[0],
            cache_group=self.cache.groups[layer],
            kv_format=self.kv_format,
            qkv_bias=self.vector(p + "attn.wqkv.bias") if spec.qkv_bias else None,
            out_bias=self.vector(p + "attn.wo.bias") if spec.out_bias else None,
            sinks=self.vector(p + "attn.sinks") if spec.sinks else None,
            window=spec.window,
            output_gate=spec.output_gate,
            keys_as_values=spec.keys_as_values,
            v_norm=None if spec.v_norm_eps is None else _unit_norm(spec.head_dim, spec.v_norm_eps),
            norm_after_rotation=spec.qk_norm is not None and spec.qk_norm.after_rotation,
        )

    def _latent(self, p: str, spec: LatentAttentionSpec) -> LatentArgs:
        norm = NormSpec(kind="rms", eps=spec.norm_eps)
        through = spec.q_rank is not None
        return LatentArgs(
            kv_rank=spec.kv_rank,
            rope_dim=spec.rope_dim,
            nope_dim=spec.nope_dim,
            v_dim=spec.v_dim,
            wq_a=self.packed(p + "wq_a.weight") if through else None,
            q_a_norm=self.norm(p + "q_a_norm.weight", norm) if through else None,
            wkv_a=self.packed(p + "wkv_a.weight"),
            kv_a_norm=self.norm(p + "kv_a_norm.weight", norm),
            wk_b=self.packed(p + "wk_b.weight"),
            wv_b=self.packed(p + "wv_b.weight"),
        )

    def ffn(self, layer: int) -> FFNArgs:
        shape, p = self.config.layers[layer], f"layers.{layer}."
        stream_scale = float(self.vector(p + "scale")[0]) if shape.scaled else 1.0
        ffn, norm = shape.network, self.norm(p + "ffn_norm.weight", shape.norm) if shape.pre_norms else None
        post = self._post_norm(p + "ffn", shape)
        match ffn:
            case DenseSpec():
                return FFNArgs(
                    norm=norm,
                    post_norm=post,
                    router=None,
                    gate=[self.packed(p + "ffn.w_gate")] if ffn.gated else None,
                    up=[self.packed(p + "ffn.w_up")],
                    down=[self.packed(p + "ffn.w_down")],
                    top_k=1,
                    activation=ffn.activation,
                    aggregate="weighted_sum",
                    normalize_p=None,
                    residual_scale=shape.residual_scale,
                    fuse=None,
                    layer=layer,
                    stream_scale=stream_scale,
                )
            case MoESpec():
                return FFNArgs(
                    norm=norm,
                    post_norm=post,
                    router=self.packed(p + "moe.router.weight"),
                    gate=self._experts(p + "moe.w_gate") if ffn.gated else None,
                    up=self._experts(p + "moe.w_up"),
                    down=self._experts(p + "moe.w_down"),
                    top_k=ffn.top_k,
                    activation=ffn.activation,
                    aggregate=ffn.aggregate,
                    normalize_p=ffn.normalize_p,
                    residual_scale=shape.residual_scale,
                    fuse=self._vector_or_none(p + "moe.fuse.weight"),
                    layer=layer,
                    store=None if self.store is None else self.store.handle,
                    choice=ChoiceArgs(
                        score=ffn.score,
                        n_groups=ffn.n_groups,
                        top_k_groups=ffn.top_k_groups,
                        group_worth=ffn.group_worth,
                        normalize_eps=ffn.normalize_eps,
                        normalize_min=ffn.normalize_min,
                        scale=ffn.routed_scale,
                        near=2 * (ffn.mixer_eps or 0.0),
                        bias=self._vector_or_none(p + "moe.router.bias"),
                        correction=self._vector_or_none(p + "moe.router.correction"),
                    ),
                    biases=self._biases(p) if ffn.expert_bias else None,
                    shared=self._shared(p + "moe.", ffn),
                    apart=self._apart(p + "moe.", shape.norm) if ffn.apart else None,
                    stream_scale=stream_scale,
                )

    def _apart(self, p: str, norm: NormSpec) -> ApartArgs:
        scale = self.vector(p + "router.scale")
        return ApartArgs(
            router_norm=NormArgs(scale * np.float32(len(scale) ** -0.5), "rms", norm.eps),
            expert_norm=self.norm(p + "norm.weight", norm),
            expert_post_norm=self.norm(p + "post_norm.weight", norm),
            shared_post_norm=self.norm(p + "shared_post_norm.weight", norm),
            expert_scale=self.vector(p + "router.expert_scale"),
        )

    def _biases(self, p: str) -> tuple[Floats, Floats, Floats]:
        gate, up, down = (self.packed(f"{p}moe.b_{part}").unpack() for part in ("gate", "up", "down"))
        return gate, up, down

    def _shared(self, p: str, ffn: MoESpec) -> SharedArgs | None:
        if ffn.shared is None:
            return None
        weight = self._vector_or_none(p + "shared_gate")
        return SharedArgs(
            gate=self.packed(p + "shared.w_gate") if ffn.shared.gated else None,
            up=self.packed(p + "shared.w_up"),
            down=self.packed(p + "shared.w_down"),
            activation=ffn.shared.activation,
            weight=None if weight is None else pack(np.ascontiguousarray(weight[None]), "float32"),
        )

    def _vector_or_none(self, name: str) -> Floats | None:
        """A vector that not every mixture has."""
        return self.vector(name) if name in self.parameters else None

    def packed(self, name: str) -> Packed:
        parameter = self.parameters[name]
        assert isinstance(parameter, Packed), f"{name} is a packed matrix"
        return parameter

    def _pieces(self, name: str) -> Sequence[Packed]:
        """A matrix that may be in several pieces of rows."""
        parameter = self.parameters[name]
        return [parameter] if isinstance(parameter, Packed) else self._experts(name)

    def _experts(self, name: str) -> Sequence[Packed]:
        parameter = self.parameters[name]
        assert not isinstance(parameter, (Packed, np.ndarray)), f"{name} is a list of packed matrices"
        return parameter

    def _post_norm(self, branch: str, shape: LayerSpec) -> NormArgs | None:
        """The norm of what a branch gives, where the layer has one."""
        return self.norm(branch + "_post_norm.weight", shape.norm) if shape.post_norms else None

    def norm(self, name: str, spec: NormSpec) -> NormArgs:
        bias = self.vector(name.removesuffix("weight") + "bias") if spec.bias else None
        weight = self.vector(name)
        return NormArgs(weight + np.float32(1) if spec.plus_one else weight, spec.kind, spec.eps, bias)

    def vector(self, name: str) -> Floats:
        vector = self.parameters[name]
        assert isinstance(vector, np.ndarray), f"{name} is a vector"
        return vector
