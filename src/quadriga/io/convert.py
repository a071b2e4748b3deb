"""From any checkpoint to any other: streaming, resumable, and never half-done under its final name.

    open_checkpoint ──► plan (every byte's place) ──► [part: read ► pack ► pwrite] ... ──► fsync ──► rename

At most one part (about 64 MB; a matrix that must be transposed moves whole) is in memory. The work happens in
OUT.part beside the result; a journal there lists the tensors that are safely on disk, so a conversion that was killed
at any instant goes on where it stopped and ends with the same bytes.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from quadriga.errors import CheckpointError
from quadriga.io import convert_options
from quadriga.io.conversion_plan import ConversionPlan, fingerprint, plan_conversion, plan_packed
from quadriga.io.conversion_writer import Writer
from quadriga.io.open import Checkpoint, open_checkpoint
from quadriga.io.parameters import Progress
from quadriga.io.restate import restated, restated_columns
from quadriga.quant.feedback import Importance

MAX_SHARD_BYTES = 4_500_000_000
"""DBRX's release has 61 files of 4.2 to 4.4 GB."""


def convert(
    source: Path,
    out: Path,
    *,
    to: str = "quadriga",
    layout: str | None = None,
    dtype: str | None = None,
    gguf_format: str | Mapping[str, str] | None = None,
    format: str | Mapping[str, str] | None = None,
    embeddings: str | None = None,
    importance: Mapping[str, Importance] | None = None,
    max_shard_bytes: int | None = None,
    resume: bool = True,
    pickles: bool = False,
    progress: Progress | None = None,
) -> ConversionPlan:
    """Convert a checkpoint.

    What has no effect beside the other options is refused: ``io/convert_options.py`` has the table.

    Args:
        source: anything ``open_checkpoint`` opens.
        out: the directory to make (for ``gguf``: the file). Must not exist, or be an empty directory.
        to: "quadriga", "hf" (Hugging Face safetensors) or "gguf".
        layout: for "hf", one of the family's layouts; None is the family's usual one.
        dtype: of plain numbers, for "hf" and for "quadriga" without a format: float32, bfloat16, float16, or "keep",
            which None is too: each tensor as it came (block formats become float32).
        gguf_format: for "gguf": one of ``convert_options.GGUF_FORMATS``, or a recipe: tensor -> format of its own; None
            is bfloat16.
        format: for "quadriga": pack the matrices for the CPU's kernels: one of ``FORMATS_TO_LOAD`` for
            all (routers stay float32, embeddings and head at least q8), or a recipe: matrix -> format
            (``quant.format_choice``).
        embeddings: with ``format``, another one for the embedding table and the head.
        importance: matrix -> (cols,), how much each column's error counts in the search for scales, or the moments of
            what comes to the columns (``quant.feedback``).
        max_shard_bytes: largest safetensors file, unless one tensor alone is larger; None is MAX_SHARD_BYTES.
        resume: go on with an unfinished conversion of the same source with the same options; False starts over.
        pickles: see ``open_checkpoint``.
        progress: called after each part with (bytes written, bytes in all, tensor).

    Returns:
        the plan that was carried out.

    Raises:
        CheckpointError: a bad source, a result that exists, an unfinished conversion of something else, a full disk.
        ConfigError: an option that does not exist or would have no effect, or a model the target format cannot express.
    """
    checkpoint = open_checkpoint(source, pickles=pickles)
    try:
        return write(
            checkpoint,
            out,
            to=to,
            layout=layout,
            dtype=dtype,
            gguf_format=gguf_format,
            format=format,
            embeddings=embeddings,
            importance=importance,
            max_shard_bytes=max_shard_bytes,
            resume=resume,
            progress=progress,
        )
    finally:
        checkpoint.close()


def write(
    checkpoint: Checkpoint,
    out: Path,
    *,
    to: str = "quadriga",
    layout: str | None = None,
    dtype: str | None = None,
    gguf_format: str | Mapping[str, str] | None = None,
    format: str | Mapping[str, str] | None = None,
    embeddings: str | None = None,
    importance: Mapping[str, Importance] | None = None,
    max_shard_bytes: int | None = None,
    resume: bool = True,
    progress: Progress | None = None,
) -> ConversionPlan:
    """:func:`convert` of a checkpoint that is open already, e.g. a derived one; it stays open."""
    given = {"to": to, "layout": layout, "dtype": dtype, "gguf_format": gguf_format, "format": format}
    convert_options.check(
        given | {"embeddings": embeddings, "importance": importance or None, "max_shard_bytes": max_shard_bytes}
    )
    if out.exists() and not (out.is_dir() and to != "gguf" and not any(out.iterdir())):
        raise CheckpointError(f"{out} exists; give a new name, or remove it first")
    config = checkpoint.config
    checkpoint = restated(checkpoint, to)
    importance = restated_columns(importance or {}, config, checkpoint.config)
    if format is None:
        shard_bytes = max_shard_bytes or MAX_SHARD_BYTES
        plan = plan_conversion(checkpoint, out, to, layout, dtype or "keep", gguf_format or "bfloat16", shard_bytes)
    else:
        plan = plan_packed(checkpoint, format, embeddings)
    writer = Writer(out.with_name(out.name + ".part"), plan, fingerprint(checkpoint, plan), resume)
    writer.run(checkpoint, progress, importance)
    writer.put_in_place(out)
    return plan
