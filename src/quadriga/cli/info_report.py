"""``quadriga info NAME|PATH``: what a model is and what it costs, from its configuration alone.

NAME is a preset (``dbrx-132b``); PATH is any checkpoint, of which only the configuration or the header is read. Nothing
here imports torch or reads a weight, so the answer comes in well under a second.
"""

from __future__ import annotations

import json
import re
from dataclasses import asdict
from pathlib import Path
from typing import Any

from quadriga.errors import ConfigError
from quadriga.hub import catalogue
from quadriga.io.detect import locate
from quadriga.model import cost, families
from quadriga.model.config import (
    AlibiSpec,
    AttentionSpec,
    DeltaNetSpec,
    LatentAttentionSpec,
    LayerSpec,
    Mamba2Spec,
    ModelConfig,
    MoESpec,
    NoFeedForward,
    NoMixer,
    RopeSpec,
    ShortConvSpec,
)
from quadriga.model.config_json import config_to_json
from quadriga.model.weight_map import Shape, parameter_shapes
from quadriga.runtime import memory_bytes


def load_config(name_or_path: str) -> ModelConfig:
    """The configuration behind a preset's name, any name of a model (:func:`catalogue.described`) or a path.

    Raises:
        CatalogueError: the configuration could not be fetched, or nothing is there.
        ConfigError: no preset of this name, or a configuration that is not supported.
        CheckpointError: nothing at the path that is a checkpoint.
    """
    return _load(name_or_path)[0]


def _load(name_or_path: str) -> tuple[ModelConfig, tuple[str, ...]]:
    """:func:`load_config`, and what the files left open and how it was read."""
    if name_or_path in families.PRESETS:
        return families.PRESETS[name_or_path], ()
    is_name = not (Path(name_or_path).expanduser().exists() or re.search(r"[/.:]", name_or_path))
    if is_name and not catalogue.is_known(name_or_path):
        return families.preset(name_or_path), ()  # raises, naming the nearest preset
    path = catalogue.described(name_or_path)
    found = locate(path)
    return found.config, found.notes


def describe(config: ModelConfig, context: int) -> dict[str, Any]:
    """Everything ``info`` says, as JSON-ready values. Sizes are bytes, counts are exact.

    Args:
        config: the model.
        context: cached positions to plan for.
    """
    total, available = memory_bytes()
    return {
        "config": config_to_json(config),
        "shapes": _shapes(config),
        "parameters": asdict(cost.n_params(config)),
        "context": context,
        "kv_bytes_per_token": {dtype: cost.kv_bytes_per_token(config, dtype) for dtype in ("float32", "bfloat16")},
        "state_bytes": cost.state_bytes(config),
        "kv_bytes": {dtype: cost.kv_bytes(config, context, dtype) for dtype in ("float32", "bfloat16")},
        "flops_per_token": {
            "without_attention_to_the_past": cost.flops_per_token(config, 0),
            "at_context": cost.flops_per_token(config, context),
        },
        "memory_bytes": {"total": total, "available": available},
        "formats": {
            form: {
                "weight_bytes": cost.weight_bytes(config, form),
                "bytes_read_per_token": cost.bytes_read_per_token(config, form),
                "bytes_with_context": cost.memory_needed(config, form, context),
                "fits": cost.fits(config, form, context, available),
            }
            for form in cost.FORMATS
        },
    }


def _shapes(config: ModelConfig) -> dict[str, Shape]:
    """Parameters outside the layers, and each kind of layer's once: ``layers.{i}.``, or ``layers.{2,5}.``."""
    kinds = config.kinds()
    shown: dict[str, Shape] = {}
    for name, shape in parameter_shapes(config).items():
        prefix, _, rest = name.partition(".")
        if prefix != "layers":
            shown[name] = shape
            continue
        number, _, own = rest.partition(".")
        layer = config.layers[int(number)]
        members = [str(i) for i, other in enumerate(config.layers) if other == layer] if len(kinds) > 1 else ["i"]
        shown.setdefault("layers.{" + ",".join(members) + "}." + own, shape)
    return shown


def info(name_or_path: str, as_json: bool = False, context: int | None = None) -> None:
    """Print what a model is and what it costs.

    Args:
        name_or_path: a preset or a path, see :func:`load_config`.
        as_json: print :func:`describe` as JSON instead of tables.
        context: cached positions to plan for; None takes the model's own limit.

    Raises:
        ConfigError: unknown name, unsupported configuration, or a context outside the model's.
        CheckpointError: nothing at the path that is a checkpoint.
    """
    config, notes = _load(name_or_path)
    if context is None:
        context = config.max_seq_len
    if not 0 <= context <= config.max_seq_len:
        raise ConfigError(f"context must be from 0 to this model's {config.max_seq_len}, got {context}")
    facts = describe(config, context)
    if as_json:
        print(json.dumps({"name": name_or_path, "notes": notes, **facts}, indent=2))
    else:
        _print_tables(name_or_path, config, facts, notes)


