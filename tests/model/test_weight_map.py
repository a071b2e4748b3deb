"""check_cover finds every gap, overlap and mismatch, wherever it hides, and stays fast."""

import sys

import pytest

from quadriga.errors import CheckpointError
from quadriga.model.config import AttentionSpec, DenseSpec, MoESpec, NormSpec, RopeSpec, uniform_model
from quadriga.model.weight_map import Piece, Stride, check_cover, parameter_shapes

TINY = uniform_model(
    family="dbrx",
    vocab_size=97,
    d_model=48,
    n_layers=4,
    max_seq_len=64,
    norm=NormSpec(kind="layer"),
    mixer=AttentionSpec(n_heads=6, n_kv_heads=2, head_dim=8, position=RopeSpec(theta=5e5)),
    ffn=MoESpec(d_ff=80, n_experts=5, top_k=3, activation="silu"),
)


def block(target_box, source="s", source_box=None):
    shape = tuple(b - a for a, b in target_box)
    return Piece(source=source, source_shape=shape, target="w", target_shape=(6, 9), target_box=target_box)


def tiles(*boxes):
    """Pieces with one source each, so that only the parameter's cover is in question."""
    pieces = [block(box, source=f"s{i}") for i, box in enumerate(boxes)]
    return pieces, {"w": (6, 9)}, {p.source: p.source_shape for p in pieces}


def test_an_irregular_tiling_is_a_cover():
    #  a a b     a: rows 0-6 columns 0-4; b: rows 0-2, columns 4-9; c: rows 2-6, columns 4-7; d: rows 2-6, columns 7-9
    #  a a c d
    check_cover(*tiles(((0, 6), (0, 4)), ((0, 2), (4, 9)), ((2, 6), (4, 7)), ((2, 6), (7, 9))))


@pytest.mark.parametrize(
    "boxes",
    [
        pytest.param([((0, 6), (0, 5)), ((0, 6), (5, 8))], id="a column is missing"),
        pytest.param([((0, 6), (0, 9)), ((2, 3), (1, 2))], id="one element twice"),
        pytest.param([((0, 6), (0, 10))], id="out of range"),
        pytest.param([((0, 3), (0, 9)), ((0, 3), (0, 9))], id="half of it twice, the volume is right"),
        # In sorted order a box stands between the two that overlap, and the volumes add up to the whole.
        pytest.param(
            [((0, 1), (1, 9)), ((0, 6), (0, 1)), ((1, 2), (1, 9)), ((2, 6), (0, 8))], id="overlap of distant boxes"
        ),
    ],
)
def test_gaps_and_overlaps_are_found(boxes):
    with pytest.raises(CheckpointError, match=r"1 parameters not filled exactly once: w"):
        check_cover(*tiles(*boxes))


def by_turns(*starts, step=3, target=(5, 4), axis=1):
    """Pieces that take columns of one source by turns, each for a parameter of its own."""
    shape = (target[0], target[1] * step) if axis == 1 else (target[0] * step, target[1])
    pieces = [
        Piece(
            source="s",
            source_shape=shape,
            target=f"w{i}",
            target_shape=target,
            stride=Stride(axis=axis, step=step, start=start),
        )
        for i, start in enumerate(starts)
    ]
    return pieces, {p.target: target for p in pieces}, {"s": shape}


@pytest.mark.parametrize("axis", [0, 1])
def test_pieces_that_take_turns_are_a_cover(axis):
    check_cover(*by_turns(2, 0, 1, axis=axis))


@pytest.mark.parametrize("starts", [(0, 1), (0, 1, 1)])
def test_a_turn_left_out_or_taken_twice_is_found(starts):
    with pytest.raises(CheckpointError, match="1 tensors not used exactly once: s"):
        check_cover(*by_turns(*starts))


def test_turns_of_different_length_in_one_source_are_our_own_mistake():
    pieces, parameters, sources = by_turns(0, 1, 2)
    whole_too = Piece(source="s", source_shape=(5, 12), source_box=((0, 5), (0, 4)), target="v", target_shape=(5, 4))
    other = by_turns(0, step=4, target=(5, 3))[0][0]
    for one in (whole_too, other):
        with pytest.raises(AssertionError, match="take turns along one axis"):
            check_cover([*pieces, one], {**parameters, one.target: one.target_shape}, sources)


