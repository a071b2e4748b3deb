"""A forward pass captured once and replayed: the CPU's counterpart of a CUDA graph.

Building a :class:`Program` lays out every op of the model as a C structure, pointers in place; running it is one call
from Python for the whole step, whatever the number of layers. Between the ops nothing but C++ runs.

    embed -> [ norm+qkv+norms+clip+rotate+cache write -> attention -> projection+residual, or a recurrent layer's one op
               norm+router+experts+weighted sum+residual ] * n_layers -> norm+head on the rows asked for
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import Any, Protocol

import numpy as np

from quadriga.kernels.cpu import bindings
from quadriga.kernels.cpu import library as cpu
from quadriga.kernels.cpu.bindings import Op
from quadriga.kernels.cpu.layer_args import (
    AttentionArgs,
    ChoiceArgs,
    DeltaNetArgs,
    FFNArgs,
    Floats,
    LatentArgs,
    Mamba2Args,
    NormArgs,
    ShortConvArgs,
)
from quadriga.kernels.cpu.packing import Packed
from quadriga.kernels.pass_batch import PassBatch


class Meeting(Protocol):
    """Where the ranks that have parts of the same layers exchange what each computed of a branch."""

    index: int
    """This rank's among them."""
    size: int
    """How many there are."""

    def meet(self, parts: Floats) -> None:
        """Of parts (size, N, D) the own one is there; put the others' in their places."""
        ...


class LayerRouting:
    """Where a layer's routing of the last pass and its running counts lie."""

    def __init__(self, n_experts: int, top_k: int, max_tokens: int) -> None:
        self.ids = np.zeros((max_tokens, top_k), dtype=np.int32)
        self.weights = np.zeros((max_tokens, top_k), dtype=np.float32)
        self.logits = np.zeros((max_tokens, n_experts), dtype=np.float32)
        self.load = np.zeros(n_experts, dtype=np.int64)


