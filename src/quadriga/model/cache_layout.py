"""Which layers of a model keep their positions in blocks of their own: a layer with a window needs its last keys only.

    12 layers that see all, 12 with a window (gpt-oss-20b):  2 groups of 12 layers; a block has room for 12
    10 layers that see all, 50 with a window:                6 groups of 10 layers; a block has room for 10
    all layers alike:                                        1 group; a block has room for all

A **group** is layers with one window and one block table. A **block** holds 16 positions of the layers of any one
group, so that all groups draw from one pool and memory goes wherever it is needed: layer ``slots[i]`` of a block is
that of model layer ``i`` where the block belongs to the group ``groups[i]``.
"""

from __future__ import annotations

from dataclasses import dataclass

from quadriga.model.config import AttentionSpec, ModelConfig
from quadriga.quant.packed import BLOCK_TOKENS

MOST_GROUPS = 8
"""Every group costs a table of each sequence in every pass."""


@dataclass(frozen=True, kw_only=True)
class CacheLayout:
    """How a model's layers share the blocks of its cache."""

    windows: tuple[int | None, ...]
    """Of each group; None: it sees all positions."""
    groups: tuple[int, ...]
    """Of each layer of the model, its group."""
    slots: tuple[int, ...]
    """Of each layer of the model, its place in a block."""

    @property
    def n_groups(self) -> int:
        """Groups, and so block tables of a sequence."""
        return len(self.windows)

    @property
    def slot_layers(self) -> tuple[tuple[int, ...], ...]:
        """Of each place in a block the layers of the model that use it, each in blocks of its own group.

        A place is as wide as the one of them that keeps most.
        """
        layers: dict[int, list[int]] = {}
        for layer, slot in enumerate(self.slots):
            layers.setdefault(slot, []).append(layer)
        return tuple(tuple(layers[slot]) for slot in range(len(layers)))

    def n_blocks(self, n_positions: int) -> int:
        """Blocks that a sequence of so many positions holds between passes, over all groups."""
        return sum(min(-(-n_positions // BLOCK_TOKENS), most_blocks(window, n_positions)) for window in self.windows)


def most_blocks(window: int | None, n_positions: int) -> int:
    """Blocks in which the keys lie that one query sees, at worst: W in a row may begin at a block's last position."""
    return -(-n_positions // BLOCK_TOKENS) if window is None else (window + BLOCK_TOKENS - 2) // BLOCK_TOKENS + 1


def first_needed(window: int | None, position: int) -> int:
    """The first block that a query at ``position``, or a later one, sees."""
    return 0 if window is None else max(0, position - window + 1) // BLOCK_TOKENS


def one_group(n_layers: int) -> CacheLayout:
    """All layers in one group, of which nothing is let go before its sequence ends."""
    return CacheLayout(windows=(None,), groups=(0,) * n_layers, slots=tuple(range(n_layers)))


def cache_layout(config: ModelConfig) -> CacheLayout:
    """The layout of a model: by windows. Layers of different windows may keep keys of different shapes (Gemma 4).

    A recurrent layer, and one without a mixer, keeps nothing in blocks: its place is of no bytes.
    """
    if config.is_recurrent:
        return one_group(config.n_layers)
    seen = [_window(config, layer) for layer in range(config.n_layers)]
    windows = sorted(set(seen), key=lambda window: (window is not None, window or 0))
    size = _group_size([seen.count(window) for window in windows])
    of_groups: list[int | None] = []
    groups, slots = [0] * config.n_layers, [0] * config.n_layers
    for window in windows:
        layers = [layer for layer, other in enumerate(seen) if other == window]
        for place, layer in enumerate(layers):
            groups[layer], slots[layer] = len(of_groups) + place // size, place % size
        of_groups += [window] * -(-len(layers) // size)
    return CacheLayout(windows=tuple(of_groups), groups=tuple(groups), slots=tuple(slots))


def _window(config: ModelConfig, layer: int) -> int | None:
    mixer = config.layers[layer].mixer
    window = mixer.window if isinstance(mixer, AttentionSpec) else None
    return None if window is None or window >= config.max_seq_len else window


def _group_size(counts: list[int]) -> int:
    """Layers of a group: with at most MOST_GROUPS groups the fewest places stay empty; of equals the largest."""

    def n_groups(size: int) -> int:
        return sum(-(-count // size) for count in counts)

    most = max(MOST_GROUPS, len(counts))
    sizes = [size for size in range(1, max(counts) + 1) if n_groups(size) <= most]
    return min(sizes, key=lambda size: (n_groups(size) * size, -size))
