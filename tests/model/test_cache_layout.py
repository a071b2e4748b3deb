"""Layers in groups by their windows, and what a sequence holds of each."""

from __future__ import annotations

from dataclasses import replace

import pytest

from quadriga.model import cost
from quadriga.model.cache_layout import CacheLayout, cache_layout, first_needed, most_blocks, one_group
from quadriga.model.config import ModelConfig, in_order
from quadriga.model.families import preset
from quadriga.runners.compiled import layer_block_bytes, place_bytes


def windows(config: ModelConfig, pattern: list[int | None]) -> ModelConfig:
    """The model with as many layers as windows."""
    layer = config.layers[0]
    layers = in_order(replace(layer, mixer=replace(layer.mixer, window=window)) for window in pattern)
    return replace(config, layers=layers)


def check(config: ModelConfig) -> CacheLayout:
    """The layout, each layer of which has a place of its own in a group of its window."""
    layout = cache_layout(config)
    assert len(set(zip(layout.groups, layout.slots, strict=True))) == config.n_layers
    assert set(layout.groups) == set(range(layout.n_groups)) and len(layout.slot_layers) == max(layout.slots) + 1
    for layer, group in enumerate(layout.groups):
        window = config.layers[layer].mixer.window
        assert layout.windows[group] == (None if window is None or window >= config.max_seq_len else window)
    return layout


def test_gpt_oss_keeps_half_of_its_layers_whole() -> None:
    layout = check(preset("gpt-oss-20b"))
    assert layout.windows == (None, 128) and len(layout.slot_layers) == 12
    assert layout.n_blocks(131_072) == 8192 + 9 and layout.n_blocks(20) == 4


def test_gemma_4_keeps_five_layers_whole_and_the_wider_keys_say_how_wide_a_place_is() -> None:
    config = preset("gemma-4-26b-a4b")
    layout = check(config)
    assert layout.windows == (None, *[1024] * 5) and [len(layers) for layers in layout.slot_layers] == [6] * 5
    assert layout.n_blocks(100_000) == 6250 + 5 * 65
    assert cost.kv_bytes(config, 100_000) == 5 * 4096 * 2 * (100_000 + 5 * 65 * 16)


def test_layers_all_alike_are_one_group() -> None:
    assert check(preset("dbrx-132b")) == one_group(40)
    mistral = check(preset("mistral-7b-v0.1"))
    assert mistral.windows == (4096,) and mistral.n_blocks(32_768) == 257
    assert check(replace(preset("mistral-7b-v0.1"), max_seq_len=4096)) == one_group(32), "a window that hides nothing"


@pytest.mark.parametrize(
    ("pattern", "of_groups", "size"),
    [
        ([512] * 5 + [None], (None, 512, 512, 512, 512, 512), 1),
        (([512] * 5 + [None]) * 10, (None, *[512] * 5), 10),
        (([512] * 5 + [None]) * 4 + [512, 512], (None, *[512] * 6), 4),  # 22 in groups of 4: two places stay empty
        ([512, None, 512, 512, 64], (None, 64, 512, 512, 512), 1),
        ([None, None, None, 512], (None, None, None, 512), 1),
        ([None] * 30 + [512], (*[None] * 6, 512), 5),
    ],
)
def test_groups_are_alike_and_few(pattern: list[int | None], of_groups: tuple[int | None, ...], size: int) -> None:
    layout = check(windows(preset("mistral-7b-v0.1"), pattern))
    assert (layout.windows, len(layout.slot_layers)) == (of_groups, size)


def test_layers_that_keep_different_numbers_share_a_place_as_wide_as_the_wider_one() -> None:
    config = windows(preset("mistral-7b-v0.1"), [512, None])
    wide = replace(config.layers[1], mixer=replace(config.layers[1].mixer, n_kv_heads=4))
    mixed = replace(config, layers=(config.layers[0], wide))
    layout = check(mixed)
    assert layout.windows == (None, 512) and layout.slot_layers == ((0, 1),)
    assert place_bytes(mixed, layout, "bfloat16") == [layer_block_bytes(config.layers[0], "bfloat16")]
    assert layer_block_bytes(wide, "bfloat16") == layer_block_bytes(config.layers[0], "bfloat16") // 2


def test_what_a_query_needs_lies_in_most_blocks_at_worst() -> None:
    for window in range(1, 60):
        spans = [position // 16 - first_needed(window, position) + 1 for position in range(200)]
        assert max(spans) == most_blocks(window, 200), window
        assert all(16 * first_needed(window, p) <= max(0, p - window + 1) for p in range(200))
    assert most_blocks(None, 33) == 3 and first_needed(None, 500) == 0
