"""Run a text through a model, one layer in memory at a time, and measure what comes to each matrix.

    tokens ─embed─► h ─layer 0─► h ─layer 1─► ...      only h and one layer are in memory, so any model
                        │            │                 that can be converted can be calibrated
                        ▼            ▼
                 squares of every input column, tokens per expert   ◄── and backwards: what an error in each row costs

Mean squares weight the search for scales (an error in a column matters as much as the input it is multiplied with), and
second moments let columns make up for each other's errors (``quant.feedback``). What formats cost, measured on the way
back (``edits.sensitivity``), is what a budget chooses by (``quant.format_choice``).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from quadriga.edits.block_trace import Met, embed, load_block, through
from quadriga.edits.format_errors import FormatErrors
from quadriga.edits.sensitivity import costs
from quadriga.errors import RequestError
from quadriga.io.imatrix_write import ColumnSums
from quadriga.io.open import Checkpoint
from quadriga.io.parameters import Progress
from quadriga.kernels.arrays import array, tensor
from quadriga.model.weight_map import parameter_shapes
from quadriga.nn.context import PackedContext
from quadriga.nn.norm import Norm
from quadriga.nn.rope import Rotations
from quadriga.quant.feedback import Importance, Moments

_PRIOR_TOKENS = 16
"""Tokens that a layer's mean counts as beside those that visit an expert."""

_SAMPLED_ROWS = 256
"""Of the embedding table and the head, to measure what formats cost."""


@dataclass
class Calibration:
    """The measurements on a calibration text."""

    n_tokens: int
    window: int = 0
    """Tokens that were read at once; the last part may be shorter."""
    sums: dict[str, ColumnSums] = field(default_factory=dict)
    """Matrix name (experts by number) -> what came to its columns, and in how many rows."""
    importance: dict[str, Importance] = field(default_factory=dict)
    """Matrix name (experts by number) -> (cols,) mean square of its input columns, or their moments; of an expert with
    few tokens mixed with its layer's."""
    expert_tokens: dict[str, list[int]] = field(default_factory=dict)
    """Parameter prefix such as "layers.0.moe" -> number of tokens that visited each expert."""
    expert_output: dict[str, list[float]] = field(default_factory=dict)
    """Parameter prefix -> per expert, routing weight * L2 norm of its output, summed over its tokens: its contribution
    to the residual stream."""


