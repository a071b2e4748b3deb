"""``quadriga imatrix``: what a model's matrices meet in a text, as a file that llama.cpp quantises with."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from quadriga.cli import options


def imatrix_command(
    model: options.ModelArgument,
    out: options.Out,
    calibrate: Annotated[Path, options.CALIBRATE],
    calibrate_tokens: options.CalibrateTokens = 16_384,
) -> None:
    """Write an importance matrix: mean squares of what comes to every column, of experts with their tokens counted.

    OUT is NAME.gguf (llama.cpp) or NAME.dat (ik_llama.cpp). `quadriga convert --calibrate` reads both, llama-quantize
    --imatrix its own.
    """
    from quadriga.cli.calibration import measured
    from quadriga.cli.upcycle import open_source
    from quadriga.errors import CheckpointError
    from quadriga.io.imatrix_write import TextRead, require_suffix, write_imatrix

    require_suffix(out)
    if out.exists():
        raise CheckpointError(f"{out} exists; give a new name, or remove it first")
    checkpoint = open_source(model)
    try:
        found = measured(checkpoint, calibrate, calibrate_tokens)
        text = TextRead(calibrate.name, -(-found.n_tokens // found.window), found.window)
        n = write_imatrix(out, checkpoint.config, found.sums, text)
    finally:
        checkpoint.close()
    unseen = sum(count == 0 for layer in found.expert_tokens.values() for count in layer)
    note = f"; {unseen} experts met none of them" if unseen else ""
    print(f"{out}: {n} tensors, {found.n_tokens} tokens in windows of {found.window}{note}")
