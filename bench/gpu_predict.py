"""What GPUs could make of the kernels, on paper: bytes and FLOPs of every operation beside published peaks.

    python bench/gpu_predict.py            the tables of docs/gpu.md
    python bench/gpu_predict.py --write    into docs/gpu.md

    seconds of an operation >= max(bytes / bandwidth, FLOPs of whole tiles / bf16 peak);  a step is their sum

A roofline and no measurement. It leaves out what only a GPU can tell: gaps between launches, what share of its
bandwidth a kernel reaches, latency between GPUs. Weights are counted once a step, and as many experts as evenly routed
tokens visit; FLOPs are those of the tiles in ``kernels.triton.tiles``, padding included.
"""

from __future__ import annotations

import argparse
import math
from dataclasses import dataclass
from pathlib import Path

from quadriga.kernels.triton.tiles import FEW_ROWS, tile
from quadriga.kernels.triton.weights import BITS
from quadriga.model.config import AttentionSpec, LayerSpec, ModelConfig, MoESpec
from quadriga.model.cost import expected_distinct_experts, kv_bytes, n_params, state_bytes, step_flops
from quadriga.model.families import PRESETS
from quadriga.model.plan.hardware import BOXES, GPUS
from quadriga.model.weight_map import layer_shapes

DOCS = Path(__file__).parents[1] / "docs" / "gpu.md"
BEGIN, END = "<!-- predicted: python bench/gpu_predict.py --write -->", "<!-- end of what is predicted -->"
_USABLE = 0.92
"""Share of the memory for weights and cache."""
_GIB = 2**30 / 10**9
"""What makers call a GB of a GPU's memory is a GiB: stacks of 16 or 24 of them, less what the driver keeps."""
_TABLES = "q8"
"""Format of the embedding table and the head beside weights of fewer bits, as ``quadriga convert`` writes them."""


@dataclass(frozen=True)
class Device:
    """One GPU of a machine of ``count``, over which every matrix and the cache are spread evenly."""

    name: str
    memory_bytes: float
    bytes_per_s: float
    peak_flops: float
    count: int = 1
    link_bytes_per_s: float = math.inf
    """To the others, one direction."""


@dataclass(frozen=True)
class Op:
    """One operation of a step, over all layers that have it."""

    name: str
    n_bytes: float
    flops: float
    """Of whole tiles."""

    def seconds(self, device: Device) -> float:
        """The roofline's bound."""
        return max(self.n_bytes / device.bytes_per_s, self.flops / device.peak_flops) / device.count

    def bound(self, device: Device) -> str:
        """What bounds it."""
        return "bytes" if self.n_bytes / device.bytes_per_s >= self.flops / device.peak_flops else "FLOPs"


def product(name: str, rows: int, outputs: int, depth: int, form: str, copies: int = 1) -> Op:
    """Rows times one matrix (outputs, depth), of ``copies`` layers."""
    return experts(name, rows, 1, 1.0, outputs, depth, form, copies)


def experts(
    name: str, rows: int, n_experts: int, visited: float, outputs: int, depth: int, form: str, copies: int
) -> Op:
    """Rows spread over ``visited`` of n_experts matrices (outputs, depth)."""
    shape = tile(form, rows / n_experts, gated=name == "gate, up")
    tiles = visited * math.ceil(rows / visited / shape.rows - 1e-9)
    flops = 2 * tiles * shape.rows * (math.ceil(outputs / shape.outputs) * shape.outputs) * depth
    weights = visited * outputs * depth * _bits(form) / 8
    return Op(name, copies * (weights + 2 * rows * (depth + outputs)), copies * flops)


