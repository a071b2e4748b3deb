"""Where each number of a checkpoint goes: a weight map is a list of pieces, plain data that reads in both directions.

A :class:`Piece` ties a box of one *source* tensor (named as in the checkpoint) to a box of one *parameter* (named as in
``Transformer.state_dict``). Import copies source box -> parameter box, export the other way round, so one list proves
the round trip. The pieces of a map must cover every element of every source tensor and of every parameter exactly once;
:func:`check_cover` holds them to it before a byte is read.

    parameter[target_box] = from_stored(source[source_box])

    from_stored:  take every n-th index of an axis if `stride`  ->  view as `view` if given  ->  swap the last two
             axes if `transpose`  ->  un-interleave rotary rows if `rotary_heads` > 0

Parameter names and shapes (the canonical layout; D d_model, F d_ff, E experts, V vocab):

    embed.weight (V, D)                      layers.{i}.attn.wqkv.weight ((H + 2K) d, D), rows: q, k, v (gates: + H d)
    layers.{i}.attn_norm.weight (D,)         layers.{i}.attn.wo.weight   (D, H d)
    layers.{i}.attn.wq.weight (H (n + p), D), or attn.wq_a.weight (Q, D), attn.q_a_norm.weight (Q,) and
        attn.wq_b.weight (H (n + p), Q); attn.wkv_a.weight (R + p, D), attn.kv_a_norm.weight (R,),
        attn.wk_b.weight (H R, n), attn.wv_b.weight (H v, R), attn.wo.weight (D, H v)
        (latent attention: n nope_dim, p rope_dim, Q q_rank, R kv_rank, v v_dim)
    layers.{i}.attn.wqkv.bias ((H + 2K) d,), attn.wo.bias (D,), attn.sinks (H,)    (where the mixer has them)
    layers.{i}.conv.w_in.weight (3 C, D), conv.taps (C, L), conv.w_out.weight (D, C)      (a short convolution's layer)
    layers.{i}.delta.w_in.weight (2 G d_k + 2 H d_v, D), rows: all q, all k, all v, all z     (a gated DeltaNet's)
    layers.{i}.delta.w_ba.weight (2 H, D), delta.taps (2 G d_k + H d_v, L), delta.rate (H,), delta.dt (H,)
    layers.{i}.delta.norm.weight (d_v,), delta.w_out.weight (D, H d_v)
    layers.{i}.mamba.w_in.weight (2 H P + 2 G N, D), rows: z, x, B, C; mamba.w_dt.weight (H, D),
        mamba.rate|dt|skip (H,), mamba.taps (H P + 2 G N, L), mamba.conv_bias (H P + 2 G N,) where there is one,
        mamba.norm.weight (H P,), mamba.w_out.weight (D, H P)                           (a Mamba-2 layer's)
    layers.{i}.ffn_norm.weight (D,)          layers.{i}.attn_post_norm.weight, ffn_post_norm.weight  (post_norms only)
    layers.{i}.ffn.w_gate|w_up (F, D), w_down (D, F)                               (dense; w_gate only if gated)
    layers.{i}.moe.router.weight (E, D), moe.w_gate|w_up (E, F, D), moe.w_down (E, D, F)  (experts; w_gate if gated)
    layers.{i}.moe.fuse.weight (E,)          (aggregate "fuse" only)
    layers.{i}.moe.router.bias (E,), moe.router.correction (E,), moe.b_gate|b_up (E, F), moe.b_down (E, D)   (biases)
    layers.{i}.moe.shared.w_gate|w_up (S, D), moe.shared.w_down (D, S), moe.shared_gate (D,)    (S: the shared width)
    (a layer without a mixer has no attn_norm, one without a feed-forward no ffn_norm)
    layers.{i}.moe.router.scale (D,), moe.router.expert_scale (E,), moe.norm.weight, moe.post_norm.weight,
        moe.shared_post_norm.weight (D,)     (experts apart); layers.{i}.scale (1,)     (a scaled layer)
    final_norm.weight (D,)                   lm_head.weight (V, D) (unless tied), lm_head.bias (V,) (head_bias only)
    beside every norm's weight its bias (D,) where the NormSpec has one

Nothing here imports torch.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod

from quadriga.errors import CheckpointError
from quadriga.model.config import (
    AttentionSpec,
    DeltaNetSpec,
    DenseSpec,
    LatentAttentionSpec,
    LayerSpec,
    Mamba2Spec,
    ModelConfig,
    MoESpec,
    NormSpec,
    ShortConvSpec,
)

Shape = tuple[int, ...]
Box = tuple[tuple[int, int], ...]
"""Half-open ranges, one per axis: ((start, stop), ...). Always as long as the tensor has axes."""


@dataclass(frozen=True, kw_only=True)
class Stride:
    """Of one axis of a source box the indices ``start``, ``start + step``, ...: it holds ``step`` parts by turns."""

    axis: int
    step: int
    start: int


@dataclass(frozen=True, kw_only=True)
class Piece:
    """One box of a source tensor and the box of a parameter it fills."""

    source: str
    source_shape: Shape
    target: str
    target_shape: Shape
    source_box: Box | None = None
    """None: the whole source tensor."""
    target_box: Box | None = None
    """None: the whole parameter."""
    stride: Stride | None = None
    """What of the source box is this piece's; None: all of it. gpt-oss stores gate and up in turn."""
    view: Shape | None = None
    """Reshape the source box to this (row-major) before anything else; e.g. (E*F, D) -> (E, F, D)."""
    transpose: bool = False
    """Swap the last two axes."""
    rotary_heads: int = 0
    """Heads whose rows are stored as interleaved rotary pairs (Meta, GGUF llama) and must become halves; 0: none."""
    rotary_last: int = 0
    """Of each of these heads the last rows that are pairs (latent attention); 0: all of a head's rows are."""


