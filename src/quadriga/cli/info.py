"""``quadriga info NAME|PATH``: what a model is and what it costs, from its configuration alone.

NAME is a preset (``dbrx-132b``); PATH a directory with config.json, a config.json, or a GGUF file, of which only the
header is read. Nothing here imports torch or reads a weight, so the answer comes in well under a second.
"""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any

import typer

from quadriga.errors import ConfigError
from quadriga.model import cost, families
from quadriga.model.config import ModelConfig, MoESpec, RopeSpec
from quadriga.model.weight_map import Shape, parameter_shapes
from quadriga.runtime import memory_bytes

MAX_CONFIG_BYTES = 16 << 20
"""No config.json is larger; a hostile one must not fill the memory."""


def load_config(name_or_path: str) -> ModelConfig:
    """The configuration behind a preset's name or a path.

    Raises:
        ConfigError: neither a preset nor a readable model file.
        CheckpointError: a GGUF header that cannot be read.
    """
    if name_or_path in families.PRESETS:
        return families.PRESETS[name_or_path]
    path = Path(name_or_path).expanduser()
    if path.is_dir():
        return _config_of_directory(path)
    if not path.is_file():
        if "/" in name_or_path or path.suffix:
            raise ConfigError(f"there is no file or directory {name_or_path}. Give a path that exists, or a preset.")
        return families.preset(name_or_path)  # raises, naming the nearest preset
    if path.suffix == ".json":
        return families.config_from_hf(_read_json(path))
    return _config_of_gguf(path)


def _config_of_directory(path: Path) -> ModelConfig:
    if not (path / "config.json").is_file():
        ggufs = sorted(path.glob("*.gguf"))
        if len(ggufs) == 1:
            return _config_of_gguf(ggufs[0])
        raise ConfigError(f"{path} must hold a config.json or one GGUF file; it holds {len(ggufs)} GGUF files")
    config = families.config_from_hf(_read_json(path / "config.json"))
    generation = path / "generation_config.json"
    return families.with_generation_config(config, _read_json(generation)) if generation.is_file() else config


def _config_of_gguf(path: Path) -> ModelConfig:
    from quadriga.checkpoint.gguf import read_header

    header = read_header(path)
    return families.config_from_gguf(header.metadata, {name: t.shape for name, t in header.tensors.items()})


def _read_json(path: Path) -> dict[str, Any]:
    if path.stat().st_size > MAX_CONFIG_BYTES:
        raise ConfigError(f"{path} must be at most {MAX_CONFIG_BYTES} bytes, it has {path.stat().st_size}")
    try:
        raw = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path} must be JSON: {error}") from None
    if not isinstance(raw, dict):
        raise ConfigError(f"{path} must hold a JSON object, it holds a {type(raw).__name__}")
    return raw


