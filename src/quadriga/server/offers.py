"""What a server with models on demand can load: the models it was told, or all that are in the local store."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from math import prod
from pathlib import Path

from quadriga.engine.load_options import LoadOptions
from quadriga.errors import QuadrigaError
from quadriga.hub import catalogue
from quadriga.io.open import Checkpoint, open_checkpoint
from quadriga.model import cost
from quadriga.model.weight_map import parameter_shapes
from quadriga.quant.packed import PACKED
from quadriga.runners.make import kernels_cache_bytes
from quadriga.server.card import Card
from quadriga.server.on_demand import Offer

_log = logging.getLogger(__name__)

_DTYPE_BYTES = {"float64": 8, "float32": 4}
"""Bytes of a weight in torch; 2 in any other type."""


def offer(source: str, names: Sequence[str], how: LoadOptions, budget: int) -> Offer:
    """A model that is here, from its files' heads; no weight and no vocabulary is read.

    Args:
        source: what ``engine.load.load`` would be told.
        names: what clients call it; the first is its own.
        how: how it is to be loaded. Without ``kv_memory`` its cache gets what 4 full contexts need, and at most a
            quarter of the budget.
        budget: bytes that all models have together.

    Raises:
        CatalogueError, CheckpointError, ConfigError: there is no such model, or it cannot be read.
    """
    opened = open_checkpoint(catalogue.resolve(source))
    try:
        form, weights = _weights(opened, how)
        if how.kv_memory is None:
            how = replace(
                how, kv_memory=min(budget // 4, kernels_cache_bytes(opened.config, how.kv_format or "bfloat16"))
            )
        assert how.kv_memory is not None, "it has just been set"
        card = Card(
            name=names[0],
            config=opened.config,
            created=int(opened.path.stat().st_mtime),
            template=opened.chat_template(),
            format=form,
            nbytes=weights,
            path=opened.path,
        )
        return Offer(card=card, aliases=tuple(names[1:]), source=source, how=how, nbytes=weights + how.kv_memory)
    finally:
        opened.close()


def _weights(opened: Checkpoint, how: LoadOptions) -> tuple[str, int]:
    """(format, bytes) that most weights, and all weights, will have in memory."""
    tensors = opened.origin.source.tensors
    stored = sum(info.nbytes for info in tensors.values())
    n_total = cost.n_params(opened.config).total
    if how.why_torch() is not None:
        form = how.dtype or "auto"
        return form, stored if form == "auto" else n_total * _DTYPE_BYTES.get(form, 2)
    if how.format not in (None, "keep"):
        assert how.format is not None, "it has just been looked at"
        return how.format, round(n_total * PACKED[how.format].bits / 8)
    form = max(tensors.values(), key=lambda info: info.nbytes).dtype
    if how.expert_memory is None:
        return form, stored
    shapes = parameter_shapes(opened.config).values()
    in_experts = sum(prod(shape) for shape in shapes if len(shape) == 3) / max(1, n_total)
    return form, round(stored * (1 - in_experts)) + how.expert_memory


def stored(known: set[str], how: LoadOptions, budget: int) -> list[Offer]:
    """Models of the local store: pulled ones, and those of this package; what cannot be read is left out, with a line.

    Args:
        known: sources that are not looked at again.
    """
    here = {found.name for found in catalogue.cached()}
    models = [
        *(name for name, entry in catalogue.CATALOGUE.items() if entry.is_model and name in here),
        *(name for name in catalogue.DELTAS if name in here),
        *catalogue.BUNDLED,
        *sorted(name for name in here if not catalogue.is_known(name)),
    ]
    offers = []
    for source in models:
        if source not in known:
            try:
                offers.append(offer(source, [called(source)], how, budget))
            except QuadrigaError as error:
                _log.warning("%s is not offered: %s", source, error)
    return offers


def called(source: str) -> str:
    """A model's name where nobody gives it one: the last part of its path, without a colon."""
    return Path(source.removeprefix("hf:").removeprefix("ollama:")).name.replace(":", "-")
