"""Run a text through a model, one layer in memory at a time, and measure each matrix's inputs and quantisation errors.

    tokens ─embed─► h ─layer 0─► h ─layer 1─► ...      only h and one layer are in memory, so any model
                        │            │                 that can be converted can be calibrated
                        ▼            ▼
                 mean square of every input column, tokens per expert, error of every format

The mean squares weight the search for scales (an error in a column matters as much as the input it is multiplied
with); the errors are used to choose formats under a budget (``quant.format_choice``).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from quadriga.errors import RequestError
from quadriga.io.directory import packed_bytes
from quadriga.io.imatrix_write import ColumnSums
from quadriga.io.open import Checkpoint
from quadriga.io.parameters import Progress
from quadriga.kernels import ops
from quadriga.kernels.arrays import array, tensor
from quadriga.kernels.cpu.packing import pack
from quadriga.model.config import ModelConfig, MoESpec
from quadriga.model.weight_map import parameter_shapes, stays_float32
from quadriga.nn.context import PackedContext
from quadriga.nn.feedforward import FeedForward
from quadriga.nn.linear import Linear, whole
from quadriga.nn.norm import Norm
from quadriga.nn.rope import Rotations
from quadriga.nn.transformer import Block
from quadriga.quant.dtypes import Array
from quadriga.quant.format_choice import Candidate, protected_share

FORMATS = ("q4", "q4m", "q8", "bfloat16")
"""The packed formats that a budget chooses from."""

_ROWS = 256
"""Rows of a matrix sampled to measure a format's error, which varies by a few per cent between samples."""


@dataclass
class Calibration:
    """The measurements on a calibration text."""

    n_tokens: int
    window: int = 0
    """Tokens that were read at once; the last part may be shorter."""
    sums: dict[str, ColumnSums] = field(default_factory=dict)
    """Matrix name (experts by number) -> what came to its columns, and in how many rows."""
    importance: dict[str, Array] = field(default_factory=dict)
    """Matrix name (experts by number) -> (cols,) mean square of its input columns; of an expert with few tokens mixed
    with its layer's."""
    expert_tokens: dict[str, list[int]] = field(default_factory=dict)
    """Parameter prefix such as "layers.0.moe" -> number of tokens that visited each expert."""
    expert_output: dict[str, list[float]] = field(default_factory=dict)
    """Parameter prefix -> per expert, routing weight * L2 norm of its output, summed over its tokens: its contribution
    to the residual stream."""
    candidates: dict[str, list[Candidate]] = field(default_factory=dict)
    """Matrix name -> size and error in each format; empty if errors were not measured."""


@torch.inference_mode()
def calibrate(
    checkpoint: Checkpoint, token_ids: Sequence[int], *, errors: bool, progress: Progress | None = None
) -> Calibration:
    """Run a text through a checkpoint layer by layer.

    Args:
        token_ids: a few thousand tokens of typical text, at most the model's context.
        errors: also measure every format's error on every matrix.
        progress: called after each layer.

    Raises:
        RequestError: no tokens, or ids outside the vocabulary.
    """
    config = checkpoint.config
    if not token_ids or max(token_ids) >= config.vocab_size or min(token_ids) < 0:
        raise RequestError(f"calibration needs at least one token, with ids from 0 to {config.vocab_size - 1}")
    length = min(1024, config.max_seq_len)
    parts = [token_ids[i : i + length] for i in range(0, len(token_ids), length)]
    tokens = torch.tensor([t for part in parts for t in part])
    context = PackedContext([len(part) for part in parts])
    found = Calibration(len(tokens), length)
    h = embed(checkpoint, tokens)
    rotations = Rotations(context.positions, h.dtype, config.max_seq_len)
    for index in range(config.n_layers):
        block = load_block(checkpoint, config, index)
        prefix = f"layers.{index}."
        a, met = _mixed(block, block.attn_norm(h), context, rotations)
        for name, (inputs, weight) in met.items():
            _matrix(found, checkpoint, f"{prefix}{name}.weight", inputs, weight, 1.0, errors)
        h = block.added(h, a, block.attn_post_norm)
        f = _ffn(found, checkpoint, block, prefix, h, errors)
        h = block.scaled(block.added(h, f, block.ffn_post_norm))
        if progress is not None:
            progress(index + 1, config.n_layers, f"layer {index}")
    _ends(found, checkpoint, h, errors)
    return found


