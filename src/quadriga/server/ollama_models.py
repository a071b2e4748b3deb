"""What Ollama's interface says of models: POST /api/show; GET /api/tags, ps, version. ``pull`` has pull and delete.

What makes models (copy, create, push) is refused: a server serves what it was started with or what is in the local
store, and what of that is in memory follows from what is asked for (``on_demand``).
Facts: github.com/ollama/ollama, docs/api.md, as of version 0.13.
"""

from __future__ import annotations

import hashlib
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime, timedelta
from typing import Any

from msgspec import Struct
from starlette.responses import Response

from quadriga.model import cost
from quadriga.server.card import Card
from quadriga.server.errors import ApiError
from quadriga.server.fleet import Fleet
from quadriga.server.ollama import written
from quadriga.server.on_demand import Listed
from quadriga.server.sse import json_response
from quadriga.text.template_abilities import THOUGHTS

VERSION = "0.13.0"
"""The version of Ollama whose interface this is; clients ask for a least one."""

NEVER = "9999-12-31T23:59:59Z"
"""When a model leaves that stays: what is more than 20 years away, Ollama's own client shows as "Forever"."""

MANAGES = {"create": "created", "copy": "copied", "push": "pushed"}


class OllamaModel(Struct, kw_only=True, forbid_unknown_fields=True):
    """POST /api/show and /api/pull, DELETE /api/delete."""

    model: str | None = None
    name: str | None = None
    stream: bool = True


def details(card: Card) -> dict[str, Any]:
    """What Ollama's lists say of a model."""
    n = cost.n_params(card.config).total
    size = f"{n / 1e9:.1f}B" if n >= 1e9 else f"{n / 1e6:.2f}M"
    return {
        "parent_model": "",
        "format": "quadriga",
        "family": card.config.family,
        "families": [card.config.family],
        "parameter_size": size,
        "quantization_level": card.format,
    }


def entry(card: Card, name: str) -> dict[str, Any]:
    """One model of a list. The digest is that of its configuration; the size, of its weights."""
    digest = hashlib.sha256(repr(card.config).encode()).hexdigest()
    return {
        "name": name,
        "model": name,
        "modified_at": written(datetime.fromtimestamp(card.created, UTC)),
        "size": card.nbytes,
        "digest": digest,
        "details": details(card),
    }


async def tags(fleet: Fleet) -> Response:
    """GET /api/tags: what is loaded, and what can be."""
    await fleet.look_again()
    return json_response({"models": [entry(one.card, name) for one in fleet.listed() for name in one.names]})


def running(fleet: Fleet) -> Response:
    """GET /api/ps: what is loaded, and until when."""
    models = []
    for one in fleet.listed():
        if one.service is None:
            continue
        until = NEVER if one.expires_s is None else written(datetime.now(UTC) + timedelta(seconds=one.expires_s))
        more = {"expires_at": until, "size_vram": 0, "context_length": one.card.config.max_seq_len}
        models += [{**entry(one.card, name), **more} for name in one.names]
    return json_response({"models": models})


async def show(one: Listed, _: OllamaModel) -> Response:
    """POST /api/show."""
    card, config = one.card, one.card.config
    thinks = any(end in (card.template or "") for _, end in THOUGHTS)
    family = config.family
    facts = {
        "general.architecture": family,
        "general.parameter_count": cost.n_params(config).total,
        f"{family}.context_length": config.max_seq_len,
        f"{family}.embedding_length": config.d_model,
        f"{family}.block_count": config.n_layers,
        f"{family}.vocab_size": config.vocab_size,
    }
    return json_response(
        {
            "modelfile": "",
            "parameters": "",
            "template": card.template or "",
            "details": details(card),
            "model_info": facts,
            "capabilities": ["completion", "tools", "embedding", *(["thinking"] if thinks else [])],
            "modified_at": entry(card, card.name)["modified_at"],
        }
    )


def version() -> Response:
    """GET /api/version."""
    return json_response({"version": VERSION})


def refuse(what: str) -> Callable[..., Awaitable[Response]]:
    """What cannot be done to a server's models over HTTP."""

    async def endpoint(*_: Any) -> Response:
        raise ApiError(400, f"models cannot be {what} here: the server serves what it was started with")

    return endpoint
