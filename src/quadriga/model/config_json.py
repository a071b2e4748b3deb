"""A ModelConfig as plain JSON values and back: what manifests, training runs and ``quadriga info --json`` write.

    {"family": ..., "layers": [{"times": 40, "norm": {...}, "mixer": {"kind": "attention", ...}, "ffn": {...}}], ...}

Tagged alternatives carry their ``kind``; layers that follow each other and are equal stand once, with ``times``.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import asdict, fields
from typing import Any, TypeVar

from quadriga.errors import CheckpointError
from quadriga.model.config import (
    MAX_LAYERS,
    AlibiSpec,
    AttentionSpec,
    DeltaNetSpec,
    DenseSpec,
    FactorScaling,
    LatentAttentionSpec,
    LayerSpec,
    LinearScaling,
    Llama3Scaling,
    LongRopeScaling,
    Mamba2Spec,
    ModelConfig,
    MoESpec,
    NoFeedForward,
    NoMixer,
    NormSpec,
    ProportionalScaling,
    QKNormSpec,
    RopeSpec,
    ShortConvSpec,
    YarnScaling,
    uniform,
)

T = TypeVar("T")
_POSITIONS: dict[str, type] = {"rope": RopeSpec, "alibi": AlibiSpec}
_SCALINGS: dict[str, type] = {
    "linear": LinearScaling,
    "llama3": Llama3Scaling,
    "yarn": YarnScaling,
    "longrope": LongRopeScaling,
    "factors": FactorScaling,
    "proportional": ProportionalScaling,
}
_MIXERS: dict[str, type] = {
    "attention": AttentionSpec,
    "latent_attention": LatentAttentionSpec,
    "short_conv": ShortConvSpec,
    "delta_net": DeltaNetSpec,
    "mamba2": Mamba2Spec,
    "none": NoMixer,
}
_FFNS: dict[str, type] = {"dense": DenseSpec, "moe": MoESpec, "none": NoFeedForward}


def config_to_json(config: ModelConfig) -> dict[str, Any]:
    """A config as plain JSON values: tagged alternatives carry their ``kind``, equal neighbours stand once.

    ``layers`` is a list of layers in order, each with ``times``, how many of it follow each other.
    """
    body = {field.name: getattr(config, field.name) for field in fields(config) if field.name != "layers"}
    body["final_norm"] = asdict(config.final_norm)
    body["layers"] = [
        {"times": len(list(run)), **_layer_to_json(layer)} for layer, run in itertools.groupby(config.layers)
    ]
    return body


def _layer_to_json(layer: LayerSpec) -> dict[str, Any]:
    mixer = {"kind": _kind(_MIXERS, layer.mixer), **asdict(layer.mixer)}
    position = layer.mixer.position if isinstance(layer.mixer, AttentionSpec) else None
    if position is not None:
        mixer["position"] = {"kind": _kind(_POSITIONS, position), **mixer["position"]}
    if isinstance(position, RopeSpec) and position.scaling is not None:
        scaling = {"kind": _kind(_SCALINGS, position.scaling), **mixer["position"]["scaling"]}
        mixer["position"]["scaling"] = {k: list(v) if isinstance(v, tuple) else v for k, v in scaling.items()}
    return {**asdict(layer), "mixer": mixer, "ffn": {"kind": _kind(_FFNS, layer.ffn), **asdict(layer.ffn)}}


def _kind(kinds: Mapping[str, type], spec: object) -> str:
    return next(kind for kind, cls in kinds.items() if type(spec) is cls)


def config_from_json(body: object) -> ModelConfig:
    """The inverse of :func:`config_to_json`; unknown and missing fields are refused. Reads version 1 as well.

    Raises:
        CheckpointError: not the JSON of a config.
        ConfigError: values that no model can have.
    """
    if not isinstance(body, dict):
        raise CheckpointError("there is no model configuration where one must be: it is no JSON object")
    values = dict(body if "layers" in body else _from_version_1(body))
    if not isinstance(values["layers"], list) or len(values["layers"]) > MAX_LAYERS:
        raise CheckpointError(f"the configuration's layers must be a list of at most {MAX_LAYERS} layers")
    layers: list[LayerSpec] = []
    for one in values["layers"]:
        if not isinstance(one, dict):
            raise CheckpointError("every one of the configuration's layers must be an object")
        own = dict(one)
        times = own.pop("times", None)
        layers += uniform(_layer_from_json(own), times)
        if len(layers) > MAX_LAYERS:
            raise CheckpointError(f"the configuration may have at most {MAX_LAYERS} layers")
    values["layers"] = tuple(layers)
    values["final_norm"] = _spec(NormSpec, values.get("final_norm"))
    if isinstance(values.get("eos_ids"), list):
        values["eos_ids"] = tuple(values["eos_ids"])
    return _build(ModelConfig, values)


def _layer_from_json(own: dict[str, Any]) -> LayerSpec:
    mixer = own.get("mixer")
    if isinstance(mixer, dict):
        own["mixer"] = mixer = dict(mixer)
        position = mixer.get("position")
        if isinstance(position, dict) and position.get("scaling") is not None:
            position = {**position, "scaling": _tagged(_SCALINGS, position["scaling"], "scaling")}
        if position is not None:
            mixer["position"] = _tagged(_POSITIONS, position, "position")
        if mixer.get("qk_norm") is not None:
            mixer["qk_norm"] = _spec(QKNormSpec, mixer["qk_norm"])
    own["mixer"] = _tagged(_MIXERS, mixer, "mixer")
    ffn = own.get("ffn")
    if isinstance(ffn, dict) and ffn.get("shared") is not None:
        ffn = {**ffn, "shared": _spec(DenseSpec, ffn["shared"])}
    own["ffn"] = _tagged(_FFNS, ffn, "ffn")
    own["norm"] = _spec(NormSpec, own.get("norm"))
    layer: LayerSpec = _build(LayerSpec, own)
    return layer


def _from_version_1(body: Mapping[str, Any]) -> dict[str, Any]:
    """One attention, one feed-forward and one position for all layers, in today's words."""
    attn, moved = body.get("attn"), ("attn", "position", "ffn", "norm", "post_norms", "n_layers")
    if not isinstance(attn, dict):
        raise CheckpointError("the model configuration has neither layers nor attn")
    layer = {
        "times": body.get("n_layers"),
        "norm": body.get("norm"),
        "mixer": {"kind": "attention", **attn, "position": body.get("position")},
        "ffn": body.get("ffn"),
        "post_norms": body.get("post_norms", False),
    }
    rest = {name: value for name, value in body.items() if name not in moved}
    return {**rest, "layers": [layer], "final_norm": body.get("norm")}


def _tagged(kinds: Mapping[str, type], body: object, where: str) -> Any:
    """The spec that ``body``'s kind names."""
    kind = body.get("kind") if isinstance(body, dict) else None
    if not isinstance(kind, str) or kind not in kinds:
        raise CheckpointError(f"the configuration's {where}.kind must be one of {', '.join(kinds)}; got {kind!r}")
    assert isinstance(body, dict), "it has a kind"
    return _spec(kinds[kind], {key: value for key, value in body.items() if key != "kind"})


def _spec(cls: type, body: object) -> Any:
    if not isinstance(body, dict):
        raise CheckpointError(f"the model configuration lacks its {cls.__name__}")
    return _build(cls, body)


def _build(cls: type[T], fields: dict[str, Any]) -> T:
    try:
        return cls(**fields)
    except TypeError as error:
        raise CheckpointError(f"the model configuration is malformed: {error}") from None
