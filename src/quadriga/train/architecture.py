"""The configuration of a new model: a preset's, with the sizes of a run's file in place of its own.

A preset whose layers differ gives its first ones, so that leading dense layers (dots.llm1) or turns of windows stay.
What has no key of its own keeps its proportion: the width of shared experts and of dense layers to that of the experts,
the rotated part of a head to the head, a factor of embeddings that is the root of d_model to d_model.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from quadriga.errors import ConfigError
from quadriga.model import families
from quadriga.model.config import AttentionSpec, DenseSpec, LayerSpec, ModelConfig, MoESpec, RopeSpec
from quadriga.train.config import ModelSection, RouterSection


def model_config(section: ModelSection, n_vocab: int, end_ids: tuple[int, ...] = ()) -> ModelConfig:
    """The configuration of a new model: a preset with the section's sizes replacing its own.

    Args:
        n_vocab: size of the corpus's vocabulary; the embedding table gets at least as many rows.
        end_ids: the ids that end a text.

    Raises:
        ConfigError: unknown preset, impossible sizes, an embedding table smaller than the vocabulary, or a model that
            the family's config.json has no words for, but for ``aggregate``.
    """
    assert section.preset is not None, "ModelSection checks that preset or start is given"
    base = families.preset(section.preset)
    rows = section.vocab_size or -(-n_vocab // 64) * 64
    if rows < n_vocab:
        raise ConfigError(f"model.vocab_size must be at least the corpus's {n_vocab} ids, got {rows}")
    d_model = section.d_model or base.d_model
    of_width = base.embedding_scale == base.d_model**0.5  # Gemma, Grok-1; Granite's is a number of its own
    made = replace(
        base,
        vocab_size=rows,
        d_model=d_model,
        embedding_scale=d_model**0.5 if of_width else base.embedding_scale,
        max_seq_len=section.max_seq_len or base.max_seq_len,
        layers=_layers(section, base),
        bos_id=None,
        eos_ids=end_ids,
        pad_id=None,
    )
    return _expressible(made)


def require_exportable(config: ModelConfig) -> None:
    """Check that a run's result can be written: before it is trained, not behind.

    Raises:
        ConfigError: the family's config.json has no words for the model.
    """
    families.family_of(config).config_to_hf(config)


def require_stored_bias(config: ModelConfig, router: RouterSection) -> None:
    """Check that a balancing bias that does not fade has a place in what is exported.

    Raises:
        ConfigError: it has none.
    """
    if router.bias_rate and not router.bias_fade and not stores_bias(config):
        raise ConfigError(
            f"router.bias_fade must be above 0 with bias_rate: the files of this family, {config.family}, have no "
            "place for the bias, so it must have faded to 0 by the end; take its default, or a preset that stores it "
            "(dots.llm1)"
        )


def stores_bias(config: ModelConfig) -> bool:
    """True if the files of the model's family have a place for a balancing bias in every mixture."""
    return all(spec.correction for _, spec in config.moe_layers)


def _expressible(config: ModelConfig) -> ModelConfig:
    """The model as its family's files can say it: some have no windows that are as long as the context.

    Such a window hides nothing. Other aggregates than the weighted sum have no words in any file: their runs are
    compared, not exported.
    """
    try:
        _write(config)
    except ConfigError as error:
        without = replace(config, layers=tuple(_without_idle_window(layer, config) for layer in config.layers))
        try:
            _write(without)
        except ConfigError:
            raise ConfigError(f"a model of these sizes could not be exported: {error}") from None
        return without
    return config


def _write(config: ModelConfig) -> None:
    layers = {kind: kind for kind in config.kinds()}
    for kind in layers:
        if isinstance(kind.ffn, MoESpec):
            layers[kind] = replace(kind, ffn=replace(kind.ffn, aggregate="weighted_sum"))
    require_exportable(replace(config, layers=tuple(layers[layer] for layer in config.layers)))