def whole(shape: Shape) -> Box:
    """The box that covers a tensor of ``shape``."""
    return tuple((0, n) for n in shape)


def source_index(piece: Piece) -> tuple[slice, ...]:
    """The index of the source tensor that gives what the piece takes of it."""
    spans = [slice(*span) for span in piece.source_box or whole(piece.source_shape)]
    if piece.stride is not None:
        span = spans[piece.stride.axis]
        spans[piece.stride.axis] = slice(span.start + piece.stride.start, span.stop, piece.stride.step)
    return tuple(spans)


def taken_shape(piece: Piece) -> Shape:
    """The shape of what the piece takes of its source, before ``view``."""
    extent = [stop - start for start, stop in piece.source_box or whole(piece.source_shape)]
    if piece.stride is not None:
        extent[piece.stride.axis] //= piece.stride.step
    return tuple(extent)


def parameter_shapes(config: ModelConfig) -> dict[str, Shape]:
    """Every parameter of the model and its shape, in the order of a forward pass."""
    d = config.d_model
    shapes: dict[str, Shape] = {"embed.weight": (config.vocab_size, d)}
    kinds = {layer: layer_shapes(layer, d) for layer in config.kinds()}
    for i, layer in enumerate(config.layers):
        shapes.update({f"layers.{i}.{name}": shape for name, shape in kinds[layer].items()})
    shapes |= _norm_shapes("final_norm", config.final_norm, d)
    if not config.tied_embeddings:
        shapes["lm_head.weight"] = (config.vocab_size, d)
    if config.head_bias:
        shapes["lm_head.bias"] = (config.vocab_size,)
    return shapes


def _norm_shapes(name: str, norm: NormSpec, d_model: int) -> dict[str, Shape]:
    return {f"{name}.{part}": (d_model,) for part in (("weight", "bias") if norm.bias else ("weight",))}


