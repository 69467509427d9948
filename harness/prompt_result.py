"""What a ComfyUI server says of a prompt: its events, how it ended, and what went wrong."""

from __future__ import annotations

import json
import struct
import time
from dataclasses import dataclass, field
from typing import Any

_BINARY_EVENTS = {1: "preview_image", 2: "unencoded_preview_image", 3: "progress_text", 4: "preview_image"}


class ComfyError(RuntimeError):
    """Something that a ComfyUI server answered or did."""


class ServerGone(ComfyError):
    """The server does not answer."""


class GraphRejected(ComfyError):
    """The graph did not pass ComfyUI's validation; nothing was run.

    Attributes:
        error: ComfyUI's `error` object (type, message, details, extra_info).
        node_errors: node id -> {"class_type", "errors": [...]}.
    """

    def __init__(self, answer: dict[str, Any]) -> None:
        error = answer.get("error") or {}
        self.error: dict[str, Any] = error if isinstance(error, dict) else {"message": str(error)}
        self.node_errors: dict[str, Any] = answer.get("node_errors") or {}
        first = ": ".join(str(self.error[part]) for part in ("message", "details") if self.error.get(part))
        super().__init__("\n".join([f"ComfyUI rejected the graph: {first}", *_describe(self.node_errors)]))


@dataclass(frozen=True)
class NodeError:
    """The exception that a node raised."""

    node_id: str
    node_type: str
    exception_type: str
    exception_message: str
    traceback: str


@dataclass(frozen=True)
class Event:
    """One websocket message about a prompt.

    Attributes:
        type: ComfyUI's name for it (`executing`, `progress`, `executed`, …), or `progress_text` / `preview_image`.
        data: its content; `progress_text` has `node` and `text`, images have `size_bytes` only.
        time_s: `time.monotonic()` when it arrived.
    """

    type: str
    data: dict[str, Any]
    time_s: float


@dataclass(frozen=True)
class PromptResult:
    """How a prompt ended.

    Attributes:
        status: "success", "error" or "interrupted".
        seconds: from start to end by the server's clock, without the time spent in the queue.
        outputs: node id -> what the node shows ({"images": [...]}, {"text": [...]}, …).
        error: set if and only if the status is "error".
        messages: the history's status messages, as (type, data) pairs.
        events: all websocket events of this prompt, in order.
        node_errors: outputs that ComfyUI left out because they did not validate, while others ran.
    """

    prompt_id: str
    status: str
    seconds: float
    outputs: dict[str, dict[str, Any]]
    error: NodeError | None
    messages: list[tuple[str, dict[str, Any]]]
    events: list[Event] = field(repr=False)
    node_errors: dict[str, Any] = field(default_factory=dict)

    @property
    def executed(self) -> list[str]:
        """Ids of the nodes that ran, in order; cached ones are not among them."""
        return [e.data["node"] for e in self.events if e.type == "executing" and e.data.get("node")]

    @property
    def cached(self) -> list[str]:
        """Ids of the nodes whose outputs came from ComfyUI's cache."""
        return [node for kind, data in self.messages if kind == "execution_cached" for node in data["nodes"]]

    @property
    def progress(self) -> list[tuple[str, int, int]]:
        """(node id, value, max) of the progress steps; ComfyUI skips those less than 0.1 s or 0.5 % apart."""
        return [(e.data["node"], e.data["value"], e.data["max"]) for e in self.events if e.type == "progress"]

    @property
    def progress_texts(self) -> list[tuple[str, str]]:
        """(node id, text) of every text that a node showed while it ran."""
        return [(e.data["node"], e.data["text"]) for e in self.events if e.type == "progress_text"]


class PromptFailed(ComfyError):
    """A prompt that should have succeeded did not; `result` holds everything."""

    def __init__(self, result: PromptResult) -> None:
        self.result = result
        if error := result.error:
            text = (
                f"Node {error.node_id} ({error.node_type}) raised {error.exception_type}: "
                f"{error.exception_message.rstrip()}\n{error.traceback}"
            )
        else:
            text = "\n".join([f"Prompt {result.prompt_id} ended as {result.status!r}", *_describe(result.node_errors)])
        super().__init__(text)


class PromptLost(ComfyError):
    """A prompt is neither queued nor running nor in the history."""


def parse_event(message: str | bytes) -> Event | None:
    """An event, or None for messages that are not about a prompt (queue sizes, feature flags)."""
    now = time.monotonic()
    if isinstance(message, str):
        content = json.loads(message)
        data = content.get("data") or {}
        return Event(content["type"], data, now) if data.get("prompt_id") else None
    kind = _BINARY_EVENTS.get(struct.unpack(">I", message[:4])[0])
    if kind is None:
        return None
    if kind != "progress_text":
        return Event(kind, {"size_bytes": len(message) - 4}, now)
    # 4 bytes length of the node id, the node id, the text
    (size,) = struct.unpack(">I", message[4:8])
    node, text = message[8 : 8 + size].decode(), message[8 + size :].decode()
    return Event(kind, {"node": node, "text": text}, now)


def node_error(data: dict[str, Any]) -> NodeError:
    """The exception that a message of the history or the websocket tells of."""
    return NodeError(
        node_id=str(data.get("node_id", "?")),
        node_type=data.get("node_type", "?"),
        exception_type=data.get("exception_type", "?"),
        exception_message=data.get("exception_message", "the server gave no reason: see its log").rstrip(),
        traceback="".join(data.get("traceback", [])),
    )


def _describe(node_errors: dict[str, Any]) -> list[str]:
    lines = []
    for node, report in node_errors.items():
        for error in report.get("errors", []):
            details = f": {error['details']}" if error.get("details") else ""
            lines.append(f"  node {node} ({report.get('class_type')}): {error.get('message')}{details}")
    return lines
