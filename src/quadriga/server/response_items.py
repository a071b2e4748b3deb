"""The items of a Responses answer, whole and as the events that tell them."""

from __future__ import annotations

import json
import secrets
from typing import Any, Literal

from msgspec import Struct

from quadriga.server.sse import EventSender
from quadriga.text.tool_calls.early import CallPart


class InnerTool(Struct, kw_only=True, forbid_unknown_fields=True):
    """A function of a namespace."""

    type: Literal["function"]
    name: str
    parameters: dict[str, Any] | None = None
    description: str | None = None
    strict: bool | None = None


class FlatTool(Struct, kw_only=True, forbid_unknown_fields=True):
    """A tool as this interface writes it: a function, one that takes any text (custom), or a group (namespace)."""

    type: Literal["function", "custom", "namespace"]
    name: str
    parameters: dict[str, Any] | None = None
    description: str | None = None
    strict: bool | None = None
    tools: list[InnerTool] | None = None


_TEXT_PART: dict[str, Any] = {"type": "output_text", "annotations": [], "logprobs": []}


def text_item(identifier: str, text: str, status: str) -> dict[str, Any]:
    """Words as an item."""
    content = [] if status == "in_progress" else [{**_TEXT_PART, "text": text}]
    return {"id": identifier, "type": "message", "status": status, "role": "assistant", "content": content}


def thought_item(identifier: str, text: str, status: str) -> dict[str, Any]:
    """What was thought as an item."""
    content = [{"type": "reasoning_text", "text": text}] if text else []
    return {"id": identifier, "type": "reasoning", "status": status, "summary": [], "content": content}


def call_item(call: dict[str, Any], tools: list[FlatTool], status: str = "completed") -> dict[str, Any]:
    """A call as an item of the kind that its tool was given as."""
    name, arguments = call["function"]["name"], call["function"]["arguments"]
    head = {"status": status, "call_id": call["id"], "name": name}
    if any(tool.type == "custom" and tool.name == name for tool in tools):
        given = json.loads(arguments).get("input", "")
        return {"id": f"ctc_{secrets.token_hex(12)}", "type": "custom_tool_call", **head, "input": str(given)}
    for tool in tools:
        inner = name.removeprefix(f"{tool.name}.")
        if tool.type == "namespace" and inner != name:
            head |= {"name": inner, "namespace": tool.name}
    return {"id": f"fc_{secrets.token_hex(12)}", "type": "function_call", **head, "arguments": arguments}


class Output:
    """The events of a response's items: words into a message, thoughts into one of theirs, each call one of its own."""

    def __init__(self, sender: EventSender, tools: list[FlatTool]) -> None:
        self._sender, self._number, self._tools = sender, -1, tools
        self._items: list[dict[str, Any]] = []
        self._message: str | None = None  # the id of the message that is open
        self._thought: str | None = None  # the id of the thought that is open
        self._said: list[str] = []
        self._item: dict[str, Any] = {}  # the call that is being told
        self._given: list[str] = []
        self._shown = False

    def send(self, kind: str, **fields: Any) -> None:
        """One event, numbered."""
        self._number += 1
        self._sender.event({"type": kind, "sequence_number": self._number, **fields}, name=kind)

    def text(self, piece: str) -> None:
        """Words, into the open message or a new one."""
        if self._message is None:
            self._close("completed")
            self._message, self._said = f"msg_{secrets.token_hex(12)}", []
            begun = text_item(self._message, "", "in_progress")
            self.send("response.output_item.added", output_index=len(self._items), item=begun)
            self.send("response.content_part.added", **self._place(), part={**_TEXT_PART, "text": ""})
        self._said.append(piece)
        if piece:
            self.send("response.output_text.delta", **self._place(), delta=piece, logprobs=[])

    def thought(self, piece: str) -> None:
        """What was thought, into the open item or a new one."""
        if self._thought is None:
            self._close("completed")
            self._thought, self._said = f"rs_{secrets.token_hex(12)}", []
            begun = thought_item(self._thought, "", "in_progress")
            self.send("response.output_item.added", output_index=len(self._items), item=begun)
        self._said.append(piece)
        self.send("response.reasoning_text.delta", **self._place(), delta=piece)

    def call(self, call: dict[str, Any]) -> None:
        """A call of a tool."""
        self._close("completed")
        item, index = call_item(call, self._tools), len(self._items)
        at = {"item_id": item["id"], "output_index": index}
        custom = item["type"] == "custom_tool_call"
        kind, field = ("custom_tool_call_input", "input") if custom else ("function_call_arguments", "arguments")
        begun = {**item, field: "", "status": "in_progress"}
        done = {field: item[field]} if custom else {"name": item["name"], field: item[field]}
        self.send("response.output_item.added", output_index=index, item=begun)
        self.send(f"response.{kind}.delta", **at, delta=item[field])
        self.send(f"response.{kind}.done", **at, **done)
        self.send("response.output_item.done", output_index=index, item=item)
        self._items.append(item)

    def part(self, part: CallPart) -> None:
        """A piece of a call; of a custom tool, whose one argument is its text, it waits for the others."""
        if part.name:
            self._close("completed")
            call = {"id": part.id, "function": {"name": part.name, "arguments": "{}"}}
            self._item, self._given = call_item(call, self._tools, "in_progress"), []
            self._shown = self._item["type"] == "function_call"
            if self._shown:
                begun = {**self._item, "arguments": ""}
                self.send("response.output_item.added", output_index=len(self._items), item=begun)
        self._given.append(part.arguments)
        at = {"item_id": self._item["id"], "output_index": len(self._items)}
        if self._shown and part.arguments:
            self.send("response.function_call_arguments.delta", **at, delta=part.arguments)
        if not part.last:
            return
        given = "".join(self._given)
        if self._shown:
            status = "completed" if part.whole else "incomplete"
            item = {**self._item, "arguments": given, "status": status}
            self.send("response.function_call_arguments.done", **at, name=item["name"], arguments=given)
            self.send("response.output_item.done", output_index=len(self._items), item=item)
            self._items.append(item)
        elif part.whole:
            name = self._item["name"]
            self.call({"id": self._item["call_id"], "function": {"name": name, "arguments": given}})

    def finish(self, status: str) -> list[dict[str, Any]]:
        """All items, the last one ended; an answer without any is an empty message."""
        if self._message is None and not any(item["type"] != "reasoning" for item in self._items):
            self.text("")
        self._close(status)
        return self._items

    def _place(self) -> dict[str, Any]:
        return {"item_id": self._message or self._thought, "output_index": len(self._items), "content_index": 0}

    def _close(self, status: str) -> None:
        said = "".join(self._said)
        if self._thought is not None:
            item = thought_item(self._thought, said, status)
            self.send("response.reasoning_text.done", **self._place(), text=said)
            self.send("response.output_item.done", output_index=len(self._items), item=item)
            self._items.append(item)
            self._thought = None
        if self._message is None:
            return
        item = text_item(self._message, said, status)
        self.send("response.output_text.done", **self._place(), text=said, logprobs=[])
        self.send("response.content_part.done", **self._place(), part={**_TEXT_PART, "text": said})
        self.send("response.output_item.done", output_index=len(self._items), item=item)
        self._items.append(item)
        self._message = None