def layer_ops(config: ModelConfig, layer: LayerSpec, copies: int, tokens: int, context: int, form: str) -> list[Op]:
    """The operations of ``copies`` equal layers in a step of ``tokens`` sequences of ``context`` positions each."""
    d_model = config.d_model
    found = [Op("norms, rotation, residuals", copies * tokens * d_model * 2 * 8, 0)]
    for name, shape in layer_shapes(layer, d_model).items():
        if name == "moe.router.weight":
            found.append(Op("router", copies * (4 * math.prod(shape) + 2 * tokens * d_model), 0))
        elif len(shape) == 2 and not name.endswith(".taps"):
            kind = "attention's matrices" if name.startswith(("attn", "conv", "delta", "mamba")) else "dense networks"
            found.append(product(kind, tokens, *shape, form, copies))
    seen = context
    if isinstance(layer.mixer, AttentionSpec):
        seen = min(context, layer.mixer.window or context)
        flops = 2.0 * layer.mixer.attended_dim * seen
    else:
        flops = float(step_flops(layer.mixer))
    cached = 2 * layer.mixer.state.numbers_per_token * seen + 4 * layer.mixer.state.numbers_per_sequence
    found.append(Op("attention", copies * tokens * cached, copies * tokens * flops))
    if isinstance(layer.ffn, MoESpec):
        ffn, rows = layer.ffn, tokens * layer.ffn.top_k
        visited = expected_distinct_experts(ffn, tokens)
        found += [
            experts("gate, up", rows, ffn.n_experts, visited, 2 * ffn.d_ff, d_model, form, copies),
            experts("down", rows, ffn.n_experts, visited, d_model, ffn.d_ff, form, copies),
            Op("weighted sum", copies * 2 * d_model * (rows + 2 * tokens), 0),
        ]
    return found


def step_ops(config: ModelConfig, tokens: int, context: int, form: str) -> list[Op]:
    """The operations of a decode step, equal names added up."""
    found = [op for layer, n in config.kinds().items() for op in layer_ops(config, layer, n, tokens, context, form)]
    found.append(product("head", tokens, config.vocab_size, config.d_model, _of_tables(form)))
    names = list(dict.fromkeys(op.name for op in found))
    alike = [[op for op in found if op.name == name] for name in names]
    return [
        Op(ops[0].name, sum(op.n_bytes for op in ops), sum(op.flops for op in ops)) for ops in alike
    ]  # fmt: skip


def exchange_seconds(config: ModelConfig, device: Device, tokens: int) -> float:
    """Two sums over all GPUs a layer, of (tokens, d_model) bfloat16; their latency is left out."""
    n_bytes = 2 * 2 * (device.count - 1) / device.count * tokens * config.d_model * 2
    return config.n_layers * n_bytes / device.link_bytes_per_s


def weight_bytes(config: ModelConfig, form: str) -> float:
    """Of all matrices in ``form``, but the tables."""
    tables = config.vocab_size * config.d_model * (1 if config.tied_embeddings else 2)
    return ((n_params(config).total - tables) * _bits(form) + tables * _bits(_of_tables(form))) / 8


def _bits(form: str) -> float:
    return BITS[form] if form != "plain" else 16


def _of_tables(form: str) -> str:
    return form if _bits(form) >= BITS[_TABLES] else _TABLES


def tokens_per_s(config: ModelConfig, device: Device, form: str, batch: int, context: int) -> float | None:
    """The bound on tokens a second of all sequences together; None where weights and caches do not fit."""
    needed = weight_bytes(config, form) + batch * (kv_bytes(config, context) + state_bytes(config))
    if needed > _USABLE * device.memory_bytes * device.count:
        return None
    seconds = sum(op.seconds(device) for op in step_ops(config, batch, context, form))
    return batch / (seconds + exchange_seconds(config, device, batch))


def _devices() -> dict[str, Device]:
    h100, h200 = GPUS["H100"], GPUS["H200"]
    cards = next(box for box in BOXES if box.name.startswith("4x RTX 4090"))
    return {
        "H100": Device("1x H100 80 GB", _GIB * h100.memory_bytes, h100.hbm_bytes_per_s, h100.peak_flops),
        "H200": Device("1x H200 141 GB", _GIB * h200.memory_bytes, h200.hbm_bytes_per_s, h200.peak_flops),
        "8xH100": Device(
            "8x H100 80 GB", _GIB * h100.memory_bytes, h100.hbm_bytes_per_s, h100.peak_flops, 8, h100.node_bytes_per_s
        ),
        "4090": Device("1x RTX 4090 24 GB", _GIB * cards.memory_bytes / 4, cards.bytes_per_s / 4, cards.peak_flops / 4),
    }