def layer_shapes(layer: LayerSpec, d_model: int) -> dict[str, Shape]:
    """Every parameter of one layer, without the ``layers.{i}.`` before its name, in the order of a forward pass."""
    d, ffn = d_model, layer.ffn
    shapes: dict[str, Shape] = {}
    if layer.mixes and layer.pre_norms:
        shapes |= _norm_shapes("attn_norm", layer.norm, d)
    match layer.mixer:
        case LatentAttentionSpec() as latent:
            shapes |= _latent_shapes(latent, d)
        case AttentionSpec() as attn:
            shapes |= _attention_shapes(attn, d)
        case ShortConvSpec(width=width, taps=taps):
            shapes |= {"conv.w_in.weight": (3 * width, d), "conv.taps": (width, taps), "conv.w_out.weight": (d, width)}
        case DeltaNetSpec() as delta:
            shapes |= _delta_shapes(delta, d)
        case Mamba2Spec() as mamba:
            shapes |= _mamba_shapes(mamba, d)
    if layer.mixes and layer.post_norms:
        shapes |= _norm_shapes("attn_post_norm", layer.norm, d)
    if layer.feeds and layer.pre_norms:
        shapes |= _norm_shapes("ffn_norm", layer.norm, d)
    match ffn:
        case DenseSpec():
            shapes |= _network_shapes("ffn.", ffn, d)
        case MoESpec():
            shapes.update(_mixture_shapes(ffn, d))
    if layer.feeds and layer.post_norms:
        shapes |= _norm_shapes("ffn_post_norm", layer.norm, d)
    if layer.scaled:
        shapes["scale"] = (1,)
    return shapes


def _attention_shapes(attn: AttentionSpec, d: int) -> dict[str, Shape]:
    shapes: dict[str, Shape] = {"attn.wqkv.weight": (attn.qkv_dim, d)}
    if attn.qkv_bias:
        shapes["attn.wqkv.bias"] = (attn.qkv_dim,)
    shapes["attn.wo.weight"] = (d, attn.q_dim)
    if attn.out_bias:
        shapes["attn.wo.bias"] = (d,)
    if attn.sinks:
        shapes["attn.sinks"] = (attn.n_heads,)
    if attn.qk_norm is not None:
        by_head = attn.qk_norm.over == "head"
        shapes["attn.q_norm.weight"] = (attn.head_dim if by_head else attn.q_dim,)
        shapes["attn.k_norm.weight"] = (attn.head_dim if by_head else attn.kv_dim,)
    return shapes


def _delta_shapes(delta: DeltaNetSpec, d: int) -> dict[str, Shape]:
    heads = delta.n_v_heads
    return {
        "delta.w_in.weight": (delta.width + delta.value_dim, d),
        "delta.w_ba.weight": (2 * heads, d),
        "delta.taps": (delta.width, delta.taps),
        "delta.rate": (heads,),
        "delta.dt": (heads,),
        "delta.norm.weight": (delta.v_dim,),
        "delta.w_out.weight": (d, delta.value_dim),
    }


def _mamba_shapes(mamba: Mamba2Spec, d: int) -> dict[str, Shape]:
    heads = mamba.n_heads
    shapes: dict[str, Shape] = {
        "mamba.w_in.weight": (mamba.inner_dim + mamba.width, d),
        "mamba.w_dt.weight": (heads, d),
        "mamba.taps": (mamba.width, mamba.taps),
    }
    if mamba.conv_bias:
        shapes["mamba.conv_bias"] = (mamba.width,)
    return shapes | {
        "mamba.rate": (heads,),
        "mamba.dt": (heads,),
        "mamba.skip": (heads,),
        "mamba.norm.weight": (mamba.inner_dim,),
        "mamba.w_out.weight": (d, mamba.inner_dim),
    }


def _latent_shapes(attn: LatentAttentionSpec, d: int) -> dict[str, Shape]:
    rows, rank = attn.n_heads * attn.qk_dim, attn.kv_rank
    shapes: dict[str, Shape] = {"attn.wq.weight": (rows, d)}
    if attn.q_rank is not None:
        shapes = {
            "attn.wq_a.weight": (attn.q_rank, d),
            "attn.q_a_norm.weight": (attn.q_rank,),
            "attn.wq_b.weight": (rows, attn.q_rank),
        }
    return shapes | {
        "attn.wkv_a.weight": (rank + attn.rope_dim, d),
        "attn.kv_a_norm.weight": (rank,),
        "attn.wk_b.weight": (attn.n_heads * rank, attn.nope_dim),
        "attn.wv_b.weight": (attn.n_heads * attn.v_dim, rank),
        "attn.wo.weight": (d, attn.n_heads * attn.v_dim),
    }