def test_a_source_must_be_used_up():
    piece = Piece(source="s", source_shape=(6, 12), source_box=((0, 6), (0, 9)), target="w", target_shape=(6, 9))
    with pytest.raises(CheckpointError, match=r"1 tensors not used exactly once: s"):
        check_cover([piece], {"w": (6, 9)}, {"s": (6, 12)})


def test_every_fault_is_listed_at_once():
    pieces = [
        Piece(source="a", source_shape=(6, 9), target="w", target_shape=(6, 9)),
        Piece(source="b", source_shape=(5,), target="v", target_shape=(5,)),
    ]
    with pytest.raises(CheckpointError) as caught:
        check_cover(pieces, {"w": (6, 9), "v": (5,), "u": (7,)}, {"a": (9, 6), "c": (2,)})
    message = str(caught.value)
    assert "1 tensors the model needs and the checkpoint lacks: b" in message
    assert "1 tensors of the checkpoint the model has no place for: c" in message
    assert "a: must be [6, 9], the file has [9, 6]" in message
    assert "1 parameters not filled exactly once: u" in message


def test_long_lists_and_long_names_are_cut():
    names = {f"{i:03d}" + "x" * 1_000_000: (2,) for i in range(30)}
    with pytest.raises(CheckpointError) as caught:
        check_cover([], {}, names)
    assert "(22 more)" in str(caught.value)
    assert len(str(caught.value)) < 4000


def test_a_piece_that_does_not_fit_is_our_own_mistake():
    piece = Piece(source="s", source_shape=(9, 6), target="w", target_shape=(6, 9))
    with pytest.raises(AssertionError, match="does not fit"):
        check_cover([piece], {"w": (6, 9)}, {"s": (9, 6)})


def steps_of_cover(n):
    """Lines of Python that the check of n pieces runs."""
    pieces = [
        Piece(
            source=f"e{i}",
            source_shape=(3, 2),
            target="w",
            target_shape=(n, 3, 2),
            target_box=((i, i + 1), (0, 3), (0, 2)),
            view=(1, 3, 2),
        )
        for i in range(n)
    ]
    lines = 0

    def count(frame, event, argument):
        nonlocal lines
        lines += event == "line"
        return count

    before = sys.gettrace()
    sys.settrace(count)
    try:
        check_cover(pieces, {"w": (n, 3, 2)}, {f"e{i}": (3, 2) for i in range(n)})
    finally:
        sys.settrace(before)
    return lines


def test_twice_the_pieces_are_twice_the_work():
    """DBRX has ten thousand: comparing each with each would take minutes."""
    assert 1.9 < steps_of_cover(600) / steps_of_cover(300) < 2.2


def test_shapes_of_a_mixture_of_experts():
    shapes = parameter_shapes(TINY)
    assert shapes["layers.3.attn.wqkv.weight"] == ((6 + 2 * 2) * 8, 48)
    assert shapes["layers.3.attn.wo.weight"] == (48, 48)
    assert shapes["layers.0.moe.router.weight"] == (5, 48)
    assert shapes["layers.0.moe.w_up"] == (5, 80, 48)
    assert shapes["layers.0.moe.w_down"] == (5, 48, 80)
    assert len(shapes) == 3 + 4 * 8


def test_shapes_of_a_plain_tied_network():
    shapes = parameter_shapes(
        uniform_model(
            family="mpt",
            vocab_size=97,
            d_model=48,
            n_layers=2,
            max_seq_len=64,
            norm=NormSpec(kind="layer"),
            mixer=AttentionSpec(n_heads=3, n_kv_heads=3, head_dim=16, position=RopeSpec(theta=1e4)),
            ffn=DenseSpec(d_ff=192, activation="gelu", gated=False),
            tied_embeddings=True,
            post_norms=True,
        )
    )
    assert "lm_head.weight" not in shapes
    assert "layers.0.ffn.w_gate" not in shapes
    assert shapes["layers.1.ffn.w_down"] == (48, 192)
    assert shapes["layers.1.attn_post_norm.weight"] == shapes["layers.1.ffn_post_norm.weight"] == (48,)
