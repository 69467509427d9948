"""What the prompts in ComfyUI's queue will want of LoRAs, so that it can be prepared while another one samples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import folder_paths

from ..accel.checkpoint import identify
from ..accel.engine import Engine
from ..accel.errors import AccelError, SettingsError
from ..accel.lora.schedule import between
from ..accel.prefetch import Prefetcher, WantedLora, WantedStack
from .files import find_model
from .native_lora import named_loras
from .prompts import Graph, graphs

OURS = "FluxHotswapLora"
LOADER = "FluxAccelLoader"
# ComfyUI's own nodes read their file themselves, so only its way from the disk can be saved. So do other packs' nodes
# and loaders of several LoRAs, which are known by the files that they name beside a model.
NATIVE = ("LoraLoader", "LoraLoaderModelOnly")
LORA_NODES = (OURS, *NATIVE)
# They hand a model on with the LoRAs that it has.
PASSING = ("FluxStepCache",)


def prefetcher_for(engine: Engine) -> Prefetcher:
    """A prefetcher that watches ComfyUI's queue for LoRAs of one engine's model."""
    checkpoint = engine.spec.file.identity.path

    def wanted() -> Sequence[WantedStack]:
        return [stack for graph in graphs() for stack in stacks_of(graph, checkpoint)]

    return Prefetcher(engine, wanted)


def stacks_of(graph: Graph, checkpoint: str) -> list[WantedStack]:
    """The stacks of LoRAs that a graph in API form puts on a checkpoint's model, in the order of their consumers.

    Args:
        graph: node id -> {"class_type", "inputs"}; a link is `[node id, output]`.
        checkpoint: real path of the model's file.
    """
    found: dict[WantedStack, None] = {}
    for node_id, node in graph.items():
        if _hands_on(graph, node_id):
            continue
        for link in node.get("inputs", {}).values():
            # Output 0 is the model's; what comes from output 1 is a CLIP.
            if _is_link(link) and link[1] == 0 and _hands_on(graph, link[0]):
                stack = _stack(graph, link[0], checkpoint)
                if stack:
                    found[stack] = None
    return list(found)


def _stack(graph: Graph, node_id: str, checkpoint: str) -> WantedStack:
    """Follow a chain of LoRA nodes up to its loader; empty if that is not this checkpoint's."""
    loras: list[WantedLora | None] = []
    visited: set[str] = set()
    while node_id in graph and node_id not in visited:
        visited.add(node_id)
        kind, inputs = _class(graph, node_id), graph[node_id].get("inputs", {})
        if kind == LOADER:
            return _ordered(loras) if _names_checkpoint(inputs.get("model_name"), checkpoint) else ()
        if kind in LORA_NODES:
            loras.append(_lora(kind, inputs))
        else:
            paths = [folder_paths.get_full_path("loras", name) for name in named_loras(inputs)]
            loras += [WantedLora(path, None, own=False) for path in reversed(paths) if path]
        link = inputs.get("model")
        if not _is_link(link):
            return ()
        node_id = link[0]
    return ()


def _hands_on(graph: Graph, node_id: str) -> bool:
    """Whether a node gives a model with LoRAs to others: one of those above, or any that names LoRAs beside a model."""
    if _class(graph, node_id) in (*LORA_NODES, *PASSING):
        return True
    inputs = graph.get(node_id, {}).get("inputs", {})
    return _is_link(inputs.get("model")) and any(named_loras(inputs))


def _names_checkpoint(name: Any, checkpoint: str) -> bool:
    try:
        return isinstance(name, str) and identify(find_model(name)).path == checkpoint
    except AccelError:  # its node will say so
        return False


def _ordered(upwards: Sequence[WantedLora | None]) -> WantedStack:
    """First applied first. Where one is not known, the stack cannot be prepared, but the others' files can be read."""
    known = [lora for lora in reversed(upwards) if lora is not None]
    if len(known) < len(upwards):
        known = [replace(lora, strength=None) for lora in known]
    return tuple(known)


def _lora(kind: str, inputs: Mapping[str, Any]) -> WantedLora | None:
    """What one node says; None if its file is linked, or is not there."""
    name = inputs.get("lora_name")
    path = folder_paths.get_full_path("loras", name) if isinstance(name, str) else None
    if path is None:
        return None
    strength = inputs.get("strength" if kind == OURS else "strength_model")
    percents, max_rank = (inputs.get("start_percent", 0.0), inputs.get("end_percent", 1.0)), inputs.get("max_rank", 0)
    if not all(isinstance(value, (int, float)) for value in (strength, max_rank, *percents)):
        return WantedLora(path, None, own=kind == OURS)
    try:
        return WantedLora(path, float(strength), between(*percents), int(max_rank), kind == OURS)
    except SettingsError:  # its node will say so
        return None


def _class(graph: Graph, node_id: str) -> str | None:
    return graph.get(node_id, {}).get("class_type")


def _is_link(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and len(value) == 2 and isinstance(value[0], str)