def _network_shapes(prefix: str, ffn: DenseSpec, d: int) -> dict[str, Shape]:
    shapes: dict[str, Shape] = {prefix + "w_gate": (ffn.d_ff, d)} if ffn.gated else {}
    return shapes | {prefix + "w_up": (ffn.d_ff, d), prefix + "w_down": (d, ffn.d_ff)}


def _mixture_shapes(ffn: MoESpec, d: int) -> dict[str, Shape]:
    n = ffn.n_experts
    shapes: dict[str, Shape] = {"moe.router.weight": (n, d)}
    if ffn.router_bias:
        shapes["moe.router.bias"] = (n,)
    if ffn.correction:
        shapes["moe.router.correction"] = (n,)
    if ffn.gated:
        shapes["moe.w_gate"] = (n, ffn.d_ff, d)
    shapes |= {"moe.w_up": (n, ffn.d_ff, d), "moe.w_down": (n, d, ffn.d_ff)}
    if ffn.expert_bias:
        shapes |= {"moe.b_gate": (n, ffn.d_ff), "moe.b_up": (n, ffn.d_ff), "moe.b_down": (n, d)}
    if ffn.aggregate == "fuse":
        shapes["moe.fuse.weight"] = (n,)
    if ffn.shared is not None:
        shapes |= _network_shapes("moe.shared.", ffn.shared, d)
        if ffn.shared_gate:
            shapes["moe.shared_gate"] = (d,)
    if ffn.apart:
        shapes |= {"moe.router.scale": (d,), "moe.router.expert_scale": (n,)}
        shapes |= {f"moe.{name}.weight": (d,) for name in ("norm", "post_norm", "shared_post_norm")}
    return shapes


def qkv_rows(config: ModelConfig, name: str) -> list[int]:
    """Rows of the parts of a layer's ``attn.wqkv.weight``: q, k, v where it is not k, gates where there are any."""
    spec = config.layers[int(name.split(".")[1])].attention
    rows = [spec.q_dim, spec.kv_dim]
    rows += [] if spec.keys_as_values else [spec.kv_dim]
    return rows + ([spec.q_dim] if spec.output_gate else [])


def stays_float32(name: str) -> bool:
    """True for matrices that are never packed into fewer bits: a router, whose rounding changes which experts a token
    visits, the biases of experts, one row an expert, which are added and not multiplied with, the taps of
    convolutions, a few numbers a channel, and what a recurrent layer forgets and learns by, one or two rows a head."""
    recurrent = (".taps", "delta.w_ba.weight", "mamba.w_dt.weight")
    return name.endswith(("router.weight", "moe.b_gate", "moe.b_up", "moe.b_down", *recurrent))


def source_shapes(pieces: Iterable[Piece]) -> dict[str, Shape]:
    """Every source tensor the map reads and its shape."""
    return {piece.source: piece.source_shape for piece in pieces}


def _volume(box: Box) -> int:
    return prod(stop - start for start, stop in box)


def _overlap(a: Box, b: Box) -> bool:
    return all(max(a0, b0) < min(a1, b1) for (a0, a1), (b0, b1) in zip(a, b, strict=True))


def _disjoint(boxes: list[Box], axis: int = 0) -> bool:
    """True if no element lies in two boxes: a sweep along the first axis on which the boxes differ.

    n log n for the slices and grids of real maps; any pair is found, adjacent in the order or not.
    """
    if len(boxes) < 2:
        return True
    if axis == len(boxes[0]):
        return False  # equal on every axis
    if len({box[axis] for box in boxes}) == 1:
        return _disjoint(boxes, axis + 1)
    open_boxes: list[Box] = []
    for box in sorted(boxes, key=lambda box: box[axis]):
        open_boxes = [other for other in open_boxes if other[axis][1] > box[axis][0]]
        if any(_overlap(box, other) for other in open_boxes):
            return False
        open_boxes.append(box)
    return True


def _uncovered(boxes: Mapping[str, list[Box]], shapes: Mapping[str, Shape]) -> list[str]:
    """Names whose boxes do not tile their shape exactly: missing, doubled or out of range."""
    wrong = []
    for name, shape in shapes.items():
        parts = boxes.get(name, [])
        inside = all(0 <= a < b <= n for box in parts for (a, b), n in zip(box, shape, strict=True))
        if not inside or sum(map(_volume, parts)) != prod(shape) or not _disjoint(parts):
            wrong.append(name)
    return wrong