def _print_tables(name: str, config: ModelConfig, facts: dict[str, Any], notes: tuple[str, ...]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    def titled(title: str, **options: Any) -> Table:
        return Table(title=Text(title, style="bold"), title_justify="left", **options)  # Text: no markup from a path

    console = Console()
    count, memory, context = facts["parameters"], facts["memory_bytes"], f"{facts['context']:,}"
    console.print(Text(name, style="bold"), soft_wrap=True)  # a long path stays one line, to be copied
    model = Table(show_header=False)
    for label, value in (
        ("family", config.family),
        ("parameters", f"{count['total']:,}"),
        ("active per token", f"{count['active']:,} ({count['active'] / count['total']:.1%})"),
        ("  without the input table", f"{count['active_without_input']:,}"),
        ("layers x width", f"{config.n_layers} x {config.d_model:,}"),
        *_layers(config),
        ("vocabulary", f"{config.vocab_size:,}" + (", head tied to it" if config.tied_embeddings else "")),
        ("context", f"{config.max_seq_len:,}"),
        ("cache per token", f"{facts['kv_bytes_per_token']['bfloat16']:,} B in bfloat16"),
        *([("cache per sequence", f"{facts['state_bytes']:,} B")] if facts["state_bytes"] else []),
        (f"  of {context} positions", f"{facts['kv_bytes']['bfloat16']:,} B"),
        ("operations per token", f"{facts['flops_per_token']['without_attention_to_the_past']:.2e} FLOP"),
        (f"  at position {context}", f"{facts['flops_per_token']['at_context']:.2e} FLOP"),
    ):
        model.add_row(label, value)
    console.print(model)
    for note in notes:
        console.print(Text(f"Note: {note}."), soft_wrap=True)

    shapes = titled(f"shapes, i from 0 to {config.n_layers - 1}", show_header=False)
    for parameter, shape in facts["shapes"].items():
        shapes.add_row(parameter, " x ".join(f"{n:,}" for n in shape))
    console.print(shapes)

    sizes = titled(f"memory; {_size(memory['available'])} of {_size(memory['total'])} are free here")
    sizes.add_column("format")
    for column in ("weights", "read per token", f"with {context} positions", "fits"):
        sizes.add_column(column, justify="right")
    for form, row in facts["formats"].items():
        shown = (row["weight_bytes"], row["bytes_read_per_token"], row["bytes_with_context"])
        sizes.add_row(form, *map(_size, shown), "yes" if row["fits"] else "no")
    console.print(sizes)


def _size(n_bytes: int) -> str:
    return f"{n_bytes / 2**30:,.1f} GiB" if n_bytes >= 2**30 else f"{n_bytes / 2**20:,.1f} MiB"


def _layers(config: ModelConfig) -> list[tuple[str, str]]:
    """Attention and feed-forward of every kind of layer; with several kinds each line says how many layers it is of."""
    kinds = config.kinds()
    rows: list[tuple[str, str]] = []
    for title, describe_layer in (
        ("mixer" if config.is_recurrent else "attention", _mixer),
        ("feed-forward", _feed_forward),
    ):
        of_text: dict[str, int] = {}
        for layer, n in kinds.items():
            of_text[describe_layer(layer)] = of_text.get(describe_layer(layer), 0) + n
        rows += [(title if len(of_text) == 1 else f"{title}, {n} layers", text) for text, n in of_text.items()]
    return rows


def _mixer(layer: LayerSpec) -> str:
    match layer.mixer:
        case ShortConvSpec(width=width, taps=taps):
            return f"gated convolution of {width:,} channels over {taps} positions"
        case DeltaNetSpec() as delta:
            heads = f"{delta.n_v_heads} heads of {delta.k_dim} x {delta.v_dim}, {delta.n_k_heads} for queries and keys"
            return f"gated delta rule, {heads}; convolutions over {delta.taps} positions"
        case Mamba2Spec() as mamba:
            heads = f"{mamba.n_heads} heads of {mamba.state_dim} x {mamba.head_dim} in {mamba.n_groups} groups"
            return f"state-space model (Mamba-2), {heads}; convolutions over {mamba.taps} positions"
        case NoMixer():
            return "none"
        case AttentionSpec() as attention:
            return _attention(attention)


def _attention(attn: AttentionSpec) -> str:
    clip = f", clipped to {attn.clip_qkv:g}" if attn.clip_qkv is not None else ""
    gated = ", output gated" if attn.output_gate else ""
    match attn.position:
        case RopeSpec(theta=theta, dim=dim):
            position = f"RoPE {theta:g}" + ("" if dim is None else f" of the first {dim} numbers")
        case AlibiSpec(max_bias=max_bias):
            position = f"ALiBi {max_bias:g}"
        case None:
            position = "no positions"
    if isinstance(attn, LatentAttentionSpec):
        through = "" if attn.q_rank is None else f", queries through one of {attn.q_rank:,}"
        return (
            f"{attn.n_heads} heads of {attn.nope_dim} + {attn.rope_dim} over one latent of {attn.kv_rank:,} + "
            f"{attn.rope_dim} a token, values of {attn.v_dim}{through}; {position} of the {attn.rope_dim}"
        )
    return f"{attn.n_heads} heads of {attn.head_dim}, {attn.n_kv_heads} for keys and values{clip}{gated}; {position}"


def _feed_forward(layer: LayerSpec) -> str:
    ffn = layer.ffn
    if isinstance(ffn, NoFeedForward):
        return "none"
    if isinstance(ffn, MoESpec):
        plain = ffn.score == "softmax" and not ffn.correction
        router = "" if plain else f", chosen by {ffn.score}"
        groups = "" if ffn.n_groups == 1 else f" in {ffn.top_k_groups} of {ffn.n_groups} groups"
        corrected = " with a correction" if ffn.correction else ""
        shared = "" if ffn.shared is None else f"; beside them a shared network of width {ffn.shared.d_ff:,}"
        experts = f"{ffn.n_experts} experts of width {ffn.d_ff:,}, {ffn.top_k} per token, {ffn.activation}"
        return experts + router + corrected + groups + (", with biases" if ffn.expert_bias else "") + shared
    return f"{'gated, ' if ffn.gated else ''}width {ffn.d_ff:,}, {ffn.activation}"
