"""What a family is: data and a few pure translations. No nn.Module, no torch."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field, fields, is_dataclass, replace
from typing import TypeVar

from quadriga.errors import CheckpointError, ConfigError
from quadriga.model.config import ModelConfig
from quadriga.model.weight_map import Piece, Shape, source_shapes

T = TypeVar("T")
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
    """Reads config.json without defaults; a key neither read nor in the family's IGNORED raises ConfigError."""
    config_to_hf: Callable[[ModelConfig], dict[str, object]]
    """Writes config.json; raises ConfigError for a model that the format cannot express."""
    layouts: Mapping[str, MapBuilder]
    """Hugging Face layouts by name; the first is the one exports use (e.g. dbrx: fused, split, split-stored...)."""
    read_only: Mapping[str, str] = field(default_factory=dict)
    """Layouts that no conversion writes, each with the reason."""
    gguf_archs: tuple[str, ...] = ()
    """Values of ``general.architecture`` that mean this family (``llama`` with experts is mixtral)."""
    config_from_gguf: Callable[[Mapping[str, object], Mapping[str, Shape]], ModelConfig] | None = None
    """GGUF metadata and tensor shapes -> config."""
    config_to_gguf: Callable[[ModelConfig], dict[str, object]] | None = None
    """The architecture keys to write, e.g. {"dbrx.block_count": 40, ...}, and the ids of special tokens."""
    gguf_map: MapBuilder | None = None
    gguf_split_map: MapBuilder | None = None
    """The same with a tensor an expert, as llama.cpp wrote until it merged them (ggml-org/llama.cpp#6387, April 2024);
    read only."""
    gguf_joined_map: MapBuilder | None = None
    """The same with W_Kb and W_Vb of latent attention in one tensor, as llama.cpp wrote until April 2025
    (ggml-org/llama.cpp#12801); read only."""
    gguf_form: Callable[[ModelConfig], ModelConfig] = lambda config: config
    """The same model as GGUF keeps its numbers, where it keeps some differently (``io.restate``)."""
    hf_form: Callable[[ModelConfig], ModelConfig] = lambda config: config
    """The same as Hugging Face directories keep them."""
    counterpart: str | None = None
    """The family of the same block with the other kind of network: of dense models that of their mixtures, and back."""
    ignored_tensors: tuple[str, ...] = field(default=())
    """fnmatch patterns of stored tensors that carry no information (e.g. ``*.rotary_emb.inv_freq``)."""
    left_out: Callable[[ModelConfig], Collection[str]] = lambda _: ()
    """Stored tensors of a part that is not run, by name (a layer for multi-token prediction); ``notes`` says so."""
    notes: Callable[[Mapping[str, object]], list[str]] = lambda _: []
    """What a config.json or GGUF metadata has beyond the model and is left out, in sentences for people."""
    tied_copies: Mapping[str, str] = field(default_factory=dict)
    """Of a model with tied embeddings: a tensor some writers store all the same -> the tensor it must equal.

    Such a tensor is accepted only if it is byte for byte the one it repeats; if it differs, the checkpoint was not tied
    and reading it as tied would change the model."""


