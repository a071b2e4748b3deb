"""What the commands that calibrate share: a text as tokens, run through a checkpoint with a bar."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from quadriga.edits.calibrate import Calibration
    from quadriga.io.open import Checkpoint


def measured(checkpoint: Checkpoint, text: Path, n_tokens: int, *, errors: bool = False) -> Calibration:
    """What a checkpoint's matrices meet in the first ``n_tokens`` tokens of a text, and what formats lose there.

    Raises:
        ConfigError: no tokenizer, or a text that cannot be read.
        RequestError: an empty text.
    """
    from quadriga.cli.progress import progress_bar
    from quadriga.edits.calibrate import calibrate
    from quadriga.errors import ConfigError
    from quadriga.hub import catalogue

    tokenizer = checkpoint.load_tokenizer(catalogue.cl100k_ranks)
    if tokenizer is None:
        raise ConfigError("calibration reads a text, and this checkpoint has no tokenizer")
    try:
        ids = tokenizer.encode(text.read_text(encoding="utf-8"))[:n_tokens]
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read the text {text}: {error}") from None
    with progress_bar("calibrating") as show:
        return calibrate(checkpoint, ids, errors=errors, progress=show)
