"""``quadriga upcycle``, ``prune`` and ``merge-experts``: experts out of a dense model, fewer of them, and back."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from quadriga.cli import options

if TYPE_CHECKING:
    from quadriga.io.open import Checkpoint
    from quadriga.quant.dtypes import Array


def upcycle_command(
    model: options.ModelArgument,
    out: options.Out,
    experts: options.Experts = 16,
    experts_per_token: Annotated[int, typer.Option(min=1, max=2**20, help="Experts a token visits.")] = 4,
    granules: options.Granules = None,
    drop: Annotated[float, typer.Option(min=0, max=1, help="Share of hidden units drawn anew (Drop-Upcycling).")] = 0.0,
    noise: Annotated[float, typer.Option(min=0, max=1, help="Noise on expert weights, in standard deviations.")] = 0.0,
    router_std: Annotated[float, typer.Option(min=0, max=1, help="Deviation of random router rows.")] = 0.02,
    router_text: Annotated[
        Path | None, typer.Option(help="JSON lines with text and a label: fit the router to part the labels.")
    ] = None,
    router_label: Annotated[str, typer.Option(help="The label's name in --router-text.")] = "lang",
    router_tokens: Annotated[int, typer.Option(min=1, help="Tokens of each label that are read.")] = 4096,
    seed: options.Seed = 0,
    to: options.To = "quadriga",
    dtype: options.Dtype = None,
    format: options.Format = None,
    gguf_format: options.GGUFFormat = None,
) -> None:
    """Turn a dense model of LLaMA's shape into a mixture of experts that computes the same function."""
    from quadriga.edits.upcycle import Upcycling, upcycle
    from quadriga.errors import ConfigError

    how = Upcycling(
        n_experts=experts,
        top_k=experts_per_token,
        granules=granules,
        drop=drop,
        noise=noise,
        router_std=router_std,
        seed=seed or 0,
    )
    result = result_options(to=to, dtype=dtype, format=format, gguf_format=gguf_format)
    checkpoint = open_source(model)
    try:
        routers = None
        if router_text is not None:
            texts = labelled_ids(checkpoint, router_text, router_label, router_tokens)
            if len(texts) != how.n_copies:
                raise ConfigError(
                    f"{how.n_experts} experts in {how.n_granules} granules are {how.n_copies} copies, one a label; "
                    f"{router_text} has the labels {sorted(texts)}"
                )
            routers = _fitted(checkpoint, texts)
        moe = upcycle(checkpoint, how, routers=routers)
        write_derived(moe, out, **result)
    finally:
        checkpoint.close()
    same = "the same function" if not drop and not noise else "another function: train it"
    if (rounded := format or gguf_format or dtype) is not None and not drop and not noise:
        same = f"the same function before its numbers became {rounded}"
    print(f"{how.n_experts} experts, {how.top_k} at work: {how.n_copies} copies of {how.n_granules} granules; {same}")


def prune_command(
    model: options.ModelArgument,
    out: options.Out,
    experts: options.Experts,
    calibrate: Annotated[Path, options.CALIBRATE],
    by: Annotated[str, typer.Option(help="output (routing weight times length of output, summed) or use.")] = "output",
    calibrate_tokens: options.CalibrateTokens = 4096,
    to: options.To = "quadriga",
    dtype: options.Dtype = None,
    format: options.Format = None,
    gguf_format: options.GGUFFormat = None,
) -> None:
    """Leave out the experts of each layer that a text needs least."""
    from quadriga.cli.calibration import measured
    from quadriga.edits.fewer_experts import prune, usefulness
    from quadriga.errors import ConfigError

    if by not in ("output", "use"):
        raise ConfigError(f"--by must be output or use, got {by!r}")
    result = result_options(to=to, dtype=dtype, format=format, gguf_format=gguf_format)
    checkpoint = open_source(model)
    try:
        worth = usefulness(measured(checkpoint, calibrate, calibrate_tokens), by)  # type: ignore[arg-type]
        small = prune(checkpoint, experts, worth)
        write_derived(small, out, **result)
    finally:
        checkpoint.close()
    lost = [1 - sum(sorted(layer)[-experts:]) / max(sum(layer), 1e-30) for layer in worth]
    mean, worst = sum(lost) / len(lost), max(lost)
    print(f"{experts} experts a layer stay; {mean:.1%} of {by} went with the others ({worst:.1%} in the worst layer)")


