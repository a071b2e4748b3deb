"""What the commands that calibrate share: a text as tokens, run through a checkpoint with a bar."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from quadriga.cli import options

if TYPE_CHECKING:
    from quadriga.edits.calibrate import Calibration
    from quadriga.edits.format_errors import FormatErrors
    from quadriga.io.open import Checkpoint
    from quadriga.quant.feedback import Importance

CALIBRATION_TOKENS = 2048
"""Of a text that a conversion is calibrated on."""


_MOST_MEMORY = 0.3
"""Share of what memory is free that second moments may take."""


def measured(
    checkpoint: Checkpoint,
    text: Path,
    n_tokens: int,
    *,
    errors: FormatErrors | None = None,
    for_rounding: bool = False,
) -> Calibration:
    """What a checkpoint's matrices meet in the first ``n_tokens`` tokens of a text, and what formats cost there.

    Args:
        errors: told what formats cost.
        for_rounding: keep second moments, if they fit into memory.

    Raises:
        ConfigError: no tokenizer, or a text that cannot be read.
        RequestError: an empty text.
    """
    from quadriga import runtime
    from quadriga.cli.progress import progress_bar
    from quadriga.edits.calibrate import calibrate, moment_bytes
    from quadriga.errors import ConfigError
    from quadriga.hub import catalogue

    tokenizer = checkpoint.load_tokenizer(catalogue.cl100k_ranks)
    if tokenizer is None:
        raise ConfigError("calibration reads a text, and this checkpoint has no tokenizer")
    ids = tokenizer.encode(options.text_of(text, "--calibrate"))[:n_tokens]
    moments = for_rounding and moment_bytes(checkpoint) < _MOST_MEMORY * runtime.memory_bytes()[1]
    if for_rounding and not moments:
        print("note: second moments do not fit into memory: columns do not make up for each other", file=sys.stderr)
    with progress_bar("calibrating") as show:
        return calibrate(checkpoint, ids, errors=errors, moments=moments, progress=show)


def for_conversion(
    checkpoint: Checkpoint, text: Path, n_tokens: int, budget: int | None, to: str
) -> tuple[dict[str, str], Mapping[str, Importance]]:
    """The recipe for a budget (empty without one) and what errors count, from a text or an importance matrix.

    Raises:
        ConfigError: a budget with an importance matrix, or one that even the smallest formats exceed.
    """
    from quadriga.edits.format_errors import GGUFErrors, PackedErrors
    from quadriga.errors import ConfigError
    from quadriga.io import imatrix
    from quadriga.io.conversion_plan import recipe_rest
    from quadriga.quant.format_choice import choose

    if text.is_file() and imatrix.is_imatrix(text):
        if budget is not None or n_tokens != CALIBRATION_TOKENS:
            raise ConfigError(
                f"{text.name} is an importance matrix, which weighs columns and no more: --budget measures on a "
                "text what every format costs, and --calibrate-tokens says how much of a text is read. Leave them "
                "out, or give --calibrate a text"
            )
        return {}, dict(imatrix.read_imatrix(text, checkpoint.config))
    if budget is None:
        return {}, measured(checkpoint, text, n_tokens, for_rounding=True).importance
    rest, fixed = recipe_rest(checkpoint, to)
    errors = GGUFErrors(checkpoint.config) if to == "gguf" else PackedErrors(checkpoint.config)
    found = measured(checkpoint, text, n_tokens, errors=errors, for_rounding=True)
    candidates = errors.candidates()
    recipe = choose(candidates, budget, fixed)
    cost = sum(one.error for name, options in candidates.items() for one in options if one.format == recipe[name])
    count = Counter(recipe.values())
    what = ", ".join(f"{n} matrices {form}" for form, n in sorted(count.items()))
    print(f"{what}; expected divergence {cost:.2g} nats a token", file=sys.stderr)
    return recipe | rest, found.importance
