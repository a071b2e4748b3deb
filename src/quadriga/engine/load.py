"""Load a model by name or path: its files, its tokenizer, and what computes it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from quadriga.engine.llm import LLM
from quadriga.engine.load_options import LoadOptions
from quadriga.engine.shared import on_ranks, shared_runner
from quadriga.errors import ConfigError
from quadriga.hub import catalogue
from quadriga.io.open import Checkpoint, open_checkpoint
from quadriga.io.packed import is_quantised
from quadriga.io.suggested import suggested
from quadriga.runners import make
from quadriga.runners.base import Runner
from quadriga.runners.ranks import Links
from quadriga.text import template_process

Progress = Callable[[int, int, str], None]
"""Called with (bytes done, bytes in all, what is being read)."""


def load(
    path_or_name: str | Path,
    *,
    format: str | None = None,
    dtype: str | None = None,
    device: str = "cpu",
    threads: int | None = None,
    activations: str | None = None,
    kv_format: str | None = None,
    kv_memory: int | None = None,
    expert_memory: int | None = None,
    max_sequences: int = 64,
    max_batch_tokens: int = 2048,
    parallel: str | None = None,
    progress: Progress | None = None,
) -> LLM:
    """Load a model.

    What has no effect beside the other options is refused: ``engine/load_options.py`` has the table.

    Args:
        path_or_name: a catalogue name (`quadriga models list`), a Hugging Face or Quadriga directory, a GGUF file, or
            the folder of Grok-1's release.
        format: what its matrices are packed as for kernels: keep (as they are stored), float32, bfloat16, q8, q4, q4m,
            q5, q5m, mx4, q2k to q6k, iq4nl, iq4xs; None is keep. On the kernels for GPUs (QUADRIGA_OPS=triton) a
            quantised one.
        dtype: compute in plain torch with this dtype instead (float32, bfloat16, float16, float64 or auto); None runs
            the CPU's kernels where the device is a CPU, and is "auto" elsewhere. What the kernels for GPUs compute in.
        device: cpu, cuda, a CUDA device such as cuda:1, or auto.
        threads: CPU threads; None takes all of this process's processors.
        activations: what the kernels multiply quantised matrices with: int8, int16 (twice the work of a prompt, the
            result of float32), or auto: int16 for models of fewer than a billion parameters; None is auto.
        kv_format: the kernels' cache of keys and values: float32, bfloat16 or q8; None is bfloat16. Torch's cache is of
            the weights' type.
        kv_memory: bytes for it; None takes what 4 full contexts need, at most a quarter of the free memory.
        expert_memory: leave the experts of a packed Quadriga directory on disk and keep at most this many bytes of the
            recently used ones in memory; None loads everything.
        max_sequences: requests that run at once.
        max_batch_tokens: tokens of one pass; a long prompt goes in pieces of at most this many beside other answers.
        parallel: share the model among the ranks that torchrun has started, e.g. tp=2,ep=2,pp=3; see docs/cluster.md.
            Memory and threads are then those of each rank. On rank 0 this returns; on all others it takes part in what
            rank 0 computes until that ends, and then raises SystemExit.
        progress: called while weights are downloaded and read.

    Raises:
        CatalogueError: no model of that name or no file at that path, or the download failed.
        ConfigError: an option that cannot be, or that would have no effect.
        CheckpointError, ConfigError: the files are malformed, incomplete or of an unsupported kind.
        HardwareError: the device does not exist here.
    """
    options = LoadOptions(
        format=format,
        dtype=dtype,
        device=device,
        threads=threads,
        activations=activations,
        kv_format=kv_format,
        kv_memory=kv_memory,
        expert_memory=expert_memory,
        max_sequences=max_sequences,
        max_batch_tokens=max_batch_tokens,
        parallel=parallel,
    )
    options.check()
    name = str(path_or_name)
    if parallel is None:
        return _load(name, options, progress)
    return on_ranks(parallel, name, progress, lambda links, told: _load(name, options, told, links))


def _load(name: str, options: LoadOptions, progress: Progress | None, links: Links | None = None) -> LLM:
    """See :func:`load`; ``links`` are those to the ranks that share the model."""
    opened = open_checkpoint(catalogue.resolve(name, progress=progress))
    tokenizer = opened.load_tokenizer(catalogue.cl100k_ranks)
    if tokenizer is not None and tokenizer.chat_template is not None and (links is None or links.place.rank == 0):
        template_process.warm()  # it starts while the weights are read
    return LLM(
        _runner(name, opened, options, progress, links),
        tokenizer,
        name=name,
        max_sequences=options.max_sequences,
        max_batch_tokens=options.max_batch_tokens,
        suggested=catalogue.sampling_of(name) or suggested(opened.path),
        path=opened.path,
    )


def _runner(
    name: str, opened: Checkpoint, options: LoadOptions, progress: Progress | None, links: Links | None
) -> Runner:
    """What computes the model: torch, the kernels here, or the kernels of all ranks."""
    how: dict[str, Any] = {"threads": options.threads, "kv_memory": options.kv_memory, "progress": progress}
    if options.why_torch() is not None:
        how["format"] = options.format
        return make.make_torch(opened, dtype=options.dtype or "auto", device=options.device, **how)
    form = options.format or "keep"
    if options.activations is not None and not is_quantised(opened, form):
        raise ConfigError(
            f"activations (--activations) {options.activations} would have no effect: it is what quantised weights are "
            f"multiplied with, and those of {name} are not. Leave it out, or give format q8, q4, q4m or mx4"
        )
    how |= {
        "format": form,
        "activations": options.activations or "auto",
        "kv_format": options.kv_format or "bfloat16",
        "max_batch_tokens": options.max_batch_tokens,
    }
    if links is not None:
        return shared_runner(opened, links, how)
    return make.make(opened, expert_memory=options.expert_memory, **how)
