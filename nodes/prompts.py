"""What ComfyUI says of the node that runs, of its prompt, and of the prompts that wait; nothing where it cannot say."""

from __future__ import annotations

import heapq
import itertools
import sys
from collections.abc import Iterator, Mapping
from typing import Any

Graph = Mapping[str, Mapping[str, Any]]
"""A prompt in API form: node id -> {"class_type", "inputs"}; a link among the inputs is `[node id, output]`."""
# How many queued prompts are looked at.
AHEAD = 8


def graphs() -> Iterator[Graph]:
    """The running prompt, then the queued ones, next first."""
    running, queued = _queue()
    for item in itertools.chain(running, heapq.nsmallest(AHEAD, queued, key=lambda item: item[:2])):
        yield item[2]


def inputs_of_running_node() -> Mapping[str, Any]:
    """The inputs of the node that runs now, as its prompt has them: values and links."""
    context = executing()
    if context is None:
        return {}
    running, _ = _queue()
    graph = next((item[2] for item in running if item[1] == context.prompt_id), {})
    return graph.get(context.node_id, {}).get("inputs", {})


def executing() -> Any:
    """ComfyUI's ExecutionContext, with `prompt_id` and `node_id`; None outside a node."""
    try:
        from comfy_execution.utils import get_executing_context
    except ImportError:
        return None
    return get_executing_context()


def server() -> Any:
    """ComfyUI's server, or what stands for it where nodes run in a process of their own; None without one."""
    # Not imported: ComfyUI did so long before a node runs, and elsewhere a web server is not wanted.
    return getattr(getattr(sys.modules.get("server"), "PromptServer", None), "instance", None)


def _queue() -> tuple[list[tuple], list[tuple]]:
    """Entries (number, prompt id, graph, …) that run, and that wait."""
    look = getattr(getattr(server(), "prompt_queue", None), "get_current_queue_volatile", None)
    return ([], []) if look is None else look()
