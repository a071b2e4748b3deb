"""Checkpoints of a given shape with random weights, for benchmarks: N(0, 0.02) in bfloat16, written as a stream.

Embeddings are N(0, 1): of 0.02 they would vanish beside what attention adds, which is much the same for all tokens of
a text, and all of them would choose the same experts. `bench/own_driver.py` refuses such models.

python bench/synthetic.py dbrx4b OUT            the reference shape as a Hugging Face DBRX
python bench/synthetic.py mixtral4b OUT         the same sizes as a Mixtral, for peers that cannot read DBRX
python bench/synthetic.py dbrx-132b OUT --packed q4 --layers 40     straight into a packed directory
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from dataclasses import replace
from math import prod
from pathlib import Path

import torch

from quadriga.io import directory as engine_file
from quadriga.io.safetensors import plan_shards, shard_index
from quadriga.kernels.arrays import array
from quadriga.kernels.cpu.packing import pack
from quadriga.model import families
from quadriga.model.config import (
    AttentionSpec,
    DenseSpec,
    LayerSpec,
    ModelConfig,
    MoESpec,
    NormSpec,
    RopeSpec,
    uniform,
    uniform_model,
)
from quadriga.model.weight_map import source_shapes

_ATTN = AttentionSpec(n_heads=16, n_kv_heads=4, head_dim=128, position=RopeSpec(theta=5e5))
_DBRX = uniform_model(
    family="dbrx",
    vocab_size=100352,
    d_model=2048,
    n_layers=10,
    max_seq_len=32768,
    norm=NormSpec(kind="layer"),
    mixer=replace(_ATTN, clip_qkv=8.0),
    ffn=MoESpec(d_ff=3584, n_experts=16, top_k=4, activation="silu", aux_loss_weight=0.05),
)
_MIXTRAL_LAYER = LayerSpec(
    norm=NormSpec(kind="rms"),
    mixer=replace(_ATTN, position=RopeSpec(theta=1e6)),
    ffn=replace(_DBRX.layers[0].ffn, aux_loss_weight=0.0),
)
_MIXTRAL = replace(
    _DBRX, family="mixtral", layers=uniform(_MIXTRAL_LAYER, _DBRX.n_layers), final_norm=_MIXTRAL_LAYER.norm
)
SHAPES: dict[str, ModelConfig] = {
    "dbrx4b": _DBRX,
    "mixtral4b": _MIXTRAL,
    # The launch's ratio of active parameters, 36 B to 70 B: a dense LLaMA beside the reference shape.
    "llama2b": replace(
        _MIXTRAL,
        family="llama2",
        layers=uniform(
            replace(
                _MIXTRAL_LAYER,
                mixer=replace(_MIXTRAL_LAYER.mixer, n_kv_heads=2),
                ffn=DenseSpec(d_ff=8192, activation="silu"),
            ),
            32,
        ),
    ),
    **families.PRESETS,
}
"""What the benchmarks run; published sizes too."""

_BLOCK = 1 << 24
_EMBEDDING_SCALE = 50.0
"""Times 0.02: a stream of about 1 to begin with."""


def numbers() -> Iterator[torch.Tensor]:
    """Endless pieces of N(0, 0.02) in bfloat16: one block of numbers read from random places."""
    generator = torch.Generator().manual_seed(0)
    block = torch.empty(_BLOCK).normal_(0, 0.02, generator=generator).bfloat16()
    while True:
        start = int(torch.randint(0, _BLOCK // 2, (1,), generator=generator))
        yield block[start : start + _BLOCK // 2]


def of_embedding(config: ModelConfig) -> set[str]:
    """Names of the stored tensors that hold the embedding."""
    pieces = next(iter(families.family_of(config).layouts.values()))(config)
    return {piece.source for piece in pieces if piece.target == "embed.weight"}


def take(source: Iterator[torch.Tensor], n: int) -> Iterator[torch.Tensor]:
    """n numbers in pieces."""
    while n:
        piece = next(source)[:n]
        n -= len(piece)
        yield piece


def write_hf(config: ModelConfig, out: Path) -> None:
    """A Hugging Face directory in the family's usual layout; norms are random numbers too, around one."""
    family = families.family_of(config)
    shapes = source_shapes(next(iter(family.layouts.values()))(config))
    plan = plan_shards({name: (shape, "bfloat16") for name, shape in shapes.items()}, 4 << 30)
    out.mkdir(parents=True)
    (out / "config.json").write_text(json.dumps(family.config_to_hf(config)))
    if len(plan.headers) > 1:
        (out / "model.safetensors.index.json").write_text(json.dumps(shard_index(plan)))
    source, embedding = numbers(), of_embedding(config)
    for file, header in plan.headers.items():
        with (out / file).open("wb") as stream:
            stream.write(header)
            for name, (place, _) in plan.places.items():
                if place != file:
                    continue
                for piece in take(source, prod(shapes[name])):
                    values = piece + 1 if len(shapes[name]) == 1 else piece
                    values = values * _EMBEDDING_SCALE if name in embedding else values
                    stream.write(values.contiguous().view(torch.uint8).numpy().data)


def write_packed(config: ModelConfig, out: Path, form: str, n_different: int = 8) -> None:
    """A packed directory made directly: of every shape a few different matrices, repeated."""
    out.mkdir(parents=True)
    shapes = engine_file.packed_shapes(config)
    source, made = numbers(), dict[tuple[tuple[int, ...], str, float], list[bytes]]()
    entries: dict[str, engine_file.Entry] = {}
    file = f"{engine_file.WEIGHTS_STEM}-00001-of-00001.packed"
    offset = 0
    with (out / file).open("wb") as stream:
        for index, (name, shape) in enumerate(shapes.items()):
            one = "float32" if len(shape) == 1 or name.endswith("router.weight") else form
            scale = _EMBEDDING_SCALE if name == "embed.weight" else 1.0
            kinds = made.setdefault((shape, one, scale), [])
            if len(kinds) < n_different:
                values = torch.cat(list(take(source, prod(shape)))).reshape(shape) * scale
                if len(shape) == 1:
                    kinds.append((values.float() + 1).numpy().tobytes())
                else:
                    kinds.append(pack(array(values), one).data.tobytes())
            raw = kinds[index % len(kinds)]
            stream.write(raw)
            entries[name] = engine_file.Entry(
                file=file, offset=offset, shape=shape, format=one, nbytes=len(raw), sha256="0" * 64
            )
            padding = -len(raw) % 4096
            stream.write(bytes(padding))
            offset += len(raw) + padding
    engine_file.write_manifest(
        out, engine_file.Manifest(config=config, parameters=entries, made_from="random", packed=True)
    )


def main() -> None:
    """Parse the command line and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("out", type=Path)
    parser.add_argument("--packed", metavar="FORMAT", help="write a packed directory instead")
    parser.add_argument("--layers", type=int, help="this many layers instead of the shape's own")
    parser.add_argument("--vocab", type=int, help="this many tokens")
    parser.add_argument("--experts", type=int, help="this many experts a layer")
    args = parser.parse_args()
    config = SHAPES[args.shape]
    if args.layers:
        config = config.with_n_layers(args.layers)
    if args.vocab:
        config = replace(config, vocab_size=args.vocab)
    if args.experts:
        assert config.is_moe, "only an MoE has experts"
        config = config.with_ffn(n_experts=args.experts)
    if args.packed:
        write_packed(config, args.out, args.packed)
    else:
        write_hf(config, args.out)


if __name__ == "__main__":
    main()
