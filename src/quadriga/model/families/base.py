"""What a family is: data and four pure translations. No nn.Module, no torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from quadriga.model.config import ModelConfig
from quadriga.model.weight_map import Piece, Shape

MapBuilder = Callable[[ModelConfig], list[Piece]]


@dataclass(frozen=True, kw_only=True)
class Family:
    """One model family: how its checkpoints are named, configured and laid out."""

    name: str
    presets: Mapping[str, ModelConfig]
    """Published sizes by name, e.g. ``dbrx-132b``."""
    model_types: tuple[str, ...]
    """Values of ``model_type`` in config.json that mean this family."""
    config_from_hf: Callable[[Mapping[str, object]], ModelConfig]
    """Reads config.json with [] and no defaults; a key neither read nor in the family's IGNORED raises ConfigError."""
    config_to_hf: Callable[[ModelConfig], dict[str, object]]
    layouts: Mapping[str, MapBuilder]
    """Hugging Face layouts by name; the first is the one exports use (e.g. dbrx: fused, split, split-linear...)."""
    gguf_archs: tuple[str, ...] = ()
    """Values of ``general.architecture`` that mean this family (``llama`` with experts is mixtral)."""
    config_from_gguf: Callable[[Mapping[str, object], Mapping[str, Shape]], ModelConfig] | None = None
    """GGUF metadata and tensor shapes -> config."""
    config_to_gguf: Callable[[ModelConfig], dict[str, object]] | None = None
    """The architecture keys to write, e.g. {"dbrx.block_count": 40, ...}."""
    gguf_map: MapBuilder | None = None
    ignored_tensors: tuple[str, ...] = field(default=())
    """fnmatch patterns of stored tensors that carry no information (e.g. ``*.rotary_emb.inv_freq``)."""


def pick_layout(family: Family, config: ModelConfig, names: Mapping[str, Shape]) -> tuple[str, list[Piece]]:
    """The layout whose source names and shapes best match the stored tensors.

    Returns:
        (layout name, its pieces). Where none matches exactly, the closest by number of shared (name, shape) pairs, so
        that the error of ``check_cover`` speaks about the layout the user most likely meant.
    """
    ranked: list[tuple[int, int, str, list[Piece]]] = []
    for order, (layout, build) in enumerate(family.layouts.items()):
        pieces = build(config)
        wanted = {piece.source: piece.source_shape for piece in pieces}
        hits = sum(2 if tuple(names[n]) == shape else 1 for n, shape in wanted.items() if n in names)
        ranked.append((hits, -order, layout, pieces))
    hits, _, layout, pieces = max(ranked, key=lambda row: row[:2])
    return layout, pieces


def duplicates_of(values: Sequence[str]) -> list[str]:
    """Values that occur more than once, sorted."""
    seen: set[str] = set()
    return sorted({v for v in values if v in seen or seen.add(v)})  # type: ignore[func-returns-value]
