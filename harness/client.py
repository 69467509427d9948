"""A client of a running ComfyUI: queue a graph, follow it, get its result.

The history endpoint is the source of truth for how a prompt ended; the websocket adds what happened on the way. The
socket is opened with the client, before anything is queued, and a thread keeps its events, so none is lost however
late one starts to wait.
"""

from __future__ import annotations

import http.client
import json
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
import uuid
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import websocket

from .prompt_result import (
    Event,
    GraphRejected,
    PromptFailed,
    PromptLost,
    PromptResult,
    ServerGone,
    node_error,
    parse_event,
)

# The server is on a loopback address: a proxy from the environment must not get between.
_OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}))
_POLL_S = 0.5
_LAST_EVENTS_S = 2.0



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
            error = node_error(by_kind.get("execution_error", {}))
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
            event = parse_event(message)
            if event is None:
                continue
            prompt_id = event.data.get("prompt_id") or prompt_id
            with self._arrived:
                self._events[prompt_id].append(event)
                self._arrived.notify_all()