def pick_layout(family: Family, config: ModelConfig, names: Mapping[str, Shape]) -> tuple[str, list[Piece]]:
    """The layout whose source names and shapes best match the stored tensors.

    Layouts are compared on the first layers, up to one of each kind, which is enough to tell them apart and keeps a
    config that promises 10,000 layers of 1,024 experts from filling the memory with pieces.

    Args:
        names: stored tensor -> shape.

    Returns:
        (layout name, its pieces). Where none matches exactly, the closest by number of shared (name, shape) pairs, so
        that the error of ``check_cover`` speaks about the layout the user most likely meant.

    Raises:
        CheckpointError: the config promises far more tensors than are stored, or two layouts fit equally.
    """
    kinds = config.kinds()
    first = replace(config, layers=config.layers[: 1 + max(config.layers.index(kind) for kind in kinds)])
    wanted = {layout: source_shapes(build(first)) for layout, build in family.layouts.items()}

    def score(layout: str) -> int:
        return sum(2 if tuple(names[n]) == shape else 1 for n, shape in wanted[layout].items() if n in names)

    layout = max(wanted, key=score)  # the first of equals
    twins = [other for other in wanted if other != layout and wanted[other] == wanted[layout]]
    if twins:
        raise CheckpointError(
            f"the layouts {layout} and {twins[0]} have the same names and shapes for this model, so a matrix that is "
            "stored transposed in one of them cannot be told from the other. Convert from another layout."
        )
    build = family.layouts[layout]
    promised = sum(n * _tensors_of(replace(config, layers=(kind, kind)), build) for kind, n in kinds.items())
    if promised > 10 * len(names) + 10_000:
        raise CheckpointError(
            f"the configuration asks for {promised} tensors (layout {layout}, {config.n_layers} layers) and the "
            f"checkpoint holds {len(names)}. Check that config.json belongs to these weight files."
        )
    return layout, build(config)


def _tensors_of(twice: ModelConfig, build: MapBuilder) -> int:
    """Stored tensors of one layer, given a model of two of it."""
    once = replace(twice, layers=twice.layers[:1])
    return len(source_shapes(build(twice))) - len(source_shapes(build(once)))


def pick_gguf_map(family: Family, config: ModelConfig, names: Mapping[str, Shape]) -> tuple[str, list[Piece]]:
    """Whether a GGUF file has one tensor a layer for all experts or one for each, and its pieces.

    Raises:
        CheckpointError: the metadata promises far more experts than are stored.
    """
    assert family.gguf_map is not None, "a family whose GGUF config was read has a GGUF map"
    if family.gguf_joined_map is not None and "blk.0.attn_k_b.weight" not in names:
        return "gguf-joined", family.gguf_joined_map(config)
    if family.gguf_split_map is None or "blk.0.ffn_gate.0.weight" not in names:
        return "gguf", family.gguf_map(config)
    build = family.gguf_split_map
    promised = sum(n * _tensors_of(replace(config, layers=(kind, kind)), build) for kind, n in config.kinds().items())
    if promised > 10 * len(names) + 10_000:
        raise CheckpointError(
            f"the metadata asks for {promised} tensors ({config.n_layers} layers) and the file holds {len(names)}"
        )
    return "gguf-split", family.gguf_split_map(config)


def of_kind(spec: object, kind: type[T], form: str) -> T:
    """``spec`` if it is a ``kind``; else ConfigError: the format ``form`` has no words for it."""
    if not isinstance(spec, kind):
        raise ConfigError(f"{form} cannot express this model: it needs a {kind.__name__}, got {spec}")
    return spec


def must_read_back(config: ModelConfig, again: ModelConfig, form: str) -> None:
    """Raise unless a written configuration reads back as the same model: a format must not drop a field in silence.

    Args:
        config: the model that was written.
        again: what the reader makes of it.
        form: the format's name, for the message.
    """
    if config != again:
        shown = "; ".join(f"{path}: {mine} would become {theirs}" for path, mine, theirs in _differences(config, again))
        raise ConfigError(f"{form} cannot express this model. {shown}")


def _differences(mine: object, theirs: object, path: str = "") -> Iterator[tuple[str, object, object]]:
    """(path, one value, the other) of every leaf in which two trees of specs differ; layers that differ alike once."""
    if mine == theirs:
        return
    if isinstance(mine, tuple) and isinstance(theirs, tuple) and is_dataclass(next(iter(mine), None)):
        if len(mine) != len(theirs):
            yield f"number of {path}", len(mine), len(theirs)
        pairs = dict.fromkeys(zip(mine, theirs, strict=False))
        yield from dict.fromkeys(found for pair in pairs for found in _differences(*pair, path))
    elif is_dataclass(mine) and type(mine) is type(theirs):
        for field in fields(mine):
            inner = f"{path}.{field.name}" if path else field.name
            yield from _differences(getattr(mine, field.name), getattr(theirs, field.name), inner)
    else:
        yield path, mine, theirs