def _without_idle_window(layer: LayerSpec, config: ModelConfig) -> LayerSpec:
    window = layer.attention.window
    idle = window is not None and window >= config.max_seq_len
    return replace(layer, mixer=replace(layer.attention, window=None)) if idle else layer


def _layers(section: ModelSection, base: ModelConfig) -> tuple[LayerSpec, ...]:
    n_layers, kinds = section.n_layers or base.n_layers, base.kinds()
    if len(kinds) > 1 and n_layers > base.n_layers:
        raise ConfigError(
            f"model.n_layers must be at most {base.n_layers}: {section.preset} has layers of {len(kinds)} kinds, of "
            f"which a new model takes the first; got {n_layers}"
        )
    resize = _Resize(section, base)
    made = {kind: resize.layer(kind) for kind in kinds}
    taken = base.layers[:n_layers] if len(kinds) > 1 else (base.layers[0],) * n_layers
    return tuple(made[layer] for layer in taken)


@dataclass(frozen=True)
class _Resize:
    """A preset's layers in a run's sizes."""

    section: ModelSection
    base: ModelConfig

    def __post_init__(self) -> None:
        section, layers = self.section, self.base.kinds()
        if other := next((layer.mixer for layer in layers if type(layer.mixer) is not AttentionSpec), None):
            raise ConfigError(
                "model.preset must be of layers of plain attention, whose sizes the keys of [model] are; "
                f"{section.preset} has {type(other).__name__}"
            )
        if (section.n_experts or section.top_k or section.aggregate) and not self.base.is_moe:
            raise ConfigError(
                "model.n_experts, model.top_k and model.aggregate need a preset with experts; "
                f"{section.preset} is dense"
            )
        turning = any(isinstance(layer.attention.position, RopeSpec) for layer in layers)
        if section.rope_theta is not None and not turning:
            raise ConfigError(f"model.rope_theta needs a preset with rotary positions; {section.preset} has none")

    def layer(self, layer: LayerSpec) -> LayerSpec:
        """One kind of layer."""
        return replace(layer, mixer=self._attention(layer.attention), ffn=self._network(layer.network))

    def _attention(self, spec: AttentionSpec) -> AttentionSpec:
        section = self.section
        n_heads = section.n_heads or spec.n_heads
        resized = section.d_model is not None or section.n_heads is not None
        head_dim = section.head_dim or ((section.d_model or self.base.d_model) // n_heads if resized else spec.head_dim)
        position = spec.position
        if isinstance(position, RopeSpec):
            dim = None if position.dim is None else position.dim * head_dim // spec.head_dim // 2 * 2
            position = replace(position, theta=section.rope_theta or position.theta, dim=dim)
        n_kv_heads = section.n_kv_heads or min(spec.n_kv_heads, n_heads)
        return replace(spec, n_heads=n_heads, n_kv_heads=n_kv_heads, head_dim=head_dim, position=position)

    def _network(self, spec: DenseSpec | MoESpec) -> DenseSpec | MoESpec:
        if isinstance(spec, DenseSpec):
            return replace(spec, d_ff=self._width(spec.d_ff))
        return replace(
            spec,
            d_ff=self._width(spec.d_ff),
            shared=spec.shared and replace(spec.shared, d_ff=self._width(spec.shared.d_ff)),
            n_experts=self.section.n_experts or spec.n_experts,
            top_k=self.section.top_k or spec.top_k,
            aggregate=self.section.aggregate or spec.aggregate,
        )

    def _width(self, d_ff: int) -> int:
        """A network's width; model.d_ff is that of an expert, or of the layers of a dense model."""
        section, base = self.section, self.base
        if section.d_ff is None:
            return d_ff * (section.d_model or base.d_model) // base.d_model
        widths = [layer.network.d_ff for layer in base.kinds() if isinstance(layer.network, MoESpec) or not base.is_moe]
        return d_ff * section.d_ff // widths[0]
