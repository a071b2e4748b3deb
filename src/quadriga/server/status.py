"""Routes about the server itself: what it serves, whether it is well, and what its experts do."""

from __future__ import annotations

import asyncio
import weakref
from collections.abc import Callable
from typing import Any

from starlette.responses import Response

from quadriga.errors import CheckpointError
from quadriga.io import expert_labels
from quadriga.server.errors import ApiError
from quadriga.server.fleet import Fleet
from quadriga.server.metrics import balance_of, jain_of
from quadriga.server.on_demand import Listed
from quadriga.server.service import Service
from quadriga.server.sse import json_response


def named(one: Listed, name: str) -> dict[str, Any]:
    """A model under one of its names, as OpenAI's list shows it, and what it is.

    An adapter names what it stands on as ``parent``, as vLLM has it.
    """
    card = one.card
    adapter = one.service is not None and one.service.adapter_of(name)
    return {
        "id": name,
        "object": "model",
        "created": card.created,
        "owned_by": "quadriga",
        "max_model_len": card.config.max_seq_len,
        "quadriga": {**card.facts(), "loaded": one.service is not None},
        "root": card.name,
        "parent": card.name if adapter else None,
    }


async def models(fleet: Fleet) -> Response:
    """GET /v1/models: all names of all models, their adapters among them; also of those that can be loaded."""
    await fleet.look_again()
    data = [named(one, name) for one in fleet.listed() for name in one.names]
    return json_response({"object": "list", "data": data})


def one_model(fleet: Fleet, name: str) -> Response:
    """GET /v1/models/{name}."""
    return json_response(named(fleet.show(name), name))


def health(fleet: Fleet) -> Response:
    """200 while the engines live; it needs no key, so it does not say what one died of."""
    if fleet.failed:
        return json_response({"status": "failed", "error": "the engine has stopped; the server's log says why"}, 503)
    return json_response({"status": "draining" if fleet.draining else "ok"})


async def ready(fleet: Fleet) -> Response:
    """200 once every model that is loaded has made a token just now; see ``probe``."""
    if fleet.draining:
        raise ApiError(503, "the server is shutting down", code="shutting_down", retry_after_s=5)
    seconds = await asyncio.gather(*(service.probe.seconds() for service in fleet.services))
    return json_response({"status": "ready", "ms": round(1000 * max(seconds, default=0.0), 3)})


class Experts:
    """What a model's experts have seen since it was loaded, or since the last reset."""

    def __init__(self) -> None:
        self._base: list[list[int]] = []
        self._base_of: Callable[[], Service | None] = lambda: None
        self._labels: dict[str, Any] = {}
        self._labels_of: int | None = None

    def _counts(self, one: Listed) -> list[list[int]]:
        if one.service is None:
            return [[0] * spec.n_experts for _, spec in one.card.config.moe_layers]
        return [load.tolist() for load in one.service.llm.runner.expert_load()]

    def show(self, one: Listed) -> Response:
        """GET /v1/experts."""
        config = one.card.config
        experts = [spec for _, spec in config.moe_layers]
        counts = self._counts(one)
        if self._base and one.service is self._base_of():  # who was loaded again counts from nothing
            counts = [
                [n - b for n, b in zip(now, then, strict=True)] for now, then in zip(counts, self._base, strict=True)
            ]
        return json_response(
            {
                "model": one.card.name,
                "n_layers": config.n_layers,
                "layers": [layer for layer, _ in config.moe_layers],
                "n_experts": max((spec.n_experts for spec in experts), default=0),
                "top_k": max((spec.top_k for spec in experts), default=0),
                "n_tokens": sum(counts[0]) // experts[0].top_k if experts and counts else 0,
                "counts": counts,
                "balance": [round(balance_of(layer), 4) for layer in counts],
                "jain": [round(jain_of(layer), 4) for layer in counts],
            }
        )

    def labels(self, one: Listed) -> Response:
        """GET /v1/experts/labels: what each expert does, if somebody has made labels (`quadriga experts label`).

        Raises:
            ApiError: 500, the labels' file is damaged or another model's.
        """
        path, config = one.card.path, one.card.config
        place = None if path is None else expert_labels.place_of(path)
        stamp = place.stat().st_mtime_ns if place is not None and place.exists() else None
        if stamp != self._labels_of:
            assert place is not None, "a file that changed has a place"
            try:
                self._labels = expert_labels.read(place, config) or {}
            except CheckpointError as error:
                raise ApiError(500, str(error), code="bad_labels") from None
            self._labels_of = stamp
        return json_response({"layers": None, **self._labels, "model": one.card.name})

    def reset(self, one: Listed) -> Response:
        """POST /v1/experts/reset. The counters in /metrics go on."""
        if one.service is not None:
            self._base, self._base_of = self._counts(one), weakref.ref(one.service)
        return self.show(one)