def _assert_fits(piece: Piece) -> None:
    """What leaves the source box must have the shape of the target box."""
    taken = taken_shape(piece)
    target = piece.target_box or whole(piece.target_shape)
    shape = piece.view or taken
    moved = (*shape[:-2], shape[-1], shape[-2]) if piece.transpose else shape
    fits = moved == tuple(b - a for a, b in target) and prod(shape) == prod(taken)
    assert fits, f"{piece.source} -> {piece.target}: {taken} viewed as {moved} does not fit {target}"


def _apart(box: Box, stride: Stride | None) -> Box:
    """A source box with its strided axis as two, turn and place in the turn: there what a stride takes is a box."""
    if stride is None:
        return box
    (start, stop), step = box[stride.axis], stride.step
    assert start % step == stop % step == 0 <= stride.start < step, f"{box} is not whole turns of {stride}"
    turns = ((start // step, stop // step), (stride.start, stride.start + 1))
    return (*box[: stride.axis], *turns, *box[stride.axis + 1 :])


def _apart_shape(shape: Shape, strides: set[tuple[int, int] | None]) -> Shape:
    assert len(strides) == 1, "the pieces of a source take turns along one axis, all of them or none"
    (turns,) = strides
    if turns is None:
        return shape
    axis, step = turns
    return (*shape[:axis], shape[axis] // step, step, *shape[axis + 1 :])


def check_cover(pieces: Iterable[Piece], parameters: Mapping[str, Shape], sources: Mapping[str, Shape]) -> None:
    """Raise unless the pieces use every element of ``sources`` and fill every element of ``parameters`` exactly once.

    Args:
        pieces: the weight map.
        parameters: name -> shape of every parameter of the model (:func:`parameter_shapes`).
        sources: name -> shape of every tensor the checkpoint holds, after the family's documented exclusions.

    Raises:
        CheckpointError: with both lists, unused source tensors and unfilled parameters, and every shape mismatch.
    """
    pieces = list(pieces)
    filled: dict[str, list[Box]] = {}
    used: dict[str, list[Box]] = {}
    strides: dict[str, set[tuple[int, int] | None]] = {}
    mismatched = []
    for piece in pieces:
        _assert_fits(piece)
        found = sources.get(piece.source)
        if found is not None and tuple(found) != piece.source_shape:
            mismatched.append(f"{piece.source}: must be {list(piece.source_shape)}, the file has {list(found)}")
        filled.setdefault(piece.target, []).append(piece.target_box or whole(piece.target_shape))
        box = piece.source_box or whole(piece.source_shape)
        used.setdefault(piece.source, []).append(_apart(box, piece.stride))
        turns = None if piece.stride is None else (piece.stride.axis, piece.stride.step)
        strides.setdefault(piece.source, set()).add(turns)
    missing = sorted(set(used) - set(sources))
    unused = sorted(set(sources) - set(used))
    shapes = {name: shape for name, shape in source_shapes(pieces).items() if name in sources}
    expected = {name: _apart_shape(shape, strides[name]) for name, shape in shapes.items()}
    partly = _uncovered(used, expected)
    unfilled = _uncovered(filled, parameters)
    alien = sorted(set(filled) - set(parameters))
    assert not alien, f"weight map fills parameters the model does not have: {alien[:4]}"
    problems = [
        ("tensors the model needs and the checkpoint lacks", missing),
        ("tensors of the checkpoint the model has no place for", unused),
        ("tensors with the wrong shape", sorted(set(mismatched))),
        ("tensors not used exactly once", partly),
        ("parameters not filled exactly once", unfilled),
    ]
    lines = [f"{len(names)} {title}: {_some(names)}" for title, names in problems if names]
    if lines:
        raise CheckpointError(
            "the checkpoint does not match its configuration.\n  " + "\n  ".join(lines) + "\n"
            "Check that config.json belongs to these weight files and that no shard is missing."
        )


def _some(names: list[str], limit: int = 8) -> str:
    shown = ", ".join(name[:200] for name in names[:limit])
    return shown if len(names) <= limit else f"{shown}, ... ({len(names) - limit} more)"
