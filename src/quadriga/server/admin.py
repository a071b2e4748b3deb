"""POST /v1/load_lora_adapter, /v1/unload_lora_adapter: adapters come and go while answers run. vLLM's routes.

Only with the key of ``--admin-key``, which ``guard`` asks for: a folder of this machine is read.
"""

from __future__ import annotations

import asyncio
from pathlib import Path

from msgspec import Struct
from starlette.responses import Response

from quadriga.errors import RequestError
from quadriga.io.adapter import load
from quadriga.io.adapter_files import low_rank
from quadriga.server.caller import Caller
from quadriga.server.errors import ApiError
from quadriga.server.service import Service
from quadriga.server.sse import json_response

MAX_NAME = 128


class AdapterToLoad(Struct, kw_only=True, forbid_unknown_fields=True):
    """POST /v1/load_lora_adapter: MODEL:NAME answers with it from then on."""

    lora_name: str
    lora_path: str
    model: str | None = None


class AdapterToForget(Struct, kw_only=True, forbid_unknown_fields=True):
    """POST /v1/unload_lora_adapter."""

    lora_name: str
    model: str | None = None


async def load_adapter(service: Service, body: AdapterToLoad, _: Caller) -> Response:
    """Read an adapter beside the engine, then add it between two steps."""
    service.check_model(body.model)
    name = body.lora_name
    if not (0 < len(name) <= MAX_NAME and name.isprintable() and ":" not in name and "/" not in name):
        message = f"lora_name is 1 to {MAX_NAME} characters without : and /, got {name[:80]!r}"
        raise ApiError(400, message, param="lora_name")
    folder = Path(body.lora_path)
    if not folder.is_absolute():
        raise ApiError(400, "lora_path is the absolute path of a folder on the server's machine", param="lora_path")
    await service.engine.call(lambda engine: engine.adapters())  # says so where the model can have none
    adapter = await asyncio.to_thread(load, folder, service.llm.config)
    factors = await asyncio.to_thread(low_rank, adapter)
    await service.engine.call(lambda engine: engine.adapters().add(name, adapter.spec, factors))
    return json_response({"object": "adapter", "id": f"{service.name}:{name}", "status": "loaded"})


async def unload_adapter(service: Service, body: AdapterToForget, _: Caller) -> Response:
    """Forget an adapter that no answer uses."""
    service.check_model(body.model)
    if body.lora_name not in service.llm.adapters:
        raise ApiError(404, f"there is no adapter {body.lora_name[:80]!r}", param="lora_name", code="not_found")
    try:
        await service.engine.call(lambda engine: engine.remove_adapter(body.lora_name))
    except RequestError as error:
        raise ApiError(409, str(error), param="lora_name") from None
    return json_response({"object": "adapter", "id": f"{service.name}:{body.lora_name}", "status": "unloaded"})