class Program:
    """Ops in order, and the buffers between them. Add ops, then :meth:`run`.

    Args:
        threads: computing threads, the caller included.
        max_tokens: most tokens of one pass.
        int16: activations that meet quantised matrices keep 15 bits instead of 8; decoding stays bound by memory, a
            prompt takes about twice as long.
        n_groups: tables of a sequence, if more than the layers here need.
        meeting: other ranks that have parts of these layers; None: there are none.
    """

    def __init__(
        self,
        *,
        d_model: int,
        vocab_size: int,
        max_tokens: int,
        threads: int,
        int16: bool = False,
        isa: str | None = None,
        n_groups: int = 1,
        meeting: Meeting | None = None,
    ) -> None:
        self.context = cpu.Context(threads, isa)
        self.context.set_int16(int16)
        self.vocab_size, self.max_tokens = vocab_size, max_tokens
        self.routing: list[LayerRouting] = []
        self._ops: list[tuple[int, ctypes.Structure]] = []
        self._routers: list[tuple[bindings.Ffn, ChoiceArgs]] = []
        self._keep: list[Any] = []
        self._n_groups = n_groups
        self._segments: list[ctypes.Array[bindings.Step]] = []
        self.d_model = d_model
        self.stream = np.zeros((max_tokens, d_model), dtype=np.float32)
        """The residual stream of the last pass. Without :meth:`embed` a pass begins with what was put there."""
        self._stream_at = self.stream.ctypes.data
        self._meeting, self._meets_before = meeting, list[int]()
        self._parts = np.zeros(0 if meeting is None else meeting.size * max_tokens * d_model, dtype=np.float32)

    def embed(self, table: Packed, scale: float) -> None:
        """Look tokens up in the table (V, D)."""
        self._add(Op.EMBED, bindings.Embed(self._matrix(table), scale))

    def attention(self, a: AttentionArgs) -> None:
        """The attention half of a layer: three ops."""
        op = bindings.Attention(
            norm=self._norm(a.norm),
            post_norm=self._norm(a.post_norm),
            wqkv=self._matrices(a.wqkv),
            n_wqkv=len(a.wqkv),
            wo=self._matrix(a.wo),
            n_heads=a.n_heads,
            n_kv_heads=a.n_kv_heads,
            head_dim=a.head_dim,
            kv_format=cpu.KV_FORMATS[a.kv_format],
            q_norm=self._norm(a.q_norm),
            k_norm=self._norm(a.k_norm),
            q_norm_width=0 if a.q_norm is None else a.q_norm.weight.size,
            k_norm_width=0 if a.k_norm is None else a.k_norm.weight.size,
            clip=a.clip or 0.0,
            residual_scale=a.residual_scale,
            score_scale=a.score_scale,
            soft_cap=a.soft_cap or 0.0,
            inverse_frequencies=self._floats(a.inverse_frequencies),
            alibi_slopes=self._floats(a.alibi_slopes),
            kv=a.kv.ctypes.data,
            kv_stride=a.kv_stride,
            qkv_bias=self._floats(a.qkv_bias),
            out_bias=self._floats(a.out_bias),
            sinks=self._floats(a.sinks),
            window=a.window or 0,
            rotary_dim=0 if a.inverse_frequencies is None else 2 * a.inverse_frequencies.size,
            rotary_scale=a.rotary_scale,
            norm_after_rotation=a.norm_after_rotation,
            output_gate=a.output_gate,
            keys_as_values=a.keys_as_values,
            v_norm=self._norm(a.v_norm),
            cache_group=a.cache_group,
            **self._latent(a.latent),
        )
        self._n_groups = max(self._n_groups, a.cache_group + 1)
        self._keep.append(a.kv)
        for kind in (Op.QKV, Op.ATTEND, Op.ATTN_OUT):
            self._add(kind, op)
        self._end_branch(a.post_norm, a.out_bias, a.residual_scale)

    def short_conv(self, a: ShortConvArgs) -> None:
        """The first half of a layer with a short convolution: one op."""
        op = bindings.ShortConv(
            norm=self._norm(a.norm),
            post_norm=self._norm(a.post_norm),
            w_in=self._matrix(a.w_in),
            w_out=self._matrix(a.w_out),
            taps=self._floats(a.taps.T),
            state=a.state.ctypes.data,
            n_taps=a.taps.shape[1],
            residual_scale=a.residual_scale,
        )
        self._keep.append(a.state)
        self._add(Op.SHORT_CONV, op)
        self._end_branch(a.post_norm, None, a.residual_scale)

    def delta_net(self, a: DeltaNetArgs) -> None:
        """The first half of a layer with a gated delta rule: one op."""
        op = bindings.DeltaNet(
            norm=self._norm(a.norm),
            post_norm=self._norm(a.post_norm),
            w_in=self._matrix(a.w_in),
            w_ba=self._matrix(a.w_ba),
            w_out=self._matrix(a.w_out),
            taps=self._floats(a.taps.T),
            rate=self._floats(a.rate),
            dt=self._floats(a.dt),
            head_norm=self._norm(a.head_norm),
            state=a.state.ctypes.data,
            n_taps=a.taps.shape[1],
            n_k_heads=a.n_k_heads,
            n_v_heads=a.n_v_heads,
            k_dim=a.k_dim,
            v_dim=a.v_dim,
            tiled=a.tiled,
            residual_scale=a.residual_scale,
        )
        self._keep.append(a.state)
        self._add(Op.DELTA_NET, op)
        self._end_branch(a.post_norm, None, a.residual_scale)

    def mamba2(self, a: Mamba2Args) -> None:
        """The first half of a layer with a state-space model: one op."""
        op = bindings.Mamba2(
            norm=self._norm(a.norm),
            post_norm=self._norm(a.post_norm),
            w_in=self._matrix(a.w_in),
            w_dt=self._matrix(a.w_dt),
            w_out=self._matrix(a.w_out),
            taps=self._floats(a.taps.T),
            conv_bias=self._floats(a.conv_bias),
            rate=self._floats(a.rate),
            dt=self._floats(a.dt),
            skip=self._floats(a.skip),
            group_norm=self._norm(a.group_norm),
            state=a.state.ctypes.data,
            n_taps=a.taps.shape[1],
            n_heads=a.n_heads,
            n_groups=a.n_groups,
            state_dim=a.state_dim,
            head_dim=a.head_dim,
            residual_scale=a.residual_scale,
        )
        self._keep.append(a.state)
        self._add(Op.MAMBA2, op)
        self._end_branch(a.post_norm, None, a.residual_scale)

    def _latent(self, a: LatentArgs | None) -> dict[str, Any]:
        """The fields of latent attention; none where there is none."""
        if a is None:
            return {}
        sizes = {"kv_rank": a.kv_rank, "rope_dim": a.rope_dim, "nope_dim": a.nope_dim, "v_dim": a.v_dim}
        matrices = {"wq_a": a.wq_a, "wkv_a": a.wkv_a, "wk_b": a.wk_b, "wv_b": a.wv_b}
        return {
            **sizes,
            **{name: self._matrix(matrix) for name, matrix in matrices.items()},
            "q_a_norm": self._norm(a.q_a_norm),
            "kv_a_norm": self._norm(a.kv_a_norm),
        }

    def ffn(self, a: FFNArgs) -> None:
        """The feed-forward half of a layer: one op, however many experts."""
        routing = None
        if a.router is not None:
            routing = LayerRouting(len(a.up), a.top_k, self.max_tokens)
            self.routing.append(routing)
        op = bindings.Ffn(
            norm=self._norm(a.norm),
            post_norm=self._norm(a.post_norm),
            router=self._matrix(a.router),
            gate=self._matrices(a.gate),
            up=self._matrices(a.up),
            down=self._matrices(a.down),
            n_experts=len(a.up),
            top_k=a.top_k,
            activation=cpu.ACTIVATIONS[a.activation],
            aggregate=cpu.AGGREGATES[a.aggregate],
            layer=a.layer,
            normalize_p=a.normalize_p or 0.0,
            residual_scale=a.residual_scale,
            fuse=self._floats(a.fuse),
            load=None if routing is None else routing.load.ctypes.data,
            ids=None if routing is None else routing.ids.ctypes.data,
            weights=None if routing is None else routing.weights.ctypes.data,
            logits=None if routing is None else routing.logits.ctypes.data,
            store=a.store,
            **self._mixture(a),
        )
        if a.router is not None:
            self._routers.append((op, a.choice))
        self._add(Op.FFN, op)
        self._end_branch(a.post_norm, None, a.residual_scale, a.stream_scale)

    def _mixture(self, a: FFNArgs) -> dict[str, Any]:
        """The fields of a mixture beyond a softmax over experts without biases."""
        choice, shared = a.choice, a.shared
        fields: dict[str, Any] = {
            "stream_scale": a.stream_scale,
            "score": cpu.SCORES[choice.score],
            "n_groups": choice.n_groups,
            "top_k_groups": choice.top_k_groups,
            "group_by_best": choice.group_worth == "best",
            "normalize_eps": choice.normalize_eps,
            "normalize_min": choice.normalize_min,
            "routed_scale": choice.scale,
            "near": choice.near,
            "router_bias": self._floats(choice.bias),
            "correction": self._floats(choice.correction),
        }
        if a.biases is not None:
            gate, up, down = (np.pad(bias, ((0, 0), (0, -bias.shape[1] % 16))) for bias in a.biases)
            fields |= {"gate_bias": self._floats(gate), "up_bias": self._floats(up), "down_bias": self._floats(down)}
        if a.apart is not None:
            fields |= {
                "router_norm": self._norm(a.apart.router_norm),
                "expert_norm": self._norm(a.apart.expert_norm),
                "expert_post_norm": self._norm(a.apart.expert_post_norm),
                "shared_post_norm": self._norm(a.apart.shared_post_norm),
                "expert_scale": self._floats(a.apart.expert_scale),
            }
        if shared is not None:
            fields |= {
                "shared_gate": self._matrix(shared.gate),
                "shared_up": self._matrix(shared.up),
                "shared_down": self._matrix(shared.down),
                "shared_weight": self._matrix(shared.weight),
                "shared_activation": cpu.ACTIVATIONS[shared.activation],
            }
        return fields

    def head(
        self,
        norm: NormArgs,
        weight: Packed,
        logit_scale: float,
        bias: Floats | None = None,
        logit_cap: float | None = None,
    ) -> None:
        """Norm and logits of the rows a batch asks for."""
        matrix = self._matrix(weight)
        op = bindings.Head(self._norm(norm), matrix, logit_scale, self._floats(bias), logit_cap or 0.0)
        self._add(Op.HEAD, op)

    @contextmanager
    def steered(self, shift: Floats) -> Iterator[None]:
        """Within the block, add ``shift`` (n_layers, E) to routers' logits; -infinity: that expert is not chosen."""
        kept = []
        for op, choice in self._routers:
            own = np.ascontiguousarray(shift[op.layer, : op.n_experts], dtype=np.float32)
            bias = own if choice.bias is None else own + choice.bias
            # A correction may lift a score of 0: what is off is off for the choice too.
            off = np.where(np.isneginf(own), own, np.float32(0))
            correction = off if choice.correction is None else off + choice.correction
            kept.append((op, op.router_bias, op.correction, bias, correction))
            op.router_bias, op.correction = bias.ctypes.data, correction.ctypes.data
        try:
            yield
        finally:
            for op, router_bias, correction_at, *_ in kept:
                op.router_bias, op.correction = router_bias, correction_at

    def run(self, batch: PassBatch) -> Floats:
        """One pass over a batch; its keys and values are stored in its blocks. For steering see :meth:`steered`.

        Returns:
            (R, V) float32 logits.

        Raises:
            HardwareError: no memory is left for the intermediate results.
            CheckpointError: experts on disk could not be read.
        """
        n, n_rows = len(batch.tokens), len(batch.rows)
        assert 0 < n <= self.max_tokens, f"a pass takes 1 to {self.max_tokens} tokens, got {n}"
        tables = np.ascontiguousarray(batch.tables)
        n_groups = 1 if tables.ndim == 1 else len(tables)
        assert n_groups == self._n_groups, f"the cache has {self._n_groups} groups, got tables of {n_groups}"
        if not self._segments:
            self._segments = self._cut()
        logits: Floats = np.empty((n_rows, self.vocab_size), dtype=np.float32)
        # Field by field: a third of the time that a structure takes to be made with all of them by name.
        args = bindings.Batch()
        args.n_tokens, args.n_sequences, args.n_rows = n, len(batch.starts) - 1, n_rows
        args.tokens, args.positions = cpu.address(batch.tokens), cpu.address(batch.positions)
        args.starts, args.rows = cpu.address(batch.starts), cpu.address(batch.rows)
        args.tables, args.table_size = cpu.address(tables), tables.shape[-1]
        args.table_starts = cpu.address(batch.table_starts)
        args.logits, args.hidden = cpu.address(logits), self._stream_at
        if batch.before is not None and batch.after is not None:
            args.before, args.after = cpu.address(batch.before), cpu.address(batch.after)
        if self._meeting is None:
            self.context.run(self._segments[0], args)
            return logits
        args.branches, args.n_branches, args.branch = cpu.address(self._parts), self._meeting.size, self._meeting.index
        parts = self._parts[: self._meeting.size * n * self.d_model].reshape(self._meeting.size, n, self.d_model)
        for segment in self._segments[:-1]:
            self.context.run(segment, args)
            self._meeting.meet(parts)
        self.context.run(self._segments[-1], args)
        return logits

    def _cut(self) -> list[ctypes.Array[bindings.Step]]:
        """The captured ops, in as many arrays as there are meetings, and one more."""
        steps = [bindings.Step(kind, ctypes.addressof(op)) for kind, op in self._ops]
        bounds = [0, *self._meets_before, len(steps)]
        return [(bindings.Step * (end - begin))(*steps[begin:end]) for begin, end in pairwise(bounds)]

    def hidden(self, n_tokens: int, norm: NormArgs) -> Floats:
        """(n_tokens, D) float32: the last pass's states after all layers, normed."""
        out, weight = np.empty((n_tokens, self.d_model), dtype=np.float32), np.ascontiguousarray(norm.weight)
        bias = None if norm.bias is None else np.ascontiguousarray(norm.bias)
        place = None if bias is None else bias.ctypes.data
        spec = bindings.Norm(weight.ctypes.data, cpu.NORMS[norm.kind], norm.eps, place)
        norm_rows = self.context.lib.qd_norm_rows
        self.context.call(norm_rows, spec, self._stream_at, n_tokens, self.d_model, out.ctypes.data)
        return out

    def row_stats(self, logits: Floats) -> tuple[list[int], list[float]]:
        """Of every row of logits (R, V): the most probable token (the lowest id of equals) and log(sum(exp))."""
        r, v = logits.shape
        best, log_sum = (ctypes.c_int32 * r)(), (ctypes.c_float * r)()
        self.context.call(self.context.lib.qd_row_stats, np.ascontiguousarray(logits).ctypes.data, r, v, best, log_sum)
        return list(best), list(log_sum)

    def _add(self, kind: int, op: ctypes.Structure) -> None:
        assert not self._segments, "ops are added before the first run"
        self._ops.append((kind, op))

    def _end_branch(
        self, post_norm: NormArgs | None, bias: Floats | None, residual_scale: float, stream_scale: float = 1.0
    ) -> None:
        """Where other ranks have parts of the branch, it ends when all have met."""
        if self._meeting is None:
            return
        self._meets_before.append(len(self._ops))
        norm, own_bias = self._norm(post_norm), self._floats(bias)
        merge = bindings.Merge(norm, own_bias, residual_scale, stream_scale, self.d_model)
        self._add(Op.MERGE, merge)

    def _matrix(self, packed: Packed | None) -> bindings.Matrix:
        if packed is None:
            return bindings.Matrix()
        self._keep.append(packed)
        return packed.struct()

    def _matrices(self, packed: Sequence[Packed] | None) -> Any:
        if packed is None:
            return None
        array = (bindings.Matrix * len(packed))(*(self._matrix(p) for p in packed))
        self._keep.append(array)
        return ctypes.cast(array, ctypes.POINTER(bindings.Matrix))

    def _norm(self, norm: NormArgs | None) -> bindings.Norm:
        if norm is None:
            return bindings.Norm()
        return bindings.Norm(self._floats(norm.weight), cpu.NORMS[norm.kind], norm.eps, self._floats(norm.bias))

    def _floats(self, values: Floats | None) -> int | None:
        if values is None:
            return None
        wide = np.ascontiguousarray(values, dtype=np.float32)
        self._keep.append(wide)
        return int(wide.ctypes.data)
