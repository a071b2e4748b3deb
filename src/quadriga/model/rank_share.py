"""What one rank of a mesh has of a model: its own smaller model, and where its parameters lie in the whole one.

    ModelConfig ──RankShare(config, place)──► .config      of this rank's layers, heads and widths, experts all counted
                                              .wanted      its parameter -> (parameter of the whole, Selection)

Everything follows from :mod:`quadriga.model.rank_mesh`; whoever reads weights asks for nothing else.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from quadriga.model.cache_layout import CacheLayout, cache_layout
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
    NoFeedForward,
    NoMixer,
    ShortConvSpec,
    in_order,
)
from quadriga.model.positions import alibi_slopes
from quadriga.model.rank_mesh import RankPlace, Run
from quadriga.model.weight_map import layer_shapes, parameter_shapes

Runs = tuple[Run, ...]


@dataclass(frozen=True, kw_only=True)
class Selection:
    """A part of a parameter: some runs of its rows and columns, in order, one of its matrices. None: all of them."""

    rows: Runs | None = None
    cols: Runs | None = None
    experts: Run | None = None
    """Of (E, rows, cols); the others stand for experts of other ranks."""
    zero: bool = False
    """Zeros in place of the numbers: another rank adds them."""

    @property
    def cuts(self) -> bool:
        """True if a matrix is cut."""
        return self.rows is not None or self.cols is not None


WHOLE = Selection()


@dataclass(frozen=True)
class RankShare:
    """See the module docstring."""

    whole: ModelConfig
    place: RankPlace

    @cached_property
    def layers(self) -> range:
        """Of the whole model, those of this rank's stage."""
        return self.place.layers(self.whole)

    @cached_property
    def config(self) -> ModelConfig:
        """This rank's model. Its head is a matrix of its own, of the rows of :attr:`head_rows`."""
        kept = [self.whole.layers[i] for i in self.layers]
        own = {layer: self._own_layer(layer) for layer in dict.fromkeys(kept)}
        return replace(self.whole, layers=in_order(own[layer] for layer in kept), tied_embeddings=False)

    @property
    def head_rows(self) -> Run:
        """Rows of the head that this rank has."""
        return self.place.head_rows(self.whole.vocab_size)

    @cached_property
    def cache(self) -> CacheLayout:
        """How this rank's layers share blocks, under the whole model's tables."""
        layout = cache_layout(self.whole)
        slots = [layout.slots[i] for i in self.layers]
        number = {slot: i for i, slot in enumerate(dict.fromkeys(slots))}
        return CacheLayout(
            windows=layout.windows,
            groups=tuple(layout.groups[i] for i in self.layers),
            slots=tuple(number[slot] for slot in slots),
        )

    def slopes(self, layer: int) -> NDArray[np.float32]:
        """(H,): the ALiBi slopes of this rank's heads in its own layer of that number."""
        spec = self.whole.layers[self.layers[layer]].attention
        assert isinstance(spec.position, AlibiSpec), "its heads have slopes"
        first, last = self._kv_heads(spec)
        group = spec.n_heads // spec.n_kv_heads
        return alibi_slopes(spec.position, spec.n_heads)[first * group : last * group]

    @cached_property
    def wanted(self) -> dict[str, tuple[str, Selection]]:
        """Each of this rank's parameters: its name in the whole model, and which part of that it is."""
        found: dict[str, tuple[str, Selection]] = {}
        if self.place.first:
            found["embed.weight"] = ("embed.weight", WHOLE)
        for own, i in enumerate(self.layers):
            layer = self.whole.layers[i]
            selected = {**self._mixer(layer), **self._ffn(layer)}
            for name in layer_shapes(layer, self.whole.d_model):
                found[f"layers.{own}.{name}"] = (f"layers.{i}.{name}", selected.get(name, WHOLE))
        if self.place.last:
            outside = [name for name in parameter_shapes(self.whole) if name.startswith("final_norm.")]
            found |= {name: (name, WHOLE) for name in outside}
            rows = Selection(rows=(self.head_rows,)) if self.place.mesh.group > 1 else WHOLE
            head = "embed.weight" if self.whole.tied_embeddings else "lm_head.weight"
            found["lm_head.weight"] = (head, rows)
            if self.whole.head_bias:
                found["lm_head.bias"] = ("lm_head.bias", rows)
        return found

    # A layer's parts -------------------------------------------------------------------------------------------------

    def _own_layer(self, layer: LayerSpec) -> LayerSpec:
        mixer, ffn = layer.mixer, layer.ffn
        match mixer:
            case LatentAttentionSpec():
                mixer = replace(mixer, n_heads=_length(self._heads(mixer)))
            case AttentionSpec(n_heads=heads, n_kv_heads=kv_heads):
                n = _length(self._kv_heads(mixer))
                mixer = replace(mixer, n_heads=n * heads // kv_heads, n_kv_heads=n)
            case ShortConvSpec(width=width):
                mixer = replace(mixer, width=_length(self.place.of_group(width)))
            case DeltaNetSpec():
                n = _length(self._key_heads(mixer))
                mixer = replace(mixer, n_k_heads=n, n_v_heads=n * mixer.n_v_heads // mixer.n_k_heads)
        match ffn:
            case DenseSpec(d_ff=width):
                ffn = replace(ffn, d_ff=_length(self.place.of_group(width)))
            case MoESpec(d_ff=width, shared=shared):
                ffn = replace(ffn, d_ff=_length(self.place.of_width(width)))
                if shared is not None:
                    ffn = replace(ffn, shared=replace(shared, d_ff=_length(self.place.of_group(shared.d_ff))))
        return replace(layer, mixer=mixer, ffn=ffn)

    def _kv_heads(self, spec: AttentionSpec) -> Run:
        """Keys' heads; their queries' numbers lie together."""
        return self.place.of_group(spec.n_kv_heads, spec.n_heads // spec.n_kv_heads * spec.head_dim)

    def _heads(self, spec: LatentAttentionSpec) -> Run:
        return self.place.of_group(spec.n_heads, spec.v_dim)

    def _key_heads(self, spec: DeltaNetSpec) -> Run:
        return self.place.of_group(spec.n_k_heads, spec.v_dim if spec.tiled else spec.value_dim // spec.n_k_heads)

    def _mixer(self, layer: LayerSpec) -> Mapping[str, Selection]:
        """What is cut of a layer's first half; nothing where a stage is one rank."""
        if self.place.mesh.group == 1:
            return {}
        match layer.mixer:
            case LatentAttentionSpec() as latent:
                return self._latent(latent)
            case AttentionSpec() as attention:
                return self._attention(attention)
            case ShortConvSpec(width=width):
                first, last = self.place.of_group(width)
                thirds = tuple((i * width + first, i * width + last) for i in range(3))
                own = ((first, last),)
                return {
                    "conv.w_in.weight": Selection(rows=thirds),
                    "conv.taps": Selection(rows=own),
                    "conv.w_out.weight": Selection(cols=own),
                }
            case DeltaNetSpec() as delta:
                return self._delta(delta)
            case Mamba2Spec():
                raise AssertionError("RankMesh.problem refuses it")
            case NoMixer():
                return {}

    def _attention(self, spec: AttentionSpec) -> dict[str, Selection]:
        first, last = self._kv_heads(spec)
        group, d = spec.n_heads // spec.n_kv_heads, spec.head_dim
        queries, keys = (first * group * d, last * group * d), (first * d, last * d)
        rows = [queries, _behind(spec.q_dim, keys)]
        if not spec.keys_as_values:
            rows.append(_behind(spec.q_dim + spec.kv_dim, keys))
        if spec.output_gate:
            rows.append(_behind(spec.q_dim + 2 * spec.kv_dim, queries))
        return {
            "attn.wqkv.weight": Selection(rows=tuple(rows)),
            "attn.wqkv.bias": Selection(rows=tuple(rows)),
            "attn.wo.weight": Selection(cols=(queries,)),
            "attn.sinks": Selection(rows=((first * group, last * group),)),
        }

    def _latent(self, spec: LatentAttentionSpec) -> dict[str, Selection]:
        first, last = self._heads(spec)

        def heads_of(n: int) -> Runs:
            return ((first * n, last * n),)

        queries = "attn.wq.weight" if spec.q_rank is None else "attn.wq_b.weight"
        return {
            queries: Selection(rows=heads_of(spec.qk_dim)),
            "attn.wk_b.weight": Selection(rows=heads_of(spec.kv_rank)),
            "attn.wv_b.weight": Selection(rows=heads_of(spec.v_dim)),
            "attn.wo.weight": Selection(cols=heads_of(spec.v_dim)),
        }

    def _delta(self, spec: DeltaNetSpec) -> dict[str, Selection]:
        first, last = self._key_heads(spec)
        each, n = spec.n_v_heads // spec.n_k_heads, spec.n_k_heads
        runs = [(j * n + first, j * n + last) for j in range(each)] if spec.tiled else [(first * each, last * each)]
        heads = _joined(runs)
        keys = (first * spec.k_dim, last * spec.k_dim)
        values = tuple((a * spec.v_dim, b * spec.v_dim) for a, b in heads)
        convolved = (keys, _behind(spec.qk_dim, keys), *(_behind(2 * spec.qk_dim, run) for run in values))
        return {
            "delta.w_in.weight": Selection(rows=(*convolved, *(_behind(spec.width, run) for run in values))),
            "delta.w_ba.weight": Selection(rows=(*heads, *(_behind(spec.n_v_heads, run) for run in heads))),
            "delta.taps": Selection(rows=convolved),
            "delta.rate": Selection(rows=heads),
            "delta.dt": Selection(rows=heads),
            "delta.w_out.weight": Selection(cols=values),
        }

    def _ffn(self, layer: LayerSpec) -> Mapping[str, Selection]:
        """What is cut of a layer's second half, and which experts it has."""
        mesh, place = self.place.mesh, self.place
        if mesh.group == 1:
            return {}
        match layer.ffn:
            case DenseSpec(d_ff=width):
                return _network("ffn.w", (place.of_group(width),), None)
            case MoESpec() as moe:
                own = (place.of_width(moe.d_ff),) if mesh.tp > 1 else None
                found = _network("moe.w", own, place.experts(moe.n_experts) if mesh.ep > 1 else None)
                if mesh.tp > 1:
                    found |= {f"moe.b_{part}": Selection(cols=own) for part in ("gate", "up")}
                    found["moe.b_down"] = Selection(zero=place.tensor_part > 0)
                if moe.shared is not None:
                    found |= _network("moe.shared.w", (place.of_group(moe.shared.d_ff),), None)
                return found
            case NoFeedForward():
                return {}


def _network(prefix: str, own: Runs | None, experts: Run | None) -> dict[str, Selection]:
    """The matrices of a network, or of all experts; a plain one has no gate to cut."""
    found = {f"{prefix}_{part}": Selection(rows=own, experts=experts) for part in ("gate", "up")}
    return found | {f"{prefix}_down": Selection(cols=own, experts=experts)}


def _behind(offset: int, run: Run) -> Run:
    return run[0] + offset, run[1] + offset


def _length(run: Run) -> int:
    return run[1] - run[0]


def _joined(runs: Iterable[Run]) -> Runs:
    """Runs with neighbours made one."""
    out: list[Run] = []
    for begin, end in runs:
        if out and out[-1][1] == begin:
            out[-1] = (out[-1][0], end)
        else:
            out.append((begin, end))
    return tuple(out)
