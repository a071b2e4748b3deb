"""Routes about the server itself: what it serves, whether it is well, and what its experts do."""

from __future__ import annotations

import asyncio
from typing import Any

from starlette.responses import Response

from quadriga.errors import CheckpointError
from quadriga.io import expert_labels
from quadriga.model import cost
from quadriga.server.errors import ApiError
from quadriga.server.fleet import Fleet
from quadriga.server.metrics import balance_of, jain_of
from quadriga.server.service import Service
from quadriga.server.sse import json_response


def model(service: Service) -> dict[str, Any]:
    """The served model as OpenAI's list shows it, and what it is."""
    config = service.llm.config
    count, experts = cost.n_params(config), [spec for _, spec in config.moe_layers]
    tokenizer = service.llm.tokenizer
    facts = {
        "family": config.family,
        "n_parameters": count.total,
        "n_active_parameters": count.active,
        "n_layers": config.n_layers,
        "n_experts": max((spec.n_experts for spec in experts), default=0),
        "top_k": max((spec.top_k for spec in experts), default=0),
        "context_length": config.max_seq_len,
        "chat": tokenizer is not None and tokenizer.chat_template is not None,
    }
    return {
        "id": service.name,
        "object": "model",
        "created": service.created,
        "owned_by": "quadriga",
        "max_model_len": config.max_seq_len,
        "quadriga": facts,
    }


def named(service: Service, name: str) -> dict[str, Any]:
    """The model under one of its names; an adapter names what it stands on as ``parent``, as vLLM has it."""
    adapter = service.adapter_of(name)
    return {**model(service), "id": name, "root": service.name, "parent": service.name if adapter else None}


def models(fleet: Fleet) -> Response:
    """GET /v1/models: all names of all models, their adapters among them."""
    data = [named(service, name) for service in fleet for name in service.names]
    return json_response({"object": "list", "data": data})


def one_model(service: Service, name: str) -> Response:
    """GET /v1/models/{name}."""
    return json_response(named(service, name))


def health(fleet: Fleet) -> Response:
    """200 while the engines live; it needs no key, so it does not say what one died of."""
    if fleet.failed:
        return json_response({"status": "failed", "error": "the engine has stopped; the server's log says why"}, 503)
    return json_response({"status": "draining" if fleet.draining else "ok"})


async def ready(fleet: Fleet) -> Response:
    """200 once every model has made a token just now; see ``probe``."""
    if fleet.draining:
        raise ApiError(503, "the server is shutting down", code="shutting_down", retry_after_s=5)
    seconds = await asyncio.gather(*(service.probe.seconds() for service in fleet))
    return json_response({"status": "ready", "ms": round(1000 * max(seconds), 3)})


class Experts:
    """What the experts have seen since the server began, or since the last reset."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._base: list[list[int]] = []
        self._labels: dict[str, Any] = {}
        self._labels_of: int | None = None

    def _counts(self) -> list[list[int]]:
        return [load.tolist() for load in self._service.llm.runner.expert_load()]

    def show(self) -> Response:
        """GET /v1/experts."""
        config = self._service.llm.config
        experts = [spec for _, spec in config.moe_layers]
        counts = self._counts()
        if self._base:
            counts = [
                [n - b for n, b in zip(now, then, strict=True)] for now, then in zip(counts, self._base, strict=True)
            ]
        return json_response(
            {
                "model": self._service.name,
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

    def labels(self) -> Response:
        """GET /v1/experts/labels: what each expert does, if somebody has made labels (`quadriga experts label`).

        Raises:
            ApiError: 500, the labels' file is damaged or another model's.
        """
        path, config = self._service.llm.path, self._service.llm.config
        place = None if path is None else expert_labels.place_of(path)
        stamp = place.stat().st_mtime_ns if place is not None and place.exists() else None
        if stamp != self._labels_of:
            assert place is not None, "a file that changed has a place"
            try:
                self._labels = expert_labels.read(place, config) or {}
            except CheckpointError as error:
                raise ApiError(500, str(error), code="bad_labels") from None
            self._labels_of = stamp
        return json_response({"layers": None, **self._labels, "model": self._service.name})

    def reset(self) -> Response:
        """POST /v1/experts/reset. The counters in /metrics go on."""
        self._base = self._counts()
        return self.show()