def describe(config: ModelConfig, context: int) -> dict[str, Any]:
    """Everything ``info`` says, as JSON-ready values. Sizes are bytes, counts are exact.

    Args:
        config: the model.
        context: cached positions to plan for.
    """
    total, available = memory_bytes()
    return {
        "config": asdict(config),
        "shapes": _shapes(config),
        "parameters": asdict(cost.n_params(config)),
        "context": context,
        "kv_bytes_per_token": {dtype: cost.kv_bytes_per_token(config, dtype) for dtype in ("float32", "bfloat16")},
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
    """Parameters of one layer as ``layers.{i}.``, and those outside the layers."""
    shapes = parameter_shapes(replace(config, n_layers=1))
    return {name.replace("layers.0.", "layers.{i}."): shape for name, shape in shapes.items()}


def info(name_or_path: str, as_json: bool = False, context: int | None = None) -> None:
    """Print what a model is and what it costs.

    Args:
        name_or_path: a preset or a path, see :func:`load_config`.
        as_json: print :func:`describe` as JSON instead of tables.
        context: cached positions to plan for; None takes the model's own limit.

    Raises:
        ConfigError: unknown name, unreadable file, or a context outside the model's.
        CheckpointError: a GGUF header that cannot be read.
    """
    config = load_config(name_or_path)
    if context is None:
        context = config.max_seq_len
    if not 0 <= context <= config.max_seq_len:
        raise ConfigError(f"context must be from 0 to this model's {config.max_seq_len}, got {context}")
    facts = describe(config, context)
    if as_json:
        print(json.dumps({"name": name_or_path, **facts}, indent=2))
    else:
        _print_tables(name_or_path, config, facts)


def info_command(
    name_or_path: Annotated[str, typer.Argument(metavar="NAME|PATH", help="A preset, a model directory or a GGUF.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    context: Annotated[int | None, typer.Option(help="Positions to plan the cache for; default: the model's.")] = None,
) -> None:
    """What a model is and what it costs: shapes, parameters, memory, and whether it fits here."""
    info(name_or_path, as_json, context)


def _print_tables(name: str, config: ModelConfig, facts: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    def titled(title: str, **options: Any) -> Table:
        return Table(title=Text(title, style="bold"), title_justify="left", **options)  # Text: no markup from a path

    console = Console()
    count, memory, context = facts["parameters"], facts["memory_bytes"], f"{facts['context']:,}"
    model = titled(name, show_header=False)
    for label, value in (
        ("family", config.family),
        ("parameters", f"{count['total']:,}"),
        ("active per token", f"{count['active']:,} ({count['active'] / count['total']:.1%})"),
        ("  without the input table", f"{count['active_without_input']:,}"),
        ("layers x width", f"{config.n_layers} x {config.d_model:,}"),
        ("attention", _attention(config)),
        ("feed-forward", _feed_forward(config)),
        ("vocabulary", f"{config.vocab_size:,}" + (", head tied to it" if config.tied_embeddings else "")),
        ("context", f"{config.max_seq_len:,}"),
        ("cache per token", f"{facts['kv_bytes_per_token']['bfloat16']:,} B in bfloat16"),
        ("operations per token", f"{facts['flops_per_token']['without_attention_to_the_past']:.2e} FLOP"),
        (f"  at position {context}", f"{facts['flops_per_token']['at_context']:.2e} FLOP"),
    ):
        model.add_row(label, value)
    console.print(model)

    shapes = titled(f"shapes, i from 0 to {config.n_layers - 1}", show_header=False)
    for parameter, shape in facts["shapes"].items():
        shapes.add_row(parameter, " x ".join(f"{n:,}" for n in shape))
    console.print(shapes)

    sizes = titled(f"GiB; {_gib(memory['available'])} of {_gib(memory['total'])} are free here")
    sizes.add_column("format")
    for column in ("weights", "read per token", f"with {context} positions", "fits"):
        sizes.add_column(column, justify="right")
    for form, row in facts["formats"].items():
        shown = (row["weight_bytes"], row["bytes_read_per_token"], row["bytes_with_context"])
        sizes.add_row(form, *map(_gib, shown), "yes" if row["fits"] else "no")
    console.print(sizes)


def _gib(n_bytes: int) -> str:
    return f"{n_bytes / 2**30:,.2f}"


def _attention(config: ModelConfig) -> str:
    attn = config.attn
    clip = f", clipped to {attn.clip_qkv:g}" if attn.clip_qkv is not None else ""
    place = config.position
    position = f"RoPE {place.theta:g}" if isinstance(place, RopeSpec) else f"ALiBi {place.max_bias:g}"
    return f"{attn.n_heads} heads of {attn.head_dim}, {attn.n_kv_heads} for keys and values{clip}; {position}"


def _feed_forward(config: ModelConfig) -> str:
    ffn = config.ffn
    if isinstance(ffn, MoESpec):
        return f"{ffn.n_experts} experts of width {ffn.d_ff:,}, {ffn.top_k} per token, {ffn.activation}"
    return f"{'gated, ' if ffn.gated else ''}width {ffn.d_ff:,}, {ffn.activation}"