@torch.no_grad()
def calibrate(
    checkpoint: Checkpoint,
    token_ids: Sequence[int],
    *,
    errors: FormatErrors | None = None,
    moments: bool = False,
    progress: Progress | None = None,
) -> Calibration:
    """Run a text through a checkpoint layer by layer.

    Args:
        token_ids: a few thousand tokens of typical text, at most the model's context.
        errors: also measure what every format costs; it is told.
        moments: keep second moments of all columns, :func:`moment_bytes` of them, in place of the mean squares.
        progress: called after each layer, of which there are twice as many with ``errors``.

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
    states = [embed(checkpoint, tokens)]
    rotations = Rotations(context.positions, states[0].dtype, config.max_seq_len)
    recorder = _Recorder(found, moments)
    for index in range(config.n_layers):
        block = load_block(checkpoint, config, index)
        h, routed = through(block, index, states[-1], context, rotations, recorder.see)
        states = [*states, h] if errors is not None else [h]
        if routed is not None:
            found.expert_tokens[f"layers.{index}.moe"] = routed.visits
            found.expert_output[f"layers.{index}.moe"] = routed.outputs
        if progress is not None:
            progress(index + 1, config.n_layers * (1 if errors is None else 2), f"layer {index}")
    head = _Head(checkpoint)
    recorder.table("lm_head.weight" if head.own else "embed.weight", head.norm(states[-1]))
    if head.own:
        found.importance["embed.weight"] = array(torch.ones(config.d_model))
    if errors is not None:
        _measure(errors, found, checkpoint, states, context, rotations, head, progress)
    return found


def moment_bytes(checkpoint: Checkpoint) -> int:
    """Memory of what ``moments`` keeps."""
    shapes = parameter_shapes(checkpoint.config)
    matrices = {name: shape for name, shape in shapes.items() if len(shape) > 1 and not name.endswith(".w_gate")}
    return sum(4 * shape[-1] ** 2 * (shape[0] if len(shape) == 3 else 1) for shape in matrices.values())


class _Recorder:
    """Fills a calibration with what comes to matrices."""

    def __init__(self, found: Calibration, moments: bool) -> None:
        self._found, self._moments = found, moments
        self._last: tuple[Tensor, tuple[ColumnSums, Importance]] | None = None
        self._prior: tuple[Tensor, Tensor] | None = None

    def see(self, met: Met) -> None:
        """Record what came to a matrix; gate and up, which meet the same, share it."""
        if self._last is None or self._last[0] is not met.inputs:
            self._last = met.inputs, self._of(met.inputs.float(), met.prior)
        self._found.sums[met.name], self._found.importance[met.name] = self._last[1]

    def table(self, name: str, inputs: Tensor) -> None:
        """Record what came to the head."""
        self._found.sums[name], self._found.importance[name] = self._of(inputs, None)

    def _of(self, inputs: Tensor, prior: Tensor | None) -> tuple[ColumnSums, Importance]:
        sums, n = ColumnSums(array(inputs.square().sum(0)), len(inputs)), len(inputs)
        made = self._products(inputs)
        if prior is not None:
            if self._prior is None or self._prior[0] is not prior:
                self._prior = prior, self._products(prior.float()) * (_PRIOR_TOKENS / len(prior))
            made, n = made + self._prior[1], n + _PRIOR_TOKENS
        mean = made / max(n, 1)
        if self._moments:
            return sums, Moments.of(array(mean), n)
        return sums, array(mean + mean.mean() * 1e-3 + 1e-30)  # columns without input still get a small weight

    def _products(self, inputs: Tensor) -> Tensor:
        """Of all pairs of columns, or of each with itself, summed over the rows."""
        return inputs.T @ inputs if self._moments else inputs.square().sum(0)


class _Head:
    """The model's last norm and its head, or the table that is both."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        config, view = checkpoint.config, checkpoint.parameters
        self._config, self.own = config, not config.tied_embeddings
        self.norm = Norm(config.d_model, config.final_norm).requires_grad_(requires_grad=False)
        names = [name for name in parameter_shapes(config) if name.startswith("final_norm.")]
        self.norm.load_state_dict({name.removeprefix("final_norm."): tensor(view.read(name)).float() for name in names})
        self._view = view

    def logits(self) -> Any:
        """States (n, D) -> logits (n, V), as ``nn.transformer`` has them; reads the head."""
        config = self._config
        weight = tensor(self._view.read("lm_head.weight" if self.own else "embed.weight")).float()
        bias = tensor(self._view.read("lm_head.bias")).float() if config.head_bias else None

        def apply(h: Tensor) -> Tensor:
            made = F.linear(self.norm(h), weight, bias) * config.logit_scale
            return made if config.logit_cap is None else config.logit_cap * torch.tanh(made / config.logit_cap)

        return apply


def _measure(
    errors: FormatErrors,
    found: Calibration,
    checkpoint: Checkpoint,
    states: list[Tensor],
    context: PackedContext,
    rotations: Rotations,
    head: _Head,
    progress: Progress | None,
) -> None:
    """Tell ``errors`` of every matrix: the layers', and the model's ends by a sample of their rows."""
    config = checkpoint.config

    def judge(name: str, weight: Tensor, cost: Tensor) -> None:
        errors.add(name, weight, cost, found.importance[name], found.importance[name])

    ends = costs(checkpoint, states, context, rotations, head.logits(), judge, progress)
    if head.own:
        rows = _sample(checkpoint, "lm_head.weight")
        judge("lm_head.weight", rows, ends.head.sum().expand(len(rows)) / len(rows))
        found.importance["embed.weight"] = array(ends.embedding)
    rows = _sample(checkpoint, "embed.weight")
    how, each = found.importance["embed.weight"], torch.full((len(rows),), 1 / len(rows))
    errors.add("embed.weight", rows, each * config.embedding_scale**2, how, array(ends.embedding))
    if not head.own:
        errors.add("embed.weight", rows, each * float(ends.head.sum()), how, how)


def _sample(checkpoint: Checkpoint, name: str) -> Tensor:
    """Rows from all over a table, as 16 runs of them."""
    n, columns = parameter_shapes(checkpoint.config)[name]
    run = min(n, _SAMPLED_ROWS // 16)
    starts = sorted({round(i * (n - run) / 15) for i in range(16)})
    read = checkpoint.parameters.read
    return torch.cat([tensor(read(name, ((first, first + run), (0, columns)))).float() for first in starts])