def merge_experts_command(
    model: options.ModelArgument,
    out: options.Out,
    granules: options.Granules = None,
    calibrate: options.Calibrate = None,
    calibrate_tokens: options.CalibrateTokens = 4096,
    to: options.To = "quadriga",
    dtype: options.Dtype = None,
    format: options.Format = None,
    gguf_format: options.GGUFFormat = None,
) -> None:
    """Melt the experts back into one dense network: the copies of each granule averaged, by use if a text is given.

    With one granule all experts are averaged.
    """
    from quadriga.cli.calibration import measured
    from quadriga.edits.fewer_experts import merge_experts, usefulness

    result = result_options(to=to, dtype=dtype, format=format, gguf_format=gguf_format)
    checkpoint = open_source(model)
    try:
        use = None
        if calibrate is not None:
            use = usefulness(measured(checkpoint, calibrate, calibrate_tokens), "use")
        dense = merge_experts(checkpoint, granules, use=use)
        write_derived(dense, out, **result)
    finally:
        checkpoint.close()


def open_source(source: str) -> Checkpoint:
    """A checkpoint by name or path, fetched with a bar."""
    from quadriga.cli.progress import progress_bar
    from quadriga.hub import catalogue
    from quadriga.io.open import open_checkpoint

    with progress_bar("fetching") as show:
        return open_checkpoint(catalogue.resolve(source, progress=show))


def result_options(**how: str | None) -> dict[str, Any]:
    """What a written model is to be, as a command line says it, checked before anything is fetched or read.

    Raises:
        ConfigError: an option that cannot be, or that would have no effect.
    """
    from quadriga.io import convert_options
    from quadriga.option_rules import as_flag

    convert_options.check(how, as_flag)
    return how


def write_derived(checkpoint: Checkpoint, out: Path, **how: Any) -> None:
    """Write a derived checkpoint with a bar, and say what was written."""
    from quadriga.cli.progress import progress_bar
    from quadriga.io import convert

    with progress_bar("writing") as show:
        plan = convert.write(checkpoint, out, progress=show, **how)
    for note in plan.notes:
        print(f"note: {note}", file=sys.stderr)
    print(f"{out}: {len(plan.tensors)} tensors, {sum(plan.files.sizes.values()) / 1e9:.2f} GB, layout {plan.layout}")


def _fitted(checkpoint: Checkpoint, texts: dict[str, list[int]]) -> dict[int, Array]:
    from quadriga.cli.progress import progress_bar
    from quadriga.edits.fit_router import fit_routers

    with progress_bar("fitting routers") as show:
        found = fit_routers(checkpoint, texts, progress=show)
    accuracy = list(found.accuracy.values())
    print(
        f"routers fitted to {', '.join(found.labels)}: {min(accuracy):.0%} to {max(accuracy):.0%} of held-out tokens "
        "go to their label's copy"
    )
    return found.rows


def labelled_ids(checkpoint: Checkpoint, path: Path, label: str, n_tokens: int) -> dict[str, list[int]]:
    """Label -> the first ``n_tokens`` token ids of its texts, from JSON lines {"text": ..., LABEL: ...}."""
    from quadriga.errors import ConfigError
    from quadriga.hub import catalogue

    tokenizer = checkpoint.load_tokenizer(catalogue.cl100k_ranks)
    if tokenizer is None:
        raise ConfigError("fitting routers reads a text, and this checkpoint has no tokenizer")
    texts: dict[str, list[int]] = {}
    try:
        with path.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):
                row = json.loads(line)
                if not isinstance(row, dict) or not isinstance(row.get("text"), str) or label not in row:
                    raise ConfigError(f"{path}:{number}: a row needs 'text' and {label!r}; got {line[:80]!r}")
                ids = texts.setdefault(str(row[label]), [])
                if len(ids) < n_tokens:
                    # Long documents are cut, so that many of them are seen.
                    ids.extend(tokenizer.encode(row["text"][:4000])[: min(512, n_tokens - len(ids))])
    except (OSError, UnicodeDecodeError, ValueError) as error:
        raise ConfigError(f"cannot read {path}: {error}") from None
    return texts
