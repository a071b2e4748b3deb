"""GET /docs: the OpenAPI document as one page to read. Made on the server, no script, nothing from elsewhere."""

from __future__ import annotations

import base64
import hashlib
import json
from html import escape
from typing import Any

_STYLE = """
:root { color-scheme: light dark; font: 16px/1.5 system-ui, sans-serif }
body { max-width: 60rem; margin: 2rem auto; padding: 0 1rem }
code, pre { font: 0.875rem/1.4 ui-monospace, monospace }
h2 { margin: 2.5rem 0 0.25rem; font-size: 1.1rem } h2 b { display: inline-block; min-width: 3.2rem }
p { margin: 0.25rem 0 } pre { overflow-x: auto; padding: 0.75rem; border: 1px solid #8886; border-radius: 6px }
table { border-collapse: collapse; width: 100% } td { padding: 0.15rem 0.75rem 0.15rem 0; vertical-align: top }
td:first-child { white-space: nowrap } details { margin: 0.5rem 0 } summary { cursor: pointer }
""".strip()

CSP = (
    f"default-src 'none'; style-src 'sha256-{base64.b64encode(hashlib.sha256(_STYLE.encode()).digest()).decode()}'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)

_EXAMPLES: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "Hello"}], "stream": True},
    "/v1/completions": {"prompt": "Once upon a time", "max_tokens": 20},
    "/v1/responses": {"input": "Hello"},
    "/v1/messages": {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 50},
    "/v1/messages/count_tokens": {"messages": [{"role": "user", "content": "Hello"}]},
    "/v1/embeddings": {"input": ["Hello", "World"]},
    "/tokenize": {"prompt": "Hello"},
    "/detokenize": {"tokens": [1, 2, 3]},
    "/apply-template": {"messages": [{"role": "user", "content": "Hello"}]},
}


def page(document: dict[str, Any], model: str, address: str) -> str:
    """HTML.

    Args:
        document: from ``openapi.document``.
        address: what stands in the examples, e.g. "http://127.0.0.1:8000".
    """
    info, schemas = document["info"], document["components"]["schemas"]
    parts = [
        f"<!doctype html><html lang=en><meta charset=utf-8><title>{escape(info['title'])}: interface</title>",
        f"<meta name=viewport content='width=device-width, initial-scale=1'><style>{_STYLE}</style>",
        f"<h1>{escape(info['title'])} {escape(info['version'])}</h1>",
        f"<p>Serves <code>{escape(model)}</code>. For programs: <a href=openapi.json>openapi.json</a>. Every path ",
        "works with and without <code>/v1</code>. A field that is not listed is refused, never ignored.</p>",
    ]
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            parts.append(f"<h2><b>{method.upper()}</b> <code>{escape(path)}</code></h2>")
            parts.append(f"<p>{escape(operation['summary'])}</p>")
            body = operation.get("requestBody", {}).get("content", {}).get("application/json", {}).get("schema", {})
            if "$ref" in body:
                parts.append(_fields(schemas[body["$ref"].rsplit("/", 1)[1]]))
            parts.append(_example(path, method, model, address))
    return "\n".join(parts)


def _fields(schema: dict[str, Any]) -> str:
    required = set(schema.get("required", ()))
    rows = [
        f"<tr><td><code>{escape(name)}</code>{' *' if name in required else ''}<td>{escape(_kind(kind))}"
        for name, kind in schema.get("properties", {}).items()
    ]
    return f"<details><summary>{len(rows)} fields (* must be there)</summary><table>{''.join(rows)}</table></details>"


def _kind(schema: dict[str, Any]) -> str:
    """A field's schema in a few words."""
    if "$ref" in schema:
        return str(schema["$ref"]).rsplit("/", 1)[1]
    if "anyOf" in schema:
        return " | ".join(_kind(one) for one in schema["anyOf"])
    if "enum" in schema:
        return " | ".join(json.dumps(value) for value in schema["enum"])
    if schema.get("type") == "array":
        fixed = schema.get("prefixItems")
        return f"[{', '.join(map(_kind, fixed)) if fixed else _kind(schema.get('items', {}))}]"
    return str(schema.get("type", "anything"))


def _example(path: str, method: str, model: str, address: str) -> str:
    line = f"curl {address}{path}" if method == "get" else f"curl -X POST {address}{path}"
    if path in _EXAMPLES:
        body = json.dumps({"model": model, **_EXAMPLES[path]})
        line = f"curl {address}{path} -H 'Content-Type: application/json' -d '{body}'"
    return f"<pre>{escape(line)}</pre>"