def _ends(found: Calibration, checkpoint: Checkpoint, h: Tensor, errors: bool) -> None:
    """Measure the embedding table, to which no vector comes, and the head, which reads the normed last states."""
    config, view = checkpoint.config, checkpoint.parameters
    norm = Norm(config.d_model, config.final_norm)
    norm.load_state_dict(
        {
            name.removeprefix("final_norm."): tensor(view.read(name)).float()
            for name in parameter_shapes(config)
            if name.startswith("final_norm.")
        }
    )
    for name in ("embed.weight", "lm_head.weight"):
        if name in parameter_shapes(config):
            rows = torch.cat(
                [
                    tensor(view.read(name, ((first, first + n), (0, config.d_model)))).float()
                    for first, n in _spread(config.vocab_size, _ROWS)
                ]
            )
            head = name == "lm_head.weight" or config.tied_embeddings
            inputs = norm(h) if head else torch.ones(1, config.d_model)
            _matrix(found, checkpoint, name, inputs, rows, 1.0, errors)
            if not head:
                del found.sums[name]


def _spread(n: int, wanted: int) -> list[tuple[int, int]]:
    """About ``wanted`` of ``n`` rows as 16 runs (first, rows) all over the table."""
    run = min(n, -(-wanted // 16))
    return [(first, run) for first in sorted({round(i * (n - run) / 15) for i in range(16)})]


def _mixed(
    block: Block, x: Tensor, context: PackedContext, rotations: Rotations
) -> tuple[Tensor, dict[str, tuple[Tensor, Tensor]]]:
    """What a layer's mixer makes of x, and of each of its matrices what it met, (rows, columns), and its weight."""
    seen: dict[str, Tensor] = {}
    mixer = next(name for name in ("attn", "conv", "delta", "mamba") if getattr(block, name) is not None)
    linears = {
        f"{mixer}.{name}": module
        for name, module in block.get_submodule(mixer).named_children()
        if isinstance(module, Linear)
    }
    hooks = [
        module.register_forward_pre_hook(lambda _, inputs, name=name: seen.update({name: inputs[0]}))
        for name, module in linears.items()
    ]
    out = block.mixed(x, context, rotations)
    for hook in hooks:
        hook.remove()
    return out, {name: (seen[name].flatten(0, -2), whole(module.weight)) for name, module in linears.items()}


def embed(checkpoint: Checkpoint, tokens: Tensor) -> Tensor:
    """Embed tokens, (N,) -> (N, D) float32, reading only the rows of the table that are needed."""
    view, config = checkpoint.parameters, checkpoint.config
    # In order, so that every stored part is read once; copied, so that none stays in memory.
    distinct = sorted(set(tokens.tolist()))
    rows = [tensor(view.read("embed.weight", ((t, t + 1), (0, config.d_model)))).float().clone() for t in distinct]
    return torch.cat(rows)[torch.searchsorted(torch.tensor(distinct), tokens)] * config.embedding_scale


def load_block(checkpoint: Checkpoint, config: ModelConfig, index: int) -> Block:
    """Load one layer, with float32 weights."""
    with torch.device("meta"):
        block = Block(config.d_model, config.layers[index], index)
    prefix = f"layers.{index}."
    names = [name for name in parameter_shapes(config) if name.startswith(prefix)]
    values = {name.removeprefix(prefix): tensor(checkpoint.parameters.read(name)).float() for name in names}
    block.load_state_dict(values, assign=True)
    return block.eval()


def _ffn(found: Calibration, checkpoint: Checkpoint, block: Block, prefix: str, h: Tensor, errors: bool) -> Tensor:
    x = block.ffn_norm(h)
    if block.ffn is not None:
        return _dense(found, checkpoint, block.ffn, prefix + "ffn.", x, errors)
    moe = block.moe
    assert moe is not None, "a block has one feed-forward or experts"
    spec: MoESpec = moe.spec
    own, judged = moe.reads(x, h)
    ids, weights, _, _ = moe.router(judged)
    combine = moe.aggregation_weights(ids, weights)
    counts = torch.bincount(ids.reshape(-1), minlength=spec.n_experts).tolist()
    found.expert_tokens[prefix + "moe"] = counts
    out, shared = torch.zeros_like(x), None
    if moe.shared is not None:
        shared = _dense(found, checkpoint, moe.shared, prefix + "moe.shared.", x, errors)
    found.expert_output[prefix + "moe"] = added = []
    stacks = {name: whole(getattr(moe, name)) for name in ("w_gate", "w_up", "w_down")}
    even = torch.ones(1, spec.d_ff)
    for expert, count in enumerate(counts):
        token, slot = (ids == expert).nonzero(as_tuple=True)
        rows = own[token]
        gate, up = (
            rows @ stacks[f"w_{part}"][expert].T + (0 if bias is None else bias[expert])
            for part, bias in (("gate", moe.b_gate), ("up", moe.b_up))
        )
        hidden = ops.gated(gate, up, spec.activation)
        y = hidden @ stacks["w_down"][expert].T + (0 if moe.b_down is None else moe.b_down[expert])
        weighted = y * combine[token, slot, None].to(x.dtype)
        added.append(float(weighted.norm(dim=-1).sum()))
        out.index_add_(0, token, weighted)
        share = protected_share(count, len(x) * spec.top_k, spec.n_experts) * spec.n_experts
        for name, inputs in (("w_gate", rows), ("w_up", rows), ("w_down", hidden)):
            weight = stacks[name][expert]
            # Few tokens are not representative, so they are mixed with the whole layer's.
            prior = own if name != "w_down" else (hidden if count else even)
            _matrix(found, checkpoint, f"{prefix}moe.{name}/{expert}", inputs, weight, share, errors, prior)
    return moe.joined(out, shared, x)


def _dense(
    found: Calibration, checkpoint: Checkpoint, ffn: FeedForward, prefix: str, x: Tensor, errors: bool
) -> Tensor:
    """A network that every token visits."""
    hidden = ffn.hidden(x)
    for name, weight, inputs in (("w_gate", ffn.w_gate, x), ("w_up", ffn.w_up, x), ("w_down", ffn.w_down, hidden)):
        if weight is not None:
            _matrix(found, checkpoint, prefix + name, inputs, whole(weight), 1.0, errors)
    return F.linear(hidden, whole(ffn.w_down))


_PRIOR_TOKENS = 16


def _matrix(
    found: Calibration,
    checkpoint: Checkpoint,
    name: str,
    inputs: Tensor,
    weight: Tensor,
    share: float,
    errors: bool,
    prior: Tensor | None = None,
) -> None:
    """Record what came to a matrix and, with ``errors``, the error of every format."""
    square = inputs.float().square().sum(0)
    found.sums[name] = ColumnSums(array(square), len(inputs))
    count = float(len(inputs))
    if prior is not None:
        square = square + _PRIOR_TOKENS * prior.float().square().mean(0)
        count += _PRIOR_TOKENS
    moment = square / count
    moment = moment + moment.mean() * 1e-3 + 1e-30  # columns without input still get a small weight
    found.importance[name] = array(moment)
    if not errors or stays_float32(name):
        return
    step = max(1, len(weight) // _ROWS)
    sample = weight.detach().float()[::step][:_ROWS].contiguous()
    energy = float((sample.square() * moment).sum().clamp_min(1e-30))
    rows, cols = _shape_of(checkpoint.config, name)

    def error(to: str) -> float:
        rounded = tensor(pack(array(sample), to, importance=array(moment)).unpack())
        return float(((rounded - sample).square() * moment).sum()) / energy

    found.candidates[name] = [Candidate(to, packed_bytes((rows, cols), to), share * error(to)) for to in FORMATS]


def _shape_of(config: ModelConfig, name: str) -> tuple[int, int]:
    rows, cols = parameter_shapes(config)[name.split("/")[0]][-2:]
    return rows, cols