_MODELS = (
    ("dbrx-132b", "q4", "H100"),
    ("dbrx-132b", "mxfp4", "H100"),
    ("dbrx-132b", "q4", "H200"),
    ("dbrx-132b", "q4", "8xH100"),
    ("dbrx-132b", "plain", "8xH100"),
    ("qwen3-30b-a3b", "q4", "4090"),
    ("qwen3-30b-a3b", "q4", "H100"),
)
_BATCHES = (1, 8, 64, 256)
_CONTEXT = 2048
_SAID = {"plain": "bf16"}


def _row(*cells: object) -> str:
    return "| " + " | ".join(str(cell) for cell in cells) + " |"


def model_table() -> list[str]:
    """Tokens a second of whole models."""
    devices = _devices()
    lines = [
        _row("model", "weights", "GB", "GPU", *(f"batch {n}" for n in _BATCHES)),
        _row(*["---"] * 4, *["---:"] * len(_BATCHES)),
    ]
    for name, form, gpu in _MODELS:
        config = PRESETS[name]
        bounds = (tokens_per_s(config, devices[gpu], form, batch, _CONTEXT) for batch in _BATCHES)
        said = ("does not fit" if bound is None else f"{bound:,.0f}" for bound in bounds)
        size = f"{weight_bytes(config, form) / 1e9:.0f}"
        lines.append(_row(name, _SAID.get(form, form), size, devices[gpu].name, *said))
    return lines


def op_table(name: str, form: str, gpu: str, batches: tuple[int, ...]) -> list[str]:
    """Operations of a decode step, all layers together."""
    config, device = PRESETS[name], _devices()[gpu]
    lines = [
        _row("batch", "operation", "GB", "TFLOP in tiles", "FLOP a byte", "bound by", "ms", "share"),
        _row("---:", "---", *["---:"] * 3, "---", *["---:"] * 2),
    ]
    for batch in batches:
        ops = step_ops(config, batch, _CONTEXT, form)
        whole = sum(op.seconds(device) for op in ops)
        for op in ops:
            seconds = op.seconds(device)
            lines.append(
                _row(
                    batch, op.name, f"{op.n_bytes / 1e9:.3f}", f"{op.flops / 1e12:.3f}", f"{op.flops / op.n_bytes:.0f}",
                    op.bound(device), f"{seconds * 1e3:.3f}", f"{seconds / whole:.0%}",
                )
            )  # fmt: skip
    return lines


def text() -> str:
    """What stands in docs/gpu.md between the marks."""
    parts = [
        f"Tokens a second of all sequences together, each with {_CONTEXT} positions in its cache (bfloat16):",
        "",
        *model_table(),
        "",
        f"A decode step of dbrx-132b in q4 on one H200, its operations over all layers. A tile has {FEW_ROWS} rows at"
        " least, which is why a token alone costs as many FLOPs as a few:",
        "",
        *op_table("dbrx-132b", "q4", "H200", (1, 64)),
    ]
    return "\n".join(parts)


def main() -> None:
    """Print or write."""
    parser = argparse.ArgumentParser(description="Rooflines of the kernels for GPUs.")
    parser.add_argument("--write", action="store_true", help="into docs/gpu.md, between its marks")
    if not parser.parse_args().write:
        print(text())
        return
    before, _, rest = DOCS.read_text().partition(BEGIN)
    _, _, after = rest.partition(END)
    DOCS.write_text(f"{before}{BEGIN}\n{text()}\n{END}{after}")


if __name__ == "__main__":
    main()
