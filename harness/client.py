"""A client of a running ComfyUI: queue a graph, follow it, get its result.

The history endpoint is the source of truth for how a prompt ended; the websocket adds what happened on the way. The
socket is opened with the client, before anything is queued, and a thread keeps its events, so none is lost however
late one starts to wait.
"""

from __future__ import annotations

import http.client
import json
import struct
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
import uuid
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import websocket

# The server is on a loopback address: a proxy from the environment must not get between.
_OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}))
_POLL_S = 0.5
_LAST_EVENTS_S = 2.0
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


def http_request(url: str, payload: Any = None, timeout: float = 30.0) -> bytes:
    """GET the URL, or POST the payload as JSON if there is one, past any proxy.

    Raises:
        ServerGone: nothing answers there.
        urllib.error.HTTPError: the server answered with an error status.
    """
    body = None if payload is None else json.dumps(payload).encode()
    request = urllib.request.Request(url, data=body, headers={"Content-Type": "application/json"})
    try:
        with _OPENER.open(request, timeout=timeout) as response:
            return response.read()
    except urllib.error.HTTPError:
        raise
    except (OSError, http.client.HTTPException) as error:
        raise ServerGone(f"{url} does not answer ({error}): has the ComfyUI server ended? See its log.") from error


class Client:
    """One client of one server. Use it from one thread; close it, or use it as a context manager."""

    def __init__(self, host: str, port: int) -> None:
        self.url = f"http://{host}:{port}"
        self.client_id = uuid.uuid4().hex
        self._events: dict[str, list[Event]] = defaultdict(list)
        self._node_errors: dict[str, Any] = {}
        self._arrived = threading.Condition()
        address = f"ws://{host}:{port}/ws?clientId={self.client_id}"
        try:
            self._socket = websocket.create_connection(address, timeout=30, http_no_proxy=[host])
        except (OSError, websocket.WebSocketException) as error:
            raise ServerGone(f"{address} does not answer ({error}): is the ComfyUI server running?") from error
        self._socket.settimeout(None)
        self._listener = threading.Thread(target=self._listen, name=f"comfyui-events-{port}", daemon=True)
        self._listener.start()

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the websocket. Prompts that are queued go on."""
        self._socket.abort()
        self._listener.join(timeout=5)
        self._socket.shutdown()

    def queue(self, graph: dict[str, Any]) -> str:
        """Queue a graph in API format and return its prompt id.

        Raises:
            GraphRejected: ComfyUI's validation refused it.
        """
        try:
            answer = self._json("/prompt", {"prompt": graph, "client_id": self.client_id})
        except urllib.error.HTTPError as error:
            if error.code != 400:
                raise
            raise GraphRejected(json.loads(error.read())) from error
        self._node_errors[answer["prompt_id"]] = answer.get("node_errors") or {}
        return answer["prompt_id"]

    def wait(
        self, prompt_id: str, timeout: float = 600.0, on_event: Callable[[Event], None] | None = None
    ) -> PromptResult:
        """Wait until a prompt queued by this client has ended. Call it once per prompt.

        Args:
            timeout: seconds. The prompt goes on after a time-out.
            on_event: called in this thread for every event, in order.
        Raises:
            TimeoutError: the message names the last event.
            PromptLost: the prompt was deleted from the queue.
            ServerGone: the server ended.
        """
        deadline = time.monotonic() + timeout
        reported = 0
        entry: dict[str, Any] | None = None
        next_poll = 0.0
        while True:
            events = self._wait_for_events(prompt_id, reported)
            for event in events[reported:]:
                if on_event:
                    on_event(event)
            reported = len(events)
            # ComfyUI sends this last, after it has written the history.
            is_over = any(e.type == "executing" and e.data.get("node") is None for e in events)
            now = time.monotonic()
            if entry is None and (is_over or now >= next_poll):
                next_poll = now + _POLL_S
                if entry := self._history(prompt_id):
                    # The server writes the history before it sends the last events, so these may still be on the way.
                    deadline = now + _LAST_EVENTS_S
            if entry is not None and (is_over or now >= deadline or not self._listener.is_alive()):
                return self._result(prompt_id, entry)
            if entry is None and now >= deadline:
                raise TimeoutError(self._describe_timeout(prompt_id, timeout))

    def run(
        self,
        graph: dict[str, Any],
        timeout: float = 600.0,
        on_event: Callable[[Event], None] | None = None,
        check: bool = False,
    ) -> PromptResult:
        """Queue a graph and wait for it.

        Raises:
            PromptFailed: only with `check`: it ended in an error, was interrupted, or ran without some of its outputs.
        """
        result = self.wait(self.queue(graph), timeout, on_event)
        if check and (result.status != "success" or result.node_errors):
            raise PromptFailed(result)
        return result

    def interrupt(self) -> None:
        """Stop the prompt that is running."""
        self._post("/interrupt", {})

    def free(self, unload_models: bool = True, free_memory: bool = True) -> None:
        """Ask ComfyUI to unload models and drop caches; it does so when the queue is idle, soon after this returns."""
        self._post("/free", {"unload_models": unload_models, "free_memory": free_memory})

    def object_info(self, node: str | None = None) -> dict[str, Any]:
        """The schemas of all nodes, or {node: schema} of one ({} if there is no such node)."""
        return self._json("/object_info" + (f"/{urllib.parse.quote(node, safe='')}" if node else ""))

    def view(self, filename: str, subfolder: str = "", type: str = "output") -> bytes:
        """The content of an output file; the arguments are an entry of `outputs[node]["images"]`."""
        query = urllib.parse.urlencode({"filename": filename, "subfolder": subfolder, "type": type})
        return http_request(f"{self.url}/view?{query}")

    def queue_state(self) -> dict[str, list[str]]:
        """The prompt ids that are {"running": [...], "pending": [...]}."""
        state = self._json("/queue")
        return {name: [item[1] for item in state[f"queue_{name}"]] for name in ("running", "pending")}

    def _json(self, path: str, payload: Any = None) -> Any:
        return json.loads(http_request(self.url + path, payload))

    def _post(self, path: str, payload: Any) -> None:
        http_request(self.url + path, payload)

    def _history(self, prompt_id: str) -> dict[str, Any] | None:
        # A prompt moves from the queue to the history in one step: ask the queue first, so that a prompt which ends
        # between the two questions is seen in the history.
        known = any(prompt_id in ids for ids in self.queue_state().values())
        entry = self._json(f"/history/{prompt_id}").get(prompt_id)
        if entry is None and not known:
            raise PromptLost(
                f"Prompt {prompt_id} is neither queued, nor running, nor in the history of {self.url}: "
                "it was deleted from the queue, or the server is not the one that it was queued on."
            )
        return entry

    def _wait_for_events(self, prompt_id: str, known: int) -> list[Event]:
        with self._arrived:
            if self._listener.is_alive():
                self._arrived.wait_for(lambda: len(self._events[prompt_id]) > known, timeout=_POLL_S)
            else:
                self._arrived.wait(timeout=_POLL_S)
            return list(self._events[prompt_id])

    def _result(self, prompt_id: str, entry: dict[str, Any]) -> PromptResult:
        messages = [(kind, data) for kind, data in entry["status"]["messages"]]
        by_kind = dict(messages)
        error = None
        if entry["status"]["status_str"] == "success":
            status = "success"
        elif "execution_interrupted" in by_kind:
            status = "interrupted"
        else:
            status = "error"
            error = _node_error(by_kind.get("execution_error", {}))
        times_ms = [data["timestamp"] for _, data in messages]
        with self._arrived:
            events = self._events.pop(prompt_id, [])
        return PromptResult(
            prompt_id=prompt_id,
            status=status,
            seconds=(max(times_ms) - min(times_ms)) / 1000 if times_ms else 0.0,
            outputs=entry["outputs"],
            error=error,
            messages=messages,
            events=events,
            node_errors=self._node_errors.pop(prompt_id, {}),
        )

    def _describe_timeout(self, prompt_id: str, timeout: float) -> str:
        with self._arrived:
            events = self._events[prompt_id]
            last = f"{events[-1].type} {events[-1].data}" if events else "none"
        return (
            f"Prompt {prompt_id} has not ended after {timeout} s. Queue: {self.queue_state()}. Last event: {last}. "
            "Raise the time-out, or see the server's log."
        )

    def _listen(self) -> None:
        prompt_id = ""  # binary messages do not name their prompt: they belong to the one that is running
        while True:
            try:
                message = self._socket.recv()
            except (OSError, websocket.WebSocketException):
                return
            if not message:
                return
            event = _parse(message)
            if event is None:
                continue
            prompt_id = event.data.get("prompt_id") or prompt_id
            with self._arrived:
                self._events[prompt_id].append(event)
                self._arrived.notify_all()


def _parse(message: str | bytes) -> Event | None:
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


def _node_error(data: dict[str, Any]) -> NodeError:
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
